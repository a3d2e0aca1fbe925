"""`vjepa-fast show`: the page of a run, and of a video by a run's encoder."""

import html.parser
import json
import re
import shutil

import pytest

from vjepa_fast import cli, config, trainer
from vjepa_fast.data import load_manifest

EVIL = "<script>alert(1)</script> & co"
SMALL = [
    "data.dataset_fpcs=[4]",
    "data.fps=null",
    "data.frame_sample_rate=2",
    "data.crop_size=32",
    "data.patch_size=8",
    "data.batch_size=3",
    "data.num_workers=0",
    "model.depth=2",
    "model.embed_dim=48",
    "optimization.epochs=1",
    "optimization.ipe=3",
    "optimization.warmup=0",
    "runtime.log_every=1",
    "runtime.monitor_every=1",
    "runtime.dtype=float32",
    "runtime.device=cpu",
]


class Page(html.parser.HTMLParser):
    """Tags, pictures and text of a page."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.sources, self.alts, self.ids, self.text = [], [], [], [], ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.tags.append(tag)
        found = [given[key] for key in ("src", "href") if key in given]
        self.sources += found
        self.alts += [given.get("alt", "")] * len(found)
        self.ids += [given["id"]] if "id" in given else []

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_suites):
    """A run on six videos, one of which has a name that is a piece of HTML."""
    folder = tmp_path_factory.mktemp("show")
    (folder / "videos").mkdir()
    for i, path in enumerate(load_manifest(tiny_suites["motion8"]["train"]).paths[:6]):
        name = EVIL.replace("/", "-") if i == 0 else f"film {i}"
        shutil.copy(path, folder / "videos" / f"{name}.mp4")
    lines = [f'"{path}" 0\n' for path in sorted((folder / "videos").iterdir())]
    (folder / "train.csv").write_text("".join(lines))
    data = f"data.datasets={json.dumps([str(folder / 'train.csv')])}"
    trainer.train(config.load("own_videos", [*SMALL, data, f"folder={folder / 'run'}"]))
    return folder


def test_the_page_of_a_run(run, capsys):
    out = run / "page.html"
    assert cli.main(["show", str(run / "run"), "--out", str(out), "--clips", "2", "--device", "cpu"]) == 0
    assert "3 rows, 2 clips, 2 with nearest ones" in capsys.readouterr().out
    page = Page(out)
    assert page.ids == ["curves", "masks", "maps", "attention", "nearest"]
    assert page.sources and all(re.match(r"data:image/(png|svg\+xml);base64,", source) for source in page.sources)
    assert "script" not in page.tags and "<script>alert(1)<-script> & co.mp4" in page.text
    assert "random init" in page.text and "3 steps of 3 clips" in page.text
    assert page.tags.count("figure") == 2 + 2 * (1 + 4)
    attention = page.text.split("Where the attention comes from")[1].split("Nearest clips")[0]
    assert attention.count("trained") == attention.count("frames") == 2 and attention.count("random init") == 2
    strips = [page.sources[i] for i, alt in enumerate(page.alts) if alt.startswith("trained of")]
    assert len(strips) == len(set(strips)) == 4


def test_a_video_by_the_encoder_of_a_run(run, capsys):
    video = next((run / "videos").glob("film 3*"))
    out = run / "video.html"
    argv = ["show", str(video), "--encoder", str(run / "run"), "--out", str(out), "--clips", "1", "--device", "cpu"]
    assert cli.main(argv) == 0
    page = Page(out)
    assert page.ids == ["curves", "masks", "maps", "attention", "nearest"] and page.text.count("film 3.mp4") >= 3
    assert "film 3.mp4" not in page.text.split("Nearest clips")[1].split("+")[-1], "not nearest to itself"


def test_what_there_is_none_of_is_said(run, tmp_path):
    moved = tmp_path / "run"
    shutil.copytree(run / "run", moved)
    (moved / "metrics.jsonl").unlink()
    text = (run / "train.csv").read_text()
    try:
        (run / "train.csv").unlink()
        assert cli.main(["show", str(moved), "--out", str(tmp_path / "p.html"), "--device", "cpu"]) == 0
    finally:
        (run / "train.csv").write_text(text)
    page = Page(tmp_path / "p.html")
    assert page.ids == ["notes"] and "no such manifest" in page.text and "no curves" in page.text


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["{video}"], "is a video; name the run whose features are shown with --encoder RUN"),
        (["nowhere.mp4", "--encoder", "{run}"], "nowhere.mp4: no such file"),
        (["{run}", "--out", "page.pdf"], "--out page.pdf: expected a name that ends in .html"),
        (["nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_shown_is_refused(run, argv, words, capsys):
    places = {"video": next((run / "videos").glob("film 3*")), "run": run / "run"}
    assert cli.main(["show", *(word.format(**places) for word in argv)]) == 2
    err = capsys.readouterr().err
    assert words in err and err.splitlines()[-1].startswith("error: ")
