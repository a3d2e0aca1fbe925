"""The benchmark command at a tiny size: its rows, what fails in them, and that different losses are not compared."""

import contextlib
import functools
import json
import math

import pytest

from vjepa_fast import config as configs
from vjepa_fast.bench import cases, providers, step
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
    told = capsys.readouterr().out
    assert "x reference" in told and f"{rows[1]['median_ms']:.1f}" in told


def test_peak_memory_is_measured_in_a_process_of_its_own():
    peak = step.peak_memory(config_of(), "reference")
    if peak["peak_bytes"] is not None:  # else the system does not report it
        assert peak["peak_after_imports"] > 1 << 20 and peak["peak_bytes"] > 1 << 20


def test_recipes_batches_and_all_providers(tmp_path, monkeypatch):
    """Losses are compared case by case, published checkpointing is one; what fails does not stop the others."""

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
        "4",
        "--providers",
        "all",
        "--json",
        str(path),
    ]
    assert main(command) == 0
    rows = json.loads(path.read_text())
    assert len(rows) == 2 * len(cases.PROVIDERS)
    for start in range(0, len(rows), len(cases.PROVIDERS)):
        case = {r["provider"]: r for r in rows[start : start + len(cases.PROVIDERS)]}
        assert list(case) == list(cases.PROVIDERS)
        for name, row in case.items():
            assert row["batch"] == 4
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
    assert main([*COMMAND, "--no-memory", "--json", str(path)]) == 0
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

    def measure(cfg, names, warmup, repeats, *, deadline, memory, against):
        asked.append((cfg.data.batch_size, cfg.runtime.dtype, list(names), [r["provider"] for r in against]))
        for name in names:
            yield [step._row(cfg, name)]

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

    assert float(other.steps([other.prepare(i) for i in range(3)], 0, mark)) == want[2]
    assert seen == [0, 1, 2] and want[1] != want[2]
