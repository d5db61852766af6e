"""The fused activations and their gradients, element by element."""
from fastbn.kernels.job cimport LEAKY_RELU, RELU, Activation
from fastbn.kernels.types cimport real


cdef inline real larger(real a, real b) noexcept nogil:
    """b where they are equal or one is NaN: so z comes second below, and keeps its NaN and its sign.

    On x86 one instruction, and never a branch, which the ends of rows would pay for element by element.
    """
    return a if a > b else b


cdef inline real act(real z, const Activation activation) noexcept nogil:
    if activation == RELU:
        return larger(<real>0, z)
    if activation == LEAKY_RELU:
        return larger(z * <real>0.01, z)
    return z


cdef inline real unact(real dy, real z, const Activation activation) noexcept nogil:
    """The gradient before the activation, from the one behind it."""
    cdef real small = dy * <real>0.01    # outside of the choice, which is then no branch
    if activation == RELU:
        return <real>0 if z <= 0 else dy
    if activation == LEAKY_RELU:
        return small if z <= 0 else dy
    return dy
