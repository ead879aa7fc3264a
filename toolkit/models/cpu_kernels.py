"""What decides which of a CPU's kernels run, and how many of them stay in memory; without torch, for the planner."""

# Tokens of the longest row up to which attention under autocast is faster in float32 (``packing.attend_widened``).
WIDENED = 128
# Narrower linear layers, such as adapters, are not worth a kernel of their own.
NARROWEST = 64


def stepped(rows: int) -> int:
    """Return the next of eight row counts an octave, at most an eighth more than ``rows``.

    oneDNN compiles kernels for every row count that it meets, and keeps a thousand of them. Without padding hardly two
    batches have as many rows: LoRA on distilbert-mini held 570 MiB after 30 steps and 900 after 300; 540 and 560 so.
    """
    step = max(8, 1 << max(rows.bit_length() - 4, 0))
    return -(-rows // step) * step
