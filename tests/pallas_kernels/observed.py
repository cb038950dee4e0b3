"""Random calls of `window_scores`, for the tests of its kernels against the reference."""

import jax.numpy as jnp
import numpy as np

from kvjax.cache import KVPool


def observed(*, A=16, H=8, K=4, C=None, D=64, P=16, M=20, B=3, R=2, late=0, holes=False,
             tracked=False, dtype="bfloat16", seed=0):  # fmt: skip
    """Arguments of `window_scores`; rows of random lengths, the first of them empty.

    Slots that are not in use are NaN. The queries are the last before `late` slots of each row;
    one of them is padding where the row is empty. Where positions are tracked some slots are
    dead and the others' positions have gaps.
    """
    rng = np.random.default_rng(seed)
    C = C or K
    J, slots = K // C, M * P
    N = J * B * M + 3
    end = rng.integers(slots // 2, slots, size=(1, J, B))
    end[:, :, 0], end[:, 0, -1] = 0, slots
    pages = rng.permutation(N)[: J * B * M].astype(np.int32).reshape(1, J, B, M)
    live = np.arange(slots) < end[0, ..., None]  # [J, B, S]
    position = np.broadcast_to(np.arange(slots), live.shape).copy()
    if tracked:
        live &= rng.random(live.shape) < 0.8
        position = np.where(live, 2 * position + 5, -1)
    plane, used = np.full((N, P), -1), np.zeros((N, P), bool)
    plane[pages[0]] = position.reshape(J, B, M, P)
    used[pages[0]] = live.reshape(J, B, M, P)
    k = np.where(used[:, None, None, :, None], rng.normal(size=(N, R, C, P, D)), np.nan)
    if holes:
        pages[0, -1, -1, [1, M // 2]] = N
    newest = np.where(live, position, 0).max(axis=(0, 2))[:, None] - late  # [B, 1]
    query_position = np.where(newest > 0, newest - np.arange(A)[None, ::-1], -1)
    k = jnp.asarray(k, dtype)
    pool = KVPool(k=k, v=k, position=jnp.asarray(plane, jnp.int32) if tracked else None)
    q = jnp.asarray(rng.normal(size=(B, A, H, D)), dtype)
    # About what an attention over so many keys has.
    lse = jnp.asarray(np.log(slots) + rng.random((B, A, H)), jnp.float32)
    numbers = (jnp.asarray(x, jnp.int32) for x in (pages, end, query_position))
    return q, lse, pool, jnp.int32(rng.integers(R)), *numbers
