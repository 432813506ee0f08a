"""ONNX files of every mechanism, exported once for all tests of what leaves PyTorch (see `exported`)."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

from effvit import available_attention, load_model
from effvit.deploy import export as module
from effvit.deploy.accuracy import sizes_and_accuracy
from effvit.deploy.export import OPSET, TOLERANCE, export_onnx
from effvit.deploy.files import files_of, write_files
from effvit.deploy.int8 import quantize
from effvit.deploy.runtime import logits, open_session
from effvit.errors import UserError
from effvit.evaluation.score import predict_logits
from effvit.model.trained_on import TrainedOn

pytestmark = pytest.mark.slow

MECHANISMS = (*available_attention(), "fused+value_conv", "pooled+value_conv", "hybrid+gate")


def session_of(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("attention", MECHANISMS)
def test_onnxruntime_gives_pytorchs_logits_for_any_batch(exported, attention, batch):
    model = load_model(exported[attention])
    images = torch.randn(batch, 3, 12, 12, generator=torch.Generator().manual_seed(5)) * 2
    with torch.inference_mode():
        expected = model(images).numpy()
    session = session_of(exported[attention] / "model.onnx")
    (result,) = session.run(None, {"images": images.numpy()})
    assert np.abs(result - expected).max() <= TOLERANCE
    assert np.ptp(expected) > 100 * TOLERANCE  # or nothing would be shown
    assert np.array_equal(logits(open_session(exported[attention] / "model.onnx"), images.numpy()), result)


@pytest.mark.parametrize("attention", MECHANISMS)
def test_the_file_is_whole_valid_and_of_the_stated_opset(exported, attention):
    graph = onnx.load(exported[attention] / "model.onnx")
    onnx.checker.check_model(graph, full_check=True)
    assert [(opset.domain, opset.version) for opset in graph.opset_import if not opset.domain] == [("", OPSET)]
    assert graph.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert str(module.__file__).encode() not in (exported[attention] / "model.onnx").read_bytes()


def test_performers_exponentials_stay_exponentials(exported):
    # 2^x, which is what eager PyTorch may compute, would be a power: ten times as slow in onnxruntime.
    nodes = onnx.load(exported["performer"] / "model.onnx").graph.node
    assert [node.op_type for node in nodes].count("Exp") == 2  # of the queries and of the keys


def test_weights_are_the_checkpoints_own(exported):
    model = load_model(exported["fused"])
    stored = [numpy_helper.to_array(t) for t in onnx.load(exported["fused"] / "model.onnx").graph.initializer]
    for name, weight in model.named_parameters():
        weight = weight.detach().numpy()
        same = [np.array_equal(a, w) for a in stored for w in (weight, weight.T) if a.shape == w.shape]
        assert any(same), name


def test_metadata_tell_how_images_are_to_be_prepared(exported, digits12):
    found = session_of(exported["linformer"] / "model.onnx").get_modelmeta().custom_metadata_map
    assert {key: found[key] for key in ("attention", "dataset")} == {"attention": "linformer", "dataset": "digits"}
    assert json.loads(found["image_size"]) == 12
    assert json.loads(found["classes"]) == list(digits12.classes)
    assert json.loads(found["mean"]) == list(digits12.mean) and json.loads(found["std"]) == list(digits12.std)


def test_metadata_of_a_model_that_knows_its_data_need_no_data_set(exported, tmp_path, monkeypatch, digits12):
    graph = onnx.load(exported["fused"] / "model.onnx")
    graph.ClearField("metadata_props")
    monkeypatch.setattr(module, "_graph", lambda model: graph)
    model = load_model(exported["fused"])
    model.trained_on = TrainedOn(classes=digits12.classes, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    export_onnx(model, tmp_path / "model.onnx")
    found = session_of(tmp_path / "model.onnx").get_modelmeta().custom_metadata_map
    assert json.loads(found["classes"]) == list(digits12.classes)
    assert json.loads(found["mean"]) == [0.1, 0.2, 0.3] and json.loads(found["std"]) == [0.4, 0.5, 0.6]


def test_onnxruntime_runs_the_file_where_pytorch_is_not_imported(exported):
    code = """
import sys
from pathlib import Path
from effvit.deploy.footprint import _run
_run(Path(sys.argv[1]))
assert "onnxruntime" in sys.modules and "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code, exported["fused"] / "model.onnx"], check=True, timeout=120)


def test_logits_that_differ_are_an_error_and_no_file(exported, tmp_path, monkeypatch):
    model = load_model(exported["fused"])
    graph = onnx.load(exported["fused"] / "model.onnx")
    for tensor in graph.graph.initializer:
        if tensor.name == "head.bias":
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) + np.float32(1e-3), tensor.name))
    monkeypatch.setattr(module, "_graph", lambda model: graph)
    (tmp_path / "model.onnx").write_text("earlier")
    with pytest.raises(UserError, match=re.escape("differ from PyTorch's by 1.0e-03, at most 1e-04 is right")):
        export_onnx(model, tmp_path / "model.onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_text() == "earlier"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "model.safetensors"], "model.safetensors: expected a file name that ends in .onnx"),
        (["--output", "there.onnx"], "there.onnx: is a directory, expected a file to write"),
        (["--output", "file/model.onnx"], "file"),
        (["--output", "m.onnx", "--model-dir", "nowhere"], "nowhere/model.safetensors: no such file"),
        (["--output", "m.onnx", "--dataset-dir", "nowhere"], "nowhere: not a prepared data set"),
    ],
)
def test_what_cannot_be_done_is_one_line(effvit, exported, tmp_path, arguments, message, monkeypatch):
    monkeypatch.setattr(module, "_graph", lambda model: onnx.load(exported["fused"] / "model.onnx"))
    (tmp_path / "there.onnx").mkdir()
    (tmp_path / "file").touch()
    if "--model-dir" not in arguments:
        arguments = [*arguments, "--model-dir", exported["fused"]]
    outcome = effvit("export", *arguments)
    assert outcome.code == 1 and not outcome.out
    assert outcome.err.startswith("error: ") and message in outcome.err and outcome.err.count("\n") == 1
    assert {file.name for file in tmp_path.iterdir()} == {"there.onnx", "file"}


def test_a_mechanism_that_pytorch_cannot_export_is_said_and_recorded(exported, digits12, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise torch.onnx.OnnxExporterError("no such operator\nand a long story")

    model = load_model(exported["hybrid"])
    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(UserError, match=r"^hybrid: PyTorch cannot export it to ONNX: no such operator$"):
        export_onnx(model, tmp_path / "model.onnx")
    figures = write_files(model, exported["hybrid"], digits12, tmp_path)
    why = "not supported: hybrid: PyTorch cannot export it to ONNX: no such operator"
    assert figures == {"onnx_status": why, "onnx_error": None, "int8_status": why}
    assert files_of(tmp_path) == {}
    figures = sizes_and_accuracy(model, tmp_path, digits12)
    assert figures["onnx_bytes"] is figures["int8_top1"] is figures["int8_lost"] is None
    assert figures["n_images"] == digits12.counts["validation"]


def test_the_command_writes_what_it_says(effvit, exported, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_graph", lambda model: onnx.load(exported["performer"] / "model.onnx"))
    outcome = effvit("export", "--model-dir", exported["performer"], "--format", "onnx", "--output", "to/model.onnx")
    assert outcome.code == 0, outcome.err
    assert f"performer, {(tmp_path / 'to/model.onnx').stat().st_size:,} bytes, opset {OPSET}" in outcome.out
    assert session_of(tmp_path / "to/model.onnx").run(None, {"images": np.zeros((2, 3, 12, 12), np.float32)})


@pytest.mark.parametrize("attention", MECHANISMS)
def test_every_product_with_weights_is_in_int8_and_the_output_stays_near(exported, attention):
    small = exported[attention] / "int8.onnx"
    graph = onnx.load(small).graph
    products = [node for node in graph.node if node.op_type == "MatMulInteger"]
    model = load_model(exported[attention])
    linear = [m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "heads." not in name]
    maps = len(linear) + (attention == "standard")  # whose merged maps of all heads are one product
    assert len(products) >= maps
    integers = {t.name: numpy_helper.to_array(t) for t in graph.initializer if t.data_type == onnx.TensorProto.INT8}
    assert all(np.abs(weight.astype(int)).max() <= 64 for weight in integers.values())  # 7 bits
    images = torch.randn(1, 3, 12, 12, generator=torch.Generator().manual_seed(7))
    with torch.inference_mode():
        expected = model(images).numpy()
    (result,) = session_of(small).run(None, {"images": images.numpy()})
    assert 0 < np.abs(result - expected).max() < 0.25 * np.abs(expected).max()


def test_int8_is_smaller_where_weights_are_most_of_the_file(tmp_path):
    weight = numpy_helper.from_array(np.random.default_rng(0).standard_normal((256, 256), np.float32), "w")
    value = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 256]) for name in ("x", "y")]
    graph = onnx.helper.make_graph([onnx.helper.make_node("MatMul", ["x", "w"], ["y"])], "g", *[[v] for v in value])
    graph.initializer.append(weight)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=10)
    onnx.save(model, tmp_path / "float.onnx")
    quantize(tmp_path / "float.onnx", tmp_path / "int8.onnx")
    assert 256 * 256 < (tmp_path / "int8.onnx").stat().st_size < 0.3 * (tmp_path / "float.onnx").stat().st_size


def test_what_cannot_be_quantised_is_said(tmp_path):
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    with pytest.raises(UserError, match=r"broken\.onnx: onnxruntime cannot quantise it: "):
        quantize(tmp_path / "broken.onnx", tmp_path / "int8.onnx")


def test_sizes_are_those_of_the_files_and_accuracies_those_of_a_loop_of_ones_own(exported, digits12, tmp_path):
    directory = shutil.copytree(exported["nystromformer"], tmp_path / "deployed")
    model = load_model(directory)
    files = {"onnx": (directory / "model.onnx").rename(directory / "onnx.onnx"), "int8": directory / "int8.onnx"}
    figures = sizes_and_accuracy(model, directory, digits12)
    assert figures["model_bytes"] == len((directory / "model.safetensors").read_bytes())
    assert figures["onnx_bytes"] == len(files["onnx"].read_bytes())
    assert figures["int8_bytes"] == len(files["int8"].read_bytes())
    images, labels = digits12.split("validation")
    right = {}
    for name, file in files.items():
        session, count = session_of(file), []
        for image, label in zip(images[np.arange(len(images))], labels, strict=True):
            x = ((image / 255 - digits12.mean) / digits12.std).astype(np.float32).transpose(2, 0, 1)[None]
            count.append(session.run(["logits"], {"images": x})[0][0].argmax() == label)
        right[name] = np.array(count)
        assert figures[f"{name}_top1"] == pytest.approx(right[name].mean())
    of_torch = predict_logits(model, images, digits12.mean, digits12.std, 64).argmax(1).numpy() == labels
    assert figures["top1"] == pytest.approx(of_torch.mean())
    lost, gained = (of_torch & ~right["int8"]).sum(), (right["int8"] & ~of_torch).sum()
    assert (figures["int8_lost"], figures["int8_gained"]) == (lost, gained)
    assert figures["n_images"] * (figures["int8_top1"] - figures["top1"]) == pytest.approx(gained - lost)
