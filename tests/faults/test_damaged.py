"""A checkpoint is used as it was written, or refused; the one before takes its place."""

import logging
import math
import shutil
from pathlib import Path

import pytest
import torch

from vjepa_fast.errors import CheckpointError, TrainingError
from vjepa_fast.models import digests, load_encoder
from vjepa_fast.trainer import checkpoint, train

from .conftest import replaced, rows, tiny
from .mutations import attempt, mutated

NAME = "encoder/module.backbone.blocks.0.attn.qkv.weight"


@pytest.fixture(scope="module")
def run(manifest, tmp_path_factory):
    """A run of 4 steps with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(tiny(manifest, folder), max_steps=4)
    return folder


@pytest.fixture
def copy(run, manifest, tmp_path):
    """(its configuration, its newest checkpoint) of a copy of the run."""
    shutil.copytree(run, tmp_path / "run")
    return tiny(manifest, tmp_path / "run"), tmp_path / "run" / "checkpoints" / "step-00000004.pt"


def flip(path: Path, tensor: torch.Tensor, bit: int = 22) -> None:
    """One bit of the middle value of a tensor in the file."""
    data, raw = bytearray(path.read_bytes()), tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    assert data.count(raw) == 1
    at = data.index(raw) + len(raw) // 8 * 4
    data[at + bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def test_one_bit_of_a_weight_is_found_and_its_tensor_named(copy):
    _, path = copy
    content = checkpoint.load(path)
    flip(path, content["encoder"]["module.backbone.blocks.0.attn.qkv.weight"], bit=0)
    loads = (checkpoint.load, lambda p: load_encoder(p, "encoder"), lambda p: load_encoder(p.parents[1], "encoder"))
    for load in loads:
        with pytest.raises(CheckpointError, match=NAME) as error:
            load(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
    load_encoder(path)  # the target encoder is as it was


@pytest.mark.parametrize(("entry", "key"), [("opt", "exp_avg"), ("rng", "cpu")])
def test_moments_and_generators_are_held_to_their_digests(copy, entry, key):
    _, path = copy
    content = checkpoint.load(path)
    tensor = content["rng"]["cpu"] if entry == "rng" else next(iter(content["opt"]["state"].values()))[key]
    flip(path, tensor, bit=0)
    with pytest.raises(CheckpointError, match=rf"{entry}/.*{key} is not what was written"):
        checkpoint.load(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update(step=5), "step is not"),
        (lambda c: c["sampler"].update(start_step=40), "sampler is not"),
        (lambda c: c["config"]["data"].update(crop_size=64), "config is not"),
        (lambda c: c["encoder"].pop("module.backbone.patch_embed.proj.bias"), "encoder is not"),
        (lambda c: c["heads"].update(more=torch.ones(1)), "heads"),
        (lambda c: c.update(digests=3), "digests: expected"),
    ],
)
def test_what_is_no_tensor_is_held_to_its_digest(copy, change, words):
    _, path = copy
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=words):
        checkpoint.load(path)


def test_digests_of_all_kinds_of_tensors():
    kinds = {
        "bf16": torch.ones(3, dtype=torch.bfloat16),
        "scalar": torch.tensor(1.0),
        "none": torch.zeros(0, 4),
        "strided": torch.arange(12).reshape(3, 4).t(),
        "bool": torch.tensor([True, False]),
    }
    found = digests.digests_of({"x": kinds, "y": [math.nan, {"a": (1, None)}]})
    assert set(found) == {"x", "y", *(f"x/{name}" for name in kinds)}
    assert len(set(found.values())) == len(found)
    assert digests.tensor_digest(kinds["strided"]) == digests.tensor_digest(kinds["strided"].contiguous())
    assert digests.tensor_digest(torch.ones(2)) != digests.tensor_digest(torch.ones(2).view(torch.int32))


@pytest.mark.parametrize(
    "damage",
    [
        lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]),
        lambda p: p.write_bytes(b""),
        lambda p: flip(p, checkpoint.load(p)["encoder"]["module.backbone.blocks.0.attn.qkv.weight"]),
        lambda p: torch.save({**torch.load(p, weights_only=True), "opt": "x", "digests": None}, p),
    ],
    ids=["half", "empty", "bit", "kind"],
)
def test_the_checkpoint_before_takes_its_place_with_a_word(copy, undisturbed, damage, capfd):
    cfg, path = copy
    damage(path)
    before = path.read_bytes()
    with pytest.raises(CheckpointError) as error:
        train(cfg, fallback=False)
    assert str(path) in str(error.value) and path.read_bytes() == before
    result = train(cfg)
    said = capfd.readouterr().err
    assert "warning:" in said and "taken is step-00000002.pt; kept as step-00000004.pt.damaged" in said
    assert path.with_name(path.name + ".damaged").read_bytes() == before
    assert rows(result.folder) == undisturbed and result.step == len(undisturbed) == 12


def test_with_no_sound_checkpoint_the_error_says_so(copy):
    cfg, path = copy
    for p in checkpoint.all_in(cfg.folder):
        p.write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"step-00000004.pt: .*nor can the 1 before it be used; --no-resume"):
        train(cfg)
    assert len(checkpoint.all_in(cfg.folder)) == 2  # nothing was renamed


def test_a_checkpoint_without_digests_is_read_and_said_once(copy, caplog):
    cfg, path = copy
    content = torch.load(path, weights_only=True)
    del content["digests"]
    torch.save(content, path)
    with caplog.at_level(logging.INFO, "vjepa_fast"):
        for _ in range(2):
            checkpoint.load(path)
            load_encoder(path)
    assert [r.message for r in caplog.records if "has no digests" in r.message] == [
        f"{path}: has no digests (an earlier version wrote it), so damage in it would not be noticed"
    ]
    assert train(cfg, max_steps=5).step == 5


def test_an_update_that_is_not_finite_never_takes_the_place_of_a_sound_checkpoint(copy):
    cfg, path = copy
    cfg = replaced(cfg, "runtime", save_every=1, keep_checkpoints=1)
    wild = replaced(cfg, "optimization", lr=1e39, start_lr=1e39, final_lr=1e39)
    # by the thread that saves step 5, or before it by step 6
    with pytest.raises(TrainingError, match=r"step [56]: .*not finite.*lr"):
        train(wild)
    assert checkpoint.latest(cfg.folder) == path
    result = train(cfg)
    assert result.step == 12 and [r["step"] for r in rows(cfg.folder)] == list(range(1, 13))


def test_a_checkpoint_of_before_that_is_not_finite_is_passed_over(copy, capfd):
    cfg, path = copy
    content = torch.load(path, weights_only=True)
    next(iter(content["encoder"].values())).view(-1)[0] = math.inf
    torch.save({k: v for k, v in content.items() if k != "digests"}, path)
    train(cfg, max_steps=3)
    assert "is not finite" in capfd.readouterr().err


@pytest.mark.parametrize("key", ["lr", "betas", "eps", "weight_decay", "WD_exclude"])
def test_a_setting_of_the_optimiser_that_is_missing_is_named(copy, key):
    cfg, path = copy
    content = torch.load(path, weights_only=True)
    del content["opt"]["param_groups"][3][key], content["digests"]
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=f"optimiser state does not fit this recipe .param_groups: no {key}"):
        train(cfg, fallback=False)


@pytest.mark.parametrize("seed", [*range(20), 37, 50, 63, 130, 307])
def test_nothing_but_clear_errors_from_mutated_checkpoints(copy, seed):
    cfg, path = copy
    what = mutated(path, seed)
    assert attempt(cfg, path) in ("read", "refused"), what
