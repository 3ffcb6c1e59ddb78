"""What the nodes have in common, and the pack's own socket types: the handles."""

from ..host import current as host

CATEGORY = "MajicFlux"

DiTHandle = host.io.Custom("MAJICFLUX_DIT")
TextEncodersHandle = host.io.Custom("MAJICFLUX_TEXT_ENCODERS")
VAEHandle = host.io.Custom("MAJICFLUX_VAE")
ControlHandle = host.io.Custom("MAJICFLUX_CONTROL")
PipelineHandle = host.io.Custom("MAJICFLUX_PIPELINE")


def found_by(*words: str) -> list[str]:
    """What a node is searched by, given as texts of words and a comma between them."""
    return ", ".join(words).split(", ")


class Node(host.io.ComfyNode):
    HAS_INTERMEDIATE_OUTPUT = True  # ComfyUI sends the texts of remembered nodes to the canvas too
