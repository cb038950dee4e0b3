"""The autoencoder computes what diffusers' does, and says what it cannot read."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from kvjax.errors import InputError
from kvjax.models.autoencoder import AutoencoderConfig, AutoencoderKL, Pixels, load_autoencoder

FOLDER = Path(__file__).parent / "autoencoder_kl"  # by tests/witnesses/make_autoencoder_kl.py
WEIGHTS = "diffusion_pytorch_model.safetensors"
EXPECTED = dict(np.load(FOLDER / "expected.npz"))


@pytest.fixture
def folder(tmp_path):
    """A copy that can be spoilt."""
    return Path(shutil.copytree(FOLDER, tmp_path / "vae"))


@pytest.fixture(scope="module")
def autoencoder():
    _, graph, params = load_autoencoder(FOLDER)
    return nnx.merge(graph, params)


# A chain of about 30 convolutions in float32: 5e-7 was seen.
def near(got, expected):
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())


def test_latents_are_those_of_diffusers(autoencoder):
    mean, spread = autoencoder.encode(EXPECTED["frames"])
    near(mean, EXPECTED["mean"])
    near(spread, EXPECTED["std"])


def test_frames_are_those_of_diffusers(autoencoder):
    near(autoencoder.decode(EXPECTED["latents"]), EXPECTED["decoded"])


def test_old_names_of_the_attention_are_read(folder):
    tensors = load_file(folder / WEIGHTS)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for name in [n for n in tensors if "attentions" in n]:
        renamed = name
        for new, before in old.items():
            renamed = renamed.replace(f".{new}.", f".{before}.")
        x = tensors.pop(name)
        square = x.ndim == 2
        tensors[renamed] = np.ascontiguousarray(x[:, :, None, None] if square else x)
    save_file(tensors, folder / WEIGHTS)
    _, graph, params = load_autoencoder(folder)
    mean, _ = nnx.merge(graph, params).encode(EXPECTED["frames"])
    near(mean, EXPECTED["mean"])


def test_stable_diffusions_sizes():
    shapes = nnx.eval_shape(lambda: AutoencoderKL(AutoencoderConfig(), rngs=nnx.Rngs(0)))
    assert sum(x.size for x in jax.tree.leaves(nnx.state(shapes))) == 83_653_863
    assert AutoencoderConfig().factor == 8


def test_pixels_pass_as_they_are():
    frames = jnp.arange(12.0).reshape(1, 2, 2, 3)
    mean, spread = Pixels().encode(frames)
    np.testing.assert_array_equal(Pixels().decode(mean), frames)
    assert not spread.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "UNet"}, "is a UNet, not an AutoencoderKL"),
        ({"down_block_types": ["AttnDownBlock2D"]}, "AttnDownBlock2D"),
        ({"block_out_channels": [4, 8, 16]}, "which config.json denies"),
        ({"layers_per_block": 3}, "is missing"),
    ],
)
def test_what_is_no_such_model_is_said_in_one_line(folder, change, message):
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message) as error:
        load_autoencoder(folder)
    assert "\n" not in str(error.value)


def test_frames_that_do_not_fit_are_refused(autoencoder):
    with pytest.raises(InputError, match=r"18 x 16.*multiples of 4"):
        autoencoder.encode(jnp.zeros((1, 18, 16, 3)))
