"""`window_scores` against the whole attention matrix."""

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.pallas_kernels.window_scores import summarize, window_scores

# float32 sums of up to 40 products of up to 16 terms each, beside float64.
TOLERANCE = 2e-6


class Pool:
    """Pages of keys, shuffled; what no row has written is NaN."""

    def __init__(self, k, page_size, positions=True):
        layers, rows, n, heads, d = k.shape
        entries = -(-n // page_size) + 1
        num = rows * entries
        pages = np.random.default_rng(3).permutation(num).astype(np.int32).reshape(rows, entries)
        self.k = np.full((num, layers, heads, page_size, d), np.nan, np.float32)
        self.position = np.full((num, page_size), -1, np.int32) if positions else None
        for row in range(rows):
            for slot in range(n):
                page, offset = pages[row, slot // page_size], slot % page_size
                self.k[page, :, :, offset] = k[:, row, slot]
                if positions:
                    self.position[page, offset] = slot
        self.k = jnp.asarray(self.k)
        self.position = None if self.position is None else jnp.asarray(self.position)
        self.pages = jnp.asarray(pages[None, None])


def attention(q, k):
    """float64[B, H, n, n] of one layer and lse [B, n, H]."""
    k = np.repeat(k, q.shape[2] // k.shape[2], axis=2)
    score = np.einsum("bqhd,bshd->bhqs", q.astype(np.float64), k) * q.shape[-1] ** -0.5
    n = q.shape[1]
    score = np.where(np.tril(np.ones((n, n), bool)), score, -np.inf)
    lse = np.log(np.exp(score).sum(-1))
    return np.exp(score - lse[..., None]), np.moveaxis(lse, 1, 2)


@pytest.fixture(params=[1, 4], ids=["alpha 1", "alpha 4"])
def case(request):
    alpha, n = request.param, 37
    rng = np.random.default_rng(0)
    q = rng.normal(size=(2, 2, n, 4, 16)).astype(np.float32)
    k = rng.normal(size=(2, 2, n, 2, 16)).astype(np.float32)
    return q, k, alpha


def run(q, k, alpha, layer=1, end=None, **options):
    n = q.shape[2]
    pool = Pool(k, 8, options.pop("positions", True))
    _, lse = attention(q[layer], k[layer])
    end = n - alpha if end is None else end
    position = jnp.broadcast_to(jnp.arange(n - alpha, n, dtype=jnp.int32)[None], (2, alpha))
    return np.asarray(
        window_scores(
            jnp.asarray(q[layer, :, n - alpha :]),
            jnp.asarray(lse[:, n - alpha :], jnp.float32),
            pool, jnp.int32(layer), pool.pages, jnp.full((1, 1, 2), end, jnp.int32), position,
            **options,
        )
    )  # fmt: skip


@pytest.mark.parametrize("positions", [True, False])
def test_token_scores_are_columns_of_the_attention(case, positions):
    q, k, alpha = case
    expected = attention(q[1], k[1])[0][:, :, -alpha:].sum(2)
    scores = run(q, k, alpha, positions=positions)
    n = q.shape[2]
    np.testing.assert_allclose(
        scores[..., : n - alpha], expected[..., : n - alpha], atol=TOLERANCE, rtol=0
    )
    assert not scores[..., n - alpha :].any()
    assert (scores.sum(-1) <= alpha + 1e-5).all()  # what all queries pay in all


def test_all_queries_see_no_later_token(case):
    q, k, _ = case
    n = q.shape[2]
    expected = attention(q[1], k[1])[0].sum(2)
    scores = run(q, k, n, end=n)
    np.testing.assert_allclose(scores[..., :n], expected, atol=2 * n * TOLERANCE / 8, rtol=0)


@pytest.mark.parametrize(
    ("window", "top"),
    [(window, top) for window in (1, 4, 8) for top in (None, 1, 2) if (top or 1) <= window],
)
def test_windows_are_means_of_their_tokens(case, window, top):
    q, k, alpha = case
    tokens = run(q, k, alpha)
    n, end = q.shape[2], q.shape[2] - alpha
    windows = run(q, k, alpha, window=window, top=top)
    for w in range(-(-n // window)):
        own = np.sort(tokens[..., w * window : min((w + 1) * window, end)], axis=-1)
        own = own if top is None else own[..., -top:]
        expected = own.mean(-1) if own.shape[-1] else np.zeros(own.shape[:-1])
        np.testing.assert_allclose(windows[..., w], expected, atol=1e-6, rtol=0)
    over = run(q, k, alpha, window=window, top=top, over_heads=True)
    np.testing.assert_allclose(over, windows.mean(1), atol=1e-6, rtol=0)


def test_worked_windows():
    hundredths = [10, 2, 1, 1, 0, 30, 0, 0, 5, 5, 5, 5, 20, 0, 0, 1, 3]
    tokens, live = jnp.array(hundredths, jnp.float32) / 100, jnp.ones(17, bool)
    mean, two = summarize(tokens, live, 4, None), summarize(tokens, live, 4, 2)
    np.testing.assert_allclose(mean, [0.035, 0.075, 0.05, 0.0525, 0.03], atol=1e-7)
    np.testing.assert_allclose(two, [0.06, 0.15, 0.05, 0.105, 0.03], atol=1e-7)


def test_padding_queries_pay_nothing(case):
    q, k, _ = case
    pool = Pool(k, 8)
    arguments = (pool, jnp.int32(0), pool.pages, jnp.full((1, 1, 2), 30, jnp.int32))
    scores = window_scores(
        jnp.asarray(q[0, :, :3]), jnp.full((2, 3, 4), -jnp.inf), *arguments,
        jnp.full((2, 3), -1, jnp.int32),
    )  # fmt: skip
    assert not np.asarray(scores).any()


@pytest.mark.parametrize("options", [{"window": 0}, {"window": 2, "top": 3}, {"top": 0}])
def test_what_makes_no_window(case, options):
    with pytest.raises(ValueError, match="window"):
        run(*case, **options)


def test_an_unknown_implementation(case):
    with pytest.raises(NotImplementedError, match="cpu"):
        run(*case, implementation="cpu")
