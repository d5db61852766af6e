/* Streaming stores, prefetches and vectors of float64: what Cython cannot say.

   A large output is written past the caches: a plain store first reads the line that it overwrites, and the lines push out
   the input. Small ones are written faster, and found again sooner, in cache: schedule.pxd decides.

   FASTBN_STREAMS is 0 where there is nothing to gain: 64-bit ARM has only a hint (STNP), which its cores may ignore, and
   they stop allocating by themselves once whole lines are written one after the other. There a line is copied. */
#ifndef FASTBN_INTRINSICS_H
#define FASTBN_INTRINSICS_H

#include <stddef.h>
#include <string.h>

#if defined(__SSE2__) || defined(_M_X64)
#include <immintrin.h>
#define FASTBN_STREAMS 1
#else
#define FASTBN_STREAMS 0
#if defined(_MSC_VER)
#include <intrin.h>
#endif
#endif

/* Room for 16 elements that starts on a cache line, as the compiler knows. Where it does not, it stores what it has in registers
   anyway, or computes element by element. */
#if defined(_MSC_VER)
typedef struct __declspec(align(64)) { double elements[16]; } fastbn_step;
#else
typedef struct { double elements[16]; } __attribute__((aligned(64))) fastbn_step;
#endif

/* Writes one cache line, from `from` at any address to `to` at a line's beginning: whole, since a line that is streamed in parts
   costs a write for each part. A compiler that keeps the line in registers until here stores it nowhere else. Streamed lines
   are ordered with nothing: fastbn_stream_fence() before another thread may look. */
static inline void fastbn_stream_line(void *to, const void *from) {
#if defined(__AVX512F__)
    _mm512_stream_ps((float *)to, _mm512_loadu_ps((const float *)from));
#elif defined(__AVX__)
    __m256 a = _mm256_loadu_ps((const float *)from), b = _mm256_loadu_ps((const float *)from + 8);
    _mm256_stream_ps((float *)to, a);
    _mm256_stream_ps((float *)to + 8, b);
#elif FASTBN_STREAMS
    __m128 a = _mm_loadu_ps((const float *)from), b = _mm_loadu_ps((const float *)from + 4);
    __m128 c = _mm_loadu_ps((const float *)from + 8), d = _mm_loadu_ps((const float *)from + 12);
    _mm_stream_ps((float *)to, a);
    _mm_stream_ps((float *)to + 4, b);
    _mm_stream_ps((float *)to + 8, c);
    _mm_stream_ps((float *)to + 12, d);
#else
    memcpy(to, from, 64);
#endif
}

static inline void fastbn_stream_fence(void) {
#if FASTBN_STREAMS
    _mm_sfence();
#endif
}

/* Asks for `lines` cache lines, `apart` bytes between them, from p on; none need be a valid address. A macro: gcc takes a
   function that does nothing else for one without an effect, and deletes the calls of it. */
#if FASTBN_STREAMS
#define FASTBN_PREFETCH(p) _mm_prefetch((p), _MM_HINT_T0)
#elif defined(__GNUC__) || defined(__clang__)
#define FASTBN_PREFETCH(p) __builtin_prefetch(p)
#elif defined(_MSC_VER) && defined(_M_ARM64)
#define FASTBN_PREFETCH(p) __prefetch(p)
#else
#define FASTBN_PREFETCH(p) (void)(p)
#endif
#define fastbn_prefetch(p, lines, apart)                         \
    do {                                                         \
        ptrdiff_t line_;                                         \
        for (line_ = 0; line_ < (ptrdiff_t)(lines); line_++)     \
            FASTBN_PREFETCH((const char *)(p) + line_ * (apart)); \
    } while (0)

/* Vectors of float64, as wide as a register, for the sums of float32 data: compilers widen floats with shuffles, where a load
   can do it, and may not contract a*a + b into one instruction, which is right where a*a is exact, as a float's square is. */
#if defined(__AVX512F__)
typedef __m512d fastbn_vec;
#define FASTBN_WIDTH 8
#define fastbn_widen(p) _mm512_cvtps_pd(_mm256_loadu_ps(p))
#define fastbn_vec_load _mm512_loadu_pd
#define fastbn_vec_store _mm512_storeu_pd
#define fastbn_vec_add _mm512_add_pd
#define fastbn_vec_square(a) _mm512_mul_pd((a), (a))
#define fastbn_vec_add_square(t, a) _mm512_fmadd_pd((a), (a), (t))
#elif defined(__AVX2__) && (defined(__FMA__) || defined(_MSC_VER))
typedef __m256d fastbn_vec;
#define FASTBN_WIDTH 4
#define fastbn_widen(p) _mm256_cvtps_pd(_mm_loadu_ps(p))
#define fastbn_vec_load _mm256_loadu_pd
#define fastbn_vec_store _mm256_storeu_pd
#define fastbn_vec_add _mm256_add_pd
#define fastbn_vec_square(a) _mm256_mul_pd((a), (a))
#define fastbn_vec_add_square(t, a) _mm256_fmadd_pd((a), (a), (t))
#elif defined(__SSE2__) || defined(_M_X64)
typedef __m128d fastbn_vec;
#define FASTBN_WIDTH 2
#define fastbn_widen(p) _mm_cvtps_pd(_mm_castsi128_ps(_mm_loadl_epi64((const __m128i *)(p))))
#define fastbn_vec_load _mm_loadu_pd
#define fastbn_vec_store _mm_storeu_pd
#define fastbn_vec_add _mm_add_pd
#define fastbn_vec_square(a) _mm_mul_pd((a), (a))
#define fastbn_vec_add_square(t, a) _mm_add_pd(_mm_mul_pd((a), (a)), (t))
#elif defined(__aarch64__) && defined(__GNUC__)
#include <arm_neon.h>
typedef float64x2_t fastbn_vec;
#define FASTBN_WIDTH 2
#define fastbn_widen(p) vcvt_f64_f32(vld1_f32(p))
#define fastbn_vec_load vld1q_f64
#define fastbn_vec_store vst1q_f64
#define fastbn_vec_add vaddq_f64
#define fastbn_vec_square(a) vmulq_f64((a), (a))
#define fastbn_vec_add_square(t, a) vfmaq_f64((t), (a), (a))
#else
typedef double fastbn_vec;
#define FASTBN_WIDTH 1
#define fastbn_widen(p) ((double)*(p))
#define fastbn_vec_load(p) (*(p))
#define fastbn_vec_store(p, a) ((void)(*(p) = (a)))
#define fastbn_vec_add(a, b) ((a) + (b))
#define fastbn_vec_square(a) ((a) * (a))
#define fastbn_vec_add_square(t, a) ((a) * (a) + (t))
#endif

#endif
