"""The tests' browser: one that hangs, or whose helpers keep its output open, stops nothing."""

import subprocess
import time

import pytest

from tests import browser
from vjepa_fast import locks


def program(tmp_path, monkeypatch, body):
    path = tmp_path / "browser"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    monkeypatch.setattr(browser, "PROGRAM", str(path))
    browser.fault.cache_clear()


@pytest.fixture(autouse=True)
def _forget():
    yield
    browser.fault.cache_clear()


def test_one_that_hangs_is_ended_with_its_helpers(tmp_path, monkeypatch):
    program(tmp_path, monkeypatch, f"sleep 300 & echo $! > '{tmp_path}/helper'; sleep 300")
    began = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired):
        browser.browse("file:///page", folder=tmp_path, seconds=10)
    assert time.monotonic() - began < 60
    helper = int((tmp_path / "helper").read_text())
    deadline = time.monotonic() + 30
    while locks.alive(helper):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_what_a_browser_says_is_read_though_a_helper_lives_on(tmp_path, monkeypatch):
    program(tmp_path, monkeypatch, "sleep 300 & echo shown; echo noted >&2")
    began = time.monotonic()
    assert browser.browse("file:///page", folder=tmp_path) == ("shown\n", "noted\n")
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("body", ["exit 3", "echo '<body></body>'"])
def test_one_that_shows_nothing_is_not_asked_for_more(tmp_path, monkeypatch, body):
    program(tmp_path, monkeypatch, body)
    assert "does not open a page of one line" in browser.fault()
    with pytest.raises(pytest.skip.Exception, match="does not open a page of one line"):
        browser.needed()
