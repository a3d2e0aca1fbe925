"""Measuring: whole training steps (`vjepa-fast bench step`), and the helpers of benchmarks/."""
