"""The producer of the attention kernel: copies pages into the ring in shared memory."""

from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from kvjax.pallas_kernels.page_attention.gpu_plan import Field
from kvjax.pallas_kernels.page_attention.gpu_task import (
    Inputs,
    Ring,
    Sizes,
    Unit,
    first_tile,
    i32,
    pick,
)

__all__ = ["produce"]

Array = jax.Array


class _Task(NamedTuple):
    """What the producer needs to know of a unit, in registers."""

    head: Array  # the first of its KV heads
    row: Array
    first_page: Array
    last_entry: Array
    first_tile: Array
    tiles: Array


def _task(sizes: Sizes, inputs: Inputs, turn: Array) -> _Task:
    number, share = pick(sizes, turn)
    head = share * sizes.slots_a_tile
    heads = lax.div(head, i32(sizes.heads_per_page))
    # The turn after the last one is asked for too.
    number = jnp.minimum(number, inputs.units.shape[2] - 1)
    unit = Unit(inputs, inputs.group(sizes), heads, number)
    tiles = unit[Field.TILES]
    first = first_tile(sizes, unit, inputs.window[0], tiles)
    return _Task(
        head, unit[Field.ROW], unit[Field.FIRST_PAGE], unit[Field.LAST_ENTRY], first, tiles
    )


def _pages(sizes: Sizes, inputs: Inputs, task: _Task, tile: Array) -> list[Array]:
    """The pages that hold a tile."""
    heads = lax.div(task.head, i32(sizes.heads_per_page))
    entry = task.first_page + lax.div(tile * sizes.shape.tile, i32(sizes.page_size))
    num_pages = inputs.k.shape[0] // (sizes.layers_per_page * sizes.heads_per_page)
    found = []
    for j in range(sizes.copies):
        # Entries behind the last one are read as it: their keys are masked, and it is near.
        column = jnp.minimum(entry + j, task.last_entry)
        page = inputs.pages[inputs.group(sizes), heads, task.row, column]
        found.append(jnp.minimum(page, num_pages - 1))
    return found


def _copy(
    sizes: Sizes, inputs: Inputs, ring: Ring, task: _Task, tile: Array, n: Array, pages: list
) -> None:
    """Copies a tile, of each head that is read, into the next places of the ring."""
    per_page, length = sizes.heads_per_page, min(sizes.shape.tile, sizes.page_size)
    inner = lax.rem(inputs.layer[0], i32(sizes.layers_per_page))
    at = pl.multiple_of(lax.rem(tile * sizes.shape.tile, i32(sizes.page_size)), length)
    for w in range(sizes.slots_a_tile):
        slot = lax.rem(n * sizes.slots_a_tile + w, i32(sizes.stages))
        head = lax.rem(task.head + w, i32(per_page))
        for plane, place, full, empty in (
            (inputs.k, ring.k, ring.k_full, ring.k_empty),
            (inputs.v, ring.v, ring.v_full, ring.v_empty),
        ):
            plgpu.barrier_wait(empty.at[slot])
            for j, page in enumerate(pages):
                index = (page * sizes.layers_per_page + inner) * per_page + head
                source = plane.at[index]
                if length < sizes.page_size:
                    source = plane.at[index, pl.ds(at, length)]
                target = place.at[slot, pl.ds(j * length, length)]
                plgpu.copy_gmem_to_smem(source, target, full.at[slot])


def produce(sizes: Sizes, inputs: Inputs, ring: Ring, turns: Array) -> None:
    """Copies every tile's pages into the ring, in the order in which the consumers take them.

    What the next tile and the next unit need is read before it is waited for a place.
    """

    def unit_body(turn: Array, carry: tuple) -> tuple:
        n, task, pages = carry
        following = _task(sizes, inputs, turn + 1)

        def tile_body(tile: Array, carry: tuple) -> tuple:
            n, pages = carry
            more = tile + 1 < task.tiles
            source = _Task(*(jnp.where(more, a, b) for a, b in zip(task, following, strict=True)))
            ahead = _pages(sizes, inputs, source, jnp.where(more, tile + 1, following.first_tile))
            _copy(sizes, inputs, ring, task, tile, n, pages)
            return n + 1, ahead

        n, pages = lax.fori_loop(task.first_tile, task.tiles, tile_body, (n, pages))
        pages = lax.cond(
            task.first_tile < task.tiles,
            lambda: pages,
            lambda: _pages(sizes, inputs, following, following.first_tile),
        )
        return n, following, pages

    first = _task(sizes, inputs, i32(0))
    pages = _pages(sizes, inputs, first, first.first_tile)
    lax.fori_loop(i32(0), turns, unit_body, (i32(0), first, pages))
