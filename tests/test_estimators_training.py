import warnings

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.base import clone
from sklearn.datasets import load_iris
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import accuracy_score
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.preprocessing import StandardScaler
from test_estimators import ESTIMATORS, blobs, state

from fastbn import BatchNorm, nn
from fastbn.estimators import BatchNormClassifier, BatchNormRegressor

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


# --- the network and its training


def started_alike(ours, theirs, X, y):
    """Both fitted from ours' start weights."""
    start = clone(ours).set_params(max_iter=1, learning_rate_init=1e-300).fit(X, y)  # a step that changes nothing
    params = start.model_.params
    theirs.set_params(warm_start=True, max_iter=1, **{k: v for k, v in ours.get_params().items() if k in SHARED})
    theirs.fit(X, y)
    for i, (coef, intercept) in enumerate(zip(theirs.coefs_, theirs.intercepts_, strict=True)):
        weights = sorted(k for k in params if k.endswith("weight"))
        coef[...], intercept[...] = params[weights[i]].T, params[weights[i].replace("weight", "bias")]
    theirs.best_loss_ = np.inf
    theirs.set_params(max_iter=ours.max_iter).fit(X, y)
    return ours.fit(X, y), theirs


SHARED = [
    "hidden_layer_sizes", "activation", "solver", "alpha", "learning_rate_init", "tol", "momentum",
    "nesterovs_momentum", "beta_1", "beta_2", "n_iter_no_change", "batch_size",
]  # fmt: skip
SGD = {"solver": "sgd", "learning_rate_init": 0.2, "batch_norm": False, "random_state": 0, "max_iter": 60}


MORE = [
    {"alpha": 3.0}, {"momentum": 0}, {"nesterovs_momentum": False}, {"hidden_layer_sizes": (7, 6)},
    {"activation": "tanh"}, {"activation": "logistic"}, {"activation": "identity", "learning_rate_init": 0.05},
    {"tol": 0.02, "n_iter_no_change": 2},
]  # fmt: skip
KINDS = ["classes", "binary", "labels", "numbers", "two numbers"]


@pytest.mark.parametrize(
    ("kind", "more"),
    [(kind, {}) for kind in KINDS] + [(KINDS[i % 5], more) for i, more in enumerate(MORE + MORE[::-1])],
    ids=str,
)
def test_without_batch_norm_training_is_scikit_learns(kind, more):
    X, y = blobs(classes=2 if kind == "binary" else 3)
    y = {"labels": np.eye(3, dtype=int)[y] | np.eye(3, dtype=int)[y - 1], "numbers": y - 1.0,
         "two numbers": np.eye(3)[y][:, :2]}.get(kind, y)  # fmt: skip
    pair = (BatchNormRegressor, MLPRegressor) if "numbers" in kind else (BatchNormClassifier, MLPClassifier)
    ours, theirs = started_alike(pair[0](**{"hidden_layer_sizes": 8, **SGD, **more}), pair[1](), X, y)
    assert ours.n_iter_ == theirs.n_iter_
    np.testing.assert_allclose(ours.loss_curve_, theirs.loss_curve_[1:], rtol=1e-9)
    assert ours.best_loss_ == min(ours.loss_curve_)
    assert ours.loss_ == ours.loss_curve_[-1]
    if kind in ("numbers", "two numbers"):
        np.testing.assert_allclose(ours.predict(X), theirs.predict(X), rtol=1e-8, atol=1e-10)
    else:
        np.testing.assert_array_equal(ours.predict(X), theirs.predict(X))
        np.testing.assert_allclose(ours.predict_proba(X), theirs.predict_proba(X), rtol=1e-8)
        np.testing.assert_allclose(ours.predict_log_proba(X), theirs.predict_log_proba(X), rtol=1e-8, atol=1e-12)


def test_adam_is_scikit_learns():
    X, y = blobs()  # the two place epsilon differently, which is seen where gradients are small
    ours = BatchNormClassifier(8, batch_norm=False, random_state=0, max_iter=50, beta_1=0.8, beta_2=0.99)
    ours, theirs = started_alike(ours, MLPClassifier(), X, y)
    np.testing.assert_allclose(ours.loss_curve_, theirs.loss_curve_[1:], rtol=1e-5)


def test_the_penalty_is_divided_by_the_size_of_each_mini_batch():
    X, y = np.tile([[1.0, -2.0]], (8, 1)), np.full(8, 3.0)  # the same rows, whatever the order
    ours = BatchNormRegressor(4, **SGD, alpha=2.0, batch_size=3)  # of 3, 3 and 2
    ours, theirs = started_alike(ours, MLPRegressor(), X, y)
    np.testing.assert_allclose(ours.loss_curve_, theirs.loss_curve_[1:], rtol=1e-9)


def test_without_hidden_layers_it_is_logistic_regression():
    X, y = load_iris(return_X_y=True)
    X = StandardScaler().fit_transform(X)
    ours = BatchNormClassifier((), alpha=2.0, learning_rate_init=0.05, max_iter=2000, tol=1e-9, random_state=0)
    ours.fit(X, y)
    best = LogisticRegression(C=1 / 2.0, tol=1e-8).fit(X, y)
    np.testing.assert_allclose(ours.model_.params["0.weight"], best.coef_, atol=2e-3)
    np.testing.assert_allclose(ours.predict_proba(X), best.predict_proba(X), atol=1e-3)


def test_without_hidden_layers_it_is_ridge_regression():
    X, _ = blobs()
    Y = X @ [[1.0, 0], [2, 1], [0, 3], [-1, 0], [0, 2]] + [5, -3]
    ours = BatchNormRegressor((), alpha=10.0, learning_rate_init=0.05, max_iter=2000, tol=1e-12, random_state=0)
    best = Ridge(alpha=10.0).fit(X, Y)
    np.testing.assert_allclose(ours.fit(X, Y).predict(X), best.predict(X), atol=1e-5)


def test_model_is_the_network_that_was_asked_for():
    X, y = blobs(dtype=np.float32)
    layers = list(BatchNormClassifier((7, 6), "tanh", max_iter=1).fit(X, y).model_)
    assert [type(layer) for layer in layers] == [nn.Dense, BatchNorm, nn.Tanh] * 2 + [nn.Dense]
    assert [(d.n_in, d.n_out, d.bias) for d in layers[::3]] == [(5, 7, False), (7, 6, False), (6, 3, True)]
    layers = list(BatchNormRegressor([7], max_iter=1).fit(X, y).model_)
    assert [repr(layer.config()["activation"]) for layer in layers] == ["None", "'relu'", "None"]
    assert all(p.dtype == np.float32 for layer in layers for p in layer.params.values())


def test_prediction_uses_the_running_averages_and_goes_in_pieces():
    X, y = blobs(3000)
    classifier = BatchNormClassifier(max_iter=3, random_state=0).fit(X, y)
    dense, norm, out = classifier.model_
    h = (X @ dense.params["weight"].T - norm.running_mean) / np.sqrt(norm.running_var + norm.eps)
    h = np.maximum(h * norm.weight + norm.bias, 0)
    expected = softmax(h @ out.params["weight"].T + out.params["bias"], axis=1)
    np.testing.assert_allclose(classifier.predict_proba(X), expected, rtol=1e-10)
    np.testing.assert_allclose(classifier.predict_proba(X[7:8]), expected[7:8], rtol=1e-10)
    np.testing.assert_array_equal(classifier.predict(X), expected.argmax(axis=1))
    np.testing.assert_allclose(np.exp(classifier.predict_log_proba(X)), expected, rtol=1e-9)


def test_fit_ends_with_the_exact_statistics_of_the_data():
    X, y = blobs(300)
    dense, norm, *_ = BatchNormClassifier(max_iter=3).fit(X, y).model_
    h = X @ dense.params["weight"].T
    np.testing.assert_allclose(norm.running_mean, h.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(norm.running_var, h.var(axis=0, ddof=1), rtol=1e-12)


def test_log_probabilities_do_not_end_where_probabilities_do():
    for classes, weight, expected in ((2, [[1000.0]], [[-1000, 0]]), (3, [[0.0], [1000], [0]], [[-1000, 0, -1000]])):
        _, y = blobs(classes=classes)
        classifier = BatchNormClassifier((), max_iter=1).fit(np.ones((90, 1)), y)
        classifier.model_.params["0.weight"], classifier.model_.params["0.bias"] = np.array(weight), 0.0
        np.testing.assert_array_equal(classifier.predict_log_proba([[1.0]]), expected)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_computes_in_the_dtype_of_x(estimator):
    X, y = blobs()
    for dtype, expected in (("f4", "f4"), ("f8", "f8"), ("i8", "f8"), ("f2", "f8")):
        fitted = estimator(max_iter=2, alpha=0.1).fit(X.astype(dtype), y)
        assert {p.dtype for p in fitted.model_.params.values()} == {np.dtype(expected)}
        assert getattr(fitted, "predict_proba", fitted.predict)(X.astype(dtype)).dtype == expected


# --- stopping


def test_stops_where_there_is_no_more_progress_and_says_where_there_still_is():
    X, y = blobs()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        done = BatchNormClassifier(tol=10.0, n_iter_no_change=4).fit(X, y)
    assert done.n_iter_ == 6  # the first epoch is an improvement, and 4 in a row without one are not yet too many
    with pytest.warns(ConvergenceWarning, match="^max_iter=5 epochs are done") as caught:
        BatchNormClassifier(tol=10.0, n_iter_no_change=4, max_iter=5).fit(X, y)
    assert caught[0].filename == __file__
    with pytest.warns(ConvergenceWarning):
        assert BatchNormClassifier(tol=10.0, n_iter_no_change=np.inf, max_iter=30).fit(X, y).n_iter_ == 30


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_early_stopping_keeps_the_best_epoch(estimator):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(60, 5))
    y = rng.integers(2, size=60)  # nothing to learn: the score only falls after a while
    settings = {"early_stopping": True, "random_state": 3, "learning_rate_init": 0.02, "validation_fraction": 0.3}
    one = estimator(**settings, n_iter_no_change=5).fit(X, y)
    scores = one.validation_scores_
    best = int(np.argmax(scores))
    assert one.best_validation_score_ == max(scores)
    assert 0 < best < len(scores) - 1 == one.n_iter_ - 1
    assert state(one) == state(estimator(**settings, max_iter=best + 1).fit(X, y))
    assert one.model_[1].num_batches_tracked == best + 1  # each epoch trained, also after the first score
    assert estimator(max_iter=1).fit(X, y).validation_scores_ is None


def test_early_stopping_holds_out_a_part_of_every_class():
    X, y = blobs(90)
    y[:30], y[30:] = 0, 1
    scored = []

    class Spy(BatchNormClassifier):
        @staticmethod
        def _score(labels, prediction, sample_weight):
            scored.append(labels)
            return accuracy_score(labels, prediction)

    Spy(early_stopping=True, validation_fraction=0.2, max_iter=1).fit(X, y.astype(str))
    assert sorted(scored[0]) == ["0"] * 6 + ["1"] * 12
