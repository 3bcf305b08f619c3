"""Tests of .ci/run: it runs every test once, and those that need the cores for themselves alone."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "tests").rglob("test_*.py"))
RANKS = {"run_on_ranks", "start_ranks", "torchrun", "torch.distributed.run", "deepspeed"}
RANKS |= {"ray", "kills.py"}  # processes for all cores, too


def words(tree: ast.AST) -> set[str]:
    """Names and strings in a piece of a program; what a test asks for is among its arguments."""
    found = set()
    for one in ast.walk(tree):
        match one:
            case ast.Name(id=name) | ast.arg(arg=name) | ast.Attribute(attr=name):
                found.add(name)
            case ast.Constant(value=str(text)):
                found |= {text, Path(text).name}
    return found


def marks(of: list[ast.expr]) -> set[str]:
    return set(re.findall(r"pytest\.mark\.(\w+)", " ".join(map(ast.unparse, of))))


def slow_tests(tree: ast.Module) -> Iterator[tuple[str, set[str], set[str]]]:
    """The slow tests of a file: name, marks, and all words in it and in what it uses of the file."""
    of_all = marks(
        [one.value for one in tree.body if isinstance(one, ast.Assign) and "pytestmark" in words(one)]
    )
    parts = {one.name: one for one in tree.body if isinstance(one, ast.FunctionDef | ast.ClassDef)}
    for name, test in parts.items():
        found = of_all | marks(test.decorator_list)
        if "slow" not in found or not name.startswith("test_"):
            continue
        seen, left = set(), {name}
        while left:
            seen |= left
            left = {word for one in left & parts.keys() for word in words(parts[one])} - seen
        yield name, found, seen


def test_a_slow_test_that_starts_ranks_runs_alone():
    tests = [(path, *one) for path in FILES for one in slow_tests(ast.parse(path.read_text("utf-8")))]
    with_ranks = [(path.name, name, found) for path, name, found, seen in tests if seen & RANKS]

    assert len(with_ranks) > 40
    assert [(file, name) for file, name, found in with_ranks if "alone" not in found] == []


@pytest.mark.parametrize("kind", [{"slow"}, {"slow", "alone"}, set()])
def test_each_test_is_run_by_one_command(kind):
    script, settings = (ROOT / ".ci/run").read_text("utf-8"), (ROOT / "pyproject.toml").read_text("utf-8")
    chosen = re.findall(r"^pytest -m '(.*?)'(?: -n 0 \$\(.*\))?$", script, re.M)
    chosen += re.findall(r"^addopts = .* -m '(.*?)'", settings, re.M)  # with the README's own command

    assert len(chosen) == 3
    values = {name: name in kind for name in ("slow", "alone")}
    assert [eval(one, {}, values) for one in chosen].count(True) == 1


def test_the_files_that_ci_names_have_all_tests_that_run_alone():
    """A mark from elsewhere, as of a list of parameters, would be found by no grep."""
    mark = "pytest.mark." + "alone"
    script = (ROOT / ".ci/run").read_text("utf-8")
    marked = [path for path in (ROOT / "tests").rglob("*.py") if mark in path.read_text("utf-8")]

    assert f"-n 0 $(grep -rl --include='test_*.py' {mark} tests)\n" in script
    assert len(marked) > 20
    assert set(marked) <= set(FILES)
