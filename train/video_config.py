"""What a run of `kvjax train video` is made of, and where named ones are found."""

import dataclasses
from pathlib import Path

from kvjax.diffusion import Sampler
from kvjax.errors import InputError
from kvjax.models.video_config import VideoDiTConfig
from kvjax.moving_digits import MovingDigits
from kvjax.train.lm_config import Machine
from kvjax.train.program import named_config
from kvjax.train.remat import layer_remat
from kvjax.train.step import StepOptions

__all__ = ["VideoConfig", "read_config"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoConfig:
    """A training run of `kvjax train video`.

    A clip has up to `model.max_prefix + model.chunk` frames: a clean prefix of 1, 1 + chunk,
    1 + 2 chunk, ... frames, whose length is drawn, and one chunk that is to be denoised.

    Attributes:
        model: sizes of the video transformer.
        steps: how many.
        batch_size: clips a step.
        data: a folder of videos (GIF, mp4, ...) or of latents (.npz of
            `python -m kvjax.train.video_latents`); None: moving digits.
        autoencoder: a diffusers folder that decodes samples, where the data are latents.
        prefix_per_row: whether every clip of a batch draws its own prefix. All clips then have the
            longest one's frames, and one program does for all; otherwise a batch has one prefix
            and no frames to spare, but each length is compiled.
        every: of a video only every so many frames are taken.
        digits: how the digits move.
        prediction: what the model predicts: "eps", "x0" or "v".
        x0_weight: the most that an error of "x0" counts, see `prefix_loss`.
        prefix_step: the noise level, 0 to 999, that the clean frames are given in training and, by
            default, in generation. It makes a model forgive its own small errors. None: clean.
        test_prefix_step: that of generation, if it is another; -1 is clean.
        shift: whether every clip begins at a random row of the cyclic positions (the paper), or
            only clips that fill the table (the released code). Generation visits other rows only
            when the table is full.
        text_dropout: how often a clip's text is replaced by none, for guidance.
        learning_rate: the highest; after the warm-up a cosine takes it to 1 % of that.
        adam_share: what Adam, which trains all but the matrices, takes of the learning rate.
        gates: about which a block's gates begin. At 0, as the released model starts, they let
            little through at first; at 1 all.
        warmup_steps: in which the learning rate rises from 0.
        adam_b2: of Adam.
        step: how a step computes: type, parts, clipping, average.
        remat: what layers compute again in the backward pass, see `layer_remat`.
        machine: what of the machine is used.
        sampler: how the samples are made, and by default those of the trained model.
        weights: type of the exported weights, float32 or bfloat16.
        samples: videos in the grid that every checkpoint writes; 0 writes none.
        seed: of the data and of the first parameters.
        eval_seed: of the clips whose beginnings are continued; other than `seed`.
        save_every: steps between checkpoints.
        log_every: steps between lines of metrics.
    """

    model: VideoDiTConfig
    steps: int
    batch_size: int
    data: Path | None = None
    autoencoder: Path | None = None
    prefix_per_row: bool = False
    every: int = 1
    digits: MovingDigits = dataclasses.field(default_factory=MovingDigits)
    prediction: str = "v"
    x0_weight: float = 1.0
    prefix_step: int | None = None
    test_prefix_step: int | None = None
    shift: bool = True
    text_dropout: float = 0.1
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    adam_share: float = 0.25
    gates: float = 0.0
    adam_b2: float = 0.98
    step: StepOptions = dataclasses.field(
        default_factory=lambda: StepOptions(clip_norm=1.0, ema_decay=0.999)
    )
    remat: str = "none"
    machine: Machine = dataclasses.field(default_factory=Machine)
    sampler: Sampler = dataclasses.field(
        default_factory=lambda: Sampler(kind="ddim", steps=25, prediction="v", clip=1.0)
    )
    weights: str = "float32"
    samples: int = 8
    seed: int = 0
    eval_seed: int = 1_000_000
    save_every: int = 500
    log_every: int = 50

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "every", "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}: give 1 or more")
        if self.x0_weight < 1:
            raise InputError(f"x0_weight is {self.x0_weight}: give 1 or more")
        for name in ("prefix_step", "test_prefix_step"):
            level = getattr(self, name)
            if level is not None and not -1 <= level < 1000:
                raise InputError(f"{name} is {level}: give a noise level from 0 to 999")
        if self.model.temporal == "full":
            raise InputError("model.temporal is 'full': a prefix needs 'causal' or 'partial'")
        if self.model.max_prefix < 1 or (self.model.max_prefix - 1) % self.model.chunk:
            raise InputError(
                f"model.max_prefix is {self.model.max_prefix}: give 1 and a multiple of the chunk "
                f"({self.model.chunk}), since prefixes are drawn from those"
            )
        if self.weights not in ("float32", "bfloat16"):
            raise InputError(f"weights is {self.weights!r}: use float32 or bfloat16")
        if self.sampler.prediction != self.prediction:
            raise InputError(
                f"the model predicts {self.prediction!r} and sampler.prediction is "
                f"{self.sampler.prediction!r}: give the same"
            )
        self.step.check()
        layer_remat(self.remat)

    @property
    def frames(self) -> int:
        """Of the longest clip."""
        return self.model.max_prefix + self.model.chunk

    @property
    def prefixes(self) -> tuple[int, ...]:
        """The lengths of prefixes that are drawn."""
        return tuple(range(1, self.model.max_prefix + 1, self.model.chunk))

    @property
    def generation_prefix_step(self) -> int | None:
        """The noise level of clean frames in generation, or None."""
        chosen = self.prefix_step if self.test_prefix_step is None else self.test_prefix_step
        return None if chosen is None or chosen < 0 else chosen


def read_config(name: str) -> VideoConfig:
    """The config of `kvjax.configs` with this name; InputError lists those there are."""
    return named_config(name, "video", "video_")
