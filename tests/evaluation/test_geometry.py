import pytest
import torch

from vjepa_fast.ops.geometry import feature_std, mean_cosine, rankme


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
    for f in (rankme, feature_std, mean_cosine):
        assert f(x).dtype == torch.float32 and not f(x).requires_grad


def test_empty_and_single_rows_are_refused():
    with pytest.raises(ValueError, match="not empty"):
        rankme(torch.zeros(0, 4))
    with pytest.raises(ValueError, match="two rows"):
        mean_cosine(torch.ones(1, 4))
