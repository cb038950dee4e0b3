"""Makes tests/models/ca2vdm: tiny random models of CausalCache-VDM, and what they compute.

    git clone https://github.com/Dawn-LX/CausalCache-VDM && git -C CausalCache-VDM checkout ce3ab5f
    python tests/witnesses/make_ca2vdm.py CausalCache-VDM tests/models/ca2vdm

Run with torch 2.13.0 and einops 0.8.2, in an environment of its own. What the model does not need
on a CPU is replaced by empty modules, timm's MLP and flash attention by the same formulas; flash
attention's causal mask is aligned at the last query and key, as of flash-attn 2.1.
"""

import os
import sys
import types
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

os.environ |= {"IS_DEBUG": "1", "DEBUG_TURNOFF_XFORMERS": "1"}
SOURCE, FOLDER = Path(sys.argv[1]), Path(sys.argv[2])


def module(name, path=None, **content):
    made = types.ModuleType(name)
    made.__dict__.update(content)
    if path is not None:
        made.__path__ = [str(path)]
    sys.modules[name] = made


def flash_attn_func(q, k, v, dropout_p, softmax_scale, causal):
    score = torch.einsum("bihd,bjhd->bhij", q, k) * softmax_scale
    if causal:
        i, j = torch.arange(q.shape[1])[:, None], torch.arange(k.shape[1])[None]
        score = score.masked_fill(j > i + k.shape[1] - q.shape[1], -torch.inf)
    return torch.einsum("bhij,bjhd->bihd", score.softmax(-1), v)


class Mlp(torch.nn.Module):
    def __init__(self, in_features, hidden_features, act_layer, drop, out_features=None):
        super().__init__()
        self.fc1 = torch.nn.Linear(in_features, hidden_features)
        self.act = act_layer()
        self.fc2 = torch.nn.Linear(hidden_features, out_features or in_features)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Registry:
    def register_module(self, *_, **__):
        return lambda x: x


PACKAGES = (
    "acceleration", "models", "models.layers", "models.causal_stdit2", "utils", "schedulers",
)  # fmt: skip
for package in ("opensora", *(f"opensora.{name}" for name in PACKAGES)):
    module(package, SOURCE / package.replace(".", "/"))
module("opensora.registry", MODELS=Registry(), SCHEDULERS=Registry())
module("opensora.utils.ckpt_utils", load_checkpoint=None)
module("timm", SOURCE)
module("timm.models", SOURCE)
module("timm.models.layers", DropPath=torch.nn.Identity)
module("timm.models.vision_transformer", Mlp=Mlp)
module("flash_attn", flash_attn_func=flash_attn_func)
module("colossalai", SOURCE)
module("colossalai.utils", get_current_device=lambda: "cpu")
sys.path.insert(0, str(SOURCE))

from opensora.models.causal_stdit2.causal_stdit2 import CausalSTDiT2  # noqa: E402
from opensora.schedulers.iddpm import gaussian_diffusion as gd  # noqa: E402
from opensora.schedulers.iddpm.respace import SpacedDiffusion, space_timesteps  # noqa: E402

SIZES = {"input_size": (5, 8, 8), "hidden_size": 24, "depth": 3, "num_heads": 2, "max_tpe_len": 13}
MODELS = {
    "cyclic": {
        "relative_tpe_mode": "cyclic",
        "spatial_attn_enhance": "prev_frames_3",
        "temp_extra_in_channels": 1,
        "caption_channels": 10,
        "model_max_length": 5,
    },
    "rope": {"relative_tpe_mode": "rope", "caption_channels": 0},
}


def frames_last(x):
    return x.permute(0, 2, 3, 4, 1).numpy()


@torch.no_grad()
def run(name, options):
    torch.manual_seed(0)
    model = CausalSTDiT2(**SIZES, **options, enable_flashattn=True).eval()
    for p in model.parameters():  # also those that start as zero, so that none can be left out
        p.add_(torch.randn_like(p) * 0.1)
    text = torch.randn(1, 1, 5, 10) if options["caption_channels"] else None
    video, noisy = torch.randn(1, 4, 17, 8, 8), torch.randn(1, 4, 4, 8, 8)
    t = torch.tensor([500])
    arrays = {"video": frames_last(video), "noisy": frames_last(noisy)}
    if text is not None:
        arrays["text"] = text[:, 0].numpy()

    clean = torch.zeros(1, 1, 9, 1, 1)
    clean[:, :, :5] = 1
    times = torch.tensor([[0] * 5 + [500] * 4])
    joint = torch.cat([video[:, :, :5], noisy], dim=2)
    arrays["joint"] = frames_last(model(joint, times, text, None, clean, x_temporal_start=0))

    model.register_kv_cache(1, 9)
    model.write_latents_to_cache(video[:, :, :1], text, None)
    arrays["after_1"] = frames_last(model(noisy, t, text))
    for begin in (1, 5, 9, 13):
        model.write_latents_to_cache(video[:, :, begin : begin + 4], text, None)
        arrays[f"after_{begin + 4}"] = frames_last(model(noisy, t, text))
    # [L, B, F, S, 2 E], oldest frame first, of the last layer
    arrays["cache"] = model.cache_kv[-1].numpy()
    if hasattr(model, "spatial_ctx_kv"):
        arrays["prefix"] = model.spatial_ctx_kv[-1].numpy()
    dropped = ("pos_embed", "pos_embed_temporal")
    weights = {k: v.numpy() for k, v in model.state_dict().items() if k not in dropped}
    save_file(weights, FOLDER / f"{name}.safetensors")
    np.savez_compressed(FOLDER / f"{name}.npz", **arrays)


@torch.no_grad()
def diffusion():
    """The loss's terms, and steps of the sampler with 100 steps, of a made-up network's output."""
    torch.manual_seed(1)
    options = {
        "betas": gd.get_named_beta_schedule("linear", 1000),
        "model_mean_type": gd.ModelMeanType.EPSILON,
        "model_var_type": gd.ModelVarType.LEARNED_RANGE,
        "loss_type": gd.LossType.MSE,
        "device": "cpu",
    }
    whole = gd.GaussianDiffusion(**options)
    spaced = SpacedDiffusion(space_timesteps(1000, "100"), **options)
    x0, noise, out = (torch.randn(3, c, 2, 4, 4) for c in (4, 4, 8))
    # No wild guess: far in the tails float32 differences of the released code are rounding errors.
    out[:, :4] = noise + 0.2 * out[:, :4]
    t = torch.tensor([0, 400, 999])
    x = whole.q_sample(x0, t, noise)
    bound = whole._vb_terms_bpd_keep_dim(lambda *_, **__: out, x0, x, t, clip_denoised=False)
    step = torch.tensor([0, 40, 99])
    moved = spaced.p_mean_variance(lambda *_, **__: out, x, step, clip_denoised=False)
    arrays = {"x0": x0, "noise": noise, "out": out, "x": x, "bound": bound["output"],
              "mean": moved["mean"], "log_variance": moved["log_variance"]}  # fmt: skip
    found = {name: frames_last(array) for name, array in arrays.items()}
    np.savez_compressed(FOLDER / "diffusion.npz", **found)


FOLDER.mkdir(parents=True, exist_ok=True)
for name, options in MODELS.items():
    run(name, options)
diffusion()
