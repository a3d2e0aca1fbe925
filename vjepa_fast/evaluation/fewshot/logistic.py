"""Logistic regression on the shots of each episode, many episodes at once.

The weights of L2-regularised regression are a combination of the shots, so the problem is solved in the N coefficients
of the shots and the width of the features does not matter. Newton's method, each step by conjugate gradients.
Shapes: e episodes, W ways, S shots, N = W*S, M queries of an episode.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vjepa_fast.errors import ConfigError, DataError
from vjepa_fast.evaluation.extract.features import Features
from vjepa_fast.evaluation.fewshot.episodes import EpisodeOptions, EpisodeResult, Products, run_episodes

if TYPE_CHECKING:
    from typing_extensions import Unpack


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((1, 2), keepdim=True)


def fit_dual(
    gram: Tensor, way: int, c: float = 1.0, *, tol: float = 1e-6, max_iter: int = 100
) -> tuple[Tensor, Tensor]:
    """Coefficients ``a [e, N, W]`` and intercepts ``b [e, 1, W]`` of multinomial logistic regression per episode.

    ``gram`` float64 ``[e, N, N]``: inner products of the shots x_i, class by class, equally many of each. The minimised
    function is scikit-learn's: c sum_i -log softmax(w x_i + b)[y_i] + |w|^2 / 2 with w = sum_i a_i x_i and b free. It
    counts as minimised where its gradient is at most ``tol |w|``: w is then off by no more than this, since the
    function is at least as curved as |w|^2 / 2. Raises DataError where it is not so after ``max_iter`` Newton steps.
    """
    y = torch.eye(way, dtype=gram.dtype).repeat_interleave(gram.shape[1] // way, 0)
    a = torch.zeros(len(gram), *y.shape, dtype=gram.dtype)
    b = torch.zeros(len(gram), 1, way, dtype=gram.dtype)
    ka = torch.zeros_like(a)
    # b weighs on a constant feature of 1; thought of as large as the others, it is no harder to find than w
    unit = gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1.0).view(-1, 1, 1)

    def loss(a: Tensor, ka: Tensor, b: Tensor) -> Tensor:
        f = ka + b
        misfit = (f.logsumexp(2, keepdim=True) - (y * f).sum(2, keepdim=True)).sum(1, keepdim=True)
        return c * misfit + 0.5 * _inner(a, ka)

    value = tried = loss(a, ka, b)
    going = torch.ones_like(value, dtype=torch.bool)
    for _ in range(max_iter):
        p = (ka + b).softmax(2)
        gap = c * (p - y)
        grad_a, grad_b = a + gap, gap.sum(1, keepdim=True)  # of the function of w = sum a_i x_i, in the same form
        size = (_inner(grad_a, gram @ grad_a).clamp_min(0) + unit * _inner(grad_b, grad_b)).sqrt()
        going = (size > tol * _inner(a, ka).clamp_min(0).sqrt()) & (size > 1e-9 * c)
        if not going.any():
            return a, b
        step_a, step_ka, step_b = _newton_step(gram, p, c, unit, -grad_a, -grad_b)
        slope = _inner(grad_a, step_ka) + _inner(grad_b, step_b)
        rate = going.to(gram.dtype)
        last = -slope <= 1e-8 * value  # what is left to gain drowns in the rounding of the loss: nothing to compare
        for _ in range(40):  # halve the steps that do not lower the loss enough
            tried = loss(a + rate * step_a, ka + rate * step_ka, b + rate * step_b)
            good = last | ~going | (tried <= value + 1e-4 * rate * slope)
            if good.all():
                break
            rate = torch.where(good, rate, 0.5 * rate)
        a, ka, b, value = a + rate * step_a, ka + rate * step_ka, b + rate * step_b, tried
    raise DataError(
        f"logistic regression: {int(going.sum())} of {len(gram)} episodes did not converge in {max_iter} steps; "
        "L2-normalise the features or lower C"
    )


def _newton_step(gram: Tensor, p: Tensor, c: float, unit: Tensor, r_a: Tensor, r_b: Tensor, rtol: float = 0.1):
    """Solve (I + c H gram) s = r for both blocks by conjugate gradients, to ``rtol`` of r, in the inner product
    <a, gram a'> + <b, b'> / unit of w and b, where the operator is symmetric.
    """
    s_a, s_ka, s_b = torch.zeros_like(r_a), torch.zeros_like(r_a), torch.zeros_like(r_b)
    r_b = unit * r_b
    kr = gram @ r_a
    d_a, d_ka, d_b = r_a, kr, r_b
    square = _inner(r_a, kr) + _inner(r_b, r_b) / unit
    enough = square * rtol**2
    for _ in range(2 * p.shape[2] * (p.shape[1] + 1)):
        pu = p * (d_ka + d_b)
        hu = c * (pu - p * pu.sum(2, keepdim=True))
        q_a, q_b = d_a + hu, unit * hu.sum(1, keepdim=True)
        curve = _inner(d_ka, q_a) + _inner(d_b, q_b) / unit
        alpha = torch.where((curve > 0) & (square > enough), square / curve, 0.0)
        s_a, s_ka, s_b = s_a + alpha * d_a, s_ka + alpha * d_ka, s_b + alpha * d_b
        r_a, r_b = r_a - alpha * q_a, r_b - alpha * q_b
        kr = gram @ r_a
        before, square = square, _inner(r_a, kr) + _inner(r_b, r_b) / unit
        if (square <= enough).all():
            break
        beta = torch.where(before > 0, square / before, 0.0)
        d_a, d_ka, d_b = r_a + beta * d_a, kr + beta * d_ka, r_b + beta * d_b
    return s_a, s_ka, s_b


def logistic_scores(products: Products, way: int, c: float) -> Tensor:
    """Logits ``[e, M, W]`` of the queries after a fit on the shots."""
    # the free intercept makes the origin arbitrary: at the shots' mean the problem is best conditioned
    centred = products.double().centred()
    try:
        a, b = fit_dual(centred.ss, way, c)
    except DataError:
        # shots in fewer dimensions than there are shots: rounding leaves directions of less than no length, which a
        # length beyond rounding mends
        own = 1e-6 * centred.ss.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30).view(-1, 1, 1)
        a, b = fit_dual(centred.ss + own * torch.eye(centred.ss.shape[1], dtype=torch.float64), way, c)
    return centred.qs @ a + b


def logistic_episodes(
    features: Features,
    way: int = 5,
    shot: int = 1,
    queries: int = 15,
    episodes: int = 1000,
    seed: int = 0,
    c: float = 1.0,
    **options: Unpack[EpisodeOptions],
) -> EpisodeResult:
    """Accuracy over random episodes of multinomial logistic regression fitted on each episode's shots.

    As ``sklearn.linear_model.LogisticRegression(C=c)`` at its minimum (with 2 ways: at C=2c, since scikit-learn then
    penalises one weight vector, not two). ``l2=True`` and c = 1 is the classifier of "Rethinking few-shot image
    classification" (arXiv:2003.11539, section 3.3). Other arguments and errors as :func:`prototype_episodes`;
    ConfigError unless c > 0. Nothing is chosen on the queries: c is the caller's.
    """
    if not 0 < c < float("inf"):
        raise ConfigError(f"C must be a positive number, got {c}")
    if way < 2:
        raise ConfigError(f"logistic regression needs at least 2 ways, got {way}")
    return run_episodes(
        features,
        lambda products: logistic_scores(products, way, c),
        *(way, shot, queries, episodes, seed),
        any_origin=True,
        **options,
    )
