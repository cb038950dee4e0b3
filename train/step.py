"""The step that every program here shares: one jitted, pure function of a state and a batch.

Parameters are held in float32. A step may compute in a shorter type, take its batch in parts, clip
the gradient and keep a moving average of the parameters; all of that is said in `StepOptions`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding

from kvjax.errors import InputError
from kvjax.sharding import RULES, param_shardings, spec

__all__ = [
    "Loss", "Metrics", "Step", "StepOptions", "Sums", "TrainState", "abstract_state", "cast_params",
    "init_state", "make_mesh", "make_step", "place_batch",
]  # fmt: skip

Array = jax.Array
Metrics = Mapping[str, Array]
AXES = ("data", "fsdp", "model")


class Sums(NamedTuple):
    """What a loss says about a batch. Sums, not means: parts of a batch then add up exactly.

    Attributes:
        loss: float32 scalar, the sum over all terms; what is minimised is its mean.
        weight: float32 scalar, how many terms.
        metrics: other sums over the same terms, by name; reported as means.
    """

    loss: Array
    weight: Array
    metrics: Metrics


Loss = Callable[[Any, Any], Sums]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step changes.

    Attributes:
        step: int32 scalar, how many steps were taken.
        params: the parameters, any pytree.
        opt_state: the optimizer's.
        ema: the moving average of the parameters, or None.
    """

    step: Array
    params: Any
    opt_state: Any
    ema: Any = None

    @property
    def best_params(self) -> Any:
        """The parameters to evaluate and export: the average where one is kept."""
        return self.params if self.ema is None else self.ema


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepOptions:
    """How a step computes.

    Attributes:
        compute_dtype: of the forward and the backward pass; see `cast_params`.
        microbatches: parts that a batch is taken in, one after the other, to save memory. The
            gradient is that of the whole batch.
        clip_norm: the largest norm of a gradient; None clips nothing.
        ema_decay: what the moving average keeps of itself each step; None keeps no average.
        deterministic: whether a GPU has to repeat a step bit for bit, at some cost in speed (CPUs
            and TPUs do so anyway). A resumed run equals an unbroken one only then.
    """

    compute_dtype: str = "float32"
    microbatches: int = 1
    clip_norm: float | None = None
    ema_decay: float | None = None
    deterministic: bool = False

    def check(self) -> None:
        """Raises InputError for a value that cannot be used; `make_step` asks, and configs do."""
        if self.compute_dtype not in ("float32", "bfloat16"):
            raise InputError(f"compute_dtype is {self.compute_dtype!r}: use float32 or bfloat16")
        if self.microbatches < 1:
            raise InputError(f"microbatches is {self.microbatches}: give 1 or more")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise InputError(f"clip_norm is {self.clip_norm}: give more than 0")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise InputError(f"ema_decay is {self.ema_decay}: give 0 or more and less than 1")


Step = Callable[[TrainState, Any], tuple[TrainState, Metrics]]
_PLAIN = StepOptions()


def make_mesh(data: int = 1, fsdp: int = 1, model: int = 1) -> Mesh:
    """A mesh over the first devices; one device is a mesh of one.

    Args:
        data: copies of the parameters, each with its part of the batch.
        fsdp: parts that parameters and batch are split in; the parameters meet where they are used.
        model: parts of the heads, the MLP and the vocabulary.

    Raises:
        InputError: there are fewer devices.
    """
    sizes = (data, fsdp, model)
    wanted, devices = int(np.prod(sizes)), jax.devices()
    if min(sizes) < 1 or wanted > len(devices):
        raise InputError(
            f"a mesh of {data} x {fsdp} x {model} needs {wanted} devices, and there are "
            f"{len(devices)}: make data, fsdp or model smaller"
        )
    auto = (AxisType.Auto,) * 3
    return jax.make_mesh(sizes, AXES, axis_types=auto, devices=devices[:wanted])


def init_state(
    params: Any, optimizer: optax.GradientTransformation, *, mesh: Mesh | None = None,
    ema: bool = False,
) -> TrainState:  # fmt: skip
    """The state before the first step, in buffers of its own.

    Args:
        params: the first parameters; they are copied, so that donating the state leaves them be.
        optimizer: the optax transformation.
        mesh: where the state lives, split as `kvjax.sharding` says; None is the default device.
        ema: whether to keep a moving average, which starts at the parameters.
    """
    build = functools.partial(_first_state, optimizer, ema)
    shardings = mesh and param_shardings(jax.eval_shape(build, params), mesh)
    return jax.jit(build, out_shardings=shardings)(params)


def abstract_state(
    params: Any, optimizer: optax.GradientTransformation, *, mesh: Mesh, ema: bool = False
) -> TrainState:
    """The shapes of `init_state`'s result with their shardings, from arrays or shapes."""
    shapes = jax.eval_shape(functools.partial(_first_state, optimizer, ema), params)
    place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)  # noqa: E731
    return jax.tree.map(place, shapes, param_shardings(shapes, mesh))


def _first_state(optimizer: optax.GradientTransformation, ema: bool, params: Any) -> TrainState:
    copies = [jax.tree.map(jnp.copy, params) for _ in range(1 + ema)]
    return TrainState(jnp.int32(0), copies[0], optimizer.init(params), *copies[1:])


def place_batch(batch: Any, mesh: Mesh | None) -> Any:
    """The batch on the devices, its rows split over the mesh's axes for them.

    Args:
        batch: a tree of arrays [B, ...] and scalars, with this process's share of the rows.
        mesh: of the state; None is the default device.

    Raises:
        InputError: the rows cannot be divided over the devices.
    """
    if mesh is None:
        return jax.device_put(batch)
    parts = int(np.prod([mesh.shape.get(name, 1) for name in RULES["batch"]]))

    def put(x: Any) -> Array:
        x = np.asarray(x)
        axes = ("batch",) + (None,) * (x.ndim - 1) if x.ndim else ()
        rows = x.shape[0] * jax.process_count() if x.ndim else 0
        if rows % parts:
            raise InputError(
                f"a batch of {rows} rows cannot be split over {parts} devices: make the batch a "
                f"multiple of {parts}, or data and fsdp smaller"
            )
        return jax.make_array_from_process_local_data(NamedSharding(mesh, spec(axes, mesh)), x)

    return jax.tree.map(put, batch)


def make_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    options: StepOptions = _PLAIN,
    *,
    like: TrainState | None = None,
) -> Step:
    """A jitted step `(state, batch) -> (state, metrics)`; the state that goes in is donated.

    The metrics are float32 scalars: the mean loss, the gradient's norm before clipping, and the
    means of the loss's own metrics.

    Args:
        loss: `(params, batch) -> Sums`, pure. What is random in it is drawn from seeds that the
            batch brings.
        optimizer: the optax transformation, with its schedule.
        options: how to compute.
        like: the state, or its shapes with their shardings: where the new state is to be. None
            leaves that to the compiler, which is right for a state on one device without a mesh.
    """
    options.check()
    # Only GPUs need to be asked, and others may not know the option.
    exact = {"xla_gpu_deterministic_ops": True} if options.deterministic and _on_gpu(like) else None

    # Said here and not by constraints inside: an axis of one device would come back unnamed, and
    # the second step compile again.
    places = like and jax.tree.map(lambda x: x.sharding, like)
    out = places and (places, None)

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=out, compiler_options=exact)
    def step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        sums, grads = _gradient(loss, state.params, batch, options)
        if places is not None:
            grads = jax.lax.with_sharding_constraint(grads, places.params)
        grads, norm = _scale(grads, sums.weight, options.clip_norm)
        # optax mixes counts with floats: strict promotion is for our own arithmetic.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        new = TrainState(state.step + 1, params, opt_state, _average(state.ema, params, options))
        metrics = {"loss": sums.loss, **sums.metrics}
        means = {name: value / sums.weight for name, value in metrics.items()}
        return new, {"grad_norm": norm} | means

    return step


def _on_gpu(like: TrainState | None) -> bool:
    devices = jax.devices()[:1] if like is None else like.step.sharding.device_set
    return any(device.platform in ("gpu", "cuda") for device in devices)


def cast_params(params: Any, dtype: str) -> Any:
    """The parameters to compute with, in `dtype`, but for the table of embeddings.

    A row of that table gathers its gradient from every place where its token stands; such sums
    need float32. The decoder takes the row and continues in the other parameters' type.
    """

    def cast(path: tuple, x: Array) -> Array:
        table = "embed" in [getattr(key, "key", None) for key in path]
        floating = jnp.issubdtype(x.dtype, jnp.floating)
        return x.astype(dtype) if floating and not table else x

    return jax.tree_util.tree_map_with_path(cast, params)


def _gradient(loss: Loss, params: Any, batch: Any, options: StepOptions) -> tuple[Sums, Any]:
    """The sums over a batch, and the gradient of its loss's sum."""

    def total(params: Any, part: Any) -> tuple[Array, Sums]:
        sums = loss(cast_params(params, options.compute_dtype), part)
        return sums.loss, sums

    def gradient(part: Any) -> tuple[Sums, Any]:
        grads, sums = jax.grad(total, has_aux=True)(params, part)
        return sums, grads

    if options.microbatches == 1:
        return gradient(batch)
    parts = jax.tree.map(functools.partial(_split, count=options.microbatches), batch)
    shapes = jax.eval_shape(gradient, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    add = lambda sums, part: (jax.tree.map(jnp.add, sums, gradient(part)), None)  # noqa: E731
    return jax.lax.scan(add, zeros, parts)[0]


def _split(x: Array, count: int) -> Array:
    """[B, ...] as [count, B / count, ...]; a scalar goes with every part."""
    if x.ndim == 0:
        return jnp.broadcast_to(x, (count,))
    if x.shape[0] % count:
        raise InputError(
            f"a batch of {x.shape[0]} rows cannot be taken in {count} parts: make the batch a "
            "multiple of microbatches"
        )
    # Every count-th row, so that each part has rows of every device and none has to travel.
    return jnp.swapaxes(x.reshape(-1, count, *x.shape[1:]), 0, 1)


def _scale(grads: Any, weight: Array, clip_norm: float | None) -> tuple[Any, Array]:
    """The gradient of the mean, clipped, and its norm before clipping."""
    norm = optax.tree.norm(grads) / weight
    factor = 1 / weight
    if clip_norm is not None:
        factor = factor * jnp.where(norm > clip_norm, clip_norm / norm, 1.0)
    return jax.tree.map(lambda x: x * factor.astype(x.dtype), grads), norm


def _average(ema: Any, params: Any, options: StepOptions) -> Any:
    if ema is None or options.ema_decay is None:
        return ema
    decay = options.ema_decay
    return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, ema, params)
