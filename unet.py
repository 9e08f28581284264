"""The denoising UNet of Stable Diffusion 1.5, conditioned on DINO's global tokens instead of text (paper 2.2, 2.3).

Module names are the public checkpoint's keys, so weights load by `load_state_dict(strict=True)` without a mapping. They come
from the hub's `stable-diffusion-v1-5/stable-diffusion-v1-5`, subfolder `unet`, or from our own run folders.

    python unet.py          table of modules with shapes and parameters, and a self-check, in seconds

              skip ───────────────────────────────────────────────────────────────────────────► cat
    zt ─ conv_in ─ down 0 ──┐                                                         ┌── up 3 ─ conv_out ─ eps
    64²   4→320   320  64²  └─ down 1 ──┐                                 ┌── up 2 ───┘ 320  64²     320→4
                               640  32² └─ down 2 ──┐         ┌── up 1 ───┘ 640  32²
                                          1280  16² └─ down 3 ┴ mid ┴ up 0 ┘ 1280  16²
                                                       1280  8²                         down 3 and up 0: no attention
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data import UserError, load_weights, module_table, read_weights, write_weights

CROSS = "CrossAttnDownBlock2D"

# Settings of the public config.json that change the network and that only have this one value here.
FIXED = dict(act_fn="silu", flip_sin_to_cos=True, freq_shift=0, downsample_padding=1, mid_block_scale_factor=1, norm_eps=1e-5,
             center_input_sample=False, mid_block_type="UNetMidBlock2DCrossAttn", use_linear_projection=False,
             only_cross_attention=False, dual_cross_attention=False, class_embed_type=None, addition_embed_type=None,
             encoder_hid_dim=None, num_class_embeds=None, resnet_time_scale_shift="default", num_attention_heads=None,
             transformer_layers_per_block=1, conv_in_kernel=3, conv_out_kernel=3, time_embedding_type="positional",
             attention_type="default")


@dataclass
class UNetConfig:
    """Field names of the public config.json; the defaults are Stable Diffusion 1.5."""

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)  # width of each level, finest first
    layers_per_block: int = 2  # ResNets a level on the way down; one more on the way up
    cross_attention_dim: int = 768  # width N of a condition token
    attention_head_dim: int | tuple[int, ...] = 8  # TRAP: in these files this is the NUMBER of heads, not their width
    norm_num_groups: int = 32
    down_block_types: tuple[str, ...] = (CROSS, CROSS, CROSS, "DownBlock2D")
    up_block_types: tuple[str, ...] | None = None  # None: the mirror image of down_block_types
    sample_size: int = 64  # latent side that the model was trained at; informative

    def __post_init__(self):
        self.block_out_channels, self.down_block_types = tuple(self.block_out_channels), tuple(self.down_block_types)
        mirror = tuple(name.replace("Down", "Up") for name in reversed(self.down_block_types))
        self.up_block_types = tuple(self.up_block_types or mirror)
        levels = len(self.block_out_channels)
        if len(self.down_block_types) != levels or self.up_block_types != mirror:
            raise UserError(f"UNet: {levels} block_out_channels need as many down_block_types and their mirror image as "
                            f"up_block_types; found {self.down_block_types} and {self.up_block_types}")
        if isinstance(self.attention_head_dim, int):
            self.attention_head_dim = (self.attention_head_dim,) * levels
        self.attention_head_dim = tuple(self.attention_head_dim)
        for width, heads in zip(self.block_out_channels, self.attention_head_dim):
            if width % self.norm_num_groups or width % heads:
                raise UserError(f"UNet: width {width} must be a multiple of norm_num_groups {self.norm_num_groups} and of {heads} heads")

    @classmethod
    def from_dict(cls, config: dict) -> UNetConfig:
        """A public config.json -> UNetConfig; UserError for architectures that these files cannot express."""
        other = {k: config[k] for k, v in FIXED.items() if config.get(k, v) != v}
        if other:
            raise UserError(f"this UNet's config.json asks for {other}; only {({k: FIXED[k] for k in other})} is supported")
        return cls(**{f.name: config[f.name] for f in dataclasses.fields(cls) if f.name in config})


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    """t (B,) in [0, 1000) -> (B, width) float32: cos and sin of t at `width`/2 frequencies from 1 down to 1/10000."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t[:, None].float() * frequencies  # (B, half)
    return torch.cat([angles.cos(), angles.sin()], dim=1)  # TRAP: cos first here; most other implementations start with sin


# ---- Building blocks, small to large --------------------------------------------------------------------------------------


class TimestepEmbedding(nn.Module):
    def __init__(self, width: int, out: int):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(width, out), nn.Linear(out, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class ResnetBlock(nn.Module):
    """x (B, C_in, h, w), time (B, T) -> (B, C_out, h, w)."""

    def __init__(self, c_in: int, c_out: int, time_width: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-5)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_width, c_out)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-5)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_emb_proj(F.silu(time))[:, :, None, None]  # (B, C_out, 1, 1) broadcast over the picture
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    """Multi-head attention of x (B, L, C) over context (B, S, D), or over itself."""

    def __init__(self, width: int, context_width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_width, width, bias=False)
        self.to_v = nn.Linear(context_width, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])  # a list, for the key `to_out.0`

    def forward(self, x: Tensor, context: Tensor, maps: list | None = None) -> Tensor:
        q, k, v = (y.unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, heads, L or S, C/heads)
                   for y in (self.to_q(x), self.to_k(context), self.to_v(context)))
        if maps is None:
            out = F.scaled_dot_product_attention(q, k, v)
        else:  # the same, with the probabilities kept
            p = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1)  # (B, heads, L, S)
            maps.append(p)
            out = p @ v
        return self.to_out[0](out.transpose(1, 2).flatten(2))  # (B, L, C)


class GEGLU(nn.Module):
    def __init__(self, width: int, out: int):
        super().__init__()
        self.proj = nn.Linear(width, 2 * out)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)  # TRAP: the gate is the second half, and its GELU is the exact one (erf)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.net = nn.ModuleList([GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)])  # 1: dropout, unused

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class TransformerBlock(nn.Module):
    def __init__(self, width: int, context_width: int, heads: int):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn1 = Attention(width, width, heads)
        self.attn2 = Attention(width, context_width, heads)
        self.ff = FeedForward(width)

    def forward(self, x: Tensor, c: Tensor, maps: list | None) -> Tensor:
        y = self.norm1(x)
        x = x + self.attn1(y, y, maps)
        # ╔══ DiNO-Diffusion (paper 2.3) ═════════════════════════════════════════════════════════════════════════════════╗
        # ║ Stable Diffusion attends here to c (B, 77, 768), the tokens of a caption. DiNO-Diffusion attends to c_GLB     ║
        # ║ (B, S, 768), the global tokens of a frozen DINO of the image itself. Nothing else in the network changes.     ║
        x = x + (self.attend_one(c) if c.shape[1] == 1 else self.attn2(self.norm2(x), c))
        # ╚═══════════════════════════════════════════════════════════════════════════════════════════════════════════════╝
        return x + self.ff(self.norm3(x))

    def attend_one(self, c: Tensor) -> Tensor:
        """Cross-attention to one token: softmax over one key is 1, so every query receives that token's value. (B, 1, C)"""
        out = self.attn2.to_out[0](self.attn2.to_v(c))
        # The gradients of what chooses among keys are exactly zero; the term below says so to autograd, DDP and the optimizer.
        unused = (self.norm2.weight, self.norm2.bias, self.attn2.to_q.weight, self.attn2.to_k.weight)
        return out + 0.0 * sum(p.sum() for p in unused) if torch.is_grad_enabled() else out


class Transformer2D(nn.Module):
    """x (B, C, h, w) -> the same shape; its h*w positions are the tokens of one transformer block."""

    def __init__(self, width: int, context_width: int, heads: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)  # TRAP: 1e-6 here, 1e-5 in the ResNets
        self.proj_in = nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(width, context_width, heads)])
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, c: Tensor, maps: list | None = None) -> Tensor:
        y = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)  # (B, h*w, C); free where x is channels_last
        y = self.transformer_blocks[0](y, c, maps)
        return x + self.proj_out(y.transpose(1, 2).unflatten(2, x.shape[2:]))  # (B, C, h, w)


class Downsample(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2, padding=1)  # TRAP: symmetric padding; the VAE's is not

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        return self.conv(F.interpolate(x, size=size, mode="nearest"))  # the skip's size: twice x, or less one where that is odd


class Level(nn.Module):
    """One level of the ladder: ResNets, each followed by attention where the level has it, and a resampler."""

    def __init__(self, resnets, attentions, downsampler=None, upsampler=None):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        if attentions:
            self.attentions = nn.ModuleList(attentions)
        if downsampler is not None:
            self.downsamplers = nn.ModuleList([downsampler])
        if upsampler is not None:
            self.upsamplers = nn.ModuleList([upsampler])

    def pairs(self):
        """(ResNet, attention or None) in order."""
        return zip(self.resnets, getattr(self, "attentions", [None] * len(self.resnets)))


# ---- The UNet (paper 2.2) -------------------------------------------------------------------------------------------------


class UNet(nn.Module):
    """eps = UNet(zt, t, c): predicts the noise in zt. `gradient_checkpointing` trades a second forward for activations."""

    def __init__(self, config: UNetConfig = UNetConfig()):
        super().__init__()
        self.config, self.gradient_checkpointing = config, False
        widths, groups, depth = config.block_out_channels, config.norm_num_groups, config.layers_per_block
        time_width, last = 4 * widths[0], len(widths) - 1
        resnet = lambda c_in, c_out: ResnetBlock(c_in, c_out, time_width, groups)
        attention = lambda i: Transformer2D(widths[i], config.cross_attention_dim, config.attention_head_dim[i], groups)
        attends = [name == CROSS for name in config.down_block_types]

        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(widths[0], time_width)

        self.down_blocks, skips, width = nn.ModuleList(), [widths[0]], widths[0]  # skips: widths of the stacked activations
        for i, out in enumerate(widths):
            self.down_blocks.append(Level([resnet(width if j == 0 else out, out) for j in range(depth)],
                                          [attention(i) for _ in range(depth) if attends[i]],
                                          downsampler=Downsample(out) if i < last else None))
            skips, width = skips + [out] * (depth + (i < last)), out

        self.mid_block = Level([resnet(width, width), resnet(width, width)], [attention(last)])

        self.up_blocks = nn.ModuleList()
        for i, out in reversed(list(enumerate(widths))):
            resnets = []
            for _ in range(depth + 1):
                resnets.append(resnet(width + skips.pop(), out))
                width = out
            self.up_blocks.append(Level(resnets, [attention(i) for _ in range(depth + 1) if attends[i]],
                                        upsampler=Upsample(out) if i > 0 else None))

        self.conv_norm_out = nn.GroupNorm(groups, widths[0], eps=1e-5)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def forward(self, zt: Tensor, t: Tensor, c: Tensor, maps: list | None = None) -> Tensor:
        """zt (B, 4, h, w) noisy latent, t (B,) int in [0, 1000), c (B, S, N) condition tokens -> eps (B, 4, h, w).

        maps: anything with `append`; every self-attention appends its probabilities (B, heads, h*w, h*w) to it, in forward order.
        """
        run = self._checkpointed if self.gradient_checkpointing and torch.is_grad_enabled() else lambda module, *args: module(*args)
        time = self.time_embedding(timestep_embedding(t, self.config.block_out_channels[0]).to(zt.dtype))  # (B, 4*C0)

        h = self.conv_in(zt)
        skips = [h]
        for level in self.down_blocks:
            for resnet, attention in level.pairs():
                h = run(resnet, h, time)
                h = run(attention, h, c, maps) if attention is not None else h
                skips.append(h)
            for downsampler in getattr(level, "downsamplers", ()):
                h = downsampler(h)
                skips.append(h)

        h = run(self.mid_block.resnets[0], h, time)
        h = run(self.mid_block.attentions[0], h, c, maps)
        h = run(self.mid_block.resnets[1], h, time)

        for level in self.up_blocks:
            for resnet, attention in level.pairs():
                h = run(resnet, torch.cat([h, skips.pop()], dim=1), time)
                h = run(attention, h, c, maps) if attention is not None else h
            for upsampler in getattr(level, "upsamplers", ()):
                h = upsampler(h, skips[-1].shape[2:])

        return self.conv_out(F.silu(self.conv_norm_out(h)))

    @staticmethod
    def _checkpointed(module: nn.Module, *args):
        return checkpoint(module, *args, use_reentrant=False)

    @classmethod
    def from_pretrained(cls, source, subfolder: str | None = None, revision: str | None = None, offline: bool = False) -> UNet:
        """A folder, one weights file or a hub id -> UNet in float32. UserError says which keys or shapes do not fit."""
        config, state = read_weights(source, subfolder, revision, offline)
        with torch.device("meta"):
            model = cls(UNetConfig.from_dict(config))
        return load_weights(model, state, source)

    def save_pretrained(self, folder) -> None:
        """Write config.json and diffusion_pytorch_model.safetensors; diffusers' UNet2DConditionModel opens the folder."""
        fixed = {k: v for k, v in FIXED.items() if v is not None}
        config = {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.30.0", **fixed, **dataclasses.asdict(self.config)}
        heads = self.config.attention_head_dim
        write_weights(folder, config | {"attention_head_dim": heads[0] if len(set(heads)) == 1 else heads}, self.state_dict())


if __name__ == "__main__":
    with torch.device("meta"):  # shapes without numbers: the full-size network in no memory
        module_table("Stable Diffusion 1.5 UNet: zt (1, 4, 64, 64), t (1,), c (1, 1, 768) -> eps", UNet(),
                     torch.empty(1, 4, 64, 64), torch.zeros(1, dtype=torch.long), torch.empty(1, 1, 768))
    small = UNet(UNetConfig(block_out_channels=(32, 64), down_block_types=(CROSS, "DownBlock2D"), cross_attention_dim=16, norm_num_groups=8))
    z, t, c = torch.randn(2, 4, 16, 16), torch.tensor([3, 700]), torch.randn(2, 1, 16)
    full_attention = small(z, t, c.expand(2, 2, 16))  # two equal tokens share the softmax: the same mean as one token
    assert torch.allclose(small(z, t, c), full_attention, atol=1e-5), "the shortcut for one token differs from full attention"
    print("self-check: cross-attention's shortcut for one token agrees with full attention")
