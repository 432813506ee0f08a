"""scikit-learn's digits: 1,797 real handwritten digits, 8x8 grey, that come with the package."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from effvit.data.sources.base import Source, Split
from effvit.data.sources.holdout import hold_out
from effvit.data.sources.images import fit
from effvit.data.sources.layout import BY_CONTENT, Choices
from effvit.errors import UserError

_TEST_EVERY = 5  # there is no official test split: one digit in five of each class
_WHITE = 16  # pixels are whole numbers from 0 to 16


def digits(root: Path | None, image_size: int, choices: Choices = BY_CONTENT) -> Source:
    """Digits as RGB images ``image_size`` pixels square; there is no root to read and nothing to choose."""
    from sklearn.datasets import load_digits

    if root is not None:
        raise UserError(f"root={root}: the digits come with scikit-learn, leave root out")
    if choices != BY_CONTENT:
        raise UserError("the digits have one form and one split; leave out what chooses among files")
    images, labels = load_digits(return_X_y=True)
    grey = np.rint(images.reshape(-1, 8, 8) * (255 / _WHITE)).astype(np.uint8)
    train, test = (
        _split(grey[indices], labels[indices], image_size) for indices in hold_out(labels, every=_TEST_EVERY)
    )
    return Source("scikit-learn load_digits", tuple("0123456789"), train, test)


def _split(grey: np.ndarray, labels: np.ndarray, image_size: int) -> Split:
    notes = Counter({"grayscale converted to RGB": len(grey), "resized": len(grey)})
    return Split(labels.astype(np.int64), _enlarge(grey, image_size), notes)


def _enlarge(grey: np.ndarray, image_size: int) -> Iterator[np.ndarray]:
    for image in grey:
        enlarged = fit(Image.fromarray(image), image_size)  # (S, S)
        yield np.repeat(enlarged[:, :, None], 3, axis=2)
