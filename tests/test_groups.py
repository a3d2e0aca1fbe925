"""Which tests `make test` runs in one process (conftest.py)."""

import pytest


@pytest.fixture(scope="module")
def made():
    return object()


def test_those_that_share_a_fixture_of_their_file(made, request):
    mark = request.node.get_closest_marker("xdist_group")
    assert mark is not None and mark.args == ("tests/test_groups.py",)


def test_and_no_others(tiny_suites, tmp_path, request):
    assert request.node.get_closest_marker("xdist_group") is None
