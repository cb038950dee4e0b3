"""Runs the released MPCache on random tensors and keeps what it keeps and reads.

    git clone https://github.com/zwxandy/MPCache && git -C MPCache checkout 55e401b
    python tests/witnesses/make_mpcache_golden.py MPCache tests/select/golden/mpcache.npz

Needs torch and numpy only: what the released file imports beside them takes no part in the
selection, and is replaced by nothing. Its `forward` runs as it is, first for a prompt, then for one
token.
"""

import argparse
import json
import sys
import types
from pathlib import Path
from unittest import mock

import numpy as np
import torch

HEADS, DIM = 4, 8
# Least tokens of the prompt, data set (which sets the threshold), what of the tokens then read is
# beyond whole clusters of 32: what the released code does there is not all meant, so half of the
# cases have nothing there.
CASES = [(150, "triviaqa", 0), (300, "narrativeqa", 0), (320, "hotpotqa", 0),
         (200, "qasper", 16), (250, "triviaqa", 5), (240, "gov_report", 21)]  # fmt: skip


def load(folder: Path) -> types.ModuleType:
    """The released file, between stand-ins of what only its network needs."""
    stubs = ("transformers", "transformers.models", "transformers.models.llama", "einops",
             "transformers.models.llama.modeling_llama", "flash_attn",
             "flash_attn.flash_attn_interface", "flash_attn.bert_padding")  # fmt: skip
    modules = {name: mock.MagicMock() for name in stubs}
    llama = modules["transformers.models.llama.modeling_llama"]
    llama.apply_rotary_pos_emb = lambda q, k, *_: (q, k)
    sys.path.insert(0, str(folder))
    with mock.patch.dict(sys.modules, modules):
        import llama_flash_attn_monkey_patch_compression as released
    released.rearrange = lambda x, *_, **__: torch.zeros(1)
    return released


def run(released: types.ModuleType, q: torch.Tensor, k: torch.Tensor, data: str) -> tuple:
    """The prompt's tokens that stay, and bool[H, n] of them and the new token that are read."""
    layer = types.SimpleNamespace(
        num_heads=HEADS, head_dim=DIM, hidden_size=HEADS * DIM, rotary_emb=lambda *_, **__: (0, 0),
        o_proj=lambda x: x, v_proj=lambda x: x, q_proj=None, k_proj=None,
    )  # fmt: skip
    released.dataset = data
    past = None
    for first, end in ((0, len(q) - 1), (len(q) - 1, len(q))):
        layer.q_proj, layer.k_proj = (
            lambda _, f=first, e=end: q[f:e],
            lambda _, f=first, e=end: k[f:e],
        )
        hidden = k[first:end].reshape(1, end - first, HEADS * DIM)
        _, _, past = released.forward(
            layer, hidden, past_key_value=past, use_cache=True, layer_idx=5
        )
    return layer.ic_token_idx[:, 0].numpy(), (layer.attn_dynamic_mask[0, :, 0] == 0).numpy()


def search(released: types.ModuleType, n: int, data: str, rest: int) -> tuple:
    """The first prompt of n tokens or more of which so many stay as are wanted."""
    for length in range(n, n + 500):
        rng = np.random.default_rng(length)
        q, k = rng.normal(size=(2, length + 1, HEADS, DIM))
        k *= np.exp(0.8 * rng.normal(size=(length + 1, 1, 1)))  # many keys that nobody looks for
        q, k = (x.astype(np.float16).astype(np.float32) for x in (q, k))
        kept, read = run(released, torch.from_numpy(q), torch.from_numpy(k), data)
        if (len(kept) + 1) % 32 == rest:
            return q, k, kept, read
    raise SystemExit(f"no prompt from {n} tokens on: take others")


def main() -> None:
    """Writes the golden file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("released", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    released = load(args.released)
    about = {
        "code": "github.com/zwxandy/MPCache 55e401b17db3c47dd6920b9a92ad937c7e9bb452",
        "torch": torch.__version__, "numpy": np.__version__, "cases": CASES,
    }  # fmt: skip
    arrays = {"about": json.dumps(about)}
    for number, (n, data, rest) in enumerate(CASES):
        q, k, kept, read = search(released, n, data, rest)
        print(number, data, len(k), len(kept), read.sum(1))
        arrays |= {f"{number}/q": q.astype(np.float16), f"{number}/k": k.astype(np.float16),
                   f"{number}/kept": kept, f"{number}/read": read}  # fmt: skip
    np.savez_compressed(args.out, **arrays)


if __name__ == "__main__":
    main()
