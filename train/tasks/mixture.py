"""All tasks by name, and what a run draws from them."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from kvjax.errors import InputError
from kvjax.train.tasks.chains import tracking
from kvjax.train.tasks.copying import completion
from kvjax.train.tasks.countdown import countdown
from kvjax.train.tasks.counting import counting
from kvjax.train.tasks.example import Example, Setting
from kvjax.train.tasks.induction import few_shot
from kvjax.train.tasks.lookups import mixed, multi_key, multi_query, multi_value, passkey
from kvjax.train.tasks.words import corpus

__all__ = ["AGGREGATION", "TASKS", "Mixture", "Task", "make_task"]

Task = Callable[[np.random.Generator, Setting], Example]

# T1 to T8 of the long-context suite; T3 has two forms.
TASKS: Mapping[str, Task] = {
    "passkey": passkey,
    "multi_key": multi_key,
    "multi_query": multi_query,
    "multi_value": multi_value,
    "tracking": tracking,
    "completion": completion,
    "counting": counting,
    "few_shot": few_shot,
    "mixed": mixed,
}
# Those whose answers are not the only ones: no part of the suite, and drawn where they are named.
_GAMES: Mapping[str, Task] = {"countdown": countdown}
# Those whose answer no single place of the document holds; the others localise.
AGGREGATION = frozenset({"counting", "few_shot"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
    """Which tasks a stage draws, and how long and hard they are.

    Attributes:
        tasks: names of `TASKS`, or "countdown", in turn; one that stands twice comes twice as
            often.
        setting: of every example.
    """

    tasks: tuple[str, ...] = tuple(TASKS)
    setting: Setting = dataclasses.field(default_factory=Setting)

    def __post_init__(self) -> None:
        known = TASKS.keys() | _GAMES.keys()
        unknown = [name for name in self.tasks if name not in known]
        if unknown or not self.tasks:
            names = ", ".join((*TASKS, *_GAMES))
            raise InputError(f"no tasks {unknown or 'at all'}: name some of {names}")

    @property
    def answer_tokens(self) -> int:
        """More than all answers of an example have together, the ends of them included."""
        return 32 + self.setting.tokens // 4

    def make(self, seed: int, index: int) -> Example:
        """The example number `index` of a seed."""
        return make_task(self.tasks[index % len(self.tasks)], seed, index, self.setting)

    def alone(self) -> "Mixture":
        """The same with one question a document and no token unused, for an evaluation."""
        setting = dataclasses.replace(self.setting, questions=1, fill=1.0)
        return dataclasses.replace(self, setting=setting)

    @staticmethod
    def corpus() -> Iterator[str]:
        """What its tokenizer is trained on."""
        return corpus()


def make_task(name: str, seed: int, index: int, setting: Setting) -> Example:
    """The example number `index` of a task and a seed: the same arguments give the same example."""
    task = TASKS.get(name) or _GAMES[name]
    return task(np.random.default_rng(np.random.SeedSequence((seed, index))), setting)
