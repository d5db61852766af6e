cdef int threads(int asked) noexcept nogil
cdef Py_ssize_t cache_bytes() noexcept nogil
cpdef int checked_threads(object n) except -1
