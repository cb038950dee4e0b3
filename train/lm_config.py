"""What a run of `kvjax train lm` is made of, and where named ones are found."""

import dataclasses

from kvjax.errors import InputError
from kvjax.models.decoder import DecoderConfig
from kvjax.train.program import named_config
from kvjax.train.remat import layer_remat
from kvjax.train.step import StepOptions
from kvjax.train.tasks import Mixture

__all__ = ["LMConfig", "Machine", "Stage", "read_config"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of a training run, with documents of one size.

    Attributes:
        share: of the run's steps; the shares of all stages sum to 1.
        batch_size: examples a step.
        length: tokens to which examples are padded; none is longer.
        difficulty: of the documents.
        first_window: how many of the last positions the first layer sees; 0 is all of them.
            To find a value, one layer has to gather the words of a key and the next to compare
            keys, and neither learns before the other. In a window of a few tokens any attention
            gathers the key, so the comparison is learnt at once; the window can then widen.
        longest: positions of half of the examples are stretched by gaps to up to this many, so
            that the model knows longer distances than it is trained on; 0 stretches none.
    """

    share: float
    batch_size: int
    length: int
    difficulty: Mixture
    first_window: int = 0
    longest: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """What a run uses of the machine that it is on; a run may be resumed with other values.

    Attributes:
        data: devices that hold copies of the model, each with its part of the batch.
        fsdp: devices over which the parameters and the batch are split.
        model: devices over which heads, MLP and vocabulary are split.
        workers: processes that make batches; 0 is a thread.
        keep_last: how many of the newest checkpoints are kept.
        keep_every: checkpoints of steps that this divides are kept too.
        tensorboard: whether to write TensorBoard's files.
    """

    data: int = 1
    fsdp: int = 1
    model: int = 1
    workers: int = 0
    keep_last: int = 2
    keep_every: int | None = None
    tensorboard: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class LMConfig:
    """A training run of `kvjax train lm`.

    Attributes:
        model: sizes of the decoder; its vocabulary bounds the tokenizer's.
        stages: what is learnt, in order.
        steps: of all stages together.
        learning_rate: the highest; after the warm-up a cosine takes it to 1 % of that.
        warmup_steps: in which the learning rate rises from 0.
        adam_b2: of Adam, which trains the embedding and the norms.
        step: how a step computes: type, parts, clipping, average.
        remat: what layers compute again in the backward pass, see `layer_remat`.
        unroll: whether layers are compiled one by one: slower to compile, faster on a GPU.
        machine: what of the machine is used.
        seed: of the data and of the first parameters.
        eval_seed: of the documents on which the result is measured; other than `seed`.
        eval_prompts: how many, one question each.
        eval_difficulty: of those documents.
        save_every: steps between checkpoints.
        log_every: steps between lines of metrics.
    """

    model: DecoderConfig
    stages: tuple[Stage, ...]
    steps: int
    eval_difficulty: Mixture
    learning_rate: float = 6e-3
    warmup_steps: int = 50
    adam_b2: float = 0.98
    step: StepOptions = dataclasses.field(default_factory=lambda: StepOptions(clip_norm=1.0))
    remat: str = "none"
    unroll: bool = False
    machine: Machine = dataclasses.field(default_factory=Machine)
    seed: int = 0
    eval_seed: int = 1_000_000
    eval_prompts: int = 256
    save_every: int = 200
    log_every: int = 50

    def __post_init__(self) -> None:
        total = sum(stage.share for stage in self.stages)
        if abs(total - 1) > 1e-6:
            raise InputError(f"the shares of the stages sum to {total:g}: make them sum to 1")
        for name in ("steps", "eval_prompts", "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}: give 1 or more")
        self.step.check()
        layer_remat(self.remat)
        longest = max(stage.length for stage in self.stages)
        if longest > self.model.max_positions:
            raise InputError(
                f"a stage has {longest} tokens, more than the model's max_positions "
                f"{self.model.max_positions}: make the stage shorter or the model longer"
            )


def read_config(name: str) -> LMConfig:
    """The config of `kvjax.configs` with this name.

    Raises:
        InputError: there is none for this program; the message lists those there are.
    """
    return named_config(name, "lm", "lm_")
