# The statistics, from the loops over x to the mean and the variance of each feature. Included in batchnorm.pyx.
#
# s1 += sum d and s2 += sum d*d, d = x - pivot, or x itself where not centred: float32 data is summed as it is first, since a float's square is exact
# in float64, whose digits allow a mean of 32 standard deviations. float64 data is summed about a pivot near the mean of 32 elements. Where that was
# not enough (`far`), a chunk is summed again about its mean, while it is still in cache.

# --- the loops: lanes of rows ld elements apart; (lanes,) pivot, s1, s2, and e1, e2 for what those lost ---------------------------------------

cdef inline void fetch_four(row x, Py_ssize_t ld, Py_ssize_t n, Py_ssize_t j, Py_ssize_t ahead) noexcept nogil:
    """Ask for what four rows' STEP lanes from lane j on will be, `ahead` elements further on; rows that follow each other in the order of memory."""
    cdef Py_ssize_t size = sizeof(x[0])
    if n == ld:
        prefetch(x + 4 * j + ahead, size, LINE_BYTES)
    else:
        prefetch(x + j + ahead, 4, ld * size)
        if size == 8:
            prefetch(x + j + ahead + 8, 4, ld * size)


cdef inline void four_moments(row x, Py_ssize_t ld, Py_ssize_t n, f64 pivot, const bint centred, f64 s1, f64 e1, f64 s2, f64 e2) noexcept nogil:
    """In float64 for float32 too: trees of floats are off by more than 1e-7 std on data of few values, where rounding errors do not average out."""
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
        add(s1, e1, i, (a + b) + (c + d), not digits_to_spare(x))
        add(s2, e2, i, (a * a + b * b) + (c * c + d * d), not digits_to_spare(x))


cdef inline void one_moment(row x, Py_ssize_t n, f64 pivot, const bint centred, f64 s1, f64 e1, f64 s2, f64 e2) noexcept nogil:
    cdef Py_ssize_t i
    cdef double d
    for i in range(n):
        d = <double>x[i] - pivot[i] if centred else x[i]
        add(s1, e1, i, d, not digits_to_spare(x))
        add(s2, e2, i, d * d, not digits_to_spare(x))


cdef inline void add_tree(const float *x, Py_ssize_t ld, vec *s1, vec *s2) noexcept nogil:
    """four_moments of floats that are not centred, WIDTH lanes of them."""
    cdef vec a = widen(x)
    cdef vec b = widen(x + ld)
    cdef vec c = widen(x + 2 * ld)
    cdef vec d = widen(x + 3 * ld)
    s1[0] = vec_add(s1[0], vec_add(vec_add(a, b), vec_add(c, d)))
    s2[0] = vec_add(s2[0], vec_add(add_square(square(b), a), add_square(square(d), c)))


cdef inline void add_trees(const float *x, Py_ssize_t ld, const int trees, f64 s1, f64 s2) noexcept nogil:
    """STEP lanes of 4 or of 8 rows: the sums go to memory once."""
    cdef vec u
    cdef vec v
    cdef int i
    cdef int k
    for i in range(STEP // WIDTH):
        u = vec_load(s1 + i * WIDTH)
        v = vec_load(s2 + i * WIDTH)
        for k in range(trees):
            add_tree(x + i * WIDTH + 4 * k * ld, ld, &u, &v)
        vec_store(s1 + i * WIDTH, u)
        vec_store(s2 + i * WIDTH, v)


cdef inline Py_ssize_t in_steps(Py_ssize_t n, Py_ssize_t before, Py_ssize_t left) noexcept nogil:
    """How many of n lanes are worked on in whole steps: all, where x goes on behind them; what the lanes behind n come to is never looked at.

    before: elements from the first row worked on to the last one; left: to the end of x.
    """
    return ceil_div(n, STEP) * STEP if before + ceil_div(n, STEP) * STEP <= left else n // STEP * STEP


cdef inline void add_moments(row x, Py_ssize_t ld, Py_ssize_t rows, Py_ssize_t n, f64 pivot, const bint centred, Py_ssize_t ahead, Py_ssize_t left,
                             f64 s1, f64 e1, f64 s2, f64 e2) noexcept nogil:
    """left: elements from x on, to the end of all: nothing behind it is read, or asked for."""
    cdef Py_ssize_t j
    cdef Py_ssize_t k
    cdef Py_ssize_t end
    cdef Py_ssize_t trees = 1
    while rows >= 4:
        j = 0
        if row is f32:
            # Eight rows 4 KB apart run out of ways in the first-level cache.
            trees = 2 if not centred and rows >= 8 and ld % 1024 else 1
        end = in_steps(n, (4 * trees - 1) * ld, left)
        ahead = ahead if trees * ahead + 4 * trees * ld <= left else 0
        if row is f32:
            if not centred:
                while j < end:
                    if ahead:
                        fetch_four(x, ld, n, j, trees * ahead if n < ld else ahead)
                        if trees == 2:
                            fetch_four(x + 4 * ld, ld, n, j, trees * ahead if n < ld else ahead)
                    if trees == 2:
                        add_trees(x + j, ld, 2, s1 + j, s2 + j)
                    else:
                        add_trees(x + j, ld, 1, s1 + j, s2 + j)
                    j += STEP
        while j < end:
            if ahead:
                fetch_four(x, ld, n, j, ahead)
            four_moments(x + j, ld, STEP, pivot + j, centred, s1 + j, e1 + j, s2 + j, e2 + j)
            j += STEP
        if j < n:
            for k in range(trees):
                four_moments(x + j + 4 * k * ld, ld, n - j, pivot + j, centred, s1 + j, e1 + j, s2 + j, e2 + j)
        x += 4 * trees * ld
        left -= 4 * trees * ld
        rows -= 4 * trees
    while rows > 0:
        one_moment(x, n, pivot, centred, s1, e1, s2, e2)
        x += ld
        rows -= 1


cdef inline void add_run_of_floats(const float *x, Py_ssize_t n, Py_ssize_t ahead, f64 s1, f64 s2) noexcept nogil:
    """n elements of one feature, over STEP lanes whose sums stay in registers; n a multiple of STEP."""
    cdef vec u[STEP]
    cdef vec v[STEP]
    cdef int i
    for i in range(STEP // WIDTH):
        u[i] = vec_load(s1 + i * WIDTH)
        v[i] = vec_load(s2 + i * WIDTH)
    while n >= 4 * STEP:
        if ahead:
            prefetch(x + ahead, 4, LINE_BYTES)
        for i in range(STEP // WIDTH):
            add_tree(x + i * WIDTH, STEP, &u[i], &v[i])
        x += 4 * STEP
        n -= 4 * STEP
    while n > 0:
        for i in range(STEP // WIDTH):
            u[i] = vec_add(u[i], widen(x + i * WIDTH))
            v[i] = add_square(v[i], widen(x + i * WIDTH))
        x += STEP
        n -= STEP
    for i in range(STEP // WIDTH):
        vec_store(s1 + i * WIDTH, u[i])
        vec_store(s2 + i * WIDTH, v[i])


cdef inline void add_moments_of_run(row x, const Strip *s, f64 pivot, const bint centred, f64 s1, f64 e1, f64 s2, f64 e2) noexcept nogil:
    """A run's elements over STEP lanes; pivot: one for each of these."""
    cdef Py_ssize_t whole = s.n // STEP * STEP
    if row is f32 and not centred:
        add_run_of_floats(x, whole, s.ahead, s1, s2)
    else:
        add_moments(x, STEP, s.n // STEP, STEP, pivot, centred, s.ahead, s.left, s1, e1, s2, e2)
    if whole < s.n:
        one_moment(x + whole, s.n - whole, pivot, centred, s1, e1, s2, e2)


# --- a task: the pivot of each feature and the two sums about it ------------------------------------------------------------------------------

cdef void total_moments(Work *w, Task t, row x, const bint centred, f64 pivots, f64 sums) noexcept nogil:
    """pivots: one for each lane."""
    cdef f64 s1 = sums
    cdef f64 e1 = sums + w.sums_pitch
    cdef f64 s2 = sums + 2 * w.sums_pitch
    cdef f64 e2 = sums + 3 * w.sums_pitch
    cdef Strip s
    clear(w, &t, sums)
    start(&t, &s)
    if w.cut.planes:
        while next_run(w, &t, &s, sizeof(x[0])):
            add_moments_of_run(x + s.at, &s, pivots + s.lane, centred, s1 + s.lane, e1 + s.lane, s2 + s.lane, e2 + s.lane)
    else:
        while next_rows(w, &t, &s, sizeof(x[0])):
            add_moments(x + s.at, s.ld, s.rows, s.n, pivots, centred, s.ahead, s.left, s1, e1, s2, e2)
    gather(w, &t, s1, e1)
    gather(w, &t, s2, e2)


cdef inline double mean_of_eight(row x, const Py_ssize_t *at, Py_ssize_t i) noexcept nogil:
    return ((((<double>x[at[0] + i] + x[at[1] + i]) + (<double>x[at[2] + i] + x[at[3] + i]))
             + ((<double>x[at[4] + i] + x[at[5] + i]) + (<double>x[at[6] + i] + x[at[7] + i]))) * 0.125)


cdef inline void means_of_32(row x, const Py_ssize_t *at, Py_ssize_t S, Py_ssize_t n, f64 mean) noexcept nogil:
    """Of 32 elements of each of n features."""
    cdef Py_ssize_t i
    for i in range(n):
        mean[i] = ((mean_of_eight(x, at, i * S) + mean_of_eight(x, at + 8, i * S))
                   + (mean_of_eight(x, at + 16, i * S) + mean_of_eight(x, at + 24, i * S))) * 0.25


cdef void choose_pivots(Work *w, const Task *t, row x, f64 pivot) noexcept nogil:
    """The upper digits of the mean of 32 elements spread over the chunk, of each feature."""
    cdef Py_ssize_t S = w.cut.S
    cdef Py_ssize_t first = t.unit
    cdef Py_ssize_t units = t.end - t.unit
    cdef Py_ssize_t rows = min(t.end * w.cut.fold, w.cut.M) - first * w.cut.fold
    cdef Py_ssize_t n = S
    cdef Py_ssize_t begin = 0
    cdef Py_ssize_t at[32]
    cdef Py_ssize_t i
    cdef Py_ssize_t m
    for i in range(32):
        if w.cut.planes:
            m = plane_of(&w.cut, first + i * units // 32, &begin, &n)
        else:
            m = first * w.cut.fold + (2 * i + 1) * rows // 64
        # Steps of 21/32 of a run, near the golden ratio, so that the places within the runs differ, however many there are.
        at[i] = (m * w.cut.C + t.feature) * S + begin + (2 * (i * 21 % 32) + 1) * n // 64
    if S == 1:  # as a constant, so that it is vectorised
        means_of_32(x, at, 1, t.features, pivot)
    else:
        means_of_32(x, at, S, t.features, pivot)
    # With half the digits, x - pivot is exact for nearly every x that weighs in the squares: an outlier's rounding errors do not average out.
    for i in range(t.features):
        pivot[i] = split_high(pivot[i])


cdef inline bint far(row x, double s1, double s2, double per) noexcept nogil:
    """Whether the pivot was too far from the mean, so that taking the mean out of the squares costs accuracy.

    float64: more than one standard deviation. float32, whose squares are summed in float64: more than 32, so that even a sum of
    half a million equal terms, whose roundings do not average out, keeps 1e-7.
    """
    cdef double d = s1 * per
    cdef double q = s2 * per
    return d * d > (0.999 if digits_to_spare(x) else 0.5) * q


cdef void add_up_moments(Work *w, Py_ssize_t k, Py_ssize_t b, row x, double *scratch) noexcept nogil:
    cdef Py_ssize_t C = w.cut.C
    cdef Task t = task_of(w, k, b)
    cdef Py_ssize_t lanes = STEP if w.cut.planes else w.cut.S    # of a feature
    cdef double m = count(&w.cut, k)
    cdef double per = 1 / m
    cdef f64 sums = scratch
    cdef f64 s1 = sums
    cdef f64 s2 = sums + 2 * w.sums_pitch
    cdef f64 pivots = sums + 4 * w.sums_pitch
    cdef f64 pivot = sums + 5 * w.sums_pitch
    cdef f64 partial = w.partial + 3 * k * C + t.feature
    cdef Py_ssize_t again = 0
    cdef Py_ssize_t c
    if digits_to_spare(x):
        for c in range(t.features):
            pivot[c] = 0
        total_moments(w, t, x, False, pivots, sums)
    else:
        choose_pivots(w, &t, x, pivot)
        spread(pivot, t.features, lanes, w.cut.fold, pivots)
        total_moments(w, t, x, True, pivots, sums)
    for c in range(t.features):
        partial[c] = pivot[c]
        partial[C + c] = s1[c]
        partial[2 * C + c] = s2[c]
        again += far(x, s1[c], s2[c], per)
    if again == 0:
        return
    # The data is still in cache. A quotient, and not a product with 1/m: a constant feature's mean is then the constant itself.
    for c in range(t.features):
        pivot[c] += s1[c] / m
    spread(pivot, t.features, lanes, w.cut.fold, pivots)
    total_moments(w, t, x, True, pivots, sums)
    # Features that were right the first time keep their bits, whatever stands beside them.
    for c in range(t.features):
        if far(x, partial[C + c], partial[2 * C + c], per):
            partial[c] = pivot[c]
            partial[C + c] = s1[c]
            partial[2 * C + c] = s2[c]


# --- the merge: the chunks' sums, each about a pivot of its own, into mean and variance (Chan, Golub & LeVeque 1979) ------------------------------

cdef inline void moments_of_one(f64 pivot, f64 s1, f64 s2, Py_ssize_t n, double m, f64 mean, f64 low, f64 var) noexcept nogil:
    """What the four functions below come to for a single chunk of finite sums, bit for bit, in a quarter of their time."""
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


cdef void merge_some_moments(Work *w, Py_ssize_t at, Py_ssize_t n) noexcept nogil:
    """Of n features, at most MERGED_FEATURES, the first number `at`."""
    cdef double shift[MERGED_FEATURES]
    cdef double lost[MERGED_FEATURES]
    cdef Py_ssize_t C = w.cut.C
    cdef Py_ssize_t k
    cdef double m = <double>w.cut.M * w.cut.S
    cdef f64 var = w.job.var + at
    cdef f64 first = w.partial + at
    cdef f64 partial
    memset(shift, 0, n * sizeof(double))
    memset(lost, 0, n * sizeof(double))
    for k in range(w.cut.chunks):
        partial = w.partial + 3 * k * C + at
        add_shifts(partial, partial + C, first, n, count(&w.cut, k), shift, lost)
    finish_mean(first, lost, n, m, shift, w.job.mean + at, w.job.mean_low + at)
    memset(var, 0, n * sizeof(double))
    memset(lost, 0, n * sizeof(double))
    for k in range(w.cut.chunks):
        partial = w.partial + 3 * k * C + at
        add_squares(partial, partial + C, partial + 2 * C, first, shift, n, count(&w.cut, k), var, lost)
    finish_var(lost, n, m, var)


cdef void merge_moments(Work *w, Py_ssize_t at, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t C = w.cut.C
    cdef Py_ssize_t c
    if w.cut.chunks == 1:
        moments_of_one(w.partial + at, w.partial + C + at, w.partial + 2 * C + at, n, <double>w.cut.M * w.cut.S,
                       w.job.mean + at, w.job.mean_low + at, w.job.var + at)
        return
    for c in range(ceil_div(n, MERGED_FEATURES)):
        merge_some_moments(w, at + c * MERGED_FEATURES, min(<Py_ssize_t>MERGED_FEATURES, n - c * MERGED_FEATURES))
