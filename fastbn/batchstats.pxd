cimport numpy as cnp


cdef class BatchStats:
    cdef double *data      # (3, C): mean, mean_low, var; (5, C) where renormalised: r, d
    cdef Py_ssize_t C
    cdef bint renormalised
    cdef readonly Py_ssize_t count

    cdef int reserve(self, Py_ssize_t C, Py_ssize_t count, bint renormalised) except -1
    cdef double *correction(self) noexcept
    cdef cnp.ndarray row(self, Py_ssize_t i)


cdef void average_part(double *mean, double *var, const double *part_mean, const double *part_var, double count, double factor, bint unbiased,
                       Py_ssize_t C) noexcept nogil
cdef BatchStats new_stats(Py_ssize_t C, Py_ssize_t count, bint renormalised=*)
