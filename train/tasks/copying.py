"""T5, completion: the rest of a block of 32 tokens whose beginning is given."""

import numpy as np

from kvjax.train.tasks.example import Example, Setting, begin, finish, fitting, most, turns_tokens
from kvjax.train.tasks.words import draw_pairs

__all__ = ["completion"]

_ITEMS = 8
_BLOCK = 2 + 4 * _ITEMS
_GIVEN = 2
_TURN = 3 + 4 * _GIVEN + 4 * (_ITEMS - _GIVEN)  # and no comma before the answer


def completion(rng: np.random.Generator, setting: Setting) -> Example:
    """T5: blocks that list eight animals, and the first two of one, to be continued.

    No animal stands in two blocks, but its words do, and the noise speaks of the same animals.
    """
    tokens = begin(rng, setting)
    count = most(tokens, setting, _TURN)
    size = fitting(rng, tokens, turns_tokens(count, _TURN), _BLOCK, least=count, limit=16)
    pairs = draw_pairs(rng, _ITEMS * size, shared=setting.shared_words)
    blocks = [pairs[i * _ITEMS : (i + 1) * _ITEMS] for i in range(size)]
    turns = []
    for i in rng.permutation(size)[:count]:
        given, rest = blocks[i][:_GIVEN], blocks[i][_GIVEN:]
        turns.append((f"Continue: There came {_listed(given)},", _listed(rest)))
    facts = [f"There came {_listed(block)}." for block in blocks]
    return finish(rng, "completion", tokens, facts, turns, pairs)


def _listed(pairs: list[str]) -> str:
    return ", ".join(f"the {pair}" for pair in pairs)
