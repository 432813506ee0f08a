import numpy as np
import pytest
import torch

from effvit.data.loading import batches as module
from effvit.data.loading import resident
from effvit.data.loading.ahead import ahead
from effvit.data.loading.augmentation import Augmentation
from effvit.data.loading.batches import Place, training_batches, validation_batches
from effvit.data.loading.transforms import to_float

CPU = torch.device("cpu")
AUGMENTATION = Augmentation(crop_padding=1, mixup=0.5, random_erasing=0.2)


def batches(digits, place=Place(CPU), augmentation=AUGMENTATION, **where):  # noqa: B008
    return list(training_batches(digits, augmentation, place, batch_size=68, **({"seed": 0, "epoch": 0} | where)))


def images_of(batches):
    return torch.cat([batch.images for batch in batches])


def test_an_epoch_has_every_training_image_once_in_an_order_of_its_own(digits):
    images, labels = digits.split("train")
    expected = to_float(torch.from_numpy(images[np.arange(len(images))]), digits.mean, digits.std).flatten(1)
    orders = []
    for where in ({}, {"epoch": 1}, {"seed": 1}):
        epoch = batches(digits, augmentation=Augmentation(), **where)
        assert [batch.total for batch in epoch] == [68] * 19 + [1]
        flat = images_of(epoch).flatten(1)
        assert torch.equal(flat.sort(dim=0).values, expected.sort(dim=0).values)
        targets = torch.cat([batch.targets for batch in epoch])
        assert torch.equal(targets.bincount(), torch.from_numpy(labels).bincount())
        orders.append(flat.sum(dim=1))
    assert not torch.equal(orders[0], orders[1]) and not torch.equal(orders[0], orders[2])


def test_an_epoch_entered_late_goes_on_as_it_would_have(digits):
    whole, late = batches(digits), batches(digits, start=7)
    assert len(late) == len(whole) - 7
    for one, other in zip(whole[7:], late, strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.targets, other.targets)


@pytest.mark.parametrize("world", [2, 3])
def test_shares_of_all_processes_are_the_batches_of_one(digits, world):
    whole = batches(digits)
    shares = zip(*(batches(digits, Place(CPU, rank, world)) for rank in range(world)), strict=True)
    for one, parts in zip(whole, shares, strict=True):
        assert torch.equal(images_of(parts), one.images)
        assert {part.total for part in parts} == {one.total}


@pytest.mark.parametrize("world", [1, 2, 5])
def test_validation_has_every_image_once_as_it_is(digits, world):
    images, labels = digits.split("validation")
    shares = [list(validation_batches(digits, Place(CPU, rank, world), batch_size=68)) for rank in range(world)]
    together = [part for step in zip(*shares, strict=True) for part in step]
    assert torch.equal(images_of(together), to_float(torch.from_numpy(images[:]), digits.mean, digits.std))
    assert torch.equal(torch.cat([part.targets for part in together]), torch.from_numpy(labels))


@pytest.mark.parametrize("world", [1, 3])
def test_a_split_that_stays_on_the_device_gives_the_same_batches(digits, monkeypatch, world):
    places = [Place(CPU, rank, world) for rank in range(world)]
    of_validation = [list(validation_batches(digits, place, batch_size=68)) for place in places]
    of_training = [batches(digits, place) for place in places]
    monkeypatch.setattr(resident, "_room", lambda device: 2**30)
    monkeypatch.setattr(type(digits.split("train")[0]), "batches", None)  # nothing is read any more
    again = [list(validation_batches(digits, place, batch_size=68)) for place in places]
    for one, other in zip(
        of_validation + of_training, again + [batches(digits, place) for place in places], strict=True
    ):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert torch.equal(a.images, b.images) and torch.equal(a.targets, b.targets) and a.total == b.total


def test_batches_made_a_batch_ahead_are_the_same(digits, monkeypatch):
    of_training, of_validation = batches(digits), list(validation_batches(digits, Place(CPU), batch_size=68))
    monkeypatch.setattr(module, "_in_time", lambda items, device: ahead(items))  # as on a GPU
    again = [*batches(digits), *validation_batches(digits, Place(CPU), batch_size=68)]
    for one, other in zip([*of_training, *of_validation], again, strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.targets, other.targets)


def test_a_split_stays_only_where_it_is_small_and_is_moved_once(digits, monkeypatch):
    size = digits.split("train")[0][:].nbytes
    assert resident.resident(digits, "train", CPU) is None
    monkeypatch.setattr(resident, "_room", lambda device: size - 1)
    assert resident.resident(digits, "train", CPU) is None
    monkeypatch.setattr(resident, "_room", lambda device: size)
    assert resident.resident(digits, "train", CPU) is resident.resident(digits, "train", CPU)
