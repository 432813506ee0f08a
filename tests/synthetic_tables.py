"""Made-up tables that `aggregate` writes beside those of `synthetic_study`: every column, no truth."""

import numpy as np
import pandas as pd
from synthetic_study import ATTENTIONS

APPROXIMATE = {"linformer": "k", "performer": "num_features", "nystromformer": "num_landmarks"}


def optional_tables(dataset="digits", attentions=ATTENTIONS, layers=2):
    """Frames by name; the numbers follow from a mechanism's place in `ATTENTIONS`."""
    place = {a: ATTENTIONS.index(a) for a in attentions}
    fidelity, replaced = [], []
    for a in attentions:
        option, values = (APPROXIMATE[a], [8, 32]) if a in APPROXIMATE else (None, [None])
        for value in values:
            key = {"dataset": dataset, "attention": a, "option": option, "value": value}
            error = 0.0 if a in ("standard", "fused") else place[a] / (value or 8)
            macs = 500 if a in ("standard", "fused") else 40 * (value or 8) + 100 * (a == "hybrid") * place[a]
            for source, layer in [("random", None), *(("trained", n + 1) for n in range(layers))]:
                row = key | {"source": source, "layer": layer, "error": error, "mixing_macs": macs}
                fidelity.append(row | {"error_low": error * 0.9, "error_high": error * 1.1, "fused_macs": 500})
            replaced.append(key | {"top1": max(0.1, 0.97 - error), "top1_fused": 0.97, "n_images": 145})
    cka = [
        {"dataset": dataset, "attention_a": a, "layer_a": i + 1, "attention_b": b, "layer_b": j + 1, "n_images": 145}
        | {"cka": 1 / (1 + 0.1 * abs(place[a] - place[b]) + 0.5 * abs(i - j))}
        for a in attentions
        for b in attentions
        for i in range(layers)
        for j in range(layers)
    ]
    heads = [
        {"dataset": dataset, "attention": a, "layer": i + 1, "head": h + 1, "n_images": 145}
        | {
            "distance_px": 5.0 + place[a] + i,
            "entropy_nats": 3.0 + h,
            "uniform_distance_px": 16.5,
            "uniform_entropy_nats": 4.17,
            "implied": a not in ("standard", "fused"),
        }
        for a in attentions
        for i in range(layers)
        for h in range(2)
    ]
    gates = [
        {"dataset": dataset, "attention": "hybrid", "layer": i + 1, "branch": branch, "share": share}
        for i in range(layers)
        for branch, share in (("regional", 0.5 - 0.1 * i), ("dilated", 0.2), ("linear", 0.3 + 0.1 * i))
        if "hybrid" in attentions
    ]
    hardware = [
        {"dataset": dataset, "attention": a, "model_bytes": 480_000, "int8_bytes": 240_000, "onnx_bytes": 520_000}
        | {"machine": "made up", "threads": 1, "dtype": "float32"}
        | {"onnx_error": 2.1e-6, "top1": 0.98, "int8_top1": 0.98 - place[a] / 360}
        | {"n_images": 360, "split": "validation", "fused_latency_ms": 2.0, "peak_memory_bytes": 2**20 * (1 + place[a])}
        | {
            f"{runtime}ratio_{end}": (1 + place[a]) / 2 / speed * factor
            for runtime, speed in (("", 1), ("onnx_", 2), ("int8_", 4))
            for end, factor in (("to_fused", 1), ("low", 0.9), ("high", 1.1))
        }
        | {f"{r}speedup{end}": f for r in ("onnx_", "int8_") for end, f in (("", 2.0), ("_low", 1.8), ("_high", 2.2))}
        | {"peak_rss_bytes": 500 * 2**20, "onnx_peak_rss_bytes": (60 + place[a]) * 2**20, "int8_peak_rss_bytes": 2**26}
        for a in attentions
    ]
    efficiency = [
        {"attention": a, "scope": scope, "batch": "one", "mode": mode, "quantity": quantity, "measured_to": 4097}
        | {"length": None if a == "standard" else 100.0 * place[a], "length_low": 90.0 * place[a] or None}
        | {
            "length_high": 110.0 * place[a] or None,
            "slope": 1.9 if a in ("standard", "fused") else 1.1,
            "slope_low": 1.0,
        }
        | {"slope_high": 2.0, "macs_slope": 1.0, "predicted_length": 80.0 * place[a] + 1}
        | {"cheaper_from": None, "cheaper_to": None, "slope_from": 257, "slope_to": 4097}
        for a in attentions
        for scope in ("block", "model")
        for mode in ("forward", "train")
        for quantity in ("time", "memory")
    ]
    paired = [
        {"dataset": dataset, "attention": a, "n_seeds": 3, "difference": 0.001, "difference_low": -0.01}
        | {"difference_high": 0.012, "p_holm": 0.5, "verdict": "no difference shown"}
        for a in attentions
        if a != "fused"
    ]
    tables = {"fidelity": fidelity, "replaced": replaced, "cka": cka, "heads": heads, "gates": gates}
    tables |= {"hardware": hardware, "efficiency": efficiency, "paired": paired}
    return {name: pd.DataFrame(rows).map(lambda v: np.nan if v is None else v) for name, rows in tables.items() if rows}


def write_optional_tables(directory, **selection):
    """Write them as CSVs beside those of `aggregate`."""
    for name, table in optional_tables(**selection).items():
        table.to_csv(directory / f"{name}.csv", index=False)


def drop_optional_tables(data_dir):
    """Leave what a study has that measures nothing of this."""
    for name in ("paired", "efficiency", "fidelity", "replaced", "cka", "heads", "gates", "hardware"):
        (data_dir / f"{name}.csv").unlink()
