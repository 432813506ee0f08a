import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from effvit.cli.samples import samples
from effvit.data.preparing import prepare
from effvit.errors import UserError

app = typer.Typer()
app.command()(samples)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    directory = tmp_path_factory.mktemp("digits") / "prepared"
    prepare("digits", None, 32, directory)
    return directory


def draw(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_sheet_is_a_png_and_the_same_bytes_each_time(digits, tmp_path):
    for name in ("one.png", "two.png"):
        assert draw("--dataset-dir", digits, "--output", tmp_path / name, "--per-class", 2).exit_code == 0
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    with Image.open(tmp_path / "one.png") as image:
        assert image.format == "PNG" and np.asarray(image).std() > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.png", "two.png"]


def test_name_that_does_not_end_in_png_is_refused(digits, tmp_path):
    result = draw("--dataset-dir", digits, "--output", tmp_path / "sheet.pdf")
    assert isinstance(result.exception, UserError) and "expected a file name that ends in .png" in str(result.exception)


def test_directory_that_is_not_prepared_is_refused_and_writes_nothing(tmp_path):
    result = draw("--dataset-dir", tmp_path, "--output", tmp_path / "sheet.png")
    assert isinstance(result.exception, UserError) and "not a prepared data set" in str(result.exception)
    assert list(tmp_path.iterdir()) == []
