"""Changes of several arrays and attributes as one.

Design: Python runs the handlers of signals (Ctrl-C is one) between two of its own steps, never within one call of compiled code. What a handler
raises therefore leaves the caller's state as it was before the change, or as it is after it. So arrays, values and attributes must be plain ones:
a method written in Python that setting them calls would be such a step.
"""


def change(arrays, object owner=None, **attributes):
    """Copy each value into its array, given as pairs that fit, and then set the owner's attributes."""
    for array, value in arrays:
        array[...] = value
    for name, value in attributes.items():
        setattr(owner, name, value)
