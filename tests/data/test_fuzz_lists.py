"""Mutated manifests and lists: read, or refused in one line that names the file; nothing else."""

import random

import pytest

from tests.data.trees import Trees
from vjepa_fast.data import load_manifest
from vjepa_fast.data.prepare import DATA_SETS, Request
from vjepa_fast.errors import UserError

WORDS = [
    '"',
    "'",
    ",",
    "\t",
    "::",
    " ",
    "\r",
    "\0",
    "\u2028",
    "\x85",
    "²",
    "٣",
    "-",
    "+",
    "1e3",
    "9" * 30,
    "é",
    "\ufeff",
]
WORDS += ["\\", "/", "..", "[", "]", "{", "}", "null", "label", "\n\n", ";"]


def mutated(content: bytes, rng: random.Random) -> bytes:
    content = bytearray(content)
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(content) + 1)
        kind = rng.randrange(5)
        if kind == 0:
            content[at:at] = rng.choice(WORDS).encode()
        elif kind == 1:
            del content[at : at + rng.randint(1, 30)]
        elif kind == 2 and at < len(content):
            content[at] ^= 1 << rng.randrange(8)
        elif kind == 3:
            content[at:at] = content[: rng.randint(1, 60)]
        else:
            content = content[:at] if rng.random() < 0.3 else content + bytes(rng.choices(range(256), k=3))
    return bytes(content)


def refused_in_one_line(read, where):
    """Whether ``read()`` is refused."""
    reason = None
    try:
        read()
    except UserError as error:
        reason = str(error)
    assert reason is None or ("\n" not in reason and str(where) in reason)
    return reason is not None


def test_mutated_manifests(tmp_path):
    rng, refused = random.Random(0), 0
    plain = "".join(f"folder {i % 3}/film_{i}.mp4 {i % 4}\n" for i in range(12))
    forms = (plain, plain.replace(".mp4 ", ".mp4,"), plain.replace(".mp4 ", ".mp4\t").replace("\n", "\r\n"))
    file = tmp_path / "m.csv"
    for _ in range(200):
        file.write_bytes(mutated(rng.choice(forms).encode(), rng))

        def read():
            manifest = load_manifest(file)
            assert len(manifest.paths) == len(manifest.labels) > 0
            assert manifest.labels.min() >= 0
            assert manifest.hash

        refused += refused_in_one_line(read, file)
    assert 20 < refused < 180


@pytest.mark.parametrize(
    ("name", "more"), [("ucf101", {}), ("hmdb51", {}), ("ssv2", {}), ("diving48", {}), ("kinetics400", {}), ("csv", {})]
)
def test_mutated_lists(name, more, tmp_path):
    root = tmp_path / name
    if name == "csv":
        root.mkdir()
        (root / "train.csv").write_text("path,label\na b.mp4,cat\n" + "".join(f"{i}.mp4,dog\n" for i in range(9)))
    else:
        trees = Trees(tmp_path)
        trees.film = lambda path: None  # the lists alone
        getattr(trees, name)(root)
    lists = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    rng, refused = random.Random(name), 0
    for _ in range(40):
        path = rng.choice(sorted(lists))
        path.write_bytes(mutated(lists[path], rng))
        refused += refused_in_one_line(lambda: DATA_SETS[name]().read(Request(source=root, out=tmp_path / "out")), root)
        path.write_bytes(lists[path])
    assert refused > 5
