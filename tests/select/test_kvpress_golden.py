"""What kvpress 0.5.5 keeps of a random model's cache, we keep (golden/kvpress.npz says by what)."""

from pathlib import Path

import numpy as np
import pytest
from select_views import make_view, tokens

from kvjax.models import Rope
from kvjax.select import (
    H2O,
    TOVA,
    AdaKV,
    ChunkKV,
    ExpectedAttention,
    KeyDiff,
    Knorm,
    PyramidKV,
    SnapKV,
    StreamingLLM,
)

GOLDEN = np.load(Path(__file__).parent / "golden" / "kvpress.npz")
POLICIES = {
    "streaming": StreamingLLM(),
    "knorm": Knorm(),
    "keydiff": KeyDiff(),
    "tova": TOVA(),
    "snapkv": SnapKV(last=4),
    "pyramidkv": PyramidKV(last=4, beta=3),
    "chunkkv": ChunkKV(chunk=8, last=4),
    "expected": ExpectedAttention(),
    "adakv": AdaKV(scorer=SnapKV(last=4)),
    "h2o": H2O(recent_share=0.0, normalize=True),
}


@pytest.fixture(scope="module")
def view():
    q = GOLDEN["q"][:, None]  # [L, B, n, H, D]
    k, v = (np.swapaxes(GOLDEN[name], 1, 2)[:, None] for name in "kv")
    frequencies = Rope().inverse_frequencies(q.shape[-1])
    # Pages of one token: budgets of layers and heads are not rounded.
    return make_view(q, k, v, page_size=1, inverse_frequencies=frequencies)


@pytest.mark.parametrize("ratio", [0.5, 0.75])
@pytest.mark.parametrize("name", POLICIES)
def test_keeps_what_the_press_keeps(view, name, ratio):
    expected = GOLDEN[f"{name}/{ratio}"]  # bool[L, K, n]
    count = int(view.shape[3] * (1 - ratio))
    kept = np.asarray(POLICIES[name].keep(view, tokens(view, count)))[:, :, 0]
    assert np.array_equal(kept, expected)
