"""mask_distance against the published values and a brute-force search."""

import pathlib

import numpy as np
import pytest
import torch

from tests.draws import given, settings, st
from tests.ops.parity import BACKENDS, KERNELS, device_for, moved
from vjepa_fast import ops
from vjepa_fast.ops.distance import _mask_distance

GOLDENS = pathlib.Path(__file__).parent.parent / "goldens"


@pytest.fixture(params=BACKENDS)
def backend(request):
    with ops.use_backend(request.param):
        yield request.param


def distance(enc, pred, *args, **kwargs):
    """ops.mask_distance of the backend in force, from and to the CPU."""
    device = device_for(ops.current_backend())
    out = ops.mask_distance(moved(enc, device), moved(pred, device), *args, **kwargs)
    assert out.device.type == device and out.dtype == torch.float32
    return out.cpu()


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDENS / "losses_small.npz") as data:
        return {k: torch.from_numpy(data[k]) for k in data.files if "mask" in k and not k.endswith("json")}


def brute_force(enc, pred, grid, divisor=1.0):
    _, h, w = grid
    t_h_w = [torch.stack((i // (h * w), i // w % h, i % w), -1).double() for i in (enc, pred)]
    return (torch.cdist(*t_h_w).amin(-1) / divisor).sqrt().float()


def random_masks(b, ke, kp, grid, seed=0):
    g = torch.Generator().manual_seed(seed)
    n = grid[0] * grid[1] * grid[2]
    return tuple(torch.stack([torch.randperm(n, generator=g)[:k] for _ in range(b)]) for k in (ke, kp))


@pytest.mark.parametrize("side", [16, 32])
@pytest.mark.parametrize("offset", [0, 1])
def test_golden_grids(backend, golden, side, offset):
    enc, pred = (golden[f"mask_distance_grid{side}/masks_{k}"].long() for k in ("enc", "pred"))
    out = distance(enc, pred, (2, side, side), offset=bool(offset))
    torch.testing.assert_close(out, golden[f"mask_distance_grid{side}/offset{offset}"], rtol=1e-6, atol=0)


def test_golden_training_masks(backend, golden):
    cases = [k for k in golden if "out/mask_distance/" in k]
    assert len(cases) == 8
    for key in cases:
        prefix, where = key.split("out/mask_distance/")
        t = {"": 4, "multi/": [4, 2, 1][int(where[0])]}[prefix]
        enc, pred = (golden[f"{prefix}in/masks_{k}/{where}"].long() for k in ("enc", "pred"))
        torch.testing.assert_close(distance(enc, pred, (t, 4, 4)), golden[key], rtol=1e-6, atol=0, msg=key)


@pytest.mark.parametrize("grid", [(8, 14, 14), (1, 1, 1), (1, 5, 3), (7, 1, 2), (3, 33, 17)])
@pytest.mark.parametrize("kp", [1, 400])
def test_brute_force(backend, grid, kp):
    enc, pred = random_masks(3, 300, kp, grid)
    torch.testing.assert_close(distance(enc, pred, grid), brute_force(enc, pred, grid), rtol=1e-6, atol=0)


def test_offset_divides_the_distance_by_the_larger_side_over_16(backend):
    enc, pred = random_masks(2, 9, 4, (2, 20, 50))
    out = distance(enc, pred, (2, 20, 50), offset=True)
    torch.testing.assert_close(out, brute_force(enc, pred, (2, 20, 50), 3.0), rtol=1e-6, atol=0)
    small = distance(enc % 98, pred % 98, (2, 7, 7), offset=True)  # the published code divides by zero here
    torch.testing.assert_close(small, brute_force(enc % 98, pred % 98, (2, 7, 7)), rtol=1e-6, atol=0)


def test_non_contiguous_empty_and_overlapping(backend):
    enc, pred = random_masks(4, 20, 10, (2, 8, 8))
    whole = distance(enc, pred, (2, 8, 8))
    assert torch.equal(distance(enc[::2, ::2], pred[::2], (2, 8, 8)), whole[::2, ::2])
    assert torch.equal(distance(enc.t().contiguous().t(), pred.t().contiguous().t(), (2, 8, 8)), whole)
    assert distance(enc[:, :0], pred, (2, 8, 8)).shape == (4, 0)
    assert distance(enc[:0], pred[:0], (2, 8, 8)).shape == (0, 20)
    assert (distance(pred, pred, (2, 8, 8)) == 0).all()


def test_samples_are_independent_of_their_batch_and_of_threads(backend):
    enc, pred = random_masks(16, 100, 50, (4, 9, 9))
    whole = distance(enc, pred, (4, 9, 9))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(distance(enc, pred, (4, 9, 9)), whole)
    finally:
        torch.set_num_threads(threads)
    for b in range(16):
        assert torch.equal(distance(enc[b : b + 1], pred[b : b + 1], (4, 9, 9))[0], whole[b])


def test_opcheck_and_compile(backend):
    enc, pred = (m.to(device_for(backend)) for m in random_masks(2, 20, 10, (2, 8, 8)))
    torch.library.opcheck(_mask_distance, (enc, pred, 2, 8, 8, 1))
    fn = lambda e, p: ops.mask_distance(e, p, (2, 8, 8), offset=True) * 2  # noqa: E731
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(enc, pred), fn(enc, pred))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (dict(masks_enc=torch.zeros(2, 3)), r"masks_enc: expected an int64 tensor \[B,K\], got float32 \[2, 3\]"),
        (dict(masks_enc=torch.zeros(3, dtype=torch.int64)), "masks_enc: expected an int64 tensor"),
        (
            dict(masks_pred=torch.zeros(3, 1, dtype=torch.int64)),
            r"masks_pred: expected a batch of 2, got int64 \[3, 1\]",
        ),
        (dict(masks_pred=torch.zeros(2, 0, dtype=torch.int64)), "masks_pred: expected at least one predicted token"),
        (dict(masks_enc=torch.tensor([[0], [8]])), r"masks_enc: expected token indices in \[0, 8\), got \[0, 8\]"),
        (dict(masks_pred=torch.tensor([[-1], [0]])), r"masks_pred: expected token indices in \[0, 8\), got \[-1, 0\]"),
        (dict(grid=(2, 4)), r"grid: expected three positive ints \(T, H, W\), got \(2, 4\)"),
        (dict(grid=(2, 0, 4)), "grid: expected three positive ints"),
    ],
)
def test_argument_errors(backend, change, text, monkeypatch):
    monkeypatch.setenv("VJEPA_FAST_DEBUG", "1")  # the GPU's indices are not looked at otherwise
    args = dict(masks_enc=torch.tensor([[0], [7]]), masks_pred=torch.tensor([[1], [2]]), grid=(2, 2, 2))
    with pytest.raises(ValueError, match="mask_distance: " + text):
        distance(*{**args, **change}.values())


@pytest.mark.parametrize("backend", KERNELS)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    grid=st.tuples(st.integers(1, 9), st.integers(1, 40), st.integers(1, 40)),
    b=st.integers(1, 3),
    ke=st.integers(1, 200),
    kp=st.integers(1, 200),
    seed=st.integers(0, 1000),
    offset=st.booleans(),
)
def test_any_grid(backend, grid, b, ke, kp, seed, offset):
    """One unit in the last place: squared distances are integers, so only the roots are rounded."""
    enc, pred = random_masks(b, ke, kp, grid, seed)
    with ops.use_backend("eager"):
        want = ops.mask_distance(enc, pred, grid, offset=offset)
    with ops.use_backend(backend):
        got = distance(enc, pred, grid, offset=offset)
        again = distance(enc, pred, grid, offset=offset)
    assert torch.equal(got, again)
    assert ((got.view(torch.int32) - want.view(torch.int32)).abs() <= 1).all()


def test_indices_outside_the_grid_are_no_addresses_on_the_gpu():
    pytest.importorskip("triton")
    from vjepa_fast.kernels import distance as kernel

    device = device_for("triton")
    enc, pred = torch.tensor([[-9, 3, 1 << 40]], device=device), torch.tensor([[1 << 33, -1]], device=device)
    got = kernel.mask_distance(enc, pred, (1, 2, 3), 1)
    with ops.use_backend("eager"):
        assert torch.equal(got, ops.mask_distance(enc.clamp(0, 5), pred.clamp(0, 5), (1, 2, 3)))
