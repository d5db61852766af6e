"""The benchmarks' arithmetic on made-up measurements, and the checks that come before a timing."""

import itertools
import json
import os
import time
import warnings

import numpy as np
import pytest
from test_data import write_idx

import fastbn
from bench import curves, folded, pictures, report, results, step, training, tune, workers
from bench.cases import OPERATIONS, Arrays, Case, arrays
from bench.peers import PASSES, PEERS, Peer, prepare, prepare_pass
from fastbn import kernels
from fastbn.kernels import families, machine

TINY = [((5, 3), False), ((4, 3, 2), False), ((3, 4, 2, 5), False), ((3, 4, 2, 5), True)]
PNG = b"\x89PNG\r\n\x1a\n"


def row(shape=(32, 64), operation="train", preallocated=True, failed=None, **seconds):
    return {
        "shape": shape,
        "channels_last": False,
        "operation": operation,
        "preallocated": preallocated,
        "seconds": seconds,
        "failed": failed or {},
    }


# --- arithmetic


def test_a_ratio_is_the_median_of_the_rounds_that_both_took_part_in():
    assert results.ratio([2, 8, 6], [1, 2, 2]) == 3
    assert results.ratio([2, 9, None, 7], [1, 3, 100, None]) == 2.5


def test_launches_are_added_up_round_by_round():
    r = results.row(Case((32, 64)))
    results.add_rounds(r, {"a": [1.0, 2.0], "b": [3.0]}, {"c": "why"}, 2)
    results.add_rounds(r, {"b": [4.0, 5.0], "d": [6.0, 7.0]}, {"a": "not"}, 2)
    n = None
    assert r["seconds"] == {"a": [1, 2, n, n], "b": [3, n, 4, 5], "d": [n, n, 6, 7]}
    assert r["failed"] == {"c": "why", "a": "not"}
    assert (results.median(r["seconds"]["b"]), results.ratio(r["seconds"]["a"], r["seconds"]["b"])) == (4, 1 / 3)


def test_a_slow_round_weighs_on_both_sides_alike():
    assert results.ratio([3, 30, 3], [1, 10, 1]) == 3


def test_the_best_peer_is_the_one_with_the_smallest_ratio():
    s = results.summary(row(fastbn=[1, 2, 1], slow=[9, 9, 9], quick=[2, 4, 2], copy=[0.5, 1, 0.5]))
    assert s == (1, 2, None, "quick", 2, 2, None)


def test_without_peers_there_is_no_ratio():
    alone = row(fastbn=[1.0], copy=[1.0])
    assert results.summary(alone)[3:] == (None, None, None, None)
    assert "| none |  |  |  |" in results.table([alone])


@pytest.mark.parametrize(("operation", "passes"), [("train", 2 + 4), ("infer", 4), ("backward", 3 * 2 + 4)])
def test_passes_are_reads_by_the_faster_read_and_one_copy(operation, passes):
    measured = {"fastbn": [12.0], "copy": [4.0], "read (np.dot)": [2.0], "read (np.max)": [3.0]}
    s = results.summary(row(operation=operation, **measured))
    assert s.passes == 12 / passes
    assert s.peer is None
    on_two_threads = results.summary(row(operation=operation, **measured, **{"copy, one thread": [6.0]}))
    assert (on_two_threads.passes, on_two_threads.copies) == (12 / passes, 2)
    beside_a_peer = results.summary(row(operation=operation, peer=[18.0], **measured))
    assert (beside_a_peer.ratio, beside_a_peer.allowed) == (18 / 12, 18 / passes)


def test_geometric_mean():
    assert results.geometric_mean([2, 8]) == pytest.approx(4)


def test_a_table_prints_losses_like_the_rest_and_the_worst_below():
    rows = [
        row((1, 2), fastbn=[1e-6], copy=[5e-7], quick=[8e-6]),
        row((3, 4), fastbn=[1e-6], copy=[5e-7], quick=[5e-7], failed={"other": "wrong"}),
    ]
    lines = results.table(rows).splitlines()
    assert lines[2] == "| (1, 2) | 1.0 | 2.00 |  | quick | 8.0 | 8.00 |  |"
    assert lines[3] == "| (3, 4) | 1.0 | 2.00 |  | quick | 0.5 | **0.50, slower** |  |"
    assert lines[5] == "Geometric mean 2.00, worst 0.50 at (3, 4)."
    assert lines[-1] == "Left out, other at (3, 4): wrong"


def test_a_report_is_written_and_drawn_again_from_its_json(tmp_path):
    rows = [row(operation=o, preallocated=p, fastbn=[1.0], copy=[0.5], x=[0.33]) for o, p in results.COLUMNS]
    machine = {"processor": "P", "processors": 2, "cache": 2**25, "system": "S", "build": "v3", "load": None}
    machine["versions"] = {"numpy": "2", "torch": None}
    report.write({"machine": machine, "launches": 3, "rows": {"1": rows, "2": rows}}, tmp_path)
    text = (tmp_path / "speed.md").read_text()
    assert text.count("**0.33, slower**") == 8
    assert "over\nthe rounds of 3 launches are printed" in text
    assert "not installed: torch" in text
    assert (tmp_path / "speed.png").read_bytes().startswith(PNG)
    report.write(json.loads((tmp_path / "speed.json").read_text()), tmp_path)
    assert (tmp_path / "speed.md").read_text() == text


def test_curves_are_drawn(tmp_path):
    sizes = {"fastbn train": {"bytes": [2**14, 2**30], "ns": [1, 2]}, "np.copyto": {"bytes": [2**14], "ns": [1]}}
    pictures.curves(sizes, {"fastbn train": {"threads": [1], "speed": [1.0]}}, tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes().startswith(PNG)
    assert [pictures.readable(size) for size in (curves.SIZES[0], curves.SIZES[-1])] == ["16 KB", "1 GB"]


# --- what is timed


@pytest.mark.parametrize("name", ["fastbn", "NumPy"])
def test_every_case_passes_its_check(name):
    for (shape, last), operation, dtype, preallocated, aligned in itertools.product(
        TINY, OPERATIONS, ("float32", "float64"), (True, False), (True, False)
    ):
        prepare(name, Case(shape, last, operation, dtype, preallocated, aligned))()


def test_a_check_sees_what_is_wrong():
    a = Arrays((50, 4), False, "float32", aligned=True)
    assert a.x.ctypes.data % 64 == 0
    right = [part.astype(np.float32) for part in a.expected("backward")]
    right[0] = np.ascontiguousarray(right[0].T)
    a.check("backward", tuple(right))
    for k in range(3):
        wrong = [part.copy() for part in right]
        wrong[k].flat[1] += 0.1 * (1 if k == 0 else 50)
        with pytest.raises(AssertionError):
            a.check("backward", tuple(wrong))
    with pytest.raises(AssertionError):
        a.check("train", (a.x,))


def test_a_stale_result_does_not_pass(monkeypatch):
    case = Case((5, 3))
    prepare("fastbn", case)  # leaves the right y behind
    idle = Peer("idle", ["fastbn"], lambda case, a: (lambda: a.y, lambda y: (y,)))
    monkeypatch.setitem(PEERS, "idle", idle)
    with pytest.raises(AssertionError):
        prepare("idle", case)


@pytest.mark.parametrize("threads", [1, 3])
def test_passes_copy_and_read_everything(threads):
    case = Case((50, 7), threads=threads)
    a = arrays(case)
    a.y.fill(0)
    prepare_pass("copy", case)()
    assert (a.y == a.x).all()
    parts = prepare_pass("read (np.dot)", case)()
    np.testing.assert_allclose(np.sum(parts), np.sum(a.x.astype(np.float64) ** 2), 1e-5)
    assert np.max(prepare_pass("read (np.max)", case)()) == a.x.max().view(np.int32)
    assert set(PASSES) <= set(results.PASSES)


def test_a_training_step_runs(monkeypatch):
    monkeypatch.setitem(step.STEPS, "tiny", (8, (5, 4, 3, 2)))
    before = fastbn.get_num_threads()
    step.prepare("tiny", before)()
    assert fastbn.get_num_threads() == before


@pytest.mark.parametrize("name", folded.NETWORKS)
def test_a_network_and_its_folded_one_are_timed(name):
    with fastbn.threads(1):
        before, after, ratio = folded.compare(name, 4, 1, 2)
    assert min(before, after, ratio) > 0
    shapes = [[p.shape for p in layer.params.values()] for layer in folded.NETWORKS[name](*folded.WIDTHS).folded()]
    assert [weight for weight, _ in shapes] == [(256, 784), (128, 256), (10, 128)]


def test_whole_trainings_are_timed_and_tested(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    rng = np.random.default_rng(0)
    for part, n in (("train", 600), ("t10k", 60)):
        y = rng.integers(0, 3, n, dtype=np.uint8)
        images = rng.integers(0, 60, (n, 2, 3), dtype=np.uint8)
        images[np.arange(n), 0, y] += 180
        for name, array in (("images-idx3", images), ("labels-idx1", y)):
            write_idx(tmp_path / f"{part}-{name}-ubyte", array)
    monkeypatch.setattr(training, "alone", lambda threads, function, *rest: training._quietly(function, *rest))
    contestants = {name: (training.images, (str(tmp_path), 4)) for name in ("fastbn", "MLPClassifier")}
    with warnings.catch_warnings():
        training.compare("made up", 1, 2, contestants)
    title, _, *lines = capsys.readouterr().out.strip().splitlines()
    assert title == "made up, threads: 1, rounds: 2"
    assert [line.split()[0] for line in lines] == list(contestants)
    assert lines[0].split()[2:4] == ["1.00", "x"]
    assert all(0.9 <= float(line.split()[-2].rstrip("%")) / 100 <= 1 for line in lines)


# --- tuning

KB, MB = 2**10, 2**20


def made_up(operation, nbytes, threads=1):
    """Seconds of a call on a processor whose best settings are known."""

    def call():
        s, t = machine.get_settings(), 1.0
        written, read = nbytes, nbytes * {"train": 1, "infer": 0, "backward": 2}[operation]
        everything = nbytes * {"train": 2, "infer": 2, "backward": 3}[operation]
        if s["rows_at_once"] == 4 and everything <= s["rows_at_once_to_bytes"]:
            t *= 0.8 if everything <= 256 * KB else 1.5
        if s["read_ahead_bytes"] and read >= max(1, s["read_ahead_from_bytes"]):
            t *= (0.7 if s["read_ahead_bytes"] == 4096 else 0.9) if read >= MB else 1.3
        if written >= s["stream_inference_from_bytes" if operation == "infer" else "stream_from_bytes"]:
            t *= 0.6 if written >= (64 if operation == "infer" else 8) * MB else 2
        elif s["write_ahead_bytes"] and s["write_ahead_from_bytes"] <= written <= s["write_ahead_to_bytes"]:
            t *= (0.8 if s["write_ahead_bytes"] == 1024 else 0.9) if written >= 32 * MB else 1.2
        elements = nbytes // 4 * {"train": 2, "infer": 1, "backward": 4}[operation]
        if threads > 1 and elements >= s["parallel_from_elements"]:
            t *= 0.6 if elements >= 2**19 else 3
        return t

    return call


def test_tuning_finds_the_best_settings_of_a_made_up_processor(monkeypatch, capsys):
    monkeypatch.setattr(tune, "prepared", made_up)
    monkeypatch.setattr(tune, "repeats", lambda call, seconds: 1)
    monkeypatch.setattr(tune, "burst", lambda call, count: call())
    monkeypatch.setattr(tune.described, "processors", lambda: 2)
    before = machine.get_settings()
    entry = tune.tuned(tune.FULL)
    assert machine.get_settings() == before
    expected = {
        "rows_at_once": 4,
        "rows_at_once_to_bytes": 256 * KB,
        "read_ahead_bytes": 4096,
        "read_ahead_from_bytes": MB,
        "write_ahead_bytes": 1024,
        "write_ahead_from_bytes": 32 * MB,
        "write_ahead_to_bytes": families.NEVER_BYTES,
        "stream_from_bytes": 8 * MB,
        "stream_inference_from_bytes": 64 * MB,
        "parallel_from_elements": 2**19,
    }
    assert {name: entry.values[name] for name in expected} == expected
    # What is printed is Python, and makes a family with these settings.
    found = {}
    exec(tune.in_words(entry, "v3", "today"), vars(families) | {}, found)
    (family,) = found.values()
    assert family.models == families.FAMILIES[kernels.FAMILY].models
    assert {name: getattr(family, name) for name in expected} == expected


def test_tuning_takes_nothing_that_the_noise_explains(monkeypatch):
    """Every candidate is as fast as the first, give or take a tenth."""
    rng = np.random.default_rng(0)
    monkeypatch.setattr(tune, "prepared", lambda *arguments: None)
    monkeypatch.setattr(tune, "repeats", lambda call, seconds: 1)
    monkeypatch.setattr(tune, "burst", lambda call, count: rng.uniform(0.95, 1.05))
    found = tune.tuned(tune.FULL).values
    assert (found["rows_at_once"], found["read_ahead_bytes"], found["write_ahead_bytes"]) == (1, 0, 0)
    assert found["stream_from_bytes"] == found["stream_inference_from_bytes"] == families.NEVER_BYTES


def test_a_difference_counts_where_it_is_beyond_the_noise_and_most_rounds_agree():
    assert tune.beyond([0.9, 0.9, 0.9, 0.95, 1.1], 0.02) == 0.9
    assert tune.beyond([1.2, 1.2, 1.3, 1.3, 1.3], 0.02) == 1.3
    assert tune.beyond([0.9, 0.9, 0.9, 0.9, 0.9], 0.2) == 1
    assert tune.beyond([0.2, 0.2, 0.2, 1.1, 1.1], 0.02) == 1


def test_the_best_run_of_scores():
    assert tune.best_run([1, -1, -2, 0, 1], range(6), range(6)) == (1, 3)
    assert tune.best_run([-1, 2, -2, 0], [0], range(5)) == (0, 1)
    assert tune.best_run([1, -3, 1, -1], range(5), [4]) == (1, 4)
    assert tune.best_run([1, 0, 0], range(4), [3]) == (3, 3)


def test_tuning_runs(capsys):
    before = machine.get_settings()
    tune.tuned(tune.Effort(1, 1e-5, tune.SIZES[:1]))
    assert machine.get_settings() == before


# --- processes


def slow(seconds):
    return lambda: time.sleep(seconds)


def wrong():
    raise AssertionError("not what float64 gives")


def slow_with_seven_threads(seconds):
    assert os.environ["OMP_NUM_THREADS"] == "7"
    return slow(seconds)


def test_a_contest_leaves_out_what_is_wrong_and_what_is_slow():
    before = dict(os.environ)
    worker = workers.Worker(1, workers.environment(7))
    assert dict(os.environ) == before
    entrants = {
        "first": workers.Entrant(worker, slow_with_seven_threads, (1e-4,), may_leave=True),
        "slow": workers.Entrant(worker, slow, (2e-2,), may_leave=True),
        "kept": workers.Entrant(worker, slow, (2e-2,)),
        "wrong": workers.Entrant(worker, wrong, ()),
    }
    times, failed = workers.contest(entrants, rounds=4, seconds=1e-3)
    worker.close()
    assert {name: len(values) for name, values in times.items()} == {"first": 4, "slow": 2, "kept": 4}
    assert failed == {"wrong": "AssertionError: not what float64 gives"}
    assert all(value >= 1e-4 for value in times["first"])
