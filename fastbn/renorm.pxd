# cython: cdivision=True
"""Batch renormalisation (Ioffe 2017, algorithm 1), once for each feature: ``x_hat*r + d`` takes the place of x_hat.

Design: that is a matter of weight and bias, ``weight*r`` and ``bias + weight*d``, so the loops over x know nothing of it. r and d count as
constants in the gradients.
"""
from libc.math cimport sqrt

from fastbn.kernels.job cimport Job
from fastbn.kernels.rounding cimport Control, as_before, ieee


cdef inline double within(double a, double low, double high) noexcept nogil:
    """a, or the end that it lies beyond; NaN stays NaN."""
    return low if a < low else high if a > high else a


cdef inline void corrections(Job *job, double *running_mean, double *running_var, double r_max, double d_max, double *r, double *d) noexcept nogil:
    """``r = std/running_std`` within [1/r_max, r_max], ``d = (mean - running_mean)/running_std`` within [-d_max, d_max].

    Where neither is cut off, y is what inference gives with these averages. Without values there is nothing to correct: the statistics are
    NaN then, which would make NaN of gradients that are 0.
    """
    cdef Py_ssize_t c
    cdef double running_std
    cdef bint empty = job.M * job.S == 0
    cdef Control word = ieee()
    for c in range(job.C):
        if empty:
            r[c], d[c] = 1, 0
            continue
        running_std = sqrt(running_var[c] + job.eps)
        r[c] = within(sqrt(job.var[c] + job.eps) / running_std, 1 / r_max, r_max)
        d[c] = within(((job.mean[c] - running_mean[c]) + job.mean_low[c]) / running_std, -d_max, d_max)
    as_before(word)


cdef inline void correct_parameters(Job *job, double *r, double *d) noexcept nogil:
    cdef Py_ssize_t c
    cdef Control word = ieee()
    for c in range(job.C):
        job.bias[c] += job.weight[c] * d[c]
        job.weight[c] *= r[c]
    as_before(word)


cdef inline void correct_gradients(Job *job, double *r, double *d) noexcept nogil:
    """``dweight = sum g*(x_hat*r + d)``, from the sums of g*x_hat and of g."""
    cdef Py_ssize_t c
    cdef Control word = ieee()
    for c in range(job.C):
        job.dweight[c] = r[c] * job.dweight[c] + d[c] * job.dbias[c]
    as_before(word)
