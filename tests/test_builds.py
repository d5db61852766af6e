"""Which build of the loops runs: what the processor can, and what FASTBN_ISA asks for."""

import platform
import re
from pathlib import Path

import pytest

from fastbn import kernels
from fastbn.kernels import machine

CPUINFO = Path("/proc/cpuinfo")
FLAGS = re.findall(r"^flags\s*:(.*)$", CPUINFO.read_text() if CPUINFO.exists() else "", re.MULTILINE)
x86_only = pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="CPUID is x86's")

# The x86-64 psABI's levels in the kernel's names of the features, with the register of `machine.builds` and the bit
# that Intel's manual (volume 2, CPUID; volume 1, section 13.1) gives them. The last of each are bits of XCR0.
V3 = {"pni": (0, 0), "ssse3": (0, 9), "fma": (0, 12), "cx16": (0, 13), "sse4_1": (0, 19), "sse4_2": (0, 20)}
V3 |= {"movbe": (0, 22), "popcnt": (0, 23), "xsave": (0, 27), "avx": (0, 28), "f16c": (0, 29)}
V3 |= {"bmi1": (1, 3), "avx2": (1, 5), "bmi2": (1, 8), "lahf_lm": (2, 0), "abm": (2, 5)}
V3_STATE = [(3, 1), (3, 2)]
V4 = {"avx512f": (1, 16), "avx512dq": (1, 17), "avx512cd": (1, 28), "avx512bw": (1, 30), "avx512vl": (1, 31)}
V4_STATE = [(3, 5), (3, 6), (3, 7)]


def features(*bits):
    """The four registers with these bits set."""
    registers = [0, 0, 0, 0]
    for register, bit in bits:
        registers[register] |= 1 << bit
    return tuple(registers)


@x86_only
def test_a_build_needs_every_feature_of_its_level():
    v3 = [*V3.values(), *V3_STATE]
    v4 = [*V4.values(), *V4_STATE]
    assert machine.builds(features()) == ("baseline",)
    assert machine.builds(features(*v3)) == ("baseline", "v3")
    assert machine.builds(features(*v3, *v4)) == ("baseline", "v3", "v4")
    assert machine.builds(features(*v4)) == ("baseline",)
    assert machine.builds((2**32 - 1, 2**32 - 1, 2**32 - 1, 2**64 - 1)) == ("baseline", "v3", "v4")
    for one in v3:
        assert machine.builds(features(*[b for b in v3 + v4 if b != one])) == ("baseline",), one
    for one in v4:
        assert machine.builds(features(*v3, *[b for b in v4 if b != one])) == ("baseline", "v3"), one


@x86_only
@pytest.mark.skipif(not FLAGS, reason="the kernel's list of features is Linux's")
def test_this_processors_builds_are_those_that_the_kernel_lists_the_features_of():
    flags = FLAGS[0].split()
    expected = ("baseline",)
    if set(V3) <= set(flags):
        expected += ("v3",) + (("v4",) if set(V4) <= set(flags) else ())
    assert machine.builds() == expected


def test_there_is_a_build_and_no_double():
    assert isinstance(kernels.BUILDS, tuple)
    assert len(set(kernels.BUILDS)) == len(kernels.BUILDS) >= 1
    assert kernels.BUILD in kernels.BUILDS
    assert set(kernels.BUILDS) <= {"baseline", "v3", "v4", "arm64"}


@pytest.mark.parametrize("build", kernels.BUILDS)
def test_a_forced_build_is_the_one_that_runs(build, python):
    program = "import sys, fastbn; print(fastbn.kernels.BUILD, *(m for m in sys.modules if '.batchnorm_' in m))"
    done = python("-c", program, FASTBN_ISA=build)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [build, f"fastbn.kernels.batchnorm_{build}"]


@pytest.mark.parametrize("build", [b for b in ("v3", "v4", "arm64", "v99") if b not in kernels.BUILDS])
def test_a_build_that_cannot_run_here_is_refused_in_a_sentence(build, python):
    done = python("-c", "import fastbn", FASTBN_ISA=build)
    assert done.returncode != 0
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: FASTBN_ISA must name a build")
    assert str(kernels.BUILDS) in last
    assert repr(build) in last


CHOOSE = """
import importlib, os
from fastbn import kernels
kernels.machine.builds = lambda: {runs!r}
os.environ["FASTBN_ISA"] = {asked!r}
os.environ["FASTBN_FAMILY"] = {family!r}
importlib.reload(kernels)
print(kernels.BUILD, *kernels.BUILDS)
"""


@pytest.mark.parametrize(
    ("runs", "family", "asked", "expected"),
    [
        # One family that prefers the highest level, and one that prefers the lowest.
        (kernels.BUILDS, "zen5", "", [kernels.BUILDS[-1], *kernels.BUILDS]),
        (kernels.BUILDS, "intel-before-avx2", "", [kernels.BUILDS[0], *kernels.BUILDS]),
        (kernels.BUILDS, "intel-before-avx2", kernels.BUILDS[-1], [kernels.BUILDS[-1], *kernels.BUILDS]),
        (kernels.BUILDS[:1], "zen5", "", [kernels.BUILDS[0]] * 2),
        # A processor that runs more than was built, as where the compiler was too old.
        ((*kernels.BUILDS, "v99"), "zen5", "", [kernels.BUILDS[-1], *kernels.BUILDS]),
        ((*kernels.BUILDS, "v99"), "zen5", "v99", None),
        (kernels.BUILDS[:1], "zen5", "v4", None),
    ],
)
def test_the_best_build_of_a_made_up_processor(runs, family, asked, expected, python):
    done = python("-c", CHOOSE.format(runs=runs, family=family, asked=asked))
    if expected is None:
        assert "ImportError: FASTBN_ISA must name a build" in done.stderr.splitlines()[-1]
    else:
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == expected
