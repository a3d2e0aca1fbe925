"""Masks that are drawn but not yet cut to their lengths, so that nobody has to wait for the device in between."""

from __future__ import annotations

import torch

from vjepa_fast.layers.packed import Packed, pack, stream
from vjepa_fast.ops.block_masks import BlockMasks


class DrawnMasks:
    """The masks of a group of clips, with their lengths on the way to the host.

    On CUDA the lengths travel to pinned memory behind an event of the stream that drew the masks: when ``wait`` is
    called later, it waits for that event alone, not for what other streams were given in the meantime. ``packed``: keep
    all tokens of every sample. ``lengths``: int64 [2,S,B], of context and prediction, where the host has them already.
    """

    def __init__(self, masks: BlockMasks, packed: bool = False, lengths: torch.Tensor | None = None):
        self.masks, self.packed = masks, packed
        self.lengths = torch.stack([masks.enc_len, masks.pred_len]) if lengths is None else lengths
        self.copied = None
        if self.lengths.is_cuda:
            on_device = self.lengths
            self.lengths = torch.empty(on_device.shape, dtype=on_device.dtype, pin_memory=True)
            self.lengths.copy_(on_device, non_blocking=True)
            self.copied = torch.cuda.Event()
            self.copied.record()

    def wait(
        self, quantum: int | None = 0
    ) -> tuple[list[torch.Tensor] | list[Packed], list[torch.Tensor] | list[Packed]]:
        """(masks_enc, masks_pred), as ``MaskStrategy.__call__`` returns and raises; cut on the current stream.

        With a ``quantum`` of tokens, or None for the usual one, each is a single ``layers.packed.Stream`` of all masks.
        """
        lengths = self.arrived()
        if quantum != 0:
            enc, pred = stream(self.masks, lengths, quantum)
            return [enc], [pred]
        return pack(self.masks, lengths) if self.packed else self.masks.trim(lengths)

    def arrived(self) -> torch.Tensor:
        """The lengths, int64 [2,S,B] on the host, once they are there."""
        if self.copied is not None:
            self.copied.synchronize()
            self.copied = None  # asked again while a CUDA graph is captured, where no event may be waited for
        return self.lengths

    def record_stream(self, stream: torch.Stream) -> None:
        """Keep the memory of the masks until this stream is done with them too."""
        for x in (self.masks.enc, self.masks.pred, self.masks.enc_len, self.masks.pred_len):
            x.record_stream(stream)
