"""Memory: what a run will need, known before it runs."""
