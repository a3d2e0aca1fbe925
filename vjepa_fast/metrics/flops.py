"""What a training step has to compute and to move, counted from the shapes of the models and the lengths of the masks.

FLOP count matrix products and attention of encoder, predictor and target, 2 per multiply-add; a backward pass
has twice those of its forward pass, but for the patch embedding, whose pixels need no gradient. What is computed again
(activation checkpointing, attention's backward pass) counts once, as is usual for MFU (PaLM, arXiv:2204.02311, appendix
B); the terms' own heads, normalisation and the like do not count.

Bytes are a floor: every product and every attention reads its inputs and writes its result once, weights are read once
per pass, and all that works on single values (LayerNorm, GELU, residuals, casts) rides along without a pass of its own.

`torch.utils.flop_counter` counts the FLOP of what runs, and tests hold this count to it; this one also gives bytes, and
both before anything runs, from lengths alone.

Legend: n tokens, E width of a block, M outputs of its first feed-forward layers (both of a gated one), D = levels * E.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    from torch import nn

    from vjepa_fast.layers.block import Block


@dataclass(frozen=True)
class Stack:
    """A stack of equal transformer blocks: ``matrices`` are the weight elements of one block."""

    width: int
    hidden: int
    depth: int
    matrices: int

    @classmethod
    def of(cls, blocks: nn.Module) -> Stack:
        """From a ModuleList of `layers.block.Block`s."""
        blocks = cast("nn.ModuleList", blocks)
        first = cast("Block", blocks[0])
        width = first.attn.proj.weight.shape[0]
        matrices = sum(p.numel() for p in first.parameters() if p.ndim == 2)
        hidden = (matrices - 4 * width**2) // width - first.mlp.last.weight.shape[1]
        return cls(width, hidden, len(blocks), matrices)

    def flops(self, tokens: float, squares: float) -> float:
        """Forward, of ``tokens`` in segments whose squared lengths add up to ``squares``."""
        return self.depth * (2 * self.matrices * tokens + 4 * self.width * squares)

    def elements(self, tokens: float) -> tuple[float, float]:
        """Moved forward and backward, without weights."""
        e, m = self.width, self.hidden
        # qkv 1 + 3, attention 3 + 1, proj with residual 2 + 1, fc1 1 + M, fc2 with residual M + 1 + 1
        forward = 14 * e + 2 * m
        # a product reads the gradient of its result twice and its input once, and writes the gradient of the input:
        # fc2 2E + 2M, fc1 2M + 2E, proj 4E, attention 8E, qkv 8E; and the residuals 2E
        backward = 26 * e + 4 * m
        return self.depth * tokens * forward, self.depth * tokens * backward


@dataclass(frozen=True)
class Dims:
    """Shapes of the models; ``patch``, ``patch_image``, ``embed``, ``proj`` are elements of single matrices."""

    encoder: Stack
    predictor: Stack
    levels: int
    patch: int
    patch_image: int
    embed: int
    proj: int
    trained: int  # parameters of encoder and predictor
    averaged: int  # parameters of the EMA target

    @classmethod
    def of(cls, encoder: nn.Module, predictor: nn.Module) -> Dims:
        """From the modules, which may be on the meta device."""

        def trained(module: nn.Module) -> int:
            return sum(p.numel() for p in module.parameters() if p.requires_grad)

        names = dict(encoder.named_children())
        image = "patch_embed_img" if "patch_embed_img" in names else "patch_embed"
        return cls(
            encoder=Stack.of(names["blocks"]),
            predictor=Stack.of(predictor.get_submodule("predictor_blocks")),
            levels=len(cast("nn.ModuleList", names["norms_block"])),
            patch=encoder.get_parameter("patch_embed.proj.weight").numel(),
            patch_image=encoder.get_parameter(f"{image}.proj.weight").numel(),
            embed=sum(p.numel() for p in predictor.get_submodule("predictor_embed").parameters() if p.ndim == 2),
            proj=predictor.get_parameter("predictor_proj.weight").numel(),
            trained=trained(encoder) + trained(predictor),
            averaged=trained(encoder),
        )


@dataclass(frozen=True)
class Clips:
    """``count`` clips of ``tokens`` tokens each; ``masks`` has (context, predicted) tokens of each mask.

    Where the lengths of the samples of a batch differ there is one of these per sample.
    """

    count: int
    tokens: int
    masks: Sequence[tuple[float, float]]
    image: bool = False


@dataclass(frozen=True)
class Lengths:
    """Of the samples of ``masks`` masks, one mask after another: what `clips_of` reads of a `layers.packed.Stream`."""

    lengths: tuple[int, ...]
    masks: int

    @classmethod
    def of(cls, lengths_SB: Sequence[Sequence[int]]) -> Lengths:
        """From lists by mask."""
        return cls(tuple(n for of_mask in lengths_SB for n in of_mask), len(lengths_SB))


def clips_of(grid: tuple[int, int, int], enc: Sequence[Any], pred: Sequence[Any], image: bool = False) -> list[Clips]:
    """The clips of a group: grid (T,H,W), and per mask ids [B,K], or anything with ``lengths``, one per sample."""
    tokens = grid[0] * grid[1] * grid[2]
    if not hasattr(enc[0], "lengths"):
        return [Clips(enc[0].shape[0], tokens, [(e.shape[1], p.shape[1]) for e, p in zip(enc, pred)], image)]
    enc, pred = ([n for m in side for n in _by_mask(m)] for side in (enc, pred))
    lengths = zip(zip(*enc), zip(*pred))
    return [Clips(1, tokens, list(zip(*of_sample)), image) for of_sample in lengths]


def _by_mask(mask: Any) -> Iterable[Sequence[int]]:
    """Lengths of the samples of each mask in ``mask``: one, or all of a `layers.packed.Stream`."""
    count = len(mask.lengths) // getattr(mask, "masks", 1)
    return (mask.lengths[n : n + count] for n in range(0, len(mask.lengths), count))


@dataclass
class Cost:
    """FLOP and bytes of a part of a step."""

    flops: float = 0
    bytes: float = 0

    def add(self, flops: float, bytes_: float) -> None:
        """Add to both."""
        self.flops += flops
        self.bytes += bytes_


def step_cost(
    dims: Dims,
    clips: Iterable[Clips],
    *,
    itemsize: int = 2,
    predict_context: bool = True,
    target_grad: bool = False,
    target: bool = True,
    embed_all: bool = False,
) -> dict[str, Cost]:
    """FLOP and bytes of one step by part: target, context, predictor, losses, backward, optimiser, ema.

    Args:
        dims: shapes of the models.
        clips: of the step.
        itemsize: bytes of an activation (2: bfloat16, 4: float32).
        predict_context: the predictor also gives the context tokens.
        target_grad: the target is the encoder itself and takes part in the backward pass (no EMA).
        target: the target encodes the clips; False where no term reads it.
        embed_all: every mask embeds all tokens of the clip, as the published Conv3d does; ours embeds kept ones.

    Returns:
        Cost by name. ``losses`` are the rows of the prediction and context terms; other terms add theirs.
    """
    cost = {name: Cost() for name in ("target", "context", "predictor", "losses", "backward", "optimiser", "ema")}
    enc, pred, back = dims.encoder, dims.predictor, cost["backward"]
    d = dims.levels * enc.width
    for c in clips:
        n = c.count
        kept = sum(e for e, _ in c.masks)
        embedded = len(c.masks) * c.tokens if embed_all else kept
        context = sum(e**2 for e, _ in c.masks)
        passes = [("target", (c.tokens, c.tokens**2, c.tokens))] * target + [("context", (kept, context, embedded))]
        for part, passed in passes:
            flops, first, forward, backward = _encoded(dims, c.image, *passed)
            cost[part].add(n * flops, n * itemsize * forward)
            if part == "context" or target_grad:
                back.add(n * (2 * flops - first), n * itemsize * backward)

        seen, squares = sum(e + p for e, p in c.masks), sum((e + p) ** 2 for e, p in c.masks)
        out = sum(p for _, p in c.masks) + (kept if predict_context else 0)
        flops = pred.flops(seen, squares) + 2 * dims.embed * kept + 2 * dims.proj * out
        forward, backward = pred.elements(seen)
        ends = (d + 2 * enc.width * (dims.levels > 1) + pred.width) * kept + (pred.width + d) * out
        cost["predictor"].add(n * flops, n * itemsize * (forward + ends))
        back.add(2 * n * flops, n * itemsize * (backward + 2 * ends))

        # prediction and target read, slopes of one byte written; then slopes read and gradients written
        cost["losses"].add(0, n * out * d * (2 * itemsize + 1))
        back.add(0, n * out * d * (1 + itemsize))

    encoder = enc.depth * enc.matrices + dims.patch
    predictor = pred.depth * pred.matrices + dims.embed + (1 + predict_context) * dims.proj
    for part, weights in (("target", encoder * target), ("context", encoder), ("predictor", predictor)):
        cost[part].add(0, itemsize * weights)
    back.add(0, (itemsize + 4) * (encoder + predictor))  # weights read, float32 gradients written
    cost["optimiser"].add(0, 28 * dims.trained)  # parameter, gradient, two moments read; all but the gradient written
    if not target_grad:
        cost["ema"].add(0, 8 * dims.averaged)  # the target read and written, while the parameter is at hand
    return cost


def _encoded(dims: Dims, image: bool, tokens: float, squares: float, embedded: float) -> tuple[float, ...]:
    """Of one pass of the encoder: forward FLOP, those of the patch embedding; elements moved forward and backward."""
    patch, width = dims.patch_image if image else dims.patch, dims.encoder.width
    first, d = 2 * patch * embedded, dims.levels * width
    forward, backward = dims.encoder.elements(tokens)
    ends = embedded * (patch // width + width)  # pixels in, a token out
    # levels: d in and d out; backward also their gradient in
    return (
        dims.encoder.flops(tokens, squares) + first,
        first,
        forward + ends + 2 * d * tokens,
        backward + ends + 3 * d * tokens,
    )


@dataclass(frozen=True)
class Work:
    """What one step did: ``tokens`` through target, encoder and predictor, and the FLOP that they cost."""

    tokens: int = 0
    flops: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.tokens + other.tokens, self.flops + other.flops)


class Masked(Protocol):
    """What `of_state` reads of a step, as `objectives.LatentState` has it; lists are of its groups of clips."""

    grids: list[tuple[int, int, int]]  # (T,H,W)
    masks_enc: Any  # context ids [B,K] (or what has ``lengths``) of each mask
    masks_pred: Any
    modality: str  # image or video


@dataclass
class Counted:
    """A `Masked` of its own, for work whose state is not at hand."""

    grids: list[tuple[int, int, int]]
    masks_enc: list[list[Lengths]]
    masks_pred: list[list[Lengths]]
    modality: str


def of_state(dims: Dims, state: Masked, *, predict_context: bool, target_grad: bool, target: bool = True) -> Work:
    """The work behind a state. Reads shapes only, so nothing is waited for."""
    groups = zip(state.grids, state.masks_enc, state.masks_pred)
    clips = [c for group in groups for c in clips_of(*group, image=state.modality == "image")]
    cost = step_cost(dims, clips, predict_context=predict_context, target_grad=target_grad, target=target)
    tokens = sum(c.count * (c.tokens * target + sum(2 * e + p for e, p in c.masks)) for c in clips)
    return Work(int(tokens), int(sum(c.flops for c in cost.values())))
