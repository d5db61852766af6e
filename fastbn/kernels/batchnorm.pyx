# cython: boundscheck=False, wraparound=False, cdivision=True, infer_types=True
"""The loops over x, compiled once for each instruction set.

Design: everything is *strips*, rows of lanes. A lane is a column of a strip and belongs to one feature, so that
the compiler vectorises across lanes and no sum ever crosses a vector register: one arithmetic for all builds.

- rows (S small): one row of x is C*S lanes; short rows are folded, k of them seen as one, so that C = 3 runs as wide as C = 1000.
  Wide rows are cut into blocks of at most LANES lanes.
- planes (S long): a contiguous run of one feature is cut into strips of RUN_LANES lanes, or of an eighth of what is left.

Work is cut into tasks by shape alone; a task owns its lanes' partial sums, and they are merged in the order of the tasks,
so the bits do not depend on the number of threads. One traversal (`visit`) serves the operations below.

Passes over memory (reads + writes): moments 1 + 0, normalize 1 + 1, backward 2*2 + 1.
"""
from cython.parallel cimport prange
from cpython.pycapsule cimport PyCapsule_New
from libc.math cimport sqrt
from libc.stdlib cimport free, malloc
from libc.string cimport memset

from fastbn.kernels.lanes cimport (
    BIAS,
    INVSTD,
    LOW,
    MEAN_DY,
    PARAMETERS,
    SLOPE,
    WEIGHT,
    act,
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
    unact,
)
from fastbn.kernels.table cimport IDENTITY, LEAKY_RELU, RELU, Activation, Job, Table

cdef enum:
    LANES = 512          # lanes of a strip: four rows of x, the sums and the parameters of a strip stay in L1
    NARROW = 64          # rows shorter than this are folded
    PITCH = LANES + 24   # between rows of LANES values: at a multiple of 4 KB a load would wait for a store to another row
    FOLD = 128           # into rows of up to so many lanes
    RUN_LANES = 128      # lanes of a strip within a plane: eight rows are 1024 elements
    PLANE = 64           # S from here on is a plane
    PIECE = 16384        # a longer plane is cut into pieces of this many elements (a multiple of 8*RUN_LANES)
    ROOM = 2048          # float64 values that a call has on its stack
    TASKS = 64           # threads that a large shape can keep busy
    CHUNK = 16384        # fewest elements that are worth a task
    ROWS = 128           # fewest rows of lanes: what is done once for each lane of a task must not weigh

cdef enum Operation:
    MOMENTS     # sums of d and d*d, d = x - pivot
    NORMALIZE
    GRADIENTS   # sums of dy and dy*x_hat
    BACKWARD    # dx, where the statistics depend on x
    SCALE       # dx, where they are constants

ctypedef struct Work:
    Job *job
    void *params          # (PARAMETERS, C) in x's dtype
    double *part          # (chunks, 3, C): pivot and the two sums of each chunk
    bint planes
    Py_ssize_t width      # lanes of one row of x: C*S
    Py_ssize_t fold       # rows of x in one row of lanes
    Py_ssize_t block      # lanes of a strip
    Py_ssize_t blocks     # strips side by side (rows), or features (planes)
    Py_ssize_t units      # rows of lanes (rows), or pieces of one feature (planes)
    Py_ssize_t chunk      # units of a task
    Py_ssize_t chunks
    Py_ssize_t pieces     # pieces of a plane
    Py_ssize_t piece      # elements of a piece


cdef inline Py_ssize_t ceil_div(Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    return (a + b - 1) // b


cdef void plan(Work *w) noexcept nogil:
    """Cut the work by shape alone: the thread count must not be looked at here."""
    cdef Job *job = w.job
    cdef Py_ssize_t wanted, worth
    w.planes = job.S >= PLANE
    w.width = job.C * job.S
    w.fold = 1
    w.pieces = 1
    w.piece = job.S
    if w.planes:
        if job.S > PIECE:
            w.piece = PIECE
            w.pieces = ceil_div(job.S, PIECE)
        w.block = RUN_LANES
        w.blocks = job.C
        w.units = job.M * w.pieces
        worth = ceil_div(job.M * job.S, CHUNK)
    else:
        if w.width < NARROW:
            w.fold = min(FOLD // w.width, job.M)
        w.block = w.fold * w.width if w.width <= LANES else LANES // job.S * job.S
        w.blocks = ceil_div(w.width, w.block) if w.fold == 1 else 1
        w.units = ceil_div(job.M, w.fold)
        worth = min(ceil_div(w.units * w.block, CHUNK), ceil_div(w.units, ROWS))
    wanted = min(ceil_div(TASKS, w.blocks), worth)
    w.chunk = ceil_div(w.units, wanted)
    if not w.planes:
        w.chunk = ceil_div(w.chunk, 8) * 8
    w.chunks = ceil_div(w.units, w.chunk)


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


cdef inline Py_ssize_t features(Work *w, Py_ssize_t b) noexcept nogil:
    """How many features block b holds; the first is number b * features(w, 0)."""
    if w.planes:
        return 1
    if w.blocks == 1:
        return w.job.C
    return min(w.block // w.job.S, w.job.C - b * (w.block // w.job.S))


cdef Py_ssize_t count(Work *w, Py_ssize_t k) noexcept nogil:
    """Elements of one feature in chunk k."""
    cdef Py_ssize_t first = k * w.chunk
    cdef Py_ssize_t end = min(first + w.chunk, w.units)
    cdef Py_ssize_t last
    if w.planes:
        # The last piece of a plane is shorter: as many of them as planes end within the chunk.
        last = end // w.pieces - first // w.pieces
        return (end - first - last) * w.piece + last * (w.job.S - (w.pieces - 1) * w.piece)
    return (min(end * w.fold, w.job.M) - first * w.fold) * w.job.S


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


# --- O(C): from sums to statistics, from statistics to the parameters of the loops ------------------------------------------

cdef void merge_moments(Work *w, f64 mean, f64 low, f64 var, f64 lost, f64 shift) noexcept nogil:
    """The chunks' sums, each about a pivot of its own, into mean and variance (Chan, Golub & LeVeque 1979).

    mean, low, var: (C,) [out].  lost, shift: (C,) scratch.
    """
    cdef Py_ssize_t C = w.job.C
    cdef Py_ssize_t c
    cdef Py_ssize_t k
    cdef double m = <double>w.job.M * w.job.S
    cdef double n
    cdef double d
    cdef double s
    cdef f64 first = w.part
    cdef f64 part
    if w.chunks == 1:
        # What the steps below come to, bit for bit, in a quarter of their time.
        for c in range(C):
            shift[c] = first[C + c] / m
            mean[c] = first[c]
            low[c] = 0
            add(mean, low, c, shift[c], True)
            s = (first[2 * C + c] - first[C + c] * shift[c]) / m
            var[c] = 0 if s < 0 else s
        return
    # The mean, relative to the first chunk's pivot.
    for c in range(C):
        mean[c] = 0
        lost[c] = 0
    for k in range(w.chunks):
        part = w.part + 3 * k * C
        n = count(w, k)
        for c in range(C):
            add(mean, lost, c, part[C + c], True)
            add(mean, lost, c, n * (part[c] - first[c]), True)
    for c in range(C):
        shift[c] = (mean[c] + lost[c]) / m
        mean[c] = first[c]
        low[c] = 0
        add(mean, low, c, shift[c], True)
        var[c] = 0
        lost[c] = 0
    # Squares about each chunk's own mean, and those of the chunks' means about the whole one.
    for k in range(w.chunks):
        part = w.part + 3 * k * C
        n = count(w, k)
        for c in range(C):
            s = part[C + c] / n
            d = (part[c] - first[c]) + s - shift[c]
            add(var, lost, c, part[2 * C + c] - part[C + c] * s, True)
            add(var, lost, c, n * d * d, True)
    for c in range(C):
        s = (var[c] + lost[c]) / m
        var[c] = 0 if s < 0 else s


cdef inline double split_high(double a) noexcept nogil:
    """The upper half of a's digits (Veltkamp): products of halves are exact, on every processor and without fused multiply-add."""
    cdef double t = a * 134217729.0
    return t - (t - a)


cdef inline double square_root_error(double v, double r) noexcept nogil:
    """1 - v*r*r to full relative precision, by Dekker's products."""
    cdef double r_high = split_high(r)
    cdef double r_low = r - r_high
    cdef double p = r * r
    cdef double p_error = ((r_high * r_high - p) + 2 * r_high * r_low) + r_low * r_low
    cdef double p_high = split_high(p)
    cdef double p_low = p - p_high
    cdef double v_high = split_high(v)
    cdef double v_low = v - v_high
    cdef double q = v * p
    cdef double q_error = ((v_high * p_high - q) + (v_high * p_low + v_low * p_high)) + v_low * p_low
    return ((1 - q) - q_error) - v * p_error


cdef void prepare(row table, Py_ssize_t C, f64 mean, f64 low, f64 var, double eps, f64 weight, f64 bias) noexcept nogil:
    """The parameter table, in x's dtype: the mean in two parts, so that x - mean does not cancel."""
    cdef Py_ssize_t c
    cdef double invstd
    cdef double e
    for c in range(C):
        invstd = 1 / sqrt(var[c] + eps)
        if sizeof(table[0]) == 8:
            # One Newton step: two roundings become one.
            e = square_root_error(var[c] + eps, invstd)
            invstd += 0.5 * e * invstd if -1e-15 < e < 1e-15 else 0
        table[WEIGHT * C + c] = weight[c] * invstd
        # float64: the sums are of g*(x - mean), one rounding less; the squares of float32 x would overflow.
        table[INVSTD * C + c] = 1 if sizeof(table[0]) == 8 else invstd
    for c in range(C):
        table[c] = mean[c]
        table[LOW * C + c] = (mean[c] - table[c]) + low[c]
        table[BIAS * C + c] = bias[c]


cdef void merge_gradients(Work *w, row table, f64 var, double eps, f64 dweight, f64 dbias, f64 lost) noexcept nogil:
    """The chunks' sums into the gradients, and those into the last rows of the table.  lost: (2, C) scratch."""
    cdef Py_ssize_t C = w.job.C
    cdef Py_ssize_t c
    cdef Py_ssize_t k
    cdef double m = <double>w.job.M * w.job.S
    cdef f64 part
    for c in range(C):
        dbias[c] = 0
        dweight[c] = 0
    for c in range(2 * C):
        lost[c] = 0
    for k in range(w.chunks):
        part = w.part + 3 * k * C
        for c in range(C):
            add(dbias, lost, c, part[C + c], True)
            add(dweight, lost + C, c, part[2 * C + c], True)
    for c in range(C):
        dbias[c] += lost[c]
        dweight[c] += lost[C + c]
        table[MEAN_DY * C + c] = dbias[c] / m
        if sizeof(table[0]) == 8:
            table[SLOPE * C + c] = dweight[c] / (m * (var[c] + eps))
            dweight[c] /= sqrt(var[c] + eps)
        else:
            table[SLOPE * C + c] = dweight[c] / m * table[INVSTD * C + c]


cdef bint representable(row table, Py_ssize_t C, f64 weight) noexcept nogil:
    """Whether x's dtype holds every invstd and every weight*invstd with full precision; float32 may not, for data of 1e30 or of 1e-30.

    Weights below 1e-30 are let pass: all that they scale is next to nothing, and decay brings many there.
    """
    cdef Py_ssize_t c
    cdef Py_ssize_t beyond = 0
    for c in range(C):
        w = table[WEIGHT * C + c]
        beyond += (((w < <float>1.2e-38) & (w > -<float>1.2e-38) & ((weight[c] > 1e-30) | (weight[c] < -1e-30)))
                   | (w > <float>3.4e38) | (w < -<float>3.4e38) | (table[INVSTD * C + c] > <float>3.4e38))
    return beyond == 0 or sizeof(table[0]) == 8


cdef void normalize_wide(Job *job) noexcept nogil:
    """normalize for float32 with the arithmetic of float64; for the rare data above, so neither threads nor vectors."""
    cdef float *x = <float *>job.x
    cdef float *y = <float *>job.y
    cdef Py_ssize_t i
    cdef Py_ssize_t c
    cdef double z
    for i in range(job.M * job.C * job.S):
        c = i // job.S % job.C
        z = (<double>x[i] - job.mean[c] - job.mean_low[c]) * (job.weight[c] / sqrt(job.var[c] + job.eps)) + job.bias[c]
        y[i] = act(<float>z, job.activation)


cdef void backward_wide(Job *job) noexcept nogil:
    """backward for float32 with the arithmetic of float64."""
    cdef float *x = <float *>job.x
    cdef float *dy = <float *>job.dy
    cdef float *dx = <float *>job.y
    cdef double per = job.training / (<double>job.M * job.S)
    cdef Py_ssize_t i
    cdef Py_ssize_t c
    cdef int second
    cdef double invstd
    cdef double x_hat
    cdef float g
    for c in range(job.C):
        job.dweight[c] = 0
        job.dbias[c] = 0
    for second in range(2):
        for i in range(job.M * job.C * job.S):
            c = i // job.S % job.C
            invstd = 1 / sqrt(job.var[c] + job.eps)
            x_hat = (<double>x[i] - job.mean[c] - job.mean_low[c]) * invstd
            g = unact(dy[i], <float>(x_hat * job.weight[c] + job.bias[c]), job.activation)
            if second:
                dx[i] = ((g - job.dbias[c] * per) - x_hat * (job.dweight[c] * per)) * (job.weight[c] * invstd)
            else:
                job.dbias[c] += g
                job.dweight[c] += g * x_hat


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
