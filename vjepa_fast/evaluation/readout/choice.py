"""A readout chosen on validation classes and fitted on base clips, then read on novel classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from vjepa_fast.errors import ConfigError, DataError
from vjepa_fast.evaluation.controls import pixel_features
from vjepa_fast.evaluation.extract.clips import Source
from vjepa_fast.evaluation.extract.features import Features, Taking, extract_poolings, poolings_of
from vjepa_fast.evaluation.fewshot.episodes import EpisodeResult
from vjepa_fast.evaluation.fewshot.protocols import EPISODE_PROTOCOLS, EpisodeProtocol, evaluate_episodes
from vjepa_fast.evaluation.readout.attentive import AttentivePooling, Collector, Pooled, train_attentive
from vjepa_fast.evaluation.readout.readout import ATTENTIVE, PIXELS, Readout, cosine_readouts, logistic_readouts
from vjepa_fast.evaluation.readout.transform import Transform
from vjepa_fast.models.vit import VisionTransformer

if TYPE_CHECKING:
    from typing_extensions import Unpack

Key: TypeAlias = tuple[str, str]
Bank: TypeAlias = Mapping[Key, Features]  # the features of one part by (level, pooling)
Encoder: TypeAlias = VisionTransformer | str | None  # an encoder, "pixels", or None where parts are Banks
Part: TypeAlias = Source | Bank
LOGISTIC_OF = 3  # so many of the best cosine readouts are tried with logistic regression too


@dataclass(frozen=True)
class Scored:
    """A candidate with its accuracies on episodes of the validation classes, by number of shots; ``score``: their
    mean.
    """

    readout: Readout
    by_shot: dict[int, float]

    @property
    def score(self) -> float:
        """Mean over the numbers of shots, in [0, 1]."""
        return sum(self.by_shot.values()) / len(self.by_shot)

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return {"name": self.readout.name, "score": self.score, "by_shot": {str(k): v for k, v in self.by_shot.items()}}


@dataclass(frozen=True)
class Choice:
    """A readout fitted on the base clips of one encoder, with the ``table`` of candidates that it was chosen from.

    ``table``: best first, empty where the readout was given. ``notes``: candidates that were left out, and why.
    ``validation``: the episodes of the validation classes; None where the readout was given.
    """

    readout: Readout
    transform: Transform = field(repr=False)
    attentive: AttentivePooling | None = field(default=None, repr=False)
    table: tuple[Scored, ...] = field(default=(), repr=False)
    notes: tuple[str, ...] = ()
    validation: EpisodeProtocol | None = None

    @property
    def text(self) -> str:
        """One line for people."""
        if not self.table or self.validation is None:
            return f"readout {self.readout.name} (given)"
        best, rule = self.table[0], self.validation
        shots = " and ".join(f"{100 * a:.1f} at {k}" for k, a in best.by_shot.items())
        return (
            f"readout {self.readout.name}, chosen from {len(self.table)} on {rule.way}-way episodes of the validation "
            f"classes ({shots} shot{'' if list(best.by_shot) == [1] else 's'})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        rule = self.validation
        names = ("way", "shots", "queries", "episodes", "seed")
        return {
            "readout": self.readout.to_dict(),
            "candidates": [s.to_dict() for s in self.table],
            "validation": None if rule is None else {k: getattr(rule, k) for k in names},
            "notes": list(self.notes),
        }


def choose(
    encoder: Encoder,
    base: Part,
    val: Part,
    *,
    candidates: Sequence[Readout] | None = None,
    attentive: bool = True,
    episodes: int = 300,
    seed: int = 0,
    **how: Unpack[Taking],
) -> Choice:
    """The readout with the best accuracy on episodes of the validation classes, the same rule for every encoder.

    ``encoder``: a VisionTransformer, "pixels" (the raw-pixel control), or None where ``base`` and ``val`` are features
    by (level, pooling). ``base``: clips whose mean and standard deviation the transforms take, and whose labels train
    the attentive pooling (``attentive=False``: then no labels of them are read). ``how``: as `extract_features`; each
    part passes through the encoder once.

    Episodes: as many ways as ``val`` has classes, at most 5, with 1 and 5 shots (as far as the smallest class allows);
    the score is the mean of both accuracies, ties go to the candidate that comes first, which is the simpler. Without
    ``candidates`` all levels, poolings and transforms are scored with cosine prototypes, then the best `LOGISTIC_OF`
    with logistic regression.

    Raises:
        DataError: features that are not finite, fewer than two validation classes, too few clips per class.
        ConfigError: candidates that these parts do not have.
    """
    validation_rule(val, episodes, seed)  # before any clip is encoded
    if candidates is None:
        keys = _keys_of(encoder, base, attentive)
    else:
        keys = list(dict.fromkeys(r.key for r in candidates))
    base_bank, pooling, notes = _take_base(encoder, base, keys, seed, how)
    if notes and candidates is not None:
        raise DataError(f"readout: {notes[0]}")
    val_bank = _take(encoder, val, list(base_bank), pooling, how)
    for bank in (base_bank, val_bank):
        for features in bank.values():
            features.check_finite()
    rule = validation_rule(val_bank, episodes, seed)  # of the clips that could be read
    transforms: dict[tuple[Key, str], Transform] = {}

    def score(readout: Readout) -> Scored:
        at = readout.key, readout.transform
        if at not in transforms:
            transforms[at] = Transform.fit(readout.transform, base_bank[readout.key])
        classifier, options = readout.episodes
        results = evaluate_episodes(transforms[at](val_bank[readout.key]), rule, classifier, **options)
        return Scored(readout, {r.shot: r.mean for r in results})

    if candidates is None:
        table = _ranked(map(score, cosine_readouts(list(base_bank))))
        table = _ranked([*table, *map(score, logistic_readouts([s.readout for s in table[:LOGISTIC_OF]]))])
    else:
        table = _ranked(map(score, candidates))
    best = table[0].readout
    kept = pooling if best.key == ATTENTIVE else None
    return Choice(best, transforms[best.key, best.transform], kept, tuple(table), tuple(notes), rule)


def fit(encoder: Encoder, readout: Readout, base: Part | None, *, seed: int = 0, **how: Unpack[Taking]) -> Choice:
    """A given readout fitted on the base clips of an encoder, to `read` with. Raises as `choose`."""
    if not readout.fitted:
        return Choice(readout, Transform(readout.transform))
    if base is None:
        raise DataError(f"readout {readout.name}: it is fitted on base clips, and there are none; give --base")
    bank, attentive, notes = _take_base(encoder, base, [readout.key], seed, how)
    if notes:
        raise DataError(f"readout {readout.name}: {notes[0]}")
    return Choice(readout, Transform.fit(readout.transform, bank[readout.key]), attentive)


def readout_features(encoder: Encoder, choice: Choice, part: Part, **how: Unpack[Taking]) -> Features:
    """The features of ``part`` as the chosen readout takes and transforms them."""
    key = choice.readout.key
    return choice.transform(_take(encoder, part, [key], choice.attentive, how)[key])


def read(
    encoder: Encoder,
    choice: Choice,
    novel: Part,
    protocol: EpisodeProtocol = EPISODE_PROTOCOLS["action"],
    **how: Unpack[Taking],
) -> list[EpisodeResult]:
    """Accuracies on episodes of the novel classes, one per number of shots of ``protocol``: the one time that they are
    read.
    """
    classifier, options = choice.readout.episodes
    return evaluate_episodes(readout_features(encoder, choice, novel, **how), protocol, classifier, **options)


def validation_rule(val: Part, episodes: int, seed: int) -> EpisodeProtocol:
    """The episodes of the validation classes, by their labels alone; DataError where there is nothing to choose on."""
    labels, name = labels_of(val)
    classes, counts = np.unique(labels, return_counts=True)
    if len(classes) < 2:
        raise DataError(f"{name}: {len(classes)} validation classes; choosing a readout needs at least two")
    smallest = int(counts.min())
    if smallest < 2:
        raise DataError(f"{name}: a class has {smallest} clips; choosing a readout needs at least two of each class")
    shots = (1, 5) if smallest >= 7 else (1,)
    queries = min(10, smallest - max(shots))
    return EpisodeProtocol("readout", min(5, len(classes)), shots, queries, episodes, seed)


def labels_of(part: Part) -> tuple[np.ndarray, str]:
    """(labels int ``[n]``, name) of clips or of features."""
    if isinstance(part, Mapping):
        if not part:
            raise DataError("readout: no features were given")
        features = next(iter(part.values()))
        return features.y, features.name
    return np.asarray(part.labels), part.name


def _ranked(scored) -> list[Scored]:
    return sorted(scored, key=lambda s: -s.score)  # stable: ties stay in the order of the candidates


# ---------------------------------------------------------------- features


def _keys_of(encoder: Encoder, base: Part, attentive: bool) -> list[Key]:
    """The levels and poolings that there are, simplest first."""
    if isinstance(base, Mapping):
        return list(base)
    if encoder is None or isinstance(encoder, str):
        return [PIXELS]
    return [*poolings_of(encoder), *([ATTENTIVE] if attentive else [])]


def _take(
    encoder: Encoder, part: Part, keys: Sequence[Key], attentive: AttentivePooling | None, how: Taking
) -> dict[Key, Features]:
    """Features of ``part`` by key, one pass; those of ``attentive`` too where it is given."""
    if isinstance(part, Mapping):
        if absent := [key for key in keys if key not in part]:
            raise ConfigError(f"readout: no features of {'/'.join(absent[0])} in {labels_of(part)[1]}")
        return {key: part[key] for key in keys}
    if encoder is None or isinstance(encoder, str):
        if encoder != "pixels":
            raise ConfigError(f"readout: encoder {encoder!r}; give an encoder or 'pixels', or features of each part")
        taken: Any = {k: v for k, v in how.items() if k in ("batch_size", "workers", "num_frames", "crop_size") and v}
        features = pixel_features(part, **taken)
        if wrong := [key for key in keys if key != PIXELS]:
            raise ConfigError(f"readout: raw pixels have no {'/'.join(wrong[0])}, only {'/'.join(PIXELS)}")
        return {PIXELS: features}
    if PIXELS in keys:
        raise ConfigError(f"readout: {'/'.join(PIXELS)} belongs to the raw-pixel control, not to an encoder")
    visit = None if attentive is None else Pooled(attentive)
    wanted = [key for key in keys if key != ATTENTIVE]
    bank = extract_poolings(encoder, part, wanted, visit=visit, **how)
    return bank if visit is None else {**bank, ATTENTIVE: visit.features(part.name)}


def _take_base(
    encoder: Encoder, base: Part, keys: Sequence[Key], seed: int, how: Taking
) -> tuple[dict[Key, Features], AttentivePooling | None, list[str]]:
    """(features by key, the attentive pooling trained on them where it is among the keys, notes of what is left
    out).
    """
    if ATTENTIVE not in keys or isinstance(base, Mapping) or isinstance(encoder, str) or encoder is None:
        return _take(encoder, base, keys, None, how), None, []
    collector, wanted = Collector(len(base.labels)), [key for key in keys if key != ATTENTIVE]
    if len(np.unique(base.labels)) < 2:
        note = f"attentive pooling left out: {base.name} has fewer than two classes to train it on"
        return (_take(encoder, base, wanted, None, how) if wanted else {}), None, [note]
    bank = extract_poolings(encoder, base, wanted, visit=collector, **how)
    if collector.note:
        return bank, None, [collector.note]
    tokens, y = collector.contents()
    attentive = train_attentive(tokens, y, seed=seed)
    bank[ATTENTIVE] = Features(attentive(tokens).numpy(), y, base.name)
    return bank, attentive, []
