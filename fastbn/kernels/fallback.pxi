# float32 features whose parameters float32 cannot hold, in float64: serial, plain loops, since they are rare. Included in batchnorm.pyx.
#
# The other features get the bits that they would have had without these: their output is the loops' own arithmetic, element by element. All of it is
# written here, since x may be the output's own memory, where nothing can be written twice.

cdef inline double x_hat_of(const Job *job, double x, Py_ssize_t c) noexcept nogil:
    return (x - job.mean[c] - job.mean_low[c]) * (1 / sqrt(job.var[c] + job.eps))


cdef inline double g_of(const Job *job, float dy, double x_hat, Py_ssize_t c) noexcept nogil:
    return unact(dy, <float>(x_hat * job.weight[c] + job.bias[c]), job.activation)


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
        if not held(params + c, w.pitch, job.weight[c]):
            job.dweight[c] = job.dbias[c] = 0
            for m in range(job.M):
                at = (m * job.C + c) * job.S
                for i in range(job.S):
                    x_hat = x_hat_of(job, x[at + i], c)
                    g = g_of(job, dy[at + i], x_hat, c)
                    job.dbias[c] += g
                    job.dweight[c] += g * x_hat


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
    cdef double x_hat
    cdef double g
    cdef double per = 1 / job.count
    for m in range(job.M):
        for c in range(job.C):
            p = params + c
            if held(p, pitch, job.weight[c]):
                for i in range(at, at + job.S):
                    y[i] = element(x[i], dy[i], p[0], p[LOW * pitch], p[WEIGHT * pitch], p[SHIFT * pitch], p[MEAN_DY * pitch],
                                   p[SLOPE * pitch], op, job.activation)
            else:
                for i in range(at, at + job.S):
                    x_hat = x_hat_of(job, x[i], c)
                    if op == Y:
                        y[i] = act(<float>(x_hat * job.weight[c] + job.bias[c]), job.activation)
                    else:
                        g = g_of(job, dy[i], x_hat, c)
                        if op == DX:
                            g = (g - job.dbias[c] * per) - x_hat * (job.dweight[c] * per)
                        y[i] = g * (job.weight[c] * (1 / sqrt(job.var[c] + job.eps)))
            at += job.S
