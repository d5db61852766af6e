# cython: cdivision=True, infer_types=True
"""The parameter rows: what the loops over x read of each feature. Filled, checked and spread here, once for each feature."""
from libc.math cimport sqrt

from fastbn.kernels.types cimport STEP, f64, table

# Rows of the parameter table, each (C,) in the arithmetic's type, or (lanes,) once spread over the lanes of a row. The mean is HIGH + low; low is at
# most half a unit in the last place of HIGH, and folded into the rows that are added, where nothing cancels.
cdef enum Parameter:
    HIGH = 0
    WEIGHT = 1   # weight*invstd
    SHIFT = 2    # bias - low*WEIGHT
    INVSTD = 3   # which the sums of float64 leave to the end: g*(x - HIGH) has one rounding less, but in float32 it could overflow
    MEAN_DY = 4  # mean(dy) - low*SLOPE
    SLOPE = 5    # invstd*mean(dy*x_hat)
    PARAMETERS = 6


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


cdef inline double product_error(double a, double b, double p) noexcept nogil:
    """a*b - p, where p is the rounded product (Dekker)."""
    cdef double a_high = split_high(a)
    cdef double a_low = a - a_high
    cdef double b_high = split_high(b)
    cdef double b_low = b - b_high
    return ((a_high * b_high - p) + (a_high * b_low + a_low * b_high)) + a_low * b_low


cdef inline double rounded_once(double weight, double var, double eps, double v, double r) noexcept nogil:
    """weight/sqrt(var + eps), from v = var + eps and r = 1/sqrt(v) as they were rounded: one rounding instead of four."""
    cdef double b = v - var
    cdef double v_low = (var - (v - b)) + (eps - b)
    cdef double e = square_root_error(v, r) - v_low * r * r
    cdef double p = weight * r
    # Beyond 2^996 the splits overflow, where nothing is to be gained.
    cdef double lost = product_error(weight, r, p) + weight * (0.5 * e * r if -1e-15 < e < 1e-15 else 0)
    return p + lost if -1e290 < lost < 1e290 else p


cdef inline double low_of(double mean, double high, double low) noexcept nogil:
    """What HIGH leaves of mean + low."""
    return (mean - high) + low


# Loops over features are functions of their own: a compiler believes in pointers that do not alias where they are parameters.

cdef inline void fill_table(f64 mean, f64 low, f64 var, f64 weight, f64 bias, double eps, Py_ssize_t n, table p,
                            Py_ssize_t pitch, f64 std) noexcept nogil:
    """The rows that do not depend on the gradients' sums, and std = sqrt(var + eps)."""
    cdef Py_ssize_t c
    cdef double v
    cdef double invstd
    cdef double w
    for c in range(n):
        v = var[c] + eps
        std[c] = sqrt(v)
        invstd = 1 / std[c]
        w = rounded_once(weight[c], var[c], eps, v, invstd) if table is f64 else weight[c] * invstd
        p[c] = mean[c]
        p[WEIGHT * pitch + c] = w
        p[SHIFT * pitch + c] = bias[c] - low_of(mean[c], p[c], low[c]) * w
        p[INVSTD * pitch + c] = invstd


cdef inline void finish_gradients(f64 mean, f64 low, f64 std, f64 dweight, f64 dbias, Py_ssize_t n, table p,
                                  Py_ssize_t pitch) noexcept nogil:
    """dweight, from the sums of g*(x - HIGH), times INVSTD in float32."""
    cdef Py_ssize_t c
    cdef double lo
    for c in range(n):
        lo = low_of(mean[c], p[c], low[c])
        if table is f64:
            dweight[c] = (dweight[c] - lo * dbias[c]) / std[c]
        else:
            dweight[c] -= lo * <double>p[INVSTD * pitch + c] * dbias[c]


cdef inline void fill_gradients(f64 mean, f64 low, f64 std, f64 dweight, f64 dbias, double count, Py_ssize_t n, table p,
                                Py_ssize_t pitch) noexcept nogil:
    """The rows of the means of the gradients, which `count` values of each feature were summed into."""
    cdef Py_ssize_t c
    cdef double slope
    for c in range(n):
        slope = dweight[c] / (count * std[c])
        p[SLOPE * pitch + c] = slope
        p[MEAN_DY * pitch + c] = dbias[c] / count - low_of(mean[c], p[c], low[c]) * slope


# Whether float32 holds a feature's parameters with full precision, as it may not for data of 1e30 or of 1e-30. What is too small for it may be so
# where all that it scales is next to nothing, as weights that decay leaves behind: where std is below 8e7, it belongs to weights or gradients below
# 1e-30.
# NaN fits: it stays in its feature anyway.

cdef inline bint fits(double a, double exact, double invstd) noexcept nogil:
    """Whether the row's value a, a float, does for the exact one."""
    return not ((a > 3.4e38) | (a < -3.4e38) | ((a < 1.2e-38) & (a > -1.2e-38) & (exact != 0) & (invstd < 1.25e-8)))


cdef inline bint forward_fits(table p, Py_ssize_t pitch, double weight) noexcept nogil:
    """Whether a forward and the gradients' sums can be computed with a feature's rows."""
    cdef double invstd = p[INVSTD * pitch]
    return fits(p[WEIGHT * pitch], weight, invstd) & (not invstd > 3.4e38)


cdef inline bint backward_fits(table p, Py_ssize_t pitch, double dweight) noexcept nogil:
    """Whether dx can be, where the forward can."""
    return fits(p[SLOPE * pitch], dweight, p[INVSTD * pitch])


cdef inline bint all_forward_fit(table p, Py_ssize_t pitch, Py_ssize_t n, const double *weight) noexcept nogil:
    cdef Py_ssize_t c
    cdef Py_ssize_t beyond = 0
    for c in range(n):
        beyond += not forward_fits(p + c, pitch, weight[c])
    return beyond == 0


cdef inline bint all_backward_fit(table p, Py_ssize_t pitch, Py_ssize_t n, const double *dweight) noexcept nogil:
    cdef Py_ssize_t c
    cdef Py_ssize_t beyond = 0
    for c in range(n):
        beyond += not backward_fits(p + c, pitch, dweight[c])
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
