"""Weights of other libraries, held against the logits of those libraries' own models."""

import pytest
import torch
from foreign import IMAGES, logits, renamed, shaken, timm_vit, torchvision_vit, transformers_vit
from safetensors.torch import save_file

from effvit import ViT, ViTConfig, load_model
from effvit.errors import UserError
from effvit.model.names import read_names, to_transformers
from effvit.model.pretrained import start_from


def vit(**changes):
    torch.manual_seed(1)
    fields = {"image_size": 16, "num_hidden_layers": 2, "num_classes": 7, "num_attention_heads": 3}
    return ViT(ViTConfig(**(fields | changes))).eval()


def saved(state, tmp_path, name="weights.safetensors"):
    path = tmp_path / name
    if path.suffix == ".safetensors":
        save_file({key: tensor.clone() for key, tensor in state.items()}, path)
    else:
        torch.save(state, path)
    return path


def assert_same(ours, theirs, shape=IMAGES):
    images = torch.randn(*shape, generator=torch.Generator().manual_seed(3))
    expected = logits(theirs, images)
    torch.testing.assert_close(logits(ours, images), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def refused(path, **arguments):
    with pytest.raises(UserError) as caught:
        load_model(path, **arguments)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


LIBRARIES = {
    "timm": (timm_vit, lambda model: model.state_dict()),
    "transformers": (transformers_vit, lambda model: model.state_dict()),
    "transformers 4": (transformers_vit, lambda model: renamed(model.state_dict(), 4)),
    "transformers 5": (transformers_vit, lambda model: renamed(model.state_dict(), 5)),
    "torchvision": (torchvision_vit, lambda model: model.state_dict()),
}


@pytest.fixture(params=LIBRARIES)
def library(request):
    return request.param


@pytest.fixture
def theirs(library):
    return LIBRARIES[library][0]()


@pytest.fixture
def state(library, theirs):
    return LIBRARIES[library][1](theirs)


@pytest.mark.parametrize("attention", ["fused", "standard"])
def test_a_model_that_starts_from_a_librarys_weights_has_its_logits(library, theirs, state, attention, tmp_path):
    ours = vit(attention=attention)
    report = start_from(saved(state, tmp_path), ours)
    assert_same(ours, theirs)
    assert report.names == library.split()[0] and not (report.fresh or report.ignored or report.taken_off)
    named = [f"  names: {report.names}'s"] if report.names != "timm" else []
    assert [line for line in report.lines() if "names: " in line] == named


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".ckpt"])
def test_a_librarys_file_is_loaded_whatever_its_name(theirs, state, suffix, tmp_path):
    path = saved(state, tmp_path, f"anything{suffix}")
    ours = load_model(path, num_attention_heads=3)
    assert_same(ours, theirs)
    assert not ours.training and ours.config.num_classes == 7 and ours.config.attention == "fused"
    assert "weights do not record the number of heads; give num_attention_heads=" in refused(path)
    assert "num_attention_heads=5: must divide hidden_size=48" in refused(path, num_attention_heads=5)


WRAPPED = {
    "compiled": (lambda model: torch.compile(model).state_dict(), "_orig_mod."),
    "data parallel": (lambda model: torch.nn.DataParallel(model).state_dict(), "module."),
    "both": (lambda model: torch.nn.DataParallel(torch.compile(model)).state_dict(), "module._orig_mod."),
    "the other way": (lambda model: torch.compile(torch.nn.DataParallel(model)).state_dict(), "_orig_mod.module."),
    "Lightning": (lambda model: torch.nn.ModuleDict({"model": model}).state_dict(), "model."),
    "Lightning, compiled": (
        lambda model: torch.nn.ModuleDict({"model": torch.compile(model)}).state_dict(),
        "model._orig_mod.",
    ),
    "of any name": (lambda model: torch.nn.ModuleDict({"my_net": model}).state_dict(), "my_net."),
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_what_a_wrapper_puts_before_all_names_is_taken_off_and_said(theirs, wrapper, tmp_path):
    wrap, taken_off = WRAPPED[wrapper]
    ours = vit()
    report = start_from(saved(wrap(theirs), tmp_path), ours)
    assert_same(ours, theirs)
    assert report.taken_off == taken_off and not (report.fresh or report.ignored)
    assert f"  names: {report.names}'s, {taken_off} taken off" in report.lines()
    assert_same(load_model(tmp_path / "weights.safetensors", num_attention_heads=3), theirs)


def test_blocks_that_are_compiled_each_for_itself_are_read_as_well(tmp_path):
    theirs = timm_vit()
    plain = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    theirs.blocks = torch.nn.ModuleList(torch.compile(block) for block in theirs.blocks)
    assert "blocks.0._orig_mod.attn.qkv.weight" in theirs.state_dict()
    ours = vit()
    report = start_from(saved(theirs.state_dict(), tmp_path), ours)
    assert report.taken_off == "_orig_mod."
    assert all(torch.equal(ours.state_dict()[name], tensor) for name, tensor in plain.items())


def test_a_lightning_checkpoint_is_read(tmp_path):
    theirs = timm_vit()
    names = {f"model.{name}": tensor for name, tensor in theirs.state_dict().items()}
    content = {"epoch": 3, "pytorch-lightning_version": "2.6", "state_dict": names, "hyper_parameters": {"lr": 1e-3}}
    assert_same(load_model(saved(content, tmp_path, "last.ckpt"), num_attention_heads=3), theirs)


@pytest.mark.parametrize(
    ("changes", "config"),
    [
        ({"reg_tokens": 4}, {"prefix_tokens": 5}),
        ({"reg_tokens": 4, "no_embed_class": True}, {"prefix_tokens": 5}),
        ({"no_embed_class": True}, {}),
        ({"class_token": False, "global_pool": "avg", "fc_norm": False}, {"prefix_tokens": 0}),
        ({"img_size": (16, 24)}, {"image_size": (16, 24)}),
        ({"img_size": (24, 16), "reg_tokens": 1, "no_embed_class": True}, {"image_size": (24, 16), "prefix_tokens": 2}),
        ({"qkv_bias": False}, {"qkv_bias": False}),
    ],
)
def test_registers_no_class_token_and_oblong_images_are_timms(tmp_path, changes, config):
    theirs, ours = timm_vit(**changes), vit(**config)
    report = start_from(saved(theirs.state_dict(), tmp_path), ours)
    size = config.get("image_size", (16, 16))
    assert_same(ours, theirs, (2, 3, *size))
    padded = changes.get("no_embed_class", False)
    assert report.adapted == ({"pos_embed": "zeros for the prefix tokens, of which theirs has none"} if padded else {})
    trusted = ["a grid of 6x4 patches"] if size == (24, 16) else ["a grid of 4x6 patches"] if size == (16, 24) else []
    assert [each for each in report.on_trust if "grid" in each] == trusted
    assert ("pooling by the mean of patches" in report.on_trust) == (config.get("prefix_tokens") == 0)
    if size == (16, 16):
        assert_same(load_model(tmp_path / "weights.safetensors", num_attention_heads=3), theirs)


def test_positions_of_patches_alone_are_carried_over_to_another_grid(tmp_path):
    theirs, ours = timm_vit(reg_tokens=4, no_embed_class=True), vit(prefix_tokens=5, image_size=24)
    report = start_from(saved(theirs.state_dict(), tmp_path), ours)
    from timm.layers import resample_abs_pos_embed

    expected = resample_abs_pos_embed(theirs.pos_embed.detach(), [6, 6], num_prefix_tokens=0)
    torch.testing.assert_close(ours.pos_embed.detach()[:, 5:], expected)
    assert not ours.pos_embed[:, :5].any()
    assert report.adapted["pos_embed"].endswith("; 4x4 to 6x6 patches")


@pytest.mark.parametrize("version", [4, 5])
def test_a_distillation_token_that_no_head_reads_is_a_register(tmp_path, version):
    theirs = transformers_vit("DeiT")
    ours = load_model(saved(renamed(theirs.state_dict(), version), tmp_path), num_attention_heads=3)
    assert ours.config.prefix_tokens == 2
    assert_same(ours, theirs)


def test_a_feature_extractor_is_a_start_but_no_classifier(tmp_path):
    theirs = transformers_vit(task="Model")
    path, ours = saved(theirs.state_dict(), tmp_path), vit()
    report = start_from(path, ours)
    assert report.fresh == ["head.weight", "head.bias"]
    assert set(report.ignored) == {"pooler.dense.weight", "pooler.dense.bias"}
    images = torch.randn(IMAGES)
    with torch.no_grad():
        features = theirs(images).last_hidden_state[:, 0]
        torch.testing.assert_close(ours(images), ours.head(features), rtol=0, atol=1e-4)
    assert "no head.weight, hence no classes" in refused(path, num_attention_heads=3)


@pytest.mark.parametrize("named", [False, True])
def test_a_directory_of_transformers_tells_heads_epsilon_classes_and_normalisation(tmp_path, named):
    names = {"id2label": dict(enumerate("abcdefg"))} if named else {}
    theirs = transformers_vit(layer_norm_eps=1e-3, **names)
    theirs.save_pretrained(tmp_path)
    from transformers import ViTImageProcessor

    ViTImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]).save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    assert ours.config.num_attention_heads == 3 and ours.config.layer_norm_eps == 1e-3
    assert_same(ours, theirs)
    about = ours.trained_on
    assert about.classes == (tuple("abcdefg") if named else None)
    assert about.mean == (0.1, 0.2, 0.3) and about.std == (0.4, 0.5, 0.6)
    report = start_from(tmp_path, vit())
    assert report.on_trust == ["norms with epsilon 1e-6 in place of 1e-3"]
    with pytest.raises(UserError, match="num_attention_heads=3, here 4"):
        start_from(tmp_path, vit(num_attention_heads=4))


def test_an_oblong_model_of_transformers_is_as_its_configuration_says(tmp_path):
    theirs = transformers_vit(image_size=(16, 24))
    theirs.save_pretrained(tmp_path)
    assert_same(load_model(tmp_path), theirs, (2, 3, 16, 24))


@pytest.mark.parametrize(
    ("changes", "says"), [({"hidden_act": "relu"}, "hidden_act='relu'"), ({"model_type": "swin"}, "model_type='swin'")]
)
def test_another_model_of_transformers_is_refused_by_its_configuration(tmp_path, changes, says):
    import json

    transformers_vit().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    assert says in refused(tmp_path)


def test_a_directory_of_timm_tells_classes_and_normalisation(tmp_path):
    hub = pytest.importorskip("timm.models._hub", reason="a peer: pip install effvit[peers]")
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    about = {"pretrained_cfg": {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}, "label_names": list("abcdefg")}
    theirs = shaken(timm.create_model("vit_tiny_patch16_224", img_size=(32, 48), num_classes=7))
    hub.save_for_hf(theirs, tmp_path, model_config=about, safe_serialization=True)
    assert "give num_attention_heads=" in refused(tmp_path)
    ours = load_model(tmp_path, num_attention_heads=3)
    assert_same(ours, theirs, (2, 3, 32, 48))
    assert ours.trained_on.known() == {"classes": list("abcdefg"), "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}


FOREIGN = {
    "a distillation head": lambda: transformers_vit("DeiT", "ForImageClassificationWithTeacher"),
    "layer scale": lambda: transformers_vit("Dinov2", intermediate_size=192),
    "a layer before the head": lambda: torchvision_vit(representation_size=9),
    "of a ViT in the names of timm": lambda: torch.nn.Linear(3, 3),
}


@pytest.mark.parametrize("says", FOREIGN)
def test_a_model_that_this_one_cannot_be_is_refused_by_name(tmp_path, says):
    model = FOREIGN[says]()
    assert says in refused(saved(model.state_dict(), tmp_path), num_attention_heads=3)


def test_a_map_that_is_missing_is_named(tmp_path):
    state = transformers_vit().state_dict()
    del state[next(name for name in state if "k_proj.bias" in name or "key.bias" in name)]
    assert "blocks.*.attn.q.bias, blocks.*.attn.v.bias, which this ViT lacks" in refused(
        saved(state, tmp_path), num_attention_heads=3
    )


def test_names_written_for_transformers_are_those_that_it_writes_itself(tmp_path):
    from safetensors.torch import load_file

    theirs = transformers_vit()
    theirs.save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    ours = to_transformers(read_names(written).tensors)
    assert ours.keys() == written.keys() and all(torch.equal(ours[name], written[name]) for name in written)
