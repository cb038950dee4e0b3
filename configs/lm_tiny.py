"""placeholder docstring."""

from kvjax.models.decoder import DecoderConfig, Rope
from kvjax.train.lm_config import LMConfig, Stage
from kvjax.train.tasks import Difficulty

config = LMConfig(
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
    stages=(
        Stage(
            share=0.3, batch_size=32, length=112,
            difficulty=Difficulty(min_records=2, max_records=3, questions=3, shared_words=False),
        ),
        Stage(
            share=0.3, batch_size=16, length=256,
            difficulty=Difficulty(min_records=4, max_records=8, questions=8),
        ),
        Stage(
            share=0.4, batch_size=8, length=512,
            difficulty=Difficulty(min_records=8, max_records=24, questions=8),
        ),
    ),
    steps=3000,
    eval_difficulty=Difficulty(min_records=8, max_records=24),
)  # fmt: skip
