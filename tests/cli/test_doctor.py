"""``vjepa-fast doctor`` on machines that have more and less than this one."""

import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests import forks
from vjepa_fast import cli, ops
from vjepa_fast.cli import doctor
from vjepa_fast.layers.attention.table import Table
from vjepa_fast.ops import _cpp, _triton
from vjepa_fast.registry import KINDS, registry_of

ROOT = Path(__file__).parents[2]


@pytest.fixture
def plain(monkeypatch):
    """An environment without settings, and a machine without an NVIDIA driver."""
    for name in doctor.environment():
        monkeypatch.delenv(name)
    monkeypatch.setattr(doctor, "driver", lambda: None)
    return monkeypatch


@pytest.fixture
def gpu(plain):
    """A machine with one GPU and everything that it needs."""
    found = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, total_memory=150 << 30)
    plain.setattr(torch.cuda, "is_available", lambda: True)
    plain.setattr(torch.cuda, "device_count", lambda: 1)
    plain.setattr(torch.cuda, "get_device_properties", lambda n: found)
    plain.setattr(_triton, "_machine", lambda: "")
    plain.setattr(doctor, "driver", lambda: "580.65.06")
    plain.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    plain.setattr(metadata, "version", lambda name: "1.2.3")
    return plain


def without(monkeypatch, *missing):
    version = metadata.version

    def found(name):
        if name.startswith(missing):
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", found)


def shown(capsys, *argv):
    """What the command prints, wrapped lines joined again."""
    assert cli.main(["doctor", *argv]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100 and "\n\n\n" not in out
    return re.sub(r"\s+", " ", out)


def test_as_a_process_in_text_and_json(tmp_path):
    path = tmp_path / "doctor.json"
    done = subprocess.run(
        [sys.executable, "-m", "vjepa_fast", "doctor", "--json", str(path)],
        text=True,
        timeout=120,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert max(map(len, done.stdout.splitlines())) <= 100
    report = json.loads(path.read_text())
    assert report["system"]["cores"] == os.cpu_count() and report["system"]["memory_bytes"] > 2**28
    assert str(torch.__version__).startswith(report["packages"]["torch"]["version"].split("+")[0])
    assert report["extension"]["loaded"] == _cpp.LOADED
    assert set(report["ops"]["table"]) == set(ops.backend_report())
    assert "h264" in report["decoders"]["videos"]["formats"]
    for op, row in report["ops"]["table"].items():
        assert re.search(rf"^  {op} +{row['cpu']['backend']}\b", done.stdout, re.M)


def test_bare_machine(plain, capsys):
    """No GPU, no triton, no extension: eager code runs everything, and each absence has its reason."""
    without(plain, "triton", "pytorch-triton", "xformers", "nvidia-dali")
    plain.setattr(_triton, "_machine", lambda: "the package triton is not installed")
    plain.setattr(torch.cuda, "is_available", lambda: False)
    plain.setattr(_cpp, "LOADED", False)
    plain.setattr(_cpp, "REASON", "vjepa_fast/_C.so was not built (no C++ compiler)")
    text = shown(capsys)
    assert "triton not installed; it is for: the fused kernels on CUDA devices" in text
    assert "DALI not installed" in text and "xformers not installed" in text and "devices none" in text
    assert "not in use: vjepa_fast/_C.so was not built" in text and "install g++ or clang++" in text
    table = doctor.examine()["ops"]["table"]
    assert {row["cpu"]["backend"] for row in table.values()} == {"eager"}
    assert table["rope3d"]["cpu"]["why_not"] == {"triton": "the package triton is not installed", "cpp": _cpp.REASON}


def test_gpu_machine(gpu, capsys):
    text = shown(capsys)
    assert "cuda:0 NVIDIA H200, capability 9.0, 150.0 GiB" in text and "driver 580.65.06" in text
    row = doctor.examine()["ops"]["table"]["rope3d"]
    assert row["cuda"] == {"backend": "triton", "why_not": {"cpp": "supports tensors on the CPU only"}}
    assert row["cpu"]["backend"] == ("cpp" if _cpp.LOADED else "eager")
    assert row["cpu"]["why_not"]["triton"] == "supports CUDA tensors only"
    assert re.search(r"rope3d (cpp|eager) triton ", text)
    assert "cpp supports tensors on the CPU only: " in text


def test_attention_backends_and_what_was_measured(gpu, capsys, tmp_path):
    gpu.setenv("XDG_CACHE_HOME", str(tmp_path))
    row = {"backend": "varlen", "ms": {"varlen": 0.25, "fa4": None}}
    Table().add("NVIDIA H200, torch 1", "bfloat16, 12x64, 1 x capacity", row)
    text, found = shown(capsys), doctor.examine()["attention"]
    assert set(found["backends"]) == set(registry_of("attention backend"))
    assert found["backends"]["varlen"] == {
        "why_not": [],
        "version": f"torch {torch.__version__}",
        "implementation": "flash",
        "on_device": True,
        "capture": True,
        "graph": False,
        "whole_graph": True,
        "deterministic": "asked",
    }
    assert f"varlen runs FlashAttention 2 (torch {torch.__version__}); available" in text
    assert re.search(r"sdpa_cudnn runs cuDNN \(torch \S+, cuDNN \w+\); available", text)
    assert f"measuredforauto1shapesin{tmp_path}" in text.replace(" ", "")  # a long path is wrapped
    assert "NVIDIA H200, torch 1: bfloat16, 12x64, 1 x capacity: varlen (ms: varlen 0.250, fa4 failed)" in text
    gpu.setattr(torch.cuda, "is_available", lambda: False)
    for name, entry in doctor.examine()["attention"]["backends"].items():
        assert ["it needs CUDA, the tokens are on cpu"] * (name != "sdpa") == entry["why_not"][:1]


def test_advice_on_a_gpu_machine(gpu, capsys):
    gpu.setattr("shutil.which", lambda name: None)
    assert "install a C compiler" in shown(capsys)
    without(gpu, "triton", "pytorch-triton")
    assert "install triton: without it" in shown(capsys)


@pytest.mark.parametrize(
    ("built", "text"),
    [(None, "torch is a build without CUDA, install one"), ("13.2", "the driver may be too old for CUDA 13.2")],
)
def test_driver_without_device(plain, capsys, built, text):
    plain.setattr(doctor, "driver", lambda: "470.1")
    plain.setattr(torch.cuda, "is_available", lambda: False)
    plain.setattr(torch.version, "cuda", built)
    assert text in shown(capsys)


def test_forced_backends(plain, capsys):
    plain.setenv("VJEPA_FAST_BACKEND", "eager")
    plain.setenv("VJEPA_FAST_BACKENDS", "cpp")
    text = shown(capsys)
    assert "the backend that eager gives" in text and "VJEPA_FAST_BACKEND eager (forces the backend" in text
    assert "VJEPA_FAST_BACKENDS is set, but nothing reads a variable of that name" in text
    plain.setattr(_triton, "_machine", lambda: "torch finds no CUDA device")
    plain.setenv("VJEPA_FAST_BACKEND", "triton")
    text = shown(capsys)
    assert re.search(r"rope3d refused", text) and "the forced backend triton refuses " in text
    plain.setenv("VJEPA_FAST_BACKEND", "fast")
    assert "VJEPA_FAST_BACKEND: expected one of auto, triton, cpp, eager, got 'fast'" in shown(capsys)


PLUGIN = """
from vjepa_fast.data.decoders import DECODERS, Decoder
from vjepa_fast.masks import STRATEGIES


@DECODERS.register("tape")
class Tape(Decoder):
    @classmethod
    def objections(cls):
        return ["no tape drive", "no tape"]

    def open(self, path):
        raise NotImplementedError


@STRATEGIES.register("checkers")
class Checkers(STRATEGIES["blocks"]):
    pass
"""

ADDED = {"decoder": ["tape"], "mask strategy": ["checkers"]}


def doctor_with(tmp_path, plugins):
    path = tmp_path / "doctor.json"
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "VJEPA_FAST_PLUGINS": plugins}
    done = forks.run("-m", "vjepa_fast", "doctor", "--json", str(path), env=env, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(path.read_text()), re.sub(r"\s+", " ", done.stdout)


def test_what_can_be_named_and_what_a_plugin_adds(tmp_path):
    """Entries of every kind, where those from elsewhere come from, and why one cannot be used here."""
    (tmp_path / "others.py").write_text(PLUGIN)
    report, text = doctor_with(tmp_path, "others")
    assert set(report["kinds"]) == set(KINDS)
    for kind, entries in report["kinds"].items():
        assert "error" in entries or set(entries) == {*registry_of(kind), *ADDED.get(kind, [])}
    assert report["kinds"]["decoder"]["tape"] == {"from": "others", "why_not": ["no tape drive", "no tape"]}
    assert "tape (from others; not here: no tape drive, no tape)" in text
    assert "blocks, motion, random, checkers (from others)" in text


def test_a_plugin_that_cannot_be_imported_is_reported(tmp_path):
    (tmp_path / "others.py").write_text("import no_such_library\n")
    report, text = doctor_with(tmp_path, "others")
    assert "plugin others (VJEPA_FAST_PLUGINS) cannot be imported" in report["kinds"]["decoder"]["error"]
    assert text.split("Advice")[1].count("plugin others") == 1


def test_every_variable_that_the_package_reads_is_known():
    files = [*(ROOT / "vjepa_fast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py"), ROOT / "setup.py"]
    read = {n for f in files if f.name != "doctor.py" for n in re.findall(r"VJEPA_FAST_[A-Z]+", f.read_text("utf-8"))}
    assert {"VJEPA_FAST_BACKEND", "VJEPA_FAST_BUILD"} <= read <= set(doctor.VARIABLES)


def test_torch_that_does_not_import(tmp_path):
    (tmp_path / "torch.py").write_text("raise OSError('libtorch_cpu.so: undefined symbol')\n")
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-m", "vjepa_fast", "doctor"], text=True, capture_output=True, timeout=120, env=env
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert done.stdout.count("reinstall torch and vjepa-fast: OSError: libtorch_cpu.so: undefined symbol") == 1
    assert "PyAV" in done.stdout


def test_sources_newer_than_the_library(plain, tmp_path, capsys):
    library, source = tmp_path / "vjepa_fast" / "_C.so", tmp_path / "csrc" / "rope.cpp"
    for n, file in enumerate((library, source)):
        file.parent.mkdir()
        file.write_bytes(b"")
        os.utime(file, (n, n))
    plain.setattr(_cpp, "PATH", library)
    assert "rope.cpp changed after the C++ extension was built: run pip install -e . again" in shown(capsys)
    os.utime(library, (2, 2))
    assert "changed after" not in shown(capsys)


def test_a_path_that_cannot_be_written_is_a_user_error(tmp_path, capsys):
    assert cli.main(["doctor", "--json", str(tmp_path / "none" / "x.json")]) == 2
    assert "cannot be written" in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_what_is_captured_and_why_not(capsys, monkeypatch):
    assert "needs CUDA" in " ".join(doctor.examine()["graphs"]["why_not"])
    assert "none; it needs CUDA" in shown(capsys)
    monkeypatch.setattr(doctor, "graphs", lambda: {"how": "target", "why_not": ["lengths are exact"]})
    assert "of the target's forward; lengths are exact" in shown(capsys)


def test_warm_refuses_where_there_is_nothing_to_compile_for(plain, capsys):
    from vjepa_fast.ops import _builds

    plain.setattr(torch.cuda, "is_available", lambda: False)
    plain.setattr(_builds, "objections", list)
    assert cli.main(["doctor", "--warm"]) == 2
    assert "no CUDA device here; --arch sm_90" in capsys.readouterr().err
    assert cli.main(["doctor", "--warm", "--arch", "sm_70"]) == 2
    assert "--arch: 'sm_70' is not a compute capability of at least 8.0" in capsys.readouterr().err
    plain.setattr(_builds, "objections", lambda: ["the package triton is not installed"])
    assert cli.main(["doctor", "--warm"]) == 2
    assert "doctor --warm: the package triton is not installed" in capsys.readouterr().err


def test_warm_says_what_it_compiles(plain, capsys):
    """Each kernel when the last of its builds is there, then all; a failed build ends with 1."""
    from vjepa_fast.ops import _builds
    from vjepa_fast.trainer import warm

    asked = []

    class Made:
        def __init__(self, cfg, dtype, arch, on_kernel):
            asked.append((cfg.data.batch_size, dtype, arch))
            self.bad = [_builds.Built("token", 0.2, False, "CompilationError: at 3:1")] if arch == 80 else []
            on_kernel("_product", [_builds.Built("_product", 1.0, True), _builds.Built("_product", 2.0, False)])
            if self.bad:
                on_kernel("token", self.bad)

        def finish(self):
            return warm.Summary(2, 1, self.bad, 3.0)

    plain.setattr(_builds, "objections", list)
    plain.setattr(warm, "Warming", Made)
    recipe = ["mixed_4gpu_fwm_hw_ld", "data.batch_size=5"]
    assert cli.main(["doctor", "--warm", *recipe, "--arch", "90"]) == 0
    out = capsys.readouterr().out
    assert asked == [(5, torch.bfloat16, 90)] and "kernels of mixed_4gpu_fwm_hw_ld for sm_90, bfloat16" in out
    assert re.search(r"_product +2 builds, 1 compiled, 3.0 s\n2 kernels ready in 3.0 s, 1 of them compiled now", out)
    assert cli.main(["doctor", "--warm", "--arch", "sm_80"]) == 1
    assert re.search("token +1 builds, 0 compiled, 0.2 s; failed: CompilationError", capsys.readouterr().out)
