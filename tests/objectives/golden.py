"""The golden losses of arXiv:2605.17165's released code: inputs, cases and how a case is asked for here.

Case names, values and gradients: tests/goldens/losses_small.npz; ``/f32`` is the literal float32 run, ``/f64p`` the
same in double. Sets: "" (one clip length, two masks) and "multi/" (three lengths, the last one an image).
"""

import functools
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from vjepa_fast.objectives import LatentState, build_objectives

FILE = Path(__file__).parent.parent / "goldens" / "losses_small.npz"
SETS = {"": dict(frames=[8], embed_dim=24, masks=2), "multi/": dict(frames=[8, 4, 1], embed_dim=8, masks=2)}
LEVELS, TUBELET, SIDE = 4, 2, 4
NOW = {"warmup": [0, 0]}


@dataclass(frozen=True)
class Case:
    """A golden case: the plan it is, the compat mode, the golden heads (term -> name in the file)."""

    spec: dict
    compat: str = "published"
    heads: dict = field(default_factory=dict)
    step: int = 0
    both: bool = True  # the other compat mode gives the same values

    @property
    def distance(self):
        return any(fields.get("weight_distance") for fields in self.spec.values())


def _headline(compat, step):
    spec = {
        "pred": {},
        "hw": {},
        "context": {"coeff": 0.5, "warmup": [15000, 30000], "weight_distance": True},
        "fwm_static": {"coeff": 0.05},
        "fwm_orth": {"coeff": 0.01},
        "ld": {"hidden_dim": 0, "channels": "dynamics", "hard_weighting": 1.0},
    }
    return Case(spec, compat, {"ld": "dyn_head_fwm"}, step, both=False)


def _cases():
    cases = {
        "pred_l1": Case({"pred": {}}),
        "pred_l2": Case({"pred": {"loss_exp": 2.0}}),
        "context_w": Case({"context": {**NOW, "weight_distance": True}}),
        "context_w_l2": Case({"context": {**NOW, "weight_distance": True, "loss_exp": 2.0}}),
        "context_now": Case({"context": NOW}),
        "hw_t1": Case({"hw": {}}),
        "hw_t05": Case({"hw": {"temp": 0.5}}),
        "hw_t01": Case({"hw": {"temp": 0.1}}),
        "hw_t1_l2": Case({"hw": {"loss_exp": 2.0}}),
        "fwm_static": Case({"fwm_static": {}}),
        "fwm_static_r025": Case({"fwm_static": {"app_ratio": 0.25}}),
        "fwm_orth": Case({"fwm_orth": {}}),
        "fwm_orth_r025": Case({"fwm_orth": {"app_ratio": 0.25}}),
        "ld": Case({"ld": {}}, heads={"ld": "dyn_head"}),
        "ld_fwm": Case({"ld": {"channels": "dynamics"}}, heads={"ld": "dyn_head_fwm"}),
        "delta": Case({"delta": {}}),
        "ltc": Case({"ltc": {}}),
        "ltc_m02": Case({"ltc": {"margin": 0.2}}),
        "spectral": Case({"spectral": {}}),
        "ac": Case({"ac": {}}, heads={"ac": "action_head"}),
        "fac": Case({"ac": {"channels": "dynamics"}}, heads={"ac": "action_head_fac"}),
        "velgate": Case({"velgate": {}}),
        "velgate_p03": Case({"velgate": {"percentile": 0.3}}),
        "hamiltonian": Case({"hamiltonian": {}}, heads={"hamiltonian": "hamiltonian_net"}),
        "hamiltonian_l2": Case({"hamiltonian": {"loss_exp": 2.0}}, heads={"hamiltonian": "hamiltonian_net"}),
    }
    for kind in ("l1", "acceleration", "huber"):
        cases[f"kinematic_{kind}"] = Case({"kinematic": {"type": kind}}, both=False)
    for kind in ("l1", "acceleration"):
        cases[f"kinematic_{kind}_split05"] = Case({"kinematic": {"type": kind, "split_ratio": 0.5}}, both=False)
    for name, head, fields in (
        ("ld_hw", "dyn_head", {"hard_weighting": 1.0}),
        ("ld_hw_t05", "dyn_head", {"hard_weighting": 0.5}),
        ("ld_fwm_hw", "dyn_head_fwm", {"hard_weighting": 1.0, "channels": "dynamics"}),
    ):
        cases[name] = Case({"ld": fields}, heads={"ld": head}, both=False)
        cases[f"{name}_GRADFIX"] = Case({"ld": fields}, "intended", {"ld": head}, both=False)
    cases["total_fwm_hw_ld_step22500"] = _headline("published", 22500)
    cases["total_fwm_hw_ld_step0"] = _headline("published", 0)
    cases["total_fwm_hw_ld_step22500_GRADFIX"] = _headline("intended", 22500)
    return cases


CASES = _cases()


@functools.cache
def golden():
    with np.load(FILE) as f:
        return {key: f[key] for key in f.files}


def tensor(key, dtype=None, grad=False, device="cpu"):
    x = torch.from_numpy(golden()[key].copy()).to(device)
    return x if dtype is None else x.to(dtype).requires_grad_(grad)


def inputs(prefix, dtype, grad=True, target_grad=True, device="cpu"):
    """(LatentState, {golden input name: leaf}) of a set."""
    cfg = SETS[prefix]
    leaves = {}

    def leaf(name, grad=grad):
        leaves[name] = tensor(f"{prefix}in/{name}", dtype, grad, device)
        return leaves[name]

    groups, masks = range(len(cfg["frames"])), range(cfg["masks"])
    ids = {
        kind: [[tensor(f"{prefix}in/{kind}/{i}/{j}", device=device).long() for j in masks] for i in groups]
        for kind in ("masks_enc", "masks_pred")
    }
    state = LatentState(
        grids=[(max(1, f // TUBELET), SIDE, SIDE) for f in cfg["frames"]],
        clips=[tensor(f"{prefix}in/clip/{i}", dtype, device=device) for i in groups],
        h=[leaf(f"h/{i}", target_grad) for i in groups],
        z=[[leaf(f"z_enc/{i}/{j}") for j in masks] for i in groups],
        z_pred=[[leaf(f"z_pred/{i}/{j}") for j in masks] for i in groups],
        z_context=[[leaf(f"z_context/{i}/{j}") for j in masks] for i in groups],
        **ids,
    )
    return state, leaves


def plan_of(case, prefix, dtype, compat=None, device="cpu"):
    """(plan with the golden heads, {golden parameter name: parameter})."""
    spec = {name: dict(fields) for name, fields in case.spec.items()}
    loaded = {}
    for term, head in case.heads.items():
        stem = f"{prefix}in/{head}/"
        loaded[term] = {k.removeprefix(stem): tensor(k, dtype) for k in golden() if k.startswith(stem)}
        spec[term]["hidden_dim"] = next(iter(loaded[term].values())).shape[0]
    plan = build_objectives(
        spec,
        levels=LEVELS,
        embed_dim=SETS[prefix]["embed_dim"],
        compat=compat or case.compat,
        target_grad=True,
        stop_gradient=False,
    ).to(device, dtype)
    named = {}
    for term, weights in loaded.items():
        plan.heads[term].load_state_dict(weights)
        named |= {f"{case.heads[term]}/{k}": p for k, p in plan.heads[term].named_parameters()}
    return plan, named
