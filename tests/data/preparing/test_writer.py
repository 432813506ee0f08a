import json

import numpy as np
import pytest

from effvit.data.loading.prepared import PreparedDataset
from effvit.data.preparing.writer import write_prepared
from effvit.data.sources.base import Source, Split
from effvit.errors import UserError

RNG = np.random.default_rng(0)
LABELS = np.repeat(np.arange(2), 15)
PIXELS = RNG.integers(0, 256, (30, 8, 8, 3), dtype=np.uint8)


def source(pixels=PIXELS, labels=LABELS):
    return Source("a test", ("a", "b"), Split(labels, iter(pixels)), Split(LABELS, iter(PIXELS)))


def test_statistics_are_those_of_the_training_part_by_brute_force(tmp_path):
    write_prepared(source(), "x", 8, tmp_path / "out")
    dataset = PreparedDataset.load(tmp_path / "out")
    pixels = PIXELS[dataset.arrays["train_indices"]].reshape(-1, 3) / 255
    np.testing.assert_allclose(dataset.mean, pixels.mean(0), atol=1e-6)
    np.testing.assert_allclose(dataset.std, pixels.std(0), atol=1e-6)


def test_validation_and_test_images_do_not_touch_the_statistics(tmp_path):
    write_prepared(source(), "x", 8, tmp_path / "out")
    before = PreparedDataset.load(tmp_path / "out")
    changed = PIXELS.copy()
    changed[before.arrays["validation_indices"]] = 255
    other = Source("a test", ("a", "b"), Split(LABELS, iter(changed)), Split(LABELS, np.zeros_like(PIXELS)))
    write_prepared(other, "x", 8, tmp_path / "out")
    after = PreparedDataset.load(tmp_path / "out")
    assert np.all(after.split("validation")[0][:] == 255)
    assert (after.mean, after.std) == (before.mean, before.std)


def test_constant_channel_keeps_a_standard_deviation_to_divide_by(tmp_path):
    write_prepared(source(np.full_like(PIXELS, 7)), "x", 8, tmp_path / "out")
    assert min(PreparedDataset.load(tmp_path / "out").std) > 0.003


def test_writing_twice_gives_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        write_prepared(source(), "x", 8, tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len(files) == 8 and files == sorted(path.name for path in (tmp_path / "two").iterdir())
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_notes_counted_while_reading_are_stored(tmp_path):
    data = source()

    def reading():
        for image in PIXELS:
            data.train.notes["resized"] += 1
            yield image

    noted = Source("a test", ("a", "b"), Split(LABELS, reading(), data.train.notes), data.test)
    write_prepared(noted, "x", 8, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "meta.json").read_text())["notes"]["train"]["resized"] == 30


def test_class_with_a_single_training_image_is_named(tmp_path):
    labels = np.array([0] * 29 + [1])
    with pytest.raises(UserError, match="class 'b' has 1 training images, expected at least 2"):
        write_prepared(source(labels=labels), "x", 8, tmp_path / "out")


@pytest.mark.parametrize("pixels", [PIXELS[:-1], PIXELS[:, :4], PIXELS.astype(np.float32)])
def test_source_that_breaks_its_promise_writes_nothing(tmp_path, pixels):
    with pytest.raises(ValueError):
        write_prepared(source(pixels), "x", 8, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_failure_while_reading_keeps_the_earlier_directory(tmp_path):
    write_prepared(source(), "x", 8, tmp_path / "out")
    before = (tmp_path / "out" / "meta.json").read_bytes()

    def failing():
        yield PIXELS[0]
        raise UserError("damaged")

    broken = Source("a test", ("a", "b"), Split(LABELS, failing()), Split(LABELS, iter(PIXELS)))
    with pytest.raises(UserError):
        write_prepared(broken, "x", 8, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "meta.json").read_bytes() == before
