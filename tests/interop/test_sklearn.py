"""fastbn.interop.sklearn beside scikit-learn: the networks predict what the estimators do, and train on."""

import warnings

import numpy as np
import pytest

from fastbn import losses, nn, optim, training
from fastbn.interop.sklearn import from_sklearn

pytest.importorskip("sklearn")

from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.datasets import load_digits, load_iris, load_wine
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import FeatureUnion, Pipeline, make_pipeline
from sklearn.preprocessing import MinMaxScaler, StandardScaler

DTYPES = ["float32", "float64"]
ACTIVATIONS = ["identity", "logistic", "tanh", "relu"]
N, C = 60, 7


@pytest.fixture(autouse=True)
def few_iterations():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def data(dtype, seed=0):
    return (np.random.default_rng(seed).standard_normal((N, C)) * 3 + 1).astype(dtype)


def targets(kind, x):
    noise = x + np.random.default_rng(1).standard_normal(x.shape)
    return {
        "two": np.where(noise[:, 0] > 1, "yes", "no"),
        "three": noise[:, :3].argmax(1) * 10,
        "one": np.full(len(x), 3),
        "labels": (noise[:, :3] > 1).astype(int),
        "numbers": noise[:, 0],
        "columns": noise[:, :2],
    }[kind]


def same(ours, theirs, ulp=8):
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    bound = ulp * np.finfo(theirs.dtype).eps * max(1, abs(theirs).max())
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=bound)


@pytest.mark.parametrize("kind", ["two", "three", "labels", "one"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_classifier_gives_its_probabilities(kind, activation, dtype):
    x = data(dtype)
    estimator = MLPClassifier((8, 5), activation=activation, max_iter=5, random_state=0).fit(x, targets(kind, x))
    model = from_sklearn(estimator)
    assert not model.training
    assert [layer.dtype for layer in model if isinstance(layer, nn.Dense)] == [np.dtype(dtype)] * 3
    assert isinstance(model[-1], nn.Sigmoid if kind == "labels" else nn.Softmax)
    test = data(dtype, seed=2)
    same(model(test), estimator.predict_proba(test))
    if kind != "labels":
        assert (
            estimator.classes_[model(test)[:, : len(estimator.classes_)].argmax(1)] == estimator.predict(test)
        ).all()


@pytest.mark.parametrize("kind", ["numbers", "columns"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("sizes", [(), (6,), (8, 5, 4)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_regressor_gives_its_predictions(kind, activation, sizes, dtype):
    x = data(dtype)
    estimator = MLPRegressor(hidden_layer_sizes=sizes, activation=activation, max_iter=5, random_state=0).fit(
        x, targets(kind, x)
    )
    test = data(dtype, seed=2)
    expected = estimator.predict(test)
    same(from_sklearn(estimator)(test), expected.reshape(len(test), -1))


@pytest.mark.parametrize("with_mean", [True, False])
@pytest.mark.parametrize("with_std", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_scaler_gives_its_transform(with_mean, with_std, dtype):
    x = data(dtype)
    x[:, 1] = 7  # constant features, one of them by scikit-learn's tolerance alone
    x[:, 2] = 3 * (1 + 2.0**-52 * (np.arange(N) % 2))
    scaler = StandardScaler(with_mean=with_mean, with_std=with_std).fit(x)
    assert scaler.scale_ is None or (scaler.scale_[1:3] == 1).all()
    model = from_sklearn(scaler)
    assert model[0].count == N
    same(model(x), scaler.transform(x))
    test = np.concatenate([data(dtype, seed=2), [np.full(C, np.nan), np.full(C, np.inf)]]).astype(dtype)
    same(np.nan_to_num(model(test)[:-1]), np.nan_to_num(scaler.transform(np.where(np.isinf(test), 0, test))[:-1]))


@pytest.mark.parametrize("power", [-150, -100, -20, 0, 20, 100, 150])
def test_scales_of_any_size(power):
    scaler = StandardScaler().fit(data("float64"))
    scaler.scale_ = scaler.scale_ * 10.0**power
    x = data("float64", seed=2)
    ours, theirs = from_sklearn(scaler)(x), scaler.transform(x)
    np.testing.assert_allclose(ours, theirs, rtol=1e-15)


def test_counts_of_a_scaler_that_saw_missing_values_or_weights():
    x = data("float64")
    x[:5, 0] = np.nan
    assert from_sklearn(StandardScaler().fit(x))[0].count == N
    weighted = StandardScaler().fit(data("float64"), sample_weight=np.full(N, 1e-3))
    same(from_sklearn(weighted)(data("float64")), weighted.transform(data("float64")))


PIPELINES = {
    "scaler": lambda last: make_pipeline(StandardScaler(), last),
    "two scalers": lambda last: make_pipeline(StandardScaler(), StandardScaler(with_std=False), last),
    "nested": lambda last: make_pipeline(Pipeline([("a", StandardScaler()), ("b", "passthrough")]), last),
    "deep": lambda last: Pipeline([("x", make_pipeline(make_pipeline(StandardScaler()))), ("y", make_pipeline(last))]),
    "none": lambda last: Pipeline([("nothing", None), ("scale", "passthrough"), ("last", last)]),
}


@pytest.mark.parametrize("make", PIPELINES.values(), ids=PIPELINES.keys())
@pytest.mark.parametrize("dtype", DTYPES)
def test_pipelines(make, dtype):
    x, test = data(dtype), data(dtype, seed=2)
    classifier = make(MLPClassifier((8,), max_iter=5, random_state=0)).fit(x, targets("three", x))
    same(from_sklearn(classifier)(test), classifier.predict_proba(test))
    regressor = make(MLPRegressor(hidden_layer_sizes=(8,), max_iter=5, random_state=0)).fit(x, targets("numbers", x))
    same(from_sklearn(regressor)(test)[:, 0], regressor.predict(test))
    assert all(not isinstance(layer, nn.Sequential) for layer in from_sklearn(classifier))


def test_a_pipeline_of_scalers_transforms():
    x = data("float64")
    pipeline = make_pipeline(StandardScaler(), "passthrough").fit(x)
    same(from_sklearn(pipeline)(x), pipeline.transform(x))


@pytest.mark.parametrize("load", [load_iris, load_wine, load_digits])
def test_real_data(load):
    x, y = load(return_X_y=True)
    estimator = make_pipeline(StandardScaler(), MLPClassifier((20,), max_iter=60, random_state=0)).fit(x, y)
    model = from_sklearn(estimator)
    same(model(x), estimator.predict_proba(x))
    assert (estimator.classes_[model(x).argmax(1)] == estimator.predict(x)).all()


def test_the_estimator_and_the_network_share_nothing():
    x = data("float64")
    estimator = make_pipeline(StandardScaler(), MLPRegressor(hidden_layer_sizes=(8,), max_iter=5)).fit(
        x, targets("numbers", x)
    )
    before = estimator.predict(x)
    model = from_sklearn(estimator)
    for array in [*model.params.values(), model[0].mean, model[0].var]:
        array[...] = 0
    assert (estimator.predict(x) == before).all()


@pytest.mark.parametrize("kind", ["two", "three"])
def test_training_goes_on(kind):
    x = data("float64")
    y = targets(kind, x)
    estimator = make_pipeline(StandardScaler(), MLPClassifier((8,), max_iter=5, random_state=0)).fit(x, y)
    model, labels = from_sklearn(estimator), np.searchsorted(estimator.classes_, y)
    before = training.evaluate(model[:-1], (x, labels), losses.softmax_cross_entropy)
    inner = model[:-1]
    training.fit(
        inner,
        (x, labels),
        losses.softmax_cross_entropy,
        optim.Adam(inner, 0.01),
        epochs=20,
        batch_size=20,
        progress=False,
    )
    after = training.evaluate(inner, (x, labels), losses.softmax_cross_entropy)
    assert after[0] < 0.7 * before[0]
    np.testing.assert_allclose(model.eval()(x).sum(axis=1), 1)


def test_a_step_of_training_is_scikit_learns():
    """One step of SGD on the whole batch, with the penalty off."""
    x = data("float64")
    y = targets("columns", x)
    arguments = {
        "solver": "sgd",
        "alpha": 0,
        "momentum": 0,
        "batch_size": N,
        "shuffle": False,
        "learning_rate_init": 0.1,
    }
    estimator = MLPRegressor(hidden_layer_sizes=(8,), random_state=0, max_iter=1, **arguments).fit(x, y)
    model = from_sklearn(estimator)
    estimator.partial_fit(x, y)
    # The gradient of scikit-learn's loss is fastbn's times half of the number of columns, which are two.
    training.fit(model, (x, y), losses.mse, optim.SGD(model, 0.1), epochs=1, batch_size=N, progress=False)
    same(model.eval()(x), estimator.predict(x), ulp=400)


class Mine(StandardScaler):
    pass


class Nothing(TransformerMixin, BaseEstimator):
    def fit(self, X, y=None):
        self.fitted_ = True
        return self

    def transform(self, X):
        return X


@pytest.mark.parametrize(
    "estimator", [LogisticRegression(), MinMaxScaler(), Mine(), Nothing(), FeatureUnion([("a", StandardScaler())])]
)
def test_other_estimators_are_refused_with_their_class(estimator):
    x = data("float64")
    estimator.fit(x, targets("two", x))
    name = type(estimator).__name__
    with pytest.raises(TypeError, match=rf"^cannot convert {name}: expected MLPClassifier"):
        from_sklearn(estimator)
    if hasattr(estimator, "transform"):
        pipeline = Pipeline([("outer", Pipeline([("inner", estimator)])), ("last", MLPClassifier((3,), max_iter=2))])
        pipeline.fit(x, targets("two", x))
        with pytest.raises(TypeError, match=rf"step 'outer.inner' \({name}\)"):
            from_sklearn(pipeline)


@pytest.mark.parametrize("wrong", [None, 3, StandardScaler, "passthrough", nn.ReLU()])
def test_what_is_no_estimator_is_refused(wrong):
    with pytest.raises(TypeError, match="cannot convert"):
        from_sklearn(wrong)


@pytest.mark.parametrize(
    "estimator",
    [MLPClassifier(), MLPRegressor(), StandardScaler(), make_pipeline(StandardScaler(), MLPClassifier())],
)
def test_what_is_not_fitted_is_scikit_learns_error(estimator):
    with pytest.raises(NotFittedError):
        from_sklearn(estimator)


def test_a_poisson_loss_is_refused():
    x = data("float64")
    try:
        estimator = MLPRegressor(hidden_layer_sizes=(3,), loss="poisson", max_iter=3).fit(x, abs(x[:, 0]))
    except TypeError:
        pytest.skip("this scikit-learn has no such loss")
    with pytest.raises(ValueError, match=r"^cannot convert MLPRegressor: its last function, exp"):
        from_sklearn(estimator)
