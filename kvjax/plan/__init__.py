"""Host planners: they decide, in plain Python and numpy, and emit arrays of fixed shapes."""

from kvjax.plan.first_come import FirstCome, Planned, Request, Sampled, Seat
from kvjax.plan.prefix_groups import PrefixGroup, PrefixPlan, deal, plan_prefixes
from kvjax.plan.step import Bucket, Grid, StepPlan
from kvjax.plan.token_batches import TokenBatches

__all__ = [
    "Bucket",
    "FirstCome",
    "Grid",
    "Planned",
    "PrefixGroup",
    "PrefixPlan",
    "Request",
    "Sampled",
    "Seat",
    "StepPlan",
    "TokenBatches",
    "deal",
    "plan_prefixes",
]
