"""The reference's loss terms against values and gradients of the published code."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from vjepa_fast.reference.losses import context_distances
from vjepa_fast.reference.mask_distance import mask_distance
from vjepa_fast.reference.step import normalize_levels
from vjepa_fast.reference.total import Losses

GOLDENS = Path(__file__).parents[1] / "goldens"
SETS = {"": ([8], 4), "multi/": ([8, 4, 1], 4)}  # frames of each group, patch; tubelets of 2 frames
FWM_TOTAL = {
    "pred": {},
    "hw": {},
    "context": {"coeff": 0.5, "warmup": (15000, 30000)},
    "fwm_static": {"coeff": 0.05},
    "fwm_orth": {"coeff": 0.01},
    "ld": {"channels": "dynamics", "hard_weighting": 1.0},
}
CASES = {
    "pred_l1": {"pred": {}},
    "pred_l2": {"pred": {"loss_exp": 2.0}},
    "context_w": {"context": {"warmup": (0, 0)}},
    "context_w_l2": {"context": {"warmup": (0, 0), "loss_exp": 2.0}},
    "context_now": {"context": {"warmup": (0, 0), "weight_distance": False}},
    "hw_t1": {"hw": {}},
    "hw_t05": {"hw": {"temp": 0.5}},
    "hw_t01": {"hw": {"temp": 0.1}},
    "hw_t1_l2": {"hw": {"loss_exp": 2.0}},
    "fwm_static": {"fwm_static": {}},
    "fwm_static_r025": {"fwm_static": {"app_ratio": 0.25}},
    "fwm_orth": {"fwm_orth": {}},
    "fwm_orth_r025": {"fwm_orth": {"app_ratio": 0.25}},
    "ld": {"ld": {}},
    "ld_fwm": {"ld": {"channels": "dynamics"}},
    "ld_hw": {"ld": {"hard_weighting": 1.0}},
    "ld_hw_t05": {"ld": {"hard_weighting": 0.5}},
    "ld_fwm_hw": {"ld": {"channels": "dynamics", "hard_weighting": 1.0}},
    "delta": {"delta": {}},
    "ltc": {"ltc": {}},
    "ltc_m02": {"ltc": {"margin": 0.2}},
    "spectral": {"spectral": {}},
    "ac": {"ac": {}},
    "fac": {"ac": {"channels": "dynamics"}},
    "kinematic_l1": {"kinematic": {}},
    "kinematic_acceleration": {"kinematic": {"type": "acceleration"}},
    "kinematic_huber": {"kinematic": {"type": "huber"}},
    "kinematic_l1_split05": {"kinematic": {"split_ratio": 0.5}},
    "kinematic_acceleration_split05": {"kinematic": {"type": "acceleration", "split_ratio": 0.5}},
    "velgate": {"velgate": {}},
    "velgate_p03": {"velgate": {"percentile": 0.3}},
    "hamiltonian": {"hamiltonian": {}},
    "hamiltonian_l2": {"hamiltonian": {"loss_exp": 2.0}},
    "total_fwm_hw_ld_step22500": FWM_TOTAL,
    "total_fwm_hw_ld_step0": FWM_TOTAL,
}
GRADFIX = {f"{case}_GRADFIX": CASES[case] for case in ("ld_hw", "ld_hw_t05", "ld_fwm_hw", "total_fwm_hw_ld_step22500")}


@cache
def golden():
    with np.load(GOLDENS / "losses_small.npz") as file:
        return {name: file[name] for name in file.files}


def test_every_case_of_the_goldens_is_covered():
    meta = json.loads((GOLDENS / "losses_small_meta.json").read_text())
    for prefix in ("main", "multi/"):
        assert set(meta[prefix]) == set(CASES) | set(GRADFIX)


def inputs(prefix, dtype):
    """LatentState-like lists of leaves, and the leaves by golden name."""
    z, leaves = golden(), {}

    def leaf(name):
        leaves[name] = torch.from_numpy(z[f"{prefix}in/{name}"]).to(dtype).requires_grad_(True)
        return leaves[name]

    def masks(kind, i):
        return [torch.from_numpy(z[f"{prefix}in/{kind}/{i}/{j}"]).long() for j in range(2)]

    frames, patch = SETS[prefix]
    groups = range(len(frames))
    clips = [torch.from_numpy(z[f"{prefix}in/clip/{i}"]).to(dtype) for i in groups]
    state = {
        "clips": clips,
        "grids": [(max(1, f // 2), clip.shape[3] // patch, clip.shape[4] // patch) for f, clip in zip(frames, clips)],
        "h": [leaf(f"h/{i}") for i in groups],
        "masks_enc": [masks("masks_enc", i) for i in groups],
        "masks_pred": [masks("masks_pred", i) for i in groups],
    }
    for name, key in (("z", "z_enc"), ("z_pred", "z_pred"), ("z_context", "z_context")):
        state[name] = [[leaf(f"{key}/{i}/{j}") for j in range(2)] for i in groups]
    return state, leaves


def build(objectives, prefix, dtype, ld_grad):
    heads = {"ld": "dyn_head", "ac": "action_head", "hamiltonian": "hamiltonian_net"}
    z, leaves = golden(), {}
    hidden = 16 if not prefix else 8
    with_hidden = {t: {**f, "hidden_dim": hidden} if t in heads else f for t, f in objectives.items()}
    losses = Losses(with_hidden, z[f"{prefix}in/h/0"].shape[2], ld_grad=ld_grad)
    for term, head in losses.heads.items():
        name = heads[term]
        if objectives[term].get("channels") == "dynamics":
            name += {"ld": "_fwm", "ac": "_fac"}[term]
        head.load_state_dict({k: torch.from_numpy(z[f"{prefix}in/{name}/{k}"]) for k in head.state_dict()})
        head.to(dtype)
        leaves.update({f"{name}/{k}": p for k, p in head.named_parameters()})
    return losses, leaves


@pytest.mark.parametrize("prefix", SETS, ids=["main", "multi"])
@pytest.mark.parametrize("case", [*CASES, *GRADFIX])
def test_values_and_gradients(prefix, case):
    for dtype, key, rtol in ((torch.float32, "f32", 1e-5), (torch.float64, "f64p", 1e-10)):
        z = golden()
        if "context_w" in case or "total" in case:
            rtol = max(rtol, 1e-8)  # the distance weights are float32 throughout
        state, leaves = inputs(prefix, dtype)
        losses, head_leaves = build({**CASES, **GRADFIX}[case], prefix, dtype, ld_grad=case.endswith("GRADFIX"))
        leaves.update(head_leaves)
        step = 22500 if "step22500" in case else 0 if "step0" in case else 30000
        state.update(step=step, epoch=0)
        total, _, _ = losses(**state)
        want = float(z[f"{prefix}val/{case}/{key}"])
        assert total.item() == pytest.approx(want, rel=rtol)
        if key == "f32" and prefix:
            continue  # no float32 gradients are stored
        stored = {n.split(f"/{key}/", 1)[1]: z[n] for n in z if n.startswith(f"{prefix}grad/{case}/{key}/")}
        if not stored:
            assert not total.requires_grad
            continue
        gradients = dict(zip(leaves, torch.autograd.grad(total, list(leaves.values()), allow_unused=True)))
        for name, gradient in gradients.items():
            if name not in stored:
                # A leaf that the graph reaches through nothing but zeros counts as having none.
                assert gradient is None or not gradient.any(), name
                continue
            scale = np.abs(stored[name]).max()
            error = np.abs(gradient.numpy() - stored[name]).max()
            assert error <= (1e-5 if key == "f32" else max(rtol, 1e-10)) * scale, name


@pytest.mark.parametrize("prefix", SETS, ids=["main", "multi"])
def test_mask_distance(prefix):
    state, _ = inputs(prefix, torch.float32)
    distances = context_distances(state["masks_enc"], state["masks_pred"], state["grids"])
    for i, group in enumerate(distances):
        for j, distance in enumerate(group):
            np.testing.assert_allclose(distance, golden()[f"{prefix}out/mask_distance/{i}/{j}"], rtol=1e-6)


@pytest.mark.parametrize("size", [16, 32])
def test_mask_distance_on_large_grids(size):
    z = golden()
    enc, pred = (torch.from_numpy(z[f"mask_distance_grid{size}/masks_{kind}"]).long() for kind in ("enc", "pred"))
    for offset in (0, 1):
        got = mask_distance(enc, pred, (1, size, size), bool(offset))
        np.testing.assert_allclose(got, z[f"mask_distance_grid{size}/offset{offset}"], rtol=1e-6)


def test_offset_on_small_grids_fails_as_published():
    with pytest.raises(ZeroDivisionError):
        mask_distance(torch.tensor([[0]]), torch.tensor([[1]]), (1, 14, 14), offset=True)


@pytest.mark.parametrize(("dtype", "key"), [(torch.float32, "f32"), (torch.float64, "f64")])
def test_target_normalisation(dtype, key):
    z = golden()
    x = torch.from_numpy(z["target_ln/in"]).to(dtype).requires_grad_(True)
    out = normalize_levels(x, 4)
    rtol, atol = (1e-5, 2e-6) if key == "f32" else (1e-10, 1e-12)
    np.testing.assert_allclose(out.detach(), z[f"target_ln/out/{key}"], rtol=rtol, atol=atol)
    (gradient,) = torch.autograd.grad((out * torch.from_numpy(z["target_ln/cot"]).to(dtype)).sum(), x)
    np.testing.assert_allclose(gradient, z[f"target_ln/grad_noema/{key}"], rtol=rtol, atol=atol)
