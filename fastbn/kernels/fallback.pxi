# float32 features whose parameters float32 cannot hold, in float64: serial, plain loops, since they are rare. Included in batchnorm.pyx.
#
# The other features get the bits that they would have had without these: their output is the loops' own arithmetic, element by element. All of it is
# written here, at once: x may be the output's own memory.

cdef inline double x_hat_of(const Job *job, double x, Py_ssize_t c) noexcept nogil:
    return (x - job.mean[c] - job.mean_low[c]) * (1 / sqrt(job.var[c] + job.eps))


cdef inline float z_of(const Job *job, double x_hat, Py_ssize_t c) noexcept nogil:
    """What the activation is applied to, in forward and backward alike, so that both see one sign."""
    return <float>(x_hat * job.weight[c] + job.bias[c])


cdef void sum_beyond(Work *w, f32 params) noexcept nogil:
    """dweight and dbias of the features that float32 cannot hold."""
    cdef Job *job = w.job
    cdef f32 x = <f32>job.x
    cdef f32 dy = <f32>job.dy
    cdef Py_ssize_t c
    cdef Py_ssize_t m
    cdef Py_ssize_t i
    cdef Py_ssize_t at
    cdef double g
    cdef double x_hat
    for c in range(job.C):
        if not forward_fits(params + c, w.pitch, job.weight[c]):
            job.dweight[c] = job.dbias[c] = 0
            for m in range(job.M):
                at = (m * job.C + c) * job.S
                for i in range(at, at + job.S):
                    x_hat = x_hat_of(job, x[i], c)
                    g = unact(dy[i], z_of(job, x_hat, c), job.activation)
                    job.dbias[c] += g
                    job.dweight[c] += g * x_hat


cdef inline float element_beyond(const Job *job, float x, float dy, f32 p, Py_ssize_t pitch, bint forward_fit, const Operation op,
                                 Py_ssize_t c) noexcept nogil:
    cdef double x_hat = x_hat_of(job, x, c)
    cdef float z = z_of(job, x_hat, c)
    cdef double g
    if op == Y:
        return act(z, job.activation)
    if forward_fit:
        # y was written by the loops, and so its sign is theirs.
        z = (x - p[0]) * p[WEIGHT * pitch] + p[SHIFT * pitch]
    g = unact(dy, z, job.activation)
    if op == DX:
        g = (g - job.dbias[c] / job.count) - x_hat * (job.dweight[c] / job.count)
    return g * (job.weight[c] * (1 / sqrt(job.var[c] + job.eps)))


cdef void write_beyond(Work *w, f32 params) noexcept nogil:
    """All of y, or of dx."""
    cdef Job *job = w.job
    cdef f32 x = <f32>job.x
    cdef f32 y = <f32>job.y
    cdef Operation op = operation(job)
    cdef f32 dy = x if op == Y else <f32>job.dy
    cdef f32 p
    cdef Py_ssize_t pitch = w.pitch
    cdef Py_ssize_t c
    cdef Py_ssize_t m
    cdef Py_ssize_t i
    cdef Py_ssize_t at = 0
    cdef bint fit
    for m in range(job.M):
        for c in range(job.C):
            p = params + c
            fit = forward_fits(p, pitch, job.weight[c])
            if fit and (op != DX or backward_fits(p, pitch, job.dweight[c])):
                write(x + at, dy + at, y + at, job.S, p, pitch, True, op, job.activation)
            else:
                for i in range(at, at + job.S):
                    y[i] = element_beyond(job, x[i], dy[i], p, pitch, fit, op, c)
            at += job.S
