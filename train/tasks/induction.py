"""T7, few-shot induction: a rule that examples show, applied to a case that is not among them."""

import numpy as np

from kvjax.train.tasks.example import Example, Setting, begin, finish, fitting, most, turns_tokens
from kvjax.train.tasks.words import ADJECTIVES, NOUNS, draw_gates

__all__ = ["few_shot"]

_UNSEEN = 4  # adjectives of each noun that no example has
_SHOT, _TURN = 9, 10  # tokens of "The red falcon goes to the north gate.", and of a turn


def few_shot(rng: np.random.Generator, setting: Setting) -> Example:
    """T7: where animals go depends on their noun alone, whatever their adjective.

    Each noun has two examples or more; a question asks for one with an adjective that it was not
    seen with. Losing most of the examples should not matter.
    """
    tokens = begin(rng, setting)
    count = most(tokens, setting, _TURN)
    shots = fitting(rng, tokens, turns_tokens(count, _TURN), _SHOT, least=4, limit=108)
    classes = int(rng.integers(2, max(2, min(16, shots // 3)), endpoint=True))
    nouns = [NOUNS[i] for i in rng.permutation(len(NOUNS))[:classes]]
    goals = dict(zip(nouns, draw_gates(rng, classes), strict=True))
    # Two of each noun, then any.
    drawn = [*range(classes), *range(classes), *rng.integers(0, classes, shots).tolist()][:shots]
    places: dict[str, list[int]] = {noun: [] for noun in nouns}
    for i in drawn:
        places[nouns[i]].append(len(places[nouns[i]]))
    facts, pairs, unseen = [], [], []
    for noun, numbers in places.items():
        order = rng.permutation(len(ADJECTIVES)).tolist()
        unseen += [(ADJECTIVES[i], noun) for i in order[:_UNSEEN]]
        for i in numbers:
            # More examples than adjectives: some come twice.
            adjective = ADJECTIVES[order[_UNSEEN + i % (len(order) - _UNSEEN)]]
            pairs.append(f"{adjective} {noun}")
            facts.append(f"The {pairs[-1]} goes to the {goals[noun]}.")
    asked = [unseen[i] for i in rng.permutation(len(unseen))[:count]]
    turns = [(f"Where does the {a} {noun} go?", f"The {goals[noun]}") for a, noun in asked]
    return finish(rng, "few_shot", tokens, facts, turns, pairs)
