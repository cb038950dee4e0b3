"""The whole comparison on the built-in model: every policy, five budgets, both protocols.

    kvjax eval --suite tiny --out runs/eval_tiny --json

1000 prompts of each task and point; one prefill of a batch serves all policies.
"""

from kvjax.configs.task_prompts import make_prompts
from kvjax.infer.evaluate_policies import POLICIES
from kvjax.infer.evaluate_suite import Suite
from kvjax.train.tasks import TASKS

suite: Suite = Suite(
    make=make_prompts,
    tasks=tuple(TASKS),
    lengths=(1024,),
    prompts=1000,
    policies=tuple(POLICIES),
    budgets=("1/2", "1/4", "12%", "1/16", "1/32"),
    protocols=("A", "B"),
    rows=250,
)
