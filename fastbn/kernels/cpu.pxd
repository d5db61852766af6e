cdef int threads(int asked) noexcept nogil
