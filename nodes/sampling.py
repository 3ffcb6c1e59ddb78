"""Inputs that the nodes which sample have in common, and what they mean."""

import random
from collections import Counter
from typing import TYPE_CHECKING, Any

from ..host import current as host
from ..host import provenance
from ..messages import say

if TYPE_CHECKING:
    from torch import Tensor

    from ..engine.run.request import GenerationRequest
    from ..engine.sampling.schedules import Schedule

io = host.io
NEW_SEED = -1
# Names are part of saved workflows; test_nodes compares them with the engine's.
SOLVERS = ["euler", "deis_2m", "deis_3m", "heun"]
SCHEDULES = ["DiffSynth (shift 3)", "resolution-aware (BFL)"]

_drawn: Counter[str | None] = Counter()  # seeds, by the nodes that drew them


def seed() -> Any:
    return io.Int.Input(
        "seed",
        default=0,
        min=NEW_SEED,
        max=2**64 - 1,
        control_after_generate=True,
        tooltip=(
            "Chooses the noise. The same seed and settings give the same picture. "
            "-1: another one each time; the node and the saved picture say which."
        ),
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
        tooltip=(
            "How closely to follow the prompt, built into Flux.1-dev models. 3.5 is usual; lower "
            "looks more natural. schnell models ignore it. Not the same as cfg."
        ),
    )


def cfg() -> Any:
    return io.Float.Input(
        "cfg",
        default=1.0,
        min=0.0,
        max=100.0,
        step=0.1,
        optional=True,
        tooltip=(
            "Classifier-free guidance: how far to go away from the negative prompt. 1: not at "
            "all, which is what Flux.1-dev was made for, as its guidance is built in. Any other "
            "value takes two passes a step, twice the time; 1.5 to 3 with a guidance of 1 to 2 "
            "is usual."
        ),
    )


def solver() -> Any:
    return io.Combo.Input(
        "solver",
        options=SOLVERS,
        default="euler",
        optional=True,
        advanced=True,
        tooltip=(
            "How one step leads to the next. euler: the published one. deis_2m, deis_3m: as fast, "
            "and with few steps nearer to what many give. heun: two passes a step."
        ),
    )


def schedule() -> Any:
    return io.Combo.Input(
        "schedule",
        options=SCHEDULES,
        default=SCHEDULES[0],
        optional=True,
        advanced=True,
        tooltip=(
            "The noise level of each step. DiffSynth (shift 3): the published one, the same at "
            "every size. resolution-aware (BFL): Black Forest Labs' own, which stays longer at "
            "high noise the larger the picture is."
        ),
    )


def strength() -> Any:
    return io.Float.Input(
        "strength",
        default=1.0,
        min=0.01,
        max=1.0,
        step=0.01,
        optional=True,
        tooltip=(
            "How much of the image or latent is painted anew. 1: everything; 0.5: about half. All "
            "steps are made with any strength."
        ),
    )


def sigmas() -> Any:
    return io.Sigmas.Input(
        "sigmas",
        optional=True,
        tooltip=(
            "Noise levels from a scheduler node such as BasicScheduler, instead of steps, "
            "schedule and strength."
        ),
    )


def resolved_seed(cls: Any, seed: int) -> tuple[int, str]:
    """The seed to use, and a line about it where it was drawn.

    The graphs that are saved with the picture then have it too.
    """
    if seed != NEW_SEED:
        return seed, ""
    _drawn[cls.hidden.unique_id] += 1
    seed = random.SystemRandom().randrange(2**50)  # what JavaScript holds exactly
    provenance.note_seed(cls.hidden, NEW_SEED, seed)
    return seed, say("seed {seed}", seed=seed)


def fingerprint(cls: Any, seed: int | None) -> Any:
    """Equal for equal seeds, and never for a new one.

    What comes over a link is not known yet, but what the node drew may not be remembered.
    """
    if seed is None:
        return _drawn[cls.hidden.unique_id]
    return random.random() if seed == NEW_SEED else seed


def schedule_of(name: str, sigmas: "Tensor | None") -> "Schedule":
    from ..engine.sampling.schedules import SCHEDULES, given_sigmas

    return SCHEDULES[name] if sigmas is None else given_sigmas(sigmas)


def nothing_painted(request: "GenerationRequest") -> str:
    """A line about it where the mask lets nothing change."""
    if not request.mask_is_empty:
        return ""
    return say("The mask is empty: nothing was painted, and the original is returned.")
