"""fastbn.interop.keras beside Keras: its files compute here what they compute there, and no file does harm."""

import io
import json
import os
import resource
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from fastbn import BatchNorm, nn
from fastbn.interop.keras import load

os.environ.setdefault("KERAS_BACKEND", "torch")
h5py = pytest.importorskip("h5py")
keras = pytest.importorskip("keras")
L = keras.layers

BOUND = 1e-5  # in float64 too, of which Keras computes much in float32
KINDS = (".keras", ".h5")


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    """Of all layers that are made while it is in force."""
    keras.config.set_dtype_policy(request.param)
    yield request.param
    keras.config.set_dtype_policy("float32")


def randomized(model, seed=0):
    """The model with weights of which no two are alike, and positive variances."""
    rng = np.random.default_rng(seed)
    for variable in model.variables:
        if "float" in str(variable.dtype):
            shape = tuple(variable.shape)
            positive = any(name in variable.path for name in ("variance", "gamma"))
            variable.assign(rng.uniform(0.5, 2, shape) if positive else rng.standard_normal(shape))
    for layer in model._flatten_layers():
        if isinstance(layer, L.Normalization):
            layer.finalize_state()
    return model


def sequential(layers, shape=(6,), dtype="float32", seed=0):
    return randomized(keras.Sequential([keras.Input(shape, dtype=dtype), *layers]), seed)


def saved(model, path):
    if path.name.endswith(".weights.h5"):
        model.save_weights(path)
    else:
        model.save(path)
    return path


def inputs(model, dtype="float32", n=9):
    shape = [n, *model.input_shape[1:]]
    return (np.random.default_rng(1).standard_normal(shape) * 2 + 0.5).astype(dtype)


def outputs(model, x, training=False):
    x = keras.ops.convert_to_tensor(x, x.dtype.name)  # arrays of float64 become float32
    return keras.ops.convert_to_numpy(model(x, training=training))


def check(model, path, dtype="float32"):
    """Load it, and compare."""
    ours = load(saved(model, path))
    x = inputs(model, dtype)
    y, expected = ours(x), outputs(model, x)
    assert y.shape == expected.shape
    assert y.dtype == dtype
    np.testing.assert_allclose(y, expected, rtol=BOUND, atol=BOUND * max(1, abs(expected).max()))
    assert not any(layer.training for layer in ours)
    return ours


LAYERS = {
    "dense": lambda: [L.Dense(5)],
    "no bias": lambda: [L.Dense(5, use_bias=False)],
    "linear": lambda: [L.Dense(5, activation="linear"), L.Activation("linear"), L.Identity()],
    **{f"argument {name}": lambda name=name: [L.Dense(5, activation=name)] for name in
       ("relu", "leaky_relu", "sigmoid", "tanh", "softmax")},
    **{f"layer {name}": lambda name=name: [L.Dense(5), L.Activation(name)] for name in
       ("relu", "leaky_relu", "sigmoid", "tanh", "softmax")},
    "layers as arguments": lambda: [L.Dense(5, activation=L.LeakyReLU(0.4)), L.Activation(L.ReLU()),
                                    L.Dense(4, activation=L.Softmax())],
    "relu": lambda: [L.ReLU()],
    "leaky relu": lambda: [L.LeakyReLU(), L.LeakyReLU(negative_slope=0.125)],
    "softmax": lambda: [L.Softmax()],
    "softmax of an axis": lambda: [L.Softmax(axis=1)],
    "dropout": lambda: [L.Dropout(0.3), L.Dropout(0.0), L.Dropout(0.5, seed=3), L.Dense(2)],
    "flatten": lambda: [L.Flatten(), L.Dense(3)],
    "norm": lambda: [L.BatchNormalization()],
    "norm's arguments": lambda: [L.BatchNormalization(momentum=0.7, epsilon=0.1)],
    "no center": lambda: [L.BatchNormalization(center=False)],
    "no scale": lambda: [L.BatchNormalization(scale=False)],
    "neither": lambda: [L.BatchNormalization(center=False, scale=False)],
    "frozen": lambda: [L.BatchNormalization(trainable=False), L.Dense(3, trainable=False)],
    "renamed": lambda: [L.Dense(4, name="a b"), L.BatchNormalization(name="dense"), L.Dense(3, name="dense_1")],
    "many": lambda: [L.Dense(5) if i % 3 else L.BatchNormalization() for i in range(14)],
    "regularized": lambda: [L.Dense(4, kernel_regularizer="l2", bias_constraint="non_neg", kernel_initializer="ones",
                                    activity_regularizer="l1")],
    "nested": lambda: [L.Dense(4), keras.Sequential([L.Dense(5), L.BatchNormalization(), L.ReLU()]), L.Dense(3),
                       keras.Sequential([keras.Sequential([L.Dense(7), L.ReLU()]),
                                         L.BatchNormalization(scale=False), L.Dense(2)])],
    "nested and frozen": lambda: [keras.Sequential([L.Dense(4, trainable=False), L.BatchNormalization(), L.Dense(4),
                                                    L.BatchNormalization(trainable=False)]), L.Dense(4)],
    "nested without weights": lambda: [keras.Sequential([L.ReLU()]), keras.Sequential([L.Dense(3)])],
    "adapted": lambda: [L.Normalization(), L.Dense(3), L.Normalization()],
    "given numbers": lambda: [L.Normalization(mean=[1, 2, 3, 4, 5, 6], variance=[1, 2, 3, 4, 5, 0]), L.Dense(2),
                              L.Normalization()],
    "one number": lambda: [L.Normalization(mean=3.0, variance=2.0), L.Dense(2)],
    "one number, no axis": lambda: [L.Normalization(axis=None, mean=3.0, variance=2.0), L.Dense(2)],
    "adapted, no axis": lambda: [L.Normalization(axis=None), L.Dense(2)],
}  # fmt: skip


@pytest.mark.parametrize("suffix", KINDS)
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())
def test_every_layer_and_argument(make, dtype, suffix, tmp_path):
    check(sequential(make(), dtype=dtype), tmp_path / f"model{suffix}", dtype)


@pytest.mark.parametrize("suffix", KINDS)
@pytest.mark.parametrize(
    "make",
    [
        lambda: [L.BatchNormalization(axis=1)],
        lambda: [L.BatchNormalization(axis=2)],
        lambda: [L.BatchNormalization(axis=-2), L.BatchNormalization()],
        lambda: [L.Normalization(axis=1), L.Normalization(axis=-1)],
        lambda: [L.Normalization(axis=2, mean=[1, 2, 3, 4, 5], variance=[1, 2, 3, 4, 5])],
        lambda: [L.Normalization(axis=None, mean=1.5, variance=0.0), L.Softmax(axis=2)],
        lambda: [L.Softmax(axis=-2), L.Dense(3), L.Flatten(), L.Dense(2)],
        lambda: [L.Dense(3, activation="softmax"), L.Activation("softmax")],
    ],
)
def test_axes(make, suffix, tmp_path):
    check(sequential(make(), shape=(4, 5, 3)), tmp_path / f"model{suffix}")


def random_layer(rng, depth):
    name = str(rng.choice(["relu", "leaky_relu", "sigmoid", "tanh", "softmax", "linear"]))
    a, b, c = (bool(b) for b in rng.integers(2, size=3))
    match rng.integers(8):
        case 0:
            return L.Dense(int(rng.integers(1, 9)), activation=name, use_bias=a, trainable=b)
        case 1:
            momentum, epsilon = rng.random(), rng.random() + 1e-5
            return L.BatchNormalization(momentum=momentum, epsilon=epsilon, center=a, scale=b, trainable=c)
        case 2:
            return L.Activation(name)
        case 3:
            return L.LeakyReLU(negative_slope=rng.random())
        case 4:
            return L.Dropout(rng.random())
        case 5:
            return L.Normalization()
        case 6:
            return L.Flatten()
    return keras.Sequential(random_layers(rng, depth + 1)) if depth < 3 else L.ReLU()


def random_layers(rng, depth=0):
    return [random_layer(rng, depth) for _ in range(rng.integers(1, 6))]


@pytest.mark.parametrize("seed", range(30))
def test_random_networks(seed, tmp_path):
    model = sequential(random_layers(np.random.default_rng(seed)), seed=seed)
    for suffix in KINDS:
        check(model, tmp_path / f"model{suffix}")


def small():
    layers = [L.Dense(5, activation="relu"), L.BatchNormalization(), L.Dropout(0.2), L.Dense(3)]
    return sequential([L.Normalization(), *layers, keras.Sequential([L.Dense(4), L.BatchNormalization()])])


@pytest.mark.parametrize("suffix", KINDS)
def test_parameters_are_the_same_bits(dtype, suffix, tmp_path):
    model = sequential([L.Dense(5), L.BatchNormalization(scale=False)], dtype=dtype)
    ours = load(saved(model, tmp_path / f"model{suffix}"))
    kernel, bias, beta, mean, variance = (keras.ops.convert_to_numpy(w) for w in model.weights)
    for array, expected in [(ours[0].params["weight"], kernel.T), (ours[0].params["bias"], bias), (ours[1].bias, beta)]:
        assert array.dtype == dtype
        assert (array == expected).all()
    assert (ours[1].running_mean == mean).all()
    assert (ours[1].running_var == variance).all()
    assert (ours[1].weight == 1).all()


@pytest.mark.parametrize("momentum", [0.99, 0.9, 0.5, 0.0, 1.0, 0.123456789])
def test_running_statistics_go_on_by_keras_convention(momentum, dtype, tmp_path):
    model = sequential([L.BatchNormalization(momentum=momentum)], dtype=dtype)
    norm = load(saved(model, tmp_path / "model.keras")).train()[0]
    assert norm.momentum == pytest.approx(1 - momentum, abs=1e-15)
    for step in range(3):
        x = inputs(model, dtype, n=8) * (step + 1)
        expected = outputs(model, x, training=True)
        np.testing.assert_allclose(norm(x), expected, rtol=BOUND, atol=BOUND)
        for ours, theirs in [(norm.running_mean, -2), (norm.running_var, -1)]:
            theirs = keras.ops.convert_to_numpy(model.weights[theirs])
            np.testing.assert_allclose(ours, theirs, rtol=BOUND, atol=BOUND)


def test_a_norm_that_is_not_trainable_is_frozen(tmp_path):
    model = sequential([L.BatchNormalization(trainable=False), L.BatchNormalization()])
    ours = load(saved(model, tmp_path / "model.keras"))
    assert [norm.frozen for norm in ours] == [True, False]
    x, before = inputs(model), ours[0].running_mean.copy()
    expected = keras.ops.convert_to_numpy(model.layers[0](x, training=True))
    np.testing.assert_allclose(ours[0].train()(x), expected, rtol=1e-5, atol=1e-5)
    assert (ours[0].running_mean == before).all()


def test_constant_features_of_a_normalization(tmp_path):
    """Keras divides by 1e-7 at least."""
    norm = L.Normalization()
    x = inputs(sequential([norm]))
    x[:, 1], x[:, 2] = 3, 5 + 1e-9 * np.arange(len(x))
    norm.adapt(x)
    check(keras.Sequential([keras.Input((6,)), norm]), tmp_path / "model.keras")
    variance = [0, 1e-16, 1e-14, 1e-13, 1, 1e30]
    model = keras.Sequential([keras.Input((6,)), L.Normalization(mean=[0.1] * 6, variance=variance)])
    check(model, tmp_path / "given.keras")


def test_a_model_of_what_keras_trained(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, 6)).astype("float32")
    labels = (x[:, 0] + x[:, 1] > 0).astype(int)
    model = keras.Sequential([
        keras.Input((6,)), L.Dense(16, use_bias=False), L.BatchNormalization(), L.ReLU(), L.Dropout(0.1),
        L.Dense(2, activation="softmax"),
    ])  # fmt: skip
    model.compile("adam", "sparse_categorical_crossentropy")
    model.fit(x, labels, epochs=3, verbose=0)
    for suffix in KINDS:
        ours = check(model, tmp_path / f"model{suffix}")
        assert (ours(x).argmax(1) == outputs(model, x).argmax(1)).all()
        assert (ours.folded()(x).argmax(1) == outputs(model, x).argmax(1)).all()


def test_keras_is_not_imported(tmp_path):
    path = saved(small(), tmp_path / "model.keras")
    program = (
        "import sys; from fastbn.interop.keras import load; load(sys.argv[1]);"
        "assert not {'keras', 'torch', 'jax', 'tensorflow'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", program, path], check=True)


# --- weights alone


def network():
    inner = nn.Sequential(nn.Dense(3, 4), BatchNorm(4, 1e-3, axis=-1))
    return nn.Sequential(
        nn.Standardize(6), nn.Dense(6, 5, activation="relu"), BatchNorm(5, 1e-3), nn.Dense(5, 3), inner
    )


NO_MATCH = {
    "fewer": lambda: nn.Sequential(*network()[:-1]),
    "more": lambda: nn.Sequential(*network(), nn.Dense(4, 4)),
    "another size": lambda: nn.Sequential(*network()[:3], nn.Dense(5, 4), network()[-1]),
    "no bias": lambda: nn.Sequential(*network()[:3], nn.Dense(5, 3, bias=False), network()[-1]),
    "no affine": lambda: nn.Sequential(*network()[:2], BatchNorm(5, affine=False), *network()[3:]),
    "no statistics": lambda: nn.Sequential(*network()[:2], BatchNorm(5, track_running_stats=False), *network()[3:]),
    "not nested": lambda: nn.Sequential(*network()[:-1], *network()[-1]),
    "nothing": lambda: nn.Sequential(),
}


@pytest.mark.parametrize("name", ["model.weights.h5", "model.keras", "model.h5"])
def test_weights_go_into_a_network(name, tmp_path):
    theirs = small()
    model = network()
    model[1].params["weight"][...] = 7
    assert load(saved(theirs, tmp_path / name), model) is model
    x = inputs(theirs)
    assert model.training
    np.testing.assert_allclose(model.eval()(x), outputs(theirs, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["model.weights.h5", "model.keras", "model.h5"])
@pytest.mark.parametrize("make", NO_MATCH.values(), ids=NO_MATCH.keys())
def test_other_networks_are_refused_and_stay(make, name, tmp_path):
    path, model = saved(small(), tmp_path / name), make()
    before = model.state_dict()
    with pytest.raises(ValueError, match=rf"^{path}: cannot be loaded: "):
        load(path, model)
    for key, array in model.state_dict().items():
        assert (array == before[key]).all()


def test_weights_need_a_network(tmp_path):
    path = saved(small(), tmp_path / "model.weights.h5")
    with pytest.raises(ValueError, match=rf"^{path}: cannot be loaded: .*no architecture: give model="):
        load(path)
    for wrong in (nn.Dense(6, 5), [nn.Dense(6, 5)], "model"):
        with pytest.raises(TypeError, match="expected model to be an nn"):
            load(path, wrong)

    class Own(nn.Dense):
        pass

    with pytest.raises(TypeError, match=r"Keras has no layer 1 \(Own\)"):
        load(path, nn.Sequential(nn.ReLU(), Own(6, 5)))


# --- layouts of other versions


def rewritten(path, change, *, config=None):
    """The .keras file with its HDF5 file changed by `change(file)`, and its config by `config(dict)`."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    weights = io.BytesIO(members["model.weights.h5"])
    with h5py.File(weights, "r+") as file:
        change(file)
    members["model.weights.h5"] = weights.getvalue()
    if config is not None:
        members["config.json"] = json.dumps(config(json.loads(members["config.json"]))).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def with_gaps(group):
    """The layout of TensorFlow 2.12 and 2.13, where layers with weights count twice."""
    if "layers" not in group:
        return
    group.move("layers", "_layer_checkpoint_dependencies")
    box = group["_layer_checkpoint_dependencies"]
    for name in list(box):
        with_gaps(box[name])
    for stem in ("dense", "batch_normalization", "sequential"):
        numbers = [int(name[len(stem) + 1 :] or 0) for name in box if name.rstrip("0123456789_") == stem]
        for number in sorted(numbers, reverse=True):
            if number:
                box.move(f"{stem}_{number}", f"{stem}_{2 * number}")


def test_numbers_with_gaps(tmp_path):
    layers = [L.Dense(4) if i % 2 else L.BatchNormalization() for i in range(24)]
    model = sequential([*layers, keras.Sequential([L.Dense(3), L.Dense(4)]), keras.Sequential([L.Dense(2)])])
    path = rewritten(saved(model, tmp_path / "model.keras"), with_gaps)
    np.testing.assert_allclose(load(path)(inputs(model)), outputs(model, inputs(model)), rtol=1e-5, atol=1e-3)


def test_configs_of_keras_2(tmp_path):
    """Lists of axes, slopes named alpha, numbers as arrays, nothing of dtypes and modules."""
    layers = [L.Dense(5), L.BatchNormalization(axis=1), L.LeakyReLU(0.4), L.Normalization(), L.ReLU()]
    model = sequential([*layers, keras.Sequential([L.Dense(3)])])

    def old(entry):
        config = {name: value for name, value in entry["config"].items() if name not in ("dtype", "module")}
        if entry["class_name"] == "LeakyReLU":
            config["alpha"] = config.pop("negative_slope")
        if entry["class_name"] == "ReLU":
            config["threshold"] = {"class_name": "__numpy__", "config": {"value": 0.0, "dtype": "float32"}}
        if entry["class_name"] == "BatchNormalization":
            config["axis"] = [config["axis"]]
        if entry["class_name"] == "Sequential":  # before 2.3
            config = [old(inner) for inner in config["layers"]]
        return {"class_name": entry["class_name"], "config": config}

    path = rewritten(saved(model, tmp_path / "model.keras"), lambda file: None, config=old)
    np.testing.assert_allclose(load(path)(inputs(model)), outputs(model, inputs(model)), rtol=1e-5, atol=1e-5)


# --- refusals


def functional():
    x = keras.Input((6,))
    return keras.Model(x, L.Dense(2)(x))


@keras.saving.register_keras_serializable()
class Dense2(L.Dense):
    pass


Custom = keras.saving.register_keras_serializable(name="Dense")(type("Dense", (L.Dense,), {"__module__": "mine"}))


@keras.saving.register_keras_serializable()
def cubed(x):
    return x * x * x


OTHERS = {
    "Lambda": lambda: [L.Lambda(lambda x: x * 2)],
    "Dense2": lambda: [Dense2(3)],
    "Dense": lambda: [Custom(3)],
    "LayerNormalization": lambda: [L.LayerNormalization()],
    "Reshape": lambda: [L.Reshape((3, 2))],
    "GaussianNoise": lambda: [L.GaussianNoise(0.1)],
    "Functional": lambda: [functional()],
    "UnitNormalization": lambda: [L.UnitNormalization()],
    "PReLU": lambda: [L.PReLU()],
    "ELU": lambda: [L.ELU()],
    "Rescaling": lambda: [L.Rescaling(2.0)],
}
ARGUMENTS = {
    "activation": lambda: [L.Dense(3, activation="gelu")],
    "activation linear": lambda: [L.Dense(3, activation=cubed)],
    "relu, leaky_relu": lambda: [L.Activation("elu")],
    "max_value": lambda: [L.ReLU(max_value=6)],
    "threshold": lambda: [L.ReLU(threshold=1.0)],
    "negative_slope=0": lambda: [L.ReLU(negative_slope=0.1)],
    "negative_slope": lambda: [L.LeakyReLU(negative_slope=1.5)],
    "noise_shape": lambda: [L.Dropout(0.2, noise_shape=(None, 1))],
    "data_format": lambda: [L.Flatten(data_format="channels_first")],
    "invert": lambda: [L.Normalization(invert=True)],
    "float32 or float64, got mixed_float16": lambda: [L.Dense(3, dtype="mixed_float16")],
    "got bfloat16": lambda: [L.Dense(3, dtype="bfloat16")],
    "got float16": lambda: [L.ReLU(dtype="float16")],
}


@pytest.mark.parametrize("suffix", KINDS)
@pytest.mark.parametrize("name", OTHERS)
def test_other_layers_are_refused_with_class_and_position(name, suffix, tmp_path):
    inner = OTHERS[name]()
    model = sequential([L.Dense(6), keras.Sequential([L.ReLU(), *inner])])
    path = saved(model, tmp_path / f"model{suffix}")
    said = rf"layer 1\.1 '{inner[0].name}' \((?:Custom>)?{name}\)"
    with pytest.raises(ValueError, match=rf"^{path}: cannot be loaded: cannot convert {said}: expected Keras's"):
        load(path)


@pytest.mark.parametrize("suffix", KINDS)
@pytest.mark.parametrize("what", ARGUMENTS)
def test_other_arguments_are_refused_with_class_and_position(what, suffix, tmp_path):
    inner = ARGUMENTS[what]()
    path = saved(sequential([L.Dense(6), keras.Sequential([L.ReLU(), *inner])]), tmp_path / f"model{suffix}")
    said = rf"layer 1\.1 '{inner[0].name}' \({type(inner[0]).__name__}\)"
    with pytest.raises(ValueError, match=rf"^{path}: cannot be loaded: cannot convert {said}: expected .*{what}"):
        load(path)


def test_axes_that_are_many_are_refused(tmp_path):
    model = sequential([L.Normalization(axis=(1, 2))], shape=(3, 4))
    with pytest.raises(ValueError, match="expected one axis"):
        load(saved(model, tmp_path / "model.keras"))


@pytest.mark.parametrize("suffix", KINDS)
def test_models_of_other_kinds_are_refused(suffix, tmp_path):
    path = saved(functional(), tmp_path / f"model{suffix}")
    with pytest.raises(ValueError, match=rf"^{path}: cannot be loaded: cannot convert '.*' \(Functional\)"):
        load(path)


def test_models_without_weights_are_refused(tmp_path):
    model = keras.Sequential([L.Dense(3)])
    with pytest.warns(UserWarning, match="not yet been built"):
        model.save(tmp_path / "model.keras")
    with pytest.raises(ValueError, match=r"layer 0 '.*' \(Dense\), got 0 variables"):
        load(tmp_path / "model.keras")


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load(tmp_path / "model.keras")
    with pytest.raises(IsADirectoryError, match="got a folder"):
        load(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe: expected a regular file"):
        load(tmp_path / "pipe")
    path = tmp_path / "model.keras"
    for content in (
        b"",
        b"P",
        b"PK",
        b"PK\3\4" + bytes(50),
        b"\x89HDF\r\n\x1a\n",
        b"\x89HDF\r\n\x1a\n" + bytes(99),
        b"{}",
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"^{path}: cannot be loaded: "):
            load(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", "{}")
    with pytest.raises(ValueError, match=r"a zip without model\.weights\.h5"):
        load(path)


# --- hostile files


def refused(path, match=""):
    with pytest.raises(ValueError, match=rf"^{path}: cannot be loaded: .*{match}"):
        load(path)


def test_deflated_members_are_read_and_bombs_are_not(tmp_path):
    path, model = tmp_path / "model.keras", small()
    saved(model, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}

    def packed(method=zipfile.ZIP_DEFLATED, **changed):
        with zipfile.ZipFile(path, "w", method) as archive:
            for name, content in (members | changed).items():
                archive.writestr(name, content)

    packed()
    np.testing.assert_allclose(load(path)(inputs(model)), outputs(model, inputs(model)), rtol=1e-5, atol=1e-5)
    packed(zipfile.ZIP_BZIP2)
    refused(path, "stored or deflated")
    packed(**{"config.json": b" " * (1 << 25)})
    refused(path, "config.json claims")
    packed(**{"model.weights.h5": bytes(1 << 24)})
    refused(path, "model.weights.h5 claims")
    for config in ("[" * 100_000, '{"class_name":' * 3000, "null", "[]", '{"class_name": "Sequential"}', "\x00", '"'):
        packed(**{"config.json": config.encode()})
        refused(path)
    nested = '{"class_name": "Sequential", "config": {"layers": [' * 60 + "]}}" * 60
    packed(**{"config.json": nested.encode()})
    refused(path, "networks in one another")
    wide = '{"class_name": "Sequential", "config": {"layers": [' + ",".join(
        ['{"class_name": "ReLU", "config": {}}'] * 20_000
    )
    packed(**{"config.json": (wide + "]}}").encode()})
    refused(path, "at most 10000 layers")


def test_sizes_that_headers_claim(tmp_path):
    """Sizes in the zip's directory, without data behind them."""
    path = saved(small(), tmp_path / "model.keras")
    content = path.read_bytes()
    at = content.rindex(b"PK\1\2")  # of model.weights.h5, the last one
    for offset in (20, 24):
        for size in (2**31, 2**32 - 2):
            path.write_bytes(content[: at + offset] + size.to_bytes(4, "little") + content[at + offset + 4 :])
            refused(path)


KERNEL = "layers/dense/vars/0"


def put(make, path=KERNEL):
    """A change of a file: what is at the path is replaced by make(group, name, folder)."""

    def change(file, folder):
        if path in file:
            del file[path]
        above, _, name = path.rpartition("/")
        make(file[above] if above else file, name, folder)

    return change


def array(path=KERNEL, **arguments):
    return put(lambda group, name, _: group.create_dataset(name, **arguments), path)


def links(file, folder):
    file.move("layers", "x")
    file["layers"] = h5py.SoftLink("/x")


ONES = np.ones((6, 5), "f4")
HARM = {
    "soft link": (put(lambda g, n, _: g.__setitem__(n, h5py.SoftLink("/layers/dense/vars/1"))), "a link"),
    "external link": (put(lambda g, n, t: g.__setitem__(n, h5py.ExternalLink(str(t / "o.h5"), "/x"))), "a link"),
    "external group": (
        put(lambda g, n, t: g.__setitem__(n, h5py.ExternalLink(str(t / "o.h5"), "/")), "layers"), "a link"),
    "linked group": (links, "a link"),
    "elsewhere": (
        put(lambda g, n, t: g.create_dataset(n, (6, 5), "f4", external=[(str(t / "secret"), 0, 120)])), "in one piece"),
    "virtual": (put(lambda g, n, _: g.create_virtual_dataset(n, h5py.VirtualLayout((6, 5), "f4"))), "in one piece"),
    "compressed": (array(data=ONES, compression="gzip"), "in one piece"),
    "chunked bomb": (array(shape=(1 << 20, 5), dtype="f4", chunks=(1024, 5), compression="gzip"), "in one piece"),
    "never written": (array(shape=(1 << 30, 5), dtype="f4"), "claims more data"),
    "half": (array(data=ONES.astype("f2")), "float32 or float64"),
    "integers": (array(data=ONES.astype("i4")), "float32 or float64"),
    "texts": (array(data=[[b"x"] * 5] * 6), "float32 or float64"),
    "texts of any length": (array(data=[["x"] * 5] * 6), "float32 or float64"),
    "records": (array(shape=(6, 5), dtype=[("a", "f4")]), "float32 or float64"),
    "no data": (array(data=h5py.Empty("f4")), "shape"),
    "transposed": (array(data=ONES.T), "kernel of shape"),
    "flat": (array(data=np.ones(30, "f4")), "kernel of shape"),
    "a group": (put(lambda g, n, _: g.create_group(n)), "an array at"),
    "missing": (put(lambda g, n, _: None), "an array at '0'"),
    "the last missing": (put(lambda g, n, _: None, "layers/dense/vars/1"), "got 1 variables"),
    "one more": (array("layers/dense/vars/2", data=[1.0]), "got 3 variables"),
    "other names": (array("layers/dense/vars/x", data=[1.0]), "an array at"),
    "another layer": (put(lambda g, n, _: g.create_dataset("conv2d/vars/0", data=[1.0]), "layers/x"), "no such layer"),
    "no layers": (put(lambda g, n, _: None, "layers"), "got 0 variables"),
    "vars as array": (array("layers/dense/vars", data=[1.0]), "a group"),
    "layers as array": (array("layers", data=[1.0]), "a group"),
}  # fmt: skip


@pytest.mark.parametrize("harm", HARM.values(), ids=HARM.keys())
def test_hdf5_that_does_harm(harm, tmp_path):
    (tmp_path / "secret").write_bytes(bytes(120))
    with h5py.File(tmp_path / "o.h5", "w") as other:
        other["x"] = np.ones((6, 5), "f4")
    change, match = harm
    path = saved(sequential([L.Dense(5)]), tmp_path / "model.keras")
    rewritten(path, lambda file: change(file, tmp_path))
    refused(path, match)


def test_one_array_for_many_layers_is_no_more_than_the_file(tmp_path):
    """A hard link costs nothing, and each layer would have a copy."""
    path = saved(sequential([L.Dense(512), L.Dense(512)], shape=(512,)), tmp_path / "model.keras")
    entry = None

    def config(whole):
        nonlocal entry
        entry = whole["config"]["layers"][-1]
        whole["config"]["layers"] += [entry] * 500
        return whole

    def change(file):
        for i in range(2, 502):
            file[f"layers/dense_{i}"] = file["layers/dense_1"]

    refused(rewritten(path, change, config=config), "claims more data than it holds")


def test_many_names_that_are_one_long_text(tmp_path):
    path = saved(sequential([L.Dense(5)]), tmp_path / "model.h5")
    with h5py.File(path, "r+") as file:
        file["model_weights"].attrs["layer_names"] = ["x" * 400_000, *["y"] * 1000]
    content = path.read_bytes()
    at = content.index((400_000).to_bytes(4, "little"))
    reference = content[at : at + 16]
    assert content[at + 16 : at + 20] == (1).to_bytes(4, "little")
    path.write_bytes(content[:at] + reference * 1001 + content[at + 16 * 1001 :])
    refused(path, "claims more data than it holds")


def test_texts_are_not_as_long_as_they_claim(tmp_path):
    """HDF5 would take four gigabytes for each."""
    path = saved(sequential([L.Dense(5)]), tmp_path / "model.h5")
    content = path.read_bytes()
    with h5py.File(path) as file:
        texts = [file.attrs["model_config"], *file["model_weights"].attrs["layer_names"]]
    for text in texts:
        length = len(text).to_bytes(4, "little")
        at = content.find(length)
        while at >= 0:
            path.write_bytes(content[:at] + b"\xff" * 4 + content[at + 4 :])
            loads(path)
            at = content.find(length, at + 1)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 3 << 20


def test_big_endian_numbers_are_read(tmp_path):
    model = sequential([L.Dense(5)])
    kernel = keras.ops.convert_to_numpy(model.weights[0]).astype(">f4")
    path = rewritten(saved(model, tmp_path / "model.keras"), lambda file: array(data=kernel)(file, None))
    weight = load(path)[0].params["weight"]
    assert weight.dtype == "float32"
    assert (weight == kernel.T).all()


def loads(path, model=None):
    """Whether it does; all errors but the one that names the file are raised on."""
    try:
        load(path, model)
    except ValueError as error:
        message = str(error)
    else:
        return True
    assert message.startswith(f"{path}: cannot be loaded: ")
    return False


# Values by which every entry of a config is replaced in turn.
VALUES = (None, -1, 0, 10**400, 1e400, True, "x", [], {}, [[1, 2], [3]], {"class_name": "x", "config": {}})


def places(value, path=()):
    yield path
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


def test_mutants_of_an_architecture(tmp_path):
    """Entries replaced by other kinds of values: it loads, or it is one error."""
    path = saved(small(), tmp_path / "model.keras")
    with zipfile.ZipFile(path) as archive:
        text, weights = archive.read("config.json").decode(), archive.read("model.weights.h5")
    mutations = [(place, value) for place in places(json.loads(text)) for value in VALUES if place]
    refusals = 0
    for i in np.random.default_rng(0).permutation(len(mutations))[:500]:
        (*above, last), value = mutations[i]
        config = inner = json.loads(text)
        for key in above:
            inner = inner[key]
        inner[last] = value
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("config.json", json.dumps(config))
            archive.writestr("model.weights.h5", weights)
        refusals += not loads(path)
    assert refusals > 60


@pytest.mark.parametrize("name", ["model.keras", "model.h5", "model.weights.h5", "inner"])
def test_mutants_of_a_file(name, tmp_path):
    """Bytes changed, left out and cut off: it loads, or it is one error that names the file."""
    path = saved(small(), tmp_path / ("model.keras" if name == "inner" else name))
    content = path.read_bytes()
    config = ""
    if name == "inner":  # of a .keras, whose checksum would find it
        with zipfile.ZipFile(path) as archive:
            config, content = archive.read("config.json").decode(), archive.read("model.weights.h5")
    model = network() if name == "model.weights.h5" else None
    rng = np.random.default_rng(0)
    refusals = 0
    for i in range(300):
        mutant = bytearray(content)
        at = int(rng.integers(len(mutant)))
        match i % 6:
            case 0:
                del mutant[at:]
            case 1:
                del mutant[at : at + int(rng.integers(1, 100))]
            case 2:
                mutant[at : at + 8] = bytes(rng.integers(256, size=8, dtype=np.uint8))
            case 3:
                mutant[at : at + 4] = b"\xff" * 4
            case _:
                at = int(rng.integers(min(len(mutant), 3000)))  # where headers are
                mutant[at] = int(rng.integers(256))
        if name == "inner":
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("config.json", config)
                archive.writestr("model.weights.h5", bytes(mutant))
        else:
            path.write_bytes(mutant)
        before = None if model is None else model.state_dict()
        if not loads(path, model):
            refusals += 1
            assert model is None or all((array == before[key]).all() for key, array in model.state_dict().items())
    assert refusals > 60


def test_h5py_is_asked_for(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match=r'pip install "fastbn\[keras\]"'):
        load(tmp_path / "model.keras")
