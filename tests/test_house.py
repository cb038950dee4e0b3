"""The house's rules: which way imports point, how long files are, what a package says it offers."""

import ast
import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOP = ("kvjax", "infer", "train", "configs", "pallas_kernels")
# A folder may import what ranks below it, and itself.
RANK = {"configs": 3, "train": 2, "infer": 2, "kvjax": 1, "pallas_kernels": 0}
PLAIN = ("kvjax/cache", "kvjax/select", "kvjax/plan", "kvjax/diffusion", "pallas_kernels")
PLANNERS = ("kvjax/plan", "kvjax/cache/ledger.py", "kvjax/cache/trie.py")
# Offers the public names of folders above it, but imports them only when they are asked for.
LAZY = "kvjax/__init__.py"

FILES = sorted(path for top in TOP for path in (ROOT / top).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
INITS = [path for path in FILES if path.name == "__init__.py"]


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(parts if parts[0] == "kvjax" else ("kvjax", *parts))


def top_of(module):
    """The top-level folder that holds a module of ours."""
    second = [*module.split("."), ""][1]
    return second if second in TOP else "kvjax"


def imports(path):
    """Every module that a file imports, wherever in the file it does so."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if name_of(path) == LAZY else list(ast.walk(tree))
    found = [name.name for node in nodes if isinstance(node, ast.Import) for name in node.names]
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name_of(path)}:{node.lineno}: a relative import"
            # `from kvjax import infer` imports a module by its last name.
            whole = node.module == "kvjax"
            found += [f"kvjax.{name.name}" for name in node.names] if whole else [node.module]
    return found


def within(path, places):
    name = name_of(path)
    return any(name == place or name.startswith(f"{place}/") for place in places)


def from_outside(path):
    roots = {module.split(".")[0] for module in imports(path)}
    return roots - set(sys.stdlib_module_names) - {"kvjax"}


def each(files):
    return pytest.mark.parametrize("path", files, ids=name_of)


@each(FILES)
def test_imports_point_down(path):
    here = top_of(module_of(path))
    ours = [module for module in imports(path) if module.split(".")[0] == "kvjax"]
    wrong = [name for name in ours if top_of(name) != here and RANK[top_of(name)] >= RANK[here]]
    assert wrong == []


@each([path for path in FILES if within(path, PLAIN)])
def test_core_imports_jax_numpy_and_scipy_only(path):
    assert from_outside(path) <= {"jax", "numpy", "scipy"}


@each([path for path in FILES if within(path, PLANNERS)])
def test_planners_do_without_jax(path):
    assert from_outside(path) <= {"numpy", "scipy"}


@each([path for path in FILES if within(path, ["kvjax"]) and not within(path, ["kvjax/models"])])
def test_flax_stays_in_the_models(path):
    assert "flax" not in from_outside(path)


@each(FILES + TESTS)
def test_a_file_holds_one_thing(path):
    assert len(path.read_text().splitlines()) <= 500


@each(FILES)
def test_every_module_says_what_it_is(path):
    assert (ast.get_docstring(ast.parse(path.read_text())) or "").strip()


@each(INITS)
def test_a_package_lists_what_it_offers(path):
    package = importlib.import_module(module_of(path))
    brought = {
        name.asname or name.name
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ImportFrom) and node.module.startswith("kvjax.")
        for name in node.names
    }
    offered = getattr(package, "__all__", [])
    assert brought <= set(offered)
    assert len(set(offered)) == len(offered)
    for name in offered:
        assert getattr(package, name).__doc__, name
