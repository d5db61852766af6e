# cython: boundscheck=False, wraparound=False, cdivision=True
"""An optimizer's step: every array checked before the first one changes, then parameter by parameter, in the dict's order.

Design: the loops stand in kernels/optim.pyx. What is no plain memory (strided, byte-swapped) is worked on through a copy.
"""
import numpy as np

cimport cython
cimport numpy as cnp
from cpython.pycapsule cimport PyCapsule_GetPointer
from cython.parallel cimport parallel, prange

from fastbn.arguments cimport is_plain
from fastbn.kernels cimport machine
from fastbn.kernels.rounding cimport Control, as_before, ieee
from fastbn.kernels.updates cimport Arrays, Rule, Update, Updates

from fastbn import kernels
from fastbn.atomic import change

cnp.import_array()

cdef Updates *UPDATES = <Updates *>PyCapsule_GetPointer(kernels.updates, "fastbn.kernels.Updates")

cdef enum:
    SHORT = 16384        # below, giving the GIL away costs more than it gives others
    LINE = 64            # elements: no two threads write to one cache line


@cython.final
@cython.freelist(16)
cdef class Task:
    """One parameter in one step, its arrays checked, and held while the GIL is released."""
    cdef Arrays arrays
    cdef bint decayed
    cdef cnp.ndarray p
    cdef cnp.ndarray g
    cdef cnp.ndarray p_plain    # p and g themselves, or room for copies
    cdef cnp.ndarray g_plain
    cdef list buffers


cdef cnp.ndarray fitting(object a, cnp.ndarray like, str what, object name):
    """a as an array of float32 or float64, and of the dtype and shape of `like`; TypeError or ValueError if it is not."""
    if not is_plain(a):
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
    cdef Arrays *w = &task.arrays
    cdef cnp.ndarray buffer
    task.decayed = True
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


cdef void run(Update update, Rule *r, Arrays *a) noexcept nogil:
    cdef int threads = machine.threads(0) if a.size >= machine.settings().parallel_from_elements else 1
    cdef Py_ssize_t share
    cdef Py_ssize_t first
    cdef int i
    cdef Control word
    if threads < 2:
        update(r, a, 0, a.size)
        return
    share = (a.size + threads * LINE - 1) // (threads * LINE) * LINE
    with parallel(num_threads=threads):
        word = ieee()
        for i in prange(threads, schedule="static"):
            first = min(i * share, a.size)
            update(r, a, first, min(share, a.size - first))
        as_before(word)


cdef object step(Update update, Rule *decaying, double no_decay, object params, object grads, dict buffers, frozenset exclude, list changes):
    """changes: arrays of one number, with what it becomes. They change with the parameters, whatever a signal's handler raises afterwards."""
    cdef Task task
    cdef list tasks = [checked(name, p, grads, buffers) for name, p in params.items()]
    cdef Rule plain = decaying[0]
    cdef Rule *r
    cdef Control word
    plain.decay = no_decay
    if exclude:
        for task, name in zip(tasks, params):
            task.decayed = name not in exclude
    for task in tasks:
        r = decaying if task.decayed else &plain
        # Copied now, not sooner: an earlier parameter of this step may be the same memory.
        if task.p_plain is not task.p:
            cnp.PyArray_CopyInto(task.p_plain, task.p)
        if task.g_plain is not task.g:
            cnp.PyArray_CopyInto(task.g_plain, task.g)
        word = ieee()
        if task.arrays.size < SHORT:
            update(r, &task.arrays, 0, task.arrays.size)
        else:
            with nogil:
                run(update, r, &task.arrays)
        as_before(word)
        if task.p_plain is not task.p:
            cnp.PyArray_CopyInto(task.p, task.p_plain)
    change(changes)


# --- what fastbn/optim.py calls, once a step. params, grads: the model's dicts; buffers: lists of arrays, by the same keys ----------

def sgd(params, grads, dict buffers, double lr, double momentum, bint nesterov, double weight_decay, frozenset exclude, list changes):
    cdef Rule r
    r.lr, r.momentum, r.nesterov, r.decay = lr, momentum, nesterov, weight_decay
    step(UPDATES.sgd, &r, 0, params, grads, buffers, exclude, changes)


def rmsprop(params, grads, dict buffers, double lr, double alpha, double eps, double weight_decay, double momentum,
            frozenset exclude, list changes):
    cdef Rule r
    r.lr, r.beta2, r.eps, r.decay, r.momentum = lr, alpha, eps, weight_decay, momentum
    step(UPDATES.rmsprop, &r, 0, params, grads, buffers, exclude, changes)


def adam(params, grads, dict buffers, double step_size, double beta1, double beta2, double correction, double eps, double kept,
         frozenset exclude, list changes):
    cdef Rule r
    r.lr, r.beta1, r.beta2, r.correction, r.eps, r.decay = step_size, beta1, beta2, correction, eps, kept
    step(UPDATES.adam, &r, 1, params, grads, buffers, exclude, changes)
