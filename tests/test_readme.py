"""The README's Python runs, from top to bottom, as one program."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHORTER = {"epochs=200": "epochs=3", "max_iter=50": "max_iter=5"}  # what is shown, in less time


def test_the_examples_run(tmp_path, monkeypatch, capsys):
    for package in ("sklearn", "matplotlib", "safetensors"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    program = "\n".join(re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE))
    for shown, shorter in SHORTER.items():
        assert program.count(shown) == 1
        program = program.replace(shown, shorter)
    with pytest.warns(Warning, match="not converged yet"):
        exec(program, names := {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "run.safetensors"]
    assert repr(names["small"]).count("Dense(") == 2
    assert "BatchNorm" not in repr(names["small"])
    evaluated, score = capsys.readouterr().out.splitlines()
    assert eval(evaluated)[1] > 0.95
    assert float(score) > 0.8


@pytest.mark.skipif(not (ROOT / "docs").exists(), reason="an sdist has no pictures")
@pytest.mark.parametrize("path", re.findall(r"\]\(([\w./-]+)\)", README))
def test_what_it_refers_to_is_there(path):
    assert (ROOT / path).exists()
