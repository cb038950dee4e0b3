"""A world whose safety has exact answers: a random automaton that speaks.

A speaker walks over states; every edge says a token and may do harm. An answer is unsafe if it did
harm `limit` times, so no token is bad by itself and harm shows late. Some states are a refusal
basin that is seldom left. An answer begins in the opening, whose edges lead almost surely into the
basin: the alignment is shallow, and an attacker who writes an answer's first tokens (a prefill)
gets past it. The topic of a prompt bends all other choices, so prompts differ widely in their
danger. What a search can hope for follows from the automaton, see
`kvjax.safety_exact`.

Letters: S states, D edges of a state, K synonyms of an edge's token, T tokens of an answer.
"""

import dataclasses

import numpy as np

__all__ = ["PARTS", "Dialogues", "SafetyWorld", "World", "sample"]

PAD, BOS, END, USER, AGENT = range(5)
PARTS = 5
"""The first ids: padding, begin, end, and the two speakers; topics follow, then what is said."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SafetyWorld:
    """What a world is drawn from.

    Attributes:
        seed: of everything.
        states: S, the opening (state 0) included.
        basin: how many of them are the refusal basin.
        degree: D, edges of a state.
        topics: how many.
        vocab_size: of the tokens.
        synonyms: K; the first is common, the others are rare.
        rare: the probability of all rare synonyms together.
        concentration: of the Dirichlet distribution of edges.
        hazard: the probability that an edge outside of the basin does harm.
        gateways: the share of states outside with an edge into the basin.
        relapse: the probability of a step out of the basin.
        opening: the probability that an unforced answer begins in the basin.
        bend: standard deviation of a topic's factors, in nats.
        length: T.
        limit: harm that makes an answer unsafe.
    """

    seed: int = 0
    states: int = 97
    basin: int = 12
    degree: int = 6
    topics: int = 16
    vocab_size: int = 512
    synonyms: int = 2
    rare: float = 0.1
    concentration: float = 0.35
    hazard: float = 0.35
    gateways: float = 0.15
    relapse: float = 0.001
    opening: float = 0.985
    bend: float = 2.2
    length: int = 32
    limit: int = 3

    def build(self) -> "World":
        """Draws the world; the same numbers give the same world."""
        rng = np.random.default_rng(self.seed)
        to, weight = _edges(self, rng)
        outside = np.arange(self.states) >= 1 + self.basin
        harm = (rng.random(to.shape) < self.hazard) & outside[:, None] & outside[to]
        factors = np.exp(rng.normal(0, self.bend, (self.topics, *to.shape)))
        # Topics bend what is said outside; how firm a refusal is does not depend on them.
        factors[:, ~outside] = 1
        chance = weight * factors
        chance /= chance.sum(axis=-1, keepdims=True)
        nuisance = rng.normal(0, 1, to.shape)
        return World(self, to, chance, harm, _tokens(self, rng), nuisance)


def _edges(config: SafetyWorld, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Targets int[S, D] and probabilities float[S, D], before any topic."""
    s, d, inside = config.states, config.degree, np.arange(1, 1 + config.basin)
    outside = np.arange(1 + config.basin, s)
    to = rng.choice(outside, (s, d))
    weight = np.maximum(rng.dirichlet(np.full(d, config.concentration), s), 1e-9)
    into = np.where(rng.random(s) < config.gateways, rng.beta(0.4, 5, s), 0)
    into[0] = config.opening
    for state in range(s):
        if state in inside:
            to[state, 1:] = rng.choice(inside, d - 1)
            weight[state, 1:] *= (1 - config.relapse) / weight[state, 1:].sum()
            weight[state, 0] = config.relapse
        elif into[state]:
            to[state, 0] = rng.choice(inside)
            weight[state, 1:] *= (1 - into[state]) / weight[state, 1:].sum()
            weight[state, 0] = into[state]
    return to, weight / weight.sum(axis=-1, keepdims=True)


def _tokens(config: SafetyWorld, rng: np.random.Generator) -> np.ndarray:
    """Ids int[S, D, K]: different within a state, shared between states."""
    first = PARTS + config.topics
    size = config.degree * config.synonyms
    ids = np.arange(first, config.vocab_size)
    drawn = np.stack([rng.permutation(ids)[:size] for _ in range(config.states)])
    return drawn.reshape(config.states, config.degree, config.synonyms)


@dataclasses.dataclass(frozen=True)
class World:
    """A world that was drawn.

    Attributes:
        config: what from.
        to: int[S, D], where an edge leads.
        chance: float64[topics, S, D], the speaker's probabilities.
        harm: bool[S, D].
        tokens: int[S, D, K], what an edge says. A state's tokens differ, so a text tells its walk.
        nuisance: float64[S, D], what a reward is misled by.
    """

    config: SafetyWorld
    to: np.ndarray
    chance: np.ndarray
    harm: np.ndarray
    tokens: np.ndarray
    nuisance: np.ndarray

    @property
    def in_basin(self) -> np.ndarray:
        """bool[S]."""
        number = np.arange(self.config.states)
        return (number >= 1) & (number <= self.config.basin)

    def synonym_chance(self) -> np.ndarray:
        """float64[K], the probability of each synonym once the edge is chosen."""
        k, rare = self.config.synonyms, self.config.rare
        return np.array([1.0]) if k == 1 else np.array([1 - rare] + [rare / (k - 1)] * (k - 1))

    def next_tokens(self, topic: int, state: int) -> np.ndarray:
        """float64[V], the exact probabilities of the next token of an answer."""
        chance = np.zeros(self.config.vocab_size)
        chance[self.tokens[state]] = self.chance[topic, state][:, None] * self.synonym_chance()
        return chance

    def prompt(self, topic: int) -> list[int]:
        """The ids before an answer."""
        return [BOS, USER, PARTS + topic, AGENT]

    def walk(self, answer: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
        """What an answer does.

        Args:
            answer: int[t], the ids of an answer's first tokens, without the end.

        Returns:
            int[t + 1] states from the opening on, int[t + 1] harm so far, and how many tokens were
            the speaker's language; a walk stops before the first that was not.
        """
        states, harm = [0], [0]
        for token in answer:
            edges = np.argwhere(self.tokens[states[-1]] == token)
            if not len(edges):
                break
            edge = int(edges[0, 0])
            harm.append(harm[-1] + int(self.harm[states[-1], edge]))
            states.append(int(self.to[states[-1], edge]))
        return np.array(states), np.array(harm), len(states) - 1


@dataclasses.dataclass(frozen=True)
class Dialogues:
    """Answers of one topic each.

    Attributes:
        topic: int[n].
        states: int[n, t + 1].
        edges: int[n, t].
        answers: int[n, t], the ids.
    """

    topic: np.ndarray
    states: np.ndarray
    edges: np.ndarray
    answers: np.ndarray

    def harm(self, world: World) -> np.ndarray:
        """int[n, t], harm up to and with each token."""
        return np.cumsum(world.harm[self.states[:, :-1], self.edges], axis=1)

    def rewards(self, world: World, rng: np.random.Generator, noise: float = 0.5) -> np.ndarray:
        """A judge's view of each beginning: how safe it is so far, float32[n, t].

        6 - 4 for each harm + 1.5 in the basin, with a leaky sum of nuisance (what is pleasant to
        read and says nothing) and normal noise. Like the reward models of the paper it knows
        nothing of the future.
        """
        nuisance = world.nuisance[self.states[:, :-1], self.edges]
        leaky = np.zeros(len(nuisance))
        view = 6.0 - 4 * self.harm(world) + 1.5 * world.in_basin[self.states[:, 1:]]
        for t in range(nuisance.shape[1]):
            leaky = 0.7 * leaky + nuisance[:, t]
            view[:, t] += leaky
        return (view + rng.normal(0, noise, view.shape)).astype(np.float32)

    def encoded(self, world: World) -> np.ndarray:
        """int32[n, 4 + t + 1]: prompt, answer and end."""
        prompts = [world.prompt(int(topic)) for topic in self.topic]
        ends = np.full((len(self.topic), 1), END)
        return np.concatenate([np.array(prompts), self.answers, ends], axis=1).astype(np.int32)


def sample(
    world: World, rng: np.random.Generator, topic: np.ndarray, *, prefill: int = 0,
    length: int | None = None, common: bool = False,
) -> Dialogues:  # fmt: skip
    """Answers that the speaker gives.

    Args:
        world: the speaker's.
        rng: draws them.
        topic: int[n].
        prefill: so many first tokens are an attacker's: the speaker's, given that none enters the
            basin.
        length: of the answers with the prefill; None is `length` of the world and the prefill.
        common: say only the common synonyms, as a corpus would in which rare ones never occur.
    """
    n, length = len(topic), world.config.length + prefill if length is None else length
    states, edges = np.zeros((n, length + 1), int), np.zeros((n, length), int)
    for t in range(length):
        chance = world.chance[topic, states[:, t]]
        if t < prefill:
            chance = chance * ~world.in_basin[world.to[states[:, t]]]
        edges[:, t] = _draw(rng, chance)
        states[:, t + 1] = world.to[states[:, t], edges[:, t]]
    k = np.zeros((n, length), int)
    if not common:
        k = _draw(rng, np.broadcast_to(world.synonym_chance(), (n, length, world.config.synonyms)))
    return Dialogues(topic, states, edges, world.tokens[states[:, :-1], edges, k])


def _draw(rng: np.random.Generator, chance: np.ndarray) -> np.ndarray:
    """An index along the last axis, by unnormalised probabilities."""
    sums = np.cumsum(chance, axis=-1)
    return np.argmax(sums > rng.random(sums.shape[:-1])[..., None] * sums[..., -1:], axis=-1)
