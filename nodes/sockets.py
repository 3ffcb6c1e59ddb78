"""The pack's own socket types: the handles. Everything else on the sockets is ComfyUI's."""

from ..host import current as host

CATEGORY = "MajicFlux"

DiTHandle = host.io.Custom("MAJICFLUX_DIT")
TextEncodersHandle = host.io.Custom("MAJICFLUX_TEXT_ENCODERS")
VAEHandle = host.io.Custom("MAJICFLUX_VAE")
PipelineHandle = host.io.Custom("MAJICFLUX_PIPELINE")
