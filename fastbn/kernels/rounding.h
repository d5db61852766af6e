/* How this thread's processor rounds. Another library may have changed that (torch.set_flush_denormal, code built with
   -ffast-math), for one thread or for those that are begun later: results would depend on which thread computes them.
   So every thread of a call begins with fastbn_ieee(): round to nearest, keep denormals, trap nothing. It ends with
   fastbn_as_before(), since the thread is not ours. Both cost the reading of a register where nothing was changed. */
#ifndef FASTBN_ROUNDING_H
#define FASTBN_ROUNDING_H

#if defined(__SSE2__) || defined(_M_X64)
#include <immintrin.h>
typedef unsigned int fastbn_control;
#define FASTBN_IEEE 0x1f80u    /* the six lowest bits only tell what has happened */
#define FASTBN_CHANGED(word) (((word) & ~0x3fu) != FASTBN_IEEE)
static inline fastbn_control fastbn_read_control(void) { return _mm_getcsr(); }
static inline void fastbn_write_control(fastbn_control word) { _mm_setcsr(word); }
#elif defined(__aarch64__) && defined(__GNUC__)
typedef unsigned long long fastbn_control;
#define FASTBN_IEEE 0u
#define FASTBN_CHANGED(word) ((word) != FASTBN_IEEE)
static inline fastbn_control fastbn_read_control(void) {
    fastbn_control word;
    __asm__ volatile("mrs %0, fpcr" : "=r"(word));
    return word;
}
static inline void fastbn_write_control(fastbn_control word) { __asm__ volatile("msr fpcr, %0" : : "r"(word)); }
#elif defined(_M_ARM64)
#include <intrin.h>
typedef unsigned long long fastbn_control;
#define FASTBN_IEEE 0u
#define FASTBN_CHANGED(word) ((word) != FASTBN_IEEE)
static inline fastbn_control fastbn_read_control(void) { return (fastbn_control)_ReadStatusReg(ARM64_FPCR); }
static inline void fastbn_write_control(fastbn_control word) { _WriteStatusReg(ARM64_FPCR, (__int64)word); }
#else
typedef unsigned int fastbn_control;
#define FASTBN_IEEE 0u
#define FASTBN_CHANGED(word) 0
static inline fastbn_control fastbn_read_control(void) { return 0; }
static inline void fastbn_write_control(fastbn_control word) { (void)word; }
#endif

/* No arithmetic may move past the change: what it reads and writes is memory, which this is said to touch. */
#if defined(__GNUC__)
#define FASTBN_BARRIER() __asm__ volatile("" : : : "memory")
#elif defined(_MSC_VER)
#include <intrin.h>
#define FASTBN_BARRIER() _ReadWriteBarrier()
#else
#define FASTBN_BARRIER() ((void)0)
#endif

/* The control word as it was. */
static inline fastbn_control fastbn_ieee(void) {
    fastbn_control word = fastbn_read_control();
    if (FASTBN_CHANGED(word)) {
        fastbn_write_control(FASTBN_IEEE);
        FASTBN_BARRIER();
    }
    return word;
}

static inline void fastbn_as_before(fastbn_control word) {
    if (FASTBN_CHANGED(word)) {
        FASTBN_BARRIER();
        fastbn_write_control(word);
    }
}

#endif
