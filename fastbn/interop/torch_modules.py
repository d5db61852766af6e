"""PyTorch modules that run on fastbn's kernels. The one file here that imports its library as it is imported."""

from __future__ import annotations

import math
import weakref
from typing import Any

import numpy as np
import torch
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version

from .. import calls
from ..atomic import change

__all__ = ["FAST", "FastBatchNorm1d", "FastBatchNorm2d", "FastBatchNorm3d", "Standardize"]

# Design: a small batch takes the kernels less time than PyTorch's steps in Python take around them. So each attribute
# is read once, what calls have in common is kept, and there is no setup_context: with one, PyTorch binds arguments by
# inspect.signature.

_FLOATS = (torch.float32, torch.float64)
_KINDS = (torch.Tensor, torch.nn.Parameter)
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def _array(tensor: Any) -> Any:
    return None if tensor is None else tensor.numpy(force=True)  # on the CPU without a copy


def _forward(x: Any, constants: Any, factor: float | None) -> Any:
    """y, and the statistics that it was made with; factor None: inference."""
    if factor is None:
        y, stats, _ = calls.infer(constants, _array(x), None)
    else:
        y, stats, _ = calls.forward(constants, _array(x), None, factor)
    return torch.from_numpy(y), stats


def _gradients(dy: Any, x: Any, weight: Any, eps: float, stats: Any, training: bool) -> Any:
    """With respect to x, weight and bias."""
    if torch._C._functorch.is_legacy_batchedtensor(dy):  # of autograd.grad(is_grads_batched=True)
        mean, var = (torch.tensor(a, dtype=x.dtype) for a in (stats.mean, stats.var))
        return torch.ops.aten.native_batch_norm_backward(
            dy, x, weight, mean, var, mean, (var + eps).rsqrt(), training, eps, [True, True, True]
        )
    constants = calls.Constants(-1, _array(weight), None, eps)
    dx, *own = calls.backward(constants, _array(dy), _array(x), stats, training, None)
    with np.errstate(all="ignore"):  # as torch.nn: what is beyond the dtype becomes an infinity, without a word
        return torch.from_numpy(dx), *(torch.from_numpy(gradient.astype(dx.dtype, copy=False)) for gradient in own)


def _mark_written(tensor: Any) -> None:
    """Let PyTorch know: it refuses the backward of whatever needs the values of before."""
    if tensor is not None and not tensor.is_inference():
        increment_version(tensor)


class _Forward(torch.autograd.Function):
    """y, where gradients may be asked for."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, bias: Any, by: tuple[float, calls.Constants, float | None]) -> Any:
        eps, constants, factor = by
        y, stats = _forward(x, constants, factor)
        ctx.of_call, ctx.affine = (eps, stats, factor is not None), (weight is not None, bias is not None)
        ctx.save_for_backward(x, weight)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Any) -> Any:
        given = dy, *ctx.saved_tensors, *ctx.of_call
        # With create_graph=True, gradients are recorded too.
        dx, dweight, dbias = _Backward.apply(*given) if torch.is_grad_enabled() else _gradients(*given)
        has_weight, has_bias = ctx.affine
        return dx, dweight if has_weight else None, dbias if has_bias else None, None


class _Backward(torch.autograd.Function):
    """The gradients as a function of its own, so that its own gradient is refused."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Any:
        return _gradients(*given)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            "fastbn's batch normalization has no second derivative: use torch.nn's layers where a gradient is "
            "differentiated (create_graph=True)"
        )


class _Kept:
    """What the calls of a module have in common, as long as its tensors lie where they lay.

    It holds their memory until the next call: that of a module which has moved to a GPU, too.
    """

    def __init__(self, key: Any, features: int, eps: float, own: Any) -> None:
        weight, bias, mean, var, self.count = map(_array, own)
        given = features, weight, bias, eps
        self.key, self.buffers = key, (mean, var)
        # The kernels' running averages are of float64.
        self.averages: Any = [None if a is None else np.empty(features) for a in self.buffers]
        lasting = all(a is None or a.flags.c_contiguous for a in (weight, bias, mean, var))
        self.inference = calls.Constants(*given, mean=mean, var=var, lasting=lasting)
        self.tracking = calls.Constants(*given, mean=self.averages[0], var=self.averages[1])
        self.training = calls.Constants(*given)


_KEPT = weakref.WeakKeyDictionary[Any, _Kept]()


class _Fast:
    """The forward of a class of torch.nn, on fastbn's kernels where they take the input, and else that class's own."""

    def forward(self: Any, input: torch.Tensor) -> torch.Tensor:
        if not _is_plain(input):
            return self._otherwise(input)
        self._check_input_dim(input)
        parameters, buffers = self._parameters, self._buffers  # an attribute of a module takes its time
        try:
            own = parameters["weight"], parameters["bias"], *[buffers[name] for name in _BUFFERS]
        except KeyError:  # parametrized
            own = self.weight, self.bias, *[getattr(self, name) for name in _BUFFERS]
        kept = self._find_kept(input, own)
        if kept is None:
            return self._otherwise(input)
        weight, bias, mean, _, count = own
        # In training without tracking, PyTorch leaves running statistics alone that were there before.
        tracking = self.training and self.track_running_stats
        factor = None
        if self.training or mean is None:
            constants, factor = (kept.tracking if tracking else kept.training), self.momentum
            if tracking and factor is None and count is not None:
                factor = 1 / (int(kept.count) + 1)
            factor = factor or 0.0
        else:
            constants = kept.inference
        if tracking and mean is not None:
            for average, buffer in zip(kept.averages, kept.buffers, strict=True):
                average[...] = buffer
        if torch.is_grad_enabled():
            y = _Forward.apply(input, weight, bias, (self.eps, constants, factor))
        else:
            y, _ = _forward(input, constants, factor)
        if tracking:
            written = [] if count is None else [(kept.count, kept.count + 1)]
            if mean is not None:
                written += zip(kept.buffers, kept.averages, strict=True)
            with np.errstate(all="ignore"):
                change(written)
            for tensor in own[2:]:
                _mark_written(tensor)
        return y

    def _find_kept(self: Any, x: torch.Tensor, own: Any) -> _Kept | None:
        """What the kernels need beside x; None where they do not take what the module has."""
        features = x.shape[1]
        where = [None if t is None else (t.data_ptr(), t.dtype, t.shape, t.stride()) for t in own]
        key = (self.eps, x.dtype, features, where)
        kept = _KEPT.get(self)
        if kept is None or kept.key != key:
            if not 0 < self.eps < math.inf or (own[2] is None) != (own[3] is None):
                return None
            kind, number = (x.dtype, x.device, x.shape[1:2]), (torch.int64, x.device, ())
            kinds = [(t, kind) for t in own[:4]] + [(own[4], number)]
            if not all(t is None or (type(t) in _KINDS and (t.dtype, t.device, t.shape) == of) for t, of in kinds):
                return None
            kept = _KEPT[self] = _Kept(key, features, self.eps, own)
        return kept

    def _otherwise(self: Any, input: torch.Tensor) -> torch.Tensor:
        if isinstance(input, torch.fx.Proxy):  # a node of the graph, as torch.nn's modules are
            tracer = input.tracer
            return tracer.create_proxy("call_module", tracer.path_of_module(self), (input,), {})
        result: torch.Tensor = super().forward(input)  # type: ignore[misc]
        return result


def _is_plain(x: Any) -> bool:
    """Whether the kernels take x as it comes: not other devices and dtypes, compilers, tracers and transforms."""
    if type(x) is not torch.Tensor or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    # The derivatives that the kernels do not have: those of torch.func, and forward ones.
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    return x.is_cpu and x.dtype in _FLOATS and x.layout is torch.strided and x.numel() > 0


class FastBatchNorm1d(_Fast, torch.nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` on fastbn's kernels, forward and backward.

    Arguments, attributes and state dict are those of the class in ``torch.nn``, which is its base. Tensors of float32
    and float64 on the CPU are read and written where they lie, in any memory format. Statistics are computed in
    float64, and running statistics are rounded once, to the dtype of their buffers. All other tensors go through the
    forward of ``torch.nn``: those on other devices or of other dtypes, and those in ``torch.compile``,
    ``torch.export``, traces, transforms of ``torch.func`` and forward derivatives.

    The gradient cannot be differentiated again: that is a RuntimeError. The output lies in memory as the input does,
    where that of ``torch.nn`` may be contiguous: call ``reshape`` where ``view`` is refused.

    Examples
    --------
    >>> import torch
    >>> from fastbn.interop.torch import FastBatchNorm1d
    >>> FastBatchNorm1d(2)(torch.tensor([[1.0, 10.0], [3.0, 30.0]])).detach().round(decimals=3)
    tensor([[-1., -1.],
            [ 1.,  1.]])
    """


class FastBatchNorm2d(_Fast, torch.nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` on fastbn's kernels: see `FastBatchNorm1d`.

    Examples
    --------
    >>> import torch
    >>> from fastbn.interop.torch import FastBatchNorm2d
    >>> FastBatchNorm2d(3)(torch.rand(5, 3, 8, 8)).shape
    torch.Size([5, 3, 8, 8])
    """


class FastBatchNorm3d(_Fast, torch.nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` on fastbn's kernels: see `FastBatchNorm1d`.

    Examples
    --------
    >>> import torch
    >>> from fastbn.interop.torch import FastBatchNorm3d
    >>> FastBatchNorm3d(3)(torch.rand(2, 3, 4, 4, 4)).shape
    torch.Size([2, 3, 4, 4, 4])
    """


class Standardize(torch.nn.Module):
    """`fastbn.nn.Standardize` in PyTorch: the same arithmetic in float64, the same state.

    It has no parameters. Its buffers are the statistics.
    """

    def __init__(self, num_features: int, *, axis: int = 1, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.num_features, self.axis, self.dtype = num_features, axis, dtype
        for name in ("mean", "mean_low", "var"):
            self.register_buffer(name, torch.zeros(num_features, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        shape = [1] * input.ndim
        shape[self.axis] = self.num_features
        mean, low, var = (buffer.reshape(shape) for buffer in (self.mean, self.mean_low, self.var))
        deviation = torch.where(var == 0, 1, var).sqrt()
        return (((input.double() - mean) - low) / deviation).to(input.dtype if self.dtype is None else self.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_features}, axis={self.axis}, dtype={self.dtype}"


FAST = {
    torch.nn.BatchNorm1d: FastBatchNorm1d,
    torch.nn.BatchNorm2d: FastBatchNorm2d,
    torch.nn.BatchNorm3d: FastBatchNorm3d,
}
