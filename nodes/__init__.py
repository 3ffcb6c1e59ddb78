"""What the canvas sees."""

from functools import partial

from ..host import current as host
from ..host import provenance
from .compare import Compare
from .controlnet import ControlNetNode
from .decode import Decode
from .denoise import Denoise
from .dit_loader import DiTLoader
from .doctor import Doctor
from .encode_image import EncodeImage
from .encode_prompt import EncodePrompt
from .lora import LoRA
from .pipeline import PipelineNode
from .sample import Sample
from .text_encoders import TextEncodersNode
from .translate import Translate
from .vae_loader import VAELoader

NODES = [
    DiTLoader,
    LoRA,
    ControlNetNode,
    TextEncodersNode,
    VAELoader,
    PipelineNode,
    Translate,
    Sample,
    EncodePrompt,
    EncodeImage,
    Denoise,
    Decode,
    Compare,
    Doctor,
]


class MajicFlux(host.ComfyExtension):
    async def on_load(self) -> None:
        kinds = {node.define_schema().node_id for node in NODES}
        host.on_prompt(partial(provenance.carry, kinds=kinds))

    async def get_node_list(self) -> list[type]:
        return [*NODES]


async def comfy_entrypoint() -> MajicFlux:
    return MajicFlux()
