"""Batch normalization by PyTorch: as people call it, its native operators with outputs given, and oneDNN's."""

from functools import cache, partial
from typing import Any

import numpy as np

from bench.calls import Timed
from bench.cases import EPS, MOMENTUM, Arrays, Case

ALL = [True, True, True]  # of dx, dweight, dbias


@cache
def inference_torch() -> Any:
    """torch, for good in the mode in which it spends nothing on autograd."""
    import torch

    torch._bench_mode = torch.inference_mode()  # ends with the object
    torch._bench_mode.__enter__()
    return torch


def tensor(array: np.ndarray, a: Arrays, mkldnn: bool = False) -> Any:
    """A tensor on the same memory, of format torch.channels_last where that is how it lies; or a copy for oneDNN."""
    import torch

    t = torch.from_numpy(array).movedim(a.axis, 1)
    return t.to_mkldnn() if mkldnn else t


def numpy_array(t: Any, a: Arrays) -> np.ndarray:
    return (t.to_dense() if t.is_mkldnn else t).movedim(1, a.axis).numpy()


def functional(case: Case, a: Arrays, mkldnn: bool = False) -> Timed:
    """F.batch_norm and the backward that autograd calls, into new tensors; of mkldnn tensors, oneDNN's."""
    torch = inference_torch()
    torch.set_num_threads(case.threads)
    x, dy = (tensor(array, a, mkldnn) for array in (a.x, a.dy))
    weight, bias, mean, var = (torch.tensor(p) for p in (a.weight, a.bias, a.mean, a.var))
    if case.operation != "backward":
        training = case.operation == "train"
        call = partial(torch.nn.functional.batch_norm, x, mean, var, weight, bias, training, MOMENTUM, EPS)
        return call, lambda y: (numpy_array(y, a),)
    _, *saved = torch.native_batch_norm(x, weight, bias, mean, var, True, MOMENTUM, EPS)
    call = partial(torch.ops.aten.native_batch_norm_backward, dy, x, weight, mean, var, *saved, True, EPS, ALL)
    return call, lambda r: (numpy_array(r[0], a), r[1].numpy(), r[2].numpy())


def native(case: Case, a: Arrays) -> Timed:
    """The native operators, into the tensors given."""
    torch = inference_torch()
    torch.set_num_threads(case.threads)
    x, dy, y, dx = (tensor(array, a) for array in (a.x, a.dy, a.y, a.dx))
    weight, bias, mean, var = (torch.tensor(p) for p in (a.weight, a.bias, a.mean, a.var))
    saved = (torch.empty_like(mean), torch.empty_like(var))
    if case.operation == "infer":
        out = (y, torch.empty(0, dtype=x.dtype), torch.empty(0, dtype=x.dtype))
        call = partial(torch.native_batch_norm, x, weight, bias, mean, var, False, MOMENTUM, EPS, out=out)
        return call, lambda r: (numpy_array(r[0], a),)
    train = partial(torch.native_batch_norm, x, weight, bias, mean, var, True, MOMENTUM, EPS, out=(y, *saved))
    if case.operation == "train":
        return train, lambda r: (numpy_array(r[0], a),)
    train()
    dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)
    call = partial(
        torch.ops.aten.native_batch_norm_backward.out,
        *(dy, x, weight, mean, var, *saved, True, EPS, ALL),
        **{"out0": dx, "out1": dweight, "out2": dbias},
    )
    return call, lambda r: (numpy_array(r[0], a), r[1].numpy(), r[2].numpy())
