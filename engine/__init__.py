"""Modules -> pictures. Knows neither ComfyUI nor files."""
