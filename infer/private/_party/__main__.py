"""`JOB --rank R`: one party of a private computation, from its folder of inputs.

The job is plain public data that every party holds: the protocol, where the parties are, programs,
and a list of steps that says who shares what, what runs, and to whom a result is opened. What a
party alone knows lies in a file of its own. Events go to stdout, one JSON object a line.
"""

import argparse
import hashlib
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from kvjax.infer.private._party.channels import Network, shaped_contexts
from kvjax.infer.private._party.counters import Log
from kvjax.infer.private._party.engine import Link, Program, Vm, load_spu, runtime_config
from kvjax.infer.private._party.watch import Watch


def say(**event: Any) -> None:
    """One event; a line at a time, whichever thread speaks."""
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


class Party:
    """One party and its walk through the job's steps."""

    def __init__(self, folder: Path, job: dict[str, Any], context: Any, rank: int) -> None:
        self.job, self.rank, self.folder = job, rank, folder
        config = runtime_config(job)
        if job["simulate"] and rank:  # one log a process: only the first party's runs are in it
            config.enable_pphlo_profile = config.enable_hal_profile = False
        self.link = Link(context, rank, len(job["parties"]))
        self.vm = Vm(self.link, config)
        own = folder / f"private-{rank}.npz"
        self.private = np.load(own) if own.exists() else {}
        self.public = np.load(folder / "public.npz")
        self.opened: dict[str, np.ndarray] = {}

    def agree(self, programs: dict[str, Program]) -> None:
        """Ends the session where two parties hold different jobs: nothing is shared before."""
        mine = hashlib.sha256()
        for name in sorted(self.public):
            mine.update(name.encode() + self.public[name].tobytes())
        for name in sorted(programs):  # compiled: what was lowered names places of source files
            mine.update(name.encode() + programs[name].code)
        for name in ("protocol", "field", "exp", "programs", "steps", "client"):
            mine.update(json.dumps(self.job[name], sort_keys=True).encode())
        theirs = self.link.context.all_gather(mine.hexdigest())
        texts = [x.decode() if isinstance(x, bytes) else str(x) for x in theirs]
        for rank, text in enumerate(texts):
            if text != mine.hexdigest():
                raise ValueError(f"party {rank} holds another job than party {self.rank}")

    def share(self, owner: int, name: str) -> None:
        """A value of the owner's file becomes shares."""
        self.vm.share(name, owner, self.private[name] if self.rank == owner else None)

    def open(self, name: str, to: int, label: str) -> None:
        """One party learns a value."""
        value = self.vm.open_to(name, to)
        if value is not None:
            self.opened[label] = value

    def token(self, logits: str, onehot: str, label: str) -> None:
        """The client alone learns the scores, takes the best token and shares it as one-hot."""
        client = self.job["client"]
        scores, value = self.vm.open_to(logits, client), None
        if scores is not None:
            flat = scores.reshape(-1)
            best = int(np.argmax(flat))
            value = np.zeros((1, flat.size), np.int32)
            value[0, best] = 1
            self.opened[label] = flat
            say(event="token", rank=self.rank, id=best, label=label)
        self.vm.share(onehot, client, value)

    def step(self, step: list[Any], programs: dict[str, Program]) -> None:
        """Does one step of the job."""
        kind, rest = step[0], step[1:]
        if kind == "share":
            self.share(*rest)
        elif kind == "public":
            self.vm.public(rest[0], self.public[rest[1]])
        elif kind == "run":
            self.vm.run(programs[rest[0]], rest[1], rest[2])
        elif kind == "open":
            self.open(*rest)
        elif kind == "token":
            self.token(*rest)
        elif kind == "forget":
            for name in rest[0]:
                self.vm.runtime.del_var(name)
        else:
            raise ValueError(f"no step {kind!r}")


def walk(party: Party, programs: dict[str, Program], log: Log | None, network: Any) -> None:
    """All steps of one party; a `mark` reports what the steps since the last one cost."""
    party.agree(programs)
    say(event="linked", rank=party.rank)
    begin, sent = time.perf_counter(), 0
    for step in party.job["steps"]:
        if step[0] != "mark":
            party.step(step, programs)
            continue
        party.link.context.barrier()
        now = time.perf_counter()
        say(
            event="mark", rank=party.rank, label=step[1], seconds=now - begin,
            shared_bytes=party.link.sent - sent, runs=[] if log is None else log.new(),
            **({} if network is None else {"network": network.totals(party.rank)}),
        )  # fmt: skip
        party.link.context.barrier()
        begin, sent = time.perf_counter(), party.link.sent
    np.savez(party.folder / f"opened-{party.rank}.npz", **party.opened)  # type: ignore[arg-type]
    say(event="done", rank=party.rank)


def describe(job: dict[str, Any], tls: dict[str, str] | None) -> Any:
    """Where the parties are, for the engine's link."""
    link = load_spu()[0].link
    desc = link.Desc()
    for rank, address in enumerate(job["parties"]):
        desc.add_party(f"party{rank}", address)
    # A party that is there may compute for long before it says anything.
    desc.recv_timeout_ms = int(6000 * job["timeout"])
    desc.connect_retry_interval_ms = 250
    desc.connect_retry_times = max(1, int(job["timeout"] / 0.25))
    if tls is not None:
        desc.enable_ssl = True
        for options in (desc.client_ssl_opts, desc.server_ssl_opts):
            options.cert.certificate_path = tls["certificate"]
            options.cert.private_key_path = tls["key"]
            options.verify.verify_depth = 1
            options.verify.ca_file_path = tls["ca"]
    return desc


def simulate(folder: Path, job: dict[str, Any], programs: dict[str, Program], log: Log) -> None:
    """All parties as threads of this process: over memory, or a shaped network."""
    size, shape = len(job["parties"]), job["network"]
    network = None if shape is None else Network(shape["delay"], shape["rate"])
    link = load_spu()[0].link
    shaped = None if network is None else shaped_contexts(network, size, job["timeout"])

    def one(rank: int) -> None:
        try:
            context = link.create_mem(describe(job, None), rank) if shaped is None else shaped[rank]
            party = Party(folder, job, context, rank)
            walk(party, programs, None if rank else log, network)
        except Exception as e:
            stop(rank, e)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def fail(rank: int, error: Exception) -> None:
    """One line on what ended this party."""
    text = " ".join(str(error).split())
    say(event="failed", rank=rank, message=f"{type(error).__name__}: {text[:300]}")


def stop(rank: int, error: Exception) -> None:
    """Ends the process at once: its other threads wait for messages that will not come."""
    fail(rank, error)
    os._exit(3)


def main() -> int:
    """Runs one party, or all of them in this process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--rank", type=int)
    parser.add_argument("--tls", type=json.loads)
    args = parser.parse_args()
    if args.check:
        load_spu()[1].check_cpu_feature()
        return 0
    job = json.loads((args.folder / "job.json").read_text())
    rank = 0 if args.rank is None else args.rank
    try:
        log = Log(args.folder / f"engine-{rank}.log", load_spu()[0])
        programs = {
            name: Program(name, (args.folder / f"{name}.hlo").read_bytes(), secret)
            for name, secret in job["programs"].items()
        }
        if job["dump"]:
            for name, program in programs.items():
                (args.folder / f"{name}.pphlo").write_bytes(program.code)
        say(event="compiled", rank=rank)
        if job["simulate"]:
            simulate(args.folder, job, programs, log)
            return 0
        watch = Watch(job["parties"], rank, job["timeout"], lambda e: stop(rank, e))
        watch.start()
        context = load_spu()[0].link.create_brpc(describe(job, args.tls), rank)
        watch.linked.set()
        walk(Party(args.folder, job, context, rank), programs, log, None)
        watch.over.set()
        context.stop_link()
    except Exception as e:
        fail(rank, e)
        return 3
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # the engine's threads would hold a failed process open
