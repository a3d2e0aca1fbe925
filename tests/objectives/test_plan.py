"""How terms add up: weights, schedules, gradients of the target, heads, seeds, messages."""

import dataclasses
import gc
import math
import weakref

import pytest
import torch
from torch import nn

from tests.objectives.tiny import leaves, random_state
from vjepa_fast.errors import ConfigError
from vjepa_fast.objectives import OBJECTIVES, Objective, build_objectives, objective
from vjepa_fast.ops import _backend

SIZES = {"levels": 2, "embed_dim": 4}
HEADLINE = {"pred": {}, "hw": {"coeff": 0.3}, "ld": {"coeff": 2.0, "hard_weighting": 1.0}, "delta": {"coeff": 0.5}}


def plan_of(spec, **options):
    return build_objectives(spec, **{**SIZES, **options}).double()


def grad_names(out, state):
    named = leaves(state)
    found = torch.autograd.grad(out.total, list(named.values()), allow_unused=True)
    return {k.split("/")[0] for k, g in zip(named, found) if g is not None and g.any()}


def test_total_is_the_weighted_sum():
    out = plan_of(HEADLINE)(random_state())
    assert list(out.terms) == list(out.weights) == list(HEADLINE)
    assert out.weights == {"pred": 1.0, "hw": 0.3, "ld": 2.0, "delta": 0.5}
    assert out.total.item() == pytest.approx(sum(out.weights[t] * out.terms[t].item() for t in HEADLINE), rel=1e-14)
    assert all(not v.requires_grad and v.ndim == 0 for v in out.terms.values())


def test_a_term_does_not_depend_on_its_company():
    state = random_state()
    together = plan_of(HEADLINE)(state)
    for name, fields in HEADLINE.items():
        assert plan_of({name: fields})(state).terms[name].item() == together.terms[name].item()


def test_weight_zero_still_reports_and_gives_zero_gradients():
    state = random_state()
    out = plan_of({"pred": {}, "delta": {"coeff": 0.0}})(state)
    assert out.weights["delta"] == 0.0 and out.terms["delta"] > 0
    out.total.backward()
    assert state.z[0][0].grad is not None and not state.z[0][0].grad.any()


@pytest.mark.parametrize(
    ("warmup", "step", "share"),
    [
        ([0.5, 1.0], 49, 0.0),
        ([0.5, 1.0], 75, 0.5),
        ([0.5, 1.0], 100, 1.0),
        ([0.5, 1.0], 130, 1.0),
        ([15000, 30000], 0, 0.0),
        ([15000, 30000], 15000, 0.0),
        ([15000, 30000], 22500, 0.5),
        ([15000, 30000], 30000, 1.0),
        ([0, 0], 0, 1.0),
        ([20, 20], 19, 0.0),
        ([20, 20], 20, 1.0),
        ([0.2, 0.2], 19, 0.0),
        ([0.2, 0.2], 20, 1.0),
        ([0, 0.5], 25, 0.5),
        ([0, 1], 0, 0.0),
        ([0, 1], 1, 1.0),
        ([15000.0, 30000.0], 22500, 0.5),
        ([0.0, 0.0], 0, 1.0),
    ],
)
def test_context_warmup(warmup, step, share):
    plan = plan_of({"context": {"coeff": 0.4, "warmup": warmup}})
    out = plan(dataclasses.replace(random_state(), step=step, total_steps=100))
    assert out.weights["context"] == pytest.approx(0.4 * share, abs=1e-15)
    assert out.terms["context"] > 0
    assert out.total.item() == pytest.approx(0.4 * share * out.terms["context"].item(), rel=1e-12)


def test_context_warmup_defaults_to_the_second_half_of_the_run():
    out = plan_of({"context": {}})(dataclasses.replace(random_state(), step=3, total_steps=4))
    assert out.weights["context"] == 0.5


def test_context_coefficient_of_images():
    plan = plan_of({"context": {"coeff": 0.5, "coeff_img": 0.25, "warmup": [0, 0]}})
    state = random_state()
    assert plan(state).weights["context"] == 0.5
    assert plan(dataclasses.replace(state, modality="image")).weights["context"] == 0.25
    plain = plan_of({"context": {"coeff": 0.5, "warmup": [0, 0]}})
    assert plain(dataclasses.replace(state, modality="image")).weights["context"] == 0.5


def test_kinematic_anneal():
    plan = plan_of({"kinematic": {"coeff": 0.1, "anneal": True}}, target_grad=True)
    for epoch, share in ((0, 1.0), (25, 0.5 * (1 + math.cos(math.pi / 4))), (50, 0.5), (100, 0.0)):
        out = plan(dataclasses.replace(random_state(), epoch=epoch, epochs=100))
        assert out.weights["kinematic"] == pytest.approx(0.1 * share, abs=1e-15)


@pytest.mark.parametrize(
    ("compat", "stop", "names"),
    [
        ("intended", None, {"z_pred"}),
        ("intended", True, {"z_pred"}),
        ("intended", False, {"z_pred", "h"}),
        ("published", None, {"z_pred", "h"}),
        ("published", True, {"z_pred"}),
    ],
)
def test_where_the_gradient_of_prediction_goes(compat, stop, names):
    state = random_state()
    plan = plan_of({"pred": {}, "hw": {}}, compat=compat, target_grad=True, stop_gradient=stop)
    assert grad_names(plan(state), state) == names


def test_kinematic_keeps_its_gradient_under_stop_gradient():
    state = random_state()
    plan = plan_of({"pred": {}, "kinematic": {}}, target_grad=True)
    assert grad_names(plan(state), state) == {"z_pred", "h"}
    assert grad_names(plan_of({"kinematic": {}}, target_grad=True)(state), state) == {"h"}


@pytest.mark.parametrize("term", ["ld", "delta", "ltc", "spectral", "velgate", "hamiltonian"])
def test_temporal_terms_never_move_the_target(term):
    state = random_state(masks=1, keep=lambda grid, j: list(range(grid[0] * grid[1] * grid[2])))
    plan = plan_of({term: {}}, compat="published", target_grad=True, stop_gradient=False)
    assert grad_names(plan(state), state) == {"z"}


def test_hard_weighted_ld_trains_nothing_as_published_and_its_head_as_intended():
    spec = {"ld": {"hard_weighting": 1.0}}
    state = random_state()
    published, intended = plan_of(spec, compat="published"), plan_of(spec)
    theirs, ours = published(state), intended(state)
    assert theirs.total.item() == ours.total.item()
    assert not theirs.total.requires_grad
    ours.total.backward()
    assert all(p.grad.any() for p in intended.parameters())


def test_kinematic_divides_by_all_groups_as_published():
    state = random_state(grids=((4, 2, 2), (1, 2, 2), (2, 2, 2)))
    values = {
        compat: plan_of({"kinematic": {}}, compat=compat, target_grad=True)(state).total.item()
        for compat in ("published", "intended")
    }
    assert values["published"] == pytest.approx(values["intended"] * 2 / 3, rel=1e-14)


def test_shared_work_is_done_once(monkeypatch):
    calls = []
    original = _backend.call
    monkeypatch.setattr(_backend, "call", lambda op, *a: calls.append(op) or original(op, *a))

    def passes(spec):
        calls.clear()
        plan_of(spec)(random_state())
        return sorted(calls)

    token, pair = "latent_loss_token", "latent_loss_pair"
    assert passes({"pred": {}, "hw": {}}) == passes({"pred": {}}) == [token] * 4  # one per group and mask
    assert passes({"delta": {}, "ltc": {}, "fwm_static": {}}) == passes({"delta": {}}) == [pair] * 4


@pytest.mark.parametrize("term", ["delta", "ltc", "spectral", "velgate", "fwm_static"])
def test_features_are_free_when_the_loss_is_there(term):
    """At once, not at Python's next collection of circles: what backward needs, autograd holds by itself."""
    state, plan, seen = random_state(), plan_of({term: {}}), []
    state_type, honest = type(state), type(state).prepared

    def spy(self, *args):
        fresh = honest(self, *args)
        seen.append(weakref.ref(fresh))
        return fresh

    gc.collect()
    gc.disable()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(state_type, "prepared", spy)
            total = plan(state).total
        assert len(seen) == 1 and seen[0]() is None
    finally:
        gc.enable()
    total.backward()


def test_plan_can_be_called_twice_on_one_state():
    state, plan = random_state(), plan_of(HEADLINE)
    for _ in range(2):
        plan(state).total.backward()
    twice = state.z[0][0].grad
    state = random_state()
    plan(state).total.backward()
    torch.testing.assert_close(twice, 2 * state.z[0][0].grad)


# -- heads ----------------------------------------------------------------------------------------------------
def test_heads_have_the_published_parameter_names():
    ac = {"channels": "dynamics", "target_dim": 2}
    plan = plan_of({"ld": {"hidden_dim": 5}, "ac": ac, "hamiltonian": {}, "pred": {}})
    assert list(plan.heads) == ["ld", "ac", "hamiltonian"]
    assert {k: tuple(v.shape) for k, v in plan.heads["ld"].state_dict().items()} == {
        "0.weight": (5, 8),
        "0.bias": (5,),
        "2.weight": (8, 5),
        "2.bias": (8,),
    }
    assert plan.heads["ac"].state_dict()["0.weight"].shape == (256, 4)
    assert plan.heads["ac"].state_dict()["2.bias"].shape == (2,)
    layers = [f"net.{i}.{p}" for i in (0, 2, 4) for p in ("weight", "bias")]
    assert list(plan.heads["hamiltonian"].state_dict()) == layers


def test_heads_depend_on_the_seed_and_on_nothing_else():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    alone = plan_of({"ld": {}}, seed=3)
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(7)
    crowd = plan_of({"hamiltonian": {}, "ac": {}, "ld": {}}, seed=3)
    for key, want in alone.heads["ld"].state_dict().items():
        assert torch.equal(want, crowd.heads["ld"].state_dict()[key])
    assert not torch.equal(crowd.heads["ld"][0].weight, crowd.heads["ac"][0].weight)
    other = plan_of({"ld": {}}, seed=4)
    assert not torch.equal(alone.heads["ld"][0].weight, other.heads["ld"][0].weight)


def test_heads_are_drawn_as_pytorch_draws_linear_layers():
    ours = build_objectives({"ld": {"hidden_dim": 400}}, levels=4, embed_dim=100).heads["ld"][0]
    theirs = nn.Linear(400, 400)
    bound = 400**-0.5
    for a, b in ((ours.weight, theirs.weight), (ours.bias, theirs.bias)):
        assert a.abs().max() <= bound and a.abs().max() > 0.97 * bound
        assert a.std().item() == pytest.approx(b.std().item(), rel=0.15)
        assert abs(a.mean().item()) < 0.1 * bound


def test_builds_on_the_meta_device():
    with torch.device("meta"):
        plan = build_objectives({"ld": {}, "ac": {}, "hamiltonian": {}}, levels=4, embed_dim=1408)
    assert all(p.is_meta for p in plan.parameters())
    assert sum(p.numel() for p in plan.heads["ld"].parameters()) == 256 * 5632 * 2 + 256 + 5632


# -- what it says -----------------------------------------------------------------------------------------------
def test_needs_and_description():
    plan = plan_of({"pred": {}, "ld": {"coeff": 0.25}})
    assert plan.needs == {"z_pred", "h", "masks_pred", "z", "masks_enc", "grids"}
    assert "clips" in plan_of({"ac": {}}).needs and "z_context" in plan_of({"context": {}}).needs
    lines = plan.describe().splitlines()
    assert lines[0].split() == ["term", "coeff", "access", "gradient", "to", "head"]
    assert [line.split()[:3] for line in lines[1:]] == [["pred", "1", "TOKEN"], ["ld", "0.25", "PAIR"]]
    assert lines[2].endswith("4,360")


@pytest.mark.parametrize(
    ("spec", "options", "words"),
    [
        ({"delt": {}}, {}, ["objectives.delt", "did you mean delta?", "hamiltonian"]),
        ({"ld": {"hiden_dim": 3}}, {}, ["objectives.ld.hiden_dim", "did you mean hidden_dim?", "channels"]),
        ({"ld": {"hidden_dim": 2.5}}, {}, ["objectives.ld.hidden_dim", "2.5", "expected an integer"]),
        ({"ld": {"channels": "dyn"}}, {}, ["objectives.ld.channels", "'dyn'", "accepted: all, dynamics"]),
        ({"hw": {"coeff": "high"}}, {}, ["objectives.hw.coeff", "'high'", "expected a number"]),
        ({"hw": {"coeff": -1}}, {}, ["objectives.hw.coeff", "at least 0", "-1"]),
        ({"hw": {"coeff": True}}, {}, ["objectives.hw.coeff", "got true"]),
        ({"hw": {"temp": math.nan}}, {}, ["objectives.hw.temp", "nan"]),
        ({"hw": {"coeff": None}}, {}, ["objectives.hw.coeff", "got null"]),
        ({"fwm_static": {"normalize": 1}}, {}, ["objectives.fwm_static.normalize", "true or false"]),
        ({"fwm_orth": {"app_ratio": 1.0}}, {}, ["objectives.fwm_orth.app_ratio", "in (0, 1)"]),
        ({"velgate": {"percentile": 1.5}}, {}, ["objectives.velgate.percentile", "in [0, 1]"]),
        ({"context": {"warmup": [0.8, 0.2]}}, {}, ["objectives.context.warmup", "start <= end"]),
        ({"context": {"warmup": [0.5, 1.5]}}, {}, ["objectives.context.warmup"]),
        ({"context": {"warmup": 3}}, {}, ["objectives.context.warmup"]),
        ({"context": {"warmup": [-1, 3]}}, {}, ["objectives.context.warmup"]),
        ({"pred": [1]}, {}, ["objectives.pred", "section of keys"]),
        ({}, {}, ["objectives", "no term"]),
        ({"pred": {}}, {"compat": "publshed"}, ["compat", "'publshed'", "intended, published"]),
        ({"kinematic": {}}, {}, ["objectives.kinematic", "no gradient can reach this term", "target.mode: online"]),
        ({"hamiltonian": {}}, {"levels": 1, "embed_dim": 3}, ["objectives.hamiltonian", "even"]),
    ],
)
def test_wrong_use_is_refused_in_one_line(spec, options, words):
    with pytest.raises(ConfigError) as error:
        plan_of(spec, **options)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_null_section_means_defaults_and_published_allows_kinematic():
    assert plan_of({"pred": None}).terms["pred"].loss_exp == 1.0
    out = plan_of({"kinematic": {}}, compat="published")(random_state(requires_grad=False))
    assert out.terms["kinematic"] > 0 and not out.total.requires_grad


def test_states_that_do_not_fit_are_refused():
    state = random_state()
    with pytest.raises(ValueError, match="ac needs LatentState.clips"):
        plan_of({"ac": {}})(dataclasses.replace(state, clips=None))
    with pytest.raises(ValueError, match=r"h\[0\] is .* 4x2x2 .* \[B, 16, 8\]"):
        plan_of({"pred": {}})(dataclasses.replace(state, grids=[(4, 2, 2), (2, 2, 2)]))
    with pytest.raises(ValueError, match="total_steps"):
        plan_of({"context": {}})(dataclasses.replace(state, total_steps=None))
    with pytest.raises(ValueError, match="step"):
        plan_of({"context": {"warmup": [1, 2]}})(dataclasses.replace(state, step=None))
    with pytest.raises(ValueError, match="epochs"):
        plan_of({"kinematic": {"anneal": True}}, target_grad=True)(dataclasses.replace(state, epochs=None))


def test_registration():
    with pytest.raises(ValueError, match="'pred' is registered twice"):
        objective("pred")(type("Again", (Objective,), {}))

    @dataclasses.dataclass
    class Loose:
        coeff: float = 1.0

    with pytest.raises(TypeError, match="frozen dataclass"):
        objective("loose")(Loose)
    assert "loose" not in OBJECTIVES
