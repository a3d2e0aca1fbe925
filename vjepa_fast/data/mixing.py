"""Which sample comes when: a pure function of (seed, position), so resuming and sharding need no state."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from vjepa_fast.errors import ConfigError

_ROUND = 1000  # positions over which the shares are exact
_LONGEST_ROUND = 1_000_000


class MixedSampler:
    """Mixes several datasets by weight.

    Positions are dealt in rounds. In each round every dataset has its exact share of the positions, in random order,
    and draws its samples epoch by epoch in random order, each sample once per epoch of its dataset.

    Args:
        sizes: number of samples of each dataset.
        weights: relative shares, not negative; None: by size, so that all samples come equally often.
        seed: one integer or several.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float] | None, seed: int | Sequence[int]):
        self.sizes = tuple(int(n) for n in sizes)
        share = np.asarray(self.sizes if weights is None else weights, np.float64)
        if len(share) != len(self.sizes):
            raise ConfigError(f"data.datasets_weights: {len(share)} weights for {len(self.sizes)} datasets")
        if not (np.isfinite(share).all() and (share >= 0).all() and share.sum() > 0):
            raise ConfigError(f"data.datasets_weights: {list(share)} must not be negative and not all 0")
        self.shares = share / share.sum()
        self._key = (seed,) if isinstance(seed, int) else tuple(seed)
        smallest = self.shares[self.shares > 0].min()
        self._round = int(min(_LONGEST_ROUND, max(_ROUND, np.ceil(10 / smallest)))) if len(self.sizes) > 1 else 1
        self._quota = _largest_remainder(self.shares, self._round)
        self._orders: dict[tuple[int, int], np.ndarray] = {}
        self._deals: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._lock = threading.Lock()

    def __call__(self, position: int) -> tuple[int, int]:
        """(dataset, index) of the sample at a position 0, 1, ..."""
        turn, place = divmod(position, self._round)
        if len(self.sizes) == 1:
            dataset, number = 0, position
        else:
            with self._lock:
                if turn not in self._deals:
                    self._deals = {t: d for t, d in self._deals.items() if abs(t - turn) <= 1}
                    self._deals[turn] = self._deal(turn)
                datasets, ranks = self._deals[turn]
            dataset = int(datasets[place])
            number = turn * int(self._quota[dataset]) + int(ranks[place])
        epoch, index = divmod(number, self.sizes[dataset])
        return dataset, int(self._order(dataset, epoch)[index])

    def _deal(self, turn: int) -> tuple[np.ndarray, np.ndarray]:
        """Dataset of each place of a round, and how many of its samples came before in the round."""
        datasets = np.repeat(np.arange(len(self.sizes)), self._quota)
        datasets = np.random.default_rng([*self._key, 1, turn]).permutation(datasets)
        ranks = np.empty(len(datasets), np.int64)
        for k in range(len(self.sizes)):
            mine = datasets == k
            ranks[mine] = np.arange(mine.sum())
        return datasets, ranks

    def _order(self, dataset: int, epoch: int) -> np.ndarray:
        with self._lock:
            key = (dataset, epoch)
            if key not in self._orders:
                self._orders = {k: v for k, v in self._orders.items() if k[0] != dataset or abs(k[1] - epoch) <= 1}
                generator = np.random.default_rng([*self._key, 2, dataset, epoch])
                self._orders[key] = generator.permutation(self.sizes[dataset])
            return self._orders[key]

    def replacement(self, position: int, attempt: int, dataset: int) -> int:
        """Index that stands in for an unreadable sample, at the first, second, ... attempt."""
        return int(np.random.default_rng([*self._key, 3, position, attempt]).integers(self.sizes[dataset]))


def _largest_remainder(shares: np.ndarray, total: int) -> np.ndarray:
    exact = shares * total
    quota = np.floor(exact).astype(np.int64)
    short = total - int(quota.sum())
    quota[np.argsort(-(exact - quota), kind="stable")[:short]] += 1
    return quota
