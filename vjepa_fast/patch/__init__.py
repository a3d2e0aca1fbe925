"""The parts of this package in other people's training code: `vjepa2` puts them into a module of FAIR's kind.

What is replaced is compared with what it replaces when it is first used; a difference is an error, not a warning.
"""

from vjepa_fast.patch.modules import vjepa2

__all__ = ["vjepa2"]
