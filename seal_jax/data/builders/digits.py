"""TFDS builder ``digits``: scikit-learn's 8x8 handwritten digits.

The 1,797 images ship inside scikit-learn, so this data set needs neither network nor TensorFlow.
"""

import io

import numpy as np
import tensorflow_datasets as tfds

TEST_EVERY = 5


def _png(image: np.ndarray) -> io.BytesIO:
    from PIL import Image

    # TFDS writes encoded bytes as they are; it would need TensorFlow to encode an array.
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    buffer.seek(0)
    return buffer


class Digits(tfds.core.GeneratorBasedBuilder):
    """Images uint8 ``(8, 8, 1)`` (0..16 scaled to 0..255), ten classes.

    Every fifth sample, from index 0, is a test example: 360 test and 1,437 training examples, each
    split in scikit-learn's order.
    """

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="The test part of UCI's optical recognition of handwritten digits.",
            homepage="https://archive.ics.uci.edu/dataset/80",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(False), "test": self._generate_examples(True)}

    def _generate_examples(self, test: bool):
        from sklearn.datasets import load_digits

        digits = load_digits()
        scaled = np.round(digits.images * (255 / 16)).astype(np.uint8)
        for index, (image, label) in enumerate(zip(scaled, digits.target, strict=True)):
            if (index % TEST_EVERY == 0) == test:
                yield index, {"image": _png(image), "label": int(label)}
