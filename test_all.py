"""Every test. The name of a test states a property; its docstring says which bug it would catch.

    python -m pytest test_all.py            all of it, minutes on two cores; what needs a missing library is skipped and says so
    python -m pytest test_all.py -k unet    a part of it

Reference libraries (diffusers, transformers, timm) judge the numbers where they are installed; nothing else needs them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import data
import dinodiff
import unet as unet_file
from data import UserError
from dinodiff import Adam8bit, Schedule, ddim_sample, ddpm_sample
from unet import CROSS, UNet, UNetConfig
from vae import VAE, VAEConfig, VAESettings, train_vae
from vit import DinoSettings, ViT, ViTConfig

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
    down = __import__("vae").Downsample(1)
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
    rows = []
    whole = train_vae(dataclasses.replace(config), settings, batch, tmp_path / "a", log=rows.append)
    assert np.mean([r["l1"] for r in rows[-5:]]) < 0.6 * np.mean([r["l1"] for r in rows[:5]])
    countdown = iter(range(12))
    stops = lambda: next(countdown, None) is None
    assert train_vae(dataclasses.replace(config), settings, batch, tmp_path / "b", should_stop=stops) is None
    assert (tmp_path / "b.training.safetensors").is_file() and not (tmp_path / "b").exists()
    resumed = train_vae(dataclasses.replace(config), settings, batch, tmp_path / "b")
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values()))
    assert whole.config.scaling_factor == resumed.config.scaling_factor != 0.18215
    assert not (tmp_path / "b.training.safetensors").exists()


# ---- Weights files --------------------------------------------------------------------------------------------------------


def small_unet():
    torch.manual_seed(1)
    return UNet(UNetConfig(block_out_channels=(16, 32), down_block_types=(CROSS, "DownBlock2D"), cross_attention_dim=8,
                           attention_head_dim=2, norm_num_groups=4, layers_per_block=1))


@pytest.mark.parametrize("form", ["file", "fp16", "bin", "sharded"])
def test_weights_open_in_every_form_they_are_published_in(tmp_path, form):
    """Half-precision, pickled and sharded files are all on the hub; each must give the same network."""
    net = small_unet()
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
    small_unet().save_pretrained(tmp_path)
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
        launch = [sys.executable] if ranks == 1 else [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--master_port=0"]
        env = os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*launch, "small.py", *args], cwd=folder, env=env, capture_output=True, text=True, timeout=300, **more)
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done
    run("train", "--data", "xrays", "--run", "whole")
    return folder, run


def rows(run: Path, stage: str = "unet") -> list[dict]:
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
    assert [r["step"] for r in rows(run)] == list(range(1, 13))
    assert {"loss", "lr", "grad_norm"} <= rows(run)[0].keys()
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
    assert rows(place) == rows(folder / "whole")


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
    for a, b in zip(rows(folder / "ranks1"), rows(folder / "ranks2")):
        assert abs(a["loss"] - b["loss"]) <= 1e-4 * a["loss"], (a, b)


def test_train_accumulates_micro_batches_into_the_same_gradient(workshop):
    """A loss that is not divided by the number of passes, or noise drawn per pass."""
    folder, run = workshop
    place = begin(folder, "micro")
    run("train", "--data", "xrays", "--run", "micro", "--steps", "2", "--micro-batch", "2")
    for a, b in zip(rows(place), rows(folder / "whole")):
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
    (["--dtype", "fp8", "--run", "fresh"], "expected fp32 or bf16"),
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
    for a, b in zip(rows(folder / "live"), rows(folder / "cached")):
        assert abs(a["loss"] - b["loss"]) < 2e-3, "float16 latents differ by rounding alone"
    done = run("train", "--data", "xrays", "--run", "other", "--steps", "1", "--cache", "stored", check=False)
    assert "made of something else" in done.stderr, done.stderr


def test_help_and_import_are_quick_and_quiet():
    """`--help` shows every setting with its comment."""
    done = subprocess.run([sys.executable, "dinodiff.py", "train", "--help"], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0 and "--micro-batch" in done.stdout and "over all ranks and micro-batches" in done.stdout


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
            found = set(re.findall(r"^\s*(?:from|import) (\w+)", file.read_text(), re.M))
            assert found <= allowed | {p.stem for p in HERE.glob("*.py")}, (file.name, found - allowed)
