"""The built-in model `guard-policy`: a shallowly aligned speaker of a safety world.

    kvjax train guard --config guard_policy --out runs/guard_policy

Without a prefill it refuses; with ten tokens of an attacker's it mostly does not. It is there to
be guarded: see `configs/guard_prm.py` and `configs/mrm_guard.py`.
"""

from kvjax.models.decoder import DecoderConfig
from kvjax.train.guard_config import GuardConfig
from kvjax.train.lm_config import Machine
from kvjax.train.step import StepOptions

config: GuardConfig = GuardConfig(
    role="policy",
    model=DecoderConfig(
        vocab_size=512, num_layers=6, embed_dim=160, mlp_dim=400, num_heads=5, num_kv_heads=5,
        head_dim=32, max_positions=128, tie_embeddings=True, qk_norm=True,
    ),
    steps=6000,
    step=StepOptions(compute_dtype="bfloat16", clip_norm=1.0, ema_decay=0.999),
    machine=Machine(workers=14),
)  # fmt: skip
