"""float32 products of the objectives: the hidden layers of ``ld``, and the cross-covariance of ``fwm_orth``."""

from __future__ import annotations

from benchmarks.ops._inputs import LEVELS, Case, E, Inputs, N, forced
from vjepa_fast import ops

D, HIDDEN, KEPT = LEVELS * E, 256, N // 5  # about the share of the tokens that a mask of the published specs keeps


def _features(x: Inputs):
    return x.randn(2 * x.batch * KEPT, D, seed=1, grad=True)


def linear32(x: Inputs) -> Case:
    z = _features(x)
    inward, outward = (x.randn(*shape, seed=2).float().requires_grad_() for shape in ((HIDDEN, D), (D, HIDDEN)))

    def head():
        return ops.linear32(ops.linear32(z, inward), outward)

    def plain():
        return z.float() @ inward.t() @ outward.t()

    return Case(
        "linear32",
        f"M{len(z)} {D}-{HIDDEN}-{D}",
        {"reference": plain, "eager": forced("eager", head), "fused": head},
        leaves=[z, inward, outward],
        compile_=plain,
        atol=1e-2,  # sums of 256 products whose factors are sums of 3072
    )


def cross_covariance(x: Inputs) -> Case:
    z = _features(x)
    half = D // 2

    def plain():
        c = z.float() - z.float().mean(0)
        return c[:, :half].t() @ c[:, half:]

    def one():
        return ops.cross_covariance(z, None, half, D)[0]

    return Case(
        "cross_covariance",
        f"C{len(z)} D{D}",
        {"reference": plain, "eager": forced("eager", one), "fused": one},
        leaves=[z],
        compile_=plain,
        atol=1e-1,
    )


CASES = {"linear32": linear32, "cross_covariance": cross_covariance}
