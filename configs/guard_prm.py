"""The built-in model `guard-prm`: a judge of a safety world, a quarter of its speaker.

    kvjax train guard --config guard_prm --out runs/guard_prm

It is taught with noisy labels of 200,000 answers.
"""

from kvjax.models.decoder import DecoderConfig
from kvjax.train.guard_config import GuardConfig
from kvjax.train.lm_config import Machine
from kvjax.train.step import StepOptions

config: GuardConfig = GuardConfig(
    role="prm",
    model=DecoderConfig(
        vocab_size=512, num_layers=4, embed_dim=96, mlp_dim=256, num_heads=3, num_kv_heads=3,
        head_dim=32, max_positions=128, qk_norm=True,
    ),
    answers=200_000,
    seed=21,
    step=StepOptions(compute_dtype="bfloat16", clip_norm=1.0, ema_decay=0.999),
    machine=Machine(workers=14),
)  # fmt: skip
