"""The DINO vision transformer that turns an image into the condition c (paper 2.3): DINOv1, DINOv2 with and without registers,
RAD-DINO; and training one from scratch by self-distillation (Caron et al. 2021), which the small presets use.

The modules are named as in timm; `PAIRS` below holds all that Hugging Face's files call otherwise. Weights come from the hub's
`facebook/dino-vitb16` (the paper's DINOv1), `timm/vit_base_patch14_reg4_dinov2.lvd142m` (its DINOv2) or `microsoft/rad-dino`.

    python vit.py           table of modules with shapes and parameters, and a self-check, in seconds

    x (B, 3, H, W) ─ patch_embed ─ + positions ─ cat [CLS, REG, patches] ─ blocks ─ norm ─┬─ CLS ───────────── c_CLS ┐
                                                                                           ├─ tanh(dense(CLS)) ─ c_PLR ├ c_GLB
                                                                                           ├─ REG × R ───────── c_REG ┘
                                                                                           └─ patches × L ───── c_LCL
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
import shutil
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
from data import (UserError, load_state, load_weights, module_table, optimizer_tensors, progress, restore_optimizer, save_state,
                  to_model, uniforms)

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of RGB in [0, 1]; what DINO was trained with
PILLOW_FILTER = {"bilinear": 2, "bicubic": 3}  # the numbers in preprocessor_config.json

# Our (and timm's) names and those of Hugging Face's files, as text replacements. The order matters: `attention.output.dense`
# holds `output.dense`. Attention there keeps q, k and v apart; we fuse them, as timm does.
COMMON = (("blocks.", "encoder.layer."), ("attn.q.", "attention.attention.query."), ("attn.k.", "attention.attention.key."),
          ("attn.v.", "attention.attention.value."), ("attn.proj.", "attention.output.dense."), ("norm.", "layernorm."),
          ("cls_token", "embeddings.cls_token"), ("reg_token", "embeddings.register_tokens"),
          ("mask_token", "embeddings.mask_token"), ("pos_embed", "embeddings.position_embeddings"),
          ("patch_embed.proj.", "embeddings.patch_embeddings.projection."))
DINOV2 = (*COMMON, ("ls1.gamma", "layer_scale1.lambda1"), ("ls2.gamma", "layer_scale2.lambda1"))
PAIRS = {"timm": (), "dinov2": DINOV2, "dinov2_with_registers": DINOV2,
         "vit": (*COMMON, ("norm1.", "layernorm_before."), ("norm2.", "layernorm_after."),
                 ("mlp.fc1.", "intermediate.dense."), ("mlp.fc2.", "output.dense."))}
CLASSES = {"vit": "ViTModel", "dinov2": "Dinov2Model", "dinov2_with_registers": "Dinov2WithRegistersModel"}
# transformers 5 has other names in memory, though not in what its save_pretrained writes: we read them as well.
NEW = ((r"^layers\.", "encoder.layer."), (r"attention\.([qkv])_proj\.", r"attn.\1."), (r"attention\.o_proj\.", "attn.proj."))


@dataclass
class ViTConfig:
    """What a checkpoint is, whatever wrote it; the defaults are `facebook/dino-vitb16`."""

    layout: str = "vit"  # whose names its file has: vit, dinov2, dinov2_with_registers (transformers) or timm
    image_size: int = 224  # pixels; the side that the position embedding was trained for
    patch_size: int = 16  # pixels
    hidden_size: int = 768  # width N of a token
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    registers: int = 0  # R
    pooler: bool = False  # TRAP: the public DINOv1 has none; transformers then makes one of random numbers without an error
    layer_scale: bool = False
    cls_position: bool = True  # TRAP: timm's DINOv2-reg4 has no position for CLS, all the others have one
    mask_token: bool = False  # kept so that the file can be written back; inference does not use it
    eps: float = 1e-12  # of LayerNorm. TRAP: 1e-12 is transformers' for DINOv1; all others have 1e-6
    interpolation: str = "bilinear"  # of `prepare`; DINOv2 has bicubic
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    source: dict = field(default_factory=dict, repr=False, compare=False)  # the config.json it came from, to be written back

    def __post_init__(self):
        self.mean, self.std = tuple(self.mean), tuple(self.std)
        if self.layout not in PAIRS or self.interpolation not in PILLOW_FILTER:
            raise UserError(f"ViT: found layout {self.layout!r} and interpolation {self.interpolation!r}, expected one of "
                            f"{', '.join(PAIRS)} and one of {', '.join(PILLOW_FILTER)}")
        if self.hidden_size % self.heads or self.image_size < self.patch_size:
            raise UserError(f"ViT: width {self.hidden_size} must be divisible by {self.heads} heads, and an image of "
                            f"{self.image_size} px hold a patch of {self.patch_size} px")

    @property
    def global_count(self) -> int:
        """S: how many global tokens there are, 1 [+ 1 pooler token] + R."""
        return 1 + self.pooler + self.registers


# ---- Building blocks ------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, config: ViTConfig):
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, maps: list | None = None) -> Tensor:
        B, S, N = x.shape
        q, k, v = self.qkv(x).view(B, S, 3, self.heads, N // self.heads).permute(2, 0, 3, 1, 4)  # each (B, heads, S, N/heads)
        if maps is None:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            maps.append((q @ k.transpose(-2, -1) * (N // self.heads) ** -0.5).softmax(-1))  # (B, heads, S, S)
            out = maps[-1] @ v
        return self.proj(out.transpose(1, 2).reshape(B, S, N))


class LayerScale(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), 1e-5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    def __init__(self, config: ViTConfig):
        super().__init__()
        N, hidden = config.hidden_size, round(config.hidden_size * config.mlp_ratio)
        scale = LayerScale if config.layer_scale else nn.Identity
        self.norm1, self.attn, self.ls1 = nn.LayerNorm(N, config.eps), Attention(config), scale(N)
        self.norm2, self.ls2 = nn.LayerNorm(N, config.eps), scale(N)
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(N, hidden), act=nn.GELU(), fc2=nn.Linear(hidden, N)))

    def forward(self, x: Tensor, maps: list | None = None) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x), maps))
        return x + self.ls2(self.mlp(self.norm2(x)))


def start_weights(module: nn.Module) -> None:
    """Weights to train from. CHOICE: Xavier. DINO's fixed deviation, 0.02, is near it at width 768, and too small at 128."""
    for name, p in module.named_parameters():
        if p.ndim == 2:
            nn.init.xavier_normal_(p)
        elif p.ndim == 3:  # tokens and positions. CHOICE: 0.3 for positions, else a short training is blind to where things are
            nn.init.trunc_normal_(p, std=0.3 if name == "pos_embed" else 0.02)
        elif name.endswith(".bias") and "patch_embed" not in name:
            nn.init.zeros_(p)


# ---- The vision transformer (paper 2.3) -----------------------------------------------------------------------------------


class ViT(nn.Module):
    """f_Φ: image -> tokens c, of which the global ones, c_GLB = [c_CLS, c_PLR, c_REG], condition the diffusion model."""

    def __init__(self, config: ViTConfig = ViTConfig()):
        super().__init__()
        N, grid = config.hidden_size, config.image_size // config.patch_size
        self.config = config
        self.cls_token = nn.Parameter(torch.zeros(1, 1, N))
        self.reg_token = nn.Parameter(torch.zeros(1, config.registers, N)) if config.registers else None
        self.register_buffer("mask_token", torch.zeros(1, N) if config.mask_token else None)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.cls_position + grid * grid, N))
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, N, config.patch_size, stride=config.patch_size)))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(N, config.eps)
        self.pooler = nn.Sequential(OrderedDict(dense=nn.Linear(N, N))) if config.pooler else None
        start_weights(self)

    def prepare(self, x: Tensor) -> Tensor:
        """x (B, 3, H, W) in [-1, 1] -> (B, 3, S, S) as `forward` takes it: S = image_size, each channel normalised.

        CHOICE: the whole image is resized to the encoder's own size; nothing is cropped away, as its ImageNet pipeline would.
        """
        size, shape = (self.config.image_size, self.config.image_size), (1, 3, 1, 1)
        if x.shape[2:] != size:
            x = F.interpolate(x, size, mode=self.config.interpolation, antialias=True).clamp(-1, 1)  # bicubic overshoots
        return ((x + 1) / 2 - x.new_tensor(self.config.mean).view(shape)) / x.new_tensor(self.config.std).view(shape)

    def positions(self, height: int, width: int) -> Tensor:
        """The position embedding of the patches, resampled to height × width patches: (1, height * width, N)."""
        grid, layout = self.config.image_size // self.config.patch_size, self.config.layout
        patches = self.pos_embed[:, self.config.cls_position:]
        if (height, width) == (grid, grid):
            return patches
        patches = patches.unflatten(1, (grid, grid)).permute(0, 3, 1, 2)  # (1, N, grid, grid)
        # TRAP: all are bicubic, but transformers smooths for registers alone, timm always; DINOv1 stays in its own precision.
        patches = F.interpolate(patches if layout == "vit" else patches.float(), (height, width), mode="bicubic",
                                antialias=layout in ("timm", "dinov2_with_registers"))
        return patches.to(self.pos_embed.dtype).flatten(2).transpose(1, 2)

    def forward(self, x: Tensor, maps: list | None = None) -> Tensor:
        """x (B, 3, H, W) normalised -> tokens (B, 1 [+ 1] + R + L, N) after the final norm: CLS, PLR, REG, patches.

        H and W: any size of at least one patch; what does not fill a patch is left out. A list given as `maps` receives each
        block's attention probabilities (B, heads, T, T), T = 1 + R + L. Source: Dosovitskiy et al. 2021, Darcet et al. 2024.
        """
        patches = self.patch_embed(x)  # (B, N, H/P, W/P)
        patches = patches.flatten(2).transpose(1, 2) + self.positions(*patches.shape[2:])  # (B, L, N)
        cls = self.cls_token + self.pos_embed[:, :1] if self.config.cls_position else self.cls_token
        prefix = cls if self.reg_token is None else torch.cat([cls, self.reg_token], dim=1)  # TRAP: registers have no position
        x = torch.cat([prefix.expand(len(x), -1, -1).to(patches.dtype), patches], dim=1)  # (B, 1 + R + L, N)
        for block in self.blocks:
            x = block(x, maps)
        x = self.norm(x)
        return x if self.pooler is None else torch.cat([x[:, :1], torch.tanh(self.pooler(x[:, :1])), x[:, 1:]], dim=1)

    def global_tokens(self, x: Tensor) -> Tensor:
        """x (B, 3, H, W) normalised -> c_GLB = [CLS, PLR where there is one, REG × R] (B, S, N) [DiNO-Diff 2.3]."""
        return self(x)[:, :self.config.global_count]

    # ---- Load and save ----

    @classmethod
    def from_pretrained(cls, source, subfolder: str | None = None, revision: str | None = None, offline: bool = False) -> ViT:
        """A folder, one weights file or a hub id, of any of the four layouts -> ViT in float32.

        The sizes are config.json's; without one, the tensors', with heads 64 wide. UserError says what does not fit.
        """
        raw, state = data.read_weights(source, subfolder, revision, offline)
        state, layout = native_names(state)
        if layout != "timm" and (file := _beside(source, "preprocessor_config.json", subfolder, revision, offline)):
            raw = raw | {"preprocessor": json.loads(file.read_text())}
        with torch.device("meta"):
            model = cls(read_config(raw, state, layout, source))
        return load_weights(model, state, source)

    def save_pretrained(self, folder) -> None:
        """Write config.json and model.safetensors in the layout that it came from, for transformers' or timm's own classes."""
        c, state, N = self.config, {}, self.config.hidden_size
        for key, value in self.state_dict().items():
            is_split = ".qkv." in key and c.layout != "timm"
            for letter, part in zip("qkv", value.chunk(3)) if is_split else [("qkv", value)]:
                name = key.replace(".qkv.", f".{letter}.")
                for ours, theirs in PAIRS[c.layout]:
                    name = name.replace(ours, theirs)
                state[name] = part
        config = {k: v for k, v in c.source.items() if k not in ("dtype", "torch_dtype", "preprocessor")}  # it is float32 now
        if c.layout == "timm":
            config = {"architecture": "vit_base_patch16_224", "num_features": N, "num_classes": 0} | config
            config["model_args"] = config.get("model_args", {}) | {
                "img_size": c.image_size, "patch_size": c.patch_size, "embed_dim": N, "depth": c.depth, "num_heads": c.heads,
                "mlp_ratio": c.mlp_ratio, "reg_tokens": c.registers, "no_embed_class": not c.cls_position, "num_classes": 0,
                "init_values": 1e-5 if c.layer_scale else None}
            config["pretrained_cfg"] = config.get("pretrained_cfg", {}) | {
                "input_size": [3, c.image_size, c.image_size], "fixed_input_size": True, "interpolation": c.interpolation,
                "mean": c.mean, "std": c.std, "num_classes": 0, "first_conv": "patch_embed.proj", "classifier": "head"}
        else:
            config |= {"architectures": [CLASSES[c.layout]], "model_type": c.layout, "image_size": c.image_size,
                       "patch_size": c.patch_size, "hidden_size": N, "num_hidden_layers": c.depth,
                       "num_attention_heads": c.heads, "layer_norm_eps": c.eps, "hidden_act": "gelu", "num_channels": 3,
                       "qkv_bias": True}
            config |= {"intermediate_size": round(N * c.mlp_ratio)} if c.layout == "vit" else {"mlp_ratio": round(c.mlp_ratio)}
            config |= {"num_register_tokens": c.registers} if c.registers else {}
            data.write_json(Path(folder, "preprocessor_config.json"), {
                "image_processor_type": "ViTImageProcessor", "size": {"height": c.image_size, "width": c.image_size},
                "resample": PILLOW_FILTER[c.interpolation], "image_mean": c.mean, "image_std": c.std})
        data.write_weights(folder, config, state, "model.safetensors")


def native_names(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """A checkpoint's tensors under our names, and the layout that its names were of."""
    anchor = next((key for key in state if key.endswith("cls_token")), "cls_token")
    prefix = anchor.removesuffix("cls_token").removesuffix("embeddings.")  # `vit.`; what lies beside it is a head for some task
    state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    find = lambda part: any(part in key for key in state)
    layout = "timm" if not find("embeddings.") else "dinov2_with_registers" if find("register_tokens") else "dinov2" if find(
        "layer_scale1") else "vit"
    named = {}
    for key, value in state.items() if layout != "timm" else ():
        for new, old in NEW:
            key = re.sub(new, old, key)
        for ours, theirs in PAIRS[layout]:
            key = key.replace(theirs, ours)
        named[key] = value
    for key in [key for key in named if ".attn.q." in key]:
        parts = [key.replace(".q.", f".{letter}.") for letter in "qkv"]
        if all(part in named for part in parts):  # (N, N) three times -> (3N, N)
            named[key.replace(".q.", ".qkv.")] = torch.cat([named.pop(part) for part in parts])
    if layout == "vit":
        named.pop("mask_token", None)  # of a masked-image-modelling checkpoint; ViTModel has none
    return named or state, layout


def read_config(raw: dict, state: dict[str, Tensor], layout: str, source) -> ViTConfig:
    """A config.json of transformers or timm ({} for none) and the tensors under our names -> ViTConfig."""
    ffn = [state[key] for key in ("blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight") if key in state]
    is_gated = len(ffn) == 2 and len(ffn[0]) != ffn[1].shape[1]
    if raw.get("use_swiglu_ffn") or raw.get("hidden_act", "gelu") != "gelu" or is_gated:
        raise UserError(f"{source} has a SwiGLU or other feed-forward layer, as DINOv2-giant; expected the exact GELU of the "
                        "small, base and large models: take one of those")
    d = ViTConfig()
    size = lambda key, axis, default: state[key].shape[axis] if key in state and state[key].ndim > axis else default
    shown, args, processor = raw.get("pretrained_cfg", {}), raw.get("model_args", {}), raw.get("preprocessor", {})
    width = raw.get("hidden_size") or size("cls_token", 2, d.hidden_size)
    patch = raw.get("patch_size") or size("patch_embed.proj.weight", 2, d.patch_size)
    positions, depths = size("pos_embed", 1, 197), [int(key.split(".")[1]) for key in state if re.match(r"blocks\.\d+\.", key)]
    ratio = raw.get("intermediate_size", 0) / width or raw.get("mlp_ratio")
    usual = {2: "bilinear", 3: "bicubic"}.get(processor.get("resample"), "bilinear" if layout == "vit" else "bicubic")
    return ViTConfig(
        layout=layout, patch_size=patch, hidden_size=width, image_size=raw.get("image_size") or math.isqrt(positions) * patch,
        depth=raw.get("num_hidden_layers") or max(depths, default=d.depth - 1) + 1,
        heads=raw.get("num_attention_heads") or args.get("num_heads") or max(1, width // 64),
        mlp_ratio=ratio or size("blocks.0.mlp.fc1.weight", 0, 4 * width) / width,
        registers=size("reg_token", 1, 0), pooler="pooler.dense.weight" in state, layer_scale="blocks.0.ls1.gamma" in state,
        cls_position=math.isqrt(positions) ** 2 != positions,  # 1 + grid² is never a square
        mask_token="mask_token" in state, eps=raw.get("layer_norm_eps", d.eps if layout == "vit" else 1e-6),
        interpolation=shown.get("interpolation") or usual, mean=shown.get("mean") or processor.get("image_mean") or d.mean,
        std=shown.get("std") or processor.get("image_std") or d.std, source=raw)


def _beside(source, name: str, subfolder: str | None, revision: str | None, offline: bool) -> Path | None:
    """A small file that lies beside the weights of `source`, or None."""
    path = Path(source).expanduser()
    if path.exists():
        file = path.with_name(name) if path.is_file() else path / (subfolder or "") / name
        return file if file.is_file() else None
    return data.hub_file(str(source), "/".join(filter(None, [subfolder, name])), revision, offline)


# ---- Self-distillation from scratch (Caron et al. 2021) -------------------------------------------------------------------


@dataclass(frozen=True)
class DinoSettings:
    """How `train_dino` trains. The paper takes DINO's public weights; these are for the presets that download nothing."""

    steps: int = 300
    batch: int = 32  # images in all, over the ranks
    lr: float = 1e-3  # peak, for this batch; linear warm-up over the first 10 % of the steps, then a cosine to lr / 100
    weight_decay: tuple[float, float] = (0.04, 0.04)  # from, to, by a cosine
    momentum: float = 0.95  # of the teacher's moving average, to 1 by a cosine
    student_temperature: float = 0.1
    teacher_temperature: tuple[float, float] = (0.04, 0.04)  # from, to, linearly over the first 30 % of the steps
    head_hidden: int = 256
    head_bottleneck: int = 64
    out_dim: int = 256  # K, prototypes
    global_size: int = 48  # pixels of the two global crops
    global_scale: tuple[float, float] = (0.7, 1.0)  # share of the image's area
    local_crops: int = 2
    local_size: int = 24
    local_scale: tuple[float, float] = (0.3, 0.7)  # CHOICE: large, or a finding is in few views of its image and is unlearnt
    jitter: float = 0.3  # strength of gamma and blur
    frozen: float = 1.0  # share of the steps in which the prototypes stay as they are. CHOICE: all; let go, they become one
    clip: float = 3.0  # largest gradient norm
    seed: int = 0


class Head(nn.Module):
    """(B, N) -> cosines with K prototypes (B, K): an MLP, standardised over the batch, and a last layer of unit rows.

    CHOICE: chest X-rays are so alike that what their features share would outweigh what tells them apart, and both networks
    would agree on that; standardising (batch norm without parameters) takes it out. `average`: over the ranks, differentiable.
    """

    def __init__(self, width: int, s: DinoSettings):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, s.head_hidden), nn.GELU(), nn.Linear(s.head_hidden, s.head_hidden), nn.GELU(),
                                 nn.Linear(s.head_hidden, s.head_bottleneck))
        self.last = nn.Linear(s.head_bottleneck, s.out_dim, bias=False)
        start_weights(self)

    def forward(self, x: Tensor, average: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
        x = self.mlp(x)
        with torch.autocast(x.device.type, enabled=False):  # cosines are divided by 0.04: bf16's three digits are too few
            x = x.float() - average(x.float().mean(0))
            x = x / (average(x.square().mean(0)) + 1e-6).sqrt()
            return F.normalize(x, dim=-1) @ F.normalize(self.last.weight, dim=-1).T  # weight norm with g = 1


def crop(images: Tensor, size: int, scale: tuple[float, float], jitter: float, *draw) -> Tensor:
    """images (b, H, W) uint8 -> one random view of each, (b, 1, size, size) in [0, 1]. `draw`: integers, (b,) numbers.

    A resized crop of an area in `scale`, then gamma, a contrast and a brightness, and a blur (or sharpening).
    CHOICE: no flip, for the heart is on the left; no solarisation, for an inverted X-ray is another modality.
    TRAP: exposure shows in any crop of an X-ray, so a network that only reads it off solves the task; jitter around the film's
    own contrast and brightness leaves it readable. So both are drawn anew, whatever they were.
    """
    u = torch.from_numpy(uniforms(9, *draw)).float().to(images.device).T.reshape(9, -1, 1, 1, 1)
    signed = lambda i, strength: jitter * strength * (2 * u[i] - 1)
    area, stretch = scale[0] + (scale[1] - scale[0]) * u[0], (4 / 3) ** (u[1] - 0.5)
    w, h = (area.sqrt() * stretch).clamp(max=1), (area.sqrt() / stretch).clamp(max=1)
    zero = torch.zeros_like(w)
    theta = torch.cat([w, zero, (1 - w) * (2 * u[2] - 1), zero, h, (1 - h) * (2 * u[3] - 1)], dim=1).view(-1, 2, 3)
    x = F.grid_sample(images[:, None].float() / 255, F.affine_grid(theta, (len(images), 1, size, size), align_corners=False),
                      padding_mode="border", align_corners=False)
    x = x.clamp(1e-4, 1) ** (2 ** signed(4, 1.5))
    deviation, mean = torch.std_mean(x, dim=(1, 2, 3), keepdim=True)
    x = (x - mean) / (deviation + 0.02) * (0.1 + 0.25 * u[5]) + 0.3 + 0.4 * u[6]
    return (x + (F.avg_pool2d(x, 3, 1, 1, count_include_pad=False) - x) * (2 * jitter * (1.5 * u[7] - 0.5))).clamp(0, 1)


def train_dino(config: ViTConfig, settings: DinoSettings, get_batch: Callable[[int], Tensor], folder, device="cpu",
               rank: int = 0, world: int = 1, log: Callable[[dict], None] = lambda row: None, save_every: int = 250,
               should_stop: Callable[[], bool] = lambda: False) -> ViT | None:
    """Train a ViT without labels and save the teacher to `folder`; a killed run goes on from the last saved step, bit for bit.

    The student sees global and local views and is to guess the teacher's output for the other global views; the teacher is the
    student's moving average, its output centred (no prototype may always win) and sharpened (nor may all be equal).
    get_batch(step) -> uint8 (batch / world, S, S): this rank's slice, in order, of global batch `step`. Every random number is
    a function of (seed, step, place in the global batch), so any number of ranks draws the same. `should_stop()` is asked after
    every step; when it says so, the state is saved and None returned.
    """
    s, folder, kind = settings, Path(folder), torch.device(device).type
    torch.manual_seed(s.seed)
    student = nn.ModuleDict({"vit": ViT(config), "head": Head(config.hidden_size, s)}).to(device)
    teacher = copy.deepcopy(student).requires_grad_(False)
    both = nn.ModuleDict({"student": student, "teacher": teacher})
    parameters = [p for name, p in student.named_parameters() if "pooler" not in name]  # all that the loss reaches
    optimizer = torch.optim.AdamW([{"params": [p for p in parameters if p.ndim > 1]},
                                   {"params": [p for p in parameters if p.ndim == 1]}])
    file, start = folder.with_name(folder.name + ".training.safetensors"), 0
    plan = json.loads(json.dumps({"vit": dataclasses.asdict(config), "settings": dataclasses.asdict(s)}))
    if file.is_file():
        tensors, info = load_state(file)
        if info["plan"] != plan:
            raise UserError(f"{file} is of a run with other settings: give the same ones, or remove it to start anew")
        both.load_state_dict({k: v for k, v in tensors.items() if not k.startswith("optimizer.")})
        restore_optimizer(optimizer, tensors)
        start = info["step"]
    save = lambda step: rank == 0 and save_state(file, both.state_dict() | optimizer_tensors(optimizer),
                                                 {"step": step, "plan": plan})
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (config.mean, config.std))
    cosine = lambda start, end, at: end + (start - end) * 0.5 * (1 + math.cos(math.pi * at))

    average = lambda x: torch.distributed.nn.functional.all_reduce(x) / world if world > 1 else x  # differentiable

    bar = progress(desc="DINO", total=s.steps, initial=start, unit="step")
    for step in range(start, s.steps):
        began, at = time.monotonic(), step / s.steps
        for group, decay in zip(optimizer.param_groups, (cosine(*s.weight_decay, at), 0.0)):  # none on biases and norms
            group["lr"], group["weight_decay"] = s.lr * min(1.0, (step + 1) / (0.1 * s.steps)) * cosine(1, 0.01, at), decay
        images = get_batch(step).to(device)
        rows = rank * len(images) + np.arange(len(images))
        shapes = [(s.global_size, s.global_scale)] * 2 + [(s.local_size, s.local_scale)] * s.local_crops
        views = [crop(images, *shape, s.jitter, s.seed, step, view, rows) for view, shape in enumerate(shapes)]
        views = [(torch.cat(part).expand(-1, 3, -1, -1) - mean) / std for part in (views[:2], views[2:]) if part]

        with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
            with torch.no_grad():
                cls = teacher["vit"](views[0])[:, 0]  # (2b, N)
                out = teacher["head"](cls, average)  # (2b, K)
                out = out - average(out.mean(0))
            guesses = torch.cat([student["head"](student["vit"](part)[:, 0], average) for part in views])
        low, high = s.teacher_temperature
        target = (out / (low + (high - low) * min(1.0, at / 0.3))).softmax(-1)
        guesses = (guesses / s.student_temperature).log_softmax(-1).chunk(2 + s.local_crops)  # each (b, K)
        pairs = [(t, g) for i, t in enumerate(target.chunk(2)) for j, g in enumerate(guesses) if i != j]
        loss = sum(-(t * g).sum(-1).mean() for t, g in pairs) / len(pairs)  # H(teacher, student) [DINO eq.3]

        optimizer.zero_grad()
        loss.backward()
        if at < s.frozen:
            student["head"].last.weight.grad = None
        used = [p for p in parameters if p.grad is not None]
        if world > 1:
            flat = average(torch.cat([p.grad.flatten() for p in used]))
            for p, gradient in zip(used, flat.split([p.numel() for p in used])):
                p.grad.copy_(gradient.view_as(p))
        norm = nn.utils.clip_grad_norm_(used, s.clip)
        optimizer.step()
        with torch.no_grad():
            for old, new in zip(teacher.parameters(), student.parameters()):
                old.lerp_(new, 1 - cosine(s.momentum, 1, at))
            entropy = -(target * target.clamp_min(1e-12).log()).sum(-1).mean()
            loss, entropy = average(torch.stack([loss, entropy])).tolist()
            mean_cls, power = average(cls.float().mean(0)), average(cls.float().square().sum(1).mean())
            spread = (1 - mean_cls.square().sum() / power).clamp_min(0).sqrt().item()
        if not math.isfinite(loss):
            raise UserError(f"DINO's loss became {loss} at step {step + 1}: take a smaller lr than {s.lr}")
        # Collapse shows as a teacher_entropy of 0 or ln K, or as a feature_spread (deviation / root mean square) of 0.
        log({"stage": "vit", "step": step + 1, "loss": loss, "lr": optimizer.param_groups[0]["lr"], "grad_norm": norm.item(),
             "teacher_entropy": entropy, "feature_spread": spread,
             "images_per_s": len(images) * world / (time.monotonic() - began)})
        bar.set_postfix_str(f"loss {loss:.3f}, entropy {entropy:.2f}, spread {spread:.2f}", refresh=False)
        bar.update()
        if should_stop():
            save(step + 1)
            return None
        if (step + 1) % save_every == 0:
            save(step + 1)
    bar.close()
    # CHOICE: the final norm is rescaled so that the tokens' every dimension has mean 0 and deviation 1 over the images. A young
    # DINO sees all chests as nearly alike, and the UNet would need long to find the little by which its tokens differ.
    vit = teacher["vit"].eval()
    with torch.no_grad():
        cls = torch.cat([vit(vit.prepare(to_model(get_batch(step).to(device))))[:, 0] for step in range(s.steps, s.steps + 16)])
        centre, power = average(cls.mean(0)), average(cls.square().mean(0))
        scale = (power - centre**2).clamp(min=1e-8).rsqrt()
        vit.norm.bias.copy_((vit.norm.bias - centre) * scale)
        vit.norm.weight.mul_(scale)
    if rank == 0:
        partial = folder.with_name(folder.name + ".partial")
        teacher["vit"].save_pretrained(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)  # whole or absent
        file.unlink(missing_ok=True)
    return vit


def knn_probe(features: Tensor, labels: np.ndarray, patients: list[str], neighbours: int = 20, folds: int = 5) -> dict:
    """How much frozen features (n, N) know of findings (n, F) bool: {"knn": AUC, "linear": AUC}, means over the findings.

    Cross-validated, no patient on both sides, on standardised features: cosine k-NN and logistic regression. 0.5 is chance.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import GroupKFold
    features, findings = np.asarray(features, dtype=np.float64).reshape(len(labels), -1), range(labels.shape[1])
    scores = {name: np.zeros(labels.shape) for name in ("knn", "linear")}
    for train, test in GroupKFold(folds).split(features, groups=patients):
        x = (features - features[train].mean(0)) / (features[train].std(0) + 1e-6)
        unit = x / np.linalg.norm(x, axis=1, keepdims=True)
        scores["knn"][test] = labels[train][np.argsort(-unit[test] @ unit[train].T, axis=1)[:, :neighbours]].mean(1)
        for f in findings:
            model = LogisticRegression(C=0.1, max_iter=500).fit(x[train], labels[train, f])
            scores["linear"][test, f] = model.decision_function(x[test])
    return {name: float(np.mean([roc_auc_score(labels[:, f], s[:, f]) for f in findings])) for name, s in scores.items()}


if __name__ == "__main__":
    with torch.device("meta"):  # shapes without numbers
        module_table("DINOv1 ViT-B/16: x (1, 3, 224, 224) -> tokens [CLS, patches]", ViT(), torch.empty(1, 3, 224, 224))
    small = ViT(ViTConfig(image_size=32, patch_size=8, hidden_size=32, depth=2, heads=2, registers=2, pooler=True)).eval()
    maps, x = [], small.prepare(torch.rand(2, 3, 48, 48) * 2 - 1)
    tokens = small(x, maps)
    assert tokens.shape == (2, 1 + 1 + 2 + 16, 32) and small.global_tokens(x).shape == (2, 4, 32)
    assert torch.allclose(tokens, small(x), atol=1e-5) and all(torch.allclose(m.sum(-1), torch.ones(2, 2, 19)) for m in maps)
    print("self-check: CLS, pooler, registers and patches are in their places; explicit attention agrees with the fused kernel")
