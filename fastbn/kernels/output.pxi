# Writing y, or dx, from one element to a stream of cache lines: once for all three operations. Included in batchnorm.pyx.
#
# A range of the output, in the order of memory, is written in whole cache lines, whatever the alignment of x and the number of lanes: a store that
# touches two lines costs as much as two. So a line may begin at one row's end and end in the next; the parameter table has its first STEP lanes once
# more behind the last. Runs of one feature are written one by one. Past the caches they go in whole lines, of which one may belong to two features;
# short ones by way of a few lines in the first-level cache, where the family says so.

cdef enum Operation:
    Y            # activation((x - mean)*weight*invstd + bias)
    DX           # dx, where the statistics depend on x
    DX_SCALED    # dx, where they are constants


cdef inline Operation operation(const Job *job) noexcept nogil:
    if job.dy == NULL:
        return Y
    return DX if job.training else DX_SCALED


cdef inline real element(real x, real dy, real hi, real w, real b, real m, real slope, const Operation op,
                         const Activation activation) noexcept nogil:
    """dx is weight*invstd*(g - mean(g) - x_hat*mean(g*x_hat))  (Ioffe & Szegedy 2015, section 3, gathered), or weight*invstd*g.

    m and slope are MEAN_DY and SLOPE: the mean's low part is in m, as it is in b.
    """
    cdef real d = x - hi
    cdef real g
    if op == Y:
        return act(d * w + b, activation)
    g = unact(dy, d * w + b, activation)
    if op == DX_SCALED:
        return g * w
    return ((g - m) - d * slope) * w


cdef inline void write(row x, row dy, row y, Py_ssize_t n, table p, Py_ssize_t pitch, const bint run, const Operation op,
                       const Activation activation) noexcept nogil:
    """n elements. p: (PARAMETERS, pitch), a column for each, or of a run one for all; p[0] is HIGH.

    The compiler drops the loads that an operation does not need.
    """
    cdef Py_ssize_t i
    cdef Py_ssize_t k
    for i in range(n):
        k = 0 if run else i
        y[i] = element(x[i], dy[i], p[k], p[WEIGHT * pitch + k], p[SHIFT * pitch + k], p[MEAN_DY * pitch + k], p[SLOPE * pitch + k], op, activation)


cdef inline void write_four(row x, row dy, row y0, row y1, row y2, row y3, Py_ssize_t apart, Py_ssize_t n, table p, Py_ssize_t pitch,
                            const Operation op, const Activation activation) noexcept nogil:
    """n lanes of four rows, `apart` elements from each other, which share what is loaded of the parameters."""
    cdef Py_ssize_t i
    for i in range(n):
        hi = p[i]
        w = p[WEIGHT * pitch + i]
        b = p[SHIFT * pitch + i]
        m = p[MEAN_DY * pitch + i]
        slope = p[SLOPE * pitch + i]
        y0[i] = element(x[i], dy[i], hi, w, b, m, slope, op, activation)
        y1[i] = element(x[apart + i], dy[apart + i], hi, w, b, m, slope, op, activation)
        y2[i] = element(x[2 * apart + i], dy[2 * apart + i], hi, w, b, m, slope, op, activation)
        y3[i] = element(x[3 * apart + i], dy[3 * apart + i], hi, w, b, m, slope, op, activation)


cdef inline Py_ssize_t to_line(row y) noexcept nogil:
    """Elements before the first whole cache line."""
    return <Py_ssize_t>(-<uintptr_t>y % LINE_BYTES) // <Py_ssize_t>sizeof(y[0])


cdef inline bint less_behind(const void *x, const void *y) noexcept nogil:
    """Whether y lies a little behind x, modulo 4096."""
    cdef Py_ssize_t behind = (<uintptr_t>y - <uintptr_t>x) % 4096
    return 0 < behind < WAITING_BYTES


cdef inline bint waits_upwards(const void *x, const void *dy, const void *y) noexcept nogil:
    """Whether loads would come to where stores have just been.

    A load waits for an earlier store, which is long on its way to memory, where the low 12 bits of their addresses agree. Upwards that is so where y
    lies a little behind x or dy, downwards where those lie a little behind y.
    """
    return less_behind(x, y) or less_behind(dy, y)


cdef inline bint waits_downwards(const void *x, const void *dy, const void *y) noexcept nogil:
    return less_behind(y, x) or less_behind(y, dy)


cdef inline Py_ssize_t direction(const void *x, const void *dy, const void *y) noexcept nogil:
    """1, or -1 where lines are streamed from the last to the first."""
    return -1 if waits_upwards(x, dy, y) and not waits_downwards(x, dy, y) else 1


cdef inline void stream(row y, row lines) noexcept nogil:
    """STEP elements, whole lines, past the caches."""
    stream_line(y, lines)
    if sizeof(y[0]) == 8:
        stream_line(y + 8, lines + 8)


cdef inline void stream_step(row x, row dy, row y, Py_ssize_t ahead, table p, Py_ssize_t pitch, const bint run, const Operation op,
                             const Activation activation) noexcept nogil:
    """STEP elements past the caches; asks for those that are read `ahead` bytes further on."""
    cdef StepRoom room
    cdef row lines = <row>room.elements
    cdef int count = sizeof(x[0]) * STEP // LINE_BYTES
    prefetch(<char *>x + ahead, count, LINE_BYTES)
    if op != Y:
        prefetch(<char *>dy + ahead, count, LINE_BYTES)
    write(x, dy, lines, STEP, p, pitch, run, op, activation)
    stream(y, lines)


# --- rows: a column of the table for each lane -------------------------------------------------------------------------------------------------

cdef inline void write_rows(Work *w, row x, row dy, row y, Py_ssize_t first, Py_ssize_t n, table p, const Operation op,
                            const Activation activation) noexcept nogil:
    """n elements from element `first` on."""
    cdef Py_ssize_t lanes = w.cut.width * w.cut.fold
    cdef Py_ssize_t pitch = w.lane_pitch
    cdef Py_ssize_t apart = w.plan.apart
    cdef Py_ssize_t ahead = w.plan.write_ahead
    cdef Py_ssize_t lane = first % lanes
    cdef Py_ssize_t j = min(to_line(y), n)
    cdef Py_ssize_t end
    write(x, dy, y, j, p + lane, pitch, False, op, activation)
    lane += j
    if apart:
        while n - j >= 4 * apart:
            end = j + apart
            while j < end:
                lane -= lanes if lane >= lanes else 0
                write_four(x + j, dy + j, y + j, y + apart + j, y + 2 * apart + j, y + 3 * apart + j, apart, STEP, p + lane, pitch, op, activation)
                j += STEP
                lane += STEP
            j += 3 * apart
    while j + STEP <= n:
        lane -= lanes if lane >= lanes else 0
        if ahead:
            prefetch(<char *>(y + j) + ahead, sizeof(y[0]) * STEP // LINE_BYTES, LINE_BYTES)
        write(x + j, dy + j, y + j, STEP, p + lane, pitch, False, op, activation)
        j += STEP
        lane += STEP
    lane -= lanes if lane >= lanes else 0
    write(x + j, dy + j, y + j, n - j, p + lane, pitch, False, op, activation)


cdef inline void stream_rows(Work *w, row x, row dy, row y, Py_ssize_t first, Py_ssize_t n, table p, const Operation op,
                             const Activation activation) noexcept nogil:
    """n elements from element `first` on: whole lines."""
    cdef Py_ssize_t lanes = w.cut.width * w.cut.fold
    cdef Py_ssize_t pitch = w.lane_pitch
    cdef Py_ssize_t by = direction(x, dy, y) * STEP
    cdef Py_ssize_t j = 0 if by > 0 else n - STEP
    cdef Py_ssize_t lane = (first + j) % lanes
    cdef Py_ssize_t _
    for _ in range(n // STEP):
        stream_step(x + j, dy + j, y + j, STREAM_AHEAD_BYTES if by > 0 else -STREAM_AHEAD_BYTES, p + lane, pitch, False, op, activation)
        j += by
        lane += by
        lane -= lanes if lane >= lanes else 0
        lane += lanes if lane < 0 else 0


# --- runs: S elements of one feature after the other -------------------------------------------------------------------------------------------

ctypedef struct Place:
    Py_ssize_t feature
    Py_ssize_t left       # elements to the end of its run


cdef inline Py_ssize_t after(const Cut *cut, Py_ssize_t c) noexcept nogil:
    """The feature of the next run."""
    return c + 1 if c + 1 < cut.C else 0


cdef inline Place place_of(const Cut *cut, Py_ssize_t first) noexcept nogil:
    """Where element `first` of the output is."""
    cdef Place at
    cdef Py_ssize_t plane = first // cut.S
    at.feature = plane % cut.C
    at.left = (plane + 1) * cut.S - first
    return at


cdef inline void write_runs(Work *w, Place *at, row x, row dy, row y, Py_ssize_t n, table p, const Operation op,
                            const Activation activation) noexcept nogil:
    """n elements from a place on, which moves behind them, run by run: most are too short for a start on a line to pay."""
    cdef Py_ssize_t j = 0
    cdef Py_ssize_t k
    while j < n:
        k = min(at.left, n - j)
        at.left -= k
        if k >= LONG_RUN_ELEMENTS:
            write(x + j, dy + j, y + j, to_line(y + j), p + at.feature, w.pitch, True, op, activation)
            k -= to_line(y + j)
            j += to_line(y + j)
        write(x + j, dy + j, y + j, k, p + at.feature, w.pitch, True, op, activation)
        j += k
        if at.left == 0:
            at.left = w.cut.S
            at.feature = after(&w.cut, at.feature)


cdef inline void stream_batches(Work *w, row x, row dy, row y, Py_ssize_t first, Py_ssize_t n, table p, const Operation op,
                                const Activation activation) noexcept nogil:
    """n elements from element `first` on, whole lines: short runs, several at a time, by way of the first-level cache.

    Upwards, wherever y is: only a batch's first elements are loaded from where stores have just been.
    """
    cdef StepRoom room[BATCH_STEPS]
    cdef row lines = <row><void *>room
    cdef Place at = place_of(&w.cut, first)
    cdef Py_ssize_t j = 0
    cdef Py_ssize_t k
    cdef Py_ssize_t i
    while j < n:
        k = min(<Py_ssize_t>(BATCH_STEPS * STEP), n - j)
        prefetch(<char *>(x + j) + STREAM_AHEAD_BYTES, k * sizeof(x[0]) // LINE_BYTES, LINE_BYTES)
        if op != Y:
            prefetch(<char *>(dy + j) + STREAM_AHEAD_BYTES, k * sizeof(x[0]) // LINE_BYTES, LINE_BYTES)
        write_runs(w, &at, x + j, dy + j, lines, k, p, op, activation)
        for i in range(k // STEP):
            stream(y + j + i * STEP, lines + i * STEP)
        j += k


cdef inline void copy_column(table column, table p, Py_ssize_t pitch, const Operation op) noexcept nogil:
    """A feature's parameters that the operation reads: no store to y can be to them, as a compiler knows."""
    cdef int r
    for r in range(INVSTD if op == Y else PARAMETERS):
        column[r] = p[r * pitch]


cdef inline void set_lanes(table lanes, table p, Py_ssize_t pitch, const Operation op) noexcept nogil:
    """STEP lanes of rows of 2*STEP, from a feature's column: the rows that the operation reads."""
    cdef int r
    cdef int i
    for r in range(INVSTD if op == Y else PARAMETERS):
        for i in range(STEP):
            lanes[r * 2 * STEP + i] = p[r * pitch]


cdef inline void stream_runs(Work *w, row x, row dy, row y, Py_ssize_t first, Py_ssize_t n, table p, const Operation op,
                             const Activation activation) noexcept nogil:
    """n elements from element `first` on, whole lines. One that ends a run takes its parameters from where two features' lanes meet."""
    cdef StepRoom lane_room[2 * PARAMETERS]
    cdef double column_room[PARAMETERS]
    cdef table lanes = <table><void *>lane_room
    cdef table column = <table>column_room
    cdef Py_ssize_t S = w.cut.S
    cdef Py_ssize_t C = w.cut.C
    cdef Py_ssize_t pitch = w.pitch
    cdef Py_ssize_t way = direction(x, dy, y)
    cdef Py_ssize_t ahead = way * STREAM_AHEAD_BYTES
    cdef Py_ssize_t by = way * STEP
    cdef Py_ssize_t j = 0 if way > 0 else n - STEP
    cdef Py_ssize_t end = n if way > 0 else -STEP
    cdef Place at = place_of(&w.cut, first + j)     # where the line begins
    while j != end:
        if at.left < STEP:
            set_lanes(lanes, p + at.feature, pitch, op)
            set_lanes(lanes + STEP, p + after(&w.cut, at.feature), pitch, op)
            stream_step(x + j, dy + j, y + j, ahead, lanes + STEP - at.left, 2 * STEP, False, op, activation)
            j += by
            at.left -= by
        else:
            copy_column(column, p + at.feature, pitch, op)
            while j != end and STEP <= at.left <= S:
                stream_step(x + j, dy + j, y + j, ahead, column, 1, True, op, activation)
                j += by
                at.left -= by
        if at.left <= 0:
            at.left += S
            at.feature = after(&w.cut, at.feature)
        elif at.left > S:
            at.left -= S
            at.feature = (at.feature if at.feature else C) - 1


# --- a range: each operation, activation and kind of store is a loop of its own ------------------------------------------------------------------

cdef inline void write_cached(Work *w, row x, row dy, row y, Py_ssize_t first, Py_ssize_t n, table params, const Operation op,
                              const Activation activation) noexcept nogil:
    cdef Place at
    if w.plan.runs:
        at = place_of(&w.cut, first)
        write_runs(w, &at, x, dy, y, n, params, op, activation)
    else:
        write_rows(w, x, dy, y, first, n, <table>w.lanes, op, activation)


cdef inline void write_as(Work *w, row x, row dy, row y, Py_ssize_t first, Py_ssize_t n, table params, const Operation op,
                          const Activation activation) noexcept nogil:
    """What is streamed is whole lines; parts of lines belong to the neighbours too, and go the usual way."""
    cdef Py_ssize_t begin = min(to_line(y), n) if w.plan.streamed else n
    cdef Py_ssize_t end = begin + (n - begin) // STEP * STEP
    cdef Py_ssize_t at
    cdef Py_ssize_t count
    cdef int side
    for side in range(2):  # a loop, since a second call would be a second copy of the loops within
        at = end if side else 0
        count = n - end if side else begin
        if count:
            write_cached(w, x + at, dy + at, y + at, first + at, count, params, op, activation)
    if end == begin:
        return
    if not w.plan.runs:
        stream_rows(w, x + begin, dy + begin, y + begin, first + begin, end - begin, <table>w.lanes, op, activation)
    elif w.plan.batched or (waits_upwards(x, dy, y) and waits_downwards(x, dy, y)):
        stream_batches(w, x + begin, dy + begin, y + begin, first + begin, end - begin, params, op, activation)
    else:
        stream_runs(w, x + begin, dy + begin, y + begin, first + begin, end - begin, params, op, activation)


cdef void write_range(Work *w, Py_ssize_t first, Py_ssize_t n, row x, table params) noexcept nogil:
    """n elements of the output, from element `first` on; what was streamed waits for a fence."""
    cdef Operation op = operation(w.job)
    cdef Activation a = w.job.activation
    cdef row y = <row>w.job.y + first
    x += first
    # Forwards have no dy: the loops are given x in its place, and do not read it.
    cdef row dy = x if op == Y else <row>w.job.dy + first
    if op == Y:
        if a == IDENTITY:
            write_as(w, x, dy, y, first, n, params, Y, IDENTITY)
        elif a == RELU:
            write_as(w, x, dy, y, first, n, params, Y, RELU)
        else:
            write_as(w, x, dy, y, first, n, params, Y, LEAKY_RELU)
    elif op == DX:
        if a == IDENTITY:
            write_as(w, x, dy, y, first, n, params, DX, IDENTITY)
        elif a == RELU:
            write_as(w, x, dy, y, first, n, params, DX, RELU)
        else:
            write_as(w, x, dy, y, first, n, params, DX, LEAKY_RELU)
    elif a == IDENTITY:
        write_as(w, x, dy, y, first, n, params, DX_SCALED, IDENTITY)
    elif a == RELU:
        write_as(w, x, dy, y, first, n, params, DX_SCALED, RELU)
    else:
        write_as(w, x, dy, y, first, n, params, DX_SCALED, LEAKY_RELU)
