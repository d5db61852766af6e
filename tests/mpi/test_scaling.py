"""bench.scaling from end to end, on two ranks: its figures mean nothing, its tables are whole."""

import json
import os
import subprocess
import sys

import pytest
from test_mpi import ENVIRONMENT, LIMIT, MPIEXEC, ROOT

for package in ("matplotlib", "scipy"):
    pytest.importorskip(package)

pytestmark = pytest.mark.skipif(MPIEXEC is None, reason="there is no mpiexec")


def test_it_measures_and_reports(tmp_path):
    command = [sys.executable, "-m", "bench.scaling", "--quick", "--output", tmp_path]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=LIMIT
    )
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"scaling.md", "scaling.png", "scaling.json"}
    text = (tmp_path / "scaling.md").read_text(encoding="utf-8")
    assert text.strip() in done.stdout
    tables = [section.count("\n| digits |") for section in text.split("\n## ")[1:]]
    of_norms, of_ranks, of_ways = 4, 3, 4  # rows of the one network
    assert tables == [of_norms, of_norms, of_norms, of_ranks, of_ways, of_ways]
    measured = json.loads((tmp_path / "scaling.json").read_text())
    assert all(s > 0 for part in ("steps", "wire", "work") for row in measured[part] for s in row["seconds"])
