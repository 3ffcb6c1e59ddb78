"""The node that shows a control net a picture."""

from typing import TYPE_CHECKING

from ..downloads import model_folders
from ..engine.flux.geometry import ControlGeometry
from ..engine.quant.formats import PRECISIONS, Precision
from ..host import current as host
from ..loaders.controlnet import inspect_control_net, load_control_net
from ..loaders.convert import Progress
from ..messages import MajicFluxError, say
from .arguments import checked
from .model_files import FileNode, combo, shared
from .sockets import CATEGORY, ControlHandle, found_by, io

if TYPE_CHECKING:
    from torch import Tensor

    from ..engine.flux.controlnet import Control, ControlNet

FOLDER = "controlnet"
# Of InstantX's and Shakker-Labs' Union and Union-Pro, by their numbers.
MODES = ["canny", "tile", "depth", "blur", "pose", "gray", "low quality"]


class ControlNetNode(FileNode):
    folder, inspect = FOLDER, staticmethod(inspect_control_net)

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MajicFluxControlNet",
            display_name="ControlNet",
            category=CATEGORY,
            description="Steers what is painted by a picture: edges, a depth map, a pose, a "
            "blurred or small picture, or what is to stay around a mask. The control net runs "
            "inside the same VRAM budget as the transformer. Chain several.",
            search_aliases=found_by(
                "controlnet, control net, load controlnet, apply controlnet, union, canny",
                "depth, pose, tile",
                "控制网, 加载ControlNet, 线稿, 姿态, 麦橘 超然",
            ),
            inputs=[
                io.Combo.Input(
                    "file",
                    tooltip="A ControlNet for Flux.1 in models/controlnet: Union-Pro 2.0, "
                    "Union-Pro, Union, alimama's inpainting, jasperai's, InstantX's canny.",
                    **combo(model_folders.choices(FOLDER)),
                ),
                io.Combo.Input(
                    "weight_precision",
                    options=list(PRECISIONS),
                    default="float8_e4m3fn",
                    tooltip="As of the DiT loader. Choose the same as there: only then are both "
                    "multiplied in 8 bits.",
                ),
                io.Image.Input(
                    "image",
                    tooltip="What the net is shown, such as the edges from ComfyUI's Canny; "
                    "preprocessors for depth and pose are other packs'. Scaled to the size that is "
                    "painted, its middle cut out.",
                ),
                io.Float.Input(
                    "strength",
                    default=0.8,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    tooltip="How much the net is heeded. 0: not at all. 0.6 to 0.9 is usual.",
                ),
                io.Float.Input(
                    "start",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="From which share of the denoising on the net acts, as in ComfyUI.",
                ),
                io.Float.Input(
                    "end",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Up to which share. 0.6 to 0.8 leaves the details to the transformer, "
                    "and the steps after it are as fast as without a net.",
                ),
                io.Combo.Input(
                    "mode",
                    options=MODES,
                    default=MODES[0],
                    optional=True,
                    tooltip="What the image is, for Union and Union-Pro. Union-Pro 2.0 and nets of "
                    "one kind see it by themselves.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="White: what an inpainting net is to paint anew. Other nets ignore it.",
                ),
                io.Boolean.Input(
                    "keep_prepared",
                    default=True,
                    optional=True,
                    advanced=True,
                    tooltip="As of the DiT loader: 2 to 5 GB of disk, and loading takes a second.",
                ),
                ControlHandle.Input(
                    "control", optional=True, tooltip="From another ControlNet, which acts too."
                ),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[
                ControlHandle.Output(
                    display_name="control", tooltip="For sample, denoise or another ControlNet."
                )
            ],
        )

    @classmethod
    @checked
    def execute(
        cls,
        file: str,
        weight_precision: str,
        image: "Tensor",
        strength: float,
        start: float,
        end: float,
        mode: str = MODES[0],
        mask: "Tensor | None" = None,
        keep_prepared: bool = True,
        control: "tuple[Control, ...]" = (),
    ) -> io.NodeOutput:
        from ..engine.flux.controlnet import Control
        from ..host import native

        picture = native.from_whole_image(image)
        painted = None if mask is None else native.from_mask(mask, None)
        progress = host.loading_progress(cls.hidden.unique_id)
        net = _loaded(file, PRECISIONS[weight_precision], keep_prepared, progress)
        said = _said(net.geometry, mode, painted, start, end)
        number = MODES.index(mode)
        added = Control(net, picture, painted, number, strength, start, end)
        return io.NodeOutput((*control, added), ui=host.node_text([net.weights.report, *said]))


def _loaded(
    file: str, precision: Precision, keep_prepared: bool, progress: Progress
) -> "ControlNet":
    """The control net of this file, which is read once for all nodes that have it."""
    from ..engine.flux.controlnet import ControlNet

    path = model_folders.resolve(FOLDER, file)
    prepared = host.prepared_folder() if keep_prepared else None

    def load() -> ControlNet:
        device = host.compute_device()
        weights, geometry = load_control_net(path, precision, progress, prepared, device)
        patcher = host.make_patcher(weights, device, "MajicFluxControlNet")
        return ControlNet(weights, patcher, geometry, precision)

    return shared(load, model_folders.state_of(path), precision, prepared)


def _said(
    geometry: ControlGeometry, mode: str, painted: "Tensor | None", start: float, end: float
) -> list[str]:
    """What the net makes of its inputs. Raises MajicFluxError for a mode that it has not."""
    if geometry.modes and MODES.index(mode) >= geometry.modes:
        raise MajicFluxError(
            "This ControlNet has {count} modes, and {mode} is not among them. Choose another mode.",
            count=geometry.modes,
            mode=mode,
        )
    lines = [say("mode: {mode}", mode=mode)] if geometry.modes else []
    if geometry.inpaints and (painted is None or not painted.any()):
        lines.append(
            say("An inpainting net without a mask, or with an empty one, leaves all as it is.")
        )
    if painted is not None and not geometry.inpaints:
        lines.append(say("The mask is not used: this is no inpainting net."))
    if start > end:
        lines.append(say("The net never acts, because start lies behind end."))
    return lines
