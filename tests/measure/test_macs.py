import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from effvit import ViT, ViTConfig, available_attention, build_attention
from effvit.measure.macs import count_macs

OPTIONS = [
    ("standard", {}),
    ("fused", {}),
    *(("linformer", {"k": 7, "share": share}) for share in ("none", "heads", "kv", "layers")),
    *(("performer", {"num_features": m, "kernel": kernel}) for m in (5, 32) for kernel in ("softmax", "relu")),
    *(("nystromformer", {"num_landmarks": m, "conv_kernel_size": w}) for m in (1, 6, 100) for w in (0, 5)),
    ("nystromformer", {"num_landmarks": 9, "pinv_iterations": 2}),
    ("hybrid", {"window_size": 4}),
    ("hybrid", {"window_size": 2, "dilations": [1, 2, 3]}),
    ("hybrid", {"window_size": 3, "branches": ["linear"]}),
    ("hybrid", {"window_size": 3, "branches": ["regional", "dilated"]}),
]
OPTIONS += [
    *(("linear", {"feature_map": feature_map}) for feature_map in ("elu", "relu", "softmax")),
    *(("agent", {"agent_size": n}) for n in (2, 9)),
    *(("pooled", {"pool_size": n}) for n in (2, 9)),
    *(("window", {"window_size": n}) for n in (2, 3, 9)),
    ("fused", {"value_conv": 3}),
    ("pooled", {"pool_size": 2, "value_conv": 5}),
    ("hybrid", {"window_size": 2, "value_conv": 3}),
]
OPTIONS += [(name, {}) for name in available_attention() if name not in dict(OPTIONS)]


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.forward = function


@pytest.mark.parametrize("grid", [(4, 4), (5, 7)])
@pytest.mark.parametrize("name, options", OPTIONS)
@pytest.mark.slow
def test_attention_is_counted_exactly_as_its_closed_form(name, options, grid):
    attention = build_attention(name, 24, 3, grid, **options)
    assert count_macs(attention, torch.zeros(1, 1 + grid[0] * grid[1], 24)) == attention.macs()


@pytest.mark.parametrize("name, options", OPTIONS)
def test_attention_is_counted_as_torch_counts_flops_where_all_products_are_written_out(name, options):
    attention = build_attention(name, 24, 3, (4, 4), **options).eval()
    x = torch.zeros(1, 17, 24)
    # Its counter knows no fused attention on CPU, hence the mathematical backend; a FLOP count is two a MAC.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        attention(x)
    assert 2 * count_macs(attention, x) == counter.get_total_flops()


@pytest.mark.parametrize("name", available_attention())
@pytest.mark.slow
def test_a_model_is_counted_exactly_as_its_closed_form(name):
    options = {"k": 9, "share": "layers"} if name == "linformer" else {}
    model = ViT(ViTConfig(image_size=16, patch_size=4, num_classes=7, attention=name, attention_options=options))
    assert count_macs(model, torch.zeros(1, 3, 16, 16)) == model.macs()


@pytest.mark.parametrize("name", available_attention())
def test_thousands_of_tokens_are_counted_without_computing_them(name):
    attention = build_attention(name, 48, 4, (128, 128))
    assert count_macs(attention, torch.zeros(1).expand(1, 16385, 48)) == attention.macs()


def test_layers_count_their_multiply_adds_and_no_bias():
    x = torch.zeros(1, 5, 8)
    assert count_macs(nn.Linear(8, 3), x) == count_macs(nn.Linear(8, 3, bias=False), x) == 5 * 8 * 3
    image = torch.zeros(1, 4, 9, 9)
    assert count_macs(nn.Conv2d(4, 6, 3), image) == 7 * 7 * 6 * 4 * 9
    assert count_macs(nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2), image) == 5 * 5 * 8 * 2 * 9
    assert count_macs(nn.ConvTranspose2d(4, 6, 2, stride=2), image) == 9 * 9 * 4 * 6 * 4
    norms = nn.Sequential(nn.LayerNorm(8), nn.GELU(), nn.Softmax(-1), nn.AvgPool1d(2))
    assert count_macs(norms, x) == 0


@pytest.mark.parametrize(
    "function, macs",
    [
        (lambda x: x @ x.transpose(-2, -1), 5 * 5 * 8),
        (lambda x: x @ x.new_ones(8), 5 * 8),
        (lambda x: x.flatten() @ x.flatten(), 5 * 8),
        (lambda x: torch.einsum("bnc,bmc->bnm", x, x), 5 * 5 * 8),
        (lambda x: torch.baddbmm(x.new_zeros(1, 5, 5), x, x.transpose(-2, -1)), 5 * 5 * 8),
        (lambda x: torch.addmv(x.new_zeros(5), x[0], x.new_ones(8)), 5 * 8),
        (lambda x: F.scaled_dot_product_attention(x, x[:, :3], x[:, :3]), 2 * 5 * 3 * 8),
        (lambda x: F.scaled_dot_product_attention(x, x, x[..., :2]), 5 * 5 * (8 + 2)),
        (lambda x: x.softmax(-1).exp().mean(1) + x.sum() * 2, 0),
    ],
)
def test_functions_count_their_multiply_adds(function, macs):
    assert count_macs(Call(function), torch.zeros(1, 5, 8)) == macs


def test_the_count_is_of_one_sample_whatever_the_batch_and_the_grad_mode():
    attention = build_attention("fused", 24, 3, (4, 4))
    with torch.inference_mode():
        assert count_macs(attention, torch.zeros(5, 17, 24)) == attention.macs()


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)).train()
    count_macs(model, torch.zeros(1, 8))
    assert model.training and model[0].weight.device.type == "cpu"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_model_that_does_not_run_is_an_error_and_not_a_count(capsys):
    with pytest.raises(RuntimeError, match=r"\(1, 5\)"):
        count_macs(nn.Linear(8, 8), torch.zeros(2, 5))
