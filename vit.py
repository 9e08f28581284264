"""The DINO vision transformer that turns an image into the condition c (paper 2.3): DINOv1, DINOv2
with and without registers, RAD-DINO; and training a small one by self-distillation.

Weights come from the hub: `facebook/dino-vitb16` (the paper's DINOv1), `microsoft/rad-dino`, or
`timm/vit_base_patch14_reg4_dinov2.lvd142m` (the paper's DINOv2). Modules are named as in timm.

    python vit.py                              table of modules with shapes, and a self-check

    x (B, 3, H, W) ─ patch_embed ─ + positions ─ cat [CLS, REG, patches] ─ blocks ─ norm ─ tokens
    c_GLB = [c_CLS, c_PLR = tanh(dense(c_CLS)) where there is one, c_REG × R], the condition; c_LCL
"""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
from data import UserError


def pairs(table: str) -> list[list[str]]:
    return [pair.split("=") for pair in table.split()]


# Names of tensors: transformers' files' = ours, which are timm's. Replaced from left to right.
# TRAP: `attention.output.dense` holds `output.dense`, so it comes before it.
BOTH = """
    encoder.layer.=blocks.  embeddings.patch_embeddings.projection=patch_embed.proj
    attention.attention.query.=attn.q.   embeddings.position_embeddings=pos_embed
    attention.attention.key.=attn.k.     embeddings.cls_token=cls_token
    attention.attention.value.=attn.v.   embeddings.mask_token=mask_token
    attention.output.dense.=attn.proj.   layernorm.=norm. """
DINOV1 = """
    layernorm_before.=norm1.             intermediate.dense.=mlp.fc1.
    layernorm_after.=norm2.              output.dense.=mlp.fc2. """
DINOV2 = """
    layer_scale1.lambda1=ls1.gamma       embeddings.register_tokens=reg_token
    layer_scale2.lambda1=ls2.gamma """
MEMORY = pairs("""
    attention.q_proj.=attn.q.            attention.v_proj.=attn.v.           layers.=blocks.
    attention.k_proj.=attn.k.            attention.o_proj.=attn.proj. """)  # transformers 5, loaded
NAMES = {"dinov2_with_registers": pairs(BOTH + DINOV2), "dinov2": pairs(BOTH + DINOV2),
         "vit": pairs(BOTH + DINOV1), "timm": []}
MARKS = ["register_tokens", "layer_scale1", "embeddings.", ""]  # the first one found tells which
# Keys of config.json = ViTConfig's attributes: transformers', and timm's in its `model_args`.
FIELDS = dict(pairs("""
    image_size=image_size    num_hidden_layers=depth         layer_norm_eps=eps
    patch_size=patch_size    num_attention_heads=heads       intermediate_size=mlp_size
    hidden_size=hidden_size  num_register_tokens=registers   mlp_ratio=mlp_ratio
    model_type=layout        hidden_act=activation """))
TIMM_FIELDS = dict(pairs("""
    img_size=image_size      patch_size=patch_size           embed_dim=hidden_size
    depth=depth  num_heads=heads  reg_tokens=registers       mlp_ratio=mlp_ratio """))
# What no tensor tells
TOLD = dict(pairs("""
    num_attention_heads=heads  image_mean=mean  image_std=std  layer_norm_eps=eps
    num_heads=heads            mean=mean        std=std        interpolation=interpolation """))
RESAMPLE = ["nearest", "lanczos", "bilinear", "bicubic"]  # by Pillow's numbers for them


@dataclass
class ViTConfig:
    """What a checkpoint is, whatever wrote it; the defaults are `facebook/dino-vitb16`."""

    layout: str = "vit"  # whose names its file has: a key of NAMES
    image_size: int = 224  # pixels; the side that the position embedding was trained for
    patch_size: int = 16  # pixels
    hidden_size: int = 768  # width N of a token
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4
    registers: int = 0  # R
    pooler: bool = False  # TRAP: public DINOv1 has none; transformers makes one of random numbers
    layer_scale: bool = False
    cls_position: bool = True  # TRAP: timm's DINOv2-reg4 has no position for CLS, the others do
    eps: float = 1e-12  # of LayerNorm. TRAP: transformers' for DINOv1; all others have 1e-6
    interpolation: str = "bilinear"  # of `prepare`; DINOv2 has bicubic
    mean: tuple = (0.485, 0.456, 0.406)  # of ImageNet's RGB in [0, 1]
    std: tuple = (0.229, 0.224, 0.225)
    activation = "gelu"  # no field, for it is the same in every ViT here

    @property
    def mlp_size(self) -> int:
        return round(self.hidden_size * self.mlp_ratio)

    @property
    def global_count(self) -> int:
        """S: how many global tokens there are, 1 [+ 1 pooler token] + R."""
        return 1 + self.pooler + self.registers


# ---- The vision transformer (paper 2.3) ----


class Attention(nn.Module):
    def __init__(self, config: ViTConfig):
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v)  # (B, heads, S, N / heads)
        return self.proj(out.transpose(1, 2).flatten(2))


class LayerScale(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), 1e-5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    def __init__(self, config: ViTConfig):
        super().__init__()
        N = config.hidden_size
        scale = LayerScale if config.layer_scale else nn.Identity
        self.norm1 = nn.LayerNorm(N, config.eps)
        self.attn = Attention(config)
        self.ls1 = scale(N)
        self.norm2 = nn.LayerNorm(N, config.eps)
        self.mlp = data.named(
            fc1=nn.Linear(N, config.mlp_size), act=nn.GELU(), fc2=nn.Linear(config.mlp_size, N))
        self.ls2 = scale(N)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class ViT(nn.Module):
    """f_Φ: image -> tokens c; the global ones, c_GLB = [c_CLS, c_PLR, c_REG], are the condition."""

    def __init__(self, config: ViTConfig = ViTConfig()):
        super().__init__()
        self.config = config
        N = config.hidden_size
        P = config.patch_size
        R = config.registers
        pooler = data.named(dense=nn.Linear(N, N), tanh=nn.Tanh())
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, N))
        self.reg_token = nn.Parameter(0.02 * torch.randn(1, R, N)) if R else None
        # Nothing here uses the mask token: it is kept so that DINOv2's file can be written back.
        self.register_buffer("mask_token", torch.zeros(1, N) if "dinov2" in config.layout else None)
        # CHOICE: 0.3, not 0.02, else a short training does not see where things are.
        positions = config.cls_position + (config.image_size // P) ** 2
        self.pos_embed = nn.Parameter(0.3 * torch.randn(1, positions, N))
        self.patch_embed = data.named(proj=nn.Conv2d(3, N, P, stride=P))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(N, config.eps)
        self.pooler = pooler if config.pooler else None

    def normalise(self, x: Tensor) -> Tensor:
        """x (B, 1 or 3, H, W) in [0, 1] -> (B, 3, H, W) as `forward` takes it."""
        # Plain numbers: a tensor of them would make the CPU wait for its way to the GPU.
        channels = x.expand(-1, 3, -1, -1).unbind(1)
        return torch.stack([(channel - mean) / std for channel, mean, std in zip(
            channels, self.config.mean, self.config.std)], dim=1)

    def prepare(self, x: Tensor) -> Tensor:
        """x (B, 3, H, W) in [-1, 1] -> (B, 3, S, S) for `forward`; CHOICE: whole, not cropped."""
        S = self.config.image_size
        x = F.interpolate(x, (S, S), mode=self.config.interpolation, antialias=True)
        return self.normalise((x.clamp(-1, 1) + 1) / 2)  # TRAP: bicubic overshoots black and white

    def forward(self, x: Tensor) -> Tensor:
        """x (B, 3, H, W) normalised -> tokens (B, 1 [+ 1] + R + L, N) after the final norm: CLS,
        PLR, REG, patches; L = (H // P) * (W // P). [Dosovitskiy 2021; Darcet 2024]
        """
        patches = self.patch_embed(x)  # (B, N, H/P, W/P)
        c = self.config
        grid = c.image_size // c.patch_size
        positions = self.pos_embed[:, c.cls_position:].mT.unflatten(2, (grid, grid))
        # TRAP: all are bicubic, but transformers smooths for registers alone and timm always, and
        # only DINOv1 is resampled in its own precision.
        positions = F.interpolate(
            positions if c.layout == "vit" else positions.float(), patches.shape[2:],
            mode="bicubic", antialias=c.layout in ("timm", "dinov2_with_registers"))
        patches = patches + positions.to(self.pos_embed.dtype)
        prefix = self.cls_token
        if c.cls_position:
            prefix = prefix + self.pos_embed[:, :1]
        if self.reg_token is not None:  # TRAP: registers have no position
            prefix = torch.cat([prefix, self.reg_token], dim=1)
        prefix = prefix.expand(len(x), -1, -1).to(patches.dtype)
        x = torch.cat([prefix, patches.flatten(2).mT], dim=1)  # (B, 1 + R + L, N)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        if self.pooler is None:
            return x
        return torch.cat([x[:, :1], self.pooler(x[:, :1]), x[:, 1:]], dim=1)

    def global_tokens(self, x: Tensor) -> Tensor:
        """x (B, 3, H, W) normalised -> c_GLB = [CLS, PLR where there is one, REG × R] (B, S, N)."""
        # Patch tokens do not condition: they carry local detail, so a model that sees them learns
        # to copy its source image instead of what the image means [DiNO-Diff 2.3, A.1].
        return self(x)[:, :self.config.global_count]

    @classmethod
    def from_pretrained(cls, source, subfolder=None, revision=None) -> ViT:
        """A folder, weights file or hub id -> ViT in float32; UserError says what does not fit."""
        told, state, preprocessor = data.read_weights(source, subfolder, revision)
        try:
            named, layout = our_names(state)
            config = read_config(told, preprocessor, named, layout)
        except Exception as error:  # a stranger's file can be odd in any way: say how
            raise UserError(f"{source} is no ViT, or its config.json is another's: {error!r}; "
                            f"found the tensors {list(state)[:4]} …") from None
        with torch.device("meta"):
            model = cls(config)
        return data.load_weights(model, named, source)

    def save_pretrained(self, folder) -> None:
        """Write what `from_pretrained` and the layout's own library read: three files."""
        c = self.config
        S = c.image_size
        names = TIMM_FIELDS if c.layout == "timm" else FIELDS
        config = {key: getattr(c, name) for key, name in names.items()}
        if c.layout == "timm":
            config |= {"num_classes": 0, "no_embed_class": not c.cls_position,
                       "init_values": 1e-5 if c.layer_scale else None}
            config = {"architecture": "vit_base_patch16_224", "model_args": config,
                      "pretrained_cfg": {"input_size": [3, S, S], "mean": c.mean, "std": c.std,
                                         "interpolation": c.interpolation}}
        data.write_json(f"{folder}/preprocessor_config.json", {
            "image_processor_type": "ViTImageProcessor", "size": {"height": S, "width": S},
            "image_mean": c.mean, "image_std": c.std, "resample": RESAMPLE.index(c.interpolation)})
        state = their_names(self.state_dict(), c.layout)
        data.write_weights(folder, config, state, "model.safetensors")  # config.json comes last


# ---- Names and sizes ----


def our_names(state: dict) -> tuple[dict, str]:
    """A checkpoint's tensors under our names, and the layout that its names are of."""
    keys = " ".join(state)
    layout = next(name for name, mark in zip(NAMES, MARKS) if mark in keys)
    start = keys.partition("cls_token")[0].split(" ")[-1]
    prefix = start.removesuffix("embeddings.")  # `vit.`, where a head for some task lies beside it
    named = {}
    for key, value in state.items():
        if key.startswith(prefix):
            key = key.removeprefix(prefix)
            for theirs, ours in NAMES[layout] + MEMORY:
                key = key.replace(theirs, ours)
            named[key] = value
    for key in [key for key in named if ".attn.q." in key]:  # (N, N) three times -> (3N, N)
        parts = [named.pop(key.replace(".q.", f".{letter}.")) for letter in "qkv"]
        named[key.replace(".q.", ".qkv.")] = torch.cat(parts)
    return named, layout


def their_names(state: dict, layout: str) -> dict:
    """The inverse of `our_names`: our tensors under the names of the layout's own library."""
    named = {}
    for key, value in state.items():
        letters = "qkv" if ".qkv." in key and layout != "timm" else ["qkv"]
        for letter, part in zip(letters, value.chunk(len(letters))):
            name = key.replace("qkv", letter)
            for theirs, ours in NAMES[layout]:
                name = name.replace(ours, theirs)
            named[name] = part
    return named


def read_config(told: dict, preprocessor: dict, state: dict, layout: str) -> ViTConfig:
    """Sizes from the tensors (under our names), which config.json (`told`) must not contradict; the
    rest from it and preprocessor_config.json.
    """
    for part in (told.get("model_args"), told.get("pretrained_cfg"), preprocessor):
        told = told | (part or {})
    if told.get("resample") is not None:
        told = {"interpolation": RESAMPLE[told["resample"]]} | told
    mlp_size = len(state["blocks.0.mlp.fc1.weight"])
    patch_size = state["patch_embed.proj.weight"].shape[2]
    _, positions, width = state["pos_embed"].shape
    grid = math.isqrt(positions)
    is_v1 = layout == "vit"
    config = ViTConfig(
        layout, grid * patch_size, patch_size, width,
        depth=sum("norm1.weight" in key for key in state), heads=max(1, width // 64),
        mlp_ratio=mlp_size / width if mlp_size % width else mlp_size // width,
        registers=state["reg_token"].shape[1] if "reg_token" in state else 0,
        pooler="pooler.dense.weight" in state, layer_scale="blocks.0.ls1.gamma" in state,
        cls_position=grid**2 != positions,  # 1 + grid² is never a square
        eps=1e-12 if is_v1 else 1e-6, interpolation="bilinear" if is_v1 else "bicubic")
    for key, name in (FIELDS | TIMM_FIELDS | TOLD).items():
        value = told.get(key)
        if key in TOLD and value is not None:
            setattr(config, name, tuple(value) if type(value) is list else value)
        elif value not in (None, getattr(config, name)):
            raise ValueError(f"it says {key} = {value}, the tensors {getattr(config, name)}")
    numbers = (*config.mean, *config.std, config.eps)
    if not (len(config.mean) == len(config.std) == 3 and config.interpolation in RESAMPLE[2:]
            and all(0 <= number <= 1 for number in numbers) and all(numbers[3:])
            and type(config.heads) is int and config.heads > 0 and width % config.heads == 0):
        raise ValueError(f"found {config}")
    return config


# ---- Self-distillation from scratch (Caron et al. 2021) ----


@dataclass(frozen=True)
class DinoSettings:
    """How `train_dino` trains, for the presets that do not take DINO's public weights."""

    steps: int = 300
    batch: int = 32  # images a step
    lr: float = 1e-3  # peak; linear warm-up over the first 10 % of the steps, cosine to lr / 100
    # TRAP: DINO's rule is 5e-4 * batch / 256. Phantoms bear a higher rate; of real X-rays, CLS then
    # forgets where things are, and samples follow it less.
    weight_decay: float = 0.04
    momentum: float = 0.95  # of the teacher's moving average, to 1 by a cosine
    student_temperature: float = 0.1
    teacher_temperature: float = 0.04
    head_hidden: int = 256
    head_bottleneck: int = 64
    out_dim: int = 256  # K, prototypes
    global_size: int = 48  # pixels of the two global crops
    global_scale: tuple = (0.7, 1.0)  # share of the image's area
    local_crops: int = 2
    local_size: int = 24
    # CHOICE: local crops are large, else a finding is in few views of its image and is not learnt.
    local_scale: tuple = (0.3, 0.7)
    jitter: float = 0.3  # strength of gamma and blur
    clip: float = 3.0  # largest gradient norm
    seed: int = 0


class Dino(nn.Module):
    """A ViT and its head: x (B, 3, H, W) normalised -> cosines with prototypes (B, K), CLS (B, N).

    CHOICE: the head standardises over the batch: chest X-rays are so alike that what their features
    share would outweigh what tells them apart. Prototypes stay as drawn: trained, they become one.
    Weights begin as Xavier's; DINO's deviation, 0.02, is near it at width 768, too small at 128.
    """

    def __init__(self, config: ViTConfig, s: DinoSettings):
        super().__init__()
        self.vit = ViT(config)
        self.head = nn.Sequential(
            nn.Linear(config.hidden_size, s.head_hidden), nn.GELU(),
            nn.Linear(s.head_hidden, s.head_hidden), nn.GELU(),
            nn.Linear(s.head_hidden, s.head_bottleneck),
            nn.BatchNorm1d(s.head_bottleneck, 1e-6, affine=False, track_running_stats=False))
        prototypes = F.normalize(torch.randn(s.out_dim, s.head_bottleneck), dim=1)
        self.register_buffer("prototypes", prototypes)
        for module in self.modules():
            if type(module) is nn.Linear:
                nn.init.xavier_normal_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            cls = self.vit(x)[:, 0]
        cls = cls.float()  # the cosines are divided by 0.04: bf16's three digits are too few
        return F.normalize(self.head(cls), dim=1) @ self.prototypes.T, cls


def crops(images: Tensor, count: int, size: int, scale: tuple, jitter: float, rng) -> Tensor:
    """images uint8 (B, H, W) -> `count` views of each, (count * B, 1, size, size) in [0, 1]: a crop
    of an area in `scale`, then gamma, exposure and sharpness, drawn from the generator `rng`.
    """
    # CHOICE: no flip, for the heart is on the left; no solarisation, as inverted X-rays are another
    # modality. TRAP: any crop shows the film's exposure, so a network that only reads it off solves
    # the task, and jitter around the film's own contrast leaves it readable: it is drawn anew.
    device = images.device
    draws = torch.rand(8, count * len(images), 1, 1, 1, device=device, generator=rng)
    area, stretch, left, top, gamma, contrast, light, blur = 2 * draws - 1
    side = ((sum(scale) + (scale[1] - scale[0]) * area) / 2).sqrt()
    stretch = (4 / 3) ** (stretch / 2)
    sides = torch.cat([side * stretch, side / stretch], dim=3).clamp(max=1)  # width, height
    middle = (1 - sides) * torch.cat([left, top], dim=3)
    theta = torch.eye(2, 3, device=device, dtype=torch.float64)  # TRAP: TF32 would round the grid
    whole = F.affine_grid(theta[None], (1, 1, size, size), False).float()
    x = images[:, None].float().repeat(count, 1, 1, 1) / 255
    x = F.grid_sample(x, whole * sides + middle, padding_mode="border", align_corners=False)
    x = x.clamp(1e-4, 1) ** (2 ** (1.5 * jitter * gamma))
    deviation, mean = torch.std_mean(x, dim=(2, 3), keepdim=True)
    x = (x - mean) / (deviation + 0.02) * (0.225 + 0.125 * contrast) + 0.5 + 0.2 * light
    blurred = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    return (x + (blurred - x) * jitter * (0.5 + 1.5 * blur)).clamp(0, 1)


def dino_loss(targets: Tensor, cosines: Tensor, s: DinoSettings) -> Tensor:
    """Mean cross-entropy H(teacher, student) over the pairs of different views [DINO eq. 3], for
    targets (2B, K) of the global views and cosines (V * B, K) of all V views, global ones first.
    """
    views = 2 + s.local_crops
    guesses = (cosines / s.student_temperature).log_softmax(1).view(views, -1)  # (V, B * K)
    pairs = targets.view(2, -1) @ guesses.T  # (2, V)
    return (pairs.diagonal().sum() - pairs.sum()) / (len(targets) * (views - 1))


@torch.no_grad()
def standardise(vit: ViT, batches, device) -> None:
    """Rescale the final norm so that each dimension of CLS has mean 0 and deviation 1. CHOICE: a
    young DINO sees all chests as nearly alike, and the UNet needs what little tells them apart.
    """
    cls = [vit(vit.prepare(data.to_model(images.to(device))))[:, 0] for _, _, images in batches]
    deviation, mean = torch.std_mean(torch.cat(cls), dim=0)
    deviation = deviation.clamp(min=1e-4)
    vit.norm.bias.sub_(mean).div_(deviation)
    vit.norm.weight.div_(deviation)


def train_dino(config: ViTConfig, settings: DinoSettings, ds, device="cpu", log=print,
               workers=0) -> ViT:
    """Train a ViT without labels on the images of `ds` -> the teacher, in eval mode. The student
    sees all crops and is to guess what the teacher, its own moving average, says of other ones.

    A function of its arguments: killed, it starts again and gives the same weights. `log` gets a
    dict a step; collapse shows in it as a teacher_entropy of 0 or ln K, or a feature_spread of 0.
    A step that is not finite changes nothing, and `skipped` names images of it; `log` may end the
    training by an error.
    """
    s = settings
    torch.manual_seed(s.seed)
    student = Dino(config, s).to(device)
    teacher = copy.deepcopy(student).requires_grad_(False)
    weights = list(student.parameters())
    optimizer = torch.optim.AdamW(weights, weight_decay=s.weight_decay, fused=True)
    stream = data.batches(ds, s.batch, 0, s.seed, workers=workers)
    for step, ids, images in data.progress(
            itertools.islice(stream, s.steps), "DINO", s.steps, "step"):
        falling = 0.5 * (1 + math.cos(math.pi * step / s.steps))  # half a cosine, from 1 to 0
        lr = s.lr * min(1.0, 10 * (step + 1) / s.steps) * (0.01 + 0.99 * falling)
        optimizer.param_groups[0]["lr"] = lr
        images = images.to(device)
        rng = data.generator(device, s.seed, step)
        views = [crops(images, 2, s.global_size, s.global_scale, s.jitter, rng),
                 crops(images, s.local_crops, s.local_size, s.local_scale, s.jitter, rng)]
        views = [student.vit.normalise(view) for view in views]
        with torch.no_grad():
            cosines, cls = teacher(views[0])  # of the global views alone
        # Centred: no prototype always wins; sharpened: they are not all equal [DINO 3.1].
        targets = ((cosines - cosines.mean(0)) / s.teacher_temperature).softmax(1)  # (2B, K)
        loss = dino_loss(targets, torch.cat([student(view)[0] for view in views]), s)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(weights, s.clip)
        spread = cls.std(0).norm() / cls.square().sum(1).mean().sqrt()
        row = {"stage": "vit", "step": step + 1, "loss": loss.item(), "lr": lr,
               "grad_norm": norm.item(), "feature_spread": spread.item(),
               "teacher_entropy": torch.special.entr(targets).sum(1).mean().item()}
        if math.isfinite(row["loss"] + row["grad_norm"]):
            optimizer.step()
            for mean, weight in zip(teacher.parameters(), weights):  # the teacher follows
                mean.lerp_(weight.detach(), (1 - s.momentum) * falling)
        else:
            row["skipped"] = [ds.keys[i] for i in ids[:8].tolist()]
        log(row)
    standardise(teacher.vit.eval(), itertools.islice(stream, 16), device)
    return teacher.vit


if __name__ == "__main__":
    with torch.device("meta"):  # shapes without numbers
        data.module_table("DINOv1 ViT-B/16: x -> tokens", ViT(), torch.empty(1, 3, 224, 224))
    vit = ViT(ViTConfig(image_size=32, patch_size=8, hidden_size=32, depth=2, heads=2, pooler=True))
    tokens = vit(torch.rand(2, 3, 48, 48))
    assert tokens.shape == (2, 1 + 1 + 36, 32) and tokens.isfinite().all()
    print("self-check: CLS, pooler and patches are there")
