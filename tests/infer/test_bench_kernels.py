"""`kvjax bench kernels` in small: its work lists read what the cases say, its command speaks."""

import json

import numpy as np
import pytest

from kvjax.errors import InputError
from kvjax.infer.bench import kernels, other_kernels
from kvjax.infer.bench.kernels import Case, kernel_cases, work_of
from kvjax.infer.bench.other_kernels import DenseCase, ScoresCase

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
