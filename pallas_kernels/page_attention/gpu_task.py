"""What the warpgroups of the attention kernel share: sizes, references, and who does what."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kvjax.pallas_kernels.page_attention.gpu_plan import Field, Mode, Shape

__all__ = ["Inputs", "Ring", "Sizes", "Unit", "first_tile", "i32", "pick", "share_of"]

Array = jax.Array


def i32(value: int) -> Array:
    """A constant for arithmetic with the kernels' numbers."""
    return jnp.int32(value)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """All that a kernel is compiled for, beside the shapes of its arguments.

    Attributes:
        shape: of the class of items.
        heads: H.
        dim: D.
        page_size: P.
        layers_per_page: R.
        heads_per_page: C.
        head_groups: K/C.
        scale: of the scores.
        soft_cap: of the scores, or None.
        windowed: whether there is a sliding window.
        tracked: whether slots have true positions.
        blocks: thread blocks, one a multiprocessor.
        backwards: whether units are dealt from the last thread block on, so that those that got
            one more of another class get one less of this.
    """

    shape: Shape
    heads: int
    dim: int
    page_size: int
    layers_per_page: int
    heads_per_page: int
    head_groups: int
    scale: float
    soft_cap: float | None
    windowed: bool
    tracked: bool
    blocks: int
    backwards: bool

    @property
    def consumers(self) -> int:
        """Consumer warpgroups of a thread block."""
        return 1 if self.shape.mode is Mode.SINGLE else 2

    @property
    def head_units(self) -> int:
        """Thread blocks' shares of one unit: KV heads, or pairs of them."""
        kv_heads = self.heads_per_page * self.head_groups
        return kv_heads // 2 if self.shape.mode is Mode.HEADS else kv_heads

    @property
    def stages(self) -> int:
        """Places in the ring: 128 KB of keys and values hide the memory's latency.

        Their number is even, so that of two heads each always has the same places.
        """
        return (128 * 1024) // (4 * self.shape.tile * self.dim) // 2 * 2

    @property
    def copies(self) -> int:
        """Pages that a tile spans; a larger page holds several tiles."""
        return max(1, self.shape.tile // self.page_size)

    @property
    def slots_a_tile(self) -> int:
        """Places in the ring that one tile takes: one for each head that is read."""
        return 2 if self.shape.mode is Mode.HEADS else 1

    @property
    def swizzle(self) -> int:
        """Bytes of the widest swizzle that divides a row."""
        return next(s for s in (128, 64, 32) if self.dim * 2 % s == 0)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """References in global memory; see `attend_units`."""

    layer: Any
    window: Any
    count: Any
    q: Any
    k: Any
    v: Any
    pages: Any
    units: Any
    position: Any
    slot_position: Any
    slot: Any
    out: Any
    lse: Any
    part: Any
    part_lse: Any

    def group(self, sizes: Sizes) -> Array:
        """The table's layer group."""
        return lax.div(self.layer[0], i32(sizes.layers_per_page))


@dataclasses.dataclass(frozen=True)
class Ring:
    """Shared memory and its barriers, one of each kind for each place in the ring.

    The queries `q` [consumers, 64, D] have none: only their consumer touches them.
    """

    q: Any
    k: Any
    v: Any
    k_full: Any
    v_full: Any
    k_empty: Any
    v_empty: Any


@dataclasses.dataclass(frozen=True)
class Unit:
    """Where a unit's fields are read from."""

    inputs: Inputs
    group: Array
    heads: Array
    number: Array

    def __getitem__(self, field: Field) -> Array:
        return self.inputs.units[self.group, self.heads, self.number, int(field)]


def _number(sizes: Sizes) -> Array:
    me = lax.axis_index("block")
    return sizes.blocks - 1 - me if sizes.backwards else me


def share_of(sizes: Sizes, total: Array) -> Array:
    """How many of all (unit, head) pairs fall to this thread block."""
    me, blocks = _number(sizes), i32(sizes.blocks)
    turns, rest = lax.div(total, blocks), lax.rem(total, blocks)
    place = jnp.where(lax.rem(turns, i32(2)) == 0, me, blocks - 1 - me)
    return turns + jnp.where(place < rest, 1, 0)


def pick(sizes: Sizes, turn: Array) -> tuple[Array, Array]:
    """The unit and its head share of this thread block's n-th turn.

    Units are dealt like cards, the longest first, and in alternating direction, so that all
    thread blocks get about the same.
    """
    me, blocks = _number(sizes), i32(sizes.blocks)
    place = jnp.where(lax.rem(turn, i32(2)) == 0, me, blocks - 1 - me)
    flat = turn * blocks + place
    return lax.div(flat, i32(sizes.head_units)), lax.rem(flat, i32(sizes.head_units))


def first_tile(sizes: Sizes, unit: Unit, window: Array, tiles: Array) -> Array:
    """The first tile that the window of some query reaches into."""
    if not sizes.windowed or sizes.tracked:
        return i32(0)
    first_slot = unit[Field.FIRST_PAGE] * sizes.page_size
    reach = unit[Field.LEAST_POSITION] - window + 1 - first_slot
    before = lax.div(jnp.maximum(reach, 0), i32(sizes.shape.tile))
    return jnp.where(window > 0, jnp.minimum(before, tiles), 0)
