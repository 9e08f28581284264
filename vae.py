"""The variational autoencoder of Stable Diffusion 1.5 (paper 2.2): pixels (3, H, W) <-> latents (4, H/8, W/8); and training one.

Module names are the public checkpoint's keys. The weights come from the hub's `stable-diffusion-v1-5/stable-diffusion-v1-5`,
subfolder `vae`, from `stabilityai/sd-vae-ft-mse`, or from `train_vae` below, which the small presets use.

    python vae.py           table of modules with shapes and parameters, and a self-check, in seconds
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from data import (UserError, generator, load_state, load_weights, module_table, optimizer_tensors, progress, read_weights,
                  restore_optimizer, save_state, to_model, uniforms, write_weights)


@dataclass
class VAEConfig:
    """Field names of the public config.json; the defaults are Stable Diffusion 1.5."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)  # finest first; each level but the last halves the side
    layers_per_block: int = 2  # ResNets a level in the encoder; one more in the decoder
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215  # z0 = scaling_factor * latent has unit variance; missing from old config files
    sample_size: int = 512  # pixels; informative

    def __post_init__(self):
        self.block_out_channels = tuple(self.block_out_channels)

    @property
    def factor(self) -> int:
        """Pixels a latent's side stands for: 8 for Stable Diffusion."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def from_dict(cls, config: dict) -> VAEConfig:
        """A public config.json -> VAEConfig."""
        if config.get("act_fn", "silu") != "silu" or config.get("shift_factor"):
            raise UserError(f"this VAE's config.json asks for act_fn {config.get('act_fn')!r} and shift_factor "
                            f"{config.get('shift_factor')}; only 'silu' and none are supported")
        return cls(**{f.name: config[f.name] for f in dataclasses.fields(cls) if config.get(f.name) is not None})


# ---- Building blocks ------------------------------------------------------------------------------------------------------


class ResnetBlock(nn.Module):
    """x (B, C_in, h, w) -> (B, C_out, h, w)."""

    def __init__(self, c_in: int, c_out: int, groups: int):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, c_in, eps=1e-6), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(groups, c_out, eps=1e-6), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    """Self-attention of all positions of x (B, C, h, w), with ONE head as wide as x."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.to_q, self.to_k, self.to_v = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])  # a list, for the key `to_out.0`

    def forward(self, x: Tensor) -> Tensor:
        y = self.group_norm(x).flatten(2).transpose(1, 2)[:, None]  # (B, 1 head, h*w, C)
        y = F.scaled_dot_product_attention(self.to_q(y), self.to_k(y), self.to_v(y))
        return x + self.to_out[0](y)[:, 0].transpose(1, 2).unflatten(2, x.shape[2:])


class Downsample(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # TRAP: one row and column at the right and the bottom only; the UNet pads all round


class Upsample(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """ResNets, then a resampler where the level has one."""

    def __init__(self, resnets, downsampler=None, upsampler=None):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        if downsampler is not None:
            self.downsamplers = nn.ModuleList([downsampler])
        if upsampler is not None:
            self.upsamplers = nn.ModuleList([upsampler])

    def forward(self, x: Tensor) -> Tensor:
        for part in self.children():
            for module in part:
                x = module(x)
        return x


class MidBlock(nn.Module):
    def __init__(self, width: int, groups: int):
        super().__init__()
        self.attentions = nn.ModuleList([Attention(width, groups)])
        self.resnets = nn.ModuleList([ResnetBlock(width, width, groups), ResnetBlock(width, width, groups)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Encoder(nn.Module):
    """x (B, 3, H, W) -> (B, 2*4, H/8, W/8)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups, last = config.block_out_channels, config.norm_num_groups, len(config.block_out_channels) - 1
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks, width = nn.ModuleList(), widths[0]
        for i, out in enumerate(widths):
            self.down_blocks.append(Level([ResnetBlock(width if j == 0 else out, out, groups) for j in range(config.layers_per_block)],
                                          downsampler=Downsample(out) if i < last else None))
            width = out
        self.mid_block = MidBlock(width, groups)
        self.conv_norm_out = nn.GroupNorm(groups, width, eps=1e-6)
        self.conv_out = nn.Conv2d(width, 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down_blocks:
            h = level(h)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(h))))


class Decoder(nn.Module):
    """z (B, 4, H/8, W/8) -> x (B, 3, H, W)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups, last = config.block_out_channels[::-1], config.norm_num_groups, len(config.block_out_channels) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups)
        self.up_blocks, width = nn.ModuleList(), widths[0]
        for i, out in enumerate(widths):
            self.up_blocks.append(Level([ResnetBlock(width if j == 0 else out, out, groups) for j in range(config.layers_per_block + 1)],
                                        upsampler=Upsample(out) if i < last else None))
            width = out
        self.conv_norm_out = nn.GroupNorm(groups, width, eps=1e-6)
        self.conv_out = nn.Conv2d(width, config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            h = level(h)
        return self.conv_out(F.silu(self.conv_norm_out(h)))


# ---- The VAE (paper 2.2) --------------------------------------------------------------------------------------------------


class VAE(nn.Module):
    """q(z|x) = N(mean, exp(logvar)) by `encode`; x by `decode`. Both speak of unscaled latents."""

    def __init__(self, config: VAEConfig = VAEConfig()):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, 3, H, W) in [-1, 1], H and W multiples of 8 -> mean, logvar (B, 4, H/8, W/8), unscaled; logvar in [-30, 20]."""
        if x.shape[2] % self.config.factor or x.shape[3] % self.config.factor:
            raise UserError(f"the VAE takes images whose sides are multiples of {self.config.factor}; found {tuple(x.shape[2:])}")
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z: Tensor) -> Tensor:
        """z (B, 4, h, w), unscaled (z0 / scaling_factor) -> x (B, 3, 8h, 8w), about [-1, 1], not clipped."""
        return self.decoder(self.post_quant_conv(z))

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One training pass: x and noise ~ N(0, 1) (B, 4, H/8, W/8) -> reconstruction, mean, logvar."""
        mean, logvar = self.encode(x)
        return self.decode(mean + torch.exp(0.5 * logvar) * noise), mean, logvar

    @classmethod
    def from_pretrained(cls, source, subfolder: str | None = None, revision: str | None = None, offline: bool = False) -> VAE:
        """A folder, one weights file or a hub id -> VAE in float32; both generations of attention names are in the wild."""
        config, state = read_weights(source, subfolder, revision, offline)
        for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
            state = {k.replace(f"attentions.0.{old}.", f"attentions.0.{new}."): v for k, v in state.items()}
        state = {k: v[:, :, 0, 0] if "attentions.0.to_" in k and v.ndim == 4 else v for k, v in state.items()}  # once 1x1 convolutions
        with torch.device("meta"):
            model = cls(VAEConfig.from_dict(config))
        return load_weights(model, state, source)

    def save_pretrained(self, folder) -> None:
        """Write config.json and diffusion_pytorch_model.safetensors; diffusers' AutoencoderKL opens the folder."""
        levels = len(self.config.block_out_channels)
        config = {"_class_name": "AutoencoderKL", "_diffusers_version": "0.30.0", "act_fn": "silu",
                  "down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
        write_weights(folder, config | dataclasses.asdict(self.config), self.state_dict())


# ---- Training one from scratch --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VAESettings:
    """How `train_vae` trains. The paper takes Stable Diffusion's VAE as it is; these are for the presets that download nothing."""

    steps: int = 800
    batch: int = 8  # images in all, over the ranks
    crop: int = 32  # pixels: each image gives one random square, as Stable Diffusion's VAE was trained on 256 of 512; 0: all of it
    lr: float = 4e-3  # peak; linear warm-up over the first 5 % of the steps, then a cosine to zero
    kl_weight: float = 1e-4  # CHOICE: on the mean over latent elements; enough to keep latents near N(0, s²), no visible blur
    edge_weight: float = 1.0  # on the L1 distance of image gradients, which keeps ribs and film grain from being averaged away
    seed: int = 0


def vae_loss(x: Tensor, reconstruction: Tensor, mean: Tensor, logvar: Tensor, settings: VAESettings) -> tuple[Tensor, Tensor]:
    """-> loss, and its pixel part alone: L1(x, x̂) + edge_weight * L1(∇x, ∇x̂) + kl_weight * KL(q(z|x) || N(0, 1))."""
    difference = (reconstruction - x).float()
    pixels = difference.abs().mean()
    edges = difference.diff(dim=2).abs().mean() + difference.diff(dim=3).abs().mean()  # ∇ is linear: ∇x̂ - ∇x = ∇(x̂ - x)
    kl = 0.5 * (mean.float() ** 2 + logvar.float().exp() - 1 - logvar.float()).mean()
    return pixels + settings.edge_weight * edges + settings.kl_weight * kl, pixels


def train_vae(config: VAEConfig, settings: VAESettings, get_batch: Callable[[int], Tensor], folder, device="cpu", rank: int = 0,
              world: int = 1, log: Callable[[dict], None] = lambda row: None, save_every: int = 250,
              should_stop: Callable[[], bool] = lambda: False) -> VAE | None:
    """Train a VAE and save it to `folder`; a killed run goes on from the last saved step, bit for bit.

    get_batch(step) -> uint8 (batch / world, S, S): this rank's slice of global batch `step`. The scaling factor becomes 1 / (the
    latents' standard deviation). `should_stop()` is asked after every step; when it says so, the state is saved and None returned.
    """
    torch.manual_seed(settings.seed)
    vae = VAE(config)
    for name, weight in vae.named_parameters():  # residual branches start at zero: a shallow net at first, which learns much sooner
        if name.endswith(("conv2.weight", "to_out.0.weight")):
            nn.init.zeros_(weight)
    vae.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=settings.lr, betas=(0.9, 0.99), weight_decay=1e-4)
    state, start, variance = Path(folder).with_name(Path(folder).name + ".training.safetensors"), 0, 0.0
    if state.is_file():
        tensors, info = load_state(state)
        vae.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
        restore_optimizer(optimizer, tensors)
        start, variance = info["step"], info["variance"]
    model = DistributedDataParallel(vae) if world > 1 else vae
    save = lambda step: rank == 0 and save_state(
        state, {f"model.{k}": v for k, v in vae.state_dict().items()} | optimizer_tensors(optimizer), {"step": step, "variance": variance})

    bar = progress(desc="VAE", total=settings.steps, initial=start, unit="step")
    for step in range(start, settings.steps):
        began, warm = time.perf_counter(), min(1.0, (step + 1) / (0.05 * settings.steps))
        optimizer.param_groups[0]["lr"] = settings.lr * warm * 0.5 * (1 + math.cos(math.pi * step / settings.steps))
        images = get_batch(step).to(device)  # (b, S, S) uint8
        mine = slice(rank * len(images), (rank + 1) * len(images))  # of the global batch, for which random numbers are drawn
        side = min(settings.crop or images.shape[2], images.shape[2])
        corners = (uniforms(2, settings.seed, step, np.arange(settings.batch))[mine] * (images.shape[2] - side + 1)).astype(int)
        x = to_model(torch.stack([image[i:i + side, j:j + side] for image, (i, j) in zip(images, corners.tolist())]))
        x = x.contiguous(memory_format=torch.channels_last)  # (b, 3, side, side)
        shape = (settings.batch, config.latent_channels, side // config.factor, side // config.factor)
        noise = torch.randn(shape, generator=generator(device, settings.seed, step, 1), device=device)[mine]
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=torch.device(device).type == "cuda"):
            reconstruction, mean, logvar = model(x, noise)
        loss, pixels = vae_loss(x, reconstruction, mean, logvar, settings)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        variance = 0.98 * variance + 0.02 * (mean.detach().float().var() + logvar.detach().float().exp().mean()).item()
        log({"stage": "vae", "step": step + 1, "loss": loss.item(), "l1": pixels.item(), "lr": optimizer.param_groups[0]["lr"],
             "grad_norm": norm.item(), "images_per_s": round(settings.batch / (time.perf_counter() - began), 2)})
        bar.set_postfix_str(f"L1 {pixels.item():.4f}", refresh=False)
        bar.update()
        if should_stop():
            save(step + 1)
            return None
        if (step + 1) % save_every == 0:
            save(step + 1)
    bar.close()
    spread = torch.tensor(variance / (1 - 0.98 ** settings.steps), device=device)  # undo the moving average's start at zero
    if world > 1:
        torch.distributed.all_reduce(spread, torch.distributed.ReduceOp.AVG if spread.is_cuda else torch.distributed.ReduceOp.SUM)
        spread = spread if spread.is_cuda else spread / world
    config.scaling_factor = round(float(spread) ** -0.5, 5)
    if rank == 0:
        vae.save_pretrained(folder)
        state.unlink(missing_ok=True)
    return vae


if __name__ == "__main__":
    with torch.device("meta"):  # shapes without numbers: the full-size network in no memory
        full = VAE()
        module_table("Stable Diffusion 1.5 VAE, encoder: x (1, 3, 512, 512) -> mean and logvar", full.encoder, torch.empty(1, 3, 512, 512))
        module_table("Stable Diffusion 1.5 VAE, decoder: z (1, 4, 64, 64) -> x", full.decoder, torch.empty(1, 4, 64, 64))
    print(f"  in all, with quant_conv and post_quant_conv: {sum(p.numel() for p in full.parameters()):,} parameters")
    small = VAE(VAEConfig(block_out_channels=(8, 16, 16, 16), norm_num_groups=4))
    mean, logvar = small.encode(torch.rand(1, 3, 64, 64) * 2 - 1)
    assert mean.shape == logvar.shape == (1, 4, 8, 8) and small.decode(mean).shape == (1, 3, 64, 64)
    print("self-check: 64 px -> 8 x 8 latents -> 64 px")
