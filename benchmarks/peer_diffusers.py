"""Group offloading of diffusers as a peer of `budget_peers`."""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from majicflux.lab.steps import GUIDANCE, Step

from .peer_setup import NotMeasured, Setup
from .step import BFLOAT16, State, image_ids


def group_offload(level: str, storage: torch.dtype) -> Callable[..., AbstractContextManager[Step]]:
    """Group offloading. It has no budget: all weights travel at every step, whatever the card has.

    level: "leaf_level" or "block_level". storage: FLOAT8 adds its layerwise casting, which leaves
    the modulation layers in bfloat16. On a CUDA card the copies have a stream and pinned memory.
    """

    @contextmanager
    def build(setup: Setup) -> Iterator[Step]:
        if importlib.util.find_spec("diffusers") is None:
            raise NotMeasured("no diffusers")
        yield _step(_module(setup, level, storage), setup)

    return build


@torch.inference_mode(False)
@torch.no_grad()
def _module(setup: Setup, level: str, storage: torch.dtype) -> Any:
    from diffusers import FluxTransformer2DModel
    from diffusers.hooks import apply_group_offloading

    g = setup.geometry
    with torch.device("meta"):
        module = FluxTransformer2DModel(
            in_channels=g.in_channels,
            out_channels=g.out_channels,
            num_layers=g.double_blocks,
            num_single_layers=g.single_blocks,
            attention_head_dim=g.hidden // g.heads,
            num_attention_heads=g.heads,
            joint_attention_dim=g.text_width,
            pooled_projection_dim=g.pooled_width,
            guidance_embeds=g.guidance,
        )
    module.requires_grad_(False).eval()
    # The tensors are the state's own: offloading replaces the data of a parameter, never writes it.
    module.load_state_dict(_renamed(setup.state, g.hidden), assign=True)
    if storage != BFLOAT16:
        module.enable_layerwise_casting(storage_dtype=storage, compute_dtype=BFLOAT16)
    streams = setup.device.type == "cuda"
    apply_group_offloading(
        module,
        onload_device=setup.device,
        offload_device=torch.device("cpu"),
        offload_type=level,
        num_blocks_per_group=1,
        use_stream=streams,
        record_stream=streams,
    )
    return module


def _step(module: Any, setup: Setup) -> Step:
    """Its result differs from the others': it rounds sigma and the guidance to bfloat16."""
    case, device = setup.case, setup.device
    _, channels, height, width = case.latents.shape
    rows, columns = height // 2, width // 2

    @torch.inference_mode(False)
    @torch.no_grad()
    def step() -> Tensor:
        patches = case.latents.reshape(1, channels, rows, 2, columns, 2)
        found = module(
            patches.permute(0, 2, 4, 1, 3, 5).reshape(1, rows * columns, -1).to(BFLOAT16),
            encoder_hidden_states=case.text.tokens.to(BFLOAT16),
            pooled_projections=case.text.pooled.to(BFLOAT16),
            timestep=case.sigma.to(device).reshape(1),
            img_ids=image_ids(case.latents),
            txt_ids=torch.zeros(case.text.tokens.shape[1], 3, device=device),
            guidance=torch.full((1,), GUIDANCE, device=device),
            return_dict=False,
        )[0]
        found = found.reshape(1, rows, columns, channels, 2, 2)
        return found.permute(0, 3, 1, 4, 2, 5).reshape(case.latents.shape)

    return step


NAMES = {
    "time_in.": "time_text_embed.timestep_embedder.",
    "guidance_in.": "time_text_embed.guidance_embedder.",
    "vector_in.": "time_text_embed.text_embedder.",
    ".in_layer.": ".linear_1.",
    ".out_layer.": ".linear_2.",
    "txt_in.": "context_embedder.",
    "img_in.": "x_embedder.",
    "final_layer.linear.": "proj_out.",
    "final_layer.adaLN_modulation.1.": "norm_out.linear.",
    "double_blocks.": "transformer_blocks.",
    "single_blocks.": "single_transformer_blocks.",
    "img_mod.lin.": "norm1.linear.",
    "txt_mod.lin.": "norm1_context.linear.",
    "modulation.lin.": "norm.linear.",
    "img_attn.proj.": "attn.to_out.0.",
    "txt_attn.proj.": "attn.to_add_out.",
    "img_attn.norm.query_norm.scale": "attn.norm_q.weight",
    "img_attn.norm.key_norm.scale": "attn.norm_k.weight",
    "txt_attn.norm.query_norm.scale": "attn.norm_added_q.weight",
    "txt_attn.norm.key_norm.scale": "attn.norm_added_k.weight",
    ".norm.query_norm.scale": ".attn.norm_q.weight",
    ".norm.key_norm.scale": ".attn.norm_k.weight",
    "img_mlp.0.": "ff.net.0.proj.",
    "img_mlp.2.": "ff.net.2.",
    "txt_mlp.0.": "ff_context.net.0.proj.",
    "txt_mlp.2.": "ff_context.net.2.",
    "linear2.": "proj_out.",
}
PARTS = {
    "img_attn.qkv.": ["attn.to_q.", "attn.to_k.", "attn.to_v."],
    "txt_attn.qkv.": ["attn.add_q_proj.", "attn.add_k_proj.", "attn.add_v_proj."],
    "linear1.": ["attn.to_q.", "attn.to_k.", "attn.to_v.", "proj_mlp."],
}


def _renamed(state: State, hidden: int) -> State:
    """The weights under diffusers' names; its own conversion knows the full width only."""
    renamed: State = {}
    for name, tensor in state.items():
        for old, new in NAMES.items():
            name = name.replace(old, new)
        old = next((old for old in PARTS if old in name), None)
        if old is not None:
            new = PARTS[old]
            rows = [hidden] * (len(new) - 1)
            rows.append(tensor.shape[0] - sum(rows))
            for part, piece in zip(new, tensor.split(rows), strict=True):
                renamed[name.replace(old, part)] = piece
        elif name.startswith("norm_out."):  # scale before shift there
            renamed[name] = torch.cat(tensor.chunk(2)[::-1])
        else:
            renamed[name] = tensor
    return renamed
