"""Finds the build of the kernels for this processor.

They are built when the package is installed (setup.py), for several generations of x86-64; where no compiler was, or
for other processors, there is none, and plain torch does the work.
"""

import importlib.machinery
import logging
from functools import cache
from pathlib import Path

from asyncllm.native.library import Library
from asyncllm.native.trial import why_worse

logger = logging.getLogger(__name__)

AVX512 = {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"}
# Best first: the module's name, the processor flags it needs as Linux names them, and what to call it.
BUILDS = (
    ("amx", AVX512 | {"amx_tile", "amx_int8", "amx_bf16"}, "AVX-512 with bfloat16 and AMX"),
    ("avx512_bf16", AVX512 | {"avx512_bf16"}, "AVX-512 with bfloat16"),
    ("avx512", AVX512, "AVX-512"),
    ("avx2", {"avx2", "fma", "f16c"}, "AVX2"),
)

# Taken only where they prove better than another one as the server starts (native/trial.py).
ON_TRIAL = {"amx": "avx512"}

# Whose processors can run a build that is not the best one for them: Intel's take two cycles for a vector's products of
# pairs of bfloat16, and one for the two products of float32.
SLOW_ON = {"avx512_bf16": "GenuineIntel"}


def build_file(name: str) -> Path | None:
    """A build's file in the package; None where it was not built."""
    directory = Path(__file__).parent
    files = (directory / f"_{name}{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    return next((file for file in files if file.is_file()), None)


def open_build(name: str) -> Library:
    """One build, which this processor must be able to run. Raises OSError where it is not there or is another one's."""
    file = build_file(name)
    if file is None:
        raise OSError("the native kernels were not built: install the package where a C++ compiler is")
    return Library(file, next(description for build, _, description in BUILDS if build == name))


@cache
def find_library(flags: frozenset[str]) -> Library | str:
    """The best build for a processor with these flags, or why there is none, in a few words."""
    refusals: dict[str, str] = {}
    for name, needed, description in BUILDS:
        if not needed <= flags or SLOW_ON.get(name) in flags:
            continue
        try:
            library = open_build(name)
            why = why_worse(library, open_build(ON_TRIAL[name])) if name in ON_TRIAL else ""
        except OSError as error:
            why = str(error)
        if not why:
            for refused, reason in refusals.items():
                logger.warning("the kernels for %s are not used: %s", refused, reason)
            return library
        refusals[description] = why
    return next(iter(refusals.values()), "no build for this processor")
