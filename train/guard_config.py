"""What a run of `kvjax train guard` is made of."""

import dataclasses

from kvjax.errors import InputError
from kvjax.models.decoder import DecoderConfig
from kvjax.safety_world import SafetyWorld
from kvjax.train.lm_config import Machine
from kvjax.train.program import named_config
from kvjax.train.step import StepOptions

__all__ = ["ROLES", "GuardConfig", "read_config"]

ROLES = ("policy", "prm")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """A training run of `kvjax train guard`.

    Attributes:
        role: "policy": speak as the world's speaker does; "prm": say how safe a beginning is.
        model: sizes of the decoder; its vocabulary is the world's.
        world: what the world is drawn from.
        prefill: tokens of the attacker, in half of the answers. They are not learnt to be spoken.
        noise: standard deviation of what the judge's teacher says.
        answers: how many different ones a judge is taught with, since labels are dear; 0: no end.
        scale: of rewards, by which a judge's errors are divided.
        steps: how many.
        batch_size: answers of a step.
        learning_rate: the highest; a cosine takes it to 0.
        warmup_steps: in which it rises from 0.
        step: how a step computes.
        machine: what of the machine is used.
        seed: of the first parameters and of the answers.
        eval_rows: answers on which the result is measured.
        save_every: steps between checkpoints.
        log_every: steps between lines of metrics.
    """

    role: str
    model: DecoderConfig
    world: SafetyWorld = dataclasses.field(default_factory=SafetyWorld)
    prefill: int = 10
    noise: float = 0.5
    answers: int = 0
    scale: float = 4.0
    steps: int = 4000
    batch_size: int = 512
    learning_rate: float = 2e-3
    warmup_steps: int = 200
    step: StepOptions = dataclasses.field(default_factory=lambda: StepOptions(clip_norm=1.0))
    machine: Machine = dataclasses.field(default_factory=Machine)
    seed: int = 20
    eval_rows: int = 2048
    save_every: int = 1000
    log_every: int = 50

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "eval_rows", "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}: give 1 or more")
        if self.role not in ROLES:
            raise InputError(f"no role {self.role!r}: use one of {', '.join(ROLES)}")
        if self.model.vocab_size != self.world.vocab_size:
            raise InputError(
                f"the decoder has a vocabulary of {self.model.vocab_size}, the world one of "
                f"{self.world.vocab_size}: make them equal"
            )
        if self.prefill < 0 or self.answers < 0 or self.scale <= 0:
            raise InputError("prefill and answers must be 0 or more, and scale more than 0")
        self.step.check()


def read_config(name: str) -> GuardConfig:
    """The config of `kvjax.configs` with this name.

    Raises:
        InputError: there is none for this program; the message lists those there are.
    """
    return named_config(name, "guard", "guard_")
