"""The ops as they are benchmarked: inputs of the published step (16 x 224 x 224, 8 x 14 x 14 tokens, D = 4 x 768) and,
for each, the published algorithm (``reference``), our eager code, the same under ``torch.compile``, and the fused op.

Every function of a case computes the same from the same inputs; ``bench_ops.py`` compares the results before it times.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from vjepa_fast import ops, reference
from vjepa_fast.models import rope
from vjepa_fast.ops import _backend, latent
from vjepa_fast.reference import losses
from vjepa_fast.reference.mask_distance import mask_distance
from vjepa_fast.reference.step import normalize_levels

GRID, TUBELET, PATCH, FRAMES, SIDE = (8, 14, 14), 2, 16, 16, 224
N = GRID[0] * GRID[1] * GRID[2]
LEVELS, E, HEADS = 4, 768, 12
SPECS = (ops.BlockSpec(), ops.BlockSpec(num_blocks=2, spatial_scale=(0.7, 0.7)))
MEAN, STD = ops.IMAGENET_MEAN, ops.IMAGENET_STD


@dataclass
class Case:
    """One op on one shape.

    Attributes:
        functions: provider -> function of no arguments. The first output (a tensor or a list) is compared and, if
            ``leaves`` are given, differentiated.
        leaves: the tensors that receive gradient.
        floor_bytes: forward; ``floor_full`` forward and backward. None: something else than memory is the limit.
        compare: whether the outputs of the providers must agree (masks are drawn by other generators).
        compile_: function to be put under torch.compile as the provider ``compiled``; None: there is none.
    """

    op: str
    shape: str
    functions: dict[str, Callable[[], object]]
    leaves: list[Tensor] = field(default_factory=list)
    floor_bytes: int | None = None
    floor_full: int | None = None
    compare: bool = True
    compile_: Callable[[], object] | None = None
    atol: float = 1e-4


def forced(backend: str, fn: Callable[[], object]) -> Callable[[], object]:
    def run():
        with ops.use_backend(backend):
            return fn()

    return run


def eager_code(op: str) -> Callable:
    """The eager implementation itself, which torch.compile can look into, as it cannot into a custom op."""
    return _backend._implementations[op]["eager"][0]


class Inputs:
    """Clips, masks and features of one batch; made on demand, always the same."""

    def __init__(self, batch: int, device: torch.device, dtype: torch.dtype):
        self.batch, self.device, self.dtype = batch, device, dtype
        self.size = torch.finfo(dtype).bits // 8

    def randn(self, *shape: int, seed: int, grad: bool = False) -> Tensor:
        g = torch.Generator(self.device).manual_seed(seed)
        x = torch.randn(shape, generator=g, device=self.device, dtype=torch.float32).to(self.dtype)
        return x.requires_grad_(grad)

    def clip(self) -> Tensor:
        g = torch.Generator(self.device).manual_seed(1)
        shape = (self.batch, 3, FRAMES, SIDE, SIDE)
        return torch.randint(0, 256, shape, dtype=torch.uint8, device=self.device, generator=g)

    def masks(self) -> tuple[list[Tensor], list[Tensor]]:
        drawn = ops.sample_block_masks(self.batch, GRID, SPECS, seed=0, step=3, device=self.device)
        return drawn.trim()


def patch_embed(x: Inputs) -> Case:
    """Pixels to embedded context tokens of both masks: what the context encoder does before its first block.

    The reference normalises the clip once and embeds all of it for every mask, as published; eager embeds it once.
    """
    clip, (enc, _) = x.clip(), x.masks()
    conv = torch.nn.Conv3d(3, E, (TUBELET, PATCH, PATCH), (TUBELET, PATCH, PATCH), device=x.device).to(x.dtype)
    idx, kept = torch.cat(enc, 1), sum(m.shape[1] for m in enc)
    stats = [torch.tensor(s, device=x.device).view(1, 3, 1, 1, 1) for s in (MEAN, STD)]

    def embedded():
        normal = ((clip.float() / 255.0 - stats[0]) / stats[1]).to(x.dtype)
        return lambda: conv(normal).flatten(2).transpose(1, 2)

    def published():
        embed = embedded()
        return torch.cat([reference.model.take_tokens(embed(), m) for m in enc], 1)

    def once():
        return reference.model.take_tokens(embedded()(), idx)

    def fused():
        rows = ops.tubelet_patchify(clip, idx, TUBELET, PATCH, MEAN, STD, x.dtype)
        return F.linear(rows, conv.weight.flatten(1), conv.bias) if x.device.type != "cpu" else _linear(rows, conv)

    return Case(
        "patch_embed",
        f"B{x.batch} {kept} of {N} tokens",
        {"reference": published, "eager": once, "fused": fused},
        leaves=[conv.weight, conv.bias],
        compile_=once,
        atol=2e-3 if x.dtype == torch.float32 else 5e-2,
    )


def _linear(rows, conv):
    from vjepa_fast.ops.linear import linear

    return linear(rows, conv.weight.flatten(1), conv.bias)


def tubelet_patchify(x: Inputs) -> Case:
    clip, (enc, _) = x.clip(), x.masks()
    idx = torch.cat(enc, 1)
    pixels = 3 * TUBELET * PATCH * PATCH

    def published():
        stats = [torch.tensor(s, device=x.device).view(1, 3, 1, 1, 1) for s in (MEAN, STD)]
        normal = (clip.float() / 255.0 - stats[0]) / stats[1]
        t, h, w = GRID
        rows = normal.view(x.batch, 3, t, TUBELET, h, PATCH, w, PATCH).permute(0, 2, 4, 6, 1, 3, 5, 7)
        return reference.model.take_tokens(rows.reshape(x.batch, N, pixels), idx).to(x.dtype)

    def ours():
        return ops.tubelet_patchify(clip, idx, TUBELET, PATCH, MEAN, STD, x.dtype)

    def plain():
        return eager_code("tubelet_patchify")(clip, idx, TUBELET, PATCH, list(MEAN), list(STD), x.dtype)

    return Case(
        "tubelet_patchify",
        f"B{x.batch} {idx.shape[1]} of {N} tokens",
        {"reference": published, "eager": plain, "fused": ours},
        compile_=plain,
        floor_bytes=idx.numel() * (pixels * (1 + x.size) + 8),
        atol=1e-5 if x.size == 4 else 2e-2,
    )


def patch_mean(x: Inputs) -> Case:
    clip = x.clip()

    def published():
        stats = [torch.tensor(s, device=x.device).view(1, 3, 1, 1, 1) for s in (MEAN, STD)]
        normal = (clip.float() / 255.0 - stats[0]) / stats[1]
        return F.avg_pool3d(normal, (TUBELET, PATCH, PATCH), (TUBELET, PATCH, PATCH)).permute(0, 2, 3, 4, 1)

    def ours():
        return ops.patch_mean(clip, TUBELET, PATCH, MEAN, STD)

    def plain():
        return eager_code("patch_mean")(clip, TUBELET, PATCH, list(MEAN), list(STD))

    return Case(
        "patch_mean",
        f"B{x.batch} clip",
        {"reference": published, "eager": plain, "fused": ours},
        compile_=plain,
        floor_bytes=clip.numel() + x.batch * N * 3 * 4,
    )


def motion_saliency(x: Inputs, mode: str = "trilinear") -> Case:
    """The reference takes the normalised float clip, as the published collator gets it; its conversion is not timed."""
    clip = x.clip()
    normal = ops.normalize_clip(clip)

    def published():
        return reference.motion_map(normal, GRID, per_sample=True)

    def ours():
        return ops.motion_saliency(clip, GRID, MEAN, STD, mode)

    def plain():
        return eager_code("motion_saliency")(clip, list(GRID), list(STD), mode, "sample")

    functions = {"reference": published, "eager": plain, "fused": ours}
    if mode != "trilinear":
        del functions["reference"]  # the published code has no such mode
    pixels = clip.numel() if mode == "area" else x.batch * N * 3 * 8 * 2
    return Case(
        "motion_saliency", f"B{x.batch} clip {mode}", functions, compile_=plain, floor_bytes=pixels + x.batch * N * 4
    )


def guided_masks(x: Inputs) -> Case:
    """Motion maps and masks of both specs, from the clip to dense index lists; the reference is the published collator.

    The reference takes the normalised float clip on the CPU, and the copy into it is not timed. Masks differ: other
    generators.
    """
    clip = x.clip()
    normal = ops.normalize_clip(clip).cpu()
    fields = ("num_blocks", "spatial_scale", "temporal_scale", "aspect_ratio")
    configs = [{**{f: getattr(s, f) for f in fields}, "motion_guided": True} for s in SPECS]
    collator = reference.MaskCollator(configs, GRID, per_sample_motion=True)
    specs = tuple(ops.BlockSpec(**c) for c in configs)

    def ours():
        saliency = ops.motion_saliency(clip, GRID, MEAN, STD)
        masks = ops.sample_block_masks(x.batch, GRID, specs, saliency, seed=0, step=3, device=x.device)
        return masks.trim()[0] if x.device.type == "cpu" else masks.enc  # on a GPU lengths travel while it goes on

    return Case(
        "guided_masks",
        f"B{x.batch} clip, 2 masks",
        {"reference": lambda: collator(normal)[0], "eager": forced("eager", ours), "fused": ours},
        compare=False,
    )


def block_masks(x: Inputs) -> Case:
    def ours():
        return ops.sample_block_masks(x.batch, GRID, SPECS, seed=0, step=3, device=x.device).enc

    return Case("sample_block_masks", f"B{x.batch} 2 masks", {"eager": forced("eager", ours), "fused": ours})


def mask_distances(x: Inputs) -> Case:
    enc, pred = x.masks()

    def ours():
        return [ops.mask_distance(e, p, GRID) for e, p in zip(enc, pred)]

    def plain():
        return [eager_code("mask_distance")(e, p, *GRID, 1) for e, p in zip(enc, pred)]

    return Case(
        "mask_distance",
        f"B{x.batch} 2 masks",
        {"reference": lambda: [mask_distance(e, p, GRID) for e, p in zip(enc, pred)], "eager": plain, "fused": ours},
    )


class _Given(torch.nn.Module):
    """In the place of a head: hands out, in turn, outputs that were computed before."""

    def __init__(self, outputs: list[Tensor]):
        super().__init__()
        self.outputs, self.turn = outputs, 0

    def forward(self, _):
        self.turn = (self.turn + 1) % len(self.outputs)
        return self.outputs[self.turn - 1]


@contextlib.contextmanager
def transparent() -> Iterator[None]:
    """The latent skeletons as plain PyTorch, for torch.compile to look into; autograd derives the backward."""

    def token(z, h, idx, after, key, numbers, target, places, levels, normalize, keep):
        return latent._token_terms(z, h, idx, after, key, numbers, target, places, levels, normalize)[0].mean(-1), None

    def pair(z, h, idx, after, before, keys, numbers, places, levels, normalize):
        parts = latent._pair_terms(z, h, idx, after, keys, numbers, places, levels, normalize)
        return torch.stack([p[0].sum(-1) / count for p, count in parts])

    kept = latent._token, latent._pair
    latent._token, latent._pair = token, pair
    try:
        yield
    finally:
        latent._token, latent._pair = kept


def latent_loss(x: Inputs) -> Case:
    """The loss block of ``fwm_hw_ld`` from raw targets to gradients: target normalisation, prediction, hard regions,
    distance-weighted context, static appearance, latent dynamics under hard weighting.

    Matrix products are left out on all sides: the head's outputs are given (and receive gradient), and the
    cross-covariance is not asked for. The reference is also given the distances, ours computes them.
    """
    from vjepa_fast.objectives import LatentState, build_objectives

    d = LEVELS * E
    enc, pred = x.masks()
    h = 2 * x.randn(x.batch, N, d, seed=1) + 0.5
    z_pred = [x.randn(*m.shape, d, seed=2 + j, grad=True) for j, m in enumerate(pred)]
    z_context = [x.randn(*m.shape, d, seed=4 + j, grad=True) for j, m in enumerate(enc)]
    z = [x.randn(*m.shape, d, seed=6 + j, grad=True) for j, m in enumerate(enc)]
    change = [x.randn(*m.shape, d, seed=8 + j, grad=True) for j, m in enumerate(enc)]
    distances = [[ops.mask_distance(e, p, GRID) for e, p in zip(enc, pred)]]

    def published():
        target = [normalize_levels(losses.full(h), LEVELS)]
        masks_e, masks_p = [enc], [pred]
        turn = iter(change)

        def head(_):  # the rows that the published code would pass through it: those that start a pair
            c = next(turn)
            j = next(j for j, e in enumerate(change) if e is c)
            Z, V = losses.to_grid(losses.full(c), enc[j], GRID)
            return Z[:, :-1][losses.pair_mask(V)]

        return (
            losses.token_loss([z_pred], target, masks_p)
            + losses.hard_weighted_loss([z_pred], target, masks_p)
            + 0.5 * losses.token_loss([z_context], target, masks_e, weights=distances)
            + 0.05 * losses.fwm_static_loss([z], [GRID], masks_e)
            + losses.ld_loss([z], target, [GRID], masks_e, head, 0, 1.0, grad_under_hard=True)
        )

    plan = build_objectives(
        {
            "pred": {},
            "hw": {},
            "context": {"coeff": 0.5, "warmup": [0, 0], "weight_distance": True},
            "fwm_static": {"coeff": 0.05},
            "ld": {"hidden_dim": 1, "hard_weighting": 1.0},
        },
        levels=LEVELS,
        embed_dim=E,
    )
    plan.heads["ld"] = _Given(change)

    def ours():
        state = LatentState(
            grids=[GRID],
            clips=None,
            h=[h],
            z=[z],
            z_pred=[z_pred],
            z_context=[z_context],
            masks_enc=[enc],
            masks_pred=[pred],
            step=0,
            total_steps=1,
            h_normalized=False,
        )
        return plan(state).total

    def compiled():
        with transparent():
            return ours()

    read = sum(t.numel() for t in (*z_pred, *z_context, *z, *change)) * x.size + h.numel() * x.size
    written = sum(t.numel() for t in (*z_pred, *z_context, *z, *change)) * x.size
    shape = f"B{x.batch} D{d} {'+'.join(str(m.shape[1]) for m in pred)} predicted"
    return Case(
        "latent_loss",
        shape,
        {"reference": published, "eager": forced("eager", ours), "fused": ours},
        leaves=[*z_pred, *z_context, *z, *change],
        compile_=compiled,
        floor_bytes=read,
        floor_full=read + written,
        atol=1e-4 if x.size == 4 else 2e-2,
    )


def rope3d(x: Inputs) -> Case:
    k, d = 576, E // HEADS
    table = rope.rope_table(GRID, d, "v2.1", 16, torch.float32, x.device, False)[:k].contiguous()
    qkv = x.randn(x.batch, k, 3 * E, seed=1, grad=True)
    part = reference.model.Attention(E, HEADS, PATCH, 14, True, "v2.1")
    place = torch.arange(k, device=x.device)
    t, y, w = place // 196, place % 196 // 14, place % 14
    axes = (1.0 * t, y * 15 / 13, w * 15 / 13)

    def published():
        q, key, v = qkv.unflatten(-1, (3, HEADS, d)).permute(2, 0, 3, 1, 4)
        turned = [part._rotate_axes(losses.full(u), axes).to(x.dtype) for u in (q, key)]
        return torch.stack([*turned, v]).permute(1, 3, 0, 2, 4).flatten(2)

    def plain():
        out = torch.empty_like(qkv)
        eager_code("rope3d")(qkv, table, HEADS, False, out)
        return out

    moved = 2 * qkv.numel() * x.size + table.numel() * 4
    return Case(
        "rope3d",
        f"B{x.batch} K{k} E{E}",
        {
            "reference": published,
            "eager": forced("eager", lambda: ops.rope3d(qkv, table, HEADS)),
            "fused": lambda: ops.rope3d(qkv, table, HEADS),
        },
        leaves=[qkv],
        compile_=published,
        floor_bytes=moved,
        floor_full=2 * moved,
        atol=1e-4 if x.size == 4 else 5e-2,
    )


def target_norm(x: Inputs) -> Case:
    h = x.randn(x.batch, N, LEVELS * E, seed=1, grad=True)
    moved = 2 * h.numel() * x.size
    return Case(
        "target_norm",
        f"B{x.batch} D{LEVELS * E}",
        {
            "reference": lambda: normalize_levels(h, LEVELS),
            "eager": forced("eager", lambda: ops.target_norm(h, LEVELS)),
            "fused": lambda: ops.target_norm(h, LEVELS),
        },
        leaves=[h],
        compile_=lambda: normalize_levels(h, LEVELS),
        floor_bytes=moved,
        floor_full=moved + 3 * h.numel() * x.size,
        atol=1e-4 if x.size == 4 else 5e-2,
    )


CASES: dict[str, Callable[[Inputs], Case]] = {
    "patch_embed": patch_embed,
    "tubelet_patchify": tubelet_patchify,
    "patch_mean": patch_mean,
    "motion_saliency": motion_saliency,
    "motion_saliency_area": lambda x: motion_saliency(x, "area"),
    "guided_masks": guided_masks,
    "sample_block_masks": block_masks,
    "mask_distance": mask_distances,
    "latent_loss": latent_loss,
    "rope3d": rope3d,
    "target_norm": target_norm,
}
