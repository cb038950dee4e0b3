"""Searches by name, as they are asked for on a command line."""

import dataclasses
from typing import Any

from kvjax.errors import InputError
from kvjax.infer.llm import LLM
from kvjax.infer.search.features import hidden_clusters
from kvjax.infer.search.policies import DVTS, ETS, Beam, BestOfN, Clusters, Policy, Rebase
from kvjax.infer.search.tasks import SearchTask, equal_text

__all__ = ["CLUSTERS", "METHODS", "MethodOptions", "read_method"]

METHODS = ("ets", "rebase", "dvts", "beam", "best-of-n", "weighted", "majority")
CLUSTERS = ("state", "hidden", "text", "none")


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
    threshold: float = 0.02
    """ets: cosine distance of hidden states from which on clusters stay apart."""
    cost: str = "nodes"
    """ets: nodes, as published, or pages, what is really given back."""
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

    def policy(self, llm: LLM, task: SearchTask) -> Policy:
        """The policy.

        Raises:
            InputError: a value that cannot be used.
        """
        if self.width < 1:
            raise InputError(f"the width is {self.width}: give 1 or more")
        if self.method == "ets":
            return ETS(
                lambda_b=self.lambda_b, lambda_d=self.lambda_d, temperature=self.temperature,
                clusters=self._clusters(llm, task), cost=self.cost, floor_one=self.floor_one,
            )  # fmt: skip
        policies: dict[str, Policy] = {
            "rebase": Rebase(self.temperature), "dvts": DVTS(self.subtrees),
            "beam": Beam(self.beams), "best-of-n": BestOfN(), "weighted": BestOfN(),
            "majority": BestOfN(),
        }  # fmt: skip
        if self.method not in policies:
            raise InputError(f"no method {self.method!r}: use one of {', '.join(METHODS)}")
        return policies[self.method]

    def vote(self, task: SearchTask) -> str:
        """How the answer is chosen, see `choose`."""
        own = {"best-of-n": "best", "weighted": "weighted", "majority": "majority"}
        return own.get(self.method, task.vote)

    def _clusters(self, llm: LLM, task: SearchTask) -> Clusters | None:
        if self.clusters == "none" or not self.lambda_d:
            return None
        if self.clusters == "state":
            if task.state is None:
                raise InputError("clusters by true state: of this task nobody knows the states")
            return task.states
        if self.clusters == "hidden":
            return hidden_clusters(llm, self.threshold)
        if self.clusters != "text":
            raise InputError(f"no clusters {self.clusters!r}: use one of {', '.join(CLUSTERS)}")
        return equal_text


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
