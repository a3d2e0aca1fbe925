"""A whole tiny study: cells that come out, runs that go on, failures that are recorded."""

from pathlib import Path

import pytest

from tests.study.run.tiny import KEYS, NAMES, SIZES, SMALL, events_of, prepared, study
from vjepa_fast import config, trainer
from vjepa_fast.cli import main
from vjepa_fast.errors import UserError
from vjepa_fast.files import write_json
from vjepa_fast.models import load_encoder
from vjepa_fast.study.jobs.processes import Work, run_processes
from vjepa_fast.study.run import cells, runner
from vjepa_fast.study.run.plan import Grid, read_plan
from vjepa_fast.study.run.suites import Settings
from vjepa_fast.study.run.training import leave_key, train


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    made = prepared(study(tmp_path_factory.mktemp("study") / "s"))
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
    prepared(made)
    found = {}
    for job in made.jobs[1:]:
        path = train(job["config"], job["config_hash"], "cpu")["checkpoint"]
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
    leave_key(run, job["config_hash"])
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
    other = Settings(sizes=SIZES, size=32, overrides=SMALL, evaluate=NAMES, queries=1, episodes=50, scale=2.0)
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


def test_a_failed_run_is_recorded_and_the_others_go_on(tmp_path, monkeypatch):
    made = study(tmp_path / "s")
    monkeypatch.setattr(runner, "prepare", lambda *_: None)

    def some(job):
        if job["variant"] == "baseline":
            raise ValueError("a loss went wrong")
        write_json(cells.cell_path(job["folder"], job["key"]), good(job))

    monkeypatch.setattr(cells, "run", some)
    events, failed = events_of(made)
    assert failed == ["baseline-single-intended-s0"]
    assert [e for e in events if e[0] in ("done", "failed")] == [
        ("failed" if "baseline" in key else "done", key) for key in KEYS
    ]
    text = cells.error_path(made.folder, failed[0]).read_text()
    assert text.splitlines()[-1] == "ValueError: a loss went wrong" and "Traceback" in text
    assert not list((made.folder / "locks").glob("*s0.lock"))


def good(job: dict) -> dict:
    return {"format": 1, "rows": [1], "config_hash": job["config_hash"]}


def test_processes_of_their_own(tmp_path):
    """A real worker process per run: one leaves a cell, one cannot find its data and leaves an error."""
    made = study(tmp_path / "s", grid=Grid(("baseline",), ("single",), (0,)))
    prepared(made)
    for path in (made.folder / "suites" / "motion8").glob("*.csv"):
        path.unlink()
    events = []
    jobs = [{**job, "sources": {"motion8": job["sources"]["motion8"]}} for job in made.missing()]
    work = Work(cells.run, cells.done, cells.fail)
    run_processes(work, jobs, [None, None], 1, lambda what, job: events.append((what, job["kind"])), poll=0.05)
    started, ended = [e for e in events if e[0] == "start"], [e for e in events if e[0] != "start"]
    assert sorted(ended) == [("done", "random"), ("failed", "pretrained")] and len(started) == 2
    error = cells.error_path(made.folder, "baseline-single-intended-s0").read_text()
    assert "train.csv: no such manifest" in error.splitlines()[-1] and made.failed() == ["baseline-single-intended-s0"]
    assert not list((made.folder / "locks").glob("*.lock"))
    assert (made.folder / "logs" / "baseline-single-intended-s0.log").is_file()


def test_the_command_refuses_a_study_of_other_settings(finished, capsys):
    more = [f"--sizes={s}.{p}={n}" for s, parts in {**Settings().sizes, **SIZES}.items() for p, n in parts.items()]
    folder = str(finished.folder)
    assert main(["study", "run", folder, "--device", "cpu", "--variants", "baseline", "--seeds", "0", *more]) == 2
    said = capsys.readouterr().err
    assert "holds a study with other settings" in said and "overrides" in said
