"""The study's figures: pure functions from `effvit.study.aggregate`'s tables to matplotlib figures, `save` apart."""

from effvit.figures.ablation import ablation
from effvit.figures.cka import cka
from effvit.figures.curves import training_curves
from effvit.figures.fidelity import fidelity
from effvit.figures.hardware import hardware
from effvit.figures.maps import attention_maps
from effvit.figures.scaling import scaling
from effvit.figures.style import save
from effvit.figures.tradeoff import accuracy_tradeoff

__all__ = [
    "ablation",
    "accuracy_tradeoff",
    "attention_maps",
    "cka",
    "fidelity",
    "hardware",
    "save",
    "scaling",
    "training_curves",
]
