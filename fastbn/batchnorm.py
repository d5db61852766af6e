"""The BatchNorm layer: parameters, mode, running statistics, the saved batch. No arithmetic on x stands here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from . import batches, calls
from .atomic import change
from .kernels import machine
from .state import Array, Arrays, Held, check_state, checked_dtype, whole


class BatchNorm(calls.Callable):
    """Batch normalization of an array with C features along one axis (Ioffe & Szegedy 2015).

    In training, each feature is normalised with its own mean and variance over the batch::

        y = (x - mean)/sqrt(var + eps)*weight + bias
        running = (1 - momentum)*running + momentum*batch

    The second line updates the running statistics: running_mean by the batch's mean, running_var by its variance. In
    inference, y is computed from the running statistics instead. Call the layer itself, ``y = bn(x)``; `train` and
    `eval` switch between the two modes. A new layer is in training mode.

    In the shapes below, N counts examples. x may have any shape, such as (N, C), (N, C, L) or (N, C, H, W), and with
    ``axis=-1`` channels-last, (N, H, W, C). m is the number of values of one feature in the batch.

    Parameters
    ----------
    num_features : int
        Number of features, C, at least 1.
    eps : float
        Positive number that is added to the variance.
    momentum : float or None
        Weight of the newest batch in the running statistics. PyTorch's momentum is the same number, Keras's is
        ``1 - momentum``. With None the running statistics are the plain average of all batches. running_var averages
        the variances within batches. The distances between the means of batches are not in it;
        `fastbn.training.recalibrate` takes them in.
    affine : bool
        Whether the layer has weight (ones at the start) and bias (zeros at the start).
    track_running_stats : bool
        Whether the layer has running statistics. Without them, inference uses the batch's statistics, as in PyTorch.
    axis : int
        The feature axis: 1 for (N, C, ...), -1 for channels-last, 0 for (C, ...).
    dtype : {"float32", "float64"}
        Type of weight, bias and their gradients. x may be of either type, and y has the type of x. Statistics are
        float64 in any case.
    activation : {None, "relu", "leaky_relu"}
        Function that is applied to y in the same pass over memory. backward takes it into account. The slope of
        leaky_relu is 0.01.
    unbiased : bool
        Whether running_var averages variances of ``1/(m - 1)``, as in PyTorch, or of ``1/m``, as in Keras and ONNX. The
        batch itself is always normalised with the variance of ``1/m``.
    num_threads : int, optional
        Number of threads for this layer. The default is `fastbn.get_num_threads`.
    ghost_size : int, optional
        Number of examples that are normalised together in training: every so many examples are a batch of their own
        (Hoffer, Hubara & Soudry 2017), and the running statistics take one after the other. A single example that is
        left over joins the batch before it. The examples lie along the first axis that is not the feature axis.
    renorm : (r_max, d_max), optional
        Limits of batch renormalisation (Ioffe 2017). In training, the normalised value x_hat is replaced by
        ``x_hat*r + d``. There r is ``std/running_std``, limited to ``[1/r_max, r_max]``, and d is
        ``(mean - running_mean)/running_std``, limited to ``[-d_max, d_max]``. The running statistics are those before
        this batch, and running_std is ``sqrt(running_var + eps)``. The gradients take r and d as constants. (1, 0) is
        plain batch normalization. The paper starts with it, and goes over to (3, 5) once the running statistics have
        settled. It needs running statistics.

    Attributes
    ----------
    weight, bias : numpy.ndarray of shape (C,), or None
        Parameters. Assigning copies into the array.
    running_mean, running_var : numpy.ndarray of shape (C,), float64, or None
        Running statistics. Assigning copies into the array.
    num_batches_tracked : int
        Number of batches that the running statistics have seen.
    training, frozen : bool
        Mode of the layer, see `train` and `freeze`.
    renorm : (float, float) or None
        Limits of batch renormalisation. They may be assigned between batches.
    num_features, eps, momentum, axis, dtype, activation, unbiased, num_threads, ghost_size
        Arguments of the constructor. They cannot be assigned.
    params, grads : dict of numpy.ndarray
        Parameters and their gradients, both under the keys "weight" and "bias". The gradients are those of the last
        backward, and zeros before it. The arrays stay the same objects.

    Notes
    -----
    forward keeps references to x and mask. If you change them before backward, the gradients are wrong. A linear layer
    that feeds BatchNorm needs no bias, because the normalisation takes it away. Several threads may call one layer in
    inference at once.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> bn = fastbn.BatchNorm(2)
    >>> x = np.array([[1, 10], [3, 30]], dtype=np.float32)
    >>> bn(x).round(3)
    array([[-1., -1.],
           [ 1.,  1.]], dtype=float32)
    >>> bn.running_mean
    array([0.2, 2. ])
    >>> bn.eval()(x[:1]).shape
    (1, 2)
    >>> bn.train()([[1, 10], [3, 30], [0, 0]], mask=[True, True, False]).round(3)
    array([[-1., -1.],
           [ 1.,  1.],
           [ 0.,  0.]])
    """

    weight, bias, running_mean, running_var = Held(), Held(), Held(), Held()

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        axis: int = 1,
        dtype: DTypeLike = "float32",
        activation: str | None = None,
        unbiased: bool = True,
        num_threads: int | None = None,
        ghost_size: int | None = None,
        renorm: tuple[float, float] | None = None,
    ) -> None:
        self._num_features = whole(num_features, "num_features")
        if self._num_features < 1:
            raise ValueError(f"expected num_features to be at least 1, got {num_features}")
        if momentum is not None and not math.isfinite(momentum):
            raise ValueError(f"expected momentum to be finite or None, got {momentum!r}")
        self._dtype = checked_dtype(dtype)
        self._eps = float(eps)
        self._momentum = None if momentum is None else float(momentum)
        self._axis = whole(axis, "axis")
        self._activation = activation
        self._unbiased = bool(unbiased)
        self._num_threads = num_threads
        self._ghost_size = None if ghost_size is None else whole(ghost_size, "ghost_size")
        if self._ghost_size is not None and self._ghost_size < 1:
            raise ValueError(f"expected ghost_size to be at least 1 or None, got {ghost_size}")
        self.training = True
        self.frozen = False
        names = ("weight", "bias") if affine else ()
        self.params = Arrays({name: np.zeros(self._num_features, self._dtype) for name in names})
        self.grads = Arrays({name: np.zeros(self._num_features, self._dtype) for name in names})
        self._running_mean = np.zeros(self._num_features) if track_running_stats else None
        self._running_var = np.zeros(self._num_features) if track_running_stats else None
        self._renorm = self._checked_renorm(renorm)
        self._connect()
        self.reset_parameters()
        self.reset_running_stats()

    def _connect(self) -> None:
        self._weight = self.params.get("weight")
        self._bias = self.params.get("bias")
        self._constants = calls.Constants(
            self._num_features, self._weight, self._bias, self._eps, mean=self._running_mean, var=self._running_var,
            unbiased=self._unbiased, axis=self._axis, activation=self._activation, num_threads=self._num_threads,
            renorm=self._renorm, lasting=True,
        )  # fmt: skip
        self._saved = None

    # --- the layer

    def forward(self, x: ArrayLike, out: Array | None = None, *, mask: ArrayLike | None = None) -> Array:
        """Normalise x: with its own statistics in training, with the running ones in inference.

        Parameters
        ----------
        x : array_like of float32 or float64
            Array with C features along the feature axis. Integers and bool become float64. Strided and byte-swapped
            arrays are copied first.
        out : numpy.ndarray, optional
            Array of the shape and dtype of x, which receives y. It may be x itself; backward is then not possible.
        mask : array_like of bool, optional
            Array of the shape of x without the feature axis, True where a position is valid, as in padded sequences.
            All other positions are left out of the statistics, whatever stands there, and y and dx are 0 there. The
            valid positions are copied.

        Returns
        -------
        numpy.ndarray
            y, of the shape, dtype and memory order of x; out itself if it was given.

        Raises
        ------
        ValueError
            Another number of features, a single (valid) value per feature in training, a mask or an out of another
            shape, or an out that partly overlaps x.
        TypeError
            Another dtype, or a masked array.
        numpy.exceptions.AxisError
            x has no such axis.
        """
        return super().__call__(x, out, mask=mask)

    def _forward_in_batches(self, x: ArrayLike, out: Array | None, mask: ArrayLike | None, training: bool) -> Array:
        ghost_size = self._ghost_size if self.training and not self.frozen else None
        averaging = self._momentum, self.num_batches_tracked
        y, parts, kept, averages, n = batches.forward(self._constants, x, out, mask, training, ghost_size, averaging)
        saved = (batches.backward, x, parts, training) if kept else None
        change(averages, (self, "num_batches_tracked", n), (self, "_saved", saved))
        return y

    def fold(self) -> tuple[Array, Array]:
        """Return the inference forward as one scale and one shift for each feature.

        Returns
        -------
        scale, shift : numpy.ndarray of shape (C,), float64
            Two arrays such that, in exact arithmetic, the inference forward before the activation is
            ``x*scale + shift``.

        Raises
        ------
        ValueError
            The layer has no running statistics.
        """
        if self._running_mean is None or self._running_var is None:
            raise ValueError("expected running statistics to fold, got a layer with track_running_stats=False")
        with np.errstate(all="ignore"):  # as in the forward: what is not finite stays in its feature, without a word
            scale = 1 / np.sqrt(self._running_var + self._eps)
            shift = np.zeros_like(scale)
            if self._weight is not None and self._bias is not None:
                scale *= self._weight
                shift += self._bias
            return scale, shift - self._running_mean * scale

    # --- mode and state

    def train(self, mode: bool = True) -> Self:
        """Switch to training, or with False to inference, and return the layer."""
        self.training = bool(mode)
        return self

    def eval(self) -> Self:
        """Switch to inference, and return the layer."""
        return self.train(False)

    def freeze(self, mode: bool = True) -> Self:
        """Use the running statistics in training too, and leave them as they are, while weight and bias still train.

        This serves fine-tuning on small batches. It lasts through `train` and `eval`, until ``freeze(False)``.

        Returns
        -------
        BatchNorm
            The layer itself.

        Raises
        ------
        ValueError
            The layer has no running statistics.
        """
        if self._running_mean is None:
            raise ValueError("expected running statistics to freeze, got a layer with track_running_stats=False")
        self.frozen = bool(mode)
        return self

    def reset_running_stats(self) -> None:
        """Set running_mean to 0, running_var to 1 and num_batches_tracked to 0."""
        if self._running_mean is None or self._running_var is None:
            self.num_batches_tracked = 0
            return
        change([(self._running_mean, 0), (self._running_var, 1)], (self, "num_batches_tracked", 0))

    def reset_parameters(self) -> None:
        """Set weight to 1 and bias to 0."""
        if self._weight is not None and self._bias is not None:
            change([(self._weight, 1), (self._bias, 0)])

    def state_dict(self) -> dict[str, Array]:
        """Return copies of parameters and running statistics, under PyTorch's keys."""
        state = {name: array.copy() for name, array in self._arrays().items()}
        if self._running_mean is not None:
            state["num_batches_tracked"] = np.array(self.num_batches_tracked, dtype=np.int64)
        return state

    def load_state_dict(self, state: Mapping[str, ArrayLike]) -> None:
        """Take over parameters and running statistics from a `state_dict`, this library's or PyTorch's.

        Parameters
        ----------
        state : mapping of str to array_like
            Arrays under all keys of this layer, and no others; they are copied. ``num_batches_tracked`` may be
            missing, as in states of PyTorch before 0.4.1, and becomes 0 then. It may be of any dtype and of shape (1,),
            if it is a whole number.

        Raises
        ------
        ValueError
            A missing or unknown key, another shape, or a value that is not a real number. Nothing has been changed
            then.
        """
        given = check_state(state, self.state_dict())
        tracked = int(given.get("num_batches_tracked", self.num_batches_tracked))
        arrays = [(array, given[name]) for name, array in self._arrays().items()]
        change(arrays, (self, "num_batches_tracked", tracked))

    def _arrays(self) -> dict[str, Array]:
        arrays = dict(self.params)
        if self._running_mean is not None and self._running_var is not None:
            arrays |= {"running_mean": self._running_mean, "running_var": self._running_var}
        return arrays

    def __getstate__(self) -> dict[str, Any]:
        made_anew = ("_weight", "_bias")
        compiled = ("training", "frozen", "num_batches_tracked", "_momentum", "_ghost_size", "grads")
        state = {name: value for name, value in self.__dict__.items() if name not in made_anew}
        return state | {name: getattr(self, name) for name in compiled}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
        if self._num_threads is not None:  # of the machine that it was pickled on
            self._num_threads = min(self._num_threads, machine.most_threads())
        self._connect()

    # --- what it is

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments: ``BatchNorm(**bn.config())`` is a fresh layer of the same kind."""
        return {
            "num_features": self._num_features,
            "eps": self._eps,
            "momentum": self._momentum,
            "affine": self._weight is not None,
            "track_running_stats": self._running_mean is not None,
            "axis": self._axis,
            "dtype": self._dtype.name,
            "activation": self._activation,
            "unbiased": self._unbiased,
            "num_threads": self._num_threads,
            "ghost_size": self._ghost_size,
            "renorm": self._renorm,
        }

    def __repr__(self) -> str:
        config = self.config()
        plain = BatchNorm(config.pop("num_features")).config()
        changed = "".join(f", {name}={value!r}" for name, value in config.items() if value != plain[name])
        # Only renorm can be infinite, and Python knows no name for that.
        return f"BatchNorm({self._num_features}{changed})".replace("inf", "float('inf')")

    @property
    def num_features(self) -> int:
        return self._num_features

    @property
    def eps(self) -> float:
        return self._eps

    @property
    def momentum(self) -> float | None:
        return self._momentum

    @property
    def axis(self) -> int:
        return self._axis

    @property
    def activation(self) -> str | None:
        return self._activation

    @property
    def unbiased(self) -> bool:
        return self._unbiased

    @property
    def num_threads(self) -> int | None:
        return self._num_threads

    @property
    def ghost_size(self) -> int | None:
        return self._ghost_size

    @property
    def renorm(self) -> tuple[float, float] | None:
        return self._renorm

    @renorm.setter
    def renorm(self, limits: tuple[float, float] | None) -> None:
        self._renorm = self._constants.renorm = self._checked_renorm(limits)

    def _checked_renorm(self, limits: tuple[float, float] | None) -> tuple[float, float] | None:
        if limits is None:
            return None
        if self._running_mean is None:
            raise ValueError("expected running statistics for renorm, got a layer with track_running_stats=False")
        numbers = np.shape(limits) == (2,) and all(isinstance(limit, Real) for limit in limits)
        if not (numbers and limits[0] >= 1 and limits[1] >= 0):
            raise ValueError(f"expected renorm to be (r_max, d_max), at least (1, 0), or None, got {limits!r}")
        return float(limits[0]), float(limits[1])

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._dtype
