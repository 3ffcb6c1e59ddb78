"""What the nodes have in common, and the pack's own socket types: the handles."""

from ..host import current as host

io = host.io
CATEGORY = "MajicFlux"

DiTHandle = io.Custom("MAJICFLUX_DIT")
TextEncodersHandle = io.Custom("MAJICFLUX_TEXT_ENCODERS")
VAEHandle = io.Custom("MAJICFLUX_VAE")
ControlHandle = io.Custom("MAJICFLUX_CONTROL")
PipelineHandle = io.Custom("MAJICFLUX_PIPELINE")


def found_by(*words: str) -> list[str]:
    """What a node is searched by, given as texts of words and a comma between them."""
    return ", ".join(words).split(", ")


class Node(io.ComfyNode):
    HAS_INTERMEDIATE_OUTPUT = True  # ComfyUI sends the texts of remembered nodes to the canvas too
