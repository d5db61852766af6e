# Writing y, or dx, from one element to a stream of cache lines: once for all three operations. Included in batchnorm.pyx.
#
# A range of the output, in the order of memory, is written in whole cache lines, whatever the alignment of x and the number of lanes: a store that
# touches two lines costs as much as two. So a line may begin at one row's end and end in the next; the parameter table has its first STEP lanes once
# more behind the last. Planes are written run by run, and only past the caches in whole lines, of which one may belong to two features.

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


cdef inline void write(row x, row dy, row y, Py_ssize_t n, table p, Py_ssize_t step, const bint run, const Operation op,
                       const Activation activation) noexcept nogil:
    """n elements. p: (PARAMETERS, step), a column for each, or of a run one for all. Nothing is read of rows that the operation does not need."""
    cdef Py_ssize_t i
    cdef Py_ssize_t k
    for i in range(n):
        k = 0 if run else i
        y[i] = element(x[i], dy[i], p[k], p[WEIGHT * step + k], p[SHIFT * step + k], p[MEAN_DY * step + k], p[SLOPE * step + k], op, activation)


cdef inline void write_four(row x, row dy, row y0, row y1, row y2, row y3, Py_ssize_t apart, Py_ssize_t n, table p, Py_ssize_t step,
                            const Operation op, const Activation activation) noexcept nogil:
    """n lanes of four rows, `apart` elements from each other, which share what is loaded of the parameters."""
    cdef Py_ssize_t i
    for i in range(n):
        hi = p[i]
        w = p[WEIGHT * step + i]
        b = p[SHIFT * step + i]
        m = p[MEAN_DY * step + i]
        slope = p[SLOPE * step + i]
        y0[i] = element(x[i], dy[i], hi, w, b, m, slope, op, activation)
        y1[i] = element(x[apart + i], dy[apart + i], hi, w, b, m, slope, op, activation)
        y2[i] = element(x[2 * apart + i], dy[2 * apart + i], hi, w, b, m, slope, op, activation)
        y3[i] = element(x[3 * apart + i], dy[3 * apart + i], hi, w, b, m, slope, op, activation)


cdef inline Py_ssize_t to_line(row y) noexcept nogil:
    """Elements before the first whole cache line."""
    return <Py_ssize_t>(-<uintptr_t>y % LINE_BYTES) // <Py_ssize_t>sizeof(y[0])


cdef inline void stream_step(row y, row source) noexcept nogil:
    stream_line(y, source)
    if sizeof(y[0]) == 8:
        stream_line(y + 8, source + 8)


cdef inline void fetch_step(row x, row dy, row y, const Schedule *plan, const bint streamed, const Operation op) noexcept nogil:
    cdef int lines = sizeof(x[0]) * STEP // LINE_BYTES
    if streamed:
        prefetch(<char *>x + STREAM_AHEAD_BYTES, lines, LINE_BYTES)
        if op != Y:
            prefetch(<char *>dy + STREAM_AHEAD_BYTES, lines, LINE_BYTES)
    elif plan.write_ahead:
        prefetch(<char *>y + plan.write_ahead, lines, LINE_BYTES)


# --- rows: a column of the table for each lane -------------------------------------------------------------------------------------------------

cdef inline void write_rows(Work *w, row x, row dy, row y, Py_ssize_t first, Py_ssize_t n, table p, const bint streamed, const Operation op,
                            const Activation activation) noexcept nogil:
    """n elements from element `first` on."""
    cdef double room[STEP + 8]
    cdef row line = <row>aligned(room)
    cdef Py_ssize_t lanes = w.cut.width * w.cut.fold
    cdef Py_ssize_t step = w.lane_pitch
    cdef Py_ssize_t apart = w.plan.apart
    cdef Py_ssize_t lane = first % lanes
    cdef Py_ssize_t j = min(to_line(y), n)
    cdef Py_ssize_t end
    write(x, dy, y, j, p + lane, step, False, op, activation)
    lane += j
    if not streamed and apart:
        while n - j >= 4 * apart:
            end = j + apart
            while j < end:
                lane -= lanes if lane >= lanes else 0
                write_four(x + j, dy + j, y + j, y + apart + j, y + 2 * apart + j, y + 3 * apart + j, apart, STEP, p + lane, step, op, activation)
                j += STEP
                lane += STEP
            j += 3 * apart
    while j + STEP <= n:
        lane -= lanes if lane >= lanes else 0
        fetch_step(x + j, dy + j, y + j, &w.plan, streamed, op)
        if streamed:
            write(x + j, dy + j, line, STEP, p + lane, step, False, op, activation)
            stream_step(y + j, line)
        else:
            write(x + j, dy + j, y + j, STEP, p + lane, step, False, op, activation)
        j += STEP
        lane += STEP
    lane -= lanes if lane >= lanes else 0
    write(x + j, dy + j, y + j, n - j, p + lane, step, False, op, activation)


# --- runs: S elements of one feature after the other -------------------------------------------------------------------------------------------

ctypedef struct Place:
    Py_ssize_t c       # the feature
    Py_ssize_t left    # elements of its run that are still to be written


cdef inline Place place_of(const Cut *cut, Py_ssize_t first) noexcept nogil:
    cdef Place at
    cdef Py_ssize_t plane = first // cut.S
    at.c = plane % cut.C
    at.left = cut.S - (first - plane * cut.S)
    return at


cdef inline void write_runs(Work *w, row x, row dy, row y, Py_ssize_t n, table p, Place *at, const Operation op,
                            const Activation activation) noexcept nogil:
    """n elements: run by run, since most are too short for a start on a line to pay."""
    cdef Py_ssize_t j = 0
    cdef Py_ssize_t k
    while j < n:
        if at.left == 0:
            at.left = w.cut.S
            at.c = at.c + 1 if at.c + 1 < w.cut.C else 0
        k = min(at.left, n - j)
        if k >= LONG_RUN:
            k = to_line(y + j)
        write(x + j, dy + j, y + j, k, p + at.c, w.pitch, True, op, activation)
        at.left -= k
        j += k
        if at.left >= LONG_RUN and n - j >= LONG_RUN:
            k = min(at.left, n - j)
            write(x + j, dy + j, y + j, k, p + at.c, w.pitch, True, op, activation)
            at.left -= k
            j += k


cdef inline void set_lanes(table lanes, table p, Py_ssize_t pitch, const Operation op) noexcept nogil:
    """STEP lanes of rows of 2*STEP, from a feature's column: the rows that the operation reads."""
    cdef int r
    cdef int i
    for r in range(INVSTD if op == Y else PARAMETERS):
        for i in range(STEP):
            lanes[r * 2 * STEP + i] = p[r * pitch]


cdef inline void stream_runs(Work *w, row x, row dy, row y, Py_ssize_t n, table p, Place *at, const Operation op,
                             const Activation activation) noexcept nogil:
    """n elements in whole lines. One may end a run and begin the next: it takes its parameters from where two features' lanes meet."""
    cdef double room[STEP + 8]
    cdef double lane_room[PARAMETERS * 2 * STEP + 8]
    cdef row line = <row>aligned(room)
    cdef table lanes = <table>aligned(lane_room)
    cdef Py_ssize_t j = min(to_line(y), n)
    cdef Py_ssize_t first
    write_runs(w, x, dy, y, j, p, at, op, activation)
    set_lanes(lanes, p + at.c, w.pitch, op)
    while j + STEP <= n:
        first = 0
        if at.left < STEP:
            first = STEP - at.left
            at.c = at.c + 1 if at.c + 1 < w.cut.C else 0
            at.left += w.cut.S
            set_lanes(lanes + STEP, p + at.c, w.pitch, op)
        fetch_step(x + j, dy + j, y + j, &w.plan, True, op)
        write(x + j, dy + j, line, STEP, lanes + first, 2 * STEP, False, op, activation)
        stream_step(y + j, line)
        if first:
            set_lanes(lanes, p + at.c, w.pitch, op)
        at.left -= STEP
        j += STEP
    write_runs(w, x + j, dy + j, y + j, n - j, p, at, op, activation)


# --- a range: each operation, activation and kind of store is a loop of its own ------------------------------------------------------------------

cdef inline void write_as(Work *w, row x, row dy, row y, Py_ssize_t first, Py_ssize_t n, table params, const Operation op,
                          const Activation activation) noexcept nogil:
    cdef Place at
    if w.plan.runs:
        at = place_of(&w.cut, first)
        if w.plan.streamed:
            stream_runs(w, x, dy, y, n, params, &at, op, activation)
        else:
            write_runs(w, x, dy, y, n, params, &at, op, activation)
    elif w.plan.streamed:
        write_rows(w, x, dy, y, first, n, <table>w.lanes, True, op, activation)
    else:
        write_rows(w, x, dy, y, first, n, <table>w.lanes, False, op, activation)


cdef void write_range(Work *w, Py_ssize_t first, Py_ssize_t n, row x, table params) noexcept nogil:
    """n elements of the output, from element `first` on."""
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
    if w.plan.streamed:
        stream_fence()
