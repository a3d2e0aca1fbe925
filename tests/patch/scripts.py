"""Small training modules whose loss is inside ``main``, and inputs for it."""

from __future__ import annotations

import re
from types import ModuleType

import torch


def script(body, **names):
    """A module without a file. ``body``: what is inside ``main(h, z, masks_pred, loss_exp)``."""
    lines = "\n".join("    " + line for line in body.splitlines())
    found = ModuleType("script")
    text = (
        "def main(h, z, masks_pred, loss_exp):\n    from torch import gather\n" + lines + "\n    return loss_fn(z, h)"
    )
    found.__dict__.update(names)
    exec(compile(text, "<no file>", "exec"), found.__dict__)
    return found


# A loss on its own, with the masks in the variable M and the exponent in P.
PLAIN = """def loss_fn(z, h):
    values = [
        (a - b.gather(1, m[..., None].expand(-1, -1, b.shape[-1]))).abs().pow(P).mean() / P
        for x, b, y in zip(z, h, M) for a, m in zip(x, y)
    ]
    return sum(values) / len(values)"""


def plain(masks="masks_pred", exponent="loss_exp"):
    return re.sub(r"\bM\b", masks, re.sub(r"\bP\b", exponent, PLAIN))


def inputs(dtype=torch.float32):
    """Two groups of clips, two masks each."""
    generator = torch.Generator().manual_seed(0)
    h, z, masks = [], [], []
    for batch, n in ((2, 9), (3, 12)):
        h.append(torch.randn(batch, n, 8, generator=generator).to(dtype))
        masks.append([torch.stack([torch.randperm(n, generator=generator)[:k] for _ in range(batch)]) for k in (3, 5)])
        z.append([torch.randn(batch, k, 8, generator=generator).to(dtype).requires_grad_() for k in (3, 5)])
    return h, z, masks


LATER = """def loss_fn(z, h, masks_to_apply, cls_loss, d_weights):
    values = []
    for i in range(len(z)):
        for j in range(len(z[i])):
            rows, mask = (h[i][:, 1:] if cls_loss else h[i]), masks_to_apply[i][j][..., None]
            rows = gather(rows, 1, mask.expand(-1, -1, rows.shape[-1]))
            if cls_loss:
                rows = cat([h[i][:, :1], rows], 1)
            error = (z[i][j] - rows).abs() ** loss_exp
            if d_weights is not None and not cls_loss:
                error = error / d_weights[i][j][..., None] * SCALE
            values.append(error.mean() / loss_exp)
    return sum(values) / len(values)"""


def later(scale="1"):
    body = f"from torch import cat\n{LATER.replace('SCALE', scale)}"
    main = "def main(loss_exp, *args, **kwargs):\n    from torch import gather\n"
    main += "".join(f"    {line}\n" for line in body.splitlines()).replace("gather(", "torch.gather(")
    module = ModuleType("script")
    text = main.replace("    from torch import gather\n    from torch import cat\n", "").replace(" cat(", " torch.cat(")
    module.__dict__["torch"] = torch
    exec(compile(text + "    return loss_fn(*args, **kwargs)", "<no file>", "exec"), module.__dict__)
    return module
