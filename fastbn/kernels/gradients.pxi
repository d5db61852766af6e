# The gradients of weight and bias, from the loops over x and dy to their sums. Included in batchnorm.pyx.
#
# s1 += sum g and s2 += sum g*d*INVSTD (float64: g*d), d = x - HIGH and g the gradient before the activation. Trees of four are in the arithmetic's
# type. p is the parameter table (PARAMETERS, pitch): a column for each lane, or of a run its one feature's.

cdef inline real scaled(real d, real invstd) noexcept nogil:
    """x_hat, but for the mean's low partial; or x - HIGH in float64, whose sums are scaled at the end."""
    return d * invstd if real is float else d


cdef inline void four_gradients(row x, row dy, Py_ssize_t ld, Py_ssize_t n, table p, Py_ssize_t pitch, const bint run, const Activation activation,
                                f64 s1, f64 e1, f64 s2, f64 e2) noexcept nogil:
    """n lanes of four rows, at most STEP."""
    # Not into the sums at once: of float64, a compiler cannot know that these are not what is read here.
    cdef double t1[STEP]
    cdef double t2[STEP]
    cdef Py_ssize_t i
    cdef Py_ssize_t k
    for i in range(n):
        k = 0 if run else i
        hi = p[k]
        w = p[WEIGHT * pitch + k]
        b = p[SHIFT * pitch + k]
        r = p[INVSTD * pitch + k]
        d0 = x[i] - hi
        d1 = x[ld + i] - hi
        d2 = x[2 * ld + i] - hi
        d3 = x[3 * ld + i] - hi
        g0 = unact(dy[i], d0 * w + b, activation)
        g1 = unact(dy[ld + i], d1 * w + b, activation)
        g2 = unact(dy[2 * ld + i], d2 * w + b, activation)
        g3 = unact(dy[3 * ld + i], d3 * w + b, activation)
        t1[i] = (g0 + g1) + (g2 + g3)
        t2[i] = (g0 * scaled(d0, r) + g1 * scaled(d1, r)) + (g2 * scaled(d2, r) + g3 * scaled(d3, r))
    for i in range(n):
        add(s1, e1, i, t1[i], not digits_to_spare(x))
        add(s2, e2, i, t2[i], not digits_to_spare(x))


cdef inline void one_gradient(row x, row dy, Py_ssize_t n, table p, Py_ssize_t pitch, const bint run, const Activation activation,
                              f64 s1, f64 e1, f64 s2, f64 e2) noexcept nogil:
    cdef Py_ssize_t i
    cdef Py_ssize_t k
    for i in range(n):
        k = 0 if run else i
        d = x[i] - p[k]
        g = unact(dy[i], d * p[WEIGHT * pitch + k] + p[SHIFT * pitch + k], activation)
        add(s1, e1, i, g, not digits_to_spare(x))
        add(s2, e2, i, <double>g * <double>scaled(d, p[INVSTD * pitch + k]), not digits_to_spare(x))


cdef inline void add_gradients(row x, row dy, const Strip *s, table p, Py_ssize_t pitch, const bint run, const Activation activation,
                               f64 s1, f64 e1, f64 s2, f64 e2) noexcept nogil:
    """The rows of a strip; a run's n elements over STEP lanes."""
    cdef Py_ssize_t ld = STEP if run else s.ld
    cdef Py_ssize_t n = STEP if run else s.n
    cdef Py_ssize_t rows = s.n // STEP if run else s.rows
    cdef Py_ssize_t per_lane = 0 if run else 1    # columns of the table
    cdef Py_ssize_t j
    cdef Py_ssize_t end
    cdef Py_ssize_t ahead = s.ahead
    cdef Py_ssize_t left = s.left
    while rows >= 4:
        j = 0
        end = STEP if run else in_steps(n, 3 * ld, left)
        ahead = ahead if ahead + 4 * ld <= left else 0
        while j < end:
            if ahead:
                fetch_four(x, ld, n, j, ahead)
                fetch_four(dy, ld, n, j, ahead)
            four_gradients(x + j, dy + j, ld, STEP, p + per_lane * j, pitch, run, activation, s1 + j, e1 + j, s2 + j, e2 + j)
            j += STEP
        if j < n:
            four_gradients(x + j, dy + j, ld, n - j, p + per_lane * j, pitch, run, activation, s1 + j, e1 + j, s2 + j, e2 + j)
        x += 4 * ld
        dy += 4 * ld
        left -= 4 * ld
        rows -= 4
    while rows > 0:
        one_gradient(x, dy, n, p, pitch, run, activation, s1, e1, s2, e2)
        x += ld
        dy += ld
        rows -= 1
    if run:
        one_gradient(x, dy, s.n % STEP, p, pitch, run, activation, s1, e1, s2, e2)


cdef void add_strip(Work *w, const Strip *s, row x, table p, Py_ssize_t pitch, f64 s1, f64 e1, f64 s2, f64 e2) noexcept nogil:
    """Each activation is a loop of its own: a test inside the loop would not vectorise with every compiler."""
    cdef row dy = <row>w.job.dy + s.at
    cdef Activation a = w.job.activation
    x += s.at
    if w.cut.planes:
        if a == IDENTITY:
            add_gradients(x, dy, s, p, pitch, True, IDENTITY, s1, e1, s2, e2)
        elif a == RELU:
            add_gradients(x, dy, s, p, pitch, True, RELU, s1, e1, s2, e2)
        else:
            add_gradients(x, dy, s, p, pitch, True, LEAKY_RELU, s1, e1, s2, e2)
    elif a == IDENTITY:
        add_gradients(x, dy, s, p, pitch, False, IDENTITY, s1, e1, s2, e2)
    elif a == RELU:
        add_gradients(x, dy, s, p, pitch, False, RELU, s1, e1, s2, e2)
    else:
        add_gradients(x, dy, s, p, pitch, False, LEAKY_RELU, s1, e1, s2, e2)


cdef void add_up_gradients(Work *w, Py_ssize_t k, Py_ssize_t b, row x, table params, double *scratch) noexcept nogil:
    """A task's two sums of each feature."""
    cdef Task t = task_of(w, k, b)
    cdef Strip s
    cdef Py_ssize_t C = w.cut.C
    cdef f64 s1 = scratch
    cdef f64 e1 = s1 + w.sums_pitch
    cdef f64 s2 = s1 + 2 * w.sums_pitch
    cdef f64 e2 = s1 + 3 * w.sums_pitch
    cdef f64 partial = w.partial + 3 * k * C + t.feature
    cdef table p = params + t.feature if w.cut.planes else <table>w.lanes + t.feature * w.cut.S
    cdef Py_ssize_t c
    clear(w, &t, s1)
    start(&t, &s)
    if w.cut.planes:
        while next_run(w, &t, &s, sizeof(x[0])):
            add_strip(w, &s, x, p + s.feature, w.pitch, s1 + s.lane, e1 + s.lane, s2 + s.lane, e2 + s.lane)
    else:
        while next_rows(w, &t, &s, sizeof(x[0])):
            add_strip(w, &s, x, p, w.lane_pitch, s1, e1, s2, e2)
    gather(w, &t, s1, e1)
    gather(w, &t, s2, e2)
    for c in range(t.features):
        partial[C + c] = s1[c]
        partial[2 * C + c] = s2[c]


cdef inline void gradients_of_one(f64 s1, f64 s2, Py_ssize_t n, f64 dweight, f64 dbias) noexcept nogil:
    """What the function below comes to for a single chunk: the sum; NaN where it is infinite, and never minus zero."""
    cdef Py_ssize_t c
    for c in range(n):
        dbias[c] = s1[c] + (s1[c] - s1[c])
        dweight[c] = s2[c] + (s2[c] - s2[c])


cdef void merge_some_gradients(Work *w, Py_ssize_t at, Py_ssize_t n) noexcept nogil:
    """The chunks' sums of n features, at most MERGED_FEATURES, the first number `at`."""
    cdef double lost_bias[MERGED_FEATURES]
    cdef double lost_weight[MERGED_FEATURES]
    cdef Py_ssize_t C = w.cut.C
    cdef Py_ssize_t c
    cdef Py_ssize_t k
    cdef f64 dweight = w.job.dweight + at
    cdef f64 dbias = w.job.dbias + at
    cdef f64 partial
    memset(lost_bias, 0, n * sizeof(double))
    memset(lost_weight, 0, n * sizeof(double))
    memset(dweight, 0, n * sizeof(double))
    memset(dbias, 0, n * sizeof(double))
    for k in range(w.cut.chunks):
        partial = w.partial + 3 * k * C + at
        for c in range(n):
            add(dbias, lost_bias, c, partial[C + c], True)
            add(dweight, lost_weight, c, partial[2 * C + c], True)
    for c in range(n):
        dbias[c] += lost_bias[c]
        dweight[c] += lost_weight[c]


cdef void merge_gradients(Work *w, Py_ssize_t at, Py_ssize_t n, table params) noexcept nogil:
    cdef Job *job = w.job
    cdef Py_ssize_t c
    if w.cut.chunks == 1:
        gradients_of_one(w.partial + w.cut.C + at, w.partial + 2 * w.cut.C + at, n, job.dweight + at, job.dbias + at)
    else:
        for c in range(ceil_div(n, MERGED_FEATURES)):
            merge_some_gradients(w, at + c * MERGED_FEATURES, min(<Py_ssize_t>MERGED_FEATURES, n - c * MERGED_FEATURES))
    finish_gradients(job.mean + at, job.mean_low + at, w.std + at, job.dweight + at, job.dbias + at, n, params + at, w.pitch)
