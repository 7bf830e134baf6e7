"""The command line: ``python -m seal_jax COMMAND``."""
