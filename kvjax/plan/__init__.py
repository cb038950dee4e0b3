"""Host planners: they decide, in plain Python and numpy, and emit arrays of fixed shapes."""

from kvjax.plan.first_come import FirstCome, Planned, Request, Sampled, Seat
from kvjax.plan.group_order import Work, deal_groups
from kvjax.plan.prefix_groups import PrefixGroup, PrefixPlan, plan_prefixes
from kvjax.plan.server_policies import DualScan, PrefillFirst, SortedCome
from kvjax.plan.step import Bucket, Grid, StepPlan
from kvjax.plan.token_batches import TokenBatches

__all__ = [
    "Bucket",
    "DualScan",
    "FirstCome",
    "Grid",
    "Planned",
    "PrefillFirst",
    "PrefixGroup",
    "PrefixPlan",
    "Request",
    "Sampled",
    "Seat",
    "SortedCome",
    "StepPlan",
    "TokenBatches",
    "Work",
    "deal_groups",
    "plan_prefixes",
]
