"""The study's report in its five forms: the same numbers in all, nothing that a browser objects to."""

import base64
import csv
import json
import re
import shutil
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest

from tests import browser
from tests.study.fake_study import add_instrument, make_study
from vjepa_fast.cli import main
from vjepa_fast.errors import DataError
from vjepa_fast.study import stats
from vjepa_fast.study.figures import figure, smooth
from vjepa_fast.study.records import load_study
from vjepa_fast.study.report import figures, instrument, sentences, tables
from vjepa_fast.study.report.write import write_study_report

VARIANTS = ("baseline", "ld", "fwm_hw", "fwm_hw_ld", "kinematic")
OUTCOMES = (("fewshot", "1-shot"), ("motion8", "linear"), ("objects", "linear"))
VOID = {"meta", "img", "br", "link", "hr", "input"}
SECTIONS = (
    "answer",
    "instrument",
    "mixed",
    "words",
    "accuracy",
    "compute",
    "deltas",
    "control",
    "modes",
    "tradeoff",
    "random",
    "cost",
    "geometry",
    "curves",
    "settings",
    "method",
    "ran",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    effects = {("ld", "motion8"): 0.35, **{(v, "mixed", "fewshot"): 0.15 for v in VARIANTS}}
    made = make_study(
        tmp_path_factory.mktemp("report") / "study",
        variants=VARIANTS,
        seeds=(0, 1, 2),
        outcomes=OUTCOMES,
        samples=400,
        effects=effects,
        seed_spread=0.002,
        published=("fwm_hw_ld", "kinematic"),
    )
    add_instrument(made, OUTCOMES, failed=("objects",))
    return made


@pytest.fixture(scope="module")
def made(folder):
    return write_study_report(folder)


@pytest.fixture(scope="module")
def html(made):
    return made[1][1].read_text(encoding="utf-8")


class Page(HTMLParser):
    """Open tags, tags met, images, ids and links of a page."""

    def __init__(self, text):
        super().__init__()
        self.open, self.met, self.images, self.ids, self.links, self.rows = [], set(), [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.met.add(tag)
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.links += [attrs["href"]] if "href" in attrs else []
        self.images += [attrs] if tag == "img" else []
        if tag == "tr":
            self.rows.append(0)
        if tag in ("td", "th"):
            self.rows[-1] += int(attrs.get("colspan", 1))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]} at {self.getpos()}"
        self.open.pop()


def test_html_is_whole_and_self_contained(html):
    page = Page(html)
    assert page.open == [] and html.startswith("<!DOCTYPE html>")
    assert "script" not in page.met and "link" not in page.met and "url(" not in html
    assert [i for i in page.ids if i in SECTIONS] == list(SECTIONS)
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert len(page.images) == 8
    for image in page.images:
        head, data = image["src"].split(",", 1)
        assert head == "data:image/svg+xml;base64" and image["alt"]
        assert ElementTree.fromstring(base64.b64decode(data)).tag.endswith("svg")
    assert "nan" not in re.sub(r"<[^>]*>", " ", html).lower().split() and "None" not in re.sub(r"<[^>]*>", "", html)


def test_html_opens_in_chromium_without_console_errors(made, tmp_path):
    browser.needed()

    def lines(path):
        options = (
            "--enable-logging=stderr",
            "--v=0",
            f"--screenshot={tmp_path / 'page.png'}",
            "--window-size=1280,2000",
        )
        _, said = browser.browse(path.as_uri(), *options, folder=tmp_path)
        return [line for line in said.splitlines() if "CONSOLE" in line]

    broken = tmp_path / "broken.html"
    broken.write_text('<script>console.error("seen")</script>')
    assert any("seen" in line for line in lines(broken))  # the check can fail
    assert lines(made[1][1]) == []
    from PIL import Image

    with Image.open(tmp_path / "page.png") as image:
        assert np.asarray(image.convert("L")).std() > 5  # something was drawn


def test_five_forms_say_the_same(made, html, folder):
    content, written = made
    assert [p.name for p in written] == [
        "results.csv",
        "report.html",
        "report.md",
        "report.csv",
        "report.tex",
        "report.json",
    ]
    accuracy = {}
    with open(written[0], newline="") as file:
        for row in csv.DictReader(file):
            accuracy[row["key"], row["suite"], row["probe"]] = float(row["accuracy"])
    ld, base = (
        np.array([accuracy[f"{v}-mixed-intended-s{s}", "motion8", "linear"] for s in (0, 1, 2)])
        for v in ("ld", "baseline")
    )
    deltas = 100 * (ld - base)
    with open(written[3], newline="") as file:
        wanted = ("variant minus baseline", "ld", "mixed", "motion8")
        columns = ("comparison", "variant", "regime", "suite")
        (row,) = [r for r in csv.DictReader(file) if tuple(r[c] for c in columns) == wanted]
    assert float(row["delta_points"]) == pytest.approx(np.mean(deltas), abs=1e-3)
    assert row["verdict"] == "above" and row["family"] == "3"  # ld, fwm_hw_ld, kinematic; fwm_hw is a control
    value, low, high = f"{np.mean(deltas):+.1f}", float(row["t_low"]), float(row["t_high"])
    seen = f"MDD {float(row['detectable_points']):.1f}"
    assert f"| {value} ({low:+.1f} to {high:+.1f}; {seen}) **above** |" in written[2].read_text()
    bold = rf"\shortstack{{\textbf{{{value}}}\\{{\tiny [{low:+.1f}, {high:+.1f}]}}\\{{\tiny {seen}}}}}"
    assert bold in written[4].read_text()
    found = json.loads(written[5].read_text())
    (same,) = [c for c in found["comparisons"] if tuple(c[k] for k in columns) == wanted]
    assert {k: "" if v is None else str(v) for k, v in same.items()} == row and found["headline"] == content["headline"]
    assert f'<td class="above"><b>{value}</b>' in html and f"{low:+.1f} to {high:+.1f}" in html
    assert content["headline"] in written[2].read_text() and content["headline"] in html.replace("\N{MINUS SIGN}", "-")


def test_tables_are_rectangular(made, html):
    columns = len(OUTCOMES)
    latex = made[1][4].read_text()
    for environment in ("table*", "tabular"):
        assert latex.count(f"\\begin{{{environment}}}") == latex.count(f"\\end{{{environment}}}") > 5
    body = [line for line in latex.splitlines() if line.endswith(r"\\") and "multicolumn" not in line]
    assert body and all(line.count(" & ") == columns for line in body)
    assert "fwm_hw" not in re.sub(r"\\label\{.*?\}|\\_", lambda m: "" if "label" in m[0] else "-", latex)  # escaped
    for block in re.findall(r"(?:^\|.*\n)+", made[1][2].read_text(), re.M):
        assert len({line.count("|") for line in block.splitlines()}) == 1
    for table in re.findall(r"<table.*?</table>", html, re.S):
        assert len(set(Page(table).rows)) == 1


def regime(value, low, high, p, variant=stats.MEAN, probe="1-shot", suite="fewshot", **more):
    return stats.Comparison(
        "regime",
        variant,
        "mixed",
        "intended",
        suite,
        probe,
        "single",
        (0.5, 0.5),
        (0, 1, 2),
        (value,) * 3,
        value,
        low,
        high,
        p,
        p,
        note="4 variants",
        detectable=0.0123,
        **more,
    )


@pytest.mark.parametrize(
    ("found", "start"),
    [
        ([regime(0.04, 0.02, 0.06, 0.01)], "Yes, in this study"),
        ([regime(-0.04, -0.06, -0.02, 0.01)], "No: in this study"),
        ([regime(0.04, -0.02, 0.10, 0.2)], "Undecided"),
        ([regime(0.001, -0.01, 0.01, 0.9, p_equal=0.01)], "No difference that matters"),
        ([regime(0.04, 0.02, 0.06, 0.01, barred="its check failed")], "Not answered"),
        (
            [regime(0.04, 0.02, 0.06, 0.01), regime(-0.04, -0.06, -0.02, 0.01, suite="other", barred="no check")],
            "Yes, in this study",
        ),
        ([regime(0.04, 0.02, 0.06, 0.01), regime(0.01, -0.1, 0.1, 0.9, probe="5-shot")], "Partly: for some"),
        ([regime(0.04, 0.02, 0.06, 0.01), regime(-0.04, -0.06, -0.02, 0.01, probe="5-shot")], "It depends"),
        ([], "This study cannot answer"),
    ],
)
def test_the_answer_follows_from_the_numbers(found, start):
    said = sentences.headline(stats.answer(found, "intended"))
    assert said.startswith(start)
    judged = [c for c in found if not c.barred] or found
    assert not found or "could have seen, with a power of 80 %: 1-shot 1.2" in said
    assert ("1 outcome not judged" in said) == (len(judged) < len(found))
    for c in judged:
        assert f"{c.probe} {100 * c.value:+.1f} ({100 * c.low:+.1f} to {100 * c.high:+.1f}), {c.verdict}" in said


def test_command_writes_what_is_asked_and_names_what_is_missing(folder, tmp_path, capsys):
    copy = shutil.copytree(folder, tmp_path / "study", ignore=shutil.ignore_patterns("report.*"))
    key = "ld-single-intended-s2"
    (copy / "cells" / f"{key}.json").unlink()
    (copy / "cells" / f"{key}.error.txt").write_text("TrainingError: loss is nan <b>\n")

    def command(*words):
        return main(["study", "report", str(copy), *words])

    assert command() == 2 and "--partial" in capsys.readouterr().err
    assert command("--partial", "--md", str(tmp_path / "new" / "out.md"), "--html", str(tmp_path / "out.html")) == 0
    said = capsys.readouterr().out
    assert "Yes, in this study" in said and f"1 cells are missing: {key}" in said
    assert key in (tmp_path / "new" / "out.md").read_text() and not list(copy.glob("report.*"))
    html = (tmp_path / "out.html").read_text()
    assert "INCOMPLETE" in html and "loss is nan &lt;b&gt;" in html and "2 of 3" in html
    Page(html)
    (tmp_path / "file").write_text("")
    assert command("--partial", "--md", str(tmp_path / "file" / "out.md")) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_study_of_one_run_says_what_it_lacks(tmp_path):
    folder = make_study(
        tmp_path, variants=("baseline",), regimes=("mixed",), seeds=(0,), outcomes=OUTCOMES[1:2], samples=20
    )
    content, written = write_study_report(folder)
    assert content["headline"].startswith("This study cannot answer")
    html = written[1].read_text()
    Page(html)
    for text in (
        "Needs both regimes",
        "No variant beside the baseline ran",
        "No variant ran in both modes",
        "Needs a temporal",
    ):
        assert text in html


def test_chance_commit_and_collapse_are_said(tmp_path):
    """Few-shot at chance everywhere; cells of another commit than the plan's, which a later command wrote."""
    folder = make_study(tmp_path, variants=("baseline", "ld"), outcomes=OUTCOMES[:2], samples=50)
    for path in (folder / "cells").glob("*.json"):
        cell = json.loads(path.read_text())
        cell["versions"]["commit"] = "abc+"
        (few,) = [r for r in cell["rows"] if r["suite"] == "fewshot"]
        few["accuracy"] = 0.4 if path.name.startswith("ld-single") else 0.2
        path.write_text(json.dumps(cell))
    content, written = write_study_report(folder)
    assert content["barred"].keys() == {"fewshot", "motion8"}  # there is no instrument check
    (line,) = [x for x in content["answer_lines"] if "chance is 20.0 %" in x]
    assert "random init" in line and "(ld, single); 3 of 4 lie less than 1 point from chance, where" in line
    assert content["environment"]["commit"] == "abc+ (+: with changes not committed)"
    text, page = written[2].read_text(), written[1].read_text()
    assert "| chance |  | 20.0 | 20.0 |" in text and "<td>chance</td>" in page
    assert any(line.startswith("Directions that the features use (RankMe") for line in content["answer_lines"])
    assert text.count("| random_init | none | ") == 1 and "abc+" in written[0].read_text()
    geometry = tables.geometry_lines(content["geometry"])
    assert [x[:2] for x in geometry] == [("random_init", "none")] + [
        (v, r) for v in ("baseline", "ld") for r in ("single", "mixed")
    ]


def test_labels_of_a_crowded_scatter_do_not_overlap():
    rng = np.random.default_rng(0)
    points = {f"variant_{i}": tuple(rng.normal(0, 1, 2)) for i in range(20)}
    with figure(8, 5) as (drawn, (axis,)):
        axis.scatter(*zip(*points.values()))
        figures._settle(drawn)
        bars = [(x - 0.2, y, x + 0.2, y) for x, y in points.values()]
        boxes = list(figures.place_labels(axis, points, bars).values())
        frame = axis.get_window_extent()
        dots = [axis.transData.transform(p) for p in points.values()]
        lines = [[*axis.transData.transform(b[:2]), *axis.transData.transform(b[2:])] for b in bars]
    assert len(boxes) == 20
    for i, a in enumerate(boxes):
        assert frame.x0 <= a[0] and a[2] <= frame.x1 and frame.y0 <= a[1] and a[3] <= frame.y1
        assert all(figures._overlap(a, b) == 0 for b in boxes[:i])
        assert not any(a[0] < x < a[2] and a[1] < y < a[3] for x, y in dots)
        assert not any(a[1] < y < a[3] and left < a[2] and a[0] < right for left, y, right, _ in lines)


def test_cost_and_geometry_are_means_over_seeds(folder):
    study = load_study(folder)
    cells = study.runs("ld", "mixed", "intended").values()
    base = study.runs("baseline", "mixed", "intended").values()
    (row,) = [r for r in tables.cost_table(study) if (r["variant"], r["regime"]) == ("ld", "mixed")]
    more = np.mean([c.cost["step_ms"] for c in cells]) - np.mean([c.cost["step_ms"] for c in base])
    assert row["ms_more"] == pytest.approx(more)
    (row,) = [
        r
        for r in tables.geometry_table(study)
        if (r["variant"], r["regime"], r["level"], r["subspace"]) == ("ld", "mixed", "all", "dynamics")
    ]
    values = [g["rankme"] for c in cells for g in c.geometry if (g["level"], g["subspace"]) == ("all", "dynamics")]
    assert row["rankme"] == pytest.approx(np.mean(values)) and len(values) == 3


@pytest.mark.parametrize(
    ("p", "text"),
    [(None, "n/a"), (0.0001, "<0.001"), (0.0497, "<0.05"), (0.0123, "0.012"), (0.25, "0.25"), (0.0502, "0.050")],
)
def test_p_values_never_contradict_the_verdict(p, text):
    assert sentences.p_text(p) == text
    assert sentences.points(-0.0001) == "0.0" and sentences.points(None) == "n/a"


def test_what_failed_the_instrument_check_is_neither_coloured_nor_called_anything(made, html, folder):
    """The planted effects of a suite without a ceiling stay numbers."""
    content, written = made
    assert {c.verdict for c in content["comparisons"] if c.suite == "objects"} == {"not judged"}
    assert {c.verdict for c in content["comparisons"] if c.suite == "motion8"} >= {"above", "undecided"}
    coloured = re.findall(r"<td class=\"(above|below|equivalent|barred)\"", html)
    assert coloured.count("barred") >= sum(c.suite == "objects" for c in content["comparisons"])
    assert coloured.count("above") == sum(c.verdict == "above" for c in content["comparisons"])
    reason = "its instrument check failed (linear: an encoder trained with labels reaches 40.0 %, under 80.0 %)"
    assert content["barred"] == {"objects": reason}
    assert all(reason.split("(")[0] in path.read_text() for path in (written[1], written[2], written[3], written[4]))
    assert html.index("<h2>The answer") < html.index("<img") < html.index("<h2>Instrument check")
    assert "<b>84.0</b>" in html and "| objects | linear | 40.0 (39.0 to 41.0) |" in written[2].read_text()


def test_public_data_sets_need_no_check_of_their_own(tmp_path):
    folder = make_study(tmp_path, variants=("baseline", "ld"), outcomes=OUTCOMES[1:], samples=20)
    study = load_study(folder)
    assert set(instrument.barred(study, None)) == {"motion8", "objects"}
    study.plan["suite"] = "paper"
    assert instrument.barred(study, None) == {}
    checked = add_instrument(folder, OUTCOMES[1:], failed=("objects",))
    assert set(instrument.barred(study, checked)) == {"objects"}


@pytest.mark.parametrize("broken", ["{", "[]", '{"format": 2}', '{"format": 1, "suites": {"a": {}}, "rows": []}'])
def test_a_check_of_another_form_is_refused(tmp_path, broken):
    folder = make_study(tmp_path, variants=("baseline",), outcomes=OUTCOMES[1:2], seeds=(0,), samples=20)
    (folder / "instrument.json").write_text(broken)
    with pytest.raises(DataError, match="instrument.json.*study validate"):
        instrument.read(load_study(folder))


def test_one_seed_says_that_power_cannot_be_told(tmp_path):
    folder = make_study(tmp_path, variants=("baseline", "ld"), outcomes=OUTCOMES[:1], seeds=(0,), samples=20)
    content, written = write_study_report(folder)
    assert "cannot be told from one seed" in content["headline"] and "MDD n/a" in written[2].read_text()
    assert "how large a difference could have been seen cannot be told" in written[1].read_text()


def test_names_from_files_stay_text_in_every_form(tmp_path):
    """A cell is a file that anybody may have written: no command, tag, cell border or line of it gets through."""
    nasty = "a|b <u>*x* $\\alpha$ `c` [d](e)"
    folder = make_study(tmp_path, variants=("baseline", nasty), outcomes=OUTCOMES[:2], samples=20)
    for path in (folder / "cells").glob("*.json"):
        cell = json.loads(path.read_text())
        cell["versions"]["commit"] = "abc\n\\input{/etc/passwd}\n\n% x"
        path.write_text(json.dumps(cell))
    _, written = write_study_report(folder)
    html, text, latex = (written[i].read_text() for i in (1, 2, 4))
    assert "<u>" not in html and "a|b &lt;u&gt;" in html
    Page(html)
    assert (
        "<i>" not in text
        and r"a\|b &lt;u&gt;\*x\*" in text
        and "`c`" not in text.replace(r"\`", "")
        and r"\[d\]" in text
    )
    for block in re.findall(r"(?:^\|.*\n)+", text, re.M):
        assert len({line.replace(r"\|", "").count("|") for line in block.splitlines()}) == 1
    assert not [line for line in latex.splitlines() if r"\input" in line and not line.startswith("%")]
    assert r"\$\textbackslash{}alpha\$" in latex and "\n\\input" not in latex


def test_gain_is_counted_per_minute_and_per_flop(folder):
    study = load_study(folder)
    (row,) = [r for r in tables.compute_table(study) if (r["variant"], r["regime"]) == ("ld", "mixed")]
    cells, random = study.runs("ld", "mixed", "intended"), study.runs("random_init", "none", "intended")
    few = OUTCOMES[0]
    gain = 100 * np.mean([c.rows[few].accuracy - random[s].rows[few].accuracy for s, c in cells.items()])
    minutes = np.mean([c.cost["minutes"] for c in cells.values()])
    pflop = np.mean([c.cost["flops"] for c in cells.values()]) / 1e15
    assert (row["time"], row["pflop"]) == (pytest.approx(minutes), pytest.approx(pflop))
    found = row["outcomes"][few]
    assert (found["gain"], found["per_time"], found["per_pflop"]) == pytest.approx((gain, gain / minutes, gain / pflop))
    for cell in cells.values():
        cell.versions.update(device="cuda:0 (some GPU)")
        cell.cost.pop("flops")
    (row,) = [r for r in tables.compute_table(study) if (r["variant"], r["regime"]) == ("ld", "mixed")]
    assert tables.compute_unit(study) == "GPU-hour" and row["time"] == pytest.approx(minutes / 60)
    assert row["pflop"] is None and row["outcomes"][few]["per_pflop"] is None


def test_a_running_mean_does_not_lag():
    line = np.arange(20.0)
    assert np.allclose(smooth(3 * line + 1, 7), 3 * line + 1)
    step = smooth((line >= 10).astype(float), 5)
    assert step[7] == 0 and step[9] == pytest.approx(0.4) and step[10] == pytest.approx(0.6) and step[12] == 1
    assert smooth(np.array([2.0]), 9).tolist() == [2.0] and smooth(line, 1).tolist() == line.tolist()


def test_svg_is_the_same_twice(folder):
    study = load_study(folder)
    assert figures.cost(study) == figures.cost(study)
    assert ElementTree.fromstring(figures.cost(study)).get("viewBox")
