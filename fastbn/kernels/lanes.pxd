# cython: infer_types=True
"""The arithmetic: loops over the lanes of a strip, inlined into each build of batchnorm.pyx.

Design: a lane is a column of a strip and belongs to one feature, so that the compiler vectorises across lanes and no sum ever crosses
a vector register: one arithmetic for all instruction sets. Arrays are (lanes,), rows of x, dy, y and dx are ld elements apart, and params is
a table (PARAMETERS, step), of which each loop reads the first n of the rows it needs.
"""
from fastbn.kernels.table cimport LEAKY_RELU, RELU, Activation

cdef extern from *:
    """
    #include <float.h>
    #if defined(FLT_EVAL_METHOD) && FLT_EVAL_METHOD == 2
    #error "fastbn needs arithmetic in the types' own precision: build with -msse2 -mfpmath=sse"
    #endif
    #if defined(_MSC_VER)
    #pragma fp_contract(off)
    #endif
    /* Without it the compiler must assume that a store to y changes x, and gives up on vectorising. x and y may be the
       very same array all the same: each element is read before the same element is written. */
    #if defined(_MSC_VER) || defined(__GNUC__)
    #define FASTBN_RESTRICT __restrict
    #else
    #define FASTBN_RESTRICT restrict
    #endif
    typedef float *FASTBN_RESTRICT fastbn_f32;
    typedef double *FASTBN_RESTRICT fastbn_f64;
    """
    ctypedef float *f32 "fastbn_f32"
    ctypedef double *f64 "fastbn_f64"

ctypedef fused row:
    f32
    f64

ctypedef fused real:
    float
    double

# Rows of the parameter table, each (C,) in x's dtype, or (lanes,) once spread over the lanes of a strip.
cdef enum Parameter:
    HIGH = 0     # the mean's high part; the pivot in MOMENTS
    LOW = 1      # the mean's low part
    WEIGHT = 2   # weight * invstd
    BIAS = 3
    INVSTD = 4   # 1 in float64, where the gradients' sums are of g*(x - mean)
    MEAN_DY = 5
    SLOPE = 6    # invstd * mean(dy * x_hat)
    PARAMETERS = 7

cdef inline real act(real z, const Activation activation) noexcept nogil:
    if activation == RELU:
        return <real>0 if z < 0 else z
    if activation == LEAKY_RELU:
        return z * <real>0.01 if z < 0 else z
    return z


cdef inline real unact(real dy, real z, const Activation activation) noexcept nogil:
    """The gradient before the activation, from the one behind it."""
    if activation == RELU:
        return <real>0 if z <= 0 else dy
    if activation == LEAKY_RELU:
        return dy * <real>0.01 if z <= 0 else dy
    return dy


cdef inline void add(f64 total, f64 lost, Py_ssize_t i, double t, const bint compensate) noexcept nogil:
    """total[i] += t; what rounding loses goes to lost[i] (Knuth's TwoSum), where t is itself a float64 sum."""
    cdef double s
    cdef double b
    if compensate:
        s = total[i] + t
        b = s - total[i]
        lost[i] += (total[i] - (s - b)) + (t - b)
        total[i] = s
    else:
        total[i] += t


cdef inline void add_four(row x, Py_ssize_t ld, Py_ssize_t n, row pivot, f64 s1, f64 e1, f64 s2, f64 e2) noexcept nogil:
    """Four rows of n lanes, ld apart: s1 += sum d, s2 += sum d*d, d = x - pivot.

    In float64 for float32 too: a tree of floats is half again as fast in cache, no faster beyond, and off by more than 1e-7 std on data
    of few values, where rounding errors do not average out. Eight rows at once run out of ways in L1 where rows are 4 KB apart.
    """
    cdef Py_ssize_t i
    cdef double p
    cdef double a
    cdef double b
    cdef double c
    cdef double d
    for i in range(n):
        p = pivot[i]
        a = <double>x[i] - p
        b = <double>x[ld + i] - p
        c = <double>x[2 * ld + i] - p
        d = <double>x[3 * ld + i] - p
        add(s1, e1, i, (a + b) + (c + d), sizeof(x[0]) == 8)
        add(s2, e2, i, (a * a + b * b) + (c * c + d * d), sizeof(x[0]) == 8)


cdef inline void add_one(row x, Py_ssize_t n, row pivot, f64 s1, f64 e1, f64 s2, f64 e2) noexcept nogil:
    cdef Py_ssize_t i
    cdef double d
    for i in range(n):
        d = <double>x[i] - <double>pivot[i]
        add(s1, e1, i, d, sizeof(x[0]) == 8)
        add(s2, e2, i, d * d, sizeof(x[0]) == 8)


cdef inline void add_four_gradients(row x, row dy, Py_ssize_t ld, Py_ssize_t n, row params, Py_ssize_t step, const Activation activation,
                                    f64 s1, f64 e1, f64 s2, f64 e2) noexcept nogil:
    """Four rows: s1 += sum g, s2 += sum g*x_hat (float64: g*(x - mean)), g the gradient before the activation; trees in x's dtype."""
    cdef Py_ssize_t i
    for i in range(n):
        hi = params[i]
        lo = params[LOW * step + i]
        w = params[WEIGHT * step + i]
        b = params[BIAS * step + i]
        r = params[INVSTD * step + i]
        c0 = (x[i] - hi) - lo
        g0 = unact(dy[i], c0 * w + b, activation)
        c1 = (x[ld + i] - hi) - lo
        g1 = unact(dy[ld + i], c1 * w + b, activation)
        c2 = (x[2 * ld + i] - hi) - lo
        g2 = unact(dy[2 * ld + i], c2 * w + b, activation)
        c3 = (x[3 * ld + i] - hi) - lo
        g3 = unact(dy[3 * ld + i], c3 * w + b, activation)
        add(s1, e1, i, (g0 + g1) + (g2 + g3), sizeof(x[0]) == 8)
        add(s2, e2, i, (g0 * (c0 * r) + g1 * (c1 * r)) + (g2 * (c2 * r) + g3 * (c3 * r)), sizeof(x[0]) == 8)


cdef inline void add_one_gradient(row x, row dy, Py_ssize_t n, row params, Py_ssize_t step, const Activation activation,
                                  f64 s1, f64 e1, f64 s2, f64 e2) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        c = (x[i] - params[i]) - params[LOW * step + i]
        g = unact(dy[i], c * params[WEIGHT * step + i] + params[BIAS * step + i], activation)
        add(s1, e1, i, g, sizeof(x[0]) == 8)
        add(s2, e2, i, <double>g * <double>(c * params[INVSTD * step + i]), sizeof(x[0]) == 8)


cdef inline void normalize_rows(row x, row y, Py_ssize_t ld, Py_ssize_t rows, Py_ssize_t n, row params, Py_ssize_t step,
                                const Activation activation) noexcept nogil:
    """y = activation((x - mean)*weight*invstd + bias); four rows share the loads of the parameters."""
    cdef Py_ssize_t i
    while rows >= 4:
        for i in range(n):
            hi = params[i]
            lo = params[LOW * step + i]
            w = params[WEIGHT * step + i]
            b = params[BIAS * step + i]
            y[i] = act(((x[i] - hi) - lo) * w + b, activation)
            y[ld + i] = act(((x[ld + i] - hi) - lo) * w + b, activation)
            y[2 * ld + i] = act(((x[2 * ld + i] - hi) - lo) * w + b, activation)
            y[3 * ld + i] = act(((x[3 * ld + i] - hi) - lo) * w + b, activation)
        x += 4 * ld
        y += 4 * ld
        rows -= 4
    while rows > 0:
        for i in range(n):
            y[i] = act(((x[i] - params[i]) - params[LOW * step + i]) * params[WEIGHT * step + i] + params[BIAS * step + i], activation)
        x += ld
        y += ld
        rows -= 1


cdef inline void backward_rows(row x, row dy, row dx, Py_ssize_t ld, Py_ssize_t rows, Py_ssize_t n, row params, Py_ssize_t step,
                               const Activation activation) noexcept nogil:
    """dx = weight*invstd*(g - mean(g) - x_hat*mean(g*x_hat))  (Ioffe & Szegedy 2015, section 3, gathered)."""
    cdef Py_ssize_t i
    while rows > 0:
        for i in range(n):
            c = (x[i] - params[i]) - params[LOW * step + i]
            w = params[WEIGHT * step + i]
            g = unact(dy[i], c * w + params[BIAS * step + i], activation)
            dx[i] = ((g - params[MEAN_DY * step + i]) - c * params[SLOPE * step + i]) * w
        x += ld
        dy += ld
        dx += ld
        rows -= 1


cdef inline void scale_rows(row x, row dy, row dx, Py_ssize_t ld, Py_ssize_t rows, Py_ssize_t n, row params, Py_ssize_t step,
                            const Activation activation) noexcept nogil:
    """dx = weight*invstd*g: the statistics were constants."""
    cdef Py_ssize_t i
    while rows > 0:
        for i in range(n):
            w = params[WEIGHT * step + i]
            z = ((x[i] - params[i]) - params[LOW * step + i]) * w + params[BIAS * step + i]
            dx[i] = unact(dy[i], z, activation) * w
        x += ld
        dy += ld
        dx += ld
        rows -= 1


cdef inline real tree(real a, real b, real c, real d, real e, real f, real g, real h) noexcept nogil:
    return ((a + b) + (c + d)) + ((e + f) + (g + h))


cdef inline void average_rows(row a, row b, row c, row d, row e, row f, row g, row h, const Py_ssize_t S, row mean, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        mean[i] = tree(a[i * S], b[i * S], c[i * S], d[i * S], e[i * S], f[i * S], g[i * S], h[i * S]) * <float>0.125
