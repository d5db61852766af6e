"""The numerics contract against rational arithmetic: data of many kinds, a search for the worst, and hostile scales.

One call holds many features. A longdouble picks the worst of them, and fractions judge those.

FASTBN_CLIMBS is how many generations each search has, 20 by default (`.ci/run` takes 600, an hour is about 30,000),
FASTBN_SEED where it begins.
"""

import math
import os
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import pytest
import twin

import fastbn

DTYPES = ["float32", "float64"]
ACTIVATIONS = {None: 1.0, "relu": 0.0, "leaky_relu": 0.01}
# Units of rounding. In float64 the variance's own error, up to 5 of them, counts one and a half times in dx. The
# longest search found 12.7.
FORWARD, GRADIENT = 5, {"float32": 8, "float64": 16}
# Weights and means of gradients below this count as this: float32 holds no products of them.
FLOOR = {"float32": 1e-30, "float64": 0.0}
# (M, S) of an (M, C, S) array: rows, short planes, planes
VIEWS = [
    *[(m, 1) for m in (2, 3, 4, 5, 9, 16, 31, 48, 100)],
    *[(1, s) for s in (2, 3, 5, 9, 31, 49, 63)],
    *[(2, 3), (3, 2), (3, 17), (5, 5), (9, 7), (2, 63), (20, 4)],
    *[(1, 64), (2, 70)],
]


class Truth(NamedTuple):
    """Arrays of (m, C); `size` times a few units of rounding is the bound of an error."""

    y: np.ndarray
    y_size: np.ndarray
    dx: np.ndarray
    dx_size: np.ndarray


def rational(a):
    return np.vectorize(Fraction, otypes=[object])(np.asarray(a, np.float64))


def inverse_root(v):
    """1/sqrt(v) of fractions, to 60 digits and more."""
    p, q = v.numerator, v.denominator
    shift = max(0, 512 - (p * q).bit_length())
    return Fraction(math.isqrt(p * q << 2 * shift), p << shift)


def truth(case, rows, exact):
    """Formulas as in the contract, in fractions or in longdouble. rows: which values of y are positive."""
    number = rational if exact else np.longdouble
    x, dy, weight, bias, eps, slope = (
        number(a) for a in (case.x, case.dy, case.weight, case.bias, case.eps, case.slope)
    )
    floor = number(FLOOR[case.x.dtype.name])
    m = len(x)
    d = x - x.sum(0) / m
    d = d - d.sum(0) / m
    var = (d * d).sum(0) / m + eps
    r = np.vectorize(inverse_root, otypes=[object])(var) if exact else 1 / np.sqrt(var)
    xhat = d * r
    g = np.where(rows, dy, dy * slope)
    gx = g * xhat
    size = np.maximum(abs(weight), floor)
    return Truth(
        weight * xhat + bias,
        size * (1 + abs(xhat)) + abs(bias),
        weight * r * (g - g.sum(0) / m - xhat * (gx.sum(0) / m)),
        size * r * (abs(g) + np.maximum(abs(g).sum(0) / m, floor) + abs(xhat) * np.maximum(abs(gx).sum(0) / m, floor)),
    )


class Case(NamedTuple):
    """x and dy as (m, C); weight and bias as (C,). slope: the activation's, where y is not positive."""

    x: np.ndarray
    dy: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    eps: float
    slope: float

    def only(self, c):
        return Case(self.x[:, c], self.dy[:, c], self.weight[c], self.bias[c], self.eps, self.slope)


def viewed(a, view):
    """(m, C) as a contiguous (M, C, S)."""
    return np.ascontiguousarray(a.reshape(*view, a.shape[1]).swapaxes(1, 2))


def results(case, view, activation):
    """y before any activation, its signs after it, dx: as (m, C)."""
    x, parameters = viewed(case.x, view), (case.weight, case.bias, case.eps)
    plain, stats = fastbn.batch_norm_forward(x, *parameters)
    y = fastbn.batch_norm_forward(x, *parameters, activation=activation)[0]
    dx = fastbn.batch_norm_backward(viewed(case.dy, view), x, stats, *parameters, activation=activation)[0]
    return (a.swapaxes(1, 2).reshape(case.x.shape) for a in (plain, y > 0, dx))


def errors(case, plain, positive, dx, exact=False):
    """The largest error of y and that of dx in each feature, in units of their size."""
    true = truth(case, positive | (case.slope == 1), exact)
    number = rational if exact else np.longdouble
    dtype = case.x.dtype
    u, spacing = number(twin.unit(dtype)), number(np.finfo(dtype).smallest_subnormal)
    found = []
    for got, expected, size in ((plain, true.y, true.y_size), (dx, true.dx, true.dx_size)):
        finite = np.isfinite(got)
        error = abs(number(np.where(finite, got, 0)) - expected)
        # Below the smallest normal number the spacing is constant, and no relative bound can hold.
        excess = np.maximum(error - spacing, number(0)) / np.where(size == 0, number(1), size) / u
        found.append(np.where(finite, excess, np.inf).astype(np.float64).max(0))
    return found


def check(case, view, activation):
    """Both bounds: fractions have the last word on the worst features that use up half of one."""
    got = list(results(case, view, activation))
    looks, gradient = errors(case, *got), GRADIENT[case.x.dtype.name]
    for look, bound in zip(looks, (FORWARD, gradient), strict=True):
        c = int(np.argmax(look))
        if look[c] < bound / 2:
            continue
        one = case.only([c])
        y, dx = errors(one, *(a[:, [c]] for a in got), exact=True)
        at = f"x {one.x.ravel().tolist()}, dy {one.dy.ravel().tolist()}, weight {one.weight}, bias {one.bias}"
        assert y[0] <= FORWARD, f"y is off by {y[0]:.3g} units of rounding: {at}"
        assert dx[0] <= gradient, f"dx is off by {dx[0]:.3g} units of rounding: {at}"


def outlier(rng, m, c):
    x = rng.standard_normal((m, c))
    x[rng.integers(m, size=c), np.arange(c)] *= 10.0 ** rng.uniform(0, 3, c)
    return x


def clusters(rng, m, c):
    few = np.where(rng.random((m, c)) < rng.random(c), rng.random(c), rng.random(c))
    return few + 10.0 ** rng.uniform(-6, -1, c) * rng.standard_normal((m, c))


def middle_apart(rng, m, c):
    """One value apart, where a careless choice of pivots looks; as in [10.55, 7.91, 14.23, 9.31, 10.96]."""
    x = rng.standard_normal((m, c)) + rng.uniform(-9, 9, c)
    x[m // 2] += rng.choice([-1, 1], c) * rng.uniform(1.5, 3, c) * x.std(0)
    return x


KINDS = {
    "normal": lambda rng, m, c: rng.standard_normal((m, c)),
    "offset": lambda rng, m, c: rng.standard_normal((m, c)) + rng.uniform(-9, 9, c),
    "far": lambda rng, m, c: rng.standard_normal((m, c)) + 10.0 ** rng.uniform(1, 6, c),
    "sorted": lambda rng, m, c: np.sort(rng.standard_normal((m, c)), 0),
    "skewed": lambda rng, m, c: np.exp(3 * rng.standard_normal((m, c))),
    "few values": lambda rng, m, c: np.where(rng.random((m, c)) < rng.random(c), rng.random(c), rng.random(c)),
    "outlier": outlier,
    "clusters": clusters,
    "middle apart": middle_apart,
}


def gradients(rng, x):
    """As they come; of a few examples; of the most unusual value alone."""
    dy = rng.standard_normal(x.shape)
    kind = rng.integers(3, size=x.shape[1])
    dy *= (kind != 1) | (rng.random(x.shape) < 2 / len(x))
    dy *= (kind != 2) | (x == x.max(0))
    return dy


def test_the_oracle():
    """Against numbers with closed forms: (-1, 0, 1) has the variance 2/3, and 1/sqrt(2/3 + 10/3) is a half."""
    assert inverse_root(Fraction(4)) == Fraction(1, 2)
    assert abs(inverse_root(Fraction(2)) ** 2 * 2 - 1) < Fraction(1, 10**60)
    assert abs(inverse_root(Fraction(2, 10**90)) ** 2 * 2 / 10**90 - 1) < Fraction(1, 10**60)
    x, dy = np.array([[-1.0], [0.0], [1.0]]), np.array([[1.0], [0.0], [0.0]])
    case = Case(x, dy, np.full(1, 2.0), np.full(1, 3.0), 10 / 3, 1.0)
    for exact in (True, False):
        true = truth(case, np.ones((3, 1), bool), exact)
        np.testing.assert_allclose(true.y.astype(float).ravel(), [2, 3, 4], rtol=1e-15)
        np.testing.assert_allclose(true.y_size.astype(float).ravel(), [6, 5, 6], rtol=1e-15)
        # g - 1/3 - x_hat * (-1/6), times 2 * 1/2
        np.testing.assert_allclose(true.dx.astype(float).ravel(), [7 / 12, -1 / 3, -1 / 4], rtol=1e-15)
        np.testing.assert_allclose(true.dx_size.astype(float).ravel(), [17 / 12, 1 / 3, 5 / 12], rtol=1e-15)


@pytest.mark.parametrize("view", VIEWS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_view_of_every_kind_of_data(dtype, view):
    rng = np.random.default_rng(VIEWS.index(view))
    m, c = math.prod(view), 300
    for k, make in enumerate(KINDS.values()):
        x = make(rng, m, c).astype(dtype)
        x = x[:, (x != x[0]).any(0)]
        dy = gradients(rng, x).astype(dtype)
        weight, bias = rng.standard_normal((2, x.shape[1])).astype(dtype)
        activation = list(ACTIVATIONS)[(k + view[0]) % 3]
        check(Case(x, dy, weight, bias, 1e-5, ACTIVATIONS[activation]), view, activation)


def test_five_values_that_broke_a_pivot():
    x = np.array([10.55499014404112, 7.913406777350321, 14.229534366718632, 9.305238453141198, 10.959251810387045])
    case = Case(x[:, None], np.ones((5, 1)), np.ones(1), np.zeros(1), 1e-5, 1.0)
    check(case, (1, 5), None)


def mutated(rng, a):
    """Each column in some of its values, by nothing to all of them."""
    size = 10.0 ** rng.uniform(-7 if a.dtype == np.float32 else -16, 0, a.shape[-1])
    return (a * (1 + rng.standard_normal(a.shape) * size * (rng.random(a.shape) < rng.choice([0.2, 0.5, 1])))).astype(
        a.dtype
    )


@pytest.mark.parametrize("view", [(3, 1), (5, 1), (48, 1), (1, 3), (1, 5), (1, 48), (2, 8)], ids=str)
@pytest.mark.parametrize("aim", ["y", "dx"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_climbing_towards_the_largest_error(dtype, aim, view):
    rng = np.random.default_rng(int(os.environ.get("FASTBN_SEED", "8")))
    x = np.concatenate([make(rng, math.prod(view), 40) for make in KINDS.values()], 1).astype(dtype)
    x = x[:, (x != x[0]).any(0)]
    c = x.shape[1]
    activation = list(ACTIVATIONS)[view[0] % 3]
    best = Case(
        x, gradients(rng, x).astype(dtype), np.ones(c, dtype), np.zeros(c, dtype), 1e-5, ACTIVATIONS[activation]
    )
    heights = np.zeros(c)
    for climb in range(int(os.environ.get("FASTBN_CLIMBS", "20"))):
        case = best
        if climb:
            case = best._replace(x=mutated(rng, best.x), weight=mutated(rng, best.weight))
            if aim == "dx" and climb % 3:
                case = case._replace(dy=mutated(rng, best.dy), x=best.x if climb % 3 == 1 else case.x)
        height = errors(case, *results(case, view, activation))[aim == "dx"]
        higher = height > heights
        best = best._replace(**{k: np.where(higher, getattr(case, k), getattr(best, k)) for k in ("x", "dy", "weight")})
        heights = np.where(higher, height, heights)
        if climb % 20 == 19:  # the lower half goes on from where the upper half stands
            order = np.argsort(heights)
            order[: c // 2] = order[-(c // 2) :]
            best, heights = best.only(order), heights[order]
    check(best, view, activation)


@pytest.mark.parametrize("view", [(2, 1), (9, 1), (40, 1), (1, 9), (2, 40), (3, 70)], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("eps", [1e-5, 1e-70, *(pytest.param(eps, marks=pytest.mark.long) for eps in (1e-12, 1e-30))])
def test_float32_at_every_scale(activation, eps, view):
    """x, dy and weights from tiny to huge, side by side: features whose scales float32 cannot hold beside others."""
    rng = np.random.default_rng(4)
    m, c = math.prod(view), 1500
    scale, dy_scale, w_scale = (10.0 ** rng.uniform(*ends, c) for ends in ((-37, 36.5), (-40, 25), (-44, 8)))
    dy_scale[::3], w_scale[::2] = 1, 1
    x = (rng.standard_normal((m, c)) + rng.choice([0, 3, 1e3], c)) * scale
    dy = gradients(rng, x) * dy_scale
    weight, bias = rng.standard_normal((2, c)) * w_scale
    # the range that the contract names
    std = np.sqrt(x.var(0) + eps)
    y_most, dx_most = abs(weight) * (1 + math.sqrt(m)) + abs(bias), abs(weight) / std * abs(dy).max(0) * 3 * m
    inside = (abs(x).max(0) < 9.9e36) & (y_most < 1e36) & (dx_most < 1e36) & (x != x[0]).any(0)
    x, dy, weight, bias = (a[..., inside].astype("float32") for a in (x, dy, weight, bias))
    assert x.shape[1] > 500
    check(Case(x, dy, weight, bias, eps, ACTIVATIONS[activation]), view, activation)


@pytest.mark.parametrize(
    ("x_scale", "dy_scale", "weight", "eps"),
    [
        (1e34, 1e-6, 1e3, 1e-5),
        (1e-30, 1e10, 1e-10, 1e-70),
        (9e36, 1, 1, 1e-5),
        (3e36, 1e-3, 1e-2, 1e-5),
        (1, 1, 1e-40, 1e-5),
    ],
)
@pytest.mark.parametrize("view", [(64, 1), (4, 16), (1, 100)], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_scales_that_left_float32(x_scale, dy_scale, weight, eps, view, activation):
    rng = np.random.default_rng(5)
    x, dy = rng.uniform(-1, 1, (2, math.prod(view), 200))
    x, dy = (x * x_scale).astype("float32"), (dy * dy_scale).astype("float32")
    weight = np.full(200, weight, "float32")
    check(
        Case(x, dy, weight, (weight * rng.standard_normal(200)).astype("float32"), eps, ACTIVATIONS[activation]),
        view,
        activation,
    )
