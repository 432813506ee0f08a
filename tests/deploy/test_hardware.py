import contextlib
import io
import json
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image

from effvit import load_model
from effvit.deploy import export, hardware
from effvit.deploy.footprint import peak_rss_bytes
from effvit.study import cells

MIB = 2**20


@pytest.fixture
def of_performer(exported, monkeypatch):
    """The directory of a model whose graph is there already: making one takes seconds."""
    directory = exported["performer"]
    monkeypatch.setattr(export, "_graph", lambda model: onnx.load(directory / "model.onnx"))
    return directory


def test_the_command_measures_every_runtime_beside_the_others(
    effvit, of_performer, digits12_dir, tmp_path, monkeypatch
):
    monkeypatch.setattr(hardware, "peak_rss_bytes", lambda models: [300 * MIB, 60 * MIB, 50 * MIB])
    arguments = ("--model-dir", of_performer, "--dataset-dir", digits12_dir, "--output-dir", "out", "--budget-s", 0.05)
    outcome = effvit("hardware", *arguments)
    assert outcome.code == 0, outcome.err
    found = cells.hardware(tmp_path / "out")
    assert found["onnx_status"] == found["int8_status"] == "ok"
    for prefix in ("", "onnx_", "int8_"):
        low, ratio, high = (found[f"{prefix}ratio_{end}"] for end in ("low", "to_fused", "high"))
        assert 0 < low <= ratio <= high
        assert 0 < found[f"{prefix}latency_q25"] <= found[f"{prefix}latency_ms"] <= found[f"{prefix}latency_q75"]
        if prefix:
            assert 0 < found[f"{prefix}speedup_low"] <= found[f"{prefix}speedup"] <= found[f"{prefix}speedup_high"]
    assert found["n_rounds"] >= 6
    model = load_model(of_performer)
    assert found["weight_bytes"] == 4 * sum(tensor.numel() for tensor in model.state_dict().values())
    assert found["peak_memory_bytes"] >= 4 * model.config.num_tokens * model.config.hidden_size
    assert found["onnx_bytes"] == (of_performer / "model.onnx").stat().st_size
    assert (found["peak_rss_bytes"], found["int8_peak_rss_bytes"]) == (300 * MIB, 50 * MIB)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "deployment.json",
        "hardware.json",
        "provenance.json",
    }
    assert [line for line in outcome.out.splitlines() if "onnxruntime" in line]
    again = effvit("hardware", *arguments[:4], "--output-dir", "again", *arguments[6:])
    assert again.code == 0
    assert (tmp_path / "again/deployment.json").read_bytes() == (tmp_path / "out/deployment.json").read_bytes()


def test_a_runtime_that_is_not_supported_leaves_its_figures_empty(
    effvit, of_performer, digits12_dir, tmp_path, monkeypatch
):
    monkeypatch.setattr(hardware, "peak_rss_bytes", lambda models: [None if model is None else MIB for model in models])
    monkeypatch.setattr(export, "TOLERANCE", 0.0)
    arguments = ("--model-dir", of_performer, "--dataset-dir", digits12_dir, "--output-dir", "out", "--budget-s", 0.01)
    outcome = effvit("hardware", *arguments)
    assert outcome.code == 0, outcome.err
    found = cells.hardware(tmp_path / "out")
    assert found["onnx_status"].startswith("not supported: performer: onnxruntime's logits differ from PyTorch's by ")
    assert found["int8_status"] == found["onnx_status"]
    empty = [key for key in found if key.startswith(("onnx_", "int8_")) and not key.endswith("status")]
    assert len(empty) == 2 * 12 + 3 and all(found[key] is None for key in empty)
    assert found["latency_ms"] > 0 and found["peak_rss_bytes"] == MIB


def test_a_budget_of_nothing_and_a_missing_model_are_one_line(effvit, exported, digits12_dir, tmp_path):
    where = ("--dataset-dir", digits12_dir, "--output-dir", "out")
    for arguments, message in (
        (("--model-dir", exported["fused"], "--budget-s", 0), "budget_s=0.0: must be a number above 0"),
        (("--model-dir", "nowhere"), "nowhere/model.safetensors: no such file"),
    ):
        outcome = effvit("hardware", *where, *arguments)
        assert outcome.code == 1 and outcome.err.count("\n") == 1 and message in outcome.err
    assert not (tmp_path / "out").exists()


def test_memory_of_a_process_holds_the_weights_that_it_loads(tmp_path):
    files = []
    for width in (16, 4096):  # 1 KiB and 64 MiB
        weight = numpy_helper.from_array(np.ones((width, width), np.float32), "w")
        ends = [
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", width])
            for name in ("images", "logits")
        ]
        node = onnx.helper.make_node("MatMul", ["images", "w"], ["logits"])
        graph = onnx.helper.make_graph([node], "g", ends[:1], ends[1:], [weight])
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
        files.append(tmp_path / f"{width}.onnx")
        onnx.save(model, files[-1])
    small, nothing, large = peak_rss_bytes([files[0], None, files[1]])
    assert nothing is None
    assert 64 * MIB <= large - small <= 64 * MIB * 4  # the file, the weights, and onnxruntime's packed copy


def test_pytorch_and_its_model_are_resident_in_a_process_of_their_own(exported):
    (found,) = peak_rss_bytes([exported["fused"]])
    assert found > 50 * MIB


def test_the_documented_lines_run_an_exported_model_with_onnxruntime_alone(exported, digits12, tmp_path, monkeypatch):
    text = (Path(__file__).parents[2] / "docs/hardware.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert "torch" not in block
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.onnx").write_bytes((exported["linformer"] / "model.onnx").read_bytes())
    from effvit.evaluation.score import predict_logits

    images, _ = digits12.split("validation")
    expected = predict_logits(load_model(exported["linformer"]), images, digits12.mean, digits12.std, 64).argmax(dim=1)
    assert len(set(expected[:20].tolist())) > 1
    for image, label in zip(images[np.arange(20)], expected[:20].tolist(), strict=True):
        Image.fromarray(image).save("image.png")
        with contextlib.redirect_stdout(io.StringIO()) as said:
            exec(compile(block, "docs/hardware.md", "exec"), {})
        assert said.getvalue().strip() == digits12.classes[label]


@pytest.mark.parametrize("file", ["deployment.json", "hardware.json"])
def test_a_figure_that_is_missing_is_named(of_performer, tmp_path, file):
    from synthetic_study import write_study

    cell = write_study(tmp_path, attentions=["fused"]) / "cells/digits/fused/hardware"
    content = json.loads((cell / file).read_text())
    gone = "int8_lost" if file == "deployment.json" else "onnx_ratio_low"
    (cell / file).write_text(json.dumps({key: value for key, value in content.items() if key != gone}))
    with pytest.raises(ValueError, match=f"{re.escape(str(cell / file))}: expected {gone}; `dvc repro -f hardware`"):
        cells.hardware(cell)
