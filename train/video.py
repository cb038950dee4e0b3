"""`kvjax train video`: trains a causal video diffusion transformer (Ca2-VDM, Gao et al. 2025).

A batch is clips with a clean prefix and one noisy chunk behind it; the loss looks at the chunk. How
long the prefix is is drawn for each batch, so that a step of every length compiles once.
"""

import dataclasses
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from optax.contrib import MuonDimensionNumbers

from kvjax.diffusion import draw_offset, linear_schedule, noisy_clip, prefix_loss
from kvjax.diffusion.sampler import row_noise
from kvjax.errors import InputError
from kvjax.models.autoencoder import load_autoencoder
from kvjax.models.video_config import VideoDiTConfig
from kvjax.models.video_dit import Text, VideoDiT
from kvjax.models.video_folder import VideoModel, save_video_model
from kvjax.models.video_rollout import Rollout
from kvjax.train.data import step_dataset
from kvjax.train.flops import video_step_flops
from kvjax.train.loop import run
from kvjax.train.metrics import Work
from kvjax.train.optimizers import muon_cosine
from kvjax.train.program import run_main, settle, show_result, train_options
from kvjax.train.remat import layer_remat
from kvjax.train.step import Loss, Sums, TrainState, init_state, make_mesh, make_step
from kvjax.train.video_config import VideoConfig, read_config
from kvjax.train.video_data import Clips, DigitClips, LatentFolder, open_folder
from kvjax.train.video_samples import SampleGrid
from kvjax.video_files import to_unit

__all__ = [
    "Batch",
    "first_model",
    "main",
    "make_batches",
    "make_optimizer",
    "open_clips",
    "train",
    "video_loss",
]

Array = jax.Array
_ABOUT = """Train a causal video diffusion transformer on moving digits, videos or latents.

Run the same command again after an interruption: it goes on from its last checkpoint."""
# Which draw of a row's key is for what.
_NOISE, _PREFIX_NOISE, _SPREAD, _STEP, _OFFSET, _TEXT = range(6)


class Batch(NamedTuple):
    """Clips of one step.

    Attributes:
        video: uint8[B, T, H, W, C] pixels or float32 means of latents.
        prefix: int32[B], clean frames at the beginning; behind them is one chunk that counts.
        seed: uint32[B], of what is random in each row.
        spread: float32, as video, the standard deviations of latents; or None.
        text: float32[B, N, text_dim], or None.
        text_mask: bool[B, N], or None.
    """

    video: np.ndarray
    prefix: np.ndarray
    seed: np.ndarray
    spread: np.ndarray | None = None
    text: np.ndarray | None = None
    text_mask: np.ndarray | None = None


def make_batches(config: VideoConfig, clips: Clips) -> Callable[[int], Batch]:
    """The batch of each step by its number."""

    def batch(step: int) -> Batch:
        rng = np.random.default_rng(np.random.SeedSequence((config.seed, step, 1)))
        rows = config.batch_size
        draws = rows if config.prefix_per_row else 1
        prefix = np.broadcast_to(rng.choice(config.prefixes, draws), rows).astype(np.int32)
        frames = config.frames if config.prefix_per_row else int(prefix[0]) + config.model.chunk
        found = [clips.clip(step * rows + row, frames) for row in range(rows)]
        video, *others = (
            None if parts[0] is None else np.stack(parts) for parts in zip(*found, strict=True)
        )
        assert video is not None
        seed = rng.integers(2**32, size=rows, dtype=np.uint32)
        return Batch(video, prefix, seed, *others)

    return batch


def video_loss(graph: nnx.GraphDef[Any], config: VideoConfig) -> Loss:
    """The partial-prefix objective; the metrics are `mse` and, with a learned variance, `vb`."""
    schedule, chunk = linear_schedule(), config.model.chunk
    wrap = layer_remat(config.remat)

    def loss(params: nnx.State[Any, Any], batch: Batch) -> Sums:
        model: VideoDiT = nnx.merge(graph, params)
        keys = jax.vmap(jax.random.key)(jnp.asarray(batch.seed))
        prefix = jnp.asarray(batch.prefix)
        x0 = _latents(batch, keys)
        noise = row_noise(keys, _NOISE, x0.shape[1:])
        before = config.prefix_step
        clip = noisy_clip(
            schedule, x0, noise, _draw(keys, _STEP, len(schedule)), prefix, chunk,
            prefix_step=before,
            prefix_noise=None if before is None else row_noise(keys, _PREFIX_NOISE, x0.shape[1:]),
        )  # fmt: skip
        frames = _offsets(config, keys, prefix) + jnp.arange(x0.shape[1], dtype=jnp.int32)[None]
        text = _text(model, config, batch, keys)
        # One prefix for all rows is told by the length of the clips.
        known = prefix if config.prefix_per_row else x0.shape[1] - chunk
        out = model(clip.x, clip.t, prefix=known, frames=frames, text=text, remat=wrap)
        row = prefix_loss(
            schedule, out, clip, x0, noise,
            prediction=config.prediction, x0_weight=config.x0_weight,
        )  # fmt: skip
        metrics = {"mse": jnp.sum(row.mse)}
        if config.model.learned_variance:
            metrics["vb"] = jnp.sum(row.vb)
        return Sums(jnp.sum(row.loss), jnp.float32(x0.shape[0]), metrics)

    return loss


def _latents(batch: Batch, keys: Array) -> Array:
    """What the model sees of clean clips, float32[B, T, H, W, C]."""
    video = jnp.asarray(batch.video)
    if video.dtype == jnp.uint8:
        return to_unit(video)
    if batch.spread is None:
        return video
    return video + batch.spread * row_noise(keys, _SPREAD, video.shape[1:])


def _draw(keys: Array, number: int, below: int) -> Array:
    """int32[B], evenly from 0 to below - 1, of each row's key."""

    def one(key: Array) -> Array:
        return jax.random.randint(jax.random.fold_in(key, number), (), 0, below)

    return jax.vmap(one)(keys)


def _offsets(config: VideoConfig, keys: Array, prefix: Array) -> Array:
    """int32[B, 1], the row of the position table where each clip begins."""

    def one(key: Array, prefix: Array) -> Array:
        key = jax.random.fold_in(key, _OFFSET)
        model = config.model
        return draw_offset(key, prefix[None], model.chunk, model.table, always=config.shift)

    return jax.vmap(one)(keys, prefix)


def _text(model: VideoDiT, config: VideoConfig, batch: Batch, keys: Array) -> Text | None:
    """The texts, some of them replaced by none."""
    if not config.model.text_dim:
        return None
    if batch.text is None or batch.text_mask is None:
        raise InputError("the model has a text_dim, and the data no text: give latents with `text`")
    none = model.no_text(batch.text.shape[0])
    dropped = _draw(keys, _TEXT, 1_000_000) < round(1_000_000 * config.text_dropout)
    embed = jnp.where(dropped[:, None, None], none.embed.astype(jnp.float32), batch.text)
    return Text(embed, jnp.where(dropped[:, None], none.mask, batch.text_mask))


def first_model(config: VideoConfig) -> tuple[nnx.GraphDef[Any], nnx.State[Any, Any]]:
    """A fresh model, split, in which timesteps say little at first, and gates are as asked.

    At full size the timesteps' modulations would drown a block's own.
    """
    graph, params = nnx.split(VideoDiT(config.model, rngs=nnx.Rngs(config.seed)))

    def begin(path: tuple, x: Array) -> Array:
        names = [getattr(key, "key", None) for key in path]
        if names[:2] == ["blocks", "table"]:
            gates = jnp.zeros(6, x.dtype).at[jnp.array([2, 5])].set(config.gates)
            return x + gates[None, :, None]
        timed = names[:2] in (["modulation", "kernel"], ["time_up", "kernel"],
                              ["time_down", "kernel"])  # fmt: skip
        return 0.3 * x if timed else x

    return graph, jax.tree_util.tree_map_with_path(begin, params)


def make_optimizer(config: VideoConfig) -> optax.GradientTransformation:
    """Muon for the kernels of the blocks and Adam for the rest, see `muon_cosine`."""
    return muon_cosine(
        _matrices,
        learning_rate=config.learning_rate,
        warmup_steps=config.warmup_steps,
        steps=config.steps,
        adam_b2=config.adam_b2,
        adam_share=config.adam_share,
    )


def _matrices(params: Any) -> Any:
    """Which axes of each kernel are a matrix's rows and columns; None for all other parameters."""

    def axes(path: tuple, x: Array) -> MuonDimensionNumbers | None:
        names = jax.tree_util.keystr(path)
        if "blocks" not in names or "kernel" not in names:
            return None
        if "out" in names:
            return MuonDimensionNumbers((1, 2), (3,))
        # Queries, keys and values are matrices of their own.
        outputs = (3, 4) if "qkv" in names or "kv" in names else tuple(range(2, x.ndim))
        return MuonDimensionNumbers((1,), outputs)

    return jax.tree_util.tree_map_with_path(axes, params)


def open_clips(config: VideoConfig, seed: int, split: str = "train") -> Clips:
    """Where a run's clips come from.

    Args:
        config: of the run.
        seed: of their order, or of the moving digits.
        split: of the digits.
    """
    if config.data is not None:
        return open_folder(config.data, config.model, config.frames, every=config.every, seed=seed)
    model, size = config.model, config.digits.size
    if (model.height, model.width, model.channels) != (size, size, 1):
        raise InputError(
            f"moving digits are {size} x {size} with 1 channel, and the model wants "
            f"{model.height} x {model.width} with {model.channels}: make them the same, or give "
            "--data a folder"
        )
    return DigitClips.load(config.digits, seed, split)


def train(config: VideoConfig, folder: Path) -> dict[str, Any]:
    """Trains or resumes, writes `folder`/model; returns the run's figures."""
    clips, machine = open_clips(config, config.seed), config.machine
    mesh = make_mesh(machine.data, machine.fsdp, machine.model)
    settle(folder, config)
    graph, params = first_model(config)
    optimizer, start = make_optimizer(config), time.perf_counter()
    state = init_state(params, optimizer, mesh=mesh, ema=config.step.ema_decay is not None)
    state = run(
        make_step(video_loss(graph, config), optimizer, config.step, like=state),
        state,
        step_dataset(make_batches(config, clips), config.steps, workers=machine.workers),
        steps=config.steps, folder=folder,
        save_every=config.save_every, log_every=config.log_every,
        keep_last=machine.keep_last, keep_every=machine.keep_every,
        work=functools.partial(_work, config.model), tensorboard=machine.tensorboard,
        after_save=_exporter(config, graph, folder),
    )  # fmt: skip
    _export(config, graph, folder, state)  # again, for a run that was killed just before it
    return {
        "steps": int(state.step),
        "seconds": round(time.perf_counter() - start, 1),
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        **_last_metrics(folder),
        "model": str(folder / "model"),
    }


def _work(model: VideoDiTConfig, batch: Batch) -> Work:
    rows, frames = batch.video.shape[:2]
    return Work(rows * frames * model.num_places, video_step_flops(model, rows, frames))


def _last_metrics(folder: Path) -> dict[str, float]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {name: round(x, 6) for name, x in json.loads(lines[-1]).items() if name != "step"}


def _export(config: VideoConfig, graph: nnx.GraphDef[Any], folder: Path, state: TrainState) -> None:
    data = {"digits": dataclasses.asdict(config.digits)} if config.data is None else {}
    level = config.generation_prefix_step
    model = VideoModel(config.model, graph, state.best_params, config.sampler, level, data)
    save_video_model(folder / "model", model, dtype=config.weights)


def _exporter(
    config: VideoConfig, graph: nnx.GraphDef[Any], folder: Path
) -> Callable[[TrainState], None]:
    """Writes `folder`/model at every checkpoint, and samples of it."""
    samples = _samples(config, graph, folder / "samples")

    def write(state: TrainState) -> None:
        _export(config, graph, folder, state)
        if samples is not None:
            samples.write(state.best_params, int(state.step))

    return write


def _samples(config: VideoConfig, graph: nnx.GraphDef[Any], folder: Path) -> SampleGrid | None:
    """What continues clips that training does not see; None where no samples are wanted."""
    clips, decode = open_clips(config, config.eval_seed, "test"), lambda x: x
    if config.model.text_dim or not config.samples:
        return None
    if isinstance(clips, LatentFolder):
        if config.autoencoder is None:
            return None
        _, vae_graph, vae = load_autoencoder(config.autoencoder)
        decode = functools.partial(jax.jit(lambda p, x: nnx.merge(vae_graph, p).decode(x)), vae)
    first = np.stack([clips.clip(i, 1).video for i in range(config.samples)])
    first = to_unit(first) if first.dtype == np.uint8 else first
    return SampleGrid(
        graph=graph, first=first, frames=config.frames, folder=folder, decode=decode,
        options=Rollout(sampler=config.sampler, prefix_step=config.generation_prefix_step),
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = train_options(argv, "video", "video_tiny", read_config, _ABOUT)
    result = train(options.fields, options.out)
    line = f"{result['steps']} steps; mse {result['mse']:.4f}; the model is in {result['model']}"
    return show_result(result, line, options.json)


if __name__ == "__main__":
    # By its own name, not as __main__: the processes that make batches import it again.
    from kvjax.train import video

    run_main(video.main)
