"""What several test modules need: a small prepared data set, a trained model, the command as a function."""

import os

os.environ.pop("COLUMNS", None)  # of whoever runs the tests; rich keeps the width that it starts with
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models here are so small that threads only wait for one another

import signal
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

# The smallest ViT that learns the digits at all, and its flags.
TINY = {
    "patch_size": 4,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "initializer_range": 0.1,
}
TINY_FLAGS = [word for key, value in TINY.items() for word in (f"--{key.replace('_', '-')}", str(value))]


# Files of more than half a minute. By the time of the fourth there is the study that the first makes and three use.
LONGEST = (
    "test_reproduction.py",
    "test_contract.py",
    "test_resume.py",
    "test_experiments.py",
    "test_cluster.py",
    "test_triton.py",
    "test_parallel.py",
    "test_report.py",
    "test_real_imagenet.py",
)


class Outcome(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of tests/gpu."""
    parser.addoption(
        "--device", choices=["cuda", "cpu"], help="of tests/gpu: cuda, or cpu for a dry run of small sizes"
    )
    parser.addoption("--gpu-report", type=Path, help="folder in which tests/gpu write what they found")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that the others even out when the processes end."""
    rank = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


@pytest.fixture(autouse=True)
def signals() -> None:
    """Ctrl-C and hang-up as a program finds them: a shell or nohup starts what runs behind it with these ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def poisoned_memory(request, monkeypatch):
    """Of mechanisms and kernels: memory that is not written is NaN."""
    if request.path.parent.name not in ("attention", "kernels"):
        yield
        return
    import torch

    before = torch.are_deterministic_algorithms_enabled()
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True, scope="session")
def state_dir(tmp_path_factory) -> Path:
    """Where training keeps what it goes on from, and measurements wait for one another: not where the user's own do."""
    directory = tmp_path_factory.mktemp("state")
    os.environ["EFFVIT_STATE"] = str(directory)
    os.environ["EFFVIT_LOCK"] = str(directory / "lock")
    return directory


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory) -> Path:
    """The digits at 16 x 16 pixels, prepared."""
    from effvit.data.preparing import prepare

    directory = tmp_path_factory.mktemp("prepared") / "digits"
    prepare("digits", None, 16, directory)
    return directory


@pytest.fixture(scope="session")
def digits(digits_dir):
    from effvit.data.loading.prepared import PreparedDataset

    return PreparedDataset.load(digits_dir)


@pytest.fixture(scope="session")
def tiny_config():
    """Configuration of the tiny model for `digits`; keyword arguments change or add fields."""
    from effvit.model.vit import ViTConfig

    def make(**changes):
        return ViTConfig(**({"image_size": 16, "num_classes": 10} | TINY | changes))

    return make


@pytest.fixture(scope="session")
def trained(tmp_path_factory, digits, tiny_config) -> Path:
    """A directory with the model ``run`` and its log ``run-log``: fused attention, 3 epochs, every epoch kept."""
    from effvit.training.recipe import TrainConfig
    from effvit.training.run import train_to

    directory = tmp_path_factory.mktemp("trained")
    recipe = TrainConfig(epochs=3, batch_size=64, lr=5e-3, warmup_epochs=0.5, save_every=1, device="cpu")
    train_to(directory / "run", directory / "run-log", tiny_config(), digits, recipe, seed=0, horizontal_flip=False)
    return directory


@pytest.fixture(scope="session")
def digits12_dir(tmp_path_factory) -> Path:
    """The digits at 12 x 12 pixels, prepared: with patches of 4 a grid of odd sides."""
    from effvit.data.preparing import prepare

    directory = tmp_path_factory.mktemp("prepared12") / "digits"
    prepare("digits", None, 12, directory)
    return directory


@pytest.fixture(scope="session")
def digits12(digits12_dir):
    from effvit.data.loading.prepared import PreparedDataset

    return PreparedDataset.load(digits12_dir)


@pytest.fixture(scope="session")
def exported(tmp_path_factory, digits12) -> dict[str, Path]:
    """By mechanism, a directory with a tiny model on 3 x 3 patches, its ``model.onnx`` and ``int8.onnx``.

    After a mechanism's name may stand ``+value_conv`` or ``+gate``. Each is made when it is first asked for: that
    takes seconds.
    """
    import torch
    from mechanisms import FIRST

    from effvit import ViT, ViTConfig
    from effvit.deploy.export import export_onnx
    from effvit.deploy.int8 import quantize
    from effvit.model.checkpoint import save_model

    class Exported(dict[str, Path]):
        def __missing__(self, name: str) -> Path:
            torch.manual_seed(1)
            attention, _, more = name.partition("+")
            size = {"image_size": 12, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
            size |= {"intermediate_size": 16, "initializer_range": 0.5}
            size |= {"value_conv": 3} if more == "value_conv" else {}
            if attention == "hybrid":  # a head for each branch
                size |= {"hidden_size": 12, "num_attention_heads": 3}
            options = dict(FIRST)[attention] | ({"fusion": "gate", "feature_map": "focused"} if more == "gate" else {})
            config = ViTConfig(**size, attention=attention, attention_options=options)
            model = ViT(config).eval()
            with torch.no_grad():
                for parameter in model.parameters():  # none that a graph could do without, as it could without zeros
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
            self[name] = directory = tmp_path_factory.mktemp(attention)
            save_model(model, directory)
            export_onnx(model, directory / "model.onnx", digits12)
            quantize(directory / "model.onnx", directory / "int8.onnx")
            return directory

    return Exported()


@pytest.fixture
def effvit(monkeypatch, capsys, tmp_path):
    """Call the console script's own entry point, in `tmp_path` and in this process: effvit("train", ...)."""

    def call(*arguments) -> Outcome:
        from effvit.cli.app import main

        monkeypatch.setattr(sys, "argv", ["effvit", *map(str, arguments)])
        monkeypatch.setenv("TERMINAL_WIDTH", "100")
        monkeypatch.chdir(tmp_path)
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        return Outcome(code, *capsys.readouterr())

    return call
