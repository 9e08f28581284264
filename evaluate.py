"""The paper's four measurements (2.4): each writes rows to RUN/eval/NAME.json, NAME.md and charts.

    python evaluate.py                          all four on the newest run, eval/report.md
    python evaluate.py fid --checkpoints all    Figure 3 and best.json
    python evaluate.py classify --data cxr/     Table 1, Figure 4, label fidelity
    python evaluate.py segment --data lungs/    Table 2, Figures 5 and 9-12
    python evaluate.py audit                    copies, obedience, Figure 8
    python evaluate.py report --run-dir runs/v1 runs/v2    tables and figures of several runs
    python evaluate.py convert model.pt --out xrv/         a pickled DenseNet -> safetensors
    torchrun --nproc_per_node=4 evaluate.py fid …          the same numbers on any number of ranks

FID by the paper's protocol, `xrv-224`, takes torchxrayvision's densenet121-res224-all (hub, or
--xrv); presets `paper*` accept no other. Elsewhere a DenseNet trained on the labels stands in.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import itertools
import math
import os
import pickle
import re
import shlex
import sys
import tarfile
import warnings
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import data
import diffseg
import dinodiff
from data import UserError
from dinodiff import encode_tokens, generate, on_rank_0
from unet import UNet

XRV = "torchxrayvision/densenet121-res224-all"

# ---- Settings ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Common:
    """Settings of every command."""

    run_dir: str = ""  # run folder; empty: the newest one
    step: str = ""  # checkpoint: a number, newest, or empty: best.json's, or else the newest
    data: str = ""  # images to measure on; empty: unseen phantoms, for a run trained on phantoms
    train_data: str = ""  # the generator's training images; empty: those its config.json names
    seed: int = 0  # of all random numbers
    device: str = "auto"  # auto | cpu | cuda
    offline: bool = False  # never ask the hub, use its cache alone
    out: str = ""  # folder of the results; empty: RUN/eval


@dataclass(frozen=True)
class Labelled(Common):
    """Settings of the commands that need labelled images in two parts."""

    labels: str = ""  # CSV of labels; empty: the one beside the data
    findings: tuple[str, ...] = ()  # these alone; empty: all that are not rarer than --prevalence
    prevalence: float = 0.04  # smallest share of images that have a finding (paper: 4 %)
    held_out: float = 0.375  # share of the images, by patient, to test on; MIMIC-CXR: p19
    steps: int = 50  # DDIM steps of a synthetic image
    micro_batch: int = 32  # images of one rank in one pass
    protocol: str = "auto"  # features: xrv-224 | local | dino; auto: the first available
    xrv: str = XRV  # torchxrayvision's DenseNet: hub id, folder, .safetensors or the public .pt
    as_paper: bool = False  # let a leak between the parts pass, and mark the results


@dataclass(frozen=True)
class Fid(Labelled):
    checkpoints: str = "one"  # one: that of --step | all: the curve of Figure 3, and best.json
    count: int = 5000  # real test images, each reconstructed once (paper: 5000)


@dataclass(frozen=True)
class Classify(Labelled):
    """The paper's recipe (2.4, 2.5)."""

    sizes: tuple[int, ...] = (50, 100, 500, 1000, 5000)  # N, real images (Table 1)
    ratios: tuple[int, ...] = (1, 5, 10, 50)  # synthetic images for each real one
    strategies: tuple[str, ...] = ("reconstruct", "interpolate")  # or one of them
    folds: int = 5  # by patient; one validates, the others train
    epochs: int = 150  # at most
    batch: int = 64  # images of one step
    lr: float = 1e-4  # of AdamW
    weight_decay: float = 1e-5  # of AdamW
    patience: int = 10  # epochs without a better validation AUC until lr / 10
    early_stop: int = 25  # epochs without a better validation AUC until the end
    equal_steps: bool = False  # as many steps in each cell of a column, and no early stop
    size: int = 224  # pixels of the input. CHOICE: torchxrayvision's; the paper names none
    workers: int = 0  # trainings at once on this rank; 0: one per core on a CPU, one on a GPU
    net: tuple = field(default=(32, (6, 12, 24, 16), 64), metadata={"flag": False})  # DenseNet-121


@dataclass(frozen=True)
class Segment(Common):
    """Settings of zero-shot segmentation; images are grouped by their provider."""

    checkpoints: str = "all"  # all: a coarse sweep over them picks two | one: that of --step
    coarse: int = 24  # images of each set in the coarse sweep
    timesteps: tuple[int, ...] = (50, 100, 300, 500, 700)  # t; the nearest to 300 is the base
    thresholds: tuple[float, ...] = (  # tau of merging
        0.001, 0.002, 0.004, 0.008, 0.016, 0.03, 0.05, 0.07, 0.1, 0.2, 0.5, 1.0)
    grids: tuple[int, ...] = (16,)  # M, anchors along each side; the first one is the base
    last: int = 2  # rows from so many attention maps nearest the output, beside those from all
    candidates: str = "parts"  # parts: segments and their connected parts | segments: as published
    refine: bool = False  # finish with k-means, as DiffSeg may
    count: int = 0  # images of each set, evenly spaced; 0: all
    init: str = ""  # another UNet in rows of its own: sd15, a folder or a hub id
    context: str = ""  # its tokens: a safetensors file with `context` (S, N); empty: one of zeros
    init_grids: tuple[int, ...] = (32,)  # its M, as in the paper


@dataclass(frozen=True)
class Audit(Labelled):
    count: int = 256  # synthetic images of each kind
    train_images: int = 20000  # training images that are searched, evenly spaced
    finding: str = ""  # Figure 8 from images with this label alone, such as "Support Devices"


# The same code in miniature, for runs of the preset `tiny`: a shallow DenseNet, few DDIM steps.
FEW = dict(steps=10, micro_batch=64)
TINY = {
    Fid: Fid(count=160, checkpoints="all", **FEW),
    Classify: Classify(sizes=(50, 100), ratios=(1, 5), epochs=24, batch=32, lr=1e-2, patience=12,
                       early_stop=16, size=64, net=(8, (2, 2, 2), 16), **FEW),
    Segment: Segment(count=32, coarse=12), Audit: Audit(count=64, **FEW)}


def defaults_for(kind, argv):
    """Settings of a command before its flags: TINY's where argv's run (or the newest) is tiny."""
    is_tiny = True  # also where there is no such run, which the command itself will say
    try:
        named = re.search(r"(?:^|\0)--run-dir[=\0]([^\0]+)", "\0".join(argv))
        folder = Path(named[1]) if named else dinodiff.newest_run()
        is_tiny = data.read_json(folder / "config.json").get("preset") == "tiny"
    except (UserError, OSError):
        pass
    return TINY.get(kind, kind()) if is_tiny else kind()


# ---- Common: ranks, cached results, the run and its images, leaks, tables ----------------------


def ranks():
    """-> (rank, number of ranks)"""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def chunks(rows, size):
    return [rows[k:k + size] for k in range(0, len(rows), size)]


def subsample(rows, count):
    """`count` of the rows, evenly spaced; all where there are fewer."""
    return rows[np.linspace(0, len(rows) - 1, min(len(rows), count)).astype(int)]


def on_all_ranks(rows, batch, compute, desc=""):
    """compute(some rows) -> array (b, …): the ranks share the work, each gets all, in order."""
    rank, world = ranks()
    parts = chunks(rows, max(1, min(batch, -(-len(rows) // world))))
    bar = data.progress(parts[rank::world], desc, unit=" batches")
    mine = [np.asarray(compute(part)) for part in bar]
    shares = [mine] * world
    try:
        if world > 1:
            dist.all_gather_object(shares, mine)
    except RuntimeError:
        raise UserError("another rank has ended; its message says why") from None
    found = [shares[k % world][k // world] for k in range(len(parts))]
    return np.concatenate(found) if found else np.empty(0)


def cached(folder, name, key, compute, is_alone=False):
    """What compute() returns (JSON), kept in FOLDER/cache under the digest of all it depends on.

    All ranks call it, and compute, together; is_alone: this process by itself.
    """
    path = Path(folder, "cache", f"{name}-{key}.json")

    def look():
        return data.read_json(path) if path.is_file() else {}

    found = look() if is_alone else on_rank_0(look)
    if "value" not in found:
        found = {"value": compute()}
        if is_alone or ranks()[0] == 0:
            data.write_json(path, found)
    return found["value"]


def seed_of(*values) -> int:
    """The seed of a synthetic image, 60 bits of what it is: the command's seed, its sources, …"""
    return int(data.digest(*values) + data.digest(values)[:5], 16)


def weights_digest(*nets) -> str:
    """A hash of the bytes of all weights. TRAP: a float sum of them depends on the threads."""
    found = hashlib.blake2b(digest_size=8)
    for tensor in itertools.chain(*(net.state_dict().values() for net in nets)):
        found.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def name_of(run) -> str:
    """A hash of all that a synthetic image depends on, but for its condition, seed and steps."""
    how = run.size, run.config.get("tokens"), run.config.get("dtype")
    return data.digest(weights_digest(run.unet, run.vae, run.vit), how)


@dataclass
class Measurement:
    """A run opened for measuring, and the images that it is measured on."""

    run: dinodiff.Run
    out: Path
    notes: list  # what a reader of the results must know
    train: data.XRays | None  # what the generator was trained on, where it is in reach
    source: tuple  # its digest and the arguments of data.open_data for:
    ds: data.XRays
    pool: np.ndarray = None  # indices that may train a classifier
    test: np.ndarray = None  # indices held out, of other patients; or those with masks
    names: list = ()  # findings; or the set of each image with masks
    targets: np.ndarray = None  # float32 (len(ds), findings)

    def key(self, *values) -> str:
        """A digest of these images, their patients and labels, and `values`."""
        return data.digest(self.ds.digest, self.ds.seed, self.run.size, *values)


def note(notes, text) -> None:
    """For the results, and to be seen at once."""
    notes.append(text)
    if ranks()[0] == 0:
        data.note(f"note: {text}")


def open_run(folder, step, device):
    """A run whose many samples are worth a compilation, on CUDA."""
    run = dinodiff.load_run(folder, step, device)
    if run.device.type == "cuda":
        run.unet.compile()
        run.vae.decoder.compile()
    return run


def open_measurement(s, phantom_seed, count, labels=None) -> Measurement:
    """The run at --step, its training images, and the images to measure on.

    phantom_seed, count: of unseen phantoms, where there is no --data. A run folder may be a
    stranger's: what it says is data.
    """
    dinodiff.start_ranks(dinodiff.pick_device(s.device))
    folder = Path(s.run_dir or dinodiff.newest_run())
    step = s.step or ("best" if (folder / "best.json").is_file() else "newest")
    run = open_run(folder, None if step == "newest" else step, s.device)
    notes = ["The step is that of the best FID (best.json); if that was measured on these images, "
             "they chose it."] * (step == "best")
    trained_on = s.train_data or str(run.config["data"])
    train = None
    try:
        # TRAP: no command or address of a stranger's config.json is followed.
        if re.match("(pipe|hf):", trained_on) and trained_on not in (s.train_data, s.data):
            raise UserError("to open them, name them with --train-data")
        if trained_on not in ("phantom", s.train_data, s.data):
            note(notes, f"Training images: {trained_on}, as config.json says.")
        train = data.open_data(trained_on, run.size, run.config["seed"])
    except (UserError, OSError) as error:
        notes.append(f"The generator's training images ({trained_on[:80]}) are out of reach, so "
                     f"leaks were not looked for: {str(error).splitlines()[0]}.")
    if not s.data and trained_on != "phantom":
        raise UserError(f"{folder} was trained on {trained_on}: name images that it has not seen "
                        "with --data (for labels see --labels)")
    spec = s.data or "phantom"
    source = (spec, run.size, run.config["seed"] + phantom_seed,
              count if spec == "phantom" else None, labels)
    ds = data.open_data(*source)
    out = Path(s.out or folder / "eval")
    return Measurement(run, out, notes, train, (ds.digest, *source), ds)


def open_labelled(s) -> Measurement:
    """Run, images, split, findings; UserError where training and test share patients or files."""
    m = open_measurement(s, 1, 1024, s.labels or None)
    patients = list(m.ds.patients)
    m.pool, m.test = data.split_by_patient(patients, s.held_out, s.seed)
    if all(re.fullmatch(r"p?1\d{7}", patient) for patient in patients):  # MIMIC-CXR: as the paper
        is_test = np.array([data.is_mimic_test(patient) for patient in patients])
        m.pool, m.test = np.flatnonzero(~is_test), np.flatnonzero(is_test)
        m.notes.append(f"MIMIC-CXR's own parts: {len(m.test):,} images of p19 test, the other "
                       f"{len(m.pool):,} may train a classifier.")
    if not any(patients):
        m.notes.append("No patient is known for these images: they are split by image, so a "
                       "patient may be on both sides.")
    if min(len(m.pool), len(m.test)) < 2:
        raise UserError(f"{m.ds.name}: {len(m.ds)} images leave {len(m.pool)} to train and "
                        f"{len(m.test)} to test, expected more of several patients; see --held-out")
    counts = Counter(itertools.chain(*m.ds.labels))
    least = s.prevalence * len(m.ds)
    common = [name for name in data.label_names(m.ds.labels)
              if counts[name] >= least and name not in data.NO_DIAGNOSES]
    m.names = list(s.findings) or common
    missing = sorted(set(m.names) - set(counts))
    if missing:
        raise UserError(f"{m.ds.name}: no image has {', '.join(missing)}; expected --findings "
                        f"among {', '.join(sorted(counts)) or 'none: there are no labels'}")
    m.targets = np.zeros((len(m.ds), len(m.names)), np.float32)
    for k, name in enumerate(m.names):
        m.targets[:, k] = [name in row for row in m.ds.labels]
    rare = [name for name, y in zip(m.names, m.targets[m.test].T) if len(np.unique(y)) < 2]
    m.notes += [f"All or none of the test images have {', '.join(rare)}: the macro AUC leaves "
                "this out."] * bool(rare)
    for what, shared in shared_with(m).items():
        check_leak(s, m, f"{what} of the test part are among those that the generator was trained "
                   "on", shared)
    return m


def shared_with(m) -> dict[str, list]:
    """Patients and images of the test part that the generator was trained on, by their names.

    A note says where patients cannot be compared.
    """
    train = m.train
    if train is None or m.ds.seed != train.seed:
        return {}  # phantoms of another seed, or phantoms and real people

    def named(ds, rows, names):
        return {f"{ds.providers[i]}, {names[i]}" for i in rows if names[i]}

    if not set(train.providers) & set(m.ds.providers) or not any(train.patients):
        m.notes.append("The generator's training images and these have no provider with known "
                       "patients in common: shared patients were not found by name.")
    everything = range(len(train))
    return {"patients": sorted(named(train, everything, train.patients)
                               & named(m.ds, m.test, m.ds.patients)),
            "images": sorted(named(train, everything, train.keys)
                             & named(m.ds, m.test, m.ds.keys))}


def check_leak(s, m, what, shared) -> None:
    """Stop where two sides of a split share something; with --as-paper mark the results instead."""
    found = f"{what} ({len(shared)}: {', '.join(shared[:5])}{' …' * (len(shared) > 5)})"
    if shared and not s.as_paper:
        raise UserError(f"found a leak: {found}. These numbers would be too good. Expected two "
                        "sides that share nobody: give other --data, or --as-paper to mark the "
                        "results and go on")
    m.notes += [f"MARKED (--as-paper): {found}. These numbers flatter."] * bool(shared)


def table(rows, columns) -> list[str]:
    """Lines of a Markdown table of rows; columns: {heading: format of a row's fields}."""
    line = f"| {' | '.join(columns.values())} |"
    return [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|",
            *[line.format_map(row) for row in rows], ""]


def pivot(rows, down, across, cell) -> list[str]:
    """A table with a line for each value of `down`, a column for each of `across` (formats)."""
    cells = defaultdict(dict)
    for row in rows:
        cells[down.format_map(row)][across.format_map(row)] = cell.format_map(row)
    heads = dict.fromkeys(itertools.chain(*cells.values()), "–")
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for title, found in cells.items():
        lines.append(f"| {title} | {' | '.join((heads | found).values())} |")
    return lines + [""]


def by_protocol(rows):
    """-> rows in parts that compare, and lines that say so where there are several parts."""
    parts = defaultdict(list)
    for row in rows:
        parts[row["protocol"]].append(row)
    said = f"> Measured differently, so not in one table: {'; '.join(parts)}.\n"
    return list(parts.values()), [said] * (len(parts) > 1)


def finish(m, name, rows, section) -> None:
    """Write NAME.json and NAME.md, with the notes and the command that was given."""
    if ranks()[0] == 0:
        m.out.mkdir(parents=True, exist_ok=True)
        command = shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
        notes = [f"> {note}\n" for note in dict.fromkeys(m.notes)]
        text = "\n".join([*section(rows, m.out), *notes, f"Made by `{command}`.", ""])
        data.write_json(m.out / f"{name}.json", rows)
        data.write_file(m.out / f"{name}.md", text)
        print(f"\n{text}\n-> {m.out / name}.md, .json", flush=True)


# ---- Charts, with Pillow alone -----------------------------------------------------------------

COLOURS = ("#2c6fbb", "#d9742b", "#3a923a", "#8458a8", "#b8352f", "#7a5a43", "#d05aa6", "#4f5b62")
INK = "#222222"


def round_ticks(low, high) -> list[float]:
    """About six round numbers that cover [low, high]."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 6))
    step = power * next(m for m in (1, 2, 2.5, 5, 10) if m * power * 6 >= span * 0.999)
    first = math.floor(low / step + 1e-9)
    return [k * step for k in range(first, max(first + 1, math.ceil(high / step - 1e-9)) + 1)]


def chart(path, rows, name, x, y, title, labels, is_bars=False, is_even=True) -> str:
    """Lines, or grouped bars, of rows -> the Markdown that shows the picture.

    name: format of a row's fields, a line or colour each; x, y: fields, x spaced evenly, or by its
    value. Fields y_low and y_high end the error bar, `mark` stands above it.
    """
    image = Image.new("RGB", (1800, 1040), "white")  # reduced to half at the end
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(26)
    rows = [{f"{y}_low": row[y], f"{y}_high": row[y], "mark": ""} | row for row in rows]
    names = list(dict.fromkeys(map(name.format_map, rows)))
    slots = sorted({row[x] for row in rows})
    marks = slots[::-(-len(slots) // 12)] if is_even else round_ticks(slots[0], slots[-1])
    span = [row[y + end] for row, end in itertools.product(rows, ("", "_low", "_high"))]
    span += [0.0] * is_bars
    ticks = round_ticks(np.nanmin(span), np.nanmax(span))
    left, right, top, bottom = 170, 1760, 130 + 40 * -(-len(names) // 3), 910

    def across(v):
        share = (slots.index(v) + 0.5) / len(slots) if is_even else (
            (v - marks[0]) / (marks[-1] - marks[0]))
        return left + share * (right - left)

    def up(v):
        return bottom - (v - ticks[0]) / (ticks[-1] - ticks[0]) * (bottom - top)

    draw.text((900, 20), title, INK, font, "ma")
    draw.text((900, 990), labels[0], INK, font, "ma")
    draw.text((20, top - 45), labels[1], INK, font)
    for v in ticks:
        draw.line([(left, up(v)), (right, up(v))], "#dddddd", 2)
        draw.text((left - 15, up(v)), f"{v:,.6g}", INK, font, "rm")
    for v in marks:
        draw.text((across(v), bottom + 15), f"{v:,.6g}", INK, font, "ma")
    half = 0.36 * (right - left) / len(slots) / len(names) if is_bars else 8
    rim = 0 if is_bars else 4
    for k, one in enumerate(names):
        colour = COLOURS[k % len(COLOURS)]
        corner = left + k % 3 * 540, 80 + k // 3 * 40
        draw.rectangle([*corner, corner[0] + 30, corner[1] + 20], colour)
        draw.text((corner[0] + 45, corner[1] - 5), one, INK, font)
        part = [row for row in rows if name.format_map(row) == one and math.isfinite(row[y])]
        # Bars stand side by side, and the error bars of lines a little.
        shift = (2 * k + 1 - len(names)) * (half * 1.1 if is_bars else 3 * is_even)
        spots = sorted((across(row[x]) + shift, up(row[y])) for row in part)
        if not is_bars:
            draw.line(spots, colour, 5)
        for (px, py), row in zip(spots, sorted(part, key=lambda row: row[x])):
            floor = up(0) if is_bars else py
            high = up(row[f"{y}_high"])
            draw.rectangle([px - half, min(py, floor) - rim, px + half, max(py, floor) + rim],
                           colour)
            ends = [(px, up(row[f"{y}_low"])), (px, high)]
            draw.line(ends, INK if is_bars else colour, 3)
            draw.text((px, min(high, floor)), row["mark"], INK, font, "md")
    draw.line([(left, top), (left, bottom), (right, bottom)], INK, 3)
    data.save_png(path, image.resize((900, 520), Image.Resampling.LANCZOS))
    return f"![{title}]({Path(path).name})\n"


# ---- DenseNet (Huang et al. 2017; torchvision's and torchxrayvision's key names) ---------------


class DenseLayer(nn.Module):
    """BN-ReLU-1x1, BN-ReLU-3x3: `growth` new channels from all that came before."""

    def __init__(self, channels: int, growth: int):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, 4 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        new = self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))
        return torch.cat([x, new], 1)


class Transition(nn.Module):
    """BN-ReLU-1x1 to half the channels, then half the side."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, channels // 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv(F.relu(self.norm(x))), 2)


class DenseNet(nn.Module):
    """DenseNet-121 at its defaults (727 tensors); the preset `tiny` uses a shallow one.

    num_classes: logits; in_channels: 1 (torchxrayvision) or 3 (torchvision); growth: channels that
    a layer adds; blocks: layers of each dense block; width: channels of the stem.
    """

    def __init__(self, num_classes: int, in_channels: int = 1, growth: int = 32,
                 blocks: tuple[int, ...] = (6, 12, 24, 16), width: int = 64):
        super().__init__()
        self.features = nn.Sequential(OrderedDict(
            conv0=nn.Conv2d(in_channels, width, 7, stride=2, padding=3, bias=False),
            norm0=nn.BatchNorm2d(width), relu0=nn.ReLU(inplace=True),
            pool0=nn.MaxPool2d(3, stride=2, padding=1)))
        for i, layers in enumerate(blocks, 1):
            block = OrderedDict((f"denselayer{k + 1}", DenseLayer(width + k * growth, growth))
                                for k in range(layers))
            self.features.add_module(f"denseblock{i}", nn.Sequential(block))
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
        """x (B, in_channels, H, W) -> features (B, 1024): ReLU, then the global average."""
        # TRAP: without this ReLU the features, and every FID on them, are others.
        return F.relu(self.features(x)).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, in_channels, H, W), pixels as the weights want them -> logits (B, num_classes)."""
        return self.classifier(self.embed(x))

    @classmethod
    def from_pretrained(cls, source, subfolder: str | None = None,
                        revision: str | None = None) -> "DenseNet":
        """A folder, a `.safetensors`, a pickled `.pt` (read without running it) or a hub id."""
        path = Path(source).expanduser() / (subfolder or "")
        if str(source) == XRV and not path.exists():
            path = hub_xrv()
        elif (path / "model.pt").is_file():
            path = path / "model.pt"
        if path.suffix in (".pt", ".pth", ".bin") and path.is_file():
            state = read_pickled_tensors(path)
        else:
            state = data.read_weights(source, subfolder, revision)[1]
        state.pop("op_threshs", None)  # operating points that torchxrayvision's modules carry
        if "features.conv0.weight" not in state or "classifier.weight" not in state:
            raise UserError(f"{source}: found keys {sorted(state)[:4]} …, expected a DenseNet's, "
                            "such as features.conv0.weight")
        width, channels = state["features.conv0.weight"].shape[:2]
        layers = re.findall(r"denseblock(\d+)\.denselayer\d+\.norm1\.bias", " ".join(state))
        growth = len(state["features.denseblock1.denselayer1.conv2.weight"])
        blocks = tuple(layers.count(i) for i in sorted(set(layers)))
        model = cls(len(state["classifier.weight"]), channels, growth, blocks, width)
        return data.load_weights(model, state, source)

    def save_pretrained(self, folder) -> None:
        data.write_weights(folder, {}, self.state_dict(), "model.safetensors")


def hub_xrv(is_cached_only=False) -> Path:
    """torchxrayvision's public DenseNet, a pickled module, from the hub or its cache."""
    from huggingface_hub import try_to_load_from_cache
    try:
        if is_cached_only and not isinstance(try_to_load_from_cache(XRV, "model.pt"), str):
            raise UserError(f"{XRV} is not in the hub's cache")
        return data.hub_file(XRV, "model.pt")
    except UserError as error:
        raise UserError(f"{error}: download it, for instance with `hf download {XRV} model.pt "
                        "--local-dir xrv`, and give --xrv xrv/model.pt") from None


# ---- A pickled module's tensors, without running it --------------------------------------------


class Inert:
    """Stands in for every class and function that a pickle names: it never runs anything."""

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
    """Builds tensors, dicts and plain values; all else that a pickle names is Inert."""

    def find_class(self, module, name):  # torch.load itself answers for the names of storages
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
            return getattr(torch._utils, name)
        return type(name, (Inert,), {})


def load_inert(file, **options):
    return TensorsOnly(file, **options).load()


def read_pickled_tensors(path) -> dict[str, Tensor]:
    """What torch.save made of a module or a state dict, zip or older format -> state dict.

    No code in it runs. Raises UserError where the file is damaged or holds no tensors.
    """
    content = Path(path).read_bytes()
    reader = SimpleNamespace(__name__="inert", Unpickler=TensorsOnly, load=load_inert)
    try:
        # TRAP: TorchScript is a program, and torch.load would run it. A zip can show Python's
        # zipfile other names than torch sees, so torch's own reader is asked.
        if content[:2] == b"PK":
            records = torch._C.PyTorchFileReader(io.BytesIO(content)).get_all_records()
            if any(re.match(r"constants\.pkl|code/", name) for name in records):
                raise UserError(f"{path} is a TorchScript archive, which is a program; expected a "
                                "file of torch.save")
        elif tarfile.is_tarfile(io.BytesIO(content)):
            raise UserError(f"{path} is a tar archive; expected a file of torch.save")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the pickled class's source cannot be compared
            found = torch.load(io.BytesIO(content), "cpu", reader, weights_only=False)
        found = found.get("state_dict", found) if hasattr(found, "get") else found
        state = dict(named_tensors(found, ""))
    except UserError:
        raise
    except Exception as error:  # a damaged file can raise anything
        raise UserError(f"{path} is damaged or no file of torch.save "
                        f"({type(error).__name__}: {error})") from None
    if not state:
        raise UserError(f"{path} holds no tensors; expected what torch.save makes of a module")
    return state


def named_tensors(found, prefix):
    """(key, tensor) of a state dict, or of a stubbed module's _parameters, _buffers, _modules."""
    is_module = hasattr(found, "_modules")
    items = {**found._parameters, **found._buffers} if is_module else found
    for name, tensor in items.items():
        if torch.is_tensor(tensor):
            yield prefix + name, tensor.clone()
    for name, child in getattr(found, "_modules", {}).items():
        yield from named_tensors(child, f"{prefix}{name}.")


# ---- Features, by named protocols (paper 2.4) --------------------------------------------------


def open_features(m, s):
    """What --protocol names -> (name, embed(images uint8 (B, S, S)) -> (B, d), its network).

    auto: the first of the three that can be had, which is said; presets `paper*` take xrv-224
    alone. Distances of different protocols do not compare.
    """
    kinds = {"xrv-224": xrv_features, "local": local_features, "dino": dino_features}
    is_strict = str(m.run.config["preset"]).startswith("paper") or s.xrv != XRV
    names = [s.protocol] if s.protocol != "auto" else list(kinds)[:1 if is_strict else 3]
    failed = []
    if not set(names) <= set(kinds):
        raise UserError(f"found --protocol {s.protocol}, expected auto or {', '.join(kinds)}")
    for name in names:
        try:
            embed, net = kinds[name](m, s, len(names) > 1)
        except UserError as error:
            failed.append(f"{name}: {error}")
            continue
        if failed:
            note(m.notes, f"Features: {name}, whose distances do not compare with the paper's "
                 f"({'; '.join(failed)})")
        return name, embed, net
    raise UserError("; ".join(failed))


def xrv_features(m, s, is_cached_only):
    """The paper's: torchxrayvision's DenseNet at 224 px."""
    net = DenseNet.from_pretrained(hub_xrv(is_cached_only) if s.xrv == XRV else s.xrv)
    # TRAP: torchxrayvision's pixels are in [-1024, 1024], not [-1, 1].
    return embedding(net, 224, 1024.0, m.run.device)


def local_features(m, s, _):
    """A DenseNet trained on the pool's labels, once a machine: all runs are measured with one."""
    if not m.names:
        raise UserError("there are no labels to train on")
    recipe = TINY[Classify] if m.run.config["preset"] == "tiny" else Classify()
    recipe = dataclasses.replace(recipe, size=min(recipe.size, m.run.size), epochs=16)
    pool = m.pool[:5000]
    key = m.key(m.names, pool.tolist(), s.seed, dataclasses.astuple(recipe))
    place = data.cache_folder() / "features" / key
    halves = data.split_by_patient([m.ds.patients[i] for i in pool], 0.2, s.seed)
    train, val = [real_pictures(m, pool[half], recipe.size) for half in halves]

    def train_once():
        with data.locked(place):
            if not (place / "model.safetensors").is_file():
                fit(recipe, train, val, s.seed, m.run.device)[0].save_pretrained(place)

    on_rank_0(train_once)
    return embedding(DenseNet.from_pretrained(place), recipe.size, 1.0, m.run.device)


def dino_features(m, s, _):
    """The CLS token that conditions the generator itself: good numbers are to be expected."""
    return lambda images: encode_tokens(m.run, images)[:, 0].cpu(), m.run.vit


def embedding(net, size, scale, device):
    net = net.to(device, memory_format=torch.channels_last).eval()
    return lambda images: net.embed(to_pixels(images, size, scale, device)).float().cpu(), net


def to_pixels(images, size, scale, device) -> Tensor:
    """uint8 (B, S, S) -> (B, 1, size, size) in [-scale, scale]."""
    return resized((images.to(device)[:, None].float() / 127.5 - 1) * scale, size)


def resized(x, size) -> Tensor:
    """(B, 1, S, S) -> (B, 1, size, size), bilinear with antialiasing."""
    if x.shape[-1] != size:
        x = F.interpolate(x, (size, size), mode="bilinear", antialias=True, align_corners=False)
    return x.contiguous(memory_format=torch.channels_last)


# ---- Distances of image sets (Heusel et al. 2017, Binkowski et al. 2018, Naeem et al. 2020) ----


def finite_features(*sets) -> list[Tensor]:
    """Features of one protocol as float64 (n, d); UserError on NaN or unequal widths."""
    sets = [torch.as_tensor(np.asarray(f), dtype=torch.float64) for f in sets]
    for features in sets:
        bad = int((~features.isfinite().all(1)).sum())
        if bad:
            raise UserError(f"{bad} of {len(features)} images have NaN or infinite features: the "
                            "weights or the samples are broken, no distance can be computed")
    if sets[0].shape[1] != sets[1].shape[1]:
        raise UserError(f"features of {sets[0].shape[1]} and {sets[1].shape[1]} dimensions: both "
                        "sets need the features of one protocol")
    return sets


def frechet_distance(mu1, cov1, mu2, cov2) -> float:
    """|mu1 - mu2|^2 + tr(cov1 + cov2 - 2 sqrt(cov1 cov2)); (d,), (d, d) -> float. [Heusel eq.6]"""
    mu1, cov1, mu2, cov2 = [torch.as_tensor(np.asarray(v), dtype=torch.float64)
                            for v in (mu1, cov1, mu2, cov2)]
    if mu1.shape != mu2.shape or not cov1.shape == cov2.shape == (len(mu1), len(mu1)):
        raise UserError(f"means {tuple(mu1.shape)}, {tuple(mu2.shape)} and covariances "
                        f"{tuple(cov1.shape)}, {tuple(cov2.shape)} do not match: one protocol?")
    finite_features(cov1, cov2)
    # TRAP: cov1 @ cov2 is not symmetric, eigvalsh of it is wrong. With cov1 = L L^T the
    # eigenvalues are those of L^T cov2 L.
    root, failed = torch.linalg.cholesky_ex(cov1)
    if failed:  # singular: fewer images than dimensions
        eigenvalues, vectors = torch.linalg.eigh(cov1)
        root = vectors * eigenvalues.clamp(min=0).sqrt()
    cross = torch.linalg.eigvalsh(root.T @ cov2 @ root).clamp(min=0).sqrt().sum()
    return float((mu1 - mu2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross)


def frechet(f1, f2) -> float:
    """The Frechet distance of features (n, d) and (m, d)."""
    return frechet_distance(f1.mean(0), f1.T.cov(), f2.mean(0), f2.T.cov())


def blocks_of(groups, blocks) -> np.ndarray:
    """A block for each image, (n,) ints: near-equal blocks that keep each group (patient) whole."""
    names, group, counts = np.unique(groups, return_inverse=True, return_counts=True)
    order = np.argsort([seed_of(str(name)) for name in names])
    middle = np.cumsum(counts[order]) - counts[order] / 2
    block = np.empty(len(names), int)
    block[order] = middle * min(blocks, len(names)) // len(group)
    return block[group]


def frechet_error(f1, f2, groups, blocks: int = 16) -> float:
    """Standard error of the Frechet distance of features f1 (n, d), f2 (m, d), over patients.

    Delete-one-group jackknife: sqrt((g - 1) / g * sum (v_k - mean)^2), v_k without block k.
    groups: the patient of each image, one list where f2[i] was made from f1[i], so that their
    blocks go together, or a pair of lists for independent sets. NaN below two patients.
    TRAP: a bootstrap repeats images, and FID's bias depends on the number of distinct ones.
    """
    f1, f2 = finite_features(f1, f2)
    pair = groups if np.ndim(groups[0]) else (groups, groups)
    first, second = [blocks_of(names, blocks) for names in pair]
    both = np.intersect1d(first, second)
    values = [frechet(f1[first != k], f2[second != k]) for k in both] if len(both) > 1 else []
    g = len(values)
    return float((g - 1) / math.sqrt(g) * np.std(values, ddof=1)) if values else math.nan


def kernel_distance(f1, f2, with_error: bool = False, paired: bool = False):
    """Kernel distance (KID): unbiased squared MMD, k(x, y) = (x.y / d + 1)^3 -> float, maybe < 0.

    f1 (n, d), f2 (m, d). CHOICE: all pairs in place of random subsets: the same expectation without
    their noise. with_error=True -> (distance, standard error), by the delta method.
    paired: f2[i] was made from f1[i]. TRAP: then the cross mean must leave out (i, i), which are
    alike, or KID falls below zero.
    """
    f1, f2 = finite_features(f1, f2)

    def mean(a, b, without_diagonal):
        rows = torch.cat([((part @ b.T / b.shape[1] + 1) ** 3).mean(1) for part in a.split(1024)])
        if without_diagonal:
            own = ((a * b).mean(1) + 1) ** 3
            rows = (rows * len(b) - own) / (len(b) - 1)
        return rows

    x = mean(f1, f1, True) - mean(f1, f2, paired)
    y = mean(f2, f2, True) - mean(f2, f1, paired)
    distance = float(x.mean() + y.mean())
    variance = (x + y).var() / len(x) if paired else x.var() / len(x) + y.var() / len(y)
    return (distance, 2 * math.sqrt(variance)) if with_error else distance


def prdc(real, fake, k: int = 5) -> dict[str, float]:
    """Precision, recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020).

    real (n, d), fake (m, d), k < n, m: balls that reach to the k-th neighbour -> the four numbers.
    """
    real, fake = finite_features(real, fake)
    if k >= min(len(real), len(fake)):
        raise UserError(f"{len(real)} real and {len(fake)} synthetic images, expected more than "
                        f"k = {k} of each")
    distance, to_real, to_fake = [torch.cdist(a, b, compute_mode="use_mm_for_euclid_dist")
                                  for a, b in ((real, fake), (real, real), (fake, fake))]
    real_radius = to_real.kthvalue(k + 1, 1).values  # k + 1: the nearest is the image itself
    is_inside = (distance < real_radius[:, None]).double()  # (n, m): fake j in the ball of real i
    is_recalled = distance < to_fake.kthvalue(k + 1, 1).values
    return {"precision": float(is_inside.amax(0).mean()),
            "recall": float(is_recalled.any(1).double().mean()),
            "density": float(is_inside.sum(0).mean() / k),
            "coverage": float(is_inside.amax(1).mean())}


# ---- FID of checkpoints (paper 2.4, Figure 3) --------------------------------------------------


def distances(real, fake, groups) -> dict:
    """Every distance of two sets of features; groups as in frechet_error."""
    real, fake = finite_features(real, fake)
    fid = frechet(real, fake)
    error = frechet_error(real, fake, groups)
    kid, kid_error = kernel_distance(real, fake, True, not isinstance(groups, tuple))
    return {"fid": fid, "fid_error": error, "fid_low": fid - 1.96 * error,
            "fid_high": fid + 1.96 * error, "kid": 1000 * kid, "kid_error": 1000 * kid_error,
            **prdc(real, fake, min(5, len(real) - 1, len(fake) - 1))}


@torch.no_grad()
def fid(s: Fid) -> None:
    """Reconstruct each real test image once, compare the sets; two floors; Figure 3, best.json."""
    if s.checkpoints not in ("one", "all"):
        raise UserError(f"found --checkpoints {s.checkpoints}, expected one or all")
    if s.checkpoints == "all":  # the same rows whether or not best.json has been written
        s = dataclasses.replace(s, step=s.step or "newest")
    m = open_labelled(s)
    name, embed, net = open_features(m, s)
    test, others = [rows[np.argsort(data.hash64(s.seed, 3, rows))][:s.count]
                    for rows in (m.test, m.pool)]
    others = others[:len(test)]
    base = {"run": m.run.folder.name, "images": len(test),
            "protocol": f"{name}, {len(test)} images of {m.ds.name}, {m.run.size} px"}
    key = [weights_digest(net), test.tolist(), others.tolist()]

    def features(rows, pictures):
        return on_all_ranks(rows, s.micro_batch, lambda some: embed(pictures(some)), "features")

    def row(kind, step, rows, pictures, *depends_on):
        # An image whose patient is unknown is a patient of its own.
        patients = [[m.ds.patients[i] or f"image {i}" for i in part] for part in (test, rows)]
        groups = patients[0] if rows is test else tuple(patients)

        def compute():
            real, fake = features(test, m.ds.read), features(rows, pictures)
            return on_rank_0(lambda: distances(real, fake, groups))  # the algebra once

        return base | {"kind": kind, "step": step} | cached(
            m.out, "fid", m.key(key, kind, *depends_on), compute)

    def round_trip(rows):
        return dinodiff.decode_latents(m.run, dinodiff.encode_latents(m.run, m.ds.read(rows)))

    rows = [row("real against real", m.run.step, others, m.ds.read),
            row("VAE round trip", m.run.step, test, round_trip, weights_digest(m.run.vae))]
    for step in m.run.checkpoints if s.checkpoints == "all" else [m.run.step]:
        run = m.run if step == m.run.step else open_run(m.run.folder, step, s.device)
        work = functools.partial(reconstruct, m.ds, s, run)
        rows.append(row("reconstruction", step, test, work, name_of(run), s.steps, s.seed))
    curve = {row["step"]: row["fid"] for row in rows[2:]}
    best = min(curve, key=curve.get)
    if s.checkpoints == "all" and ranks()[0] == 0:
        data.write_json(m.run.folder / "best.json", {
            "step": best, "fid": curve[best], "protocol": name, "images": len(test),
            "steps": curve})
    finish(m, "fid", rows, fid_section)


def reconstruct(ds, s, run, rows, variant=0) -> Tensor:
    """A reconstruction of each of ds[rows] -> uint8 (n, S, S)."""
    seeds = [seed_of(s.seed, variant, ds.keys[i]) for i in rows]
    return generate(run, encode_tokens(run, ds.read(rows)), seeds, s.steps)


def fid_section(rows, out) -> list[str]:
    """Table and Figure 3 of FID rows of one run or several."""
    parts, lines = by_protocol(rows)
    for k, part in enumerate(parts):
        title = f"FID ({part[0]['protocol']})"
        lines += [f"## {title} and checkpoints (2.4, Figure 3)", "", *table(part, {
            "run": "{run}", "step": "{step:,}", "images": "{kind}",
            "FID ± SE": "{fid:.3f} ± {fid_error:.3f}",
            "KID x 1000 ± SE": "{kid:.2f} ± {kid_error:.2f}", "precision": "{precision:.3f}",
            "recall": "{recall:.3f}", "density": "{density:.3f}", "coverage": "{coverage:.3f}"}),
            "SE: standard error, FID's by a jackknife over patients. Where images are fewer than "
            "features FID is biased upwards: trust KID there.\n",
            "The paper: 4.7 (DiNOv1, step 80,000), 6.4 (DiNOv2, step 120,000) on 5,000 images of "
            "MIMIC-CXR p19.\n" * title.startswith("FID (xrv-224")]
        curve = [row for row in part if row["kind"] == "reconstruction"]
        lines.append(chart(out / f"figure3-{k}.png", curve, "{run}", "step", "fid", title,
                           ("step", "FID")))
    return lines


# ---- Training a classifier (paper 2.5) ---------------------------------------------------------


@functools.lru_cache(maxsize=8)
def opened(digest, *source):
    return data.open_data(*source)


@functools.lru_cache(maxsize=10_000)  # each process decodes an image once, where there is room
def picture(source, row, size):
    return torch.from_numpy(data.resize(opened(*source)[row], size))


@dataclass
class Pictures(Dataset):
    """Images of one set or several with targets -> (uint8 (size, size), float32 (L,))."""

    items: list  # (arguments of `opened`, row)
    ids: list  # what each is called in a content key
    targets: np.ndarray
    size: int

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return picture(*self.items[i], self.size), self.targets[i]

    def take(self, rows):
        return Pictures([self.items[k] for k in rows], [self.ids[k] for k in rows],
                        self.targets[rows], self.size)

    def __add__(self, other):
        return Pictures(self.items + other.items, self.ids + other.ids,
                        np.concatenate([self.targets, other.targets]), self.size)


def real_pictures(m, rows, size) -> Pictures:
    return Pictures([(m.source, i) for i in rows], rows.tolist(), m.targets[rows], size)


def label_aucs(targets, scores) -> np.ndarray:
    """Area under the ROC curve of each label, (n, L) each -> (L,); NaN where all have one class."""
    from sklearn.metrics import roc_auc_score
    return np.array([roc_auc_score(y > 0.5, score) if len(np.unique(y)) > 1 else math.nan
                     for y, score in zip(np.asarray(targets).T, np.asarray(scores).T)])


@torch.no_grad()
def macro_auc(net, pictures, size, device) -> float:
    """Mean AUC of the labels that have both classes among these pictures, or NaN."""
    net.eval()
    found = [(net(to_pixels(images, size, 1.0, device)).float().cpu(), targets)
             for images, targets in DataLoader(pictures, 256)]
    logits, targets = map(torch.cat, zip(*found))
    aucs = label_aucs(targets, logits)
    return float(aucs[np.isfinite(aucs)].mean()) if np.isfinite(aucs).any() else math.nan


@torch.enable_grad()  # whatever the caller does
def fit(s: Classify, train, val, seed, device, steps_an_epoch=0):
    """The paper's recipe: AdamW, lr / 10 on a plateau of the validation AUC, early stopping.

    train, val: sequences of (uint8 (S, S), float32 (L,)). -> the best epoch's net, its history.
    steps_an_epoch: so many steps, whatever the number of images, and no early stop.
    """
    if min(len(train), len(val)) < 2:
        raise UserError(f"{len(train)} images to train on and {len(val)} to validate on, expected "
                        "at least 2 of each; take more images, of more patients")
    y = np.stack([target for _, target in val])
    if not (y.any(0) & ~y.all(0)).any():
        raise UserError(f"each finding is in all or in none of the {len(y)} validation images (one "
                        "class only): an AUC needs both; take more images or fewer folds")
    torch.manual_seed(seed)
    net = DenseNet(y.shape[1], 1, *s.net).to(device, memory_format=torch.channels_last)
    if device.type == "cuda":
        net.compile()
    optimizer = torch.optim.AdamW(net.parameters(), s.lr, weight_decay=s.weight_decay, fused=True)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", 0.1, s.patience)
    count = steps_an_epoch or -(-len(train) // s.batch)
    shown = count * min(s.batch, len(train)) if steps_an_epoch else len(train)
    best = {"val": -1.0, "best_epoch": 0}
    for epoch in range(s.epochs):
        net.train()
        draws = np.random.default_rng((seed, epoch))
        passes = [draws.permutation(len(train)) for _ in range(-(-shown // len(train)))]
        order = np.concatenate(passes)
        # Near-equal batches: none of one image, which batch norm could not take.
        places = np.array_split(np.arange(shown), count)
        loader = DataLoader(train, batch_sampler=[order[place].tolist() for place in places],
                            num_workers=8 if device.type == "cuda" else 0)
        for place, (images, targets) in zip(places, loader):
            # Each showing has a number of its own, so each is augmented otherwise.
            x = data.augment(images.to(device), epoch * shown + place, 0, seed)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits = net(resized(x, s.size))
            loss = F.binary_cross_entropy_with_logits(logits.float(), targets.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        auc = macro_auc(net, val, s.size, device)
        plateau.step(auc)
        if auc > best["val"]:
            best = {"val": auc, "best_epoch": epoch + 1}
            kept = {k: v.clone() for k, v in net.state_dict().items()}
        elif epoch + 1 - best["best_epoch"] >= s.early_stop and not steps_an_epoch:
            break
    if best["val"] < 0:
        raise UserError(f"the validation AUC was never a number; lower --lr (now {s.lr:g})")
    net.load_state_dict(kept)
    history = {"epochs": epoch + 1, "updates": count * (epoch + 1), "train": len(train)}
    return net.eval(), best | history


# ---- Classification (paper 2.4, Table 1, Figure 4) ---------------------------------------------


@dataclass
class Synthetic:
    """Images lerp(c_i, c_j, r) of members i, j of a subset; i = j is a reconstruction."""

    ends: np.ndarray  # (m, 2) ints, i and j
    r: np.ndarray  # (m,) in [0, 1]
    variant: np.ndarray  # (m,) ints, how often the pair has come before
    seeds: list = ()  # of the noise; they name the images
    pictures: Pictures | None = None  # with the labels of the nearer end

    @property
    def nearer(self):
        return np.where(self.r < 0.5, *self.ends.T)

    def inside(self, members) -> np.ndarray:
        """The images whose sources are all among these members."""
        return np.flatnonzero(np.isin(self.ends, members).all(1))


def reconstructions(n, ratio) -> Synthetic:
    """Each of n images once, then again, `ratio` times in all."""
    ends = np.tile(np.arange(n), ratio)
    return Synthetic(np.stack([ends, ends], 1), np.zeros(n * ratio), np.arange(n * ratio) // n)


def interpolations(targets, folds, ratio, seed) -> Synthetic:
    """Pairs that share a label, until each training part (all folds but one) has enough inside.

    targets (n, L) of 0 and 1; folds: lists of images; enough: `ratio` times the part's images.
    Every admissible pair, in random order, comes once before any comes again, then with another r.
    CHOICE: r is uniform in [0, 1]; the pairs of a training part never touch its validation fold.
    """
    has = np.asarray(targets, np.float32)
    pairs = np.argwhere(np.triu(has @ has.T > 0, 1))
    inside = np.stack([~np.isin(pairs, part).any(1) for part in folds])  # (training parts, pairs)
    asked = np.array([ratio * (len(has) - len(part)) for part in folds])
    if not inside.any(1).all():
        raise UserError("found no two images of a training part that share a finding, so there is "
                        "nothing to interpolate between; take a larger N")
    rounds = range((-(-asked // inside.sum(1))).max())
    order = np.concatenate([np.argsort(data.hash64(seed, k, np.arange(len(pairs))))
                            for k in rounds])
    is_enough = (inside[:, order].cumsum(1) >= asked[:, None]).all(0)
    order = order[:is_enough.argmax() + 1]
    variant = np.arange(len(order)) // len(pairs)
    return Synthetic(pairs[order], data.uniforms(1, seed, variant, order)[:, 0], variant)


def synthesise(m, s, subset, made, folder) -> None:
    """Make the images that are not there yet, as tar shards, by all ranks.

    An image is named by its seed, and the folder by the generator: a killed run goes on, and other
    sizes, ratios and numbers of ranks find what they share.
    """
    sources = [[m.ds.keys[i] for i in pair] for pair in subset[made.ends]]
    made.seeds = [f"{seed_of(s.seed, *image):015x}" for image in zip(
        sources, made.r.tolist(), made.variant.tolist())]

    def make(rows):
        samples = []
        for some in chunks(rows, s.micro_batch):
            ends = subset[made.ends[some]]
            first, second = [encode_tokens(m.run, m.ds.read(column)) for column in ends.T]
            c = torch.lerp(first, second, torch.from_numpy(made.r[some]).to(first)[:, None, None])
            seeds = [int(made.seeds[k], 16) for k in some]
            images = generate(m.run, c, seeds, s.steps).numpy()
            for k, image, seed, near in zip(some, images, seeds, subset[made.nearer[some]]):
                how = {"seed": seed, "step": m.run.step, "steps": s.steps, "r": made.r[k],
                       "sources": sources[k]}  # all that makes this image again, alone
                samples.append(data.Sample(made.seeds[k], image, m.ds.patients[near], "synthetic",
                                           m.ds.labels[near], extra=how))
        data.write_shard(folder / f"{data.digest([x.key for x in samples])}.tar", samples)
        return rows

    def missing():
        there = place_of(folder, m.run.size)
        return [k for k, name in enumerate(made.seeds) if name not in there]

    on_all_ranks(on_rank_0(missing), 500, make, "synthetic images, 500 a batch")


def place_of(folder, size) -> dict:
    """{name: row} of the images in a folder of shards."""
    ds = data.open_data(str(folder), size) if list(folder.glob("*.tar")) else None
    return {key: i for i, key in enumerate(ds.keys)} if ds else {}


def classify(s: Classify) -> None:
    """Table 1 and Figure 4: real, augmented and synthetic training sets, and label fidelity."""
    if not set(s.strategies) <= {"reconstruct", "interpolate"} or min(s.ratios) < 1 or s.folds < 2:
        raise UserError(f"found --strategies {s.strategies} --ratios {s.ratios} --folds {s.folds}, "
                        "expected reconstruct and interpolate, ratios from 1 and folds from 2")
    m = open_labelled(s)
    s = dataclasses.replace(s, size=min(s.size, m.run.size))
    labels = [tuple(itertools.compress(m.names, row)) for row in m.targets]
    picks = data.balanced_subsets([labels[i] for i in m.pool], s.sizes, s.seed)
    subset = m.pool[picks[max(picks)]]  # the subset of a smaller N is its beginning
    folder = m.out / "synthetic" / m.key(name_of(m.run), s.steps)
    folds = {n: data.folds_by_patient([m.ds.patients[i] for i in subset[:n]],
                                      [labels[i] for i in subset[:n]], s.folds, s.seed)
             for n in picks}
    made = {}
    for n, strategy in itertools.product(picks, s.strategies):
        made[strategy, n] = reconstructions(n, max(s.ratios))
        if strategy == "interpolate":
            y = m.targets[subset[:n]]
            made[strategy, n] = interpolations(y, folds[n], max(s.ratios), s.seed)
        synthesise(m, s, subset, made[strategy, n], folder)
    place = place_of(folder, m.run.size)
    source = (len(place), str(folder), m.run.size)
    for pairs in made.values():
        items = [(source, place[name]) for name in pairs.seeds]
        ids = [f"{folder.name} {name}" for name in pairs.seeds]
        pairs.pictures = Pictures(items, ids, m.targets[subset[pairs.nearer]], s.size)
    cells, jobs = plan_folds(m, s, subset, folds, made)
    results = on_all_ranks(jobs, len(jobs), functools.partial(train_all, s, m))
    protocol = f"{s.size} px, {', '.join(m.names)}, {len(m.test)} test images of {m.ds.name}"
    base = {"run": m.run.folder.name, "step": m.run.step, "protocol": protocol}
    rows = [base | cell | result for cell, result in zip(cells, results)]
    finish(m, "classify", rows, classify_section)


RECIPE = "epochs batch lr weight_decay patience early_stop size net".split()


def plan_folds(m, s, subset, folds, made) -> tuple[list[dict], list[Callable]]:
    """The cells of Table 1, fold by fold so that ranks get alike shares, and their trainings."""
    real, test = real_pictures(m, subset, s.size), real_pictures(m, m.test, s.size)
    kinds = [("real", "only", 0),
             *itertools.product(("augment", "synthetic"), s.strategies, s.ratios)]
    cells = []
    jobs = []
    for k, n, (experiment, strategy, ratio) in itertools.product(range(s.folds), folds, kinds):
        rows = np.setdiff1d(np.arange(n), folds[n][k])
        parts = {"train": real.take(rows), "val": real.take(folds[n][k]), "test": test}
        if ratio:  # the first images inside, so 1:50 contains 1:10
            pairs = made[strategy, n]
            extra = pairs.pictures.take(pairs.inside(rows)[:ratio * len(rows)])
            parts["train"] = extra if experiment == "synthetic" else parts["train"] + extra
        elif n == max(folds):
            for kind in s.strategies:
                parts |= fidelity_sets(kind, made[kind, n], folds[n][k])
        steps = -(-len(rows) * (1 + max(s.ratios)) // s.batch) if s.equal_steps else 0
        seed = seed_of(s.seed, n, k) % 2**31
        key = m.key(m.names, [getattr(s, name) for name in RECIPE], steps, seed,
                    {name: part.ids for name, part in parts.items()})
        work = functools.partial(train_fold, s, parts, seed, m.run.device, steps)
        jobs.append(functools.partial(cached, m.out, "fold", key, work, is_alone=True))
        cells.append({"N": n, "experiment": experiment, "strategy": strategy, "ratio": ratio,
                      "fold": k})
    return cells, jobs


def fidelity_sets(strategy, pairs, val) -> dict[str, Pictures]:
    """Synthetic images whose sources the classifier has not seen, by min(r, 1 - r)."""
    rows = pairs.inside(val)[:2000]
    is_far = np.minimum(pairs.r, 1 - pairs.r)[rows] > 0.25
    parts = {", r up to 1/4 from the labelled end": rows[~is_far], ", r beyond 1/4": rows[is_far]}
    parts = parts if pairs.r.any() else {"": rows}  # a reconstruction has no r
    return {f"fidelity: {strategy}{name}": pairs.pictures.take(part)
            for name, part in parts.items() if len(part)}


def train_fold(s, parts, seed, device, steps) -> dict:
    """Train and score -> history and AUCs, or {"error": message}."""
    try:
        net, history = fit(s, parts["train"], parts["val"], seed, device, steps)
    except UserError as error:
        return {"error": str(error)}
    aucs = {name: macro_auc(net, part, s.size, device) for name, part in parts.items()
            if name not in ("train", "val")}
    return history | {name: auc for name, auc in aucs.items() if math.isfinite(auc)}


def call(job):
    return job()


def train_all(s, m, jobs) -> list[dict]:
    """The results of some trainings; on a CPU in one process a core, each of one thread."""
    is_cpu = m.run.device.type == "cpu"
    count = s.workers or (data.cores() // ranks()[1] if is_cpu else 1)
    # TRAP: not by fork: a forked child would wait for the parent's threads.
    return data.run_jobs(call, [(job,) for job in jobs], "training classifiers", max(count, 1),
                         " trainings", "spawn")


def paired_tests(scores, baseline, test_share) -> tuple[float, float]:
    """Two-sided p of the paired t-test, and of Nadeau and Bengio's (2003) for cross-validation.

    The latter's variance is (1/k + test_share) s^2 in place of s^2 / k: training sets overlap.
    test_share: validation images over training images of a fold, 1 / (folds - 1).
    CHOICE: with 5 folds a Wilcoxon test cannot reach 0.05, so the unnamed test is the t-test.
    """
    from scipy import stats  # here: it takes half a second to load
    difference = np.subtract(scores, baseline)
    k = len(difference)
    sd = difference.std(ddof=1)
    if sd == 0:
        return (float(difference.mean() == 0),) * 2
    t = abs(difference.mean()) / (sd * np.sqrt([1 / k, 1 / k + test_share]))
    return tuple((2 * stats.t.sf(t, k - 1)).tolist())


def holm(p_values) -> list[float]:
    """Holm's correction: the i-th smallest of m p-values times m - i + 1, never falling, <= 1."""
    p = np.asarray(p_values, float)
    order = np.argsort(p)
    adjusted = np.empty(len(p))
    adjusted[order] = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)).clip(max=1)
    return adjusted.tolist()


EXPERIMENTS = {"real": "real", "augment": "(a) data augmentation",
               "synthetic": "(b) full synthetic training"}


def summarise(rows) -> list[dict]:
    """Rows of folds, of one run or several -> a row a cell: mean, sd, p, gain in % over real only.

    The real-only baseline of an N is the first run's. Holm's correction goes over a run's column.
    """
    aucs = defaultdict(dict)
    for row in rows:
        run = row["run"] if row["ratio"] else ""
        cell = row["N"], run, row["experiment"], row["strategy"], row["ratio"]
        aucs[cell].setdefault(row["fold"], row.get("test", math.nan))
    columns = defaultdict(list)
    best = defaultdict(float)
    for cell, folds in aucs.items():
        base = aucs[cell[0], "", "real", "only", 0]
        both = np.array([(auc, base[k]) for k, auc in folds.items()]).T
        both = both[:, np.isfinite(both).all(0)]
        if both.shape[1] > 1:
            (mean, real), (sd, _) = both.mean(1), both.std(1, ddof=1)
            p, corrected = paired_tests(*both, 1 / (len(folds) - 1))
            names = dict(zip(("N", "run", "experiment", "strategy", "ratio"), cell))
            columns[cell[:2]].append(names | {
                "cell": cell[:4], "mean": mean, "sd": sd, "p": p, "corrected": corrected,
                "gain": 100 * (mean / real - 1), "gain_low": 100 * ((mean - sd) / real - 1),
                "gain_high": 100 * ((mean + sd) / real - 1), "title": EXPERIMENTS[cell[2]]})
            best[cell[:4]] = max(best[cell[:4]], mean)
    for column in columns.values():
        for row, p in zip(column, holm([row["corrected"] for row in column])):
            row["mark"] = "*" * int(row["p"] < 0.05) + "†" * int(p < 0.05)
            bold = "**" if row["ratio"] and row["mean"] == best[row["cell"]] else ""
            row["text"] = f"{bold}{row['mean']:.3f} ± {row['sd']:.3f}{bold} {row['mark']}"
    return list(itertools.chain(*columns.values()))


def classify_section(rows, out) -> list[str]:
    """Table 1, Figure 4 (a, b; i, ii) and label fidelity of rows of one run or several."""
    parts, lines = by_protocol(rows)
    for k, part in enumerate(parts):
        cells = summarise(part)
        steps = dict.fromkeys(f"{row['run']} at step {row['step']:,}" for row in part)
        lines += [f"## Classification (2.4, Table 1): {part[0]['protocol']}", "",
                  f"Macro AUC, mean ± SD over folds; {', '.join(steps)}.\n",
                  *pivot(cells, "{title} {run} {strategy} 1:{ratio}", "N = {N}", "{text}"),
                  "\\* p < 0.05 in the paired t-test against real only, as in the paper; † also "
                  "with Nadeau and Bengio's correction and Holm's over the column; bold: the best "
                  "ratio.\n"]
        errors = dict.fromkeys(row["error"] for row in part if "error" in row)
        lines += [f"> A fold was left out: {error}\n" for error in errors]
        bars = defaultdict(list)
        for cell in cells:
            bars[cell["experiment"], cell["strategy"]].append(cell)
        bars.pop(("real", "only"), None)
        for (experiment, strategy), found in bars.items():
            lines.append(chart(out / f"figure4-{experiment}-{strategy}-{k}.png", found,
                               "{run} 1:{ratio}", "N", "gain", f"{found[0]['title']}, {strategy}",
                               ("N, real images", "change of AUC, %"), is_bars=True))
        fidelity = defaultdict(list)
        for row in part:
            for name in [name for name in row if name.startswith("fidelity")]:
                fidelity[row["run"], name].append(row[name])
                fidelity[row["run"], "the real test images"].append(row.get("test", math.nan))
        lines += ["Label fidelity: AUC of classifiers trained on real images alone on synthetic "
                  "images of sources that they have not seen.\n", *table([
                      {"run": run, "images": name, "auc": np.mean(aucs), "sd": np.std(aucs)}
                      for (run, name), aucs in fidelity.items()],
                      {"run": "{run}", "images": "{images}", "AUC ± SD": "{auc:.3f} ± {sd:.3f}"})]
    return lines


# ---- Zero-shot lung segmentation (paper 2.4, Table 2, Figures 5 and 9-12) ----------------------

PAPER_TABLE_2 = """The paper's Table 2 (oracle): mean Dice ± SD in %.

| | Stable Diffusion 1.5 | DiNOv1-Diffusion | DiNOv2-Diffusion | fully supervised |
|---|---|---|---|---|
| t, M, tau | 300, 32, 0.5 | 300, 16, 0.05 | 300, 16, 0.05 | |
| shenzhen | 80.7 ± 15.9 | 84.2 ± 10.5 | 82.3 ± 15.7 | 98.3 |
| jsrt | 80.9 ± 12.1 | 88.4 ± 6.8 | 84.7 ± 11.3 | 97.9 |
| montgomery | 77.3 ± 8.8 | 78.3 ± 8.6 | 87.1 ± 3.4 | 97.7 |
| combined | 80.3 ± 14.2 | 84.4 ± 9.9 | 83.6 ± 13.6 | |
"""
OWN_TAU = (0.3, 0.4, 0.5, 0.6)  # CHOICE: taus of an image without a mask, in median divergences


def otsu(values) -> int:
    """uint8 -> t, for which the classes <= t and > t have the largest variance [Otsu 1979]."""
    counts = np.bincount(values.ravel(), minlength=256).astype(float)
    below = counts.cumsum()
    moment = (counts * np.arange(256)).cumsum()
    with np.errstate(invalid="ignore", divide="ignore"):
        between = (moment[-1] * below / below[-1] - moment) ** 2 / (below * (below[-1] - below))
    return int(np.nan_to_num(between).argmax())


def otsu_lungs(image) -> np.ndarray:
    """The floor without a network: two largest dark regions of the central 80 %, bool (S, S)."""
    rim = len(image) // 10
    centre = image[rim:len(image) - rim, rim:len(image) - rim]
    regions, _ = ndimage.label(centre <= otsu(centre))
    areas = np.bincount(regions.ravel())
    areas[0] = 0
    return np.pad(np.isin(regions, areas.argsort()[-2:]) & (areas[regions] > 0), rim)


def expected_lungs(image) -> np.ndarray:
    """What anyone knows of a frontal chest X-ray beforehand: weights (2, S, S) in [0, 1].

    Place: two upright ellipses, 0.45 of the half-width off the middle and 0.15 above it, semi-axes
    0.36 and 0.7, soft rims. Darkness: air is darker than the mean under them. No mask is read; the
    round numbers were chosen once, after looking at where lungs lie in phantoms and public sets.
    """
    v, u = np.mgrid[-1:1:1j * len(image), -1:1:1j * len(image)]
    radius = [np.hypot((u - side * 0.45) / 0.36, (v + 0.15) / 0.7) for side in (-1, 1)]
    place = np.clip((1.3 - np.stack(radius)) / 0.6, 0, 1)
    smooth = ndimage.gaussian_filter(image.astype(float), len(image) / 64)
    mean = np.average(smooth, weights=place.sum(0))
    spread = smooth.std() + 1e-6
    return place / (1 + np.exp((smooth - mean - 0.3 * spread) / (0.25 * spread)))


def candidates(labels, with_parts=True) -> np.ndarray:
    """Labels (S, S) -> (K, S²) float32 of 0 and 1: segments, and the connected parts of each.

    CHOICE: attention often gives both lungs one label, so parts stand beside wholes, as an option;
    what has less than 1 % of the picture is no lung.
    """
    pool = []
    for k in np.unique(labels):
        parts, count = ndimage.label(labels == k)
        pool.append(labels == k)
        if with_parts and count > 1:
            pool += [parts == p for p in range(1, count + 1)]
    pool = np.stack(pool).reshape(-1, labels.size).astype(np.float32)
    return pool[pool.mean(1) > 0.01]


def select(pool, target) -> tuple[np.ndarray, float]:
    """Non-maximum suppression: candidates (K, S²), lungs (2, S, S) -> union (S, S), its Dice.

    Greedy by Dice with one lung, the other or both: the best candidate is taken, what overlaps it
    is suppressed, the lungs that it serves are done: at most one candidate a lung. With true masks
    this is the paper's *oracle* selection, with `expected_lungs` a rule that never sees the truth.
    CHOICE: below a Dice of 0.2 nothing is taken.
    """
    size = target.shape[1:]
    target = np.concatenate([target, target.max(0)[None]]).reshape(3, -1).astype(np.float32)
    LEFT, RIGHT, BOTH = range(3)
    dice = 2 * pool @ target.T / (pool.sum(1)[:, None] + target.sum(1))  # (K, 3)
    chosen = np.zeros(pool.shape[1], bool)
    while dice.max(initial=0) > 0.2:
        k, lung = np.unravel_index(dice.argmax(), dice.shape)
        chosen |= pool[k] > 0
        dice[pool @ pool[k] > 0] = 0
        dice[:, [LEFT, RIGHT, BOTH] if lung == BOTH else [lung, BOTH]] = 0
    return chosen.reshape(size), dice_score(chosen, target[2])


def dice_score(a, b) -> float:
    """2|a∩b| / (|a| + |b|); 1 for two empty masks."""
    total = float(a.sum() + b.sum())
    return 2 * float((a * b).sum()) / total if total else 1.0


def open_lungs(s: Segment) -> Measurement:
    """The images with masks, at most --count of each set, in m.test; the set of each in m.names."""
    m = open_measurement(s, 2_000_003, 4 * (s.count or 256))
    m.test, m.names = [], []
    sets = defaultdict(list)
    for i, provider in enumerate(m.ds.providers):
        sets[provider or m.ds.name].append(i)
    for name, rows in sets.items():
        if m.ds.seed is not None:  # one visit of each imaginary patient
            rows = np.unique(m.ds.patients, return_index=True)[1]
        with_mask = [i for i in rows if m.ds.has_mask(i)]
        kept = subsample(np.array(with_mask, int), s.count or len(rows))
        m.test = np.concatenate([m.test, kept]).astype(int)
        m.names += [name] * len(kept)
        m.notes.append(f"{name}: {len(rows) - len(with_mask)} of {len(rows)} images have no lung "
                       f"mask and were left out; {len(kept)} are scored.")
    if not m.names:
        raise UserError(f"{m.ds.name} has no lung masks; expected a set prepared with them")
    for what, shared in shared_with(m).items():
        m.notes += [f"The generator was trained on {len(shared)} {what} of these, masks "
                    "unused."] * bool(shared)
    return m


@dataclass
class Model:
    """A UNet to segment with: the run's own, or another in its place."""

    name: str
    open: Callable  # step -> dinodiff.Run
    steps: list
    grids: tuple
    c: Tensor | None = None  # fixed tokens (S, N), where they are not the image's own


def models_of(m, s) -> list[Model]:
    """This run, the untrained network, and --init."""
    def replaced(unet):
        return dataclasses.replace(m.run, step=0, unet=dinodiff.freeze(unet, m.run.device))

    def untrained(step):
        with torch.random.fork_rng():
            torch.manual_seed(s.seed)
            return replaced(dinodiff.from_scratch(m.run.unet.config))

    def public(step):
        place = (dinodiff.SD15, "unet") if s.init == "sd15" else (s.init,)
        unet = UNet.from_pretrained(*place)
        width = unet.config.cross_attention_dim
        if s.context and c.shape[1] != width:
            raise UserError(f"{s.context}: found tokens of {c.shape[1]} numbers, expected {width}, "
                            f"those of {s.init}")
        return replaced(unet)

    own = functools.partial(dinodiff.load_run, m.run.folder, device=s.device)
    steps = m.run.checkpoints if s.checkpoints == "all" else [m.run.step]
    found = [Model("this run", own, steps, s.grids), Model("untrained", untrained, [0], s.grids)]
    if s.init:
        # CHOICE: without --context one zero token: cross-attention adds its bias, and no text.
        tensors = data.load_tensors(s.context)[0] if s.context else {"context": torch.zeros(1, 1)}
        c = tensors.get("context", torch.empty(0))
        if c.ndim != 2:
            raise UserError(f"{s.context}: found the tensors {', '.join(tensors)}, expected "
                            "`context` of shape (S, N)")
        found.append(Model(s.init, public, [0], s.init_grids, c))
    return found


def attention_maps(s, model, run, images, t) -> dict[str, Tensor]:
    """{"all maps": A (B, S², S²), and of the --last ones}, from one UNet pass."""
    lasts = {"all maps": 0} | ({f"last {s.last} maps": s.last} if s.last else {})
    c = encode_tokens(run, images)
    if model.c is not None:
        c = model.c.to(c).expand(len(c), -1, run.unet.config.cross_attention_dim)
    return dict(zip(lasts, diffseg.attentions(run, images, c, t, [*lasts.values()])))


def segment_image(s, A, M, image, truth) -> list[dict]:
    """A (S², S²) -> picks and Dice of oracle and rule at each of --thresholds, then of OWN_TAU.

    belief: how much the rule's choice looks like lungs to itself.
    """
    first = diffseg.divergence(A[diffseg.anchors(math.isqrt(len(A)), M).to(A.device)], A)
    prior = expected_lungs(image)
    found = []
    for tau in (*s.thresholds, *(share * first.median().item() for share in OWN_TAU)):
        masks = diffseg.merge(A, M, tau, first=first)
        masks = diffseg.refine(A, masks) if s.refine else masks
        pool = candidates(diffseg.label(masks, len(image)).cpu().numpy(), s.candidates == "parts")
        best, oracle = select(pool, truth)
        guess, belief = select(pool, prior)
        found.append({"tau": tau, "oracle": oracle, "rule": dice_score(guess, truth.any(0)),
                      "belief": belief, "picks": [best, guess]})
    return found


def score_image(s, model, key, image, truth, maps) -> list[dict]:
    """A row for each choice of maps, M and tau; tau None: the image's own, as the rule believes."""
    rows = []
    for (name, A), M in itertools.product(maps.items(), model.grids):
        found = segment_image(s, A, M, image, truth)
        own = max(found[len(s.thresholds):], key=lambda one: one["belief"])
        for one in [*found[:len(s.thresholds)], own | {"tau": None}]:
            rows.append({"key": key, "maps": name, "M": M, "tau": one["tau"],
                         "oracle": one["oracle"], "rule": one["rule"]})
    return rows


def sweep(m, s, model, run, weights, t, ids) -> list[dict]:
    """Rows of each image at each setting, of one model at one checkpoint and t."""
    side = run.size // run.vae.config.factor
    batch = max(1, min(16, 2**24 // side**4))  # no more than the maps of one image of 512 px

    def score(some):
        images = m.ds.read(some)
        maps = attention_maps(s, model, run, images, t)
        each = [{name: A[k] for name, A in maps.items()} for k in range(len(some))]
        with ThreadPoolExecutor(max(1, data.cores() // ranks()[1])) as threads:
            rows = threads.map(functools.partial(score_image, s, model), some.tolist(),
                               images.numpy(), [m.ds.mask(i) for i in some], each)
            return list(itertools.chain(*rows))

    key = m.key(weights, [] if model.c is None else model.c.tolist(), t, ids.tolist(),
                s.thresholds, model.grids, s.last, s.candidates, s.refine)
    return cached(m.out, "segment", key, lambda: on_all_ranks(
        ids, batch, score, f"{model.name}, step {run.step}, t {t}").tolist())


def summarise_dice(m, rows, **fields) -> list[dict]:
    """Rows of images -> a row a setting, selection and set: mean, SD, median and quartiles in %."""
    sets = dict(zip(m.test.tolist(), m.names))
    groups = defaultdict(list)
    for row, by in itertools.product(rows, ("oracle", "rule")):
        for name in (sets[row["key"]], "combined"):
            groups[name, by, row["maps"], row["M"], row["tau"]].append(100 * row[by])
    found = []
    for group, dice in sorted(groups.items(), key=lambda item: item[0][0] == "combined"):
        low, median, high = np.percentile(dice, (25, 50, 75)).tolist()
        found.append(dict(zip(("set", "by", "maps", "M", "tau"), group)) | fields | {
            "run": m.run.folder.name,
            "protocol": f"{len(m.test)} images of {m.ds.name}, {m.run.size} px",
            "images": len(dice), "dice": float(np.mean(dice)), "sd": float(np.std(dice)),
            "median": median, "median_low": low, "median_high": high, "is_headline": False})
    return found


def matching(rows, wanted) -> list[dict]:
    return [row for row in rows if wanted.items() <= row.items()]


def best_of(rows, maps="all maps") -> dict:
    """The oracle's row with one tau for all images and the highest mean Dice over all sets."""
    found = matching(rows, {"by": "oracle", "set": "combined", "maps": maps})
    return max(found, key=lambda row: row["dice"] * (row["tau"] is not None))


SETTING = ("step", "t", "maps", "M", "tau", "by")


def segment(s: Segment) -> None:
    """Table 2, Figures 5 and 9-12: a coarse sweep over checkpoints, then a full one on the best.

    Each network is searched alike. The headlines: the oracle's best setting, as in the paper, and
    the rule at a setting fixed beforehand: --step, t nearest 300, the first M, the image's own tau.
    """
    if not all(0 <= t < 1000 for t in s.timesteps) or s.checkpoints not in ("one", "all"):
        raise UserError(f"found --timesteps {s.timesteps} --checkpoints {s.checkpoints}, expected "
                        "numbers from 0 to 999, and one or all")
    m = open_lungs(s)
    base = min(s.timesteps, key=lambda t: abs(t - 300))
    names = np.array(m.names)
    few = [subsample(m.test[names == name], s.coarse) for name in dict.fromkeys(m.names)]
    rows = floor_rows(m)
    for model in models_of(m, s):
        fixed = m.run.step if m.run.step in model.steps else model.steps[-1]
        coarse = {step: measure(m, s, model, step, [base], np.concatenate(few), "coarse")
                  for step in model.steps}
        ranked = sorted(coarse, key=lambda step: -best_of(coarse[step])["dice"])
        full = []
        for step in dict.fromkeys([*ranked[:2], fixed]):
            full += measure(m, s, model, step, s.timesteps, m.test, "full")
        for maps in dict.fromkeys(row["maps"] for row in full):
            best = best_of(full, maps)
            rule = dict(zip(SETTING, (fixed, base, maps, model.grids[0], None, "rule")))
            oracle = {key: best[key] for key in SETTING}
            for row in [*matching(full, oracle), *matching(full, rule)]:
                row["is_headline"] = True
        rows += [*itertools.chain(*coarse.values()), *full]
        if model.name == "this run":
            gallery(m, s, model, best_of(full))
    finish(m, "segment", rows, segment_section)


def measure(m, s, model, step, timesteps, ids, stage) -> list[dict]:
    """Rows of one model at one checkpoint: a row a t, setting, selection and set."""
    run = model.open(step)
    weights = name_of(run)
    rows = []
    for t in timesteps:
        rows += summarise_dice(m, sweep(m, s, model, run, weights, t, ids), model=model.name,
                               step=step, t=t, stage=stage)
    return rows


def floor_rows(m) -> list[dict]:
    """What needs no network: Otsu's dark regions, the rule's expectation, the whole picture."""
    guesses = {"Otsu": otsu_lungs, "expectation": lambda x: expected_lungs(x).max(0) > 0.5,
               "whole picture": np.ones_like}
    rows = []
    for i, (name, guess) in itertools.product(m.test.tolist(), guesses.items()):
        dice = dice_score(guess(m.ds[i]) > 0, m.ds.mask(i).any(0))
        rows.append({"key": i, "maps": name, "M": 0, "tau": None, "oracle": dice, "rule": dice})
    found = summarise_dice(m, rows, model="no network", step=0, t=0, stage="full")
    return [row | {"is_headline": True} for row in matching(found, {"by": "rule"})]


@torch.no_grad()
def gallery(m, s, model, best) -> None:
    """Figures 5 and 9: the best and worst images of each set at the oracle's best setting."""
    run = model.open(best["step"])
    setting = {key: best[key] for key in ("maps", "M", "tau")}
    dice = {row["key"]: row["oracle"] for row in matching(
        sweep(m, s, model, run, name_of(run), best["t"], m.test), setting)}
    cells = []
    titles = []
    for name in dict.fromkeys(m.names):
        order = sorted(m.test[np.array(m.names) == name].tolist(), key=dice.get)
        for i in dict.fromkeys([*order[-2:], *order[:2]]):
            images, truth = m.ds.read([i]), m.ds.mask(i)
            A = attention_maps(s, model, run, images, best["t"])[best["maps"]][0]
            image = images[0].numpy()
            one = segment_image(s, A, best["M"], image, truth)[s.thresholds.index(best["tau"])]
            for mask in (image < 0, truth.any(0), *one["picks"]):
                green = mask.reshape(image.shape) * (image // 3)
                cells.append(np.stack([image - green, image, image - green], 2))
            titles.append(f"{name}: {100 * dice[i]:.0f} %")
    captions = ["X-ray", "true lungs", "oracle", "rule"] * len(titles)
    if ranks()[0] == 0:
        data.save_png(m.out / "figure5-9.png", data.grid(cells, 4, captions, titles))


def segment_section(rows, out) -> list[str]:
    """Table 2 and Figures 10-12 of rows of one run or several."""
    parts, lines = by_protocol(rows)
    title = "{run}: {model}, {by}, {maps} (step {step:,}, t {t}, M {M}, tau {tau})"
    floor = "no network: {maps}"  # the same for all runs
    for k, part in enumerate(parts):
        runs = list(dict.fromkeys(row["run"] for row in part))
        head = [row | {"tau": row["tau"] or "own"} for row in part if row["is_headline"]]
        head = [row | {"title": (floor if row["model"] == "no network" else title).format_map(row)}
                for row in head]
        lines += ["## Zero-shot lung segmentation (2.4, Table 2)", "",
                  f"Mean Dice ± SD in %; {part[0]['protocol']}. As the paper's Table 2:\n",
                  *pivot(matching(head, {"by": "oracle", "maps": "all maps"}), "{set}",
                         "{run}: {model} (t {t}, M {M}, tau {tau})", "{dice:.1f} ± {sd:.1f}"),
                  "All ways to choose segments, and what needs no network:\n",
                  *pivot(head, "{title}", "{set} ({images})", "{dice:.1f} ± {sd:.1f}"),
                  "Oracle: segments and settings chosen by their Dice with the true lungs, as in "
                  "the paper. Rule: settings fixed beforehand, segments chosen by where lungs are "
                  "expected and by darkness; it reads no mask.\n", PAPER_TABLE_2]
        for run, (number, x) in itertools.product(runs, ((10, "step"), (11, "tau"), (12, "t"))):
            own = matching(part, {"run": run, "model": "this run",
                                  "stage": "coarse" if x == "step" else "full"})
            best = best_of(own)
            line = [row for row in matching(own, {key: best[key] for key in SETTING if key != x})
                    if row["tau"] is not None]
            fixed = ", ".join(f"{key} {best[key]}" for key in ("step", "t", "M", "tau") if key != x)
            lines.append(chart(out / f"figure{number}-{run}-{k}.png", line, "{set}", x, "median",
                               f"{run}, oracle, {fixed}: median Dice and quartiles",
                               (x, "Dice, %")))
    return lines + ["![Figures 5 and 9: best and worst images](figure5-9.png)\n"]


# ---- Audit: copies of training images, obedience to the condition, Figure 8 --------------------

PIXELS = 32 * 32  # of a thumbnail, which comes first in a vector of the audit; features follow
COPY = 0.995  # correlation of thumbnails from which two images are called copies


def thumbnails(images, side=32) -> Tensor:
    """uint8 (B, S, S) -> (B, side^2), mean 0, length 1: the product of two is their correlation."""
    x = F.interpolate(images[:, None].float(), (side, side), mode="bilinear", antialias=True)
    x = x.flatten(1)
    return F.normalize(x - x.mean(1, keepdim=True), dim=1)


def nearest(queries, bank) -> tuple[Tensor, Tensor]:
    """(q, d), (n, d) -> distance (q,) to the nearest row of `bank`, and its index."""
    parts = [torch.cdist(part, bank).min(1) for part in queries.split(512)]
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])


def chance_below(a, b) -> float:
    """The chance that a value of `a` is below one of `b` (broadcast); ties count half."""
    return float(((a < b).double() + (a <= b)).mean() / 2)


def obedience(made, sources) -> float:
    """The chance that made[i] is nearer to its own source than to another's; 0.5: it is ignored."""
    distance = torch.cdist(made, sources)
    is_other = ~torch.eye(len(made), dtype=torch.bool)
    own = distance.diagonal()[:, None].expand_as(distance)
    return chance_below(own[is_other], distance[is_other])


def obeyed_steps(made, first, second) -> float:
    """made (pairs, r, d) from r = 0 to 1: share of steps that lead away from A, or towards B."""
    away = (made - first[:, None]).norm(dim=2).diff(dim=1) > 0
    towards = (made - second[:, None]).norm(dim=2).diff(dim=1) < 0
    return float(torch.cat([away, towards]).double().mean())


def likeness(made, sources, bank, real):
    """Of features of synthetic images, their sources, training images, unseen real images:

    -> figures of copying and obedience, distance to the nearest training image, its index.
    """
    distance, index = nearest(made, bank)
    usual, _ = nearest(real, bank)
    return {"distance": float(distance.median()), "usual": float(usual.median()),
            "nearer": 100 * float((distance < usual.quantile(0.05)).double().mean()),
            "chance": chance_below(distance[:, None], usual),
            "obedience": obedience(made, sources)}, distance, index


@torch.no_grad()
def audit(s: Audit) -> None:
    """Is a synthetic image nearer to a training image than unseen real ones are? Does it obey?"""
    m = open_labelled(s)
    if m.train is None:
        raise UserError(f"the generator's training images are needed (--train-data). {m.notes[-1]}")
    name, embed, _ = open_features(m, s)

    def vectors(pictures, rows):
        """Thumbnails and features of pictures(rows), (n, PIXELS + d)."""
        def both(some):
            images = pictures(some)
            return torch.cat([thumbnails(images), embed(images)], 1)
        return torch.from_numpy(on_all_ranks(rows, 256, both, "reading"))

    trained = subsample(np.arange(len(m.train)), s.train_images)
    unseen = subsample(m.test, 4 * s.count)
    pool = subsample(m.pool, s.train_images)
    if not any(s.finding in ("", *m.ds.labels[i]) for i in subsample(unseen, s.count)):
        raise UserError(f"no unseen image has the finding {s.finding!r} (--finding)")
    bank, real = vectors(m.train.read, trained), vectors(m.ds.read, unseen)
    rows = []
    cells, titles = [], []
    for kind, ds, ids, known in (("training images", m.train, trained, bank),
                                 ("unseen images", m.ds, unseen, real)):
        picked = subsample(np.arange(len(ids)), s.count)
        images = make(m, s, ds, ids[picked])
        made = vectors(images.__getitem__, np.arange(len(images)))
        for space, part in (("pixels", slice(PIXELS)), (name, slice(PIXELS, None))):
            figures, distance, index = likeness(made[:, part], known[picked][:, part],
                                                bank[:, part], real[:, part])
            rows.append(figures | {"kind": kind, "space": space, "images": len(images)})
            near = distance.argsort()[:8]
            cells += [*images[near], *m.train.read(trained[index[near]])]
            titles += [f"of {kind}", f"nearest by {space}"]
    far = (made - known[picked])[:, PIXELS:].norm(dim=1).argsort(descending=True)
    worst = [i for i in unseen[picked[far]] if s.finding in ("", *m.ds.labels[i])][:8]
    m.notes += [f"Figure 8 is from images with {s.finding} alone (--finding)."] * bool(s.finding)
    failures = [m.ds.read(worst), *[make(m, s, m.ds, worst, variant) for variant in range(4)]]
    rows += [{"kind": "interpolations", "obeyed": interpolate(m, s, unseen[:33])},
             copies(m, unseen, real, "the generator's training images", m.train, trained, bank),
             copies(m, unseen, real, "the classifier's training part", m.ds, pool,
                    vectors(m.ds.read, pool))]
    if ranks()[0] == 0:
        save_sheet(m.out / "audit.png", cells, len(near), titles)
        save_sheet(m.out / "figure8.png", itertools.chain(*failures), len(worst),
                   ["real", *[f"variant {k}" for k in range(4)]])
    base = {"run": m.run.folder.name, "step": m.run.step}
    leaks = [(f"test images are copies among {row['among']}", row["copies"]) for row in rows[-2:]]
    for leak in leaks if s.as_paper else []:
        check_leak(s, m, *leak)
    finish(m, "audit", [base | row for row in rows], audit_section)
    for leak in leaks if not s.as_paper else []:  # after writing: what was computed stays
        check_leak(s, m, *leak)


def copies(m, ids, vectors, among, ds, others, bank) -> dict:
    """A row that names test images whose thumbnails are those of ds[others]."""
    distance, index = nearest(vectors[:, :PIXELS], bank[:, :PIXELS])
    hits = np.flatnonzero(1 - distance**2 / 2 >= COPY)  # |a - b|² = 2 - 2 a·b
    if ds.seed != m.ds.seed:  # phantoms of two seeds, of which two in a million look alike
        hits = hits[:0]
    return {"among": among, "copies": [f"{m.ds.keys[ids[k]]} = {ds.keys[others[index[k]]]}"
                                       for k in hits]}


def make(m, s, ds, ids, variant=0) -> Tensor:
    """A reconstruction of each of ds[ids], by all ranks."""
    work = functools.partial(reconstruct, ds, s, m.run, variant=variant)
    return torch.from_numpy(on_all_ranks(ids, s.micro_batch, work, "reconstructions"))


def save_sheet(path, images, columns, titles) -> None:
    cells = [data.resize(image.numpy(), min(len(image), 256)) for image in images]
    data.save_png(path, data.grid(cells, columns, None, titles))


def interpolate(m, s, ids) -> float:
    """Share of steps r = 0, 1/4, …, 1 with one noise that lead away from A, or towards B."""
    c = torch.cat([encode_tokens(m.run, m.ds.read(some)) for some in chunks(ids, s.micro_batch)])
    path = torch.stack([torch.lerp(c[:-1], c[1:], r) for r in (0, 0.25, 0.5, 0.75, 1)], 1)

    def pictures(pairs):
        seeds = [seed_of(s.seed, m.ds.keys[ids[k]]) for k in np.repeat(pairs, 5)]
        return generate(m.run, path[pairs].flatten(0, 1), seeds, s.steps).unflatten(0, (-1, 5))

    made = torch.from_numpy(on_all_ranks(np.arange(len(path)), s.micro_batch // 4, pictures))
    real = thumbnails(m.ds.read(ids))
    return obeyed_steps(thumbnails(made.flatten(0, 1)).unflatten(0, (-1, 5)), real[:-1], real[1:])


def audit_section(rows, out) -> list[str]:
    """The tables and pictures of the audit."""
    lines = ["## Audit: copies, obedience, worst reconstructions (Figure 8)", "",
             *table([row for row in rows if "chance" in row], {
                 "run": "{run}, step {step:,}", "reconstructions of": "{images} {kind}",
                 "space": "{space}",
                 "median distance to the nearest training image": "{distance:.3f}",
                 "that of unseen real images": "{usual:.3f}",
                 "nearer than 95 % of unseen real images": "{nearer:.0f} %",
                 "chance of being nearer than one": "{chance:.2f}",
                 "obedience": "{obedience:.2f}"}),
             "A model that copies shows far more than 5 % and a chance far above 0.50. Obedience: "
             "the chance that a reconstruction is nearer to its own source than to another's; 0.50 "
             "is a model that ignores its condition.\n"]
    lines += [f"{row['run']}: {100 * row['obeyed']:.0f} % of the steps from r = 0 to 1 with one "
              "noise lead away from A, or towards B.\n" for row in rows if "obeyed" in row]
    lines += [f"{row['run']}: {len(row['copies'])} test images are copies among {row['among']}"
              f"{': ' * bool(row['copies'])}{', '.join(row['copies'][:5])}.\n"
              for row in rows if "copies" in row]
    return lines + ["![Synthetic images of training and of unseen images, those nearest to a "
                    "training image, above it](audit.png)\n", "![Figure 8: worst](figure8.png)\n"]


# ---- Everything, and the report of one run or several ------------------------------------------

COMMANDS = {"fid": (Fid, fid, fid_section), "classify": (Classify, classify, classify_section),
            "segment": (Segment, segment, segment_section), "audit": (Audit, audit, audit_section)}


@dataclass(frozen=True)
class Everything(Labelled):
    steps: int = 0  # DDIM steps of a synthetic image; 0: each command's own
    micro_batch: int = 0  # images of one rank in one pass; 0: each command's own
    lungs: str = ""  # images with lung masks; empty: --data


@dataclass(frozen=True)
class Report:
    run_dir: tuple[str, ...] = ()  # run folders; empty: the newest one
    out: str = ""  # folder of the report; empty: RUN/eval, or report/ beside the first of several


@dataclass(frozen=True)
class Convert:
    source: str = field(default="", metadata={"positional": True})  # a pickled DenseNet, model.pt
    out: str = "xrv"  # folder for model.safetensors


def evaluate_all(s: Everything) -> None:
    """Every command in turn, then the report; what one cannot do is said, and the others go on."""
    dinodiff.start_ranks(dinodiff.pick_device(s.device))
    is_alone = ranks()[1] == 1
    group = None if is_alone else dist.new_group(backend="gloo", timeout=timedelta(seconds=15))
    folder = str(s.run_dir or dinodiff.newest_run())
    given = dataclasses.asdict(s) | {"run_dir": folder}
    failed = []
    for name, (kind, function, _) in COMMANDS.items():
        settings = defaults_for(kind, ["--run-dir", folder])
        changed = {key: value for key, value in given.items()
                   if hasattr(settings, key) and value != getattr(Everything(), key)}
        if name == "segment" and s.lungs:
            changed["data"] = s.lungs
        try:
            function(dataclasses.replace(settings, **changed))
        except UserError as error:
            try:
                if not is_alone:
                    dist.monitored_barrier(group)
            except RuntimeError:  # this rank alone has failed: it ends the program
                raise error from None
            note(failed, f"{name} was left out: {error}")
    if len(failed) == len(COMMANDS):
        raise UserError("nothing could be measured: " + "; ".join(failed))
    if ranks()[0] == 0:
        write_report(Report((folder,), s.out), failed)


def write_report(s: Report, notes=()) -> None:
    """report.md: all sections of one run, or of several side by side as in the paper."""
    folders = [Path(name) for name in s.run_dir or (dinodiff.newest_run(),)]
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names):
        raise UserError(f"found the run folders {', '.join(map(str, folders))}, expected a name "
                        "for each: tables and figures go by it")
    usual = folders[0] / "eval" if len(folders) == 1 else folders[0].parent / "report"
    out = Path(s.out or usual)
    is_one = len(folders) == 1 and any((out / f"{name}.json").is_file() for name in COMMANDS)
    lines = [f"# Evaluation of {', '.join(names)}", "",
             "No medical device; nothing here is validated for clinical use.\n",
             *[f"> {note}\n" for note in notes]]
    empty = [str(folder) for folder in folders if not is_one and not any(
        (folder / "eval" / f"{name}.json").is_file() for name in COMMANDS)]
    rows = {}
    for name, (_, _, section) in COMMANDS.items() if not empty else ():
        places = [out if is_one else folder / "eval" for folder in folders]
        found = [data.read_json(place / f"{name}.json", list) for place in places
                 if (place / f"{name}.json").is_file()]
        rows[name] = list(itertools.chain(*found))
        if not all(isinstance(row, dict) and "run" in row for row in rows[name]):
            raise UserError(f"{name}.json of {', '.join(map(str, places))}: found no rows that "
                            f"python evaluate.py {name} writes; run it again")
        if is_one and found:
            lines.append(read_text(out / f"{name}.md"))
        elif found:
            out.mkdir(parents=True, exist_ok=True)
            lines += joined(section(rows[name], out), name, places, out)
    if empty or not any(rows.values()):
        raise UserError(f"{', '.join(empty)}: no results in eval/, expected those of python "
                        f"evaluate.py {' | '.join(COMMANDS)}")
    lines += fid_against_dice(rows, out)
    paper = Path(__file__).parent / "docs" / "paper_table1.md"
    lines += [read_text(paper)] if paper.is_file() else []
    for folder in folders:
        pictures = [*sorted(folder.glob("samples/*.png"))[-1:], *sorted(folder.glob("eval/*.png"))]
        lines += [f"- [{folder.name}, {path.name}]({path.resolve()})" for path in pictures]
    data.write_file(out / "report.md", "\n".join(lines) + "\n")
    print(f"-> {out / 'report.md'}")


def read_text(path: Path) -> str:
    """A text of ours, whatever the locale; it may hold a file's name that is no UTF-8."""
    return path.read_text("utf-8", "surrogateescape")


def joined(lines, name, places, out) -> list[str]:
    """A section of several runs, with each run's own pictures and the notes of its NAME.md."""
    found = []
    for line in lines:
        shown = re.fullmatch(r"!\[(.*)\]\((.*)\)\n", line)
        if not shown or (out / shown[2]).is_file():
            found.append(line)
            continue
        for path in [place / shown[2] for place in places if (place / shown[2]).is_file()]:
            where = os.path.relpath(path, out)
            found.append(f"{path.parent.parent.name}: {shown[1]}\n\n![{shown[1]}]({where})\n")
    notes = defaultdict(list)
    for path in [place / f"{name}.md" for place in places if (place / f"{name}.md").is_file()]:
        for line in read_text(path).splitlines():
            if line.startswith("> ") and f"{line}\n" not in lines:
                notes[line[2:]].append(path.parent.parent.name)
    return found + [f"> {', '.join(names)}: {text}\n" for text, names in notes.items()]


def fid_against_dice(rows, out) -> list[str]:
    """B.2: does a better FID segment better? A line a run over its checkpoints."""
    dice = defaultdict(float)
    for row in matching(rows["segment"], {"model": "this run", "by": "oracle", "maps": "all maps",
                                          "set": "combined", "stage": "coarse"}):
        key = row["run"], row["step"]  # the coarse sweep is the same for all checkpoints
        dice[key] = max(dice[key], row["dice"])
    found = [row | {"best_dice": dice[row["run"], row["step"]]}
             for row in matching(rows["fid"], {"kind": "reconstruction"})
             if (row["run"], row["step"]) in dice]
    return [chart(out / f"fid-dice-{k}.png", part, "{run}", "fid", "best_dice",
                  f"Dice against FID over checkpoints (B.2), {part[0]['protocol']}",
                  ("FID", "best Dice, %"), is_even=False)
            for k, part in enumerate(by_protocol(found)[0]) if len(part) > 1]


def convert(s: Convert) -> None:
    """A pickled DenseNet -> safetensors, without running it."""
    DenseNet.from_pretrained(s.source).save_pretrained(s.out)
    print(f"-> {s.out}/model.safetensors; use it with --xrv {s.out}")


def main(argv=None) -> None:
    commands = {name: (functools.partial(defaults_for, kind), function)
                for name, (kind, function, _) in COMMANDS.items()}
    data.command_line(__doc__, {"": (Everything(), evaluate_all), **commands,
                                "report": (Report(), write_report),
                                "convert": (Convert(), convert)}, argv)


if __name__ == "__main__":
    main()
