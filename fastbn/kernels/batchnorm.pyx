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
    stream_rows,
    tree,
)
from fastbn.kernels.merge cimport merge_gradients, merge_moments, prepare, repeat_first
from fastbn.kernels.plan cimport (
    AHEAD,
    LINE_BYTES,
    NEAR,
    PITCH,
    ROOM,
    SPREAD,
    STEP,
    WIDE,
    Work,
    count,
    features,
    plan,
    plane_of,
)
from fastbn.kernels.stores cimport stream_fence
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
    SPREAD_PITCH = SPREAD + STEP   # room for the first lanes again (`repeat_first`), and off the multiples of 4 KB, as PITCH
    STREAM_AHEAD = 2048            # bytes from what is read to what is asked for, where the output is streamed: measured, on 0 to 16 KB


cdef inline void *aligned(void *room) noexcept nogil:
    """The first cache line within room."""
    return <void *>((<uintptr_t>room + LINE_BYTES - 1) // LINE_BYTES * LINE_BYTES)


include "sums.pxi"
include "output.pxi"

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
