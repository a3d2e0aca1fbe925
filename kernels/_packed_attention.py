"""Device code of packed_attention: one pass over the keys, one for the keys' gradients, one for the queries'.

A stream of ``rows`` tokens (B*K) holds S segments one after another, ``offsets`` [S+1] on the device says where. H
heads of D channels, padded to BLOCK_D; a row of qkv is [3,H,D]. All exponents are to base 2: ``lse`` is
log2(sum(2^(s*SCALE))) with SCALE = log2(e)/sqrt(D).

Which tile a program takes is decided on the device: tile p belongs to the last segment s with
``offsets[s] // BLOCK + s <= p``. So a segment has as many tiles as it needs or one more, and all together have at most
rows // BLOCK + S + 1, whatever the lengths are: no launch depends on one. What lies behind the last segment counts as
a segment of filler: its rows become zeros, and are not read.
"""

import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950408889634)
_SHIFT = tl.constexpr(12582912.0 + 127.0)  # 1.5 * 2^23: what is added to it is rounded to an integer; biased exponent
# The cubic closest to 2^x on [-1/2, 1/2] in relative error, 7.5e-5 (Remez)
_C0, _C1 = tl.constexpr(0.9999280571937561), tl.constexpr(0.6932609677314758)
_C2, _C3 = tl.constexpr(0.2426111251115799), tl.constexpr(0.0551716685295105)


@triton.jit
def exp2_polynomial(x):
    """2^x for x < 128 on the units of additions and products: 2^n 2^r with n = round(x). 0 below -126.5, NaN of NaN."""
    x = tl.maximum(x, -127.0, propagate_nan=tl.PropagateNan.ALL)
    n = x + _SHIFT
    r = x - (n - _SHIFT)
    p = _C0 + r * (_C1 + r * (_C2 + r * _C3))
    return p * (n.to(tl.int32, bitcast=True) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _halves(x):
    """Left and right half of the columns; of a product's result both lie in the same threads: nothing moves."""
    x = tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2))
    return tl.split(tl.permute(x, (0, 2, 1)))


@triton.jit
def _beside(a, b):
    return tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), (a.shape[0], 2 * a.shape[1]))


@triton.jit
def exp2(x, SHARE: tl.constexpr):
    """2^x of [M,N] float32: SHARE eighths (0, 1, 2, 4) of the columns by polynomial, the others by the special unit,
    which makes 16 a clock and SM where the tensor cores want more at few channels a head.
    """
    if SHARE == 0:
        p = tl.exp2(x)
    else:
        a, b = _halves(x)
        if SHARE == 4:
            b = exp2_polynomial(b)
        else:
            b, c = _halves(b)
            if SHARE == 2:
                c = exp2_polynomial(c)
            else:
                c, d = _halves(c)
                c = _beside(tl.exp2(c), exp2_polynomial(d))
            b = _beside(tl.exp2(b), c)
        p = _beside(tl.exp2(a), b)
    return p


@triton.jit
def _tile(offsets_ptr, segments, rows, BLOCK: tl.constexpr):
    """Of this program: its first row, where its segment begins and ends, and whether that is the filler."""
    p = tl.program_id(0)
    passed = 0
    for first in range(0, segments + 1, 256):
        s = first + tl.arange(0, 256)
        offset = tl.load(offsets_ptr + s, mask=s <= segments, other=0)
        passed += tl.sum(((s <= segments) & (offset // BLOCK + s <= p)).to(tl.int32))
    segment = passed - 1
    begin = tl.load(offsets_ptr + segment)
    end = tl.load(offsets_ptr + segment + 1, mask=segment < segments, other=rows)
    return begin + (p - segment - begin // BLOCK) * BLOCK, begin, tl.minimum(end, rows), segment == segments


@triton.jit
def _at(row, STRIDE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Where [BLOCK,BLOCK_D] numbers from a row on are, in rows that are STRIDE apart."""
    return tl.cast(row, tl.int64) * STRIDE + (tl.arange(0, BLOCK)[:, None] * STRIDE + tl.arange(0, BLOCK_D)[None, :])


@triton.jit
def _inside(row, end, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Bool [BLOCK,BLOCK_D]: rows before ``end``, channels before D."""
    return (row + tl.arange(0, BLOCK) < end)[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]


@triton.jit
def _load(at, row, end, D: tl.constexpr, WHOLE: tl.constexpr):
    """[BLOCK,BLOCK_D] from a row on, zeros from ``end`` on and past the channels; WHOLE: ``end`` is not in it."""
    if not WHOLE:
        x = tl.load(at, mask=_inside(row, end, D, at.shape[0], at.shape[1]), other=0.0)
    elif at.shape[1] == D:
        x = tl.load(at)
    else:
        x = tl.load(at, mask=(tl.arange(0, at.shape[1]) < D)[None, :], other=0.0)
    return x


@triton.jit
def _turned(x, table_ptr, row, end, period, R: tl.constexpr, TRANSPOSE: tl.constexpr):
    """[BLOCK,BLOCK_D] float32 turned by the positions of its rows as ``ops.rope3d`` does, or by the transposed map."""
    BLOCK: tl.constexpr = x.shape[0]
    PAIRS: tl.constexpr = x.shape[1] // 2
    r, c = row + tl.arange(0, BLOCK), tl.arange(0, 2 * PAIRS)
    angles = table_ptr + (r % period)[:, None].to(tl.int64) * (2 * R) + c[None, :]
    seen = (r < end)[:, None] & (c < R)[None, :]
    cos = tl.load(angles, mask=seen, other=1.0)
    sin = tl.load(angles + R, mask=seen, other=0.0)
    cos0, cos1 = tl.split(tl.reshape(cos, (BLOCK, PAIRS, 2)))
    sin0, sin1 = tl.split(tl.reshape(sin, (BLOCK, PAIRS, 2)))
    a, b = tl.split(tl.reshape(x, (BLOCK, PAIRS, 2)))
    if TRANSPOSE:
        turned = tl.join(a * cos0 + b * sin1, b * cos1 - a * sin0)
    else:
        turned = tl.join(a * cos0 - b * sin0, b * cos1 + a * sin1)
    return tl.reshape(turned, (BLOCK, 2 * PAIRS))


@triton.jit(do_not_specialize=["rows", "period"])
def packed_attention_turn(
    qkv_ptr,  # [rows, 3*H*D]
    table_ptr,  # [period, 2, R] float32
    out_ptr,  # [rows, PARTS*H*D]
    rows,
    period,
    H: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    FIRST: tl.constexpr,
    PARTS: tl.constexpr,  # the parts of qkv to turn: 1 and 1 for the keys, 0 and 2 for queries and keys
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Queries or keys turned, BLOCK tokens a program. Floor, and what it moves: parts and table read, parts written.

    A tile of queries reads all keys of its segment, and the angles of a token are four times the bytes of its key. So
    keys that are turned as they are loaded would cost more, from two tiles of queries on, than this pass.
    """
    row = tl.program_id(0) * BLOCK
    inside = _inside(row, rows, D, BLOCK, BLOCK_D)
    for head in range(0, PARTS * H):
        x = tl.load(qkv_ptr + (FIRST * H + head) * D + _at(row, 3 * H * D, BLOCK, BLOCK_D), mask=inside, other=0.0)
        x = _turned(x.to(tl.float32), table_ptr, row, rows, period, R, False)
        tl.store(out_ptr + head * D + _at(row, PARTS * H * D, BLOCK, BLOCK_D), x.to(out_ptr.dtype.element_ty), inside)


@triton.jit
def _attend(
    q,  # [M,BLOCK_D]
    keys,
    values,  # of row 0
    start,
    end,
    top,  # [M] the largest exponent of the tiles before
    total,  # [M] their sums of powers
    acc,  # [M,BLOCK_D] the same, times values
    KEY_ROW: tl.constexpr,
    ROW: tl.constexpr,
    D: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SHARE: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """One tile of keys and values more."""
    k = _load(keys + _at(start, KEY_ROW, BLOCK_N, q.shape[1]), start, end, D, WHOLE)
    v = _load(values + _at(start, ROW, BLOCK_N, q.shape[1]), start, end, D, WHOLE)
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    if not WHOLE:
        s = tl.where((start + tl.arange(0, BLOCK_N) < end)[None, :], s, float("-inf"))
    new_top = tl.maximum(top, tl.max(s, 1) * SCALE)
    base = tl.where(new_top == float("-inf"), 0.0, new_top)  # no key so far has any weight, one to come may have
    p = exp2(s * SCALE - base[:, None], SHARE)
    fade = tl.exp2(top - base)
    acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
    return new_top, total * fade + tl.sum(p, 1), acc


@triton.jit(do_not_specialize=["rows", "segments", "period"])
def packed_attention_forward(
    qkv_ptr,  # [rows, 3*H*D]
    keys_ptr,  # [rows, H*D], the keys turned; without positions qkv again
    table_ptr,  # [period, 2, R] float32
    offsets_ptr,  # [segments + 1] int32
    out_ptr,  # [rows, H*D]
    lse_ptr,  # [H, rows] float32
    rows,
    segments,
    period,
    H: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,  # 0: no positions
    SHARE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Queries of a tile and head, turned as they are loaded, against the keys of their segment; softmax on the way.

    Floor: q, k, v read once and out written once; 4*D operations of tensor cores and an exponential for each pair of
    tokens of a segment and each head. On an H100 (4096 operations in half precision and 16 exponentials a clock and SM)
    exponentials are the limit under 64 channels, both weigh the same at 64.
    """
    row, begin, end, filler = _tile(offsets_ptr, segments, rows, BLOCK_M)
    if row >= end:
        return
    head = tl.program_id(1)
    r = row + tl.arange(0, BLOCK_M)
    inside = _inside(row, end, D, BLOCK_M, BLOCK_D)
    out = out_ptr + head * D + _at(row, H * D, BLOCK_M, BLOCK_D)
    lse = lse_ptr + head.to(tl.int64) * rows + r
    if filler:
        tl.store(out, tl.zeros((BLOCK_M, BLOCK_D), out_ptr.dtype.element_ty), inside)
        tl.store(lse, tl.zeros((BLOCK_M,), tl.float32), r < end)
        return
    ROW: tl.constexpr = 3 * H * D
    SCALE: tl.constexpr = _LOG2E / D**0.5
    if R:  # by way of ``out``, a few rows at a time: at once, q and its angles would take twice the loop's registers
        PART: tl.constexpr = 32 if BLOCK_M > 32 else BLOCK_M  # a divisor: no row of another program is written
        for first in range(row, tl.minimum(row + BLOCK_M, end), PART):
            part = _inside(first, end, D, PART, BLOCK_D)
            x = tl.load(qkv_ptr + head * D + _at(first, ROW, PART, BLOCK_D), mask=part, other=0.0)
            x = _turned(x.to(tl.float32), table_ptr, first, end, period, R, False)
            tl.store(out_ptr + head * D + _at(first, H * D, PART, BLOCK_D), x.to(out_ptr.dtype.element_ty), part)
        tl.debug_barrier()  # what other threads have stored is read
        q = tl.load(out, mask=inside, other=0.0)
    else:
        q = tl.load(qkv_ptr + head * D + _at(row, ROW, BLOCK_M, BLOCK_D), mask=inside, other=0.0)
    KEY_ROW: tl.constexpr = H * D if R else ROW
    k = keys_ptr + (head if R else H + head) * D
    v = qkv_ptr + (2 * H + head) * D
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    rest = begin + (end - begin) // BLOCK_N * BLOCK_N
    for start in range(begin, rest, BLOCK_N):
        top, total, acc = _attend(q, k, v, start, end, top, total, acc, KEY_ROW, ROW, D, SCALE, BLOCK_N, SHARE, True)
    if rest < end:
        top, total, acc = _attend(q, k, v, rest, end, top, total, acc, KEY_ROW, ROW, D, SCALE, BLOCK_N, SHARE, False)
    tl.store(out, (acc / total[:, None]).to(out_ptr.dtype.element_ty), inside)
    tl.store(lse, top + tl.log2(total), r < end)


@triton.jit
def _store_gradient(
    dqkv, x, table_ptr, row, end, period, D: tl.constexpr, R: tl.constexpr, STRIDE: tl.constexpr, TURN: tl.constexpr
):
    """The gradient ``x`` [BLOCK,BLOCK_D] of turned rows, turned back (TURN), into dqkv, which points to row 0."""
    if TURN:
        x = _turned(x, table_ptr, row, end, period, R, True)
    at = dqkv + _at(row, STRIDE, x.shape[0], x.shape[1])
    tl.store(at, x.to(dqkv.dtype.element_ty), _inside(row, end, D, x.shape[0], x.shape[1]))


@triton.jit
def _attend_dq(
    q,
    do,
    lse,
    delta,
    keys,
    values,
    start,
    end,
    dq,
    KEY_ROW: tl.constexpr,
    ROW: tl.constexpr,
    D: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SHARE: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """One tile of keys and values more; q, do and dq [M,BLOCK_D], lse and delta [M]."""
    k = _load(keys + _at(start, KEY_ROW, BLOCK_N, q.shape[1]), start, end, D, WHOLE)
    v = _load(values + _at(start, ROW, BLOCK_N, q.shape[1]), start, end, D, WHOLE)
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    dp = tl.dot(do, tl.trans(v), input_precision="ieee")
    p = exp2(s * SCALE - lse[:, None], SHARE)
    if not WHOLE:  # what a key of zeros gets may be infinite
        p = tl.where((start + tl.arange(0, BLOCK_N) < end)[None, :], p, 0.0)
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit(do_not_specialize=["rows", "segments", "period"])
def packed_attention_backward_q(
    qkv_ptr,  # [rows, 3*H*D]
    turned_ptr,  # [rows, 2*H*D], queries and keys turned; without positions qkv again
    table_ptr,  # [period, 2, R] float32
    offsets_ptr,  # [segments + 1] int32
    out_ptr,  # [rows, H*D]
    grad_ptr,  # [rows, H*D], that of out
    lse_ptr,  # [H, rows]
    delta_ptr,  # [H, rows] float32, written: sum(out * grad)
    dqkv_ptr,  # [rows, 3*H*D], the queries' part is written
    rows,
    segments,
    period,
    H: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    SHARE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradient of the queries of a tile and head: one pass over the keys of the segment, probabilities made again.

    Floor: q, k, v, out and their gradient read once, dq written once; 6*D operations of tensor cores and an exponential
    for each pair of tokens and head.
    """
    row, begin, end, filler = _tile(offsets_ptr, segments, rows, BLOCK_M)
    if row >= end:
        return
    head = tl.program_id(1)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    dqkv = dqkv_ptr + head * D
    ROW: tl.constexpr = 3 * H * D
    if filler:
        _store_gradient(dqkv, dq, table_ptr, row, end, period, D, R, ROW, False)
        return
    SCALE: tl.constexpr = _LOG2E / D**0.5
    r = row + tl.arange(0, BLOCK_M)
    at, inside = head * D + _at(row, H * D, BLOCK_M, BLOCK_D), _inside(row, end, D, BLOCK_M, BLOCK_D)
    do = tl.load(grad_ptr + at, mask=inside, other=0.0)
    out = tl.load(out_ptr + at, mask=inside, other=0.0)
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    stat = head.to(tl.int64) * rows + r
    tl.store(delta_ptr + stat, delta, r < end)
    lse = tl.load(lse_ptr + stat, mask=r < end, other=0.0)
    KEY_ROW: tl.constexpr = 2 * H * D if R else ROW
    q = tl.load(turned_ptr + head * D + _at(row, KEY_ROW, BLOCK_M, BLOCK_D), mask=inside, other=0.0)
    k, v = turned_ptr + (H + head) * D, qkv_ptr + (2 * H + head) * D
    rest = begin + (end - begin) // BLOCK_N * BLOCK_N
    for start in range(begin, rest, BLOCK_N):
        dq = _attend_dq(q, do, lse, delta, k, v, start, end, dq, KEY_ROW, ROW, D, SCALE, BLOCK_N, SHARE, True)
    if rest < end:
        dq = _attend_dq(q, do, lse, delta, k, v, rest, end, dq, KEY_ROW, ROW, D, SCALE, BLOCK_N, SHARE, False)
    _store_gradient(dqkv, dq * D**-0.5, table_ptr, row, end, period, D, R, ROW, R > 0)


@triton.jit
def _attend_dkv(
    k,
    v,
    queries,
    grads,
    lses,
    deltas,
    start,
    end,
    dk,
    dv,
    KEY_ROW: tl.constexpr,
    OUT_ROW: tl.constexpr,
    D: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SHARE: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """One tile of queries more; k, v, dk and dv [N,BLOCK_D]. A query past the end is zeros, and adds nothing."""
    r = start + tl.arange(0, BLOCK_M)
    q = _load(queries + _at(start, KEY_ROW, BLOCK_M, k.shape[1]), start, end, D, WHOLE)
    do = _load(grads + _at(start, OUT_ROW, BLOCK_M, k.shape[1]), start, end, D, WHOLE)
    if WHOLE:
        lse, delta = tl.load(lses + r), tl.load(deltas + r)
    else:
        lse = tl.load(lses + r, mask=r < end, other=0.0)
        delta = tl.load(deltas + r, mask=r < end, other=0.0)
    s = tl.dot(k, tl.trans(q), input_precision="ieee")
    dp = tl.dot(v, tl.trans(do), input_precision="ieee")
    p = exp2(s * SCALE - lse[None, :], SHARE)
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
    ds = p * (dp - delta[None, :])
    return tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee"), dv


@triton.jit(do_not_specialize=["rows", "segments", "period"])
def packed_attention_backward_kv(
    qkv_ptr,  # [rows, 3*H*D]
    turned_ptr,  # [rows, 2*H*D], queries and keys turned; without positions qkv again
    table_ptr,  # [period, 2, R] float32
    offsets_ptr,  # [segments + 1] int32
    grad_ptr,  # [rows, H*D], that of out
    lse_ptr,  # [H, rows]
    delta_ptr,  # [H, rows], as ``packed_attention_backward_q`` leaves it
    dqkv_ptr,  # [rows, 3*H*D], the keys' and values' parts are written
    rows,
    segments,
    period,
    H: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    SHARE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradients of the keys and values of a tile and head: one pass over the queries of the segment.

    Floor: q, k, v and the gradient of out read once, dk and dv written once; 8*D operations of tensor cores and an
    exponential for each pair of tokens and head.
    """
    row, begin, end, filler = _tile(offsets_ptr, segments, rows, BLOCK_N)
    if row >= end:
        return
    head = tl.program_id(1)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    into_k, into_v = dqkv_ptr + (H + head) * D, dqkv_ptr + (2 * H + head) * D
    ROW: tl.constexpr = 3 * H * D
    if filler:
        _store_gradient(into_k, dk, table_ptr, row, end, period, D, R, ROW, False)
        _store_gradient(into_v, dv, table_ptr, row, end, period, D, R, ROW, False)
        return
    SCALE: tl.constexpr = _LOG2E / D**0.5
    inside = _inside(row, end, D, BLOCK_N, BLOCK_D)
    KEY_ROW: tl.constexpr = 2 * H * D if R else ROW
    k = tl.load(turned_ptr + (H + head) * D + _at(row, KEY_ROW, BLOCK_N, BLOCK_D), mask=inside, other=0.0)
    v = tl.load(qkv_ptr + (2 * H + head) * D + _at(row, ROW, BLOCK_N, BLOCK_D), mask=inside, other=0.0)
    q, do = turned_ptr + head * D, grad_ptr + head * D
    lse, delta = lse_ptr + head.to(tl.int64) * rows, delta_ptr + head.to(tl.int64) * rows
    rest = begin + (end - begin) // BLOCK_M * BLOCK_M
    for start in range(begin, rest, BLOCK_M):
        dk, dv = _attend_dkv(
            k, v, q, do, lse, delta, start, end, dk, dv, KEY_ROW, H * D, D, SCALE, BLOCK_M, SHARE, True
        )
    if rest < end:
        dk, dv = _attend_dkv(
            k, v, q, do, lse, delta, rest, end, dk, dv, KEY_ROW, H * D, D, SCALE, BLOCK_M, SHARE, False
        )
    _store_gradient(into_v, dv, table_ptr, row, end, period, D, R, ROW, False)
    _store_gradient(into_k, dk * D**-0.5, table_ptr, row, end, period, D, R, ROW, R > 0)
