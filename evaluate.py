"""The paper's measurements (2.4): FID and the best checkpoint, the classification tables, lung segmentation, a copy audit, the figures.

    python evaluate.py                          everything that the newest run and its data allow -> RUN/eval/report.md
    python evaluate.py fid --checkpoints all    Frechet distance of each checkpoint (Figure 3), and best.json
    python evaluate.py classify --data cxr/     real, augmented and synthetic training sets (Table 1, Figure 4)
    python evaluate.py segment | audit | figures
    python evaluate.py convert model.pt --out xrv/     a pickled DenseNet -> safetensors, without executing it
    torchrun --nproc_per_node=4 evaluate.py fid …      the same numbers on any number of ranks

Weights: FID by the paper's protocol, `xrv-224`, takes torchxrayvision's densenet121-res224-all from the hub's cache or from --xrv;
without it a small DenseNet is trained on the spot on the labels at hand, and the protocol is called `local`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import re
import struct
import sys
import time
import zipfile
from collections import OrderedDict
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn

import data
import dinodiff
from data import UserError, hash64
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
    steps: int = 50  # DDIM steps of a synthetic image
    micro_batch: int = 32  # images of one rank in one pass of sampling or encoding
    protocol: str = "auto"  # features: xrv-224 | local | dino; auto: the first of them that the weights and labels at hand allow
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
    prevalence: float = 0.04  # findings rarer than this are left out
    epochs: int = 150  # at most
    batch: int = 64
    lr: float = 1e-4  # of AdamW
    weight_decay: float = 1e-5
    patience: int = 10  # epochs without a better validation AUC until lr / 10
    stop: int = 25  # epochs without a better validation AUC until the end
    equal_steps: bool = False  # as many optimizer steps an epoch in each cell of a column: more data must not win by more updates
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
SMALL = dict(steps=20, micro_batch=64)
TINY = {Fid: Fid(count=256, checkpoints="all", **SMALL), Audit: Audit(count=96, **SMALL), Figures: Figures(**SMALL),
        Classify: Classify(sizes=(50, 100), ratios=(1, 5), epochs=24, batch=32, lr=1e-2, patience=4, stop=8, size=64, growth=8,
                           blocks=(2, 2, 2), width=16, per_shard=250, **SMALL)}


def defaults_for(kind):
    """argv -> the default settings of a command: TINY's where the run that argv names, or the newest, is of the preset `tiny`."""
    def choose(argv: list[str]):
        with contextlib.suppress(UserError, OSError):
            named = [value for flag, value in zip(argv, argv[1:]) if flag == "--run"] + [a[6:] for a in argv if a.startswith("--run=")]
            folder = Path(named[0]) if named else dinodiff.newest_run()
            return TINY[kind] if json.loads((folder / "config.json").read_text())["preset"] == "tiny" else kind()
        return TINY[kind]
    return choose


# ---- DenseNet (Huang et al. 2017; torchvision's and torchxrayvision's key names) -------------------------------------------


class DenseLayer(nn.Module):
    """BN-ReLU-1x1, BN-ReLU-3x3: `growth` new channels from all that came before."""

    def __init__(self, channels: int, growth: int):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, 4 * growth, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(4 * growth), nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x):
        return self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))


class DenseBlock(nn.Module):
    def __init__(self, channels: int, growth: int, layers: int):
        super().__init__()
        for i in range(layers):
            self.add_module(f"denselayer{i + 1}", DenseLayer(channels + i * growth, growth))

    def forward(self, x):
        for layer in self.children():
            x = torch.cat([x, layer(x)], 1)
        return x


class Transition(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(channels), nn.Conv2d(channels, channels // 2, 1, bias=False)

    def forward(self, x):
        return F.avg_pool2d(self.conv(F.relu(self.norm(x))), 2)


class DenseNet(nn.Module):
    """DenseNet: at its defaults DenseNet-121 (727 tensors); the tiny preset uses a shallow one of the same class.

    num_classes: logits; in_channels: 1 (torchxrayvision) or 3 (torchvision); growth: channels a layer adds; blocks: layers of each
    dense block; width: channels of the stem.
    """

    def __init__(self, num_classes: int, in_channels: int = 1, growth: int = 32, blocks: tuple[int, ...] = (6, 12, 24, 16), width: int = 64):
        super().__init__()
        self.features = nn.Sequential()
        self.features.add_module("conv0", nn.Conv2d(in_channels, width, 7, stride=2, padding=3, bias=False))
        self.features.add_module("norm0", nn.BatchNorm2d(width))
        self.features.add_module("relu0", nn.ReLU(inplace=True))
        self.features.add_module("pool0", nn.MaxPool2d(3, stride=2, padding=1))
        for i, layers in enumerate(blocks, 1):
            self.features.add_module(f"denseblock{i}", DenseBlock(width, growth, layers))
            width += layers * growth
            if i < len(blocks):
                self.features.add_module(f"transition{i}", Transition(width))
                width //= 2
        self.features.add_module("norm5", nn.BatchNorm2d(width))  # "5" at any number of blocks
        self.classifier = nn.Linear(width, num_classes)
        for module in self.features.modules():
            if hasattr(module, "kernel_size") and hasattr(module, "weight"):
                nn.init.kaiming_normal_(module.weight)
        nn.init.zeros_(self.classifier.bias)

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, in_channels, H, W) -> features (B, 1024): ReLU, then the global average."""
        # TRAP: without this ReLU the features, and every FID on them, are others; torchvision and torchxrayvision both have it.
        return F.relu(self.features(x)).mean((2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, in_channels, H, W); torchxrayvision's weights want pixels in [-1024, 1024] at 224 px -> logits (B, num_classes)."""
        return self.classifier(self.embed(x))

    @classmethod
    def from_pretrained(cls, source, revision: str | None = None, offline: bool = False) -> "DenseNet":
        """A folder, a `.safetensors` file, a pickled `.pt` (read without executing it) or a hub id; the shape is read off the tensors.

        The hub's `torchxrayvision/densenet121-res224-all` holds a pickled module, `model.pt`.
        """
        path = Path(source).expanduser()
        path = path / "model.pt" if path.is_dir() and not list(path.glob("*.safetensors")) else path
        if not path.exists() and str(source) == XRV:
            path = data._from_hub(XRV, "model.pt", revision, offline)
        if path.suffix in (".pt", ".pth", ".bin") and path.is_file():
            state = read_pickled_tensors(path)
            print(f"read {path} without executing it; to keep it as safetensors: python evaluate.py convert {path} --out {path.parent}/safe")
        else:
            state = data.read_weights(source, revision=revision, offline=offline)[1]
        state.pop("op_threshs", None)  # operating points that some torchxrayvision modules carry along
        if "features.conv0.weight" not in state or "classifier.weight" not in state:
            raise UserError(f"{source}: found keys {sorted(state)[:4]} …, expected a DenseNet's, such as features.conv0.weight")
        width, channels = state["features.conv0.weight"].shape[:2]
        layers = [int(k.split("denseblock")[1].split(".")[0]) for k in state if k.endswith("norm1.running_mean")]
        growth = state["features.denseblock1.denselayer1.conv2.weight"].shape[0]
        model = cls(len(state["classifier.weight"]), channels, growth, tuple(layers.count(i) for i in sorted(set(layers))), width)
        return data.load_weights(model, state, source)

    def save_pretrained(self, folder) -> None:
        data.write_weights(folder, {}, self.state_dict(), "model.safetensors")


# ---- A pickled module's tensors, without running it -------------------------------------------------------------------------

STORAGES = {"DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16, "LongStorage": torch.int64,
            "IntStorage": torch.int32, "ShortStorage": torch.int16, "ByteStorage": torch.uint8, "CharStorage": torch.int8,
            "BoolStorage": torch.bool, "BFloat16Storage": torch.bfloat16}


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
    """Builds tensors, dicts and plain values; whatever else a pickle asks for becomes Inert. storage(dtype, key, numel) -> (numel,)"""

    def __init__(self, file, storage):
        super().__init__(file, encoding="latin1")
        self.storage = storage

    def find_class(self, module, name):
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda flat, offset, size, stride, *rest: flat.as_strided(size, stride, offset)  # as_strided checks the bounds
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *rest: tensor
        return name if module == "torch" and name in STORAGES else type(name, (Inert,), {})

    def persistent_load(self, saved):
        if saved[0] != "storage":  # ("module", class, source file, source text) in files before torch 1.6
            return saved[1]
        flat, view = self.storage(STORAGES[saved[1]], saved[2], saved[4]), saved[5] if len(saved) > 5 else None
        return flat if view is None else flat[view[1]:view[1] + view[2]]


def read_pickled_tensors(path) -> dict[str, torch.Tensor]:
    """What torch.save(module) or torch.save(state dict) wrote, in its zip or its older format -> state dict; no code in it runs.

    Raises UserError where the file is damaged or holds no tensors.
    """
    try:
        with open(path, "rb") as file:
            found = _read_zip(file) if zipfile.is_zipfile(path) else _read_legacy(file)
        found = found.get("state_dict", found) if hasattr(found, "get") else found
        state = dict(_named_tensors(found, ""))
    except (pickle.UnpicklingError, zipfile.BadZipFile, EOFError, StopIteration, KeyError, IndexError, AttributeError, TypeError,
            RuntimeError, ValueError, MemoryError, UnicodeDecodeError, struct.error) as error:
        raise UserError(f"{path} is damaged or not a file of torch.save ({type(error).__name__}: {error})") from None
    if not state:
        raise UserError(f"{path} holds no tensors; expected a module or a state dict written by torch.save")
    return state


def _read_zip(file):
    with zipfile.ZipFile(file) as archive:
        root, flats = next(name for name in archive.namelist() if name.endswith("data.pkl"))[:-8], {}

        def storage(dtype, key, numel):
            if key not in flats:
                content = bytearray(archive.read(f"{root}data/{key}"))
                flats[key] = torch.frombuffer(content, dtype=dtype)[:numel] if content else torch.zeros(0, dtype=dtype)
            return flats[key]

        return TensorsOnly(io.BytesIO(archive.read(f"{root}data.pkl")), storage).load()


def _read_legacy(file):
    """Before torch 1.6: magic number, version, system; the object; the order of its storages; then each one's length and numbers."""
    flats = {}
    load = lambda: TensorsOnly(file, lambda dtype, key, numel: flats.setdefault(key, torch.zeros(numel, dtype=dtype))).load()
    if load() != 0x1950A86A20F9469CFC6C:
        raise ValueError("no magic number of torch.save")
    load(), load()
    found = load()
    for key in load():
        (count,), flat = struct.unpack("<q", file.read(8)), flats[key]
        flat[:] = torch.frombuffer(bytearray(file.read(count * flat.element_size())), dtype=flat.dtype)
    return found


def _named_tensors(found, prefix):
    """(key, tensor) of a state dict, or of a stubbed module through its _parameters, _buffers and _modules."""
    module = hasattr(found, "_modules")
    for name, tensor in [*found._parameters.items(), *found._buffers.items()] if module else found.items():
        if torch.is_tensor(tensor):
            yield prefix + name, tensor.clone()
    for name, child in found._modules.items() if module else ():
        yield from _named_tensors(child, f"{prefix}{name}.")


# ---- Distances between image sets (paper 2.4; Heusel et al. 2017, Binkowski et al. 2018, Naeem et al. 2020) ------------------


class Moments:
    """Sums of features and of their products in float64, in `blocks` independent parts: memory (blocks, d, d), whatever the count.

    The block of an image is a hash of its patient, so resampling blocks is a bootstrap over patients.
    """

    def __init__(self, dim: int, blocks: int = 1):
        self.count, self.sums = torch.zeros(blocks, dtype=torch.float64), torch.zeros(blocks, dim, dtype=torch.float64)
        self.products = torch.zeros(blocks, dim, dim, dtype=torch.float64)

    def add(self, features: torch.Tensor, block=0) -> None:
        """features: (B, d), any float dtype or device; block: int or (B,) ints. Raises UserError on NaN or infinity."""
        features = features.detach().to("cpu", torch.float64)
        if not features.isfinite().all():
            raise UserError(f"{int((~features.isfinite().all(1)).sum())} of {len(features)} images have NaN or infinite features: the "
                            "weights or the samples are broken; no distance can be computed from them")
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

    def mean_cov(self, weights: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """-> mean (d,), unbiased covariance (d, d); weights: (blocks,) how often each block counts, default once."""
        w = torch.ones_like(self.count) if weights is None else weights.double()
        n, mean = float(w @ self.count), w @ self.sums / (w @ self.count)
        return mean, (torch.einsum("k,kij->ij", w, self.products) - n * torch.outer(mean, mean)) / (n - 1)


def frechet_distance(mu1, cov1, mu2, cov2) -> float:
    """|mu1 - mu2|^2 + tr(cov1 + cov2 - 2 sqrt(cov1 cov2)); means (d,), covariances (d, d), arrays or tensors -> float64. [Heusel eq.6]"""
    mu1, cov1, mu2, cov2 = (torch.as_tensor(np.asarray(v), dtype=torch.float64) for v in (mu1, cov1, mu2, cov2))
    if not all(v.isfinite().all() for v in (mu1, cov1, mu2, cov2)):
        raise UserError("means or covariances with NaN or infinity: the features they come from are broken")
    if mu1.shape != mu2.shape or cov1.shape != cov2.shape or cov1.shape != (len(mu1), len(mu1)):
        raise UserError(f"means {tuple(mu1.shape)}, {tuple(mu2.shape)} and covariances {tuple(cov1.shape)}, {tuple(cov2.shape)} "
                        "do not match: both sets need the features of one protocol")
    # TRAP: cov1 @ cov2 is not symmetric, eigvalsh of it is wrong. With cov1 = L L^T the eigenvalues are those of L^T cov2 L.
    root, failed = torch.linalg.cholesky_ex(cov1)
    if failed:  # singular: fewer images than dimensions
        values, vectors = torch.linalg.eigh(cov1)
        root = vectors * values.clamp(min=0).sqrt()
    cross = torch.linalg.eigvalsh(root.T @ cov2 @ root).clamp(min=0).sqrt().sum()
    return float((mu1 - mu2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross)


def bootstrap_error(first: Moments, second: Moments, resamples: int = 100, seed: int = 0) -> float:
    """Standard error of their Frechet distance: its spread when blocks (patients) are drawn anew, the same ones on both sides.

    # CHOICE: the spread and not the quantiles makes the interval: a resampled set has fewer distinct images, so its own
    # distance is biased upwards and the quantiles need not even contain the estimate.
    """
    draws = torch.Generator().manual_seed(seed)
    used = (first.count + second.count).nonzero()[:, 0]
    values = []
    for _ in range(resamples):
        drawn = used[torch.randint(len(used), (len(used),), generator=draws)]
        weights = torch.bincount(drawn, minlength=len(first.count))
        if min(weights.double() @ first.count, weights.double() @ second.count) > 1:
            values.append(frechet_distance(*first.mean_cov(weights), *second.mean_cov(weights)))
    return float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")


def _features(*sets):
    sets = [torch.as_tensor(np.asarray(f), dtype=torch.float64) for f in sets]
    if any(not f.isfinite().all() for f in sets):
        raise UserError("features with NaN or infinity: the weights or the images they come from are broken")
    if sets[0].shape[1] != sets[1].shape[1]:
        raise UserError(f"features of {sets[0].shape[1]} and {sets[1].shape[1]} dimensions: both sets need one protocol")
    return sets


def kernel_distance(f1, f2, with_error: bool = False):
    """Kernel distance (KID): unbiased squared MMD under k(x, y) = (x.y / d + 1)^3; f1 (n, d), f2 (m, d) -> float, may be below 0.

    # CHOICE: all pairs instead of random subsets: the same expectation without their noise; n^2 time, n memory.
    with_error=True -> (distance, standard error), the error by the delta method: 4 var(projection) / n for each set.
    """
    f1, f2 = _features(f1, f2)
    means = lambda a, b, same: torch.cat([((rows @ b.T / a.shape[1] + 1) ** 3).sum(1) for rows in a.split(1024)]) \
        .sub(((a.square().sum(1) / a.shape[1] + 1) ** 3) if same else 0) / (len(b) - same)
    xx, yy, xy, yx = means(f1, f1, 1), means(f2, f2, 1), means(f1, f2, 0), means(f2, f1, 0)
    distance = float(xx.mean() + yy.mean() - xy.mean() - yx.mean())
    error = 2 * math.sqrt((xx - xy).var() / len(f1) + (yy - yx).var() / len(f2))
    return (distance, error) if with_error else distance


def prdc(real, fake, k: int = 5) -> dict[str, float]:
    """Precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020), by k nearest neighbours.

    real (n, d), fake (m, d), k < n, m -> {"precision", "recall", "density", "coverage"}; blocks of 1,024 rows, so memory is O(n).
    """
    real, fake = _features(real, fake)
    if k >= min(len(real), len(fake)):
        raise UserError(f"{len(real)} real and {len(fake)} synthetic images, expected more than k = {k} of each")
    distances = lambda a, b: (torch.cdist(rows, b, compute_mode="use_mm_for_euclid_dist") for rows in a.split(1024))
    radius = lambda a: torch.cat([d.kthvalue(k + 1, 1).values for d in distances(a, a)])  # k + 1: the nearest is the image itself
    real_radius, fake_radius = radius(real), radius(fake)
    inside, nearest, recalled = 0, [], []
    for i, d in enumerate(distances(real, fake)):
        near = d < real_radius[i * 1024:(i + 1) * 1024, None]  # (rows, m): fake j lies in the ball of real i
        inside = inside + near.sum(0)
        nearest.append(near.any(1))
        recalled.append((d < fake_radius).any(1))
    return {"precision": float((inside > 0).double().mean()), "recall": float(torch.cat(recalled).double().mean()),
            "density": float(inside.double().mean() / k), "coverage": float(torch.cat(nearest).double().mean())}


# ---- What is measured on: a run, a labelled set in two parts, and what the two share ---------------------------------------


@dataclass
class Bench:
    """A run opened for measuring, and the images it is measured on."""

    run: dinodiff.Run
    images: data.Images
    pool: np.ndarray  # indices that may train a classifier
    test: np.ndarray  # indices held out, of other patients
    names: list[str]  # findings
    targets: np.ndarray  # float32 (len(images), findings)
    out: Path
    notes: list[str]  # what a reader of the results must know
    rank: int = 0
    world: int = 1

    def key(self, *values) -> str:
        """A short name for results that these images and values determine."""
        about = [self.images.name, len(self.images), self.images.keys[0], self.images.keys[-1], self.run.size, *values]
        return hashlib.blake2b(json.dumps(about, default=str).encode(), digest_size=5).hexdigest()

    def patient_of(self, i: int) -> int:
        """A number for the patient of image i, or for the image where its patient is unknown."""
        name = self.images.patients[i] or f"image {i}"
        return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "big")

    def pixels(self, indices) -> torch.Tensor:
        """uint8 (n, size, size); several readers at once."""
        with ThreadPoolExecutor(8) as readers:
            return torch.from_numpy(np.stack(list(readers.map(self.images.__getitem__, map(int, indices)))))


def ranks() -> tuple[int, int]:
    """(rank, world) under torchrun, (0, 1) without."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")
    return rank, world


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def open_run(folder, step, device: str) -> dinodiff.Run:
    """`load_run`, with its UNet compiled on CUDA."""
    run = load_run(folder, step, device)
    if run.device.type == "cuda":
        run.unet.compile()
    return run


def open_bench(s: Common) -> Bench:
    """Open the run, its test images, and refuse (UserError) test patients that the generator was trained on, unless --as-paper."""
    rank, world = ranks()
    folder = Path(s.run or dinodiff.newest_run())
    step = {"newest": None, "best": "best"}.get(s.checkpoint, s.checkpoint)
    if step not in (None, "best") and not step.isdigit():
        raise UserError(f"found --checkpoint {s.checkpoint!r}, expected newest, best or a step")
    run = open_run(folder, step, s.device)
    trained_on = run.config["data"]
    if not s.data and trained_on != "phantom":
        raise UserError(f"{folder} was trained on {trained_on}: name labelled images that it has not seen with --data (and --labels)")
    is_phantom = (s.data or "phantom") == "phantom"
    seed = run.config["seed"] + 1  # imaginary patients that training never saw
    images = (data.open_data("phantom", run.size, seed=seed, count=1024) if is_phantom else
              data.open_data(s.data, run.size, offline=s.offline, labels=s.labels or None))
    patients, notes = list(images.patients), []
    if all(re.fullmatch(r"p?1\d{7}", p) for p in patients):  # MIMIC-CXR: the paper's own split
        is_test = np.array([data.is_mimic_test(p) for p in patients])
        pool, test = np.flatnonzero(~is_test), np.flatnonzero(is_test)
    else:
        pool, test = data.split_by_patient(patients, s.held_out, s.seed)
    if not any(patients):
        notes.append("No patient is known for these images: they are split by image, so a patient may be on both sides.")
    if min(len(pool), len(test)) < 2:
        raise UserError(f"{s.data or 'phantom'}: {len(images)} images leave {len(pool)} to train and {len(test)} to test; expected more, "
                        "of several patients; see --held-out")
    labels = [tuple(name for name in row if name != data.NO_FINDING) for row in images.labels]
    names = [n for n in data.label_names(labels) if sum(n in labels[i] for i in pool) >= Classify.prevalence * len(pool)]
    targets = np.array([[name in row for name in names] for row in labels], np.float32).reshape(len(images), len(names))
    bench = Bench(run, images, pool, test, names, targets, Path(s.out) if s.out else folder / "eval", notes, rank, world)
    refuse(s, bench, "patients of the test part are among those that the generator was trained on", shared_patients(bench, seed))
    return bench


def identities(images, seed: int, indices=None) -> dict[str, str]:
    """{what identifies an image's patient: its key}: provider and patient, and the file's name whatever the provider is called."""
    found = {}
    for i in range(len(images)) if indices is None else indices:
        key, patient, where = images.keys[i], images.patients[i], f"phantom {seed}" if images.name == "phantom" else ""
        found[f"{where}/{Path(key).stem}"] = key
        if patient:
            found[f"{where or images.providers[i]}: patient {patient}"] = key
    return found


def training_images(bench: Bench):
    """The set that the generator was trained on, or None where it is out of reach."""
    c = bench.run.config
    try:
        return data.open_data(c["data"], bench.run.size, seed=c["seed"], offline=True)
    except (UserError, OSError) as error:
        bench.notes.append(f"The generator's training images are out of reach ({str(error).splitlines()[0]}), so leaks cannot be looked for.")
        return None


def shared_patients(bench: Bench, seed: int) -> list[str]:
    train = training_images(bench)
    if train is None:
        return []
    trained, tested = identities(train, bench.run.config["seed"]), identities(bench.images, seed, bench.test)
    return sorted(trained.keys() & tested.keys())


def refuse(s: Common, bench: Bench, what: str, shared: list[str]) -> None:
    """Stop where two sides of a split share something; with --as-paper go on, and mark the results."""
    if not shared:
        return
    few = ", ".join(shared[:5]) + (" …" if len(shared) > 5 else "")
    if not s.as_paper:
        raise UserError(f"found a leak: {what} ({len(shared)}: {few}). Numbers measured so would flatter. Expected two sides that share "
                        "nobody: give other --data, or --as-paper to let it through and mark the results")
    bench.notes.append(f"MARKED (--as-paper): {what} ({len(shared)}: {few}). These numbers flatter.")


def seed_of(*values: int) -> int:
    """The seed of one synthetic image, by what it is."""
    return int(hash64(*values) >> np.uint64(2))


def chunks(items, size: int):
    return (items[i:i + size] for i in range(0, len(items), size))


# ---- Features, by named protocols (paper 2.4) -------------------------------------------------------------------------------


def xrays(images: torch.Tensor, size: int, scale: float, device) -> torch.Tensor:
    """uint8 (B, S, S) -> (B, 1, size, size) in [-scale, scale], bilinear with antialiasing."""
    x = (images.to(device)[:, None].float() / 127.5 - 1) * scale
    if x.shape[-1] != size:
        x = F.interpolate(x, (size, size), mode="bilinear", antialias=True, align_corners=False)
    return x.contiguous(memory_format=torch.channels_last)


def protocol(s: Common, bench: Bench):
    """-> (name, d, embed), embed(images uint8 (B, S, S)) -> float32 (B, d) on the CPU. Numbers of different protocols do not compare."""
    device, name = bench.run.device, s.protocol
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
    if name == "dino" or not bench.names:
        if name == "local":
            raise UserError(f"protocol local trains on labels, and {bench.images.name} has none; give --labels, or --protocol dino")
        vit = bench.run.vit  # the generator was conditioned on these very features: good numbers are to be expected
        cls = lambda images: vit.global_tokens(vit.prepare(data.to_model(images.to(device))))[:, 0].float().cpu()
        return "dino", vit.config.hidden_size, cls
    recipe = TINY[Classify] if bench.run.config["preset"] == "tiny" else Classify()
    recipe = dataclasses.replace(recipe, size=min(recipe.size, bench.run.size), epochs=16)
    # Outside of the run folder, so that all runs on this machine are measured with one net
    place = data.cache_folder() / "features" / bench.key("local", s.seed, s.held_out, recipe)
    if not place.is_dir() and bench.rank == 0:
        pool = bench.pool[:5000]
        train, val = data.split_by_patient([bench.images.patients[i] for i in pool], 0.2, s.seed)
        part = lambda rows: (bench.pixels(pool[rows]).numpy(), bench.targets[pool[rows]])
        net, told = fit(recipe, part(train), part(val), s.seed, device)
        print(f"protocol local: a DenseNet trained on {len(train)} images in {told['epochs']} epochs, validation AUC {told['val']:.3f}")
        net.save_pretrained(place)
    barrier()
    net = DenseNet.from_pretrained(place).to(device, memory_format=torch.channels_last).eval()
    return "local", net.classifier.in_features, lambda images: net.embed(xrays(images, recipe.size, 1.0, device)).float().cpu()


# ---- Frechet distance of checkpoints (paper 2.4, Figure 3) ------------------------------------------------------------------


def gather(bench: Bench, embed, dim: int, rows: np.ndarray, picture, s: Fid) -> tuple[Moments, torch.Tensor]:
    """Features of picture(positions in rows) -> their moments, and those of the first `companions` themselves.

    Each rank takes its share of the rows; every rank gets the sums and features of all.
    """
    moments, kept = Moments(dim, BLOCKS), {}
    for part in chunks(np.arange(len(rows))[bench.rank::bench.world], s.micro_batch):
        features = embed(picture(part))
        block = [hash64(bench.patient_of(i)) % np.uint64(BLOCKS) for i in rows[part]]
        moments.add(features, torch.tensor(np.array(block, dtype=np.int64)))
        kept |= {int(i): row for i, row in zip(part, features) if i < s.companions}
    if dist.is_initialized():
        shares = [None] * bench.world
        dist.all_gather_object(shares, kept)
        kept = {i: row for share in shares for i, row in share.items()}
    return moments.merge(), torch.stack([kept[i] for i in sorted(kept)])


def compare(real: tuple[Moments, torch.Tensor], fake: tuple[Moments, torch.Tensor], s: Fid) -> dict:
    """Every distance of two sets of features, as plain numbers."""
    kid, kid_error = kernel_distance(real[1], fake[1], with_error=True)
    fid, error = frechet_distance(*real[0].mean_cov(), *fake[0].mean_cov()), bootstrap_error(real[0], fake[0], s.resamples)
    return {"fid": fid, "fid_error": error, "fid_95": [max(0.0, fid - 1.96 * error), fid + 1.96 * error], "kid": kid,
            "kid_error": kid_error, **prdc(real[1], fake[1], min(s.neighbours, len(real[1]) - 1, len(fake[1]) - 1))}


@torch.no_grad()
def fid(s: Fid) -> str:
    """Reconstruct each real test image once and compare the two sets; two floors; with --checkpoints all also Figure 3 and best.json."""
    bench = open_bench(s)
    if s.checkpoints not in ("newest", "all"):
        raise UserError(f"found --checkpoints {s.checkpoints!r}, expected newest or all (one step: --checkpoint STEP)")
    name, d, embed = protocol(s, bench)
    run, steps = bench.run, bench.run.checkpoints if s.checkpoints == "all" else [bench.run.step]
    draw = lambda rows, most: rows[np.argsort(hash64(s.seed, 3, rows))][:most]
    test = draw(bench.test, s.count)
    others = draw(bench.pool, len(test))
    n, score = len(test), lambda rows, picture: compare(real, gather(bench, embed, d, rows, picture, s), s)
    path = bench.out / f"fid-{bench.key(name, s.held_out, s.count, s.steps, s.seed, s.companions, s.neighbours, s.resamples, s.xrv)}.json"
    known = json.loads(path.read_text()) if path.is_file() else {"protocol": name, "images": n, "dimensions": d, "floors": {}, "steps": {}}
    if n < d:
        bench.notes.append(f"{n} images are fewer than {d} dimensions: the covariances are singular and FID is biased upwards; trust KID.")
        print("warning: " + bench.notes[-1], file=sys.stderr)
    real = gather(bench, embed, d, test, lambda part: bench.pixels(test[part]), s)
    if not known["floors"]:
        def round_trip(part):
            with dinodiff.autocast(run.device, run.config["dtype"]):
                z = run.vae.encode(data.to_model(bench.pixels(test[part]).to(run.device)))[0]
                return data.to_uint8(run.vae.decode(z).float()).cpu()

        known["floors"] = {f"real against real ({len(others)} images of other patients)": score(others, lambda part: bench.pixels(others[part])),
                           "VAE round trip of the test images": score(test, round_trip)}
    tokens, clock = {}, 0.0

    def reconstruct(part):
        nonlocal clock
        fresh = [i for i in part if i not in tokens]
        if fresh:  # DINO is frozen: one encoding serves every checkpoint
            tokens.update(zip(fresh, encode_tokens(run, bench.pixels(test[fresh])).cpu()))
        begin = time.perf_counter()
        pictures = generate(at, torch.stack([tokens[i] for i in part]), [seed_of(s.seed, 1, int(i)) for i in test[part]], s.steps)
        clock += time.perf_counter() - begin
        return pictures

    for step in steps:
        if str(step) not in known["steps"]:
            at, clock = run if step == run.step else open_run(run.folder, step, s.device), 0.0
            known["steps"][str(step)] = score(test, reconstruct)
            if bench.rank == 0:
                print(f"step {step:,}: FID {known['steps'][str(step)]['fid']:.3f} ({name}), {-(-n // bench.world) / clock:.1f} images/s a rank", flush=True)
                data.write_json(path, known)
    results = {step: known["steps"][str(step)] for step in steps}
    best = min(results, key=lambda step: results[step]["fid"])
    floor = next(iter(known["floors"].values()))["fid"]
    rows = [(f"step {step:,}" + " (best)" * (step == best and len(steps) > 1), r) for step, r in results.items()] + list(known["floors"].items())
    lines = [f"## FID and checkpoints (paper 2.4, Figure 3): protocol {name}, n = {n}, d = {d}", ""]
    lines += table(["", "FID", "95 % interval", "KID x 1000 ± SE", "precision", "recall", "density", "coverage"],
                   [[title, f"{r['fid']:.3f}", "{:.3f} – {:.3f}".format(*r["fid_95"]), f"{1000 * r['kid']:.3f} ± {1000 * r['kid_error']:.3f}",
                     *(f"{r[k]:.3f}" for k in ("precision", "recall", "density", "coverage"))] for title, r in rows])
    lines += ["", f"Each of the {n} test images was reconstructed once ({s.steps} DDIM steps). The interval is 1.96 bootstrap standard errors "
              "over patients. The paper: 4.7 (DiNOv1, step 80,000) and 6.4 (DiNOv2, step 120,000) on 5,000 images of MIMIC-CXR p19."]
    if bench.rank == 0 and s.checkpoints == "all":
        curve = [[r["fid"] for r in results.values()], [1.96 * r["fid_error"] for r in results.values()]]
        plot_lines(bench.out / "figure3.png", {run.folder.name: (steps, *curve)}, f"FID of {run.folder.name} ({n} images)", "training step",
                   f"FID ({name})", level=(floor, "floor: real against real"))
        lines += ["", "![FID by training step](figure3.png)"]
        data.write_json(run.folder / "best.json", {"step": best, "fid": results[best]["fid"], "protocol": name, "images": n,
                                                   "steps": {str(step): r["fid"] for step, r in results.items()}})
    return finish(bench, s, "fid", lines)


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return [f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows)]


def finish(bench: Bench, s: Common, name: str, lines: list[str]) -> str:
    """Write a section of the report, with the notes and the command that makes it again; -> its text."""
    changed = {f.name: getattr(s, f.name) for f in dataclasses.fields(s) if getattr(s, f.name) != f.default and f.name != "run"}
    words = lambda v: " ".join(map(str, v)) if type(v) is tuple else f"'{v}'" if type(v) is str else v
    flags = "".join(f" --{'' if v is not False else 'no-'}{k.replace('_', '-')}" + ("" if type(v) is bool else f" {words(v)}") for k, v in changed.items())
    text = "\n".join([*lines, "", *(f"> {note}" for note in dict.fromkeys(bench.notes)), "",
                      f"`python evaluate.py {name} --run {bench.run.folder}{flags}`", ""])
    if bench.rank == 0:
        data.write_file(bench.out / f"{name}.md", text)
        print(f"\n{text}\n-> {bench.out / f'{name}.md'}", flush=True)
    barrier()
    return text


# ---- Training a classifier (paper 2.5) --------------------------------------------------------------------------------------


def label_aucs(targets: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Area under the ROC curve of each label, (n, L) each -> (L,); NaN where the label has one class only. Ties count half."""
    from scipy.stats import rankdata
    positive = np.asarray(targets) > 0.5
    p, n = positive.sum(0), (~positive).sum(0)
    ranks_of_positives = (rankdata(scores, axis=0) * positive).sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where((p > 0) & (n > 0), (ranks_of_positives - p * (p + 1) / 2) / (p * n), np.nan)


def macro_auc(targets: np.ndarray, scores: np.ndarray) -> float:
    """Mean over the labels that have both classes; NaN where none has."""
    aucs = label_aucs(targets, scores)
    return float(np.nanmean(aucs)) if np.isfinite(aucs).any() else float("nan")


@torch.no_grad()
def predict(net: DenseNet, pixels: np.ndarray, size: int, device) -> np.ndarray:
    """uint8 (n, S, S) -> logits (n, L)."""
    net.eval()
    return np.concatenate([net(xrays(torch.from_numpy(np.ascontiguousarray(part)), size, 1.0, device)).float().cpu().numpy()
                           for part in chunks(pixels, 256)])


@torch.enable_grad()  # whatever the caller does
def fit(s: Classify, train, val, seed: int, device, steps_an_epoch: int = 0) -> tuple[DenseNet, dict]:
    """The paper's recipe: AdamW, lr / 10 on a plateau of the validation AUC, early stopping; the best epoch's weights are kept.

    train: (images, targets (n, L)); images[rows] -> uint8 (b, S, S); val: the same. UserError where validation has one class only.
    """
    images, targets = train
    if not np.isfinite(label_aucs(val[1], np.zeros_like(val[1]))).any():
        raise UserError(f"each finding is in all or in none of the {len(val[1])} validation images (one class only): an AUC needs both; "
                        "take more images or fewer folds")
    torch.manual_seed(seed)
    net = DenseNet(targets.shape[1], 1, s.growth, s.blocks, s.width)
    if s.init:
        state = DenseNet.from_pretrained(s.init, offline=s.offline).state_dict()
        first = state["features.conv0.weight"]  # three colours of one grey image are the sum over the channels
        state |= {"features.conv0.weight": first.sum(1, keepdim=True)} | {k: v for k, v in net.state_dict().items() if k.startswith("classifier")}
        data.load_weights(net, state, s.init)
    net = net.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), s.lr, weight_decay=s.weight_decay, fused=True)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", factor=0.1, patience=s.patience)
    best, best_epoch, kept, steps, n = -1.0, 0, None, 0, len(targets)
    for epoch in range(s.epochs):
        net.train()
        count = max(steps_an_epoch, -(-n // s.batch))
        order = np.concatenate([np.random.default_rng((seed, epoch, k)).permutation(n) for k in range(-(-count * min(s.batch, n) // n))])
        order = order if not steps_an_epoch else order[:count * min(s.batch, n)]
        for rows in np.array_split(order, count):  # near-equal batches: none of a single image, which batch norm could not take
            x = data.augment(torch.from_numpy(images[np.sort(rows)]).to(device), np.sort(rows), epoch, seed)
            x = F.interpolate(x, (s.size, s.size), mode="bilinear", antialias=True) if x.shape[-1] != s.size else x
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits = net(x.contiguous(memory_format=torch.channels_last))
            loss = F.binary_cross_entropy_with_logits(logits.float(), torch.from_numpy(targets[np.sort(rows)]).to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps += 1
        auc = macro_auc(val[1], predict(net, val[0], s.size, device))
        plateau.step(auc)
        if auc > best:
            best, best_epoch, kept = auc, epoch, {k: v.clone() for k, v in net.state_dict().items()}
        elif epoch - best_epoch >= s.stop:
            break
    net.load_state_dict(kept)
    return net.eval(), {"val": best, "epochs": epoch + 1, "best_epoch": best_epoch + 1, "steps": steps, "train": n}


# ---- Classification experiments (paper 2.4, Table 1, Figure 4) -------------------------------------------------------------


def interpolation_pairs(targets, fold: np.ndarray, wanted: dict[int, int], seed: int) -> list[tuple[int, int, float]]:
    """Pairs (i, j, r) of images that share a label, until each training part (all folds but k) holds wanted[k] pairs inside it.

    targets: (n, L) of 0 and 1; fold: (n,) int. Every admissible pair, in random order, comes once before any comes again, then
    with another r. CHOICE: r is uniform in [0, 1]; pairs that a training part uses never touch its validation fold.
    """
    has = np.asarray(targets, np.float32)
    pairs = np.argwhere(np.triu(has @ has.T > 0, 1))
    inside = {k: (fold[pairs] != k).all(1) for k in wanted}
    lacking = [k for k in wanted if wanted[k] and not inside[k].any()]
    if lacking:
        raise UserError(f"no two images outside fold {lacking[0]} share a finding, so nothing can be interpolated there; take a larger N")
    result, got = [], dict.fromkeys(wanted, 0)
    for again in itertools.count():
        order = np.argsort(hash64(seed, again, np.arange(len(pairs))))
        counts = np.stack([got[k] + np.cumsum(inside[k][order]) for k in wanted])  # (folds, pairs)
        enough = (counts >= np.array(list(wanted.values()))[:, None]).all(0)
        last = int(enough.argmax()) + 1 if enough.any() else len(order)
        r = data.uniforms(1, seed, again, 1, order[:last])[:, 0]
        result += [(int(i), int(j), float(x)) for (i, j), x in zip(pairs[order[:last]], r)]
        if enough.any():
            return result
        got = dict(zip(wanted, counts[:, -1]))


def nearer_label(targets, pairs) -> np.ndarray:
    """The labels of each pair (i, j, r): those of the end that r is nearer to."""
    return np.asarray(targets)[[i if r < 0.5 else j for i, j, r in pairs]]


def synthesise(s: Classify, bench: Bench, subset: np.ndarray, pairs: list, name: str) -> data.Images:
    """Images of lerp(c_i, c_j, r) for each (i, j, r), positions in `subset`, as tar shards that are made once; a killed run goes on."""
    folder = bench.out / "synthetic" / f"{name}-{bench.key(name, bench.run.step, s.steps, s.seed, s.held_out, s.sizes, s.folds)}"
    labels, tokens, clock, made = nearer_label(bench.targets[subset], pairs), {}, time.perf_counter(), 0
    recipe = data.Prepare(source=name, size=bench.run.size)
    todo = list(range(-(-len(pairs) // s.per_shard)))
    bar = data.progress(desc=f"sampling {name}", total=len(pairs), unit=" images")
    for k in todo[bench.rank::bench.world]:
        part, path = pairs[k * s.per_shard:(k + 1) * s.per_shard], folder / f"shard-{k:06d}.tar"
        if path.is_file() and len(data.scan_shard(path)[0]) == len(part):
            bar.update(len(part))
            continue
        folder.mkdir(parents=True, exist_ok=True)
        fresh = sorted({p for i, j, _ in part for p in (i, j)} - tokens.keys())
        for some in chunks(fresh, s.micro_batch):
            tokens |= zip(some, encode_tokens(bench.run, bench.pixels(subset[some])).cpu())
        files, rows = [], {}
        for first in range(0, len(part), s.micro_batch):
            some = part[first:first + s.micro_batch]
            c = torch.stack([torch.lerp(tokens[i], tokens[j], r) for i, j, r in some])
            ids = [k * s.per_shard + first + b for b in range(len(some))]
            for n, (i, j, r), picture in zip(ids, some, generate(bench.run, c, [seed_of(s.seed, 2, n) for n in ids], s.steps).numpy()):
                file, png = f"{n:07d}-{i}-{j}-{r:.3f}.png", io.BytesIO()
                Image.fromarray(picture).save(png, "PNG")
                files.append(((k, file, name), (png.getvalue(), "")))
                rows[file] = (bench.images.patients[subset[i if r < 0.5 else j]], tuple(n for n, y in zip(bench.names, labels[n]) if y))
            bar.update(len(some))
            made += len(some)
        data._write_shard(path, files, rows, f"synthetic {name}", recipe)
        os.replace(path.with_name(f".{path.name}.partial"), path)
    bar.close()
    barrier()
    if made:
        print(f"{name}: {len(pairs)} images in {folder}, {made / (time.perf_counter() - clock):.1f} images/s on this rank", flush=True)
    return data.open_data(str(folder / "*.tar"), bench.run.size)


def stored_pixels(images, indices, size: int, path: Path, rank: int) -> Path:
    """The images at the classifier's size as one memory-mapped uint8 (n, size, size) file: decoded once, in memory never."""
    if rank == 0 and not (path.is_file() and len(np.load(path, mmap_mode="r")) == len(indices)):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        array = np.lib.format.open_memmap(partial, "w+", np.uint8, (len(indices), size, size))
        with ThreadPoolExecutor(8) as readers:
            for n, image in enumerate(readers.map(lambda i: data.resize(images[int(i)], size), indices)):
                array[n] = image
        array.flush()
        os.replace(partial, path)
    barrier()
    return path


@dataclass(frozen=True)
class Fold:
    """One training of one cell: everything a worker process needs, and where its result goes."""

    path: Path
    settings: Classify
    train: tuple  # ((pixel file, rows), …)
    targets: np.ndarray
    val: tuple
    val_targets: np.ndarray
    test: tuple
    test_targets: np.ndarray
    seed: int
    steps_an_epoch: int
    device: str


class Rows:
    """Rows of several pixel files under one index."""

    def __init__(self, parts):
        self.files = [np.load(path, mmap_mode="r") for path, _ in parts]
        self.file = np.concatenate([np.full(len(rows), k) for k, (_, rows) in enumerate(parts)])
        self.row = np.concatenate([rows for _, rows in parts]).astype(int)

    def __getitem__(self, rows) -> np.ndarray:
        return np.stack([self.files[k][r] for k, r in zip(self.file[rows], self.row[rows])])

    def __len__(self):
        return len(self.row)


def train_fold(job: Fold) -> str:
    """Train one fold of one cell and write its scores; -> what went wrong, or nothing."""
    if job.device == "cpu" and job.settings.device == "one thread":
        torch.set_num_threads(1)
    try:
        everything = lambda part: Rows([part])[np.arange(len(part[1]))]
        net, told = fit(job.settings, (Rows(job.train), job.targets), (everything(job.val), job.val_targets), job.seed, torch.device(job.device),
                        job.steps_an_epoch)
        aucs = label_aucs(job.test_targets, predict(net, everything(job.test), job.settings.size, torch.device(job.device)))
        result = {"auc": float(np.nanmean(aucs)), "labels": [None if np.isnan(a) else float(a) for a in aucs], **told}
    except UserError as error:
        result = {"error": str(error)}
    data.write_json(job.path, result)
    return result.get("error", "")


def paired_tests(scores, baseline, test_share: float) -> tuple[float, float]:
    """Two-sided p of the paired t-test, and of Nadeau and Bengio's (2003), whose variance is (1/k + test_share) s^2 and not s^2 / k.

    test_share: validation images over training images of a fold, 1 / (folds - 1): the training sets overlap.
    CHOICE: with 5 folds a Wilcoxon test cannot reach 0.05, so the paper's unnamed test is taken for the t-test.
    """
    from scipy.stats import t
    difference = np.asarray(scores, float) - np.asarray(baseline, float)
    k, mean, sd = len(difference), difference.mean(), difference.std(ddof=1) if len(difference) > 1 else 0.0
    if sd == 0:
        return (1.0, 1.0) if mean == 0 or k < 2 else (0.0, 0.0)
    return tuple(float(2 * t.sf(abs(mean) / (sd * math.sqrt(share)), k - 1)) for share in (1 / k, 1 / k + test_share))


def holm(p_values) -> list[float]:
    """Holm's step-down correction: the i-th smallest of m p-values times m - i + 1, never falling, at most 1."""
    p = np.asarray(p_values, float)
    order = np.argsort(p)
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted.tolist()


EXPERIMENTS = {"augment": "(a) data augmentation", "synthetic": "(b) full synthetic training"}


def classify(s: Classify) -> str:
    """Table 1 and Figure 4: real only, real with synthetic, synthetic only; by strategy, ratio and number of real images."""
    bench = open_bench(s)
    if not bench.names:
        raise UserError(f"{bench.images.name} has no labels, expected findings to classify: give --labels file.csv (file,patient,labels)")
    unknown = [v for v in s.strategies if v not in ("reconstruct", "interpolate")]
    if unknown:
        raise UserError(f"found --strategies {unknown[0]!r}, expected reconstruct and/or interpolate")
    digest = bench.key("classify", bench.run.step, dataclasses.replace(s, sizes=(), ratios=(), strategies=(), out="", run="", micro_batch=0))
    cells = bench.out / "classify" / digest
    picks = data.balanced_subsets([tuple(n for n, y in zip(bench.names, row) if y) for row in bench.targets[bench.pool]], s.sizes, s.seed)
    subset = bench.pool[picks[max(picks)]]  # each smaller N is its beginning
    real = stored_pixels(bench.images, subset, s.size, cells / f"real-{max(picks)}.npy", bench.rank)
    test = stored_pixels(bench.images, bench.test, s.size, cells / "test.npy", bench.rank), np.arange(len(bench.test))
    y, y_test = bench.targets[subset], bench.targets[bench.test]
    fold = {n: np.empty(n, int) for n in picks}
    for n in picks:
        rows = [[bench.images.patients[i] for i in subset[:n]], [tuple(m for m, v in zip(bench.names, row) if v) for row in y[:n]]]
        for k, members in enumerate(data.folds_by_patient(*rows, s.folds, s.seed)):
            fold[n][members] = k
    sources = {}  # (strategy, N) -> (pixel file, pairs, labels); reconstructions are the "pairs" (i, i, 0), variant after variant
    for strategy in s.strategies:
        for n in picks if strategy == "interpolate" else [max(picks)]:
            wanted = {k: int((fold[n] != k).sum()) * max(s.ratios) for k in range(s.folds)}
            name = f"{strategy}-{n}"
            pairs = (interpolation_pairs(y[:n], fold[n], wanted, s.seed) if strategy == "interpolate" else
                     [(i, i, 0.0) for _ in range(max(s.ratios)) for i in range(n)])
            images = synthesise(s, bench, subset, pairs, name)
            assert len(images) == len(pairs)
            file = stored_pixels(images, range(len(images)), s.size, cells / f"{name}-{max(s.ratios)}.npy", bench.rank)
            for size in picks if strategy == "reconstruct" else [n]:
                sources[strategy, size] = file, np.array([p[:2] for p in pairs]), nearer_label(y, pairs)

    jobs, names = [], {n: [] for n in picks}
    for n in picks:
        for experiment, strategy, ratio in [("real", "", 0), *itertools.product(EXPERIMENTS, s.strategies, s.ratios)]:
            names[n].append((experiment, strategy, ratio))
            for k in range(s.folds):
                train, val = np.flatnonzero(fold[n] != k), np.flatnonzero(fold[n] == k)
                parts, targets = [(real, train)] * (experiment != "synthetic"), [y[train]] * (experiment != "synthetic")
                if ratio:
                    file, ends, labels = sources[strategy, n]
                    rows = np.flatnonzero((ends < n).all(1) & np.isin(ends, train).all(1))[:ratio * len(train)]
                    parts, targets = [*parts, (file, rows)], [*targets, labels[rows]]
                most = -(-len(train) * (1 + max(s.ratios)) // s.batch) if s.equal_steps else 0
                job = Fold(cells / f"N{n}-{experiment}-{strategy or 'only'}-{ratio}-fold{k}.json", s, tuple(parts), np.concatenate(targets),
                           (real, val), y[val], test, y_test, seed_of(s.seed, n, k) % 2**31, most, str(bench.run.device))
                jobs += [] if job.path.is_file() else [job]
    train_all(jobs[bench.rank::bench.world], bench)
    barrier()
    return finish(bench, s, "classify", table_1(s, bench, cells, names) if bench.rank == 0 else [])


def train_all(jobs: list[Fold], bench: Bench) -> None:
    """On a GPU or one rank of many, one after another; on a CPU alone, one process a core, each of one thread."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with contextlib.ExitStack() as stack:
        run = map
        if bench.run.device.type == "cpu" and bench.world == 1 and cores > 1 and len(jobs) > 3:
            # TRAP: not by fork: the parent has run OpenMP and autograd threads, which a forked child would wait for
            run = stack.enter_context(ProcessPoolExecutor(cores, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,))).map
        for error in data.progress(run(train_fold, jobs), "training classifiers", len(jobs), " folds"):
            if error:
                print(f"one training was left out: {error}", file=sys.stderr)


def table_1(s: Classify, bench: Bench, cells: Path, names: dict) -> list[str]:
    """Collect the cells, test them, write table1.json and the bars of Figure 4; -> the lines of the section."""
    results, share = {}, 1 / (s.folds - 1)
    for n, column in names.items():
        for cell in column:
            read = [json.loads((cells / f"N{n}-{cell[0]}-{cell[1] or 'only'}-{cell[2]}-fold{k}.json").read_text()) for k in range(s.folds)]
            bad = {r["error"] for r in read if "error" in r}
            bench.notes += [f"N = {n}, {' '.join(map(str, cell))}: {sum('error' in r for r in read)} of {s.folds} folds could not be trained: {e}" for e in bad]
            scores = [r["auc"] if "auc" in r else None for r in read]
            results[n, cell] = {"N": n, "experiment": cell[0], "strategy": cell[1], "ratio": cell[2], "folds": scores, "details": read}
        base = results[n, column[0]]["folds"]
        for cell in column:
            r = results[n, cell]
            both = [(a, b) for a, b in zip(r["folds"], base) if a is not None and b is not None]
            valid = [a for a in r["folds"] if a is not None]
            r |= {"mean": float(np.mean(valid)) if valid else None, "sd": float(np.std(valid, ddof=1)) if len(valid) > 1 else None}
            r["p"], r["p_corrected"] = paired_tests(*zip(*both), share) if len(both) > 1 and cell[2] else (None, None)
        tested = [results[n, cell] for cell in column if results[n, cell]["p"] is not None]
        for kind in ("p", "p_corrected"):
            for r, p in zip(tested, holm([r[kind] for r in tested])):
                r[kind + "_holm"] = p
    mark = lambda r: ("*" if (r["p"] or 0 if r["p"] is not None else 1) < 0.05 else "") + ("†" if r.get("p_corrected_holm", 1) < 0.05 else "")
    show = lambda r: "–" if r["mean"] is None else f"{r['mean']:.3f} ± {r['sd'] or 0:.3f} {mark(r)}".strip()
    title = {"real": "real only", **EXPERIMENTS}
    lines = ["## Classification (paper 2.4, Table 1, Figure 4)", "", f"Macro AUC over {len(bench.names)} findings ({', '.join(bench.names)}) on {len(bench.test)} "
             f"held-out images, mean ± SD over {s.folds} folds; run {bench.run.folder.name}, step {bench.run.step:,}."
             + (" Every cell of a column trains for as many optimizer steps." if s.equal_steps else
                " An epoch is one pass over the data, as in the paper: cells with more images also make more optimizer steps (--equal-steps)."), ""]
    lines += table(["", "strategy", "real : synthetic", *(f"N = {n}" for n in names)],
                   [[title[c[0]], c[1], f"1 : {c[2]}", *(show(results[n, c]) for n in names)] for c in next(iter(names.values()))])
    lines += ["", "\\* p < 0.05 in the paired t-test against real only, as in the paper; † also with Nadeau and Bengio's correction and Holm's over "
              "the column. The paper's own table: docs/paper_table1.md.", ""]
    data.write_json(bench.out / "table1.json", {"settings": dataclasses.asdict(s), "findings": bench.names, "run": str(bench.run.folder), "step": bench.run.step,
                                                "test_images": len(bench.test), "notes": bench.notes, "cells": list(results.values())})
    for letter, experiment in zip("ab", EXPERIMENTS):
        groups = {}
        for n, column in names.items():
            base = results[n, column[0]]["mean"]
            change = lambda r: (100 * (r["mean"] / base - 1), 100 * (r["sd"] or 0) / base, mark(r).replace("†", "*"))
            groups[f"N = {n}"] = {f"{c[1]} 1:{c[2]}": change(results[n, c]) for c in column if c[0] == experiment and base and results[n, c]["mean"]}
        if all(groups.values()):
            plot_bars(bench.out / f"figure4{letter}.png", groups, f"{EXPERIMENTS[experiment]}: change of AUC against real only",
                      "change of mean AUC (%)", "real images")
            lines += [f"![Figure 4 {EXPERIMENTS[experiment]}](figure4{letter}.png)"]
    return lines


# ---- Audit: copies of training images, and what the splits share -----------------------------------------------------------


def thumbnails(images: torch.Tensor, side: int = 32) -> torch.Tensor:
    """uint8 (B, S, S) -> (B, side^2), mean 0 and length 1: the product of two is their correlation."""
    x = F.interpolate(images[:, None].float(), (side, side), mode="bilinear", antialias=True).flatten(1)
    return F.normalize(x - x.mean(1, keepdim=True), dim=1)


def nearest(queries: torch.Tensor, bank: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(q, d), (n, d) -> Euclidean distance (q,) to the nearest row of `bank` and its index (q,), in blocks."""
    found = [torch.cdist(part, bank).min(1) for part in queries.split(512)]
    return torch.cat([f.values for f in found]).numpy(), torch.cat([f.indices for f in found]).numpy()


@torch.no_grad()
def audit(s: Audit) -> str:
    """Is a synthetic image nearer to a training image than unseen real ones are? Do the splits share patients or copies?"""
    bench = open_bench(s)
    run, train = bench.run, training_images(bench)
    if train is None:
        raise UserError(f"the training images of {run.folder} ({run.config['data']}) are out of reach, expected them to search for copies")
    name, _, embed = protocol(s, bench)
    spread = lambda n, count: np.unique(np.linspace(0, n - 1, min(n, count)).astype(int))
    read = lambda images, rows: torch.from_numpy(np.stack([images[int(i)] for i in rows]))

    def both(pictures):  # thumbnails and features, streamed
        parts = [(thumbnails(p), embed(p)) for p in pictures]
        return {"pixels (32 px, correlation)": torch.cat([a for a, _ in parts]), f"features ({name})": torch.cat([b for _, b in parts])}

    bank_rows, bench_test = spread(len(train), s.train_images), bench.test[spread(len(bench.test), 4 * s.count)]
    bank = both(read(train, part) for part in data.progress(list(chunks(bank_rows, 256)), "training images", unit=" x 256"))
    unseen = both(read(bench.images, part) for part in chunks(bench_test, 256))
    conditions = {"reconstructions of training images": (train, bank_rows[spread(len(bank_rows), s.count)]),
                  "reconstructions of unseen images": (bench.images, bench_test[spread(len(bench_test), s.count)])}
    made = {}
    for kind, (images, rows) in conditions.items():
        made[kind] = torch.cat([generate(run, encode_tokens(run, read(images, part)), [seed_of(s.seed, 4, int(i)) for i in part], s.steps)
                                for part in data.progress(list(chunks(rows, s.micro_batch)), f"sampling {kind}", unit=" batches")])
    rows, record, closest = [], {}, {}
    for space in bank:
        calibration, _ = nearest(unseen[space], bank[space])
        rows.append([space, "unseen real images", len(calibration), f"{np.median(calibration):.3f}", "5 %", "", "0.50"])
        for kind, pictures in made.items():
            distance, index = nearest(both(pictures.split(256))[space], bank[space])
            source = np.isin(bank_rows[index], -1) if "unseen" in kind else bank_rows[index] == conditions[kind][1]
            closer = float((distance < np.quantile(calibration, 0.05)).mean())
            chance = float((distance[:, None] < calibration).mean() + (distance[:, None] == calibration).mean() / 2)
            rows.append([space, kind, len(distance), f"{np.median(distance):.3f}", f"{100 * closer:.0f} %",
                         "" if "unseen" in kind else f"{100 * source.mean():.0f} %", f"{chance:.2f}"])
            record[f"{kind}; {space}"] = {"median": float(np.median(distance)), "nearer_than_5_percent_of_real": closer, "own_source": float(source.mean()),
                                          "nearer_than_real": chance, "median_of_real": float(np.median(calibration))}
            closest[kind, space] = [(int(q), int(bank_rows[index[q]]), float(distance[q])) for q in np.argsort(distance)[:s.pairs]]
    pictures, captions, titles = [], [], []
    for (kind, space), pairs in closest.items():
        for title, picture in (("synthetic", lambda p: made[kind][p[0]].numpy()), ("nearest training", lambda p: train[p[1]])):
            titles.append(f"{title}, {'train' if 'unseen' not in kind else 'unseen'}, {space.split()[0]}")
            for pair in pairs:
                pictures.append(thin(picture(pair)))
                captions.append(f"{pair[2]:.3f}" if title == "synthetic" else train.keys[pair[1]])
    sheet = data.grid(pictures, s.pairs, captions, titles, f"The closest pairs of synthetic and training images ({run.folder.name}, step {run.step:,})")

    # The ledger: images that are copies of one another on two sides of a split
    copies = {}
    pixels = "pixels (32 px, correlation)"
    pool_rows = bench.pool[spread(len(bench.pool), s.train_images)]
    pool = torch.cat([thumbnails(read(bench.images, part)) for part in chunks(pool_rows, 256)])
    for what, side, keys in (("the generator's training images", bank[pixels], [train.keys[i] for i in bank_rows]),
                             ("the classifier's training part", pool, [bench.images.keys[i] for i in pool_rows])):
        distance, index = nearest(unseen[pixels], side)
        hits = np.flatnonzero(1 - distance**2 / 2 >= s.copy)  # |a - b|^2 = 2 - 2 correlation
        copies[what] = [f"{bench.images.keys[bench_test[q]]} = {keys[index[q]]}" for q in hits]
    lines = ["## Audit: copies and leaks", ""]
    lines += table(["space", "images", "n", "median distance to the nearest training image", "nearer than 95 % of unseen real images", "nearest is its own source",
                    "chance of being nearer than an unseen real image"], rows)
    lines += ["", f"{len(bank_rows):,} of {len(train):,} training images were searched. A model that copies shows far more than 5 % and a chance far above 0.5.", "",
              "![closest pairs](audit.png)", "",
              f"Ledger: the {len(bench.test)} test images share no patient with the generator's training images" +
              (" (see the note)" if bench.notes else "") + "; copies (correlation of at least " + f"{s.copy} at 32 px, {len(bench_test)} test images looked at): "
              + "; ".join(f"{len(found)} among {what}" + (f" ({', '.join(found[:5])})" if found else "") for what, found in copies.items()) + "."]
    if bench.rank == 0:
        data.save_png(bench.out / "audit.png", sheet)
        data.write_json(bench.out / "audit.json", {"settings": dataclasses.asdict(s), "results": record, "copies": copies, "notes": bench.notes})
    text = finish(bench, s, "audit", lines)
    for what, found in copies.items():
        refuse(s, bench, f"test images are copies of {what}", found)
    return text


def thin(image: np.ndarray, most: int = 256) -> np.ndarray:
    """At most `most` pixels a side, for a picture of many."""
    return image if len(image) <= most else data.resize(image, most)


# ---- Figures 2, 6, 7 and 8: pictures of samples ------------------------------------------------------------------------------


@torch.no_grad()
def figures(s: Figures) -> str:
    """Reconstructions and interpolations (Figure 2), their worst cases (Figure 8); with all tokens also Figures 6 and 7."""
    bench = open_bench(s)
    run, lines = bench.run, ["## Samples (Figures 2 and 8)", ""]
    rows = bench.test[np.argsort(hash64(s.seed, 5, bench.test))][:max(s.candidates, 2 * s.images)]
    real = bench.pixels(rows)
    tokens = torch.cat([encode_tokens(run, part).cpu() for part in real.split(s.micro_batch)])

    def sample(c, seeds):
        return torch.cat([generate(run, part, seeds[k * s.micro_batch:(k + 1) * s.micro_batch], s.steps) for k, part in enumerate(c.split(s.micro_batch))])

    def draw(number, chosen, title):
        again = sample(tokens[chosen].repeat_interleave(s.variants, 0), [seed_of(s.seed, 6, int(i), v) for i in chosen for v in range(s.variants)])
        again = again.view(len(chosen), s.variants, *again.shape[1:]).numpy()
        cells = [thin(x) for i, made in zip(chosen, again) for x in (real[i].numpy(), *made)]
        data.save_png(bench.out / f"figure{number}a.png", data.grid(cells, s.variants + 1, ["real", *(f"variant {v + 1}" for v in range(s.variants))] * len(chosen),
                                                                    title=f"{title}: real images and reconstructions"))
        pairs, between = [(a, b) for a, b in zip(chosen, chosen[1:] + chosen[:1]) if a != b], np.linspace(0, 1, s.variants + 1)
        # The noise stays the same along a row, so that only the condition changes
        made = sample(torch.stack([torch.lerp(tokens[a], tokens[b], float(r)) for a, b in pairs for r in between]),
                      [seed_of(s.seed, 7, int(a)) for a, _ in pairs for _ in between]).view(len(pairs), len(between), *real.shape[1:]).numpy()
        cells = [thin(x) for (a, b), row in zip(pairs, made) for x in (real[a].numpy(), *row, real[b].numpy())]
        data.save_png(bench.out / f"figure{number}b.png", data.grid(cells, len(between) + 2, ["real A", *(f"r = {r:.2f}" for r in between), "real B"] * len(pairs),
                                                                    title=f"{title}: from one real image to another"))
        lines.extend([f"![Figure {number}a](figure{number}a.png)", "", f"![Figure {number}b](figure{number}b.png)", ""])

    draw(2, list(range(min(s.images, len(rows)))), "Figure 2")
    name, _, embed = protocol(s, bench)
    first = sample(tokens, [seed_of(s.seed, 6, int(i), 0) for i in range(len(rows))])
    distance = (embed(real) - embed(first)).norm(dim=1)
    worst = distance.argsort(descending=True)[:s.images].tolist()
    draw(8, worst, f"Figure 8, the {len(worst)} of {len(rows)} images whose first reconstruction is farthest ({name})")
    if run.config["tokens"] == "all":
        half = len(rows) // 2
        made = sample(tokens[:s.variants], [seed_of(s.seed, 8, i) for i in range(s.variants)])
        cells = [thin(x) for x in (*real[:s.variants].numpy(), *made.numpy())]
        data.save_png(bench.out / "figure6.png", data.grid(cells, s.variants, row_titles=["real", "from all tokens"], title="Figure 6: reconstructions from all tokens"))
        mixed = torch.stack([dinodiff.mix_tokens(tokens[i], tokens[half + i], run.vit.config) for i in range(s.variants)])
        made = sample(mixed, [seed_of(s.seed, 9, i) for i in range(s.variants)])
        cells = [thin(x) for x in (*real[:s.variants].numpy(), *made.numpy(), *real[half:half + s.variants].numpy())]
        data.save_png(bench.out / "figure7.png", data.grid(cells, s.variants, row_titles=["A: upper half", "mixed tokens", "B: lower half"],
                                                           title="Figure 7: half of the patch tokens from A, half from B"))
        lines += ["![Figure 6](figure6.png)", "", "![Figure 7](figure7.png)", ""]
    return finish(bench, s, "figures", lines)


# ---- Figures, with Pillow alone --------------------------------------------------------------------------------------------

COLOURS = ("#2c6fbb", "#d9742b", "#3a923a", "#8458a8", "#b8352f", "#7a5a43", "#d05aa6", "#4f5b62")
INK, GRID = "#222222", "#dddddd"


def nice_ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Multiples of 1, 2, 2.5 or 5 times a power of ten that cover [low, high]: first <= low, last >= high, about `count`."""
    power = 10.0 ** math.floor(math.log10((high - low) / count))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power * count >= (high - low) * 0.999)
    return [i * step for i in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


class _Axes:
    """A canvas with a title, a legend above the frame (never over data), axes and ticks; drawn at 3x and reduced, so it is smooth."""

    def __init__(self, title, xlabel, ylabel, names, xlim, ylim, size, xticks=None, log_x=False, level=None):
        self.k, self.log_x = 3, log_x
        self.image = Image.new("RGB", (size[0] * 3, size[1] * 3), "white")
        self.draw, width = ImageDraw.Draw(self.image), size[0]
        self.colour = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
        yticks = nice_ticks(*_room(*ylim))
        if xticks is None:
            xticks = [(v, _number(v)) for v in (_log_ticks(*xlim) if log_x else nice_ticks(*_room(*xlim), 7))]
            xlim = xticks[0][0], xticks[-1][0]
        left = 34 + max(self.extent(_number(v))[0] for v in yticks) + (22 if ylabel else 0)
        slot = (width - left - 24) / max(len(xticks), 1)
        labels = [(v, _wrap(self, text, slot - 4)) for v, text in xticks]
        bottom = size[1] - 18 - max(self.extent(text)[1] for _, text in labels) - (26 if xlabel else 0)
        self.text((width / 2, 12), title, "ma", 16)
        x, y = left, 42
        legend = (list(names) if len(names) > 1 else []) + ([level[1]] if level else [])
        for i, name in enumerate(legend):
            w = 26 + self.extent(name)[0] + 18
            if x + w > width - 12 and x > left:
                x, y = left, y + 20
            if level and i == len(legend) - 1:
                self.dashes(x, x + 18, y + 8)
            else:
                self.box((x, y + 3, x + 18, y + 12), self.colour[name])
            self.text((x + 25, y), name, "la")
            x += w
        top = y + (32 if legend else 4)
        self.frame, self.xlim, self.ylim = (left, top, width - 24, bottom), xlim, (yticks[0], yticks[-1])
        for v in yticks:
            self.line([(left, self.y(v)), (width - 24, self.y(v))], GRID)
            self.text((left - 8, self.y(v)), _number(v), "rm")
        for v, text in labels:
            self.line([(self.x(v), bottom), (self.x(v), bottom + 5)], INK)
            self.text((self.x(v), bottom + 8), text, "ma")
        self.line([(left, top), (left, bottom), (width - 24, bottom)], INK)
        if level:
            self.dashes(left, width - 24, self.y(level[0]))
        self.text(((left + width - 24) / 2, size[1] - 24), xlabel, "ma", 14)
        if ylabel:
            w, h = (round(v * 3) for v in self.extent(ylabel, 14))
            strip = Image.new("RGB", (w + 12, h + 18), "white")
            ImageDraw.Draw(strip).text((6, 6), ylabel, INK, font=ImageFont.load_default(14 * 3))
            strip = strip.rotate(90, expand=True)
            self.image.paste(strip, (24, round((top + bottom) / 2 * 3 - strip.height / 2)))

    def x(self, v):
        f = math.log10 if self.log_x else float
        return self.frame[0] + (f(v) - f(self.xlim[0])) / (f(self.xlim[1]) - f(self.xlim[0])) * (self.frame[2] - self.frame[0])

    def y(self, v):
        return self.frame[3] - (v - self.ylim[0]) / (self.ylim[1] - self.ylim[0]) * (self.frame[3] - self.frame[1])

    def extent(self, text, size=13):
        x0, y0, x1, y1 = self.draw.multiline_textbbox((0, 0), text, font=ImageFont.load_default(size * 3))
        return x1 / 3, y1 / 3

    def text(self, at, text, anchor, size=13, colour=INK):
        self.draw.multiline_text((at[0] * 3, at[1] * 3), text, colour, font=ImageFont.load_default(size * 3), anchor=anchor, align="center")

    def line(self, points, colour, width=1.0):
        self.draw.line([(x * 3, y * 3) for x, y in points], colour, round(width * 3), joint="curve")

    def box(self, corners, colour):
        self.draw.rectangle([v * 3 for v in corners], colour)

    def dashes(self, x0, x1, y):
        for x in np.arange(x0, x1, 7):
            self.line([(x, y), (min(x + 4, x1), y)], INK, 1.4)

    def whisker(self, x, low, high, colour=INK):
        self.line([(x, self.y(low)), (x, self.y(high))], colour, 1.3)
        for v in (low, high):
            self.line([(x - 4, self.y(v)), (x + 4, self.y(v))], colour, 1.3)

    def save(self, path):
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.image.resize((self.image.width // 3 * 2, self.image.height // 3 * 2), Image.Resampling.LANCZOS).save(path)
        return path


def _room(low, high):
    """A range that is never empty."""
    return (low, high) if high - low > 1e-12 * max(abs(low), abs(high), 1e-30) else (low - max(abs(low), 1) * 0.05, high + max(abs(high), 1) * 0.05)


def _log_ticks(low, high):
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [m * 10.0**d for d in decades for m in ((1,) if len(decades) > 4 else (1, 2, 5))]
    first, last = max(t for t in ticks if t <= low * 1.0001), min((t for t in ticks if t >= high * 0.9999), default=10.0 ** decades[-1])
    return [t for t in ticks if first <= t <= last] if first < last else [low / 2, low, low * 2]


def _number(v):
    return f"{v:,.0f}" if abs(v) >= 1000 else f"{v:.4g}"


def _wrap(axes, text, width):
    lines = [""]
    for word in text.split(" "):
        joined = (lines[-1] + " " + word).strip()
        lines = lines[:-1] + [joined] if axes.extent(joined)[0] <= width or not lines[-1] else lines + [word]
    return "\n".join(lines)


def plot_lines(path, series: dict, title: str, xlabel: str, ylabel: str, level=None, log_x: bool = False, size=(900, 520)) -> Path:
    """A line chart. series: {name: (x, y, err or None)} with error bars of ±err; level: (value, caption), a dashed line.
    Pillow's own font knows Latin letters, +-, % and the like, but no Greek and no multiplication sign: write "tau", "x". -> path"""
    arrays = {name: [np.asarray(v, float) if v is not None else np.zeros(len(x)) for v in (x, y, err)]
              for name, (x, y, err) in series.items()}
    every = lambda i: np.concatenate([a[i] for a in arrays.values()])
    lows, highs = [every(1) - every(2), every(1) + every(2)] if level is None else [np.append(every(1) + s * every(2), level[0]) for s in (-1, 1)]
    axes = _Axes(title, xlabel, ylabel, list(series), (every(0).min(), every(0).max()), (np.nanmin(lows), np.nanmax(highs)), size, log_x=log_x, level=level)
    for name, (x, y, err) in arrays.items():
        order = [i for i in np.argsort(x) if np.isfinite(y[i])]
        points = [(axes.x(x[i]), axes.y(y[i])) for i in order]
        if len(points) > 1:
            axes.line(points, axes.colour[name], 2)
        for i, (px, py) in zip(order, points):
            if err[i] > 0:
                axes.whisker(px, y[i] - err[i], y[i] + err[i], axes.colour[name])
            axes.draw.ellipse([(px - 4) * 3, (py - 4) * 3, (px + 4) * 3, (py + 4) * 3], axes.colour[name])
    return axes.save(path)


def plot_bars(path, groups: dict, title: str, ylabel: str, xlabel: str = "", zero: bool = True, level=None, size=(900, 520)) -> Path:
    """Grouped bars. groups: {group: {bar: (value, err or None, mark)}}, mark (for instance "*") stands above the error bar;
    bars of one name share a colour and a legend entry; zero: the axis contains 0; level: (value, caption), a dashed line. -> path"""
    names = list(dict.fromkeys(name for bars in groups.values() for name in bars))
    bars = [(value, err or 0.0) for group in groups.values() for value, err, _ in group.values()]
    ends = [v + s * e for v, e in bars for s in (-1, 1)] + ([0.0] if zero else []) + ([level[0]] if level else [])
    low, high = min(ends), max(ends)
    axes = _Axes(title, xlabel, ylabel, names, (-0.5, len(groups) - 0.5), (low, high + 0.06 * (high - low)), size,
                 xticks=[(i, str(group)) for i, group in enumerate(groups)], level=level)
    slot = (axes.frame[2] - axes.frame[0]) / len(groups)
    floor = 0.0 if axes.ylim[0] <= 0 <= axes.ylim[1] else axes.ylim[0]
    for i, group in enumerate(groups.values()):
        width = min(slot * 0.84 / len(group), 60)
        for j, (name, (value, err, mark)) in enumerate(group.items()):
            x = axes.x(i) + (j - len(group) / 2) * width
            y0, y1 = sorted((axes.y(value), axes.y(floor)))
            axes.box((x + 1, y0, x + width - 1, y1), axes.colour[name])
            if err:
                axes.whisker(x + width / 2, value - err, value + err)
            if mark:
                axes.text((x + width / 2, axes.y(max(value + (err or 0), floor)) - 1), mark, "md", 15)
    axes.line([(axes.frame[0], axes.y(floor)), (axes.frame[2], axes.y(floor))], INK)
    return axes.save(path)


# ---- Everything at once ------------------------------------------------------------------------------------------------------

SECTIONS = ("figures", "fid", "classify", "segmentation", "audit")


def evaluate_all(s: Common) -> None:
    """Every protocol in turn; what one cannot do is said in the report, and the others go on."""
    rank, _ = ranks()
    folder = Path(s.run or dinodiff.newest_run())
    load_run(folder)  # a run without checkpoints ends here
    out, clock = Path(s.out) if s.out else folder / "eval", time.perf_counter()
    shared = {f.name: getattr(s, f.name) for f in dataclasses.fields(Common) if getattr(s, f.name) != f.default} | {"run": str(folder)}
    failed = {}
    for name, (kind, function) in COMMANDS.items():
        begin = time.perf_counter()
        try:
            settings = defaults_for(kind)(["--run", str(folder)])
            known = {f.name for f in dataclasses.fields(kind)}
            function(dataclasses.replace(settings, **{k: v for k, v in shared.items() if k in known}))
            print(f"{name}: {time.perf_counter() - begin:.0f} s", flush=True)
        except UserError as error:
            failed[name] = str(error)
            print(f"{name} was left out: {error}", file=sys.stderr, flush=True)
    if rank == 0:
        report(folder, out, failed)
        print(f"{time.perf_counter() - clock:.0f} s in all -> {out / 'report.md'}")
    if len(failed) == len(COMMANDS):
        raise UserError("nothing could be measured: " + "; ".join(failed.values()))


def report(folder: Path, out: Path, failed: dict[str, str]) -> None:
    """report.md: the sections that stand in `out`, one after another."""
    config = json.loads((folder / "config.json").read_text())
    lines = [f"# Evaluation of {folder.name}", "", f"Preset {config['preset']}, {config['size']} px, trained on {config['data']}. Made by `python evaluate.py --run {folder}`; "
             "each section ends with the command that makes it alone. No medical device; nothing here is validated for any clinical use.", ""]
    for name in SECTIONS:
        if (out / f"{name}.md").is_file():
            lines.append((out / f"{name}.md").read_text())
    lines += [f"## Left out\n"] * bool(failed) + [f"- {name}: {error}" for name, error in failed.items()]
    data.write_file(out / "report.md", "\n".join(lines) + "\n")


@dataclass(frozen=True)
class Convert:
    source: str = dataclasses.field(default="", metadata={"positional": True})  # a pickled DenseNet, such as torchxrayvision's model.pt
    out: str = "xrv"  # folder for model.safetensors


def convert(s: Convert) -> None:
    DenseNet.from_pretrained(s.source).save_pretrained(s.out)
    print(f"-> {s.out}/model.safetensors; use it with --xrv {s.out}")


COMMANDS = {"figures": (Figures, figures), "fid": (Fid, fid), "classify": (Classify, classify), "audit": (Audit, audit)}

if __name__ == "__main__":
    commands = {"": (Common(), evaluate_all)} | {name: (defaults_for(kind), function) for name, (kind, function) in COMMANDS.items()}
    data.command_line(__doc__, commands | {"convert": (Convert(), convert)})
