import json
import os
import sys
import time
import types
from pathlib import Path

import pytest

from vjepa_fast import config, trainer
from vjepa_fast.cli import _study_run
from vjepa_fast.data.synthetic import render_suite
from vjepa_fast.errors import ConfigError, DataError, UserError
from vjepa_fast.models import load_encoder
from vjepa_fast.study.demo import tasks
from vjepa_fast.study.jobs import launch
from vjepa_fast.study.run import cells
from vjepa_fast.study.run.runner import Grid, Study, read_plan, run_study
from vjepa_fast.study.run.suites import Settings, expand_data

SIZES = {
    "motion8": {"train": 32, "val": 16, "test": 16},
    "order": {"train": 24, "val": 24, "test": 24},
    "objects": {"train": 48, "val": 48, "test": 48},
    "dive": {"train": 24},
    "fewshot": {"train": 36, "test": 144},
}
SMALL = (
    "data.crop_size=32",
    "data.patch_size=16",
    "data.batch_size=4",
    "optimization.epochs=1",
    "optimization.ipe=4",
    "optimization.warmup=0.5",
    "model.embed_dim=24",
    "model.num_heads=2",
    "model.pred_embed_dim=24",
    "model.pred_num_heads=2",
    "runtime.log_every=1",
    "runtime.save_every=100",
    "runtime.peak_tflops=1",
)
TINY = Settings(sizes=SIZES, size=32, overrides=SMALL, queries=1, episodes=50)
GRID = Grid(("baseline", "kinematic"), ("single",), (0,), published=("kinematic",))
KEYS = [
    "random_init-none-intended-s0",
    "baseline-single-intended-s0",
    "kinematic-single-intended-s0",
    "kinematic-single-published-s0",
]


def study(folder, settings=TINY, grid=GRID, **more) -> Study:
    return Study(folder, settings, grid, threads=1, **more)


def events_of(made: Study, **more) -> tuple[list, list]:
    events = []
    failed = run_study(
        made,
        launcher="inline",
        on_event=lambda what, job: events.append((what, job if isinstance(job, str) else job["key"])),
        **more,
    )
    return events, failed


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    made = study(tmp_path_factory.mktemp("study") / "s")
    events, failed = events_of(made)
    assert failed == [] and [key for what, key in events if what == "done"] == KEYS
    return made


def test_a_cell_has_all_that_the_report_reads(finished):
    got = {key: cells.read_cell(finished.folder, key) for key in KEYS}
    for key, cell in got.items():
        assert (cell["format"], cell["key"], cell["encoder"]) == (1, key, "target_encoder")
        measured = [(r["suite"], r["probe"]) for r in cell["rows"]]
        probed = [(s, p) for s in ("motion8", "order", "objects") for p in ("linear", "knn")]
        assert measured == [*probed, ("fewshot", "1-shot"), ("fewshot", "5-shot")]
        sizes = {s: SIZES[s]["test"] for s in SIZES if "test" in SIZES[s]}
        assert all(len(r["hits"]) == sizes[r["suite"]] and 0 <= r["accuracy"] <= 1 for r in cell["rows"])
        assert all(r["accuracy"] == pytest.approx(sum(r["hits"]) / r["n"]) for r in cell["rows"][:6])
        own = [g for g in cell["geometry"] if g["encoder"] == "target_encoder"]
        assert {(g["level"], g["subspace"]) for g in own} >= {(3, "all"), ("all", "appearance"), ("all", "dynamics")}
        assert all(g["rankme"] >= 1 and g["clips"] == 16 for g in own)
        assert {"torch", "commit", "device"} <= set(cell["versions"]) and cell["settings"]["seed"] == "0"
    trained = got["baseline-single-intended-s0"]
    assert trained["cost"]["steps"] == 4 and trained["cost"]["step_ms"] > 0 and trained["cost"]["peak_mb"] > 10
    assert trained["curve"]["step"] == [1, 2, 3, 4] and len(trained["curve"]["loss"]) == 4
    assert (got[KEYS[0]]["kind"], got[KEYS[0]]["regime"], got[KEYS[0]]["curve"]["step"]) == ("random", "none", [])


def test_published_runs_without_ema_are_evaluated_at_their_random_start(finished):
    """The published flaw: the target of such a run is the random-init control, hit by hit; what was trained is not."""
    got = {key: cells.read_cell(finished.folder, key) for key in KEYS}
    hits = {key: [r["hits"] for r in cell["rows"]] for key, cell in got.items()}
    assert hits["kinematic-single-published-s0"] == hits[KEYS[0]]
    assert hits["kinematic-single-intended-s0"] != hits[KEYS[0]]
    student = got["kinematic-single-published-s0"]["student_rows"]
    assert [r["hits"] for r in student] != hits[KEYS[0]] and len(student) == 8
    assert {g["encoder"] for g in got["kinematic-single-published-s0"]["geometry"]} == {"target_encoder", "encoder"}
    assert got["kinematic-single-intended-s0"]["student_rows"] == []


def test_published_latent_dynamics_under_hard_weighting_train_nothing(tmp_path):
    """As published the headline without its LD term is the same encoder, bit by bit; as intended it is another."""
    import torch

    names = ("fwm_hw", "fwm_hw_ld")
    made = study(tmp_path, grid=Grid(names, ("single",), (0,), published=names))
    made.prepare(0, 1, lambda *_: None)
    found = {}
    for job in made.jobs[1:]:
        path = tasks.train(job["config"], job["config_hash"], "cpu")["checkpoint"]
        found[job["compat"], job["variant"]] = load_encoder(path, which="encoder").state_dict()
    same = {
        mode: all(torch.equal(w, found[mode, "fwm_hw_ld"][k]) for k, w in found[mode, "fwm_hw"].items())
        for mode in ("intended", "published")
    }
    assert same == {"intended": False, "published": True}


def test_the_same_command_again_changes_nothing(finished):
    before = {p: p.stat().st_mtime_ns for p in finished.folder.rglob("*") if p.suffix in (".json", ".pt", ".mp4")}
    events, failed = events_of(study(finished.folder))
    assert events == [("kept", key) for key in KEYS] and failed == []
    after = {p: p.stat().st_mtime_ns for p in before}
    assert {p.name for p in before if before[p] != after[p]} <= {"study.json"}


def test_a_run_that_was_stopped_goes_on_and_comes_out_the_same(finished):
    key = KEYS[1]
    first = cells.read_cell(finished.folder, key)
    job = next(j for j in finished.jobs if j["key"] == key)
    run = Path(job["config"]["folder"])
    cells.cell_path(finished.folder, key).unlink()
    for path in sorted(run.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    steps = []
    trainer.train(config.from_dict(job["config"]), max_steps=2, device="cpu")
    tasks._marked(run / "demo_key.json", job["config_hash"])
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-00000002.pt"]
    real = trainer.train

    def watched(cfg, on_log=None, **more):
        return real(cfg, on_log=lambda row: (steps.append(row["step"]), on_log(row)), **more)

    trainer.train = watched
    try:
        events, _ = events_of(study(finished.folder))
    finally:
        trainer.train = real
    assert [e for e in events if e[0] == "done"] == [("done", key)] and steps == [3, 4]
    again = cells.read_cell(finished.folder, key)
    assert again["curve"] == first["curve"] and again["rows"] == first["rows"]


def test_seeds_and_variants_may_be_added_but_not_other_settings(finished):
    more = study(finished.folder, grid=Grid(("hw",), ("mixed",), (1,)))
    assert [j["key"] for j in more.missing()] == ["random_init-none-intended-s1", "hw-mixed-intended-s1"]
    more.claim()
    plan = read_plan(finished.folder)
    assert plan["variants"] == ["baseline", "hw", "kinematic"] and plan["seeds"] == [0, 1]
    assert plan["modes"] == {"intended": ["baseline", "kinematic", "hw"], "published": ["kinematic"]}
    assert set(KEYS) < set(plan["keys"]) and plan["sizes"] == SIZES and plan["suite"] == "synthetic"
    other = Settings(sizes=SIZES, size=32, overrides=SMALL, queries=1, episodes=50, scale=2.0)
    with pytest.raises(UserError, match=r"other settings: scale \(1.0 there, 2.0 now\)"):
        study(finished.folder, other).claim()
    assert read_plan(finished.folder) == plan


def test_a_cell_of_another_configuration_is_refused(finished, monkeypatch):
    monkeypatch.setattr(cells, "config_hash", lambda value, processes: "another")
    with pytest.raises(UserError, match="baseline-single-intended-s0.json: was made with another configuration"):
        study(finished.folder).missing()


def test_the_control_does_not_depend_on_the_regime(tmp_path):
    single, mixed = (study(tmp_path, grid=Grid(("baseline",), (r,), (0,))) for r in ("single", "mixed"))
    assert single.jobs[0]["config_hash"] == mixed.jobs[0]["config_hash"]
    assert single.jobs[1]["config_hash"] != mixed.jobs[1]["config_hash"]
    wide = study(tmp_path, grid=Grid(("baseline",), ("single",), (0,)), processes=2)  # two batches per step
    assert wide.jobs[1]["config_hash"] != single.jobs[1]["config_hash"]


# ---------------------------------------------------------------- failures


def test_a_failed_run_is_recorded_and_the_others_go_on(tmp_path, monkeypatch):
    made = study(tmp_path / "s")
    monkeypatch.setattr(made, "prepare", lambda *a: None)
    real_run = cells.run

    def some(job):
        if job["variant"] == "baseline":
            raise ValueError("a loss went wrong")
        cells.write_text(cells.cell_path(job["folder"], job["key"]), json.dumps(good(job)))

    monkeypatch.setattr(cells, "run", some)
    events, failed = events_of(made)
    assert failed == ["baseline-single-intended-s0"]
    assert [e for e in events if e[0] in ("done", "failed")] == [
        ("failed" if "baseline" in key else "done", key) for key in KEYS
    ]
    text = cells.error_path(made.folder, failed[0]).read_text()
    assert text.splitlines()[-1] == "ValueError: a loss went wrong" and "Traceback" in text
    assert real_run is not some and not list((made.folder / "locks").glob("*s0.lock"))


def good(job: dict) -> dict:
    return {"format": 1, "rows": [1], "config_hash": job["config_hash"]}


def test_processes_of_their_own(tmp_path):
    """A real worker process per run: one leaves a cell, one cannot find its data and leaves an error."""
    made = study(tmp_path / "s", grid=Grid(("baseline",), ("single",), (0,)))
    made.claim()
    made.prepare(0, 1, lambda *a: None)
    for path in (made.folder / "suites" / "dive").glob("*.csv"):
        path.unlink()
    events = []
    jobs = made.missing()
    launch.run_processes(jobs, [None, None], 1, lambda what, job: events.append((what, job["kind"])), poll=0.05)
    started, ended = [e for e in events if e[0] == "start"], [e for e in events if e[0] != "start"]
    assert sorted(ended) == [("done", "random"), ("failed", "pretrained")] and len(started) == 2
    error = cells.error_path(made.folder, "baseline-single-intended-s0").read_text()
    assert "train.csv: no such manifest" in error.splitlines()[-1] and made.failed() == ["baseline-single-intended-s0"]
    assert not list((made.folder / "locks").glob("*.lock"))
    assert (made.folder / "logs" / "baseline-single-intended-s0.log").is_file()


def test_a_killed_worker_is_recorded(tmp_path):
    job = {"folder": str(tmp_path), "key": "k"}
    assert launch._outcome(types.SimpleNamespace(exitcode=-9), job) == "failed"
    assert "killed by SIGKILL" in cells.error_path(tmp_path, "k").read_text()


def _elsewhere(path: Path, age: float) -> None:
    path.write_text(json.dumps({"token": "t", "pid": 1, "host": "another machine", "namespace": 0}))
    os.utime(path, (time.time() - age,) * 2)


def test_a_run_in_other_hands_is_left_alone(tmp_path):
    made = study(tmp_path / "s")
    job = made.jobs[0]
    path = made.folder / "locks" / f"{job['key']}.lock"
    path.parent.mkdir(parents=True)
    _elsewhere(path, 0)
    assert launch.locked(job) == "elsewhere" and not cells.error_path(made.folder, job["key"]).exists()


# ---------------------------------------------------------------- launchers


class FakeSubmitit(types.ModuleType):
    """What the runner asks of submitit, run at once."""

    def __init__(self):
        super().__init__("submitit")
        self.said = {}
        outer = self

        class Job:
            def __init__(self, value):
                self.value = value

            def done(self):
                return True

            def result(self):
                if isinstance(self.value, Exception):
                    raise self.value
                return self.value

        class AutoExecutor:
            def __init__(self, folder):
                outer.said["folder"] = folder

            def update_parameters(self, **values):
                if "nonsense" in values:
                    raise NameError("nonsense")
                outer.said.update(values)

            def map_array(self, function, jobs):
                return [Job(RuntimeError("out of time") if j["regime"] == "none" else function(j)) for j in jobs]

        self.AutoExecutor = AutoExecutor


def test_slurm_goes_through_submitit(tmp_path, monkeypatch):
    fake = FakeSubmitit()
    monkeypatch.setitem(sys.modules, "submitit", fake)
    made = study(tmp_path / "s")
    monkeypatch.setattr(
        cells, "run", lambda job: cells.write_text(cells.cell_path(job["folder"], job["key"]), json.dumps(good(job)))
    )
    events = []
    args = (made.jobs, made.folder, {"slurm_partition": "gpu"}, 3)
    launch.run_slurm(*args, lambda what, job: events.append((what, job["key"])), poll=0.01)
    assert [k for what, k in events if what == "done"] == KEYS[1:] and ("failed", KEYS[0]) in events
    assert "out of time" in cells.error_path(made.folder, KEYS[0]).read_text()
    assert fake.said["slurm_partition"] == "gpu" and fake.said["slurm_array_parallelism"] == 3
    with pytest.raises(UserError, match="--slurm: submitit does not take"):
        launch.run_slurm(made.jobs, made.folder, {"nonsense": 1}, None, lambda *a: None)
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match="pip install submitit"):
        launch.run_slurm(made.jobs, made.folder, {}, None, lambda *a: None)


def test_torchrun_trains_a_run_on_several_gpus(tmp_path, monkeypatch):
    made = study(tmp_path / "s", processes=4)
    job, commands = made.jobs[1], []
    assert made.jobs[0]["processes"] == 1 and job["processes"] == 4  # a control is not trained

    class Run:
        def __init__(self, command):
            commands.append(command)
            write()

        def wait(self):
            return 0

    class Failing(Run):
        def wait(self):
            return 1

    def write():
        path = Path(job["config"]["folder"]) / "checkpoints"
        path.mkdir(parents=True, exist_ok=True)
        (path / "step-00000004.pt").write_bytes(b"")

    monkeypatch.setattr(cells.subprocess, "Popen", Run)
    assert cells._train(job).endswith("step-00000004.pt")
    cells._train(job)
    yaml = str(made.folder / "configs" / f"{job['key']}.yaml")
    wanted = "-m torch.distributed.run --standalone --nproc_per_node=4 -m vjepa_fast train " + yaml
    assert [c[1:] for c in commands] == [wanted.split()] * 2  # the second goes on
    assert config.load(yaml) == config.from_dict(job["config"])
    cells._train({**job, "config_hash": "another plan"})
    assert commands[-1][-1] == "--no-resume"
    monkeypatch.setattr(cells.subprocess, "Popen", Failing)
    with pytest.raises(UserError, match="exit code 1"):
        cells._train(job)


def test_slots_share_cores_and_gpus(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert launch.slots("cpu", None, 1, 100) == ([None] * 8, 1)
    assert launch.slots("cpu", 2, 1, 100) == ([None] * 2, 4) and launch.slots("cpu", None, 1, 4) == ([None] * 4, 2)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert launch.slots("cuda", None, 2, 100) == (["5", "7", "5", "7"], 2)
    assert launch.slots("cuda", 3, 2, 100)[0] == ["5", "7", "5"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert launch.slots("cuda", None, 1, 100) == (["0", "1"], 4)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(UserError, match="no CUDA device"):
        launch.slots("cuda", None, 1, 100)


# ---------------------------------------------------------------- the paper's suite


def test_the_papers_suite_on_the_users_manifests(tmp_path):
    """A tiny encoder on rendered stand-ins for the data sets: trained, then evaluated from manifests."""
    base = render_suite("motion8", tmp_path / "data", splits={"train": 16, "test": 16}, size=32, frames=32, fps=8)
    novel = render_suite("fewshot", tmp_path / "few", splits={"train": 36, "test": 144}, size=32, frames=32, fps=8)
    data = {n: str(Path(base["train"]).parent) for n in ("ucf101", "ssv2", "imagenet100", "diving48")}
    data |= {"k400_fewshot.base": novel["train"], "k400_fewshot.novel": novel["test"]}
    overrides = (*(o for o in SMALL if "ipe" not in o), "optimization.ipe=1", "model.depth=4", "model.pred_depth=2",
                 "data.num_workers=0", "runtime.dtype=float32", "model.use_activation_checkpointing=false")  # fmt: skip
    settings = Settings(
        "paper", overrides=overrides, data=data, evaluate=("ssv2", "k400_fewshot"), queries=1, episodes=20
    )
    made = study(tmp_path / "s", settings, Grid(("hw",), ("mixed",), (7,)))
    _, failed = events_of(made)
    assert failed == []
    cell = cells.read_cell(made.folder, "hw-mixed-intended-s7")
    assert [(r["suite"], r["probe"]) for r in cell["rows"]] == [
        ("ssv2", "linear"), ("ssv2", "knn"), ("k400_fewshot", "1-shot"), ("k400_fewshot", "5-shot"),
    ]  # fmt: skip
    assert made.jobs[1]["config"]["data"]["datasets_weights"] == [0.2, 0.6, 0.2]
    assert made.jobs[1]["config"]["objectives"] == config.load("mixed_4gpu_hw").objectives
    single = Study(tmp_path / "s", settings, Grid(("hw",), ("single",), (7,)))
    assert single.jobs[1]["config"]["data"]["datasets"] == [base["train"]]
    assert single.jobs[1]["evaluation"] == made.jobs[1]["evaluation"]  # one view for both regimes


def test_manifests_that_are_missing_are_all_named(tmp_path):
    with pytest.raises(DataError) as caught:
        study(tmp_path, Settings("paper"), Grid(("baseline",), ("mixed",)))
    for name in ("ucf101.train", "ssv2.train", "imagenet100.test", "diving48.test", "k400_fewshot.test"):
        assert name in str(caught.value)
    data = {f"ucf101.{p}": str(tmp_path / f"{p}.csv") for p in ("train", "test")}
    with pytest.raises(DataError, match="no such file: ucf101.train: .*train.csv; ucf101.test"):
        study(tmp_path, Settings("paper", data=data, evaluate=("ucf101",)), Grid(("baseline",), ("single",)))
    with pytest.raises(UserError, match="kinetics.train=...: not known"):
        expand_data({"kinetics.train": "x"})
    with pytest.raises(UserError, match="not a folder that holds any of train.csv"):
        expand_data({"ssv2": str(tmp_path)})
    assert not (tmp_path / "study.json").exists()


# ---------------------------------------------------------------- the command


def command(tmp_path, *more) -> int:
    import argparse

    parser = argparse.ArgumentParser()
    _study_run.add_arguments(parser)
    return _study_run.run(parser.parse_args([str(tmp_path / "s"), "--device", "cpu", *more]))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--variants", "basline"], "basline: no variant"),
        (["--regimes", "double"], "--regimes: 'double'"),
        (["--regimes", ","], "nothing to run"),
        (["--seeds", "4..0"], "--seeds: '4..0'"),
        (["--seeds", "a"], "--seeds: 'a'"),
        (["--compat", "both"], "--compat: 'both'"),
        (["--published", "none"], "none: no variant"),
        (["--scale", "0"], "--scale"),
        (["--jobs", "0"], "--jobs: 0"),
        (["--sizes", "motion8.tests=3"], "--sizes motion8.tests=3"),
        (["--sizes", "motion8.val=0"], "no clips for motion8.val"),
        (["--set", "objectives.hw.coeff=2"], "the study sets objectives.hw.coeff itself"),
        (["--set", "optimization.lrr=2"], "unknown key"),
        (["--evaluate", "motion9"], "--evaluate: 'motion9'"),
        (["--data", "ssv2"], "--data ssv2: expected NAME=VALUE"),
        (["--compat", "published", "--variants", "amg", "--set", "data.batch_size=5"], "amg-single-published-s0: amg"),
    ],
)
def test_wrong_arguments_name_the_argument_and_write_nothing(tmp_path, more, message):
    with pytest.raises((UserError, ConfigError)) as caught:
        command(tmp_path, *more)
    assert message in str(caught.value) and not (tmp_path / "s").exists()


def test_dry_run_lists_and_writes_nothing(tmp_path, capsys):
    assert command(tmp_path, "--dry-run", "--seeds", "0..4", "--published", "baseline,kinematic", "--scale", "2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"{5 * (1 + 2 * 22)} runs, {5 * (1 + 2 * 22)} to do" and len(lines) == 226
    assert any("kinematic-mixed-published-s4" in line and "480 steps" in line for line in lines)
    assert not (tmp_path / "s").exists()


def test_only_published_runs_with_compat_published(tmp_path, capsys):
    command(tmp_path, "--dry-run", "--seeds", "0", "--regimes", "single", "--compat", "published", "--variants", "hw")
    assert [line.split()[2] for line in capsys.readouterr().out.splitlines()[:-1]] == [
        "random_init-none-intended-s0", "hw-single-published-s0",
    ]  # fmt: skip


def test_the_command_goes_on_with_a_finished_study(finished, capsys):
    more = [f"--sizes={s}.{p}={n}" for s, parts in {**Settings().sizes, **SIZES}.items() for p, n in parts.items()]
    with pytest.raises(UserError, match="holds a study with other settings: .*overrides"):
        command(finished.folder.parent, "--variants", "baseline", "--seeds", "0", *more)
