"""Small random models for tests: every weight random, those that start at zero or one as well."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import nnx
from tokenizers import decoders, models, pre_tokenizers

from kvjax.infer import LLM
from kvjax.infer.engine import Engine
from kvjax.models import Decoder, DecoderConfig, causal_attend, hf

CONFIG = DecoderConfig(
    vocab_size=300,
    num_layers=3,
    embed_dim=48,
    mlp_dim=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_positions=256,
    qkv_bias=True,
    windows=(0, 24, 0),
)


def random_decoder(config=CONFIG, seed=0):
    """(graph, params) with norms around one, biases around zero, and logits of some spread."""
    graph, shapes = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        middle = 1.0 if "norm" in jax.tree_util.keystr(path) else 0.0
        return jnp.asarray(rng.normal(middle, 0.2, leaf.shape), leaf.dtype)

    return graph, jax.tree_util.tree_map_with_path(draw, shapes)


def dense_logits(graph, params, config=CONFIG):
    """A jitted oracle: logits float32[B, T, V] of whole sequences, without a cache."""

    @jax.jit
    def logits(tokens):
        decoder = nnx.merge(graph, params)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
        hidden, _ = decoder(tokens, positions, None, causal_attend(config.layer_windows()))
        return decoder.logits(hidden)

    return logits


def byte_tokenizer():
    """Token i is byte i; 256 ends a text."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {letter: i for i, letter in enumerate(sorted(alphabet))}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    return tokenizer


def save_model(folder: Path, config=CONFIG, seed=0):
    """A complete Hugging Face folder with random weights."""
    _, params = random_decoder(config, seed)
    hf.save(folder, config, params, dtype=config.dtype)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    settings = {
        "eos_token": "<|end|>",
        "chat_template": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return dataclasses.replace(config)


def lean_llm(folder: Path, **options):
    """A model behind an engine of two programs instead of many: two rows, chunks of 64 tokens."""
    llm = LLM.load(folder, max_rows=2, page_size=4, token_budget=64, **options)
    # Nothing is compiled yet, so that the shapes may still change.
    grid = dataclasses.replace(llm.engine.grid, row_buckets=(2,))
    llm.engine.grid = llm.engine.planner.grid = grid
    return llm


def with_grid(llm, num_pages=None, optimistic=False, **sizes):
    """The random model behind an engine with other shapes; fewer of them compile faster."""
    engine = llm.engine
    grid = dataclasses.replace(engine.grid, **sizes)
    num_pages = num_pages or engine.cache.num_pages
    graph, params = random_decoder()
    made = Engine(graph, params, engine.model, grid, num_pages, optimistic=optimistic)
    llm.engines = (made,)
    llm.engine.warm_up()
    return llm
