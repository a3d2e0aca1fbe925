"""Running many tasks: worker processes, locks, SLURM arrays."""
