"""`kvjax bench train`: the speed of the training step on one device, beside PyTorch's.

The step is the one of every run (`make_step`): bfloat16 arithmetic, float32 parameters, a clipped
gradient, AdamW. The peer is the same model, batch and optimiser in PyTorch (torch.compile, scaled
dot-product attention, autocast, fused AdamW), in a process of its own on the same device.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from kvjax.errors import InputError
from kvjax.models.decoder import Decoder, DecoderConfig, Rope
from kvjax.train.flops import decoder_step_flops, peak_flops
from kvjax.train.losses import next_token_loss
from kvjax.train.step import (
    Step,
    StepOptions,
    TrainState,
    abstract_state,
    init_state,
    make_mesh,
    make_step,
    place_batch,
)  # fmt: skip

__all__ = ["BENCH_MODEL", "BenchOptions", "bench_step", "main", "measure"]

BENCH_MODEL: DecoderConfig = DecoderConfig(
    vocab_size=32768,
    num_layers=24,
    embed_dim=1024,
    mlp_dim=2816,
    num_heads=16,
    num_kv_heads=16,
    head_dim=64,
    max_positions=2048,
    rope=Rope(theta=10_000.0),
)
"""375 million parameters, 342 million of them in matrix products."""

LEARNING_RATE, BETAS, EPS, WEIGHT_DECAY, CLIP_NORM = 3e-4, (0.9, 0.95), 1e-8, 0.1, 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """Measure the training step of a decoder of 375 million parameters, and PyTorch's beside it."""

    batch_size: int = 16
    """Sequences a step."""
    length: int = 2048
    """Tokens of a sequence."""
    layers: int = BENCH_MODEL.num_layers
    """Layers of the decoder; fewer are for trying the command."""
    embed_dim: int = BENCH_MODEL.embed_dim
    """Width of the decoder, a multiple of 64; the MLP grows with it."""
    steps: int = 20
    """Steps that are timed; the median counts."""
    warmup: int = 5
    """Steps before."""
    remat: str = "none"
    """What the layers compute again in the backward pass: none, dots or layer."""
    unroll: bool = True
    """Compile the layers one by one instead of as a loop: slower to compile, faster to run."""
    chunk: int = 8192
    """Tokens whose logits are in memory at a time."""
    microbatches: int = 1
    """Parts that a batch is taken in."""
    torch: bool = True
    """Measure PyTorch too."""
    kvjax: bool = True
    """Measure kvjax."""
    json: bool = False
    """End with one JSON object on stdout."""

    def model(self) -> DecoderConfig:
        """The decoder that is trained."""
        if self.embed_dim % 64 or min(self.embed_dim, self.layers, self.steps) < 1:
            raise InputError("embed_dim must be a multiple of 64, layers and steps 1 or more")
        heads = self.embed_dim // 64
        return dataclasses.replace(
            BENCH_MODEL, num_layers=self.layers, embed_dim=self.embed_dim, num_heads=heads,
            num_kv_heads=heads, mlp_dim=self.embed_dim * 11 // 4, max_positions=self.length,
        )  # fmt: skip


def bench_step(options: BenchOptions, mesh: Mesh) -> tuple[Step, TrainState]:
    """The step, and the shapes of its state with their places on a mesh."""
    decoder = nnx.eval_shape(lambda: Decoder(options.model(), rngs=nnx.Rngs(0)))
    graph, params = nnx.split(decoder)
    like = abstract_state(params, _optimizer(), mesh=mesh)
    loss = next_token_loss(graph, remat=options.remat, unroll=options.unroll, chunk=options.chunk)
    step_options = StepOptions(
        compute_dtype="bfloat16", clip_norm=CLIP_NORM, microbatches=options.microbatches
    )
    return make_step(loss, _optimizer(), step_options, like=like), like


def _optimizer() -> optax.GradientTransformation:
    return optax.adamw(LEARNING_RATE, b1=BETAS[0], b2=BETAS[1], eps=EPS, weight_decay=WEIGHT_DECAY)


def batches(options: BenchOptions, count: int) -> list[np.ndarray]:
    """Random tokens int32[B, T + 1], the same for both programs."""
    size = (count, options.batch_size, options.length + 1)
    tokens = np.random.default_rng(0).integers(0, BENCH_MODEL.vocab_size, size, dtype=np.int32)
    return list(tokens)


def measure(options: BenchOptions) -> dict[str, Any]:
    """Times kvjax's step on the default device."""
    mesh = make_mesh()
    step, _ = bench_step(options, mesh)
    params = nnx.state(Decoder(options.model(), rngs=nnx.Rngs(0)))
    state = init_state(params, _optimizer(), mesh=mesh)
    del params
    start = time.perf_counter()
    data = [place_batch(x, mesh) for x in batches(options, 4)]
    compiled: Any = step.lower(state, data[0]).compile()  # type: ignore[attr-defined]
    compile_seconds = time.perf_counter() - start
    seconds, losses = _time_steps(compiled, state, data, options)
    memory = compiled.memory_analysis()
    return {
        "framework": f"kvjax on jax {jax.__version__}",
        "compile_seconds": round(compile_seconds, 1),
        "temporary_gib": round(memory.temp_size_in_bytes / 2**30, 2),
        "loss": losses,
    } | speed(options, seconds, peak_flops(jax.devices()[0].device_kind))


def _time_steps(
    step: Step, state: TrainState, data: list, options: BenchOptions
) -> tuple[list[float], list[float]]:
    """Seconds of each step after the warm-up, and the losses of the first and the last."""
    seconds, losses = [], []
    for number in range(options.warmup + options.steps):
        start = time.perf_counter()
        state, metrics = step(state, data[number % len(data)])
        # As the loop does: the number is read, so a step is over when its loss is there.
        losses.append(float(metrics["loss"]))
        seconds.append(time.perf_counter() - start)
    return seconds[options.warmup :], [round(losses[0], 4), round(losses[-1], 4)]


def speed(options: BenchOptions, seconds: Sequence[float], peak: float | None) -> dict[str, Any]:
    """The figures of some timed steps."""
    median = statistics.median(seconds)
    flops = decoder_step_flops(options.model(), options.batch_size, options.length)
    return {
        "step_ms": round(1e3 * median, 2),
        "step_ms_min": round(1e3 * min(seconds), 2),
        "step_ms_max": round(1e3 * max(seconds), 2),
        "tokens_per_second": round(options.batch_size * options.length / median),
        "tflops_per_second": round(flops / median / 1e12, 1),
        "mfu": peak and round(flops / median / peak, 4),
    }


def _peer(options: BenchOptions) -> dict[str, Any]:
    """PyTorch's figures, from a process of its own: its memory and ours would crowd each other."""
    fields = json.dumps(dataclasses.asdict(options))
    argv = [sys.executable, "-m", "kvjax.train.bench_torch", fields]
    # JAX is imported there too, and is not to take the device's memory.
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(argv, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise InputError("PyTorch's part failed, see above; --no-torch leaves it out")
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    import tyro  # The peer's process imports this module too, and reads no command line.

    arguments = sys.argv[1:] if argv is None else argv
    options = tyro.cli(BenchOptions, prog="kvjax bench train", args=arguments)
    result: dict[str, Any] = {
        "device": None,
        "model": dataclasses.asdict(options.model()),
        "batch": [options.batch_size, options.length],
        "gflops_per_token": round(
            decoder_step_flops(options.model(), 1, options.length) / options.length / 1e9, 4
        ),
    }
    if options.torch:  # first: it gives its memory back when its process ends
        result["torch"] = _peer(options)
        _print(result["torch"])
    if options.kvjax:
        result["device"] = jax.devices()[0].device_kind
        result["kvjax"] = measure(options)
        _print(result["kvjax"])
    if options.torch and options.kvjax:
        ratio = result["kvjax"]["tokens_per_second"] / result["torch"]["tokens_per_second"]
        result["kvjax_to_torch"] = round(ratio, 3)
    if options.json:
        print(json.dumps(result))
    return 0


def _print(figures: dict[str, Any]) -> None:
    mfu = "" if figures["mfu"] is None else f", {figures['mfu']:.1%} of the device's peak"
    print(
        f"{figures['framework']}: {figures['step_ms']} ms a step, "
        f"{figures['tokens_per_second']} tokens/s{mfu}",
        file=sys.stderr,
    )


if __name__ == "__main__":
    sys.exit(main())
