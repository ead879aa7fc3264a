"""Trained weights as folders that stock transformers and peft load."""
