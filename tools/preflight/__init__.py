"""What a program costs on a TPU, from the real TPU compiler and with no TPU at hand.

Call ``prepare_environment`` first, before JAX starts a backend; lower the program over the mesh of
``mesh_for`` (or one of your own over ``devices_for``) with abstract arguments; hand the compiled
result to ``analyse``.
"""

from tools.preflight.report import Report, analyse
from tools.preflight.topology import devices_for, mesh_for, prepare_environment

__all__ = ["Report", "analyse", "devices_for", "mesh_for", "prepare_environment"]
