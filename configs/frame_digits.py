"""The digit classifier that judges videos of moving digits.

    kvjax train frame_features --config frame_digits --out runs/frame_digits

Of 297 digits that training has not seen, in crops with noise: expected accuracy above 0.95.
"""

from kvjax.train.frame_features import FrameFeaturesConfig
from kvjax.train.lm_config import Machine

config: FrameFeaturesConfig = FrameFeaturesConfig(
    network="digits",
    steps=1500,
    batch_size=512,
    machine=Machine(workers=8),
)
