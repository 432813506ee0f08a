"""State dicts under other libraries' names, loaded into those libraries' own models."""

import json

import pytest
import torch
from foreign import logits, renamed, shaken
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn import LayerNorm

from effvit import ViT, ViTConfig, load_model, save_model

ABOUT = {"classes": list("abcdefg"), "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}


def saved(directory, **changes):
    torch.manual_seed(0)
    fields = {"image_size": 16, "num_hidden_layers": 2, "num_classes": 7, "num_attention_heads": 3}
    model = shaken(ViT(ViTConfig(**(fields | changes))))
    save_model(model, directory, **ABOUT)
    return model


def exported(effvit, directory, library, **changes):
    """A model, its state dict in ``library``'s names and the call that the command names for it."""
    model = saved(directory / "model", **changes)
    output = directory / f"{library}.safetensors"
    outcome = effvit("export", "--model-dir", directory / "model", "--format", library, "--output", output)
    assert outcome.code == 0, outcome.err
    file, _, call = outcome.out.strip().partition(", for ")
    assert file == f"{output}: {model.config.attention}, {output.stat().st_size:,} bytes"
    return model, output, call


def assert_same(ours, theirs):
    images = torch.randn(3, 3, *ours.config.image_shape, generator=torch.Generator().manual_seed(3))
    expected = logits(ours, images)
    torch.testing.assert_close(logits(theirs, images), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention": "standard"},
        {"qkv_bias": False},
        {"prefix_tokens": 0},
        {"prefix_tokens": 3, "attention": "standard"},
        {"image_size": (16, 24), "layer_norm_eps": 1e-3, "intermediate_size": 100},
    ],
)
def test_timm_loads_it_and_has_the_same_logits(effvit, tmp_path, changes):
    timm = pytest.importorskip("timm.models.vision_transformer", reason="a peer: pip install effvit[peers]")
    from functools import partial

    ours, file, call = exported(effvit, tmp_path, "timm", **changes)
    theirs = eval(call, {"VisionTransformer": timm.VisionTransformer, "partial": partial, "LayerNorm": LayerNorm})
    theirs.load_state_dict(load_file(file), strict=True)
    assert_same(ours, theirs.eval())


@pytest.mark.parametrize(
    "changes", [{}, {"attention": "standard"}, {"qkv_bias": False}, {"image_size": (16, 24), "layer_norm_eps": 1e-3}]
)
def test_transformers_loads_it_and_has_the_same_logits(effvit, tmp_path, changes):
    transformers = pytest.importorskip("transformers", reason="a peer: pip install transformers")
    ours, file, call = exported(effvit, tmp_path, "transformers", **changes)
    theirs = eval(call, {name: getattr(transformers, name) for name in ("ViTConfig", "ViTForImageClassification")})
    theirs.save_pretrained(tmp_path / "hub")  # its configuration; the weights are replaced
    file.rename(tmp_path / "hub" / "model.safetensors")
    read, info = transformers.ViTForImageClassification.from_pretrained(tmp_path / "hub", output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same(ours, read.eval())
    names = renamed(
        load_file(tmp_path / "hub" / "model.safetensors"),
        4 if any("encoder.layer." in name for name in theirs.state_dict()) else 5,
    )
    theirs.load_state_dict(names, strict=True)
    assert_same(ours, theirs.eval())


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_what_was_exported_comes_back(effvit, tmp_path, library):
    ours, file, _ = exported(effvit, tmp_path, library)
    back = load_model(file, num_attention_heads=3)
    assert all(torch.equal(back.state_dict()[name], tensor) for name, tensor in ours.state_dict().items())
    with safe_open(file, "pt") as opened:
        about = opened.metadata()
    assert about.pop("format") == "pt"
    assert {key: json.loads(value) for key, value in about.items()} == ABOUT


@pytest.mark.parametrize(
    ("changes", "arguments", "says"),
    [
        ({"attention": "performer"}, ["timm"], "timm has no performer attention; expected a model with standard or f"),
        (
            {"attention": "linformer", "attention_options": {"k": 5}},
            ["transformers"],
            "transformers has no linformer attention",
        ),
        ({"prefix_tokens": 0}, ["transformers"], "prefix_tokens=0: a ViT of transformers has exactly one, the class"),
        ({"value_conv": 3}, ["timm"], "value_conv=3: timm's attention has no such convolution"),
        ({}, ["timm", "--output", "a.onnx"], "a.onnx: expected a file name that ends in .safetensors"),
    ],
)
def test_what_the_library_has_not_is_refused_in_one_line(effvit, tmp_path, changes, arguments, says):
    saved(tmp_path / "model", **changes)
    output = [] if "--output" in arguments else ["--output", "a.safetensors"]
    outcome = effvit("export", "--model-dir", tmp_path / "model", *output, "--format", *arguments)
    assert outcome.code == 1 and not outcome.out
    assert outcome.err.startswith("error: ") and says in outcome.err and outcome.err.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
