"""Prompts in Chinese become English: what of a prompt is translated, and the models that do it."""
