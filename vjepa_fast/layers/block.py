"""Transformer block: its attention is `layers.attention.attend`; on a CPU all of it is `layers.cpu_block`, and in
16-bit floats on a GPU a stack of them is `layers.fused_block`.

Legend: B batch, K tokens, E embed_dim. ``rope``: None, or the rows of ``models.rope.rope_table`` of the tokens.
``lengths``: of the segments along K that attend to themselves (`layers.attention.Segments` where they change from step
to step); None: one segment.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from vjepa_fast.errors import ConfigError
from vjepa_fast.layers import attention, cpu_block, fused_block
from vjepa_fast.layers.attention import Backend, Lengths, attend
from vjepa_fast.layers.linear import Linear


class Attention(nn.Module):
    """Multi-head self-attention with packed ``qkv``; parameter names are FAIR's.

    ``backend`` is forced; None: the fastest is taken, and in a compiled graph ``whole`` for whole grids, the fastest of
    `choose_attention`.
    """

    backend: Backend | None = None
    whole: Backend | None = None

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x_BKE: torch.Tensor, rope: torch.Tensor | None, lengths: Lengths = None) -> torch.Tensor:
        """[B,K,E] -> [B,K,E]."""
        return self.proj(self.attend(self.qkv(x_BKE), rope, lengths))

    def attend(self, qkv_BK3E: torch.Tensor, rope: torch.Tensor | None, lengths: Lengths) -> torch.Tensor:
        """What is between the two layers: [B,K,3E] -> [B,K,E]."""
        backend = self.backend
        if backend is None and lengths is None and torch.compiler.is_compiling():
            backend = self.whole
        return attend(qkv_BK3E, rope, self.num_heads, lengths, backend)


class MLP(nn.Module):
    """Feed-forward with exact GELU: dim -> hidden -> dim."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)

    @property
    def last(self) -> nn.Linear:
        """The layer whose weight `init_weights` scales."""
        return self.fc2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[...,dim] -> [...,dim]."""
        return self.fc2(self.fc1.gelu(x))


class SwiGLU(nn.Module):
    """Gated feed-forward; ``wide`` shrinks the hidden width to 2/3, rounded up to a multiple of 8, as FAIR does."""

    def __init__(self, dim: int, hidden: int, wide: bool):
        super().__init__()
        if wide:
            hidden = -(-int(2 * hidden / 3) // 8) * 8
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(dim, hidden)
        self.fc3 = Linear(hidden, dim)

    @property
    def last(self) -> nn.Linear:
        """The layer whose weight `init_weights` scales."""
        return self.fc3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[...,dim] -> [...,dim]."""
        return self.fc3(F.silu(self.fc1(x)) * self.fc2(x))


class Block(nn.Module):
    """Pre-norm transformer block.

    ``epilogues``: as in ``runtime.epilogues``; see `layers.fused_block`.
    """

    epilogues: bool | str = "auto"

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, use_silu: bool, wide_silu: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        hidden = int(dim * mlp_ratio)
        self.mlp = SwiGLU(dim, hidden, wide_silu) if use_silu else MLP(dim, hidden)

    @property
    def plain(self) -> bool:
        """Whether attention and feed-forward are the plain ones, not those of a subclass or SwiGLU."""
        return type(self.mlp) is MLP and type(self.attn) is Attention

    def forward(self, x_BKE: torch.Tensor, rope: torch.Tensor | None, lengths: Lengths = None) -> torch.Tensor:
        """[B,K,E] -> [B,K,E]."""
        if self.plain and cpu_block.supports(x_BKE, rope) and cpu_block.fits(self):
            return cpu_block.apply(self, x_BKE, rope, lengths)
        x_BKE = x_BKE + self.attn(self.norm1(x_BKE), rope, lengths)
        return x_BKE + self.mlp(self.norm2(x_BKE))


def run_block(
    block: nn.Module, x_BKE: torch.Tensor, rope: torch.Tensor | None, recompute: bool, lengths: Lengths = None
) -> torch.Tensor:
    """One block; with ``recompute`` its activations are recomputed in the backward pass."""
    if recompute and torch.is_grad_enabled():
        # nothing in a block is random, and to look at the generator's state is not allowed in a CUDA graph
        return checkpoint(block, x_BKE, rope, lengths, use_reentrant=False, preserve_rng_state=False)
    return block(x_BKE, rope, lengths)


def run_blocks(
    blocks: nn.ModuleList,
    norms: Mapping[int, nn.Module],
    x_BKE: torch.Tensor,
    rope: torch.Tensor | None,
    recompute: bool,
    lengths: Lengths = None,
) -> list[torch.Tensor]:
    """What comes out of the blocks numbered in ``norms`` (from 0), through its norm; the last block has one.

    Returns:
        [B,K,E] for each norm, in order. Where the blocks are fused, a list of one tensor [B,K,len(norms)*E] that has
        them side by side, in the dtype of the computation.
    """
    if fused_block.supports(x_BKE, norms):
        own = [block for block in blocks if type(block) is Block and block.plain and fused_block.fits(block)]
        layers = {number: norm for number, norm in norms.items() if isinstance(norm, nn.LayerNorm)}
        if len(own) == len(blocks):
            return [fused_block.apply(own, layers, x_BKE, rope, recompute, lengths)]
    outs: list[torch.Tensor] = []
    for number, block in enumerate(blocks):
        x_BKE = run_block(block, x_BKE, rope, recompute, lengths)
        if number in norms:
            outs.append(norms[number](x_BKE))
    return outs


def use_attention(name: str, device: torch.device, dtype: torch.dtype, *modules: nn.Module) -> None:
    """Let all `Attention` in the modules use the backend ``name``, or the fastest with ``auto``.

    Raises:
        ConfigError: there is no such backend, or it does not support this device, dtype or size of heads.
    """
    backend = attention.find(name)
    for layer in _layers(modules):
        if backend is not None:
            head_dim = layer.proj.in_features // layer.num_heads
            attention.require(backend, attention.Call(device, dtype, head_dim, grad=True))
        layer.backend, layer.whole = backend, None


@torch.no_grad()
def choose_attention(device: torch.device, dtype: torch.dtype, batch: int, tokens: int, *modules: nn.Module) -> None:
    """Measure what ``auto`` takes for whole grids [batch,tokens,E] without gradient, before anything is compiled.

    A compiled graph cannot choose: it holds this one. Rows of the table on disk are not measured again. Nothing happens
    on a CPU, nor to layers with a backend of their own.
    """
    if device.type != "cuda":
        return
    found: dict[tuple[int, int], Backend] = {}
    for layer in _layers(modules):
        if layer.backend is None:
            size = layer.proj.in_features, layer.num_heads
            if size not in found:
                found[size] = attention.for_whole_grids(device, dtype, batch, tokens, *size)
            layer.whole = found[size]


def _layers(modules: Sequence[nn.Module]) -> Iterator[Attention]:
    return (layer for module in modules for layer in module.modules() if isinstance(layer, Attention))


def use_epilogues(choice: bool | str, device: torch.device, dtype: torch.dtype, *modules: nn.Module) -> None:
    """Let all `Block` in the modules have their passes over memory merged as ``runtime.epilogues`` says.

    Raises:
        ConfigError: ``choice`` forces that, and it is not supported here; the message has every reason.
    """
    blocks = [block for module in modules for block in module.modules() if isinstance(block, Block)]
    reasons: list[str] = []
    if choice not in (False, "auto"):
        reasons += fused_block.objections(str(choice), device, dtype)
        if not all(block.plain for block in blocks):
            reasons.append("it needs the feed-forward with GELU (model.use_silu, model.pred_use_silu)")
        if any(layer.fp8 for block in blocks for layer in block.modules() if isinstance(layer, Linear)):
            reasons.append("it does not multiply in 8 bits (runtime.fp8)")
    if reasons:
        raise ConfigError(f"runtime.epilogues: {choice} is not supported here: {'; '.join(reasons)}; use auto")
    for block in blocks:
        block.epilogues = choice


@torch.no_grad()
def init_weights(module: nn.Module, blocks: nn.ModuleList, *, fan_in: bool = False) -> None:
    """Truncated normal weights, zero biases; block i (from 1) divides attn.proj and its last MLP weight by sqrt(2i).

    Standard deviation 0.02, or with ``fan_in`` 1/sqrt(3 inputs), which is that of PyTorch's linear layers: as much at
    833 inputs, four times as much at 52.
    """
    for m in module.modules():
        if isinstance(m, nn.Linear | nn.Conv3d):
            nn.init.trunc_normal_(m.weight, std=(3 * m.weight[0].numel()) ** -0.5 if fan_in else 0.02)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
    for i, block in enumerate(blocks, start=1):
        assert isinstance(block, Block)
        block.attn.proj.weight.div_((2.0 * i) ** 0.5)
        block.mlp.last.weight.div_((2.0 * i) ** 0.5)
