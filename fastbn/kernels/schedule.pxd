# cython: cdivision=True
"""In what order, by how many threads and into which kind of memory the work is done: never a bit of the result.

Design: a call is some *steps*, one after the other. Sums go task by task, a task being a chunk of a *block* of features. Outputs go *part* by part, a
part being a run of whole cache lines of y or dx in the order of memory, whatever the view. One traversal is chosen here, for all steps.
"""
from libc.stdint cimport uintptr_t

from fastbn.kernels.cut cimport COLUMN_LANES, Cut
from fastbn.kernels.intrinsics cimport FASTBN_STREAMS
from fastbn.kernels.job cimport Job
from fastbn.kernels.types cimport LINE_BYTES, STEP, ceil_div

cdef enum Traversal:
    PASS_BY_PASS          # each pass over all of x before the next one
    FEATURE_BY_FEATURE    # all passes over one feature's planes before the next feature: what fits in a cache is read from memory once

cdef enum:
    BLOCK_LANES = COLUMN_LANES    # most lanes whose sums stay in the first-level cache while a chunk goes by
    BLOCK_BYTES = 65536           # of planes that lie side by side and are summed together: shorter pieces of memory are not fetched ahead
    PARTS = 64                    # of the output, for one thread; the last one is written first, since it is what the sums left in cache
    PART_ELEMENTS = 16384         # fewest that are worth a part

ctypedef struct Schedule:
    int threads
    Traversal traversal
    Py_ssize_t block          # features of a block
    Py_ssize_t blocks
    Py_ssize_t part           # elements of a part, whole cache lines; the first one has besides what lies before the first line
    Py_ssize_t parts
    Py_ssize_t before         # elements of the output before its first whole cache line
    bint runs                 # outputs: one parameter for a run of S elements, instead of one for each lane
    Py_ssize_t apart          # elements between rows that are written together, a multiple of rows and of lines; 0: one row at a time
    bint streamed             # past the caches
    bint batched              # runs, several at a time, by way of the first-level cache
    Py_ssize_t read_ahead     # bytes; 0: nothing is asked for
    Py_ssize_t write_ahead


cdef inline Py_ssize_t whole_rows_and_lines(Py_ssize_t lanes) noexcept nogil:
    """The fewest elements that are a multiple of the lanes of a row, and of STEP."""
    cdef Py_ssize_t n = lanes
    while n % STEP:
        n *= 2
    return n


cdef inline void schedule(Schedule *plan, const Cut *cut, const Job *job, int arrays, Py_ssize_t size) noexcept nogil:
    """arrays: how many of x's size are summed before the output (0 in inference, 2 in backward); size: bytes of an element."""
    cdef Py_ssize_t elements = cut.M * cut.width
    cdef Py_ssize_t lanes = cut.width * cut.fold
    cdef Py_ssize_t nbytes = elements * size
    cdef bint inplace = job.y == job.x or job.y == job.dy
    cdef Py_ssize_t beside
    plan.threads = job.num_threads
    plan.traversal = PASS_BY_PASS
    plan.runs = cut.planes
    plan.write_ahead = plan.apart = plan.read_ahead = plan.before = 0
    plan.streamed = plan.batched = False
    plan.part = elements
    plan.parts = 1
    if cut.planes:
        plan.block = max(<Py_ssize_t>1, min(<Py_ssize_t>(BLOCK_LANES // STEP), BLOCK_BYTES // (cut.S * size)))
    elif cut.fold > 1:
        plan.block = cut.C
    else:
        plan.block = max(<Py_ssize_t>1, BLOCK_LANES // cut.S)
    if plan.threads > 1 and cut.fold == 1 and cut.chunks * ceil_div(cut.C, plan.block) < 2 * plan.threads:
        # Two tasks for each thread, where that leaves a few cache lines of x to each.
        beside = min(ceil_div(2 * plan.threads, cut.chunks), ceil_div(cut.width, 64))
        plan.block = min(plan.block, ceil_div(cut.C, max(<Py_ssize_t>1, beside)))
        if cut.S == 1:
            plan.block = ceil_div(plan.block, STEP) * STEP
    plan.block = min(plan.block, cut.C)
    if arrays and nbytes * arrays >= job.settings.read_ahead_from_bytes:
        plan.read_ahead = job.settings.read_ahead_in_planes_bytes if cut.planes else job.settings.read_ahead_bytes
    if job.y == NULL:
        plan.blocks = ceil_div(cut.C, plan.block)
        return
    if (cut.planes and arrays and not inplace and cut.S * size >= job.settings.feature_by_feature_from_bytes
            and (plan.threads == 1 or cut.C >= 2 * plan.threads)):
        plan.traversal = FEATURE_BY_FEATURE
        plan.block = 1
    plan.blocks = ceil_div(cut.C, plan.block)
    # The last test is for 32-bit systems, where float64 may lie on 4 bytes.
    plan.streamed = (FASTBN_STREAMS and not inplace and <uintptr_t>job.y % size == 0
                     and nbytes >= (job.settings.stream_from_bytes if arrays else job.settings.stream_inference_from_bytes))
    # y alone: short runs of dx, which have twice the parameters to change from one to the next, are slower than a table of all lanes.
    plan.runs = plan.runs or (plan.streamed and cut.S >= 2 * STEP and job.dy == NULL)
    plan.batched = plan.streamed and plan.runs and cut.S < job.settings.batched_runs_below_elements
    if not plan.streamed and job.settings.write_ahead_from_bytes <= nbytes <= job.settings.write_ahead_to_bytes:
        plan.write_ahead = job.settings.write_ahead_bytes
    plan.before = min(elements, <Py_ssize_t>(-<uintptr_t>job.y % LINE_BYTES) // size)
    if (not plan.runs and not plan.streamed and job.settings.rows_at_once > 1
            and nbytes * (3 if job.dy != NULL else 2) <= job.settings.rows_at_once_to_bytes):
        plan.apart = whole_rows_and_lines(lanes)
        # Four rows of three arrays at a multiple of 4 KB would share the eight ways of a set in the first-level cache.
        if job.dy != NULL and plan.apart * size % 4096 == 0:
            plan.apart = 0
    if elements >= 2 * PART_ELEMENTS and (plan.threads > 1 or arrays):
        plan.parts = min(<Py_ssize_t>(PARTS if plan.threads == 1 else plan.threads * ceil_div(PARTS, plan.threads)), elements // PART_ELEMENTS)
        plan.part = ceil_div(ceil_div(elements - plan.before, plan.parts), STEP) * STEP
        plan.parts = max(<Py_ssize_t>1, ceil_div(elements - plan.before, plan.part))
