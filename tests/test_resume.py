"""A run that was stopped and goes on ends with the bits of one that was never stopped."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import fastbn
from fastbn import BatchNorm, checkpoint, losses, nn, optim, schedules, training

safetensors_numpy = pytest.importorskip("safetensors.numpy")

STEPS, EPOCHS = 4, 3  # 27 examples in mini-batches of 8, and 9 held out


def blobs(n=36, seed=0):
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 3
    return (rng.normal(size=(n, 5)) + np.eye(3, 5)[y]).astype(np.float32), y


def network(seed=0, p=0.3, width=8, activation="relu"):
    return nn.Sequential(
        nn.Dense(5, width, bias=False, seed=seed),
        BatchNorm(width, activation=activation),
        nn.Sequential(nn.Dropout(p, seed=9), nn.Dense(width, 6, seed=seed + 1)),
        nn.Dropout(p, seed=10),
        nn.Dense(6, 3, seed=seed + 2),
    )


def optimizer_of(kind, model, **more):
    return optim.SGD(model, 0.3, momentum=0.9, **more) if kind is optim.SGD else kind(model, 0.03, **more)


def fit(path, kind=optim.Adam, model=None, data=None, **options):
    """One process's part of the run: all is made anew, as a script would."""
    model = network() if model is None else model
    optimizer = optimizer_of(kind, model)
    options = {
        "epochs": EPOCHS, "batch_size": 8, "seed": 3, "validation": 0.25, "patience": 2, "clip_norm": 1.0,
        "schedule": schedules.cosine(), "checkpoint": path, "resume": path is not None,
    } | options  # fmt: skip
    history = training.fit(model, data or blobs(), losses.softmax_cross_entropy, optimizer, **options)
    return result(model, optimizer, history)


def bits(module):
    return {key: (array.dtype.str, array.shape, array.tobytes()) for key, array in module.state_dict().items()}


def result(model, optimizer, history):
    streams = [layer.rng.bit_generator.state for layer in (model[2][0], model[3])]
    measured = {key: value for key, value in vars(history).items() if key != "seconds"}
    return bits(model), bits(optimizer), streams, measured


@pytest.fixture(scope="module", params=[optim.SGD, optim.RMSprop, optim.Adam])
def whole(request):
    """The run that is never stopped."""
    return request.param, fit(None, request.param, patience=100)


def test_stopped_after_any_step(tmp_path, whole):
    kind, expected = whole
    for stop in range(1, EPOCHS * STEPS + 1):
        path = tmp_path / f"{stop}"
        first = fit(path, kind, patience=100, on_step=lambda step, _, stop=stop: step == stop)
        assert len(first[3]["loss"]) == (stop - 1) // STEPS  # an epoch is over after its validation
        steps = []
        assert fit(path, kind, patience=100, on_step=lambda step, _: steps.append(step)) == expected  # noqa: B023
        assert steps == list(range(stop + 1, EPOCHS * STEPS + 1))


def test_stopped_after_every_step(tmp_path, whole):
    kind, expected = whole
    for _ in range(EPOCHS * STEPS):
        fit(tmp_path / "run", kind, patience=100, on_step=lambda *_: True)
    assert fit(tmp_path / "run", kind, patience=100) == expected


def test_fewer_epochs_first_and_nothing_left_to_do(tmp_path, whole):
    kind, expected = whole
    path = tmp_path / "run"
    for stop in (1, 1, 2):  # the schedule must know of all epochs
        fit(path, kind, patience=100, on_epoch=lambda epoch, _, stop=stop: epoch >= stop)
    for _ in range(2):
        assert fit(path, kind, patience=100) == expected
    assert fit(path, kind, patience=100, epochs=1) == expected


def test_early_stopping_goes_on_with_its_best_weights(tmp_path):
    path = tmp_path / "run"
    options = {"epochs": 30, "schedule": None, "clip_norm": None}
    expected = fit(None, **options)
    val_loss = expected[3]["val_loss"]
    best = int(np.argmin(val_loss)) + 1
    assert len(val_loss) == best + 2 < 30
    for stop in (best * 4, best * 4 + 1, best * 4 + 6):
        path.unlink(missing_ok=True)
        fit(path, **options, on_step=lambda step, _, stop=stop: step == stop)
        assert fit(path, **options)[0::3] == expected[0::3]
    assert fit(path, **options)[0::3] == expected[0::3]  # it stays stopped
    tensors = safetensors_numpy.load_file(path)
    kept = {key: array.tobytes() for key, array in tensors.items() if key.startswith("best.")}
    assert kept == {f"best.{key}": array[2] for key, array in expected[0].items()}
    last = checkpoint.load(path)  # a model as it was after its last step
    assert bits(last) == {key: value for key, value in bits(last).items() if tensors[key].tobytes() == value[2]}
    longer = fit(path, **options, patience=9)
    assert longer[3]["val_loss"][: len(val_loss)] == val_loss
    assert len(longer[3]["val_loss"]) > len(val_loss)


def test_without_resume_it_begins_anew_and_the_old_file_is_replaced(tmp_path):
    path = tmp_path / "run"
    for _ in range(2):
        history = fit(path, resume=False, epochs=1)[3]
        assert len(history["loss"]) == 1
    assert os.listdir(tmp_path) == ["run"]


def test_training_is_the_same_with_a_checkpoint(tmp_path, whole):
    kind, expected = whole
    assert fit(tmp_path / "run", kind, patience=100) == expected


# --- what training may change


def lower(optimizer, **numbers):
    for name, value in numbers.items():
        setattr(optimizer, name, value)


CHANGES = {
    "freeze": lambda model, optimizer: model[1].freeze() and None,
    "eval of one layer": lambda model, optimizer: model[1].eval() and None,
    "renorm": lambda model, optimizer: setattr(model[1], "renorm", (3, 5)),
    "no renorm": lambda model, optimizer: setattr(model[1], "renorm", None),
    "dropout": lambda model, optimizer: setattr(model[2][0], "p", np.float32(0.125)),
    "dropout off": lambda model, optimizer: model[3].eval() and None,
    "rate": lambda model, optimizer: lower(optimizer, lr=0.01),
    "numbers": lambda model, optimizer: lower(optimizer, momentum=np.float32(0.5), nesterov=True, weight_decay=0.25),
    "betas": lambda model, optimizer: lower(optimizer, betas=(0.5, 0.75), eps=1e-3),
    "alpha": lambda model, optimizer: lower(optimizer, alpha=0.5),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("schedule", [None, schedules.cosine()])
def test_what_a_callback_changed_is_restored(tmp_path, name, schedule):
    """The same call again, from nothing but the file: a fresh model and optimizer, as a script makes them."""
    kind = {"betas": optim.Adam, "alpha": optim.RMSprop}.get(name, optim.SGD)
    options = {"validation": None, "patience": None, "schedule": schedule}

    def part(path, stop=None):
        model = network()
        model[1].renorm = (1, 0)
        optimizer = optimizer_of(kind, model)

        def on_step(step, _):
            if step == STEPS + 2:  # between two checkpoints
                CHANGES[name](model, optimizer)
            return step == stop

        history = training.fit(
            model, blobs(), losses.softmax_cross_entropy, optimizer, epochs=EPOCHS, batch_size=9, seed=3,
            checkpoint=path, resume=path is not None, on_step=on_step, **options,
        )  # fmt: skip
        modes = [(layer.training, getattr(layer, "frozen", None)) for layer in (*model, model[2][0])]
        numbers = {key: value for key, value in vars(optimizer).items() if isinstance(value, float | tuple | np.number)}
        return *result(model, optimizer, history), modes, model[1].renorm, model[2][0].p, numbers

    whole = part(None)
    for stop in (STEPS + 3, 2 * STEPS):
        path = tmp_path / f"{stop}"
        part(path, stop)
        assert part(path) == whole
        assert part(path) == whole  # a finished run too


def test_threads_are_no_part_of_what_a_run_is(tmp_path, whole):
    """They change no bit."""
    kind, expected = whole
    fit(tmp_path / "run", kind, patience=100, on_step=lambda step, _: step == 5)
    layers = [*network()]
    layers[1] = BatchNorm(8, activation="relu", num_threads=1)
    assert fit(tmp_path / "run", kind, nn.Sequential(*layers), patience=100) == expected


def test_an_optimizers_number_may_be_another_one_from_here_on(tmp_path):
    def part(path, lr, stop=None, halve=True):
        model, rates = network(), []
        optimizer = optim.SGD(model, lr)

        def on_step(step, _):
            rates.append(optimizer.lr)
            optimizer.lr /= 2 if halve else 1
            return step == stop

        training.fit(
            model, blobs(), losses.softmax_cross_entropy, optimizer, epochs=EPOCHS, batch_size=9, checkpoint=path,
            resume=True, on_step=on_step,
        )  # fmt: skip
        return rates

    path = tmp_path / "run"
    assert part(path, 1.0, stop=2) == [1, 0.5]
    assert part(path, 1.0, stop=3) == [0.25]  # what it began with: the file's
    assert part(path, 0.125, stop=4) == [0.125]  # what it stopped with
    assert part(path, 1.0, stop=5) == [0.0625]
    assert part(path, 3.0, stop=7) == [3, 1.5]  # somebody's wish
    assert part(path, 3.0, stop=8) == [0.75]
    assert part(path, 1.0, halve=False) == [1.0] * 4


def test_the_same_objects_go_on_too(tmp_path, whole):
    """As in a notebook: whatever a callback did to them since."""
    kind, _ = whole
    results = []
    for interrupted in (False, True):
        model = network()
        optimizer = optimizer_of(kind, model)

        def on_epoch(epoch, _, model=model, optimizer=optimizer):
            model[1].freeze(epoch == 1)
            model[2][0].p = 0.3 / (1 + epoch)
            optimizer.lr *= 0.5

        for stops in ([1, 6] if interrupted else []) + [None]:
            history = training.fit(
                model, blobs(), losses.softmax_cross_entropy, optimizer, epochs=EPOCHS, batch_size=9, on_epoch=on_epoch,
                checkpoint=tmp_path / f"{interrupted}", resume=True, on_step=lambda step, _, stops=stops: step == stops,
            )  # fmt: skip
        results.append(result(model, optimizer, history))
    assert results[0] == results[1]


def test_objects_that_an_error_left_in_between_go_on_too(tmp_path):
    """The file has neither the renorm nor the mode that they have by now."""
    results = []
    for fails in (False, True):
        model, broken = network(), []
        model[1].renorm = (1, 0)
        optimizer = optim.Adam(model, 0.03)

        def on_step(step, _, model=model, broken=broken, fails=fails):
            model[1].freeze(step % 3 == 0).renorm = (1 + step, step)
            if fails and step == STEPS + 2 and not broken:
                broken.append(step)
                raise LookupError

        for _ in range(1 + fails):
            with contextlib.suppress(LookupError):
                history = training.fit(
                    model, blobs(), losses.softmax_cross_entropy, optimizer, epochs=EPOCHS, batch_size=9,
                    on_step=on_step, checkpoint=tmp_path / f"{fails}", resume=True,
                )  # fmt: skip
        results.append(result(model, optimizer, history))
    assert results[0] == results[1]


# --- Ctrl-C


def press():
    signal.raise_signal(signal.SIGINT)


@pytest.fixture
def press_in_step(monkeypatch):
    """Ctrl-C in the middle of one step, n times."""

    def prepare(kind, at, times=1):
        step, done = kind.step, []

        def pressing(optimizer):
            done.append(1)
            for _ in range(times if len(done) == at else 0):
                press()
            step(optimizer)

        monkeypatch.setattr(kind, "step", pressing)

    return prepare


@pytest.mark.parametrize("step", [1, STEPS, STEPS + 2, EPOCHS * STEPS])
def test_ctrl_c_acts_after_the_step(tmp_path, whole, press_in_step, step):
    kind, expected = whole
    handler, seen = signal.getsignal(signal.SIGINT), []
    press_in_step(kind, step)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "run", kind, patience=100, on_step=lambda at, _: seen.append(at))
    assert seen == list(range(1, step + 1))
    assert signal.getsignal(signal.SIGINT) is handler
    assert fit(tmp_path / "run", kind, patience=100) == expected


def test_ctrl_c_in_a_callback(tmp_path, whole):
    kind, expected = whole
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "run", kind, patience=100, on_epoch=lambda epoch, _: epoch == 2 and press())
    assert fit(tmp_path / "run", kind, patience=100) == expected
    with pytest.raises(KeyboardInterrupt):  # the very last moment counts as well
        fit(None, kind, patience=100, on_epoch=lambda epoch, _: epoch == EPOCHS and press())


def test_a_second_ctrl_c_acts_at_once(tmp_path, whole, press_in_step):
    kind, expected = whole
    handler = signal.getsignal(signal.SIGINT)
    press_in_step(kind, STEPS + 2, times=2)
    model = network()
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "run", kind, model=model, patience=100)
    assert model[1].num_batches_tracked == STEPS + 2
    assert checkpoint.load(tmp_path / "run")[1].num_batches_tracked == STEPS
    assert signal.getsignal(signal.SIGINT) is handler
    assert fit(tmp_path / "run", kind, patience=100) == expected


def test_a_handler_of_ones_own_stays():
    pressed = []

    def own(*_):
        pressed.append(1)

    before = signal.signal(signal.SIGINT, own)
    try:
        history = fit(None, on_step=lambda step, _: press() if step == 1 else None)[3]
        assert signal.getsignal(signal.SIGINT) is own
    finally:
        signal.signal(signal.SIGINT, before)
    assert pressed == [1]
    assert len(history["loss"]) > 0


def test_fit_in_another_thread(whole):
    kind, expected = whole
    results = []
    thread = threading.Thread(target=lambda: results.append(fit(None, kind, patience=100)))
    thread.start()
    thread.join()
    assert results == [expected]


# --- SIGKILL

KILLED = """
import sys
from test_resume import fit
print("ready", flush=True)
fit(sys.argv[1], patience=10**6, epochs=2000)
"""


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
def test_killed_at_any_moment(tmp_path):
    path, rng = tmp_path / "run", random.Random(0)
    history = []
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(fastbn.__file__).parents[1]), str(Path(__file__).parent)])
    }
    for _ in range(3):
        with subprocess.Popen([sys.executable, "-c", KILLED, path], stdout=subprocess.PIPE, env=environment) as process:
            assert process.stdout.readline().strip() == b"ready"
            while not path.exists() and process.poll() is None:
                time.sleep(0.01)
            time.sleep(0.05 + 0.2 * rng.random())
            process.kill()
        run = json.loads(safetensors_texts(path)["fastbn.run"])
        assert run["history"]["loss"][: len(history)] == history
        history = run["history"]["loss"]
        assert checkpoint.load(path)[1].num_batches_tracked == STEPS * len(history) == STEPS * run["epoch"]
    done = len(history)
    ends_at = {"patience": 10**6, "epochs": 2000, "on_epoch": lambda epoch, _: epoch >= done + 1}
    assert fit(path, **ends_at) == fit(None, **ends_at)
    assert len([name for name in os.listdir(tmp_path) if not name.endswith(".tmp")]) == 1


def safetensors_texts(path):
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        return file.metadata()


# --- files that do not fit


def rewrite(path, change):
    tensors, texts = safetensors_numpy.load_file(path), safetensors_texts(path)
    run = json.loads(texts["fastbn.run"])
    change(run, tensors)
    safetensors_numpy.save_file(tensors, path, texts | {"fastbn.run": json.dumps(run)})


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The content of a checkpoint in the middle of the second epoch."""
    path = tmp_path_factory.mktemp("stopped") / "run"
    fit(path, on_step=lambda step, _: step == STEPS + 2)
    return path.read_bytes()


def refuses(path, content, match, **options):
    """fit says what is wrong, and leaves model, optimizer, modes, streams and file as they were."""
    path.write_bytes(content)
    model = options.pop("model", None) or network()
    model[1].eval()
    optimizer = optimizer_of(options.pop("kind", optim.Adam), model, exclude=options.pop("exclude", ()))
    before = result(model, optimizer, training.History())
    arguments = {"epochs": EPOCHS, "batch_size": 8, "seed": 3, "validation": 0.25, "patience": 2}
    data = options.pop("data", None) or blobs()
    with pytest.raises(ValueError, match=rf"run: .*{match}"):
        training.fit(
            model, data, losses.softmax_cross_entropy, optimizer, checkpoint=path, resume=True, **(arguments | options)
        )
    assert result(model, optimizer, training.History()) == before
    assert not model[1].training
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"batch_size": 9}, "another run, batch_size was 8, is 9"),
        ({"seed": 4}, "another run, seed was 3, is 4"),
        ({"kind": optim.RMSprop}, "another run, optimizer was Adam, is RMSprop"),
        ({"data": blobs(48)}, r"another run, X was float32 \(27, 5\).* is float32 \(36, 5\)"),
        ({"data": (blobs()[0].astype(np.float64), blobs()[1])}, "another run, X was float32 .* is float64"),
        ({"data": (blobs(seed=1)[0], blobs()[1])}, "another run, X was .*crc32"),
        ({"data": (blobs()[0], blobs()[1][::-1])}, "another run, "),
        ({"validation": blobs()}, r"another run, validation was 0.25, is a pair \(X, y\)"),
        ({"validation": None, "patience": None}, "another run, validation was 0.25, is None"),
        ({"validation": 0.5}, "another run, validation was 0.25, is 0.5"),
        ({"model": network(width=7)}, r"another run, model\[0\].n_out was 8, is 7"),
        ({"model": network(p=0.4)}, r"another run, model\[2\]\[0\].p was 0.3, is 0.4"),
        ({"model": nn.Sequential(*network(), nn.ReLU())}, r"another run, model\[5\] was no layer, is ReLU"),
        ({"model": network(activation=None)}, r"another run, model\[1\].activation was 'relu', is None"),
        ({"model": nn.Sequential(*network()[:4], BatchNorm(6))}, r"another run, model\[4\] was Dense, is BatchNorm"),
        ({"exclude": ["0.weight"]}, r"another run, exclude was \[\], is \['0.weight'\]"),
        ({"average": 0.9, "patience": None}, "another run, average was None, is 0.9"),
    ],
)
def test_what_is_of_another_run_is_refused(tmp_path, stopped, options, difference):
    refuses(tmp_path / "run", stopped, difference, **options)


def test_a_damaged_file_is_refused(tmp_path, stopped):
    path = tmp_path / "run"
    for length in range(0, len(stopped), 997):
        refuses(path, stopped[:length], "not a safetensors file")
    checkpoint.save(path, network(), optim.Adam(network()))
    refuses(path, path.read_bytes(), "not a checkpoint that fit wrote")
    safetensors_numpy.save_file(network().state_dict(), path)
    refuses(path, path.read_bytes(), "not a checkpoint that fit wrote")


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda run, tensors: run.pop("epoch"), "epoch"),
        (lambda run, tensors: run.pop("identity"), "written by another version"),
        (lambda run, tensors: run["identity"].pop("exclude"), "written by another version"),
        (lambda run, tensors: run.update(epoch="2"), "expected epoch to be int, got '2'"),
        (lambda run, tensors: run.update(step=-1), "expected step to be int, got -1"),
        (lambda run, tensors: run.update(epoch=7), "contradict"),
        (lambda run, tensors: run.update(seen=0), "contradict"),
        (lambda run, tensors: run["history"].update(loss=["a"]), "expected loss to be numbers"),
        (lambda run, tensors: run["history"].pop("lr"), "lr"),
        (lambda run, tensors: run.update(history=[]), "cannot be loaded"),
        (lambda run, tensors: run["random"].pop(), "cannot be loaded"),
        (lambda run, tensors: run["random"].append(None), "cannot be loaded"),
        (lambda run, tensors: run["random"][1].update(bit_generator="MT19937"), "PCG64"),
        (lambda run, tensors: run["random"][1]["state"].update(state=-1), "cannot be loaded"),
        (lambda run, tensors: run["optimizer"].update(lr=-1), "expected lr of an optimizer, got 0.03 and -1"),
        (lambda run, tensors: run["optimizer_begun_with"].update(betas=["a", 1]), "expected betas of an optimizer"),
        (lambda run, tensors: run["optimizer"].pop("eps"), "eps"),
        (lambda run, tensors: run["identity"].update(model=[]), "cannot be loaded"),
        (lambda run, tensors: run["identity"]["model"]["layers"][0].update(config=[]), "cannot be loaded"),
        (lambda run, tensors: tensors.pop("best.4.bias"), "4.bias"),
        (lambda run, tensors: [tensors.pop(k) for k in list(tensors) if k.startswith("best")], "made without patience"),
        (lambda run, tensors: tensors.pop("0.weight"), "0.weight"),
        (lambda run, tensors: tensors.pop("optimizer.step"), "step"),
        (lambda run, tensors: tensors.update({"best.0.weight": np.ones((2, 2))}), "0.weight"),
    ],
)
def test_wrong_content_is_named(tmp_path, stopped, change, fault):
    path = tmp_path / "run"
    path.write_bytes(stopped)
    rewrite(path, change)
    refuses(path, path.read_bytes(), fault)


def test_what_cannot_be_saved_is_said_before_the_first_step(tmp_path):
    class Own(nn.ReLU):
        pass

    class Step:
        def step(self):
            raise AssertionError

    X, y = blobs()
    for model, optimizer, path, error, fault in (
        (nn.Sequential(Own(), nn.Dense(5, 3, seed=0)), None, "run", TypeError, "cannot save a Own"),
        (network(), Step(), "run", TypeError, "an optimizer with state_dict and load_state_dict, got Step"),
        (network(), None, "nowhere/run", FileNotFoundError, "no such folder"),
        (network(), None, ".", OSError, "folder"),
    ):
        before = bits(model)
        with pytest.raises(error, match=fault):
            training.fit(
                model, (X, y), losses.softmax_cross_entropy, optimizer or optim.Adam(model), epochs=1, batch_size=8,
                checkpoint=tmp_path / path,
            )  # fmt: skip
        assert bits(model) == before
    with pytest.raises(ValueError, match="resume needs the checkpoint"):
        fit(None, resume=True)
    assert os.listdir(tmp_path) == []


def test_safetensors_missing_is_said_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    model = network()
    before = bits(model)
    with pytest.raises(ImportError, match="checkpoints need safetensors"):
        fit(tmp_path / "run", model=model)
    assert bits(model) == before
