"""A trained classifier, read back and put to work."""
