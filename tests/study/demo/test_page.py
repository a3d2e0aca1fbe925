import json
import re
from dataclasses import replace

import numpy as np
import pytest

from vjepa_fast.errors import DataError, UserError
from vjepa_fast.evaluation import Features, against, episode_rows, probe_rows
from vjepa_fast.evaluation.run.rows import Row
from vjepa_fast.study.demo import figures, page, records

SECTIONS = ("result", "accuracy", "tradeoff", "loss", "collapse", "masks", "pca", "settings", "method")


def features(signal, seed, n=80, classes=4, name="set"):
    rng = np.random.default_rng(seed)
    y = np.arange(n) % classes
    x = rng.standard_normal((n, 12))
    x[np.arange(n), y] += signal
    return Features(x, y, name)


def rows_of(label, kind, suite, signal):
    return probe_rows(label, kind, suite, *(features(signal, s) for s in (1, 2, 3)))


@pytest.fixture(scope="module")
def rows():
    made = []
    for suite in ("order", "objects"):
        made += rows_of("random init", "random", suite, 0.8)
        made += rows_of("baseline single", "pretrained", suite, 5.0 if suite == "order" else 0.0)
        made += rows_of("baseline single, student", "pretrained", suite, 0.8)
    novel = features(3.0, 4, n=60, classes=6)
    made += episode_rows("random init", "random", "fewshot", features(0.5, 4, n=60, classes=6), queries=4, episodes=50)
    made += episode_rows("baseline single", "pretrained", "fewshot", novel, queries=4, episodes=50)
    return against(made, [r for r in made if r.kind == "random"])


def metrics(scale):
    return [
        {
            "step": s,
            "loss": scale / s,
            "terms": {"pred": scale / s, "context": 0.5 / s},
            "lr": 1e-3,
            "monitors": {"rankme": 10.0 + s, "feature_std": 0.5, "target_var": 0.9} if s % 2 else {},
        }
        for s in range(1, 9)
    ]


@pytest.fixture(scope="module")
def material(rows):
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 255, (4, 16, 16, 3), dtype=np.uint8)
    mask = rng.random((4, 8, 8)) < 0.5
    return dict(
        title="Tiny report",
        rows=rows,
        runs=[
            records.RunRecord("baseline single", "baseline", "single", metrics(2.0), {"steps": "8", "lr": "1e-3"}),
            records.RunRecord("baseline mixed", "baseline", "mixed", metrics(3.0), {"steps": "8"}),
        ],
        suites=[records.SuiteRecord("order", "direction <of> motion", 80, 80, 80, 4, 0.25)],
        pictures=[
            records.ClipPicture(
                "A clip",
                frames,
                mask,
                ~mask,
                rng.random((4, 8, 8)),
                {"random init": figures.pca_rgb(rng.random((256, 5)), (4, 8, 8))},
            )
        ],
        protocol=["One protocol for all rows."],
    )


def committed():
    row = {
        "suite": "order",
        "probe": "linear",
        "encoder": "target_encoder",
        "seed": 0,
        "n": 800,
        "chance": 0.125,
        "pretrained": 0.431,
        "pretrained_ci95": [0.40, 0.46],
        "random": 0.30,
        "random_ci95": [0.27, 0.33],
        "difference": 0.131,
        "difference_ci95": [0.09, 0.17],
    }
    worse = {**row, "seed": 1, "difference": 0.01, "difference_ci95": [-0.02, 0.04]}
    return {
        "format": 1,
        "recipe": "synthetic_small",
        "rows": [row, worse],
        "curves": [{"seed": 0, "step": [1, 2], "loss": [1, 0.5]}],
    }


def test_report_has_its_sections_and_needs_nothing_else(tmp_path, material):
    path = page.write_report(tmp_path / "deep" / "report.html", **material)
    html = path.read_text()
    for section in SECTIONS:
        assert html.count(f'<section id="{section}">') == 1 and f'href="#{section}"' in html
    assert html.count("data:image/svg+xml;base64,") == 4 and html.count("data:image/png;base64,") == 4 + 2
    assert not re.search(r'(src|href)="(?!data:|#)', html) and "http" not in re.sub(r'base64,[^"]*', "", html)
    assert "direction &lt;of&gt; motion" in html
    assert 'id="longrun"' not in html and [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_report_states_which_rows_beat_random_init(tmp_path, material, rows):
    said = page.statement(rows)
    assert [name for name, _ in said["above"] if "order" in name] == [
        "baseline single: order, linear",
        "baseline single: order, knn",
    ]
    assert {name for name, _ in said["below"]} >= {"baseline single: objects, linear"}
    assert said["compared"] == 4 + 4 + 2 and said["level"] == said["compared"] - len(said["above"]) - len(said["below"])
    html = page.write_report(tmp_path / "r.html", **material).read_text()
    above = len(said["above"])
    assert f"{above} of 10 pretrained rows stand above random init beyond the 95 % interval" in " ".join(html.split())
    parts = ["Accuracy of each encoder", "stand above random init", '<section id="accuracy">', "<tbody>", "Row by row"]
    places = [html.index(part) for part in parts]
    assert places == sorted(places)  # the picture, a sentence, the table, the list
    assert all(name in html[places[-1] :] for name, _ in [*said["above"], *said["below"]])
    level = [r for r in rows if r.kind == "random" or r.verdict == "level"]
    html = page.write_report(tmp_path / "s.html", **{**material, "rows": level}).read_text()
    assert "No pretrained row stands above its random-init control" in html
    assert (
        said["novel"] == 2
        and "On novel classes no pretrained row" not in page.write_report(tmp_path / "t.html", **material).read_text()
    )
    below = [
        replace(r, difference={**r.difference, "value": -0.1, "low": -0.2, "high": -0.05})
        if r.suite == "fewshot" and r.difference
        else r
        for r in rows
    ]
    html = page.write_report(tmp_path / "u.html", **{**material, "rows": below}).read_text()
    assert "On novel classes no pretrained row stands above random init" in html


def test_table_shows_every_row_as_it_came_out(tmp_path, material, rows):
    html = page.write_report(tmp_path / "r.html", **material).read_text()
    cells = re.findall(
        r"<td class=\"(above|below|level)?\"><b>([\d.]+)</b><span class=\"ci\">([\d.]+)&ndash;([\d.]+)</span>", html
    )
    expected = sorted(
        (r.verdict if r.kind == "pretrained" else "", *(f"{100 * v:.1f}" for v in (r.accuracy, r.low, r.high)))
        for r in rows
    )
    assert sorted(cells) == expected


def test_committed_run_is_shown_and_marked(tmp_path, material):
    html = page.write_report(tmp_path / "r.html", **material, committed=committed()).read_text()
    assert "COMMITTED RESULT, NOT FROM THIS DEMO" in html and "43.1" in html and "1 of 2 seeds" in html


def test_empty_report_renders(tmp_path):
    html = page.write_report(tmp_path / "r.html", title="Empty", runs=[], rows=[], suites=[]).read_text()
    assert "No pretrained row could be set against" in html and "No metrics were recorded" in html


def test_unwritable_report_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        page.write_report(tmp_path / "file" / "r.html", title="x", runs=[], rows=[], suites=[])


def test_committed_file_is_checked(tmp_path):
    path = tmp_path / "c.json"
    path.write_text(json.dumps(committed()))
    assert records.load_committed(path)["recipe"] == "synthetic_small"
    broken = committed()
    del broken["rows"][0]["random"]
    for text in (json.dumps(broken), "[]", "{", json.dumps({**committed(), "rows": []})):
        path.write_text(text)
        with pytest.raises(DataError, match="c.json: not a result file"):
            records.load_committed(path)


def test_against_compares_the_same_samples(rows):
    control = next(r for r in rows if r.kind == "random" and r.suite == "order" and r.probe == "linear")
    other = next(r for r in rows if r.kind == "pretrained" and r.suite == "order" and r.probe == "linear")
    assert other.difference["value"] == pytest.approx(other.accuracy - control.accuracy)
    assert control.difference is None and control.verdict == ""
    short = Row("x", "pretrained", "order", "linear", 0.5, 0.4, 0.6, 2, 0.25, hits=(1, 0))
    assert against([short], [control])[0].difference is None


def test_masked_tokens_are_veiled_and_the_rest_is_untouched():
    frames = np.full((1, 16, 16, 3), 10, np.uint8)
    predicted = np.zeros((1, 2, 2), bool)
    predicted[0, 0, 1] = True
    out = figures.masked(frames, predicted, size=16)
    assert (out[0, 9:, :8] == 10).all() and out[0, 3, 12, 0] > 150


def test_pca_map_separates_two_kinds_of_token_and_is_repeatable():
    rng = np.random.default_rng(0)
    tokens = rng.standard_normal((64, 10)) * 0.05
    tokens[:32] += 3
    rgb = figures.pca_rgb(tokens, (4, 4, 4)).reshape(64, 3).astype(int)
    assert abs(rgb[:32, 0].mean() - rgb[32:, 0].mean()) > 200
    assert np.array_equal(rgb, figures.pca_rgb(tokens, (4, 4, 4)).reshape(64, 3))
    assert figures.pca_rgb(tokens[:, :2], (4, 4, 4)).shape == (4, 4, 4, 3)


@pytest.mark.parametrize(
    ("low", "high", "verdict"), [(0.01, 0.1, "above"), (-0.1, -0.01, "below"), (-0.01, 0.1, "level")]
)
def test_the_verdict_is_that_of_the_interval(low, high, verdict):
    value = (low + high) / 2
    row = Row(
        "x", "pretrained", "s", "knn", 0.5, 0.4, 0.6, 9, 0.1, difference={"value": value, "low": low, "high": high}
    )
    assert row.verdict == verdict


def test_dense_features_are_those_of_the_shifted_clip():
    import torch

    from vjepa_fast import config
    from vjepa_fast.evaluation import encode, random_encoder
    from vjepa_fast.study.demo.dense import dense_tokens

    encoder = random_encoder(config.load("demo_baseline_single"))
    clip = torch.randint(0, 255, (1, 3, 8, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found, grid = dense_tokens(encoder, clip, 12)
    assert grid == (4, 16, 16) and found.shape == (4 * 16 * 16, 96)
    dense = found.reshape(*grid, -1)
    rows, cols = torch.arange(-1, 47).clamp(0), torch.arange(-4, 44).clamp(0)  # shifts 3 and 0, behind a border of 4
    with torch.no_grad():
        z, _ = encode(encoder, clip[..., rows, :][..., cols])
    assert torch.equal(dense[:, 1::4, 0::4].reshape(-1, 96), z[0])
