"""Makes tests/select/golden/windowkv.npz: what the released WindowKV keeps of random layers.

Its selection needs PyTorch alone; the folder is a checkout of github.com/optim996/WindowKV at
7513467:

    V/bin/python tests/witnesses/make_windowkv_golden.py CHECKOUT tests/select/golden/windowkv.npz
"""

import json
import sys
import types

import numpy as np
import torch

LAYERS, GROUP, HEADS, KV_HEADS, HEAD_DIM = 8, 4, 4, 2, 8
# (strategy, tokens, window, alpha, capacity)
CASES = (
    ("average", 64, 4, 4, 20),
    ("max", 64, 4, 4, 20),
    ("average", 61, 8, 4, 24),
    ("max", 61, 8, 4, 24),
    ("average", 37, 8, 1, 9),
    ("max", 40, 4, 4, 64),
)


def main(checkout, path):
    arguments = types.ModuleType("args_demo")  # the original parses the command line here
    arguments.parse_args_func = lambda: None
    sys.modules["args_demo"] = arguments
    sys.path.insert(0, f"{checkout}/models")
    from compress_utils import WindowKVCluster

    arrays = {}
    for number, (strategy, tokens, window, alpha, capacity) in enumerate(CASES):
        rng = np.random.default_rng(number)
        q = 2 * rng.normal(size=(LAYERS, HEADS, tokens, HEAD_DIM)).astype(np.float32)
        k = rng.normal(size=(LAYERS, KV_HEADS, tokens, HEAD_DIM)).astype(np.float32)
        place = torch.arange(tokens)[:, None].expand(HEADS, tokens, 1)
        WindowKVCluster.layers_budget = WindowKVCluster.cached_selected_window_indices = None
        kept = np.zeros((LAYERS, tokens), bool)
        for layer in range(LAYERS):
            cluster = WindowKVCluster(
                LAYERS, layer, window, window // 2, GROUP, alpha, 14, capacity, "arithmetic",
                strategy,
            )  # fmt: skip
            keys = torch.tensor(k[layer]).repeat_interleave(HEADS // KV_HEADS, 0)[None]
            queries = torch.tensor(q[layer])[None]
            _, left = cluster.update_kv(keys, queries, place[None], None, HEADS // KV_HEADS)
            kept[layer, left[0, 0, :, 0].numpy()] = True
        arrays |= {f"{number}/q": q[:, :, -alpha:], f"{number}/k": k, f"{number}/kept": kept}
    cases = [[*case, LAYERS, GROUP] for case in CASES]
    about = {"windowkv": "7513467", "torch": torch.__version__, "cases": cases}
    np.savez_compressed(path, about=json.dumps(about), **arrays)
    print(about, [arrays[f"{i}/kept"].sum(1).tolist() for i in range(len(CASES))])


if __name__ == "__main__":
    main(*sys.argv[1:])
