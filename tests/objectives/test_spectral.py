"""spectral by hand: a pure tone has one line in its spectrum."""

import math

import pytest
import torch

from tests.objectives.tiny import tiny_state, value_of
from vjepa_fast.objectives.terms.spectral import weighted_dft


def tone(frequency, steps=4):
    return [math.cos(2 * math.pi * frequency * t / steps) for t in range(steps)]


@pytest.mark.parametrize(
    ("frequency", "modulus", "weight"),
    [(0, 4, 0.1), (1, 2, 0.55), (2, 4, 1.0)],  # a = linspace(0.1, 1, 3); rfft of a cosine: T/2, of a constant: T
)
def test_one_tone(frequency, modulus, weight):
    # grid 4 x 1 x 2: place 0 seen throughout, place 1 not at t=3 and so left out
    enc = [0, 1, 2, 3, 4, 5, 6]
    wave = tone(frequency)
    z = [[wave[n // 2], 0] if n % 2 == 0 else [99, 99] for n in enc]
    state = tiny_state((4, 1, 2), z=z, h=[[0, 0]] * 8, enc=enc)
    value, _, out = value_of("spectral", {}, state)
    assert value == pytest.approx(weight * modulus / 3 / 2)  # mean over 3 frequencies and 2 channels
    out.total.backward()
    grad = state.z[0][0].grad[0]
    assert grad[::2].any() and not grad[1::2].any()


def test_agreement_is_free_and_short_clips_are_left_out():
    h = [[float(n), float(n * n)] for n in range(8)]
    assert value_of("spectral", {}, tiny_state((4, 1, 2), z=h, h=h, enc=list(range(8))))[0] == 0
    short = tiny_state((3, 1, 2), z=[[5, 5]] * 6, h=h[:6], enc=list(range(6)))
    assert value_of("spectral", {}, short)[0] == 0


def test_fewer_tokens_than_time_steps():
    state = tiny_state((4, 1, 2), z=[[5, 5]] * 3, h=[[0, 0]] * 8, enc=[0, 2, 4])
    value, _, out = value_of("spectral", {}, state)
    out.total.backward()
    assert value == 0 and not state.z[0][0].grad.any()


def test_spectrum_is_that_of_the_fft():
    x = torch.randn(3, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for steps in (4, 5, 7):
        want = torch.fft.rfft(x[:, :steps], dim=1)
        want = want * torch.linspace(0.1, 1, want.shape[1], dtype=x.dtype) / want.shape[1]
        got = x[:, :steps] @ weighted_dft(steps, x).T
        torch.testing.assert_close(got, torch.cat([want.real, want.imag], 1), rtol=1e-12, atol=1e-13)
