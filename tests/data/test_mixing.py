"""The sampler is a pure function with exact shares and whole epochs."""

import numpy as np
import pytest

from vjepa_fast.data.mixing import MixedSampler
from vjepa_fast.errors import ConfigError


def test_pure_function_of_seed_and_position():
    one, two = MixedSampler([50, 7, 900], [0.2, 0.6, 0.2], 3), MixedSampler([50, 7, 900], [0.2, 0.6, 0.2], 3)
    places = [0, 5, 123456, 999, 1000, 1, 0, 5]
    assert [one(p) for p in places] == [two(p) for p in reversed(places)][::-1]
    assert one(5) == one(5)
    assert [one(p) for p in range(50)] != [MixedSampler([50, 7, 900], [0.2, 0.6, 0.2], 4)(p) for p in range(50)]


def test_shares_are_exact_and_mixed_throughout():
    sampler = MixedSampler([50, 7, 900], [0.2, 0.6, 0.2], 0)
    drawn = np.array([sampler(p)[0] for p in range(3000)])
    assert np.bincount(drawn).tolist() == [600, 1800, 600]
    assert all(abs((part == 1).mean() - 0.6) < 0.2 for part in drawn.reshape(-1, 100))


@pytest.mark.parametrize(("sizes", "weights"), [([23], None), ([23, 400], [0.5, 0.5]), ([23, 60], None)])
def test_every_sample_once_per_epoch_of_its_dataset(sizes, weights):
    sampler = MixedSampler(sizes, weights, 1)
    picks = [i for d, i in map(sampler, range(4000)) if d == 0]
    epochs = [picks[k * 23 : (k + 1) * 23] for k in range(len(picks) // 23)]
    assert len(epochs) > 10 and all(sorted(e) == list(range(23)) for e in epochs)
    assert epochs[0] != epochs[1]


def test_default_weights_are_sizes_and_zero_means_never():
    by_size = MixedSampler([10, 30], None, 0)
    assert np.mean([by_size(p)[0] for p in range(1000)]) == 0.75
    never = MixedSampler([10, 30], [1.0, 0.0], 0)
    assert {never(p)[0] for p in range(1000)} == {0}
    rare = MixedSampler([9000, 3], None, 0)
    assert sum(rare(p)[0] for p in range(rare._round)) >= 9  # a tiny dataset is not rounded away


def test_wrong_weights():
    for weights in ([1.0], [1.0, -0.5], [0.0, 0.0], [float("nan"), 1.0]):
        with pytest.raises(ConfigError, match="data.datasets_weights"):
            MixedSampler([3, 4], weights, 0)


def test_proportions_over_many_draws_whatever_the_sizes():
    weights = [0.05, 0.15, 0.5, 0.3]
    sampler = MixedSampler([13_320, 101, 168_913, 240], weights, 7)
    drawn = np.bincount([sampler(p)[0] for p in range(100_000)], minlength=4) / 100_000
    assert np.abs(drawn - weights).max() < 0.005


def test_no_sample_is_on_two_ranks_within_an_epoch_of_its_dataset():
    sizes, world, batch = [60, 25], 3, 4
    ranks: dict[tuple[int, int, int], set[int]] = {}
    counts = [0, 0]
    sampler = MixedSampler(sizes, [0.5, 0.5], 2)
    for position in range(50 * world * batch):
        dataset, index = sampler(position)
        epoch = counts[dataset] // sizes[dataset]
        counts[dataset] += 1
        ranks.setdefault((dataset, epoch, index), set()).add(position % (world * batch) // batch)
    assert {len(found) for found in ranks.values()} == {1}
