"""The study's figures: pure functions from the tables of `effvit.aggregate` to matplotlib figures, `save` apart."""

from effvit.figures.ablation import ablation
from effvit.figures.confusion import confusion
from effvit.figures.curves import training_curves
from effvit.figures.efficiency import efficiency_lengths
from effvit.figures.hardware import hardware
from effvit.figures.maps import attention_maps
from effvit.figures.scaling import scaling
from effvit.figures.style import save
from effvit.figures.tradeoff import accuracy_tradeoff

__all__ = [
    "ablation",
    "accuracy_tradeoff",
    "attention_maps",
    "confusion",
    "efficiency_lengths",
    "hardware",
    "save",
    "scaling",
    "training_curves",
]
