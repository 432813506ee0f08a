import json

import pandas as pd
import pytest

from effvit.errors import UserError
from effvit.training.logger import check_logger, open_curves
from effvit.training.recipe import TrainConfig
from effvit.training.run import Run, train_to

RECIPE = {"epochs": 3, "batch_size": 128, "lr": 5e-3, "device": "cpu"}


@pytest.fixture
def trained_with(tmp_path, digits, tiny_config):
    def run(logger, name="run", **changes):
        recipe = TrainConfig(**(RECIPE | changes), logger=logger)
        place = tmp_path / name, tmp_path / f"{name}-log"
        train_to(*place, tiny_config(), digits, recipe, seed=0, horizontal_flip=False)
        return place

    return run


def bytes_of(*directories):
    """Files that a run determines, by name."""
    paths = [path for directory in directories for path in directory.iterdir()]
    return {path.name: path.read_bytes() for path in paths if path.name not in ("timing.csv", "provenance.json")}


def curves_of_tensorboard(directory):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not directory.exists():  # before the first epoch is over
        return {}
    events = EventAccumulator(str(directory))
    events.Reload()
    return {name: {e.step: e.value for e in events.Scalars(name)} for name in events.Tags()["scalars"]}


def curves_of_dvclive(directory):
    tables = (directory / "plots" / "metrics").rglob("*.tsv")
    curves = {}
    for path in tables:
        name = "_".join(path.relative_to(directory / "plots" / "metrics").with_suffix("").parts)  # train/loss.tsv
        curves[name] = dict(pd.read_csv(path, sep="\t").set_index("step")[path.stem])
    return curves


@pytest.mark.slow
@pytest.mark.parametrize(
    ("logger", "curves_of"), [("tensorboard", curves_of_tensorboard), ("dvclive", curves_of_dvclive)]
)
def test_curves_are_the_history_and_the_outputs_the_same_bytes_as_without(
    trained_with, tmp_path, monkeypatch, logger, curves_of
):
    pytest.importorskip(logger, reason=f"needs {logger}, of the extra loggers")
    monkeypatch.chdir(tmp_path)
    seen = []
    take = Run.take

    def watched(self, event):
        take(self, event)
        seen.append(len(curves_of(tmp_path / "run-log-live" / logger).get("val_loss", {})))

    plain = trained_with("csv", "plain")
    with monkeypatch.context() as patch:
        patch.setattr(Run, "take", watched)
        outputs = trained_with(logger)
    assert bytes_of(*outputs) == bytes_of(*plain)
    assert sorted(set(seen)) == [0, 1, 2, 3], "each epoch is there as soon as it is over"
    curves = curves_of(tmp_path / "run-log-live" / logger)
    history = pd.read_csv(tmp_path / "run-log" / "history.csv", index_col="epoch")
    for name in ("lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy"):
        assert curves[name] == pytest.approx(history[name].to_dict(), rel=1e-6)
    assert not (tmp_path / "dvc.yaml").exists()
    assert ((tmp_path / "run-log-live" / logger) / "dvc.yaml").exists() == (logger == "dvclive")
    config = json.loads((tmp_path / "run-log" / "provenance.json").read_text())["config"]
    assert "logger" not in config["train"]
    trained_with(logger, epochs=2)
    curves = curves_of(tmp_path / "run-log-live" / logger)
    assert list(curves["lr"]) == [1, 2], "an earlier run's curves are gone"


def test_a_logger_that_is_not_installed_is_one_line_that_names_the_extra(monkeypatch):
    monkeypatch.setattr("effvit.training.logger.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"logger=tensorboard: needs .* pip install 'effvit\[loggers\]'"):
        check_logger("tensorboard")
    check_logger("csv")


def test_another_directory_is_not_removed(tmp_path):
    place = tmp_path / "curves"
    place.mkdir(parents=True)
    (place / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"thesis\.tex"):
        open_curves("tensorboard", place)
    assert (place / "thesis.tex").exists()
