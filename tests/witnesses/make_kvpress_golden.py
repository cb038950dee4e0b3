"""Makes tests/select/golden/kvpress.npz: what presses of kvpress keep of a random model's cache.

kvpress needs an older transformers than everything else here, so this runs by itself:

    python3.11 -m venv V && V/bin/pip install torch==2.13.0 kvpress==0.5.5 transformers==5.2.0
    V/bin/python tests/witnesses/make_kvpress_golden.py tests/select/golden/kvpress.npz
"""

import importlib.metadata
import json
import sys

import kvpress
import numpy as np
import torch
import transformers
from transformers.models.llama import modeling_llama

TOKENS, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 48, 4, 4, 2, 16


def make_model(attention):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM,
        max_position_embeddings=128, attn_implementation=attention,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.randn_like(weight) * 0.4 + ("norm" in name))
    return model


def presses(ratio):
    snap = {"compression_ratio": ratio, "window_size": 4}
    return {
        "streaming": kvpress.StreamingLLMPress(ratio, n_sink=4),
        "knorm": kvpress.KnormPress(ratio),
        "keydiff": kvpress.KeyDiffPress(ratio),
        "tova": kvpress.TOVAPress(ratio),
        "snapkv": kvpress.SnapKVPress(**snap),
        "pyramidkv": kvpress.PyramidKVPress(**snap, beta=3),
        "chunkkv": kvpress.ChunkKVPress(kvpress.SnapKVPress(**snap), chunk_length=8),
        "expected": kvpress.ExpectedAttentionPress(ratio),
        "adakv": kvpress.AdaKVPress(kvpress.SnapKVPress(**snap)),
        "h2o": kvpress.ObservedAttentionPress(ratio),
    }


def run(model, tokens, press=None):
    cache = transformers.DynamicCache()
    with torch.no_grad():
        if press is None:
            model(tokens, past_key_values=cache)
        else:
            with press(model):
                model(tokens, past_key_values=cache)
    return cache


def kept(model, full, cache):
    """bool[L, K, S]: which of the keys are still there."""
    found = np.zeros((LAYERS, KV_HEADS, TOKENS), bool)
    for layer in range(LAYERS):
        masked = getattr(model.model.layers[layer].self_attn, "masked_key_indices", None)
        for head in range(KV_HEADS):
            keys = cache.layers[layer].keys[0, head]
            same = (full.layers[layer].keys[0, head][:, None] == keys[None]).all(-1)
            found[layer, head] = same.any(1).numpy()
        if masked is not None:
            found[layer][masked[1].numpy(), masked[2].numpy()] = False
    return found


def main(path):
    queries = []
    original = modeling_llama.apply_rotary_pos_emb

    def record(q, k, *args, **kwargs):
        q, k = original(q, k, *args, **kwargs)
        queries.append(q[0].transpose(0, 1).numpy())
        return q, k

    # Each token once: no two keys of the first layer have the same norm.
    tokens = torch.randperm(64, generator=torch.Generator().manual_seed(1))[None, :TOKENS]
    model = make_model("sdpa")
    modeling_llama.apply_rotary_pos_emb = record
    full = run(model, tokens)
    modeling_llama.apply_rotary_pos_emb = original
    arrays = {
        "q": np.stack(queries),  # [L, S, H, D]
        "k": np.stack([layer.keys[0].numpy() for layer in full.layers]),  # [L, K, S, D]
        "v": np.stack([layer.values[0].numpy() for layer in full.layers]),
    }
    for ratio in (0.5, 0.75):
        for name, press in presses(ratio).items():
            used, whole = model, full
            if name == "h2o":  # needs the weights themselves, which rounds keys otherwise
                used = make_model("eager")
                whole = run(used, tokens)
            arrays[f"{name}/{ratio}"] = kept(used, whole, run(used, tokens, press))
            for layer in used.model.layers:
                layer.self_attn.masked_key_indices = None
    names = ("kvpress", "transformers", "torch")
    versions = {name: importlib.metadata.version(name) for name in names}
    np.savez_compressed(path, versions=json.dumps(versions), **arrays)
    print(versions, {name: array.shape for name, array in arrays.items()})


if __name__ == "__main__":
    main(sys.argv[1])
