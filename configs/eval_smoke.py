"""A short evaluation, to see that all is well: 6 prompts of each task on the built-in model.

    kvjax eval --suite smoke --json

Under 3 minutes on two CPU cores, compilation included.
"""

from kvjax.configs.task_prompts import make_prompts
from kvjax.infer.evaluate_suite import Suite
from kvjax.train.tasks import TASKS

suite: Suite = Suite(
    make=make_prompts,
    tasks=tuple(TASKS),
    lengths=(1024,),
    prompts=6,
    policies=("full", "windowkv-paper", "windowkv-tiny", "snapkv", "streaming", "random-tokens"),
    budgets=("1/4", "12%"),
    rows=6,
)
