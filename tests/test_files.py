"""Files appear whole or not at all."""

import json
import os

import pytest

from vjepa_fast import files
from vjepa_fast.errors import UserError


def test_the_file_is_there_only_when_the_block_has_ended(tmp_path):
    path = tmp_path / "new" / "film.mp4"
    with files.atomic_path(path) as temporary:
        temporary.write_bytes(b"half")
        assert not path.exists()
        assert temporary.parent == path.parent
        assert temporary.name.startswith(".") and temporary.name.endswith(".tmp")  # no scanner takes it for data
    assert path.read_bytes() == b"half"
    assert os.listdir(path.parent) == ["film.mp4"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_was_there_stays_when_the_block_raises(tmp_path, error):
    path = tmp_path / "a.txt"
    files.write_text(path, "before")
    with pytest.raises(error), files.atomic_file(path) as f:  # noqa: PT012 (the block is what is tested)
        f.write("after")
        raise error
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_file_that_cannot_be_written_is_an_error_of_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/a.json: cannot be written \(.+\); choose another with --json") as error:
        files.write_json(tmp_path / "file" / "a.json", {}, hint="choose another with --json")
    assert "\n" not in str(error.value)


def test_contents_are_flushed_to_the_disk_before_the_name_changes(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), replace(a, b)))
    files.write_bytes(tmp_path / "a", b"1")
    assert calls == ["fsync", "replace", "fsync"]  # the file, its name, the folder
    calls.clear()
    with files.atomic_path(tmp_path / "b", sync=False) as temporary:
        temporary.write_bytes(b"2")
    assert calls == ["replace"]


def test_text_and_json(tmp_path):
    files.write_text(tmp_path / "a", "é\r\n")
    assert (tmp_path / "a").read_bytes() == "é\r\n".encode()
    files.write_json(tmp_path / "b", {"x": [1, 2]})
    assert (tmp_path / "b").read_text() == json.dumps({"x": [1, 2]}, indent=1) + "\n"
