"""float32 products on tensor cores: ``x w + bias``, and the cross-covariance of two halves of the channels.

Tensor cores multiply fp16 exactly and add in float32, at twice the rate of TF32. A float32 number is the sum of two
fp16 ones, 11 bits each, once a power of two has moved the largest of its tensor to 2^14: what is lost is 2^-22 of a
number, or 2^-39 of the largest one. A bfloat16 or float16 number is one (PARTS 1). Of two numbers in two parts each
the three larger products are taken, in the order of their size. Everything is split as it is read: nothing is stored.

Tensor cores do not round sums to nearest, so each adds up one block of BK products only, and blocks are added as any
float32 numbers are. Long sums are cut into pieces of at most _CHAIN, added afterwards. Equal inputs give equal bits.

Legend: M, N rows and columns of a result, K what is summed over; C rows of features, D channels, of which in every
PERIOD the first WIDTH are on side A and the others on side Y; S groups of rows, ``offsets`` int64 [S+1] apart.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton import knobs

_BLOCKS = {"BM": 128, "BN": 64, "BK": 32}
_OPTIONS = {"num_warps": 8, "num_stages": 2}
_PROGRAMS = 264  # two for each multiprocessor of the largest GPU: sums are cut until there are as many
_CHAIN = 8192  # most products that are added up in a row
_ROWS, _CHANNELS = 64, 128  # of a block of ``_statistics``, which takes _DEEP rows
_DEEP = 1024


@triton.jit
def _scale(largest):
    """The power of two that moves ``largest`` to [2^13, 2^14), as float32, and its reciprocal; by its exponent."""
    exponent = tl.maximum((tl.load(largest).to(tl.float32).to(tl.int32, bitcast=True) >> 23) & 0xFF, 14)
    up = ((267 - exponent) << 23).to(tl.float32, bitcast=True)
    return up, ((exponent - 13) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _multiplied(x, x_scale, y, y_scale, X_PARTS: tl.constexpr, Y_PARTS: tl.constexpr):
    """X [m,k] y [k,n] float32, of float32 multiplied by their scales; the smaller products are added first."""
    x, y = x * x_scale, y * y_scale
    x_high, y_high = x.to(tl.float16), y.to(tl.float16)
    total = tl.zeros([x.shape[0], y.shape[1]], dtype=tl.float32)
    if X_PARTS == 2:
        total = tl.dot((x - x_high.to(tl.float32)).to(tl.float16), y_high, total)
    if Y_PARTS == 2:
        total = tl.dot(x_high, (y - y_high.to(tl.float32)).to(tl.float16), total)
    return tl.dot(x_high, y_high, total)


@triton.jit
def _piece(k_from, k_to, BK: tl.constexpr):
    """The part of [k_from, k_to) that this program sums over, of as many as there are along axis 2; whole blocks."""
    each = tl.cdiv(tl.cdiv(k_to - k_from, tl.num_programs(2)), BK) * BK
    start = k_from + tl.program_id(2) * each
    return start, tl.minimum(start + each, k_to)


@triton.jit
def _even(size, EVEN: tl.constexpr):
    return size // 16 * 16 if EVEN else size


@triton.jit(do_not_specialize=["M", "N", "K"])  # any of them may be a number of tokens
def _product(
    x,
    w,
    bias,
    out,
    x_largest,
    w_largest,
    M,
    N,
    K,
    x_m,
    x_k,
    w_k,
    w_n,
    X_PARTS: tl.constexpr,
    W_PARTS: tl.constexpr,
    BIAS: tl.constexpr,
    EVEN_M: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """X [M,K] w [K,N] (strides x_m, x_k, w_k, w_n) + bias [N] -> out float32 [pieces,M,N], to be added up.

    EVEN: sizes that are multiples of 16, where rows lie together in memory. A program makes BM x BN of out. Floor: x, w
    and out once each; in fact x is read by N/BN programs, w by M/BM, those that run together finding them in the cache.
    """
    M, N, K = _even(M, EVEN_M), _even(N, EVEN_N), _even(K, EVEN_K)
    columns = tl.cdiv(N, BN)
    m = (tl.program_id(0) // columns) * BM + tl.arange(0, BM)
    n = (tl.program_id(0) % columns) * BN + tl.arange(0, BN)
    x_up, x_down = _scale(x_largest)
    w_up, w_down = _scale(w_largest)
    x_row, w_column = x + m.to(tl.int64)[:, None] * x_m, w + n.to(tl.int64)[None, :] * w_n
    total = tl.zeros([BM, BN], dtype=tl.float32)
    start, end = _piece(0, K, BK)
    for k0 in range(start, end, BK):
        k = k0 + tl.arange(0, BK)
        k_wide = k.to(tl.int64)
        a = tl.load(x_row + k_wide[None, :] * x_k, mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        b = tl.load(w_column + k_wide[:, None] * w_k, mask=(k < K)[:, None] & (n < N)[None, :], other=0.0)
        total += _multiplied(a.to(tl.float32), x_up, b.to(tl.float32), w_up, X_PARTS, W_PARTS)
    total = total * x_down * w_down
    if BIAS:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    at = (tl.program_id(2).to(tl.int64) * M + m[:, None]) * N + n[None, :]
    tl.store(out + at, total, mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=["chunks"])
def _statistics(z, offsets, sums, largest, chunks, D, ROWS: tl.constexpr, CHANNELS: tl.constexpr, DEEP: tl.constexpr):
    """Z [C,D] -> of each group and chunk of DEEP rows, sums [S,chunks,D] and the largest absolute numbers likewise."""
    s, chunk = tl.program_id(2), tl.program_id(1)
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    start = tl.load(offsets + s) + chunk * DEEP
    end = tl.minimum(start + DEEP, tl.load(offsets + s + 1))
    total = tl.zeros([ROWS, CHANNELS], dtype=tl.float32)
    most = tl.zeros([ROWS, CHANNELS], dtype=tl.float32)
    for r0 in range(0, DEEP, ROWS):
        r = start + r0 + tl.arange(0, ROWS)
        x = tl.load(z + r[:, None] * D + c[None, :], mask=(r < end)[:, None] & (c < D)[None, :], other=0.0)
        x = x.to(tl.float32)
        total += x
        most = tl.maximum(most, tl.abs(x))
    at = (s.to(tl.int64) * chunks + chunk) * D + c
    tl.store(sums + at, tl.sum(total, 0), mask=c < D)
    tl.store(largest + at, tl.max(most, 0), mask=c < D)


@triton.jit
def _channel(i, FROM: tl.constexpr, COUNT: tl.constexpr, PERIOD: tl.constexpr):
    """The channel that is number ``i`` of a side, whose channels are FROM .. FROM + COUNT of every PERIOD."""
    return i // COUNT * PERIOD + FROM + i % COUNT


@triton.jit
def _centred(z, mean, r, end, c, inside, D):
    """Rows r and channels c of z (they broadcast) less the group's means, float32; 0 past the group's end."""
    inside = inside & (r < end)
    x = tl.load(z + r * D + c, mask=inside, other=0.0).to(tl.float32)
    return tl.where(inside, x - mean, 0.0)


@triton.jit
def _covariance(
    z,
    offsets,
    mean,
    out,
    largest,
    D,
    N_A,
    N_Y,
    WIDTH: tl.constexpr,
    PERIOD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Z [C,D] -> out float32 [pieces,S,N_A,N_Y], the sums over a group's rows of centred side A x centred side Y."""
    columns, s = tl.cdiv(N_Y, BN), tl.program_id(1)
    m = (tl.program_id(0) // columns) * BM + tl.arange(0, BM)
    n = (tl.program_id(0) % columns) * BN + tl.arange(0, BN)
    c_m, c_n = _channel(m, 0, WIDTH, PERIOD), _channel(n, WIDTH, PERIOD - WIDTH, PERIOD)
    mean_m = tl.load(mean + s * D + c_m, mask=m < N_A, other=0.0)[None, :]
    mean_n = tl.load(mean + s * D + c_n, mask=n < N_Y, other=0.0)[None, :]
    up, down = _scale(largest)
    total = tl.zeros([BM, BN], dtype=tl.float32)
    start, end = _piece(tl.load(offsets + s), tl.load(offsets + s + 1), BK)
    for k0 in range(start, end, BK):
        k = (k0 + tl.arange(0, BK))[:, None]
        a = _centred(z, mean_m, k, end, c_m[None, :], (m < N_A)[None, :], D)
        y = _centred(z, mean_n, k, end, c_n[None, :], (n < N_Y)[None, :], D)
        total += _multiplied(tl.trans(a), up, y, up, 2, 2)
    at = ((tl.program_id(2).to(tl.int64) * tl.num_programs(1) + s) * N_A + m[:, None]) * N_Y + n[None, :]
    tl.store(out + at, total * down * down, mask=(m < N_A)[:, None] & (n < N_Y)[None, :])


@triton.jit(do_not_specialize=["C"])
def _covariance_gradient(
    grad,
    z,
    offsets,
    mean,
    out,
    largest,
    grad_largest,
    C,
    D,
    N,
    K,
    grad_s,
    grad_k,
    grad_n,
    FROM: tl.constexpr,
    COUNT: tl.constexpr,
    OTHER: tl.constexpr,
    OTHER_COUNT: tl.constexpr,
    PERIOD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """The gradient of one side, FROM and COUNT, into its channels of out [C,D]: the centred other side x grad.

    grad [S,K,N] by its strides, K channels of the other side, N of this one. The last of S+1 groups is filler, whose
    rows are set to 0. Centring needs no gradient of its own: the centred other side sums to 0.
    """
    s, groups = tl.program_id(1), tl.num_programs(1) - 1
    columns = tl.cdiv(N, BN)
    filler = s == groups
    start = tl.load(offsets + s) + (tl.program_id(0) // columns) * BM
    end = tl.load(offsets + s + 1, mask=not filler, other=0)
    end = tl.where(filler, C, end)
    if start >= end:
        return
    r = (start + tl.arange(0, BM))[:, None]
    n = (tl.program_id(0) % columns) * BN + tl.arange(0, BN)
    up, down = _scale(largest)
    grad_up, grad_down = _scale(grad_largest)
    total = tl.zeros([BM, BN], dtype=tl.float32)
    for k0 in range(0, tl.where(filler, 0, K), BK):
        k = k0 + tl.arange(0, BK)
        c = _channel(k, OTHER, OTHER_COUNT, PERIOD)
        mean_k = tl.load(mean + s * D + c, mask=k < K, other=0.0)[None, :]
        x = _centred(z, mean_k, r, end, c[None, :], (k < K)[None, :], D)
        at = s.to(tl.int64) * grad_s + k[:, None] * grad_k + n[None, :] * grad_n
        g = tl.load(grad + at, mask=(k < K)[:, None] & (n < N)[None, :], other=0.0)
        total += _multiplied(x, up, g, grad_up, 2, 2)
    total = total * down * grad_down
    at = r * D + _channel(n, FROM, COUNT, PERIOD)[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=(r < end) & (n < N)[None, :])


def registers(arch: int) -> int:
    """Of a thread at most: on Hopper and later so few that two programs share an SM, one adding while one multiplies.

    Ampere's instructions need more for their operands; given no bound, ptxas spills there.
    """
    return 128 if arch >= 90 else 168


def _options() -> dict[str, int]:
    arch = 90 if knobs.runtime.interpret else triton.runtime.driver.active.get_current_target().arch
    return {**_OPTIONS, "maxnreg": registers(arch)}


# -- launchers ---------------------------------------------------------------------------------------------------------
def _splits(tiles: int, most: int) -> int:
    """Into how many pieces a sum of ``most`` products is cut, ``tiles`` programs taking part in each of them."""
    enough = min(_PROGRAMS // max(1, tiles), triton.cdiv(most, 1024))
    return max(1, enough, triton.cdiv(most, _CHAIN))


def _tiles(m: int, n: int) -> int:
    return triton.cdiv(m, _BLOCKS["BM"]) * triton.cdiv(n, _BLOCKS["BN"])


def _parts(x: torch.Tensor) -> int:
    return 2 if x.dtype == torch.float32 else 1


def product(x, w, bias, x_largest, w_largest) -> torch.Tensor:
    """Float32 [M,N] of ``ops.product``: x [M,K], w [K,N] of any strides, their largest absolute numbers float32 []."""
    (m, k), n = x.shape, w.shape[1]
    splits = _splits(_tiles(m, n), k)
    out = torch.empty((splits, m, n), dtype=torch.float32, device=x.device)
    fused = bias is not None and splits == 1
    if out.numel():
        meta = {"X_PARTS": _parts(x), "W_PARTS": _parts(w), "BIAS": fused}
        contiguous = {"M": x.stride(0) == 1, "N": True, "K": x.stride(1) == 1 or w.stride(0) == 1}
        meta |= {f"EVEN_{dim}": contiguous[dim] and size % 16 == 0 for dim, size in (("M", m), ("N", n), ("K", k))}
        tensors = x, w, bias if fused else out, out, x_largest, w_largest
        _product[(_tiles(m, n), 1, splits)](
            *tensors, m, n, k, *x.stride(), *w.stride(), **meta, **_BLOCKS, **_options()
        )
    out = out[0] if splits == 1 else out.sum(0)
    return out if bias is None or fused else out + bias


def covariance(z, offsets, width, period) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sums float32 [S,N_A,N_Y] of ``ops.cross_covariance``, means [S,D], the largest absolute number of z []."""
    (c, d), groups, n_a = z.shape, len(offsets) - 1, z.shape[1] // period * width
    chunks = max(1, triton.cdiv(c, _DEEP))
    sums, most = (torch.empty((groups, chunks, d), dtype=torch.float32, device=z.device) for _ in range(2))
    grid = (triton.cdiv(d, _CHANNELS), chunks, groups)
    _statistics[grid](z, offsets, sums, most, chunks, d, ROWS=_ROWS, CHANNELS=_CHANNELS, DEEP=_DEEP, num_warps=8)
    mean, largest = sums.sum(1) / offsets.diff().clamp(min=1)[:, None], most.amax()
    splits = _splits(_tiles(n_a, d - n_a) * groups, triton.cdiv(c, groups))
    out = torch.empty((splits, groups, n_a, d - n_a), dtype=torch.float32, device=z.device)
    meta = {"WIDTH": width, "PERIOD": period, **_BLOCKS, **_options()}
    _covariance[(_tiles(n_a, d - n_a), groups, splits)](z, offsets, mean, out, largest, d, n_a, d - n_a, **meta)
    return out[0] if splits == 1 else out.sum(0), mean, largest


def covariance_gradient(grad, z, offsets, mean, largest, grad_largest, width, period) -> torch.Tensor:
    """Dz [C,D] in the dtype of z, 0 in rows that belong to no group."""
    (c, d), groups, n_a = z.shape, len(offsets) - 1, z.shape[1] // period * width
    out = torch.empty_like(z, memory_format=torch.contiguous_format)
    sides = ((0, width), (width, period - width))
    for this, other, n in ((0, 1, n_a), (1, 0, d - n_a)):
        strides = grad.stride() if this == 1 else (grad.stride(0), grad.stride(2), grad.stride(1))
        tensors = grad, z, offsets, mean, out, largest, grad_largest
        meta = {"FROM": sides[this][0], "COUNT": sides[this][1], "PERIOD": period}
        meta |= {"OTHER": sides[other][0], "OTHER_COUNT": sides[other][1]}
        grid = (_tiles(c, n), groups + 1)
        _covariance_gradient[grid](*tensors, c, d, n, d - n, *strides, **meta, **_BLOCKS, **_options())
    return out


def variants() -> dict[str, dict]:
    """The builds that benchmarks/aot.py compiles: ViT-B, 4 levels of 768, and a hidden layer of 256."""
    ints = dict.fromkeys(("M", "N", "K", "C", "D", "N_A", "N_Y", "chunks", "x_m", "x_k", "w_k", "w_n"), "i32")
    ints |= dict.fromkeys(("grad_s", "grad_k", "grad_n"), "i32")
    tensors = dict.fromkeys(
        ("bias", "mean", "sums", "largest", "grad", "x_largest", "w_largest", "grad_largest"), "*fp32"
    )
    loose = ("M", "N", "K", "C", "chunks")

    def build(fn, constexprs, warps=8, **types):
        known = {**ints, **tensors, "offsets": "*i64", "out": "*fp32", **types}
        signature = {name: known[name] for name in fn.arg_names if name not in constexprs}
        keep = [n for n in signature if n not in (loose if fn is not _covariance_gradient else ("C",))]
        return dict(
            fn=fn,
            signature=signature,
            constexprs=constexprs,
            num_warps=warps,
            num_stages=2,
            maxnreg=registers,
            aligned=keep,
        )

    def product_of(x, x_parts, constexprs):
        even = {"EVEN_M": "x_m" in constexprs, "EVEN_N": True, "EVEN_K": "x_k" in constexprs}
        whole = {"X_PARTS": x_parts, "W_PARTS": 2, "BIAS": True, **even, **_BLOCKS, **constexprs}
        return build(_product, whole, x=x, w="*fp32")

    def gradient_of(side, dtype):
        sides = ({"FROM": 0, "COUNT": 1536}, {"FROM": 1536, "COUNT": 1536})
        other = {"OTHER": sides[1 - side]["FROM"], "OTHER_COUNT": 1536, "PERIOD": 3072}
        one = {"grad_k": 1} if side == 0 else {"grad_n": 1}
        return build(_covariance_gradient, {**sides[side], **other, **one, **_BLOCKS}, z=dtype, out=dtype)

    halves = {"WIDTH": 1536, "PERIOD": 3072, **_BLOCKS}
    levels = {**halves, "WIDTH": 384, "PERIOD": 768}
    deep = {"ROWS": _ROWS, "CHANNELS": _CHANNELS, "DEEP": _DEEP}
    forward, to_weight = {"x_k": 1, "w_k": 1}, {"x_m": 1, "w_n": 1, "BIAS": False}
    return {
        "forward_bf16": product_of("*bf16", 1, forward),
        "forward_fp32": product_of("*fp32", 2, forward),
        "to_input_fp32": product_of("*fp32", 2, {"x_k": 1, "w_n": 1, "BIAS": False}),
        "to_weight_bf16": product_of("*bf16", 1, to_weight),
        "to_weight_fp32": product_of("*fp32", 2, to_weight),
        "statistics_bf16": build(_statistics, deep, z="*bf16", largest="*fp32"),
        "statistics_fp32": build(_statistics, deep, z="*fp32", largest="*fp32"),
        "covariance_bf16": build(_covariance, halves, z="*bf16"),
        "covariance_fp32": build(_covariance, halves, z="*fp32"),
        "covariance_channel_bf16": build(_covariance, levels, z="*bf16"),
        "covariance_gradient_bf16": gradient_of(0, "*bf16"),
        "covariance_gradient_fp32": gradient_of(1, "*fp32"),
    }
