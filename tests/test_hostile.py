"""Arguments that run code of their own or lie, and errors that come in the middle of a change."""

import warnings
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

import fastbn
from fastbn import BatchNorm, RunningStats, nn, optim, training

X = np.random.RandomState(0).standard_normal((8, 3))


class Refusing(np.ndarray):
    """An array that no function of NumPy takes."""

    def __array_function__(self, *_):
        raise RuntimeError("this array is for nobody")


class Lying(np.ndarray):
    def __array_function__(self, *_):
        return False


@pytest.fixture
def strict():
    """Every warning an error, in NumPy's settings and in Python's."""
    with warnings.catch_warnings(), np.errstate(all="raise"):
        warnings.simplefilter("error")
        yield


def unchanged(holder, call, error):
    before = holder.state_dict()
    with pytest.raises(error):
        call()
    after = holder.state_dict()
    assert all((before[key] == after[key]).all() for key in before)


@pytest.mark.parametrize("training", [True, False])
def test_a_layer_whose_constructor_has_not_run_is_an_error(training):
    bn = BatchNorm.__new__(BatchNorm)
    bn.training = training
    for call in (bn, bn.forward, bn.backward):
        with pytest.raises(AttributeError, match="constructor has run"):
            call(X)


@pytest.mark.parametrize("name", ["weight", "running_mean"])
def test_an_argument_that_resizes_x_when_it_becomes_an_array(name):
    x = np.ones((300_000, 3))

    class Nasty:
        def __array__(self, *_, **__):
            x.resize((0, 3), refcheck=False)
            return np.ones(3)

    statistics = [None, None] if name == "weight" else [Nasty(), np.ones(3)]
    weight = Nasty() if name == "weight" else None
    assert fastbn.batch_norm(x, *statistics, weight, training=name == "weight").shape == (0, 3)


def holders():
    standardize = nn.Standardize(3).fit(X)
    model = nn.Sequential(nn.Dense(3, 3, seed=0), BatchNorm(3))
    return [BatchNorm(3), nn.Dense(3, 3, seed=0), standardize, model, optim.SGD(model, 0.1, momentum=0.9)]


@pytest.mark.parametrize("holder", holders(), ids=lambda holder: type(holder).__name__)
def test_a_state_that_does_not_fit_the_dtype_changes_nothing_where_that_is_an_error(strict, holder):
    state = {key: a + 1 for key, a in holder.state_dict().items()}
    last = [key for key, a in state.items() if a.dtype.kind == "f"][-1]
    state[last] = np.full(state[last].shape, "1e4000").astype(np.longdouble)
    if np.isinf(state[last]).all():
        pytest.skip("a long double is a double here")
    unchanged(holder, lambda: holder.load_state_dict(state), (RuntimeWarning, FloatingPointError))


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
def test_a_read_only_array_leaves_the_others_as_they_are(name):
    bn = BatchNorm(3)
    getattr(bn, name).flags.writeable = False
    state = {key: a + 1 for key, a in bn.state_dict().items()}
    unchanged(bn, lambda: bn.load_state_dict(state), ValueError)
    if name in ("weight", "bias"):
        unchanged(bn, bn.reset_parameters, ValueError)
    else:
        unchanged(bn, bn.reset_running_stats, ValueError)


def test_read_only_running_statistics():
    stats = RunningStats(3)
    stats.var.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        stats.update(fastbn.moments(X))
    assert (stats.mean == 0).all()
    assert stats.count == 0


def test_an_assignment_that_is_an_error_changes_nothing(strict):
    bn = BatchNorm(3)
    with pytest.raises((RuntimeWarning, FloatingPointError)):
        bn.weight = [1e300, 5, 5]
    assert (bn.weight == 1).all()


@pytest.mark.parametrize(("wrong", "error"), [({"bias": [1, 2]}, ValueError), ({"other": [1, 2, 3]}, KeyError)])
def test_an_update_of_parameters_is_whole_or_not_at_all(wrong, error):
    bn = BatchNorm(3)
    with pytest.raises(error):
        bn.params.update({"weight": [7, 8, 9]} | wrong)
    assert (bn.weight == 1).all()


def test_a_parameter_that_is_not_there_cannot_be_set_to_none():
    bn = BatchNorm(3)
    with pytest.raises(KeyError, match="got 'other'"):
        bn.params["other"] = None
    assert list(bn.params) == ["weight", "bias"]


def test_an_update_may_swap_parameters():
    bn = BatchNorm(3)
    bn.params.update(weight=bn.bias, bias=bn.weight)
    assert (bn.weight == 0).all()
    assert (bn.bias == 1).all()


def test_recalibrating_is_whole_or_not_at_all():
    model = nn.Sequential(BatchNorm(3), BatchNorm(3))
    model[1].running_var.flags.writeable = False
    unchanged(model, lambda: training.recalibrate(model, X), ValueError)


def test_averages_that_float32_does_not_hold_are_infinite_without_a_word(strict):
    mean, var = np.zeros(3, np.float32), np.ones(3, np.float32)
    x = X.copy()
    x[:, 1] *= 1e30
    fastbn.batch_norm(x, mean, var, training=True)
    assert np.isfinite(mean).all()
    assert np.isfinite(var).tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("momentum", "debias"), [(0.1, False), (1.0, False), (1e300, False), (0.0, True), (2.0, True), (None, False)]
)
def test_running_statistics_out_of_range_are_silent(strict, momentum, debias):
    stats = RunningStats(2, momentum, debias=debias)
    for _ in range(4):
        stats.update(fastbn.BatchStats([0.0, 1.0], [1e308, 1.0], 100))
    assert stats.mean.shape == stats.var.shape == (2,)


def test_folding_what_is_not_finite_is_silent(strict):
    bn = BatchNorm(3)
    bn.running_var = [-1, 1, 1]
    scale, shift = bn.fold()
    assert np.isnan(scale).tolist() == np.isnan(shift).tolist() == [True, False, False]


@pytest.mark.parametrize("momentum", [np.float32(0.1), np.float16(0.1), np.longdouble("0.1"), Fraction(1, 10), True])
def test_running_statistics_have_one_momentum_however_it_is_given(momentum):
    apart, within = RunningStats(3, momentum), RunningStats(3, momentum)
    for i in range(4):
        apart.update(fastbn.moments(X * i))
        fastbn.batch_norm_forward(X * i, running=within)
    assert type(apart.momentum) is float
    assert (apart.mean == within.mean).all()
    assert (apart.var == within.var).all()


@pytest.mark.parametrize("other", [None, 5, fastbn.moments(X)])
def test_merging_something_else_is_a_type_error(other):
    with pytest.raises(TypeError, match="expected other to be a RunningStats"):
        RunningStats(3, None).merge(other)


def test_the_count_of_statistics_is_asked_for_once_and_fits():
    class Changing:
        given = 3

        def __index__(self):
            self.given -= 5
            return self.given + 5

    assert fastbn.BatchStats([1.0], [1.0], Changing()).count == 3
    with pytest.raises(ValueError, match="count"):
        fastbn.BatchStats([1.0], [1.0], 2**63)


@pytest.mark.parametrize("state", [{1: 2}, {None: 1, "weight": 2}])
def test_keys_that_are_no_texts(state):
    with pytest.raises(ValueError, match="unexpected key"):
        BatchNorm(3).load_state_dict(state)


@pytest.mark.parametrize("options", [{}, {"ghost_size": 4}])
def test_backward_does_not_write_into_x_behind_a_buffer(options):
    x = X.copy()
    bn = BatchNorm(3, dtype="float64", **options)
    bn(memoryview(x))
    with pytest.raises(ValueError, match="share no memory with x"):
        bn.backward(X, out=x)
    assert (x == X).all()


@pytest.mark.parametrize("kind", [Refusing, Lying])
@pytest.mark.parametrize("options", [{}, {"ghost_size": 4}])
def test_a_subclass_does_not_answer_in_the_place_of_numpy(kind, options):
    expected = BatchNorm(3, **options)(X)
    # Strided outputs are written through a copy; the elements of x lie between those of out.
    both = np.zeros((8, 6))
    both[:, ::2] = X
    bn = BatchNorm(3, **options)
    out = both[:, 1::2].view(kind)
    assert bn(both[:, ::2].view(kind), out=out) is out
    assert (np.asarray(out) == expected).all()
    assert bn.num_batches_tracked == (2 if options else 1)
    dx = np.zeros((8, 6))[:, ::2].view(kind)
    assert (np.asarray(bn.backward(X, out=dx)) == bn.backward(X)).all()
    shifted = np.zeros((9, 3))
    shifted[:-1] = X
    with pytest.raises(ValueError, match="partly overlapping"):
        bn(shifted[:-1], out=shifted[1:].view(kind))


@pytest.mark.parametrize("lr", [10**400, Decimal("1e400"), np.inf, np.nan])
def test_a_rate_that_no_float_holds_is_a_value_error(lr):
    with pytest.raises(ValueError, match="expected a finite lr"):
        optim.SGD(BatchNorm(3), lr)


@pytest.mark.parametrize("betas", [(0.9,), (0.9, 0.99, 0.999), iter([])])
def test_betas_are_a_pair(betas):
    with pytest.raises(ValueError, match="expected betas to be a pair"):
        optim.Adam(BatchNorm(3), betas=betas)
    assert optim.Adam(BatchNorm(3), betas=iter([0.5, 0.75])).betas == (0.5, 0.75)


def test_a_count_that_training_would_take_out_of_its_range_is_refused():
    bn = BatchNorm(3)
    for number in (2**53 + 1, 2**63 - 1):
        for holder, key in ((bn, "num_batches_tracked"), (optim.SGD(bn, 0.1), "step")):
            state = holder.state_dict() | {key: number}
            unchanged(holder, lambda holder=holder, state=state: holder.load_state_dict(state), ValueError)


def test_statistics_of_any_kind_from_a_file_are_silent(strict):
    standardize = nn.Standardize(3, dtype="float32")
    standardize.load_state_dict(standardize.state_dict() | {"var": [-1.0, np.nan, 1e300], "count": 5})
    assert np.isfinite(standardize(X)).all(axis=0).tolist() == [False, False, True]


@pytest.mark.parametrize("name", [np.array(["relu"]), np.array(["relu", "relu"]), b"relu", ["relu"]])
def test_an_activation_is_a_text(name):
    for make in (lambda: BatchNorm(3, activation=name), lambda: nn.Dense(3, 3, activation=name)):
        with pytest.raises(ValueError, match="expected activation"):
            make()


def test_a_momentum_that_is_a_text_is_said_in_plain_words():
    with pytest.raises(TypeError, match="real number"):
        fastbn.batch_norm(X, np.zeros(3), np.ones(3), training=True, momentum="a")
