"""The cost of a program on a TPU, from the real TPU compiler, on a machine without a TPU.

Call ``prepare_environment`` first, before JAX starts a backend; lower the program over the mesh of
``mesh_for`` (or another mesh of ``devices_for``) with abstract arguments; pass the compiled result to
``analyse``.
"""

from tools.preflight.report import Report, analyse
from tools.preflight.topology import devices_for, mesh_for, prepare_environment

__all__ = ["Report", "analyse", "devices_for", "mesh_for", "prepare_environment"]
