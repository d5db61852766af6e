# Writing y, or dx: into cache, or past it. Included in batchnorm.pyx; strips and their parameters as in sums.pxi.

cdef void write_rows(Work *w, Operation op, row x, Py_ssize_t at, row y, Py_ssize_t ld, Py_ssize_t rows, Py_ssize_t n,
                     row params, Py_ssize_t step) noexcept nogil:
    """y: the output's first row."""
    cdef row dy = <row>w.job.dy + at
    cdef Activation a = w.job.activation
    x += at
    if op == NORMALIZE:
        if a == IDENTITY:
            normalize_rows(x, y, ld, rows, n, params, step, IDENTITY)
        elif a == RELU:
            normalize_rows(x, y, ld, rows, n, params, step, RELU)
        else:
            normalize_rows(x, y, ld, rows, n, params, step, LEAKY_RELU)
    elif op == BACKWARD:
        if a == IDENTITY:
            backward_rows(x, dy, y, ld, rows, n, params, step, True, IDENTITY)
        elif a == RELU:
            backward_rows(x, dy, y, ld, rows, n, params, step, True, RELU)
        else:
            backward_rows(x, dy, y, ld, rows, n, params, step, True, LEAKY_RELU)
    elif a == IDENTITY:
        backward_rows(x, dy, y, ld, rows, n, params, step, False, IDENTITY)
    elif a == RELU:
        backward_rows(x, dy, y, ld, rows, n, params, step, False, RELU)
    else:
        backward_rows(x, dy, y, ld, rows, n, params, step, False, LEAKY_RELU)


cdef void write_run(Work *w, Operation op, row x, Py_ssize_t at, row y, Py_ssize_t n, row params, Py_ssize_t step) noexcept nogil:
    """n elements of one feature."""
    cdef row dy = <row>w.job.dy + at
    cdef Activation a = w.job.activation
    x += at
    if op == NORMALIZE:
        if a == IDENTITY:
            normalize_run(x, y, n, params, step, IDENTITY)
        elif a == RELU:
            normalize_run(x, y, n, params, step, RELU)
        else:
            normalize_run(x, y, n, params, step, LEAKY_RELU)
    elif op == BACKWARD:
        if a == IDENTITY:
            backward_run(x, dy, y, n, params, step, True, IDENTITY)
        elif a == RELU:
            backward_run(x, dy, y, n, params, step, True, RELU)
        else:
            backward_run(x, dy, y, n, params, step, True, LEAKY_RELU)
    elif a == IDENTITY:
        backward_run(x, dy, y, n, params, step, False, IDENTITY)
    elif a == RELU:
        backward_run(x, dy, y, n, params, step, False, RELU)
    else:
        backward_run(x, dy, y, n, params, step, False, LEAKY_RELU)


cdef inline Py_ssize_t stream_part(Work *w, Operation op, row x, Py_ssize_t at, Py_ssize_t n, Py_ssize_t width, row params, Py_ssize_t step,
                                   const bint run, Py_ssize_t ahead, row waiting, Py_ssize_t left) noexcept nogil:
    """n elements from element `at` on, past the caches: see stream_rows."""
    cdef row dy = <row>w.job.dy + at
    cdef row y = <row>w.job.y + at
    cdef Activation a = w.job.activation
    x += at
    if op == NORMALIZE:
        if a == IDENTITY:
            return stream_rows(x, dy, y, n, width, params, step, run, False, True, IDENTITY, ahead, waiting, left)
        if a == RELU:
            return stream_rows(x, dy, y, n, width, params, step, run, False, True, RELU, ahead, waiting, left)
        return stream_rows(x, dy, y, n, width, params, step, run, False, True, LEAKY_RELU, ahead, waiting, left)
    if op == BACKWARD:
        if a == IDENTITY:
            return stream_rows(x, dy, y, n, width, params, step, run, True, True, IDENTITY, ahead, waiting, left)
        if a == RELU:
            return stream_rows(x, dy, y, n, width, params, step, run, True, True, RELU, ahead, waiting, left)
        return stream_rows(x, dy, y, n, width, params, step, run, True, True, LEAKY_RELU, ahead, waiting, left)
    if a == IDENTITY:
        return stream_rows(x, dy, y, n, width, params, step, run, True, False, IDENTITY, ahead, waiting, left)
    if a == RELU:
        return stream_rows(x, dy, y, n, width, params, step, run, True, False, RELU, ahead, waiting, left)
    return stream_rows(x, dy, y, n, width, params, step, run, True, False, LEAKY_RELU, ahead, waiting, left)


cdef Py_ssize_t stream_of_rows(Work *w, Operation op, row x, Py_ssize_t at, Py_ssize_t n, Py_ssize_t width, row params, Py_ssize_t step,
                               Py_ssize_t ahead, row waiting) noexcept nogil:
    """The loops for one parameter a lane, compiled once."""
    return stream_part(w, op, x, at, n, width, params, step, False, ahead, waiting, 0)


cdef Py_ssize_t stream_of_run(Work *w, Operation op, row x, Py_ssize_t at, Py_ssize_t n, row params, row waiting, Py_ssize_t left) noexcept nogil:
    """The loops for one feature, compiled once."""
    return stream_part(w, op, x, at, n, n, params, w.pitch, True, STREAM_AHEAD // <Py_ssize_t>sizeof(x[0]), waiting, left)


cdef void write_block(Work *w, Operation op, Py_ssize_t k, Py_ssize_t b, row x) noexcept nogil:
    """The output of chunk k of block b, of rows; or, past the caches, as large a part of the chunk's rows, whole, in the order of memory."""
    cdef double lane_room[PARAMETERS * SPREAD_PITCH + 8]
    cdef double line_room[STEP + 8]
    cdef row waiting = <row>aligned(line_room)
    cdef row y = <row>w.job.y
    cdef Py_ssize_t size = sizeof(x[0])
    cdef Py_ssize_t first = k * w.chunk
    cdef Py_ssize_t end = min(first + w.chunk, w.units)
    cdef Py_ssize_t ld = w.fold * w.width
    cdef Py_ssize_t at = b * w.block
    cdef Py_ssize_t n = min(w.block, ld - at)
    cdef Py_ssize_t left
    cdef Py_ssize_t step = 0
    cdef Py_ssize_t rows
    cdef Py_ssize_t together
    cdef Py_ssize_t r
    cdef row params
    if w.streamed and not w.fused and w.job.S == 1 and n < ld and ld * size <= WIDE:
        rows = end - first
        end = first + rows * (b + 1) // w.blocks
        first += rows * b // w.blocks
        at = 0
        b = 0
        n = ld
    params = parameters(w, b, PARAMETERS if op == BACKWARD else LOW, <row>aligned(lane_room), &step)
    at += first * ld
    rows = min(end, w.job.M // w.fold) - first
    # There is no whole row in a chunk of less than one of lanes, or where there are more blocks than rows.
    if w.streamed and rows:
        together = rows if n == ld else 1
        for r in range(rows // together):
            # What is read soon: in the rest of the row and the next ones, or below.
            left = stream_of_rows(w, op, x, at, together * n, n, params, step, STREAM_AHEAD // size if n == ld else ld, waiting)
            memcpy(y + at + together * n - left, waiting, left * size)
            at += together * ld
        stream_fence()
    else:
        write_rows(w, op, x, at, y + at, ld, rows, n, params, step)
        at += rows * ld
    if w.job.M // w.fold < end:
        n = w.job.M % w.fold * w.width
        write_rows(w, op, x, at, y + at, n, 1, n, params, step)


cdef void write_planes(Work *w, Operation op, Py_ssize_t first, Py_ssize_t end, Py_ssize_t b, row x) noexcept nogil:
    """The output of some pieces of planes: numbers first to end of those of feature b, the last ones first; or, where b is -1, of all
    planes' pieces in the order of memory.
    """
    cdef double line_room[STEP + 8]
    cdef row waiting = <row>aligned(line_room)
    cdef row y = <row>w.job.y
    cdef Py_ssize_t size = sizeof(x[0])
    cdef Py_ssize_t C = w.job.C
    cdef Py_ssize_t S = w.job.S
    cdef Py_ssize_t left = 0
    cdef Py_ssize_t c = first // w.pieces % C if b < 0 else b
    cdef Py_ssize_t i
    cdef Py_ssize_t plane
    cdef Py_ssize_t at = 0
    cdef Py_ssize_t n = 0
    cdef row params
    for i in range(first, end):
        plane = plane_of(w, i if b < 0 else first + end - 1 - i, &at, &n)
        params = <row>w.params + c
        if b >= 0:
            plane = plane * C + b
        elif at + n == S:
            c = c + 1 if c + 1 < C else 0
        at += plane * S
        if w.streamed:
            left = stream_of_run(w, op, x, at, n, params, waiting, left)
            # Planes that follow each other in memory share the lines between them.
            if b >= 0 or i == end - 1:
                memcpy(y + at + n - left, waiting, left * size)
                left = 0
        else:
            write_run(w, op, x, at, y + at, n, params, w.pitch)
    if w.streamed:
        stream_fence()
