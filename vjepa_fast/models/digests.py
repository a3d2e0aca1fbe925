"""Digests of what a checkpoint holds, so that a file is only used as it was written.

A checkpoint's entry ``digests`` has, for every other entry, the SHA-256 (its first 32 hex digits) of everything in it
that is no tensor, under the entry's name (``opt``), and that of each tensor (dtype, shape, bytes) under its place
(``encoder/module.backbone.blocks.0.attn.qkv.weight``).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from vjepa_fast.errors import CheckpointError

ENTRY = "digests"
_DIGITS = 32
_log = logging.getLogger("vjepa_fast")
_said: set[str] = set()  # files without digests that were reported


class DamagedError(CheckpointError):
    """A checkpoint that is not, or cannot be, what was written. An earlier one may be whole."""


def digests_of(state: Mapping[str, Any], look: Callable[[], None] = lambda: None) -> dict[str, str]:
    """The entry `ENTRY` of a checkpoint that holds ``state``; ``look`` is called before each tensor, and may raise."""

    def of(tensor: Tensor) -> str:
        look()
        return tensor_digest(tensor)

    out: dict[str, str] = {}
    tensors: list[tuple[str, Tensor]] = []
    for entry, value in state.items():
        if entry == ENTRY:
            continue
        plain: list[tuple[str, ...]] = []
        _walk(value, entry, tensors, plain)
        out[entry] = hashlib.sha256(repr(plain).encode(errors="surrogatepass")).hexdigest()[:_DIGITS]
    with ThreadPoolExecutor(max(1, min(4, torch.get_num_threads()))) as pool:  # hashing lets go of the interpreter
        out.update(zip([name for name, _ in tensors], pool.map(of, [t for _, t in tensors])))
    return out


def tensor_digest(tensor: Tensor) -> str:
    """The digest of a dense tensor; empty for one of another layout or without values."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        return ""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:_DIGITS]


def verify(content: Mapping[str, Any], path: object, entries: Iterable[str] | None = None) -> None:
    """Hold a checkpoint against its digests; without them, which is said once per file, nothing is checked.

    Args:
        content: what the file holds.
        path: the file, for messages.
        entries: which entries to look at; None: all that have digests.

    Raises:
        DamagedError: an entry or a tensor is missing or other than what was written; names the first.
    """
    written = content.get(ENTRY)
    if written is None:
        if "opt" in content and str(path) not in _said:
            _said.add(str(path))
            _log.info("%s: has no digests (an earlier version wrote it), so damage in it would not be noticed", path)
        return
    if not isinstance(written, Mapping):
        raise DamagedError(f"{path}: digests: expected a dictionary, got {type(written).__name__}; the file is damaged")
    wanted = {str(name) for name in written if "/" not in str(name)} if entries is None else set(entries)
    part = {name: content[name] for name in wanted if name in content}
    found = digests_of(part)
    for name, value in written.items():
        entry = str(name).split("/", 1)[0]
        if entry in wanted and found.get(name) != value:
            what = "is missing" if name not in found else "is not what was written"
            raise DamagedError(
                f"{path}: {name} {what}: the file was damaged or changed; copy it again, or take an earlier checkpoint "
                f"(to use it as it is, remove its entry {ENTRY!r})"
            )
    if extra := [name for name in found if name not in written]:
        raise DamagedError(f"{path}: {extra[0]} was not written with this checkpoint: the file was changed")


def _walk(value: Any, name: str, tensors: list[tuple[str, Tensor]], plain: list[tuple[str, ...]]) -> None:
    """Sort what is in ``value`` into ``tensors`` and the ``plain`` rest, by place."""
    if isinstance(value, Tensor):
        tensors.append((name, value))
        plain.append((name, "tensor"))
    elif isinstance(value, Mapping):
        plain.append((name, "dict", *map(repr, value)))
        for key, item in value.items():
            _walk(item, f"{name}/{key}", tensors, plain)
    elif isinstance(value, (list, tuple)):
        plain.append((name, "list" if isinstance(value, list) else "tuple", str(len(value))))
        for number, item in enumerate(value):
            _walk(item, f"{name}/{number}", tensors, plain)
    else:
        plain.append((name, type(value).__name__, repr(value)))
