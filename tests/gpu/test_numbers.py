"""Every mechanism on a GPU: outputs and gradients against float64 on the CPU, maps, dropout, new features."""

import copy
import json
import time
from contextlib import nullcontext

import pytest
import torch
from mechanisms import FIRST, SMALL

from effvit import available_attention, build_attention
from effvit.measure.subject import Block, square_grid
from effvit.measure.trace import trace_block

pytestmark = pytest.mark.gpu

# Largest distance of an output, relative to its norm; of a gradient five times that.
TOLERANCE = {"float32": 2e-4, "tf32": 2e-2, "bfloat16": 6e-2, "float16": 2e-2}
SIZES = [(65, 2, 16), (65, 4, 12), (197, 3, 64), (1025, 2, 64)]  # tokens, heads, width of a head
OF_DRY_RUN = (17, 2, 8)


def copies_of(attention, device):
    """In float64 on the CPU, and as it is on the device."""
    return copy.deepcopy(attention).double(), copy.deepcopy(attention).to(device)


def output_and_gradients(attention, x, gradient, context):
    x = x.detach().requires_grad_()
    with context:
        y = attention(x)
    weights = [p for p in attention.parameters() if p.requires_grad]
    found = torch.autograd.grad(y, [x, *weights], gradient.to(y.device, y.dtype), allow_unused=True)
    return [y.detach(), *(g for g in found if g is not None)]


def distance(a, b):
    """Relative to b, or to a tenth of unit scale where b is smaller, as what a softmax makes of a bias of all keys."""
    return ((a.cpu().double() - b).norm() / b.norm().clamp(min=0.1 * b.numel() ** 0.5)).item()


def largest_distances(attention, device, precision, samples=2):
    exact, module = copies_of(attention, device)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, attention.num_tokens, attention.dim, generator=generator, dtype=torch.float64)
    gradient = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    half = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(precision)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != "float32"
    context = torch.autocast(device.type, half) if half else nullcontext()
    expected = output_and_gradients(exact, x, gradient, nullcontext())
    actual = output_and_gradients(module, x.float().to(device), gradient, context)
    distances = [distance(a, e) for a, e in zip(actual, expected, strict=True)]
    return distances[0], max(distances[1:])


def sized(name, tokens, heads, width):
    options = SMALL.get(name, [{}])[0] if tokens == OF_DRY_RUN[0] else {}
    return build_attention(name, heads * width, heads, square_grid(tokens), **options)


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("name", available_attention())
def test_outputs_and_gradients_are_those_of_float64(name, precision, device, full, note):
    if precision in ("tf32", "float16") and not full:
        pytest.skip("belongs to CUDA")
    worst = {}
    for size in SIZES if full else [OF_DRY_RUN]:
        torch.manual_seed(0)
        worst["x".join(map(str, size))] = largest_distances(sized(name, *size), device, precision)
    note(largest_errors=worst)
    assert max(output for output, _ in worst.values()) < TOLERANCE[precision]
    assert max(gradient for _, gradient in worst.values()) < 5 * TOLERANCE[precision]


@pytest.mark.parametrize(("name", "options"), FIRST, ids=[name for name, _ in FIRST])
def test_grids_of_odd_sides_and_several_prefix_tokens(name, options, device, note):
    torch.manual_seed(0)
    attention = build_attention(name, 16, 2, (3, 5), prefix_tokens=3, **options)
    errors = largest_distances(attention, device, "float32")
    note(largest_errors=errors)
    assert max(errors) < 5 * TOLERANCE["float32"]


@pytest.mark.parametrize("name", available_attention())
def test_long_sequences_are_finite(name, device, full):
    tokens = 16385 if full else 257
    attention = build_attention(name, 128, 2, square_grid(tokens)).to(device)
    x = torch.randn(1, tokens, 128, device=device, requires_grad=True)
    with torch.autocast(device.type, torch.bfloat16):
        y = attention(x)
    y.float().square().mean().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()


@pytest.mark.parametrize("name", ["fused", "window", "hybrid", "linformer"])
def test_more_samples_times_heads_than_a_grid_has_blocks(name, device, full):
    samples = 20_000 if full else 8
    options = {"window_size": 1} if name in ("window", "hybrid") else {}
    options |= {"k": 3} if name == "linformer" else {}
    attention = build_attention(name, 16, 4, (2, 2), **options).to(device)
    x = torch.randn(samples, 5, 16, device=device, requires_grad=True)
    with torch.autocast(device.type, torch.bfloat16):
        both = attention(x)
        last = attention(x[-2:])
    both.float().sum().backward()
    torch.testing.assert_close(both[-2:], last, rtol=0.02, atol=0.02)
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(("name", "options"), FIRST, ids=[name for name, _ in FIRST])
def test_maps_are_those_of_the_cpu_and_dropout_drops(name, options, device):
    torch.manual_seed(0)
    attention = build_attention(name, 16, 2, (3, 5), attn_drop=0.5, **options).eval()
    x = torch.randn(2, 16, 16)
    exact, module = copies_of(attention, device)
    torch.backends.cuda.matmul.allow_tf32 = False
    _, expected = exact(x.double(), True)
    y, found = module(x.to(device), True)
    torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-3, atol=1e-4)
    module.train()
    torch.manual_seed(1)
    dropped = module(x.to(device))
    torch.manual_seed(1)
    assert torch.equal(dropped, module(x.to(device))) and not torch.allclose(dropped, y)


def test_new_random_features_are_the_same_on_every_device(device):
    here, there = (build_attention("performer", 16, 2, (2, 2), redraw_every=1) for _ in range(2))
    there.to(device)
    for attention in (here, there):
        attention.after_step(1, torch.Generator().manual_seed(5))
    assert torch.equal(here.omega, there.omega.cpu())


def test_the_machine_and_what_it_reaches_at_most(device, full, note):
    """Bytes per second of a copy and operations per second of a product: what other times are compared with."""
    n = 2**29 if full else 2**20
    x = torch.empty(n, dtype=torch.uint8, device=device)
    a = torch.randn(8192 if full else 64, 8192 if full else 64, device=device, dtype=torch.bfloat16)
    seconds = {}
    for what, call in (("copy", lambda: x.clone()), ("product", lambda: a @ a)):
        call()
        if full:
            torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(10):
            call()
        if full:
            torch.cuda.synchronize()
        seconds[what] = (time.perf_counter() - started) / 10
    found = {"gb_per_s": 2 * n / seconds["copy"] / 1e9, "bf16_tflops": 2 * len(a) ** 3 / seconds["product"] / 1e12}
    note(**found)
    assert json.loads(json.dumps(found)) == found and min(found.values()) > 0


@pytest.mark.parametrize("name", available_attention())
def test_no_fewer_kernels_run_than_are_traced(name, device, full, note):
    block, tokens = Block(name, {}, 128, 2), 1025 if full else 65
    traced = trace_block(block, tokens, 2, bfloat16=True)
    note(traced=[traced.forward.launches, traced.backward.launches])
    if not full:
        return
    module = block.build(tokens).to(device)
    x = torch.randn(2, tokens, 128, device=device, requires_grad=True)

    def run():
        with torch.autocast("cuda", torch.bfloat16):
            y = module(x)
        y.backward(torch.ones_like(y))

    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
    kernels = sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())
    note(kernels=kernels)
    assert kernels >= 0.9 * (traced.forward.launches + traced.backward.launches)
