"""The built-in model `video-tiny`: moving digits that go on for as long as is asked.

    kvjax train video --config video_tiny --out runs/video_tiny

Frames of 32 by 32 pixels without an autoencoder, 64 tokens each; 4.8 million parameters. On one
H200 295 s, 34 ms a step once it is compiled; the error of the data (`mse`, pixels from -1 to 1)
falls to 0.066 after 800 steps, 0.044 after 2400 and 0.037 in the end. With one given frame nobody
can know where a digit flies; that part stays.
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
        num_heads=3,
        chunk=8,
        max_prefix=9,
        learned_variance=False,
    ),
    steps=7000,
    batch_size=64,
    prediction="x0",
    x0_weight=5.0,
    prefix_step=50,
    test_prefix_step=-1,
    gates=1.0,
    adam_share=0.5,
    learning_rate=2e-3,
    step=StepOptions(compute_dtype="bfloat16", clip_norm=1.0, ema_decay=0.999),
    machine=Machine(workers=14),
    sampler=Sampler(kind="ddim", steps=8, prediction="x0", clip=1.0),
    weights="bfloat16",
    save_every=1750,
    log_every=100,
)
