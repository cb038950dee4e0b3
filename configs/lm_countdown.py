"""A player of the game Countdown, where the search for a solution begins.

    kvjax train lm --config lm_countdown --out runs/lm_countdown

5000 steps of 512 plays, each another one, made while they are needed by 14 processes. It learns to
play legally, and what to do with a target in sight; most plays still miss it. `exact_match` is
therefore next to nothing here: it asks for one of very many plays that solve a problem. What
counts is in `configs/prm_countdown.py`, which goes on from this run.
"""

from kvjax.models.decoder import DecoderConfig, Rope
from kvjax.train.lm_config import LMConfig, Machine, Stage
from kvjax.train.step import StepOptions
from kvjax.train.tasks import Mixture, Setting

# A setting's tokens say how long answers may be, a quarter of it and 32: a play has up to 96.
_GAME = Mixture(tasks=("countdown",), setting=Setting(tokens=320))

config: LMConfig = LMConfig(
    model=DecoderConfig(
        vocab_size=262,  # bytes and six special tokens: a letter is a token
        num_layers=4,
        embed_dim=256,
        mlp_dim=640,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        max_positions=160,
        rope=Rope(theta=10_000.0),
        qk_norm=True,
        tie_embeddings=True,
    ),
    stages=(Stage(share=1.0, batch_size=512, length=128, difficulty=_GAME),),
    steps=5000,
    learning_rate=3e-3,
    warmup_steps=100,
    step=StepOptions(compute_dtype="bfloat16", clip_norm=1.0, ema_decay=0.999),
    machine=Machine(workers=14),
    eval_difficulty=_GAME,
    save_every=1000,
    log_every=50,
)
