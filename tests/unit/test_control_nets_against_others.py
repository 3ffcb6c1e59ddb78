"""Control nets through Diffusers' own models, DiffSynth's and ours, in float32."""

from pathlib import Path
from typing import Any

import pytest
import torch
from control_nets import FILES, WHOLE, control_net_tensors, picture, randn, transformer_tensors
from diffsynth.models.flux_controlnet import FluxControlNet
from diffsynth.models.flux_dit import (
    FluxJointTransformerBlock,
    FluxSingleTransformerBlock,
    TimestepEmbeddings,
)
from diffsynth.utils.state_dict_converters.flux_controlnet import FluxControlNetStateDictConverter
from safetensors.torch import save_file
from torch import Tensor, nn

from file_layouts import to_diffusers
from majicflux.benchmarks.random_models import CLIP, T5
from majicflux.engine.flux.conditioning import conditions_of
from majicflux.engine.flux.controlnet import Control, ControlNet
from majicflux.engine.flux.geometry import ControlGeometry
from majicflux.engine.flux.lockstep import ControlTokens, Lockstep
from majicflux.engine.flux.text_encoders import TextEmbedding
from majicflux.engine.flux.velocity import flux_velocity
from majicflux.engine.quant.formats import FLOAT32, uniform
from majicflux.loaders.controlnet import load_control_net
from majicflux.loaders.flux_dit import load_flux_dit

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.usefixtures("one_thread")
ROWS, COLUMNS, SIGMA, GUIDANCE, STRENGTH, MODE = 6, 10, 0.8, 3.5, 0.7, 3
PROMPT = TextEmbedding(randn(1, 21, T5.width), randn(1, CLIP.width))


def packed(latents: Tensor) -> Tensor:
    """[n, 16, rows, columns] -> tokens [n, rows/2 * columns/2, 64], as Diffusers' pipeline does."""
    n, channels, rows, columns = latents.shape
    parts = latents.view(n, channels, rows // 2, 2, columns // 2, 2)
    return parts.permute(0, 2, 4, 1, 3, 5).reshape(n, -1, 4 * channels)


def diffusers_model(kind: Any, tensors: dict[str, Tensor], geometry: Any, **more: Any) -> Any:
    model = kind(
        num_layers=geometry.double_blocks,
        num_single_layers=geometry.single_blocks,
        num_attention_heads=geometry.hidden // 128,
        joint_attention_dim=geometry.text_width,
        pooled_projection_dim=geometry.pooled_width,
        guidance_embeds=True,
        **more,
    )
    model.load_state_dict(tensors)
    return model.float().eval()


class OfDiffSynth(FluxControlNet):
    """With narrow layers in the place of its own."""

    def __init__(self, geometry: ControlGeometry, tensors: dict[str, Tensor]) -> None:
        hidden, pooled = geometry.hidden, geometry.pooled_width
        modes = {str(number): number for number in range(geometry.modes)}
        with torch.device("meta"):
            super().__init__(num_joint_blocks=0, num_single_blocks=0, mode_dict=modes)
        self.time_embedder = TimestepEmbeddings(256, hidden)
        self.guidance_embedder = TimestepEmbeddings(256, hidden)
        self.pooled_text_embedder = nn.Sequential(
            nn.Linear(pooled, hidden), nn.SiLU(), nn.Linear(hidden, hidden)
        )
        self.context_embedder = nn.Linear(geometry.text_width, hidden)
        self.x_embedder = nn.Linear(64, hidden)
        self.controlnet_x_embedder = nn.Linear(64, hidden)
        joint, single = range(geometry.double_blocks), range(geometry.single_blocks)
        given = (hidden, hidden // 128)
        self.blocks = nn.ModuleList(FluxJointTransformerBlock(*given) for _ in joint)
        self.single_blocks = nn.ModuleList(FluxSingleTransformerBlock(*given) for _ in single)
        self.controlnet_blocks = nn.ModuleList(nn.Linear(hidden, hidden) for _ in joint)
        self.controlnet_single_blocks = nn.ModuleList(nn.Linear(hidden, hidden) for _ in single)
        if modes:
            self.controlnet_mode_embedder = nn.Embedding(len(modes), hidden)
        self.load_state_dict(FluxControlNetStateDictConverter(tensors))

    def told(self, latents: Tensor, hint: Tensor, **given: Any) -> list[list[Tensor]]:
        double, single = self(
            latents,
            hint,
            1000 * given["timestep"],
            given["encoder_hidden_states"],
            given["pooled_projections"],
            given["guidance"],
            given["txt_ids"][None],
            processor_id=str(MODE),
        )
        return [[STRENGTH * x for x in part] for part in (double, single)]


def expected(transformer: Any, net: Any, latents: Tensor, hint: Tensor, modes: int) -> Tensor:
    """The velocity as tokens, as Diffusers' FluxControlNetPipeline calls the two, the net being its
    own or DiffSynth's."""
    rows, columns = torch.meshgrid(
        torch.arange(ROWS // 2), torch.arange(COLUMNS // 2), indexing="ij"
    )
    places = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3)
    given = {
        "hidden_states": packed(latents),
        "encoder_hidden_states": PROMPT.tokens,
        "pooled_projections": PROMPT.pooled,
        "timestep": torch.tensor([SIGMA]),
        "guidance": torch.tensor([GUIDANCE]),
        "img_ids": places,
        "txt_ids": torch.zeros(PROMPT.tokens.shape[1], 3),
        "return_dict": False,
    }
    if isinstance(net, OfDiffSynth):
        double, single = net.told(latents, hint, **given)
    else:
        mode = torch.tensor([[MODE]]) if modes else None
        double, single = net(
            controlnet_cond=packed(hint), controlnet_mode=mode, conditioning_scale=STRENGTH, **given
        )
    told = {"controlnet_block_samples": double, "controlnet_single_block_samples": single}
    return transformer(**told, **given)[0]


@pytest.mark.parametrize("theirs", ["Diffusers", "DiffSynth"])
@pytest.mark.parametrize("name", ["Union-Pro 2.0", "Union", "upscaler"])
@torch.no_grad()
def test_they_say_what_other_models_say(name: str, theirs: str, tmp_path: Path) -> None:
    geometry: ControlGeometry = FILES[name]
    tensors, of_net = transformer_tensors(), control_net_tensors(geometry)
    transformer = diffusers_model(diffusers.FluxTransformer2DModel, to_diffusers(tensors), WHOLE)
    modes = {"num_mode": geometry.modes} if geometry.modes else {}
    net = (
        OfDiffSynth(geometry, of_net)
        if theirs == "DiffSynth"
        else diffusers_model(diffusers.FluxControlNetModel, of_net, geometry, **modes)
    )
    save_file(tensors, tmp_path / "model.safetensors")
    save_file(of_net, tmp_path / "net.safetensors")
    module = load_flux_dit(tmp_path / "model.safetensors", uniform(FLOAT32))[0].module
    weights, found_geometry = load_control_net(tmp_path / "net.safetensors", uniform(FLOAT32))
    patcher: Any = None
    ours = ControlNet(weights, patcher, found_geometry, uniform(FLOAT32))
    latents, hint = randn(1, 16, ROWS, COLUMNS), randn(1, 16, ROWS, COLUMNS, seed=1)
    control = Control(ours, picture(8 * ROWS, 8 * COLUMNS), mode=MODE, strength=STRENGTH)
    told = (GUIDANCE, torch.float32, latents.device, torch.float32, torch.tensor([SIGMA]))
    (prompt,) = conditions_of(module, [PROMPT], *told)
    of_prompt = [control.told(c) for c in conditions_of(weights.module, [PROMPT], *told)]
    through = Lockstep(WHOLE, [ControlTokens(control, of_prompt, control.hint(hint))])
    velocity = flux_velocity(module, prompt, through_blocks=through)
    found = packed(velocity(latents, torch.tensor(SIGMA)))
    right = expected(transformer, net, latents, hint, geometry.modes)
    assert (found - right).norm() <= 1e-5 * right.norm()
    alone = packed(flux_velocity(module, prompt)(latents, torch.tensor(SIGMA)))
    assert (alone - right).norm() > 0.01 * right.norm(), "the net says something"
