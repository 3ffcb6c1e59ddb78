"""Files -> modules."""
