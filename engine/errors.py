"""What the engine refuses, and its limits. What can be done about it depends on where it was asked
for: nodes and command line add that."""

from typing import ClassVar

from ..messages import MajicFluxError, later, say


class EngineError(MajicFluxError):
    """One kind of refusal: `fact` is its sentence, a text for `say`, and `values` fill it.

    lines: what stands below the fact, as it is. ComfyUI knows a lack of memory by PyTorch's words.
    """

    fact: ClassVar[str] = ""

    def __init__(self, *lines: str, **values: object):
        super().__init__("\n".join(filter(None, [say(self.fact, **values), *lines])))
        self.values = values

    def advise(self, advice: str) -> None:
        """Say behind the fact what to do."""
        fact, *lines = str(self).split("\n")
        self.args = ("\n".join([say("{fact} {advice}", fact=fact, advice=advice), *lines]),)


# A request


class SizeError(EngineError):
    """A side that cannot be painted; `size_problem` says why."""


class StepsError(EngineError):
    fact = later("Steps must be 1 to {most}, not {steps}.")


class SeedError(EngineError):
    fact = later("The seed must be 0 to {most}, not {seed}.")


class NumberError(EngineError):
    fact = later("{where} must be a number, not {value}.")


class BatchSizeError(EngineError):
    fact = later("The batch size must be at least 1, not {batch}.")


class StrengthError(EngineError):
    fact = later("Strength must be above 0 and at most 1, not {strength}.")


class MaskAloneError(EngineError):
    fact = later("A mask needs a picture.")


class StrengthAloneError(EngineError):
    fact = later("A strength of {strength} needs a picture to begin from.")


class TwoPicturesError(EngineError):
    fact = later("There are both a picture and latents to begin from.")


class ReusedStepError(EngineError):
    fact = later(
        "Step {step} cannot be reused in a run of {steps}: they are 0 to {last}, and 0 is always "
        "computed."
    )


class ReuseWithHeunError(EngineError):
    fact = later("Steps cannot be reused with heun, which takes two passes for each.")


# Noise levels


class NoiseLevelsError(EngineError):
    """Noise levels that a flow model cannot follow."""


class TooFewLevelsError(NoiseLevelsError):
    fact = later("Noise levels must be a list of at least two, not of shape {shape}.")


class LevelNumbersError(NoiseLevelsError):
    fact = later("Noise levels must be numbers, and some of these are not (NaN or infinity).")


class LevelOrderError(NoiseLevelsError):
    fact = later(
        "Noise levels must fall from at most 1 to at least 0; these go from {first:.4g} to "
        "{last:.4g}."
    )


class NoStepsError(EngineError):
    fact = later("There is no step from {start} to {end} in a schedule of {steps} steps.")


# Prompts


class PromptTooLongError(EngineError):
    """More than can be read."""


class TooManyCharactersError(PromptTooLongError):
    fact = later("The prompt has {characters} characters, more than the {most} that can be read.")


class TooManyTokensError(PromptTooLongError):
    fact = later("The prompt has {tokens} T5 tokens, more than the {most} that can be read.")


class PromptWeightError(EngineError):
    fact = later("A weight in the prompt is too large: {weight:.4g}.")


# Components


class UnknownChannelsError(EngineError):
    fact = later(
        "This transformer takes {channels} channels, and those of Flux.1 take 64, with a picture "
        "128 (depth, canny) or 384 (fill)."
    )


class NoPictureError(EngineError):
    fact = later(
        "This transformer takes {channels} channels, as a fill, depth or canny model does, or one "
        "with a control LoRA: it needs a picture too."
    )


class EncoderWidthError(EngineError):
    fact = later(
        "This transformer takes {wanted} values from {encoder}, and the {encoder} here gives "
        "{width}."
    )


class ControlNetWidthError(EngineError):
    fact = later(
        "This ControlNet has a width of {width} where the transformer has {wanted}, so it is for "
        "another model."
    )


class NoTextEncodersError(EngineError):
    fact = later("The pipeline has no text encoders.")


class NoVaeError(EngineError):
    fact = later("The pipeline has no VAE.")


class NoEightBitWeightsError(EngineError):
    fact = later("Computing in 8 bits takes weights in 8 bits, and this transformer has none.")


class NotFiniteError(EngineError):
    fact = later(
        "The phase '{phase}' gave values that are no numbers (NaN), so there is no picture."
    )


# Memory


class BudgetError(EngineError):
    """A run that cannot work in the memory it may use."""


class BudgetTooSmallError(BudgetError):
    """The budget was chosen. enough: GB, rounded up; smaller: what would need less."""

    fact = later(
        "{budget:.2f} GB of VRAM are too little for {picture}: the phase '{phase}' needs "
        "{needed:.2f} GB."
    )


class TooLittleVramError(BudgetError):
    """The budget is what the device has left; values as of BudgetTooSmallError."""

    fact = later(
        "Only {budget:.2f} GB of VRAM can be had, too little for {picture}: the phase '{phase}' "
        "needs {enough} GB."
    )


class OutOfVramError(BudgetError):
    fact = later(
        "The card ran out of memory in the phase '{phase}', which needs {smallest:.2f} GB at least."
    )
