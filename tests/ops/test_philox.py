"""Philox against the known answers of Random123 (Salmon et al. 2011)."""

import pytest
import torch

from vjepa_fast.ops import _philox as philox

ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), ANSWERS)
def test_known_answers(counter, key, answer):
    got = philox.philox4x32(tuple(torch.tensor([word]) for word in counter), key)
    assert tuple(int(word) for word in got) == answer
    assert philox.philox4x32(counter, key) == answer  # plain ints


def test_counters_broadcast():
    got = philox.words(3, 4, torch.arange(5)[:, None], torch.arange(7)[None, :])
    assert all(word.shape == (5, 7) for word in got)
    assert [int(word[4, 6]) for word in got] == list(philox.words(3, 4, 4, 6))


def test_counter_layout():
    seed, step, sample = (7 << 32) | 5, 9, (3 << 32) | 11
    got = philox.words(seed, step, torch.tensor([sample]), torch.tensor([13]))
    want = philox.philox4x32(tuple(torch.tensor([word]) for word in (11, 3, 9, 13)), (5, 7))
    assert [int(word) for word in got] == [int(word) for word in want]


def test_step_outside_the_counter_is_refused():
    with pytest.raises(ValueError, match="step"):
        philox.words(0, 1 << 32, torch.tensor([0]), torch.tensor([0]))
