"""The documentation's Python runs, prints what its pages show, and its links lead somewhere.

The ```python blocks of a page are one program, from top to bottom, in an empty folder. A ```text block right behind one
is what it prints, where `...` stands for anything. By default: README and the short pages; FASTBN_DOCS=1: every page.
What a page needs beside the extra `train` stands in a comment of its own, <!-- needs: torch -->.
"""

import contextlib
import doctest
import io
import os
import pydoc
import re
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest

import fastbn

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted(page for page in (ROOT / "docs").rglob("*.md") if "_build" not in page.relative_to(ROOT).parts),
]
TEXTS = [*PAGES, *(ROOT / f"{name}.md" for name in ("CHANGELOG", "CONTRIBUTING", "SECURITY"))]
SHORT = ("README.md", "docs/in*.md", "docs/reference/*.md", "docs/development/*.md")
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n*```text\n(.*?)^```)?", re.DOTALL | re.MULTILINE)
HOW = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE

# An sdist has some of docs/, and no pictures.
whole = pytest.mark.skipif(not (ROOT / "docs" / "conf.py").exists(), reason="an sdist has no documentation")


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def blocks(page):
    """Each block's first line, its code, compiled as if at that line, and what it shall print, or None."""
    text = page.read_text(encoding="utf-8")
    for match in BLOCK.finditer(text):
        above = text.count("\n", 0, match.start(1))
        yield above + 1, compile("\n" * above + match[1], str(page), "exec"), match[2]


PROGRAMS = [page for page in PAGES if BLOCK.search(page.read_text(encoding="utf-8"))]


def wanted(page):
    return "FASTBN_DOCS" in os.environ or any(page.relative_to(ROOT).match(pattern) for pattern in SHORT)


@whole
@pytest.mark.parametrize("page", [page for page in PROGRAMS if wanted(page)], ids=name_of)
def test_the_programs_run(page, tmp_path, monkeypatch):
    needed = re.search(r"^<!-- needs: (.*) -->$", page.read_text(encoding="utf-8"), re.MULTILINE)
    for package in ("sklearn", "matplotlib", "safetensors", "tqdm", "joblib", *(needed[1].split() if needed else ())):
        if find_spec(package) is None:
            pytest.skip(f"needs {package}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    limit, names = fastbn.get_pool_limit(), {"__name__": "__main__"}
    try:
        # What a page sets is over when it ends.
        with warnings.catch_warnings(), fastbn.threads(fastbn.get_num_threads()):
            if needed:
                warnings.simplefilter("ignore")  # those that other libraries give about themselves
            for line, code, expected in blocks(page):
                with contextlib.redirect_stdout(io.StringIO()) as printed:
                    exec(code, names)
                if expected is not None and not doctest.OutputChecker().check_output(expected, printed.getvalue(), HOW):
                    pytest.fail(
                        f"{name_of(page)}: the block of line {line} printed\n{printed.getvalue()}not\n{expected}"
                    )
    finally:
        fastbn.set_pool_limit(limit)
        if pyplot := sys.modules.get("matplotlib.pyplot"):
            pyplot.close("all")


@whole
@pytest.mark.parametrize("page", TEXTS, ids=name_of)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^()\s]+)\)", text) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("name", [name for name in fastbn.__all__ if name != "kernels"])
def test_help_names_types_as_one_writes_them(name):
    assert "numpy._typing" not in pydoc.render_doc(getattr(fastbn, name))
