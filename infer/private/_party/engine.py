"""SecretFlow SPU as one party sees it: programs, shares, links.

The wheel's own `__init__` imports a JAX of its choice. Only its native part is needed here, so it
is found without running that.
"""

import importlib
import importlib.util
import json
import struct
import sys
import types
from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["Link", "Program", "Vm", "load_spu", "reveals", "runtime_config"]


def load_spu() -> tuple[Any, Any]:
    """The native module and its thin Python cover, `spu.libspu` and `spu.api`."""
    if "spu" not in sys.modules:
        found = importlib.util.find_spec("spu")
        if found is None or found.submodule_search_locations is None:
            raise ImportError("no spu in this environment: run `kvjax private setup`")
        package = types.ModuleType("spu")
        package.__path__ = list(found.submodule_search_locations)
        sys.modules["spu"] = package
    return importlib.import_module("spu.libspu"), importlib.import_module("spu.api")


def runtime_config(job: dict[str, Any]) -> Any:
    """The engine's settings: every party must use the same."""
    spu, api = load_spu()
    config = spu.RuntimeConfig(
        protocol=api.parse_protocol_kind(job["protocol"]), field=api.parse_field_type(job["field"])
    )
    config.fxp_exp_mode = api.parse_exp_mode("EXP_" + job["exp"].upper())
    config.enable_pphlo_profile = config.enable_hal_profile = bool(job["profile"])
    return config


def reveals(text: str) -> list[str]:
    """Why a compiled program could open a secret; empty where it opens nothing by itself.

    A program is refused that has a `reveal`, or an output that is not secret. What the engine's
    own kernels open (see the notes on `top_k`) is not in the text.
    """
    wrong = []
    if "reveal" in text:
        wrong.append("it reveals a value")
    head = next((line for line in text.splitlines() if "@main" in line), "")
    results = head.partition("->")[2]
    if results.count("tensor<") != results.count("!pphlo.secret<"):
        wrong.append("an output is public")
    return wrong


class Program:
    """A program that `kvjax` lowered, compiled for the engine by this party itself."""

    def __init__(self, name: str, hlo: bytes, secret: Sequence[bool]) -> None:
        spu, api = load_spu()
        kinds = (spu.Visibility.VIS_PUBLIC, spu.Visibility.VIS_SECRET)
        source = spu.CompilationSource(spu.SourceIRType.XLA, hlo, [kinds[bool(x)] for x in secret])
        self.name = name
        code = api.compile(source, spu.CompilerOptions())
        self.code: bytes = code if isinstance(code, bytes) else code.encode()
        if wrong := reveals(self.code.decode()):
            raise PermissionError(f"program {name} is refused: {'; '.join(wrong)}")


class Link:
    """Messages between the parties; counts what this party sends outside of programs."""

    def __init__(self, context: Any, rank: int, size: int) -> None:
        self.context, self.rank, self.size = context, rank, size
        self.sent = 0

    def send(self, to: int, share: Any) -> None:
        """Sends one share: lengths first, no pickles, since a peer is not to be trusted so far."""
        parts = [bytes(share.meta), *[bytes(chunk) for chunk in share.share_chunks]]
        head = json.dumps([len(part) for part in parts]).encode()
        data = struct.pack("<I", len(head)) + head + b"".join(parts)
        self.sent += len(data)
        self.context.send(to, data)

    def receive(self, source: int) -> Any:
        """The share that a party sends next."""
        data = self.context.recv(source)
        (size,) = struct.unpack("<I", data[:4])
        parts, place = [], 4 + size
        for length in json.loads(data[4:place]):
            parts.append(data[place : place + length])
            place += length
        spu, _ = load_spu()
        share = spu.Share()
        share.meta, share.share_chunks = parts[0], parts[1:]
        return share


class Vm:
    """One party's virtual machine: named shares, and programs over them."""

    def __init__(self, link: Link, config: Any) -> None:
        spu, api = load_spu()
        self.link, self.spu = link, spu
        self.io = api.Io(link.size, config)
        self.runtime = api.Runtime(link.context, config)

    def share(self, name: str, owner: int, value: np.ndarray | None) -> None:
        """The owner splits a value into shares and hands every other party its own."""
        if self.link.rank != owner:
            self.runtime.set_var(name, self.link.receive(owner))
            return
        shares = self.io.make_shares(value, self.spu.Visibility.VIS_SECRET)
        for rank, share in enumerate(shares):
            if rank != owner:
                self.link.send(rank, share)
        self.runtime.set_var(name, shares[owner])

    def public(self, name: str, value: np.ndarray) -> None:
        """Sets a value that all parties know, each from its own copy."""
        shares = self.io.make_shares(value, self.spu.Visibility.VIS_PUBLIC)
        self.runtime.set_var(name, shares[self.link.rank])

    def run(self, program: Program, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        """Runs a program on named values; what it gives gets names too."""
        self.runtime.run(
            self.spu.Executable(program.name, list(inputs), list(outputs), program.code)
        )

    def open_to(self, name: str, owner: int) -> np.ndarray | None:
        """Sends the shares of a value to one party, which alone learns it."""
        mine = self.runtime.get_var(name)
        if self.link.rank != owner:
            self.link.send(owner, mine)
            return None
        shares = [mine if r == owner else self.link.receive(r) for r in range(self.link.size)]
        return np.asarray(self.io.reconstruct(shares))
