"""A training module in the manner of V-JEPA 2's whose loss is defined in the step, inside the loop, inside ``main``."""

# ruff: noqa: B023 (functions of the loop's variables are what this file is about)
from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from fair_style import CFGS, MaskCollator, apply_masks

DIM = 16


def called():
    called.times += 1


called.times = 0


class Encoder(torch.nn.Module):
    """Tokens of each group of clips -> features, of all tokens or of those of each mask."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Linear(6, DIM)
        self.mix = torch.nn.Linear(DIM, DIM)

    def forward(self, x, masks=None):
        x = [torch.tanh(self.embed(xi)) for xi in x]
        if masks is None:
            return [self.mix(xi) for xi in x]
        kept = [[xi.gather(1, m[..., None].expand(-1, -1, DIM)) for m in mi] for xi, mi in zip(x, masks)]
        return [[self.mix(part) for part in parts] for parts in kept]


class Predictor(torch.nn.Module):
    """Features of a context -> those of the tokens that its mask predicts."""

    def __init__(self):
        super().__init__()
        self.out = torch.nn.Linear(DIM, DIM)
        self.place = torch.nn.Embedding(64, DIM)

    def forward(self, z, masks):
        pairs = [zip(zi, mi) for zi, mi in zip(z, masks)]
        return [[self.out(zij.mean(1, keepdim=True) + self.place(mij)) for zij, mij in pair] for pair in pairs]


def main(args, resume_preempt=False, *, fail_at=None):
    """Train; (losses, weights of encoder, predictor and target)."""
    loss_exp = args.get("loss_exp", 1.0)
    dtype, mixed = args.get("dtype", torch.float32), "dtype" in args
    torch.manual_seed(args.get("seed", 0))
    collator = MaskCollator(cfgs_mask=CFGS, dataset_fpcs=[4, 8], crop_size=32, patch_size=8, tubelet_size=2)
    encoder, predictor = Encoder(), Predictor()
    target = copy.deepcopy(encoder).requires_grad_(False)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *predictor.parameters()], lr=0.01)
    losses = []
    for epoch in range(args.get("epochs", 2)):
        for itr in range(args.get("ipe", 3)):
            samples = [([torch.randn(n // 2 * 16, 6)], 0, [list(range(n))]) for n in (4, 8, 4, 8, 4)]

            def load():
                groups = collator(samples)
                return (
                    [clips[0] for (clips, _, _), _, _ in groups],
                    [enc for _, enc, _ in groups],
                    [pred for _, _, pred in groups],
                )

            clips, masks_enc, masks_pred = load()

            def step():
                def goal(c):
                    with torch.no_grad():
                        return [F.layer_norm(hi, (hi.size(-1),)) for hi in target(c)]

                def guess(c):
                    return predictor(encoder(c, masks_enc), masks_pred)

                def loss_fn(z, h):
                    called()
                    h = [apply_masks(hi, mi, concat=False) for hi, mi in zip(h, masks_pred)]
                    total, count = 0, 0
                    for zi, hi in zip(z, h):
                        for zij, hij in zip(zi, hi):
                            total += (zij - hij).abs().pow(loss_exp).mean() / loss_exp
                            count += 1
                    return total / count

                with torch.autocast("cpu", dtype=dtype, enabled=mixed):
                    h = goal(clips)
                    z = guess(clips)
                    loss = loss_fn(z, h)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                with torch.no_grad():
                    for new, old in zip(encoder.parameters(), target.parameters()):
                        old.lerp_(new, 0.01)
                if fail_at == (epoch, itr):
                    raise RuntimeError("stopped on purpose")
                return loss.item()

            losses.append(step())
    return losses, [p.detach().clone() for part in (encoder, predictor, target) for p in part.parameters()]
