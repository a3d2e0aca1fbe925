"""Every term against the released code's values and gradients, in float32 and float64, on both golden sets."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from tests.objectives.golden import CASES, SETS, golden, inputs, plan_of
from tests.ops.parity import DEVICES

PARTS = {
    "pred": "loss_pred",
    "hw": "hw_loss",
    "context": "loss_context",
    "fwm_static": "fwm_static_loss",
    "fwm_orth": "fwm_orth_loss",
    "ld": "ld_loss",
}
PRECISION = {"f32": (torch.float32, 1e-5), "f64p": (torch.float64, 1e-10)}
everywhere = pytest.mark.parametrize("prefix", list(SETS), ids=["small", "multi"])
each_precision = pytest.mark.parametrize("kind", list(PRECISION))


def tolerance(kind, case):
    dtype, rtol = PRECISION[kind]
    return dtype, max(rtol, 1e-8) if case.distance or "context" in case.spec else rtol


def run(case, prefix, dtype, compat=None, device="cpu"):
    state, leaves = inputs(prefix, dtype, device=device)
    plan, heads = plan_of(case, prefix, dtype, compat, device)
    out = plan(dataclasses.replace(state, step=case.step, total_steps=30000, epoch=0, epochs=100))
    return out, leaves | heads


def test_every_golden_case_is_tried():
    names = {key.split("/")[1] for key in golden() if key.startswith("val/")}
    assert names == set(CASES)
    described = json.loads(str(golden()["meta_json"]))["cases"]
    assert set(described["main"]) == set(CASES)


@everywhere
@each_precision
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", list(CASES))
def test_values_and_gradients(name, device, prefix, kind):
    case = CASES[name]
    dtype, rtol = tolerance(kind, case)
    out, leaves = run(case, prefix, dtype, device=device)
    total = name.startswith("total")
    value = out.total if total else next(iter(out.terms.values()))
    np.testing.assert_allclose(value.item(), float(golden()[f"{prefix}val/{name}/{kind}"]), rtol=rtol)
    if total:
        for term, part in PARTS.items():
            want = float(golden()[f"{prefix}val/{name}/parts/{part}"])
            np.testing.assert_allclose(out.terms[term].item(), want, rtol=max(rtol, 1e-6 if kind == "f32" else 0))
        want = float(golden()[f"{prefix}val/{name}/parts/lambda_value_step"])
        assert out.weights["context"] == pytest.approx(want, abs=1e-12)

    # only the multi set's double gradients are stored
    stored = kind if prefix == "" else "f64p"
    wanted = {leaf: golden().get(f"{prefix}grad/{name}/{stored}/{leaf}") for leaf in leaves}
    if all(want is None for want in wanted.values()):
        assert not out.total.requires_grad
        return
    out.total.backward()
    check_gradients(leaves, wanted, rtol if stored == kind else 1e-5)


def check_gradients(leaves, wanted, rtol):
    for leaf, want in wanted.items():
        got = leaves[leaf].grad
        if want is None:
            assert got is None or not got.any(), f"{leaf} must get no gradient"
        else:
            np.testing.assert_allclose(got.cpu().numpy(), want, rtol=0, atol=rtol * abs(want).max(), err_msg=leaf)


@everywhere
@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.both])
def test_intended_agrees_with_published_where_no_departure_is_listed(name, prefix):
    case = CASES[name]
    (theirs, a), (ours, b) = (run(case, prefix, torch.float64, compat) for compat in ("published", "intended"))
    assert ours.total.item() == theirs.total.item()
    theirs.total.backward()
    ours.total.backward()
    assert all(a[k].grad is b[k].grad is None or torch.equal(a[k].grad, b[k].grad) for k in a)


@everywhere
@pytest.mark.parametrize("name", [n for n in CASES if n.startswith("kinematic")])
def test_intended_kinematic_averages_over_the_groups_that_have_it(name, prefix):
    out, _ = run(CASES[name], prefix, torch.float64, "intended")
    groups = {"": (1, 1), "multi/": (3, 2)}[prefix]
    want = float(golden()[f"{prefix}val/{name}/f64p"]) * groups[0] / groups[1]
    np.testing.assert_allclose(out.total.item(), want, rtol=1e-10)
