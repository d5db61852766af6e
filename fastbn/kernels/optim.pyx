# cython: cdivision=True
"""The optimizers' loops, compiled once for each instruction set: one pass over a parameter, its gradient and its buffers.

Design: the loops do to each element what a sequence of NumPy operations on whole arrays would, rounding after each, with scalars rounded to the
array's type first. Each setting is a loop of its own: a test inside the loop would not vectorise with every compiler.
"""
from cpython.pycapsule cimport PyCapsule_New
from libc.math cimport sqrt, sqrtf

from fastbn.kernels.updates cimport Arrays, Rule, Updates

ctypedef fused real:
    float
    double

# --- one pass. d is the gradient with its decay, and in the end what is taken from p, but for the rate ------------------------------

cdef inline real root(real x) noexcept nogil:
    return sqrtf(x) if real is float else sqrt(x)


cdef inline void sgd_loop(real *p, real *g, real *v, Py_ssize_t n, Rule *r,
                          const bint decay, const bint velocity, const bint nesterov) noexcept nogil:
    cdef real lr = <real>r.lr
    cdef real weight_decay = <real>r.decay
    cdef real momentum = <real>r.momentum
    cdef real d
    cdef Py_ssize_t i
    for i in range(n):
        d = p[i] * weight_decay + g[i] if decay else g[i]
        if velocity:
            v[i] = v[i] * momentum + d
            d = v[i] * momentum + d if nesterov else v[i]
        p[i] -= d * lr


cdef inline void rmsprop_loop(real *p, real *g, real *s, real *v, Py_ssize_t n, Rule *r, const bint decay, const bint velocity) noexcept nogil:
    cdef real lr = <real>r.lr
    cdef real weight_decay = <real>r.decay
    cdef real momentum = <real>r.momentum
    cdef real alpha = <real>r.beta2
    cdef real rest = <real>(1 - r.beta2)
    cdef real eps = <real>r.eps
    cdef real d
    cdef Py_ssize_t i
    for i in range(n):
        d = p[i] * weight_decay + g[i] if decay else g[i]
        s[i] = s[i] * alpha + d * d * rest
        d = d / (root(s[i]) + eps)
        if velocity:
            d = v[i] * momentum + d
            v[i] = d
        p[i] -= d * lr


cdef inline void adam_loop(real *p, real *g, real *m, real *v, Py_ssize_t n, Rule *r) noexcept nogil:
    cdef real lr = <real>r.lr
    cdef real kept = <real>r.decay      # times 1, without decay, changes no bit
    cdef real beta2 = <real>r.beta2
    cdef real rest1 = <real>(1 - r.beta1)
    cdef real rest2 = <real>(1 - r.beta2)
    cdef real correction = <real>r.correction
    cdef real eps = <real>r.eps
    cdef Py_ssize_t i
    for i in range(n):
        m[i] += (g[i] - m[i]) * rest1
        v[i] = v[i] * beta2 + g[i] * g[i] * rest2
        p[i] = p[i] * kept - m[i] / (root(v[i]) / correction + eps) * lr


# --- which loop ---------------------------------------------------------------------------------------------------------------------

cdef inline void sgd_of(real *p, real *g, real *v, Py_ssize_t n, Rule *r, int buffers) noexcept nogil:
    if buffers == 0:
        if r.decay == 0:
            sgd_loop(p, g, v, n, r, False, False, False)
        else:
            sgd_loop(p, g, v, n, r, True, False, False)
    elif r.nesterov:
        if r.decay == 0:
            sgd_loop(p, g, v, n, r, False, True, True)
        else:
            sgd_loop(p, g, v, n, r, True, True, True)
    elif r.decay == 0:
        sgd_loop(p, g, v, n, r, False, True, False)
    else:
        sgd_loop(p, g, v, n, r, True, True, False)


cdef inline void rmsprop_of(real *p, real *g, real *s, real *v, Py_ssize_t n, Rule *r, int buffers) noexcept nogil:
    if buffers == 1:
        if r.decay == 0:
            rmsprop_loop(p, g, s, v, n, r, False, False)
        else:
            rmsprop_loop(p, g, s, v, n, r, True, False)
    elif r.decay == 0:
        rmsprop_loop(p, g, s, v, n, r, False, True)
    else:
        rmsprop_loop(p, g, s, v, n, r, True, True)


cdef void sgd(Rule *r, Arrays *a, Py_ssize_t first, Py_ssize_t n) noexcept nogil:
    if a.is_float64:
        sgd_of(<double *>a.data[0] + first, <double *>a.data[1] + first, <double *>a.data[2] + first, n, r, a.buffers)
    else:
        sgd_of(<float *>a.data[0] + first, <float *>a.data[1] + first, <float *>a.data[2] + first, n, r, a.buffers)


cdef void rmsprop(Rule *r, Arrays *a, Py_ssize_t first, Py_ssize_t n) noexcept nogil:
    if a.is_float64:
        rmsprop_of(<double *>a.data[0] + first, <double *>a.data[1] + first, <double *>a.data[2] + first, <double *>a.data[3] + first,
                   n, r, a.buffers)
    else:
        rmsprop_of(<float *>a.data[0] + first, <float *>a.data[1] + first, <float *>a.data[2] + first, <float *>a.data[3] + first,
                   n, r, a.buffers)


cdef void adam(Rule *r, Arrays *a, Py_ssize_t first, Py_ssize_t n) noexcept nogil:
    if a.is_float64:
        adam_loop(<double *>a.data[0] + first, <double *>a.data[1] + first, <double *>a.data[2] + first, <double *>a.data[3] + first, n, r)
    else:
        adam_loop(<float *>a.data[0] + first, <float *>a.data[1] + first, <float *>a.data[2] + first, <float *>a.data[3] + first, n, r)


cdef Updates UPDATES
UPDATES.sgd = sgd
UPDATES.rmsprop = rmsprop
UPDATES.adam = adam

updates = PyCapsule_New(&UPDATES, "fastbn.kernels.Updates", NULL)
