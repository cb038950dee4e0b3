"""Copies of a model side by side: each with devices, pages and a planner of its own.

They share nothing but the requests that are dealt to them, so none ever waits for another.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from kvjax.infer.engine import Engine, Output
from kvjax.plan import Request, Work, deal_groups
from kvjax.plan.prefix_groups import plan_prefixes
from kvjax.sharding import param_shardings

__all__ = ["deal", "params_of", "replica_meshes", "run_all"]


def replica_meshes(mesh: Mesh) -> list[Mesh]:
    """The part of a mesh for each index of its axis `data`: the other axes, of type Auto."""
    names = tuple(name for name in mesh.axis_names if name != "data")
    parts = [mesh.devices]
    if "data" in mesh.axis_names:
        parts = list(np.moveaxis(mesh.devices, mesh.axis_names.index("data"), 0))
    if not names:
        names, parts = ("model",), [np.reshape(part, 1) for part in parts]
    auto = (AxisType.Auto,) * len(names)
    return [Mesh(part, names, axis_types=auto) for part in parts]


def params_of(params: Any, part: Mesh) -> Any:
    """The copy of parameters, spread over a whole mesh, that lies on a part of it; no byte moves.

    Args:
        params: placed by `kvjax.sharding.param_shardings` on the mesh that `part` is of.
        part: from `replica_meshes`.
    """
    devices = set(part.devices.flat)

    def pick(array: jax.Array, place: NamedSharding) -> jax.Array:
        shards = [shard.data for shard in array.addressable_shards if shard.device in devices]
        return jax.make_array_from_single_device_arrays(array.shape, place, shards)

    return jax.tree.map(pick, params, param_shardings(params, part))


def deal(requests: Sequence[Request], page_size: int, replicas: int) -> list[list[int]]:
    """Which requests each replica answers: those that share a beginning stay together.

    Returns:
        Indices of the requests, for each replica.
    """
    if replicas == 1:
        return [list(range(len(requests)))]
    plan = plan_prefixes([request.prompt[:-1] for request in requests], page_size)
    work = [Work(len(request.prompt), request.expected) for request in requests]
    return [list(hand) for hand in deal_groups(plan, work, replicas)]


def run_all(engines: Sequence[Engine]) -> Iterator[list[Output]]:
    """Runs engines until none has anything left; yields what each call has brought.

    The next is one whose call is back, if there is one, else the one that has waited longest.

    Raises:
        OutOfPages: see `Engine.run`.
    """
    with ExitStack() as stack:
        runs = [(engine, stack.enter_context(closing(engine.run()))) for engine in engines]
        while runs:
            engine, run = runs.pop(next((i for i, (e, _) in enumerate(runs) if e.ready), 0))
            outputs = next(run, None)
            if outputs is not None:
                runs.append((engine, run))
                yield outputs
