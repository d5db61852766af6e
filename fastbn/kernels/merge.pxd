# cython: cdivision=True, infer_types=True
"""What is done once for each feature: from partial sums to statistics and gradients, from statistics to the parameters of the loops."""
from libc.math cimport sqrt

from fastbn.kernels.lanes cimport INVSTD, LOW, MEAN_DY, SHIFT, SLOPE, WEIGHT, add, f64, row
from fastbn.kernels.plan cimport LANES, Work, count


cdef inline void merge_moments(Work *w, Py_ssize_t at, Py_ssize_t n) noexcept nogil:
    """The chunks' sums of n features (at most LANES), the first number `at`, each about a pivot of its own, into mean and variance (Chan,
    Golub & LeVeque 1979).
    """
    cdef double lost[LANES]
    cdef double shift[LANES]
    cdef Py_ssize_t C = w.job.C
    cdef Py_ssize_t c
    cdef Py_ssize_t k
    cdef double m = <double>w.job.M * w.job.S
    cdef double t
    cdef double d
    cdef double s
    cdef f64 mean = w.job.mean + at
    cdef f64 low = w.job.mean_low + at
    cdef f64 var = w.job.var + at
    cdef f64 first = w.part + at
    cdef f64 part
    if w.chunks == 1:
        # What the steps below come to, bit for bit, in a quarter of their time.
        for c in range(n):
            shift[c] = first[C + c] / m
            mean[c] = first[c]
            low[c] = 0
            add(mean, low, c, shift[c], True)
            s = (first[2 * C + c] - first[C + c] * shift[c]) / m
            var[c] = 0 if s < 0 else s
        return
    # The mean, relative to the first chunk's pivot.
    for c in range(n):
        mean[c] = 0
        lost[c] = 0
    for k in range(w.chunks):
        part = w.part + 3 * k * C + at
        t = count(w, k)
        for c in range(n):
            add(mean, lost, c, part[C + c], True)
            add(mean, lost, c, t * (part[c] - first[c]), True)
    for c in range(n):
        shift[c] = (mean[c] + lost[c]) / m
        mean[c] = first[c]
        low[c] = 0
        add(mean, low, c, shift[c], True)
        var[c] = 0
        lost[c] = 0
    # Squares about each chunk's own mean, and those of the chunks' means about the whole one.
    for k in range(w.chunks):
        part = w.part + 3 * k * C + at
        t = count(w, k)
        for c in range(n):
            s = part[C + c] / t
            d = (part[c] - first[c]) + s - shift[c]
            add(var, lost, c, part[2 * C + c] - part[C + c] * s, True)
            add(var, lost, c, t * d * d, True)
    for c in range(n):
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


cdef inline bint prepare(Work *w, row table, Py_ssize_t at, Py_ssize_t n) noexcept nogil:
    """The parameters of n features, the first number `at`, in x's dtype; whether it holds their scales (`representable`)."""
    cdef Py_ssize_t pitch = w.pitch
    cdef Py_ssize_t c
    cdef double eps = w.job.eps
    cdef double invstd
    cdef double e
    cdef double lo
    cdef f64 mean = w.job.mean + at
    cdef f64 low = w.job.mean_low + at
    cdef f64 var = w.job.var + at
    cdef f64 weight = w.job.weight + at
    cdef f64 bias = w.job.bias + at
    table += at
    for c in range(n):
        invstd = 1 / sqrt(var[c] + eps)
        if sizeof(table[0]) == 8:
            # One Newton step: two roundings become one.
            e = square_root_error(var[c] + eps, invstd)
            invstd += 0.5 * e * invstd if -1e-15 < e < 1e-15 else 0
        table[c] = mean[c]
        lo = (mean[c] - table[c]) + low[c]
        table[LOW * pitch + c] = lo
        table[WEIGHT * pitch + c] = weight[c] * invstd
        # lo is at most half a unit in the last place of the mean: nothing cancels here.
        table[SHIFT * pitch + c] = bias[c] - lo * (weight[c] * invstd)
        # float64: the sums are of g*(x - mean), one rounding less; in float32 those products could overflow.
        table[INVSTD * pitch + c] = 1 if sizeof(table[0]) == 8 else invstd
    return representable(table, pitch, n, weight)


cdef inline bint representable(row table, Py_ssize_t pitch, Py_ssize_t n, f64 weight) noexcept nogil:
    """Whether x's dtype holds every invstd and every weight*invstd with full precision; float32 may not, for data of 1e30 or of 1e-30.

    Weights below 1e-30 are let pass: all that they scale is next to nothing, and decay brings many there.
    """
    cdef Py_ssize_t c
    cdef Py_ssize_t beyond = 0
    for c in range(n):
        w = table[WEIGHT * pitch + c]
        beyond += (((w < <float>1.2e-38) & (w > -<float>1.2e-38) & ((weight[c] > 1e-30) | (weight[c] < -1e-30)))
                   | (w > <float>3.4e38) | (w < -<float>3.4e38) | (table[INVSTD * pitch + c] > <float>3.4e38))
    return beyond == 0 or sizeof(table[0]) == 8


cdef inline void merge_gradients(Work *w, row table, Py_ssize_t at, Py_ssize_t n) noexcept nogil:
    """The chunks' sums of n features (at most LANES) into the gradients, and those into the last rows of the table."""
    cdef double lost_bias[LANES]
    cdef double lost_weight[LANES]
    cdef Py_ssize_t C = w.job.C
    cdef Py_ssize_t pitch = w.pitch
    cdef Py_ssize_t c
    cdef Py_ssize_t k
    cdef double m = <double>w.job.M * w.job.S
    cdef double eps = w.job.eps
    cdef f64 var = w.job.var + at
    cdef f64 dweight = w.job.dweight + at
    cdef f64 dbias = w.job.dbias + at
    cdef f64 part
    table += at
    for c in range(n):
        dbias[c] = dweight[c] = lost_bias[c] = lost_weight[c] = 0
    for k in range(w.chunks):
        part = w.part + 3 * k * C + at
        for c in range(n):
            add(dbias, lost_bias, c, part[C + c], True)
            add(dweight, lost_weight, c, part[2 * C + c], True)
    for c in range(n):
        dbias[c] += lost_bias[c]
        dweight[c] += lost_weight[c]
        table[MEAN_DY * pitch + c] = dbias[c] / m
        if sizeof(table[0]) == 8:
            table[SLOPE * pitch + c] = dweight[c] / (m * (var[c] + eps))
            dweight[c] /= sqrt(var[c] + eps)
        else:
            table[SLOPE * pitch + c] = dweight[c] / m * table[INVSTD * pitch + c]
