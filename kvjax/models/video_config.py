"""Sizes and switches of a video diffusion transformer."""

import dataclasses

from kvjax.cache.frames import FrameRingConfig
from kvjax.errors import InputError

__all__ = ["VIDEO_DIT_SIZES", "VideoDiTConfig"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoDiTConfig:
    """Sizes and switches of a `VideoDiT`.

    Attributes:
        height, width, channels: of the latents (or pixels) of a frame.
        patch: side of the square that becomes one token; it divides height and width.
        num_layers, embed_dim, num_heads: of the transformer.
        mlp_ratio: width of the MLP over embed_dim.
        chunk: frames that are denoised at a time.
        max_prefix: frames that the cache holds, at most. 1 + n * chunk is what training sees.
        prefix_attention: how the spatial attention of a noisy frame sees the last clean ones.
            "paper": their tokens are among its keys. "code": a layer of its own behind it, with
            their tokens alone, as the authors released it. "none".
        prefix_frames: how many clean frames that are.
        positions: "cyclic" (rows of a table of max_prefix + chunk, taken in turn) or "rope".
        temporal: "causal"; "partial": a noisy frame sees all of its chunk; "full": everything sees
            everything, and nothing can be cached (the baselines).
        mask_channel: whether the first temporal attention is told which frames are clean.
        sink_frames: first frames that stay in the cache for good.
        text_dim: size of a text token's embedding; 0: no text.
        text_tokens: tokens of the text that stands for "no text".
        learned_variance: whether there is a second output, the variance's place between its bounds.
        dtype: of the parameters and of the computation.
    """

    height: int
    width: int
    channels: int = 4
    patch: int = 2
    num_layers: int
    embed_dim: int
    num_heads: int
    mlp_ratio: int = 4
    chunk: int = 8
    max_prefix: int = 25
    prefix_attention: str = "code"
    prefix_frames: int = 3
    positions: str = "cyclic"
    temporal: str = "causal"
    mask_channel: bool = True
    sink_frames: int = 0
    text_dim: int = 0
    text_tokens: int = 120
    learned_variance: bool = True
    dtype: str = "float32"

    def __post_init__(self) -> None:
        choices = {
            "prefix_attention": ("paper", "code", "none"),
            "positions": ("cyclic", "rope"),
            "temporal": ("causal", "partial", "full"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise InputError(f"{name} is {getattr(self, name)!r}: use one of {known}")
        if self.height % self.patch or self.width % self.patch:
            raise InputError(
                f"frames of {self.height} x {self.width} cannot be cut into patches of "
                f"{self.patch} x {self.patch}: use a patch that divides both"
            )
        if self.embed_dim % self.num_heads or self.embed_dim % 4:
            raise InputError(
                f"embed_dim {self.embed_dim} must be a multiple of 4 and of {self.num_heads} heads"
            )

    @property
    def num_places(self) -> int:
        """S: tokens of a frame."""
        return (self.height // self.patch) * (self.width // self.patch)

    @property
    def head_dim(self) -> int:
        """D."""
        return self.embed_dim // self.num_heads

    @property
    def table(self) -> int:
        """Rows of the cyclic position table: the longest window, and the longest training clip."""
        return self.max_prefix + self.chunk

    @property
    def out_channels(self) -> int:
        """Of the output: the prediction and, if it is learned, the variance."""
        return self.channels * (2 if self.learned_variance else 1)

    def ring(self, rows: int, dtype: str | None = None) -> FrameRingConfig:
        """The cache that fits this model; with guidance, two rows a video."""
        return FrameRingConfig(
            num_layers=self.num_layers, rows=rows, num_places=self.num_places,
            num_heads=self.num_heads, head_dim=self.head_dim, capacity=self.max_prefix,
            prefix_frames=0 if self.prefix_attention == "none" else self.prefix_frames,
            sink_frames=self.sink_frames, dtype=dtype or self.dtype,
        )  # fmt: skip


_XL = VideoDiTConfig(height=32, width=32, num_layers=28, embed_dim=1152, num_heads=16)

VIDEO_DIT_SIZES: dict[str, VideoDiTConfig] = {
    "XL/2": _XL,
    "B/2": dataclasses.replace(_XL, num_layers=14),
    "tiny": VideoDiTConfig(
        height=32, width=32, channels=1, patch=4, num_layers=6, embed_dim=192, num_heads=6
    ),
}
"""XL/2 and B/2 are the paper's, for frames of 256 pixels behind an autoencoder. tiny is for a CPU:
32 pixels and no autoencoder."""
