"""Picture sizes that Flux can paint."""

from ..messages import say
from .errors import SizeError

CHANNELS = 16  # of latents
PIXELS_PER_LATENT = 8  # of the VAE, per side
PATCH = 2  # latents per token of the transformer, per side
STEP = PIXELS_PER_LATENT * PATCH
OF_LATENTS = CHANNELS * PATCH**2  # values of a token: of its latents, or of those of a picture
OF_MASK = STEP**2  # of its pixels in a mask
MAX_SIDE = 8192


def size_problem(name: str, side: int) -> str | None:
    """Why a side of that many pixels cannot be painted, or None when it can. name: for `say`."""
    values = {"name": say(name), "side": side, "most": MAX_SIDE}
    if side > MAX_SIDE:
        return say("{name} {side} is more than {most}, the most that can be painted.", **values)
    if side >= STEP and side % STEP == 0:
        return None
    below = max(STEP, side // STEP * STEP)
    return say(
        "{name} {side} is not a multiple of {step}; the nearest that work are {below} and {above}.",
        step=STEP,
        below=below,
        above=below + STEP,
        **values,
    )


def require_size(name: str, side: int) -> None:
    """Raise SizeError unless a side of that many pixels can be painted."""
    if problem := size_problem(name, side):
        raise SizeError(problem, name=name, side=side)
