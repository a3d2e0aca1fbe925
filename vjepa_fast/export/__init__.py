"""Encoders for other programs: ``export_encoder`` writes one, reads it back and compares (docs/export.md)."""

from vjepa_fast.export.api import FORMATS, Exported, Format, export_encoder
from vjepa_fast.export.plain import FixedEncoder, plain_encoder

__all__ = ["FORMATS", "Exported", "FixedEncoder", "Format", "export_encoder", "plain_encoder"]
