"""What stays of a cache: WindowKV, the known rivals, and the surgery that they share."""

from kvjax.select.adakv import AdaKV
from kvjax.select.budgets import Budget, parse_budget
from kvjax.select.chance import Oracle, RandomTokens, RandomWindows
from kvjax.select.chunkkv import ChunkKV
from kvjax.select.evict import Evicted, evict, pages_held
from kvjax.select.expected_attention import ExpectedAttention
from kvjax.select.h2o import H2O
from kvjax.select.keydiff import KeyDiff
from kvjax.select.knorm import Knorm
from kvjax.select.mpcache import MPCache, Read, calibrate_sharing, published_sharing
from kvjax.select.pyramidkv import PyramidKV
from kvjax.select.scorer import Scorer
from kvjax.select.snapkv import SnapKV
from kvjax.select.streaming import StreamingLLM
from kvjax.select.tova import TOVA
from kvjax.select.view import Observation, Policy, View
from kvjax.select.windowkv import WindowKV, calibrate_leaders

__all__ = [
    "H2O",
    "TOVA",
    "AdaKV",
    "Budget",
    "ChunkKV",
    "Evicted",
    "ExpectedAttention",
    "KeyDiff",
    "Knorm",
    "MPCache",
    "Observation",
    "Oracle",
    "Policy",
    "PyramidKV",
    "RandomTokens",
    "RandomWindows",
    "Read",
    "Scorer",
    "SnapKV",
    "StreamingLLM",
    "View",
    "WindowKV",
    "calibrate_leaders",
    "calibrate_sharing",
    "evict",
    "pages_held",
    "parse_budget",
    "published_sharing",
]
