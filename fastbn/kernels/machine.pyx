"""What this machine is: processor, caches, instruction set, OpenMP. Always built with the baseline's flags.

Holds the process-wide thread count and the settings of the processor's family too, where the compiled core reads them without a
call into Python.
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
    /* The vendor's twelve letters, and family and model as the manuals of both vendors count them. */
    static void fastbn_processor(char vendor[13], int *family, int *model) {
        unsigned r[4], word;
        fastbn_cpuid(0, 0, r);
        for (word = 0; word < 12; word++) vendor[word] = (char)(r[word < 4 ? 1 : word < 8 ? 3 : 2] >> 8 * (word % 4));
        vendor[12] = 0;
        fastbn_cpuid(1, 0, r);
        *family = (int)(r[0] >> 8 & 15);
        *model = (int)(r[0] >> 4 & 15);
        if (*family == 6 || *family == 15) *model += (int)(r[0] >> 16 & 15) << 4;
        if (*family == 15) *family += (int)(r[0] >> 20 & 255);
    }
    /* Bytes of the levels' data caches, and the processors that share the third, as leaf 4 (Intel) or its twin 0x8000001D
       (AMD, where leaf 4 is empty) lists them. */
    static void fastbn_caches(size_t bytes[3], int *sharers) {
        const unsigned leaves[2] = {4, 0x8000001Du};
        unsigned r[4], i, sub, level;
        for (i = 0; i < 2 && !bytes[0]; i++) {
            fastbn_cpuid(leaves[i] & 0x80000000u, 0, r);
            if (r[0] < leaves[i]) continue;
            for (sub = 0; sub < 16; sub++) {
                fastbn_cpuid(leaves[i], sub, r);
                if ((r[0] & 31) == 0) break;
                level = r[0] >> 5 & 7;
                if ((r[0] & 31) == 2 || level < 1 || level > 3) continue;    /* 2: of instructions */
                /* ways, partitions, bytes of a line, sets; each less one. */
                bytes[level - 1] = (size_t)((r[1] >> 22) + 1) * (((r[1] >> 12) & 1023) + 1) * ((r[1] & 4095) + 1) * ((size_t)r[2] + 1);
                if (level == 3) *sharers = (int)(r[0] >> 14 & 4095) + 1;
            }
        }
    }
    #else
    static void fastbn_features(unsigned long long f[4]) { (void)f; }
    #include <string.h>
    #if defined(__APPLE__)
    #include <sys/sysctl.h>
    static void fastbn_processor(char vendor[13], int *family, int *model) {
        (void)family; (void)model;
        strcpy(vendor, "Apple");
    }
    static size_t fastbn_sysctl(const char *name) {
        unsigned long long bytes = 0;
        size_t size = sizeof bytes;
        return sysctlbyname(name, &bytes, &size, NULL, 0) == 0 ? (size_t)bytes : 0;
    }
    static void fastbn_caches(size_t bytes[3], int *sharers) {
        (void)sharers;
        bytes[0] = fastbn_sysctl("hw.perflevel0.l1dcachesize");
        bytes[1] = fastbn_sysctl("hw.perflevel0.l2cachesize");
    }
    #else
    #if defined(__unix__)
    #include <unistd.h>
    #endif
    static void fastbn_processor(char vendor[13], int *family, int *model) {
        (void)family; (void)model;
    #if defined(__aarch64__) || defined(_M_ARM64)
        strcpy(vendor, "ARM");
    #else
        (void)vendor;
    #endif
    }
    static void fastbn_caches(size_t bytes[3], int *sharers) {
        (void)sharers;
    #if defined(_SC_LEVEL3_CACHE_SIZE)
        const int names[3] = {_SC_LEVEL1_DCACHE_SIZE, _SC_LEVEL2_CACHE_SIZE, _SC_LEVEL3_CACHE_SIZE};
        long found;
        int i;
        for (i = 0; i < 3; i++) {
            found = sysconf(names[i]);
            if (found > 0) bytes[i] = (size_t)found;
        }
    #else
        (void)bytes;
    #endif
    }
    #endif
    #endif

    #if defined(_WIN32)
    static long fastbn_pid(void) { return 0; }
    #else
    #include <unistd.h>
    static long fastbn_pid(void) { return (long)getpid(); }
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
    long fastbn_pid() nogil
    void fastbn_features(unsigned long long *f)
    void fastbn_processor(char *vendor, int *family, int *model)
    void fastbn_caches(size_t *bytes, int *sharers)

import operator
import sys

cdef int requested = 0        # set_num_threads; 0: the default
cdef int quota = 1 << 20      # processors that the control group grants
cdef bint forked = False
cdef long pid = fastbn_pid()
cdef Settings numbers         # filled at import, by kernels/__init__.py


cdef int threads(int asked) noexcept nogil:
    """Threads for one call: `asked` where positive, else the process-wide number."""
    # The second test is for a fork that Python does not know of, as in a library's C.
    if forked or pid != fastbn_pid() or not FASTBN_OPENMP:
        return 1
    if asked > 0:
        return asked
    if requested > 0:
        return requested
    # Asked at each call, so that threadpoolctl's and OpenMP's own limits are followed, and a changed affinity mask.
    return max(1, min(omp_get_max_threads(), omp_get_num_procs(), quota))


cdef const Settings *settings() noexcept nogil:
    """The numbers in force. The bits of a result must not depend on them."""
    return &numbers


def most_threads():
    """The most that a call can have. Many more threads than processors take memory for their stacks, or cannot be begun, which ends the process."""
    return max(64, 4 * omp_get_num_procs())


cpdef int checked_threads(object n) except -1:
    """n as a number of threads."""
    cdef int most = most_threads()
    try:
        count = operator.index(n)
    except TypeError:
        raise TypeError(f"expected the number of threads as an integer, got {type(n).__name__}") from None
    if not 1 <= count <= most:
        raise ValueError(f"expected the number of threads to be at least 1 and at most {most}, got {count}")
    return count


def get_requested():
    return requested


def set_requested(int n):
    global requested
    requested = n


def set_quota(int n):
    global quota
    quota = n


def get_settings():
    """The numbers in force, by the names of Settings' members."""
    return numbers


def set_settings(**changes):
    """Put some numbers in force, for the whole process; all of those before. Nothing is changed where one of them is wrong."""
    global numbers
    before = numbers
    for name, value in changes.items():
        if name not in before:
            raise TypeError(f"expected a setting among {', '.join(before)}, got {name!r}")
        try:
            changes[name] = operator.index(value)
        except TypeError:
            raise TypeError(f"expected {name} as an integer, got {type(value).__name__}") from None
        if not 0 <= changes[name] <= sys.maxsize:
            raise ValueError(f"expected {name} to be at least 0 and at most {sys.maxsize}, got {changes[name]}")
        if name == "rows_at_once" and changes[name] not in (1, 4):
            raise ValueError(f"expected rows_at_once to be 1 or 4, got {changes[name]}")
    numbers = {**before, **changes}
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


def processor():
    """(vendor, family, model): CPUID's on x86-64; on arm64 ("Apple" or "ARM", 0, 0), elsewhere ("", 0, 0)."""
    cdef char[13] vendor = [0] * 13
    cdef int family = 0
    cdef int model = 0
    fastbn_processor(vendor, &family, &model)
    return (<bytes>vendor).decode("ascii", "replace"), family, model


def virtual():
    """Whether this is a hypervisor's guest, which may share its caches with others, as far as CPUID says."""
    cdef unsigned long long[4] f = [0, 0, 0, 0]
    fastbn_features(f)
    return bool(f[0] >> 31 & 1)


def caches():
    """Bytes of the data caches and the processors that share the third, 0 where the system does not say.

    Intel counts their possible numbers, of which there are up to several times as many as processors.
    """
    cdef size_t[3] sizes = [0, 0, 0]
    cdef int sharers = 0
    fastbn_caches(sizes, &sharers)
    return {"l1_bytes": sizes[0], "l2_bytes": sizes[1], "l3_bytes": sizes[2], "l3_sharers": sharers}


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
