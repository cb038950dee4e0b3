"""The frame ring: which frames it holds, where, and how many bytes that takes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax.cache.frames import FrameRingConfig, NewFrames, append_frames, frames_held, ranks
from kvjax.errors import InputError

SIZES = {"num_layers": 2, "rows": 1, "num_places": 2, "num_heads": 1, "head_dim": 1}


def ring_of(capacity, sinks=0, prefix=0):
    return FrameRingConfig(
        **SIZES, capacity=capacity, sink_frames=sinks, prefix_frames=prefix
    ).init()


def tagged(first, count):
    """Frames whose keys are their index, and whose values are its negative."""
    tags = jnp.arange(first, first + count, dtype=jnp.float32)
    k = jnp.broadcast_to(tags[None, None, None, :, None], (1, 2, 1, count, 1))
    prefix = jnp.broadcast_to(tags[None, :, None, None, None], (1, count, 2, 1, 1))
    return (NewFrames(k, -k, prefix, -prefix),) * 2


def write(ring, writes):
    for count in writes:
        ring = append_frames(ring, tagged(int(ring.next_frame), count))
    return ring


def held(total, capacity, sinks):
    """Sinks, then the last ones."""
    last = range(max(sinks, total - (capacity - sinks)), total)
    return [*range(min(sinks, total)), *last]


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 9).flatmap(lambda c: st.tuples(st.just(c), st.integers(0, c - 1))),
    st.lists(st.integers(1, 12), max_size=6),
)
def test_first_in_first_out(sizes, writes):
    """Whatever is written at a time, also more than there is room for; sinks stay."""
    capacity, sinks = sizes
    ring = write(ring_of(capacity, sinks), writes)
    frames, expected = np.asarray(frames_held(ring)), held(sum(writes), capacity, sinks)
    assert sorted(frames[frames >= 0]) == expected
    assert int(ring.length) == len(expected)
    assert (frames[: len(expected)] >= 0).all()
    for k, v in zip(ring.k, ring.v, strict=True):
        np.testing.assert_array_equal(k[0, 1, 0, : len(expected), 0], frames[: len(expected)])
        np.testing.assert_array_equal(v, -k)
    order = np.asarray(ranks(ring))[: len(expected)]
    assert frames[: len(expected)][np.argsort(order)].tolist() == expected
    assert sorted(order) == list(range(len(expected)))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_the_last_frames_for_the_prefix(writes):
    """Before there are three, the first frame stands in for those that are missing."""
    ring, total = write(ring_of(4, prefix=3), writes), sum(writes)
    expected = [max(total - i, 0) for i in (3, 2, 1)]
    np.testing.assert_array_equal(ring.prefix_k[1][0, :, 1, 0, 0], expected)
    np.testing.assert_array_equal(ring.prefix_v[0][0, :, 0, 0, 0], [-x for x in expected])


def test_a_donated_ring_is_written_where_it_lies():
    ring = write(ring_of(4), [1])
    before = [x.unsafe_buffer_pointer() for x in (*ring.k, *ring.v)]
    ring = jax.jit(append_frames, donate_argnums=0)(ring, tagged(1, 2))
    assert [x.unsafe_buffer_pointer() for x in (*ring.k, *ring.v)] == before


def paper(**options):
    sizes = {"num_layers": 28, "rows": 1, "num_places": 256, "num_heads": 16, "head_dim": 72}
    return FrameRingConfig(**(sizes | {"capacity": 25, "dtype": "bfloat16"} | options))


def test_bytes_are_the_formulas():
    """The paper's table: 0.77 GiB, with the prefix 0.86; guidance takes two rows a video."""
    assert paper().nbytes() / 2**30 == pytest.approx(0.7690, abs=5e-5)
    assert paper(prefix_frames=3).nbytes() / 2**30 == pytest.approx(0.8613, abs=5e-5)
    assert paper(prefix_frames=3, rows=2).nbytes() == 2 * paper(prefix_frames=3).nbytes()
    assert paper().frame_bytes("gpu") == 31.5 * 2**20
    # A TPU's tiles: 25 frames become 32, 72 channels 128.
    assert paper().nbytes("tpu") * 25 * 72 == paper().nbytes() * 32 * 128
    small = FrameRingConfig(**SIZES, capacity=5, prefix_frames=2)
    arrays = jax.tree.leaves(dataclasses.replace(small.init(), next_frame=None))
    assert sum(x.nbytes for x in arrays) == small.nbytes()


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_capacity_from_bytes(platform):
    """The largest that fits."""
    config = paper(capacity=1, prefix_frames=3).with_memory(2**31, platform)
    more = dataclasses.replace(config, capacity=config.capacity + 1)
    assert config.nbytes(platform) <= 2**31 < more.nbytes(platform)
    assert paper(capacity=1).with_memory(25 * 63 * 2**19, "gpu").capacity == 25
    with pytest.raises(InputError, match="holds nothing"):
        paper(prefix_frames=3).with_memory(1000, platform)


def test_sinks_leave_room():
    with pytest.raises(InputError, match="sink"):
        ring_of(4, sinks=4)
