# Design: what crosses from calls.pyx, compiled once, to batchnorm.pyx, compiled once per instruction set.
# One Job describes one call; each build fills one Table with its kernels. Neither side allocates for the other.
from fastbn.kernels.machine cimport Settings

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
    const Settings *settings
    # (M, C, S), the dtype above.
    void *x        # [in]
    void *dy       # [in] gradient kernels
    void *y        # [out] y, or dx where a kernel gives that; may be x (y) or dy (dx) itself, never a part of it
    # (C,)
    double *weight  # [in]
    double *bias    # [in]
    double *mean      # [out] moments and forward, [in] elsewhere: the mean is mean + mean_low
    double *mean_low
    double *var       # of 1/m
    double *dweight   # [out] backward and gradients, [in] input_gradient
    double *dbias
    bint training    # [in] gradient kernels: whether mean and var depend on x
    double count     # [in] input_gradient, [out] backward: values of a feature that dweight and dbias are summed over
    # normalize alone: the parameter rows, in memory that lasts beyond the call, or NULL.
    void *table      # [out] or, where prepared, [in]: table_bytes, which suit the shape, the dtype and the place of y within its cache line
    bint prepared    # [in, out] whether the rows are there

ctypedef struct Kernel:
    int (*run)(Job *job) noexcept nogil    # 0, or -1 where memory ran out, before anything is written
    int reads      # arrays of x's size that it reads, each time counted

ctypedef struct Table:
    Kernel moments           # mean, mean_low, var of x
    Kernel normalize         # y = activation((x - mean) * weight / sqrt(var + eps) + bias)
    Kernel forward           # moments and normalize in one
    Kernel gradients         # dweight, dbias
    Kernel input_gradient    # dx from dweight and dbias
    Kernel backward          # gradients and input_gradient in one
    Py_ssize_t (*table_bytes)(Job *job) noexcept nogil
