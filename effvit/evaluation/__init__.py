"""Trained models put to use: scores, predictions, attention maps and activations."""
