"""Multi-block 3-D masks (V-JEPA, arXiv:2404.08471, section 3.2; motion-guided: arXiv:2605.17165), drawn by counter.

A mask is a pure function of its keys (``_philox.py`` has the layout), so it does not depend on which batch, process or
machine draws it, and a resumed run draws the same ones. Shapes: S specs, B samples, P blocks, token grid T x H x W,
N = T*H*W, token index n = (t*H + h)*W + w, O origins of a block, enumerated by start, then top, then left.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from vjepa_fast.config.fields import require
from vjepa_fast.config.schema import TRUNCATE, MaskConfig, MasksConfig
from vjepa_fast.errors import ConfigError
from vjepa_fast.ops import _backend, _check, _cpp, _triton
from vjepa_fast.ops import _philox as philox

MAX_REDRAWS = 32  # of a mask that leaves no context
Size = tuple[int, int, int]
Outputs = tuple[Tensor, Tensor, Tensor, Tensor]  # the fields of BlockMasks
_SCORE_FLOOR = 1e-6
BlockSpec = MaskConfig  # under the name that it has in the API of the ops


@dataclass(frozen=True)
class BlockMasks:
    """Token indices, ascending; int64. Entries at and past a length are 0, so that a gather stays in range.

    Lengths of 0 say that no context was left after the redraws: a kernel on the GPU cannot raise without being waited
    for, so ``trim`` and ``layers.pack``, which wait anyway, do it. Elsewhere the sampling itself has raised.
    """

    enc: Tensor  # [S,B,N]
    pred: Tensor  # [S,B,N]
    enc_len: Tensor  # [S,B]
    pred_len: Tensor  # [S,B]

    def trim(self, lengths: Tensor | None = None) -> tuple[list[Tensor], list[Tensor]]:
        """Dense masks: (enc list of ``[B,Ke]``, pred list of ``[B,Kp]``), one per spec.

        ``lengths``: ``enc_len`` and ``pred_len`` as one int64 ``[2,S,B]`` on the host, where they are there already;
        else they are copied to it, which waits for the device.

        Raises:
            ValueError: the samples of a spec differ in length (``truncate="none"``).
            ConfigError: no context is left after 32 redraws.
        """
        dense: list[list[Tensor]] = []
        for indices, length_SB in zip((self.enc, self.pred), self.host_lengths(lengths)):
            if any(len(set(length_B)) > 1 for length_B in length_SB):
                raise ValueError("masks of truncate='none' differ in length within a batch; use pack()")
            dense.append([mask[:, : length_B[0]].contiguous() for mask, length_B in zip(indices, length_SB)])
        return dense[0], dense[1]

    def host_lengths(self, lengths: Tensor | None) -> list[list[list[int]]]:
        """Of context and prediction, ``[S][B]`` each, on the host."""
        on_host: list[list[list[int]]] = (
            torch.stack([self.enc_len, self.pred_len]) if lengths is None else lengths
        ).tolist()
        for s, length_B in enumerate(on_host[0]):
            if 0 in length_B:
                raise _no_context(s)
        return on_host


def block_size(grid: Sequence[int], spec: BlockSpec, u_time: float, u_space: float, u_aspect: float) -> Size:
    """(t, h, w) of a block from three uniforms in [0, 1), as published, but at least one token along each axis."""
    duration, height, width = grid

    def between(bounds: tuple[float, float], u: float) -> float:
        return bounds[0] + u * (bounds[1] - bounds[0])

    t = int(duration * between(spec.temporal_scale, u_time))
    area = int(height * width * between(spec.spatial_scale, u_space))
    aspect = between(spec.aspect_ratio, u_aspect)
    h = min(round(math.sqrt(area * aspect)), height)
    w = min(round(math.sqrt(area / aspect)), width)
    return max(t, 1), max(h, 1), max(w, 1)


def sample_block_sizes(
    grid: Sequence[int], specs: Sequence[BlockSpec], *, seed: int, step: int, first_spec: int = 0
) -> list[Size]:
    """The (t, h, w) of each spec's blocks at this step, shared by the batch: keyed by (seed, step, spec) alone."""
    words = [philox.words(seed, step, 0, _stream(philox.SIZE, first_spec + s)) for s in range(len(specs))]
    return [block_size(grid, spec, *(word / 2.0**32 for word in four[:3])) for spec, four in zip(specs, words)]


def origin_probabilities(saliency: Tensor, block: Sequence[int], strength: float, random_rate: float) -> Tensor:
    """Probability of each origin of a block under a motion map.

    (1 - random_rate) * score^strength / sum + random_rate / O, where score is the mean of the map inside the block, at
    least 1e-6 (arXiv:2605.17165, motion-guided masking). Box sums come from a summed-area table.

    Args:
        saliency: ``[T,H,W]`` or ``[B,T,H,W]``, not negative.
        block: (t, h, w).
        strength: exponent of a score.
        random_rate: share of uniform origins.

    Returns:
        float64 (float32 on devices without it) ``[O]`` or ``[B,O]``, O = (T-t+1)*(H-h+1)*(W-w+1), row-major.
    """
    if saliency.dim() == 3:
        return origin_probabilities(saliency[None], block, strength, random_rate)[0]
    dtype = torch.float32 if saliency.device.type == "mps" else torch.float64
    table = torch.nn.functional.pad(saliency.to(dtype), (1, 0, 1, 0, 1, 0))
    for dim, size in zip((1, 2, 3), block):
        table = table.cumsum(dim)
        table = table.narrow(dim, size, table.shape[dim] - size) - table.narrow(dim, 0, table.shape[dim] - size)
    score_BO = (table.flatten(1) / math.prod(block)).clamp_min(_SCORE_FLOOR)
    weight_BO = (score_BO / score_BO.amax(1, keepdim=True)) ** strength  # relative to the best: no underflow
    guided_BO = weight_BO / weight_BO.sum(1, keepdim=True)
    return (1.0 - random_rate) * guided_BO + random_rate / score_BO.shape[1]


def sample_block_masks(
    B: int,
    grid: Sequence[int],
    specs: Sequence[BlockSpec],
    saliency: Tensor | None = None,
    *,
    seed: int,
    step: int,
    first_sample: int = 0,
    truncate: str = "batch",
    first_spec: int = 0,
    device: torch.device | str | None = None,
) -> BlockMasks:
    """Draw one mask per spec and sample.

    A block's size is keyed by (seed, step, spec) and shared by the batch; its origin also by the global sample index
    ``first_sample + b``. A sample whose context comes out empty is drawn again with the attempt in the counter.

    Args:
        B: samples.
        grid: (T, H, W).
        specs: BlockSpec of each.
        saliency: ``[B,T,H,W]`` for the specs with ``motion_guided``; None, and for every other spec: uniform origins.
        seed: a key, taken modulo 2**64.
        step: a key, under 2**32.
        first_sample: global index of the first sample.
        truncate: how the samples of a batch get one length. ``batch``: each keeps its earliest tokens, down to the
            shortest of the batch, as published; ``random``: a random subset of that size; ``none``: everything is kept.
            Context and prediction are cut separately; ``max_keep`` cuts the context further.
        first_spec: key of ``specs[0]``; lets several groups of clips in one step draw independently.
        device: where the masks live; that of ``saliency`` by default, else the CPU.

    Raises:
        ConfigError: a field of a spec is out of range, or no context is left after 32 redraws (the Triton kernel leaves
            lengths of 0 instead, and ``BlockMasks.trim`` raises).
        ValueError: a shape or device does not fit.

    Floor: the map read once, the indices written once.
    """
    _check.require(B > 0, "sample_block_masks", "B", "a positive int", B)
    grid = _check.grid("sample_block_masks", grid)
    require(MasksConfig, "masks", truncate=truncate)
    check_number(len(specs), first_spec)
    if saliency is not None and tuple(saliency.shape) != (B, *grid):
        raise ValueError(f"sample_block_masks: saliency: expected [B,T,H,W] = {[B, *grid]}, got {list(saliency.shape)}")
    for s, spec in enumerate(specs):
        require(spec, f"masks.specs.{s}")
    device = torch.device(device or ("cpu" if saliency is None else saliency.device))
    if saliency is not None:
        same = device.type == saliency.device.type and device.index in (None, saliency.device.index)
        _check.require(same, "sample_block_masks", "saliency", f"device {device}", saliency.device)
        device = saliency.device
    signed_seed = (seed + (1 << 63)) % (1 << 64) - (1 << 63)
    flat = [number for spec in specs for number in _flatten(spec)]
    keys = [signed_seed, step, first_sample, first_spec]
    return BlockMasks(*_block_masks(saliency, B, grid, flat, keys, truncate, device))


def check_number(specs: int, first_spec: int) -> None:
    """Raise ConfigError unless each of so many specs, numbered from ``first_spec`` on, has a key of its own."""
    if not 0 < specs <= philox.MAX_SPECS - first_spec:
        raise ConfigError(f"masks.specs: from 1 to {philox.MAX_SPECS} masks over all groups of clips, got {specs}")


_NAMES = tuple(field.name for field in fields(BlockSpec))


def _flatten(spec: BlockSpec) -> list[float]:
    """The fields of ``spec`` in order, as numbers (an op's schema has no dataclasses); ``max_keep`` None is 0."""
    values: list[Any] = [getattr(spec, name) or 0 for name in _NAMES]
    return [float(x) for value in values for x in (value if isinstance(value, (tuple, list)) else (value,))]


def _unflatten(numbers: Sequence[float]) -> BlockSpec:
    blocks, s0, s1, t0, t1, a0, a1, keep_time, max_keep, full, pred_full, inverse, guided, strength, rate = numbers
    flags = bool(full), bool(pred_full), bool(inverse), bool(guided)
    sizes = (s0, s1), (t0, t1), (a0, a1)
    return BlockSpec(int(blocks), *sizes, keep_time, int(max_keep) or None, *flags, strength, rate)


_FIELDS = len(_flatten(BlockSpec()))


@_backend.define(
    "block_masks",
    "Tensor? saliency, SymInt batch, SymInt[] grid, float[] specs, SymInt[] keys, str truncate, Device device",
    "(Tensor, Tensor, Tensor, Tensor)",
)
def _block_masks(*args: Any) -> Outputs:
    return _backend.call("block_masks", _Call(*args))


@_block_masks.register_fake
def _(*args: Any) -> Outputs:
    return _new_masks(_Call(*args))


class _Call(NamedTuple):
    """The arguments of the op."""

    saliency: Tensor | None
    batch: int
    grid: Sequence[int]
    specs: Sequence[float]  # flattened, one after another
    keys: Sequence[int]  # seed, step, first_sample, first_spec
    truncate: str
    device: torch.device


class _Draw(NamedTuple):
    """By what one mask of the batch is drawn, and the grid that it is drawn on."""

    spec: BlockSpec
    size: Size  # of its blocks
    grid: Sequence[int]
    seed: int
    step: int
    key: int  # of the spec


def _draws(call: _Call) -> list[_Draw]:
    seed, step, _, first_spec = call.keys
    specs = [_unflatten(call.specs[i : i + _FIELDS]) for i in range(0, len(call.specs), _FIELDS)]
    sizes = sample_block_sizes(call.grid, specs, seed=seed, step=step, first_spec=first_spec)
    return [
        _Draw(spec, size, call.grid, seed, step, first_spec + s) for s, (spec, size) in enumerate(zip(specs, sizes))
    ]


@_backend.register("block_masks", "eager")
def _eager(call: _Call) -> Outputs:
    sample_B = torch.arange(call.keys[2], call.keys[2] + call.batch, device=call.device)
    kept: list[tuple[Tensor, Tensor]] = []
    for s, draw in enumerate(_draws(call)):
        predicted_BN = _draw_until_context(draw, call.saliency, sample_B)
        if predicted_BN is None:
            raise _no_context(s, draw)
        kept.append(_truncate(draw, predicted_BN, call.truncate, sample_B))
    (enc, enc_len), (pred, pred_len) = (_compact(torch.stack(masks)) for masks in zip(*kept))
    return enc, pred, enc_len, pred_len


_Low = TypeVar("_Low", int, Tensor)


def _stream(kind: int, spec: int, low: _Low = 0) -> _Low:
    return (kind << 28) | (spec << 20) | low


def _no_context(s: int, draw: _Draw | None = None) -> ConfigError:
    drawn = f" ({draw.spec.num_blocks} blocks of {_by(draw.size)} tokens on a grid of {_by(draw.grid)})" if draw else ""
    return ConfigError(
        f"masks.specs[{s}]: no context is left after {MAX_REDRAWS} redraws{drawn}; "
        "lower spatial_scale or num_blocks, or raise data.crop_size"
    )


def _by(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))


def masks_of_origins(
    grid: Sequence[int], spec: BlockSpec, size: Size, origins_BP3: Tensor
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Masks whose blocks somebody else has drawn, cut to one length as published.

    Args:
        grid: (T, H, W).
        spec: what happens to the blocks.
        size: (t, h, w) of a block.
        origins_BP3: int64, the first (t, h, w) of each block of each sample.

    Returns:
        (context int64 [B,Ke] or nothing, prediction int64 [B,Kp] or nothing, bool [B]): lists of one, and empty where
        some sample has no context, which the last says.
    """
    draw = _Draw(spec, size, grid, 0, 0, 0)
    predicted_BN = _blocks(draw, list(origins_BP3.unbind(2)))
    empty_B = predicted_BN.all(1)
    if empty_B.any():
        return [], [], empty_B
    kept = _truncate(draw, predicted_BN, "batch", torch.arange(len(predicted_BN)))
    (enc, enc_len), (pred, pred_len) = (_compact(mask) for mask in kept)
    return [enc[:, : int(enc_len[0])]], [pred[:, : int(pred_len[0])]], empty_B


def _draw_until_context(draw: _Draw, saliency: Tensor | None, sample_B: Tensor) -> Tensor | None:
    """``[B,N]`` bool, True where predicted; every row has at least one False, or None is returned."""
    cdf_BO, spec = None, draw.spec
    if spec.motion_guided and saliency is not None:
        rate, strength = spec.motion_guided_random_rate, spec.motion_guided_strength
        cdf_BO = origin_probabilities(saliency, draw.size, strength, rate).cumsum(1)
    predicted_BN = _draw_once(draw, cdf_BO, sample_B, attempt=0)
    for attempt in range(1, MAX_REDRAWS + 1):
        empty = predicted_BN.all(1).nonzero()[:, 0]
        if len(empty) == 0:
            return predicted_BN
        cdf = None if cdf_BO is None else cdf_BO[empty]
        predicted_BN[empty] = _draw_once(draw, cdf, sample_B[empty], attempt)
    return None if predicted_BN.all(1).any() else predicted_BN


def _draw_once(draw: _Draw, cdf_BO: Tensor | None, sample_B: Tensor, attempt: int) -> Tensor:
    """``[B,N]`` bool, True in the union of the blocks and in the time steps that context may not use."""
    block_P = torch.arange(draw.spec.num_blocks, device=sample_B.device)
    stream_P = _stream(philox.ORIGIN, draw.key, (attempt << 14) | block_P)
    words_BP = philox.words(draw.seed, draw.step, sample_B[:, None], stream_P[None, :])
    counts = [extent - length + 1 for extent, length in zip(draw.grid, draw.size)]
    if cdf_BO is None:
        origins = [(word * count) >> 32 for word, count in zip(words_BP, counts)]
    else:
        u_BP = ((words_BP[3] >> 8).to(torch.float32) / 2.0**24).to(cdf_BO.dtype)  # 24 bits are exact in float32 too
        flat = torch.searchsorted(cdf_BO, u_BP, right=True).clamp_max_(cdf_BO.shape[1] - 1)
        origins = [flat // (counts[1] * counts[2]), flat // counts[2] % counts[1], flat % counts[2]]
    return _blocks(draw, origins)


def _blocks(draw: _Draw, origins: Sequence[Tensor]) -> Tensor:
    """``[B,N]`` bool, as `_draw_once`; ``origins``: int64 ``[B,P]`` for each axis."""
    inside_t, inside_h, inside_w = (
        _inside(origin, length, extent) for origin, length, extent in zip(origins, draw.size, draw.grid)
    )
    inside = inside_t[:, :, :, None, None] & inside_h[:, :, None, :, None] & inside_w[:, :, None, None, :]
    predicted = inside.any(1)
    predicted[:, _time_limit(draw) :] = True
    return predicted.flatten(1)


def _time_limit(draw: _Draw) -> int:
    """Time steps in which context may lie."""
    return max(1, int(draw.grid[0] * draw.spec.max_temporal_keep))


def _inside(origin_BP: Tensor, length: int, extent: int) -> Tensor:
    offset = torch.arange(extent, device=origin_BP.device) - origin_BP[..., None]
    return (offset >= 0) & (offset < length)


def _truncate(draw: _Draw, predicted_BN: Tensor, truncate: str, sample_B: Tensor) -> tuple[Tensor, Tensor]:
    """Context and prediction as bool ``[B,N]`` after truncation, complements and swap, in the published order."""
    spec, pred_BN, enc_BN = draw.spec, predicted_BN, ~predicted_BN
    enc_len, pred_len = enc_BN.sum(1), pred_BN.sum(1)
    if truncate != "none":
        enc_len, pred_len = enc_len.amin().expand_as(enc_len), pred_len.amin().expand_as(pred_len)
    if spec.max_keep is not None:
        enc_len = enc_len.clamp_max(spec.max_keep)
    if truncate == "random":
        word_BN = _token_words(draw, sample_B, enc_BN.shape[1])
        enc_BN, pred_BN = _keep_lowest(enc_BN, enc_len, word_BN), _keep_lowest(pred_BN, pred_len, word_BN)
    else:
        enc_BN, pred_BN = _keep_first(enc_BN, enc_len), _keep_first(pred_BN, pred_len)
    if spec.full_complement:
        pred_BN = ~enc_BN
    elif spec.pred_full_complement:
        enc_BN = ~pred_BN
    return (pred_BN, enc_BN) if spec.inv_block else (enc_BN, pred_BN)


def _keep_first(mask_BN: Tensor, length_B: Tensor) -> Tensor:
    return mask_BN & (mask_BN.cumsum(1) <= length_B[:, None])


def _token_words(draw: _Draw, sample_B: Tensor, tokens: int) -> Tensor:
    """``[B,N]`` a random word per sample and token, made distinct by the token's index in its low bits."""
    token_N = torch.arange(tokens, device=sample_B.device)
    stream = _stream(philox.TRUNCATE, draw.key, token_N[: (tokens + 3) // 4])
    words = philox.words(draw.seed, draw.step, sample_B[:, None], stream[None, :])
    return (torch.stack(words, dim=2).flatten(1)[:, :tokens] << 22) | token_N


def _keep_lowest(mask_BN: Tensor, length_B: Tensor, word_BN: Tensor) -> Tensor:
    """The ``length_B`` True entries of lowest word."""
    word_BN = torch.where(mask_BN, word_BN, torch.iinfo(torch.int64).max)
    last = word_BN.sort(1).values.gather(1, (length_B[:, None] - 1).clamp_min(0))
    return mask_BN & (word_BN <= last) & (length_B[:, None] > 0)


def _compact(mask_SBN: Tensor) -> tuple[Tensor, Tensor]:
    """Ascending indices of the True entries, followed by zeros, and their number."""
    tokens = mask_SBN.shape[-1]
    token_N = torch.arange(tokens, device=mask_SBN.device).expand(mask_SBN.shape)
    count = mask_SBN.cumsum(-1)
    slot = torch.where(mask_SBN, count - 1, tokens)  # one spare slot takes what is not kept
    packed = token_N.new_zeros((*mask_SBN.shape[:-1], tokens + 1)).scatter_(-1, slot, token_N)
    return packed[..., :tokens].contiguous(), count[..., -1].contiguous()


def _kernel_table(call: _Call, draws: list[_Draw]) -> Tensor:
    """int64 ``[S,17]``: what the kernels need of each spec, floats by their bits.

    The columns are those of csrc/block_masks.cpp and kernels/block_masks.py. It travels from pinned memory, so that
    nothing waits.
    """
    rows: list[tuple[int, ...]] = []
    for draw in draws:
        spec = draw.spec
        complements = spec.full_complement, spec.pred_full_complement and not spec.full_complement
        flags = *complements, spec.inv_block, spec.motion_guided and call.saliency is not None
        bits = struct.unpack("qq", struct.pack("dd", spec.motion_guided_strength, spec.motion_guided_random_rate))
        limits = _time_limit(draw), spec.max_keep or math.prod(draw.grid)
        keys = draw.seed, draw.step, call.keys[2], draw.key, MAX_REDRAWS
        rows.append((spec.num_blocks, *draw.size, *limits, *flags, *bits, *keys))
    table = torch.tensor(rows, dtype=torch.int64, device="cpu", pin_memory=call.device.type == "cuda")
    return table.to(call.device, non_blocking=True)


def _new_masks(call: _Call) -> Outputs:
    shape = len(call.specs) // _FIELDS, call.batch
    indices = torch.empty((*shape, math.prod(call.grid)), dtype=torch.int64, device=call.device)
    lengths = torch.empty(shape, dtype=torch.int64, device=call.device)
    return indices, torch.empty_like(indices), lengths, torch.empty_like(lengths)


def _tensors(*args: _Call) -> list[Tensor]:
    """What a backend must support: the map, and something where the masks go."""
    return [x for call in args for x in (torch.empty(0, device=call.device), call.saliency) if x is not None]


def _cpp_objections(*args: _Call) -> list[str]:
    wrong = [c.saliency.dtype for c in args if c.saliency is not None and c.saliency.dtype != torch.float32]
    return _cpp.objections(*_tensors(*args)) + [f"cpp supports a float32 saliency, got {dtype}" for dtype in wrong]


@_backend.register("block_masks", "cpp", _cpp_objections)
def _cpp_kernel(call: _Call) -> Outputs:
    draws, out = _draws(call), _new_masks(call)
    maps = torch.empty(0, device="cpu") if call.saliency is None else call.saliency
    truncate = TRUNCATE.index(call.truncate)
    torch.ops.vjepa_fast_cpp.block_masks(maps, _kernel_table(call, draws), *call.grid, truncate, *out)
    if not out[2].all():
        s = out[2].amin(1).tolist().index(0)
        raise _no_context(s, draws[s])
    return out


@_backend.register("block_masks", "triton", lambda *args: _triton.objections(*_tensors(*args)))
def _triton_kernel(call: _Call) -> Outputs:
    draws = _draws(call)
    table, out = _kernel_table(call, draws), _new_masks(call)
    saliency = call.saliency if any(draw.spec.motion_guided for draw in draws) else None
    most = max(draw.spec.num_blocks for draw in draws)
    _triton.launch("block_masks", "sample", table, saliency, table, call.grid, most, call.truncate, *out)
    return out
