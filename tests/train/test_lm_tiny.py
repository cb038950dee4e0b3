"""The recipe of the built-in model: that its parts fit together."""

import math

import jax
import numpy as np
import pytest
from flax import nnx

from kvjax.models.decoder import Decoder
from kvjax.train.chat import train_tokenizer
from kvjax.train.lm_config import read_config
from kvjax.train.tasks import TASKS, Mixture

CONFIG = read_config("lm_tiny")


def test_the_table_holds_the_tokenizer_and_little_else():
    tokenizer = train_tokenizer(Mixture.corpus(), CONFIG.model.vocab_size)
    assert tokenizer.vocab_size == train_tokenizer(Mixture.corpus(), 2048).vocab_size
    assert CONFIG.model.vocab_size - 8 < tokenizer.vocab_size <= CONFIG.model.vocab_size


def test_the_model_takes_12_megabytes_in_float32():
    shapes = nnx.eval_shape(lambda: Decoder(CONFIG.model, rngs=nnx.Rngs(0)))
    parameters = sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(shapes)))
    assert 4 * parameters < 11_900_000
    assert CONFIG.model.head_dim == 64
    assert CONFIG.model.num_heads > CONFIG.model.num_kv_heads > 1


@pytest.mark.parametrize("stage", CONFIG.stages, ids=lambda stage: str(stage.length))
def test_every_task_is_in_every_stage_and_fits(stage):
    assert set(stage.difficulty.tasks) == set(TASKS)
    assert stage.difficulty.setting.tokens == stage.length
    assert stage.longest in (0, CONFIG.model.max_positions)


def test_documents_grow_to_the_training_length_with_as_many_tokens_a_step():
    lengths = [stage.length for stage in CONFIG.stages]
    assert lengths == sorted(lengths)
    assert lengths[-1] == 1024
    assert CONFIG.eval_difficulty.setting.tokens == 1024
    sizes = np.asarray([stage.length * stage.batch_size for stage in CONFIG.stages])
    assert sizes.max() / sizes.min() < 1.1
    assert CONFIG.seed != CONFIG.eval_seed
