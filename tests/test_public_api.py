import subprocess
import sys

import pytest
import torch

import effvit


def test_public_names_are_these_and_no_others():
    assert set(effvit.__all__) == {
        "SwapReport",
        "Trainer",
        "ViT",
        "ViTConfig",
        "available_attention",
        "build_attention",
        "compare",
        "evaluate",
        "load_model",
        "open_data",
        "predict",
        "prepare_data",
        "resize",
        "save_model",
        "swap_attention",
        "timm_layer",
        "visualize_attention",
        "visualize_images",
    }
    for name in effvit.__all__:
        assert callable(getattr(effvit, name))


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Vit'"):
        _ = effvit.Vit


def test_importing_effvit_imports_nothing_slow():
    code = "import effvit, sys; print({'torch', 'numpy', 'pandas', 'pydantic'} & sys.modules.keys())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"


@pytest.mark.slow
def test_attention_is_swapped_without_any_library_but_torch_and_pydantic():
    code = """
import sys
import effvit
model = effvit.ViT(effvit.ViTConfig(image_size=16, num_hidden_layers=1))
effvit.swap_attention(model, "linformer", k=4)
effvit.timm_layer("fused")
effvit.resize(model, 32)
print({"timm", "transformers", "torchvision", "safetensors", "pandas", "dvc", "typer", "yaml"} & set(sys.modules))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout in ("set()\n", "{'safetensors'}\n")


def test_the_documented_example_works_as_written():
    from effvit import ViT, ViTConfig, build_attention

    x = torch.randn(2, 197, 192)
    images = torch.randn(2, 3, 32, 32)

    attn = build_attention("linformer", dim=192, num_heads=3, grid_size=(14, 14), k=64)
    # tokens: one class token first, then grid_size[0]*grid_size[1] patches, row-major
    y = attn(x)  # (B, N, C) -> (B, N, C)  # fmt: skip
    assert y.shape == (2, 197, 192)
    y, a = attn(x, return_map=True)  # a: (B, heads, N, N), the attention matrix this mechanism implies  # fmt: skip
    assert y.shape == (2, 197, 192) and a.shape == (2, 3, 197, 197)

    model = ViT(ViTConfig(image_size=32, patch_size=4, hidden_size=48, num_hidden_layers=4,
                          num_attention_heads=4, intermediate_size=192, num_classes=10,
                          attention="linformer", attention_options={"k": 64}))  # fmt: skip
    logits = model(images)  # (B, 3, 32, 32) -> (B, 10)  # fmt: skip
    assert logits.shape == (2, 10)
    logits, maps = model(images, output_attentions=True)  # maps: one (B, heads, N, N) per block  # fmt: skip
    assert logits.shape == (2, 10) and [m.shape for m in maps] == [(2, 4, 65, 65)] * 4
