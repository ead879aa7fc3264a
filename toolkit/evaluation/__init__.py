"""Figures of a classifier: logits out of a model, metrics out of logits."""
