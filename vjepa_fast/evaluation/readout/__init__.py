"""How a frozen encoder is read: pooling, level, transform and classifier, chosen on validation classes.

    choose(encoder, base, val, *, candidates=None, attentive=True, episodes=300, seed=0, **how) -> Choice
    read(encoder, choice, novel, protocol, **how) -> list[EpisodeResult]       novel classes, once
    fit(encoder, readout, base, *, seed=0, **how) -> Choice                    a readout that is given
    readout_features(encoder, choice, part, **how) -> Features

``encoder``: a VisionTransformer, ``"pixels"`` (the raw-pixel control), or None. Parts (``base``, ``val``, ``novel``): a
ClipSet or a data.Manifest; with None features by (level, pooling). ``how``: arguments of `extract_features` (device,
cache_dir, num_frames, ...). ``Choice.readout.name`` is e.g. ``last/tdiff/standard/cosine``; ``Choice.to_dict()`` has
the table of candidates. Rows of a table: ``evaluation.run.rows.readout_rows``.

The rule is the same for every encoder, and `choose` has no argument for novel clips: they cannot be looked at.
"""

from vjepa_fast.evaluation.readout.attentive import AttentivePooling, train_attentive
from vjepa_fast.evaluation.readout.choice import Choice, Scored, choose, fit, read, readout_features
from vjepa_fast.evaluation.readout.readout import Readout
from vjepa_fast.evaluation.readout.transform import TRANSFORMS, Transform

__all__ = [
    "TRANSFORMS",
    "AttentivePooling",
    "Choice",
    "Readout",
    "Scored",
    "Transform",
    "choose",
    "fit",
    "read",
    "readout_features",
    "train_attentive",
]
