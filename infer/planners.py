"""The policies by which requests are planned, by name: ours, and those of others beside it."""

from typing import cast, get_args

from kvjax.cache import PageLedger
from kvjax.plan import DualScan, FirstCome, Grid, PrefillFirst, SortedCome, TokenBatches
from kvjax.plan.prefix_groups import Method

__all__ = ["PLANNED", "POLICIES", "make_planner"]

PLANNED: tuple[str, ...] = get_args(Method)
"""Policies that plan a batch as a whole."""
POLICIES: tuple[str, ...] = (
    *PLANNED, "sorted-lru", "fcfs-lru", "prefill-first", "dual-scan", "none",
)  # fmt: skip
"""All policies."""


def make_planner(
    policy: str, grid: Grid, ledger: PageLedger, *, by_ratio: bool = True,
    optimistic: bool = False, grouped: bool | None = None,
) -> FirstCome:  # fmt: skip
    """The planner of a policy.

    Args:
        policy: "multi", "exact", "lifting", "naive": the batch is planned, with what is shared as
            `plan_prefixes` says. "fcfs-lru": first come, first served, beginnings are found in the
            cache while they are there. "sorted-lru": the same, with the batch sorted by its tokens.
            "dual-scan": in BlendServe's order. "prefill-first": as SGLang, always optimistic.
            "none": first come, first served, nothing is shared.
        grid: the static sizes.
        ledger: the pages.
        by_ratio: of planned ones, see `TokenBatches`.
        optimistic: see `FirstCome`.
        grouped: whether pages that rows share are read once for all of them, if the grid has work
            items for it; None: if the batch is planned.

    Raises:
        ValueError: there is no such policy.
    """
    if policy not in POLICIES:
        raise ValueError(f"{policy=}: use one of {', '.join(POLICIES)}")
    grouped = policy in PLANNED if grouped is None else grouped
    if policy in PLANNED:
        method = cast(Method, policy)
        return TokenBatches(
            grid, ledger, method=method, by_ratio=by_ratio, optimistic=optimistic, grouped=grouped
        )  # fmt: skip
    if policy == "prefill-first":
        return PrefillFirst(grid, ledger, grouped=grouped)
    kind = {"sorted-lru": SortedCome, "dual-scan": DualScan}.get(policy, FirstCome)
    planner = kind(grid, ledger, optimistic=optimistic, grouped=grouped)
    planner.trie.share = policy != "none"
    return planner
