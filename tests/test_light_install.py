"""The wheel without extras: what it brings suffices for models, and what it lacks is named."""

import os
import re
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
BASE = {"torch", "numpy", "pydantic", "safetensors"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    directory = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", "."]
    subprocess.run([*command, str(ROOT)], cwd=directory, check=True, capture_output=True)
    (file,) = directory.glob("effvit-*.whl")
    return file


def required(names):
    """Installed distributions that these need, themselves included, without extras."""
    found, waiting = {}, list(names)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # of another platform
            continue
        for text in found[name].requires or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(re.sub(r"[-_.]+", "-", requirement.name).lower())
    return found.values()


def environment(directory, wheel, names):
    """Fill a directory of packages with the wheel, and with links to these distributions and what they need."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(directory)
    for distribution in required(names):
        for file in distribution.files or []:
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (directory / top).exists():
                (directory / top).symlink_to(distribution.locate_file(top))
    return directory


def run(directory, code):
    """Run code with nothing but the standard library and the packages of a directory."""
    code = f"import sys; sys.path.insert(0, {str(directory)!r})\n{code}"
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    command = [sys.executable, "-I", "-S", "-c", code]
    return subprocess.run(command, cwd=directory, env=clean, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def light(tmp_path_factory, wheel):
    return environment(tmp_path_factory.mktemp("light"), wheel, BASE)


def test_the_wheel_requires_four_packages_and_is_typed(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (about,) = (name for name in names if name.endswith("METADATA"))
        text = archive.read(about).decode()
    requirements = [Requirement(line) for line in re.findall(r"^Requires-Dist: (.*)$", text, re.MULTILINE)]
    assert {r.name for r in requirements if r.marker is None} == BASE
    assert "effvit/py.typed" in names and not any(name.startswith(("tests", "stages")) for name in names)
    assert wheel.stat().st_size < 2**20


def test_models_are_built_saved_and_loaded_without_extras(light):
    ran = run(
        light,
        """
import torch
from effvit import ViT, ViTConfig, available_attention, build_attention, load_model
from effvit.model.checkpoint import save_model
from pathlib import Path
for name in available_attention():
    attention = build_attention(name, dim=48, num_heads=4, grid_size=(8, 8))
    y, a = attention(torch.randn(2, 65, 48), return_map=True)
    assert a.shape == (2, 4, 65, 65)
model = ViT(ViTConfig(attention="performer")).eval()
Path("model").mkdir()
save_model(model, Path("model"))
images = torch.randn(2, 3, 32, 32)
assert torch.equal(load_model(Path("model"))(images), model(images))
print("fine")
""",
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "fine\n", "")


def test_a_command_without_its_packages_says_what_to_install(light):
    ran = run(light, "sys.argv = ['effvit', 'mechanisms']; from effvit.cli import main; main()")
    assert ran.returncode == 1
    assert ran.stderr == "error: needs the package typer: pip install 'effvit[study]'\n"


def test_a_name_without_its_packages_says_what_to_install(light):
    ran = run(light, "import effvit; effvit.Trainer")
    assert ran.returncode == 1
    assert re.search(
        r"ModuleNotFoundError: effvit.Trainer needs the package \w+: pip install 'effvit\[study\]'", ran.stderr
    )


def test_attention_is_swapped_in_a_timm_model_without_extras(tmp_path, wheel):
    pytest.importorskip("timm", reason="needs timm, of the extra peers", exc_type=ImportError)
    directory = environment(tmp_path, wheel, {*BASE, "timm"})
    ran = run(
        directory,
        """
import timm, torch
from effvit import available_attention, swap_attention
images = torch.randn(2, 3, 64, 64)
for name in available_attention():
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=5).eval()
    before = model(images)
    report = swap_attention(model, name, **({"k": 8} if name == "linformer" else {}))
    after = model(images)
    assert name not in ("fused", "standard") or torch.allclose(after, before, atol=1e-5)
    assert after.isfinite().all() and "2 of 2" in str(report)
print("fine")
""",
    )
    assert (ran.returncode, ran.stdout) == (0, "fine\n"), ran.stderr
