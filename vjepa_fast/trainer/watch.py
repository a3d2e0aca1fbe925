"""``monitor.probe``: what the frozen target encoder is worth so far, read every so many steps, beside the training.

A probe has an encoder of its own, so nothing that a step made (compiled code, CUDA graphs, casted weights) is touched,
and the random generators are as before when it is done: with it and without it a run makes the same steps, bit for bit.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from vjepa_fast.config.schema import Config
from vjepa_fast.errors import ConfigError
from vjepa_fast.trainer import checkpoint
from vjepa_fast.trainer.distributed import Distributed
from vjepa_fast.trainer.metrics import Metrics

Probe: TypeAlias = Callable[[nn.Module], Mapping[str, float]]  # figures of an encoder by name
MakeProbe: TypeAlias = Callable[[Config, torch.device], Probe]  # by a configuration, which it may refuse


class Models(Protocol):
    """What a step has."""

    @property
    def encoder(self) -> nn.Module:
        """The student."""
        ...

    @property
    def target_encoder(self) -> nn.Module:
        """Its target."""
        ...


class Watch:
    """Calls the probe at the steps that ``cfg.monitor`` names, in the first process.

    Raises:
        UserError: ``monitor.probe`` asks for one and ``make`` is None, or refuses; every process raises.
    """

    def __init__(self, cfg: Config, make: MakeProbe | None, world: Distributed, device: torch.device):
        self.every, self.device = cfg.monitor.every, device
        self.student = cfg.target.mode == "frozen"
        self.probe: Probe | None = None
        if cfg.monitor.probe is None:
            return
        error = None
        if make is None:
            error = ConfigError(
                "monitor.probe: this program passes no probe to the trainer; use `vjepa-fast train`, "
                "train(cfg, probe=vjepa_fast.evaluation.quick_probe), or set monitor.probe=null"
            )
        elif world.main:
            try:
                with random_states_kept(device):
                    self.probe = make(cfg, device)
            except Exception as e:
                error = e
        world.agree(error)

    def __call__(self, models: Models, done: int, metrics: Metrics) -> dict[str, Tensor]:
        """Figures of the encoder that is trained after ``done`` steps; none where it is not their time. The rates of
        ``metrics`` leave the time out that this takes.
        """
        if self.probe is None or done % self.every:
            return {}
        began = time.perf_counter()
        encoder = models.encoder if self.student else models.target_encoder
        with random_states_kept(self.device):
            found = {name: torch.tensor(value, device=self.device) for name, value in self.probe(encoder).items()}
        metrics.since += time.perf_counter() - began
        return found


@contextmanager
def random_states_kept(device: torch.device) -> Generator[None]:
    """The generators of torch (and of the device), NumPy and Python are afterwards as they were before."""
    torchs, numpys, pythons = checkpoint.rng_state(device), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        checkpoint.set_rng_state(torchs, device)
        np.random.set_state(numpys)
        random.setstate(pythons)
