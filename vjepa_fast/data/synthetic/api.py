"""What a suite is: a frozen dataclass of parameters that names its classes and draws a clip of each.

Adding one: derive from `Suite`, then ``SUITES.add("mine", Mine())`` in a plugin; ``vjepa-fast synthetic mine`` renders
it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from vjepa_fast.data.synthetic import raster
from vjepa_fast.registry import Registry

Rendered = tuple[np.ndarray, dict[str, Any]]  # frames, and what they were drawn with


@dataclass(frozen=True)
class Suite(ABC):
    """Parameters of a suite; derived classes are frozen dataclasses too, and all fields have defaults.

    Attributes:
        name: as registered.
        modality: "video" or "image".
    """

    name: ClassVar[str]
    modality: ClassVar[str] = "video"

    @property
    @abstractmethod
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; the label is the position."""

    @property
    def factors(self) -> tuple[tuple[int, ...], ...]:
        """Of each class, what it is composed of, as numbers from 0 (a shape, a colour, a motion); here the class alone.

        An encoder that is trained with labels learns classes that are combinations by their factors.
        """
        return tuple((label,) for label in range(len(self.classes)))

    def split_labels(self, split: str) -> tuple[int, ...]:
        """Labels that occur in a split: all of them, unless classes are split. ValueError for an unknown split."""
        return tuple(range(len(self.classes)))

    @property
    def few_shot(self) -> bool:
        """Whether no class is in both train and test: train has base classes, val and test have novel ones."""
        return set(self.split_labels("train")).isdisjoint(self.split_labels("test"))

    @abstractmethod
    def render(self, rng: np.random.Generator, size: int, frames: int, label: int) -> Rendered:
        """Draw one clip of the class ``label``.

        Args:
            rng: the only source of randomness; how much is drawn from it should not depend on ``label``.
            size: pixels of each side.
            frames: number of frames; an image suite gives one.
            label: the class.

        Returns:
            Frames ``[F, size, size, 3]`` in 0..1, and plain values (for JSON) that describe the clip.
        """


def _check(name: str, suite: Suite) -> None:
    if not isinstance(suite, Suite) or suite.name != name:
        raise TypeError(f"synthetic suite {name!r} must be an instance of a vjepa_fast.data.synthetic.Suite so named")


SUITES: Registry[Suite] = Registry("synthetic suite", check=_check)


def render_clip(
    suite: str | Suite, rng: np.random.Generator, size: int = 64, frames: int = 16, label: int | None = None
) -> tuple[np.ndarray, int, dict[str, Any]]:
    """Render one clip of a suite: a registered name (`SUITES`), or a suite's dataclass with other parameters.

    Everything random comes from ``rng``, and never depends on ``label`` (None draws one): the same generator state with
    two labels gives the same appearance.

    Returns:
        frames uint8 ``[F, size, size, 3]`` (one of an image), the label, and plain values that describe the clip.

    Raises:
        ConfigError: no suite of that name.
        ValueError: no such label.
    """
    suite = SUITES.get_named(suite, "suite") if isinstance(suite, str) else suite
    drawn = int(rng.integers(len(suite.classes)))
    label = drawn if label is None else int(label)
    if not 0 <= label < len(suite.classes):
        raise ValueError(f"label {label} of suite {suite.name}: it has the classes 0 to {len(suite.classes) - 1}")
    clip, attributes = suite.render(rng, size, frames, label)
    return raster.to_uint8(clip), label, {"class": suite.classes[label], **attributes}
