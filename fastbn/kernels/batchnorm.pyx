# cython: boundscheck=False, wraparound=False, cdivision=True, infer_types=True
"""The loops over x, compiled once for each instruction set.

Design: plan.pxd cuts the work into tasks by shape alone; lanes.pxd has the arithmetic on a strip, rows of lanes. A task owns its lanes'
partial sums, and merge.pxd adds them up in the order of the tasks, so the bits do not depend on the number of threads. One traversal
(`visit`) serves the operations below.

Passes over memory (reads + writes): moments 1 + 0, normalize 1 + 1, backward 2*2 + 1.
"""
from cython.parallel cimport prange
from cpython.pycapsule cimport PyCapsule_New
from libc.stdlib cimport free, malloc
from libc.string cimport memset

from fastbn.kernels.lanes cimport (
    MEAN_DY,
    PARAMETERS,
    add,
    add_four,
    add_four_gradients,
    add_one,
    add_one_gradient,
    average_rows,
    backward_rows,
    f32,
    f64,
    normalize_rows,
    row,
    scale_rows,
    tree,
)
from fastbn.kernels.merge cimport merge_gradients, merge_moments, prepare, representable
from fastbn.kernels.plan cimport PITCH, ROOM, RUN_LANES, Work, count, features, plan
from fastbn.kernels.table cimport IDENTITY, LEAKY_RELU, RELU, Activation, Job, Table
from fastbn.kernels.wide cimport backward_wide, normalize_wide

cdef enum Operation:
    MOMENTS     # sums of d and d*d, d = x - pivot
    NORMALIZE
    GRADIENTS   # sums of dy and dy*x_hat
    BACKWARD    # dx, where the statistics depend on x
    SCALE       # dx, where they are constants

# --- one strip ----------------------------------------------------------------------------------------------------------

cdef void strip(Work *w, Operation op, row x, Py_ssize_t at, Py_ssize_t ld, Py_ssize_t rows, Py_ssize_t n,
                row params, Py_ssize_t step, f64 sums) noexcept nogil:
    """The operation on `rows` rows of n lanes, the first at element `at`, ld elements apart.

    params: (PARAMETERS, step), the first n of each row used.  sums: (4, PITCH), two sums and what they lost.
    """
    cdef row dy = <row>w.job.dy + at
    cdef row y = <row>w.job.y + at
    cdef f64 s1 = sums
    cdef f64 e1 = sums + PITCH
    cdef f64 s2 = sums + 2 * PITCH
    cdef f64 e2 = sums + 3 * PITCH
    cdef Activation a = w.job.activation
    x += at
    # Each activation is a loop of its own: a test inside the loop would not vectorise with every compiler.
    if op == NORMALIZE:
        if a == IDENTITY:
            normalize_rows(x, y, ld, rows, n, params, step, IDENTITY)
        elif a == RELU:
            normalize_rows(x, y, ld, rows, n, params, step, RELU)
        else:
            normalize_rows(x, y, ld, rows, n, params, step, LEAKY_RELU)
    elif op == BACKWARD:
        if a == IDENTITY:
            backward_rows(x, dy, y, ld, rows, n, params, step, IDENTITY)
        elif a == RELU:
            backward_rows(x, dy, y, ld, rows, n, params, step, RELU)
        else:
            backward_rows(x, dy, y, ld, rows, n, params, step, LEAKY_RELU)
    elif op == SCALE:
        if a == IDENTITY:
            scale_rows(x, dy, y, ld, rows, n, params, step, IDENTITY)
        elif a == RELU:
            scale_rows(x, dy, y, ld, rows, n, params, step, RELU)
        else:
            scale_rows(x, dy, y, ld, rows, n, params, step, LEAKY_RELU)
    elif op == GRADIENTS:
        while rows >= 4:
            if a == IDENTITY:
                add_four_gradients(x, dy, ld, n, params, step, IDENTITY, s1, e1, s2, e2)
            elif a == RELU:
                add_four_gradients(x, dy, ld, n, params, step, RELU, s1, e1, s2, e2)
            else:
                add_four_gradients(x, dy, ld, n, params, step, LEAKY_RELU, s1, e1, s2, e2)
            x += 4 * ld
            dy += 4 * ld
            rows -= 4
        while rows > 0:
            add_one_gradient(x, dy, n, params, step, a, s1, e1, s2, e2)
            x += ld
            dy += ld
            rows -= 1
    else:
        while rows >= 4:
            add_four(x, ld, n, params, s1, e1, s2, e2)
            x += 4 * ld
            rows -= 4
        while rows > 0:
            add_one(x, n, params, s1, e1, s2, e2)
            x += ld
            rows -= 1


# --- one task: chunk k of the units, block b of the lanes ----------------------------------------------------------------

cdef void visit(Work *w, Operation op, Py_ssize_t k, Py_ssize_t b, row x, row params, Py_ssize_t step, f64 sums) noexcept nogil:
    """The operation on every strip of a task."""
    cdef Py_ssize_t first = k * w.chunk
    cdef Py_ssize_t end = min(first + w.chunk, w.units)
    cdef Py_ssize_t u
    cdef Py_ssize_t at
    cdef Py_ssize_t n
    cdef Py_ssize_t ld
    cdef Py_ssize_t rows
    if w.planes:
        for u in range(first, end):
            at = u % w.pieces * w.piece
            n = min(w.piece, w.job.S - at)
            at += (u // w.pieces * w.job.C + b) * w.job.S
            rows = n // (8 * RUN_LANES) * 8
            strip(w, op, x, at, RUN_LANES, rows, RUN_LANES, params, step, sums)
            at += rows * RUN_LANES
            n -= rows * RUN_LANES
            strip(w, op, x, at, n // 8, 8, n // 8, params, step, sums)
            strip(w, op, x, at + n // 8 * 8, 8, 1, n % 8, params, step, sums)
        return
    ld = w.fold * w.width
    at = first * ld + b * w.block
    n = min(w.block, ld - b * w.block)
    rows = min(end, w.job.M // w.fold) - first
    strip(w, op, x, at, ld, rows, n, params, step, sums)
    if rows < end - first:
        strip(w, op, x, at + rows * ld, ld, 1, w.job.M % w.fold * w.width, params, step, sums)


cdef row spread(Work *w, Py_ssize_t b, row table, Py_ssize_t pitch, Py_ssize_t used, row lanes, Py_ssize_t *step) noexcept nogil:
    """One value for each lane of block b, from one for each feature: the first `used` rows of `lanes` (PARAMETERS, PITCH).

    table: (used, pitch), its first column that of the block's first feature; handed back as it is where each lane is a feature.
    """
    cdef Py_ssize_t p
    cdef Py_ssize_t _
    cdef Py_ssize_t c
    cdef Py_ssize_t s
    cdef Py_ssize_t n = features(w, b)
    cdef Py_ssize_t S = RUN_LANES if w.planes else w.job.S
    cdef Py_ssize_t copies = 1 if w.planes else w.fold
    cdef row lane
    if S == 1 and copies == 1:
        step[0] = pitch
        return table
    step[0] = PITCH
    for p in range(used):
        lane = lanes + p * PITCH
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
        j = RUN_LANES // 2
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


cdef void total(Work *w, Operation op, Py_ssize_t k, Py_ssize_t b, row x, row params, Py_ssize_t step, f64 sums) noexcept nogil:
    """The task's two sums of each feature of block b: sums[i] and sums[2*PITCH + i]."""
    cdef Py_ssize_t n = RUN_LANES if w.planes else w.block
    cdef Py_ssize_t a
    for a in range(4):
        memset(sums + a * PITCH, 0, n * sizeof(double))
    visit(w, op, k, b, x, params, step, sums)
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


cdef inline bint trusted(double s1, double s2, double per) noexcept nogil:
    """Whether the pivot was within sqrt(3) std of the mean, so that float64 keeps its accuracy once the mean is taken out of the squares."""
    cdef double d = s1 * per
    cdef double q = s2 * per
    return q - d * d >= 0.25 * q


cdef void task_moments(Work *w, Py_ssize_t k, Py_ssize_t b, row x, row lanes, f64 sums) noexcept nogil:
    cdef double pivots[PITCH]
    cdef row pivot = <row><void *>pivots
    cdef Py_ssize_t C = w.job.C
    cdef Py_ssize_t n = features(w, b)
    cdef double per = 1 / <double>count(w, k)
    cdef f64 part = w.part + 3 * k * C + b * features(w, 0)
    cdef Py_ssize_t right = 0
    cdef Py_ssize_t step
    cdef Py_ssize_t c
    choose_pivots(w, k, b, x, pivot)
    total(w, MOMENTS, k, b, x, spread(w, b, pivot, PITCH, 1, lanes, &step), PITCH, sums)
    for c in range(n):
        part[c] = pivot[c]
        part[C + c] = sums[c]
        part[2 * C + c] = sums[2 * PITCH + c]
        right += trusted(sums[c], sums[2 * PITCH + c], per)
    # float32 data can do without: no element is further than sqrt(m) std from the mean, and float64 has 29 bits to spare.
    if right == n or sizeof(x[0]) == 4:
        return
    for c in range(n):
        pivot[c] += sums[c] * per
    # The data is still in cache. Features that were right the first time keep their bits, whatever stands beside them.
    total(w, MOMENTS, k, b, x, spread(w, b, pivot, PITCH, 1, lanes, &step), PITCH, sums)
    for c in range(n):
        if not trusted(part[C + c], part[2 * C + c], per):
            part[c] = pivot[c]
            part[C + c] = sums[c]
            part[2 * C + c] = sums[2 * PITCH + c]


cdef void task(Work *w, Operation op, Py_ssize_t i, row x) noexcept nogil:
    cdef double sums[4 * PITCH]
    cdef double room[PARAMETERS * PITCH]
    cdef row lanes = <row><void *>room
    cdef row params
    cdef Py_ssize_t step
    cdef Py_ssize_t b = i % w.blocks
    cdef Py_ssize_t k = i // w.blocks
    cdef Py_ssize_t first = b * features(w, 0)
    cdef Py_ssize_t c
    cdef double *part
    if op == MOMENTS:
        task_moments(w, k, b, x, lanes, sums)
        return
    params = spread(w, b, <row>w.params + first, w.job.C, MEAN_DY if op != BACKWARD else PARAMETERS, lanes, &step)
    if op != GRADIENTS:
        visit(w, op, k, b, x, params, step, sums)
        return
    total(w, op, k, b, x, params, step, sums)
    part = w.part + 3 * k * w.job.C + first
    for c in range(features(w, b)):
        part[w.job.C + c] = sums[c]
        part[2 * w.job.C + c] = sums[2 * PITCH + c]


cdef void run(Work *w, Operation op, row x) noexcept nogil:
    """Every task of the operation. Only the number of threads is not given by the shape."""
    cdef Py_ssize_t tasks = w.blocks * w.chunks
    cdef Py_ssize_t i
    cdef int threads = <int>min(<Py_ssize_t>w.job.num_threads, tasks)
    if threads < 2:
        for i in range(tasks):
            task(w, op, i, x)
    else:
        for i in prange(tasks, schedule="static", num_threads=threads):
            task(w, op, i, x)


# --- the kernels ------------------------------------------------------------------------------------------------------------

cdef inline double *workspace(double *room, Py_ssize_t n) noexcept nogil:
    """n float64 values: `room` where they fit (malloc weighs in a short call), else from malloc; NULL where memory ran out."""
    if n <= ROOM:
        return room
    return <double *>malloc(n * sizeof(double))


cdef inline void release(double *taken, double *room) noexcept nogil:
    if taken != room:
        free(taken)


cdef int moments_of(Job *job, row x) noexcept nogil:
    cdef double room[ROOM]
    cdef double *scratch
    cdef Work w
    w.job = job
    plan(&w)
    w.part = workspace(room, (3 * w.chunks + 2) * job.C)
    if w.part == NULL:
        return -1
    scratch = w.part + 3 * w.chunks * job.C
    run(&w, MOMENTS, x)
    merge_moments(&w, job.mean, job.mean_low, job.var, scratch, scratch + job.C)
    release(w.part, room)
    return 0


cdef int normalize_of(Job *job, row x) noexcept nogil:
    cdef double room[ROOM]
    cdef double *table
    cdef Work w
    w.job = job
    plan(&w)
    table = workspace(room, PARAMETERS * job.C)
    if table == NULL:
        return -1
    w.params = table
    prepare(<row>w.params, job.C, job.mean, job.mean_low, job.var, job.eps, job.weight, job.bias)
    if representable(<row>w.params, job.C, job.weight):
        run(&w, NORMALIZE, x)
    else:
        normalize_wide(job)
    release(table, room)
    return 0


cdef int backward_of(Job *job, row x) noexcept nogil:
    cdef double room[ROOM]
    cdef double *table
    cdef Work w
    w.job = job
    plan(&w)
    table = workspace(room, (PARAMETERS + 3 * w.chunks + 2) * job.C)
    if table == NULL:
        return -1
    w.params = table
    w.part = table + PARAMETERS * job.C
    prepare(<row>w.params, job.C, job.mean, job.mean_low, job.var, job.eps, job.weight, job.bias)
    if representable(<row>w.params, job.C, job.weight):
        run(&w, GRADIENTS, x)
        merge_gradients(&w, <row>w.params, job.var, job.eps, job.dweight, job.dbias, w.part + 3 * w.chunks * job.C)
        if job.training:
            run(&w, BACKWARD, x)
        else:
            run(&w, SCALE, x)
    else:
        backward_wide(job)
    release(table, room)
    return 0


cdef int moments(Job *job) noexcept nogil:
    if job.is_float64:
        return moments_of(job, <f64>job.x)
    return moments_of(job, <f32>job.x)


cdef int normalize(Job *job) noexcept nogil:
    if job.is_float64:
        return normalize_of(job, <f64>job.x)
    return normalize_of(job, <f32>job.x)


cdef int backward(Job *job) noexcept nogil:
    if job.is_float64:
        return backward_of(job, <f64>job.x)
    return backward_of(job, <f32>job.x)


cdef Table TABLE
TABLE.moments = moments
TABLE.normalize = normalize
TABLE.backward = backward

table = PyCapsule_New(&TABLE, "fastbn.kernels.Table", NULL)
