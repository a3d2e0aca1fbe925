"""The package as it is installed: what importing costs, what a wheel holds, what happens without a compiler."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

import vjepa_fast

ROOT = pathlib.Path(__file__).parents[1]
needs_compiler = pytest.mark.skipif(
    sys.platform != "linux" or not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler"
)


def python(code, *, path=ROOT, cwd=None):
    env = {**os.environ, "PYTHONPATH": str(path)}
    return subprocess.run([sys.executable, "-c", code], env=env, cwd=cwd, capture_output=True, text=True, timeout=600)


def names(wheel):
    return set(zipfile.ZipFile(wheel).namelist())


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of what goes into a build, without anything built."""
    tree = tmp_path_factory.mktemp("source")
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "*.pyc")
    for name in ("vjepa_fast", "kernels", "csrc"):
        shutil.copytree(ROOT / name, tree / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    setup = (tree / "setup.py").read_text()
    assert ' = "-O3 ' in setup
    (tree / "setup.py").write_text(setup.replace(' = "-O3 ', ' = "-O0 '))  # what is tested is not how fast it runs
    return tree


def build(tree, out, *, mode="auto", cxx=None, command="bdist_wheel", **more):
    env = {k: v for k, v in os.environ.items() if k not in ("CXX", "VJEPA_FAST_REPOSITORY")}
    env.update(VJEPA_FAST_BUILD=mode, **({"CXX": cxx} if cxx else {}), **more)
    shutil.rmtree(tree / "build", ignore_errors=True)
    done = subprocess.run(
        [sys.executable, "setup.py", command, "--dist-dir", str(out)],
        cwd=tree,
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
    )
    files = sorted(out.glob("*")) if out.is_dir() else []
    return done, files[0] if files else None


def test_import_is_light_and_lazy():
    code = "import sys, vjepa_fast; print(sorted({'torch', 'numpy', 'yaml', 'timm', 'av'} & set(sys.modules)))"
    assert python(code).stdout.strip() == "[]"
    code = "import sys, vjepa_fast\nprint(vjepa_fast.ops.mask_distance.__name__, 'torch' in sys.modules)"
    assert python(code).stdout.split() == ["mask_distance", "True"]


def test_unknown_attribute_and_listing():
    with pytest.raises(AttributeError, match="module 'vjepa_fast' has no attribute 'modles'"):
        vjepa_fast.modles  # noqa: B018
    assert {"ops", "models", "load_encoder", "__version__"} <= set(dir(vjepa_fast))


def test_kernels_is_found_in_a_checkout_but_not_under_its_bare_name():
    assert python("import vjepa_fast.kernels", cwd="/").returncode == 0
    done = python("import kernels", cwd=ROOT)
    assert done.returncode == 1 and "import this package as vjepa_fast.kernels" in done.stderr


def test_wheel_without_extension(tree, tmp_path):
    done, wheel = build(tree, tmp_path / "dist", mode="0")
    assert done.returncode == 0, done.stderr
    assert wheel.name == f"vjepa_fast-{vjepa_fast.__version__}-py3-none-any.whl"
    files = names(wheel)
    tops = {f.split("/")[0] for f in files}
    assert tops == {"vjepa_fast", f"vjepa_fast-{vjepa_fast.__version__}.dist-info"}
    assert "vjepa_fast/kernels/__init__.py" in files and not any(f.endswith(".so") for f in files)
    shipped = {
        p.relative_to(ROOT).as_posix()
        for p in (ROOT / "vjepa_fast").rglob("*")
        if p.is_file() and p.suffix not in (".pyc", ".so")
    }
    assert shipped <= files  # code, recipes, templates, py.typed


@needs_compiler
def test_wheel_with_extension_runs_from_where_it_is_unpacked(tree, tmp_path):
    done, wheel = build(tree, tmp_path / "dist", mode="1")
    assert done.returncode == 0, done.stderr
    assert "-py3-none-linux_" in wheel.name and "vjepa_fast/_C.so" in names(wheel)
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import vjepa_fast, vjepa_fast.kernels, torch; from vjepa_fast import ops; ops.use_backend('cpp')\n"
        "print(vjepa_fast.__file__, ops.mask_distance(torch.tensor([[0]]), torch.tensor([[1]]), (1, 1, 2)).item())"
    )
    where, value = python(code, path=tmp_path / "site", cwd="/").stdout.split()
    assert where.startswith(str(tmp_path)) and float(value) == 1.0


@pytest.mark.skipif(sys.platform != "linux", reason="the extension is built on Linux only")
def test_missing_compiler_is_no_obstacle_unless_the_extension_is_required(tree, tmp_path):
    done, wheel = build(tree, tmp_path / "auto", cxx="no-such-compiler")
    assert done.returncode == 0 and "vjepa_fast/_C.so" not in names(wheel)
    assert "_C.so was not built (no C++ compiler found (tried no-such-compiler))" in done.stderr
    done, wheel = build(tree, tmp_path / "required", mode="1", cxx="no-such-compiler")
    assert done.returncode != 0 and wheel is None and "VJEPA_FAST_BUILD=1" in done.stderr


@needs_compiler
def test_code_that_does_not_compile_is_no_obstacle_either(tree, tmp_path):
    broken = tree / "csrc" / "broken.cpp"
    broken.write_text("#error on purpose\n")
    try:
        done, wheel = build(tree, tmp_path / "auto")
        assert done.returncode == 0 and "vjepa_fast/_C.so" not in names(wheel) and "was not built" in done.stderr
    finally:
        broken.unlink()


def test_unknown_build_mode_is_refused(tree, tmp_path):
    done, _ = build(tree, tmp_path / "dist", mode="yes")
    assert done.returncode != 0 and "VJEPA_FAST_BUILD='yes': expected auto, 0 or 1" in done.stderr


LINK = re.compile(r"(!?)\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^()\s]+)\)")


def test_source_archive_can_build_the_extension(tree, tmp_path):
    (tree / "tests" / "goldens").mkdir(parents=True)
    (tree / "tests" / "goldens" / "large.pt").write_bytes(bytes(10))
    (tree / "tests" / "test_some.py").write_text("")
    address = "https://example.org/some/where"
    done, archive = build(tree, tmp_path / "dist", command="sdist", VJEPA_FAST_REPOSITORY=address)
    assert done.returncode == 0, done.stderr
    with tarfile.open(archive) as opened:
        files = {f.split("/", 1)[-1] for f in opened.getnames()}
        opened.extractall(tmp_path, filter="data")
    assert {f"csrc/{p.name}" for p in (ROOT / "csrc").iterdir()} | {"setup.py", "kernels/__init__.py"} <= files
    assert "tests/test_some.py" in files and not any(f.startswith("tests/goldens") for f in files)
    unpacked = tmp_path / f"vjepa_fast-{vjepa_fast.__version__}"
    about = (unpacked / "PKG-INFO").read_text(encoding="utf-8")
    links = LINK.findall(about)
    own = LINK.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    assert [link.replace(f"{address}/blob/HEAD/", "").replace(f"{address}/raw/HEAD/", "") for _, link in links] == [
        link for _, link in own
    ]
    assert all(link.startswith("https://") for _, link in links)
    assert {bang for bang, link in links if "/raw/HEAD/" in link} == {"!"}
    assert f"git clone {address} &&" in about and "Description-Content-Type: text/markdown" in about
    assert all((ROOT / link.split("/HEAD/")[1].partition("#")[0]).exists() for _, link in links if "/HEAD/" in link)
    done, wheel = build(unpacked, tmp_path / "wheels", mode="0")  # and what is made of the archive is a whole package
    assert done.returncode == 0, done.stderr
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "import vjepa_fast.kernels; from vjepa_fast import config; print(config.__file__, config.load('own_videos'))"
    where = python(code, path=tmp_path / "site", cwd="/")
    assert where.stdout.startswith(str(tmp_path)), where.stderr
    (about,) = (path.read_text(encoding="utf-8") for path in (tmp_path / "site").glob("*.dist-info/METADATA"))
    links = [link for _, link in LINK.findall(about)]  # no address is known
    assert links and all(link.startswith("https:") for link in links) and "report.png" not in about
    assert "what is in the file" in about
