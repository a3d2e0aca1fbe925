"""``data.root``: where the paths of manifests start, and what they do not lead out of."""

import os
import tarfile

import pytest

from vjepa_fast.config.schema import DataConfig
from vjepa_fast.data import load_manifest
from vjepa_fast.data.manifests.root import Root
from vjepa_fast.errors import DataError


@pytest.fixture
def tree(tmp_path):
    """(folder with a file and links in it, folder of manifests); ``secret.mp4`` lies beside the first."""
    root, lists = tmp_path / "root", tmp_path / "lists"
    (root / "a").mkdir(parents=True)
    lists.mkdir()
    for file in (root / "a" / "x.mp4", tmp_path / "secret.mp4"):
        file.write_bytes(b"film")
    (root / "inside.mp4").symlink_to(root / "a" / "x.mp4")
    (root / "out.mp4").symlink_to(tmp_path / "secret.mp4")
    (root / "up").symlink_to(tmp_path, target_is_directory=True)
    return root, lists


def manifest(lists, *paths):
    (lists / "m.csv").write_text("".join(f"{path} 0\n" for path in paths))
    return lists / "m.csv"


def test_relative_paths_start_from_the_root(tree):
    root, lists = tree
    found = load_manifest(manifest(lists, "a/x.mp4", root / "a/x.mp4", "inside.mp4"), Root(str(root)))
    assert found.paths == [str(root / "a/x.mp4"), str(root / "a/x.mp4"), str(root / "inside.mp4")]


@pytest.mark.parametrize(
    "path", ["../secret.mp4", "a/../../secret.mp4", "{outside}", "out.mp4", "up/secret.mp4", "a/.."]
)
def test_what_leads_out_is_refused_and_named(tree, path):
    root, lists = tree
    path = path.format(outside=root.parent / "secret.mp4")
    file = manifest(lists, "a/x.mp4", path)
    with pytest.raises(DataError, match=r"lies outside of data.root .*root_confine: false") as error:
        load_manifest(file, Root(str(root)))
    assert str(file) in str(error.value) and path in str(error.value)
    assert len(load_manifest(file, Root(str(root), confine=False))) == 2


def test_without_a_root_nothing_changes(tree):
    root, lists = tree
    outside = str(root.parent / "secret.mp4")
    assert load_manifest(manifest(lists, outside)).paths == [outside]
    assert Root.of(DataConfig()) is None


def test_a_neighbour_of_the_same_beginning_is_outside(tree):
    root, lists = tree
    (root.parent / "root2").mkdir()
    (root.parent / "root2" / "x.mp4").write_bytes(b"film")
    with pytest.raises(DataError, match="outside"):
        load_manifest(manifest(lists, root.parent / "root2" / "x.mp4"), Root(str(root)))


def test_shards_are_looked_at_before_they_are_opened(tree):
    root, lists = tree
    for folder in (root, lists):
        with tarfile.open(folder / "t.tar", "w") as archive:
            archive.add(root / "a" / "x.mp4", "x.mp4")
    assert len(load_manifest(str(root / "t.tar"), Root(str(root)))) == 1
    for entry in (str(lists / "t.tar"), "memory://none.tar"):
        with pytest.raises(DataError, match="outside"):
            load_manifest(entry, Root(str(root)))
    assert not os.path.exists(lists / "t.tar.samples.json")


def test_a_root_that_is_not_there(tree):
    root, lists = tree
    with pytest.raises(DataError, match="data.root: .*no such folder"):
        load_manifest(manifest(lists, "a/x.mp4"), Root.of(DataConfig(root=str(root / "none"))))
