cimport numpy as cnp

from fastbn.kernels.job cimport RELU, Activation

cpdef cnp.ndarray as_array(object a, str name)
cpdef bint is_masked(object a) except -1
cpdef cnp.ndarray floating(object a, str name=*)
cdef int feature_axis(cnp.ndarray x, object axis) except -1
cpdef cnp.ndarray checked_mask(object mask, cnp.ndarray x, int axis)
cdef bint dense(cnp.ndarray x, int axis, Py_ssize_t *M, Py_ssize_t *S) noexcept
cdef bint usable_as(cnp.ndarray a, cnp.ndarray b) noexcept
cdef tuple shape_of(cnp.ndarray a)
cdef bint overlap(cnp.ndarray a, cnp.ndarray b) except -1
cdef bint identical(cnp.ndarray a, cnp.ndarray b) noexcept
cdef bint is_plain(object a) except -1
cdef cnp.ndarray checked_out(object out, cnp.ndarray x)
cdef Activation activation_of(object name) except? RELU
cdef double checked_eps(object eps) except -1
cdef double *new_doubles(Py_ssize_t rows, Py_ssize_t C) except NULL
cdef int load(object a, double *to, Py_ssize_t C, double default, str name) except -1
cdef void *writable(object a, Py_ssize_t C, bint float64_only, str name) except NULL
cdef cnp.ndarray updatable(object a, str name)
cdef int store(double *values, cnp.ndarray to, Py_ssize_t C) except -1
