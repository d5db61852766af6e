# cython: cdivision=True, infer_types=True
"""What is done once for each feature: from partial sums to statistics and gradients, from statistics to the parameters of the loops."""
from libc.math cimport sqrt

from fastbn.kernels.lanes cimport BIAS, INVSTD, LOW, MEAN_DY, SLOPE, WEIGHT, add, f64, row
from fastbn.kernels.plan cimport Work, count


cdef inline void merge_moments(Work *w, f64 mean, f64 low, f64 var, f64 lost, f64 shift) noexcept nogil:
    """The chunks' sums, each about a pivot of its own, into mean and variance (Chan, Golub & LeVeque 1979).

    mean, low, var: (C,) [out].  lost, shift: (C,) scratch.
    """
    cdef Py_ssize_t C = w.job.C
    cdef Py_ssize_t c
    cdef Py_ssize_t k
    cdef double m = <double>w.job.M * w.job.S
    cdef double n
    cdef double d
    cdef double s
    cdef f64 first = w.part
    cdef f64 part
    if w.chunks == 1:
        # What the steps below come to, bit for bit, in a quarter of their time.
        for c in range(C):
            shift[c] = first[C + c] / m
            mean[c] = first[c]
            low[c] = 0
            add(mean, low, c, shift[c], True)
            s = (first[2 * C + c] - first[C + c] * shift[c]) / m
            var[c] = 0 if s < 0 else s
        return
    # The mean, relative to the first chunk's pivot.
    for c in range(C):
        mean[c] = 0
        lost[c] = 0
    for k in range(w.chunks):
        part = w.part + 3 * k * C
        n = count(w, k)
        for c in range(C):
            add(mean, lost, c, part[C + c], True)
            add(mean, lost, c, n * (part[c] - first[c]), True)
    for c in range(C):
        shift[c] = (mean[c] + lost[c]) / m
        mean[c] = first[c]
        low[c] = 0
        add(mean, low, c, shift[c], True)
        var[c] = 0
        lost[c] = 0
    # Squares about each chunk's own mean, and those of the chunks' means about the whole one.
    for k in range(w.chunks):
        part = w.part + 3 * k * C
        n = count(w, k)
        for c in range(C):
            s = part[C + c] / n
            d = (part[c] - first[c]) + s - shift[c]
            add(var, lost, c, part[2 * C + c] - part[C + c] * s, True)
            add(var, lost, c, n * d * d, True)
    for c in range(C):
        s = (var[c] + lost[c]) / m
        var[c] = 0 if s < 0 else s


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


cdef inline void prepare(row table, Py_ssize_t C, f64 mean, f64 low, f64 var, double eps, f64 weight, f64 bias) noexcept nogil:
    """The parameter table, in x's dtype: the mean in two parts, so that x - mean does not cancel."""
    cdef Py_ssize_t c
    cdef double invstd
    cdef double e
    for c in range(C):
        invstd = 1 / sqrt(var[c] + eps)
        if sizeof(table[0]) == 8:
            # One Newton step: two roundings become one.
            e = square_root_error(var[c] + eps, invstd)
            invstd += 0.5 * e * invstd if -1e-15 < e < 1e-15 else 0
        table[WEIGHT * C + c] = weight[c] * invstd
        # float64: the sums are of g*(x - mean), one rounding less; in float32 those products could overflow.
        table[INVSTD * C + c] = 1 if sizeof(table[0]) == 8 else invstd
    for c in range(C):
        table[c] = mean[c]
        table[LOW * C + c] = (mean[c] - table[c]) + low[c]
        table[BIAS * C + c] = bias[c]


cdef inline void merge_gradients(Work *w, row table, f64 var, double eps, f64 dweight, f64 dbias, f64 lost) noexcept nogil:
    """The chunks' sums into the gradients, and those into the last rows of the table.  lost: (2, C) scratch."""
    cdef Py_ssize_t C = w.job.C
    cdef Py_ssize_t c
    cdef Py_ssize_t k
    cdef double m = <double>w.job.M * w.job.S
    cdef f64 part
    for c in range(C):
        dbias[c] = 0
        dweight[c] = 0
    for c in range(2 * C):
        lost[c] = 0
    for k in range(w.chunks):
        part = w.part + 3 * k * C
        for c in range(C):
            add(dbias, lost, c, part[C + c], True)
            add(dweight, lost + C, c, part[2 * C + c], True)
    for c in range(C):
        dbias[c] += lost[c]
        dweight[c] += lost[C + c]
        table[MEAN_DY * C + c] = dbias[c] / m
        if sizeof(table[0]) == 8:
            table[SLOPE * C + c] = dweight[c] / (m * (var[c] + eps))
            dweight[c] /= sqrt(var[c] + eps)
        else:
            table[SLOPE * C + c] = dweight[c] / m * table[INVSTD * C + c]


cdef inline bint representable(row table, Py_ssize_t C, f64 weight) noexcept nogil:
    """Whether x's dtype holds every invstd and every weight*invstd with full precision; float32 may not, for data of 1e30 or of 1e-30.

    Weights below 1e-30 are let pass: all that they scale is next to nothing, and decay brings many there.
    """
    cdef Py_ssize_t c
    cdef Py_ssize_t beyond = 0
    for c in range(C):
        w = table[WEIGHT * C + c]
        beyond += (((w < <float>1.2e-38) & (w > -<float>1.2e-38) & ((weight[c] > 1e-30) | (weight[c] < -1e-30)))
                   | (w > <float>3.4e38) | (w < -<float>3.4e38) | (table[INVSTD * C + c] > <float>3.4e38))
    return beyond == 0 or sizeof(table[0]) == 8
