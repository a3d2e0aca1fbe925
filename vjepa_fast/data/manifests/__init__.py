"""Manifests: reading them, making them from folders, checking what they list."""
