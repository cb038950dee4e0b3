"""What the released WindowKV keeps of random layers, we keep (golden/windowkv.npz says by what)."""

import json
from pathlib import Path

import numpy as np
import pytest
from select_views import kept_by, make_view

from kvjax.select import WindowKV

GOLDEN = np.load(Path(__file__).parent / "golden" / "windowkv.npz")
CASES = json.loads(str(GOLDEN["about"]))["cases"]


@pytest.mark.parametrize("number", range(len(CASES)))
def test_keeps_what_the_released_code_keeps(number):
    strategy, n, window, alpha, capacity, layers, group = CASES[number]
    last, k = GOLDEN[f"{number}/q"], GOLDEN[f"{number}/k"]  # [L, H, alpha, D], [L, K, n, D]
    keys = np.swapaxes(k, 1, 2)[:, None]
    q = np.zeros((layers, 1, n, last.shape[1], last.shape[3]), np.float32)
    q[:, 0, -alpha:] = np.swapaxes(last, 1, 2)
    view = make_view(q, keys, keys, page_size=4)
    policy = WindowKV(
        window=window, alpha=alpha, group=group, budgets="code", exact=True, strict=False,
        share_rest=False, strategy="mean" if strategy == "average" else "top",
    )  # fmt: skip
    # The code counts alpha beside its capacity.
    kept = np.asarray(kept_by(policy, view, capacity + alpha))[:, 0, 0, :n]
    expected = GOLDEN[f"{number}/kept"]
    for layer in range(layers):
        leader = layer // group * group
        if not np.array_equal(expected[layer], expected[leader]):
            # Its followers use the ids of another group where the leader kept the suffix alone:
            # they should have done as the leader.
            assert expected[leader].sum() == alpha
        assert np.array_equal(kept[layer], expected[leader])
