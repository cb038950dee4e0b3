"""WindowKV (Zuo et al. 2025, arXiv 2503.17922): whole windows, chosen once for a group of layers.

The last alpha queries score windows of consecutive tokens. The first layer of a group, or the one
that `leaders` names, scores; all layers of the group keep the windows that it chose and the last
alpha tokens. Where a window is a whole number of pages, that is surgery on the page table.

The paper and its code differ, and both can be had: `budgets`, `strategy`, `strict`. What goes
beyond them is an option by itself: `leaders`, `heads`, `kernel`, `overlap`, `distinct`,
`foresight`, `sink_windows`, `share_rest`, and `budgets="shares"`.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.errors import InputError
from kvjax.pallas_kernels.window_scores import summarize
from kvjax.select.budgets import code_budgets, paper_budgets, redistribute, share_out
from kvjax.select.keydiff import distinctness
from kvjax.select.pieces import keep_best, smooth
from kvjax.select.view import Policy, View, attention_received, by_kv_head

__all__ = ["WindowKV", "calibrate_leaders"]

Array = jax.Array

_LOWEST = -1e9  # worse than any token, and yet no -inf, which is never kept


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowKV(Policy):
    """Keeps the windows that the last queries attend to.

    Attributes:
        window: omega, tokens of a window.
        alpha: how many of the last queries score.
        last: how many of the last tokens always stay; they count in the budget. -1: alpha.
        group: gamma, layers that keep the same windows.
        leaders: which layer scores for each group; empty: the first of each. See
            `calibrate_leaders`.
        top: p, how many of a window's tokens its score is the mean of, where `strategy` wants
            that; 0: half of the window, as the released code.
        strategy: which rows' windows are scored by their `top` tokens instead of all: "paper":
            those of aggregation tasks; "demo": of localization tasks, as the released demo;
            "mean": none; "top": all. Rows of unknown task count as localization.
        budgets: of the groups: "code" or "paper" (see `kvjax.select.budgets`), "uniform", or
            "shares".
        shape: lambda, how steep "code" and "paper" are.
        shares: how groups and heads share the budget, [groups][K], or [groups][1] where heads are
            shared; in any unit. Calibration finds them (`kvjax.infer.evaluate_calibrate`).
        heads: "shared": all heads keep the same windows; "each": each KV head its own, which
            needs pages of one head.
        kernel: tokens over which attention is smoothed by its maximum before windows are scored,
            odd; 1: not.
        overlap: windows also begin at half a window, and half windows are kept.
        distinct: which part of what a head keeps is chosen by its keys alone, those least like the
            others (KeyDiff); for what later tokens look for, and the last queries do not.
        foresight: [L][K][D + 1], for the `distinct` part: the weights of a value, and a constant,
            whose sum is the log-odds that an answer will look at that token. Linear, as KVzap's
            smallest, and found by `kvjax.infer.evaluate_foresight`; empty: distinctness.
        sink_windows: how many of the first windows always stay.
        strict: never exceed the budget; False: keep a window that reaches beyond it, as the code.
        share_rest: what a group cannot use goes to the others.
        exact: the last alpha tokens stay and not a page more, and windows need not be whole
            pages; tokens are moved then.
    """

    window: int = 8
    alpha: int = 16
    last: int = -1
    group: int = 1
    leaders: tuple[int, ...] = ()
    top: int = 0
    strategy: str = "paper"
    budgets: str = "uniform"
    shape: int = 14
    shares: tuple[tuple[float, ...], ...] | Array = ()
    heads: str = "shared"
    kernel: int = 1
    overlap: bool = False
    distinct: float = 0.0
    foresight: tuple[tuple[tuple[float, ...], ...], ...] = ()
    sink_windows: int = 0
    strict: bool = True
    share_rest: bool = True
    exact: bool = False

    def __post_init__(self) -> None:
        choices = {
            "strategy": ("paper", "demo", "mean", "top"),
            "budgets": ("uniform", "code", "paper", "shares"),
            "heads": ("shared", "each"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"{name}={getattr(self, name)!r}: use one of {', '.join(allowed)}")
        if self.overlap and self.window % 2:
            raise InputError(f"overlapping windows of {self.window} tokens: take an even number")

    @property
    def observed(self) -> int:
        """Alpha queries."""
        return self.alpha

    @property
    def whole_pages(self) -> bool:
        """Unless tokens are moved."""
        return not self.exact

    @property
    def unit(self) -> int:
        """Tokens that are kept or dropped together."""
        return self.window // 2 if self.overlap else self.window

    def leader_layers(self, layers: int) -> tuple[int, ...]:
        """The layer that scores for each group.

        Raises:
            InputError: groups or leaders do not fit the number of layers.
        """
        if layers % self.group:
            raise InputError(f"groups of {self.group} layers do not divide {layers} layers")
        first = range(0, layers, self.group)
        for start, leader in zip(first, self.leaders, strict=False):
            if not start <= leader < start + self.group:
                raise InputError(f"layer {leader} cannot lead layers {start} on: it is not in them")
        if self.leaders and len(self.leaders) != len(first):
            raise InputError(f"{len(self.leaders)} leaders for {len(first)} groups: name one each")
        return self.leaders or tuple(first)

    def keep(self, view: View, tokens: Array) -> Array:
        """See `Policy.keep`."""
        if not self.exact and self.unit % view.page_size:
            raise InputError(
                f"{self.unit} tokens are kept together, pages have {view.page_size}: take whole "
                "pages, or exact=True"
            )
        leaders = jnp.asarray(self.leader_layers(view.shape[0]), jnp.int32)
        end, suffix = self._suffix(view, tokens)
        scores = self._scores(view, leaders, end)  # [groups, K or 1, B, U]
        count = self._counts(tokens, end, suffix)  # int32[groups, K or 1, B] units
        index = jnp.arange(scores.shape[-1], dtype=jnp.int32)[None, None, None]
        scores = jnp.where(index < self.sink_windows * (self.window // self.unit), jnp.inf, scores)
        some = index * self.unit < end[:: self.group, : scores.shape[1], :, None]
        scores = jnp.where(some, scores, -jnp.inf)
        distinct = (count.astype(jnp.float32) * self.distinct).astype(jnp.int32)
        kept = keep_best(scores, count - distinct)
        if self.distinct:
            others = jnp.where(some & ~kept, self._distinctness(view, leaders, end), -jnp.inf)
            kept = kept | keep_best(others, distinct)
        kept = jnp.repeat(jnp.repeat(kept, self.unit, axis=-1), self.group, axis=0)
        kept = jnp.broadcast_to(kept[..., : view.shape[3]], view.shape)
        whole = tokens[None, None] >= view.length  # a partly filled last page costs no more
        whole = whole & (self.share_rest or self.strict)
        return view.live & (kept | (view.slot >= jnp.where(whole, 0, end)[..., None]))

    def _suffix(self, view: View, tokens: Array) -> tuple[Array, Array]:
        """Where the suffix begins and what it costs, int32[L, K, B] each, in tokens."""
        length, size = view.length, view.page_size
        end = jnp.maximum(length - (self.alpha if self.last < 0 else self.last), 0)
        filled = length
        if not self.exact:
            end, filled = end // size * size, -(-length // size) * size
        if self.strict:
            # Where even the suffix is beyond the budget, its end stays.
            least = filled - tokens[None, None]
            end = jnp.maximum(end, least if self.exact else -(-least // size) * size)
        return end, filled - end

    def _scores(self, view: View, leaders: Array, end: Array) -> Array:
        """Scores of the units, float32[groups, K or 1, B, U]."""
        tops = {"mean": (None,), "top": (self._top,)}.get(self.strategy, (None, self._top))
        found = [self._windows(view, leaders, end, top) for top in tops]
        if len(found) == 1:
            return found[0]
        gathers = jnp.zeros(view.shape[2], jnp.int32) if view.task is None else view.task
        by_top = (gathers == 1) == (self.strategy == "paper")
        return jnp.where(by_top[None, None, :, None], found[1], found[0])

    @property
    def _top(self) -> int:
        return self.top or max(1, self.window // 2)

    def _windows(self, view: View, leaders: Array, end: Array, top: int | None) -> Array:
        _, r, c, _, _ = view.pool.k.shape
        group_end = end[::r, ::c]
        if self.kernel == 1 and not self.overlap:  # nothing between the kernel's sums and these
            scores = attention_received(
                view, leaders, self.alpha, group_end, window=self.window, top=top
            )
            return self._over_heads(view, scores)
        received = attention_received(view, leaders, self.alpha, group_end)
        received = smooth(received, self.kernel, "max")
        live = (
            view.slot
            < jnp.repeat(end[leaders], received.shape[1] // view.shape[1], axis=1)[..., None]
        )
        scores = summarize(received, live, self.window, top)
        if self.overlap:
            scores = self._half_windows(received, live, scores, top)
        return self._over_heads(view, scores)

    def _half_windows(self, received: Array, live: Array, scores: Array, top: int | None) -> Array:
        """A half window is worth the better of the two windows that it lies in."""
        front = [(0, 0)] * (received.ndim - 1) + [(self.unit, 0)]
        shifted = summarize(jnp.pad(received, front), jnp.pad(live, front), self.window, top)
        units = -(-received.shape[-1] // self.unit)
        own = jnp.repeat(scores, 2, axis=-1)[..., :units]
        return jnp.maximum(own, jnp.repeat(shifted, 2, axis=-1)[..., 1 : units + 1])

    def _over_heads(self, view: View, scores: Array) -> Array:
        return by_kv_head(scores, 1 if self.heads == "shared" else view.shape[1])

    def _distinctness(self, view: View, leaders: Array, end: Array) -> Array:
        """What the keys or values of each unit promise, float32[groups, K or 1, B, U]."""
        scores = self._foreseen(view, leaders) if self.foresight else distinctness(view, leaders)
        pad = [(0, 0)] * 3 + [(0, -scores.shape[-1] % self.unit)]
        scores = jnp.where(view.slot < end[leaders][..., None], scores, _LOWEST)
        scores = jnp.pad(scores, pad, constant_values=_LOWEST)
        units = jnp.max(scores.reshape(*scores.shape[:3], -1, self.unit), axis=-1)
        return self._over_heads(view, units)

    def _foreseen(self, view: View, leaders: Array) -> Array:
        """The attention that answers are expected to pay, up to a constant of each head's."""
        weights = jnp.asarray(self.foresight, jnp.float32)
        if weights.shape != (*view.shape[:2], view.pool.v.shape[-1] + 1):
            raise InputError(f"foresight of {weights.shape} for another model: calibrate it")

        def one(layer: Array) -> Array:
            own = weights[layer]
            found = jnp.einsum("kbsd,kd->kbs", view.values(layer), own[:, :-1], precision="highest")
            return found + own[:, -1, None, None]

        return jax.lax.map(one, leaders)

    def _counts(self, tokens: Array, end: Array, suffix: Array) -> Array:
        """How many units each group keeps, int32[groups, K or 1, B]."""
        heads = 1 if self.heads == "shared" else end.shape[1]
        review, suffix = (x[:: self.group, :heads] for x in (end, suffix))
        groups = review.shape[0]
        capacity = jnp.maximum(tokens[None, None] - suffix, 0)
        budget = jnp.maximum(self._budgets(capacity, groups), 0)
        if self.share_rest:
            weights = self._weights(groups, heads) if self.budgets == "shares" else None
            budget = _over_all(
                lambda b, limit: redistribute(b, limit, weights),
                budget, -(-review // self.unit) * self.unit,
            )  # fmt: skip
        if not self.strict:
            count = self._count_of_the_code(review, budget)
        elif self.share_rest:
            rounded = _over_all(lambda b: share_out(b, jnp.sum(b, axis=0), self.unit, (0,)), budget)
            count = rounded // self.unit
        else:
            count = budget // self.unit
        return jnp.where(budget >= review, -(-review // self.unit), count)

    def _budgets(self, capacity: Array, groups: int) -> Array:
        """Budgets of all groups and heads from the mean one, int32[groups, K or 1, B]."""
        mean = capacity[0]
        if self.budgets == "code":
            return jnp.stack(code_budgets(mean, self.group, groups, self.shape))
        if self.budgets == "paper":
            return jnp.stack(paper_budgets(mean, groups, self.shape))
        if self.budgets == "uniform":
            return capacity
        weights = self._weights(groups, capacity.shape[1])
        total = jnp.sum(capacity, axis=(0, 1)).astype(jnp.float32)
        return (weights.reshape(*capacity.shape[:2], 1) * total[None, None]).astype(jnp.int32)

    def _weights(self, groups: int, heads: int) -> Array:
        """The shares as parts of 1, float32[groups * K or 1, 1]."""
        if isinstance(self.shares, jax.Array):  # traced, while they are being calibrated
            return self.shares.reshape(-1, 1) / jnp.sum(self.shares)
        shares = np.asarray(self.shares, np.float32)
        if shares.shape != (groups, heads) or shares.min() < 0 or not shares.sum() > 0:
            raise InputError(
                f"shares of {shares.shape} for {groups} groups and {heads} heads: name one each, "
                "none below 0"
            )
        return jnp.asarray(shares.reshape(-1, 1) / shares.sum())

    def _count_of_the_code(self, review: Array, budget: Array) -> Array:
        """The released rule, which may exceed the budget by less than a window."""
        dropped = -(-(review - budget) // self.unit)
        kept = -(-review // self.unit) - dropped
        return jnp.where(dropped * self.unit >= review, 0, kept)


def _over_all(function: Callable[..., Array], *arrays: Array) -> Array:
    """Applies a function of [parts, B] to arrays [groups, heads, B]."""
    flat = (x.reshape(-1, x.shape[-1]) for x in arrays)
    return function(*flat).reshape(arrays[0].shape)


def calibrate_leaders(view: View, tokens: Array, policy: WindowKV) -> tuple[int, ...]:
    """For each group the layer whose windows hold most of the attention of all its layers.

    Call it outside of jit, on a few prompts like those to come: it needs no labels. A leader that
    does not retrieve costs more than everything else a selection may do wrong.

    Args:
        view: of the cache.
        tokens: int32[B], the budget to choose under.
        policy: whose leaders are wanted.
    """
    layers = view.shape[0]
    each = jnp.arange(layers, dtype=jnp.int32)
    _, r, c, _, _ = view.pool.k.shape
    end, _ = policy._suffix(view, tokens)
    received = attention_received(view, each, policy.alpha, end[::r, ::c])
    received = by_kv_head(received, view.shape[1])
    alone = dataclasses.replace(policy, group=1, leaders=(), budgets="uniform")
    kept = alone.keep(view, tokens)  # what each layer by itself would keep
    chosen = []
    for start in range(0, layers, policy.group):
        own = slice(start, start + policy.group)
        held = [
            float(jnp.sum(jnp.where(kept[layer][None], received[own], 0.0)))
            for layer in range(start, start + policy.group)
        ]
        chosen.append(start + max(range(policy.group), key=held.__getitem__))
    return tuple(chosen)
