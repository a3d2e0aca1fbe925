"""Small states for the tests: hand-written ones (one sample, group and mask) and random ones of any shape."""

import dataclasses

import torch

from vjepa_fast.layers.packed import Packed
from vjepa_fast.objectives import LatentState, build_objectives

FEATURES = {"z": "masks_enc", "z_context": "masks_enc", "z_pred": "masks_pred"}


def tensor(rows):
    """``rows`` as float64 with a batch of one."""
    return torch.as_tensor(rows, dtype=torch.float64).unsqueeze(0)


def tiny_state(grid, *, h=None, z=None, z_pred=None, z_context=None, enc=None, pred=None, clip=None, **run):
    """LatentState of one sample, group and mask; features are lists of rows, masks lists of token ids."""

    def nested(rows):
        return None if rows is None else [[tensor(rows).requires_grad_()]]

    def ids(tokens):
        return None if tokens is None else [[torch.tensor([tokens])]]

    return LatentState(
        grids=[grid],
        h=None if h is None else [tensor(h)],
        z=nested(z),
        z_pred=nested(z_pred),
        z_context=nested(z_context),
        masks_enc=ids(enc),
        masks_pred=ids(pred),
        clips=None if clip is None else [tensor(clip)],
        **run,
    )


def value_of(term, fields, state, *, levels=1, embed_dim=2, heads=None, **options):
    """(value of a term, plan, output); ``heads`` is a state dict for its head."""
    plan = build_objectives({term: fields}, levels=levels, embed_dim=embed_dim, **options).double()
    if heads:
        plan.heads[term].load_state_dict({k: torch.as_tensor(v, dtype=torch.float64) for k, v in heads.items()})
    out = plan(state)
    return out.terms[term].item(), plan, out


def identity_head(dim, scale=1.0):
    """State dict of a two-layer MLP (hidden 2*dim) that is x -> scale * x: gelu(x) - gelu(-x) = x."""
    eye = torch.eye(dim)
    return {
        "0.weight": torch.cat([eye, -eye]),
        "0.bias": torch.zeros(2 * dim),
        "2.weight": scale * torch.cat([eye, -eye], 1),
        "2.bias": torch.zeros(dim),
    }


def random_state(
    grids=((4, 2, 3), (2, 2, 2)),
    batch=2,
    levels=2,
    embed_dim=4,
    masks=2,
    dtype=torch.float64,
    seed=0,
    keep=None,
    requires_grad=True,
    patch=2,
    tubelet=2,
    device="cpu",
):
    """Random features on random sorted masks; ``keep(grid, j)`` gives the context tokens of mask j instead."""
    g = torch.Generator().manual_seed(seed)
    dim = levels * embed_dim

    def rand(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).to(device).requires_grad_(requires_grad)

    fields = {name: [] for name in ("h", "z", "z_pred", "z_context", "masks_enc", "masks_pred", "clips")}
    for grid in grids:
        n = grid[0] * grid[1] * grid[2]
        enc, pred = [], []
        for j in range(masks):
            if keep is None:
                order = torch.stack([torch.randperm(n, generator=g) for _ in range(batch)])
                cut = max(1, (2 + j) * n // 4 if j < 2 else n // 2)
                enc.append(order[:, :cut].sort(1).values.to(device))
                pred.append((order[:, cut:] if cut < n else order[:, :1]).sort(1).values.to(device))
            else:
                tokens = torch.tensor(keep(grid, j))
                rest = torch.tensor([t for t in range(n) if t not in set(tokens.tolist())] or [0])
                enc.append(tokens.expand(batch, -1).contiguous().to(device))
                pred.append(rest.expand(batch, -1).contiguous().to(device))
        fields["masks_enc"].append(enc)
        fields["masks_pred"].append(pred)
        fields["h"].append(rand(batch, n, dim))
        fields["z"].append([rand(batch, m.shape[1], dim) for m in enc])
        fields["z_context"].append([rand(batch, m.shape[1], dim) for m in enc])
        fields["z_pred"].append([rand(batch, m.shape[1], dim) for m in pred])
        clip = rand(batch, 3, grid[0] * tubelet, grid[1] * patch, grid[2] * patch)
        fields["clips"].append(clip.detach())
    return LatentState(grids=list(grids), step=7, total_steps=10, epoch=1, epochs=4, **fields)


def leaves(state):
    """All feature tensors of a state by a readable name."""
    named = {f"h/{i}": h for i, h in enumerate(state.h)}
    for kind in ("z", "z_pred", "z_context"):
        named |= {f"{kind}/{i}/{j}": x for i, xs in enumerate(getattr(state, kind)) for j, x in enumerate(xs)}
    return named


def pack(rows, tokens):
    return Packed.of(
        torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
        torch.tensor([len(r) for r in rows]),
        [len(r) for r in rows],
        tokens,
    )


def ragged(grids=((4, 2, 3),), samples=3, masks=1, seed=0, **options):
    """(state of all samples, states of one sample each with all tokens of that sample)."""
    g = torch.Generator().manual_seed(seed)
    singles = []
    for b in range(samples):
        places = {}
        for grid in grids:  # one place is seen throughout, so that every sample has a column and a pair
            t, s = grid[0], grid[1] * grid[2]
            column = torch.arange(t) * s + b % s
            orders = [torch.randperm(t * s, generator=g) for _ in range(masks)]
            orders = [torch.cat([column, order[~torch.isin(order, column)]]) for order in orders]
            places[grid] = [order[: t + 1 + 3 * b + j].sort().values.tolist() for j, order in enumerate(orders)]
        singles.append(
            random_state(
                grids=grids,
                batch=1,
                masks=masks,
                seed=100 * seed + b,
                keep=lambda grid, j, p=places: p[grid][j],
                **options,
            )
        )
    return join(singles), singles


def join(singles):
    first, groups = singles[0], range(len(singles[0].grids))
    fields = {
        "h": [torch.cat(xs).detach().requires_grad_(xs[0].requires_grad) for xs in zip(*(s.h for s in singles))],
        "clips": [torch.cat(xs) for xs in zip(*(s.clips for s in singles))],
    }
    for name in ("masks_enc", "masks_pred"):
        by_mask = [zip(*(getattr(s, name)[i] for s in singles)) for i in groups]
        fields[name] = [[pack([m[0] for m in ms], first.h[i].shape[1]) for ms in by_mask[i]] for i in groups]
    for name in FEATURES:
        by_mask = [zip(*(getattr(s, name)[i] for s in singles)) for i in groups]
        fields[name] = [
            [torch.cat(xs, 1).detach().requires_grad_(xs[0].requires_grad) for xs in by_mask[i]] for i in groups
        ]
    return dataclasses.replace(first, **fields)
