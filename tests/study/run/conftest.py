import os

import pytest

from tests.study.run import tiny


@pytest.fixture(scope="session", autouse=True)
def _one_place_for_all_test_processes(tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    tiny.place = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
