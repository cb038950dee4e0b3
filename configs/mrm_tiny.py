"""A small multifurcation reward model of a safety world.

kvjax train label-rewards --out runs/safety.npz
kvjax train label-rewards --out runs/safety_eval.npz --rows 1000 --seed 2
kvjax train mrm --config mrm_tiny --out runs/mrm_tiny

The training takes a minute or two on two CPU cores. It ends with an R² of 0.94 on answers that it
has not seen; the rewards are foretold to within 2.4, where one harm counts 4.
"""

from kvjax.models.decoder import DecoderConfig
from kvjax.train.mrm_config import MRMConfig

config: MRMConfig = MRMConfig(
    data="runs/safety.npz",
    eval_data="runs/safety_eval.npz",
    model=DecoderConfig(
        vocab_size=512, num_layers=2, embed_dim=64, mlp_dim=128, num_heads=4, num_kv_heads=2,
        head_dim=16, max_positions=64,
    ),
    full=True,
    steps=300,
    batch_size=64,
    learning_rate=3e-3,
    warmup_steps=100,
    save_every=100,
)  # fmt: skip
