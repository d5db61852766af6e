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
    /* ECX of leaf 1, EBX of leaf 7, ECX of leaf 0x80000001, and XCR0, which only a processor with OSXSAVE can be asked for. */
    static void fastbn_features(unsigned long long f[4]) {
        unsigned r[4], last;
        fastbn_cpuid(0, 0, r);
        last = r[0];
        fastbn_cpuid(1, 0, r);
        f[0] = r[2];
        if (f[0] >> 27 & 1) f[3] = fastbn_xcr0();
        if (last >= 7) {
            fastbn_cpuid(7, 0, r);
            f[1] = r[1];
        }
        fastbn_cpuid(0x80000000u, 0, r);
        if (r[0] >= 0x80000001u) {
            fastbn_cpuid(0x80000001u, 0, r);
            f[2] = r[2];
        }
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
    static void fastbn_features(unsigned long long f[4]) { (void)f; }
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

    #if defined(__aarch64__) || defined(_M_ARM64)
    #define FASTBN_ARM64 1
    #else
    #define FASTBN_ARM64 0
    #endif
    """
    int FASTBN_OPENMP
    int omp_get_max_threads() nogil
    int omp_get_num_procs() nogil
    const bint FASTBN_ARM64
    void fastbn_features(unsigned long long *f)
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


cdef unsigned long long bits(object numbers):
    return sum(1 << n for n in numbers)  # a Python int each: a C shift of 1 would be one of 32 bits


def builds(features=None):
    """Names of the kernel builds that this processor can run, best last.

    features: ECX of CPUID leaf 1, EBX of leaf 7, ECX of leaf 0x80000001, and XCR0; by default this processor's.
    """
    cdef unsigned long long[4] f = [0, 0, 0, 0]
    if FASTBN_ARM64:
        return ("arm64",)
    if features is None:
        fastbn_features(f)
    else:
        f = features
    # The levels of the x86-64 psABI, and what the operating system must save of the registers.
    # SSE3, SSSE3, FMA, CMPXCHG16B, SSE4.1, SSE4.2, MOVBE, POPCNT, OSXSAVE, AVX, F16C; BMI1, AVX2, BMI2; LAHF, LZCNT; SSE and AVX registers.
    v3 = (bits((0, 9, 12, 13, 19, 20, 22, 23, 27, 28, 29)), bits((3, 5, 8)), bits((0, 5)), bits((1, 2)))
    # AVX512 F, DQ, CD, BW, VL; mask registers, the upper halves of the first 16 vector registers, the other 16.
    v4 = (0, bits((16, 17, 28, 30, 31)), 0, bits((5, 6, 7)))
    runs = ("baseline",)
    for name, needs in (("v3", v3), ("v4", v4)):
        if any(need & ~f[i] for i, need in enumerate(needs)):
            break
        runs += (name,)
    return runs
