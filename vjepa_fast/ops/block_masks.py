"""Multi-block 3-D masks (V-JEPA, arXiv:2404.08471, section 3.2; motion-guided: arXiv:2605.17165), drawn by counter.

A mask is a pure function of its keys (``philox.py`` has the layout), so it does not depend on which batch, process or
machine draws it, and a resumed run draws the same ones. Shapes: S specs, B samples, P blocks, token grid T x H x W,
N = T*H*W, token index n = (t*H + h)*W + w, O origins of a block, enumerated by start, then top, then left.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from vjepa_fast.errors import ConfigError
from vjepa_fast.ops import _backend, _check, _cpp, _triton
from vjepa_fast.ops import _philox as philox

MAX_REDRAWS = 32  # of a mask that leaves no context
TRUNCATE = ("batch", "random", "none")
_SCORE_FLOOR = 1e-6


@dataclass(frozen=True)
class BlockSpec:
    """One mask: the union of ``num_blocks`` blocks is predicted, the rest is context. Fields of config.MaskConfig."""

    num_blocks: int = 8
    spatial_scale: tuple[float, float] = (0.15, 0.15)  # share of the H x W tokens that a block covers
    temporal_scale: tuple[float, float] = (1.0, 1.0)  # share of the T tokens that a block spans
    aspect_ratio: tuple[float, float] = (0.75, 1.5)  # height / width
    max_temporal_keep: float = 1.0  # context lies in the first share of the time steps; later ones are predicted
    max_keep: int | None = None  # context tokens at most
    full_complement: bool = False  # predict everything that is not context after truncation
    pred_full_complement: bool = False  # context is everything that is not predicted after truncation
    inv_block: bool = False  # swap context and prediction
    motion_guided: bool = False  # origins follow the saliency
    motion_guided_strength: float = 2.0  # exponent of a block's mean saliency
    motion_guided_random_rate: float = 0.1  # share of uniform origins


@dataclass(frozen=True)
class BlockMasks:
    """Token indices, ascending; int64. Entries at and past a length are 0, so that a gather stays in range.

    Lengths of 0 say that no context was left after the redraws: a kernel on the GPU cannot raise without being waited
    for, so ``trim`` and ``layers.pack``, which wait anyway, do it. Elsewhere the sampling itself has raised.
    """

    enc: torch.Tensor  # [S,B,N]
    pred: torch.Tensor  # [S,B,N]
    enc_len: torch.Tensor  # [S,B]
    pred_len: torch.Tensor  # [S,B]

    def trim(self, lengths: torch.Tensor | None = None) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Dense masks: (enc list of ``[B,Ke]``, pred list of ``[B,Kp]``), one per spec.

        ``lengths``: ``enc_len`` and ``pred_len`` as one int64 ``[2,S,B]`` on the host, where they are there already;
        else they are copied to it, which waits for the device.

        Raises:
            ValueError: the samples of a spec differ in length (``truncate="none"``).
            ConfigError: no context is left after 32 redraws.
        """
        dense = []
        for indices, length_SB in zip((self.enc, self.pred), self.host_lengths(lengths)):
            if any(len(set(length_B)) > 1 for length_B in length_SB):
                raise ValueError("masks of truncate='none' differ in length within a batch; use pack()")
            dense.append([mask[:, : length_B[0]].contiguous() for mask, length_B in zip(indices, length_SB)])
        return dense[0], dense[1]

    def host_lengths(self, lengths: torch.Tensor | None) -> list[list[list[int]]]:
        """Of context and prediction, [S][B] each, on the host."""
        lengths = (torch.stack([self.enc_len, self.pred_len]) if lengths is None else lengths).tolist()
        for s, length_B in enumerate(lengths[0]):
            if 0 in length_B:
                raise _no_context(s)
        return lengths


def check_spec(spec, name: str = "mask") -> None:
    """Raise a ConfigError that names the field of ``spec`` that makes no sense."""

    def require(ok: bool, field: str, wanted: str) -> None:
        if not ok:
            raise ConfigError(f"{name}.{field}: {wanted}, got {getattr(spec, field)!r}")

    require(1 <= spec.num_blocks < philox.MAX_BLOCKS, "num_blocks", f"must be in 1..{philox.MAX_BLOCKS - 1}")
    for field in ("spatial_scale", "temporal_scale"):
        low, high = getattr(spec, field)
        require(0 < low <= high <= 1, field, "must be [low, high] with 0 < low <= high <= 1")
    low, high = spec.aspect_ratio
    require(0 < low <= high, "aspect_ratio", "must be [low, high] with 0 < low <= high")
    require(0 < spec.max_temporal_keep <= 1, "max_temporal_keep", "must be in (0, 1]")
    require(spec.max_keep is None or spec.max_keep >= 1, "max_keep", "must be null or at least 1")
    require(spec.motion_guided_strength >= 0, "motion_guided_strength", "must not be negative")
    require(0 <= spec.motion_guided_random_rate <= 1, "motion_guided_random_rate", "must be in [0, 1]")


def block_size(grid, spec, u_time: float, u_space: float, u_aspect: float) -> tuple[int, int, int]:
    """(t, h, w) of a block from three uniforms in [0, 1), as published, but at least one token along each axis."""
    duration, height, width = grid

    def between(bounds, u):
        return bounds[0] + u * (bounds[1] - bounds[0])

    t = int(duration * between(spec.temporal_scale, u_time))
    area = int(height * width * between(spec.spatial_scale, u_space))
    aspect = between(spec.aspect_ratio, u_aspect)
    h = min(round(math.sqrt(area * aspect)), height)
    w = min(round(math.sqrt(area / aspect)), width)
    return max(t, 1), max(h, 1), max(w, 1)


def sample_block_sizes(grid, specs, *, seed: int, step: int, first_spec: int = 0) -> list[tuple[int, int, int]]:
    """The (t, h, w) of each spec's blocks at this step, shared by the batch: keyed by (seed, step, spec) alone."""
    words = [philox.words(seed, step, 0, _stream(philox.SIZE, first_spec + s)) for s in range(len(specs))]
    return [block_size(grid, spec, *(word / 2.0**32 for word in four[:3])) for spec, four in zip(specs, words)]


def origin_probabilities(saliency, block, strength: float, random_rate: float) -> torch.Tensor:
    """Probability of each origin of a block under a motion map.

    (1 - random_rate) * score^strength / sum + random_rate / O, where score is the mean of the map inside the block, at
    least 1e-6 (arXiv:2605.17165, motion-guided masking). Box sums come from a summed-area table.

    Args:
        saliency: ``[T,H,W]`` or ``[B,T,H,W]``, not negative.
        block: (t, h, w).

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
    grid,
    specs,
    saliency=None,
    *,
    seed: int,
    step: int,
    first_sample: int = 0,
    truncate: str = "batch",
    first_spec: int = 0,
    device=None,
) -> BlockMasks:
    """Draw one mask per spec and sample. Floor: the map read once, the indices written once.

    A block's size is keyed by (seed, step, spec) and shared by the batch; its origin also by the global sample index
    ``first_sample + b``. A sample whose context comes out empty is drawn again with the attempt in the counter.

    Args:
        B: samples.
        grid: (T, H, W).
        specs: objects with the fields of BlockSpec.
        saliency: ``[B,T,H,W]`` for the specs with ``motion_guided``; None, and for every other spec: uniform origins.
        seed, step: keys; seed is taken modulo 2**64, step must be under 2**32.
        truncate: how the samples of a batch get one length. ``batch``: each keeps its earliest tokens, down to the
            shortest of the batch, as published; ``random``: a random subset of that size; ``none``: everything is kept.
            Context and prediction are cut separately; ``max_keep`` cuts the context further.
        first_spec: key of ``specs[0]``; lets several groups of clips in one step draw independently.
        device: where the masks live; that of ``saliency`` by default, else the CPU.

    Raises:
        ConfigError: a field of a spec is out of range, or no context is left after 32 redraws (with the Triton kernel
            lengths of 0 tell, and ``BlockMasks.trim`` raises).
        ValueError: a shape or device does not fit.
    """
    _check.require(B > 0, "sample_block_masks", "B", "a positive int", B)
    grid = _check.grid("sample_block_masks", grid)
    if truncate not in TRUNCATE:
        raise ConfigError(f"masks.truncate: unknown value {truncate!r}; use 'batch', 'random' or 'none'")
    if not 0 < len(specs) <= philox.MAX_SPECS - first_spec:
        raise ConfigError(f"masks.specs: from 1 to {philox.MAX_SPECS} masks over all groups of clips, got {len(specs)}")
    if saliency is not None and tuple(saliency.shape) != (B, *grid):
        raise ValueError(f"sample_block_masks: saliency: expected [B,T,H,W] = {[B, *grid]}, got {list(saliency.shape)}")
    for s, spec in enumerate(specs):
        check_spec(spec, f"masks.specs[{s}]")
    device = torch.device(device or ("cpu" if saliency is None else saliency.device))
    if saliency is not None:
        same = device.type == saliency.device.type and device.index in (None, saliency.device.index)
        _check.require(same, "sample_block_masks", "saliency", f"device {device}", saliency.device)
        device = saliency.device
    signed_seed = (seed + (1 << 63)) % (1 << 64) - (1 << 63)
    flat = [number for spec in specs for number in _flatten(spec)]
    keys = [signed_seed, step, first_sample, first_spec]
    return BlockMasks(*_block_masks(saliency, B, grid, flat, keys, truncate, device))


_NAMES = tuple(field.name for field in fields(BlockSpec))


def _flatten(spec) -> list[float]:
    """The fields of ``spec`` in order, as numbers (an op's schema has no dataclasses); ``max_keep`` None is 0."""
    values = [getattr(spec, name) or 0 for name in _NAMES]
    return [float(x) for value in values for x in (value if isinstance(value, (tuple, list)) else (value,))]


def _unflatten(numbers: list[float]) -> BlockSpec:
    blocks, s0, s1, t0, t1, a0, a1, keep_time, max_keep, full, pred_full, inverse, guided, strength, rate = numbers
    return BlockSpec(
        int(blocks),
        (s0, s1),
        (t0, t1),
        (a0, a1),
        keep_time,
        int(max_keep) or None,
        bool(full),
        bool(pred_full),
        bool(inverse),
        bool(guided),
        strength,
        rate,
    )


_FIELDS = len(_flatten(BlockSpec()))


@torch.library.custom_op("vjepa_fast::block_masks", mutates_args=())
def _block_masks(
    saliency: torch.Tensor | None,
    batch: int,
    grid: Sequence[int],
    specs: Sequence[float],
    keys: Sequence[int],
    truncate: str,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return _backend.call("block_masks", saliency, batch, grid, specs, keys, truncate, device)


@_block_masks.register_fake
def _(saliency, batch, grid, specs, keys, truncate, device):
    shape = (len(specs) // _FIELDS, batch)
    indices = torch.empty((*shape, math.prod(grid)), dtype=torch.int64, device=device)
    lengths = torch.empty(shape, dtype=torch.int64, device=device)
    return indices, torch.empty_like(indices), lengths, torch.empty_like(lengths)


def _specs_and_sizes(grid, flat, keys) -> tuple[list[BlockSpec], list[tuple[int, int, int]]]:
    seed, step, _, first_spec = keys
    specs = [_unflatten(flat[i : i + _FIELDS]) for i in range(0, len(flat), _FIELDS)]
    return specs, sample_block_sizes(grid, specs, seed=seed, step=step, first_spec=first_spec)


@_backend.register("block_masks", "eager")
def _eager(
    saliency: torch.Tensor | None,
    batch: int,
    grid: list[int],
    flat: list[float],
    keys: list[int],
    truncate: str,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    seed, step, first_sample, first_spec = keys
    specs, sizes = _specs_and_sizes(grid, flat, keys)
    sample_B = torch.arange(first_sample, first_sample + batch, device=device)
    encs, preds = [], []
    for s, (spec, size) in enumerate(zip(specs, sizes)):
        key = first_spec + s
        predicted_BN = _draw_until_context(spec, size, grid, saliency, sample_B, seed, step, key)
        if predicted_BN is None:
            raise _no_context(s, spec, size, grid)
        enc_BN, pred_BN = _truncate(spec, predicted_BN, truncate, sample_B, seed, step, key)
        encs.append(enc_BN)
        preds.append(pred_BN)
    enc, enc_len = _compact(torch.stack(encs))
    pred, pred_len = _compact(torch.stack(preds))
    return enc, pred, enc_len, pred_len


def _stream(kind: int, spec, low=0):
    return (kind << 28) | (spec << 20) | low


def _no_context(s: int, spec=None, size=None, grid=None) -> ConfigError:
    drawn = f" ({spec.num_blocks} blocks of {_by(size)} tokens on a grid of {_by(grid)})" if spec else ""
    return ConfigError(
        f"masks.specs[{s}]: no context is left after {MAX_REDRAWS} redraws{drawn}; "
        "lower spatial_scale or num_blocks, or raise data.crop_size"
    )


def _by(sizes) -> str:
    return "x".join(map(str, sizes))


def _draw_until_context(spec, size, grid, saliency, sample_B, seed, step, key) -> torch.Tensor | None:
    """``[B,N]`` bool, True where predicted; every row has at least one False, or None is returned."""
    cdf_BO = None
    if spec.motion_guided and saliency is not None:
        rate, strength = spec.motion_guided_random_rate, spec.motion_guided_strength
        cdf_BO = origin_probabilities(saliency, size, strength, rate).cumsum(1)
    predicted_BN = _draw(spec, size, grid, cdf_BO, sample_B, seed, step, key, attempt=0)
    for attempt in range(1, MAX_REDRAWS + 1):
        empty = predicted_BN.all(1).nonzero()[:, 0]
        if len(empty) == 0:
            return predicted_BN
        cdf = None if cdf_BO is None else cdf_BO[empty]
        predicted_BN[empty] = _draw(spec, size, grid, cdf, sample_B[empty], seed, step, key, attempt)
    return None if predicted_BN.all(1).any() else predicted_BN


def _draw(spec, size, grid, cdf_BO, sample_B, seed, step, key, attempt) -> torch.Tensor:
    """``[B,N]`` bool, True in the union of the blocks and in the time steps that context may not use."""
    block_P = torch.arange(spec.num_blocks, device=sample_B.device)
    stream_P = _stream(philox.ORIGIN, key, (attempt << 14) | block_P)
    words_BP = philox.words(seed, step, sample_B[:, None], stream_P[None, :])
    counts = [extent - length + 1 for extent, length in zip(grid, size)]
    if cdf_BO is None:
        origins = [(word * count) >> 32 for word, count in zip(words_BP, counts)]
    else:
        u_BP = ((words_BP[3] >> 8).to(torch.float32) / 2.0**24).to(cdf_BO.dtype)  # 24 bits are exact in float32 too
        flat = torch.searchsorted(cdf_BO, u_BP, right=True).clamp_max_(cdf_BO.shape[1] - 1)
        origins = [flat // (counts[1] * counts[2]), flat // counts[2] % counts[1], flat % counts[2]]
    inside_t, inside_h, inside_w = (
        _inside(origin, length, extent) for origin, length, extent in zip(origins, size, grid)
    )
    inside = inside_t[:, :, :, None, None] & inside_h[:, :, None, :, None] & inside_w[:, :, None, None, :]
    predicted = inside.any(1)
    predicted[:, _time_limit(spec, grid) :] = True
    return predicted.flatten(1)


def _time_limit(spec, grid) -> int:
    """Time steps in which context may lie."""
    return max(1, int(grid[0] * spec.max_temporal_keep))


def _inside(origin_BP, length: int, extent: int) -> torch.Tensor:
    offset = torch.arange(extent, device=origin_BP.device) - origin_BP[..., None]
    return (offset >= 0) & (offset < length)


def _truncate(spec, predicted_BN, truncate, sample_B, seed, step, key) -> tuple[torch.Tensor, torch.Tensor]:
    """Context and prediction as bool ``[B,N]`` after truncation, complements and swap, in the published order."""
    pred_BN, enc_BN = predicted_BN, ~predicted_BN
    enc_len, pred_len = enc_BN.sum(1), pred_BN.sum(1)
    if truncate != "none":
        enc_len, pred_len = enc_len.amin().expand_as(enc_len), pred_len.amin().expand_as(pred_len)
    if spec.max_keep is not None:
        enc_len = enc_len.clamp_max(spec.max_keep)
    if truncate == "random":
        word_BN = _token_words(sample_B, enc_BN.shape[1], seed, step, key)
        enc_BN, pred_BN = _keep_lowest(enc_BN, enc_len, word_BN), _keep_lowest(pred_BN, pred_len, word_BN)
    else:
        enc_BN, pred_BN = _keep_first(enc_BN, enc_len), _keep_first(pred_BN, pred_len)
    if spec.full_complement:
        pred_BN = ~enc_BN
    elif spec.pred_full_complement:
        enc_BN = ~pred_BN
    return (pred_BN, enc_BN) if spec.inv_block else (enc_BN, pred_BN)


def _keep_first(mask_BN, length_B) -> torch.Tensor:
    return mask_BN & (mask_BN.cumsum(1) <= length_B[:, None])


def _token_words(sample_B, tokens: int, seed, step, key) -> torch.Tensor:
    """``[B,N]`` a random word per sample and token, made distinct by the token's index in its low bits."""
    token_N = torch.arange(tokens, device=sample_B.device)
    stream = _stream(philox.TRUNCATE, key, token_N[: (tokens + 3) // 4])
    words = philox.words(seed, step, sample_B[:, None], stream[None, :])
    return (torch.stack(words, dim=2).flatten(1)[:, :tokens] << 22) | token_N


def _keep_lowest(mask_BN, length_B, word_BN) -> torch.Tensor:
    """The ``length_B`` True entries of lowest word."""
    word_BN = torch.where(mask_BN, word_BN, torch.iinfo(torch.int64).max)
    last = word_BN.sort(1).values.gather(1, (length_B[:, None] - 1).clamp_min(0))
    return mask_BN & (word_BN <= last) & (length_B[:, None] > 0)


def _compact(mask_SBN) -> tuple[torch.Tensor, torch.Tensor]:
    """Ascending indices of the True entries, followed by zeros, and their number."""
    tokens = mask_SBN.shape[-1]
    token_N = torch.arange(tokens, device=mask_SBN.device).expand(mask_SBN.shape)
    count = mask_SBN.cumsum(-1)
    slot = torch.where(mask_SBN, count - 1, tokens)  # one spare slot takes what is not kept
    packed = token_N.new_zeros((*mask_SBN.shape[:-1], tokens + 1)).scatter_(-1, slot, token_N)
    return packed[..., :tokens].contiguous(), count[..., -1].contiguous()


def _kernel_table(saliency, batch, grid, flat, keys, device):
    """(specs, sizes, int64 ``[S,17]``: what the kernels need of each spec, floats by their bits).

    The columns are those of csrc/block_masks.cpp and kernels/block_masks.py. It travels from pinned memory: nothing waits.
    """
    specs, sizes = _specs_and_sizes(grid, flat, keys)
    seed, step, first_sample, first_spec = keys
    rows = [
        (spec.num_blocks, *size, _time_limit(spec, grid), spec.max_keep or math.prod(grid), spec.full_complement,
         spec.pred_full_complement and not spec.full_complement, spec.inv_block,
         spec.motion_guided and saliency is not None,
         *struct.unpack("qq", struct.pack("dd", spec.motion_guided_strength, spec.motion_guided_random_rate)),
         seed, step, first_sample, first_spec + s, MAX_REDRAWS)
        for s, (spec, size) in enumerate(zip(specs, sizes))
    ]  # fmt: skip
    table = torch.tensor(rows, dtype=torch.int64, pin_memory=device.type == "cuda")
    return specs, sizes, table.to(device, non_blocking=True)


def _new_masks(specs, batch, grid, device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    enc, pred = (torch.empty(len(specs), batch, math.prod(grid), dtype=torch.int64, device=device) for _ in range(2))
    enc_len, pred_len = (torch.empty(len(specs), batch, dtype=torch.int64, device=device) for _ in range(2))
    return enc, pred, enc_len, pred_len


def _tensors(*args) -> list[torch.Tensor]:
    """What a backend must be able to serve: the map, and something where the masks go."""
    return [torch.empty(0, device=args[6]), *args[: 1 if args[0] is not None else 0]] if args else []


def _cpp_objections(*args) -> list[str]:
    reasons = _cpp.objections(*_tensors(*args))
    if args and args[0] is not None and args[0].dtype != torch.float32:
        reasons.append(f"cpp serves a float32 saliency, got {args[0].dtype}")
    return reasons


@_backend.register("block_masks", "cpp", _cpp_objections)
def _cpp_kernel(saliency, batch, grid, flat, keys, truncate, device):
    specs, sizes, table = _kernel_table(saliency, batch, grid, flat, keys, device)
    out = _new_masks(specs, batch, grid, device)
    maps = torch.empty(0) if saliency is None else saliency
    torch.ops.vjepa_fast_cpp.block_masks(maps, table, *grid, TRUNCATE.index(truncate), *out)
    if not out[2].all():
        s = out[2].amin(1).tolist().index(0)
        raise _no_context(s, specs[s], sizes[s], grid)
    return out


def _triton_objections(*args) -> list[str]:
    return _triton.objections(*_tensors(*args))


@_backend.register("block_masks", "triton", _triton_objections)
def _triton_kernel(saliency, batch, grid, flat, keys, truncate, device):
    from vjepa_fast.kernels import masks as kernel

    specs, _, table = _kernel_table(saliency, batch, grid, flat, keys, device)
    out = _new_masks(specs, batch, grid, device)
    if not any(spec.motion_guided for spec in specs):
        saliency = None
    most = max(spec.num_blocks for spec in specs)
    with _triton.device_of(table):
        kernel.sample(saliency, table, grid, most, truncate, *out)
    return out
