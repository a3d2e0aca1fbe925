"""What ``runtime.dtype: auto`` becomes, on resume too, and which runs may compute in 8 bits."""

import json

import pytest
import torch

from vjepa_fast.data.synthetic import render_suite
from vjepa_fast.errors import ConfigError
from vjepa_fast.layers import fp8
from vjepa_fast.layers.linear import Linear
from vjepa_fast.trainer import precision, train
from vjepa_fast.trainer.distributed import Distributed
from vjepa_fast.trainer.step import TrainStep
from vjepa_fast.trainer.trainer import Trainer

from .conftest import batch, config

CPU, CUDA, ONE = torch.device("cpu"), torch.device("cuda"), Distributed()


def auto(**sections):
    return config(runtime={"dtype": "auto"}, **sections)


@pytest.mark.parametrize(
    ("single", "half", "name"), [(2.0, 1.0, "bfloat16"), (1.15, 1.0, "float32"), (1.0, 3.0, "float32")]
)
def test_auto_takes_the_faster_one_on_a_cpu_and_tells(monkeypatch, single, half, name):
    asked = []
    monkeypatch.setattr(precision, "measure", lambda *args: (asked.append(args), (single, half))[1])
    dtype, notes = precision.choose(auto(), CPU, ONE)
    assert dtype == getattr(torch, name)
    assert len(notes) == 1 and f"auto is {name} on this CPU (a block of width 48" in notes[0]
    work, threads = asked[0]
    assert work == precision.Work(48, 2, 4.0, False, ("v2.1", 32), 3, (2, 4, 4)) and threads == torch.get_num_threads()
    named = auto(
        model={"embed_dim": None, "num_heads": None, "use_rope": False},
        data={"crop_size": 224, "patch_size": 16, "dataset_fpcs": (4, 16), "batch_size": 8},
    )
    assert precision.choose(named, CPU, ONE)[0] == dtype
    assert asked[1][0] == precision.Work(768, 12, 4.0, False, None, 1, (2, 14, 14))  # cut to what a second allows


def test_named_dtypes_and_cuda_are_not_measured(monkeypatch):
    monkeypatch.setattr(precision, "measure", None)
    assert precision.choose(config(runtime={"dtype": "bfloat16"}), CPU, ONE) == (torch.bfloat16, [])
    assert precision.choose(config(), CPU, ONE) == (torch.float32, [])
    assert precision.choose(auto(), CUDA, ONE) == (torch.bfloat16, [])
    assert precision.choose(auto(model={"num_heads": 5}), CPU, ONE)[0] == torch.float32  # refused when it is built


def test_all_processes_take_what_the_first_one_measured(monkeypatch):
    monkeypatch.setattr(precision, "measure", lambda *args: (1.0, 2.0))
    world = Distributed()
    world.gather = lambda value: [(2.0, 1.0), value]
    assert precision.choose(auto(), CPU, world)[0] == torch.bfloat16


def test_measure_tells_seconds_and_draws_nothing():
    before = torch.get_rng_state()
    for values in ({}, {"use_rope": False, "use_silu": True}):
        work = precision._work(auto(model=values))
        seconds = precision.measure(work, torch.get_num_threads())
        assert len(seconds) == 2 and all(1e-6 < s < 10 for s in seconds)
        assert precision.measure(work, torch.get_num_threads()) is seconds  # once per process
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("versions", "device", "dtype", "told"),
    [
        ({"dtype": "bfloat16", "device": "cpu (EPYC)"}, CPU, torch.bfloat16, None),
        ({"dtype": "float32", "device": "cpu (EPYC)"}, CPU, torch.float32, None),
        ({"dtype": "float32", "device": "cuda:0 (H100)"}, CUDA, torch.float32, None),
        (
            {"dtype": "bfloat16", "device": "cuda:0 (H100)"},
            CPU,
            torch.float32,
            "auto was bfloat16 on cuda and is float32",
        ),
        ({"dtype": "float32", "device": "cpu (EPYC)"}, CUDA, torch.bfloat16, "auto was float32 on cpu and is bfloat16"),
        ({"device": "cpu (EPYC)"}, CPU, torch.float32, None),  # written before it was told: auto was float32 on a CPU
        ({}, CUDA, torch.bfloat16, None),
    ],
)
def test_going_on_keeps_the_dtype_or_tells(monkeypatch, versions, device, dtype, told):
    monkeypatch.setattr(precision, "measure", None)
    found, notes = precision.choose(auto(), device, ONE, {"versions": versions})
    assert found == dtype
    assert (told is None and not notes) or (told in notes[0] and len(notes) == 1)


def test_a_run_that_began_in_bfloat16_goes_on_in_it(monkeypatch, tmp_path):
    manifest = render_suite("motion8", tmp_path / "data", splits={"train": 8}, size=32, frames=8, seed=0)["train"]
    cfg = auto(folder=tmp_path / "run", data={"datasets": (manifest,)})
    monkeypatch.setattr(precision, "measure", lambda *args: (2.0, 1.0))
    train(cfg, max_steps=2)
    assert json.loads((tmp_path / "run" / "versions.json").read_text())["dtype"] == "bfloat16"
    monkeypatch.setattr(precision, "measure", lambda *args: (1.0, 2.0))
    trainer = Trainer(cfg)
    try:
        assert trainer.step.dtype == torch.bfloat16 and trainer.done == 2
        assert trainer.versions["dtype"] == "bfloat16"
    finally:
        trainer.close()


def test_fp8_is_refused_with_every_reason():
    with pytest.raises(ConfigError) as caught:
        TrainStep(config(runtime={"fp8": True}))
    text = str(caught.value)
    assert text.startswith("runtime.fp8: needs a CUDA device, this run is on cpu; needs runtime.dtype=bfloat16, got")
    assert "needs widths that are multiples of 16, got layers of 24 -> 24, 24 -> 72, 24 -> 96, 96 -> 24;" in text


def test_fp8_reaches_the_linear_layers_of_all_blocks_and_trains(monkeypatch):
    monkeypatch.setattr(fp8, "objections", lambda device: [])
    model = {"pred_embed_dim": 32}
    step = TrainStep(config(runtime={"fp8": True}, model=model), dtype=torch.bfloat16)
    plain = TrainStep(config(model=model), dtype=torch.bfloat16)
    for module in (step.encoder, step.predictor, step.target):
        layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, Linear)}
        assert all(layer.fp8 == ("blocks." in name) for name, layer in layers.items()) and len(layers) > 4
    assert step.state_dict()["encoder"].keys() == plain.state_dict()["encoder"].keys()
    out, want = step(batch(), 0), plain(batch(), 0)
    assert out.loss != want.loss and abs(out.loss - want.loss) < 0.02 * want.loss
    assert 0.5 < out.grad_norm / want.grad_norm < 2
    losses = [float(step(batch(), i).loss) for i in range(1, 9)]
    assert losses[-1] < losses[0]
