"""What a search by tokens is made of: its options, its models, and its compiled programs."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kvjax.cache import CacheConfig, KVPool, copy_pages
from kvjax.errors import InputError
from kvjax.infer.search.token_step import Candidates, Rows, bring, pick, sample_rows
from kvjax.models import hf
from kvjax.models.decoder import Decoder, DecoderConfig
from kvjax.models.mrm import MRM, load_mrm
from kvjax.models.reward import TokenReward, read_reward

__all__ = ["AGGREGATES", "TOKEN_METHODS", "Models", "Programs", "TokenOptions", "load_guard"]

Array = jax.Array
TOKEN_METHODS = (
    "saffron", "random", "shuffled", "none", "best-of-n", "rejection", "prm-beam", "deal", "args",
)  # fmt: skip
AGGREGATES = ("last", "min", "mean", "prm")
_BY_PRM = ("prm-beam", "deal", "args")
_SAMPLED = ("none", "best-of-n", "rejection")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenOptions:
    """How to search by tokens.

    Attributes:
        method: saffron ranks by the MRM; random and shuffled by noise and by its mixed-up rewards;
            none is one draw of the policy; best-of-n and rejection draw whole answers, which the
            PRM judges; prm-beam, deal and args judge children one by one with the PRM.
        width: N, open answers of a prompt; of rejection, the most draws.
        p: of the nucleus.
        mix: weight of the policy's log-probability beside the reward.
        max_tokens: of an answer.
        min_tokens: before which no answer ends.
        aggregate: by what of its edges' rewards the answer is chosen: last, min, mean; or prm, its
            judgement of the whole.
        children: K, how many of a node the PRM judges.
        suffix: tokens that a PRM wants behind each text it judges; they are computed each time.
        look_ahead: deal: greedy tokens before a child is judged.
        threshold: rejection: the reward from which on an answer is taken.
        seed: of all draws.
        page_size: tokens of a page; with 1 pages are the trie's nodes.
    """

    method: str = "saffron"
    width: int = 16
    p: float = 0.8
    mix: float = 0.0
    max_tokens: int = 32
    min_tokens: int = 16
    aggregate: str = "last"
    children: int = 4
    suffix: int = 0
    look_ahead: int = 4
    threshold: float = 0.0
    seed: int = 0
    page_size: int = 1

    def __post_init__(self) -> None:
        for name, known in (("method", TOKEN_METHODS), ("aggregate", AGGREGATES)):
            if getattr(self, name) not in known:
                raise InputError(
                    f"no {name} {getattr(self, name)!r}: use one of {', '.join(known)}"
                )
        for name in ("width", "max_tokens", "children", "page_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}: give 1 or more")
        if not 0 < self.p <= 1:
            raise InputError(f"p of the nucleus is {self.p}: give more than 0, at most 1")
        if self.by_prm and self.page_size > 1:
            raise InputError(f"{self.method} finds judged children by their pages: page_size 1")
        if min(self.suffix, self.look_ahead, self.min_tokens) < 0:
            raise InputError("suffix, look_ahead and min_tokens must be 0 or more")

    @property
    def sampled(self) -> bool:
        """Whether answers are drawn and not searched."""
        return self.method in _SAMPLED

    @property
    def by_prm(self) -> bool:
        """Whether children are judged by the PRM."""
        return self.method in _BY_PRM

    @property
    def judges_whole(self) -> bool:
        """Whether the PRM judges whole answers."""
        return self.method in ("best-of-n", "rejection") or self.aggregate == "prm"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Models:
    """The models of a search; all have one vocabulary.

    Attributes:
        policy: graph, parameters and sizes.
        mrm: model, parameters and bool[V] `seen`.
        prm: graph, parameters, sizes, and how it is read.
        ends: end tokens.
    """

    policy: tuple[nnx.GraphDef[Any], Any, DecoderConfig]
    mrm: tuple[MRM, Any, np.ndarray] | None = None
    prm: tuple[nnx.GraphDef[Any], Any, DecoderConfig, TokenReward] | None = None
    ends: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        size = self.policy[2].vocab_size
        for name, config in self.configs.items():
            if config.vocab_size != size:
                raise InputError(
                    f"the {name} rates {config.vocab_size} tokens, the policy has {size}: use "
                    "models with one tokenizer"
                )

    @property
    def configs(self) -> dict[str, DecoderConfig]:
        """The sizes by name."""
        found = {"policy": self.policy[2]}
        if self.mrm is not None:
            found["mrm"] = self.mrm[0].config
        return found if self.prm is None else {**found, "prm": self.prm[2]}

    def params(self) -> dict[str, Any]:
        """The parameters by name."""
        found = {"policy": self.policy[1]}
        if self.mrm is not None:
            found["mrm"] = self.mrm[1]
        return found if self.prm is None else {**found, "prm": self.prm[1]}

    def needed(self, options: TokenOptions, given: bool) -> tuple[str, ...]:
        """Names of the models that a method asks; no MRM where the rewards are given.

        Raises:
            InputError: one of them is not there.
        """
        names = ["policy"]
        names += ["mrm"] if options.method in ("saffron", "shuffled") and not given else []
        names += ["prm"] if options.by_prm or options.judges_whole else []
        missing = [name for name in names if name not in self.configs]
        if missing:
            raise InputError(
                f"{options.method} with aggregate {options.aggregate} asks a {missing[0]}: give one"
            )
        return tuple(names)


def load_guard(
    policy: Path, mrm: Path | None = None, prm: Path | None = None, *, ends: tuple[int, ...] = (),
    dtype: str | None = None,
) -> Models:  # fmt: skip
    """Loads the models of a search from their folders.

    Raises:
        InputError: a folder cannot be used, or its tokenizer is not the policy's.
    """
    for other in (mrm, prm):
        if other is not None:
            _check_tokenizers(policy, other)
    spoken = hf.load(policy, dtype=dtype)
    rated = None if mrm is None else load_mrm(mrm)
    judged = None if prm is None else (*hf.load(prm, dtype=dtype), read_reward(prm))
    return Models(policy=spoken, mrm=rated, prm=judged, ends=ends)


def _check_tokenizers(policy: Path, other: Path) -> None:
    texts = [folder / "tokenizer.json" for folder in (policy, other)]
    if all(path.is_file() for path in texts):
        vocabularies = [json_vocabulary(path) for path in texts]
        if vocabularies[0] != vocabularies[1]:
            raise InputError(
                f"{other} has another tokenizer than {policy}: a reward model rates the policy's "
                "token ids, so both must have the same"
            )


def json_vocabulary(path: Path) -> Mapping[str, int]:
    """Every token of a tokenizer.json and its id."""
    import tokenizers

    return tokenizers.Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)


class Programs:
    """The compiled programs of one search; shapes alone tell calls apart.

    Args:
        models: all of them.
        options: static.
        prompts: B, of a call.
        given: whether rewards come from outside.
    """

    def __init__(
        self, models: Models, options: TokenOptions, prompts: int, given: bool = False
    ) -> None:
        self.models: Models = models
        self.options: TokenOptions = options
        self.prompts: int = prompts
        self.names: tuple[str, ...] = models.needed(options, given)
        size = models.policy[2].vocab_size
        mrm = models.mrm if "mrm" in self.names else None
        self.seen: np.ndarray = np.ones(size, bool) if mrm is None else mrm[2]
        self.ends: np.ndarray = np.isin(np.arange(size), models.ends)
        order = np.arange(size)
        if options.method == "shuffled":
            order = np.random.default_rng(options.seed).permutation(size)
        self.order: np.ndarray = order
        donated = functools.partial(jax.jit, donate_argnums=1)
        self.expand: Callable[..., Any] = donated(self._expand)
        self.top: Callable[..., Any] = jax.jit(self._top, donate_argnums=1, static_argnums=3)
        self.score: Callable[..., Any] = donated(self._score)
        self.copy: Callable[..., Any] = jax.jit(_copy, donate_argnums=0)

    def pools(self, num_pages: int, pages_per_row: int) -> dict[str, KVPool]:
        """Empty pools of the models that the method asks, with the same pages."""
        return {
            name: self.cache_config(name, num_pages, pages_per_row).init()[0] for name in self.names
        }

    def cache_config(self, name: str, num_pages: int, pages_per_row: int) -> CacheConfig:
        """The sizes of a model's pages."""
        c = self.models.configs[name]
        return CacheConfig(
            num_pages=num_pages, page_size=self.options.page_size, num_layers=c.num_layers,
            num_kv_heads=c.num_kv_heads, head_dim=c.head_dim, max_rows=1,
            pages_per_row=pages_per_row, dtype=c.dtype,
        )  # fmt: skip

    def _logprob(
        self, params: Any, pools: dict[str, KVPool], rows: Rows
    ) -> tuple[dict[str, KVPool], Array]:
        decoder = nnx.merge(self.models.policy[0], params["policy"])
        last = jnp.maximum(rows.count - 1, 0)
        pool, hidden = bring(decoder, pools["policy"], rows, last, self.options.page_size)
        return {**pools, "policy": pool}, jax.nn.log_softmax(decoder.logits(hidden), axis=-1)

    def _expand(
        self, params: Any, pools: dict[str, KVPool], rows: Rows, own: Array, keys: Array,
        may_end: Array, given: Array | None,
    ) -> tuple[dict[str, KVPool], Candidates]:  # fmt: skip
        """The candidates of B prompts, whose nodes are R / B rows each."""
        b, o = self.prompts, self.options
        pools, logprob = self._logprob(params, pools, rows)
        live = (rows.count > 0).reshape(b, -1)
        cube = logprob.reshape(b, -1, logprob.shape[-1])
        ends = jnp.asarray(self.ends)
        if o.sampled:
            drawn = sample_rows(cube, live, ends, keys, width=o.width, may_end=may_end)
            return pools, drawn
        reward = given
        if reward is None:
            assert self.models.mrm is not None
            mrm = self.models.mrm[0]
            decoder = mrm.decoder(params["mrm"])
            last = jnp.maximum(rows.count - 1, 0)
            pool, hidden = bring(decoder, pools["mrm"], rows, last, o.page_size)
            pools = {**pools, "mrm": pool}
            reward = mrm.rewards(decoder, params["mrm"]["head"], hidden)
        reward = reward[:, jnp.asarray(self.order)].reshape(cube.shape)
        best = pick(
            cube, reward, jnp.asarray(self.seen), ends, own, live, p=o.p, width=o.width, mix=o.mix,
            may_end=may_end,
        )  # fmt: skip
        return pools, best

    def _top(
        self, params: Any, pools: dict[str, KVPool], rows: Rows, width: int, may_end: Array
    ) -> tuple[dict[str, KVPool], Candidates]:
        """The likeliest tokens of each row's nucleus, [R, width]; each row is a prompt here."""
        pools, logprob = self._logprob(params, pools, rows)
        live = (rows.count > 0)[:, None]
        everything = jnp.ones(logprob.shape[-1], jnp.bool_)
        allowed = jnp.where(jnp.asarray(self.ends)[None] & ~may_end, -jnp.inf, logprob)
        cube = jax.nn.log_softmax(allowed, axis=-1)[:, None]
        best = pick(
            cube, cube, everything, ~everything, jnp.zeros(live.shape), live, p=self.options.p,
            width=width, mix=0.0, may_end=may_end,
        )  # fmt: skip
        return pools, best

    def _score(
        self, params: Any, pools: dict[str, KVPool], rows: Rows, place: Array
    ) -> tuple[dict[str, KVPool], Array]:
        """The PRM's rewards float32[R] of the texts that end at a place of each row."""
        assert self.models.prm is not None
        graph, _, _, reward = self.models.prm
        decoder: Decoder = nnx.merge(graph, params["prm"])
        pool, hidden = bring(decoder, pools["prm"], rows, place, self.options.page_size)
        table = decoder.embed[...] if decoder.head is None else decoder.head.kernel[...].T
        answer = (table[reward.good] - table[reward.bad]).astype(jnp.float32)
        margin = jnp.sum(hidden.astype(jnp.float32) * answer[None], axis=-1)
        return {**pools, "prm": pool}, margin


def _copy(pools: dict[str, KVPool], source: Array, target: Array) -> dict[str, KVPool]:
    return {name: copy_pages(pool, source, target) for name, pool in pools.items()}
