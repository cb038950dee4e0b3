"""Trees of small arrays as one array, and back."""

import jax
import numpy as np

from kvjax.infer.words import from_words, to_words


def test_every_bit_comes_back():
    rng = np.random.default_rng(0)
    tree = {
        "ids": rng.integers(-(2**31), 2**31, (3, 4)).astype(np.int32),
        "seed": np.array([0, 1, 2**32 - 1], np.uint32),
        "flags": np.array([True, False]),
        "scalar": np.asarray(-7, np.int32),
        "odd": np.array([np.nan, -0.0, np.inf, 1e-40], np.float32),
        "strided": np.arange(12, dtype=np.float32).reshape(3, 4)[:, ::2],
        "none": np.zeros((0, 5), np.int32),
    }
    words = to_words(tree)
    assert words.dtype == np.int32 and words.shape == (12 + 3 + 2 + 1 + 4 + 6,)
    back = jax.jit(lambda words: from_words(tree, words))(words)
    for name, array in tree.items():
        assert back[name].dtype == array.dtype and back[name].shape == array.shape
        # As bytes: a NaN is to be the same NaN, and a zero's sign to stay.
        assert np.asarray(back[name]).tobytes() == array.tobytes()
