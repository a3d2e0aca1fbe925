"""The paper's suite from the downloads' official forms to the table: tiny trees, `prepare`, one study, its table."""

import json
from dataclasses import replace

import pytest

from tests.data.trees import Trees
from tests.study.run.tiny import SMALL, study
from vjepa_fast import cli
from vjepa_fast.data.synthetic import render_suite
from vjepa_fast.errors import DataError, UserError
from vjepa_fast.study.run import cells, cost, paper_rows
from vjepa_fast.study.run.paper import PLACES, expand_data, tune_options
from vjepa_fast.study.run.plan import Grid
from vjepa_fast.study.run.suites import Settings

OVERRIDES = (
    *(o for o in SMALL if "ipe" not in o),
    "optimization.ipe=1",
    "data.dataset_fpcs=[4]",
    "data.num_workers=0",
    "model.depth=4",
    "model.pred_depth=2",
    "runtime.dtype=float32",
    "model.use_activation_checkpointing=false",
)
TUNE = {
    "methods": "meta-baseline,sun",
    "trunk": "head",
    **dict.fromkeys(("tune_epochs", "meta_epochs", "meta_steps", "top_k", "background"), "1"),
    **dict.fromkeys(("meta_way", "val_way"), "2"),
    **dict.fromkeys(("meta_queries", "val_queries"), "1"),
}
PARTS = {"train": ("kick", "run"), "val": ("sit", "wave"), "test": ("climb", "fencing")}


def prepare(*words):
    assert cli.main(["prepare", *map(str, words), "--workers", "1"]) == 0


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder as `vjepa-fast prepare` leaves it, of every data set of the paper."""
    root, trees = tmp_path_factory.mktemp("paper"), Trees(tmp_path_factory.mktemp("films"))
    out = root / "prepared"
    for name, more in (("diving48", ()), ("ssv2", ()), ("imagenet100", ("--lists", root / "imagenet100/classes.txt")),
                       ("ucf101", ("--split", "1"))):  # fmt: skip
        getattr(trees, name)(root / name)
        prepare(name, root / name, "--out", out / name, *more)
    for part, classes in PARTS.items():
        lines = [f"{name}/{name}_{i}" for name in classes for i in range(6)]
        for line in lines:
            trees.film(root / "videos" / f"{line}.avi")
        for lists, file in (("cmn", f"{part}.list"), ("hyrsm", f"{part}_few_shot.txt")):
            (root / lists).mkdir(exist_ok=True)
            prefix = "" if lists == "cmn" else part
            text = [f"{prefix}{PARTS[part].index(x.split('/')[0])}//{x}.avi" if prefix else x for x in lines]
            (root / lists / file).write_text("\n".join(text) + "\n")
    for lists in ("cmn", "hyrsm"):
        prepare("fewshot", root / "videos", "--lists", root / lists, "--out", out / f"kinetics100_{lists}")
    render_suite("motion8", out / "motion8", splits={"train": 16, "test": 8}, size=32, frames=8, fps=8)
    return out


def settings(prepared, **more):
    return Settings(
        "paper", overrides=OVERRIDES, data={"prepared": str(prepared)}, tune=TUNE, way=2, episodes=4, **more
    )


def command(folder, data, variants, *more):
    """Arguments of `vjepa-fast study run` for one mixed run of each variant."""
    small = [word for o in OVERRIDES for word in ("--set", o)]
    return ["study", "run", str(folder), "--suite", "paper", "--data", str(data), "--variants", variants,
            "--regimes", "mixed", "--seeds", "0", "--device", "cpu", "--threads", "1", *small, *more]  # fmt: skip


def in_this_process(work, jobs, places, threads, on_event, until=None):
    for job in jobs:
        on_event("start", job)
        on_event(work.locked(job), job)


def test_from_the_downloads_to_the_table_of_the_paper(prepared, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("vjepa_fast.study.run.runner.run_processes", in_this_process)
    tune = [word for item in TUNE.items() for word in ("--tune", "=".join(item))]
    folder = tmp_path / "s"
    assert cli.main(command(folder, prepared, "fwm_ld", "--way", "2", "--episodes", "4", *tune)) == 0
    said = capsys.readouterr().out
    assert said.index("GPU-hours at 100 TFLOP/s, which is assumed") < said.index("random_init-none-intended-s0: ")
    rows = cells.read_cell(folder, "fwm_ld-mixed-intended-s0")["rows"]
    found: dict[str, list] = {}
    for row in rows:
        found.setdefault(row["suite"], []).append(row["probe"])
    probes = ["linear", "knn", "published"]
    few = ["1-shot", "5-shot", *(f"{m} meta {s}-shot" for m in ("meta-baseline", "sun") for s in (1, 5))]
    assert found == {name: probes if place.task else few for name, place in PLACES.items() if name != "k400_fewshot"}
    published = {r["suite"]: r["chosen"] for r in rows if r["probe"] == "published"}
    assert {n: c["epochs"] for n, c in published.items()} == {  # of fwm_ld, as the published rows have them
        "diving48": 50, "ssv2": 50, "imagenet100": 50, "ucf101": 100, "motion8": 100
    }  # fmt: skip
    assert published["diving48"]["tokens"] > 1 == published["ssv2"]["tokens"]
    assert not list(folder.glob("runs/*/published"))  # all tokens are removed with the probe

    cells.cell_path(folder, "fwm_ld-mixed-intended-s0").unlink()  # as if stopped after the last row but these
    redone = folder / "runs/fwm_ld-mixed-intended-s0/rows/target_encoder-kinetics100_hyrsm-sun.json"
    assert json.loads(redone.read_text())["rows"] == rows[-2:]
    redone.write_text("{")
    sun, asked = paper_rows.tuned_rows, []
    monkeypatch.setattr(paper_rows, "published_rows", lambda *_: pytest.fail("was made before"))
    monkeypatch.setattr(paper_rows, "tuned_rows", lambda *all: asked.append(all[3:5]) or sun(*all))
    assert cli.main(command(folder, prepared, "fwm_ld", "--way", "2", "--episodes", "4", *tune)) == 0
    assert asked == [("kinetics100_hyrsm", "sun")]
    assert cells.read_cell(folder, "fwm_ld-mixed-intended-s0")["rows"] == rows
    capsys.readouterr()

    assert cli.main(["study", "report", str(folder)]) == 0
    assert f"written: {folder / 'paper.md'}" in capsys.readouterr().out
    assert "data sets have no such check" in (folder / "report.md").read_text()
    text = (folder / "paper.md").read_text()
    lines = {line.split(" | ")[0]: line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")}
    head, ours = lines["| run"], lines["| fwm_ld, mixed, intended"]
    assert "Kinetics-100, HyRSM: sun 5-shot" in head and len(ours) == len(head)
    frozen = text.split("## Few-shot")[0]
    assert "| 6.40 |" in frozen and "| 7.63 |" in frozen and "| 14.72 |" in frozen  # the published figures of fwm_ld
    assert "arXiv:2204.13423" in text and "| random init |" in text


def test_what_it_will_cost_is_printed_first(prepared, tmp_path, capsys):
    few = ["--queries", "1", "--way", "2", *(w for k in ("meta", "val") for w in ("--tune", f"{k}_way=2"))]
    few += [w for k in ("meta", "val") for w in ("--tune", f"{k}_queries=1")]
    assert cli.main(command(tmp_path / "s", prepared, "hw", "--dry-run", *few)) == 0
    out = capsys.readouterr().out
    table = {line.split("  ")[0]: line.split() for line in out.splitlines()}
    assert table["training"][1] == "1" and table["diving48, published probe"][-5:-3] == ["2", "10"]
    assert "kinetics100_cmn, sun" in table and "GPU-hours at 100 TFLOP/s, which is assumed" in out
    assert out.strip().endswith("2 runs, 2 to do") and not (tmp_path / "s" / "cells").exists()


def test_the_cost_is_counted_from_shapes(prepared, tmp_path):
    made = study(tmp_path / "s", settings(prepared), Grid(("hw",), ("mixed",), (0,)))
    by_name = {line.name: line for line in cost.lines(made.suite, made.jobs)}
    frozen, alone = by_name["ssv2, our probes"], by_name["diving48, our probes"]
    assert frozen.flops / frozen.clips == alone.flops / alone.clips == by_name["training"].flops / (cost.STEP * 4)
    every = by_name["diving48, published probe"]  # 16 frames of 32 px: 8 x 2 x 2 tokens of 24 channels in 2 bytes
    assert every.bytes == 10 * 32 * 24 * 2 and not every.kept
    assert by_name["ssv2, published probe"].bytes == 10 * 24 * 2
    assert by_name["ssv2, our probes"].bytes == 10 * 24 * 4  # the mean; below tdiff 4, time 2, meanstd 2, mean 1
    assert by_name["kinetics100_cmn, frozen"].bytes == 36 * (4 + 2 + 2 + 1) * 24 * 4
    assert cost.Line("x", 1, 3.6e17, runs=2).hours == pytest.approx(2)


def test_what_is_missing_is_listed_with_the_command_that_makes_it(prepared, tmp_path):
    for name in ("ssv2", "ucf101", "kinetics100_cmn"):
        (tmp_path / "half" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "half" / name).symlink_to(prepared / name)
    some = Settings("paper", overrides=OVERRIDES, data={"prepared": str(tmp_path / "half")})
    with pytest.raises(DataError) as caught:
        study(tmp_path / "s", some, Grid(("baseline",), ("mixed",)))
    text = str(caught.value)
    assert "8 manifests are missing" in text and "ucf101" not in text and "ssv2" not in text
    assert (
        f"diving48.train, diving48.test (vjepa-fast prepare diving48 SOURCE --out {tmp_path / 'half'}/diving48)" in text
    )
    assert f"(vjepa-fast synthetic motion8 {tmp_path / 'half'}/motion8 --train 160" in text
    assert (
        "kinetics100_hyrsm.base, kinetics100_hyrsm.novel (vjepa-fast prepare fewshot SOURCE --lists HYRSM_LISTS" in text
        and "--evaluate leaves out" in text
    )
    with pytest.raises(UserError, match="no such folder; vjepa-fast prepare makes one"):
        expand_data({"prepared": str(tmp_path / "nothing")})
    assert expand_data({"prepared": str(prepared), "ssv2.test": "x.csv"})["ssv2.test"].endswith("/x.csv")


def test_a_folder_is_one_of_prepare_or_has_the_parts_by_name(prepared, tmp_path):
    def names(**data):
        found = expand_data({k.replace("_", "."): str(v) for k, v in data.items()})
        return {key: path.rpartition("/")[2] for key, path in found.items()}

    assert names(ssv2=prepared / "ssv2") == {"ssv2.train": "train.csv", "ssv2.test": "val.csv"}
    assert names(ucf101=prepared / "ucf101") == {"ucf101.train": "train1.csv", "ucf101.test": "test1.csv"}
    for part in ("train", "val", "test"):
        (tmp_path / f"{part}.csv").touch()
    own = {f"ssv2.{part}": f"{part}.csv" for part in ("train", "val", "test")}
    assert names(ssv2=tmp_path) == own
    assert names(ssv2_test="mine.csv", ssv2=tmp_path) == {**own, "ssv2.test": "mine.csv"}  # in any order
    (tmp_path / "val.csv").unlink()  # nothing of the folder below the other --data is mixed in
    assert "ssv2.val" not in names(prepared=prepared, ssv2=tmp_path)


def test_few_shot_lists_that_cannot_be_used_are_refused_first(prepared, tmp_path):
    grid = Grid(("baseline",), ("single",))

    def refused(match, **more):
        given = replace(settings(prepared), evaluate=("kinetics100_cmn",), **more)
        with pytest.raises(DataError, match=match) as caught:
            study(tmp_path / "s", given, grid)
        assert "\n" not in str(caught.value)

    lists = prepared / "kinetics100_cmn"
    data = {"prepared": str(prepared)}
    refused("novel.csv: 3-way episodes need 3 classes", way=3)
    refused("kinetics100_cmn: base part .* need 7 samples per class", tune={**TUNE, "meta_queries": "6"})
    refused(
        "novel.csv: 12 files are in the base part as well",
        data={**data, "kinetics100_cmn.base": str(lists / "novel.csv")},
    )
    one = tmp_path / "one.csv"
    one.write_text("".join((lists / "val.csv").read_text().splitlines(keepends=True)[:6]))
    refused("kinetics100_cmn: .*1 validation classes", data={**data, "kinetics100_cmn.val": str(one)})


def test_options_of_tuning():
    assert tune_options({}) == {"methods": ["meta-baseline", "sun"]}
    assert tune_options({"methods": "none"})["methods"] == []
    found = tune_options({"methods": "sun-d", "trunk": "2", "tune_lr": "1e-4", "meta_epochs": "3"})
    assert found == {"methods": ["sun-d"], "trunk": "2", "tune_lr": 1e-4, "meta_epochs": 3}
    assert json.loads(json.dumps(found)) == found
    for wrong, match in (({"methods": "maml"}, "--tune maml: not known"), ({"epochs": "2"}, "--tune epochs: not known"),
                         ({"top_k": "many"}, "expected a number")):  # fmt: skip
        with pytest.raises(UserError, match=match):
            tune_options(wrong)
