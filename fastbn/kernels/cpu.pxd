cdef int threads(int asked) noexcept nogil
cpdef int checked_threads(object n) except -1
