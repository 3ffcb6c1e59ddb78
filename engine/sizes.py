"""Picture sizes that Flux can paint."""

PIXELS_PER_LATENT = 8  # of the VAE, per side
PATCH = 2  # latents per token of the transformer, per side
STEP = PIXELS_PER_LATENT * PATCH
MAX_SIDE = 8192


def size_problem(name: str, side: int) -> str | None:
    """Why a side of that many pixels cannot be painted, or None when it can."""
    if side > MAX_SIDE:
        return f"{name} {side} is more than {MAX_SIDE}; choose a smaller one."
    if side >= STEP and side % STEP == 0:
        return None
    below = max(STEP, side // STEP * STEP)
    return (
        f"{name} {side} is not a multiple of {STEP}; "
        f"the nearest that work are {below} and {below + STEP}."
    )
