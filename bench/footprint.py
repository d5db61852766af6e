"""What it costs to run a trained network: python -m bench.footprint

Fresh processes of each library, in turn, round after round; medians. A process imports the library, reads a small
network (64-100-10, one hidden layer with ReLU) from a file and answers for one example. After the import and after
the answer it says how long it took and how much memory it has (VmRSS: all that is resident, shared libraries too).
Python's own start is in neither. NumPy runs the network written out by hand. Linux only.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import numpy as np

from bench import machine
from fastbn import checkpoint, nn
from fastbn.interop import onnx

SIZES = 64, 100, 10
# For each library: its distribution, the import, and how it reads the network and answers.
LIBRARIES = {
    "numpy": ("numpy", "import numpy", """
a = dict(numpy.load("network.npz"))
y = numpy.maximum(x() @ a["0.weight"].T + a["0.bias"], 0) @ a["2.weight"].T + a["2.bias"]
"""),
    "fastbn": ("fastbn", "import fastbn", """
y = fastbn.checkpoint.load("network.safetensors")(x())
"""),
    "onnxruntime": ("onnxruntime", "import onnxruntime", """
session = onnxruntime.InferenceSession("network.onnx", providers=["CPUExecutionProvider"])
y = session.run(None, {"x": x()})[0]
"""),
    "ai-edge-litert": ("ai-edge-litert", "from ai_edge_litert.interpreter import Interpreter", """
interpreter = Interpreter("network.tflite")
interpreter.allocate_tensors()
interpreter.set_tensor(interpreter.get_input_details()[0]["index"], x())
interpreter.invoke()
y = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
"""),
    "jax": ("jax", "import jax", """
import numpy
a = dict(numpy.load("network.npz"))
network = jax.jit(lambda x: jax.nn.relu(x @ a["0.weight"].T + a["0.bias"]) @ a["2.weight"].T + a["2.bias"])
y = network(x())
"""),
    "torch": ("torch", "import torch", """
network = torch.nn.Sequential(torch.nn.Linear(64, 100), torch.nn.ReLU(), torch.nn.Linear(100, 10))
network.load_state_dict(torch.load("network.pt", weights_only=True))
with torch.inference_mode():
    y = network.eval()(torch.from_numpy(x()))
"""),
}  # fmt: skip
PROGRAM = """
import time
start = time.process_time()
def told():
    status = open("/proc/self/status").read()
    return time.process_time() - start, int(status.split("VmRSS:")[1].split()[0]) * 1024
def x():
    import numpy
    return numpy.load("x.npy")
{imported}
imported = told()
{answered}
answered = told()
import json, numpy
print(json.dumps([*imported, *answered, numpy.asarray(y).tolist()]))
"""


def write_files(folder: Path) -> np.ndarray:
    """The network in every format that somebody here reads, an example, and the right answer."""
    network = nn.Sequential(nn.Dense(*SIZES[:2], seed=0), nn.ReLU(), nn.Dense(*SIZES[1:], seed=1)).eval()
    x = np.random.default_rng(0).standard_normal((1, SIZES[0]), dtype=np.float32)
    np.save(folder / "x.npy", x)
    checkpoint.save(folder / "network.safetensors", network)
    state = network.state_dict()
    np.savez(folder / "network.npz", **state)
    if installed("torch"):
        import torch

        torch.save({name: torch.from_numpy(a) for name, a in state.items()}, folder / "network.pt")
    if installed("onnxruntime"):
        onnx.save(network, folder / "network.onnx")
    if installed("ai-edge-litert"):
        write_tflite(folder / "network.tflite", state)
    return network(x)


def write_tflite(path: Path, state: dict[str, np.ndarray]) -> None:
    """Two fully connected operators, the first one with ReLU, in TensorFlow Lite's schema."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    def tensor(name: str, shape: tuple[int, ...], buffer: int) -> schema.TensorT:
        made = schema.TensorT()
        made.name, made.shape, made.buffer, made.type = name, [*shape], buffer, schema.TensorType.FLOAT32
        return made

    def connected(inputs: list[int], output: int, activation: int) -> schema.OperatorT:
        made = schema.OperatorT()
        made.inputs, made.outputs, made.opcodeIndex = inputs, [output], 0
        made.builtinOptionsType = schema.BuiltinOptions.FullyConnectedOptions
        made.builtinOptions = schema.FullyConnectedOptionsT()
        made.builtinOptions.fusedActivationFunction = activation
        return made

    model, graph, code = schema.ModelT(), schema.SubGraphT(), schema.OperatorCodeT()
    buffers = [schema.BufferT() for _ in range(1 + len(state))]
    for buffer, a in zip(buffers[1:], state.values(), strict=True):
        buffer.data = np.frombuffer(a.tobytes(), np.uint8)
    graph.tensors = [tensor(name, a.shape, 1 + i) for i, (name, a) in enumerate(state.items())]
    graph.tensors += [tensor(name, (1, size), 0) for name, size in zip("xhy", SIZES, strict=True)]
    graph.inputs, graph.outputs = [4], [6]
    graph.operators = [
        connected([4, 0, 1], 5, schema.ActivationFunctionType.RELU),
        connected([5, 2, 3], 6, schema.ActivationFunctionType.NONE),
    ]
    code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.FULLY_CONNECTED
    code.version = 1
    model.version, model.subgraphs, model.operatorCodes, model.buffers = 3, [graph], [code], buffers
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    path.write_bytes(builder.Output())


def installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def needed(distribution: str) -> set[str]:
    """The distribution and those that it needs, as far as they are installed; without extras."""
    found, waiting = set(), [distribution]
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop().lower())
        if name in found or not installed(name):
            continue
        found.add(name)
        wanted = [line for line in metadata.requires(name) or [] if "extra ==" not in line]
        # What fastbn needs to read a file stands in its extra.
        wanted += ["safetensors"] * (name == "fastbn")
        waiting += [re.match(r"[\w.-]+", line)[0] for line in wanted]
    return found


def megabytes_on_disk(distribution: str) -> float | None:
    """What the distribution has installed, without compiled Python; None where it is no more than a link to a tree."""
    if "editable" in (metadata.distribution(distribution).read_text("direct_url.json") or ""):
        return None
    files = [Path(file.locate()) for file in metadata.files(distribution) or [] if file.suffix != ".pyc"]
    return sum(file.stat().st_size for file in files if file.is_file()) / 1e6


def measure(library: str, folder: Path) -> tuple[list[float], list[list[float]]]:
    """Seconds and bytes after the import, and after the answer; and the answer."""
    _, imported, answered = LIBRARIES[library]
    program = PROGRAM.format(imported=imported, answered=answered)
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{library}: {done.stderr.strip().splitlines()[-1]}")
    *figures, answer = json.loads(done.stdout.splitlines()[-1])
    return figures, answer


def table(rounds: int) -> str:
    """Markdown: a row for each library that is installed."""
    libraries = [name for name, (distribution, *_) in LIBRARIES.items() if installed(distribution)]
    figures = {name: [] for name in libraries}
    with tempfile.TemporaryDirectory() as made:
        right = write_files(Path(made))
        for _ in range(1 + rounds):  # the first round fills the caches of the disk
            for name in libraries:
                told, answer = measure(name, Path(made))
                np.testing.assert_allclose(answer, right, rtol=1e-4, atol=1e-5, err_msg=name)
                figures[name].append(told)
    head = [
        "",
        "version",
        "import, CPU ms",
        "MB",
        "first answer, CPU ms",
        "MB",
        "on disk, MB",
        "with what it needs, MB",
    ]
    lines = [f"| {' | '.join(head)} |", f"|---|---|{'--:|' * 6}"]
    for name in libraries:
        distribution = LIBRARIES[name][0]
        seconds, nbytes, answered, nbytes_answered = map(statistics.median, zip(*figures[name][1:], strict=True))
        sizes = {part: megabytes_on_disk(part) for part in needed(distribution)}
        own, whole = sizes[distribution], None if None in sizes.values() else sum(filter(None, sizes.values()))
        cells = [f"{seconds * 1e3:.0f}", f"{nbytes / 1e6:.0f}", f"{answered * 1e3:.0f}", f"{nbytes_answered / 1e6:.0f}"]
        cells += ["editable" if size is None else f"{size:.1f}" for size in (own, whole)]
        lines.append(f"| {' | '.join([name, metadata.version(distribution), *cells])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round; the figures mean nothing")
    options = parser.parse_args()
    print(machine.in_words(machine.describe()) + "\n", flush=True)
    print(table(1 if options.quick else 15))
    missing = [name for name, (distribution, *_) in LIBRARIES.items() if not installed(distribution)]
    if missing:
        print(f"\nNot installed: {', '.join(missing)}.")


if __name__ == "__main__":
    main()
