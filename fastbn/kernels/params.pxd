# cython: cdivision=True, infer_types=True
"""The parameter rows: what the loops over x read of each feature. Filled, checked and spread here, once for each feature."""
from libc.math cimport sqrt

from fastbn.kernels.types cimport STEP, f64, table

# Rows of the parameter table, each (C,) in the arithmetic's type, or (lanes,) once spread over the lanes of a row.
cdef enum Parameter:
    HIGH = 0     # the mean's high part
    WEIGHT = 1   # weight * invstd
    SHIFT = 2    # bias - low*weight*invstd, low what HIGH leaves of the mean
    LOW = 3      # low, where the gradients cannot do without
    INVSTD = 4   # 1 in float64, where the gradients' sums are of g*(x - mean)
    MEAN_DY = 5
    SLOPE = 6    # invstd * mean(dy * x_hat)
    PARAMETERS = 7


cdef inline double split_high(double a) noexcept nogil:
    """The upper half of a's digits (Veltkamp): products of halves are exact, on every processor and without fused multiply-add."""
    cdef double t = a * 134217729.0
    return t - (t - a)


cdef inline double square_root_error(double v, double r) noexcept nogil:
    """1 - v*r*r to full relative precision, by Dekker's products."""
    cdef double r_high = split_high(r)
    cdef double r_low = r - r_high
    cdef double p = r * r
    cdef double p_error = ((r_high * r_high - p) + 2 * r_high * r_low) + r_low * r_low
    cdef double p_high = split_high(p)
    cdef double p_low = p - p_high
    cdef double v_high = split_high(v)
    cdef double v_low = v - v_high
    cdef double q = v * p
    cdef double q_error = ((v_high * p_high - q) + (v_high * p_low + v_low * p_high)) + v_low * p_low
    return ((1 - q) - q_error) - v * p_error


# Loops over features are functions of their own: a compiler believes in pointers that do not alias where they are parameters.

cdef inline void fill_table(f64 mean, f64 low, f64 var, f64 weight, f64 bias, double eps, Py_ssize_t n, table p, Py_ssize_t pitch) noexcept nogil:
    """The rows that do not depend on the gradients' sums."""
    cdef Py_ssize_t c
    cdef double invstd
    cdef double e
    cdef double lo
    for c in range(n):
        invstd = 1 / sqrt(var[c] + eps)
        if table is f64:
            # One Newton step: two roundings become one.
            e = square_root_error(var[c] + eps, invstd)
            invstd += 0.5 * e * invstd if -1e-15 < e < 1e-15 else 0
        p[c] = mean[c]
        lo = (mean[c] - p[c]) + low[c]
        p[LOW * pitch + c] = lo
        p[WEIGHT * pitch + c] = weight[c] * invstd
        # lo is at most half a unit in the last place of the mean: nothing cancels here.
        p[SHIFT * pitch + c] = bias[c] - lo * (weight[c] * invstd)
        # float64: the sums are of g*(x - mean), one rounding less; in float32 those products could overflow.
        p[INVSTD * pitch + c] = 1 if table is f64 else invstd


cdef inline void fill_gradients(f64 var, f64 dweight, f64 dbias, double eps, double count, Py_ssize_t n, table p, Py_ssize_t pitch) noexcept nogil:
    """The rows of the means of the gradients, which `count` values of each feature were summed into."""
    cdef Py_ssize_t c
    for c in range(n):
        p[MEAN_DY * pitch + c] = dbias[c] / count
        p[SLOPE * pitch + c] = dweight[c] / (count * sqrt(var[c] + eps))


cdef inline bint held(table p, Py_ssize_t pitch, double weight) noexcept nogil:
    """Whether the arithmetic's type holds invstd and weight*invstd with full precision; float32 may not, for data of 1e30 or of 1e-30.

    Weights below 1e-30 are let pass: all that they scale is next to nothing, and decay brings many there.
    """
    cdef double w = p[WEIGHT * pitch]
    cdef double invstd = p[INVSTD * pitch]
    if table is f64:
        return True
    else:
        return not (((w < 1.2e-38) & (w > -1.2e-38) & ((weight > 1e-30) | (weight < -1e-30))) | (w > 3.4e38) | (w < -3.4e38) | (invstd > 3.4e38))


cdef inline bint all_held(table p, Py_ssize_t pitch, Py_ssize_t n, const double *weight) noexcept nogil:
    cdef Py_ssize_t c
    cdef Py_ssize_t beyond = 0
    for c in range(n):
        beyond += not held(p + c, pitch, weight[c])
    return beyond == 0


cdef inline void repeat_first(table lanes, Py_ssize_t n) noexcept nogil:
    """The first STEP of n lanes once more behind the last: STEP of them that follow each other may begin at one row's end and end in the next."""
    cdef Py_ssize_t i
    for i in range(min(<Py_ssize_t>STEP, n)):
        lanes[n + i] = lanes[i]


cdef inline void spread(table p, Py_ssize_t n, Py_ssize_t S, Py_ssize_t copies, table lanes) noexcept nogil:
    """One value for each lane from one for each of n features: each S times, and all of that again for each of `copies` folded rows."""
    cdef Py_ssize_t c
    cdef Py_ssize_t i
    cdef Py_ssize_t _
    for _ in range(copies):
        for c in range(n):
            for i in range(S):
                lanes[i] = p[c]
            lanes += S
