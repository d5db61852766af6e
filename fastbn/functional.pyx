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
    """Return mean and variance of each feature.

    Parameters
    ----------
    x : array_like of float32 or float64
        Array of any shape with C features along the feature axis. Integers and bool become float64. Strided and
        byte-swapped arrays are copied first.
    axis : int
        The feature axis.
    mask : array_like of bool, optional
        Array of the shape of x without the feature axis, True where a position counts. The valid positions are copied.

    Returns
    -------
    BatchStats
        The mean (in two parts, ``mean + mean_low``) and the variance of ``1/m``, float64 of shape (C,), and m, the
        number of values per feature, as ``count``. Mean and variance are NaN if m is 0. For float32, the relative error
        of the standard deviation is below 1e-7, and the mean is off by less than 1e-7 standard deviations.

    Raises
    ------
    TypeError
        Another dtype, or a masked array.
    numpy.exceptions.AxisError
        x has no such axis.
    ValueError
        A mask of another shape.

    Notes
    -----
    There is one pass over x. float32 is summed as it is, in float64. float64, and float32 with a large mean, is summed
    about a pivot, a value close to the mean. The sums are made in chunks whose sizes follow from the shape of x alone,
    and merged in order by the rule of Chan, Golub & LeVeque (1979). So the bits depend neither on the number of threads
    nor on the processor.

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
    """Normalise x with its own statistics, and return these for the backward pass.

    Each feature is normalised with its own mean and its variance of ``1/m``, m the number of its values
    (Ioffe & Szegedy 2015, algorithm 1)::

        y = activation((x - mean)/sqrt(var + eps)*weight + bias)

    Parameters
    ----------
    x : array_like of float32 or float64
        Array of any shape with C features along the feature axis. Integers and bool become float64. Strided and
        byte-swapped arrays are copied first.
    weight, bias : array_like of shape (C,), optional
        Scale and shift of each feature. The defaults are 1 and 0.
    eps : float
        Positive number that is added to the variance.
    running : RunningStats, optional
        Running statistics, which are updated in the same call.
    axis : int
        The feature axis.
    activation : {None, "relu", "leaky_relu"}
        Function that is applied to y in the same pass over memory. The slope of leaky_relu is 0.01.
    out : numpy.ndarray, optional
        Array of the shape and dtype of x, which receives y. It may be x itself.
    num_threads : int, optional
        Number of threads for this call. The default is `fastbn.get_num_threads`.

    Returns
    -------
    y : numpy.ndarray
        Normalised array, of the shape, dtype and memory order of x; out itself if it was given.
    stats : BatchStats
        Mean and variance of each feature, float64.

    Raises
    ------
    ValueError
        A single value per feature, a wrong shape, an eps that is not positive, or an out that partly overlaps x.
    TypeError
        Another dtype, or a masked array.
    numpy.exceptions.AxisError
        x has no such axis.

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
    """Normalise x; the arguments have the order and the meaning of ``torch.nn.functional.batch_norm``.

    Parameters
    ----------
    x : array_like of float32 or float64
        Array of any shape with C features along the feature axis. Integers and bool become float64. Strided and
        byte-swapped arrays are copied first.
    running_mean, running_var : array of shape (C,), optional
        Running statistics, float32 or float64. In training they are updated in place,
        ``new = (1 - momentum)*old + momentum*batch``. Otherwise x is normalised with them.
    weight, bias : array_like of shape (C,), optional
        Scale and shift of each feature. The defaults are 1 and 0.
    training : bool
        Whether x is normalised with its own statistics, or with the running ones.
    momentum : float
        Weight of this batch in the running statistics, finite.
    eps : float
        Positive number that is added to the variance.
    axis : int
        The feature axis.
    activation : {None, "relu", "leaky_relu"}
        Function that is applied to y in the same pass over memory. The slope of leaky_relu is 0.01.
    unbiased : bool
        Whether running_var averages variances of ``1/(m - 1)``, as in PyTorch, or of ``1/m``, as in Keras and ONNX.
    out : numpy.ndarray, optional
        Array of the shape and dtype of x, which receives y. It may be x itself.
    num_threads : int, optional
        Number of threads for this call. The default is `fastbn.get_num_threads`.

    Returns
    -------
    y : numpy.ndarray
        Normalised array, of the shape, dtype and memory order of x; out itself if it was given.

    Raises
    ------
    ValueError
        ``training=False`` without running statistics, or one of the two without the other, and what
        `batch_norm_forward` refuses.
    TypeError, numpy.exceptions.AxisError
        The same as in `batch_norm_forward`.

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
    """Return the gradients of a batch normalization.

    g is the gradient before the activation, and x_hat is the normalised x (Ioffe & Szegedy 2015, section 3)::

        dbias = sum(g)
        dweight = sum(g*x_hat)
        dx = weight/sqrt(var + eps)*(g - mean(g) - x_hat*mean(g*x_hat))

    Parameters
    ----------
    dy : array_like of the shape of x
        Gradient of the loss with respect to y. It is converted to the dtype of x.
    x : array_like of float32 or float64
        Input of the forward pass, unchanged since.
    stats : BatchStats
        Statistics that the forward pass returned.
    weight, bias, eps, axis, activation
        Arguments of the forward pass. bias matters only with an activation.
    training : bool
        Whether the statistics are those of x. With False they are constants, and dx is ``weight/sqrt(var + eps)*g``.
    out : numpy.ndarray, optional
        Array of the shape and dtype of x, which receives dx. It may be dy itself, never x.
    num_threads : int, optional
        Number of threads for this call. The default is `fastbn.get_num_threads`.

    Returns
    -------
    dx : numpy.ndarray
        Gradient with respect to x, of its shape, dtype and memory order; out itself if it was given.
    dweight, dbias : numpy.ndarray of shape (C,)
        Gradients with respect to weight and bias, float64.

    Raises
    ------
    ValueError, TypeError, numpy.exceptions.AxisError
        An argument that does not fit. The message says what was expected.

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
