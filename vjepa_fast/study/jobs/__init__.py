"""Running jobs: locks, processes on this machine, SLURM arrays, and a pool for graphs of tasks."""
