"""What can be done on the canvas about what the engine refuses."""

from ..engine import errors
from ..messages import later, say

# By class, for its subclasses too; the fields are the error's values. Other facts say all.
ADVICE: dict[type[errors.EngineError], str] = {
    errors.MaskAloneError: later("Connect an image or a latent too."),
    errors.StrengthAloneError: later("Connect an image or a latent, or set strength to 1."),
    errors.TwoPicturesError: later("Connect an image or a latent, not both."),
    errors.ReusedStepError: later("Change reused_steps, or set reuse to off."),
    errors.ReuseWithHeunError: later("Choose another solver, or set reuse to off."),
    errors.TooFewLevelsError: later(
        "Raise the steps or the denoise of the scheduler that SIGMAS come from."
    ),
    errors.LevelNumbersError: later("Look at the node that SIGMAS come from."),
    errors.LevelOrderError: later("Connect the scheduler that SIGMAS come from to a Flux model."),
    errors.NoStepsError: later("Lower start_at_step or raise end_at_step."),
    errors.PromptTooLongError: later("Shorten it."),
    errors.PromptWeightError: later(
        "Brackets multiply the weights around them; usual ones are 0.5 to 1.5."
    ),
    errors.UnknownChannelsError: later("Choose another model."),
    errors.NoPictureError: later(
        "Connect image and mask (fill) or reference (depth, canny) to sample, or to denoise what "
        "InpaintModelConditioning or InstructPixToPixConditioning give; or choose a text-to-image "
        "model."
    ),
    errors.EncoderWidthError: later("Choose another {encoder} in the bf16 text encoders node."),
    errors.ControlNetWidthError: later("Choose another ControlNet."),
    errors.NoTextEncodersError: later(
        "Connect bf16 text encoders to it, or an encoded prompt to positive and, if cfg is not 1, "
        "to negative."
    ),
    errors.NoVaeError: later(
        "Connect a Flux VAE to it, or use denoise with ComfyUI's own VAE nodes."
    ),
    errors.NoEightBitWeightsError: later(
        "Choose float8_e4m3fn or int8 rotated as weight_precision, or a compute_precision other "
        "than 8-bit."
    ),
    errors.NotFiniteError: later(
        "Set compute_precision to float32; if that does not help, the model file is damaged: "
        "download it again."
    ),
    errors.BudgetTooSmallError: later(
        "Set vram_budget_gb to {enough} or more, or choose {smaller}."
    ),
    errors.TooLittleVramError: later(
        "Close other programs that use the card, or choose {smaller}."
    ),
    errors.OutOfVramError: later(
        "Close other programs that use the card, or choose a smaller picture or batch."
    ),
}


def advise(error: errors.EngineError) -> None:
    kind = next((kind for kind in type(error).__mro__ if kind in ADVICE), None)
    if kind is not None:
        error.advise(say(ADVICE[kind], **error.values))
