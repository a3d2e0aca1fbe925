"""Synthetic suites: videos and images whose appearance and motion vary apart, rendered to real files.

``render_clip`` gives arrays; ``render_suite`` writes .mp4 / .jpg with manifests.
"""

from vjepa_fast.data.synthetic.render import render_clip
from vjepa_fast.data.synthetic.suites import SUITES, Dive, FewShot, Motion8, Objects, Order, Suite, TextureConfig
from vjepa_fast.data.synthetic.write import render_suite

__all__ = [
    "SUITES",
    "Dive",
    "FewShot",
    "Motion8",
    "Objects",
    "Order",
    "Suite",
    "TextureConfig",
    "render_clip",
    "render_suite",
]
