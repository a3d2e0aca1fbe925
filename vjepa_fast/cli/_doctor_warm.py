"""``vjepa-fast doctor --warm``: the kernels of a recipe, compiled into Triton's cache before a run needs them."""

from __future__ import annotations

import re
from argparse import ArgumentTypeError
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vjepa_fast.cli._console import say

if TYPE_CHECKING:
    from vjepa_fast.ops._builds import Built


def compute_capability(text: str) -> int:
    """``sm_90`` or ``90`` as 90."""
    found = re.fullmatch(r"(?:sm_)?(\d{2,3})a?", text)
    if not found or int(found[1]) < 80:
        raise ArgumentTypeError(f"{text!r} is not a compute capability of at least 8.0, such as sm_80, sm_90 or sm_100")
    return int(found[1])


def warm(source: Sequence[str], arch: int | None) -> int:
    """Compile what a step of the configuration launches; a line for each kernel and one for all.

    Args:
        source: recipe, file or run folder, then overrides; empty for a configuration of defaults.
        arch: 10 times the compute capability; None: that of the GPU here.

    Raises:
        UserError: there is no GPU here and ``arch`` is None, or Triton cannot compile here.
    """
    import torch

    from vjepa_fast import config
    from vjepa_fast.errors import UserError
    from vjepa_fast.ops import _builds
    from vjepa_fast.trainer import warm as warming

    cfg = config.load(source[0], list(source[1:])) if source else config.Config()
    if reasons := _builds.objections():
        raise UserError(f"doctor --warm: {'; '.join(reasons)}")
    if arch is None:
        if not torch.cuda.is_available():
            raise UserError("doctor --warm: torch finds no CUDA device here; --arch sm_90 compiles for one elsewhere")
        arch = warming.capability(torch.device("cuda"))
    dtype = torch.float32 if cfg.runtime.dtype == "float32" else torch.bfloat16
    say(f"kernels of {source[0] if source else 'the defaults'} for sm_{arch}, {str(dtype).removeprefix('torch.')}")
    summary = warming.Warming(cfg, dtype, arch, on_kernel=_line).finish()
    say(summary)
    return 1 if summary.error or summary.failed else 0


def _line(kernel: str, builds: list[Built]) -> None:
    compiled, failed = sum(not b.found and not b.error for b in builds), [b.error for b in builds if b.error]
    state = f"{len(builds)} builds, {compiled} compiled, {sum(b.seconds for b in builds):.1f} s"
    say(f"  {kernel:<30}{state}{'; failed: ' + failed[0] if failed else ''}")
