"""A study that goes from machine to machine: what comes back, merged, is what one machine would have made."""

import dataclasses
import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest

from tests.study.run.tiny import KEYS, TINY, events_of, prepared, study
from vjepa_fast import config, trainer
from vjepa_fast.cli import main
from vjepa_fast.errors import UserError
from vjepa_fast.study.run import cells
from vjepa_fast.study.run.pack import pack, unpack
from vjepa_fast.study.run.plan import Grid, read_plan
from vjepa_fast.study.run.training import leave_key


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A study with its data, one cell, and a run that was stopped after 2 of 4 steps."""
    made = study(tmp_path_factory.mktemp("here") / "s")
    prepared(made)
    cells.run(made.jobs[0])
    job = made.jobs[1]
    trainer.train(config.from_dict(job["config"]), max_steps=2, device="cpu")
    leave_key(job["config"]["folder"], job["config_hash"])
    return made


def test_a_study_goes_on_elsewhere_and_comes_back(stopped, tmp_path):
    sent = pack(stopped.folder, tmp_path / "sent.tar.gz", data=True)
    assert (sent.cells, sent.stopped, sent.left_out) == (1, [KEYS[1]], [])
    assert unpack([sent.path], tmp_path / "there") == {"cells": 1, "stopped": 1}
    there = study(tmp_path / "there")
    steps = []
    real = trainer.train

    def watched(cfg, on_log=None, **more):
        return real(cfg, on_log=lambda row: (steps.append(row["step"]), on_log(row)), **more)

    trainer.train = watched
    try:
        events, failed = events_of(there)
    finally:
        trainer.train = real
    started = [key for what, key in events if what == "start"]
    assert failed == [] and started == KEYS[1:] and steps[:2] == [3, 4]  # not from the start
    back = pack(there.folder, tmp_path / "back.tar.gz", most=1.0)
    assert back.cells == len(KEYS) and back.megabytes < 1.0
    home = shutil.copytree(stopped.folder, tmp_path / "home")
    assert unpack([back.path], home) == {"cells": len(KEYS) - 1, "stopped": 0}
    assert study(home).missing() == []
    again = {path: path.read_bytes() for path in (home / "cells").iterdir()}
    assert unpack([back.path, back.path], home) == {"cells": 0, "stopped": 0}
    assert again == {path: path.read_bytes() for path in (home / "cells").iterdir()}


def test_a_stopped_run_travels_with_its_rows_and_the_one_with_more_of_them_is_taken(stopped, tmp_path):
    home, there = (shutil.copytree(stopped.folder, tmp_path / name) for name in ("home", "there"))
    row = Path("runs") / KEYS[1] / "rows" / "target_encoder-dive-ours.json"
    (there / row).parent.mkdir()
    (there / row).write_text('{"identity": [], "rows": []}')
    back = pack(there, tmp_path / "back.tar.gz")
    assert unpack([back.path], home)["stopped"] == 1 and (home / row).is_file()  # as many steps, one row more
    assert unpack([pack(stopped.folder, tmp_path / "old.tar.gz").path], home)["stopped"] == 0 and (home / row).is_file()


def test_what_does_not_fit_is_named_and_what_must_is_refused(stopped, tmp_path, capsys):
    whole = pack(stopped.folder, tmp_path / "a.tar.gz")
    less = pack(stopped.folder, tmp_path / "b.tar.gz", most=whole.megabytes / 2)
    assert less.stopped == [] and less.left_out == [KEYS[1]] and less.megabytes <= whole.megabytes / 2
    assert main(["study", "pack", str(stopped.folder), str(tmp_path / "c.tar.gz"), "--mb", "0.001"]) == 2
    assert "over the 0.001" in capsys.readouterr().err and not (tmp_path / "c.tar.gz").exists()
    assert main(["study", "pack", str(tmp_path), str(tmp_path / "c.tar.gz")]) == 2
    assert "no such study" in capsys.readouterr().err
    assert main(["study", "unpack", whole.path, str(tmp_path / "new")]) == 0
    assert "1 new cells, 1 stopped runs" in capsys.readouterr().out


def test_seeds_of_two_machines_are_one_study(tmp_path):
    archives = []
    for seed in (0, 1):
        made = study(tmp_path / f"m{seed}", grid=Grid(("baseline",), ("single",), (seed,)))
        made.claim()
        cell = {"format": 1, "rows": [{"seed": seed}], "config_hash": f"{seed}"}
        (made.folder / "cells").mkdir()
        made.claim(["order"] if seed else ["dive"])
        cells.cell_path(made.folder, made.jobs[0]["key"]).write_text(json.dumps(cell))
        archives.append(pack(made.folder, tmp_path / f"{seed}.tar.gz").path)
    assert unpack(archives, tmp_path / "all") == {"cells": 2, "stopped": 0}
    plan = read_plan(tmp_path / "all")
    assert plan["instrument"] == {"forced": ["dive", "order"]}
    assert plan["seeds"] == [0, 1] and len(plan["keys"]) == 4 and plan["modes"]["intended"] == ["baseline"]


def test_archives_of_others_are_refused(stopped, tmp_path):
    mine = pack(stopped.folder, tmp_path / "mine.tar.gz").path
    other = study(tmp_path / "other", settings_with(scale=2.0))
    other.claim()
    with pytest.raises(UserError, match="another scale than .*other; choose another folder"):
        unpack([mine], other.folder)
    changed = shutil.copytree(stopped.folder, tmp_path / "changed")
    path = cells.cell_path(changed, KEYS[0])
    path.write_text(json.dumps({**json.loads(path.read_text()), "config_hash": "x"}))
    with pytest.raises(UserError, match="made with another configuration than the one in .*changed"):
        unpack([mine], changed)
    (tmp_path / "cut.tar.gz").write_bytes((tmp_path / "mine.tar.gz").read_bytes()[:500])
    (tmp_path / "text.tar.gz").write_text("no archive")
    for name in ("cut", "text", "none"):
        with pytest.raises(UserError, match=f"{name}.tar.gz: is no archive of vjepa-fast study pack"):
            unpack([tmp_path / f"{name}.tar.gz"], tmp_path / "new")
    with tarfile.open(tmp_path / "out.tar.gz", "w:gz") as tar:
        member = tarfile.TarInfo("../../outside.txt")
        member.size = 1
        tar.addfile(member, io.BytesIO(b"x"))
    with pytest.raises(UserError, match="out.tar.gz"):
        unpack([tmp_path / "out.tar.gz"], tmp_path / "deep" / "er" / "new")
    assert not list(tmp_path.rglob("outside.txt")) and not (tmp_path / "new").exists()


def settings_with(**more):
    return dataclasses.replace(TINY, **more)
