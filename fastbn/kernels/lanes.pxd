# cython: cdivision=True, infer_types=True
"""The arithmetic: loops over the lanes of a strip, inlined into each build of batchnorm.pyx.

Design: a lane is a column of a strip and belongs to one feature, so that the compiler vectorises across lanes and no sum ever crosses
a vector register: one arithmetic for all instruction sets. Arrays are (lanes,), rows of x, dy, y and dx are ld elements apart, and params is
a table (PARAMETERS, step), of which each loop reads the first n of the rows it needs.

Each operation is a loop over n lanes of a few rows at once (which share what they load of sums and parameters), and a loop over rows that
calls it STEP lanes at a time. Sums, and outputs past the caches, ask meanwhile for what is `ahead` elements further on: four rows of 0.25 to
4 KB at once confuse the processor's own prefetching, which then reads at half the memory's speed.
"""
from libc.stdint cimport uintptr_t

from fastbn.kernels.plan cimport LINE_BYTES, STEP
from fastbn.kernels.stores cimport prefetch, stream_line
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
    /* The loops are specialised by constant arguments: an activation, a number of lanes. A compiler left to itself keeps one copy for
       several of them and tests inside the loop. */
    #undef CYTHON_INLINE
    #if defined(_MSC_VER)
    #define CYTHON_INLINE __forceinline
    #elif defined(__GNUC__)
    #define CYTHON_INLINE __inline__ __attribute__((always_inline))
    #else
    #define CYTHON_INLINE inline
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
    WEIGHT = 1   # weight * invstd
    SHIFT = 2    # bias - low*weight*invstd, low what HIGH leaves of the mean
    LOW = 3      # low, where the gradients cannot do without
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


cdef inline void fetch_four(row x, Py_ssize_t ld, Py_ssize_t n, Py_ssize_t j, Py_ssize_t ahead) noexcept nogil:
    """Ask for what four rows' STEP lanes from lane j on will be, `ahead` elements further on; rows that follow each other in the order of memory."""
    cdef Py_ssize_t size = sizeof(x[0])
    if n == ld:
        prefetch(x + 4 * j + ahead, size, LINE_BYTES)
    else:
        prefetch(x + j + ahead, 4, ld * size)
        if size == 8:
            prefetch(x + j + ahead + 8, 4, ld * size)


# --- moments: s1 += sum d, s2 += sum d*d, d = x - pivot, or d = x where not centred ----------------------------------------------

cdef inline void four_moments(row x, Py_ssize_t ld, Py_ssize_t n, row pivot, const bint centred, f64 s1, f64 e1, f64 s2, f64 e2) noexcept nogil:
    """In float64 for float32 too: trees of floats take two thirds of the time in cache, and are off by more than 1e-7 std on data of few
    values, where rounding errors do not average out. Eight rows at once run out of ways in L1 where rows are 4 KB apart.
    """
    cdef Py_ssize_t i
    cdef double p
    cdef double a
    cdef double b
    cdef double c
    cdef double d
    for i in range(n):
        p = pivot[i] if centred else 0
        a = <double>x[i] - p if centred else x[i]
        b = <double>x[ld + i] - p if centred else x[ld + i]
        c = <double>x[2 * ld + i] - p if centred else x[2 * ld + i]
        d = <double>x[3 * ld + i] - p if centred else x[3 * ld + i]
        add(s1, e1, i, (a + b) + (c + d), sizeof(x[0]) == 8)
        add(s2, e2, i, (a * a + b * b) + (c * c + d * d), sizeof(x[0]) == 8)


cdef inline void one_moment(row x, Py_ssize_t n, row pivot, const bint centred, f64 s1, f64 e1, f64 s2, f64 e2) noexcept nogil:
    cdef Py_ssize_t i
    cdef double d
    for i in range(n):
        d = <double>x[i] - <double>pivot[i] if centred else x[i]
        add(s1, e1, i, d, sizeof(x[0]) == 8)
        add(s2, e2, i, d * d, sizeof(x[0]) == 8)


cdef inline void add_rows(row x, Py_ssize_t ld, Py_ssize_t rows, Py_ssize_t n, row pivot, const bint centred, Py_ssize_t ahead,
                          f64 s1, f64 e1, f64 s2, f64 e2) noexcept nogil:
    cdef Py_ssize_t j
    while rows >= 4:
        j = 0
        while j + STEP <= n:
            fetch_four(x, ld, n, j, ahead)
            four_moments(x + j, ld, STEP, pivot + j, centred, s1 + j, e1 + j, s2 + j, e2 + j)
            j += STEP
        if j < n:
            fetch_four(x, ld, n, j, ahead)
            four_moments(x + j, ld, n - j, pivot + j, centred, s1 + j, e1 + j, s2 + j, e2 + j)
        x += 4 * ld
        rows -= 4
    while rows > 0:
        one_moment(x, n, pivot, centred, s1, e1, s2, e2)
        x += ld
        rows -= 1


# --- gradients: s1 += sum g, s2 += sum g*x_hat (float64: g*(x - mean)), g the gradient before the activation ------------------------

cdef inline void four_gradients(row x, row dy, Py_ssize_t ld, Py_ssize_t n, row params, Py_ssize_t step, const Activation activation,
                                f64 s1, f64 e1, f64 s2, f64 e2) noexcept nogil:
    """Trees in x's dtype."""
    cdef Py_ssize_t i
    for i in range(n):
        hi = params[i]
        lo = params[LOW * step + i]
        w = params[WEIGHT * step + i]
        b = params[SHIFT * step + i]
        r = params[INVSTD * step + i]
        d0 = x[i] - hi
        d1 = x[ld + i] - hi
        d2 = x[2 * ld + i] - hi
        d3 = x[3 * ld + i] - hi
        g0 = unact(dy[i], d0 * w + b, activation)
        g1 = unact(dy[ld + i], d1 * w + b, activation)
        g2 = unact(dy[2 * ld + i], d2 * w + b, activation)
        g3 = unact(dy[3 * ld + i], d3 * w + b, activation)
        add(s1, e1, i, (g0 + g1) + (g2 + g3), sizeof(x[0]) == 8)
        add(s2, e2, i, (g0 * ((d0 - lo) * r) + g1 * ((d1 - lo) * r)) + (g2 * ((d2 - lo) * r) + g3 * ((d3 - lo) * r)), sizeof(x[0]) == 8)


cdef inline void one_gradient(row x, row dy, Py_ssize_t n, row params, Py_ssize_t step, const Activation activation,
                              f64 s1, f64 e1, f64 s2, f64 e2) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        d = x[i] - params[i]
        g = unact(dy[i], d * params[WEIGHT * step + i] + params[SHIFT * step + i], activation)
        add(s1, e1, i, g, sizeof(x[0]) == 8)
        add(s2, e2, i, <double>g * <double>((d - params[LOW * step + i]) * params[INVSTD * step + i]), sizeof(x[0]) == 8)


cdef inline void add_gradient_rows(row x, row dy, Py_ssize_t ld, Py_ssize_t rows, Py_ssize_t n, row params, Py_ssize_t step,
                                   const Activation activation, Py_ssize_t ahead, f64 s1, f64 e1, f64 s2, f64 e2) noexcept nogil:
    cdef Py_ssize_t j
    while rows >= 4:
        j = 0
        while j + STEP <= n:
            fetch_four(x, ld, n, j, ahead)
            fetch_four(dy, ld, n, j, ahead)
            four_gradients(x + j, dy + j, ld, STEP, params + j, step, activation, s1 + j, e1 + j, s2 + j, e2 + j)
            j += STEP
        if j < n:
            fetch_four(x, ld, n, j, ahead)
            fetch_four(dy, ld, n, j, ahead)
            four_gradients(x + j, dy + j, ld, n - j, params + j, step, activation, s1 + j, e1 + j, s2 + j, e2 + j)
        x += 4 * ld
        dy += 4 * ld
        rows -= 4
    while rows > 0:
        one_gradient(x, dy, n, params, step, activation, s1, e1, s2, e2)
        x += ld
        dy += ld
        rows -= 1


# --- y = activation((x - mean)*weight*invstd + bias) ------------------------------------------------------------------------------

cdef inline void four_outputs(row x, row y0, row y1, row y2, row y3, Py_ssize_t ld, Py_ssize_t n, row params, Py_ssize_t step,
                              const Activation activation) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        hi = params[i]
        w = params[WEIGHT * step + i]
        b = params[SHIFT * step + i]
        y0[i] = act((x[i] - hi) * w + b, activation)
        y1[i] = act((x[ld + i] - hi) * w + b, activation)
        y2[i] = act((x[2 * ld + i] - hi) * w + b, activation)
        y3[i] = act((x[3 * ld + i] - hi) * w + b, activation)


cdef inline void one_output(row x, row y, Py_ssize_t n, row params, Py_ssize_t step, const Activation activation) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        y[i] = act((x[i] - params[i]) * params[WEIGHT * step + i] + params[SHIFT * step + i], activation)


cdef inline void normalize_rows(row x, row y, Py_ssize_t ld, Py_ssize_t rows, Py_ssize_t n, row params, Py_ssize_t step,
                                const Activation activation) noexcept nogil:
    cdef Py_ssize_t j
    while rows >= 4:
        j = 0
        while j + STEP <= n:
            four_outputs(x + j, y + j, y + ld + j, y + 2 * ld + j, y + 3 * ld + j, ld, STEP, params + j, step, activation)
            j += STEP
        if j < n:
            four_outputs(x + j, y + j, y + ld + j, y + 2 * ld + j, y + 3 * ld + j, ld, n - j, params + j, step, activation)
        x += 4 * ld
        y += 4 * ld
        rows -= 4
    while rows > 0:
        one_output(x, y, n, params, step, activation)
        x += ld
        y += ld
        rows -= 1


cdef inline void normalize_run(row x, row y, Py_ssize_t n, row params, Py_ssize_t step, const Activation activation) noexcept nogil:
    """n elements of one feature, whose parameters are the first of each row."""
    cdef Py_ssize_t i
    hi = params[0]
    w = params[WEIGHT * step]
    b = params[SHIFT * step]
    for i in range(n):
        y[i] = act((x[i] - hi) * w + b, activation)


# --- dx --------------------------------------------------------------------------------------------------------------------------

cdef inline real input_of(real x, real dy, real hi, real lo, real w, real b, real m, real slope, const bint training,
                          const Activation activation) noexcept nogil:
    """weight*invstd*(g - mean(g) - x_hat*mean(g*x_hat))  (Ioffe & Szegedy 2015, section 3, gathered), or weight*invstd*g where the statistics
    were constants.
    """
    cdef real d = x - hi
    cdef real g = unact(dy, d * w + b, activation)
    if training:
        return ((g - m) - (d - lo) * slope) * w
    return g * w


cdef inline void some_inputs(row x, row dy, row dx0, row dx1, row dx2, row dx3, Py_ssize_t ld, const int rows, Py_ssize_t n, row params,
                             Py_ssize_t step, const bint training, const Activation activation) noexcept nogil:
    """Four rows, or one."""
    cdef Py_ssize_t i
    for i in range(n):
        hi = params[i]
        w = params[WEIGHT * step + i]
        b = params[SHIFT * step + i]
        lo = params[LOW * step + i]
        m = params[MEAN_DY * step + i]
        slope = params[SLOPE * step + i]
        dx0[i] = input_of(x[i], dy[i], hi, lo, w, b, m, slope, training, activation)
        if rows == 4:
            dx1[i] = input_of(x[ld + i], dy[ld + i], hi, lo, w, b, m, slope, training, activation)
            dx2[i] = input_of(x[2 * ld + i], dy[2 * ld + i], hi, lo, w, b, m, slope, training, activation)
            dx3[i] = input_of(x[3 * ld + i], dy[3 * ld + i], hi, lo, w, b, m, slope, training, activation)


cdef inline void backward_rows(row x, row dy, row dx, Py_ssize_t ld, Py_ssize_t rows, Py_ssize_t n, row params, Py_ssize_t step,
                               const bint training, const Activation activation) noexcept nogil:
    cdef Py_ssize_t j
    # Of four rows of three arrays, 4 KB apart, twelve lines would share the eight ways of a set in L1.
    while rows >= 4 and ld * <Py_ssize_t>sizeof(x[0]) % 4096:
        j = 0
        while j + STEP <= n:
            some_inputs(x + j, dy + j, dx + j, dx + ld + j, dx + 2 * ld + j, dx + 3 * ld + j, ld, 4, STEP, params + j, step, training, activation)
            j += STEP
        if j < n:
            some_inputs(x + j, dy + j, dx + j, dx + ld + j, dx + 2 * ld + j, dx + 3 * ld + j, ld, 4, n - j, params + j, step, training, activation)
        x += 4 * ld
        dy += 4 * ld
        dx += 4 * ld
        rows -= 4
    while rows > 0:
        some_inputs(x, dy, dx, NULL, NULL, NULL, 0, 1, n, params, step, training, activation)
        x += ld
        dy += ld
        dx += ld
        rows -= 1


cdef inline void backward_run(row x, row dy, row dx, Py_ssize_t n, row params, Py_ssize_t step, const bint training,
                              const Activation activation) noexcept nogil:
    """n elements of one feature, whose parameters are the first of each row."""
    cdef Py_ssize_t i
    hi = params[0]
    w = params[WEIGHT * step]
    b = params[SHIFT * step]
    lo = params[LOW * step]
    m = params[MEAN_DY * step]
    slope = params[SLOPE * step]
    for i in range(n):
        dx[i] = input_of(x[i], dy[i], hi, lo, w, b, m, slope, training, activation)


# --- output past the caches ---------------------------------------------------------------------------------------------------------

cdef inline void one_row(row x, row dy, row y, Py_ssize_t n, row params, Py_ssize_t step, const bint run, const bint backward, const bint training,
                         const Activation activation) noexcept nogil:
    """n elements of y, or of dx where backward; of one feature where `run`."""
    if backward and run:
        backward_run(x, dy, y, n, params, step, training, activation)
    elif backward:
        some_inputs(x, dy, y, NULL, NULL, NULL, 0, 1, n, params, step, training, activation)
    elif run:
        normalize_run(x, y, n, params, step, activation)
    else:
        one_output(x, y, n, params, step, activation)


cdef inline void stream_step(row y, row source) noexcept nogil:
    stream_line(y, source)
    if sizeof(y[0]) == 8:
        stream_line(y + 8, source + 8)


cdef inline Py_ssize_t stream_rows(row x, row dy, row y, Py_ssize_t n, Py_ssize_t width, row params, Py_ssize_t step, const bint run,
                                   const bint backward, const bint training, const Activation activation, Py_ssize_t ahead, row waiting,
                                   Py_ssize_t left) noexcept nogil:
    """n elements of y, or of dx where backward, in whole lines, each from registers: a buffer of lines would share the low bits of its address
    with stores on their way to memory, for which its loads then wait.

    They are of one feature where `run`; else rows of `width` lanes (n, or at least STEP), and params holds the first STEP lanes once more behind
    the last. The `left` elements before y wait in `waiting`, of STEP elements. Returns how many wait there afterwards.
    """
    cdef Py_ssize_t j
    cdef Py_ssize_t lane
    if left:
        j = min(STEP - left, n)
        one_row(x, dy, waiting + left, j, params, step, run, backward, training, activation)
        if left + j < STEP:
            return left + j
        stream_step(y - left, waiting)
    else:
        # Up to the first whole line.
        j = min(<Py_ssize_t>(-<uintptr_t>y % LINE_BYTES) // <Py_ssize_t>sizeof(x[0]), n)
        one_row(x, dy, y, j, params, step, run, backward, training, activation)
    lane = j
    while j + STEP <= n:
        prefetch(x + j + ahead, sizeof(x[0]) // 4, LINE_BYTES)
        if backward:
            prefetch(dy + j + ahead, sizeof(x[0]) // 4, LINE_BYTES)
        one_row(x + j, dy + j, waiting, STEP, params + (0 if run else lane), step, run, backward, training, activation)
        stream_step(y + j, waiting)
        j += STEP
        lane += STEP
        if lane >= width:
            lane -= width
    one_row(x + j, dy + j, waiting, n - j, params + (0 if run else lane), step, run, backward, training, activation)
    return n - j


# --- pivots ------------------------------------------------------------------------------------------------------------------------

cdef inline real tree(real a, real b, real c, real d, real e, real f, real g, real h) noexcept nogil:
    return ((a + b) + (c + d)) + ((e + f) + (g + h))


cdef inline void average_rows(row a, row b, row c, row d, row e, row f, row g, row h, const Py_ssize_t S, row mean, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        mean[i] = tree(a[i * S], b[i * S], c[i * S], d[i * S], e[i * S], f[i * S], g[i * S], h[i * S]) * <float>0.125
