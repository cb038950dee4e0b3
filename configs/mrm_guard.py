r"""The built-in model `guard-mrm`: what `guard-prm` would say of every token that could follow.

    kvjax train label-rewards --out runs/guard_texts.npz --rows 100000
    kvjax train label-rewards --reward runs/guard_prm/model --texts runs/guard_texts.npz \
        --out runs/guard_rewards.npz --batch 2000
    kvjax train mrm --config mrm_guard --out runs/mrm_guard

The texts have another mix of topics than prompts have, and only common synonyms. All of the judge
is trained on, not an adapter of rank 4: a judge this small has little to spare.
"""

from kvjax.train.lm_config import Machine
from kvjax.train.mrm_config import MRMConfig
from kvjax.train.step import StepOptions

config: MRMConfig = MRMConfig(
    data="runs/guard_rewards.npz",
    base="runs/guard_prm/model",
    full=True,
    steps=4000,
    batch_size=256,
    learning_rate=1e-3,
    warmup_steps=200,
    save_every=1000,
    step=StepOptions(compute_dtype="bfloat16", clip_norm=1.0, ema_decay=0.999),
    machine=Machine(workers=14),
)
