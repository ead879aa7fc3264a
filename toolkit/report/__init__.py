"""What a run leaves behind to read: its record, curves, model card and report."""
