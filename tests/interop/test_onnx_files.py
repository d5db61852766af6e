"""fastbn.interop.onnx.load: hostile files, damaged ones, and models of other people's making.

FASTBN_MUTANTS is the number of damaged copies of each file, 200 by default.
"""

import contextlib
import importlib
import math
import os
import pkgutil
import tracemalloc
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx_graphs import DOUBLE, FLOAT, W, changed, graph, node, op, refused, value, written
from test_mutants import mutant

from fastbn import BatchNorm, nn
from fastbn.interop import onnx as interop

MUTANTS = int(os.environ.get("FASTBN_MUTANTS", "200"))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.onnx"


@contextlib.contextmanager
def at_most(nbytes):
    """No more than this is allocated within."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < nbytes, peak


@pytest.mark.parametrize("dims", [[2**31, 2**31], [2**62, 2], [-3, -2], [-1], [3, 3], [0, 2**62], [1] * 60, []])
@pytest.mark.parametrize("where", ["raw", "floats"])
def test_sizes_are_those_of_the_bytes(path, dims, where):
    model = graph(op("MatMul", "w"), {"w": W})
    tensor = model.graph.initializer[0]
    if where == "floats":
        tensor.ClearField("raw_data")
        tensor.float_data.extend([0.5] * 6)
    del tensor.dims[:]
    tensor.dims.extend(dims)
    with at_most(10**6):
        refused(path, model, "tensor 'w'" if math.prod(dims) != 6 else "")


def test_declared_shapes_take_no_memory(path):
    for scaling in (op("Mul", "c"), op("Scaler", domain="ai.onnx.ml", offset=[0.0], scale=[1.0])):
        with at_most(10**6):
            refused(
                path, graph(scaling, {"c": np.float32(2)}, shape=("N", 2**40)), "claims sizes that nothing in it has"
            )


def test_a_weight_used_again_and_again_is_refused(path):
    size, times = 300, 2000
    nodes = [op("MatMul", "w") for _ in range(times)]
    model = graph(nodes, {"w": np.ones((size, size), np.float32)}, shape=("N", size))
    assert model.ByteSize() < 10**6
    with at_most(200 * 10**6):
        refused(path, model, "uses one array many times")


def test_long_chains_of_constants_are_refused(path):
    nodes = [node("Identity", [f"w{i}"], [f"w{i + 1}"]) for i in range(20_000)]
    refused(path, graph([*nodes, op("MatMul", "w20000")], {"w0": W}))
    joins = [node("Concat", [f"n{i}"] * 2, [f"n{i + 1}"], axis=0) for i in range(200)]
    gather = [node("Shape", ["x"], ["s"]), node("Gather", ["s", "zero"], ["n0"])]
    reshape = node("Reshape", ["x", "n200"], ["y"])
    refused(path, graph([*gather, *joins, reshape], {"zero": np.array([0])}))


def test_a_million_empty_nodes_are_refused(path):
    empty = b"\x0a\x00" * 10**6
    path.write_bytes(graph(op("Relu")).SerializeToString() + b"\x3a" + varint(len(empty)) + empty)  # they are merged
    with at_most(10**7):
        refused(path, None, "expected node 1 () to have an output, got none")


def varint(n):
    return bytes([n & 127 | 128]) + varint(n >> 7) if n > 127 else bytes([n])


def test_names_of_any_length(path):
    message = refused(path, graph(op("A" * 10**5, name="n" * 10**6)))
    assert len(message) < 1000 + len(str(path))
    refused(path, graph(op("Relu"), inputs=[value("z" * 10**5, "float32", None)] * 50))


def external(path, location, offset=None, length=None, array=W):
    model = graph(op("MatMul", "w"), {"w": array})
    onnx.external_data_helper.set_external_data(model.graph.initializer[0], location, offset, length)
    model.graph.initializer[0].ClearField("raw_data")
    return written(path, model)


@pytest.mark.parametrize("place", ["weights.bin", "inner/weights.bin", "./weights.bin"])
@pytest.mark.parametrize(("offset", "length"), [(None, None), (0, 24), (8, 24), (8, None), (None, 24)])
def test_weights_in_files_of_their_own(path, monkeypatch, place, offset, length):
    file = path.parent / place
    file.parent.mkdir(exist_ok=True)
    extra = b"" if length is None else b"more"
    file.write_bytes(b"\0" * (offset or 0) + W.tobytes() + extra)
    external(path, place, offset, length)
    assert (interop.load(path)[0].params["weight"] == W.T).all()
    monkeypatch.chdir(path.parent)
    assert (interop.load("model.onnx")[0].params["weight"] == W.T).all()


def test_external_weights_of_exporters(path):
    """As onnx itself splits them off."""
    interop.save(nn.Sequential(nn.Dense(3, 40, seed=0), nn.Dense(40, 2, seed=1)), path)
    expected = interop.load(path)
    onnx.save_model(onnx.load(path), path, save_as_external_data=True, location="all.data", size_threshold=0)
    loaded = interop.load(path)
    assert all((loaded.params[k] == p).all() for k, p in expected.params.items())
    (path.parent / "all.data").unlink()
    refused(path, None, "in a file beside the model, got 'all.data', which is none")


@pytest.mark.parametrize("location", [
    "../secret.bin", "/etc/hostname", "inner/../../secret.bin", "C:\\secret.bin", "..\\secret.bin", "", ".", "inner",
    "FOLDER/weights.bin", "inner/../weights.bin", "link.bin", "linked/secret.bin", "pipe", "no.bin", "a" * 5000,
    "a\0b", "\\\\server\\secret.bin", "/dev/zero",
])  # fmt: skip
def test_nothing_is_read_outside_the_folder(tmp_path, location):
    (tmp_path / "secret.bin").write_bytes(W.tobytes())
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    (folder / "linked").symlink_to(tmp_path)
    (folder / "weights.bin").write_bytes(W.tobytes())
    os.mkfifo(folder / "pipe")
    location = location.replace("FOLDER", str(folder))
    refused(external(folder / "model.onnx", location), None, "tensor 'w'" if "\0" not in location else "")


@pytest.mark.parametrize(("offset", "length"), [
    (0, 23), (0, 25), (1, 24), (2**63, 24), (0, 2**63), (0, 0), (-1, 24), (0, -24), ("x", 24), (0, "x"), ("", 24),
    ("9" * 5000, 24), (" 0", 24), (25, None), (4, None), (10**18, None), ("\u0663", 24),
])  # fmt: skip
def test_sizes_of_external_weights_are_checked(path, offset, length):
    (path.parent / "w.bin").write_bytes(W.tobytes())
    external(path, "w.bin")
    model = onnx.load(path, load_external_data=False)
    for key, number in (("offset", offset), ("length", length)):
        if number not in (None, ""):
            model.graph.initializer[0].external_data.add(key=key, value=str(number))
    if (offset, length) == ("", 24):
        assert len(interop.load(written(path, model))) == 1
        return
    with at_most(10**6):
        refused(path, model, "tensor 'w' to have 24 bytes in 'w.bin', got offset")


def test_one_file_read_again_and_again_is_refused(path):
    """Many tensors that are one piece of a file."""
    big = np.ones((1000, 250), np.float32)
    (path.parent / "w.bin").write_bytes(big.tobytes())
    nodes, model = [], graph(op("Relu"))
    for i in range(400):
        tensor = model.graph.initializer.add(name=f"w{i}", data_type=FLOAT, dims=[250, 1000] if i % 2 else [1000, 250])
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="w.bin")
        nodes.append(node("MatMul", [f"t{i}" if i else "x", f"w{i}"], [f"t{i + 1}" if i < 399 else "y"]))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    with at_most(300 * 10**6):
        refused(path, changed(model, lambda m: m.graph.input[0].CopyFrom(value("x", "float32", ("N", 1000)))))


# --- damaged files


def scaled():
    rng = np.random.default_rng(0)
    scaling = nn.Standardize(4, dtype="float32").fit(rng.standard_normal((9, 4)) + 1e6)
    model = nn.Sequential(scaling, nn.Dense(4, 5, bias=False, seed=0), BatchNorm(5, activation="relu"), nn.Dropout(0.5))
    return nn.Sequential(model, nn.Dense(5, 3, seed=1), nn.Softmax())


def classifier():
    """As skl2onnx, tf2onnx and PyTorch write theirs, in one."""
    arrays = {"w": W, "b": W[:1, :2], "a": W[0], "v": W[:2, :1], "one": np.float32(1), "zero": np.array(0)}
    nodes = [
        op("Scaler", domain="ai.onnx.ml", offset=[1.0, 2.0, 3.0], scale=[0.5, 1.0, 2.0], y="s"),
        node("Shape", ["s"], ["shape"]),
        node("Gather", ["shape", "zero"], ["n"]),
        node("Unsqueeze", ["n", "axes"], ["n1"]),
        node("Concat", ["n1", "rest"], ["to"], axis=0),
        node("Reshape", ["s", "to"], ["r"]),
        node("Identity", ["w"], ["w2"]),
        node("MatMul", ["r", "w2"], ["m"]),
        node("Add", ["b", "m"], ["m1"]),
        node("Mul", ["m1", "a"], ["m2"]),
        node("Sub", ["m2", "a"], ["m3"]),
        node("LeakyRelu", ["m3"], ["m4"], alpha=0.2),
        node("Gemm", ["m4", "v", "one"], ["z"], beta=0.5),
        node("Sigmoid", ["z"], ["p"]),
        node("Sub", ["one", "p"], ["q"]),
        node("Concat", ["q", "p"], ["y"], axis=1),
        node("ArgMax", ["y"], ["label"], axis=1),
    ]
    return graph(
        nodes,
        arrays | {"axes": np.array([0]), "rest": np.array([-1])},
        outputs=[value("label", "int64", None)],
    )


def convolution_like():
    """4 axes, doubles, constants of several shapes, weights in a file of their own."""
    nodes = [
        op("BatchNormalization", "s", "s", "s", "s", epsilon=0.1, training_mode=0),
        op("Sub", "c"),
        op("Div", "c"),
        op("Dropout", "p", "t"),
        op("Flatten"),
        node("Transpose", ["k"], ["kt"], perm=[1, 0]),
        op("Gemm", "kt", transB=0),
        op("PRelu", "slope"),
        op("Cast", to=DOUBLE),
    ]
    s = np.array([0.5, 1.5, 2.5])
    arrays = {"s": s, "c": s[:, None, None], "p": np.float32(0.5), "t": np.array(False), "k": np.ones((2, 12))}
    return graph(nodes, arrays | {"slope": np.array([0.3])}, dtype="float64", shape=("N", 3, 2, 2))


def messages(message):
    """A message, and all those within it."""
    yield message
    for described, held in message.ListFields():
        if described.message_type is not None:
            for inner in held if isinstance(held, Sequence) or hasattr(held, "add") else [held]:
                yield from messages(inner)


NUMBERS = [0, 1, -1, 2, 3, 7, 10, 16, 2**31 - 1, 2**31, -(2**31), 2**40, 2**62, -(2**63)]
FRACTIONS = [0.0, -1.0, 1e-45, 1e38, -1e38, float("inf"), float("nan"), 0.5]


def misprint(rng, model):
    """The model with some of its fields changed: numbers, names, types, parts left out or there twice."""
    model = onnx.ModelProto.FromString(model.SerializeToString())
    for _ in range(rng.integers(1, 4)):
        every = list(messages(model))
        message = every[rng.integers(len(every))]
        fields = message.ListFields()
        if not fields:
            continue
        described, held = fields[rng.integers(len(fields))]
        names = [n for m in every if hasattr(m, "output") and hasattr(m, "op_type") for n in [*m.input, *m.output]]
        new = {
            described.CPPTYPE_STRING: [*names[:30], "", "../x", "ai.onnx.ml", "Relu", "Gemm", "x"],
            described.CPPTYPE_FLOAT: FRACTIONS,
            described.CPPTYPE_DOUBLE: FRACTIONS,
            described.CPPTYPE_BOOL: [True, False],
        }.get(described.cpp_type, NUMBERS)
        change = new[rng.integers(len(new))]
        if described.cpp_type == described.CPPTYPE_STRING and described.type == described.TYPE_BYTES:
            change = rng.bytes(rng.integers(50))
        repeated = hasattr(held, "append")
        with contextlib.suppress(TypeError, ValueError):  # a number that the field does not hold
            if rng.integers(4) == 0:
                message.ClearField(described.name)
            elif repeated and rng.integers(3) == 0:
                del held[rng.integers(len(held))]
            elif repeated and rng.integers(2) == 0:
                held.append(held[rng.integers(len(held))])
            elif described.message_type is None and repeated:
                held[rng.integers(len(held))] = change
            elif described.message_type is None:
                setattr(message, described.name, change)
    return model.SerializeToString()


KINDS = {
    "scaled": (scaled, (2, 4)),
    "classifier": (classifier, (2, 3)),
    "convolution": (convolution_like, (2, 3, 2, 2)),
}


@pytest.mark.parametrize("how", ["bytes", "fields"])
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_read_or_refused(path, kind, how):
    make, shape = KINDS[kind]
    content = make()
    if isinstance(content, nn.Sequential):
        interop.save(content, path)
    else:
        written(path, content)
    if kind == "convolution":
        onnx.save_model(onnx.load(path), path, save_as_external_data=True, location="all.data", size_threshold=0)
    model = onnx.load(path, load_external_data=False)
    rng, readable, x = np.random.default_rng(len(kind) + len(how)), 0, np.ones(shape)
    assert interop.load(path)(x).shape[0] == 2
    with at_most(150 * 10**6):
        for _ in range(MUTANTS):
            path.write_bytes(mutant(rng, model.SerializeToString()) if how == "bytes" else misprint(rng, model))
            network = loads_or_names(path)
            if network is None:
                continue
            readable += 1
            said = "expected"
            try:
                with np.errstate(all="ignore"):
                    network(x)
            except (ValueError, TypeError) as error:  # what does not fit x is said when it is called
                said = str(error)
            assert "expected" in said.lower() or "out of bounds" in said, said
    assert 0 < readable < MUTANTS


# --- models of other people's making


def recorded(folder):
    for data in sorted(Path(folder).glob("test_data_set_*")):
        yield [
            [onnx.numpy_helper.to_array(onnx.TensorProto.FromString(file.read_bytes())) for file in files]
            for files in (sorted(data.glob("input_*.pb")), sorted(data.glob("output_*.pb")))
        ]


def loads_or_names(path):
    """The network, or None where it is refused in one sentence."""
    try:
        return interop.load(path)
    except ValueError as error:
        message = str(error)
        assert message.startswith(f"{path}: cannot be loaded: ")
        assert "\n" not in message
        assert len(message) < 1500 + len(str(path))
        assert not any(word in message for word in ("NoneType", "object", "subscript", "out of range")), message
        return None


def agrees(network, inputs, outputs):
    if any(isinstance(layer, nn.Dropout) and layer.training for layer in network):
        return  # random numbers
    x, expected = (
        onnx.numpy_helper.to_array(a) if isinstance(a, onnx.TensorProto) else a for a in (inputs[0], outputs[0])
    )
    y = network(x)
    assert y.shape == expected.shape
    np.testing.assert_allclose(y, expected, rtol=1e-3, atol=1e-7)  # onnx.backend.test's own
    if network.training:
        np.testing.assert_allclose(network[0].running_mean, outputs[1], rtol=1e-3, atol=1e-7)
        np.testing.assert_allclose(network[0].running_var, outputs[2], rtol=1e-3, atol=1e-7)


def test_models_in_the_onnx_package(capsys):
    files = sorted((Path(onnx.__file__).parent / "backend/test/data").rglob("*.onnx"))
    assert len(files) > 140
    loaded = {}
    for file in files:
        if (network := loads_or_names(file)) is not None:
            cases = list(recorded(file.parent))
            for data in cases:
                agrees(network, *data)
            loaded[file.parent.name] = len(cases)
    assert min(loaded.values()) == 1
    assert {f"test_BatchNorm{n}_eval" for n in ("1d_3d_input", "2d", "2d_momentum", "3d", "3d_momentum")} < set(loaded)
    assert {"test_Linear", "test_Linear_no_bias", "test_LeakyReLU", "test_Softmax", "test_operator_view"} < set(loaded)
    with capsys.disabled():
        print(f"\nmodels in the onnx package: {len(loaded)} load, {len(files) - len(loaded)} are refused in a sentence")


def as_weights(model, data):
    """A case whose other inputs are constants of the graph."""
    model = onnx.ModelProto.FromString(model.SerializeToString())
    for described, array in list(zip(model.graph.input, data, strict=False))[1:]:
        if isinstance(array, np.ndarray) and described.type.WhichOneof("value") == "tensor_type":
            with contextlib.suppress(TypeError, ValueError, KeyError):
                model.graph.initializer.append(onnx.numpy_helper.from_array(array, described.name))
    return model


def test_cases_of_every_operator(path, capsys):
    cases = importlib.import_module("onnx.backend.test.case.node")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in pkgutil.iter_modules(cases.__path__):
            importlib.import_module(f"{cases.__name__}.{module.name}")
    assert len(cases._NodeTestCases) > 1000
    loaded = {}
    for case in cases._NodeTestCases:
        for inputs, outputs in case.data_sets or []:
            for model in (case.model, as_weights(case.model, inputs)):
                if (network := loads_or_names(written(path, model))) is not None:
                    loaded[case.name] = network
                    with np.errstate(all="ignore"):
                        agrees(network, inputs, outputs)
    ends = ("example", "epsilon", "example_training_mode", "epsilon_training_mode")
    assert {f"test_batchnorm_{end}" for end in ends} < set(loaded)
    with capsys.disabled():
        n = len(cases._NodeTestCases)
        print(f"\ncases of onnx's operators: {len(loaded)} load, {n - len(loaded)} are refused in a sentence")


def test_a_path_that_is_none_is_a_type_error():
    for path in (None, 3):
        with pytest.raises(TypeError, match=r"expected str, bytes or os\.PathLike object"):
            interop.load(path)
