import io
import pickle

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from effvit.data.loading.encoded import EncodedImages, JpegShards
from effvit.data.loading.views import evaluation_view
from effvit.errors import UserError

RNG = np.random.default_rng(0)


def jpeg(index):
    """A picture recognised by its colour, and no two of the same shape."""
    pixels = RNG.integers(0, 40, (80 + index, 90, 3)) + np.array([index * 15, 100, 200 - index * 15])
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


FILES = [jpeg(index) for index in range(12)]
COLOURS = [np.asarray(Image.open(io.BytesIO(file))).mean((0, 1)) for file in FILES]


def write_shard(path, files):
    schema = pa.schema([("jpeg", pa.large_binary())])
    with pa.ipc.new_file(path, schema) as sink:
        for file in files:
            sink.write_batch(pa.record_batch([pa.array([file], pa.large_binary())], schema=schema))
    return path


@pytest.fixture
def shards(tmp_path):
    return [write_shard(tmp_path / f"{start}.arrow", FILES[start : start + 5]) for start in (0, 5, 10)]


@pytest.fixture
def images(shards):
    return EncodedImages(JpegShards(shards), np.array([11, 3, 0, 7, 5]), 72)


def view(row):
    return np.asarray(evaluation_view(Image.open(io.BytesIO(FILES[row])), 72))


def test_shards_are_one_sequence_of_the_files_as_they_were(shards):
    read = JpegShards(shards)
    assert [bytes(read[row]) for row in range(len(read))] == FILES


def test_indexing_gives_the_evaluation_view_by_number_slice_and_array(images):
    assert images.shape == (5, 72, 72, 3) and len(images) == 5
    assert np.array_equal(images[1], view(3)) and images[1].dtype == np.uint8
    assert np.array_equal(images[1:4], [view(3), view(0), view(7)])
    assert np.array_equal(images[np.array([4, 0, 4])], [view(5), view(11), view(5)])
    assert images[2:2].shape == (0, 72, 72, 3)


def looks(images, rows, **options):
    """Every image by its index, out of batches."""
    batches = list(images.batches(rows, **options))
    assert [len(batch) for batch in batches] == [len(row) for row in rows]
    return {
        int(i): image for batch, row in zip(batches, rows, strict=True) for image, i in zip(batch, row, strict=True)
    }


@pytest.mark.parametrize("workers", [0, 2])
def test_crop_depends_on_the_seed_and_the_image_and_not_on_batches_order_or_workers(images, workers):
    one = looks(images, [np.arange(5)], seed=1, workers=0, min_crop_area=0.3)
    rows = [np.array([4, 1]), np.array([0]), np.array([3, 2])]
    other = looks(images, rows, seed=1, workers=workers, min_crop_area=0.3)
    anew = looks(images, rows, seed=2, workers=workers, min_crop_area=0.3)
    for i in range(5):
        assert np.array_equal(one[i], other[i]) and not np.array_equal(one[i], anew[i])
        assert one[i].shape == (72, 72, 3) and not np.array_equal(one[i], images[i])
        colour = np.array(COLOURS[images.rows[i]])
        assert np.abs(one[i].mean((0, 1)) - colour).max() < 12  # that image, and no other


@pytest.mark.parametrize("workers", [0, 1])
def test_without_a_crop_batches_are_the_evaluation_view(images, workers):
    seen = looks(images, [np.array([2, 0]), np.array([4])], seed=0, workers=workers)
    assert all(np.array_equal(image, images[i]) for i, image in seen.items())


def test_global_random_numbers_are_left_alone(images):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    list(images.batches([np.arange(5)], seed=0, workers=0, min_crop_area=0.5))
    assert torch.equal(torch.get_rng_state(), state)


def test_images_travel_to_another_process_by_path_and_not_by_content(images):
    sent = pickle.dumps(images)
    assert len(sent) < 2000 < sum(map(len, FILES))
    assert np.array_equal(pickle.loads(sent)[:], images[:])


def write_column(path, values, kind):
    table = pa.table({"jpeg": pa.array(values, kind)})
    with pa.ipc.new_file(path, table.schema) as sink:
        sink.write_table(table)


def as_folder(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "spoil",
    [
        as_folder,
        lambda path: write_column(path, ["text"], pa.string()),
        lambda path: write_column(path, [1, 2], pa.int64()),
        lambda path: write_column(path, FILES[:2], pa.binary()),
        lambda path: write_column(path, [FILES[0], None], pa.large_binary()),
        lambda path: path.write_bytes(b"ARROW1\0\0" + bytes(200) + b"\x40\0\0\0ARROW1"),
        lambda path: path.write_bytes(path.read_bytes()[:-300]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"not an Arrow file, but long enough to be one"),
        lambda path: pa.ipc.new_file(path, pa.schema([("other", pa.int64())])).close(),
    ],
)
def test_damaged_shard_is_named_with_the_remedy(shards, spoil):
    spoil(shards[1])
    with pytest.raises(UserError, match=r"5\.arrow: truncated or not a shard .* run `effvit prepare` again"):
        JpegShards(shards)


def grey():
    buffer = io.BytesIO()
    Image.new("L", (90, 90), 100).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize("options", [{"workers": 0}, {"workers": 1}, {"workers": 1, "min_crop_area": 0.3}])
@pytest.mark.parametrize(
    ("file", "reason"),
    [
        (bytes(2000), "not a JPEG"),
        (b"", "not a JPEG"),
        (FILES[7][:-200], "image file is truncated"),
        (grey(), "its mode is L, expected RGB"),
    ],
)
def test_damaged_row_is_named_with_its_shard_and_the_remedy_in_one_line(shards, file, reason, options):
    write_shard(shards[1], [*FILES[5:7], file, *FILES[8:10]])
    images = EncodedImages(JpegShards(shards), np.array([11, 3, 7]), 72)
    message = rf"^\S*5\.arrow: row 2 is damaged \({reason}.*\); run `effvit prepare` again$"
    with pytest.raises(UserError, match=message):
        images[2]
    with pytest.raises(UserError, match=message):
        list(images.batches([np.array([0, 1]), np.array([1, 2])], seed=0, **options))
    assert images[:2].shape == (2, 72, 72, 3)
