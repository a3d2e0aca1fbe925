"""Processes that begin agree on a prefix of their own, whatever those before them left in the store."""

import threading
import time

import pytest
import torch.distributed as dist

from vjepa_fast.trainer.meeting import PLACE, meet


def together(place, ranks, world, delays=None, timeout=20.0):
    """What each of ``ranks`` got, begun after ``delays`` (rank: seconds)."""
    found = {}

    def come(rank):
        time.sleep((delays or {}).get(rank, 0.0))
        try:
            found[rank] = meet(place, rank, world, timeout)
        except dist.DistStoreError as error:
            found[rank] = error

    threads = [threading.Thread(target=come, args=(rank,)) for rank in ranks]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return found


@pytest.mark.parametrize("late", [0, 1, 2])
def test_all_have_one_prefix_and_each_time_another(late):
    place, before = dist.HashStore(), set()
    for _ in range(3):
        (prefix,) = set(together(place, range(3), 3, {late: 0.2}).values())
        assert isinstance(prefix, str) and prefix not in before
        before.add(prefix)


def test_a_restart_of_fewer_or_more():
    place = dist.HashStore()
    found = [set(together(place, range(world), world).values()) for world in (4, 2, 3)]
    assert [len(x) for x in found] == [1, 1, 1] and len(set.union(*found)) == 3


@pytest.mark.parametrize("alive", [(0,), (1,), (0, 1)])
def test_those_who_died_while_they_waited_are_forgotten(alive):
    place = dist.HashStore()
    dead = together(place, alive, 3, timeout=0.2)
    assert all("not all of 3 processes came" in str(error) for error in dead.values())
    assert len(set(together(place, range(3), 3, {0: 0.1, 1: 0.2}).values())) == 1


def test_nobody_goes_on_with_the_dead():
    """The first to come back finds complete names and a list that held, all of the dead."""
    place = dist.HashStore()
    together(place, range(2), 2)
    for rank in (0, 1):
        (error,) = together(place, [rank], 2, timeout=0.3).values()
        assert isinstance(error, dist.DistStoreError)
    assert dist.PrefixStore(PLACE, place).check(["held"])
