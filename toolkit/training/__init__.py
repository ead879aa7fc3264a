"""The training engine: what a step is, how it is saved, and when it ends."""
