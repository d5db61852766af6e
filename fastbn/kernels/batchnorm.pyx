# cython: boundscheck=False, wraparound=False, cdivision=True, infer_types=True
"""The kernels: their steps and their threads; compiled, with the loops over x, once for each instruction set.

Design: cut.pxd says how sums are cut, by shape alone; schedule.pxd in what order the work is done. A call is a few steps, one after the other within
one parallel region, each a loop over tasks (chunks of blocks of features), blocks, or parts of the output. A task owns its partial sums, and those of
a feature are merged in the order of the chunks, so the bits do not depend on the number of threads.
"""
from cython.parallel cimport parallel, prange, threadid
from cpython.pycapsule cimport PyCapsule_New
from libc.math cimport sqrt
from libc.stdint cimport uintptr_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset

from fastbn.kernels.activation cimport act, unact
from fastbn.kernels.cut cimport Cut, count, cut, plane_of
from fastbn.kernels.intrinsics cimport (
    WIDTH,
    StepRoom,
    add_square,
    prefetch,
    square,
    stream_fence,
    stream_line,
    vec,
    vec_add,
    vec_load,
    vec_store,
    widen,
)
from fastbn.kernels.job cimport IDENTITY, LEAKY_RELU, RELU, Activation, Job, Table
from fastbn.kernels.params cimport (
    HIGH,
    INVSTD,
    MEAN_DY,
    PARAMETERS,
    SHIFT,
    SLOPE,
    WEIGHT,
    all_backward_fit,
    all_forward_fit,
    backward_fits,
    fill_gradients,
    fill_table,
    finish_gradients,
    forward_fits,
    repeat_first,
    split_high,
    spread,
)
from fastbn.kernels.rounding cimport Control, as_before, ieee
from fastbn.kernels.schedule cimport FEATURE_BY_FEATURE, Schedule, schedule
from fastbn.kernels.types cimport LINE_BYTES, STEP, add, aligned, ceil_div, f32, f64, real, row, digits_to_spare, table

cdef enum:
    MERGED_FEATURES = 128                 # features whose sums are merged at once, on the stack
    ROOM_DOUBLES = 2048                  # float64 values that a call has on its stack: threads may have 64 KB of it
    STREAM_AHEAD_BYTES = 2048    # from what is read to what is asked for, where the output is streamed: measured, on 0 to 16 KB
    ROOM_BEFORE_SUMS = 136       # float64 values: of a line, and of 1 KB
    WAITING_BYTES = 1024         # stores on their way to memory, for which a load may have to wait
    BATCH_STEPS = 16             # of STEP elements, which stay in the first-level cache beside x and dy
    LONG_RUN_ELEMENTS = 512               # elements of one feature from which an output is started on a line
    SCRATCH_ROWS = 6             # of sums_pitch: two sums for each lane and what they lost, pivots for each lane and each feature

ctypedef struct Work:
    Job *job
    Cut cut
    Schedule plan
    void *params             # (PARAMETERS, pitch) in the arithmetic's type: a column for each feature
    void *lanes              # (PARAMETERS, lane_pitch): a column for each lane of a row; params itself where each lane is a feature
    double *std              # (C,): sqrt(var + eps), which PREPARE leaves for the gradients
    double *partial          # (chunks, 3, C): of each chunk the pivot (of the statistics) and the two sums
    double *scratch          # (threads, SCRATCH_ROWS, sums_pitch)
    unsigned char *beyond    # (blocks,): whether float32 cannot hold the parameters of one of its features
    bint lane_table          # whether lanes is a table of its own
    Py_ssize_t pitch
    Py_ssize_t lane_pitch
    Py_ssize_t sums_pitch

include "sums.pxi"
include "moments.pxi"
include "gradients.pxi"
include "output.pxi"
include "fallback.pxi"

# --- parameters, of block b ---------------------------------------------------------------------------------------------------

cdef inline void spread_rows(Work *w, Py_ssize_t at, Py_ssize_t n, table params, int first, int end) noexcept nogil:
    """The rows `first` to `end` of the table, of n features from number `at` on, as the loops over lanes read them."""
    cdef Py_ssize_t S = w.cut.S
    cdef table lanes = <table>w.lanes
    cdef int r
    if w.plan.runs and not w.lane_table:
        return
    for r in range(first, end):
        if w.lane_table:
            spread(params + r * w.pitch + at, n, S, w.cut.fold, lanes + r * w.lane_pitch + at * S)
        if at == 0:
            repeat_first(lanes + r * w.lane_pitch, w.cut.fold * w.cut.width)


cdef void prepare(Work *w, Py_ssize_t b, table params) noexcept nogil:
    cdef Job *job = w.job
    cdef Py_ssize_t at = b * w.plan.block
    cdef Py_ssize_t n = features(w, b)
    fill_table(job.mean + at, job.mean_low + at, job.var + at, job.weight + at, job.bias + at, job.eps, n, params + at, w.pitch, w.std + at)
    w.beyond[b] = table is f32 and not all_forward_fit(params + at, w.pitch, n, job.weight + at)
    spread_rows(w, at, n, params, HIGH, SHIFT + 1 if job.dy == NULL else MEAN_DY)


cdef void prepare_gradients(Work *w, Py_ssize_t b, table params) noexcept nogil:
    cdef Job *job = w.job
    cdef Py_ssize_t at = b * w.plan.block
    cdef Py_ssize_t n = features(w, b)
    fill_gradients(job.mean + at, job.mean_low + at, w.std + at, job.dweight + at, job.dbias + at, job.count, n, params + at, w.pitch)
    w.beyond[b] |= table is f32 and job.training and not all_backward_fit(params + at, w.pitch, n, job.dweight + at)
    spread_rows(w, at, n, params, MEAN_DY, PARAMETERS)

# --- steps: what a kernel is made of --------------------------------------------------------------------------------------------

cdef enum Step:
    SUM_MOMENTS          # of each task
    MERGE_MOMENTS        # of each block
    PREPARE              # of each block
    SUM_GRADIENTS        # of each task
    MERGE_GRADIENTS      # of each block
    PREPARE_GRADIENTS    # of each block
    WRITE                # each part of y or dx


cdef inline bint any_beyond(const Work *w) noexcept nogil:
    cdef Py_ssize_t b
    for b in range(w.plan.blocks):
        if w.beyond[b]:
            return True
    return False


cdef void write_number(Work *w, Py_ssize_t i, row x, table params) noexcept nogil:
    """Part number i of the output, counted from the end: its part of x is what the sums left in cache."""
    cdef Py_ssize_t part = w.plan.parts - 1 - i
    cdef Py_ssize_t first = w.plan.before + part * w.plan.part if part else 0
    cdef Py_ssize_t end = min(w.plan.before + (part + 1) * w.plan.part, w.cut.M * w.cut.width)
    if not any_beyond(w):
        write_range(w, first, end - first, x, params)
        if w.plan.streamed:
            stream_fence()


cdef void write_feature(Work *w, Py_ssize_t c, row x, table params) noexcept nogil:
    """The output of one feature's planes, the last one first."""
    cdef Py_ssize_t m
    if not w.beyond[c]:
        for m in range(w.cut.M - 1, -1, -1):
            write_range(w, (m * w.cut.C + c) * w.cut.S, w.cut.S, x, params)
        if w.plan.streamed:
            stream_fence()


cdef inline Py_ssize_t numbers(const Work *w, Step step) noexcept nogil:
    """How many tasks, blocks or parts a step has."""
    if step == SUM_MOMENTS or step == SUM_GRADIENTS:
        return w.cut.chunks * w.plan.blocks
    return w.plan.parts if step == WRITE else w.plan.blocks


cdef void do(Work *w, Step step, Py_ssize_t i, int thread, row x, table params) noexcept nogil:
    """Number i of a step's tasks, blocks or parts."""
    cdef double *scratch = w.scratch + thread * SCRATCH_ROWS * w.sums_pitch
    if step == SUM_MOMENTS:
        add_up_moments(w, i // w.plan.blocks, i % w.plan.blocks, x, scratch)
    elif step == MERGE_MOMENTS:
        merge_moments(w, i * w.plan.block, features(w, i))
    elif step == PREPARE:
        prepare(w, i, params)
    elif step == SUM_GRADIENTS:
        add_up_gradients(w, i // w.plan.blocks, i % w.plan.blocks, x, params, scratch)
    elif step == MERGE_GRADIENTS:
        merge_gradients(w, i * w.plan.block, features(w, i), params)
    elif step == PREPARE_GRADIENTS:
        prepare_gradients(w, i, params)
    else:
        write_number(w, i, x, params)


cdef void do_feature(Work *w, const Step *steps, int n, Py_ssize_t c, int thread, row x, table params) noexcept nogil:
    """All steps of one feature's planes."""
    cdef Py_ssize_t k
    cdef int s = 0
    for s in range(n):
        if steps[s] == WRITE:
            write_feature(w, c, x, params)
        elif steps[s] == SUM_MOMENTS or steps[s] == SUM_GRADIENTS:
            for k in range(w.cut.chunks):
                do(w, steps[s], k * w.plan.blocks + c, thread, x, params)
        else:
            do(w, steps[s], c, thread, x, params)


cdef void run(Work *w, const Step *steps, int n, row x, table params) noexcept nogil:
    """The steps, one after the other. Only the number of threads is not given by the shape."""
    cdef Py_ssize_t i
    cdef int s = 0
    cdef Control word
    if w.plan.threads < 2:
        if w.plan.traversal == FEATURE_BY_FEATURE:
            for i in range(w.cut.C):
                do_feature(w, steps, n, i, 0, x, params)
        else:
            for s in range(n):
                for i in range(numbers(w, steps[s])):
                    do(w, steps[s], i, 0, x, params)
    elif w.plan.traversal == FEATURE_BY_FEATURE:
        with parallel(num_threads=w.plan.threads):
            word = ieee()
            for i in prange(w.cut.C, schedule="static"):
                do_feature(w, steps, n, i, threadid(), x, params)
            as_before(word)
    else:
        with parallel(num_threads=w.plan.threads):
            word = ieee()
            for s in range(n):
                for i in prange(numbers(w, steps[s]), schedule="static"):
                    do(w, steps[s], i, threadid(), x, params)
            as_before(word)

# --- the kernels ------------------------------------------------------------------------------------------------------------------

cdef inline Py_ssize_t table_pitch(Py_ssize_t n, Py_ssize_t size) noexcept nogil:
    """n elements or a few more: an odd number of lines, so that the rows of a table do not share sets of the first-level cache."""
    return (ceil_div(n * size, LINE_BYTES) | 1) * LINE_BYTES // size


cdef inline Py_ssize_t sums_pitch(Py_ssize_t n) noexcept nogil:
    """n float64 sums or some more: 1 KB or 3 KB behind a multiple of 4 KB, so that no load of a sum waits for the store of another one."""
    return ((n + 127) // 128 | 1) * 128


cdef inline double *before(void *room, const void *x) noexcept nogil:
    """The first line within room that lies 128 to 191 bytes before x, modulo 1024.

    The rows of sums are 1 KB from each other, modulo 4 KB. A load of x waits for a recent store to the same low 12 bits. Sums are stored upwards, as
    x is read, so the load comes to bits that were stored 833 bytes of sums ago or more, where rows of x are multiples of 4 KB.
    """
    cdef char *at = <char *>aligned(room)
    return <double *>(at + (<uintptr_t>x - 128 - <uintptr_t>at) % 1024 // LINE_BYTES * LINE_BYTES)


cdef Py_ssize_t lay_out_table(Work *w, Py_ssize_t size, bint lasting) noexcept nogil:
    """Sets the pitches of the parameter table, and gives its bytes. One that lasts has all rows: the next call may write y in another way."""
    cdef Py_ssize_t C = w.job.C
    cdef Py_ssize_t lanes = w.cut.width * w.cut.fold
    # Room for the first lanes again, and for a start where y is within its line, so that lines of y meet lines of parameters.
    w.lane_table = not w.cut.planes and lanes > C and (lasting or not w.plan.runs or w.job.dy != NULL)
    w.pitch = table_pitch(C + 2 * STEP, size)
    w.lane_pitch = table_pitch(lanes + 2 * STEP, size) if w.lane_table else w.pitch
    return LINE_BYTES + PARAMETERS * (w.pitch + w.lane_table * w.lane_pitch) * size


cdef void place_table(Work *w, void *memory, table params, Py_ssize_t size) noexcept nogil:
    w.params = <table>aligned(memory) + <uintptr_t>w.job.y % LINE_BYTES // size
    w.lanes = <table>w.params + w.lane_table * PARAMETERS * w.pitch


cdef int kernel(Job *job, const Step *steps, int n, int arrays, row x, table params) noexcept nogil:
    """arrays: how many of x's size are summed. params: of the table's type, no more."""
    cdef double room[ROOM_DOUBLES]
    cdef void *taken = room
    cdef Py_ssize_t size = sizeof(x[0])
    cdef Py_ssize_t nbytes
    cdef Py_ssize_t scratch
    cdef Py_ssize_t partial
    cdef Py_ssize_t doubles
    cdef Work w
    w.job = job
    cut(&w.cut, job.M, job.C, job.S)
    schedule(&w.plan, &w.cut, job, arrays, size)
    w.sums_pitch = sums_pitch(w.plan.block * (STEP if w.cut.planes else w.cut.S * w.cut.fold)) if arrays else 0
    partial = 3 * w.cut.chunks * job.C if arrays else 0
    scratch = w.plan.threads * SCRATCH_ROWS * w.sums_pitch
    doubles = ROOM_BEFORE_SUMS + scratch + partial + job.C
    nbytes = lay_out_table(&w, size, job.table != NULL)
    if job.table != NULL:
        place_table(&w, job.table, params, size)
        nbytes = 0
    if nbytes + doubles * <Py_ssize_t>sizeof(double) + w.plan.blocks > <Py_ssize_t>sizeof(room):
        # malloc weighs in a short call
        taken = malloc(nbytes + doubles * sizeof(double) + w.plan.blocks)
        if taken == NULL:
            return -1
    w.scratch = before(taken, job.x)
    w.partial = w.scratch + scratch
    w.std = w.partial + partial
    if job.table == NULL:
        place_table(&w, <double *>taken + doubles, params, size)
    w.beyond = <unsigned char *>(<double *>taken + doubles) + nbytes
    memset(w.beyond, 0, w.plan.blocks)
    run(&w, steps, n, x, <table>w.params)
    job.prepared = job.table != NULL and not any_beyond(&w)
    if table is f32:
        if any_beyond(&w):
            if arrays == 2:
                sum_beyond(&w, <table>w.params)
            if job.y != NULL:
                write_beyond(&w, <table>w.params)
    if taken != room:
        free(taken)
    return 0


cdef int kernel_of(Job *job, const Step *steps, int n, int arrays) noexcept nogil:
    cdef Control word = ieee()
    cdef int status
    if job.is_float64:
        status = kernel(job, steps, n, arrays, <f64>job.x, <f64>NULL)
    else:
        status = kernel(job, steps, n, arrays, <f32>job.x, <f32>NULL)
    as_before(word)
    return status


cdef int moments(Job *job) noexcept nogil:
    cdef Step[2] steps = [SUM_MOMENTS, MERGE_MOMENTS]
    return kernel_of(job, steps, 2, 1)


cdef int normalize(Job *job) noexcept nogil:
    cdef Step[2] steps = [PREPARE, WRITE]
    if job.prepared:
        return kernel_of(job, &steps[1], 1, 0)
    return kernel_of(job, steps, 2, 0)


cdef Py_ssize_t table_bytes(Job *job) noexcept nogil:
    cdef Work w
    cdef Py_ssize_t size = 8 if job.is_float64 else 4
    w.job = job
    cut(&w.cut, job.M, job.C, job.S)
    schedule(&w.plan, &w.cut, job, 0, size)
    return lay_out_table(&w, size, True)


cdef int forward(Job *job) noexcept nogil:
    cdef Step[4] steps = [SUM_MOMENTS, MERGE_MOMENTS, PREPARE, WRITE]
    return kernel_of(job, steps, 4, 1)


cdef int gradients(Job *job) noexcept nogil:
    cdef Step[3] steps = [PREPARE, SUM_GRADIENTS, MERGE_GRADIENTS]
    return kernel_of(job, steps, 3, 2)


cdef int input_gradient(Job *job) noexcept nogil:
    cdef Step[3] steps = [PREPARE, PREPARE_GRADIENTS, WRITE]
    return kernel_of(job, steps, 3, 0)


cdef int backward(Job *job) noexcept nogil:
    cdef Step[5] steps = [PREPARE, SUM_GRADIENTS, MERGE_GRADIENTS, PREPARE_GRADIENTS, WRITE]
    job.count = <double>job.M * job.S
    return kernel_of(job, steps, 5, 2)


# Passes over memory, where nothing stays in a cache: the reads, and a write for y or dx.
cdef Table TABLE
TABLE.moments.run, TABLE.moments.reads = moments, 1
TABLE.normalize.run, TABLE.normalize.reads = normalize, 1
TABLE.forward.run, TABLE.forward.reads = forward, 2
TABLE.gradients.run, TABLE.gradients.reads = gradients, 2
TABLE.input_gradient.run, TABLE.input_gradient.reads = input_gradient, 2
TABLE.backward.run, TABLE.backward.reads = backward, 4
TABLE.table_bytes = table_bytes

table_of_kernels = PyCapsule_New(&TABLE, "fastbn.kernels.Table", NULL)
