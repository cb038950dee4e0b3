"""The built-in model `video-tiny`: moving digits that go on for as long as is asked.

    kvjax train video --config video_tiny --out runs/video_tiny

Frames of 32 by 32 pixels without an autoencoder, 64 tokens each; 4.8 million parameters. The
weights that come with kvjax are those of step 2100, after 215 s on an H200 that was shared with
another training (mse 0.064). That is too little: see their README.
"""

from kvjax.diffusion import Sampler
from kvjax.models.video_config import VideoDiTConfig
from kvjax.train.lm_config import Machine
from kvjax.train.step import StepOptions
from kvjax.train.video_config import VideoConfig

config: VideoConfig = VideoConfig(
    model=VideoDiTConfig(
        height=32,
        width=32,
        channels=1,
        patch=4,
        num_layers=6,
        embed_dim=192,
        num_heads=6,
        chunk=8,
        max_prefix=9,
        learned_variance=False,
    ),
    steps=2800,
    batch_size=64,
    prefix_per_row=True,
    prediction="v",
    prefix_step=50,
    learning_rate=2e-3,
    step=StepOptions(compute_dtype="bfloat16", clip_norm=1.0, ema_decay=0.999),
    machine=Machine(workers=14),
    sampler=Sampler(kind="ddim", steps=25, prediction="v", clip=1.0),
    weights="bfloat16",
    save_every=700,
    log_every=50,
)
