"""A whole generation as one job: who shares what, which program runs when, who learns what."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kvjax.infer.private.lowering import cached, lower
from kvjax.infer.private.model import (
    Policy,
    angles,
    check_config,
    embed,
    logits,
    next_token,
    prepare,
    read_prompt,
)
from kvjax.infer.private.session import Job
from kvjax.models.decoder import Decoder, DecoderConfig

__all__ = ["add_generation", "in_the_clear", "weight_shapes"]

OWNER = 0
"""The party that shares the weights."""


def weight_shapes(config: DecoderConfig) -> dict[str, np.ndarray]:
    """Zeros in the shapes of `prepare`, for parties that have no weights; they take no memory."""
    one = dataclasses.replace(config, num_layers=1, windows=())
    abstract = nnx.eval_shape(lambda: Decoder(one, rngs=nnx.Rngs(0)))
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), nnx.split(abstract)[1])
    made = prepare(nnx.to_pure_dict(zeros), one)
    layer = {k.removeprefix("0."): v for k, v in made.items() if k.startswith("0.")}
    shapes = {f"{i}.{k}": v for i in range(config.num_layers) for k, v in layer.items()}
    return {**shapes, "embed": made["embed"], "head": made["head"]}


def add_generation(
    job: Job, config: DecoderConfig, policy: Policy, *, tokens: int, new_tokens: int,
    weights: dict[str, np.ndarray] | None = None, prompt: Sequence[int] | None = None,
) -> None:  # fmt: skip
    """Adds the steps of a greedy generation, the same at every party.

    Args:
        job: to add to; its client shares the prompt and learns the logits, nobody else does.
        config: public, as are the following.
        policy: likewise.
        tokens: length of the prompt.
        new_tokens: how many tokens are generated.
        weights: from `prepare`, at the party that owns them (the first one).
        prompt: token ids, at the client.

    Raises:
        InputError: the decoder cannot be computed privately.
    """
    check_config(config, tokens + new_tokens)
    shapes = weight_shapes(config) if weights is None else weights
    build = _Builder(job, config, policy, tokens, new_tokens, shapes)
    job.share(OWNER, **{name: np.asarray(x, np.float32) for name, x in shapes.items()})
    if job.protocol == "SEMI2K":
        build.hold(list(shapes))
    job.mark("weights")
    onehot = np.zeros((tokens, config.vocab_size), np.int32)
    if prompt is not None:
        onehot[np.arange(tokens), np.asarray(prompt)] = 1
    job.share(job.client, onehot=onehot)
    build.prompt()
    job.mark("prompt")
    for place in range(new_tokens - 1):
        build.token(place)
        job.mark(f"token {place + 1}")


class _Builder:
    """Lowers each program once and strings them together."""

    def __init__(
        self, job: Job, config: DecoderConfig, policy: Policy, tokens: int, new_tokens: int,
        shapes: dict[str, np.ndarray],
    ) -> None:  # fmt: skip
        self.job, self.config, self.policy = job, config, policy
        self.tokens, self.choice = tokens, policy.chosen(tokens)
        if job.protocol == "SEMI2K" and self.choice is not None:
            # A held value is one that is multiplied as it lies: folding would lay it out anew.
            self.choice = dataclasses.replace(self.choice, fold=1)
        self.room = max(1, new_tokens - 1)
        self.shapes = shapes
        self.names = [k.removeprefix("0.") for k in shapes if k.startswith("0.")]
        self.kept = policy.kept(tokens)

    def lower(self, name: str, function: Any, inputs: Sequence[Any], public: Sequence[int] = ()):  # noqa: ANN202
        return self.job.programs.get(name) or lower(name, function, inputs, public)

    def hold(self, names: list[str]) -> None:
        """Keeps the masked form of values, so that it is opened once; see `cached`."""
        for name in names:
            value = self._shape(name)
            label = "hold" + "x".join(map(str, value.shape))
            program = self.job.programs.get(label) or cached(label, value)
            self.job.run(program, [name], [name])

    def _shape(self, name: str) -> Any:
        layer, _, part = name.partition(".")
        if part in ("k", "v") and layer.isdecimal():
            return _float(self.config.num_heads, self.kept, self.config.head_dim)
        return self.shapes[name]

    def prompt(self) -> None:
        """The prompt through all layers, and the first new token."""
        config, policy, t = self.config, self.policy, self.tokens
        self._embed(t)
        cos, sin = angles(config, np.arange(t))
        self.job.known("cos", cos)
        self.job.known("sin", sin)
        names = self.names

        def function(x: Any, cos: Any, sin: Any, *arrays: Any) -> Any:
            return read_prompt(x, _weights(names, arrays), config, policy, cos, sin)

        layer = [self.shapes[f"0.{name}"] for name in names]
        inputs = [_float(t, config.embed_dim), cos, sin, *layer]
        program = self.lower("read_prompt", function, inputs, public=(1, 2))
        for i in range(config.num_layers):
            made = [f"{i}.k", f"{i}.v"] + ([] if self.choice is None else [f"{i}.r"])
            weights = [f"{i}.{name}" for name in names]
            self.job.run(program, ["x", "cos", "sin", *weights], ["x", *made])
            self._start_tail(i)
            if self.job.protocol == "SEMI2K":
                self.hold(made[:2])
        last = self.lower("last", lambda x: x[-1:], [_float(t, config.embed_dim)])
        self.job.run(last, ["x"], ["x"])
        self._logits("0")

    def _start_tail(self, layer: int) -> None:
        """Empty places for new tokens, as shares."""
        config, room = self.config, self.room

        def function(keys: Any) -> Any:
            # Zero times something secret: a program's outputs are secret, or it is refused.
            empty = jnp.broadcast_to(keys[:, :1] * 0, (config.num_heads, room, config.head_dim))
            return empty, empty

        program = self.lower("tail", function, [self._shape(f"{layer}.k")])
        self.job.run(program, [f"{layer}.k"], [f"{layer}.nk", f"{layer}.nv"])

    def token(self, place: int) -> None:
        """A generated token through all layers, and the next one."""
        config = self.config
        self._embed(1)
        cos, sin = angles(config, np.asarray([self.tokens + place]))
        self.job.known("cos", cos)
        self.job.known("sin", sin)
        self.job.known("place", np.asarray([place], np.int32))
        for i in range(config.num_layers):
            self._layer(i, cos, sin)
        self._logits(str(place + 1))

    def _layer(self, layer: int, cos: np.ndarray, sin: np.ndarray) -> None:
        config, names, choice, room = self.config, self.names, self.choice, self.room
        selects = choice is not None and self.policy.selects(layer, config.num_layers)
        shares = choice is not None and not selects
        count = 4 + selects

        def function(x: Any, cos: Any, sin: Any, place: Any, *arrays: Any) -> Any:
            cache, rest = arrays[:count], arrays[count:]
            chosen, rest = (rest[0], rest[1:]) if shares else (None, rest)
            weights = _weights(names, rest)
            return next_token(x, weights, config, choice, cos, sin, place, cache, chosen)

        held = self._shape(f"{layer}.k")
        tail = _float(config.num_heads, room, config.head_dim)
        inputs = [_float(1, config.embed_dim), cos, sin, np.zeros((1,), np.int32)]
        inputs += [held, held, tail, tail]
        cache = [f"{layer}.{part}" for part in ("k", "v", "nk", "nv")]
        made = ["x", f"{layer}.nk", f"{layer}.nv"]
        if choice is not None:
            clusters = self.kept // choice.size
            if selects:
                inputs.append(_float(config.num_heads, clusters, config.head_dim))
                cache.append(f"{layer}.r")
                made.append("chosen")
            else:
                shape = (config.num_heads, choice.clusters, clusters)
                inputs.append(jax.ShapeDtypeStruct(shape, np.int32))
                cache.append("chosen")
        inputs += [self.shapes[f"0.{name}"] for name in names]
        kind = "token_select" if selects else "token_share" if shares else "token_all"
        program = self.lower(kind, function, inputs, public=(1, 2, 3))
        weights = [f"{layer}.{name}" for name in names]
        self.job.run(program, ["x", "cos", "sin", "place", *cache, *weights], made)

    def _embed(self, tokens: int) -> None:
        table = self.shapes["embed"]
        onehot = jax.ShapeDtypeStruct((tokens, table.shape[0]), np.int32)
        program = self.lower(f"embed_{tokens}", embed, [onehot, table])
        self.job.run(program, ["onehot", "embed"], ["x"])

    def _logits(self, label: str) -> None:
        config = self.config
        inputs = [_float(1, config.embed_dim), self.shapes["head"]]
        program = self.lower("logits", lambda x, head: logits(x, head, config), inputs)
        self.job.run(program, ["x", "head"], ["logits"])
        self.job.token("logits", "onehot", label)


def _weights(names: Sequence[str], arrays: Sequence[Any]) -> dict[str, Any]:
    return dict(zip(names, arrays, strict=True))


def _float(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, np.float32)


def in_the_clear(job: Job) -> tuple[list[int], dict[str, np.ndarray]]:
    """The job's steps in plain floating-point JAX: tokens, and what is opened, by label.

    For comparison: it needs every party's inputs in one place.
    """
    values: dict[str, Any] = {}
    opened: dict[str, np.ndarray] = {}
    tokens: list[int] = []
    functions = {name: jax.jit(program.function) for name, program in job.programs.items()}
    for kind, *rest in job.steps:
        if kind == "share":
            values[rest[1]] = job.private[rest[0]][rest[1]]
        elif kind == "public":
            values[rest[0]] = job.public[rest[1]]
        elif kind == "run":
            results = jax.tree.leaves(functions[rest[0]](*[values[name] for name in rest[1]]))
            values.update(zip(rest[2], results, strict=True))
        elif kind == "open":
            opened[rest[2]] = np.asarray(values[rest[0]])
        elif kind == "token":
            opened[rest[2]] = np.asarray(values[rest[0]]).reshape(-1)
            tokens.append(int(opened[rest[2]].argmax()))
            values[rest[1]] = np.eye(opened[rest[2]].size, dtype=np.int32)[tokens[-1]][None]
    return tokens, opened
