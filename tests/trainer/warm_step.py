"""A step whose kernels were built ahead, through Triton's own launcher: counts what it still has to compile.

    python tests/trainer/warm_step.py          # without TRITON_INTERPRET; a line of JSON

As tests/kernels/launches.py: CPU tensors, a driver that stops short of the GPU, results that are never written.
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import torch
import triton
from triton import knobs

from tests.kernels import launches
from tests.trainer.conftest import config
from vjepa_fast.ops import _triton
from vjepa_fast.trainer import warm
from vjepa_fast.trainer.prefetch import Staged
from vjepa_fast.trainer.step import TrainStep


def small():
    return config(objectives={"pred": {}, "fwm_static": {}}, runtime={"capacity_quantum": 16})


def main() -> None:
    compiled, found = [], []

    def listen(*, src, cache_hit, **_):
        (found if cache_hit else compiled).append(src.name)

    triton.runtime.driver.set_active(launches.Driver())
    knobs.compilation.listener = listen
    step, groups = TrainStep(small()), warm._groups(small())
    drawn = [step._sampler(g).draw(g.clip, **step._keys(g, n, 0)) for n, g in enumerate(groups)]
    sides = drawn[0].wait(None)
    with _triton.anywhere():
        step(Staged(groups, 0, [SimpleNamespace(wait=lambda quantum: sides, masks=drawn[0].masks)]), 0)
    print(json.dumps({"found": found, "compiled": compiled}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
