/* The loops that a call of batch normalization is made of, each in the forms that are fast somewhere: limit.py compiles and times them.
 *
 * float32, sums in float64. x, dy and out are (rows, features, run): rows of features where run is 1, else runs of one feature. The parameters
 * are rows of `pitch` floats. Nothing is fused but the squares of the sums, which are exact: a library with the same bits on every machine can
 * do no other arithmetic.
 */
#include <stdint.h>
#include <string.h>
#include <time.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#define F32 float *restrict
#define F64 double *restrict

#if defined __AVX512F__
typedef __m512d D;
enum { W = 8 };
#define WIDEN(a) _mm512_cvtps_pd(_mm256_loadu_ps(a)) /* straight from memory: no shuffle */
#define LOAD _mm512_loadu_pd
#define STORE _mm512_storeu_pd
#define FMA _mm512_fmadd_pd
#define LOW(f) _mm512_cvtps_pd(_mm512_castps512_ps256(f))
#define HIGH(f) _mm512_cvtps_pd(_mm512_extractf32x8_ps(f, 1))
#elif defined __AVX2__
typedef __m256d D;
enum { W = 4 };
#define WIDEN(a) _mm256_cvtps_pd(_mm_loadu_ps(a))
#define LOAD _mm256_loadu_pd
#define STORE _mm256_storeu_pd
#define FMA _mm256_fmadd_pd
#define LOW(f) _mm256_cvtps_pd(_mm256_castps256_ps128(f))
#define HIGH(f) _mm256_cvtps_pd(_mm256_extractf128_ps(f, 1))
#else
typedef double D __attribute__((vector_size(16)));
enum { W = 2 };
#define WIDEN(a) ((D){(a)[0], (a)[1]})
static inline D LOAD(const double *a) { D v; memcpy(&v, a, sizeof v); return v; }
static inline void STORE(double *a, D v) { memcpy(a, &v, sizeof v); }
#define FMA(a, b, c) ((a) * (b) + (c))
#define LOW(f) ((D){(f)[0], (f)[1]})
#define HIGH(f) ((D){(f)[2], (f)[3]})
#endif
typedef float F __attribute__((vector_size(8 * W))); /* two of D's width in elements */
static inline F LOAD_F(const float *a) { F v; memcpy(&v, a, sizeof v); return v; }
static inline void STORE_F(float *a, F v) { memcpy(a, &v, sizeof v); }

struct arrays {
    const float *x, *dy;
    float *out;
    const float *parameters;
    double *sums;       /* two rows of pitch * LANES */
    long rows, features, run, pitch;
};
enum { LANES = 8 };     /* room for the partial sums of a feature */

static long M, C, S, PITCH;
static const float *x, *dy, *p;
static float *y;
static double *s1, *s2;
#define ROW(q, r) ((q) + (r) * C)
#define LINE(q) ((long)(-(uintptr_t)(q) % 64) / 4) /* floats until the next cache line */

/* --- rows: the sums of x and x*x, several rows for each load and store of the sums --- */

static void sums_rest(long rows, long lanes) { /* what whole groups of rows and lanes leave */
    for (long r = 0; r < M; r++)
        for (long j = r < rows ? lanes : 0; j < C; j++) { double v = x[r * C + j]; s1[j] += v; s2[j] += v * v; }
}
static void sums_compiler(void) {
    const float *a = x;
    for (long r = 0; r + 4 <= M; r += 4, a += 4 * C)
        for (long j = 0; j + 16 <= C; j += 16) {
            const F32 b = (F32)a + j;
            F64 u = s1 + j;
            F64 v = s2 + j;
            for (int i = 0; i < 16; i++) {
                double a0 = b[i], a1 = b[C + i], a2 = b[2 * C + i], a3 = b[3 * C + i];
                u[i] += (a0 + a1) + (a2 + a3);
                v[i] += (a0 * a0 + a1 * a1) + (a2 * a2 + a3 * a3);
            }
        }
    sums_rest(M / 4 * 4, C / 16 * 16);
}
#define TREE(b) D a0 = WIDEN(b), a1 = WIDEN((b) + C), a2 = WIDEN((b) + 2 * C), a3 = WIDEN((b) + 3 * C)
#define SUM ((a0 + a1) + (a2 + a3))
#define SQUARES (FMA(a0, a0, a1 * a1) + FMA(a2, a2, a3 * a3))
static void sums_four(void) {
    const float *a = x;
    for (long r = 0; r + 4 <= M; r += 4, a += 4 * C)
        for (long j = 0; j + W <= C; j += W) {
            TREE(a + j);
            STORE(s1 + j, LOAD(s1 + j) + SUM);
            STORE(s2 + j, LOAD(s2 + j) + SQUARES);
        }
    sums_rest(M / 4 * 4, C / W * W);
}
static void sums_eight(void) {
    const float *a = x;
    for (long r = 0; r + 8 <= M; r += 8, a += 8 * C)
        for (long j = 0; j + W <= C; j += W) {
            D u = LOAD(s1 + j), v = LOAD(s2 + j);
            { TREE(a + j); u += SUM; v += SQUARES; }
            { TREE(a + j + 4 * C); u += SUM; v += SQUARES; }
            STORE(s1 + j, u);
            STORE(s2 + j, v);
        }
    sums_rest(M / 8 * 8, C / W * W);
}

/* --- rows: y = (x - mean)*scale + shift. Not inlined: a compiler forgets restrict when it inlines, and then does not vectorise --- */

#define LOOP __attribute__((noinline)) static void
LOOP y_row(const F32 a, F32 out, long n, const F32 h, const F32 w, const F32 b) {
    for (long i = 0; i < n; i++) out[i] = (a[i] - h[i]) * w[i] + b[i];
}
LOOP y_row_two(const F32 a, F32 out, long n, const F32 w, const F32 b) {
    for (long i = 0; i < n; i++) out[i] = a[i] * w[i] + b[i];
}
LOOP y_row_asked(const F32 a, F32 out, long n, const F32 h, const F32 w, const F32 b) {
    long j = 0;
    for (; j + 16 <= n; j += 16) {
        __builtin_prefetch((char *)(out + j) + 1024, 1);
        for (int i = 0; i < 16; i++) out[j + i] = (a[j + i] - h[j + i]) * w[j + i] + b[j + i];
    }
    for (; j < n; j++) out[j] = (a[j] - h[j]) * w[j] + b[j];
}
LOOP y_rows(const F32 a, F32 y0, F32 y1, F32 y2, F32 y3, long n, const F32 h, const F32 w, const F32 b) {
    for (long i = 0; i < n; i++) {
        float H = h[i], scale = w[i], B = b[i];
        y0[i] = (a[i] - H) * scale + B;
        y1[i] = (a[n + i] - H) * scale + B;
        y2[i] = (a[2 * n + i] - H) * scale + B;
        y3[i] = (a[3 * n + i] - H) * scale + B;
    }
}
#define Y_PARAMETERS p, p + PITCH, p + 2 * PITCH
static void y_one(void) { for (long r = 0; r < M; r++) y_row(ROW(x, r), ROW(y, r), C, Y_PARAMETERS); }
static void y_two(void) { for (long r = 0; r < M; r++) y_row_two(ROW(x, r), ROW(y, r), C, p + PITCH, p + 2 * PITCH); }
static void y_asked(void) { for (long r = 0; r < M; r++) y_row_asked(ROW(x, r), ROW(y, r), C, Y_PARAMETERS); }
static void y_four(void) {
    long r = 0;
    for (; r + 4 <= M; r += 4) y_rows(ROW(x, r), ROW(y, r), ROW(y, r + 1), ROW(y, r + 2), ROW(y, r + 3), C, Y_PARAMETERS);
    for (; r < M; r++) y_row(ROW(x, r), ROW(y, r), C, Y_PARAMETERS);
}
#ifdef __AVX2__
static void y_stream(void) { /* whole lines past the caches, what a row has beside them as usual */
    const float *h = p, *w = p + PITCH, *b = p + 2 * PITCH;
    for (long r = 0; r < M; r++) {
        const float *a = ROW(x, r);
        float *out = ROW(y, r);
        long head = LINE(out) < C ? LINE(out) : C, end = head + (C - head) / 16 * 16;
        y_row((F32)a, out, head, (F32)h, (F32)w, (F32)b);
        for (long i = head; i < end; i += 8) {
            __m256 d = _mm256_sub_ps(_mm256_loadu_ps(a + i), _mm256_loadu_ps(h + i));
            _mm256_stream_ps(out + i, _mm256_add_ps(_mm256_mul_ps(d, _mm256_loadu_ps(w + i)), _mm256_loadu_ps(b + i)));
        }
        y_row((F32)a + end, out + end, C - end, (F32)h + end, (F32)w + end, (F32)b + end);
    }
    _mm_sfence();
}
#endif

/* --- rows: the gradients' sums, and dx --- */

#define XHAT(k) (((a[(k) * n + i] - h[i]) - l[i]) * v[i])
#define GRADIENT_OF_FOUR \
    u[i] += (double)((g[i] + g[n + i]) + (g[2 * n + i] + g[3 * n + i])); \
    t[i] += (double)((g[i] * XHAT(0) + g[n + i] * XHAT(1)) + (g[2 * n + i] * XHAT(2) + g[3 * n + i] * XHAT(3)))
LOOP gradient_rows(const F32 a, const F32 g, long n, const F32 h, const F32 l, const F32 v, F64 u, F64 t) {
    long j = 0;
    for (; j + 16 <= n; j += 16)
        for (long i = j; i < j + 16; i++) { GRADIENT_OF_FOUR; }
    for (long i = j; i < n; i++) { GRADIENT_OF_FOUR; }
}
LOOP gradient_row(const F32 a, const F32 g, long n, const F32 h, const F32 l, const F32 v, F64 u, F64 t) {
    for (long i = 0; i < n; i++) { u[i] += g[i]; t[i] += g[i] * XHAT(0); }
}
static void gradients_four(void) {
    long r = 0;
    for (; r + 4 <= M; r += 4) gradient_rows(ROW((F32)x, r), ROW((F32)dy, r), C, Y_PARAMETERS, s1, s2);
    for (; r < M; r++) gradient_row(ROW((F32)x, r), ROW((F32)dy, r), C, Y_PARAMETERS, s1, s2);
}
#define DX(k) ((g[(k) * n + i] - m) - ((a[(k) * n + i] - h) - l) * s) * w
#define DX_PARAMETERS(i) float h = q[i], l = q[pitch + i], w = q[2 * pitch + i], m = q[3 * pitch + i], s = q[4 * pitch + i]
LOOP dx_row(const F32 a, const F32 g, F32 out, long n, const F32 q, long pitch) {
    for (long i = 0; i < n; i++) { DX_PARAMETERS(i); out[i] = DX(0); }
}
LOOP dx_rows(const F32 a, const F32 g, F32 d0, F32 d1, F32 d2, F32 d3, long n, const F32 q, long pitch) {
    for (long i = 0; i < n; i++) { DX_PARAMETERS(i); d0[i] = DX(0); d1[i] = DX(1); d2[i] = DX(2); d3[i] = DX(3); }
}
static void dx_one(void) { for (long r = 0; r < M; r++) dx_row(ROW(x, r), ROW(dy, r), ROW(y, r), C, p, PITCH); }
static void dx_four(void) {
    long r = 0;
    for (; r + 4 <= M; r += 4) dx_rows(ROW(x, r), ROW(dy, r), ROW(y, r), ROW(y, r + 1), ROW(y, r + 2), ROW(y, r + 3), C, p, PITCH);
    for (; r < M; r++) dx_row(ROW(x, r), ROW(dy, r), ROW(y, r), C, p, PITCH);
}

/* --- planes: runs of one feature, its parameters in registers --- */

#define RUN(q, n, c) ((q) + ((n) * C + (c)) * S)
#define IN_MEMORYS_ORDER(call) for (long n = 0; n < M; n++) for (long c = 0; c < C; c++) { call; }
#define FEATURE_BY_FEATURE(call) for (long c = 0; c < C; c++) for (long n = 0; n < M; n++) { call; }

static void add_lanes(void) { /* those of a feature, to the sums where rows have theirs */
    for (long c = 0; c < C; c++) {
        double u = 0, t = 0;
        for (int k = 0; k < LANES; k++) { u += s1[c * LANES + k]; t += s2[c * LANES + k]; }
        s1[c] = u;
        s2[c] = t;
    }
}
static void clear_lanes(void) {
    memset(s1, 0, sizeof *s1 * LANES * C);
    memset(s2, 0, sizeof *s2 * LANES * C);
}
static inline void run_sums(const float *a, double *lanes1, double *lanes2) {
    D u = LOAD(lanes1), v = LOAD(lanes2), zero = u - u, u1 = zero, u2 = zero, u3 = zero, v1 = zero, v2 = zero, v3 = zero;
    long i = 0;
    for (; i + 4 * W <= S; i += 4 * W) {
        D a0 = WIDEN(a + i), a1 = WIDEN(a + i + W), a2 = WIDEN(a + i + 2 * W), a3 = WIDEN(a + i + 3 * W);
        u += a0; u1 += a1; u2 += a2; u3 += a3;
        v = FMA(a0, a0, v); v1 = FMA(a1, a1, v1); v2 = FMA(a2, a2, v2); v3 = FMA(a3, a3, v3);
    }
    for (; i + W <= S; i += W) { D a0 = WIDEN(a + i); u += a0; v = FMA(a0, a0, v); }
    for (; i < S; i++) { double a0 = a[i]; u[0] += a0; v[0] += a0 * a0; }
    STORE(lanes1, (u + u1) + (u2 + u3));
    STORE(lanes2, (v + v1) + (v2 + v3));
}
#define RUN_SUMS run_sums(RUN(x, n, c), s1 + c * LANES, s2 + c * LANES)
static void sums_memory(void) { clear_lanes(); IN_MEMORYS_ORDER(RUN_SUMS) add_lanes(); }
static void sums_feature(void) { clear_lanes(); FEATURE_BY_FEATURE(RUN_SUMS) add_lanes(); }

static inline void run_gradients(const float *a, const float *g, float h, float l, float v, double *lanes1, double *lanes2) {
#define RUN_XHAT(a) (((a) - h) - l) * v
    D u = LOAD(lanes1), t = LOAD(lanes2), u1 = u - u, t1 = u1;
    long j = 0, next = 2 * W;
    for (; j + 4 * next <= S; j += 4 * next) { /* trees of four in float32, as rows have them */
        F g0 = LOAD_F(g + j), g1 = LOAD_F(g + j + next), g2 = LOAD_F(g + j + 2 * next), g3 = LOAD_F(g + j + 3 * next);
        F t0 = g0 * RUN_XHAT(LOAD_F(a + j)) + g1 * RUN_XHAT(LOAD_F(a + j + next));
        F t2 = g2 * RUN_XHAT(LOAD_F(a + j + 2 * next)) + g3 * RUN_XHAT(LOAD_F(a + j + 3 * next));
        F sum = (g0 + g1) + (g2 + g3), products = t0 + t2;
        u += LOW(sum); u1 += HIGH(sum);
        t += LOW(products); t1 += HIGH(products);
    }
    for (; j + next <= S; j += next) {
        F sum = LOAD_F(g + j), products = sum * RUN_XHAT(LOAD_F(a + j));
        u += LOW(sum); u1 += HIGH(sum);
        t += LOW(products); t1 += HIGH(products);
    }
    for (; j < S; j++) { u[0] += g[j]; t[0] += g[j] * RUN_XHAT(a[j]); }
    STORE(lanes1, u + u1);
    STORE(lanes2, t + t1);
}
#define RUN_GRADIENTS \
    run_gradients(RUN(x, n, c), RUN(dy, n, c), p[c], p[PITCH + c], p[2 * PITCH + c], s1 + c * LANES, s2 + c * LANES)
static void gradients_memory(void) { clear_lanes(); IN_MEMORYS_ORDER(RUN_GRADIENTS) add_lanes(); }
static void gradients_feature(void) { clear_lanes(); FEATURE_BY_FEATURE(RUN_GRADIENTS) add_lanes(); }

#define Y_OF_RUN(i) (a[i] - h) * w + b
LOOP run_y(const F32 a, F32 out, long n, float h, float w, float b) {
    for (long i = 0; i < n; i++) out[i] = Y_OF_RUN(i);
}
LOOP run_y_peeled(const F32 a, F32 out, long n, float h, float w, float b) { /* no store crosses a line */
    long i = 0, head = LINE(out);
    for (; i < head && i < n; i++) out[i] = Y_OF_RUN(i);
    for (; i < n; i++) out[i] = Y_OF_RUN(i);
}
LOOP run_y_asked(const F32 a, F32 out, long n, float h, float w, float b) {
    long j = 0;
    for (; j + 16 <= n; j += 16) {
        __builtin_prefetch((char *)(out + j) + 1024, 1);
        for (int i = 0; i < 16; i++) out[j + i] = Y_OF_RUN(j + i);
    }
    for (; j < n; j++) out[j] = Y_OF_RUN(j);
}
#define RUN_Y(form) form((F32)RUN(x, n, c), (F32)RUN(y, n, c), S, p[c], p[PITCH + c], p[2 * PITCH + c])
static void y_run(void) { IN_MEMORYS_ORDER(RUN_Y(run_y)) }
static void y_run_peeled(void) { IN_MEMORYS_ORDER(RUN_Y(run_y_peeled)) }
static void y_run_asked(void) { IN_MEMORYS_ORDER(RUN_Y(run_y_asked)) }
LOOP run_y_overlapped(const F32 a, F32 out, long n, float h, float w, float b) { /* the last vector begins in the one before */
    enum { next = 2 * W };
    if (n < next) { run_y(a, out, n, h, w, b); return; }
    for (long i = 0; i + next <= n; i += next) STORE_F(out + i, (LOAD_F(a + i) - h) * w + b);
    STORE_F(out + n - next, (LOAD_F(a + n - next) - h) * w + b);
}
static void y_run_overlapped(void) { IN_MEMORYS_ORDER(RUN_Y(run_y_overlapped)) }
#ifdef __AVX2__
LOOP run_y_streamed(const F32 a, F32 out, long n, float h, float w, float b) {
    __m256 H = _mm256_set1_ps(h), Q = _mm256_set1_ps(w), B = _mm256_set1_ps(b);
    long head = LINE(out) < n ? LINE(out) : n, end = head + (n - head) / 16 * 16;
    for (long i = 0; i < head; i++) out[i] = Y_OF_RUN(i);
    for (long i = head; i < end; i += 8)
        _mm256_stream_ps(out + i, _mm256_add_ps(_mm256_mul_ps(_mm256_sub_ps(_mm256_loadu_ps(a + i), H), Q), B));
    for (long i = end; i < n; i++) out[i] = Y_OF_RUN(i);
}
static void y_run_streamed(void) { IN_MEMORYS_ORDER(RUN_Y(run_y_streamed)) _mm_sfence(); }
#endif

#define DX_OF_RUN(i) ((g[i] - m) - ((a[i] - h) - l) * s) * w
#define DX_OF(form) LOOP form(const F32 a, const F32 g, F32 out, long n, float h, float l, float w, float m, float s)
DX_OF(run_dx) {
    for (long i = 0; i < n; i++) out[i] = DX_OF_RUN(i);
}
DX_OF(run_dx_peeled) {
    long i = 0, head = LINE(out);
    for (; i < head && i < n; i++) out[i] = DX_OF_RUN(i);
    for (; i < n; i++) out[i] = DX_OF_RUN(i);
}
#define RUN_DX(form) \
    form((F32)RUN(x, n, c), (F32)RUN(dy, n, c), RUN(y, n, c), S, p[c], p[PITCH + c], p[2 * PITCH + c], p[3 * PITCH + c], p[4 * PITCH + c])
static void dx_run(void) { IN_MEMORYS_ORDER(RUN_DX(run_dx)) }
static void dx_run_peeled(void) { IN_MEMORYS_ORDER(RUN_DX(run_dx_peeled)) }

/* --- what limit.py calls --- */

static const struct { const char *layout, *pass, *name; void (*run)(void); } loops[] = {
    {"rows", "sums", "compiler's", sums_compiler}, {"rows", "sums", "four rows", sums_four}, {"rows", "sums", "eight rows", sums_eight},
    {"rows", "y", "one row", y_one}, {"rows", "y", "two parameters", y_two}, {"rows", "y", "lines asked for", y_asked},
    {"rows", "y", "four rows", y_four},
    {"rows", "gradients", "four rows", gradients_four}, {"rows", "dx", "one row", dx_one}, {"rows", "dx", "four rows", dx_four},
    {"planes", "sums", "memory's order", sums_memory}, {"planes", "sums", "feature by feature", sums_feature},
    {"planes", "y", "as it comes", y_run}, {"planes", "y", "peeled", y_run_peeled}, {"planes", "y", "lines asked for", y_run_asked},
    {"planes", "y", "overlapped", y_run_overlapped},
    {"planes", "gradients", "memory's order", gradients_memory}, {"planes", "gradients", "feature by feature", gradients_feature},
    {"planes", "dx", "as it comes", dx_run}, {"planes", "dx", "peeled", dx_run_peeled},
#ifdef __AVX2__
    {"rows", "y", "streamed", y_stream}, {"planes", "y", "streamed", y_run_streamed},
#endif
};

int number_of_loops(void) { return sizeof loops / sizeof *loops; }
const char *loop_layout(int k) { return loops[k].layout; }
const char *loop_pass(int k) { return loops[k].pass; }
const char *loop_name(int k) { return loops[k].name; }

/* Seconds of so many calls. Timed here: a call from Python would weigh as much as the work of a small one. */
double loop_seconds(int k, const struct arrays *a, long count) {
    struct timespec start, end;
    M = a->rows; C = a->features; S = a->run; PITCH = a->pitch;
    x = a->x; dy = a->dy; y = a->out; p = a->parameters; s1 = a->sums; s2 = a->sums + LANES * PITCH;
    clock_gettime(CLOCK_MONOTONIC, &start);
    for (long i = 0; i < count; i++) loops[k].run();
    clock_gettime(CLOCK_MONOTONIC, &end);
    return (double)(end.tv_sec - start.tv_sec) + 1e-9 * (double)(end.tv_nsec - start.tv_nsec);
}
