import itertools

import torch

from effvit.seeding import Purpose, derive, numpy_generator, torch_generator


def test_every_purpose_and_place_has_a_seed_of_its_own():
    places = itertools.product(range(5), Purpose, range(5), range(5))
    assert len({derive(*place) for place in places}) == 5 * len(Purpose) * 25


def test_the_same_place_has_the_same_numbers():
    here = (7, Purpose.AUGMENTATION, 3, 11)
    assert numpy_generator(*here).random(4).tolist() == numpy_generator(*here).random(4).tolist()
    assert torch.equal(
        torch.randn(4, generator=torch_generator(*here)), torch.randn(4, generator=torch_generator(*here))
    )
