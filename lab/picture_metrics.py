"""How far two pictures are apart, as libraries tell that were made for it."""

from dataclasses import dataclass
from functools import cache
from importlib import import_module, metadata, util
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..messages import MajicFluxError, say

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

PACKAGES = {"flip_evaluator": "flip-evaluator", "ssimulacra2": "ssimulacra2", "piq": "piq"}
LPIPS_BACKBONE = "alexnet-owt-7be5be79.pth"  # as torchvision names it in torch's cache
SMALLEST_SIDE = 16  # pixels; SSIM's window has 11
SMALLEST_SIDE_OF_SSIMULACRA2 = 256  # below, it lacks some of its six scales, and means little
LAYOUT_SIDE = 32  # pixels of the longer side, when only the composition is to be left
LAYOUT_WINDOW = 7
CHANGED_BELOW = 0.9  # of `layout`: the composition is another one; see docs/compare.md


class MeasuringError(MajicFluxError):
    """Two pictures cannot be compared."""


@dataclass(frozen=True)
class Metric:
    """name: as it is shown; best: of identical pictures; digits: after the point; unit: or ""."""

    name: str
    best: float
    digits: int
    unit: str = ""

    @property
    def rises(self) -> bool:
        """Whether more is better."""
        return self.best > 0

    def badness(self, value: float) -> float:
        return -value if self.rises else value

    def shown(self, value: float) -> str:
        return f"{value:.{self.digits}f}{self.unit and ' ' + self.unit}"


# In the order in which they are shown; latents are measured by `comparison`.
METRICS = {
    "flip": Metric("FLIP", 0.0, 4),
    "ssimulacra2": Metric("SSIMULACRA2", 100.0, 1),
    "ssim": Metric("SSIM", 1.0, 4),
    "psnr": Metric("PSNR", 80.0, 1, "dB"),
    "lpips": Metric("LPIPS", 0.0, 4),
    "layout": Metric("layout SSIM", 1.0, 3),
    "latents": Metric("latents L2", 0.0, 4),
}


@dataclass(frozen=True)
class PictureDifference:
    """values: by the keys of METRICS, those that could be measured; error_map: FLIP's, float32
    [height, width] in 0..1."""

    values: dict[str, float]
    error_map: "np.ndarray"

    @property
    def changed(self) -> bool:
        """Whether the composition is another one."""
        return composition_changed(self.values)


def composition_changed(values: dict[str, float]) -> bool:
    return values["layout"] < CHANGED_BELOW


def compare_pictures(reference: "np.ndarray", picture: "np.ndarray") -> PictureDifference:
    """Both uint8 RGB [height, width, 3]. Raises MeasuringError."""
    require_packages()
    if reference.shape != picture.shape:
        sizes = (f"{p.shape[1]}x{p.shape[0]}" for p in (reference, picture))
        raise MeasuringError(
            say(
                "Pictures of one size are compared, not of {first} and {second}.",
                **dict(zip(("first", "second"), sizes, strict=True)),
            )
        )
    smallest = min(reference.shape[:2])
    if smallest < SMALLEST_SIDE:
        raise MeasuringError(
            say(
                "A picture with a side of {side} pixels is too small to be compared; {least} are "
                "needed.",
                side=smallest,
                least=SMALLEST_SIDE,
            )
        )
    flip, error_map = _flip(reference, picture)
    values = {"flip": flip, **_structure(reference, picture)}
    if smallest >= SMALLEST_SIDE_OF_SSIMULACRA2:
        values["ssimulacra2"] = _ssimulacra2(reference, picture)
    if (network := _lpips_network()) is not None:
        values["lpips"] = _lpips(network, reference, picture)
    return PictureDifference({n: values[n] for n in METRICS if n in values}, error_map)


def require_packages() -> None:
    """Raises MeasuringError where one is absent."""
    absent = [package for name, package in PACKAGES.items() if util.find_spec(name) is None]
    if absent:
        raise MeasuringError(
            say(
                "Pictures are compared by packages that are not installed. Install them with: "
                "{command}",
                command=f"python -m pip install {' '.join(absent)}",
            )
        )


def package_versions() -> dict[str, str]:
    """Of those that measure, by which a value can be told from that of another version."""
    packages = [*PACKAGES.values(), *(["lpips"] if _lpips_network() is not None else [])]
    return {package: metadata.version(package) for package in packages}


def in_colour(error_map: "np.ndarray") -> "np.ndarray":
    """FLIP's map, black over violet and orange to white: uint8 RGB [height, width, 3]."""
    import numpy as np

    levels = np.asarray(_magma(), np.uint8)
    return levels[(error_map * 255).round().clip(0, 255).astype(np.uint8)]


def _flip(reference: "np.ndarray", picture: "np.ndarray") -> tuple[float, "np.ndarray"]:
    import numpy as np
    from flip_evaluator import evaluate

    ours, theirs = (np.ascontiguousarray(p, np.float32) / 255 for p in (reference, picture))
    error_map, mean, _ = evaluate(ours, theirs, "LDR", applyMagma=False)
    return float(mean), np.asarray(error_map)[..., 0]


def _structure(reference: "np.ndarray", picture: "np.ndarray") -> dict[str, float]:
    """SSIM, PSNR, and the SSIM of what is left of a picture in few pixels."""
    import piq

    both = _tensor(reference), _tensor(picture)
    small = _tensor(_layout(reference)), _tensor(_layout(picture))
    found: dict[str, Any] = {
        "ssim": piq.ssim(*both),
        "psnr": piq.psnr(*both),
        "layout": piq.ssim(*small, kernel_size=LAYOUT_WINDOW),
    }
    return {metric: value.item() for metric, value in found.items()}


def _ssimulacra2(reference: "np.ndarray", picture: "np.ndarray") -> float:
    """It reads files only, so it is given some in memory."""
    from PIL import Image
    from ssimulacra2 import compute_ssimulacra2

    files = BytesIO(), BytesIO()
    for file, pixels in zip(files, (reference, picture), strict=True):
        Image.fromarray(pixels).save(file, "PPM")
        file.seek(0)
    return float(compute_ssimulacra2(*files))


def _lpips(network: Any, reference: "np.ndarray", picture: "np.ndarray") -> float:
    import torch

    with torch.inference_mode():
        return network(_tensor(reference), _tensor(picture), normalize=True).item()


@cache
def _lpips_network() -> Any:
    """None where the package or its backbone is absent: nothing is downloaded."""
    import torch

    backbone = Path(torch.hub.get_dir(), "checkpoints", LPIPS_BACKBONE)
    if util.find_spec("lpips") is None or not backbone.is_file():
        return None
    return import_module("lpips").LPIPS(net="alex", verbose=False)


def _tensor(picture: "np.ndarray") -> "Tensor":
    """float32 [1, channels, height, width] in 0..1."""
    import torch

    return torch.from_numpy(picture.copy()).movedim(-1, 0)[None].float() / 255


def _layout(picture: "np.ndarray") -> "np.ndarray":
    """Grey, averaged down to LAYOUT_SIDE: uint8 [height, width, 1]."""
    import numpy as np
    from PIL import Image

    grey = Image.fromarray(picture).convert("L")
    scale = LAYOUT_SIDE / max(grey.size)
    size = [max(LAYOUT_WINDOW, round(side * scale)) for side in grey.size]
    return np.asarray(grey.resize((size[0], size[1]), Image.Resampling.BOX))[..., None]


@cache
def _magma() -> "list[tuple[int, int, int]]":
    """256 colours: black, violet, orange, pale yellow, evenly brighter."""
    stops = ((0, 0, 4), (81, 18, 124), (183, 55, 121), (252, 137, 97), (252, 253, 191))
    colours = []
    for level in range(256):
        at, part = divmod(level * (len(stops) - 1) / 255, 1)
        low, high = stops[int(at)], stops[min(int(at) + 1, len(stops) - 1)]
        red, green, blue = (round(a + (b - a) * part) for a, b in zip(low, high, strict=True))
        colours.append((red, green, blue))
    return colours
