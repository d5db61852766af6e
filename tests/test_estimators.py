import copy
import importlib
import io
import itertools
import pickle
import re
import sys
from pathlib import Path

import joblib
import numpy as np
import pytest
from scipy.sparse import csr_matrix
from sklearn.base import clone
from sklearn.datasets import load_digits, make_multilabel_classification
from sklearn.ensemble import BaggingClassifier
from sklearn.exceptions import DataConversionWarning, NotFittedError
from sklearn.model_selection import GridSearchCV, KFold, cross_val_score
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.utils import get_tags
from sklearn.utils.estimator_checks import (
    check_transformer_get_feature_names_out,
    check_transformer_get_feature_names_out_pandas,
    parametrize_with_checks,
)

from fastbn import checkpoint, nn
from fastbn.estimators import BatchNormClassifier, BatchNormRegressor, BatchNormTransformer

ESTIMATORS = [BatchNormClassifier, BatchNormRegressor]
pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


def weights_that_cannot_be_repeated_rows(estimator):
    """Why scikit-learn's check of that fails, by the check's name; it runs on 15 rows, which are one mini-batch."""
    reason = None
    if getattr(estimator, "early_stopping", False):
        reason = "of other rows, early stopping draws others to hold out"
    elif getattr(estimator, "batch_norm", False) and estimator.hidden_layer_sizes != ():
        reason = "a batch's statistics count each of its rows once, whatever its weight"
    return {} if reason is None else {"check_sample_weight_equivalence_on_dense_data": reason}


@parametrize_with_checks(
    [BatchNormClassifier(), BatchNormTransformer()], expected_failed_checks=weights_that_cannot_be_repeated_rows
)
def test_scikit_learns_checks(estimator, check):
    check(estimator)


@pytest.mark.long
@parametrize_with_checks(
    [
        BatchNormRegressor(),
        BatchNormClassifier(batch_norm=False, activation="logistic", solver="rmsprop", max_iter=50),
        BatchNormClassifier(
            (20, 10), "tanh", solver="sgd", learning_rate_init=0.05, early_stopping=True, batch_size=10, max_iter=50
        ),
        BatchNormRegressor((), learning_rate_init=0.1, early_stopping=True),
        BatchNormTransformer(momentum=0.1),
    ],
    expected_failed_checks=weights_that_cannot_be_repeated_rows,
)
def test_scikit_learns_checks_of_other_parameters(estimator, check):
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


@pytest.mark.parametrize(("estimator", "settings"), [
    (BatchNormClassifier, {}), (BatchNormClassifier, {"batch_norm": False, "solver": "sgd"}),
    (BatchNormRegressor, {"solver": "rmsprop"}),
], ids=str)  # fmt: skip
def test_a_memory_mapped_model_predicts_and_trains_on(estimator, settings, tmp_path):
    X, y = blobs()
    fitted = estimator(20, batch_size=20, max_iter=3, **settings).fit(X, y)
    expected = fitted.predict(X)
    file = tmp_path / "model.joblib"
    joblib.dump(fitted, file)
    fitted.partial_fit(X, y)
    # The last one writes into the file.
    for mode, made in itertools.product(("r", "c", "r+"), (*COPIES.values(), lambda e: e)):
        loaded = joblib.load(file, mmap_mode=mode)
        assert isinstance(loaded.model_.params["0.weight"], np.memmap)
        one = made(loaded)
        np.testing.assert_array_equal(one.predict(X), expected)
        if mode == "r" and one is loaded:
            before = state(one)
            with pytest.raises(ValueError, match=r"^expected a network that can be written into, got .*read-only"):
                one.partial_fit(X, y)
            assert state(one) == before
        else:
            assert state(one.partial_fit(X, y)) == state(fitted)
            assert one.loss_curve_ == fitted.loss_curve_
        if mode == "c":
            assert state(joblib.load(file, mmap_mode="r")) == state(joblib.load(file))
    new = joblib.load(file, mmap_mode="r").fit(X, y)  # a new network, in memory
    assert new.partial_fit(X, y).n_iter_ == 4


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
    assert [isinstance(layer, nn.Dense) for layer in folded] == [True] * 3
    np.testing.assert_array_equal(classifier.predict(X), folded(X).argmax(axis=1))


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


@pytest.mark.parametrize("label", ["a", 7, 2.0, True])
@pytest.mark.parametrize("settings", [{}, {"batch_norm": False}, {"early_stopping": True, "batch_size": 10}], ids=str)
def test_one_class_is_what_is_predicted(label, settings):
    X, _ = blobs(40, dtype=np.float32)
    classifier = BatchNormClassifier(8, **settings)
    for fitted in (classifier.fit(X, [label] * 40), clone(classifier).partial_fit(X, [label] * 40, classes=[label])):
        assert fitted.classes_.tolist() == [label]
        assert fitted.predict(X).tolist() == [label] * 40
        assert fitted.score(X, [label] * 40) == 1
        np.testing.assert_array_equal(fitted.predict_proba(X), np.ones((40, 1), np.float32))
        np.testing.assert_array_equal(fitted.predict_log_proba(X), np.zeros((40, 1)))


def test_folds_and_bags_of_one_class():
    X, y = blobs(60, 2)
    y = np.sort(y)
    settings = {"learning_rate_init": 0.05, "batch_size": 20, "max_iter": 3}
    scores = cross_val_score(BatchNormClassifier(8, **settings), X, y, cv=KFold(2), error_score="raise")
    assert scores.tolist() == [0, 0]  # trained on the one half, which is one class, and tried on the other
    pipeline = make_pipeline(BatchNormTransformer(), BatchNormClassifier(8, **settings))
    bags = BaggingClassifier(pipeline, 8, max_samples=2, random_state=0).fit(X, y)
    assert {len(member.classes_) for member in bags.estimators_} == {1, 2}
    assert bags.predict_proba(X).shape == (60, 2)


def test_labels_that_are_refused_leave_the_old_ones():
    X, y = blobs()
    fitted = BatchNormClassifier(max_iter=2, random_state=0).fit(X, y)
    before = state(fitted)
    for wrong in (X[:, 0], np.stack([y, y], axis=1)):
        with pytest.raises(ValueError, match=r"class|label"):
            fitted.fit(X[:, :2], wrong)
    assert state(fitted) == before
    assert set(fitted.predict(X)) <= set(y)


@pytest.mark.parametrize("wrong", [
    {"activation": "softplus"}, {"solver": "lbfgs"}, {"hidden_layer_sizes": (5, 0)}, {"hidden_layer_sizes": -1},
    {"alpha": -1.0}, {"batch_size": 1}, {"learning_rate_init": 0.0}, {"max_iter": 0}, {"tol": -1.0},
    {"momentum": -0.1}, {"validation_fraction": 1.0}, {"beta_1": 1.0}, {"beta_2": -0.1}, {"n_iter_no_change": -1},
    {"hidden_layer_sizes": "100"}, {"hidden_layer_sizes": None}, {"hidden_layer_sizes": (5.5,)}, {"alpha": np.nan},
    {"alpha": np.inf}, {"alpha": "1"}, {"tol": np.nan}, {"tol": None}, {"momentum": 1.5}, {"momentum": np.nan},
    {"validation_fraction": np.nan}, {"beta_1": np.nan}, {"beta_2": "0.9"}, {"learning_rate_init": np.nan},
    {"max_iter": 2.0}, {"batch_size": 20.0}, {"batch_size": None}, {"n_iter_no_change": 0}, {"n_iter_no_change": 2.5},
    {"n_iter_no_change": np.nan}, {"early_stopping": "no"}, {"batch_norm": None}, {"nesterovs_momentum": 2},
    {"verbose": -1}, {"verbose": "yes"}, {"activation": None}, {"solver": ["adam"]},
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


def test_parameters_of_numpys_types():
    X, y = blobs()
    numbers = {"alpha": np.float32(0.1), "max_iter": np.int64(2), "hidden_layer_sizes": np.array([3, 4])}
    BatchNormClassifier(**numbers, early_stopping=np.True_, verbose=0, n_iter_no_change=np.inf).fit(X, y)


def test_targets_of_another_kind():
    X, y = blobs()
    with pytest.raises(ValueError, match=r"^Unknown label type: continuous"):
        BatchNormClassifier().fit(X, X[:, 0])
    several = np.stack([y == 0, y == 1, y == 2], axis=1).astype(int)
    for one, other, first in ((several, y, "multilabel-indicator"), (y, several, "multiclass")):
        classifier = BatchNormClassifier(random_state=0).partial_fit(X, one, classes=[0, 1, 2])
        with pytest.raises(ValueError, match=f"^expected {first} y, .* got multi"):
            classifier.partial_fit(X, other)


MISSING = {
    "None": (["a", "b", None] * 4, r"None in y\[2\]"), "None beside numbers": ([0, None] * 6, r"None in y\[1\]"),
    "NaN beside text": (["a", float("nan")] * 6, r"nan in y\[1\]"),
    "float32 NaN": (("a", "b", np.float32("nan")) * 4, r"nan in y\[2\]"),
    "object": (np.array(["a", "b", None] * 4, object), r"None in y\[2\]"),
    "NaT": (np.array(["2020", "2021", "NaT"] * 4, "M8[D]"), r"NaT in y\[2\]"),
    "NaN": (np.array([0, 1, np.nan] * 4), "NaN"), "inf": (np.array([0, 1, np.inf] * 4), "infinity"),
}  # fmt: skip


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(("y", "named"), MISSING.values(), ids=MISSING)
def test_a_missing_label_is_no_class(estimator, y, named):
    with pytest.raises(ValueError, match=named):
        estimator().fit(np.eye(12), y)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_masks_are_not_lost(estimator):
    X, y = blobs(12)
    masked = np.ma.masked_array(X, X > 1), np.ma.masked_array(y, y > 1)
    for name, data in (("X", (masked[0], y)), ("y", (X, masked[1]))):
        with pytest.raises(TypeError, match=f"^expected {name} without a mask"):
            estimator().fit(*data)
    fitted = estimator(max_iter=1).fit(X, y)
    with pytest.raises(TypeError, match=r"^expected X without a mask"):
        fitted.predict(masked[0])


@pytest.mark.parametrize("missing", [np.datetime64("NaT"), type("NAType", (), {"__ne__": lambda *_: None})()])
def test_a_missing_label_of_pandas_and_of_dates(missing):
    for y in ([missing, "a", "b", "a"], np.array([missing, "a", "b", "a"], object)):
        with pytest.raises(ValueError, match=r"expected a y without missing values, got .* in y\[0\]"):
            BatchNormClassifier((2,), max_iter=1).fit(np.eye(4), y)


@pytest.mark.parametrize("method", ["fit", "partial_fit"])
def test_ctrl_c_leaves_the_network_that_there_was(method, monkeypatch):
    X, y = blobs()
    estimator = BatchNormClassifier((4,), max_iter=2, tol=1, random_state=0).fit(X, y)
    before = state(estimator), estimator.predict_proba(X).tobytes()

    def pressed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(estimator._optimizer), "step", pressed)
    with pytest.raises(KeyboardInterrupt):
        getattr(estimator, method)(X * 2, y)
    assert (state(estimator), estimator.predict_proba(X).tobytes()) == before


def test_targets_that_are_no_numbers():
    for y in (["1", "2"] * 6, np.array(["2020", "2021"] * 6, "M8[D]"), [b"1", b"2"] * 6):
        with pytest.raises(TypeError, match=r"^expected y to hold numbers, got "):
            BatchNormRegressor().fit(np.eye(12), y)
    with pytest.raises(ValueError, match=r"^expected a y that float32 can hold, .* from 1\.0 to 1e\+39$"):
        BatchNormRegressor().fit(np.eye(12, dtype=np.float32), [1, 1e39] * 6)


PAGE = Path(__file__).parents[1] / "docs" / "how-to" / "scikit-learn.md"


@pytest.mark.skipif(not PAGE.exists(), reason="the pages are not here")
def test_the_site_names_every_parameter_of_scikit_learns():
    page = PAGE.read_text(encoding="utf-8")
    table = page[page.index("* - parameter of `MLPClassifier`") :].split("```")[0]
    rows = [re.findall(r"`(\w+)`", row.split("\n  - ")[0]) for row in table.split("\n* - ")[1:]]
    theirs = MLPRegressor().get_params() | MLPClassifier().get_params()
    assert {*theirs} <= {name for row in rows for name in row}
    for ours in (BatchNormClassifier().get_params(), BatchNormRegressor().get_params()):
        assert [name for name in rows[0] if ours[name] != theirs[name]] == []


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_an_unknown_parameter_names_the_class_that_was_written(estimator):
    with pytest.raises(TypeError, match=rf"^{estimator.__name__}\.__init__\(\) .* 'warm_start'"):
        estimator(warm_start=True)


@pytest.mark.parametrize("estimator", [*ESTIMATORS, BatchNormTransformer])
def test_before_fit(estimator):
    with pytest.raises(NotFittedError):
        getattr(estimator(), "predict", getattr(estimator(), "transform", None))(np.eye(3))


def steep():
    X = np.random.default_rng(0).uniform(50, 300, (1000, 3))
    return X, X @ [1200.0, 300.0, -50.0]


@pytest.mark.parametrize("early_stopping", [True, False])
@pytest.mark.parametrize("settings", [
    {"solver": "sgd", "learning_rate_init": 0.01}, {"solver": "sgd", "learning_rate_init": 1e200},
    {"solver": "adam", "learning_rate_init": 1e200}, {"solver": "rmsprop", "learning_rate_init": 1e200},
    {"solver": "sgd", "learning_rate_init": 1e150, "batch_size": 1000, "n_iter_no_change": 1},
    {"solver": "adam", "learning_rate_init": 1e300, "batch_norm": False, "hidden_layer_sizes": ()},
], ids=str)  # fmt: skip
def test_divergence_names_the_epoch_and_leaves_the_old_network(settings, early_stopping):
    X, y = steep()
    regressor = BatchNormRegressor(random_state=1, max_iter=20, early_stopping=early_stopping).set_params(**settings)
    with pytest.raises(FloatingPointError, match=r"\bepoch \d+\b"):
        regressor.fit(X, y)
    with pytest.raises(NotFittedError):
        regressor.predict(X)
    fitted = regressor.set_params(learning_rate_init=1e-12, max_iter=1).fit(X, y)
    before = state(fitted), fitted.n_iter_
    with pytest.raises(FloatingPointError, match="epoch"):
        fitted.set_params(**settings, max_iter=20).fit(X, y)
    assert (state(fitted), fitted.n_iter_) == before


@pytest.mark.parametrize(("rate", "early_stopping", "named"), [
    (1e306, False, r"after epoch 1, the model's '0.weight'\[0, 0\] is inf: expected finite numbers"),
    (1e160, True, "the validation score is -inf at epoch 1"),
])  # fmt: skip
def test_the_last_step_diverges(rate, early_stopping, named):
    X, y = steep()
    one = BatchNormRegressor((), solver="sgd", momentum=0, learning_rate_init=rate, batch_size=1000, max_iter=1)
    with pytest.raises(FloatingPointError, match=f"^{named}$"):
        one.set_params(early_stopping=early_stopping, alpha=0).fit(X, y)


def test_early_stopping_does_not_score_what_is_not_finite(monkeypatch):
    X, y = blobs()

    def overflowing(self, X):
        return np.full((len(X), 3), np.nan)

    monkeypatch.setattr(BatchNormClassifier, "_forward", overflowing)
    with pytest.raises(FloatingPointError, match=r"^the predictions for the held-out samples are .* epoch 1$"):
        BatchNormClassifier(8, early_stopping=True).fit(X, y)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("solver", ["adam", "sgd", "rmsprop"])
def test_a_partial_fit_that_diverges_is_undone(estimator, solver):
    X, y = blobs()
    one = estimator(8, solver=solver, batch_size=20, random_state=0)
    first = {"classes": [0, 1, 2]} if estimator is BatchNormClassifier else {}
    with pytest.raises(FloatingPointError, match="epoch 1"):
        one.partial_fit(X * 1e160, y, **first)
    assert not hasattr(one, "model_")
    one.partial_fit(X, y, **first)
    twin = copy.deepcopy(one)
    with pytest.raises(FloatingPointError, match="epoch 1"):
        one.partial_fit(X * 1e160, y)
    for again in (one, twin):
        again.partial_fit(X, y)
    assert state(one) == state(twin)
    assert one.loss_curve_ == twin.loss_curve_
    assert one.n_iter_ == 2


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
