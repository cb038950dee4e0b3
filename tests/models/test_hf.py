"""Weights of Hugging Face folders: what is read and written, and what is refused."""

import dataclasses
import json
import struct
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from kvjax.errors import InputError
from kvjax.models import Decoder, DecoderConfig, Rope
from kvjax.models.hf import _layouts, load, save
from kvjax.models.hf_files import Tensor, read_tensors
from kvjax.sharding import param_axes


def without(fields: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if key not in names}


def write_config(folder: Path, fields: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def assert_one_line(error: InputError, *words: str) -> None:
    assert "\n" not in str(error)
    for word in words:
        assert word in str(error), str(error)


def test_folder_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "absent", tmp_path / "file", tmp_path):
        with pytest.raises(InputError) as caught:
            load(folder)
        assert_one_line(caught.value, str(folder))


SMALL = DecoderConfig(
    vocab_size=11, num_layers=3, embed_dim=6, mlp_dim=10, num_heads=4, num_kv_heads=2, head_dim=2,
    max_positions=64, norm_eps=1e-6,
)  # fmt: skip
VARIANTS = {
    "llama": {},
    "llama-biased": {"qkv_bias": True, "out_bias": True, "mlp_bias": True},
    "llama3.1-tied": {"rope": Rope(theta=5e5, kind="llama3", factor=8.0, original_max_positions=16),
                      "tie_embeddings": True},
    "mistral": {"windows": (5, 5, 5), "rope": Rope(kind="linear", factor=2.5)},
    "qwen2": {"qkv_bias": True, "windows": (0, 0, 9), "num_kv_heads": 1},
    "qwen3": {"qk_norm": True, "windows": (9, 0, 9), "head_dim": 8},
    "qwen3-biased": {"qk_norm": True, "qkv_bias": True, "out_bias": True, "num_kv_heads": 4},
}  # fmt: skip


def make_params(config: DecoderConfig, seed: int = 0) -> nnx.State:
    """Random parameters, those that begin as zeros and ones too; nothing is compiled."""
    shapes = nnx.state(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), shapes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_load_returns_what_save_was_given(variant: str, dtype: str, tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, dtype=dtype, **VARIANTS[variant])
    params = make_params(config)
    save(tmp_path / "new" / "folder", config, params, dtype=dtype)
    graphdef, loaded, loaded_config = load(tmp_path / "new" / "folder")
    assert loaded_config == config
    model = nnx.merge(graphdef, loaded)
    assert isinstance(model, Decoder) and model.config == config
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(loaded), strict=True):
        assert theirs.dtype == jnp.dtype(dtype)
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
    assert {file.name for file in (tmp_path / "new" / "folder").iterdir()} == {
        "config.json", "model.safetensors",
    }  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_has_axes(variant: str) -> None:
    config = dataclasses.replace(SMALL, **VARIANTS[variant])
    shapes = nnx.state(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        assert len(param_axes(path)) == leaf.ndim, path


@pytest.mark.parametrize(
    "switches",
    [
        {"qk_norm": True, "qkv_bias": True},
        {"out_bias": True},
        {"windows": (4, 0, 4)},
        {"windows": (4, 5, 4), "qkv_bias": True},
        {"windows": (4, 4, 4), "mlp_bias": True},
    ],
)
def test_save_refuses_what_no_architecture_has(switches: dict[str, Any], tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, **switches)
    with pytest.raises(InputError) as caught:
        save(tmp_path, config, make_params(config))
    assert_one_line(caught.value, "no Hugging Face architecture")


def test_layouts_by_hand(tmp_path: Path) -> None:
    """One element of every kind of tensor, found where the Hugging Face layout has it."""
    config = dataclasses.replace(SMALL, qkv_bias=True, qk_norm=True, out_bias=True)
    params = make_params(config)
    save(tmp_path, config, params, dtype="float32")
    files = load_file(tmp_path / "model.safetensors")
    blocks = jax.tree.map(np.asarray, params["blocks"])
    layer, e, h, d, f = 1, 4, 1, 1, 7
    prefix = f"model.layers.{layer}."
    pairs = [
        (files[prefix + "self_attn.q_proj.weight"][h * 2 + d, e],
         blocks["q"]["kernel"][...][layer, e, h, d]),
        (files[prefix + "self_attn.k_proj.bias"][h * 2 + d],
         blocks["k"]["bias"][...][layer, h, d]),
        (files[prefix + "self_attn.o_proj.weight"][e, h * 2 + d],
         blocks["out"]["kernel"][...][layer, h, d, e]),
        (files[prefix + "mlp.down_proj.weight"][e, f], blocks["down"]["kernel"][...][layer, f, e]),
        (files[prefix + "self_attn.q_norm.weight"][d], blocks["q_norm"][...][layer, d]),
        (files["model.embed_tokens.weight"][9, e], params["embed"][...][9, e]),
        (files["lm_head.weight"][9, e], params["head"]["kernel"][...][e, 9]),
    ]  # fmt: skip
    for stored, ours in pairs:
        assert stored == ours


def test_any_block_reads_as_the_slice_of_the_whole(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, qkv_bias=True, out_bias=True)
    params = make_params(config)
    save(tmp_path, config, params, dtype="float32")
    tensors, rng = read_tensors(tmp_path), np.random.default_rng(3)
    leaves = jax.tree.leaves(params)
    for leaf, layout in zip(leaves, _layouts(params, config.num_layers), strict=True):
        whole = np.asarray(leaf)[1] if layout.stacked else np.asarray(leaf)
        tensor = tensors[layout.names[1 if layout.stacked else 0]]
        for _ in range(5):
            starts = [(int(rng.integers(n)), n) for n in whole.shape]
            pairs = [(start, int(rng.integers(start, n)) + 1) for start, n in starts]
            block = layout.read(tensor, tuple(pairs))
            np.testing.assert_array_equal(block, whole[tuple(slice(*pair) for pair in pairs)])


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    config = dataclasses.replace(SMALL, qkv_bias=True)
    save(tmp_path, config, make_params(config), dtype="float32")
    return tmp_path


def rewrite(folder: Path, change: Any) -> None:
    """Lets `change` edit the dict of tensors of model.safetensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_dtypes(checkpoint: Path) -> None:
    for stored, expected in (
        (np.float16, "bfloat16"), (np.float64, "float32"),
        (ml_dtypes.bfloat16, "bfloat16"), (np.float32, "float32"),
    ):  # fmt: skip
        rewrite(checkpoint, lambda ts, d=stored: ts.update({n: t.astype(d) for n, t in ts.items()}))
        config = json.loads((checkpoint / "config.json").read_text())
        write_config(checkpoint, without(config, "torch_dtype"))
        _, params, ours = load(checkpoint)
        assert ours.dtype == expected
        for dtype in ("float32", "bfloat16"):
            _, params, ours = load(checkpoint, dtype=dtype)
            assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {ours.dtype} == {dtype}
    with pytest.raises(InputError) as caught:
        load(checkpoint, dtype="int8")
    assert_one_line(caught.value, "int8", "bfloat16")


def test_rotary_buffers_and_a_tied_head_are_ignored(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, tie_embeddings=True)
    save(tmp_path, config, make_params(config), dtype="float32")
    _, params, _ = load(tmp_path)

    def add(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(1, np.float32)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    rewrite(tmp_path, add)
    _, again, _ = load(tmp_path)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, again))
    rewrite(tmp_path, lambda tensors: tensors["lm_head.weight"].__setitem__((3, 2), 5.0))
    with pytest.raises(InputError) as caught:
        load(tmp_path)
    assert_one_line(caught.value, "model.safetensors", "lm_head.weight", "tie_word_embeddings")


K_BIAS, GATE = "model.layers.1.self_attn.k_proj.bias", "model.layers.2.mlp.gate_proj.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(K_BIAS), [K_BIAS, "missing"]),
        (lambda t: t.pop("model.embed_tokens.weight"), ["model.embed_tokens.weight", "missing"]),
        (lambda t: t.pop("lm_head.weight"), ["lm_head.weight", "missing"]),
        (lambda t: t.update({GATE: t[GATE].T.copy()}), [GATE, "[6, 10]", "[10, 6]"]),
        (lambda t: t.update({GATE: t[GATE][:9]}), [GATE, "[9, 6]", "[10, 6]"]),
        (lambda t: t.update({K_BIAS: t[K_BIAS][None]}), [K_BIAS, "[1, 4]", "[4]"]),
        (lambda t: t.update({GATE: t[GATE].astype(np.int8)}), [GATE, "I8"]),
        (lambda t: t.update({"model.layers.3.mlp.up_proj.weight": t[GATE]}),
         ["model.layers.3.mlp.up_proj.weight", "not part"]),
        (lambda t: t.update({"score.weight": t[GATE]}), ["score.weight", "not part"]),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit(change: Any, words: list[str], checkpoint: Path) -> None:
    rewrite(checkpoint, change)
    with pytest.raises(InputError) as caught:
        load(checkpoint)
    assert_one_line(caught.value, str(checkpoint / "model.safetensors"), *words)


def test_truncated_file_names_the_first_tensor_beyond_its_end(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    whole = file.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + length])
    header.pop("__metadata__")
    by_place = sorted(header, key=lambda name: header[name]["data_offsets"])
    for name in (by_place[0], by_place[5], by_place[-1]):
        begin, end = header[name]["data_offsets"]
        for cut in (begin, (begin + end) // 2, end - 1):
            file.write_bytes(whole[: 8 + length + cut])
            with pytest.raises(InputError) as caught:
                load(checkpoint)
            assert_one_line(caught.value, str(file), repr(name), "truncated")
    for cut in (0, 5, 8, 100):
        file.write_bytes(whole[:cut])
        with pytest.raises(InputError) as caught:
            load(checkpoint)
        assert_one_line(caught.value, str(file), "model.embed_tokens.weight")


def _header(**entry: Any) -> bytes:
    text = json.dumps({"model.norm.weight": entry}).encode()
    return struct.pack("<Q", len(text)) + text + bytes(24)


@pytest.mark.parametrize(
    "content",
    [
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 988097824\n",
        struct.pack("<Q", 4) + b"null",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 9) + b'{"a": 1} ',
        struct.pack("<Q", 4) + b"\xff\xff\xff\xff",
        _header(dtype="F32", shape=[6]),
        _header(dtype="F32", shape=[6], data_offsets=[0, 20]),
        _header(dtype="F32", shape=["6"], data_offsets=[0, "x"]),
        _header(dtype="F32", shape=[6], data_offsets=[24, 0]),
        _header(dtype="F32", shape=[-6], data_offsets=[0, -24]),
        _header(dtype="F32", shape=[6], data_offsets=[0]),
    ],
)
def test_file_that_is_no_safetensors(content: bytes, checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError) as caught:
        load(checkpoint)
    assert_one_line(caught.value, str(checkpoint / "model.safetensors"), "tensor 'model.")


def test_file_with_bytes_that_belong_to_nothing(checkpoint: Path) -> None:
    """The safetensors library refuses it; our line still names a file and a tensor."""
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes() + bytes(16))
    with pytest.raises(InputError) as caught:
        load(checkpoint)
    assert_one_line(caught.value, str(file), "tensor 'model.")


@pytest.fixture
def sharded(checkpoint: Path) -> Path:
    """The checkpoint in two files with an index."""
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2],
             "model-00002-of-00002.safetensors": names[1::2]}  # fmt: skip
    for part, held in parts.items():
        save_file({name: tensors[name] for name in held}, checkpoint / part)
    places = {name: part for part, held in parts.items() for name in held}
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    return checkpoint


def test_sharded_is_the_same_model(sharded: Path) -> None:
    _, single, _ = load(sharded)
    (sharded / "model.safetensors").unlink()
    _, parts, _ = load(sharded)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), single, parts))


def test_sharded_errors(sharded: Path) -> None:
    (sharded / "model.safetensors").unlink()
    index = sharded / "model.safetensors.index.json"
    first, second = sorted(sharded.glob("model-0*"))
    good = json.loads(index.read_text())

    def message() -> InputError:
        with pytest.raises(InputError) as caught:
            load(sharded)
        return caught.value

    def places(**change: Any) -> None:
        index.write_text(json.dumps({"weight_map": good["weight_map"] | change}))

    places(**{GATE: "../model-00001-of-00002.safetensors"})
    assert_one_line(message(), str(index), GATE, "../model")
    places(**{GATE: 3})
    assert_one_line(message(), str(index), GATE)
    other = {first.name: second.name, second.name: first.name}[good["weight_map"][GATE]]
    places(**{GATE: other})
    assert_one_line(message(), str(sharded / other), GATE, "missing")
    places(**{"model.layers.9.x": second.name})
    assert_one_line(message(), str(second), "model.layers.9.x", "missing")
    index.write_text(json.dumps({"weight_map": []}))
    assert_one_line(message(), str(index), "weight_map")
    index.write_text(json.dumps(good))
    whole = second.read_bytes()
    second.write_bytes(whole[:-1])
    assert_one_line(message(), str(second), "truncated", "tensor 'model.")
    second.unlink()
    assert_one_line(message(), str(second), "no such file", "tensor 'model.")
    second.write_bytes(whole)
    rest = load_file(second)
    name = next(iter(rest))
    save_file({key: value for key, value in rest.items() if key != name}, second)
    index.write_text(json.dumps({"weight_map": without(good["weight_map"], name)}))
    assert_one_line(message(), str(index), name, "missing")
    index.unlink()
    (sharded / "pytorch_model.bin").write_bytes(b"")
    assert_one_line(message(), str(sharded), "safetensors")


def test_every_tensor_is_read_once_and_alone(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One read a tensor, each of one layer of one parameter: nothing is gathered first."""
    seen: list[tuple[str, int]] = []
    read = Tensor.read

    def spy(tensor: Tensor, index: tuple[slice, ...]) -> np.ndarray:
        block = read(tensor, index)
        seen.append((tensor.name, block.size))
        return block

    monkeypatch.setattr(Tensor, "read", spy)
    load(checkpoint)
    tensors = load_file(checkpoint / "model.safetensors")
    assert sorted(seen) == sorted((name, tensor.size) for name, tensor in tensors.items())
