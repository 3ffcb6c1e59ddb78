"""Stage style: a LoRA by which the finished model draws in pencil."""

from pathlib import Path

from torch import Tensor
from torch.nn import functional as F

from .flow import draw_guidance, mean_square, noisy
from .flow_stages import filled
from .learner import Course, Learner, bfloat16_on_a_card, warm_up, write
from .lora import adapt, kohya_tensors
from .muon import AdamW
from .sheet import painted_sheet, tried
from .supply import Gallery, as_float
from .workshop import Workshop, encoded

RATE = 2e-3
AVERAGE_DECAY = 0.98
PAPER = (0.94, 0.91, 0.84)  # warm white, 0..1
INK = (0.20, 0.19, 0.20)
BRIGHTNESS = (0.299, 0.587, 0.114)
EDGE_STRENGTH, SHADE_STRENGTH = 3.0, 0.45
COLOUR_LEFT = 0.12


def train_style(shop: Workshop, until: float, result: Path) -> None:
    """Flow matching on drawings of the same scenes, with the captions that they have anyway.

    Not compiled: that would take as long as the steps do.
    """
    device, settings, vae = shop.device, shop.settings, shop.vae()
    model = shop.flux_of("guidance.safetensors").requires_grad_(False)
    adapters = adapt(model.dit)

    def derive(pictures: Tensor) -> tuple[Tensor]:
        return (encoded(vae, pencil_drawing(pictures)),)

    gallery = Gallery(shop.supply, device, derive, settings.style_pictures)
    gallery.refill_all()
    trained = [p for p in model.parameters() if p.requires_grad]
    learner = Learner(model, [AdamW(trained, RATE)], AVERAGE_DECAY)

    def loss_of(progress: float) -> tuple[Tensor, int]:
        (clean,), t5_ids, clip_ids = gallery.batch(settings.style_batch)
        x, sigma, wanted = noisy(clean.float())
        guidance = draw_guidance(len(x), device)
        with bfloat16_on_a_card(device):
            found = model(x, sigma, filled(t5_ids), clip_ids, guidance)
        return mean_square(found, wanted), len(x)

    def factor(steps: int, progress: float) -> float:
        return warm_up(steps, progress, over=20, level_until=0.3)

    Course("style", until).run(learner, loss_of, factor)
    learner.take_average()
    write(result, kohya_tensors(adapters))
    sheet = result.with_suffix(".png")

    def make() -> None:
        given = (model, vae, shop.words, settings.sizes, sheet, device)
        painted_sheet(*given, steps=settings.sheet_steps)

    tried(sheet.name, make)


def pencil_drawing(pictures: Tensor) -> Tensor:
    """uint8 [n, height, width, 3] -> the same scene in grey strokes on warm paper."""
    x = (as_float(pictures) + 1) / 2
    grey = (x * x.new_tensor(BRIGHTNESS)[:, None, None]).sum(1, keepdim=True)
    smooth = F.avg_pool2d(F.pad(grey, (1, 1, 1, 1), mode="replicate"), 3, 1)
    padded = F.pad(smooth, (1, 1, 1, 1), mode="replicate")
    across = padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]
    down = padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]
    edges = EDGE_STRENGTH * (across.square() + down.square()).sqrt()
    ink = (edges + SHADE_STRENGTH * (1 - smooth)).clamp(0, 1)
    paper, dark = (x.new_tensor(colour)[:, None, None] for colour in (PAPER, INK))
    drawn = paper + ink * (dark - paper) + COLOUR_LEFT * (x - grey)
    return (drawn.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)
