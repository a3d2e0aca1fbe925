"""docs/rooms.py: the picture of rooms and imports."""

import importlib.util
import pathlib

ROOT = pathlib.Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("rooms", ROOT / "docs" / "rooms.py")
rooms = importlib.util.module_from_spec(spec)
spec.loader.exec_module(rooms)


def write(root, **files):
    (root / "kernels").mkdir(parents=True)
    for name, text in files.items():
        path = root / "vjepa_fast" / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".py").write_text(text)


def test_this_package_has_no_circle():
    lines, edges = rooms.arrows(ROOT)
    floor, circle = rooms.floors(set(lines), set(edges))
    assert not circle
    assert floor["ops"] < floor["layers"] < floor["models"] < floor["trainer"] < floor["study"] < floor["cli"]
    assert edges["trainer", "models"] > 0
    assert all(floor[a] > floor[b] for a, b in edges)


def test_arrows_are_found_however_they_are_written(tmp_path):
    write(
        tmp_path,
        a__one="from vjepa_fast.b import two\nfrom ..c import three\n",
        b__two="def f():\n    import vjepa_fast.c.three\n",
        c__three="from vjepa_fast.errors import UserError\nfrom . import four\n",
        c__four="",
        errors="",
    )
    lines, edges = rooms.arrows(tmp_path)
    assert lines == {"a": 2, "b": 2, "c": 2}
    assert set(edges) == {("a", "b"), ("a", "c"), ("b", "c")}
    assert rooms.floors(set(lines), set(edges)) == ({"c": 0, "b": 1, "a": 2}, set())


def test_a_circle_is_found(tmp_path):
    write(tmp_path, a__x="import vjepa_fast.b.x\n", b__x="import vjepa_fast.a.x\n", c__x="")
    lines, edges = rooms.arrows(tmp_path)
    assert rooms.floors(set(lines), set(edges))[1] == {"a", "b"}


def test_the_picture_is_drawn(tmp_path):
    lines, edges = rooms.arrows(ROOT)
    rooms.draw(lines, edges, rooms.floors(set(lines), set(edges))[0], tmp_path / "rooms.svg")
    text = (tmp_path / "rooms.svg").read_text()
    assert text.lstrip().startswith("<?xml") and "<svg" in text
