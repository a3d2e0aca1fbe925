"""The cases that tests of ops are cut down to where Triton is interpreted."""

import itertools

import pytest

from tests.ops.parity import DEVICE, crossed, pairwise


def test_every_two_values_meet_in_few_cases():
    axes = ("ab", (1, 2, 3), (None, 0.5), "wxyz")
    found = pairwise(*axes)
    for i, j in itertools.combinations(range(len(axes)), 2):
        assert {(case[i], case[j]) for case in found} == set(itertools.product(axes[i], axes[j]))
    assert len(set(found)) == len(found) <= 14 < 48


def test_other_backends_have_all_cases():
    cases = crossed(["eager", pytest.param("triton", marks=pytest.mark.skipif(False, reason="-"))], "abc", "xy", "pq")
    counts = [sum(case.values[0] == name for case in cases) for name in ("eager", "triton")]
    assert counts[0] == 12 and (counts[1] == 12 or DEVICE == "cpu" and counts[1] < 9)
    assert all(case.marks for case in cases if case.values[0] == "triton")
