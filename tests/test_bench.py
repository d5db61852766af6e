"""The benchmarks' arithmetic on made-up measurements, and the checks that come before a timing."""

import itertools
import json
import math
import os
import sys
import time
import warnings
from fractions import Fraction

import numpy as np
import pytest
from test_data import write_idx

import fastbn
from bench import curves, exactness, folded, limit, overview, pictures, report, results, step, training, tune, workers
from bench import machine as described
from bench.cases import LAYOUTS, OPERATIONS, Arrays, Case, arrays
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
    assert (s.seconds, s.copies, s.passes, s.peer, s.peer_seconds, s.ratio) == (1, 2, None, "quick", 2, 2)


def test_what_numpy_users_write_is_a_peer_but_no_library():
    s = results.summary(row(fastbn=[2.0], numba=[1.0], NumPy=[9.0], numexpr=[8.0], JAX=[6.0], copy=[1.0]))
    assert (s.peer, s.ratio, s.library, s.library_ratio) == ("numba", 0.5, "JAX", 3)
    rows = [row((n, 64), fastbn=[2.0], numba=[n], JAX=[3 * n], copy=[1.0]) for n in (1.0, 4.0)]
    ratios = {what: results.geometric_mean(some.values()) for what, some in results.against(rows).items()}
    assert ratios == pytest.approx({"the best peer": 1, "the best library": 3})


def test_without_peers_there_is_no_ratio():
    alone = row(fastbn=[1.0], copy=[1.0])
    assert results.summary(alone)[5:] == (None, None, None, None, None)
    assert "| none |  |  | none |  |" in results.table([alone])


LOOPS = {
    "limit sums: one, v3": [4.0, 4.0, 4.0],
    "limit sums: two, v4": [3.0, 2.0, 3.0],
    "limit y: one, v3": [1.0, 3.0, 1.0],
    "limit y: slow, v3": [9.0, 9.0, None],
    "limit gradients: one, v3": [5.0, 5.0, 5.0],
    "limit dx: one, v3": [2.0, 2.0, 2.0],
}


@pytest.mark.parametrize(("operation", "seconds"), [("train", 4), ("infer", 1), ("backward", 7)])
def test_a_limit_is_the_fastest_loop_of_each_pass(operation, seconds):
    s = results.summary(row(operation=operation, fastbn=[8.0, 8.0, 8.0], copy=[1.0, 1.0, 1.0], **LOOPS))
    assert (s.limit_seconds, s.peer, s.library) == (seconds, None, None)
    assert s.limit == {"train": 2, "infer": 8, "backward": 8 / 7}[operation]
    assert s.at_limit is (operation == "backward")
    assert "2.00, over" in results.table([row(fastbn=[8.0, 8.0, 8.0], copy=[1.0, 1.0, 1.0], **LOOPS)])


def test_a_short_call_may_take_some_time_beside_its_loops():
    for ours, at_limit in ((2.6e-6, True), (2.7e-6, False)):
        s = results.summary(row(operation="infer", fastbn=[ours], copy=[1e-6], **{"limit y: one, v3": [1e-6]}))
        assert s.at_limit is at_limit


def test_without_a_compiler_there_is_no_limit():
    s = results.summary(row(fastbn=[1.0], copy=[1.0], **{"limit y: one, v3": [1.0]}))  # and no sums
    assert (s.limit, s.limit_seconds, s.at_limit) == (None, None, False)


def test_short_rows_are_folded():
    assert limit.view(Case((100_000, 3))) == (3125, 96, 1)
    assert limit.view(Case((8, 3, 224, 224), True)) == (12544, 96, 1)
    assert limit.view(Case((64, 512, 7, 7))) == (64, 512, 49)
    assert limit.view(Case((7, 3))) == (7, 3, 1)  # too few to fold
    for shape, last in LAYOUTS:
        rows, features, run = limit.view(Case(shape, last))
        assert rows * features * run == np.prod(shape)
        assert run > 1 or features >= 64


@pytest.mark.parametrize(("operation", "passes"), [("train", 2 + 4), ("infer", 4), ("backward", 3 * 2 + 4)])
def test_passes_are_reads_by_the_faster_read_and_one_copy(operation, passes):
    measured = {"fastbn": [12.0], "copy": [4.0], "read (np.dot)": [2.0], "read (np.max)": [3.0]}
    s = results.summary(row(operation=operation, **measured))
    assert s.passes == 12 / passes
    assert s.peer is None
    on_two_threads = results.summary(row(operation=operation, **measured, **{"copy, one thread": [6.0]}))
    assert (on_two_threads.passes, on_two_threads.copies) == (12 / passes, 2)


def test_geometric_mean():
    assert results.geometric_mean([2, 8]) == pytest.approx(4)


def test_a_table_prints_losses_like_the_rest_and_the_worst_below():
    rows = [
        row((1, 2), fastbn=[1e-6], copy=[5e-7], quick=[8e-6]),
        row((3, 4), fastbn=[1e-6], copy=[5e-7], numba=[5e-7], quick=[2e-6], failed={"other": "wrong"}),
    ]
    lines = results.table(rows).splitlines()
    assert lines[2] == "| (1, 2) | 1.0 | 2.00 |  | quick | 8.0 | 8.00 | quick | 8.00 |"
    assert lines[3] == "| (3, 4) | 1.0 | 2.00 |  | numba | 0.5 | **0.50, slower** | quick | 2.00 |"
    assert lines[5] == "Against the best peer: geometric mean 2.00, worst 0.50 at (3, 4)."
    assert lines[7] == "Against the best library: geometric mean 4.00, worst 2.00 at (3, 4)."
    assert lines[-1] == "Left out, other at (3, 4): wrong"


def test_a_short_table_names_its_peers():
    lines = results.short_table([row(fastbn=[1e-6], copy=[1e-6], numba=[5e-7])], ("numba", "gone")).splitlines()
    assert lines[0] == "| shape | operation | us | of a copy | numba | ratio | gone | ratio |"
    assert lines[2] == "| (32, 64) | train | 1.0 | 1.00 | 0.5 | **0.50, slower** |  |  |"


def a_report():
    """A report of one shape."""
    rows = [
        row(operation=o, preallocated=p, fastbn=[1.0], copy=[0.5], numba=[0.33], JAX=[2.0]) for o, p in results.COLUMNS
    ]
    about = {"processor": "P", "family": "made-up", "processors": 2, "l2_bytes": 2**19, "l3_bytes": 2**25}
    about |= {"l3_sharers": None, "usable_bytes": 2**24, "system": "S", "libc": "glibc 2", "build": "v3", "load": None}
    about["versions"] = {"numpy": "2", "torch": None}
    settings = dict.fromkeys(report.SETTINGS, rows[:1])
    return {"machine": about, "launches": 3, "loops": ["v3"], "rows": {"1": rows, "2": rows}, "settings": settings}


def test_a_report_is_written_and_drawn_again_from_its_json(tmp_path):
    report.write(a_report(), tmp_path)
    text = (tmp_path / "speed.md").read_text()
    assert text.count("**0.33, slower**") == 8 + 3
    assert "over the rounds of\n3 launches are printed" in text
    assert "family made-up, 2 processors; L2 0.5 MB, L3 32 MB shared by an unknown number of processors" in text
    assert "C library glibc 2;" in text
    assert "not installed: torch" in text
    assert (tmp_path / "speed.png").read_bytes().startswith(PNG)
    report.write(json.loads((tmp_path / "speed.json").read_text()), tmp_path)
    assert (tmp_path / "speed.md").read_text() == text


def test_a_report_goes_into_the_folder_of_the_family(tmp_path, monkeypatch):
    monkeypatch.setattr(described, "RESULTS", tmp_path)
    monkeypatch.setattr(described, "caches", lambda: {"family": "made-up"})
    (tmp_path / "made-up").mkdir()
    (tmp_path / "made-up" / "speed.json").write_text(report.compact(a_report()))
    monkeypatch.setattr(sys, "argv", ["report", "--redraw"])
    report.main()
    assert sorted(p.name for p in (tmp_path / "made-up").iterdir()) == ["speed.json", "speed.md", "speed.png"]


def test_families_stand_side_by_side():
    two = {"made-up": a_report(), "other": a_report()}
    lines = overview.table(two).splitlines()
    column = "training forward, preallocated | 0.33 (without numba) | 0.33 at (32, 64) | 2.00 | 2.00 at (32, 64)"
    assert lines[2] == f"| [made-up](speed-made-up.md) | {column} | not measured |"
    assert len(lines) == 2 + 2 * 4 + 2 * 2
    for r in two["other"]["rows"]["1"]:
        r["seconds"] |= {name: values[:1] for name, values in LOOPS.items()}
    assert overview.table(two).splitlines()[6].endswith("| 1 of 1 |")


@pytest.mark.skipif(not overview.RESULTS.exists(), reason="an sdist has no results")
def test_the_site_has_what_the_reports_say():
    """`python -m bench.overview` writes it."""
    page = overview.PAGE.read_text()
    assert overview.updated(page, overview.table(overview.reports())) == page
    for family in overview.reports():
        assert overview.PAGE.with_name(f"speed-{family}.md").read_text() == overview.family_page(family)


def test_what_the_machine_is():
    known = described.caches()
    assert known["family"]
    assert known["usable_bytes"] > 0
    assert described.megabytes(None) == "unknown"


def test_curves_are_drawn(tmp_path):
    sizes = {"fastbn train": {"bytes": [2**14, 2**30], "ns": [1, 2]}, "np.copyto": {"bytes": [2**14], "ns": [1]}}
    pictures.curves(sizes, {"fastbn train": {"threads": [1], "speed": [1.0]}}, tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes().startswith(PNG)
    assert [pictures.readable(size) for size in (curves.SIZES[0], curves.SIZES[-1])] == ["16 KB", "1 GB"]


# --- what is timed


@pytest.mark.parametrize("name", ["fastbn", "NumPy", "numba", "numexpr"])
def test_every_case_passes_its_check(name):
    if PEERS[name].missing:
        pytest.skip(PEERS[name].missing)
    for (shape, last), operation, dtype, preallocated, offset in itertools.product(
        TINY, OPERATIONS, ("float32", "float64"), (True, False), (None, 0, 16)
    ):
        if case := PEERS[name].exactly(Case(shape, last, operation, dtype, preallocated, offset)):
            prepare(name, case)()


@pytest.fixture(scope="module")
def every_loop(tmp_path_factory):
    """Those that the report takes, and the plain ones."""
    if limit.compiler() is None:
        pytest.skip("there is no C compiler")
    return [*limit.loops(), *limit.build("plain", tmp_path_factory.mktemp("loops"))]


@pytest.mark.parametrize("shape", [(13, 77), (5, 3, 7, 11)])
def test_the_loops_that_set_the_limit_do_the_whole_work(shape, every_loop):
    case = Case(shape, offset=16)
    a = arrays(case)
    features = shape[1]
    axes = tuple(i for i in range(a.x.ndim) if i != 1)
    x, dy = (array.astype(np.float64) for array in (a.x, a.dy))
    layout = "rows" if x.ndim == 2 else "planes"
    expected = {  # all parameters are 0.5
        "sums": (x.sum(axes), (x * x).sum(axes)),
        "gradients": (dy.sum(axes), (dy * (x - 1) * 0.5).sum(axes)),
        "y": ((x - 0.5) * 0.5 + 0.5,),
        "dx": (((dy - 0.5) - (x - 1) * 0.5) * 0.5,),
    }
    tried = [loop for loop in every_loop if loop.layout == layout]
    assert {loop.task for loop in tried} == set(expected)
    for loop in tried:
        prepared = limit.Prepared(loop, case)
        prepared.out.fill(np.nan)
        prepared()
        right = (x * 0.5 + 0.5,) if loop.name == "two parameters" else expected[loop.task]
        got = prepared.sums[:, :features] if loop.task in ("sums", "gradients") else (prepared.out,)
        for part, value in zip(got, right, strict=True):
            np.testing.assert_allclose(part, value, 1e-5, 1e-5, err_msg=str(loop))


def test_where_arrays_start():
    assert {Arrays((50, 4), False, "float32", offset).x.ctypes.data % 4096 for offset in (0, 16)} == {0, 16}


def test_a_check_sees_what_is_wrong():
    a = Arrays((50, 4), False, "float32", 0)
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


@pytest.mark.long
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


def test_other_arrays_are_touched_before_a_cold_call():
    seen = []
    others = workers.other_arrays(80)
    call = workers.Cold(lambda: seen.append(others[-1]), 80)
    assert call.seconds(3) >= 0
    assert np.diff(seen).tolist() == [1, 1]
    assert workers.burst(call, 8) >= 0
    assert len(seen) == 3 + 2 + 8


def test_a_contest_leaves_out_what_is_wrong_and_what_is_slow():
    before = dict(os.environ)
    worker = workers.Worker(1, workers.environment(7))
    assert dict(os.environ) == before
    entrants = {
        "first": workers.Entrant(worker, slow_with_seven_threads, (1e-4,), leaves="peer"),
        "slow": workers.Entrant(worker, slow, (2e-2,), leaves="peer"),
        "kept": workers.Entrant(worker, slow, (2e-2,)),
        "wrong": workers.Entrant(worker, wrong, ()),
    }
    times, failed = workers.contest(entrants, rounds=4, seconds=1e-3)
    worker.close()
    assert {name: len(values) for name, values in times.items()} == {"first": 4, "slow": 2, "kept": 4}
    assert failed == {"wrong": "AssertionError: not what float64 gives"}
    assert all(value >= 1e-4 for value in times["first"])


# --- exactness


def test_digits_and_errors():
    """Numbers with closed forms: (-1, 0, 1) has the variance 2/3."""
    x = np.array([[-1.0], [0.0], [1.0]])
    mean, var = exactness.exact_statistics(x[:, 0] + 3)
    assert (mean, var) == (3, Fraction(2, 3))
    assert exactness.digits(3.0, mean) == 15.95
    assert exactness.digits(3.003, mean) == pytest.approx(3)
    assert exactness.digits(float("nan"), mean) == 0
    assert abs(exactness.root(Fraction(2)) ** 2 - 2) < Fraction(1, 10**60)
    y = x * math.sqrt(1.5)
    assert exactness.worst_error(y, x, 0) < 1
    y[2] += 7 * 2.0**-53 * (1 + y[2])
    assert 5.5 < exactness.worst_error(y, x, 0) < 8.5
    y[0] = np.inf
    assert exactness.worst_error(y, x, 0) == np.inf


def test_the_page_of_exactness_is_of_these_libraries(monkeypatch):
    kept = {name: exactness.LIBRARIES[name] for name in ("fastbn", "NumPy")}
    monkeypatch.setattr(exactness, "LIBRARIES", kept)
    few = {name: exactness.nist.DATA_SETS[name] for name in ("Mavro", "NumAcc1")}
    monkeypatch.setattr(exactness.nist, "DATA_SETS", few)
    far = np.random.default_rng(0).standard_normal((50, 2)) + 1e5
    monkeypatch.setattr(exactness, "batches", lambda dtype: {"far": far.astype(dtype)})
    page = exactness.page()
    assert "| NumAcc1 (3) | 15.9, 15.9 | 15.9, 15.9 |" in page
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| far")]
    assert len(rows) == 2
    assert all(float(row[1]) < 5 < float(row[2].rstrip(" |")) for row in rows)
    if not exactness.PAGE.exists():
        return  # tests beside an installed wheel have no pages
    committed = exactness.PAGE.read_text(encoding="utf-8")
    assert [line for line in committed.splitlines() if line.startswith("##")] == [
        line for line in page.splitlines() if line.startswith("##")
    ]
