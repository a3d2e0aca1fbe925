import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.evaluation.cases import error_of, small_run
from vjepa_fast.cli import main
from vjepa_fast.data.synthetic import render_suite
from vjepa_fast.errors import DataError, UserError
from vjepa_fast.evaluation import ClipSet
from vjepa_fast.evaluation.run.geometry import METRICS, checkpoint_geometry, geometry_rows, view_of
from vjepa_fast.layers.channels import subspaces
from vjepa_fast.metrics import geometry

LEVELS, WIDTH = 4, 6


class Toy(nn.Module):
    """Levels that look at the patches of a clip through random weights; ``change`` spoils their output."""

    def __init__(self, change=lambda z: z):
        super().__init__()
        torch.manual_seed(0)
        self.levels, self.change = LEVELS, change
        self.proj = nn.Conv3d(3, LEVELS * WIDTH, (2, 8, 8), stride=(2, 8, 8))

    def grid(self, shape):
        return (shape[2] // 2, shape[3] // 8, shape[4] // 8)

    def forward(self, clip, masks=None, hierarchical=True):
        return self.change(self.proj(clip).tanh().flatten(2).mT)


def clips_of(n=40, frames=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    low = torch.rand(n, 3, frames, 4, 4, generator=g)
    clips = nn.functional.interpolate(low, size=(frames, 16, 16), mode="trilinear")
    return ClipSet((clips * 255).to(torch.uint8), np.arange(n) % 4, f"hash{seed}", "toy")


def by_part(rows):
    return {(r["level"], r["subspace"]): r for r in rows}


DEPTH = {(0, "all"), (1, "all"), (2, "all"), (3, "all"), ("all", "all"), ("all", "appearance"), ("all", "dynamics")}


def test_rows_are_the_figures_of_their_channels():
    rows = geometry_rows(Toy(), clips_of(), views=3, label="mine")
    found = by_part(rows)
    assert set(found) == DEPTH and all(r["encoder"] == "mine" and r["why"] == {} for r in rows)
    with torch.no_grad():
        clip = clips_of().clips.float() / 255
        mean, std = (torch.tensor(v).view(3, 1, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        x = Toy()((clip - mean) / std).mean(1)
    slices = {(i, "all"): slice(6 * i, 6 * i + 6) for i in range(4)}
    slices |= {("all", "all"): slice(0, 24), ("all", "appearance"): slice(0, 12), ("all", "dynamics"): slice(12, 24)}
    for part, window in slices.items():
        for name in ("rankme", "alpha_req", "feature_std", "mean_cosine"):
            expected = getattr(geometry, name)(x[:, window]).item()
            assert found[part][name] == pytest.approx(expected, rel=1e-3), (part, name)
        assert found[part]["dim"] == x[:, window].shape[1] and found[part]["clips"] == 40
        assert 1 < found[part]["lidar"] <= found[part]["dim"]
    assert found[0, "all"]["alpha_range"] == [1, 6]
    json.dumps(rows)


def test_channel_split_cuts_every_level():
    found = by_part(geometry_rows(Toy(), clips_of(), views=0, split="channel"))
    assert set(found) == DEPTH | {(i, s) for i in range(4) for s in ("appearance", "dynamics")}
    x = torch.arange(24.0)[None]
    parts = subspaces(x, 4, "channel")
    assert parts[1, "dynamics"].tolist() == [[9, 10, 11]]
    assert parts["all", "appearance"].tolist() == [[0, 1, 2, 6, 7, 8, 12, 13, 14, 18, 19, 20]]
    assert subspaces(x, 4)["all", "dynamics"].tolist() == [list(range(12, 24))]


def test_one_collapsed_level_shows_only_there():
    def spoil(z):
        z = z.clone()
        z[..., 2 * WIDTH : 3 * WIDTH] = 0.7
        return z

    whole, found = (by_part(geometry_rows(Toy(c), clips_of(), views=3)) for c in (lambda z: z, spoil))
    dead = found[2, "all"]
    assert dead["rankme"] == pytest.approx(1, abs=1e-3) and dead["lidar"] == pytest.approx(1, abs=1e-3)
    assert dead["feature_std"] < 1e-6 and dead["mean_cosine"] == pytest.approx(1, abs=1e-5)
    assert dead["alpha_req"] is None and "zero" in dead["why"]["alpha_req"]
    for part in ((0, "all"), (1, "all"), (3, "all"), ("all", "appearance")):
        assert {k: found[part][k] for k in METRICS} == pytest.approx({k: whole[part][k] for k in METRICS}), part
    assert found["all", "dynamics"]["rankme"] < whole["all", "dynamics"]["rankme"]


class ColourAndSide(nn.Module):
    """Level 0: the clip's mean colour, the same in every view. Level 1: left minus right half, which a flip turns."""

    levels = 2

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(4.0))

    def grid(self, shape):
        return (1, 1, 1)

    def forward(self, clip, masks=None, hierarchical=True):
        half = clip.shape[-1] // 2
        side = clip[..., :half].mean((2, 3, 4)) - clip[..., half:].mean((2, 3, 4))
        return torch.cat([clip.mean((2, 3, 4)), side * self.scale], 1)[:, None]


def test_lidar_does_not_count_what_views_differ_in():
    g = torch.Generator().manual_seed(0)
    colour = torch.rand(120, 3, 1, 1, 1, generator=g) * 160 + 40
    ramp = torch.rand(120, 3, 1, 1, 1, generator=g) * 40 - 20
    clips = (colour + ramp * torch.linspace(-1, 1, 16)).round().to(torch.uint8).expand(-1, -1, 4, 16, 16)
    rows = by_part(geometry_rows(ColourAndSide(), ClipSet(clips, np.arange(120) % 4, "h", "toy"), views=8))
    assert rows["all", "all"]["rankme"] > 4.5 and rows[1, "all"]["rankme"] > 2.5
    assert rows["all", "all"]["lidar"] == pytest.approx(3, rel=0.1)  # the colours
    assert rows[0, "all"]["lidar"] == pytest.approx(3, rel=0.1)


def test_missing_figures_say_why():
    rows = geometry_rows(Toy(), clips_of(), views=1)
    assert all(r["lidar"] is None and "at least 2 views" in r["why"]["lidar"] for r in rows)
    rows = geometry_rows(Toy(), clips_of(n=3), views=2)
    assert all(r["alpha_req"] is None and "3 clips" in r["why"]["alpha_req"] for r in rows)
    warned = {(r["level"], r["subspace"]) for r in rows if r["warnings"]}
    assert warned == DEPTH  # 3 clips x 2 views cannot fill 6 channels
    assert not any(r["warnings"] for r in geometry_rows(Toy(), clips_of(), views=2))


def test_the_seed_draws_clips_and_views_and_nothing_else_does():
    clips = clips_of()
    a = geometry_rows(Toy(), clips, views=2, max_clips=30, batch_size=7)
    torch.manual_seed(5)
    np.random.seed(5)
    assert geometry_rows(Toy(), clips, views=2, max_clips=30, batch_size=7) == a
    b = geometry_rows(Toy(), clips, views=2, max_clips=30, seed=1)
    assert a[0]["clips"] == b[0]["clips"] == 30 and a[0]["rankme"] != b[0]["rankme"] and a[0]["lidar"] != b[0]["lidar"]


def test_views():
    clip = clips_of(n=1, frames=10).clips[0]
    assert torch.equal(view_of(clip, 4, None, (0, 0)), clip[:, 3:7])
    views = [view_of(clip, 4, v, (0, 0)) for v in range(6)]
    assert all(v.shape == (3, 4, 16, 16) and v.dtype == torch.uint8 for v in views)
    assert all(not torch.equal(a, b) for i, a in enumerate(views) for b in views[:i])
    assert torch.equal(views[2], view_of(clip, 4, 2, (0, 0))) and not torch.equal(views[2], view_of(clip, 4, 2, (0, 1)))
    still = torch.arange(10, dtype=torch.uint8).view(1, 10, 1, 1).expand(3, 10, 16, 16)  # each frame has its number
    starts = set()
    for v in range(40):
        seen = view_of(still, 4, v, (0, 0))[0, :, 0, 0].tolist()
        assert seen == list(range(seen[0], seen[0] + 4))
        starts.add(seen[0])
    assert starts == set(range(7))


def test_bad_input_is_refused():
    def spoil(z):
        z = z.clone()
        z[:, :, WIDTH + 1] = math.nan
        return z

    with pytest.raises(DataError, match="toy: features of target_encoder are not finite at level 1"):
        geometry_rows(Toy(spoil), clips_of())
    with pytest.raises(DataError, match="at least 2, got 1"):
        geometry_rows(Toy(), clips_of(n=1))
    with pytest.raises(DataError, match="4 frames, 8 were asked for"):
        geometry_rows(Toy(), clips_of(), num_frames=8)
    with pytest.raises(UserError, match="unknown split 'half'.*depth, channel"):
        geometry_rows(Toy(), clips_of(), split="half")
    with pytest.raises(UserError, match="max_clips >= 2"):
        geometry_rows(Toy(), clips_of(), max_clips=1)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return small_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return render_suite("motion8", tmp_path_factory.mktemp("motion8"), splits={"test": 24}, size=32, frames=16)["test"]


def test_command_prints_and_writes_every_encoder_beside_random_init(run_folder, manifest, tmp_path, capsys):
    out = tmp_path / "geometry.json"
    command = ["geometry", str(run_folder), "--data", manifest, "--views", "2", "--max-clips", "20", "--device", "cpu"]
    assert main([*command, "--extra-frames", "2", "--json", str(out)]) == 0
    text, found = capsys.readouterr().out, json.loads(out.read_text())
    labels = ["random init", "target_encoder", "encoder"]
    assert [r["encoder"] for r in found["rows"]] == [label for label in labels for _ in DEPTH]
    assert all(label in text for label in (*labels, "RankMe", "LiDAR", "alpha-ReQ", "appearance", "dynamics"))
    rows = {(r["encoder"], r["level"], r["subspace"]): r for r in found["rows"]}
    assert all(r["clips"] == 20 and r["views"] == 2 for r in rows.values())
    assert len({rows[label, "all", "all"]["rankme"] for label in labels}) == 3
    assert rows["encoder", 0, "all"]["rankme"] > 1 and "LiDAR of 96 channels" in text  # 20 clips x 2 views: warned
    same = checkpoint_geometry(run_folder, manifest, views=2, max_clips=20, extra_frames=2)
    assert same == found["rows"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--views", "-1"], "--views: -1 is less than 0"),
        (["--max-clips", "1"], "--max-clips: 1 is less than 2"),
        (["--data", "missing.csv"], "missing.csv"),
        (["--json", "no/such/folder/x.json"], "cannot be written"),
    ],
)
def test_bad_arguments_are_one_line(run_folder, manifest, capsys, change, message):
    assert main(["geometry", str(run_folder), "--data", manifest, "--device", "cpu", *change]) == 2
    assert message in error_of(capsys)


def test_a_manifest_of_one_clip_is_refused(run_folder, manifest, tmp_path, capsys):
    one = tmp_path / "one.csv"
    path, label = Path(manifest).read_text().splitlines()[0].rsplit(None, 1)
    full = path if path.startswith("/") else f"{manifest.rsplit('/', 1)[0]}/{path}"
    one.write_text(f"{full} {label}\n")
    assert main(["geometry", str(run_folder), "--data", str(one), "--device", "cpu"]) == 2
    assert "at least 2, got 1" in error_of(capsys)
