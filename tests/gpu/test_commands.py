"""Every command that takes a device, once, on this one."""

import numpy as np
import pytest
from PIL import Image

from effvit.cli.app import app

pytestmark = pytest.mark.gpu

MODEL = "--patch-size 8 --hidden-size 16 --num-hidden-layers 1 --num-attention-heads 2 --intermediate-size 32"
QUICK = "--budget-s 0.01"
COMMANDS = {
    "machine": "",
    "train": "--dataset-dir {data} --output-dir {run} --epochs 1 --batch-size 256 --lr 1e-3 {model}",
    "evaluate": "--model-dir {run} --dataset-dir {data} --output-dir {out}/test",
    "predict": "--model-dir {run} --dataset-dir {data} {image}",
    "attention-map": "--model-dir {run} --dataset-dir {data} --output {out}/map.png {image}",
    "fidelity": "--model-dir {run} --dataset-dir {data} --output-dir {out}/fidelity",
    "representations": "--model-dir {run} --dataset-dir {data} --output-dir {out}/similarity",
    "choose": "--model tiny --image-sizes 32 --attention fused,linformer -o linformer.k=4 {quick}",
    "benchmark": "--attention linformer -o k=4 --output-dir {out}/cost --batch-size 4 --memory-mib 16 {model} {quick}",
    "scaling": "--attention linformer -o k=4 --output-dir {out}/scaling --tokens 17,65 --width 16x2 {model} {quick}",
    "bench-peers": "--attention window --output-dir {out}/peers --width 16x2 --tokens 17 --tokens-per-batch 34 {quick}",
    "bench-data": "--dataset-dir {data} --output-dir {out}/data --batch-size 16 {model} {quick}",
}


@pytest.fixture(scope="module")
def words(tmp_path_factory, digits_dir):
    out = tmp_path_factory.mktemp("commands")
    pixels = np.random.default_rng(0).integers(0, 255, (16, 16), dtype=np.uint8)
    Image.fromarray(pixels).save(out / "digit.png")
    named = {"data": digits_dir, "run": out / "run", "out": out, "image": out / "digit.png"}
    return named | {"model": MODEL, "quick": QUICK}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_runs(name, device, full, words, effvit):
    if name in ("benchmark", "bench-peers") and not full:
        pytest.skip("other tests have it on the CPU")
    if name == "bench-peers":
        pytest.importorskip("timm")
    done = effvit(name, "--device", device.type, *COMMANDS[name].format(**words).split())
    assert done.code == 0, done.err


def test_these_are_all_that_take_a_device():
    import typer.main

    commands = typer.main.get_command(app).commands
    assert {name for name, each in commands.items() if any(p.name == "device" for p in each.params)} == set(COMMANDS)
