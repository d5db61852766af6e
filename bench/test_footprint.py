"""That bench.footprint runs, and that every library which is there gives the right answer: python -m pytest bench"""

import sys

import pytest

from bench import footprint


@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
def test_every_library_that_is_installed_answers(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["footprint", "--quick"])
    footprint.main()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    there = [name for name, (distribution, *_) in footprint.LIBRARIES.items() if footprint.installed(distribution)]
    assert [row[0].strip("| ") for row in rows[1:]] == there
    assert {"numpy", "fastbn"} <= {*there}
    for _, _, seconds, megabytes, *_ in rows[1:]:
        assert float(seconds) > 0 < float(megabytes)


def test_a_library_that_fails_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(footprint.LIBRARIES, "broken", ("numpy", "import numpy", "numpy.load('nothing.npy')"))
    with pytest.raises(RuntimeError, match=r"^broken: FileNotFoundError"):
        footprint.measure("broken", tmp_path)
