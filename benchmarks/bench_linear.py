"""The matrix products of a linear layer on a CPU: PyTorch's own choice, MKL (F.linear, @), against oneDNN and ours.

    python benchmarks/bench_linear.py                      # writes benchmarks/results/linear.json, about a minute
    python benchmarks/bench_linear.py --json other.json --repeats 15

float32, the layers of a block of ViT-tiny and ViT-base; 1568 tokens (one clip of 16 x 224 x 224, or eight of 112 px).
``forward`` is x W^T + b, ``gelu`` the same followed by GELU, ``gradient_x`` is g W and ``gradient_w`` is g^T x, all
against oneDNN; ``gradient_wb`` is g^T x and the sum of g over its rows, against csrc/linear.cpp. By turns, the fastest
of each; results are compared first. vjepa_fast/ops/linear.py takes oneDNN for the first three and ours for the last.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from vjepa_fast.ops import linear
from vjepa_fast.trainer.run_folder import device_name, git_commit

RESULT = Path(__file__).resolve().parent / "results" / "linear.json"
TOKENS = 1568
WIDTHS = {"vit_tiny": 192, "vit_base": 768}
LAYERS = {"qkv": (1, 3), "proj": (1, 1), "fc1": (1, 4), "fc2": (4, 1)}  # inputs and outputs in widths


def pairs(x, w, b, g):
    """Name -> (MKL, the other)."""
    dw, db = torch.zeros_like(w), torch.zeros_like(b)

    def ours():
        dw.zero_()  # it adds
        db.zero_()
        linear.add_outer(g, x, dw, db)
        return dw, db

    return {
        "forward": (lambda: F.linear(x, w, b), lambda: linear.product(x, w, b)),
        "gelu": (lambda: F.gelu(F.linear(x, w, b)), lambda: linear.product(x, w, b, "gelu")),  # applied while in cache
        "gradient_x": (lambda: g @ w, lambda: linear.product(g, w.t())),
        "gradient_w": (lambda: g.t() @ x, lambda: linear.product(g.t(), x.t())),
        "gradient_wb": (lambda: (g.t() @ x, g.sum(0)), ours),
    }


def milliseconds(functions, repeats: int) -> list[float]:
    times: list[list[float]] = [[] for _ in functions]
    for turn in range(repeats + 2):
        for fn, found in zip(functions, times):
            began = time.perf_counter()
            fn()
            if turn >= 2:
                found.append(1e3 * (time.perf_counter() - began))
    return [round(min(t), 4) for t in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path, default=RESULT)
    args = parser.parse_args()
    if not linear.has_product():
        raise SystemExit("this PyTorch has no oneDNN product: ops/linear.py uses F.linear")
    torch.manual_seed(0)
    rows = []
    print(f"{'model':9} {'layer':5} {'product':11} {'MKL ms':>9} {'other ms':>10} {'MKL / other':>12}")
    with torch.no_grad():
        for model, width in WIDTHS.items():
            for layer, (i, o) in LAYERS.items():
                x, w = torch.randn(TOKENS, i * width), torch.randn(o * width, i * width) / width**0.5
                b, g = torch.randn(o * width), torch.randn(TOKENS, o * width)
                for name, both in pairs(x, w, b, g).items():
                    torch.testing.assert_close(both[1](), both[0](), rtol=1e-3, atol=1e-3)
                    mkl, other = milliseconds(both, args.repeats)
                    rows.append(
                        {
                            "model": model,
                            "layer": layer,
                            "product": name,
                            "tokens": TOKENS,
                            "inputs": i * width,
                            "outputs": o * width,
                            "mkl_ms": mkl,
                            "other_ms": other,
                        }
                    )
                    print(f"{model:9} {layer:5} {name:11} {mkl:9.3f} {other:10.3f} {mkl / other:12.2f}")
    found = {
        "device": device_name(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": git_commit(),
        "dtype": "float32",
        "repeats": args.repeats,
        "rows": rows,
    }
    args.json.write_text(json.dumps(found, indent=1) + "\n")
    print(f"wrote {args.json}")


if __name__ == "__main__":
    main()
