"""Every term against the released code's values and gradients, in float32 and float64, on both golden sets."""
import dataclasses
import json

import numpy as np
import pytest
import torch

from tests.objectives.golden import CASES, SETS, golden, inputs, plan_of

PARTS = {"pred": "loss_pred", "hw": "hw_loss", "context": "loss_context", "fwm_static": "fwm_static_loss",
         "fwm_orth": "fwm_orth_loss", "ld": "ld_loss"}  # fmt: skip
PRECISION = {"f32": (torch.float32, 1e-5), "f64p": (torch.float64, 1e-10)}
everywhere = pytest.mark.parametrize("prefix", list(SETS), ids=["small", "multi"])
each_precision = pytest.mark.parametrize("kind", list(PRECISION))


def tolerance(kind, case):
    dtype, rtol = PRECISION[kind]
    return dtype, max(rtol, 1e-8) if case.distance or "context" in case.spec else rtol


def run(case, prefix, dtype, compat=None):
    state, leaves = inputs(prefix, dtype)
    plan, heads = plan_of(case, prefix, dtype, compat)
    out = plan(dataclasses.replace(state, step=case.step, total_steps=30000, epoch=0, epochs=100))
    return out, leaves | heads


def test_every_golden_case_is_tried():
    names = {key.split("/")[1] for key in golden() if key.startswith("val/")}
    assert names == set(CASES)
    described = json.loads(str(golden()["meta_json"]))["cases"]
    assert set(described["main"]) == set(CASES)


@everywhere
@each_precision
@pytest.mark.parametrize("name", list(CASES))
def test_values_and_gradients(name, prefix, kind):
    case = CASES[name]
    dtype, rtol = tolerance(kind, case)
    out, leaves = run(case, prefix, dtype)
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
    value_to_derive = out.total if total or case.distance else out.total / next(iter(out.weights.values()) or 1)
    if "context" in case.spec and not total:  # the golden context cases are not multiplied by the schedule
        value_to_derive = None
    if value_to_derive is not None:
        value_to_derive.backward()
        check_gradients(leaves, wanted, rtol if stored == kind else 1e-5)


def check_gradients(leaves, wanted, rtol):
    for leaf, want in wanted.items():
        got = leaves[leaf].grad
        if want is None:
            assert got is None or not got.any(), f"{leaf} must get no gradient"
        else:
            np.testing.assert_allclose(got.numpy(), want, rtol=0, atol=rtol * abs(want).max(), err_msg=leaf)


@everywhere
@each_precision
@pytest.mark.parametrize("name", [n for n, c in CASES.items() if "context" in c.spec and not n.startswith("total")])
def test_context_gradients_at_full_weight(name, prefix, kind):
    case = dataclasses.replace(CASES[name], spec={"context": {**CASES[name].spec["context"], "warmup": [0, 0]}})
    dtype, rtol = tolerance(kind, case)
    out, leaves = run(case, prefix, dtype)
    assert out.weights["context"] == 1.0
    out.total.backward()
    stored = kind if prefix == "" else "f64p"
    wanted = {leaf: golden().get(f"{prefix}grad/{name}/{stored}/{leaf}") for leaf in leaves}
    assert any(want is not None for want in wanted.values())
    check_gradients(leaves, wanted, rtol if stored == kind else 1e-5)
