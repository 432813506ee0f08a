"""Training on a GPU: the same bytes again and after a stop, nothing waits, every optimiser, too little memory."""

import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from mechanisms import FIRST

from effvit.data.loading.randaugment import VARIANTS, randaugment
from effvit.data.loading.randaugment_by_tables import by_tables
from effvit.training.loop import Step, Training
from effvit.training.recipe import TrainConfig

pytestmark = pytest.mark.gpu

EVERYTHING = {
    "optimizer": "muon",
    "clip_norm": 1.0,
    "label_smoothing": 0.1,
    "ema_decay": 0.9,
    "crop_padding": 2,
    "randaugment": 9,
    "random_erasing": 0.5,
    "mixup": 0.8,
}


@pytest.fixture
def training(tiny_config, digits, device):
    def make(config=None, report=lambda line: None, **changes):
        fields = {"epochs": 3, "batch_size": 64, "lr": 1e-3, "device": device.type} | changes
        config = tiny_config(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1, **(config or {}))
        recipe = TrainConfig(**fields)
        return Training(config, digits, recipe, seed=0, horizontal_flip=True, report=report)

    return make


def take(training, steps):
    """Losses of so many steps."""
    return [event.loss for event in islice((e for e in training.run() if isinstance(e, Step)), steps)]


@pytest.mark.parametrize(("name", "options"), FIRST, ids=[name for name, _ in FIRST])
def test_twenty_steps_again_or_after_a_stop_are_the_same_bytes(name, options, training, full, note):
    config = {"attention": name, "attention_options": options}
    steps = 20 if full else 4
    once, stopped = (training(config, **EVERYTHING) for _ in range(2))
    losses = take(once, steps)
    take(stopped, steps // 3)
    again = training(config, **EVERYTHING)
    again.restore(*stopped.state())
    take(again, steps - again.step)
    (tensors, numbers), (others, _) = once.state(), again.state()
    note(last_loss=losses[-1], steps=numbers["step"])
    assert numbers["step"] >= steps and tensors.keys() == others.keys()
    assert [key for key, tensor in tensors.items() if not torch.equal(tensor, others[key])] == []


@pytest.mark.parametrize(("name", "options"), FIRST, ids=[name for name, _ in FIRST])
def test_steps_wait_for_nothing(name, options, training, full):
    run = training({"attention": name, "attention_options": options, "num_hidden_layers": 1}, **EVERYTHING)
    events = (event for event in run.run() if isinstance(event, Step))
    steps = list(islice(events, 2))
    if full:
        torch.cuda.set_sync_debug_mode("error")
    try:
        steps += islice(events, 6 if full else 1)
    finally:
        if full:
            torch.cuda.set_sync_debug_mode("default")
    assert all(step.loss > 0 for step in steps)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_every_optimiser_trains_in_half_precision_clipped_or_not(optimizer, clip_norm, training, full, note):
    losses = {
        precision: take(training(precision=precision, optimizer=optimizer, clip_norm=clip_norm), 20 if full else 2)
        for precision in ("32-true", "bf16-mixed", *(["16-mixed"] if full else []))
    }
    note(**{precision: of[-1] for precision, of in losses.items()})
    for of in losses.values():
        assert of == pytest.approx(losses["32-true"], rel=0.1)


def test_too_little_memory_halves_what_is_done_at_once(training, full, monkeypatch):
    said: list[str] = []
    if full:
        torch.cuda.empty_cache()
        _, total = torch.cuda.mem_get_info()
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + 64 * 2**20) / total)
        changes = {"batch_size": 1024}
        config = {"hidden_size": 256, "intermediate_size": 1024}
    else:
        config, changes, accumulate = {}, {}, Training._accumulate

        def with_little(self, batch, size):
            if size > 16:
                raise torch.OutOfMemoryError
            return accumulate(self, batch, size)

        monkeypatch.setattr(Training, "_accumulate", with_little)
    try:
        losses = take(training(config, said.append, **changes), 1)
    finally:
        if full:
            torch.cuda.set_per_process_memory_fraction(1.0)
    assert "retrying with" in said[0] and losses[0] > 0


@pytest.mark.parametrize("size", [16, 28, 224])
@pytest.mark.parametrize("magnitude", [9, 30])
def test_augmented_pixels_are_those_of_the_cpu(magnitude, size, device, full):
    if size > 28 and not full:
        pytest.skip("tests/data/loading has smaller ones on the CPU")
    generator = torch.Generator().manual_seed(magnitude)
    images = torch.randint(0, 256, (2 * len(VARIANTS), 3, size, size), dtype=torch.uint8, generator=generator)
    choices = torch.arange(len(VARIANTS)).repeat(2)
    choices = torch.stack([choices, choices[torch.randperm(len(choices), generator=generator)]])
    found = by_tables(images.to(device), choices.to(device), magnitude)
    assert torch.equal(found.cpu(), randaugment(images, choices, magnitude))


@pytest.mark.parametrize("how", ["on", "graphs"])
def test_compiled_training_and_validation_are_eager_ones(how, training, full, note):
    if not full:
        pytest.skip("tests/training/test_loop.py compiles on the CPU")
    same = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    recipe = {"precision": "32-true", "micro_batch_size": 24}
    runs = [training(same, compile=each, **recipe) for each in ("off", how)]
    losses, others = (take(run, 6) for run in runs)
    validated = [run.validate() for run in runs]
    note(losses=others[-1], validation=validated[1][0])
    assert others == pytest.approx(losses, rel=1e-2) and validated[1] == pytest.approx(validated[0], rel=2e-2)


def test_sums_over_a_group_of_one_are_what_they_were(device, tmp_path):
    """By NCCL on a GPU, and gloo on a CPU."""
    code = f"""
from types import SimpleNamespace
import torch
from effvit.training.parallel import Exchange
device = torch.device("{device.type}")
backend = "nccl" if device.type == "cuda" else "gloo"
torch.distributed.init_process_group(backend, init_method="file://{tmp_path}/meet", rank=0, world_size=1)
layer = torch.nn.Linear(3, 2).to(device)
exchange = Exchange(SimpleNamespace(world_size=2, device=device), layer.parameters())
layer(torch.ones(4, 3, device=device)).sum().backward()
figures = exchange.sum(torch.arange(3.0, device=device))
assert layer.weight.grad.tolist() == [[4.0] * 3] * 2 and figures.tolist() == [0.0, 1.0, 2.0]
torch.distributed.destroy_process_group()
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-2000:]


def test_processes_train_together(digits_dir, tmp_path, full):
    if not full:
        pytest.skip("tests/training/test_parallel.py has it on CPUs")
    script = Path(sys.executable).with_name("effvit")
    for number in dict.fromkeys((1, min(2, torch.cuda.device_count()))):
        out = tmp_path / f"of{number}"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(number)]
        command += ["--no-python", str(script), "train", "--dataset-dir", str(digits_dir), "--epochs", "1"]
        command += ["--batch-size", "64", "--lr", "1e-3", "--device", "cuda", "--output-dir", str(out)]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert ran.returncode == 0, ran.stderr[-2000:]
        assert (out / "model.safetensors").stat().st_size > 0
