"""A sheet of pictures, so that a person sees what a stage has learnt."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .flow import paint_latents
from .learner import log
from .models import LittleFlux
from .supply import Size
from .thin_vae import ThinVAE
from .vocabulary import Words

PROMPTS = (
    "赛博朋克风格的未来城市街道,雨夜,蓝色和粉色的霓虹灯光反射在湿漉漉的地面上,头顶有飞行汽车,"
    "高科技氛围,细节丰富,电影感宽幅画面。",
    "a red house, a green car, two pine trees, on a sunny day, green hills, clear sky",
    "a blue house, a yellow car, at night under the moon, snowy hills, falling snow",
    "the sea, three white sailboats, a lighthouse, at sunset",
    "a futuristic city street, rainy night, green and orange neon signs, four flying cars",
    "一座粉色的房子,一辆白色的汽车,三棵圆形的树,日落时分,秋天的山丘",
    "a purple house, four round trees, falling snow, winter, at night",
    "a cyberpunk city street, at sunset, purple and yellow neon lights",
    "未来城市街道,夜晚,红色和绿色的霓虹招牌,两辆飞行汽车",
    "大海,两艘红色的帆船,晴朗的白天,白云",
    "an orange house, one pine tree, rain, a blue car",
    "白色的房子,夜晚的月亮,雪山,飘雪",
)


def save_sheet(pictures: Sequence[Tensor], path: Path, columns: int) -> None:
    """pictures: [3, height, width] in -1..1 of any sizes, one cell each."""
    height, width = (max(picture.shape[k] for picture in pictures) for k in (1, 2))
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    for number, picture in enumerate(pictures):
        values = ((picture.float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte()
        place = number % columns * width, number // columns * height
        sheet.paste(Image.fromarray(np.ascontiguousarray(values.permute(1, 2, 0))), place)
    partial = path.with_name(path.name + ".part")
    sheet.save(partial, "PNG", optimize=True)
    partial.replace(path)


def painted_sheet(
    model: LittleFlux,
    vae: ThinVAE,
    words: Words,
    sizes: Sequence[Size],
    path: Path,
    device: torch.device,
    prompts: Sequence[str] = PROMPTS,
    **sampling: Any,
) -> None:
    """The prompts in order, an equal share at each size. sampling: of `paint_latents`."""
    share = -(-len(prompts) // len(sizes))
    pictures: list[Tensor] = []
    for number, size in enumerate(sizes):
        some = prompts[number * share : (number + 1) * share]
        latents = paint_latents(model, words, some, size, device, **sampling)
        with torch.no_grad():
            pictures += list(vae.decoder(latents))
    save_sheet(pictures, path, columns=share)


def tried(what: str, make: Callable[[], None]) -> None:
    """Make what only a person looks at: if it fails, the training goes on."""
    try:
        make()
    except Exception as error:
        log(f"{what} was not made: {error!r}")
