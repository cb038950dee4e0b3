"""What pyproject.toml and the papers say, held against the files."""

import fnmatch
import importlib.metadata
import os
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TOP = ("kvjax", "infer", "train", "configs", "pallas_kernels")
COMMANDS = (
    "python3 -m venv .venv && .venv/bin/pip install . "
    "&& .venv/bin/kvjax batch demos/requests.jsonl answers.jsonl --model tiny",
    "python3 -m venv .venv && .venv/bin/pip install -e '.[test]' && .venv/bin/pytest",
)


def walk(top=ROOT):
    """Each folder of the project, with what stands in it; no environment, build output or cache."""
    made = ("build", "dist", "runs", "__pycache__")
    for folder, folders, files in os.walk(top):
        folders[:] = [
            name
            for name in folders
            if name not in made and not name.endswith(".egg-info")
            if not name.startswith(".") or name == ".ci"
        ]
        yield Path(folder), folders, files


def packages():
    """Name and folder of each package, from the folders."""
    found = {}
    for top in TOP:
        for folder, _, files in walk(ROOT / top):
            if any(name.endswith(".py") for name in files):
                parts = folder.relative_to(ROOT).parts
                found[".".join(parts if top == "kvjax" else ("kvjax", *parts))] = folder
    return found


def test_package_list_is_the_folders():
    listed = PROJECT["tool"]["setuptools"]["packages"]
    assert listed == sorted(packages())


def test_package_dir_maps_each_top_level_folder():
    expected = {f"kvjax.{top}": top for top in TOP if top != "kvjax"}
    assert PROJECT["tool"]["setuptools"]["package-dir"] == expected


def test_every_package_has_an_init():
    assert all((folder / "__init__.py").is_file() for folder in packages().values())


def test_package_data_is_the_files():
    patterns = PROJECT["tool"]["setuptools"]["package-data"]
    found = {
        (name, path.name)
        for name, folder in packages().items()
        for path in folder.iterdir()
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    chosen = {
        (name, pattern): fnmatch.filter(
            [file for package, file in found if package == name], pattern
        )
        for name in patterns
        for pattern in patterns[name]
    }
    assert [key for key, files in chosen.items() if not files] == [], "patterns without a file"
    covered = {(name, file) for (name, _), files in chosen.items() for file in files}
    assert found - covered == set(), "files that an install would leave behind"


def test_nothing_is_empty():
    found = list(walk())
    assert [folder for folder, folders, files in found if not folders and not files] == []
    files = [folder / name for folder, _, names in found for name in names if name != "py.typed"]
    assert [path for path in files if not path.stat().st_size] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_readme_has_the_command_alone_in_a_block(command):
    assert f"\n```sh\n{command}\n```\n" in (ROOT / "README.md").read_text()


def test_contributing_says_why_for_each_dependency():
    project = PROJECT["project"]
    extras = project["optional-dependencies"]
    requirements = [
        *project["dependencies"],
        *(name for extra in extras.values() for name in extra),
    ]
    needed = {re.match(r"[\w-]+", requirement)[0] for requirement in requirements}
    text = (ROOT / "CONTRIBUTING.md").read_text()
    explained = re.findall(r"^- `([\w-]+)`: \S", text, flags=re.MULTILINE)
    # SPU has an environment of its own, which `kvjax private setup` makes.
    assert sorted(explained) == sorted(needed | {"pyright", "setuptools", "spu"})


def test_changelog_knows_the_version():
    version = PROJECT["project"]["version"]
    text = (ROOT / "CHANGELOG.md").read_text()
    unreleased = text.split("## [Unreleased]")[1].split("\n## ")[0]
    assert f"\n## [{version}]" in text or f"Will be {version}" in unreleased


def test_installed_version_and_program():
    assert importlib.metadata.version("kvjax") == PROJECT["project"]["version"]
    scripts = importlib.metadata.entry_points(group="console_scripts", name="kvjax")
    (script,) = {entry.value: entry for entry in scripts}.values()
    assert callable(script.load())


@pytest.mark.parametrize("constraints", sorted((ROOT / ".ci").glob("constraints-*.txt")))
def test_constraints_are_exact_and_cover_the_dependencies(constraints):
    lines = [line for line in constraints.read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[\w-]+==[\w.]+", line)] == []
    pins = {line.split("==")[0].lower() for line in lines}
    project = PROJECT["project"]
    direct = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    assert {re.match(r"[\w-]+", name)[0] for name in direct} - pins == set()


def test_license_is_apache_2():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License\n                           Version 2.0, January 2004" in text
    assert text.rstrip().endswith("limitations under the License.")
