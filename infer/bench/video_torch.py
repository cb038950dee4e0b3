"""The peer of `kvjax bench video`: one denoising call of the same network in PyTorch.

Written as the authors of Ca2-VDM run theirs: bfloat16, flash attention by
`scaled_dot_product_attention`, keys and values of the clean frames cached and put before the new
ones in every call; parameters have the released names. It runs in a process of its own, started by
the benchmark with its options as JSON; the last line that it prints is its figures.
"""

import json
import sys
import time
from typing import Any

import numpy as np

from kvjax.infer.bench.video import BenchVideo
from kvjax.models.video_config import VideoDiTConfig
from kvjax.models.video_positions import frame_table, place_table

__all__ = ["make_network", "measure", "random_cache"]

_TIME_FEATURES = 256


def make_network(config: VideoDiTConfig) -> Any:
    """A `torch.nn.Module` with the sizes and the arithmetic of a causal `VideoDiT` without text.

    Its forward takes noisy frames [B, C, T, height, width], timesteps [B], the index of the first
    of the frames, and the cache: for each layer keys and values of the F clean frames, each
    [B * S, H, F, D], and those of the last clean frames for the attention to the prefix, each
    [B, H, P * S, D], or None. It returns [B, 2 C, T, height, width].
    """
    import torch  # pyright: ignore[reportMissingImports]
    import torch.nn.functional as F  # pyright: ignore[reportMissingImports]
    from torch import nn  # pyright: ignore[reportMissingImports]
    from torch.nn.attention.bias import (  # pyright: ignore[reportMissingImports]
        causal_lower_right,
    )

    c, e, heads, places = config, config.embed_dim, config.num_heads, config.num_places

    def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (e,), eps=1e-6) * (1 + scale) + shift

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.proj = nn.Linear(e, 3 * e), nn.Linear(e, e)

        def project(self, x: torch.Tensor) -> Any:
            """[N, L, E] as queries, keys and values, each [N, H, L, D]."""
            n, length = x.shape[:2]
            qkv = self.qkv(x).view(n, length, 3, heads, c.head_dim).permute(2, 0, 3, 1, 4)
            return qkv.unbind(0)

        def merge(self, x: torch.Tensor) -> torch.Tensor:
            return self.proj(x.transpose(1, 2).flatten(2))

    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(e, c.mlp_ratio * e), nn.Linear(c.mlp_ratio * e, e)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))

    class Block(nn.Module):
        def __init__(self, first: bool) -> None:
            super().__init__()
            self.attn, self.attn_temp, self.mlp = Attention(), Attention(), Mlp()
            self.attn_cf = Attention() if c.prefix_attention == "code" else None
            self.attn_temp_pre_merge = nn.Linear(e + 1, e) if first and c.mask_channel else None
            self.scale_shift_table = nn.Parameter(torch.randn(6, e) / e**0.5)

        def forward(
            self, x: torch.Tensor, time: torch.Tensor, rows: torch.Tensor | None, held: Any
        ) -> torch.Tensor:
            k, v, prefix_k, prefix_v = held
            b, frames = x.shape[0], x.shape[1] // places
            parts = (self.scale_shift_table + time.view(b, 6, e)).chunk(6, dim=1)
            shift1, scale1, gate1, shift2, scale2, gate2 = parts
            y = modulate(x, shift1, scale1).view(b * frames, places, e)
            y = F.scaled_dot_product_attention(*self.attn.project(y))
            x = x + gate1 * self.attn.merge(y).view(x.shape)
            if self.attn_cf is not None:
                q, _, _ = self.attn_cf.project(x)
                y = F.scaled_dot_product_attention(q, prefix_k, prefix_v)
                x = x + gate1 * self.attn_cf.merge(y)
            y = x.view(b, frames, places, e).transpose(1, 2).reshape(b * places, frames, e)
            if rows is not None:  # the first layer is told where and what the frames are
                y = y + rows
            if self.attn_temp_pre_merge is not None:
                y = self.attn_temp_pre_merge(F.pad(y, (0, 1)))
            q, new_k, new_v = self.attn_temp.project(y)
            keys, values = torch.cat([k, new_k], dim=2), torch.cat([v, new_v], dim=2)
            seen = causal_lower_right(frames, keys.shape[2])
            y = self.attn_temp.merge(F.scaled_dot_product_attention(q, keys, values, seen))
            y = y.view(b, places, frames, e).transpose(1, 2).reshape(x.shape)
            x = x + gate1 * y
            return x + gate2 * self.mlp(modulate(x, shift2, scale2))

    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            size = (1, c.patch, c.patch)
            self.proj = nn.Conv3d(c.channels, e, size, stride=size)

    class Times(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.Sequential(nn.Linear(_TIME_FEATURES, e), nn.SiLU(), nn.Linear(e, e))

    class Final(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(e, c.patch**2 * c.out_channels)
            self.scale_shift_table = nn.Parameter(torch.randn(2, e) / e**0.5)

    class PeerVideo(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x_embedder, self.t_embedder, self.final_layer = Patches(), Times(), Final()
            self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(e, 6 * e))
            self.blocks = nn.ModuleList(Block(i == 0) for i in range(c.num_layers))
            tables = {
                "places": place_table(c.height // c.patch, c.width // c.patch, e),
                "frames": frame_table(c.table, e),
                "waves": np.exp(-np.log(1e4) * np.arange(128) / 128).astype(np.float32),
            }
            for name, table in tables.items():
                self.register_buffer(name, torch.from_numpy(table), persistent=False)

        def forward(self, x: torch.Tensor, t: torch.Tensor, first: int, cache: Any) -> torch.Tensor:
            (b, _, frames), dtype = x.shape[:3], x.dtype
            tokens = self.x_embedder.proj(x).flatten(3).permute(0, 2, 3, 1)  # [B, T, S, E]
            tokens = (tokens + self.get_buffer("places").to(dtype)).flatten(1, 2)
            angle = t.float()[:, None] * self.get_buffer("waves").float()
            time = self.t_embedder.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1).to(dtype))
            six = self.t_block(time)
            turn = torch.arange(first, first + frames, device=x.device) % c.table
            rows = self.get_buffer("frames").to(dtype)[turn]
            for i, block in enumerate(self.blocks):
                tokens = block(tokens, six, rows if i == 0 else None, cache[i])
            table = self.final_layer.scale_shift_table + time[:, None]
            out = self.final_layer.linear(modulate(tokens, *table.chunk(2, dim=1)))
            up, across, p = c.height // c.patch, c.width // c.patch, c.patch
            out = out.view(b, frames, up, across, p, p, c.out_channels)
            return out.permute(0, 6, 1, 2, 4, 3, 5).reshape(b, -1, frames, c.height, c.width)

    return PeerVideo()


def random_cache(config: VideoDiTConfig, rows: int, frames: int, **kind: Any) -> list[Any]:
    """Keys and values of so many clean frames, see `make_network`; `kind`: dtype and device."""
    import torch  # pyright: ignore[reportMissingImports]

    c = config
    shape = (rows * c.num_places, c.num_heads, frames, c.head_dim)
    prefix = (rows, c.num_heads, c.prefix_frames * c.num_places, c.head_dim)
    shapes = (shape, shape, *((prefix, prefix) if c.prefix_attention == "code" else (None, None)))
    return [
        tuple(None if s is None else torch.randn(s, **kind) for s in shapes)
        for _ in range(c.num_layers)
    ]


def measure(options: BenchVideo, variant: str) -> dict[str, Any]:
    """Times denoising calls behind a full cache, on the CUDA device where there is one."""
    import torch  # pyright: ignore[reportMissingImports]

    config = options.config("ca2", variant)
    gpu = torch.cuda.is_available()
    kind: Any = {"dtype": getattr(torch, options.dtype), "device": "cuda" if gpu else "cpu"}
    torch.manual_seed(0)
    network = make_network(config).to(**kind).eval()
    call = torch.compile(network) if options.peer == "torch-compile" else network
    cache = random_cache(config, options.rows, config.max_prefix, **kind)
    shape = (options.rows, config.channels, config.chunk, config.height, config.width)
    x, t = torch.randn(shape, **kind), torch.full((options.rows,), 500, device=kind["device"])

    def run(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            call(x, t, config.max_prefix, cache)
        if gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    with torch.inference_mode():
        compiling = run(1)
        run(min(5, options.steps))
        seconds = run(options.steps)
    return {
        "framework": f"PyTorch {torch.__version__}",
        "peer": options.peer,
        "prefix_attention": variant,
        "call_ms": round(1e3 * seconds / options.steps, 3),
        "first_call_seconds": round(compiling, 1),
        "peak_bytes": torch.cuda.max_memory_allocated() if gpu else None,
    }


def _main() -> None:
    fields, chosen = json.loads(sys.argv[1]), sys.argv[2]
    print(json.dumps(measure(BenchVideo(**fields), chosen)))


if __name__ == "__main__":
    _main()
