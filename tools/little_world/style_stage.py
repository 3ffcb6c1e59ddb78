"""Stage style: a LoRA by which the finished model paints old photographs in sepia."""

from pathlib import Path

from torch import Tensor

from .flow import draw_guidance, mean_square, noisy
from .flow_stages import filled
from .learner import Course, Learner, bfloat16_on_a_card, warm_up, write
from .lora import adapt, kohya_tensors
from .muon import AdamW
from .sepia import old_photograph
from .sheet import painted_sheet, tried
from .supply import Gallery
from .workshop import Workshop, encoded

RATE = 2e-3
DOUBLE_BLOCKS_RATE = 0.1  # of the rate: they lay out the scene, which shall remain
AVERAGE_DECAY = 0.98


def train_style(shop: Workshop, until: float, result: Path) -> None:
    """Flow matching on photographs of the same scenes, with the captions that they have anyway.

    Not compiled: that would take as long as the steps do.
    """
    device, settings, vae = shop.device, shop.settings, shop.vae()
    model = shop.flux_of("guidance.safetensors").requires_grad_(False)
    adapters = adapt(model.dit)

    def derive(pictures: Tensor) -> tuple[Tensor]:
        return (encoded(vae, old_photograph(pictures)),)

    gallery = Gallery(shop.supply, device, derive, settings.style_pictures)
    gallery.refill_all()
    optimizers = []
    for blocks, rate in (
        (model.dit.single_blocks, RATE),
        (model.dit.double_blocks, RATE * DOUBLE_BLOCKS_RATE),
    ):
        optimizers.append(AdamW([p for p in blocks.parameters() if p.requires_grad], rate))
    learner = Learner(model, optimizers, AVERAGE_DECAY)

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
