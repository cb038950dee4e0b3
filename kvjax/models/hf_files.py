"""The files of a Hugging Face checkpoint: JSON, and tensors in one or several safetensors files.

A safetensors file is 8 bytes (little-endian length of the header), a JSON header that gives each
tensor's dtype, shape and byte range, and the bytes. Everything that the headers can tell is
checked here before a tensor is read, so that a bad file ends in one line.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from kvjax.errors import InputError

__all__ = [
    "INDEX", "SINGLE", "Tensor", "bad_tensor", "check_folder", "file_tensors", "read_json",
    "read_tensors",
]  # fmt: skip

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "I32": 32, "U32": 32, "I64": 64, "U64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64,
}  # fmt: skip
_MAX_HEADER = 100_000_000  # bytes, the format's own limit


def check_folder(folder: str | Path) -> Path:
    """The folder as a path; InputError where it is none."""
    path = Path(folder)
    if not path.is_dir():
        problem = "is a file, not a folder" if path.exists() else "does not exist"
        raise InputError(
            f"{path}: {problem}; give the folder of a Hugging Face checkpoint "
            "(config.json, tokenizer.json, *.safetensors)"
        )
    return path


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; InputError names the file and the line."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; copy it from the checkpoint's origin") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text ({error}); download it again") from None
    except json.JSONDecodeError as error:
        where = f"{error.msg} in line {error.lineno}"
        raise InputError(f"{path}: not valid JSON ({where}); mend or download it again") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds no JSON object; download it again")
    return value


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint, by its header: nothing of it has been read."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        """A block of it, in the file's dtype; bfloat16 is that of ml_dtypes."""
        # Opened for every block: an open file keeps what was read of it mapped into memory.
        try:
            with safe_open(self.file, "np") as file:
                return file.get_slice(self.name)[index]
        except (OSError, SafetensorError) as error:
            raise bad_tensor(self.file, self.name, f"cannot be read ({error})") from None


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by name, its file's header checked.

    Raises:
        InputError: no file, a missing or truncated file, a header that does not hold together,
            or an index that disagrees with its files. The line names a file and a tensor.
    """
    if (folder / SINGLE).exists():
        return file_tensors(folder / SINGLE, "model.embed_tokens.weight")
    if not (folder / INDEX).exists():
        raise InputError(
            f"{folder}: neither {SINGLE} nor {INDEX}; weights in other formats must be "
            "converted to safetensors"
        )
    return _read_sharded(folder)


def _read_sharded(folder: Path) -> dict[str, Tensor]:
    index = folder / INDEX
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise InputError(f"{index}: 'weight_map' is no table of tensors; download it again")
    files: dict[str, str] = {}
    for name, file in places.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise InputError(
                f"{index}: tensor {name!r} lies in {file!r}, which is no name of a file in this "
                "folder; mend or download it again"
            )
        files.setdefault(file, name)
    tensors: dict[str, Tensor] = {}
    for file, name in files.items():
        tensors |= file_tensors(folder / file, name)
    for name, file in places.items():
        if name not in tensors or tensors[name].file.name != file:
            raise bad_tensor(folder / file, name, f"is missing, though {INDEX} places it there")
    return tensors


def bad_tensor(
    file: Path, name: str, problem: str, remedy: str = "download the file again"
) -> InputError:
    """The one line that names a file and a tensor."""
    return InputError(f"{file}: tensor {name!r} {' '.join(problem.split())}; {remedy}")


def file_tensors(file: Path, wanted: str) -> dict[str, Tensor]:
    """The tensors of one file by name; `wanted` is the one to name where none can be seen."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or (length <= _MAX_HEADER and 8 + length > size):
                problem = f"cannot be found: the file is truncated in its header, at byte {size}"
                raise bad_tensor(file, wanted, problem)
            raw = stream.read(length) if length <= _MAX_HEADER else b""
        entries = json.loads(raw)
        entries.pop("__metadata__", None)
        tensors = {name: _tensor(file, name, entry, size - 8 - length)
                   for name, entry in sorted(entries.items(), key=_offset)}  # fmt: skip
    except InputError:
        raise
    except FileNotFoundError:
        raise bad_tensor(file, wanted, "cannot be read: there is no such file") from None
    except OSError as error:
        raise bad_tensor(file, wanted, f"cannot be read ({error})") from None
    except (ValueError, AttributeError, KeyError, TypeError, IndexError):
        raise bad_tensor(file, wanted, "cannot be read: this is no safetensors file") from None
    return tensors


def _offset(item: tuple[str, dict[str, Any]]) -> int:
    return int(item[1]["data_offsets"][0])


def _tensor(file: Path, name: str, entry: dict[str, Any], data_bytes: int) -> Tensor:
    """One entry of a header, its byte range held against its shape and the file's size."""
    begin, end = (int(offset) for offset in entry["data_offsets"])
    dtype, shape = str(entry["dtype"]), tuple(int(size) for size in entry["shape"])
    if end > data_bytes:
        problem = f"needs bytes up to {end} of the data, of which the file has {data_bytes}"
        raise bad_tensor(file, name, problem + ": the file is truncated")
    if dtype in _BITS and (end - begin) * 8 != math.prod(shape) * _BITS[dtype]:
        raise bad_tensor(
            file, name, f"has {end - begin} bytes, which {dtype}{list(shape)} does not fill"
        )
    return Tensor(name, file, dtype, shape)
