"""What is trained of a model: adapters, the head, the last blocks or everything."""
