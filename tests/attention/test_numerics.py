"""Outputs and gradients in float32 and under bfloat16 autocast against the same module in float64.

The tolerance is derived, not tuned. Rounding the tokens and weights to a precision of unit roundoff u moves the exact
result by some distance, found here in float64 by moving them at random by up to u. No algorithm can be expected to
do better; one that rounds a few dozen intermediate results by itself stays within a small multiple. What loses
digits on the way (a cancelled sum, an iteration in too low a precision, a normaliser that underflows) does not.

Gradients have one cancellation that cannot be avoided: through a quotient of sums over keys (softmax or not) goes
dP - Σ P dP, the difference of numbers as large as gradient times value, whatever little is left where one key has all
the weight. So they are also granted what rounding these numbers makes of them on their way to the tokens.
"""

import copy

import pytest
import torch
from mechanisms import CASES, heads_of, merged_maps

from effvit import build_attention

pytestmark = pytest.mark.slow

WIDTH, HEADS, SAMPLES = 16, 4, 3
UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
MULTIPLE = 16


def attention_for(name, options, grid):
    fits = {key: min(value, grid[0] * grid[1]) if key == "k" else value for key, value in options.items()}
    if name == "hybrid":
        fits["window_size"] = min(options["window_size"], max(grid))
        fits["dilations"] = [1, 2] if max(grid) > 1 else [1]
        fits.setdefault("branches", ["regional", "dilated", "linear"])
        if max(grid) == 1:
            fits["branches"] = [branch for branch in fits["branches"] if branch != "dilated"]
    torch.manual_seed(0)
    return build_attention(name, WIDTH, HEADS, grid, **fits)


def output_and_gradient(attention, x, gradient):
    x = x.detach().requires_grad_()
    y = attention(x)
    (d_x,) = torch.autograd.grad(y, x, gradient.to(y.dtype))
    return y.detach().double(), d_x.double()


def moved(tensor, by, generator):
    noise = 2 * torch.rand(tensor.shape, generator=generator, dtype=torch.float64) - 1
    return tensor * (1 + by * noise)


def movement(attention, x, gradient, u):
    """Largest distance, of the output and of the gradient, that moving tokens and weights by u makes; and both."""
    generator = torch.Generator().manual_seed(1)
    exact = output_and_gradient(attention, x, gradient)
    distances = []
    for _ in range(6):
        other = copy.deepcopy(attention)
        with torch.no_grad():
            for tensor in (*other.parameters(), *(b for b in other.buffers() if b.is_floating_point())):
                if tensor.unique().numel() > 2:  # but for ones and zeros, which every precision holds
                    tensor.copy_(moved(tensor, u, generator))
        result = output_and_gradient(other, moved(x, u, generator), gradient)
        distances.append([(a - b).norm() for a, b in zip(result, exact, strict=True)])
    return exact, torch.tensor(distances).amax(dim=0)


def cancelled(attention, x, gradient):
    """Bound of what dP, of the size of gradient times value, would make of the gradient by itself."""
    weight, bias = merged_maps(attention)
    q, k, v = (heads_of(part, HEADS).norm(dim=-1).max() for part in (x @ weight.T + bias).chunk(3, dim=-1))
    slope = max(1.0, (q + k).item() / (WIDTH // HEADS) ** 0.5)
    return (gradient @ attention.proj.weight).norm() * v * slope * torch.linalg.matrix_norm(weight, ord=2)


@pytest.mark.parametrize("dtype", UNIT_ROUNDOFF, ids=str)
@pytest.mark.parametrize("scale", [0.01, 1.0, 50.0])
@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (9, 7)], ids=str)
@pytest.mark.parametrize("name, options", CASES)
def test_errors_are_those_that_rounding_the_input_makes(name, options, grid, scale, dtype):
    attention = attention_for(name, options, grid)
    generator = torch.Generator().manual_seed(2)
    shape = (SAMPLES, 1 + grid[0] * grid[1], WIDTH)
    x, gradient = (torch.randn(shape, generator=generator) for _ in range(2))
    x = scale * x
    exact, allowed = movement(copy.deepcopy(attention).double(), x.double(), gradient.double(), UNIT_ROUNDOFF[dtype])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        computed = output_and_gradient(attention, x, gradient)
    with torch.no_grad():
        allowed[1] += UNIT_ROUNDOFF[dtype] * cancelled(attention, x, gradient)
    for what, result, truth, distance in zip(("output", "gradient"), computed, exact, allowed, strict=True):
        error = (result - truth).norm()
        assert error <= MULTIPLE * distance, f"{what}: {error / distance:.1f} times what rounding the input makes"
