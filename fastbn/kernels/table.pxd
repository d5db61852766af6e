# Design: what crosses from functional.pyx, compiled once, to batchnorm.pyx, compiled once per instruction set.
# One Job describes one call; each build fills one Table with its kernels. Neither side allocates for the other.

cdef enum Activation:
    IDENTITY = 0
    RELU = 1
    LEAKY_RELU = 2

ctypedef struct Job:
    # The view: element (m, c, s) stands at (m*C + c)*S + s. [in]
    Py_ssize_t M
    Py_ssize_t C
    Py_ssize_t S
    bint is_float64
    Activation activation
    double eps
    int num_threads
    # (M, C, S), the dtype above.
    void *x        # [in]
    void *dy       # [in] backward
    void *y        # [out] y, or dx in backward; may be x (forward) or dy (backward) itself, never a part of it
    # (C,)
    double *weight  # [in]
    double *bias    # [in]
    double *mean      # [out] moments and forward, [in] elsewhere: the mean is mean + mean_low
    double *mean_low
    double *var       # of 1/m
    double *dweight  # [out] backward
    double *dbias    # [out] backward
    bint training    # [in] backward: whether mean and var were computed from x
    Py_ssize_t cache    # [in] bytes of the last-level cache

# All return 0, or -1 where memory ran out, before they write anything.
ctypedef int (*Kernel)(Job *job) noexcept nogil

ctypedef struct Table:
    Kernel moments    # mean, mean_low, var of x
    Kernel forward    # moments and normalize in one
    Kernel normalize  # y = activation((x - mean) * weight / sqrt(var + eps) + bias)
    Kernel backward   # dx, dweight, dbias
