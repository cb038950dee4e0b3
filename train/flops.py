"""Model FLOP utilisation: the arithmetic that a model asks for, by what the device could do.

Counted are the products of a training step, each multiplication and each addition once, as if
nothing were computed twice: rematerialisation lowers the utilisation. Of the attention a causal
model needs the half below the diagonal (or inside a window), and that is what counts. Figures that
count the whole square (Chowdhery et al. 2022) are higher.
"""

from kvjax.models.decoder import DecoderConfig
from kvjax.models.video_config import VideoDiTConfig

__all__ = [
    "PEAK_FLOPS", "decoder_step_flops", "matrix_parameters", "peak_flops", "video_step_flops",
]  # fmt: skip

PEAK_FLOPS: tuple[tuple[str, float], ...] = (
    ("NVIDIA H100 80GB HBM3", 783e12),
    ("NVIDIA H200", 783e12),
    ("NVIDIA A100", 312e12),
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5", 459e12),
    ("TPU v6 lite", 918e12),
    ("TPU7x", 1153.5e12),
)
"""Beginning of `device_kind` -> dense bfloat16 FLOP/s; the first that fits counts.

H100 and H200: the fastest matrix product measured; the data sheet's 989e12 is not reached. Others:
the data sheets' figures; a device of TPU7x is one of a chip's two cores.
"""


def peak_flops(device_kind: str) -> float | None:
    """FLOP/s that a device of a kind can do in bfloat16, or None where that is not known."""
    return next((peak for kind, peak in PEAK_FLOPS if device_kind.startswith(kind)), None)


def matrix_parameters(config: DecoderConfig) -> int:
    """How many parameters stand in matrix products, the output layer's included."""
    heads = 2 * config.num_heads + 2 * config.num_kv_heads
    layer = config.embed_dim * (heads * config.head_dim + 3 * config.mlp_dim)
    return config.num_layers * layer + config.vocab_size * config.embed_dim


def decoder_step_flops(
    config: DecoderConfig, rows: int, length: int, predicted: int | None = None
) -> float:
    """FLOPs of a training step on `rows` sequences of `length` tokens.

    That is 6 for each parameter in a product and token (2 forwards, 4 backwards), and 12 for each
    pair of a query and a key that it sees, head and channel.

    Args:
        config: of the decoder.
        rows: sequences.
        length: tokens of each.
        predicted: for how many tokens of each there are logits; None is all of them.
    """
    pairs = 0
    for window in config.windows or (0,) * config.num_layers:
        seen = min(window or length, length)  # by the last query; the first ones see fewer
        pairs += seen * (seen + 1) // 2 + (length - seen) * seen
    attention = 12 * config.num_heads * config.head_dim * pairs
    output = config.vocab_size * config.embed_dim
    layers = matrix_parameters(config) - output
    logits = output * (length if predicted is None else predicted)
    return float(rows * (6 * (layers * length + logits) + attention))


def video_step_flops(config: VideoDiTConfig, rows: int, frames: int) -> float:
    """FLOPs of a training step of a `VideoDiT` on `rows` clips of `frames` frames.

    Counted as for a decoder: products with the layers' parameters, and the pairs of a query and a
    key that it sees: in space all of its frame (and of the clean frames before), in time half of
    the square. Embeddings of timesteps, a few products a frame, are left out.
    """
    e, places = config.embed_dim, config.num_places
    separate = config.prefix_attention == "code"
    layer = e * e * (4 * (2 + separate) + 2 * config.mlp_ratio + (4 if config.text_dim else 0))
    patch = config.patch**2 * e * (config.channels + config.out_channels)
    prefix = 0 if config.prefix_attention == "none" else config.prefix_frames
    keys = places * (1 + prefix) + (frames + 1) / 2 + (config.text_tokens if config.text_dim else 0)
    tokens = rows * frames * places
    return float(6 * tokens * (config.num_layers * (layer + 2 * e * keys) + patch))
