"""Launches trainings on machines elsewhere: TPU slices, Kubernetes, Slurm, and clouds through SkyPilot."""
