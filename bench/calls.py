"""Batch normalization by each library, at its best: what fastbn is compared with. PyTorch's and numba's
have files of their own.

Each function takes a case and its arrays, and gives what is timed, a function without arguments, and what turns its
result into NumPy arrays: (y,), or (dx, dweight, dbias). Libraries are imported where they are used.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from bench.cases import EPS, MOMENTUM, Arrays, Case

Timed = tuple[Callable[[], Any], Callable[[Any], tuple[np.ndarray, ...]]]


def parameters(case: Case, a: Arrays) -> tuple[np.ndarray, ...]:
    """weight, bias, mean, var, shaped to stand beside x with features along axis 1; for a backward the batch's."""
    mean, var = a.moments() if case.operation == "backward" else (a.mean, a.var)
    shape = (1, -1, *[1] * (a.rows(a.x).ndim - 2))
    return tuple(p.reshape(shape) for p in (a.weight, a.bias, mean, var))


def shaped(a: Arrays, results: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
    return results[0].reshape(a.x.shape), *results[1:]


def layer(case: Case, a: Arrays) -> Timed:
    import fastbn

    bn = fastbn.BatchNorm(case.shape[1], EPS, MOMENTUM, axis=a.axis, dtype=case.dtype, num_threads=case.threads)
    bn.weight, bn.bias, bn.running_mean, bn.running_var = a.weight, a.bias, a.mean, a.var
    if case.operation == "backward":
        bn(a.x)
        call = partial(bn.backward, a.dy, out=a.dx) if case.preallocated else partial(bn.backward, a.dy)
        return call, lambda dx: (dx, bn.grads["weight"], bn.grads["bias"])
    bn.train(case.operation == "train")
    return partial(bn, a.x, out=a.y) if case.preallocated else partial(bn, a.x), lambda y: (y,)


def numpy_ufuncs(case: Case, a: Arrays) -> Timed:
    x, dy = a.rows(a.x), a.rows(a.dy)
    axes = tuple(i for i in range(x.ndim) if i != 1)
    weight, bias, mean, var = parameters(case, a)
    y, dx, scratch = (a.rows(a.y), a.rows(a.dx), np.empty_like(x)) if case.preallocated else (None, None, None)
    count = x.size // x.shape[1]

    def train() -> tuple[np.ndarray]:
        z = np.subtract(x, x.mean(axes, keepdims=True), out=y)
        z *= weight / np.sqrt(np.square(z, out=scratch).mean(axes, keepdims=True) + EPS)
        z += bias
        return (z,)

    def infer() -> tuple[np.ndarray]:
        scale = weight / np.sqrt(var + EPS)
        z = np.multiply(x, scale, out=y)
        z += bias - mean * scale
        return (z,)

    def back() -> tuple[np.ndarray, ...]:
        invstd = 1 / np.sqrt(var + EPS)
        xhat = np.subtract(x, mean, out=scratch)
        xhat *= invstd
        dbias = dy.sum(axes, keepdims=True)
        dweight = np.multiply(dy, xhat, out=dx).sum(axes, keepdims=True)
        xhat *= dweight / count
        g = np.subtract(dy, xhat, out=dx)
        g -= dbias / count
        g *= weight * invstd
        return g, dweight, dbias

    call = {"train": train, "infer": infer, "backward": back}[case.operation]
    return call, partial(shaped, a)


def numexpr_line(case: Case, a: Arrays) -> Timed:
    import numexpr

    numexpr.set_num_threads(case.threads)
    x, y = a.rows(a.x), a.rows(a.y) if case.preallocated else None
    scale = a.weight / np.sqrt(a.var + a.x.dtype.type(EPS))
    shape = (1, -1, *[1] * (x.ndim - 2))
    names = {"x": x, "a": scale.reshape(shape), "c": (a.bias - a.mean * scale).reshape(shape)}
    return partial(numexpr.evaluate, "x*a + c", names, out=y), lambda result: (result.reshape(a.x.shape),)


def standard_scaler(case: Case, a: Arrays) -> Timed:
    from sklearn.preprocessing import StandardScaler

    x, scaler = a.rows(a.x), StandardScaler()
    if case.operation == "train":
        call = lambda: scaler.partial_fit(x).transform(x)  # noqa: E731
    else:
        scaler.fit(x)
        scaler.mean_, scaler.var_, scaler.scale_ = (p.astype(np.float64) for p in (a.mean, a.var, np.sqrt(a.var)))
        call = partial(scaler.transform, x)

    def convert(y: np.ndarray) -> tuple[np.ndarray]:
        # It has neither weight nor bias nor eps.
        scale = a.weight * np.sqrt(scaler.var_ / (scaler.var_ + EPS))
        return ((y * scale + a.bias).astype(case.dtype).reshape(a.x.shape),)

    return call, convert


def onnxruntime_session(case: Case, a: Arrays) -> Timed:
    import onnxruntime
    from onnx import TensorProto, helper

    x, y = a.rows(a.x), a.rows(a.y)
    kind = {"float32": TensorProto.FLOAT, "float64": TensorProto.DOUBLE}[case.dtype]
    feed = {"x": x, "weight": a.weight, "bias": a.bias, "mean": a.mean, "var": a.var}
    infos = [helper.make_tensor_value_info(name, kind, value.shape) for name, value in feed.items()]
    node = helper.make_node("BatchNormalization", list(feed), ["y"], epsilon=EPS)
    graph = helper.make_graph([node], "g", infos, [helper.make_tensor_value_info("y", kind, x.shape)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = case.threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    if not case.preallocated:
        return partial(session.run, None, feed), partial(shaped, a)
    binding = session.io_binding()
    for name, value in feed.items():
        binding.bind_cpu_input(name, value)
    binding.bind_output("y", "cpu", 0, np.dtype(case.dtype), list(y.shape), y.ctypes.data)
    return partial(session.run_with_iobinding, binding), lambda _: (a.y,)


def jax_jit(case: Case, a: Arrays, fast_variance: bool = False) -> Timed:
    """Its output goes into the output before, which is donated, where the case is preallocated.

    Flax computes the variance as mean(x*x) - mean(x)^2, which saves a pass, and digits.
    """
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", case.dtype == "float64")
    x, dy = jnp.asarray(a.rows(a.x)), jnp.asarray(a.rows(a.dy))
    axes = tuple(i for i in range(x.ndim) if i != 1)
    weight, bias, mean, var = map(jnp.asarray, parameters(case, a))

    def train(_, x, weight, bias):
        mean = x.mean(axes, keepdims=True)
        var = (x * x).mean(axes, keepdims=True) - mean * mean if fast_variance else x.var(axes, keepdims=True)
        return (x - mean) * (weight / jnp.sqrt(var + EPS)) + bias, mean, var

    def infer(_, x, weight, bias, mean, var):
        return ((x - mean) * (weight / jnp.sqrt(var + EPS)) + bias,)

    def back(_, dy, x, weight, mean, var):
        invstd = 1 / jnp.sqrt(var + EPS)
        xhat = (x - mean) * invstd
        dbias, dweight = dy.sum(axes, keepdims=True), (dy * xhat).sum(axes, keepdims=True)
        dx = weight * invstd * (dy - (dbias + xhat * dweight) * (x.shape[1] / x.size))
        return dx, dweight, dbias

    function, arguments = {
        "train": (train, (x, weight, bias)),
        "infer": (infer, (x, weight, bias, mean, var)),
        "backward": (back, (dy, x, weight, mean, var)),
    }[case.operation]
    if case.preallocated:
        jitted, before = jax.jit(function, donate_argnums=0, keep_unused=True), [jnp.zeros_like(x)]
    else:
        jitted, before = jax.jit(function), [jnp.zeros(())]

    def call() -> tuple[Any, ...]:
        results = jitted(before[0], *arguments)
        if case.preallocated:
            before[0] = results[0]
        jax.block_until_ready(results)
        return results

    def convert(results: tuple[Any, ...]) -> tuple[np.ndarray, ...]:
        arrays = tuple(map(np.array, results))
        return shaped(a, arrays if case.operation == "backward" else arrays[:1])

    return call, convert
