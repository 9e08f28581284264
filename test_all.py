"""Every test. The name of a test states a property; its docstring says which bug it would catch.

    python -m pytest test_all.py            all of it, minutes on two cores
    python -m pytest test_all.py -k unet    a part of it

Reference libraries (diffusers, transformers, timm, torchvision) judge the numbers where they are
installed; a test that lacks one is skipped and says so.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import dataclasses
import functools
import gzip
import inspect
import io
import itertools
import json
import lzma
import math
import os
import re
import resource
import runpy
import shlex
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tarfile
import time
import tracemalloc
import warnings
import zipfile
import zlib
from collections import Counter, OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy import ndimage, stats
from torch import nn
from torch.distributed import run as torchrun

import data
import diffseg
import dinodiff
import evaluate
import unet as unet_file
import vae as vae_file
import vit
from data import (FINDINGS, INDEX, Check, Sample, UserError, augment, balanced_subsets, batches,
                  encode, index_folder, load_image, load_tensors, open_data, preprocess,
                  read_json, read_labels, read_weights, render_phantom, save_png, to_model,
                  uniforms, write_json, write_shard, write_weights)
from diffseg import aggregate
from dinodiff import (Adam8bit, SampleSettings, Schedule, checkpoint_folder, checkpoint_steps,
                      ddim_sample, ddpm_sample, encode_tokens, generate, load_run)
from evaluate import (Classify, DenseNet, Fid, candidates, frechet_distance, kernel_distance,
                      open_labelled, prdc, read_pickled_tensors)
from unet import CROSS, PLAIN, UNet, UNetConfig
from vae import VAE, VAEConfig, VAESettings, train_vae
from vit import DinoSettings, ViT, ViTConfig, crops, dino_loss, train_dino


# ==== The networks: UNet, VAE, DiffSeg ===========================================================


HERE = Path(data.__file__).parent
LAYOUTS = HERE.parent / "shared" / "layouts"  # key -> shape of the public checkpoints

# Several levels, ResNets and heads, as the public networks have: smaller ones would hide the traps.
SMALL_UNET = dict(block_out_channels=(32, 64, 96, 96), attention_head_dim=4, cross_attention_dim=24,
                  norm_num_groups=8)
TINY_UNET = UNetConfig(block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=32,
                       attention_head_dim=2, norm_num_groups=4, down_block_types=(CROSS, CROSS))
SMALL_VAE = dict(block_out_channels=(16, 32, 48, 48), norm_num_groups=8)
TINY_VAE = VAEConfig(block_out_channels=(8, 16, 16), layers_per_block=1, norm_num_groups=4)
TINY_VIT = ViTConfig(image_size=32, patch_size=8, hidden_size=32, depth=2, heads=4)
WEIGHTS = "diffusion_pytorch_model.safetensors"
CPU = torch.device("cpu")
ON_CPU = SimpleNamespace(run=SimpleNamespace(device=CPU))


def doubles(*shape) -> torch.Tensor:
    """float64 normal numbers, a function of the shape alone."""
    rng = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, dtype=torch.float64, generator=rng)


def far(a, b) -> float:
    """The largest difference of two tensors."""
    return (a - b).abs().max().item()


def assert_public(shapes: dict, name: str, tensors: int, parameters: int) -> None:
    """Are these the keys and shapes of a public checkpoint?"""
    assert len(shapes) == tensors and sum(map(math.prod, shapes.values())) == parameters
    if LAYOUTS.is_dir():
        assert shapes == json.loads((LAYOUTS / f"{name}.json").read_text())


def change_json(path, **changes) -> None:
    write_json(path, read_json(path) | changes)


@pytest.fixture(autouse=True)
def surroundings(tmp_path, tmp_path_factory, monkeypatch):
    """Each test has an empty working folder, one thread, the seed 0, the cache of this session."""
    torch.set_num_threads(1)  # of small nets two threads wait for each other
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DINODIFF_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def refuses(message: str, function, *arguments, **options) -> None:
    """The call ends with a UserError that matches `message`."""
    with pytest.raises(UserError, match=message or "."):
        function(*arguments, **options)


def started(*command, ranks=1, stderr=subprocess.STDOUT, **environment) -> subprocess.Popen:
    """python COMMAND, or torchrun COMMAND on several ranks, in a group of its own."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    paths = [str(Path(file).parent) for file in (__file__, data.__file__)]
    settings = {"PYTHONPATH": os.pathsep.join([*paths, "."]), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *launch * (ranks > 1), *map(str, command)], text=True,
                            stdout=subprocess.PIPE, stderr=stderr, start_new_session=True,
                            env=os.environ | settings | environment)


def finished(*command, code=0, **options) -> str:
    """The same, to its end, with the exit code `code` -> all that was printed."""
    process = started(*command, **options)
    try:
        printed = process.communicate(timeout=280)[0]
    finally:
        process.kill()
    assert process.returncode == code, printed
    return printed


class HostilePickle:
    """Unpickled, it would make the file `owned`."""

    def __reduce__(self):
        return os.system, ("echo > owned",)


@pytest.fixture
def hub(monkeypatch):
    """Puts a file or folder into the hub's cache, as `hf download` leaves it."""
    for module in ("constants", "file_download.constants", "_snapshot_download.constants"):
        monkeypatch.setattr(f"huggingface_hub.{module}.HF_HUB_CACHE", str(Path("hub").absolute()))

    def add(repository, name, source):
        there = Path("hub", repository, "snapshots", "0" * 40, name)
        there.parent.mkdir(parents=True)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, there)
        data.write_file(f"hub/{repository}/refs/main", "0" * 40)
        return there

    return add


# ---- The UNet ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens, side", [(1, 16), (5, 16), (5, 12)])
def test_unet_equals_diffusers_and_opens_there(tokens, side):
    """Epsilons of the norms, heads, order of cos and sin, padding, GEGLU: all move 1e-9."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers judges the UNet")
    ours = UNet(UNetConfig(**SMALL_UNET | {"attention_head_dim": (2, 4, 4, 8)}))
    ours.save_pretrained(".")
    theirs = diffusers.UNet2DConditionModel.from_pretrained(".").double()
    again = UNet.from_pretrained(".").double()
    assert again.config == ours.config
    inputs = (doubles(2, 4, side, side), torch.tensor([3, 961]), doubles(2, tokens, 24))
    maps = []
    with torch.no_grad():
        expected = theirs(*inputs).sample
        assert far(again(*inputs), expected) < 1e-9
        assert far(again(*inputs, maps), expected) < 1e-9, "asking for maps changes eps"
    assert [m.shape[-1] for m in maps[:3]] == [side**2, side**2, side**2 // 4] and len(maps) == 16
    assert [m.shape[1] for m in maps[::2]] == [2, 4, 4, 8, 4, 4, 4, 2]
    assert all(far(m.sum(-1), 1) < 1e-12 for m in maps)


@pytest.mark.parametrize("make, name, tensors, parameters", [
    (UNet, "sd15-unet", 686, 859_520_964), (VAE, "sd15-vae", 248, 83_653_863),
    (lambda: DenseNet(18), "xrv-densenet121", 727, 7_049_803)])
def test_nets_of_full_size_have_the_public_keys(make, name, tensors, parameters):
    """A renamed module would refuse the public weights."""
    with torch.device("meta"):
        own = {key: list(value.shape) for key, value in make().state_dict().items()}
    assert_public(own, name, tensors, parameters)


def unet_gradients(net, tokens: int, is_compiled=False) -> list:
    """The gradients of the parameters and of c, and the output, of one pass in float64."""
    net.zero_grad()
    c = doubles(2, tokens, 24).requires_grad_()
    run = torch.compile(net, backend="aot_eager", fullgraph=True) if is_compiled else net
    out = run(doubles(2, 4, 8, 8), torch.tensor([10, 900]), c)
    out.square().sum().backward()
    return [*(p.grad.clone() for p in net.parameters()), c.grad, out.detach()]


def assert_same(a: list, b: list) -> None:
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_unet_shortcut_for_one_token_has_the_same_output_and_gradients(monkeypatch):
    """A shortcut that leaves q, k or norm2 out of the graph stops DDP and lets AdamW skip them."""
    net = UNet(UNetConfig(**SMALL_UNET)).double()
    short = unet_gradients(net, 1)
    monkeypatch.setattr(unet_file.TransformerBlock, "attend_one", lambda block, c: block.attn2(
        block.norm2(torch.zeros(len(c), 1, block.norm2.weight.numel()).to(c)), c))
    assert_same(short, unet_gradients(net, 1))


@pytest.mark.parametrize("tokens, is_compiled", [(1, False), (2, False), (1, True)])
def test_unet_gradient_checkpointing_changes_no_gradient(tokens, is_compiled):
    """A block recomputed with other inputs gives other gradients; compiled, it is one graph."""
    levels = dict(block_out_channels=(32, 64), down_block_types=(CROSS, PLAIN), layers_per_block=1)
    net = UNet(UNetConfig(**SMALL_UNET | levels)).double()
    expected = unet_gradients(net, tokens)
    net.gradient_checkpointing = True
    assert_same(unet_gradients(net, tokens, is_compiled), expected)


# ---- The VAE -------------------------------------------------------------------------------------


def test_vae_equals_diffusers_and_opens_there():
    """Padding, 1e-6, one head with biases, the clamp of logvar: any of them moves 1e-9."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers judges the VAE")
    ours = VAE(VAEConfig(**SMALL_VAE, scaling_factor=0.3))
    ours.quant_conv.bias.data[4] = 100  # a logvar that must be clamped
    ours.save_pretrained(".")
    theirs = diffusers.AutoencoderKL.from_pretrained(".").double()
    again = VAE.from_pretrained(".").double()
    assert again.config == ours.config
    z = doubles(2, 4, 8, 6)
    kept = z.clone()
    with torch.no_grad():
        expected = theirs.encode(doubles(2, 3, 64, 48)).latent_dist
        mean, logvar = again.encode(doubles(2, 3, 64, 48))
        assert far(mean, expected.mean) < 1e-9 and far(logvar, expected.logvar) < 1e-9
        assert logvar.max() == 20 and far(again.decode(z), theirs.decode(z).sample) < 1e-9
    assert torch.equal(z, kept), "decode changed its caller's latents"
    refuses("multiples of 8", again.encode, doubles(1, 3, 60, 64))


def test_vae_encoder_pads_bottom_right():
    """Symmetric padding shifts every feature by half a pixel a level."""
    down = vae_file.downsample(1)
    down.conv.weight.data = F.pad(torch.ones(1, 1, 1, 1), (0, 2, 0, 2))  # its window's corner
    down.conv.bias.data.zero_()
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert torch.equal(down(x), x[:, :, ::2, ::2])


def test_vae_opens_files_with_old_attention_names():
    """Both generations of attention names are in the wild, and SD's files lack a scaling factor."""
    ours = VAE(VAEConfig(**SMALL_VAE, scaling_factor=0.3))
    ours.save_pretrained(".")
    state = {}
    for key, value in load_file(WEIGHTS).items():
        for old, new in vae_file.OLD_NAMES.items():
            key = key.replace(f"ons.0.{new}.", f"ons.0.{old}.")
        is_old = "attentions" in key and value.ndim == 2
        state[key] = value[:, :, None, None] if is_old else value  # once 1 x 1 convolutions
    save_file(state, WEIGHTS)
    change_json("config.json", scaling_factor=None)
    opened = VAE.from_pretrained(".")
    assert all(map(torch.equal, opened.parameters(), ours.parameters()))
    assert opened.config.scaling_factor == 0.18215


def largest_activation(function, x) -> int:
    """Elements of the largest tensor that a layer takes or gives in function(x)."""
    sizes = []
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda _, args, out: sizes.extend([args[0].numel(), out.numel()]))
    function(x)
    hook.remove()
    return max(sizes)


def test_vae_works_in_parts_whose_activations_can_be_indexed(monkeypatch):
    """64 pictures of 512 px pass 2**31 elements in one activation: kernels of CUDA refuse them."""
    with torch.device("meta"), torch.no_grad():
        full = VAE()
        assert largest_activation(full.encode, torch.empty(64, 3, 512, 512)) < 2**31
        assert largest_activation(full.decode, torch.empty(64, 4, 64, 64)) < 2**31
    small = VAE(VAEConfig(**SMALL_VAE)).double()
    x = doubles(6, 3, 32, 16)
    with torch.no_grad():
        mean, _ = small.encode(x)
        decoded = small.decode(mean)
        monkeypatch.setattr(vae_file, "LIMIT", 2 * 32 * 33 * 17 + 1)  # room for two images
        assert far(small.encode(x)[0], mean) < 1e-12 and far(small.decode(mean), decoded) < 1e-12
        assert largest_activation(small.decode, mean) == 2 * 32 * 32 * 16
        monkeypatch.undo()
        full = full._parts(torch.empty(64, 3, 512, 512, device="meta"), 1)
        assert {len(part) for part in full} == {16}  # 22, 22 and 20 would be compiled twice


def set_of(folder: Path, name: str, images):
    """A data set of images uint8 (S, S) with the keys name0, name1, …"""
    samples = [Sample(f"{name}{i}", image) for i, image in enumerate(images)]
    write_shard(folder / "a.tar", samples)
    index_folder(folder)
    return open_data(str(folder), len(images[0]))


@pytest.fixture(scope="module")
def nets_waves(tmp_path_factory):
    """A data set of 16 px pictures of waves."""
    y, x = np.mgrid[:16, :16]
    waves = [np.uint8(127 + 120 * np.sin(0.3 * i + 0.4 * x + 0.2 * y)) for i in range(24)]
    return set_of(tmp_path_factory.mktemp("waves"), "wave", waves)


WAVES = VAESettings(steps=30, batch=4, crop=12, lr=5e-3)


def test_vae_training_lowers_the_error_and_restarts_to_equal_weights(nets_waves, monkeypatch):
    """A stage that was killed starts again: weights that depend on more than the seed differ."""
    log = []
    keys = []
    honest = vae_file.generator
    monkeypatch.setattr(vae_file, "generator", lambda *key: keys.append(key) or honest(*key))
    first = train_vae(TINY_VAE, WAVES, nets_waves, "cpu", log.append)
    losses = [row["loss"] for row in log]
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5]) and not first.training
    assert [row["step"] for row in log] == list(range(1, 31))
    assert len(set(keys)) == 30, "each step has noise of its own"
    torch.manual_seed(123)
    again = train_vae(TINY_VAE, WAVES, nets_waves, torch.device("cpu"), log.append)
    other = train_vae(TINY_VAE, replace(WAVES, seed=1), nets_waves, "cpu", log.append)
    assert all(map(torch.equal, first.parameters(), again.parameters()))
    assert first.config == again.config and TINY_VAE.scaling_factor == 0.18215
    assert not torch.equal(other.encoder.conv_in.weight, first.encoder.conv_in.weight)
    with torch.no_grad():
        mean, logvar = first.encode(to_model(nets_waves.read(np.arange(24))))
    sd = (mean.var() + logvar.exp().mean()).sqrt()
    assert 0.8 < first.config.scaling_factor * sd < 1.25, "scaled latents have unit variance"


# ---- Weights files -------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["file", "fp16", "bin", "sharded"])
def test_weights_open_in_every_form_they_are_published_in(form):
    """Half-precision, pickled and sharded files, NET:SUBFOLDER; each gives the same network."""
    net = UNet(TINY_UNET)
    net.save_pretrained("net/unet")
    file = Path("net/unet", WEIGHTS)
    state = load_file(file)
    if form != "file":
        file.unlink()
    if form == "fp16":
        save_file({k: v.half() for k, v in state.items()}, file.with_suffix(".fp16.safetensors"))
    elif form == "bin":
        torch.save(state, file.with_suffix(".bin"))
    elif form == "sharded":
        names = {key: f"{i % 2}.safetensors" for i, key in enumerate(state)}
        for name in ("0.safetensors", "1.safetensors"):
            save_file({k: v for k, v in state.items() if names[k] == name}, file.with_name(name))
        write_json(f"{file}.index.json", {"weight_map": names})
    opened = UNet.from_pretrained({"file": file, "bin": "net:unet"}.get(form, file.parent))
    for a, b in zip(net.parameters(), opened.parameters()):
        assert b.dtype == torch.float32
        assert torch.allclose(a, b, atol=1e-3 if form == "fp16" else 0)


def test_weights_refusals_say_what_was_found_and_what_to_do(monkeypatch):
    """A wrong file names keys and shapes; a pickle with code is not run; a missing hub is told."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    UNet(TINY_UNET).save_pretrained(".")
    Path("cut.safetensors").write_bytes(Path(WEIGHTS).read_bytes()[:5000])
    torch.save({"x": HostilePickle()}, "hostile.bin")
    change_json("config.json", cross_attention_dim=16, layers_per_block=2)
    for source, message in [
            (".", r"(?s)Missing key.*size mismatch.*\[16, 32\].*\[16, 16\]"),
            ("some/model", "some/model"), ("no such place", "no such file or folder"),
            ("cut.safetensors", "damaged"), ("hostile.bin", "hostile.bin")]:
        refuses(message, UNet.from_pretrained, source)
    refuses(f"expected one of {WEIGHTS}", UNet.from_pretrained, ".", subfolder="nothing")
    assert not Path("owned").exists()


def test_weights_load_in_little_more_memory_than_they_take():
    """A second copy of 3.4 GB of weights would not fit beside the first on a small machine."""
    net = UNet(UNetConfig(block_out_channels=(128, 256, 512, 512)))
    net.save_pretrained("net")
    found = finished("-c", "import resource, unet\n"
                     "def peak(): return resource.getrusage(0).ru_maxrss * 1024\n"
                     "before = peak(); net = unet.UNet.from_pretrained('net')\n"
                     "sum(float(p.sum()) for p in net.parameters()); print(peak() - before)")
    assert int(found.split()[-1]) < 1.3 * 4 * sum(p.numel() for p in net.parameters())


ODD = {  # values of a stranger's config.json
    "use_linear_projection": [True], "norm_num_groups": [0, math.nan, 7, 8.0],
    "down_block_types": [["AttnDownBlock2D", PLAIN], 5, [1, 2], [[PLAIN], CROSS]],
    "up_block_types": [["UpBlock2D", "UpBlock2D"]], "in_channels": [[4], True],
    "block_out_channels": [32, [30, 60], [32.0, 64.0], "ab", [], [10**30, 64]],
    "layers_per_block": [10**9, 17, -1], "attention_head_dim": [-8, "8", [8, 8, 8]],
    "scaling_factor": ["0.18", 0, math.nan], "latent_channels": [[4]], "shift_factor": [0.1]}


@pytest.mark.parametrize("field", ODD)
def test_config_json_that_is_damaged_or_odd_is_one_message(field):
    """SD2's projections would load half of the keys; a stranger's file must end in no traceback."""
    is_vae = field in ("scaling_factor", "latent_channels", "shift_factor")
    net = VAE(TINY_VAE) if is_vae else UNet(TINY_UNET)
    net.save_pretrained(".")
    whole = Path("config.json").read_bytes()
    for value in ODD[field]:
        change_json("config.json", **{field: value})
        refuses(f"(?s)config.json: .*{field}", net.from_pretrained, ".")
        Path("config.json").write_bytes(whole)
    for content in (b"", whole[:50], b"[]", b"\x80\x00\xff", b"3"):
        Path("config.json").write_bytes(content)
        refuses("config.json", net.from_pretrained, ".")


# ---- DiffSeg -------------------------------------------------------------------------------------


def plain_kl(p, Y):
    """½(KL(p‖q) + KL(q‖p)) of p (S, S) with each q of Y (…, S, S), element by element."""
    return ((p - Y) * (np.log(p) - np.log(Y))).sum((-2, -1)) / 2


def plain_diffseg(maps, grid, thresholds, size):
    """DiffSeg as published, in loops: maps [(1, heads, side², side²)] -> A (S², S²), labels."""
    sides = [math.isqrt(m.shape[-1]) for m in maps]
    S = max(sides)
    A = 0.0
    for side in set(sides):
        heads = torch.cat([m[0] for m in maps if m.shape[-1] == side**2]).mean(0)
        wide = F.interpolate(heads.view(-1, 1, side, side), (S, S), mode="bilinear").numpy()
        wide = (wide / wide.sum((2, 3), keepdims=True)).reshape(side, side, S, S)
        A = A + wide.repeat(S // side, 0).repeat(S // side, 1) * side / sum(set(sides))
    step = (S - 1) // (grid - 1)
    line = [(S - 1 - step * (grid - 1)) // 2 + step * i for i in range(grid)]
    attns = A.reshape(-1, S, S)
    masks = []
    for i in np.repeat(line, grid) * S + np.tile(line, grid):
        masks.append(attns[plain_kl(attns[i], attns) < thresholds[0]].mean(0))
    for limit in thresholds[1:]:
        proposals = np.stack(masks)
        masks = []
        matched = set()
        for i in range(len(proposals)):
            if i not in matched:
                near = plain_kl(proposals[i], proposals) < limit
                matched |= {i, *np.flatnonzero(near)}
                masks.append(proposals[near].mean(0))
    wide = F.interpolate(torch.tensor(np.stack(masks))[None], (size, size), mode="bilinear")[0]
    return torch.tensor(attns.reshape(S * S, S * S)), wide.argmax(0)


def same_region(regions, side):
    """bool (side², side²): which pixels of regions (S, S), taken at a side, are of one region."""
    step = len(regions) // side
    flat = regions[::step, ::step].flatten()
    return flat[:, None] == flat


def attention_like(sides, seed):
    """Noisy attention over Voronoi regions, float64: [(1, 2 heads, side², side²)], as of a UNet."""
    rng = np.random.default_rng(seed)
    S = max(sides)
    at = torch.tensor(rng.random((5, 2)) * S)
    pixels = torch.cartesian_prod(torch.arange(S), torch.arange(S)).double()
    regions = torch.cdist(pixels, at).argmin(1).view(S, S)
    maps = []
    for side in sides:
        noise = rng.normal(size=(1, 2, side**2, 1)) * rng.normal(size=(1, 2, 1, side**2))
        p = torch.softmax(3.0 * same_region(regions, side) + torch.tensor(noise), -1)
        maps.append(0.85 * p + 0.15 / side**2)
    return maps


@pytest.mark.parametrize("sides, grid, threshold", [
    ([8, 4], 8, 0.05), ([8, 8, 4, 2], 4, 0.2), ([16, 8, 16], 16, 0.05),
    ([16, 8, 8], 5, [0.3, 0.1, 0.5]), ([32, 16, 8, 4], 3, 0.1)])
def test_diffseg_is_the_published_algorithm(sides, grid, threshold):
    """Another anchor grid, weight, order of merging or set of a mean gives other labels."""
    thresholds = threshold if isinstance(threshold, list) else [threshold] * 3
    for seed in range(1 if max(sides) == 32 else 4):
        maps = attention_like(sides, seed)
        A, labels = plain_diffseg(maps, grid, thresholds, 2 * max(sides))
        ours = aggregate(maps)[0]
        torch.testing.assert_close(ours, A, rtol=1e-12, atol=1e-16)
        first = diffseg.divergence(ours[diffseg.anchors(max(sides), grid)], ours)
        for given in (None, first):
            masks = diffseg.merge(ours, grid, threshold, first=given)
            found = diffseg.label(masks, 2 * max(sides))
            assert torch.equal(found, labels), f"seed {seed}"
        assert found.dtype == torch.int64 and len(labels.unique()) > 1


def test_diffseg_recovers_known_regions_and_numbers_them_by_area():
    """Two lungs, a heart and the rest come back exactly, whatever the grid, with k-means or not."""
    regions = torch.zeros(16, 16, dtype=torch.int64)
    regions[4:14, 2:6] = 1
    regions[5:14, 10:14] = 2
    regions[8:12, 6:10] = 3
    near = [same_region(regions, side) + 0.01 for side in (16, 16, 8)]
    A = aggregate([(m / m.sum(1, keepdim=True))[None, None] for m in near])[0]
    for grid in (8, 16, 32):
        for is_refined in (False, True):
            assert torch.equal(diffseg.segment(A, 16, grid, 0.5, is_refined), regions)


def test_diffseg_anchors_are_centred():
    """An off-by-one in the step or the start moves the grid: 64 and 16 give 1, 5, …, 61."""
    assert (diffseg.anchors(64, 16)[:16] - 64).tolist() == list(range(1, 62, 4))
    assert (diffseg.anchors(64, 8)[:8]).tolist() == list(range(0, 64, 9))
    assert diffseg.anchors(16, 16).tolist() == diffseg.anchors(16, 32).tolist() == [*range(256)]
    assert diffseg.anchors(7, 1).tolist() == [24]
    for S in range(16, 65):  # 224 px have S = 28, where a step rounded down sees the middle alone
        line = diffseg.anchors(S, 16)[:16] % S
        assert line.diff().min() > 0 and max(line[0], S - 1 - line[-1]) <= -(-S // 16)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.float64, 1e-13)])
def test_diffseg_divergence_is_the_definition(dtype, tolerance):
    """A lost ½ or a swapped argument shows against the sum over elements; zeros stay finite."""
    p = torch.softmax(4 * doubles(9, 256), 1)
    q = torch.softmax(4 * doubles(12, 256), 1)
    want = torch.tensor(plain_kl(p.numpy()[:, None, None], q.numpy()[None, :, None]))
    found = diffseg.divergence(p.to(dtype), q.to(dtype)).double()
    torch.testing.assert_close(found, want, rtol=tolerance, atol=tolerance)
    one_hot = torch.eye(4, dtype=dtype)
    assert torch.isfinite(diffseg.divergence(one_hot, one_hot)).all()


@pytest.mark.parametrize("sides, dtype", [
    ((8, 4, 2), torch.float32), ((10, 5, 3), torch.float64), ((6, 4), torch.bfloat16)])
def test_diffseg_aggregate_gives_distributions_of_any_batch_and_keeps_its_input(sides, dtype):
    """Sides that do not divide the largest, low precision, several images: rows still sum to 1."""
    maps = [torch.softmax(3 * doubles(3, 2, s * s, s * s), -1).to(dtype) for s in sides]
    kept = [m.clone() for m in maps]
    A = aggregate(maps)
    assert A.shape == (3, max(sides)**2, max(sides)**2) and A.min() >= 0 and far(A.sum(2), 1) < 1e-5
    assert A.dtype == torch.promote_types(dtype, torch.float32)
    assert all(map(torch.equal, maps, kept))
    assert far(aggregate([m[1:2] for m in maps])[0], A[1]) < 1e-6


def test_diffseg_label_gives_ties_to_the_first():
    """Equal masks, in one block of 32 and across two: labels must not depend on the block."""
    masks = torch.zeros(40, 4, 4)
    masks[[3, 35], :2] = 1
    masks[[36, 38], 2:] = 2
    assert diffseg.label(masks, 4).tolist() == [[3] * 4] * 2 + [[36] * 4] * 2


def test_diffseg_refuses_what_it_cannot_merge():
    """A message for a person, not a NaN mask or an index error."""
    A = torch.full((16, 16), 1 / 16)
    for grid, threshold in ((0, 0.1), (4, 0.0), (4, math.nan)):
        refuses("", diffseg.merge, A, grid, threshold)
    refuses("square", aggregate, [torch.rand(1, 2, 12, 12)])


@pytest.fixture
def nets_run():
    """A run of random nets: 32 px, latents of 8 x 8, a scaling factor that makes their SD 1."""
    vae = VAE(replace(TINY_VAE)).eval()
    images = torch.randint(0, 256, (6, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        vae.config.scaling_factor = 1 / vae.encode(to_model(images))[0].std().item()
    unet = UNet(TINY_UNET).eval().requires_grad_(False)
    run = dinodiff.Run(Path(), {"dtype": "fp32", "tokens": "global"}, 32, 1, unet, vae, None,
                       Schedule(), CPU)
    return run, images, torch.randn(6, 1, 32)


def test_diffseg_attention_takes_scaled_latents_and_the_last_maps(nets_run, monkeypatch):
    """Latents of another variance than the UNet was trained on segment worse, silently."""
    run, images, c = nets_run
    seen = []
    monkeypatch.setattr(run.unet, "forward", preceded(
        run.unet.forward, lambda call, *inputs: seen.append(inputs)))
    found = diffseg.attention(run, images, c)
    z0, t, *_ = seen[0]
    assert abs(z0.std() - 1) < 0.01, "the UNet saw latents that are not scaled"
    assert t.tolist() == [300] * 6
    maps = []
    run.unet(z0, t, c, maps)
    torch.testing.assert_close(found, aggregate(maps))
    torch.testing.assert_close(diffseg.attention(run, images, c, 300, 2), aggregate(maps[-2:]))
    for last, found in zip((0, 2, 7), diffseg.attentions(run, images, c, 300, [0, 2, 7])):
        torch.testing.assert_close(found, aggregate(maps[-last:]))


def test_diffseg_of_bf16_weights_is_near_that_of_float32(nets_run):
    """On CUDA the UNet's weights are bfloat16: called outside autocast it stopped every run."""
    run, images, c = nets_run
    exact = diffseg.attention(run, images, c)
    run.config["dtype"] = "bf16"
    for net in (run.unet, run.vae):
        dinodiff.cast_products(net)
    found = diffseg.attention(run, images, c)
    assert found.dtype == torch.float32 and far(found, exact) < 0.05 * exact.max()
    diffseg.segment(found[0], 32)


def test_diffseg_command_writes_every_picture_under_its_own_name(nets_run, monkeypatch):
    """Pictures of one name from two patients overwrote each other; old segments stayed."""
    run, images, c = nets_run
    for i in range(2):
        save_png(f"patient{i}/frontal.png", images[i].numpy())
    Path("patient0/notes.txt").write_text("no picture")
    monkeypatch.setattr(dinodiff, "load_run", lambda folder, step, device: run)
    monkeypatch.setattr(dinodiff, "encode_tokens", lambda run, images: c[:1])
    settings = diffseg.SegmentPicture(("patient0", "patient1/frontal.png"), "x", out="out", grid=4,
                                      refine=True)
    diffseg.segment_pictures(settings)
    stems = [str(path).removesuffix("-labels.png") for path in Path("out").glob("*-labels.png")]
    assert len(stems) == 2
    for stem in stems:
        labels = np.asarray(Image.open(f"{stem}-labels.png"))
        assert Image.open(f"{stem}-overlay.png").size == labels.shape == (32, 32)
        masks = [Image.open(f"{stem}-segment-{k:03d}.png") for k in range(labels.max() + 1)]
        masks = np.stack(masks)
        assert np.array_equal(masks.argmax(0), labels) and masks.sum(0).max() == 255
    diffseg.write_segments(Path(stem), images[0].numpy(), np.zeros((32, 32), int))
    assert len(list(Path().glob(f"{stem}-segment-*"))) == 1
    for wrong in ({"timestep": 1000}, {"last": -1}, {"pictures": ("patient0/notes.txt",)}):
        refuses("", diffseg.segment_pictures, replace(settings, **wrong))


# ==== DINO =======================================================================================


VIT_CLASSES = {"vit": "ViT", "vit-pooler": "ViT", "dinov2": "Dinov2",
               "dinov2_with_registers": "Dinov2WithRegisters"}
VIT_SIZES = ((32, 32), (48, 48), (24, 40), (16, 64), (35, 51))  # native, others, no whole patches


def vit_randomised(model):
    """Every weight random and large: ones, zeros and 1e-5 hide what is left out."""
    draw = torch.Generator().manual_seed(0)
    for value in model.state_dict().values():
        noise = torch.randn(value.shape, generator=draw)
        value.copy_(0.3 * noise if value.ndim > 1 else 1 + 0.5 * noise)
    return model.eval()


def vit_of_transformers(layout):
    """The class, a model with random weights, and the class's own options."""
    transformers = pytest.importorskip("transformers", reason="no transformers: no parity with it")
    name = VIT_CLASSES[layout]
    config = getattr(transformers, name + "Config")(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        image_size=32, patch_size=8)
    config._attn_implementation = "sdpa"  # the eager path takes its softmax in float32
    kind = getattr(transformers, name + "Model")
    options = {"add_pooling_layer": layout == "vit-pooler"} if name == "ViT" else {}
    return kind, vit_randomised(kind(config, **options)), options


@torch.no_grad()
def vit_their_tokens(model, x):
    sized = {"interpolate_pos_encoding": True} if type(model).__name__ == "ViTModel" else {}
    out = model(x, **sized)
    pooled = [] if getattr(model, "pooler", None) is None else [out.pooler_output[:, None]]
    tokens = out.last_hidden_state
    return torch.cat([tokens[:, :1], *pooled, tokens[:, 1:]], dim=1)


def vit_shapes(folder):
    return {key: list(value.shape) for key, value in read_weights(folder)[1].items()}


@pytest.mark.parametrize("layout", VIT_CLASSES)
def test_vit_of_transformers_opens_with_equal_tokens_at_any_size_and_saves_back(layout):
    """A wrong name, eps, GELU, token order, pooler, smoothing or precision of the positions."""
    kind, theirs, options = vit_of_transformers(layout)
    theirs.save_pretrained("theirs")
    ours = ViT.from_pretrained("theirs").double()
    assert ours.config.layout == layout.split("-")[0] and ours.config.heads == 4
    assert ours.config.pooler == (layout == "vit-pooler")
    ours.save_pretrained("ours")
    assert vit_shapes("ours") == vit_shapes("theirs")
    again = kind.from_pretrained("ours", attn_implementation="sdpa", **options).double()
    for height, width in VIT_SIZES:
        x = torch.randn(2, 3, height, width, dtype=torch.float64)
        want = vit_their_tokens(theirs.double(), x)
        assert want.shape == ours(x).shape and far(ours(x), want) < 1e-9
        assert far(vit_their_tokens(again, x), want) < 1e-9
    # transformers 5 renames modules in memory; ForImageClassification has a prefix and a head.
    state = {f"{layout[:6]}.{key}": value.half() for key, value in theirs.state_dict().items()}
    torch.save(state | {"classifier.weight": torch.zeros(3, 32)}, "pytorch_model.bin")
    Path("config.json").write_text(theirs.config.to_json_string())
    opened = ViT.from_pretrained(".").state_dict()
    for name, value in ours.float().state_dict().items():
        torch.testing.assert_close(opened[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("registers", [4, 0])
def test_vit_of_timm_opens_with_equal_tokens_at_any_size_and_saves_back(registers):
    """DINOv2-reg4 adds positions to the patches alone, timm's DINOv1 to CLS as well; smoothing."""
    if any(Path(place, "tvshim.py").exists() for place in sys.path):
        __import__("tvshim")
    timm = pytest.importorskip("timm", reason="timm is not installed: no parity with its ViTs")
    args = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=0)
    args |= dict(reg_tokens=4, no_embed_class=True, init_values=1e-5) if registers else {}
    name = "vit_base_patch16_224"
    theirs = vit_randomised(timm.create_model(name, dynamic_img_size=True, **args))
    shown = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.1], "interpolation": "bicubic"}
    config = {"architecture": name, "model_args": args, "pretrained_cfg": shown}
    write_weights("theirs", config, theirs.state_dict(), "model.safetensors")
    ours = ViT.from_pretrained("theirs").double()
    assert ours.config.mean == (0.5, 0.4, 0.3) and ours.config.registers == registers
    assert ours.config.cls_position == (not registers)
    ours.save_pretrained("ours")
    again = timm.create_model("local-dir:ours", pretrained=True, dynamic_img_size=True)
    again = again.eval().double()
    assert again.state_dict().keys() == theirs.state_dict().keys() == ours.state_dict().keys()
    for height, width in VIT_SIZES[:4]:
        x = torch.randn(2, 3, height, width, dtype=torch.float64)
        want = theirs.double().forward_features(x)
        assert far(ours(x), want) < 1e-9 and far(again.forward_features(x), want) < 1e-9


@pytest.mark.parametrize("name, tensors, parameters, config", [
    ("hf-vit-base", 200, 86_389_248, ViTConfig(pooler=True)),
    ("hf-dinov2-base", 223, 86_580_480, ViTConfig("dinov2", 518, 14, layer_scale=True)),
    ("hf-dinov2-reg-base", 224, 86_583_552, ViTConfig(
        "dinov2_with_registers", 518, 14, layer_scale=True, registers=4)),
    ("timm-dinov2-reg4-base", 175, 86_582_016, ViTConfig(
        "timm", 518, 14, layer_scale=True, registers=4, cls_position=False))])
def test_vit_full_size_files_have_the_public_keys(name, tensors, parameters, config):
    """A key too many or too few, or another shape, and the public checkpoint would not open."""
    ViT(config).save_pretrained("net")
    assert_public(vit_shapes("net"), name, tensors, parameters)


def test_vit_sizes_are_found_without_a_config():
    """Layout, sizes and registers have to come from the names and shapes of the tensors."""
    config = ViTConfig("dinov2_with_registers", 56, 14, 128, 3, 2, 3, registers=2, layer_scale=True,
                       eps=1e-6, interpolation="bicubic")
    ViT(config).save_pretrained("a")
    Path("a/model.safetensors").rename("alone.safetensors")
    assert ViT.from_pretrained("alone.safetensors").config == config
    Path("config.json").write_text("{}")
    assert ViT.from_pretrained("alone.safetensors").config == config


def test_vit_of_dinov1_has_the_public_eps():
    """1e-6 instead of 1e-12 changes tokens in the seventh digit and passes every coarse test."""
    ViT(TINY_VIT).save_pretrained(".")
    config = read_json("config.json")
    assert config.pop("layer_norm_eps") == 1e-12
    write_json("config.json", config)
    net = ViT.from_pretrained(".")
    assert net.norm.eps == net.blocks[1].norm2.eps == 1e-12


@pytest.mark.parametrize("odd", [
    {"hidden_size": "32"}, {"patch_size": [8, 8]}, {"num_hidden_layers": 3}, {"embed_dim": 64},
    {"num_attention_heads": 5}, {"num_attention_heads": 4.0}, {"num_attention_heads": -4},
    {"num_attention_heads": 0}, {"layer_norm_eps": "1e-6"}, {"layer_norm_eps": 7},
    {"layer_norm_eps": math.nan}, {"hidden_act": "relu"}, {"model_type": "dinov2"},
    {"model_args": [1]}, {"pretrained_cfg": "x"}, {"image_mean": [1, 2]}, {"image_std": [0, 1, 1]},
    {"image_std": ["a", 1, 1]}, {"resample": 1}, {"resample": 77}, {"interpolation": ["bicubic"]}])
def test_vit_odd_config_is_one_message(odd):
    """A traceback, or a network with other heads or another eps, from a damaged or foreign file."""
    ViT(TINY_VIT).save_pretrained("net")
    change_json("net/config.json", **odd)
    Path("net/preprocessor_config.json").unlink()
    refuses("net is no ViT, or its config.json", ViT.from_pretrained, "net")


def test_vit_other_files_are_refused_with_their_keys():
    """A silent partial load, or a traceback, for another network's file or a damaged one."""
    state = ViT(TINY_VIT).state_dict()
    for wrong, said in (
            ({"conv_in.weight": torch.zeros(3)}, "conv_in.weight"), ({"a": state}, "a"),
            ({k: v for k, v in state.items() if "norm2" not in k}, "blocks.0.norm2.bias"),
            (state | {"pos_embed": torch.zeros(2)}, "is no ViT"),
            (state | {"pos_embed": torch.zeros(1, 17, 0)}, "is no ViT")):
        torch.save(wrong, "a.bin")
        refuses(said, ViT.from_pretrained, "a.bin")


def test_vit_prepare_is_the_encoders_own_and_does_not_overshoot():
    """Another filter, ImageNet's constants for RAD-DINO, [-1, 1] for [0, 1]; beyond black."""
    config = ViTConfig("dinov2", 28, 14, 32, 1, 2, layer_scale=True, eps=1e-6,
                       interpolation="bicubic", mean=(0.53,) * 3, std=(0.26,) * 3)
    ViT(config).save_pretrained(".")
    net = ViT.from_pretrained(".")
    assert net.config == config
    image = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    want = np.asarray(Image.fromarray(image).resize((28, 28), Image.BICUBIC)) / 255
    got = net.prepare(to_model(torch.from_numpy(image)[None])) * 0.26 + 0.53
    assert np.abs(got[0, 1].numpy() - want).max() < 1.01 / 255  # Pillow rounds to 8 bits
    edge = torch.ones(1, 3, 40, 40)  # where bicubic gives values that no film has
    edge[..., 20:] = -1
    assert (net.prepare(edge) * 0.26 + 0.53 - 0.5).abs().max() < 0.5 + 1e-6


def test_vit_attention_is_scaled_softmax_and_global_tokens_come_first():
    """A transposed or unscaled softmax, patches among the global tokens."""
    net = vit_randomised(ViT(replace(TINY_VIT, registers=3, pooler=True))).double()
    x = doubles(2, 3, 24, 32)
    tokens = net(x)
    assert torch.equal(net.global_tokens(x), tokens[:, :5]) and net.config.global_count == 5
    assert torch.allclose(tokens[:, 1], net.pooler(tokens[:, 0]))
    attn = net.blocks[0].attn
    x = doubles(2, 16, 32)
    q, k, v = [part.unflatten(2, (4, 8)).transpose(1, 2) for part in attn.qkv(x).chunk(3, 2)]
    weights = (q @ k.mT / 8**0.5).softmax(-1)
    assert torch.allclose(attn(x), attn.proj((weights @ v).transpose(1, 2).flatten(2)))


# ---- Self-distillation ----

DINO_SHORT = DinoSettings(steps=8, batch=8, out_dim=32, head_hidden=32, head_bottleneck=16,
                          global_size=32, local_size=16)


def dino_discs(count, seed=0, size=32):
    """uint8 (count, size, size): discs of two sizes at random places."""
    u = torch.rand(count, 3, 1, 1, generator=torch.Generator().manual_seed(seed))
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    radius = torch.where(u[:, 2] < 0.5, 4.0, 10.0)
    distance = ((x - size * u[:, 0]) ** 2 + (y - size * u[:, 1]) ** 2).sqrt()
    return (220 * torch.sigmoid(radius - distance) + 20).to(torch.uint8)


@pytest.fixture(scope="module")
def dino_set(tmp_path_factory):
    return set_of(tmp_path_factory.mktemp("discs"), "disc", dino_discs(2000).numpy())


def dino_crops(images, size, scale, jitter, *seed):
    return crops(images, 2, size, scale, jitter, data.generator("cpu", *seed))


def test_dino_crops_are_functions_of_their_seed_and_hide_the_exposure():
    """Crops that are no function of (seed, step), that mirror the heart, or tell the exposure."""
    images = dino_discs(8)
    first, same, other = (dino_crops(images, 16, (0.1, 0.4), 0.4, 3, step) for step in (5, 5, 6))
    assert first.shape == (16, 1, 16, 16) and 0 <= first.min() and first.max() <= 1
    assert torch.equal(first, same) and far(first, other) > 0.1
    assert far(first[:8], first[8:]) > 0.1  # two views of an image are not the same
    dark, _ = dino_crops((images * 0.4).to(torch.uint8), 32, (1.0, 1.0), 0.0, 1).chunk(2)
    whole, _ = dino_crops(images, 32, (1.0, 1.0), 0.0, 1).chunk(2)  # at another exposure
    contrast = dark.std((1, 2, 3)) / whole.std((1, 2, 3))
    assert F.l1_loss(dark, whole) < 0.03 and 0.8 < contrast.min() and contrast.max() < 1.25
    views = (images, whole[:, 0], whole[:, 0].flip(2))
    scores = [np.corrcoef([view[i].flatten() for view in views])[0, 1:] for i in range(8)]
    upright, mirrored = np.mean(scores, axis=0)
    assert upright > 0.9 and mirrored < 0.7


def test_dino_loss_is_the_mean_over_pairs_of_different_views():
    """A pair of one view with itself, another order of views, or a wrong temperature or mean."""
    targets = torch.rand(2 * 3, 5).softmax(1)
    cosines = torch.randn(4 * 3, 5)
    log_q = (cosines / DINO_SHORT.student_temperature).log_softmax(1).view(4, 3, 5)
    want = [-(targets.view(2, 3, 5)[i] * log_q[j]).sum(1).mean()
            for i, j in np.ndindex(2, 4) if i != j]
    assert torch.allclose(dino_loss(targets, cosines, DINO_SHORT), torch.stack(want).mean())


def test_dino_started_again_gives_equal_weights_that_open_in_transformers(dino_set, monkeypatch):
    """A random number that is no function of (seed, step); a trained ViT of no use outside."""
    rows = []
    seeds = []
    monkeypatch.setattr(vit, "crops", preceded(
        crops, lambda call, images, *options: seeds.append(options[-1].initial_seed())))
    first = train_dino(TINY_VIT, DINO_SHORT, dino_set, "cpu", rows.append)
    assert len(set(seeds)) == 8, "each step has crops of its own"
    torch.manual_seed(99)
    again = train_dino(TINY_VIT, DINO_SHORT, dino_set, "cpu", rows.append)
    assert rows[:8] == rows[8:] and [row["step"] for row in rows[:8]] == list(range(1, 9))
    assert all(map(torch.equal, first.state_dict().values(), again.state_dict().values()))
    assert not first.training and not first.cls_token.requires_grad
    first.save_pretrained("vit")
    assert ViT.from_pretrained("vit").config == first.config
    transformers = pytest.importorskip("transformers", reason="no transformers to open our ViT")
    theirs = transformers.ViTModel.from_pretrained("vit", add_pooling_layer=False).eval()
    x = first.prepare(to_model(dino_discs(1)))
    assert torch.allclose(first(x), vit_their_tokens(theirs, x), atol=1e-5)


@pytest.mark.parametrize("stage", ["vae", "vit"])
def test_a_stage_skips_steps_that_are_not_finite_and_ten_in_a_row_stop_it(
        stage, nets_waves, dino_set, monkeypatch):
    """A finite loss with a NaN gradient; a stage of few steps that are all bad: random weights."""
    trainings = {"vae": (vae_file, "vae_loss", train_vae, TINY_VAE, WAVES, nets_waves),
                 "vit": (vit, "dino_loss", train_dino, TINY_VIT, DINO_SHORT, dino_set)}
    module, name, train_net, config, settings, ds = trainings[stage]
    honest = getattr(module, name)
    calls = []

    def loss_with_a_pole(a, b, *rest):
        calls.append(None)
        loss = honest(a, b, *rest)
        return loss + (0 * b.sum()).sqrt() if len(calls) in bad else loss  # the slope of √0

    def train_with(log, steps):
        calls.clear()
        return train_net(config, replace(settings, steps=steps), ds, "cpu", log)

    monkeypatch.setattr(module, name, loss_with_a_pole)
    bad = range(2, 25, 2)  # twelve, never two in a row
    rows = []
    net = train_with(rows.append, 24)
    assert all(p.isfinite().all() for p in net.parameters())
    assert [row["step"] for row in rows if "skipped" in row] == [*bad]
    assert all(math.isfinite(row["loss"]) for row in rows), "the loss alone would not have told"
    for first, steps, last in ((3, 30, 12), (1, 4, 4)):
        bad = range(first, 100)
        log = dinodiff.Log(SimpleNamespace(run_dir="."), stage, steps)
        refuses(f"in a row, up to step {last} .* (wave|disc)[0-9]+, ", train_with, log.write, steps)


def test_dino_learns_to_know_an_image_by_any_view_of_it(dino_set):
    """Collapse, a teacher that never moves, a loss of the wrong sign: no better than untrained."""
    rows = []
    settings = replace(DINO_SHORT, steps=250, batch=32, out_dim=128, head_hidden=64,
                       head_bottleneck=32)
    trained = train_dino(TINY_VIT, settings, dino_set, "cpu", rows.append)
    images = dino_discs(200, seed=1)
    views = dino_crops(images, 32, (0.7, 1.0), 0.3, 7).chunk(2)
    found = []
    for net in (trained, ViT(TINY_VIT).eval()):
        c = [net(view.expand(-1, 3, -1, -1))[:, 0].detach() for view in views]
        a, b = [F.normalize((tokens - tokens.mean(0)) / tokens.std(0), dim=1) for tokens in c]
        nearest = (a @ b.T).argsort(1, descending=True)[:, :10]
        found.append((nearest == torch.arange(200)[:, None]).any(1).float().mean().item())
    assert found[0] > found[1] + 0.1, found
    # Collapse would be an entropy of 0 or ln 128 = 4.85, or a spread of 0.
    assert 0.2 < rows[-1]["teacher_entropy"] < 4.6 and rows[-1]["feature_spread"] > 0.1
    stream = batches(dino_set, 32, 250, 0)  # what the final norm was rescaled to
    last = torch.cat([next(stream)[2] for _ in range(16)])
    tokens = trained(trained.prepare(to_model(last)))[:, 0].detach()
    assert tokens.mean(0).abs().max() < 1e-3 and far(tokens.std(0), 1) < 0.01


# ==== Schedule, samplers, Adam, training, sampling ===============================================


# ---- Schedule and samplers ----


def test_schedule_has_the_published_values():
    """Linear β instead of linear √β, or float32 products: not the noise levels of the weights."""
    alpha_bar = Schedule().alpha_bar
    assert alpha_bar.dtype == torch.float64 and alpha_bar.shape == (1000,)
    assert np.allclose(alpha_bar[[0, 499, 999]], [0.999150, 0.277669, 0.004660], atol=5e-7)
    assert Schedule().timesteps(50)[::49] == [981, 1] and Schedule().timesteps(1)[0] < 1000
    refuses("1 to 1000", Schedule().timesteps, 0)


def wavy_model(zt, t):
    """Some function that depends on both of its arguments."""
    return torch.sin(zt + t.view(-1, 1, 1, 1) / 100)


@pytest.mark.parametrize("steps, eta", [(50, 0.0), (50, 1.0), (7, 0.3), (30, 0.0), (1000, None)])
def test_samplers_and_add_noise_equal_diffusers(steps, eta):
    """DDIM's last step to ᾱ_0, its offset, no clipping, σ(η); DDPM's variance; √ᾱ of another t."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers judges the samplers")
    schedule = Schedule()
    public = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                  clip_sample=False)
    zT = doubles(2, 4, 4, 4)
    noise = torch.Generator().manual_seed(5)
    options = {} if eta is None else {"eta": eta}
    if eta is None:
        theirs = diffusers.DDPMScheduler(**public)
        ours = ddpm_sample(wavy_model, zT, schedule, noise)
    else:
        theirs = diffusers.DDIMScheduler(**public, steps_offset=1, set_alpha_to_one=False)
        ours = ddim_sample(wavy_model, zT, steps, schedule, eta, noise)
    assert far(theirs.alphas_cumprod, schedule.alpha_bar) < 1e-6
    vars(theirs).update(  # theirs are float32
        alphas_cumprod=schedule.alpha_bar, betas=schedule.beta, alphas=1 - schedule.beta,
        one=torch.ones((), dtype=torch.float64), final_alpha_cumprod=schedule.alpha_bar[0])
    theirs.set_timesteps(steps)
    assert theirs.timesteps.tolist() == schedule.timesteps(steps)
    noise.manual_seed(5)
    zt = zT
    for t in theirs.timesteps:
        zt = theirs.step(wavy_model(zt, t), t, zt, generator=noise, **options).prev_sample
    assert far(ours, zt) < 1e-9
    t = torch.tensor([0, 700])
    assert far(schedule.add_noise(zT, zt, t), theirs.add_noise(zT, zt, t)) < 1e-9


def test_samplers_recover_the_mean_of_a_gaussian_exactly():
    """Closed form: for data N(m, 0) eps is known, and a sampler ends at m, up to ᾱ_0's noise."""
    def noise_in(zt, t):
        a = Schedule().alpha_bar[t].view(-1, 1, 1, 1)
        return (zt - a.sqrt() * 0.7) / (1 - a).sqrt()

    zT = doubles(2, 4, 4, 4)
    z0 = ddim_sample(noise_in, zT, 50, Schedule())  # keeps zT's noise, at the level of ᾱ_0
    assert far(noise_in(z0, torch.tensor([0])), noise_in(zT, torch.tensor([981]))) < 1e-6
    assert far(ddpm_sample(noise_in, zT, Schedule()), 0.7) < 1e-9


# ---- 8-bit Adam ----


def test_adam8bit_follows_the_rule_in_float64():
    """Stepping with rounded moments, one scale for all blocks, eps before the correction."""
    codes = [dinodiff.dynamic_code(signed).double().numpy() for signed in (True, False)]
    for code, least in zip(codes, (-1, 0)):
        assert len(code) == 256 and (np.diff(code) > 0).all() and 0 in code and code[-1] == 1
        assert np.sign(code[0]) == least
    n = 256 * 16 + 100
    p = nn.Parameter(torch.randn(n))
    expected = p.detach().double().numpy()
    moments = [np.zeros(n), np.zeros(n)]
    optimizer = Adam8bit([p], lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    for k in range(1, 13):
        p.grad = torch.randn(n) * torch.logspace(-4, 0, n)
        optimizer.step()
        g = p.grad.double().numpy()
        m = 0.9 * moments[0] + 0.1 * g
        v = 0.99 * moments[1] + 0.01 * g * g
        correction = np.sqrt(1 - 0.99**k)
        update = 1e-2 * correction / (1 - 0.9**k) * m / (np.sqrt(v) + correction * 1e-8)
        expected = (expected - update) * (1 - 1e-2 * 0.1)
        for code, x in zip(codes, (m, v)):  # to the nearest code, block by block
            for i in range(0, n, 256):
                top = np.abs(x[i:i + 256]).max()
                x[i:i + 256] = top * code[np.abs(x[i:i + 256, None] / top - code).argmin(1)]
        moments = [m, v]
    error = np.abs(p.detach().numpy() - expected)  # between two codes either may be taken
    assert (error < 1e-4).mean() > 0.99 and error.max() < 5e-2
    assert {optimizer.state[p][name].dtype for name in "mv"} == {torch.uint8}


def test_adam8bit_needs_few_graphs_and_steps_alike_in_any_memory_format():
    """A graph for each shape: torch gives up after eight. Moments in another order than weights."""
    graphs = []

    def count(graph, examples):
        graphs.append(graph)
        return graph.forward

    shapes = [(320, 4, 3, 3), (320,), (1280, 320), (320, 320, 3, 3), (320, 320), (640, 320, 1, 1),
              (640, 768), (2560, 320), (4, 320, 3, 3), (1280,), (640,), (96, 96, 3, 3), (96, 192)]
    plain = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    last = copy.deepcopy(plain)
    for p, q in zip(plain, last):
        if p.ndim == 4:
            q.data = q.data.to(memory_format=torch.channels_last)
        p.grad = torch.randn(p.shape)
        q.grad = p.grad.clone()  # in the plain format
    torch._dynamo.reset()
    optimizers = [Adam8bit(weights, lr=1e-2) for weights in (plain, last)]
    optimizers[1].rules = [torch.compile(rule, dynamic=True, backend=count)
                           for rule in optimizers[1].rules]
    for optimizer in optimizers:
        optimizer.step()
    assert len(graphs) <= 8, len(graphs)
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(plain, last))


def test_adam8bit_trains_as_well_as_adamw_and_equals_it_for_small_tensors():
    """The method's claim; biases and norms in 8 bits would hurt."""
    x = torch.randn(256, 64)
    y = torch.tanh(x @ torch.randn(64, 8))
    losses = []
    for width, steps in ((32, 20), (128, 200)):  # weights of 2,048 and of 8,192 elements
        for kind in (Adam8bit, torch.optim.AdamW):
            torch.manual_seed(1)
            net = nn.Sequential(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, 8))
            optimizer = kind(net.parameters(), lr=3e-3, weight_decay=0)
            for _ in range(steps):
                loss = F.mse_loss(net(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            losses.append(loss.item())
    assert abs(losses[0] - losses[1]) < 1e-6 and losses[2] < 1.2 * losses[3] + 1e-3, losses


def test_a_step_of_preset_paper_mixes_no_devices_and_reads_no_number_back(monkeypatch):
    """A constant left on the CPU, or a number the CPU waits for: errors on the meta device, too."""
    monkeypatch.setattr(dinodiff, "autocast", lambda device, dtype: contextlib.nullcontext())
    meta = torch.device("meta")
    s = dinodiff.PAPER
    with meta:
        nets = UNet(s.unet_config), VAE(s.vae_config), ViT()
        pictures = torch.zeros(2, s.size, s.size, dtype=torch.uint8)
        t = torch.zeros(2).long()
    run = dinodiff.Run(Path(), dataclasses.asdict(s), s.size, 0, *nets, Schedule(), meta)
    mean, logvar, c = dinodiff.encode_view(run, pictures, np.arange(2), 0)
    z0 = mean + torch.exp(0.5 * logvar) * torch.zeros_like(mean)
    zt = run.schedule.add_noise(z0, torch.zeros_like(z0), t)
    run.unet(zt, t, c).square().mean().backward()
    norm = nn.utils.clip_grad_norm_(run.unet.parameters(), s.clip)
    optimizer = dinodiff.make_optimizer(s, run.unet)
    places = set()

    def spied(rule):
        return lambda *tensors: (places.update(x.device for x in tensors), rule(*tensors))

    optimizer.rules = [spied(rule) for rule in optimizer.rules]
    optimizer.step()
    assert places == {meta}  # TRAP: a compiled kernel on CUDA cannot read the CPU's memory
    dinodiff.update_average(copy.deepcopy(run.unet), run.unet, 0.9, 3)
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        dinodiff.share_step(norm, norm, False)  # the one place where a step reads numbers


# ---- Training: a folder with X-rays and a finished run ----

SMALL = replace(
    dinodiff.TINY, preset="small", size=32, batch=8, steps=12, vae_steps=3, vit_steps=3, lr=1e-3,
    warmup=2, checkpoint_every=3, sample_every=100, views=0, ema=0.99, device="cpu",
    data="xrays", unet_config=TINY_UNET, vae_config=TINY_VAE, vae_settings=VAESettings(batch=4),
    vit_config=TINY_VIT, dino_settings=DINO_SHORT)
COMMANDS = {"train": (dinodiff.preset_defaults, dinodiff.train)}
dinodiff.PRESETS["small"] = SMALL


def preceded(function, action):
    """`function`, with action(number of the call, its arguments …) before each call."""
    calls = itertools.count(1)

    def both(first, *rest, **named):
        first = list(first) if inspect.isgenerator(first) else first
        action(next(calls), first, *rest)
        return function(first, *rest, **named)

    return both


def small_command(at=0, rank=0, number=0, targets=("self",), spy="", delay=0, limit=-1,
                  elsewhere=".", typed=False) -> None:
    """`small.py`. In its step `at` (-1: at once), `rank` sends the signal `number` to itself, its
    group, its parent. spy: a file for where each pass leaves its gradients, a line a step. Rank 1
    starts `delay` seconds late, in the folder `elsewhere`. limit: bytes of a file. typed: as
    `python dinodiff.py train` on two cores, which starts rank 1 by itself."""
    own_rank = int(os.environ.get("RANK", 0))
    places = []

    def act(call, parameters, *_) -> None:
        if spy and own_rank == 0:
            Path(spy).open("a").write(f"{places}\n")
            places.clear()
            for p in parameters if call == 1 else ():
                p.register_post_accumulate_grad_hook(
                    lambda p: places.append(p.grad.untyped_storage().data_ptr()))
        if call == at and own_rank == rank:
            for target in targets:
                os.kill({"self": os.getpid(), "group": 0, "parent": os.getppid()}[target], number)

    nn.utils.clip_grad_norm_ = preceded(nn.utils.clip_grad_norm_, act)  # once a step of each loop
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[own_rank % len(cores)]})
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if own_rank == 1:
        os.chdir(elsewhere)
        time.sleep(delay)
    if at < 0 and own_rank == rank:
        os.kill(os.getpid(), number)
    if typed:
        data.cores = [1, 1].__len__
        COMMANDS["train"] = (dinodiff.preset_defaults, dinodiff.train_command)
    data.command_line("", COMMANDS)


class Workshop:
    """A folder with 24 X-rays and a finished run `whole`; runs beside it share its VAE and DINO."""

    def __init__(self, folder: Path):
        self.folder = folder
        samples = [Sample(f"x{i:02d}", render_phantom(0, i, 0, 32)[0]) for i in range(24)]
        for sample in samples:
            save_png(folder / f"{sample.key}.png", sample.image)
        write_shard(folder / "xrays/shard-0.tar", samples)
        write_shard(folder / "there/xrays/shard-0.tar", samples[:20])
        os.chdir(folder)
        self.finish("whole", is_new=True)

    def command(self, name, flags="", is_new=False, **options) -> list:
        """small.py, with these options, training the run `name`."""
        is_new or self.begin(name)
        Path("small.py").write_text(
            f"from {__name__} import small_command\nsmall_command(**{options})\n")
        return ["small.py", "train", "--preset", "small", "--run-dir", name, *flags.split()]

    def finish(self, *arguments, ranks=1, code=0, **options) -> str:
        return finished(*self.command(*arguments, **options), ranks=ranks, code=code)

    def begin(self, name: str, *parts) -> Path:
        """The run's folder; a new one has the nets, and `parts`, of the finished run."""
        folder = Path(name)
        for part in () if folder.exists() else ("vae", "vit", *parts):
            source = Path("whole", part)
            folder.mkdir(exist_ok=True)
            (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / part)
        return folder

    def train(self, name: str, **changes) -> Path:
        """Train in this process, so that errors arrive as they are raised -> the run's folder."""
        run = self.begin(name)
        dinodiff.train(replace(SMALL, run_dir=name, **changes))
        return run


@pytest.fixture(scope="module")
def finished_workshop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("train"))


@pytest.fixture
def workshop(finished_workshop, monkeypatch):
    """The workshop as working folder, no grids; signals as before afterwards."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(data, "cores", torch.get_num_threads)
    monkeypatch.setattr(dinodiff, "save_grid", lambda *_: None)
    monkeypatch.chdir(finished_workshop.folder)
    yield finished_workshop
    for number, handler in handlers.items():
        signal.signal(number, handler)


def log_rows(run, stage: str = "unet") -> list[dict]:
    """The log without its clock."""
    path = Path(run, "log.jsonl")
    rows = map(json.loads, path.read_text().splitlines() if path.is_file() else [])
    return [row | {"images_per_s": 0} for row in rows if row["stage"] == stage]


def losses_of(run) -> np.ndarray:
    return np.array([[row["loss"], row["grad_norm"]] for row in log_rows(run)])


def tensors_of(run, step: int = 12) -> dict:
    """Every tensor of a checkpoint by folder and name."""
    found = {}
    for path in checkpoint_folder(run, step).rglob("*.safetensors"):
        found |= {f"{path.parent.name}: {k}": v for k, v in load_file(path).items()}
    return found


def is_like_whole(run: Path) -> bool:
    """Does the run end with the very weights, moments and log of the finished one?"""
    ours = tensors_of(run)
    theirs = tensors_of("whole")
    is_same = log_rows(run) == log_rows("whole") and ours.keys() == theirs.keys()
    return is_same and all(map(torch.equal, ours.values(), theirs.values()))


# ---- Training from end to end ----


def test_train_leaves_a_whole_run_folder(workshop):
    """What later commands open; no leftovers. With --keep the newest and the best stay."""
    assert checkpoint_steps("whole") == [3, 6, 9, 12]
    assert Path("whole/samples/step-0000012.png").is_file()
    assert [row["step"] for row in log_rows("whole")] == list(range(1, 13))
    kept = sorted(Path("whole").rglob("optimizer.*"))
    assert [path.parent.name[-2:] for path in kept] == ["09", "12"]
    assert not list(Path("whole").rglob("*.partial*")) and len(tensors_of("whole")) > 100
    assert load_run("whole").step == 12 and dinodiff.newest_run(".") == Path("whole")
    Path(workshop.begin("keep"), "best.json").write_text('{"step": 3}')
    assert checkpoint_steps(workshop.train("keep", keep=2)) == [3, 9, 12]


def test_train_killed_and_resumed_equals_the_uninterrupted_run_bit_for_bit(workshop):
    """Any state that a checkpoint forgets; two writers; a lock that outlives its process."""
    first = started(*workshop.command("killed", "--workers 1", at=6, number=19))  # SIGSTOP
    while len(log_rows("killed")) < 5:
        assert first.poll() is None
        time.sleep(0.05)
    refuses(f"being trained by process {first.pid} on", workshop.train, "killed")
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    with open("killed/log.jsonl", "a") as log:
        log.write('{"stage": "unet", "st')  # what a kill in the middle of a line leaves
    assert is_like_whole(workshop.train("killed"))
    for name in ("optimizer.safetensors", "progress.json"):  # to the byte
        files = [checkpoint_folder(run, 12) / name for run in ("killed", "whole")]
        assert files[0].read_bytes() == files[1].read_bytes(), name


@pytest.mark.parametrize("at", [2, 5])
def test_train_killed_in_a_stage_makes_the_same_nets(workshop, at):
    """A stage that goes on from half its weights, or half-written nets that are taken for whole."""
    run = f"stage{at}"
    workshop.finish(run, is_new=True, at=at, number=9, code=-9)
    workshop.train(run, steps=1)
    for net in ("vae", "vit"):
        made, expected = [dinodiff.checksums(Path(name, net)) for name in (run, "whole")]
        assert made == expected != {}
        assert len(log_rows(run, net)) == 3, "rows of the killed try are dropped"


def test_two_ranks_that_start_apart_equal_one(workshop):
    """Ranks that each look at files, draw noise, average twice, or drop DDP's buckets (3.4 GB)."""
    workshop.finish("ranks", "--steps 1 --views 2", ranks=2, delay=2, is_new=True)
    assert log_rows("ranks", "vae") == log_rows("whole", "vae") != []
    one = tensors_of(workshop.train("rank", steps=1, views=2), 1)
    two = tensors_of("ranks", 1)
    moments = [name for name in one if name.endswith("exp_avg")]
    for name in moments:  # after one step this is (1 - β1) times the gradient
        assert (one[name] - two[name]).norm() <= 1e-5 * one[name].norm() + 1e-12, name
    views = [sorted(Path(run, "views").glob("*.s*")) for run in ("rank", "ranks")]
    assert moments and len(views[0]) == len(views[1]) == 2
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*views))
    workshop.finish("ranks", "--micro-batch 2 --steps 5 --views 2", ranks=2, spy="places")
    places = [json.loads(line) for line in Path("places").read_text().splitlines()]
    assert len(places) == 4 and len(set(sum(places, []))) < len(places[-1]) / 8
    assert np.allclose(losses_of("ranks"), losses_of(workshop.train("rank", steps=5, views=2)),
                       rtol=1e-3)


def test_ranks_that_see_other_files_stop_with_a_message(workshop):
    """Two machines whose folders differ would train on two data sets."""
    printed = workshop.finish("differ", ranks=2, elsewhere="there", code=1)
    assert "rank 1: --data xrays is not the same here" in printed
    assert "Traceback" not in printed.split("rank 1:")[0]


@pytest.mark.parametrize("rank, number, targets, steps", [
    (0, 15, ("parent", "self"), [5]), (1, 9, ("self",), [3])])
def test_torchrun_saves_when_it_is_stopped_and_ends_when_a_rank_dies(
        workshop, rank, number, targets, steps):
    """Slurm signals all processes, torchrun its workers again; ranks that wait for a dead one."""
    name = f"torchrun{number}"
    workshop.finish(name, ranks=2, code=1, at=5, rank=rank, number=number, targets=targets)
    assert checkpoint_steps(name)[-1:] == steps
    assert np.allclose(losses_of(workshop.train(name)), losses_of("whole"), rtol=1e-2)


def test_core_ranks_end_together(workshop):
    """Ranks that `train` started by itself: rank 1 without its parent, or rank 0 waiting a day."""
    for rank, at, code in ((1, -1, 1), (0, 2, -9)):  # before the ranks have met, and after
        printed = workshop.finish("cores", typed=True, at=at, rank=rank, number=9, code=code)
        assert "Traceback" not in printed and ("another rank has ended" in printed) == (rank == 1)
    assert np.allclose(losses_of("cores"), losses_of("whole")[:1], rtol=1e-2)


@pytest.mark.parametrize("flags, options, left", [
    ("--workers 1", {"at": 5, "number": 15, "targets": ("group",)}, 5),
    ("", {"limit": 20_000, "code": 1}, 3)])
def test_train_stopped_or_out_of_disk_goes_on(workshop, flags, options, left):
    """A SIGTERM to the group kills the readers first; a checkpoint lost with the disk's end."""
    name = f"left{left}"
    if left == 3:
        workshop.train(name, steps=3)
    printed = workshop.finish(name, f"--checkpoint-every 6 {flags}", **options)
    assert "Traceback" not in printed and ("could not write" in printed) == (left == 3)
    assert checkpoint_steps(name) == [left]
    assert is_like_whole(workshop.train(name)) and not list(Path(name).rglob("*.partial"))


def test_the_noise_of_a_step_is_a_function_of_seed_and_step_alone():
    """The same noise at every step, learnt by heart; the global generator's, moved by a resume."""
    first, again, *others = (
        dinodiff.draw_step(replace(SMALL, seed=seed, batch=64), step, (4,), "cpu")
        for seed, step in ((3, 5), (3, 5), (4, 5), (3, 6)))
    assert all(map(torch.equal, first, again))
    for other in others:
        assert not any(map(torch.equal, first, other))
    t, eps, noise = first
    assert len(t.unique()) > 50 and not torch.equal(eps, noise) and not torch.equal(eps[0], eps[1])


def test_micro_batches_add_up_and_the_average_has_no_graph(workshop):
    """A loss not divided by the number of passes; an average whose graph grows by every step."""
    run = workshop.train("micro", steps=2, micro_batch=2)
    assert np.allclose(losses_of(run), losses_of("whole")[:2], atol=1e-4)
    unet = UNet(TINY_UNET)
    average = dinodiff.freeze(copy.deepcopy(unet), torch.device("cpu"))
    for step in (1, 2, 3):
        dinodiff.update_average(average, unet, 0.9, step)
    assert not any(p.requires_grad or p.grad_fn for p in average.parameters())


# ---- What the numbers mean: scaling and views ----


def keep_latents(monkeypatch) -> list:
    """A list that fills with every z0 that training hands to add_noise."""
    seen = []
    spied = preceded(Schedule.add_noise, lambda call, schedule, z0, *_: seen.append(z0))
    monkeypatch.setattr(Schedule, "add_noise", spied)
    return seen


def test_latents_are_scaled_wherever_they_enter_or_leave_the_unet(workshop, monkeypatch):
    """Latents 8 times as large with a factor 8 times as small: the same, if none forgets it."""
    run = workshop.begin("scaled")
    vae = VAE.from_pretrained(run / "vae").requires_grad_(False)
    for p in vae.quant_conv.parameters():
        p[:4] *= 8
    vae.quant_conv.bias[4:] += 2 * math.log(8)
    vae.post_quant_conv.weight /= 8
    vae.config.scaling_factor /= 8
    vae.save_pretrained(run / "vae")
    latents = keep_latents(monkeypatch)
    workshop.train("scaled")
    assert 0.8 < torch.cat(latents).std() < 1.25 and len(latents) == 12
    assert np.allclose(losses_of(run), losses_of("whole"), rtol=1e-3)
    images = open_data("xrays", 32).read(range(8))
    made = []
    for one in map(load_run, (run, "whole")):
        c = encode_tokens(one, images)
        pictures = generate(one, c, list(range(8)), steps=3).float()
        made.append((dinodiff.encode_latents(one, images), pictures / 255))
    for ours, theirs in zip(*made):
        assert torch.allclose(ours, theirs, atol=1e-2) and theirs.std() > 0.01


@pytest.mark.parametrize("augment, steps", [(False, 3), (True, 1)])
def test_a_step_from_views_equals_a_step_online(workshop, monkeypatch, augment, steps):
    """Views of other images or of another augmentation, unscaled, or with other noise."""
    monkeypatch.setattr(dinodiff, "VIEW_BLOCK", 10)  # three files, the last one short
    options = {"augment": augment, "steps": steps}
    latents = keep_latents(monkeypatch)
    stored = workshop.train(f"stored{steps}", views=1, **options)
    online = workshop.train(f"online{steps}", views=0, **options)
    assert len(list(stored.glob("views/*.s*"))) == 3
    difference = torch.cat(latents[:steps]) - torch.cat(latents[steps:])
    assert difference.abs().max() < 1e-2, "float16 differs by rounding alone"
    assert np.allclose(losses_of(stored), losses_of(online), atol=2e-3)


def test_views_are_completed_refused_when_foreign_and_named_when_damaged(workshop, monkeypatch):
    """Half a folder taken for whole, files made twice, latents of other data or encoders."""
    monkeypatch.setattr(dinodiff, "VIEW_BLOCK", 10)
    shutil.copytree("xrays", "changing")
    train = functools.partial(workshop.train, data="changing", views=2)
    files = sorted(train("seen", steps=1).glob("views/*.s*"))
    content = files[1].read_bytes()
    files[1].unlink()
    before = files[2].stat().st_mtime_ns
    train("seen", steps=2)
    assert files[1].read_bytes() == content and files[2].stat().st_mtime_ns == before
    shutil.copytree("seen/views", workshop.begin("foreign") / "views")
    shutil.rmtree("foreign/vit")
    foreign = "views of other images, settings or encoders"
    refuses(foreign, train, "foreign", vit_steps=1)
    spoil_file(files[2], "cut")
    refuses(files[2].name, train, "seen", steps=6)
    shutil.copy("there/xrays/shard-0.tar", "changing/shard-0.tar")
    refuses(foreign, train, "seen", steps=6)


# ---- What goes wrong ----


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_skipped(workshop, monkeypatch, value):
    """A finite loss with such a gradient would make every weight of a checkpoint NaN."""
    def spoil(call, parameters, *_) -> None:
        if call in (3, 7):
            parameters[0].grad[0] = value

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", preceded(nn.utils.clip_grad_norm_, spoil))
    run = workshop.train(f"spoilt-{value}", steps=7)  # the last step is skipped, yet the run ends
    assert [row["step"] for row in log_rows(run) if row.get("skipped")] == [3, 7]
    assert checkpoint_steps(run)[-1] == 7
    for step in checkpoint_steps(run):
        assert all(tensor.isfinite().all() for tensor in tensors_of(run, step).values())


def test_ten_steps_that_are_not_finite_stop_and_a_lower_rate_goes_on(workshop):
    """Weeks of skipped steps; a rate that may not change; no finite step to save."""
    workshop.train("huge4", lr=1e30, steps=4, checkpoint_every=99)
    workshop.train("huge", steps=3)
    refuses("x[0-9][0-9], .*lower --lr", workshop.train, "huge", lr=1e30, steps=30,
            checkpoint_every=99)
    assert checkpoint_steps("huge") == [3] and is_like_whole(workshop.train("huge"))


def test_a_loss_that_rises_and_stays_finite_is_told(capsys):
    """The loss at 1.0, that of a network which predicts nothing, for days and without a word."""
    log = dinodiff.Log(SimpleNamespace(run_dir="."), "unet", 2000)
    losses = [1.0] * 5 + [0.1, 0.02, 0.3] * 300
    for step, loss in enumerate([*losses, *[1.0] * 100], 1):
        log.write({"stage": "unet", "step": step, "loss": loss, "grad_norm": 0.1})
        if step == len(losses):
            assert not capsys.readouterr().err
    assert capsys.readouterr().err.count("has risen from 0.1") == 1


def test_a_grid_is_there_before_its_checkpoint_and_another_spelling_of_a_path_goes_on(
        workshop, monkeypatch):
    """Killed after a checkpoint, a run had no picture; ./x was another set than x."""
    drawn = []
    monkeypatch.setattr(dinodiff, "save_grid", lambda run, ds: drawn.append(
        dinodiff.checkpoint_steps(run.folder)))
    run = workshop.begin("grids", "config.json", "log.jsonl", "checkpoints")
    shutil.rmtree(run / LAST)
    workshop.train("grids", data="./xrays")
    workshop.train("grids", data=str(Path("xrays").absolute()))
    assert drawn == [[3, 6, 9]] and is_like_whole(run)


def spoil_file(path: Path, how: str) -> None:
    """flip a bit | cut | gone | else the new content, in Latin-1."""
    content = bytearray(path.read_bytes())
    if how == "gone":
        path.rename(path.with_name(f".{path.name}-gone"))
    elif how == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:
        path.write_bytes(content[:-40] if how == "cut" else how.encode("latin-1"))


LAST = "checkpoints/step-0000012"
DAMAGES = [
    (f"{LAST}/unet/*.s*", "flip"), (f"{LAST}/ema/*.s*", "flip"), (f"{LAST}/optimizer.*", "flip"),
    (f"{LAST}/unet/*.s*", "cut"), (f"{LAST}/ema/*.s*", "gone"), (f"{LAST}/optimizer.*", ""),
    (f"{LAST}/optimizer.*", "gone"), (f"{LAST}/unet/config.json", "[]"),
    (f"{LAST}/progress.json", "gone"), (f"{LAST}/progress.json", "[]"),
    (f"{LAST}/progress.json", "\x80\xff\0"), (f"{LAST}/progress.json", '{"files": 3}'),
    ("log.jsonl", "\xff\xfe\0\n[1]\n3\n{}\n" + "[" * 9999)]
DAMAGES += [(net + file, how) for net in ("vae", "vit") for file, how in (
    ("", "gone"), ("/config.json", "gone"), ("/config.json", "{}"), ("/*.s*", "flip"))]
DAMAGES += [("config.json", how) for how in ("cut", "", "[]", "{}", "\x80\xff\0", "stages")]


@pytest.mark.parametrize("file, how", DAMAGES)
def test_damage_is_named_and_never_trained_over_in_silence(workshop, capsys, file, how):
    """Training on other weights, a stage that is trained again, a traceback, or no way back."""
    shutil.rmtree("damaged", ignore_errors=True)
    run = workshop.begin("damaged", "config.json", "log.jsonl", "checkpoints")
    path, = run.glob(file)
    if how == "stages":  # odd checksums
        change_json(path, stages=[1])
    elif path.is_dir():
        path.rename("damaged/vanished")
    else:
        spoil_file(path, how)
    if file.startswith(("checkpoints", "log")):
        workshop.train("damaged")
        told = capsys.readouterr().err
        assert (path.name in told or "files" in told) and "step-0000009" not in told
        if file == "log.jsonl":
            assert told.count("dropped a line") == 5
            shutil.copy("whole/log.jsonl", run)
        assert path.parent.name in told and is_like_whole(run)
    else:
        refuses(f"{path.name.split('.')[0]}|{file[:3]} is not what", workshop.train, "damaged")
        assert len(log_rows(run)) == 12 and checkpoint_steps(run) == [3, 6, 9, 12]


def test_a_step_damaged_twice_foreign_files_and_old_checkpoints(workshop):
    """A first damaged folder in the way of the second; a foreign file or old step as damage."""
    run = workshop.begin("twice", "config.json", "checkpoints")
    optimizers = [checkpoint_folder(run, n) / "optimizer.safetensors" for n in (9, 12)]
    for _ in range(2):
        spoil_file(optimizers[1], "flip")
        workshop.train("twice")
    optimizers[1].with_name(".DS_Store").touch()
    shutil.copytree(run / LAST, run / f"{LAST} (copy)")
    before = optimizers[1].stat().st_mtime_ns
    workshop.train("twice")
    assert optimizers[1].stat().st_mtime_ns == before
    for path in optimizers:
        spoil_file(path, "flip")
    for _ in range(2):
        refuses("no checkpoint is whole", workshop.train, "twice")
    assert set(checkpoint_steps(run)) >= {3, 6}


@pytest.mark.parametrize("field, value", [
    ("checkpoint_every", 0), ("size", 33), ("size", 1 << 20), ("micro_batch", -1), ("batch", 0),
    ("lr", math.nan), ("lr", 0.0), ("vae_steps", 0), ("optimizer", "sgd"), ("dtype", "fp8"),
    ("weight_decay", math.nan), ("ema", 1.0), ("data", ""), ("seed", 10**20), ("batch", 9)])
def test_settings_that_cannot_work_are_refused_at_once(field, value):
    """Found after hours, or as a traceback out of torch."""
    settings = replace(SMALL, micro_batch=2)
    dinodiff.check_settings(settings, 2)
    refuses(f"--{field.replace('_', '-')}", dinodiff.check_settings,
            replace(settings, **{field: value}), 1)


@pytest.mark.parametrize("line, message", [
    ("--run-dir whole --seed 5", "seed: the run has 0, now 5"), ("--help", "0"),
    ("--data nowhere", "no such file or folder"), ("--device tpu", "'tpu'"),
    ("--preset huge", "expected one of tiny, mini, paper"), ("--device cuda", "no CUDA")])
def test_train_refuses_what_cannot_work_without_a_traceback(workshop, capsys, line, message):
    """The user reads one sentence; a silent fall back to the CPU would train for a year."""
    if message == "no CUDA" and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(SystemExit, match=message):
        data.command_line("", COMMANDS, ["train", "--preset", "small", *line.split()])
    is_shown = "--micro-batch INT" in (told := capsys.readouterr().out) and "over all ranks" in told
    assert is_shown == (line == "--help")


def test_sd15_alone_stands_for_the_public_unet():
    """`sd15` within a path was replaced as well, so a local copy of that name was not found."""
    refuses("sd15/unet", dinodiff.make_net, "init", replace(SMALL, init="a/sd15/unet"), None, "cpu")


@pytest.mark.parametrize("module", [dinodiff, evaluate, diffseg], ids=lambda kind: kind.__name__)
def test_no_flag_of_ours_is_taken_by_torchrun(module):
    """`--run` is a prefix of torchrun's --run-path, which stops before the script is started."""
    names = []
    for kind in vars(module).values():
        if dataclasses.is_dataclass(kind) and kind.__module__ == module.__name__:
            with contextlib.suppress(TypeError):  # settings can be made of nothing
                names += vars(kind())
    theirs = tuple(torchrun.get_args_parser()._option_string_actions)
    assert names
    for name in names:
        flag = name.replace("_", "-")
        rest = ["train", f"--{flag}", "x", f"--no-{flag}"]
        parsed = torchrun.parse_args(["--nproc_per_node=2", "script.py", *rest])
        assert (parsed.training_script, parsed.training_script_args) == ("script.py", rest)
        assert not [taken for taken in theirs if taken.startswith((rest[1], rest[3]))], name


# ---- Sampling and bench ----


def draw_samples(out: str, *images, **settings) -> dict:
    """Run `sample`, of the finished run for one -> {name: picture} of its folder."""
    base = SampleSettings("whole", images, variants=1, steps=4, device="cpu", out=out)
    dinodiff.sample(replace(base, **settings))
    return {path.stem: load_image(path).astype(int) for path in Path(out).glob("*.png")}


def test_a_sample_depends_on_its_image_and_seed_alone(workshop):
    """A sample that depends on its neighbours could never be made again alone."""
    many = draw_samples("many", "x00.png", "x01.png", "x02.png", variants=2)
    sole = draw_samples("sole", "x02.png", batch=1)
    assert np.abs(many["x02_v0"] - sole["x02_v0"]).max() <= 1 and "reconstruct" in many
    assert np.abs(many["x02_v0"] - many["x02_v1"]).max() > 1
    ends = draw_samples("ends", "x00.png", "x01.png", mode="interpolate", ratios=(0, 1e-3, 1),
                        exact_seed=7)
    assert len(ends) == 4, "three ratios, three files, though two are close"
    sheets = [draw_samples(f"grid{len(ratios)}", "x00.png", "x01.png", "x02.png", ratios=ratios,
                           mode="interpolate")["interpolate"] for ratios in ((0, 1), (0, 1, 1))]
    assert np.array_equal(*sheets), "a ratio given twice moved images into other rows"
    run = load_run("whole")
    for name, i in (("x00", 1), ("x01", -1)):
        exact = draw_samples(f"exact-{name}", f"{name}.png", exact_seed=7)[f"{name}_v0"]
        c = encode_tokens(run, torch.from_numpy(load_image(f"{name}.png"))[None])
        assert np.abs(exact - generate(run, c, [7], 4)[0].int().numpy()).max() <= 1
        assert np.abs(exact - ends[sorted(ends)[i]]).max() <= 1


def test_train_on_all_tokens_and_mix_halves(workshop):
    """Appendix A.1: a token a patch, half of them from another image. What `sample` cannot use."""
    workshop.train("all", tokens="all", steps=1)
    assert len(draw_samples("mixed", "x00.png", "x01.png", run_dir="all", mode="mix")) == 2
    mixed = dinodiff.mix_tokens(torch.zeros(17, 4), torch.ones(17, 4), TINY_VIT)
    assert mixed[:, 0].tolist() == [0.5] + [0.0] * 8 + [1.0] * 8
    Path("broken.png").write_bytes(b"not a picture")
    for image, settings, message in (
            ("broken.png", {}, "at least one"), ("x00.png", {"step": "5"}, "no checkpoint '5'"),
            ("x00.png", {"mode": "mix"}, "train with --tokens all")):
        refuses(message, draw_samples, "none", image, **settings)


def test_a_strangers_run_is_data(workshop):
    """Its config.json may name a shell command as its data, or a size that fills the memory."""
    run = workshop.begin("stranger", "config.json", "checkpoints")
    config = read_json(run / "config.json")
    for odd in ({"size": 1 << 20}, {"tokens": "x"}, {"seed": None}, {"size": True}):
        write_json(run / "config.json", config | odd)
        refuses("config.json: ", load_run, run)
    write_json(run / "config.json", config | {"data": "pipe:touch PWNED; echo {shard}"})
    draw_samples("strange", "x00.png", run_dir="stranger")
    assert not Path("PWNED").exists()
    for best in ('{"step": "²"}', '{"step": "../.."}', "[]", "{}"):
        (run / "best.json").write_text(best)
        refuses("best", load_run, run, "best")


def test_a_net_that_a_kill_left_half_written_is_made_again(monkeypatch):
    """A folder vit/ with a preprocessor alone, which every start then tries to open."""
    monkeypatch.setattr(dinodiff, "make_net", lambda *args: ViT(TINY_VIT))
    monkeypatch.setattr(data, "write_weights", lambda *_: 1 / 0)  # after the preprocessor's file
    Path("run").mkdir()
    with pytest.raises(ZeroDivisionError):
        dinodiff.finish_stages(replace(SMALL, run_dir="run"), None, CPU)
    assert not list(Path("run").glob("*/*")) and not Path("run/vae").exists()


def test_bench_counts_work_and_memory_of_the_paper():
    """0.80 TFLOP a UNet pass; activations on CUDA, where norms are float32 under autocast."""
    assert 0.75e12 < dinodiff.count_flops(dinodiff.PAPER)["UNet forward"] < 0.85e12
    eager = replace(dinodiff.PAPER, compile=False)
    plan = dinodiff.memory_plan(eager, UNetConfig(), 1)
    assert 0.9 * 73 < float(plan.split("activations ")[1].split(")")[0]) < 1.1 * 73, plan
    assert "weights 3.4, gradients 3.4, average 0.0, optimizer 1.8" in plan


# ==== Data =======================================================================================


# ---- Helpers ----


def data_xray(i=0, height=90, width=70):
    """A smooth picture without a constant border, another one for each i."""
    y, x = np.mgrid[:height, :width]
    wave = 80 * np.sin(x / (5 + i % 7) + i) * np.cos(y / 9)
    return (127 + wave + 40 * (x / width - 0.5)).clip(0, 255).astype(np.uint8)


def data_pictures(folder, files):
    """PNG or GIF files of {name: array}."""
    for name, array in files.items():
        Path(folder, name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(Path(folder, name))


def data_folder(folder, count):
    """X-rays x000…, with a CSV of patients and labels beside them."""
    folder = Path(folder)
    data_pictures(folder, {f"x{i:03d}.png": data_xray(i) for i in range(count)})
    lines = [f"{folder.name}/x{i:03d}.png,p{i // 2},{'|'.join(['A', 'B'][:i % 3])}"
             for i in range(count)]
    folder.with_suffix(".csv").write_text("\n".join(["file,patient,labels", *lines]))
    return folder


def data_prepare(source, out, **settings):
    """Prepare at 32 px and open."""
    data.prepare(data.Prepare(str(source), str(out), 32, workers=1, **settings))
    return open_data(str(out), 32)


def data_prepared(count=23, per_shard=5):
    """X-rays of 32 px in the folder `shards`."""
    return data_prepare(data_folder("found", count), "shards", per_shard=per_shard)


def data_tar(path, files):
    """A tar of {name: bytes, or (type, target) of a link}."""
    with tarfile.open(path, "w:gz" if path.endswith(".gz") else "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            if isinstance(content, tuple):
                member.type, member.linkname = content
                content = b""
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def command_of(function):
    """A program whose only command is this function."""
    return lambda *argv: data.command_line("doc", {"": (DataSettings(), function)}, argv)


# ---- Command line, small files, surroundings ----


@dataclass
class DataSettings:
    steps: int = 3                  # how many, 100 %
    lr: float | None = None         # rate
    names: tuple[str, ...] = ()     # several
    offline: bool = False           # no network


def test_data_command_line_makes_flags_of_fields(capsys, monkeypatch):
    """Tuples that stay lists, abbreviated flags, and --offline without effect."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    seen = []
    command = command_of(seen.append)
    command("--names", "a", "b", "--lr", "0.1", "--offline")
    assert seen == [DataSettings(3, 0.1, ("a", "b"), True)] and os.environ["HF_HUB_OFFLINE"] == "1"
    for argv in (["--step", "4"], ["--steps", "x"], ["--help"]):
        with pytest.raises(SystemExit):
            command(*argv)
    assert "how many, 100 % [3]" in capsys.readouterr().out


def test_data_errors_are_one_message_and_exit_code_1_under_torchrun_too():
    """A traceback, and a rank that lives on while others wait for it."""
    for ranks in ({}, {"RANK": "1"}):
        told = finished(HERE / "data.py", "check", "none", code=1, **ranks)
        assert told.count("\n") == 1 and "no such file or folder" in told
        assert ("rank 1" in told) == bool(ranks)


def test_only_errors_of_the_collectives_are_laid_to_another_rank():
    """A path with `gloo` in it that hides what is wrong; the reason why no rank can start, lost."""
    for error, message in ((UserError("/data/igloo: no such folder"), ": /data/igloo: no such"),
                           (FileNotFoundError("igloo"), ": igloo"),
                           (RuntimeError("gloo: no device\n at"), r"another rank.*no device\)$")):
        def fail(settings):
            raise error

        with pytest.raises(SystemExit, match=message):
            command_of(fail)()


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"\xff\xfe\0", b"[" * 100_000])
def test_data_small_files_that_are_damaged_are_named(content):
    """A traceback for a config.json that is missing, empty, cut, binary or a list."""
    if content is not None:
        Path("config.json").write_bytes(content)
    for read in (read_json, load_tensors, data.read_index):
        refuses("config.json.*remove it", read, "config.json")


def test_data_files_are_whole_or_absent(monkeypatch):
    """Half a file, leftovers of a kill, a rename before the bytes are on the disk."""
    os.umask(0o022)
    data.write_file(".x.safetensors.partial/.tmpAb12", b"left by a kill")
    data.save_tensors("x.safetensors", {"a": torch.ones(3)})
    assert load_tensors("x.safetensors")["a"].tolist() == [1, 1, 1]
    assert stat.S_IMODE(os.stat("x.safetensors").st_mode) == 0o644
    with pytest.raises(ZeroDivisionError), data.whole("y") as partial:
        partial.write_text(f"half {1 / 0}")
    assert os.listdir() == ["x.safetensors"]
    order = []
    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, preceded(
            getattr(os, name), lambda *_, name=name: order.append(name)))
    data.write_file("z.md", "a name that is no UTF-8: \udcff")
    assert order == ["fsync", "replace", "fsync"]
    monkeypatch.setattr(data, "write_json", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), data.whole("vae") as partial:
        write_weights(partial, {}, {"a": torch.ones(1)})
    assert not Path("vae").exists(), "a net without its config.json"


def test_output_that_knows_ascii_alone_is_no_traceback(monkeypatch):
    """UnicodeEncodeError, after hours, in a terminal or log without UTF-8."""
    out = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", out)
    command_of(lambda s: print("é → \udcff", flush=True))()
    assert out.buffer.getvalue() == b"\\xe9 \\u2192 \\udcff\n"


def test_data_cache_that_cannot_be_written_is_one_message(monkeypatch):
    """A traceback without HOME, or files in a folder that others could fill."""
    for name, place in (("DINODIFF_CACHE", "/proc/nowhere"), ("HOME", "/proc/nowhere")):
        monkeypatch.setenv(name, place)
        refuses("set DINODIFF_CACHE", data.cache_folder)
        monkeypatch.delenv("DINODIFF_CACHE", raising=False)


def test_data_lock_lets_one_process_in():
    """Two ranks that draw or fetch the same thing at once."""
    inside = []

    def work(k):
        with data.locked("x"):
            inside.append(k)
            time.sleep(0.05)
            assert inside.pop() == k and not inside

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


def test_data_a_killed_worker_is_one_message(monkeypatch):
    """A traceback, or a wait for ever, where the system kills a worker."""
    refuses("a worker process was killed", data.run_jobs, os._exit, [(1,), (2,)], "working", 2)
    fork = data.get_context("fork")  # a worker by "spawn" imports torch first
    monkeypatch.setattr(data, "get_context", lambda start: fork)
    monkeypatch.setattr(evaluate, "train_fold", os._exit)
    refuses("training classifiers: a worker process was killed", evaluate.train_all,
            SimpleNamespace(workers=2), ON_CPU, [(1,), (2,)])


@pytest.mark.parametrize("start", ["fork", "forkserver"])
def test_workers_end_with_their_parent_by_any_start_method(start):
    """Workers that outlive a kill, or end at once as a server started them."""
    Path("job.py").write_text("import os, time\n\ndef wait(k):\n    os.write(1, b'%d\\n' % k)\n"
                              "    time.sleep(600)\n")
    code = f"import data, job; data.run_jobs(job.wait, [(1,), (2,)], '', 2, start={start!r})"
    killed = started("-c", code, stderr=subprocess.DEVNULL)
    assert {killed.stdout.readline() for _ in range(2)} == {"1\n", "2\n"}
    time.sleep(1.5)
    assert killed.poll() is None
    killed.kill()
    assert killed.communicate(timeout=30) == ("", None), "a worker holds its output open"


def test_only_regular_files_are_opened():
    """A wait for ever: a stranger's folder may hold pipes under any name."""
    data_tar("a.tar", {"k.png": encode(data_xray())})
    for name in ("x.png", "b.tar", INDEX, "model.safetensors", "config.json"):
        os.mkfifo(name)

    def read_all():
        for spec in (".", "*.tar"):
            assert list(open_data(spec, 16).keys) == ["k"]
        for read, name in ((load_image, "x.png"), (read_labels, "x.png"),
                           (read_json, "config.json"), (load_tensors, INDEX),
                           (read_weights, "."), (read_weights, "model.safetensors")):
            refuses("", read, name)

    process = data.get_context("fork").Process(target=read_all)  # a library may wait unstoppably
    process.start()
    process.join(30)
    process.kill()
    assert process.exitcode == 0


# ---- Weights files ----


@pytest.mark.parametrize("index", [{}, [], {"weight_map": 3}, {"weight_map": {"a": 7}},
                                   {"weight_map": {"a": "../secret.safetensors"}},
                                   {"weight_map": {"a": "/etc/passwd"}},
                                   {"weight_map": {"a": "gone.safetensors"}}])
def test_weights_index_names_files_of_its_own_folder_alone(index):
    """A stranger's checkpoint that opens files elsewhere on this machine."""
    save_file({"a": torch.ones(1)}, "secret.safetensors")
    write_json("net/model.safetensors.index.json", index)
    refuses("model.safetensors.index.json", read_weights, "net")


def test_hub_snapshots_open_without_network_and_flag(hub, monkeypatch):
    """A wait of 23 s for a network, a cached set that is not found; what to download, unsaid."""
    write_weights("net", {"a": 1}, {"a": torch.ones(1)}, "model.safetensors")
    local = data_prepared()
    hub("models--me--net", "sub", Path("net"))
    beside = hub("datasets--me--xrays", "sub", Path("shards"))
    monkeypatch.setattr(data, "TRIES", 1)  # the pauses between them are 5 s
    begin = time.time()
    for source in (("me/net", "sub"), ("me/net:sub",)):
        config, state, _ = read_weights(*source)
        assert config == {"a": 1} and list(state) == ["a"]
    cached = open_data("hf://datasets/me/xrays/sub/*.tar", 32)
    assert cached.keys == local.keys and (cached[7] == local[7]).all()
    for spec in ("xrays/test", "others"):
        refuses(f"hf download me/{spec.split('/')[0]} --repo-type dataset", open_data,
                f"hf://datasets/me/{spec}/*.tar", 32)
    assert time.time() - begin < 20
    assert len(data_prepare("hf://datasets/me/xrays/sub/*.tar", "again")) == 23
    (beside / "README.md").write_text("no shard")
    shutil.copytree("shards", beside / "old")
    assert open_data("hf://datasets/me/xrays/sub/*", 32).keys == local.keys


# ---- Pictures ----


@pytest.mark.parametrize("suffix,mode", [
    ("png", "L"), ("png", "RGB"), ("png", "RGBA"), ("png", "P"), ("png", "LA"), ("png", "1"),
    ("jpg", "L"), ("jpg", "CMYK"), ("webp", "RGB"), ("gif", "P"), ("tif", "L"), ("bmp", "L"),
    ("jp2", "L")])
def test_every_8_bit_format_reads_as_the_same_grey_or_not_at_all(suffix, mode):
    """A palette's indices read as grey, alpha that blackens, an inverted CMYK, half an image."""
    image = Image.fromarray(data_xray())
    image = image.convert("RGB").quantize(256) if mode == "P" else image.convert(mode)
    if mode == "RGBA":
        image.putalpha(0)
    options = {"webp": {"lossless": True}, "jpg": {"quality": 95}}.get(suffix, {})
    image.save(f"x.{suffix}", **options)
    read = load_image(f"x.{suffix}")
    expected = np.array(image) * 255.0 if mode == "1" else data_xray().astype(float)
    assert read.dtype == np.uint8 and np.abs(read - expected).max() <= 12
    content = Path(f"x.{suffix}").read_bytes()
    assert (load_image(content) == read).all()
    for cut in (0, 3, len(content) // 2):
        with pytest.raises(data.Unreadable):
            load_image(content[:cut])


def data_tiff(pixels, sample_format, photometric=1):
    """An uncompressed one-strip TIFF of any number type."""
    height, width = pixels.shape
    tags = [(256, width), (257, height), (258, pixels.itemsize * 8), (259, 1), (262, photometric),
            (273, 8), (277, 1), (278, height), (279, pixels.nbytes), (339, sample_format)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return (b"II*\0" + struct.pack("<I", 8 + pixels.nbytes) + pixels.tobytes()
            + struct.pack("<H", len(tags)) + entries + bytes(4))


def saved(pixels, kind, **options):
    """The bytes of a file that Pillow writes."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "PPM", "uint16", "int16", "uint32", "int32", "float32",
                                  "nan", "white-is-zero"])
def test_deep_images_use_their_own_finite_range(kind):
    """16 bits clipped at 255, unsigned 32 bits read as signed, NaN that blackens."""
    deep = 1000 + 11.0 * data_xray()
    if kind.isupper():
        content = saved(deep.astype(np.uint16), kind)
    elif kind == "nan":
        deep[3, 3:6] = np.nan, np.inf, -np.inf
        content = data_tiff(deep.astype(np.float32), 3)
        deep[3, 3:6] = deep[9:].min(), deep[9:].max(), deep[9:].min()
    elif kind == "white-is-zero":
        content = data_tiff(deep.astype(np.uint16), 1, photometric=0)
        deep = -deep
    else:
        scale = 1e6 if kind == "uint32" else 1
        content = data_tiff((deep * scale).astype(kind), {"u": 1, "i": 2, "f": 3}[kind[0]])
    expected = (deep - deep.min()) * 255.0 / (deep.max() - deep.min())
    assert np.abs(load_image(content) - expected).max() <= 0.6


def data_png16(shape):
    """A PNG of 16 bits a sample, which Pillow cannot write: one of 8 bits with another header."""
    content = bytearray(saved(np.random.default_rng(0).integers(0, 256, shape, np.uint8), "PNG"))
    content[16:20] = struct.pack(">I", 8)  # half as wide
    content[24] = 16
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


@pytest.mark.parametrize("content,words", [
    (data_png16((8, 16, 3)), "more than 8 bits"), (data_png16((8, 16, 2)), "more than 8 bits"),
    (data_png16((8, 16, 4)), "more than 8 bits"),
    (b"P6 4 4 65535\n" + bytes(range(96)), "more than 8 bits"),
    (data_tiff(np.full((9, 9), 7, np.uint16), 1), "same value"),
    (data_tiff(np.full((9, 9), np.nan, np.float32), 3), "same value"),
    (data_tiff(np.ones((9, 9)), 3), "identify"), (data_png16((8, 16))[:60], "not a whole image"),
    (b"P5 9000 9000 255\n", "more than 67,"), (b"hello", "identify"), (b"", "identify")])
def test_pictures_that_would_be_misread_are_unreadable(content, words):
    """The high byte of 16-bit colours, black for a constant image, a pixel bomb."""
    refuses(words, load_image, content)


def test_constant_images_are_reported(capsys):
    """Films of a dead detector that train the generator to draw black."""
    data_pictures("in", {"a.png": data_xray(), "black.png": data_xray() * 0})
    assert list(data_prepare("in", "out").keys) == ["a"]
    assert "same value" in read_json("out/unreadable.json")["black.png"]
    data_tar("s.tar", {"white.png": encode(data_xray() * 0 + 255)})
    refuses("1 images, problems: 1", data.check, Check("s.tar"))
    assert "white: every pixel has the same value" in capsys.readouterr().out


def test_pictures_stand_upright_and_lungs_are_dark():
    """EXIF's orientation ignored; JSRT's raw files in the wrong byte order, or as brightness."""
    exif = Image.Exif()
    exif[274] = 6
    for kind in ("JPEG", "PNG", "WEBP", "TIFF"):
        image = load_image(saved(data_xray(), kind, exif=exif)).astype(int)
        assert image.shape == (70, 90) and np.abs(image - np.rot90(data_xray(), -1)).mean() < 8
    np.add.outer(np.arange(2048), np.arange(2048)).astype(">u2").tofile("x.IMG")
    image = load_image("x.IMG").astype(int)
    assert (np.diff(image[0]) <= 0).all() and image[0, 0] == 255 and image[-1, -1] == 0


def data_dicom(pixels, meta=True, syntax="1.2.840.10008.1.2.1", **elements):
    """The bytes of a DICOM file; a value of None is an element that is present but empty."""
    pydicom = pytest.importorskip("pydicom", reason="pydicom is not installed: DICOM is untested")
    info = pydicom.dataset.FileMetaDataset()
    info.TransferSyntaxUID = pydicom.uid.UID(syntax)
    info.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1"
    info.MediaStorageSOPInstanceUID = "1.2.3"
    preamble = bytes(128) if meta else None
    file = pydicom.dataset.FileDataset(None, {}, preamble, info if meta else None)
    file.Rows, file.Columns = pixels.shape[-2:]
    bits = 8 * pixels.itemsize
    defaults = {"BitsAllocated": bits, "BitsStored": bits, "HighBit": bits - 1,
                "SamplesPerPixel": 1, "PixelRepresentation": int(pixels.dtype.kind == "i"),
                "PhotometricInterpretation": "MONOCHROME2", "PixelData": pixels.tobytes()}
    for name, value in (defaults | elements).items():
        if name.startswith("PixelPadding"):
            file.add_new(0x00280121 if "Range" in name else 0x00280120, *value)
        else:
            setattr(file, name, value)
    buffer = io.BytesIO()
    raw = {"implicit_vr": True, "little_endian": True}
    file.save_as(buffer, **({"enforce_file_format": True} if meta else raw))
    return buffer.getvalue()


LUT = {f"{colour}PaletteColorLookupTable{name}": value for colour in ("Red", "Green", "Blue")
       for name, value in (("Descriptor", [256, 0, 16]),
                           ("Data", (np.arange(255, -1, -1) * 257).astype(np.uint16).tobytes()))}
PADDING = {"PixelPaddingValue": ("SS", -2000)}


@pytest.mark.filterwarnings("ignore:A value of 'None'")
@pytest.mark.parametrize("kind,elements", [
    ("plain", {}), ("no meta", {}), ("frames", {"NumberOfFrames": 2}),
    ("inverted", {"PhotometricInterpretation": "MONOCHROME1"}), ("padding", PADDING),
    ("empty", {"RescaleSlope": None, "RescaleIntercept": None, "NumberOfFrames": None}),
    ("range", PADDING | {"PixelPaddingRangeLimit": ("SS", -1900)}), ("8 bit", {}),
    ("sign", {"PixelPaddingValue": ("US", 63536)}),
    ("palette", LUT | {"PhotometricInterpretation": "PALETTE COLOR"})])
def test_dicom_is_read_as_its_elements_say(kind, elements):
    """MONOCHROME1 left inverted, an empty slope as 0, padding that squeezes, a palette as grey."""
    film = data_xray() // 2 + 40
    if kind not in ("8 bit", "palette"):
        film = film.astype(np.int16) * 8
    if "PixelPaddingValue" in elements:
        film[:9] = -2000
        film[5:9] = -1950 if kind == "range" else -2000
    pixels = np.stack([film, film * 0]) if kind == "frames" else film
    Path("x.dcm").write_bytes(data_dicom(pixels, kind != "no meta", **elements))
    image = load_image("x.dcm")[9:].astype(float)
    film = film[9:].astype(float)
    if kind in ("inverted", "palette"):
        image = 255 - image
    if kind not in ("8 bit", "palette"):
        film = (film - film.min()) * 255 / (film.max() - film.min())
    assert np.abs(image - film).max() <= 1.01 or kind == "palette" and np.corrcoef(
        image.ravel(), film.ravel())[0, 1] > 0.999


def test_padded_borders_go_and_nothing_else_does():
    """A border that JPEG noise protects, and a blank image that is eaten whole."""
    inside = data_xray(3, 200, 160)
    for value in (0, 128, 255):
        framed = value + np.random.default_rng(0).integers(-3, 4, (300, 300))
        framed = framed.clip(0, 255).astype(np.uint8)
        framed[40:240, 30:190] = inside
        rows, columns = data.square(load_image(saved(framed, "JPEG", quality=70)))
        edges = np.array([rows.start, rows.stop, columns.start, columns.stop])
        assert np.abs(edges - [60, 220, 30, 190]).max() <= 8
    for blank in (np.zeros((50, 80), np.uint8), np.full((50, 80), 200, np.uint8)):
        assert data.square(blank) == (slice(0, 50), slice(15, 65))
    assert (preprocess(inside[:160], 160) == inside[:160]).all()


# ---- Labels, splits, subsets ----


@pytest.mark.parametrize("written", ["x/0.png", "./x/0.png", "X/0.PNG", "x\\0.png", "0.jpg", "0",
                                     "/elsewhere/x/0.png", "/far/../x//0.dcm", "Ä/0.png",
                                     "A\u0308/0.png"])
def test_labels_match_after_normalising(written):
    """Labels lost for another case, suffix, separator, folder or a Mac's accents."""
    names = ["0.png", "sub/0.png", "a\u0308/0.png", "ä/0.png"]
    Path("labels.csv").write_text(
        f"File , Patient,labels,view\n{written},p1, A | B ,pa\ny/0.png,p2,C,pa\n")
    rows = data.match_labels(read_labels("labels.csv"), names, "x")
    is_accent = written[0] in "ÄA"
    is_bare = written in ("0.jpg", "0")
    expected = [not is_accent, is_bare, is_bare or is_accent, is_bare or is_accent]
    assert rows == [("p1", ("A", "B")) if found else None for found in expected]


def test_label_files_of_any_kind_are_read_or_refused():
    """A byte order mark in a column's name, Latin-1 or a stray CSV, empty columns, short lines."""
    text = "file,patient,labels\nx.png,Jos\xe9,A\nx.png,,B\n"
    nih = "Image Index,Finding Labels,Patient ID\nx.png,A|B,Jos\xe9\n"
    blank = text.replace("\n", "\n,,\n\n")
    for content in (text.encode("utf-8-sig"), text.encode("latin-1"), nih.encode(), blank.encode()):
        Path("a.csv").write_bytes(content)
        Path("a.csv.gz").write_bytes(gzip.compress(content))
        for name in ("a.csv", "a.csv.gz"):
            assert read_labels(name) == {"x": ("Jos\xe9", ("A", "B"))}
    Path("a.csv").write_text("file,patient,labels,,\nx.png,p,A,,\ny.png,q\nz.png,r,B,C,1\n")
    assert read_labels("a.csv") == {"x": ("p", ("A",)), "y": ("q", ()), "z": ("r", ("B",))}
    for content in ("", "a,b\n1,2\n", "file,labels,labels\nx,A,B\n", "file,patient\n", "\0\0\n\0"):
        Path("a.csv").write_text(content)
        refuses("a.csv", read_labels, "a.csv")


def test_prepare_says_how_many_labels_match_and_refuses_none(capsys):
    """A whole set without labels because of a path, and a stray CSV that stops it."""
    data_folder("found", 4)
    Path("found/stray.csv").write_text("a,b\n1,2\n")
    Path("found/._labels.csv").write_bytes(b"\0\x05\x16\x07")
    ds = data_prepare("found", "a")
    said = capsys.readouterr().err
    assert "matched 4 of 4" in said and "skipped" in said and "._labels" not in said
    assert ds.labels[2] == ("A", "B") and ds.patients[3] == "p1"
    Path("wrong.csv").write_text("file,labels\nnobody.png,A\n")
    refuses("none of the 1 files that the labels name", data_prepare, "found", "b",
            labels="wrong.csv")


def test_mimic_keeps_frontal_views_and_certain_findings():
    """Lateral views, uncertain labels taken as present, and p19 in the training set."""
    meta = ["dicom_id,subject_id,study_id,ViewPosition"]
    chexpert = ["subject_id,study_id,Edema,Fracture,Lung Opacity,No Finding,Support Devices"]
    for i in range(100):
        meta.append(f"d{i},{10 + i % 10}{i:06d},s{i},{'LATERAL' if i >= 90 else 'AP'}")
        row = f"{'1.0' if i % 4 == 0 else '-1.0'},{'1.0' if i < 3 else ''},1.0,,1.0"
        chexpert.append(f"1,s{i},{row}")
    Path("m-metadata.csv").write_text("\n".join(meta))
    Path("m-chexpert.csv.gz").write_bytes(gzip.compress("\n".join(chexpert).encode()))
    table = read_labels(".")
    assert len(table) == 90 and table["d4"][1] == ("Edema", "Lung Opacity", "Support Devices")
    assert table["d5"][1] == ("Lung Opacity", "Support Devices"), "an uncertain one is absent"
    assert data.is_mimic_test("files/p19/p19000293/s50/abc") and data.is_mimic_test("19000293")
    assert not data.is_mimic_test("files/p10/p10190002/s19000293/abc")
    data_pictures(".", {"d4.png": data_xray(), "d95.png": data_xray()})
    ds = data_prepare(".", "out", labels=".")
    assert list(ds.keys) == ["d4"] and ds.patients[0] == "14000004"
    for name in ("m-metadata.csv", "m-chexpert.csv"):  # another one's tables
        Path(name).write_text("dicom_id,study\nd4,s4\n")
        refuses(f"{name}.*found the columns dicom_id, study, expect", read_labels, ".")
        Path(name).write_text("\n".join(meta))


def data_labelled(count=900):
    """Labels and patients of a set in which findings go together, and some images have none."""
    u = uniforms(4, 11, np.arange(count))
    names = np.array(["Common", "Middling", "Rare"])
    labels = [tuple(names[row[:3] < (0.5, 0.3, 0.15)].tolist()) or ("No Finding",) for row in u]
    return labels, [f"p{int(row[3] * count / 3)}" for row in u]


def test_balanced_subsets_are_random_balanced_and_nested(capsys):
    """An image drawn twice, "No Finding" as a label, no nesting, single labels preferred."""
    labels, _ = data_labelled()
    subsets = balanced_subsets(labels, (30, 60, 90), 4)
    assert list(subsets) == [30, 60, 90] and capsys.readouterr().err == ""
    for n, indices in subsets.items():
        counts = Counter(name for i in indices for name in labels[i] if name != "No Finding")
        assert len(set(indices.tolist())) == n and len(counts) == 3
        assert min(counts.values()) >= n // 3
    assert set(subsets[30]) < set(subsets[60]) < set(subsets[90])
    assert (balanced_subsets(labels, (30, 300), 4)[30] == subsets[30]).all()
    third = [balanced_subsets(labels, (3,), seed)[3][2] for seed in range(60)]  # of Common
    share = np.mean([len(labels[i]) > 1 for i in third])
    assert abs(share - np.mean([len(row) > 1 for row in labels if "Common" in row])) < 0.2
    capsys.readouterr()
    rare = [("A",)] * 40 + [("A", "B")] * 10
    assert sum("B" in rare[i] for i in balanced_subsets(rare, (20,), 1)[20]) == 10
    assert "drawn last" in capsys.readouterr().err
    assert list(balanced_subsets(labels, (30, 5000), 4)) == [30]
    assert "drawn last" not in capsys.readouterr().err, "there is no such subset"
    for wrong in (labels, [()] * 5):
        refuses("'Rare' ran out|no image carries a label", balanced_subsets, wrong, (5000,), 4)


def test_splits_and_folds_never_share_a_patient():
    """The leak that makes every AUC too good, and folds without a rare label."""
    labels, patients = data_labelled()
    parts = data.split_by_patient(patients, 0.2, 3)
    folds = data.folds_by_patient(patients, labels, 5, 3)
    assert abs(len(parts[1]) - 180) <= 12 and np.ptp([len(fold) for fold in folds]) <= 15
    for split in (parts, folds):
        assert sorted(np.concatenate(split)) == list(range(900))
        owners = [{patients[i] for i in part} for part in split]
        assert sum(map(len, owners)) == len(set().union(*owners))
    for name in ("Common", "Middling", "Rare"):
        counts = [sum(name in labels[i] for i in fold) for fold in folds]
        assert np.ptp(counts) <= 0.25 * np.mean(counts), (name, counts)
    assert len(data.split_by_patient([""] * 10, 0.3)[1]) == 3  # unknown patients all differ
    refuses("at least 5 patients", data.folds_by_patient, ["a"] * 9, labels[:9])
    refuses("5 folds need .* 5 images of one label; found 5 and 1", data.folds_by_patient,
            patients[:5], [(name,) for name in "ABCDE"])


# ---- prepare: walks, archives, masks, resuming ----


def test_walks_meet_each_picture_once_and_nothing_that_hangs():
    """A FIFO, a link that loops, thumbnails, copies by a link, names without UTF-8 or suffix."""
    found = data_folder("found", 2)
    for name in (".ipynb_checkpoints", ".Trash-1000", "@eaDir", "__MACOSX", "$RECYCLE.BIN"):
        data_pictures(found / name, {"x.png": data_xray()})
    os.mkfifo("found/pipe.png")
    for name, target in (("loop", "."), ("a.png", "x000.png"), ("b.png", "/dev/zero")):
        (found / name).symlink_to(target)
    os.link("found/x000.png", "found/x999.png")
    Path("found/._x000.png").write_bytes(b"resource fork")
    os.rename("found/x001.png", b"found/x\xff.png")
    Path("found/1.2.840.78").write_bytes(data_dicom(data_xray().astype(np.uint16)))
    Path("link").symlink_to("found")
    for place in ("found", "link"):
        ds = data_prepare("found", f"{place}/shards")
        files = [ds.info(i)["file"] for i in range(len(ds))]
        assert files == ["1.2.840.78", "x000.png", "x\udcff.png"]
        assert not Path("found/shards/unreadable.json").exists()
    refuses("pipe", load_image, "found/pipe.png")
    data_folder("s[1]*", 2)
    assert len(open_data("s[1]*", 16)) == 2
    data_tar("s[1]*/a.tar", {"k.png": encode(data_xray())})
    assert len(open_data("s[1]*/*.tar", 16)) == 1


def data_odd_zip():
    """A zip of four pictures: marked as encrypted, of an unknown method, outside, and good."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for i, name in enumerate(("secret.png", "deflate64.png", "../up.png", "good.png")):
            archive.writestr(name, encode(data_xray(i)))
    content = bytearray(buffer.getvalue())
    for mark, flags, method in ((b"PK\x03\x04", 6, 8), (b"PK\x01\x02", 8, 10)):
        first = content.index(mark)
        content[first + flags] |= 1
        content[content.index(mark, first + 4) + method] = 9
    return bytes(content)


def test_archives_give_what_is_whole_and_report_the_rest(monkeypatch, capsys):
    """Members that end it all, paths that lead outside, links, and bombs."""
    pictures = {f"a/{i}.png": encode(data_xray(i)) for i in range(6)}
    bad = {"link.png": (tarfile.SYMTYPE, "/etc/passwd"), "hard.png": (tarfile.LNKTYPE, "a/0.png"),
           "/abs.png": pictures["a/0.png"], "a/../../up.png": pictures["a/0.png"],
           "bomb.png": bytes(3_000_000), "inner.zip": data_odd_zip()}
    data_tar("t.tar.gz", pictures | bad | {"notes.txt": b"text"})
    os.mkdir("both")
    data_tar("both/plain.tar", pictures)
    plain = Path("both/plain.tar").read_bytes()
    header = tarfile.TarInfo("k.png")  # a name of megabytes in a compressed tar
    header.type, header.size = tarfile.XHDTYPE, 2**21
    for name, content in {
            "x.tar.xz": lzma.compress(plain), "cut.tar.xz": lzma.compress(plain)[:-4000],
            "cut.tar": plain[:plain.index(b"a/3.png")], "odd.zip": data_odd_zip(),
            "cut.zip": data_odd_zip()[:-30],
            "name.tgz": gzip.compress(header.tobuf() + bytes(2**21))}.items():
        Path(name).write_bytes(content)
    monkeypatch.setattr(data, "MAX_BYTES", 2_000_000)
    for name, count, reported in (
            ("t.tar.gz", 6, set(bad)), ("x.tar.xz", 6, set()), ("cut.tar", 3, {""}),
            ("cut.tar.xz", 4, {"", "a/4.png"}),
            ("odd.zip", 1, {"secret.png", "deflate64.png", "../up.png"})):
        ds = data_prepare(name, f"of-{name}")
        found = read_json(f"of-{name}/unreadable.json") if reported else {}
        assert len(ds) == count and not Path(f"of-{name}/.unpacked").exists()
        assert set(found) == {f"{name}: {inside}" if inside else name for inside in reported}
        assert "too many" in found.get("t.tar.gz: bomb.png", "too many")
        assert (ds[0] == preprocess(data_xray(3 if count == 1 else 0), 32)).all()
    for name in ("cut.zip", "name.tgz"):
        refuses("holds no X-rays", data_prepare, name, "of-none")
        assert not Path("of-none/.unpacked").exists()
        assert f"{name}: cut short or no archive" in capsys.readouterr().err
    assert not list(Path().glob("*.png"))
    Path("set-1.0.csv").write_text("file,patient\na/3,p3\n")  # beside set-1.0.tar.xz
    os.rename("x.tar.xz", "set-1.0.tar.xz")
    ds = data_prepare("set-1.0.tar.xz", "of-set")
    assert ds.patients[3] == "p3" and ds.providers[3] == "set-1.0"
    data_pictures("both/plain", {"0.png": data_xray()})
    assert len(data_prepare("both", "of-both")) == 1
    assert "beside a folder of its name" in capsys.readouterr().err


def test_sizes_are_bounded_before_anything_is_read():
    """Gigabytes out of kilobytes: an image in a sparse shard, a deflated DICOM."""
    header = tarfile.TarInfo("k.png")
    header.size = data.MAX_BYTES + 512
    Path("sparse.tar").write_bytes(header.tobuf())
    os.truncate("sparse.tar", 512 + header.size + 1024)
    refuses("sparse.tar", lambda: open_data("sparse.tar", 16)[0])
    refuses("deflated", load_image, data_dicom(data_xray(), syntax="1.2.840.10008.1.2.1.99"))


def test_lung_masks_follow_their_image_in_all_published_forms():
    """A mask cropped otherwise than its image, sides exchanged, a heart as a lung."""
    image = data_xray(2, 120, 160)
    image[:20] = image[:, :10] = 0                     # a border above and on the left
    right, left = np.zeros((2, 120, 160), np.uint8)
    right[50:90, 40:70] = left[50:90, 90:130] = 255    # the patient's right is on our left
    both = right | left
    image[both > 0] = 30
    small = np.s_[::2, ::2]
    data_pictures(".", dict.fromkeys((
        "pairs/images/a.png", "pairs/images/b.png", "shenzhen/CXR_png/a.png", "ours/images/a.png",
        "montgomery/CXR_png/a.png", "jsrt/All247images/a.png", "two/train/images/a.png",
        "two/val/images/a.png", "bad/images/a.png"), image))
    data_pictures(".", dict.fromkeys((
        "pairs/masks/a.png", "shenzhen/mask/a_mask.png", "two/train/masks/a.png",
        "two/val/masks/a.png", "bad/masks/a.png", "bad/masks/a_mask.png"), both))
    data_pictures(".", {
        "pairs/masks/none.png": left, "ours/masks/a.png": np.uint8(left > 0) + right // 127,
        "montgomery/ManualMask/leftMask/a.png": right,  # names may lie
        "montgomery/ManualMask/rightMask/a.png": left, "jsrt/masks/heart/a.gif": left[small],
        "jsrt/masks/left lung/a.gif": left[small], "jsrt/masks/right lung/a.gif": right[small]})
    dark = preprocess(image, 50) < 35
    for name, count in {"pairs": 2, "shenzhen": 1, "ours": 1, "montgomery": 1, "jsrt": 1,
                        "two": 2}.items():
        ds = open_data(name, 50)
        masks = ds.mask(0)
        assert len(ds) == count and masks.shape == (2, 50, 50) and masks.dtype == bool, name
        assert np.nonzero(masks[0])[1].mean() > np.nonzero(masks[1])[1].mean(), name
        assert (masks.any(0) & dark).sum() / (masks.any(0) | dark).sum() > 0.85, name
        assert ds.has_mask(count - 1) == (name != "pairs") and ds.patients[0] == "a"
    refuses("prepare one at a time", open_data, "bad", 50)
    touching = np.zeros((40, 40), bool)
    touching[5:15, 4:36] = True
    assert np.bincount(data.lung_mask([touching]).ravel()).tolist()[1:] == [160, 160]


def test_prepare_goes_on_after_kill_9():
    """Shards lost, doubled, half-written; names of unreadable files lost, or kept once mended."""
    found = data_folder("found", 400)
    (found / "z-rubbish.png").write_bytes(b"no image")
    first = Path("a/shard-000000.tar")
    killed = started(HERE / "data.py", "prepare", found, "--out", "a", "--size", 32, "--per-shard",
                     40, "--workers", 1)
    while not first.exists() and killed.poll() is None:
        time.sleep(0.005)
    killed.kill()
    killed.wait()
    stamp = first.stat().st_mtime_ns
    for out, name in (("a", "found"), ("b", "./found")):
        ds = data_prepare(name, out, per_shard=40)
    assert first.stat().st_mtime_ns == stamp and len(ds) == 400
    files = [{path.name: path.read_bytes() for path in Path(out).iterdir()} for out in "ab"]
    assert files[0] == files[1] and not any("partial" in name for name in files[0])
    assert "z-rubbish.png" in read_json("a/unreadable.json")
    data_pictures(found, {"z-rubbish.png": data_xray()})
    ds = data_prepare("found", "a", per_shard=40)
    assert len(ds) == 401 and first.stat().st_mtime_ns == stamp, "a picture that was mended"
    assert not list(Path("a").glob("*unreadable.json"))
    refuses("per_shard': 40.*per_shard': 1000", data_prepare, "found", "a")
    Path("a/prepare.json").write_text("{")
    refuses("prepare.json", data_prepare, "found", "a", per_shard=40)


def test_data_given_as_a_folder_is_prepared_once_and_again_when_it_changes(monkeypatch):
    """A folder that is read anew at each start, and one that is not when it changed."""
    data_folder("found", 3)
    ds = open_data("found", 32)
    assert len(ds) == 3 and ds.labels[2] == ("A", "B") and ds.providers[0] == "found"
    assert all((ds[i] == preprocess(data_xray(i), 32)).all() for i in range(3))
    Path("table.csv").write_text("file,labels\nx000,C\n")
    assert open_data("found", 32, labels="table.csv").labels[0] == ("C",)
    monkeypatch.setattr(data, "prepare", lambda s: 1 / 0)
    for labels in (None, "table.csv"):
        assert len(open_data("found", 32, labels=labels)) == 3
    for path, content, labels in (("table.csv", b"file,labels\nx000,D,\n", "table.csv"),
                                  ("found.csv", b"file,labels\nx000,B\n", None),
                                  ("found/x009.png", encode(data_xray(9)), None)):
        Path(path).write_bytes(content)
        with pytest.raises(ZeroDivisionError):
            open_data("found", 32, labels=labels)


@pytest.mark.parametrize("spec,message", [
    ("/nowhere", "no such file or folder"), (".", "holds no X-rays"), ("pipe:cat x", "{shard}"),
    ("s{0..3}.tar", "no braces"), ("hf://datasets/x", "OWNER/NAME/GLOB"),
    ("/dev", "holds no X-rays"), ("/dev/zero", "no such file")])
def test_bad_data_is_a_sentence_not_a_traceback(spec, message):
    """A user left alone with FileNotFoundError, or a device that is read for ever."""
    refuses(message, open_data, spec, 32)


# ---- Shards, indices, batches ----


def test_shards_are_read_by_webdataset():
    """Keys with dots, and parts of an image that are not adjacent."""
    found = data_folder("found", 3)
    data_pictures(found, {"x.v1 (copy).of.png": data_xray(1), "x v1 (copy) of.png": data_xray()})
    ds = data_prepare(found, "out")
    assert len(set(ds.keys)) == 5 and not any("." in key for key in ds.keys)
    with tarfile.open(ds.shards[0]) as tar:
        names = tar.getnames()
    assert names == [f"{key}.{part}" for key in ds.keys for part in ("json", "png")]
    wds = pytest.importorskip("webdataset", reason="webdataset is not installed: not tried here")
    theirs = list(wds.WebDataset(ds.shards, shardshuffle=False, empty_check=False).decode("l8"))
    assert [sample["__key__"] for sample in theirs] == list(ds.keys)
    assert all((sample["png"] == ds[i]).all() for i, sample in enumerate(theirs))


OURS = {"file": "f", "patient": "p", "provider": "v", "labels": ["A"], "size": 8}


@pytest.mark.parametrize("info", [
    "1", "[1, 2]", "[" * 50_000, "{", '{"patient": 3}', json.dumps(OURS | {"patient": "\ud800"}),
    json.dumps(OURS | {"labels": "A"}), json.dumps(OURS).replace("8", "10000000000000000000000"),
    *(json.dumps(OURS).replace("8", size) for size in ("true", "NaN", "1e400"))])
def test_foreign_json_is_not_believed(info):
    """A traceback, or somebody's labels, from JSON of another schema."""
    png = encode(data_xray())
    data_tar("a.tar", {"k.json": info.encode(), "k.png": png, "k.mask.png": png})
    ds = open_data("*.tar", 32)
    assert len(ds) == 1 and ds.labels[0] == () and ds.patients[0] == "" and ds.mask(0) is None
    assert ds.info(0) == {} and (ds[0] == preprocess(data_xray(), 32)).all()


def test_foreign_keys_end_at_the_last_dot_and_the_plain_picture_wins(capsys):
    """UIDs that collapse to "1", a mask taken for a picture, and silent collisions."""
    png = [encode(data_xray(i)) for i in range(4)]
    eye = encode(np.eye(8, dtype=np.uint8))
    data_tar("a.tar", {"1.2.276.0.png": png[0], "1.2.276.1.png": png[1], "k.png": png[2],
                       "k.jpg": b"", "k.mask.png": png[3], "d.e/n": b"x", "u.Mask.PNG": b"x"})
    data_tar("b.tar", {"k.png": png[3], "m.json": json.dumps(OURS).encode(), "m.png": eye,
                       "m.mask.png": eye})
    ds = open_data(".", 32)
    assert list(ds.keys) == ["1.2.276.0", "1.2.276.1", "k", "k", "m"]
    assert (ds[2] == preprocess(data_xray(2), 32)).all() and ds.mask(2) is None
    assert ds.mask(4)[0].sum() == 32 * 4 and ds.patients[4] == "p"
    refuses("5 images, problems: 1", data.check, Check("*.tar"))
    assert "1 images have the key of another" in capsys.readouterr().out
    assert not Path(INDEX).exists(), "written where nobody asked for it"
    data_tar("a.tar", {"n.png": png[3], "1.2.276.1.png": png[1], "k.png": png[2]})
    assert open_data(".", 32).keys[0] == "n", "another tar of the same size"


def test_an_image_that_cannot_be_read_is_named_and_never_replaced(capsys):
    """A stand-in for a damaged image in training or in measuring, and a cut tar."""
    data_prepared()
    spec = "shards/*.tar"
    ds = open_data(spec, 32)
    assert len(ds.shards) == 5 and ds.digest == open_data("shards", 16).digest
    capsys.readouterr()
    data.check(Check(spec))
    assert capsys.readouterr().out == f"{spec}: 23 images, all readable\n"
    with open(ds.shards[1], "r+b") as file:
        file.seek(ds.rows["image"][7])
        file.write(bytes(ds.rows["image_bytes"][7]))
    place = re.escape(spec)  # where the damage is, whatever was given
    for read in (lambda: ds[7], lambda: ds.read([6, 7]), lambda: list(batches(ds, 23)),
                 lambda: list(batches(ds, 23, workers=2)),
                 lambda: open_data("shards", 32)[7]):
        refuses(f"shard-000001.tar.*x007.*data.py check '.*{place}'", read)
    os.remove("shards/shard-000000.tar")
    refuses("18 images, problems: 2", data.check, Check(spec))
    told = capsys.readouterr()
    assert "names 1 shards that are not there, such as shard-000000" in told.err
    assert "shard-000000.tar: missing" in told.out
    assert len(open_data("shards/*3.tar", 32)) == 5
    end = ds.rows["image"][20] + ds.rows["image_bytes"][20]
    for size in (end // 512 * 512 + 512, 700):  # between two members, within one
        os.truncate("shards/shard-000004.tar", size)
        refuses("shard-000004.tar: .*make or fetch this shard again", open_data, spec, 32)


def test_damaged_indices_are_made_again_and_lead_nowhere():
    """A traceback, or a read outside the shard, from an index that was flipped."""
    data_prepared(6, 3)
    index = Path("shards", INDEX)
    content = index.read_bytes()
    for k in range(0, len(content), len(content) // 40):
        flipped = content[:k] + bytes([content[k] ^ 255]) + content[k + 1:]
        index.write_bytes(flipped if k else content[:500])
        assert len(open_data("shards", 32)) == 6
    index.write_bytes(content)
    ds = open_data("shards", 32)
    for offset, length in ((-5, 10**15), (2**62, 2**62), (0, 10**15)):
        ds.rows["image"] = offset
        ds.rows["image_bytes"] = length
        refuses("x000", lambda: ds[0])


def data_rows(shards, images, size=0):
    """An index of shards s0, s1 … whose images are called k0, k1 …"""
    rows = [(b"s%d" % (i // images), 9, b"k%d" % i, b"p", b"nih", b"A|B", *[0] * 6, size)
            for i in range(shards * images)]
    return np.rec.fromarrays(list(zip(*rows)), names=",".join(data.COLUMNS))


def test_shards_without_an_index_are_scanned_once_until_they_change(monkeypatch):
    """Terabytes read at each start; an old index; one not believed for an empty shard."""
    data_prepared(6, 3)
    data_tar("shards/nothing.tar", {})
    scans = []
    monkeypatch.setattr(data, "write_index", preceded(data.write_index, lambda *_: scans.append(1)))
    assert len(open_data("shards", 32)) == 6 and not scans
    data_tar("shards/nothing.tar", {"k.png": encode(data_xray())})
    assert len(open_data("shards", 32)) == 7 and scans.pop()
    os.remove("shards/nothing.tar")
    os.remove(f"shards/{INDEX}")
    for changed, expected in ((False, 1), (False, 1), (True, 2)):
        if changed:
            os.utime("shards/shard-000000.tar", (1, 1))
        assert len(open_data("shards/*.tar", 32)) == 6 and len(scans) == expected


def test_a_million_rows_open_in_about_a_second():
    """An index whose opening takes longer than an epoch, or a part of it mixed up."""
    np.savez(INDEX, rows=data_rows(3, 100_000))
    begin = time.process_time()
    rows = data.select_shards(data.read_index(INDEX), {"s2", "s0"})
    ds = data.XRays("x", 8, {"s0": 100_000, "s2": 100_000}, rows)
    assert time.process_time() - begin < 2
    assert len(ds) == 200_000 and ds.labels[-1] == ("A", "B") and ds.patients[7] == "p"
    for i, key, shard in ((1, "k1", "s0"), (99_999, "k99999", "s0"), (100_000, "k200000", "s2")):
        assert ds.keys[i] == key and ds.shard_of(i) == shard


def test_an_epoch_has_each_image_once_and_windows_stay_together():
    """Images lost or doubled, and an order that needs every remote shard at once."""
    ds = data.XRays("x", 8, {f"s{k}": 10 for k in range(100)}, data_rows(100, 10))
    orders = [ds.order(seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for order in orders:
        assert sorted(order) == list(range(1000))
        for k in range(0, 1000, 10 * data.WINDOW):
            window = set(order[k:k + 10 * data.WINDOW] // 10)
            assert len(window) == min(data.WINDOW, (1000 - k) // 10)
    assert (orders[0] == ds.order(0, 0)).all() and len({order.tobytes() for order in orders}) == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_depend_on_seed_and_step_alone(workers):
    """A resume that repeats images, ranks that see the same, an end, a shifted global seed."""
    ds = data_prepared()

    def take(count, *arguments, **named):
        stream = batches(ds, *arguments, workers=workers, **named)
        return [(step, ids.numpy(), x) for _, (step, ids, x) in zip(range(count), stream)]

    state = torch.get_rng_state()
    whole = take(9, 12, 0, 5)  # 108 places of 23 images: over four epochs
    assert torch.equal(state, torch.get_rng_state())
    assert np.bincount(np.concatenate([ids for _, ids, _ in whole])[:92]).tolist() == [4] * 23
    for (s, i, x), (t, j, y) in zip(whole[4:], take(5, 12, 4, 5)):
        assert s == t and (i == j).all() and torch.equal(x, y) and torch.equal(x, ds.read(i))
    parts = [take(6, 12, 4, 5, rank, 2, 3) for rank in (0, 1)]  # two ranks, two passes a step
    for k in range(3):
        ids = np.concatenate([i for part in parts for _, i, _ in part[2 * k:2 * k + 2]])
        assert (ids == whole[4 + k][1]).all()
    sums = take(2, 12, 4, 5, read=lambda ids, step: {"sum": torch.tensor(ids.sum() + step)})
    assert [x["sum"].item() for _, _, x in sums] == [i.sum() + s for s, i, _ in whole[4:6]]


def test_readers_outlive_sigterm_and_die_in_one_message():
    """A checkpoint at SIGTERM that fails as the readers were killed first; a killed reader."""
    ds = data_prepared()

    def train(settings):
        for step, _, worker in batches(ds, 4, workers=1, read=lambda ids, step: os.getpid()):
            os.kill(worker, (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)[step // 10])
            time.sleep(0.1 * (step >= 20))

    with pytest.raises(SystemExit, match="DataLoader worker"):
        command_of(train)()


def test_shared_memory_that_is_small_means_fewer_batches_not_a_hang(monkeypatch, capsys):
    """A DataLoader that waits for ever in a container with 64 MB of /dev/shm."""
    monkeypatch.setattr(data, "free_shared_memory", lambda: 64e6)
    assert data.fit_shared_memory(4, 1_000_000) == 4 and capsys.readouterr().err == ""
    assert data.fit_shared_memory(4, 8_000_000) == 2
    assert "--shm-size" in capsys.readouterr().err
    assert data.fit_shared_memory(4, 60_000_000) == 0
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert data.fit_shared_memory(4, 3_000_000) == 1
    monkeypatch.setattr(data, "free_shared_memory", lambda: 1)
    stream = batches(data_prepared(), 4, workers=2, read=lambda ids, step: os.getpid())
    assert next(stream)[2] == os.getpid()


def test_pipe_shards_are_fetched_once_checked_and_dropped(monkeypatch, capsys):
    """A shard fetched by every worker, a cache that grows, a cut transfer kept, a stale shard."""
    local = data_prepared(60, 2)
    shards = Path("shards").absolute()
    spec = f"pipe:echo {{shard}} >> log; cat {shards}/{{shard}}"
    flaky = "pipe:test -e again || { touch again; exit 1; }; cat shards/{shard}"
    assert len(open_data(flaky, 32)) == 60  # at the second try
    for gigabytes in (20, 1e-9):
        remote = open_data(spec, 32, cache_gb=gigabytes)
        for path in remote.remote.folder.glob("*.tar"):
            path.unlink()
        streams = [batches(ds, 12, workers=2) for ds in (local, remote)]
        for _, (s, i, x), (t, j, y) in zip(range(10), *streams):  # two epochs
            assert (s, i.tolist()) == (t, j.tolist()) and torch.equal(x, y)
        del streams
        if gigabytes == 20:
            fetched = [INDEX, *(f"shard-{k:06d}.tar" for k in range(30))]
            assert sorted(Path("log").read_text().split()) == fetched
    time.sleep(0.5)
    before = [path.stat().st_size for path in sorted(shards.glob("*.tar"))]
    assert (remote[6] == local[6]).all()
    kept = list(remote.remote.folder.glob("*.tar"))
    assert len(kept) <= 3 * data.WINDOW
    data_pictures("found", {f"x{i:03d}.png": data_xray(i + 100) for i in range(60)})
    shutil.rmtree(shards)
    remade = data_prepare("found", shards, per_shard=2)
    assert [path.stat().st_size for path in sorted(shards.glob("*.tar"))] == before
    assert (open_data(spec, 32)[6] == remade[6]).all(), "a stale shard"
    os.truncate(shards / "shard-000003.tar", 1024)
    for path in kept:
        path.unlink()
    refuses("shard-000003.tar could not be fetched.*the index says", lambda: remote[6])
    refuses("data.index_folder", open_data, "pipe:cat /nowhere/{shard}", 32)
    shards.rename("gone")
    assert len(open_data(spec, 32)) == 60
    assert "index of an earlier run is used" in capsys.readouterr().err


# ---- On the device, pictures for people ----


def test_augmentation_is_a_function_of_seed_image_and_step():
    """Augmentation that depends on the batch, or on the precision of the nets around it."""
    images = torch.from_numpy(np.stack([data_xray(i, 64, 64) for i in range(6)]))
    ids = torch.arange(6) * 1000
    whole = augment(images, ids, 7, 3)
    assert whole.shape == (6, 1, 64, 64) and whole.dtype == torch.float32 and whole.abs().max() <= 1
    assert torch.allclose(augment(images[2:4], ids[2:4], 7, 3), whole[2:4], atol=1e-6)
    for other in ((ids, 8, 3), (ids, 7, 4), (ids + 1, 7, 3)):
        assert (augment(images, *other) - whole).abs().mean() > 0.01
    with torch.autocast("cpu", torch.bfloat16):  # would round the grid to pixels and more
        assert torch.equal(augment(images, ids, 7, 3), whole)


def test_augmentation_stays_within_the_papers_ranges(monkeypatch):
    """Scale turned round (71-111 %), shift in the wrong unit, all sharpened, zeros at the edge."""
    spots = np.zeros((400, 100, 100), np.uint8)
    for k, (y, x) in enumerate(((50, 30), (50, 70), (30, 50), (70, 50))):  # left right top bottom
        spots[k::4, y - 2:y + 2, x - 2:x + 2] = 255
    x = augment(torch.from_numpy(spots), np.arange(400) // 4, 0, 0)[:, 0] + 1
    place = np.array([ndimage.center_of_mass(spot) for spot in x.numpy()]) + 0.5
    left, right, top, bottom = place.reshape(100, 4, 2).swapaxes(0, 1)  # (100, 2): y, x
    across = (right - left) / 40
    down = (bottom - top) / 40
    assert 0.89 < across[:, 1].min() < 0.95 and 1.3 < across[:, 1].max() < 1.41
    assert np.allclose(across[:, 1], down[:, 0], rtol=0.02)
    shear = np.abs([across[:, 0] / across[:, 1], down[:, 1] / down[:, 0]]).max(1)
    shift = np.abs((left + right) / 2 - 50).max(0)
    assert (shear > 0.03).all() and (shear < 0.055).all()
    assert (shift > 3.5).all() and (shift < 5.5).all()
    grey = torch.full((50, 32, 32), 60, dtype=torch.uint8)
    assert torch.allclose(augment(grey, np.arange(50), 0, 0), torch.tensor(60 / 127.5 - 1))
    flat = torch.from_numpy(np.stack([data_xray(1, 64, 64)] * 200))
    sharp = augment(flat, np.arange(200), 0, 0)
    monkeypatch.setattr(data, "SHARPEN", 0.0)
    soft = augment(flat, np.arange(200), 0, 0)
    assert 0.4 < (sharp != soft).flatten(1).any(1).float().mean() < 0.6


def test_pixels_survive_the_way_to_the_model_and_back():
    """Rounding down, or an off-by-one range, that darkens every image."""
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16)
    assert to_model(every).shape == (1, 3, 16, 16)
    assert torch.equal(data.to_uint8(to_model(every)), every)
    assert data.to_uint8(torch.tensor([7.0, -7.0]).view(2, 1, 1, 1)).flatten().tolist() == [255, 0]


def test_grid_shows_every_image_and_shortens_captions():
    """A picture lost in the last row, or captions that run into each other."""
    tiles = [np.full((64, 64), 40 * i, np.uint8) for i in range(5)]
    captions = ["a caption much too long for its picture"] * 5
    sheet = data.grid(tiles, 3, captions, ["one", "two"], "title " * 99)
    greys = np.asarray(sheet.convert("L"))
    assert all((greys == 40 * i).sum() >= 128 * 128 for i in range(1, 5)) and sheet.size[0] < 560


def test_pictures_of_one_name_stay_apart():
    """Three view1_frontal.png of three patients that overwrite each other's output."""
    for patient in ("p1", "p2"):
        data_folder(f".hidden/{patient}", 2)
    found = data.read_pictures([".hidden", ".hidden/p1/x000.png"], 16)
    assert len(found) == 5 and {"x000", "x001"} < set(found) and "/" not in "".join(found)
    ds = open_data(".hidden/p1", 16)
    named = ds.named(["x001"])
    assert torch.equal(named["x001"], found["x001"]) and found["x001"].dtype == torch.uint8
    refuses("no key 'x'", ds.named, ["x"])


# ---- Phantoms ----


def test_phantom_sets_are_drawn_once_with_patients_labels_and_masks(monkeypatch):
    """Visits of one patient with several names, and a set drawn at each start."""
    ds = open_data("phantom", 32, seed=5, count=10)
    assert list(ds.keys)[3:6] == ["phantom-00000-3", "phantom-00001-0", "phantom-00001-1"]
    assert list(ds.patients) == [f"{k // 4:05d}" for k in range(10)] and ds.seed == 5
    image, masks, labels = render_phantom(5, 1, 1, 32)
    assert (ds[5] == image).all() and (ds.mask(5) == masks).all() and ds.labels[5] == labels
    films = [open_data("phantom", 32, seed=seed, count=1) for seed in (6, 7)]
    assert films[0].labels == films[1].labels and films[0].keys == films[1].keys
    assert films[0].digest != films[1].digest, "other pictures of the same names"
    monkeypatch.setattr(data, "write_shard", lambda *_: 1 / 0)
    assert len(open_data("phantom", 32, seed=5, count=10)) == 10


@pytest.fixture(scope="module")
def phantom_visits():
    """(image, masks, labels) of the first and of the second visit of 40 patients."""
    return [[render_phantom(2, patient, visit, 64) for patient in range(40)] for visit in (0, 1)]


def phantom_ring(lungs):
    """The band of three pixels around a mask."""
    return ndimage.binary_dilation(lungs, iterations=3) & ~lungs


def phantom_pairs(finding, size=64):
    """(change of the film by this finding, masks with it, masks without) of 12 patients."""
    for patient in range(12):
        sick, sick_masks, labels = render_phantom(3, patient, 0, size, (finding,))
        healthy, healthy_masks, none = render_phantom(3, patient, 0, size, ())
        assert labels == (finding,) and none == ()
        yield sick.astype(int) - healthy, sick_masks, healthy_masks


def test_phantom_is_a_pure_function_of_its_arguments():
    """A global random state, or an argument that is ignored."""
    image, masks, labels = render_phantom(1, 2, 3, 48)
    render_phantom(9, 9, 9, 32)
    again = render_phantom(1, 2, 3, 48)
    assert image.dtype == np.uint8 and masks.dtype == bool and masks.shape == (2, 48, 48)
    assert (image == again[0]).all() and (masks == again[1]).all() and labels == again[2]
    for other in ((0, 2, 3), (1, 0, 3), (1, 2, 0)):
        assert (image != render_phantom(*other, 48)[0]).any()


def test_phantom_is_the_same_chest_at_every_size(phantom_visits):
    """Lengths given in pixels, or random numbers whose count depends on the size."""
    for patient, (small, small_masks, labels) in enumerate(phantom_visits[0][:6]):
        large, large_masks, same = render_phantom(2, patient, 0, 256)
        shrunk = large.reshape(64, 4, 64, 4).mean((1, 3))
        lungs = small_masks.any(0)
        assert labels == same and np.corrcoef(shrunk.ravel(), small.ravel())[0, 1] > 0.995
        assert np.corrcoef(shrunk[lungs], small[lungs])[0, 1] > 0.994  # vessels and ribs too
        assert (large_masks[:, ::4, ::4] == small_masks).mean() > 0.97


def test_phantom_masks_are_two_dark_lungs_inside_the_picture(phantom_visits):
    """Swapped sides; masks that overlap, are cut or leave specks; lungs no darker than the rest."""
    for image, (left, right), _ in phantom_visits[0]:
        lungs = left | right
        assert not (left & right).any()
        assert not (lungs[[0, -1]].any() or lungs[:, [0, -1]].any())
        assert np.nonzero(right)[1].mean() < 28  # the patient's left is on our right
        assert np.nonzero(left)[1].mean() > 36
        for lung in (left, right):
            parts, _ = ndimage.label(lung)
            assert np.bincount(parts.ravel())[1:].max() > 0.99 * lung.sum()
            assert 0.06 < lung.mean() < 0.25
            assert image[lung].mean() + 20 < image[phantom_ring(lung)].mean()


def test_phantom_findings_are_as_common_as_announced():
    """A finding that never, or always, occurs; a disease that jumps between patients."""
    visits = [[render_phantom(0, patient, visit, 32)[2] for patient in range(400)]
              for visit in (0, 1)]
    for finding in FINDINGS:
        shown = np.array([[finding in labels for labels in visit] for visit in visits])
        assert 0.11 < shown.mean() < 0.26 and np.corrcoef(shown)[0, 1] > 0.6, finding
    assert 0.32 < np.mean([labels == () for labels in sum(visits, [])]) < 0.45


def test_phantom_visits_resemble_each_other_more_than_other_patients(phantom_visits):
    """Anatomy that depends on the visit, and visits that are copies."""
    films = [[image.ravel() for image, _, _ in visit] for visit in phantom_visits]
    likeness = np.corrcoef(*films)[:40, 40:]  # first visits by second visits
    same = np.diag(likeness)
    others = (likeness.sum(1) - same) / (len(same) - 1)
    assert same.mean() > others.mean() + 0.04 and np.mean(same > others) > 0.85
    assert same.max() < 0.995


def test_phantom_effusion_whitens_the_base_of_a_lung_and_leaves_its_mask():
    """Fluid drawn outside the chest, or left inside the mask."""
    for change, sick_masks, healthy_masks in phantom_pairs("Effusion"):
        fluid = healthy_masks.any(0) & ~sick_masks.any(0)
        assert not (sick_masks & ~healthy_masks).any() and fluid.sum() >= 25
        rows = np.nonzero(healthy_masks.any(0))[0]
        assert np.nonzero(fluid)[0].mean() > rows.mean() + 8  # low in the chest
        assert change[fluid].mean() > 40  # bright there, nothing above
        assert np.abs(change)[:20].max() <= 2


def cardiothoracic_ratio(left, right):
    """Of masks, measured as a radiologist does."""
    rows = np.flatnonzero(right[:, int(np.median(np.nonzero(right)[1]))])
    rows = rows[len(rows) // 3:]  # along the middle of the right lung, below the aorta's arch
    heart_left = max(np.flatnonzero(left[y])[0] for y in rows)
    heart_right = min(np.flatnonzero(right[y])[-1] for y in rows)
    return (heart_left - heart_right - 1) / np.ptp(np.flatnonzero((left | right).any(0)))


def test_phantom_cardiomegaly_is_a_cardiothoracic_ratio_above_a_half():
    """A heart that is drawn large but not cut out of the masks, or the reverse."""
    for change, sick_masks, healthy_masks in phantom_pairs("Cardiomegaly", 128):
        assert cardiothoracic_ratio(*healthy_masks) < 0.50
        assert cardiothoracic_ratio(*sick_masks) > 0.53
        assert change[healthy_masks.any(0) & ~sick_masks.any(0)].mean() > 25


@pytest.mark.parametrize("finding, pixels", [("Consolidation", 60), ("Nodule", 10)])
def test_phantom_findings_of_the_lung_change_the_lung_alone(finding, pixels):
    """Nodules and clouds outside the lungs, too small or too faint; masks without diseased lung."""
    for change, sick_masks, healthy_masks in phantom_pairs(finding):
        assert np.array_equal(sick_masks, healthy_masks)
        assert (change > 20).sum() >= pixels  # a nodule: 4 pixels across
        outside = np.abs(change)[~sick_masks.any(0)]
        assert outside.max() <= 40  # pixels at the edge belong to both
        assert outside.sum() < 0.05 * np.abs(change).sum()


def test_phantom_pneumothorax_is_a_black_rim_on_one_side():
    """Air on both sides, a rim brighter than lung, and masks that leave the free air out."""
    for change, sick_masks, healthy_masks in phantom_pairs("Pneumothorax"):
        assert np.array_equal(sick_masks, healthy_masks)
        sides = (sick_masks & (np.abs(change) > 8)).sum((1, 2))
        assert sides.min() == 0 and sides.max() > 60
        lung = sick_masks[sides.argmax()]
        rim = lung & phantom_ring(~lung)  # the outermost three pixels, medial ones too
        assert (change[rim] < -8).sum() > 25  # air is blacker than lung
        assert (change[lung & ~rim] > 5).sum() > 25  # what is left of the lung is denser


# ==== Evaluation =================================================================================


def filled(model):
    """Deterministic weights that no random generator's version can change."""
    state = model.state_dict()
    for i, (key, tensor) in enumerate(state.items()):
        u = torch.from_numpy(uniforms(max(tensor.numel(), 1), i)).view(tensor.shape)
        if key.endswith("running_var"):
            state[key] = 0.5 + u
        elif tensor.is_floating_point():
            scale = 2 if tensor.ndim < 2 else 4 / tensor[0].numel() ** 0.5
            state[key] = (u - 0.5) * scale + (".norm" in key and key.endswith("weight"))
    model = model.double().eval()
    model.load_state_dict(state)
    return model


def densenet_input(size=48):
    return torch.from_numpy(uniforms(6 * size**2, 99)).view(2, 3, size, size) * 2 - 1


@torch.no_grad()
def test_densenet_equals_torchvision():
    """A forgotten ReLU before pooling, a BN with another eps, another order of concatenation."""
    warnings.filterwarnings("ignore")
    reason = "torchvision is not installed; the golden numbers stand in for it"
    models = pytest.importorskip("torchvision.models", reason=reason)
    small = models.densenet.DenseNet(8, (2, 3), 16, num_classes=5)
    for theirs, ours in ((small, DenseNet(5, 3, 8, (2, 3), 16)),
                         (models.densenet121(weights=None), DenseNet(1000, 3))):
        theirs, ours, x = filled(theirs), ours.double().eval(), densenet_input(64)
        ours.load_state_dict(theirs.state_dict(), strict=True)
        assert (ours(x) - theirs(x)).abs().max() < 1e-9
        assert (ours.embed(x) - F.relu(theirs.features(x)).mean((2, 3))).abs().max() < 1e-9


@torch.no_grad()
def test_densenet_golden_numbers():
    """The same where torchvision is missing: from torchvision 0.28's DenseNet(8, (2, 3), 16)."""
    model = filled(DenseNet(5, 3, growth=8, blocks=(2, 3), width=16))
    golden = [-0.343169113301, 2.004951455602, 1.383534050829, -2.950913723492, -3.318108862813]
    assert np.allclose(model(densenet_input())[0], golden, rtol=0, atol=1e-9)
    golden = [0.0, 0.072746576747, 0.962209321205, 0.943130744586, 0.0]
    assert np.allclose(model.embed(densenet_input())[1, ::8], golden, rtol=0, atol=1e-9)


def test_densenet_loads_public_files(hub):
    """The public file, as it lies on a disk or in the hub's cache, by each road."""
    net = DenseNet(18)
    net.save_pretrained("safe")
    torch.save(net, "model.pt")
    refuses("hf download", evaluate.xrv_features, ON_CPU, Fid())
    hub("models--" + evaluate.XRV.replace("/", "--"), "model.pt", Path("model.pt"))
    for again in (*map(DenseNet.from_pretrained, (".", "model.pt", "safe")),
                  evaluate.xrv_features(ON_CPU, Fid())[1]):
        found = again.state_dict()
        assert all(torch.equal(found[key], tensor) for key, tensor in net.state_dict().items())


class PickledNet(nn.Module):
    """Pickled whole, as the public file is; the reader must not need its class."""

    def __init__(self):
        super().__init__()
        inner = DenseNet(4, 1, growth=4, blocks=(2, 2), width=8)
        self.features, self.classifier = inner.features, inner.classifier
        self.pathologies, self.op_threshs = ["A", "B"], None


@pytest.mark.parametrize("zipped", [True, False])
def test_hostile_pickle_runs_nothing(zipped):
    """A weights file that calls os.system when unpickled is read, and the command never run."""
    state = OrderedDict(a=torch.arange(6.0)[::2], bad=HostilePickle())
    torch.save(state, "model.pt", _use_new_zipfile_serialization=zipped)
    read = read_pickled_tensors("model.pt")
    assert read["a"].tolist() == [0, 2, 4] and not Path("owned").exists()
    torch.load("model.pt", weights_only=False)  # as dangerous as claimed
    assert Path("owned").exists()


def test_torchscript_in_disguise_is_refused():
    """A second central directory hides constants.pkl from Python's zipfile, not from torch."""
    torch.jit.script(nn.Linear(2, 2)).save("script.pt")
    content = Path("script.pt").read_bytes()
    end = content.rindex(b"PK\5\6")
    size, start = np.frombuffer(content[end + 12:end + 20], "<u4")
    shown = content[start:start + size].replace(b"constants.pkl", b"constants.xyz")
    Path("disguised.pt").write_bytes(content[:end] + shown + content[end:])
    with zipfile.ZipFile("disguised.pt") as seen:
        assert not any(name.endswith("constants.pkl") for name in seen.namelist())
    for name in ("script.pt", "disguised.pt"):
        refuses("TorchScript", read_pickled_tensors, name)


@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_pickles_are_refused(zipped):
    """A module's class imported; a download cut short: a traceback, or half the weights."""
    model = PickledNet()
    model.features.norm0.running_mean += torch.arange(8.0)
    torch.save(model, "whole.pt", _use_new_zipfile_serialization=zipped)
    read = read_pickled_tensors("whole.pt")
    wanted = model.state_dict()
    assert read.keys() == wanted.keys()
    assert all(torch.equal(read[key], tensor) for key, tensor in wanted.items())
    content = Path("whole.pt").read_bytes()
    for cut in (0, 7, len(content) // 2, len(content) - 40):
        Path("cut.pt").write_bytes(content[:cut])
        refuses("", read_pickled_tensors, "cut.pt")


def two_gaussians(d=12, n=400):
    g = torch.Generator().manual_seed(0)
    a, mix_a, b, mix_b = (torch.randn(rows, d, generator=g, dtype=torch.float64)
                          for rows in (n, d, n + 50, d))
    return a @ mix_a, b @ mix_b + 0.3


def test_frechet_distance_equals_sqrtm_and_closed_forms():
    """eigvalsh of the unsymmetric product, a lost factor 2, a root taken element by element."""
    def by_sqrtm(m1, c1, m2, c2):
        root = scipy.linalg.sqrtm((c1 @ c2).numpy()).real
        return float((m1 - m2).square().sum() + c1.trace() + c2.trace()) - 2 * np.trace(root)

    a, b = two_gaussians()
    m1, m2, c1, c2 = a.mean(0), b.mean(0), a.T.cov(), b.T.cov()
    assert frechet_distance(m1, c1, m2, c2) == pytest.approx(by_sqrtm(m1, c1, m2, c2))
    same = frechet_distance(m1.numpy(), c1.numpy(), m2.numpy(), c1.numpy())
    assert abs(same - float((m1 - m2).square().sum())) < 1e-9
    a, b = two_gaussians(d=30, n=12)  # singular: fewer images than dimensions
    mean, c1, c2 = a.mean(0), a.T.cov(), b[:9].T.cov()
    assert frechet_distance(mean, c1, mean, c1) < 1e-6 * float(c1.trace())
    jitter = 1e-9 * torch.eye(30)
    expected = by_sqrtm(mean, c1 + jitter, mean, c2 + jitter)
    assert frechet_distance(mean, c1, mean, c2) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("is_paired", [True, False])
def test_frechet_error_is_the_spread_of_repeated_draws(is_paired):
    """A bootstrap, whose repeats bias FID: at these sizes it is many times too large."""
    g = torch.Generator().manual_seed(3)
    patients = [f"p{i // 2}" for i in range(1000)]
    groups = patients if is_paired else (patients, [f"q{name}" for name in patients])

    def draw():
        a, noise = torch.randn(2, 1000, 128, generator=g, dtype=torch.float64)
        return a, 1.05 * (a + 0.5 * noise if is_paired else noise) + 0.1

    values = [evaluate.frechet(*draw()) for _ in range(24)]
    claimed = np.mean([evaluate.frechet_error(*draw(), groups) for _ in range(2)])
    assert 0.5 < claimed / np.std(values, ddof=1) < 2


def test_frechet_error_blocks_keep_patients_whole_and_near_equal():
    """A patient in two blocks makes the blocks dependent; unequal blocks move FID's bias."""
    block = evaluate.blocks_of([f"p{i // 3}" for i in range(300)], 16)
    assert all(len(set(block[3 * p:3 * p + 3])) == 1 for p in range(100))
    assert np.bincount(block, minlength=16).min() >= 15 and np.bincount(block).max() <= 24
    assert set(evaluate.blocks_of(["a", "a", "b"], 16)) == {0, 1}
    assert math.isnan(evaluate.frechet_error(np.eye(4), np.eye(4), ["a"] * 4))
    first, second = np.repeat(list("abc"), (1, 1, 98)), np.repeat(list("cba"), (1, 28, 1))
    features = torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
    assert evaluate.frechet_error(features, features[:30], (first, second)) > 0
    for names in (first, second):  # a gap would count as a block without any influence
        block = evaluate.blocks_of(names, 16)
        assert set(block) == set(range(1 + max(block)))


def test_nan_features_are_refused():
    """One NaN would make every later distance NaN, or worse, be clipped away."""
    bad = torch.ones(4, 3)
    bad[1, 0] = math.nan
    refuses("1 of 4 images", kernel_distance, bad, torch.ones(4, 3))
    refuses("NaN", frechet_distance, bad[0], bad[:3], bad[0], np.eye(3))
    refuses("dimensions", prdc, np.ones((9, 2)), np.ones((9, 3)))


def test_kernel_distance_equals_the_double_loop():
    """The diagonal left in (a biased estimate), or a kernel without its 1/d."""
    a, b = two_gaussians(d=5, n=40)
    xx, yy, xy = [(p @ q.T / 5 + 1) ** 3 for p, q in ((a, a), (b, b), (a, b))]
    expected = [(k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in (xx, yy)]
    expected = float(sum(expected) - 2 * xy.mean())
    assert abs(kernel_distance(a, b) - expected) < 1e-9 * abs(expected)


@pytest.mark.parametrize("is_paired", [True, False])
def test_kernel_distance_error_is_the_spread_of_repeated_draws(is_paired):
    """An error that shrinks with the number of subsets; pairs left in, so KID falls below 0."""
    g = torch.Generator().manual_seed(1)
    found = []
    for _ in range(150):
        shared, a, b = torch.randn(3, 80, 8, generator=g)
        x, y = (shared + 0.2 * a, shared + 0.2 * b) if is_paired else (a, b[:60] + 0.7)
        found.append(kernel_distance(x, y, True, is_paired))
    values, errors = np.array(found).T
    assert 0.7 < errors.mean() / values.std() < 1.4
    assert not is_paired or abs(values.mean()) < 4 * values.std() / 150**0.5


def test_prdc_equals_its_definition():
    """A radius that counts the image itself as its neighbour, or recall and precision exchanged."""
    g = torch.Generator().manual_seed(2)
    real = torch.randn(60, 3, generator=g).double().numpy()
    fake = torch.randn(45, 3, generator=g).double().numpy() * 0.7 + 0.3
    between, own_real, own_fake = (np.sqrt(np.square(a[:, None] - b).sum(2)) for a, b in (
        (real, fake), (real, real), (fake, fake)))
    inside = between < np.sort(own_real, 1)[:, 4:5]
    expected = {"precision": inside.any(0).mean(), "density": inside.sum() / (4 * len(fake)),
                "recall": (between < np.sort(own_fake, 1)[:, 4]).any(1).mean(),
                "coverage": inside.any(1).mean()}
    assert prdc(real, fake, 4) == pytest.approx(expected, abs=1e-12)
    same = prdc(real, real, 4)
    assert same["precision"] == same["recall"] == same["coverage"] == 1


def test_pairs_share_a_label_and_repeat_only_when_all_are_used():
    """Pairs without a common finding, early repeats, 1:50 without 1:10, leaks, the far label."""
    rng = np.random.default_rng(0)
    targets = (rng.random((40, 4)) < 0.3).astype(np.float32)
    targets[np.arange(40), rng.integers(0, 4, 40)] = 1
    folds = [np.arange(k, 40, 5) for k in range(5)]
    few, pairs, again, other = (evaluate.interpolations(targets, folds, ratio, seed)
                                for ratio, seed in ((1, 1), (28, 1), (28, 1), (28, 2)))
    i, j = pairs.ends.T
    assert (i != j).all() and ((targets[i] * targets[j]).sum(1) > 0).all()
    assert (0 <= pairs.r).all() and (pairs.r <= 1).all() and len(set(pairs.r)) == len(pairs.r)
    shares = np.triu(targets @ targets.T > 0, 1).sum()
    assert len(pairs.r) > shares == len({*map(tuple, np.sort(pairs.ends[:shares], 1).tolist())})
    for same in (few, again):
        assert np.array_equal(pairs.ends[:len(same.r)], same.ends)
        assert np.array_equal(pairs.r[:len(same.r)], same.r)
    assert not np.array_equal(other.ends, pairs.ends)
    for part in folds:
        inside = pairs.inside(np.setdiff1d(np.arange(40), part))
        assert len(inside) >= 28 * 32 and not np.isin(pairs.ends[inside], part).any()
    assert np.array_equal(pairs.nearer, np.where(pairs.r < 0.5, i, j))
    refuses("share a finding", evaluate.interpolations, np.eye(6), [[0, 1], [2, 3], [4, 5]], 1,
            seed=0)


def test_auc_equals_the_share_of_ordered_pairs():
    """Ties counted as right, or labels with one class counted as 0 or 0.5."""
    rng = np.random.default_rng(0)
    targets = rng.random((30, 3)) < 0.4
    scores = rng.integers(0, 6, (30, 3)).astype(float)
    targets[:, 2] = True
    found = evaluate.label_aucs(targets, scores)
    for label in range(2):
        p, n = scores[targets[:, label], label][:, None], scores[~targets[:, label], label]
        assert abs(found[label] - ((p > n) + (p == n) / 2).mean()) < 1e-12
    assert np.isnan(found[2])
    scores[0, 0] = np.nan  # a training that diverged: sklearn raised, a traceback
    assert np.isnan(evaluate.label_aucs(targets, scores)).tolist() == [True, False, True]


def test_paired_tests_equal_scipy_and_a_worked_example():
    """An unpaired or one-sided test, the correction's 1/k forgotten."""
    a, b = [0.71, 0.74, 0.69, 0.73, 0.75], [0.70, 0.70, 0.66, 0.72, 0.71]
    p, corrected = evaluate.paired_tests(a, b, 1 / 4)
    assert abs(p - stats.ttest_rel(a, b).pvalue) < 1e-12
    # Differences .01 .04 .03 .01 .04: mean .026, s^2 .00023; .026 / sqrt(.45 * .00023) = 2.5556
    assert abs(corrected - 2 * stats.t.sf(2.5556, 4)) < 1e-5 and corrected > p
    assert evaluate.paired_tests(a, a, 1 / 4) == (1.0, 1.0)


def toy_pictures(n):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 60, (n, 32, 32)).astype(np.uint8)
    targets = (rng.random((n, 2)) < 0.5).astype(np.float32)
    shown = np.where(rng.random(targets.shape) < 0.15, 1 - targets, targets)  # no AUC reaches 1
    images[:, 4:14, 4:28] += (shown[:, :1, None] * 120).astype(np.uint8)
    images[:, 18:28, 4:28] += (shown[:, 1:, None] * 120).astype(np.uint8)
    return [(torch.from_numpy(image), target) for image, target in zip(images, targets)]


def test_classifier_learns_stops_early_and_keeps_the_best_epoch(monkeypatch):
    """Labels shuffled against images, the last epoch's weights, no end, one augmentation."""
    seen = []
    monkeypatch.setattr(data, "augment", preceded(
        augment, lambda call, images, ids, *_: seen.extend(np.asarray(ids).tolist())))
    pictures = toy_pictures(96)
    recipe = Classify(epochs=40, batch=16, lr=1e-2, patience=2, early_stop=4, size=32,
                               net=(4, (1, 1), 8))
    net, history = evaluate.fit(recipe, pictures[:64], pictures[64:], 0, CPU)
    assert history["val"] > 0.75 and history["epochs"] == history["best_epoch"] + 4
    assert len(set(seen)) == len(seen) == 64 * history["epochs"]
    assert abs(evaluate.macro_auc(net, pictures[64:], 32, CPU) - history["val"]) < 1e-6
    one_class = [(image, np.ones(2, np.float32)) for image, _ in pictures[64:70]]
    refuses("one class only", evaluate.fit, recipe, pictures[:64], one_class, 0, CPU)


class Damaged(list):
    """Pictures of which none can be read."""

    def __getitem__(self, i):
        raise UserError("image damaged")


def test_a_fold_that_cannot_be_read_ends_the_command_and_no_refusal_is_kept(monkeypatch):
    """'image damaged' stood in the cache of the fold for ever; readers without shared memory."""
    pictures = toy_pictures(12)
    recipe = Classify(epochs=1, batch=6, size=32, net=(4, (1, 1), 8))
    path = Path("fold.json")
    parts = {"train": pictures[:1], "val": pictures[6:]}
    assert "at least 2" in evaluate.train_fold(recipe, parts, 0, CPU, path)["error"]
    assert not path.exists()
    for part in ("train", "val", "test"):
        parts = dict(train=pictures[:6], val=pictures[6:], test=pictures) | {part: Damaged([0] * 6)}
        refuses("image damaged", evaluate.train_fold, recipe, parts, 0, CPU, path)
        assert not path.exists()
    places = np.array_split(np.arange(12), 2)
    for memory, device, workers in ((10**9, "cuda", 2), (1000, "cuda", 0), (10**9, "cpu", 0)):
        evaluate.fit_shared_memory.cache_clear()
        monkeypatch.setattr(data, "free_shared_memory", lambda: memory)
        assert evaluate.batches(pictures, places, torch.device(device)).num_workers == workers


def fold_rows(run, gains):
    """Rows of three folds: real only, and cells `gain` above it."""
    rows = [{"run": run, "step": 5, "protocol": "p", "N": 50, "experiment": "real", "ratio": 0,
             "strategy": "only", "fold": k, "test": auc}
            for k, auc in enumerate((0.70, 0.72, 0.71))]
    for ratio, gain in gains.items():
        rows += [row | {"experiment": "augment", "strategy": "reconstruct", "ratio": ratio,
                        "test": row["test"] + gain + 0.001 * row["fold"]} for row in rows[:3]]
    return rows


def test_table_1_of_two_runs_has_one_baseline_stars_and_the_best_cell_bold():
    """A baseline a run, a star without significance, the best of another model made bold."""
    rows = fold_rows("v1", {1: 0.05, 5: 0.08}) + fold_rows("v2", {1: 0.02})
    text = "\n".join(evaluate.classify_section(rows, Path()))
    assert text.count("| real  only") == 1 and len(list(Path().glob("figure4*.png"))) == 1
    assert re.search(r"v1 reconstruct 1:5 \| \*\*0\.791 ± 0\.0\d\d\*\* \*", text)
    assert re.search(r"v1 reconstruct 1:1 \| 0\.761", text)
    assert re.search(r"v2 reconstruct 1:1 \| \*\*0\.731", text)
    assert "| test | 0.710 ± 0.010 |" in text, "fidelity with another SD than Table 1"


def test_fid_against_dice_takes_one_tau_for_all_images(monkeypatch):
    """Rows in which each image has its own tau counted as the oracle's best."""
    shown = []
    monkeypatch.setattr(evaluate, "chart", lambda path, rows, *how: shown.extend(rows))
    fids = [{"run": "a", "step": step, "kind": "reconstruction", "fid": 3.0, "protocol": "p"}
            for step in (1, 2)]
    row = {"run": "a", "model": evaluate.OWN, "by": "oracle", "maps": "all maps",
           "set": "combined", "stage": "coarse"}
    dice = [row | {"step": step, "tau": tau, "dice": dice} for step in (1, 2)
            for tau, dice in ((0.1, 50.0), (0.2, 60.0), (None, 90.0))]
    evaluate.fid_against_dice(fids, dice, Path())
    assert [one["dice"] for one in shown] == [60.0, 60.0]


def test_otsu_maximises_the_variance_between_classes():
    """Against the definition; an off-by-one in the cumulated counts moves the threshold."""
    rng = np.random.default_rng(0)
    x = np.r_[rng.normal(70, 12, 900), rng.normal(160, 25, 2000)].clip(0, 255).astype(np.uint8)
    spread = np.zeros(256)
    for t in range(x.min(), x.max()):
        low, high = x[x <= t], x[x > t]
        spread[t] = len(low) * len(high) * (low.mean() - high.mean())**2
    assert evaluate.otsu(x) == int(np.argmax(spread))
    assert evaluate.otsu(np.full((4, 4), 7, np.uint8)) in range(256), "one grey value alone"


LUNGS = np.zeros((2, 32, 32), bool)
LUNGS[0, 8:24, 4:12] = LUNGS[1, 8:24, 20:28] = True


def test_selection_takes_one_candidate_a_lung_and_suppresses_the_rest():
    """Half-lungs that add up; one segment for both lungs; whole segments alone, as published."""
    def pick(labels, with_parts=True):
        return evaluate.select(candidates(labels, with_parts), LUNGS)

    labels = np.where(LUNGS[0], 1, np.where(LUNGS[1], 2, 0))
    chosen, dice = pick(labels)
    assert dice == 1 and np.array_equal(chosen, LUNGS.any(0))
    assert pick(LUNGS.any(0).astype(int))[1] == 1, "both lungs under one label"
    halves = labels.copy()
    halves[16:24, 4:12] = 3  # the left lung in two halves: one of them is lost
    assert pick(halves)[1] == pytest.approx(2 * 0.75 / 1.75)
    whole = LUNGS.any(0) | (np.indices((32, 32))[0] > 20)
    pool = np.stack([LUNGS[0], whole]).reshape(2, -1).astype(np.float32)
    assert np.array_equal(evaluate.select(pool, LUNGS)[0], LUNGS[0]), "overlap is suppressed"
    assert pick(np.zeros((32, 32), int))[1] == pytest.approx(0.4), "the whole picture"
    labels[26:, 13:19] = 1
    assert pick(labels)[1] == 1 and pick(labels, False)[1] < 0.95


def test_candidates_are_of_one_percent_and_speckles_take_no_memory():
    """Each of thousands of speckles was a picture in float32: gigabytes a thread at 512 px."""
    speckles = (uniforms(1, np.arange(128**2))[:, 0] < 0.3).astype(int).reshape(128, 128)
    speckles[:64] = 2
    speckles[:8, :20] = 3  # 160 of 16,384 pixels: no candidate
    tracemalloc.start()
    pool = candidates(speckles)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert pool.dtype == np.float32 and peak < 5 * 2**20
    parts = [ndimage.label(speckles == k) for k in range(4)]
    masks = [mask for k, (part, count) in enumerate(parts)
             for mask in [speckles == k, *[part == p + 1 for p in range(count * (count > 1))]]]
    assert np.array_equal(pool, [mask.ravel() for mask in masks if mask.mean() > 0.01])
    assert candidates(np.arange(1024).reshape(32, 32)).shape == (0, 1024)


def test_a_uniform_attention_map_is_scored():
    """Its median divergence is 0, which merging refused: one image ended the measurement."""
    A = torch.full((64, 64), 1 / 64)
    image = np.full((32, 32), 90, np.uint8)
    rows = evaluate.score_image(evaluate.Segment(), A, 4, image, LUNGS)
    assert rows[-1]["tau"] is None and 0 < rows[-1]["oracle"] < 1


def test_the_rule_finds_lungs_without_a_mask():
    """Dark ellipses in a bright body, one segment each; a darker rim is no lung."""
    image = np.where(LUNGS.any(0), 60, 180).astype(np.uint8)
    image[:3] = image[-3:] = 0
    labels = np.where(LUNGS[0], 1, np.where(LUNGS[1], 2, np.where(image == 0, 3, 0)))
    chosen, belief = evaluate.select(candidates(labels), evaluate.expected_lungs(image))
    assert np.array_equal(chosen, LUNGS.any(0)) and 0 < belief < 1
    assert np.array_equal(evaluate.otsu_lungs(image), LUNGS.any(0))


def test_obedience_is_one_for_copies_and_half_for_chance():
    """A generator that ignores its condition must score 0.5, one that returns its source 1."""
    g = torch.Generator().manual_seed(0)
    sources = evaluate.thumbnails(torch.randint(0, 256, (24, 64, 64), generator=g).byte())
    assert evaluate.obedience(sources, sources) == 1
    assert 0.3 < evaluate.obedience(sources.roll(5, 0), sources) < 0.7
    assert evaluate.obedience(sources[:1].expand(24, -1), sources) == pytest.approx(0.5, abs=0.01)
    figures = evaluate.likeness(torch.zeros(24), torch.cdist(sources, sources.roll(1, 1)).amin(1))
    assert figures["chance"] == 1 and figures["nearer"] == 100


def test_chart_ticks_are_round_and_cover_the_data():
    """A range of one value, or ticks that do not cover the data."""
    for low, high in ((0, 1), (-0.02, 0.003), (31, 31), (0.47, 0.53), (1e-7, 9e-7), (-5, 12345),
                      (0, 0)):
        ticks = evaluate.round_ticks(low, high)
        assert ticks[0] <= low + 1e-12 and ticks[-1] >= high - 1e-12 and 2 <= len(ticks) <= 9
    rows = [{"run": "a", "x": 1, "y": 1.0, "y_low": 0.9, "y_high": 1.1},
            {"run": "b", "x": 2, "y": -2.0, "y_low": -2, "y_high": -2, "mark": "*"}]
    for path, is_bars in ((Path("line.png"), False), (Path("bars.png"), True)):
        evaluate.chart(path, rows, "{run}", "x", "y", "title", ("x", "y"), is_bars)
        assert path.is_file()


@pytest.fixture(scope="module")
def finished_room(tmp_path_factory):
    """A run with checkpoints of a random UNet, labelled folders, a set with lung masks."""
    folder = tmp_path_factory.mktemp("evaluate")
    os.chdir(folder)
    for part, seed, count in (("train", 0, 12), ("test", 1, 60), ("lungs", 7, 6)):
        rows = ["file,patient,labels"]
        for i in range(count):
            image, masks, _ = render_phantom(seed, i // 2, i % 2, 32)
            labels = "|".join(name for k, name in enumerate("ABC") if i // (2 + k) % 2)
            rows.append(f"{part}{i}.png,{part}{i // 2},{labels}")
            if part == "lungs":
                save_png(f"lungs/images/lungs{i}.png", image)
                save_png(f"lungs/masks/lungs{i}.png", np.uint8(255 * masks.any(0)))
            else:
                save_png(f"{part}/{part}{i}.png", image)
        Path(f"{part}.csv").write_text("\n".join(rows) + "\n")
    write_json("run/config.json", dataclasses.asdict(replace(
        SMALL, preset="tiny", data=str(folder / "train"), run_dir="")))
    torch.manual_seed(0)
    VAE(TINY_VAE).save_pretrained("run/vae")
    ViT(TINY_VIT).save_pretrained("run/vit")
    for step in (10, 20):
        place = checkpoint_folder("run", step)
        UNet(TINY_UNET).save_pretrained(place / "unet")
        write_json(place / "progress.json", {"step": step})
    return folder


@pytest.fixture
def room(finished_room, monkeypatch):
    """The folder of this run as working folder."""
    monkeypatch.chdir(finished_room)


@pytest.fixture
def foreign(room):
    """A copy of the run without results, in `foreign`."""
    shutil.rmtree("foreign", ignore_errors=True)
    shutil.copytree("run", "foreign", ignore=shutil.ignore_patterns("eval", "best.json"))


FAST = "--steps 2 --protocol dino --micro-batch 8"


def run_evaluate(line: str) -> None:
    evaluate.main(line.split())


def fails(line: str) -> str:
    """The message that a command ends with."""
    with pytest.raises(SystemExit) as end:
        run_evaluate(line)
    return str(end.value)


def on_ranks(name: str, flags: str, out: str) -> list:
    """A command on two ranks and on one -> the rows of each."""
    found = []
    for ranks in (2, 1):
        place = out.format(ranks)
        finished(HERE / "evaluate.py", name, *flags.split(), "--out", place, ranks=ranks)
        found.append(read_json(f"{place}/{name}.json", list))
    return found


@pytest.mark.parametrize("name, flags", [
    ("fid", f"--data test --count 15 --held-out 0.8 --checkpoints all {FAST}"),
    ("audit", f"--data test --count 10 {FAST}"),
    ("segment", "--data lungs --timesteps 100 300 --thresholds 0.05 0.5")])
def test_fid_audit_and_segment_are_the_same_on_one_rank_and_two(room, name, flags):
    """Images sampled twice, black or not at all; seeds by rank; rows changed by best.json."""
    found = on_ranks(name, f"--run-dir run {flags}", name + "{}")
    numbers = [[float(v) for v in re.findall(r"\d+\.\d+", json.dumps(rows))] for rows in found]
    bars = dict(rtol=1e-4) if name == "fid" else dict(rtol=1e-2, atol=2e-2)
    assert len(numbers[0]) > 8 and np.allclose(*numbers, **bars)
    text = Path(f"{name}1/{name}.md").read_text()
    if name == "fid":
        assert [row["step"] for row in found[0]] == [row["step"] for row in found[1]]
        best = read_json("run/best.json")
        curve = {row["step"]: row["fid"] for row in found[1] if row["kind"] == "reconstruction"}
        assert best["fid"] == curve[best["step"]] == min(curve.values()) and set(curve) == {10, 20}
        assert Path("fid1/figure3-0.png").is_file()
        assert "DiNOv1" not in text and "32 px, 2 DDIM steps)" in text
        assert "| 12, real against real |" in text, "the pool has fewer images than the test part"
    if name == "audit":
        assert "training images (12 of 12 compared with 22 of 22 test images)" in text


def test_classify_shares_what_sizes_ratios_and_ranks_share_and_goes_on(room):
    """Folds trained or images sampled again for other sizes or ranks; sets that are not 1:r."""
    flags = ("--run-dir run --data test --folds 3 --epochs 1 --batch 8 --steps 2 --size 32 "
             "--step 20 --workers 1 ")
    found = on_ranks("classify", flags + "--sizes 12 --ratios 1", "classify")
    assert found[0] == found[1]
    out = Path("classify")
    folds = sorted(out.rglob("fold-*.json"))
    shards = sorted(out.rglob("*.tar"))
    assert len(folds) == 3 * (1 + 2 * 2) and shards
    folds[0].unlink()
    times = {path: path.stat().st_mtime_ns for path in [*folds[1:], *shards]}
    run_evaluate(f"classify {flags} --out classify --sizes 12 18 --ratios 1 2")
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    made = open_data(str(shards[0].parent), 32)
    assert len(set(made.keys)) == len(made), "an image made twice"
    rows = read_json("classify/classify.json", list)
    assert len(rows) == 2 * 3 * (1 + 2 * 2 * 2)
    real = {(row["N"], row["fold"]): row["train"] for row in rows if row["ratio"] == 0}
    for row in rows:
        share = {"real": 1, "augment": 1 + row["ratio"], "synthetic": row["ratio"]}
        assert row["train"] == real[row["N"], row["fold"]] * share[row["experiment"]]
    text = Path("classify/classify.md").read_text()
    assert "reconstruct 1:2" in text and "fidelity: interpolate" in text
    assert "3 folds, 1 epochs at 32 px, lr 0.01, 2 DDIM steps, recipe " in text
    # Any image can be made again alone, from the JSON beside it.
    run = load_run("run", 20)
    source = open_data("test", 32)
    place = {key: i for i, key in enumerate(source.keys)}
    for i in range(0, len(made), len(made) // 5):
        how = made.info(i)
        ends = encode_tokens(run, source.read([place[key] for key in how["sources"]]))
        c = torch.lerp(ends[0], ends[1], how["r"])[None]
        again = generate(run, c, [how["seed"]], how["steps"])[0].numpy()
        assert np.abs(again.astype(int) - made[i]).max() <= 1 and how["step"] == 20


def test_results_are_kept_for_the_images_labels_and_weights_they_are_of(room):
    """A number measured under an older CSV, or with older weights, served again."""
    shutil.copytree("test", "kept")
    text = Path("test.csv").read_text()
    keys = []
    for rows in (text, text.replace("|C", ""), text.replace("test29,", "test28,")):
        Path("kept.csv").write_text(rows)
        settings = Fid(run_dir="run", data="kept")
        keys += [open_labelled(settings).key(1) for _ in range(2)]
    assert keys[::2] == keys[1::2] and len(set(keys)) == 3
    run = load_run("run", 20)
    before = evaluate.name_of(run)
    assert before == evaluate.name_of(load_run("run", 20))
    run.unet.conv_in.weight[0, 0, 0, 0] += 1e-6
    assert before != evaluate.name_of(run)


def labelled_set(place, names, patients):
    """A folder of two shards with X-rays of these names and patients, labels A and B."""
    samples = [Sample(name, render_phantom(9, k, 0, 32)[0], patient, "x", ("A", "B")[k % 2:])
               for k, (name, patient) in enumerate(zip(names, patients))]
    write_shard(f"{place}/0.tar", samples[:8])
    write_shard(f"{place}/1.tar", samples[8:])
    return place


def test_sets_with_unknown_patients_say_so_and_images_have_a_name_each(room):
    """One unknown patient, and MIMIC-CXR was split at random; images of one name shared a seed."""
    names = [f"image{i}" for i in range(16)]
    people = [f"{'p10' if i < 9 else 'p19'}00{i // 2:04d}" for i in range(15)] + [""]
    data_set = labelled_set("mimic", names, people)
    settings = Fid(run_dir="run", step="20", as_paper=True, data=data_set)
    m = open_labelled(settings)
    assert m.test.tolist() == [*range(9, 15)] and any("1 of 16 images" in text for text in m.notes)
    assert len(m.checkpoints) == 2
    cell = {"N": 4, "fold": 0, "ratio": 0, "experiment": "real", "strategy": "only"}
    folds = {4: np.array_split(np.arange(4), 2), 6: None}
    jobs = [evaluate.plan_fold(m, Classify(), cell, subset, folds, {}, "")
            for subset in (np.arange(8), np.arange(8) + 1, np.r_[:4, 8, 9, 10, 11])]
    assert jobs[0][-1] != jobs[1][-1], "another subset of this N, the same cached result"
    assert jobs[0][-1] == jobs[2][-1]
    names[9] = names[2]
    settings = replace(settings, data=labelled_set("twice", names, people))
    refuses("2 images of the name image2", open_labelled, settings)


def test_checkpoints_are_those_that_were_there_when_the_run_was_opened(foreign):
    """Each rank looked for itself, later: a training that goes on, or best.json, split them."""
    settings = Fid(run_dir="foreign", data="test")
    m = open_labelled(settings)
    shutil.copytree(checkpoint_folder("foreign", 20), checkpoint_folder("foreign", 30))
    assert m.checkpoints == [10, 20] and m.run.step == 20
    write_json("foreign/best.json", {"step": 10})
    assert evaluate.choose_step(settings)[1:] == ([10, 20, 30], 10)
    assert evaluate.choose_step(replace(settings, step="newest"))[2] == 30


def test_leaks_are_refused_by_name_or_marked(room):
    """A test set of the generator's own training patients, measured without a word."""
    leak = f"fid --run-dir run --data train {FAST} --out leak --held-out 0.5"
    message = fails(leak)
    assert all(words in message for words in ("found a leak", "image train", "--as-paper"))
    run_evaluate(f"{leak} --as-paper")
    assert "MARKED" in Path("leak/fid.md").read_text()


def test_audit_finds_copies(room):
    """A test image that is a training image under another name must be named, and refused."""
    shutil.copytree("test", "copied")
    shutil.copy("test.csv", "copied.csv")
    for i in range(0, 60, 3):  # wherever the split falls, some test image is a copy
        shutil.copy(f"train/train{i % 12}.png", f"copied/test{i}.png")
    flags = f"--run-dir run --data copied {FAST} --out copies"
    assert "copies among the generator's training images" in fails(f"audit {flags} --count 8")
    assert Path("copies/audit.png").is_file() and Path("copies/figure8.png").is_file()
    assert "= train" in Path("copies/audit.md").read_text()
    run_evaluate(f"audit {flags} --count 8 --as-paper")
    assert "MARKED" in Path("copies/audit.md").read_text()
    # All four: labels go to segment too, the samples are the run's, the audit is tabled.
    save_png("run/samples/step.png", np.zeros((8, 8), np.uint8))
    os.rename("copied.csv", "labels.csv")
    prepared = data.cache_folder() / "prepared"
    before = set(prepared.iterdir())
    run_evaluate(f"{flags} --labels labels.csv")
    text = Path("copies/report.md").read_text()
    assert "audit ended: found a leak" in text and "## Audit" in text
    assert "![Samples of run, step](../run/samples/step.png)" in text
    assert len({path for path in prepared.iterdir() if path.is_dir()} - before) == 1


def test_segment_counts_images_without_masks_and_keeps_m_of_each_model(room):
    """Images dropped in silence; SD1.5 measured at our M; the rule not fixed beforehand."""
    shutil.copytree("lungs", "five")
    Path("five/masks/lungs3.png").unlink()
    data.save_tensors("empty.safetensors", {"context": torch.zeros(3, 32)})
    init = "run/checkpoints/step-0000010/unet"
    run_evaluate("segment --run-dir run --data five --timesteps 300 --last 2 --thresholds 0.5 "
                 f"--candidates segments --refine --init {init} --context empty.safetensors "
                 "--init-grids 4 --out five-out")
    assert "1 of 6 images have no lung mask" in Path("five-out/segment.md").read_text()
    rows = read_json("five-out/segment.json", list)
    assert {row["M"] for row in rows if row["model"] == init} == {4}
    fixed = {(row["maps"], row["t"], row["M"]) for row in rows if row["model"] == evaluate.OWN
             and row["is_headline"] and row["by"] == "rule" and row["tau"] is None}
    assert fixed == {("all maps", 300, 16), ("last 2 maps", 300, 16)}
    assert Path("five-out/figure5-9.png").is_file()
    assert all(row["protocol"].endswith("32 px, segments alone, k-means") for row in rows)
    assert {row["model"] for row in rows if row["stage"] == "coarse"} == {evaluate.OWN}


def test_a_strangers_config_runs_nothing_and_damage_is_one_message(foreign):
    """config.json's `pipe:` was executed when its images were opened; best.json: a traceback."""
    change_json("foreign/config.json", data="pipe:touch PWNED; echo {shard}")
    command = "fid --run-dir foreign --data test --steps 1 --count 6"
    run_evaluate(f"{command} --protocol dino")
    assert not Path("PWNED").exists()
    assert "out of reach" in Path("foreign/eval/fid.md").read_text()
    Path("foreign/best.json").write_text('{"step": ')
    assert "best.json" in fails(f"{command} --checkpoints one")


def test_paper_presets_take_the_papers_features_or_stop(foreign, monkeypatch):
    """A silent other network behind the number that stands beside the paper's 4.7."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    change_json("foreign/config.json", preset="paper")
    command = "fid --run-dir foreign --data test --steps 1 --count 6"
    assert "hf download torchxrayvision" in fails(command)
    DenseNet(18).save_pretrained("xrv")
    run_evaluate(f"{command} --xrv xrv")
    assert "DiNOv1" in Path("foreign/eval/fid.md").read_text()


def test_report_of_several_runs_shares_tables_and_separates_what_does_not_compare():
    """Two protocols in one table; a run, a mark that numbers flatter, or a picture that is lost."""
    measured = ("kid", "kid_error", "precision", "recall", "density", "coverage", "fid_error",
                "fid_low", "fid_high")
    for run, protocol in (("v1", "local, 9"), ("v2", "local, 9"), ("v3", "dino, 9")):
        base = dict.fromkeys(measured, 1.0) | {"run": run, "protocol": protocol}
        write_json(f"{run}/eval/fid.json", [
            base | {"kind": kind, "fid": fid, "step": step, "images": 9} for kind, fid, step in (
                ("real against real", 0.5, 5), ("reconstruction", 4.0, 5),
                ("reconstruction", 3.0, 9))])
        write_json(f"{run}/eval/classify.json", fold_rows(run, {1: 0.02}))
        write_json(f"{run}/eval/audit.json", [{"run": run, "copies": ["x = y"], "among": "z"}])
        data.write_file(f"{run}/eval/audit.md", f"> MARKED (--as-paper): of {run}.\n")
        save_png(f"{run}/eval/audit.png", np.zeros((8, 8), np.uint8))
    run_evaluate("report --run-dir v1 v2 v3")
    text = Path("report/report.md").read_text()
    for words in ("## FID (local, 9)", "## FID (dino, 9)", "figure3-1.png", "| v1 |", "| v3 |",
                  "v1 reconstruct 1:1", "v3 reconstruct 1:1", "> v2: MARKED (--as-paper): of v2.",
                  "(../v3/eval/audit.png)", "DiNOv1, reconstruction", "montgomery"):
        assert words in text
    shown = re.findall(r"!\[.*\]\((.*)\)", text)
    assert len(shown) == 2 + 1 + 3 and all(Path("report", name).is_file() for name in shown)
    assert "nowhere: no results" in fails("report --run-dir v1 nowhere")
    assert "a name for each" in fails("report --run-dir v1 other/v1")
    os.rename("v1", "mine")  # after which tables and figures go by the new name
    run_evaluate("report --run-dir mine --out one")
    text = Path("one/report.md").read_text()
    assert "(../mine/eval/audit.png)" in text and "| mine |" in text and "| v1 |" not in text
    os.rename("mine", "v1")
    for damaged in ('[{"run"', "[1]", "[{}]", "{}", ""):
        Path("v1/eval/fid.json").write_text(damaged)
        assert "fid.json" in fails("report --run-dir v1")


@pytest.mark.parametrize("line, words", [
    ("fid --run-dir nowhere", "no run folder"), ("classify RUN", "--data"),
    ("fid RUN TEST --step 7", "no checkpoint"), ("fid RUN TEST --protocol inception", "auto or"),
    ("fid RUN TEST --xrv nothing.pt", "nothing.pt"), ("fid RUN TEST --findings Z", "findings"),
    ("classify RUN TEST --sizes 5000", "no balanced subset"),
    ("classify RUN TEST --strategies mix", "reconstruct"),
    ("classify RUN TEST --ratios 1 0", "numbers from 1"),
    ("fid RUN TEST --held-out 0.02", "3 patients or more"),
    ("fid RUN TEST --count 2", "see --count"), ("audit RUN TEST --count 1", "see --count"),
    ("audit RUN TEST --steps 0", "found --steps 0"),
    ("audit RUN TEST --micro-batch -1", "--micro-batch -1"),
    ("segment RUN TEST --last -1", "numbers from 0"),
    ("segment RUN TEST --coarse 0", "numbers from 1"),
    ("segment RUN TEST --count -1", "numbers from 0"),
    ("segment RUN TEST --timesteps 1000", "0 to 999"),
    ("segment RUN TEST --candidates part", "parts or"),
    ("segment RUN TEST --thresholds .1 0.10", "twice"), ("segment RUN TEST", "no lung masks"),
    ("segment RUN --data lungs --init run/checkpoints/step-0000010/unet --context "
     "run/vae/diffusion_pytorch_model.safetensors", "expected `context`"),
    ("report RUN --out empty", "no results")])
def test_evaluate_answers_bad_input_with_a_sentence(room, line, words):
    """A traceback, or a silent fallback to something else."""
    assert words in fails(line.replace("RUN", "--run-dir run").replace("TEST", "--data test"))


def test_features_of_the_papers_protocol_see_pixels_within_1024():
    """Pixels in [-1, 1] give an incomparable FID: the public DenseNet was trained on ±1024."""
    net = DenseNet(18).eval()
    net.save_pretrained("net")
    embed, _ = evaluate.xrv_features(ON_CPU, SimpleNamespace(xrv="net"))
    images = torch.randint(0, 256, (2, 224, 224), dtype=torch.uint8)
    with torch.no_grad():
        expected = net.embed((images[:, None].float() / 255 * 2 - 1) * 1024)
        assert torch.allclose(embed(images), expected, rtol=1e-3, atol=1e-3 * expected.max())


# ==== README and docs keep their word ============================================================


FILES = {path.name: path.read_text() for path in HERE.glob("*.py")}
PAGES = [HERE / "README.md", *HERE.glob("docs/*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_docs_name_only_what_exists_and_their_commands_parse(page, monkeypatch):
    """A function, test, picture or flag that was renamed: a stale map, or a command that fails."""
    text = page.read_text()
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    for file, name in set(re.findall(r"`(\w+\.py):([\w.]+)`", text)):
        for part in name.split("."):
            assert re.search(rf"(def|class) {part}\b|^\s*{part}\b[^=\n]*=", FILES[file], re.M), name
    for name in re.findall(r"`(test_\w+)`", text):
        assert f"def {name}(" in tests, name
    for link in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text):
        assert (page.parent / link).is_file(), link

    def parse(doc, commands, argv=None):
        defaults = commands[words.pop(0) if words and words[0] in commands else ""][0]
        data.parse(defaults(words) if callable(defaults) else defaults, words)

    monkeypatch.setattr(data, "command_line", parse)
    for line in "".join(re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)).splitlines():
        called = re.search(r"(?:python|torchrun .*?) (\w+\.py)\b(.*)", line)
        words = shlex.split(called[2], comments=True) if called else []
        if called and called[1] == "data.py":
            data.parse({"prepare": data.Prepare(), "check": Check()}[words[0]], words[1:])
        elif called:
            runpy.run_path(str(HERE / called[1]), run_name="__main__")


def test_readme_is_short_and_counts_lines_and_imports_are_those_of_the_requirements():
    """A table of files that is out of date; a stray import, which works for its author alone."""
    text = PAGES[0].read_text()
    assert text.count("\n") <= 200
    counts = dict(re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", text, re.M))
    known = {"torch", "numpy", "safetensors", "huggingface_hub", "PIL", "scipy", "sklearn", "tqdm",
             "pydicom", *(file[:-3] for file in FILES), *sys.stdlib_module_names}
    for file, source in FILES.items():
        assert 0.9 < int(counts[file]) / source.count("\n") < 1.1, file
        found = set(re.findall(r"^\s*(?:from (\w+)[\w.]* import|import (\w+))", source, re.M))
        assert file == "test_all.py" or {a or b for a, b in found} <= known, file


def test_no_syntax_is_newer_than_python_3_10():
    """`a[b, *c]` is of 3.11: the whole file could not be imported by 3.10."""
    for file, source in FILES.items():
        for node in ast.walk(ast.parse(source)):
            parts = getattr(getattr(node, "slice", None), "elts", ())
            assert not any(isinstance(part, ast.Starred) for part in parts), file


def choice_owner(body, line: int) -> str:
    """The function, class or setting that a line belongs to, or stands above."""
    node = next(node for node in body if node.end_lineno >= line)
    if isinstance(node, ast.ClassDef):
        return f"{node.name}.{choice_owner(node.body, line)}".rstrip(".")
    target = getattr(node, "target", getattr(node, "targets", [None])[0])
    return getattr(node, "name", getattr(target, "id", ""))


def test_each_choice_in_the_code_has_its_row_in_the_notes():
    """A place where the paper is silent, decided without a word to the reader; or a stale row."""
    found = Counter()
    for file in FILES.keys() - {"test_all.py"}:
        marks = [n for n, line in enumerate(FILES[file].splitlines(), 1) if "CHOICE:" in line]
        found.update(f"{file}:{choice_owner(ast.parse(FILES[file]).body, n)}" for n in marks)
    notes = (HERE / "docs/notes.md").read_text().split("## Paper says")[1]
    rows = re.findall(r"^\| `(\w+\.py:[\w.]+)` \|", notes, re.M)
    assert found == Counter(rows)
