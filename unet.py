"""The denoising UNet of Stable Diffusion 1.5, conditioned on DINO's global tokens (paper 2.2, 2.3).

Module names are the public checkpoint's keys: weights load strictly and without a mapping, from the
hub (`stable-diffusion-v1-5/stable-diffusion-v1-5`, subfolder `unet`) or from our own run folders.

    python unet.py         table of modules with shapes and parameters, and a self-check, in seconds

           width and side      ────── skips ──────►
    zt ─ conv_in ─ down 0   320 64²             320 64²   up 3 ─ conv_out ─ eps
                   down 1     640 32²         640 32²     up 2
                   down 2      1280 16²    1280 16²       up 1
                   down 3 ──── 1280 8² mid 1280 8² ────── up 0     (these two without attention)
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data import UserError, build, module_table, named, read_weights, write_weights

CROSS = "CrossAttnDownBlock2D"  # a level with attention
PLAIN = "DownBlock2D"  # a level without

# Settings of the public config.json that change the network and have only this one value here.
FIXED = dict(
    act_fn="silu", flip_sin_to_cos=True, freq_shift=0, downsample_padding=1, norm_eps=1e-5,
    mid_block_scale_factor=1, mid_block_type="UNetMidBlock2DCrossAttn", center_input_sample=False,
    use_linear_projection=False, only_cross_attention=False, dual_cross_attention=False,
    class_embed_type=None, addition_embed_type=None, encoder_hid_dim=None, num_class_embeds=None,
    resnet_time_scale_shift="default", num_attention_heads=None, transformer_layers_per_block=1,
    conv_in_kernel=3, conv_out_kernel=3, time_embedding_type="positional", attention_type="default")


@dataclass
class UNetConfig:
    """Field names of the public config.json; the defaults are Stable Diffusion 1.5."""

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)  # width of a level, finest first
    layers_per_block: int = 2  # ResNets a level on the way down; one more on the way up
    cross_attention_dim: int = 768  # width N of a condition token
    attention_head_dim: int | tuple[int, ...] = 8  # TRAP: the NUMBER of heads, not their width
    norm_num_groups: int = 32
    down_block_types: tuple[str, ...] = (CROSS, CROSS, CROSS, PLAIN)
    up_block_types: tuple[str, ...] = ()  # empty: the mirror image of down_block_types
    sample_size: int = 64  # latent side that the model was trained at; informative

    def __post_init__(self):
        widths = self.block_out_channels = tuple(self.block_out_channels)
        kinds = self.down_block_types = tuple(self.down_block_types)
        mirror = tuple(kind.replace("Down", "Up") for kind in reversed(kinds))
        self.up_block_types = tuple(self.up_block_types) or mirror
        heads = self.attention_head_dim
        heads = (heads,) * len(widths) if isinstance(heads, int) else tuple(heads)
        self.attention_head_dim = heads
        sizes = (self.in_channels, self.out_channels, self.layers_per_block, self.norm_num_groups,
                 self.cross_attention_dim, *widths, *heads)
        if (not all(type(size) is int and 0 < size <= 16384 for size in sizes)
                or not 0 < len(widths) == len(kinds) == len(heads) <= 8
                or self.layers_per_block > 16 or not {*kinds} <= {CROSS, PLAIN}
                or self.up_block_types != mirror
                or any(w % self.norm_num_groups or w % n for w, n in zip(widths, heads))):
            raise UserError(f"a UNet has sizes of 1 to 16384, to each of block_out_channels a "
                            f"{CROSS} or {PLAIN}, up_block_types in mirror image, and each a "
                            f"multiple of norm_num_groups and of its number of heads; found {self}")


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    """t (B,) in [0, 1000) -> (B, width) float32: cos and sin at width/2 frequencies, 1 to 1e-4."""
    half = width // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t[:, None].float() * torch.exp(-math.log(10000) * steps / half)  # (B, half)
    return torch.cat([angles.cos(), angles.sin()], dim=1)  # TRAP: most others put the sine first


# ---- Building blocks, small to large -------------------------------------------------------------


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
        h = h + self.time_emb_proj(time)[:, :, None, None]  # the same at every position
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    """Multi-head attention of x (B, L, C) over context (B, S, D), or over itself -> (B, L, C)."""

    def __init__(self, width: int, context_width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_width, width, bias=False)
        self.to_v = nn.Linear(context_width, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])  # a list, for the key `to_out.0`

    def forward(self, x: Tensor, context: Tensor, maps: list | None = None) -> Tensor:
        projected = (self.to_q(x), self.to_k(context), self.to_v(context))
        # (B, heads, L, C/heads) and twice (B, heads, S, C/heads)
        q, k, v = (y.unflatten(2, (self.heads, -1)).transpose(1, 2) for y in projected)
        if maps is None:
            out = F.scaled_dot_product_attention(q, k, v)
        else:  # the same, with the probabilities kept
            p = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1)  # (B, heads, L, S)
            maps.append(p)
            out = p @ v
        return self.to_out[0](out.transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.proj = nn.Linear(width, 8 * width)

    def forward(self, x: Tensor) -> Tensor:
        # TRAP: the gate is the second half, and its GELU is the exact one (erf). Two products, as
        # the halves of one lie apart in memory: 3 % of a training step on a CPU
        value, gate = zip(self.proj.weight.chunk(2), self.proj.bias.chunk(2))
        return F.linear(x, *value) * F.gelu(F.linear(x, *gate))


class TransformerBlock(nn.Module):
    def __init__(self, width: int, context_width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = Attention(width, context_width, heads)
        self.norm3 = nn.LayerNorm(width)
        last = nn.Linear(4 * width, width)
        self.ff = nn.ModuleDict({"net": nn.Sequential(GEGLU(width), nn.Identity(), last)})

    def forward(self, x: Tensor, c: Tensor, maps: list | None) -> Tensor:
        y = self.norm1(x)
        x = x + self.attn1(y, y, maps)
        # ╔══ DiNO-Diffusion (paper 2.3) ══════════════════════════════════════════════════════════╗
        # ║ Stable Diffusion attends here to c (B, 77, 768), the tokens of a caption; this network ║
        # ║ to c_GLB (B, S, 768), the global tokens of a frozen DINO. Nothing else in it differs.  ║
        x = x + (self.attend_one(c) if c.shape[1] == 1 else self.attn2(self.norm2(x), c))
        # ╚════════════════════════════════════════════════════════════════════════════════════════╝
        return x + self.ff.net(self.norm3(x))

    def attend_one(self, c: Tensor) -> Tensor:
        """Attention to one token -> (B, 1, C): softmax over one key is 1, so all get its value."""
        out = self.attn2.to_out[0](self.attn2.to_v(c))
        if not torch.is_grad_enabled():
            return out
        # What chooses among keys has gradients of exactly zero. This term says so to autograd:
        # DDP waits for a gradient of every parameter, and AdamW decays only those that have one.
        idle = (self.norm2.weight, self.norm2.bias, self.attn2.to_q.weight, self.attn2.to_k.weight)
        return out + 0.0 * sum(p.sum() for p in idle)


class Transformer2D(nn.Module):
    """x (B, C, h, w) -> the same shape; its h*w positions are tokens of one transformer block."""

    def __init__(self, width: int, context_width: int, heads: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)  # TRAP: 1e-6 here, 1e-5 in the ResNets
        self.proj_in = nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(width, context_width, heads)])
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, c: Tensor, maps: list | None = None) -> Tensor:
        y = self.proj_in(self.norm(x))
        y = y.flatten(2).transpose(1, 2)  # (B, h*w, C); no copy where x is channels_last
        y = self.transformer_blocks[0](y, c, maps)
        return x + self.proj_out(y.transpose(1, 2).unflatten(2, x.shape[2:]))  # (B, C, h, w)


def make_level(resnets: list, attentions: list, **samplers: list) -> nn.ModuleDict:
    """The parts of one level of the ladder, under the names that the checkpoint gives them."""
    parts = {"attentions": attentions, **samplers, "resnets": resnets}
    return nn.ModuleDict({name: nn.ModuleList(modules) for name, modules in parts.items()})


# ---- The UNet (paper 2.2) ------------------------------------------------------------------------


class UNet(nn.Module):
    """eps = UNet(zt, t, c): predicts the noise in zt."""

    def __init__(self, config: UNetConfig = UNetConfig()):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False  # True: keep few activations, compute them again
        widths = config.block_out_channels
        groups = config.norm_num_groups
        depth = config.layers_per_block
        last = len(widths) - 1

        def resnet(c_in: int, c_out: int) -> ResnetBlock:
            return ResnetBlock(c_in, c_out, 4 * widths[0], groups)

        def attention(i: int) -> Transformer2D:
            heads = config.attention_head_dim[i]
            return Transformer2D(widths[i], config.cross_attention_dim, heads, groups)

        def resampler(width: int, stride: int) -> nn.Sequential:
            # TRAP: symmetric padding; the VAE's is not
            return named(conv=nn.Conv2d(width, width, 3, stride, padding=1))

        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = named(
            linear_1=nn.Linear(widths[0], 4 * widths[0]), act=nn.SiLU(),
            linear_2=nn.Linear(4 * widths[0], 4 * widths[0]))
        self.down_blocks = nn.ModuleList()
        width = widths[0]
        skips = [width]  # widths of the activations that wait for the way up
        for i, out in enumerate(widths):
            resnets = [resnet(width if j == 0 else out, out) for j in range(depth)]
            attentions = [attention(i) for _ in resnets if config.down_block_types[i] == CROSS]
            down = [resampler(out, 2)] if i < last else []
            self.down_blocks.append(make_level(resnets, attentions, downsamplers=down))
            skips += [out] * (depth + len(down))
            width = out
        self.mid_block = make_level([resnet(width, width), resnet(width, width)], [attention(last)])
        self.up_blocks = nn.ModuleList()
        for i, out in reversed(list(enumerate(widths))):
            resnets = []
            for _ in range(depth + 1):
                resnets.append(resnet(width + skips.pop(), out))
                width = out
            attentions = [attention(i) for _ in resnets if config.down_block_types[i] == CROSS]
            up = [resampler(out, 1)] if i > 0 else []
            self.up_blocks.append(make_level(resnets, attentions, upsamplers=up))
        self.conv_norm_out = nn.GroupNorm(groups, widths[0], eps=1e-5)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def forward(self, zt: Tensor, t: Tensor, c: Tensor, maps: list | None = None) -> Tensor:
        """zt (B, 4, h, w), t (B,) int in [0, 1000), condition c (B, S, N) -> eps (B, 4, h, w).

        maps: anything with `append`; gets the probabilities (B, heads, h*w, h*w) of every
        self-attention, in forward order.
        """
        angles = timestep_embedding(t, self.config.block_out_channels[0])
        time = F.silu(self.time_embedding(angles.to(zt.dtype)))  # (B, 4*C0)
        h = self.conv_in(zt)
        skips = [h]
        for down in self.down_blocks:
            for j in range(len(down.resnets)):
                h = self._block(down, j, h, time, c, maps)
                skips.append(h)
            for downsampler in down.downsamplers:
                h = downsampler(h)
                skips.append(h)
        for j in range(2):
            h = self._block(self.mid_block, j, h, time, c, maps)
        for up in self.up_blocks:
            for j in range(len(up.resnets)):
                h = torch.cat([h, skips.pop()], dim=1)
                h = self._block(up, j, h, time, c, maps)
            for upsampler in up.upsamplers:  # to the size of the skip: odd sides were rounded up
                h = upsampler(F.interpolate(h, size=skips[-1].shape[2:], mode="nearest"))
        return self.conv_out(F.silu(self.conv_norm_out(h)))

    def _block(self, level: nn.ModuleDict, j: int, h: Tensor, time, c, maps) -> Tensor:
        """ResNet j of a level and the attention behind it, where there is one."""
        h = self._run(level.resnets[j], h, time)
        return self._run(level.attentions[j], h, c, maps) if j < len(level.attentions) else h

    def _run(self, module: nn.Module, *inputs) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(module, *inputs, use_reentrant=False)
        return module(*inputs)

    @classmethod
    def from_pretrained(cls, source, subfolder=None, revision=None) -> UNet:
        """A folder, a weights file or a hub id -> UNet in float32; UserError where it cannot be."""
        config, state, _ = read_weights(source, subfolder, revision)
        return build(cls, UNetConfig, config, state, source, **FIXED)

    def save_pretrained(self, folder) -> None:
        """Write config.json and weights; diffusers' UNet2DConditionModel opens the folder."""
        config = {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.30.0"}
        config |= {name: value for name, value in FIXED.items() if value is not None}
        write_weights(folder, config | dataclasses.asdict(self.config), self.state_dict())


if __name__ == "__main__":
    with torch.device("meta"):  # shapes without numbers: the full-size network in no memory
        module_table("Stable Diffusion 1.5 UNet: zt (1, 4, 64, 64), t (1,), c (1, 1, 768) -> eps",
                     UNet(), torch.empty(1, 4, 64, 64), torch.zeros(1), torch.empty(1, 1, 768))
    small = UNet(UNetConfig(block_out_channels=(32, 64), down_block_types=(CROSS, PLAIN)))
    zt = torch.randn(1, 4, 16, 16)
    c = torch.randn(1, 1, 768)
    one = small(zt, torch.tensor([700]), c)
    two = small(zt, torch.tensor([700]), c.expand(1, 2, 768))  # two equal tokens: their mean is c
    assert torch.allclose(one, two, atol=1e-5), "the shortcut for one token is wrong"
    print("self-check: cross-attention's shortcut for one token agrees with full attention")
