"""The engines of ``vjepa-fast bench`` and of the scripts in benchmarks/."""
