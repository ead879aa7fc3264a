"""Recipes: YAML in, one validated and frozen ``Recipe`` out; never imports torch."""
