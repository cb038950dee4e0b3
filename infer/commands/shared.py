"""What several commands share: the options of a model, sizes in bytes, progress."""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar

import jax
import tyro
from tqdm import tqdm

from kvjax.errors import InputError
from kvjax.infer.llm import LLM

__all__ = ["ModelOptions", "parse_arguments", "parse_bytes", "parse_mesh", "warm_up"]

Options = TypeVar("Options")


def parse_arguments(options: type[Options], prog: str, argv: Sequence[str] | None) -> Options:
    """The options of a command, a dataclass, from its arguments; `--help` prints its docstrings."""
    return tyro.cli(options, prog=prog, args=argv, config=(tyro.conf.FlagCreatePairsOff,))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model, and how it is held."""

    model: Annotated[str, tyro.conf.arg(metavar="MODEL")] = "tiny"
    """A Hugging Face folder, a finished run of `kvjax train lm`, or a built-in model (tiny)."""
    dtype: Annotated[str | None, tyro.conf.arg(metavar="TYPE")] = None
    """float32 or bfloat16; by default as the weights are stored."""
    kv_memory: Annotated[str | None, tyro.conf.arg(metavar="SIZE")] = None
    """Memory for the KV cache, such as 512MiB or 2GiB; by default most of what the device has."""
    max_length: Annotated[int | None, tyro.conf.arg(metavar="TOKENS")] = None
    """The longest sequence in tokens, prompt and answer together."""
    mesh: Annotated[str | None, tyro.conf.arg(metavar="AXES")] = None
    """Devices to spread over, such as data=2,model=4: copies of the model, and parts of each. By
    default one device."""

    def load(self, max_rows: int, **options: Any) -> LLM:
        """The model with room for `max_rows` requests at a time; see `LLM.load` for the options."""
        for option, value in (("--max-length", self.max_length), ("--max-rows", max_rows)):
            if value is not None and value < 1:
                raise InputError(f"{option} must be 1 or more, not {value}")
        memory = None if self.kv_memory is None else parse_bytes(self.kv_memory)
        return LLM.load(
            self.model, dtype=self.dtype, kv_memory=memory, max_length=self.max_length,
            max_rows=max_rows, mesh=None if self.mesh is None else parse_mesh(self.mesh), **options,
        )  # fmt: skip


def parse_bytes(text: str) -> int:
    """Bytes of a size such as "2GiB", "500MB" or "1048576".

    >>> parse_bytes("2KiB"), parse_bytes("1.5 GB")
    (2048, 1500000000)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?))?B?\s*", text, re.IGNORECASE)
    if match is None:
        raise InputError(f"{text!r} is no size: write a number of bytes, or such as 512MiB or 2GiB")
    number, prefix, binary = match.groups()
    power = " KMGT".index(prefix.upper()) if prefix else 0
    return int(float(number) * (1024 if binary else 1000) ** power)


def parse_mesh(text: str) -> jax.sharding.Mesh:
    """A mesh of the first devices from its axes, such as "data=2,model=4"."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.strip().partition("=")
        if name not in ("data", "fsdp", "model") or name in sizes or not size.isdecimal():
            raise InputError(f"--mesh {text!r}: write axes of data, fsdp and model, as in data=2")
        sizes[name] = int(size)
    count = math.prod(sizes.values())
    if not 1 <= count <= jax.device_count():
        raise InputError(f"--mesh {text!r} is of {count} devices; there are {jax.device_count()}")
    auto = (jax.sharding.AxisType.Auto,) * len(sizes)
    devices = jax.devices()[:count]
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=auto, devices=devices)


def warm_up(llm: LLM) -> None:
    """Compiles the engine's programs behind a progress bar (on a terminal)."""
    with tqdm(desc="compiling", unit="program", disable=None, leave=False) as bar:
        llm.warm_up(_follow(bar))


def _follow(bar: tqdm) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    return progress
