# cython: cdivision=True
"""How the work is cut.

Design: everything is *strips*, rows of lanes, a lane being a column of a strip that belongs to one feature.

- rows (S small): one row of x is C*S lanes; short rows are folded, several of them seen as one, so that C = 3 runs as wide as C = 1000.
  Wide rows are cut into blocks of at most LANES lanes.
- planes (S long): a contiguous run of one feature is cut into rows of a cache line or two.

Sums run down the lanes of a chunk of the units (rows of lanes, or pieces of planes) and are merged in the order of the chunks: the cut into
chunks is made by shape alone, and so the bits do not depend on the number of threads. The cut across the lanes, into blocks, changes no sum.
"""
from fastbn.kernels.stores cimport FASTBN_STREAMS
from fastbn.kernels.table cimport Job

cdef enum:
    LINE_BYTES = 64      # of a cache line
    STEP = 16            # lanes worked on at once, a line of floats or two of doubles: a loop of eight is unrolled before it is vectorised
    LANES = 1024         # most lanes of a block: their sums stay in cache while a chunk's rows go by
    NARROW = 64          # rows shorter than this are folded
    PITCH = LANES + 24   # between rows of LANES values: at a multiple of 4 KB a load would wait for a store to another row
    FOLD = 128           # into rows of up to so many lanes
    PLANE = 64           # S from here on is a plane
    PIECE = 16384        # a longer plane is cut into pieces of this many elements
    SPREAD = 512         # most lanes of a block that shares features: parameters are copied out for each
    ROOM = 4096          # float64 values that a call has on its stack
    TASKS = 64           # threads that a large shape can keep busy
    CHUNK = 16384        # fewest elements that are worth a task
    ROWS = 256           # fewest rows of lanes: what is done once for each lane of a task must not weigh
    LONG = 2048          # bytes of a plane from which it pays to jump from one to the feature's next
    WIDE = 65536         # most bytes of a row whose parameters stay in the second-level cache
    SLAB = 262144        # bytes that stay in the second-level cache
    NEAR = 4096          # bytes from one short plane to the one that is fetched
    AHEAD = 16384        # bytes from what is read to what is fetched: measured, on 4 to 64 KB

ctypedef struct Work:
    Job *job
    void *params          # (PARAMETERS, pitch) in x's dtype, rows on cache lines: C features and, of rows, the first STEP again
    double *part          # (chunks, 3, C): pivot and the two sums of each chunk
    bint planes
    bint fused            # all passes over one block before the next: what fits in a cache is then read from memory once
    bint streamed         # the output goes past the caches
    bint wide             # found a scale that float32 cannot hold
    int threads
    Py_ssize_t pitch
    Py_ssize_t width      # lanes of one row of x: C*S
    Py_ssize_t fold       # rows of x in one row of lanes
    Py_ssize_t block      # lanes of a block
    Py_ssize_t blocks     # blocks side by side (rows), or features (planes)
    Py_ssize_t units      # rows of lanes (rows), or pieces of one feature (planes)
    Py_ssize_t chunk      # units of a task
    Py_ssize_t chunks
    Py_ssize_t pieces     # pieces of a plane
    Py_ssize_t piece      # elements of a piece


cdef inline Py_ssize_t ceil_div(Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    return (a + b - 1) // b


cdef inline Py_ssize_t folded(Py_ssize_t width, Py_ssize_t M) noexcept nogil:
    """How many rows of x make one of lanes: whole cache lines of floats where they can."""
    cdef Py_ssize_t most = FOLD // width
    cdef Py_ssize_t fold = most
    while fold * width % STEP and fold > 1:
        fold -= 1
    return min(most if fold * width % STEP else fold, M)


cdef inline void cut_blocks(Work *w, Py_ssize_t wanted) noexcept nogil:
    """Blocks of equal width, at least `wanted` of them where that leaves a few cache lines to each."""
    cdef Py_ssize_t S = w.job.S
    cdef Py_ssize_t most = LANES if S == 1 else SPREAD // S
    cdef Py_ssize_t n = ceil_div(w.job.C, max(ceil_div(w.job.C, most), min(wanted, ceil_div(w.width, NARROW))))
    if S == 1:
        n = ceil_div(n, STEP) * STEP
    w.block = min(n, w.job.C) * S
    w.blocks = ceil_div(w.width, w.block)


cdef inline void plan(Work *w, Py_ssize_t inputs) noexcept nogil:
    """Cut the work; `inputs` arrays of x's size are summed, before they are read again for an output. The number of threads must not be
    looked at before the last lines.
    """
    cdef Job *job = w.job
    cdef Py_ssize_t wanted, worth
    cdef Py_ssize_t size = 8 if job.is_float64 else 4
    w.planes = job.S >= PLANE
    w.width = job.C * job.S
    w.fold = 1
    w.pieces = 1
    w.piece = job.S
    w.wide = False
    if w.planes:
        if job.S > PIECE:
            w.piece = PIECE
            w.pieces = ceil_div(job.S, PIECE)
        w.block = 0
        w.blocks = job.C
        w.units = job.M * w.pieces
        worth = ceil_div(job.M * job.S, CHUNK)
    else:
        if w.width < NARROW:
            w.fold = folded(w.width, job.M)
            w.block = w.fold * w.width
            w.blocks = 1
        else:
            cut_blocks(w, 1)
        w.units = ceil_div(job.M, w.fold)
        worth = min(ceil_div(w.units * w.block, CHUNK), ceil_div(w.units, ROWS))
    wanted = min(ceil_div(TASKS, w.blocks), worth)
    w.chunk = ceil_div(w.units, wanted)
    if not w.planes:
        w.chunk = ceil_div(w.chunk, 8) * 8
    w.chunks = ceil_div(w.units, w.chunk)
    # From here on nothing changes a bit of the result.
    if not w.planes and w.fold == 1 and job.num_threads > 1 and w.chunks * w.blocks < 2 * job.num_threads:
        cut_blocks(w, ceil_div(2 * job.num_threads, w.chunks))
    w.threads = <int>min(<Py_ssize_t>job.num_threads, w.chunks * w.blocks)
    w.fused = (job.y != job.x and job.y != job.dy and (w.threads < 2 or w.blocks >= 2 * w.threads)
               and inputs > 0 and (job.S * size >= LONG if w.planes else job.M * w.block * size * inputs <= SLAB))
    # Where x is read twice, a y written into the cache pushes x out; one thread alone has too few lines in flight to be faster in that cache
    # than in memory, several have not. A sixth and a quarter are measured.
    w.streamed = (FASTBN_STREAMS and job.y != NULL and job.y != job.x and job.y != job.dy
                  and job.M * w.width * size > job.cache // (4 if inputs == 0 and w.threads > 1 else 6))
    # Room for the first features again, and not a multiple of 4 KB, as PITCH.
    w.pitch = (ceil_div(job.C, STEP) + 1) * STEP
    w.pitch += STEP if w.pitch % 512 == 0 else 0


cdef inline Py_ssize_t features(Work *w, Py_ssize_t b) noexcept nogil:
    """How many features block b holds; the first is number b * features(w, 0)."""
    if w.planes:
        return 1
    if w.blocks == 1:
        return w.job.C
    return min(w.block // w.job.S, w.job.C - b * (w.block // w.job.S))


cdef inline Py_ssize_t plane_of(Work *w, Py_ssize_t u, Py_ssize_t *at, Py_ssize_t *n) noexcept nogil:
    """The plane that piece number u belongs to. at: where in the plane the piece begins; n: its elements."""
    at[0] = 0
    n[0] = w.job.S
    if w.pieces == 1:  # divisions weigh where planes are short
        return u
    at[0] = u % w.pieces * w.piece
    n[0] = min(w.piece, w.job.S - at[0])
    return u // w.pieces


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
