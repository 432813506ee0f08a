import numpy as np
import pytest
import torch

from effvit.data.loading.augmentation import Augmentation, Draws, augment, draw
from effvit.data.loading.randaugment import VARIANTS
from effvit.data.loading.transforms import to_float

ALL = {"crop_padding": 2, "randaugment": 9, "random_erasing": 0.5, "mixup": 0.8, "cutmix": 1.0}


def draws(count=4000, seed=0, flip=True, **changes):
    return draw(np.random.default_rng(seed), count, 32, Augmentation(**(ALL | {"horizontal_flip": flip} | changes)))


def about(counts, probability, n):
    return (counts.double() - n * probability).abs().max() < 5 * (n * probability * (1 - probability)) ** 0.5


def test_every_choice_is_equally_likely():
    drawn = draws()
    n = drawn.flipped.numel()
    assert about(torch.bincount(drawn.offsets[0] * 5 + drawn.offsets[1], minlength=25), 1 / 25, n)
    assert about(drawn.flipped.sum(), 1 / 2, n)
    assert about(torch.bincount(drawn.choices.flatten(), minlength=len(VARIANTS)), 1 / len(VARIANTS), 2 * n)


def test_erased_boxes_have_the_areas_and_ratios_of_the_paper_and_lie_inside():
    top, left, height, width = draws(random_erasing=0.3).boxes
    erased = height > 0
    assert about(erased.sum(), 0.3, len(erased))
    top, left, height, width = (side[erased].double() for side in (top, left, height, width))
    assert (top >= 0).all() and (left >= 0).all() and (top + height <= 32).all() and (left + width <= 32).all()
    area, ratio = height * width / 32**2, height / width
    assert area.min() > 0.01 and area.max() < 0.37, "0.02 to 0.33 but for whole pixels"
    assert ratio.min() > 1 / 4.5 and ratio.max() < 4.5
    assert abs(area.mean() - (0.02 + 0.33) / 2) < 0.01
    assert abs(ratio.log().mean()) < 0.1, "upright as often as lying"


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mixing_is_what_the_recipe_says_with_shares_from_the_beta_distribution(mixup, cutmix):
    mixings = [draws(count=2, seed=seed, mixup=mixup, cutmix=cutmix).mixing for seed in range(2000)]
    shares = [mixing for mixing in mixings if isinstance(mixing, float)]
    assert about(torch.tensor(len(shares)), {(0.8, 0.0): 1, (0.0, 1.0): 0}.get((mixup, cutmix), 0.5), 2000) or (
        len(shares) in (0, 2000) and not (mixup and cutmix)
    )
    if shares:
        assert abs(np.mean(shares) - 0.5) < 0.05
        assert np.var(shares) == pytest.approx(1 / (4 * (2 * 0.8 + 1)), rel=0.15)  # of Beta(a, a)
    for top, left, height, width in (mixing for mixing in mixings if not isinstance(mixing, float)):
        assert 0 <= top <= top + height <= 32 and 0 <= left <= left + width <= 32


def test_nothing_is_drawn_for_what_is_off():
    drawn = draw(np.random.default_rng(0), 8, 32, Augmentation())
    assert drawn == Draws()


def test_parts_of_a_batch_are_augmented_as_the_whole_is(digits):
    images, labels = digits.split("train")
    images, labels = torch.from_numpy(images[:30]), torch.from_numpy(labels[:30])
    for seed in range(4):  # mixup and CutMix
        drawn = draw(np.random.default_rng(seed), 30, 16, Augmentation(**ALL, horizontal_flip=True))
        whole = augment(images, labels, drawn, Augmentation(**ALL), digits)
        parts = [
            augment(images[part], labels[part], drawn.share(part), Augmentation(**ALL), digits)
            for part in (slice(0, 4), slice(4, 18), slice(18, 30))
        ]
        for index in (0, 1):
            torch.testing.assert_close(torch.cat([part[index] for part in parts]), whole[index], rtol=0, atol=0)
        assert whole[1].sum(dim=1).allclose(torch.ones(30))


def test_without_augmentation_a_batch_is_normalised_and_no_more(digits):
    images, labels = digits.split("train")
    images, labels = torch.from_numpy(images[:5]), torch.from_numpy(labels[:5])
    inputs, targets = augment(images, labels, Draws(), Augmentation(), digits)
    assert torch.equal(inputs, to_float(images, digits.mean, digits.std)) and torch.equal(targets, labels)
