"""The node that measures how far pictures are apart."""

from typing import TYPE_CHECKING

from ..host import current as host
from ..messages import MajicFluxError, log, say
from .arguments import checked
from .sockets import CATEGORY, Node, found_by, io

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


class Compare(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MajicFluxCompare",
            display_name="compare pictures",
            category=CATEGORY,
            description=(
                "Measures how far two pictures are apart, as an eye sees it, and shows where. For "
                "many prompts and seeds use majicflux compare."
            ),
            search_aliases=found_by(
                "compare, difference, flip, ssim, psnr, ssimulacra2",
                "对比, 比较, 差异, 画质, 麦橘 超然",
            ),
            inputs=[
                io.Image.Input(
                    "reference", tooltip="What it is compared with, such as one in bfloat16."
                ),
                io.Image.Input(
                    "image",
                    tooltip="Of the same size. One by one where both have several, or all with "
                    "the one reference.",
                ),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo, io.Hidden.prompt],
            outputs=[
                io.Image.Output(
                    display_name="difference",
                    tooltip="FLIP's map of each pair: black where nothing is seen, then violet, "
                    "orange and white.",
                ),
                io.String.Output(display_name="numbers", tooltip="The same text as on the node."),
            ],
            is_output_node=True,
        )

    @classmethod
    @checked
    def execute(cls, reference: "Tensor", image: "Tensor") -> io.NodeOutput:
        import torch

        from ..lab.picture_metrics import compare_pictures, in_colour
        from ..lab.report_text import difference_in_words, mean_in_words

        found = []
        for ours, theirs in _pairs(reference, image):
            host.check_cancelled()
            found.append(compare_pictures(_pixels(ours), _pixels(theirs)))
        lines = [difference_in_words(each) for each in found]
        if len(found) > 1:
            lines = [mean_in_words(found), *(f"{n}: {line}" for n, line in enumerate(lines, 1))]
        text = "\n".join(lines)
        log.info("%s", text)
        maps = [torch.from_numpy(in_colour(each.error_map)) for each in found]
        difference = torch.stack(maps).float() / 255
        shown = host.with_pictures(cls, host.node_text(lines), difference)
        return io.NodeOutput(difference, text, ui=shown)


def _pairs(reference: "Tensor", image: "Tensor") -> "list[tuple[Tensor, Tensor]]":
    if len(reference) not in (1, len(image)):
        raise MajicFluxError(
            say(
                "{count} pictures cannot be compared with {references} references: give one, or as "
                "many.",
                count=len(image),
                references=len(reference),
            )
        )
    return [(reference[n % len(reference)], image[n]) for n in range(len(image))]


def _pixels(image: "Tensor") -> "np.ndarray":
    """As a PNG of it has them: uint8 RGB [height, width, 3]. image: in 0..1."""
    return (image[..., :3].float().cpu() * 255).clip(0, 255).byte().numpy()
