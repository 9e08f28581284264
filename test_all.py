"""Every test. The name of a test states a property; its docstring says which bug it would catch.

    python -m pytest test_all.py            all of it, minutes on two cores; what needs a missing library is skipped and says so
    python -m pytest test_all.py -k unet    a part of it

Reference libraries (diffusers, transformers, timm) judge the numbers where they are installed; nothing else needs them.
"""

from __future__ import annotations

import ast
import dataclasses
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import data
import diffseg
import dinodiff
import evaluate
import unet as unet_file
from data import FINDINGS, UserError, read_weights, render_phantom, to_model, write_weights
from dinodiff import Adam8bit, Schedule, ddim_sample, ddpm_sample
from unet import CROSS, UNet, UNetConfig
from vae import VAE, Downsample, VAEConfig, VAESettings, train_vae
from vit import DinoSettings, ViT, ViTConfig, crop, knn_probe, train_dino

HERE = Path(__file__).parent
LAYOUTS = HERE.parent / "shared" / "layouts"  # key -> shape of the public checkpoints, where the checkout has them beside it

# Four levels, two ResNets a level and more than one head, as the public networks have: a smaller one would hide the traps.
SMALL_UNET = dict(block_out_channels=(32, 64, 96, 96), attention_head_dim=4, cross_attention_dim=24, norm_num_groups=8)
SMALL_VAE = dict(block_out_channels=(16, 32, 48, 48), norm_num_groups=8)


def public_keys(name: str) -> dict:
    """Key -> shape of a public checkpoint, or skip."""
    if not (LAYOUTS / f"{name}.json").is_file():
        pytest.skip(f"no {name}.json beside the checkout")
    return {k: tuple(v) for k, v in json.loads((LAYOUTS / f"{name}.json").read_text()).items()}


# ---- The UNet -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference_unet():
    diffusers = pytest.importorskip("diffusers", reason="diffusers judges the UNet")
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(**SMALL_UNET, layers_per_block=2).double().eval()


@pytest.mark.parametrize("tokens, side", [(1, 16), (5, 16), (5, 12)])
def test_unet_equals_diffusers(reference_unet, tokens, side):
    """Epsilons of the norms, head count, order of cos and sin, padding, GEGLU's halves, skips: any of them moves 1e-9."""
    ours = UNet(UNetConfig(**SMALL_UNET)).double()
    ours.load_state_dict(reference_unet.state_dict(), strict=True)
    z, t, c = torch.randn(2, 4, side, side).double(), torch.tensor([3, 961]), torch.randn(2, tokens, 24).double()
    maps = []
    with torch.no_grad():
        expected = reference_unet(z, t, c).sample
        assert (ours(z, t, c) - expected).abs().max() < 1e-9
        assert (ours(z, t, c, maps) - expected).abs().max() < 1e-9, "explicit attention differs from the fused kernel"
    assert [tuple(m.shape) for m in maps[:3]] == [(2, 4, side**2, side**2)] * 2 + [(2, 4, side**2 // 4, side**2 // 4)]
    assert len(maps) == 16 and all(torch.allclose(m.sum(-1), torch.ones(()).double()) for m in maps)


def test_unet_full_size_has_the_public_keys():
    """A renamed module would refuse Stable Diffusion's weights."""
    with torch.device("meta"):
        own = {k: tuple(v.shape) for k, v in UNet().state_dict().items()}
    assert len(own) == 686 and sum(int(np.prod(s)) for s in own.values()) == 859_520_964
    assert own["up_blocks.1.attentions.2.transformer_blocks.0.attn2.to_k.weight"] == (1280, 768)
    assert own == public_keys("sd15-unet")


def test_unet_saved_by_us_opens_in_diffusers(tmp_path):
    """A config.json field missing or a key unknown: the lab's other tools could not read our runs."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers opens our files")
    ours = UNet(UNetConfig(**SMALL_UNET)).eval()
    ours.save_pretrained(tmp_path)
    theirs = diffusers.UNet2DConditionModel.from_pretrained(tmp_path).double()
    again = UNet.from_pretrained(tmp_path).double()
    z, t, c = torch.randn(1, 4, 16, 16).double(), torch.tensor([500]), torch.randn(1, 3, 24).double()
    with torch.no_grad():
        assert (theirs(z, t, c).sample - ours.double()(z, t, c)).abs().max() < 1e-9
        assert torch.equal(again(z, t, c), ours(z, t, c))


def test_unet_shortcut_for_one_token_has_the_same_output_and_gradients(monkeypatch):
    """A shortcut that leaves q, k or norm2 out of the graph would stop DDP and let AdamW skip their weight decay."""
    torch.manual_seed(0)
    net = UNet(UNetConfig(**SMALL_UNET)).double()
    z, t, c = torch.randn(2, 4, 8, 8).double(), torch.tensor([10, 900]), torch.randn(2, 1, 24).double()

    def run():
        net.zero_grad()
        tokens = c.clone().requires_grad_()
        out = net(z, t, tokens)
        out.square().sum().backward()
        return out.detach(), {n: p.grad.clone() for n, p in net.named_parameters()} | {"c": tokens.grad}

    def without_shortcut(block, x, c, maps):
        y = block.norm1(x)
        x = x + block.attn1(y, y, maps)
        x = x + block.attn2(block.norm2(x), c)
        return x + block.ff(block.norm3(x))
    out, grads = run()
    monkeypatch.setattr(unet_file.TransformerBlock, "forward", without_shortcut)
    expected, expected_grads = run()
    assert (out - expected).abs().max() < 1e-12
    for name, grad in expected_grads.items():
        assert (grads[name] - grad).abs().max() <= 1e-12 * (1 + grad.abs().max()), name


def test_unet_gradient_checkpointing_changes_no_gradient():
    """A block that is not recomputed with its own inputs would give other gradients."""
    net = UNet(UNetConfig(**SMALL_UNET)).double()
    z, t, c = torch.randn(1, 4, 8, 8).double(), torch.tensor([10]), torch.randn(1, 2, 24).double()
    grads = []
    for flag in (False, True):
        net.gradient_checkpointing = flag
        net.zero_grad()
        net(z, t, c).square().sum().backward()
        grads.append([p.grad.clone() for p in net.parameters()])
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(*grads))


def test_unet_refuses_architectures_it_cannot_express():
    """SD2's linear projections under SD1.5's code would load half of the keys, or give noise."""
    with pytest.raises(UserError, match="use_linear_projection"):
        UNetConfig.from_dict({"use_linear_projection": True})
    with pytest.raises(UserError, match="multiple of norm_num_groups"):
        UNetConfig(block_out_channels=(30, 60, 60, 60))


# ---- The VAE --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference_vae():
    diffusers = pytest.importorskip("diffusers", reason="diffusers judges the VAE")
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(**SMALL_VAE, layers_per_block=2, latent_channels=4, down_block_types=["DownEncoderBlock2D"] * 4,
                                   up_block_types=["UpDecoderBlock2D"] * 4).double().eval()


def test_vae_equals_diffusers(reference_vae):
    """Asymmetric padding, 1e-6, one attention head with biases, the clamp of logvar: any of them moves 1e-9."""
    ours = VAE(VAEConfig(**SMALL_VAE)).double()
    ours.load_state_dict(reference_vae.state_dict(), strict=True)
    x, z = torch.rand(2, 3, 64, 48).double() * 2 - 1, torch.randn(2, 4, 8, 6).double()
    kept = z.clone()
    with torch.no_grad():
        expected = reference_vae.encode(x).latent_dist
        mean, logvar = ours.encode(x)
        assert (mean - expected.mean).abs().max() < 1e-9 and (logvar - expected.logvar).abs().max() < 1e-9
        assert (ours.decode(z) - reference_vae.decode(z).sample).abs().max() < 1e-9
    assert torch.equal(z, kept), "decode changed its caller's latents"


def test_vae_encoder_pads_bottom_right():
    """Symmetric padding shifts every feature by half a pixel a level."""
    down = Downsample(1)
    torch.nn.init.zeros_(down.conv.weight), torch.nn.init.zeros_(down.conv.bias)
    down.conv.weight.data[0, 0, 0, 0] = 1  # copies the pixel under the kernel's first corner
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert torch.equal(down(x)[0, 0], x[0, 0, ::2, ::2])


def test_vae_full_size_has_the_public_keys():
    """A renamed module would refuse the public VAE."""
    with torch.device("meta"):
        own = {k: tuple(v.shape) for k, v in VAE().state_dict().items()}
    assert len(own) == 248 and sum(int(np.prod(s)) for s in own.values()) == 83_653_863
    assert own == public_keys("sd15-vae")


def test_vae_saved_by_us_opens_in_diffusers_and_with_old_attention_names(tmp_path):
    """Both generations of attention names are in the wild; ours must open in the library."""
    torch.manual_seed(0)
    ours = VAE(VAEConfig(**SMALL_VAE, scaling_factor=0.3)).eval()
    ours.save_pretrained(tmp_path)
    state = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        state = {k.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): v for k, v in state.items()}
    old = tmp_path / "old"
    old.mkdir()
    save_file(state, old / "diffusion_pytorch_model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("scaling_factor")
    (old / "config.json").write_text(json.dumps(config))
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        expected = ours.encode(x)[0]
        assert VAE.from_pretrained(tmp_path).config.scaling_factor == 0.3
        assert torch.equal(VAE.from_pretrained(old).encode(x)[0], expected)
        assert VAE.from_pretrained(old).config.scaling_factor == 0.18215, "old files do not name it: it is the default"
        diffusers = pytest.importorskip("diffusers", reason="diffusers opens our files")
        assert (diffusers.AutoencoderKL.from_pretrained(tmp_path).encode(x).latent_dist.mean - expected).abs().max() < 1e-5


def test_vae_training_lowers_the_error_and_resumes_bit_for_bit(tmp_path):
    """A stage that forgets its optimizer, its step or its noise when killed would end with other weights."""
    config, settings = VAEConfig(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4), VAESettings(steps=30, batch=4, lr=5e-3)
    yy, xx = np.mgrid[:16, :16]
    batch = lambda step: torch.from_numpy(np.stack([(127 + 120 * np.sin(0.3 * (step * 4 + i) + xx * 0.4 + yy * 0.2)) for i in range(4)]).astype(np.uint8))
    log = []
    whole = train_vae(dataclasses.replace(config), settings, batch, tmp_path / "a", log=log.append)
    assert np.mean([r["l1"] for r in log[-5:]]) < 0.6 * np.mean([r["l1"] for r in log[:5]])
    countdown = iter(range(12))
    stops = lambda: next(countdown, None) is None
    assert train_vae(dataclasses.replace(config), settings, batch, tmp_path / "b", should_stop=stops) is None
    assert (tmp_path / "b.training.safetensors").is_file() and not (tmp_path / "b").exists()
    resumed = train_vae(dataclasses.replace(config), settings, batch, tmp_path / "b")
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values()))
    assert whole.config.scaling_factor == resumed.config.scaling_factor != 0.18215
    assert not (tmp_path / "b.training.safetensors").exists()


# ---- Weights files --------------------------------------------------------------------------------------------------------


def little_unet():
    torch.manual_seed(1)
    return UNet(UNetConfig(block_out_channels=(16, 32), down_block_types=(CROSS, "DownBlock2D"), cross_attention_dim=8,
                           attention_head_dim=2, norm_num_groups=4, layers_per_block=1))


@pytest.mark.parametrize("form", ["file", "fp16", "bin", "sharded"])
def test_weights_open_in_every_form_they_are_published_in(tmp_path, form):
    """Half-precision, pickled and sharded files are all on the hub; each must give the same network."""
    net = little_unet()
    net.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    source = tmp_path
    if form == "file":
        source = file
    elif form == "fp16":
        save_file({k: v.half() for k, v in state.items()}, tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    elif form == "bin":
        torch.save(state, tmp_path / "diffusion_pytorch_model.bin")
    else:
        keys = sorted(state)
        parts = {"a.safetensors": keys[::2], "b.safetensors": keys[1::2]}
        for name, part in parts.items():
            save_file({k: state[k] for k in part}, tmp_path / name)
        index = {"weight_map": {k: name for name, part in parts.items() for k in part}}
        (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    if form != "file":
        file.unlink()
    opened = UNet.from_pretrained(source)
    assert all(p.dtype == torch.float32 for p in opened.parameters())
    for (name, a), b in zip(net.named_parameters(), opened.parameters()):
        assert torch.allclose(a, b, atol=1e-3 if form == "fp16" else 0), name


def test_weights_refusals_say_what_was_found_and_what_to_do(tmp_path, monkeypatch):
    """A wrong file must name keys and shapes; a pickle with code must not run it; an unreachable hub must say what to download."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    little_unet().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"cross_attention_dim": 12, "layers_per_block": 2}))
    with pytest.raises(UserError, match=r"(?s)keys that the model wants are missing.*shapes differ: .*file \(16, 8\), model \(16, 12\)"):
        UNet.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="expected one of diffusion_pytorch_model.safetensors"):
        UNet.from_pretrained(tmp_path, subfolder="nothing")
    with pytest.raises(UserError, match="(?s)neither in the hub cache.*hf download some/model"):
        UNet.from_pretrained("some/model")
    with pytest.raises(UserError, match="no such file or folder"):
        UNet.from_pretrained("no such place")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((tmp_path / "diffusion_pytorch_model.safetensors").read_bytes()[:5000])
    with pytest.raises(UserError, match="damaged"):
        UNet.from_pretrained(cut)

    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)
    torch.save({"x": Hostile()}, tmp_path / "hostile.bin")
    with pytest.raises(UserError, match="hostile.bin"):
        UNet.from_pretrained(tmp_path / "hostile.bin")
    assert not (tmp_path / "executed").exists()


def test_weights_load_in_little_more_memory_than_they_take(tmp_path):
    """A second copy of 3.4 GB of weights would not fit beside the first on a small machine."""
    net = UNet(UNetConfig(block_out_channels=(128, 256, 512, 512)))
    size = sum(p.numel() for p in net.parameters()) * 4
    net.save_pretrained(tmp_path)
    code = ("import resource, torch, unet; a = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; n = unet.UNet.from_pretrained(%r)\n"
            "s = sum(float(p.sum()) for p in n.parameters()); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - a)" % str(tmp_path))
    extra = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE, check=True).stdout) * 1024
    assert extra < 1.3 * size, f"{extra / size:.2f} times the weights"


# ---- Schedule and samplers ------------------------------------------------------------------------------------------------


def test_schedule_has_the_published_values():
    """Linear β instead of linear √β, or float32 products: other noise levels than the weights were trained with."""
    alpha_bar = Schedule().alpha_bar
    assert alpha_bar.dtype == torch.float64 and alpha_bar.shape == (1000,)
    assert np.allclose(alpha_bar[[0, 499, 999]], [0.999150, 0.277669, 0.004660], atol=5e-7)
    assert Schedule().timesteps(50)[:2] == [981, 961] and Schedule().timesteps(50)[-1] == 1
    assert Schedule().timesteps(1000)[0] == 999 and Schedule().timesteps(1)[0] in range(1000)
    with pytest.raises(UserError, match="1 to 1000"):
        Schedule().timesteps(0)


SD15_SCHEDULE = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def in_float64(scheduler):
    """diffusers keeps ᾱ in float32; with ours in its place both compute in float64, and 1e-9 can be asked for."""
    assert (scheduler.alphas_cumprod - Schedule().alpha_bar).abs().max() < 1e-6
    scheduler.alphas_cumprod = Schedule().alpha_bar
    scheduler.betas, scheduler.alphas = Schedule().beta, 1 - Schedule().beta
    scheduler.one = torch.ones((), dtype=torch.float64)
    scheduler.final_alpha_cumprod = Schedule().alpha_bar[0]
    return scheduler


@pytest.mark.parametrize("steps, eta", [(50, 0.0), (50, 1.0), (7, 0.3), (30, 0.0)])
def test_ddim_equals_diffusers(steps, eta):
    """The last step to ᾱ_0, the offset of 1, no clipping, σ(η): each is a visible difference in contrast or noise."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers judges the samplers")
    theirs = in_float64(diffusers.DDIMScheduler(**SD15_SCHEDULE, steps_offset=1, clip_sample=False, set_alpha_to_one=False))
    theirs.set_timesteps(steps)
    assert theirs.timesteps.tolist() == Schedule().timesteps(steps)
    model = lambda zt, t: torch.sin(zt + t.view(-1, 1, 1, 1) / 100)
    zT = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    ours = ddim_sample(model, zT, steps, Schedule(), eta, torch.Generator().manual_seed(5))
    zt, noise = zT, torch.Generator().manual_seed(5)
    for t in theirs.timesteps:
        zt = theirs.step(model(zt, t.repeat(2)), t, zt, eta=eta, generator=noise).prev_sample
    assert (ours - zt).abs().max() < 1e-9


def test_ddpm_equals_diffusers():
    """The posterior's two coefficients and its variance."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers judges the samplers")
    theirs = in_float64(diffusers.DDPMScheduler(**SD15_SCHEDULE, clip_sample=False, variance_type="fixed_small"))
    theirs.set_timesteps(1000)
    model = lambda zt, t: torch.sin(zt + t.view(-1, 1, 1, 1) / 300)
    zT = torch.randn(1, 4, 4, 4, dtype=torch.float64)
    ours = ddpm_sample(model, zT, Schedule(), torch.Generator().manual_seed(5))
    zt, noise = zT, torch.Generator().manual_seed(5)
    for t in theirs.timesteps:
        zt = theirs.step(model(zt, t.repeat(1)), t, zt, generator=noise).prev_sample
    assert (ours - zt).abs().max() < 1e-9


def test_add_noise_equals_diffusers():
    """√ᾱ and √(1-ᾱ) swapped, or indexed by the wrong t."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers judges the schedule")
    theirs = in_float64(diffusers.DDPMScheduler(**SD15_SCHEDULE))
    z0, eps = torch.randn(2, 3, 4, 8, 8, dtype=torch.float64)
    t = torch.tensor([0, 500, 999])
    assert (Schedule().add_noise(z0, eps, t) - theirs.add_noise(z0, eps, t)).abs().max() < 1e-9


def test_ddim_recovers_the_mean_of_a_gaussian_exactly():
    """A closed form: for data N(m, 0) the true eps is known, and every sampler must end at m (up to ᾱ_0's share of noise)."""
    schedule, m = Schedule(), torch.full((2, 4, 4, 4), 0.7, dtype=torch.float64)

    def model(zt, t):
        a = schedule.alpha_bar[t].view(-1, 1, 1, 1)
        return (zt - a.sqrt() * m) / (1 - a).sqrt()
    zT = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    z = ddim_sample(model, zT, 50, schedule)
    a = schedule.alpha_bar[0]
    final = (z - a.sqrt() * m) / (1 - a).sqrt()  # what is left is the noise that zT held, at the level of ᾱ_0
    expected = (zT - schedule.alpha_bar[981].sqrt() * m) / (1 - schedule.alpha_bar[981]).sqrt()
    assert (final - expected).abs().max() < 1e-6
    assert (ddpm_sample(model, zT, schedule) - m).abs().max() < 1e-9


# ---- 8-bit Adam -----------------------------------------------------------------------------------------------------------


def plain_adam8bit(p, grads, lr, b1, b2, eps, decay):
    """The rule in float64 loops over blocks: dequantise, update, step with exact moments, quantise to the nearest code."""
    codes = [dinodiff.dynamic_code(s).double().numpy() for s in (True, False)]
    p, n, store = p.astype(np.float64).copy(), len(p), [np.zeros(len(p)), np.zeros(len(p))]
    for k, g in enumerate(grads, 1):
        m, v = store
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g * g
        p -= lr * np.sqrt(1 - b2**k) / (1 - b1**k) * m / (np.sqrt(v) + np.sqrt(1 - b2**k) * eps)
        p *= 1 - lr * decay
        for which, x in enumerate((m, v)):
            for i in range(0, n, 256):
                top = np.abs(x[i:i + 256]).max()
                if top > 0:
                    x[i:i + 256] = top * codes[which][np.abs(x[i:i + 256, None] / top - codes[which]).argmin(1)]
            store[which] = x
    return p


def test_adam8bit_follows_the_rule_in_float64():
    """Stepping with the rounded moments, one scale for all blocks, or eps before the correction: each drifts away from the rule."""
    torch.manual_seed(0)
    n, steps = 256 * 16 + 100, 12
    p = torch.nn.Parameter(torch.randn(n))
    start, grads = p.detach().numpy().copy(), torch.randn(steps, n) * torch.logspace(-4, 0, n)
    optimizer = Adam8bit([p], lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    for g in grads:
        p.grad = g.clone()
        optimizer.step()
    expected = plain_adam8bit(start, grads.double().numpy(), 1e-2, 0.9, 0.99, 1e-8, 0.1)
    close = np.abs(p.detach().numpy() - expected) < 1e-4  # an element on the border of two codes may fall either way
    assert close.mean() > 0.99 and np.abs(p.detach().numpy() - expected).max() < 5e-2
    assert optimizer.state[p]["m"].dtype == torch.uint8 and optimizer.state[p]["v"].dtype == torch.uint8


def test_adam8bit_keeps_small_tensors_in_float32_and_equals_adamw_there():
    """Biases and norms in 8 bits hurt; under 4096 elements this is AdamW, but for the order of step and decay."""
    a, b = torch.nn.Parameter(torch.randn(4095)), None
    b = torch.nn.Parameter(a.detach().clone())
    ours, theirs = Adam8bit([a], lr=1e-3, weight_decay=0.0), torch.optim.AdamW([b], lr=1e-3, weight_decay=0.0)
    for _ in range(10):
        g = torch.randn(4095)
        a.grad, b.grad = g, g.clone()
        ours.step(), theirs.step()
    assert (a - b).abs().max() < 1e-6 and ours.state[a]["m"].dtype == torch.float32


def test_adam8bit_codes_are_256_sorted_values_dense_near_zero():
    """A map that is not symmetric, or misses 0 or 1, biases every moment."""
    for signed in (True, False):
        code = dinodiff.dynamic_code(signed)
        assert len(code) == 256 and (code.diff() > 0).all() and 0 in code and code.max() == 1
        assert signed == bool((code < 0).any())
    x = torch.randn(1000) * 10
    q, top = dinodiff.quantize(x, dinodiff.dynamic_code(True))
    back = dinodiff.dequantize(q, top, dinodiff.dynamic_code(True), x)
    assert q.shape == (4, 256) and ((back - x).abs() <= 0.02 * top.max()).all()


def test_adam8bit_trains_as_well_as_adamw():
    """The claim of the method: the same loss from a quarter of the memory."""
    torch.manual_seed(0)
    x, losses = torch.randn(256, 64), {}
    y = torch.tanh(x @ torch.randn(64, 8))
    for name, kind in (("adam8bit", Adam8bit), ("adamw", torch.optim.AdamW)):
        torch.manual_seed(1)
        net = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Tanh(), torch.nn.Linear(128, 8))
        optimizer = kind(net.parameters(), lr=3e-3, weight_decay=1e-2)
        for _ in range(200):
            loss = F.mse_loss(net(x), y)
            optimizer.zero_grad(), loss.backward(), optimizer.step()
        losses[name] = loss.item()
    assert losses["adam8bit"] < 1.2 * losses["adamw"] + 1e-3, losses


# ---- Training -------------------------------------------------------------------------------------------------------------

# The smallest networks with two levels and two heads; a script, so that torchrun and kill -9 meet the real thing.
TRAIN_SCRIPT = '''
import dataclasses, sys, torch
import data
from dinodiff import *
torch.set_num_threads(1)
small = dataclasses.replace(TINY, preset="small", size=32, batch=8, steps=12, vae_steps=3, vit_steps=3, checkpoint_every=3, sample_every=100,
    lr=1e-3, warmup=2, unet_config=UNetConfig(block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=32, attention_head_dim=2,
    norm_num_groups=4, down_block_types=(CROSS, CROSS)), vae_config=VAEConfig(block_out_channels=(8, 16, 16), layers_per_block=1,
    norm_num_groups=4), vae_settings=VAESettings(batch=4), vit_config=ViTConfig(image_size=32, patch_size=8, hidden_size=32, depth=2, heads=2),
    dino_settings=DinoSettings(batch=4, out_dim=64, global_size=32, local_size=16, head_hidden=32, head_bottleneck=16))
PRESETS["small"] = small
if __name__ == "__main__":
    data.command_line("", {"train": (preset_defaults, train), "sample": (Sample(), sample), "cache": (Cache(), cache)},
                      sys.argv[1:2] + (["--preset", "small"] if sys.argv[1] == "train" else []) + sys.argv[2:])
'''


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A folder with the script, 24 X-rays, and a finished run of 12 steps: (path, run(*args, ranks=1) -> completed process)."""
    folder = tmp_path_factory.mktemp("train")
    (folder / "small.py").write_text(TRAIN_SCRIPT)
    (folder / "xrays").mkdir()
    for i in range(24):
        data.save_png(folder / "xrays" / f"{i:02d}.png", data.render_phantom(0, i, 0, 32)[0])

    def run(*args, ranks=1, check=True, **more):
        launch = [sys.executable] if ranks == 1 else [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone", "--"]
        env = os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*launch, "small.py", *args], cwd=folder, env=env, capture_output=True, text=True, timeout=300, **more)
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done
    run("train", "--data", "xrays", "--run", "whole")
    return folder, run


def log_rows(run: Path, stage: str = "unet") -> list[dict]:
    """The log without its clock."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "images_per_s"} for row in lines if row["stage"] == stage]


def begin(folder: Path, name: str) -> Path:
    """A run folder that has its VAE and DINO, as the finished one has them, and no step of the UNet."""
    for part in ("vae", "vit"):
        shutil.copytree(folder / "whole" / part, folder / name / part)
    return folder / name


def same_checkpoints(a: Path, b: Path, step: int) -> bool:
    files = ("unet/diffusion_pytorch_model.safetensors", "ema/diffusion_pytorch_model.safetensors", "optimizer.safetensors")
    return all(torch.equal(x, y) for f in files for x, y in zip(*(load_file(dinodiff.checkpoint_folder(r, step) / f).values() for r in (a, b))))


def test_train_leaves_a_whole_run_folder(workshop):
    """What later commands open: nets, checkpoints, log, pictures."""
    folder, _ = workshop
    run = folder / "whole"
    assert dinodiff.checkpoint_steps(run) == [3, 6, 9, 12] and (run / "samples" / "step-0000012.png").is_file()
    assert [r["step"] for r in log_rows(run)] == list(range(1, 13))
    assert {"loss", "lr", "grad_norm"} <= log_rows(run)[0].keys()
    assert not (dinodiff.checkpoint_folder(run, 9) / "optimizer.safetensors").exists(), "only the newest needs its optimizer"
    assert not list(run.rglob("*.partial"))


def test_train_killed_and_resumed_equals_the_uninterrupted_run_bit_for_bit(workshop):
    """Any state that a checkpoint forgets: data order, noise, moments, EMA, warm-up, log."""
    folder, run = workshop
    place = begin(folder, "killed")
    env = os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "small.py", "train", "--data", "xrays", "--run", "killed"], cwd=folder, env=env,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not (place / "log.jsonl").is_file() or (place / "log.jsonl").read_text().count("\n") < 5:
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert dinodiff.checkpoint_steps(place) and dinodiff.checkpoint_steps(place)[-1] < 12, "the kill came too late to show anything"
    with open(place / "log.jsonl", "a") as log:
        log.write('{"stage": "unet", "st')  # what a kill in the middle of a line leaves
    run("train", "--data", "xrays", "--run", "killed")
    assert same_checkpoints(folder / "whole", place, 12)
    for file in ("optimizer.safetensors", "progress.json"):  # to the byte: what stands beside the tensors is the same too
        whole, again = (dinodiff.checkpoint_folder(run_folder, 12) / file for run_folder in (folder / "whole", place))
        assert whole.read_bytes() == again.read_bytes(), file
    assert log_rows(place) == log_rows(folder / "whole")


def test_train_on_two_ranks_equals_one(workshop):
    """Ranks that draw their own noise, see each other's images, or average twice: the first gradient shows it."""
    folder, run = workshop
    for ranks in (1, 2):
        place = begin(folder, f"ranks{ranks}")
        run("train", "--data", "xrays", "--run", place.name, "--steps", "1", ranks=ranks)
    one, two = (load_file(dinodiff.checkpoint_folder(folder / f"ranks{r}", 1) / "optimizer.safetensors") for r in (1, 2))
    for key in (k for k in one if k.endswith("exp_avg")):  # after one step this is (1 - β1) times the gradient
        assert (one[key] - two[key]).norm() <= 1e-5 * one[key].norm() + 1e-12, key
    for ranks in (1, 2):
        run("train", "--data", "xrays", "--run", f"ranks{ranks}", "--steps", "20", ranks=ranks)
    for a, b in zip(log_rows(folder / "ranks1"), log_rows(folder / "ranks2")):
        assert abs(a["loss"] - b["loss"]) <= 1e-4 * a["loss"], (a, b)


def test_train_accumulates_micro_batches_into_the_same_gradient(workshop):
    """A loss that is not divided by the number of passes, or noise drawn per pass."""
    folder, run = workshop
    place = begin(folder, "micro")
    run("train", "--data", "xrays", "--run", "micro", "--steps", "2", "--micro-batch", "2")
    for a, b in zip(log_rows(place), log_rows(folder / "whole")):
        assert abs(a["loss"] - b["loss"]) < 1e-5 and abs(a["grad_norm"] - b["grad_norm"]) < 1e-4


def test_train_stops_cleanly_on_sigterm_and_goes_on(workshop):
    """A scheduler's SIGTERM must cost nothing."""
    folder, run = workshop
    place = begin(folder, "stopped")
    env = os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "small.py", "train", "--data", "xrays", "--run", "stopped", "--checkpoint-every", "100"],
                               cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    deadline = time.time() + 120
    while not (place / "log.jsonl").is_file() or (place / "log.jsonl").read_text().count("\n") < 2:
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.02)
    process.terminate()
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 0 and ("stopped at step" in out or "done" in out), out
    run("train", "--data", "xrays", "--run", "stopped", "--checkpoint-every", "100")
    assert same_checkpoints(folder / "whole", place, 12)


def test_train_full_disk_keeps_the_previous_checkpoint(workshop):
    """A checkpoint that is written in place is lost with the disk's last byte."""
    folder, run = workshop
    place = begin(folder, "full")
    run("train", "--data", "xrays", "--run", "full", "--steps", "3")
    limit = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); import signal; " \
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    env = os.environ | {"PYTHONPATH": str(HERE)}
    done = subprocess.run([sys.executable, "-c", limit, "small.py", "train", "--data", "xrays", "--run", "full", "--steps", "6"],
                          cwd=folder, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode != 0 and "Traceback" not in done.stderr and "could not write" in done.stderr, done.stderr
    assert dinodiff.checkpoint_steps(place) == [3]
    run("train", "--data", "xrays", "--run", "full", "--steps", "12")
    assert same_checkpoints(folder / "whole", place, 12)


@pytest.mark.parametrize("arguments, message", [
    (["--batch", "9", "--micro-batch", "2"], "nearest that are: 8 and 10"),
    (["--data", "nowhere"], "no such folder"),
    (["--run", "whole", "--lr", "0.5"], "holds a run with other settings"),
    (["--optimizer", "sgd", "--run", "fresh"], "expected one of adamw, adam8bit"),
    (["--dtype", "fp8", "--run", "fresh"], "expected one of fp32, bf16"),
    (["--stepz", "3"], "unrecognized arguments: --stepz"),
    (["--preset", "huge"], "expected one of tiny, mini, paper"),
])
def test_train_refuses_what_cannot_work_without_a_traceback(workshop, arguments, message):
    """The user reads one sentence: found, expected, what to do."""
    folder, run = workshop
    if "fresh" in arguments and not (folder / "fresh").exists():
        begin(folder, "fresh")
    base = [] if "--data" in arguments else ["--data", "xrays"]
    done = run("train", *base, *arguments, check=False)
    assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr, done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_train_on_cuda_without_cuda_says_so():
    """A silent fall back to the CPU would train for a year."""
    with pytest.raises(UserError, match="found no CUDA device"):
        dinodiff.pick_device("cuda")


def test_sample_reconstructs_and_interpolates_each_image_from_its_own_seed(workshop):
    """A sample that depends on its neighbours in the batch could never be made again alone."""
    folder, run = workshop
    files = [f"xrays/{i:02d}.png" for i in range(3)]
    (folder / "broken.png").write_bytes(b"not a picture")
    done = run("sample", "--run", "whole", "--images", *files, "broken.png", "--variants", "2", "--steps", "4", "--out", "out")
    assert "skipped broken.png" in done.stderr and (folder / "out" / "reconstruct.png").is_file()
    run("sample", "--run", "whole", "--images", files[0], "--variants", "1", "--steps", "4", "--out", "alone", "--batch", "1")
    read = lambda name: data.load_image(folder / name).astype(int)
    assert np.abs(read("out/00_v0.png") - read("alone/00_v0.png")).max() <= 1
    assert np.abs(read("out/00_v0.png") - read("out/00_v1.png")).max() > 1
    run("sample", "--run", "whole", "--images", *files[:2], "--mode", "interpolate", "--variants", "1", "--steps", "4", "--out", "between")
    assert np.abs(read("between/00_01_v0_r0.00.png") - read("out/00_v0.png")).max() <= 1, "r = 0 is the first image"
    done = run("sample", "--run", "whole", "--images", *files[:2], "--mode", "mix", check=False)
    assert "train with --tokens all" in done.stderr


def test_train_on_all_tokens_and_mix_halves(workshop):
    """Appendix A.1: with patch tokens the condition has one token a patch and half of it may come from another image."""
    folder, run = workshop
    begin(folder, "all")
    run("train", "--data", "xrays", "--run", "all", "--tokens", "all", "--steps", "2")
    run("sample", "--run", "all", "--images", "xrays/00.png", "xrays/01.png", "--mode", "mix", "--variants", "1", "--steps", "2", "--out", "mixed")
    assert (folder / "mixed" / "00_01_mix0.png").is_file()
    a, b, config = torch.zeros(1 + 16, 4), torch.ones(1 + 16, 4), ViTConfig(image_size=32, patch_size=8)
    assert dinodiff.mix_tokens(a, b, config)[:, 0].tolist() == [0.5] + [0.0] * 8 + [1.0] * 8


def test_cache_trains_like_the_encoders_it_stands_for(workshop):
    """Latents of other images, unscaled, or of another encoder would train another model in silence."""
    folder, run = workshop
    begin(folder, "cached"), begin(folder, "live")
    flags = ["--data", "xrays", "--no-augment", "--steps", "3"]
    run("train", *flags, "--run", "live")
    run("cache", "--run", "live", "--out", "stored")
    run("train", *flags, "--run", "cached", "--cache", "stored")
    for a, b in zip(log_rows(folder / "live"), log_rows(folder / "cached")):
        assert abs(a["loss"] - b["loss"]) < 2e-3, "float16 latents differ by rounding alone"
    done = run("train", "--data", "xrays", "--run", "other", "--steps", "1", "--cache", "stored", check=False)
    assert "made of something else" in done.stderr, done.stderr


def test_help_and_import_are_quick_and_quiet():
    """`--help` shows every setting with its comment."""
    done = subprocess.run([sys.executable, "dinodiff.py", "train", "--help"], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0 and "--micro-batch" in done.stdout and "over all ranks and micro-batches" in done.stdout


# ---- Data (data.py) -------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def own_cache_and_seed(tmp_path_factory, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setenv("DINODIFF_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def xray(i: int = 0, height: int = 90, width: int = 70) -> np.ndarray:
    """A smooth picture without a constant border, another one for each i."""
    y, x = np.mgrid[:height, :width]
    return (127 + 80 * np.sin(x / (5 + i % 7) + i) * np.cos(y / 9) + 40 * (x / width - 0.5)).clip(0, 255).astype(np.uint8)


def xray_folder(folder: Path, count: int, suffix: str = "png") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.fromarray(xray(i)).save(folder / f"x{i:03d}.{suffix}")
    (folder.parent / f"{folder.name}.csv").write_text(
        "file,patient,labels\n" + "".join(f"{folder.name}/x{i:03d}.{suffix},p{i // 2},{'|'.join(['A', 'B'][:i % 3])}\n"
                                          for i in range(count)))
    return folder


def prepared(tmp_path: Path, count: int = 23, per_shard: int = 5) -> Path:
    data.prepare(data.Prepare(source=str(xray_folder(tmp_path / "found", count)), out=str(tmp_path / "shards"), size=32,
                              per_shard=per_shard, workers=1))
    return tmp_path / "shards"


@pytest.mark.parametrize("suffix,mode", [("png", "L"), ("png", "RGB"), ("png", "RGBA"), ("png", "P"), ("png", "LA"),
                                         ("jpg", "L"), ("jpg", "CMYK"), ("webp", "RGB"), ("gif", "P"), ("tif", "L"),
                                         ("bmp", "L"), ("jp2", "L")])
def test_every_8_bit_format_reads_as_the_same_grey(tmp_path, suffix, mode):
    """Would catch a palette's indices read as grey, an alpha channel that blackens, or an inverted CMYK."""
    image = Image.fromarray(xray())
    image = image.convert("RGB").quantize(256) if mode == "P" else image.convert(mode)
    if mode == "RGBA":
        image.putalpha(0)
    options = {"webp": {"lossless": True}, "jpg": {"quality": 95}}.get(suffix, {})
    image.save(tmp_path / f"x.{suffix}", **options)
    read = data.load_image(tmp_path / f"x.{suffix}")
    assert read.dtype == np.uint8 and np.abs(read.astype(int) - xray()).max() <= 12
    assert (data.load_image((tmp_path / f"x.{suffix}").read_bytes()) == read).all()


@pytest.mark.parametrize("suffix,dtype", [("png", np.uint16), ("tif", np.uint16), ("pgm", np.uint16), ("tif", np.int32),
                                          ("tif", np.float32)])
def test_deep_images_use_their_own_range(tmp_path, suffix, dtype):
    """Would catch Pillow's convert("L"), which clips 16 bits at 255."""
    deep = (1000 + 11.0 * xray()).astype(dtype)
    Image.fromarray(deep).save(tmp_path / f"x.{suffix}")
    low, high = float(deep.min()), float(deep.max())
    expected = (deep - low) * 255.0 / (high - low)
    assert np.abs(data.load_image(tmp_path / f"x.{suffix}") - expected).max() <= 0.51


def test_white_is_zero_in_16_bit_tiff(tmp_path):
    """Would catch a negative: Pillow honours PhotometricInterpretation 0 only up to 8 bits."""
    deep = xray().astype(np.uint16) * 16
    Image.fromarray(deep).save(tmp_path / "x.tif")
    content = bytearray((tmp_path / "x.tif").read_bytes())
    start = int.from_bytes(content[4:8], "little")
    for k in range(int.from_bytes(content[start:start + 2], "little")):
        tag = start + 2 + 12 * k
        if int.from_bytes(content[tag:tag + 2], "little") == 262:
            content[tag + 8:tag + 10] = b"\0\0"
    assert (data.load_image(bytes(content)) == 255 - data.load_image(tmp_path / "x.tif")).all()


def test_jsrt_raw_is_big_endian_and_turned_to_dark_lungs(tmp_path):
    """Would catch the wrong byte order (noise) and the optical density taken as brightness (white lungs)."""
    density = np.add.outer(np.arange(2048), np.arange(2048)).astype(">u2")
    density.tofile(tmp_path / "JPCLN001.IMG")
    image = data.load_image(tmp_path / "JPCLN001.IMG")
    assert image.shape == (2048, 2048) and (np.diff(image[0].astype(int)) <= 0).all()
    assert image[0, 0] == 255 and image[-1, -1] == 0


def test_dicom_polarity_padding_and_first_frame():
    """Would catch MONOCHROME1 left white on black, and a padding value that squeezes the film into a few greys."""
    pydicom = pytest.importorskip("pydicom", reason="pydicom is not installed: DICOM input is untested here")
    from pydicom.dataset import FileDataset, FileMetaDataset
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = pydicom.uid.ExplicitVRLittleEndian, "1.2.840.10008.5.1.4.1.1.1"
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    film = xray().astype(np.int16) * 8
    film[:9] = -2000
    for photometric in ("MONOCHROME2", "MONOCHROME1"):
        file = FileDataset(None, {}, file_meta=meta, preamble=bytes(128))
        file.Rows, file.Columns, file.BitsAllocated, file.BitsStored, file.HighBit = *film.shape, 16, 16, 15
        file.SamplesPerPixel, file.PixelRepresentation, file.PhotometricInterpretation = 1, 1, photometric
        file.add_new(0x00280120, "SS", -2000)
        file.NumberOfFrames, file.PixelData = 2, film.tobytes() + bytes(film.nbytes)
        buffer = io.BytesIO()
        file.save_as(buffer, enforce_file_format=True)
        image = data.load_image(buffer.getvalue())
        image = 255 - image if photometric == "MONOCHROME1" else image
        assert image.shape == film.shape and image[9:].max() == 255
        assert np.corrcoef(image[9:].ravel(), film[9:].ravel())[0, 1] > 0.999


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp", "gif", "bmp", "jp2"])
def test_a_file_cut_short_is_an_error_not_a_grey_half(tmp_path, suffix):
    """Would catch half an image padded with grey in the training data."""
    Image.fromarray(xray()).save(tmp_path / f"x.{suffix}")
    content = (tmp_path / f"x.{suffix}").read_bytes()
    for cut in (0, 3, len(content) // 2):
        with pytest.raises(data.Unreadable):
            data.load_image(content[:cut])
    for name, content in (("rubbish.png", b"hello"), ("short.IMG", bytes(1000))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(data.Unreadable, match=name):
            data.load_image(tmp_path / name)


def test_padded_borders_go_and_nothing_else_does():
    """Would catch a border that JPEG noise protects, a border of 128 or 255, and a blank image that is eaten whole."""
    inside = xray(3, 200, 160)
    for value in (0, 128, 255):
        framed = (value + np.random.default_rng(0).integers(-3, 4, (300, 300))).clip(0, 255).astype(np.uint8)
        framed[40:240, 30:190] = inside
        buffer = io.BytesIO()
        Image.fromarray(framed).save(buffer, "JPEG", quality=70)
        rows, columns = data.square(data.load_image(buffer.getvalue()))
        edges = np.array([rows.start, rows.stop, columns.start, columns.stop])
        assert np.abs(edges - [60, 220, 30, 190]).max() <= 8
    for blank in (np.zeros((50, 80), np.uint8), np.full((50, 80), 200, np.uint8)):
        assert data.square(blank) == (slice(0, 50), slice(15, 65)) and data.preprocess(blank, 16).shape == (16, 16)
    assert (data.preprocess(inside[:160], 160) == inside[:160]).all()


def test_shards_are_read_by_webdataset(tmp_path):
    """Would catch keys with dots, pairs that are not adjacent, and a tar that only we can read."""
    wds = pytest.importorskip("webdataset", reason="webdataset is not installed: reading our shards with it is untested here")
    xray_folder(tmp_path / "found", 23)
    Image.fromarray(xray(22)).save(tmp_path / "found" / "x022.v1 (copy).of.png")
    shards = prepared(tmp_path)
    ours = data.open_data(str(shards / "*.tar"), 32)
    theirs = list(wds.WebDataset(sorted(map(str, shards.glob("*.tar"))), shardshuffle=False, empty_check=False).decode("l8"))
    assert [sample["__key__"] for sample in theirs] == list(ours.keys) and len(ours) == 24
    for i, sample in enumerate(theirs[:22]):
        assert (sample["png"] == ours[i]).all() and tuple(sample["json"]["labels"]) == ours.labels[i]
        assert sample["json"]["patient"] == ours.patients[i] == f"p{i // 2}"


def test_shards_equal_their_folder(tmp_path):
    """Would catch wrong offsets, labels of another image, and a second border removal on images that are prepared already."""
    shards = data.open_data(str(prepared(tmp_path) / "*.tar"), 32)
    folder = data.open_data(str(tmp_path / "found"), 32)
    assert len(shards) == len(folder) == 23 and shards.has_labels and folder.has_labels
    for i in range(23):
        assert (shards[i] == folder[i]).all() and shards.labels[i] == folder.labels[i]
        assert shards.patients[i] == folder.patients[i] and shards.providers[i] == "found"
        assert folder.keys[i] == f"{shards.keys[i]}.png"


def test_prepare_goes_on_after_kill_9(tmp_path):
    """Would catch shards lost, doubled or half-written by a kill, and worker processes that outlive it."""
    found = xray_folder(tmp_path / "found", 400)
    (found / "zz-rubbish.png").write_bytes(b"no image")
    again = lambda out, size=32: data.prepare(data.Prepare(str(found), str(tmp_path / out), size, per_shard=40, workers=1))
    flags = ["--out", str(tmp_path / "a"), "--size", "32", "--per-shard", "40", "--workers", "1"]
    killed = subprocess.Popen([sys.executable, str(HERE / "data.py"), "prepare", str(found), *flags], stderr=subprocess.DEVNULL)
    while len(list((tmp_path / "a").glob("shard-*.tar"))) < 3 and killed.poll() is None:
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    first = tmp_path / "a" / "shard-000000.tar"
    stamp = first.stat().st_mtime_ns
    again("a"), again("b")
    assert first.stat().st_mtime_ns == stamp, "a finished shard was made again"
    for path in (tmp_path / "b").iterdir():
        assert path.read_bytes() == (tmp_path / "a" / path.name).read_bytes(), path.name
    assert {p.name for p in (tmp_path / "a").iterdir()} == {p.name for p in (tmp_path / "b").iterdir()}
    assert "zz-rubbish.png" in (tmp_path / "a" / "unreadable.json").read_text()
    with pytest.raises(data.UserError, match="size was 32, is 16"):
        again("a", 16)


def test_prepare_reads_zip_and_tar_like_the_folder(tmp_path):
    """Would catch archives whose members get lost, and a damaged archive that ends in a traceback."""
    found = xray_folder(tmp_path / "found", 9)
    (found / "dir.png").mkdir()
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive, tarfile.open(tmp_path / "t.tar.gz", "w:gz") as tar:
        for path in sorted(found.iterdir()):
            archive.write(path, path.name)
            tar.add(path, path.name)
    (tmp_path / "cut.tar.gz").write_bytes((tmp_path / "t.tar.gz").read_bytes()[:9000])
    sets = {}
    for name in ("found", "z.zip", "t.tar.gz", "cut.tar.gz"):
        data.prepare(data.Prepare(source=str(tmp_path / name), out=str(tmp_path / f"of-{name}"), size=32, workers=1))
        sets[name] = data.open_data(str(tmp_path / f"of-{name}" / "*.tar"), 32)
    for name in ("z.zip", "t.tar.gz"):
        assert list(sets[name].keys) == list(sets["found"].keys)
        assert all((sets[name][i] == sets["found"][i]).all() for i in range(9))
    assert 0 < len(sets["cut.tar.gz"]) < 9


def test_foreign_tars_are_indexed_once_even_in_a_read_only_place(tmp_path, monkeypatch):
    """Would catch an index that is rebuilt at every start, or that must be written where nobody may write."""
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "theirs.tar", "w") as tar:
        for i in range(4):
            buffer = io.BytesIO()
            Image.fromarray(xray(i)).save(buffer, "PNG")
            for suffix, content in (("cls", b"1"), ("img.png", buffer.getvalue()), ("json", b"[1, 2]")):
                member = tarfile.TarInfo(f"a/{i}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    real = data.write_file
    def read_only(path, content):
        if Path(path).parent == tmp_path / "tars":
            raise OSError(30, "Read-only file system")
        real(path, content)
    monkeypatch.setattr(data, "write_file", read_only)
    ds = data.open_data(str(tmp_path / "tars" / "*.tar"), 32)
    assert list(ds.keys) == [f"a/{i}" for i in range(4)] and not ds.has_labels
    assert not (tmp_path / "tars" / data.INDEX).exists()
    assert (ds[2] == data.preprocess(xray(2), 32)).all()
    monkeypatch.setattr(data, "scan_shard", lambda path: pytest.fail("scanned again"))
    assert len(data.open_data(str(tmp_path / "tars" / "*.tar"), 32)) == 4


def test_a_cut_tar_and_a_broken_image_are_told_once_and_replaced(tmp_path, capsys):
    """Would catch a training run that dies of one bad file, or that reads another stand-in at every try."""
    shards = prepared(tmp_path)
    ds = data.open_data(str(shards / "*.tar"), 32)
    with open(ds.shards[1], "r+b") as file:
        file.seek(int(ds.offset[7]))
        file.write(b"\0" * int(ds.length[7]))
    stand_in = ds[7]
    assert (ds[7] == stand_in).all() and ds.unreadable == [(ds.keys[7], "not a whole image: cannot identify image file")]
    assert any((stand_in == ds[i]).all() for i in (5, 6, 8, 9)) and capsys.readouterr().err.count(ds.keys[7]) == 1
    with pytest.raises(data.UserError, match="23 images, problems: 1"):
        data.check(data.Check(str(shards / "*.tar"), workers=1))
    os.truncate(ds.shards[4], int(ds.offset[20]) + -(-int(ds.length[20]) // 512) * 512)  # a whole number of members
    cut = data.open_data(str(shards / "*.tar"), 32)
    assert len(cut) == 21 and "cut short" in capsys.readouterr().err
    for workers in (0, 2):
        ds.unreadable.clear()
        seen = np.concatenate([next(stream)[1].numpy() for stream in [data.batches(ds, 23, 0, workers=workers)]])
        assert sorted(seen) == list(range(23)) and {k for k, _ in ds.unreadable} == {ds.keys[i] for i in (7, 21, 22)}


def test_an_epoch_has_each_image_once_and_windows_stay_together(tmp_path):
    """Would catch images lost or doubled in an epoch, and an order that needs every remote shard at once."""
    ds = data.Images("x", 8, range(1000), [], [], [], starts=np.arange(0, 1001, 10))
    orders = [ds.order(seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for order in orders:
        assert sorted(order) == list(range(1000))
        for k in range(0, 1000, 10 * data.WINDOW):
            assert len(set(order[k:k + 10 * data.WINDOW] // 10)) == min(data.WINDOW, (1000 - k) // 10)
    assert (orders[0] == ds.order(0, 0)).all() and not (orders[0] == orders[1]).all() and not (orders[0] == orders[2]).all()
    assert len({int(x) for x in orders[0][:80]} & {int(x) for x in orders[1][:80]}) < 60


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_depend_on_seed_and_step_alone(tmp_path, workers):
    """Would catch a resume that repeats or skips images, ranks that see the same ones, a stream that ends with an epoch."""
    ds = data.open_data(str(prepared(tmp_path) / "*.tar"), 32)
    def take(count, *a):
        return [(s, i.numpy(), x.numpy()) for _, (s, i, x) in zip(range(count), data.batches(*a, workers=workers))]
    whole = take(9, ds, 12, 0, 5)                                              # 108 positions of 23 images: over four epochs
    assert np.bincount(np.concatenate([i for _, i, _ in whole])[:92]).tolist() == [4] * 23
    for step, indices, images in whole:
        assert all((images[k] == ds[i]).all() for k, i in enumerate(indices))
    for (s, i, x), (t, j, y) in zip(whole[4:], take(5, ds, 12, 4, 5)):
        assert s == t and (i == j).all() and (x == y).all()
    parts = [take(6, ds, 12, 4, 5, rank, 2, 3) for rank in (0, 1)]             # two ranks, two micro-batches a step
    for k in range(3):
        assert (np.concatenate([i for part in parts for _, i, _ in part[2 * k:2 * k + 2]]) == whole[4 + k][1]).all()


def test_reading_ahead_leaves_the_global_random_numbers_alone(tmp_path):
    """Would catch DataLoader's draw of a base seed, which shifts every later random number of a resumed run."""
    state = torch.get_rng_state()
    next(data.batches(data.open_data(str(xray_folder(tmp_path / "found", 6)), 16), 4, workers=1))
    assert torch.equal(state, torch.get_rng_state())


def test_pipe_shards_are_fetched_once_checked_and_dropped(tmp_path, monkeypatch):
    """Would catch a shard fetched by every worker, a cache that grows for ever, and a transfer cut short that is kept."""
    shards, log = prepared(tmp_path, 60, 2), tmp_path / "log"
    spec = f"pipe:echo {{shard}} >> {log}; cat {shards}/{{shard}}"
    roomy = data.open_data(spec, 32)
    for _ in zip(range(10), data.batches(roomy, 12, workers=2)):               # two epochs
        pass
    assert sorted(log.read_text().split()) == [data.INDEX, *(f"shard-{k:06d}.tar" for k in range(30))]
    log.unlink()
    local, remote = data.open_data(str(shards / "*.tar"), 32), data.open_data(spec, 32, cache_gb=1e-9)
    for path in remote.remote.folder.glob("*.tar"):
        path.unlink()
    for _, (s, i, x), (t, j, y) in zip(range(10), data.batches(local, 12, workers=2), data.batches(remote, 12, workers=2)):
        assert (s, i.tolist()) == (t, j.tolist()) and torch.equal(x, y)
    fetched = log.read_text().split()
    assert fetched.count(data.INDEX) == 1 and 30 <= len(fetched) <= 3 * 30 + 1
    assert len(list(remote.remote.folder.glob("*.tar"))) <= 2 * data.WINDOW + data.LANES
    os.truncate(shards / "shard-000003.tar", 1024)
    for path in remote.remote.folder.glob("*.tar"):
        path.unlink()
    monkeypatch.setattr(data, "TRIES", 1)
    with pytest.raises(data.UserError, match="shard-000003.tar could not be fetched.*the index says"):
        remote[6]
    with pytest.raises(data.UserError, match="no index.safetensors"):
        data.open_data("pipe:cat /nowhere/{shard}", 32)
    with pytest.raises(data.UserError, match="offline"):
        data.open_data(spec, 32, offline=True)[20]


def test_hub_shards_open_offline_from_the_hub_cache(tmp_path, monkeypatch):
    """Would catch a run that needs the network for what `hf download` has already brought."""
    hub = pytest.importorskip("huggingface_hub.constants", reason="huggingface-hub is not installed")
    shards = prepared(tmp_path)
    snapshot = tmp_path / "hub" / "datasets--me--xrays" / "snapshots" / ("0" * 40)
    (snapshot / "train").mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    for path in shards.glob("*.tar"):
        (snapshot / "train" / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    local = data.open_data(str(shards / "*.tar"), 32)
    remote = data.open_data("hf://datasets/me/xrays/train/*.tar", 32, offline=True)
    assert list(remote.keys) == list(local.keys) and all((remote[i] == local[i]).all() for i in range(0, 23, 5))
    with pytest.raises(data.UserError, match="hf download me/other --repo-type dataset"):
        data.open_data("hf://datasets/me/other/*.tar", 32, offline=True)


def test_augmentation_is_a_function_of_seed_image_and_step():
    """Would catch augmentation that depends on the batch, so that ranks, resumed runs and re-made images differ."""
    images, ids = torch.from_numpy(np.stack([xray(i, 64, 64) for i in range(6)])), torch.arange(6) * 1000
    whole = data.augment(images, ids, 7, 3)
    assert whole.shape == (6, 1, 64, 64) and whole.dtype == torch.float32 and whole.min() >= -1 and whole.max() <= 1
    assert torch.allclose(data.augment(images[2:4], ids[2:4], 7, 3), whole[2:4], atol=1e-6)
    for other in (data.augment(images, ids, 8, 3), data.augment(images, ids, 7, 4), data.augment(images, ids + 1, 7, 3)):
        assert (other - whole).abs().mean() > 0.01


def test_augmentation_stays_within_the_papers_ranges(monkeypatch):
    """Would catch scale turned round (71-111 %), shift in pixels of the wrong unit, and sharpening of every image."""
    spots = np.zeros((400, 100, 100), np.uint8)
    for k, (y, x) in enumerate(((50, 30), (50, 70), (30, 50), (70, 50))):
        spots[k::4, y - 2:y + 2, x - 2:x + 2] = 255                            # left, right, top, bottom, about the middle
    ids = np.arange(400) // 4                                                  # four spots share each draw
    x = (data.augment(torch.from_numpy(spots), ids, 0, 0)[:, 0] + 1) / 2
    axis = torch.arange(100) + 0.5
    place = torch.stack([(x.sum(k) * axis).sum(1) for k in (1, 2)], 1) / x.sum((1, 2))[:, None]  # (400, 2): x, y
    left, right, top, bottom = (place[k::4].double() for k in range(4))
    across, down = (right - left) / 40, (bottom - top) / 40
    assert 0.89 < across[:, 0].min() < 0.95 and 1.3 < across[:, 0].max() < 1.41
    assert torch.allclose(across[:, 0], down[:, 1], rtol=0.02)
    assert 0.03 < (across[:, 1] / across[:, 0]).abs().max() < 0.055 and 0.03 < (down[:, 0] / down[:, 1]).abs().max() < 0.055
    shift = ((left + right) / 2 - 50).abs()
    assert 3.5 < shift[:, 0].max() < 5.5 and 3.5 < shift[:, 1].max() < 5.5
    flat = torch.from_numpy(np.stack([xray(1, 64, 64)] * 200))
    sharp = data.augment(flat, np.arange(200), 0, 0)
    monkeypatch.setattr(data, "SHARPEN", 0.0)
    soft = data.augment(flat, np.arange(200), 0, 0)
    assert 0.4 < (sharp != soft).flatten(1).any(1).float().mean() < 0.6


def test_pixels_survive_the_way_to_the_model_and_back():
    """Would catch rounding down or an off-by-one range that darkens every image by a grey level."""
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16)
    assert torch.equal(data.to_uint8(data.to_model(every)), every) and data.to_model(every).shape == (1, 3, 16, 16)
    assert data.to_uint8(torch.tensor([7.0, -7.0]).reshape(2, 1, 1, 1).expand(-1, 3, -1, -1)).flatten().tolist() == [255, 0]


def labelled(count: int = 900):
    """-> labels and patients of a set in which findings differ in frequency and go together, some images have none."""
    u = data.uniforms(4, 11, np.arange(count))
    names = np.array(["Common", "Middling", "Rare"])
    labels = [tuple(names[row[:3] < (0.5, 0.3, 0.15)].tolist()) or ("No Finding",) for row in u]
    return labels, [f"p{int(row[3] * count / 3)}" for row in u]


def test_balanced_subsets_are_balanced_nested_and_reproducible(capsys):
    """Would catch an image drawn twice, "No Finding" taken for a label, and a small subset that is not in the larger."""
    labels, _ = labelled()
    subsets = data.balanced_subsets(labels, (30, 60, 90), 4)
    assert list(subsets) == [30, 60, 90] and capsys.readouterr().err == ""
    for n, indices in subsets.items():
        assert len(set(indices.tolist())) == n and all(labels[i] != ("No Finding",) for i in indices)
        assert all(sum(name in labels[i] for i in indices) >= n // 3 for name in ("Common", "Middling", "Rare"))
    assert set(subsets[30]) < set(subsets[60]) < set(subsets[90])
    again, other = (data.balanced_subsets(labels, (90,), seed)[90] for seed in (4, 5))
    assert (again == subsets[90]).all() and set(other) != set(subsets[90])
    assert list(data.balanced_subsets(labels, (30, 5000), 4)) == [30] and "'Rare' ran out" in capsys.readouterr().err
    with pytest.raises(data.UserError, match="ran out"):
        data.balanced_subsets(labels, (5000,), 4)


def test_splits_and_folds_never_share_a_patient():
    """Would catch the leak that makes every AUC too good, and folds without a rare label."""
    labels, patients = labelled()
    rest, held_out = data.split_by_patient(patients, 0.2, 3)
    assert sorted([*rest, *held_out]) == list(range(900)) and abs(len(held_out) - 180) <= 12
    assert not {patients[i] for i in rest} & {patients[i] for i in held_out}
    folds = data.folds_by_patient(patients, labels, 5, 3)
    assert sorted(np.concatenate(folds)) == list(range(900)) and max(map(len, folds)) - min(map(len, folds)) <= 12
    owners = [{patients[i] for i in fold} for fold in folds]
    assert sum(map(len, owners)) == len(set().union(*owners))
    for name in ("Common", "Middling", "Rare"):
        counts = [sum(name in labels[i] for i in fold) for fold in folds]
        assert max(counts) - min(counts) <= 6, (name, counts)
    assert len(data.split_by_patient([""] * 10, 0.3)[1]) == 3                  # unknown patients are all different ones


def test_mimic_keeps_frontal_views_and_common_findings(tmp_path):
    """Would catch lateral views, uncertain labels counted as present, and p19 in the training set."""
    findings = ["Edema", "Fracture", "Lung Opacity", "No Finding", "Support Devices"]
    names = [tmp_path / f"mimic-cxr-2.0.0-{kind}.csv" for kind in ("metadata", "chexpert")]
    with open(names[0], "w") as meta, open(names[1], "w") as chexpert:
        meta.write("dicom_id,subject_id,study_id,ViewPosition\n")
        chexpert.write(",".join(["subject_id", "study_id", *findings]) + "\n")
        for i in range(100):
            meta.write(f"d{i},{10 + i % 10}{i:06d},s{i},{'LATERAL' if i >= 90 else 'AP' if i % 2 else 'PA'}\n")
            values = ["1.0" if i % 4 == 0 else "-1.0", "1.0" if i < 3 else "", "1.0", "", "1.0"]
            chexpert.write(f"x,s{i},{','.join(values)}\n")
    table = data.read_labels(tmp_path)
    assert len(table) == 90 and {name for _, row in table.values() for name in row} == {"Edema"}
    assert table["d4"][1] == ("Edema",) and table["d5"][1] == ()
    assert data.is_mimic_test("files/p19/p19000293/s50/abc") and data.is_mimic_test("19000293")
    assert not data.is_mimic_test("files/p10/p10190002/s19000293/abc") and not data.is_mimic_test("10000032")


def test_nih_table_and_paths_of_any_depth(tmp_path):
    """Would catch labels lost because a CSV names files with another folder before them."""
    (tmp_path / "Data_Entry_2017.csv").write_text(
        "Image Index,Finding Labels,Patient ID\n00000001_000.png,Cardiomegaly|Emphysema,1\n")
    table = data.read_labels(tmp_path / "Data_Entry_2017.csv")
    assert data._row(table, "/x/images_001/images/00000001_000.png") == ("1", ("Cardiomegaly", "Emphysema"))
    (tmp_path / "wrong.csv").write_text("a,b\n1,2\n")
    with pytest.raises(data.UserError, match="file,patient,labels"):
        data.read_labels(tmp_path / "wrong.csv")


def test_lung_masks_follow_their_image_in_all_published_forms(tmp_path):
    """Would catch a mask cropped otherwise than its image, left and right exchanged, and JSRT's heart taken for a lung."""
    image = xray(2, 120, 160)
    image[:20], image[:, :10] = 0, 0                               # a border above and on the left: the square moves
    right, left = np.zeros((2, 120, 160), np.uint8)
    right[50:90, 40:70], left[50:90, 90:130] = 255, 255          # the patient's right lung is on the picture's left
    image[right > 0], image[left > 0] = 30, 30
    def save(path, array):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(tmp_path / path)
    save("pairs/images/a.png", image), save("pairs/masks/a.png", right | left)
    save("shenzhen/CXR_png/a.png", image), save("shenzhen/mask/a_mask.png", right | left)
    save("montgomery/CXR_png/a.png", image), save("montgomery/ManualMask/leftMask/a.png", right)  # names may lie
    save("montgomery/ManualMask/rightMask/a.png", left)
    save("jsrt/All247images/a.png", image), save("jsrt/fold1/masks/left lung/a.gif", left[::2, ::2])
    save("jsrt/fold1/masks/right lung/a.gif", right[::2, ::2]), save("jsrt/fold1/masks/heart/a.gif", left)
    sets = data.lung_sets(tmp_path, 50)
    assert sorted(sets) == ["jsrt", "montgomery", "pairs", "shenzhen"]
    for name, ds in sets.items():
        masks = ds.mask(0)
        dark = data.preprocess(image, 50) < 35
        assert len(ds) == 1 and masks.shape == (2, 50, 50) and masks.dtype == bool, name
        assert np.nonzero(masks[0])[1].mean() > np.nonzero(masks[1])[1].mean(), name
        assert (masks.any(0) & dark).sum() / (masks.any(0) | dark).sum() > 0.85, name
    assert list(data.lung_sets(tmp_path / "pairs", 50)) == ["pairs"]
    for part in ("train", "val"):  # two patients called a: their masks would become one's left and right lung
        save(f"two/{part}/images/a.png", image), save(f"two/{part}/masks/a.png", right)
    with pytest.raises(data.UserError, match="two masks of one name"):
        data.lung_sets(tmp_path / "two", 50) and data.lung_sets(tmp_path, 50)
    touching = np.zeros((20, 40), bool)
    touching[5:15, 4:36] = True
    halves = data._two_lungs(touching)
    assert (halves[0] ^ halves[1] == touching).all() and halves[0].sum() == halves[1].sum()


@pytest.mark.parametrize("spec,message", [("/nowhere", "no such folder"), ("{tmp}/empty", "holds no X-rays"),
                                          ("{tmp}/*.tar", "no file matches"), ("hf://datasets/x", "OWNER/NAME/GLOB"),
                                          ("pipe:cat x", "{shard}")])
def test_bad_data_is_a_sentence_not_a_traceback(tmp_path, spec, message):
    """Would catch a user left alone with FileNotFoundError or an empty epoch."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(data.UserError) as caught:
        data.open_data(spec.replace("{tmp}", str(tmp_path)), 32)
    assert message in str(caught.value)


def test_a_million_rows_are_not_decoded_to_open_them(tmp_path):
    """Would catch an index that keeps a Python object for each image."""
    rows = [(512 * i, 500, 32, f"images/{i:07d}\tp{i // 3}\tnih\tA|B") for i in range(3000)]
    data.write_index(tmp_path / data.INDEX, {f"s{k}.tar": (9, rows[1000 * k:1000 * k + 1000]) for k in range(3)})
    known, arrays = data.read_index(tmp_path / data.INDEX)
    assert list(known) == ["s0.tar", "s1.tar", "s2.tar"] and arrays["count"].tolist() == [1000] * 3
    keys, labels = (data.Column(arrays["text"], arrays["end"], field) for field in (0, 3))
    assert keys[0] == "images/0000000" and keys[-1] == "images/0002999" and len(list(keys)) == 3000
    assert labels[1500] == ("A", "B")


def test_grid_shows_every_image_and_shortens_captions():
    """Would catch a picture lost in the last row, or captions that run into each other."""
    tiles, captions = [np.full((64, 64), 40 * i, np.uint8) for i in range(5)], ["a caption much too long for its picture"] * 5
    sheet = data.grid(tiles, 3, captions, ["row one", "row two"], "title")
    greys = np.asarray(sheet.convert("L"))
    assert all((greys == 40 * i).sum() >= 128 * 128 for i in range(1, 5)) and sheet.size[0] < 3 * 140 + 130


# ---- Phantoms -------------------------------------------------------------------------------------------------------------


def _ring(lungs, width=3):
    """The band of `width` pixels around a mask."""
    from scipy.ndimage import binary_dilation
    return binary_dilation(lungs, iterations=width) & ~lungs


def _with_and_without(finding, patients=range(12), size=64):
    """(film with the finding alone, film without any, masks with, masks without) of each patient."""
    for patient in patients:
        sick, sick_masks, labels = render_phantom(3, patient, 0, size, (finding,))
        healthy, healthy_masks, none = render_phantom(3, patient, 0, size, ())
        assert labels == (finding,) and none == ()
        yield sick.astype(int), healthy.astype(int), sick_masks, healthy_masks


def test_phantom_is_a_pure_function_of_its_arguments():
    """Would catch a global random state, or an argument that is ignored."""
    first = render_phantom(1, 2, 3, 48)
    np.random.seed(0)
    render_phantom(9, 9, 9, 32)
    again = render_phantom(1, 2, 3, 48)
    assert first[0].dtype == np.uint8 and first[0].shape == (48, 48)
    assert first[1].dtype == bool and first[1].shape == (2, 48, 48)
    assert np.array_equal(first[0], again[0]) and np.array_equal(first[1], again[1]) and first[2] == again[2]
    for other in ((0, 2, 3), (1, 0, 3), (1, 2, 0)):
        assert not np.array_equal(first[0], render_phantom(*other, 48)[0])


def test_phantom_is_the_same_chest_at_every_size():
    """Would catch lengths given in pixels, or random numbers whose count depends on the size."""
    for patient in range(6):
        small, small_masks, labels = render_phantom(0, patient, 0, 64)
        large, large_masks, same = render_phantom(0, patient, 0, 256)
        assert labels == same
        shrunk = large.reshape(64, 4, 64, 4).mean((1, 3))
        lungs = small_masks.any(0)
        assert np.corrcoef(shrunk.ravel(), small.ravel())[0, 1] > 0.995
        assert np.corrcoef(shrunk[lungs], small[lungs])[0, 1] > 0.994          # vessels and ribs too
        assert (large_masks[:, ::4, ::4] == small_masks).mean() > 0.97


def test_phantom_masks_are_two_dark_lungs_inside_the_picture():
    """Would catch swapped sides, masks that overlap, are cut or leave specks, and lungs no darker than what is around them."""
    from scipy.ndimage import label
    for patient in range(40):
        image, (left, right), _ = render_phantom(0, patient, 0, 64)
        lungs = left | right
        assert not (left & right).any() and 0.06 < left.mean() < 0.25 and 0.06 < right.mean() < 0.25
        assert np.nonzero(left)[1].mean() > 36 and np.nonzero(right)[1].mean() < 28  # the patient's left is on our right
        assert not (lungs[[0, -1]].any() or lungs[:, [0, -1]].any())
        for lung in (left, right):
            parts, _ = label(lung)
            assert np.bincount(parts.ravel())[1:].max() > 0.99 * lung.sum()
            assert image[lung].mean() + 20 < image[_ring(lung)].mean()


def test_phantom_findings_are_as_common_as_announced():
    """Would catch a finding that never, or always, occurs; and a disease that jumps between patients from visit to visit."""
    visits = [[render_phantom(0, patient, visit, 32)[2] for visit in (0, 1)] for patient in range(400)]
    both = [labels for pair in visits for labels in pair]
    for finding in FINDINGS:
        assert 0.11 < np.mean([finding in labels for labels in both]) < 0.26, finding
        first, second = ([finding in pair[k] for pair in visits] for k in (0, 1))
        assert np.corrcoef(first, second)[0, 1] > 0.6, finding
    assert 0.32 < np.mean([labels == () for labels in both]) < 0.45


def test_phantom_visits_of_a_patient_resemble_each_other_more_than_other_patients():
    """Would catch anatomy that depends on the visit, and visits that are copies."""
    films = np.array([[render_phantom(2, patient, visit, 64)[0].ravel() for visit in (0, 1)] for patient in range(40)], float)
    films = (films - films.mean(-1, keepdims=True)) / films.std(-1, keepdims=True)
    likeness = films[:, 0] @ films[:, 1].T / films.shape[-1]                           # (40, 40), first visits by second visits
    same = np.diag(likeness)
    others = (likeness.sum(1) - same) / (len(same) - 1)
    assert same.mean() > others.mean() + 0.04 and np.mean(same > others) > 0.85 and same.max() < 0.995


def test_phantom_effusion_whitens_the_base_of_a_lung_and_leaves_its_mask():
    """Would catch fluid drawn outside the chest, or left inside the mask."""
    for sick, healthy, sick_masks, healthy_masks in _with_and_without("Effusion"):
        fluid = healthy_masks.any(0) & ~sick_masks.any(0)
        assert not (sick_masks & ~healthy_masks).any() and fluid.sum() >= 25
        rows = np.nonzero(healthy_masks.any(0))[0]
        assert np.nonzero(fluid)[0].mean() > rows.mean() + 8                                       # low in the chest
        assert (sick - healthy)[fluid].mean() > 40 and np.abs(sick - healthy)[:20].max() <= 2      # bright there, nothing above


def test_phantom_cardiomegaly_is_a_cardiothoracic_ratio_above_a_half():
    """Would catch a heart that is drawn large but not cut out of the masks, or the reverse. Measured as a radiologist does."""
    def cardiothoracic(left, right):
        column = int(np.median(np.nonzero(right)[1]))
        rows = np.flatnonzero(right[:, column])                               # apex to dome, along the middle of the right lung
        rows = rows[len(rows) // 3:]                                          # below the arch of the aorta
        heart = max(np.flatnonzero(left[y])[0] for y in rows) - min(np.flatnonzero(right[y])[-1] for y in rows) - 1
        return heart / np.ptp(np.flatnonzero((left | right).any(0)))
    for sick, healthy, sick_masks, healthy_masks in _with_and_without("Cardiomegaly", size=128):
        assert cardiothoracic(*healthy_masks) < 0.50 < 0.53 < cardiothoracic(*sick_masks)
        heart = healthy_masks.any(0) & ~sick_masks.any(0)
        assert (sick - healthy)[heart].mean() > 25


def test_phantom_findings_of_the_lung_change_the_lung_alone():
    """Would catch nodules and clouds outside the lungs, too small or too faint to see, and masks that exclude diseased lung."""
    for finding, change, pixels in (("Consolidation", 20, 60), ("Nodule", 20, 10)):
        for sick, healthy, sick_masks, healthy_masks in _with_and_without(finding):
            difference = sick - healthy
            assert np.array_equal(sick_masks, healthy_masks)
            assert (difference > change).sum() >= pixels, finding              # a nodule: 4 pixels across or more
            assert np.abs(difference)[~sick_masks.any(0)].max() <= 40          # pixels at the edge belong to both
            assert np.abs(difference)[~sick_masks.any(0)].sum() < 0.05 * np.abs(difference).sum()


def test_phantom_pneumothorax_is_a_black_rim_on_one_side():
    """Would catch air on both sides, a rim that is brighter than lung, and masks that leave the free air out."""
    for sick, healthy, sick_masks, healthy_masks in _with_and_without("Pneumothorax"):
        assert np.array_equal(sick_masks, healthy_masks)
        changed = np.abs(sick - healthy) > 8
        sides = [(changed & lung).sum() for lung in sick_masks]
        assert min(sides) == 0 and max(sides) > 60
        lung = sick_masks[int(np.argmax(sides))]
        rim = lung & (_ring(~lung, 3))                                         # the outermost three pixels, medial ones too
        assert ((sick - healthy)[rim] < -8).sum() > 25                         # air is blacker than lung
        assert ((sick - healthy)[lung & ~rim] > 5).sum() > 25                  # what is left of the lung is denser


# ---- vit.py: the four layouts against the libraries that wrote them --------------------------------------------------------

VIT_SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8)


def randomised(model):
    """Every weight random and large enough to matter: ones, zeros and 1e-5 hide what is left out."""
    draw = torch.Generator().manual_seed(0)
    state = {k: torch.randn(v.shape, generator=draw) * (0.3 if v.ndim > 1 else 0.5) + (v.ndim == 1) for k, v in model.state_dict().items()}
    model.load_state_dict(state)
    return model.eval()


def hf_model(layout):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: parity with its ViTs is not tested")
    name = {"vit": "ViT", "vit-pooler": "ViT", "dinov2": "Dinov2", "dinov2_with_registers": "Dinov2WithRegisters"}[layout]
    extra = {"intermediate_size": 128, "layer_norm_eps": 1e-12} if name == "ViT" else {"layer_norm_eps": 1e-6}
    cls = getattr(transformers, name + "Model")
    config = getattr(transformers, name + "Config")(**VIT_SMALL, **extra)
    config._attn_implementation = "sdpa"  # the eager path takes its softmax in float32
    return cls, randomised(cls(config, add_pooling_layer=layout == "vit-pooler") if name == "ViT" else cls(config))


def hf_tokens(model, x):
    with torch.no_grad():
        out = model(x, interpolate_pos_encoding=True) if type(model).__name__ == "ViTModel" else model(x)
    tokens = out.last_hidden_state
    has_pooler = getattr(model, "pooler", None) is not None
    return torch.cat([tokens[:, :1], out.pooler_output[:, None], tokens[:, 1:]], dim=1) if has_pooler else tokens


@pytest.mark.parametrize("layout", ["vit", "vit-pooler", "dinov2", "dinov2_with_registers"])
def test_vit_of_transformers_opens_with_equal_tokens_at_any_size_and_saves_back(layout, tmp_path):
    """A wrong name, eps, GELU, token order, pooler input, smoothing or precision of the resampled positions."""
    cls, theirs = hf_model(layout)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = ViT.from_pretrained(tmp_path / "theirs").double()
    assert ours.config.layout == layout.split("-")[0] and ours.config.heads == 4 and ours.config.pooler == (layout == "vit-pooler")
    ours.save_pretrained(tmp_path / "ours")
    assert {k: v.shape for k, v in read_weights(tmp_path / "ours")[1].items()} == {
        k: v.shape for k, v in read_weights(tmp_path / "theirs")[1].items()}
    again = cls.from_pretrained(tmp_path / "ours", attn_implementation="sdpa", **({"add_pooling_layer": False} if layout == "vit" else {}))
    for height, width in ((32, 32), (48, 48), (24, 40), (35, 51), (16, 64)):  # native, larger, not square, not whole patches
        x = torch.randn(2, 3, height, width, dtype=torch.float64)
        want = hf_tokens(theirs.double(), x)
        for got in (ours(x), hf_tokens(again.double(), x)):
            assert got.shape == want.shape and (got - want).abs().max() < 1e-9, (height, width, (got - want).abs().max())


@pytest.mark.parametrize("layout", ["vit", "dinov2", "dinov2_with_registers"])
def test_vit_opens_state_dicts_of_either_transformers_and_prefixed_ones(layout, tmp_path):
    """transformers 5 renamed its modules; ViTForImageClassification prefixes `vit.` and adds a classifier; .bin and fp16 files."""
    _, theirs = hf_model(layout)
    state = {"vit." + k: v.half() for k, v in theirs.state_dict().items()} | {"classifier.weight": torch.zeros(3, 32)}
    torch.save(state, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(theirs.config.to_json_string())
    ours, x = ViT.from_pretrained(tmp_path), torch.randn(1, 3, 32, 32)
    assert ours.cls_token.dtype == torch.float32 and not ours.config.pooler
    theirs.load_state_dict({k: v.half().float() for k, v in theirs.state_dict().items()})
    assert torch.allclose(ours(x), hf_tokens(theirs, x), atol=1e-4)


def timm_model(registers):
    tv = [p for p in sys.path if (Path(p) / "tvshim.py").exists()]
    if tv:
        __import__("tvshim")
    timm = pytest.importorskip("timm", reason="timm is not installed: parity with its ViTs is not tested")
    args = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=0)
    args |= dict(reg_tokens=4, no_embed_class=True, init_values=1e-5) if registers else {}
    return timm, args, randomised(timm.create_model("vit_base_patch16_224", dynamic_img_size=True, **args))


@pytest.mark.parametrize("registers", [4, 0])
def test_vit_of_timm_opens_with_equal_tokens_at_any_size_and_saves_back(registers, tmp_path):
    """DINOv2-reg4 adds positions to the patches alone, timm's DINOv1 to CLS as well; its resampling is antialiased."""
    timm, args, theirs = timm_model(registers)
    config = {"architecture": "vit_base_patch16_224", "num_features": 32, "model_args": args, "pretrained_cfg": {
        "input_size": [3, 32, 32], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.1], "interpolation": "bicubic", "num_classes": 0}}
    write_weights(tmp_path / "theirs", config, theirs.state_dict(), "model.safetensors")
    ours = ViT.from_pretrained(tmp_path / "theirs").double()
    assert ours.config.mean == (0.5, 0.4, 0.3) and ours.config.cls_position == (not registers) and ours.config.registers == registers
    ours.save_pretrained(tmp_path / "ours")
    again = timm.create_model(f"local-dir:{tmp_path}/ours", pretrained=True, dynamic_img_size=True).eval()
    assert again.state_dict().keys() == theirs.state_dict().keys() == ours.state_dict().keys()
    for height, width in ((32, 32), (48, 48), (24, 40), (16, 64)):
        x = torch.randn(2, 3, height, width, dtype=torch.float64)
        with torch.no_grad():
            want = theirs.double().forward_features(x)
            assert (ours(x) - want).abs().max() < 1e-9 and (again.double().forward_features(x) - want).abs().max() < 1e-9


FULL = {  # layout file: config, tensors, parameters, three of its keys
    "hf-vit-base": (ViTConfig(pooler=True), 200, 86_389_248, "pooler.dense.weight", "encoder.layer.11.attention.attention.key.bias",
                    "encoder.layer.0.layernorm_after.weight"),
    "hf-dinov2-base": (ViTConfig("dinov2", 518, 14, layer_scale=True, mask_token=True), 223, 86_580_480, "embeddings.mask_token",
                       "encoder.layer.3.layer_scale2.lambda1", "encoder.layer.11.mlp.fc2.bias"),
    "hf-dinov2-reg-base": (ViTConfig("dinov2_with_registers", 518, 14, layer_scale=True, mask_token=True, registers=4), 224, 86_583_552,
                           "embeddings.register_tokens", "encoder.layer.0.norm1.weight", "layernorm.bias"),
    "timm-dinov2-reg4-base": (ViTConfig("timm", 518, 14, layer_scale=True, registers=4, cls_position=False), 175, 86_582_016,
                              "reg_token", "blocks.11.attn.qkv.weight", "blocks.0.ls1.gamma")}


@pytest.mark.parametrize("name", FULL)
def test_vit_full_size_files_have_the_public_keys_and_shapes(name, tmp_path):
    """A key too many or too few, or another shape, and the public checkpoint would not open."""
    config, tensors, parameters, *keys = FULL[name]
    ViT(config).save_pretrained(tmp_path)
    saved = {k: list(v.shape) for k, v in read_weights(tmp_path)[1].items()}
    assert len(saved) == tensors and sum(int(np.prod(s)) for s in saved.values()) == parameters and not set(keys) - set(saved)
    layout = Path(__file__).resolve().parent / "../shared/layouts" / f"{name}.json"
    if layout.exists():
        assert saved == json.loads(layout.read_text())


def test_vit_single_file_without_config_finds_its_sizes(tmp_path):
    """Layout, sizes, registers and LayerNorm's eps have to come from the names and shapes of the tensors."""
    config = ViTConfig("dinov2_with_registers", 56, 14, 128, 3, 2, 3.0, registers=2, layer_scale=True, mask_token=True, eps=1e-6,
                       interpolation="bicubic")
    ViT(config).save_pretrained(tmp_path / "a")
    (tmp_path / "a/model.safetensors").rename(tmp_path / "alone.safetensors")
    assert ViT.from_pretrained(tmp_path / "alone.safetensors").config == config


def test_vit_wrong_files_are_refused_with_keys_and_shapes(tmp_path):
    """A silent partial load, or a traceback, where the file is another network's, of another size, or a SwiGLU giant."""
    small = ViTConfig(image_size=32, patch_size=8, hidden_size=32, depth=2, heads=4)
    ViT(small).save_pretrained(tmp_path / "a")
    config = json.loads((tmp_path / "a/config.json").read_text())
    (tmp_path / "a/config.json").write_text(json.dumps(config | {"hidden_size": 64}))
    with pytest.raises(UserError, match=r"28 shapes differ: blocks.0.attn.proj.bias: file \(32,\), model \(64,\)"):
        ViT.from_pretrained(tmp_path / "a")
    (tmp_path / "a/config.json").write_text(json.dumps(config | {"use_swiglu_ffn": True}))
    with pytest.raises(UserError, match="SwiGLU"):
        ViT.from_pretrained(tmp_path / "a")
    torch.save({"conv_in.weight": torch.zeros(3)}, tmp_path / "unet.bin")
    with pytest.raises(UserError, match=r"conv_in.weight"):
        ViT.from_pretrained(tmp_path / "unet.bin")
    torch.save({k: v for k, v in ViT(small).state_dict().items() if "norm2" not in k}, tmp_path / "vit.bin")
    with pytest.raises(UserError, match=r"blocks.0.norm2.bias"):
        ViT.from_pretrained(tmp_path / "vit.bin")


def test_vit_prepare_is_the_encoders_own_preprocessing(tmp_path):
    """Another filter, no antialiasing, ImageNet's constants for RAD-DINO, or [-1, 1] taken for [0, 1]."""
    from PIL import Image
    config = ViTConfig("dinov2", 28, 14, 32, 1, 2, layer_scale=True, eps=1e-6, interpolation="bicubic", mean=(0.53,) * 3, std=(0.26,) * 3)
    ViT(config).save_pretrained(tmp_path)
    vit = ViT.from_pretrained(tmp_path)
    assert vit.config == config
    image = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    want = (np.asarray(Image.fromarray(image).resize((28, 28), Image.BICUBIC)) / 255 - 0.53) / 0.26
    got = vit.prepare(to_model(torch.from_numpy(image)[None]))
    assert got.shape == (1, 3, 28, 28) and np.abs(got[0, 1].numpy() - want).max() < 1.01 / 255 / 0.26  # Pillow rounds to 8 bits
    native = torch.rand(1, 3, 28, 28) * 2 - 1
    assert torch.allclose(vit.prepare(native) * 0.26 + 0.53, (native + 1) / 2, atol=1e-6)


def test_vit_maps_are_each_blocks_attention_and_change_nothing():
    """A transposed or unscaled softmax, or a map list that alters the tokens."""
    vit = ViT(ViTConfig(image_size=32, patch_size=8, hidden_size=32, depth=2, heads=4, registers=3, pooler=True)).double()
    randomised(vit)
    x, maps = torch.randn(2, 3, 24, 32, dtype=torch.float64), []
    assert (vit(x, maps) - vit(x)).abs().max() < 1e-12
    assert [m.shape for m in maps] == [(2, 4, 16, 16)] * 2 and (torch.stack(maps).sum(-1) - 1).abs().max() < 1e-12
    assert torch.equal(vit.global_tokens(x), vit(x)[:, :5]) and vit.config.global_count == 5
    assert torch.allclose(vit(x)[:, 1], torch.tanh(F.linear(vit(x)[:, 0], *vit.pooler.dense.parameters())))


# ---- vit.py: self-distillation --------------------------------------------------------------------------------------------

TINY = ViTConfig(image_size=32, patch_size=8, hidden_size=32, depth=2, heads=2, eps=1e-6)
SHORT = DinoSettings(steps=8, batch=8, out_dim=32, head_hidden=32, head_bottleneck=16, global_size=32, local_size=16, local_crops=2)


def discs(step, batch=8, size=32):
    """uint8 (batch, size, size): discs of two sizes at random places, the same for the same step."""
    u = torch.rand(batch, 3, 1, 1, generator=torch.Generator().manual_seed(step))
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    radius = torch.where(u[:, 2] < 0.5, 4.0, 10.0)
    return (220 * torch.sigmoid(radius - ((x - size * u[:, 0]) ** 2 + (y - size * u[:, 1]) ** 2).sqrt()) + 20).to(torch.uint8)


def test_dino_crops_are_functions_of_seed_step_and_place():
    """A crop that depends on the batch it is made in makes ranks, batch sizes and resumed runs disagree."""
    images = discs(0)
    whole = crop(images, 16, (0.1, 0.4), 0.4, 3, 5, 2, np.arange(8))
    half = crop(images[4:], 16, (0.1, 0.4), 0.4, 3, 5, 2, np.arange(4, 8))
    assert torch.allclose(whole[4:], half, atol=1e-6) and 0 <= whole.min() and whole.max() <= 1
    assert (whole - crop(images, 16, (0.1, 0.4), 0.4, 3, 6, 2, np.arange(8))).abs().max() > 0.1
    alike = lambda a, b: float(np.mean([np.corrcoef(x.flatten(), y.flatten())[0, 1] for x, y in zip(a.numpy(), b.numpy())]))
    same = crop(images, 32, (1.0, 1.0), 0.0, 1, 1, 0, np.arange(8))[:, 0]  # the whole area: the image, unflipped, at another exposure
    assert alike(same, images) > 0.9 > 0.7 > alike(same.flip(-1), images)


def test_dino_crops_do_not_tell_the_exposure():
    """Contrast or brightness left readable is what the network learns instead of anatomy."""
    dark, bright = (crop((discs(0) * f).to(torch.uint8), 32, (1.0, 1.0), 0.0, 1, 1, 0, np.arange(8)) for f in (0.4, 1.0))
    assert F.l1_loss(dark, bright) < 0.03


def test_dino_stopped_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path):
    """Anything that training carries from step to step and the saved state leaves out."""
    rows = {"whole": [], "parts": []}
    train_dino(TINY, SHORT, discs, tmp_path / "whole", log=rows["whole"].append)
    for _ in range(3):
        start = len(rows["parts"])
        vit = train_dino(TINY, SHORT, discs, tmp_path / "parts", log=rows["parts"].append, should_stop=lambda: len(rows["parts"]) >= start + 3)
    assert vit is not None and not (tmp_path / "parts.training.safetensors").exists()
    a, b = ([{k: v for k, v in row.items() if k != "images_per_s"} for row in rows[name]] for name in rows)
    assert a == b and len(a) == SHORT.steps
    assert (tmp_path / "whole/model.safetensors").read_bytes() == (tmp_path / "parts/model.safetensors").read_bytes()


def test_dino_refuses_the_state_of_other_settings(tmp_path):
    """Resuming with another learning rate or width would mix two runs without a word."""
    import dataclasses
    train_dino(TINY, SHORT, discs, tmp_path / "vit", should_stop=lambda: True)
    with pytest.raises(UserError, match="other settings"):
        train_dino(TINY, dataclasses.replace(SHORT, lr=5e-4), discs, tmp_path / "vit")


def _dino_rank(rank, world, folder):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29533", "RANK": str(rank)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    rows = []
    train_dino(TINY, SHORT, lambda step: discs(step)[rank * 4:rank * 4 + 4], Path(folder) / "two", rank=rank, world=world, log=rows.append)
    if rank == 0:
        (Path(folder) / "two.json").write_text(json.dumps(rows))
    torch.distributed.destroy_process_group()


def test_dino_on_two_ranks_equals_one(tmp_path):
    """Gradients, centre or crops that belong to one rank instead of to the global batch."""
    torch.multiprocessing.spawn(_dino_rank, (2, str(tmp_path)), nprocs=2)
    one = []
    train_dino(TINY, SHORT, discs, tmp_path / "one", log=one.append)
    two = json.loads((tmp_path / "two.json").read_text())
    assert np.allclose([r["loss"] for r in one], [r["loss"] for r in two], rtol=1e-4)
    assert np.isclose(one[0]["grad_norm"], two[0]["grad_norm"], rtol=1e-5)


def test_dino_learns_to_know_an_image_by_any_view_of_it(tmp_path):
    """Collapse, a teacher that never moves, or a loss with the wrong sign: no better than random weights at finding the other view."""
    settings = DinoSettings(steps=250, out_dim=128, head_hidden=64, head_bottleneck=32, global_size=32, local_size=16)
    rows = []
    trained = train_dino(TINY, settings, lambda step: discs(step, 32), tmp_path / "vit", log=rows.append)
    torch.manual_seed(0)
    found, images = {}, discs(10 ** 6, 200)
    for name, net in (("trained", trained), ("untrained", ViT(TINY).eval())):
        with torch.no_grad():
            tokens = [net(crop(images, 32, (0.7, 1.0), 0.3, 7, 0, view, np.arange(200)).expand(-1, 3, -1, -1))[:, 0] for view in (0, 1)]
        a, b = (F.normalize((c - c.mean(0)) / c.std(0), dim=-1) for c in tokens)
        found[name] = ((a @ b.T).argsort(1, descending=True)[:, :10] == torch.arange(200)[:, None]).any(1).float().mean().item()
    assert 0.2 < rows[-1]["teacher_entropy"] < 4.6 and rows[-1]["feature_spread"] > 0.1  # collapse: 0 or ln 128 = 4.85; 0
    assert found["trained"] > found["untrained"] + 0.1, found
    with torch.no_grad():  # what the last batches of get_batch show is what the final norm was rescaled to
        tokens = trained(trained.prepare(to_model(torch.cat([discs(step, 32) for step in range(250, 266)]))))[:, 0]
    assert tokens.mean(0).abs().max() < 1e-3 and (tokens.std(0) - 1).abs().max() < 0.01


def test_knn_probe_is_one_for_what_tells_and_chance_for_what_only_knows_the_patient():
    """Folds that share a patient: features that name the patient would then seem to know the disease."""
    draw = np.random.default_rng(0)
    patients = np.repeat(np.arange(60), 4)
    labels = draw.integers(0, 2, (60, 2)).astype(bool)[patients]
    noise = draw.normal(size=(240, 4))
    tells, names = np.hstack([labels + 0.1 * noise[:, :2], noise]), draw.normal(size=(60, 16))[patients] + 0.01 * noise[:, :1]
    assert min(knn_probe(torch.tensor(tells), labels, patients).values()) > 0.95
    assert max(knn_probe(torch.tensor(names), labels, patients).values()) < 0.7


def test_dino_trained_vit_opens_in_transformers_with_equal_tokens(tmp_path):
    """What the small presets train is to be usable outside: `ViTModel.from_pretrained(run/vit)`."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: its reading of our ViT is not tested")
    vit = train_dino(TINY, SHORT, discs, tmp_path / "vit")
    theirs = transformers.ViTModel.from_pretrained(tmp_path / "vit", add_pooling_layer=False).eval()
    x = vit.prepare(to_model(discs(1)))
    assert torch.allclose(vit(x), hf_tokens(theirs, x), atol=1e-5)
    assert ViT.from_pretrained(tmp_path / "vit").config == vit.config


# ---- diffseg.py -----------------------------------------------------------------------------------------------------------


def plain_kl(p, Y):
    """½(KL(p‖q) + KL(q‖p)) of p (S, S) with each q of Y (…, S, S), element by element, as defined."""
    quotient = np.log(p) - np.log(Y)
    return (p * quotient).sum((-2, -1)) / 2 - (Y * quotient).sum((-2, -1)) / 2


def plain_diffseg(maps, grid, thresholds, size):
    """DiffSeg as published, in loops: maps [(heads, side², side²) float64] of one image -> A (S², S²), labels (size, size)."""
    sides = [math.isqrt(m.shape[-1]) for m in maps]
    S, A = max(sides), 0.0
    for side in sorted(set(sides)):
        heads = np.concatenate([m for m, s in zip(maps, sides) if s == side]).mean(0)
        wide = torch.nn.functional.interpolate(torch.tensor(heads).view(-1, 1, side, side), (S, S), mode="bilinear").numpy()
        wide = wide.reshape(side, side, S, S) / wide.sum((1, 2, 3)).reshape(side, side, 1, 1)
        A = A + wide.repeat(S // side, 0).repeat(S // side, 1) * side / sum(set(sides))
    step = (S - 1) // (grid - 1)
    line = [(S - 1 - step * (grid - 1)) // 2 + step * i for i in range(grid)]
    attns, masks = A.reshape(-1, S, S), []
    for i in line:
        for j in line:
            masks.append(attns[plain_kl(A[i, j], attns) < thresholds[0]].mean(0))
    for limit in thresholds[1:]:
        proposals, masks, matched = np.stack(masks), [], set()
        for i in range(len(proposals)):
            if i not in matched:
                near = plain_kl(proposals[i], proposals) < limit
                matched |= {i, *np.flatnonzero(near)}
                masks.append(proposals[near].mean(0))
    wide = torch.nn.functional.interpolate(torch.tensor(np.stack(masks))[None], (size, size), mode="bilinear")[0].numpy()
    return A.reshape(S * S, S * S), wide.argmax(0)


def noise(*shape):
    """float64 normal numbers, a function of the shape alone."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def attention_like(sides, seed, regions=5, leak=0.15, sharp=1.0):
    """Noisy attention over Voronoi regions, float64: [(1, 2 heads, side², side²)], as a UNet with those sides would give."""
    rng, S = np.random.default_rng(seed), max(sides)
    y, x = np.mgrid[:S, :S] / S
    at = rng.random((regions, 2))
    region = ((y[..., None] - at[:, 0])**2 + (x[..., None] - at[:, 1])**2).argmin(-1)
    maps = []
    for side in sides:
        flat = region[::S // side, ::S // side].ravel()
        logits = 3 * (flat[:, None] == flat) + sharp * rng.normal(size=(1, 2, side**2, 1)) * rng.normal(size=(1, 2, 1, side**2))
        p = np.exp(logits)
        maps.append(torch.tensor((1 - leak) * p / p.sum(-1, keepdims=True) + leak / side**2))
    return maps


@pytest.mark.parametrize("sides, grid, threshold", [
    ([8, 4], 8, 0.05), ([8, 8, 4, 2], 4, 0.2), ([16, 8, 16], 16, 0.05), ([16, 8, 8], 5, [0.3, 0.1, 0.5]),
    ([64, 32, 16, 8], 3, 0.1)])
def test_diffseg_is_the_published_algorithm(sides, grid, threshold):
    """Another anchor grid, aggregation weight, order of merging or set over which a mean is taken gives other labels."""
    thresholds = threshold if isinstance(threshold, list) else [threshold] * 3
    for seed in range(1 if max(sides) == 64 else 4):
        maps = attention_like(sides, seed)
        A, labels = plain_diffseg([m[0].numpy() for m in maps], grid, thresholds, 2 * max(sides))
        ours = diffseg.aggregate(maps)[0]
        torch.testing.assert_close(ours, torch.tensor(A), rtol=1e-12, atol=1e-16)
        found = diffseg.label(diffseg.merge(ours, grid, threshold), 2 * max(sides))
        assert found.dtype == torch.int64 and len(np.unique(labels)) > 1
        assert torch.equal(found, torch.tensor(labels)), f"seed {seed}"


def test_diffseg_random_maps_with_no_structure():
    """Where distances crowd around the threshold, a wrong factor in the divergence merges other pairs."""
    maps = [torch.softmax(noise(1, 3, side**2, side**2), -1) for side in (8, 4)]
    flat = diffseg.aggregate(maps)[0]
    for threshold in np.quantile(diffseg.divergence(flat, flat), (0.2, 0.5, 0.8)).tolist():
        _, labels = plain_diffseg([m[0].numpy() for m in maps], 8, [threshold] * 3, 16)
        assert torch.equal(diffseg.label(diffseg.merge(flat, 8, threshold), 16), torch.tensor(labels))


def test_diffseg_recovers_known_regions():
    """Two lungs, a heart and the rest, as attention at two resolutions, come back exactly, whatever the grid."""
    regions = torch.zeros(16, 16, dtype=torch.int64)
    regions[4:14, 2:6], regions[4:14, 10:14], regions[8:12, 6:10] = 1, 2, 3
    A = diffseg.aggregate(diffseg.regions_to_maps(regions, [16, 16, 8]))[0]
    for grid in (8, 16, 32):
        found = diffseg.label(diffseg.merge(A, grid, 0.5), 16)
        pairs = torch.stack([regions.flatten(), found.flatten()]).unique(dim=1)
        assert pairs.shape[1] == 4 == len(found.unique())
    refined = diffseg.label(diffseg.refine(A, diffseg.merge(A, 8, 0.5)), 16)
    assert torch.stack([found.flatten(), refined.flatten()]).unique(dim=1).shape[1] == 4
    bands = torch.tensor([0] + [1] * 11 + [2] * 4)[:, None].expand(16, 16)
    by_area = diffseg.segment(diffseg.aggregate(diffseg.regions_to_maps(bands, [16]))[0], 16, threshold=0.5)
    assert by_area.flatten().bincount().tolist() == [176, 64, 16], "labels are numbered by falling area"


def test_diffseg_anchors_are_centred():
    """An off-by-one in the step or the start moves the grid: 64 and 16 give 1, 5, …, 61; 16 and 16 every pixel."""
    assert (diffseg.anchors(64, 16)[:16] - 64).tolist() == list(range(1, 62, 4))
    assert diffseg.anchors(16, 16).tolist() == diffseg.anchors(16, 32).tolist() == list(range(256))
    assert diffseg.anchors(7, 1).tolist() == [24]
    for S in range(16, 65):  # 224 px pictures have S = 28, where a step rounded down would see the middle third alone
        line = diffseg.anchors(S, 16)[:16] % S
        assert line.diff().min() > 0 and max(line[0], S - 1 - line[-1]) <= -(-S // 16)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.float64, 1e-13)])
def test_diffseg_divergence_is_the_definition(dtype, tolerance):
    """Two matrix products in place of the sum over elements: a lost ½ or a swapped argument shows here; zeros stay finite."""
    p, q = (torch.softmax(4 * noise(n, 256), 1) for n in (9, 12))
    want = torch.tensor(plain_kl(p.numpy()[:, None, None], q.numpy()[None, :, None]))
    torch.testing.assert_close(diffseg.divergence(p.to(dtype), q.to(dtype)).double(), want, rtol=tolerance, atol=tolerance)
    one_hot = torch.eye(4, dtype=dtype)
    assert torch.isfinite(diffseg.divergence(one_hot, one_hot)).all()


def test_diffseg_aggregate_rows_sum_to_one():
    """Any set of sides, also those that do not divide the largest, and low precision: every row of A stays a distribution."""
    for sides, dtype in (([8, 4, 2], torch.float32), ([10, 5, 3], torch.float64), ([6, 4], torch.bfloat16)):
        maps = [torch.softmax(3 * torch.randn(2, 2, s * s, s * s), -1).to(dtype) for s in sides]
        A = diffseg.aggregate(maps)
        assert A.shape == (2, max(sides)**2, max(sides)**2) and A.dtype == torch.promote_types(dtype, torch.float32)
        assert (A >= 0).all() and torch.allclose(A.sum(2), torch.ones_like(A[..., 0]), atol=1e-5)


def test_diffseg_streamed_maps_equal_a_list_and_any_batch():
    """The running sums must not mix images, and must not write into the caller's maps."""
    maps = [torch.softmax(torch.randn(3, 2, s * s, s * s, dtype=torch.float64), -1) for s in (4, 8, 4)]
    kept = [m.clone() for m in maps]
    together, total = diffseg.aggregate(maps), diffseg.Aggregator()
    for m in maps:
        total.append(m)
    assert torch.equal(total.result(), together) and all(torch.equal(m, k) for m, k in zip(maps, kept))
    for i in range(3):
        torch.testing.assert_close(diffseg.aggregate([m[i:i + 1] for m in maps])[0], together[i], rtol=0, atol=1e-15)
    skipping = diffseg.Aggregator(skip=2)
    for m in maps:
        skipping.append(m)
    torch.testing.assert_close(skipping.result(), maps[2].mean(1), rtol=0, atol=1e-15)


def test_diffseg_label_gives_ties_to_the_first():
    """Equal masks, in one block of 32 and across two: the lower number wins, so that labels do not depend on the block."""
    masks = torch.zeros(40, 4, 4)
    masks[3, :2], masks[35, :2], masks[36, 2:], masks[38, 2:] = 1, 1, 2, 2
    assert diffseg.label(masks, 4).tolist() == [[3] * 4] * 2 + [[36] * 4] * 2


def test_diffseg_refuses_what_it_cannot_merge():
    """A message for a person, not a NaN mask or an index error."""
    A = torch.full((16, 16), 1 / 16)
    for grid, threshold in ((0, 0.1), (4, 0.0), (4, [0.1, 0.2])):
        with pytest.raises(UserError):
            diffseg.merge(A, grid, threshold)
    with pytest.raises(UserError, match="square"):
        diffseg.aggregate([torch.rand(1, 2, 12, 12)])


def small_unet():
    from unet import CROSS, UNet, UNetConfig
    torch.manual_seed(0)
    return UNet(UNetConfig(block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=12, attention_head_dim=2,
                           norm_num_groups=4, down_block_types=(CROSS, CROSS))).eval().requires_grad_(False)


def test_unet_attention_maps_leave_the_output_alone():
    """Explicit attention (with maps) and SDPA (without) are one function: a forgotten scale would segment another network."""
    net, t, maps = small_unet().double(), torch.tensor([300, 7]), []
    z, c = torch.randn(2, 4, 8, 8).double(), torch.randn(2, 1, 12).double()
    torch.testing.assert_close(net(z, t, c, maps=maps), net(z, t, c), rtol=0, atol=1e-12)
    assert [tuple(m.shape) for m in maps] == [(2, 2, hw, hw) for hw in (64, 16, 16, 16, 16, 64, 64)]
    assert all(torch.allclose(m.sum(-1), torch.ones(()).double()) for m in maps)


def test_diffseg_of_an_image_does_not_depend_on_its_batch():
    """An image alone and in a batch: the same A, the same labels, whatever its neighbours are."""
    net, z, c = small_unet().double(), torch.randn(3, 4, 8, 8).double(), torch.randn(3, 1, 12).double()
    attend = lambda i: (total := diffseg.Aggregator(), net(z[i], torch.full((len(z[i]),), 300), c[i], maps=total))[0].result()
    together = attend(slice(0, 3))
    for i in range(3):
        alone = attend(slice(i, i + 1))[0]
        torch.testing.assert_close(alone, together[i], rtol=0, atol=1e-12)
        threshold = diffseg.divergence(alone, alone).quantile(0.3).item()
        assert torch.equal(diffseg.segment(alone, 16, 8, threshold), diffseg.segment(together[i], 16, 8, threshold))


# ---- evaluate.py: segmentation --------------------------------------------------------------------------------------------


def test_otsu_maximises_the_variance_between_classes():
    """Against the definition, over all 256 thresholds; an off-by-one in the cumulated counts moves the threshold."""
    rng = np.random.default_rng(0)
    x = np.r_[rng.normal(70, 12, 900), rng.normal(160, 25, 2000)].clip(0, 255).astype(np.uint8)
    spread = np.zeros(256)
    for t in range(x.min(), x.max()):
        low, high = x[x <= t], x[x > t]
        spread[t] = len(low) * len(high) * (low.mean() - high.mean())**2
    assert evaluate.otsu(x) == int(np.argmax(spread))
    assert evaluate.otsu(np.full((4, 4), 7, np.uint8)) in range(256), "one grey value alone must not divide by zero"


def lungs_of(size=32):
    left, right = np.zeros((2, size, size), bool)
    left[8:24, 4:12], right[8:24, 20:28] = True, True
    return np.stack([left, right])


def test_selection_takes_one_candidate_a_lung_and_suppresses_the_rest():
    """Half-lungs must not add up to a lung (that would reward oversegmentation), and one segment may serve both lungs."""
    truth = lungs_of()
    labels = np.where(truth[0], 1, np.where(truth[1], 2, 0))
    pick = lambda labels: evaluate.select(evaluate.candidates(labels), truth.reshape(2, -1))
    chosen, dice = pick(labels)
    assert dice == 1 and np.array_equal(chosen.reshape(32, 32), truth.any(0))
    assert pick(np.where(truth.any(0), 1, 0))[1] == 1, "both lungs under one label"
    labels[16:24, 4:12] = 3  # the left lung in two halves: one of them is lost
    assert pick(labels)[1] == pytest.approx(2 * 0.75 / 1.75)
    whole = truth.any(0) | (np.indices((32, 32))[0] > 20)
    chosen = evaluate.select(np.stack([truth[0], whole]).reshape(2, -1).astype(np.float32), truth.reshape(2, -1))[0]
    assert np.array_equal(chosen, truth[0].ravel()), "what overlaps the best is suppressed, whatever it would serve"
    assert pick(np.zeros((32, 32), int))[1] == pytest.approx(2 * 0.25 / 1.25), "the whole picture is a candidate too"


def test_oracle_is_never_beaten_by_the_rule_where_segments_are_lungs():
    """The rule sees the picture alone: dark ellipses in a bright body, one segment each, are found without a mask."""
    truth = lungs_of(64 // 2)
    image = np.where(truth.any(0), 60, 180).astype(np.uint8)
    image[:3], image[-3:] = 0, 0  # darker than the lungs, but where no lung can be
    labels = np.where(truth[0], 1, np.where(truth[1], 2, np.where(image == 0, 3, 0)))
    chosen, belief = evaluate.select(evaluate.candidates(labels), evaluate.expected_lungs(image).reshape(2, -1))
    assert np.array_equal(chosen.reshape(32, 32), truth.any(0)) and 0 < belief < 1
    assert np.array_equal(evaluate.otsu_lungs(image), truth.any(0)), "the rim is darker, but it is left out"


def test_stored_attention_is_read_again_and_recomputed_alike(tmp_path):
    """A killed run must go on: stored maps are read, not computed; a missing one is made again, alone as in its batch."""
    import dinodiff
    from vae import VAE, VAEConfig
    net, images = small_unet(), torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    vae = VAE(VAEConfig(block_out_channels=(8, 8, 8), layers_per_block=1, norm_num_groups=4)).eval().requires_grad_(False)
    run = dinodiff.Run(tmp_path, {}, 32, 5, net, vae, nn.Identity(), dinodiff.Schedule(), torch.device("cpu"))
    sweep, settings = evaluate.Sweep("net", lambda step: run, [5], torch.randn(1, 12)), evaluate.SegmentSettings(noise=True)
    first = evaluate.stored_attention(sweep, run, images, 300, settings)
    assert first.shape == (3, 64, 64) and torch.allclose(first.sum(2), torch.ones(3, 64), atol=1e-5)
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert len(files) == 3
    files[0].unlink()
    torch.testing.assert_close(evaluate.stored_attention(sweep, run, images, 300, settings), first, rtol=0, atol=2e-5)
    run.unet.forward = None  # whatever would compute now fails
    assert evaluate.stored_attention(sweep, run, images.flip(0), 300, settings).shape == first.shape
    with pytest.raises(TypeError):
        evaluate.stored_attention(sweep, run, images, 299, settings)


# ---- evaluate.py ------------------------------------------------------------------------------------------------------------


ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE), str(Path(data.__file__).parent)])}


def filled(model):
    """Deterministic weights that no random generator's version can change: uniforms of (tensor number, element)."""
    state = model.state_dict()
    for i, (key, tensor) in enumerate(state.items()):
        u = torch.from_numpy(data.uniforms(max(tensor.numel(), 1), i)).view(tensor.shape)
        if key.endswith("running_var"):
            state[key] = 0.5 + u
        elif tensor.is_floating_point():
            scale, centre = 2 if tensor.ndim < 2 else 4 / tensor[0].numel() ** 0.5, ".norm" in key and key.endswith("weight")
            state[key] = (u - 0.5) * scale + centre
    model = model.double().eval()
    model.load_state_dict(state)
    return model


def xray_input(channels, size=48):
    return torch.from_numpy(data.uniforms(2 * channels * size * size, 99)).view(2, channels, size, size) * 2 - 1


def small_torchvision():
    warnings.filterwarnings("ignore")
    pytest.importorskip("torchvision", reason="torchvision is not installed; the golden numbers stand in for it")
    from torchvision.models.densenet import DenseNet
    return DenseNet(growth_rate=8, block_config=(2, 3), num_init_features=16, num_classes=5)


def test_densenet_equals_torchvision():
    """A forgotten ReLU before pooling, a BN with another eps, or a wrong order of the concatenation."""
    theirs = filled(small_torchvision())
    ours = evaluate.DenseNet(5, 3, growth=8, blocks=(2, 3), width=16).double().eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = xray_input(3)
    with torch.no_grad():
        assert (ours(x) - theirs(x)).abs().max() < 1e-9
        assert (ours.embed(x) - F.adaptive_avg_pool2d(F.relu(theirs.features(x)), 1).flatten(1)).abs().max() < 1e-9


def test_densenet_121_equals_torchvision_at_full_size():
    """The same on the published network: four blocks, three transitions, 1024 features."""
    pytest.importorskip("torchvision", reason="torchvision is not installed; the golden numbers stand in for it")
    from torchvision.models import densenet121
    theirs = filled(densenet121(weights=None))
    ours = evaluate.DenseNet(1000, 3).double().eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = xray_input(3, 64)
    with torch.no_grad():
        assert (ours(x) - theirs(x)).abs().max() < 1e-9
        assert (ours.embed(x) - F.relu(theirs.features(x)).mean((2, 3))).abs().max() < 1e-9
    assert ours.embed(x).shape == (2, 1024)


def test_densenet_golden_numbers():
    """The same where torchvision is missing. From torchvision 0.28's DenseNet(8, (2, 3), 16, num_classes=5), `filled`."""
    model = filled(evaluate.DenseNet(5, 3, growth=8, blocks=(2, 3), width=16))
    with torch.no_grad():
        logits, features = model(xray_input(3)), model.embed(xray_input(3))
    assert np.allclose(logits[0], GOLDEN_LOGITS, rtol=0, atol=1e-9)
    assert np.allclose(features[1, ::8], GOLDEN_FEATURES, rtol=0, atol=1e-9)


GOLDEN_LOGITS = [-0.343169113301, 2.004951455602, 1.383534050829, -2.950913723492, -3.318108862813]
GOLDEN_FEATURES = [0.0, 0.072746576747, 0.962209321205, 0.943130744586, 0.0]


def test_densenet_has_the_public_keys_and_shapes():
    """A renamed module: the public weights would not load."""
    state = evaluate.DenseNet(18).state_dict()
    assert len(state) == 727
    assert state["features.conv0.weight"].shape == (64, 1, 7, 7)
    assert state["features.denseblock4.denselayer16.conv2.weight"].shape == (32, 128, 3, 3)
    assert state["features.transition3.conv.weight"].shape == (512, 1024, 1, 1)
    assert state["features.norm5.running_var"].shape == (1024,) and state["classifier.weight"].shape == (18, 1024)
    layout = HERE.parent / "shared/layouts/xrv-densenet121.json"
    if layout.is_file():
        import json
        assert {k: list(v.shape) for k, v in state.items()} == json.loads(layout.read_text())


# A module whose class this process knows and the reader must not need: pickled whole, as the public file is.
class PickledNet(nn.Module):
    def __init__(self):
        super().__init__()
        inner = evaluate.DenseNet(4, 1, growth=4, blocks=(2, 2), width=8)
        self.features, self.classifier, self.pathologies = inner.features, inner.classifier, ["A", "B"]
        self.op_threshs = None


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"echo owned > {self.path}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_module_gives_its_tensors(tmp_path, zipped):
    """The public DenseNet is a pickled module: each tensor must come out equal, with no import of the module's class."""
    model = PickledNet()
    model.features.norm0.running_mean += torch.arange(8.0)
    torch.save(model, tmp_path / "model.pt", _use_new_zipfile_serialization=zipped)
    read = evaluate.read_pickled_tensors(tmp_path / "model.pt")
    assert read.keys() == model.state_dict().keys() and all(torch.equal(read[k], v) for k, v in model.state_dict().items())
    ours = evaluate.DenseNet.from_pretrained(tmp_path / "model.pt")
    assert len(ours.classifier.bias) == 4 and ours.features.denseblock2.denselayer2.conv2.weight.shape == (4, 16, 3, 3)
    ours.save_pretrained(tmp_path / "safe")
    again = evaluate.DenseNet.from_pretrained(tmp_path / "safe")
    assert all(torch.equal(again.state_dict()[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("zipped", [True, False])
def test_hostile_pickle_runs_nothing(tmp_path, zipped):
    """A weights file that calls os.system when unpickled: the file must be read (or refused) and the command never run."""
    owned = tmp_path / "owned"
    state = OrderedDict(a=torch.arange(6.0)[::2], bad=Hostile(owned))
    torch.save(state, tmp_path / "model.pt", _use_new_zipfile_serialization=zipped)
    assert torch.equal(evaluate.read_pickled_tensors(tmp_path / "model.pt")["a"], torch.tensor([0.0, 2.0, 4.0]))
    assert not owned.exists()
    torch.load(tmp_path / "model.pt", weights_only=False)  # the file is as dangerous as claimed
    assert owned.exists()


def test_damaged_pickles_are_refused(tmp_path):
    """A download cut short must give a sentence, not a traceback, and never half the weights."""
    for zipped in (True, False):
        torch.save(PickledNet(), tmp_path / "whole.pt", _use_new_zipfile_serialization=zipped)
        content = (tmp_path / "whole.pt").read_bytes()
        for cut in (0, 7, len(content) // 2, len(content) - 40):
            (tmp_path / "cut.pt").write_bytes(content[:cut])
            with pytest.raises(UserError):
                evaluate.read_pickled_tensors(tmp_path / "cut.pt")


# ---- Distances


def gaussians(d=12, n=400, seed=0):
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(n, d, generator=g, dtype=torch.float64) @ torch.randn(d, d, generator=g, dtype=torch.float64)
    b = torch.randn(n + 50, d, generator=g, dtype=torch.float64) @ torch.randn(d, d, generator=g, dtype=torch.float64) + 0.3
    return a, b


def test_frechet_distance_equals_sqrtm_and_closed_forms():
    """eigvalsh of the unsymmetric product, a lost factor 2, or a root taken element by element."""
    import scipy.linalg
    a, b = gaussians()
    m1, m2, c1, c2 = a.mean(0), b.mean(0), a.T.cov(), b.T.cov()
    root = scipy.linalg.sqrtm((c1 @ c2).numpy()).real
    expected = float((m1 - m2).square().sum() + c1.trace() + c2.trace()) - 2 * np.trace(root)
    assert abs(evaluate.frechet_distance(m1, c1, m2, c2) - expected) < 1e-8 * expected
    same = evaluate.frechet_distance(m1.numpy(), c1.numpy(), m2.numpy(), c1.numpy())
    assert abs(same - float((m1 - m2).square().sum())) < 1e-9
    d1, d2 = torch.rand(12).double() + 0.1, torch.rand(12).double() + 0.1
    assert abs(evaluate.frechet_distance(m1, d1.diag(), m1, d2.diag()) - float((d1.sqrt() - d2.sqrt()).square().sum())) < 1e-10
    assert abs(evaluate.frechet_distance(m1, c1, m1, 4 * c1) - float(c1.trace())) < 1e-9 * float(c1.trace())


def test_frechet_distance_of_singular_covariances():
    """Fewer images than dimensions: no NaN from a failed root or from eigenvalues just below 0."""
    import scipy.linalg
    a, b = gaussians(d=30, n=12)
    c1, c2 = a.T.cov(), b[:9].T.cov()
    assert evaluate.frechet_distance(a.mean(0), c1, a.mean(0), c1) < 1e-6 * float(c1.trace())
    jitter = 1e-9 * torch.eye(30)
    root = scipy.linalg.sqrtm(((c1 + jitter) @ (c2 + jitter)).numpy()).real
    expected = float((a.mean(0) - b[:9].mean(0)).square().sum() + c1.trace() + c2.trace()) - 2 * np.trace(root)
    assert abs(evaluate.frechet_distance(a.mean(0), c1, b[:9].mean(0), c2) - expected) < 1e-3 * expected


def test_moments_stream_to_the_same_mean_and_covariance():
    """Biased covariance, float32 sums, or blocks that lose rows."""
    a, _ = gaussians()
    moments = evaluate.Moments(12, blocks=4)
    for start in range(0, len(a), 64):
        moments.add(a[start:start + 64], torch.arange(start, min(start + 64, len(a))) % 4)
    mean, cov = moments.mean_cov()
    assert torch.allclose(mean, a.mean(0), atol=1e-12) and torch.allclose(cov, a.T.cov(), atol=1e-10)
    mean, cov = moments.mean_cov(torch.tensor([0, 2, 0, 1]))
    twice = torch.cat([a[1::4], a[1::4], a[3::4]])
    assert torch.allclose(mean, twice.mean(0), atol=1e-12) and torch.allclose(cov, twice.T.cov(), atol=1e-10)


def test_nan_features_are_refused():
    """One NaN would make every later distance NaN, or worse, be clipped away."""
    with pytest.raises(UserError, match="1 of 4 images"):
        evaluate.Moments(3).add(torch.tensor([[1.0, 2, 3], [float("nan"), 2, 3], [1, 2, 3], [0, 0, 0]]))
    with pytest.raises(UserError, match="NaN"):
        evaluate.kernel_distance(np.full((4, 2), np.nan), np.ones((4, 2)))
    with pytest.raises(UserError, match="dimensions"):
        evaluate.prdc(np.ones((9, 2)), np.ones((9, 3)))


RANKS = """
import sys, torch, torch.distributed as dist, evaluate
rank, world = int(sys.argv[1]), int(sys.argv[2])
dist.init_process_group("gloo", init_method=sys.argv[3], rank=rank, world_size=world)
a = torch.randn(101, 6, generator=torch.Generator().manual_seed(0))
m = evaluate.Moments(6, 3)
rows = torch.arange(101)[rank::world]
m.add(a[rows], rows % 3)
m.merge()
print(repr(evaluate.frechet_distance(*m.mean_cov(), torch.zeros(6), torch.eye(6))))
dist.destroy_process_group()
"""


def test_one_rank_equals_two(tmp_path):
    """Images counted twice or not at all when the work is shared."""
    values = []
    for world in (1, 2):
        start = lambda k: subprocess.Popen([sys.executable, "-c", RANKS, str(k), str(world), f"file://{tmp_path}/{world}"],
                                           env=ENV, text=True, stdout=subprocess.PIPE)
        started = [start(rank) for rank in range(world)]
        values += [float(process.communicate(timeout=120)[0]) for process in started]
    assert len(values) == 3 and np.ptp(values) < 1e-9


def test_kernel_distance_equals_the_double_loop():
    """The diagonal left in (a biased estimate), or a kernel without its 1/d."""
    a, b = gaussians(d=5, n=40)
    k = lambda x, y: float(x @ y / 5 + 1) ** 3
    n, m = len(a), len(b)
    expected = sum(k(a[i], a[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    expected += sum(k(b[i], b[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    expected -= 2 * sum(k(x, y) for x in a for y in b) / (n * m)
    assert abs(evaluate.kernel_distance(a, b) - expected) < 1e-9 * abs(expected)


def test_kernel_distance_error_is_the_spread_of_repeated_draws():
    """A standard error of the subsets' mean, which shrinks with the number of subsets, instead of the estimate's own."""
    g = torch.Generator().manual_seed(1)
    noise = lambda n: torch.randn(n, 4, generator=g)
    draws = [evaluate.kernel_distance(noise(80), noise(60) + 0.7, with_error=True) for _ in range(300)]
    spread, claimed = np.std([d for d, _ in draws]), np.mean([e for _, e in draws])
    assert 0.8 < claimed / spread < 1.25


def test_kernel_distance_of_pairs_from_one_law_is_zero_on_average():
    """Reconstructions resemble their sources: with those pairs left in the cross mean, KID falls far below zero."""
    g = torch.Generator().manual_seed(1)
    draw = lambda: torch.randn(80, 8, generator=g)
    found = []
    for _ in range(60):
        shared = draw()
        found.append(evaluate.kernel_distance(shared + 0.2 * draw(), shared + 0.2 * draw(), with_error=True, paired=True))
    values, errors = np.array(found).T
    assert abs(values.mean()) < 4 * values.std() / 60**0.5 and 0.5 < errors.mean() / values.std() < 2


def test_prdc_equals_its_definition():
    """A radius that counts the image itself as its neighbour, or recall and precision exchanged."""
    g = torch.Generator().manual_seed(2)
    real, fake, k = torch.randn(60, 3, generator=g).double(), torch.randn(45, 3, generator=g).double() * 0.7 + 0.3, 4
    d = lambda x, y: float((x - y).square().sum().sqrt())
    radius = lambda s: [sorted(d(x, y) for j, y in enumerate(s) if j != i)[k - 1] for i, x in enumerate(s)]
    rr, rf = radius(real), radius(fake)
    inside = [[d(x, y) < rr[i] for i, x in enumerate(real)] for y in fake]
    recall = np.mean([any(d(x, y) < rf[j] for j, y in enumerate(fake)) for x in real])
    expected = {"precision": np.mean([any(row) for row in inside]), "recall": recall,
                "density": np.sum(inside) / (k * len(fake)), "coverage": np.mean([any(col) for col in zip(*inside)])}
    assert evaluate.prdc(real, fake, k) == pytest.approx(expected, abs=1e-12)
    same = evaluate.prdc(real, real, k)
    assert same["precision"] == same["recall"] == same["coverage"] == 1


def test_bootstrap_error_is_the_spread_of_repeated_draws():
    """An interval from resampled images of the same patients, or from one side alone."""
    g = torch.Generator().manual_seed(3)

    def draw():
        pair = [evaluate.Moments(3, 50), evaluate.Moments(3, 50)]
        for moments, shift in zip(pair, (0, 0.8)):
            moments.add(torch.randn(300, 3, generator=g) + shift, torch.arange(300) % 50)
        return pair

    values = [evaluate.frechet_distance(*a.mean_cov(), *b.mean_cov()) for a, b in (draw() for _ in range(150))]
    claimed = np.mean([evaluate.bootstrap_error(*draw(), resamples=60, seed=i) for i in range(10)])
    assert 0.7 < claimed / np.std(values) < 1.4


# ---- Classification: pairs, subsets, statistics


def toy_labels(n=40, seed=0):
    rng = np.random.default_rng(seed)
    targets = (rng.random((n, 4)) < 0.3).astype(np.float32)
    targets[np.arange(n), rng.integers(0, 4, n)] = 1
    return targets, np.arange(n) % 5


def test_pairs_share_a_label_and_repeat_only_when_all_are_used():
    """Pairs without a common finding, an image paired with itself, or repeats too early or with the same r."""
    targets, fold = toy_labels()
    wanted = {k: 900 for k in range(5)}
    pairs = evaluate.interpolation_pairs(targets, fold, wanted, seed=1)
    assert all(i != j and (targets[i] * targets[j]).sum() > 0 and 0 <= r <= 1 for i, j, r in pairs)
    admissible = sum((targets[i] * targets[j]).sum() > 0 for i in range(40) for j in range(i + 1, 40))
    assert len(pairs) > admissible  # so some had to come again
    assert len({frozenset(p[:2]) for p in pairs[:admissible]}) == admissible
    again = {}
    for i, j, r in pairs:
        again.setdefault(frozenset((i, j)), set()).add(r)
    assert sum(map(len, again.values())) == len(pairs)
    assert pairs == evaluate.interpolation_pairs(targets, fold, wanted, seed=1)
    assert pairs != evaluate.interpolation_pairs(targets, fold, wanted, seed=2)


def test_smaller_ratios_are_beginnings_and_each_training_part_has_enough():
    """1:50 that does not contain 1:10, or a training part that is short of pairs which avoid its validation fold."""
    targets, fold = toy_labels()
    few, many = (evaluate.interpolation_pairs(targets, fold, {k: 32 * ratio for k in range(5)}, seed=3) for ratio in (1, 10))
    assert many[:len(few)] == few
    for k in range(5):
        assert sum(fold[i] != k and fold[j] != k for i, j, _ in many) >= 320
    with pytest.raises(UserError, match="share a finding"):
        evaluate.interpolation_pairs(np.eye(6), np.arange(6) % 3, {k: 5 for k in range(3)}, seed=0)


def test_label_of_a_pair_is_that_of_its_nearer_end():
    """Labels mixed, or taken from the far end."""
    targets = np.array([[1, 1, 0], [1, 0, 1]])
    labels = evaluate.nearer_label(targets, [(0, 1, 0.2), (0, 1, 0.8), (1, 0, 0.2), (0, 0, 0.0)])
    assert labels.tolist() == [[1, 1, 0], [1, 0, 1], [1, 0, 1], [1, 1, 0]]


def test_auc_equals_the_share_of_ordered_pairs():
    """Ties counted as right, or labels with one class counted as 0 or 0.5."""
    rng = np.random.default_rng(0)
    targets, scores = rng.random((30, 3)) < 0.4, rng.integers(0, 6, (30, 3)).astype(float)
    targets[:, 2] = True
    for label in range(2):
        p, n = scores[targets[:, label], label], scores[~targets[:, label], label]
        expected = np.mean([(a > b) + (a == b) / 2 for a in p for b in n])
        assert abs(evaluate.label_aucs(targets, scores)[label] - expected) < 1e-12
    assert np.isnan(evaluate.label_aucs(targets, scores)[2])


def test_paired_tests_equal_scipy_and_a_worked_example():
    """An unpaired test, a one-sided p, or the correction's 1/k forgotten."""
    from scipy import stats
    a, b = [0.71, 0.74, 0.69, 0.73, 0.75], [0.70, 0.70, 0.66, 0.72, 0.71]
    p, corrected = evaluate.paired_tests(a, b, 1 / 4)
    assert abs(p - stats.ttest_rel(a, b).pvalue) < 1e-12
    # By hand: differences .01 .04 .03 .01 .04, mean .026, s^2 = .00023; t = .026 / sqrt((1/5 + 1/4) .00023) = 2.5556, 4 d.f.
    assert abs(corrected - 2 * stats.t.sf(2.5556, 4)) < 1e-5 and corrected > p
    assert evaluate.paired_tests(a, a, 1 / 4) == (1.0, 1.0)


def test_holm_equals_a_worked_example():
    """Bonferroni for every p, or an adjusted p that falls below a smaller one's."""
    assert evaluate.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert evaluate.holm([0.9, 0.6]) == [1.0, 1.0]


def test_classifier_learns_stops_early_and_keeps_the_best_epoch():
    """Labels shuffled against images, weights of the last and not of the best epoch, or a training that never ends."""
    rng = np.random.default_rng(0)
    images, targets = rng.integers(0, 60, (96, 32, 32)).astype(np.uint8), (rng.random((96, 2)) < 0.5).astype(np.float32)
    shown = np.where(rng.random(targets.shape) < 0.15, 1 - targets, targets)  # one label in seven is wrong: no AUC reaches 1
    images[:, 4:14, 4:28] += (shown[:, :1, None] * 120).astype(np.uint8)
    images[:, 18:28, 4:28] += (shown[:, 1:, None] * 120).astype(np.uint8)
    recipe = evaluate.Classify(epochs=40, batch=16, lr=1e-2, patience=2, stop=4, size=32, growth=4, blocks=(1, 1), width=8)
    net, told = evaluate.fit(recipe, (images[:64], targets[:64]), (images[64:], targets[64:]), 0, torch.device("cpu"))
    assert told["val"] > 0.75
    scores = evaluate.predict(net, images[64:], 32, torch.device("cpu"))
    assert abs(np.mean(evaluate.label_aucs(targets[64:], scores)) - told["val"]) < 1e-6
    assert told["epochs"] == told["best_epoch"] + 4
    with pytest.raises(UserError, match="one class only"):
        evaluate.fit(recipe, (images[:64], targets[:64]), (images[64:70], np.ones((6, 2), np.float32)), 0, torch.device("cpu"))


# ---- Whole commands on a run of random weights


@pytest.fixture(scope="module")
def trial_run(tmp_path_factory):
    """A run folder with two checkpoints of a random UNet, and a labelled folder of phantoms with patients."""
    import dataclasses
    import dinodiff
    from dinodiff import TINY, UNet, UNetConfig, VAE, VAEConfig, ViT, ViTConfig
    root = tmp_path_factory.mktemp("evaluate")
    os.environ["DINODIFF_CACHE"] = str(root / "cache")
    config = dataclasses.replace(
        TINY, size=32, data=str(root / "train"),
        unet_config=UNetConfig(block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=32, attention_head_dim=2,
                               norm_num_groups=8, down_block_types=TINY.unet_config.down_block_types, sample_size=8),
        vae_config=VAEConfig(block_out_channels=(8, 16, 16), layers_per_block=1, norm_num_groups=4, sample_size=32),
        vit_config=ViTConfig(image_size=32, patch_size=8, hidden_size=32, depth=1, heads=2))
    for part, seed, count in (("train", 0, 12), ("test", 1, 60)):
        rows = ["file,patient,labels"]
        (root / part).mkdir()
        for i in range(count):
            image, _, _ = data.render_phantom(seed, i // 2, i % 2, 32)
            data.save_png(root / part / f"{part}{i}.png", image)
            labels = "|".join(name for k, name in enumerate("ABC") if i // (2 + k) % 2)
            rows.append(f"{part}{i}.png,{part}{i // 2},{labels}")
        (root / f"{part}.csv").write_text("\n".join(rows) + "\n")
    torch.manual_seed(0)
    run = root / "run"
    data.write_json(run / "config.json", dataclasses.asdict(config))
    VAE(config.vae_config).save_pretrained(run / "vae")
    ViT(config.vit_config).save_pretrained(run / "vit")
    for step in (10, 20):
        place = dinodiff.checkpoint_folder(run, step)
        UNet(config.unet_config).save_pretrained(place / "unet")
        data.write_json(place / "progress.json", {"step": step})
    yield root
    os.environ.pop("DINODIFF_CACHE")


def command(*arguments, ranks=1):
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "--"] if ranks > 1 else []
    return subprocess.run([sys.executable, *launch, str(HERE / "evaluate.py"), *map(str, arguments)], timeout=280, text=True,
                          capture_output=True, env={**ENV, "DINODIFF_CACHE": os.environ["DINODIFF_CACHE"]})


FAST = ["--steps", "2", "--protocol", "dino", "--micro-batch", "8"]


def test_fid_is_the_same_on_one_rank_and_two_and_picks_the_best(trial_run):
    """Images sampled twice or not at all when the work is shared, seeds that depend on the rank, or a wrong best.json."""
    import json
    found = []
    for ranks in (1, 2):
        done = command("fid", "--run", trial_run / "run", "--data", trial_run / "test", "--count", "15", "--checkpoints", "all",
                       *FAST, "--out", trial_run / f"out{ranks}", ranks=ranks)
        assert done.returncode == 0, done.stderr[-2000:]
        (file,) = (trial_run / f"out{ranks}").glob("fid-*.json")
        found.append(json.loads(file.read_text()))
        assert "images/s" in done.stdout and (trial_run / f"out{ranks}" / "figure3.png").is_file()
    numbers = [[r[k] for part in ("floors", "steps") for r in f[part].values() for k in ("fid", "fid_error", "kid", "coverage")]
               for f in found]
    assert np.allclose(*numbers, rtol=1e-4)
    best = json.loads((trial_run / "run/best.json").read_text())
    assert best["fid"] == min(r["fid"] for r in found[1]["steps"].values()) and best["step"] in (10, 20)


def test_classify_goes_on_where_it_was_killed_and_reuses_its_images(trial_run):
    """Cells computed again, images sampled again for another ratio, or training sets that are not 1:r."""
    import json
    settings = dict(run=str(trial_run / "run"), data=str(trial_run / "test"), sizes=(12,), folds=3, epochs=1, batch=8, size=32,
                    growth=4, blocks=(1, 1), width=8, per_shard=16, steps=2, micro_batch=8, device="cpu",
                    out=str(trial_run / "classify"))
    evaluate.classify(evaluate.Classify(ratios=(1,), **settings))
    cells = sorted((trial_run / "classify/classify").rglob("N*.json"))
    shards = sorted((trial_run / "classify/synthetic").rglob("shard-*.tar"))
    assert len(cells) == 3 * (1 + 2 * 2)
    cells[0].unlink()
    times = {f: f.stat().st_mtime_ns for f in [*cells[1:], *shards[:1]]}
    text = evaluate.classify(evaluate.Classify(ratios=(1, 2), **settings))
    assert all(f.stat().st_mtime_ns == t for f, t in times.items())
    table = json.loads((trial_run / "classify/table1.json").read_text())
    assert len(table["cells"]) == 1 + 2 * 2 * 2 and "| 1 : 2 |" in text and (trial_run / "classify/figure4a.png").is_file()
    for cell in table["cells"]:
        real = [f["train"] for f in table["cells"][0]["folds"]]
        for fold, n in zip(cell["folds"], real):
            wanted = {"real": n, "augment": n * (1 + cell["ratio"]), "synthetic": n * cell["ratio"]}
            assert fold["train"] == wanted[cell["experiment"]]


def test_results_are_kept_for_the_images_patients_labels_and_weights_they_are_of(trial_run, tmp_path):
    """A number measured under an older CSV, or attention maps of an older UNet, served again."""
    import dinodiff
    import shutil
    shutil.copytree(trial_run / "test", tmp_path / "set")
    rows = (trial_run / "test.csv").read_text()
    key = lambda: evaluate.open_trial(evaluate.Common(run=str(trial_run / "run"), data=str(tmp_path / "set"))).key(1)
    found = []
    for text in (rows, rows.replace("|C", ""), rows.replace("test29,", "test28,")):
        (tmp_path / "set.csv").write_text(text)
        found += [key(), key()]
    assert found[::2] == found[1::2] and len(set(found)) == 3
    shutil.copytree(trial_run / "run", tmp_path / "run")
    sweep, images = evaluate.Sweep("this run", None, [20]), torch.randint(0, 256, (2, 32, 32), dtype=torch.uint8)
    maps = []
    for scale in (1.0, 1.0, 1.5):
        run = dinodiff.load_run(tmp_path / "run", 20)
        run.unet.conv_in.weight.mul_(scale)
        maps.append(evaluate.stored_attention(sweep, run, images, 300, evaluate.SegmentSettings()))
    assert torch.equal(maps[0], maps[1]) and not torch.equal(maps[0], maps[2])


def test_an_image_that_cannot_be_read_is_named_and_never_replaced_in_a_measurement(trial_run, tmp_path):
    """Training takes another image instead; a test image would be scored under somebody else's findings."""
    import shutil
    shutil.copytree(trial_run / "test", tmp_path / "set")
    shutil.copy(trial_run / "test.csv", tmp_path / "set.csv")
    for i in range(60):
        (tmp_path / f"set/test{i}.png").write_bytes((tmp_path / f"set/test{i}.png").read_bytes()[:60])
    with pytest.raises(UserError, match=r"test\d+.png.*Each image counts"):
        evaluate.fid(evaluate.Fid(run=str(trial_run / "run"), data=str(tmp_path / "set"), protocol="dino", out=str(tmp_path / "out")))
    with pytest.raises(UserError, match="data.py prepare"):
        data.open_data(str(tmp_path / "*.tar"), 32, labels=str(tmp_path / "set.csv"))


def test_equal_steps_are_equal_and_show_an_image_differently_each_time(monkeypatch):
    """Early stops that end cells of one column at different steps; the same augmented picture many times an epoch."""
    rng, seen = np.random.default_rng(0), []
    monkeypatch.setattr(data, "augment", lambda x, ids, step, seed, augment=data.augment: (
        seen.extend(zip(np.asarray(ids).tolist(), np.broadcast_to(step, len(ids)).tolist())), augment(x, ids, step, seed))[1])
    images, targets = rng.integers(0, 255, (30, 32, 32)).astype(np.uint8), (rng.random((30, 2)) < 0.5).astype(np.float32)
    recipe = evaluate.Classify(epochs=5, batch=8, lr=1e-3, patience=1, stop=1, size=32, growth=4, blocks=(1, 1), width=8)
    for n in (8, 20):
        seen.clear()
        told = evaluate.fit(recipe, (images[:n], targets[:n]), (images[20:], targets[20:]), 0, torch.device("cpu"), 6)[1]
        assert told["steps"] == 30 and len(set(seen)) == len(seen) == 30 * 8


def test_patients_on_both_sides_are_refused_by_name(trial_run):
    """A test set of the generator's own training patients, measured without a word."""
    leak = ["fid", "--run", str(trial_run / "run"), "--data", str(trial_run / "train"), *FAST, "--out", str(trial_run / "leak")]
    with pytest.raises(SystemExit) as end:
        evaluate.main(leak)
    assert all(words in str(end.value) for words in ("found a leak", "patient train", "--as-paper"))
    evaluate.main([*leak, "--as-paper"])
    assert "MARKED" in (trial_run / "leak/fid.md").read_text()


def test_audit_finds_copies(trial_run, tmp_path):
    """A test image that is a training image under another name and patient must be named, and refused."""
    import shutil
    shutil.copytree(trial_run / "test", tmp_path / "set")
    text = (trial_run / "test.csv").read_text()
    for i in range(60):  # wherever the split falls, some test image is a copy
        if i % 3 == 0:
            shutil.copy(trial_run / f"train/train{i % 12}.png", tmp_path / f"set/test{i}.png")
    (tmp_path / "set.csv").write_text(text)
    settings = dict(run=str(trial_run / "run"), data=str(tmp_path / "set"), steps=2, protocol="dino", count=8, micro_batch=8,
                    out=str(tmp_path / "out"))
    with pytest.raises(UserError, match="copies of the generator's training images"):
        evaluate.audit(evaluate.Audit(**settings))
    assert (tmp_path / "out/audit.png").is_file() and "= train" in (tmp_path / "out/audit.md").read_text()
    assert "MARKED" in evaluate.audit(evaluate.Audit(**settings, as_paper=True))


def test_audit_tells_copies_and_obedience_from_chance(trial_run, tmp_path, monkeypatch):
    """A generator that returns its source must score 1 in both; one that returns another image, near 0.5 in obedience."""
    import json
    monkeypatch.setattr(evaluate, "encode_tokens", lambda run, images: images.flatten(1)[:, None].float())
    for turn in (0, 3):
        monkeypatch.setattr(evaluate, "generate_all", lambda run, c, seeds, s: c.roll(turn, 0).byte().view(len(c), 32, 32))
        evaluate.audit(evaluate.Audit(run=str(trial_run / "run"), data=str(trial_run / "test"), protocol="dino", count=12,
                                      out=str(tmp_path / str(turn))))
        results = json.loads((tmp_path / str(turn) / "audit.json").read_text())["results"]
        copies, unseen = results["training images; pixels, 32 px"], results["unseen images; pixels, 32 px"]
        assert copies["own_source"] == (turn == 0) and copies["chance_nearer_than_real"] > 0.99
        if turn:
            assert all(0.2 < r["nearer_to_its_source_than_to_another"] < 0.8 for r in (copies, unseen))
        else:
            assert copies["nearer_to_its_source_than_to_another"] == unseen["nearer_to_its_source_than_to_another"] == 1


def test_audit_and_segment_are_the_same_on_one_rank_and_two(trial_run):
    """Work repeated on every rank, images made twice or left black when it is shared, or ranks that overwrite one another."""
    import json
    for i in range(6):
        image, masks, _ = data.render_phantom(7, i, 0, 32)
        data.save_png(trial_run / f"lungs/images/{i}.png", image)
        data.save_png(trial_run / f"lungs/masks/{i}.png", np.uint8(255 * masks.any(0)))
    commands = {"audit": ["--data", trial_run / "test", "--count", "10", *FAST],
                "segment": ["--data", trial_run / "lungs", "--limit", "5", "--timesteps", "100", "300", "--thresholds", "0.05", "0.5", "--no-maps"]}
    for name, flags in commands.items():
        found = []
        for ranks in (1, 2):
            out = trial_run / f"{name}{ranks}"
            done = command(name, "--run", trial_run / "run", *flags, "--out", out, ranks=ranks)
            assert done.returncode == 0, done.stderr[-2000:]
            found.append(json.loads((out / f"{name}.json").read_text()) | {"settings": None})
        numbers = [[float(v) for v in re.findall(r"\d\.\d+", json.dumps(f))] for f in found]
        assert len(numbers[0]) > 8 and np.allclose(*numbers, atol=2e-2), name


@pytest.mark.parametrize("arguments, words", [
    (["fid", "--run", "nowhere"], "no run folder"),
    (["classify", "--run", "RUN"], "name labelled images"),
    (["fid", "--run", "RUN", "--data", "TEST", "--checkpoint", "7"], "no checkpoint"),
    (["fid", "--run", "RUN", "--data", "TEST", "--protocol", "inception"], "expected auto"),
    (["fid", "--run", "RUN", "--data", "TEST", "--xrv", "nothing.pt", "--protocol", "xrv-224"], "nothing.pt"),
    (["classify", "--run", "RUN", "--data", "TEST", "--sizes", "5000"], "no balanced subset"),
    (["classify", "--run", "RUN", "--data", "TEST", "--strategies", "mix"], "reconstruct")])
def test_bad_input_is_answered_with_a_sentence(trial_run, arguments, words):
    """A traceback, or a silent fallback to something else."""
    with pytest.raises(SystemExit) as end:
        evaluate.main([str({"RUN": trial_run / "run", "TEST": trial_run / "test"}.get(a, a)) for a in arguments])
    assert words in str(end.value)


def test_charts_keep_their_ticks_round_and_their_data_inside(tmp_path):
    """A range of one value, or ticks that do not cover the data."""
    for low, high in ((0, 1), (-0.02, 0.003), (31, 31), (0.47, 0.53), (1e-7, 9e-7), (-5, 12345)):
        ticks = evaluate.nice_ticks(low, high)
        assert ticks[0] <= low + 1e-12 and ticks[-1] >= high - 1e-12 and 2 <= len(ticks) <= 9
    assert evaluate.nice_ticks(0.01, 0.5, log=True) == pytest.approx([0.01, 0.02, 0.05, 0.1, 0.2, 0.5])
    series = {"a": ([1, 2, 3], [1, float("nan"), 2], [0.1, 0.1, 0.1])}
    path = evaluate.plot_lines(tmp_path / "lines.png", series, "title", "x", "y", level=(1.5, "level"))
    path2 = evaluate.plot_bars(tmp_path / "bars.png", {"g": {"a": (-0.2, 0.1, "*")}, "h": {"a": (0.3, None, "")}}, "title", "y")
    assert path.is_file() and path2.is_file()


# ---- The README keeps its word --------------------------------------------------------------------------------------------


def test_readme_names_only_what_exists():
    """The map from paper to code goes stale unless something reads it."""
    text = (HERE / "README.md").read_text()
    names = set(re.findall(r"`(\w+\.py):([\w.]+)`", text))
    assert len(names) > 20
    for file, name in names:
        source = (HERE / file).read_text()
        for part in name.split("."):
            assert re.search(rf"(def|class) {part}\b|^\s*{part}\b.*=", source, re.M), f"README names {file}:{name}"
    tests = set(re.findall(r"`(test_\w+)`", text)) - {"test_all"}
    own = (HERE / "test_all.py").read_text()
    assert tests and all(f"def {name}" in own for name in tests), [n for n in tests if f"def {n}" not in own]


def test_readme_counts_the_lines_of_each_file():
    """The table of files gives their sizes; within a tenth is honest."""
    for file, count in re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", (HERE / "README.md").read_text(), re.M):
        lines = len((HERE / file).read_text().splitlines())
        assert abs(lines - int(count)) <= 0.1 * lines, f"{file} has {lines} lines, the README says {count}"


def test_no_run_time_import_beyond_the_requirements():
    """A stray import works on the author's machine alone."""
    allowed = {"torch", "numpy", "safetensors", "huggingface_hub", "PIL", "scipy", "sklearn", "tqdm", "pydicom"} | set(sys.stdlib_module_names)
    for file in HERE.glob("*.py"):
        if file.name != "test_all.py":
            nodes = [n for n in ast.walk(ast.parse(file.read_text())) if type(n) in (ast.Import, ast.ImportFrom)]
            found = {name.split(".")[0] for n in nodes for name in ([n.module] if type(n) is ast.ImportFrom else [a.name for a in n.names])}
            assert found <= allowed | {p.stem for p in HERE.glob("*.py")}, (file.name, found - allowed)
