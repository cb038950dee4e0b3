"""What a run of `kvjax train prm` is made of."""

import dataclasses

from kvjax.errors import InputError
from kvjax.train.lm_config import Machine
from kvjax.train.program import named_config
from kvjax.train.step import StepOptions

__all__ = ["PRMConfig", "read_config"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PRMConfig:
    """A training run of `kvjax train prm`.

    A round draws plays from the policy, judges them, and teaches the same network to foretell the
    outcome; beside that it goes on learning to play, so that it stays the policy. That moves it a
    little, and the next round draws from where it is then.

    Attributes:
        policy: folder of the model to begin with, such as runs/lm_countdown/model.
        rounds: how many.
        rollouts: plays that a round learns from.
        rollout_rows: how many are drawn at a time.
        same_problem: how many of them have the same problem.
        length: tokens of a problem and a play; what is longer is cut and lost.
        asks: after how many steps of a play the outcome is foretold.
        ask, good, bad: the letters that ask for it and answer.
        steps: of a round.
        batch_size: drawn plays of a step.
        model_plays: plays that a step learns to play from.
        learning_rate: the highest; a cosine takes it to 0.
        warmup_steps: in which it rises from 0.
        step: how a step computes.
        machine: what of the machine is used.
        seed: of the problems, of the draws and of the batches.
        eval_seed: of the problems on which the result is measured; other than `seed`.
        eval_problems: how many.
        eval_rollouts: plays of each.
        save_every: steps between checkpoints.
        log_every: steps between lines of metrics.
    """

    policy: str
    rounds: int = 2
    rollouts: int = 500_000
    rollout_rows: int = 10_000
    same_problem: int = 4
    length: int = 120
    asks: int = 12
    ask: str = "?"
    good: str = "y"
    bad: str = "n"
    steps: int = 4000
    batch_size: int = 512
    model_plays: int = 256
    learning_rate: float = 3e-4
    warmup_steps: int = 100
    step: StepOptions = dataclasses.field(
        default_factory=lambda: StepOptions(clip_norm=1.0, ema_decay=0.999)
    )
    machine: Machine = dataclasses.field(default_factory=Machine)
    seed: int = 10
    eval_seed: int = 1_000_000
    eval_problems: int = 400
    eval_rollouts: int = 32
    save_every: int = 1000
    log_every: int = 50

    def __post_init__(self) -> None:
        for name in ("rounds", "rollouts", "rollout_rows", "same_problem", "steps", "asks",
                     "batch_size", "eval_problems", "save_every", "log_every"):  # fmt: skip
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}: give 1 or more")
        if self.eval_rollouts < 2 or self.model_plays < 0:
            raise InputError("eval_rollouts must be 2 or more, and model_plays 0 or more")
        if self.rollouts % self.rollout_rows or self.rollout_rows % self.same_problem:
            raise InputError(
                f"{self.rollouts} rollouts are drawn {self.rollout_rows} at a time, "
                f"{self.same_problem} of a problem: make each a multiple of the next"
            )
        if len({self.ask, self.good, self.bad}) < 3:
            raise InputError("ask, good and bad must be three different letters")
        self.step.check()


def read_config(name: str) -> PRMConfig:
    """The config of `kvjax.configs` with this name.

    Raises:
        InputError: there is none for this program; the message lists those there are.
    """
    return named_config(name, "prm", "prm_")
