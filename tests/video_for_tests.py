"""A tiny video model whose weights are all random, and jitted functions of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kvjax.models.video_dit import Text, VideoDiT, VideoDiTConfig

SIZES = {
    "height": 4, "width": 4, "num_layers": 3, "embed_dim": 32, "num_heads": 4, "chunk": 4,
    "max_prefix": 13,
}  # fmt: skip


def tiny_model(**options):
    """Weights that start as zero are random too, or much would be tested in vain.

    Drawn by numpy: nothing is compiled for it.
    """
    config = VideoDiTConfig(**(SIZES | options))
    graph, shapes = nnx.split(nnx.eval_shape(lambda: VideoDiT(config, rngs=nnx.Rngs(0))))
    leaves, structure = jax.tree.flatten(shapes)
    rng = np.random.default_rng(0)
    drawn = [jnp.asarray(rng.normal(0, 0.12, leaf.shape), leaf.dtype) for leaf in leaves]
    return nnx.merge(graph, jax.tree.unflatten(structure, drawn))


class Calls:
    """The model's calls, each compiled once for each shape."""

    def __init__(self, **options):
        self.model = tiny_model(**options)
        self.config = self.model.config
        graph, self.params = nnx.split(self.model)

        def call(name, params, *args, **kwargs):
            method = nnx.merge(graph, params)
            return (method if name == "whole" else getattr(method, name))(*args, **kwargs)

        self.programs = {
            name: jax.jit(functools.partial(call, name), static_argnames="return_kv")
            for name in ("whole", "denoise", "write")
        }

    def __getattr__(self, name):
        return functools.partial(self.programs[name], self.params)

    def text(self, rows):
        if not self.config.text_dim:
            return None
        embed = jax.random.normal(jax.random.key(9), (rows, 5, self.config.text_dim))
        return Text(embed, jnp.arange(5)[None] < jnp.array([[5], [3]])[:rows])

    def ring(self, video, frames, **options):
        """A ring with the first frames of a video written, 1 and then chunk by chunk."""
        ring = self.config.ring(video.shape[0]).init()
        text = self.text(video.shape[0])
        ring = self.write(video[:, :1], ring, text)
        for begin in range(1, frames, self.config.chunk):
            ring = self.write(video[:, begin : begin + self.config.chunk], ring, text)
        return ring


def random_video(rows, frames, seed=0, channels=4):
    drawn = np.random.default_rng(seed).normal(size=(rows, frames, 4, 4, channels))
    return jnp.asarray(drawn, jnp.float32)


def clip_times(prefix, frames, t):
    """0 for the prefix, t [B] behind it."""
    clean = jnp.arange(frames)[None] < prefix
    return jnp.where(clean, 0, jnp.asarray(t)[:, None])
