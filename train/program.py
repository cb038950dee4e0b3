"""What the training programs share around their runs: named configs, options, the run's folder.

A program is `kvjax train NAME --config CONFIG`: its options are the fields of the config, whose
values are the defaults, and its folder remembers them, so that a run is not resumed with others.
"""

import dataclasses
import importlib
import json
import pkgutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro

from kvjax.errors import InputError

__all__ = ["TrainOptions", "named_config", "run_main", "settle", "show_result", "train_options"]


def named_config(name: str, program: str, prefix: str) -> Any:
    """The config of `kvjax.configs` with this name.

    Args:
        name: of the module, such as "lm_tiny".
        program: that asks, such as "lm".
        prefix: of the names that are for it, such as "lm_".

    Raises:
        InputError: there is none for this program; the message lists those there are.
    """
    # By name, since configs import the programs and not the other way round.
    package = importlib.import_module("kvjax.configs")
    modules = pkgutil.iter_modules(package.__path__)
    known = sorted(module.name for module in modules if module.name.startswith(prefix))
    if name not in known:
        raise InputError(f"no config {name!r} for train {program}: use one of {', '.join(known)}")
    return importlib.import_module(f"kvjax.configs.{name}").config


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """What a training program is told: `fields` is its config."""

    config: str
    out: Path
    json: bool
    fields: Any


def train_options(
    argv: Sequence[str] | None, program: str, default: str, read: Callable[[str], Any], about: str
) -> TrainOptions:
    """The command line; the named config's values are the defaults of its fields.

    Args:
        argv: the words; None takes the process's.
        program: such as "lm".
        default: the config that is taken if none is named.
        read: the config, a dataclass, by its name.
        about: what --help says first.

    Raises:
        InputError: no such config, or a value that it cannot take.
    """
    argv = sys.argv[1:] if argv is None else argv
    name = _config_name(argv, default)
    values = read(name)

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Options(TrainOptions):
        config: str = name
        """A config of kvjax.configs by name; the other options change single fields of it."""
        out: Path = Path("runs") / name
        """Folder of the run: checkpoints, metrics.jsonl, and in the end model/."""
        json: bool = False
        """End with one JSON object on stdout."""
        fields: Annotated[type(values), tyro.conf.arg(name="")] = values  # pyright: ignore

    Options.__doc__ = about
    try:
        return tyro.cli(Options, prog=f"kvjax train {program}", args=argv)
    except ValueError as error:  # from the checks of the dataclasses
        raise InputError(str(error)) from None


def _config_name(argv: Sequence[str], default: str) -> str:
    """What --config says; it is read first, since it gives the other options their defaults."""
    words = [part for word in argv for part in word.split("=", 1)]
    at = words.index("--config") + 1 if "--config" in words else len(words)
    return words[at] if at < len(words) else default


def settle(folder: Path, config: Any) -> None:
    """Notes the config in the run's folder, or holds it against the one that is there.

    Args:
        folder: of the run; made where it does not exist.
        config: a dataclass. Its field `machine` is left out: the same run may go on elsewhere.

    Raises:
        InputError: the folder is a file, or the run there has other settings.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file: give --out a folder for the run")
    path, fields = folder / "run.json", json.loads(json.dumps(dataclasses.asdict(config)))
    fields.pop("machine", None)
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        return
    there = json.loads(path.read_text(encoding="utf-8"))
    if names := _differences(there, fields):
        raise InputError(
            f"{path} has other settings ({', '.join(names)}): "
            "repeat them to resume that run, or give another --out"
        )


def _differences(a: Any, b: Any) -> list[str]:
    """Dotted names of the fields in which two nested settings differ."""
    flat_a, flat_b = (
        {jax.tree_util.keystr(k, simple=True, separator="."): v for k, v in leaves}
        for leaves in map(jax.tree_util.tree_leaves_with_path, (a, b))
    )
    names = sorted(flat_a.keys() | flat_b.keys())
    return [name for name in names if flat_a.get(name) != flat_b.get(name)]


def show_result(result: dict[str, Any], line: str, as_json: bool) -> int:
    """Ends a program's output with its result, as a line or as JSON; returns the exit status 0."""
    print(json.dumps(result) if as_json else line)
    return 0


def run_main(main: Callable[[], int]) -> None:
    """Ends the process as `main` says, for `python -m`: an InputError is a line and status 2."""
    try:
        sys.exit(main())
    except InputError as error:
        print(f"kvjax: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("kvjax: interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(130)
