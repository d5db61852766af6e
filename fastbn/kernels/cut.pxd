# cython: cdivision=True
"""How sums are cut: by shape alone. It decides bits, and nothing else here does but the loops themselves.

CONTRIBUTING.md draws rows and planes, lanes, units and chunks. Short rows are *folded*: several of them, side by side, are one row of lanes, so that
C = 3 runs as wide as C = 1000. The compiler vectorises across lanes, and no sum crosses a vector register: one arithmetic for all instruction sets.

Sums run down the lanes of a chunk, and chunks are merged in their order. So bits depend neither on the number of threads nor on which lanes are
worked on together.
"""
from fastbn.kernels.types cimport STEP, ceil_div

cdef enum:
    PLANE_ELEMENTS = 64                  # S from here on is a plane
    NARROW_LANES = 64           # rows shorter than this are folded
    FOLDED_LANES = 128          # into rows of up to so many lanes
    PIECE_ELEMENTS = 16384      # a longer plane is cut into pieces of this many
    CHUNK_ELEMENTS = 16384      # fewest elements that are worth a chunk
    CHUNK_ROWS = 256            # fewest rows of lanes: what is done once for each lane of a chunk must not weigh
    COLUMN_LANES = 1024         # so many lanes of a row count as one column, and columns times chunks are at most
    TASKS = 64                  # about this, or the number of columns: what a large shape can keep busy

ctypedef struct Cut:
    Py_ssize_t M
    Py_ssize_t C
    Py_ssize_t S
    bint planes
    Py_ssize_t width      # lanes of one row of x: C*S
    Py_ssize_t fold       # rows of x in one row of lanes
    Py_ssize_t units      # rows of lanes, or pieces of one feature
    Py_ssize_t chunk      # units of a chunk
    Py_ssize_t chunks
    Py_ssize_t pieces     # pieces of a plane
    Py_ssize_t piece      # elements of a piece; the last one of a plane may be shorter


cdef inline Py_ssize_t folded(Py_ssize_t width, Py_ssize_t M) noexcept nogil:
    """How many rows of x make one of lanes: whole cache lines of floats where they can."""
    cdef Py_ssize_t most = FOLDED_LANES // width
    cdef Py_ssize_t fold = most
    while fold * width % STEP and fold > 1:
        fold -= 1
    return min(most if fold * width % STEP else fold, M)


cdef inline void cut(Cut *cut, Py_ssize_t M, Py_ssize_t C, Py_ssize_t S) noexcept nogil:
    cdef Py_ssize_t columns
    cdef Py_ssize_t worth
    cut.M, cut.C, cut.S = M, C, S
    cut.planes = S >= PLANE_ELEMENTS
    cut.width = C * S
    cut.fold = cut.pieces = 1
    cut.piece = S
    if cut.planes:
        if S > PIECE_ELEMENTS:
            cut.piece = PIECE_ELEMENTS
            cut.pieces = ceil_div(S, PIECE_ELEMENTS)
        cut.units = M * cut.pieces
        columns = C
        worth = ceil_div(M * S, CHUNK_ELEMENTS)
    else:
        if cut.width < NARROW_LANES:
            cut.fold = folded(cut.width, M)
        cut.units = ceil_div(M, cut.fold)
        columns = ceil_div(cut.width, COLUMN_LANES)
        # The first test spares a short call three divisions.
        worth = 1 if cut.units <= CHUNK_ROWS else min(ceil_div(cut.units * min(cut.width * cut.fold, <Py_ssize_t>COLUMN_LANES), CHUNK_ELEMENTS),
                                                      ceil_div(cut.units, CHUNK_ROWS))
    cut.chunk = cut.units
    cut.chunks = 1
    if worth > 1:
        cut.chunk = ceil_div(cut.units, min(ceil_div(TASKS, columns), worth))
        if not cut.planes:
            cut.chunk = ceil_div(cut.chunk, 8) * 8
        cut.chunks = ceil_div(cut.units, cut.chunk)


cdef inline Py_ssize_t plane_of(const Cut *cut, Py_ssize_t unit, Py_ssize_t *start, Py_ssize_t *n) noexcept nogil:
    """The plane that a piece belongs to. start: where in the plane the piece begins; n: its elements."""
    start[0] = 0
    n[0] = cut.S
    if cut.pieces == 1:  # divisions weigh where planes are short
        return unit
    start[0] = unit % cut.pieces * cut.piece
    n[0] = min(cut.piece, cut.S - start[0])
    return unit // cut.pieces


cdef inline Py_ssize_t count(const Cut *cut, Py_ssize_t k) noexcept nogil:
    """Elements of one feature in chunk k."""
    cdef Py_ssize_t first = k * cut.chunk
    cdef Py_ssize_t end = min(first + cut.chunk, cut.units)
    cdef Py_ssize_t last
    if cut.planes:
        # The last piece of a plane is shorter: as many of them as planes end within the chunk.
        last = end // cut.pieces - first // cut.pieces
        return (end - first - last) * cut.piece + last * (cut.S - (cut.pieces - 1) * cut.piece)
    return (min(end * cut.fold, cut.M) - first * cut.fold) * cut.S
