"""Weights in fewer bits: formats, how they are stored, how they are multiplied."""
