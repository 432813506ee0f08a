import numpy as np
import pytest

from effvit.data.loading.prepared import PreparedDataset
from effvit.data.preparing.writer import write_prepared
from effvit.data.samples import sample_sheet
from effvit.data.sources.base import Source, Split
from effvit.errors import UserError


def dataset(directory, num_classes):
    """Every image of class c is one flat colour, c + 1, so that a picture tells its class."""
    labels = np.arange(4 * num_classes) % num_classes
    pixels = np.broadcast_to((labels + 1)[:, None, None, None], (len(labels), 8, 8, 3)).astype(np.uint8)
    names = tuple(f"${i}_x" for i in range(num_classes))  # a name must not be read as mathematics
    write_prepared(Source("a test", names, Split(labels, pixels), Split(labels, pixels)), "x", 8, directory)
    return PreparedDataset.load(directory)


def colours(axes):
    return [int(image.get_array()[0, 0, 0]) for image in axes.images]


def test_up_to_twenty_classes_have_a_labelled_row_each(tmp_path):
    figure = sample_sheet(dataset(tmp_path / "x", 4), per_class=3)
    rows = [figure.axes[start : start + 3] for start in range(0, 12, 3)]
    assert len(figure.axes) == 12
    for label, row in enumerate(rows):
        assert [colours(axes) for axes in row] == [[label + 1]] * 3
        assert [text.get_text() for text in row[0].texts] == [f"${label}_x"]


def test_more_classes_make_a_grid_of_one_labelled_image_each(tmp_path):
    figure = sample_sheet(dataset(tmp_path / "x", 23), per_class=3)
    assert [colours(axes) for axes in figure.axes[:23]] == [[label + 1] for label in range(23)]
    assert [axes.get_title() for axes in figure.axes[:23]] == [f"${label}_x" for label in range(23)]


def test_more_samples_than_images_leaves_no_empty_columns(tmp_path):
    assert len(sample_sheet(dataset(tmp_path / "x", 2), per_class=50).axes) == 2 * 3  # one of four is validation


def test_less_than_one_sample_is_refused(tmp_path):
    with pytest.raises(UserError, match="per_class=0: expected at least 1"):
        sample_sheet(dataset(tmp_path / "x", 2), per_class=0)
