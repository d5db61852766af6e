"""Changes of several arrays and attributes as one.

Design: Python runs the handlers of signals (Ctrl-C is one) between two of its own steps, never within one call of compiled code. What a handler
raises therefore leaves the caller's state as it was before the change, or as it is after it. So arrays, values and attributes must be plain ones:
a method written in Python that setting them calls would be such a step.
What can fail comes first: memory for the values, an array that is read-only, a value out of the dtype's range where such a warning is an error.
"""
import numpy as np

cimport numpy as cnp

cnp.import_array()


def change(arrays, *attributes):
    """Copy each value into its array, given as pairs that fit, and then set attributes, given as (owner, name, value)."""
    cdef list pairs = []
    for array, value in arrays:
        if not array.flags.writeable:
            raise ValueError("expected arrays that can be written into, got a read-only one")
        # A copy: the value may be a view of an array that changes before its turn comes.
        pairs.append((array, np.array(value, dtype=array.dtype)))
    for array, value in pairs:
        cnp.PyArray_CopyInto(array, value)
    for owner, name, value in attributes:
        setattr(owner, name, value)
