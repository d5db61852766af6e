"""NIST's univariate data sets: the statistics agree with the certified values as far as float64 can store the data."""

import math
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest

import fastbn
from bench import nist


def agree(found, expected, digits):
    return abs(Fraction(found) - expected) <= abs(expected) / 10**digits


@pytest.mark.parametrize("name", nist.DATA_SETS)
def test_the_certified_values(name):
    """The data themselves are right, since their exact statistics are the certified ones."""
    data = nist.DATA_SETS[name]
    numbers = list(map(Fraction, data.decimals))
    mean = sum(numbers) / len(numbers)
    var = sum((v - mean) ** 2 for v in numbers) / (len(numbers) - 1)
    with localcontext(prec=40):
        std = (Decimal(var.numerator) / Decimal(var.denominator)).sqrt()
    assert agree(Fraction(data.mean), mean, 14)
    assert agree(Fraction(data.std), Fraction(std), 14)


@pytest.mark.parametrize("shape", ["rows", "plane", "rows of two"])
@pytest.mark.parametrize("name", nist.DATA_SETS)
def test_moments_of_nists_data(name, shape):
    data = nist.DATA_SETS[name]
    x = np.array(data.values)
    n = len(x)
    # The numbers as they are stored, to the last digit of float64.
    numbers = list(map(Fraction, x.tolist()))
    mean = sum(numbers) / n
    var = sum((v - mean) ** 2 for v in numbers) / n
    arrays = {"rows": x[:, None], "plane": x[None, None], "rows of two": np.stack([x, x[::-1]], 1)}
    stats = fastbn.moments(arrays[shape])
    for c in range(len(stats.mean)):
        assert abs(Fraction(stats.mean[c]) + Fraction(stats.mean_low[c]) - mean) < Fraction(math.sqrt(var)) / 10**15
        assert agree(stats.mean[c], mean, 15)
        assert agree(stats.var[c], var, 15)
    # The decimal numbers, which float64 rounds: the further from 0, the fewer digits of the deviations it keeps.
    lost = max(0, math.log10(abs(float(mean)) / math.sqrt(var)))
    assert agree(stats.mean[0], Fraction(data.mean), 14)
    assert agree(math.sqrt(stats.var[0] * n / (n - 1)), Fraction(data.std), int(14.5 - lost))
