"""V-JEPA 2's attentive probe, many heads trained at once over one pass of the data.

A head: self-attention blocks over all tokens, then one cross-attention block in which one learnt query reads them, then
a linear classifier. The heads of a grid of learning rates and weight decays have their weights stacked along a first
axis, so one batched product computes all of them; each has its own AdamW settings and none touches another. The head is
chosen on the validation part; the test part is read once, after that.

Legend: G heads, b samples, V views (clips * crops), N tokens, D width, C classes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vjepa_fast.errors import TrainingError, UserError
from vjepa_fast.evaluation.extract.features import amp
from vjepa_fast.evaluation.extract.tokens import Tokens
from vjepa_fast.evaluation.probes.probe import PROBES, Probe, ProbeOptions, ProbeResult, checked_parts, result_of

LRS = (5e-3, 3e-3, 1e-3, 3e-4, 1e-4)
WEIGHT_DECAYS = (0.01, 0.1, 0.4, 0.8)
EPOCHS = 20
ACTIVATIONS = 2 * 2**30  # bytes of activations up to which heads go side by side; the others follow on the same batch


class _Linear(nn.Module):
    """G linear layers: [G, M, in] -> [G, M, out]. All start with the same weights."""

    def __init__(self, heads: int, width: int, out: int, generator: torch.Generator, std: float | None = 0.02):
        """``std``: of truncated normal weights, with biases of 0; None: as ``nn.Linear`` starts, uniform in
        +-1/sqrt(width).
        """
        super().__init__()
        weight, bias = torch.empty(out, width), torch.zeros(out)
        if std is None:
            for p in (weight, bias):
                p.uniform_(-1 / math.sqrt(width), 1 / math.sqrt(width), generator=generator)
        else:
            nn.init.trunc_normal_(weight, std=std, generator=generator)
        self.weight = nn.Parameter(weight.repeat(heads, 1, 1))
        self.bias = nn.Parameter(bias.repeat(heads, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias[:, None], x, self.weight.mT)


class _Norm(nn.Module):
    """G layer norms: [G, M, D] -> [G, M, D]."""

    def __init__(self, heads: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads, width))
        self.bias = nn.Parameter(torch.zeros(heads, width))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:]) * self.weight[:, None] + self.bias[:, None]


class _Block(nn.Module):
    """A pre-norm block; with ``cross`` the query reads the tokens (V-JEPA 2 has no output projection there)."""

    def __init__(
        self,
        heads: int,
        width: int,
        num_heads: int,
        mlp_ratio: float,
        layer: int,
        cross: bool,
        generator: torch.Generator,
    ):
        super().__init__()
        self.num_heads, hidden = num_heads, int(width * mlp_ratio)
        std = 0.02 / math.sqrt(2.0 * layer)  # of the layers that end a branch
        self.norm1, self.norm2 = _Norm(heads, width), _Norm(heads, width)
        if cross:
            self.q = _Linear(heads, width, width, generator)
            self.kv = _Linear(heads, width, 2 * width, generator)
        else:
            self.qkv = _Linear(heads, width, 3 * width, generator)
            self.proj = _Linear(heads, width, width, generator, std)
        self.fc1 = _Linear(heads, width, hidden, generator)
        self.fc2 = _Linear(heads, hidden, width, generator, std)

    def _split(self, x_GMD: Tensor, batch: int, parts: int) -> list[Tensor]:
        """``parts`` tensors [G*b, heads of attention, M / b, D / heads of attention]."""
        x = x_GMD.unflatten(1, (batch, -1)).flatten(0, 1)
        return list(x.unflatten(-1, (parts, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0))

    def forward(self, x_GMD: Tensor, batch: int, query: Tensor | None = None) -> Tensor:
        """Tokens [G, b*N, D] (and query [G, b, D]) -> the same shape as what is updated."""
        heads, y = len(x_GMD), self.norm1(x_GMD)
        if query is None:
            q, k, v = self._split(self.qkv(y), batch, 3)
        else:
            x_GMD = query
            (q,), (k, v) = self._split(self.q(query), batch, 1), self._split(self.kv(y), batch, 2)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        y = y.unflatten(0, (heads, batch)).flatten(1, 2)
        x_GMD = x_GMD + (self.proj(y) if query is None else y)
        return x_GMD + self.fc2(F.gelu(self.fc1(self.norm2(x_GMD))))


class AttentiveHeads(nn.Module):
    """G attentive classifiers side by side: tokens ``[b, N, D]`` -> logits ``[G, b, C]``.

    ``depth`` blocks: depth - 1 of self-attention and one of cross-attention; 0 is a linear classifier of the mean
    token. ``num_heads`` is the largest divisor of D up to the one given. All heads start with the weights of ``seed``.
    Source: V-JEPA 2 (arXiv:2506.09985), frozen evaluation; blocks, query and initialisation as its published code:
    weights normal with 0.02, those that end a branch of block i (from 0) divided by sqrt(2 (i + 1)), the cross block by
    the divisor of the last self-attention block; the classifier as PyTorch starts a linear layer.
    """

    def __init__(
        self,
        heads: int,
        width: int,
        classes: int,
        *,
        depth: int = 4,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        seed: int = 0,
    ):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.heads, self.depth = heads, depth
        self.num_heads = next(h for h in range(min(num_heads, width), 0, -1) if width % h == 0)
        more = (self.num_heads, mlp_ratio)
        self.blocks = nn.ModuleList(
            _Block(heads, width, *more, i + 1, False, generator) for i in range(max(0, depth - 1))
        )
        if depth:
            self.pool = _Block(heads, width, *more, max(1, depth - 1), True, generator)
            one = nn.init.trunc_normal_(torch.empty(1, width), std=0.02, generator=generator)
            self.query = nn.Parameter(one.repeat(heads, 1, 1))
        self.linear = _Linear(heads, width, classes, generator, None)

    def forward(self, x_bND: Tensor) -> Tensor:
        """Logits ``[G, b, C]`` of tokens ``[b, N, D]``."""
        batch = len(x_bND)
        if not self.depth:
            return self.linear(x_bND.mean(1).expand(self.heads, -1, -1))
        x = x_bND.flatten(0, 1).expand(self.heads, -1, -1)
        for block in self.blocks:
            x = block(x, batch)
        return self.linear(self.pool(x, batch, self.query.expand(-1, batch, -1)))


class _Trainer:
    """Heads of one setting each, in groups that go side by side, all of them on every batch."""

    def __init__(
        self,
        grid: Sequence[tuple[float, float]],
        width: int,
        classes: int,
        at_once: int,
        device: str | torch.device,
        seed: int,
        **shape: int,
    ):
        self.groups = []
        for start in range(0, len(grid), at_once):
            part = grid[start : start + at_once]
            model = AttentiveHeads(len(part), width, classes, seed=seed, **shape).to(device)
            grads = [torch.zeros_like(p) for p in model.parameters()]
            settings = []  # one optimiser group per head, over views of the stacked weights and gradients
            for g, (lr, decay) in enumerate(part):
                own = []
                for p, grad in zip(model.parameters(), grads):
                    view = nn.Parameter(p.data[g])
                    p.grad, view.grad = grad, grad[g]
                    own.append(view)
                settings.append({"params": own, "lr": lr, "weight_decay": decay, "peak": lr})
            fused = torch.device(device).type in ("cpu", "cuda")
            self.groups.append((model, torch.optim.AdamW(settings, betas=(0.9, 0.999), eps=1e-8, fused=fused)))

    def step(self, x: Tensor, y: Tensor, rate: float, autocast: Callable[[], AbstractContextManager]) -> Tensor:
        """One update at ``rate`` of the peak rates; losses [G]."""
        losses = []
        for model, optimizer in self.groups:
            optimizer.zero_grad(set_to_none=False)
            with autocast():
                logits = model(x)
            loss = F.cross_entropy(logits.float().flatten(0, 1), y.repeat(len(logits)), reduction="none")
            loss = loss.unflatten(0, (len(logits), -1)).mean(1)
            loss.sum().backward()  # a head's gradient is that of its own loss
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate
            optimizer.step()
            losses.append(loss.detach())
        return torch.cat(losses)

    @torch.no_grad()
    def probabilities(self, views: list[Tensor], autocast: Callable[[], AbstractContextManager]) -> Tensor:
        """Softmax averaged over views ``[b, N, D]`` each: [G, b, C]."""
        out = []
        for model, _ in self.groups:
            with autocast():
                logits = [model(x) for x in views]
            out.append(torch.stack([one.float().softmax(-1) for one in logits]).mean(0))
        return torch.cat(out)


def split_views(x_bVND: Tensor, views: tuple[int, int], join: bool) -> Tensor:
    """Views that are classified one by one: ``[b, crops, clips * N, D]`` with ``join``, else ``[b, V, N, D]``."""
    if not join:
        return x_bVND
    clips, crops = views
    return x_bVND.unflatten(1, (clips, crops)).transpose(1, 2).flatten(2, 3)


def train_heads(
    train: Tokens,
    classes: int,
    grid: Sequence[tuple[float, float]],
    *,
    epochs: int,
    batch_size: int = 64,
    depth: int = 4,
    num_heads: int = 16,
    join: bool = True,
    seed: int = 0,
    device: str | torch.device = "cpu",
    heads_at_once: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[Callable[[Tokens], np.ndarray], np.ndarray]:
    """Train a head per (lr, weight decay) of ``grid`` on all of ``train``; returns ``predict(tokens)`` -> int [G, n]
    and the last losses [G] (not finite: that head diverged).

    AdamW on all weights, cosine from lr to 0 over all steps, no warm-up. Where there are several crops, each sample
    shows one of them per epoch. Order and crops depend on ``seed`` alone. ``join``: the tokens of all clips of a video
    are read together, and the softmax is averaged over its crops (as published); otherwise over all views.
    ``heads_at_once`` bounds the memory and changes no result beyond rounding.
    """
    device = torch.device(device)
    autocast = partial(amp, device)
    shown = split_views(train.rows([0]), train.views, join)
    if heads_at_once is None:  # about 16 tensors of tokens times width per block live until the backward pass
        each = 4 * 16 * max(1, depth) * min(batch_size, len(train)) * shown.shape[2] * train.dim
        heads_at_once = max(1, min(len(grid), ACTIVATIONS // each))
    trainer = _Trainer(grid, train.dim, classes, heads_at_once, device, seed, depth=depth, num_heads=num_heads)
    steps_each = math.ceil(len(train) / batch_size)
    steps, step, losses = epochs * steps_each, 0, np.zeros(len(grid))
    for epoch in range(epochs):
        generator = np.random.default_rng((seed, epoch))
        order = generator.permutation(len(train))
        crop = generator.integers(shown.shape[1], size=len(train))
        total = torch.zeros(len(grid), device=device)
        for rows in np.array_split(order, steps_each):
            views = split_views(train.rows(rows), train.views, join)
            x = views[torch.arange(len(rows)), torch.from_numpy(crop[rows])].to(device).float()
            y = torch.from_numpy(train.y[rows]).to(device)
            total += trainer.step(x, y, 0.5 * (1 + math.cos(math.pi * step / steps)), autocast)
            step += 1
        losses = (total / steps_each).cpu().numpy()
        if on_progress:
            on_progress(epoch + 1, epochs)

    def predict(part: Tokens) -> np.ndarray:
        found = []
        for rows in np.array_split(np.arange(len(part)), math.ceil(len(part) / batch_size)):
            views = split_views(part.rows(rows), part.views, join).to(device).float()
            found.append(trainer.probabilities(list(views.unbind(1)), autocast).argmax(-1).cpu().numpy())
        return np.concatenate(found, axis=1)

    return predict, losses


def attentive_probe(
    train: Tokens,
    val: Tokens | None,
    test: Tokens,
    *,
    lrs: Sequence[float] = LRS,
    weight_decays: Sequence[float] = WEIGHT_DECAYS,
    epochs: int = EPOCHS,
    batch_size: int = 64,
    classes: int | None = None,
    seed: int = 0,
    **how: Any,
) -> ProbeResult:
    """V-JEPA 2's attentive probe (arXiv:2506.09985): 4 blocks, 16 heads, a grid of 5 learning rates x 4 weight decays.

    ``val`` chooses the head (ties: the smaller lr, then the larger weight decay); None holds out 20 % of ``train`` by
    class and ``seed``. ``classes``: how many there must be (default: the highest label + 1). ``how``: depth, num_heads,
    join, device, heads_at_once and on_progress, as `train_heads`. Deterministic on a CPU.

    ``chosen``: lr, wd, val_accuracy, epochs, heads (tried), diverged (of them), and max_over_heads_on_test, the best
    test accuracy of any head: the published way of scoring, not used to choose. DataError as `checked_parts`,
    TrainingError where every head diverged.
    """
    grid = list(itertools.product(lrs, weight_decays))
    if not grid or epochs < 1 or batch_size < 1:
        raise UserError("an attentive probe needs a learning rate, a weight decay, and at least 1 epoch and batch size")
    train, val, test, classes = checked_parts(train, val, test, classes=classes, seed=seed)
    predict, losses = train_heads(train, classes, grid, epochs=epochs, batch_size=batch_size, seed=seed, **how)
    fine = np.isfinite(losses)
    if not fine.any():
        raise TrainingError(f"{train.name}: all {len(grid)} heads diverged; lower the learning rates")
    on_val = np.where(fine, (predict(val) == val.y).mean(1), -1.0)
    best = max(range(len(grid)), key=lambda g: (on_val[g], -grid[g][0], grid[g][1]))
    predicted = predict(test)  # the choice is made: only now is the test part read
    on_test = np.where(fine, (predicted == test.y).mean(1), 0.0)
    chosen = {
        "lr": grid[best][0],
        "wd": grid[best][1],
        "val_accuracy": float(on_val[best]),
        "max_over_heads_on_test": float(on_test.max()),
        "heads": len(grid),
        "diverged": int((~fine).sum()),
        "epochs": epochs,
    }
    return result_of(predicted[best], test.y, chosen)


@PROBES.register("attentive")
class AttentiveProbe(Probe):
    """V-JEPA 2's attentive probe; one of 20 heads is chosen on the validation part."""

    needs = "tokens"

    def __call__(self, train: Tokens, val: Tokens | None, test: Tokens, options: ProbeOptions) -> ProbeResult:
        """`attentive_probe` with its defaults; epochs as the options or the task say, else 20."""
        epochs = options.epochs or (options.task.epochs if options.task else EPOCHS)
        return attentive_probe(train, val, test, epochs=epochs, **options.training)
