"""The decoder against a plain reading of its formulas in float64, and what it promises."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kvjax.models import Decoder, DecoderConfig, Rope, causal_attend
from kvjax.models.decoder import LayerParams, join_products, split_layers

SMALL = DecoderConfig(
    vocab_size=37, num_layers=3, embed_dim=12, mlp_dim=20, num_heads=4, num_kv_heads=2, head_dim=6,
    max_positions=64,
)  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "biased": {"qkv_bias": True, "out_bias": True, "mlp_bias": True, "num_kv_heads": 1},
    "normed-tied": {"qk_norm": True, "tie_embeddings": True, "num_kv_heads": 4},
    "windows": {"windows": (3, 0, 5), "rope": Rope(kind="linear", factor=2.0)},
    "llama3": {"rope": Rope(theta=5e5, kind="llama3", factor=8.0, original_max_positions=16)},
}


def shapes_of(config: DecoderConfig) -> tuple[Any, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))


def make(config: DecoderConfig, seed: int = 0) -> tuple[Any, nnx.State]:
    """A decoder with every weight random, those that begin as zeros and ones too."""
    graphdef, shapes = shapes_of(config)
    rng = np.random.default_rng(seed)
    draw = lambda x: jnp.asarray(0.5 * rng.standard_normal(x.shape), x.dtype)  # noqa: E731
    return graphdef, jax.tree.map(draw, shapes)


def run(config: DecoderConfig, params: nnx.State, tokens: np.ndarray, first: int = 0) -> np.ndarray:
    graphdef, _ = shapes_of(config)

    @jax.jit
    def logits(params: nnx.State, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        decoder = nnx.merge(graphdef, params)
        attend = causal_attend(config.layer_windows())
        return decoder.logits(decoder(tokens, positions, None, attend)[0])

    positions = np.broadcast_to(first + np.arange(tokens.shape[1]), tokens.shape)
    return np.asarray(logits(params, jnp.asarray(tokens), jnp.asarray(positions, jnp.int32)))


def plain_logits(config: DecoderConfig, params: nnx.State, tokens: np.ndarray) -> np.ndarray:
    """One sequence through the formulas, token by token and head by head, in float64."""
    c, weights = config, jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    freq = c.rope.inverse_frequencies(c.head_dim).astype(np.float64)

    def norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean() + c.norm_eps) * scale

    def turn(x: np.ndarray, position: int) -> np.ndarray:
        pair = (x[: c.head_dim // 2] + 1j * x[c.head_dim // 2 :]) * np.exp(1j * position * freq)
        return np.concatenate([pair.real, pair.imag])

    def linear(name: str, x: np.ndarray, layer: int) -> np.ndarray:
        kernel = weights["blocks"][name]["kernel"][...][layer]
        y = np.tensordot(x, kernel, x.ndim)
        return (
            y + weights["blocks"][name]["bias"][...][layer]
            if "bias" in weights["blocks"][name]
            else y
        )

    def vector(name: str, layer: int) -> np.ndarray:
        return weights["blocks"][name][...][layer]

    xs = [weights["embed"][...][token] for token in tokens]
    for layer in range(c.num_layers):
        ys = [norm(x, vector("attn_norm", layer)) for x in xs]
        q, k, v = ([linear(name, y, layer) for y in ys] for name in "qkv")
        if c.qk_norm:
            q = [np.stack([norm(head, vector("q_norm", layer)) for head in heads]) for heads in q]
            k = [np.stack([norm(head, vector("k_norm", layer)) for head in heads]) for heads in k]
        for t, x in enumerate(xs):
            window = c.windows[layer] if c.windows else 0
            seen = range(max(0, t + 1 - window) if window else 0, t + 1)
            heads = np.empty((c.num_heads, c.head_dim))
            for h in range(c.num_heads):
                kv = h * c.num_kv_heads // c.num_heads
                score = np.array([turn(q[t][h], t) @ turn(k[s][kv], s) for s in seen])
                weight = np.exp(score / np.sqrt(c.head_dim) - score.max() / np.sqrt(c.head_dim))
                heads[h] = sum(
                    w * v[s][kv] for w, s in zip(weight / weight.sum(), seen, strict=True)
                )
            x = x + linear("out", heads, layer)
            y = norm(x, vector("mlp_norm", layer))
            gate = linear("gate", y, layer)
            xs[t] = x + linear("down", gate / (1 + np.exp(-gate)) * linear("up", y, layer), layer)
    hidden = np.stack([norm(x, weights["norm"][...]) for x in xs])
    head = weights["embed"][...].T if c.tie_embeddings else weights["head"]["kernel"][...]
    return hidden @ head


TOKENS = np.random.default_rng(5).integers(0, SMALL.vocab_size, (2, 24)).astype(np.int32)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_the_formulas(variant: str) -> None:
    config = dataclasses.replace(SMALL, **VARIANTS[variant])
    _, params = make(config)
    logits = run(config, params, TOKENS)
    assert logits.dtype == np.float32
    for row, tokens in zip(logits, TOKENS, strict=True):
        expected = plain_logits(config, params, tokens)
        # float32 against float64 through three layers: some 1e-5 of the largest logit.
        np.testing.assert_allclose(row, expected, atol=3e-5 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_joined_products_are_the_same_products(variant: str) -> None:
    config = dataclasses.replace(SMALL, **VARIANTS[variant])
    graph, params = make(config)
    expected = run(config, params, TOKENS)
    graph, first, layers = join_products(graph, *split_layers(params), streams=True)
    assert set(layers[0]) & {"q", "k", "v", "gate", "up"} == set()

    @jax.jit
    def logits(first: nnx.State, layers: LayerParams) -> jax.Array:
        decoder = nnx.merge(graph, first)
        position = jnp.broadcast_to(jnp.arange(TOKENS.shape[1]), TOKENS.shape)
        attend = causal_attend(config.layer_windows())
        return decoder.logits(decoder(TOKENS, position, None, attend, layers=layers)[0])

    # Products of other widths may add in another order: some bits of float32.
    atol = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(logits(first, layers), expected, atol=atol, rtol=0)


@pytest.mark.slow
def test_bfloat16_is_close_and_logits_are_float32() -> None:
    config = dataclasses.replace(SMALL, dtype="bfloat16", qkv_bias=True, qk_norm=True)
    _, params = make(config)
    exact = run(config, jax.tree.map(lambda x: x.astype(jnp.float32), params), TOKENS)
    logits = run(config, params, TOKENS)
    assert logits.dtype == np.float32
    # bfloat16 keeps 8 bits; through three layers the errors add to some percent of the spread.
    assert np.sqrt(np.mean((logits - exact) ** 2)) < 0.05 * exact.std()


def test_later_tokens_change_nothing_before_them() -> None:
    _, params = make(SMALL)
    changed = TOKENS.copy()
    changed[:, 10:] = (changed[:, 10:] + 1) % SMALL.vocab_size
    before, after = run(SMALL, params, TOKENS), run(SMALL, params, changed)
    np.testing.assert_array_equal(before[:, :10], after[:, :10])
    assert np.abs(before[:, 10:] - after[:, 10:]).max() > 0.1


def test_tokens_outside_every_window_change_nothing() -> None:
    """Three layers with windows of 3 reach back 2 positions each, 6 in all."""
    config = dataclasses.replace(SMALL, windows=(3, 3, 3))
    _, params = make(config)
    changed = TOKENS.copy()
    changed[:, 4] = (changed[:, 4] + 1) % SMALL.vocab_size
    gap = np.abs(run(config, params, TOKENS) - run(config, params, changed)).max(axis=(0, 2))
    assert (gap[4:11] > 1e-4).all()
    assert (gap[:4] == 0).all() and (gap[11:] == 0).all()


def test_only_differences_of_positions_matter() -> None:
    """Rotary embedding: the same tokens a thousand positions later see the same."""
    _, params = make(SMALL)
    near, far = run(SMALL, params, TOKENS), run(SMALL, params, TOKENS, first=1000)
    # Angles near 1000 have float32 steps of 6e-5.
    np.testing.assert_allclose(near, far, atol=1e-3 * np.abs(near).max())


def test_attend_sees_every_layer_once_and_carries_its_state() -> None:
    config = dataclasses.replace(SMALL, num_kv_heads=1)
    graphdef, params = make(config)

    def attend(layer: jax.Array, q: Any, k: Any, v: Any, state: Any) -> tuple[Any, Any]:
        order, shapes = state
        assert (q.shape, k.shape, v.shape) == ((5, 4, 6), (5, 1, 6), (5, 1, 6))
        return q, (order.at[layer].set(order.max() + 1), shapes)

    state = (jnp.zeros(3, jnp.int32), {"any": jnp.ones(2)})
    tokens = jnp.arange(5, dtype=jnp.int32)
    hidden, (order, rest) = nnx.merge(graphdef, params)(tokens, tokens, state, attend)
    assert hidden.shape == (5, config.embed_dim)
    assert order.tolist() == [1, 2, 3] and rest["any"].tolist() == [1, 1]


def test_rotary_frequencies() -> None:
    """Llama 3.1: waves shorter than 8192/4 stay, longer than 8192/1 are slowed 8 times."""
    plain = Rope(theta=5e5).inverse_frequencies(128)
    np.testing.assert_allclose(plain, 5e5 ** -(np.arange(64) / 64), rtol=1e-6)
    np.testing.assert_array_equal(
        Rope(theta=5e5, kind="linear", factor=4.0).inverse_frequencies(128), plain / 4
    )
    rope = Rope(theta=5e5, kind="llama3", factor=8.0, original_max_positions=8192)
    scaled, wave = rope.inverse_frequencies(128), 2 * np.pi / plain
    assert scaled.dtype == np.float32
    np.testing.assert_array_equal(scaled[wave < 2048], plain[wave < 2048])
    np.testing.assert_array_equal(scaled[wave > 8192], plain[wave > 8192] / 8)
    between = (wave > 2048) & (wave < 8192)
    assert between.sum() > 4
    ratio = (scaled / plain)[between]
    assert (np.diff(ratio) < 0).all() and ratio.min() > 1 / 8 and ratio.max() < 1


def test_new_models_and_shapes_have_one_graph() -> None:
    """Equal and equally hashed, so that a jit cache hits whichever of them it sees."""
    abstract, shapes = shapes_of(SMALL)
    with jax.default_prng_impl("rbg"):  # which compiles in a fraction of the time
        graphdef, params = nnx.split(nnx.jit(lambda: Decoder(SMALL, rngs=nnx.Rngs(0)))())
    assert abstract == graphdef and hash(abstract) == hash(graphdef)
    assert jax.tree.structure(shapes) == jax.tree.structure(params)
    layers = np.asarray(params["blocks"]["q"]["kernel"][...])
    assert np.abs(layers[0] - layers[1]).max() > 0.1  # layers draw their own weights


@pytest.mark.parametrize("change", [{"num_kv_heads": 3}, {"windows": (1, 2)}])
def test_sizes_that_do_not_fit(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"num_kv_heads|windows"):
        dataclasses.replace(SMALL, **change)
