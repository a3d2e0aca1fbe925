"""Checkpoints changed at random: bytes of the file, or values in it with and without their digests."""

import random
from pathlib import Path

import torch

from vjepa_fast.errors import UserError
from vjepa_fast.models import digests, load_encoder
from vjepa_fast.trainer import train

VALUES = (None, True, -1, 3, 10**30, 1.5, float("nan"), "x", "", b"\xff", [], [1, "a"], (), {}, {"a": 1}, {1: {}})


def mutated(path: Path, seed: int) -> str:
    """Change the checkpoint ``path`` by the random numbers of ``seed``; what was changed, in words."""
    rng = random.Random(seed)
    kind = rng.choice(("bits", "cut", "zeros", "insert", "value", "value", "value", "tensor", "tensor", "drop", "drop"))
    if kind in ("bits", "cut", "zeros", "insert"):
        data = bytearray(path.read_bytes())
        size = len(data)
        at = rng.choice((rng.randrange(size), rng.randrange(min(4000, size)), size - rng.randrange(1, 4000)))
        if kind == "bits":
            for _ in range(rng.choice((1, 1, 8))):
                data[min(at + rng.randrange(64), len(data) - 1)] ^= 1 << rng.randrange(8)
        elif kind == "cut":
            del data[at:]
        elif kind == "zeros":
            size = min(rng.choice((16, 512, 4096)), len(data) - at)
            data[at : at + size] = bytes(size)
        else:
            data[at:at] = rng.randbytes(rng.randrange(1, 64))
        path.write_bytes(data)
        return f"{kind} at {at}"
    content = torch.load(path, weights_only=True)
    signed = rng.random() < 0.5  # its digests made anew, as by a program that wrote nonsense; else of before digests
    del content["digests"]
    holder, key, place = _place(content, rng, tensors=kind == "tensor")
    new: object = None
    if kind == "drop":
        del holder[key]
    else:
        new = _tensor(holder[key], rng) if kind == "tensor" else rng.choice(VALUES)
        holder[key] = new
    if signed:
        content["digests"] = digests.digests_of(content)
    torch.save(content, path)
    return f"{kind} {place}: {new!r:.80}, {'with' if signed else 'without'} digests"


def _place(content, rng: random.Random, tensors: bool):
    """(container, key, place) of a random value, or of a random tensor."""
    found, todo = [], [(content, "")]
    while todo:
        holder, name = todo.pop()
        for key in range(len(holder)) if isinstance(holder, list) else list(holder):
            value, place = holder[key], f"{name}/{key}"
            if isinstance(value, torch.Tensor) == tensors or (not tensors and rng.random() < 0.2):
                found.append((holder, key, place))
            if isinstance(value, (dict, list)):
                todo.append((value, place))
    tops = {place.split("/")[1] for *_, place in found}
    top = rng.choice(sorted(tops))  # else all would be settings of the configuration
    return rng.choice([f for f in found if f[2].split("/")[1] == top])


def _tensor(value: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """Another shape, dtype, layout or content."""
    changes = (
        lambda t: t.flatten()[: t.numel() // 2],
        lambda t: t.reshape(1, *t.shape),
        lambda t: t.to(rng.choice((torch.float64, torch.bfloat16, torch.int32, torch.bool, torch.complex64))),
        lambda t: torch.full_like(t, float("nan")) if t.is_floating_point() else t + 1,
        lambda t: t.new_zeros(0),
        lambda t: t.float().to_sparse(),
        lambda t: torch.tensor(1.0),
        lambda t: t.to("meta"),
    )
    return rng.choice(changes)(value)


def attempt(cfg, path: Path) -> str:
    """Go on from ``path`` and read its encoder: ``read``, ``refused`` (in one clear line), or what went wrong."""
    outcome = "read"
    for use in (lambda: train(cfg, resume=path, max_steps=5), lambda: load_encoder(path)):
        try:
            use()
        except UserError as error:
            outcome = "refused"
            if "\n" in str(error) or len(str(error)) > 1000:
                return f"long: {error}"
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return outcome
