"""A trained model on constrained hardware: one thread, one image at a time, under PyTorch, onnxruntime and int8."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from effvit.attention import BASELINE
from effvit.deploy.files import RUNTIMES, Figures, files_of
from effvit.deploy.footprint import peak_rss_bytes
from effvit.deploy.runtime import INPUT, logits, open_session
from effvit.measure.compare import MIN_ROUNDS
from effvit.measure.latency import Call, interleaved, paired_interval, paired_ratio, summarise
from effvit.measure.memory import peak_bytes, resident_bytes
from effvit.measure.workload import inference
from effvit.model.vit import ViT

_CPU = torch.device("cpu")


def measure(model: ViT, directory: Path, budget_s: float) -> Figures:
    """Latency of one image on one thread under each runtime, timed in turns, and memory.

    Args:
        model: the deployed one, on the CPU, in eval mode.
        directory: its files, see `effvit.deploy.files`.
        budget_s: seconds of sampling latencies.

    Returns:
        Latencies ``latency_ms, latency_q25, latency_q75`` of eager PyTorch, prefixed for the others;
        ``fused_latency_ms`` of the same model with fused attention, eager and with random weights; ratios of each to
        that one (``ratio_to_fused``), and of eager to the others (``onnx_speedup``), as medians of paired rounds with
        the ends of their 95 % intervals; ``n_rounds``; ``weight_bytes`` and ``peak_memory_bytes``, the tensors that
        one image needs at its peak without the weights, exactly; ``peak_rss_bytes`` of a fresh process.
    """
    config, files = model.config, files_of(directory)
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
    resident = peak_rss_bytes([directory, *(files.get(runtime) for runtime in RUNTIMES)])
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
