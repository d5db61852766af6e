# cython: boundscheck=False, wraparound=False, cdivision=True
"""The optimizers' updates, compiled once for each instruction set: one pass over a parameter, its gradient and its buffers.

Design: a step checks every array before it changes the first one, and then takes parameter by parameter, in the dict's order. The loops do to each
element what a sequence of NumPy operations on whole arrays would, rounding after each, with scalars rounded to the array's type first; elements do
not meet, so neither threads nor vectors can change a bit. What is no plain memory (strided, byte-swapped) is worked on through a copy.
"""
import numpy as np

cimport cython
cimport numpy as cnp
from cython.parallel cimport prange
from libc.math cimport sqrt, sqrtf

from fastbn.kernels cimport machine
from fastbn.kernels.types cimport real

cnp.import_array()

cdef enum:
    THREADED = 524288    # fewest elements of one parameter that are worth a parallel region: below, it saves under 0.1 ms
    SHORT = 16384        # below, giving the GIL away costs more than it gives others
    LINE = 64            # elements: no two threads write to one cache line

cdef enum Kind:
    SGD
    RMSPROP
    ADAM

ctypedef struct Rule:
    Kind kind
    double lr            # in Adam over 1 - beta1^t
    double decay         # weight decay; in Adam what is left of the parameter: 1 - lr*weight_decay
    double momentum
    bint nesterov
    double beta1
    double beta2         # RMSprop's alpha
    double correction    # sqrt(1 - beta2^t)
    double eps

ctypedef struct Work:
    void *data[4]        # parameter, gradient, buffers
    int buffers
    bint is_float64
    Py_ssize_t size


@cython.final
@cython.freelist(16)
cdef class Task:
    """One parameter in one step, its arrays checked, and held while the GIL is released."""
    cdef Work work
    cdef cnp.ndarray p
    cdef cnp.ndarray g
    cdef cnp.ndarray p_plain    # p and g themselves, or room for copies
    cdef cnp.ndarray g_plain
    cdef list buffers

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


cdef void update(Rule *r, int buffers, real *p, real *g, real *a, real *b, Py_ssize_t n) noexcept nogil:
    """n elements. Each setting is a loop of its own: a test inside the loop would not vectorise with every compiler."""
    if r.kind == ADAM:
        adam_loop(p, g, a, b, n, r)
    elif r.kind == RMSPROP:
        if buffers == 1:
            if r.decay == 0:
                rmsprop_loop(p, g, a, b, n, r, False, False)
            else:
                rmsprop_loop(p, g, a, b, n, r, True, False)
        elif r.decay == 0:
            rmsprop_loop(p, g, a, b, n, r, False, True)
        else:
            rmsprop_loop(p, g, a, b, n, r, True, True)
    elif buffers == 0:
        if r.decay == 0:
            sgd_loop(p, g, a, n, r, False, False, False)
        else:
            sgd_loop(p, g, a, n, r, True, False, False)
    elif r.nesterov:
        if r.decay == 0:
            sgd_loop(p, g, a, n, r, False, True, True)
        else:
            sgd_loop(p, g, a, n, r, True, True, True)
    elif r.decay == 0:
        sgd_loop(p, g, a, n, r, False, True, False)
    else:
        sgd_loop(p, g, a, n, r, True, True, False)


cdef void part(Rule *r, Work *w, Py_ssize_t first, Py_ssize_t n) noexcept nogil:
    if w.is_float64:
        update(r, w.buffers, <double *>w.data[0] + first, <double *>w.data[1] + first, <double *>w.data[2] + first, <double *>w.data[3] + first, n)
    else:
        update(r, w.buffers, <float *>w.data[0] + first, <float *>w.data[1] + first, <float *>w.data[2] + first, <float *>w.data[3] + first, n)


cdef void run(Rule *r, Work *w) noexcept nogil:
    cdef int threads = machine.threads(0) if w.size >= THREADED else 1
    cdef Py_ssize_t share
    cdef Py_ssize_t first
    cdef int i
    if threads < 2:
        part(r, w, 0, w.size)
        return
    share = (w.size + threads * LINE - 1) // (threads * LINE) * LINE
    for i in prange(threads, schedule="static", num_threads=threads):
        first = min(i * share, w.size)
        part(r, w, first, min(share, w.size - first))

# --- checks -----------------------------------------------------------------------------------------------------------------

cdef cnp.ndarray fitting(object a, cnp.ndarray like, str what, object name):
    """a as an array of float32 or float64, and of the dtype and shape of `like`; TypeError or ValueError if it is not."""
    if not cnp.PyArray_Check(a) or not cnp.PyArray_CheckExact(a) and isinstance(a, np.ma.MaskedArray):
        raise TypeError(f"expected the {what} {name!r} as a NumPy array, got {type(a).__name__}")
    cdef cnp.ndarray array = a
    cdef int kind = cnp.PyArray_TYPE(array)
    if kind != cnp.NPY_FLOAT32 and kind != cnp.NPY_FLOAT64:
        raise TypeError(f"expected the {what} {name!r} of dtype float32 or float64, got {array.dtype}")
    if like is not None and kind != cnp.PyArray_TYPE(like):
        raise TypeError(f"expected the {what} {name!r} of dtype {like.dtype}, got {array.dtype}")
    if like is not None and not cnp.PyArray_SAMESHAPE(array, like):
        raise ValueError(f"expected the {what} {name!r} of shape {(<object>like).shape}, got {(<object>array).shape}")
    return array


cdef cnp.ndarray room(cnp.ndarray like):
    return cnp.PyArray_SimpleNew(cnp.PyArray_NDIM(like), cnp.PyArray_DIMS(like), cnp.PyArray_TYPE(like))


cdef bint apart(cnp.ndarray a, cnp.ndarray b) noexcept:
    """Whether two contiguous arrays share no memory."""
    cdef char *x = <char *>cnp.PyArray_DATA(a)
    cdef char *y = <char *>cnp.PyArray_DATA(b)
    return x + cnp.PyArray_NBYTES(a) <= y or y + cnp.PyArray_NBYTES(b) <= x


cdef Task checked(object name, object p, object grads, dict buffers):
    cdef Task task = Task.__new__(Task)
    cdef Work *w = &task.work
    cdef cnp.ndarray buffer
    task.buffers = buffers.get(name)
    if task.buffers is None:
        raise KeyError(f"expected the parameters that the optimizer was made for, {sorted(buffers)}, got {name!r} too")
    g = grads.get(name)
    if g is None:
        raise KeyError(f"expected a gradient of {name!r}, got none")
    task.p = task.p_plain = fitting(p, task.buffers[0] if task.buffers else None, "parameter", name)
    task.g = task.g_plain = fitting(np.asarray(g) if cnp.PyArray_IsAnyScalar(g) else g, task.p, "gradient of", name)
    if not cnp.PyArray_ISWRITEABLE(task.p):
        raise ValueError(f"expected the parameter {name!r} to be writeable, got a read-only array")
    if not cnp.PyArray_ISCARRAY(task.p):
        task.p_plain = room(task.p)
    if not cnp.PyArray_ISCARRAY_RO(task.g) or not apart(task.g, task.p_plain):
        task.g_plain = room(task.p)
    w.size = cnp.PyArray_SIZE(task.p)
    w.is_float64 = cnp.PyArray_TYPE(task.p) == cnp.NPY_FLOAT64
    w.data = [cnp.PyArray_DATA(task.p_plain), cnp.PyArray_DATA(task.g_plain), cnp.PyArray_DATA(task.p_plain), cnp.PyArray_DATA(task.p_plain)]
    for buffer in task.buffers:
        if not cnp.PyArray_ISCARRAY(fitting(buffer, task.p, "optimizer's array of", name)):
            raise ValueError(f"expected the optimizer's arrays of {name!r} to be contiguous and writeable")
        w.data[2 + w.buffers] = cnp.PyArray_DATA(buffer)
        w.buffers += 1
    return task


cdef object step(Rule *r, object params, object grads, dict buffers):
    cdef Task task
    cdef list tasks = [checked(name, p, grads, buffers) for name, p in params.items()]
    for task in tasks:
        # Copied now, not sooner: an earlier parameter of this step may be the same memory.
        if task.p_plain is not task.p:
            cnp.PyArray_CopyInto(task.p_plain, task.p)
        if task.g_plain is not task.g:
            cnp.PyArray_CopyInto(task.g_plain, task.g)
        if task.work.size < SHORT:
            part(r, &task.work, 0, task.work.size)
        else:
            with nogil:
                run(r, &task.work)
        if task.p_plain is not task.p:
            cnp.PyArray_CopyInto(task.p, task.p_plain)


# --- what fastbn/optim.py calls, once a step. params, grads: the model's dicts; buffers: lists of arrays, by the same keys ----------
def sgd(params, grads, dict buffers, double lr, double momentum, bint nesterov, double weight_decay):
    cdef Rule r
    r.kind, r.lr, r.momentum, r.nesterov, r.decay = SGD, lr, momentum, nesterov, weight_decay
    step(&r, params, grads, buffers)


def rmsprop(params, grads, dict buffers, double lr, double alpha, double eps, double weight_decay, double momentum):
    cdef Rule r
    r.kind, r.lr, r.beta2, r.eps, r.decay, r.momentum = RMSPROP, lr, alpha, eps, weight_decay, momentum
    step(&r, params, grads, buffers)


def adam(params, grads, dict buffers, double step_size, double beta1, double beta2, double correction, double eps, double kept):
    cdef Rule r
    r.kind, r.lr, r.beta1, r.beta2, r.correction, r.eps, r.decay = ADAM, step_size, beta1, beta2, correction, eps, kept
    step(&r, params, grads, buffers)
