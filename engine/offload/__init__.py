"""Weights that live in CPU memory and travel to the device block by block."""
