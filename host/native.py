"""ComfyUI's CONDITIONING, LATENT, IMAGE and MASK, and what the engine makes of them."""

import math
from typing import Any

import torch
from torch import Tensor

from ..engine.flux.geometry import FluxGeometry
from ..engine.flux.picture_conditions import NO_PICTURES, PLACINGS, PictureConditions
from ..engine.flux.text_encoders import TextEmbedding
from ..engine.latents import to_model_space, to_vae_space
from ..engine.sizes import CHANNELS, PIXELS_PER_LATENT, STEP, require_size
from ..messages import MajicFluxError, later, say

Conditioning = list[Any]  # of [tokens, options]
Latent = dict[str, Any]
HONOURED = (
    "pooled_output",
    "guidance",
    "concat_latent_image",
    "concat_mask",
    "reference_latents",
    "reference_latents_method",
)  # of a CONDITIONING
# What to do about others.
REMOVE = later("Remove the node that adds it, or sample with KSampler.")
INSTEAD = {
    "control": later("Remove Apply ControlNet, and connect the Majic node ControlNet to control."),
    "attention_mask": later("Choose multiply as the strength type of Apply Style Model."),
}
RATIO = "downscale_ratio_spacial"  # pixels for each of an empty latent; spelled as ComfyUI does


def to_conditioning(embedding: TextEmbedding, guidance: float) -> Conditioning:
    options = {"pooled_output": embedding.pooled.float(), "guidance": guidance}
    return [[embedding.tokens.float(), options]]


def from_conditioning(
    name: str, conditioning: Conditioning, geometry: FluxGeometry
) -> TextEmbedding:
    """name: of the input it came by, which the MajicFluxError names if it cannot be honoured."""
    if not all(_is_entry(entry) for entry in conditioning):
        raise MajicFluxError(
            "The CONDITIONING of {name} is not one that ComfyUI's nodes make. Connect encode "
            "prompt or CLIPTextEncode.",
            name=name,
        )
    if len(conditioning) != 1:
        raise MajicFluxError(
            "The CONDITIONING of {name} has {count} entries, and Majic nodes paint with one. "
            "Remove Conditioning (Combine) or its like.",
            name=name,
            count=len(conditioning),
        )
    tokens, options = conditioning[0]
    unknown = [key for key, value in options.items() if key not in HONOURED and value is not None]
    if unknown:
        raise MajicFluxError(
            "The CONDITIONING of {name} carries {unknown}, which Majic nodes cannot honour. "
            "{advice}",
            name=name,
            unknown=", ".join(sorted(unknown)),
            advice=say(next((INSTEAD[key] for key in unknown if key in INSTEAD), REMOVE)),
        )
    pooled = options.get("pooled_output")
    if pooled is None:
        pooled = tokens.new_zeros(len(tokens), geometry.pooled_width)
    for what, found, width in (
        (later("tokens"), tokens, geometry.text_width),
        (later("a pooled vector"), pooled, geometry.pooled_width),
    ):
        if found.shape[0] != 1 or found.shape[-1] != width:
            raise MajicFluxError(
                "The CONDITIONING of {name} has {what} of shape {shape}, but Flux.1 takes one "
                "prompt of width {width}. Encode it with CLIP-L and T5-XXL (type flux).",
                name=name,
                what=say(what),
                shape=tuple(found.shape),
                width=width,
            )
        require_finite(name, found)
    guidance = options.get("guidance")
    if guidance is not None and not (
        isinstance(guidance, (int, float)) and math.isfinite(guidance)
    ):
        raise MajicFluxError(
            "The guidance in the CONDITIONING of {name} must be a number, not {value!r}.",
            name=name,
            value=guidance,
        )
    # What FluxDisableGuidance leaves is not what is left where no node gave one.
    guided = guidance is not None or "guidance" not in options
    pictures = _pictures(name, options, geometry)
    return TextEmbedding(tokens.cpu(), pooled.cpu(), guidance, guided, pictures)


def _pictures(name: str, options: dict[str, Any], geometry: FluxGeometry) -> PictureConditions:
    """Those of a CONDITIONING. A model without channels for one passes it over, as in ComfyUI."""
    references = options.get("reference_latents")
    if references is not None:
        return _references(name, references, options, geometry)
    if not geometry.takes_picture:
        return NO_PICTURES
    image, mask = (options.get(key) for key in ("concat_latent_image", "concat_mask"))
    if image is not None:
        image = _latents_of(name, "concat_latent_image", image)
    if mask is not None:
        mask = from_mask(mask, None)[:, None]
    return PictureConditions(image, mask)


def _references(
    name: str, references: Any, options: dict[str, Any], geometry: FluxGeometry
) -> PictureConditions:
    placing = options.get("reference_latents_method") or PLACINGS[0]
    if geometry.takes_picture:
        raise MajicFluxError(
            "The CONDITIONING of {name} carries reference_latents, which fill, depth and "
            "canny models and control LoRAs cannot take. Remove ReferenceLatent, or choose a "
            "Kontext model.",
            name=name,
        )
    if placing not in PLACINGS:
        raise MajicFluxError(
            "The CONDITIONING of {name} places its references by {method}, which Majic nodes "
            "cannot honour. Choose offset, index or uxo/uno in Edit Model Reference Method.",
            name=name,
            method=placing,
        )
    latents = [_latents_of(name, "reference_latents", each) for each in references]
    return PictureConditions(references=tuple(latents), placing=placing)


def _latents_of(name: str, key: str, given: Any) -> Tensor:
    """Float32 in model space on the CPU, of a picture in a CONDITIONING."""
    samples = tensor_of(key, "LATENT", given).float().cpu()
    if samples.ndim != 4 or samples.shape[1] != CHANNELS or not samples.numel():
        raise MajicFluxError(
            "The CONDITIONING of {name} has {key} of the shape {shape}, but Flux.1's latents are "
            "[batch, {channels}, height/8, width/8]. Encode the picture with the VAE of Flux.1.",
            name=name,
            key=key,
            shape=tuple(samples.shape),
            channels=CHANNELS,
        )
    require_finite(name, samples)
    return to_model_space(samples)


def _is_entry(entry: Any) -> bool:
    """Of a CONDITIONING: tokens, and what else is told with them."""
    if not isinstance(entry, (list, tuple)) or len(entry) != 2:
        return False
    tokens, options = entry
    if not isinstance(options, dict):
        return False
    pooled = options.get("pooled_output")
    return isinstance(tokens, Tensor) and (pooled is None or isinstance(pooled, Tensor))


def tensor_of(where: str, wanted: str, value: Any) -> Tensor:
    """What came by an input, or is part of it. Raises MajicFluxError unless it is a tensor."""
    if isinstance(value, Tensor):
        return value
    found = type(value).__name__
    raise MajicFluxError(
        "{where} takes {wanted}, but is linked to {found}.", where=where, wanted=wanted, found=found
    )


def require_finite(name: str, values: Tensor) -> None:
    """Raise MajicFluxError for a NaN or an infinity in what came by the input of this name."""
    if not torch.isfinite(values).all():
        raise MajicFluxError(
            "What came by {name} holds values that are no numbers (NaN or infinity). Look at "
            "the node that it comes from.",
            name=name,
        )


def to_latent(latents: Tensor, device: torch.device, given: Latent | None = None) -> Latent:
    """Model-space latents as other nodes expect them, with what else the given one had."""
    kept = {key: value for key, value in (given or {}).items() if key != RATIO}
    return {**kept, "samples": to_vae_space(latents).to(device)}


def from_latent(latent: Latent) -> Tensor:
    """Float32 model-space latents [batch, 16, h, w] on the CPU; an empty latent stays zeros.

    Raises MajicFluxError when they are another model's.
    """
    samples = tensor_of("latent", "LATENT", latent.get("samples")).float().cpu()
    require_finite("latent", samples)
    empty = not samples.any()
    if samples.ndim == 4 and samples.numel() and empty:
        # Of any number of channels, and of pixels for each latent, as in ComfyUI.
        scale = (latent.get(RATIO) or PIXELS_PER_LATENT) / PIXELS_PER_LATENT
        size = [round(side * scale) for side in samples.shape[2:]]
        return samples.new_zeros(len(samples), CHANNELS, *size)
    if samples.ndim != 4 or samples.shape[1] != CHANNELS or not samples.numel():
        raise MajicFluxError(
            "This LATENT has the shape {shape}, but Flux.1's are [batch, {channels}, height/8, "
            "width/8]. Encode the picture with the VAE of Flux.1.",
            shape=tuple(samples.shape),
            channels=CHANNELS,
        )
    return to_model_space(samples)


def from_image(image: Tensor) -> Tensor:
    """Float32 RGB [n, height, width, 3] on the CPU, cropped to sides that Flux can paint.

    Raises MajicFluxError when it is no picture.
    """
    whole = from_whole_image(image)
    for name, side in (("Height", whole.shape[1]), ("Width", whole.shape[2])):
        if side < STEP:
            require_size(name, side)
    return cropped(whole)


def from_whole_image(image: Tensor) -> Tensor:
    """The same of any size."""
    if image.ndim != 4 or image.shape[-1] < 3 or image.numel() == 0:
        raise MajicFluxError(
            "This IMAGE has the shape {shape}, but pictures are [batch, height, width, 3].",
            shape=tuple(image.shape),
        )
    require_finite("image", image)
    return image[..., :3].float().cpu()


def from_mask(mask: Tensor, image: Tensor | None) -> Tensor:
    """Float32 [n, rows, columns] on the CPU, scaled and cropped as the image that it belongs to
    where that loses its edges.

    Raises MajicFluxError when it is no mask.
    """
    mask = tensor_of("mask", "MASK", mask)
    if mask.ndim < 2 or mask.numel() == 0:
        raise MajicFluxError(
            "This MASK has the shape {shape}, but masks are [batch, height, width].",
            shape=tuple(mask.shape),
        )
    require_finite("mask", mask)
    mask = mask.float().cpu().reshape(-1, *mask.shape[-2:])
    if image is None or cropped(image).shape == image.shape:
        return mask
    size = tuple(image.shape[1:3])
    return cropped(torch.nn.functional.interpolate(mask[:, None], size, mode="bilinear")[:, 0])


def cropped(values: Tensor) -> Tensor:
    """The middle of values [n, height, width, ...], with sides that are multiples of 16."""
    height, width = values.shape[1:3]
    rows, columns = (side // STEP * STEP for side in (height, width))
    top, left = (height - rows) // 2, (width - columns) // 2
    return values[:, top : top + rows, left : left + columns]


def pasted(painted: Tensor, image: Tensor, mask: Tensor) -> Tensor:
    """`painted` where the mask is 1, the image's own pixels, bit for bit, where it is 0.

    painted: [batch, height, width, 3]; image: [n, height, width, 3]; mask: [m, rows, columns].
    """
    size = painted.shape[1:3]
    if mask.shape[1:] != size:
        mask = torch.nn.functional.interpolate(mask[:, None], tuple(size), mode="bilinear")[:, 0]

    def for_all(values: Tensor) -> Tensor:
        return values.repeat(-(-len(painted) // len(values)), 1, 1, 1)[: len(painted)]

    part = for_all(mask[..., None])
    return painted * part + for_all(image) * (1 - part)
