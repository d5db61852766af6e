"""Batch normalization as functions of arrays: the arguments of each become the constants of one call (calls.pyx)."""
import math
import operator

import numpy as np

from fastbn.arguments cimport checked_mask, feature_axis, floating, updatable

from fastbn import calls
from fastbn.atomic import change
from fastbn.batchstats import BatchStats
from fastbn.calls import Constants

__all__ = ["BatchStats", "batch_norm", "batch_norm_backward", "batch_norm_forward", "moments"]


def moments(x, axis=1, *, mask=None):
    """Mean and variance of each feature, in one pass over x.

    Parameters
    ----------
    x : array_like of float32 or float64
        Any shape; integers and bool become float64.
    axis : int
        The feature axis, of length C.
    mask : array_like of bool, optional
        x's shape without the feature axis: True where a position counts. The valid positions are copied.

    Returns
    -------
    BatchStats
        ``mean``, ``mean_low``, ``var`` (of 1/m), float64 of shape (C,), and ``count`` m; NaN where m is 0. For float32 the relative
        error of the standard deviation is below 1e-7, that of the mean below 1e-7 standard deviations.

    Raises
    ------
    TypeError
        For other dtypes and masked arrays.
    numpy.exceptions.AxisError
        Where x has no such axis.
    ValueError
        For a mask of another shape.

    Notes
    -----
    Sums in float64, of x (float32), or of ``x - pivot``, the pivot a value close to the mean (float64, and where the mean is large), in
    chunks of a size that only x's shape decides, merged in order by the rule of Chan, Golub & LeVeque (1979). The bits
    do not depend on the number of threads or on the processor.

    Examples
    --------
    >>> import fastbn
    >>> fastbn.moments([[1.0, 10.0], [3.0, 30.0]]).mean
    array([ 2., 20.])
    >>> fastbn.moments([[1.0, 10.0], [3.0, 30.0]], mask=[True, False]).mean
    array([ 1., 10.])
    """
    if mask is not None:
        x = floating(x, "x")
        k = feature_axis(x, operator.index(axis))
        x = np.moveaxis(x, k, -1)[checked_mask(mask, x, k)]
        axis = 1
    return calls.moments(Constants(axis=axis), x)


def batch_norm_forward(x, weight=None, bias=None, eps=1e-5, *, running=None, axis=1, activation=None, out=None, num_threads=None):
    """Normalise x with its own statistics, and return them for the backward pass.

    ``y = activation((x - mean)/sqrt(var + eps)*weight + bias)`` with the mean and the 1/m variance of each feature
    (Ioffe & Szegedy 2015, algorithm 1).

    Parameters
    ----------
    x : array_like of float32 or float64
        Any shape, C features along `axis`; integers and bool become float64. Strided and byte-swapped arrays are copied first.
    weight, bias : array_like of shape (C,), optional
        Default 1 and 0.
    eps : float
        Positive.
    running : RunningStats, optional
        Updated in the same call.
    axis : int
        The feature axis.
    activation : {None, "relu", "leaky_relu"}
        Applied in the same pass; leaky_relu's slope is 0.01.
    out : numpy.ndarray, optional
        Of x's shape and dtype, receives y; may be x itself.
    num_threads : int, optional
        For this call; default: the process-wide number.

    Returns
    -------
    y : numpy.ndarray
        x's shape, dtype and memory order; `out` itself where given.
    stats : BatchStats
        Mean and 1/m variance, float64.

    Raises
    ------
    ValueError
        One value per feature; wrong shapes; eps not positive; an out that partly overlaps x.
    TypeError
        For other dtypes and masked arrays.
    numpy.exceptions.AxisError
        Where x has no such axis.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> y, stats = fastbn.batch_norm_forward(np.array([[1.0], [3.0]]), eps=1e-12)
    >>> y.round(6).tolist(), stats.mean.tolist()
    ([[-1.0], [1.0]], [2.0])
    """
    # What an exact or a debiased average does with a batch is not a weighted sum: it takes the statistics afterwards.
    direct = running is not None and running.momentum is not None and not running.debias
    constants = Constants(
        -1 if running is None else running.num_features, weight, bias, eps, mean=running.mean if direct else None,
        var=running.var if direct else None, unbiased=running is None or running.unbiased, axis=axis, activation=activation,
        num_threads=num_threads)
    y, stats, _ = calls.forward(constants, x, out, running.momentum if direct else 0)
    if running is not None and not direct:
        running.update(stats)
    elif direct and stats.count:  # as the averages have been: no signal handler runs in compiled code
        running.count += stats.count
        running.num_batches += 1
        running._rest *= 1 - running.momentum
    return y, stats


def batch_norm(x, running_mean=None, running_var=None, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5, *,
               axis=1, activation=None, unbiased=True, out=None, num_threads=None):
    """Batch normalization, with the order and the meaning of the arguments of ``torch.nn.functional.batch_norm``.

    Parameters
    ----------
    x : array_like of float32 or float64
        Any shape, C features along `axis`.
    running_mean, running_var : array of shape (C,), optional
        In training updated in place, ``new = (1 - momentum)*old + momentum*batch`` (float32 or float64 arrays); otherwise the statistics
        to normalise with.
    weight, bias : array_like of shape (C,), optional
        Default 1 and 0.
    training : bool
        Normalise with the batch's statistics, rather than with the running ones.
    momentum : float
        Weight of the batch in the running averages, finite.
    eps : float
        Positive.
    axis, activation, out, num_threads
        As in `batch_norm_forward`.
    unbiased : bool
        Whether running_var takes the m/(m-1) variance, as PyTorch's, or the 1/m one, as Keras's and ONNX's.

    Returns
    -------
    y : numpy.ndarray
        x's shape, dtype and memory order; `out` itself where given.

    Raises
    ------
    ValueError
        ``training=False`` without running statistics; one of the two without the other; else as `batch_norm_forward`.
    TypeError, numpy.exceptions.AxisError
        As `batch_norm_forward`.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> fastbn.batch_norm(np.array([[1.0, 5.0]]), np.array([1.0, 1.0]), np.array([4.0, 4.0]), eps=1e-12).round(6)
    array([[0., 2.]])
    """
    if (running_mean is None) != (running_var is None):
        raise ValueError("expected both running_mean and running_var or neither, got one of them")
    if not training:
        if running_mean is None:
            raise ValueError("expected running_mean and running_var where training=False, got None")
        constants = Constants(-1, weight, bias, eps, mean=running_mean, var=running_var, axis=axis, activation=activation,
                              num_threads=num_threads)
        return calls.infer(constants, x, out)[0]
    if momentum is None or not math.isfinite(momentum):
        raise ValueError(f"expected momentum to be a finite number, got {momentum!r}")
    mean, var = updatable(running_mean, "running_mean"), updatable(running_var, "running_var")
    constants = Constants(-1, weight, bias, eps, mean=mean, var=var, unbiased=unbiased, axis=axis, activation=activation,
                          num_threads=num_threads)
    y = calls.forward(constants, x, out, momentum)[0]
    with np.errstate(all="ignore"):  # what float32 does not hold is infinite in its own feature, without a word
        change((given, used) for given, used in ((running_mean, mean), (running_var, var)) if used is not given)
    return y


def batch_norm_backward(dy, x, stats, weight=None, bias=None, eps=1e-5, *, training=True, axis=1, activation=None, out=None,
                        num_threads=None):
    """The gradients of a batch normalization.

    With g the gradient before the activation and x_hat the normalised x: ``dbias = sum g``, ``dweight = sum g*x_hat``, and
    ``dx = weight/sqrt(var + eps)*(g - mean(g) - x_hat*mean(g*x_hat))`` (Ioffe & Szegedy 2015, section 3, gathered).

    Parameters
    ----------
    dy : array_like of x's shape
        The gradient of the loss with respect to y; converted to x's dtype.
    x : array_like of float32 or float64
        The input of the forward pass, unchanged since.
    stats : BatchStats
        What the forward pass returned.
    weight, bias, eps, axis, activation
        As in the forward pass; bias matters for the activation only.
    training : bool
        False where the statistics are constants: ``dx = weight/sqrt(var + eps)*g``.
    out : numpy.ndarray, optional
        Of x's shape and dtype, receives dx; may be dy itself, never x.
    num_threads : int, optional
        For this call; default: the process-wide number.

    Returns
    -------
    dx : numpy.ndarray
        x's shape, dtype and memory order; `out` itself where given.
    dweight, dbias : numpy.ndarray of shape (C,)
        float64.

    Raises
    ------
    ValueError, TypeError, numpy.exceptions.AxisError
        For arguments that do not fit, with one sentence that says what was expected.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> x = np.array([[0.0], [1.0], [5.0]])
    >>> y, stats = fastbn.batch_norm_forward(x)
    >>> dx, dweight, dbias = fastbn.batch_norm_backward(np.ones((3, 1)), x, stats)
    >>> bool(abs(dx).max() < 1e-15), dbias.tolist()
    (True, [3.0])
    """
    constants = Constants(-1, weight, bias, eps, axis=axis, activation=activation, num_threads=num_threads)
    return calls.backward(constants, dy, x, stats, training, out)
