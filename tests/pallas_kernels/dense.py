"""A second, independent oracle: numpy, float64, one query at a time."""

import numpy as np


def attend(q, keys, values, seen, *, scale=None, soft_cap=None):
    """q [T, H, D]; keys, values [S, K, D] or per query [T, S, K, D]; seen bool[T, S]."""
    t, h, d = q.shape
    q, keys, values = (np.asarray(x, np.float64) for x in (q, keys, values))
    keys = np.broadcast_to(keys, (t, *keys.shape[-3:]))
    values = np.broadcast_to(values, (t, *values.shape[-3:]))
    group = h // keys.shape[2]
    out, lse = np.zeros((t, h, d)), np.full((t, h), -np.inf)
    for i in range(t):
        (live,) = np.nonzero(seen[i])
        if not len(live):
            continue
        for head in range(h):
            score = keys[i, live, head // group] @ q[i, head] * (scale or d**-0.5)
            if soft_cap is not None:
                score = soft_cap * np.tanh(score / soft_cap)
            weight = np.exp(score - score.max())
            out[i, head] = weight @ values[i, live, head // group] / weight.sum()
            lse[i, head] = score.max() + np.log(weight.sum())
    return out, lse
