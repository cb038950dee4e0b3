"""What a run of `kvjax train mrm` is made of."""

import dataclasses

from kvjax.errors import InputError
from kvjax.models.decoder import DecoderConfig
from kvjax.models.lora import LoRA
from kvjax.models.mrm import HEADS
from kvjax.train.lm_config import Machine
from kvjax.train.program import named_config
from kvjax.train.step import StepOptions

__all__ = ["MRMConfig", "read_config"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MRMConfig:
    """A training run of `kvjax train mrm`.

    Attributes:
        data: the file of rewards, from `kvjax train label-rewards`.
        eval_data: another, on which the result is measured.
        base: folder of the decoder to begin with, such as the reward model that labelled; empty
            for a fresh one of the sizes in `model`.
        model: those sizes.
        head: one of `kvjax.models.mrm.HEADS`.
        full: train all parameters; else an adapter and the head.
        lora: the adapter.
        pull: weight of the squared marginal of random tokens; for the head "marginal".
        scheme: "sequence" or "prefix", see `reward_data.make_batches`.
        answers_only: leave out what the prompts' tokens are worth.
        steps: how many.
        batch_size: examples of a step.
        learning_rate: constant after the warm-up.
        warmup_steps: in which it rises from 0.
        weight_decay: of AdamW, on the adapter and, if `full`, the decoder. Never on the head: the
            bias of a token that is never seen must stay what it was.
        step: how a step computes.
        machine: what of the machine is used.
        seed: of the first parameters and of the order of the examples.
        save_every: steps between checkpoints.
        log_every: steps between lines of metrics.
    """

    data: str
    eval_data: str = ""
    base: str = ""
    model: DecoderConfig | None = None
    head: str = "paper"
    full: bool = False
    lora: LoRA = dataclasses.field(default_factory=LoRA)
    pull: float = 0.0
    scheme: str = "sequence"
    answers_only: bool = False
    steps: int = 1000
    batch_size: int = 32
    learning_rate: float = 1e-4
    warmup_steps: int = 0
    weight_decay: float = 0.0
    step: StepOptions = dataclasses.field(default_factory=StepOptions)
    machine: Machine = dataclasses.field(default_factory=Machine)
    seed: int = 0
    save_every: int = 500
    log_every: int = 50

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}: give 1 or more")
        if self.head not in HEADS or self.scheme not in ("sequence", "prefix"):
            raise InputError(
                f"head {self.head!r} and scheme {self.scheme!r}: use one of {', '.join(HEADS)}, "
                "and sequence or prefix"
            )
        if self.head == "max-consistency" and self.scheme == "prefix":
            raise InputError("the head max-consistency learns from what follows: use sequence")
        if not self.base and (self.model is None or not self.full):
            raise InputError(
                "without a base all of a fresh decoder is trained: give model and full"
            )
        if self.pull and self.head != "marginal":
            raise InputError(f"pull is for the head marginal, not {self.head!r}: make it 0")
        self.step.check()


def read_config(name: str) -> MRMConfig:
    """The config of `kvjax.configs` with this name.

    Raises:
        InputError: there is none for this program; the message lists those there are.
    """
    return named_config(name, "mrm", "mrm_")
