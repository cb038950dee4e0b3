"""Texts with a reward for each of their beginnings: the file, and batches of it.

One .npz file (uncompressed, so that its arrays can be read from the disk a row at a time) holds

- tokens int32[n, T], padded at the end,
- prompt_len int32[n], how many of a row's tokens are the prompt,
- mask bool[n, T], whether a token has a reward,
- reward float32[n, T]: at j that of the text up to and with token j,
- seen bool[V], the tokens that stand where a mask is.

This is the form of the "token-level safety rewards" of Saffron-1 (arXiv 2506.06444, section 4.3).
"""

import dataclasses
import functools
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np

from kvjax.errors import InputError

__all__ = ["RewardBatch", "RewardFile", "make_batches", "write_rewards"]

_DTYPES = {"tokens": "int32", "prompt_len": "int32", "mask": "bool", "reward": "float32",
           "seen": "bool"}  # fmt: skip


class RewardBatch(NamedTuple):
    """Texts of one step.

    Attributes:
        tokens: int32[B, T].
        reward: float32[B, T], of the text up to and with each token.
        weights: float32[B, T], 1 where `reward` is to be learnt.
        drawn: int32[B, T], random tokens, for what the head "marginal" is pulled by.
    """

    tokens: np.ndarray
    reward: np.ndarray
    weights: np.ndarray
    drawn: np.ndarray


def write_rewards(
    path: Path, tokens: np.ndarray, prompt_len: np.ndarray, mask: np.ndarray, reward: np.ndarray,
    vocab_size: int,
) -> None:  # fmt: skip
    """Writes such a file whole or not at all; `seen` follows from the rest."""
    # A first token follows nothing, so nothing foretells it.
    mask = mask & (np.arange(tokens.shape[1])[None] > 0)
    seen = np.zeros(vocab_size, bool)
    seen[tokens[mask]] = True
    values = (tokens, prompt_len, mask, np.where(mask, reward, 0), seen)
    arrays = {name: x.astype(_DTYPES[name]) for name, x in zip(_DTYPES, values, strict=True)}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    with part.open("wb") as file:
        np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]
    part.replace(path)


@dataclasses.dataclass(frozen=True)
class RewardFile:
    """A file of rewards. It is pickled by its name, and mapped where it is used."""

    path: Path

    @functools.cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays, mapped from the disk.

        Raises:
            InputError: the file is missing, or not of this form.
        """
        try:
            arrays = {name: _mapped(self.path, name) for name in _DTYPES}
            shape = arrays["tokens"].shape
            dtypes = {name: str(x.dtype) for name, x in arrays.items()}
            same = arrays["mask"].shape == arrays["reward"].shape == shape
            if len(shape) != 2 or not same or dtypes != _DTYPES or not shape[0]:
                raise ValueError(f"arrays of {dtypes}, tokens of shape {shape}")
        except (OSError, ValueError, KeyError, zipfile.BadZipFile, struct.error) as error:
            raise InputError(
                f"{self.path}: no file of rewards ({' '.join(str(error).split())}): make one with "
                "`kvjax train label-rewards`"
            ) from None
        return arrays

    def __getstate__(self) -> dict[str, Path]:
        return {"path": self.path}

    def __len__(self) -> int:
        return len(self.arrays["tokens"])

    def __getitem__(self, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        """Tokens, rewards and mask [T] of a row, and the length of its prompt."""
        tokens, reward, mask = (np.array(self.arrays[n][row]) for n in ("tokens", "reward", "mask"))
        return tokens, reward, mask, int(self.arrays["prompt_len"][row])


def _mapped(path: Path, name: str) -> np.ndarray:
    """One array of an uncompressed .npz file, mapped: numpy itself would read it whole."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(f"{name}.npy")
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is compressed")
    with path.open("rb") as file:
        file.seek(info.header_offset + 26)  # a local header has two lengths there, then ends
        file.seek(sum(struct.unpack("<HH", file.read(4))), 1)
        np.lib.format.read_magic(file)
        shape, order, dtype = np.lib.format.read_array_header_1_0(file)
        if order or not dtype.isnative:
            raise ValueError(f"{name} is not in C order")
        return np.memmap(path, dtype, "r", file.tell(), shape)


@dataclasses.dataclass(frozen=True)
class _Prefixes:
    """Every supervised beginning as an example of its own, as the paper trains."""

    file: RewardFile

    @functools.cached_property
    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """Row and token of each example, int32[m] each."""
        rows, tokens = np.nonzero(self.file.arrays["mask"])
        return rows.astype(np.int32), tokens.astype(np.int32)

    def __getstate__(self) -> dict[str, RewardFile]:
        return {"file": self.file}

    def __len__(self) -> int:
        return len(self.places[0])

    def __getitem__(self, example: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        row, place = (int(x[example]) for x in self.places)
        tokens, reward, mask, prompt = self.file[row]
        number = np.arange(len(tokens))
        return np.where(number <= place, tokens, 0), reward, mask & (number == place), prompt


def make_batches(
    file: RewardFile, *, size: int, seed: int, scheme: str = "sequence", answers_only: bool = False
) -> Callable[[int], RewardBatch]:
    """The batch of each step by its number: all examples in random order, then again in another.

    Args:
        file: of the rewards.
        size: B.
        seed: of the order, and of the random tokens.
        scheme: "sequence": an example is a text, all its beginnings supervised in one pass;
            "prefix": an example is one beginning, as in the paper. The mean gradient over all
            examples is the same, the first costs a T-th.
        answers_only: leave out the rewards of the prompts' tokens.
    """
    source = file if scheme == "sequence" else _Prefixes(file)
    rows = grain.MapDataset.source(source).seed(seed).shuffle().repeat()  # pyright: ignore
    vocab_size = len(file.arrays["seen"])
    return _Batches(rows, size, seed, answers_only, vocab_size)


@dataclasses.dataclass(frozen=True)
class _Batches:
    """`make_batches`' result; a class, since functions inside functions cannot be pickled."""

    rows: grain.MapDataset[Any]
    size: int
    seed: int
    answers_only: bool
    vocab_size: int

    def __call__(self, step: int) -> RewardBatch:
        rows: Any = self.rows
        parts = [rows[step * self.size + i] for i in range(self.size)]
        tokens, reward, mask = (np.stack(x) for x in list(zip(*parts, strict=True))[:3])
        if self.answers_only:
            prompts = np.array([part[3] for part in parts])
            mask = mask & (np.arange(mask.shape[1])[None] >= prompts[:, None])
        rng = np.random.default_rng(np.random.SeedSequence((self.seed, step)))
        drawn = rng.integers(0, self.vocab_size, tokens.shape)
        weights = mask.astype(np.float32)
        return RewardBatch(tokens, reward, weights, drawn.astype(np.int32))
