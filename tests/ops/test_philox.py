"""Philox against the known answers of Random123 (Salmon et al. 2011), and the counters that masks are drawn by."""

import numpy as np
import pytest
import torch

from tests.ops.mask_cases import GRID, M8, philox_by_hand
from tests.ops.parity import BACKENDS, device_for
from vjepa_fast import ops
from vjepa_fast.errors import ConfigError
from vjepa_fast.ops import BlockSpec, sample_block_masks
from vjepa_fast.ops import _philox as philox
from vjepa_fast.ops import block_masks as module

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


@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_follow_the_documented_counters(backend):
    """What a kernel has to reproduce bit for bit, recomputed with plain integers."""
    grid, step, first, spec = (4, 6, 5), 17, (1 << 32) + 2, BlockSpec(num_blocks=3, temporal_scale=(0.3, 0.9))
    seed = (5 << 32) | 7
    u = [word / 2**32 for word in philox_by_hand((0, 0, step, 1 << 20), (7, 5))[:3]]
    size = module.block_size(grid, spec, *u)
    contexts, words = [], []
    for b in range(2):
        key = ((first + b) & 0xFFFFFFFF, (first + b) >> 32, step)
        context = np.ones(grid, bool)
        for block in range(3):
            draw = philox_by_hand((*key, 1 << 28 | 1 << 20 | block), (7, 5))
            at = [word * (extent - length + 1) >> 32 for word, extent, length in zip(draw, grid, size)]
            context[tuple(slice(o, o + length) for o, length in zip(at, size))] = False
        contexts.append(np.flatnonzero(context))
        words.append([w for i in range(30) for w in philox_by_hand((*key, 2 << 28 | 1 << 20 | i), (7, 5))])
    length = min(map(len, contexts))
    keys = dict(seed=seed, step=step, first_sample=first, truncate="random", device=device_for(backend))
    with ops.use_backend(backend):
        got = sample_block_masks(2, grid, [M8, spec], **keys).trim()[0][1]
    for b in range(2):
        want = sorted(sorted(contexts[b], key=lambda n: words[b][n])[:length])
        assert got[b].tolist() == want
    assert len({len(c) for c in contexts}) == 2  # so that something was cut


def test_the_counter_has_room_for_every_draw():
    assert module.MAX_REDRAWS < philox.MAX_ATTEMPTS
    with pytest.raises(ConfigError, match="from 1 to 256 masks"):
        sample_block_masks(1, GRID, [M8, M8], seed=0, step=0, first_spec=255)
