# cython: cdivision=True, infer_types=True
"""What is done once for each feature: from partial sums to statistics and gradients, from statistics to the parameters of the loops."""
from libc.math cimport sqrt

from fastbn.kernels.lanes cimport HIGH, INVSTD, LOW, MEAN_DY, PARAMETERS, SHIFT, SLOPE, WEIGHT, add, f64, row
from fastbn.kernels.plan cimport LANES, STEP, Work, count
from fastbn.kernels.table cimport Job


# Loops over features are functions of their own: a compiler believes in pointers that do not alias where they are parameters.

cdef inline void moments_of_one(f64 pivot, f64 s1, f64 s2, Py_ssize_t n, double m, f64 mean, f64 low, f64 var) noexcept nogil:
    """What the four functions below come to for a single chunk, bit for bit, in a quarter of their time."""
    cdef Py_ssize_t c
    cdef double shift
    cdef double s
    for c in range(n):
        shift = s1[c] / m
        mean[c] = pivot[c]
        low[c] = 0
        add(mean, low, c, shift, True)
        s = (s2[c] - s1[c] * shift) / m
        var[c] = 0 if s < 0 else s


cdef inline void add_shifts(f64 pivot, f64 s1, f64 first, Py_ssize_t n, double t, f64 shift, f64 lost) noexcept nogil:
    """A chunk of t values: its sum, relative to the first chunk's pivot."""
    cdef Py_ssize_t c
    for c in range(n):
        add(shift, lost, c, s1[c], True)
        add(shift, lost, c, t * (pivot[c] - first[c]), True)


cdef inline void finish_mean(f64 first, f64 lost, Py_ssize_t n, double m, f64 shift, f64 mean, f64 low) noexcept nogil:
    cdef Py_ssize_t c
    for c in range(n):
        shift[c] = (shift[c] + lost[c]) / m
        mean[c] = first[c]
        low[c] = 0
        add(mean, low, c, shift[c], True)


cdef inline void add_squares(f64 pivot, f64 s1, f64 s2, f64 first, f64 shift, Py_ssize_t n, double t, f64 var, f64 lost) noexcept nogil:
    """A chunk's squares about its own mean, and that of its mean about the whole one."""
    cdef Py_ssize_t c
    cdef double d
    cdef double s
    for c in range(n):
        s = s1[c] / t
        d = (pivot[c] - first[c]) + s - shift[c]
        add(var, lost, c, s2[c] - s1[c] * s, True)
        add(var, lost, c, t * d * d, True)


cdef inline void finish_var(f64 lost, Py_ssize_t n, double m, f64 var) noexcept nogil:
    cdef Py_ssize_t c
    cdef double s
    for c in range(n):
        s = (var[c] + lost[c]) / m
        var[c] = 0 if s < 0 else s


cdef inline void merge_moments(Work *w, Py_ssize_t at, Py_ssize_t n) noexcept nogil:
    """The chunks' sums of n features (at most LANES), the first number `at`, each about a pivot of its own, into mean and variance (Chan,
    Golub & LeVeque 1979).
    """
    cdef double shift[LANES]
    cdef double lost[LANES]
    cdef Py_ssize_t C = w.job.C
    cdef Py_ssize_t c
    cdef Py_ssize_t k
    cdef double m = <double>w.job.M * w.job.S
    cdef f64 mean = w.job.mean + at
    cdef f64 low = w.job.mean_low + at
    cdef f64 var = w.job.var + at
    cdef f64 first = w.part + at
    cdef f64 part
    if w.chunks == 1:
        moments_of_one(first, first + C, first + 2 * C, n, m, mean, low, var)
        return
    for c in range(n):
        shift[c] = lost[c] = 0
    for k in range(w.chunks):
        part = w.part + 3 * k * C + at
        add_shifts(part, part + C, first, n, count(w, k), shift, lost)
    finish_mean(first, lost, n, m, shift, mean, low)
    for c in range(n):
        var[c] = lost[c] = 0
    for k in range(w.chunks):
        part = w.part + 3 * k * C + at
        add_squares(part, part + C, part + 2 * C, first, shift, n, count(w, k), var, lost)
    finish_var(lost, n, m, var)


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


cdef inline void fill_table(f64 mean, f64 low, f64 var, f64 weight, f64 bias, double eps, Py_ssize_t n, row table, Py_ssize_t pitch) noexcept nogil:
    cdef Py_ssize_t c
    cdef double invstd
    cdef double e
    cdef double lo
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


cdef inline void repeat_first(row lanes, Py_ssize_t n) noexcept nogil:
    """The first STEP of n lanes once more behind the last: STEP of them that follow each other may begin at one row's end and end in the next."""
    cdef Py_ssize_t i
    for i in range(min(<Py_ssize_t>STEP, n)):
        lanes[n + i] = lanes[i]


cdef inline void repeat_features(Work *w, row table, Py_ssize_t at, int first, int end) noexcept nogil:
    """Those of a table's rows, once the first of its features, number `at`, are there."""
    cdef int p
    if at == 0 and w.job.S == 1:
        for p in range(first, end):
            repeat_first(table + p * w.pitch, w.job.C)


cdef inline bint prepare(Work *w, row table, Py_ssize_t at, Py_ssize_t n) noexcept nogil:
    """The parameters of n features, the first number `at`, in x's dtype; whether it holds their scales (`representable`)."""
    cdef Job *job = w.job
    fill_table(job.mean + at, job.mean_low + at, job.var + at, job.weight + at, job.bias + at, job.eps, n, table + at, w.pitch)
    repeat_features(w, table, at, HIGH, MEAN_DY)
    return representable(table + at, w.pitch, n, job.weight + at)


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
    repeat_features(w, table - at, at, MEAN_DY, PARAMETERS)
