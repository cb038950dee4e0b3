"""The built-in model `tiny`: 2.9 million parameters that do the long-context tasks T1 to T8.

    kvjax train lm --config lm_tiny --out runs/lm_tiny

6000 steps of 131,072 tokens, 0.8 billion with padding, made while they are needed by 14 processes.
On one H200: 292 seconds, compilation of the five stages included; expected: exact_match 1.0 of 256.
`python -m kvjax.train.tasks.evaluate runs/lm_tiny/model` says how well each task went.
"""

from kvjax.models.decoder import DecoderConfig, Rope
from kvjax.train.lm_config import LMConfig, Machine, Stage
from kvjax.train.step import StepOptions
from kvjax.train.tasks import Mixture, Setting

# Every name once, and more of those whose answers are short or hard: a token of an answer weighs
# the same in every task.
_TASKS = (
    "passkey", "multi_key", "counting", "multi_query", "tracking", "few_shot",
    "multi_value", "counting", "completion", "mixed", "passkey", "counting",
)  # fmt: skip
_LONGEST = 2048  # the model knows positions up to here, by gaps


def _mixture(tokens: int, *, fill: float = 0.75, shared_words: bool = True) -> Mixture:
    setting = Setting(tokens=tokens, fill=fill, shared_words=shared_words)
    return Mixture(tasks=_TASKS, setting=setting)


config: LMConfig = LMConfig(
    model=DecoderConfig(
        vocab_size=624,
        num_layers=8,
        embed_dim=192,
        mlp_dim=352,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        max_positions=_LONGEST,
        rope=Rope(theta=1_000_000.0),
        qk_norm=True,
        tie_embeddings=True,
    ),
    # The first layer's window widens as documents grow (see Stage); the last stages have none.
    stages=(
        Stage(
            share=0.15, batch_size=768, length=160, first_window=8,
            difficulty=_mixture(160, shared_words=False),
        ),
        Stage(share=0.10, batch_size=512, length=256, first_window=16, difficulty=_mixture(256)),
        Stage(share=0.10, batch_size=320, length=384, first_window=64, difficulty=_mixture(384)),
        Stage(
            share=0.20, batch_size=256, length=512, longest=_LONGEST, difficulty=_mixture(512)
        ),
        Stage(
            share=0.45, batch_size=128, length=1024, longest=_LONGEST,
            difficulty=_mixture(1024, fill=0.11),  # short ones too, so that they are not forgotten
        ),
    ),
    steps=6000,
    learning_rate=4e-3,
    warmup_steps=100,
    step=StepOptions(compute_dtype="bfloat16", clip_norm=1.0, ema_decay=0.999),
    machine=Machine(workers=14),
    eval_difficulty=_mixture(1024),
    save_every=1000,
    log_every=50,
)  # fmt: skip
