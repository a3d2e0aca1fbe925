"""Metrics are tested on the tiny run of the trainer, in one thread."""

from ..trainer.conftest import one_thread  # noqa: F401
