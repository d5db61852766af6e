"""fastbn.interop.torch beside PyTorch: what is converted computes and trains alike, and FastBatchNorm is a drop-in."""

import copy
import io
import itertools
import pickle
import warnings

import numpy as np
import pytest

import fastbn
from bench import replace as measured
from fastbn import BatchNorm, losses, nn, optim
from fastbn.distributed import convert
from fastbn.interop.torch import (
    FastBatchNorm1d,
    FastBatchNorm2d,
    FastBatchNorm3d,
    Standardize,
    from_torch,
    optimizer_from_torch,
    optimizer_to_torch,
    replace,
    to_torch,
)

torch = pytest.importorskip("torch")
F = torch.nn.functional

DTYPES = ["float32", "float64"]
LOSS = {"float32": 5e-6, "float64": 1e-13}  # as tests/parity
STATE = {"float32": 2e-5, "float64": 1e-12}
FAST = {1: FastBatchNorm1d, 2: FastBatchNorm2d, 3: FastBatchNorm3d}
OPTIONS = [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}, {"eps": 1e-2, "momentum": 0.5}]
SHAPES = {1: (8, 5), 2: (4, 5, 6, 7), 3: (2, 5, 3, 4, 5)}


def network(dtype="float32", seed=0):
    """Every kind of module, nested, with running statistics of some batches."""
    torch.manual_seed(seed)
    t = torch.nn
    inner = t.Sequential(
        t.Linear(8, 7, bias=False), t.BatchNorm1d(7, eps=1e-3, momentum=0.3), t.LeakyReLU(0.2), t.Identity()
    )
    module = t.Sequential(
        t.Flatten(), t.Linear(12, 8), t.BatchNorm1d(8), t.ReLU(inplace=True), inner, t.Dropout(0.5), t.Linear(7, 6),
        t.BatchNorm1d(6, affine=False, momentum=None), t.Tanh(), t.Linear(6, 5), t.Sigmoid(), t.Linear(5, 4),
    ).to(getattr(torch, dtype))  # fmt: skip
    with torch.no_grad():
        for norm in (m for m in module.modules() if isinstance(m, t.BatchNorm1d) and m.affine):
            norm.weight.uniform_(0.5, 2)
            norm.bias.normal_()
        for _ in range(3):
            module(torch.randn(20, 3, 4, dtype=getattr(torch, dtype)))
    return module


def no_dropout(module):
    for m in module.modules():
        if isinstance(m, torch.nn.Dropout):
            m.eval()
    return module


def same_state(ours, theirs):
    """Keys, and values: bit for bit where the dtypes agree, and running statistics as float64."""
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].shape == tuple(tensor.shape)
        assert (ours[key].astype(tensor.numpy().dtype) == tensor.numpy()).all(), key


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_network_has_the_same_state_and_outputs(dtype):
    module = network(dtype)
    model = from_torch(module)
    same_state(model, module)
    assert model.training
    assert not from_torch(module.eval()).training
    x = np.random.default_rng(0).standard_normal((50, 3, 4)).astype(dtype)
    with torch.no_grad():
        expected = module(torch.from_numpy(x)).numpy()
    y = model.eval()(x)
    assert y.dtype == expected.dtype
    assert abs(y - expected).max() <= 40 * np.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
def test_there_and_back_is_the_same_network(dtype):
    module = network(dtype)
    again = to_torch(from_torch(module))
    assert repr(again).replace("inplace=True", "") == repr(module).replace("inplace=True", "")
    for (name, a), b in zip(module.state_dict().items(), again.state_dict().values(), strict=True):
        assert a.dtype == b.dtype, name
        assert torch.equal(a, b), name
    ours = from_torch(again)
    assert repr(ours) == repr(from_torch(module))
    assert [layer.training for layer in ours] == [True] * len(ours)


def test_modes_travel_one_by_one():
    module = network()
    module[2].eval()
    model = from_torch(module)
    assert [layer.training for layer in model] == [m.training for m in module]
    again = to_torch(model)
    assert [m.training for m in again.modules()] == [m.training for m in module.modules()]


@pytest.mark.parametrize(
    ("cls", "shape"),
    [
        ("BatchNorm1d", (9, 5)),
        ("BatchNorm1d", (4, 5, 3)),
        ("BatchNorm2d", (3, 5, 4, 2)),
        ("BatchNorm3d", (2, 5, 3, 2, 2)),
    ],
)
@pytest.mark.parametrize(
    "options", [{}, {"affine": False}, {"track_running_stats": False}, {"momentum": None, "eps": 1e-2}]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_batch_norm_goes_on_on_the_other_side(cls, shape, options, dtype):
    theirs = getattr(torch.nn, cls)(5, **options, dtype=getattr(torch, dtype))
    rng = np.random.default_rng(0)
    batches = rng.standard_normal((4, *shape)).astype(dtype) * 3 + 1
    for x in batches[:2]:
        theirs(torch.from_numpy(x))
    ours = from_torch(theirs)
    for x in batches[2:]:
        expected = theirs(torch.from_numpy(x)).detach().numpy()
        np.testing.assert_allclose(ours(x), expected, rtol=0, atol=30 * np.finfo(dtype).eps)
    for key, value in theirs.state_dict().items():
        np.testing.assert_allclose(ours.state_dict()[key], value.numpy(), rtol=20 * np.finfo(dtype).eps, atol=1e-7)
    again = to_torch(ours, dim=int(cls[-2])).eval()
    expected = ours.eval()(batches[0])
    np.testing.assert_allclose(
        again(torch.from_numpy(batches[0])).detach().numpy(), expected, rtol=0, atol=30 * np.finfo(dtype).eps
    )


def test_sync_batch_norm_is_a_batch_norm():
    theirs = torch.nn.SyncBatchNorm(4)
    theirs.running_mean += 2
    ours = from_torch(theirs)
    assert repr(ours) == "BatchNorm(4)"
    assert (ours.running_mean == 2).all()


def test_layers_with_an_activation_become_two_modules():
    model = nn.Sequential(
        nn.Dense(3, 4, activation="relu", seed=0), BatchNorm(4, activation="leaky_relu"), nn.Dense(4, 2, seed=1)
    )
    model(np.random.default_rng(0).standard_normal((30, 3)))
    module = to_torch(model)
    assert [name for name, _ in module.named_parameters()] == [
        "0.0.weight", "0.0.bias", "1.0.weight", "1.0.bias", "2.weight", "2.bias",
    ]  # fmt: skip
    x = np.random.default_rng(1).standard_normal((7, 3)).astype(np.float32)
    expected = model.eval()(x)
    np.testing.assert_allclose(module.eval()(torch.from_numpy(x)).detach().numpy(), expected, rtol=0, atol=2e-6)
    assert [type(layer) for layer in from_torch(module)[0]] == [nn.Dense, nn.ReLU]


@pytest.mark.parametrize("dtype", [None, "float32"])
@pytest.mark.parametrize("axis", [1, -1])
def test_standardize_and_softmax_travel(dtype, axis):
    X = np.random.default_rng(0).standard_normal((50, 3)) + 1e6
    X[:, 1] = 7
    model = nn.Sequential(nn.Standardize(3, axis=axis, dtype=dtype).fit(X), nn.Dense(3, 2, seed=0), nn.Softmax()).eval()
    module = to_torch(model)
    if dtype is None:
        module[1].double()
    np.testing.assert_allclose(module(torch.from_numpy(X)).detach().numpy(), model(X), rtol=0, atol=1e-6)
    assert isinstance(module[0], Standardize)
    back = from_torch(module)
    assert repr(back[0]) == repr(model[0])
    assert all((back[0].state_dict()[k] == v).all() for k, v in model[0].state_dict().items())


def test_a_folded_network_travels():
    model = nn.Sequential(nn.Dense(5, 4, seed=0), BatchNorm(4, activation="relu"), nn.Dense(4, 2, seed=1))
    x = np.random.default_rng(0).standard_normal((9, 5)).astype(np.float32)
    model(x)
    folded = model.folded()
    np.testing.assert_allclose(to_torch(folded)(torch.from_numpy(x)).detach().numpy(), folded(x), rtol=0, atol=1e-6)


def test_converting_draws_no_random_numbers():
    model = nn.Sequential(nn.Dense(3, 4), BatchNorm(4), nn.Dropout(0.5))
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    to_torch(model)
    assert torch.equal(torch.rand(2), expected)


# --- refusals


@pytest.mark.parametrize(
    ("module", "error", "words"),
    [
        (
            lambda t: t.Sequential(t.Linear(2, 2), t.Sequential(t.ReLU(), t.GELU())),
            TypeError,
            r"module '1\.1' \(GELU\)",
        ),
        (lambda t: t.GELU(), TypeError, r"the module \(GELU\)"),
        (lambda t: t.Sequential(t.Conv2d(1, 1, 1)), TypeError, r"module '0' \(Conv2d\)"),
        (lambda t: t.Sequential(t.Flatten(2)), ValueError, "start_dim=1 and end_dim=-1, got 2 and -1"),
        (lambda t: t.Sequential(t.LeakyReLU(-1.0)), ValueError, r"module '0' \(LeakyReLU\).*negative_slope"),
        (lambda t: t.Sequential(t.Linear(2, 2).half()), TypeError, r"module '0' .*float32 or float64, got float16"),
        (lambda t: t.LazyLinear(3), TypeError, "LazyLinear"),
        (lambda t: t.Linear(2, 2, device="meta"), ValueError, "values"),
        (lambda t: t.BatchNorm1d(2, bias=False), ValueError, "without bias trains otherwise"),
        (lambda t: t.utils.parametrizations.weight_norm(t.Linear(2, 2)), TypeError, "ParametrizedLinear"),
        (lambda t: t.Softmax(), ValueError, "dim"),
    ],
)
def test_what_cannot_be_converted_is_named(module, error, words):
    with pytest.raises(error, match=words):
        from_torch(module(torch.nn))


def test_hooks_and_shared_parameters_are_refused():
    linear = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"module '2' \(Linear\) shares a parameter with module '0'"):
        from_torch(torch.nn.Sequential(linear, torch.nn.ReLU(), linear))
    tied = torch.nn.Linear(2, 2)
    tied.weight = linear.weight
    with pytest.raises(ValueError, match="shares a parameter"):
        from_torch(torch.nn.Sequential(linear, tied))
    for weight in (linear.weight, linear.weight.t()):  # another object over the same memory
        tied.weight = torch.nn.Parameter(weight)
        with pytest.raises(ValueError, match="shares a parameter"):
            from_torch(torch.nn.Sequential(linear, tied))
    relu = torch.nn.ReLU()
    assert len(from_torch(torch.nn.Sequential(relu, relu))) == 2  # without parameters there is nothing to share
    linear.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"\(Linear\) has hooks"):
        from_torch(torch.nn.Sequential(linear))
    for bad in (None, "model", torch.ones(2), torch.nn.Linear):
        with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
            from_torch(bad)
        with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
            replace(bad)


@pytest.mark.parametrize("option", [{"unbiased": False}, {"ghost_size": 4}, {"renorm": (3, 5)}])
def test_what_trains_otherwise_is_converted_in_inference_alone(option):
    layer = BatchNorm(3, **option)
    with pytest.raises(ValueError, match=r"layer '1' \(BatchNorm\): with \w+=.* trains otherwise .*eval"):
        to_torch(nn.Sequential(nn.Dense(2, 3), layer))
    x = np.random.default_rng(0).standard_normal((9, 3)).astype(np.float32)
    layer(x)
    expected = layer.eval()(x)
    np.testing.assert_allclose(to_torch(layer)(torch.from_numpy(x)).detach().numpy(), expected, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="frozen=True"):
        to_torch(BatchNorm(3).freeze())


def test_other_layers_and_axes_are_refused():
    class Own(nn.ReLU):
        pass

    with pytest.raises(TypeError, match=r"layer '0\.1' \(Own\)"):
        to_torch(nn.Sequential(nn.Sequential(nn.ReLU(), Own())))
    with pytest.raises(ValueError, match="axis=1, got axis=0"):
        to_torch(BatchNorm(3, axis=0))
    with pytest.raises(ValueError, match="axis=1, got axis=-1"):
        to_torch(BatchNorm(3, axis=-1), dim=2)
    with pytest.raises(ValueError, match="dim to be 1, 2 or 3, got 4"):
        to_torch(BatchNorm(3), dim=4)


# --- optimizers

OPTIMIZERS = {
    "sgd": ("SGD", {"lr": 0.1}),
    "momentum": ("SGD", {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3}),
    "nesterov": ("SGD", {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    "rmsprop": ("RMSprop", {"lr": 1e-3}),
    "rmsprop momentum": ("RMSprop", {"lr": 3e-4, "alpha": 0.9, "eps": 1e-6, "momentum": 0.8, "weight_decay": 1e-3}),
    "adam": ("Adam", {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-6}),
    "adamw": ("AdamW", {"lr": 3e-3, "weight_decay": 0.02}),
}


def trainable(dtype):
    torch.manual_seed(1)
    t = torch.nn
    return t.Sequential(
        t.Linear(9, 16, bias=False), t.BatchNorm1d(16), t.ReLU(), t.Linear(16, 12, bias=False), t.BatchNorm1d(12),
        t.Tanh(), t.Linear(12, 5),
    ).to(getattr(torch, dtype))  # fmt: skip


def their_step(module, optimizer, x, t):
    optimizer.zero_grad()
    loss = F.cross_entropy(module(torch.from_numpy(x)), torch.from_numpy(t))
    loss.backward()
    optimizer.step()
    return loss.item()


def our_step(model, optimizer, x, t):
    loss, dy = losses.softmax_cross_entropy(model(x), t)
    model.backward(dy)
    optimizer.step()
    return loss


def groups(module, kwargs, split):
    if not split:
        return [{"params": list(module.parameters())}]
    decayed = [p for p in module.parameters() if p.ndim > 1]
    return [{"params": [p for p in module.parameters() if p.ndim == 1], "weight_decay": 0}, {"params": decayed}]


@pytest.mark.parametrize("split", [False, True], ids=["one group", "two groups"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_on_the_other_side(name, dtype, split):
    cls, kwargs = OPTIMIZERS[name]
    module = trainable(dtype)
    theirs = getattr(torch.optim, cls)(groups(module, kwargs, split and "weight_decay" in kwargs), **kwargs)
    rng = np.random.default_rng(2)
    batches = [(rng.standard_normal((16, 9)).astype(dtype), rng.integers(0, 5, 16)) for _ in range(90)]
    for batch in batches[:30]:
        their_step(module, theirs, *batch)
    model = from_torch(module)
    ours = optimizer_from_torch(theirs, module, model)
    for batch in batches[30:60]:  # step for step beside the one that it came from
        assert abs(our_step(model, ours, *batch) - their_step(module, theirs, *batch)) <= LOSS[dtype]
    back = to_torch(model)
    went = optimizer_to_torch(ours, back)
    assert type(went) is type(theirs)
    for batch in batches[60:]:
        assert abs(their_step(back, went, *batch) - their_step(module, theirs, *batch)) <= LOSS[dtype]
    for a, b in zip(back.state_dict().values(), module.state_dict().values(), strict=True):
        assert abs(a - b).max() <= STATE[dtype]


def test_an_optimizer_before_its_first_step_travels():
    for name, (cls, kwargs) in OPTIMIZERS.items():
        module = trainable("float32")
        theirs = getattr(torch.optim, cls)(module.parameters(), **kwargs)
        model = from_torch(module)
        ours = optimizer_from_torch(theirs, module, model)
        assert ours.state_dict()["step"] == 0, name
        assert not optimizer_to_torch(ours, to_torch(model)).state


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda o, p: o.SGD(p, lr=0.1, momentum=0.9, dampening=0.1), "no dampening, got dampening=0.1"),
        (lambda o, p: o.SGD(p, lr=0.1, maximize=True), "no maximize"),
        (lambda o, p: o.Adam(p, amsgrad=True), "no amsgrad"),
        (lambda o, p: o.Adam(p, weight_decay=0.1), "decouples weight_decay"),
        (lambda o, p: o.RMSprop(p, centered=True), "no centered"),
        (lambda o, p: o.SGD([{"params": p[:1], "lr": 1.0}, {"params": p[1:]}], lr=0.1), "differ in weight_decay alone"),
        (lambda o, p: o.SGD(p[1:], lr=0.1), "parameters of module"),
    ],
)
def test_what_fastbns_optimizers_do_not_have_is_refused(make, words):
    module = trainable("float32")
    with pytest.raises(ValueError, match=words):
        optimizer_from_torch(make(torch.optim, list(module.parameters())), module, from_torch(module))


def test_arguments_in_the_wrong_order_are_named():
    module = torch.nn.Linear(3, 2)
    theirs, model = torch.optim.Adam(module.parameters()), from_torch(module)
    for first, second, words in [
        (model, module, "module to be"),
        (module, None, "model to be"),
        (None, model, "module"),
    ]:
        with pytest.raises(TypeError, match=f"expected {words}"):
            optimizer_from_torch(theirs, first, second)
    with pytest.raises(TypeError, match=r"expected module to be a torch\.nn\.Module, got Dense"):
        optimizer_to_torch(optim.SGD(model, 0.1), model)
    for dim in (True, 1.0):
        with pytest.raises(ValueError, match=f"expected dim to be 1, 2 or 3, got {dim}"):
            to_torch(BatchNorm(3), dim)


def test_betas_may_be_a_list():
    module = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(module.parameters())
    optimizer.param_groups[0]["betas"] = [0.8, 0.9]  # as a state has them that went through JSON
    assert optimizer_from_torch(optimizer, module, from_torch(module)).betas == (0.8, 0.9)


def test_other_optimizers_and_models_are_refused():
    module = trainable("float32")
    model = from_torch(module)
    with pytest.raises(TypeError, match="got Adagrad"):
        optimizer_from_torch(torch.optim.Adagrad(module.parameters()), module, model)
    with pytest.raises(ValueError, match="parameters of the model's shapes"):
        optimizer_from_torch(torch.optim.SGD(module.parameters(), lr=0.1), module, model[:-1])
    with pytest.raises(TypeError, match="optimizer of fastbn"):
        optimizer_to_torch(None, module)
    with pytest.raises(ValueError, match="parameters of the model's shapes"):
        optimizer_to_torch(optim.SGD(model, lr=0.1), torch.nn.Linear(2, 2))


# --- FastBatchNorm


def pair(dim, dtype="float32", **options):
    theirs = getattr(torch.nn, f"BatchNorm{dim}d")(5, **options, dtype=getattr(torch, dtype))
    if theirs.affine:
        torch.manual_seed(0)
        with torch.no_grad():
            theirs.weight.uniform_(-2, 2)
            theirs.bias.normal_()
    ours = FAST[dim](5, **options, dtype=getattr(torch, dtype))
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fast_batch_norm_is_torchs(dtype, dim, options, training):
    ours, theirs = pair(dim, dtype, **options)
    u = np.finfo(dtype).eps
    torch.manual_seed(1)
    for _ in range(3):
        x = torch.randn(SHAPES[dim], dtype=getattr(torch, dtype)) * 2 + 1
        results = []
        for norm in (ours, theirs):
            norm.train(training)
            norm.zero_grad()
            given = x.clone().requires_grad_()
            y = norm(given)
            (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)).sum().backward()
            results.append([y, given.grad, *(p.grad for p in norm.parameters())])
        for got, expected in zip(*results, strict=True):
            assert got.dtype == expected.dtype
            torch.testing.assert_close(got, expected, rtol=40 * u, atol=40 * u * expected.detach().abs().max().item())
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, rtol=20 * u, atol=20 * u, msg=key)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_gradcheck(dim, training):
    ours, _ = pair(dim, "float64")
    ours.running_var *= 3
    ours.train(training)
    x = torch.randn(SHAPES[dim], dtype=torch.float64, requires_grad=True)

    def function(x, weight, bias):
        ours.running_mean.zero_()
        return torch.func.functional_call(ours, {"weight": weight, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(function, (x, ours.weight, ours.bias))


def test_memory_formats_stay_and_nothing_is_copied():
    norm = FastBatchNorm2d(5)
    for order in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(4, 5, 6, 7).to(memory_format=order).requires_grad_()
        y = norm(x)
        assert y.is_contiguous(memory_format=order)
        y.backward(torch.ones_like(y))
        assert x.grad.is_contiguous(memory_format=order)
    strided = torch.randn(4, 5, 6, 14)[..., ::2]
    expected = torch.nn.BatchNorm2d(5)(strided)
    torch.testing.assert_close(norm.train()(strided), expected)


def test_gradients_of_every_form_are_taken():
    ours, theirs = pair(2)
    x = torch.randn(4, 5, 6, 7)
    for dy in (
        torch.ones(()).expand(4, 5, 6, 7),
        torch.randn(4, 7, 6, 5).transpose(1, 3),
        torch.randn(4, 5, 6, 14)[..., ::2],
    ):
        grads = []
        for norm in (ours, theirs):
            given = x.clone().requires_grad_()
            norm(given).backward(dy)
            grads.append(given.grad)
        torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-5)


def test_only_what_needs_a_gradient_gets_one():
    norm = FastBatchNorm1d(5)
    norm.weight.requires_grad_(False)
    x = torch.randn(8, 5)
    norm(x).sum().backward()
    assert norm.weight.grad is None
    assert norm.bias.grad is not None
    with torch.no_grad():
        assert not norm(x).requires_grad
    with torch.inference_mode():
        assert norm.eval()(x).shape == x.shape


def test_the_second_derivative_is_refused_in_a_sentence():
    norm = FastBatchNorm1d(5)
    x = torch.randn(8, 5, requires_grad=True)
    (grad,) = torch.autograd.grad(norm(x).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative: use torch\.nn"):
        grad.sum().backward()


def test_what_was_changed_before_backward_is_seen():
    norm = FastBatchNorm1d(5)
    for changed in ("x", "weight"):
        x = torch.randn(8, 5, requires_grad=True) * 1
        y = norm(x)
        with torch.no_grad():
            (x if changed == "x" else norm.weight).mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_wrong_inputs_get_torchs_errors_and_change_nothing():
    norm = FastBatchNorm2d(5)
    before = copy.deepcopy(norm.state_dict())
    for bad, error in [
        (torch.randn(4, 5), ValueError),  # 2 dimensions
        (torch.randn(4, 6, 2, 2), (ValueError, RuntimeError)),  # 6 features
        (torch.randn(1, 5, 1, 1), ValueError),  # one value for each
        (torch.ones(4, 5, 2, 2, dtype=torch.int64), RuntimeError),
    ]:
        with pytest.raises(error):
            norm(bad)
        assert all(
            torch.equal(a, b) for a, b in zip(before.values(), norm.state_dict().values(), strict=True) if a.ndim
        )


@pytest.mark.parametrize(
    "make", [lambda x: x.bfloat16(), lambda x: x.to("meta"), lambda x: x[:0]], ids=["bf16", "meta", "empty"]
)
def test_other_tensors_go_through_torchs_own(make):
    ours, theirs = FastBatchNorm1d(5), torch.nn.BatchNorm1d(5)
    x = make(torch.randn(8, 5))
    ours, theirs = (m.to(x.device) if x.is_meta else m.to(x.dtype) for m in (ours, theirs))
    got, expected = ours(x), theirs(x)
    assert (got.dtype, got.shape, got.device) == (expected.dtype, expected.shape, expected.device)
    if not x.is_meta:
        assert torch.equal(got, expected)


def test_compiled_exported_and_traced_models_fall_back():
    model = replace(torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.BatchNorm1d(5), torch.nn.ReLU()))
    x = torch.randn(8, 4)
    expected = copy.deepcopy(model)(x)
    compiled = torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = torch.jit.trace(copy.deepcopy(model), x)
    torch.testing.assert_close(traced(x), model(x))
    exported = torch.export.export(copy.deepcopy(model), (x,))
    torch.testing.assert_close(exported.module()(x), model(x))


def test_functional_gradients_agree():
    ours, theirs = pair(1)
    x = torch.randn(8, 5)
    grads = []
    for norm in (ours.eval(), theirs.eval()):
        parameters = dict(norm.named_parameters())
        loss = lambda p, norm=norm: torch.func.functional_call(norm, p, (x,)).pow(2).sum()  # noqa: E731
        grads.append(torch.func.grad(loss)(parameters))
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("missing", ["weight", "bias"])
def test_a_parameter_alone_gets_its_gradient(missing, training):
    results = []
    for norm in pair(2):
        setattr(norm, missing, None)
        x = torch.randn(4, 5, 3, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
        norm.train(training)(x).pow(3).sum().backward()
        results.append([x.grad, *(parameter.grad for parameter in norm.parameters())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_many_gradients_at_once(affine, training):
    results = []
    for norm in pair(1, affine=affine):
        norm.running_var *= 3
        x = torch.randn(8, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
        dy = torch.randn(4, 8, 5, generator=torch.Generator().manual_seed(1))
        wanted = [x, *norm.parameters()]
        results.append(torch.autograd.grad(norm.train(training)(x), wanted, dy, is_grads_batched=True))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_what_changes_between_calls_is_seen():
    """What a module keeps of one call must not outlive its tensors, or any attribute."""
    ours, theirs = pair(1)
    x = torch.randn(8, 5)

    def other_values(norm):
        with torch.no_grad():
            norm.weight.mul_(3)
            norm.running_var.add_(1)

    def other_memory(norm):
        norm.weight.data = norm.weight.detach() + 1
        norm.running_mean = norm.running_mean - 1

    def every_other(norm):
        norm.bias.data = torch.arange(10.0)[::2]
        norm.running_var = torch.arange(1.0, 11)[::2]

    def reversed_later(norm):
        norm.bias.data = torch.arange(10.0)[:5]

    changes = [
        other_values, other_memory, every_other, reversed_later, lambda norm: setattr(norm, "eps", 0.5),
        lambda norm: setattr(norm, "momentum", 0.9), lambda norm: setattr(norm, "momentum", None),
        lambda norm: setattr(norm, "track_running_stats", False), lambda norm: setattr(norm, "bias", None),
        lambda norm: norm.double(), lambda norm: norm.float(), lambda norm: norm.share_memory(),
        lambda norm: norm.load_state_dict({n: t + 1 for n, t in norm.state_dict().items()}),
        lambda norm: norm.load_state_dict({n: t + 1 for n, t in norm.state_dict().items()}, assign=True),
    ]  # fmt: skip
    for change in [lambda norm: None, *changes]:
        for training in (False, True, False):
            results = []
            for norm in (ours, theirs):
                if not training:
                    change(norm)
                given = x.to(norm.weight.dtype)
                results.append(
                    [norm.train(training)(given).detach(), norm.running_mean.clone(), norm.running_var.clone()]
                )
            torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    again = copy.deepcopy(ours)
    again(x)
    assert again.running_mean.data_ptr() != ours.running_mean.data_ptr()


def test_modules_of_inference_mode_and_parametrized_ones_are_torchs():
    x = torch.randn(8, 5)
    with torch.inference_mode():
        ours, theirs = pair(1)
        torch.testing.assert_close(ours(x), theirs(x))
        torch.testing.assert_close(ours.running_var, theirs.running_var)
    results = []
    for norm in pair(1):
        torch.nn.utils.parametrize.register_parametrization(norm, "weight", torch.nn.Softplus())
        for _ in range(2):
            norm(x).pow(2).sum().backward()
            results.append(norm.parametrizations.weight.original.grad.clone())
            with torch.no_grad():
                norm.parametrizations.weight.original += 1
    torch.testing.assert_close(results[:2], results[2:], rtol=1e-4, atol=1e-4)


def test_what_float32_does_not_hold_becomes_infinite_without_a_word():
    results = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for norm in pair(1):
            x = (torch.arange(40.0).reshape(8, 5) * 1e25).requires_grad_()
            norm(x).backward(torch.full((8, 5), 3e38))
            results.append([norm.running_var, norm.num_batches_tracked, norm.bias.grad])
    torch.testing.assert_close(*results)


def test_writing_running_statistics_is_seen_by_pytorch():
    norm = FastBatchNorm1d(5)
    held = torch.ones(5, requires_grad=True)
    product = held * norm.running_mean
    norm(torch.randn(8, 5))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # PyTorch's own, in its first hessian
def test_transforms_and_forward_derivatives_go_through_torchs_own():
    x = torch.randn(3, 8, 5)
    for transform in (
        lambda norm: torch.func.vmap(norm)(x),
        lambda norm: torch.func.jvp(norm, (x[0],), (x[1],))[1],
        lambda norm: torch.func.jacrev(norm)(x[0]),
        lambda norm: torch.func.hessian(lambda x: norm(x).pow(3).sum())(x[0]),
        lambda norm: forward_derivative(norm, x[0], x[1]),
    ):
        ours, theirs = (transform(norm.eval()) for norm in pair(1))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


def forward_derivative(norm, x, tangent):
    with torch.autograd.forward_ad.dual_level():
        y = norm(torch.autograd.forward_ad.make_dual(x, tangent))
        return torch.autograd.forward_ad.unpack_dual(y).tangent


def test_torch_fx_sees_one_node():
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.BatchNorm1d(5))
    graph = torch.fx.symbolic_trace(replace(model))
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["0", "1"]
    x = torch.randn(8, 4)
    torch.testing.assert_close(graph.eval()(x), model.eval()(x))


def test_what_the_kernels_refuse_goes_through_torchs_own():
    x = torch.randn(8, 5)
    ours, theirs = (norm.eval() for norm in pair(1, eps=0.0))
    torch.testing.assert_close(ours(x), theirs(x))
    ours, theirs = pair(1)
    ours.running_mean = theirs.running_mean = None
    for norm in (ours, theirs):
        with pytest.raises(ValueError, match="running_mean and running_var"):
            norm(x)
    for norm in pair(1):
        with pytest.raises(RuntimeError, match="should contain 6 elements"):
            norm(torch.randn(8, 6))


def test_gradients_with_a_negative_bit_are_read():
    results = []
    for norm in pair(1):
        x = torch.ones(8, 5).cumsum(0).requires_grad_()
        dy = torch.complex(torch.zeros(8, 5), torch.arange(40.0).reshape(8, 5).sin()).conj().imag
        assert dy.is_neg()
        norm(x).backward(dy)
        results.append(x.grad)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_replace_keeps_modules_states_and_hooks():
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 5, 3), torch.nn.BatchNorm2d(5), torch.nn.Sequential(torch.nn.BatchNorm2d(5)),
        torch.nn.Flatten(), torch.nn.Linear(180, 4), torch.nn.BatchNorm1d(4), torch.nn.SyncBatchNorm(4),
    )  # fmt: skip
    plain = copy.deepcopy(model)
    norm, seen = model[1], []
    norm.register_forward_hook(lambda *_: seen.append(1))
    parameters = [id(p) for p in model.parameters()]
    assert replace(model) is model
    assert model[1] is norm
    assert [type(m) for m in (model[1], model[2][0], model[5], model[6])] == [
        FastBatchNorm2d, FastBatchNorm2d, FastBatchNorm1d, torch.nn.SyncBatchNorm,
    ]  # fmt: skip
    assert [id(p) for p in model.parameters()] == parameters
    model[6], plain[6] = torch.nn.Identity(), torch.nn.Identity()
    x = torch.randn(6, 3, 8, 8)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)
    assert seen == [1]
    plain.load_state_dict(model.state_dict())
    assert isinstance(replace(torch.nn.BatchNorm3d(2)), FastBatchNorm3d)
    assert replace(replace(model)) is model


def test_a_replaced_model_is_pickled_copied_and_saved():
    model = replace(torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.BatchNorm1d(5)))
    x = torch.randn(8, 4)
    model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert type(again[1]) is FastBatchNorm1d
        assert torch.equal(again.eval()(x), model.eval()(x))


def test_training_a_cnn_goes_torchs_way():
    torch.manual_seed(0)
    t = torch.nn
    plain = t.Sequential(
        t.Conv2d(1, 8, 3, bias=False), t.BatchNorm2d(8), t.ReLU(inplace=True), t.Conv2d(8, 16, 3, stride=2, bias=False),
        t.BatchNorm2d(16), t.ReLU(), t.Flatten(), t.Linear(400, 10),
    ).double()  # fmt: skip
    fast = replace(copy.deepcopy(plain))
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (plain, fast)]
    for _ in range(20):
        x, target = torch.randn(16, 1, 14, 14, dtype=torch.float64), torch.randint(0, 10, (16,))
        shown = []
        for model, optimizer in zip((plain, fast), optimizers, strict=True):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), target)
            loss.backward()
            optimizer.step()
            shown.append(loss.item())
        assert abs(shown[0] - shown[1]) < 1e-10


def test_a_training_step_is_measured():
    with fastbn.threads(1):
        assert min(measured.compare("MLP", 8, torch.get_num_threads(), 2)) > 0


def test_the_same_bits_for_every_number_of_threads():
    norm, x = FastBatchNorm2d(16), torch.randn(32, 16, 20, 20)
    results = []
    for n in (1, 2, 3):
        with fastbn.threads(n):
            given = x.clone().requires_grad_()
            y = norm(given)
            y.backward(x)
            results.append((y.detach(), given.grad))
    for (y, dx), (other_y, other_dx) in itertools.pairwise(results):
        assert torch.equal(y, other_y)
        assert torch.equal(dx, other_dx)


def test_tensors_are_array_likes_of_every_call():
    """Tensors in, NumPy's arrays out, without a copy."""
    x = torch.randn(8, 5)
    bn = BatchNorm(5)
    y = bn(x)
    assert isinstance(y, np.ndarray)
    assert abs(bn.backward(torch.ones(8, 5))).max() < 1e-6
    assert fastbn.moments(x).mean == pytest.approx(x.double().mean(0).numpy())
    with pytest.raises(RuntimeError, match="detach"):
        bn(x.clone().requires_grad_())


def test_batch_norm_of_several_processes_is_converted_as_one():
    class One:
        rank, size = 0, 1

        def allgather(self, array):
            return [array]

        def abort(self, code):
            raise SystemExit(code)

    model = nn.Sequential(nn.Dense(4, 3, seed=0), BatchNorm(3, eps=1e-3))
    expected = to_torch(model)
    converted = to_torch(convert(model, One()))
    assert repr(converted) == repr(expected)
    assert all(torch.equal(a, expected.state_dict()[k]) for k, a in converted.state_dict().items())
