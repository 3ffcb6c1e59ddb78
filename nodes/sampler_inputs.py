"""Inputs that the nodes which sample have in common, and the request that is made of them."""

import logging
import random
import re
import unicodedata
from collections import Counter
from typing import TYPE_CHECKING, Any

from ..engine.flux.reuse import REUSES, Reuse
from ..engine.sampling.schedules import SCHEDULES, given_sigmas
from ..engine.sampling.solvers import SOLVERS
from ..engine.sizes import PIXELS_PER_LATENT, STEP
from ..host import current as host
from ..host import provenance
from ..messages import MajicFluxError, say
from .arguments import brief
from .sockets import ControlHandle

if TYPE_CHECKING:
    from torch import Tensor

    from ..engine.flux.text_encoders import TextEmbedding
    from ..engine.run.pipeline import Pipeline
    from ..engine.run.request import GenerationRequest

log = logging.getLogger("majicflux")
io = host.io
NEW_SEED = -1
DEFAULT_SOLVER = "euler"
DEFAULT_SCHEDULE = "DiffSynth (shift 3)"
NO_REUSE, CHOSEN = "off", "chosen"

_drawn: Counter[str | None] = Counter()  # seeds, by the nodes that drew them


def seed() -> Any:
    return io.Int.Input(
        "seed",
        default=0,
        min=NEW_SEED,
        max=2**64 - 1,
        control_after_generate=True,
        tooltip="Chooses the noise. The same seed and settings give the same picture. -1: another "
        "one each time; the node and the saved picture say which.",
    )


def steps() -> Any:
    return io.Int.Input(
        "steps",
        default=20,
        min=1,
        max=100,
        tooltip="Denoising steps. 20 is the published setting; more is slower.",
    )


def guidance() -> Any:
    return io.Float.Input(
        "guidance",
        default=3.5,
        min=0.0,
        max=100.0,
        step=0.1,
        tooltip="How closely to follow the prompt, built into Flux.1-dev models. 3.5 is usual; "
        "lower looks more natural. schnell models ignore it. Not the same as cfg.",
    )


def cfg() -> Any:
    return io.Float.Input(
        "cfg",
        default=1.0,
        min=0.0,
        max=100.0,
        step=0.1,
        optional=True,
        tooltip="Classifier-free guidance: how far to go away from the negative prompt. 1: not at "
        "all, which is what Flux.1-dev was made for, as its guidance is built in. Any other value "
        "takes two passes a step, twice the time; 1.5 to 3 with a guidance of 1 to 2 is usual.",
    )


def solver() -> Any:
    return io.Combo.Input(
        "solver",
        options=[*SOLVERS],
        default=DEFAULT_SOLVER,
        optional=True,
        advanced=True,
        tooltip="How one step leads to the next. euler: the published one. deis_2m, deis_3m: as "
        "fast, and with few steps nearer to what many give. heun: two passes a step.",
    )


def schedule() -> Any:
    return io.Combo.Input(
        "schedule",
        options=[*SCHEDULES],
        default=DEFAULT_SCHEDULE,
        optional=True,
        advanced=True,
        tooltip="The noise level of each step. DiffSynth (shift 3): the published one, the same at "
        "every size. resolution-aware (BFL): Black Forest Labs' own, which stays longer at high "
        "noise the larger the picture is.",
    )


def strength() -> Any:
    return io.Float.Input(
        "strength",
        default=1.0,
        min=0.01,
        max=1.0,
        step=0.01,
        optional=True,
        tooltip="How much of the image or latent is painted anew. 1: everything; 0.5: about half. "
        "All steps are made with any strength.",
    )


def sigmas() -> Any:
    return io.Sigmas.Input(
        "sigmas",
        optional=True,
        tooltip="Noise levels from a scheduler node such as BasicScheduler, instead of steps, "
        "schedule and strength.",
    )


def control() -> Any:
    return ControlHandle.Input(
        "control",
        optional=True,
        tooltip="From ControlNet: pictures by which control nets steer what is painted.",
    )


def reuse() -> list[Any]:
    """Two inputs: whether steps are reused, and which ones where the user says so."""
    return [
        io.Combo.Input(
            "reuse",
            options=[*REUSES, CHOSEN],
            default=NO_REUSE,
            optional=True,
            advanced=True,
            tooltip=(
                "Does not compute steps that would differ little from those before. mild: up to "
                "1.7 times as fast, hardly to be seen. fast: up to 2 times, details change. "
                "chosen: the steps below. It takes 20 steps or more, and any solver but heun."
            ),
        ),
        io.String.Input(
            "reused_steps",
            default="",
            optional=True,
            advanced=True,
            tooltip=(
                "The steps that are not computed, where reuse is chosen: counted from 0, as a "
                "report names them, such as 6 8 10 12."
            ),
        ),
    ]


def fingerprint(cls: Any, seed: int | None) -> Any:
    """Equal for equal seeds, and never for a new one.

    What comes over a link is not known yet, but what the node drew may not be remembered.
    """
    if seed is None:
        return _drawn[cls.hidden.unique_id]
    return random.random() if seed == NEW_SEED else seed


def generation_request(
    node: Any,
    pipeline: "Pipeline",
    *,
    size: tuple[int, ...] = (),
    image: "Tensor | None" = None,
    latent: dict[str, Any] | None = None,
    mask: "Tensor | None" = None,
    prompt: str = "",
    positive: Any = None,
    negative_prompt: str = "",
    negative: Any = None,
    cfg: float,
    seed: int,
    solver: str,
    schedule: str,
    sigmas: "Tensor | None",
    reuse: str,
    reused_steps: str,
    **settings: Any,
) -> "tuple[GenerationRequest, list[str]]":
    """What the inputs of a node ask for, and what the node has to say of them, line by line.

    size: width and height where an image or latent brings none; settings: fields of the request
    that inputs give as they are.
    """
    from ..engine.run.request import GenerationRequest
    from ..host import native

    picture = None if image is None else native.from_image(image)
    latents = None if latent is None else native.from_latent(latent)
    of_latent = latent or {}
    mask = of_latent.get("noise_mask") if mask is None else mask
    mask = None if mask is None else native.from_mask(mask, image)
    (width, height), sized = _size(size, picture, latents)
    towards = _prompt(pipeline, say("positive"), prompt, positive)
    away = _prompt(pipeline, say("negative"), negative_prompt, None if cfg == 1 else negative)
    seed, drawn = _seed(node, seed)
    request = GenerationRequest(
        prompt=towards,
        negative=away,
        cfg=cfg,
        seed=seed,
        width=width,
        height=height,
        solver=SOLVERS[solver],
        schedule=SCHEDULES[schedule] if sigmas is None else given_sigmas(sigmas),
        picture=picture,
        latents=latents,
        mask=mask,
        noise_of=of_latent.get("batch_index"),
        coming=host.coming_prompts(node.hidden.unique_id),
        reuse=Reuse(chosen=_steps(reused_steps)) if reuse == CHOSEN else REUSES[reuse],
        **settings,
    )
    return request, [sized, drawn]


def _steps(text: str) -> tuple[int, ...]:
    """The numbers in a text, between spaces or commas, those of Chinese keyboards too."""
    numbers = re.sub("[,;、]", " ", unicodedata.normalize("NFKC", text)).split()
    for number in numbers:
        if not re.fullmatch(r"[0-9]{1,9}", number):
            raise MajicFluxError(
                "reused_steps takes numbers of steps, such as 6 8 10, not {value!r}.",
                value=brief(number),
            )
    return tuple(map(int, numbers))


def _size(
    asked: tuple[int, ...], picture: "Tensor | None", latents: "Tensor | None"
) -> tuple[tuple[int, ...], str]:
    """Width and height to paint, and a line about them where they are not those asked for."""
    if picture is not None:
        height, width = picture.shape[1:3]
    elif latents is not None:
        height, width = (PIXELS_PER_LATENT * side for side in latents.shape[2:])
    else:
        return _rounded(asked)
    if asked in ((), (width, height)):
        return (width, height), ""
    values = {"width": width, "height": height}
    return (width, height), say(
        "The size is that of the image or latent: {width} x {height}.", **values
    )


def _rounded(asked: tuple[int, ...]) -> tuple[tuple[int, ...], str]:
    """The nearest size that Flux paints, and a line about it where that is another."""
    size = tuple((side + STEP // 2) // STEP * STEP for side in asked)
    if size == asked:
        return size, ""
    before, after = (" x ".join(map(str, sides)) for sides in (asked, size))
    line = say(
        "The size was rounded from {asked} to {size}: Flux paints multiples of 16.",
        asked=before,
        size=after,
    )
    log.info("%s", line)  # which is all that shows it without a canvas
    return size, line


def _prompt(pipeline: "Pipeline", name: str, text: str, conditioning: Any) -> "str | TextEmbedding":
    """The text, unless there is a CONDITIONING by the input of this name."""
    from ..host import native

    if conditioning is None:
        return text
    return native.from_conditioning(name, conditioning, pipeline.dit.geometry)


def _seed(node: Any, seed: int) -> tuple[int, str]:
    """The seed to use, and a line about it where it was drawn.

    The graphs that are saved with the picture then have it too.
    """
    if seed != NEW_SEED:
        return seed, ""
    _drawn[node.hidden.unique_id] += 1
    seed = random.SystemRandom().randrange(2**50)  # what JavaScript holds exactly
    provenance.note_seed(node.hidden, NEW_SEED, seed)
    return seed, say("seed {seed}", seed=seed)
