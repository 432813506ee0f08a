import re
import shutil

import numpy as np
import pytest
import typer
from PIL import Image
from safetensors.numpy import load_file, save_file
from synthetic_study import write_study
from typer.testing import CliRunner

from effvit import figures
from effvit.cli.plot import plot
from effvit.cli.prepare import prepare
from effvit.errors import UserError
from effvit.study.aggregate import aggregate

pytestmark = pytest.mark.slow

KINDS = ("curves", "tradeoff", "hardware", "attention-maps", "fidelity", "cka")
STUDIED = {"scaling", "scaling_model"}
FEW = ["fused", "linformer"]


@pytest.fixture(scope="module")
def prepared_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("prepared")
    prepare("digits", directory / "digits")
    (directory / "digits2").symlink_to(directory / "digits")
    return directory


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Directory with `metrics` and `plots/data` of two data sets and two mechanisms, read only."""
    directory, datasets = tmp_path_factory.mktemp("whole"), ["digits", "digits2"]
    write_study(directory / "metrics", datasets=datasets, attentions=FEW, images=1)
    aggregate(directory / "metrics", directory / "plots" / "data", datasets, FEW, [0])
    return directory


@pytest.fixture
def study(whole, tmp_path, prepared_dir):
    """Arguments of `plot` for a copy of `whole`, to be spoilt."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    paths = {"data_dir": tmp_path / "plots" / "data", "metrics_dir": tmp_path / "metrics", "prepared_dir": prepared_dir}
    paths |= {"output_dir": tmp_path / "plots" / "figures", "vector_dir": tmp_path / "plots" / "vector"}
    return paths | {"datasets": ["digits"], "attentions": FEW}


def test_command_draws_every_figure_and_no_picture_of_an_earlier_selection_stays(study):
    study["output_dir"].mkdir()
    for earlier in ("scaling.png", "cifar10-curves.png"):
        (study["output_dir"] / earlier).touch()
    app = typer.Typer()
    app.command()(plot)
    folders = [
        x for key in ("data", "metrics", "prepared", "output", "vector") for x in (f"--{key}-dir", study[f"{key}_dir"])
    ]
    mechanisms = [x for attention in FEW for x in ("--attention", attention)]
    result = CliRunner().invoke(app, ["--dataset", "digits", *map(str, folders), *mechanisms])
    assert result.exit_code == 0, result.output
    assert {file.stem for file in study["output_dir"].iterdir()} == {*STUDIED, *(f"digits-{kind}" for kind in KINDS)}
    charts = {*STUDIED, *(f"digits-{kind}" for kind in KINDS if not kind.endswith("maps"))}
    assert {file.name for file in study["vector_dir"].iterdir()} == {f"{chart}.svg" for chart in charts}
    for file in study["output_dir"].iterdir():
        with Image.open(file) as image:
            image.verify()


def test_every_data_set_and_only_the_named_mechanisms_are_drawn(study, monkeypatch):
    drawn = {}
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.update({path.stem: figure}))
    plot(**study | {"datasets": ["digits", "digits2"], "attentions": ["linformer"]})
    assert set(drawn) == {*STUDIED, *(f"{dataset}-{kind}" for dataset in ("digits", "digits2") for kind in KINDS)}
    for name in ("scaling", "digits-curves", "digits-tradeoff"):
        labels = {text.get_text() for legend in drawn[name].legends for text in legend.get_texts()}
        assert "Linformer" in labels and "Fused" not in labels
    titles = " ".join(axes.get_title() for axes in drawn["digits-attention-maps"].axes)
    assert "Linformer" in titles and "Fused" not in titles


TABLES = ["curves", "tradeoff", "scaling", "hardware", "fidelity", "replaced", "cka"]


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("content", [None, "", "attention,dataset\nfused,digits\n"])
def test_a_missing_or_malformed_table_is_named_and_nothing_is_written(study, table, content):
    path = study["data_dir"] / f"{table}.csv"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(UserError, match=re.escape(f"{path}: ") + ".*`dvc repro.* aggregate`"):
        plot(**study)
    assert not study["output_dir"].exists()


@pytest.mark.parametrize(
    ("table", "what"),
    [
        ("scaling", "nothing with"),
        *((table, "nothing of digits with") for table in ("curves", "fidelity", "cka")),
    ],
)
def test_a_mechanism_that_a_table_lacks_is_named(study, table, what):
    path = study["data_dir"] / f"{table}.csv"
    path.write_text("".join(line for line in path.read_text().splitlines(keepends=True) if "linformer" not in line))
    with pytest.raises(UserError, match=re.escape(f"{path}: {what} linformer; `dvc repro aggregate` makes it")):
        plot(**study)


def test_a_data_set_that_is_not_prepared_is_named(study):
    with pytest.raises(UserError, match="nowhere: not a prepared data set"):
        plot(**study | {"datasets": ["nowhere"]})


@pytest.mark.parametrize("content", [None, b"", b"\x08\0\0\0\0\0\0\0{}", b"x" * 100])
def test_missing_or_broken_attention_maps_are_named(study, content):
    path = study["metrics_dir"] / "cells/digits/linformer/seed0/evaluate/attention_maps.safetensors"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(f"{path}: ") + ".*`dvc repro.* evaluate`"):
        plot(**study)
    assert not study["output_dir"].exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": np.zeros((1, 8, 8, 3), np.uint8)}, "other images than fused's"),
        ({"labels": np.array([10])}, "other classes"),
        ({"maps": np.zeros((2, 8, 8), np.float32)}, "of the same images"),
    ],
)
def test_maps_that_do_not_fit_are_refused(study, change, message):
    path = study["metrics_dir"] / "cells/digits/linformer/seed0/evaluate/attention_maps.safetensors"
    save_file(load_file(path) | change, path)
    with pytest.raises(UserError, match=message):
        plot(**study)


@pytest.mark.parametrize("inside", ["data_dir", "metrics_dir"])
def test_an_output_directory_that_holds_an_input_is_refused(study, inside):
    with pytest.raises(UserError, match="is replaced as a whole"):
        plot(**study | {"output_dir": study[inside].parent})
    assert (study["data_dir"] / "curves.csv").exists() and (study["metrics_dir"] / "cells").exists()
