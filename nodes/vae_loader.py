"""The node that loads the VAE."""

from ..downloads import model_folders
from ..host import current as host
from ..loaders.vae import inspect_vae, load_vae
from .arguments import checked
from .model_files import FileNode, options, shared
from .sockets import CATEGORY, VAEHandle, found_by, io

FOLDER = "vae"


class VAELoader(FileNode):
    folder, inspect = FOLDER, staticmethod(inspect_vae)

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MajicFluxVAELoader",
            display_name="Flux VAE",
            category=CATEGORY,
            description="Loads the autoencoder of Flux.1, which turns latents into pictures.",
            search_aliases=found_by(
                "vae, load vae, autoencoder, ae.safetensors",
                "变分自编码器, 加载VAE, 麦橘 超然",
            ),
            inputs=[
                io.Combo.Input(
                    "file",
                    tooltip="The Flux VAE in models/vae, such as ae.safetensors.",
                    **options(FOLDER, "ae.safetensors", "flux"),
                )
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[
                VAEHandle.Output(
                    display_name="vae", tooltip="The autoencoder, for the CPU-offload pipeline."
                )
            ],
        )

    @classmethod
    @checked
    def execute(cls, file: str) -> io.NodeOutput:
        from ..engine.flux.vae import VAE

        path = model_folders.resolve(FOLDER, file)

        def load() -> VAE:
            device = host.vae_device()
            dtype = host.vae_dtype(device)
            weights = load_vae(path, dtype)
            return VAE(weights, host.make_patcher(weights, device, "MajicFluxVAE"), dtype)

        vae = shared(load, model_folders.fingerprint(FOLDER, file))
        return io.NodeOutput(vae, ui=host.node_text([vae.weights.report]))
