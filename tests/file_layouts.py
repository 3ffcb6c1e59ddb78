"""The layouts that other programs write, made from the plain one."""

import json
import math
from pathlib import Path

import torch

Tensors = dict[str, torch.Tensor]
FLOAT8 = torch.float8_e4m3fn


def to_diffusers(plain: Tensors) -> Tensors:
    """What Diffusers' conversion script makes of a transformer, written down from its file."""
    found: Tensors = {}

    def put(theirs: str, tensor: torch.Tensor, kind: str) -> None:
        found[f"{theirs}.{kind}"] = tensor.clone()

    root = {
        "img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out",
        "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
        "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
        "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
        "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
        "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    }  # fmt: skip
    for name, tensor in plain.items():
        module, kind = name.rsplit(".", 1)
        parts = module.split(".")
        if module in root:
            put(root[module], tensor, kind)
        elif module == "final_layer.adaLN_modulation.1":
            shift, scale = tensor.chunk(2)
            put("norm_out.linear", torch.cat([scale, shift]), kind)
        elif parts[0] == "double_blocks":
            block, stream = f"transformer_blocks.{parts[1]}.", parts[2][:3]
            rest = ".".join(parts[2:])[4:]
            context = {"img": "", "txt": "_context"}[stream]
            if rest == "attn.qkv":
                names = {
                    "img": ("to_q", "to_k", "to_v"),
                    "txt": ("add_q_proj", "add_k_proj", "add_v_proj"),
                }
                for part, rows in zip(names[stream], tensor.chunk(3), strict=True):
                    put(f"{block}attn.{part}", rows, kind)
            elif "norm" in rest:
                added = {"img": "", "txt": "added_"}[stream]
                put(f"{block}attn.norm_{added}{parts[-1][0]}", tensor, "weight")
            else:
                proj = {"img": "attn.to_out.0", "txt": "attn.to_add_out"}[stream]
                renamed = {
                    "mod.lin": f"norm1{context}.linear",
                    "attn.proj": proj,
                    "mlp.0": f"ff{context}.net.0.proj",
                    "mlp.2": f"ff{context}.net.2",
                }
                put(block + renamed[rest], tensor, kind)
        else:
            block, rest = f"single_transformer_blocks.{parts[1]}.", ".".join(parts[2:])
            if rest == "linear1":
                width = tensor.shape[0] // 7
                sizes = [width, width, width, 4 * width]
                names = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
                for part, rows in zip(names, tensor.split(sizes), strict=True):
                    put(block + part, rows, kind)
            elif "norm" in rest:
                put(f"{block}attn.norm_{parts[-1][0]}", tensor, "weight")
            else:
                renamed = {"modulation.lin": "norm.linear", "linear2": "proj_out"}
                put(block + renamed[rest], tensor, kind)
    return found


def scaled(tensors: Tensors, style: str, per_row: bool, dtype: torch.dtype = FLOAT8) -> Tensors:
    """ComfyUI's scaled float8 of the matrices: `.scale_weight` (old) or `.weight_scale` (new)."""
    found: Tensors = {}
    limit = torch.finfo(dtype).max
    for name, tensor in tensors.items():
        if tensor.ndim != 2 or "relative_attention" in name:
            found[name] = tensor
            continue
        largest = tensor.float().abs().amax(dim=1) if per_row else tensor.float().abs().max()
        scale = largest / limit
        found[name] = (tensor.float() / (scale[:, None] if per_row else scale)).to(dtype)
        if style == "old":
            found[name.removesuffix("weight") + "scale_weight"] = scale
        else:
            found[name + "_scale"] = scale
            found[name.removesuffix("weight") + "comfy_quant"] = marked({"format": "float8_e4m3fn"})
    if style == "old":
        found["scaled_fp8"] = torch.zeros(2, dtype=dtype)
    return found


def int8_tensorwise(tensors: Tensors, group: int, per_row: bool = True) -> Tensors:
    """ComfyUI's int8 of the matrices of the blocks, made by the library that it ships."""
    from comfy_kitchen.tensor.int8 import TensorWiseINT8Layout

    found: Tensors = {}
    for name, tensor in tensors.items():
        if tensor.ndim != 2 or "blocks." not in name:
            found[name] = tensor
            continue
        found[name], params = TensorWiseINT8Layout.quantize(
            tensor.float(), per_channel=per_row, convrot=group > 0, convrot_groupsize=group or 256
        )
        found[name + "_scale"] = params.scale
        marker = {"format": "int8_tensorwise"}
        if group:
            marker |= {"convrot": True, "convrot_groupsize": group}
        found[name.removesuffix("weight") + "comfy_quant"] = marked(marker)
    return found


def marked(marker: dict) -> torch.Tensor:
    """ComfyUI's marker of a layer's format: JSON in bytes."""
    return torch.tensor(list(json.dumps(marker).encode()), dtype=torch.uint8)


def declared_in_header(tensors: Tensors) -> tuple[Tensors, dict[str, str]]:
    """The same file with its markers in the header, as ComfyUI documents it: tensors, metadata."""
    markers = {n: t for n, t in tensors.items() if n.endswith(".comfy_quant")}
    layers = {n.removesuffix(".comfy_quant"): json.loads(bytes(t)) for n, t in markers.items()}
    text = json.dumps({"format_version": "1.0", "layers": layers})
    return {n: t for n, t in tensors.items() if n not in markers}, {"_quantization_metadata": text}


def dequantized(tensors: Tensors) -> Tensors:
    """The same weights in bfloat16, rounded once."""
    found = {}
    for name, tensor in tensors.items():
        layer = name.removesuffix("weight")
        scale = tensors.get(layer + "scale_weight", tensors.get(name + "_scale"))
        if scale is not None and name.endswith(".weight"):
            found[name] = (tensor.float() * scale.reshape(-1, 1)).bfloat16()
        elif not name.endswith(("scale_weight", "_scale", "comfy_quant", "scaled_fp8")):
            found[name] = tensor
    return found


def clip_without_prefix(tensors: Tensors) -> Tensors:
    """As Transformers writes it since 5.6."""
    return {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}


def clip_to_openai(tensors: Tensors) -> Tensors:
    """CLIP under the names of its authors, with the beginning of a vision part."""
    found: Tensors = {
        "visual.transformer.resblocks.0.ln_1.weight": torch.ones(2),
        "visual.positional_embedding": torch.ones(2, 2),
        "text_projection": torch.ones(2, 2),
        "logit_scale": torch.ones(()),
    }
    names = {
        "token_embedding.weight": "embeddings.token_embedding.weight",
        "positional_embedding": "embeddings.position_embedding.weight",
        "ln_final.weight": "final_layer_norm.weight",
        "ln_final.bias": "final_layer_norm.bias",
    }
    found |= {theirs: tensors[f"text_model.{ours}"] for theirs, ours in names.items()}
    modules = {
        "ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj",
        "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
    }  # fmt: skip
    layer = 0
    while f"text_model.encoder.layers.{layer}.mlp.fc1.weight" in tensors:
        ours, theirs = f"text_model.encoder.layers.{layer}.", f"transformer.resblocks.{layer}."
        for kind in ("weight", "bias"):
            for name, our_name in modules.items():
                found[f"{theirs}{name}.{kind}"] = tensors[f"{ours}{our_name}.{kind}"]
            parts = [tensors[f"{ours}self_attn.{part}_proj.{kind}"] for part in "qkv"]
            found[f"{theirs}attn.in_proj_{kind}"] = torch.cat(parts)
        layer += 1
    return found


def longer_clip(tensors: Tensors, positions: int = 248) -> Tensors:
    """A LongCLIP: the same with more positions."""
    name = "text_model.embeddings.position_embedding.weight"
    table = tensors[name].float().T[None]
    wide = torch.nn.functional.interpolate(table, positions, mode="linear", align_corners=True)
    return tensors | {name: wide[0].T.to(tensors[name].dtype).contiguous()}


def vae_to_diffusers(tensors: Tensors) -> Tensors:
    """What Diffusers makes of a VAE, written down from its file."""
    found = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        coder = parts[0]
        if parts[1] in ("down", "up"):
            level = int(parts[2]) if parts[1] == "down" else 3 - int(parts[2])
            if parts[3] == "block":
                rest = f"resnets.{parts[4]}.{'.'.join(parts[5:])}"
            else:
                rest = f"{parts[1]}samplers.0.{'.'.join(parts[4:])}"
            name = f"{coder}.{parts[1]}_blocks.{level}.{rest}"
        elif parts[1] == "mid" and parts[2] == "attn_1":
            names = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
            part = names.get(parts[3], "group_norm")
            name = f"{coder}.mid_block.attentions.0.{part}.{parts[4]}"
            tensor = tensor.reshape(tensor.shape[:2]) if tensor.ndim == 4 else tensor
        elif parts[1] == "mid":
            name = f"{coder}.mid_block.resnets.{int(parts[2][-1]) - 1}.{'.'.join(parts[3:])}"
        name = name.replace("nin_shortcut", "conv_shortcut")
        found[name.replace(".norm_out.", ".conv_norm_out.")] = tensor
    return found


def sparse_file(
    path: Path, layout: dict[str, tuple[int, ...]], dtype: str = "BF16", size: int = 2
) -> Path:
    """A file of the full size whose bytes were never written."""
    header, end = {}, 0
    for name, shape in layout.items():
        length = math.prod(shape) * size
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + length]}
        end += length
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path
