"""What encoder and predictor keep for the backward pass in bfloat16 on a GPU: counted, without a GPU, not measured.

    python benchmarks/saved_bytes.py                                                # ViT-B, batch 8 and 64
    python benchmarks/saved_bytes.py --json benchmarks/results/saved_bytes.json

The models run on tensors that have shapes and a CUDA device but no memory, under autocast, and every tensor that
autograd keeps is counted once: in full, and by block and token. ``plain`` are our blocks with
``runtime.epilogues: false`` and without torch.compile, which keeps other tensors; ``fused`` those of
layers/fused_block.py. Attention keeps q, k, v, its output and a sum per row, as cuDNN's and the flash kernels do.
Parameters with their gradients, averages of AdamW and the target, and the target's features, are counted from their
shapes. Not counted: the losses, what a kernel needs while it runs, and what the allocator cannot use.
"""

from __future__ import annotations

import argparse
import contextlib
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from vjepa_fast import config, files, models  # noqa: E402
from vjepa_fast.layers import fused_block  # noqa: E402
from vjepa_fast.layers.block import Block, run_blocks, use_attention  # noqa: E402
from vjepa_fast.reference import model as reference  # noqa: E402

RECIPE = "mixed_4gpu_fwm_hw_ld"
# context and predicted tokens of the masks: means of the recipe, cut to the shortest of the batch
LENGTHS = {8: ((418, 850), (114, 1154)), 64: ((345, 708), (81, 1108))}
WAYS = ("reference", "plain", "fused")
GB = 1e9


class _Attention(torch.autograd.Function):
    """Keeps what a fused attention keeps; computes nothing."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError


@contextlib.contextmanager
def on_gpu() -> Iterator[None]:
    """CUDA tensors without memory, bfloat16 autocast, and attention that is one operator."""
    real, drawn, was = F.scaled_dot_product_attention, nn.init.trunc_normal_, torch.get_autocast_dtype("cuda")
    nn.init.trunc_normal_ = lambda x, *_, **__: x  # it looks at what it drew
    F.scaled_dot_product_attention = lambda q, k, v, *_, **__: _Attention.apply(*_same(q, k, v))
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
            yield
    finally:
        F.scaled_dot_product_attention, nn.init.trunc_normal_ = real, drawn
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_dtype("cuda", was)


def _same(*parts: Tensor) -> list[Tensor]:
    """In the dtype of autocast, which casts the operands of the real one."""
    return [x.to(torch.bfloat16) for x in parts]


def kept(modules: Sequence[nn.Module], call: Callable[..., Any], *args: Any, **options: Any) -> tuple[int, Any]:
    """Bytes of the storages that autograd keeps for this call, parameters of the modules aside; and its result."""
    known = {p.untyped_storage()._cdata for module in modules for p in module.parameters()}
    found: dict[int, int] = {}
    alive: list[Any] = []

    def count(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in known:
            alive.append(storage)  # an address must not come back
            found[storage._cdata] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        out = call(*args, **options)
    return sum(found.values()), out


@contextlib.contextmanager
def fused(on: bool) -> Iterator[None]:
    """Whether our blocks take the path of a GPU, which here there is none to ask about."""
    real = fused_block.supports
    fused_block.supports = lambda *_: on
    try:
        yield
    finally:
        fused_block.supports = real


def ours(cfg: config.Config, on: bool, batch: int, lengths) -> dict[str, int]:
    """Bytes by part."""
    encoder, predictor = models.build_from_config(cfg, device="cuda")
    use_attention("sdpa", torch.device("cuda"), torch.bfloat16, encoder, predictor)
    clip = torch.empty(batch, 3, 16, cfg.data.crop_size, cfg.data.crop_size, dtype=torch.uint8)
    enc, pred = ([torch.zeros(batch, n[side], dtype=torch.int64) for n in lengths] for side in (0, 1))
    with fused(on):
        with torch.no_grad():
            h = encoder(clip)
        first, z = kept([encoder], encoder, clip, enc)
        z = [part.detach().requires_grad_() for part in z]
        second, (z_pred, z_context) = kept([predictor, encoder], predictor, z, enc, pred, [0, 1])
    assert isinstance(h, Tensor)
    return {
        "encoder": first,
        "predictor": second,
        "features": _bytes(h, *z, *z_pred, *z_context),
        "weights": _weights(encoder, predictor),
    }


def theirs(cfg: config.Config, batch: int, lengths) -> dict[str, int]:
    """The same of the published algorithm, one mask after the other."""
    m = cfg.model
    encoder = reference.Encoder()
    predictor = reference.Predictor(
        predictor_embed_dim=m.pred_embed_dim, depth=m.pred_depth, num_heads=m.pred_num_heads
    )
    clip = torch.empty(batch, 3, 16, cfg.data.crop_size, cfg.data.crop_size)
    with torch.no_grad():
        features = [encoder(clip)]
    total = {"encoder": 0, "predictor": 0}
    for number, (context, hidden) in enumerate(lengths):
        enc, pred = (torch.zeros(batch, n, dtype=torch.int64) for n in (context, hidden))
        first, z = kept([encoder], encoder, clip, enc)
        z = z.detach().requires_grad_()
        second, outs = kept([predictor], predictor, z, enc, pred, mask_index=number)
        total["encoder"] += first
        total["predictor"] += second
        features += [z, *outs]
    clips = _bytes(clip)  # normalised to float32
    return {**total, "features": _bytes(*features) + clips, "weights": _weights(encoder, predictor)}


def _bytes(*tensors: Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def _weights(encoder: nn.Module, predictor: nn.Module) -> int:
    """Parameters, gradients and two averages in float32, and the target encoder."""
    count = [sum(p.numel() for p in module.parameters()) for module in (encoder, predictor)]
    return 16 * sum(count) + 4 * count[0]


def block_bytes(way: str, width: int, heads: int, tokens: int = 256) -> float:
    """Bytes by token that a block in the middle of a stack keeps, weights in 16 bits aside."""
    stack: list[nn.ModuleList] = []
    x, at = torch.empty(1, tokens, width, dtype=torch.bfloat16, requires_grad=True), torch.zeros(1, tokens).long()
    found: list[int] = []
    for depth in (2, 3):
        if way == "reference":
            rope = {"patch_size": 16, "grid_size": 14, "interpolate_rope": True, "rope_variant": "v2.1"}
            stack.append(nn.ModuleList(reference.Block(width, heads, False, True, **rope) for _ in range(depth)))
            found.append(kept(stack, _through, stack[-1], x, at, 14, 14)[0])
        else:
            stack.append(nn.ModuleList(Block(width, heads, 4.0, False, True) for _ in range(depth)))
            use_attention("sdpa", torch.device("cuda"), torch.bfloat16, stack[-1])
            norms, table = {depth - 1: nn.LayerNorm(width)}, torch.zeros(tokens, 2, width // heads // 6 * 6)
            with fused(way == "fused"):
                found.append(kept(stack, run_blocks, stack[-1], norms, x, table, False)[0])
    low = 2 * sum(p.numel() for p in stack[0][0].parameters() if p.ndim > 1)
    return (found[1] - found[0] - low) / tokens


def _through(blocks: nn.ModuleList, x: Tensor, *args: Any) -> Tensor:
    for block in blocks:
        x = block(x, *args)
    return x


def rows(batch: int, ways: Sequence[str] = WAYS) -> list[dict[str, Any]]:
    cfg = config.load(RECIPE, ["model.use_activation_checkpointing=false", f"data.batch_size={batch}"])
    found = []
    with on_gpu():
        for way in ways:
            lengths = LENGTHS[batch]
            parts = theirs(cfg, batch, lengths) if way == "reference" else ours(cfg, way == "fused", batch, lengths)
            m = cfg.model
            by_token = {
                "encoder_block_bytes_per_token": block_bytes(way, 768, 12),
                "predictor_block_bytes_per_token": block_bytes(way, m.pred_embed_dim, m.pred_num_heads),
            }
            sizes = {f"{part}_gb": size / GB for part, size in parts.items()}
            found.append({"blocks": way, "batch": batch, **by_token, **sizes, "sum_gb": sum(sizes.values())})
    for row in found:
        row["of_reference"] = row["sum_gb"] / found[0]["sum_gb"]
    return found


def table(found: list[dict[str, Any]]) -> str:
    head = ["blocks", "batch", "encoder block", "predictor block", "encoder", "predictor", "features", "weights", "sum"]
    lines = [f"| {' | '.join(head)} | of reference |", "|" + "---|" * (len(head) + 1)]
    for row in found:
        name, batch, first, second, *sizes, total, share = row.values()
        cells = [name, batch, f"{first:,.0f} B", f"{second:,.0f} B", *(f"{x:.2f} GB" for x in (*sizes, total))]
        lines.append(f"| {' | '.join(map(str, cells))} | {share:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, action="append", choices=LENGTHS, help="default all")
    parser.add_argument(
        "--ways", nargs="+", choices=WAYS, default=WAYS, help="default all; of_reference is of the first"
    )
    parser.add_argument("--json", metavar="PATH", help="also write the rows as JSON")
    args = parser.parse_args()
    found = [row for batch in args.batch or LENGTHS for row in rows(batch, args.ways)]
    if args.json:
        files.write_json(args.json, found)
    print(table(found))


if __name__ == "__main__":
    main()
