"""A trained model on constrained hardware: one thread, one image at a time, under PyTorch, onnxruntime and int8."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from effvit.attention import BASELINE
from effvit.data.loading.prepared import PreparedDataset
from effvit.deploy.export import export_onnx
from effvit.deploy.footprint import peak_rss_bytes
from effvit.deploy.int8 import quantize
from effvit.deploy.runtime import INPUT, logits, open_session, predict_one_by_one
from effvit.errors import UserError
from effvit.evaluation.score import predict_logits
from effvit.measure.compare import MIN_ROUNDS
from effvit.measure.latency import Call, interleaved, paired_interval, paired_ratio, summarise
from effvit.measure.memory import peak_bytes, resident_bytes
from effvit.measure.workload import inference
from effvit.model.checkpoint import WEIGHTS
from effvit.model.vit import ViT

OK = "ok"
RUNTIMES = ("onnx", "int8")  # beside eager PyTorch
SPLIT = "validation"  # the test split is read by `evaluate` alone
_CPU = torch.device("cpu")
Figures = dict[str, object]


def deploy(model: ViT, dataset: PreparedDataset, directory: Path) -> tuple[dict[str, Path], Figures]:
    """Write ``onnx.onnx`` and ``int8.onnx`` of a model into ``directory``.

    Returns:
        The files by runtime, those that could be made; ``onnx_error``, the largest difference of logits to PyTorch's,
        and a ``status`` of each runtime: "ok", or "not supported: " and why.
    """
    files: dict[str, Path] = {}
    figures: Figures = {"onnx_status": OK, "onnx_error": None, "int8_status": OK}
    try:
        figures["onnx_error"] = export_onnx(model, directory / "onnx.onnx", dataset)
        files["onnx"] = directory / "onnx.onnx"
        quantize(files["onnx"], directory / "int8.onnx")
        files["int8"] = directory / "int8.onnx"
    except UserError as error:
        for runtime in (name for name in RUNTIMES if name not in files):
            figures[f"{runtime}_status"] = f"not supported: {error}"
    return files, figures


def sizes_and_accuracy(model: ViT, model_dir: Path, dataset: PreparedDataset, files: dict[str, Path]) -> Figures:
    """Bytes of each file, and top-1 on the validation split (fractions), images one by one but for PyTorch.

    ``int8_lost`` and ``int8_gained`` count the images that int8 alone gets wrong, and right.
    """
    images, labels = dataset.split(SPLIT)
    right = predict_logits(model, images, dataset.mean, dataset.std, 256).argmax(dim=1).numpy() == labels
    figures: Figures = {"split": SPLIT, "n_images": len(labels), "top1": float(right.mean())}
    figures["model_bytes"] = (model_dir / WEIGHTS).stat().st_size
    figures |= dict.fromkeys(f"{runtime}_{what}" for what in ("bytes", "top1") for runtime in RUNTIMES)
    figures |= {"int8_lost": None, "int8_gained": None}
    for runtime, file in files.items():
        figures[f"{runtime}_bytes"] = file.stat().st_size
        now = predict_one_by_one(open_session(file), images, dataset.mean, dataset.std) == labels
        figures[f"{runtime}_top1"] = float(now.mean())
        if runtime == "int8":
            figures |= {"int8_lost": int((right & ~now).sum()), "int8_gained": int((now & ~right).sum())}
    return figures


def measure(model: ViT, model_dir: Path, files: dict[str, Path], budget_s: float) -> Figures:
    """Latency of one image on one thread under each runtime, timed in turns, and memory.

    Returns:
        Latencies ``latency_ms, latency_q25, latency_q75`` of eager PyTorch, prefixed for the others;
        ``fused_latency_ms`` of the same model with fused attention, eager and with random weights; ratios of each to
        that one (``ratio_to_fused``), and of eager to the others (``onnx_speedup``), as medians of paired rounds with
        the ends of their 95 % intervals; ``n_rounds``; ``weight_bytes`` and ``peak_memory_bytes``, the tensors that
        one image needs at its peak besides weights, exactly; ``peak_rss_bytes`` of a fresh process.
    """
    config = model.config
    fused = ViT(config.model_copy(update={"attention": BASELINE, "attention_options": {}}))
    call = inference(model, 1, _CPU)
    with _one_thread():
        calls = {"eager": call, "fused": inference(fused, 1, _CPU)}
        calls |= {runtime: _onnx_call(file) for runtime, file in files.items()}
        seconds = interleaved(calls, budget_s=budget_s, device=_CPU, min_rounds=MIN_ROUNDS)
        peak = peak_bytes(call, _CPU)
    eager, baseline = seconds["eager"], seconds["fused"]
    figures: Figures = {"n_rounds": len(eager), "fused_latency_ms": float(np.median(baseline) * 1e3)}
    for runtime in ("eager", *RUNTIMES):
        prefix = "" if runtime == "eager" else f"{runtime}_"
        of_runtime = seconds.get(runtime)
        spread = None if of_runtime is None else summarise(of_runtime * 1e3)
        for column, key in (("latency_ms", "median"), ("latency_q25", "q25"), ("latency_q75", "q75")):
            figures[prefix + column] = None if spread is None else spread[key]
        figures |= _ratio(f"{prefix}ratio_to_fused", of_runtime, baseline)
        if runtime != "eager":
            figures |= _ratio(f"{prefix}speedup", None if of_runtime is None else eager, of_runtime)
    figures |= {"weight_bytes": resident_bytes(model), "peak_memory_bytes": peak}
    resident = peak_rss_bytes([model_dir, *(files.get(runtime) for runtime in RUNTIMES)])
    names = ["peak_rss_bytes", *(f"{runtime}_peak_rss_bytes" for runtime in RUNTIMES)]
    return figures | dict(zip(names, resident, strict=True))


def _ratio(name: str, samples: np.ndarray | None, baseline: np.ndarray | None) -> Figures:
    ratio, ends = None, None
    if samples is not None and baseline is not None:
        ratio, ends = paired_ratio(samples, baseline), paired_interval(samples, baseline)
    low, high = ends or (None, None)
    stem = name.removesuffix("_to_fused")
    return {name: ratio, f"{stem}_low": low, f"{stem}_high": high}


def _onnx_call(file: Path) -> Call:
    session = open_session(file)
    (images,) = session.get_inputs()
    assert images.name == INPUT
    image = np.random.default_rng(0).standard_normal((1, *images.shape[1:]), dtype=np.float32)
    return lambda: logits(session, image)


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
