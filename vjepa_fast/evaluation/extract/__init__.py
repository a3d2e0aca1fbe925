"""Frozen features and tokens of a manifest or of clips in memory, cached on disk."""
