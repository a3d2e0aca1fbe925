"""Probes of frozen features and tokens, by name.

A probe is a class that is called with the training, validation and test part of a data set and returns a `ProbeResult`.
It registers under a name in `PROBES` and is then usable as ``vjepa-fast probe --probes NAME``.
"""

from vjepa_fast.evaluation.probes.probe import PROBES, Probe, ProbeOptions, ProbeResult, checked_parts, result_of

__all__ = ["PROBES", "Probe", "ProbeOptions", "ProbeResult", "checked_parts", "result_of"]
