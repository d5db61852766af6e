"""How this thread's processor rounds: rounding.h says why it is looked at."""

cdef extern from "rounding.h":
    ctypedef unsigned long long Control "fastbn_control"
    Control ieee "fastbn_ieee"() noexcept nogil
    void as_before "fastbn_as_before"(Control word) noexcept nogil
