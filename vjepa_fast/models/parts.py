"""Tensors that are cut over processes (torch's DTensor, as FSDP makes them): the own part, and whole ones cut alike.

They are known by what they have, since the module of their class takes a second to import, and few runs need it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def is_cut(x: Any) -> bool:
    """Whether this is a tensor of which a process holds a part."""
    return isinstance(x, Tensor) and hasattr(x, "placements")


def local(x: Tensor) -> Tensor:
    """The own part of a tensor that is cut, the very memory of it, without gradient; other tensors as they are."""
    if not is_cut(x):
        return x
    with torch.no_grad():
        return x.to_local()  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType, reportUnknownVariableType, reportCallIssue]  # DTensor's


def like(value: Tensor, own: Tensor) -> Tensor:
    """A whole tensor, which every process has, cut as ``own`` is, if that is; nothing is sent."""
    if not is_cut(own) or is_cut(value) or value.shape != own.shape:
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(own, DTensor)
    value = value.to(own.device, own.dtype)
    return distribute_tensor(value, own.device_mesh, own.placements, src_data_rank=None)


def load_whole(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """``module.load_state_dict`` of whole tensors, where the module may be cut."""
    own = module.state_dict()
    module.load_state_dict({key: like(value, own[key]) if key in own else value for key, value in state.items()})
