"""An op has one name on five paths: ops/X.py, kernels/X.py, csrc/X.cpp, tests/ops/test_X.py and benchmarks/ops/X.py."""

import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[2]
FOLDERS = {
    "ops": ("vjepa_fast/ops", "{}.py"),
    "kernels": ("kernels", "{}.py"),
    "csrc": ("csrc", "{}.cpp"),
    "tests": ("tests/ops", "test_{}.py"),
    "benchmarks": ("benchmarks/ops", "{}.py"),
}
ELSEWHERE = {  # path that an op does without -> why
    ("linear", "kernels"): "a GPU has cuBLAS, and kernels/gelu.py",
    ("add_norm", "csrc"): "of blocks on a GPU; those on a CPU are csrc/norm.cpp and linear.cpp",
    ("gelu", "csrc"): "likewise",
    ("attention", "kernels"): "packed_attention",
    ("packed_attention", "csrc"): "attention, which layers/cpu_block.py calls",
    ("packed_attention", "benchmarks"): "benchmarks/bench_attention.py: against the backends of layers/attention/",
    ("product", "csrc"): "a CPU has oneDNN and MKL",
    ("linear", "benchmarks"): "benchmarks/bench_linear.py: products by layer, not inputs of a step",
    ("attention", "benchmarks"): "benchmarks/bench_step.py: part of a block",
    ("adamw", "benchmarks"): "benchmarks/bench_optim.py: parameters of a model, not inputs of a step",
}
NOT_OPS = {  # what else is in the folders; names that begin with _ and headers need no mention
    "csrc": {"register"},
    "tests": {"backend", "compiled_first", "debug_checks", "names", "philox"},
}


def names(folder):
    where, pattern = FOLDERS[folder]
    before, after = pattern.split("{}")
    files = [p.name for p in (ROOT / where).glob(pattern.format("*"))]
    found = {f.removeprefix(before).removesuffix(after) for f in files if not f.startswith("_")}
    return found - NOT_OPS.get(folder, set())


@pytest.mark.parametrize("folder", [f for f in FOLDERS if f != "ops"])
def test_every_file_belongs_to_an_op_and_every_op_has_its_file(folder):
    without = {op for op, where in ELSEWHERE if where == folder}
    assert names(folder) == names("ops") - without
