# cython: boundscheck=False, wraparound=False, cdivision=True, infer_types=True
"""The loops over x, compiled once for each instruction set.

Design: plan.pxd cuts the work into tasks: a chunk of the units of a block of the lanes. lanes.pxd has the arithmetic on a strip, rows of
lanes. A task owns its lanes' partial sums, and merge.pxd adds them up in the order of the chunks, so the bits do not depend on the number of
threads. A call is a few steps, each a loop over tasks or blocks, within one parallel region.

Where a block stays in cache from one pass to the next, all passes over it come before the next block (`fused`), and it is read from memory once.
Otherwise the last step goes backwards, to what the one before it left in cache. The passes over memory stand beside each kernel, below.
"""
from cython.parallel cimport parallel, prange
from cpython.pycapsule cimport PyCapsule_New
from libc.stdint cimport uintptr_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from fastbn.kernels.lanes cimport (
    LOW,
    MEAN_DY,
    PARAMETERS,
    STEP,
    add,
    add_gradient_rows,
    add_rows,
    average_rows,
    backward_rows,
    backward_run,
    f32,
    f64,
    normalize_rows,
    normalize_run,
    row,
    stream_row,
    tree,
)
from fastbn.kernels.merge cimport merge_gradients, merge_moments, prepare
from fastbn.kernels.plan cimport (
    AHEAD,
    LINE_BYTES,
    NEAR,
    PITCH,
    ROOM,
    SPREAD,
    Work,
    count,
    features,
    plan,
)
from fastbn.kernels.stores cimport FASTBN_STREAMS, stream_fence
from fastbn.kernels.table cimport IDENTITY, LEAKY_RELU, RELU, Activation, Job, Table
from fastbn.kernels.wide cimport backward_wide, normalize_wide

cdef enum Operation:
    RAW_MOMENTS   # sums of x and x*x
    MOMENTS       # sums of d and d*d, d = x - pivot
    NORMALIZE
    GRADIENTS     # sums of dy and dy*x_hat
    BACKWARD      # dx, where the statistics depend on x
    SCALE         # dx, where they are constants

cdef enum:
    SPREAD_PITCH = SPREAD + 16   # off the multiples of 4 KB, as PITCH
    STREAM_AHEAD = 2048          # bytes from what is read to what is asked for, where the output is streamed: measured, on 0 to 16 KB


cdef inline void *aligned(void *room) noexcept nogil:
    """The first cache line within room."""
    return <void *>((<uintptr_t>room + LINE_BYTES - 1) // LINE_BYTES * LINE_BYTES)


# --- one strip: `rows` rows of n lanes, the first at element `at`, ld elements apart --------------------------------------------
#
# params: (PARAMETERS, step), the first n of each row used.  Each activation is a loop of its own: a test inside the loop would not
# vectorise with every compiler.

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
    sum_strip(w, op, x, at, ld, rows, n, params, step, ahead, sums)


cdef void sum_run(Work *w, Operation op, row x, Py_ssize_t at, Py_ssize_t n, row params, Py_ssize_t ahead, f64 sums) noexcept nogil:
    """n elements of one feature: rows of STEP lanes, whose sums and parameters stay in registers, and what is left."""
    cdef Py_ssize_t whole = n // STEP * STEP
    sum_strip(w, op, x, at, STEP, n // STEP, STEP, params, STEP, ahead, sums)
    if whole < n:
        sum_rows(w, op, x, at + whole, STEP, 1, n - whole, params, STEP, 0, sums)


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


# --- sums over one task: chunk k of the units, block b of the lanes ----------------------------------------------------------------

cdef void sum_task(Work *w, Operation op, Py_ssize_t k, Py_ssize_t b, row x, row params, Py_ssize_t step, f64 sums) noexcept nogil:
    cdef Py_ssize_t size = sizeof(x[0])
    cdef Py_ssize_t first = k * w.chunk
    cdef Py_ssize_t end = min(first + w.chunk, w.units)
    cdef Py_ssize_t ld = w.fold * w.width
    cdef Py_ssize_t lead
    cdef Py_ssize_t rows
    cdef Py_ssize_t u
    cdef Py_ssize_t at
    cdef Py_ssize_t n
    if w.planes:
        # The processor fetches ahead within a long plane by itself, but not from one short plane to the next.
        lead = NEAR // (w.job.S * size) + 1 if w.job.S * size <= AHEAD else 0
        for u in range(first, end):
            at = u % w.pieces * w.piece
            n = min(w.piece, w.job.S - at)
            at += (u // w.pieces * w.job.C + b) * w.job.S
            sum_run(w, op, x, at, n, params, lead * w.job.C * w.job.S if u + lead < end else 0, sums)
        return
    at = first * ld + b * w.block
    n = min(w.block, ld - b * w.block)
    rows = min(end, w.job.M // w.fold) - first
    sum_rows(w, op, x, at, ld, rows, n, params, step, AHEAD // size if n == ld else 4 * ld, sums)
    if w.job.M // w.fold < end:
        sum_rows(w, op, x, at + rows * ld, ld, 1, w.job.M % w.fold * w.width, params, step, 0, sums)


cdef row spread(Work *w, Py_ssize_t b, row table, Py_ssize_t pitch, Py_ssize_t used, row lanes, Py_ssize_t *step) noexcept nogil:
    """One value for each lane of block b, from one for each feature: the first `used` rows of `lanes` (PARAMETERS, step).

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
    cdef Py_ssize_t u
    cdef Py_ssize_t at
    cdef Py_ssize_t o[32]
    if w.planes:
        # Steps of 21/32 of a piece, near the golden ratio, so that the places within the planes differ, however many planes there are.
        for i in range(32):
            u = first + i * n // 32
            at = u % w.pieces * w.piece
            o[i] = (u // w.pieces * C + b) * S + at + (2 * (i * 21 % 32) + 1) * min(w.piece, S - at) // 64
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


# --- output ---------------------------------------------------------------------------------------------------------------

cdef inline Py_ssize_t stream_part(Work *w, Operation op, row x, Py_ssize_t at, Py_ssize_t n, row params, Py_ssize_t step, const bint run,
                                   row waiting, Py_ssize_t left) noexcept nogil:
    """n elements from element `at` on, past the caches: see stream_row."""
    cdef row dy = <row>w.job.dy + at
    cdef row y = <row>w.job.y + at
    cdef Activation a = w.job.activation
    cdef Py_ssize_t ahead = STREAM_AHEAD // <Py_ssize_t>sizeof(x[0])
    x += at
    if op == NORMALIZE:
        if a == IDENTITY:
            return stream_row(x, dy, y, n, params, step, run, False, True, IDENTITY, ahead, waiting, left)
        if a == RELU:
            return stream_row(x, dy, y, n, params, step, run, False, True, RELU, ahead, waiting, left)
        return stream_row(x, dy, y, n, params, step, run, False, True, LEAKY_RELU, ahead, waiting, left)
    if op == BACKWARD:
        if a == IDENTITY:
            return stream_row(x, dy, y, n, params, step, run, True, True, IDENTITY, ahead, waiting, left)
        if a == RELU:
            return stream_row(x, dy, y, n, params, step, run, True, True, RELU, ahead, waiting, left)
        return stream_row(x, dy, y, n, params, step, run, True, True, LEAKY_RELU, ahead, waiting, left)
    if a == IDENTITY:
        return stream_row(x, dy, y, n, params, step, run, True, False, IDENTITY, ahead, waiting, left)
    if a == RELU:
        return stream_row(x, dy, y, n, params, step, run, True, False, RELU, ahead, waiting, left)
    return stream_row(x, dy, y, n, params, step, run, True, False, LEAKY_RELU, ahead, waiting, left)


cdef Py_ssize_t stream_of_row(Work *w, Operation op, row x, Py_ssize_t at, Py_ssize_t n, row params, Py_ssize_t step, row waiting,
                              Py_ssize_t left) noexcept nogil:
    return stream_part(w, op, x, at, n, params, step, False, waiting, left)


cdef Py_ssize_t stream_of_run(Work *w, Operation op, row x, Py_ssize_t at, Py_ssize_t n, row params, row waiting, Py_ssize_t left) noexcept nogil:
    return stream_part(w, op, x, at, n, params, w.pitch, True, waiting, left)


cdef void write_block(Work *w, Operation op, Py_ssize_t k, Py_ssize_t b, row x) noexcept nogil:
    """The output of chunk k of block b, of rows."""
    cdef double lane_room[PARAMETERS * SPREAD_PITCH + 8]
    cdef double line_room[STEP + 8]
    cdef row waiting = <row>aligned(line_room)
    cdef row y = <row>w.job.y
    cdef Py_ssize_t size = sizeof(x[0])
    cdef Py_ssize_t first = k * w.chunk
    cdef Py_ssize_t end = min(first + w.chunk, w.units)
    cdef Py_ssize_t ld = w.fold * w.width
    cdef Py_ssize_t at = first * ld + b * w.block
    cdef Py_ssize_t n = min(w.block, ld - b * w.block)
    cdef Py_ssize_t rows = min(end, w.job.M // w.fold) - first
    cdef Py_ssize_t left = 0
    cdef Py_ssize_t step = 0
    cdef Py_ssize_t r
    cdef row params = parameters(w, b, PARAMETERS if op == BACKWARD else LOW, <row>aligned(lane_room), &step)
    if FASTBN_STREAMS and w.job.streamed:
        for r in range(rows):
            left = stream_of_row(w, op, x, at, n, params, step, waiting, left)
            if n < ld or r == rows - 1:
                memcpy(y + at + n - left, waiting, left * size)
                left = 0
            at += ld
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
    cdef Py_ssize_t left = 0
    cdef Py_ssize_t i
    cdef Py_ssize_t u
    cdef Py_ssize_t at
    cdef Py_ssize_t n
    cdef row params
    for i in range(first, end):
        u = i
        if b >= 0:
            u = first + end - 1 - i
            u = (u // w.pieces * w.job.C + b) * w.pieces + u % w.pieces
        params = <row>w.params + u // w.pieces % w.job.C
        at = u % w.pieces * w.piece
        n = min(w.piece, w.job.S - at)
        at += u // w.pieces * w.job.S
        if FASTBN_STREAMS and w.job.streamed:
            left = stream_of_run(w, op, x, at, n, params, waiting, left)
            # Planes that follow each other in memory share the lines between them.
            if b >= 0 or i == end - 1:
                memcpy(y + at + n - left, waiting, left * size)
                left = 0
        else:
            write_run(w, op, x, at, y + at, n, params, w.pitch)
    if FASTBN_STREAMS and w.job.streamed:
        stream_fence()


# --- steps: what a kernel is made of ----------------------------------------------------------------------------------------

cdef enum Step:
    ADD_MOMENTS        # of each task
    MERGE_MOMENTS      # of each block, which is then prepared where there is a y to write
    PREPARE            # of each block
    WRITE_Y            # of each task
    ADD_GRADIENTS      # of each task
    MERGE_GRADIENTS    # of each block
    WRITE_DX           # of each task


cdef inline bint by_task(Step step) noexcept nogil:
    return step == ADD_MOMENTS or step == WRITE_Y or step == ADD_GRADIENTS or step == WRITE_DX


cdef inline bint backwards(Step step) noexcept nogil:
    return step == WRITE_Y or step == WRITE_DX


cdef inline Operation writing(Work *w, Step step) noexcept nogil:
    """The operation of a step that writes."""
    if step == WRITE_Y:
        return NORMALIZE
    return BACKWARD if w.job.training else SCALE


cdef void do(Work *w, Step step, Py_ssize_t k, Py_ssize_t b, row x) noexcept nogil:
    """A step's work on chunk k of block b, or on all of block b."""
    cdef Py_ssize_t at = b * features(w, 0)
    cdef Py_ssize_t n = features(w, b)
    if step == ADD_MOMENTS:
        add_up_moments(w, k, b, x)
    elif step == MERGE_MOMENTS or step == PREPARE:
        if step == MERGE_MOMENTS:
            merge_moments(w, at, n)
        if w.job.y != NULL and not prepare(w, <row>w.params, at, n):
            w.wide = True
    elif w.wide:
        return
    elif step == ADD_GRADIENTS:
        add_up_gradients(w, k, b, x)
    elif step == MERGE_GRADIENTS:
        merge_gradients(w, <row>w.params, at, n)
    elif w.planes:
        write_planes(w, writing(w, step), k * w.chunk, min((k + 1) * w.chunk, w.units), b, x)
    else:
        write_block(w, writing(w, step), k, b, x)


cdef void do_numbered(Work *w, Step step, Py_ssize_t i, row x) noexcept nogil:
    """Number i of a step's tasks or blocks."""
    cdef Py_ssize_t tasks = w.chunks * w.blocks
    cdef Py_ssize_t all = w.job.M * w.job.C * w.pieces
    if by_task(step):
        i = tasks - 1 - i if backwards(step) else i
        if w.planes and backwards(step):
            # Nothing stays in cache: a feature's planes need not go together.
            if not w.wide:
                write_planes(w, writing(w, step), all * i // tasks, all * (i + 1) // tasks, -1, x)
        else:
            do(w, step, i // w.blocks, i % w.blocks, x)
    else:
        do(w, step, 0, i, x)


cdef void do_block(Work *w, const Step *steps, int n, Py_ssize_t b, row x) noexcept nogil:
    """All steps of block b."""
    cdef Py_ssize_t k
    cdef int s = 0
    for s in range(n):
        if by_task(steps[s]):
            for k in range(w.chunks):
                do(w, steps[s], w.chunks - 1 - k if backwards(steps[s]) else k, b, x)
        else:
            do(w, steps[s], 0, b, x)


cdef void run(Work *w, const Step *steps, int n, row x) noexcept nogil:
    """The steps, one after the other. Only the number of threads is not given by the shape."""
    cdef Py_ssize_t i
    cdef int s = 0
    if w.fused:
        if w.threads < 2:
            for i in range(w.blocks):
                do_block(w, steps, n, i, x)
        else:
            for i in prange(w.blocks, schedule="static", num_threads=w.threads):
                do_block(w, steps, n, i, x)
    elif w.threads < 2:
        for s in range(n):
            for i in range(w.chunks * w.blocks if by_task(steps[s]) else w.blocks):
                do_numbered(w, steps[s], i, x)
    else:
        with parallel(num_threads=w.threads):
            for s in range(n):
                for i in prange(w.chunks * w.blocks if by_task(steps[s]) else w.blocks, schedule="static"):
                    do_numbered(w, steps[s], i, x)


# --- the kernels ------------------------------------------------------------------------------------------------------------

cdef inline double *workspace(double *room, Py_ssize_t n) noexcept nogil:
    """n float64 values: `room` where they fit (malloc weighs in a short call), else from malloc; NULL where memory ran out."""
    if n <= ROOM:
        return room
    return <double *>malloc(n * sizeof(double))


cdef inline void release(double *taken, double *room) noexcept nogil:
    if taken != room:
        free(taken)


cdef int kernel(Job *job, const Step *steps, int n, Py_ssize_t inputs, row x) noexcept nogil:
    cdef double room[ROOM]
    cdef double *taken
    cdef Py_ssize_t parameters
    cdef Work w
    w.job = job
    plan(&w, inputs)
    parameters = PARAMETERS * w.pitch * <Py_ssize_t>sizeof(x[0]) // 8
    taken = workspace(room, 8 + parameters + 3 * w.chunks * job.C)
    if taken == NULL:
        return -1
    w.params = aligned(taken)
    w.part = <double *>w.params + parameters
    run(&w, steps, n, x)
    if w.wide:
        if job.dy == NULL:
            normalize_wide(job)
        else:
            backward_wide(job)
    release(taken, room)
    return 0


cdef inline int kernel_of(Job *job, const Step *steps, int n, Py_ssize_t inputs) noexcept nogil:
    if job.is_float64:
        return kernel(job, steps, n, inputs, <f64>job.x)
    return kernel(job, steps, n, inputs, <f32>job.x)


cdef int moments(Job *job) noexcept nogil:
    """One read."""
    cdef Step steps[2]
    steps[:] = [ADD_MOMENTS, MERGE_MOMENTS]
    return kernel_of(job, steps, 2, 1)


cdef int forward(Job *job) noexcept nogil:
    """Two reads and a write; one and one where a block stays in cache."""
    cdef Step steps[3]
    steps[:] = [ADD_MOMENTS, MERGE_MOMENTS, WRITE_Y]
    return kernel_of(job, steps, 3, 1)


cdef int normalize(Job *job) noexcept nogil:
    """One read and a write."""
    cdef Step steps[2]
    steps[:] = [PREPARE, WRITE_Y]
    return kernel_of(job, steps, 2, 0)


cdef int backward(Job *job) noexcept nogil:
    """Two reads of x and dy and a write; one of each where a block stays in cache."""
    cdef Step steps[4]
    steps[:] = [PREPARE, ADD_GRADIENTS, MERGE_GRADIENTS, WRITE_DX]
    return kernel_of(job, steps, 4, 2)


cdef Table TABLE
TABLE.moments = moments
TABLE.forward = forward
TABLE.normalize = normalize
TABLE.backward = backward

table = PyCapsule_New(&TABLE, "fastbn.kernels.Table", NULL)
