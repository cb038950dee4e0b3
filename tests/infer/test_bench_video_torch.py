"""The PyTorch peer of `kvjax bench video`: it is the same network, so both say the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity_packages import required

from kvjax.cache.frames import FrameRing
from kvjax.infer.bench import video_torch
from kvjax.infer.bench.video import BenchVideo
from kvjax.models.video_config import VideoDiTConfig
from kvjax.models.video_import import from_state_dict

torch = required("torch")


def ring_of(config, cache):
    """The peer's cache as a full ring."""
    b, s, h, p = 2, config.num_places, config.num_heads, config.prefix_frames
    planes = [
        tuple(
            jnp.asarray(layer[i].reshape(b, s, h, -1, config.head_dim).numpy()) for layer in cache
        )
        for i in (0, 1)
    ]
    for i in (2, 3):
        have = cache[0][i] is not None
        planes.append(tuple(
            jnp.asarray(layer[i].transpose(1, 2).reshape(b, p, s, h, -1).numpy()) for layer in cache
        ) if have else ())  # fmt: skip
    frames = jnp.int32(config.max_prefix)
    return FrameRing(
        k=planes[0], v=planes[1], prefix_k=planes[2], prefix_v=planes[3], next_frame=frames,
        sink_frames=0,
    )  # fmt: skip


@pytest.mark.parametrize("variant, mask", [("code", True), ("none", False)])
def test_the_peer_says_what_the_model_says(variant, mask):
    config = VideoDiTConfig(
        height=8, width=4, num_layers=2, embed_dim=32, num_heads=4, chunk=4, max_prefix=5,
        prefix_attention=variant, mask_channel=mask,
    )  # fmt: skip
    torch.manual_seed(0)
    network = video_torch.make_network(config)
    cache = video_torch.random_cache(config, 2, config.max_prefix)
    x, t = torch.randn(2, 4, 4, 8, 4), torch.tensor([20, 900])
    with torch.inference_mode():
        theirs = network(x, t, config.max_prefix, cache).permute(0, 2, 3, 4, 1)
    model = from_state_dict({n: w.numpy() for n, w in network.state_dict().items()}, config)
    frames = jnp.asarray(x.permute(0, 2, 3, 4, 1).numpy())
    ours = jax.jit(model.denoise)(frames, jnp.asarray(t.numpy()), ring_of(config, cache))
    # float32 in another order, through two layers
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-5 * float(theirs.abs().max()), rtol=0)


def test_its_figures():
    sizes = {"model": "tiny", "dtype": "float32", "steps": 1, "chunk": 2, "max_prefix": 3}
    found = video_torch.measure(BenchVideo(**sizes), "none")
    assert found["call_ms"] > 0
    assert (found["prefix_attention"], found["peak_bytes"]) == ("none", None)
