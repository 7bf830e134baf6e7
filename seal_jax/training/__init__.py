"""The trainer: state, compiled programs, loop, checkpoints and metrics of a run."""
