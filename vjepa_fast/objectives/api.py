"""What an objective term is: a frozen dataclass of its fields, registered by name, with its formula in ``value``.

Adding a term takes one module that registers it, in ``terms/`` or in a plugin (`vjepa_fast.registry`), and one test;
see docs/objectives.md. Terms never import each other: what they share is in ``state.py`` (cached views of the features)
and ``reduce.py`` (means, weights).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vjepa_fast.config.convert import read
from vjepa_fast.config.fields import checked as checked  # with these a term declares its fields
from vjepa_fast.config.fields import choice as choice
from vjepa_fast.config.fields import flag as flag
from vjepa_fast.config.fields import number as number
from vjepa_fast.config.fields import require
from vjepa_fast.layers.linear import Linear32
from vjepa_fast.objectives.state import LatentState
from vjepa_fast.ops.latent import RowCall
from vjepa_fast.registry import Registry


@dataclass(frozen=True)
class TermContext:
    """What a term may know of the plan it is part of."""

    levels: int
    embed_dim: int
    compat: str = "intended"  # intended | published
    seed: int = 0
    tubelet: int = 2  # frames of a token
    patch: int = 16  # and its pixels

    @property
    def dim(self) -> int:
        """Feature channels D = levels * embed_dim."""
        return self.levels * self.embed_dim


@dataclass(frozen=True)
class Objective:
    """One term of the loss. A subclass is a frozen dataclass whose fields are the keys of its recipe section.

    Class attributes:
        access: how the term walks over memory: TOKEN, PAIR (t, t+1), COLUMN (over T) or GLOBAL.
        needs: the ``LatentState`` fields it reads.
        gradient_to: in words, which inputs its gradient reaches.
        exact_gradient: False where a part that depends on the inputs is held constant by design (hw's weights).
        published: field -> ``section.key`` of the published YAML that sets it; empty where that format has no such
            term. See ``from_published``.
        uncapturable: why ``value`` cannot be part of a CUDA graph, in words; empty where it launches the same work at
            every step and never waits for the device. What differs from step to step goes through ``weight``, ``draw``.
    """

    name: ClassVar[str] = ""
    access: ClassVar[str] = "TOKEN"
    needs: ClassVar[frozenset[str]] = frozenset()
    gradient_to: ClassVar[str] = ""
    exact_gradient: ClassVar[bool] = True
    published: ClassVar[Mapping[str, str]] = {}
    uncapturable: ClassVar[str] = ""

    coeff: float = number(1.0, low=0.0)

    def value(self, state: LatentState, head: nn.Module | None, ctx: TermContext) -> Tensor:
        """The unweighted term, a scalar in promote_types(input, float32), without a host sync."""
        raise NotImplementedError(f"objective {self.name} has no formula")

    def weight(self, state: LatentState) -> float:
        """The coefficient in force at ``state.step`` / ``state.epoch``."""
        return self.coeff

    def draw(self, state: LatentState, ctx: TermContext, device: torch.device) -> Tensor | None:
        """Random numbers of the step, or what else the host makes anew for each: ``value`` reads ``state.drawn[name]``.

        Called before the features are there: of the state only step, epoch and modality are known. The shape must not
        depend on the step. None: nothing.
        """
        return None

    def build_head(self, ctx: TermContext, generator: torch.Generator) -> nn.Module | None:
        """The learnable part, drawn from ``generator``; None for most terms."""
        return None

    def refusal(self, ctx: TermContext, target_grad: bool) -> str | None:
        """Why no gradient can reach this term in this set-up, or None if one can."""
        return None

    def lower(self, ctx: TermContext) -> tuple[RowCall, ...]:
        """The functions of the features that ``value`` averages over channels, for kernels to run.

        Each is an ``ops.latent.RowFunction`` (PyTorch formula, Triton device function, optionally C++) with its
        parameter and channels. ``value`` asks the state for their rows, ``[B, K]``, and does the rest in PyTorch; the
        plan gathers those of all terms, so that a pair of rows of ``z`` is read once for all. A term without any works
        on ``state.target`` and ``view.z`` in plain PyTorch.
        """
        return ()

    @classmethod
    def from_published(cls, values: dict[str, Any], file: Mapping[str, Any]) -> dict[str, Any] | None:
        """The fields that a published YAML file gives this term, or None where the file does not turn it on.

        Args:
            values: the fields in ``published`` whose keys the file has; numbers and flags are checked already.
            file: the whole file, ``section.key`` -> value, for terms that depend on the keys of others.
        """
        return values if values.get("coeff", 0) != 0 else None


def _check(name: str, cls: type) -> None:
    if not issubclass(cls, Objective) or not _is_frozen(cls):
        raise TypeError(f"objective {name!r} must be a frozen dataclass derived from Objective")


def _is_frozen(cls: type) -> bool:
    parameters = getattr(cls, "__dataclass_params__", None)
    return parameters is not None and parameters.frozen


OBJECTIVES: Registry[type[Objective]] = Registry("objective", package="vjepa_fast.objectives.terms", check=_check)


def objective(name: str) -> Callable[[type[Objective]], type[Objective]]:
    """Class decorator: registers a frozen ``Objective`` dataclass as the term ``name``.

    Raises:
        TypeError: the class is no frozen dataclass derived from ``Objective``.
        ValueError: the name is taken.
    """

    def register(cls: type[Objective]) -> type[Objective]:
        OBJECTIVES.add(name, cls)
        cls.name = name
        return cls

    return register


def make_objective(name: str, values: Any, path: str = "objectives") -> Objective:
    """The term ``name`` with the fields of a recipe section, a mapping or None for the defaults.

    Raises:
        ConfigError: an unknown term or field (with a suggestion), or a value that the field does not accept.
    """
    path = f"{path}.{name}"
    term = read(OBJECTIVES.get_named(name, path), {} if values is None else values, path)
    require(term, path)
    return term


# -- learnable parts --------------------------------------------------------------------------------------------------
def head_generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator for the head of term ``name``: the same weights whatever other terms are in the plan."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def linear(n_in: int, n_out: int, generator: torch.Generator) -> nn.Linear:
    """``nn.Linear`` with PyTorch's default distribution (the published heads use it), drawn from ``generator`` alone.

    Weight and bias are uniform in +-1/sqrt(n_in). Leaves the global RNG untouched; works on the meta device.
    """
    layer = nn.utils.skip_init(Linear32, n_in, n_out, device=torch.get_default_device())
    assert isinstance(layer, Linear32)
    if not layer.weight.is_meta:
        bound = 1.0 / math.sqrt(n_in)
        with torch.no_grad():
            for p in (layer.weight, layer.bias):
                draw = torch.empty(p.shape, dtype=torch.float32, device="cpu")
                p.copy_(draw.uniform_(-bound, bound, generator=generator))
    return layer


def mlp(n_in: int, hidden: int, n_out: int, generator: torch.Generator) -> nn.Sequential:
    """Two layers with exact (erf) GELU between; parameters ``0.weight 0.bias 2.weight 2.bias``."""
    return nn.Sequential(linear(n_in, hidden, generator), nn.GELU(), linear(hidden, n_out, generator))
