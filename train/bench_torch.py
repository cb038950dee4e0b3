"""The peer of `kvjax bench train`: the same model, batch and optimiser in PyTorch.

Written as PyTorch's users write it: float32 parameters under bfloat16 autocast, torch.compile,
scaled_dot_product_attention and fused AdamW. It runs in a process of its own, started by the
benchmark with its options as JSON; the last line that it prints is its figures.
"""

import json
import sys
import time
from typing import Any

import numpy as np

from kvjax.models.decoder import DecoderConfig
from kvjax.train.bench import (
    BETAS,
    CLIP_NORM,
    EPS,
    LEARNING_RATE,
    WEIGHT_DECAY,
    BenchOptions,
    batches,
    speed,
)
from kvjax.train.flops import peak_flops

__all__ = ["make_decoder", "measure"]


def make_decoder(config: DecoderConfig) -> Any:
    """A `torch.nn.Module` with the sizes, the arithmetic and the first spread of kvjax's decoder.

    Its forward takes inputs and targets int64[B, T] and returns the mean cross-entropy. Only what
    the benchmark's model has is here: no biases, windows or norms of queries and keys.
    """
    import torch  # pyright: ignore[reportMissingImports]
    import torch.nn.functional as F  # pyright: ignore[reportMissingImports]
    from torch import nn  # pyright: ignore[reportMissingImports]

    c, heads = config, config.num_heads
    angles = np.arange(c.max_positions)[:, None] * c.rope.inverse_frequencies(c.head_dim)[None]

    def linear(inputs: int, outputs: int) -> nn.Linear:
        layer = nn.Linear(inputs, outputs, bias=False)
        nn.init.normal_(layer.weight, std=inputs**-0.5)
        return layer

    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(c.embed_dim))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            wide = x.float()
            wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + c.norm_eps)
            return wide.to(x.dtype) * self.scale.to(x.dtype)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            e, f, inner = c.embed_dim, c.mlp_dim, heads * c.head_dim
            self.attn_norm, self.mlp_norm = Norm(), Norm()
            self.q, self.k, self.v = linear(e, inner), linear(e, inner), linear(e, inner)
            self.out = linear(inner, e)
            self.gate, self.up, self.down = linear(e, f), linear(e, f), linear(f, e)

        def forward(self, x: torch.Tensor, sin: torch.Tensor, cos: torch.Tensor) -> torch.Tensor:
            def rotate(y: torch.Tensor) -> torch.Tensor:
                y1, y2 = y.float().chunk(2, dim=-1)
                return torch.cat([y1 * cos - y2 * sin, y2 * cos + y1 * sin], dim=-1).to(y.dtype)

            shape = (x.shape[0], x.shape[1], heads, c.head_dim)
            y = self.attn_norm(x)
            q, k, v = (p(y).view(shape).transpose(1, 2) for p in (self.q, self.k, self.v))
            y = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
            x = x + self.out(y.transpose(1, 2).reshape((*shape[:2], -1)))
            y = self.mlp_norm(x)
            return x + self.down(F.silu(self.gate(y)) * self.up(y))

    class PeerDecoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(c.vocab_size, c.embed_dim)
            nn.init.normal_(self.embed.weight, std=c.embed_dim**-0.5)
            self.blocks = nn.ModuleList(Block() for _ in range(c.num_layers))
            self.norm, self.head = Norm(), linear(c.embed_dim, c.vocab_size)
            for name, values in (("sin", np.sin(angles)), ("cos", np.cos(angles))):
                self.register_buffer(name, torch.from_numpy(values.astype(np.float32)))

        def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            x = self.embed(inputs).to(torch.bfloat16)
            sin, cos = (self.get_buffer(name)[: x.shape[1]] for name in ("sin", "cos"))
            for block in self.blocks:
                x = block(x, sin, cos)
            logits = self.head(self.norm(x)).float()
            return F.cross_entropy(logits.view(-1, c.vocab_size), targets.reshape(-1))

    return PeerDecoder()


def measure(options: BenchOptions) -> dict[str, Any]:
    """Times PyTorch's step on the CUDA device, or on the CPU where there is none."""
    import torch  # pyright: ignore[reportMissingImports]

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = make_decoder(options.model()).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY,
        fused=True,
    )  # fmt: skip
    forward = torch.compile(model)

    def step(tokens: torch.Tensor) -> float:
        with torch.autocast(device, torch.bfloat16):
            loss = forward(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    data = [torch.from_numpy(x.astype(np.int64)).to(device) for x in batches(options, 4)]
    seconds, losses = [], []
    for number in range(options.warmup + options.steps):
        start = time.perf_counter()
        losses.append(step(data[number % len(data)]))
        seconds.append(time.perf_counter() - start)
    gpu = device == "cuda"
    return {
        "framework": f"PyTorch {torch.__version__}",
        "compile_seconds": round(seconds[0], 1),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if gpu else None,
        "loss": [round(losses[0], 4), round(losses[-1], 4)],
        **speed(
            options,
            seconds[options.warmup :],
            peak_flops(torch.cuda.get_device_name()) if gpu else None,
        ),
    }


if __name__ == "__main__":
    print(json.dumps(measure(BenchOptions(**json.loads(sys.argv[1])))))
