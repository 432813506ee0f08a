"""Measuring on a GPU: bytes and times are the driver's, compiled blocks and graphs compute what eager ones do."""

import time

import pytest
import torch

from effvit.measure.energy import counter_of
from effvit.measure.execution import Execution, busy_share
from effvit.measure.latency import stopwatch_for
from effvit.measure.memory import peak_bytes
from effvit.model.vit import ViT

pytestmark = pytest.mark.gpu


def test_the_peak_is_what_a_call_allocates(device):
    def call():
        first = torch.empty(2**20, device=device)
        second = torch.empty(2**20, device=device)
        del first, second
        torch.empty(2**19, device=device)

    assert peak_bytes(call, device) == 2 * 4 * 2**20


def test_events_measure_what_the_clock_on_the_wall_does(device, full, note):
    a = torch.randn(4096 if full else 64, 4096 if full else 64, device=device)
    call = lambda: a @ a  # noqa: E731
    stopwatch = stopwatch_for(device)
    stopwatch(call, 3)
    started = time.perf_counter()
    seconds = stopwatch(call, 50)
    wall = time.perf_counter() - started
    note(events=seconds, wall=wall, busy=busy_share(call, device))
    assert 0 < seconds <= wall * 1.01
    assert not full or seconds > 0.8 * wall


def test_energy_is_counted(device, note):
    counter = counter_of(device)
    note(joules_are_counted=counter is not None)
    if counter is not None:
        before = counter()
        assert counter() >= before


@pytest.mark.parametrize("mode", ["compiled", "graphs"])
@pytest.mark.parametrize("name", ["fused", "linformer", "performer", "nystromformer", "hybrid"])
def test_compiled_blocks_and_graphs_are_the_eager_ones_and_compiled_once(name, mode, tiny_config, device, full, note):
    if not full:
        pytest.skip("tests/measure and tests/model compile on the CPU")
    torch.manual_seed(0)
    options = {"k": 5} if name == "linformer" else {}
    model = ViT(tiny_config(attention=name, attention_options=options)).to(device)
    images = torch.randn(8, 3, 16, 16, device=device)
    labels = torch.arange(8, device=device)

    def step():
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        model.zero_grad()
        loss.backward()
        return loss.item(), [p.grad.clone() for p in model.parameters()]

    expected = step()
    Execution("float32", mode).prepare(model, device)
    for _ in range(3):
        found = step()
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    step()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled
    errors = [((a - b).norm() / b.norm().clamp(min=1e-6)).item() for a, b in zip(found[1], expected[1], strict=True)]
    note(largest_error=max(errors))
    assert found[0] == pytest.approx(expected[0], rel=1e-3) and max(errors) < 2e-2
