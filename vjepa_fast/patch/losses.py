"""The published loss by `ops.latent_loss`: features are compared where they lie, nothing is gathered.

The sum over clips' groups and masks of mean(abs(z - h[mask])^p) / p, divided by the number of pairs (arXiv:2404.08471,
eq. 1). `pairs` is that of V-JEPA and V-JEPA 2; of V-JEPA 2.1 there is a class token before the others, and weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import repeat

import torch
from torch import Tensor

from vjepa_fast import ops
from vjepa_fast.errors import UserError
from vjepa_fast.ops._latent_powers import power_error
from vjepa_fast.patch.compare import different, same, same_gradients, tolerance_of

Lists = Sequence[Sequence[Tensor]]


def mean_loss(
    z: Lists,
    h: Sequence[Tensor],
    masks: Lists,
    loss_exp: float,
    class_token: bool = False,
    weights: Lists | None = None,
) -> Tensor:
    """The mean over groups of clips i and masks j of mean(abs(z_ij - h_i[mask_ij])^p) / p.

    Args:
        z: [B,K,D] each, the predictor's; receives gradient.
        h: [B,N,D] each, the target's; receives none.
        masks: int64 [B,K] each.
        loss_exp: p, at least 1.
        class_token: row 0 of h and of z is a class token, which no mask counts: z [B,1+K,D], h [B,1+N,D].
        weights: [B,K] each, by which a token's loss is divided; not with ``class_token``.

    Returns:
        A scalar.

    Raises:
        ValueError: a shape, dtype or exponent does not fit.
    """
    values: list[Tensor] = []
    for zi, hi, mi, wi in zip(z, h, masks, repeat(None) if weights is None else weights):
        hi = _kept(hi)
        for zij, mij, wij in zip(zi, mi, repeat(None) if wi is None else wi):
            mij = _kept(mij)
            if class_token:
                mij = torch.nn.functional.pad(mij + 1, (1, 0))
            if wij is None:
                values.append(ops.latent_loss(zij, hi, mij, loss_exp=loss_exp))
            else:
                values.append((ops.latent_loss_token(zij, hi, mij, power_error(loss_exp)) / wij).mean())
    return torch.stack(values).sum() / len(values)


def _kept(x: Tensor) -> Tensor:
    """``x``, or a copy that autograd can keep if it was made in inference mode."""
    return x.clone() if x.is_inference() and torch.is_grad_enabled() else x


class Loss:
    """``mean_loss`` in place of a loss; the first call of each kind (class token, weights) also asks the original."""

    def __init__(self, name: str):
        self._name, self._compared = name, set[tuple[bool, bool]]()

    def __call__(
        self,
        original: Callable[..., Tensor],
        z: Lists,
        h: Sequence[Tensor],
        masks: Lists,
        loss_exp: float,
        class_token: bool = False,
        weights: Lists | None = None,
    ) -> Tensor:
        """``mean_loss`` of the arguments after ``original``, which is the loss as a function of z and h."""
        if not isinstance(h, Iterable) or not all(isinstance(hi, Tensor) for hi in h):
            raise UserError(f"{self._name}: h: expected a list of tensors [B,N,D]; leave it as it was")
        if torch.is_grad_enabled() and any(hi.requires_grad for hi in h):
            raise UserError(f"{self._name}: h wants a gradient, which vjepa_fast does not give; leave it as it was")
        weights = None if class_token else weights

        def ours(z: Lists, h: Sequence[Tensor]) -> Tensor:
            return mean_loss(z, h, masks, loss_exp, class_token, weights)

        kind = bool(class_token), weights is not None
        try:
            got = ours(z, h)
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{self._name}: {str(error).splitlines()[0]}; leave it as it was") from error
        if kind not in self._compared:
            self._compare(ours, original, z, h)
            self._compared.add(kind)
        return got

    def _compare(
        self, ours: Callable[..., Tensor], original: Callable[..., Tensor], z: Lists, h: Sequence[Tensor]
    ) -> None:
        """Value and gradient by z; what h and z hang on is not touched."""
        flat = [x for zi in z for x in zi]
        gradients = not any(x.is_inference() for x in flat)
        values, slopes = [], []
        for ask in (ours, original):
            with torch.set_grad_enabled(gradients):
                leaves = [[x.detach().requires_grad_(gradients) for x in zi] for zi in z]
                value = ask(leaves, h)
                if not isinstance(value, Tensor) or value.dim():
                    raise different(self._name)
                if gradients:
                    asked = [x for zi in leaves for x in zi]
                    none = [None] * len(asked)
                    slopes.append(torch.autograd.grad(value, asked, allow_unused=True) if value.requires_grad else none)
            values.append(value.detach())
        tolerance = tolerance_of(*flat, *h)
        same(values[0], values[1], self._name, tolerance)
        if gradients:
            same_gradients(slopes[0], slopes[1], self._name, 3 * tolerance)  # more roundings
