"""The templates, built from the node definitions: `python workflows/build.py` writes them.

Nodes stand in columns, one below the other. Heights are those of ComfyUI's canvas, with room for
what a node reports or shows when it runs.
"""

import json
import re
import uuid
from pathlib import Path
from typing import Any

from majicflux.host.canvas import WIDGETS, to_graph
from majicflux.host.image_nodes import image_nodes
from majicflux.host.schema import Schema, Socket, io
from majicflux.loaders.catalogue import (
    AE,
    CLIP_L,
    GROUPS,
    HUB_NAMES,
    HUGGINGFACE,
    MAJICFLUS_BF16,
    MAJICFLUS_FLOAT8,
    T5_XXL,
    KnownFile,
)
from majicflux.nodes import NODES

FOLDER = Path(__file__).resolve().parent
COMFYUI_VERSION = "0.33.0"
LINE, WIDGET, TEXT_BOX, TITLE, GAP = 20, 24, 54, 30, 30
# With more, in width or height, a window of 1600 x 900 shows the nodes too small for their texts.
WIDTHS = (380, 480, 580, 420)
NOTE = 480  # height, in a column of that width
# What a node needs beyond its sockets and widgets: for its report, its picture, longer texts.
ROOM = {
    "MajicFluxDiTLoader": 122,
    "MajicFluxTextEncoders": 84,
    "MajicFluxVAELoader": 72,
    "MajicFluxPipeline": 248,
    "MajicFluxSample": 554,
    "MajicFluxDenoise": 170,
    "LoadImage": 300,
    "CLIPTextEncode": 112,
    "PrimitiveStringMultiline": 112,
}

Source = tuple[int, int]  # a node's id and the number of its output


def _stock(name: str, title: str, output: Socket, *inputs: Socket) -> Schema:
    return Schema(name, title, "", list(inputs), [output])


def schemas() -> dict[str, Schema]:
    """The nodes of the templates by type: this pack's, and ComfyUI's own as far as needed."""
    integer, text, combo = io.Int, io.String, io.Combo
    vae, clip = io.Custom("VAE"), io.Custom("CLIP")
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
                values.append("fixed")
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
        node["widgets_values"] = [text]

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
        extra = bool(socket.options.get("control_after_generate"))
        height += TEXT_BOX if socket.options.get("multiline") else WIDGET * (1 + extra)
    return height + (8 if widgets else 0) + ROOM.get(schema.node_id, 0)


def _models(value: Any) -> list[dict[str, str]]:
    """What the missing-model dialog needs to download a file, which it does from Hugging Face."""
    for file in GROUPS["all"]:
        if file.name == value:
            place = (MAJICFLUS_FLOAT8 if file is MAJICFLUS_BF16 else file).place(HUGGINGFACE)
            assert place is not None
            url = f"https://huggingface.co/{place.repository}/resolve/{place.revision}/{place.path}"
            return [{"name": file.name, "url": url, "directory": file.folder}]
    return []


def _version() -> str:
    project = (FOLDER.parent / "pyproject.toml").read_text(encoding="utf-8")
    return re.findall(r'^version = "(.*)"', project, re.MULTILINE)[0]


def _row(file: KnownFile) -> str:
    size = (file.size or file.least_size) / 1e9
    links = ", ".join(f"[{HUB_NAMES[place.hub]}]({place.page})" for place in file.places)
    return f"| {file.name} ({size:.1f} GB) | models/{file.folder} | {links} |"


def _note(chinese_title: str, english_title: str, chinese: str, english: str) -> str:
    rows = "\n".join(map(_row, GROUPS["all"]))
    return f"""## {chinese_title} / {english_title}

{chinese}

{english}

## 模型文件 / Model files

| 文件 / file | 放进 / folder | 来源 / source |
|---|---|---|
{rows}

前两个文件任选其一：bf16 版 majicflus_v134 精度最高；缺失模型对话框下载的是 float8 版，\
文件名是 majicflus_v1.safetensors，下载后请在加载节点里选它。放好文件后按 R 刷新。

Take one of the first two files: majicflus_v134 in bf16 is the most accurate. The missing-model \
dialog downloads the float8 one under the name majicflus_v1.safetensors; choose it in the loader. \
Press R once the files are in place.
"""


CITY = (
    "赛博朋克风格的未来城市街道,雨夜,蓝色和粉色的霓虹灯光反射在湿漉漉的地面上,头顶有飞行汽车,"
    "高科技氛围,细节丰富,电影感宽幅画面。"
)


def _dit(template: Template, column: int, **values: Any) -> Source:
    return template.add("MajicFluxDiTLoader", column, file=MAJICFLUS_BF16.name, **values), 0


def _encoders_and_vae(template: Template) -> dict[str, Any]:
    encoders = template.add("MajicFluxTextEncoders", 0, clip_l=CLIP_L.name, t5=T5_XXL.name)
    vae = template.add("MajicFluxVAELoader", 0, file=AE.name)
    return {"text_encoders": (encoders, 0), "vae": (vae, 0)}


def _pipeline(template: Template, **values: Any) -> Source:
    """The three loaders in the first column, the pipeline in the second."""
    dit = _dit(template, 0)
    parts = _encoders_and_vae(template)
    return template.add("MajicFluxPipeline", 1, dit=dit, **parts, **values), 0


def _save(template: Template, column: int, images: Source, tall: int = 400, **values: Any) -> None:
    values = {"filename_prefix": "MajicFlux", **values}
    template.add("SaveImage", column, tall=tall, images=images, **values)


def text_to_image(name: str = "text_to_image", budget: float = 0.0, note: str = "") -> Template:
    template = Template(name)
    pipeline = _pipeline(template, vram_budget_gb=budget)
    sample = template.add("MajicFluxSample", 2, pipeline=pipeline, prompt=CITY)
    _save(template, 3, (sample, 0), 540)
    template.app(sample, "prompt", "seed", "steps")
    template.note(1, note or _note(
        "文生图", "Text to image",
        "写好提示词，运行。中英文都可以，(词:1.3) 加大权重。显存预算 0 表示由 ComfyUI 决定；"
        "显存不够时填一个 GB 数。",
        "Write a prompt, in English or Chinese, and run. (words:1.3) weighs them more. A VRAM "
        "budget of 0 lets ComfyUI decide; type a number of GB to use less.",
    ))  # fmt: skip
    return template


def text_to_image_6gb() -> Template:
    return text_to_image("text_to_image_6gb", 6.0, _note(
        "6 GB 显存文生图", "Text to image on 6 GB",
        "权重和计算加在一起不超过 6 GB 显存，其余权重留在内存里，逐块搬到显卡上；"
        "画面和不限预算时相同，只差舍入。流水线节点显示计划，采样节点显示实际用量。"
        "驱动另外还要 0.3 到 0.6 GB：这张卡还接着显示器时，可以填 5。",
        "Weights and calculation together hold at most 6 GB of the card; the other weights stay "
        "in CPU memory and visit it block by block. The picture is the same up to rounding. The "
        "pipeline shows the plan, sample what was used. The driver takes 0.3 to 0.6 GB more: with "
        "a screen on the same card, try 5.",
    ))  # fmt: skip


def image_to_image() -> Template:
    template = Template("image_to_image")
    pipeline = _pipeline(template)
    picture = template.add("LoadImage", 1, image="example.png")
    sample = template.add(
        "MajicFluxSample", 2, pipeline=pipeline, image=(picture, 0), strength=0.7,
        prompt="水彩画,柔和的色彩,纸张的纹理,手绘插图。",
    )  # fmt: skip
    _save(template, 3, (sample, 0))
    template.app(picture, "image")
    template.app(sample, "prompt", "strength", "seed", "steps")
    template.note(3, _note(
        "图生图", "Image to image",
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
    sample = template.add(
        "MajicFluxSample", 2, pipeline=pipeline, image=(picture, 0), mask=(picture, 1),
        strength=0.9, prompt="一只戴着红围巾的猫,柔和的自然光,照片质感。",
    )  # fmt: skip
    _save(template, 3, (sample, 0))
    template.app(picture, "image")
    template.app(sample, "prompt", "strength", "seed", "steps")
    template.note(3, _note(
        "局部重绘", "Inpainting",
        "右键点击载入图片的节点，打开遮罩编辑器 (MaskEditor)，涂出要重画的地方，保存后运行。"
        "没有遮罩就什么也不会改；遮罩之外的像素保持原样。",
        "Right-click Load Image, choose Open in MaskEditor, paint over what is to change, save "
        "and run. Without a mask nothing changes; pixels outside of it stay as they are.",
    ))  # fmt: skip
    return template


def mixed_with_stock_nodes() -> Template:
    template = Template("mixed_with_stock_nodes", (380, 420, 480, 380, 210, 480))
    dit = _dit(template, 0)
    pipeline = template.add("MajicFluxPipeline", 1, dit=dit), 0
    clip = template.add(
        "DualCLIPLoader", 1, clip_name1=CLIP_L.name, clip_name2=T5_XXL.name, type="flux",
        device="default",
    )  # fmt: skip
    prompt = template.add("CLIPTextEncode", 2, clip=(clip, 0), text=CITY)
    latent = template.add("EmptySD3LatentImage", 2, width=1024, height=1024, batch_size=1)
    denoise = template.add(
        "MajicFluxDenoise", 3, pipeline=pipeline, positive=(prompt, 0), latent=(latent, 0)
    )
    vae = template.add("VAELoader", 3, vae_name=AE.name)
    picture = template.add("VAEDecode", 4, samples=(denoise, 0), vae=(vae, 0))
    _save(template, 5, (picture, 0), 540)
    template.app(prompt, "text")
    template.app(denoise, "seed", "steps")
    template.note(2, _note(
        "与 ComfyUI 自带节点混用", "With ComfyUI's own nodes",
        "CLIPTextEncode 编码提示词，VAEDecode 解码画面，去噪在流水线的显存预算内进行。"
        "CONDITIONING 和 LATENT 与 ComfyUI 的相同，哪一步都可以换。流水线在这里不需要本插件的"
        "文本编码器和 VAE。预算只管本插件的节点。",
        "CLIPTextEncode encodes the prompt and VAEDecode decodes the picture; denoise works "
        "inside the pipeline's VRAM budget. CONDITIONING and LATENT are ComfyUI's own, so that "
        "any step may be exchanged. This pack's text encoders and VAE are not needed here, so the "
        "pipeline has none. The budget holds for this pack's nodes only.",
    ))  # fmt: skip
    return template


def batch_with_a_grid() -> Template:
    template = Template("batch_with_a_grid", (380, 480, 580, 270, 420))
    pipeline = _pipeline(template)
    sample = template.add("MajicFluxSample", 2, pipeline=pipeline, prompt=CITY, batch_size=4)
    grid = template.add(
        "ImageGrid", 3, images=(sample, 0), columns=2, cell_width=1024, cell_height=1024, padding=8
    )
    _save(template, 4, (grid, 0), filename_prefix="MajicFlux_grid")
    _save(template, 4, (sample, 0))
    template.app(sample, "prompt", "seed", "steps", "batch_size")
    template.note(1, _note(
        "一批不同的画面，拼成一张", "A batch, and its grid",
        "batch_size 是一次画几张：同一个提示词，每张的噪声不同。拼图和单张都会保存；"
        "换了尺寸，就把拼图节点的 cell_width 和 cell_height 也改掉。显存不够时一次少画几张。",
        "batch_size is the number of pictures of one prompt, each from noise of its own. The grid "
        "and the single pictures are saved. With another size, change cell_width and cell_height "
        "of the grid too. If memory is short, paint fewer at once.",
    ))  # fmt: skip
    return template


def compare_precisions() -> Template:
    """A column for each precision; what they have in common stands left of them."""
    template = Template("compare_precisions", (480, 400, 400, 400))
    template.note(0, _note(
        "比较精度", "Compare precisions",
        "同一个提示词和种子，三种权重精度，画面并排。bfloat16 那一列就要 24 GB 内存；"
        "两个 8 位的开着 keep_prepared 时从磁盘映射。不想比的那一列，选中后按 Ctrl+M 静音。",
        "One prompt and one seed with three weight precisions, side by side. The bfloat16 column "
        "alone takes 24 GB of CPU memory; with keep_prepared the 8-bit ones are mapped from the "
        "disk. Select a column and press Ctrl+M to leave it out.",
    ))  # fmt: skip
    parts = _encoders_and_vae(template)
    prompt = template.add("PrimitiveStringMultiline", 0, "prompt", value=CITY)
    seed = template.add("PrimitiveInt", 0, "seed", value=0)
    for column, precision in enumerate(("float8_e4m3fn", "int8 rotated", "bfloat16"), start=1):
        dit = _dit(template, column, weight_precision=precision)
        pipeline = template.add("MajicFluxPipeline", column, dit=dit, **parts)
        sample = template.add(
            "MajicFluxSample", column, pipeline=(pipeline, 0), prompt=(prompt, 0), seed=(seed, 0)
        )
        prefix = f"MajicFlux_{precision.replace(' ', '_')}"
        _save(template, column, (sample, 0), title=precision, filename_prefix=prefix)
    template.app(prompt, "value")
    template.app(seed, "value")
    return template


BUILDERS = [
    text_to_image,
    text_to_image_6gb,
    image_to_image,
    inpainting,
    mixed_with_stock_nodes,
    batch_with_a_grid,
    compare_precisions,
]


def files() -> dict[Path, str]:
    """What each file of the templates holds."""
    found = {}
    for build in BUILDERS:
        template = build()
        canvas = template.canvas()
        graph = to_graph(canvas, template.schemas)
        for path, content in (
            (FOLDER / f"{template.name}.json", canvas),
            (FOLDER / "api" / f"{template.name}.json", graph),
        ):
            found[path] = json.dumps(content, ensure_ascii=False, indent=2) + "\n"
    return found


if __name__ == "__main__":
    for path, text in files().items():
        path.write_text(text, encoding="utf-8")
