"""Tasks that find records: one (T1), one of many (T2), several at once (T3), several kinds (T8).

A record is "The code of the red falcon is 4719.". Values have several tokens: the first is found by
the prompt's own last queries even where the record is evicted after them, the others are not.
"""

import numpy as np

from kvjax.train.tasks.example import Example, Setting, begin, finish, fitting, most, turns_tokens
from kvjax.train.tasks.words import ATTRIBUTES, draw_gates, draw_numbers, draw_pairs

__all__ = ["mixed", "multi_key", "multi_query", "multi_value", "passkey"]

_RECORD, _LOOKUP = 13, 13  # tokens of a record, and of a question with its answer


def _record(attribute: str, pair: str, value: str) -> str:
    return f"The {attribute} of the {pair} is {value}."


def _lookup(attribute: str, pair: str, value: str) -> tuple[str, str]:
    return f"What is the {attribute} of the {pair}?", value


def passkey(rng: np.random.Generator, setting: Setting) -> Example:
    """T1: a single record of 4 or 16 digits anywhere in noise, asked for once.

    16 digits are four numbers; whether a value has 4 or 16 is drawn.
    """
    tokens = begin(rng, setting)
    attribute = ATTRIBUTES[rng.integers(len(ATTRIBUTES))]
    pair = draw_pairs(rng, 1)[0]
    value = " ".join(draw_numbers(rng, 4)[: 1 if rng.integers(2) else 4])
    facts, turns = [_record(attribute, pair, value)], [_lookup(attribute, pair, value)]
    return finish(rng, "passkey", tokens, facts, turns, [pair])


def multi_key(rng: np.random.Generator, setting: Setting) -> Example:
    """T2: up to 64 records, of which some are asked for one by one.

    A document has two attributes, few adjectives and few nouns, so that other records share each
    word of a key and only all three together find a value.
    """
    tokens = begin(rng, setting)
    count = most(tokens, setting, _LOOKUP)
    asked = turns_tokens(count, _LOOKUP)
    size = fitting(rng, tokens, asked, _RECORD, least=8, limit=64)
    first, second = rng.permutation(len(ATTRIBUTES))[:2].tolist()
    pairs = draw_pairs(rng, size, shared=setting.shared_words)
    if setting.shared_words:  # both attributes of about half of the pairs
        pairs = pairs[: (size + 1) // 2]
        keys = [(ATTRIBUTES[a], pair) for pair in pairs for a in (first, second)][:size]
    else:
        keys = [(ATTRIBUTES[first], pair) for pair in pairs]
    records = [(*key, value) for key, value in zip(keys, draw_numbers(rng, size), strict=True)]
    turns = [_lookup(*records[i]) for i in rng.permutation(size)[:count]]
    return finish(rng, "multi_key", tokens, [_record(*r) for r in records], turns, pairs)


def multi_query(rng: np.random.Generator, setting: Setting) -> Example:
    """T3: one question asks for four records (two in short documents); the answer lists them.

    Each item of an answer names its key before the value, so what is tested is that all of the
    records are still there, not that a small model can count its own items.
    """
    tokens = begin(rng, setting)
    at_once = 4 if tokens >= 200 else 2
    turn = 8 + 13 * at_once
    count = most(tokens, setting, turn)
    asked = turns_tokens(count, turn)
    size = fitting(rng, tokens, asked, _RECORD, least=at_once, limit=64)
    attribute = ATTRIBUTES[rng.integers(len(ATTRIBUTES))]
    pairs, values = draw_pairs(rng, size, shared=setting.shared_words), draw_numbers(rng, size)
    turns: dict[str, str] = {}
    while len(turns) < count:  # a question may be drawn twice
        chosen = rng.permutation(size)[:at_once].tolist()
        names = [f"the {pairs[i]}" for i in chosen]
        question = f"What are the {attribute}s of {', '.join(names[:-1])} and {names[-1]}?"
        answer = ", ".join(f"the {pairs[i]} {values[i]}" for i in chosen)
        turns[question] = "T" + answer[1:]
    facts = [_record(attribute, *item) for item in zip(pairs, values, strict=True)]
    return finish(rng, "multi_query", tokens, facts, list(turns.items()), pairs)


def multi_value(rng: np.random.Generator, setting: Setting) -> Example:
    """T3: keys with three values each, far apart; one question asks for all three."""
    tokens = begin(rng, setting)
    count = most(tokens, setting, 30)
    size = fitting(rng, tokens, turns_tokens(count, 30), 3 * 14, least=count, limit=24)
    pairs = draw_pairs(rng, size, shared=setting.shared_words)
    attribute = ATTRIBUTES[rng.integers(len(ATTRIBUTES))]
    numbers = iter(draw_numbers(rng, 3 * size))
    values = {pair: [next(numbers) for _ in range(3)] for pair in pairs}
    facts = [
        f"The {ordinal} {attribute} of the {pair} is {value}."
        for pair, three in values.items()
        for ordinal, value in zip(("first", "second", "third"), three, strict=True)
    ]
    turns = []
    for i in rng.permutation(size)[:count]:
        answer = "First {}, second {}, third {}".format(*values[pairs[i]])
        turns.append((f"What are the three {attribute}s of the {pairs[i]}?", answer))
    return finish(rng, "multi_value", tokens, facts, turns, pairs)


def mixed(rng: np.random.Generator, setting: Setting) -> Example:
    """T8: one document of codes, homes and companions; each question is of any kind.

    The same animals have all three, so the kind of the question decides.
    """
    tokens = begin(rng, setting)
    count = most(tokens, setting, _LOOKUP)
    least = max(2, count // 3)
    size = fitting(rng, tokens, turns_tokens(count, _LOOKUP), 30, least=least, limit=32)
    pairs = draw_pairs(rng, size, shared=setting.shared_words)
    items: list[tuple[str, tuple[str, str]]] = []
    numbers, gates = draw_numbers(rng, size), draw_gates(rng, size)
    friends = rng.permutation(size).tolist()
    for row, pair in enumerate(pairs):
        friend = pairs[friends[row]] if friends[row] != row else pairs[row - 1]
        items += [
            (_record("code", pair, numbers[row]), _lookup("code", pair, numbers[row])),
            (f"The {pair} lives at the {gates[row]}.",
             (f"Where does the {pair} live?", f"The {gates[row]}")),
            (f"The {pair} follows the {friend}.",
             (f"Whom does the {pair} follow?", f"The {friend}")),
        ]  # fmt: skip
    turns = [items[i][1] for i in rng.permutation(len(items))[:count]]
    return finish(rng, "mixed", tokens, [fact for fact, _ in items], turns, pairs)
