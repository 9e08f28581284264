"""The paper's measurements (2.4): FID and the best checkpoint, classification, lung segmentation, a copy audit, the figures.

    python evaluate.py                          everything that the newest run and its data allow -> RUN/eval/report.md
    python evaluate.py fid --checkpoints all    Frechet distance of each checkpoint (Figure 3), and best.json
    python evaluate.py classify --data cxr/     real, augmented and synthetic training sets (Table 1, Figure 4)
    python evaluate.py segment | audit | figures
    python evaluate.py convert model.pt --out xrv/     a pickled DenseNet -> safetensors, without executing it
    torchrun --nproc_per_node=4 -- evaluate.py fid …   the same numbers on any number of ranks

Weights: FID by the paper's protocol, `xrv-224`, takes torchxrayvision's densenet121-res224-all from the hub's cache or from
--xrv; without it a small DenseNet is trained on the spot on the labels at hand, and the protocol is called `local`.
"""

from __future__ import annotations

import collections
import colorsys
import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import re
import shutil
import sys
import time
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file, save
from scipy import ndimage
from torch import Tensor, nn

import data
import diffseg
import dinodiff
from data import UserError, hash64
from unet import CROSS, UNet
from dinodiff import encode_tokens, generate, load_run

XRV = "torchxrayvision/densenet121-res224-all"
BLOCKS = 16  # parts of the moments that the bootstrap draws anew; each costs d^2 float64

# ---- Settings -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Common:
    """Settings of every command."""

    run: str = ""  # run folder; empty: the newest one
    checkpoint: str = "newest"  # newest | best (of best.json) | a step
    data: str = ""  # labelled images to measure on; empty: phantoms that training never saw, where the run is one of phantoms
    labels: str = ""  # CSV file,patient,labels, or NIH's, or the folder of MIMIC's; empty: the one beside the data
    held_out: float = 0.375  # share of the images, by patient, that is the test part; MIMIC-CXR: p19, as in the paper
    prevalence: float = 0.04  # findings rarer than this are left out
    steps: int = 50  # DDIM steps of a synthetic image
    micro_batch: int = 32  # images of one rank in one pass of sampling or encoding
    protocol: str = "auto"  # features: xrv-224 | local | dino; auto: the first that weights and labels allow
    xrv: str = XRV  # torchxrayvision's DenseNet: hub id, folder, .safetensors or the public .pt
    as_paper: bool = False  # let patients or copies on both sides of a split pass; the results are marked
    seed: int = 0
    device: str = "auto"  # auto | cpu | cuda
    offline: bool = False  # never ask the hub, use its cache alone
    out: str = ""  # folder of the results; empty: RUN/eval


@dataclass(frozen=True)
class Fid(Common):
    checkpoints: str = "newest"  # newest | all: the curve of Figure 3, and best.json
    count: int = 5000  # real test images, each reconstructed once (the paper's number)
    companions: int = 5000  # images whose features are kept, for KID and precision/recall/density/coverage
    neighbours: int = 5  # k of precision/recall/density/coverage
    resamples: int = 100  # of the bootstrap


@dataclass(frozen=True)
class Classify(Common):
    """The paper's recipe (2.4, 2.5). Runs of the preset `tiny` start from TINY instead."""

    sizes: tuple[int, ...] = (50, 100, 500, 1000, 5000, 10000)  # N, real images, as far as the data allow
    ratios: tuple[int, ...] = (1, 5, 10, 50)  # synthetic images for each real one
    strategies: tuple[str, ...] = ("reconstruct", "interpolate")
    folds: int = 5  # by patient; one validates, the others train
    epochs: int = 150  # at most
    batch: int = 64
    lr: float = 1e-4  # of AdamW
    weight_decay: float = 1e-5
    patience: int = 10  # epochs without a better validation AUC until lr / 10
    stop: int = 25  # epochs without a better validation AUC until the end
    equal_steps: bool = False  # in each cell of a column, without an early stop: more data must not win by more updates
    size: int = 224  # pixels of the classifier's input. CHOICE: torchxrayvision's; the paper names none
    growth: int = 32  # DenseNet-121's, like the next two
    blocks: tuple[int, ...] = (6, 12, 24, 16)
    width: int = 64
    init: str = ""  # weights to start from (a folder, file or hub id). CHOICE: from scratch, the paper names none
    per_shard: int = 1000  # synthetic images a tar shard


@dataclass(frozen=True)
class Audit(Common):
    count: int = 256  # synthetic images of each kind
    train_images: int = 20000  # of the generator's training set that are searched, evenly spaced
    copy: float = 0.995  # correlation of 32 px thumbnails from which two images are called copies
    pairs: int = 8  # closest pairs in the picture


@dataclass(frozen=True)
class Figures(Common):
    images: int = 3  # rows of reconstructions
    variants: int = 6  # of each image
    candidates: int = 64  # test images among which Figure 8 looks for the worst reconstructions


# The same code in miniature, for runs of the preset `tiny`: a shallow DenseNet at a hundred times the learning rate.
SMALL = dict(steps=10, micro_batch=64)
TINY = {Fid: Fid(count=160, checkpoints="all", **SMALL), Audit: Audit(count=64, **SMALL),
        Figures: Figures(candidates=24, **SMALL),
        Classify: Classify(sizes=(50, 100), ratios=(1, 5), epochs=24, batch=32, lr=1e-2, patience=12, stop=16, size=64,
                           growth=8, blocks=(2, 2, 2), width=16, per_shard=250, **SMALL)}


def defaults_for(kind):
    """argv -> the default settings of a command: TINY's where the run that argv names (or the newest) is a `tiny` one."""
    def choose(argv: list[str]):
        with contextlib.suppress(UserError, OSError):
            named = re.search(r"(?:^|\0)--run[=\0]([^\0]+)", "\0".join(argv))
            folder = Path(named[1]) if named else dinodiff.newest_run()
            is_tiny = json.loads((folder / "config.json").read_text())["preset"] == "tiny"
            return TINY.get(kind, kind()) if is_tiny else kind()
        return TINY.get(kind, kind())
    return choose


# ---- DenseNet (Huang et al. 2017; torchvision's and torchxrayvision's key names) -------------------------------------------


class DenseLayer(nn.Module):
    """BN-ReLU-1x1, BN-ReLU-3x3: `growth` new channels from all that came before."""

    def __init__(self, channels: int, growth: int):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, 4 * growth, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(4 * growth), nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))


class DenseBlock(nn.Module):
    def __init__(self, channels: int, growth: int, layers: int):
        super().__init__()
        for i in range(layers):
            self.add_module(f"denselayer{i + 1}", DenseLayer(channels + i * growth, growth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = torch.cat([x, layer(x)], 1)
        return x


class Transition(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(channels), nn.Conv2d(channels, channels // 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv(F.relu(self.norm(x))), 2)


class DenseNet(nn.Module):
    """DenseNet: at its defaults DenseNet-121 (727 tensors); the tiny preset uses a shallow one of the same class.

    num_classes: logits; in_channels: 1 (torchxrayvision) or 3 (torchvision); growth: channels a layer adds; blocks: layers of
    each dense block; width: channels of the stem.
    """

    def __init__(self, num_classes: int, in_channels: int = 1, growth: int = 32, blocks: tuple[int, ...] = (6, 12, 24, 16),
                 width: int = 64):
        super().__init__()
        stem = [("conv0", nn.Conv2d(in_channels, width, 7, stride=2, padding=3, bias=False)), ("norm0", nn.BatchNorm2d(width)),
                ("relu0", nn.ReLU(inplace=True)), ("pool0", nn.MaxPool2d(3, stride=2, padding=1))]
        self.features = nn.Sequential(OrderedDict(stem))
        for i, layers in enumerate(blocks, 1):
            self.features.add_module(f"denseblock{i}", DenseBlock(width, growth, layers))
            width += layers * growth
            if i < len(blocks):
                self.features.add_module(f"transition{i}", Transition(width))
                width //= 2
        self.features.add_module("norm5", nn.BatchNorm2d(width))  # "5" at any number of blocks
        self.classifier = nn.Linear(width, num_classes)
        for name, weight in self.features.named_parameters():
            if "conv" in name:
                nn.init.kaiming_normal_(weight)
        nn.init.zeros_(self.classifier.bias)

    def embed(self, x: Tensor) -> Tensor:
        """x: (B, in_channels, H, W) -> features (B, 1024): ReLU, then the global average."""
        # TRAP: without this ReLU the features, and every FID on them, are others; torchvision and torchxrayvision both have it.
        return F.relu(self.features(x)).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, in_channels, H, W), for torchxrayvision's weights in [-1024, 1024] and 224 px -> logits (B, num_classes)."""
        return self.classifier(self.embed(x))

    @classmethod
    def from_pretrained(cls, source, subfolder: str | None = None, revision: str | None = None,
                        offline: bool = False) -> "DenseNet":
        """A folder, a `.safetensors`, a pickled `.pt` (read without executing it) or a hub id; its tensors tell its shape.

        The hub's `torchxrayvision/densenet121-res224-all` holds a pickled module, `model.pt`.
        """
        path = Path(source).expanduser() / (subfolder or "")
        path = path / "model.pt" if path.is_dir() and not list(path.glob("*.safetensors")) else path
        if str(source) == XRV and not path.exists():
            path = data.hub_file(XRV, "model.pt", revision, offline) or path
        if path.suffix in (".pt", ".pth", ".bin") and path.is_file():
            state = read_pickled_tensors(path)
            print(f"read {path} without executing it; to keep it as safetensors: python evaluate.py convert {path} --out xrv",
                  file=sys.stderr)
        else:
            state = data.read_weights(source, subfolder, revision, offline)[1]
        state.pop("op_threshs", None)  # operating points that some torchxrayvision modules carry along
        if "features.conv0.weight" not in state or "classifier.weight" not in state:
            raise UserError(f"{source}: found keys {sorted(state)[:4]} …, expected a DenseNet's, such as features.conv0.weight")
        width, channels = state["features.conv0.weight"].shape[:2]
        layers = [int(re.search(r"block(\d+)", key)[1]) for key in state if key.endswith("norm1.running_mean")]
        growth = len(state["features.denseblock1.denselayer1.conv2.weight"])
        model = cls(len(state["classifier.weight"]), channels, growth, tuple(layers.count(i) for i in sorted(set(layers))),
                    width)
        return data.load_weights(model, state, source)

    def save_pretrained(self, folder) -> None:
        data.write_weights(folder, {}, self.state_dict(), "model.safetensors")


# ---- A pickled module's tensors, without running it -----------------------------------------------------------------------


class Inert:
    """Stands in for every class and function that a pickle names: calling, filling or restoring it runs nothing."""

    def __new__(cls, *args, **named):
        return object.__new__(cls)

    def __init__(self, *args, **named):
        pass

    def __setstate__(self, state):
        self.__dict__.update(state if type(state) is dict else {})

    def ignore(self, *args):
        pass

    append = extend = add = __setitem__ = ignore


class TensorsOnly(pickle.Unpickler):
    """What torch.load unpickles with, below: it builds tensors, dicts and plain values; all else a pickle names is Inert."""

    def find_class(self, module, name):  # torch.load itself answers for the names of storages
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
            return getattr(torch._utils, name)
        return type(name, (Inert,), {})


def read_pickled_tensors(path) -> dict[str, Tensor]:
    """What torch.save(module) or torch.save(state dict) wrote, in the zip format or the older one -> state dict.

    No code in it runs. Raises UserError where the file is damaged or holds no tensors.
    """
    unpickler = SimpleNamespace(__name__="tensors only", Unpickler=TensorsOnly,
                                load=lambda file, **options: TensorsOnly(file, **options).load())
    try:
        if zipfile.is_zipfile(path) and any(name.endswith("/constants.pkl") for name in zipfile.ZipFile(path).namelist()):
            raise UserError(f"{path} is a TorchScript archive, which is a program; expected a file of torch.save")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the source code of the pickled class is not at hand to compare
            found = torch.load(path, "cpu", pickle_module=unpickler, weights_only=False)
        found = found.get("state_dict", found) if hasattr(found, "get") else found
        state = dict(_named_tensors(found, ""))
    except UserError:
        raise
    except Exception as error:  # a damaged file can raise anything
        raise UserError(f"{path} is damaged or not a file of torch.save ({type(error).__name__}: {error})") from None
    if not state:
        raise UserError(f"{path} holds no tensors; expected a module or a state dict written by torch.save")
    return state


def _named_tensors(found, prefix: str):
    """(key, tensor) of a state dict, or of a stubbed module through its _parameters, _buffers and _modules."""
    is_module = hasattr(found, "_modules")
    for name, tensor in [*found._parameters.items(), *found._buffers.items()] if is_module else found.items():
        if torch.is_tensor(tensor):
            yield prefix + name, tensor.clone()
    for name, child in found._modules.items() if is_module else ():
        yield from _named_tensors(child, f"{prefix}{name}.")


# ---- Distances between image sets (paper 2.4; Heusel et al. 2017, Binkowski et al. 2018, Naeem et al. 2020) ----------------


class Moments:
    """Sums of features and of their products in float64, in `blocks` independent parts: memory (blocks, d, d) at any count.

    The block of an image is a hash of its patient, so resampling blocks is a bootstrap over patients.
    """

    def __init__(self, dim: int, blocks: int = 1):
        self.count, self.sums = torch.zeros(blocks, dtype=torch.float64), torch.zeros(blocks, dim, dtype=torch.float64)
        self.products = torch.zeros(blocks, dim, dim, dtype=torch.float64)

    def add(self, features: Tensor, block=0) -> None:
        """features: (B, d), any float dtype or device; block: int or (B,) ints. Raises UserError on NaN or infinity."""
        features = features.detach().to("cpu", torch.float64)
        if not features.isfinite().all():
            raise UserError(f"{int((~features.isfinite().all(1)).sum())} of {len(features)} images have NaN or infinite features: "
                            "the weights or the samples are broken; no distance can be computed from them")
        block = torch.as_tensor(block).expand(len(features))
        for b in block.unique().tolist():
            rows = features[block == b]
            self.count[b] += len(rows)
            self.sums[b] += rows.sum(0)
            self.products[b] += rows.T @ rows

    def merge(self) -> "Moments":
        """Add up over all ranks, where there are several: then every rank holds the sums of all images."""
        if dist.is_initialized():
            for part in (self.count, self.sums, self.products):
                dist.all_reduce(part)
        return self

    def mean_cov(self, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """-> mean (d,), unbiased covariance (d, d); weights: (blocks,) how often each block counts, default once."""
        w = torch.ones_like(self.count) if weights is None else weights.double()
        n = w @ self.count
        mean = w @ self.sums / n
        return mean, (torch.einsum("k,kij->ij", w, self.products) - n * torch.outer(mean, mean)) / (n - 1)


def frechet_distance(mu1, cov1, mu2, cov2) -> float:
    """|mu1 - mu2|^2 + tr(cov1 + cov2 - 2 sqrt(cov1 cov2)); means (d,), covariances (d, d) -> float. [Heusel eq.6]"""
    mu1, cov1, mu2, cov2 = (torch.as_tensor(np.asarray(v), dtype=torch.float64) for v in (mu1, cov1, mu2, cov2))
    if not all(v.isfinite().all() for v in (mu1, cov1, mu2, cov2)):
        raise UserError("means or covariances with NaN or infinity: the features they come from are broken")
    if mu1.shape != mu2.shape or cov1.shape != cov2.shape or cov1.shape != (len(mu1), len(mu1)):
        raise UserError(f"means {tuple(mu1.shape)}, {tuple(mu2.shape)} and covariances {tuple(cov1.shape)}, {tuple(cov2.shape)}"
                        " do not match: both sets need the features of one protocol")
    # TRAP: cov1 @ cov2 is not symmetric, eigvalsh of it is wrong. With cov1 = L L^T the eigenvalues are those of L^T cov2 L.
    root, failed = torch.linalg.cholesky_ex(cov1)
    if failed:  # singular: fewer images than dimensions
        values, vectors = torch.linalg.eigh(cov1)
        root = vectors * values.clamp(min=0).sqrt()
    cross = torch.linalg.eigvalsh(root.T @ cov2 @ root).clamp(min=0).sqrt().sum()
    return float((mu1 - mu2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross)


def bootstrap_error(first: Moments, second: Moments, resamples: int = 100, seed: int = 0) -> float:
    """Standard error of their Frechet distance: its spread when blocks (patients) are drawn anew, the same ones on both sides.

    CHOICE: the spread, not the quantiles, makes the interval: a resampled set has fewer distinct images, so its own distance is
    biased upwards and the quantiles need not even contain the estimate.
    """
    draws, used, values = torch.Generator().manual_seed(seed), (first.count + second.count).nonzero()[:, 0], []
    for _ in range(resamples):
        drawn = used[torch.randint(len(used), (len(used),), generator=draws)]
        weights = torch.bincount(drawn, minlength=len(first.count)).double()
        if min(weights @ first.count, weights @ second.count) > 1:
            values.append(frechet_distance(*first.mean_cov(weights), *second.mean_cov(weights)))
    return float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")


def _two_sets(*sets) -> list[Tensor]:
    sets = [torch.as_tensor(np.asarray(f), dtype=torch.float64) for f in sets]
    if any(not f.isfinite().all() for f in sets):
        raise UserError("features with NaN or infinity: the weights or the images they come from are broken")
    if sets[0].shape[1] != sets[1].shape[1]:
        raise UserError(f"features of {sets[0].shape[1]} and {sets[1].shape[1]} dimensions: both sets need one protocol")
    return sets


def kernel_distance(f1, f2, with_error: bool = False, paired: bool = False):
    """Kernel distance (KID): unbiased squared MMD, k(x, y) = (x.y / d + 1)^3; f1 (n, d), f2 (m, d) -> float, may be negative.

    CHOICE: all pairs instead of random subsets: the same expectation without their noise; n^2 time, n memory.
    with_error=True -> (distance, standard error), the error by the delta method: 4 var(projection) / n for each set.
    paired: f2[i] was made from f1[i]. TRAP: then the cross mean must leave out (i, i), which are alike, or KID falls below zero.
    """
    f1, f2 = _two_sets(f1, f2)
    kernel = lambda products: (products / f1.shape[1] + 1) ** 3
    mean = lambda a, b: torch.cat([kernel(rows @ b.T).mean(1) for rows in a.split(1024)])
    apart = lambda a, b: (mean(a, b) * len(a) - kernel((a * b).sum(1))) / (len(a) - 1)  # without the diagonal
    cross = apart if paired else mean
    xx, yy, xy, yx = apart(f1, f1), apart(f2, f2), cross(f1, f2), cross(f2, f1)
    distance = float(xx.mean() + yy.mean() - 2 * xy.mean())
    x, y = xx - xy, yy - yx
    error = 2 * math.sqrt((x + y).var() / len(f1) if paired else x.var() / len(f1) + y.var() / len(f2))
    return (distance, error) if with_error else distance


def prdc(real, fake, k: int = 5) -> dict[str, float]:
    """Precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020), by k nearest neighbours.

    real (n, d), fake (m, d), k < n, m -> {"precision", "recall", "density", "coverage"}; by 1,024 rows at a time.
    """
    real, fake = _two_sets(real, fake)
    if k >= min(len(real), len(fake)):
        raise UserError(f"{len(real)} real and {len(fake)} synthetic images, expected more than k = {k} of each")
    distances = lambda a, b: (torch.cdist(rows, b, compute_mode="use_mm_for_euclid_dist") for rows in a.split(1024))
    radius = lambda a: torch.cat([d.kthvalue(k + 1, 1).values for d in distances(a, a)])  # k + 1: the nearest is itself
    real_radius, fake_radius, inside, covered, recalled = radius(real), radius(fake), 0, [], []
    for d, r in zip(distances(real, fake), real_radius.split(1024)):
        near = d < r[:, None]  # (rows, m): fake j lies in the ball of real i
        inside = inside + near.sum(0)
        covered.append(near.any(1))
        recalled.append((d < fake_radius).any(1))
    mean = lambda flags: float(torch.cat(flags).double().mean())
    return {"precision": float((inside > 0).double().mean()), "recall": mean(recalled),
            "density": float(inside.double().mean() / k), "coverage": mean(covered)}


# ---- What is measured on: a run, a labelled set in two parts, and what the two share --------------------------------------


@dataclass
class Trial:
    """A run opened for measuring, and the images that it is measured on."""

    run: dinodiff.Run
    images: data.Images
    seed: int  # of the images, where they are phantoms
    pool: np.ndarray  # indices that may train a classifier
    test: np.ndarray  # indices held out, of other patients
    names: list[str]  # findings
    targets: np.ndarray  # float32 (len(images), findings)
    out: Path
    rank: int
    world: int
    notes: list[str]  # what a reader of the results must know

    def key(self, *values) -> str:
        """A short name for results that these images, their patients and labels, and `values` determine."""
        return digest(self.set_digest, self.run.size, *values)

    @functools.cached_property
    def set_digest(self) -> str:
        world = self.seed if self.images.name == "phantom" else None  # real images are the same whatever the run's seed
        return digest(self.images.name, world, *map(list, (self.images.keys, self.images.patients, self.images.labels)))

    @functools.cached_property
    def generator(self) -> str:
        """Names the training that all checkpoints of the run stem from."""
        config = {k: v for k, v in self.run.config.items() if k not in dinodiff.MAY_CHANGE}
        return digest(config, weights_digest(self.run.vae, self.run.vit))

    def block(self, i: int) -> int:
        """The block of the bootstrap that the patient of image i falls in (the image itself, where its patient is unknown)."""
        name = self.images.patients[i] or f"image {i}"
        return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") % BLOCKS

    def labels(self, indices) -> list[tuple[str, ...]]:
        return [tuple(name for name, y in zip(self.names, row) if y) for row in self.targets[indices]]


def digest(*values) -> str:
    """A short name for values that JSON can hold."""
    return hashlib.blake2b(json.dumps(values, default=str).encode(), digest_size=5).hexdigest()


@functools.lru_cache(maxsize=1)
def weights_digest(*nets: nn.Module) -> str:
    return digest(*(float(p.double().sum()) for net in nets for p in net.parameters()))


def exactly(images, i: int) -> np.ndarray:
    """Image i, uint8 (size, size). Where training takes another image for one that cannot be read, a measurement must not."""
    try:
        return images.read(int(i))
    except data.Unreadable as error:
        raise UserError(f"{images.name}: {error}. Each image counts in a measurement: take this one out of the set, or make "
                        "shards with `data.py prepare`, which leaves such files out") from None


def read(images, indices) -> Tensor:
    """uint8 (n, size, size); several readers at once."""
    with ThreadPoolExecutor(8) as readers:
        return torch.from_numpy(np.stack(list(readers.map(lambda i: exactly(images, i), indices))))


def chunks(items, size: int):
    return (items[i:i + size] for i in range(0, len(items), size))


def seed_of(*values: int) -> int:
    """The seed of one synthetic image, by what it is."""
    return int(hash64(*values) >> np.uint64(2))


def generate_all(run: dinodiff.Run, c: Tensor, seeds: list[int], s: Common) -> Tensor:
    """c (n, S, N), n seeds -> uint8 (n, size, size): each rank makes its share of the images, every rank gets all of them."""
    rank, world = ranks()
    made = torch.zeros(len(c), run.size, run.size, dtype=torch.uint8)
    for rows in chunks(list(range(rank, len(c), world)), s.micro_batch):
        made[rows] = generate(run, c[rows], [seeds[i] for i in rows], s.steps)
    if world > 1:
        dist.all_reduce(made)  # elsewhere zero
    return made


def ranks() -> tuple[int, int]:
    """(rank, world) under torchrun, (0, 1) without."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(days=1))  # one rank may work alone for long
    return rank, world


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def on_first_rank(work: Callable[[], object]) -> None:
    """Let rank 0 do `work` while the others wait; its UserError is raised on all of them."""
    error = [None]
    if ranks()[0] == 0:
        try:
            work()
        except UserError as raised:
            error = [raised]
    if dist.is_initialized():
        dist.broadcast_object_list(error)
    if error[0] is not None:
        raise error[0]


def open_run(folder, step, device: str) -> dinodiff.Run:
    """`load_run`, with its UNet compiled on CUDA."""
    run = load_run(folder, step, device)
    if run.device.type == "cuda":
        run.unet.compile()
    return run


def open_trial(s: Common) -> Trial:
    """Open the run and its test images; UserError where the generator was trained on test patients, unless --as-paper."""
    rank, world = ranks()
    folder = Path(s.run or dinodiff.newest_run())
    if s.checkpoint not in ("newest", "best") and not s.checkpoint.isdigit():
        raise UserError(f"found --checkpoint {s.checkpoint!r}, expected newest, best or a step")
    run = open_run(folder, None if s.checkpoint == "newest" else s.checkpoint, s.device)
    trained_on, seed = run.config["data"], run.config["seed"] + 1  # the seed of phantoms that training never saw
    if not s.data and trained_on != "phantom":
        raise UserError(f"{folder} was trained on {trained_on}: name labelled images that it has not seen, with --data (--labels)")
    images = (data.open_data("phantom", run.size, seed=seed, count=1024) if (s.data or "phantom") == "phantom" else
              data.open_data(s.data, run.size, offline=s.offline, labels=s.labels or None))
    patients, notes = list(images.patients), []
    pool, test = data.split_by_patient(patients, s.held_out, s.seed)
    if any(patients) and all(re.fullmatch(r"p?1\d{7}", p) for p in patients):  # MIMIC-CXR: the paper's own split
        is_test = np.array([data.is_mimic_test(p) for p in patients])
        pool, test = np.flatnonzero(~is_test), np.flatnonzero(is_test)
    if not any(patients):
        notes.append("No patient is known for these images: they are split by image, so a patient may be on both sides.")
    if min(len(pool), len(test)) < 2:
        raise UserError(f"{images.name}: {len(images)} images leave {len(pool)} to train and {len(test)} to test; "
                        "expected more, of several patients; see --held-out")
    names = [n for n in data.label_names(images.labels) if sum(n in images.labels[i] for i in pool) >= s.prevalence * len(pool)]
    targets = np.array([[name in row for name in names] for row in images.labels], np.float32).reshape(len(images), len(names))
    if s.checkpoint == "best":
        notes.append("The checkpoint is the one with the best FID (best.json); if that was measured on these images, they chose it.")
    trial = Trial(run, images, seed, pool, test, names, targets, Path(s.out) if s.out else folder / "eval", rank, world, notes)
    train = training_images(run, notes)
    if train is not None:
        for what, shared in zip(("patients", "images"), shared_with(train, run.config["seed"], images, seed, test, notes)):
            refuse(s, trial, f"{what} of the test part are among those that the generator was trained on", shared)
    return trial


def training_images(run: dinodiff.Run, notes: list[str]):
    """The set that the generator was trained on, or None, with a note, where it is out of reach."""
    try:
        return data.open_data(run.config["data"], run.size, seed=run.config["seed"], offline=True)
    except (UserError, OSError) as error:
        why = str(error).splitlines()[0]
        notes.append(f"The generator's training images are out of reach ({why}): leaks were not looked for.")
        return None


def shared_with(train, train_seed: int, images, seed: int, test, notes: list[str]) -> tuple[list[str], list[str]]:
    """Patients, and file names, of images[test] that are in `train` too; a note where they cannot be compared.

    A file name counts where it is unique in its set ("view1_frontal" says nothing), a patient together with its provider.
    """
    if (images.name == "phantom") != (train.name == "phantom") or images.name == train.name == "phantom" and seed != train_seed:
        return [], []  # imaginary patients are no one else's

    def once(keys):
        stems = collections.Counter(key.rsplit("/", 1)[-1].split(".")[0] for key in keys)
        return {stem for stem, count in stems.items() if count == 1}

    people = lambda ds, rows: {(ds.providers[i], ds.patients[i]) for i in rows if ds.patients[i]}
    trained, tested = people(train, range(len(train))), people(images, test)
    if not trained or not {provider for provider, _ in trained} & {provider for provider, _ in tested}:
        notes.append("The generator's training images and these have no provider with known patients in common: a patient on both "
                     "sides was looked for by file name only.")
    return ([f"{provider}, patient {patient}" for provider, patient in sorted(trained & tested)],
            sorted(once(train.keys) & once(images.keys[i] for i in test)))


def refuse(s: Common, trial: Trial, what: str, shared: list[str]) -> None:
    """Stop where two sides of a split share something; with --as-paper go on, and mark the results."""
    if shared:
        few = ", ".join(shared[:5]) + (" …" if len(shared) > 5 else "")
        if not s.as_paper:
            raise UserError(f"found a leak: {what} ({len(shared)}: {few}). Numbers measured so would flatter. Expected two sides "
                            "that share nobody: give other --data, or --as-paper to let it through and mark the results")
        trial.notes.append(f"MARKED (--as-paper): {what} ({len(shared)}: {few}). These numbers flatter.")


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return [f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows)]


def command_of(name: str, s, folder: Path) -> str:
    """The command line of these settings, in backquotes."""
    base, flags = defaults_for(type(s))(["--run", str(folder)]), ""
    for field in dataclasses.fields(s):
        value = getattr(s, field.name)
        if value != getattr(base, field.name) and field.name != "run":
            words = " ".join(map(str, value)) if type(value) is tuple else f"'{value}'" if type(value) is str else str(value)
            flags += f" --{'no-' * (value is False)}{field.name.replace('_', '-')}" + f" {words}" * (type(value) is not bool)
    return f"`python evaluate.py {name} --run {folder}{flags}`"


def finish(trial: Trial, s: Common, name: str, lines: list[str]) -> str:
    """Write a section of the report, with the notes and the command that makes it again; -> its text."""
    text = "\n".join([*lines, "", *(f"> {note}\n" for note in dict.fromkeys(trial.notes)),
                      command_of(name, s, trial.run.folder), ""])
    if trial.rank == 0:
        data.write_file(trial.out / f"{name}.md", text)
        print(f"\n{text}\n-> {trial.out / name}.md", flush=True)
    barrier()
    return text


# ---- Features, by named protocols (paper 2.4) -----------------------------------------------------------------------------


def xrays(images: Tensor, size: int, scale: float, device) -> Tensor:
    """uint8 (B, S, S) -> (B, 1, size, size) in [-scale, scale], bilinear with antialiasing."""
    x = (images.to(device)[:, None].float() / 127.5 - 1) * scale
    if x.shape[-1] != size:
        x = F.interpolate(x, (size, size), mode="bilinear", antialias=True, align_corners=False)
    return x.contiguous(memory_format=torch.channels_last)


def protocol(s: Common, trial: Trial):
    """-> (name, d, embed), embed(images uint8 (B, S, S)) -> float32 (B, d) on the CPU. Protocols do not compare."""
    device, name = trial.run.device, s.protocol
    if name not in ("auto", "xrv-224", "local", "dino"):
        raise UserError(f"found --protocol {name!r}, expected auto, xrv-224, local or dino")
    if name in ("auto", "xrv-224"):
        try:
            net = DenseNet.from_pretrained(s.xrv, offline=s.offline or name == "auto").to(device).eval()
            # TRAP: torchxrayvision's pixels are in [-1024, 1024], not [-1, 1]
            return "xrv-224", 1024, lambda images: net.embed(xrays(images, 224, 1024.0, device)).float().cpu()
        except UserError:
            if name == "xrv-224" or s.xrv != XRV:
                raise
    if name == "dino" or not trial.names:
        if name == "local":
            raise UserError(f"protocol local trains on labels, {trial.images.name} has none; give --labels, or --protocol dino")
        vit = trial.run.vit  # the generator was conditioned on these very features: good numbers are to be expected
        cls = lambda images: vit.global_tokens(vit.prepare(data.to_model(images.to(device))))[:, 0].float().cpu()
        return "dino", vit.config.hidden_size, cls
    recipe = TINY[Classify] if trial.run.config["preset"] == "tiny" else Classify()
    recipe = dataclasses.replace(recipe, size=min(recipe.size, trial.run.size), epochs=16)
    # Outside of the run folder, so that all runs on this machine are measured with one net
    place = data.cache_folder() / "features" / trial.key("local", trial.names, s.seed, s.held_out, recipe)

    def train_local():
        with data.locked(place):
            if (place / "model.safetensors").is_file():
                return
            pool = trial.pool[:5000]
            train, val = data.split_by_patient([trial.images.patients[i] for i in pool], 0.2, s.seed)
            part = lambda rows: (read(trial.images, pool[rows]).numpy(), trial.targets[pool[rows]])
            net, told = fit(recipe, part(train), part(val), s.seed, device)
            print(f"protocol local: a DenseNet trained on {len(train)} images, {told['epochs']} epochs, "
                  f"validation AUC {told['val']:.3f}")
            net.save_pretrained(place)

    try:
        on_first_rank(train_local)
    except UserError as error:
        if name == "local":
            raise
        trial.notes.append(f"No features from these labels ({error}); those of DINO instead.")
        return protocol(dataclasses.replace(s, protocol="dino"), trial)
    net = DenseNet.from_pretrained(place).to(device, memory_format=torch.channels_last).eval()
    return "local", net.classifier.in_features, lambda images: net.embed(xrays(images, recipe.size, 1.0, device)).float().cpu()


# ---- Frechet distance of checkpoints (paper 2.4, Figure 3) ----------------------------------------------------------------


def gather(trial: Trial, embed, dim: int, rows: np.ndarray, picture, s: Fid) -> tuple[Moments, Tensor]:
    """Features of picture(positions in rows) -> their moments, and those of the first `companions` themselves.

    Each rank takes its share of the rows; every rank gets the sums and features of all.
    """
    moments, kept = Moments(dim, BLOCKS), {}
    for part in chunks(np.arange(len(rows))[trial.rank::trial.world], s.micro_batch):
        features = embed(picture(part))
        moments.add(features, torch.tensor([trial.block(i) for i in rows[part]]))
        kept |= {int(i): row for i, row in zip(part, features) if i < s.companions}
    if dist.is_initialized():
        shares = [None] * trial.world
        dist.all_gather_object(shares, kept)
        kept = {i: row for share in shares for i, row in share.items()}
    return moments.merge(), torch.stack([kept[i] for i in sorted(kept)])


def compare(real: tuple[Moments, Tensor], fake: tuple[Moments, Tensor], s: Fid, paired: bool) -> dict:
    """Every distance of two sets of features, as plain numbers; paired: each fake was made from the real image in its place."""
    kid, kid_error = kernel_distance(real[1], fake[1], True, paired)
    fid, error = frechet_distance(*real[0].mean_cov(), *fake[0].mean_cov()), bootstrap_error(real[0], fake[0], s.resamples)
    return {"fid": fid, "fid_error": error, "fid_95": [max(0.0, fid - 1.96 * error), fid + 1.96 * error], "kid": kid,
            "kid_error": kid_error, **prdc(real[1], fake[1], min(s.neighbours, len(real[1]) - 1, len(fake[1]) - 1))}


@torch.no_grad()
def fid(s: Fid) -> str:
    """Reconstruct each real test image once, compare the sets; two floors; with --checkpoints all Figure 3 and best.json."""
    if s.checkpoints not in ("newest", "all"):
        raise UserError(f"found --checkpoints {s.checkpoints!r}, expected newest or all (one step: --checkpoint STEP)")
    trial = open_trial(s)
    name, d, embed = protocol(s, trial)
    run, images = trial.run, trial.images
    steps = run.checkpoints if s.checkpoints == "all" else [run.step]
    draw = lambda rows, most: rows[np.argsort(hash64(s.seed, 3, rows))][:most]
    test = draw(trial.test, s.count)
    n, others = len(test), draw(trial.pool, len(test))
    score = lambda rows, picture: compare(real, gather(trial, embed, d, rows, picture, s), s, rows is test)
    key = trial.key(trial.generator, name, s.held_out, s.count, s.steps, s.seed, s.companions, s.neighbours, s.resamples, s.xrv)
    path = trial.out / f"fid-{key}.json"
    fresh = {"protocol": name, "images": n, "dimensions": d, "floors": {}, "steps": {}}
    known = json.loads(path.read_text()) if path.is_file() else fresh
    if n < d:
        trial.notes.append(f"{n} images are fewer than {d} dimensions: singular covariances, FID biased upwards; trust KID.")
        print("warning: " + trial.notes[-1], file=sys.stderr)
    real = gather(trial, embed, d, test, lambda part: read(images, test[part]), s)

    def round_trip(part):
        with dinodiff.autocast(run.device, run.config["dtype"]):
            z = run.vae.encode(data.to_model(read(images, test[part]).to(run.device)))[0]
            return data.to_uint8(run.vae.decode(z).float()).cpu()

    if not known["floors"]:
        against = score(others, lambda part: read(images, others[part]))
        known["floors"] = {f"real against real ({len(others)} images of other patients)": against,
                           "VAE round trip of the test images": score(test, round_trip)}
    tokens, seconds = {}, 0.0

    def reconstruct(part):
        nonlocal seconds
        fresh = [i for i in part if i not in tokens]
        if fresh:  # DINO is frozen: one encoding serves every checkpoint
            tokens.update(zip(fresh, encode_tokens(run, read(images, test[fresh])).cpu()))
        clock = time.perf_counter()
        pictures = generate(at, torch.stack([tokens[i] for i in part]), [seed_of(s.seed, 1, int(i)) for i in test[part]],
                            s.steps)
        seconds += time.perf_counter() - clock
        return pictures

    for step in steps:
        if str(step) not in known["steps"]:
            at, seconds = run if step == run.step else open_run(run.folder, step, s.device), 0.0
            known["steps"][str(step)] = score(test, reconstruct)
            if trial.rank == 0:
                rate = -(-n // trial.world) / seconds
                print(f"step {step:,}: FID {known['steps'][str(step)]['fid']:.3f} ({name}), {rate:.1f} images/s a rank",
                      flush=True)
                data.write_json(path, known)
    results = {step: known["steps"][str(step)] for step in steps}
    best = min(results, key=lambda step: results[step]["fid"])
    rows = [(f"step {step:,}" + " (best)" * (step == best and len(steps) > 1), r) for step, r in results.items()]
    lines = [f"## FID and checkpoints (paper 2.4, Figure 3): protocol {name}, n = {n}, d = {d}", ""]
    lines += table(["", "FID", "95 % interval", "KID x 1000 ± SE", "precision", "recall", "density", "coverage"],
                   [[title, f"{r['fid']:.3f}", "{:.3f} – {:.3f}".format(*r["fid_95"]),
                     f"{1000 * r['kid']:.3f} ± {1000 * r['kid_error']:.3f}",
                     *(f"{r[k]:.3f}" for k in ("precision", "recall", "density", "coverage"))]
                    for title, r in [*rows, *known["floors"].items()]])
    lines += ["", f"Each of the {n} test images was reconstructed once ({s.steps} DDIM steps). The interval: 1.96 bootstrap standard "
              "errors, over patients. The paper: 4.7 (DiNOv1, step 80,000), 6.4 (DiNOv2, step 120,000) on 5,000 images of MIMIC-CXR "
              "p19."]
    if s.checkpoints == "all" and trial.rank == 0:
        curve = [[r["fid"] for r in results.values()], [1.96 * r["fid_error"] for r in results.values()]]
        plot_lines(trial.out / "figure3.png", {run.folder.name: (steps, *curve)}, f"FID of {run.folder.name} ({n} images)",
                   "training step", f"FID ({name})", level=(next(iter(known["floors"].values()))["fid"], "floor: real against real"))
        lines += ["", "![FID by training step](figure3.png)"]
        data.write_json(run.folder / "best.json", {"step": best, "fid": results[best]["fid"], "protocol": name, "images": n,
                                                   "steps": {str(step): r["fid"] for step, r in results.items()}})
    return finish(trial, s, "fid", lines)


# ---- Training a classifier (paper 2.5) ------------------------------------------------------------------------------------


def label_aucs(targets: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Area under the ROC curve of each label, (n, L) each -> (L,); NaN where the label has one class only. Ties count half."""
    from scipy.stats import rankdata
    positive = np.asarray(targets) > 0.5
    p, n = positive.sum(0), (~positive).sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where((p > 0) & (n > 0), ((rankdata(scores, axis=0) * positive).sum(0) - p * (p + 1) / 2) / (p * n), np.nan)


@torch.no_grad()
def predict(net: DenseNet, pixels: np.ndarray, size: int, device) -> np.ndarray:
    """uint8 (n, S, S) -> logits (n, L)."""
    net.eval()
    return np.concatenate([net(xrays(torch.from_numpy(part), size, 1.0, device)).float().cpu().numpy()
                           for part in chunks(pixels, 256)])


@torch.enable_grad()  # whatever the caller does
def fit(s: Classify, train, val, seed: int, device, steps_an_epoch: int = 0) -> tuple[DenseNet, dict]:
    """The paper's recipe: AdamW, lr / 10 on a plateau of the validation AUC, early stopping; the best epoch's weights are kept.

    train, val: (images, targets float32 (n, L)), images[rows] -> uint8 (b, S, S). UserError where val has one class only.
    """
    images, targets = train
    if min(len(targets), len(val[1])) < 2:
        raise UserError(f"{len(targets)} images to train on and {len(val[1])} to validate on, expected at least 2 of each; take more "
                        "images, of more patients")
    if not np.isfinite(label_aucs(val[1], np.zeros_like(val[1]))).any():
        raise UserError(f"each finding is in all or in none of the {len(val[1])} validation images (one class only): "
                        "an AUC needs both; take more images or fewer folds")
    torch.manual_seed(seed)
    net = DenseNet(targets.shape[1], 1, s.growth, s.blocks, s.width)
    if s.init:
        state = DenseNet.from_pretrained(s.init, offline=s.offline).state_dict()
        state["features.conv0.weight"] = state["features.conv0.weight"].sum(1, keepdim=True)  # three equal colours make a grey
        data.load_weights(net, state | {k: v for k, v in net.state_dict().items() if k.startswith("classifier")}, s.init)
    net = net.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), s.lr, weight_decay=s.weight_decay, fused=True)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", factor=0.1, patience=s.patience)
    n, best, best_epoch, kept = len(targets), -1.0, 0, None
    count = steps_an_epoch or -(-n // s.batch)
    shown = count * min(s.batch, n) if steps_an_epoch else n  # images an epoch
    rounds = -(-shown // n)
    for epoch in range(s.epochs):
        net.train()
        passes = range(epoch * rounds, (epoch + 1) * rounds)  # over the images: each shows them otherwise augmented
        order = np.concatenate([np.random.default_rng((seed, k)).permutation(n) for k in passes])[:shown]
        places = np.array_split(np.arange(shown), count)  # near-equal batches: none of one image, which batch norm could not take
        for rows, at in ((order[part], passes[0] + part // n) for part in places):
            x = data.augment(torch.from_numpy(images[rows]).to(device), rows, at, seed)
            if x.shape[-1] != s.size:
                x = F.interpolate(x, (s.size, s.size), mode="bilinear", antialias=True, align_corners=False)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits = net(x.contiguous(memory_format=torch.channels_last))
            loss = F.binary_cross_entropy_with_logits(logits.float(), torch.from_numpy(targets[rows]).to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        auc = float(np.nanmean(label_aucs(val[1], predict(net, val[0], s.size, device))))
        plateau.step(auc)
        if auc > best:
            best, best_epoch, kept = auc, epoch, {k: v.clone() for k, v in net.state_dict().items()}
        elif epoch - best_epoch >= s.stop and not steps_an_epoch:
            break
    if kept is None:
        raise UserError(f"the validation AUC was never a number; lower --lr (now {s.lr:g})")
    net.load_state_dict(kept)
    return net.eval(), {"val": best, "epochs": epoch + 1, "best_epoch": best_epoch + 1, "steps": count * (epoch + 1),
                        "train": n}


# ---- Classification experiments (paper 2.4, Table 1, Figure 4) ------------------------------------------------------------


def interpolation_pairs(targets, fold: np.ndarray, wanted: dict[int, int], seed: int) -> list[tuple[int, int, float]]:
    """Pairs (i, j, r) of images that share a label, until each training part (all folds but k) holds wanted[k] pairs inside it.

    targets: (n, L) of 0 and 1; fold: (n,) int. Every admissible pair, in random order, comes once before any comes again, then
    with another r. CHOICE: r is uniform in [0, 1]; the pairs that a training part uses never touch its validation fold.
    """
    has, fold = np.asarray(targets, np.float32), np.asarray(fold)
    pairs = np.argwhere(np.triu(has @ has.T > 0, 1))
    inside = np.stack([(fold[pairs] != k).all(1) for k in wanted])  # (training parts, pairs)
    asked, got, result = np.array(list(wanted.values())), np.zeros(len(wanted), int), []
    if (~inside.any(1) & (asked > 0)).any():
        which = list(wanted)[int((~inside.any(1)).argmax())]
        raise UserError(f"found no two images outside fold {which} that share a finding, so there is nothing to interpolate "
                        "between; take a larger N")
    for again in itertools.count():
        order = np.argsort(hash64(seed, again, np.arange(len(pairs))))
        counts = got[:, None] + np.cumsum(inside[:, order], 1)
        enough = (counts >= asked[:, None]).all(0)
        order = order[:int(enough.argmax()) + 1] if enough.any() else order
        result += [(int(i), int(j), float(r)) for (i, j), r in zip(pairs[order], data.uniforms(1, seed, again, 1, order)[:, 0])]
        if enough.any():
            return result
        got = counts[:, -1]


def nearer_label(targets, pairs) -> np.ndarray:
    """The labels of each pair (i, j, r): those of the end that r is nearer to."""
    return np.asarray(targets)[[i if r < 0.5 else j for i, j, r in pairs]]


def synthesise(s: Classify, trial: Trial, subset: np.ndarray, pairs: list, name: str) -> data.Images:
    """Images of lerp(c_i, c_j, r) for each (i, j, r), positions in `subset`, as tar shards, made once; a killed run goes on."""
    run, tokens, clock, made = trial.run, {}, time.perf_counter(), 0
    key = trial.key(trial.generator, run.step, name, s.steps, s.seed, s.held_out, s.prevalence, s.sizes, s.folds, s.per_shard)
    folder = trial.out / "synthetic" / f"{name}-{key}"
    ends = np.array([i if r < 0.5 else j for i, j, r in pairs])
    labels, patients = trial.labels(subset[ends]), [trial.images.patients[i] for i in subset[ends]]
    bar = data.progress(desc=f"sampling {name}", total=len(pairs), unit=" images")
    for k in range(trial.rank, -(-len(pairs) // s.per_shard), trial.world):
        numbers, path = range(len(pairs))[k * s.per_shard:(k + 1) * s.per_shard], folder / f"shard-{k:06d}.tar"
        if path.is_file() and len(data.scan_shard(path)[0]) == len(numbers):
            bar.update(len(numbers))
            continue
        folder.mkdir(parents=True, exist_ok=True)
        for fresh in chunks(sorted({p for n in numbers for p in pairs[n][:2]} - tokens.keys()), s.micro_batch):
            tokens |= zip(fresh, encode_tokens(run, read(trial.images, subset[fresh])).cpu())
        files, rows = [], {}
        for some in chunks(numbers, s.micro_batch):
            c = torch.stack([torch.lerp(tokens[pairs[n][0]], tokens[pairs[n][1]], pairs[n][2]) for n in some])
            for n, picture in zip(some, generate(run, c, [seed_of(s.seed, 2, n) for n in some], s.steps).numpy()):
                file, png = "{:07d}-{}-{}-{:.3f}.png".format(n, *pairs[n]), io.BytesIO()
                Image.fromarray(picture).save(png, "PNG")
                files.append(((k, file, name), (png.getvalue(), "")))
                rows[file] = patients[n], labels[n]
            bar.update(len(some))
        made += len(numbers)
        data._write_shard(path, files, rows, f"synthetic {name}", data.Prepare(source=name, size=run.size))
        os.replace(path.with_name(f".{path.name}.partial"), path)
    bar.close()
    barrier()
    if made:
        print(f"{name}: {len(pairs)} images in {folder}, {made / (time.perf_counter() - clock):.1f} images/s on this rank",
              flush=True)
    return data.open_data(str(folder / "*.tar"), run.size)


def stored_pixels(images, indices, size: int, path: Path, rank: int) -> Path:
    """The images at the classifier's size as one memory-mapped uint8 (n, size, size) file: decoded once, in memory never."""
    if rank == 0 and not (path.is_file() and len(np.load(path, mmap_mode="r")) == len(indices)):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        array = np.lib.format.open_memmap(partial, "w+", np.uint8, (len(indices), size, size))
        with ThreadPoolExecutor(8) as readers:
            for n, image in enumerate(readers.map(lambda i: data.resize(exactly(images, i), size), indices)):
                array[n] = image
        array.flush()
        os.replace(partial, path)
    barrier()
    return path


class Rows:
    """Rows of several pixel files ((path, rows), …) under one index: Rows(parts)[indices] -> uint8 (n, size, size)."""

    def __init__(self, *parts):
        self.where = [(np.load(path, mmap_mode="r"), row) for path, rows in parts for row in rows]

    def __getitem__(self, indices) -> np.ndarray:
        return np.stack([self.where[i][0][self.where[i][1]] for i in indices])


@dataclass(frozen=True)
class Fold:
    """One training of one cell: what a worker process needs, and where its result goes. Parts are (pixel file, rows)."""

    path: Path
    settings: Classify
    train: tuple
    targets: np.ndarray
    val: tuple
    val_targets: np.ndarray
    test: tuple
    test_targets: np.ndarray
    seed: int
    steps_an_epoch: int
    device: str


def train_fold(job: Fold) -> str:
    """Train one fold of one cell and write its scores; -> what went wrong, or nothing."""
    whole, device = lambda part: Rows(part)[range(len(part[1]))], torch.device(job.device)
    try:
        net, told = fit(job.settings, (Rows(*job.train), job.targets), (whole(job.val), job.val_targets), job.seed, device,
                        job.steps_an_epoch)
        aucs = label_aucs(job.test_targets, predict(net, whole(job.test), job.settings.size, device))
        result = {"auc": float(np.nanmean(aucs)), "labels": [None if np.isnan(a) else float(a) for a in aucs], **told}
    except UserError as error:
        result = {"error": str(error)}
    data.write_json(job.path, result)
    return result.get("error", "")


def train_all(jobs: list[Fold], trial: Trial) -> None:
    """On a GPU, or on one rank of many, one after another; on a CPU alone, one process a core, each of one thread."""
    alone = trial.run.device.type == "cpu" and trial.world == 1 and data.cores() > 1 and len(jobs) > 3
    # TRAP: not by fork: the parent has run OpenMP and autograd threads, which a forked child would wait for
    with data.process_pool(start="spawn") if alone else contextlib.nullcontext() as pool:
        errors = pool.map(train_fold, jobs) if pool else map(train_fold, jobs)
        for error in data.progress(errors, "training classifiers", len(jobs), " folds"):
            if error:
                print(f"a training was left out: {error}", file=sys.stderr)


def paired_tests(scores, baseline, test_share: float) -> tuple[float, float]:
    """Two-sided p of the paired t-test, and of Nadeau and Bengio's (2003), with variance (1/k + test_share) s^2, not s^2 / k.

    test_share: validation images over training images of a fold, 1 / (folds - 1): the training sets overlap.
    CHOICE: with 5 folds a Wilcoxon test cannot reach 0.05, so the paper's unnamed test is taken for the t-test.
    """
    from scipy.stats import t
    difference = np.asarray(scores, float) - np.asarray(baseline, float)
    k, mean, sd = len(difference), abs(difference.mean()), difference.std(ddof=1)
    if sd == 0:
        return (float(mean == 0),) * 2
    return tuple(float(2 * t.sf(mean / (sd * math.sqrt(share)), k - 1)) for share in (1 / k, 1 / k + test_share))


def holm(p_values) -> list[float]:
    """Holm's step-down correction: the i-th smallest of m p-values times m - i + 1, never falling, at most 1."""
    p = np.asarray(p_values, float)
    order, adjusted = np.argsort(p), np.empty(len(p))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted.tolist()


EPOCHS = {True: "Every cell of a column trains for as many optimizer steps.",
          False: "An epoch is one pass over the data, as in the paper, so cells with more images also make more optimizer "
                 "steps; --equal-steps makes them equal."}
EXPERIMENTS = {"augment": "(a) data augmentation", "synthetic": "(b) full synthetic training"}


def classify(s: Classify) -> str:
    """Table 1 and Figure 4: real only, real with synthetic, synthetic only; by strategy, ratio and number of real images."""
    unknown = [v for v in s.strategies if v not in ("reconstruct", "interpolate")]
    if unknown or min(s.ratios) < 1 or s.folds < 2:
        raise UserError(f"found --strategies {s.strategies} --ratios {s.ratios} --folds {s.folds}, expected reconstruct and/or "
                        "interpolate, ratios of at least 1, at least 2 folds")
    trial = open_trial(s)
    if not trial.names:
        raise UserError(f"{trial.images.name} has no labels, expected findings: give --labels file.csv (file,patient,labels)")
    s = dataclasses.replace(s, size=min(s.size, trial.run.size))
    about = {"sizes": (), "ratios": (), "strategies": (), "out": "", "run": "", "micro_batch": 0}
    cells = trial.out / "classify" / trial.key(trial.generator, trial.run.step, dataclasses.replace(s, **about))
    picks = data.balanced_subsets(trial.labels(trial.pool), s.sizes, s.seed)
    most, ratio_most = max(picks), max(s.ratios)
    subset = trial.pool[picks[most]]  # the subset of each smaller N is its beginning
    constant = [name for name, all_have in zip(trial.names, trial.targets[subset].all(0)) if all_have]
    if constant:  # a subset is drawn from images with findings, so this happens to a finding that goes with all others
        trial.notes.append(f"{', '.join(constant)}: in all of the {most} real images, so nothing can be learned of it here.")
    stored = lambda name, images, indices: stored_pixels(images, indices, s.size, cells / f"{name}.npy", trial.rank)
    real, test = stored(f"real-{most}", trial.images, subset), stored("test", trial.images, trial.test)
    y, y_test, fold = trial.targets[subset], trial.targets[trial.test], {n: np.empty(n, int) for n in picks}
    for n in picks:
        patients = [trial.images.patients[i] for i in subset[:n]]
        for k, members in enumerate(data.folds_by_patient(patients, trial.labels(subset[:n]), s.folds, s.seed)):
            fold[n][members] = k

    if not np.isfinite(label_aucs(y_test, np.zeros_like(y_test))).any():
        raise UserError(f"each finding is in all or in none of the {len(y_test)} test images, expected both kinds; see --held-out")

    made = {}  # (strategy, N) -> pixel file, ends (m, 2), labels; reconstructions are "pairs" (i, i, 0), variant after variant
    for strategy in s.strategies:
        for n in picks if strategy == "interpolate" else [most]:
            wanted = {k: int((fold[n] != k).sum()) * ratio_most for k in range(s.folds)}
            pairs = (interpolation_pairs(y[:n], fold[n], wanted, s.seed) if strategy == "interpolate" else
                     [(i, i, 0.0) for _ in range(ratio_most) for i in range(n)])
            file = stored(f"{strategy}-{n}-{ratio_most}", images := synthesise(s, trial, subset, pairs, f"{strategy}-{n}"),
                          range(len(images)))
            for size in picks if strategy == "reconstruct" else [n]:
                made[strategy, size] = file, np.array([p[:2] for p in pairs]), nearer_label(y, pairs)

    names = [("real", "only", 0), *itertools.product(EXPERIMENTS, s.strategies, s.ratios)]
    jobs = []
    for n, (experiment, strategy, ratio), k in itertools.product(picks, names, range(s.folds)):
        train, val = np.flatnonzero(fold[n] != k), np.flatnonzero(fold[n] == k)
        parts, targets = ([], []) if experiment == "synthetic" else ([(real, train)], [y[train]])
        if ratio:  # the first ratio * n synthetic images whose sources all train: 1:50 contains 1:10, nothing stems from `val`
            file, ends, labels = made[strategy, n]
            rows = np.flatnonzero(np.isin(ends, train).all(1))[:ratio * len(train)]
            parts, targets = [*parts, (file, rows)], [*targets, labels[rows]]
        steps = -(-len(train) * (1 + ratio_most) // s.batch) if s.equal_steps else 0
        jobs.append(Fold(cells / f"N{n}-{experiment}-{strategy}-{ratio}-fold{k}.json", s, tuple(parts), np.concatenate(targets),
                         (real, val), y[val], (test, np.arange(len(y_test))), y_test, seed_of(s.seed, n, k) % 2**31, steps,
                         str(trial.run.device)))
    # TRAP: shared out first, then looked at: another rank may have written some by now, and the lists would differ
    train_all([job for job in jobs[trial.rank::trial.world] if not job.path.is_file()], trial)
    barrier()
    return finish(trial, s, "classify", table_1(s, trial, cells, list(picks), names) if trial.rank == 0 else [])


def table_1(s: Classify, trial: Trial, cells: Path, sizes: list[int], names: list[tuple]) -> list[str]:
    """Collect the cells, test them, write table1.json and the bars of Figure 4; -> the lines of the section."""
    results = {}
    for n in sizes:
        for cell in names:
            folds = [json.loads((cells / f"N{n}-{'-'.join(map(str, cell))}-fold{k}.json").read_text()) for k in range(s.folds)]
            bad = [f["error"] for f in folds if "error" in f]
            if bad:
                trial.notes.append(f"N = {n}, {' '.join(map(str, cell))}: {len(bad)} of {s.folds} folds left out: {bad[0]}")
            scores, base = [f.get("auc") for f in folds], results.get((n, names[0]), {}).get("scores", [])
            valid, both = [a for a in scores if a is not None], [(a, b) for a, b in zip(scores, base) if None not in (a, b)]
            p, corrected = paired_tests(*zip(*both), 1 / (s.folds - 1)) if len(both) > 1 else (None, None)
            results[n, cell] = {"N": n, "experiment": cell[0], "strategy": cell[1], "ratio": cell[2], "scores": scores, "p": p,
                                "p_corrected": corrected, "mean": float(np.mean(valid)) if valid else None,
                                "sd": float(np.std(valid, ddof=1)) if len(valid) > 1 else 0.0, "folds": folds}
        column = [results[n, cell] for cell in names if results[n, cell]["p"] is not None]
        for kind in ("p", "p_corrected"):
            for r, adjusted in zip(column, holm([r[kind] for r in column])):
                r[f"{kind}_holm"] = adjusted
    below = lambda r, kind: r.get(kind) is not None and r[kind] < 0.05
    mark = lambda r: "*" * below(r, "p") + "†" * below(r, "p_corrected_holm")
    show = lambda r: "–" if r["mean"] is None else f"{r['mean']:.3f} ± {r['sd']:.3f} {mark(r)}".strip()
    title = {"real": "real only", **EXPERIMENTS}
    lines = ["## Classification (paper 2.4, Table 1, Figure 4)", "",
             f"Macro AUC over {len(trial.names)} findings ({', '.join(trial.names)}) on {len(trial.test)} held-out images, "
             f"mean ± SD over {s.folds} folds; run {trial.run.folder.name}, step {trial.run.step:,}. " +
             EPOCHS[s.equal_steps], ""]
    lines += table(["", "strategy", "real : synthetic", *(f"N = {n}" for n in sizes)],
                   [[title[c[0]], c[1], f"1 : {c[2]}", *(show(results[n, c]) for n in sizes)] for c in names])
    lines += ["", "\\* p < 0.05 in the paired t-test against real only, as in the paper; † also with Nadeau and Bengio's "
              "correction and Holm's over the column. The paper's own table: docs/paper_table1.md.", ""]
    data.write_json(trial.out / "table1.json", {"settings": dataclasses.asdict(s), "findings": trial.names,
                                                "run": str(trial.run.folder), "step": trial.run.step,
                                                "test_images": len(trial.test), "notes": trial.notes,
                                                "cells": list(results.values())})
    for letter, experiment in zip("ab", EXPERIMENTS):
        bar = lambda r, base: (100 * (r["mean"] / base - 1), 100 * r["sd"] / base,
                               "*" * below(r, "p") + "*" * below(r, "p_corrected_holm"))
        groups = {f"N = {n}": {f"{c[1]} 1:{c[2]}": bar(results[n, c], results[n, names[0]]["mean"]) for c in names
                               if c[0] == experiment and results[n, c]["mean"]} for n in sizes if results[n, names[0]]["mean"]}
        if any(groups.values()):
            plot_bars(trial.out / f"figure4{letter}.png", groups, f"{EXPERIMENTS[experiment]}: change of AUC against real only",
                      "change of mean AUC (%)", "real images; * p < 0.05, ** also with both corrections")
            lines += [f"![Figure 4{letter}](figure4{letter}.png)", ""]
    return lines


# ---- Audit: copies of training images, and what the splits share ----------------------------------------------------------


def thumbnails(images: Tensor, side: int = 32) -> Tensor:
    """uint8 (B, S, S) -> (B, side^2), mean 0 and length 1: the product of two is their correlation."""
    x = F.interpolate(images[:, None].float(), (side, side), mode="bilinear", antialias=True).flatten(1)
    return F.normalize(x - x.mean(1, keepdim=True), dim=1)


def nearest(queries: Tensor, bank: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(q, d), (n, d) -> Euclidean distance (q,) to the nearest row of `bank`, and its index (q,); in blocks."""
    values, indices = zip(*(torch.cdist(part, bank).min(1) for part in queries.split(512)))
    return torch.cat(values).numpy(), torch.cat(indices).numpy()


def spread(rows: np.ndarray, count: int) -> np.ndarray:
    """`count` of the rows, evenly spaced; all where there are fewer."""
    return rows[np.unique(np.linspace(0, len(rows) - 1, min(len(rows), count)).astype(int))]


@torch.no_grad()
def audit(s: Audit) -> str:
    """Is a synthetic image nearer to a training image than unseen real ones are? Do the splits share copies?"""
    trial = open_trial(s)
    run, images, train = trial.run, trial.images, training_images(trial.run, trial.notes)
    if train is None:
        raise UserError(f"the training images of {run.folder} ({run.config['data']}) are out of reach, expected them for a search")
    name, _, embed = protocol(s, trial)
    pixels, features = spaces = "pixels, 32 px", f"features, {name}"
    both = lambda pictures: dict(zip(spaces, map(torch.cat, zip(*((thumbnails(p), embed(p)) for p in pictures)))))
    trained, test = spread(np.arange(len(train)), s.train_images), spread(trial.test, 4 * s.count)
    parts = data.progress([trained[k:k + 256] for k in range(0, len(trained), 256)], "reading training images", unit=" x 256")
    bank = both(torch.from_numpy(np.stack([train[int(i)] for i in part])) for part in parts)
    unseen = both(read(images, part) for part in chunks(test, 256))
    calibration = {space: nearest(unseen[space], bank[space])[0] for space in spaces}
    rows = [[space, "unseen real images", len(test), f"{np.median(calibration[space]):.3f}", "5 %", "0.50", "", ""]
            for space in spaces]
    record, shown, captions, titles = {}, [], [], []
    conditions = {"training images": (train, trained, bank), "unseen images": (images, test, unseen)}
    for kind, (source, known, embeddings) in conditions.items():
        picked = spread(known, s.count)
        c = torch.cat([encode_tokens(run, read(source, part)) for part in chunks(picked, s.micro_batch)])
        made = generate_all(run, c, [seed_of(s.seed, 4, int(i)) for i in picked], s)
        for space, embedded in both(made.split(256)).items():
            distance, index = nearest(embedded, bank[space])
            closer = float((distance < np.quantile(calibration[space], 0.05)).mean())
            difference = calibration[space] - distance[:, None]
            chance = float((difference > 0).mean() + (difference == 0).mean() / 2)
            own = float((trained[index] == picked).mean()) if source is train else None
            to_source = torch.cdist(embedded, embeddings[space][np.searchsorted(known, picked)])  # (reconstructions, sources)
            margin = to_source - to_source.diagonal()[:, None]
            obeys = float(((margin > 0).sum() + (margin == 0).sum() / 2 - len(made) / 2) / (len(made) * max(len(made) - 1, 1)))
            rows.append([space, f"reconstructions of {kind}", len(made), f"{np.median(distance):.3f}", f"{100 * closer:.0f} %",
                         f"{chance:.2f}", "" if own is None else f"{100 * own:.0f} %", f"{obeys:.2f}"])
            record[f"{kind}; {space}"] = {"nearer_than_95_percent_of_real": closer, "chance_nearer_than_real": chance,
                                          "own_source": own, "nearer_to_its_source_than_to_another": obeys}
            closest = np.argsort(distance)[:s.pairs]
            shown += [small(made[q].numpy()) for q in closest] + [small(train[int(trained[index[q]])]) for q in closest]
            captions += [f"distance {distance[q]:.3f}" for q in closest] + [train.keys[int(trained[index[q]])] for q in closest]
            titles += [f"{kind}: synthetic ({space})", "its nearest training image"]
    pool, copies = spread(trial.pool, s.train_images), {}
    for what, side, keys in (("the generator's training images", bank[pixels], [train.keys[int(i)] for i in trained]),
                             ("the classifier's training part",
                              torch.cat([thumbnails(read(images, part)) for part in chunks(pool, 256)]),
                              [images.keys[int(i)] for i in pool])):
        distance, index = nearest(unseen[pixels], side)
        hits = np.flatnonzero(1 - distance**2 / 2 >= s.copy)  # |a - b|² = 2 - 2 a·b
        copies[what] = [f"{images.keys[int(test[q])]} = {keys[index[q]]}" for q in hits]
    lines = ["## Audit: copies and leaks", ""]
    lines += table(["distance in", "images", "n", "median distance to the nearest training image",
                    "share nearer than 95 % of unseen real images", "chance of being nearer than an unseen real one",
                    "nearest is its own source", "chance of being nearer to its source than to another's"], rows)
    lines += ["", f"{len(trained):,} of {len(train):,} training images were searched. A model that copies its training images shows "
              "far more than 5 % and a chance far above 0.50. In the last column 0.50 is a model that ignores its condition.", "",
              "![closest pairs](audit.png)", "",
              "Ledger of the splits: patients are kept apart (what could not be checked is noted below). Copies, which correlate "
              f"by {s.copy} or more at 32 px, of {len(test)} test images: " +
              "; ".join(f"{len(found)} among {what}" + f" ({', '.join(found[:5])})" * bool(found)
                        for what, found in copies.items()) + "."]
    if trial.rank == 0:
        data.save_png(trial.out / "audit.png", data.grid(shown, s.pairs, captions, titles,
                                                         f"{run.folder.name}, step {run.step:,}: the closest pairs"))
        data.write_json(trial.out / "audit.json", {"settings": dataclasses.asdict(s), "results": record, "copies": copies,
                                                   "notes": trial.notes})
    leaks = [(f"test images are copies of {what}", found) for what, found in copies.items()]
    for what, found in leaks if s.as_paper else ():
        refuse(s, trial, what, found)
    text = finish(trial, s, "audit", lines)  # written first: what was computed stays
    for what, found in () if s.as_paper else leaks:
        refuse(s, trial, what, found)
    return text


def small(image: np.ndarray, most: int = 256) -> np.ndarray:
    """At most `most` pixels a side, for a picture of many."""
    return image if len(image) <= most else data.resize(image, most)


# ---- Zero-shot lung segmentation (paper 2.4, Table 2, Figures 5 and 9–12) -------------------------------------------------

PAPER_DICE = {  # Table 2 of the paper: mean and SD of Dice in %
    "paper: Stable Diffusion 1.5 (t 300, M 32, tau 0.5)":
        {"shenzhen": (80.7, 15.9), "jsrt": (80.9, 12.1), "montgomery": (77.3, 8.8), "combined": (80.3, 14.2)},
    "paper: DiNOv1-Diffusion (t 300, M 16, tau 0.05)":
        {"shenzhen": (84.2, 10.5), "jsrt": (88.4, 6.8), "montgomery": (78.3, 8.6), "combined": (84.4, 9.9)},
    "paper: DiNOv2-Diffusion (t 300, M 16, tau 0.05)":
        {"shenzhen": (82.3, 15.7), "jsrt": (84.7, 11.3), "montgomery": (87.1, 3.4), "combined": (83.6, 13.6)},
    "paper: fully supervised (other works)": {"shenzhen": (98.3, None), "jsrt": (97.9, None), "montgomery": (97.7, None)}}
PAPER_SETS = {"shenzhen": "shenzhen|china", "jsrt": "jsrt", "montgomery": "montgomery"}  # and what folders of them are called
ORACLE, RULE, BELIEF = 0, 1, 2  # columns of scores: Dice of either selection, and what the rule alone can see of its own
OWN_TAU = (0.3, 0.4, 0.5, 0.6)  # CHOICE: taus of an image without any mask: these parts of the median divergence of its maps


@dataclass
class SegmentSettings:
    """Settings of `python evaluate.py segment`."""

    run: str = ""  # run folder, the newest one when empty
    data: tuple[str, ...] = ("phantom",)  # folders with lung masks, or phantom: patients that training never saw
    checkpoints: tuple[str, ...] = ("all",)  # all, newest, best, or steps
    timesteps: tuple[int, ...] = (50, 100, 300, 500, 700)  # t of the pass; the one nearest 300 is the base
    thresholds: tuple[float, ...] = (0.001, 0.002, 0.004, 0.008, 0.016, 0.03, 0.05, 0.07, 0.1, 0.2, 0.5, 1.0)  # tau of merging
    grids: tuple[int, ...] = (16,)  # M, anchors a side; the first one is the base
    last: tuple[int, ...] = (2,)  # further rows from only so many attention maps, those nearest the output
    limit: int = 32  # images of each set, evenly spaced; 0: all
    init: str = ""  # another UNet in a row of its own: sd15, a folder or a hub id; it must fit the run's latents
    context: str = "empty"  # its tokens: empty (zeros), or a safetensors file with a tensor `context` (S, N)
    noise: bool = False  # add the noise of t to the latent
    maps: bool = True  # keep the aggregated attention in the run's eval/cache for a next time
    seed: int = 0  # of the split into halves, the noise and the untrained network
    device: str = "auto"  # auto, cpu or cuda
    out: str = ""  # folder of the results, the run's eval/ when empty


def otsu(values: np.ndarray) -> int:
    """uint8 values -> the threshold t that separates <= t from > t with the largest variance between classes [Otsu 1979]."""
    counts = np.bincount(values.ravel(), minlength=256).astype(float)
    below, moment = counts.cumsum(), (counts * np.arange(256)).cumsum()
    with np.errstate(invalid="ignore", divide="ignore"):
        between = (moment[-1] * below / below[-1] - moment) ** 2 / (below * (below[-1] - below))
    return int(np.nan_to_num(between).argmax())


def otsu_lungs(image: np.ndarray) -> np.ndarray:
    """The floor without a network: the two largest dark regions of the picture's central 80 %. bool (size, size)."""
    rim = len(image) // 10
    centre = image[rim:len(image) - rim, rim:len(image) - rim]
    regions, count = ndimage.label(centre <= otsu(centre))
    areas = np.bincount(regions.ravel(), minlength=count + 1)
    return np.pad(np.isin(regions, [k for k in areas[1:].argsort()[-2:] + 1 if areas[k]]), rim)


def expected_lungs(image: np.ndarray) -> np.ndarray:
    """What anyone knows of a frontal chest X-ray before looking closely, as weights in [0, 1] (2, size, size).

    Position, size and symmetry: two upright ellipses, mirror images, 0.45 of the half-width off the middle and 0.15 above it,
    with semi-axes 0.36 and 0.7 and a soft rim. Darkness: air is darker than the mean under them. No mask is read. The
    numbers are round ones, chosen once after looking at where lungs lie in phantoms and public sets; so is OWN_TAU.
    """
    v, u = np.mgrid[-1:1:1j * len(image), -1:1:1j * len(image)]
    place = np.stack([np.clip((1.3 - np.hypot((u - side * 0.45) / 0.36, (v + 0.15) / 0.7)) / 0.6, 0, 1) for side in (-1, 1)])
    smooth = ndimage.gaussian_filter(image.astype(float), len(image) / 64)
    weight = place.sum(0)
    mean, spread = (weight * smooth).sum() / weight.sum(), smooth.std() + 1e-6
    return place / (1 + np.exp((smooth - mean - 0.3 * spread) / (0.25 * spread)))


def candidates(labels: np.ndarray) -> np.ndarray:
    """Labels (size, size) -> (K, size²) float32 of 0 and 1: every segment, and every connected part of one that has several.

    CHOICE: attention often gives both lungs one label, so parts stand beside wholes; a lung has over 1 % of the picture.
    """
    pool, least = [], labels.size / 100
    for k in np.flatnonzero(np.bincount(labels.ravel()) > least):
        parts, count = ndimage.label(labels == k)
        large = np.flatnonzero(np.bincount(parts.ravel())[1:] > least) + 1
        pool += ([labels == k] if count > 1 else []) + [parts == p for p in large]
    return np.stack(pool or [labels >= 0]).reshape(-1, labels.size).astype(np.float32)


def select(pool: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, float]:
    """Non-maximum suppression: candidates (K, P) against two lungs (2, P), bool or weights -> chosen union (P,) bool, its Dice.

    Greedy by Dice with one lung, the other or both: the best candidate is taken, what overlaps it is suppressed, the lungs that
    it serves are done; so there is at most one candidate a lung. With the true masks this is the paper's *oracle* selection,
    with `expected_lungs` it is a rule that never sees the truth. CHOICE: below a Dice of 0.2 nothing is taken.
    """
    target = np.concatenate([target, target.max(0, keepdims=True)]).astype(np.float32)  # left, right, both
    product = lambda a, b: torch.mm(torch.from_numpy(a), torch.from_numpy(b).T).numpy()  # NumPy's would start threads in threads
    dice = 2 * product(pool, target) / (pool.sum(1)[:, None] + target.sum(1))
    chosen = np.zeros(pool.shape[1], bool)
    while dice.max() > 0.2:
        k, lung = divmod(int(dice.argmax()), 3)
        chosen |= pool[k] > 0
        dice[product(pool, pool[k:k + 1])[:, 0] > 0] = 0
        dice[:, [lung, 2] if lung < 2 else [0, 1, 2]] = 0
    return chosen, dice_score(chosen, target[2])


def dice_score(a: np.ndarray, b: np.ndarray) -> float:
    """2|a∩b| / (|a| + |b|); 1 for two empty masks."""
    total = float(a.sum() + b.sum())
    return 2 * float((a * b).sum()) / total if total else 1.0


class LungImages:
    """images uint8 (n, size, size), masks bool (n, 2, size, size) of all sets; tuning (n,) marks half of each, by patient."""

    def __init__(self, settings: SegmentSettings, run: dinodiff.Run):
        sets, images, masks, tuning, self.sets, self.notes, self.seed = {}, [], [], [], [], [], run.config["seed"] + 2_000_003
        train = training_images(run, self.notes)
        for spec in settings.data:
            if spec == "phantom":  # patients of another seed than the training's; one image of each
                found = data.open_data(spec, run.size, self.seed, count=4 * (settings.limit or 256))
                sets["phantom"] = found, range(0, len(found), 4)
                continue
            for name, ds in data.lung_sets(spec, run.size).items():
                known = next((known for known, words in PAPER_SETS.items() if re.search(words, name, re.I)), name)
                if known in sets:
                    raise UserError(f"found two sets called {known} ({spec}), expected each once")
                sets[known] = ds, range(len(ds))
        for name, (ds, rows) in sets.items():
            rows = [rows[int(i)] for i in np.linspace(0, len(rows) - 1, min(len(rows), settings.limit or len(rows)))]
            pictures = [ds[i] for i in rows]
            broken = {key for key, _ in ds.unreadable}  # TRAP: a set replaces what it cannot read, which would not fit the mask
            kept = [k for k, i in enumerate(rows) if ds.keys[i] not in broken]
            images += [pictures[k] for k in kept]
            masks += [ds.mask(rows[k]) for k in kept]
            self.sets += [name] * len(kept)
            half = data.split_by_patient([ds.patients[rows[k]] for k in kept], 0.5, settings.seed)[0]
            tuning += [k in half for k in range(len(kept))]
            tested = np.array([rows[k] for k in kept])[np.setdiff1d(np.arange(len(kept)), half)]
            people, files = shared_with(train, run.config["seed"], ds, self.seed, tested, self.notes) if train else ([], [])
            if files or people:
                self.notes.append(f"{name}: the generator was trained on {len(files)} of these {len(tested)} images of the half that "
                                  f"is scored (masks unused), and on {len(people)} of their patients.")
        self.images, self.masks, self.tuning = torch.from_numpy(np.stack(images)), np.stack(masks), np.array(tuning)
        self.groups = {name: np.array([s == name for s in self.sets]) for name in sets}
        self.groups |= {"Combined": np.ones(len(images), bool)} if len(sets) > 1 else {}


@dataclass
class Sweep:
    """One model and its scores {(step, t, M, tau): (n, 3) of ORACLE, RULE, BELIEF}; tau None: the rule's own of OWN_TAU."""
    name: str
    open: Callable[[int], dinodiff.Run]  # the run at a step
    steps: list[int]
    c: torch.Tensor | None = None  # fixed tokens (S, N), where they are not the image's own
    last: int = 0  # aggregate only so many maps, those nearest the output; 0: all, as published
    scores: dict = dataclasses.field(default_factory=dict)

    def best(self, column: int, which: np.ndarray) -> tuple:
        """The setting, one tau for all, with the highest mean over the images `which`."""
        return max((key for key in self.scores if key[3]), key=lambda key: self.scores[key][which, column].mean())


def stored_attention(sweep: Sweep, run: dinodiff.Run, images: torch.Tensor, t: int, settings: SegmentSettings) -> torch.Tensor:
    """A (B, S², S²) float32 of images uint8 (B, size, size), from the run's eval/cache, or computed and put there as fp16.

    A file an image, named by model, weights, t and the picture's own bytes: a killed run goes on, and a set may grow.
    """
    fixed = [] if sweep.c is None else sweep.c.tolist()
    kind = f"{sweep.name}-{run.step:07d}-t{t:03d}-{digest(weights_digest(run.unet, run.vae, run.vit), fixed)}"
    kind += f"-noise{settings.seed}" if settings.noise else ""
    names = [hashlib.sha1(image.numpy().tobytes()).hexdigest()[:24] for image in images]
    files = [run.folder / "eval" / "cache" / re.sub(r"\W+", "-", kind) / f"{name}.safetensors" for name in names]
    new, fresh = [i for i, file in enumerate(files) if not file.is_file()], {}
    if new:
        c = (dinodiff.encode_tokens(run, images[new]) if sweep.c is None else
             sweep.c.expand(len(new), -1, run.unet.config.cross_attention_dim))  # a (1, 1) zero becomes a token of zeros
        seeds = [settings.seed + int(names[i][:8], 16) for i in new] if settings.noise else None
        for i, A in zip(new, diffseg.attention(run, images[new], c, t, seeds, sweep.last).cpu()):
            if not A.isfinite().all():
                raise UserError(f"{run.folder}, step {run.step}: attention of {sweep.name!r} is not finite; its weights are broken")
            fresh[i] = (A * len(A)).half()  # TRAP: entries near 1/4096 would lose half of fp16's digits; these have mean 1
            if settings.maps:
                data.write_file(files[i], save({"A": fresh[i]}))
    A = torch.stack([fresh[i] if i in fresh else load_file(file)["A"] for i, file in enumerate(files)]).float()
    return A / A.sum(2, keepdim=True)


def from_anchors(A: Tensor, grid: int) -> Tensor:
    """Divergence of each anchor of A (S², S²) from every pixel -> (grid², S²): what `diffseg.merge` begins with at any tau."""
    return diffseg.divergence(A[diffseg.anchors(math.isqrt(len(A)), grid).to(A.device)], A)


def own_taus(first: Tensor) -> list[float]:
    return [share * first.median().item() for share in OWN_TAU]


def map_side(run: dinodiff.Run) -> int:
    """Side of the largest attention maps: the latent's, halved for each level before the first with attention."""
    kinds = run.unet.config.down_block_types
    return run.size // run.vae.config.factor >> (kinds.index(CROSS) if CROSS in kinds else len(kinds) - 1)


def measure(sweep: Sweep, step: int, t: int, lungs: LungImages, settings: SegmentSettings) -> None:
    """Score every grid and threshold at one checkpoint and timestep, into sweep.scores; each rank takes its share of the images."""
    run, n, (rank, world) = sweep.open(step), len(lungs.images), ranks()
    batch = max(1, min(16, 2**24 // map_side(run) ** 4))  # maps of a batch: no more than those of one 512 px image
    rows = {(step, t, grid, tau): np.zeros((n, 3)) for grid in settings.grids for tau in (*settings.thresholds, None)}
    bar = data.progress(desc=f"{sweep.name}, step {step}, t {t}", total=len(range(rank, n, world)), unit=" images")
    with ThreadPoolExecutor(max(1, data.cores() // world), initializer=torch.set_num_threads, initargs=(1,)) as threads:
        for part in chunks(np.arange(rank, n, world), batch):
            for i, A in zip(part, stored_attention(sweep, run, lungs.images[part], t, settings)):
                A, truth = A.to(run.device), lungs.masks[i].reshape(2, -1)
                prior = expected_lungs(lungs.images[i].numpy()).reshape(2, -1)
                for grid in settings.grids:
                    first = from_anchors(A, grid)  # for every tau

                    def score(tau):
                        pool = candidates(diffseg.label(diffseg.merge(A, grid, tau, first=first), run.size).cpu().numpy())
                        chosen, belief = select(pool, prior)
                        return select(pool, truth)[1], dice_score(chosen, truth.any(0)), belief

                    own = own_taus(first)
                    found = list(threads.map(score, (*settings.thresholds, *own)))
                    for tau, row in zip(settings.thresholds, found):
                        rows[step, t, grid, tau][i] = row
                    rows[step, t, grid, None][i] = max(found[-len(own):], key=lambda row: row[BELIEF])
                bar.update()
    bar.close()
    if world > 1:
        for scores in rows.values():
            dist.all_reduce(torch.from_numpy(scores))
    sweep.scores |= rows


def segment(settings: SegmentSettings) -> str:
    """Table 2 and Figures 5 and 9–12 of a run -> Markdown, also in eval/segment.md beside segment.json and the PNGs.

    Every model is searched alike: all its checkpoints at the base timestep, then all timesteps at the checkpoint that is best
    on the tuning half; every grid and threshold at each.
    """
    if not settings.timesteps or not all(0 <= t < 1000 for t in settings.timesteps):
        raise UserError(f"found --timesteps {settings.timesteps}, expected numbers from 0 to 999")
    folder = Path(settings.run or dinodiff.newest_run())
    run = dinodiff.load_run(folder, None, settings.device)
    if "phantom" in settings.data and run.config["data"] != "phantom":
        raise UserError(f"{folder} was trained on {run.config['data']}: name folders with lung masks, with --data")
    lungs, out = LungImages(settings, run), Path(settings.out) if settings.out else folder / "eval"
    if not all(c in ("all", "newest", "best") or c.isdigit() for c in settings.checkpoints):
        raise UserError(f"found --checkpoints {settings.checkpoints}, expected all, newest, best or steps")
    steps = run.checkpoints if "all" in settings.checkpoints else sorted({
        dinodiff.load_run(folder, s if s == "best" else None if s == "newest" else int(s)).step for s in settings.checkpoints})
    opened = lambda step: dinodiff.load_run(folder, step, settings.device)
    frozen = lambda net: dataclasses.replace(run, unet=net.to(run.device).eval().requires_grad_(False), step=0)

    def untrained(step):
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed)
            return frozen(dinodiff.from_scratch(run.unet.config))

    nets = {"this run": (opened, steps), f"untrained UNet (seed {settings.seed})": (untrained, [0])}
    sweeps = [Sweep(name + f", last {last} of its maps" * bool(last), *how, last=last)
              for name, how in nets.items() for last in (0, *settings.last)]
    if settings.init:
        place = (dinodiff.SD15, "unet") if settings.init == "sd15" else (settings.init,)
        # CHOICE: without a text encoder "empty" is one zero token: cross-attention then adds its bias, and no text at all.
        empty = settings.context == "empty"
        c = torch.zeros(1, 1) if empty else load_file(settings.context)["context"].float()
        sweeps.append(Sweep(f"{settings.init} ({Path(settings.context).stem} context)",
                            lambda step: frozen(UNet.from_pretrained(*place)), [0], c))
    passes = sum(len(sweep.steps) - 1 + len(settings.timesteps) for sweep in sweeps)
    need = passes * len(lungs.images) * 2 * map_side(run) ** 4 if settings.maps else 0
    need -= sum(file.stat().st_size for file in (folder / "eval/cache").rglob("*.safetensors")) if settings.maps else 0
    print(f"{len(lungs.images)} images, {passes} passes each, {need / 1e9:.2f} GB of attention maps in {folder / 'eval/cache'}")
    if need > shutil.disk_usage(folder).free:
        raise UserError(f"found {shutil.disk_usage(folder).free / 1e9:.0f} GB free, expected {need / 1e9:.0f} GB for the maps: "
                        "use --no-maps, a smaller --limit or fewer --timesteps and --checkpoints")
    base = min(settings.timesteps, key=lambda t: abs(t - 300))
    for sweep in sweeps:
        for step in sweep.steps:
            measure(sweep, step, base, lungs, settings)
        best = {sweep.best(ORACLE, which)[0] for which in (lungs.tuning, np.ones_like(lungs.tuning))}
        for step, t in itertools.product(sorted(best), sorted(set(settings.timesteps) - {base})):
            measure(sweep, step, t, lungs, settings)
    if ranks()[0]:
        return barrier() or ""  # the first rank draws and writes
    rows = table_rows(sweeps, lungs, settings, base)
    worth = lambda sweep: sweep.scores[sweep.best(ORACLE, lungs.tuning)][lungs.tuning, ORACLE].mean()
    pictures = segment_figures(max(sweeps[:1 + len(settings.last)], key=worth), lungs, settings, base, out)
    cell = lambda v: "–" if v is None else f"{v[0]:.1f}" if v[1] is None else f"{v[0]:.1f} ± {v[1]:.1f}"
    lines = ["Dice (%), mean ± SD | " + " | ".join(f"{name} ({group.sum()})" for name, group in lungs.groups.items())]
    lines += ["|".join(["---"] * (len(lungs.groups) + 1))]
    comparable = set(lungs.groups) - ({"Combined"} if set(lungs.sets) != set(PAPER_SETS) else set())
    for title, row in (rows | PAPER_DICE).items():
        shown = [row.get(name) or (row.get(name.lower()) if name in comparable else None) for name in lungs.groups]
        lines += [" | ".join([title, *map(cell, shown)])] * any(shown)
    text = "\n".join([
        "## Zero-shot lung segmentation (Table 2)", "", *(f"| {line} |" for line in lines), "",
        "Oracle: segments chosen by their Dice with the true lungs, as in the paper. Rule: chosen by where lungs are expected and by "
        "darkness; it reads no mask, but its constants, and the rows of late maps alone, were chosen by people who had looked at "
        "such images. n: images scored.", "", *(f"![{p.stem}]({p.name})\n" for p in pictures),
        *(f"> {note}\n" for note in dict.fromkeys(lungs.notes)), command_of("segment", settings, folder), ""])
    data.write_file(out / "segment.md", text)
    mean = lambda score: {name: score[group].mean(0)[:2].round(4).tolist() for name, group in lungs.groups.items()}
    cells = {sweep.name: [dict(zip(("step", "t", "M", "tau"), key)) | mean(score) for key, score in sweep.scores.items()]
             for sweep in sweeps}
    data.write_json(out / "segment.json", {"settings": dataclasses.asdict(settings), "table": rows, "paper": PAPER_DICE,
                                                "mean Dice of oracle and rule at every setting": cells})
    print(f"{text}-> {out / 'segment.md'}")
    barrier()
    return text


def table_rows(sweeps: list[Sweep], lungs: LungImages, settings: SegmentSettings, base: int) -> dict[str, dict[str, tuple]]:
    """{row: {set: (mean, SD) of Dice in %}}; a row says who chose the segments, and on which images its setting was chosen."""
    everyone, truth, rows = np.ones(len(lungs.sets), bool), lungs.masks.any(1), {}
    row = lambda dice, which: {name: (100 * dice[group & which].mean(), 100 * dice[group & which].std())
                               for name, group in lungs.groups.items() if (group & which).any()}
    halves = ("tuned on these images, as the paper does", everyone, everyone), ("tuned on the other half", lungs.tuning, ~lungs.tuning)
    say = lambda key: f"step {key[0]}, t {key[1]}, M {key[2]}, tau {key[3] or 'of each image'}"
    for sweep in sweeps:
        for column, who in ((ORACLE, "oracle"), (RULE, "rule")):
            for how, tuning, test in halves:
                key = sweep.best(column, tuning)
                rows[f"{sweep.name}, {who}, {how}, n = {test.sum()} ({say(key)})"] = row(sweep.scores[key][:, column], test)
        key = rule_key(sweep, settings, base)
        for test in (everyone, ~lungs.tuning):
            rows[f"{sweep.name}, rule, settings fixed beforehand, n = {test.sum()} ({say(key)})"] = row(sweep.scores[key][:, RULE], test)
    guesses = {"the rule's expectation alone": lambda image: expected_lungs(image).max(0) > 0.5,
               "Otsu's threshold, two dark regions": otsu_lungs, "the whole picture": np.ones_like}
    for (name, guess), test in itertools.product(guesses.items(), (everyone, ~lungs.tuning)):
        scores = [dice_score(guess(image) > 0, mask) for image, mask in zip(lungs.images.numpy(), truth)]
        rows[f"no network: {name}, n = {test.sum()}"] = row(np.array(scores), test)
    return rows


def rule_key(sweep: Sweep, settings: SegmentSettings, base: int) -> tuple:
    """The setting of the rule that was fixed beforehand: newest checkpoint, base timestep, first grid, each image's own tau."""
    return sweep.steps[-1], base, settings.grids[0], None


def segment_figures(sweep: Sweep, lungs: LungImages, settings: SegmentSettings, base: int, out: Path) -> list[Path]:
    """Figures 10 (checkpoints), 11 (tau) and 12 (t), the other settings at their best, and the gallery of Figures 5 and 9."""
    best, paths, names = sweep.best(ORACLE, np.ones(len(lungs.sets), bool)), [], ("step", "t", "M", "tau")
    for number, axis, label in ((10, 0, "training step"), (11, 3, "merge threshold tau"), (12, 1, "timestep t")):
        fixed = [None if i == axis else base if (axis, i) == (0, 1) else v for i, v in enumerate(best)]
        keys = sorted(key for key in sweep.scores if key[3] and all(f in (None, v) for f, v in zip(fixed, key)))
        if len(keys) > 1:
            line = lambda keys, column, group: ([key[axis] for key in keys], [
                100 * sweep.scores[key][group, column].mean() for key in keys], None)
            series = {f"{name}, oracle": line(keys, ORACLE, group) for name, group in lungs.groups.items()}
            name, group = list(lungs.groups.items())[-1]
            series[f"{name}, rule"] = line(keys, RULE, group)
            if axis != 3:
                series[f"{name}, rule, tau of each image"] = line([(*key[:3], None) for key in keys], RULE, group)
            rest = ", ".join(f"{n} {v:g}" for n, v in zip(names, fixed) if v is not None)
            title = f"Dice by {label} ({sweep.name}; {rest})"
            paths.append(Path(plot_lines(out / f"figure{number}.png", series, title, label, "Dice (%)", log_x=axis == 3)))
    dice, rows = sweep.scores[best][:, ORACLE], []
    run, late = sweep.open(best[0]), sweep.open(sweep.steps[-1])
    for name in dict.fromkeys(lungs.sets):
        order, few = sorted(np.flatnonzero(lungs.groups[name]), key=lambda i: -dice[i]), 4 if len(lungs.groups) == 1 else 2
        rows += [(f"{name}, {kind}", i) for kind, part in (("best", order[:few]), ("worst", order[few:][-few:])) for i in part]
    panels, captions = [], []
    for _, i in rows:
        image, truth = lungs.images[i].numpy(), lungs.masks[i]
        A, late_A = (stored_attention(sweep, at, lungs.images[i:i + 1], t, settings)[0].to(run.device)
                     for at, t in ((run, best[1]), (late, base)))
        labels = diffseg.segment(A, run.size, best[2], best[3]).cpu().numpy()
        grid = settings.grids[0]
        own = [diffseg.segment(late_A, run.size, grid, tau).cpu().numpy() for tau in own_taus(from_anchors(late_A, grid))]
        prior = expected_lungs(image).reshape(2, -1)
        picks = [select(candidates(labels), truth.reshape(2, -1)),
                 max((select(candidates(found), prior) for found in own), key=lambda pick: pick[1])]
        picks = [chosen.reshape(image.shape) for chosen, _ in picks]
        grey = np.stack([image] * 3, 2).astype(float)
        tint = lambda mask, colour: np.where(mask[..., None], 0.6 * grey + 0.4 * np.array(colour), grey)
        colours = np.array([colorsys.hsv_to_rgb(k * 0.618034 % 1, 0.75, 255) for k in range(labels.max() + 1)])
        panels += [grey, tint(truth.any(0), (0, 220, 90)), 0.5 * grey + 0.5 * colours[labels],
                   tint(picks[0], (255, 170, 0)), tint(picks[1], (60, 150, 255))]
        captions += ["X-ray", "true lungs", f"{labels.max() + 1} segments"]
        captions += [f"{who} {100 * dice_score(pick, truth.any(0)):.0f} %" for who, pick in zip(("oracle", "rule"), picks)]
    thin = -(-run.size // 256)  # a picture of at most 256 px each
    sheet = data.grid([p[::thin, ::thin].astype(np.uint8) for p in panels], 5, captions, [title for title, _ in rows])
    data.save_png(out / "figure5-9.png", sheet)
    return [*paths, out / "figure5-9.png"]


# ---- Figures 2, 6, 7 and 8: pictures of samples ---------------------------------------------------------------------------


@torch.no_grad()
def figures(s: Figures) -> str:
    """Reconstructions and interpolations (Figure 2), their worst cases (Figure 8); with all tokens also Figures 6 and 7."""
    trial = open_trial(s)
    run, lines = trial.run, ["## Samples (Figures 2 and 8)", ""]
    rows = trial.test[np.argsort(hash64(s.seed, 5, trial.test))][:max(s.candidates, 2 * s.variants)]
    real = read(trial.images, rows)
    tokens = torch.cat([encode_tokens(run, part).cpu() for part in real.split(s.micro_batch)])

    def sample(c, *seeds):  # seeds: the values that make each one's seed
        return generate_all(run, c, [seed_of(s.seed, *map(int, values)) for values in zip(*seeds)], s).numpy()

    def save(name, cells, columns, title, captions=None, row_titles=None):
        if trial.rank == 0:
            data.save_png(trial.out / f"{name}.png", data.grid([small(x) for x in cells], columns, captions, row_titles, title))
        lines.extend([f"![{title}]({name}.png)", ""])

    def draw(number, chosen, title):
        V, ends = s.variants, list(zip(chosen, chosen[1:] + chosen[:1]))
        c = tokens[chosen].repeat_interleave(V, 0)
        made = np.split(sample(c, [6] * len(c), np.repeat(rows[chosen], V), list(range(V)) * len(chosen)), len(chosen))
        cells = [x for i, row in zip(chosen, made) for x in (real[i].numpy(), *row)]
        captions = ["real", *(f"variant {v + 1}" for v in range(V))] * len(chosen)
        save(f"figure{number}a", cells, V + 1, f"{title}: reconstructions", captions)
        r = np.linspace(0, 1, V + 1)  # the noise stays the same along a row: only the condition changes
        c = torch.stack([torch.lerp(tokens[a], tokens[b], float(x)) for a, b in ends for x in r])
        made = np.split(sample(c, [7] * len(c), np.repeat(rows[chosen], V + 1)), len(ends))
        cells = [x for (a, b), row in zip(ends, made) for x in (real[a].numpy(), *row, real[b].numpy())]
        captions = ["real A", *(f"r = {x:.2f}" for x in r), "real B"] * len(ends)
        save(f"figure{number}b", cells, V + 3, f"{title}: interpolations", captions)

    draw(2, list(range(min(s.images, len(rows)))), "Figure 2")
    name, _, embed = protocol(s, trial)
    first = sample(tokens, [6] * len(rows), rows, [0] * len(rows))
    both = zip(real.split(256), torch.from_numpy(first).split(256))
    distance = torch.cat([(embed(a) - embed(b)).norm(dim=1) for a, b in both])
    worst = distance.argsort(descending=True)[:s.images].tolist()
    draw(8, worst, f"Figure 8, the reconstructions farthest from their images ({name}, of {len(rows)})")
    if run.config["tokens"] == "all":  # appendix A.1
        V, half = min(s.variants, len(rows) // 2), len(rows) // 2
        made = sample(tokens[:V], [8] * V, rows[:V])
        save("figure6", [*real[:V].numpy(), *made], V, "Figure 6: reconstructions from all tokens",
             row_titles=["real", "reconstruction"])
        mixed = torch.stack([dinodiff.mix_tokens(tokens[i], tokens[half + i], run.vit.config) for i in range(V)])
        made = sample(mixed, [9] * V, rows[:V])
        save("figure7", [*real[:V].numpy(), *made, *real[half:half + V].numpy()], V,
             "Figure 7: the upper half of the patch tokens from A, the lower from B",
             row_titles=["real A", "mixed tokens", "real B"])
    return finish(trial, s, "figures", lines)


# ---- Charts, with Pillow alone --------------------------------------------------------------------------------------------

COLOURS = ("#2c6fbb", "#d9742b", "#3a923a", "#8458a8", "#b8352f", "#7a5a43", "#d05aa6", "#4f5b62")
INK, PALE = "#222222", "#dddddd"


def nice_ticks(low: float, high: float, count: int = 6, log: bool = False) -> list[float]:
    """About `count` round numbers that cover [low, high]; on a log axis 1, 2 and 5 times the powers of ten."""
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-30):  # a single value
        low, high = (low / 2, high * 2) if log else (low - 0.05 * max(abs(low), 1), high + 0.05 * max(abs(high), 1))
    if log:
        ticks = [m * 10.0**d for d in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1) for m in (1, 2, 5)]
        return [t for t, after in zip(ticks, [*ticks[1:], math.inf]) if after > low * 1.001 and t <= high * 1.001] + \
            [next(t for t in ticks if t >= high * 0.999)] * (not any(high * 0.999 <= t <= high * 1.001 for t in ticks))
    power = 10.0 ** math.floor(math.log10((high - low) / count))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power * count >= (high - low) * 0.999)
    return [i * step for i in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


class Axes:
    """Title, legend above the frame (never over data), axes, ticks; drawn at 3x and reduced, so it is smooth."""

    def __init__(self, title, xlabel, ylabel, names, xlim, ylim, size, xticks=None, log_x=False, level=None):
        number = lambda v: f"{v:,.0f}" if abs(v) >= 1000 else f"{v:.4g}"
        (width, height), self.log_x = size, log_x
        self.image = Image.new("RGB", (width * 3, height * 3), "white")
        self.draw = ImageDraw.Draw(self.image)
        self.colour = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
        yticks = nice_ticks(*ylim)
        if xticks is None:
            xticks = [(v, number(v)) for v in nice_ticks(*xlim, 7, log_x)]
            xlim = xticks[0][0], xticks[-1][0]
        left, right = 56 + max(self.extent(number(v))[0] for v in yticks), width - 30
        slot = (right - left) / len(xticks) - 4
        labels = [(v, self.wrap(text, slot)) for v, text in xticks]
        bottom = height - 18 - max(self.extent(text)[1] for _, text in labels) - (26 if xlabel else 0)
        self.text((width / 2, 12), title, "ma", 16)
        legend, (x, top) = (list(names) if len(names) > 1 else []) + ([level[1]] if level else []), (left, 42)
        for name in legend:
            wide = 44 + self.extent(name)[0]
            if x + wide > width - 12 and x > left:
                x, top = left, top + 20
            if name in self.colour:
                self.box((x, top + 3, x + 18, top + 12), self.colour[name])
            else:
                self.dashes(x, x + 18, top + 8)
            self.text((x + 25, top), name, "la")
            x += wide
        top += 32 if legend else 4
        self.frame, self.xlim, self.ylim = (left, top, right, bottom), xlim, (yticks[0], yticks[-1])
        for v in yticks:
            self.line([(left, self.y(v)), (right, self.y(v))], PALE)
            self.text((left - 8, self.y(v)), number(v), "rm")
        for v, text in labels:
            self.line([(self.x(v), bottom), (self.x(v), bottom + 5)], INK)
            self.text((self.x(v), bottom + 8), text, "ma")
        self.line([(left, top), (left, bottom), (right, bottom)], INK)
        if level:
            self.dashes(left, right, self.y(level[0]))
        self.text(((left + right) / 2, height - 24), xlabel, "ma", 14)
        w, h = (round(v * 3) for v in self.extent(ylabel, 14))
        strip = Image.new("RGB", (w + 12, h + 18), "white")
        ImageDraw.Draw(strip).text((6, 6), ylabel, INK, ImageFont.load_default(14 * 3))
        self.image.paste(strip.rotate(90, expand=True), (24, round((top + bottom) * 1.5 - w / 2)))

    def x(self, v):
        f = math.log10 if self.log_x else float
        return self.frame[0] + (f(v) - f(self.xlim[0])) / (f(self.xlim[1]) - f(self.xlim[0])) * (self.frame[2] - self.frame[0])

    def y(self, v):
        return self.frame[3] - (v - self.ylim[0]) / (self.ylim[1] - self.ylim[0]) * (self.frame[3] - self.frame[1])

    def extent(self, text, size=13):
        return [v / 3 for v in self.draw.multiline_textbbox((0, 0), text, font=ImageFont.load_default(size * 3))[2:]]

    def wrap(self, text, width):
        lines = [""]
        for word in text.split(" "):
            fits = self.extent(f"{lines[-1]} {word}".strip())[0] <= width or not lines[-1]
            lines = [*lines[:-1], f"{lines[-1]} {word}".strip()] if fits else [*lines, word]
        return "\n".join(lines)

    def text(self, at, text, anchor, size=13):
        font = ImageFont.load_default(size * 3)
        self.draw.multiline_text((at[0] * 3, at[1] * 3), text, INK, font, anchor=anchor, align="center")

    def line(self, points, colour, width=1.0):
        self.draw.line([(x * 3, y * 3) for x, y in points], colour, round(width * 3), joint="curve")

    def box(self, corners, colour):
        self.draw.rectangle([v * 3 for v in corners], colour)

    def dashes(self, x0, x1, y):
        for x in np.arange(x0, x1, 7):
            self.line([(x, y), (min(x + 4, x1), y)], INK, 1.4)

    def whisker(self, x, low, high, colour=INK):
        for ends in ([(x, low), (x, high)], [(x - 4, low), (x + 4, low)], [(x - 4, high), (x + 4, high)]):
            self.line([(px, self.y(v)) for px, v in ends], colour, 1.3)

    def save(self, path) -> Path:
        data.save_png(path, self.image.resize((self.image.width // 3 * 2, self.image.height // 3 * 2),
                                              Image.Resampling.LANCZOS))
        return Path(path)


def plot_lines(path, series: dict, title: str, xlabel: str, ylabel: str, level=None, log_x: bool = False,
               size=(900, 520)) -> Path:
    """A line chart. series: {name: (x, y, err or None)} with error bars ± err; level: (value, caption), a dashed line. -> path

    Pillow's own font knows Latin letters, ± and %, but no Greek and no multiplication sign: write "tau", "x".
    """
    series = {name: [np.asarray(v if v is not None else np.zeros(len(x)), float) for v in (x, y, err)]
              for name, (x, y, err) in series.items()}
    x, y, err = (np.concatenate(v) for v in zip(*series.values()))
    ends = np.concatenate([y - err, y + err, [level[0]] if level else []])
    axes = Axes(title, xlabel, ylabel, list(series), (x.min(), x.max()), (np.nanmin(ends), np.nanmax(ends)), size, None, log_x,
                level)
    for name, (x, y, err) in series.items():
        order = [i for i in np.argsort(x) if np.isfinite(y[i])]
        points = [(axes.x(x[i]), axes.y(y[i])) for i in order]
        axes.line(points, axes.colour[name], 2)
        for i, (px, py) in zip(order, points):
            if err[i] > 0:
                axes.whisker(px, y[i] - err[i], y[i] + err[i], axes.colour[name])
            axes.draw.ellipse([(px - 4) * 3, (py - 4) * 3, (px + 4) * 3, (py + 4) * 3], axes.colour[name])
    return axes.save(path)


def plot_bars(path, groups: dict, title: str, ylabel: str, xlabel: str = "", zero: bool = True, level=None,
              size=(900, 520)) -> Path:
    """Grouped bars. groups: {group: {bar: (value, err or None, mark)}}, mark (such as "*") stands above the error bar; bars of
    one name share a colour and a legend entry; zero: the axis contains 0; level: (value, caption), a dashed line. -> path"""
    names = list(dict.fromkeys(name for bars in groups.values() for name in bars))
    ends = [v + side * (err or 0) for bars in groups.values() for v, err, _ in bars.values() for side in (-1, 1)]
    ends += [0.0] * zero + ([level[0]] if level else [])
    axes = Axes(title, xlabel, ylabel, names, (-0.5, len(groups) - 0.5),
                (min(ends), max(ends) + 0.06 * (max(ends) - min(ends))), size,
                [(i, str(group)) for i, group in enumerate(groups)], level=level)
    slot, floor = (axes.frame[2] - axes.frame[0]) / len(groups), min(max(0.0, axes.ylim[0]), axes.ylim[1])
    for i, bars in enumerate(groups.values()):
        width = min(slot * 0.84 / max(len(bars), 1), 60)
        for j, (name, (value, err, mark)) in enumerate(bars.items()):
            x = axes.x(i) + (j - len(bars) / 2) * width
            top, bottom = sorted((axes.y(value), axes.y(floor)))
            axes.box((x + 1, top, x + width - 1, bottom), axes.colour[name])
            if err:
                axes.whisker(x + width / 2, value - err, value + err)
            axes.text((x + width / 2, axes.y(max(value + (err or 0), floor)) - 1), mark, "md", 15)
    axes.line([(axes.frame[0], axes.y(floor)), (axes.frame[2], axes.y(floor))], INK)
    return axes.save(path)


# ---- Everything at once ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Everything(Common):
    steps: int | None = None  # DDIM steps of a synthetic image; empty: each protocol's own
    micro_batch: int | None = None  # images of one rank in one pass; empty: each protocol's own


def evaluate_all(s: Everything) -> None:
    """Every protocol in turn -> report.md; what one cannot do is said there, and the others go on."""
    rank, world = ranks()
    folder = Path(s.run or dinodiff.newest_run())
    load_run(folder)  # a run without checkpoints ends here
    out, clock = Path(s.out) if s.out else folder / "eval", time.perf_counter()
    changed = {f.name: getattr(s, f.name) for f in dataclasses.fields(s) if getattr(s, f.name) != f.default}
    changed["run"] = str(folder)
    failed = {}
    for name, (kind, function) in COMMANDS.items():
        begin, fields = time.perf_counter(), {f.name for f in dataclasses.fields(kind)}
        try:
            # --data names labelled images here; `segment` has its own default of images with masks
            given = {k: v for k, v in changed.items() if k in fields and (name, k) != ("segment", "data")}
            if name == "segment" and s.checkpoint != "newest":
                given["checkpoints"] = (s.checkpoint,)
            function(dataclasses.replace(defaults_for(kind)(["--run", str(folder)]), **given))
            print(f"{name}: {time.perf_counter() - begin:.0f} s", flush=True)
        except UserError as error:
            if world > 1:  # where only this rank failed, the others wait for it: end the program, do not go on alone
                dist.monitored_barrier(timeout=timedelta(minutes=2))
            failed[name] = str(error)
            print(f"{name} was left out: {error}", file=sys.stderr, flush=True)
    if len(failed) == len(COMMANDS):
        raise UserError("nothing could be measured: " + "; ".join(dict.fromkeys(failed.values())))
    if rank == 0:
        write_report(folder, out, failed)
        print(f"{time.perf_counter() - clock:.0f} s in all -> {out / 'report.md'}")


def write_report(folder: Path, out: Path, failed: dict[str, str]) -> None:
    """report.md: the sections that stand in `out`, one after another, and why others do not."""
    config = json.loads((folder / "config.json").read_text())
    lines = [f"# Evaluation of {folder.name}", "", f"Preset {config['preset']}, {config['size']} px, trained on {config['data']}. Made "
             f"by `python evaluate.py --run {folder}`; each section ends with the command that makes it alone. This is no medical "
             "device, and nothing here is validated for clinical use.", ""]
    lines += [(out / f"{name}.md").read_text() for name in COMMANDS if (out / f"{name}.md").is_file()]
    lines += ["## Left out", ""] * bool(failed) + [f"- {name}: {error}" for name, error in failed.items()]
    data.write_file(out / "report.md", "\n".join(lines) + "\n")


@dataclass(frozen=True)
class Convert:
    source: str = dataclasses.field(default="", metadata={"positional": True})  # a pickled DenseNet, torchxrayvision's model.pt
    out: str = "xrv"  # folder for model.safetensors


def convert(s: Convert) -> None:
    DenseNet.from_pretrained(s.source).save_pretrained(s.out)
    print(f"-> {s.out}/model.safetensors; use it with --xrv {s.out}")


COMMANDS = {"figures": (Figures, figures), "fid": (Fid, fid), "classify": (Classify, classify), "audit": (Audit, audit),
            "segment": (SegmentSettings, segment)}


def main(argv: list[str] | None = None) -> None:
    commands = {name: (defaults_for(kind), function) for name, (kind, function) in COMMANDS.items()}
    data.command_line(__doc__, {"": (Everything(), evaluate_all), **commands, "convert": (Convert(), convert)}, argv)


if __name__ == "__main__":
    main()
