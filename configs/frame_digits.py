"""The digit classifier that judges videos of moving digits.

    kvjax train frame_features --config frame_digits --out runs/frame_digits

Of 297 digits that training has not seen, in crops with noise: expected accuracy above 0.95.
"""

from kvjax.train.frame_features import FrameFeaturesConfig

config: FrameFeaturesConfig = FrameFeaturesConfig(
    network="digits",
    steps=600,
    batch_size=256,
    save_every=100,
)
