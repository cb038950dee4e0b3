"""The file that a batch's answers are appended to: whole lines, each request's once.

Whoever has it open holds its lock, so that no second run writes to it. The lock is on the file
itself and ends with the process, however that ends.
"""

import dataclasses
import fcntl
import json
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from kvjax.errors import InputError

__all__ = ["BatchOutput", "open_output"]

_OURS = b'{"id": "batch_req_'  # how every line of an output begins
_SYNC_SECONDS = 1.0  # what a power cut may cost; a killed process loses nothing


@dataclasses.dataclass
class BatchOutput:
    """An open output, see `open_output`.

    Attributes:
        path: where it is.
        model: whose answers it holds.
        answered: the ids that it had answers for when it was opened.
    """

    path: Path
    model: str
    answered: frozenset[str]
    _fd: int
    _end: int  # of the last whole line
    _synced: float = dataclasses.field(default_factory=time.monotonic)

    def append(self, record: dict[str, Any]) -> None:
        """Writes a line.

        Raises:
            InputError: it could not be written; the file holds the whole lines before it.
        """
        line = _line(record)
        try:
            _write(self._fd, line)
        except BaseException as e:  # an interrupt may cut a line as well as a full disk
            with suppress(OSError):
                os.ftruncate(self._fd, self._end)
            if isinstance(e, OSError):
                raise self._failed(e) from e
            raise
        self._end += len(line)
        if time.monotonic() - self._synced >= _SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Has the system bring the lines to the disk.

        Raises:
            InputError: it could not.
        """
        try:
            if stat.S_ISREG(os.fstat(self._fd).st_mode):
                os.fsync(self._fd)
        except OSError as e:
            raise self._failed(e) from e
        self._synced = time.monotonic()

    def _failed(self, error: OSError) -> InputError:
        return InputError(
            f"{self.path}: {error.strerror}: the answers so far are kept; make room there and run "
            "it again to go on"
        )


@contextmanager
def open_output(path: Path, model: str) -> Iterator[BatchOutput]:
    """Opens an output, new or of an earlier run, for a model's answers.

    Answers that it holds are kept. Half a line and the errors of failed requests are removed, so
    that these are tried again. A device or a pipe is only written to.

    Raises:
        InputError: it cannot be written, another run is writing it, or it holds anything but this
            model's answers.
    """
    output = _open(path, model)
    try:
        yield output
        output.sync()
    finally:
        os.close(output._fd)


def _open(path: Path, model: str) -> BatchOutput:
    try:
        fd = _open_locked(path)
        try:
            answers, end = {}, 0
            if stat.S_ISREG(os.fstat(fd).st_mode):
                answers, end = _scan(path, fd, model)
                fd, end = _clean(path, fd, answers, end)
            return BatchOutput(path, model, frozenset(answers), fd, end)
        except BaseException:
            os.close(fd)
            raise
    except OSError as e:
        raise InputError(f"{path}: {e.strerror}: give a file that can be written") from e


def _open_locked(path: Path) -> int:
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                return fd
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Another run may have put a new file there before it let go of this one's lock.
            if os.path.samestat(os.fstat(fd), path.stat()):
                return fd
        except BlockingIOError:
            os.close(fd)
            raise InputError(
                f"{path}: another run is writing it: wait for its end, or give another output file"
            ) from None
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


Places = dict[str, tuple[int, int]]
"""Ids of answered requests -> where their lines begin and end."""


def _scan(path: Path, fd: int, model: str) -> tuple[Places, int]:
    """Where the answers are, and the end of the last whole line."""
    answers, start = Places(), 0
    with os.fdopen(os.dup(fd), "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                if not line.startswith(_OURS[: len(line)]):
                    raise _not_ours(path, number)
                break
            end = start + len(line)
            custom_id = _answered_id(path, number, line, model)
            if custom_id is not None:
                answers[custom_id] = start, end
            start = end
    return answers, start


def _answered_id(path: Path, number: int, line: bytes, model: str) -> str | None:
    """The id of an answered request, or None for one that failed."""
    try:
        record = json.loads(line)
        custom_id, response = record["custom_id"], record["response"]
        other = None if response is None else response["body"]["model"]
    except (ValueError, KeyError, TypeError):
        raise _not_ours(path, number) from None
    if other is not None and other != model:
        raise InputError(
            f"{path}: holds answers of model {other!r}, not {model!r}: "
            "give another output file or delete it"
        )
    return None if other is None else custom_id


def _not_ours(path: Path, line: int) -> InputError:
    return InputError(f"{path}: line {line} is no answer of a batch: give another output file")


def _clean(path: Path, fd: int, answers: Places, end: int) -> tuple[int, int]:
    """Leaves nothing but the answers; also the descriptor and the size of what is left."""
    kept = sum(stop - start for start, stop in answers.values())
    if kept == end:
        os.ftruncate(fd, end)
        return fd, end
    return _replace(path.resolve(), fd, answers), kept


def _replace(path: Path, fd: int, answers: Places) -> int:
    """Puts a file with some lines of the old one in its place, so that no moment loses any."""
    temporary = path.with_name(path.name + ".tmp")
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC
    new = os.open(temporary, flags, stat.S_IMODE(os.fstat(fd).st_mode))
    try:
        fcntl.flock(new, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for start, end in answers.values():
            _write(new, os.pread(fd, end - start, start))
        os.fsync(new)
        temporary.replace(path)
    except BaseException:
        os.close(new)
        with suppress(OSError):
            temporary.unlink()
        raise
    os.close(fd)
    return new


def _write(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


def _line(record: dict[str, Any]) -> bytes:
    try:
        return (json.dumps(record, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # a custom_id may hold half of a surrogate pair
        return (json.dumps(record) + "\n").encode()
