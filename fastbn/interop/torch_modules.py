"""PyTorch modules that run on fastbn's kernels. The one file here that imports its library as it is imported."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch.autograd import forward_ad

from .. import calls

__all__ = ["FAST", "FastBatchNorm1d", "FastBatchNorm2d", "FastBatchNorm3d", "Standardize"]

_FLOATS = (torch.float32, torch.float64)


def _array(tensor: Any) -> Any:
    return None if tensor is None else tensor.detach().resolve_neg().numpy()


# No setup_context: with one, PyTorch binds arguments by inspect.signature, which takes longer than a small batch.


class _Forward(torch.autograd.Function):
    """y, the statistics that it was made with, and new running statistics; factor None: inference."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, bias: Any, mean: Any, var: Any, eps: float, factor: float | None) -> Any:
        running = [_array(buffer) for buffer in (mean, var)]
        if factor is not None:
            running = [None if a is None else a.astype(np.float64) for a in running]
        constants = calls.Constants(-1, _array(weight), _array(bias), eps, mean=running[0], var=running[1])
        if factor is None:
            y, stats, _ = calls.infer(constants, _array(x), None)
        else:
            y, stats, _ = calls.forward(constants, _array(x), None, factor)
        ctx.eps, ctx.stats, ctx.training = eps, stats, factor is not None
        ctx.affine = weight is not None, bias is not None
        ctx.save_for_backward(x, weight)
        return torch.from_numpy(y), running

    @staticmethod
    def backward(ctx: Any, dy: Any, *_: Any) -> Any:
        given = dy, *ctx.saved_tensors, ctx.eps, ctx.stats, ctx.training
        # With create_graph=True, gradients are recorded too.
        dx, *own = _Backward.apply(*given) if torch.is_grad_enabled() else _gradients(*given)
        own = [gradient if there else None for gradient, there in zip(own, ctx.affine, strict=True)]
        return dx, *own, None, None, None, None


def _gradients(dy: Any, x: Any, weight: Any, eps: float, stats: Any, training: bool) -> Any:
    """With respect to x, weight and bias."""
    constants = calls.Constants(-1, _array(weight), None, eps)
    dx, dweight, dbias = calls.backward(constants, _array(dy), _array(x), stats, training, None)
    return torch.from_numpy(dx), *(torch.from_numpy(gradient).to(x.dtype) for gradient in (dweight, dbias))


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


class _Fast:
    """The forward of a class of torch.nn, on fastbn's kernels where they take the input, and else that class's own."""

    def forward(self: Any, input: torch.Tensor) -> torch.Tensor:
        if isinstance(input, torch.fx.Proxy):  # a node of the graph, as torch.nn's modules are
            tracer = input.tracer
            return tracer.create_proxy("call_module", tracer.path_of_module(self), (input,), {})
        if not self._takes(input):
            result: torch.Tensor = super().forward(input)  # type: ignore[misc]
            return result
        self._check_input_dim(input)
        # In training without tracking, PyTorch leaves running statistics alone that were there before.
        tracking = self.training and self.track_running_stats
        training = self.training or (self.running_mean is None and self.running_var is None)
        buffers = [self.running_mean, self.running_var] if tracking or not training else [None, None]
        factor = self.momentum
        if tracking and factor is None and self.num_batches_tracked is not None:
            factor = 1 / (int(self.num_batches_tracked) + 1)
        y, running = _Forward.apply(
            input, self.weight, self.bias, *buffers, self.eps, (factor or 0.0) if training else None
        )
        if tracking:
            with torch.no_grad():
                if self.num_batches_tracked is not None:
                    self.num_batches_tracked.add_(1)
                for buffer, average in zip(buffers, running, strict=True):
                    if buffer is not None:
                        buffer.copy_(torch.from_numpy(average))
        return y

    def _takes(self: Any, x: torch.Tensor) -> bool:
        """Whether the kernels do: not other devices and dtypes, compilers, tracers, transforms, or wrong inputs."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(x) is not torch.Tensor:
            return False
        # The derivatives that the kernels do not have: those of torch.func, and forward ones.
        if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
            return False
        if not 0 < self.eps < math.inf or (self.running_mean is None) != (self.running_var is None):
            return False
        own = (self.weight, self.bias, self.running_mean, self.running_var)
        kind = (x.dtype, x.device, x.shape[1:2])
        plain = x.device.type == "cpu" and x.layout == torch.strided and x.numel() > 0
        return plain and x.dtype in _FLOATS and all(t is None or (t.dtype, t.device, t.shape) == kind for t in own)


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
