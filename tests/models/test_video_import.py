"""The released PyTorch model beside ours: outputs that it computed, and weights under its names.

tests/witnesses/make_ca2vdm.py made the files, from commit ce3ab5f of CausalCache-VDM.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kvjax.cache.frames import frames_held
from kvjax.diffusion import Sampler, linear_schedule
from kvjax.diffusion.objective import NoisyClip, prefix_loss
from kvjax.diffusion.schedule import add_noise, log_variance, posterior_mean, split_output
from kvjax.errors import InputError
from kvjax.models.hf_files import file_tensors
from kvjax.models.video_dit import Text
from kvjax.models.video_import import from_state_dict, load_released, released_config

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parent / "ca2vdm"
SIZES = {"height": 8, "width": 8, "num_heads": 2, "chunk": 4, "max_prefix": 9}
MODELS = ("cyclic", "rope")


@pytest.fixture(scope="module", params=MODELS)
def released(request):
    model = load_released(FOLDER / f"{request.param}.safetensors", positions=request.param, **SIZES)
    arrays = np.load(FOLDER / f"{request.param}.npz")
    text = None
    if "text" in arrays:
        text = Text(jnp.asarray(arrays["text"]), jnp.ones((1, 5), bool))
    return model, {name: jnp.asarray(arrays[name]) for name in arrays}, text


def close(ours, theirs, tolerance=1e-4):
    """To 1e-4 of the largest value: float32 in another order, through three layers."""
    np.testing.assert_allclose(ours, theirs, atol=tolerance * np.abs(theirs).max(), rtol=0)


def test_a_clip_at_once(released):
    model, arrays, text = released
    x = jnp.concatenate([arrays["video"][:, :5], arrays["noisy"]], axis=1)
    t = jnp.array([[0] * 5 + [500] * 4])
    close(model(x, t, prefix=jnp.array([5]), text=text), arrays["joint"])


def test_denoising_calls_and_cache_writes(released):
    """After 1, 5, 9, 13 and 17 frames, of which the last two no longer fit into the cache."""
    model, arrays, text = released
    graph, params = nnx.split(model)
    write = jax.jit(lambda params, x, ring: nnx.merge(graph, params).write(x, ring, text))
    denoise = jax.jit(lambda params, ring: nnx.merge(graph, params).denoise(
        arrays["noisy"], jnp.array([500]), ring, text))  # fmt: skip
    ring, frames = model.config.ring(rows=1).init(), 0
    for count in (1, 4, 4, 4, 4):
        ring = write(params, arrays["video"][:, frames : frames + count], ring)
        frames += count
        close(denoise(params, ring), arrays[f"after_{frames}"])

    order = np.argsort(frames_held(ring))
    for planes, theirs in zip((ring.k, ring.v), jnp.split(arrays["cache"], 2, -1), strict=True):
        ours = planes[-1].transpose(0, 3, 1, 2, 4)[:, order]  # [B, F, S, H, D]
        close(ours.reshape(theirs.shape), theirs)
    if "prefix" in arrays:
        held = zip((ring.prefix_k, ring.prefix_v), jnp.split(arrays["prefix"], 2, -1), strict=True)
        for planes, theirs in held:
            close(planes[-1].reshape(theirs.shape), theirs)


def tensors_of(name):
    found = file_tensors(FOLDER / f"{name}.safetensors", "x_embedder.proj.weight")
    return {n: t.read(tuple(slice(None) for _ in t.shape)) for n, t in found.items()}


def test_the_config_is_read_from_the_weights():
    config = released_config(tensors_of("cyclic"), **SIZES)
    assert (config.num_layers, config.embed_dim, config.patch, config.channels) == (3, 24, 2, 4)
    assert (config.prefix_attention, config.mask_channel) == ("code", True)
    assert (config.text_dim, config.text_tokens, config.learned_variance) == (10, 5, True)


def test_open_sora_weights_start_the_new_parts_as_training_does():
    """The prefix attention adds nothing and the mask channel changes nothing."""
    tensors = tensors_of("cyclic")
    config = released_config(tensors, **SIZES)
    new = ("attn_cf", "attn_temp_pre_merge")
    tensors = {n: x for n, x in tensors.items() if not any(part in n for part in new)}
    params = nnx.split(from_state_dict(tensors, config))[1]
    assert not np.any(params["blocks"]["prefix"]["out"]["kernel"][...])
    np.testing.assert_array_equal(params["start"]["merge"]["kernel"][...], np.eye(25, 24))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x: x.pop("blocks.1.mlp.fc1.bias"), "have no blocks.1.mlp.fc1.bias"),
        (lambda x: x.update(other=np.zeros(3)), "no place for other"),
        (lambda x: x.update({"t_block.1.bias": np.zeros(3)}), "t_block.1.bias is"),
    ],
)
def test_wrong_weights_are_named(change, message):
    tensors = tensors_of("rope")
    config = released_config(tensors, **SIZES)
    change(tensors)
    with pytest.raises(InputError, match=message):
        from_state_dict(tensors, config)


def test_bound_and_sampling_step():
    """The released diffusion code, on an output that no network made."""
    arrays = {name: jnp.asarray(x) for name, x in np.load(FOLDER / "diffusion.npz").items()}
    schedule, t = linear_schedule(), jnp.array([0, 400, 999])
    close(add_noise(schedule, arrays["x0"], arrays["noise"], t), arrays["x"])
    clip = NoisyClip(arrays["x"], jnp.zeros((3, 2), jnp.int32), jnp.ones((3, 2), bool), t)
    loss = prefix_loss(schedule, arrays["out"], clip, arrays["x0"], arrays["noise"])
    close(loss.vb, arrays["bound"].mean((1, 2, 3, 4)))

    spaced, step = Sampler(steps=100).schedule, jnp.array([0, 40, 99])
    found, variance = split_output(spaced, "eps", arrays["x"], arrays["out"], step)
    # The released tables are rounded to float32 before they are respaced.
    close(posterior_mean(spaced, found.x0, arrays["x"], step), arrays["mean"], 5e-4)
    close(log_variance(spaced, variance, arrays["x"], step), arrays["log_variance"])
