"""Prompts of the tasks T1 to T8 for `kvjax eval`, with the places that each answer needs."""

import re
from collections.abc import Iterator

import numpy as np

from kvjax.infer.evaluate_suite import Prompt
from kvjax.models.tokenizer import Tokenizer
from kvjax.train.chat import ASSISTANT, USER
from kvjax.train.tasks import AGGREGATION, Example, Mixture, Setting
from kvjax.train.tasks.encode import ChatEncoder

__all__ = ["make_prompts", "needed"]


def make_prompts(
    tokenizer: Tokenizer, task: str, length: int, seed: int, count: int
) -> Iterator[Prompt]:
    """The first `count` prompts of a task: a fresh document each that fills the length."""
    encoder = ChatEncoder(tokenizer)
    mixture = Mixture(tasks=(task,), setting=Setting(tokens=length)).alone()
    to_id = tokenizer.backend.token_to_id
    for number in range(count):
        example = mixture.make(seed, number)
        ids = encoder.encode(example.messages())
        asked = int(np.flatnonzero(ids == to_id(USER))[0])
        answered = int(np.flatnonzero(ids == to_id(ASSISTANT))[0]) + 2  # and a line break
        yield Prompt(
            name=str(number),
            task=task,
            length=length,
            context=ids[:asked],
            question=ids[asked:answered],
            answers=(example.answers[0],),
            gathers=task in AGGREGATION,
            needles=_spans(encoder, example, ids[:asked]),
            most_tokens=len(ids) - answered,
        )


def _spans(
    encoder: ChatEncoder, example: Example, context: np.ndarray
) -> tuple[tuple[int, int], ...]:
    """Where the needed sentences are, in tokens of the context."""
    stops = encoder.stops(context)
    starts = np.concatenate([[3], stops[:-1] + 1])  # <|bos|><|system|> and a line break
    sentences = re.findall(r"[^.]+\.", example.document)
    wanted = needed(example)
    return tuple(
        (int(start), int(stop) + 1)
        for start, stop, sentence in zip(starts, stops, sentences, strict=True)
        if any(re.match(pattern, sentence.strip()) for pattern in wanted)
    )


def needed(example: Example) -> list[str]:
    """Patterns of the sentences without which the first question has no answer."""
    question, answer = example.questions[0], example.answers[0]
    pair = r"(\w+ \w+)"
    if match := re.fullmatch(rf"What is the (\w+) of the {pair}\?", question):
        return [rf"The {match[1]} of the {match[2]} is "]
    if match := re.fullmatch(r"What are the (\w+)s of the .*\?", question):
        names = re.findall(rf"[Tt]he {pair} \d", answer)
        return [rf"The {match[1]} of the {name} is " for name in names]
    if match := re.fullmatch(rf"What are the three (\w+)s of the {pair}\?", question):
        return [rf"The \w+ {match[1]} of the {match[2]} is "]
    if match := re.fullmatch(rf"Where does the trail of the {pair} end\?", question):
        names = [match[1], *re.findall(rf"[Tt]he {pair}", answer)]
        return [rf"The {name} (follows|holds) " for name in names]
    if match := re.fullmatch(rf"Where does the {pair} live\?", question):
        return [rf"The {match[1]} lives at "]
    if match := re.fullmatch(rf"Whom does the {pair} follow\?", question):
        return [rf"The {match[1]} follows "]
    if match := re.fullmatch(r"Where does the \w+ (\w+) go\?", question):
        return [rf"The \w+ {match[1]} goes to "]
    if match := re.fullmatch(r"Continue: (There came .*)", question):
        return [re.escape(match[1].strip())]
    return [r"One \w+ \w+ went "]
