"""`monitor.probe`: accuracy in the rows, and a training that does not notice it."""

import dataclasses
import random

import numpy as np
import pytest
import torch

from vjepa_fast import config as configs
from vjepa_fast.data import load_manifest
from vjepa_fast.errors import ConfigError, DataError
from vjepa_fast.evaluation import quick_probe, random_encoder
from vjepa_fast.evaluation.run import quick
from vjepa_fast.trainer import checkpoint, train
from vjepa_fast.trainer.watch import random_states_kept

from .conftest import config
from .test_train import rows, same_checkpoints

CPU = torch.device("cpu")


@pytest.fixture
def cfg(manifests, tmp_path):
    objectives = {"pred": {}, "sigreg": {"num_slices": 8}}  # draws random numbers of its own at every step
    data, runtime = {"datasets": (manifests["train"],)}, {"save_every": 3, "tensorboard": True}
    return config(tmp_path / "run", data=data, runtime=runtime, objectives=objectives)


def watched(cfg, folder, **monitor):
    made = configs.schema.MonitorConfig(**{"probe": "knn", "every": 2, "clips": 16, **monitor})
    return dataclasses.replace(cfg, monitor=made, folder=str(folder))


def without(found):
    return [{**r, "monitors": {k: v for k, v in r["monitors"].items() if k != "probe_knn"}} for r in found]


def noisy(cfg, device):
    """`quick_probe` that draws from all generators."""
    probe = quick_probe(cfg, device)

    def call(encoder):
        torch.rand(3), np.random.rand(3), random.random()
        return probe(encoder)

    return call


def test_a_run_is_the_same_with_and_without_it_and_when_resumed(cfg, tmp_path):
    plain = train(cfg)
    probed = train(watched(cfg, tmp_path / "probed"), probe=noisy)
    same_checkpoints(plain.checkpoint, probed.checkpoint)
    states = [checkpoint.load(result.checkpoint)["rng"]["cpu"] for result in (plain, probed)]
    assert torch.equal(*states)
    assert without(rows(probed.folder)) == rows(plain.folder)
    read = {r["step"]: r["monitors"]["probe_knn"] for r in rows(probed.folder) if "probe_knn" in r["monitors"]}
    assert list(read) == [2, 4, 6, 8, 10, 12] and all(0 <= accuracy <= 1 for accuracy in read.values())
    parts = watched(cfg, tmp_path / "parts")
    train(parts, max_steps=7, probe=noisy)
    for path in checkpoint.all_in(parts.folder)[1:]:
        path.unlink()
    resumed = train(parts, probe=noisy)
    assert rows(resumed.folder) == rows(probed.folder)
    same_checkpoints(resumed.checkpoint, plain.checkpoint)


def test_it_reads_the_target_encoder_of_the_step(cfg, tmp_path):
    seen = []

    def make(cfg, device):
        def probe(encoder):
            seen.append({k: v.clone() for k, v in encoder.state_dict().items()})
            return {"probe_knn": len(seen) / 10}

        return probe

    result = train(watched(cfg, tmp_path / "probed", every=3), max_steps=6, probe=make)
    assert [r["monitors"].get("probe_knn") for r in rows(result.folder)] == [
        None,
        None,
        pytest.approx(0.1),
        None,
        None,
        pytest.approx(0.2),
    ]
    saved = torch.load(result.checkpoint, weights_only=True)["target_encoder"]
    assert all(torch.equal(v, seen[1][k.removeprefix("module.backbone.")]) for k, v in saved.items())
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(result.folder / "tensorboard"))
    events.Reload()
    assert [(e.step, round(e.value, 3)) for e in events.Scalars("monitors/probe_knn")] == [(3, 0.1), (6, 0.2)]


def test_it_is_off_by_default_and_asked_for_without_one_is_refused(cfg, tmp_path):
    assert configs.Config().monitor.probe is None and "monitor" not in configs.to_dict(configs.Config())
    with pytest.raises(ConfigError, match="monitor.probe: this program passes no probe to the trainer"):
        train(watched(cfg, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="monitor.val: not given, and monitor.train is"):
        configs.from_dict({"monitor": {"train": "train.csv"}})


def test_random_states():
    def states():
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()

    before = states()
    with random_states_kept(CPU):
        torch.rand(3), np.random.rand(3), random.random()
        assert states() != before
    assert states() == before


@pytest.mark.parametrize("name", ["knn", "linear"])
def test_accuracy_tells_what_an_encoder_sees(cfg, tmp_path, manifests, name, monkeypatch):
    """Features are replaced by the label for one encoder, and by noise for the other."""
    from vjepa_fast.evaluation import Features

    given = {"train": manifests["train"], "val": manifests["val"], "clips": 40}
    probe = quick_probe(watched(cfg, tmp_path, probe=name, **given), CPU)
    for informed in (True, False):

        def features(encoder, source, informed=informed, **how):
            noise = np.random.default_rng(len(source.labels)).standard_normal((len(source.labels), 8))
            return Features(noise + 9 * informed * np.eye(8)[source.labels], source.labels)

        monkeypatch.setattr(quick, "extract_features", features)
        accuracy = probe(random_encoder(cfg))[f"probe_{name}"]
        assert accuracy == 1 if informed else accuracy < 0.5


def test_nothing_outside_of_the_root_of_the_recipe(cfg, tmp_path, manifests):
    (tmp_path / "root").mkdir()
    (tmp_path / "val.csv").write_text(f"{load_manifest(manifests['val']).paths[0]} 0\n")
    cfg = watched(cfg, tmp_path, train=str(tmp_path / "val.csv"), val=str(tmp_path / "val.csv"))
    root = dataclasses.replace(cfg.data, root=str(tmp_path / "root"))
    with pytest.raises(DataError, match="lies outside of data.root"):
        quick_probe(dataclasses.replace(cfg, data=root), CPU)


def test_manifests_and_suites_become_few_clips_of_every_class(cfg, tmp_path, manifests, monkeypatch):
    sources = []

    def features(encoder, source, **how):
        sources.append(source)
        return real(encoder, source, **how)

    real = quick.extract_features
    monkeypatch.setattr(quick, "extract_features", features)
    given = {"train": manifests["train"], "val": manifests["val"]}
    quick_probe(watched(cfg, tmp_path, clips=32, **given), CPU)(random_encoder(cfg))
    assert [np.bincount(s.labels).tolist() for s in sources] == [[4] * 8, [2] * 8]
    assert sources[0].clips.shape == (32, 3, 4, 32, 32)
    monkeypatch.setattr(quick, "fits_in_memory", lambda samples, view: False)
    sources.clear()
    quick_probe(watched(cfg, tmp_path, clips=16, **given), CPU)(random_encoder(cfg))
    assert [np.bincount(s.labels).tolist() for s in sources] == [[4] * 4, [2] * 4]  # four of a class at least
    sources.clear()
    for suite, classes in (("motion8", 8), ("objects", 48)):
        quick_probe(watched(cfg, tmp_path, suite=suite, clips=96), CPU)(random_encoder(cfg))
        train_part, val_part = sources[-2:]
        assert np.bincount(train_part.labels).tolist() == [96 // classes] * classes
        assert not torch.equal(train_part.clips, val_part.clips)
    same = {"train": manifests["train"], "val": manifests["train"]}
    with pytest.raises(DataError, match="train and val part must be apart"):
        quick_probe(watched(cfg, tmp_path, **same), CPU)
