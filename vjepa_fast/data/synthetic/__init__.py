"""Synthetic suites: videos and images whose appearance and motion vary apart, rendered to real files.

``SUITES`` has them by name; ``render_clip`` returns arrays, ``render_suite`` writes .mp4 / .jpg with manifests.
"""

from vjepa_fast.data.synthetic.api import SUITES, Suite, render_clip
from vjepa_fast.data.synthetic.suites import Dive, FewMotion, FewShot, Motion8, Objects, Order, TextureConfig
from vjepa_fast.data.synthetic.write import render_suite, suite_values

__all__ = [
    "SUITES",
    "Dive",
    "FewMotion",
    "FewShot",
    "Motion8",
    "Objects",
    "Order",
    "Suite",
    "TextureConfig",
    "render_clip",
    "render_suite",
    "suite_values",
]
