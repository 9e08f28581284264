"""DiNO-Diffusion: a latent diffusion model of chest X-rays, conditioned on the global tokens of a frozen DINO of the image itself.

    python dinodiff.py train                                      the whole thing in miniature, in minutes, nothing downloaded
    torchrun --nproc_per_node=4 dinodiff.py train                 the same on four processes (GPUs, or cores of one CPU)
    torchrun --nproc_per_node=4 -- dinodiff.py train --preset paper --data 'shards/*.tar' --run runs/x
    python dinodiff.py sample --run runs/tiny --images a.png b.png --mode interpolate --out out
    python dinodiff.py cache --run runs/x --data 'shards/*.tar'   latents and tokens once, for `train --cache`
    python dinodiff.py bench                                      FLOPs, times and memory of each part on this machine

Implements paper 2.2 (latent diffusion), 2.3 (conditioning), 2.5 (training). The symbols, here and in every file:

    x   image, pixels in [-1, 1]      (B, 3, H, W)     t          timestep, int in [0, 1000)
    z0  its scaled latent             (B, 4, h, w)     alpha_bar  share of z0's variance that is left in zt
    eps Gaussian noise                (B, 4, h, w)     c          condition: tokens of DINO, S of width N   (B, S, N)
    zt  z0 with noise of step t       (B, 4, h, w)     B, S, N    images in a batch, tokens, token width

    x ──► VAE encoder ──► z0 ──► zt = √ᾱ z0 + √(1-ᾱ) eps ──► UNet(zt, t, c) ──► eps_hat      loss: |eps - eps_hat|²
    x ──► DINO ──► c = [CLS, PLR, REG] (frozen) ──────────────────┘
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import data
from data import (UserError, generator, load_state, optimizer_tensors, progress, restore_optimizer, save_state, to_model,
                  write_json)
from unet import CROSS, UNet, UNetConfig
from vae import VAE, VAEConfig, VAESettings, train_vae
from vit import DinoSettings, ViT, ViTConfig, train_dino

# ---- Noise schedule (paper 2.2) -------------------------------------------------------------------------------------------


class Schedule:
    """The `scaled_linear` schedule of Stable Diffusion: √β runs linearly from √0.00085 to √0.012 in 1000 steps."""

    def __init__(self, T: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012):
        self.T = T
        self.beta = torch.linspace(beta_start**0.5, beta_end**0.5, T, dtype=torch.float64) ** 2  # β_t
        self.alpha_bar = torch.cumprod(1 - self.beta, dim=0)  # ᾱ_t = Π (1 - β_s), (1000,) float64

    def add_noise(self, z0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """zt = √ᾱ_t z0 + √(1 - ᾱ_t) eps [DDPM eq.4]; z0 and eps (B, ...), t (B,) int."""
        alpha_bar = self.alpha_bar.to(z0.device)[t].view(-1, *[1] * (z0.ndim - 1))
        return alpha_bar.sqrt().to(z0.dtype) * z0 + (1 - alpha_bar).sqrt().to(z0.dtype) * eps

    def timesteps(self, steps: int) -> list[int]:
        """`steps` timesteps, descending: 'leading' spacing with offset 1, so that 50 steps are 981, 961, …, 1."""
        if not 1 <= steps <= self.T:
            raise UserError(f"found {steps} sampling steps, expected 1 to {self.T}")
        stride = self.T // steps
        return [i * stride + (stride > 1) for i in reversed(range(steps))]  # with all T steps there is no room for the offset


# ---- Samplers -------------------------------------------------------------------------------------------------------------


def _randn(like: Tensor, generator: torch.Generator | list[torch.Generator] | None) -> Tensor:
    """Noise of the shape of `like`, from one generator or from one a row."""
    draw = lambda shape, g: torch.randn(shape, generator=g, device=g.device if g else like.device, dtype=like.dtype).to(like.device)
    return torch.stack([draw(like.shape[1:], g) for g in generator]) if isinstance(generator, list) else draw(like.shape, generator)


@torch.no_grad()
def ddim_sample(model: Callable[[Tensor, Tensor], Tensor], zT: Tensor, steps: int, schedule: Schedule, eta: float = 0.0,
                generator: torch.Generator | list[torch.Generator] | None = None) -> Tensor:
    """DDIM [Song et al. 2021, eq.12]: zT ~ N(0, 1) (B, 4, h, w) -> z0. model(zt, t (B,)) -> eps.

    eta 0 is deterministic, 1 has DDPM's variance. A list of generators gives each row noise of its own.
    """
    zt = zT
    for t in schedule.timesteps(steps):
        previous = t - schedule.T // steps
        a = float(schedule.alpha_bar[t])
        a_prev = float(schedule.alpha_bar[max(previous, 0)])  # TRAP: the last step goes to ᾱ_0 = 0.99915, never to ᾱ = 1
        eps = model(zt, torch.full((len(zt),), t, device=zt.device))
        z0 = (zt - (1 - a) ** 0.5 * eps) / a**0.5  # TRAP: not clipped; latents are no pixels
        sigma = eta * ((1 - a_prev) / (1 - a) * (1 - a / a_prev)) ** 0.5  # [DDIM eq.16]
        zt = a_prev**0.5 * z0 + max(1 - a_prev - sigma**2, 0.0) ** 0.5 * eps
        if sigma > 0:
            zt = zt + sigma * _randn(zt, generator)
    return zt


@torch.no_grad()
def ddpm_sample(model: Callable[[Tensor, Tensor], Tensor], zT: Tensor, schedule: Schedule,
                generator: torch.Generator | list[torch.Generator] | None = None) -> Tensor:
    """Ancestral sampling through all T steps [DDPM algorithm 2, with the variance β̃ of eq.7]: zT -> z0."""
    zt = zT
    for t in reversed(range(schedule.T)):
        a, beta = float(schedule.alpha_bar[t]), float(schedule.beta[t])
        a_prev = float(schedule.alpha_bar[t - 1]) if t > 0 else 1.0
        eps = model(zt, torch.full((len(zt),), t, device=zt.device))
        z0 = (zt - (1 - a) ** 0.5 * eps) / a**0.5
        zt = a_prev**0.5 * beta / (1 - a) * z0 + (1 - beta) ** 0.5 * (1 - a_prev) / (1 - a) * zt  # posterior mean [DDPM eq.7]
        if t > 0:
            zt = zt + (beta * (1 - a_prev) / (1 - a)) ** 0.5 * _randn(zt, generator)
    return zt


# ---- 8-bit Adam (paper 2.5; Dettmers et al. 2022) -------------------------------------------------------------------------

BLOCK = 256  # elements that share one absolute maximum


def dynamic_code(signed: bool) -> Tensor:
    """The 256 values in [-1, 1] (signed) or [0, 1] that an 8-bit state can take: dense near zero, seven decades wide.

    Decade 10^(i-6)…10^(i-5), i = 0…6, is cut into 2^i (signed, for each sign) or 2^(i+1) parts. Their midpoints, 0 and 1 are it.
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = np.linspace(0.1, 1.0, 2 ** (i if signed else i + 1) + 1)
        middles = 10.0 ** (i - 6) * (edges[:-1] + edges[1:]) / 2
        values += [*middles, *-middles] if signed else [*middles]
    return torch.tensor(sorted(values), dtype=torch.float32)


def quantize(x: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
    """x float32 -> uint8 (blocks, 256) positions of the nearest code, absolute maxima (blocks, 1); the tail is padded with 0."""
    blocks = torch.nn.functional.pad(x.flatten(), (0, -x.numel() % BLOCK)).view(-1, BLOCK)
    largest = blocks.abs().amax(dim=1, keepdim=True)
    middles = (code[1:] + code[:-1]) / 2
    return torch.bucketize(blocks / largest.clamp(min=1e-38), middles).to(torch.uint8), largest


def dequantize(q: Tensor, largest: Tensor, code: Tensor, like: Tensor) -> Tensor:
    """The inverse of `quantize`, in the shape of `like`."""
    return (code[q.int()] * largest).flatten()[: like.numel()].view_as(like)


class Adam8bit(torch.optim.Optimizer):
    """AdamW whose two moments take one byte an element. Tensors under 4096 elements keep float32 moments."""

    def __init__(self, params, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 1e-2):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        self.codes = {}  # device -> signed code for m, unsigned code for v

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad.float(), self.state[p], **{k: group[k] for k in ("lr", "betas", "eps", "weight_decay")})
        return loss

    def _update(self, p: Tensor, grad: Tensor, state: dict, lr: float, betas: tuple[float, float], eps: float, weight_decay: float):
        signed, unsigned = self.codes.setdefault(p.device, (dynamic_code(True).to(p.device), dynamic_code(False).to(p.device)))
        is_small = p.numel() < 4096
        if not state:
            state["step"] = torch.zeros(())
            m, v = torch.zeros_like(grad), torch.zeros_like(grad)
        elif is_small:
            m, v = state["m"], state["v"]
        else:
            m, v = dequantize(state["m"], state["m_max"], signed, grad), dequantize(state["v"], state["v_max"], unsigned, grad)
        state["step"] += 1
        k, (beta1, beta2) = int(state["step"]), betas
        m.lerp_(grad, 1 - beta1)
        v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        # The step uses the moments before they are rounded again; eps is scaled so that it acts on the corrected √v.
        correction = (1 - beta2**k) ** 0.5
        p.add_(m / (v.sqrt() + correction * eps), alpha=-lr * correction / (1 - beta1**k))
        p.mul_(1 - lr * weight_decay)  # decoupled weight decay, after the step
        if is_small:
            state["m"], state["v"] = m, v
        else:
            state["m"], state["m_max"] = quantize(m, signed)
            state["v"], state["v_max"] = quantize(v, unsigned)


OPTIMIZERS = {"adamw": torch.optim.AdamW, "adam8bit": Adam8bit}


# ---- Settings and presets (paper 2.5) -------------------------------------------------------------------------------------

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
NOT_A_FLAG = {"flag": False}


@dataclass(frozen=True)
class Train:
    """Every setting of `train`. The defaults are the preset `tiny`; `--preset` chooses another set of defaults."""

    preset: str = "tiny"  # tiny | mini | paper | paper-v2
    data: str = "phantom"  # phantom, a folder, a quoted glob of tar shards, hf://datasets/OWNER/NAME/GLOB, or pipe:COMMAND {shard}
    run: str = ""  # run folder; empty: runs/PRESET. An existing one is resumed
    size: int = 64  # pixels, square
    steps: int = 600  # optimizer steps of the UNet
    batch: int = 16  # images a step, over all ranks and micro-batches
    micro_batch: int = 0  # images of one rank in one pass; 0: as many as the batch gives it, 64 at most
    lr: float = 2e-3  # constant after the warm-up
    warmup: int = 50  # steps of linear warm-up
    optimizer: str = "adamw"  # adamw | adam8bit
    weight_decay: float = 1e-2  # decoupled. CHOICE: what AdamW and the diffusers script use; the paper names none
    clip: float = 1.0  # largest norm of the gradient. CHOICE: the diffusers script's
    ema: float = 0.99  # decay of the average of weights that samples are drawn from; 0: none
    tokens: str = "global"  # global: c_GLB, the paper's method; all: patch tokens too, its appendix A.1
    init: str = ""  # UNet to start from: sd15, a folder, a file or a hub id; empty: from scratch
    vae: str = ""  # folder, file or hub id of a trained VAE (`hub id:subfolder`); empty: train one first
    vit: str = ""  # the same for DINO
    vae_steps: int = 800  # of the VAE's training, where one is trained
    vit_steps: int = 250  # of DINO's
    cache: str = ""  # folder that `dinodiff.py cache` wrote: train on stored latents and tokens
    augment: bool = True  # random sharpening and affine maps (paper 2.5)
    seed: int = 0
    checkpoint_every: int = 100  # steps
    sample_every: int = 200  # steps between sample grids
    gradient_checkpointing: bool = False  # less memory, a third more time
    device: str = "auto"  # auto | cpu | cuda
    dtype: str = "fp32"  # fp32 | bf16 (autocast; weights, gradients and moments stay float32)
    compile: bool = True  # torch.compile, on CUDA only
    workers: int = 0  # processes a rank that read images; 0: the training process itself
    cache_gb: float = 20.0  # local room for shards of a remote --data
    offline: bool = False  # never ask the hub, use its cache alone
    unet_config: UNetConfig = field(default_factory=lambda: UNetConfig(
        block_out_channels=(48, 96), layers_per_block=1, cross_attention_dim=128, attention_head_dim=2, norm_num_groups=16,
        down_block_types=(CROSS, CROSS), sample_size=16), metadata=NOT_A_FLAG)
    vae_config: VAEConfig = field(default_factory=lambda: VAEConfig(
        block_out_channels=(16, 32, 64), layers_per_block=1, norm_num_groups=8, sample_size=64), metadata=NOT_A_FLAG)
    vae_settings: VAESettings = field(default_factory=VAESettings, metadata=NOT_A_FLAG)
    vit_config: ViTConfig = field(default_factory=lambda: ViTConfig(
        image_size=64, patch_size=8, hidden_size=128, depth=4, heads=4, mlp_ratio=2.0), metadata=NOT_A_FLAG)
    dino_settings: DinoSettings = field(default_factory=DinoSettings, metadata=NOT_A_FLAG)


TINY = Train()

MINI = Train(
    preset="mini", data="", size=256, steps=8000, batch=64, lr=4e-4, warmup=500, optimizer="adam8bit", ema=0.999, vae_steps=6000,
    vit_steps=4000, checkpoint_every=2000, sample_every=1000, dtype="bf16", workers=8,
    unet_config=UNetConfig(block_out_channels=(96, 192, 256), layers_per_block=1, cross_attention_dim=256, attention_head_dim=8,
                           down_block_types=(CROSS, CROSS, CROSS), sample_size=32),
    vae_config=VAEConfig(block_out_channels=(32, 64, 96, 128), layers_per_block=1, sample_size=256),
    vae_settings=VAESettings(batch=16, crop=128, lr=1e-3),
    vit_config=ViTConfig(image_size=256, patch_size=16, hidden_size=256, depth=6, heads=4),
    dino_settings=DinoSettings(batch=64, lr=5e-4, momentum=0.99, out_dim=1024, head_hidden=1024, head_bottleneck=128, global_size=224,
                               local_size=96, local_crops=4))

# CHOICE: 868,394 images / 512 = 1,696 steps an epoch, so 100 epochs are 169,600 steps; the paper says ~140,000, which we take.
PAPER = Train(
    preset="paper", data="", size=512, steps=140_000, batch=512, micro_batch=64, lr=1e-4, warmup=1000, optimizer="adam8bit", ema=0.0,
    vae=SD15 + ":vae", vit="facebook/dino-vitb16", checkpoint_every=2500, sample_every=2500, dtype="bf16", workers=8,
    unet_config=UNetConfig(), vae_config=VAEConfig())

PAPER_V2 = dataclasses.replace(PAPER, preset="paper-v2", vit="timm/vit_base_patch14_reg4_dinov2.lvd142m")

PRESETS = {p.preset: p for p in (TINY, MINI, PAPER, PAPER_V2)}


def preset_defaults(argv: list[str]) -> Train:
    """The preset that the command line names, whose values are then the defaults of every other flag."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", default="tiny")
    name = parser.parse_known_args(argv)[0].preset
    if name not in PRESETS:
        raise UserError(f"found --preset {name!r}, expected one of {', '.join(PRESETS)}")
    return PRESETS[name]


# ---- A run folder ---------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What `load_run` opens: the three nets, frozen, in eval mode, of one checkpoint."""

    folder: Path
    config: dict  # config.json: every setting of the training
    size: int  # pixels
    step: int
    unet: UNet
    vae: VAE
    vit: ViT
    schedule: Schedule
    device: torch.device

    @property
    def checkpoints(self) -> list[int]:
        return checkpoint_steps(self.folder)


def checkpoint_steps(folder) -> list[int]:
    """Steps of the whole checkpoints of a run, ascending."""
    return sorted(int(p.name[5:]) for p in Path(folder, "checkpoints").glob("step-*") if (p / "progress.json").is_file())


def checkpoint_folder(folder, step: int) -> Path:
    return Path(folder, "checkpoints", f"step-{step:07d}")


def newest_run(root="runs") -> Path:
    """The run folder whose log or configuration changed last."""
    runs = [p.parent for p in Path(root).glob("*/config.json")]
    if not runs:
        raise UserError(f"no run under {Path(root).resolve()}; make one with `python dinodiff.py train`, or name one with --run")
    return max(runs, key=lambda p: max(f.stat().st_mtime for f in (p / "config.json", p / "log.jsonl") if f.is_file()))


def load_run(folder, step: int | str | None = None, device="cpu") -> Run:
    """Open a run at `step` (None: the newest checkpoint; "best": the one in best.json); UserError says what is missing."""
    folder, device = Path(folder), pick_device(str(device))
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is no run folder (it has no config.json); make one with `python dinodiff.py train --run {folder}`")
    config, steps = json.loads((folder / "config.json").read_text()), checkpoint_steps(folder)
    if not steps:
        raise UserError(f"{folder} has no checkpoint yet; let `python dinodiff.py train --run {folder}` reach one")
    if step == "best":
        if not (folder / "best.json").is_file():
            raise UserError(f"{folder} has no best.json; make it with `python evaluate.py fid --checkpoints all --run {folder}`")
        step = json.loads((folder / "best.json").read_text())["step"]
    step = steps[-1] if step is None else int(step)
    if step not in steps:
        raise UserError(f"{folder} has no checkpoint at step {step}; it has {steps}")
    place = checkpoint_folder(folder, step)
    nets = [UNet.from_pretrained(place / ("ema" if (place / "ema").is_dir() else "unet")),
            VAE.from_pretrained(folder / "vae"), ViT.from_pretrained(folder / "vit")]
    unet, vae, vit = (net.to(device, memory_format=torch.channels_last).eval().requires_grad_(False) for net in nets)
    return Run(folder, config, config["size"], step, unet, vae, vit, Schedule(), device)


def pick_device(name: str) -> torch.device:
    """auto: this rank's GPU where there is one, else the CPU."""
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"found no CUDA device (torch {torch.__version__}), expected one for --device {name}; use --device cpu or auto")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}") if name == "cuda" else torch.device(name)


def autocast(device: torch.device, dtype: str):
    """bf16: matrix products and convolutions in bfloat16 over float32 weights; fp32: nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16")


# ╔══ The paper's idea (2.3) ═════════════════════════════════════════════════════════════════════════════════════════════════╗
# ║ Where Stable Diffusion has `c = text_encoder(caption)`, this has `c = DINO(image)`: no caption, no label.                 ║
def condition(vit: ViT, x: Tensor, tokens: str = "global") -> Tensor:
    """x (B, 3, H, W) in [-1, 1] -> c (B, S, N): c_GLB = [CLS, PLR, REG], or all tokens with the patches' (appendix A.1)."""
    return vit.global_tokens(vit.prepare(x)) if tokens == "global" else vit(vit.prepare(x))
# ╚═══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════════╝


@torch.no_grad()
def encode_tokens(run: Run, images: Tensor) -> Tensor:
    """images uint8 (B, size, size) -> the run's condition c (B, S, N)."""
    with autocast(run.device, run.config["dtype"]):
        return condition(run.vit, to_model(images.to(run.device)), run.config["tokens"]).float()


@torch.no_grad()
def generate(run: Run, c: Tensor, seeds: list[int], steps: int = 50, eta: float = 0.0) -> Tensor:
    """c (B, S, N), a seed an image -> uint8 (B, size, size) on the CPU. Row i is a function of c[i] and seeds[i] alone."""
    side = run.size // run.vae.config.factor
    generators = [generator("cpu", seed, 7) for seed in seeds]  # on the CPU: the same noise on every device
    zT = torch.stack([torch.randn((run.unet.config.in_channels, side, side), generator=g) for g in generators])
    c, zT = c.to(run.device), zT.to(run.device, memory_format=torch.channels_last)
    with autocast(run.device, run.config["dtype"]):
        z0 = ddim_sample(lambda zt, t: run.unet(zt, t, c).float(), zT, steps, run.schedule, eta, generators)  # CHOICE: DDIM, 50 steps
        return data.to_uint8(run.vae.decode(z0 / run.vae.config.scaling_factor).float()).cpu()


# ---- Training (paper 2.5) -------------------------------------------------------------------------------------------------

MAY_CHANGE = ("run", "steps", "micro_batch", "checkpoint_every", "sample_every", "device", "compile", "workers", "cache_gb", "offline",
              "gradient_checkpointing")  # settings with which a run may be resumed though it began with others


def check_run(folder: Path, settings: Train) -> None:
    """Refuse to resume a run that was begun with settings under which it would become another run."""
    mine, path = json.loads(json.dumps(dataclasses.asdict(settings))), folder / "config.json"
    if not path.is_file():
        return
    theirs = json.loads(path.read_text())
    other = {k: (theirs.get(k), v) for k, v in mine.items() if k not in MAY_CHANGE and theirs.get(k) != v}
    if other:
        lines = "".join(f"\n  {k}: the run has {a!r}, now {b!r}" for k, (a, b) in other.items())
        raise UserError(f"{folder} holds a run with other settings:{lines}\nTrain under another --run, or give it the settings it began with.")


def save_checkpoint(folder: Path, step: int, unet: UNet, ema: UNet | None, optimizer, info: dict) -> None:
    """checkpoints/step-N, whole or not at all: written under another name, renamed when everything is on the disk."""
    place = checkpoint_folder(folder, step)
    partial = place.with_name(f".{place.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    unet.save_pretrained(partial / "unet")
    if ema is not None:
        ema.save_pretrained(partial / "ema")
    save_state(partial / "optimizer.safetensors", optimizer_tensors(optimizer), info)
    write_json(partial / "progress.json", info)
    shutil.rmtree(place, ignore_errors=True)
    os.replace(partial, place)
    for older in checkpoint_steps(folder):  # only the newest checkpoint is resumed: the others need no optimizer
        if older < step:
            (checkpoint_folder(folder, older) / "optimizer.safetensors").unlink(missing_ok=True)


class Stop:
    """Ctrl-C and SIGTERM ask for an orderly end; `agreed` is true on every rank as soon as one was asked."""

    def __init__(self, device: torch.device):
        self.device, self.asked = device, False
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, self._ask)

    def _ask(self, number, frame):
        if self.asked:  # a second time: at once
            signal.default_int_handler(number, frame)
        self.asked = True

    def agreed(self) -> bool:
        if not dist.is_initialized():
            return self.asked
        flag = torch.tensor(float(self.asked), device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag.item())


class Log:
    """log.jsonl, a line a step. Opened for a resumed stage it first drops the lines after `step`, which will be written again."""

    def __init__(self, path: Path, stage: str, step: int, enabled: bool):
        self.file = None
        if enabled:
            rows = []
            for line in path.read_text().splitlines() if path.is_file() else []:
                with contextlib.suppress(json.JSONDecodeError):  # a line cut by a kill
                    row = json.loads(line)
                    if row["stage"] != stage or row["step"] <= step:
                        rows.append(line + "\n")
            data.write_file(path, "".join(rows))
            self.file = open(path, "a", buffering=1)

    def __call__(self, row: dict) -> None:
        if self.file is not None:
            self.file.write(json.dumps(row) + "\n")


def train(settings: Train) -> None:
    """Stage 1 and 2 where the run has no VAE and no DINO: train them. Stage 3: the UNet. Each goes on where it was stopped."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
    device = pick_device(settings.device)
    if settings.batch % world or (settings.micro_batch and settings.batch // world % settings.micro_batch):
        share = f"{world} ranks" + (f" x micro-batch {settings.micro_batch}" if settings.micro_batch else "")
        unit = world * max(settings.micro_batch, 1)
        raise UserError(f"--batch {settings.batch} (over all ranks) is no multiple of {share}; the nearest that are: "
                        f"{max(unit, settings.batch // unit * unit)} and {(settings.batch // unit + 1) * unit}")
    for flag, value, known in (("optimizer", settings.optimizer, OPTIMIZERS), ("dtype", settings.dtype, ("fp32", "bf16")),
                               ("tokens", settings.tokens, ("global", "all"))):
        if value not in known:
            raise UserError(f"found --{flag} {value!r}, expected one of {', '.join(known)}")
    share = settings.batch // world
    micro = settings.micro_batch or max(m for m in range(1, min(share, 64) + 1) if share % m == 0)
    if not settings.data:
        raise UserError(f"preset {settings.preset} needs --data: a folder, a quoted glob of tar shards, hf://… or pipe:…")
    folder = Path(settings.run or f"runs/{settings.preset}")
    check_run(folder, settings)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    images = data.open_data(settings.data, settings.size, seed=settings.seed, offline=settings.offline, cache_gb=settings.cache_gb)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    stop, is_main = Stop(device), rank == 0
    say = print if is_main else lambda *_, **__: None
    say(f"{folder}: preset {settings.preset}, {len(images):,} images of {settings.data}, {settings.size} px, {world} x {device}, "
        f"batch {settings.batch} = {world} ranks x {share // micro} passes x {micro}", flush=True)
    if is_main:
        for leftover in folder.glob("checkpoints/.*.partial"):
            shutil.rmtree(leftover)
        write_json(folder / "config.json", dataclasses.asdict(settings))

    vae = _stage(folder / "vae", VAE, settings.vae, settings, images, stop, device, rank, world)
    vit = _stage(folder / "vit", ViT, settings.vit, settings, images, stop, device, rank, world) if vae else None
    if vit is None:
        say(f"stopped; the same command goes on from here ({folder})")
        return _leave(world)

    # Stage 3. Everything below runs on each rank alike; what must be the same everywhere is a function of (seed, step).
    torch.manual_seed(settings.seed)
    config = dataclasses.replace(settings.unet_config, cross_attention_dim=vit.config.hidden_size)
    done = checkpoint_steps(folder)
    start, place = (done[-1], checkpoint_folder(folder, done[-1])) if done else (0, None)
    if place:
        unet = UNet.from_pretrained(place / "unet")
    elif settings.init:
        unet = _pretrained(UNet, f"{SD15}:unet" if settings.init == "sd15" else settings.init, settings.offline)
    else:
        unet = from_scratch(config)
    unet.to(device, memory_format=torch.channels_last)
    if unet.config.cross_attention_dim != vit.config.hidden_size:
        raise UserError(f"the UNet takes tokens of width {unet.config.cross_attention_dim}, this DINO gives {vit.config.hidden_size}")
    unet.gradient_checkpointing = settings.gradient_checkpointing
    ema = None
    if settings.ema:
        ema = UNet(unet.config).to(device, memory_format=torch.channels_last).requires_grad_(False)
        ema.load_state_dict(UNet.from_pretrained(place / "ema").state_dict() if place else unet.state_dict())
    optimizer = OPTIMIZERS[settings.optimizer](unet.parameters(), lr=settings.lr, betas=(0.9, 0.999), eps=1e-8,
                                               weight_decay=settings.weight_decay)
    if place:
        restore_optimizer(optimizer, load_state(place / "optimizer.safetensors")[0])
        say(f"resuming at step {start}")
    if settings.compile and device.type == "cuda":
        unet.compile()  # in place: the names of the weights stay what they are
        vae.encoder.compile()
    model = DistributedDataParallel(unet, gradient_as_bucket_view=True) if world > 1 else unet
    schedule, log = Schedule(), Log(folder / "log.jsonl", "unet", start, is_main)
    latents = LatentCache(settings.cache, settings, images, vae, vit) if settings.cache else None
    batches = data.batches(images, settings.batch, start, settings.seed, rank, world, micro, settings.workers,
                           with_images=latents is None)
    side = settings.size // vae.config.factor
    shape = (settings.batch, unet.config.in_channels, side, side)
    bar = progress(desc="UNet", total=settings.steps, initial=start, unit="step")
    loss_mean, clock = None, time.perf_counter()

    for step in range(start, settings.steps):
        # [DDPM algorithm 1, lines 2-4] drawn for the whole global batch, so that any number of ranks sees the same numbers
        g = generator(device, settings.seed, step, 0)
        t_all = torch.randint(0, schedule.T, (settings.batch,), generator=g, device=device)
        eps_all, noise_all = (torch.randn(shape, generator=g, device=device) for _ in range(2))
        optimizer.param_groups[0]["lr"] = settings.lr * min(1.0, (step + 1) / max(settings.warmup, 1))
        total = torch.zeros((), device=device)

        for first in range(rank * share, (rank + 1) * share, micro):
            at_step, ids, pictures = next(batches)
            assert at_step == step
            rows = slice(first, first + micro)
            t, eps, noise = t_all[rows], eps_all[rows], noise_all[rows]
            with torch.no_grad(), autocast(device, settings.dtype):
                if latents is None:
                    x = augmented(pictures.to(device, non_blocking=True), ids.to(device), step, settings)  # (b, 3, H, W)
                    c = condition(vit, x, settings.tokens).float()  # CHOICE: DINO sees the augmented image, as the VAE does
                    mean, logvar = vae.encode(x.contiguous(memory_format=torch.channels_last))
                else:
                    mean, logvar, c = (y.to(device, non_blocking=True) for y in latents.read(ids.numpy(), step))
                # CHOICE: z0 is a sample of the posterior, as Stable Diffusion was trained, not its mean
                z0 = (mean.float() + torch.exp(0.5 * logvar.float()) * noise) * vae.config.scaling_factor
            zt = schedule.add_noise(z0, eps, t).contiguous(memory_format=torch.channels_last)
            is_last = first + micro == (rank + 1) * share
            with contextlib.nullcontext() if is_last or world == 1 else model.no_sync():  # gradients travel once a step
                with autocast(device, settings.dtype):
                    eps_hat = model(zt, t, c)
                loss = (eps - eps_hat.float()).square().mean()  # eq. (1)
                (loss * micro / share).backward()
            total += loss.detach() * micro / share

        norm = torch.nn.utils.clip_grad_norm_(unet.parameters(), settings.clip or float("inf"))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if ema is not None:
            decay = min(settings.ema, (step + 1) / (step + 10))  # a short memory at first: the start is random
            torch._foreach_lerp_(list(ema.parameters()), list(unet.parameters()), 1 - decay)
        if world > 1:
            dist.all_reduce(total)
            total /= world

        value, now = total.item(), time.perf_counter()
        if not np.isfinite(value):
            raise UserError(f"the loss became {value} at step {step + 1}; lower --lr, now {settings.lr:g} (checkpoints are whole)")
        log({"stage": "unet", "step": step + 1, "loss": value, "lr": optimizer.param_groups[0]["lr"], "grad_norm": norm.item(),
             "images_per_s": round(settings.batch / (now - clock), 2)})
        loss_mean = value if loss_mean is None else 0.95 * loss_mean + 0.05 * value
        bar.set_postfix_str(f"loss {loss_mean:.4f}, {settings.batch / (now - clock):.1f} images/s", refresh=False)
        bar.update()

        ends = step + 1 == settings.steps
        stops = stop.agreed()
        if is_main and (ends or stops or (step + 1) % settings.checkpoint_every == 0):
            save_checkpoint(folder, step + 1, unet, ema, optimizer, {"step": step + 1, "loss": value})
        if is_main and not stops and (ends or (step + 1) % settings.sample_every == 0):
            frozen = ema if ema is not None else unet
            run = Run(folder, dataclasses.asdict(settings), settings.size, step + 1, frozen, vae, vit, schedule, device)
            data.save_png(folder / "samples" / f"step-{step + 1:07d}.png", training_grid(run, images))
        if stops:
            break
        clock = time.perf_counter()  # the time of checkpoints and pictures is not the next step's
    bar.close()
    if start >= settings.steps:
        say(f"{folder} already has its {settings.steps} steps; raise --steps to go on")
    elif stops and not ends:
        say(f"stopped at step {step + 1}, saved; the same command goes on from there ({folder})")
    else:
        say(f"done: checkpoint {checkpoint_folder(folder, settings.steps)}, grids in {folder / 'samples'}, log {folder / 'log.jsonl'}\n"
            f"next: python dinodiff.py sample --run {folder}   or   python evaluate.py --run {folder}")
    _leave(world)


def _leave(world: int) -> None:
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def _pretrained(kind, source: str, offline: bool):
    """`source` or `source:subfolder` -> a net in float32 of class `kind`."""
    name, _, subfolder = source.partition(":") if not Path(source).exists() else (source, "", "")
    return kind.from_pretrained(name, subfolder or None, offline=offline)


def _stage(place: Path, kind, source: str, settings: Train, images, stop: Stop, device, rank: int, world: int):
    """The frozen VAE or DINO of a run: from its folder, else from `source`, else trained here. None when asked to stop."""
    if not (place / "config.json").is_file():
        if source and rank == 0:
            _pretrained(kind, source, settings.offline).save_pretrained(place)  # a copy, so that the run folder is complete
        elif not source:
            is_vae = kind is VAE
            recipe = dataclasses.replace(settings.vae_settings, steps=settings.vae_steps, seed=settings.seed) if is_vae else \
                dataclasses.replace(settings.dino_settings, steps=settings.vit_steps, seed=settings.seed)
            config = dataclasses.replace(settings.vae_config, sample_size=settings.size) if is_vae else settings.vit_config
            if recipe.batch % world:
                raise UserError(f"the {place.name} stage's batch of {recipe.batch} is no multiple of {world} ranks; use a divisor of it")
            get_batch = _batch_getter(images, recipe.batch, settings, rank, world, device)
            log = Log(place.parent / "log.jsonl", place.name, _saved_step(place), rank == 0)
            if (train_vae if is_vae else train_dino)(config, recipe, get_batch, place, device, rank, world, log,
                                                     should_stop=stop.agreed) is None:
                return None
        if world > 1:
            dist.barrier()
    net = kind.from_pretrained(place)
    return net.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


def _saved_step(place: Path) -> int:
    state = place.with_name(place.name + ".training.safetensors")
    return load_state(state)[1]["step"] if state.is_file() else 0


def _batch_getter(images, batch: int, settings: Train, rank: int, world: int, device) -> Callable[[int], Tensor]:
    """step -> this rank's slice of the global batch, uint8 (batch / world, S, S), asked for in order from any first step."""
    stream = None

    def get(step: int) -> Tensor:
        nonlocal stream
        if stream is None:
            stream = data.batches(images, batch, step, settings.seed, rank, world, batch // world, settings.workers)
        at_step, _, pictures = next(stream)
        assert at_step == step
        return pictures

    return get


def from_scratch(config: UNetConfig) -> UNet:
    """A new UNet. CHOICE: residual branches and the output start at zero: it predicts 0 at first, and depth comes gradually."""
    unet = UNet(config)
    for name, weight in unet.named_parameters():
        if name.endswith(("conv2.weight", "proj_out.weight")) or name == "conv_out.weight":
            torch.nn.init.zeros_(weight)
    return unet


def augmented(pictures: Tensor, ids: Tensor, step: int, settings: Train) -> Tensor:
    """uint8 (b, S, S) -> x (b, 3, S, S) in [-1, 1], changed at random as (seed, image, step) has it, or as it is."""
    return data.augment(pictures, ids, step, settings.seed).expand(-1, 3, -1, -1) if settings.augment else to_model(pictures)


def training_grid(run: Run, images, count: int = 8):
    """A picture for people: real X-rays, their VAE round trips, two reconstructions each, and an interpolation between neighbours."""
    real = torch.from_numpy(np.stack([images[int(i)] for i in np.linspace(0, len(images) - 1, min(count, len(images)))]))
    c = encode_tokens(run, real)
    with torch.no_grad(), autocast(run.device, run.config["dtype"]):
        round_trip = data.to_uint8(run.vae.decode(run.vae.encode(to_model(real.to(run.device)))[0]).float()).cpu()
    rows = [real, round_trip, *(generate(run, c, [seed * 1000 + i for i in range(len(real))], steps=25) for seed in range(2)),
            generate(run, torch.lerp(c, c.roll(-1, 0), 0.5), list(range(len(real))), steps=25)]
    return data.grid([image for row in rows for image in row.numpy()], columns=len(real), title=f"step {run.step:,}",
                     row_titles=["real", "VAE round trip", "reconstruction 1", "reconstruction 2", "half-way to the next"])


# ---- Latents and tokens once: training without its encoders ----------------------------------------------------------------


@dataclass(frozen=True)
class Cache:
    """Settings of `cache`: encode a data set once with a run's VAE and DINO, for `train --cache`."""

    run: str = ""  # run folder whose vae/ and vit/ encode; empty: the newest run
    data: str = ""  # what to encode; empty: the run's own data
    out: str = ""  # folder; empty: RUN/cache
    copies: int = 1  # differently augmented copies of each image; each use of an image takes one of them at random
    batch: int = 64  # images of one rank in one pass
    device: str = "auto"  # auto | cpu | cuda
    workers: int = 0  # processes a rank that read images
    offline: bool = False  # never ask the hub


def cache(settings: Cache) -> None:
    """OUT/cache.json and OUT/copy-K.npy (n, 2*4*h*w + S*N) float16: rows of [mean, logvar, tokens]. A killed run goes on."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    folder, device = Path(settings.run or newest_run()), pick_device(settings.device)
    config = json.loads((folder / "config.json").read_text())
    vae, vit = (net.to(device).eval().requires_grad_(False)
                for net in (VAE.from_pretrained(folder / "vae"), ViT.from_pretrained(folder / "vit")))
    images = data.open_data(settings.data or config["data"], config["size"], seed=config["seed"], offline=settings.offline)
    out = Path(settings.out or folder / "cache")
    info = _cache_info(config["size"], config["tokens"], config["augment"], images, vae, vit)
    width = sum(int(np.prod(info[k])) for k in ("mean", "mean", "tokens"))
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if rank == 0:
        if (out / "cache.json").is_file() and json.loads((out / "cache.json").read_text())["info"] != info:
            raise UserError(f"{out} holds the cache of another data set or encoder; choose another --out")
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "cache.json", {"info": info, "copies": settings.copies})
        for copy in range(settings.copies):
            if not (out / f"copy-{copy}.npy").is_file():  # zeros: a row whose logvar is all zero has not been written yet
                np.lib.format.open_memmap(out / f"copy-{copy}.npy", "w+", np.float16, (len(images), width))
    if world > 1:
        dist.barrier()
    mine = np.array_split(np.arange(len(images)), world)[rank]
    bar = progress(desc="cache", total=len(mine) * settings.copies, unit="image")
    for copy in range(settings.copies):
        rows = np.load(out / f"copy-{copy}.npy", mmap_mode="r+")
        for ids in np.array_split(mine, max(1, -(-len(mine) // settings.batch))):
            if not rows[ids].any(axis=1).all():
                pictures = torch.from_numpy(np.stack([images[int(i)] for i in ids])).to(device)
                with torch.no_grad(), autocast(device, config["dtype"]):
                    x = data.augment(pictures, torch.from_numpy(ids).to(device), copy, config["seed"]).expand(-1, 3, -1, -1) \
                        if config["augment"] else to_model(pictures)
                    parts = [*vae.encode(x), condition(vit, x, config["tokens"])]
                rows[ids] = torch.cat([p.float().flatten(1) for p in parts], dim=1).cpu().numpy()
            bar.update(len(ids))
        rows.flush()
    bar.close()
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    if rank == 0:
        print(f"{len(images):,} images x {settings.copies} copies in {out}; use it with `train --cache {out}`")


def _cache_info(size: int, tokens: str, augment: bool, images, vae: VAE, vit: ViT) -> dict:
    """What a cache is made of; another size, data set or encoder gives another."""
    with torch.no_grad():
        mark = [float(p.double().abs().sum()) for net in (vae, vit) for p in (next(iter(net.parameters())),)]
        side, x = size // vae.config.factor, torch.zeros(1, 3, size, size, device=next(vit.parameters()).device)
        c = condition(vit, x, tokens)
    some = "".join(images.keys[i] for i in range(0, len(images), max(1, len(images) // 1000)))  # a thousand names tell sets apart
    keys = hashlib.sha1(some.encode()).hexdigest()
    return {"size": size, "images": len(images), "keys": keys, "augment": augment, "encoders": [round(m, 3) for m in mark],
            "mean": [vae.config.latent_channels, side, side], "tokens": list(c.shape[1:])}


class LatentCache:
    """The rows that `cache` wrote, memory-mapped. UserError where they are not of this data set and these encoders."""

    def __init__(self, folder: str, settings: Train, images, vae: VAE, vit: ViT):
        path = Path(folder) / "cache.json"
        if not path.is_file():
            raise UserError(f"{folder} holds no cache (no cache.json); make one with `python dinodiff.py cache --run … --out {folder}`")
        stored, here = json.loads(path.read_text()), _cache_info(settings.size, settings.tokens, settings.augment, images, vae, vit)
        wrong = {k: (stored["info"].get(k), v) for k, v in here.items() if stored["info"].get(k) != v}
        if wrong:
            raise UserError(f"the cache {folder} was made of something else (there, here): {wrong}")
        self.copies = [np.load(Path(folder) / f"copy-{k}.npy", mmap_mode="r") for k in range(stored["copies"])]
        self.shapes, self.seed = (here["mean"], here["mean"], here["tokens"]), settings.seed

    def read(self, ids: np.ndarray, step: int) -> list[Tensor]:
        """ids (b,) -> mean, logvar (b, 4, h, w), c (b, S, N) in float32, each image from a copy chosen by (seed, image, step)."""
        chosen = (data.uniforms(1, self.seed, ids, step)[:, 0] * len(self.copies)).astype(int)
        rows = torch.from_numpy(np.stack([self.copies[k][i] for k, i in zip(chosen, ids)]).astype(np.float32))
        parts = rows.split([int(np.prod(shape)) for shape in self.shapes], dim=1)
        return [part.view(-1, *shape) for part, shape in zip(parts, self.shapes)]


# ---- Sampling from a run (paper 2.3) --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """Settings of `sample`."""

    run: str = ""  # run folder; empty: the newest under runs/
    images: tuple[str, ...] = ()  # real X-rays whose tokens condition the samples: files or folders
    mode: str = "reconstruct"  # reconstruct | interpolate (between each image and the next) | mix (half the patch tokens of each)
    variants: int = 4  # samples of each condition, each from noise of its own
    ratios: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)  # of interpolation: r = 0 is the first image, 1 the second
    out: str = "out"  # folder for the PNGs
    checkpoint: str = ""  # step, or best; empty: the newest
    steps: int = 50  # of DDIM
    eta: float = 0.0  # 0: deterministic DDIM … 1: DDPM's variance
    batch: int = 32  # images in one pass
    seed: int = 0  # sample (image i, variant v) depends on (seed, i, v) alone
    device: str = "auto"  # auto | cpu | cuda


def sample(settings: Sample) -> None:
    """Reconstructions, interpolations or half-and-half mixtures of real X-rays: a PNG each, and one grid with the real images."""
    if settings.mode not in ("reconstruct", "interpolate", "mix"):
        raise UserError(f"found --mode {settings.mode!r}, expected reconstruct, interpolate or mix")
    if not settings.images:
        raise UserError("no --images given: name one or more X-ray files or folders, for instance --images a.png b.png")
    run = load_run(settings.run or newest_run(), settings.checkpoint or None, settings.device)
    if settings.mode == "mix" and run.config["tokens"] != "all":
        raise UserError(f"mix needs patch tokens, and {run.folder} was trained on global ones; train with --tokens all (appendix A.1)")
    names, real = [], []
    for path in [p for name in settings.images for p in (sorted(Path(name).iterdir()) if Path(name).is_dir() else [Path(name)])]:
        try:
            real.append(torch.from_numpy(data.preprocess(data.load_image(path), run.size)))
            names.append(path.stem)
        except (UserError, OSError) as error:
            print(f"skipped {path}: {error}", file=sys.stderr)
    if len(real) < (1 if settings.mode == "reconstruct" else 2):
        raise UserError(f"{settings.mode} needs {'an image' if settings.mode == 'reconstruct' else 'two images'}; {len(real)} could be read")
    real = torch.stack(real)
    tokens = torch.cat([encode_tokens(run, part) for part in real.split(settings.batch)])  # (images, S, N)

    # Each job: file name, row of the grid, condition, seed. Interpolation keeps the noise along r, so that only c changes.
    seed_of = lambda i, v: int(data.hash64(settings.seed, i, v) >> np.uint64(2))
    jobs = []
    for i in range(len(real) if settings.mode == "reconstruct" else len(real) - 1):
        for v in range(settings.variants):
            if settings.mode == "reconstruct":
                jobs.append((f"{names[i]}_v{v}", i, tokens[i], seed_of(i, v)))
            elif settings.mode == "interpolate":
                jobs += [(f"{names[i]}_{names[i + 1]}_v{v}_r{r:.2f}", (i, v), torch.lerp(tokens[i], tokens[i + 1], r), seed_of(i, v))
                         for r in settings.ratios]  # ĉ = lerp(c_s, c_t, r)
            else:
                jobs.append((f"{names[i]}_{names[i + 1]}_mix{v}", i, mix_tokens(tokens[i], tokens[i + 1], run.vit.config), seed_of(i, v)))
    clock, pictures = time.perf_counter(), []
    for first in progress(range(0, len(jobs), settings.batch), desc="sample", unit="batch"):
        part = jobs[first:first + settings.batch]
        c, seeds = torch.stack([c for _, _, c, _ in part]), [seed for *_, seed in part]
        pictures += list(generate(run, c, seeds, settings.steps, settings.eta).numpy())
    print(f"{len(jobs) / (time.perf_counter() - clock):.2f} images/s ({settings.steps} steps, {run.device})")

    out, rows = Path(settings.out), {}
    for (name, row, _, _), picture in zip(jobs, pictures):
        data.save_png(out / f"{name}.png", picture)
        rows.setdefault(row, []).append(picture)
    ends = lambda row: (row if settings.mode != "interpolate" else row[0])
    is_pair = settings.mode != "reconstruct"
    cells = [x for row, made in rows.items() for x in [real[ends(row)].numpy(), *made, *([real[ends(row) + 1].numpy()] if is_pair else [])]]
    middle = [f"r = {r:g}" for r in settings.ratios] if settings.mode == "interpolate" else [f"variant {v}" for v in range(settings.variants)]
    captions = ["real"] + middle + (["real"] if is_pair else [])
    data.save_png(out / f"{settings.mode}.png", data.grid(cells, columns=len(captions), captions=captions * len(rows),
                                                          title=f"{run.folder.name}, step {run.step:,}: {settings.mode}"))
    print(f"{len(jobs)} images and the grid {settings.mode}.png are in {out.resolve()}")


def mix_tokens(a: Tensor, b: Tensor, config: ViTConfig) -> Tensor:
    """All tokens (S, N) of two images -> the first half of the patch tokens (the upper half of the picture) from a, the rest from b.

    CHOICE: the global tokens are the mean of both; the paper says only where the patches come from (appendix A.1, Figure 7).
    """
    patches = (config.image_size // config.patch_size) ** 2
    lead = len(a) - patches
    return torch.cat([(a[:lead] + b[:lead]) / 2, a[lead:lead + patches // 2], b[lead + patches // 2:]])


# ---- Benchmark ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """Settings of `bench`: the networks of a preset with random weights."""

    preset: str = "tiny"  # tiny | mini | paper | paper-v2
    batch: int = 8  # images in one pass
    repeats: int = 5  # passes that are timed; the fastest is printed, since a shared machine only ever adds
    device: str = "auto"  # auto | cpu | cuda
    dtype: str = "fp32"  # fp32 | bf16
    compile: bool = True  # torch.compile, on CUDA only
    seed: int = 0


def bench(settings: Bench) -> None:
    """Floating-point operations, time and memory of each part of training and sampling, and of reading and augmenting."""
    from torch.utils.flop_counter import FlopCounterMode
    if settings.preset not in PRESETS:
        raise UserError(f"found --preset {settings.preset!r}, expected one of {', '.join(PRESETS)}")
    preset, device, B = PRESETS[settings.preset], pick_device(settings.device), settings.batch
    torch.manual_seed(settings.seed)
    vit_config = {"facebook/dino-vitb16": ViTConfig(), "": preset.vit_config}.get(preset.vit) or \
        ViTConfig(image_size=518, patch_size=14, registers=4, layer_scale=True, layout="timm")
    place = dict(device=device, memory_format=torch.channels_last)
    unet = UNet(dataclasses.replace(preset.unet_config, cross_attention_dim=vit_config.hidden_size)).to(**place)
    vae, vit = (net.to(**place).eval().requires_grad_(False) for net in (VAE(preset.vae_config), ViT(vit_config)))
    if settings.compile and device.type == "cuda":
        unet.compile()
        vae.encoder.compile()
    optimizer = OPTIMIZERS[preset.optimizer](unet.parameters(), lr=1e-5)
    side = preset.size // vae.config.factor
    x = (torch.rand(B, 3, preset.size, preset.size) * 2 - 1).to(**place)
    zt, t = torch.randn(B, 4, side, side).to(**place), torch.randint(0, 1000, (B,), device=device)
    c = torch.randn(B, 1 + vit_config.registers, vit_config.hidden_size, device=device)
    pictures = torch.randint(0, 256, (B, preset.size, preset.size), dtype=torch.uint8, device=device)

    def forward():
        with torch.no_grad():
            unet(zt, t, c)

    def forward_backward():
        unet(zt, t, c).float().square().mean().backward()

    def no_grad(function):
        with torch.no_grad():
            function()

    parts = {"UNet forward": forward, "UNet forward and backward": forward_backward, f"{type(optimizer).__name__} step": optimizer.step,
             "VAE encode": lambda: no_grad(lambda: vae.encode(x)), "VAE decode": lambda: no_grad(lambda: vae.decode(zt)),
             "DINO tokens": lambda: no_grad(lambda: condition(vit, x)), "augment": lambda: data.augment(pictures, t, 0, 0)}
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{settings.preset}, {settings.dtype}, batch {B}, {name}")
    print(f"  {'':<28}{'GFLOP/image':>12}{'ms/pass':>10}{'images/s':>10}{'TFLOP/s':>9}{'peak GB' if device.type == 'cuda' else '':>9}")
    seconds = {}
    for title, part in parts.items():
        with autocast(device, settings.dtype):
            part(), wait()
            with FlopCounterMode(display=False) as counter, torch.no_grad() if "step" in title else contextlib.nullcontext():
                part() if not (settings.compile and device.type == "cuda") else None
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            times = []
            for _ in range(settings.repeats):
                wait()
                clock = time.perf_counter()
                part(), wait()
                times.append(time.perf_counter() - clock)
        seconds[title], flops = min(times), counter.get_total_flops()
        peak = f"{torch.cuda.max_memory_allocated() / 2**30:>9.2f}" if device.type == "cuda" else ""
        best = min(times)
        print(f"  {title:<28}{flops / B / 1e9:>12.2f}{1e3 * best:>10.1f}{B / best:>10.1f}{flops / best / 1e12:>9.2f}{peak}")
    step = sum(seconds[k] for k in ("UNet forward and backward", "VAE encode", "DINO tokens", "augment"))
    print(f"  training: {B / step:.1f} images/s of one process, and {1e3 * seconds[type(optimizer).__name__ + ' step']:.0f} ms an optimizer step"
          f"\n  sampling, 50 DDIM steps: {B / (50 * seconds['UNet forward'] + seconds['VAE decode']):.2f} images/s")


if __name__ == "__main__":
    data.command_line(__doc__, {"train": (preset_defaults, train), "sample": (Sample(), sample), "cache": (Cache(), cache),
                                "bench": (Bench(), bench)})
