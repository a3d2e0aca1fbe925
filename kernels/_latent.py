"""Skeletons of the latent losses in Triton: TOKEN, PAIR and COLUMN, into which the objectives inject device functions.

Legend: B batch, K tokens of a mask, N grid tokens, D = LEVELS*E channels, S places, P columns, T time steps, R calls.

A program owns one token (COLUMN: one place) and walks over its levels, E channels at a time; normalising a target row
thus needs no second read. Sums are taken inside a program, so equal inputs give equal bits. An index outside its range
is moved into it: what comes out is then meaningless, but no other memory is touched.
"""

import triton
import triton.language as tl

_SAME, _NEXT, _STEP = (tl.constexpr(n) for n in range(3))
_EPS = tl.constexpr(1e-5)  # of the normalisation per level


@triton.jit
def _inside(n, size):
    return tl.minimum(tl.maximum(n, 0), size - 1)


@triton.jit
def _level(row, c, limit, E, NORM: tl.constexpr):
    """One level [BLOCK] of the target row at ``row``, float32, normalised where asked; 0 at and past ``limit``."""
    x = tl.load(row + c, mask=c < limit, other=0.0).to(tl.float32)
    if NORM:
        # `/` is approximate on a GPU, which a mean far from 0 would show
        x = tl.where(c < limit, x - tl.div_rn(tl.sum(x, 0), E * 1.0), 0.0)
        x = x * (1.0 / tl.sqrt(tl.sum(x * x, 0) / E + _EPS))
    return x


@triton.jit
def _target(h, b, n, N, places, start, c, limit, D, E, TARGET: tl.constexpr, NORM: tl.constexpr):
    """One level of the target of token ``n`` of sample ``b``: its row, the next one in time, or their difference."""
    if TARGET == _SAME:
        y = _level(h + (b * N + _inside(n, N)) * D + start, c, limit, E, NORM)
    else:
        y = _level(h + (b * N + _inside(n + places, N)) * D + start, c, limit, E, NORM)
        if TARGET == _STEP:
            y -= _level(h + (b * N + _inside(n, N)) * D + start, c, limit, E, NORM)
    return y


@triton.jit(do_not_specialize=["K", "N", "places"])
def token(
    z,
    h,
    idx,
    after,
    rows,
    out,
    p,
    K,
    N,
    places,
    D,
    E,
    FN: tl.constexpr,
    TARGET: tl.constexpr,
    LEVELS: tl.constexpr,
    NORM: tl.constexpr,
    HAS_AFTER: tl.constexpr,
    KEEP: tl.constexpr,
    BACKWARD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Z [B*K,D], h [B,N,D], idx and after [B*K] -> rows [B*K], and where KEEP slopes as int8 in out [B*K,D].

    BACKWARD: rows is the gradient, and dz goes to out, the slopes computed again. Moves its floor: z and h once, one
    byte per channel or dz written.
    """
    r = tl.program_id(0).to(tl.int64)
    b = r // K
    n = tl.load(idx + r)
    limit = E
    if HAS_AFTER:
        limit = tl.where(tl.load(after + r) >= 0, E, 0)
    g = tl.load(rows + r) / D if BACKWARD else 0.0
    c = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for level in range(LEVELS):
        start = level * E
        x = tl.load(z + r * D + start + c, mask=c < limit, other=0.0).to(tl.float32)
        y = _target(h, b, n, N, places, start, c, limit, D, E, TARGET, NORM)
        value, slope = FN(x, y, p)
        if BACKWARD:
            slope = slope * g
        else:
            total += tl.where(c < limit, value, 0.0)
        if BACKWARD or KEEP:
            tl.store(out + r * D + start + c, tl.where(c < limit, slope, 0.0).to(out.dtype.element_ty), mask=c < E)
    if not BACKWARD:
        tl.store(rows + r, tl.sum(total, 0) / D)


@triton.jit
def token_sign(grad, sign, dz, D, BLOCK: tl.constexpr):
    """Dz [M,D] = sign [M,D] (int8) x grad [M] / D. Moves its floor."""
    r = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    s = tl.load(sign + r * D + c, mask=c < D, other=0).to(tl.float32)
    tl.store(dz + r * D + c, (s * (tl.load(grad + r) / D)).to(dz.dtype.element_ty), mask=c < D)


@triton.jit
def _wanted(start, c, LOW: tl.constexpr, HIGH: tl.constexpr, PERIOD: tl.constexpr, PART: tl.constexpr):
    """Channels [BLOCK] of the level at ``start`` that lie in any window; PART: in some windows not all of them do."""
    wanted = c >= 0
    if PART:
        wanted = c < 0
        for f in tl.static_range(len(LOW)):
            at = (start + c) % PERIOD[f]
            wanted |= (at >= LOW[f]) & (at < HIGH[f])
    return wanted


@triton.jit
def _none_yet(FNS: tl.constexpr, BLOCK: tl.constexpr):
    totals = ()
    for _ in tl.static_range(len(FNS)):
        totals = totals + (tl.zeros([BLOCK], dtype=tl.float32),)
    return totals


@triton.jit(do_not_specialize=["K", "N", "M", "places"])
def pair_forward(
    z,
    h,
    idx,
    after,
    rows,
    K,
    N,
    M,
    places,
    D,
    E,
    FNS: tl.constexpr,
    SOURCES: tl.constexpr,
    P: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    PERIOD: tl.constexpr,
    COUNT: tl.constexpr,
    PART: tl.constexpr,
    NEEDS_H: tl.constexpr,
    LEVELS: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Z [B*K,D], h [B,N,D], idx and after [B*K] -> rows [R,M], M = B*K; FNS and the tuples after it have R entries.

    Reads each row of z and h twice (as itself and as the successor of another), the second time from the L2 cache: its
    floor from memory. All functions see the same loads.
    """
    r = tl.program_id(0).to(tl.int64)
    b = r // K
    a = tl.load(after + r)
    limit = tl.where(a >= 0, E, 0)
    r1 = b * K + _inside(a, K)
    n = tl.load(idx + r)
    c = tl.arange(0, BLOCK)
    totals = _none_yet(FNS, BLOCK)
    for level in range(LEVELS):
        start = level * E
        mask = (c < limit) & _wanted(start, c, LOW, HIGH, PERIOD, PART)
        z0 = tl.load(z + r * D + start + c, mask=mask, other=0.0).to(tl.float32)
        z1 = tl.load(z + r1 * D + start + c, mask=mask, other=0.0).to(tl.float32)
        h0, h1 = z0, z1
        if NEEDS_H:
            h0 = _target(h, b, n, N, places, start, c, limit, D, E, _SAME, NORM)
            h1 = _target(h, b, n, N, places, start, c, limit, D, E, _NEXT, NORM)
        added = ()
        for f in tl.static_range(len(FNS)):
            value, to_0, to_1 = FNS[f](z0, z1, h0, h1, P[f])
            at = (start + c) % PERIOD[f]
            inside = (c < limit) & (at >= LOW[f]) & (at < HIGH[f])
            added = added + (totals[f] + tl.where(inside, value, 0.0),)
        totals = added
    for f in tl.static_range(len(FNS)):
        tl.store(rows + f * M.to(tl.int64) + r, tl.sum(totals[f], 0) / COUNT[f])


@triton.jit(do_not_specialize=["K", "N", "M", "places"])
def pair_backward(
    grad,
    z,
    h,
    idx,
    after,
    before,
    dz,
    K,
    N,
    M,
    places,
    D,
    E,
    FNS: tl.constexpr,
    SOURCES: tl.constexpr,
    P: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    PERIOD: tl.constexpr,
    COUNT: tl.constexpr,
    PART: tl.constexpr,
    NEEDS_H: tl.constexpr,
    LEVELS: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Dz [B*K,D] from grad [R,M]: a row gathers from the pair it starts and from the one it ends. Floor as forward,
    plus dz.
    """
    r = tl.program_id(0).to(tl.int64)
    b = r // K
    a, q = tl.load(after + r), tl.load(before + r)
    limit, limit_q = tl.where(a >= 0, E, 0), tl.where(q >= 0, E, 0)
    own = tl.maximum(limit, limit_q)
    r1, rq = b * K + _inside(a, K), b * K + _inside(q, K)
    n = tl.load(idx + r)
    c = tl.arange(0, BLOCK)
    for level in range(LEVELS):
        start = level * E
        wanted = _wanted(start, c, LOW, HIGH, PERIOD, PART)
        at = start + c
        z0 = tl.load(z + r * D + at, mask=wanted & (c < own), other=0.0).to(tl.float32)
        later = tl.load(z + r1 * D + at, mask=wanted & (c < limit), other=0.0).to(tl.float32)
        earlier = tl.load(z + rq * D + at, mask=wanted & (c < limit_q), other=0.0).to(tl.float32)
        h0, h_later, h_earlier = z0, later, earlier
        if NEEDS_H:
            h0 = _target(h, b, n, N, places, start, c, own, D, E, _SAME, NORM)
            h_later = _target(h, b, n, N, places, start, c, limit, D, E, _NEXT, NORM)
            h_earlier = _target(h, b, n - places, N, places, start, c, limit_q, D, E, _SAME, NORM)
        out = tl.zeros([BLOCK], dtype=tl.float32)
        for f in tl.static_range(len(FNS)):
            window = (at % PERIOD[f] >= LOW[f]) & (at % PERIOD[f] < HIGH[f])
            g = grad + f * M.to(tl.int64)
            value, to_0, to_1 = FNS[f](z0, later, h0, h_later, P[f])
            out += tl.where(window & (c < limit), to_0 * (tl.load(g + r) / COUNT[f]), 0.0)
            value, to_0, to_1 = FNS[f](earlier, z0, h_earlier, h0, P[f])
            out += tl.where(window & (c < limit_q), to_1 * (tl.load(g + rq) / COUNT[f]), 0.0)
        tl.store(dz + r * D + at, out.to(dz.dtype.element_ty), mask=c < E)


@triton.jit
def _statistics(rows, live, E, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """Mean and 1/deviation [STEPS] of one level of the rows that the pointers ``rows`` [STEPS] begin."""
    count = 0.0
    mean = tl.zeros([STEPS], dtype=tl.float32)
    square = tl.zeros([STEPS], dtype=tl.float32)
    for start in range(0, E, BLOCK):  # block by block, merged by Chan's formula
        c = start + tl.arange(0, BLOCK)
        x = tl.load(rows[:, None] + c[None, :], mask=live[:, None] & (c < E)[None, :], other=0.0).to(tl.float32)
        size = tl.minimum(E - start, BLOCK).to(tl.float32)
        m = tl.sum(x, 1) / size
        d = tl.where((c < E)[None, :], x - m[:, None], 0.0)
        both = count + size
        gap = m - mean
        square += tl.sum(d * d, 1) + gap * gap * (count * size / both)
        mean += gap * (size / both)
        count = both
    return mean, 1.0 / tl.sqrt(square / E + _EPS)


@triton.jit(do_not_specialize=["P", "K", "N"])
def column(
    z,
    h,
    slots,
    tokens,
    constants,
    rows,
    dz,
    P,
    K,
    N,
    C,
    T,
    D,
    E,
    FN: tl.constexpr,
    LEVELS: tl.constexpr,
    NORM: tl.constexpr,
    BACKWARD: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Z [B,K,D], h [B,N,D], slots and tokens [B*P,T], constants [C,T] -> rows [B*P].

    BACKWARD: rows is the gradient, and the columns' rows of dz [B,K,D] are written. Reads z once and h once (twice
    where NORM, the second time from cache). STEPS >= T is a power of two.
    """
    r = tl.program_id(0).to(tl.int64)
    b = r // P
    t = tl.arange(0, STEPS)
    there = tl.load(slots + r * T) >= 0
    live = t < tl.where(there, T, 0)
    slot = (b * K + _inside(tl.load(slots + r * T + t, mask=live, other=0), K)) * D
    h_rows = h + (b * N + _inside(tl.load(tokens + r * T + t, mask=live, other=0), N)) * D
    g = tl.load(rows + r) / D if BACKWARD else 0.0
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for level in range(LEVELS):
        mean = tl.zeros([STEPS], dtype=tl.float32)
        scale = mean + 1.0
        if NORM:
            mean, scale = _statistics(h_rows + level * E, live, E, BLOCK, STEPS)
        for start in range(0, E, BLOCK):
            c = start + tl.arange(0, BLOCK)
            mask = live[:, None] & (c < E)[None, :]
            at = slot[:, None] + (level * E + c)[None, :]
            x = tl.load(z + at, mask=mask, other=0.0).to(tl.float32)
            y = tl.load(h_rows[:, None] + (level * E + c)[None, :], mask=mask, other=0.0).to(tl.float32)
            y = tl.where(mask, (y - mean[:, None]) * scale[:, None], 0.0)
            value, slope = FN(x, y, constants, C, T)
            if BACKWARD:
                tl.store(dz + at, (slope * g).to(dz.dtype.element_ty), mask=mask)
            else:
                total += tl.where(c < E, value, 0.0)
    if not BACKWARD:
        tl.store(rows + r, tl.where(there, tl.sum(total, 0) / D, 0.0))
