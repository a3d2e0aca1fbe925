"""The published mask collator with the same masks from the same random numbers, the blocks of all samples at once."""

from __future__ import annotations

import ctypes
import functools
import importlib
import inspect
import math
from collections.abc import Callable, Sequence
from multiprocessing import Value
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from vjepa_fast.config.schema import MaskConfig
from vjepa_fast.errors import ConfigError, UserError
from vjepa_fast.ops.block_masks import Size, masks_of_origins

# Arguments of a mask of FAIR's configuration that the published collator reads, and names of ours.
_KEYS = ("aspect_ratio", "num_blocks", "spatial_scale", "temporal_scale", "max_temporal_keep", "max_keep")
_KEYS += ("full_complement", "pred_full_complement", "inv_block")
_TRIES = 1000


def collator(original: Callable[..., Any], name: str) -> type:
    """A class of ``original``'s arguments and calls; ``name`` stands in errors."""
    return type("MaskCollator", (_Collator,), {"_original": staticmethod(original), "_name": name})


def _again(where: str, path: str, name: str, given: tuple[Any, Any], draws: Any, compared: bool) -> _Collator:
    """A collator in a spawned worker, whose modules are imported anew; the numbers of the batches are shared."""
    found = attrgetter(path)(importlib.import_module(where))
    made = collator(getattr(found, "vjepa_fast_original", found), name)(*given[0], **given[1])
    made._draws, made._compared = draws, compared
    return made


class _Collator:
    """The published collator with the same masks from the same numbers of torch's generator."""

    _original: Callable[..., Any]
    _name: str

    def __init__(self, *args: Any, **kwargs: Any):
        self._given = args, kwargs
        self.reference: Any = self._original(*args, **kwargs)
        given = inspect.signature(self._original).bind(*args, **kwargs)
        given.apply_defaults()
        a = given.arguments
        try:
            crop, patch, tubelet = a["crop_size"], a["patch_size"], a["tubelet_size"]
            side = [pixels // size for pixels, size in zip(_both(crop), _both(patch))]
            specs = [_spec(mask, self._name) for mask in a["cfgs_mask"]]
            self._draws = {
                fpc: [_Draw(spec, (fpc // tubelet, side[0], side[1])) for spec in specs] for fpc in a["dataset_fpcs"]
            }
        except KeyError as error:
            raise UserError(f"{self._name}: takes no argument {error}, as V-JEPA 2's collator does") from error
        self._compared = False

    def __reduce__(self) -> tuple[Any, ...]:
        original = self._original
        return _again, (
            *(original.__module__, original.__qualname__, self._name),
            *(self._given, self._draws, self._compared),
        )

    def step(self) -> None:
        """Leave one batch's block sizes out, as a resumed run does."""
        for draws in self._draws.values():
            for draw in draws:
                draw.step()

    def __call__(self, batch: Sequence[Any]) -> list[tuple[Any, list[Tensor], list[Tensor]]]:
        """Samples -> (collated samples, context masks, prediction masks) for each number of frames."""
        before = torch.get_rng_state()
        groups = {fpc: [sample for sample in batch if len(sample[-1][-1]) == fpc] for fpc in self._draws}
        found, numbers = [], {}
        for fpc, samples in groups.items():
            if samples:
                numbers[fpc] = [draw.step() for draw in self._draws[fpc]]
                masks = [draw(number, len(samples)) for draw, number in zip(self._draws[fpc], numbers[fpc])]
                collated = torch.utils.data.default_collate(samples)
                found.append((collated, [enc for enc, _ in masks], [pred for _, pred in masks]))
        if not self._compared:
            self._compare(batch, found, numbers, before)
            self._compared = True
        return found

    def _compare(self, batch: Sequence[Any], found: list[Any], numbers: dict[int, list[int]], before: Tensor) -> None:
        """The original on the same batch, numbers and state of the generator says the same."""
        after = torch.get_rng_state()
        try:
            for fpc, counts in numbers.items():
                for generator, number in zip(self.reference.mask_generators[fpc], counts):
                    generator.step = functools.partial(int, number)
        except (AttributeError, KeyError, TypeError) as error:
            raise UserError(f"{self._name}: has no mask_generators by frames per clip; leave it as it was") from error
        torch.set_rng_state(before)
        wanted = self.reference(batch)
        same = len(wanted) == len(found) and torch.equal(torch.get_rng_state(), after)
        for (_, *mine), (_, *its) in zip(found, wanted):
            for one, other in zip(mine, its):
                same = same and len(one) == len(other) and all(map(torch.equal, one, other))
        if not same:
            raise UserError(f"{self._name}: draws other masks than vjepa_fast; leave it as it was")
        self.reference = None  # another worker has its own


class _Draw:
    """One mask of a configuration on one grid."""

    def __init__(self, spec: MaskConfig, grid: Size):
        self.spec, self.grid = spec, grid
        self._count = Value(ctypes.c_int64, -1)  # shared by the workers of a loader

    def step(self) -> int:
        """The number of the next batch."""
        with self._count.get_lock():
            self._count.value += 1
            return self._count.value

    def __call__(self, number: int, batch: int) -> tuple[Tensor, Tensor]:
        """Context [B,Ke] and prediction [B,Kp] of batch ``number``."""
        size = self._size(number)
        t, h, w = (extent - length + 1 for extent, length in zip(self.grid, size))
        tries = self._origins(batch, h, w, t)
        for _ in range(_TRIES):  # a sample without context is drawn again at once, so the tries are one stream
            enc, pred, empty = masks_of_origins(self.grid, self.spec, size, tries)
            if enc:
                return enc[0], pred[0]
            kept = tries[~empty]
            more = self._origins(batch - len(kept), h, w, t)
            tries = torch.cat((kept, more))
        raise UserError(
            f"masks: no context is left after {_TRIES} tries ({self.spec.num_blocks} blocks of {size} tokens on a grid "
            f"of {self.grid}); the original would go on for ever; lower spatial_scale or num_blocks"
        )

    def _origins(self, batch: int, h: int, w: int, t: int) -> Tensor:
        """[B,P,3] of (t,h,w); the published order of draws is (h,w,t), each one word of the generator modulo n."""
        words = _words(batch * self.spec.num_blocks * 3).view(batch, self.spec.num_blocks, 3)
        return (words % torch.tensor((h, w, t)))[..., (2, 0, 1)]

    def _size(self, number: int) -> Size:
        """(t, h, w) of the blocks, from a generator seeded with the number of the batch."""
        u = torch.rand(3, generator=torch.Generator().manual_seed(number)).tolist()
        bounds = self.spec.temporal_scale, self.spec.spatial_scale, self.spec.aspect_ratio
        time, space, aspect = (low + x * (high - low) for x, (low, high) in zip(u, bounds))
        duration, height, width = self.grid
        area = int(height * width * space)
        h, w = (min(int(round(math.sqrt(x))), n) for x, n in ((area * aspect, height), (area / aspect, width)))
        return max(1, int(duration * time)), h, w


def _words(n: int) -> Tensor:
    """The next n 32-bit words of torch's generator, int64; ``torch.randint(0, m, (1,))`` is one of them modulo m."""

    def words(pairs: int) -> Tensor:
        numbers = torch.empty(pairs, dtype=torch.int64).random_(-(2**63), None)  # 64 bits: the earlier word is above
        return torch.stack((numbers >> 32, numbers), 1).flatten() & 0xFFFFFFFF

    found = words(n // 2)
    if n % 2:
        before = torch.get_rng_state()
        found = torch.cat((found, words(1)[:1]))
        torch.set_rng_state(before)
        torch.randint(0, 2, (1,))  # leaves one word out, not two
    return found


def _both(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _spec(mask: dict[str, Any], name: str) -> MaskConfig:
    given: dict[str, Any] = {key: tuple(x) if isinstance(x, list) else x for key, x in mask.items() if x is not None}
    if unknown := [key for key in given if key not in _KEYS]:
        raise UserError(f"{name}: masks have a key {unknown[0]!r} that vjepa_fast does not know; leave it as it was")
    try:
        return MaskConfig(**given)
    except ConfigError as error:
        raise UserError(f"{name}: {error}") from error
