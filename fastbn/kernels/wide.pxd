# cython: cdivision=True
"""float32 with the arithmetic of float64, for data whose scales float32 cannot hold: serial, plain loops, since it is rare."""
from libc.math cimport sqrt

from fastbn.kernels.lanes cimport act, unact
from fastbn.kernels.table cimport Job


cdef inline void normalize_wide(Job *job) noexcept nogil:
    """normalize for float32 with the arithmetic of float64; for the rare data above, so neither threads nor vectors."""
    cdef float *x = <float *>job.x
    cdef float *y = <float *>job.y
    cdef Py_ssize_t i
    cdef Py_ssize_t c
    cdef double z
    for i in range(job.M * job.C * job.S):
        c = i // job.S % job.C
        z = (<double>x[i] - job.mean[c] - job.mean_low[c]) * (job.weight[c] / sqrt(job.var[c] + job.eps)) + job.bias[c]
        y[i] = act(<float>z, job.activation)


cdef inline void backward_wide(Job *job) noexcept nogil:
    """backward for float32 with the arithmetic of float64."""
    cdef float *x = <float *>job.x
    cdef float *dy = <float *>job.dy
    cdef float *dx = <float *>job.y
    cdef double per = job.training / (<double>job.M * job.S)
    cdef Py_ssize_t i
    cdef Py_ssize_t c
    cdef int second
    cdef double invstd
    cdef double x_hat
    cdef float g
    for c in range(job.C):
        job.dweight[c] = 0
        job.dbias[c] = 0
    for second in range(2):
        for i in range(job.M * job.C * job.S):
            c = i // job.S % job.C
            invstd = 1 / sqrt(job.var[c] + job.eps)
            x_hat = (<double>x[i] - job.mean[c] - job.mean_low[c]) * invstd
            g = unact(dy[i], <float>(x_hat * job.weight[c] + job.bias[c]), job.activation)
            if second:
                dx[i] = ((g - job.dbias[c] * per) - x_hat * (job.dweight[c] * per)) * (job.weight[c] * invstd)
            else:
                job.dbias[c] += g
                job.dweight[c] += g * x_hat
