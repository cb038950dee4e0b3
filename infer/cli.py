"""The command `kvjax`: finds the program that is asked for and speaks for it when it fails."""

import importlib
import os
import sys
from collections.abc import Sequence

from kvjax.errors import InputError

__all__ = ["main"]

# Name -> (module with a `main(argv) -> int`, what it does). Imported only when it is asked for.
_COMMANDS = {
    "generate": ("kvjax.infer.commands.generate", "continue a prompt, or answer a question"),
    "batch": ("kvjax.infer.commands.batch", "answer a file of requests"),
    "eval": ("kvjax.infer.commands.evaluate", "what compressed caches lose and save"),
    "search": ("kvjax.infer.commands.search", "solve questions by tree search"),
    "video": ("kvjax.infer.commands.video", "go on from a first frame"),
    "private setup": ("kvjax.infer.commands.private_setup", "make the parties' environment"),
    "private run": ("kvjax.infer.commands.private", "continue a prompt that nobody else sees"),
    "train lm": ("kvjax.train.lm", "train a small language model"),
    "train task-classifier": ("kvjax.train.task_classifier", "tell finding from gathering"),
    "train prm": ("kvjax.train.prm", "teach a policy to judge its own beginnings"),
    "train label-rewards": ("kvjax.train.label_rewards", "rate every beginning of texts"),
    "train guard": ("kvjax.train.guard", "the speaker of a safety world, and its judge"),
    "train mrm": ("kvjax.train.mrm", "rate every token that could follow a text"),
    "train video": ("kvjax.train.video", "train a causal video diffusion transformer"),
    "train frame_features": ("kvjax.train.frame_features", "train what judges moving digits"),
    "bench batch": ("kvjax.infer.bench.batch", "a planned batch beside servers' policies"),
    "bench batch-sim": ("kvjax.infer.bench.batch_sim", "the same, counted without a model"),
    "bench generate": ("kvjax.infer.bench.generate", "our tokens a second beside a peer's"),
    "bench kernels": ("kvjax.infer.bench.kernels", "the kernels beside their peers and the floor"),
    "bench private": ("kvjax.infer.bench.private", "bytes and rounds of a private step"),
    "bench saffron": ("kvjax.infer.bench.saffron", "attack success against compute"),
    "bench scale": ("kvjax.infer.bench.scale", "what more devices are worth"),
    "bench search": ("kvjax.infer.bench.search", "tree searches beside each other"),
    "bench tree": ("kvjax.infer.bench.tree", "a search tree decoded as a tree and leaf by leaf"),
    "bench video": ("kvjax.infer.bench.video", "video chunks with and without the cache"),
    "bench video-quality": ("kvjax.infer.bench.video_quality", "generated against true motion"),
    "bench train": ("kvjax.train.bench", "the training step beside a peer's"),
}


def _usage() -> str:
    lines = [f"  {name:<21} {what}" for name, (_, what) in _COMMANDS.items()]
    return "usage: kvjax COMMAND [OPTIONS]\n\ncommands:\n{}\n\n{}".format(
        "\n".join(lines), "`kvjax COMMAND --help` says what a command takes."
    )


def _find(argv: Sequence[str]) -> tuple[str, list[str]]:
    for name, (module, _) in _COMMANDS.items():
        words = name.split()
        if list(argv[: len(words)]) == words:
            return module, list(argv[len(words) :])
    asked = " ".join(argv[:2]) if argv[0] in ("train", "bench", "private") else argv[0]
    raise InputError(f"no command {asked!r}: use one of {', '.join(_COMMANDS)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status.

    Input that cannot be used ends in one line on stderr and status 2, an interrupt in status 130.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        if not argv or argv[0] in ("-h", "--help", "help"):
            print(_usage())
            return 0
        module, rest = _find(argv)
        return importlib.import_module(module).main(rest)
    except InputError as e:
        print(f"kvjax: error: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("kvjax: interrupted; what was written is kept", file=sys.stderr)
        return 130
