"""Caches in files: what is written comes back, and what was changed on the way is noticed."""

import dataclasses
import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from kvjax.cache import CacheConfig, KVPool, PageTable, compact, gather
from kvjax.errors import InputError
from kvjax.infer import saved_cache
from kvjax.infer.saved_cache import fingerprint, load_cache, put_pages, save_cache
from kvjax.models import DecoderConfig

# Layers of 3 in groups of 2: the last group spans one. Heads of 4 in groups of 2.
GROUPED = CacheConfig(
    num_pages=40, page_size=4, num_layers=3, num_kv_heads=4, head_dim=8, max_rows=3,
    pages_per_row=3, layers_per_page=2, heads_per_page=2, track_positions=True,
)  # fmt: skip
PLAIN = dataclasses.replace(GROUPED, layers_per_page=0, heads_per_page=0, track_positions=False)
MODEL = "0" * 64


def random_cache(config, seed=0):
    """A pool full of numbers, and rows of random pages; the first page of row 1 is row 0's."""
    rng = np.random.default_rng(seed)
    pool, _ = config.init()
    full = (jnp.asarray(rng.normal(size=pool.k.shape), pool.k.dtype) for _ in range(2))
    position = None
    if config.track_positions:
        position = jnp.asarray(rng.integers(0, 99, pool.position.shape), jnp.int32)
    shape = (*config.tables, config.max_rows)
    count = np.prod(shape) * config.pages_per_row
    pages = rng.permutation(config.num_pages)[:count].reshape(*shape, -1)
    pages[:, :, 1, 0] = pages[:, :, 0, 0]
    most = config.pages_per_row * config.page_size
    table = PageTable(
        pages=jnp.asarray(pages, jnp.int32),
        length=jnp.asarray(rng.integers(1, most + 1, shape), jnp.int32),
        position=jnp.asarray(rng.integers(most, 99, config.max_rows), jnp.int32),
    )
    return KVPool(k=next(full), v=next(full), position=position), table


def rows_of(pool, table, rows):
    """All that a reader sees of rows: dense keys and values, positions of slots in use, sizes."""
    pool, table = jax.tree.map(jnp.asarray, (pool, table))
    rows = jnp.asarray(rows, jnp.int32)
    dense = [np.asarray(x, np.float32) for x in gather(pool, table, rows)]
    pages, length = np.asarray(table.pages)[:, :, rows], np.asarray(table.length)[:, :, rows]
    position = None
    if pool.position is not None:
        every = np.asarray(pool.position)[np.minimum(pages, len(pool.position) - 1)]
        every = every.reshape(*length.shape, -1)
        position = np.where(np.arange(every.shape[-1]) < length[..., None], every, -1)
    return *dense, position, length, np.asarray(table.position)[rows]


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(
    "config",
    [PLAIN, GROUPED, dataclasses.replace(PLAIN, dtype="bfloat16", heads_per_page=1),
     dataclasses.replace(GROUPED, dtype="float8_e4m3fn")],
    ids=["plain", "grouped", "bfloat16", "float8"],
)  # fmt: skip
def test_rows_come_back_in_fewer_pages(config, tmp_path):
    pool, table = random_cache(config)
    file = tmp_path / "cache.safetensors"
    tokens, note = [[1, 2, 3], [4]], {"why": "täst", "list": [1, {"b": 2, "a": 1}]}
    save_cache(file, pool, table, config=config, model=MODEL, rows=[2, 0], tokens=tokens, note=note)
    saved = load_cache(file, like=config, model=MODEL)
    assert_same(rows_of(pool, table, [2, 0]), rows_of(saved.pool, saved.table, [0, 1]))
    assert saved.tokens == ((1, 2, 3), (4,)) and saved.note == note and saved.model == MODEL
    used = -(-np.asarray(table.length)[:, :, [2, 0]] // config.page_size)
    pages = {
        int(page)
        for index in np.ndindex(used.shape)
        for page in np.asarray(table.pages)[:, :, [2, 0]][index][: used[index]]
    }
    assert len(saved.pool.k) == len(pages) == saved.config.num_pages
    assert saved.config == dataclasses.replace(config, num_pages=len(pages), max_rows=2)
    assert saved.pool.k.dtype == jnp.dtype(config.dtype)
    assert file.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("short", [0, 1])
def test_rows_that_share_a_page_share_it_in_the_file(tmp_path, short):
    """One row uses two slots of the page, the other all of it: all are kept, in one page."""
    pool, table = random_cache(PLAIN)
    length = np.asarray([12, 12, 0], np.int32)
    length[short] = 2
    table = dataclasses.replace(table, length=jnp.asarray(length)[None, None])
    save_cache(tmp_path / "c", pool, table, config=PLAIN, model=MODEL)
    saved = load_cache(tmp_path / "c")
    assert len(saved.pool.k) == 3
    assert saved.table.pages[0, 0, short].tolist() == [saved.table.pages[0, 0, 1 - short, 0], 3, 3]
    assert_same(rows_of(pool, table, [0, 1]), rows_of(saved.pool, saved.table, [0, 1]))


def test_compacted_rows_keep_their_true_positions(tmp_path):
    pool, table = random_cache(GROUPED)
    keep = np.random.default_rng(1).random((*GROUPED.tables, 1, 12)) < 0.5
    pool, table = compact(pool, table, jnp.asarray([2], jnp.int32), jnp.asarray(keep))
    save_cache(tmp_path / "c", pool, table, config=GROUPED, model=MODEL, rows=[2])
    saved = load_cache(tmp_path / "c")
    before, after = rows_of(pool, table, [2]), rows_of(saved.pool, saved.table, [0])
    assert_same(before, after)
    assert (after[3] < after[4]).all()  # fewer slots than the next position


def test_slots_that_are_not_in_use_are_not_written(tmp_path):
    """NaN in every dead slot, which may be another's words: none of it is in the file."""
    pool, table = random_cache(GROUPED)
    before = rows_of(pool, table, [0, 2])
    # Of rows 0 and 2 alone, slot by slot: row 1 shares row 0's first page.
    live = np.zeros((GROUPED.num_pages, 4), bool)
    pages, length = np.asarray(table.pages), np.asarray(table.length)
    for g, h, row in np.ndindex(length.shape):
        for slot in range(length[g, h, row] if row != 1 else 0):
            live[pages[g, h, row, slot // 4], slot % 4] = True
    mask = jnp.asarray(live)[:, None, None, :, None]
    pool = dataclasses.replace(
        pool, k=jnp.where(mask, pool.k, jnp.nan), v=jnp.where(mask, pool.v, jnp.nan)
    )
    save_cache(tmp_path / "c", pool, table, config=GROUPED, model=MODEL, rows=[0, 2])
    saved = load_cache(tmp_path / "c")
    assert np.isfinite(saved.pool.k).all() and np.isfinite(saved.pool.v).all()
    assert ((saved.pool.position >= 0).sum()) == live.sum()
    assert_same(before, rows_of(saved.pool, saved.table, [0, 1]))


def test_all_planes_are_written(tmp_path):
    pool, table = random_cache(PLAIN)
    rng = np.random.default_rng(3)
    pool = dataclasses.replace(
        pool,
        bounds=jnp.asarray(rng.normal(size=(40, 2, 8)), jnp.bfloat16),
        scales=jnp.asarray(rng.normal(size=(40, 3, 4, 4)), jnp.float32),
    )
    save_cache(tmp_path / "c", pool, table, config=PLAIN, model=MODEL)
    saved = load_cache(tmp_path / "c")
    entry = np.asarray(table.pages)[0, 0, 1, 0], saved.table.pages[0, 0, 1, 0]
    for name in ("bounds", "scales"):
        there, here = getattr(pool, name), getattr(saved.pool, name)
        assert here.dtype == there.dtype
        np.testing.assert_array_equal(np.asarray(there)[entry[0]], here[entry[1]])


def test_nothing_may_be_saved(tmp_path):
    pool, table = PLAIN.init()
    save_cache(tmp_path / "c", pool, table, config=PLAIN, model=MODEL)
    saved = load_cache(tmp_path / "c", like=PLAIN)
    assert saved.pool.k.shape == (0, 3, 4, 4, 8) and (saved.table.pages == 0).all()


def test_pages_are_put_into_another_pool():
    """More than a block of them; the other pages stay as they are."""
    config = dataclasses.replace(GROUPED, num_pages=90)
    pool, source = random_cache(config)[0], random_cache(config, seed=1)[0]
    want = jax.tree.map(np.array, pool)
    pages = np.random.default_rng(2).permutation(90)[:70]
    planes = jax.tree.map(lambda x: np.asarray(x)[:70], source)
    for plane, new in zip(jax.tree.leaves(want), jax.tree.leaves(planes), strict=True):
        plane[pages] = new
    got = put_pages(pool, pages.tolist(), planes)
    assert pool.k.is_deleted()
    assert_same(got, want)


# Files that are not what they should be.


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    file = tmp_path_factory.mktemp("cache") / "small.safetensors"
    pool, table = random_cache(GROUPED)
    save_cache(file, pool, table, config=GROUPED, model=MODEL, rows=[0], tokens=[[7, 8]])
    return file


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_changed_byte_is_noticed(written, data):
    """Wherever it is; blanks that JSON skips are the only bytes that say nothing."""
    raw = bytearray(written.read_bytes())
    header = 8 + int.from_bytes(raw[:8], "little")
    area = data.draw(st.sampled_from([(0, 8), (8, header), (header, len(raw))]))
    place = data.draw(st.integers(area[0], area[1] - 1))
    raw[place] ^= data.draw(st.integers(1, 255))
    changed = written.with_name("changed")
    changed.write_bytes(raw)
    try:
        saved = load_cache(changed)
    except InputError as error:
        assert "\n" not in str(error) and str(changed) in str(error)
    else:
        assert header > place >= 8 and chr(raw[place]) in " \t\n\r"
        assert_same(saved.pool, load_cache(written).pool)


@settings(max_examples=30, deadline=None)
@given(cut=st.floats(0, 1, exclude_max=True))
def test_a_file_that_was_cut_short_is_noticed(written, cut):
    raw = written.read_bytes()
    short = written.with_name("short")
    short.write_bytes(raw[: int(cut * len(raw))])
    with pytest.raises(InputError, match="damaged or no saved cache"):
        load_cache(short)


def test_arrays_that_were_exchanged_are_noticed(written, tmp_path):
    with safe_open(written, "np") as file:
        arrays, header = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    arrays["pool.k"], arrays["pool.v"] = arrays["pool.v"], arrays["pool.k"]
    save_file(arrays, tmp_path / "exchanged", metadata=header)
    with pytest.raises(InputError, match="damaged"):
        load_cache(tmp_path / "exchanged")


def test_another_dtype_in_the_header_is_noticed(written, tmp_path):
    """Of the same width: the bytes are the same."""
    raw = written.read_bytes()
    assert b'"F32"' in raw
    (tmp_path / "retyped").write_bytes(raw.replace(b'"F32"', b'"I32"', 1))
    with pytest.raises(InputError, match="damaged"):
        load_cache(tmp_path / "retyped")


def test_another_format_is_named(written, tmp_path, monkeypatch):
    monkeypatch.setattr(saved_cache, "FORMAT", 2)
    with pytest.raises(InputError, match="has format 1, but this version of kvjax reads format 2"):
        load_cache(written)


def test_other_safetensors_files_are_no_caches(tmp_path):
    save_file({"x": np.zeros(3)}, tmp_path / "x")
    for name in ("x", "missing", "."):
        with pytest.raises(InputError, match=r"no saved cache|no such file"):
            load_cache(tmp_path / name)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [("page_size", 8, "page_size=4, those here page_size=8"), ("num_layers", 4, "num_layers=3"),
     ("num_kv_heads", 2, "num_kv_heads=4"), ("head_dim", 4, "head_dim=8"),
     ("layers_per_page", 1, "layers_per_page=2, those here layers_per_page=1"),
     ("heads_per_page", 4, "heads_per_page=2"), ("dtype", "bfloat16", "dtype=float32"),
     ("track_positions", False, "track_positions=True")],
)  # fmt: skip
def test_sizes_that_differ_are_named(written, field, value, says):
    with pytest.raises(InputError, match=says) as error:
        load_cache(written, like=dataclasses.replace(GROUPED, **{field: value}))
    assert "\n" not in str(error.value)


def test_more_pages_rows_and_entries_are_no_difference(written):
    like = dataclasses.replace(GROUPED, num_pages=9, max_rows=99, pages_per_row=1)
    assert load_cache(written, like=like, model=MODEL).tokens == ((7, 8),)


def test_another_model_is_noticed(written):
    with pytest.raises(InputError, match=r"another model \(fingerprint 0{12}, here 1{12}\)"):
        load_cache(written, model="1" * 64)


@pytest.mark.parametrize("step", ["write", "rename"])
def test_a_failed_write_leaves_the_old_file(written, tmp_path, monkeypatch, step):
    def fail(first, second, metadata=None):
        if step == "write":
            second.write_bytes(b"half a file")
        raise OSError(28, "No space left on device")

    file = tmp_path / "cache"
    file.write_bytes(written.read_bytes())
    where = (saved_cache, "save_file") if step == "write" else (Path, "replace")
    monkeypatch.setattr(*where, fail)
    pool, table = random_cache(GROUPED)
    with pytest.raises(InputError, match=r"cache: cannot be written \(No space left on device\)"):
        save_cache(file, pool, table, config=GROUPED, model=MODEL)
    assert load_cache(file).tokens == ((7, 8),)
    assert list(tmp_path.iterdir()) == [file]


def test_a_folder_that_is_missing_is_named(tmp_path):
    pool, table = random_cache(GROUPED)
    with pytest.raises(InputError, match="cannot be written"):
        save_cache(tmp_path / "no" / "c", pool, table, config=GROUPED, model=MODEL)


# Fingerprints.


CONFIG = DecoderConfig(
    vocab_size=5, num_layers=2, embed_dim=4, mlp_dim=8, num_heads=2, num_kv_heads=1, head_dim=2,
    max_positions=16,
)  # fmt: skip
DTYPES = ("float32", "bfloat16", "int8", "bool", "float8_e4m3fn")


@functools.cache
def weights():
    rng = np.random.default_rng(0)
    return {name: rng.integers(0, 2, (3, 4, 5)).astype(jnp.dtype(name)) for name in DTYPES}


def test_equal_models_have_equal_fingerprints():
    first = fingerprint(CONFIG, weights())
    again = fingerprint(CONFIG, jax.tree.map(lambda x: jnp.asarray(x.copy()), weights()))
    assert first == again and len(first) == 64 and int(first, 16)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(DTYPES), place=st.integers(0, 59), byte=st.integers(0, 3),
    flip=st.integers(0, 7),
)  # fmt: skip
def test_a_single_changed_bit_changes_it(name, place, byte, flip):
    """The sign of a zero included."""
    params = {key: array.copy() for key, array in weights().items()}
    raw = params[name].reshape(-1).view(np.uint8).reshape(60, -1)
    raw[place, byte % raw.shape[1]] ^= 1 if name == "bool" else 1 << flip
    assert fingerprint(CONFIG, params) != fingerprint(CONFIG, weights())


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999))
def test_elements_that_change_places_change_it(seed):
    array = np.arange(60, dtype=np.float32).reshape(3, 4, 5)
    mixed = np.random.default_rng(seed).permutation(array.reshape(-1)).reshape(array.shape)
    assert fingerprint(CONFIG, {"x": mixed}) != fingerprint(CONFIG, {"x": array})


def test_names_shapes_dtypes_and_the_configuration_belong_to_it():
    zero = np.zeros((2, 3), np.float32)
    models = [
        (CONFIG, {"a": zero}),
        (CONFIG, {"b": zero}),
        (CONFIG, {"a": zero.T.copy()}),
        (CONFIG, {"a": zero.astype(jnp.bfloat16)}),
        (CONFIG, {"a": zero, "b": zero}),
        (dataclasses.replace(CONFIG, norm_eps=1e-6), {"a": zero}),
        (dataclasses.replace(CONFIG, windows=(0, 8)), {"a": zero}),
    ]
    assert len({fingerprint(*model) for model in models}) == len(models)


ON_A_MESH = """
import sys

import jax

jax.config.update("jax_num_cpu_devices", 4)
import jax.numpy as jnp
import test_saved_cache as ours
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from kvjax.infer.saved_cache import fingerprint, load_cache, put_pages, save_cache

mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Auto,))
heads = NamedSharding(mesh, PartitionSpec(None, None, "model"))
pool, table = ours.random_cache(ours.PLAIN)
split = jax.tree.map(lambda plane: jax.device_put(plane, heads), pool)
for name, cache in (("whole", pool), ("split", split)):
    save_cache(f"{sys.argv[1]}/{name}", cache, table, config=ours.PLAIN, model=ours.MODEL)
saved = load_cache(f"{sys.argv[1]}/split")
put = put_pages(split, list(range(len(saved.pool.k))), saved.pool)
assert put.k.sharding == heads and put.k.addressable_shards[0].data.shape[2] == 1
assert jnp.array_equal(put.k[: len(saved.pool.k)], saved.pool.k)
params = {"a": jnp.arange(96.0).reshape(2, 3, 16)}
placed = jax.device_put(params, NamedSharding(mesh, PartitionSpec(None, None, "model")))
assert fingerprint(ours.CONFIG, params) == fingerprint(ours.CONFIG, placed)
print("same")
"""


@pytest.mark.slow
def test_on_a_mesh_files_and_fingerprints_are_the_same(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", ON_A_MESH, str(tmp_path)],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "same\n", done.stderr
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "split").read_bytes()
