"""The one door to ComfyUI, and its stand-in.

Both modules offer the same names; which one the pack uses is decided once, when it is imported:
inside a ComfyUI process its memory manager is loaded before any node pack is.
"""

import sys

from ..messages import speak

if "comfy.model_management" in sys.modules:
    from . import comfyui as current
else:
    from . import standalone as current

speak(current.language)

__all__ = ["current"]
