"""Layers for networks around BatchNorm: Dense, activations, Dropout, Flatten, Standardize, Sequential, FoldedDense.

# Design: a layer is any object with forward (= call), backward, params, grads, train, eval, state_dict and
# load_state_dict. It keeps what its backward needs from the last forward; there is no graph. BatchNorm is a
# layer as it stands, and only folding knows it. Arrays in params and grads are created once and written
# in place ever after, so that optimizers and Sequential may hold on to them. Matrix products are NumPy's.
"""

from .activations import Dropout, LeakyReLU, ReLU, Sigmoid, Softmax, Tanh
from .dense import Dense
from .folding import FoldedDense
from .layer import known_as as known_as
from .reshaping import Flatten, Identity
from .sequential import Sequential
from .sequential import leaves as leaves
from .sequential import walk as walk
from .standardize import Standardize

__all__ = [
    "Dense",
    "Dropout",
    "Flatten",
    "FoldedDense",
    "Identity",
    "LeakyReLU",
    "ReLU",
    "Sequential",
    "Sigmoid",
    "Softmax",
    "Standardize",
    "Tanh",
]
