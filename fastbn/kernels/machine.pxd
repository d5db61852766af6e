# What may be chosen by processor, because none of it changes a bit of any result: families.py has the numbers and what measured them.
ctypedef struct Settings:
    Py_ssize_t l2_bytes                     # second-level cache of one core; this and the next are for people, and for other numbers
    Py_ssize_t l3_bytes                     # what a process can count on of the last-level cache
    int rows_at_once                        # rows of y or dx that are written together: 4 or 1
    Py_ssize_t rows_at_once_to_bytes        # ... while what is read and written together is no larger than this
    Py_ssize_t read_ahead_bytes             # distance at which sums ask for lines of x and dy; 0: never
    Py_ssize_t read_ahead_in_planes_bytes   # ... of planes, whose pieces of memory are shorter
    Py_ssize_t read_ahead_from_bytes        # ... where what is read is at least this large
    Py_ssize_t write_ahead_bytes            # distance at which rows written one at a time ask for lines of y or dx; 0: never
    Py_ssize_t write_ahead_from_bytes       # ... where the output is at least this large
    Py_ssize_t write_ahead_to_bytes         # ... and at most this
    Py_ssize_t stream_from_bytes            # an output of this size or more is written past the caches, where x was summed first
    Py_ssize_t stream_inference_from_bytes  # ... in inference
    Py_ssize_t batched_runs_below_elements  # shorter runs of one feature go to the first-level cache, several at a time, where the output is streamed
    Py_ssize_t feature_by_feature_from_bytes    # of a plane: all passes over one feature's come before the next feature
    Py_ssize_t parallel_from_elements       # fewest elements read that are worth a parallel region

cdef const Settings *settings() noexcept nogil
cdef int threads(int asked) noexcept nogil
cpdef int checked_threads(object n) except -1
