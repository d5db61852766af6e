"""Build of the compiled core; everything else about the package stands in pyproject.toml.

What stands in PER_BUILD is compiled once for each instruction set, into modules of different names; the package
chooses among them at import. For wheels, FASTBN_REQUIRE_OPENMP=1 makes a missing OpenMP an error, and
FASTBN_REQUIRE_BUILDS=1 a build that the compiler does not know.
"""

import sys

if sys.version_info < (3, 11):  # before anything else is imported, which an old Python may not have either
    sys.exit(f"fastbn needs Python 3.11 or newer; this is Python {sys.version.split()[0]}")

import os
import shlex
import subprocess
import sysconfig
import tempfile
from pathlib import Path

import numpy
from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

# Contraction of a*b + c is off: a build with fused multiply-add must give the bits of a build without.
GNU_FLAGS = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
# gcc writes a loop of sixteen steps out before it would vectorise it: a choice within then becomes sixteen branches.
GCC_FLAGS = ["--param=max-completely-peel-times=8"]
GCC_PROGRAM = """
#if !defined(__GNUC__) || defined(__clang__)
#error "not gcc"
#endif
int main(void) { return 0; }
"""
MSVC_FLAGS = ["/O2", "/fp:precise"]
EMPTY_PROGRAM = """
int main(void) { return 0; }
"""
PYTHON_PROGRAM = """
#include <Python.h>
int main(void) { return 0; }
"""
# v4 has vectors of 512 bits, a cache line. clang by itself takes half, to spare the clocks of older processors.
BUILDS = {
    "baseline": {"gnu": [], "msvc": []},
    "v3": {"gnu": ["-march=x86-64-v3"], "msvc": ["/arch:AVX2"], "macro": "__AVX2__"},
    "v4": {
        "gnu": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
        "msvc": ["/arch:AVX512"],
        "macro": "__AVX512VL__",
    },
    "arm64": {"gnu": [], "msvc": []},
}
PER_BUILD = ["batchnorm", "optim"]  # sources in fastbn/kernels
ONCE = ["arguments", "atomic", "batchstats", "calls", "functional", "kernels.machine", "kernels.memory", "steps"]
# MSVC only warns of an /arch that it does not know, and the arm64 half of a universal build is given none.
BUILD_PROGRAM = """
#if (defined(__x86_64__) || defined(_M_X64)) && !defined(%s)
#error "this compiler does not know the instruction set"
#endif
int main(void) { return 0; }
"""
OPENMP_CANDIDATES = [(["-fopenmp"], ["-fopenmp"]), (["-Xpreprocessor", "-fopenmp"], ["-lomp"])]
OPENMP_PROGRAM = """
#include <omp.h>
int main(void) {
    int threads = 0;
    #pragma omp parallel num_threads(2) reduction(+:threads)
    threads += 1;
    return threads < 1;
}
"""


def target_builds() -> list[str]:
    # The target is not the machine that builds when macOS or a cross compiler says so; a universal build has two.
    target = (os.environ.get("ARCHFLAGS") or sysconfig.get_platform()).lower()
    arm = any(name in target for name in ("arm64", "aarch64", "universal2"))
    x86 = any(name in target for name in ("x86_64", "amd64", "universal2"))
    return (["baseline", "v3", "v4"] if x86 else [] if arm else ["baseline"]) + ["arm64"] * arm


def build_of(ext: Extension) -> str:
    return ext.name.rpartition("_")[2]


class BuildExt(build_ext):
    """Adds what depends on the compiler: its flags, and OpenMP where a program with it compiles and runs."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.parallel = self.parallel or os.cpu_count()

    def build_extensions(self) -> None:
        kind = "msvc" if self.compiler.compiler_type == "msvc" else "gnu"
        self.look_for_compiler()
        flags = {name: self.build_flags(name, kind) for name in target_builds()}
        self.extensions = [ext for ext in self.extensions if flags.get(build_of(ext), []) is not None]
        compile_openmp, link_openmp = self.find_openmp(kind)
        gcc_flags = GCC_FLAGS if kind == "gnu" and self.works(GCC_PROGRAM, GCC_FLAGS) else []
        for ext in self.extensions:
            ext.extra_compile_args += MSVC_FLAGS if kind == "msvc" else GNU_FLAGS + gcc_flags
            ext.extra_compile_args += flags.get(build_of(ext), [])
            ext.extra_compile_args += compile_openmp
            ext.extra_link_args += link_openmp
        super().build_extensions()

    def look_for_compiler(self) -> None:
        if not self.works(EMPTY_PROGRAM, [], []):
            raise CompileError(
                "fastbn needs a C compiler, and the one found does not compile and run an empty program: install gcc "
                "or clang (Linux), Xcode's command line tools (macOS) or Visual Studio's build tools (Windows)"
            )
        if not self.works(PYTHON_PROGRAM, []):
            raise CompileError(
                "fastbn needs the C headers of Python, and Python.h is not found: install them "
                "(python3-dev on Debian and Ubuntu, python3-devel on Fedora)"
            )

    def build_flags(self, name: str, kind: str) -> list[str] | None:
        """The flags of one build, or None where the compiler does not know them."""
        flags = BUILDS[name][kind]
        if kind == "gnu" and sys.platform == "darwin":
            # A universal build compiles for arm64 too, which must not see them.
            flags = [part for flag in flags for part in ("-Xarch_x86_64", flag)]
        if flags and not self.works(BUILD_PROGRAM % BUILDS[name]["macro"], flags):
            message = f"the compiler does not know {' '.join(flags)}"
            if os.environ.get("FASTBN_REQUIRE_BUILDS") == "1":
                raise CompileError(f"{message}, and FASTBN_REQUIRE_BUILDS=1 asks for {name}")
            print(f"warning: {message}; fastbn is built without {name}", file=sys.stderr)
            return None
        return flags

    def find_openmp(self, kind: str) -> tuple[list[str], list[str]]:
        candidates = [(["/openmp"], [])] if kind == "msvc" else OPENMP_CANDIDATES
        for flags in candidates:
            if self.works(OPENMP_PROGRAM, *flags):
                return flags
        message = "no OpenMP found: a program with `#pragma omp parallel` did not compile and run"
        if os.environ.get("FASTBN_REQUIRE_OPENMP") == "1":
            raise CompileError(f"{message}, and FASTBN_REQUIRE_OPENMP=1 asks for it")
        print(f"warning: {message}; fastbn is built serial", file=sys.stderr)
        return [], []

    def works(self, program: str, compile_args: list[str], link_args: list[str] | None = None) -> bool:
        """Whether a program compiles, and, where link_args are given, links and runs."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.c")
            source.write_text(program)
            try:
                objects = self.compiler.compile([str(source)], folder, extra_postargs=compile_args)
                if link_args is None:
                    return True
                # Extensions are linked with these too; setuptools leaves them out for programs.
                flags = shlex.split(os.environ.get("CFLAGS", "")) + shlex.split(os.environ.get("LDFLAGS", ""))
                self.compiler.link_executable(objects, "probe", folder, extra_postargs=flags + link_args)
            except (CompileError, LinkError):
                return False
            if os.environ.get("_PYTHON_HOST_PLATFORM"):
                return True  # a cross build cannot run what it makes
            found = Path(folder, self.compiler.executable_filename("probe"))
            return subprocess.run([found], timeout=60).returncode == 0


def extension(name: str, source: str) -> Extension:
    return Extension(
        name,
        [source],
        include_dirs=[numpy.get_include(), "fastbn/kernels"],
        define_macros=[
            ("NPY_NO_DEPRECATED_API", "NPY_1_25_API_VERSION"),
            ("NPY_TARGET_VERSION", "NPY_1_25_API_VERSION"),
        ],
    )


def cythonized(extensions: list[Extension], folder: str) -> list[Extension]:
    # What threads share without a GIL is guarded where it stands: the pool by its lock, a layer by critical sections.
    directives = {"language_level": 3, "freethreading_compatible": True}
    return cythonize(extensions, build_dir=f"build/cython/{folder}", compiler_directives=directives)


modules = cythonized([extension(f"fastbn.{name}", f"fastbn/{name.replace('.', '/')}.pyx") for name in ONCE], "once")
for build in target_builds():
    # A folder for each: the C files of one source would overwrite each other.
    kernels = [extension(f"fastbn.kernels.{name}_{build}", f"fastbn/kernels/{name}.pyx") for name in PER_BUILD]
    modules += cythonized(kernels, build)

setup(ext_modules=modules, cmdclass={"build_ext": BuildExt})
