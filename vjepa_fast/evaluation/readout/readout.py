"""A readout: how clips become class scores, from the encoder's levels to the classifier, with a name."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from vjepa_fast.errors import ConfigError
from vjepa_fast.evaluation.choices import check_choice
from vjepa_fast.evaluation.extract.features import CLS, LEVELS, POOLINGS
from vjepa_fast.evaluation.readout.transform import TRANSFORMS

PIXELS = ("input", "pixels")  # level and pooling of the raw-pixel control
ATTENTIVE = ("last", "attentive")
SUMMARY = ("last", CLS)
CLASSIFIERS = ("cosine", "logistic")
CS = (0.1, 1.0, 10.0)  # of logistic regression, which reads unit vectors


@dataclass(frozen=True)
class Readout:
    """``level`` and ``pooling`` of the tokens, ``transform`` (`Transform`) and ``classifier`` of the pooled features.

    ``pooling``: one of `POOLINGS`, "attentive" or "cls", the class token (both last level); raw pixels are level
    "input", pooling "pixels".
    ``classifier``: "cosine", the nearest prototype by cosine, or "logistic", logistic regression of the shots with the
    penalty ``c``. ConfigError for unknown names and a ``c`` that is missing or not read.
    """

    level: str = "last"
    pooling: str = "time"
    transform: str = "none"
    classifier: str = "cosine"
    c: float | None = None

    def __post_init__(self) -> None:
        if self.key not in (PIXELS, ATTENTIVE, SUMMARY):
            check_choice("level of a readout", self.level, LEVELS)
            check_choice("pooling of a readout", self.pooling, POOLINGS)
        check_choice("transform of a readout", self.transform, TRANSFORMS)
        check_choice("classifier of a readout", self.classifier, CLASSIFIERS)
        if (self.classifier == "logistic") != (self.c is not None) or (self.c is not None and not self.c > 0):
            raise ConfigError(f"readout: C is {self.c}; logistic has a positive one (logistic=1), cosine has none")

    @property
    def key(self) -> tuple[str, str]:
        """(level, pooling): which features it reads."""
        return self.level, self.pooling

    @property
    def name(self) -> str:
        """``level/pooling/transform/classifier``, such as ``last/tdiff/standard/cosine`` or ``.../logistic=10``."""
        classifier = self.classifier if self.c is None else f"{self.classifier}={self.c:g}"
        return f"{self.level}/{self.pooling}/{self.transform}/{classifier}"

    @classmethod
    def from_name(cls, name: str) -> Readout:
        """The readout of a `name`; ConfigError where it is none."""
        parts = name.split("/")
        if len(parts) != 4:
            raise ConfigError(
                f"readout {name!r}: expected level/pooling/transform/classifier, such as last/tdiff/standard/cosine"
            )
        classifier, _, c = parts[3].partition("=")
        try:
            penalty = float(c) if c else None
        except ValueError:
            raise ConfigError(f"readout {name!r}: C is {c!r}; expected a number, such as logistic=1") from None
        return cls(parts[0], parts[1], parts[2], classifier, penalty)

    @property
    def fitted(self) -> bool:
        """Whether it takes something from base clips."""
        return self.transform != "none" or self.key == ATTENTIVE

    def to_dict(self) -> dict[str, Any]:
        """Its fields and its name, for JSON."""
        return {**asdict(self), "name": self.name}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Readout:
        """The readout of `to_dict`."""
        return cls(**{k: v for k, v in values.items() if k != "name"})

    @property
    def episodes(self) -> tuple[str, dict[str, Any]]:
        """Classifier and options, as `evaluate_episodes` takes them."""
        return ("prototype", {"metric": "cosine"}) if self.c is None else ("logistic", {"c": self.c})


def cosine_readouts(keys: list[tuple[str, str]]) -> list[Readout]:
    """One readout per level, pooling and transform with cosine prototypes, simplest first."""
    return [Readout(*key, transform) for transform, key in product(TRANSFORMS, keys)]


def logistic_readouts(best: list[Readout]) -> list[Readout]:
    """Logistic regression on unit vectors of the level, pooling and transform of each of ``best``."""
    kinds = dict.fromkeys((r.key, r.transform.removesuffix("+l2")) for r in best)
    return [
        Readout(*key, f"{transform}+l2", "logistic", c)
        for (key, transform), c in product(kinds, CS)
        if f"{transform}+l2" in TRANSFORMS
    ]
