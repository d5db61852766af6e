"""The bits of results, frozen: digests.json has what every processor, build, compiler and number of threads must give.

A digest that changes is a changed promise, which CHANGELOG.md says. `python tests/test_digests.py` prints the file's
content as it is here; with `--check` it names what differs.
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
from test_reproducible import values

import fastbn

FILE = Path(__file__).with_name("digests.json")
# Rows: a few, folded, in several chunks, wide. Short planes and runs. Planes, and planes in pieces.
SHAPES = [(2, 1), (3, 2), (9, 16), (40, 3), (257, 33), (300, 64), (1000, 5), (33, 1000), (40, 2500), (9000, 7)]
SHAPES += [(6, 70, 7), (16, 32, 9, 9), (1000, 3, 2), (30, 90, 5, 7), (5, 6, 14, 14), (64, 8, 7, 7)]
SHAPES += [(3, 7, 900), (9, 70, 64), (2, 3, 16_389), (4, 3, 100, 100), (1, 5, 70)]
OPTIONS = {
    "momentum None": {"momentum": None},
    "biased": {"unbiased": False},
    "ghosts of 3": {"ghost_size": 3},
    "renorm": {"renorm": (1.5, 0.5)},
    "no affine": {"affine": False},
    "eps 1e-12": {"eps": 1e-12},
}


def digest(*arrays):
    h = hashlib.sha256()
    for a in arrays:
        h.update(np.ascontiguousarray(a, a.dtype.newbyteorder("<")).tobytes())
    return h.hexdigest()[:24]


def of_layer(shape, dtype, scale=1.0, **options):
    """Of two training steps, forward and backward, and of inference after them."""
    x, dy = (values(shape, seed, dtype) * np.asarray(scale, dtype) for seed in (1, 2))
    dy -= np.asarray(40 * scale, dtype)
    bn = fastbn.BatchNorm(shape[1], dtype=dtype, **options)
    for seed, p in enumerate(bn.params.values(), 3):
        p[...] = values(p.shape, seed, dtype) - np.asarray(40, dtype)
    forward = [bn(x)]
    backward = [bn.backward(dy), *map(np.copy, bn.grads.values())]
    forward += [bn(x[::-1]), bn.running_mean, bn.running_var]
    inference = [bn.eval()(x), bn.backward(dy), *bn.grads.values()]
    return {"forward": digest(*forward), "backward": digest(*backward), "inference": digest(*inference)}


def of_moments(shape, dtype, far):
    stats = fastbn.moments(values(shape, 5, dtype) + np.asarray(far, dtype))
    return digest(stats.mean, stats.mean_low, stats.var)


def of_mask(shape, dtype):
    x, dy = values(shape, 1, dtype), values(shape, 2, dtype) - np.asarray(40, dtype)
    positions = (shape[0], *shape[2:])
    mask = values(positions, 6, "float64") > 38
    bn = fastbn.BatchNorm(shape[1], dtype=dtype, activation="relu")
    return digest(bn(x, mask=mask), bn.backward(dy), bn.running_var, *bn.grads.values())


def found():
    digests = {}
    for dtype in ("float32", "float64"):
        for shape in SHAPES:
            for activation in (None, "relu", "leaky_relu"):
                for what, bits in of_layer(shape, dtype, activation=activation).items():
                    digests[f"{dtype} {shape} {activation}: {what}"] = bits
            for far in (0, 1000):
                digests[f"{dtype} {shape} + {far}: moments"] = of_moments(shape, dtype, far)
        for shape in ((40, 3), (257, 33), (6, 70, 7), (9, 70, 64)):
            for name, options in OPTIONS.items():
                for what, bits in of_layer(shape, dtype, **options).items():
                    digests[f"{dtype} {shape} {name}: {what}"] = bits
            # Scales at which float32 cannot hold the parameters, so that float64 computes.
            for scale in (1e-38, 1e-30, 1e30):
                for what, bits in of_layer(shape, dtype, scale, eps=1e-70).items():
                    digests[f"{dtype} {shape} times {scale:g}: {what}"] = bits
            digests[f"{dtype} {shape}: mask"] = of_mask(shape, dtype)
    return digests


def test_no_digest_has_changed():
    expected, here = json.loads(FILE.read_text()), found()
    assert expected.keys() == here.keys()
    assert [name for name in expected if expected[name] != here[name]] == []


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        frozen, now = json.loads(FILE.read_text()), found()
        changed = [name for name in frozen.keys() | now.keys() if frozen.get(name) != now.get(name)]
        print(f"{len(frozen)} digests, {len(changed)} changed", *changed, sep="\n")
        sys.exit(bool(changed))
    print(json.dumps(found(), indent=0))
