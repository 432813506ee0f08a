"""What tests on a GPU share: the device, and a record of what they found, for `make test-gpu`."""

import json
from dataclasses import asdict

import pytest
import torch

from effvit import policy
from effvit.device import pick_device, this_machine

FOUND = pytest.StashKey[dict]()


@pytest.fixture(scope="session")
def device(pytestconfig) -> torch.device:
    """CUDA, or the CPU where --device says so."""
    asked = pytestconfig.getoption("--device")
    if asked is None and not torch.cuda.is_available():
        pytest.skip("no CUDA; --device cpu is a dry run")
    return pick_device(asked or "cuda")


@pytest.fixture(scope="session")
def full(device) -> bool:
    """Whether sizes are those of a GPU."""
    return device.type == "cuda"


@pytest.fixture(autouse=True)
def as_training_has_it(device):
    """PyTorch set up as in training, for one test."""
    with policy.kept():
        policy.apply(device, deterministic=True)
        yield


@pytest.fixture
def note(request):
    """Write numbers down under the test's name."""
    found = request.config.stash.setdefault(FOUND, {})
    return lambda **numbers: found.setdefault(request.node.name, {}).update(numbers)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    if report.when == "call" or report.outcome != "passed":
        entry = item.config.stash.setdefault(FOUND, {}).setdefault(item.name, {})
        entry |= {"outcome": report.outcome, "seconds": round(report.duration, 3)}
        if report.failed:
            entry["error"] = report.longreprtext.splitlines()[-1]


def pytest_sessionfinish(session):
    folder = session.config.getoption("--gpu-report")
    if folder is None:
        return
    from stages.study_gpu import folder_of

    device = pick_device(session.config.getoption("--device") or "auto")
    with policy.kept():
        policy.apply(device, deterministic=True)
        machine = this_machine(device)
    file = folder / folder_of(machine) / "tests.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    result = {"machine": asdict(machine), "tests": session.config.stash.get(FOUND, {})}
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
