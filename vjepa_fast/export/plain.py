"""The encoder in plain PyTorch (``remote/encoder_vjepa21.py``), for graphs that know no op of this package."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from vjepa_fast.export.remote.encoder_vjepa21 import VideoEncoder
from vjepa_fast.models.describe import architecture
from vjepa_fast.models.vit import VisionTransformer


def plain_encoder(encoder: VisionTransformer) -> VideoEncoder:
    """The same encoder, with the same tensors, in plain PyTorch."""
    with torch.device("meta"):
        plain = VideoEncoder(SimpleNamespace(**architecture(encoder)))
    plain.load_state_dict(encoder.state_dict(), assign=True)
    return plain.eval().requires_grad_(False)


class FixedEncoder(nn.Module):
    """An encoder in plain PyTorch for clips of its configured size, any number at once; what graphs are made of.

    ``forward``: a normalised float clip [B,3,F,height,width] -> features [B,N,L*E] of the patch tokens, and with a
    class token its last level, [B,E], as well.
    """

    def __init__(self, encoder: VisionTransformer):
        super().__init__()
        self.encoder = plain_encoder(encoder)
        clip = torch.empty(1, 3, encoder.num_frames, *encoder.img_size, device="meta")
        self.table: Tensor | None
        table = self.encoder.rotations(self.encoder.grid(clip), torch.device("cpu")) if encoder.use_rope else None
        self.register_buffer("table", table, persistent=False)

    def forward(self, clip: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """See the class."""
        levels = self.encoder(clip, table=self.table)
        if self.encoder.cls_token is None:
            return torch.cat(levels, -1)
        return torch.cat([level[:, 1:] for level in levels], -1), levels[-1][:, 0]
