"""What every registered objective must satisfy; a new term, in ``terms/`` or of a plugin, is found and held to it."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.objectives.tiny import leaves, ragged, random_state
from vjepa_fast.objectives import OBJECTIVES, LatentState, build_objectives

TERMS = sorted(OBJECTIVES)
HERE = Path(__file__).parent
each_term = pytest.mark.parametrize("term", TERMS)
each_mode = pytest.mark.parametrize("compat", ["intended", "published"])


def build(term, *, dtype=torch.float64, levels=2, embed_dim=4, **options):
    options = {"target_grad": True, "compat": "intended", **options}
    spec = {term: {"num_slices": 16} if term == "sigreg" else {}}
    return build_objectives(spec, levels=levels, embed_dim=embed_dim, patch_size=2, **options).to(dtype)


def over_time(term):
    return OBJECTIVES[term].access in ("PAIR", "COLUMN")


def gradients(out, plan, state):
    named = leaves(state) | {f"head/{k}": p for k, p in plan.named_parameters()}
    live = {k: x for k, x in named.items() if x.requires_grad}
    found = torch.autograd.grad(out.total, list(live.values()), allow_unused=True)
    return {k: g for k, g in zip(live, found) if g is not None}


def test_the_terms_of_the_paper_are_there():
    assert {
        "pred",
        "context",
        "hw",
        "fwm_static",
        "fwm_orth",
        "ld",
        "delta",
        "ltc",
        "spectral",
        "ac",
        "kinematic",
        "velgate",
        "hamiltonian",
        "sigreg",
    } <= set(TERMS)


def row_of_docs(term):
    """A term's row in the table of docs/objectives.md, made of its class."""
    cls = OBJECTIVES[term]
    value = " ".join(cls.__doc__.split()).rstrip(".")
    fields = ", ".join(f"`{f.name}` ({shown(f.default)})" for f in dataclasses.fields(cls) if f.name != "coeff")
    return f"| `{term}` | {value} | {fields} | {cls.access} | {cls.gradient_to} |"


def shown(default):
    if isinstance(default, tuple):
        return f"[{', '.join(map(shown, default))}]"
    if default is None or isinstance(default, bool):
        return {None: "null", True: "true", False: "false"}[default]
    return str(default)


def is_own(term):
    return OBJECTIVES[term].__module__.startswith("vjepa_fast.objectives.terms.")


@each_term
def test_declarations(term):
    cls = OBJECTIVES[term]
    assert cls.access in ("TOKEN", "PAIR", "COLUMN", "GLOBAL")
    assert cls.needs <= {f.name for f in dataclasses.fields(LatentState)}
    assert cls.gradient_to
    assert cls().coeff == 1.0
    assert set(cls.published) <= {f.name for f in dataclasses.fields(cls)}
    assert all(key.count(".") == 1 for key in cls.published.values()), "section.key of the published YAML"


@pytest.mark.parametrize("term", [t for t in TERMS if is_own(t)])
def test_a_term_of_this_package_has_a_test_by_hand_and_its_row_in_the_docs(term):
    assert (HERE / f"test_{term}.py").exists()
    docs = HERE.parents[1] / "docs" / "objectives.md"
    assert row_of_docs(term) in docs.read_text(encoding="utf-8").splitlines()


@each_term
@each_mode
def test_only_what_it_needs_is_read(term, compat):
    full = random_state()
    plan = build(term, compat=compat)
    always = plan.needs | {"step", "total_steps"}
    kept = {f: getattr(full, f) for f in always}
    want, got = plan(full), plan(LatentState(**kept))
    assert torch.equal(want.total, got.total)


@each_term
@pytest.mark.parametrize("tokens", ["equal", "ragged"])
def test_gradcheck(term, tokens):
    if tokens == "equal":
        state = random_state(grids=((4, 1, 2), (2, 1, 2)), embed_dim=2, seed=3)
    else:
        state, _ = ragged(grids=((4, 1, 2),), samples=2, embed_dim=2)
    plan = build(term, embed_dim=2)
    named = leaves(state) | dict(plan.named_parameters())
    used = set(gradients(plan(state), plan, state))
    inputs = tuple(x for k, x in named.items() if k in used or f"head/{k}" in used)
    assert inputs
    exact = torch.autograd.gradcheck(lambda *_: plan(state).total, inputs, fast_mode=True, raise_exception=False)
    assert exact == OBJECTIVES[term].exact_gradient


@each_term
@each_mode
def test_context_without_pairs(term, compat):
    def keep(grid, j):  # first time step only: no token has a successor
        return list(range(grid[1] * grid[2]))

    state = random_state(keep=keep)
    plan = build(term, compat=compat)
    out = plan(state)
    found = gradients(out, plan, state)
    assert out.total.isfinite() and all(g.isfinite().all() for g in found.values())
    if "masks_enc" in plan.needs and over_time(term):
        assert out.total == 0
        assert found and not any(g.any() for g in found.values())


@pytest.mark.parametrize("term", [t for t in TERMS if over_time(t) and "masks_enc" in OBJECTIVES[t].needs])
def test_a_mask_without_pairs_does_not_dilute_the_others(term):
    def keep(grid, j):  # mask 0 sees everything, mask 1 one time step
        n = grid[0] * grid[1] * grid[2]
        return list(range(n if j == 0 else grid[1] * grid[2]))

    both = random_state(keep=keep)
    per_mask = {k: [xs[:1] for xs in getattr(both, k)] for k in ("z", "masks_enc")}
    plan = build(term)
    assert plan(both).total.item() == plan(dataclasses.replace(both, **per_mask)).total.item() > 0


@each_term
@each_mode
def test_single_frame_clips(term, compat):
    state = random_state(grids=((1, 2, 3), (1, 4, 4)))
    plan = build(term, compat=compat)
    out = plan(state)
    found = gradients(out, plan, state)
    assert out.total.isfinite() and all(g.isfinite().all() for g in found.values())
    if over_time(term) or term == "fwm_orth":
        assert out.total == 0
        assert found and not any(g.any() for g in found.values()), "zero, not missing: the optimiser still steps"


@each_term
def test_one_sample(term):
    state = random_state(batch=1)
    plan = build(term)
    out = plan(state)
    assert out.total.isfinite() and out.total > 0
    found = gradients(out, plan, state)
    assert any(g.any() for g in found.values()) and all(g.isfinite().all() for g in found.values())


@each_term
@each_mode
def test_bfloat16_inputs_compute_in_float32(term, compat):
    low = random_state(dtype=torch.bfloat16)
    high = dataclasses.replace(
        low,
        h=[x.float() for x in low.h],
        clips=[x.float() for x in low.clips],
        **{k: [[x.float() for x in xs] for xs in getattr(low, k)] for k in ("z", "z_pred", "z_context")},
    )
    plan = build(term, dtype=torch.float32, compat=compat)
    want = plan(high).total
    with torch.autocast("cpu", torch.bfloat16):
        got = plan(low)
        assert torch.equal(plan(high).total, want), "autocast must not reach the formulas"
    assert got.total.dtype == torch.float32
    assert torch.equal(got.total, want)
    assert all(g.isfinite().all() for g in gradients(got, plan, low).values())


@each_term
def test_state_dict_brings_the_same_values_back(term):
    state = random_state()
    plan, other = build(term, seed=1), build(term, seed=1)
    assert torch.equal(plan(state).total, other(state).total)
    if list(plan.parameters()):
        with torch.no_grad():
            for p in plan.parameters():
                p.mul_(1.5).add_(0.25)
        assert not torch.equal(plan(state).total, other(state).total)
    other.load_state_dict(plan.state_dict())
    want, got = plan(state), other(state)
    assert torch.equal(want.total, got.total)
    first, second = gradients(want, plan, state), gradients(got, other, state)
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@each_term
def test_no_grad(term):
    state = random_state()
    plan = build(term)
    want = plan(state).total
    with torch.no_grad():
        got = plan(state)
    assert torch.equal(got.total, want) and not got.total.requires_grad


class NoSync(TorchDispatchMode):
    """Fails on the calls that make a GPU wait for the host or give data-dependent shapes."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name == "equal" and args[0].ndim == 0:  # torch 2.11's quantile checks q so, on a CPU alone
            return func(*args, **(kwargs or {}))
        assert name not in self.FORBIDDEN, f"{func} waits for the device"
        assert name != "index" or not any(x is not None and x.dtype == torch.bool for x in args[1]), (
            "boolean indexing waits for the device"
        )
        return func(*args, **(kwargs or {}))


@each_term
@each_mode
@pytest.mark.parametrize("tokens", ["equal", "ragged"])
def test_nothing_waits_for_the_device(term, compat, tokens):
    state = random_state() if tokens == "equal" else ragged()[0]
    plan = build(term, compat=compat)
    with NoSync():
        plan(state).total.backward()


def test_the_sync_guard_sees_a_sync():
    with NoSync(), pytest.raises(AssertionError, match="waits"):
        torch.ones(3).sum().item()
