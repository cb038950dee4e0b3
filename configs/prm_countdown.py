"""The built-in model `countdown`: one network that plays Countdown and judges its own plays.

    kvjax train prm --config prm_countdown --policy runs/lm_countdown/model --out runs/prm_countdown

Two rounds of 300,000 plays of the policy's own, each labelled by whether it reached the target,
and of 2500 steps. It ends with how often the policy is right at temperature 1 and how well the
judge foretells that; `gates` says whether that is good enough to compare searches with.
"""

from kvjax.train.lm_config import Machine
from kvjax.train.prm_config import PRMConfig
from kvjax.train.step import StepOptions

config: PRMConfig = PRMConfig(
    policy="runs/lm_countdown/model",
    rollouts=300_000,
    steps=2500,
    step=StepOptions(compute_dtype="bfloat16", clip_norm=1.0, ema_decay=0.999),
    machine=Machine(workers=14),
)
