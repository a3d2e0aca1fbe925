"""Heads and the weighted sum of the terms, configured by term as ``vjepa_fast.objectives`` is (its field names)."""

from __future__ import annotations

from torch import nn

from vjepa_fast.reference import losses
from vjepa_fast.reference.schedules import context_weight, kinematic_anneal


class Losses(nn.Module):
    """``objectives``: {term: {field: value}}. ``forward`` returns (total, {term: value}, {term: coefficient}).

    ``ld_grad`` lets the LD term train under hard weighting, which as published it does not. ``sigreg_seed``: a seed of
    SIGReg's directions, which as published depend on the step alone.
    """

    def __init__(self, objectives: dict, dim: int, *, ld_grad: bool = False, sigreg_seed: int = 0):
        super().__init__()
        self.objectives = {term: dict(fields) for term, fields in objectives.items()}
        self.ld_grad = ld_grad
        self.sigreg_seed = sigreg_seed
        self.heads = nn.ModuleDict()
        for term, fields in self.objectives.items():
            hidden = fields.get("hidden_dim", 256)
            width_in = dim - self.first_channel(fields, dim)
            if term == "ld":
                self.heads[term] = losses.mlp(width_in, hidden, dim)
            elif term == "ac":
                self.heads[term] = losses.mlp(width_in, hidden, fields.get("target_dim", 3))
            elif term == "hamiltonian":
                self.heads[term] = losses.HamiltonianNet(dim, hidden)

    @staticmethod
    def first_channel(fields: dict, dim: int) -> int:
        """Where the channels begin that a term with ``channels: dynamics`` reads."""
        if fields.get("channels", "all") == "all":
            return 0
        return losses.appearance_width(dim, fields.get("app_ratio", 0.5))

    def coefficient(self, term, fields, step, total_steps, epoch, epochs) -> float:
        """The term's coefficient at this step."""
        coeff = fields.get("coeff", 1.0)
        if term == "context":
            start, end = (
                round(x * total_steps) if isinstance(x, float) and x <= 1 else x
                for x in fields.get("warmup") or (0.5, 1.0)
            )
            return context_weight(coeff, step, start, end)
        if term == "kinematic" and fields.get("anneal", False):
            return kinematic_anneal(coeff, epoch, epochs)
        return coeff

    def value(self, term, fields, grids, clips, h, z, z_pred, z_context, masks_enc, masks_pred, step):
        """The term's value, before its coefficient."""
        exponent = fields.get("loss_exp", 1.0)
        ratio = fields.get("app_ratio", 0.5)
        on_grid = (z, grids, masks_enc)
        against_target = (z, h, grids, masks_enc)
        first = self.first_channel(fields, h[0].shape[-1])
        if term == "pred":
            return losses.token_loss(z_pred, h, masks_pred, exponent)
        if term == "context":
            weights = None
            distances = losses.context_distances(masks_enc, masks_pred, grids, fields.get("offset", False))
            if fields.get("weight_distance", True):
                weights = distances
            return losses.token_loss(z_context, h, masks_enc, exponent, weights)
        if term == "hw":
            return losses.hard_weighted_loss(z_pred, h, masks_pred, exponent, fields.get("temp", 1.0))
        if term == "fwm_static":
            return losses.fwm_static_loss(*on_grid, ratio)
        if term == "fwm_orth":
            return losses.fwm_orth_loss(*on_grid, ratio)
        if term == "ld":
            return losses.ld_loss(*against_target, self.heads[term], first, fields.get("hard_weighting"), self.ld_grad)
        if term == "delta":
            return losses.delta_loss(*against_target)
        if term == "ltc":
            return losses.ltc_loss(*against_target, fields.get("margin", 0.5))
        if term == "spectral":
            return losses.spectral_loss(*against_target)
        if term == "ac":
            return losses.ac_loss(z, clips, grids, masks_enc, self.heads[term], first)
        if term == "kinematic":
            return losses.kinematic_loss(h, grids, fields.get("type", "l1"), fields.get("split_ratio", 1.0))
        if term == "velgate":
            return losses.velgate_loss(*against_target, fields.get("percentile", 0.5))
        if term == "hamiltonian":
            return losses.hamiltonian_loss(*against_target, self.heads[term], fields.get("dt", 0.1), exponent)
        if term == "sigreg":
            return losses.sigreg_loss(z, step, fields.get("num_slices", 1024), self.sigreg_seed)
        raise ValueError(f"the reference has no term {term!r}")

    def forward(
        self,
        *,
        grids,
        clips,
        h,
        z,
        z_pred,
        z_context,
        masks_enc,
        masks_pred,
        step=0,
        total_steps=30000,
        epoch=0,
        epochs=100,
    ):
        """See the class; lists are nested as in ``reference.losses``."""
        total, values, coefficients = 0.0, {}, {}
        for term, fields in self.objectives.items():
            values[term] = self.value(term, fields, grids, clips, h, z, z_pred, z_context, masks_enc, masks_pred, step)
            coefficients[term] = self.coefficient(term, fields, step, total_steps, epoch, epochs)
            total = total + coefficients[term] * values[term]
        return total, values, coefficients
