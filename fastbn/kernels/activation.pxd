"""The fused activations and their gradients, element by element."""
from fastbn.kernels.job cimport LEAKY_RELU, RELU, Activation
from fastbn.kernels.types cimport real


cdef inline real act(real z, const Activation activation) noexcept nogil:
    if activation == RELU:
        return <real>0 if z < 0 else z
    if activation == LEAKY_RELU:
        return z * <real>0.01 if z < 0 else z
    return z


cdef inline real unact(real dy, real z, const Activation activation) noexcept nogil:
    """The gradient before the activation, from the one behind it."""
    if activation == RELU:
        return <real>0 if z <= 0 else dy
    if activation == LEAKY_RELU:
        return dy * <real>0.01 if z <= 0 else dy
    return dy
