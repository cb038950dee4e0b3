"""Searches by name, as they are asked for on a command line."""

import dataclasses
from typing import Any

from kvjax.errors import InputError
from kvjax.infer.llm import LLM
from kvjax.infer.search.device_program import DeviceProgram, make_device_program
from kvjax.infer.search.features import hidden_clusters
from kvjax.infer.search.policies import DVTS, ETS, Beam, BestOfN, Clusters, Policy, Rebase
from kvjax.infer.search.tasks import SearchTask, equal_text

__all__ = ["CLUSTERS", "METHODS", "MethodOptions", "read_method"]

METHODS = ("ets", "rebase", "dvts", "beam", "best-of-n", "weighted", "majority")
CLUSTERS = ("state", "hidden", "text", "none")

# By HiGHS a level of 64 leaves takes 10 ms, one of 256 a quarter of a second: as long as a model of
# 8B draws its steps. The rule goes by sizes and not by a clock, so that a tree is always the same.
_EXACT_WIDTH = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodOptions:
    """Which search, and how."""

    method: str = "ets"
    """ets, rebase, dvts, beam, best-of-n; weighted and majority: N samples that vote."""
    width: int = 16
    """Continuations of a level."""
    lambda_b: float = 1.0
    """ets: what the cache of a level costs."""
    lambda_d: float = 1.0
    """ets: what it is worth to keep a leaf of every cluster."""
    clusters: str = "text"
    """ets: which leaves say the same: by their last step's text, by hidden states, by the true
    state (countdown), or none."""
    threshold: float = 0.05
    """ets: cosine distance of hidden states from which on clusters stay apart."""
    cost: str = "nodes"
    """ets: nodes, as published, or pages, what is really given back."""
    solver: str = "auto"
    """ets: exact (HiGHS on the host); device: nearly the best, in a time that hardly grows with the
    width; auto: exact as long as it takes less time than drawing a level does."""
    floor_one: bool = True
    """ets: whether every leaf that is kept is continued; as published, not."""
    temperature: float = 0.2
    """ets, rebase: of the softmax of the scores."""
    beams: int | None = None
    """beam: how many; by default the root of the width."""
    subtrees: int | None = None
    """dvts: how many; by default the root of the width."""
    merge: bool = False
    """Whether equal siblings become one node; published searches do not."""

    def check(self, task: SearchTask) -> None:
        """Raises InputError for a value that cannot be used, before anything is loaded."""
        for name, known in (
            ("method", METHODS), ("clusters", CLUSTERS), ("solver", ("auto", "exact", "device")),
            ("cost", ("nodes", "pages")),
        ):  # fmt: skip
            value = getattr(self, name)
            if value not in known:
                raise InputError(f"no {name} {value!r}: use one of {', '.join(known)}")
        if self.width < 1:
            raise InputError(f"the width is {self.width}: give 1 or more")
        if self.temperature <= 0:
            raise InputError(f"the temperature is {self.temperature}: give more than 0")
        if self.method == "ets" and self.clusters == "state" and task.state is None:
            raise InputError("clusters by true state: of this task nobody knows the states")

    def policy(self, llm: LLM, task: SearchTask) -> Policy:
        """The policy.

        Raises:
            InputError: a value that cannot be used.
        """
        self.check(task)
        if self.method == "ets":
            return ETS(
                lambda_b=self.lambda_b, lambda_d=self.lambda_d, temperature=self.temperature,
                clusters=self._clusters(llm, task), cost=self.cost, floor_one=self.floor_one,
                program=self._program(),
            )  # fmt: skip
        policies: dict[str, Policy] = {
            "rebase": Rebase(self.temperature), "dvts": DVTS(self.subtrees),
            "beam": Beam(self.beams), "best-of-n": BestOfN(), "weighted": BestOfN(),
            "majority": BestOfN(),
        }  # fmt: skip
        return policies[self.method]

    def vote(self, task: SearchTask) -> str:
        """How the answer is chosen, see `choose`."""
        own = {"best-of-n": "best", "weighted": "weighted", "majority": "majority"}
        return own.get(self.method, task.vote)

    def _program(self) -> DeviceProgram | None:
        most = 32 if self.cost == "nodes" else 128  # generations, and ancestors of a leaf
        exact = self.solver == "exact" or (self.solver == "auto" and self.width <= _EXACT_WIDTH)
        return None if exact else make_device_program(self.width, most * self.width, most)

    def _clusters(self, llm: LLM, task: SearchTask) -> Clusters | None:
        if self.clusters == "none" or not self.lambda_d:
            return None
        if self.clusters == "state":
            return task.states
        return hidden_clusters(llm, self.threshold) if self.clusters == "hidden" else equal_text


def read_method(text: str) -> MethodOptions:
    """Options of a text such as `ets,width=64,lambda_b=1.5,floor_one=no`.

    Raises:
        InputError: it cannot be read.
    """
    method, *rest = text.split(",")
    types = {f.name: type(f.default) for f in dataclasses.fields(MethodOptions)}
    types |= {"beams": int, "subtrees": int}
    values: dict[str, Any] = {"method": method}
    for part in rest:
        name, _, value = part.partition("=")
        try:
            kind = types[name]
            values[name] = _FLAGS[value] if kind is bool else kind(value)
        except (KeyError, ValueError):
            raise InputError(
                f"{part!r} in {text!r} is no option: write NAME=VALUE of {', '.join(types)}"
            ) from None
    return MethodOptions(**values)


_FLAGS = {"yes": True, "no": False, "1": True, "0": False, "true": True, "false": False}
