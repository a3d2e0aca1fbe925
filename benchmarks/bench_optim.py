"""The end of a step: norm and clipping of gradients, AdamW, moving average; as published, in torch's kernels, in ours.

    python benchmarks/bench_optim.py --model vit_tiny [--device cuda] [--bf16-target] [--clip 1.0] [--json PATH]

``reference``: torch.optim.AdamW and a loop over parameters for the average, as published. ``eager``: torch fused AdamW
and one lerp over all. ``fused``: `trainer.optim.update`.
"""

from __future__ import annotations

import argparse
import copy
import pathlib
import sys
from collections.abc import Callable

import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from vjepa_fast import models, ops  # noqa: E402
from vjepa_fast.bench import results, timing  # noqa: E402
from vjepa_fast.config.schema import OptimizationConfig  # noqa: E402
from vjepa_fast.trainer import optim  # noqa: E402

MOMENTUM = 0.99925


def ready(model: str, device: torch.device, bf16_target: bool):
    """Encoder and predictor with gradients, the average, and the optimiser."""
    torch.manual_seed(0)
    encoder = models.build_encoder(model).to(device)
    predictor = models.build_predictor(encoder).to(device)
    target = copy.deepcopy(encoder).requires_grad_(False)
    low = models.LowCopy(target, torch.bfloat16) if bf16_target else None
    modules = {"encoder": encoder, "predictor": predictor}
    for module in modules.values():
        for p in module.parameters():
            p.grad = torch.randn_like(p) if p.requires_grad else None
    return modules, optim.Average(encoder, target, low), optim.build_optimizer(modules, OptimizationConfig(), device)


def published(model: str, device: torch.device, bf16_target: bool, clip: float | None):
    modules, average, _ = ready(model, device, bf16_target)
    optimizer = torch.optim.AdamW(optim.parameter_groups(modules, 0.04), lr=6e-4)
    params = optim.parameters(optimizer)

    @torch.no_grad()
    def step():
        norm = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
        if clip is not None:
            torch.nn.utils.clip_grads_with_norm_(params, clip, norm)
        optimizer.step()
        for source, target in average.pairs.items():
            target.mul_(MOMENTUM).add_(source.detach(), alpha=1.0 - MOMENTUM)
        if average.low is not None:
            average.low.refresh()

    return step


def ours(model: str, device: torch.device, bf16_target: bool, clip: float | None, backend: str):
    """The step, and the bytes that it moves at least."""
    _, average, optimizer = ready(model, device, bf16_target)
    params = optim.parameters(optimizer)

    def step():
        with ops.use_backend(backend):
            optim.update(optimizer, average, MOMENTUM, optim.gradient_norm(params), clip)

    return step, sum((32 + 8 * (p in average.pairs)) * p.numel() for p in params)  # and 4 for the norm


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="vit_tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16-target", action="store_true", help="also keep a bfloat16 copy of the target")
    parser.add_argument("--clip", type=float)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", metavar="PATH")
    args = parser.parse_args()
    device, given = torch.device(args.device), (args.model, torch.device(args.device), args.bf16_target, args.clip)
    fused, moved = ours(*given, "auto")
    fns: dict[str, Callable[[], object]] = {
        "reference": published(*given),
        "eager": ours(*given, "eager")[0],
        "fused": fused,
    }
    rows = [
        results.row(
            ms,
            moved,
            op="optimiser",
            shape=args.model,
            dtype="float32",
            provider=name,
            mode="step",
            peak_bytes=None,
            **results.describe(device),
        )
        for name, ms in timing.times(fns, device, args.repeats, 30.0).items()
    ]
    print(results.table(rows))
    if args.json:
        results.write(args.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
