"""The latent loss skeletons: every backend, every row function of the objectives, against eager code in float64."""

import pytest
import torch

from tests.draws import given, settings, st
from tests.ops.parity import BACKENDS, KERNELS, assert_parity, crossed, device_for, run
from vjepa_fast import ops
from vjepa_fast.objectives import OBJECTIVES
from vjepa_fast.objectives.terms.spectral import weighted_dft
from vjepa_fast.ops import latent

len(OBJECTIVES)  # the terms bring their functions along
for _p in (1, 1.5, 2):
    from vjepa_fast.objectives.rows import power_error

    power_error(_p)
for _module in ("delta", "kinematic", "ltc", "spectral", "velgate"):
    _terms = __import__(f"vjepa_fast.objectives.terms.{_module}", fromlist=["x"])
    for _x in vars(_terms).values():
        if isinstance(_x, latent.RowFunction):
            _x()
FUNCTIONS = {
    access: sorted(k for k in latent.functions() if latent.function(k).access == access)
    for access in ("TOKEN", "PAIR", "COLUMN")
}
GRID = (3, 1, 2)  # small: interpreted Triton takes milliseconds per token


def tokens(b, k, grid, seed=0):
    """[B,K] sorted tokens without repetition."""
    g = torch.Generator().manual_seed(seed)
    n = grid[0] * grid[1] * grid[2]
    return torch.stack([torch.randperm(n, generator=g)[:k].sort().values for _ in range(b)])


def neighbours(idx, grid):
    """(after, before): the rows of ``idx`` one time step later and earlier, -1 where there is none; by search."""
    places = grid[1] * grid[2]
    rows = [row.tolist() for row in idx]
    return tuple(
        torch.tensor(
            [[row.index(n + s) if n + s in row else -1 for n in row] for row in rows], dtype=torch.int64
        ).reshape(idx.shape)
        for s in (places, -places)
    )


def features(b, k, n, d, seed=0):
    g = torch.Generator().manual_seed(seed)
    h = torch.randn(b, n, d, generator=g, dtype=torch.float64)
    return torch.randn(b, k, d, generator=g, dtype=torch.float64), 1.5 * h + 0.3


def test_every_function_is_lowered_everywhere():
    assert FUNCTIONS["TOKEN"] == ["l1", "power", "square"] and FUNCTIONS["COLUMN"] == ["spectrum"]
    assert len(FUNCTIONS["PAIR"]) == 9
    assert all(latent.function(k).everywhere for k in latent.functions())


@pytest.mark.parametrize(
    ("backend", "dtype", "function", "place"),
    crossed(
        KERNELS,
        (torch.float32, torch.bfloat16),
        (("l1", 1.0), ("square", 2.0), ("power", 1.5)),
        (("same", False), ("same", True), ("next", True), ("step", True)),
    ),
)
def test_token(backend, dtype, function, place):
    target, skip = place
    idx = tokens(2, 5, GRID)
    after, _ = neighbours(idx, GRID)
    z, h = features(2, 5, 6, 24)

    def fn(z, h, idx, after):
        return ops.latent_loss_token(
            z,
            h,
            idx,
            latent.RowCall(*function),
            target=target,
            places=2,
            levels=2,
            after=after if skip else None,
            normalize=True,
        )

    assert_parity(fn, (z, h, idx, after), backend=backend, dtype=dtype, wrt=(0,), atol=2e-6)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keys", [[k] for k in FUNCTIONS["PAIR"]] + [["step", "delta", "ltc_zh"]], ids="+".join)
def test_pair(backend, dtype, keys):
    idx = tokens(2, 5, GRID)
    z, h = features(2, 5, 6, 24)
    windows = [None, (3, 9, 12), (2, 20, 24)]  # all channels, a part of every level, a part of all

    def fn(z, h, idx, after, before):
        calls = [latent.RowCall(k, 0.0, windows[n % 3]) for n, k in enumerate(keys)]
        norm = dtype == torch.float32
        return ops.latent_loss_pair(z, h, idx, after, before, calls, places=2, levels=2, normalize=norm)

    slopes = (0,) if any("z" in latent.function(k).reads for k in keys) else ()
    assert_parity(fn, (z, h, idx, *neighbours(idx, GRID)), backend=backend, dtype=dtype, wrt=slopes, atol=2e-6)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("windows", [[(0, 12, 24)], [(13, 20, 24), (2, 5, 12)]])
@pytest.mark.parametrize("key", ["step", "delta", "ltc_zh_later"])
def test_pair_of_windows_only(backend, key, windows):
    """Channels that no function wants are not read, yet get their gradient of 0."""
    idx = tokens(2, 5, GRID)
    z, h = features(2, 5, 6, 24)

    def fn(z, h, idx, after, before):
        calls = [latent.RowCall(key, 0.0, window) for window in windows]
        return ops.latent_loss_pair(z, h, idx, after, before, calls, places=2, levels=2, normalize=True)

    pairs = neighbours(idx, GRID)
    assert_parity(fn, (z, h, idx, *pairs), backend=backend, dtype=torch.float32, wrt=(0,), atol=2e-6)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("steps", "normalize"), [(4, False), (5, True)])
def test_column(backend, dtype, steps, normalize):
    slots = torch.stack([torch.arange(3 * steps).view(steps, 3).t(), torch.arange(3 * steps).view(steps, 3).t() + 1])
    slots[1, 2] = -1  # no such column
    toks = torch.where(slots < 0, slots, slots + 2)
    z, h = features(2, 3 * steps + 2, 3 * steps + 4, 40)

    def fn(z, h, slots, toks):
        call = latent.RowCall("spectrum")
        return ops.latent_loss_column(
            z, h, slots, toks, call, weighted_dft(steps, z.double()).to(z.dtype), levels=2, normalize=normalize
        )

    assert_parity(fn, (z, h, slots, toks), backend=backend, dtype=dtype, wrt=(0,), atol=2e-6)


@pytest.mark.parametrize("backend", KERNELS)
@settings(max_examples=6, deadline=None, derandomize=True, database=None)
@given(
    b=st.integers(1, 2),
    k=st.integers(1, 5),
    e=st.integers(1, 70),
    levels=st.integers(1, 3),
    seed=st.integers(0, 99),
    bf16=st.booleans(),
)
def test_any_shape(backend, b, k, e, levels, seed, bf16):
    grid = (3, 2, 2)
    idx = tokens(b, k, grid, seed)
    z, h = features(b, k, 12, e * levels, seed)

    def fn(z, h, idx, after, before):
        near = ops.latent_loss_token(z, h, idx, latent.RowCall("l1", 1.0), levels=levels, normalize=e > 2)
        pair = ops.latent_loss_pair(z, h, idx, after, before, [latent.RowCall("delta")], places=4, levels=levels)
        return near, pair

    dtype = torch.bfloat16 if bf16 else torch.float32
    assert_parity(fn, (z, h, idx, *neighbours(idx, grid)), backend=backend, dtype=dtype, wrt=(0,), atol=2e-6)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("width", [96, 3072, 6656])
def test_real_widths(backend, width):
    idx = tokens(1, 3, (2, 1, 2))
    z, h = features(1, 3, 4, width)

    def fn(z, h, idx, after, before):
        calls = [latent.RowCall("step", 0.0, (0, width // 2, width)), latent.RowCall("ltc_zh")]
        pair = ops.latent_loss_pair(z, h, idx, after, before, calls, places=2, levels=4, normalize=True)
        return pair, ops.latent_loss_token(z, h, idx, latent.RowCall("l1", 1.0), levels=4, normalize=True)

    args = (z, h, idx, *neighbours(idx, (2, 1, 2)))
    assert_parity(fn, args, backend=backend, dtype=torch.bfloat16, wrt=(0,), atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_dtypes_and_views(backend):
    """Features in float32 beside a bfloat16 target, both non-contiguous, as autocast hands them over."""
    device = device_for(backend)
    idx = tokens(2, 5, GRID).to(device)
    after, before = (x.to(device) for x in neighbours(idx.cpu(), GRID))
    z, h = (x.to(device) for x in features(2, 5, 6, 24))
    want, exactly = None, {} if backend == "eager" and device == "cuda" else {"rtol": 0, "atol": 0}
    for view in (lambda x: x, lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)):
        z_, h_ = view(z.float()).requires_grad_(), view(h.bfloat16())
        with ops.use_backend(backend):
            rows = ops.latent_loss_pair(z_, h_, view(idx), after, before, [latent.RowCall("delta")], places=2)[0]
            rows = rows + ops.latent_loss_token(z_, h_, view(idx), latent.RowCall("l1", 1.0))
            (grad,) = torch.autograd.grad(rows, z_, view(torch.ones_like(rows).t().contiguous().t()))
        assert rows.dtype == grad.dtype == torch.float32
        want = want or (rows.detach(), grad)
        torch.testing.assert_close((rows.detach(), grad), want, **exactly)  # eager sums on a GPU depend on strides


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("b", "k"), [(2, 0), (0, 3)])
def test_empty(backend, b, k):
    device = device_for(backend)
    idx = torch.zeros(b, k, dtype=torch.int64, device=device)
    z = torch.zeros(b, k, 8, device=device, requires_grad=True)
    h = torch.zeros(b, 6, 8, device=device)
    with ops.use_backend(backend):
        rows = ops.latent_loss_token(z, h, idx, latent.RowCall("l1", 1.0))
        pair = ops.latent_loss_pair(z, h, idx, idx - 1, idx - 1, [latent.RowCall("delta")], places=3)
        (rows.sum() + pair.sum()).backward()
    assert rows.shape == (b, k) and pair.shape == (1, b, k) and z.grad.shape == z.shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_hand_computed(backend):
    device = device_for(backend)
    z = torch.tensor([[[1.0, 2.0], [5.0, 3.0]]], device=device, requires_grad=True)
    h = torch.tensor([[[0.0, 4.0], [9.0, 9.0], [1.0, 1.0], [9.0, 9.0]]], device=device)
    idx = torch.tensor([[0, 2]], device=device)
    after, before = torch.tensor([[1, -1]], device=device), torch.tensor([[-1, 0]], device=device)
    with ops.use_backend(backend):
        rows = ops.latent_loss_token(z, h, idx, latent.RowCall("l1", 1.0))
        assert rows.tolist() == [[1.5, 3.0]]
        (grad,) = torch.autograd.grad(rows.sum(), z)
        assert grad.tolist() == [[[0.5, -0.5], [0.5, 0.5]]]
        step = ops.latent_loss_token(z, h, idx, latent.RowCall("l1", 1.0), target="step", after=after, places=2)
        assert step.tolist() == [[(0 + 5) / 2, 0.0]]  # h changes by (1, -3)
        pair = ops.latent_loss_pair(z, h, idx, after, before, [latent.RowCall("delta")], places=2)
        assert pair.tolist() == [[[(3 + 4) / 2, 0.0]]]  # z changes by (4, 1)
        (grad,) = torch.autograd.grad(pair.sum(), z)
        assert grad.tolist() == [[[-0.5, -0.5], [0.5, 0.5]]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_and_compile(backend):
    device = device_for(backend)
    idx = tokens(2, 4, GRID).to(device)
    after, before = (x.to(device) for x in neighbours(idx.cpu(), GRID))
    z, h = (x.float().to(device) for x in features(2, 4, 6, 8))
    z.requires_grad_()
    slots = torch.tensor([[[0, 1, 2, 3]], [[-1, -1, -1, -1]]], device=device)
    with ops.use_backend(backend):
        for key, p in (("l1", 1.0), ("square", 2.0)):
            torch.library.opcheck(latent._token, (z, h, idx, after, key, [p, 0, 8, 8], 2, 2, 2, True, True))
        torch.library.opcheck(
            latent._pair, (z, h, idx, after, before, "step,ltc_zh", [0, 0, 4, 8, 0, 0, 8, 8], 2, 2, True)
        )
        basis = weighted_dft(4, z)
        torch.library.opcheck(latent._column, (z, h, slots, slots, basis, "spectrum", 2, False))

        def fn(z):
            near = ops.latent_loss_token(z, h, idx, latent.RowCall("l1", 1.0)).sum()
            pair = ops.latent_loss_pair(z, h, idx, after, before, [latent.RowCall("delta")], places=2).sum()
            return near + pair + ops.latent_loss_column(z, h, slots, slots, latent.RowCall("spectrum"), basis).sum()

        want = torch.autograd.grad(fn(z), z)[0]
        torch._dynamo.reset()
        got = torch.autograd.grad(torch.compile(fn, fullgraph=True, backend="aot_eager")(z), z)[0]
    if device == "cpu":
        assert torch.equal(got, want)
    torch.testing.assert_close(got, want)  # on CUDA indexing adds up in any order


def test_what_a_kernel_does_not_support():
    z, h = (x.float() for x in features(1, 2, 4, 8))
    idx = torch.tensor([[0, 1]])
    with ops.use_backend("cpp"), pytest.raises(ops.BackendError, match="cpp supports float32, bfloat16, got float64"):
        ops.latent_loss_token(z.double(), h.double(), idx, latent.RowCall("l1", 1.0))
    assert run(
        lambda z, h: ops.latent_loss_token(z, h, idx, latent.RowCall("l1", 1.0)),
        (z, h),
        dtype=torch.float64,
        backend="auto",
    )[0].shape == (1, 2)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (dict(h=torch.zeros(2, 4, 8)), r"h: expected a floating tensor \[1,N,8\], got float32 \[2, 4, 8\]"),
        (dict(h=torch.zeros(1, 4, 6)), r"h: expected a floating tensor \[1,N,8\]"),
        (dict(z=torch.zeros(2, 8)), r"z: expected a floating tensor \[B,K,D\], got float32 \[2, 8\]"),
        (dict(idx=torch.zeros(1, 3, dtype=torch.int64)), "idx: expected 2 indices, one per row of z"),
        (dict(idx=torch.zeros(1, 2)), "idx: expected an int64 tensor"),
        (dict(idx=torch.tensor([[0, 4]])), r"idx: expected token indices in \[0, 4\), got \[0, 4\]"),
        (dict(target="later"), "target: expected one of same, next, step, got 'later'"),
        (dict(levels=3), "levels: expected a divisor of 8, got 3"),
    ],
)
def test_argument_errors(change, text):
    args = dict(
        z=torch.zeros(1, 2, 8), h=torch.zeros(1, 4, 8), idx=torch.tensor([[0, 1]]), call=latent.RowCall("l1", 1.0)
    )
    with pytest.raises(ValueError, match="latent_loss_token: " + text):
        ops.latent_loss_token(**{**args, **change})


def test_a_key_names_one_function():
    def other(x, y, p):
        return x, y

    with pytest.raises(ValueError, match="row function 'l1' is defined twice"):
        latent.RowFunction("l1", "TOKEN", other)()
