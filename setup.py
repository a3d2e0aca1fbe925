"""Builds vjepa_fast/_C.so from csrc/*.cpp with ninja and a C++17 compiler; torch is not needed at build time.

csrc/torch_abi.h declares the part of libtorch's stable C ABI that the kernels call. An empty libtorch_cpu.so stands in
for the real one at link time; at run time ``import torch`` has loaded that. One library thus runs with every Python and
every torch from 2.11 on.

VJEPA_FAST_BUILD=auto (default): build where a compiler is found, else install without. 0: do not build. 1: fail where
it cannot be built. CXX names the compiler.

VJEPA_FAST_REPOSITORY=https://...: where links of README.md lead on the package page; the default is ``Repository`` in
``[project.urls]`` of pyproject.toml. With neither, links into the repository become plain text there.
"""

import hashlib
import os
import pathlib
import re
import shutil
import subprocess
import sys

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

MODE = os.environ.get("VJEPA_FAST_BUILD", "auto")
if MODE not in ("auto", "0", "1"):
    sys.exit(f"VJEPA_FAST_BUILD={MODE!r}: expected auto, 0 or 1")
if MODE == "1" and sys.platform != "linux":
    sys.exit("VJEPA_FAST_BUILD=1: the extension is built on Linux only")

CXXFLAGS = "-O3 -g0 -std=c++17 -fPIC -fvisibility=hidden -fopenmp-simd -fno-math-errno -Wall -Wextra"


def find_compiler():
    """The C++ compiler to call: ``CXX``, or the first of the usual names on the path."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for name in names:
        if shutil.which(name.split()[0]):
            return name
    raise RuntimeError(f"no C++ compiler found (tried {', '.join(names)})")


def fingerprint(folder):
    """A digest of the sources, the same as in vjepa_fast/ops/_cpp.py, which compares."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".cpp", ".h"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def write_ninja(folder, compiler, sources, target):
    """Write build.ninja: an object per source, and a stub in the place of libtorch_cpu.so to link with."""
    from ninja.ninja_syntax import Writer

    objects, stub = [], folder / "stub" / "libtorch_cpu.so"
    (folder / "stub").mkdir(parents=True, exist_ok=True)
    (folder / "stub" / "stub.cpp").write_text("")
    header, text = folder / "sources.h", f'#define VJEPA_SOURCES "{fingerprint(sources[0].parent)}"\n'
    if not header.is_file() or header.read_text() != text:
        header.write_text(text)
    with open(folder / "build.ninja", "w") as f:
        n = Writer(f)  # pyright: ignore[reportArgumentType]  # its stubs say str; it takes a file
        n.variable("cxx", compiler)
        n.variable("cxxflags", CXXFLAGS)
        n.rule("compile", f"$cxx $cxxflags -I{folder} -MMD -MF $out.d -c $in -o $out", depfile="$out.d", deps="gcc")
        n.rule("stub", "$cxx -shared -fPIC -Wl,-soname,libtorch_cpu.so $in -o $out")
        n.rule("link", "$cxx -shared $in -o $out -L$stubdir -Wl,--no-as-needed -ltorch_cpu -Wl,--as-needed")
        n.build([str(stub)], "stub", [str(folder / "stub" / "stub.cpp")])
        for source in sources:
            objects.append(str(folder / (source.stem + ".o")))
            n.build([objects[-1]], "compile", [str(source)])
        n.build([str(target)], "link", objects, implicit=[str(stub)], variables={"stubdir": str(stub.parent)})


def repository():
    """The address of the repository, without a slash at its end; empty where none is given."""
    found = re.search(
        r'^\[project\.urls\][^\[]*^Repository *= *"(.+?)"', pathlib.Path("pyproject.toml").read_text(), re.M
    )
    return os.environ.get("VJEPA_FAST_REPOSITORY", found[1] if found else "").rstrip("/")


def page(text, address):
    """README.md for the package page: links and images of the repository by their whole address, or without one as
    plain text, and without images.
    """

    def absolute(match):
        bang, words, link = match.groups()
        if re.match(r"[a-z][a-z+.-]*:|#", link):
            return match[0]
        if address:
            return f"{bang}[{words}]({address}/{'raw' if bang else 'blob'}/HEAD/{link})"
        return "" if bang else words

    parts = re.split(r"(^```.*?^```$)", text, flags=re.M | re.S)  # every second one is code
    plain = [re.sub(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)", absolute, part) for part in parts[::2]]
    code = [part.replace("<this repository>", address or "<this repository>") for part in parts[1::2]]
    return "".join(piece for pair in zip(plain, [*code, ""]) for piece in pair)


class BuildExt(build_ext):
    def get_ext_filename(self, fullname):  # no Python ABI in it, so a plain name
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext):
        try:
            self.ninja(ext)
        except (RuntimeError, OSError, ImportError, subprocess.CalledProcessError) as e:
            if MODE == "1":
                raise SystemExit(f"VJEPA_FAST_BUILD=1: the extension could not be built: {e}") from e
            self.failed = str(e)
            print(f"warning: vjepa_fast/_C.so was not built ({e}); eager code runs instead", file=sys.stderr)

    def ninja(self, ext):
        import ninja

        folder = pathlib.Path(self.build_temp).resolve()
        target = pathlib.Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        write_ninja(folder, find_compiler(), [pathlib.Path(s).resolve() for s in ext.sources], target)
        program = os.path.join(ninja.BIN_DIR, "ninja")
        subprocess.run([program, "-C", str(folder)], check=True)

    def get_outputs(self):
        return [] if getattr(self, "failed", None) else super().get_outputs()

    def copy_extensions_to_source(self):
        if not getattr(self, "failed", None):
            super().copy_extensions_to_source()


class BdistWheel(bdist_wheel):
    def get_tag(self):
        platform = super().get_tag()[2]
        return "py3", "none", platform if self.distribution.ext_modules else "any"


sources = sorted(str(p) for p in pathlib.Path("csrc").glob("*.cpp"))
want = MODE != "0" and sys.platform == "linux"
kernels = ["vjepa_fast.kernels"] + [f"vjepa_fast.kernels.{p}" for p in find_packages("kernels")]
setup(
    long_description=page(pathlib.Path("README.md").read_text(encoding="utf-8"), repository()),
    long_description_content_type="text/markdown",
    packages=find_packages(include=["vjepa_fast", "vjepa_fast.*"]) + kernels,
    package_dir={"vjepa_fast": "vjepa_fast", "vjepa_fast.kernels": "kernels"},
    ext_modules=[Extension("vjepa_fast._C", sources, language="c++")] if want and sources else [],
    cmdclass={"build_ext": BuildExt, "bdist_wheel": BdistWheel},
)
