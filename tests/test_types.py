"""What type checkers are told about results, which mypy checks in this file, is what comes at run time."""

from __future__ import annotations

from pathlib import Path
from typing import Any, assert_type

import numpy as np
import pytest
from numpy.typing import ArrayLike, NDArray

import fastbn
from fastbn import BatchNorm, BatchStats, RunningStats, checkpoint, data, losses, nn, optim, schedules, training

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Array = NDArray[Any]
X32 = np.random.default_rng(0).standard_normal((8, 3), np.float32)
X64 = X32.astype(np.float64)
LABELS = np.arange(8) % 2


def test_functions_keep_the_dtype_of_x() -> None:
    y, stats = fastbn.batch_norm_forward(X32)
    assert_type(y, Float32)
    assert_type(stats, BatchStats)
    assert_type(stats.mean, Float64)
    dx, dweight, dbias = fastbn.batch_norm_backward(X64, X32, stats)
    assert_type(dx, Float32)
    assert_type(dweight, Float64)
    z = fastbn.batch_norm(X64, stats.mean, stats.var, activation="relu")
    assert_type(z, Float64)
    assert_type(fastbn.batch_norm([[1.0], [2.0]], training=True), Array)
    assert [a.dtype for a in (y, dx, dweight, dbias, z)] == ["f4", "f4", "f8", "f8", "f8"]


def test_the_layer_keeps_the_dtype_of_x() -> None:
    bn = BatchNorm(3, activation="relu", dtype=np.float64)
    y = bn(X32, mask=np.ones(8, bool))
    assert_type(y, Float32)
    assert_type(bn(X64, out=np.empty_like(X64)), Float64)
    assert_type(bn(X32.tolist()), Array)
    assert_type(bn.train().eval(), BatchNorm)
    assert_type(bn.backward(X32), Array)
    assert_type(bn.fold(), tuple[Array, Array])
    assert_type(bn.num_features, int)
    assert_type(bn.state_dict(), dict[str, Array])
    weight: Array = bn.weight + 1  # None is not among its types
    assert y.dtype == np.float32
    assert weight.dtype == np.float64


def test_layers() -> None:
    elementwise = nn.Dropout(0.5), nn.Identity(), nn.LeakyReLU(), nn.ReLU(), nn.Sigmoid(), nn.Softmax(), nn.Tanh()
    for layer in (nn.Dense(3, 3), *elementwise):
        y32, y64 = layer(X32), layer(X64)
        assert_type(y32, Float32)
        assert_type(y64, Float64)
        assert [y.dtype for y in (y32, y64)] == ["f4", "f8"]
    dense = nn.Dense(3, 4, activation="relu", dtype=np.float32)
    assert_type(dense([[1, 2, 3]]), Array)
    assert_type(dense.forward(X32), Array)
    dense(X32)
    assert_type(dense.backward(np.ones((8, 4))), Array)
    dense.backward(np.ones((8, 4)), input_grad=False)
    # It may have a dtype of its own.
    scaled = nn.Standardize(3, dtype="float32").fit(X64)(X64)
    assert_type(scaled, Array)
    assert scaled.dtype == np.float32


def test_sequential() -> None:
    model = nn.Sequential(nn.Dense(3, 4), BatchNorm(4), nn.ReLU())
    y = model(X32)
    assert_type(y, Array)
    assert_type(model.backward(y, input_grad=True), Array)
    assert_type(model[:-1], nn.Sequential)
    assert_type(model.folded().eval(), nn.Sequential)
    assert_type([layer.params for layer in model], list[Any])
    assert isinstance(y, np.ndarray)
    assert isinstance(model[:-1], nn.Sequential)


def test_losses_keep_the_dtype_of_the_prediction() -> None:
    for loss in (losses.mse, losses.sigmoid_cross_entropy):
        value, gradient = loss(X32, np.ones_like(X32), sample_weight=np.ones(8))
        assert_type(value, float)
        assert gradient.dtype == np.float32
    assert_type(losses.mse(X32, X64), tuple[float, Float32])
    assert_type(losses.sigmoid_cross_entropy(X64, np.ones_like(X64)), tuple[float, Float64])
    assert_type(losses.softmax_cross_entropy(X32, LABELS), tuple[float, Float32])
    assert_type(losses.mse([1.0], [2.0]), tuple[float, Array])


def test_parts_of_a_split_have_targets() -> None:
    whole = data.Dataset(X64, LABELS, np.arange(2), "x")
    assert_type(whole.y, np.ndarray | None)
    train, held_out = data.split(whole, fraction=0.25)
    assert_type(train.y, np.ndarray)
    assert isinstance(train, data.Labelled)
    assert isinstance(held_out, data.Labelled)
    parted = data.Dataset(X64, LABELS, np.arange(2), "x", ("a", "b", "c"), whole, notes=("note",))
    train, held_out = data.split(parted)
    assert vars(train) == {**vars(parted), "held_out": None}
    assert vars(held_out) == vars(whole)


def own_loss(prediction: Array, target: Array) -> tuple[float, Array]:
    return losses.mse(prediction, target[:, np.newaxis].astype(prediction.dtype))


def test_training(tmp_path: Path) -> None:
    train, held_out = data.split(data.Dataset(X64, LABELS, np.arange(2), "x"))
    model = nn.Sequential(nn.Dense(3, 4, bias=False), BatchNorm(4, activation="relu"), nn.Dense(4, 2))
    optimizer = optim.Adam(model, lr=0.003, exclude=["1.weight"])
    seen: list[int] = []
    history = training.fit(
        model, (train.X, train.y), losses.softmax_cross_entropy, optimizer, epochs=2, batch_size=2,
        schedule=schedules.cosine(), on_epoch=lambda epoch, history: seen.append(epoch), progress=False,
    )  # fmt: skip
    assert_type(history, training.History)
    assert_type(history.loss[-1], float)
    pair = training.evaluate(model, (held_out.X, held_out.y), losses.softmax_cross_entropy)
    assert_type(pair, tuple[float, float | None])
    training.recalibrate(model, train.X)
    one = nn.Sequential(nn.Dense(3, 1))
    training.fit(one, (X64, LABELS), own_loss, optim.SGD(one, lr=0.1), epochs=1, batch_size=4, progress=False)
    pytest.importorskip("safetensors")
    checkpoint.save(tmp_path / "model.safetensors", model, optimizer)
    assert_type(checkpoint.load(tmp_path / "model.safetensors"), Any)
    assert seen == [1, 2]


class Doubled:
    """A layer of one's own has no base class."""

    def __init__(self) -> None:
        self.params: dict[str, Array] = {}
        self.grads: dict[str, Array] = {}

    def __call__(self, x: ArrayLike) -> Array:
        return 2 * np.asarray(x)

    def backward(self, dy: ArrayLike) -> Array:
        return 2 * np.asarray(dy)


def test_statistics() -> None:
    running = RunningStats(3, momentum=None)
    running.update(fastbn.moments(X32))
    assert_type(running.mean, Float64)
    with fastbn.threads(1):
        assert_type(fastbn.get_num_threads(), int)
    assert_type(nn.Sequential(Doubled())(X64), Array)
    assert running.mean.dtype == np.float64
