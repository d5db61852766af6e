"""Streaming stores and prefetches: what stores.h says, and why."""

cdef extern from "stores.h" nogil:
    const bint FASTBN_STREAMS    # whether streaming stores differ from plain ones here
    void stream_line "fastbn_stream_line"(void *to, const void *source) noexcept
    void stream_fence "fastbn_stream_fence"() noexcept
    void prefetch "fastbn_prefetch"(const void *p, int lines, Py_ssize_t apart) noexcept
