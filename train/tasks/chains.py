"""T4, variable tracking: chains of who follows whom, in any order, to a number at their end."""

import itertools

import numpy as np

from kvjax.train.tasks.example import Example, Setting, begin, finish, most, turns_tokens
from kvjax.train.tasks.words import draw_numbers, draw_pairs

__all__ = ["tracking"]

_LINK, _END = 8, 10  # tokens of "The red falcon follows the old heron." and "... holds 4719."
_MOST_HOPS = 4
_TURN = 10 + 4 * _MOST_HOPS + 5


def tracking(rng: np.random.Generator, setting: Setting) -> Example:
    """T4: the trail of an animal, one to four hops, all names on it and the number at its end.

    The answer goes hop by hop. Only the first link concerns the prompt's last queries: the others
    are looked for while the answer is written, when what was evicted is gone.
    """
    tokens = begin(rng, setting)
    hops_limit = _MOST_HOPS if tokens >= 200 else 2
    turn = _TURN - 4 * (_MOST_HOPS - hops_limit)
    count = most(tokens, setting, turn)
    room = tokens - 3 - turns_tokens(count, turn)
    # Enough links for the questions, then any share of the rest.
    room = int(rng.integers(min((_LINK + _END) * count, room), room, endpoint=True))
    lengths = []
    while not lengths or room >= _LINK * hops_limit + _END:
        lengths.append(int(rng.integers(1, hops_limit, endpoint=True)))
        room -= _LINK * lengths[-1] + _END
    pairs = draw_pairs(rng, sum(lengths) + len(lengths), shared=setting.shared_words)
    left, chains = iter(pairs), []
    for length, number in zip(lengths, draw_numbers(rng, len(lengths)), strict=True):
        chains.append(([next(left) for _ in range(length + 1)], number))
    facts = [f"The {a} follows the {b}." for c, _ in chains for a, b in itertools.pairwise(c)]
    facts += [f"The {chain[-1]} holds {number}." for chain, number in chains]
    starts = [(chain[i:], number) for chain, number in chains for i in range(len(chain) - 1)]
    turns = []
    for i in rng.permutation(len(starts))[:count]:
        chain, number = starts[i]
        trail = ", the ".join(chain[1:])
        question = f"Where does the trail of the {chain[0]} end?"
        turns.append((question, f"The {trail}, {number}"))
    return finish(rng, "tracking", tokens, facts, turns, pairs)
