"""Collapse figures of the training log: per level, per half, without a wait of their own."""

import inspect
import json
import math
from pathlib import Path

import pytest
import torch

from vjepa_fast import ops
from vjepa_fast.metrics import collapse as module
from vjepa_fast.metrics import geometry
from vjepa_fast.metrics.collapse import PART_ROWS, STD_LIMIT, CollapseWatch, _some, collapse
from vjepa_fast.trainer.progress import Progress, summary

from ..trainer.test_metrics import metrics, output, rows
from ..trainer.test_no_sync import HostTensors, HostWaits

LEVELS, WIDTH = 4, 12


def tokens(n=40, seed=0, b=3):
    return torch.randn(b, n, LEVELS * WIDTH, generator=torch.Generator().manual_seed(seed))


def test_levels_and_halves_are_figures_of_their_channels():
    h, z = tokens(), tokens(20, seed=1)
    found = collapse(h, z, LEVELS)
    windows = {f"level{i}": slice(WIDTH * i, WIDTH * (i + 1)) for i in range(LEVELS)}
    windows |= {"appearance": slice(0, 2 * WIDTH), "dynamics": slice(2 * WIDTH, 4 * WIDTH)}
    for name, window in windows.items():
        for key, x in (("rankme", h), ("alpha_req", h), ("mean_cosine", h), ("feature_std", z)):
            expected = getattr(geometry, key)(x[..., window]).item()
            assert found[f"{key}/{name}"].item() == pytest.approx(expected, rel=1e-3, abs=1e-6), (key, name)
    assert found["rankme/level3"] == pytest.approx(found["rankme"]) and len(found) == 3 + 4 * 6
    assert all(v.shape == () and v.dtype == torch.float32 for v in found.values())
    raw = collapse(h * 3 + 1, z, LEVELS, normalized=False)
    normal = collapse(ops.target_norm(h * 3 + 1, LEVELS), z, LEVELS)
    assert {k: v.item() for k, v in raw.items()} == pytest.approx({k: v.item() for k, v in normal.items()}, rel=1e-4)


def test_one_collapsed_level_shows_only_there():
    h, z = tokens(), tokens(20, seed=1)
    whole = collapse(h, z, LEVELS)
    for x in (h, z):
        x[..., WIDTH : 2 * WIDTH] = 0.5
    found = collapse(h, z, LEVELS)
    assert found["rankme/level1"] < 1.001 and found["mean_cosine/level1"] > 0.999 and found["feature_std/level1"] == 0
    assert found["alpha_req/level1"].isnan()
    same = [k for k in whole if not k.endswith(("/level1", "/appearance")) and k != "target_var"]
    assert len(same) == 18 and all(found[k] == pytest.approx(whole[k].item()) for k in same)
    assert found["rankme/appearance"] < whole["rankme/appearance"] - 5


def test_rows_fall_on_all_columns_of_a_grid():
    b, t, h, w = 8, 8, 14, 14
    place = torch.arange(h * w).repeat(b * t).reshape(b, t * h * w, 1)
    some = _some(place)
    assert 0.8 * PART_ROWS < len(some) <= PART_ROWS
    assert len(some.unique()) > 150  # a stride of 49 would see 4 of the 196
    assert _some(place[:1, :200]).shape == (200, 1)


def test_nothing_is_read_back():
    h, z = (x.to("meta") for x in (tokens(), tokens(20)))
    with HostTensors():
        assert all(v.is_meta for v in collapse(h, z, LEVELS, normalized=False).values())
    with ops.use_backend("eager"), HostWaits():
        collapse(tokens(), tokens(20), LEVELS, normalized=False)


def test_not_finite_features_leave_the_error_to_the_loss():
    """A decomposition would raise before the check of the loss could name the step and its samples."""
    h = tokens()
    h[1, 2, 3] = math.nan
    found = collapse(h, tokens(20), LEVELS)
    assert found["rankme/level0"].isnan() and found["feature_std/level0"].isfinite()


def test_missing_figures_are_null_in_the_row_and_parts_are_not_in_the_line(tmp_path):
    m = metrics(tmp_path)
    out = output(
        1.0,
        monitors={
            "rankme": torch.tensor(7.0),
            "rankme/level0": torch.tensor(6.0),
            "alpha_req/level0": torch.tensor(math.nan),
        },
    )
    m.record(1, out)
    state = m.state_dict()
    row = m.flush(out)
    assert row["monitors"] == {"rankme": 7.0, "rankme/level0": 6.0, "alpha_req/level0": None}
    assert rows(tmp_path) == [row]
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text() and json.loads(json.dumps(row, allow_nan=False))
    assert "rankme 7.00" in summary(row) and "level0" not in summary(row)
    again = metrics(tmp_path / "..")
    again.load_state_dict(state, torch.device("cpu"))
    assert again.pending.monitors["rankme/level0"] == 6.0 and again.pending.monitors["alpha_req/level0"].isnan()


def test_collapse_is_said_once_per_onset_with_its_remedies():
    watch, good, flat = CollapseWatch(), {"rankme": 20.0, "target_var": 0.6}, {"rankme": 20.0, "target_var": 0.04}
    assert watch(good) == [] and watch({}) == []
    (line,) = watch(flat)
    assert "standard deviation is under 0.3 (0.2)" in line and "RankMe" not in line
    assert all(key in line for key in ("target.ema", "optimization.lr", "objectives.sigreg"))
    assert watch(flat) == [] and watch({}) == [] and watch({**flat, "rankme": 2.0}) == []  # it goes on
    assert watch({"rankme": None, "target_var": 0.6}) == [] and watch(good) == []
    (line,) = watch({"rankme": 3.5, "target_var": 0.0})
    assert "RankMe of the target's last level is under 5 (3.5) and the target's standard deviation" in line
    assert CollapseWatch()({"rankme": None, "target_var": None}) == []


def test_the_log_shows_it(capsys):
    row = {"step": 1, "loss": 1.0, "terms": {}, "lr": 1e-3, "clips_per_s": 1.0, "data_wait": 0.0}
    with Progress(4) as progress:
        for _ in range(2):
            progress.log({**row, "monitors": {"rankme": 2.0, "target_var": 0.5}})
    with Progress(4, enabled=False) as progress:
        progress.log({**row, "monitors": {"rankme": 2.0}})
    assert capsys.readouterr().err.count("collapsing: RankMe") == 1


def test_committed_runs_collapse_and_are_remedied():
    """What docs/training.md shows: one run falls under a limit and is warned of, those with a remedy are not."""
    path = Path(__file__).parents[2] / "benchmarks" / "results" / "collapse_remedy.json"
    first, *others = json.loads(path.read_text())["runs"]
    ends = [(f"{made['target_std'][-1]:.2f}", f"{made['rankme'][-1]:.1f}") for made in (first, *others)]
    (std, rankme), stds, rankmes = ends[0], *(sorted(column, key=float) for column in zip(*ends[1:]))
    said = f"the run that collapsed ended at {std} with RankMe {rankme}, those with a remedy "
    said += f"at {stds[0]} to {stds[-1]} with RankMe {rankmes[0]} to {rankmes[-1]}."
    assert said in " ".join(inspect.getsource(module).split()).replace(" # ", " ")
    assert len(others) == 3 and min(first["target_std"]) < STD_LIMIT and len(first["warned"]) == 1
    for made in (first, *others):
        watch = CollapseWatch()
        rows = [{"rankme": r, "target_var": s**2} for r, s in zip(made["rankme"], made["target_std"])]
        assert sum(len(watch(row)) for row in rows) == len(made["warned"]) == (made is first)
