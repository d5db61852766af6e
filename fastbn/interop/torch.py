"""PyTorch: networks and optimizers converted both ways, and modules that run on fastbn's kernels.

The extra is ``pip install "fastbn[torch]"``; PyTorch's CPU build is enough.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .. import nn, optim
from ..batchnorm import BatchNorm
from ..state import FLOATS, Array
from .layers import dense, library, position

__all__ = ["from_torch", "optimizer_from_torch", "optimizer_to_torch", "replace", "to_torch"]

_CLASSES = ("FastBatchNorm1d", "FastBatchNorm2d", "FastBatchNorm3d", "Standardize")  # made where PyTorch is imported


def __getattr__(name: str) -> Any:
    if name in _CLASSES:
        return getattr(_modules(), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_CLASSES])


def _torch() -> Any:
    return library("torch", "torch")


def _modules() -> Any:
    _torch()
    from . import torch_modules

    return torch_modules


# --- from PyTorch


def from_torch(module: Any) -> Any:
    """Return the fastbn layer or network that computes what a PyTorch module does.

    Parameters
    ----------
    module : torch.nn.Module
        A ``Sequential``, nested or not, or one of ``Linear``, ``BatchNorm1d``, ``BatchNorm2d``, ``BatchNorm3d``,
        ``SyncBatchNorm`` (as BatchNorm), ``ReLU``, ``LeakyReLU``, ``Sigmoid``, ``Tanh``, ``Softmax``, ``Dropout``,
        ``Flatten`` and ``Identity``, with parameters of float32 or float64.

    Returns
    -------
    layer
        `fastbn.nn.Sequential`, `fastbn.BatchNorm` or a layer of `fastbn.nn`, each in the mode of its module. Parameters
        and buffers are copied, bit for bit; running statistics become float64. Layers of a Sequential have numbers
        where modules may have names. ``requires_grad`` is not carried over.

    Raises
    ------
    TypeError
        A module of another class, or with parameters of another dtype. The message has its name and position.
    ValueError
        A module with an argument that has no counterpart, with hooks, or with parameters that another one shares.
    ImportError
        PyTorch is not installed.

    Examples
    --------
    >>> import torch
    >>> from fastbn.interop.torch import from_torch
    >>> from_torch(torch.nn.Sequential(torch.nn.Linear(3, 5, bias=False), torch.nn.BatchNorm1d(5), torch.nn.ReLU()))
    Sequential(
        Dense(n_in=3, n_out=5, bias=False),
        BatchNorm(5),
        ReLU(),
    )
    """
    torch = _torch()
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(module).__name__}")
    owners: dict[int, str] = {}
    for place, inner in module.named_modules(remove_duplicate=False):
        for parameter in inner.parameters(recurse=False):
            # Tied weights may be other objects over the same memory, which is at 0 for those that have none yet.
            uninitialized = type(parameter).__name__.startswith("Uninitialized")
            memory = 0 if uninitialized else parameter.data_ptr()
            if (owner := owners.setdefault(memory or -id(parameter), place)) != place:
                raise ValueError(f"{_said(inner, place)} shares a parameter with module {owner!r}: layers share none")
    return _layer(torch, module, "")


def _said(module: Any, place: str) -> str:
    return f"module {place!r} ({type(module).__name__})" if place else f"the module ({type(module).__name__})"


def _layer(torch: Any, module: Any, place: str) -> Any:
    make = _converters(torch).get(type(module))
    if make is None and type(module) is not torch.nn.Sequential:
        known = "Sequential, Linear, BatchNorm, ReLU, LeakyReLU, Sigmoid, Tanh, Softmax, Dropout, Flatten or Identity"
        raise TypeError(f"cannot convert {_said(module, place)}: expected {known}")
    if module._forward_hooks or module._forward_pre_hooks:
        raise ValueError(f"{_said(module, place)} has hooks, whose effect cannot be converted: remove them first")
    if make is None:
        # named_children() leaves out what is there twice.
        inner = (_layer(torch, m, position(place, name)) for name, m in module._modules.items())
        model = nn.Sequential(*inner)
        model.training = module.training
        return model
    try:
        return make(module).train(module.training)
    except (TypeError, ValueError) as error:
        raise type(error)(f"cannot convert {_said(module, place)}: {error}") from error


def _converters(torch: Any) -> dict[type, Callable[[Any], Any]]:
    norms = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d, torch.nn.SyncBatchNorm)
    modules = _modules()
    return dict.fromkeys((*norms, *modules.FAST.values()), _batch_norm) | {
        torch.nn.Linear: lambda m: dense(_array(m.weight), _array(m.bias)),
        torch.nn.ReLU: lambda m: nn.ReLU(),
        torch.nn.LeakyReLU: lambda m: nn.LeakyReLU(m.negative_slope),
        torch.nn.Sigmoid: lambda m: nn.Sigmoid(),
        torch.nn.Tanh: lambda m: nn.Tanh(),
        torch.nn.Softmax: _softmax,
        torch.nn.Dropout: lambda m: nn.Dropout(m.p),
        torch.nn.Flatten: _flatten,
        torch.nn.Identity: lambda m: nn.Identity(),
        modules.Standardize: _standardize,
    }


def _array(tensor: Any) -> Any:
    """A copy as NumPy's, or None."""
    if tensor is None:
        return None
    name = str(tensor.dtype).removeprefix("torch.")
    if name not in [dtype.name for dtype in FLOATS]:
        raise TypeError(f"expected parameters of float32 or float64, got {name}")
    if tensor.is_meta or type(tensor).__name__.startswith("Uninitialized"):
        raise ValueError("expected parameters with values, got some that have none yet")
    return tensor.detach().cpu().numpy().copy()


def _batch_norm(module: Any) -> BatchNorm:
    weight, bias = _array(module.weight), _array(module.bias)
    mean, var = _array(module.running_mean), _array(module.running_var)
    if module.training and (weight is None) != (bias is None):
        raise ValueError("BatchNorm without bias trains otherwise than fastbn's: call eval() first")
    if (mean is None) == module.track_running_stats:
        raise ValueError(f"track_running_stats={module.track_running_stats} does not fit its running statistics")
    given = next((a for a in (weight, bias, mean) if a is not None), np.zeros(0, np.float32))
    layer = BatchNorm(
        module.num_features, module.eps, module.momentum, weight is not None or bias is not None,
        module.track_running_stats, dtype=given.dtype,
    )  # fmt: skip
    for name, array in [("weight", weight), ("bias", bias), ("running_mean", mean), ("running_var", var)]:
        if array is not None:
            setattr(layer, name, array)
    if module.num_batches_tracked is not None:
        layer.num_batches_tracked = int(module.num_batches_tracked)
    return layer


def _softmax(module: Any) -> nn.Softmax:
    if module.dim is None:
        raise ValueError("expected its dim, got None")
    return nn.Softmax(module.dim)


def _flatten(module: Any) -> nn.Flatten:
    if (module.start_dim, module.end_dim) != (1, -1):
        raise ValueError(f"expected start_dim=1 and end_dim=-1, got {module.start_dim} and {module.end_dim}")
    return nn.Flatten()


def _standardize(module: Any) -> nn.Standardize:
    dtype = None if module.dtype is None else str(module.dtype).removeprefix("torch.")
    layer = nn.Standardize(module.num_features, axis=module.axis, dtype=dtype)
    layer.load_state_dict({name: buffer.cpu().numpy() for name, buffer in module.state_dict().items()})
    return layer


# --- to PyTorch


def to_torch(layer: Any, dim: int = 1) -> Any:
    """Return the PyTorch module that computes what a fastbn layer or network does.

    Parameters
    ----------
    layer : nn.Sequential, BatchNorm or a layer of fastbn.nn
        Layer or network. BatchNorm must have ``axis=1``; ``axis=-1`` stands for it, if x is (N, C).
    dim : {1, 2, 3}
        Which of ``BatchNorm1d``, ``BatchNorm2d`` and ``BatchNorm3d`` a BatchNorm becomes: for x of (N, C) or (N, C, L),
        of (N, C, H, W), of (N, C, D, H, W).

    Returns
    -------
    torch.nn.Module
        Module in the mode of the layer. Parameters are copied bit for bit, and running statistics are rounded to their
        dtype. A layer with an activation of its own becomes a ``Sequential`` of two. `fastbn.nn.Standardize` becomes a
        small module of this package, and a `fastbn.nn.FoldedDense` a ``Linear``, for x of (N, C).

    Raises
    ------
    TypeError
        A layer of a class of your own. The message has its position.
    ValueError
        A BatchNorm with another axis, or one that is in training mode and trains otherwise than PyTorch's (unbiased,
        ghost_size, renorm, frozen). In inference mode it is the same.
    ImportError
        PyTorch is not installed.

    Examples
    --------
    >>> from fastbn import nn
    >>> from fastbn.interop.torch import to_torch
    >>> to_torch(nn.Sequential(nn.Standardize(3), nn.Dense(3, 5, activation="relu")))
    Sequential(
      (0): Standardize(3, axis=1, dtype=None)
      (1): Sequential(
        (0): Linear(in_features=3, out_features=5, bias=True)
        (1): ReLU()
      )
    )
    """
    if dim not in (1, 2, 3) or not isinstance(dim, int) or isinstance(dim, bool):
        raise ValueError(f"expected dim to be 1, 2 or 3, got {dim}")
    return _module(_torch(), layer, dim, "")


def _module(torch: Any, layer: Any, dim: int, place: str) -> Any:
    if type(layer) is nn.Sequential:
        inner = [_module(torch, part, dim, position(place, i)) for i, part in enumerate(layer)]
        module = torch.nn.Sequential(*inner)
        module.training = layer.training
        return module
    said = f"layer {place!r}" if place else "the layer"
    make = _MAKERS.get(nn.known_as(layer))
    if make is None:
        known = ", ".join(cls.__name__ for cls in _MAKERS)
        raise TypeError(f"cannot convert {said} ({type(layer).__name__}): expected Sequential, {known}")
    try:
        module = make(torch, layer, dim)
    except ValueError as error:
        raise ValueError(f"cannot convert {said} ({type(layer).__name__}): {error}") from error
    activation = getattr(layer, "activation", None)
    if activation is not None:
        module = torch.nn.Sequential(module, torch.nn.ReLU() if activation == "relu" else torch.nn.LeakyReLU(0.01))
    return module.train(layer.training)


def _linear(torch: Any, layer: nn.Dense, dim: int) -> Any:
    arguments = {"bias": layer.bias, "dtype": getattr(torch, layer.dtype.name)}
    module = torch.nn.utils.skip_init(torch.nn.Linear, layer.n_in, layer.n_out, **arguments)  # without random numbers
    return _filled(torch, module, layer.params)


def _norm(torch: Any, layer: BatchNorm, dim: int) -> Any:
    if layer.axis != 1 and not (layer.axis == -1 and dim == 1):
        raise ValueError(f"expected axis=1, got axis={layer.axis}")
    config = layer.config()
    otherwise = {name: config[name] for name in ("ghost_size", "renorm") if config[name] is not None}
    otherwise |= {} if layer.unbiased else {"unbiased": False}
    otherwise |= {"frozen": True} if layer.frozen else {}
    if layer.training and otherwise:
        settings = ", ".join(f"{name}={value}" for name, value in otherwise.items())
        raise ValueError(f"with {settings} it trains otherwise than PyTorch's: call eval() first")
    names = ("num_features", "eps", "momentum", "affine", "track_running_stats")
    cls = getattr(torch.nn, f"BatchNorm{dim}d")
    module = cls(*(config[name] for name in names), dtype=getattr(torch, layer.dtype.name))
    return _filled(torch, module, layer.state_dict())


def _scaling(torch: Any, layer: nn.Standardize, dim: int) -> Any:
    dtype = None if layer.dtype is None else getattr(torch, layer.dtype.name)
    module = _modules().Standardize(layer.num_features, axis=layer.axis, dtype=dtype)
    return _filled(torch, module, layer.state_dict())


def _filled(torch: Any, module: Any, state: dict[str, Array]) -> Any:
    with np.errstate(over="ignore"):  # a variance that float32 does not hold is infinite there
        module.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in state.items()})
    return module


_MAKERS: dict[type, Callable[[Any, Any, int], Any]] = {
    nn.Dense: _linear,
    nn.FoldedDense: _linear,
    BatchNorm: _norm,
    nn.Standardize: _scaling,
    nn.ReLU: lambda torch, layer, dim: torch.nn.ReLU(),
    nn.LeakyReLU: lambda torch, layer, dim: torch.nn.LeakyReLU(layer.negative_slope),
    nn.Sigmoid: lambda torch, layer, dim: torch.nn.Sigmoid(),
    nn.Tanh: lambda torch, layer, dim: torch.nn.Tanh(),
    nn.Softmax: lambda torch, layer, dim: torch.nn.Softmax(layer.axis),
    nn.Dropout: lambda torch, layer, dim: torch.nn.Dropout(layer.p),
    nn.Flatten: lambda torch, layer, dim: torch.nn.Flatten(),
    nn.Identity: lambda torch, layer, dim: torch.nn.Identity(),
}


def replace(model: Any) -> Any:
    """Let every ``BatchNorm1d``, ``BatchNorm2d`` and ``BatchNorm3d`` of a PyTorch model run on fastbn's kernels.

    The modules stay the same objects with the same parameters, buffers and hooks, so that optimizers, states and
    references keep their meaning. Only their class changes, to `FastBatchNorm1d` and its kin.

    Parameters
    ----------
    model : torch.nn.Module
        Model, which is changed in place. ``SyncBatchNorm`` and subclasses stay as they are. What knows the classes of
        ``torch.nn`` alone, as ``torch.jit.script`` and ``fuse_modules`` do, is called before.

    Returns
    -------
    torch.nn.Module
        The model itself.

    Raises
    ------
    TypeError
        Another object.
    ImportError
        PyTorch is not installed.

    Examples
    --------
    >>> import torch
    >>> from fastbn.interop.torch import replace
    >>> type(replace(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)))[1]).__name__
    'FastBatchNorm2d'
    """
    if not isinstance(model, _torch().nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    fast = _modules().FAST
    for module in model.modules():
        module.__class__ = fast.get(type(module), type(module))
    return model


# --- optimizers


def optimizer_from_torch(optimizer: Any, module: Any, model: Any) -> Any:
    """Return the fastbn optimizer that goes on where a PyTorch optimizer stands.

    Parameters
    ----------
    optimizer : torch.optim.SGD, RMSprop, Adam or AdamW
        Optimizer of all parameters of ``module``. Groups of parameters may differ in weight_decay, and one of them
        must then have 0.
    module : torch.nn.Module
        PyTorch's network.
    model : nn.Sequential, BatchNorm or a layer of fastbn.nn
        The same network, as `from_torch` makes it.

    Returns
    -------
    optim.SGD, optim.RMSprop or optim.Adam
        Optimizer of ``model``, with the rate, the arguments and the state of ``optimizer``.

    Raises
    ------
    TypeError
        An optimizer of another class.
    ValueError
        Arguments or states that fastbn's optimizers cannot have (amsgrad, maximize, dampening, centered, an L2 decay in
        Adam, groups that differ in more than their decay), or parameters that are not those of ``model``.

    Examples
    --------
    >>> import torch
    >>> from fastbn.interop.torch import from_torch, optimizer_from_torch
    >>> module = torch.nn.Linear(3, 2)
    >>> optimizer_from_torch(torch.optim.AdamW(module.parameters(), lr=0.01), module, from_torch(module))
    Adam(lr=0.01, betas=(0.9, 0.999), eps=1e-08, weight_decay=0.01)
    """
    torch = _torch()
    kinds = {
        torch.optim.SGD: "SGD",
        torch.optim.RMSprop: "RMSprop",
        torch.optim.Adam: "Adam",
        torch.optim.AdamW: "Adam",
    }
    if type(optimizer) not in kinds:
        raise TypeError(f"expected torch.optim.SGD, RMSprop, Adam or AdamW, got {type(optimizer).__name__}")
    kind = kinds[type(optimizer)]
    parameters = _same_parameters(module, model)
    names = {id(parameter): name for name, parameter in parameters.items()}
    given = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    if sorted(given) != sorted(names):
        raise ValueError(f"expected an optimizer of the {len(names)} parameters of module, got {len(given)} other ones")
    arguments, exclude = _arguments(optimizer, names)
    made = getattr(optim, kind)(model, **arguments, exclude=exclude)
    state = made.state_dict()
    steps = set()
    for name, parameter in parameters.items():
        kept = optimizer.state.get(parameter, {})
        for key in _BUFFERS[kind]:
            if (buffer := kept.get(key)) is not None and f"{name}.{key}" in state:
                state[f"{name}.{key}"] = _array(buffer)
        steps.add(int(kept.get("step", 0)))
    if len(steps) > 1:
        raise ValueError(f"expected all parameters after as many steps, got {sorted(steps)}")
    state["step"] = np.array(steps.pop())
    if kind == "Adam":
        for key, beta in zip(("beta1_power", "beta2_power"), arguments["betas"], strict=True):
            state[key] = np.array(_power(beta, int(state["step"])))
    made.load_state_dict(state)
    return made


def optimizer_to_torch(optimizer: Any, module: Any) -> Any:
    """Return the PyTorch optimizer that goes on where a fastbn optimizer stands.

    Parameters
    ----------
    optimizer : optim.SGD, optim.RMSprop or optim.Adam
        fastbn's optimizer.
    module : torch.nn.Module
        Network that `to_torch` made of the optimizer's model.

    Returns
    -------
    torch.optim.SGD, RMSprop, Adam or AdamW
        Optimizer of the parameters of ``module``; AdamW for an Adam with weight_decay.

    Raises
    ------
    TypeError
        An optimizer of another class.
    ValueError
        Parameters of ``module`` that are not those of the optimizer's model.

    Examples
    --------
    >>> from fastbn import nn, optim
    >>> from fastbn.interop.torch import optimizer_to_torch, to_torch
    >>> model = nn.Dense(3, 2)
    >>> type(optimizer_to_torch(optim.Adam(model, weight_decay=0.1), to_torch(model))).__name__
    'AdamW'
    """
    torch = _torch()
    kind = type(optimizer).__name__
    if type(optimizer) not in (optim.SGD, optim.RMSprop, optim.Adam):
        raise TypeError(f"expected an optimizer of fastbn.optim, got {kind}")
    parameters = _same_parameters(module, optimizer.model)
    arguments = {name: getattr(optimizer, name) for name in _ARGUMENTS[kind] if name != "weight_decay"}
    decay = optimizer.weight_decay
    groups = [{"params": [p for n, p in parameters.items() if n not in optimizer.exclude], "weight_decay": decay}]
    if optimizer.exclude:
        groups.append(
            {"params": [parameters[name] for name in parameters if name in optimizer.exclude], "weight_decay": 0}
        )
    cls = getattr(torch.optim, "AdamW" if kind == "Adam" and decay else kind)
    made = cls([group for group in groups if group["params"]], **arguments)
    state = optimizer.state_dict()
    if state["step"] == 0:
        return made
    for name, parameter in parameters.items():
        buffers = {key: state[f"{name}.{key}"] for key in _BUFFERS[kind] if f"{name}.{key}" in state}
        made.state[parameter] = {key: torch.from_numpy(buffer) for key, buffer in buffers.items()}
        if kind != "SGD":
            made.state[parameter]["step"] = torch.tensor(float(state["step"]))
    return made


# Arguments that both have under one name, and the buffers of each parameter.
_ARGUMENTS = {
    "SGD": ("lr", "momentum", "nesterov", "weight_decay"),
    "RMSprop": ("lr", "alpha", "eps", "momentum", "weight_decay"),
    "Adam": ("lr", "betas", "eps", "weight_decay"),
}
_BUFFERS = {
    "SGD": ("momentum_buffer",),
    "RMSprop": ("square_avg", "momentum_buffer"),
    "Adam": ("exp_avg", "exp_avg_sq"),
}


def _same_parameters(module: Any, model: Any) -> dict[str, Any]:
    """PyTorch's parameters under the names of ours, whose order is the same."""
    if not isinstance(module, _torch().nn.Module):
        raise TypeError(f"expected module to be a torch.nn.Module, got {type(module).__name__}")
    if not isinstance(getattr(model, "params", None), dict):
        raise TypeError(f"expected model to be a layer or network of fastbn, got {type(model).__name__}")
    parameters = list(module.parameters())
    theirs = [tuple(parameter.shape) for parameter in parameters]
    ours = [array.shape for array in model.params.values()]
    if theirs != ours:
        raise ValueError(f"expected a module with parameters of the model's shapes {ours}, got {theirs}")
    return dict(zip(model.params, parameters, strict=True))


def _arguments(optimizer: Any, names: dict[int, str]) -> tuple[dict[str, Any], list[str]]:
    """The arguments that all groups share, and the names of the parameters without weight decay."""
    kind = "Adam" if type(optimizer).__name__ == "AdamW" else type(optimizer).__name__
    groups = []
    for group in optimizer.param_groups:
        for name in ("amsgrad", "maximize", "dampening", "centered"):
            if group.get(name):
                raise ValueError(f"fastbn's {kind} has no {name}, got {name}={group[name]}")
        decoupled = group.get("decoupled_weight_decay", type(optimizer).__name__ == "AdamW")
        if kind == "Adam" and group["weight_decay"] and not decoupled:
            raise ValueError("fastbn's Adam decouples weight_decay, as AdamW does, got an Adam with weight_decay")
        groups.append({name: _number(group[name]) for name in _ARGUMENTS[kind]})
    decays = {group["weight_decay"] for group in groups}
    decay = max(decays)
    first = groups[0] | {"weight_decay": decay}
    if decays - {0.0, decay} or any(group | {"weight_decay": decay} != first for group in groups):
        raise ValueError("expected groups that differ in weight_decay alone, where it may be 0 in some of them")
    without = [group["params"] for group in optimizer.param_groups if decay and not group["weight_decay"]]
    return first, [names[id(parameter)] for parameters in without for parameter in parameters]


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        return value
    return tuple(map(float, value)) if isinstance(value, (tuple, list)) else float(value)


def _power(beta: float, step: int) -> float:
    """beta**step, multiplied out as a training would have done it."""
    power = 1.0
    for _ in range(step):
        power *= beta
        if not power:
            break
    return power
