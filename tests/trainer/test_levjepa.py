"""Whole runs of `method: levjepa` on rendered videos, and one step of it against a plain computation."""

import dataclasses
import json

import pytest
import torch

from vjepa_fast import config as configs
from vjepa_fast import ops
from vjepa_fast.config import schema
from vjepa_fast.data import ClipLoader
from vjepa_fast.errors import CheckpointError, ConfigError
from vjepa_fast.layers.attention.sdpa import Sdpa
from vjepa_fast.models import load_encoder
from vjepa_fast.objectives.epps_pulley import draw
from vjepa_fast.ops import _check
from vjepa_fast.trainer import check, checkpoint, preflight, train
from vjepa_fast.trainer.distributed import Distributed
from vjepa_fast.trainer.levjepa import LevjepaStep, average_momentum
from vjepa_fast.trainer.methods import METHODS

from .conftest import config
from .test_no_sync import HostWaits
from .test_train import VOLATILE, rows, same_checkpoints, with_

OWN = schema.LevjepaConfig(
    local_views=3, local_crop=16, drop=0.5, proj_hidden=16, proj_dim=8, num_slices=16, average_every=2, sigreg=0.1
)


@pytest.fixture
def cfg(manifest, tmp_path):
    base = config()
    return dataclasses.replace(
        base,
        method="levjepa",
        levjepa=OWN,
        data=dataclasses.replace(base.data, datasets=(manifest,), tubelet_size=1),
        masks=schema.MasksConfig(),
        objectives=schema.Config().objectives,
        target=schema.TargetConfig(),
        model=schema.ModelConfig(
            embed_dim=48, depth=2, num_heads=2, levels=1, modality_embedding=False, img_temporal_dim_size=None
        ),
        runtime=dataclasses.replace(base.runtime, save_every=3),
        folder=str(tmp_path / "run"),
    )


def batch_of(cfg, **where):
    with ClipLoader(cfg, **where) as loader:
        return next(loader)


def test_one_step_is_the_loss_written_plainly(cfg):
    """All tokens kept: the class token of each view, the projector over the views of the batch together, two terms."""
    cfg = with_(cfg, levjepa={"drop": 0.0})
    step, batch = LevjepaStep(cfg), batch_of(cfg)
    (group,) = batch.groups
    views = [step.encoder.summary(group.clip, None)]
    views += [step.encoder.summary(group.local[:, v], None) for v in range(3)]
    e = step.projector(torch.cat(views)).unflatten(0, (4, 3)).double()
    invariance = (e - e[0]).pow(2).mean()
    normal, t = (
        draw(8, 16, seed=cfg.seed, step=5, device=torch.device("cpu")).double(),
        torch.linspace(-3, 3, 33).double(),
    )
    u = e @ (normal / normal.norm(dim=0))
    gap = torch.exp(1j * u[..., None] * t).mean(1) - torch.exp(-t * t / 2)
    sigreg = 3 * torch.trapezoid(gap.abs() ** 2 * torch.exp(-t * t / 2), t).mean()
    total = invariance + 0.1 * sigreg
    params = [*step.encoder.parameters(), *step.projector.parameters()]
    grads = torch.autograd.grad(total, params)
    norm = torch.sqrt(sum(g.pow(2).sum() for g in grads))
    out = step(batch, 5)
    want = {"loss": total, "invariance": invariance, "sigreg": sigreg, "norm": norm}
    found = {"loss": out.loss, **out.terms, "norm": out.grad_norm}
    for name, value in want.items():
        torch.testing.assert_close(found[name].double(), value.detach().double(), rtol=1e-5, atol=1e-6, msg=name)
    assert out.weights == {"invariance": 1.0, "sigreg": 0.1}
    assert out.clips == 3 and out.work.tokens == 3 * (4 * 16 + 1) + 9 * (4 * 4 + 1)


class Twin(Distributed):
    """Process ``rank`` of two: hears the means of one, then gives both their mean."""

    def __init__(self, rank, heard):
        super().__init__(rank, 2)
        self.heard = heard

    def mean(self, values):
        self.heard[self.rank] = values
        return sum(self.heard.values()) / len(self.heard)


def test_two_processes_have_the_sigreg_of_all_clips_and_its_gradient(cfg):
    """Batch normalisation and invariance are those of each one's own clips."""
    cfg = with_(cfg, levjepa={"drop": 0.0})
    step, heard, grads = LevjepaStep(cfg), {}, []
    halves = [step.forward(batch_of(cfg, rank=rank, world=2))[1] for rank in range(2)]
    _, sigreg = step.losses(torch.cat(halves, 1), 0)
    own = [step.losses(half, 0)[0] for half in halves]
    for rank in (0, 1, 0, 1):  # the first round is heard only
        step.world = Twin(rank, heard)
        found = step.losses(halves[rank], 0)
        grads.append(torch.autograd.grad(found[0] + 0.1 * found[1], step.params, retain_graph=True))
    torch.testing.assert_close(found, (own[1], sigreg), rtol=1e-5, atol=0)
    want = torch.autograd.grad(sum(own) / 2 + 0.1 * sigreg, step.params)
    for mean, exact in zip(((a + b) / 2 for a, b in zip(*grads[2:])), want):
        torch.testing.assert_close(mean, exact, rtol=1e-4, atol=1e-6)


def test_tokens_left_out_are_drawn_from_seed_and_sample(cfg):
    step, batch = LevjepaStep(cfg), batch_of(cfg)
    first = step.forward(batch)[1]
    assert torch.equal(step.forward(batch)[1], first)
    moved = dataclasses.replace(batch, groups=[dataclasses.replace(batch.groups[0], first_sample=3)])
    assert not torch.equal(step.forward(moved)[1], first)
    step.cfg = with_(cfg, seed=cfg.seed + 1)
    assert not torch.equal(step.forward(batch)[1], first)
    assert step.forward(batch)[2].tokens == 3 * (32 + 1) + 9 * (8 + 1)


def test_run_folder_and_evaluation_encoder(cfg, tmp_path):
    result = train(with_(cfg, runtime={"monitor_every": 4}))
    row = rows(result.folder)[3]
    assert result.step == 12 and set(row["terms"]) == set(row["weights"]) == {"invariance", "sigreg"}
    assert set(row["monitors"]) == {"cls_rankme", "feature_std", "embedding_rankme", "embedding_std"}
    assert all(1 <= row["monitors"][k] <= 3 for k in ("cls_rankme", "embedding_rankme"))
    first, last = (json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()[::11])
    assert set(first) == {*row, *VOLATILE} and first["step_flops"] > 1e6 and last["lr"] > 0
    assert dataclasses.replace(configs.load(result.folder), folder=cfg.folder) == with_(
        cfg, runtime={"monitor_every": 4}
    )
    data = checkpoint.load(result.checkpoint)
    assert data["predictor"] == {} and set(data["heads"]) == {
        *(f"fc{n}.{k}" for n in (1, 2) for k in ("weight", "bias")),
        "norm.weight",
        "norm.bias",
    }
    step = LevjepaStep(cfg)
    step.load_state_dict(data)
    clip = batch_of(cfg).groups[0].clip
    for which, module in (("target_encoder", step.target_encoder), ("encoder", step.encoder)):
        loaded = load_encoder(result.folder, which)
        assert loaded.block_causal and loaded.clip_settings["tubelet_size"] == 1
        assert torch.equal(loaded(clip), module(clip)) and loaded(clip).shape == (3, 64, 48)
        assert torch.equal(loaded.summary(clip, None), module.summary(clip, None))
    assert not torch.equal(load_encoder(result.folder)(clip), loaded(clip))  # an average, not the encoder


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"runtime": {"log_every": 4, "monitor_every": 5}, "data": {"num_workers": 2}},
        {"optimization": {"accumulate": 2}, "levjepa": {"attention": "full"}},
    ],
)
def test_stopping_and_resuming_gives_the_same_run(cfg, tmp_path, change):
    """Stops between two updates of the average."""
    cfg = with_(cfg, **change)
    whole = train(cfg)
    parts = dataclasses.replace(cfg, folder=str(tmp_path / "parts"))
    train(parts, max_steps=5)
    for path in checkpoint.all_in(parts.folder)[1:]:
        path.unlink()
    assert checkpoint.latest(parts.folder).name == "step-00000003.pt"
    torch.manual_seed(123)
    result = train(parts)
    assert rows(result.folder) == rows(whole.folder)
    same_checkpoints(result.checkpoint, whole.checkpoint)


def test_accumulated_batches_are_averaged(cfg):
    """Both terms see one micro-batch: the same twice gives the loss and the gradient of one."""
    batch, found = batch_of(cfg), []
    for micro in ([batch], [batch, batch]):
        step = LevjepaStep(cfg)
        out = step(micro, 0)
        found.append((out.loss, out.grad_norm, *(p.detach() for p in step.params)))
    for one, two in zip(*found):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7)


def test_weights_are_averaged_for_evaluation_only(cfg):
    batch = batch_of(cfg)
    step, other = (LevjepaStep(with_(cfg, levjepa={"average": average})) for average in (0.9999, 0.0))
    start = [p.clone() for p in step.target_encoder.parameters()]
    for index in range(4):
        before = [p.clone() for p in step.target_encoder.parameters()]
        out = step(batch, index)
        other(batch, index)
        momentum = {1: 0.1, 3: 2 / 11}.get(index)  # every second step; the ramp, since the run is short
        assert average_momentum(index, step.cfg) == pytest.approx(momentum) if momentum else out.momentum == 1.0
        for a, b, p in zip(step.target_encoder.parameters(), before, step.encoder.parameters()):
            torch.testing.assert_close(
                a, b if momentum is None else momentum * b + (1 - momentum) * p, rtol=1e-5, atol=1e-7
            )
    assert all(torch.equal(a, b) for a, b in zip(step.encoder.parameters(), other.encoder.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(other.encoder.parameters(), other.target_encoder.parameters()))
    assert any(not torch.equal(a, b) for a, b in zip(start, step.target_encoder.parameters()))
    long = with_(cfg, levjepa={"average_every": 1})
    assert average_momentum(10**6, long) == OWN.average  # as configured, once its reach is the shorter


def test_what_decays(cfg):
    """Neither biases nor norms, those of the projector included."""
    step = LevjepaStep(cfg)
    names = {p: n for module in (step.encoder, step.projector) for n, p in module.named_parameters()}
    kept = {names[p] for g in step.optimizer.param_groups if g["WD_exclude"] for p in g["params"]}
    assert kept == {n for n in names.values() if "norm" in n or "bias" in n} and "norm.weight" in kept


def test_a_checkpoint_of_another_method_is_refused(cfg, manifest, tmp_path):
    ours = train(cfg, max_steps=1)
    vjepa = config(tmp_path / "vjepa", data={"datasets": (manifest,)})
    theirs = train(vjepa, max_steps=1)
    for other, result in ((cfg, theirs), (vjepa, ours)):
        with pytest.raises(CheckpointError, match="checkpoint of another architecture"):
            train(dataclasses.replace(other, folder=str(tmp_path / "other")), resume=result.checkpoint)


def test_what_the_method_does_not_support_is_refused_before_the_run(cfg, monkeypatch):
    for runtime, refused in (
        ({"cuda_graphs": True}, "runtime.cuda_graphs: true is not supported under method: levjepa; use auto or false"),
        ({"cuda_graphs": "target"}, "runtime.cuda_graphs: target is not supported"),
        ({"compile": "target"}, "runtime.compile: target is not supported under method: levjepa; use blocks"),
        ({"fp8": True}, "runtime.fp8"),
    ):
        with pytest.raises(ConfigError, match=refused):
            check(with_(cfg, runtime=runtime))
    check(with_(cfg, runtime={"attention": "sdpa"}))
    monkeypatch.setattr(Sdpa, "causal", False)
    with pytest.raises(ConfigError, match="runtime.attention: sdpa .*levjepa.attention: block_causal"):
        check(with_(cfg, runtime={"attention": "sdpa"}))
    check(with_(cfg, runtime={"attention": "sdpa"}, levjepa={"attention": "full"}))
    checked = preflight.check(cfg)
    assert checked.graphs.how == "off" and checked.predictor is None and checked.plan is None
    assert sum(p.numel() for p in checked.heads.parameters()) == 48 * 16 + 16 * 3 + 16 * 8 + 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_operator_of_a_step_hands_a_value_to_the_host(cfg, dtype, monkeypatch):
    step = LevjepaStep(with_(cfg, levjepa={"average_every": 1}), dtype=dtype)
    step.guard.looks = False  # as on any other device
    data = step.stage(batch_of(cfg), 0)
    monkeypatch.setattr(_check, "in_range", lambda *args, **kwargs: None)
    before = [p.detach().clone() for p in step.params]
    with ops.use_backend("eager"), HostWaits():
        out = step(data, 0, monitor=True)
    assert torch.isfinite(out.loss) and all(v.dtype == torch.float32 for v in out.monitors.values())
    assert all(not torch.equal(p, old) for p, old in zip(step.params, before))


def test_every_method_has_a_step_that_the_loop_can_use():
    for name, step in METHODS.items():
        assert all(hasattr(step, n) for n in ("__call__", "stage", "state_dict", "load_state_dict")), name
