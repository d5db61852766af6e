# cython: boundscheck=False, wraparound=False, cdivision=True
"""The checks of arguments, and what they mean for memory: dtypes, views, overlaps, (C,) parameters.

Design: written against NumPy's C interface, because a call through its Python one costs as much as a small batch's arithmetic.
"""
import sys

import numpy as np
from numpy.exceptions import AxisError

cimport numpy as cnp
from cpython.mem cimport PyMem_Malloc
from libc.math cimport INFINITY
from libc.string cimport memcpy

from fastbn.kernels.job cimport IDENTITY, LEAKY_RELU, RELU, Activation
from fastbn.kernels.rounding cimport Control, as_before, ieee

cnp.import_array()

cdef extern from "Python.h":
    const Py_ssize_t PY_SSIZE_T_MAX

# DLPack's numbers of memory that the CPU reads: its own, what CUDA and ROCm have pinned, what CUDA manages. NumPy takes the same.
cdef tuple HOST = (1, 3, 11, 13)


cpdef cnp.ndarray as_array(object a, str name):
    """a as an array of NumPy's own type, which shares the memory of a where the library that a comes from allows it.

    Nothing is fetched from another device: some libraries would do that without a word, and others refuse.
    """
    if cnp.PyArray_CheckExact(a):
        return a
    kind = type(a)
    other = not cnp.PyArray_Check(a) and hasattr(kind, "__dlpack_device__")
    if other:
        try:
            device, number = a.__dlpack_device__()
        except Exception:  # a device that DLPack has no number for, or several of them: what follows knows more
            device = HOST[0]
        if device not in HOST:
            where = getattr(a, "device", f"{number} of DLPack's kind {int(device)}")
            raise TypeError(f"expected {name} in the memory of the CPU, got a {kind.__name__} on device {where}: copy it to the CPU first")
    # __array__ comes first: its errors say what to do, and it reads more (several devices' memory, missing values).
    only_dlpack = other and not hasattr(kind, "__array__")
    try:
        return np.from_dlpack(a) if only_dlpack else np.asarray(a)
    except (TypeError, BufferError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not only_dlpack:  # a sentence of the library's own: of NumPy's, it is that of a dtype
            raise
        raise TypeError(f"expected {name} as an array that NumPy can read, got a {kind.__name__}: {error}") from error


cpdef bint is_masked(object a) except -1:
    """Whether a is a masked array. Nobody has one who has not imported numpy.ma, which takes time."""
    masked = getattr(sys.modules.get("numpy.ma"), "MaskedArray", None)
    return masked is not None and isinstance(a, masked)


cpdef cnp.ndarray floating(object a, str name="x"):
    """a as a float32 or float64 array in native byte order; integers and bool become float64."""
    cdef cnp.ndarray array
    cdef int kind
    if cnp.PyArray_CheckExact(a):
        array = a
    else:
        if is_masked(a):
            raise TypeError(f"expected {name} without a mask, got a masked array: its mask would be lost (moments takes mask=)")
        array = as_array(a, name)
    kind = cnp.PyArray_TYPE(array)
    if kind == cnp.NPY_FLOAT32 or kind == cnp.NPY_FLOAT64:
        if cnp.PyArray_ISNOTSWAPPED(array):
            return array
        return array.astype(array.dtype.newbyteorder("="))
    if array.dtype.kind in "biu":
        return array.astype(np.float64)
    raise TypeError(f"expected {name} of dtype float32 or float64 (or integers), got {array.dtype}")


cdef int feature_axis(cnp.ndarray x, object axis) except -1:
    cdef int ndim = cnp.PyArray_NDIM(x)
    cdef Py_ssize_t k
    if not -ndim <= axis < ndim:
        raise AxisError(f"axis {axis} is out of bounds for array of dimension {ndim}")
    k = axis
    return <int>(k + ndim if k < 0 else k)


cpdef cnp.ndarray checked_mask(object mask, cnp.ndarray x, int axis):
    """mask as an array, of x's shape without the feature axis (which counts from 0)."""
    if is_masked(mask):
        raise TypeError("expected mask to be a plain array, got a masked array: its own mask would be lost")
    cdef cnp.ndarray array = as_array(mask, "mask")
    rest = shape_of(x)[:axis] + shape_of(x)[axis + 1:]
    if array.dtype != np.bool_:
        raise TypeError(f"expected mask of dtype bool, got {array.dtype}")
    if shape_of(array) != rest:
        raise ValueError(f"expected mask of shape {rest}, x's without the feature axis, got {shape_of(array)}")
    return array


cdef bint dense(cnp.ndarray x, int axis, Py_ssize_t *M, Py_ssize_t *S) noexcept:
    """Whether x's memory is a C-contiguous (M, C, S), in whatever order its axes lie there."""
    cdef int ndim = cnp.PyArray_NDIM(x)
    cdef cnp.npy_intp *shape = cnp.PyArray_DIMS(x)
    cdef cnp.npy_intp *strides = cnp.PyArray_STRIDES(x)
    cdef int i
    cdef int inner
    cdef Py_ssize_t size = cnp.PyArray_ITEMSIZE(x)
    cdef Py_ssize_t whole = size * cnp.PyArray_SIZE(x)
    M[0] = 1
    S[0] = 1
    if not cnp.PyArray_ISALIGNED(x):
        return False
    if cnp.PyArray_IS_C_CONTIGUOUS(x):
        for i in range(axis):
            M[0] *= shape[i]
        for i in range(axis + 1, ndim):
            S[0] *= shape[i]
        return True
    # Walk from the innermost axis outwards: the next one is that whose stride is what has been covered so far.
    while size < whole:
        inner = -1
        for i in range(ndim):
            if shape[i] > 1 and strides[i] == size:
                inner = i
        if inner < 0:
            return False
        if inner != axis:
            if strides[inner] < strides[axis] or shape[axis] == 1:
                S[0] *= shape[inner]
            else:
                M[0] *= shape[inner]
        size *= shape[inner]
    return True


cdef bint same_strides(cnp.ndarray a, cnp.ndarray b) noexcept:
    """Whether two arrays of one shape and dtype place their elements alike."""
    cdef int i
    for i in range(cnp.PyArray_NDIM(a)):
        if cnp.PyArray_DIM(a, i) > 1 and cnp.PyArray_STRIDE(a, i) != cnp.PyArray_STRIDE(b, i):
            return False
    return True


cdef bint usable_as(cnp.ndarray a, cnp.ndarray b) noexcept:
    """Whether the kernels can work on b beside a, which is dense and aligned."""
    return same_strides(a, b) and cnp.PyArray_ISALIGNED(b)


cdef tuple shape_of(cnp.ndarray a):
    return tuple([cnp.PyArray_DIM(a, i) for i in range(cnp.PyArray_NDIM(a))])


cdef void extent(cnp.ndarray a, char **low, char **high) noexcept:
    """The first byte of a, and the one behind the last."""
    cdef int i
    cdef Py_ssize_t span
    low[0] = high[0] = <char *>cnp.PyArray_DATA(a)
    for i in range(cnp.PyArray_NDIM(a)):
        span = (cnp.PyArray_DIM(a, i) - 1) * cnp.PyArray_STRIDE(a, i)
        if span < 0:
            low[0] += span
        else:
            high[0] += span
    high[0] += cnp.PyArray_ITEMSIZE(a)


cdef bint overlap(cnp.ndarray a, cnp.ndarray b) except -1:
    """Whether a and b share memory; never a wrong no."""
    cdef char *ends[4]
    if cnp.PyArray_SIZE(a) == 0 or cnp.PyArray_SIZE(b) == 0:
        return False
    extent(a, &ends[0], &ends[1])
    extent(b, &ends[2], &ends[3])
    if ends[1] <= ends[2] or ends[3] <= ends[0]:
        return False
    try:
        # As NumPy's own arrays: a subclass may answer in the function's place.
        return np.shares_memory(np.asarray(a), np.asarray(b), max_work=10000)
    except np.exceptions.TooHardError:
        return True


cdef bint identical(cnp.ndarray a, cnp.ndarray b) noexcept:
    return cnp.PyArray_DATA(a) == cnp.PyArray_DATA(b) and same_strides(a, b)


cdef bint is_plain(object a) except -1:
    """Whether a is an array whose memory is all of it: of NumPy's own type or of a subclass, as a memmap is, but not masked."""
    return cnp.PyArray_CheckExact(a) or cnp.PyArray_Check(a) and not is_masked(a)


cdef cnp.ndarray checked_out(object out, cnp.ndarray x):
    if not is_plain(out):
        raise TypeError(f"expected out to be a NumPy array, got {type(out).__name__}")
    cdef cnp.ndarray given = out
    if not cnp.PyArray_SAMESHAPE(given, x):
        raise ValueError(f"expected out of shape {shape_of(x)}, got {shape_of(given)}")
    if cnp.PyArray_TYPE(given) != cnp.PyArray_TYPE(x) or not cnp.PyArray_ISNOTSWAPPED(given):
        raise TypeError(f"expected out of dtype {x.dtype}, got {given.dtype}")
    if not cnp.PyArray_ISWRITEABLE(given):
        raise ValueError("expected out to be writeable, got a read-only array")
    return given


cdef Activation activation_of(object name) except? RELU:
    if name is None:
        return IDENTITY
    if isinstance(name, str) and name == "relu":  # an array of texts would be equal to it too
        return RELU
    if isinstance(name, str) and name == "leaky_relu":
        return LEAKY_RELU
    raise ValueError(f"expected activation None, 'relu' or 'leaky_relu', got {name!r}")


cdef double checked_eps(object eps) except -1:
    cdef double value = eps
    cdef Control word = ieee()  # a subnormal eps is no 0 where another library has these flushed
    cdef bint fits = 0 < value < INFINITY
    as_before(word)
    if not fits:
        raise ValueError(f"expected eps to be positive and finite, got {eps!r}")
    return value


cdef double *new_doubles(Py_ssize_t rows, Py_ssize_t C) except NULL:
    """Room for (rows, C), to be freed by PyMem_Free; MemoryError where there is none, or where its size in bytes is no size."""
    cdef double *room = NULL
    if C <= PY_SSIZE_T_MAX // (rows * <Py_ssize_t>sizeof(double)):
        room = <double *>PyMem_Malloc(max(rows * C, <Py_ssize_t>1) * sizeof(double))
    if room == NULL:
        raise MemoryError(f"expected memory for {rows} numbers of each of {C} features, got none")
    return room


cdef int load(object a, double *to, Py_ssize_t C, double default, str name) except -1:
    """The (C,) parameter a as float64."""
    cdef Py_ssize_t i
    cdef cnp.ndarray array
    cdef float *f32
    cdef Control word
    if a is None:
        for i in range(C):
            to[i] = default
        return 0
    array = floating(a, name)
    if cnp.PyArray_NDIM(array) != 1 or cnp.PyArray_DIM(array, 0) != C:
        raise ValueError(f"expected {name} of shape ({C},), got {shape_of(array)}")
    if not cnp.PyArray_IS_C_CONTIGUOUS(array) or not cnp.PyArray_ISALIGNED(array):
        array = array.copy()
    if cnp.PyArray_TYPE(array) == cnp.NPY_FLOAT64:
        memcpy(to, cnp.PyArray_DATA(array), C * sizeof(double))
    else:
        word = ieee()
        f32 = <float *>cnp.PyArray_DATA(array)
        for i in range(C):
            to[i] = f32[i]
        as_before(word)
    return 0


cdef void *writable(object a, Py_ssize_t C, bint float64_only, str name) except NULL:
    """The memory of a (C,) array that is written in place."""
    if not is_plain(a):
        raise TypeError(f"expected {name} to be a NumPy array, which is written in place, got {type(a).__name__}")
    cdef cnp.ndarray array = a
    cdef int kind = cnp.PyArray_TYPE(array)
    if kind != cnp.NPY_FLOAT64 and (float64_only or kind != cnp.NPY_FLOAT32) or not cnp.PyArray_ISNOTSWAPPED(array):
        raise TypeError(f"expected {name} of dtype {'float64' if float64_only else 'float32 or float64'}, got {array.dtype}")
    if cnp.PyArray_NDIM(array) != 1 or cnp.PyArray_DIM(array, 0) != C:
        raise ValueError(f"expected {name} of shape ({C},), got {shape_of(array)}")
    if not cnp.PyArray_ISWRITEABLE(array):
        raise ValueError(f"expected {name} to be writeable, got a read-only array")
    if not cnp.PyArray_IS_C_CONTIGUOUS(array) or not cnp.PyArray_ISALIGNED(array):
        raise ValueError(f"expected {name} to be contiguous and aligned, got {array.flags}")
    return cnp.PyArray_DATA(array)


cdef cnp.ndarray updatable(object a, str name):
    """a itself, or a float64 copy whose values go back to a."""
    if a is None:
        return None
    if not isinstance(a, np.ndarray) or a.dtype.kind != "f" or a.itemsize not in (4, 8):
        raise TypeError(f"expected {name} to be a float32 or float64 NumPy array, which training updates in place, "
                        f"got {a.dtype if isinstance(a, np.ndarray) else type(a).__name__}")
    if not a.flags.writeable:
        raise ValueError(f"expected {name} to be writeable, got a read-only array")
    return a if type(a) is np.ndarray and a.dtype == np.float64 and a.flags.carray else np.array(a, dtype=np.float64)


cdef int store(double *values, cnp.ndarray to, Py_ssize_t C) except -1:
    cdef Py_ssize_t i
    cdef float *f32
    cdef double *f64
    cdef Control word
    if cnp.PyArray_TYPE(to) == cnp.NPY_FLOAT64:
        f64 = <double *>cnp.PyArray_DATA(to)
        for i in range(C):
            f64[i] = values[i]
    else:
        f32 = <float *>cnp.PyArray_DATA(to)
        word = ieee()
        for i in range(C):
            f32[i] = <float>values[i]
        as_before(word)
    return 0
