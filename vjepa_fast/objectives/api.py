"""What an objective term is: a frozen dataclass of its fields, registered by name, with its formula in ``value``.

Adding a term takes one file in ``terms/`` (found by itself) and one test; see docs/objectives.md. Terms never import
each other: what they share is in ``state.py`` (cached views of the features) and ``reduce.py`` (means, weights).
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import math
import pkgutil
from collections.abc import Callable
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
from vjepa_fast.errors import ConfigError
from vjepa_fast.layers.linear import Linear
from vjepa_fast.ops.latent import RowCall

_REGISTRY: dict[str, type[Objective]] = {}


@dataclass(frozen=True)
class TermContext:
    """What a term may know of the plan it is part of."""

    levels: int
    embed_dim: int
    compat: str = "intended"  # intended | published
    seed: int = 0

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
    """

    name: ClassVar[str] = ""
    access: ClassVar[str] = "TOKEN"
    needs: ClassVar[frozenset[str]] = frozenset()
    gradient_to: ClassVar[str] = ""
    exact_gradient: ClassVar[bool] = True

    coeff: float = number(1.0, low=0.0)

    def value(self, state, head: nn.Module | None, ctx: TermContext) -> Tensor:
        """The unweighted term, a scalar in promote_types(input, float32), without a host sync."""
        raise NotImplementedError(f"objective {self.name} has no formula")

    def weight(self, state) -> float:
        """The coefficient in force at ``state.step`` / ``state.epoch``."""
        return self.coeff

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


def objective(name: str) -> Callable[[type[Objective]], type[Objective]]:
    """Class decorator: registers a frozen ``Objective`` dataclass as the term ``name``."""

    def register(cls: type[Objective]) -> type[Objective]:
        if name in _REGISTRY:
            first = _REGISTRY[name].__module__
            raise ValueError(f"objective {name!r} is registered twice: {first} and {cls.__module__}")
        if not issubclass(cls, Objective) or not cls.__dataclass_params__.frozen:
            raise TypeError(f"objective {name!r} must be a frozen dataclass derived from Objective")
        cls.name = name
        _REGISTRY[name] = cls
        return cls

    return register


def registry() -> dict[str, type[Objective]]:
    """Every term by name. Imports all modules of ``terms/`` on the first call."""
    from vjepa_fast.objectives import terms

    for module in pkgutil.iter_modules(terms.__path__):
        importlib.import_module(f"{terms.__name__}.{module.name}")
    return dict(_REGISTRY)


def make_objective(name: str, values: dict[str, Any] | None, path: str = "objectives") -> Objective:
    """The term ``name`` with the fields of a recipe section.

    Raises ConfigError with the key's path, what is accepted and a suggestion.
    """
    known = registry()
    if name not in known:
        raise ConfigError(f"{path}.{name}: unknown term; terms are {', '.join(sorted(known))}{_suggest(name, known)}")
    term = read(known[name], {} if values is None else values, f"{path}.{name}")
    require(term, f"{path}.{name}")
    return term


def _suggest(word: str, known) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


# -- learnable parts --------------------------------------------------------------------------------------------------
def head_generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator for the head of term ``name``: the same weights whatever other terms are in the plan."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def linear(n_in: int, n_out: int, generator: torch.Generator) -> nn.Linear:
    """``nn.Linear`` with PyTorch's default distribution (the published heads use it), drawn from ``generator`` alone.

    Weight and bias are uniform in +-1/sqrt(n_in). Leaves the global RNG untouched; works on the meta device.
    """
    layer = nn.utils.skip_init(Linear, n_in, n_out, device=torch.get_default_device())
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
