"""Attention of the published step: our kernels against every other backend, and against themselves with other tiles.

    python benchmarks/bench_attention.py --json attention.json    # batch 64, bfloat16, every backend
    python benchmarks/bench_attention.py --tune --shapes target   # tiles of each pass by time, the quickest first

Shapes: ``target``, clips of 1568 tokens (12 heads of 64); ``context``, the context tokens of two masks of all clips as
one stream with filler (12 of 64); ``predictor``, context and predicted tokens (12 of 32). Rotary positions are part of
it. ``full`` is forward and backward. Results are compared with the first backend's; a backend that refuses a shape or
fails has a row with the reason. The tiles in kernels/packed_attention.py are chosen by registers, not by time.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.ops._inputs import GRID, SPECS  # noqa: E402
from vjepa_fast import ops  # noqa: E402
from vjepa_fast.bench import errors, results, timing  # noqa: E402
from vjepa_fast.layers.attention import BACKENDS, Backend, Call, DeviceSegments, attend  # noqa: E402
from vjepa_fast.models.rope import rope_table  # noqa: E402

HEADS = 12
CANDIDATES = tuple(itertools.product((32, 64, 128), (32, 64, 128), (4, 8), (2, 3, 4)))  # queries, keys, warps, stages


@dataclass
class Shape:
    """One attention of a step: qkv [B,K,3*E] and its table; ``lengths`` of a stream's segments, None: whole clips."""

    name: str
    qkv: Tensor
    table: Tensor
    lengths: list[int] | None
    backward: bool

    @property
    def flop(self) -> int:
        """Of a forward pass; a backward pass has 2.5 times as many."""
        b, k, e3 = self.qkv.shape
        squares = b * k * k if self.lengths is None else sum(n * n for n in self.lengths)
        return 4 * squares * e3 // 3

    @property
    def segments(self) -> DeviceSegments | None:
        """As a step of fixed capacity has them; the filler is a segment too."""
        if self.lengths is None:
            return None
        filler = self.qkv.shape[1] - sum(self.lengths)
        return DeviceSegments(torch.tensor([*self.lengths, filler], device=self.qkv.device), max(*self.lengths, filler))


def shapes(batch: int, device: torch.device, dtype: torch.dtype, grid: tuple[int, int, int]) -> Iterator[Shape]:
    """Those of the step; masks drawn as the published recipe draws them."""
    drawn = ops.sample_block_masks(batch, grid, SPECS, seed=0, step=3, truncate="none")
    enc, pred = ([n for mask in side for n in mask] for side in drawn.host_lengths(None))
    tokens = grid[0] * grid[1] * grid[2]
    generator = torch.Generator(device).manual_seed(0)

    def one(name: str, d: int, b: int, lengths: list[int] | None, backward: bool) -> Shape:
        k = tokens if lengths is None else -(-sum(lengths) // 256) * 256
        table = rope_table(grid, d, "v2.1", None, torch.float32, device, False)
        rows = torch.arange(k, device=device) % tokens
        qkv = torch.randn(b, k, 3 * HEADS * d, generator=generator, device=device).to(dtype)
        return Shape(name, qkv, table[rows].contiguous(), lengths, backward)

    yield one("target", 64, batch, None, False)
    yield one("context", 64, 1, enc, True)
    yield one("predictor", 32, 1, [a + b for a, b in zip(enc, pred)], True)


def functions(shape: Shape, backend: Backend, mode: str) -> Callable[[], list[Tensor]]:
    """What to time: the result, or with ``full`` the result and the gradient of qkv."""
    qkv, segments = shape.qkv.clone().requires_grad_(mode == "full"), shape.segments
    grad = torch.randn_like(qkv[..., : qkv.shape[-1] // 3])

    def run() -> list[Tensor]:
        with torch.set_grad_enabled(mode == "full"):
            out = attend(qkv, shape.table, HEADS, segments, backend)
        return [out, *torch.autograd.grad(out, qkv, grad)] if mode == "full" else [out]

    return run


def rows_of(shape: Shape, mode: str, repeats: int, budget_s: float) -> list[dict]:
    """A row for each backend."""
    x, failed = shape.qkv, {}
    call = Call(x.device, x.dtype, x.shape[-1] // (3 * HEADS), 2, on_device=shape.lengths is not None)
    fns: dict[str, Callable[[], object]] = {}
    want: list[Tensor] = []
    real = x.shape[1] if shape.lengths is None else sum(shape.lengths)
    for name in BACKENDS:
        if reasons := BACKENDS[name].refusals(call):
            failed[name] = "; ".join(reasons)
            continue
        try:
            torch.manual_seed(0)
            found = [part[:, :real] for part in functions(shape, BACKENDS[name], mode)()]
            want = want or found
            for a, b in zip(found, want):
                if not ((a - b).abs().max() <= 0.05 * b.abs().max()):
                    raise ArithmeticError(f"not the result of {next(iter(fns))}")
            fns[name] = functions(shape, BACKENDS[name], mode)
        except Exception as error:
            failed[name] = errors.error_text(error)
    taken = timing.times(fns, x.device, repeats, budget_s, failed=failed)
    what = {"op": "attention", "dtype": str(x.dtype).removeprefix("torch."), "mode": mode, "shape": shape.name}
    found_rows = []
    for name in BACKENDS:
        row = results.row(taken.get(name, []), None, error=failed.get(name), provider=name, **what)
        flop = shape.flop * (3.5 if mode == "full" else 1)
        row["tflops"] = None if row["median_ms"] is None else round(flop / row["median_ms"] / 1e9, 1)
        found_rows.append(row | results.describe(x.device))
    return found_rows


def tune(shape: Shape, repeats: int, budget_s: float) -> Iterator[tuple[str, list[tuple[float, object]]]]:
    """Name -> (milliseconds, choice) ascending: each pass's tiles, beside the quickest so far; then ``SHARE``."""
    from vjepa_fast.kernels import packed_attention as kernels

    x, table, segments = shape.qkv, shape.table, shape.segments
    b, k, e3 = x.shape
    if segments is None:
        offsets = torch.arange(b + 1, dtype=torch.int32, device=x.device) * k
    else:
        offsets = segments.offsets(1, x.device)
    out, lse = kernels.forward(x, table, offsets, HEADS)
    grad = torch.randn_like(out)
    key = kernels.key(kernels.architecture(), 8 * x.element_size(), e3 // (3 * HEADS))

    def sorted_by_time(
        choose: Callable[[Any], None], choices: Iterable[Any], backward: bool
    ) -> list[tuple[float, Any]]:
        def run() -> object:
            if backward:
                return kernels.backward(grad, x, table, offsets, HEADS, out, lse)
            return kernels.forward(x, table, offsets, HEADS)

        found = []
        for choice in choices:
            choose(choice)
            failed: dict[str, str] = {}  # tiles that take too much shared memory
            ms = timing.times({"": run}, x.device, repeats, budget_s, failed=failed)
            found += [] if failed else [(statistics.median(ms[""]), choice)]
        found.sort(key=lambda pair: pair[0])
        choose(found[0][1])
        return found

    before = kernels.TILES[key], kernels.SHARE.get(key[2], 0)
    try:
        for name in kernels.Passes._fields if shape.backward else ("forward",):

            def choose(tiles: Any, name: str = name) -> None:
                kernels.TILES[key] = kernels.TILES[key]._replace(**{name: kernels.Tiles(*tiles)})

            yield name, sorted_by_time(choose, CANDIDATES, name != "forward")
        if x.element_size() == 2:
            yield "SHARE", sorted_by_time(lambda n: kernels.SHARE.update({key[2]: n}), (0, 1, 2, 4), shape.backward)
    finally:
        kernels.TILES[key], kernels.SHARE[key[2]] = before


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, default=64, help="clips")
    parser.add_argument("--grid", type=int, nargs=3, default=GRID, metavar=("T", "H", "W"), help="tokens of a clip")
    parser.add_argument("--shapes", default="target,context,predictor")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--budget", type=float, default=1.0, metavar="S", help="seconds per function, about")
    parser.add_argument("--tune", action="store_true", help="time tiles instead of backends (CUDA)")
    parser.add_argument("--json", metavar="PATH")
    args = parser.parse_args(argv)
    device, rows = torch.device(args.device), []
    for shape in shapes(args.batch, device, getattr(torch, args.dtype), tuple(args.grid)):
        if shape.name not in args.shapes.split(","):
            continue
        if args.tune:
            for name, found in tune(shape, args.repeats, args.budget):
                print(
                    f"{shape.name} {name}", *(f"  {ms:8.4f} ms  {what}" for ms, what in found[:8]), sep="\n", flush=True
                )
            continue
        for mode in ("forward", "full") if shape.backward else ("forward",):
            rows += rows_of(shape, mode, args.repeats, args.budget)
            for row in rows[-len(BACKENDS) :]:
                text = row["error"] or f"{row['median_ms']:9.4f} ms  {row['tflops']:6.1f} TFLOP/s"
                print(f"{shape.name:<10} {mode:<8} {row['provider']:<12} {text}", flush=True)
            if args.json:
                results.write(args.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
