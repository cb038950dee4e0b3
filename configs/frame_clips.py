"""The features of 16 frames by which distributions of moving-digit videos are compared.

    kvjax train frame_features --config frame_clips --out runs/frame_clips

On digits that training has not seen: expected accuracy above 0.9, of ten yes or no a clip.
"""

from kvjax.train.frame_features import FrameFeaturesConfig
from kvjax.train.lm_config import Machine

config: FrameFeaturesConfig = FrameFeaturesConfig(
    network="clips",
    steps=2000,
    batch_size=256,
    machine=Machine(workers=12),
)
