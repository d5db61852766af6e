"""What this machine is: instruction set, OpenMP, processors. Always built with the baseline's flags.

Holds the process-wide thread count too, where the compiled core reads it without a call into Python.
"""
cdef extern from *:
    """
    /* Not _OPENMP itself: defined, it would make Cython's own code include omp.h where there is none. */
    #if defined(_OPENMP)
    #include <omp.h>
    #define FASTBN_OPENMP _OPENMP
    #else
    #define FASTBN_OPENMP 0
    static int omp_get_max_threads(void) { return 1; }
    static int omp_get_num_procs(void) { return 1; }
    #endif

    #if defined(__x86_64__) || defined(_M_X64)
    #if defined(_MSC_VER)
    #include <intrin.h>
    #include <immintrin.h>
    static void fastbn_cpuid(unsigned leaf, unsigned r[4]) { __cpuidex((int *)r, (int)leaf, 0); }
    static unsigned long long fastbn_xcr0(void) { return _xgetbv(0); }
    #else
    #include <cpuid.h>
    static void fastbn_cpuid(unsigned leaf, unsigned r[4]) { __cpuid_count(leaf, 0, r[0], r[1], r[2], r[3]); }
    static unsigned long long fastbn_xcr0(void) {
        unsigned low, high;
        __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
        return ((unsigned long long)high << 32) | low;
    }
    #endif
    /* The x86-64 psABI's level that processor and operating system support: 1, or 3 (AVX2, FMA, BMI, F16C, LZCNT, MOVBE). */
    static int fastbn_x86_64_level(void) {
        unsigned r[4], leaf1, leaf7, extended;
        const unsigned need1 = (1u << 12) | (1u << 22) | (1u << 23) | (1u << 27) | (1u << 28) | (1u << 29);
        const unsigned need7 = (1u << 3) | (1u << 5) | (1u << 8);
        fastbn_cpuid(0, r);
        if (r[0] < 7) return 1;
        fastbn_cpuid(1, r); leaf1 = r[2];
        fastbn_cpuid(7, r); leaf7 = r[1];
        fastbn_cpuid(0x80000000u, r);
        if (r[0] < 0x80000001u) return 1;
        fastbn_cpuid(0x80000001u, r); extended = r[2];
        if ((leaf1 & need1) != need1 || (leaf7 & need7) != need7 || !(extended & (1u << 5))) return 1;
        return (fastbn_xcr0() & 6) == 6 ? 3 : 1;
    }
    #else
    static int fastbn_x86_64_level(void) { return 0; }
    #endif
    """
    int FASTBN_OPENMP
    int omp_get_max_threads() nogil
    int omp_get_num_procs() nogil
    int fastbn_x86_64_level()

import operator

cdef int requested = 0        # set_num_threads; 0: the default
cdef int quota = 1 << 20      # processors that the control group grants
cdef bint forked = False


cdef int threads(int asked) noexcept nogil:
    """Threads for one call: `asked` where positive, else the process-wide number."""
    if forked or not FASTBN_OPENMP:
        return 1
    if asked > 0:
        return asked
    if requested > 0:
        return requested
    # Asked at each call, so that threadpoolctl's and OpenMP's own limits are followed, and a changed affinity mask.
    return max(1, min(omp_get_max_threads(), omp_get_num_procs(), quota))


cpdef int checked_threads(object n) except -1:
    """n as a number of threads."""
    try:
        count = operator.index(n)
    except TypeError:
        raise TypeError(f"expected the number of threads as an integer, got {type(n).__name__}") from None
    if not 1 <= count <= 65536:
        raise ValueError(f"expected the number of threads to be at least 1 and at most 65536, got {count}")
    return count


def get_requested():
    return requested


def set_requested(int n):
    global requested
    requested = n


def set_quota(int n):
    global quota
    quota = n


def after_fork_in_child():
    """libgomp's threads do not survive a fork, and its next parallel region would wait for them for ever."""
    global forked
    forked = True


def current_threads():
    return threads(0)


def openmp_version():
    """The OpenMP specification's date, as 201511, or 0 for a serial build."""
    return FASTBN_OPENMP


def builds():
    """Names of the kernel builds that this processor can run, best last."""
    return ("baseline", "v3") if fastbn_x86_64_level() >= 3 else ("baseline",)
