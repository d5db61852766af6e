# cython: cdivision=True
"""How the work is cut: by shape alone, so that the bits do not depend on the number of threads.

Design: everything is *strips*, rows of lanes, a lane being a column of a strip that belongs to one feature.

- rows (S small): one row of x is C*S lanes; short rows are folded, several of them seen as one, so that C = 3 runs as wide as C = 1000.
  Wide rows are cut into blocks of at most LANES lanes.
- planes (S long): a contiguous run of one feature is cut into strips of RUN_LANES lanes, or of an eighth of what is left.

A task is one chunk of the units (rows of lanes, or pieces of planes) of one block of the lanes (or one feature).
"""
from fastbn.kernels.table cimport Job

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


cdef inline void plan(Work *w) noexcept nogil:
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


cdef inline Py_ssize_t features(Work *w, Py_ssize_t b) noexcept nogil:
    """How many features block b holds; the first is number b * features(w, 0)."""
    if w.planes:
        return 1
    if w.blocks == 1:
        return w.job.C
    return min(w.block // w.job.S, w.job.C - b * (w.block // w.job.S))


cdef inline Py_ssize_t count(Work *w, Py_ssize_t k) noexcept nogil:
    """Elements of one feature in chunk k."""
    cdef Py_ssize_t first = k * w.chunk
    cdef Py_ssize_t end = min(first + w.chunk, w.units)
    cdef Py_ssize_t last
    if w.planes:
        # The last piece of a plane is shorter: as many of them as planes end within the chunk.
        last = end // w.pieces - first // w.pieces
        return (end - first - last) * w.piece + last * (w.job.S - (w.pieces - 1) * w.piece)
    return (min(end * w.fold, w.job.M) - first * w.fold) * w.job.S
