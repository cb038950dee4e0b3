"""Budgets: what people write, the published formulas, and how a total is shared."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax.errors import InputError
from kvjax.select.budgets import (
    code_budgets,
    paper_budgets,
    parse_budget,
    redistribute,
    share_out,
)


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [
        ("1/8", 0.125, "ratio"),
        ("12%", 0.12, "ratio"),
        (0.12, 0.12, "ratio"),
        (256, 256, "tokens"),
        ("2KiB", 2048, "bytes"),
        ("1.5 MB", 1.5e6, "bytes"),
    ],
)
def test_budgets_as_people_write_them(text, amount, unit):
    budget = parse_budget(text)
    assert (budget.amount, budget.unit) == (pytest.approx(amount), unit)


@pytest.mark.parametrize("text", ["", "much", "1/0.5", "120%", "0", "-1", "2GiBs"])
def test_what_is_no_budget(text):
    with pytest.raises(InputError, match="budget"):
        parse_budget(text)


def test_tokens_are_whole_pages_and_the_whole_prompt_is_the_most():
    length = np.array([1000, 30, 3])
    assert parse_budget("12%").tokens(length, 64, 4).tolist() == [120, 4, 3]
    assert parse_budget(30).tokens(length, 64, 4).tolist() == [28, 30, 3]
    assert parse_budget("1KiB").tokens(length, 64, 4).tolist() == [16, 16, 3]
    assert parse_budget("1/1").tokens(length, 64, 4).tolist() == length.tolist()


@pytest.mark.parametrize(
    ("capacity", "group", "groups", "expected"),
    [
        (2048, 8, 4, [2926, 2341, 1756, 1170]),
        (1024, 8, 4, [1463, 1171, 879, 585]),
        (512, 8, 4, [732, 586, 440, 292]),
        (2048, 7, 4, [3072, 2390, 1708, 1024]),
        (512, 7, 4, [768, 598, 428, 256]),
    ],
)
def test_budgets_of_the_code_as_published_models_have_them(capacity, group, groups, expected):
    assert code_budgets(capacity, group, groups) == expected
    arrays = code_budgets(jnp.array([capacity]), group, groups)
    assert [int(x[0]) for x in arrays] == expected


def test_budgets_of_the_paper():
    expected = [3949.7, 2681.9, 1414.1, 146.3]
    assert paper_budgets(2048.0, 4) == pytest.approx(expected, abs=0.05)


@given(capacity=st.integers(1, 10_000), groups=st.integers(1, 40))
def test_budgets_of_the_paper_fall_and_have_the_capacity_as_mean(capacity, groups):
    budgets = paper_budgets(float(capacity), groups)
    assert sum(budgets) == pytest.approx(capacity * groups, rel=1e-9)
    assert all(a >= b for a, b in itertools.pairwise(budgets))
    whole = paper_budgets(capacity, groups)
    assert all(int(x) <= y + 1e-6 for x, y in zip(whole, budgets, strict=True))


def test_a_pyramid_upside_down_is_refused():
    with pytest.raises(InputError, match="16 layers"):
        code_budgets(2048, 16, 2)


@pytest.mark.slow
@settings(deadline=None, max_examples=30)  # compiles
@given(st.lists(st.tuples(st.integers(0, 200), st.integers(0, 200)), min_size=1, max_size=8))
def test_redistribution_exceeds_neither_limits_nor_the_sum(parts):
    budgets, limits = np.array(parts, np.int32).T
    shared = np.asarray(redistribute(jnp.array(budgets)[:, None], jnp.array(limits)[:, None]))[:, 0]
    assert (shared <= limits).all()
    assert shared.sum() <= budgets.sum()
    # Whole tokens: at most one a part and round is lost while there is room.
    lost = min(budgets.sum(), limits.sum()) - shared.sum()
    assert 0 <= lost <= len(parts) ** 2


def test_redistribution_by_weight():
    budgets = jnp.array([[100], [0], [0]], jnp.int32)
    limits = jnp.array([[40], [100], [100]], jnp.int32)
    shared = redistribute(budgets, limits, jnp.array([[1.0], [2.0], [1.0]]))
    assert shared[:, 0].tolist() == [40, 40, 20]


@settings(deadline=None, max_examples=30)  # compiles
@given(st.lists(st.integers(0, 500), min_size=1, max_size=8), st.integers(1, 16))
def test_rounding_to_pages_keeps_the_sum(parts, unit):
    parts = np.array(parts, np.int32)[:, None]
    total = parts.sum(0)
    rounded = np.asarray(share_out(jnp.array(parts), jnp.array(total), unit, (0,)))
    assert (rounded % unit == 0).all()
    assert rounded.sum() == total[0] // unit * unit
    assert (abs(rounded - parts) < unit).all()
