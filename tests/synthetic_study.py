"""A made-up study on disk, in the layout and formats of the pipeline's stages."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors.numpy import save_file

ATTENTIONS = ("standard", "fused", "linformer", "performer", "nystromformer", "hybrid")
FIELD = (*ATTENTIONS, "linear", "focused", "agent", "pooled", "window", "uniform")
TOKENS = (65, 145, 257, 577, 1025, 2305, 4097)


def write_study(
    metrics_dir,
    datasets=("digits",),
    attentions=ATTENTIONS,
    seeds=(0,),
    classes=10,
    epochs=12,
    images=3,
    lengths=TOKENS,
):
    """Write every cell; returns `metrics_dir`."""
    for dataset in datasets:
        for attention in attentions:
            cell = Path(metrics_dir, "cells", dataset, attention)
            rng = np.random.default_rng([FIELD.index(attention) if attention in FIELD else 99])
            _benchmark(cell / "benchmark", attention)
            _hardware(cell, attention)
            for seed in seeds:
                _train(cell / f"seed{seed}" / "train", rng, epochs)
                _evaluate(cell / f"seed{seed}" / "evaluate", rng, classes, images)
        _analysis(Path(metrics_dir, "analysis", dataset), attentions)
    for attention in attentions:
        _scaling(Path(metrics_dir, "scaling", attention), attention, lengths)
    return Path(metrics_dir)


def _provenance(directory):
    record = {"time": "2026-01-01T00:00:00+00:00", "git_revision": None, "python": "3.11.7", "platform": "Linux x86_64"}
    record |= {"packages": {"effvit": "0.1.0", "torch": "2.14.1"}, "config": {"dtype": "float32"}}
    threads = 1 if directory.name == "hardware" else 2
    record["machine"] = {"device": "cpu", "processor": "made up", "threads": threads, "gpu": None}
    (directory / "provenance.json").write_text(json.dumps(record))


def _train(directory, rng, epochs):
    directory.mkdir(parents=True)
    _provenance(directory)
    t = np.arange(1, epochs + 1) / epochs
    skill = 1 - np.exp(-5 * t * rng.uniform(0.8, 1.2))
    noise = rng.normal(0, 0.01, (4, epochs))
    history = pd.DataFrame({"epoch": np.arange(1, epochs + 1), "lr": 1e-3 * (1 - t)})
    history["train_loss"] = 2.3 - 1.75 * skill + noise[0]
    history["train_accuracy"] = np.clip(0.1 + 0.88 * skill + noise[1], 0, 1)
    history["val_loss"] = 2.3 - 1.6 * skill + noise[2]
    history["val_accuracy"] = np.clip(0.1 + 0.85 * skill + noise[3], 0, 1)
    history.to_csv(directory / "history.csv", index=False)


def _evaluate(directory, rng, classes, images):
    directory.mkdir(parents=True)
    _provenance(directory)
    actual = np.repeat(np.arange(classes), 36)
    wrong = rng.random(actual.size) < 0.05
    predicted = np.where(wrong, (actual + rng.integers(1, classes, actual.size)) % classes, actual)
    images_seen = {"index": range(actual.size), "label": actual, "prediction": predicted}
    pd.DataFrame(images_seen).to_csv(directory / "predictions.csv", index=False)
    names = [str(c) for c in range(classes)] if classes <= 10 else [f"class{c:03d}" for c in range(classes)]
    counts = pd.crosstab(actual, predicted).stack()
    rows = [(names[a], names[p], n) for (a, p), n in counts.items() if n]
    pd.DataFrame(rows, columns=["actual", "predicted", "count"]).to_csv(directory / "confusion.csv", index=False)
    result = {"top1": float((actual == predicted).mean()), "top5": 0.99, "loss": 0.3, "ece": 0.02}
    (directory / "evaluation.json").write_text(json.dumps(result | {"num_images": len(actual)}))
    maps = rng.random((images, 8, 8)).astype(np.float32)
    maps[:, 2:6, 2:6] += 1.0
    yy, xx = np.mgrid[0:32, 0:32]
    picture = np.stack([127 + 120 * np.sin(xx / (3 + i)) * np.cos(yy / 5) for i in range(images)])
    arrays = {
        "images": np.repeat(picture[..., None], 3, axis=3).astype(np.uint8),
        "labels": np.arange(images, dtype=np.int64) % classes,
        "predictions": rng.integers(0, 2, images).astype(np.int64),
        "maps": (maps / maps.sum((1, 2), keepdims=True)).astype(np.float32),
    }
    save_file(arrays, directory / "attention_maps.safetensors")


def _cost_at(tokens, attention):
    """Milliseconds of a block's forward and its peak bytes: quadratic for exact attention, linear for the others."""
    work, memory = {
        "standard": (3e-7 * tokens**2, 96 * tokens**2),
        "fused": (2e-7 * tokens**2, 2e3 * tokens),
        "linformer": (8e-5 * tokens, 4e3 * tokens),
        "performer": (2.5e-4 * tokens, 9e3 * tokens),
        "nystromformer": (4e-4 * tokens + 0.15, 7e3 * tokens),
        "linear": (6e-5 * tokens, 6e3 * tokens),
        "focused": (1.9e-4 * tokens, 11e3 * tokens),
        "agent": (1.1e-4 * tokens, 4.5e3 * tokens),
        "pooled": (5e-5 * tokens, 2.5e3 * tokens),
        "window": (1.2e-4 * tokens, 8e3 * tokens),
        "uniform": (1e-6 * tokens, 5e2 * tokens),
    }.get(attention, (1.5e-4 * tokens, 5e3 * tokens))
    return 4e-4 * tokens + work, 3e3 * tokens + memory


def _row(median, fused, **key):
    return (
        {"precision": "float32", "execution": "eager"}
        | key
        | {"median": median, "q25": 0.95 * median, "q75": 1.1 * median, "p90": 1.2 * median, "n": 30}
        | {
            "fused_median": fused,
            "ratio_to_fused": median / fused,
            "ratio_low": 0.97 * median / fused,
            "ratio_high": 1.02 * median / fused,
            "launch_bound": False,
        }
    )


def _benchmark(directory, attention):
    directory.mkdir(parents=True)
    _provenance(directory)
    (ms, size), (fused_ms, fused_size) = _cost_at(65, attention), _cost_at(65, "fused")
    parameters = 120_000 + (20_000 if attention == "linformer" else 0)
    macs = int(8e6 * (0.8 + 0.2 * ms / fused_ms))
    model = {"parameters": parameters, "trainable_parameters": parameters, "macs": macs, "macs_closed_form": macs}
    (directory / "model.json").write_text(json.dumps(model | {"attention_macs": macs // 9, "tokens": 65}))
    rows = [
        _row(ms * scale, fused_ms * scale, quantity=quantity, batch_size=batch, unit=unit)
        for quantity, batch, unit, scale in [
            ("latency", 1, "ms", 40),
            ("latency", 64, "ms", 9),
            ("throughput", 64, "images/s", 1e3),
            ("train_step", 64, "ms", 1500),
        ]
    ]
    rows += [
        _row(size * 800, fused_size * 800, quantity="train_memory", batch_size=64, unit="bytes"),
    ]
    pd.DataFrame(rows).astype({"batch_size": "Int64"}).to_csv(directory / "cost.csv", index=False)


def _hardware(cell, attention):
    """The hybrid does not run under onnxruntime, and Performer not in int8."""
    for stage in ("deploy", "hardware"):
        (cell / stage).mkdir(parents=True)
        _provenance(cell / stage)
    ms, fused_ms = (40 * _cost_at(65, name)[0] for name in (attention, "fused"))
    absent = {"hybrid": ("onnx", "int8"), "performer": ("int8",)}.get(attention, ())
    deployment = {"split": "validation", "n_images": 144, "model_bytes": 480_000, "top1": 0.97}
    hardware = {"fused_latency_ms": fused_ms, "n_rounds": 60, "weight_bytes": 470_000, "peak_memory_bytes": 90_000}
    for runtime, prefix, speed, size, rss in (
        ("eager", "", 1, None, 350),
        ("onnx", "onnx_", 2.5, 520_000, 60),
        ("int8", "int8_", 3.1, 180_000, 58),
    ):
        known = runtime not in absent
        times = {"latency_ms": ms / speed, "latency_q25": 0.98 * ms / speed, "latency_q75": 1.03 * ms / speed}
        ratio = {"ratio_to_fused": ms / speed / fused_ms, "speedup": speed}
        ratio |= {
            f"{name.removesuffix('_to_fused')}_{end}": x * f
            for name, x in ratio.items()
            for end, f in (("low", 0.97), ("high", 1.02))
        }
        figures = {prefix + key: x if known else None for key, x in (times | ratio).items()}
        hardware |= {k: x for k, x in figures.items() if not k.startswith("speedup")}
        hardware[f"{prefix}peak_rss_bytes"] = rss * 2**20 if known else None
        if prefix:
            deployment |= {f"{prefix}bytes": size if known else None, f"{prefix}top1": 0.96 if known else None}
            deployment[f"{prefix}status"] = "ok" if known else f"not supported: {attention}: no such operator"
    deployment |= {"onnx_error": 1e-6 if "onnx" not in absent else None}
    deployment |= dict(zip(("int8_lost", "int8_gained"), (3, 1) if "int8" not in absent else (None, None), strict=True))
    (cell / "deploy/deployment.json").write_text(json.dumps(deployment))
    (cell / "hardware/hardware.json").write_text(json.dumps(hardware))


def _scaling(directory, attention, lengths):
    directory.mkdir(parents=True)
    _provenance(directory)
    rows = [
        _point(
            attention,
            {"scope": scope, "hidden_size": 48, "batch": batch, "batch_size": size, "tokens": tokens},
            mode,
            depth * factor,
        )
        for scope, depth in (("block", 1), ("model", 6))
        for tokens in lengths
        for batch, size in (("one", 1), ("tokens", 4096 // tokens))
        if batch == "one" or size > 1
        for mode, factor in (("forward", 1), ("train", 3))
    ]
    table = pd.DataFrame([row for point in rows for row in point])
    table.drop(columns="p90").astype({"n": "Int64"}).to_csv(directory / "scaling.csv", index=False)
    macs = [
        {
            "scope": scope,
            "hidden_size": 48,
            "tokens": n,
            "macs": depth * mixing,
            "fused_macs": depth * (96 * n * n + 9216 * n),
        }
        for scope, depth in (("block", 1), ("model", 6))
        for n in lengths
        for mixing in [9216 * n + (96 * n * n if attention in ("standard", "fused") else 48000 * n)]
    ]
    pd.DataFrame(macs).to_csv(directory / "macs.csv", index=False)


def _point(attention, place, mode, factor):
    """Rows of time and memory; standard attention runs out of memory in training from 2,305 tokens on."""
    tokens = place["tokens"]
    stopped = attention == "standard" and mode == "train" and tokens * 3 > 4097
    costs, fused = _cost_at(tokens, attention), _cost_at(tokens, "fused")
    for quantity, unit, i in (("time", "ms", 0), ("memory", "bytes", 1)):
        row = _row(costs[i] * factor, fused[i] * factor, mode=mode, quantity=quantity, unit=unit)
        if stopped:
            row |= dict.fromkeys(
                ["median", "q25", "q75", "n", "fused_median", "ratio_to_fused", "ratio_low", "ratio_high"]
            )
        status = "out of memory" if stopped else "ok"
        beside = quantity == "time" and attention == "hybrid" and tokens == 577  # other work, at one point
        yield place | row | {"status": status, "other_load": 0.3 if beside else 0.0, "contended": beside}


def _analysis(directory, attentions):
    for stage in ("fidelity", "representations"):
        (directory / stage).mkdir(parents=True)
        _provenance(directory / stage)
    sizes = {"linformer": "k", "performer": "num_features", "nystromformer": "num_landmarks", "hybrid": "window_size"}
    sizes |= {"agent": "agent_size", "pooled": "pool_size", "window": "window_size"}
    coarser = {"linear": 0.7, "focused": 0.6, "agent": 1.3, "pooled": 1.6, "window": 0.8, "uniform": 0.9}
    errors, replaced, heads = [], [], []
    rng = np.random.default_rng(0)
    for attention in attentions:
        option = sizes.get(attention, "")
        for value in (4, 16, 64) if option else (None,):
            macs = {"mixing_macs": 48 * 65 * 4 * value if value else 405_600, "fused_macs": 405_600}
            error = coarser.get(attention, 1.0 if value else 0.0) * (value or 1) ** -0.5
            low, high = (0.9 * error, 1.1 * error) if attention == "performer" else (None, None)
            key = {"attention": attention, "option": option, "value": value}
            of = {"error": error, "error_low": low, "error_high": high} | macs
            errors.append(key | {"source": "random", "layer": None} | of)
            errors += [key | {"source": "trained", "layer": layer} | of for layer in (1, 2)]
            if "fused" in attentions:
                replaced.append(key | {"top1": 0.9 - error, "top1_fused": 0.9, "n_images": 145})
        for layer, head in ((1, 1), (1, 2), (2, 1), (2, 2)):
            looks = {"distance_px": rng.uniform(4, 16), "entropy_nats": rng.uniform(1, 4), "n_images": 145}
            looks |= {"uniform_distance_px": 16.5, "uniform_entropy_nats": 4.17}
            exact = attention in ("standard", "fused")
            heads.append({"attention": attention, "layer": layer, "head": head} | looks | {"implied": not exact})
    names = ["attention", "option", "value", "top1", "top1_fused", "n_images"]
    whole = {"value": "Int64", "layer": "Int64"}
    pd.DataFrame(errors).astype(whole).to_csv(directory / "fidelity/fidelity.csv", index=False)
    table = pd.DataFrame(replaced, columns=names).astype({"value": "Int64"})
    table.to_csv(directory / "fidelity/replaced.csv", index=False)
    pd.DataFrame(heads).to_csv(directory / "representations/heads.csv", index=False)
    layers = [(attention, layer) for attention in attentions for layer in (1, 2)]
    cka = [(*a, *b, 1.0 if a == b else 0.5, 145) for a in layers for b in layers]
    names = ["attention_a", "layer_a", "attention_b", "layer_b", "cka", "n_images"]
    pd.DataFrame(cka, columns=names).to_csv(directory / "representations/cka.csv", index=False)
    branches = {"window r=1": 0.5, "window r=2": 0.3, "linear": 0.2}
    gates = [("hybrid", n, b, share) for n in (1, 2) for b, share in branches.items() if "hybrid" in attentions]
    table = pd.DataFrame(gates, columns=["attention", "layer", "branch", "share"])
    table.to_csv(directory / "representations/gates.csv", index=False)
