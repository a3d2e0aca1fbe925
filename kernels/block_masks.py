"""Block masks on the GPU: ``ops.sample_block_masks`` in two launches of S x B programs, whatever the redraws.

Legend: S specs, B samples, grid (T,H,W), N = T*H*W tokens n = (t*H+h)*W+w, P blocks at most, O origins of a block.

``_draw`` decides which tokens are context; ``_write`` needs the shortest context of the batch, thus a second launch:
each of its programs takes the minimum over the B counts of its spec itself, so there is nothing to initialise, no
atomic and no grid-wide barrier. Between the passes over a row values go through global memory (it stays in the caches;
``tl.debug_barrier`` orders it within a program), so no shape is bound by registers. Draw and mask are integers, and
bit-equal to the eager code; sums, power and cumulative probability of guided origins are float64 as there.

Bytes: the floor is the maps once (4 B N) and the indices once (16 S B N). Moved beyond that: S B N of flags written
and read, the map once per spec, and for guided specs 16 S B N of sums and cumulative weights, which use the index
buffers as scratch. A batch of 64 with two specs on 8x14x14: 3.6 MB at least, under 10 MB in all, most of it in L2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_LANES = 256  # origins or blocks at a time
_COLUMNS = 17  # of the table of specs, see ops/block_masks.py


@triton.jit
def _corner(table, t, h, w, H, W, valid):
    """Sum of the map over [0..t, 0..h, 0..w], 0 where an index is -1."""
    return tl.load(table + (t * H + h) * W + w, valid & (t >= 0) & (h >= 0) & (w >= 0), other=0.0)


@triton.jit
def _summed_area(saliency, table, T, H, W, TC: tl.constexpr, HP: tl.constexpr, WP: tl.constexpr):
    """Map [T,H,W] -> its sums over all tokens before and at each, TC time steps at once."""
    h = tl.arange(0, HP)[None, :, None]
    w = tl.arange(0, WP)[None, None, :]
    before = tl.zeros([HP, WP], tl.float64)
    for start in range(0, T, TC):
        t = start + tl.arange(0, TC)[:, None, None]
        n = (t * H + h) * W + w
        inside = (t < T) & (h < H) & (w < W)
        x = tl.load(saliency + n, inside, other=0.0).to(tl.float32).to(tl.float64)
        x = tl.cumsum(tl.cumsum(tl.cumsum(x, 2), 1), 0) + before[None, :, :]
        tl.store(table + n, x, inside)
        before = tl.sum(tl.where(t == start + TC - 1, x, 0.0), 0)


@triton.jit
def _weigh_origins(table, prefix, H, W, bt, bh, bw, tops, lefts, origins, strength, LANES: tl.constexpr):
    """prefix[o] = sum up to o of (score / best score)^strength. Returns the whole sum."""
    best = tl.zeros([LANES], tl.float64)
    volume = (bt * bh * bw).to(tl.float64)
    total = volume * 0.0
    floor = total + 1e-6
    for start in range(0, origins, LANES):
        o = start + tl.arange(0, LANES)
        valid = o < origins
        t = o // (tops * lefts) - 1
        h = o // lefts % tops - 1
        w = o % lefts - 1
        far = _corner(table, t + bt, h + bh, w + bw, H, W, valid) - _corner(table, t, h + bh, w + bw, H, W, valid)
        far -= _corner(table, t + bt, h, w + bw, H, W, valid) - _corner(table, t, h, w + bw, H, W, valid)
        near = _corner(table, t + bt, h + bh, w, H, W, valid) - _corner(table, t, h + bh, w, H, W, valid)
        near -= _corner(table, t + bt, h, w, H, W, valid) - _corner(table, t, h, w, H, W, valid)
        score = tl.maximum((far - near) / volume, floor)
        tl.store(prefix + o, score, valid)
        best = tl.maximum(best, tl.where(valid, score, 0.0))
    highest = tl.max(best)
    tl.debug_barrier()
    for start in range(0, origins, LANES):
        o = start + tl.arange(0, LANES)
        valid = o < origins
        score = tl.load(prefix + o, valid, other=0.0) / highest
        weight = tl.where(valid, tl.exp2(strength * tl.log2(tl.where(valid, score, 1.0))), 0.0)
        tl.debug_barrier()
        tl.store(prefix + o, tl.cumsum(weight) + total, valid)
        total += tl.sum(weight)
    tl.debug_barrier()
    return total


@triton.jit
def _search(prefix, u, origins, scale, step):
    """Number of origins whose cumulative probability, prefix * scale + (o + 1) * step, is at most u."""
    low = (u * 0.0).to(tl.int32)
    high = low + origins
    span = origins
    while span > 0:
        middle = (low + high) // 2
        active = low < high
        mass = tl.load(prefix + middle, active, other=0.0) * scale + (middle + 1).to(tl.float64) * step
        low = tl.where(active & (mass <= u), middle + 1, low)
        high = tl.where(active & (mass > u), middle, high)
        span = span // 2
    return low


@triton.jit(do_not_specialize=["B", "T", "H", "W", "P"])
def _draw(
    saliency,
    specs,
    table,
    prefix,
    corners,
    context,
    counts,
    B,
    T,
    H,
    W,
    P,
    COLUMNS: tl.constexpr,
    GUIDED: tl.constexpr,
    TC: tl.constexpr,
    HP: tl.constexpr,
    WP: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    """Saliency [B,N], specs int64 [S,COLUMNS] -> context int8 [S,B,N], counts int32 [S,B] of its ones (0: no context is
    left after all redraws), corners int64 [S,B,P]: t << 40 | h << 20 | w at which each block begins, as last drawn.

    Scratch: table, prefix float64 [S,B,N].
    """
    row = tl.program_id(0).to(tl.int64)
    spec = specs + row // B * COLUMNS
    N = T * H * W
    blocks = tl.load(spec).to(tl.int32)
    bt, bh, bw = tl.load(spec + 1).to(tl.int32), tl.load(spec + 2).to(tl.int32), tl.load(spec + 3).to(tl.int32)
    time_limit = tl.load(spec + 4).to(tl.int32)
    guided = tl.load(spec + 9)
    seed, step = tl.load(spec + 12), tl.load(spec + 13)
    sample = tl.load(spec + 14) + row % B
    key = tl.load(spec + 15).to(tl.int32)
    redraws = tl.load(spec + 16).to(tl.int32)
    starts, tops, lefts = T - bt + 1, H - bh + 1, W - bw + 1
    origins = starts * tops * lefts
    prefix += row * N
    corners += row * P
    context += row * N
    rate = tl.load(spec + 11).to(tl.float64, bitcast=True)
    total = rate * 0.0 + 1.0
    if GUIDED:  # noqa: SIM102 (a constexpr: the branch is no part of the other build)
        if guided != 0:
            strength = tl.load(spec + 10).to(tl.float64, bitcast=True)
            _summed_area(saliency + row % B * N, table + row * N, T, H, W, TC, HP, WP)
            tl.debug_barrier()
            total = _weigh_origins(table + row * N, prefix, H, W, bt, bh, bw, tops, lefts, origins, strength, LANES)
    count = blocks * 0
    attempt = blocks * 0
    while (count == 0) & (attempt <= redraws):
        for first in range(0, blocks, LANES):
            p = first + tl.arange(0, LANES)
            zero = tl.zeros([LANES], tl.uint32)
            stream = ((1 << 28) | (key << 20) | (attempt << 14)) + p
            r0, r1, r2, r3 = tl.philox(
                seed,
                zero + sample.to(tl.uint32),
                zero + (sample >> 32).to(tl.uint32),
                zero + step.to(tl.uint32),
                stream.to(tl.uint32),
            )
            t = tl.umulhi(r0, zero + starts.to(tl.uint32)).to(tl.int32)
            h = tl.umulhi(r1, zero + tops.to(tl.uint32)).to(tl.int32)
            w = tl.umulhi(r2, zero + lefts.to(tl.uint32)).to(tl.int32)
            if GUIDED:  # noqa: SIM102 (a constexpr: the branch is no part of the other build)
                if guided != 0:
                    u = (r3 >> 8).to(tl.float64) * (1.0 / 16777216)
                    o = _search(prefix, u, origins, (1.0 - rate) / total, rate / origins)
                    o = tl.minimum(o, origins - 1)
                    t = o // (tops * lefts)
                    h = o // lefts % tops
                    w = o % lefts
            tl.store(corners + p, (t.to(tl.int64) << 40) | (h.to(tl.int64) << 20) | w, p < blocks)
        tl.debug_barrier()
        free = tl.zeros([BLOCK], tl.int32)
        for first in range(0, N, BLOCK):
            n = first + tl.arange(0, BLOCK)
            t = n // (H * W)
            h = n // W % H
            w = n % W
            is_free = (t < time_limit).to(tl.int32)
            for p in range(blocks):
                corner = tl.load(corners + p)
                dt = t - (corner >> 40).to(tl.int32)
                dh = h - (corner >> 20 & 0xFFFFF).to(tl.int32)
                dw = w - (corner & 0xFFFFF).to(tl.int32)
                covered = (dt >= 0) & (dt < bt) & (dh >= 0) & (dh < bh) & (dw >= 0) & (dw < bw)
                is_free = tl.where(covered, 0, is_free)
            tl.store(context + n, is_free.to(tl.int8), n < N)
            free += is_free
        count = tl.sum(free)
        attempt += 1
        tl.debug_barrier()
    tl.store(counts + row, count)


@triton.jit
def _threshold(keys, context, value, own, keep, N, BLOCK: tl.constexpr):
    """A bound such that ``keep`` of the ``own`` tokens with context == value have a key up to it; keys are distinct."""
    low = keep.to(tl.int64) * 0 - 1
    high = low + (1 << 54)
    bound = high
    found = own
    while found != keep:
        bound = (low + high) >> 1
        below = tl.zeros([BLOCK], tl.int32)
        for first in range(0, N, BLOCK):
            n = first + tl.arange(0, BLOCK)
            valid = n < N
            is_own = tl.load(context + n, valid, other=-1).to(tl.int32) == value
            below += (is_own & (tl.load(keys + n, valid, other=0) <= bound)).to(tl.int32)
        found = tl.sum(below)
        low = tl.where(found > keep, low, bound)
        high = tl.where(found > keep, bound, high)
    return bound


@triton.jit(do_not_specialize=["B", "N"])
def _write(
    specs,
    context,
    counts,
    keys,
    enc,
    pred,
    enc_len,
    pred_len,
    B,
    N,
    COLUMNS: tl.constexpr,
    TRUNCATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Context int8 [S,B,N], counts int32 [S,B] -> enc, pred int64 [S,B,N], ascending, then zeros; enc_len, pred_len
    int64 [S,B], both 0 if no context was left (of any sample of the spec, if truncated). Scratch: keys int64 [S,B,N].
    """
    row = tl.program_id(0).to(tl.int64)
    spec = specs + row // B * COLUMNS
    max_keep = tl.load(spec + 5).to(tl.int32)
    full, pred_full, inverse = tl.load(spec + 6) != 0, tl.load(spec + 7) != 0, tl.load(spec + 8) != 0
    own = tl.load(counts + row)
    least, most = own, own
    if TRUNCATE != "none":
        low = tl.zeros([BLOCK], tl.int32) + own
        high = low
        for first in range(0, B, BLOCK):
            b = first + tl.arange(0, BLOCK)
            count = tl.load(counts + row // B * B + b, b < B, other=-1)
            low = tl.where(b < B, tl.minimum(low, count), low)
            high = tl.maximum(high, count)
        least, most = tl.min(low), tl.max(high)
    keep_enc = tl.minimum(least, max_keep)
    keep_pred = tl.where(least > 0, N - most, 0)
    context += row * N
    enc += row * N
    pred += row * N
    keys += row * N
    bound_enc = keep_enc.to(tl.int64)
    bound_pred = keep_pred.to(tl.int64)
    if TRUNCATE == "random":
        seed, step = tl.load(spec + 12), tl.load(spec + 13)
        sample = tl.load(spec + 14) + row % B
        stream = (2 << 28) | (tl.load(spec + 15).to(tl.int32) << 20)
        for first in range(0, N, BLOCK):
            n = first + tl.arange(0, BLOCK)
            zero = tl.zeros([BLOCK], tl.uint32)
            r0, r1, r2, r3 = tl.philox(
                seed,
                zero + sample.to(tl.uint32),
                zero + (sample >> 32).to(tl.uint32),
                zero + step.to(tl.uint32),
                (stream + n // 4).to(tl.uint32),
            )
            word = tl.where(n % 4 < 2, tl.where(n % 4 == 0, r0, r1), tl.where(n % 4 == 2, r2, r3))
            tl.store(keys + n, (word.to(tl.int64) << 22) | n, n < N)
        tl.debug_barrier()
        bound_enc = _threshold(keys, context, 1, own, keep_enc, N, BLOCK)
        bound_pred = _threshold(keys, context, 0, N - own, keep_pred, N, BLOCK)
    length_enc = tl.where(pred_full & (least > 0), N - keep_pred, keep_enc)
    length_pred = tl.where(full & (least > 0), N - keep_enc, keep_pred)
    seen_enc = least * 0
    seen_pred = least * 0
    for first in range(0, N, BLOCK):
        n = first + tl.arange(0, BLOCK)
        flag = tl.load(context + n, n < N, other=-1).to(tl.int32)
        is_enc = (flag == 1).to(tl.int32)
        is_pred = (flag == 0).to(tl.int32)
        if TRUNCATE == "random":
            key = tl.load(keys + n, n < N, other=0)
            is_enc = tl.where(key <= bound_enc, is_enc, 0)
            is_pred = tl.where(key <= bound_pred, is_pred, 0)
        slot_enc = seen_enc + tl.cumsum(is_enc) - is_enc
        slot_pred = seen_pred + tl.cumsum(is_pred) - is_pred
        seen_enc += tl.sum(is_enc)
        seen_pred += tl.sum(is_pred)
        # what lies past the length kept counts as the other kind under a complement
        is_enc = tl.where(slot_enc < keep_enc, is_enc, 0)
        is_pred = tl.where(slot_pred < keep_pred, is_pred, 0)
        slot_enc = tl.minimum(slot_enc, keep_enc)
        slot_pred = tl.minimum(slot_pred, keep_pred)
        all_enc = tl.where(pred_full, 1 - is_pred, is_enc)
        all_pred = tl.where(full, 1 - is_enc, is_pred)
        slot_all_enc = tl.where(pred_full, n - slot_pred, slot_enc)
        slot_all_pred = tl.where(full, n - slot_enc, slot_pred)
        _put(tl.where(inverse, pred, enc), all_enc, slot_all_enc, length_enc, n, N)
        _put(tl.where(inverse, enc, pred), all_pred, slot_all_pred, length_pred, n, N)
    tl.store(enc_len + row, tl.where(inverse, length_pred, length_enc).to(tl.int64))
    tl.store(pred_len + row, tl.where(inverse, length_enc, length_pred).to(tl.int64))


@triton.jit
def _put(out, is_kept, slot, length, n, N):
    valid = n < N
    tl.store(out + slot, n.to(tl.int64), valid & (is_kept == 1) & (slot < length))
    tl.store(out + n, (n * 0).to(tl.int64), valid & (n >= length))


def _tiles(grid) -> dict:
    """Tile of the summed-area table: TC time steps of HP x WP."""
    hp, wp = (triton.next_power_of_2(size) for size in grid[1:])
    return {"TC": min(triton.next_power_of_2(grid[0]), max(1, 2048 // (hp * wp))), "HP": hp, "WP": wp}


def _launch(tokens: int) -> dict:
    """A program has an SM to itself at the sizes that matter. Given a ``maxnreg`` ptxas spills for no occupancy."""
    block = min(1024, max(128, triton.next_power_of_2(tokens)))
    return {"BLOCK": block, "num_warps": max(4, block // 128), "num_stages": 1, "maxnreg": 255}


def draw(saliency, specs, grid, most_blocks: int, table, prefix):
    """Context of every spec and sample: flags int8 [S,B,N], their numbers int32 [S,B], block corners int64 [S,B,P].

    saliency: [B,T,H,W] floating, or None where no spec is guided. specs: int64 [S,17] on the device. table, prefix:
    scratch of 8 bytes per element, [S,B,N].
    """
    S, B, N = table.shape
    context = torch.empty((S, B, N), dtype=torch.int8, device=specs.device)
    counts = torch.empty((S, B), dtype=torch.int32, device=specs.device)
    corners = torch.empty((S, B, most_blocks), dtype=torch.int64, device=specs.device)
    maps = specs if saliency is None else saliency.contiguous()
    scratch = table.view(torch.float64), prefix.view(torch.float64)
    meta = {"COLUMNS": _COLUMNS, "GUIDED": saliency is not None, "LANES": _LANES, **_tiles(grid), **_launch(N)}
    _draw[(S * B,)](maps, specs, *scratch, corners, context, counts, B, *grid, most_blocks, **meta)
    return context, counts, corners


def sample(saliency, specs, grid, most_blocks: int, truncate: str, enc, pred, enc_len, pred_len) -> None:
    """Fills enc, pred [S,B,N] and enc_len, pred_len [S,B], all int64; the other arguments are those of ``draw``."""
    S, B, N = enc.shape
    context, counts, _ = draw(saliency, specs, grid, most_blocks, enc, pred)
    keys = torch.empty_like(enc) if truncate == "random" else enc
    meta = {"COLUMNS": _COLUMNS, "TRUNCATE": truncate, **_launch(N)}
    _write[(S * B,)](specs, context, counts, keys, enc, pred, enc_len, pred_len, B, N, **meta)


def variants() -> dict:
    """The builds that benchmarks/aot.py compiles."""
    flags = dict(context="*i8", counts="*i32")
    drawn = dict(saliency="*fp32", specs="*i64", table="*fp64", prefix="*fp64", corners="*i64", **flags)
    drawn |= dict.fromkeys("BTHWP", "i32")
    written = dict.fromkeys(("specs", "keys", "enc", "pred", "enc_len", "pred_len"), "*i64")
    written |= {**flags, "B": "i32", "N": "i32"}

    def of(fn, signature, grid, **constexprs):
        launch = _launch(grid[0] * grid[1] * grid[2])
        constexprs = {"COLUMNS": _COLUMNS, "BLOCK": launch.pop("BLOCK"), **constexprs}
        aligned = [name for name, kind in signature.items() if kind[0] == "*"]
        return dict(fn=fn, signature=signature, constexprs=constexprs, aligned=aligned, **launch)

    def drawing(grid, guided):
        return of(_draw, drawn, grid, GUIDED=guided, LANES=_LANES, **_tiles(grid))

    return {
        "draw_guided_8x14x14": drawing((8, 14, 14), True),
        "draw_guided_16x24x24": drawing((16, 24, 24), True),
        "draw_guided_4x32x64": drawing((4, 32, 64), True),
        "draw_8x14x14": drawing((8, 14, 14), False),
        "write_batch": of(_write, written, (8, 14, 14), TRUNCATE="batch"),
        "write_random": of(_write, written, (8, 14, 14), TRUNCATE="random"),
    }
