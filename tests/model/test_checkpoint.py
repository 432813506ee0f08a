import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from effvit.attention import available_attention
from effvit.errors import UserError
from effvit.files import check_replaceable
from effvit.model.checkpoint import is_model_dir, load_model, save_model
from effvit.model.names import standard_to_fused, to_transformers
from effvit.model.trained_on import TrainedOn
from effvit.model.vit import ViT


@pytest.fixture
def copy(trained, tmp_path):
    """A copy of the trained model's directory, to be damaged."""
    return shutil.copytree(trained / "run", tmp_path / "model")


def edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(directory):
    with pytest.raises(UserError) as caught:
        load_model(directory)
    message = " ".join(str(caught.value).split())
    assert str(directory) in message
    return message


VARIANTS = [(name, {}) for name in available_attention() if name != "linformer"]
VARIANTS += [("linformer", {"k": 5, "share": share}) for share in ("none", "heads", "kv", "layers")]
VARIANTS += [("linear", {"feature_map": "softmax"}), ("fused", {"value_conv": 3}), ("pooled", {"value_conv": 3})]


@pytest.mark.parametrize(("attention", "options"), VARIANTS)
def test_model_comes_back_the_same_in_eval_mode(tiny_config, tmp_path, attention, options):
    if attention in ("hybrid", "window"):
        options = {"window_size": 2}
    torch.manual_seed(0)
    value_conv = options.get("value_conv", 0)
    options = {key: value for key, value in options.items() if key != "value_conv"}
    model = ViT(tiny_config(attention=attention, attention_options=options, value_conv=value_conv)).eval()
    save_model(model, tmp_path)
    torch.manual_seed(1)
    loaded = load_model(tmp_path)
    images = torch.randn(3, 3, 16, 16)
    assert not loaded.training and loaded.config == model.config
    assert loaded.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))


def test_shared_tensors_are_stored_once_and_shared_again(tiny_config, tmp_path):
    model = ViT(tiny_config(attention="linformer", attention_options={"k": 5, "share": "layers"}))
    save_model(model, tmp_path)
    assert sum(name.endswith((".E", ".F")) for name in load_file(tmp_path / "model.safetensors")) == 1
    first, second = load_model(tmp_path).attentions()
    assert first.E is first.F is second.E is second.F


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_missing_file_is_named(copy, name):
    (copy / name).unlink()
    assert name in refused(copy)


def test_directory_that_is_not_there_is_named(tmp_path):
    assert "no such file" in refused(tmp_path / "nowhere")


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_weights_are_refused(copy, keep):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert "model.safetensors: not a whole safetensors file" in refused(copy)


def test_pickle_is_refused_and_never_run(copy, tmp_path):
    class Evil:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    (copy / "model.safetensors").write_bytes(pickle.dumps(Evil()))
    assert "not a whole safetensors file" in refused(copy)
    torch.save({"weights": Evil()}, copy / "model.safetensors")
    assert "not a whole safetensors file" in refused(copy)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null", "\xff\xfe", '"fused"'])
def test_config_that_is_no_configuration_is_refused(copy, text):
    (copy / "config.json").write_bytes(text.encode("latin-1"))
    assert "config.json" in refused(copy)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"hidden_size": 15}, "num_attention_heads=2: must divide hidden_size=15"),
        ({"surprise": 1}, "surprise: unknown option"),
        ({"attention": "magic"}, "magic"),
        ({"patch_size": "4"}, "patch_size='4'"),
        ({"attention": "linformer", "attention_options": {"k": 99}}, "attention.linformer.k=99"),
        ({"num_classes": 11}, "classes: has 10 entries, the model has 11"),
        ({"mean": [0.5], "std": [0.5]}, "mean: has 1 entries, the model has 3"),
        ({"mean": None}, "mean and std: expected both or neither"),
        ({"std": [0.5, 0, 0.5]}, "std.1=0"),
        ({"classes": [1] * 10}, "classes.0=1"),
    ],
)
def test_config_with_a_bad_value_is_refused(copy, changes, part):
    edit_config(copy, **changes)
    message = refused(copy)
    assert "config.json" in message and part in message


@pytest.mark.parametrize(
    "changes",
    [
        {"attention": "performer"},
        {"attention": "linformer", "attention_options": {"k": 4}},
        {"attention": "hybrid", "attention_options": {"window_size": 2, "fusion": "gate"}},
        {"hidden_size": 32},
        {"num_hidden_layers": 1},
        {"num_classes": 11},
        {"patch_size": 8},
    ],
)
def test_config_of_another_model_is_refused(copy, changes):
    edit_config(copy, classes=None, **changes)
    message = refused(copy)
    assert "model.safetensors" in message and "config.json" in message


def test_projection_of_another_k_is_told_with_both_shapes(tiny_config, tmp_path):
    save_model(ViT(tiny_config(attention="linformer", attention_options={"k": 4})), tmp_path)
    edit_config(tmp_path, attention_options={"k": 5})
    message = refused(tmp_path)
    assert "(4, 17)" in message and "(5, 17)" in message


def test_weights_with_a_tensor_too_many_are_refused(copy):
    weights = load_file(copy / "model.safetensors")
    save_file(weights | {"extra": torch.zeros(1)}, copy / "model.safetensors")
    assert "extra" in refused(copy)


FOREIGN = {
    "config of Hugging Face": ("config.json", '{"architectures": ["ViTForImageClassification"], "hidden_size": 48}'),
    "config of nothing": ("config.json", "{}"),
    "config of Docker": ("config.json", '{"auths": {}}'),
    "no object": ("config.json", "[1]"),
    "no JSON": ("config.json", "\0"),
    "a file more": ("notes.txt", "mine"),
    "a file in the place of an epoch": ("epoch-004", "mine"),
    "a file more in an epoch": ("epoch-001/notes.txt", "mine"),
    "a card of one's own": ("README.md", "# My model"),
    "a card of another library": ("README.md", "---\nlibrary_name: timm\n---\n"),
}


@pytest.mark.parametrize("foreign", FOREIGN)
def test_a_directory_that_no_training_wrote_is_not_replaced(copy, foreign):
    check_replaceable(copy, is_model_dir)
    name, text = FOREIGN[foreign]
    (copy / name).write_text(text)
    with pytest.raises(UserError, match="holds something else"):
        check_replaceable(copy, is_model_dir)


def test_a_configuration_without_weights_is_not_replaced(copy):
    (copy / "model.safetensors").unlink()
    with pytest.raises(UserError, match="holds something else"):
        check_replaceable(copy, is_model_dir)


def test_a_directory_from_before_cards_can_be_loaded_and_replaced(copy):
    for directory in (copy, *copy.glob("epoch-*")):
        (directory / "README.md").unlink()
        values = json.loads((directory / "config.json").read_text())
        old = {key: value for key, value in values.items() if key not in ("classes", "mean", "std")}
        (directory / "config.json").write_text(json.dumps(old))
    assert load_model(copy).trained_on == TrainedOn()
    check_replaceable(copy, is_model_dir)


def test_what_a_model_was_trained_on_is_kept_by_saving_and_loading(tiny_config, tmp_path):
    model = ViT(tiny_config(num_classes=3))
    save_model(model, tmp_path / "new" / "one", classes=["a", "b", "c|d"], mean=[0.1, 1 / 3, 0.5], std=(0.2, 0.3, 1))
    loaded = load_model(tmp_path / "new" / "one")
    assert loaded.trained_on.classes == ("a", "b", "c|d")
    assert loaded.trained_on.mean == (0.1, 1 / 3, 0.5) and loaded.trained_on.std == (0.2, 0.3, 1.0)
    save_model(loaded, tmp_path / "two")
    assert load_model(tmp_path / "two" / "model.safetensors").trained_on == loaded.trained_on
    save_model(loaded, tmp_path / "three", classes=["x", "z", "w"])
    assert load_model(tmp_path / "three").trained_on.known() == loaded.trained_on.known() | {"classes": ["x", "z", "w"]}
    assert model.trained_on == TrainedOn()


def test_a_trained_model_knows_the_data_set(trained, digits):
    for directory in (trained / "run", trained / "run" / "epoch-002"):
        about = load_model(directory).trained_on
        assert (about.classes, about.mean, about.std) == (digits.classes, digits.mean, digits.std)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"classes": ["a", "b"]}, "classes: has 2 entries, the model has 10"),
        ({"classes": "abcdefghij"}, "classes='abcdefghij': expected a list of names"),
        ({"classes": range(10)}, "classes.0=0"),
        ({"classes": list("abcdefghia")}, "classes: 'a' is there 2 times"),
        ({"mean": [0.5] * 3}, "mean and std: expected both or neither"),
        ({"mean": [0.5], "std": [0.5]}, "mean: has 1 entries, the model has 3"),
        ({"mean": [0.5] * 3, "std": [0.5, 0.5, 0]}, "std.2=0"),
        ({"mean": [0.5] * 3, "std": [0.5, 0.5, float("nan")]}, "std.2=nan"),
        ({"mean": 0.5, "std": 0.5}, "mean=0.5: expected a list of numbers, one for each channel"),
        ({"accuracy": 0.9}, "accuracy=0.9: expected a dictionary, for example {'validation': 0.98}"),
        ({"recipe": ["lr"]}, "recipe=['lr']: expected a dictionary"),
        ({"accuracy": {"validation": "high"}}, "accuracy.validation='high'"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_and_nothing_is_written(tiny_config, tmp_path, arguments, says):
    with pytest.raises(UserError) as caught:
        save_model(ViT(tiny_config()), tmp_path / "model", **arguments)
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "model").exists()


def test_what_is_no_vit_or_not_as_configured_is_refused(tiny_config, tmp_path):
    with pytest.raises(UserError, match="got Linear, expected an effvit ViT"):
        save_model(torch.nn.Linear(2, 2), tmp_path / "model")
    model = ViT(tiny_config())
    model.blocks[1].attn = ViT(tiny_config(attention="performer")).blocks[1].attn
    with pytest.raises(UserError, match=r"block 1 has PerformerAttention, the configuration says fused;"):
        save_model(model, tmp_path / "model")
    model = ViT(tiny_config())
    model.blocks[0].mlp.register_parameter("scale", torch.nn.Parameter(torch.ones(1)))
    with pytest.raises(UserError, match=r"blocks\.\*\.mlp\.scale: not as in a ViT of this configuration"):
        save_model(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()


WRAPPERS = [torch.compile, torch.nn.DataParallel, lambda model: torch.nn.DataParallel(torch.compile(model))]


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_wrapped_model_is_saved_as_the_model_itself(tiny_config, tmp_path, wrap):
    model = ViT(tiny_config(attention="performer"))
    save_model(model, tmp_path / "plain")
    save_model(wrap(model), tmp_path / "wrapped")
    plain, wrapped = (tmp_path.joinpath(name, "model.safetensors").read_bytes() for name in ("plain", "wrapped"))
    assert plain == wrapped


@pytest.mark.parametrize("attention", ["standard", "linformer"])
@pytest.mark.parametrize("prefix", ["_orig_mod.", "module._orig_mod.", "model."])
def test_weights_with_a_wrappers_prefix_are_loaded_and_it_is_told(tiny_config, tmp_path, attention, prefix, capsys):
    options = {"attention_options": {"k": 5, "share": "layers"}} if attention == "linformer" else {}
    model = ViT(tiny_config(attention=attention, **options)).eval()
    save_model(model, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    load_model(tmp_path)
    assert capsys.readouterr().err == ""
    save_file({prefix + name: tensor for name, tensor in weights.items()}, tmp_path / "model.safetensors")
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path)(images), model(images))
    told = f"{tmp_path / 'model.safetensors'}: {prefix} taken off the names of the weights\n"
    assert capsys.readouterr().err == told
    if attention == "standard":  # without a configuration of ours, as another library's are read
        return
    save_file({prefix + name: t for name, t in ViT(tiny_config()).state_dict().items()}, tmp_path / "w.safetensors")
    load_model(tmp_path / "w.safetensors", num_attention_heads=2)
    assert f"w.safetensors: {prefix} taken off" in capsys.readouterr().err


@pytest.mark.parametrize("attention", ["standard", "fused"])
def test_weights_in_transformers_names_are_loaded_beside_a_configuration_of_ours(tiny_config, tmp_path, attention):
    torch.manual_seed(0)
    model = ViT(tiny_config(attention=attention)).eval()
    save_model(model, tmp_path)
    save_file(to_transformers(standard_to_fused(model.state_dict())), tmp_path / "model.safetensors")
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path)(images), model(images))


def test_tensors_that_are_views_are_saved(tiny_config, tmp_path):
    model = ViT(tiny_config())
    model.head.weight.data = model.head.weight.data.t().contiguous().t()
    save_model(model, tmp_path)
    assert torch.equal(load_model(tmp_path).head.weight, model.head.weight)
