# What the statistics and the gradients are summed from: the two sums of a task, a chunk of the units of a block of the lanes.
#
# Included in batchnorm.pyx. A strip is `rows` rows of n lanes, the first at element `at`, ld elements apart; params is (PARAMETERS, step), the first
# n of each row used. Each activation is a loop of its own: a test inside the loop would not vectorise with every compiler.

cdef inline void sum_strip(Work *w, Operation op, row x, Py_ssize_t at, Py_ssize_t ld, Py_ssize_t rows, Py_ssize_t n,
                           row params, Py_ssize_t step, Py_ssize_t ahead, f64 sums) noexcept nogil:
    """sums: (4, PITCH), two sums of each lane and what they lost."""
    cdef row dy = <row>w.job.dy + at
    cdef f64 s1 = sums
    cdef f64 e1 = sums + PITCH
    cdef f64 s2 = sums + 2 * PITCH
    cdef f64 e2 = sums + 3 * PITCH
    cdef Activation a = w.job.activation
    x += at
    if op == RAW_MOMENTS:
        add_rows(x, ld, rows, n, params, False, ahead, s1, e1, s2, e2)
    elif op == MOMENTS:
        add_rows(x, ld, rows, n, params, True, ahead, s1, e1, s2, e2)
    elif a == IDENTITY:
        add_gradient_rows(x, dy, ld, rows, n, params, step, IDENTITY, ahead, s1, e1, s2, e2)
    elif a == RELU:
        add_gradient_rows(x, dy, ld, rows, n, params, step, RELU, ahead, s1, e1, s2, e2)
    else:
        add_gradient_rows(x, dy, ld, rows, n, params, step, LEAKY_RELU, ahead, s1, e1, s2, e2)


cdef void sum_rows(Work *w, Operation op, row x, Py_ssize_t at, Py_ssize_t ld, Py_ssize_t rows, Py_ssize_t n,
                   row params, Py_ssize_t step, Py_ssize_t ahead, f64 sums) noexcept nogil:
    """The loops for any number of lanes, compiled once; sum_run has those for STEP of them."""
    sum_strip(w, op, x, at, ld, rows, n, params, step, ahead, sums)


cdef void sum_run(Work *w, Operation op, row x, Py_ssize_t at, Py_ssize_t n, row params, Py_ssize_t ahead, f64 sums) noexcept nogil:
    """n elements of one feature: rows of STEP lanes, whose sums and parameters stay in registers, and what is left."""
    cdef Py_ssize_t whole = n // STEP * STEP
    sum_strip(w, op, x, at, STEP, n // STEP, STEP, params, STEP, ahead, sums)
    if whole < n:
        sum_rows(w, op, x, at + whole, STEP, 1, n - whole, params, STEP, 0, sums)


cdef void sum_task(Work *w, Operation op, Py_ssize_t k, Py_ssize_t b, row x, row params, Py_ssize_t step, f64 sums) noexcept nogil:
    cdef Py_ssize_t size = sizeof(x[0])
    cdef Py_ssize_t first = k * w.chunk
    cdef Py_ssize_t end = min(first + w.chunk, w.units)
    cdef Py_ssize_t ld = w.fold * w.width
    cdef Py_ssize_t lead
    cdef Py_ssize_t rows
    cdef Py_ssize_t u
    cdef Py_ssize_t plane
    cdef Py_ssize_t at = 0
    cdef Py_ssize_t n = 0
    if w.planes:
        # The processor fetches ahead within a long plane by itself, but not from one short plane to the next.
        lead = NEAR // (w.job.S * size) + 1 if w.job.S * size <= AHEAD else 0
        for u in range(first, end):
            plane = plane_of(w, u, &at, &n)
            at += (plane * w.job.C + b) * w.job.S
            sum_run(w, op, x, at, n, params, lead * w.job.C * w.job.S if u + lead < end else 0, sums)
        return
    at = first * ld + b * w.block
    n = min(w.block, ld - b * w.block)
    rows = min(end, w.job.M // w.fold) - first
    sum_rows(w, op, x, at, ld, rows, n, params, step, AHEAD // size if n == ld else 4 * ld, sums)
    if w.job.M // w.fold < end:
        sum_rows(w, op, x, at + rows * ld, ld, 1, w.job.M % w.fold * w.width, params, step, 0, sums)


cdef row spread(Work *w, Py_ssize_t b, row table, Py_ssize_t pitch, Py_ssize_t used, row lanes, Py_ssize_t *step) noexcept nogil:
    """One value for each lane of block b, from one for each feature: the first `used` rows of `lanes` (PARAMETERS, step),
    the first lanes once more behind the last.

    table: (used, pitch), its first column that of the block's first feature; handed back as it is where each lane is a feature.
    """
    cdef Py_ssize_t p
    cdef Py_ssize_t _
    cdef Py_ssize_t c
    cdef Py_ssize_t s
    cdef Py_ssize_t n = features(w, b)
    cdef Py_ssize_t S = STEP if w.planes else w.job.S
    cdef Py_ssize_t copies = 1 if w.planes else w.fold
    cdef row lane
    if S == 1 and copies == 1:
        step[0] = pitch
        return table
    step[0] = S if w.planes else SPREAD_PITCH
    for p in range(used):
        lane = lanes + p * step[0]
        for _ in range(copies):
            if S == 1:
                for c in range(n):
                    lane[c] = table[p * pitch + c]
                lane += n
            else:
                for c in range(n):
                    for s in range(S):
                        lane[s] = table[p * pitch + c]
                    lane += S
        if not w.planes:
            repeat_first(lanes + p * step[0], lane - (lanes + p * step[0]))
    return lanes


cdef inline void merge(f64 s, f64 e, Py_ssize_t i, Py_ssize_t j, Py_ssize_t n) noexcept nogil:
    """Add the sums of the n lanes from j on to those of the n lanes from i on, which do not overlap them."""
    cdef Py_ssize_t k
    for k in range(n):
        add(s, e, i + k, s[j + k], True)
        e[i + k] += e[j + k]


cdef void gather(Work *w, Py_ssize_t b, f64 s, f64 e) noexcept nogil:
    """Add up the lanes of each feature of block b: the sum of its i-th feature is left in s[i]."""
    cdef Py_ssize_t S = w.job.S
    cdef Py_ssize_t n = features(w, b)
    cdef Py_ssize_t i
    cdef Py_ssize_t j
    if w.planes:
        j = STEP // 2
        while j:
            merge(s, e, 0, j, j)
            j //= 2
    else:
        for j in range(1, w.fold):
            merge(s, e, 0, j * w.width, w.width)
        if S > 1:
            for i in range(n):
                for j in range(1, S):
                    merge(s, e, i * S, i * S + j, 1)
                s[i] = s[i * S]
                e[i] = e[i * S]
    for i in range(n):
        s[i] += e[i]


cdef inline row parameters(Work *w, Py_ssize_t b, Py_ssize_t used, row lanes, Py_ssize_t *step) noexcept nogil:
    """The first `used` rows of the parameter table for the lanes of block b."""
    return spread(w, b, <row>w.params + b * features(w, 0), w.pitch, used, lanes, step)


cdef void total(Work *w, Operation op, Py_ssize_t k, Py_ssize_t b, row x, row params, Py_ssize_t step, f64 sums) noexcept nogil:
    """The task's two sums of each feature of block b: sums[i] and sums[2*PITCH + i]."""
    cdef Py_ssize_t n = STEP if w.planes else w.block
    cdef Py_ssize_t a
    for a in range(4):
        memset(sums + a * PITCH, 0, n * sizeof(double))
    sum_task(w, op, k, b, x, params, step, sums)
    gather(w, b, sums, sums + PITCH)
    gather(w, b, sums + 2 * PITCH, sums + 3 * PITCH)


cdef void choose_pivots(Work *w, Py_ssize_t k, Py_ssize_t b, row x, row pivot) noexcept nogil:
    """The mean of eight elements, evenly spaced over the chunk, of each feature of block b (of 32 in a plane, where neighbours are alike).

    A tree of eight equal values is exact: a constant feature is its own pivot.
    """
    cdef Py_ssize_t C = w.job.C
    cdef Py_ssize_t S = w.job.S
    cdef Py_ssize_t first = k * w.chunk
    cdef Py_ssize_t n = min(first + w.chunk, w.units) - first
    cdef Py_ssize_t i
    cdef Py_ssize_t plane
    cdef Py_ssize_t at = 0
    cdef Py_ssize_t elements = 0
    cdef Py_ssize_t o[32]
    if w.planes:
        # Steps of 21/32 of a piece, near the golden ratio, so that the places within the planes differ, however many planes there are.
        for i in range(32):
            plane = plane_of(w, first + i * n // 32, &at, &elements)
            o[i] = (plane * C + b) * S + at + (2 * (i * 21 % 32) + 1) * elements // 64
        pivot[0] = (((tree(x[o[0]], x[o[1]], x[o[2]], x[o[3]], x[o[4]], x[o[5]], x[o[6]], x[o[7]]) * <float>0.125
                      + tree(x[o[8]], x[o[9]], x[o[10]], x[o[11]], x[o[12]], x[o[13]], x[o[14]], x[o[15]]) * <float>0.125)
                     + (tree(x[o[16]], x[o[17]], x[o[18]], x[o[19]], x[o[20]], x[o[21]], x[o[22]], x[o[23]]) * <float>0.125
                        + tree(x[o[24]], x[o[25]], x[o[26]], x[o[27]], x[o[28]], x[o[29]], x[o[30]], x[o[31]]) * <float>0.125))
                    * <float>0.25)
        return
    n = min((first + n) * w.fold, w.job.M) - first * w.fold
    for i in range(8):
        o[i] = (first * w.fold + (2 * i + 1) * n // 16) * w.width + b * w.block + S // 2
    n = features(w, b)
    if S == 1:
        average_rows(x + o[0], x + o[1], x + o[2], x + o[3], x + o[4], x + o[5], x + o[6], x + o[7], 1, pivot, n)
    else:
        average_rows(x + o[0], x + o[1], x + o[2], x + o[3], x + o[4], x + o[5], x + o[6], x + o[7], S, pivot, n)


cdef inline bint far(row x, double s1, double s2, double per) noexcept nogil:
    """Whether the pivot was too far from the mean, so that taking the mean out of the squares costs accuracy.

    float64: more than sqrt(3) standard deviations. float32, whose squares are summed in float64: more than 32, so that even a sum of
    half a million equal terms, whose roundings do not average out, keeps 1e-7.
    """
    cdef double d = s1 * per
    cdef double q = s2 * per
    return d * d > (0.75 if sizeof(x[0]) == 8 else 0.999) * q


cdef void add_up_moments(Work *w, Py_ssize_t k, Py_ssize_t b, row x) noexcept nogil:
    """A task's part: the pivot of each feature and the two sums about it."""
    cdef double room[4 * PITCH + 8]
    cdef double lane_room[SPREAD_PITCH + 8]
    cdef double pivot_room[PITCH + 8]
    cdef f64 sums = <f64>aligned(room)
    cdef row lanes = <row>aligned(lane_room)
    cdef row pivot = <row>aligned(pivot_room)
    cdef Py_ssize_t C = w.job.C
    cdef Py_ssize_t n = features(w, b)
    cdef double per = 1 / <double>count(w, k)
    cdef f64 part = w.part + 3 * k * C + b * features(w, 0)
    cdef Py_ssize_t again = 0
    cdef Py_ssize_t step = 0
    cdef Py_ssize_t c
    if sizeof(x[0]) == 8:
        choose_pivots(w, k, b, x, pivot)
        total(w, MOMENTS, k, b, x, spread(w, b, pivot, PITCH, 1, lanes, &step), PITCH, sums)
    else:
        for c in range(n):
            pivot[c] = 0
        total(w, RAW_MOMENTS, k, b, x, pivot, PITCH, sums)
    for c in range(n):
        part[c] = pivot[c]
        part[C + c] = sums[c]
        part[2 * C + c] = sums[2 * PITCH + c]
        again += far(x, sums[c], sums[2 * PITCH + c], per)
    if again == 0:
        return
    for c in range(n):
        pivot[c] += sums[c] * per
    # The data is still in cache. Features that were right the first time keep their bits, whatever stands beside them.
    total(w, MOMENTS, k, b, x, spread(w, b, pivot, PITCH, 1, lanes, &step), PITCH, sums)
    for c in range(n):
        if far(x, part[C + c], part[2 * C + c], per):
            part[c] = pivot[c]
            part[C + c] = sums[c]
            part[2 * C + c] = sums[2 * PITCH + c]


cdef void add_up_gradients(Work *w, Py_ssize_t k, Py_ssize_t b, row x) noexcept nogil:
    cdef double room[4 * PITCH + 8]
    cdef double lane_room[PARAMETERS * SPREAD_PITCH + 8]
    cdef f64 sums = <f64>aligned(room)
    cdef Py_ssize_t C = w.job.C
    cdef f64 part = w.part + 3 * k * C + b * features(w, 0)
    cdef Py_ssize_t step = 0
    cdef Py_ssize_t c
    cdef row params = parameters(w, b, MEAN_DY, <row>aligned(lane_room), &step)
    total(w, GRADIENTS, k, b, x, params, step, sums)
    for c in range(features(w, b)):
        part[C + c] = sums[c]
        part[2 * C + c] = sums[2 * PITCH + c]
