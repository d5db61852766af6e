import itertools
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time

import numpy as np
import pytest

from fastbn import nn, optim, plots
from fastbn.__main__ import main
from fastbn.data import Dataset
from fastbn.experiments import common, noise, paper, shift, speed, testtime

for package in ("joblib", "matplotlib", "sklearn", "tqdm"):
    pytest.importorskip(package)
threadpoolctl = pytest.importorskip("threadpoolctl")  # scikit-learn's


@pytest.fixture(autouse=True)
def one_thread():
    """As the experiments' processes have it: several on a busy machine wait for each other in every small product."""
    with threadpoolctl.threadpool_limits(1):
        yield


def run(capsys, *arguments):
    status = main(["experiment", *map(str, arguments)])
    shown = capsys.readouterr()
    return status, shown.out, shown.err


def refused(capsys, *arguments):
    """The one sentence on standard error of a command that fails."""
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("fastbn: error: ")
    assert err.count("\n") == 1
    return err


def blobs(n=300, classes=3, features=5):
    """Points about one corner of the unit cube for each class: easy to learn."""
    rng = np.random.default_rng(0)
    y = np.arange(n) % classes
    X = np.clip(0.8 * np.eye(classes, features)[y] + rng.uniform(0, 0.2, (n, features)), 0, 1)
    return Dataset(X.astype(np.float32), y, np.arange(classes), "blobs")


def text(cell, form, missing):
    """A cell of the JSON file as the table should print it."""
    if isinstance(cell, list):
        ordered = sorted(np.inf if value is None else value for value in cell)
        middle = (ordered[(len(cell) - 1) // 2] + ordered[len(cell) // 2]) / 2
        low, median, high = (missing if np.isinf(v) else format(v, form) for v in (ordered[0], middle, ordered[-1]))
        return median if low == high else f"{median} ({low} to {high})"
    return missing if cell is None else cell if isinstance(cell, str) else format(cell, form)


def check_files(folder, name, out, err):
    """The picture has a size to look at, and the table's numbers are those of the JSON file, which is returned."""
    assert sorted(path.name for path in folder.iterdir()) == [f"{name}.json", f"{name}.png"]
    picture = (folder / f"{name}.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", picture[16:24])
    assert 400 <= height < width <= 2000
    assert len(picture) < 150_000
    found = json.loads((folder / f"{name}.json").read_text(), parse_constant=pytest.fail)
    assert err == f"wrote {folder / name}.json, {folder / name}.png\n"
    *shown, end = out.splitlines()
    assert end == ""
    assert max(map(len, shown)) <= 100
    # Where the columns do not fit, the table goes on below, its first columns once more.
    rules = [i for i, line in enumerate(shown) if line and set(line) == {"-"}]
    heads = [re.split("  +", shown[rule - 1]) for rule in rules]
    labels = [name for i, name in enumerate(found["columns"]) if all(head[i : i + 1] == [name] for head in heads)]
    labels = labels if len(rules) > 1 else []
    assert sum((head[len(labels) :] for head in heads), labels) == list(found["columns"])
    for rule, head in zip(rules, heads, strict=True):
        for row, line in zip(found["rows"], shown[rule + 1 :], strict=False):
            cells = dict(zip(found["columns"], row, strict=True))
            expected = [text(cells[name], found["columns"][name], found["missing"]) for name in head]
            assert re.split("  +", line) == expected
        assert shown[rule + 1 + len(found["rows"])] == ""
    for panel in found["panels"]:  # one colour for one network, in all pictures
        for curve in panel["curves"]:
            assert curve["colour"] == common.COLOURS.get(curve["name"], curve["colour"]) is not None
    return found


def result(rows, columns, panels=()):
    return common.Result("name", "title", {"seeds": 2}, columns, rows, list(panels), ["A remark of many words. " * 9])


def test_a_wide_table_goes_on_below_and_says_the_same():
    columns = {"network": "", "rate": "g", **{f"quantity {i}": ".3f" for i in range(7)}}
    rows = [["with", 0.1, *([i, i + 0.5] for i in range(7))], ["without", 1, *([None, -i / 3] for i in range(7))]]
    shown = result(rows, columns).table().splitlines()
    assert max(map(len, shown)) <= 100
    heads = [line.split("  ") for line in shown if line.startswith("network")]
    assert len(heads) > 1
    found = {}
    for i, line in enumerate(shown):
        if line.startswith("network"):
            for below in shown[i + 2 : i + 4]:
                network, rate, *cells = re.split("  +", below)
                found.setdefault((network, rate), []).extend(cells)
    assert found["with", "0.1"] == [f"{i + 0.25:.3f} ({i:.3f} to {i + 0.5:.3f})" for i in range(7)]
    assert found["without", "1"] == [f"- ({-i / 3:.3f} to -)" for i in range(7)]
    # What fits stays one table.
    assert (
        sum(
            set(line) == {"-"}
            for line in result([["with", 0.1, [1, 2]]], dict([*columns.items()][:3])).table().splitlines()
        )
        == 1
    )


def test_nothing_in_a_picture_touches():
    """Legend beside panels, tick labels beside each other, texts beside texts; boxes as matplotlib drew them."""
    names = [*common.COLOURS][::2]
    ticks = [*shift.RECOLOURED], [*map(str, testtime.MOMENTA), "None"]
    drawn = [
        plots.Panel("Recoloured images, statistics re-estimated", "Step", "Moved by, in standard deviations", [
            common.curve(name, texts, [[i or None, None, 0.5] for i in range(len(texts))]) for name in names
        ], percent=i == 1, ylim=(0, 1), missing="not within 2,000 steps")
        for i, texts in enumerate((*ticks, *ticks))
    ]  # fmt: skip
    for count in (4,):
        canvas = plots._canvas(drawn[:count])
        canvas.draw()
        figure = canvas.figure
        (legend,) = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == [*names, "not within 2,000 steps"]
        boxes = [legend.get_window_extent()]
        for axes in figure.axes:
            assert axes.get_legend() is None
            panel = axes.get_tightbbox()
            assert not any(panel.overlaps(box) for box in boxes)
            boxes.append(panel)
            labels = [label.get_window_extent() for label in axes.get_xticklabels()]
            assert len(labels) > 4
            assert all(a.x1 < b.x0 for a, b in itertools.pairwise(labels))
        inside = figure.bbox
        assert all(inside.x0 <= b.x0 and b.x1 <= inside.x1 and inside.y0 <= b.y0 and b.y1 <= inside.y1 for b in boxes)
        colours = [line.get_color() for line in legend.get_lines()]
        assert colours[:-1] == [common.COLOURS[name] for name in names]


@pytest.mark.long
def test_speed_end_to_end(tmp_path, capsys):
    status, out, err = run(capsys, "speed", "--quick", "--seeds", 2, "--out", tmp_path / "out")
    assert status == 0
    found = check_files(tmp_path / "out", "speed", out, err)
    assert found["settings"]["seeds"] == 2
    assert found["settings"]["data"] == "digits"
    rows = {(network, rate): rest for network, rate, *rest in found["rows"]}
    assert len(rows) == len(found["rows"]) == 12
    for needed, reached, diverged, best in rows.values():
        assert len(needed) == len(best) == 2
        assert reached == 2 - needed.count(None)
        assert 0 <= diverged <= 2 - reached or diverged == 0
        assert all(n is None or (0 < n <= 200 and n % 20 == 0) for n in needed)
        assert all(0 <= accuracy <= 1 for accuracy in best)
    # the claim, where it is plain even after 200 steps
    assert rows["batch normalization", 0.1][1] == 2
    assert rows["neither", 0.1][1] == 0


def test_paper_end_to_end(tmp_path, capsys):
    status, out, err = run(capsys, "speed", "--paper", "--quick", "--out", tmp_path)
    assert status == 0
    found = check_files(tmp_path, "paper", out, err)
    assert [panel["title"][:3] for panel in found["panels"]] == ["(a)", "(b)", "(c)"]
    accuracies = {c["name"]: c["y"] for c in found["panels"][0]["curves"]}
    assert accuracies["with batch normalization"][-1] > accuracies["without batch normalization"][-1]
    for panel in found["panels"][1:]:
        (curve,) = panel["curves"]
        assert curve["x"] == [50, 100, 150, 200, 250, 300]
        assert np.all(np.diff([curve["low"], curve["y"], curve["high"]], axis=0) > 0)
        *_, first, last = found["rows"][0 if "without" in curve["name"] else 1]
        assert first == [pytest.approx(curve["high"][0] - curve["low"][0])]
        assert last == [pytest.approx(curve["high"][-1] - curve["low"][-1])]


def test_steps_to_an_accuracy():
    assert speed.steps_to(0.5, [0.5], every=10) == 0
    assert speed.steps_to(0.5, [0.1, 0.4, 0.6, 0.3, 0.9], every=7) == 14
    assert speed.steps_to(0.95, [0.1, 0.9], every=7) is None


def test_a_network_that_diverges_stops_there():
    dataset = blobs()
    pair = dataset.X, dataset.y
    accuracies = speed.learn(pair, pair, "neither", 1e30, 0, 40, 10)
    assert len(accuracies) < 5
    assert len(speed.learn(pair, pair, "batch normalization", 0.1, 0, 40, 10)) == 5


def test_a_class_that_is_only_held_out_has_an_output():
    dataset = blobs()
    seen = dataset.y < 2
    train, held_out = (dataset.X[seen], dataset.y[seen]), (dataset.X, dataset.y)
    assert max(speed.learn(train, held_out, "neither", 0.1, 0, 40, 10)) < 0.7


def test_the_networks_of_speed_start_alike():
    dataset = blobs()
    dense = {
        name: [layer for layer in speed.build(name, dataset.X, 3, 7) if isinstance(layer, nn.Dense)]
        for name in speed.NETWORKS
    }
    for a, b, he, c in zip(*dense.values(), strict=True):
        assert np.array_equal(a.params["weight"], b.params["weight"])
        assert np.array_equal(a.params["weight"], c.params["weight"])
        assert np.allclose(he.params["weight"], a.params["weight"] * np.sqrt(6), rtol=1e-6)
        assert not he.params["bias"].any()
    assert [d.n_out for d in dense["neither"]] == [100, 100, 100, 3]


def test_the_papers_percentiles_are_those_of_the_last_sigmoids_input():
    """Beside a network evaluated by hand after the same steps, without batch normalization."""
    rng = np.random.default_rng(0)
    X, y = rng.random((300, 5), dtype=np.float32), np.arange(300) % 3
    accuracies, percentiles = paper.learn((X, y), (X, y), "without", 5, 12, 6, False)
    assert percentiles.shape == (2, 3, 100)

    model = paper.build(False, 5, 3, 5)
    start = [layer.params for part in model for layer in part if isinstance(layer, nn.Dense)]
    assert [p["weight"].shape for p in start] == [(100, 5), (100, 100), (100, 100), (3, 100)]
    assert abs(start[1]["weight"].std() - paper.START) < 0.003
    assert not any(p["bias"].any() for p in start)
    order = np.concatenate([np.random.default_rng([5, epoch]).permutation(300) for epoch in range(1, 4)])
    W, b = zip(*((p["weight"].astype(float), np.zeros(len(p["weight"]))) for p in start), strict=True)
    for step in range(12):
        rows = order[60 * step : 60 * (step + 1)]
        a = [X[rows].astype(float)]
        for w, c in zip(W, b, strict=True):
            z = a[-1] @ w.T + c
            a.append(1 / (1 + np.exp(-z)))
        e = np.exp(z - z.max(axis=1, keepdims=True))
        dz = (e / e.sum(axis=1, keepdims=True) - np.eye(3)[y[rows]]) / 60
        for i in (3, 2, 1, 0):
            dw, dc, da = dz.T @ a[i], dz.sum(axis=0), dz @ W[i]
            W[i][...] -= paper.RATE * dw
            b[i][...] -= paper.RATE * dc
            dz = da * a[i] * (1 - a[i])
        if step in (5, 11):
            h = X.astype(float)
            for w, c in zip(W[:2], b[:2], strict=True):
                h = 1 / (1 + np.exp(-(h @ w.T + c)))
            z = np.sort(h @ W[2].T + b[2], axis=0)
            for k, share in enumerate((0.15, 0.5, 0.85)):
                at = share * 299
                expected = z[int(at)] + (at - int(at)) * (z[int(at) + 1] - z[int(at)])
                np.testing.assert_allclose(percentiles[step // 6, k], expected, atol=5e-6)
    right = np.argmax(1 / (1 + np.exp(-(h @ W[2].T + b[2]))) @ W[3].T + b[3], axis=1) == y
    assert accuracies[-1] == pytest.approx(right.mean(), abs=0.01)  # float32 beside float64


def test_looking_at_a_network_does_not_change_its_training():
    dataset = blobs()
    pair = dataset.X, dataset.y
    often, once = (paper.learn(pair, pair, "with", 5, 12, every, False) for every in (1, 12))
    assert often[0][-1:] == once[0]
    assert np.array_equal(often[1][-1:], once[1])
    often, once = (speed.learn(pair, pair, "batch normalization", 0.1, 5, 12, every) for every in (1, 12))
    assert often[::12] == once
    alone = dataset.X[:1], dataset.y[:1]  # one example is enough to look at: the running averages are used
    assert np.ptp(paper.learn(pair, alone, "with", 5, 12, 12, False)[1], axis=1).max() == 0


def test_the_papers_images_are_black_and_white():
    X, _ = paper.black_and_white((np.float32([[0, 0.49, 0.5, 1]]), np.array([0])))
    assert X.tolist() == [[0, 0, 1, 1]]
    assert X.dtype == np.float32


def test_medians_and_ranges():
    assert common.spread([3, 1, 2]) == (1, 2, 3)
    assert common.spread([4, 1, 2, 3]) == (1, 2.5, 4)
    assert common.spread([None, 1, 2]) == (1, 2, None)
    assert common.spread([None, 1]) == (1, None, None)
    drawn = common.curve("a", [0.1, 1], [[1, 2, 9], [None, None, 5]], style="o")
    assert drawn == plots.Curve("a", [0.1, 1], [2, None], [1, 5], [9, None], "o")
    assert common.curve("both", [1], [[1]]).colour == common.COLOURS["both"]


def test_calls_in_parallel_have_one_thread_each_and_keep_their_order():
    for calls in (1, 4):
        assert os.getpid() not in common.in_parallel(os.getpid, [()] * calls, progress=False)
        assert set(common.in_parallel(os.getenv, [("OMP_NUM_THREADS",)] * calls, progress=False)) == {"1"}
    assert common.in_parallel(pow, [(i, 2) for i in range(6)], progress=False) == [0, 1, 4, 9, 16, 25]


def test_noise_takes_as_many_steps_with_every_mini_batch(monkeypatch):
    """Also where one example is left over, which makes no step."""
    steps = []

    class Counting(optim.SGD):
        def step(self):
            steps[-1] += 1
            super().step()

    monkeypatch.setattr(noise.optim, "SGD", Counting)
    dataset = blobs(257)
    for size in (4, 256):
        steps.append(0)
        noise.learn((dataset.X, dataset.y), (dataset.X, dataset.y), "neither", size, 0, 20)
    assert steps == [20, 20]


def test_examples_are_drawn_by_seed():
    dataset = blobs()
    (X, y), (held_X, held_y) = common.prepare(dataset, 1, train=50, held_out=20)
    assert (X.shape, y.shape, held_X.shape, held_y.shape) == ((50, 5), (50,), (20, 5), (20,))
    assert not {row.tobytes() for row in X} & {row.tobytes() for row in held_X}
    assert np.array_equal(common.prepare(dataset, 1, train=50)[0][0], X)
    assert not np.array_equal(common.prepare(dataset, 2, train=50)[0][0], X)


def test_columns_that_float32_does_not_hold_are_refused():
    y = np.arange(20) % 2
    for column in (1.7e9 + 30 * np.arange(20), 1e60 * y, np.full(20, 1e60)):
        dataset = Dataset(np.c_[np.full(20, 0.1), y, column], y, np.arange(2), "d.csv", ("one", "two", "time"))
        with pytest.raises(ValueError, match=r"d\.csv: column 'time' loses its digits in float32"):
            common.prepare(dataset)
    common.prepare(Dataset(np.c_[np.full(20, 0.1), y / 3, 1e6 + y], y, np.arange(2), "d.csv"))


def test_bad_input_is_one_sentence_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(common, "in_parallel", lambda *_, **__: pytest.fail("training began"))
    out, file = tmp_path / "out", tmp_path / "file"
    file.write_text("here before")
    assert "no such file or folder" in refused(capsys, "speed", "--data", tmp_path / "none.npz", "--out", out)
    assert "not a folder that can be written to" in refused(capsys, "all", "--out", file / "deeper")
    X = np.full((4, 2), np.nan)
    np.savez(tmp_path / "nan.npz", X=X, y=np.arange(4) % 2)
    assert "X[0, 0] is nan" in refused(capsys, "speed", "--data", tmp_path / "nan.npz", "--out", out)
    np.savez(tmp_path / "no-y.npz", X=np.ones((4, 2)))
    assert "no labels to learn" in refused(capsys, "all", "--data", tmp_path / "no-y.npz", "--out", out)
    np.savez(tmp_path / "grey.npz", X=np.full((40, 2), 255.0), y=np.arange(40) % 2)
    assert "pixels from 0 to 1, got 255 to 255" in refused(
        capsys, "speed", "--paper", "--data", tmp_path / "grey.npz", "--out", out
    )
    for name in ("shift", "all"):  # before the first of all
        assert "grey.npz: this experiment" in refused(capsys, name, "--data", tmp_path / "grey.npz", "--out", out)
    for arguments, fault in (
        (("speed", "--out", ""), "expected a folder, got ''"),  # a variable that is not set
        (("speed", "--seeds", 0), "argument --seeds: expected a whole number of at least 1, got '0'"),
        (("noise", "--paper"), "argument --paper: for the experiment speed, got noise"),
    ):
        with pytest.raises(SystemExit):
            run(capsys, *arguments)
        assert fault in capsys.readouterr().err
    assert not out.exists()
    assert file.read_text() == "here before"


def living(group):
    """The processes of a group, without those that are dead and not yet reaped."""
    listed = subprocess.run(["ps", "-A", "-o", "pgid=,stat="], capture_output=True, text=True, check=True).stdout
    return sum(int(pgid) == group and "Z" not in stat for pgid, stat in map(str.split, listed.splitlines()))


@pytest.mark.skipif(os.name == "nt" or not shutil.which("ps"), reason="needs ps, and signals to a group of processes")
def test_ctrl_c_is_one_line_and_leaves_no_process(tmp_path):
    command = [sys.executable, "-m", "fastbn", "experiment", "speed", "--out", str(tmp_path / "out")]
    with subprocess.Popen(command, start_new_session=True, stdout=-1, stderr=-1, text=True) as process:
        while living(process.pid) < 3 and process.poll() is None:  # the workers are there
            time.sleep(0.2)
        time.sleep(0.5)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err == "fastbn: interrupted in speed, which is not written\n"
    assert not (tmp_path / "out").exists()
    deadline = time.monotonic() + 20
    while living(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert living(process.pid) == 0
