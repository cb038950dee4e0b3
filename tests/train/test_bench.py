"""The benchmark of the training step, on a model small enough for a CPU."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

from kvjax.errors import InputError
from kvjax.models import Decoder
from kvjax.train import bench
from kvjax.train.losses import next_token_loss
from kvjax.train.step import cast_params

TINY = bench.BenchOptions(batch_size=2, length=16, layers=1, embed_dim=64, steps=2, warmup=1)


@pytest.mark.slow
def test_the_command_ends_with_its_figures(capsys):
    options = "--batch-size 2 --length 16 --layers 1 --embed-dim 64 --steps 2 --warmup 1"
    assert bench.main([*options.split(), "--no-torch", "--json"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    figures = result["kvjax"]
    assert result["batch"] == [2, 16]
    assert figures["tokens_per_second"] == pytest.approx(32e3 / figures["step_ms"], rel=0.01)
    # Random tokens: nothing to know but how many there are.
    assert figures["loss"][0] == pytest.approx(np.log(32768), abs=1)
    assert "ms a step" in err


def test_utilisation_is_that_of_the_median():
    figures = bench.speed(TINY, [0.5, 0.1, 0.2], peak=1e9)
    flops = bench.decoder_step_flops(TINY.model(), 2, 16)
    assert (figures["step_ms"], figures["tokens_per_second"]) == (200.0, 160)
    assert figures["mfu"] == round(flops / 0.2 / 1e9, 4)


def test_sizes_that_make_no_model_are_said():
    with pytest.raises(InputError, match="multiple of 64"):
        bench.BenchOptions(embed_dim=100).model()


@pytest.mark.slow
def test_the_peer_computes_the_same_loss():
    """The same weights and tokens give the same number, so the same work is timed."""
    torch = pytest.importorskip("torch")
    from kvjax.train.bench_torch import make_decoder

    config = TINY.model()
    graph, params = nnx.split(Decoder(config, rngs=nnx.Rngs(0)))
    peer = make_decoder(config)
    with torch.no_grad():
        for name, tensor in peer.state_dict().items():
            if name not in ("sin", "cos"):
                tensor.copy_(torch.from_numpy(_weights(params, name).copy()).reshape(tensor.shape))
    tokens = bench.batches(TINY, 1)[0]
    whole = torch.from_numpy(tokens.astype(np.int64))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = float(peer(whole[:, :-1], whole[:, 1:]))
    short = cast_params(params, "bfloat16")
    sums = jax.jit(next_token_loss(graph))(short, tokens)
    # PyTorch's logits are rounded to bfloat16's 8 bits before their float32 sum.
    assert float(sums.loss / sums.weight) == pytest.approx(expected, abs=5e-3)


def _weights(params, name):
    """A parameter of the peer, from ours; PyTorch's matrices are transposed."""
    if name == "embed.weight":
        return np.asarray(params["embed"])
    if name in ("norm.scale", "head.weight"):
        top = params["norm"] if name[0] == "n" else params["head"]["kernel"]
        return np.asarray(top).T
    _, layer, kind, _ = name.split(".")
    block = params["blocks"][kind]
    if kind.endswith("norm"):
        return np.asarray(block)[int(layer)]
    kernel = np.asarray(block["kernel"])[int(layer)]
    inputs = kernel.shape[0] * (kernel.shape[1] if kind == "out" else 1)
    return kernel.reshape(inputs, -1).T
