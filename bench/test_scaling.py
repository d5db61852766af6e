"""The model of bench.scaling: on made-up constants, and beside what a training exchanges: python -m pytest bench"""

import math
from collections import Counter

import numpy as np
import pytest

from bench import pictures, ranks, scaling
from bench.ranks import APART, GHOSTS, NORMS, SYNC
from bench.scaling import Compute, Costs, Wire, Work
from fastbn import losses, optim, parallel, training

WIRE = Wire(latency=1.0, per_byte=1e-3)
NOTHING, AT_ONCE = Work(0, 0, 0, 0), Compute(0, 0, 0)


@pytest.fixture
def tiny(monkeypatch):
    """A network of 5 + 3 features, and 6*5 + 5*3 + 3*2 + 2 = 53 parameters but for those of normalization."""
    monkeypatch.setitem(ranks.NETWORKS, "tiny", (6, 5, 3, 2))


def costs(compute=AT_ONCE, **work):
    names = {"sync": SYNC, "ghosts": GHOSTS}
    given = {names.get(name, name): w for name, w in work.items()}
    return Costs(
        {("tiny", norm): compute for norm in NORMS},
        dict.fromkeys(("header", SYNC, GHOSTS, "gradients"), NOTHING) | given,
    )


@pytest.mark.parametrize(("norm", "extra"), [("none", 8), (SYNC, 0), (GHOSTS, 16), (APART, 16)])
@pytest.mark.parametrize("size", [2, 8])
def test_messages_cost_what_their_number_and_bytes_say(size, norm, extra, tiny):
    found = scaling.step("tiny", norm, size, 64, costs(), WIRE)
    short = math.log2(size) + 0.512 * (size - 1)
    assert found["loss and end"] == pytest.approx(2 * short)
    assert found["gradients"] == pytest.approx(short + math.log2(size) + 8e-3 * (54 + extra) / 2 * (size - 1))
    statistics = {
        SYNC: 2 * (2 * short + 2 * math.log2(size)) + 8 * 40e-3 * (size - 1),
        GHOSTS: 2 * (2 * short + math.log2(size)) + 8 * 2 * 24e-3 * (size - 1),
    }
    assert found["statistics"] == pytest.approx(statistics.get(norm, 0))
    assert found["compute"] == found["slowest rank"] == 0


def test_work_is_of_ranks_and_numbers(tiny):
    work = Work(1000, 100, 10, 1)
    of_layer = {2: 1000 + 20 + 5 * (100 + 2), 8: 1000 + 80 + 5 * (100 + 8)}
    assert {k: work.seconds(k, 5) for k in of_layer} == of_layer
    free = Wire(0, 0)
    found = scaling.step("tiny", SYNC, 8, 64, costs(sync=work), free, shared=2)
    assert found["statistics"] == 2 * (2 * 1080 + 8 * 108)
    # Each of two ghost batches of 8 ranks is merged as a rank is.
    assert scaling.step("tiny", GHOSTS, 8, 64, costs(ghosts=work), free)["statistics"] == 2 * 1160 + 8 * 116
    assert scaling.step("tiny", SYNC, 8, 64, costs(gradients=work), free)["gradients"] == 1080 + 53 * 108
    assert scaling.step("tiny", SYNC, 8, 64, costs(header=work), free)["loss and end"] == 2 * 1080


def test_slices_are_received_twice_whatever_the_number_of_ranks(tiny, monkeypatch):
    monkeypatch.setattr(scaling, "SLICED_FROM", 8 * 15)  # three times the 5 features of one layer
    found = scaling.step("tiny", SYNC, 8, 64, costs(), Wire(0, 1))
    assert found["gradients"] == 512 * 7 + 2 * 7 * 4 * 8  # 53 numbers in 27 are 4 of each of 8 ranks
    assert found["statistics"] == 4 * 512 * 7 + (2 * 8 * 2 + 8 * 10 + 8 * 9 + 8 * 6) * 7
    work = Work(1000, 100, 10, 1)
    found = scaling.step("tiny", SYNC, 8, 64, costs(gradients=work, sync=work), Wire(0, 0))
    assert found["gradients"] == 1080 + 53 * 101
    assert found["statistics"] == 2 * 1080 + 5 * 101 + 3 * 108
    found = scaling.step("tiny", SYNC, 8, 64, costs(gradients=work), Wire(0, 0), in_slices=False)
    assert found["gradients"] == 1080 + 53 * 108


def test_a_step_waits_for_the_slowest_rank(tiny):
    given = costs(Compute(1, 0.5, 0.1)), Wire(0, 0)
    assert scaling.step("tiny", SYNC, 1, 64, *given) == {"compute": 33}
    found = scaling.step("tiny", SYNC, 8, 64, *given, shared=6)
    assert found["compute"] == 33 * 6
    assert found["slowest rank"] == pytest.approx(33 * 6 * 0.1 * math.sqrt(2 * math.log(8)))


def test_where_it_stops_paying(tiny):
    """Compute 10 s, statistics 2*k s: twice the time from 5 ranks on, 1.1 times at once."""
    given = {"costs": costs(Compute(10, 0, 0), sync=Work(0, 0, 1, 0)), "wire": Wire(0, 0)}
    assert scaling.first_ranks("tiny", SYNC, 1.1, **given) == "2"
    assert scaling.first_ranks("tiny", SYNC, 2.05, **given) == "6"
    assert scaling.first_ranks("tiny", SYNC, 500, **given) == "none to 1,000"
    given["costs"] = costs(Compute(0, 1, 0), sync=Work(0, 0, 1, 0))
    assert scaling.least_examples("tiny", 64, 1.1, **given) == "2,048"


@pytest.mark.parametrize("room", [1 << 22, 40])
@pytest.mark.parametrize("examples", [2, 33, 64])
@pytest.mark.parametrize("norm", NORMS)
def test_the_model_counts_what_fit_exchanges(norm, examples, room, tiny, monkeypatch):
    monkeypatch.setattr(parallel, "ROOM", room)
    monkeypatch.setattr(scaling, "ROOM", room)
    comm = ranks.Copies(3)
    steps = []

    def on_step(step, loss):
        steps.append(Counter(comm.brought))
        comm.brought.clear()
        return step == 2

    rng = np.random.default_rng(0)
    model = ranks.network(ranks.NETWORKS["tiny"], norm, comm)
    data = rng.standard_normal((9 * examples, 6), dtype=np.float32), rng.integers(0, 2, 9 * examples)
    training.fit(model, data, losses.softmax_cross_entropy, optim.SGD(model, 0.1), epochs=1, batch_size=3 * examples,
                 comm=comm, on_step=on_step, progress=False)  # fmt: skip
    expected = scaling.exchanged(ranks.NETWORKS["tiny"], norm, 3, examples, in_slices=False)
    assert steps[1] == Counter(8 * sent.numbers for of_what in expected.values() for sent in of_what)


def test_constants_are_found_again():
    terms = [(1, n, k, n * k) for n in (16, 1024) for k in (2, 16, 1000)]
    known = Work(1e-4, 2e-8, 3e-5, 1e-9)
    seconds = [known.seconds(k, n) for _, n, k, _ in terms]
    np.testing.assert_allclose(scaling.fitted(seconds, terms), known, rtol=1e-6)


def test_scaling_is_drawn(tmp_path):
    line = ([1, 10, 1000], [1.0, 2.0, 30.0])
    names = {f"{norm}, {way}": line for norm in NORMS for way in scaling.WAYS}
    panels, points = {"a": names, "b": names}, {name: {SYNC: ([1, 2], [1.0, 1.2])} for name in "ab"}
    pictures.scaling({"here": panels, "there": panels}, points, 64, tmp_path / "s.png")
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
