"""What is counted of a block on a GPU that is not there."""

import re

import pytest
import torch
from mechanisms import CASES, WITH_VALUE_CONV
from torch import Tensor
from torch.nn import functional as F

from effvit.attention import available_attention
from effvit.measure.subject import Block
from effvit.measure.trace import MOST_BACKWARD, MOST_FORWARD, MOST_RATIO, Launches, bytes_of, trace_block
from effvit.measure.without_gpu import Cuda, OnCuda, _known_to_autocast, autocast


def on_cuda(*shape, dtype=torch.float32):
    return OnCuda(torch.empty(*shape, dtype=dtype, device="meta"))


@pytest.mark.parametrize("tokens", [197, 1025])
@pytest.mark.parametrize("name", available_attention())
def test_launches_and_bytes_are_within_the_budget(name, tokens):
    traced = trace_block(Block(name, {}, 384, 6), tokens, 64, bfloat16=True)
    assert (traced.forward.launches <= MOST_FORWARD, traced.backward.launches <= MOST_BACKWARD) == (True, True)
    # With few tokens landmarks and weights count, which the minimum leaves out.
    assert traced.ratio <= (MOST_RATIO if tokens > 1000 else 1.2 * MOST_RATIO)


# Of "will throw a RuntimeError" in the documentation of torch.use_deterministic_algorithms, as operators.
RAISES = re.compile(
    r"(?!_?max_pool2d)_?(adaptive_)?(avg|max|fractional_max)_(pool[23]d|unpool[23]d)(_with_indices)?_backward"
    r"|upsample_\w+_backward"
    r"|(reflection|replication)_pad\w+_backward|grid_sampler_2d_backward|_?cumsum\w*|histc|kthvalue|put_|nll_loss2d\w*"
    r"|_embedding_bag\w*|_ctc_loss\w*|resize_|median\w*|bincount"
)


@pytest.mark.parametrize(("name", "options"), [case for case in CASES if case not in WITH_VALUE_CONV])
def test_no_operator_is_one_that_deterministic_training_refuses_on_a_gpu(name, options):
    traced = trace_block(Block(name, options, 48, 4), 50, 2, bfloat16=False)  # 7 x 7 patches, which little divides
    assert len(traced.backward.calls) > 5
    assert [called for called, _ in traced.forward.calls + traced.backward.calls if RAISES.fullmatch(called)] == []


def test_fused_moves_what_its_products_and_its_attention_read_and_write():
    b, n, c, h = 3, 17, 16, 2
    t, w = b * n * c, c * c
    traced = trace_block(Block("fused", {}, c, h), n, b, bfloat16=True)
    casts = (4 + 2) * (t + 3 * w + 3 * c + w + c)  # of tokens, weights and biases
    maps = 2 * (t + 3 * w + 3 * c + 3 * t)
    attention = 2 * 4 * t + 4 * b * h * n + 2 * 8 * 8  # with the logarithms of sums, and the state of a generator
    projection = 2 * (t + w + c + t)
    assert traced.forward.launches == 5 + 3
    assert abs(traced.forward.bytes - (casts + maps + attention + projection)) <= 128
    assert traced.least_bytes == (22 + 34) * t + (4 + 8) * (4 * w + 4 * c)


def test_what_a_mechanism_repeats_is_read_once_and_views_are_no_launches():
    x = on_cuda(3, 5)
    with Launches() as launches:
        repeated = x[:1].expand(4, 5).unsqueeze(0).transpose(1, 2)
        x.new_empty(7)
        assert launches.calls == []
        repeated.sum()
    assert bytes_of(repeated) == 20 and launches.calls == [("sum", 24)]


def test_what_is_overwritten_is_not_read():
    x, y = on_cuda(10), on_cuda(10)
    with Launches() as launches:
        x.copy_(y)
        x.add_(y)
        x.zero_()
        torch.add(x, y, out=y.view(10))
        x.new_zeros(2)
    assert launches.calls == [("copy_", 80), ("add_", 120), ("zero_", 40), ("add", 120), ("new_zeros", 8)]


@torch.library.custom_op("effvit_tests::doubled", mutates_args=())
def doubled(x: Tensor) -> Tensor:
    return x * 2 + 0 * x.exp()


doubled.register_fake(torch.empty_like)
doubled.register_autograd(lambda ctx, gradient: doubled(gradient))


def test_an_operator_of_ones_own_is_one_launch_forward_and_backward():
    x, gradient = on_cuda(10).requires_grad_(), on_cuda(10)
    with Launches() as forward:
        y = doubled(x)
    with Launches() as backward:
        y.backward(gradient)
    assert forward.calls == backward.calls == [("doubled", 80)]


def test_autocast_converts_a_weight_once_and_tokens_for_each_product():
    x, weight = on_cuda(4, 8), torch.nn.Parameter(on_cuda(8, 8))
    with Cuda(), Launches() as launches, autocast(torch.bfloat16):
        F.linear(F.linear(x, weight), weight)
        y = F.linear(x, weight)
        casts = [name for name, _ in launches.calls].count("_to_copy")
        assert (casts, y.dtype, y.softmax(dim=-1).dtype) == (3, torch.bfloat16, torch.float32)
        with torch.autocast("cuda", enabled=False):
            assert (x @ x.T).dtype == torch.float32
    with Cuda(), autocast(torch.bfloat16), pytest.raises(NotImplementedError, match="cosine_similarity"):
        F.cosine_similarity(x, x)


def test_what_is_written_down_of_autocast_is_what_it_acts_on():
    from effvit.measure import without_gpu as of

    named = of._LOWER | of._FLOAT32 | of._FLOAT32_RESULT | of._WIDEST
    assert {name.strip("_").replace("rmatmul", "matmul") for name in named} <= _known_to_autocast()


@pytest.mark.parametrize(
    ("dtype", "masked", "kernel"),
    [(torch.bfloat16, False, "flash"), (torch.bfloat16, True, "efficient"), (torch.float32, False, "efficient")],
)
def test_softmax_attention_is_one_kernel_and_three_more_for_a_mask(dtype, masked, kernel):
    q = on_cuda(2, 3, 16, 8, dtype=dtype).requires_grad_()
    mask = on_cuda(1, 1, 16, 16, dtype=torch.bool) if masked else None
    gradient = on_cuda(2, 3, 16, 8, dtype=dtype)
    with Cuda(), Launches() as forward:
        y = F.scaled_dot_product_attention(q, q, q, attn_mask=mask)
    with Launches() as backward:
        y.backward(gradient)
    names = [name for name, _ in forward.calls]
    assert names[-1] == f"_scaled_dot_product_{kernel}_attention" and len(names) == (4 if masked else 1)
    assert backward.calls[0][0] == f"_scaled_dot_product_{kernel}_attention_backward"


def test_the_command_marks_what_is_above_the_budget(effvit):
    said = effvit("trace", "--attention", "fused,standard", "--tokens", "65", "--width", "48x4", "--batch-size", "2")
    assert said.code == 0
    assert "budget: 40 and 80 launches" in said.out and "fused" in said.out
    one = effvit("trace", "--attention", "linformer", "-o", "k=4", "--tokens", "65", "--width", "48x4")
    assert one.code == 0 and "bmm" in one.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tokens", "64"), "--tokens 64: must be 1 + n²"),
        (("--width", "48"), "--width '48': expected WIDTHxHEADS"),
        (("-o", "k=4"), "--option k=4: needs a single --attention"),
        (("--attention", "linformer", "-o", "m=4"), "--option m: unknown option"),
        (("--batch-size", "0"), "--batch-size 0"),
    ],
)
def test_the_command_names_the_flag_that_is_wrong(arguments, message, effvit):
    said = effvit("trace", *arguments)
    assert said.code == 1 and message in said.err


@pytest.mark.parametrize("bfloat16", [True, False])
@pytest.mark.slow
def test_no_mechanism_with_any_options_moves_less_than_the_minimum(bfloat16):
    shifted = [("window", {"window_size": 3, "shift": True}), ("hybrid", {"window_size": 3, "dilations": [1, 2, 3]})]
    for name, options in CASES + shifted:
        options = dict(options)
        block = Block(name, options, 32, 2, options.pop("value_conv", 0))
        assert trace_block(block, 26, 2, bfloat16=bfloat16).ratio > 1, (name, options)
