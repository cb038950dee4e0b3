"""The built-in model `tiny`: 0.66 million parameters that answer questions about records.

    kvjax train lm --config lm_tiny --out runs/lm_tiny

1200 steps, 3.5 million tokens with padding: 15 minutes of CPU time, 21 minutes on two cores that
other programs used too. Expected: exact_match 1.0, all of 256 fresh questions answered exactly.
"""

from kvjax.models.decoder import DecoderConfig, Rope
from kvjax.train.lm_config import LMConfig, Stage
from kvjax.train.tasks import Difficulty

config: LMConfig = LMConfig(
    model=DecoderConfig(
        vocab_size=512,
        num_layers=3,
        embed_dim=128,
        mlp_dim=256,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        max_positions=1024,
        rope=Rope(theta=1_000_000.0),
        qk_norm=True,
        tie_embeddings=True,
    ),
    # The first layer's window widens as documents grow (see Stage); the last stages have none.
    stages=(
        Stage(
            share=0.15, batch_size=12, length=128, first_window=8,
            difficulty=Difficulty(min_records=3, max_records=4, questions=4, shared_words=False),
        ),
        Stage(
            share=0.10, batch_size=12, length=208, first_window=12,
            difficulty=Difficulty(min_records=2, max_records=6, questions=6),
        ),
        Stage(
            share=0.15, batch_size=8, length=304, first_window=24,
            difficulty=Difficulty(min_records=4, max_records=10, questions=8),
        ),
        Stage(
            share=0.15, batch_size=8, length=400, first_window=64,
            difficulty=Difficulty(min_records=8, max_records=16, questions=8),
        ),
        Stage(
            share=0.25, batch_size=6, length=512,
            difficulty=Difficulty(min_records=12, max_records=24, questions=8),
        ),
        Stage(
            share=0.2, batch_size=4, length=1024,
            difficulty=Difficulty(min_records=24, max_records=56, questions=10),
        ),
    ),
    steps=1200,
    eval_difficulty=Difficulty(min_records=8, max_records=24),
)  # fmt: skip
