"""How the next token is chosen: what a caller may ask for."""

import dataclasses
import math
from collections.abc import Mapping

__all__ = ["MAX_LOGIT_BIAS", "MAX_LOGPROBS", "MAX_STOP_IDS", "SamplingParams"]

MAX_LOGPROBS = 20
"""The most alternatives of a token whose log-probabilities may be asked for."""
MAX_LOGIT_BIAS = 300
"""The most tokens of a request whose logits may be moved."""
MAX_STOP_IDS = 32
"""The most tokens that may end a request, the model's own end tokens included."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to continue a prompt.

    The logits go through `logit_bias`, `min_tokens`, the penalties, `temperature`, `min_p`,
    `top_k` and `top_p`, in this order. Log-probabilities are the model's own, before all of them.

    Attributes:
        max_tokens: the most tokens to generate; None: until the model's context is full.
        expected_tokens: how many there will be, as far as known; only the order in which a planned
            batch runs depends on it. None: `max_tokens`, or what other answers came to.
        min_tokens: until so many are generated, no token that would end the answer is drawn.
        temperature: 0 takes the likeliest token; 1 draws from the model's distribution.
        top_k: draw only from so many likeliest tokens; 0: all.
        top_p: draw only from the likeliest tokens whose probabilities together reach it.
        min_p: draw only from tokens at least so likely as this times the likeliest one.
        repetition_penalty: divides positive and multiplies negative logits of tokens that stand in
            the prompt or the answer (Keskar et al. 2019); 1: none.
        presence_penalty: taken from the logits of tokens that stand in the answer.
        frequency_penalty: taken from a token's logit as often as it stands in the answer.
        logit_bias: token id -> what is added to its logit, at most 300 of them.
        seed: of the draws. They depend on it and on the position in the sequence, on nothing
            else; None gives every prompt of a call a seed of its own, its place in the call.
        n: answers to the same prompt, with the seeds `seed`, `seed + 1`, ...
        stop: texts that end the answer; they and what follows are no part of its text.
        stop_ids: tokens that end the answer.
        ignore_eos: go on after the model's end token.
        logprobs: how many alternatives come with each token and its log-probability, at most 20;
            None: no log-probabilities.
        prompt_logprobs: the same of the prompt's tokens.
        prompt_logprobs_from: the first of them; those before may be found in the cache instead of
            being computed. The very first token has none: nothing predicts it.
    """

    max_tokens: int | None = 256
    expected_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    prompt_logprobs_from: int = 1

    def __post_init__(self) -> None:
        least = 0 if self.prompt_logprobs is not None else 1  # a prompt may be scored by itself
        if self.max_tokens is not None and self.max_tokens < least:
            raise ValueError(f"max_tokens must be {least} or more, not {self.max_tokens}")
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"{name} must be from {low} to {high}, not {value}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(
                f"repetition_penalty must be above 0, not {self.repetition_penalty}; 1 is none"
            )
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"{self.min_tokens=} is more than {self.max_tokens=}")
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise ValueError(
                f"logit_bias may name {MAX_LOGIT_BIAS} tokens, not {len(self.logit_bias)}"
            )
        if not all(math.isfinite(bias) for bias in self.logit_bias.values()):
            raise ValueError("logit_bias must be finite: -100 is as good as never")
        if isinstance(self.stop, str) or not all(self.stop):
            raise ValueError("stop must be a tuple of texts that are not empty")

    @property
    def is_greedy(self) -> bool:
        """Whether every token is the likeliest one, whatever the row's tokens were before."""
        penalties = self.repetition_penalty - 1, self.presence_penalty, self.frequency_penalty
        return not (self.temperature or self.min_tokens or self.logit_bias or any(penalties))


_RANGES = (
    ("expected_tokens", 1, 2**31 - 1),
    ("min_tokens", 0, 2**31 - 1),
    ("temperature", 0, 1e6),
    ("top_k", 0, 2**31 - 1),
    ("min_p", 0, 1),
    ("presence_penalty", -1e6, 1e6),
    ("frequency_penalty", -1e6, 1e6),
    ("seed", 0, 2**32 - 1),
    ("n", 1, 1024),
    ("logprobs", 0, MAX_LOGPROBS),
    ("prompt_logprobs", 0, MAX_LOGPROBS),
    ("prompt_logprobs_from", 1, 2**31 - 1),
)
