"""Bytes, and how they are shown."""

GB = 2**30
MB = 2**20


def in_gb_above(size: float) -> str:
    """GB with one digit, never less than `size`."""
    return f"{-(-int(size) * 10 // GB) / 10:.1f}"
