# What the sums of moments.pxi and gradients.pxi have in common: the strips of a task, and the way from lanes to features.
# Included in batchnorm.pyx. A task is chunk k of block b; its sums are (4, sums_pitch): two for each lane, and what each lost.

ctypedef struct Strip:
    Py_ssize_t at         # the first element
    Py_ssize_t rows       # rows of n lanes, ld elements apart; or, of planes, one row of n elements of one feature
    Py_ssize_t ld
    Py_ssize_t n
    Py_ssize_t feature    # within the block, the first one
    Py_ssize_t lane       # within the sums, the first one
    Py_ssize_t ahead      # elements from what is read to what is asked for, or 0
    Py_ssize_t left       # elements from the first one to the end of x

ctypedef struct Task:
    Py_ssize_t k
    Py_ssize_t feature    # the first one
    Py_ssize_t features
    Py_ssize_t lanes
    Py_ssize_t unit       # where the next strip begins
    Py_ssize_t end


cdef inline Py_ssize_t features(const Work *w, Py_ssize_t b) noexcept nogil:
    """How many features block b has: the last one may have fewer."""
    return min(w.plan.block, w.cut.C - b * w.plan.block)


cdef inline Task task_of(Work *w, Py_ssize_t k, Py_ssize_t b) noexcept nogil:
    cdef Task t
    t.k = k
    t.feature = b * w.plan.block
    t.features = features(w, b)
    t.lanes = t.features * (STEP if w.cut.planes else w.cut.S * w.cut.fold)
    t.unit = k * w.cut.chunk
    t.end = min(t.unit + w.cut.chunk, w.cut.units)
    return t


cdef inline void start(Task *t, Strip *s) noexcept nogil:
    s.feature = -1
    s.rows = 0
    s.left = 0
    s.ahead = 0
    s.lane = 0
    s.at = 0
    s.n = 0


cdef inline void clear(const Work *w, const Task *t, double *sums) noexcept nogil:
    """The four sums of each lane, and of those that a last step has besides."""
    cdef int i
    for i in range(4):
        memset(sums + i * w.sums_pitch, 0, ceil_div(t.lanes, STEP) * STEP * sizeof(double))


cdef inline bint next_rows(Work *w, Task *t, Strip *s, Py_ssize_t size) noexcept nogil:
    """A chunk's rows of lanes, and then what is left of a folded one."""
    cdef Py_ssize_t ld = w.cut.fold * w.cut.width
    cdef Py_ssize_t whole = min(t.end, w.cut.M // w.cut.fold) if w.cut.fold > 1 else t.end
    s.feature = 0
    s.ld = ld
    s.at = t.unit * ld + t.feature * w.cut.S
    if t.unit < whole:
        s.rows = whole - t.unit
        s.n = t.lanes
        s.left = w.cut.M * w.cut.width - s.at
        # In the order of memory, or below, where the block is a part of the row.
        s.ahead = 0 if w.plan.read_ahead == 0 else w.plan.read_ahead // size if s.n == ld else 4 * ld
        t.unit = whole
        return True
    if t.unit < t.end:
        s.rows = 1
        s.left = 0
        s.n = w.cut.M % w.cut.fold * w.cut.width
        s.ahead = 0
        t.unit = t.end
        return True
    return False


cdef inline bint next_run(Work *w, Task *t, Strip *s, Py_ssize_t size) noexcept nogil:
    """The pieces of planes of a chunk, those of all features of the block one after the other."""
    cdef Py_ssize_t begin = 0
    s.feature += 1
    s.lane += STEP
    if s.feature == t.features or s.feature == 0:
        if s.feature:
            t.unit += 1
        s.feature = s.lane = 0
        if t.unit == t.end:
            return False
        s.at = (plane_of(&w.cut, t.unit, &begin, &s.n) * w.cut.C + t.feature) * w.cut.S + begin
    else:
        s.at += w.cut.S
    s.ahead = w.plan.read_ahead // size
    s.ahead = s.ahead if s.at + s.n + s.ahead <= w.cut.M * w.cut.width else 0
    s.left = s.n + s.ahead    # as far as this run may ask
    return True


cdef inline void merge_lanes(f64 s, f64 e, Py_ssize_t i, Py_ssize_t j, Py_ssize_t n) noexcept nogil:
    """Add the sums of the n lanes from j on to those of the n lanes from i on, which do not overlap them."""
    cdef Py_ssize_t k
    for k in range(n):
        add(s, e, i + k, s[j + k], True)
        e[i + k] += e[j + k]


cdef void gather(Work *w, Task *t, f64 s, f64 e) noexcept nogil:
    """Add up the lanes of each feature: the sum of the i-th one is left in s[i]."""
    cdef Py_ssize_t lanes = STEP if w.cut.planes else w.cut.S
    cdef Py_ssize_t i
    cdef Py_ssize_t n
    cdef Py_ssize_t half
    for i in range(1, w.cut.fold):
        merge_lanes(s, e, 0, i * w.cut.width, w.cut.width)
    if lanes > 1:
        for i in range(t.features):
            n = lanes
            while n > 1:
                half = (n + 1) // 2
                merge_lanes(s, e, i * lanes, i * lanes + half, n - half)
                n = half
            s[i] = s[i * lanes]
            e[i] = e[i * lanes]
    for i in range(t.features):
        s[i] += e[i]
