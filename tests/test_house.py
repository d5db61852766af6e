"""CONTRIBUTING.md's list of files: complete, in an order that imports follow, from a file to what stands below it."""

import ast
import doctest
import importlib
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fastbn"
OF_ITS_FOLDER = ("commands", "experiments")  # one file for each of a kind: the list has the folder


def listed():
    """The list's files and folders from top to bottom, as paths within fastbn/."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    lines = text[text.index("    fastbn/\n") :].split("\n\n")[0].splitlines()[1:]
    folder, found = Path(), []
    for line in lines:
        for match in re.finditer(r"(^ {6}(?: {2})?|(?<=\S) {2,})(\w+(?:/|\.(?:pyx|pxd|pxi|py|h)))(?!\S)", line):
            if match.span(1) == (0, 6):  # a file or folder of the package itself
                folder = Path()
            found.append(folder / match[2])
            if match[2].endswith("/"):
                folder = Path(match[2])
    return found


HOUSE = listed()
KINDS = (".py", ".pyx", ".pxd", ".pxi", ".h")
SOURCES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*") if path.suffix in KINDS)


def place(path):
    """Where a file stands in the list; a .pxd with its .pyx, and where the list has only the folder, with that."""
    stands = [p for p in (path, path.with_suffix(".pyx"), path.parent) if p in HOUSE]
    return HOUSE.index(stands[0])


def modules(path):
    """What a file imports, as lists of names: ["fastbn", "state", "Array"]."""
    text = (PACKAGE / path).read_text(encoding="utf-8")
    if path.suffix != ".py":
        text = "\n".join(re.findall(r"^from fastbn\S* c?import (?:\([^)]*\)|.*)", text, re.MULTILINE))
        text = text.replace(" cimport ", " import ")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = ["fastbn", *path.parent.parts][: len(path.parts) + 1 - node.level] if node.level else []
            yield from ([*above, *(node.module or "").split("."), alias.name] for alias in node.names)


def imported(path):
    """The files of fastbn/ among them; a public name stands for fastbn/__init__.py."""
    for module in modules(path):
        parts = [part for part in module if part]
        if parts[0] == "fastbn":
            yield next(file for n in range(len(parts), 0, -1) for file in files(Path(*parts[1:n])))


def files(module):
    ways = [module.with_suffix(suffix) for suffix in (".py", ".pyx", ".pxd")] if module.name else []
    return [way for way in (*ways, module / "__init__.py") if (PACKAGE / way).exists()]


def test_the_list_is_complete():
    assert len(HOUSE) == len(set(HOUSE)) > 40
    assert [path for path in HOUSE if not (PACKAGE / path).exists()] == []
    alone = [path for path in SOURCES if path.name != "__init__.py" and path.parent.name not in OF_ITS_FOLDER]
    assert [path for path in alone if path not in HOUSE and path.with_suffix(".pyx") not in HOUSE] == []


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_imports_run_one_way(path):
    for other in imported(path):
        if other == Path("__init__.py"):  # the public names, as a user has them
            assert path == Path("__main__.py") or path.parts[0] in OF_ITS_FOLDER, f"{path} imports from fastbn"
        elif path.name == "__init__.py":  # of a folder: gathers what is in it
            assert path.parent in other.parents
        else:
            assert place(other) > place(path), f"{path} imports {other}, which stands above it"


def test_the_version_stands_in_one_place():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    names = ("README.md", "CITATION.cff", "setup.py", "docs/conf.py", "docs/index.md", "docs/installation.md")
    places = [ROOT / name for name in (*names, "docs/development/releases.md")]
    places += [PACKAGE / name for name in ("__init__.py", "__main__.py", "config.py")]
    written = re.compile(rf"(?<![\d.]){re.escape(version)}(?![\d.])|^version:", re.MULTILINE)
    there = [path for path in places if path.exists()]
    assert [path for path in there if written.search(path.read_text(encoding="utf-8"))] == []


@pytest.mark.thread_unsafe(reason="one of the examples empties the pool")
@pytest.mark.parametrize("name", ["batchstats", "functional", "kernels.memory"])
def test_examples_of_compiled_modules(name):
    """pytest collects those of .py files alone."""
    failed, tried = doctest.testmod(importlib.import_module(f"fastbn.{name}"))
    assert failed == 0 < tried
