"""Training with labels: it learns what can be learned, the same for a seed, and stops where it is asked to."""

import numpy as np
import pytest
import torch

from vjepa_fast.errors import TrainingError
from vjepa_fast.models import build_encoder
from vjepa_fast.study.instrument.supervised import Schedule, train_with_labels

SCHEDULE = Schedule(steps=30, batch=16, lr=3e-3, keep=0.5, zoom=0.9)


def encoder():
    torch.manual_seed(0)
    size = {"embed_dim": 24, "depth": 2, "num_heads": 2, "levels": 2}
    return build_encoder(img_size=32, patch_size=8, num_frames=4, tubelet_size=2, **size)


def clips(n=64):
    """Dark or bright, red or blue: two factors, four classes."""
    rng = np.random.default_rng(0)
    factors = np.stack([np.arange(n) % 2, np.arange(n) // 2 % 2], 1)
    pixels = rng.integers(0, 40, (n, 3, 4, 32, 32))
    pixels += (60 + 120 * factors[:, 0])[:, None, None, None, None]
    pixels[np.arange(n), 2 * factors[:, 1]] += 30
    return torch.from_numpy(pixels.astype(np.uint8)), factors


def test_it_learns_factors_and_classes_and_repeats_itself():
    x, factors = clips()
    for labels in (factors, 7 * (2 * factors[:, 0] + factors[:, 1])):  # any integers
        trained, losses = encoder(), []
        add = losses.append
        train_with_labels(trained, x, labels, SCHEDULE, seed=3, on_step=lambda *at, add=add: add(at))
        assert [step for step, _ in losses] == list(range(1, 31)) and not trained.training
        assert np.mean([loss for _, loss in losses[-5:]]) < 0.75 * losses[0][1]
    again = encoder()
    train_with_labels(again, x, labels, SCHEDULE, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), again.parameters()))


def test_a_snapshot_is_the_encoder_of_that_step():
    x, factors = clips()
    after: dict[int, torch.Tensor] = {}
    trained = encoder()
    weight = trained.norms_block[-1].weight
    copied = train_with_labels(
        trained, x, factors, SCHEDULE, snapshot=5, on_step=lambda step, _: after.update({step: weight.detach().clone()})
    )
    assert torch.equal(copied.norms_block[-1].weight, after[5]) and not torch.equal(after[5], after[30])
    assert train_with_labels(encoder(), x, factors, SCHEDULE) is None


def test_a_loss_that_is_not_finite_is_an_error():
    x, factors = clips()
    broken = encoder()
    with torch.no_grad():
        broken.norms_block[-1].weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match="step 1; lower its lr"):
        train_with_labels(broken, x, factors, SCHEDULE)
