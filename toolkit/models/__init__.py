"""Base models: found, checked, quantised, loaded and run."""
