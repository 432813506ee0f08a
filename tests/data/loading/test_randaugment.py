import pytest
import torch
from torchvision.transforms import v2

from effvit.data.loading import randaugment_by_tables
from effvit.data.loading.randaugment import LARGEST, OPERATIONS, VARIANTS, randaugment
from effvit.data.loading.randaugment_by_tables import by_tables

IMAGES = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("magnitude", [1, 9, LARGEST])
@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_is_that_of_torchvision(name, magnitude):
    peer = v2.RandAugment(magnitude=magnitude)
    strengths, signed = peer._AUGMENTATION_SPACE[name]
    strength = strengths(peer.num_magnitude_bins, 16, 16)
    for sign in (1, -1):
        value = 0.0 if strength is None else float(strength[magnitude]) * (sign if signed else 1)
        expected = peer._apply_image_or_video_transform(IMAGES, name, value, peer.interpolation, peer._fill)
        got = OPERATIONS[name](IMAGES, sign * magnitude / LARGEST)
        assert (got.int() - expected.int()).abs().max() <= 1, "rounding of a strength apart"


def test_operations_are_those_of_torchvision():
    assert set(OPERATIONS) == set(v2.RandAugment._AUGMENTATION_SPACE)


def test_each_image_has_its_own_operations_one_after_another():
    choices = torch.randint(len(VARIANTS), (2, 6), generator=torch.Generator().manual_seed(1))
    before = IMAGES.clone()
    result = randaugment(IMAGES, choices, 9)
    for image, first, second, got in zip(IMAGES, *choices.tolist(), result, strict=True):
        for number in (first, second):
            operation, sign = VARIANTS[number]
            image = operation(image[None], sign * 9 / LARGEST)[0]
        assert torch.equal(got, image)
    assert torch.equal(IMAGES, before)


@pytest.mark.parametrize("magnitude", [1, 9, LARGEST])
@pytest.mark.parametrize("shape", [(16, 16), (9, 14)])
def test_by_tables_every_pixel_is_that_of_the_operations(magnitude, shape):
    generator = torch.Generator().manual_seed(magnitude)
    images = torch.randint(0, 256, (2 * len(VARIANTS), 3, *shape), dtype=torch.uint8, generator=generator)
    images[::5] = images[::5] // 4 + 90  # few levels, in the middle
    images[::11, 1] = 77  # a channel of one level
    choices = torch.arange(len(VARIANTS)).repeat(2)
    choices = torch.stack([choices, choices[torch.randperm(len(choices), generator=generator)]])
    assert torch.equal(by_tables(images, choices, magnitude), randaugment(images, choices, magnitude))


def test_many_images_are_done_in_parts_that_fit_and_each_as_it_would_be(monkeypatch):
    choices = torch.randint(len(VARIANTS), (2, 6), generator=torch.Generator().manual_seed(3))
    whole = by_tables(IMAGES, choices, 9)
    monkeypatch.setattr(randaugment_by_tables, "_MOST_VALUES", 4 * IMAGES[0].numel() + 1)
    assert torch.equal(by_tables(IMAGES, choices, 9), whole)
    monkeypatch.setattr(randaugment_by_tables, "_MOST_VALUES", 1)
    assert torch.equal(by_tables(IMAGES, choices, 9), whole)
    assert by_tables(IMAGES[:0], choices[:, :0], 9).shape == (0, 3, 16, 16)
