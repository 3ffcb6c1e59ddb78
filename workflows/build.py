"""The templates, built from the node definitions: `python workflows/build.py` writes them.

Nodes stand in columns, one below the other. Heights are those of ComfyUI's canvas, with room for
what a node reports or shows when it runs.
"""

import json
import re
import uuid
from pathlib import Path
from typing import Any

from majicflux.downloads.catalogue import (
    AE,
    CLIP_L,
    DEPTH_LORA,
    FILL,
    GROUPS,
    HUB_NAMES,
    HUGGINGFACE,
    KNOWN_FILES,
    KONTEXT_FLOAT8,
    MAJICFLUS_FLOAT8,
    REDUX,
    SIGCLIP,
    T5_XXL,
    TRANSLATOR,
    TURBO,
    UNION_PRO_2,
    KnownFile,
)
from majicflux.host.canvas import WIDGETS, to_graph
from majicflux.host.image_nodes import image_nodes
from majicflux.host.schema import Schema, Socket, io
from majicflux.nodes import NODES
from majicflux.nodes.sample import CUSTOM

FOLDER = Path(__file__).resolve().parent
COMFYUI_VERSION = "0.33.0"
# In Nodes 2.0, which are higher than those of the classic canvas.
LINE, WIDGET, TEXT_BOX, TITLE, GAP = 22, 30, 100, 40, 30
WIDTHS = (330, 400, 430, 360)
NOTE = 330  # height, in a column of that width
# The scale that a template opens with: text is legible from 0.58 on. Offset: of the first node from
# the canvas's own bars.
SCALE, OFFSET = 0.66, (110, 190)
# What a node needs beyond its sockets and widgets: for its report, its picture, Nodes 2.0's badge.
ROOM = {
    "MajicFluxDiTLoader": 120,
    "MajicFluxLoRA": 120,
    "MajicFluxControlNet": 120,
    "MajicFluxTextEncoders": 84,
    "MajicFluxVAELoader": 84,
    "MajicFluxPipeline": 200,
    "MajicFluxEncodePrompt": 130,
    "MajicFluxTranslate": 100,
    "MajicFluxSample": 52,
    "MajicFluxDenoise": 100,
    "LoadImage": 280,
}
PANEL = "majicflux_text"  # where web/majicflux.js shows what a node says
# Folded away, in a template as it opens.
FOLDED = ("width", "height", "negative_prompt", "keep_unmasked")

Source = tuple[int, int]  # a node's id and the number of its output


def _stock(name: str, title: str, output: Socket, *inputs: Socket) -> Schema:
    return Schema(name, title, "", list(inputs), [output])


def schemas() -> dict[str, Schema]:
    """The nodes of the templates by type: this pack's, and ComfyUI's own as far as needed."""
    integer, text, combo = io.Int, io.String, io.Combo
    vae, clip, style = io.Custom("VAE"), io.Custom("CLIP"), io.Custom("STYLE_MODEL")
    vision, seen = io.Custom("CLIP_VISION"), io.Custom("CLIP_VISION_OUTPUT")
    stock = [
        _stock("DualCLIPLoader", "Load CLIP (Dual)", clip.Output(), combo.Input("clip_name1"),
               combo.Input("clip_name2"), combo.Input("type"), combo.Input("device")),
        _stock("CLIPTextEncode", "CLIP Text Encode (Prompt)", io.Conditioning.Output(),
               text.Input("text", multiline=True), clip.Input("clip")),
        _stock("VAELoader", "Load VAE", vae.Output(), combo.Input("vae_name")),
        _stock("VAEDecode", "VAE Decode", io.Image.Output(), io.Latent.Input("samples"),
               vae.Input("vae")),
        _stock("EmptySD3LatentImage", "EmptySD3LatentImage", io.Latent.Output(),
               *(integer.Input(name) for name in ("width", "height", "batch_size"))),
        _stock("ImageGrid", "Make Image Grid", io.Image.Output(id="images"),
               io.Image.Input("images"),
               *(integer.Input(n) for n in ("columns", "cell_width", "cell_height", "padding"))),
        Schema("ImagePadForOutpaint", "Pad Image for Outpainting", "", [
            io.Image.Input("image"),
            *(integer.Input(name) for name in ("left", "top", "right", "bottom", "feathering")),
        ], [io.Image.Output(), io.Mask.Output()]),
        _stock("CLIPVisionLoader", "Load CLIP Vision", vision.Output(), combo.Input("clip_name")),
        _stock("StyleModelLoader", "Load Style Model", style.Output(),
               combo.Input("style_model_name")),
        _stock("CLIPVisionEncode", "CLIP Vision Encode", seen.Output(),
               vision.Input("clip_vision"), io.Image.Input("image"), combo.Input("crop")),
        _stock("StyleModelApply", "Apply Style Model", io.Conditioning.Output(),
               io.Conditioning.Input("conditioning"), style.Input("style_model"),
               seen.Input("clip_vision_output"), io.Float.Input("strength"),
               combo.Input("strength_type")),
        _stock("Canny", "Canny", io.Image.Output(), io.Image.Input("image"),
               *(io.Float.Input(name) for name in ("low_threshold", "high_threshold"))),
        _stock("PrimitiveInt", "Int", integer.Output(),
               integer.Input("value", control_after_generate=True)),
        _stock("PrimitiveStringMultiline", "Text (Multiline)", text.Output(),
               text.Input("value", multiline=True)),
    ]  # fmt: skip
    standing_in = image_nodes(FOLDER, FOLDER, {}).values()
    own = [node.define_schema() for node in (*NODES, *standing_in)]
    return {schema.node_id: schema for schema in (*own, *stock)}


class Template:
    def __init__(self, name: str, widths: tuple[int, ...] = WIDTHS):
        self.name = name
        self.nodes: list[dict[str, Any]] = []
        self.links: list[list[Any]] = []
        self.widths = widths
        self.bottoms = [0] * len(widths)
        self.schemas = schemas()
        self.app_inputs: list[list[Any]] = []

    def add(
        self, node_type: str, column: int, title: str = "", tall: int = 0, **inputs: Any
    ) -> int:
        """Put a node at the foot of a column; returns its id.

        inputs: a link as a Source, or a widget's value where it is not the default.
        tall: the height, where it is not that of `_height`.
        """
        schema = self.schemas[node_type]
        sockets = [socket for socket in schema.inputs if socket.io_type not in WIDGETS]
        widgets = [socket for socket in schema.inputs if socket.io_type in WIDGETS]
        node = self._place(node_type, column, tall or _height(schema))
        values: list[Any] = []
        models = []
        for slot, socket in enumerate([*sockets, *widgets]):
            entry: dict[str, Any] = {"name": socket.id, "type": socket.io_type, "link": None}
            if socket.optional:
                entry["shape"] = 7
            given = inputs.pop(socket.id, None)
            if isinstance(given, tuple):
                entry["link"] = self._link(given, node["id"], slot, socket.io_type)
                given = None
            node["inputs"].append(entry)
            if socket.io_type not in WIDGETS:
                continue
            entry["widget"] = {"name": socket.id}
            if title and node_type.startswith("Primitive"):
                entry["label"] = title  # else the app view calls every one of them "value"
            values.append(socket.options.get("default", "") if given is None else given)
            models += _models(values[-1])
            if socket.options.get("control_after_generate"):
                values.append("randomize")
        if inputs:
            raise ValueError(f"{node_type} has no {', '.join(inputs)}")
        node["outputs"] = [
            {"name": s.options.get("display_name", s.id), "type": s.io_type, "links": []}
            for s in schema.outputs
        ]
        ours = node_type.startswith("MajicFlux")
        properties: dict[str, Any] = {
            "cnr_id": "majicflux" if ours else "comfy-core",
            "ver": _version() if ours else COMFYUI_VERSION,
            "Node name for S&R": node_type,
        }
        if models:
            properties["models"] = models
        node["properties"] = properties
        if title:
            node["title"] = title
        node["widgets_values"] = values
        return node["id"]

    def note(self, column: int, text: str) -> None:
        node = self._place("MarkdownNote", column, NOTE)
        node["properties"] = {"Node name for S&R": "MarkdownNote"}
        node["title"] = "说明 / Note"
        node["widgets_values"] = [text]

    def level(self, *columns: int) -> None:
        """What comes next in these columns begins at the same height."""
        lowest = max(self.bottoms[column] for column in columns)
        for column in columns:
            self.bottoms[column] = lowest

    def app(self, node: int, *names: str) -> None:
        """Show these inputs of a node in the app view."""
        self.app_inputs += [[node, name] for name in names]

    def canvas(self) -> dict[str, Any]:
        """The workflow in the canvas's format 0.4."""
        saves = [node["id"] for node in self.nodes if node["type"] == "SaveImage"]
        return {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"majicflux/{self.name}")),
            "revision": 0,
            "last_node_id": len(self.nodes),
            "last_link_id": len(self.links),
            "nodes": self.nodes,
            "links": self.links,
            "groups": [],
            "config": {},
            "extra": {
                "ds": {"scale": SCALE, "offset": list(OFFSET)},
                "linearData": {"inputs": self.app_inputs, "outputs": saves},
                "linearMode": False,
            },
            "version": 0.4,
        }

    def _place(self, node_type: str, column: int, height: int) -> dict[str, Any]:
        left = sum(self.widths[:column]) + 2 * GAP * column
        node = {
            "id": len(self.nodes) + 1,
            "type": node_type,
            "pos": [left, self.bottoms[column]],
            "size": [self.widths[column], height],
            "flags": {},
            "order": len(self.nodes),
            "mode": 0,
            "inputs": [],
            "outputs": [],
        }
        self.bottoms[column] += height + TITLE + GAP
        self.nodes.append(node)
        return node

    def _link(self, source: Source, target: int, slot: int, io_type: str) -> int:
        output = self.nodes[source[0] - 1]["outputs"][source[1]]
        if output["type"] != io_type:
            raise ValueError(f"{source} is {output['type']}, not {io_type}")
        number = len(self.links) + 1
        output["links"].append(number)
        self.links.append([number, *source, target, slot, io_type])
        return number


def _height(schema: Schema) -> int:
    """Of a node on the canvas, without its title."""
    sockets = sum(socket.io_type not in WIDGETS for socket in schema.inputs)
    height = LINE * max(sockets, len(schema.outputs), 1) + 6
    widgets = [socket for socket in schema.inputs if socket.io_type in WIDGETS]
    for socket in widgets:
        if socket.id in FOLDED or socket.options.get("advanced"):
            continue
        extra = bool(socket.options.get("control_after_generate"))
        height += TEXT_BOX if socket.options.get("multiline") else WIDGET * (1 + extra)
    return height + (8 if widgets else 0) + ROOM.get(schema.node_id, 0)


def _models(value: Any) -> list[dict[str, str]]:
    """What the missing-model dialog needs to download a file, which it does from Hugging Face."""
    for file in KNOWN_FILES:
        if file.name == value:
            place = file.place(HUGGINGFACE)
            assert place is not None, "the button fetches from Hugging Face"
            url = f"https://huggingface.co/{place.repository}/resolve/{place.revision}/{place.path}"
            return [{"name": file.name, "url": url, "directory": file.folder}]
    return []


def _version() -> str:
    project = (FOLDER.parent / "pyproject.toml").read_text(encoding="utf-8")
    return re.findall(r'^version = "(.*)"', project, re.MULTILINE)[0]


def _row(file: KnownFile) -> str:
    size = (file.size or file.least_size) / 1e9
    links = ", ".join(f"[{HUB_NAMES[place.hub]}]({place.page})" for place in file.places)
    return f"- **{file.name}**, {size:.1f} GB, {links} → `models/{file.folder}`"


def _note(
    title: str,
    chinese: str,
    english: str,
    prompt: str = "",
    *more: KnownFile,
    model: str = "majicflus",
) -> str:
    """prompt: the Chinese one that the template's says in English; model: the group of its
    transformer, of whose files one is enough; more: files besides those of all templates."""
    rows = "\n".join(map(_row, (*GROUPS[model], *GROUPS["flux-dev-parts"], *more)))
    groups = ["all"] if model == "majicflus" else [model, "flux-dev-parts"]
    groups += [name for name in GROUPS if more and GROUPS[name] == more]
    download = "\n\n".join(f"`python custom_nodes/majicflux download {group}`" for group in groups)
    several = len(GROUPS[model]) > 1
    either = several * "前两个文件任选其一，有哪个就用哪个。"
    either_too = (
        several * "Either of the first two will do; the loader takes the one that is there. "
    )
    why = ""
    if prompt:
        why = (
            f"提示词请用英文，模型读不了中文。原文：{prompt}\n\n"
            "要用中文写，在它前面接“翻译提示词”节点。"
            "To write in Chinese, connect translate prompt before it.\n\n"
        )
    return f"""## {title}

{chinese}

{english}

{why}## 模型文件 / Model files

{rows}

{either}放好后按 R。连不上 Hugging Face 时，用下面的命令下载。

{either_too}Then press R. Where Hugging Face cannot be reached, use these commands.

在 ComfyUI 的文件夹里运行 / Run in ComfyUI's folder:

{download}
"""


CITY = (
    "A futuristic city street in cyberpunk style, a rainy night, blue and pink neon lights "
    "reflected on the wet ground, flying cars overhead, high-tech atmosphere, rich detail, a "
    "cinematic wide shot."
)
CITY_IN_CHINESE = (
    "赛博朋克风格的未来城市街道,雨夜,蓝色和粉色的霓虹灯光反射在湿漉漉的地面上,头顶有飞行汽车,"
    "高科技氛围,细节丰富,电影感宽幅画面。"
)
WATERCOLOR = "A watercolor painting, soft colors, the texture of paper, a hand-drawn illustration."
EDIT = "Turn this picture into a watercolor painting. Keep everything where it is."
AROUND = "The same scene goes on to both sides, natural light."
ROOM_BY_DEPTH = "A cosy wooden cabin in a snowy forest, warm light in the windows, dusk."
CAT = "A cat with a red scarf, soft natural light, a photograph."


def _dit(template: Template, column: int, **values: Any) -> Source:
    values = {"file": MAJICFLUS_FLOAT8.name, **values}
    return template.add("MajicFluxDiTLoader", column, **values), 0


def _encoders_and_vae(template: Template) -> dict[str, Any]:
    encoders = template.add("MajicFluxTextEncoders", 0, clip_l=CLIP_L.name, t5=T5_XXL.name)
    vae = template.add("MajicFluxVAELoader", 0, file=AE.name)
    return {"text_encoders": (encoders, 0), "vae": (vae, 0)}


def _pipeline(template: Template, file: KnownFile = MAJICFLUS_FLOAT8, **values: Any) -> Source:
    """The three loaders in the first column, the pipeline in the second."""
    dit = _dit(template, 0, file=file.name)
    parts = _encoders_and_vae(template)
    return template.add("MajicFluxPipeline", 1, dit=dit, **parts, **values), 0


def _save(template: Template, column: int, images: Source, tall: int = 360, **values: Any) -> None:
    values = {"filename_prefix": "MajicFlux", **values}
    template.add("SaveImage", column, tall=tall, images=images, **values)


def _sample(template: Template, column: int, **values: Any) -> int:
    sample = template.add("MajicFluxSample", column, **{"size": "1024x1024 (1:1)", **values})
    shown = ("prompt", "size", "seed", "steps", "guidance", "strength", "batch_size")
    hidden = {"size"} if "image" in values else {"strength"}
    hidden |= {"prompt"} if "positive" in values else set()
    template.app(sample, *(name for name in shown if name not in hidden))
    return sample


def text_to_image(name: str = "text_to_image", budget: float = 0.0, note: str = "") -> Template:
    template = Template(name)
    pipeline = _pipeline(template, vram_budget_gb=budget)
    sample = _sample(template, 2, pipeline=pipeline, prompt=CITY)
    _save(template, 3, (sample, 0))
    template.note(1, note or _note(
        "文生图 / Text to image",
        "写好提示词，运行。显存预算 0 表示由 ComfyUI 决定；想少用一些，就填一个 GB 数。",
        "Write a prompt and run. A VRAM budget of 0 lets ComfyUI decide; type a number of GB to "
        "use less.",
        CITY_IN_CHINESE,
    ))  # fmt: skip
    return template


def text_to_image_6gb() -> Template:
    return text_to_image("text_to_image_6gb", 5.0, _note(
        "6 GB 显存文生图 / Text to image on 6 GB",
        "权重和计算加在一起不超过 5 GB 显存，其余权重留在内存里，逐块搬到显卡上。"
        "6 GB 的卡上剩下的留给驱动（0.3 到 0.6 GB）和显示器。",
        "Weights and calculation together hold at most 5 GB of the card; the other weights stay "
        "in CPU memory and visit it block by block. What is left of 6 GB is for the driver (0.3 to "
        "0.6 GB) and a screen.",
        CITY_IN_CHINESE,
    ))  # fmt: skip


def text_to_image_lora() -> Template:
    template = Template("text_to_image_lora")
    dit = _dit(template, 0)
    parts = _encoders_and_vae(template)
    lora = template.add("MajicFluxLoRA", 1, dit=dit, file=TURBO.name)
    pipeline = template.add("MajicFluxPipeline", 1, dit=(lora, 0), **parts), 0
    sample = _sample(template, 2, pipeline=pipeline, prompt=CITY, steps=8)
    template.app(lora, "file", "strength")
    _save(template, 3, (sample, 0))
    template.note(3, _note(
        "用 LoRA 的文生图 / Text to image with a LoRA",
        "这个 LoRA 让 8 步顶 20 步。换成别的 LoRA 时把 steps 改回 20；"
        "要用多个，把 LoRA 节点一个接一个串起来。换强度不用重新加载。",
        "This LoRA makes 8 steps do for 20. With another one set steps to 20 again. For several, "
        "connect one LoRA node behind the other. A new strength loads nothing again.",
        CITY_IN_CHINESE,
        TURBO,
    ))  # fmt: skip
    return template


def text_to_image_translated() -> Template:
    template = Template("text_to_image_translated")
    pipeline = _pipeline(template)
    english = template.add("MajicFluxTranslate", 1, prompt=CITY_IN_CHINESE, model=TRANSLATOR)
    sample = template.add(
        "MajicFluxSample", 2, pipeline=pipeline, prompt=(english, 0), size="1024x1024 (1:1)"
    )
    template.app(english, "prompt", PANEL, "model")
    template.app(sample, "size", "seed", "steps", "guidance", "batch_size")
    _save(template, 3, (sample, 0))
    template.note(3, _note(
        "中文提示词文生图 / Text to image from a Chinese prompt",
        "在“翻译提示词”里写中文，它在本机译成英文再交给麦橘采样，节点上显示英文。引号里的文字、"
        "权重和英文保持原样。翻译模型用 `python custom_nodes/majicflux download translator` "
        "下载；没有它时提示词仍是中文，画面不太会听它的。",
        "Write Chinese into translate prompt: it makes English of it on this machine for sample, "
        "and shows it. Quoted text, weights and English stay as they are. Its model is fetched by "
        "`python custom_nodes/majicflux download translator`; without it the prompt stays in "
        "Chinese, and the picture will follow it poorly.",
    ))  # fmt: skip
    return template


def image_to_image() -> Template:
    template = Template("image_to_image")
    pipeline = _pipeline(template)
    picture = template.add("LoadImage", 1, image="example.png")
    template.app(picture, "image")
    sample = _sample(
        template, 2, pipeline=pipeline, image=(picture, 0), strength=0.7, prompt=WATERCOLOR
    )
    _save(template, 3, (sample, 0))
    template.note(3, _note(
        "图生图 / Image to image",
        "选一张图片，写明要画成什么。strength 越大改得越多：1 完全重画，0.3 只改细节。"
        "结果和原图一样大，不是 16 的倍数的边会裁掉一点。",
        "Choose a picture and say what to make of it. A larger strength changes more: 1 paints "
        "everything anew, 0.3 only details. The result has the picture's size; sides that are no "
        "multiple of 16 lose their edges.",
    ))  # fmt: skip
    return template


def inpainting() -> Template:
    template = Template("inpainting")
    pipeline = _pipeline(template)
    picture = template.add("LoadImage", 1, image="example.png")
    template.app(picture, "image")
    sample = _sample(
        template, 2, pipeline=pipeline, image=(picture, 0), mask=(picture, 1), strength=0.9,
        prompt=CAT,
    )  # fmt: skip
    _save(template, 3, (sample, 0))
    template.note(3, _note(
        "局部重绘 / Inpainting",
        "右键点击载入图片的节点，打开遮罩编辑器 (MaskEditor)，涂出要重画的地方，保存后运行。"
        "没有遮罩就什么也不会改；遮罩之外的像素保持原样。",
        "Right-click Load Image, choose Open in MaskEditor, paint over what is to change, save "
        "and run. Without a mask nothing changes; pixels outside of it stay as they are.",
    ))  # fmt: skip
    return template


def kontext_edit() -> Template:
    template = Template("kontext_edit")
    pipeline = _pipeline(template, KONTEXT_FLOAT8)
    picture = template.add("LoadImage", 1, image="example.png")
    template.app(picture, "image")
    sample = _sample(
        template, 2, pipeline=pipeline, reference=(picture, 0), prompt=EDIT, guidance=2.5
    )
    _save(template, 3, (sample, 0))
    template.note(3, _note(
        "用 Kontext 修改图片 / Edit a picture with Kontext",
        "选一张图片，用英文写明改什么、保留什么。尺寸是结果的尺寸，一百万像素左右最好。"
        "几张图合成一个批次接到 reference，就能把它们放进同一个画面。",
        "Choose a picture and say what to change and what to keep. The size is that of the "
        "result; about a megapixel is best. Several pictures in a batch, connected to reference, "
        "are brought together.",
        model="kontext",
    ))  # fmt: skip
    return template


def fill_inpainting() -> Template:
    template = Template("fill_inpainting")
    pipeline = _pipeline(template, FILL)
    picture = template.add("LoadImage", 1, image="example.png")
    template.app(picture, "image")
    sample = _sample(
        template, 2, pipeline=pipeline, image=(picture, 0), mask=(picture, 1), prompt=CAT,
        guidance=30.0,
    )  # fmt: skip
    _save(template, 3, (sample, 0))
    template.note(3, _note(
        "用 Fill 局部重绘 / Inpainting with Fill",
        "右键点击载入图片的节点，打开遮罩编辑器 (MaskEditor)，涂出要重画的地方，保存后运行。"
        "Fill 看得见遮罩周围的画面，strength 用 1；guidance 用 30。遮罩之外的像素保持原样。",
        "Right-click Load Image, choose Open in MaskEditor, paint over what is to change, save "
        "and run. Fill sees what is around the mask, so strength stays 1; guidance is 30. Pixels "
        "outside of the mask stay as they are.",
        model="fill",
    ))  # fmt: skip
    return template


def fill_outpainting() -> Template:
    template = Template("fill_outpainting")
    pipeline = _pipeline(template, FILL)
    picture = template.add("LoadImage", 1, image="example.png")
    wider = template.add(
        "ImagePadForOutpaint", 1, image=(picture, 0), left=256, top=0, right=256, bottom=0,
        feathering=24,
    )  # fmt: skip
    template.app(picture, "image")
    template.app(wider, "left", "top", "right", "bottom")
    sample = _sample(
        template, 2, pipeline=pipeline, image=(wider, 0), mask=(wider, 1), prompt=AROUND,
        guidance=30.0,
    )  # fmt: skip
    _save(template, 3, (sample, 0))
    template.note(3, _note(
        "用 Fill 扩图 / Outpainting with Fill",
        "四个数是每一边加多少像素，用 8 的倍数。提示词写扩出来的部分要有什么；guidance 用 30。"
        "原来的画面保持不变，交界处按 feathering 过渡。",
        "Four numbers say how many pixels each side gets, in multiples of 8. The prompt says what "
        "is to be there; guidance is 30. The picture itself stays as it is and blends over the "
        "width of feathering.",
        model="fill",
    ))  # fmt: skip
    return template


def redux_variation() -> Template:
    template = Template("redux_variation", (*WIDTHS, 360))
    pipeline = _pipeline(template)
    prompt = template.add("MajicFluxEncodePrompt", 1, pipeline=pipeline, prompt="")
    picture = template.add("LoadImage", 1, image="example.png")
    vision = template.add("CLIPVisionLoader", 2, clip_name=SIGCLIP.name)
    style = template.add("StyleModelLoader", 2, style_model_name=REDUX.name)
    seen = template.add(
        "CLIPVisionEncode", 2, clip_vision=(vision, 0), image=(picture, 0), crop="center"
    )
    applied = template.add(
        "StyleModelApply", 2, conditioning=(prompt, 0), style_model=(style, 0),
        clip_vision_output=(seen, 0), strength=1.0, strength_type="multiply",
    )  # fmt: skip
    template.app(picture, "image")
    template.app(prompt, "prompt")
    sample = _sample(template, 3, pipeline=pipeline, positive=(applied, 0))
    _save(template, 4, (sample, 0))
    template.note(4, _note(
        "用 Redux 画出相似的图 / Variations of a picture with Redux",
        "选一张图片：Redux 把它变成提示词，画出内容和风格相近的新图。"
        "strength 小一些，英文提示词的作用就大一些；strength_type 只能用 multiply。",
        "Choose a picture: Redux makes a prompt of it, from which others of its kind are painted. "
        "With a lower strength a prompt in English counts more; strength_type must be multiply.",
        "", REDUX, SIGCLIP,
    ))  # fmt: skip
    return template


def depth_control_lora() -> Template:
    template = Template("depth_control_lora")
    dit = _dit(template, 0)
    parts = _encoders_and_vae(template)
    lora = template.add("MajicFluxLoRA", 1, dit=dit, file=DEPTH_LORA.name)
    pipeline = template.add("MajicFluxPipeline", 1, dit=(lora, 0), **parts), 0
    depth = template.add("LoadImage", 1, "深度图 / Depth map", image="example.png")
    template.app(depth, "image")
    sample = _sample(
        template, 2, pipeline=pipeline, reference=(depth, 0), prompt=ROOM_BY_DEPTH, guidance=10.0
    )
    template.app(lora, "strength")
    _save(template, 3, (sample, 0))
    template.note(3, _note(
        "按深度图来画 / Paint by a depth map",
        "选一张深度图：近处白，远处黑。照片的深度图由其他节点包的预处理节点生成，接到 reference。"
        "麦橘超然配上这个 LoRA 就按它的构图来画；strength 小一些更自由。",
        "Choose a depth map: near is white, far is black. Preprocessors of other packs make one of "
        "a photograph; connect it to reference. With this LoRA majicflus follows it; a lower "
        "strength leaves more freedom.",
        "", DEPTH_LORA,
    ))  # fmt: skip
    return template


def controlnet_union_canny() -> Template:
    template = Template("controlnet_union_canny")
    pipeline = _pipeline(template)
    picture = template.add("LoadImage", 1, image="example.png")
    template.app(picture, "image")
    edges = template.add(
        "Canny", 1, "轮廓 / Edges", image=(picture, 0), low_threshold=0.2, high_threshold=0.5
    )
    net = template.add(
        "MajicFluxControlNet", 1, file=UNION_PRO_2.name, image=(edges, 0), strength=0.7, end=0.8
    )
    sample = _sample(template, 2, pipeline=pipeline, control=(net, 0), prompt=CITY)
    template.app(net, "strength", "end")
    _save(template, 3, (sample, 0))
    template.note(3, _note(
        "按轮廓来画 / Paint along the edges",
        "选一张图，ComfyUI 的 Canny 找出它的轮廓，ControlNet 让画面照着画。strength 小、end 早，"
        "画面就更自由。深度图和姿势也可以接到 image，由别的节点包的预处理节点生成。",
        "Choose a picture: ComfyUI's Canny finds its edges, and the ControlNet has the new one "
        "follow them. A lower strength and an earlier end leave more freedom. Depth maps and poses "
        "from preprocessors of other packs go into image just as well.",
        CITY_IN_CHINESE, UNION_PRO_2,
    ))  # fmt: skip
    return template


def mixed_with_stock_nodes() -> Template:
    template = Template("mixed_with_stock_nodes")
    dit = _dit(template, 0)
    clip = template.add(
        "DualCLIPLoader", 0, clip_name1=CLIP_L.name, clip_name2=T5_XXL.name, type="flux",
        device="default",
    )  # fmt: skip
    vae = template.add("VAELoader", 0, vae_name=AE.name)
    pipeline = template.add("MajicFluxPipeline", 1, dit=dit), 0
    prompt = template.add("CLIPTextEncode", 1, tall=200, clip=(clip, 0), text=CITY)
    latent = template.add("EmptySD3LatentImage", 1, width=1024, height=1024, batch_size=1)
    denoise = template.add(
        "MajicFluxDenoise", 2, pipeline=pipeline, positive=(prompt, 0), latent=(latent, 0)
    )
    picture = template.add("VAEDecode", 2, samples=(denoise, 0), vae=(vae, 0))
    _save(template, 3, (picture, 0))
    template.app(prompt, "text")
    template.app(denoise, "seed", "steps", "guidance")
    template.app(latent, "width", "height")
    template.note(3, _note(
        "与 ComfyUI 自带节点混用 / With ComfyUI's own nodes",
        "CLIPTextEncode 编码提示词，VAEDecode 解码画面，去噪在流水线的显存预算内进行。"
        "CONDITIONING 和 LATENT 与 ComfyUI 的相同，哪一步都可以换。预算只管本插件的节点。",
        "CLIPTextEncode encodes the prompt and VAEDecode decodes the picture; denoise works "
        "inside the pipeline's VRAM budget. CONDITIONING and LATENT are ComfyUI's own, so that "
        "any step may be exchanged. The budget holds for this pack's nodes only.",
        CITY_IN_CHINESE,
    ))  # fmt: skip
    return template


def batch_with_a_grid() -> Template:
    template = Template("batch_with_a_grid")
    pipeline = _pipeline(template)
    sample = _sample(template, 2, pipeline=pipeline, prompt=CITY, batch_size=4)
    grid = template.add(
        "ImageGrid", 3, images=(sample, 0), columns=2, cell_width=1024, cell_height=1024, padding=8
    )
    _save(template, 3, (grid, 0), 270, filename_prefix="MajicFlux_grid")
    _save(template, 3, (sample, 0), 270)
    template.note(1, _note(
        "一批不同的画面，拼成一张 / A batch, and its grid",
        "batch_size 是一次画几张：同一个提示词，每张的噪声不同。拼图和单张都会保存；"
        "换了尺寸，就把拼图节点的 cell_width 和 cell_height 也改掉。显存不够时一次少画几张。",
        "batch_size is the number of pictures of one prompt, each from noise of its own. The grid "
        "and the single pictures are saved. With another size, change cell_width and cell_height "
        "of the grid too. If memory is short, paint fewer at once.",
        CITY_IN_CHINESE,
    ))  # fmt: skip
    return template


def compare_precisions() -> Template:
    """A row for each precision; what they have in common stands left of them."""
    template = Template("compare_precisions", (*WIDTHS, 360))
    parts = _encoders_and_vae(template)
    prompt = template.add("PrimitiveStringMultiline", 0, "提示词 / Prompt", tall=180, value=CITY)
    seed = template.add("PrimitiveInt", 0, "种子 / Seed", value=0)
    template.note(0, _note(
        "比较精度 / Compare precisions",
        "同一个提示词和种子，三种权重精度，一行一种。bfloat16 那一行就要 24 GB 内存；"
        "两个 8 位的开着 keep_prepared 时从磁盘映射。不想比的那一行，选中后按 Ctrl+M 静音。",
        "One prompt and one seed with three weight precisions, a row each. The bfloat16 row "
        "alone takes 24 GB of CPU memory; with keep_prepared the 8-bit ones are mapped from the "
        "disk. Select a row and press Ctrl+M to leave it out.",
        CITY_IN_CHINESE,
    ))  # fmt: skip
    for precision in ("float8_e4m3fn", "int8 rotated", "bfloat16"):
        dit = _dit(template, 1, weight_precision=precision)
        pipeline = template.add("MajicFluxPipeline", 1, dit=dit, **parts)
        sample = template.add(
            "MajicFluxSample", 2, pipeline=(pipeline, 0), prompt=(prompt, 0), seed=(seed, 0),
            size="1024x1024 (1:1)",
        )  # fmt: skip
        prefix = f"MajicFlux_{precision.replace(' ', '_')}"
        _save(template, 3, (sample, 0), title=precision, filename_prefix=prefix)
        template.level(1, 2, 3)
    template.app(prompt, "value")
    template.app(seed, "value")
    return template


BUILDERS = [  # from simple to special: web/majicflux.js lists them so
    text_to_image,
    text_to_image_6gb,
    text_to_image_lora,
    text_to_image_translated,
    image_to_image,
    inpainting,
    kontext_edit,
    fill_inpainting,
    fill_outpainting,
    redux_variation,
    depth_control_lora,
    controlnet_union_canny,
    batch_with_a_grid,
    compare_precisions,
    mixed_with_stock_nodes,
]


def files() -> dict[Path, str]:
    """What each file of the templates holds."""
    found = {}
    for build in BUILDERS:
        template = build()
        file = f"{template.name}.json"
        canvas = template.canvas()
        graph = to_graph(canvas, template.schemas)
        for node in graph.values():  # so that scripts set the width and height that stand there
            if "size" in node["inputs"]:
                node["inputs"]["size"] = CUSTOM
        for path, content in (
            (FOLDER / file, canvas),
            (FOLDER / "api" / file, graph),
        ):
            found[path] = json.dumps(content, ensure_ascii=False, indent=2) + "\n"
    return found


if __name__ == "__main__":
    for path, text in files().items():
        path.write_text(text, encoding="utf-8")
