# cython: boundscheck=False, wraparound=False, cdivision=True
"""The pool of outputs: memory of large arrays that died, kept for the next ones.

Design: the first touch of a new large array can cost more than the arithmetic on it. Outputs are allocated through NumPy's own hook for
memory (PyDataMem_Handler, NEP 49), so that each is an ordinary array that owns its data: NumPy knows when the last view, memoryview or
foreign holder is gone, frees the data, and that is when it comes here. What NumPy calls touches nothing of Python, so a destructor may run
it wherever it runs.

One lock guards the lists; it is held for a few instructions, and never while memory is asked for or given back. Under the GIL it is always
free. Without the GIL, who finds it taken does not wait but goes past the pool: allocating and freeing cannot hang, not even in a child that
was forked while another thread held it.
"""
import operator
import os
import sys

cimport numpy as cnp
from cpython.pycapsule cimport PyCapsule_New
from cpython.pythread cimport (
    NOWAIT_LOCK,
    WAIT_LOCK,
    PyThread_acquire_lock,
    PyThread_allocate_lock,
    PyThread_release_lock,
    PyThread_type_lock,
)
from libc.stdint cimport uintptr_t
from libc.string cimport memcpy, memset, strcpy

cnp.import_array()

cdef extern from "numpy/arrayobject.h":
    object PyArray_NewLikeArray(cnp.ndarray prototype, cnp.NPY_ORDER order, void *dtype, int subok)

cdef extern from *:
    """
    /* Memory that goes back to the system when it is freed. What malloc has given it may keep, between other pieces that are still in use: under
       changing shapes that came to 150 MB above the pool's limit. FASTBN_POOL_FROM_MALLOC is for sanitizers, which watch malloc alone. */
    #if defined(__unix__) || defined(__APPLE__)
    #include <sys/mman.h>
    #endif
    #if (defined(__unix__) || defined(__APPLE__)) && !defined(FASTBN_POOL_FROM_MALLOC)
    #ifndef MAP_ANONYMOUS
    #define MAP_ANONYMOUS MAP_ANON
    #endif
    static void *map_memory(size_t size) {
        void *start = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        return start == MAP_FAILED ? NULL : start;
    }
    static void unmap_memory(void *start, size_t size) { (void)munmap(start, size); }
    #else
    #include <stdlib.h>
    static void *map_memory(size_t size) { return malloc(size); }
    static void unmap_memory(void *start, size_t size) { (void)size; free(start); }
    #endif
    static void huge_pages(void *start, size_t size) {
    #if defined(__linux__) && defined(MADV_HUGEPAGE)
        (void)madvise(start, size, MADV_HUGEPAGE);  /* a wish: where it is refused, pages are small */
    #else
        (void)start; (void)size;
    #endif
    }
    """
    void *map_memory(size_t size) noexcept nogil
    void unmap_memory(void *start, size_t size) noexcept nogil
    void huge_pages(void *start, size_t size) noexcept nogil

cdef enum:
    SMALLEST = 1 << 17    # bytes; below, NumPy's own memory is as fast
    HUGE = 1 << 22        # bytes from which huge pages are asked for, as NumPy does
    # Where an output lies a little behind its input, modulo 4096, loads wait for stores (48 bytes behind, a copy took 1.2 times as long).
    # The largest arrays of others start a little behind a multiple of 4096, and ours on one: they are the same or ahead.
    ALIGNMENT = 4096
    CLASSES = 256

cdef struct Block:        # stands right before its data
    char *allocation      # what was mapped, with all that stands around the data
    size_t capacity       # of the data, in bytes
    size_t released       # when, by the pool's clock
    Block *newer
    Block *older

cdef Block *newest[CLASSES]     # the free blocks of each class
cdef Block *oldest[CLASSES]
cdef size_t kept = 0            # bytes of all free blocks, never above the limit
cdef size_t limit = 1 << 28
cdef size_t clock = 0
cdef PyThread_type_lock lock = PyThread_allocate_lock()
if lock == NULL:
    raise MemoryError()


cdef size_t rounded(size_t size, int *k) noexcept nogil:
    """The capacity for this size, and its class: 5, 6, 7 or 8 times a power of two, so that at most a fifth is unused (and untouched)."""
    cdef size_t step = 16
    cdef size_t steps
    k[0] = -5
    while step < (size + 7) >> 3:
        step <<= 1
        k[0] += 4
    steps = max(<size_t>5, (size + step - 1) // step)
    k[0] += <int>steps
    return steps * step


# --- the lists: only with the lock held ----------------------------------------------------------------------------------

cdef void unlink(Block *block, int k) noexcept nogil:
    global kept
    if block.newer != NULL:
        block.newer.older = block.older
    else:
        newest[k] = block.older
    if block.older != NULL:
        block.older.newer = block.newer
    else:
        oldest[k] = block.newer
    kept -= block.capacity


cdef void link(Block *block, int k) noexcept nogil:
    global kept, clock
    clock += 1
    block.released = clock
    block.newer = NULL
    block.older = newest[k]
    if block.older != NULL:
        block.older.newer = block
    else:
        oldest[k] = block
    newest[k] = block
    kept += block.capacity


cdef Block *surplus(size_t bound) noexcept nogil:
    """Take the oldest blocks out until no more than `bound` bytes are kept; a chain for `discard`."""
    cdef Block *chain = NULL
    cdef Block *block
    cdef int k
    cdef int first
    while kept > bound:
        first = -1
        for k in range(CLASSES):
            if oldest[k] != NULL and (first < 0 or oldest[k].released < oldest[first].released):
                first = k
        block = oldest[first]
        unlink(block, first)
        block.older = chain
        chain = block
    return chain


# --- blocks --------------------------------------------------------------------------------------------------------------

cdef size_t mapped(size_t capacity) noexcept nogil:
    return capacity + sizeof(Block) + ALIGNMENT


cdef Block *create(size_t capacity) noexcept nogil:
    cdef char *allocation = <char *>map_memory(mapped(capacity))
    cdef char *data
    cdef Block *block
    if allocation == NULL:
        return NULL
    data = allocation + sizeof(Block)
    data += (ALIGNMENT - <uintptr_t>data % ALIGNMENT) % ALIGNMENT
    if capacity >= HUGE:
        huge_pages(data, capacity)
    block = <Block *>data - 1
    block.allocation = allocation
    block.capacity = capacity
    return block


cdef size_t discard(Block *chain) noexcept nogil:
    """Give blocks back to the system; the number of bytes."""
    cdef size_t given = 0
    cdef Block *block
    while chain != NULL:
        block = chain
        chain = block.older
        given += block.capacity
        unmap_memory(block.allocation, mapped(block.capacity))
    return given


# --- what NumPy calls, whenever it likes ---------------------------------------------------------------------------------

cdef void *pool_malloc(void *context, size_t size) noexcept nogil:
    cdef int k
    cdef size_t capacity = rounded(size, &k)
    cdef Block *block = NULL
    cdef Block *chain = NULL
    if PyThread_acquire_lock(lock, NOWAIT_LOCK):
        block = newest[k]
        if block != NULL:
            unlink(block, k)
        PyThread_release_lock(lock)
    if block == NULL:
        block = create(capacity)
    if block == NULL and PyThread_acquire_lock(lock, NOWAIT_LOCK):
        # Memory ran out: what is kept here may be what is missing.
        chain = surplus(0)
        PyThread_release_lock(lock)
        discard(chain)
        block = create(capacity)
    return NULL if block == NULL else <void *>(block + 1)


cdef void pool_free(void *context, void *data, size_t size) noexcept nogil:
    cdef int k
    cdef Block *block = <Block *>data - 1
    if data == NULL:
        return
    rounded(block.capacity, &k)
    block.older = NULL
    if PyThread_acquire_lock(lock, NOWAIT_LOCK):
        # What is larger than the limit would drive all others out, and go itself.
        if block.capacity <= limit:
            link(block, k)
            block = surplus(limit)
        PyThread_release_lock(lock)
    discard(block)


cdef void *pool_calloc(void *context, size_t count, size_t size) noexcept nogil:
    # NumPy has checked that the product is a size.
    cdef void *data = pool_malloc(context, count * size)
    return NULL if data == NULL else memset(data, 0, count * size)


cdef void *pool_realloc(void *context, void *data, size_t size) noexcept nogil:
    cdef void *moved = pool_malloc(context, size)
    if data != NULL and moved != NULL:
        memcpy(moved, data, min(size, (<Block *>data - 1).capacity))
        pool_free(context, data, 0)
    return moved


cdef cnp.PyDataMem_Handler pool
strcpy(pool.name, "fastbn")
pool.version = 1
pool.allocator.ctx = NULL
pool.allocator.malloc = pool_malloc
pool.allocator.calloc = pool_calloc
pool.allocator.realloc = pool_realloc
pool.allocator.free = pool_free
cdef object HANDLER = PyCapsule_New(&pool, "mem_handler", NULL)


cdef cnp.ndarray empty_like(cnp.ndarray x):
    """A new array of x's shape, dtype and memory order, its values still to be written."""
    if cnp.PyArray_NBYTES(x) < SMALLEST:
        return PyArray_NewLikeArray(x, cnp.NPY_KEEPORDER, NULL, 0)
    before = cnp.PyDataMem_SetHandler(HANDLER)
    try:
        return PyArray_NewLikeArray(x, cnp.NPY_KEEPORDER, NULL, 0)
    finally:
        cnp.PyDataMem_SetHandler(before)


# --- the public names ----------------------------------------------------------------------------------------------------

def get_pool_limit():
    """Return how many bytes of the memory of former outputs are kept for the next ones, at most.

    The number is 256 MiB unless `set_pool_limit` has changed it.

    Examples
    --------
    >>> import fastbn
    >>> before = fastbn.set_pool_limit(2**20)
    >>> fastbn.get_pool_limit()
    1048576
    >>> _ = fastbn.set_pool_limit(before)
    """
    cdef size_t now
    PyThread_acquire_lock(lock, WAIT_LOCK)
    now = limit
    PyThread_release_lock(lock)
    return now


def set_pool_limit(nbytes):
    """Set how much memory of former outputs is kept for the next ones, for the whole process.

    Outputs of 128 KiB or more are allocated from a pool. When such an array and all views on it are gone, its memory is
    kept for the next output of about its size. Memory above the limit goes back to the system, the oldest first.

    Parameters
    ----------
    nbytes : int
        Limit in bytes, at least 0. Arrays in use do not count. With 0 nothing is kept, and every output is new memory
        of the system. The first touch of new memory can cost as much as the call.

    Returns
    -------
    int
        The limit before, in bytes.

    Raises
    ------
    TypeError, ValueError
        nbytes is not an integer of at least 0.

    See Also
    --------
    clear_pool
    """
    global limit
    cdef Block *chain
    cdef size_t before
    cdef size_t new
    try:
        bound = operator.index(nbytes)
    except TypeError:
        raise TypeError(f"expected the limit in bytes as an integer, got {type(nbytes).__name__}") from None
    if not 0 <= bound <= sys.maxsize:
        raise ValueError(f"expected the limit in bytes to be at least 0 and at most {sys.maxsize}, got {bound}")
    new = bound  # and no Python object is made while the lock is held: memory for it may be missing
    PyThread_acquire_lock(lock, WAIT_LOCK)
    before = limit
    limit = new
    chain = surplus(limit)
    PyThread_release_lock(lock)
    discard(chain)
    return before


def clear_pool():
    """Give the memory that is kept for the next outputs back to the system.

    Returns
    -------
    int
        Number of bytes that were given back.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> y, stats = fastbn.batch_norm_forward(np.eye(1024))
    >>> del y
    >>> fastbn.clear_pool() >= 1024*1024*8
    True
    >>> fastbn.clear_pool()
    0
    """
    cdef Block *chain
    PyThread_acquire_lock(lock, WAIT_LOCK)
    chain = surplus(0)
    PyThread_release_lock(lock)
    return discard(chain)


def after_fork_in_child():
    """Without the GIL, a thread that is not in this process may have held the lock: what its half-made lists held is lost."""
    global kept
    if not PyThread_acquire_lock(lock, NOWAIT_LOCK):
        memset(newest, 0, sizeof(newest))
        memset(oldest, 0, sizeof(oldest))
        kept = 0
    PyThread_release_lock(lock)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=after_fork_in_child)
