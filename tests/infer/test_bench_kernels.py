"""`kvjax bench kernels` in small: its work lists read what the cases say, its command speaks."""

import json

import numpy as np
import pytest

from kvjax.errors import InputError
from kvjax.infer.bench import kernels, other_kernels
from kvjax.infer.bench.kernels import Case, kernel_cases, work_of
from kvjax.infer.bench.other_kernels import DenseCase, LayersCase, ScoresCase
from kvjax.models import DecoderConfig

SMALL = {"heads": 4, "kv_heads": 2, "dim": 8, "layers": 2}
CASES = (
    Case(name="shared", groups=(2, 3), prefix=64, own=(3, 40), split=(32, 32), **SMALL),
    Case(name="tree", groups=(2, 8), prefix=64, levels=((4, 32), (2, 16)), own=40, **SMALL),
    Case(name="chunk", groups=(2, 1), own=96, queries=96, split=(128, 0), **SMALL),
)
OTHERS = (
    ScoresCase(name="scores", rows=2, length=64, queries=4, **SMALL),
    DenseCase(name="dense", rows=1, length=16, heads=2, kv_heads=1, dim=8, backwards=True),
)


@pytest.mark.parametrize("case", [*CASES, *kernel_cases()[:4]], ids=lambda case: case.name)
def test_every_query_reads_its_whole_row_once(case):
    work, num_pages, length = work_of(case)
    read = np.zeros(case.rows * case.queries, int)
    pages = np.asarray(work.pages)[0, 0]
    for items in work.items:
        for row, first, end, query, last in np.asarray(items.index)[: int(items.count)]:
            assert end - first <= items.max_pages and last - query <= items.max_queries
            assert (pages[row, first:end] < num_pages).all()
            for q in range(query, last):
                own = pages[q // case.queries, first:end]
                np.testing.assert_array_equal(own, pages[row, first:end])
                read[q] += min(end * case.page_size, length[row]) - first * case.page_size
    position = np.asarray(work.query_position)
    seen = position + 1
    assert ((read >= seen) & (read <= length.repeat(case.queries))).all()
    used = pages[pages < num_pages]
    assert sorted(set(used.tolist())) == list(range(num_pages))


@pytest.mark.slow
def test_the_command_ends_with_one_json_object(monkeypatch, capsys):
    monkeypatch.setattr(kernels, "kernel_cases", lambda: CASES)
    monkeypatch.setattr(other_kernels, "other_cases", lambda: OTHERS)
    monkeypatch.setattr(kernels, "seconds_a_call", lambda call: float(call()) + 1e-3)
    assert kernels.main(["--only", "shared", "--json"]) == 0
    (timing,) = json.loads(capsys.readouterr().out)["timings"]
    assert timing["case"] == "shared" and timing["microseconds"] == pytest.approx(500)
    assert 0 < timing["floor"] < 500
    with pytest.raises(InputError, match="no case is called other"):
        kernels.main(["--only", "other"])


def test_other_kernels_and_their_floors(monkeypatch):
    """Counted by hand: K once; two products forwards and five backwards, of half the pairs."""
    calls = []
    monkeypatch.setattr(other_kernels, "seconds_a_call", lambda call: calls.append(call()) or 8.0)
    monkeypatch.setattr(
        other_kernels, "seconds_a_layer", lambda f, n, *x: calls.append(f(0, *x)) or 1
    )
    scores, reference, dense = (t for case in OTHERS for t in case.timings(None, True))
    assert [x.implementation for x in (scores, reference, dense)] == [
        "default",
        "reference",
        "default",
    ]
    assert scores.terabytes * 1e12 == pytest.approx(2 * 64 * 2 * 8 * 2)
    assert dense.teraflops * 1e12 == pytest.approx(7 * 16 * 17 * 2 * 8)
    assert scores.floor == pytest.approx(2 * 64 * 2 * 8 * 2 / 4.23e6)
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in calls)


def test_layers_by_both_products(monkeypatch):
    """Counted by hand: bytes of a layer's weights; two operations for each of a row."""
    calls = []
    monkeypatch.setattr(other_kernels, "seconds_a_call", lambda call: calls.append(call()) or 2.0)
    model = DecoderConfig(
        vocab_size=8, num_layers=2, embed_dim=16, mlp_dim=24, num_heads=4, num_kv_heads=2,
        head_dim=8, max_positions=8, dtype="bfloat16",
    )  # fmt: skip
    plain, streamed = LayersCase(name="layers", rows=3, model=model).timings(None, True)
    weights = 16 * 64 + 32 * 16 + 3 * 16 * 24 + 2 * 16  # q, k, v; out; the MLP; two norms
    assert plain.terabytes * 1e12 == pytest.approx(2 * weights)
    assert plain.teraflops * 1e12 == pytest.approx(3 * 2 * weights)
    assert (plain.implementation, streamed.implementation) == ("default", "few_rows")
    # bfloat16 has 8 bits; the one product is summed before, the other after it is rounded.
    np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in calls), rtol=0.05, atol=0.05)
