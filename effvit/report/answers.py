"""The five research questions, answered in sentences from the tables; what the tables do not support is not said."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import isfinite

import pandas as pd

from effvit.report import overview
from effvit.report import wording as w
from effvit.report.compare import (
    MARGIN,
    NO_COMPARISON,
    Accuracy,
    accuracies,
    at_largest_batch,
    cost_verdicts,
    faster,
    keeps_accuracy,
)
from effvit.report.hardware import constrained_hardware
from effvit.report.representations import representations
from effvit.report.resolution import resolution
from effvit.report.tables import Study, by_attention, records

_LEVEL = 0.05


@dataclass(frozen=True)
class Answer:
    """One question; the first sentence of each finding is the answer, the others and the tables support it."""

    question: str
    findings: list["Finding"]


@dataclass(frozen=True)
class Finding:
    """What one data set says to a question; `dataset` is empty where the question is not about one."""

    dataset: str
    sentences: list[str]
    tables: list[overview.Table] = field(default_factory=list)


def answers(study: Study) -> list[Answer]:
    """All five, in the order in which they were asked."""
    lengths = Finding("", list(resolution(study)), [overview.efficiency_of_a_block(study)])
    return [
        _per_dataset(
            study,
            "Which mechanism offers the best trade-off of accuracy and efficiency?",
            tradeoff,
            [overview.accuracy_and_cost],
        ),
        Answer("How do the gains change with resolution?", [lengths]),
        _per_dataset(
            study, "Do efficient mechanisms learn other representations?", representations, [overview.representations]
        ),
        _per_dataset(study, "What does the hybrid add?", hybrid),
        _per_dataset(
            study,
            "Which mechanisms are viable on constrained hardware?",
            constrained_hardware,
            [overview.hardware_latency, overview.hardware],
        ),
    ]


def _per_dataset(
    study: Study,
    question: str,
    say: Callable[[Study, str], Iterator[str]],
    tables: Sequence[Callable[[Study, str], overview.Table]] = (),
) -> Answer:
    return Answer(
        question, [Finding(d, list(say(study, d)), [make(study, d) for make in tables]) for d in study.datasets]
    )


def tradeoff(study: Study, dataset: str) -> Iterator[str]:
    """Accuracy and latency, compared with `fused`."""
    latency = at_largest_batch(study.of("cost", dataset), "latency")
    compared = accuracies(study, dataset)
    if not compared:
        yield NO_COMPARISON
        yield from _accuracy_range(study, dataset)
        return
    yield _best(compared, latency, int(study.of("accuracy", dataset)["n_seeds"].iloc[0]))
    yield from _accuracy_range(study, dataset)
    yield from _accuracy_verdicts(compared)


def _best(compared: list[Accuracy], latency: pd.DataFrame, n_seeds: int) -> str:
    rows = by_attention(latency)
    ratios = {attention: row["ratio_to_fused"] for attention, row in rows.items()}
    found = {b.attention: b for b in compared}
    cheaper = [found[row["attention"]] for row in faster(latency)]
    kept = [b for b in cheaper if b.verdict != "one seed" and keeps_accuracy(b)]
    undecided = [b for b in cheaper if b.verdict == "no difference shown" and b not in kept]
    unknown = [b for b in cheaper if b.verdict == "one seed"]
    better = [b for b in compared if b.verdict == "better" and b not in cheaper]
    if kept:
        first, *rest = kept
        accuracy = "more accurate as well" if first.verdict == "better" else f"a loss of more than {_margin()} excluded"
        more = f"; the same holds for {w.ranked(_faster_by(b, ratios) for b in rest)}" if rest else ""
        return (
            f"{w.name(first.attention)}: {w.relative_to_fused(rows[first.attention])} the latency of Fused, {accuracy} "
            f"({_points(first)}, {w.count(n_seeds, 'seed')}){more}."
        )
    if undecided:
        listed = w.ranked(_faster_by(b, ratios) for b in undecided)
        return (
            f"Faster than Fused: {listed}. With {w.count(n_seeds, 'seed')} the data cannot tell whether that costs "
            f"more than {_margin()} of accuracy."
        )
    if unknown:
        listed = w.ranked(f"{w.name(b.attention)} ({w.times(ratios[b.attention])})" for b in unknown)
        return f"Faster than Fused: {listed}. One seed cannot show what that costs in accuracy."
    if better:
        listed = w.several(f"{w.name(b.attention)} ({w.times(ratios[b.attention])} its latency)" for b in better)
        return f"None is both faster than Fused and as accurate. More accurate but not faster: {listed}."
    time = (
        f"{w.names([b.attention for b in cheaper])} saves time and loses accuracy"
        if cheaper
        else f"at batch {max(latency['batch_size']):.0f} none saves a tenth of the time"
        if cost_verdicts(latency)
        else "no latency was measured"
    )
    seeds = (
        "one seed cannot rank accuracies"
        if all(b.verdict == "one seed" for b in compared)
        else "none is shown to be more accurate"
    )
    return f"No mechanism is shown to beat Fused here: {time}, and {seeds}."


def _faster_by(compared: Accuracy, ratios: dict[str, float]) -> str:
    return f"{w.name(compared.attention)} ({w.times(ratios[compared.attention])}; {_points(compared)})"


def _margin() -> str:
    return f"{100 * MARGIN:.0f} point"


def _accuracy_range(study: Study, dataset: str) -> Iterator[str]:
    rows = study.of("accuracy", dataset).sort_values("top1", kind="stable")
    n, seeds = study.test_images(dataset), int(rows["n_seeds"].iloc[0])
    low, *_, high = [*records(rows), *records(rows)] if len(rows) == 1 else records(rows)
    if len(rows) == 1:
        yield f"{w.name(low['attention'])} classifies {w.percent(low['top1'])} of {w.count(n, 'test image')} correctly."
        return
    text = (
        f"Top-1 accuracy on {w.count(n, 'test image')} lies between {w.percent(low['top1'])} "
        f"({w.name(low['attention'])}) and {w.percent(high['top1'])} ({w.name(high['attention'])})"
    )
    if seeds == 1:
        apart = (high["top1"] - low["top1"]) * n
        yield (
            f"{text}: {w.count(apart, 'image')} apart. With one seed each this is no ranking: another seed may reverse "
            "the order."
        )
    else:
        yield f"{text}, means over {seeds} seeds."


def _accuracy_verdicts(compared: list[Accuracy]) -> Iterator[str]:
    for verdict, text in (("better", "More accurate than Fused"), ("worse", "Less accurate than Fused")):
        if found := [b for b in compared if b.verdict == verdict]:
            yield f"{text}: {_differences(found)}."
    if tested := [b for b in compared if b.verdict == "one seed" and isfinite(b.p)]:
        differ = [f"{w.name(b.attention)} ({w.points(b.difference)} points)" for b in tested if b.p < _LEVEL]
        says = (
            f"the accuracy difference to Fused is significant for {w.several(differ)}"
            if differ
            else "no accuracy difference to Fused is significant"
        )
        yield f"For these trained models, {says} (McNemar, Holm-corrected). Other seeds may differ."
    left_open = [b for b in compared if b.verdict == "no difference shown"]
    above, below = [b for b in left_open if b.low > 0], [b for b in left_open if b.high < 0]
    correction = f"but not after correction for {w.count(len(compared), 'comparison')}"
    if above:
        yield f"Probably more accurate (the interval is above 0, {correction}): {_differences(above)}."
    if below:
        yield f"Probably less accurate (the interval is below 0, {correction}): {_differences(below)}."
    if found := [b for b in left_open if b not in above + below]:
        yield f"No difference in accuracy to Fused is shown for {_differences(found)}."


def _differences(found: list[Accuracy]) -> str:
    if len(found) > w.FEW:
        found = sorted(found, key=lambda b: b.difference)
    return w.ranked(f"{w.name(b.attention)} ({_points(b)})" for b in found)


def _points(compared: Accuracy) -> str:
    interval = f", {w.points(compared.low)} to {w.points(compared.high)}" if isfinite(compared.low) else ""
    return f"{w.points(compared.difference)} points{interval}"


def hybrid(study: Study, dataset: str) -> Iterator[str]:
    """What windows add to linear attention: accuracy, cost, and which branch the gate prefers."""
    if "hybrid" not in study.attentions:
        yield "The hybrid is not among the selected mechanisms."
        return
    found = [b for b in accuracies(study, dataset) if b.attention == "hybrid"]
    if found:
        yield _hybrid_accuracy(found[0], study.test_images(dataset))
        latency = by_attention(at_largest_batch(study.of("cost", dataset), "latency"))["hybrid"]
        if isfinite(latency["ratio_to_fused"]):
            at = f"at batch {latency['batch_size']:.0f} {w.measured_on([latency])}"
            yield f"It takes {w.relative_to_fused(latency)} the latency of Fused {at}."
    else:
        yield "There is no comparison: Fused is not among the selected mechanisms."
    gates = study.of("gates", dataset)
    gates = gates[gates["attention"] == "hybrid"]
    if len(gates):
        yield from _gates(gates)
    yield "`make ablation` compares every set of its branches."


def _gates(gates: pd.DataFrame) -> Iterator[str]:
    # Of the last block's output the class token alone is read, which the gate does not touch: it has no gradient.
    *trained, last = sorted(gates["layer"].unique())
    if not trained:
        yield f"Its one gate, in block {last}, is not trained: it does not touch the class token, which alone is read."
        return
    for layer in dict.fromkeys((trained[0], trained[-1])):
        rows = records(gates[gates["layer"] == layer])
        shares = w.several(f"{w.percent(row['share'])} to {row['branch']}" for row in rows)
        which = "the first block" if layer == trained[0] else f"block {layer}, the last in which it is trained,"
        yield f"In {which} its gate gives {shares}."


def _hybrid_accuracy(compared: Accuracy, n: int) -> str:
    if compared.verdict == "one seed":
        images = abs(compared.difference) * n
        way = "more" if compared.difference > 0 else "fewer"
        differ = f"{w.count(images, 'image')} of {n:,} {way} right than" if round(images) else "as many images right as"
        return f"Not shown to add accuracy: with one seed it gets {differ} Fused, which proves nothing."
    adds = {"better": "It adds accuracy", "worse": "It costs accuracy"}.get(
        compared.verdict, "No difference in accuracy to Fused is shown"
    )
    return f"{adds}: {_points(compared)}."
