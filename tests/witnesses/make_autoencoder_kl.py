"""Makes tests/models/autoencoder_kl: a tiny random model of diffusers, and what it computes.

    python tests/witnesses/make_autoencoder_kl.py tests/models/autoencoder_kl

Run with diffusers 0.42.1 and torch 2.13.0, in an environment of its own.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

folder = Path(sys.argv[1])
torch.manual_seed(0)
vae = AutoencoderKL(
    block_out_channels=(4, 8, 8),
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
    layers_per_block=2,
    norm_num_groups=2,
    sample_size=32,
).eval()
for p in vae.parameters():  # biases and norms too, so that none can be forgotten unseen
    torch.nn.init.normal_(p, mean=0.0 if p.ndim > 1 else 0.5, std=0.25)
vae.save_pretrained(folder)
frames, latents = torch.rand(2, 3, 24, 16) * 2 - 1, torch.randn(2, 4, 6, 4)
with torch.no_grad():
    latent = vae.encode(frames).latent_dist
    arrays = {
        "frames": frames,
        "mean": 0.18215 * latent.mean,
        "std": 0.18215 * latent.std,
        "latents": latents,
        "decoded": vae.decode(latents / 0.18215).sample,
    }
np.savez_compressed(
    folder / "expected.npz", **{k: v.permute(0, 2, 3, 1).numpy() for k, v in arrays.items()}
)
