"""The fourteen loss terms of arXiv:2605.17165 as its code computes them: scatter to the grid, compare t with t + 1.

Lists are nested as published: ``h[i]`` per frames-per-clip group, ``z[i][j]`` per group and mask. Shapes: B clips, grid
T x H x W, N = T*H*W, K tokens of a mask, D channels. ``Z [B,T,HW,D]`` holds context features on the grid, zeros
elsewhere; ``V [B,T,HW]`` says where. A pair is a position that is context at t and at t + 1. Groups with T < 2 are left
out of every grid term. Arithmetic is at least float32.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from vjepa_fast.reference.mask_distance import mask_distance
from vjepa_fast.reference.model import take_tokens


def full(x):
    """In float32, or in float64 if ``x`` is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def mlp(width_in: int, hidden: int, width_out: int):
    """The head of the ld and ac terms."""
    return nn.Sequential(nn.Linear(width_in, hidden), nn.GELU(), nn.Linear(hidden, width_out))


class HamiltonianNet(nn.Module):
    """The energy that the hamiltonian term learns."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        layers = [nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, 1)]
        self.net = nn.Sequential(*layers)

    def forward(self, x):
        """``[...,dim]`` -> ``[...,1]``."""
        return self.net(x)


# -- terms on tokens


def token_loss(z, h, masks, loss_exp=1.0, weights=None):
    """Mean over groups and masks of mean(abs(z - h at the mask)^p [/ weights]) / p: the pred and the context term."""
    loss, n = 0.0, 0
    for i in range(len(z)):
        for j in range(len(z[i])):
            error = torch.abs(full(z[i][j]) - take_tokens(full(h[i]), masks[i][j])) ** loss_exp
            if weights is not None:
                error = error * (1.0 / weights[i][j].unsqueeze(2))
            loss = loss + error.mean() / loss_exp
            n += 1
    return loss / n


def hard_weighted_loss(z, h, masks, loss_exp=1.0, temp=1.0):
    """As ``token_loss`` with each token weighted by K x softmax over its sample's tokens of error / temp, detached."""
    loss, n = 0.0, 0
    for i in range(len(z)):
        for j in range(len(z[i])):
            error = torch.abs(full(z[i][j]) - take_tokens(full(h[i]), masks[i][j])) ** loss_exp / loss_exp
            per_token = error.mean(dim=-1)
            with torch.no_grad():
                weight = torch.softmax(per_token / max(temp, 1e-6), dim=1) * per_token.shape[1]
            loss = loss + (weight.unsqueeze(-1) * error).mean()
            n += 1
    return loss / n


# -- terms on the grid


def to_grid(z, mask, grid):
    """``z [B,K,D]`` at ``mask [B,K]`` -> Z ``[B,T,HW,D]`` and V bool ``[B,T,HW]``."""
    duration, height, width = grid
    batch, _, dim = z.shape
    tokens = duration * height * width
    Z = z.new_zeros(batch, tokens, dim).scatter(1, mask.unsqueeze(-1).expand(-1, -1, dim), z)
    V = torch.zeros(batch, tokens, dtype=torch.bool, device=z.device)
    V.scatter_(1, mask, torch.ones_like(mask, dtype=torch.bool))
    return Z.view(batch, duration, -1, dim), V.view(batch, duration, -1)


def mean_over_masks(z, grids, masks, term):
    """Mean of ``term(i, j, Z, V)`` over the groups and masks for which it is not None; 0 if there is none."""
    total, n = z[0][0].new_zeros((), dtype=full(z[0][0]).dtype), 0
    for i, grid in enumerate(grids):
        if grid[0] < 2:
            continue
        for j in range(len(z[i])):
            value = term(i, j, *to_grid(full(z[i][j]), masks[i][j], grid))
            if value is not None:
                total = total + value
                n += 1
    return total / max(n, 1)


def pair_mask(V):
    """Bool ``[B,T-1,HW]``: context at t and at t + 1."""
    return V[:, :-1] & V[:, 1:]


def target_grid(h, grid):
    """``h [B,N,D]`` -> ``[B,T,HW,D]``."""
    return full(h).view(h.shape[0], grid[0], -1, h.shape[-1])


def pair_term(z, grids, masks, error):
    """``error(i, P, Z)`` is the loss of one mask's pairs P, skipped where there is no pair."""

    def term(i, j, Z, V):
        P = pair_mask(V)
        return error(i, P, Z) if P.any() else None

    return mean_over_masks(z, grids, masks, term)


def appearance_width(dim: int, app_ratio: float) -> int:
    """How many of ``dim`` channels are appearance."""
    return max(1, int(app_ratio * dim))


def fwm_static_loss(z, grids, masks, app_ratio=0.5):
    """Appearance channels do not change."""

    def error(i, P, Z):
        A = Z[..., : appearance_width(Z.shape[-1], app_ratio)]
        return torch.abs(A[:, 1:] - A[:, :-1])[P].mean()

    return pair_term(z, grids, masks, error)


def fwm_orth_loss(z, grids, masks, app_ratio=0.5):
    """Cross-covariance of appearance and dynamics channels, squared."""

    def term(i, j, Z, V):
        if not V.any():
            return None
        X = Z[V]
        width = appearance_width(X.shape[-1], app_ratio)
        A = X[:, :width] - X[:, :width].mean(dim=0, keepdim=True)
        Y = X[:, width:] - X[:, width:].mean(dim=0, keepdim=True)
        return ((A.T @ Y / max(X.shape[0] - 1, 1)) ** 2).mean()

    return mean_over_masks(z, grids, masks, term)


def ld_loss(z, h, grids, masks, head, first_channel=0, hard_temp=None, grad_under_hard=False):
    """Latent dynamics: ``head(Z[t])`` predicts ``h[t+1] - h[t]``.

    With ``hard_temp`` the pairs are weighted by softmax over all pairs of the batch, and, as published, the whole term
    is computed without autograd: it trains nothing. ``grad_under_hard`` detaches the weights alone.
    """

    def error(i, P, Z):
        H = target_grid(h[i], grids[i]).detach()
        delta = (H[:, 1:] - H[:, :-1])[P]
        distance = torch.abs(full(head(Z[:, :-1][P][:, first_channel:])) - delta)
        if hard_temp is None:
            return distance.mean()
        per_pair = distance.mean(dim=-1)
        weight = torch.softmax(per_pair.detach() / max(hard_temp, 1e-6), dim=0) * per_pair.shape[0]
        return (weight.unsqueeze(-1) * distance).mean()

    with torch.set_grad_enabled(torch.is_grad_enabled() and (hard_temp is None or grad_under_hard)):
        return pair_term(z, grids, masks, error)


def delta_loss(z, h, grids, masks):
    """Changes of the context features are those of the target."""

    def error(i, P, Z):
        H = target_grid(h[i], grids[i]).detach()
        return torch.abs((Z[:, 1:] - Z[:, :-1]) - (H[:, 1:] - H[:, :-1]))[P].mean()

    return pair_term(z, grids, masks, error)


def ltc_loss(z, h, grids, masks, margin=0.5):
    """Latent temporal contrast: nearer to the target of its own time than to that of the next."""

    def error(i, P, Z):
        H = target_grid(h[i], grids[i]).detach()
        now = F.cosine_similarity(Z[:, :-1][P], H[:, :-1][P], dim=-1, eps=1e-8)
        later = F.cosine_similarity(Z[:, :-1][P], H[:, 1:][P], dim=-1, eps=1e-8)
        return torch.clamp(margin - now + later, min=0).mean()

    return pair_term(z, grids, masks, error)


def spectral_loss(z, h, grids, masks):
    """Temporal spectrum of positions that are context throughout, higher frequencies weighted more; needs T >= 4."""

    def term(i, j, Z, V):
        duration = Z.shape[1]
        always = V.all(dim=1)
        if duration < 4 or not always.any():
            return None
        H = target_grid(h[i], grids[i]).detach()
        columns, targets = Z.transpose(1, 2)[always], H.transpose(1, 2)[always]
        distance = torch.abs(torch.fft.rfft(columns, dim=1) - torch.fft.rfft(targets, dim=1))
        weight = torch.linspace(0.1, 1.0, duration // 2 + 1, dtype=distance.dtype, device=distance.device)
        return (weight[None, :, None] * distance).mean()

    return mean_over_masks(z, grids, masks, term)


def ac_loss(z, clips, grids, masks, head, first_channel=0):
    """``head(Z[t])`` predicts the change of each patch's mean colour."""

    def error(i, P, Z):
        clip = full(clips[i])
        duration, height, width = grids[i]
        size = (clip.shape[2] // duration, clip.shape[3] // height, clip.shape[4] // width)
        colour = F.avg_pool3d(clip, size, size).flatten(3).permute(0, 2, 3, 1)
        delta = (colour[:, 1:] - colour[:, :-1])[P]
        return torch.abs(full(head(Z[:, :-1][P][:, first_channel:])) - delta).mean()

    return pair_term(z, grids, masks, error)


def kinematic_loss(h, grids, kind="l1", split_ratio=1.0):
    """Smoothness in time of the target features themselves; groups with T < 2 count as 0 in the mean, as published."""
    total = full(h[0]).new_zeros(())
    for i, grid in enumerate(grids):
        if grid[0] < 2:
            continue
        H = target_grid(h[i], grid)
        if split_ratio < 1.0:
            H = H[..., : int(split_ratio * H.shape[-1])]
        velocity = H[:, 1:] - H[:, :-1]
        if kind == "acceleration" and grid[0] >= 3:
            total = total + torch.abs(velocity[:, 1:] - velocity[:, :-1]).mean()
        elif kind == "huber":
            total = total + F.huber_loss(H[:, 1:], H[:, :-1], delta=0.1)
        else:
            total = total + torch.abs(velocity).mean()
    return total / len(h)


def velgate_loss(z, h, grids, masks, percentile=0.5):
    """Where the target moves slowly (under its quantile in space), the context features do not change."""

    def error(i, P, Z):
        H = target_grid(h[i], grids[i]).detach()
        speed = torch.linalg.vector_norm(H[:, 1:] - H[:, :-1], dim=-1)
        gate = speed <= torch.quantile(speed, percentile, dim=-1, keepdim=True)
        return (gate.unsqueeze(-1) * torch.abs(Z[:, 1:] - Z[:, :-1]))[P].mean()

    return pair_term(z, grids, masks, error)


def hamiltonian_loss(z, h, grids, masks, net, dt=0.1, loss_exp=1.0):
    """A symplectic Euler step of a learned energy takes (q, p) = halves of Z[t] to those of h[t+1]."""

    def gradient(q, p, wrt):
        return torch.autograd.grad(net(torch.cat([q, p], dim=-1)).sum(), wrt, create_graph=True)[0]

    def error(i, P, Z):
        H = target_grid(h[i], grids[i]).detach()[:, 1:][P]
        half = H.shape[-1] // 2
        now = Z[:, :-1][P]
        if not now.requires_grad:
            now = now.detach().requires_grad_(True)
        q, p = now[:, :half], now[:, half:]
        q_next = q + dt * gradient(q, p, p)
        p_next = p - dt * gradient(q_next, p, q_next)
        q_error = (torch.abs(q_next - H[:, :half]) ** loss_exp).mean() / loss_exp
        return q_error + (torch.abs(p_next - H[:, half:]) ** loss_exp).mean() / loss_exp

    with torch.enable_grad():
        return pair_term(z, grids, masks, error)


def sigreg_loss(z, step, num_slices=1024, seed=0):
    """Distance of random one-dimensional projections from a standard normal, by their characteristic functions.

    As published the directions depend on the number of calls before, which is the step, and on no ``seed``.
    """
    x = torch.cat([full(zij).flatten(0, 1) for zi in z for zij in zi])
    generator = torch.Generator(device=x.device).manual_seed((seed * 1_000_003 + step) % (1 << 62))
    directions = torch.randn(x.shape[1], num_slices, generator=generator, device=x.device).to(x.dtype)
    projected = x @ (directions / directions.norm(dim=0, keepdim=True))
    points = torch.linspace(0, 3, 17, dtype=x.dtype, device=x.device)
    total = x.new_zeros(())
    for k, t in enumerate(points):
        weight = (1 if k in (0, 16) else 2) * (3 / 16) * torch.exp(-t * t / 2)
        real = torch.cos(t * projected).mean(dim=0) - torch.exp(-t * t / 2)
        imaginary = torch.sin(t * projected).mean(dim=0)
        total = total + weight * (real**2 + imaginary**2)
    return (x.shape[0] * total).mean()


def context_distances(masks_enc, masks_pred, grids, offset=False):
    """``mask_distance`` of every group and mask."""
    return [
        [mask_distance(enc, pred, grid, offset) for enc, pred in zip(enc_i, pred_i)]
        for enc_i, pred_i, grid in zip(masks_enc, masks_pred, grids)
    ]
