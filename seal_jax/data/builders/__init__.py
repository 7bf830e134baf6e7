"""TFDS builders of this package; importing one of the modules registers it with TFDS."""
