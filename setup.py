"""Builds the C++ library of the CPU engine, and README.md as an index of packages shows it; everything
else stands in pyproject.toml.

It is a plain shared library with a C interface, loaded with ctypes: it builds without torch, and
one build serves every version of it and of Python. Without a compiler the package installs without
the library and computes with plain torch.
"""

import os
import re
import shutil
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
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


IN_A_CLONE = re.compile(r"<!-- in a clone -->.*?<!-- /in a clone -->", re.DOTALL)
FENCED = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
RELATIVE = r"(?!https?:|mailto:)"
LINK = re.compile(rf"(\]\(|\bhref=\"){RELATIVE}")
PICTURE = re.compile(rf"(!\[[^\]]*\]\(|\b(?:src|srcset)=\"){RELATIVE}")


def long_description(readme: str, repository: str, version: str) -> str:
    """README.md with links that lead from anywhere to the files of this version, and commands that install
    from where it is shown, without what is true in a clone alone. Its own headings, which an index gives
    no anchors, are looked up there, too.
    """

    def absolute(text: str) -> str:
        text = PICTURE.sub(rf"\g<1>{repository}/raw/v{version}/", text)
        text = re.sub(rf"({LINK.pattern})#", r"\g<1>README.md#", text)
        return LINK.sub(rf"\g<1>{repository}/blob/v{version}/", text)

    anywhere = re.sub(
        r"(pip install ['\"]?)\.(?=[\[\s'\"`]|$)", r"\1fastdpop", IN_A_CLONE.sub("", readme)
    )
    parts = FENCED.split(anywhere)
    return "".join(part if i % 2 else absolute(part) for i, part in enumerate(parts))


def declared(key: str) -> str:
    """A line of pyproject.toml, which Python 3.10 has no reader for."""
    found = re.search(rf'^{key} = "(.+?)"', Path("pyproject.toml").read_text("utf-8"), re.MULTILINE)
    assert found is not None, key
    return found[1]


def name_compiler() -> None:
    """Let ``CXX`` name a compiler that is there, where Python's own build names one that is not, or clang."""
    built_with = (sysconfig.get_config_var("CXX") or "").split()
    # Clang builds no kernels for x86-64: it knows no `#pragma GCC target`.
    fits = built_with and "clang" not in built_with[0] and shutil.which(built_with[0])
    if os.environ.get("CXX") or fits:
        return
    found = next(filter(shutil.which, COMPILERS), None)
    if found is not None:
        os.environ["CXX"] = found


class BuildKernels(build_ext):
    """Falls back to one thread without OpenMP, and to no library without a compiler."""

    def get_ext_filename(self, fullname: str) -> str:
        """Without the name of a Python: the library knows nothing of it."""
        return f"{os.path.join(*fullname.split('.'))}.so"

    def build_extension(self, extension: Extension) -> None:
        """GCC's OpenMP is compiled in and not linked: torch has brought the same run-time library when
        the library is loaded, under whatever name, and a second one would keep threads of its own.
        Clang's is another one, and linked.
        """
        for compiled, linked in ((True, False), (True, True), (False, False)):
            extension.extra_compile_args = [*FLAGS, *["-fopenmp"] * compiled]
            extension.extra_link_args = ["-fopenmp"] * linked
            try:
                super().build_extension(extension)
                built = Path(self.get_ext_fullpath(extension.name))
                if compiled and not linked and b"GOMP_parallel" not in built.read_bytes():
                    built.unlink()  # or it would be up to date for the next try
                    raise OSError("this compiler's OpenMP is not the one that torch brings")
            except Exception as error:
                how = "OpenMP " + ("linked" if linked else "from torch" if compiled else "left out")
                self.warn(f"building {extension.name} with {how} failed: {error}")
            else:
                return
        self.warn("fastdpop is installed without its C++ library: it computes with plain torch")


class AnyPython(bdist_wheel):
    """A wheel for one platform, and for every Python on it."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


if __name__ == "__main__":
    name_compiler()
    setup(
        long_description=long_description(
            Path("README.md").read_text("utf-8"), declared("Repository"), declared("version")
        ),
        long_description_content_type="text/markdown",
        ext_modules=[
            Extension(
                "fastdpop.engines._cpu",
                sources=[f"csrc/{name}.cpp" for name in SOURCES],
                depends=[*map(str, Path("csrc").glob("*.[hi]*"))],
                language="c++",
                optional=True,
            )
        ],
        cmdclass={"build_ext": BuildKernels, "bdist_wheel": AnyPython},
    )
