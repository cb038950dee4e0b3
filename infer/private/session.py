"""A private computation as plain data, and its parties as processes.

`Job` collects programs and steps; `run_job` starts the parties, follows what they say, and ends
all of them when one fails.
"""

import dataclasses
import json
import queue
import socket
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvjax.errors import InputError
from kvjax.infer.private.environment import party_command, party_python
from kvjax.infer.private.lowering import Program

__all__ = ["PARTIES", "Job", "Network", "Outcome", "PartyError", "free_addresses", "run_job"]

PARTIES = {"ABY3": 3, "SEMI2K": 2, "CHEETAH": 2}
"""The protocols on offer, and how many parties each has."""
Event = dict[str, Any]


class PartyError(InputError):
    """A party ended early: which, and why, in one line. The others are ended too."""


@dataclasses.dataclass(frozen=True)
class Network:
    """A network to imitate: one-way delay in seconds, bits a second (0: without a bound)."""

    delay: float
    rate: float


@dataclasses.dataclass
class Job:
    """What all parties know, and what each alone knows.

    Attributes:
        protocol: a key of `PARTIES`.
        exp: "pade" (about 1e-4 exact) or "default" (1e-3, with fewer bytes).
        client: the party to whom logits are opened.
        addresses: host:port of each party.
        simulate: all parties as threads of one process instead.
        network: imitated between those threads.
        profile: count bytes and actions; the engine writes a log for it.
        timeout: seconds in which a party must be reached; six times as many may one be silent.
        dump: keep the engine's programs as text beside the job.
    """

    protocol: str = "ABY3"
    exp: str = "pade"
    client: int = 1
    addresses: Sequence[str] = ()
    simulate: bool = False
    network: Network | None = None
    profile: bool = True
    timeout: float = 20.0
    dump: bool = False
    programs: dict[str, Program] = dataclasses.field(default_factory=dict)
    steps: list[list[Any]] = dataclasses.field(default_factory=list)
    public: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    private: dict[int, dict[str, np.ndarray]] = dataclasses.field(default_factory=dict)

    def share(self, owner: int, **arrays: np.ndarray) -> None:
        """A party's own arrays become shares under their names."""
        for name, array in arrays.items():
            self.private.setdefault(owner, {})[name] = np.asarray(array)
            self.steps.append(["share", owner, name])

    def known(self, name: str, value: np.ndarray) -> None:
        """All parties set a public value."""
        key = f"{len(self.public)}.{name}"
        self.public[key] = np.asarray(value)
        self.steps.append(["public", name, key])

    def run(self, program: Program, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        """All parties run a program over named values."""
        self.programs[program.name] = program
        self.steps.append(["run", program.name, list(inputs), list(outputs)])

    def open(self, name: str, to: int, label: str) -> None:
        """One party learns a value; it is kept as `label`."""
        self.steps.append(["open", name, to, label])

    def token(self, logits: str, onehot: str, label: str) -> None:
        """The client learns logits, takes the best token and shares it as `onehot`."""
        self.steps.append(["token", logits, onehot, label])

    def forget(self, *names: str) -> None:
        """Values that nothing needs any more."""
        self.steps.append(["forget", list(names)])

    def mark(self, label: str) -> None:
        """Reports what the steps since the last mark cost."""
        self.steps.append(["mark", label])

    def write(self, folder: Path, ranks: Sequence[int]) -> None:
        """Lays down what the parties `ranks` need in one folder."""
        head = {
            "protocol": self.protocol, "field": "FM64", "exp": self.exp, "client": self.client,
            "parties": list(self.addresses) or [f"p{i}" for i in range(PARTIES[self.protocol])],
            "simulate": self.simulate, "profile": self.profile, "timeout": self.timeout,
            "dump": self.dump, "steps": self.steps,
            "network": None if self.network is None else dataclasses.asdict(self.network),
            "programs": {name: program.secret for name, program in self.programs.items()},
        }  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "job.json").write_text(json.dumps(head))
        for name, program in self.programs.items():
            (folder / f"{name}.hlo").write_bytes(program.hlo)
        _save(folder / "public.npz", self.public)
        for rank in ranks:
            if rank in self.private:
                _save(folder / f"private-{rank}.npz", self.private[rank])


def _save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    path.touch(mode=0o600)  # a party's secrets are for its user only
    np.savez(path, **arrays)  # type: ignore[arg-type]


@dataclasses.dataclass
class Outcome:
    """What came of a job.

    Attributes:
        opened: the values that the parties run here learnt, by label.
        tokens: the client's, in order.
        marks: events of `Job.mark`, of every party run here.
        text: the engine's programs, where asked for.
    """

    opened: dict[str, np.ndarray]
    tokens: list[int]
    marks: list[Event]
    text: dict[str, str]

    def of(self, label: str, rank: int = 0) -> Event:
        """The mark of a party."""
        return next(m for m in self.marks if m["label"] == label and m["rank"] == rank)


def free_addresses(count: int) -> list[str]:
    """Loopback addresses that nobody listens on now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [f"127.0.0.1:{s.getsockname()[1]}" for s in sockets]
    finally:
        for s in sockets:
            s.close()


def run_job(
    job: Job,
    ranks: Sequence[int] | None = None,
    *,
    follow: Callable[[Event], None] = lambda event: None,
    tls: dict[str, str] | None = None,
) -> Outcome:
    """Runs parties of a job, by default all, each a process of its own (or all in one, simulated).

    Args:
        job: complete.
        ranks: which parties to run here; the others run elsewhere, with the same job.
        follow: is told every event as it happens.
        tls: paths of this host's "certificate" and "key", and of the "ca" that peers must have.

    Raises:
        PartyError: a party failed or fell silent; all that were started here are ended.
    """
    size = PARTIES[job.protocol]
    ranks = range(size) if ranks is None else ranks
    if not job.simulate and not job.addresses:
        job = dataclasses.replace(job, addresses=free_addresses(size))
    with tempfile.TemporaryDirectory(prefix="kvjax-private-") as name:
        folder = Path(name)
        job.write(folder, ranks)
        processes = {} if job.simulate else {r: _start(folder, r, tls) for r in ranks}
        if job.simulate:
            processes = {0: _start(folder, None, None)}
        try:
            events = _follow(folder, processes, follow)
        finally:
            _end(processes)
        return _outcome(folder, events)


def _start(folder: Path, rank: int | None, tls: dict[str, str] | None) -> subprocess.Popen[str]:
    command = [*party_command(party_python()), str(folder)]
    command += [] if rank is None else ["--rank", str(rank)]
    command += [] if tls is None else ["--tls", json.dumps(tls)]
    with (folder / f"errors-{rank or 0}.txt").open("w") as errors:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)


def _follow(
    folder: Path, processes: dict[int, subprocess.Popen[str]], follow: Callable[[Event], None]
) -> list[Event]:
    """Collects events until all are done; raises as soon as one is not."""
    lines: queue.Queue[tuple[int, str | None]] = queue.Queue()

    def read(rank: int, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                lines.put((rank, line))
        lines.put((rank, None))

    for rank, process in processes.items():
        threading.Thread(target=read, args=(rank, process), daemon=True).start()
    events: list[Event] = []
    running = set(processes)
    while running:
        rank, line = lines.get()
        if line is None:
            running.discard(rank)
            if processes[rank].wait():
                raise _error(folder, processes, events)
            continue
        if line.startswith("{"):
            events.append(json.loads(line))
            follow(events[-1])
    return events


def _error(
    folder: Path, processes: dict[int, subprocess.Popen[str]], events: list[Event]
) -> PartyError:
    """Says which party ended and why: one that was killed before those that missed it."""
    status = {rank: process.poll() or 0 for rank, process in processes.items()}
    said = [e for e in events if e["event"] == "failed"]
    killed = [rank for rank in status if status[rank] < 0]
    if said and not killed:
        return PartyError(f"party {said[0]['rank']} ended: {said[0]['message']}")
    rank = killed[0] if killed else next(rank for rank in status if status[rank])
    how = f"signal {-status[rank]}" if killed else f"status {status[rank]}"
    lines = (folder / f"errors-{rank}.txt").read_text(errors="replace").split("\n")
    why = next((f", {line.strip()[:200]}" for line in reversed(lines) if line.strip()), "")
    return PartyError(f"party {rank} died ({how}{why}): the other parties were ended")


def _end(processes: dict[int, subprocess.Popen[str]]) -> None:
    for process in processes.values():
        if process.poll() is None:
            process.kill()
    for process in processes.values():
        process.wait()


def _outcome(folder: Path, events: list[Event]) -> Outcome:
    opened: dict[str, np.ndarray] = {}
    for path in folder.glob("opened-*.npz"):
        with np.load(path) as arrays:
            opened.update({name: arrays[name] for name in arrays.files})
    return Outcome(
        opened=opened,
        tokens=[e["id"] for e in events if e["event"] == "token"],
        marks=[e for e in events if e["event"] == "mark"],
        text={path.stem: path.read_text() for path in folder.glob("*.pphlo")},
    )
