"""Host planners: they decide, in plain Python and numpy, and emit arrays of fixed shapes."""

from kvjax.plan.first_come import FirstCome, Planned, Request, Sampled, Seat
from kvjax.plan.step import Bucket, Grid, StepPlan

__all__ = ["Bucket", "FirstCome", "Grid", "Planned", "Request", "Sampled", "Seat", "StepPlan"]
