"""All but the native kernels is in setup.cfg."""

import copy
import hashlib
import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = "asyncllm/native"
# Products and sums stay apart where the code says so: results must not depend on what a compiler fuses in one of many
# instances. gcc's own headers leave unused lanes undefined, and warn of it.
WARNINGS = ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
GENERAL = ["-std=c++20", "-O3", "-g0", "-pthread", "-ffp-contract=off", *WARNINGS]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"]
# One build for each generation of processors, chosen as the server starts: what is built here may run elsewhere.
BUILDS = {
    "_avx2": AVX2,
    "_avx512": AVX512,
    "_avx512_bf16": [*AVX512, "-mavx512bf16"],
    "_amx": [*AVX512, "-mamx-tile", "-mamx-int8", "-mamx-bf16"],
}


def sources_digest() -> str:
    """As asyncllm/native/library.py has it, which refuses a build of other sources."""
    files = sorted(file for file in Path(__file__).parent.joinpath(SOURCES).iterdir() if file.suffix in (".cpp", ".h"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def native_kernels() -> list[Extension]:
    """Shared objects that are loaded by path, not imported. Optional: without a C++ compiler, torch does their work."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return []
    return [
        Extension(
            f"asyncllm.native.{name}",
            sources=[f"{SOURCES}/decoder.cpp"],
            depends=[str(header) for header in sorted(Path(SOURCES).glob("*.h"))],
            define_macros=[("ASYNCLLM_SOURCES", f'"{sources_digest()}"')],
            extra_compile_args=[*GENERAL, *flags],
            extra_link_args=["-pthread"],
            optional=True,
        )
        for name, flags in BUILDS.items()
    ]


class BuildApart(build_ext):
    """Every build has objects of its own: they are made of the same source, at the same time."""

    def build_extension(self, ext: Extension) -> None:
        """As setuptools does, in a directory of the build's name."""
        apart = copy.copy(self)
        apart.build_temp = str(Path(self.build_temp, ext.name))
        build_ext.build_extension(apart, ext)


setup(ext_modules=native_kernels(), cmdclass={"build_ext": BuildApart})
