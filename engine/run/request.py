"""What a user asks to be painted."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ...messages import later
from .. import errors
from ..flux.controlnet import Control
from ..flux.picture_conditions import NO_PICTURES, PictureConditions
from ..flux.reuse import Reuse
from ..flux.text_encoders import TextEmbedding
from ..latents import draw_noise, latent_mask
from ..offload.weight_block import CPU
from ..plan.plan import Workload
from ..sampling.inputs import SamplerInputs
from ..sampling.schedules import Schedule, diffsynth_sigmas
from ..sampling.solvers import Solver, euler, heun, levels_of_passes, passes
from ..sizes import CHANNELS, require_size

MAX_STEPS = 100
MAX_SEED = 2**64 - 1


@dataclass(frozen=True)
class GenerationRequest:
    """What to paint. Sizes in pixels, multiples of 16.

    prompt, negative: a text, or what an encoder made of one; negative is used unless cfg is 1.
    picture: RGB [n, height, width, 3] in 0..1 to begin from, or latents: the same as float32
    [n, 16, h, w] in model space; each is painted `batch_size` times, from a noise level that
    `strength` lowers. mask: [m, rows, columns] in 0..1, 1 where the picture may change.
    noise_of: which noises of the seed the pictures get, None for the first ones; add_noise: False
    to go on with the noise that `latents` have. reference: for prompts that bring no pictures.
    controls: pictures that control nets are shown. coming: prompts of later requests, which are
    encoded in the same visit of the text encoders. reuse: which steps need not be computed, None
    to compute all.
    """

    prompt: str | TextEmbedding
    seed: int
    steps: int
    guidance: float
    width: int
    height: int
    batch_size: int = 1
    negative: str | TextEmbedding = ""
    cfg: float = 1.0
    schedule: Schedule = diffsynth_sigmas
    solver: Solver = euler
    picture: Tensor | None = None
    latents: Tensor | None = None
    strength: float = 1.0
    mask: Tensor | None = None
    noise_of: Sequence[int] | None = None
    add_noise: bool = True
    reference: PictureConditions = NO_PICTURES
    controls: tuple[Control, ...] = ()
    coming: Sequence[str] = ()
    reuse: Reuse | None = None

    def __post_init__(self) -> None:
        for name, size in ((later("Width"), self.width), (later("Height"), self.height)):
            require_size(name, size)
        if not 1 <= self.steps <= MAX_STEPS:
            raise errors.StepsError(most=MAX_STEPS, steps=self.steps)
        if not 0 <= self.seed <= MAX_SEED:
            raise errors.SeedError(most=MAX_SEED, seed=self.seed)
        for name, value in (("guidance", self.guidance), ("cfg", self.cfg)):
            if not math.isfinite(value):
                raise errors.NumberError(where=name, value=value)
        if self.batch_size < 1:
            raise errors.BatchSizeError(batch=self.batch_size)
        if not 0 < self.strength <= 1:
            raise errors.StrengthError(strength=self.strength)
        if self.picture is None and self.latents is None:
            if self.mask is not None:
                raise errors.MaskAloneError
            if self.strength < 1:
                raise errors.StrengthAloneError(strength=self.strength)
        if self.picture is not None and self.latents is not None:
            raise errors.TwoPicturesError
        if self.reuse is not None and self.solver is heun:
            raise errors.ReuseWithHeunError
        if self.reuse is not None:
            self.reuse.decisions(self.passes)  # before anything is encoded for them

    @property
    def pictures(self) -> int:
        begun = self.picture if self.picture is not None else self.latents
        return self.batch_size * (1 if begun is None else len(begun))

    @property
    def sigmas(self) -> Tensor:
        return self.schedule(self.steps, self.width, self.height, self.strength)

    @property
    def passes(self) -> int:
        """Of all pictures and prompts through the transformer."""
        return passes(self.solver, self.sigmas)

    @property
    def acting(self) -> list[Control]:
        """The controls that have something to say at one of the noise levels."""
        levels = levels_of_passes(self.solver, self.sigmas)
        return [control for control in self.controls if any(map(control.acts_at, levels))]

    @property
    def workload(self) -> Workload:
        steps, prompts = len(self.sigmas) - 1, len(self.prompts)
        references = max(each.reference_tokens for each in self.prompt_pictures)
        return Workload(
            self.width, self.height, self.pictures, steps, prompts, reference_tokens=references
        )

    @property
    def prompts(self) -> list[str | TextEmbedding]:
        """The positive one, and the negative one where it is used."""
        return [self.prompt] if self.cfg == 1 else [self.prompt, self.negative]

    @property
    def prompt_pictures(self) -> list[PictureConditions]:
        """What each prompt comes with."""
        brought = (NO_PICTURES if isinstance(p, str) else p.pictures for p in self.prompts)
        return [pictures or self.reference for pictures in brought]

    @property
    def pixel_mask(self) -> Tensor:
        """The mask in the size of the picture, [m, 1, height, width]; one for each picture that is
        painted, where there are several."""
        assert self.mask is not None
        mask = F.interpolate(self.mask[:, None], (self.height, self.width), mode="bilinear")
        if len(mask) == 1:
            return mask
        return mask.repeat(-(-self.pictures // len(mask)), 1, 1, 1)[: self.pictures]

    @property
    def greyed_picture(self) -> Tensor:
        """The picture, grey where it is to be painted; one for each that is painted, where there
        are several masks. As ComfyUI's InpaintModelConditioning."""
        assert self.picture is not None
        kept = 1 - self.pixel_mask.round().movedim(1, -1)
        picture = self.picture if len(kept) == 1 else self.picture.repeat(self.batch_size, 1, 1, 1)
        return (picture - 0.5) * kept + 0.5

    @property
    def has_texts(self) -> bool:
        """Whether a prompt is still to be encoded."""
        return any(isinstance(prompt, str) for prompt in self.prompts)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the latents."""
        return self.pictures, CHANNELS, *self.workload.latent_size

    @property
    def mask_is_empty(self) -> bool:
        """Nothing may change, so there is nothing to run."""
        return self.mask is not None and not latent_mask(self.mask, self.shape).any()

    def sampler_inputs(self, clean: Tensor | None) -> SamplerInputs:
        """clean: latents of the pictures to begin from."""
        shape = self.shape
        if clean is not None:
            clean = clean.repeat(self.batch_size, 1, 1, 1)
        mask = None if self.mask is None else latent_mask(self.mask, shape)
        which = self.noise_of
        if which is not None:  # as ComfyUI's RepeatLatentBatch numbers them
            apart = max(which) - min(which) + 1
            which = [n + again * apart for again in range(self.batch_size) for n in which]
        if self.add_noise:
            noise = draw_noise(self.seed, shape, which)
        else:
            noise = torch.zeros(shape, dtype=torch.float32, device=CPU)
        return SamplerInputs(self.sigmas, noise, clean, mask, self.cfg, self.solver)
