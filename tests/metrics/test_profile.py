"""The table of a trace: a CUDA trace made by hand, and whole profiled runs on the CPU."""

import json

import pytest
import torch

from vjepa_fast.cli import main
from vjepa_fast.data.synthetic import render_suite
from vjepa_fast.metrics import profile
from vjepa_fast.trainer.step import TrainStep

from ..trainer.conftest import batch, config


def span(cat, name, ts, dur, tid=1, correlation=None):
    args = {} if correlation is None else {"correlation": correlation}
    return {"ph": "X", "cat": cat, "name": name, "pid": 1, "tid": tid, "ts": ts, "dur": dur, "args": args}


def cuda_trace():
    """Two steps of 1000 us. Kernels run late, on another thread's row; backward is launched by a second thread."""
    events = [{"ph": "M", "name": "process_name", "ts": 0, "pid": 1, "tid": 0}]
    for start in (0, 2000):
        c = start  # correlation ids
        events += [
            span("user_annotation", "step/data", start - 300, 200),
            span("user_annotation", "step/all", start, 1000),
            span("user_annotation", "step/target", start + 10, 200),
            span("cpu_op", "aten::linear", start + 20, 100),
            span("cpu_op", "aten::addmm", start + 30, 80),
            span("cuda_runtime", "cudaLaunchKernel", start + 40, 10, correlation=c + 1),
            span("kernel", "gemm", start + 500, 300, tid=7, correlation=c + 1),
            span("cuda_runtime", "cudaLaunchKernelExC", start + 150, 10, correlation=c + 2),
            span("kernel", "mine", start + 800, 50, tid=7, correlation=c + 2),
            span("user_annotation", "step/backward", start + 300, 400),
            span("cpu_op", "autograd::engine::evaluate_function: MmBackward0", start + 310, 100, tid=2),
            span("cpu_op", "aten::mm", start + 320, 50, tid=2),
            span("cuda_driver", "cuLaunchKernel", start + 330, 5, tid=2, correlation=c + 3),
            span("kernel", "gemm", start + 1200, 200, tid=7, correlation=c + 3),
            span("cuda_runtime", "cudaMemcpyAsync", start + 900, 5, correlation=c + 4),
            span("gpu_memcpy", "Memcpy DtoH", start + 1400, 10, tid=8, correlation=c + 4),
            span("cuda_runtime", "cudaStreamSynchronize", start + 910, 50),
            span("cuda_runtime", "cudaEventSynchronize", start + 970, 2),  # of an event that has passed: no wait
            span("user_annotation", "step/masks", start + 1100, 100),  # for the next step
            span("cuda_runtime", "cudaLaunchKernel", start + 1110, 5, correlation=c + 6),
            span("kernel", "draw", start + 1300, 20, tid=9, correlation=c + 6),
            span("cuda_runtime", "cudaEventSynchronize", start + 1150, 30),
            span("cuda_runtime", "cudaDeviceSynchronize", start + 1500, 50),  # between steps: not the step's
            span("cuda_runtime", "cudaLaunchKernel", start + 1600, 5, correlation=c + 5),
            span("kernel", "log", start + 1700, 5, tid=7, correlation=c + 5),
        ]
    return {"traceEvents": events}


def test_cuda_trace():
    r = profile.analyse(cuda_trace())
    assert (r.steps, r.cuda, r.launches, r.syncs) == (2, True, 4, 2)
    assert r.step_ms == pytest.approx(1.3) and r.device_ms == pytest.approx(0.58)
    phases = {x.name: x for x in r.phases}
    assert set(phases) == {"data", "masks", "target", "backward", "rest"}
    assert (phases["masks"].calls, phases["masks"].syncs, phases["masks"].ms) == (1, 1, pytest.approx(0.1))
    assert phases["target"].device_ms == pytest.approx(0.35) and phases["target"].calls == 2
    assert phases["backward"].device_ms == pytest.approx(0.2) and phases["backward"].calls == 1
    assert phases["rest"].device_ms == pytest.approx(0.01) and phases["rest"].syncs == 1
    assert phases["rest"].ms == pytest.approx(0.4) and phases["data"].ms == pytest.approx(0.2)
    operators = {x.name: x for x in r.operators}
    assert operators["aten::addmm"].device_ms == pytest.approx(0.3)
    assert operators["aten::mm"].device_ms == pytest.approx(0.2)
    assert operators["aten::linear"].ms == pytest.approx(0.02) and operators["aten::linear"].device_ms == 0
    assert operators["(no operator)"].device_ms == pytest.approx(0.08)  # kernels launched by no operator, and the copy
    assert r.step_ms == pytest.approx(sum(x.ms for x in r.phases))
    text = profile.table(r)
    assert "4 kernel launches, 2 host syncs" in text and "aten::addmm" in text
    shares = [line.split("%")[0].split()[-1] for line in text.splitlines() if line.startswith(("target", "backward"))]
    assert shares == ["60.3", "34.5"]


def test_another_range_than_the_step():
    trace = cuda_trace()
    trace["traceEvents"] += [span("user_annotation", "bench/step", 0, 1250)]  # the first alone, and what it does ahead
    r = profile.analyse(trace, within="bench/step")
    assert (r.steps, r.launches, r.syncs) == (1, 4, 2)


def test_a_trace_without_steps_is_refused():
    with pytest.raises(ValueError, match="expected ranges named 'step/all', got none"):
        profile.analyse({"traceEvents": [span("cpu_op", "aten::mm", 0, 1)]})


def test_phases_of_a_step_add_up(tmp_path):
    step = TrainStep(config())
    step(batch(), 0)
    with profile.profiler(torch.device("cpu")) as p:
        for index in (1, 2):
            step(batch(index), index)
    p.export_chrome_trace(str(tmp_path / "trace.json"))
    r = profile.analyse(json.loads((tmp_path / "trace.json").read_text()))
    assert (r.steps, r.cuda, r.syncs, r.device_ms) == (2, False, None, 0)
    names = [x.name for x in r.phases]
    # batches are made by hand: no data wait; AdamW moves the average of the target in its own pass
    assert names == [name for name in profile.PHASES if name not in ("data", "ema", "graph")] + ["rest"]
    assert sum(x.ms for x in r.phases) == pytest.approx(r.step_ms)
    assert sum(x.calls for x in r.phases) == pytest.approx(r.launches) and r.launches > 100
    assert r.phases[-1].ms < 0.5 * r.step_ms and all(x.ms > 0 for x in r.phases)
    assert any(x.name.startswith(("aten::", "mkldnn::", "vjepa_fast")) for x in r.operators)
    assert len(r.operators) == profile.TOP


def test_phase_costs_nothing_without_a_profiler():
    with profile.phase("target") as value:
        assert value is None and not isinstance(profile.phase("target"), torch.profiler.record_function)


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profiled")
    manifest = render_suite("motion8", folder / "motion8", splits={"train": 8}, size=32, frames=8, seed=0)["train"]
    sizes = {
        "model.embed_dim": 48,
        "model.depth": 2,
        "model.levels": 2,
        "model.num_heads": 2,
        "model.pred_embed_dim": 24,
        "model.pred_depth": 2,
        "model.pred_num_heads": 2,
        "data.crop_size": 32,
        "data.patch_size": 8,
        "data.dataset_fpcs": "[4]",
        "data.batch_size": 2,
        "data.num_workers": 0,
        "data.datasets_weights": "null",
        "data.datasets": f"[{manifest}]",
        "runtime.dtype": "float32",
        "runtime.tensorboard": "false",
        "runtime.peak_tflops": 1,
    }
    sets = [x for k, v in sizes.items() for x in ("--set", f"{k}={v}")]
    return ["train", "mixed_4gpu_baseline", "--device", "cpu", *sets]


def test_profiled_run(command, tmp_path, capsys):
    folder = tmp_path / "run"
    assert main([*command, "--folder", str(folder), "--max-steps", "6", "--profile", "2"]) == 0
    text = (folder / "profile" / "table.txt").read_text()
    assert text.startswith("2 steps") and text in capsys.readouterr().out
    firsts = {line.split()[0] for line in text.splitlines() if line}
    assert {"data", "target", "context", "predictor", "backward"} <= firsts
    trace = json.loads((folder / "profile" / "trace.json").read_text())
    assert sum(e.get("name") == "step/all" for e in trace["traceEvents"]) == 2
    assert "runtime.peak_tflops" in json.loads((folder / "versions.json").read_text())["peak"]
    rows = (folder / "metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["step"] == 6  # training went on
    assert 0 < json.loads(rows[-1])["mfu"] < 1


def test_runs_that_end_early(command, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    assert main([*command, "--folder", str(first), "--max-steps", "3", "--profile"]) == 0
    assert (first / "profile" / "table.txt").read_text().startswith("1 steps")  # two of them are not profiled
    assert main([*command, "--folder", str(second), "--max-steps", "2", "--profile"]) == 0
    assert "nothing to show, the run made 2 steps" in capsys.readouterr().out and not (second / "profile").exists()
    assert main([*command, "--folder", str(second), "--profile", "-1"]) == 2
    assert "argument --profile: -1 is less than 0" in capsys.readouterr().err
