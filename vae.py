"""The variational autoencoder of Stable Diffusion 1.5 (paper 2.2), and training a small one.

It turns pixels (3, H, W) into latents (4, H/8, W/8) and back. Module names are the public
checkpoint's keys; the weights come from the hub (`stable-diffusion-v1-5/stable-diffusion-v1-5`,
subfolder `vae`, or `stabilityai/sd-vae-ft-mse`) or from `train_vae`, which small presets use.

    python vae.py          table of modules with shapes and parameters, and a self-check, in seconds
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import (UserError, batches, build, generator, module_table, named, progress,
                  read_weights, to_model, uniforms, write_weights)

LIMIT = 2**31  # elements of one activation: kernels of CUDA count them in 32 bits
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclass
class VAEConfig:
    """Field names of the public config.json; the defaults are Stable Diffusion 1.5."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)  # width of a level, finest first
    layers_per_block: int = 2  # ResNets a level in the encoder; one more in the decoder
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215  # z0 = scaling_factor * latent has unit variance
    sample_size: int = 512  # pixels; informative

    def __post_init__(self):
        widths = self.block_out_channels = tuple(self.block_out_channels)
        sizes = (self.in_channels, self.out_channels, self.latent_channels, self.layers_per_block,
                 self.norm_num_groups, *widths)
        if (not all(type(size) is int and 0 < size <= 16384 for size in sizes)
                or not 0 < len(widths) <= 8 or self.layers_per_block > 16
                or any(width % self.norm_num_groups for width in widths)
                or not 0 < self.scaling_factor < math.inf):
            raise UserError(f"a VAE has sizes of 1 to 16384, each of block_out_channels a multiple "
                            f"of norm_num_groups, and a scaling_factor above 0; found {self}")

    @property
    def factor(self) -> int:
        """Pixels a latent's side stands for: 8 for Stable Diffusion."""
        return 2 ** (len(self.block_out_channels) - 1)


# ---- Building blocks -----------------------------------------------------------------------------


def conv3x3(c_in: int, c_out: int) -> nn.Conv2d:
    """A convolution that keeps the picture's size."""
    return nn.Conv2d(c_in, c_out, 3, padding=1)


class ResnetBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.conv1 = conv3x3(c_in, c_out)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.conv2 = conv3x3(c_out, c_out)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    """Self-attention of all positions of x (B, C, h, w), with ONE head as wide as x."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])  # a list, for the key `to_out.0`

    def forward(self, x: Tensor) -> Tensor:
        y = self.group_norm(x).flatten(2).transpose(1, 2)[:, None]  # (B, 1 head, h*w, C)
        y = F.scaled_dot_product_attention(self.to_q(y), self.to_k(y), self.to_v(y))
        return x + self.to_out[0](y)[:, 0].transpose(1, 2).unflatten(2, x.shape[2:])


def downsample(width: int) -> nn.Sequential:
    # TRAP: one row and column, at the bottom and the right; the UNet pads all round. They are there
    # because n windows of 3 at stride 2 span 2n + 1 rows, one more than the 2n rows to be halved.
    return named(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(width, width, 3, stride=2))


def upsample(width: int) -> nn.Sequential:
    return named(zoom=nn.Upsample(scale_factor=2), conv=conv3x3(width, width))


def make_levels(widths, depth: int, groups: int, name: str, resampler) -> nn.Sequential:
    blocks = nn.Sequential()
    width = widths[0]
    for i, out in enumerate(widths):
        resnets = [ResnetBlock(width if j == 0 else out, out, groups) for j in range(depth)]
        last = resampler(out) if i < len(widths) - 1 else nn.Identity()
        blocks.append(named(resnets=nn.Sequential(*resnets), **{name: nn.Sequential(last)}))
        width = out
    return blocks


class MidBlock(nn.Module):
    def __init__(self, width: int, groups: int):
        super().__init__()
        self.attentions = nn.ModuleList([Attention(width, groups)])
        self.resnets = nn.ModuleList([ResnetBlock(width, width, groups) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


# ---- The VAE (paper 2.2) -------------------------------------------------------------------------


class VAE(nn.Module):
    """q(z|x) = N(mean, exp(logvar)) by `encode`; x by `decode`. Both speak of unscaled latents."""

    def __init__(self, config: VAEConfig = VAEConfig()):
        super().__init__()
        self.config = config
        widths = config.block_out_channels
        groups = config.norm_num_groups
        depth = config.layers_per_block
        self.encoder = named(
            conv_in=conv3x3(config.in_channels, widths[0]),
            down_blocks=make_levels(widths, depth, groups, "downsamplers", downsample),
            mid_block=MidBlock(widths[-1], groups),
            conv_norm_out=nn.GroupNorm(groups, widths[-1], eps=1e-6), act=nn.SiLU(),
            conv_out=conv3x3(widths[-1], 2 * config.latent_channels))
        self.decoder = named(
            conv_in=conv3x3(config.latent_channels, widths[-1]),
            mid_block=MidBlock(widths[-1], groups),
            up_blocks=make_levels(widths[::-1], depth + 1, groups, "upsamplers", upsample),
            conv_norm_out=nn.GroupNorm(groups, widths[0], eps=1e-6), act=nn.SiLU(),
            conv_out=conv3x3(widths[0], config.out_channels))
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, 3, H, W) in [-1, 1] -> mean, logvar in [-30, 20], (B, 4, H/8, W/8), unscaled."""
        factor = self.config.factor
        if x.shape[2] % factor or x.shape[3] % factor:
            raise UserError(f"found images of {tuple(x.shape[2:])} pixels, expected multiples of "
                            f"{factor}: choose another size")
        moments = [self.quant_conv(self.encoder(part)) for part in self._parts(x, 1)]
        mean, logvar = torch.cat(moments).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z: Tensor) -> Tensor:
        """z (B, 4, h, w), unscaled (z0 / scaling_factor) -> x (B, 3, 8h, 8w), about [-1, 1]."""
        parts = self._parts(z, self.config.factor)
        return torch.cat([self.decoder(self.post_quant_conv(part)) for part in parts])

    def _parts(self, batch: Tensor, zoom: int) -> tuple[Tensor, ...]:
        """Parts of a batch, so that no activation reaches LIMIT elements; equal where twice as many
        can be, for each size is compiled anew."""
        pixels = (zoom * batch.shape[2] + 1) * (zoom * batch.shape[3] + 1)  # of an image, padded
        widest = max(self.config.block_out_channels[:2])  # where the decoder enters its last level
        most = max(1, (LIMIT - 1) // (widest * pixels))  # images in a part
        least = math.ceil(len(batch) / most)
        count = next((n for n in range(least, 2 * least) if len(batch) % n == 0), least)
        return batch.chunk(count)

    @classmethod
    def from_pretrained(cls, source, subfolder=None, revision=None) -> VAE:
        """A folder, a weights file or a hub id -> VAE in float32; UserError where it cannot be."""
        config, published, _ = read_weights(source, subfolder, revision)
        state = {}
        for key, value in published.items():  # files of both generations are in the wild
            key = ".".join(OLD_NAMES.get(part, part) for part in key.split("."))
            if ".attentions." in key and value.ndim == 4:  # once a 1 x 1 convolution
                value = value.flatten(1)
            state[key] = value
        return build(cls, VAEConfig, config, state, source, act_fn="silu", shift_factor=0)

    def save_pretrained(self, folder) -> None:
        """Write config.json and weights; diffusers' AutoencoderKL opens the folder."""
        levels = len(self.config.block_out_channels)
        config = {"_class_name": "AutoencoderKL", "_diffusers_version": "0.30.0", "act_fn": "silu",
                  "down_block_types": ["DownEncoderBlock2D"] * levels,
                  "up_block_types": ["UpDecoderBlock2D"] * levels}
        write_weights(folder, config | dataclasses.asdict(self.config), self.state_dict())


# ---- Training one from scratch -------------------------------------------------------------------


@dataclass(frozen=True)
class VAESettings:
    """How `train_vae` trains; the paper takes Stable Diffusion's VAE, small presets this one."""

    steps: int = 800
    batch: int = 8  # images
    crop: int = 32  # pixels: a random square of each image, as SD's VAE saw 256 of 512; 0: all
    lr: float = 4e-3  # peak; linear warm-up over the first 5 % of the steps, then a cosine to zero
    kl_weight: float = 1e-4  # CHOICE: latents stay near N(0, s²) without visible blur
    edge_weight: float = 1.0  # of the L1 between image gradients: keeps ribs and film grain sharp
    seed: int = 0


def vae_loss(x, reconstruction, mean, logvar, settings: VAESettings) -> Tensor:
    """L1(x, x̂) + edge_weight * L1(∇x, ∇x̂) + kl_weight * KL(q(z|x) || N(0, 1)), as means."""
    difference = reconstruction - x
    edges = difference.diff(dim=2).abs().mean() + difference.diff(dim=3).abs().mean()
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
    return difference.abs().mean() + settings.edge_weight * edges + settings.kl_weight * kl


def train_vae(config: VAEConfig, settings: VAESettings, ds, device, log, workers=0) -> VAE:
    """Train a VAE on `ds` -> it in eval mode, its scaling factor 1 / (the latents' SD).

    A function of its arguments: killed, it starts again and gives the same weights (on a GPU to
    rounding). A step that is not finite changes nothing. `log` gets a dict a step, in which
    `skipped` names images of such a step; it may end the training by an error.
    """
    s = settings
    torch.manual_seed(s.seed)
    vae = VAE(dataclasses.replace(config))  # a copy: the caller's keeps its scaling factor
    for name, weight in vae.named_parameters():
        if name.endswith(("conv2.weight", "to_out.0.weight")):
            nn.init.zeros_(weight)  # residual branches: a shallow net at first learns much sooner
    vae.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.99), weight_decay=1e-4)
    stream = islice(batches(ds, s.batch, 0, s.seed, workers=workers), s.steps)
    variance = 0.0  # of the latents: a moving average over the steps that were taken
    taken = 0
    for step, ids, images in progress(stream, "VAE", s.steps, "step"):
        lr = s.lr * min(1.0, (step + 1) / (0.05 * s.steps))
        lr *= 0.5 * (1 + math.cos(math.pi * step / s.steps))
        optimizer.param_groups[0]["lr"] = lr
        side = min(s.crop or images.shape[2], images.shape[2])
        corners = uniforms(2, s.seed, step, np.arange(len(images))) * (images.shape[2] - side + 1)
        squares = [image[i:i + side, j:j + side]
                   for image, (i, j) in zip(images.to(device), corners.astype(int))]
        x = to_model(torch.stack(squares))
        x = x.contiguous(memory_format=torch.channels_last)  # (B, 3, crop, crop)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            mean, logvar = vae.encode(x)
            rng = generator(device, s.seed, step, 1)
            noise = torch.randn(mean.shape, device=device, generator=rng)
            reconstruction = vae.decode(mean + torch.exp(0.5 * logvar) * noise)
        mean = mean.float()
        logvar = logvar.float()
        loss = vae_loss(x, reconstruction.float(), mean, logvar, s)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        row = {"stage": "vae", "step": step + 1, "loss": loss.item(), "grad_norm": norm.item()}
        if math.isfinite(row["loss"] + row["grad_norm"]):
            optimizer.step()
            variance = 0.98 * variance + 0.02 * (mean.var() + logvar.exp().mean()).item()
            taken += 1
        else:
            row["skipped"] = [ds.keys[i] for i in ids[:8].tolist()]
        log(row)
    variance /= 1 - 0.98**taken  # the average began at zero
    vae.config.scaling_factor = round(variance**-0.5, 5)
    return vae.eval()


if __name__ == "__main__":
    with torch.device("meta"):  # shapes without numbers: the full-size network in no memory
        vae = VAE()
        x = torch.empty(1, 3, 512, 512)
        module_table("Stable Diffusion 1.5 VAE, encoder: x -> mean, logvar", vae.encoder, x)
        z = torch.empty(1, 4, 64, 64)
        module_table("Stable Diffusion 1.5 VAE, decoder: z -> x", vae.decoder, z)
    vae = VAE(VAEConfig(block_out_channels=(8, 16, 16, 16), norm_num_groups=4))
    x = torch.zeros(1, 3, 64, 48)
    assert vae.decode(vae.encode(x)[0]).shape == x.shape
    print("self-check: 64 x 48 pixels -> 8 x 6 latents -> 64 x 48 pixels")
