"""Flux.1's autoencoder with fewer channels, which can be written exactly at full width.

The full widths are 128, 256 and 512 with norms of 32 groups. Ours fill some of those groups as a
whole; the channels of the others are zero in the full file and change no norm's mean.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...engine.latents import SCALE, SHIFT
from ...engine.sizes import CHANNELS
from .text_models import Named

WIDTHS = {128: 24, 256: 48, 512: 64}  # channels of the full file -> ours
GROUPS = 32  # of a full norm
LEVELS = (128, 256, 512, 512)
EPS = 1e-6


class Norm(nn.GroupNorm):
    """full: channels at full width. The groups are as wide as there."""

    def __init__(self, full: int) -> None:
        super().__init__(WIDTHS[full] // (full // GROUPS), WIDTHS[full], eps=EPS)

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):  # which would make it float32
            weight, bias = self.weight.to(input.dtype), self.bias.to(input.dtype)
            return F.group_norm(input, self.num_groups, weight, bias, self.eps)


class Resnet(nn.Module):
    def __init__(self, full_in: int, full_out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = Norm(full_in), conv(full_in, full_out)
        self.norm2, self.conv2 = Norm(full_out), conv(full_out, full_out)
        self.changes_width = full_in != full_out
        if self.changes_width:
            self.nin_shortcut = conv(full_in, full_out, kernel=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (self.nin_shortcut(x) if self.changes_width else x)


class MiddleAttention(nn.Module):
    def __init__(self, full: int) -> None:
        super().__init__()
        self.norm = Norm(full)
        self.q, self.k, self.v, self.proj_out = (conv(full, full, kernel=1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (
            layer(y).flatten(2).transpose(1, 2)[:, None] for layer in (self.q, self.k, self.v)
        )
        found = F.scaled_dot_product_attention(q, k, v)[:, 0]
        return x + self.proj_out(found.transpose(1, 2).reshape(x.shape))


class Middle(nn.Module):
    def __init__(self, full: int) -> None:
        super().__init__()
        self.block_1, self.block_2 = Resnet(full, full), Resnet(full, full)
        self.attn_1 = MiddleAttention(full)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv_in = conv(3, LEVELS[0])
        self.down = nn.ModuleList()
        width = LEVELS[0]
        for level, full in enumerate(LEVELS):
            part: Any = Named(block=nn.ModuleList([Resnet(width, full), Resnet(full, full)]))
            if level < len(LEVELS) - 1:
                part.downsample = Named(conv=conv(full, full, stride=2, padding=0))
            self.down.append(part)
            width = full
        self.mid, self.norm_out, self.conv_out = Middle(width), Norm(width), conv(width, CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, 8h, 8w] in -1..1 -> [B, 16, h, w]: means, ours have no variances."""
        x = self.conv_in(x)
        part: Any
        for part in self.down:
            for block in part.block:
                x = block(x)
            if hasattr(part, "downsample"):
                x = part.downsample.conv(F.pad(x, (0, 1, 0, 1)))
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        width = LEVELS[-1]
        self.conv_in, self.mid = conv(CHANNELS, width), Middle(width)
        ups = []
        for level, full in reversed(list(enumerate(LEVELS))):
            blocks = [Resnet(width, full), Resnet(full, full), Resnet(full, full)]
            part: Any = Named(block=nn.ModuleList(blocks))
            if level > 0:
                part.upsample = Named(conv=conv(full, full))
            ups.insert(0, part)
            width = full
        self.up = nn.ModuleList(ups)
        self.norm_out, self.conv_out = Norm(width), conv(width, 3)

    def forward(self, latents: Tensor) -> Tensor:
        """[B, 16, h, w] in model space -> [B, 3, 8h, 8w] in -1..1."""
        x = self.mid(self.conv_in(latents / SCALE + SHIFT))
        part: Any
        for part in reversed(self.up):
            for block in part.block:
                x = block(x)
            if hasattr(part, "upsample"):
                x = part.upsample.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.conv_out(F.silu(self.norm_out(x)))


class ThinVAE(nn.Module):
    """`latent_norm` gives each channel of the latents mean 0 and variance 1, as the transformer
    wants them. It is folded into the encoder's last convolution when tensors are written."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(), Decoder()
        self.latent_norm: Any = nn.BatchNorm2d(CHANNELS, affine=False, momentum=0.02)

    def encode(self, pictures: Tensor) -> Tensor:
        """[B, 3, 8h, 8w] in -1..1 -> [B, 16, h, w] in model space."""
        return self.latent_norm(self.encoder(pictures).float())

    def tensors(self) -> dict[str, Tensor]:
        """Under the names of ae.safetensors, float32; the encoder gives VAE space there."""
        found = {
            name: tensor.detach().float().cpu().clone()
            for name, tensor in self.state_dict().items()
            if not name.startswith("latent_norm.")
        }
        mean = self.latent_norm.running_mean.cpu()
        spread = SCALE * (self.latent_norm.running_var.cpu() + self.latent_norm.eps).sqrt()
        found["encoder.conv_out.weight"] /= spread[:, None, None, None]
        found["encoder.conv_out.bias"] = (found["encoder.conv_out.bias"] - mean) / spread + SHIFT
        return found

    def load(self, tensors: dict[str, Tensor]) -> "ThinVAE":
        """What `tensors` gave; `latent_norm` does nothing afterwards."""
        own = {name: tensor.float() for name, tensor in tensors.items()}
        own["encoder.conv_out.weight"] = own["encoder.conv_out.weight"] * SCALE
        own["encoder.conv_out.bias"] = (own["encoder.conv_out.bias"] - SHIFT) * SCALE
        norm = self.latent_norm
        own["latent_norm.running_mean"] = torch.zeros(CHANNELS)
        own["latent_norm.running_var"] = torch.full((CHANNELS,), 1 - norm.eps)
        own["latent_norm.num_batches_tracked"] = torch.tensor(0)
        self.load_state_dict(own)
        return self.eval()


def conv(
    full_in: int, full_out: int, kernel: int = 3, stride: int = 1, padding: int | None = None
) -> nn.Conv2d:
    """Widths at full width; those of pictures and latents are the same in ours."""
    width_in, width_out = WIDTHS.get(full_in, full_in), WIDTHS.get(full_out, full_out)
    return nn.Conv2d(
        width_in, width_out, kernel, stride, kernel // 2 if padding is None else padding
    )
