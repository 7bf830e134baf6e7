"""TFDS builders of this package; importing it registers all of them with TFDS."""

from seal_jax.data.builders import digits, image_folder, originals

__all__ = ["digits", "image_folder", "originals"]
