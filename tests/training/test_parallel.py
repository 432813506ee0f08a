"""Two gloo processes on the CPU beside one."""

import itertools
import json
import os
import signal
import subprocess
import sys
import warnings
from contextlib import ExitStack
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from conftest import TINY, TINY_FLAGS
from lightning_fabric import Fabric
from lightning_fabric.utilities.exceptions import MisconfigurationException
from processes import finished, read_until

from effvit.data.loading.batches import Place
from effvit.errors import UserError
from effvit.model.vit import ViTConfig
from effvit.training.parallel import Exchange, make_fabric
from effvit.training.recipe import TrainConfig
from effvit.training.run import train_to

pytestmark = pytest.mark.slow

OPTIONS = {
    "linformer": {"k": 6},
    "performer": {"num_features": 8, "redraw_every": 3},
    "nystromformer": {"num_landmarks": 6},
    "hybrid": {"window_size": 2},
}
# 1,293 training images: a last batch of one, of which a process has none; 145 of validation.
RECIPE = {"epochs": 2, "batch_size": 68, "lr": 3e-3, "clip_norm": 1.0, "crop_padding": 1, "device": "cpu"}
MIXED = {"mixup": 0.8, "cutmix": 1.0, "random_erasing": 0.3, "ema_decay": 0.9, "label_smoothing": 0.1}
MUON = {"optimizer": "muon"}
# Of mechanisms those with random features, weights of their own, or that differ by block.
MECHANISMS = ("fused", *OPTIONS)
JOBS = [(name, {}) for name in MECHANISMS] + [("fused", MIXED), ("fused", MUON)]
RUNS = [
    ({"image_size": 16, "attention": name, "attention_options": OPTIONS.get(name, {}), **TINY}, RECIPE | more)
    for name, more in JOBS
]

WORKER = """
import atexit, json, os, sys
from pathlib import Path

def note_threads():
    names = [file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")]
    Path(f"threads{os.environ['RANK']}").write_text(" ".join(names))

atexit.register(note_threads)  # before all others, so that it runs after them
from effvit.training.recipe import TrainConfig
from effvit.data.loading.prepared import PreparedDataset
from effvit.training.run import train_to
from effvit.model.vit import ViTConfig

job = json.loads(sys.argv[1])
sys.argv[1:] = job["command"]
from effvit.cli.app import main
try:
    main()
except SystemExit as end:
    assert not end.code
dataset = PreparedDataset.load(Path(job["dataset"]))
for number, (model, recipe) in enumerate(job["runs"]):
    out = Path(f"run{number}"), Path(f"log{number}")
    train_to(*out, ViTConfig(**model), dataset, TrainConfig(**recipe), seed=0, horizontal_flip=True)
"""


def train_command(dataset_dir, output_dir):
    """Arguments of effvit that train by two processes."""
    arguments = ["train", "--dataset-dir", dataset_dir, "--output-dir", output_dir, *TINY_FLAGS]
    return [*map(str, [*arguments, "--epochs", 8, "--batch-size", 68, "--device", "cpu", "--devices", 2])]


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory, digits_dir):
    """Directory in which two processes trained each of JOBS, under torchrun on two nodes, which are both this one.

    Before that they ran `train_command`, into ``whole``.
    """
    directory = tmp_path_factory.mktemp("parallel")
    (directory / "worker.py").write_text(WORKER)
    place = {"--rdzv-backend": "c10d", "--rdzv-conf": "store_type=file", "--rdzv-id": "test"}  # no port to run for
    place |= {"--rdzv-endpoint": str(directory / "meeting")}
    options = itertools.chain(*({"--nnodes": "2", "--nproc-per-node": "1"} | place).items())
    command = [sys.executable, "-m", "torch.distributed.run", *options, "worker.py"]
    command.append(
        json.dumps({"dataset": str(digits_dir), "runs": RUNS, "command": train_command(digits_dir, "whole")})
    )
    logs = [directory / f"node{number}.txt" for number in range(2)]
    with ExitStack() as stack:
        files = [stack.enter_context(log.open("w")) for log in logs]
        nodes = [subprocess.Popen(command, cwd=directory, stdout=file, stderr=file) for file in files]
        codes = [node.wait(timeout=1200) for node in nodes]
    said = "".join(log.read_text() for log in logs)
    assert codes == [0, 0], f"the nodes ended with {codes}\n{said}"
    assert said.count("epoch   1/2") == len(RUNS), "only the first process speaks"
    return directory


@pytest.mark.parametrize("number", range(len(JOBS)), ids=[f"{name}-{'-'.join(more)}" for name, more in JOBS])
def test_two_processes_have_the_losses_of_one(two_nodes, digits, tmp_path, number):
    model, recipe = RUNS[number]
    outputs = tmp_path / "alone", tmp_path / "alone-log"
    train_to(*outputs, ViTConfig(**model), digits, TrainConfig(**recipe), seed=0, horizontal_flip=True)
    one, two = (pd.read_csv(log / "history.csv") for log in (outputs[1], two_nodes / f"log{number}"))
    pd.testing.assert_frame_equal(two, one, rtol=1e-5, atol=0)


def test_no_thread_of_gloo_is_there_when_python_ends(two_nodes):
    """One that still held a tensor would abort the process: a run that is done would end with an error."""
    threads = [(two_nodes / f"threads{rank}").read_text() for rank in range(2)]
    assert [names for names in threads if "gloo" in names] == []


def test_the_sizes_are_those_that_two_does_not_divide(digits):
    assert digits.counts["train"] % RECIPE["batch_size"] == 1 and digits.counts["validation"] % 2 == 1


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [1, 2, 5, 17, 64])
def test_shares_are_even_parts_of_a_batch_that_keep_pairs_together(world, count):
    shares = [range(count)[Place(torch.device("cpu"), rank, world).share(count)] for rank in range(world)]
    assert [index for share in shares for index in share] == list(range(count))
    assert all(share.start % 2 == 0 for share in shares if len(share))
    assert max(map(len, shares)) - min(map(len, shares)) <= 3


@pytest.fixture
def command(tmp_path, digits_dir):
    """Command that trains by two processes, into `run`."""
    script = tmp_path / "start" / "script.py"
    script.parent.mkdir()
    script.write_text("from effvit.cli.app import main\nmain()\n")

    return [sys.executable, str(script), *train_command(digits_dir, tmp_path / "run")]


def test_devices_starts_as_many_processes_and_a_stopped_run_goes_on(tmp_path, command, two_nodes):
    """With the bytes of a run under torchrun that nobody stopped."""
    environment = os.environ | {"EFFVIT_STATE": str(tmp_path / "state")}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        read_until(process, "epoch   1/")
        process.terminate()
        _, error = process.communicate()
    assert process.returncode == 143, error
    assert "stopped at epoch" in error and "Traceback" not in error
    assert "resuming at epoch" in finished(*command, env=environment).stderr
    for path in ("{}/model.safetensors", "{}-log/history.csv"):
        assert (tmp_path / path.format("run")).read_bytes() == (two_nodes / path.format("whole")).read_bytes()
    settings = json.loads((tmp_path / "run-log" / "provenance.json").read_text())["config"]
    assert settings["processes"] == 2


def test_no_process_outlives_the_first_not_even_one_that_waits_for_it(command, tmp_path):
    environment = os.environ | {"EFFVIT_STATE": str(tmp_path / "state")}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        read_until(process, "MEMBER: 1/2")  # the other still imports
        process.kill()
        process.communicate(timeout=300)  # until nobody has stderr open
    assert process.returncode == -signal.SIGKILL


def test_a_start_that_fails_leaves_nothing_behind_for_the_next(monkeypatch):
    def fail(self):
        raise RuntimeError("no port is free")

    before = dict(os.environ)
    with monkeypatch.context() as patch:
        patch.setattr(Fabric, "launch", fail)
        with pytest.raises(RuntimeError, match="no port"):
            make_fabric("cpu")
    assert os.environ.keys() == before.keys()
    assert make_fabric("cpu").world_size == 1


def test_more_devices_than_there_are_is_one_line(monkeypatch):
    def refuse(**settings):
        raise MisconfigurationException("You requested gpu: [0, 1, 2, 3] But your machine only has: [0]")

    monkeypatch.setattr("effvit.training.parallel.Fabric", refuse)
    with pytest.raises(UserError, match="device=cpu, devices=4: not usable here"):
        make_fabric("cpu", devices=4)


def test_gradients_stay_where_they_are_if_they_shall():
    layer, alone = torch.nn.Linear(3, 2), SimpleNamespace(world_size=1, device=torch.device("cpu"))
    exchange = Exchange(alone, layer.parameters(), stay=True)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    places = [parameter.grad.data_ptr() for parameter in layer.parameters()]
    x = torch.arange(12.0).view(4, 3)
    for _ in range(2):
        exchange.clear(optimizer)
        for part in x.split(2):
            layer(part).sum().backward()
        figures = torch.ones(3)
        assert exchange.sum(figures) is figures
        assert torch.equal(layer.weight.grad, x.sum(dim=0).expand(2, 3)) and layer.bias.grad.tolist() == [4, 4]
    assert [parameter.grad.data_ptr() for parameter in layer.parameters()] == places


def test_what_ends_one_process_is_told_in_one_line_by_each(command, tmp_path):
    (tmp_path / "state").touch()  # where a directory should be
    environment = os.environ | {"EFFVIT_STATE": str(tmp_path / "state")}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    assert f"error: {tmp_path / 'state'}" in result.stderr
    assert "error: another process of this training has ended; its own message says why" in result.stderr


def test_device_that_is_not_there_is_a_user_error():
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="device=cuda"):
            make_fabric("cuda")
        with pytest.raises(UserError, match="device=cuda"):
            make_fabric("cuda", precision="16-mixed")
    assert make_fabric("cpu").device.type == "cpu"


@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_float16_without_cuda_is_a_user_error_and_nothing_else(monkeypatch, capfd, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with warnings.catch_warnings(record=True) as warned, pytest.raises(UserError, match="precision=16-mixed"):
        warnings.simplefilter("always")
        make_fabric(device, precision="16-mixed")
    assert warned == [] and capfd.readouterr() == ("", "")


def test_gradients_are_views_of_what_is_sent():
    parameters = [torch.nn.Parameter(torch.randn(3, 2)), torch.nn.Parameter(torch.randn(4).double())]
    frozen = torch.nn.Parameter(torch.randn(2), requires_grad=False)
    optimizer, figures = torch.optim.SGD(parameters, lr=0.1), torch.tensor([1.0, 2.0])
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        exchange = Exchange(SimpleNamespace(world_size=2, device=torch.device("cpu")), [*parameters, frozen])
        sent = [buffer.data_ptr() for buffer in exchange._buffers]
        for _ in range(2):
            sum(p.square().sum() for p in parameters).backward()
            assert torch.equal(exchange.sum(figures), figures), "of one process the sum is its own"
            assert [p.grad.data_ptr() for p in parameters] == sent and frozen.grad is None
            for parameter in parameters:
                torch.testing.assert_close(parameter.grad, 2 * parameter.detach())
            exchange.clear(optimizer)
            assert not any(p.grad.any() for p in parameters)
    finally:
        torch.distributed.destroy_process_group()
