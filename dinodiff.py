"""DiNO-Diffusion: a latent diffusion model of chest X-rays, conditioned on a frozen DINO's tokens.

    python dinodiff.py train                           the whole thing in miniature, in minutes
    torchrun --nproc_per_node=4 dinodiff.py train      the same on four processes (GPUs or cores)
    torchrun --nproc_per_node=4 dinodiff.py train --preset paper --data 'shards/*.tar'
    python dinodiff.py sample --images a.png b.png --mode interpolate --out out
    python dinodiff.py bench --preset paper            FLOPs, times and memory of each part

Implements paper 2.2 (latent diffusion), 2.3 (conditioning), 2.5 (training). The symbols:

    x   image, pixels in [-1, 1]   (B, 3, H, W)     t          timestep, int in [0, 1000)
    z0  its scaled latent          (B, 4, h, w)     alpha_bar  share of z0's variance left in zt
    eps Gaussian noise             (B, 4, h, w)     c          condition: DINO's tokens (B, S, N)
    zt  z0 with noise of step t    (B, 4, h, w)     B, S, N    images, tokens, width of a token

    x ─► VAE encoder ─► z0 ─► zt = √ᾱ z0 + √(1-ᾱ) eps ─► UNet(zt, t, c) ─► eps_hat
    x ─► DINO ─► c = [CLS, PLR, REG] ──────────────────────┘      loss: |eps - eps_hat|²
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import datetime
import fcntl
import functools
import itertools
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

# Read when torch is loaded: threads that wait must not spin for long, or beside another program
# on the same cores two of them are five times slower (alone they lose some 5 %).
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

import data
from data import UserError, generator, to_model
from unet import CROSS, UNet, UNetConfig
from vae import VAE, VAEConfig, VAESettings, train_vae
from vit import DinoSettings, ViT, ViTConfig, train_dino

# ---- Noise schedule (paper 2.2) ----------------------------------------------------------------


class Schedule:
    """`scaled_linear`: √β goes linearly from √0.00085 to √0.012 in 1000 steps [SD1.5]."""

    T = 1000

    def __init__(self):
        root = torch.linspace(0.00085**0.5, 0.012**0.5, self.T, dtype=torch.float64)
        self.beta = root**2  # β_t
        self.alpha_bar = torch.cumprod(1 - self.beta, dim=0)  # ᾱ_t = Π (1 - β_s), (1000,) float64
        self.moved = self.alpha_bar  # on the device that it was last used on

    def add_noise(self, z0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """zt = √ᾱ_t z0 + √(1 - ᾱ_t) eps [DDPM eq.4]; z0 and eps (B, ...), t (B,) int."""
        if self.moved.device != z0.device:
            self.moved = self.alpha_bar.to(z0.device)
        alpha_bar = self.moved[t].view(-1, *[1] * (z0.ndim - 1))
        return alpha_bar.sqrt().to(z0.dtype) * z0 + (1 - alpha_bar).sqrt().to(z0.dtype) * eps

    def timesteps(self, steps: int) -> list[int]:
        """`steps` timesteps, descending: 'leading' spacing, offset 1; 50 steps: 981, 961, …, 1."""
        if not 1 <= steps <= self.T:
            raise UserError(f"found {steps} sampling steps, expected 1 to {self.T}")
        stride = self.T // steps
        offset = 1 if stride > 1 else 0  # with all T steps there is no room for it
        return [i * stride + offset for i in reversed(range(steps))]


# ---- Samplers ----------------------------------------------------------------------------------

Generators = torch.Generator | list[torch.Generator] | None


def normal_like(like: Tensor, generator: Generators) -> Tensor:
    """N(0, 1) of the shape of `like`, from one generator or from a list of one a row."""
    if isinstance(generator, list):
        return torch.stack([normal_like(row, g) for row, g in zip(like, generator)])
    device = generator.device if generator else like.device
    noise = torch.randn(like.shape, generator=generator, device=device, dtype=like.dtype)
    return noise.to(like.device)


@torch.no_grad()
def ddim_sample(model: Callable[[Tensor, Tensor], Tensor], zT: Tensor, steps: int,
                schedule: Schedule, eta: float = 0.0, generator: Generators = None,
                last: float | None = None) -> Tensor:
    """DDIM [Song et al. 2021, eq.12]: zT ~ N(0, 1) (B, 4, h, w) -> z0. model(zt, t (B,)) -> eps.

    eta 0 is deterministic, 1 has DDPM's variance. A list of generators gives each row its noise.
    last: the ᾱ that the last step goes to; None: ᾱ_0.
    """
    zt = zT
    stride = schedule.T // steps
    last = last or float(schedule.alpha_bar[0])  # TRAP: ᾱ_0 = 0.99915, not ᾱ = 1
    for t in schedule.timesteps(steps):
        a = float(schedule.alpha_bar[t])
        a_prev = float(schedule.alpha_bar[t - stride]) if t >= stride else last
        eps = model(zt, torch.full((len(zt),), t, device=zt.device))
        z0 = (zt - (1 - a) ** 0.5 * eps) / a**0.5  # TRAP: not clipped; latents are no pixels
        sigma = eta * ((1 - a_prev) / (1 - a) * (1 - a / a_prev)) ** 0.5  # [DDIM eq.16]
        zt = a_prev**0.5 * z0 + max(1 - a_prev - sigma**2, 0.0) ** 0.5 * eps
        if sigma > 0:
            zt = zt + sigma * normal_like(zt, generator)
    return zt


def ddpm_sample(model: Callable[[Tensor, Tensor], Tensor], zT: Tensor, schedule: Schedule,
                generator: Generators = None) -> Tensor:
    """Ancestral sampling [DDPM algorithm 2, variance β̃ of eq.7]: zT -> z0. It is DDIM at eta 1 in
    all T steps [DDIM 4.1], but that its last step goes to z0 itself."""
    return ddim_sample(model, zT, schedule.T, schedule, 1.0, generator, last=1.0)


# ---- 8-bit Adam (paper 2.5; Dettmers et al. 2022) ----------------------------------------------

BLOCK = 256  # elements that share one absolute maximum
SMALL = 4096  # tensors with fewer elements keep float32 moments


def dynamic_code(signed: bool) -> Tensor:
    """The 256 values in [-1, 1] (signed) or [0, 1] that an 8-bit state can take.

    Dense near zero, seven decades wide: decade 10^(i-6)…10^(i-5), i = 0…6, is cut into 2^i parts
    (signed, for each sign) or 2^(i+1). Their midpoints, 0 and 1 are the code.
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = np.linspace(0.1, 1.0, 2 ** (i if signed else i + 1) + 1)
        middles = 10.0 ** (i - 6) * (edges[:-1] + edges[1:]) / 2
        values.extend(middles)
        if signed:
            values.extend(-middles)
    return torch.tensor(sorted(values), dtype=torch.float32)


def quantize(x: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
    """x (n,) float32 -> uint8 (blocks, 256) positions of the nearest code, maxima (blocks, 1)."""
    blocks = nn.functional.pad(x, (0, -len(x) % BLOCK)).view(-1, BLOCK)
    largest = blocks.abs().amax(dim=1, keepdim=True)
    middles = (code[1:] + code[:-1]) / 2
    positions = torch.bucketize(blocks / largest.clamp(min=1e-38), middles)
    return positions.to(torch.uint8), largest


def adam_(p: Tensor, grad: Tensor, m: Tensor, v: Tensor, rates: Tensor) -> None:
    """One AdamW step in place, all (n,). rates: 1 - β1, 1 - β2, step size, eps, 1 - lr * decay."""
    m.copy_(m + (grad - m) * rates[0])
    v.copy_(v + (grad * grad - v) * rates[1])
    p.copy_((p - rates[2] * m / (v.sqrt() + rates[3])) * rates[4])  # decoupled decay, last


def adam8bit_(p: Tensor, grad: Tensor, m: Tensor, v: Tensor, rates: Tensor, m_max: Tensor,
              v_max: Tensor, signed: Tensor, unsigned: Tensor) -> None:
    """The same on moments of a byte; the step uses them before they are rounded again."""
    moments = ((m, m_max, signed), (v, v_max, unsigned))
    wide = [(code[q.int()] * largest).flatten()[:len(grad)] for q, largest, code in moments]
    adam_(p, grad, *wide, rates)
    for x, (q, largest, code) in zip(wide, moments):
        positions, maxima = quantize(x, code)
        q.copy_(positions)
        largest.copy_(maxima)


def in_memory_order(x: Tensor) -> Tensor:
    """A view of a dense tensor (channels_last, too) as (n,).

    TRAP: torch.compile makes a graph for each shape of a parameter, and gives up after eight.
    """
    return x.detach().as_strided((x.numel(),), (1,))


class Adam8bit(torch.optim.Optimizer):
    """AdamW whose two moments take one byte an element, but for tensors under `SMALL` elements.

    On CUDA the step of a tensor is one compiled graph: one to three kernels and about 20 bytes of
    traffic a parameter; its operations one by one would be 20 kernels and 250 bytes. Without the
    compiler it needs, for a moment, some ten float32 copies of the largest tensor.
    """

    def __init__(self, params, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-8, weight_decay: float = 1e-2, is_compiled: bool = True):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        self.codes = {"m": dynamic_code(True), "v": dynamic_code(False)}
        self.rules = (adam_, adam8bit_)
        if is_compiled and self.param_groups[0]["params"][0].is_cuda:
            self.rules = [torch.compile(rule, dynamic=True) for rule in self.rules]

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            rates = {}  # {step: `adam_`'s rates}; nearly always of one step
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, self.state[p], group, rates)

    def update(self, p: Tensor, state: dict, group: dict, rates: dict) -> None:
        self.codes = {name: code.to(p.device) for name, code in self.codes.items()}
        is_alike = p.grad.stride() == p.stride() and p.grad.dtype == torch.float32
        grad = p.grad if is_alike else torch.empty_like(p, dtype=torch.float32).copy_(p.grad)
        grad = in_memory_order(grad)
        if not state:
            state["step"] = torch.zeros(())
            for name, code in self.codes.items():
                state[name] = torch.zeros_like(grad)
                if len(grad) >= SMALL:
                    state[name], state[f"{name}_max"] = quantize(state[name], code)
        state["step"] += 1
        step = float(state["step"])
        if step not in rates:
            rates[step] = adam_rates(step, **group).to(p.device, non_blocking=True)
        common = (in_memory_order(p), grad, state["m"], state["v"], rates[step])
        if len(grad) < SMALL:
            self.rules[0](*common)
        else:
            self.rules[1](*common, state["m_max"], state["v_max"], *self.codes.values())


def adam_rates(step: float, lr, betas, eps, weight_decay, **others) -> Tensor:
    """What `adam_` takes, (5,). The moments' start at zero is corrected in the step size; eps acts
    on the corrected √v. TRAP: a compiled kernel cannot read numbers that are left on the CPU."""
    correction = (1 - betas[1] ** step) ** 0.5
    size = lr * correction / (1 - betas[0] ** step)
    return torch.tensor(
        [1 - betas[0], 1 - betas[1], size, eps * correction, 1 - lr * weight_decay])


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as flat tensors, `<parameter number>.<name>`."""
    tensors = {}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"{i}.{name}": value for name, value in state.items()}
    return tensors


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse. TRAP: Optimizer.load_state_dict would turn 8-bit states into float32, and a
    fused step walks memory: moments must lie in memory as their weights do (channels_last)."""
    for key, value in tensors.items():
        number, name = key.split(".")
        p = optimizer.param_groups[0]["params"][int(number)]
        is_clock = name == "step" and isinstance(optimizer, Adam8bit)  # read by the CPU
        place = value.to("cpu" if is_clock else p.device, copy=True)
        if value.shape == p.shape:
            place = torch.empty_like(p, dtype=value.dtype).copy_(value)
        optimizer.state[p][name] = place


# ---- Settings and presets (paper 2.5) ----------------------------------------------------------

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"


@dataclass(frozen=True)
class Train:
    """Every setting of `train`. The defaults are the preset `tiny`; --preset chooses others."""

    preset: str = "tiny"  # tiny | mini | paper | paper-v2
    data: str = "phantom"  # phantom, a folder, a zip, a quoted glob of shards, hf://…, pipe:…
    run_dir: str = ""  # run folder; empty: runs/PRESET. An existing one is resumed
    size: int = 64  # pixels, square
    steps: int = 1800  # optimizer steps of the UNet
    batch: int = 16  # images of one step, over all ranks and micro-batches
    micro_batch: int = 0  # images of one rank in one pass; 0: all of its share, 64 at most
    lr: float = 2e-3  # constant after the warm-up
    warmup: int = 50  # steps of linear warm-up
    optimizer: str = "adamw"  # adamw | adam8bit
    weight_decay: float = 1e-2  # decoupled, as AdamW has it. CHOICE: the diffusers script's
    clip: float = 1.0  # largest norm of the gradient; 0: none. CHOICE: the diffusers script's
    ema: float = 0.995  # decay of the average of weights that samples are drawn from; 0: none
    tokens: str = "global"  # global: c_GLB, the paper's method; all: patch tokens too (A.1)
    views: int = 2  # augmented views of each image encoded once; 0: encode at every step
    init: str = ""  # UNet to start from: sd15, a folder, a file or a hub id; empty: from scratch
    vae: str = ""  # folder, file or hub id (`id:subfolder`) of a VAE; empty: train one first
    vit: str = ""  # the same of a DINO
    vae_steps: int = 600  # of the VAE's training, where one is trained
    vit_steps: int = 250  # of DINO's training, where one is trained
    augment: bool = True  # random sharpening and affine maps (paper 2.5)
    seed: int = 0  # of all random numbers
    checkpoint_every: int = 300  # steps between checkpoints
    keep: int = 0  # newest checkpoints that are kept; 0: all
    sample_every: int = 900  # steps between sample grids
    gradient_checkpointing: bool = False  # less memory, a third more time
    device: str = "auto"  # auto | cpu | cuda
    dtype: str = "fp32"  # fp32 | bf16 (autocast; weights, gradients, moments stay float32)
    compile: bool = True  # torch.compile, on CUDA only
    workers: int = 0  # processes of each rank that read images; 0: the rank itself
    cache_gb: float = 20.0  # local room for shards of a remote --data
    offline: bool = False  # never ask the hub, use its cache alone
    unet_config: UNetConfig = field(default_factory=lambda: UNetConfig(
        block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=128,
        attention_head_dim=2, norm_num_groups=8, down_block_types=(CROSS, CROSS),
        sample_size=16))
    vae_config: VAEConfig = field(default_factory=lambda: VAEConfig(
        block_out_channels=(16, 32, 64), layers_per_block=1, norm_num_groups=8, sample_size=64))
    vae_settings: VAESettings = VAESettings()
    vit_config: ViTConfig = field(default_factory=lambda: ViTConfig(
        image_size=64, patch_size=8, hidden_size=128, depth=4, heads=4, mlp_ratio=2.0))
    dino_settings: DinoSettings = DinoSettings()


TINY = Train()

MINI = Train(
    preset="mini", data="", size=256, steps=8000, batch=64, lr=4e-4, warmup=500,
    optimizer="adam8bit", ema=0.999, vae_steps=6000, vit_steps=4000, views=0,
    checkpoint_every=2000, sample_every=1000, dtype="bf16", workers=8,
    unet_config=UNetConfig(
        block_out_channels=(96, 192, 256), layers_per_block=1, cross_attention_dim=256,
        attention_head_dim=8, down_block_types=(CROSS, CROSS, CROSS), sample_size=32),
    vae_config=VAEConfig(block_out_channels=(32, 64, 96, 128), layers_per_block=1,
                         sample_size=256),
    vae_settings=VAESettings(batch=16, crop=128, lr=1e-3),
    vit_config=ViTConfig(image_size=256, patch_size=16, hidden_size=256, depth=6, heads=4),
    dino_settings=DinoSettings(
        batch=64, lr=1.25e-4, momentum=0.99, out_dim=1024, head_hidden=1024, head_bottleneck=128,
        global_size=224, local_size=96, local_crops=4))

# CHOICE: 868,394 images / 512 = 1,696 steps an epoch, so 100 epochs are 169,600 steps; the paper
# says ~140,000, which we take.
PAPER = Train(
    preset="paper", data="", size=512, steps=140_000, batch=512, micro_batch=64, lr=1e-4,
    warmup=1000, optimizer="adam8bit", ema=0.0, vae=SD15 + ":vae", vit="facebook/dino-vitb16",
    views=0, checkpoint_every=2500, sample_every=2500, dtype="bf16", workers=8,
    unet_config=UNetConfig(), vae_config=VAEConfig(), vit_config=ViTConfig())

# CHOICE: five condition tokens instead of one make 64 images in one pass too tight for 80 GB.
PAPER_V2 = dataclasses.replace(PAPER, preset="paper-v2", micro_batch=32,
                               vit="timm/vit_base_patch14_reg4_dinov2.lvd142m",
                               vit_config=ViTConfig("timm", 518, 14, registers=4, layer_scale=True,
                                                    cls_position=False))

PRESETS = {preset.preset: preset for preset in (TINY, MINI, PAPER, PAPER_V2)}


def find_preset(name: str) -> Train:
    if name not in PRESETS:
        raise UserError(f"found --preset {name!r}, expected one of {', '.join(PRESETS)}")
    return PRESETS[name]


def preset_defaults(argv: list[str]) -> Train:
    """The preset that the command line names, whose values are the defaults of its other flags."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", default="tiny")
    return find_preset(parser.parse_known_args(argv)[0].preset)


# What a setting may be: one of some words, or a number from … to …; any other number from 0.
WORDS = {"optimizer": ("adamw", "adam8bit"), "dtype": ("fp32", "bf16"),
         "tokens": ("global", "all")}
COUNTS = ("steps", "batch", "vae_steps", "vit_steps", "checkpoint_every", "sample_every")
BOUNDS = {"size": (8, 4096), "lr": (1e-30, 1e30), "ema": (0, 0.999999), "seed": (0, 2**62)}
BOUNDS |= dict.fromkeys(COUNTS, (1, 2**31))


def odd_settings(values: dict) -> list[str]:
    """What of the settings {name: value} has another type than in `Train`, or is out of bounds."""
    odd = []
    for name, default in vars(TINY).items():
        value = values.get(name)
        expected = f"a value like {default!r}"
        is_sound = type(value) is type(default)
        if name in WORDS:
            expected = " or ".join(WORDS[name])
            is_sound = value in WORDS[name]
        elif type(default) in (int, float):
            low, high = BOUNDS.get(name, (0, 1e30))
            expected = f"a number from {low} to {high}"
            is_sound = type(value) in (int, type(default)) and low <= value <= high
        if not (is_sound or dataclasses.is_dataclass(default)):
            odd.append(f"--{name.replace('_', '-')} {value!r}, expected {expected}")
    return odd


def check_settings(s: Train, world: int) -> None:
    """Refuse, before any work, what cannot be trained. UserError says what would do."""
    wrong = odd_settings(vars(s))
    if wrong:
        raise UserError("found " + "; ".join(wrong))
    if s.size % 8:
        raise UserError(f"found --size {s.size}, expected a multiple of 8")
    if not s.data:
        raise UserError("found no --data, expected a folder, a quoted glob of tar shards, "
                        "hf://datasets/OWNER/NAME/GLOB or 'pipe:COMMAND {shard}'")
    unit = world * max(min(s.micro_batch, s.batch // world), 1)
    if s.batch % unit:
        raise UserError(f"found --batch {s.batch}, expected a multiple of {unit}: {world} ranks x "
                        f"--micro-batch {unit // world}")


def complete_settings(s: Train, world: int) -> Train:
    """Checked, and with the micro-batch and the run folder that are left to us."""
    check_settings(s, world)
    share = s.batch // world
    micro = max(m for m in range(1, min(share, 64) + 1) if share % m == 0)
    return dataclasses.replace(s, run_dir=s.run_dir or f"runs/{s.preset}",
                               micro_batch=min(s.micro_batch or micro, share))


# ---- Ranks: torchrun's processes, which run the same lines -------------------------------------


def pick_device(name: str) -> torch.device:
    """auto: this rank's GPU where there is one, else the CPU."""
    if name.split(":")[0] not in ("auto", "cpu", "cuda"):
        raise UserError(f"found --device {name!r}, expected auto, cpu or cuda")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"found no CUDA device (torch {torch.__version__}), expected one for "
                        f"--device {name}; use --device cpu or auto")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device(name if ":" in name else f"cuda:{os.environ.get('LOCAL_RANK', 0)}")


def start_ranks(device: torch.device) -> tuple[int, int]:
    """Join torchrun's process group, where there is one -> (rank, number of ranks)."""
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    # Objects and waits travel by gloo on the CPU, gradients by NCCL where there are GPUs. The
    # timeout is long because the others wait while rank 0 trains a stage or downloads.
    options = {"backend": "gloo", "timeout": datetime.timedelta(hours=24)}
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True  # shapes repeat, so the search for kernels pays
        options |= {"backend": "cpu:gloo,cuda:nccl", "device_id": device}
    if world > 1 and not dist.is_initialized():
        dist.init_process_group(**options)
    return rank, world


def train_command(settings: Train) -> None:
    """`train` as typed: on a CPU as rank 0 of one rank a core, one thread each.

    Small nets gain little from a second thread and lose nearly all to its waiting as soon as
    another program wants the core; ranks that exchange gradients keep three fifths beside it.
    """
    check_settings(settings, 1)
    count = max(n for n in range(1, min(data.cores(), 8) + 1) if settings.batch % n == 0)
    if "DINODIFF_PARENT" in os.environ:
        data.end_with(int(os.environ["DINODIFF_PARENT"]))
    elif "RANK" not in os.environ and pick_device(settings.device).type == "cpu" and count > 1:
        start_core_ranks(count)
    train(settings)


def start_core_ranks(count: int) -> None:
    """Start ranks 1, 2, … with this program's own command line, and become rank 0."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
                   "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    for rank in range(1, count):
        process = subprocess.Popen(
            [sys.executable, *sys.argv], stdin=subprocess.DEVNULL,
            env=os.environ | {"RANK": str(rank), "DINODIFF_PARENT": str(os.getpid())})
        threading.Thread(target=end_with_rank, args=(process,), daemon=True).start()
    os.environ["RANK"] = "0"
    torch.set_num_threads(1)


def end_with_rank(process: subprocess.Popen) -> None:
    """End this process soon after a rank of its own has failed, which might be waited for a day."""
    if process.wait():
        time.sleep(5)  # mostly that is noticed, and said, where the rank is waited for
        data.note("another rank has ended; its own message says why")
        os._exit(1)


def on_rank_0(function: Callable):
    """Rank 0 calls `function` while the others wait -> its result, or its error, on every rank."""
    outcome = [None, None]
    if int(os.environ.get("RANK", 0)) == 0:
        try:
            outcome[0] = function()
        except (UserError, OSError) as error:
            outcome[1] = str(error)
    if dist.is_initialized():
        dist.broadcast_object_list(outcome, device=torch.device("cpu"))
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]


def watch_signals() -> list[int]:
    """A list that Ctrl-C and SIGTERM put their number into: they ask for an orderly end.

    TRAP: a second one must not end at once: torchrun passes SIGTERM on to ranks that have it.
    """
    received = []
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda number, frame: received.append(number))
    return received


def wait_for(path: Path) -> Path:
    """`path`, which another machine has just written to a shared folder: it may show up late."""
    deadline = time.monotonic() + 60  # seconds
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    return path


def share_step(loss: Tensor, norm: Tensor, is_stopping: bool) -> tuple[float, float, bool]:
    """Mean loss and gradient norm of all ranks, and whether one is asked to stop. One collective
    and one transfer a step: nothing else makes the CPU wait for the GPU."""
    values = torch.stack([loss, norm, torch.full_like(norm, float(is_stopping))])
    if dist.is_initialized():
        dist.all_reduce(values)
        values[:2] /= dist.get_world_size()
    mean_loss, mean_norm, stops = values.tolist()
    return mean_loss, mean_norm, stops > 0


# ---- A run folder ------------------------------------------------------------------------------


@dataclass
class Run:
    """What `load_run` opens: the three nets of one checkpoint, frozen and in eval mode."""

    folder: Path
    config: dict  # config.json: every setting of the training
    size: int  # pixels
    step: int
    unet: UNet  # while it is trained: the moving average of its weights
    vae: VAE
    vit: ViT
    schedule: Schedule
    device: torch.device

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(4, h, w) of a latent."""
        side = self.size // self.vae.config.factor
        return self.vae.config.latent_channels, side, side


STEP_FOLDER = "step-" + "[0-9]" * 7  # of checkpoints/, as a glob


def checkpoint_steps(folder) -> list[int]:
    """Steps of the checkpoints of a run, ascending."""
    found = Path(folder, "checkpoints").glob(f"{STEP_FOLDER}/progress.json")
    return sorted(int(path.parent.name[5:]) for path in found)


def checkpoint_folder(folder, step: int) -> Path:
    return Path(folder, "checkpoints", f"step-{step:07d}")


def newest_run(root="runs") -> Path:
    """The run folder whose training was started last."""
    configs = list(Path(root).glob("*/config.json"))
    if not configs:
        raise UserError(f"no run under {Path(root).resolve()}; make one with "
                        "`python dinodiff.py train`, or name one with --run-dir")
    return max(configs, key=lambda path: path.stat().st_mtime).parent


def read_config(folder) -> dict:
    """config.json of a run: `Train`'s settings within their bounds, and the record `stages`."""
    path = Path(folder, "config.json")
    if not path.is_file():
        raise UserError(f"{folder} is no run folder (it has no config.json); make one with "
                        f"`python dinodiff.py train --run-dir {folder}`")
    config = {"stages": {}} | data.read_json(path)
    odd = odd_settings(config)
    if odd or type(config["stages"]) is not dict:
        raise UserError(f"{path}: found {'; '.join(odd) or 'an odd record of stages'}; the file is "
                        "damaged or of another version")
    return config


def best_step(folder) -> int | None:
    """The step in best.json, which `evaluate.py fid --checkpoints all` writes; None without it."""
    path = Path(folder, "best.json")
    return data.read_json(path).get("step") if path.is_file() else None


def load_run(folder, step: int | str | None = None, device="cpu") -> Run:
    """Open a run at `step` (None: the newest checkpoint; "best": best.json's).

    UserError says what is missing or damaged. Nothing that config.json names is opened or run.
    """
    folder = Path(folder)
    device = pick_device(str(device))
    config = read_config(folder)
    steps = checkpoint_steps(folder)
    if step is None:
        step = max(steps, default=None)
    wanted = str(best_step(folder) if step == "best" else step)
    if not wanted.isdecimal() or int(wanted) not in steps:
        raise UserError(f"{folder} has no checkpoint {step!r}, only the steps {steps}: `python "
                        "dinodiff.py train` makes them, `python evaluate.py fid --checkpoints all` "
                        "names the best")
    place = checkpoint_folder(folder, int(wanted))
    average = place / "ema"
    nets = [UNet.from_pretrained(average if average.is_dir() else place / "unet"),
            VAE.from_pretrained(folder / "vae"), ViT.from_pretrained(folder / "vit")]
    for net in nets:
        freeze(net, device)
        if device.type == "cuda" and config["dtype"] == "bf16":
            cast_products(net)
    return Run(folder, config, config["size"], int(wanted), *nets, Schedule(), device)


def freeze(net: nn.Module, device: torch.device) -> nn.Module:
    return net.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


def cast_products(net: nn.Module) -> None:
    """Weights of products and convolutions to bf16, once; autocast would at every call.

    TRAP: autocast remembers its casts of weights that are trained, but not of frozen ones.
    """
    for module in net.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.to(torch.bfloat16)


def autocast(device: torch.device, dtype: str):
    """bf16: products and convolutions in bfloat16 over float32 weights; fp32: nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16")


# ╔══ The paper's idea (2.3) ════════════════════════════════════════════════════════════════════╗
# ║ Stable Diffusion has c = text_encoder(caption); this has c = DINO(image): no label, no text. ║
def condition(vit: ViT, x: Tensor, tokens: str = "global") -> Tensor:
    """x (B, 3, H, W) in [-1, 1] -> c (B, S, N): c_GLB = [CLS, PLR, REG], or all tokens (A.1)."""
    return vit.global_tokens(vit.prepare(x)) if tokens == "global" else vit(vit.prepare(x))
# ╚══════════════════════════════════════════════════════════════════════════════════════════════╝


@torch.no_grad()
def encode_tokens(run: Run, images: Tensor) -> Tensor:
    """images uint8 (B, size, size) -> the run's condition c (B, S, N) float32 on its device."""
    with autocast(run.device, run.config["dtype"]):
        return condition(run.vit, to_model(images.to(run.device)), run.config["tokens"]).float()


@torch.no_grad()
def encode_latents(run: Run, images: Tensor) -> Tensor:
    """images uint8 (B, size, size) -> z0 (B, 4, h, w) float32: the posterior's mean, scaled."""
    with autocast(run.device, run.config["dtype"]):
        mean, _ = run.vae.encode(to_model(images.to(run.device)))
    return mean.float() * run.vae.config.scaling_factor


@torch.no_grad()
def decode_latents(run: Run, z0: Tensor) -> Tensor:
    """z0 (B, 4, h, w), scaled -> uint8 (B, size, size) on the CPU."""
    with autocast(run.device, run.config["dtype"]):
        return data.to_uint8(run.vae.decode(z0 / run.vae.config.scaling_factor).float()).cpu()


@torch.no_grad()
def generate(run: Run, c: Tensor, seeds: list[int], steps: int = 50, eta: float = 0.0) -> Tensor:
    """c (B, S, N), a seed for each image -> uint8 (B, size, size) on the CPU.

    Row i is a function of c[i] and seeds[i] alone. CHOICE: DDIM; the paper names no sampler.
    """
    generators = [generator("cpu", seed, 7) for seed in seeds]  # the same noise on every device
    zT = torch.stack([torch.randn(run.latent_shape, generator=g) for g in generators])
    zT = zT.to(run.device, memory_format=torch.channels_last)
    c = c.to(run.device)

    def predict_noise(zt: Tensor, t: Tensor) -> Tensor:
        with autocast(run.device, run.config["dtype"]):
            return run.unet(zt, t, c).float()

    return decode_latents(run, ddim_sample(predict_noise, zT, steps, run.schedule, eta, generators))


# ---- Checkpoints: whole, checked, and the one before where one is damaged ----------------------

HELD = []  # open lock files: a lock lasts until its process ends


def lock_run(folder: Path) -> None:
    """RUN/.lock: one process writes to a run, or stops here with the name of the one that does.
    TRAP: unlike `data.locked`'s flock, lockf is not inherited by workers, which may outlive us."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        raise UserError(f"{folder} is being trained by {file.read() or 'another process'}; wait "
                        "for it or stop it, or take another --run-dir") from None
    file.truncate(0)
    print(f"process {os.getpid()} on {socket.gethostname()}", end="", file=file, flush=True)
    HELD.append(file)


def checksums(folder: Path) -> dict[str, int]:
    """{file below folder: CRC-32 of its bytes}, progress.json left out."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "progress.json":
            content = np.memmap(path, mode="r") if path.stat().st_size else b""
            found[path.relative_to(folder).as_posix()] = zlib.crc32(content)
    return found


def damage(folder: Path, expected) -> str:
    """What of the files {name: CRC-32} is missing or changed in a folder; "" where nothing is."""
    if type(expected) is not dict:
        return f"the record of its files is {expected!r}"
    found = checksums(folder)
    wrong = [name for name in expected if found.get(name) != expected[name]]
    return f"{', '.join(wrong)} missing, cut or changed" if wrong else ""


def save_checkpoint(s: Train, run: Run, unet: UNet, optimizer) -> None:
    """checkpoints/step-N, whole or absent, with the checksums of its files in progress.json.

    Only then do older ones go: the optimizer of all but the two newest, all of what --keep drops.
    """
    with data.whole(checkpoint_folder(run.folder, run.step)) as partial:
        unet.save_pretrained(partial / "unet")
        if s.ema:
            run.unet.save_pretrained(partial / "ema")
        data.save_tensors(partial / "optimizer.safetensors", optimizer_tensors(optimizer))
        data.write_json(partial / "progress.json",
                        {"step": run.step, "files": checksums(partial)})
    for age, old in enumerate(reversed(checkpoint_steps(run.folder))):
        place = checkpoint_folder(run.folder, old)
        if age >= 2:
            (place / "optimizer.safetensors").unlink(missing_ok=True)
        if age >= s.keep > 0 and old != best_step(run.folder):
            shutil.rmtree(place)


def newest_whole_checkpoint(folder: Path) -> int:
    """The step that training goes on from, 0 for none. A damaged checkpoint is named, put aside.
    UserError where there are checkpoints and none is whole: nothing starts anew over them."""
    place = folder / "checkpoints"
    for leftover in place.glob(".*.partial"):
        shutil.rmtree(leftover)
    damaged = []
    for path in sorted(place.glob(STEP_FOLDER), reverse=True)[:2]:  # older ones have no optimizer
        try:
            problem = damage(path, data.read_json(path / "progress.json").get("files"))
        except UserError as error:
            problem = str(error)
        if not problem:
            for old in damaged:
                aside = old.with_name(f"damaged-{old.name}")
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(old, aside)
            return int(path.name[5:])
        data.note(f"{path}: {problem}; trying the one before it")
        damaged.append(path)
    if damaged:
        raise UserError(f"{folder}: no checkpoint is whole, so training cannot go on. Bring back a "
                        f"copy, or remove {place} to train the UNet anew")
    return 0


# ---- Views: the frozen encoders' work, done once -----------------------------------------------

VIEW_BLOCK = 1024  # images of one file
VIEW = ("mean", "logvar", "c")  # what a file holds of each, in float16


def view_file(run: Run, view: int, block: int) -> Path:
    return run.folder / "views" / f"view-{view}-{block:06d}.safetensors"


def make_views(run: Run, ds, rank: int, world: int) -> Callable:
    """Encode --views views of every image, all ranks together, but for files that are there -> what
    reads them: `read_views` of (ids, step). View k is the image as `augment` changes it at step k:
    view 0 is what training online sees at step 0."""
    missing = on_rank_0(lambda: plan_views(run, ds))
    for view, block in data.progress(missing[rank::world], "views", unit=f" x {VIEW_BLOCK} images"):
        ids = np.arange(block * VIEW_BLOCK, min((block + 1) * VIEW_BLOCK, len(ds)))
        parts = np.array_split(ids, -(-len(ids) // 64))
        encoded = [encode_view(run, ds.read(part), part, view) for part in parts]
        tensors = {name: torch.cat(x).half() for name, x in zip(VIEW, zip(*encoded))}
        data.save_tensors(view_file(run, view, block), tensors)
    on_rank_0(lambda: None)  # no rank reads before all have written
    return functools.partial(read_views, run, {})


def plan_views(run: Run, ds) -> list[tuple[int, int]]:
    """(view, block) of the files that are still to be made, after a look for the room they need.
    UserError where what is there is of other images, settings or encoders."""
    path = run.folder / "views" / "views.json"
    recipe = {name: run.config[name] for name in ("size", "seed", "tokens", "augment")}
    recipe |= {"images": ds.digest, "nets": [checksums(run.folder / net) for net in ("vae", "vit")]}
    if path.is_file() and data.read_json(path) != recipe:
        raise UserError(f"{path.parent} holds views of other images, settings or encoders; remove "
                        "that folder, and they are made again")
    data.write_json(path, recipe)
    every = itertools.product(range(run.config["views"]), range(-(-len(ds) // VIEW_BLOCK)))
    missing = [key for key in every if not view_file(run, *key).is_file()]
    row = sum(2 * x.numel() for x in encode_view(run, ds.read([0]), [0], 0))  # bytes of an image
    need = len(missing) * min(VIEW_BLOCK, len(ds)) * row / 1e9
    free = shutil.disk_usage(path.parent).free / 1e9
    if missing:
        print(f"views of {len(ds):,} images: {need:.2f} GB in {path.parent}", flush=True)
    if need > free:
        raise UserError(f"{path.parent}: {need:.1f} GB are needed and {free:.1f} GB free; take "
                        "fewer --views, or --views 0 to encode at every step")
    return missing


def read_views(run: Run, opened: dict, ids: np.ndarray, step: int) -> list[Tensor]:
    """ids (b,) -> mean, logvar (b, 4, h, w), c (b, S, N) float32; a view of each by chance.

    opened: a dict that keeps the files' memory maps from call to call.
    """
    chosen = data.uniforms(1, run.config["seed"], ids, step, 5)[:, 0] * run.config["views"]
    rows = []
    for view, i in zip(chosen.astype(int), ids):
        path = view_file(run, view, i // VIEW_BLOCK)
        if path not in opened:
            opened[path] = data.load_tensors(wait_for(path))
        rows.append([opened[path][name][i % VIEW_BLOCK] for name in VIEW])
    return [torch.stack(parts).float() for parts in zip(*rows)]


@torch.no_grad()
def encode_view(run: Run, pictures: Tensor, ids, draw: int) -> list[Tensor]:
    """uint8 (b, H, W) -> mean, logvar (b, 4, h, w), c (b, S, N) of the images as augmented.

    draw: number of the augmentation, which is the step, or the view.
    CHOICE: DINO sees the augmented image, as the VAE does, so the pair (z0, c) stays true.
    """
    pictures = pictures.to(run.device, non_blocking=True)
    x = to_model(pictures)
    if run.config["augment"]:
        x = data.augment(pictures, ids, draw, run.config["seed"]).expand(-1, 3, -1, -1)
    with autocast(run.device, run.config["dtype"]):
        mean, logvar = run.vae.encode(x.contiguous(memory_format=torch.channels_last))
        c = condition(run.vit, x, run.config["tokens"])
    return [mean.float(), logvar.float(), c.float()]


# ---- Before the loop: settings, stages, what is trained ----------------------------------------

# Settings with which a run may go on though it began with others
MAY_CHANGE = ("run_dir", "steps", "micro_batch", "lr", "warmup", "clip", "checkpoint_every", "keep",
              "sample_every", "device", "compile", "workers", "cache_gb", "offline",
              "gradient_checkpointing")
NETS = {"vae": VAE, "vit": ViT, "init": UNet}  # folder of a run -> what it holds


def absolute(value):
    """A text as a path: ./x is x."""
    return os.path.abspath(value) if isinstance(value, str) else value


def begin_run(s: Train) -> dict:
    """-> config.json as it is to be, with its record `stages`; UserError for another run's folder.
    """
    new = json.loads(json.dumps(dataclasses.asdict(s)))
    if not Path(s.run_dir, "config.json").is_file():
        return new | {"stages": {}}
    old = read_config(s.run_dir)
    changed = [name for name in new if absolute(old.get(name)) != absolute(new[name])]
    told = "".join(f"\n  {name}: the run has {old.get(name)!r}, now {new[name]!r}"
                   for name in changed)
    if set(changed) - set(MAY_CHANGE):
        raise UserError(f"{s.run_dir} holds a run with other settings:{told}\nTrain under another "
                        "--run-dir, or give it what it began with.")
    if changed:
        print(f"going on with other settings:{told}", flush=True)
    return old | new


def finish_stages(s: Train, ds, device: torch.device) -> None:
    """vae/, vit/ (and init/) of the run: as they are, copied from a source, or trained. Rank 0
    alone, with all cores; a killed training starts again and gives the same weights. What was
    finished once is never replaced in silence: config.json holds its checksums."""
    threads = torch.get_num_threads()
    torch.set_num_threads(data.cores())
    config = begin_run(s)
    path = Path(s.run_dir, "config.json")
    data.write_json(path, config)
    for name in ("vae", "vit", "init") if s.init else ("vae", "vit"):
        place = Path(s.run_dir, name)
        if name not in config["stages"]:
            if not place.is_dir():
                net = make_net(name, s, ds, device)
                with data.whole(place) as partial:
                    net.save_pretrained(partial)
            NETS[name].from_pretrained(place)  # a copy that does not open is not recorded
            config["stages"][name] = checksums(place)
            data.write_json(path, config)
        elif problem := damage(place, config["stages"][name]):
            raise UserError(f"{place} is not what this run was trained with: {problem}. Bring back "
                            "a copy, or train under another --run-dir")
    torch.set_num_threads(threads)


def make_net(name: str, s: Train, ds, device: torch.device) -> nn.Module:
    """A net from its source, or, for the small presets, from a training of minutes."""
    source = getattr(s, name)
    if source:
        return NETS[name].from_pretrained(f"{SD15}:unet" if source == "sd15" else source)
    vae_config = dataclasses.replace(s.vae_config, sample_size=s.size)
    train_net, config, recipe, steps = {
        "vae": (train_vae, vae_config, s.vae_settings, s.vae_steps),
        "vit": (train_dino, s.vit_config, s.dino_settings, s.vit_steps)}[name]
    recipe = dataclasses.replace(recipe, steps=steps, seed=s.seed)
    return train_net(config, recipe, ds, device, Log(s, name, steps).write, s.workers)


def from_scratch(config: UNetConfig) -> UNet:
    """A new UNet. CHOICE: residual branches and the output start at zero: depth comes gradually."""
    unet = UNet(config)
    for name, weight in unet.named_parameters():
        if name.endswith(("conv2.weight", "proj_out.weight")) or name == "conv_out.weight":
            nn.init.zeros_(weight)
    return unet


def open_unet(s: Train, run: Run) -> tuple[UNet, torch.optim.Optimizer]:
    """The UNet and its optimizer: of the newest whole checkpoint, of --init, or new.

    Sets run.step to the checkpoint's, and run.unet to the average of weights, where there is one.
    """
    run.step = on_rank_0(lambda: newest_whole_checkpoint(run.folder))
    place = wait_for(checkpoint_folder(run.folder, run.step)) if run.step else None
    width = run.vit.config.hidden_size
    torch.manual_seed(s.seed)
    if place or s.init:
        unet = UNet.from_pretrained(place / "unet" if place else run.folder / "init")
    else:
        unet = from_scratch(dataclasses.replace(s.unet_config, cross_attention_dim=width))
    if unet.config.cross_attention_dim != width:
        raise UserError(f"the UNet takes tokens of width {unet.config.cross_attention_dim}, this "
                        f"DINO gives {width}")
    unet.to(run.device, memory_format=torch.channels_last)
    unet.gradient_checkpointing = s.gradient_checkpointing
    run.unet = unet
    if s.ema:
        average = UNet.from_pretrained(place / "ema") if place else copy.deepcopy(unet)
        run.unet = freeze(average, run.device)
    optimizer = make_optimizer(s, unet)
    if place:
        restore_optimizer(optimizer, data.load_tensors(place / "optimizer.safetensors"))
    compile_on_gpu(s, unet)
    if run.device.type == "cuda":
        c = condition(run.vit, torch.zeros(1, 3, 8, 8, device=run.device), s.tokens)
        on_rank_0(lambda: print(memory_plan(s, unet.config, c.shape[1]), flush=True))
    return unet, optimizer


def make_optimizer(s: Train, unet: UNet) -> torch.optim.Optimizer:
    options = {"lr": s.lr, "weight_decay": s.weight_decay}  # betas 0.9 and 0.999, eps 1e-8
    if s.optimizer == "adam8bit":
        return Adam8bit(unet.parameters(), **options, is_compiled=s.compile)
    return torch.optim.AdamW(unet.parameters(), **options, fused=True)


def compile_on_gpu(s: Train, net: nn.Module) -> None:
    """On CUDA; in place, so that weights keep their names."""
    if s.compile and next(net.parameters()).is_cuda:
        torch._dynamo.config.optimize_ddp = False  # one graph; DDP's cuts would make 71 of it
        net.compile()


def memory_plan(s: Train, config: UNetConfig, tokens: int) -> str:
    """GB of a training step of the UNet, in all and by part, counted without computing."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    kept = {}  # storages that the forward pass keeps for the backward pass -> bytes

    def note(x: Tensor) -> Tensor:
        if not isinstance(x, nn.Parameter):
            kept[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    side = s.size // s.vae_config.factor
    with FakeTensorMode(), torch.autograd.graph.saved_tensors_hooks(note, note):
        unet = UNet(config)
        unet.gradient_checkpointing = s.gradient_checkpointing
        out = unet(torch.zeros(s.micro_batch, 4, side, side), torch.zeros(s.micro_batch).long(),
                   torch.zeros(s.micro_batch, tokens, config.cross_attention_dim))
        weights = sum(p.numel() for p in unet.parameters()) * 4e-9
        del out  # its graph held the storages apart until here
    # At full size autocast keeps 73 of 108 GB (norms stay float32), and the compiler, which
    # recomputes what is cheap, 47 of these.
    share = 0.68 if s.dtype == "bf16" else 1.0
    if s.compile and not s.gradient_checkpointing:
        share *= 0.65
    parts = {"weights": weights, "gradients": weights, "average": weights * (s.ema > 0),
             "optimizer": weights * (0.51 if s.optimizer == "adam8bit" else 2),
             "activations": share * sum(kept.values()) * 1e-9}
    listed = ", ".join(f"{name} {size:.1f}" for name, size in parts.items())
    return (f"a step of {s.micro_batch} images a pass takes about {sum(parts.values()):.1f} GB "
            f"({listed}); a smaller --micro-batch or --gradient-checkpointing takes less")


# ---- Training (paper 2.5) ----------------------------------------------------------------------


class Log:
    """log.jsonl: a line a step of the stages vae, vit and unet, by rank 0. Lines of this stage
    later than step `start` are removed: those steps run again."""

    def __init__(self, s: Train, stage: str, steps: int, start: int = 0):
        self.patience = min(10, steps)
        self.skipped = 0  # steps in a row
        self.mean = None  # of the loss, over some hundred steps
        self.least = math.inf  # that it has been
        self.is_rank_0 = os.environ.get("RANK", "0") == "0"
        path = os.devnull
        if self.is_rank_0:
            path = Path(s.run_dir, "log.jsonl")
            data.write_file(path, "".join(kept_lines(path, stage, start)))
        self.file = open(path, "a", buffering=1)

    def write(self, row: dict) -> None:
        """A step's numbers. `skipped` names images of a step whose loss or gradient was not finite;
        after ten such steps in a row: UserError. A mean loss that rises threefold is told."""
        self.skipped = self.skipped + 1 if "skipped" in row else 0
        if self.skipped:
            row |= {"loss": str(row["loss"]), "grad_norm": str(row["grad_norm"])}
        else:
            self.mean = row["loss"] if self.mean is None else 0.99 * self.mean + 0.01 * row["loss"]
            self.least = min(self.least, self.mean)
            if self.is_rank_0 and self.mean > 3 * self.least:
                data.note(f"step {row['step']} of stage {row['stage']}: the mean loss has risen "
                          f"from {self.least:.3g} to {self.mean:.3g}, which seldom mends itself: "
                          "--lr may be too high. Train under another --run-dir with a lower one, "
                          "from scratch or (--init) from a checkpoint's unet/ of before")
                self.least = math.inf
        self.file.write(json.dumps(row) + "\n")
        if self.skipped == self.patience:
            raise UserError(
                f"{self.skipped} steps in a row, up to step {row['step']} of stage {row['stage']}, "
                f"had a loss or gradient that is not finite (now {row['loss']} and "
                f"{row['grad_norm']}); images of the last: {', '.join(row['skipped'])}. Give the "
                "same command with a lower --lr: it goes on from the last checkpoint, which is "
                "whole (the lr of vae and vit: `vae_settings`, `dino_settings`)")


def kept_lines(path: Path, stage: str, start: int) -> list[str]:
    kept = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
            if row["stage"] != stage or row["step"] <= start:
                kept.append(line + "\n")
        except (ValueError, TypeError, KeyError, RecursionError):
            data.note(f"{path}: dropped a line that is no record: {line[:60]!r}")
    return kept


def draw_step(s: Train, step: int, latent: tuple, device) -> tuple[Tensor, Tensor, Tensor]:
    """t (batch,), eps and the posterior's noise (batch, 4, h, w) of one global batch.

    A function of (seed, step) alone: every rank draws the same and takes its rows.
    """
    g = generator(device, s.seed, step, 0)
    t = torch.randint(0, 1000, (s.batch,), generator=g, device=device)
    eps = torch.randn(s.batch, *latent, generator=g, device=device)
    noise = torch.randn(s.batch, *latent, generator=g, device=device)
    return t, eps, noise


@torch.no_grad()
def update_average(average: UNet, unet: UNet, decay: float, step: int) -> None:
    """average += (1 - decay) (unet - average). TRAP: with gradients on, its graph would grow."""
    decay = min(decay, step / (step + 9))  # a short memory at first: the start is random
    torch._foreach_lerp_(list(average.parameters()), list(unet.parameters()), 1 - decay)


def open_frozen(s: Train, device: torch.device, rank: int) -> tuple[Run, data.XRays]:
    """Data, VAE and DINO of a run, which is begun or gone on with: everything but the UNet."""
    folder = Path(s.run_dir)
    on_rank_0(lambda: lock_run(folder))
    ds = data.open_data(s.data, s.size, seed=s.seed, cache_gb=s.cache_gb)
    if on_rank_0(lambda: ds.digest) != ds.digest:
        raise UserError(f"--data {s.data} is not the same here as on rank 0; expected the same "
                        "files in the same place on every machine")
    if rank == 0:
        print(f"{folder}: preset {s.preset}, {len(ds):,} images of {s.data}, {s.size} px, {device}"
              f", {s.batch} images a step, {s.micro_batch} a rank and pass", flush=True)
    on_rank_0(lambda: finish_stages(s, ds, device))
    vae = freeze(VAE.from_pretrained(wait_for(folder / "vae")), device)
    vit = freeze(ViT.from_pretrained(wait_for(folder / "vit")), device)
    compile_on_gpu(s, vae.encoder)
    return Run(folder, vars(s), s.size, 0, None, vae, vit, Schedule(), device), ds


def train(settings: Train) -> None:
    """Stages 1 and 2 where the run has no VAE and no DINO; then the UNet, from its checkpoint."""
    device = pick_device(settings.device)
    rank, world = start_ranks(device)
    s = complete_settings(settings, world)
    share = s.batch // world  # images of this rank in a step
    run, ds = open_frozen(s, device, rank)
    read = make_views(run, ds, rank, world) if s.views else None
    unet, optimizer = open_unet(s, run)  # sets run.step, and run.unet to the average
    model = DistributedDataParallel(unet, gradient_as_bucket_view=True) if world > 1 else unet
    batches = data.batches(ds, s.batch, run.step, s.seed, rank, world, s.micro_batch, s.workers,
                           read=read)
    log = Log(s, "unet", s.steps, run.step)
    signals = watch_signals()
    bar = data.progress(range(run.step, s.steps), "UNet", s.steps, "step", run.step)
    clock = time.perf_counter()
    for step in bar:
        t, eps, noise = draw_step(s, step, run.latent_shape, device)  # [DDPM algorithm 1]
        lr = s.lr * min(1.0, (step + 1) / max(s.warmup, 1))  # linear warm-up, then constant
        optimizer.param_groups[0]["lr"] = lr
        loss_sum = torch.zeros((), device=device)
        for first in range(rank * share, (rank + 1) * share, s.micro_batch):
            rows = slice(first, first + s.micro_batch)
            _, ids, item = next(batches)
            if s.views:
                mean, logvar, c = [part.to(device, non_blocking=True) for part in item]
            else:
                mean, logvar, c = encode_view(run, item, ids, step)
            # CHOICE: z0 is a sample of the posterior, as Stable Diffusion was trained, not its mean
            z0 = (mean + torch.exp(0.5 * logvar) * noise[rows]) * run.vae.config.scaling_factor
            zt = run.schedule.add_noise(z0, eps[rows], t[rows])
            if world > 1:  # in the last pass the gradients travel between the ranks
                model.require_backward_grad_sync = rows.stop == (rank + 1) * share
            with autocast(device, s.dtype):
                eps_hat = model(zt, t[rows], c)
            loss = (eps[rows] - eps_hat.float()).square().mean() * len(zt) / share  # eq. (1)
            loss.backward()
            loss_sum += loss.detach()

        norm = nn.utils.clip_grad_norm_(unet.parameters(), s.clip or math.inf)
        loss_mean, norm, stops = share_step(loss_sum, norm, bool(signals))
        now = time.perf_counter()  # a step is from here to here: its update is in the next one's
        rate = round(s.batch / (now - clock), 2)
        clock = now
        run.step = step + 1
        row = {"stage": "unet", "step": run.step, "loss": loss_mean, "lr": lr, "grad_norm": norm,
               "images_per_s": rate}
        if math.isfinite(loss_mean + norm):
            optimizer.step()
            if s.ema:
                update_average(run.unet, unet, s.ema, run.step)
        else:  # the weights stay as they are
            row["skipped"] = [ds.keys[i] for i in ids[:8].tolist()]
        optimizer.zero_grad(set_to_none=world == 1)  # kept, they stay views of DDP's buckets
        log.write(row)
        bar.set_postfix_str(f"loss {loss_mean:.4f}, {rate} images/s", refresh=False)
        if rank == 0:
            save_step(s, run, ds, unet, optimizer, log.skipped, stops)
        if stops:
            break
    bar.close()
    finish(s, run, rank, world)


def save_step(s: Train, run: Run, ds, unet: UNet, optimizer, skipped: int, stops: bool) -> None:
    """The grid and the checkpoint that are due; the last one, too, when training is to stop. The
    grid comes first, so that no kill can come between them, but never delays a stop."""
    is_end = run.step == s.steps
    if not stops and (is_end or run.step % s.sample_every == 0):
        # Other shapes than the training's, twice in an hour: not worth a compilation. On a CPU
        # nothing is compiled, and this would load the compiler: 3 s and 70 MB.
        is_compiled = run.device.type == "cuda"
        with torch.compiler.set_stance("force_eager") if is_compiled else contextlib.nullcontext():
            save_grid(run, ds)
    is_end = is_end or stops
    # Weights that give no finite numbers are not saved, but for one bad step at the end.
    if (is_end or run.step % s.checkpoint_every == 0) and skipped <= is_end:
        save_checkpoint(s, run, unet, optimizer)


def finish(s: Train, run: Run, rank: int, world: int) -> None:
    """Say where the run stands and what comes next; leave the process group."""
    if rank == 0:
        HELD.pop().close()
        step = max(checkpoint_steps(run.folder), default=0)
        print(f"{run.folder} stands at step {step} of {s.steps}; the same command goes on from it. "
              f"Grids: {run.folder}/samples, log: {run.folder}/log.jsonl"
              f"\nnext: python dinodiff.py sample --run-dir {run.folder} --images …   or   python "
              f"evaluate.py --run-dir {run.folder}")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def save_grid(run: Run, ds) -> None:
    """samples/step-N.png. A row: a real X-ray A, its VAE round trip, and with one noise what
    becomes of its reconstruction as the condition goes to that of the next row's image B."""
    real = ds.read(np.linspace(0, len(ds) - 1, min(6, len(ds))).astype(int))
    c = encode_tokens(run, real)
    columns = {"real A": real, "VAE of A": decode_latents(run, encode_latents(run, real))}
    for r in (0.0, 0.25, 0.5, 0.75, 1.0):
        towards = torch.lerp(c, c.roll(-1, 0), r)
        columns[f"r = {r:g}"] = generate(run, towards, list(range(len(c))), steps=25)
    columns["real B"] = real.roll(-1, 0)
    cells = torch.stack(list(columns.values()), dim=1).flatten(0, 1)
    sheet = data.grid(cells, len(columns), [*columns] * len(real),
                      title=f"step {run.step:,}: one noise from r = 0 (A) to r = 1 (B)")
    data.save_png(run.folder / "samples" / f"step-{run.step:07d}.png", sheet)


# ---- Sampling from a run (paper 2.3) -----------------------------------------------------------


@dataclass(frozen=True)
class SampleSettings:
    """Settings of `sample`."""

    run_dir: str = ""  # run folder; empty: the newest under runs/
    images: tuple[str, ...] = ()  # X-rays whose tokens condition the samples: files or folders
    data: str = ""  # or a data set (see `train`) with --keys
    keys: tuple[str, ...] = ()  # images of --data
    mode: str = "reconstruct"  # reconstruct | interpolate (each image and the next) | mix (A.1)
    variants: int = 4  # samples of each condition, each from noise of its own
    ratios: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)  # r: 0 is the first image, 1 the second
    out: str = "out"  # folder for the PNGs
    step: str = ""  # checkpoint: a step, or best; empty: the newest
    steps: int = 50  # of DDIM; the start is at full noise where they divide 1000
    eta: float = 0.0  # 0: deterministic DDIM … 1: DDPM's variance
    batch: int = 32  # images in one pass
    seed: int = 0  # a sample depends on this, its images' pixels and its variant alone
    exact_seed: int = -1  # the very seed of every sample, as records of synthetic images have it
    device: str = "auto"  # auto | cpu | cuda
    offline: bool = False  # never ask the hub, use its cache alone


@dataclass
class Job:
    """One image to make, and the one or two real ones that it comes from."""

    name: str
    sources: Tensor  # uint8 (1 or 2, size, size)
    c: Tensor  # (S, N)
    seed: int


def plan_samples(s: SampleSettings, names: list[str], images: Tensor, tokens: Tensor,
                 vit: ViT) -> list[Job]:
    """The images of a mode. Interpolation keeps the noise along r, so that only c changes. A seed
    comes from the sources' pixels: a sample is the same whatever else is made."""
    jobs = []
    ends = 1 if s.mode == "reconstruct" else 2
    for i, v in itertools.product(range(len(names) - ends + 1), range(s.variants)):
        sources = images[i:i + ends]
        name = "_".join(names[i:i + ends]) + f"_v{v}"
        seed = s.exact_seed
        if seed < 0:
            pixels = [zlib.crc32(image.numpy()) for image in sources]
            seed = int(data.hash64(s.seed, v, *pixels) >> np.uint64(2))
        if s.mode == "reconstruct":
            conditions = {name: tokens[i]}
        elif s.mode == "mix":
            conditions = {name: mix_tokens(tokens[i], tokens[i + 1], vit.config)}
        else:  # ĉ = lerp(c_s, c_t, r)
            conditions = {f"{name}_r{r:g}": torch.lerp(*tokens[i:i + 2], r) for r in s.ratios}
        jobs += [Job(name, sources, c, seed) for name, c in conditions.items()]
    return jobs


def sample(settings: SampleSettings) -> None:
    """Reconstructions, interpolations or mixtures of real X-rays: a PNG each, and one grid."""
    s = settings
    if s.mode not in ("reconstruct", "interpolate", "mix") or min(s.variants, s.batch) < 1:
        raise UserError(f"found --mode {s.mode} --variants {s.variants} --batch {s.batch}, "
                        "expected reconstruct, interpolate or mix, and at least 1")
    run = load_run(s.run_dir or newest_run(), s.step or None, s.device)
    if s.mode == "mix" and run.config["tokens"] != "all":
        raise UserError(f"mix needs patch tokens, and {run.folder} was trained on global ones; "
                        "train with --tokens all (appendix A.1)")
    real = data.read_pictures(s.images, run.size)
    if s.data:
        real |= data.open_data(s.data, run.size, seed=run.config["seed"] + 1).named(s.keys)
    if len(real) < (1 if s.mode == "reconstruct" else 2):
        raise UserError(f"found {len(real)} readable X-rays, expected at least one, or two for "
                        "interpolate and mix: name files or folders with --images")
    images = torch.stack(list(real.values()))
    tokens = torch.cat([encode_tokens(run, part) for part in images.split(s.batch)])
    jobs = plan_samples(s, list(real), images, tokens, run.vit)
    clock = time.perf_counter()
    pictures = []
    for k in data.progress(range(0, len(jobs), s.batch), desc="sample", unit="batch"):
        part = jobs[k:k + s.batch]  # filled across conditions
        c = torch.stack([job.c for job in part])
        pictures.extend(generate(run, c, [job.seed for job in part], s.steps, s.eta))
    rate = len(jobs) / (time.perf_counter() - clock)
    for job, picture in zip(jobs, pictures):
        data.save_png(Path(s.out, f"{job.name}.png"), picture.numpy())
    cells = []
    captions = []
    width = len({f"{r:g}" for r in s.ratios}) if s.mode == "interpolate" else s.variants
    for k in range(0, len(jobs), width):  # a row: the real image, those made from it, the second
        row = jobs[k:k + width]
        first, *second = row[0].sources
        cells += [first, *pictures[k:k + width], *second]
        captions += ["real", *[job.name.split("_")[-1] for job in row], *["real"] * len(second)]
    sheet = data.grid(cells, len(cells) * width // len(jobs), captions,
                      title=f"{run.folder.name}, step {run.step:,}: {s.mode}")
    data.save_png(Path(s.out, f"{s.mode}.png"), sheet)
    print(f"{len(jobs)} images ({rate:.2f} images/s, {s.steps} steps, {run.device}) and the grid "
          f"{s.mode}.png are in {Path(s.out).resolve()}")


def mix_tokens(a: Tensor, b: Tensor, config: ViTConfig) -> Tensor:
    """All tokens (S, N) of two images -> the upper half's patch tokens from a, the lower's from b.
    CHOICE: global tokens are the mean of both; the paper speaks of patches only (A.1, Figure 7)."""
    lead = config.global_count
    half = (lead + len(a)) // 2
    return torch.cat([(a[:lead] + b[:lead]) / 2, a[lead:half], b[half:]])


# ---- Benchmark ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """Settings of `bench`: the networks of a preset with random weights."""

    preset: str = "tiny"  # tiny | mini | paper | paper-v2
    micro_batch: int = 8  # images in one pass
    device: str = "auto"  # auto | cpu | cuda
    dtype: str = "fp32"  # fp32 | bf16
    compile: bool = True  # torch.compile, on CUDA only
    gradient_checkpointing: bool = False  # less memory, a third more time


def seconds_of(part: Callable) -> float:
    """Seconds of the fastest of five calls, after those that warm up; sharing only adds time."""
    timer = Timer("part()", globals={"part": part}, num_threads=torch.get_num_threads())
    return min(timer.timeit(1).median for _ in range(5))


def bench_parts(s: Train, device: torch.device) -> tuple[UNet, dict[str, Callable]]:
    """A UNet with random weights, and {title: what runs one part of the work}."""
    B = s.micro_batch
    with device:
        unet = UNet(s.unet_config).to(memory_format=torch.channels_last)
        unet.gradient_checkpointing = s.gradient_checkpointing
        vae = freeze(VAE(s.vae_config), device)
        vit = freeze(ViT(s.vit_config), device)
        side = s.size // vae.config.factor
        x = torch.rand(B, 3, s.size, s.size) * 2 - 1
        zt = torch.randn(B, 4, side, side)
        c = torch.randn(B, vit.config.global_count, vit.config.hidden_size)
        t = torch.zeros(B, dtype=torch.long)
    compile_on_gpu(s, unet)
    compile_on_gpu(s, vae.encoder)
    return unet, {
        "UNet forward": torch.no_grad()(lambda: unet(zt, t, c)),
        "UNet forward and backward": lambda: unet(zt, t, c).float().square().mean().backward(),
        "VAE encode": lambda: vae.encode(x), "VAE decode": lambda: vae.decode(zt),
        "DINO tokens": lambda: condition(vit, x)}


def count_flops(s: Train) -> dict[str, int]:
    """Floating-point operations of each part for one image, counted on the meta device."""
    flops = {}
    _, parts = bench_parts(dataclasses.replace(s, micro_batch=1), torch.device("meta"))
    for title, part in parts.items():
        with FlopCounterMode(display=False) as counter:
            part()
        flops[title] = counter.get_total_flops()
    return flops


def bench(settings: Bench) -> None:
    """FLOPs (counted), time, share of the machine's peak and memory of each part of the work."""
    device = pick_device(settings.device)
    start_ranks(device)  # TF32 and cuDNN's search, as in training
    changes = vars(settings) | {"batch": settings.micro_batch, "data": "none"}
    s = dataclasses.replace(find_preset(settings.preset), **changes)
    check_settings(s, 1)
    flops = count_flops(s)
    print(memory_plan(s, s.unet_config, s.vit_config.global_count), flush=True)
    unet, parts = bench_parts(s, device)
    parts[f"{s.optimizer} step"] = make_optimizer(s, unet).step
    n = 8192 if device.type == "cuda" else 1024
    kind = torch.bfloat16 if s.dtype == "bf16" else torch.float32
    square = torch.randn(n, n, device=device, dtype=kind)
    peak = 2 * n**3 / seconds_of(lambda: square @ square)
    print(f"{s.preset}, {s.dtype}, {device}, peak of a matrix product {peak / 1e12:.2f} TFLOP/s\n"
          f"  {'':<27}{'GFLOP/image':>12}{'ms/pass':>10}{'images/s':>10}{'% of peak':>11}{'GB':>7}")
    for title, part in parts.items():
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        # Around each call, for autocast remembers its casts until it is left.
        seconds = seconds_of(autocast(device, s.dtype)(part))
        memory = torch.cuda.max_memory_allocated()  # 0 on a CPU
        rate = s.micro_batch / seconds
        work = flops.get(title, 0)
        print(f"  {title:<27}{work / 1e9:>12.2f}{1e3 * seconds:>10.1f}{rate:>10.1f}"
              f"{100 * work * rate / peak:>11.1f}{memory / 1e9:>7.1f}", flush=True)


if __name__ == "__main__":
    data.command_line(__doc__, {"train": (preset_defaults, train_command),
                                "sample": (SampleSettings(), sample), "bench": (Bench(), bench)})
