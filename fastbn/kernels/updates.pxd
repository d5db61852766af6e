# Design: what crosses from steps.pyx, compiled once, to optim.pyx, compiled once per instruction set.

# The scalars of one step, in float64; the loops round them to the arrays' type.
ctypedef struct Rule:
    double lr            # in Adam over 1 - beta1^t
    double decay         # weight decay; in Adam what is left of the parameter: 1 - lr*weight_decay
    double momentum
    bint nesterov
    double beta1
    double beta2         # RMSprop's alpha
    double correction    # sqrt(1 - beta2^t)
    double eps

# One parameter: contiguous arrays of one size and type that do not overlap.
ctypedef struct Arrays:
    void *data[4]        # parameter [in, out], gradient [in], buffers [in, out]
    int buffers
    bint is_float64
    Py_ssize_t size

# Elements first to first + n. Elements do not meet, so any cut gives the same bits.
ctypedef void (*Update)(Rule *rule, Arrays *arrays, Py_ssize_t first, Py_ssize_t n) noexcept nogil

ctypedef struct Updates:
    Update sgd
    Update rmsprop
    Update adam
