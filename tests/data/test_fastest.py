"""``data.decoder: auto`` where there is a choice: the fastest decoder that shows what PyAV does."""

import time

import pytest

from vjepa_fast.data import fastest as module
from vjepa_fast.data.decoders import DECODERS
from vjepa_fast.data.decoders.pyav import PyAV
from vjepa_fast.data.fastest import fastest
from vjepa_fast.errors import DataError


class Slow(PyAV):
    def read_clip(self, *args, **kwargs):
        time.sleep(0.02)
        return super().read_clip(*args, **kwargs)


class Other(PyAV):
    def read_clip(self, *args, **kwargs):
        return 255 - super().read_clip(*args, **kwargs)


class Broken(PyAV):
    def read_clip(self, *args, **kwargs):
        raise RuntimeError("no\nluck")


class Refusing(PyAV):
    def read_clip(self, path, *args, **kwargs):
        raise DataError(f"{path}: not for me")


@pytest.fixture
def decoders(monkeypatch):
    """``decoders(name=class, ...)``: there are these beside PyAV."""

    def use(**kinds):
        monkeypatch.setattr(DECODERS, "_entries", {"pyav": DECODERS["pyav"], **kinds})

    monkeypatch.setattr(module, "_SECONDS", 0.2)
    monkeypatch.setattr(module, "_GAIN", 1.0)
    return use


def test_the_fastest_that_shows_the_same_is_taken(decoders, tiny_suites, make_config):
    cfg = make_config(tiny_suites["motion8"]["train"])
    decoders(slow=Slow, other=Other, broken=Broken, refusing=Refusing)
    found = fastest(cfg)
    assert found.name == "pyav" and set(found.clips_per_s) == {"pyav", "slow"}
    assert found.clips_per_s["pyav"] > found.clips_per_s["slow"] > 1
    assert "grey levels off" in found.refused["other"] and found.refused["broken"] == "RuntimeError: no luck"
    assert "cannot be read" in found.refused["refusing"]
    decoders(pyav=Slow, quick=PyAV)
    found = fastest(cfg)
    assert found.name == "quick" and found.note("data").startswith("data.decoder: auto is quick (pyav ")


def test_a_library_that_fails_is_no_end_of_the_run(decoders, tiny_suites, make_config):
    decoders(pyav=Broken, quick=PyAV)
    assert fastest(make_config(tiny_suites["motion8"]["train"])) == module.Fastest("pyav")


def test_files_of_no_use_are_left_to_the_run(decoders, broken, write_manifest, make_config):
    decoders(slow=Slow)
    manifest = write_manifest([broken["zero"]] * 8)
    assert fastest(make_config(manifest)) == module.Fastest("pyav")
