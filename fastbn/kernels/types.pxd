# cython: cdivision=True
"""The types of the loops: element types, what they ask of the arithmetic, sums that lose nothing.

Design: `row` points to data as they are stored, `table` to numbers as the arithmetic takes them. Today each stored type is its own arithmetic's; a
type that is only stored (of two bytes, say) would be one more `row` with its traits below, and without them it does not compile.
"""
from libc.stdint cimport uintptr_t

cdef extern from *:
    """
    #include <float.h>
    #if defined(FLT_EVAL_METHOD) && FLT_EVAL_METHOD == 2
    #error "fastbn needs arithmetic in the types' own precision: build with -msse2 -mfpmath=sse"
    #endif
    #if defined(_MSC_VER)
    #pragma fp_contract(off)
    #endif
    /* Without it the compiler must assume that a store to y changes x, and gives up on vectorising. x and y may be the
       very same array all the same: each element is read before the same element is written. */
    #if defined(_MSC_VER) || defined(__GNUC__)
    #define FASTBN_RESTRICT __restrict
    #else
    #define FASTBN_RESTRICT restrict
    #endif
    /* The loops are specialised by constant arguments: an activation, a number of lanes. A compiler left to itself keeps one copy for
       several of them and tests inside the loop. */
    #undef CYTHON_INLINE
    #if defined(_MSC_VER)
    #define CYTHON_INLINE __forceinline
    #elif defined(__GNUC__)
    #define CYTHON_INLINE __inline__ __attribute__((always_inline))
    #else
    #define CYTHON_INLINE inline
    #endif
    typedef float *FASTBN_RESTRICT fastbn_f32;
    typedef double *FASTBN_RESTRICT fastbn_f64;
    """
    ctypedef float *f32 "fastbn_f32"
    ctypedef double *f64 "fastbn_f64"

ctypedef fused row:
    f32
    f64

ctypedef fused table:
    f32
    f64

ctypedef fused real:
    float
    double

cdef enum:
    LINE_BYTES = 64    # of a cache line
    STEP = 16          # lanes worked on at once, a line of floats or two of doubles; gcc unrolls a loop of eight before it would vectorise it


cdef inline bint digits_to_spare(row x) noexcept nogil:
    """Whether plain float64 sums have digits to spare for data of this type; else what rounding loses is kept beside (`add`)."""
    if row is f32:
        return True
    elif row is f64:
        return False
    else:
        a_stored_type_needs_this_trait


cdef inline void *aligned(void *room) noexcept nogil:
    """The first cache line within room."""
    return <void *>((<uintptr_t>room + LINE_BYTES - 1) // LINE_BYTES * LINE_BYTES)


cdef inline Py_ssize_t ceil_div(Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    return (a + b - 1) // b


cdef inline void add(f64 total, f64 lost, Py_ssize_t i, double t, const bint compensate) noexcept nogil:
    """total[i] += t; what rounding loses goes to lost[i] (Knuth's TwoSum), where t is itself a float64 sum."""
    cdef double s
    cdef double b
    if compensate:
        s = total[i] + t
        b = s - total[i]
        lost[i] += (total[i] - (s - b)) + (t - b)
        total[i] = s
    else:
        total[i] += t
