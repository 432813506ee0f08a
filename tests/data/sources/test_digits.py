import numpy as np
import pytest
from sklearn.datasets import load_digits

from effvit.data.sources.digits import digits
from effvit.errors import UserError


def test_every_digit_is_in_train_or_test_once_with_a_fifth_of_each_class_in_test():
    source = digits(None, 8)  # at the original size no pixel is interpolated
    originals = load_digits()
    found = []
    for split in (source.train, source.test):
        for image, label in zip(split.images, split.labels, strict=True):
            assert np.array_equal(image[..., 0], image[..., 1]) and np.array_equal(image[..., 0], image[..., 2])
            found.append((label, *np.rint(image[..., 0] / 255 * 16).astype(int).ravel()))
    expected = [(t, *i.astype(int).ravel()) for t, i in zip(originals.target, originals.images, strict=True)]
    assert sorted(found) == sorted(expected)
    share = np.bincount(source.test.labels) / np.bincount(originals.target)
    assert np.all(np.abs(share - 0.2) < 0.01)


def test_enlarged_digit_shrinks_back_to_the_original():
    small, large = (next(iter(digits(None, size).train.images)).astype(float) for size in (8, 32))
    shrunk = large.reshape(8, 4, 8, 4, 3).mean((1, 3))
    assert np.corrcoef(shrunk.ravel(), small.ravel())[0, 1] > 0.98


def test_root_is_refused(tmp_path):
    with pytest.raises(UserError, match="leave root out"):
        digits(tmp_path, 32)
