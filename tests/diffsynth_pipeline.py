"""DiffSynth's own pipeline as the reference."""

import torch

from majicflux.engine.flux.transformer import sized_flux_dit
from majicflux.engine.run.pipeline import Pipeline


def diffsynth_pipeline(ours: Pipeline):
    """DiffSynth's FluxImagePipeline, its own transformer, the weights of `ours`, on the CPU."""
    from diffsynth.models.flux_dit import FluxJointTransformerBlock, FluxSingleTransformerBlock
    from diffsynth.pipelines.flux_image import FluxImagePipeline

    pipe = FluxImagePipeline(device="cpu", torch_dtype=torch.bfloat16)
    encoders = ours.text_encoders
    pipe.text_encoder_1 = encoders.weights.module["clip"]
    pipe.text_encoder_2 = encoders.weights.module["t5"]
    pipe.tokenizer_1, pipe.tokenizer_2 = encoders.clip_tokenizer, encoders.t5_tokenizer
    theirs = (FluxJointTransformerBlock, FluxSingleTransformerBlock)
    pipe.dit = sized_flux_dit(ours.dit.geometry, *theirs)
    pipe.dit.load_state_dict(ours.dit.weights.module.state_dict(), assign=True)
    pipe.vae_decoder = ours.vae.weights.module["decoder"]
    pipe.vram_management_enabled = False
    return pipe
