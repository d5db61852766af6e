import copy
import importlib
import io
import pickle
import sys
import warnings

import joblib
import numpy as np
import pytest
from scipy.sparse import csr_matrix
from scipy.special import softmax
from sklearn.base import clone
from sklearn.datasets import load_digits, load_iris, make_multilabel_classification
from sklearn.exceptions import ConvergenceWarning, DataConversionWarning, NotFittedError
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import accuracy_score
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import get_tags
from sklearn.utils.estimator_checks import (
    check_transformer_get_feature_names_out,
    check_transformer_get_feature_names_out_pandas,
    parametrize_with_checks,
)

from fastbn import BatchNorm, checkpoint, nn
from fastbn.estimators import BatchNormClassifier, BatchNormRegressor, BatchNormTransformer

ESTIMATORS = [BatchNormClassifier, BatchNormRegressor]
pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


@parametrize_with_checks(
    [
        BatchNormClassifier(),
        BatchNormClassifier(batch_norm=False, activation="logistic", solver="rmsprop", max_iter=50),
        BatchNormClassifier((20, 10), "tanh", solver="sgd", learning_rate_init=0.05, early_stopping=True),
        BatchNormRegressor(),
        BatchNormRegressor((), learning_rate_init=0.1, early_stopping=True),
        BatchNormTransformer(),
        BatchNormTransformer(momentum=0.1),
    ]
)
def test_scikit_learns_checks(estimator, check):
    check(estimator)


def test_tags_say_what_to_check():
    assert get_tags(BatchNormClassifier()).classifier_tags.multi_label
    assert get_tags(BatchNormRegressor()).target_tags.multi_output
    assert get_tags(BatchNormTransformer()).transformer_tags.preserves_dtype == ["float64", "float32"]


@pytest.mark.parametrize("momentum", [None, 0.1])
@pytest.mark.parametrize(
    "check", [check_transformer_get_feature_names_out, check_transformer_get_feature_names_out_pandas]
)
def test_scikit_learns_checks_of_names(check, momentum):
    check("BatchNormTransformer", BatchNormTransformer(momentum=momentum))


def blobs(n=90, classes=3, dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    y = np.arange(n) % classes
    return (rng.normal(size=(n, 5)) + 2 * np.eye(classes, 5)[y]).astype(dtype), y


def state(estimator):
    return {key: array.tobytes() for key, array in estimator.model_.state_dict().items()}


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


@pytest.mark.parametrize("more", [
    {}, {"alpha": 3.0}, {"momentum": 0}, {"nesterovs_momentum": False}, {"hidden_layer_sizes": (7, 6)},
    {"activation": "tanh"}, {"activation": "logistic"}, {"activation": "identity", "learning_rate_init": 0.05},
    {"tol": 0.02, "n_iter_no_change": 2},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("kind", ["classes", "binary", "labels", "numbers", "two numbers"])
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


# --- random states, going on, copies


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_random_state_decides_all(estimator):
    X, y = blobs()
    fits = [
        estimator(max_iter=3, early_stopping=early, batch_size=20, random_state=seed).fit(X, y)
        for early in (False, True)
        for seed in (1, 1, 2, np.random.RandomState(1))
    ]
    for one, same, other, instance in (fits[:4], fits[4:]):
        assert state(one) == state(same) == state(instance)
        assert state(one) != state(other)
    assert state(estimator(max_iter=1).fit(X, y)) != state(estimator(max_iter=1).fit(X, y))


COPIES = {
    "pickle": lambda e: pickle.loads(pickle.dumps(e)),
    "deepcopy": copy.deepcopy,
    "joblib": lambda e: _through_joblib(e),
}


def _through_joblib(estimator):
    file = io.BytesIO()
    joblib.dump(estimator, file)
    file.seek(0)
    return joblib.load(file)


@pytest.mark.parametrize("made", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("solver", ["adam", "sgd", "rmsprop"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_copy_predicts_and_goes_on_alike(estimator, solver, made):
    X, y = blobs()
    one = estimator(20, solver=solver, batch_size=20, max_iter=3).fit(X, y)
    other = made(one)
    np.testing.assert_array_equal(one.predict(X), other.predict(X))
    for _ in range(2):
        one.partial_fit(X[:50], y[:50])
        other.partial_fit(X[:50], y[:50])
    assert state(one) == state(other)
    assert one.loss_curve_ == other.loss_curve_


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_partial_fit_is_one_epoch_after_another(estimator):
    X, y = blobs()
    one = estimator(random_state=0, batch_size=30)
    first = {"classes": [0, 1, 2]} if estimator is BatchNormClassifier else {}
    for n in range(1, 4):
        one.partial_fit(X, y, **first)
        assert one.n_iter_ == len(one.loss_curve_) == n
        assert not one.model_.training
    # The first one is that of fit: the same start, the same order.
    fitted = estimator(random_state=0, batch_size=30, max_iter=1).fit(X, y)
    assert fitted.loss_curve_ == one.loss_curve_[:1]
    assert fitted.partial_fit(X, y).partial_fit(X, y).loss_curve_ == one.loss_curve_
    one.set_params(max_iter=2).fit(X, y)
    assert one.n_iter_ == len(one.loss_curve_) == 2


def test_each_partial_fit_has_an_order_of_its_own():
    X, y = blobs()  # steps that change nothing: only what shares a mini-batch makes a difference
    one = BatchNormRegressor(learning_rate_init=1e-300, batch_size=20, random_state=0)
    assert len({one.partial_fit(X, y).loss_ for _ in range(5)}) == 5


def test_partial_fit_knows_classes_that_come_later():
    X, y = blobs()
    classifier = BatchNormClassifier().partial_fit(X[y < 2], y[y < 2], classes=[2, 1, 0])
    assert classifier.classes_.tolist() == [0, 1, 2]
    assert classifier.partial_fit(X[y == 2], y[y == 2]).predict_proba(X).shape == (90, 3)
    with pytest.raises(ValueError, match=r"^expected labels among the classes \[0, 1, 2\], got \[7\]$"):
        classifier.partial_fit(X[:2], [7, 1])
    with pytest.raises(ValueError, match=r"^expected classes as in the first call, \[0, 1, 2\], got \[0, 1\]$"):
        classifier.partial_fit(X[:2], [0, 1], classes=[0, 1])
    with pytest.raises(ValueError, match=r"^expected classes in the first call to partial_fit, got None$"):
        BatchNormClassifier().partial_fit(X, y)


def test_checkpoint_and_folding_take_the_model(tmp_path):
    X, y = blobs()
    classifier = BatchNormClassifier((10, 10), max_iter=3).fit(X, y)
    checkpoint.save(tmp_path / "model.safetensors", classifier.model_)
    loaded = checkpoint.load(tmp_path / "model.safetensors").eval()
    np.testing.assert_array_equal(classifier.predict(X), loaded(X).argmax(axis=1))
    folded = classifier.model_.folded()
    assert [type(layer) for layer in folded] == [nn.Dense] * 3
    np.testing.assert_array_equal(classifier.predict(X), folded(X).argmax(axis=1))


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
        def _score(labels, prediction):
            scored.append(labels)
            return accuracy_score(labels, prediction)

    Spy(early_stopping=True, validation_fraction=0.2, max_iter=1).fit(X, y.astype(str))
    assert sorted(scored[0]) == ["0"] * 6 + ["1"] * 12


# --- data and parameters


@pytest.mark.parametrize("labels", [["b", "a", "c"], [True, False], [-1, 1], [3.0, 7.0, 5.0]])
def test_labels_of_any_kind(labels):
    X, y = blobs(classes=len(labels))
    classifier = BatchNormClassifier(20, learning_rate_init=0.05, max_iter=20, random_state=0).fit(
        X, np.array(labels)[y]
    )
    assert classifier.classes_.tolist() == sorted(labels)
    assert classifier.predict_proba(X).shape == (90, len(labels))
    np.testing.assert_allclose(classifier.predict_proba(X).sum(axis=1), 1)
    np.testing.assert_array_equal(
        classifier.predict(X), classifier.classes_[classifier.predict_proba(X).argmax(axis=1)]
    )
    assert classifier.score(X, np.array(labels)[y]) > 0.9


@pytest.mark.parametrize("form", [np.asarray, csr_matrix])
def test_several_labels(form):
    X, Y = make_multilabel_classification(200, 8, n_classes=4, random_state=0)
    for early in (False, True):
        classifier = BatchNormClassifier(
            20, batch_size=20, learning_rate_init=0.05, max_iter=20, early_stopping=early, random_state=0
        )
        predicted = classifier.fit(X, form(Y)).predict(X)
        assert isinstance(predicted, type(form(Y)))
        p = classifier.predict_proba(X)
        np.testing.assert_array_equal(np.asarray(csr_matrix(predicted).todense()), p > 0.5)
        assert np.mean((p > 0.5) == Y) > 0.8
    classifier.partial_fit(X, form(Y))
    new = BatchNormClassifier(20, random_state=0).partial_fit(X, form(Y), classes=range(4))
    assert new.predict(X).shape == (200, 4)


def test_shapes_of_y():
    X, y = blobs()
    assert BatchNormRegressor(max_iter=2).fit(X, np.eye(3)[y]).predict(X).shape == (90, 3)
    for estimator in ESTIMATORS:
        with pytest.warns(DataConversionWarning, match="column-vector"):
            assert estimator(max_iter=2).fit(X, y[:, None]).predict(X).shape == (90,)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_single_sample(estimator):
    X, y = blobs()
    with pytest.raises(ValueError, match=r"n_samples=1$"):
        estimator().fit(X[:1], y[:1])
    fitted = estimator(batch_size=89, max_iter=2).fit(X, y)  # one is left over
    assert fitted.predict(X[:1]).shape == (1,)
    before = state(fitted)
    with pytest.raises(ValueError, match=r"n_samples=1$"):
        fitted.partial_fit(X[:1], y[:1])
    assert state(fitted) == before
    with pytest.raises(ValueError, match=r"got n_samples=3$"):
        estimator(early_stopping=True).fit(X[:3], y[:3])


def test_one_class():
    with pytest.raises(ValueError, match=r"^expected at least 2 classes to tell apart, got one class: \['a'\]$"):
        BatchNormClassifier().fit(np.eye(3), ["a"] * 3)


@pytest.mark.parametrize("wrong", [
    {"activation": "softplus"}, {"solver": "lbfgs"}, {"hidden_layer_sizes": (5, 0)}, {"hidden_layer_sizes": -1},
    {"alpha": -1.0}, {"batch_size": 1}, {"learning_rate_init": 0.0}, {"max_iter": 0}, {"tol": -1.0},
    {"momentum": -0.1}, {"validation_fraction": 1.0}, {"beta_1": 1.0}, {"beta_2": -0.1}, {"n_iter_no_change": -1},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_wrong_parameter_is_named(estimator, wrong):
    X, y = blobs()
    fitted = estimator(max_iter=1).fit(X, y)
    before = state(fitted)
    for method in (fitted.set_params(**wrong).fit, fitted.partial_fit):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            method(X, y)
    assert state(fitted) == before


@pytest.mark.parametrize("estimator", [*ESTIMATORS, BatchNormTransformer])
def test_before_fit(estimator):
    with pytest.raises(NotFittedError):
        getattr(estimator(), "predict", getattr(estimator(), "transform", None))(np.eye(3))


def test_a_diverging_loss_says_where():
    X, y = blobs()
    with pytest.raises(FloatingPointError, match="epoch 1, step"):
        BatchNormRegressor((), solver="sgd", learning_rate_init=1e300, batch_size=10).fit(X * 1e5, y)


def test_prints_a_line_for_each_epoch(capsys):
    X, y = blobs()
    one = BatchNormClassifier(max_iter=2, verbose=True, early_stopping=True).fit(X, y)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        f"Iteration {i + 1}, loss = {loss:.8f}, validation score = {score:.6f}"
        for i, (loss, score) in enumerate(zip(one.loss_curve_, one.validation_scores_, strict=True))
    ]


def test_in_pipelines_and_searches():
    X, y = load_digits(return_X_y=True)
    X, y = X[:600], y[:600]
    pipeline = make_pipeline(
        BatchNormTransformer(),
        BatchNormClassifier(32, batch_size=50, learning_rate_init=0.01, max_iter=10, random_state=0),
    )
    assert cross_val_score(pipeline, X, y, cv=3).mean() > 0.8
    grid = {"batchnormclassifier__alpha": [1e-4, 1e3], "batchnormtransformer__momentum": [None, 0.5]}
    search = GridSearchCV(pipeline, grid, cv=2).fit(X, y)
    assert search.best_params_["batchnormclassifier__alpha"] == 1e-4
    assert search.score(X, y) > 0.9


# --- the transformer


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("offset", [0, 1e3])
def test_transformer_is_standard_scaler(dtype, offset):
    rng = np.random.default_rng(0)
    X = (rng.normal(size=(500, 7)) * np.logspace(-3, 3, 7) + offset).astype(dtype)
    X[:, 3] = 0.1  # constant
    ours, theirs = BatchNormTransformer().fit(X), StandardScaler().fit(X.astype("f8"))
    Y = ours.transform(X)
    assert Y.dtype == dtype
    u = np.finfo(dtype).eps
    np.testing.assert_allclose(Y, theirs.transform(X.astype("f8")), rtol=8 * u, atol=1e-8 if offset else 8 * u)
    for name in ("mean_", "var_", "scale_"):
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=1e-9)
    assert ours.n_samples_seen_ == theirs.n_samples_seen_
    back = ours.inverse_transform(Y)
    assert back.dtype == dtype
    np.testing.assert_allclose(back, X, rtol=4 * u, atol=4 * u * np.abs(X).max())
    np.testing.assert_array_equal(Y[:, 3], 0)
    np.testing.assert_array_equal(ours.transform(np.full((1, 7), 1.1))[:, 3], 1.1 - ours.mean_[3])


@pytest.mark.parametrize("sizes", [[500], [1] * 20 + [480], [100, 399, 1]])
def test_transformer_takes_a_stream_as_the_whole(sizes):
    X = np.random.default_rng(1).normal(3, 2, size=(500, 4))
    parts = np.split(X, np.cumsum(sizes)[:-1])
    scaler = BatchNormTransformer()
    for part in parts:
        scaler.partial_fit(part)
    whole = BatchNormTransformer().fit(X)
    assert scaler.n_samples_seen_ == whole.n_samples_seen_ == 500
    np.testing.assert_allclose(scaler.mean_, X.mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(scaler.var_, X.var(axis=0), rtol=1e-13)
    np.testing.assert_allclose(scaler.transform(X), whole.transform(X), rtol=1e-12, atol=1e-14)
    np.testing.assert_array_equal(scaler.fit(X).mean_, whole.mean_)


def test_transformer_follows_a_drifting_stream():
    rng = np.random.default_rng(2)
    parts = [rng.normal(k, 1 + k, size=(50, 3)) for k in range(10)]
    scaler = BatchNormTransformer(momentum=0.3)
    for k, part in enumerate(parts):
        scaler.partial_fit(part)
        weights = 0.3 * 0.7 ** np.arange(k, -1, -1)
        for average, statistic in ((scaler.mean_, np.mean), (scaler.var_, np.var)):
            expected = (
                sum(w * statistic(p, axis=0) for w, p in zip(weights, parts[: k + 1], strict=True)) / weights.sum()
            )
            np.testing.assert_allclose(average, expected, rtol=1e-12)
    expected = (parts[0] - scaler.mean_) / np.sqrt(scaler.var_)
    np.testing.assert_allclose(scaler.transform(parts[0]), expected, rtol=1e-12)
    np.testing.assert_allclose(scaler.inverse_transform(expected), parts[0], rtol=1e-12)
    twin = pickle.loads(pickle.dumps(scaler)).partial_fit(parts[0])
    np.testing.assert_array_equal(twin.mean_, scaler.partial_fit(parts[0]).mean_)


@pytest.mark.parametrize("momentum", [0, -0.1, 1.5])
def test_transformer_names_a_wrong_momentum(momentum):
    with pytest.raises(ValueError, match="momentum"):
        BatchNormTransformer(momentum=momentum).fit(np.eye(3))


def test_pandas_in_and_out():
    pandas = pytest.importorskip("pandas")
    X, y = blobs()
    frame = pandas.DataFrame(X, columns=list("abcde"))
    scaler = BatchNormTransformer().set_output(transform="pandas")
    scaled = scaler.fit_transform(frame)
    assert list(scaled) == list("abcde")
    np.testing.assert_allclose(scaled, BatchNormTransformer().fit_transform(X), rtol=1e-13)
    fitted = BatchNormClassifier(max_iter=2).fit(frame, pandas.Series(y, name="y"))
    assert fitted.feature_names_in_.tolist() == list("abcde")
    with pytest.raises(ValueError, match="feature names should match"):
        fitted.predict(frame.rename(columns={"a": "z"}))


def test_without_scikit_learn_the_extra_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("fastbn.estimators")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn.base", None)
    with pytest.raises(
        ImportError, match=r'^estimators need scikit-learn 1.6 or newer: pip install "fastbn\[train\]"$'
    ):
        importlib.import_module("fastbn.estimators")
