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
    static void fastbn_cpuid(unsigned leaf, unsigned sub, unsigned r[4]) { __cpuidex((int *)r, (int)leaf, (int)sub); }
    static unsigned long long fastbn_xcr0(void) { return _xgetbv(0); }
    #else
    #include <cpuid.h>
    static void fastbn_cpuid(unsigned leaf, unsigned sub, unsigned r[4]) {
        __cpuid_count(leaf, sub, r[0], r[1], r[2], r[3]);
    }
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
        fastbn_cpuid(0, 0, r);
        if (r[0] < 7) return 1;
        fastbn_cpuid(1, 0, r); leaf1 = r[2];
        fastbn_cpuid(7, 0, r); leaf7 = r[1];
        fastbn_cpuid(0x80000000u, 0, r);
        if (r[0] < 0x80000001u) return 1;
        fastbn_cpuid(0x80000001u, 0, r); extended = r[2];
        if ((leaf1 & need1) != need1 || (leaf7 & need7) != need7 || !(extended & (1u << 5))) return 1;
        return (fastbn_xcr0() & 6) == 6 ? 3 : 1;
    }
    /* Bytes of the largest level that leaf 4 (Intel) or its twin 0x8000001D (AMD, where leaf 4 is empty) lists; or 0. */
    static size_t fastbn_cache_bytes(void) {
        const unsigned leaves[2] = {4, 0x8000001Du};
        size_t largest = 0, bytes;
        unsigned r[4], i, sub;
        for (i = 0; i < 2 && !largest; i++) {
            fastbn_cpuid(leaves[i] & 0x80000000u, 0, r);
            if (r[0] < leaves[i]) continue;
            for (sub = 0; sub < 16; sub++) {
                fastbn_cpuid(leaves[i], sub, r);
                if ((r[0] & 31) == 0) break;
                /* ways, partitions, bytes of a line, sets; each less one. */
                bytes = (size_t)((r[1] >> 22) + 1) * (((r[1] >> 12) & 1023) + 1) * ((r[1] & 4095) + 1) * ((size_t)r[2] + 1);
                if (bytes > largest) largest = bytes;
            }
        }
        return largest;
    }
    #else
    static int fastbn_x86_64_level(void) { return 0; }
    #if defined(__APPLE__)
    #include <sys/sysctl.h>
    static size_t fastbn_cache_bytes(void) {
        unsigned long long bytes = 0;
        size_t size = sizeof bytes;
        if (sysctlbyname("hw.perflevel0.l2cachesize", &bytes, &size, NULL, 0) != 0) return 0;
        return (size_t)bytes;
    }
    #else
    #if defined(__unix__)
    #include <unistd.h>
    #endif
    static size_t fastbn_cache_bytes(void) {
    #if defined(_SC_LEVEL3_CACHE_SIZE)
        long bytes = sysconf(_SC_LEVEL3_CACHE_SIZE);
        if (bytes > 0) return (size_t)bytes;
    #endif
        return 0;
    }
    #endif
    #endif
    """
    int FASTBN_OPENMP
    int omp_get_max_threads() nogil
    int omp_get_num_procs() nogil
    int fastbn_x86_64_level()
    size_t fastbn_cache_bytes()

import operator

cdef int requested = 0        # set_num_threads; 0: the default
cdef int quota = 1 << 20      # processors that the control group grants
cdef bint forked = False
# Asked once: under a hypervisor each CPUID costs a microsecond or more.
cdef Py_ssize_t last_level = fastbn_cache_bytes() or 32 << 20


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


cdef Py_ssize_t cache_bytes() noexcept nogil:
    """Size of the last-level cache. It may choose between kinds of stores alone: the bits must not depend on it."""
    return last_level


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


def set_cache_bytes(Py_ssize_t n):
    """Take the last-level cache to be n bytes, so that a test need not fill the real one; the size before."""
    global last_level
    before = last_level
    last_level = n
    return before


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
