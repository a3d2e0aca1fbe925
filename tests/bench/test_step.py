"""The benchmark command at a tiny size: its rows, what fails in them, and that different losses are not compared."""

import contextlib
import functools
import json
import math
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

from tests.bench.sleeper import sleeps
from vjepa_fast import config as configs
from vjepa_fast.bench import batches, cases, process, providers, step, trace
from vjepa_fast.cli import main

TINY = [
    x
    for value in (
        "model.embed_dim=48",
        "model.depth=4",
        "model.num_heads=2",
        "model.pred_embed_dim=24",
        "model.pred_depth=2",
        "model.pred_num_heads=2",
        "data.crop_size=48",
        "data.dataset_fpcs=[4]",
        "data.batch_size=2",
        "objectives.ld.hidden_dim=8",
    )
    for x in ("--set", value)
]
COMMAND = ["bench", "step", "--threads", "1", "--warmup", "1", "--repeats", "2", *TINY]


def config_of():
    return cases.config_of(overrides=TINY[1::2], threads=1)


def test_rows_and_table(tmp_path, capsys):
    path = tmp_path / "rows.json"
    assert main([*COMMAND, "--no-memory", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())
    assert [r["provider"] for r in rows] == ["vjepa_fast", "reference"]
    assert {"op", "shape", "dtype", "provider", "mode", "median_ms", "peak_bytes", "device", "commit"} <= set(rows[0])
    assert rows[0]["first_loss"] == pytest.approx(rows[1]["first_loss"], rel=1e-5)
    assert all(0 < r["min_ms"] <= r["median_ms"] <= r["max_ms"] for r in rows)
    assert all(r["error"] is None and not r["mismatch"] for r in rows)
    for r in rows:
        assert (r["recipe"], r["batch"], r["repeats"]) == ("mixed_4gpu_fwm_hw_ld", 2, 2)
        assert r["steps_per_s"] == pytest.approx(1e3 / r["median_ms"], rel=1e-3)
        assert r["clips_per_s"] == pytest.approx(2e3 / r["median_ms"], rel=1e-3)
        assert 0 < r["mfu"] < 1 and "measured" in r["peak_flops"]
        assert r["launches_per_step"] > 100 and r["syncs_per_step"] is None  # on a CPU: calls of operators
    assert rows[0]["gflop_per_clip"] == rows[1]["gflop_per_clip"]  # the model's work, not what a provider wastes
    assert rows[0]["launches_per_step"] < rows[1]["launches_per_step"]
    on_a_gpu = ("host_ms", "device_ms", "device_busy", "plan_builds_per_step", "plan_ms")
    assert all(r[key] is None for r in rows for key in on_a_gpu) and {r["shapes"] for r in rows} == {"new"}
    told = capsys.readouterr().out
    assert "x reference" in told and f"{rows[1]['median_ms']:.1f}" in told


def test_peak_memory_is_measured_in_a_process_of_its_own():
    peak = step.peak_memory(config_of(), "reference")
    if peak["peak_bytes"] is not None:  # else the system does not report it
        assert peak["peak_after_imports"] > 1 << 20 and peak["peak_bytes"] > 1 << 20


def test_recipes_batches_and_all_providers(tmp_path, monkeypatch):
    """Losses are compared case by case, published checkpointing is one; what fails does not stop the others."""

    monkeypatch.setattr(step, "isolated", lambda work, args, limit_s: work(*args))  # where there is no compiler either

    class NoCompiler(step.Provider):
        def __init__(self, name, cfg):
            super().__init__(name, cfg)
            if name.endswith("compiled"):
                raise RuntimeError("no compiler here\nat all")

    monkeypatch.setattr(step, "Provider", NoCompiler)
    path = tmp_path / "rows.json"
    command = [
        "bench",
        "step",
        "--threads",
        "1",
        "--warmup",
        "1",
        "--repeats",
        "1",
        *TINY[:-2],
        "--no-memory",
        "--recipes",
        "kinematic,hamiltonian",
        "--batches",
        "1",
        "--providers",
        "all",
        "--json",
        str(path),
    ]
    assert main(command) == 1  # some failed, and nothing of the rest is missing
    rows = json.loads(path.read_text())
    assert len(rows) == 2 * len(cases.PROVIDERS)
    for start in range(0, len(rows), len(cases.PROVIDERS)):
        case = {r["provider"]: r for r in rows[start : start + len(cases.PROVIDERS)]}
        assert set(case) == set(cases.PROVIDERS)
        for name, row in case.items():
            assert row["batch"] == 1
            if name.endswith("compiled"):
                assert row["error"] == "RuntimeError: no compiler here" and row["median_ms"] is None
            else:
                assert row["error"] is None and math.isfinite(row["first_loss"]) and row["clips_per_s"] > 0
        assert case["reference_checkpointed"]["launches_per_step"] > case["reference"]["launches_per_step"]
    assert {r["recipe"] for r in rows} == {"ucf101_4gpu_kinematic", "ucf101_4gpu_hamiltonian"}


def test_short_names_are_those_of_published_recipes():
    known = configs.list_recipes()
    assert all(cases.full_name(name) in known and name not in known for name in cases.ONE_PER_KIND)
    assert cases.full_name("mixed_4gpu_ld") == cases.full_name("ld") == "mixed_4gpu_ld"
    assert cases.full_name("some/file.yaml") == "some/file.yaml"


def test_failure_while_running_and_budget(monkeypatch, tmp_path, capsys):
    honest, path = step.Provider.step, tmp_path / "rows.json"

    def failing(self, prepared, index):
        if self.theirs is not None and index == 1:
            raise MemoryError("out of memory")
        return honest(self, prepared, index)

    monkeypatch.setattr(step.Provider, "step", failing)
    assert main([*COMMAND, "--no-memory", "--json", str(path)]) == 1
    ours, theirs = json.loads(path.read_text())
    assert ours["error"] is None and ours["median_ms"] > 0
    assert theirs["error"] == "MemoryError: out of memory" and theirs["median_ms"] is None
    assert "reference: MemoryError: out of memory" in capsys.readouterr().out
    assert main([*COMMAND, "--no-memory", "--json", str(path), "--budget", "0"]) == 2  # nothing at all was measured
    assert all("--budget" in r["error"] for r in json.loads(path.read_text()))
    assert "the time of --budget was over" in capsys.readouterr().err


def test_different_losses_are_refused(monkeypatch, capsys):
    honest = providers.reference_of

    def other(cfg, ours, **more):
        made = honest(cfg, ours, **more)
        made.encoder.norms_block[0].weight.data.mul_(1.1)
        return made

    monkeypatch.setattr(providers, "reference_of", other)
    assert main([*COMMAND, "--no-memory"]) == 2
    assert "not comparable" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--providers", "ours"], "accepted: all, vjepa_fast, vjepa_fast_compiled, reference"),
        (["--repeats", "0"], "--repeats"),
        (["--json", "/dev/null/x.json"], "cannot be written"),
        (["--batches", "8,x"], "expected positive numbers"),
        (["--cases", "vit_x"], "accepted: all, vit_g_256, vit_h_224"),
        (["--cases", "vit_h_224"], "--cases: of the size of vit_h_224 on a GPU only"),
        (["--recipes", "nonsense"], "nonsense"),
    ],
)
def test_wrong_arguments(extra, words, capsys):
    assert main([*COMMAND, *extra]) == 2
    assert words in capsys.readouterr().err


def test_untruncated_masks_are_ours_alone(tmp_path):
    path = tmp_path / "rows.json"
    main([*COMMAND, "--set", "masks.truncate=none", "--no-memory", "--json", str(path)])
    ours, reference = json.loads(path.read_text())
    assert ours["error"] is None and ours["median_ms"] > 0 and ours["gflop_per_clip"] > 0
    assert reference["provider"] == "reference" and "masks.truncate: the reference takes masks" in reference["error"]


def test_on_a_gpu_what_compiles_comes_last(monkeypatch, tmp_path):
    """So that compilation cannot eat the budget of the rest; rows stay together by case, and are held to one loss."""
    asked, path = [], tmp_path / "rows.json"

    def measure(cfg, names, warmup, repeats, *, against, **_):
        asked.append((cfg.data.batch_size, cfg.runtime.dtype, list(names), [r["provider"] for r in against]))
        for name in names:
            yield [step._row(cfg, name, "new")]

    monkeypatch.setattr(step, "measure", measure)
    assert (
        main(
            [
                *COMMAND,
                "--device",
                "cuda",
                "--batches",
                "2,4",
                "--json",
                str(path),
                "--providers",
                "vjepa_fast,reference_compiled,reference",
            ]
        )
        == 0
    )
    plain = ["vjepa_fast", "reference"]
    assert asked == [
        (2, "bfloat16", plain, []),
        (4, "bfloat16", plain, []),
        (2, "bfloat16", ["reference_compiled"], plain),
        (4, "bfloat16", ["reference_compiled"], plain),
    ]
    order = [(r["batch"], r["provider"]) for r in json.loads(path.read_text())]
    assert order == [(batch, name) for batch in (2, 4) for name in (*plain, "reference_compiled")]


def test_steps_are_those_of_the_trainer(monkeypatch):
    """With the next batch made ready meanwhile, as on a GPU, losses are those of single steps."""
    from vjepa_fast.trainer import prefetch

    cfg, seen = config_of(), []
    one, other = providers.Provider("vjepa_fast", cfg), providers.Provider("vjepa_fast", cfg)
    want = [float(one.step(one.prepare(i), i)) for i in range(3)]
    monkeypatch.setattr(prefetch, "Prefetcher", functools.partial(prefetch.Prefetcher, ahead=True))

    def mark(i):
        seen.append(i)
        return contextlib.nullcontext()

    assert float(other.steps([other.prepare(i) for i in range(3)], range(3), mark)) == want[2]
    assert seen == [0, 1, 2] and want[1] != want[2]


def test_new_shapes_come_at_no_step_before_and_repeated_ones_again():
    p = providers.Provider("vjepa_fast", config_of())
    new = batches.Batches(p, "new", 2).take(3)
    assert len({ready.work.shapes for ready in new}) == 3 and not any(ready.known for ready in new)
    again = batches.Batches(p, "repeated", 2).take(5)
    assert [ready.index for ready in again] == [new[0].index, new[1].index] * 2 + [new[0].index]
    assert [ready.known for ready in again] == [False, False, True, True, True]
    reference = batches.Batches(providers.Provider("reference", config_of()), "new", 2)
    assert [ready.index for ready in reference.take(3)] == [ready.index for ready in new]


class Capturing:
    """A provider whose steps are replays but for those of ``new`` indices, counted from 0."""

    def __init__(self, new):
        self.new, self.replays, self.made = new, 0, 0

    def steps(self, prepared, indices):
        self.replays += self.made not in self.new
        self.made += 1


@pytest.mark.parametrize(
    ("new", "deadline", "expected"),
    [
        ((), math.inf, 3 + step.SETTLED),
        ((0, 1, 5), math.inf, 3 + 6 + step.SETTLED),
        (range(0, 1000, 10), math.inf, None),
        ((), 0.0, None),
    ],
)
def test_captured_steps_are_timed_when_they_are_replays(new, deadline, expected):
    ready = batches.Ready(0, None, None, False)
    feed = types.SimpleNamespace(take=lambda n: [ready] * n)
    assert step.settle(Capturing(new), feed, 3, deadline) == expected


def test_steps_that_are_not_captured_need_not_settle():
    p = providers.Provider("vjepa_fast", config_of())
    assert p.replays is None and step.settle(p, None, 2, math.inf) is None


def test_a_step_of_known_shapes_is_passed_over():
    p = providers.Provider("vjepa_fast", config_of())
    honest = p.work
    shapes = iter("AABAAC" + "A" * 30)
    p.work = lambda prepared: honest(prepared)._replace(shapes=next(shapes))
    assert [(r.index, r.known) for r in batches.Batches(p, "new", 1).take(4)] == [
        (0, False),
        (2, False),
        (5, False),
        (5 + 1 + batches.TRIES, True),  # there seem to be no others
    ]


def test_repeated_shapes_are_said_in_the_row(tmp_path, capsys):
    path = tmp_path / "rows.json"
    only = ["--providers", "vjepa_fast", "--no-memory", "--json", str(path)]
    assert main([*COMMAND, *only, "--shapes", "repeated"]) == 0
    (row,) = json.loads(path.read_text())
    assert (row["shapes"], row["known_shapes"], row["repeats"]) == ("repeated", 2, 2)
    assert "shapes repeated" in capsys.readouterr().out


def alive(pid):
    for _ in range(50):  # it is gone once its new parent has waited for it
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return False
        except OSError:
            return False
        time.sleep(0.1)
    return True


@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc")
def test_work_in_a_process_of_its_own(tmp_path):
    assert process.isolated(divmod, (7, 2)) == (3, 1)
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        process.isolated(divmod, (7, 0))
    with pytest.raises(RuntimeError, match="exit code 3"):
        process.isolated(os._exit, (3,))
    path = tmp_path / "pid"
    for limit in (2, 6, 20, 60):  # of which it takes some to import, on a busy machine most
        with pytest.raises(process.TimeLimitError, match=f"not done after {limit} s"):
            process.isolated(sleeps, (path,), limit)
        if path.exists():
            break
    assert not alive(int(path.read_text()))


@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc")
def test_work_ends_with_a_process_that_is_killed(tmp_path):
    """Else a compiled reference would keep the GPU after the time limit of `make gpu-check`."""
    path = tmp_path / "pid"
    code = (
        "from pathlib import Path; from vjepa_fast.bench import process; from tests.bench.sleeper import sleeps; "
        f"process.isolated(sleeps, (Path({str(path)!r}),))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    while not (path.exists() and path.read_text()) and parent.poll() is None:
        time.sleep(0.1)
    parent.kill()
    assert parent.wait() == -signal.SIGKILL and not alive(int(path.read_text()))


def test_the_compiled_reference_is_ended_and_the_rest_measured(monkeypatch, tmp_path):
    """Its process has no time at all here; in one with enough it makes the same step."""
    path = tmp_path / "rows.json"
    names = ["--providers", "reference_compiled,vjepa_fast", "--no-memory", "--json", str(path)]
    assert main([*COMMAND, *names, "--limit-s", "0.01"]) == 1
    ours, theirs = json.loads(path.read_text())
    assert (ours["provider"], ours["error"]) == ("vjepa_fast", None) and ours["median_ms"] > 0
    assert theirs["provider"] == "reference_compiled" and theirs["median_ms"] is None
    assert theirs["error"].startswith("time limit: not done after 0.01 s, --limit-s")
    monkeypatch.setattr(step, "LIMITED", ("reference",))
    measured = step.measure(config_of(), ["reference", "vjepa_fast"], 1, 1, memory=False)
    rows = [row for found in measured for row in found]
    assert [r["provider"] for r in rows] == ["vjepa_fast", "reference"] and not any(r["error"] for r in rows)
    assert rows[1]["first_loss"] == pytest.approx(rows[0]["first_loss"], rel=1e-5)


def event(cat, name, ts, dur, correlation=None, tid=1):
    args = {} if correlation is None else {"correlation": correlation}
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "pid": 1, "tid": tid, "args": args}


def test_what_a_profile_says_of_the_device_and_of_plans():
    """Two steps of 10 ms; times in a trace are microseconds."""
    events = [
        event("user_annotation", "bench/step", 0, 10_000),
        event("user_annotation", "bench/step", 10_000, 10_000),
        event("cpu_op", "aten::_scaled_dot_product_cudnn_attention", 1_000, 5_700),  # builds a plan, counted once
        event("cpu_op", "aten::_cudnn_attention_forward", 1_100, 5_600),
        event("cuda_runtime", "cudaLaunchKernel", 6_500, 100, 1),
        event("cpu_op", "aten::_cudnn_attention_forward", 8_000, 90),  # has its plan
        event("cuda_runtime", "cudaLaunchKernel", 8_010, 50, 2),
        event("cpu_op", "aten::_cudnn_attention_backward", 11_000, 4_000, tid=2),  # waits for room in the queue
        event("cuda_runtime", "cudaLaunchKernel", 11_100, 3_900, 3, tid=2),
        event("cpu_op", "aten::_cudnn_attention_backward", 30_000, 9_000, tid=2),  # after the steps
        event("kernel", "sdpa", 7_000, 2_000, 1, tid=7),
        event("kernel", "sdpa", 8_000, 3_000, 2, tid=8),  # a second of these on another stream
        event("kernel", "sdpa", 16_000, 1_000, 3, tid=7),
        event("kernel", "other", 40_000, 5_000, 9, tid=7),  # launched elsewhere
    ]
    found = trace.device({"traceEvents": events}, "bench/step")
    assert (found.busy_ms, found.plan_builds) == (2.5, 0.5)
    assert found.plan_ms == pytest.approx((5.7 - 0.1) / 2)
    on_cpu = [e for e in events if e["cat"] in ("user_annotation", "cpu_op")]
    assert trace.device({"traceEvents": on_cpu}, "bench/step") == trace.Device()


def test_device_busy_is_of_the_time_without_the_profiler(monkeypatch):
    fields = ("launches_per_step", "syncs_per_step", "plan_builds_per_step", "plan_ms")
    monkeypatch.setattr(step, "counts", lambda p, b: {**dict.fromkeys(fields, 1.0), "device_ms": 0.001})
    (row,) = (row for found in step.measure(config_of(), ["vjepa_fast"], 1, 1, memory=False) for row in found)
    assert row["device_busy"] == round(0.001 / row["median_ms"], 4)


@pytest.mark.parametrize("name", cases.PUBLIC)
def test_public_cases_build(name):
    """On the meta device: their sizes need a GPU. The figures of others stand in rows of their own."""
    from vjepa_fast.models.vit import SIZES
    from vjepa_fast.trainer.building import build_models

    case = cases.public_case(name, device="cuda")
    cfg, size = case.cfg, SIZES[case.cfg.model.model_name]
    with torch.device("meta"):
        encoder, predictor, _ = build_models(cfg)
    assert len(encoder.blocks) == size.depth and len(predictor.predictor_blocks) == cfg.model.pred_depth
    assert sum(p.numel() for p in encoder.parameters()) > 6e8
    assert (cfg.runtime.dtype, cfg.data.batch_size, cfg.model.use_activation_checkpointing) == ("bfloat16", 24, False)
    rows = step._reported(case)
    assert [(r["provider"], r["device"]) for r in rows] == [("public", f.device) for f in cases.PUBLIC[name].figures]
    for r in rows:
        assert r["clips_per_s"] == pytest.approx(24e3 / r["median_ms"], rel=1e-3) and "not measured here" in r["source"]


def test_public_rows_stand_beside_measured_ones(monkeypatch, tmp_path, capsys):
    def measure(cfg, names, warmup, repeats, **_):
        yield [{**step._row(cfg, name, "new"), "median_ms": 500.0, "min_ms": 1.0, "max_ms": 2.0} for name in names]

    monkeypatch.setattr(step, "measure", measure)
    path = tmp_path / "rows.json"
    words = ["--cases", "vit_h_224", "--providers", "vjepa_fast", "--json", str(path)]
    assert main(["bench", "step", "--device", "cuda", *words]) == 0
    rows = json.loads(path.read_text())
    assert [r["provider"] for r in rows] == ["public", "public", "vjepa_fast"]
    assert {r["case"] for r in rows} == {"vit_h_224"}
    told = capsys.readouterr().out
    assert "public, NVIDIA H200" in told and "ViT-H/16, 224 px" in told


def test_another_method_than_vjepa_is_refused(capsys):
    assert main(["bench", "step", "--recipe", "levjepa_small", "--providers", "vjepa_fast"]) == 2
    assert "method: levjepa has no reference to be timed against; vjepa-fast train --profile" in capsys.readouterr().err
