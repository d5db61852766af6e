"""Processor families, and the settings of each: the one page with the numbers that belong to a processor.

Design: a Family is a row of numbers with names and units; the kernels read them from machine.pxd's Settings and do not
know which family they run on. No number changes a bit of any result. A comment beside a number says what measured it.
To add a processor, run `python -m bench.tune` on it and paste what it prints. Models: Linux's intel-family.h and amd.c.

"0.1.0" in a comment means: measured with the loops of fastbn 0.1.0, which wrote four rows at once, aligned or not.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

KIB, MIB = 2**10, 2**20
NEVER_BYTES = sys.maxsize
# Where the system does not say.
USUAL_L2_BYTES, USUAL_L3_BYTES = 512 * KIB, 32 * MIB
# Builds, from the one that fewest instructions are enough for. BUILDS is in this order.
LEVELS = ("arm64", "baseline", "v3", "v4")


@dataclass(frozen=True)
class Times:
    """So many times a cache's size. `cache`: "l2", or "l3" for what a process can count on of the last level."""

    factor: float
    cache: str


Size = int | Times


@dataclass(frozen=True)
class Family:
    """One processor family; machine.pxd's Settings says what the members from rows_at_once on mean.

    models: (vendor, CPUID family, first model, last model).
    build: the preferred one; the nearest lower one is taken where it does not run.
    l3_ceiling_bytes: the most that a process can count on of the last-level cache, whatever its size.
    """

    name: str
    models: tuple[tuple[str, int, int, int], ...]
    build: str
    l3_ceiling_bytes: int
    rows_at_once: int
    rows_at_once_to_bytes: Size
    read_ahead_bytes: int
    read_ahead_in_planes_bytes: int
    read_ahead_from_bytes: Size
    write_ahead_bytes: int
    write_ahead_from_bytes: Size
    write_ahead_to_bytes: Size
    stream_from_bytes: Size
    stream_inference_from_bytes: Size
    batched_runs_below_elements: int
    feature_by_feature_from_bytes: int
    parallel_from_elements: int

    def settings(self, l2_bytes: int, l3_bytes: int, l3_sharers: int, processors: int) -> dict[str, int]:
        """The settings, for caches of these sizes (0: unknown) and a machine that shows so many processors.

        l3_sharers: processors that share the last level; 0 where there are no strangers among them.
        """
        l2 = l2_bytes or USUAL_L2_BYTES
        # Where there is no third level, the second is the last.
        l3 = l3_bytes or l2_bytes or USUAL_L3_BYTES
        # Strangers are as busy as this machine is: its part is that of its processors.
        if l3_sharers > processors:
            l3 = max(l3 * processors // l3_sharers, l2)
        l3 = min(l3, self.l3_ceiling_bytes)
        found = {"l2_bytes": l2, "l3_bytes": l3}
        for name in SETTINGS:
            value = getattr(self, name)
            if isinstance(value, Times):
                # A small share of the last level would begin within the second.
                value = max(round(value.factor * found[f"{value.cache}_bytes"]), l2)
            found[name] = value
        return found


SETTINGS = tuple(name for name in Family.__annotations__ if name not in ("name", "models", "build", "l3_ceiling_bytes"))

AMD, HYGON, INTEL = "AuthenticAMD", "HygonGenuine", "GenuineIntel"


def _family_6(*models: int) -> tuple[tuple[str, int, int, int], ...]:
    return tuple((INTEL, 6, model, model) for model in models)


# What a processor gets that nobody has measured: nothing that could cost much.
UNKNOWN = Family(
    name="unknown",
    models=(),
    build="v3",  # not measured; vectors of 512 bits lower the clock of some processors
    l3_ceiling_bytes=16 * MIB,  # not measured
    rows_at_once=1,  # not measured; one row was never slower on Sapphire Rapids' kind, four gain a little on Zen 3
    rows_at_once_to_bytes=0,
    read_ahead_bytes=0,  # not measured
    read_ahead_in_planes_bytes=0,  # not measured
    read_ahead_from_bytes=0,
    write_ahead_bytes=0,  # not measured
    write_ahead_from_bytes=0,
    write_ahead_to_bytes=0,
    stream_from_bytes=Times(1, "l3"),  # not measured
    stream_inference_from_bytes=Times(1, "l3"),  # not measured
    batched_runs_below_elements=0,  # not measured
    feature_by_feature_from_bytes=8 * KIB,  # not measured; Zen 1's
    parallel_from_elements=524288,  # not measured; Zen 3's
)

ZEN3 = Family(
    name="zen3",
    models=((AMD, 0x19, 0x00, 0x0F), (AMD, 0x19, 0x20, 0x5F)),
    build="v3",
    l3_ceiling_bytes=32 * MIB,  # not measured: models with 96 MB behave as those that were measured
    rows_at_once=4,  # 0.1.0: four rows in L1 and L2, one beyond
    rows_at_once_to_bytes=Times(1, "l2"),
    read_ahead_bytes=16 * KIB,  # 0.1.0: of 4 to 64 KB; reads at 19 GB/s, 8 without
    read_ahead_in_planes_bytes=0,  # not measured
    read_ahead_from_bytes=Times(0.5, "l3"),  # not measured; 0.1.0 asked at every size, and lost a quarter of it in L3
    write_ahead_bytes=0,  # not measured
    write_ahead_from_bytes=0,
    write_ahead_to_bytes=0,
    stream_from_bytes=32 * MIB // 6,  # 0.1.0: outputs of 6 to 8 MB 1.1 to 1.5 times as fast, on a guest's 32 MB of L3
    stream_inference_from_bytes=32 * MIB // 6,  # 0.1.0: likewise on one thread; several were faster in L3 up to 8 MB
    batched_runs_below_elements=0,  # 0.1.0, rows by way of a buffer: as fast or half as fast, from process to process
    feature_by_feature_from_bytes=2 * KIB,  # 0.1.0: a shorter plane took twice the time
    parallel_from_elements=524288,  # 0.1.0: (777, 333) took 121 us on two threads of a guest and 65 on one
)

# On a guest of two processors with 512 KB of L2 and 8 MB of L3, 2026-11-25; not measured where nothing else is said.
ZEN1 = replace(
    ZEN3,
    name="zen1",
    models=((AMD, 0x17, 0x00, 0x2F), (AMD, 0x17, 0x50, 0x5F), (HYGON, 0x18, 0x00, 0xFF)),
    l3_ceiling_bytes=8 * MIB,
    # y of (512, 512) 87 us by one row, 56 by four; of (777, 333) 93 and 53; dx 187 and 126, 200 and 118.
    rows_at_once_to_bytes=Times(1, "l3"),
    read_ahead_bytes=16 * KIB,  # sums of (65536, 256) 6.5 ms, 11.1 without; of (1000000, 32) 14.8 and 29.1
    # Gradients' sums of (32, 256, 14, 14) 0.91 ms, 1.25 without, of (16, 128, 1000) 1.21 and 1.4; the statistics 0.9 of
    # the time. 4 KB ahead the same, 16 KB 1.1.
    read_ahead_in_planes_bytes=1 * KIB,
    read_ahead_from_bytes=Times(1, "l2"),  # nothing gained or lost in L3
    # An output of 2 MB took 1.09 (training), 1.48 (inference), 0.94 (backward) of the time, of 4 MB 0.89, 0.77, 0.85.
    stream_from_bytes=Times(0.4, "l3"),
    stream_inference_from_bytes=Times(0.4, "l3"),
    # float32, y of runs of 36, 49, 64, 81, 100 elements 0.99, 0.94, 0.94, 1.20, 1.34 of the time; backward of 64 and 81
    # elements 0.92 and 1.02.
    batched_runs_below_elements=72,
    # Training and backward of planes of 3 and 4 KB (32 x 64 x 28 x 28, 16 x 128 x 1000) 0.85 to 0.93 of the time when
    # pass by pass; of 12 KB (32 x 64 x 56 x 56) 0.97 and 1.04.
    feature_by_feature_from_bytes=8 * KIB,
    # (128, 256), (256, 256), (512, 256), (512, 512) on two threads: training 1.02, 1.28, 1.41, 1.61 times as fast as on
    # one, inference 0.98, 1.35, 1.51, 1.64, backward 0.98, 1.35, 1.51, 1.62.
    parallel_from_elements=131072,
)

ZEN2 = replace(
    ZEN1,
    name="zen2",
    models=((AMD, 0x17, 0x30, 0x4F), (AMD, 0x17, 0x60, 0xFF)),
    l3_ceiling_bytes=16 * MIB,  # not measured, and neither is the rest: as Zen 1
)

ZEN4 = replace(
    ZEN3,
    name="zen4",
    models=((AMD, 0x19, 0x10, 0x1F), (AMD, 0x19, 0x60, 0xFF)),
    build="v4",  # not measured against v3; its vectors of 512 bits do not lower the clock
    # 2026-11-22, 0.1.0: streaming pays beyond L3 only. The rest is not measured: as Zen 3.
    stream_from_bytes=Times(1, "l3"),
    stream_inference_from_bytes=Times(1, "l3"),
)

ZEN5 = replace(ZEN4, name="zen5", models=((AMD, 0x1A, 0x00, 0xFF),))  # not measured: as Zen 4

INTEL_OLD = replace(
    UNKNOWN,
    name="intel-before-avx2",  # Core 2 to Ivy Bridge, and the Atoms before Gracemont
    models=(
        *_family_6(0x0F, 0x16, 0x17, 0x1A, 0x1D, 0x1E, 0x1F, 0x25, 0x2A, 0x2C, 0x2D, 0x2E, 0x2F, 0x3A, 0x3E),
        *_family_6(0x1C, 0x26, 0x27, 0x35, 0x36, 0x37, 0x4A, 0x4C, 0x4D, 0x5A, 0x5C, 0x5F, 0x75, 0x7A),
        *_family_6(0x86, 0x8A, 0x96, 0x9C),
        (INTEL, 15, 0x00, 0xFF),
    ),
    build="baseline",  # not measured, and neither is the rest
)

INTEL_CLIENT = replace(
    UNKNOWN,
    name="intel-client",  # without AVX-512: Haswell to Comet Lake, and Alder Lake and later; servers that are alike
    models=(
        *_family_6(0x3C, 0x3D, 0x3F, 0x45, 0x46, 0x47, 0x4E, 0x4F, 0x56, 0x5E, 0x8E, 0x9E, 0xA5, 0xA6),
        *_family_6(0x97, 0x9A, 0xAA, 0xAC, 0xB5, 0xB7, 0xBA, 0xBD, 0xBE, 0xBF, 0xC5, 0xC6, 0xCC),
        *_family_6(0xAF, 0xB6, 0xDD),
    ),
    build="v3",  # the best that they run
    # Not measured, and neither is the rest. One row at a time: as on Sapphire Rapids' kind.
    l3_ceiling_bytes=32 * MIB,
)

SKYLAKE_SERVER = replace(
    UNKNOWN,
    name="skylake-server",  # Skylake-X to Ice Lake, and the clients with AVX-512: Cannon, Ice, Tiger and Rocket Lake
    models=_family_6(0x55, 0x66, 0x6A, 0x6C, 0x7D, 0x7E, 0x8C, 0x8D, 0x9D, 0xA7),
    build="v3",  # not measured; vectors of 512 bits lower their clock
    # Not measured, and neither is the rest. One row at a time: as on Sapphire Rapids' kind.
    l3_ceiling_bytes=24 * MIB,
)

SAPPHIRE_RAPIDS = replace(
    UNKNOWN,
    name="sapphire-rapids",  # and Emerald and Granite Rapids
    models=_family_6(0x8F, 0xCF, 0xAD, 0xAE),
    # All measured on a guest of the Granite Rapids kind, 2026-11-25: 2 MB of L2, 480 MB of L3 shared with strangers.
    build="v3",  # measured with the loops of 0.1.0: v4 was slower on most shapes (train 1.63 of a library, v3 1.74)
    l3_ceiling_bytes=48 * MIB,  # a trial on 0.1.0 that took L3 for so large
    rows_at_once=1,  # the probe: never slower than four, for y as for dx, at any size
    write_ahead_bytes=1 * KIB,  # the probe: (100000, 200) in 0.93 copies, 1.25 without; what is streamed does not ask
    write_ahead_from_bytes=Times(1, "l3"),  # the probe: nothing gained in L3, twice the time in L2
    write_ahead_to_bytes=NEVER_BYTES,
    stream_from_bytes=8 * MIB,  # the trial: a sixth of 48 MB
    stream_inference_from_bytes=48 * MIB,  # the probe: 0.75 copies at 80 MB, 1.05 at 4 to 33 MB
)

# Nothing of arm64 is measured, so they are as an unknown processor but for the build.
APPLE = replace(UNKNOWN, name="apple", models=(("Apple", 0, 0, 0),), build="arm64")
NEOVERSE = replace(UNKNOWN, name="neoverse", models=(("ARM", 0, 0, 0),), build="arm64", l3_ceiling_bytes=32 * MIB)

FAMILIES = {
    family.name: family
    for family in (
        ZEN1,
        ZEN2,
        ZEN3,
        ZEN4,
        ZEN5,
        INTEL_OLD,
        INTEL_CLIENT,
        SKYLAKE_SERVER,
        SAPPHIRE_RAPIDS,
        APPLE,
        NEOVERSE,
        UNKNOWN,
    )
}


def recognised(vendor: str, family: int, model: int, levels: Sequence[str], l2_bytes: int) -> Family:
    """The family of a processor. An unknown model of a known vendor takes the nearest family.

    levels: the builds that the processor can run, which tell its features where a hypervisor hides the model.
    """
    for known in FAMILIES.values():
        if any(v == vendor and f == family and first <= model <= last for v, f, first, last in known.models):
            return known
    if vendor in (AMD, HYGON) and "v3" in levels:
        return ZEN5 if family > 0x1A else ZEN4 if "v4" in levels else ZEN2
    if vendor == INTEL:
        if "v4" in levels:
            # Every server since Sapphire Rapids has 2 MB of L2, and no processor before it.
            return SAPPHIRE_RAPIDS if l2_bytes >= 2 * MIB else SKYLAKE_SERVER
        return INTEL_CLIENT if "v3" in levels else INTEL_OLD
    return UNKNOWN


def build_of(family: Family, builds: Sequence[str]) -> str:
    """The preferred build where it is among these, else the nearest lower one, else the first."""
    lower = [name for name in builds if LEVELS.index(name) <= LEVELS.index(family.build)]
    return lower[-1] if lower else builds[0]
