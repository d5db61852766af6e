# cython: boundscheck=False, wraparound=False, cdivision=True
"""BatchStats: what a batch's forward hands to its backward; and how the statistics of several batches become one, or an average."""
import operator
import sys

import numpy as np

cimport cython
cimport numpy as cnp
from cpython.mem cimport PyMem_Free
from libc.string cimport memcpy

from fastbn.arguments cimport as_array, load, new_doubles
from fastbn.kernels.rounding cimport Control, as_before, ieee

cnp.import_array()


@cython.freelist(8)
cdef class BatchStats:
    """Mean and variance of each feature over one batch; immutable.

    Parameters
    ----------
    mean, var : array_like of shape (C,)
        Mean and variance of ``1/m``. They are kept as float64.
    count : int
        Number of values per feature, m.
    mean_low : array_like of shape (C,), optional
        Low part of the mean, which rounding took from it: the mean is ``mean + mean_low``.

    Examples
    --------
    >>> import fastbn
    >>> stats = fastbn.moments([[1.0, 10.0], [3.0, 10.0]])
    >>> stats.mean, stats.var, stats.count
    (array([ 2., 10.]), array([1., 0.]), 2)
    """
    def __init__(self, mean, var, count, mean_low=None):
        mean = np.asarray(as_array(mean, "mean"), dtype=np.float64)
        var = np.asarray(as_array(var, "var"), dtype=np.float64)
        low = np.zeros_like(mean) if mean_low is None else np.asarray(as_array(mean_low, "mean_low"), dtype=np.float64)
        if mean.ndim != 1 or var.shape != mean.shape or low.shape != mean.shape:
            raise ValueError(f"expected mean, var and mean_low of one shape (C,), got {mean.shape}, {var.shape} and {low.shape}")
        m = operator.index(count)
        if not 0 <= m <= sys.maxsize:
            raise ValueError(f"expected count to be at least 0 and at most {sys.maxsize}, got {m}")
        if self.data != NULL:
            raise TypeError("expected BatchStats to be made once: it is immutable")
        self.reserve(len(mean), m, False)
        load(mean, self.data, self.C, 0, "mean")
        load(low, self.data + self.C, self.C, 0, "mean_low")
        load(var, self.data + 2 * self.C, self.C, 0, "var")

    def __dealloc__(self):
        PyMem_Free(self.data)

    cdef int reserve(self, Py_ssize_t C, Py_ssize_t count, bint renormalised) except -1:
        self.data = new_doubles(5 if renormalised else 3, C)
        self.C = C
        self.count = count
        self.renormalised = renormalised
        return 0

    cdef double *correction(self) noexcept:
        """(2, C): r and d, of renormalised statistics."""
        return self.data + 3 * self.C

    cdef cnp.ndarray row(self, Py_ssize_t i):
        cdef cnp.npy_intp shape[1]
        shape[0] = self.C
        cdef cnp.ndarray copy = cnp.PyArray_SimpleNew(1, shape, cnp.NPY_FLOAT64)
        memcpy(cnp.PyArray_DATA(copy), self.data + i * self.C, self.C * sizeof(double))
        cnp.PyArray_CLEARFLAGS(copy, cnp.NPY_ARRAY_WRITEABLE)
        return copy

    @property
    def mean(self):
        """High part of the mean: a read-only copy, float64 of shape (C,)."""
        return self.row(0)

    @property
    def mean_low(self):
        """Low part of the mean: a read-only copy, at most half a unit in the last place of the high part."""
        return self.row(1)

    @property
    def var(self):
        """Variance of ``1/m``: a read-only copy, float64 of shape (C,)."""
        return self.row(2)

    def __repr__(self):
        return f"BatchStats(mean={self.mean!r}, var={self.var!r}, count={self.count})"

    def __reduce__(self):
        return BatchStats, (self.mean, self.var, self.count, self.mean_low)


cdef BatchStats new_stats(Py_ssize_t C, Py_ssize_t count, bint renormalised=False):
    """Statistics whose values are still to be written."""
    cdef BatchStats stats = BatchStats.__new__(BatchStats)
    stats.reserve(C, count, renormalised)
    return stats


cdef void merge_part(double *mean, double *low, double *spread, double weight, const double *part_mean, const double *part_low,
                     const double *part_var, double times, double part_weight, Py_ssize_t C) noexcept nogil:
    """merge; the part's spread is part_var*times."""
    cdef double total = weight + part_weight
    cdef double between = weight * part_weight / total
    cdef double share = part_weight / total
    cdef bint heavier = part_weight > weight
    cdef double base, rest, delta, step, high, back
    cdef Py_ssize_t c
    if heavier:  # from the heavier part, the step is no longer than the deviations
        share = -weight / total
    for c in range(C):
        delta = (part_mean[c] - mean[c]) + (part_low[c] - low[c])
        spread[c] += part_var[c] * times + delta * delta * between
        base = part_mean[c] if heavier else mean[c]
        rest = part_low[c] if heavier else low[c]
        step = delta * share + rest
        # Knuth's TwoSum, so that a mean far above the deviations loses nothing over many parts.
        high = base + step
        back = high - base
        low[c] = (base - (high - back)) + (step - back)
        mean[c] = high


def merge(into, double weight, part, double part_weight):
    """The statistics of two parts as one, in place, by the rule of Chan, Golub & LeVeque (1979).

    Each part is (3, C): a mean's high and low part, and the sum of weighted squared deviations from it. For parts that fade in between,
    the result is the exponentially weighted variance (West 1979).
    """
    cdef double[::1] mean = into[0], low = into[1], spread = into[2]
    cdef const double[::1] part_mean = part[0], part_low = part[1], part_spread = part[2]
    cdef Py_ssize_t C = mean.shape[0]
    cdef Control word
    if not C == low.shape[0] == spread.shape[0] == part_mean.shape[0] == part_low.shape[0] == part_spread.shape[0]:
        raise ValueError(f"expected statistics of {C} features, got {[len(row) for row in (*into, *part)]}")
    if not C:
        return
    if not weight:  # a difference to 0 would round the mean to one number
        mean[:], low[:], spread[:] = part_mean, part_low, part_spread
        return
    word = ieee()
    merge_part(&mean[0], &low[0], &spread[0], weight, &part_mean[0], &part_low[0], &part_spread[0], 1, part_weight, C)
    as_before(word)


def merged(numbers, counts):
    """BatchStats of several parts together: (size, 3, C) has mean, mean_low and var of each, (size,) how many values it has of each feature.

    They are merged in their order. A part alone, among empty ones, keeps its bits.
    """
    cdef const double[:, :, ::1] parts = np.ascontiguousarray(numbers, np.float64)
    cdef const double[::1] n = np.ascontiguousarray(counts, np.float64)
    cdef Py_ssize_t C = parts.shape[2]
    cdef Py_ssize_t first = 0
    cdef Py_ssize_t i, c
    cdef double seen
    cdef bint alone = True
    cdef BatchStats stats
    cdef double *row
    cdef Control word
    if parts.shape[0] == 0 or parts.shape[0] != n.shape[0] or parts.shape[1] != 3:
        raise ValueError(f"expected statistics of shape (parts, 3, C) and as many counts, got {np.shape(numbers)} and {np.shape(counts)}")
    stats = new_stats(C, int(np.sum(n)))
    if not C:
        return stats
    while first < parts.shape[0] - 1 and not n[first]:
        first += 1
    if not n[first]:
        first = 0
    row = stats.data
    memcpy(row, &parts[first, 0, 0], 3 * C * sizeof(double))
    seen = n[first]
    word = ieee()
    for i in range(first + 1, parts.shape[0]):
        if not n[i]:
            continue
        if alone:
            alone = False
            for c in range(C):
                row[2 * C + c] *= seen
        merge_part(row, row + C, row + 2 * C, seen, &parts[i, 0, 0], &parts[i, 1, 0], &parts[i, 2, 0], n[i], n[i], C)
        seen += n[i]
    if not alone:
        for c in range(C):
            row[2 * C + c] /= seen
    as_before(word)
    return stats


cdef void average_part(double *mean, double *var, const double *part_mean, const double *part_var, double count, double factor, bint unbiased,
                       Py_ssize_t C) noexcept nogil:
    """``(1 - factor)*old + factor*batch`` into running averages."""
    cdef double correction = count / (count - 1) if unbiased else 1.0
    cdef Py_ssize_t c
    for c in range(C):
        mean[c] = (1 - factor) * mean[c] + factor * part_mean[c]
        var[c] = (1 - factor) * var[c] + factor * (part_var[c] * correction)


def averaged(average, numbers, counts, momentum, Py_ssize_t tracked, bint unbiased):
    """(mean, var) and their number of batches, after further batches: (size, 2, C) has mean and var of each, (size,) its count.

    Empty batches do not count. With momentum None, all batches weigh the same.
    """
    cdef const double[:, :, ::1] parts = np.ascontiguousarray(numbers, np.float64)
    cdef const double[::1] n = np.ascontiguousarray(counts, np.float64)
    cdef cnp.ndarray mean = np.array(average[0], np.float64)
    cdef cnp.ndarray var = np.array(average[1], np.float64)
    cdef Py_ssize_t C = parts.shape[2]
    cdef Py_ssize_t i
    cdef Control word
    if parts.shape[0] != n.shape[0] or parts.shape[1] != 2 or np.shape(mean) != (C,) or np.shape(var) != (C,):
        raise ValueError(f"expected statistics of shape (batches, 2, {C}) and as many counts, got {np.shape(numbers)} and {np.shape(counts)}")
    cdef double given = 0 if momentum is None else momentum
    cdef bint alike = momentum is None
    word = ieee()
    for i in range(parts.shape[0] if C else 0):
        if n[i]:
            tracked += 1
            average_part(<double *>cnp.PyArray_DATA(mean), <double *>cnp.PyArray_DATA(var), &parts[i, 0, 0], &parts[i, 1, 0], n[i],
                         1.0 / tracked if alike else given, unbiased, C)
    as_before(word)
    return mean, var, tracked
