"""The cases of `kvjax bench kernels` other than `page_attention`'s."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kvjax.cache import KVPool
from kvjax.infer.bench.batch import random_model
from kvjax.infer.bench.generate import SHAPES
from kvjax.infer.bench.kernels import Timing, random_pool, seconds_a_call, seconds_a_layer
from kvjax.models import DecoderConfig
from kvjax.models.decoder import LayerParams, join_products, split_layers
from kvjax.pallas_kernels.prefill_attention import prefill_attention
from kvjax.pallas_kernels.window_scores import window_scores

__all__ = ["DenseCase", "LayersCase", "ScoresCase", "other_cases"]

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoresCase:
    """`window_scores` of the last queries of some prompts.

    Attributes:
        name: what the case is called.
        rows: B.
        length: tokens a row, all of which are scored.
        queries: A.
        window: tokens each.
        page_size: P.
        heads: H.
        kv_heads: K.
        dim: D.
        layers: of the pool, all in one page.
    """

    name: str
    rows: int
    length: int
    queries: int = 32
    window: int = 16
    page_size: int = 16
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    layers: int = 32

    def timings(self, implementation: str | None, peers: bool) -> Iterator[Timing]:
        """By the implementation, and by XLA where peers are asked for."""
        entries = self.length // self.page_size
        shape = (self.rows * entries, self.layers, self.kv_heads, self.page_size, self.dim)
        keys = random_pool(shape).k
        order = np.random.default_rng(0).permutation(shape[0]).astype(np.int32)
        pages = jnp.asarray(order.reshape(1, 1, self.rows, entries))
        end = jnp.full((1, 1, self.rows), self.length, jnp.int32)
        last = np.tile(np.arange(self.length, self.length + self.queries), (self.rows, 1))
        shape = (self.rows, self.queries, self.heads)
        q = jax.random.normal(jax.random.key(0), (*shape, self.dim), jnp.bfloat16)
        lse = jnp.full(shape, np.log(self.length), jnp.float32)
        place = jnp.asarray(last, jnp.int32)
        for name in (implementation, "reference") if peers else (implementation,):

            def score(layer: Array, keys: Array, *rest: Array, name: str | None = name) -> Array:
                pool = KVPool(k=keys, v=keys)  # values are not looked at
                return window_scores(
                    q, lse, pool, layer, *rest, window=self.window, implementation=name
                )

            seconds = seconds_a_layer(score, self.layers, keys, pages, end, place)
            moved = self.rows * self.length * self.kv_heads * self.dim * 2
            flops = self.rows * self.length * self.heads * self.queries * self.dim * 2
            yield Timing.of(self.name, name or "default", seconds, moved, flops)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseCase:
    """`prefill_attention` of whole sequences.

    Attributes:
        name: what the case is called.
        rows: B.
        length: T.
        heads: H.
        kv_heads: K.
        dim: D.
        backwards: whether gradients are taken too.
    """

    name: str
    rows: int
    length: int
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    backwards: bool = False

    def timings(self, implementation: str | None, peers: bool) -> Iterator[Timing]:
        """By the best implementation here; others' kernels are what is timed."""
        keys = jax.random.split(jax.random.key(0), 3)
        q, k, v = (
            jax.random.normal(key, (self.rows, self.length, heads, self.dim), jnp.bfloat16)
            for key, heads in zip(keys, (self.heads, self.kv_heads, self.kv_heads), strict=True)
        )

        def attend(q: Array, k: Array, v: Array) -> Array:
            return prefill_attention(q, k, v)[0]

        def step(q: Array, k: Array, v: Array) -> Array:
            if not self.backwards:
                return attend(q, k, v)
            out, backward = jax.vjp(attend, q, k, v)
            return backward(out)[0]  # one kernel gives all three

        @functools.partial(jax.jit, static_argnums=3)
        def often(q: Array, k: Array, v: Array, times: int) -> Array:
            return jax.lax.fori_loop(0, times, lambda _, q: step(q, k, v), q)

        seconds = seconds_a_call(functools.partial(often, q, k, v, 8)) / 8
        products = 2 + 5 * self.backwards  # two forwards, five backwards
        flops = products * self.rows * self.length * (self.length + 1) * self.heads * self.dim
        moved = (q.nbytes * 2 + k.nbytes * 2) * (3 if self.backwards else 1)
        yield Timing.of(self.name, "default", seconds, moved, flops)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayersCase:
    """A decoder's layers for few rows, without attention: norms, products and what joins them.

    Attributes:
        name: what the case is called.
        rows: T.
        model: whose layers; bfloat16.
    """

    name: str
    rows: int
    model: DecoderConfig

    def timings(self, implementation: str | None, peers: bool) -> Iterator[Timing]:
        """By XLA's products, and by `few_rows`, which streams weights on Hopper."""
        tokens = jnp.arange(self.rows, dtype=jnp.int32)
        for streams in (False, True) if peers else (False,):
            graph, made = random_model(self.model)
            apart = split_layers(made, consume=True)
            graph, params, layers = join_products(graph, *apart, streams=streams)

            run = jax.jit(functools.partial(_run_layers, graph))
            seconds = seconds_a_call(functools.partial(run, params, layers, tokens)) / len(layers)
            moved = sum(leaf.nbytes for leaf in jax.tree.leaves(layers[0]))
            name = "few_rows" if streams else "default"
            yield Timing.of(self.name, name, seconds, moved, moved * self.rows)


def _run_layers(graph: Any, params: Any, layers: LayerParams, tokens: Array) -> Array:
    decoder = nnx.merge(graph, params)
    return decoder(tokens, tokens, None, _no_attention, layers=layers)[0]


def _no_attention(layer: Array, q: Array, k: Array, v: Array, state: Any) -> tuple[Array, Any]:
    return q + (k + v).sum(1, keepdims=True), state  # all of the product is wanted


def other_cases() -> tuple[ScoresCase | DenseCase | LayersCase, ...]:
    """The shapes that benchmarks.md reports."""
    return (
        ScoresCase(name="scores of 32 queries, 1 x 32768", rows=1, length=32768),
        ScoresCase(name="scores of 32 queries, 16 x 4096", rows=16, length=4096),
        ScoresCase(name="scores of 8 queries, 1 x 32768", rows=1, length=32768, queries=8),
        DenseCase(name="dense attention 2 x 8192", rows=2, length=8192),
        DenseCase(name="dense attention 2 x 8192, with gradients", rows=2, length=8192,
                  backwards=True),
        DenseCase(name="dense attention 64 x 1024, heads of 64, with gradients", rows=64,
                  length=1024, dim=64, backwards=True),
        *(LayersCase(name=f"layers without attention, {rows} rows", rows=rows, model=SHAPES["1b"])
          for rows in (16, 64, 128)),
    )  # fmt: skip
