"""``data.decoder: auto``: measured by a new run where there is a choice, and kept when it goes on."""

import dataclasses
import json

import pytest

from vjepa_fast.data.decoders import DECODERS
from vjepa_fast.data.decoders.pyav import PyAV
from vjepa_fast.data.fastest import Fastest
from vjepa_fast.trainer import streams
from vjepa_fast.trainer.distributed import Distributed
from vjepa_fast.trainer.trainer import Trainer

from .conftest import config


class Quick(PyAV):
    pass


@pytest.fixture
def cfg(tmp_path, tiny_suites):
    return config(tmp_path / "run", data={"datasets": (str(tiny_suites["motion8"]["train"]),)})


def decoder_of(trainer):
    try:
        (loader,) = trainer.loaders
        return type(loader._reader.decoder)
    finally:
        trainer.close()


def test_a_run_keeps_its_decoder(cfg, monkeypatch):
    monkeypatch.setattr(DECODERS, "_entries", {"pyav": DECODERS["pyav"], "quick": Quick})
    asked = []
    monkeypatch.setattr(streams, "fastest", lambda *args, **kwargs: asked.append(1) or Fastest("quick", {"quick": 9.0}))
    trainer = Trainer(cfg)
    assert decoder_of(trainer) is Quick and "data.decoder: auto is quick (quick 9 clips/s)" in trainer.notes[-1]
    versions = json.loads((trainer.folder / "versions.json").read_text())
    assert versions["data.decoder"] == "quick" and asked == [1]
    assert trainer.cfg.data.decoder == "auto"

    def loaders(saved):
        opened, measured, notes = streams.open_streams(
            cfg, Distributed(), 0, {"versions": saved, "sampler": {"start_samples": [0]}}
        )
        for loader in opened:
            loader.close()
        return type(opened[0]._reader.decoder), measured, notes

    assert loaders(versions) == (Quick, {"data.decoder": "quick"}, [])
    assert loaders({}) == (PyAV, {}, [])  # it began where there was no choice
    monkeypatch.setattr(DECODERS, "_entries", {"pyav": DECODERS["pyav"]})
    used, measured, notes = loaders(versions)
    assert (used, measured) == (PyAV, {}) and "auto was quick" in notes[0]
    assert asked == [1]


def test_without_a_choice_nothing_is_measured(cfg, monkeypatch):
    monkeypatch.setattr(DECODERS, "_entries", {"pyav": DECODERS["pyav"], "quick": Quick})
    monkeypatch.setattr(streams, "fastest", lambda *args, **kwargs: pytest.fail("measured"))
    named = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, decoder="quick"))
    assert decoder_of(Trainer(named)) is Quick
    monkeypatch.setattr(DECODERS, "_entries", {"pyav": DECODERS["pyav"]})
    trainer = Trainer(cfg, resume=False)
    assert decoder_of(trainer) is PyAV and "data.decoder" not in trainer.versions
