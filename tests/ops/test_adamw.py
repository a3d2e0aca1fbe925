"""AdamW with the moving average behind it, of every backend, against torch.optim.AdamW and torch.lerp, step by step."""

import pytest
import torch

from tests.ops.parity import BACKENDS, KERNELS, crossed, device_for
from vjepa_fast import ops
from vjepa_fast.ops import _cpp

SIZES = [(5,), (3, 700), (1,), (0, 4), (2048,), (2, 2048), (4099,), (16384,), (8, 2051), (7, 1)]
ULP = 2.0**-23


def random(gen, device="cpu"):
    return [torch.randn(s, generator=gen).to(device) for s in SIZES]


def lists(gen, device):
    """Parameters, averages, targets (every other one) and bfloat16 copies (of some of them)."""
    params, exp_avgs = random(gen, device), [0.1 * x for x in random(gen, device)]
    squares = [0.1 * x.square() for x in random(gen, device)]
    targets = [p + 0.1 * x if i % 2 else None for i, (p, x) in enumerate(zip(params, random(gen, device)))]
    lows = [t.bfloat16() if t is not None and i % 4 == 1 else None for i, t in enumerate(targets)]
    return params, exp_avgs, squares, targets, lows


def copies(values):
    return [[x if x is None else x.clone() for x in column] for column in values]


def torch_step(params, grads, exp_avgs, squares, targets, lows, rule, scale):
    """The same in torch: its AdamW at the same step, then lerp, then a cast."""
    params = [torch.nn.Parameter(p) for p in params]
    opt = torch.optim.AdamW(
        params, lr=rule.lr, betas=(rule.beta1, rule.beta2), eps=rule.eps, weight_decay=rule.weight_decay, foreach=False
    )
    for p, g, m, v in zip(params, grads, exp_avgs, squares):
        p.grad = g * scale
        opt.state[p] = {"step": torch.tensor(rule.step - 1.0), "exp_avg": m, "exp_avg_sq": v}
    opt.step()
    for p, t, low in zip(params, targets, lows):
        if t is not None:
            t.lerp_(p.detach(), rule.follow)
        if low is not None:
            low.copy_(t)


def close(new, old, want, ulps):
    """Within so many units in the last place of the largest number that went into each element."""
    bound = ulps * ULP * torch.stack([old.abs(), want.abs(), new.abs()]).amax(0) + 1e-30
    worst = ((new - want).abs() / bound).max() if new.numel() else torch.zeros(())
    assert worst <= 1, f"{float(worst * ulps):.1f} units in the last place"


@pytest.mark.parametrize(
    ("backend", "decay", "scale", "follow"),
    crossed([*BACKENDS, "formula"], (0.0, 0.05), (None, 0.3), (0.00075, 0.75, 1.0, 0.0)),
)
def test_steps_as_torch_makes_them(backend, decay, scale, follow, monkeypatch):
    if backend == "formula":  # eager code where torch has no fused kernel
        backend = "eager"
        monkeypatch.setattr(ops.adamw, "_FUSED", ())
    device, gen = device_for(backend), torch.Generator().manual_seed(0)
    ours = lists(gen, device)
    # torch's fused kernel on CUDA has the bias corrections in float32: half a unit of 1 is 5 units of 1 - 0.9 and 50 of
    # 1 - 0.99, of which the root takes half; 13.3 units were measured
    far = 8 if backend == "eager" and device in ops.adamw._FUSED and device != "cpu" else 1
    for step in (1, 2, 1000):  # each from our own state: errors do not add up
        rule = ops.Rule(1e-2, 0.9, 0.99, 1e-8, decay, step, follow)
        grads, old, want = random(gen, device), copies(ours), copies(ours)
        torch_step(want[0], grads, *want[1:], rule, 1.0 if scale is None else scale)
        params, exp_avgs, squares, targets, lows = ours
        with ops.use_backend(backend):
            ops.adamw_ema_(
                params,
                [g.clone() for g in grads],
                exp_avgs,
                squares,
                rule,
                targets=targets,
                lows=lows,
                scale=None if scale is None else torch.tensor(scale, device=device),
            )
        for k, (p, g) in enumerate(zip(params, grads)):
            close(exp_avgs[k], torch.maximum(old[1][k].abs(), g.abs()), want[1][k], 2 * far)
            close(squares[k], old[2][k], want[2][k], 4 * far)
            close(p, torch.maximum(old[0][k].abs(), (p - old[0][k]).abs()), want[0][k], 4 * far)
            if targets[k] is not None:
                close(targets[k], torch.stack([old[3][k], old[0][k], p]).abs().amax(0), want[3][k], 4 * far)
            if lows[k] is not None:
                assert torch.equal(lows[k], targets[k].bfloat16())
            assert not p.numel() or not torch.equal(p, old[0][k])


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_numbers_from_the_device(backend):
    """In the place of those of the rule, which then may say anything but betas and eps."""
    device, gen = device_for(backend), torch.Generator().manual_seed(0)
    ours, grads = lists(gen, device), random(gen, device)
    rule, other = (ops.Rule(lr, 0.9, 0.99, 1e-8, decay, step, 0.3) for lr, decay, step in ((1e-2, 0.05, 2), (9, 9, 9)))
    numbers, found = torch.tensor(rule.changing, dtype=torch.float64, device=device), []
    for given in ({"rule": rule}, {"rule": other, "numbers": numbers}):
        params, exp_avgs, squares, targets, lows = state = copies(ours)
        with ops.use_backend(backend):
            lists_ = (params, [g.clone() for g in grads], exp_avgs, squares)
            ops.adamw_ema_(*lists_, given.pop("rule"), targets=targets, lows=lows, **given)
        found.append([x for values in state for x in values if x is not None])
    for x, y in zip(*found):
        torch.testing.assert_close(x, y, rtol=1e-2 if x.dtype == torch.bfloat16 else 1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="numbers: expected float64"):
        ops.adamw_ema_(*(copies(ours)[k] for k in (0, 0, 1, 2)), rule, numbers=numbers.float())


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("numbered", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_changes_unless_it_may_go(backend, numbered, scale):
    if backend == "cpp" and numbered:
        pytest.skip("cpp reads the numbers on the host")
    device, gen = device_for(backend), torch.Generator().manual_seed(0)
    ours, grads = lists(gen, device), random(gen, device)
    rule, found = ops.Rule(1e-2, 0.9, 0.99, 1e-8, 0.05, 2, 0.3), []
    given: dict = {"scale": None if scale is None else torch.tensor(scale, device=device)}
    if numbered:
        given["numbers"] = torch.tensor(rule.changing, dtype=torch.float64, device=device)
    for go in (None, True, False):
        params, exp_avgs, squares, targets, lows = state = copies(ours)
        theirs = [torch.full_like(g, float("nan")) if go is False else g.clone() for g in grads]
        with ops.use_backend(backend):
            flag = None if go is None else torch.tensor(go, device=device)
            ops.adamw_ema_(params, theirs, exp_avgs, squares, rule, targets=targets, lows=lows, go=flag, **given)
        found.append([x for values in state for x in values if x is not None])
    before = [x for values in ours for x in values if x is not None]
    rtol = 1e-6 if backend == "triton" else 0  # another build of its kernel, with a scale
    for free, going, staying, old in zip(*found, before):
        torch.testing.assert_close(going, free, rtol=rtol, atol=rtol)
        assert torch.equal(staying, old) and (not old.numel() or not torch.equal(going, old))


@pytest.mark.parametrize("backend", BACKENDS)
def test_exact_at_both_ends_and_the_same_bits_again(backend):
    device = device_for(backend)
    runs = []
    for _ in range(2):
        gen = torch.Generator().manual_seed(3)
        params, exp_avgs, squares, *_ = lists(gen, device)
        grads, equal = random(gen, device), [p.clone() for p in params]
        with ops.use_backend(backend):
            nothing = ops.Rule(0.0, 0.9, 0.99, 1e-8, 0.05, 1, 0.3)  # no learning rate: target and parameter stay equal
            ops.adamw_ema_(params, grads, exp_avgs, squares, nothing, targets=equal)
            assert all(torch.equal(p, t) for p, t in zip(params, equal))
            far = [torch.zeros_like(p) for p in params]
            ops.adamw_ema_(params, grads, exp_avgs, squares, nothing._replace(lr=0.1, follow=1.0), targets=far)
        assert all(torch.equal(p, t) for p, t in zip(params, far))
        runs.append([*params, *exp_avgs, *squares])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.parametrize("backend", KERNELS)
def test_addresses_anywhere(backend):
    """Gradients may be pieces of one buffer (several processes), which begin at any multiple of four bytes."""
    device, gen = device_for(backend), torch.Generator().manual_seed(1)
    params, exp_avgs, squares, *_ = lists(gen, device)
    flat = torch.randn(1 + sum(p.numel() for p in params), generator=gen).to(device)
    grads = [x.view(p.shape) for x, p in zip(flat[1:].split([p.numel() for p in params]), params)]
    rule = ops.Rule(1e-2, 0.9, 0.99, 1e-8, 0.05, 3)
    found = []
    for given in (grads, [g.clone() for g in grads]):
        state = copies((params, exp_avgs, squares))
        with ops.use_backend(backend):
            ops.adamw_ema_(state[0], given, *state[1:], rule)
        found.append(state)
    rtol = 0 if backend == "cpp" else 1e-6  # two builds of the Triton kernel may join products and sums otherwise
    for x, y in zip(*found):
        torch.testing.assert_close(x, y, rtol=rtol, atol=rtol)


@pytest.mark.skipif(ops.backend_report()["adamw_ema"]["cpp"] != "", reason="no C++ kernels")
def test_threads_do_not_change_the_bits():
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            gen = torch.Generator().manual_seed(2)
            params, exp_avgs, squares, targets, lows = lists(gen, "cpu")
            grads = random(gen)
            with ops.use_backend("cpp"):
                ops.adamw_ema_(
                    params,
                    grads,
                    exp_avgs,
                    squares,
                    ops.Rule(1e-2, 0.9, 0.99, 1e-8, 0.05, 3, 0.01),
                    targets=targets,
                    lows=lows,
                )
                found.append([*params, *exp_avgs, *squares, ops.total_norm(grads)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.parametrize("backend", ["eager", KERNELS[0]])
def test_total_norm(backend):
    grads = [100 * x for x in random(torch.Generator().manual_seed(5))]
    exact = torch.cat([g.double().flatten() for g in grads]).norm()
    with ops.use_backend(backend):
        norm = ops.total_norm(grads)
        assert norm.shape == () and norm.dtype == torch.float32
        torch.testing.assert_close(norm.double(), exact, rtol=1e-6, atol=0)
        assert ops.total_norm([torch.tensor([1.0, float("nan")]), grads[0]]).isnan()
    assert ops.total_norm([]) == 0


def test_what_a_kernel_does_not_support_runs_in_torch_or_is_refused_with_the_reason():
    rule = ops.Rule(1e-2, 0.9, 0.99, 1e-8, 0.05, 1)
    cases = {
        "float32 parameters": [torch.ones(3, dtype=torch.float64) for _ in range(4)],
        "contiguous": [torch.ones(3, 4).t() for _ in range(4)],
    }
    for words, (p, g, m, v) in cases.items():
        with ops.use_backend("cpp"), pytest.raises(ops.BackendError, match=words if _cpp.LOADED else "not built"):
            ops.adamw_ema_([p], [g], [m], [v], rule)
        ops.adamw_ema_([p], [g], [m], [v], rule)
        assert not torch.equal(p, torch.ones_like(p))
    p, g, m, v = (torch.ones(3) for _ in range(4))
    with ops.use_backend("cpp"), pytest.raises(ops.BackendError, match="bfloat16 only" if _cpp.LOADED else "not built"):
        ops.adamw_ema_([p], [g], [m], [v], rule, targets=[p.clone()], lows=[p.half()])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(grads=[]), "grads: expected 2 tensors"),
        (dict(exp_avgs=[torch.ones(3), torch.ones(4)]), r"exp_avgs: expected the shape \[3\]"),
        (dict(rule=ops.Rule(1e-2, 0.9, 0.99, 1e-8, 0.05, 0)), "rule.step: expected at least 1, got 0"),
        (dict(lows=[torch.ones(3).bfloat16(), None]), "lows: expected None where there is no target"),
    ],
)
def test_bad_arguments(change, words):
    args = {k: [torch.ones(3), torch.ones(3)] for k in ("params", "grads", "exp_avgs", "exp_avg_sqs")}
    args["rule"] = ops.Rule(1e-2, 0.9, 0.99, 1e-8, 0.05, 1)
    with pytest.raises(ValueError, match=words):
        ops.adamw_ema_(**{**args, **change})
