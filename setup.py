"""Builds the C++ library of the CPU engine; everything else stands in pyproject.toml.

It is a plain shared library with a C interface, loaded with ctypes: it builds without torch, and
one build serves every version of it. Without a compiler the package installs without the library
and computes with plain torch.
"""

import os
import shutil
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

COMPILERS = ["c++", "g++", "clang++"]
SOURCES = ["library", "generic", "avx2", "avx512", "avx512bf16"]
FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-Wno-maybe-uninitialized",
]


def name_compiler() -> None:
    """Let ``CXX`` name a compiler that is there, where Python's own build names one that is not."""
    built_with = (sysconfig.get_config_var("CXX") or "").split()
    if os.environ.get("CXX") or (built_with and shutil.which(built_with[0])):
        return
    found = next(filter(shutil.which, COMPILERS), None)
    if found is not None:
        os.environ["CXX"] = found


class BuildKernels(build_ext):
    """Falls back to one thread without OpenMP, and to no library without a compiler."""

    def build_extension(self, extension: Extension) -> None:
        for openmp in (["-fopenmp"], []):
            extension.extra_compile_args = [*FLAGS, *openmp]
            extension.extra_link_args = openmp
            try:
                super().build_extension(extension)
            except Exception as error:
                self.warn(f"building {extension.name} {' '.join(openmp)} failed: {error}")
            else:
                return
        self.warn("fastdpop is installed without its C++ library: it computes with plain torch")


if __name__ == "__main__":
    name_compiler()
    setup(
        ext_modules=[
            Extension(
                "fastdpop.engines._cpu",
                sources=[f"csrc/{name}.cpp" for name in SOURCES],
                depends=[*map(str, Path("csrc").glob("*.[hi]*"))],
                language="c++",
                optional=True,
            )
        ],
        cmdclass={"build_ext": BuildKernels},
    )
