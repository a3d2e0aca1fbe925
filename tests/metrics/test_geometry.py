import math

import pytest
import torch

from vjepa_fast.metrics.geometry import alpha_req, feature_std, fit_range, lidar, mean_cosine, rankme, spectra


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_spectrum(eigenvalues, n, seed=0):
    """Centred features [n, d] whose covariance has these eigenvalues (times a constant)."""
    basis = torch.linalg.qr((x := gaussian(n, len(eigenvalues), seed=seed)) - x.mean(0))[0]
    turn = torch.linalg.qr(gaussian(len(eigenvalues), len(eigenvalues), seed=seed + 1))[0]
    return basis * torch.as_tensor(eigenvalues).sqrt() @ turn


def test_rankme_of_equal_singular_values_is_their_number():
    q, _ = torch.linalg.qr(torch.randn(64, 12, generator=torch.Generator().manual_seed(0)))
    assert rankme(q * 7).item() == pytest.approx(12, rel=1e-4)


def test_rankme_hand_computed():
    p = torch.tensor([0.75, 0.25]) + 1e-7
    expected = torch.exp(-(p * p.log()).sum()).item()
    assert rankme(torch.tensor([[3.0, 0.0], [0.0, 1.0]])).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("x", [torch.ones(50, 8), torch.zeros(50, 8)])
def test_rankme_of_collapsed_features_is_one(x):
    assert rankme(x).item() == pytest.approx(1.0, abs=1e-3)


def test_feature_std_and_leading_axes():
    x = torch.tensor([[0.0, 5.0], [2.0, 5.0]])
    assert feature_std(x).item() == pytest.approx(0.5)
    assert feature_std(x.reshape(1, 2, 2)).item() == pytest.approx(0.5)


def test_mean_cosine_equals_the_loop():
    x = torch.randn(9, 5, generator=torch.Generator().manual_seed(1))
    pairs = [torch.nn.functional.cosine_similarity(x[i], x[j], dim=0) for i in range(9) for j in range(9) if i != j]
    assert mean_cosine(x).item() == pytest.approx(torch.stack(pairs).mean().item(), abs=1e-6)


def test_half_precision_in_float32_out_and_no_gradient():
    x = torch.randn(10, 4, dtype=torch.bfloat16, requires_grad=True)
    for f in (rankme, feature_std, mean_cosine, alpha_req, lambda x: lidar(x.unflatten(0, (5, 2)))):
        assert f(x).dtype == torch.float32 and not f(x).requires_grad


def test_empty_and_single_rows_are_refused():
    with pytest.raises(ValueError, match="not empty"):
        rankme(torch.zeros(0, 4))
    with pytest.raises(ValueError, match="two rows"):
        mean_cosine(torch.ones(1, 4))
    for shape in ((5, 4), (1, 3, 4), (5, 1, 4), (5, 3, 0)):
        with pytest.raises(ValueError, match="two or more clips and views"):
            lidar(torch.ones(shape))


def test_isotropic_and_rank_r_gaussians():
    assert rankme(gaussian(20000, 16)).item() == pytest.approx(16, rel=1e-2)
    for r in (1, 3, 8):
        q = torch.linalg.qr(gaussian(64, r, seed=r))[0]
        assert rankme(gaussian(2000, r, seed=r) @ q.mT).item() == pytest.approx(r, rel=2e-2)


@pytest.mark.parametrize("alpha", [0.3, 1.0, 2.5])
@pytest.mark.parametrize(("n", "d"), [(400, 150), (60, 24), (40, 8)])
def test_alpha_of_a_power_law_is_its_exponent(alpha, n, d):
    x = with_spectrum(torch.arange(1, d + 1).pow(-alpha), n)
    assert alpha_req(x).item() == pytest.approx(alpha, abs=1e-3)
    assert alpha_req(x * 30 + 5).item() == pytest.approx(alpha, abs=5e-3)  # of the covariance: offset and scale are out


def test_alpha_is_the_weighted_slope_over_its_range():
    d, n = 12, 50
    values = torch.rand(d, generator=torch.Generator().manual_seed(3)).sort(descending=True).values + 0.1
    first, last = fit_range(n, d)
    assert (first, last) == (2, 11)
    i = torch.arange(first, last + 1).double()
    x, y, w = i.log(), values[first - 1 : last].double().log(), 1 / i
    x = x - (w * x).sum() / w.sum()
    expected = -(w * x * y).sum() / (w * x * x).sum()
    assert alpha_req(with_spectrum(values, n)).item() == pytest.approx(expected.item(), abs=1e-4)
    outside = values.clone()
    outside[0], outside[-1] = 100.0, 1e-3
    assert alpha_req(with_spectrum(outside, n)).item() == pytest.approx(expected.item(), abs=1e-3)


def test_fit_range():
    assert fit_range(2000, 768) == fit_range(112, 768) == (11, 100)
    assert fit_range(256, 40) == (5, 36) and fit_range(41, 768) == (5, 36) and fit_range(10, 3) == (1, 3)


@pytest.mark.parametrize(
    "x", [torch.ones(50, 8), torch.zeros(50, 8), gaussian(50, 3) @ gaussian(3, 30), gaussian(3, 9), gaussian(40, 2)]
)
def test_alpha_of_no_power_law_is_nan(x):
    assert math.isnan(alpha_req(x)) and math.isnan(spectra([x])["alpha_req"])


def views_of(between, within, n=40000, q=8, seed=0):
    """[n, q, d] with the given variances per direction, turned: clips between, views of a clip within."""
    d = len(between)
    turn = torch.linalg.qr(gaussian(d, d, seed=9))[0]
    clip = gaussian(n, 1, d, seed=seed) * torch.tensor(between).sqrt()
    return (clip + gaussian(n, q, d, seed=seed + 1) * torch.tensor(within).sqrt()) @ turn


def test_lidar_weighs_between_by_within():
    """Expected ratios: Sb gains within / q from the means of q views, Sw loses it."""
    between, within, q = [6.0, 2.0, 2.0, 0.5], [3.0, 0.5, 1.0, 1.0], 8
    x = views_of(between, within, q=q)
    ratios = torch.tensor([(b + w / q) / (w * (q - 1) / q) for b, w in zip(between, within)])
    p = ratios / ratios.sum()
    assert lidar(x).item() == pytest.approx(torch.exp(-(p * p.log()).sum()).item(), rel=1e-2)
    # directions that only views spread in do not count, though RankMe sees them
    noise = views_of([1.0, 1.0, 0.0, 0.0], [0.01, 0.01, 100.0, 100.0])
    assert lidar(noise).item() == pytest.approx(2, rel=2e-2) and rankme(noise[:, 0]).item() > 2.3


def test_lidar_equals_the_formula_with_matrix_roots():
    x = gaussian(12, 3, 5).double()
    means = x.mean(1)
    b = (means - means.mean(0)).mT @ (means - means.mean(0)) / 12
    w = sum((x[i] - means[i]).mT @ (x[i] - means[i]) for i in range(12)) / 36 + 0.1 * torch.eye(5)
    values, vectors = torch.linalg.eigh(w)
    root = vectors @ torch.diag(values.rsqrt()) @ vectors.mT
    p = torch.linalg.eigvalsh(root @ b @ root)
    p = p / p.sum() + 1e-7
    assert lidar(x, delta=0.1).item() == pytest.approx(torch.exp(-(p * p.log()).sum()).item(), rel=1e-6)
    assert lidar(x).item() != pytest.approx(lidar(x, delta=0.1).item(), rel=1e-4)


def test_collapsed_features():
    x = torch.full((30, 6, 10), 3.0)
    assert lidar(x).item() == pytest.approx(1, abs=1e-3) and rankme(x).item() == pytest.approx(1, abs=1e-3)
    assert feature_std(x).item() == 0 and mean_cosine(x).item() == pytest.approx(1, abs=1e-5)
    # one direction left
    line = gaussian(30, 6, 1) @ gaussian(1, 10)
    assert lidar(line).item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_not_finite_gives_nan_and_no_error(bad):
    x = gaussian(8, 4, 6)
    x[3, 2, 1] = bad
    for f in (rankme, alpha_req, lidar, feature_std, mean_cosine):
        assert math.isnan(f(x)), f.__name__
    assert all(v.isnan().all() for v in spectra([x]).values())


def test_spectra_are_the_single_figures():
    power = with_spectrum(torch.arange(1, 31).pow(-2.0), 80)
    parts = [gaussian(80, 30) + 2, gaussian(80, 200), power, gaussian(80, 3) @ gaussian(3, 50)]
    found = spectra(parts)
    for i, x in enumerate(parts):
        assert found["rankme"][i].item() == pytest.approx(rankme(x).item(), rel=1e-3)
        assert found["alpha_req"][i].item() == pytest.approx(alpha_req(x).item(), rel=1e-3, nan_ok=True)
    assert found["alpha_req"].isnan().tolist() == [False, False, False, True]
