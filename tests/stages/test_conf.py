from pathlib import Path

import pytest
import yaml
from dvc.utils.hydra import compose_and_dump

from effvit.attention import attention_class, available_attention
from effvit.data.sources import available_datasets
from effvit.errors import UserError
from effvit.study.config import Study

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf"
OPTIONS = [(path.parent.name, path.stem) for path in sorted(CONF.glob("*/*.yaml"))]


def compose(directory, *overrides):
    path = directory / "params.yaml"
    compose_and_dump(str(path), str(CONF), None, "config", "", list(overrides))
    return path


def test_committed_params_are_what_dvc_composes(tmp_path):
    assert compose(tmp_path).read_text() == (ROOT / "params.yaml").read_text(), "run `make params`"


@pytest.mark.parametrize(("group", "option"), [pair for pair in OPTIONS if pair != ("model", "timm")], ids="=".join)
@pytest.mark.slow
def test_every_option_of_every_group_is_a_valid_study(tmp_path, group, option):
    Study.load(compose(tmp_path, f"{group}={option}"))


@pytest.mark.parametrize("model", sorted({path.stem for path in (CONF / "model").glob("*.yaml")} - {"timm"}))
def test_every_model_fits_every_mechanism_and_data_set(tmp_path, model):
    datasets = ",".join(path.stem for path in (CONF / "dataset").glob("*.yaml"))
    study = Study.load(compose(tmp_path, f"model={model}", f"dataset=[{datasets}]", "attention=field"))
    assert list(study.attention) == list(available_attention())


def test_a_model_of_timms_has_its_sizes_and_needs_its_patches(tmp_path):
    pytest.importorskip("timm", reason="needs timm, of the extra peers", exc_type=ImportError)
    images = ("dataset.digits.image_size=224", "dataset.digits.patch_size=16")
    study = Study.load(compose(tmp_path, "model=timm", "model.name=vit_small_patch16_224", *images))
    assert study.vit("digits", "hybrid").hidden_size == 384 and study.vit("digits", "hybrid").num_tokens == 197
    with pytest.raises(UserError, match=r"dataset.digits.patch_size=4: vit_tiny_patch16_224 has patches of 16"):
        Study.load(compose(tmp_path, "model=timm"))
    with pytest.raises(UserError, match="cannot build it"):
        Study.load(compose(tmp_path, "model=timm", "model.name=vit_none", *images))


def test_one_mechanism_or_two_can_be_chosen(tmp_path):
    for chosen in (["linformer"], ["linformer", "performer"]):
        override = f"attention=[{','.join(chosen)}]" if len(chosen) > 1 else f"attention={chosen[0]}"
        assert list(Study.load(compose(tmp_path, override)).attention) == chosen


def test_one_value_can_be_changed(tmp_path):
    study = Study.load(compose(tmp_path, "attention.linformer.k=16", "train.epochs=3"))
    assert study.attention["linformer"]["k"] == 16 and study.train.epochs == 3


def test_every_mechanism_has_a_file_and_every_file_a_mechanism():
    names = {path.stem for path in (CONF / "attention").glob("*.yaml")} - {"all", "field"}
    assert names == set(available_attention())
    for name in names:
        values = yaml.safe_load((CONF / "attention" / f"{name}.yaml").read_text())
        assert set(values) == {name}
        defaults = attention_class(name).Options().model_dump()
        assert values[name] == defaults, "every option is there to be set, with the default that it has anyway"


def test_every_data_set_file_is_a_data_set():
    for path in (CONF / "dataset").glob("*.yaml"):
        assert list(yaml.safe_load(path.read_text())) == [path.stem]
        assert path.stem in available_datasets()
