"""Streaming stores, prefetches and vectors of float64: what intrinsics.h says, and why."""

cdef extern from "intrinsics.h" nogil:
    const bint FASTBN_STREAMS    # whether streaming stores differ from plain ones here
    ctypedef struct StepRoom "fastbn_step":
        double elements[16]
    void stream_line "fastbn_stream_line"(void *to, const void *source) noexcept
    void stream_fence "fastbn_stream_fence"() noexcept
    void prefetch "fastbn_prefetch"(const void *p, int lines, Py_ssize_t apart) noexcept

    ctypedef struct vec "fastbn_vec":
        pass
    enum:
        WIDTH "FASTBN_WIDTH"    # float64 values of a vec: 1, 2, 4 or 8
    vec widen "fastbn_widen"(const float *p) noexcept
    vec vec_load "fastbn_vec_load"(const double *p) noexcept
    void vec_store "fastbn_vec_store"(double *p, vec a) noexcept
    vec vec_add "fastbn_vec_add"(vec a, vec b) noexcept
    vec square "fastbn_vec_square"(vec a) noexcept
    vec add_square "fastbn_vec_add_square"(vec t, vec a) noexcept    # t + a*a, for an a whose square is exact: with or without one rounding
