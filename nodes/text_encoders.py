"""The node that loads CLIP-L and T5."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..downloads import model_folders
from ..engine.torch_state import torch
from ..host import current as host
from ..loaders.convert import Progress
from ..loaders.text_encoders import inspect_clip, inspect_t5, load_text_encoders
from .arguments import checked
from .model_files import options, shared
from .sockets import CATEGORY, Node, TextEncodersHandle, found_by, io

if TYPE_CHECKING:
    from ..engine.flux.text_encoders import TextEncoders

FOLDER = "text_encoders"


class TextEncodersNode(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MajicFluxTextEncoders",
            display_name="bf16 text encoders",
            category=CATEGORY,
            description=(
                "Loads the two text encoders of Flux.1, CLIP-L and T5-XXL, into CPU memory."
            ),
            search_aliases=found_by(
                "clip, t5, t5xxl, dual clip loader, text encoder, prompt",
                "文本编码器, 提示词, 加载CLIP, 麦橘 超然",
            ),
            inputs=[
                io.Combo.Input(
                    "clip_l",
                    tooltip="CLIP-L in models/text_encoders, such as clip_l.safetensors.",
                    **options(FOLDER, "clip_l", "clip"),
                ),
                io.Combo.Input(
                    "t5",
                    tooltip="T5-XXL in models/text_encoders: one file such as "
                    "t5xxl_fp16.safetensors, or the folder text_encoder_2 of FLUX.1-dev.",
                    **options(FOLDER, "t5xxl", "t5", "text_encoder_2"),
                ),
                io.Combo.Input(
                    "precision",
                    options=["bfloat16", "float32"],
                    default="bfloat16",
                    tooltip="bfloat16: 10 GB of CPU memory, what Flux.1 was trained with. float32: "
                    "19 GB, a reference for comparisons.",
                ),
                io.Boolean.Input(
                    "keep_prepared",
                    default=True,
                    optional=True,
                    tooltip="Keep the encoders in models/majicflux_prepared (10 GB of disk in "
                    "bfloat16) and map them from there, so that they take no memory of their own "
                    "and the next load takes a second. Off: they stay in memory.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[
                TextEncodersHandle.Output(
                    display_name="text_encoders",
                    tooltip="Both encoders, for the CPU-offload pipeline.",
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, clip_l: str, t5: str) -> bool | str:
        chosen = ((clip_l, inspect_clip), (t5, inspect_t5))
        problems = (model_folders.problem(FOLDER, name, inspect) for name, inspect in chosen)
        return next(filter(None, problems), True)

    @classmethod
    def fingerprint_inputs(
        cls, clip_l: str, t5: str, precision: str, keep_prepared: bool = True
    ) -> Any:
        return [model_folders.fingerprint(FOLDER, name) for name in (clip_l, t5)]

    @classmethod
    @checked
    def execute(
        cls, clip_l: str, t5: str, precision: str, keep_prepared: bool = True
    ) -> io.NodeOutput:
        progress = host.loading_progress(cls.hidden.unique_id)
        prepared = host.prepared_folder() if keep_prepared else None
        clip, t5_path = (model_folders.resolve(FOLDER, name) for name in (clip_l, t5))

        def load() -> "TextEncoders":
            return _load(clip, t5_path, precision, progress, prepared)

        files = [*map(model_folders.state_of, (clip, t5_path))]
        encoders = shared(load, files, precision, keep_prepared)
        return io.NodeOutput(encoders, ui=host.node_text([encoders.weights.report]))


def _load(
    clip_path: Path, t5_path: Path, precision: str, progress: Progress, prepared: Path | None
) -> "TextEncoders":
    from ..engine.flux.text_encoders import TextEncoders
    from ..loaders.tokenizers import CLIP_TOKENIZER, T5_TOKENIZER, load_tokenizer

    tokenizers = [
        load_tokenizer(kind, path, vocabulary, host.bundled_folder(*kind.bundled))
        for kind, path, vocabulary in (
            (CLIP_TOKENIZER, clip_path, inspect_clip(clip_path)[0].vocabulary),
            (T5_TOKENIZER, t5_path, inspect_t5(t5_path)[0].vocabulary),
        )
    ]
    dtype = getattr(torch, precision)
    weights = load_text_encoders(clip_path, t5_path, dtype, progress, prepared)
    patcher = host.make_patcher(weights, host.text_encoder_device(), "MajicFluxTextEncoders")
    return TextEncoders(weights, patcher, *tokenizers)
