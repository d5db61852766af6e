"""Weights of samples and of classes, and the meta-estimators that hand them on."""

import numpy as np
import pytest
import sklearn
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import load_iris
from sklearn.ensemble import (
    AdaBoostClassifier,
    BaggingClassifier,
    BaggingRegressor,
    StackingClassifier,
    VotingClassifier,
)
from sklearn.metrics import accuracy_score, r2_score
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.multiclass import OneVsRestClassifier
from sklearn.multioutput import MultiOutputClassifier
from test_estimators import ESTIMATORS, blobs, state

from fastbn.estimators import BatchNormClassifier, BatchNormRegressor, BatchNormTransformer

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")

# Full batches: every row has its part in every step.
FULL = {"batch_norm": False, "batch_size": 1000, "random_state": 0, "max_iter": 30, "alpha": 3.0}


def targets(kind, y):
    return {
        "labels": np.eye(3, dtype=int)[y] | np.eye(3, dtype=int)[y - 1], "numbers": y - 1.0, "binary": y > 0,
        "two numbers": np.eye(3)[y][:, :2],
    }.get(kind, y)  # fmt: skip


def assert_alike(one, other, X):
    assert one.n_iter_ == other.n_iter_
    np.testing.assert_allclose(one.loss_curve_, other.loss_curve_, rtol=1e-9)
    method = "predict_proba" if hasattr(one, "predict_proba") else "predict"
    np.testing.assert_allclose(getattr(one, method)(X), getattr(other, method)(X), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("solver", ["adam", "sgd", "rmsprop"])
@pytest.mark.parametrize("kind", ["classes", "binary", "labels", "numbers", "two numbers"])
def test_whole_numbers_are_repeated_rows(kind, solver):
    X, y = blobs()
    y = targets(kind, y)
    counts = np.random.default_rng(1).integers(0, 4, len(X))
    repeated = X.repeat(counts, axis=0), y.repeat(counts, axis=0)
    estimator = BatchNormRegressor if "numbers" in kind else BatchNormClassifier
    one = estimator(8, solver=solver, learning_rate_init=0.02, **FULL)
    other = clone(one)
    assert_alike(one.fit(X, y, sample_weight=counts), other.fit(*repeated), X)
    assert_alike(one.partial_fit(X, y, sample_weight=counts), other.partial_fit(*repeated), X)
    assert one.score(X, y, sample_weight=counts) == pytest.approx(other.score(*repeated))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("settings", [{}, {"batch_norm": False}, {"early_stopping": True}], ids=str)
def test_weights_that_are_all_alike_are_none(estimator, settings):
    X, y = blobs(dtype=np.float32)
    one = estimator(8, batch_size=20, max_iter=3, random_state=0, **settings).fit(X, y)
    for weights in (np.ones(90), [1] * 90, 1.0):
        assert state(clone(one).fit(X, y, sample_weight=weights)) == state(one)
    assert state(clone(one).set_params(alpha=0).fit(X, y, np.full(90, 1e-300))) == state(
        one.set_params(alpha=0).fit(X, y)
    )


@pytest.mark.parametrize("settings", [{}, {"batch_norm": False}, {"early_stopping": True}], ids=str)
def test_what_has_no_weight_is_not_learnt_but_stands_in_the_batches(settings):
    X, y = blobs()
    weights = np.where(np.arange(90) < 15, 0, 2.0)
    weights[3:80] = 0  # mini-batches of 5 without any weight occur
    other = np.where(weights > 0, y, (y + 1) % 3)
    one = BatchNormClassifier(8, batch_size=5, max_iter=5, random_state=0, **settings)
    assert state(clone(one).fit(X, y, weights)) == state(clone(one).fit(X, other, weights))
    if settings == {}:  # the statistics are those of all rows
        dense, norm, *_ = one.fit(X, y, weights).model_
        h = X @ dense.params["weight"].T
        np.testing.assert_allclose(norm.running_mean, h.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(norm.running_var, h.var(axis=0, ddof=1), rtol=1e-12)


@pytest.mark.parametrize(
    ("estimator", "score"), [(BatchNormClassifier, accuracy_score), (BatchNormRegressor, r2_score)]
)
def test_early_stopping_scores_by_weight_what_has_weight(estimator, score):
    X, y = blobs()
    weights = np.arange(90) % 4 / 3
    seen = []

    class Spy(estimator):
        @staticmethod
        def _score(labels, prediction, sample_weight):
            seen.append((np.array(labels), np.array(prediction), sample_weight))
            return score(labels, prediction, sample_weight=sample_weight)

    fitted = Spy(8, early_stopping=True, validation_fraction=0.3, max_iter=2).fit(X, y, sample_weight=weights)
    for (labels, prediction, held), value in zip(seen, fitted.validation_scores_, strict=True):
        assert len(held) == (21 if estimator is BatchNormClassifier else 20)  # of 67, or of 23, 22 and 22
        assert held.min() > 0
        right = (labels == prediction) if score is accuracy_score else None
        if right is not None:
            assert value == pytest.approx((right * held).sum() / held.sum())
        else:
            mean = (labels * held).sum() / held.sum()
            rest, all_of_it = ((labels - guess) ** 2 @ held for guess in (prediction, mean))
            assert value == pytest.approx(1 - rest / all_of_it)
    with pytest.raises(ValueError, match=r"^expected more samples to hold some of them out, got n_samples=1$"):
        Spy(early_stopping=True).fit(X, y, np.eye(90)[0])


WRONG = {
    "negative": (np.where(np.arange(90) == 5, -1, 1), "Negative values"), "NaN": (np.full(90, np.nan), "NaN"),
    "infinite": (np.where(np.arange(90) == 5, np.inf, 1), "infinity"), "zeros": (np.zeros(90), "weight.*zero"),
    "zero": (0.0, "weight.*zero"), "short": (np.ones(89), "sample_weight.shape"), "2-d": (np.ones((90, 2)), "1D"),
    "too large": (np.full(90, 1e308), "finite sum above zero"),
}  # fmt: skip


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(("weights", "message"), WRONG.values(), ids=WRONG)
def test_weights_that_do_not_fit_leave_all_as_it_was(estimator, weights, message):
    X, y = blobs()
    fitted = estimator(max_iter=1).fit(X, y)
    before = state(fitted)
    for method in (fitted.fit, fitted.partial_fit):
        with pytest.raises(ValueError, match=message):
            method(X, y, sample_weight=weights)
    assert state(fitted) == before


# --- classes


def test_class_weight_is_the_weight_of_each_of_its_samples():
    X, y = blobs()
    names = np.array(["1", "2", "x"])[y]  # texts, though two of them look like numbers
    one = BatchNormClassifier(8, **FULL)
    weighted = clone(one).set_params(class_weight={"1": 3, "x": 0.5}).fit(X, names)
    by_hand = np.array([3, 1, 0.5])[y]
    assert_alike(weighted, clone(one).fit(X, names, sample_weight=by_hand), X)
    counts = np.arange(90) % 4
    both = clone(weighted).fit(X, names, sample_weight=counts)
    assert_alike(both, clone(one).fit(X, names, sample_weight=by_hand * counts), X)
    for label in (np.int64, float, bool):
        two = y[y < 2].astype(label)
        weighted = clone(one).set_params(class_weight={np.int64(1): 3.0}).fit(X[y < 2], two)
        assert_alike(weighted, clone(one).fit(X[y < 2], two, np.where(two == 1, 3.0, 1)), X)
    parts = clone(one).set_params(class_weight={0: 2}).partial_fit(X, y, classes=[0, 1, 2])
    assert_alike(parts, clone(one).partial_fit(X, y, [0, 1, 2], np.where(y == 0, 2, 1)), X)


def test_balanced_classes_count_alike():
    X, y = blobs()
    rows = np.flatnonzero((y > 0) | (np.arange(90) < 12))  # 4, 30 and 30
    X, y = X[rows], y[rows]
    one = BatchNormClassifier(8, **FULL, class_weight="balanced")
    by_hand = clone(one).set_params(class_weight={k: 64 / (3 * n) for k, n in enumerate((4, 30, 30))})
    assert_alike(clone(one).fit(X, y), by_hand.fit(X, y), X)
    counts = 1 + np.arange(64) % 3
    assert_alike(one.fit(X, y, sample_weight=counts), clone(one).fit(X.repeat(counts, axis=0), y.repeat(counts)), X)
    counts[y == 2] = 0  # no weight is left for a class: it is known, but not predicted
    one.set_params(max_iter=300).fit(X, y, sample_weight=counts)
    assert one.classes_.tolist() == [0, 1, 2]
    assert 2 not in one.predict(X)


def test_class_weights_that_do_not_fit():
    X, y = blobs()
    for wrong in ("balance", [1, 2, 3], {0: -1.0}, {0: np.nan}, {0: "1"}, {0: np.inf}, 2):
        with pytest.raises(ValueError, match=r'^expected class_weight to be None, "balanced" or a dict'):
            BatchNormClassifier(class_weight=wrong).fit(X, y)
    with pytest.raises(ValueError, match=r"^expected the keys of class_weight among the classes \[0, 1, 2\], got {'0'"):
        BatchNormClassifier(class_weight={"0": 2.0}).fit(X, y)
    BatchNormClassifier(class_weight={0: 2, 1: 1, 2: 1, 3: 1}, max_iter=1).fit(X, y)  # a fold may lack a class
    with pytest.raises(ValueError, match=r"^expected class_weight=None where y has several labels"):
        BatchNormClassifier(class_weight="balanced").fit(X, np.eye(3, dtype=int)[y] | np.eye(3, dtype=int)[y - 1])
    with pytest.raises(ValueError, match=r'^expected class_weight as a dict in partial_fit, got "balanced"'):
        BatchNormClassifier(class_weight="balanced").partial_fit(X, y, classes=[0, 1, 2])
    with pytest.raises(ValueError, match=r"^expected weights with a finite sum above zero"):
        BatchNormClassifier(class_weight={0: 0, 1: 0, 2: 0}).fit(X, y)


# --- scikit-learn's own


def quick(**settings):
    return BatchNormClassifier(16, learning_rate_init=0.05, max_iter=10, batch_size=32, random_state=0, **settings)


META = {
    "AdaBoost": AdaBoostClassifier(quick(), n_estimators=3, random_state=0),
    "calibration": CalibratedClassifierCV(quick(), cv=2),
    "bagging": BaggingClassifier(quick(), 3, random_state=0),
    "stacking": StackingClassifier([("a", quick()), ("b", quick(batch_norm=False))], final_estimator=quick(), cv=2),
    "voting": VotingClassifier([("a", quick()), ("b", quick(early_stopping=True))], voting="soft"),
    "one against the rest": OneVsRestClassifier(quick()),
}


@pytest.mark.parametrize("meta", META.values(), ids=META)
def test_in_meta_estimators(meta):
    X, y = load_iris(return_X_y=True)
    X = BatchNormTransformer().fit_transform(X)
    assert clone(meta).fit(X, y).score(X, y) > 0.9
    if meta is META["one against the rest"]:  # which hands no weights on
        return
    rare = np.where(y == 2, 1e-9, 1.0)  # who hands the weights on never predicts the third class
    assert (clone(meta).fit(X, y, sample_weight=rare).predict(X) == 2).mean() < 0.05


def test_in_meta_estimators_of_several_outputs_and_of_numbers():
    X, y = load_iris(return_X_y=True)
    X = BatchNormTransformer().fit_transform(X)
    Y = np.stack([y, y == 1, np.zeros(150)], axis=1).astype(int)  # the third has one class
    assert MultiOutputClassifier(quick()).fit(X, Y, sample_weight=np.ones(150)).score(X, Y) > 0.9
    parts = MultiOutputClassifier(quick())
    for rows in np.random.default_rng(0).permutation(150).reshape(3, 50).repeat(6, axis=0):
        parts.partial_fit(X[rows], Y[rows], classes=[[0, 1, 2], [0, 1], [0]], sample_weight=np.ones(50))
    assert parts.score(X, Y) > 0.7
    regressor = BatchNormRegressor(16, learning_rate_init=0.02, max_iter=20, batch_size=32, random_state=0)
    assert BaggingRegressor(regressor, 3, random_state=0).fit(X, y, sample_weight=np.ones(150)).score(X, y) > 0.8


def test_weights_are_routed():
    X, y = blobs()
    weights = np.arange(90) % 4
    with sklearn.config_context(enable_metadata_routing=True):
        classifier = quick().set_fit_request(sample_weight=True).set_score_request(sample_weight=True)
        search = GridSearchCV(classifier, {"alpha": [1e-4, 1e-3]}, cv=2)
        search.fit(X, y, sample_weight=weights)
        assert search.score(X, y, sample_weight=weights) == pytest.approx(
            ((search.predict(X) == y) * weights).sum() / weights.sum()
        )
        scores = cross_val_score(classifier, X, y, cv=2, params={"sample_weight": weights}, error_score="raise")
        assert scores.mean() > 0.5
