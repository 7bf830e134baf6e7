"""The trainer: state, compiled steps, loop, checkpoints and metrics of a run."""
