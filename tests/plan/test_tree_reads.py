"""What the rows of a search tree read of the cache, when what they share is read once."""

import numpy as np
import pytest

from kvjax.cache import PageLedger
from kvjax.plan import FirstCome, Grid, Request

SHARED, OWN, LEAVES, PAGE = 2048, 64, 16, 16


def pages_read(grouped):
    """Pages that one decoding step of all leaves reads."""
    grid = Grid(
        page_size=PAGE, max_rows=LEAVES, pages_per_row=160, row_buckets=(LEAVES,),
        token_buckets=(4096,), split_pages=64, decode_steps=1, shared_pages=4 if grouped else 0,
    )  # fmt: skip
    planner = FirstCome(grid, PageLedger(4096), grouped=grouped)
    prompt = tuple(np.random.default_rng(0).integers(0, 50, SHARED).tolist())
    for leaf in range(LEAVES):
        own = np.random.default_rng(1 + leaf).integers(0, 50, OWN).tolist()
        planner.add(Request(id=leaf, prompt=(*prompt, *own), max_tokens=4))
    while True:
        planned = planner.plan()
        assert planned is not None
        step = planned.step
        if not planned.bucket.chunks and int((step.row < LEAVES).sum()) == LEAVES:
            return sum(
                int((items[:count, 2] - items[:count, 1]).sum())
                for items, count in (
                    (step.singles, int(step.num_singles)), (step.tiles, int(step.num_tiles)),
                )
            )  # fmt: skip
        planner.accept(planned, np.zeros((1, planned.bucket.rows), np.int32))


def test_a_shared_beginning_is_read_once_for_all_leaves():
    ratio = pages_read(grouped=True) / pages_read(grouped=False)
    expected = (SHARED + LEAVES * OWN) / (LEAVES * (SHARED + OWN))
    # Each leaf reads the page that its next token is in, of which it has one token.
    assert ratio == pytest.approx(expected, rel=0.1)
