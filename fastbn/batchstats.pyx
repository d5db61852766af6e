"""BatchStats: what a batch's forward hands to its backward."""
import operator
import sys

import numpy as np

cimport cython
cimport numpy as cnp
from cpython.mem cimport PyMem_Free
from libc.string cimport memcpy

from fastbn.arguments cimport as_array, load, new_doubles

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
