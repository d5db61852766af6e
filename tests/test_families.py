"""The processor's family: how it is recognised, what settings and which build it gets, and what sets and shows them."""

import json
import os
import re
from pathlib import Path

import pytest

from fastbn import kernels
from fastbn.kernels import families, machine

AMD, INTEL = "AuthenticAMD", "GenuineIntel"
MIB = 2**20
LEVELS = ("baseline", "v3", "v4")
SETTINGS = tuple(machine.get_settings())

# Processors that one can buy, with family and model as their vendors' documents and Linux's headers have them.
PROCESSORS = {
    "Ryzen 7 1800X": (AMD, 0x17, 0x01, "zen1"),
    "EPYC 7551": (AMD, 0x17, 0x01, "zen1"),
    "Ryzen 7 2700X": (AMD, 0x17, 0x08, "zen1"),
    "Hygon C86 7185": ("HygonGenuine", 0x18, 0x00, "zen1"),
    "EPYC 7742": (AMD, 0x17, 0x31, "zen2"),
    "Ryzen 9 3900X": (AMD, 0x17, 0x71, "zen2"),
    "EPYC 7763": (AMD, 0x19, 0x01, "zen3"),
    "Ryzen 9 5950X": (AMD, 0x19, 0x21, "zen3"),
    "Ryzen 7 5800H": (AMD, 0x19, 0x50, "zen3"),
    "EPYC 9654": (AMD, 0x19, 0x11, "zen4"),
    "Ryzen 9 7950X": (AMD, 0x19, 0x61, "zen4"),
    "EPYC 9754": (AMD, 0x19, 0xA0, "zen4"),
    "EPYC 9755": (AMD, 0x1A, 0x02, "zen5"),
    "Ryzen 9 9950X": (AMD, 0x1A, 0x44, "zen5"),
    "Pentium 4 660": (INTEL, 15, 0x04, "intel-before-avx2"),
    "Core 2 Quad Q9550": (INTEL, 6, 0x17, "intel-before-avx2"),
    "Core i7-2600": (INTEL, 6, 0x2A, "intel-before-avx2"),
    "Xeon E5-2680 v2": (INTEL, 6, 0x3E, "intel-before-avx2"),
    "Celeron N4100": (INTEL, 6, 0x7A, "intel-before-avx2"),
    "Core i7-4770": (INTEL, 6, 0x3C, "intel-client"),
    "Xeon E5-2680 v4": (INTEL, 6, 0x4F, "intel-client"),
    "Core i7-6700": (INTEL, 6, 0x5E, "intel-client"),
    "Core i7-9700K": (INTEL, 6, 0x9E, "intel-client"),
    "Core i9-12900K": (INTEL, 6, 0x97, "intel-client"),
    "Core i9-13900K": (INTEL, 6, 0xB7, "intel-client"),
    "Core Ultra 9 285K": (INTEL, 6, 0xC6, "intel-client"),
    "Xeon 6780E": (INTEL, 6, 0xAF, "intel-client"),
    "Xeon Platinum 8180": (INTEL, 6, 0x55, "skylake-server"),
    "Xeon Platinum 8380": (INTEL, 6, 0x6A, "skylake-server"),
    "Core i7-1065G7": (INTEL, 6, 0x7E, "skylake-server"),
    "Core i7-1165G7": (INTEL, 6, 0x8C, "skylake-server"),
    "Core i9-11900K": (INTEL, 6, 0xA7, "skylake-server"),
    "Xeon Platinum 8480+": (INTEL, 6, 0x8F, "sapphire-rapids"),
    "Xeon Platinum 8592+": (INTEL, 6, 0xCF, "sapphire-rapids"),
    "Xeon 6980P": (INTEL, 6, 0xAD, "sapphire-rapids"),
    "Apple M1": ("Apple", 0, 0, "apple"),
    "Graviton 3": ("ARM", 0, 0, "neoverse"),
}


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("runs", [LEVELS, LEVELS[:1]], ids=["all features", "masked features"])
def test_known_processors(name, runs):
    vendor, family, model, expected = PROCESSORS[name]
    assert families.recognised(vendor, family, model, runs, MIB).name == expected


def test_no_model_belongs_to_two_families():
    for family in range(32):
        for model in range(256):
            for vendor in (AMD, INTEL, "HygonGenuine"):
                claims = [
                    known.name
                    for known in families.FAMILIES.values()
                    if any(v == vendor and f == family and a <= model <= b for v, f, a, b in known.models)
                ]
                assert len(claims) <= 1, (vendor, family, model, claims)


@pytest.mark.parametrize(
    ("vendor", "family", "runs", "l2_bytes", "expected"),
    [
        # Newer than this list, or hidden by a hypervisor.
        (AMD, 0x1B, LEVELS, MIB, "zen5"),
        (AMD, 15, LEVELS, MIB, "zen4"),
        (AMD, 15, LEVELS[:2], MIB // 2, "zen2"),
        (AMD, 15, LEVELS[:1], MIB // 2, "unknown"),
        (INTEL, 19, LEVELS, 2 * MIB, "sapphire-rapids"),
        (INTEL, 6, LEVELS, 2 * MIB, "sapphire-rapids"),
        (INTEL, 6, LEVELS, MIB, "skylake-server"),
        (INTEL, 6, LEVELS, 0, "skylake-server"),
        (INTEL, 6, LEVELS[:2], 2 * MIB, "intel-client"),
        (INTEL, 6, LEVELS[:1], MIB // 4, "intel-before-avx2"),
        ("CentaurHauls", 7, LEVELS, MIB, "unknown"),
        ("", 0, LEVELS, 0, "unknown"),
    ],
)
def test_an_unknown_model_takes_the_nearest_family(vendor, family, runs, l2_bytes, expected):
    assert families.recognised(vendor, family, 0xFE, runs, l2_bytes).name == expected


@pytest.mark.parametrize(
    ("name", "builds", "expected"),
    [
        ("zen4", LEVELS, "v4"),
        ("zen4", LEVELS[:2], "v3"),
        ("zen4", LEVELS[:1], "baseline"),
        ("zen3", LEVELS, "v3"),
        ("zen3", ("baseline", "v4"), "baseline"),
        ("skylake-server", LEVELS, "v3"),
        ("sapphire-rapids", LEVELS, "v3"),
        ("intel-before-avx2", LEVELS, "baseline"),
        ("neoverse", ("arm64",), "arm64"),
        # A family that was forced on another kind of processor.
        ("neoverse", LEVELS, "baseline"),
        ("zen4", ("arm64",), "arm64"),
    ],
)
def test_the_build_is_the_preferred_one_or_the_nearest_lower_one(name, builds, expected):
    assert families.build_of(families.FAMILIES[name], builds) == expected


@pytest.mark.parametrize("family", families.FAMILIES.values(), ids=lambda family: family.name)
@pytest.mark.parametrize(
    ("l2_bytes", "l3_bytes", "sharers", "processors"),
    [
        (0, 0, 0, 1),
        (512 << 10, 8 * MIB, 2, 2),
        (2 * MIB, 480 * MIB, 256, 2),
        (MIB, 0, 0, 8),
        (256 << 10, 4096 * MIB, 1, 9),
    ],
)
def test_every_family_has_sane_numbers(family, l2_bytes, l3_bytes, sharers, processors):
    found = family.settings(l2_bytes, l3_bytes, sharers, processors)
    assert sorted(found) == sorted(SETTINGS)
    assert all(type(value) is int and value >= 0 for value in found.values())
    assert 2**17 <= found["l2_bytes"] <= found["l3_bytes"] <= 64 * MIB
    assert found["rows_at_once"] in (1, 4)
    assert found["read_ahead_bytes"] <= 2**16
    assert found["read_ahead_in_planes_bytes"] <= 2**16
    assert found["write_ahead_bytes"] <= 2**16
    assert found["write_ahead_from_bytes"] <= found["write_ahead_to_bytes"]
    assert found["stream_from_bytes"] >= found["l2_bytes"]
    assert found["stream_inference_from_bytes"] >= found["l2_bytes"]
    assert found["parallel_from_elements"] >= 2**16


def test_the_share_of_the_last_level():
    family = families.FAMILIES["zen3"]

    def share(*caches):
        return family.settings(*caches)["l3_bytes"]

    assert share(MIB, 32 * MIB, 16, 16) == share(MIB, 32 * MIB, 16, 128) == 32 * MIB
    assert share(MIB, 32 * MIB, 16, 4) == 8 * MIB
    assert share(MIB, 32 * MIB, 0, 4) == 32 * MIB
    assert share(MIB, 32 * MIB, 64, 1) == MIB  # never less than a second level, which is one core's own
    assert share(MIB, 96 * MIB, 16, 16) == 32 * MIB
    assert share(12 * MIB, 0, 0, 8) == 12 * MIB  # without a third level the second is the last


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] if i % 4 else []) for i, name in enumerate(families.FAMILIES)]
)
def test_a_forced_family_is_the_one_in_force(name, python):
    program = """
import json, fastbn
from fastbn import kernels
from fastbn.kernels import machine
print(json.dumps([kernels.FAMILY, kernels.BUILD, machine.get_settings()]))
"""
    done = python("-c", program, FASTBN_FAMILY=name)
    assert done.returncode == 0, done.stderr
    family, caches = families.FAMILIES[name], machine.caches()
    sharers = caches["l3_sharers"] if machine.virtual() else 0
    numbers = family.settings(caches["l2_bytes"], caches["l3_bytes"], sharers, os.cpu_count() or 1)
    assert json.loads(done.stdout) == [name, families.build_of(family, kernels.BUILDS), numbers]


def test_a_family_that_does_not_exist_is_refused_in_a_sentence(python):
    done = python("-c", "import fastbn", FASTBN_FAMILY="zen99")
    assert done.returncode != 0
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: FASTBN_FAMILY must name a processor family")
    assert str(tuple(families.FAMILIES)) in last
    assert "'zen99'" in last


def test_the_family_here_is_a_known_one():
    assert kernels.FAMILY in families.FAMILIES


# --- what the system says of this processor ---------------------------------------------------------------------------

CPUINFO = Path("/proc/cpuinfo")
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


@pytest.mark.skipif("vendor_id" not in (CPUINFO.read_text() if CPUINFO.exists() else ""), reason="Linux on x86 says so")
def test_vendor_family_and_model_are_those_that_the_kernel_lists():
    lines = dict(re.findall(r"^(vendor_id|cpu family|model)\s*: (.*)$", CPUINFO.read_text(), re.MULTILINE))
    assert machine.processor() == (lines["vendor_id"], int(lines["cpu family"]), int(lines["model"]))
    assert machine.virtual() == bool(re.search(r"^flags\s*:.* hypervisor\b", CPUINFO.read_text(), re.MULTILINE))


@pytest.mark.skipif(not list(CACHES.glob("index*/size")), reason="Linux says so, and not everywhere")
def test_the_caches_are_those_that_the_kernel_lists():
    for folder in CACHES.glob("index*"):
        level, kind, size = ((folder / name).read_text().strip() for name in ("level", "type", "size"))
        if kind != "Instruction" and level in "123":
            assert machine.caches()[f"l{level}_bytes"] == int(size.removesuffix("K")) * 1024
    assert (machine.caches()["l3_sharers"] >= 1) == (machine.caches()["l3_bytes"] > 0)


# --- set_settings -----------------------------------------------------------------------------------------------------


@pytest.fixture
def as_before():
    before = machine.get_settings()
    yield before
    machine.set_settings(**before)


def test_set_settings_returns_those_before(as_before):
    numbers = {name: 1000 + k for k, name in enumerate(SETTINGS)} | {"rows_at_once": 4}
    assert machine.set_settings(**numbers) == as_before
    assert machine.get_settings() == numbers
    assert machine.set_settings(l2_bytes=0, rows_at_once=1) == numbers
    assert machine.set_settings(**as_before) == numbers | {"l2_bytes": 0, "rows_at_once": 1}
    assert machine.get_settings() == as_before


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"l4_bytes": 1}, TypeError, "expected a setting among l2_bytes, .*, got 'l4_bytes'"),
        ({"l3_bytes": 1.5}, TypeError, "expected l3_bytes as an integer, got float"),
        ({"l3_bytes": None}, TypeError, "expected l3_bytes as an integer, got NoneType"),
        ({"l3_bytes": -1}, ValueError, "expected l3_bytes to be at least 0 and at most .*, got -1"),
        ({"l3_bytes": 2**63}, ValueError, "expected l3_bytes to be at least 0"),
        ({"rows_at_once": 2}, ValueError, "expected rows_at_once to be 1 or 4, got 2"),
        ({"rows_at_once": 2**40}, ValueError, "expected rows_at_once to be 1 or 4"),
    ],
)
def test_a_wrong_setting_changes_nothing(changes, error, message, as_before):
    with pytest.raises(error, match=message):
        machine.set_settings(l2_bytes=7, **changes)
    assert machine.get_settings() == as_before
