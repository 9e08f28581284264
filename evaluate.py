"""The paper's four measurements (2.4): each writes rows to RUN/eval/NAME.json, NAME.md and charts.

    python evaluate.py                          all four on the newest run, eval/report.md
    python evaluate.py fid --checkpoints all    Figure 3 and best.json
    python evaluate.py classify --data cxr/     Table 1, Figure 4, label fidelity
    python evaluate.py segment --data lungs/    Table 2, Figures 5 and 9-12
    python evaluate.py audit                    copies, obedience, Figure 8
    python evaluate.py report --run-dir runs/v1 runs/v2    tables and figures of several runs
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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset

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
    labels: str = ""  # CSV of the data's labels; empty: the one beside the data
    train_data: str = ""  # the generator's training images; empty: those its config.json names
    seed: int = 0  # of all random numbers
    device: str = "auto"  # auto | cpu | cuda
    offline: bool = False  # never ask the hub, use its cache alone
    out: str = ""  # folder of the results; empty: RUN/eval


@dataclass(frozen=True)
class Labelled(Common):
    """Settings of the commands that need labelled images in two parts."""

    findings: tuple[str, ...] = ()  # these alone; empty: all that are not rarer than --prevalence
    prevalence: float = 0.04  # smallest share of images that have a finding (paper: 4 %)
    held_out: float = 0.375  # share of the images, by patient, to test on; MIMIC-CXR: p19
    steps: int = 50  # DDIM steps of a synthetic image
    micro_batch: int = 32  # images of one rank in one pass
    as_paper: bool = False  # let a leak between the parts pass, and mark the results


@dataclass(frozen=True)
class Featured(Labelled):
    """Settings of the commands that compare images by the features of a network."""

    protocol: str = "auto"  # features: xrv-224 | local | dino; auto: the first available
    xrv: str = XRV  # torchxrayvision's DenseNet: hub id, folder, .safetensors or the public .pt


@dataclass(frozen=True)
class Fid(Featured):
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
    size: int = 224  # pixels of the input. CHOICE: torchxrayvision's; the paper names none
    workers: int = 0  # trainings at once on this rank; 0: one per core on a CPU, one on a GPU
    net: tuple = field(default=(32, (6, 12, 24, 16), 64), metadata={"flag": False})  # DenseNet-121

    @property
    def recipe(self) -> list:
        """All of these on which a trained net depends."""
        names = "epochs batch lr weight_decay patience early_stop size net folds seed"
        return [getattr(self, name) for name in names.split()]


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
class Audit(Featured):
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


WORDS = {"checkpoints": ("one", "all"), "candidates": ("parts", "segments"),
         "strategies": ("reconstruct", "interpolate"),
         "protocol": ("auto", "xrv-224", "local", "dino")}
# The smallest values of numbers, where they are not 1.
LEAST = {"folds": 2, "batch": 2, "size": 32, "thresholds": 1e-6} | dict.fromkeys(
    "seed prevalence held_out count lr weight_decay patience workers last timesteps".split(), 0)


def check_settings(s) -> None:
    """UserError where one of a command's settings is out of range, or a list has a value twice."""
    for name, value in vars(s).items():
        values = value if type(value) is tuple else (value,)
        numbers = [v for v in values if type(v) in (int, float)]
        low = LEAST.get(name, 1)
        high = 999 if name == "timesteps" else math.inf
        expected = f"numbers from {low}" + f" to {high}" * (high < math.inf)
        is_sound = all(low <= v <= high for v in numbers)
        if name in WORDS:
            expected = " or ".join(WORDS[name])
            is_sound = set(values) <= set(WORDS[name])
        if not is_sound or len(set(values)) < len(values):
            raise UserError(f"found --{name.replace('_', '-')} {' '.join(map(str, values))}, "
                            f"expected {expected}{', none twice' * (len(values) > 1)}")


def defaults_for(kind, argv):
    """Settings of a command before its flags: TINY's where argv's run (or the newest) is tiny."""
    named = re.search(r"(?:^|\0)--run-dir[=\0]([^\0]+)", "\0".join(argv))
    try:
        folder = Path(named[1]) if named else dinodiff.newest_run()
        is_tiny = data.read_json(folder / "config.json").get("preset") == "tiny"
    except (UserError, OSError):
        is_tiny = True  # the command itself will say that there is no such run
    return TINY[kind] if is_tiny else kind()


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
    own = parts[rank::world]
    bar = data.progress(own, desc, unit=" batches") if desc else own  # else `compute` has a bar
    mine = [np.asarray(compute(part)) for part in bar]
    shares = [mine] * world
    if world > 1:
        dist.all_gather_object(shares, mine)
    found = [shares[k % world][k // world] for k in range(len(parts))]
    return np.concatenate(found) if found else np.empty(0)


def vectors(vector, pictures, ids, batch=256) -> Tensor:
    """vector(images) of pictures(ids), (n, d), by all ranks."""
    found = on_all_ranks(ids, batch, lambda some: vector(pictures(some)), "features")
    return torch.from_numpy(found)


def cached(m, name, depends_on, compute):
    """What compute() returns (JSON), kept in m.out/cache under the digest of all it depends on.

    All ranks call it, and compute, together.
    """
    path = m.out / "cache" / f"{name}-{m.key(*depends_on)}.json"
    found = on_rank_0(lambda: data.read_json(path) if path.is_file() else {})
    if "value" not in found:
        found = {"value": compute()}
        on_rank_0(lambda: data.write_json(path, found))
    return found["value"]


def seed_of(*values) -> int:
    """The seed of a synthetic image, 60 bits of what it is: the command's seed, its sources, …"""
    return int(data.digest(*values) + data.digest(values)[:5], 16)


def weights_digest(*nets) -> str:
    """A hash of the bytes of all weights. TRAP: a float sum of them depends on the threads."""
    found = hashlib.blake2b(digest_size=8)
    for net in nets:
        for tensor in net.state_dict().values():
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
    checkpoints: list  # steps of the run's checkpoints, as rank 0 found them
    out: Path
    notes: list  # what a reader of the results must know
    train: data.XRays | None  # what the generator was trained on, where it is in reach
    ds: data.XRays  # what it is measured on
    pool: np.ndarray = None  # indices that may train a classifier
    test: np.ndarray = None  # indices held out, of other patients; or those with masks
    names: list = ()  # findings; or an array, the set of each image with masks
    targets: np.ndarray = None  # float32 (len(ds), findings)
    patients: np.ndarray = None  # of each image; one of its own where the patient is unknown

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


def choose_step(s):
    """-> run folder, steps of its checkpoints, and the one of --step; best: that of best.json."""
    folder = Path(s.run_dir or dinodiff.newest_run()).absolute()  # "." has no name
    steps = dinodiff.checkpoint_steps(folder)
    step = s.step or ("best" if (folder / "best.json").is_file() else "newest")
    if step == "newest":
        step = max(steps, default=step)
    elif step == "best":
        step = dinodiff.best_step(folder) or step
    return folder, steps, step


def open_measurement(s, phantom_seed, count) -> Measurement:
    """The run at --step, its training images, and the images to measure on.

    phantom_seed, count: of unseen phantoms, where there is no --data. A run folder may be a
    stranger's: what it says is data.
    """
    check_settings(s)
    dinodiff.start_ranks(dinodiff.pick_device(s.device))
    # For all ranks: another rank may look before a checkpoint or best.json is written, or after.
    folder, steps, step = on_rank_0(lambda: choose_step(s))
    run = open_run(folder, step, s.device)
    notes = []
    if s.step in ("", "best") and (folder / "best.json").is_file():
        notes.append("The step is that of the best FID (best.json); if that was measured on these "
                     "images, they chose it.")
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
    ds = data.open_data(spec, run.size, run.config["seed"] + phantom_seed,
                        count if spec == "phantom" else None, s.labels or None)
    return Measurement(run, steps, Path(s.out or folder / "eval"), notes, train, ds)


def open_labelled(s) -> Measurement:
    """Run, images, split, findings; UserError where training and test share patients or files."""
    m = open_measurement(s, 1, 1024)
    patients = list(m.ds.patients)
    known = [patient for patient in patients if patient]
    m.patients = np.array([who or f"image {i}" for i, who in enumerate(patients)])
    m.pool, m.test = data.split_by_patient(patients, s.held_out, s.seed)
    if known and all(re.fullmatch(r"p?1\d{7}", patient) for patient in known):  # MIMIC-CXR
        is_test = np.array([data.is_mimic_test(patient) for patient in patients])
        m.pool, m.test = np.flatnonzero(~is_test), np.flatnonzero(is_test)
        m.notes.append(f"MIMIC-CXR's own parts: {len(m.test):,} images of p19 test, the other "
                       f"{len(m.pool):,} may train a classifier.")
    if len(known) < len(patients):
        m.notes.append(f"The patient of {len(patients) - len(known):,} of {len(patients):,} images "
                       "is unknown: each counts as one of its own, who may be on both sides.")
    for part, rows in (("train", m.pool), ("test", m.test)):
        check_patients(m, rows, f"to {part} (see --held-out)")
    [(key, times)] = Counter(m.ds.keys).most_common(1)
    if times > 1:  # seeds and synthetic images go by it
        raise UserError(f"{m.ds.name}: found {times} images of the name {key}, expected a name for "
                        "each: measure such sets apart, or prepare them under other names")
    counts = Counter(itertools.chain(*m.ds.labels))
    common = [name for name in sorted(counts.keys() - data.NO_DIAGNOSES)
              if counts[name] >= s.prevalence * len(m.ds)]
    m.names = list(s.findings) or common
    missing = sorted(set(m.names) - set(counts))
    if missing:
        raise UserError(f"{m.ds.name}: no image has {', '.join(missing)}; expected --findings "
                        f"among {', '.join(sorted(counts)) or 'none: there are no labels'}")
    m.targets = np.zeros((len(m.ds), len(m.names)), np.float32)
    for k, name in enumerate(m.names):
        m.targets[:, k] = [name in row for row in m.ds.labels]
        if len(np.unique(m.targets[m.test, k])) < 2:
            m.notes.append(f"All or none of the test images have {name}: the macro AUC leaves it "
                           "out.")
    check_leak(s, m, "the generator was trained on images or patients of the test part",
               seen_in_training(m))
    return m


def check_patients(m, rows, purpose) -> None:
    """UserError below three patients: errors come from leaving out one of them."""
    found = len(set(m.patients[rows]))
    if found < 3:
        raise UserError(f"{m.ds.name}: {len(m.ds)} images leave {len(rows)} of {found} patients "
                        f"{purpose}, expected 3 patients or more")


def seen_in_training(m) -> list[str]:
    """Images and patients of the test part that the generator was trained on, by their names."""
    if m.train is None or m.ds.seed != m.train.seed:
        return []  # phantoms of another seed, or phantoms and real people

    seen = []
    for what, column in (("image", "keys"), ("patient", "patients")):
        trained = set(zip(m.train.providers, getattr(m.train, column)))
        tested = {(m.ds.providers[i], getattr(m.ds, column)[i]) for i in m.test}
        seen += [f"{who}, {what} {name}" for who, name in sorted(trained & tested) if name]
    return seen


def check_leak(s, m, what, shared) -> None:
    """Stop where two sides of a split share something; with --as-paper mark the results instead."""
    if not shared:
        return
    found = f"{what} ({len(shared)}: {', '.join(shared[:5])}{' …' * (len(shared) > 5)})"
    if not s.as_paper:
        raise UserError(f"found a leak: {found}. These numbers would be too good. Expected two "
                        "sides that share nobody: give other --data, or --as-paper to mark the "
                        "results and go on")
    m.notes.append(f"MARKED (--as-paper): {found}. These numbers flatter.")


def matching(rows, wanted) -> list[dict]:
    return [row for row in rows if wanted.items() <= row.items()]


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


def finish(m, name, rows, **common) -> None:
    """Write NAME.json and NAME.md, with pictures, notes and the command that was given.

    common: fields that all rows share, beside the run's name.
    """
    if ranks()[0] == 0:
        rows = [{"run": m.run.folder.name} | common | row for row in rows]
        command = shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
        text = "\n".join([*COMMANDS[name][2](rows, m.out),
                          *[f"![{title}]({file})\n" for file, title in PICTURES[name].items()],
                          *[f"> {note}\n" for note in dict.fromkeys(m.notes)],
                          f"Made by `{command}`.", ""])
        data.write_json(m.out / f"{name}.json", rows)
        data.write_file(m.out / f"{name}.md", text)
        print(f"\n{text}\n-> {m.out / name}.md, .json", flush=True)


# ---- Charts, with Pillow alone -----------------------------------------------------------------

COLOURS = ("#2c6fbb", "#d9742b", "#3a923a", "#8458a8", "#b8352f", "#7a5a43", "#d05aa6", "#4f5b62")
INK = "#222222"


def round_ticks(low, high) -> list[float]:
    """Two to seven round numbers that cover [low, high]."""
    span = (high - low) or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span / 2))  # the span holds 2 to 20 of these
    step *= 1 if span < 5 * step else 2 if span < 10 * step else 5
    first = math.floor(low / step)
    last = max(math.ceil(high / step), first + 1)
    return [k * step for k in range(first, last + 1)]


def chart(path, rows, name, x, y, title, labels, is_bars=False) -> str:
    """Lines, or grouped bars, of rows -> the Markdown that shows the picture.

    name: format of a row's fields, a line or colour each; x, y: fields, x spaced evenly. Fields
    y_low and y_high end the error bar; bars have a `mark` above it.
    """
    image = Image.new("RGB", (1800, 1040), "white")  # reduced to half at the end
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(26)
    slots = sorted({row[x] for row in rows})
    names = list(dict.fromkeys(map(name.format_map, rows)))
    zero = [0.0] * is_bars
    ticks = round_ticks(min([row[f"{y}_low"] for row in rows] + zero),
                        max([row[f"{y}_high"] for row in rows] + zero))
    left, right, top, bottom = 170, 1760, 130 + 40 * -(-len(names) // 3), 910
    slot = (right - left) / len(slots)
    pitch = 0.75 * slot / len(names) if is_bars else 6  # from a bar, or line, to the next
    half, rim = (0.45 * pitch, 0) if is_bars else (7, 4)  # of a bar, or of the mark of a value

    def up(v):
        return bottom - (v - ticks[0]) / (ticks[-1] - ticks[0]) * (bottom - top)

    draw.text((900, 20), title, INK, font, "ma")
    draw.text((900, 990), labels[0], INK, font, "ma")
    draw.text((20, top - 45), labels[1], INK, font)
    for v in ticks:
        draw.line([(left, up(v)), (right, up(v))], "#dddddd", 2)
        draw.text((left - 15, up(v)), f"{v:,.6g}", INK, font, "rm")
    for k in range(0, len(slots), -(-len(slots) // 12)):
        draw.text((left + (k + 0.5) * slot, bottom + 15), f"{slots[k]:,.6g}", INK, font, "ma")
    for k, one in enumerate(names):
        colour = COLOURS[k % len(COLOURS)]
        draw.text((left + k % 3 * 540, 80 + k // 3 * 40), one, colour, font)
        middle = left + slot / 2 + (k - (len(names) - 1) / 2) * pitch  # of its first bar
        part = sorted((row for row in rows if name.format_map(row) == one), key=lambda row: row[x])
        spots = [(middle + slots.index(row[x]) * slot, up(row[y])) for row in part]
        if not is_bars:
            draw.line(spots, colour, 5)
        for (px, py), row in zip(spots, part):
            base = up(0) if is_bars else py
            draw.rectangle([px - half, min(py, base) - rim, px + half, max(py, base) + rim], colour)
            high = up(row[f"{y}_high"])
            draw.line([(px, up(row[f"{y}_low"])), (px, high)], INK if is_bars else colour, 3)
            draw.text((px, min(high, base)), row.get("mark", ""), INK, font, "md")
    draw.line([(left, top), (left, bottom), (right, bottom)], INK, 3)
    data.save_png(path, image.resize((900, 520), Image.Resampling.LANCZOS))
    return f"![{title}]({Path(path).name})\n"


# ---- DenseNet (Huang et al. 2017; torchvision's and torchxrayvision's key names) ---------------


class DenseLayer(nn.Sequential):
    """`growth` new channels from all that came before, which stay."""

    def __init__(self, channels: int, growth: int):
        super().__init__(OrderedDict(
            norm1=nn.BatchNorm2d(channels), relu1=nn.ReLU(),
            conv1=nn.Conv2d(channels, 4 * growth, 1, bias=False),
            norm2=nn.BatchNorm2d(4 * growth), relu2=nn.ReLU(),
            conv2=nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, super().forward(x)], 1)


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
                self.features.add_module(f"transition{i}", nn.Sequential(OrderedDict(
                    norm=nn.BatchNorm2d(width), relu=nn.ReLU(),
                    conv=nn.Conv2d(width, width // 2, 1, bias=False), pool=nn.AvgPool2d(2))))
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
        """DenseNet-121 of a folder, a `.safetensors`, a pickled `.pt` (never run) or the hub."""
        path = Path(source).expanduser()
        if str(source) == XRV and not path.exists():  # a pickled module
            path = data.hub_files(XRV, ["model.pt"], revision)[0]
        if (path / "model.pt").is_file():
            path /= "model.pt"
        if path.suffix in (".pt", ".pth", ".bin") and path.is_file():
            state = read_pickled_tensors(path)
        else:
            state = data.read_weights(source, subfolder, revision)[1]
        state.pop("op_threshs", None)  # operating points that torchxrayvision's modules carry
        if "features.conv0.weight" not in state or "classifier.weight" not in state:
            raise UserError(f"{source}: found keys {sorted(state)[:4]} …, expected a DenseNet's, "
                            "such as features.conv0.weight")
        model = cls(len(state["classifier.weight"]), state["features.conv0.weight"].shape[1])
        return data.load_weights(model, state, source)

    def save_pretrained(self, folder) -> None:
        data.write_weights(folder, {}, self.state_dict(), "model.safetensors")


# ---- A pickled module's tensors, without running it --------------------------------------------


class Inert(nn.Module):
    """Stands in for every class and function that a pickle names: a module without any code."""

    def __init__(self, *args, **named):
        super().__init__()

    def __setstate__(self, state):
        if type(state) is dict:
            super().__setstate__(state)

    def ignore(self, *args):
        pass

    append = extend = add = __setitem__ = ignore


class TensorsOnly(pickle.Unpickler):
    """Builds tensors, dicts, sets and plain values; all else that a pickle names is Inert."""

    def find_class(self, module, name):  # torch.load itself answers for the names of storages
        if name in ("OrderedDict", "set") and module in ("collections", "builtins", "__builtin__"):
            return {"OrderedDict": OrderedDict, "set": set}[name]
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
            return getattr(torch._utils, name)
        return type(name, (Inert,), {})


def read_pickled_tensors(path) -> dict[str, Tensor]:
    """What torch.save made of a module or a state dict, zip or older format -> state dict.

    No code in it runs. Raises UserError where the file is damaged or holds no tensors.
    """
    content = Path(path).read_bytes()
    reader = SimpleNamespace(__name__="inert", Unpickler=TensorsOnly,
                             load=lambda file, **options: TensorsOnly(file, **options).load())
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
        if isinstance(found, Inert):
            found = found.state_dict()
        found = found.get("state_dict", found)
        state = {name: tensor for name, tensor in found.items() if torch.is_tensor(tensor)}
    except UserError:
        raise
    except Exception as error:  # a damaged file can raise anything
        raise UserError(f"{path} is damaged or no file of torch.save "
                        f"({type(error).__name__}: {error})") from None
    if not state:
        raise UserError(f"{path} holds no tensors; expected what torch.save makes of a module")
    return state


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
    for name in names:
        try:
            embed, net = kinds[name](m, s)
        except UserError as error:
            failed.append(f"{name}: {error}")
            continue
        if failed:
            note(m.notes, f"Features: {name}, whose distances do not compare with the paper's "
                 f"({'; '.join(failed)})")
        return name, embed, net
    raise UserError("; ".join(failed))


def xrv_features(m, s):
    """The paper's: torchxrayvision's DenseNet at 224 px; the public one from the hub's cache."""
    from huggingface_hub import try_to_load_from_cache
    if s.xrv == XRV and not isinstance(try_to_load_from_cache(XRV, "model.pt"), str):
        raise UserError(f"{XRV} is not in the hub's cache; get it by `hf download {XRV} model.pt`, "
                        "or name a file of it by --xrv")
    # TRAP: torchxrayvision's pixels are in [-1024, 1024], not [-1, 1].
    return embedding(DenseNet.from_pretrained(s.xrv), 224, 1024.0, m.run.device)


def local_features(m, s):
    """A DenseNet trained on the pool's labels, once a machine: all runs are measured with one."""
    if not m.names:
        raise UserError("there are no labels to train on")
    recipe = defaults_for(Classify, ["--run-dir", str(m.run.folder)])
    recipe = dataclasses.replace(recipe, size=min(recipe.size, m.run.size), epochs=16)
    pool = m.pool[:5000]
    key = m.key(m.names, pool.tolist(), s.seed, dataclasses.astuple(recipe))
    place = data.cache_folder() / "features" / key
    halves = data.split_by_patient([m.ds.patients[i] for i in pool], 0.2, s.seed)
    parts = [real_pictures(m, pool[half], recipe.size) for half in halves]

    def train_once():
        with data.locked(place):
            if not (place / "model.safetensors").is_file():
                net, _ = fit(recipe, *parts, s.seed, m.run.device)
                with data.whole(place) as partial:
                    net.save_pretrained(partial)

    on_rank_0(train_once)
    net = DenseNet(len(m.names), 1, *recipe.net)
    data.load_weights(net, data.read_weights(place)[1], place)
    return embedding(net, recipe.size, 1.0, m.run.device)


def dino_features(m, s):
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
    # Without gaps, which patients of many images leave: two sets then have blocks in common.
    return np.unique(block, return_inverse=True)[1][group]


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
    g = 1 + min(first.max(), second.max())
    if g < 2:
        return math.nan
    values = [frechet(f1[first != k], f2[second != k]) for k in range(g)]
    return float((g - 1) / math.sqrt(g) * np.std(values, ddof=1))


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
    bar = 0 if math.isnan(error) else 1.96 * error
    kid, kid_error = kernel_distance(real, fake, True, not isinstance(groups, tuple))
    return {"fid": fid, "fid_error": error, "fid_low": fid - bar, "fid_high": fid + bar,
            "kid": 1000 * kid, "kid_error": 1000 * kid_error,
            **prdc(real, fake, min(5, len(real) - 1, len(fake) - 1))}


@torch.no_grad()
def fid(s: Fid) -> None:
    """Reconstruct each real test image once, compare the sets; two floors; Figure 3, best.json."""
    if s.checkpoints == "all":  # the same rows whether or not best.json has been written
        s = dataclasses.replace(s, step=s.step or "newest")
    m = open_labelled(s)
    name, embed, net = open_features(m, s)
    test, others = [rows[np.argsort(data.hash64(s.seed, 3, rows))][:s.count]
                    for rows in (m.test, m.pool)]
    others = others[:len(test)]
    for rows in (test, others):
        check_patients(m, rows, "to compare (see --count)")
    protocol = (f"{name}, {len(test)} images of {m.ds.name}, {m.run.size} px, {s.steps} DDIM "
                "steps")
    key = [weights_digest(net), test.tolist(), others.tolist()]

    def row(kind, step, rows, pictures, *depends_on):
        groups = m.patients[test] if rows is test else (m.patients[test], m.patients[rows])

        def compute():
            real = vectors(embed, m.ds.read, test, s.micro_batch)
            fake = vectors(embed, pictures, rows, s.micro_batch)
            return on_rank_0(lambda: distances(real, fake, groups))  # the algebra once

        return {"kind": kind, "step": step, "images": len(rows)} | cached(
            m, "fid", [key, kind, *depends_on], compute)

    def round_trip(rows):
        return dinodiff.decode_latents(m.run, dinodiff.encode_latents(m.run, m.ds.read(rows)))

    rows = [row("real against real", m.run.step, others, m.ds.read),
            row("VAE round trip", m.run.step, test, round_trip, weights_digest(m.run.vae))]
    for step in m.checkpoints if s.checkpoints == "all" else [m.run.step]:
        run = m.run if step == m.run.step else open_run(m.run.folder, step, s.device)
        work = functools.partial(reconstruct, m.ds, s, run)
        rows.append(row("reconstruction", step, test, work, name_of(run), s.steps, s.seed))
    if s.checkpoints == "all" and ranks()[0] == 0:
        best = min(rows[2:], key=lambda row: row["fid"])
        data.write_json(m.run.folder / "best.json", {
            "step": best["step"], "fid": best["fid"], "protocol": name, "images": len(test),
            "steps": {row["step"]: row["fid"] for row in rows[2:]}})
    finish(m, "fid", rows, protocol=protocol)


def reconstruct(ds, s, run, rows, variant=0) -> Tensor:
    """A reconstruction of each of ds[rows] -> uint8 (n, S, S)."""
    seeds = [seed_of(s.seed, variant, ds.keys[i]) for i in rows]
    return generate(run, encode_tokens(run, ds.read(rows)), seeds, s.steps)


def fid_section(rows, out, k=0) -> list[str]:
    """Table and Figure 3 of FID rows of one run or several."""
    title = f"FID ({rows[0]['protocol']})"
    lines = [f"## {title} and checkpoints (2.4, Figure 3)", "", *table(rows, {
        "run": "{run}", "step": "{step:,}", "images": "{images:,}, {kind}",
        "FID ± SE": "{fid:.3f} ± {fid_error:.3f}",
        "KID x 1000 ± SE": "{kid:.2f} ± {kid_error:.2f}", "precision": "{precision:.3f}",
        "recall": "{recall:.3f}", "density": "{density:.3f}", "coverage": "{coverage:.3f}"}),
        "SE: standard error, FID's by a jackknife over patients. Where images are fewer than "
        "features FID is biased upwards: trust KID there.\n"]
    if title.startswith("FID (xrv-224"):
        lines.append("The paper: 4.7 (DiNOv1, step 80,000), 6.4 (DiNOv2, step 120,000) on 5,000 "
                     "images of MIMIC-CXR p19.\n")
    curve = matching(rows, {"kind": "reconstruction"})
    return lines + [chart(out / f"figure3-{k}.png", curve, "{run}", "step", "fid", title,
                          ("step", "FID"))]


# ---- Training a classifier (paper 2.5) ---------------------------------------------------------


# On a CPU an image is decoded once, where there is room; reading processes do it each epoch.
@functools.lru_cache(maxsize=10_000)
def picture(ds, row, size):
    return torch.from_numpy(data.resize(ds[row], size))


@dataclass
class Pictures(Dataset):
    """Images of one set with targets -> (uint8 (size, size), float32 (L,))."""

    ds: data.XRays
    rows: np.ndarray
    targets: np.ndarray
    size: int

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return picture(self.ds, self.rows[i], self.size), self.targets[i]


def real_pictures(m, rows, size) -> Pictures:
    return Pictures(m.ds, rows, m.targets[rows], size)


def label_aucs(targets, scores) -> np.ndarray:
    """Area under the ROC curve of each label, (n, L) each -> (L,).

    NaN where all have one class, or a score is not finite.
    """
    from sklearn.metrics import roc_auc_score
    aucs = np.full(targets.shape[1], math.nan)
    for k, (y, score) in enumerate(zip(np.asarray(targets).T, np.asarray(scores).T)):
        if len(np.unique(y)) > 1 and np.isfinite(score).all():
            aucs[k] = roc_auc_score(y > 0.5, score)
    return aucs


fit_shared_memory = functools.cache(data.fit_shared_memory)  # which says it once


def batches(pictures, places, device) -> DataLoader:
    """Batches of pictures[place] for each array of places; for a GPU processes read them."""
    workers = 0
    if device.type == "cuda":
        size = sum(part.nbytes for part in pictures[0])
        workers = fit_shared_memory(min(len(places), 8), size * len(places[0]))
    return DataLoader(pictures, batch_sampler=[place.tolist() for place in places],
                      num_workers=workers)


@torch.no_grad()
def macro_auc(net, pictures, size, device) -> float:
    """Mean AUC of the labels that have both classes among these pictures, or NaN."""
    net.eval()
    found = [(net(to_pixels(images, size, 1.0, device)).float().cpu(), targets)
             for images, targets in batches(pictures, chunks(np.arange(len(pictures)), 256),
                                            device)]
    logits, targets = map(torch.cat, zip(*found))
    aucs = label_aucs(targets, logits)
    aucs = aucs[np.isfinite(aucs)]
    return float(aucs.mean()) if len(aucs) else math.nan


class Untrainable(UserError):
    """A training set from which nothing can be learned; no trouble with reading it."""


@torch.enable_grad()  # whatever the caller does
def fit(s: Classify, train, val, seed, device):
    """The paper's recipe: AdamW, lr / 10 on a plateau of the validation AUC, early stopping.

    train, val: sequences of (uint8 (S, S), float32 (L,)). -> the best epoch's net, its history.
    Raises Untrainable.
    """
    if min(len(train), len(val)) < 2:
        raise Untrainable(f"{len(train)} images to train on and {len(val)} to validate on, "
                          "expected at least 2 of each; take more images, of more patients")
    torch.manual_seed(seed)
    net = DenseNet(len(val[0][1]), 1, *s.net).to(device, memory_format=torch.channels_last)
    if device.type == "cuda":
        net.compile()
    optimizer = torch.optim.AdamW(net.parameters(), s.lr, weight_decay=s.weight_decay, fused=True)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", 0.1, s.patience)
    # Near-equal batches: none of one image, which batch norm could not take.
    places = np.array_split(np.arange(len(train)), -(-len(train) // s.batch))
    best = {"val": -1.0, "best_epoch": 0}
    for epoch in range(s.epochs):
        net.train()
        order = np.random.default_rng((seed, epoch)).permutation(len(train))
        loader = batches(train, [order[place] for place in places], device)
        for place, (images, targets) in zip(places, loader):
            # Each showing has a number of its own, so each is augmented otherwise.
            x = data.augment(images.to(device), epoch * len(train) + place, 0, seed)
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
        elif epoch + 1 - best["best_epoch"] >= s.early_stop:
            break
    if best["val"] < 0:
        raise Untrainable("the validation AUC was never a number: if each finding is in all or in "
                          f"none of the {len(val)} validation images (one class only), take more "
                          f"images or fewer folds; else lower --lr (now {s.lr:g})")
    net.load_state_dict(kept)
    return net.eval(), best | {"epochs": epoch + 1, "train": len(train)}


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
    sources = np.array(m.ds.keys)[subset[made.ends]].tolist()
    made.seeds = [f"{seed_of(s.seed, *image):015x}" for image in zip(
        sources, made.r.tolist(), made.variant.tolist())]
    nearer = subset[made.nearer]

    def make(rows):
        samples = []
        for some in chunks(rows, s.micro_batch):
            first, second = [encode_tokens(m.run, m.ds.read(ends))
                             for ends in subset[made.ends[some]].T]
            c = torch.lerp(first, second, torch.from_numpy(made.r[some]).to(first)[:, None, None])
            seeds = [int(made.seeds[k], 16) for k in some]
            images = generate(m.run, c, seeds, s.steps).numpy()
            for k, image, seed in zip(some, images, seeds):
                how = {"seed": seed, "step": m.run.step, "steps": s.steps, "r": made.r[k],
                       "sources": sources[k]}  # all that makes this image again, alone
                samples.append(data.Sample(made.seeds[k], image, m.ds.patients[nearer[k]],
                                           "synthetic", m.ds.labels[nearer[k]], extra=how))
        data.write_shard(folder / f"{data.digest([x.key for x in samples])}.tar", samples)
        return rows

    def missing():
        there = set()
        if any(folder.glob("*.tar")):
            there.update(data.open_data(str(folder), m.run.size).keys)
        return [k for k, name in enumerate(made.seeds) if name not in there]

    on_all_ranks(on_rank_0(missing), 500, make, "synthetic images, 500 a batch")


def classify(s: Classify) -> None:
    """Table 1 and Figure 4: real, augmented and synthetic training sets, and label fidelity."""
    m = open_labelled(s)
    s = dataclasses.replace(s, size=min(s.size, m.run.size))
    labels = [tuple(itertools.compress(m.names, row)) for row in m.targets]
    picks = data.balanced_subsets([labels[i] for i in m.pool], s.sizes, s.seed)
    subset = m.pool[picks[max(picks)]]  # the subset of a smaller N is its beginning
    folder = m.out / "synthetic" / m.key(name_of(m.run), s.steps)
    folds = {}
    made = {}
    for n in picks:
        folds[n] = data.folds_by_patient([m.ds.patients[i] for i in subset[:n]],
                                         [labels[i] for i in subset[:n]], s.folds, s.seed)
        for strategy in s.strategies:
            made[strategy, n] = reconstructions(n, max(s.ratios))
            if strategy == "interpolate":
                made[strategy, n] = interpolations(m.targets[subset[:n]], folds[n], max(s.ratios),
                                                   s.seed)
            synthesise(m, s, subset, made[strategy, n], folder)
    ds = data.open_data(str(folder), m.run.size)
    place = {key: i for i, key in enumerate(ds.keys)}
    for pairs in made.values():
        rows = [place[name] for name in pairs.seeds]
        pairs.pictures = Pictures(ds, rows, m.targets[subset[pairs.nearer]], s.size)
    kinds = [("real", "only", 0),
             *itertools.product(("augment", "synthetic"), s.strategies, s.ratios)]
    # Fold by fold, so that ranks get alike shares.
    cells = [dict(zip(("N", "experiment", "strategy", "ratio", "fold"), (n, *kind, k)))
             for k, n, kind in itertools.product(range(s.folds), picks, kinds)]
    jobs = [plan_fold(m, s, cell, subset, folds, made, folder.name) for cell in cells]
    results = on_all_ranks(jobs, len(jobs), functools.partial(train_all, s, m))
    recipe = m.key(m.pool.tolist(), m.test.tolist(), s.recipe)
    protocol = (f"{', '.join(m.names)}, {len(m.test)} test images of {m.ds.name}, {m.run.size} px; "
                f"{s.folds} folds, {s.epochs} epochs at {s.size} px, lr {s.lr:g}, {s.steps} DDIM "
                f"steps, recipe {recipe[:6]}")
    rows = [cell | result for cell, result in zip(cells, results)]
    finish(m, "classify", rows, step=m.run.step, protocol=protocol)


def plan_fold(m, s, cell, subset, folds, made, generator) -> tuple:
    """What train_fold takes for a cell of Table 1; the result is kept by what it depends on."""
    n, k, ratio = cell["N"], cell["fold"], cell["ratio"]
    rows = np.setdiff1d(np.arange(n), folds[n][k])
    places = {"train": subset[rows], "val": subset[folds[n][k]], "test": m.test}
    parts = {name: real_pictures(m, place, s.size) for name, place in places.items()}
    depends_on = [m.names, subset[:n].tolist(), m.test.tolist(), cell, s.recipe]
    if ratio:  # the first images inside, so 1:50 contains 1:10
        pairs = made[cell["strategy"], n]
        extra = Subset(pairs.pictures, pairs.inside(rows)[:ratio * len(rows)])
        is_alone = cell["experiment"] == "synthetic"
        parts["train"] = extra if is_alone else ConcatDataset([parts["train"], extra])
        depends_on += [generator]
    elif n == max(folds):
        for strategy in s.strategies:
            parts |= fidelity_sets(strategy, made[strategy, n], folds[n][k])
        depends_on += [generator, s.strategies, max(s.ratios)]
    path = m.out / "cache" / f"fold-{m.key(*depends_on)}.json"
    return s, parts, seed_of(s.seed, n, k) % 2**31, m.run.device, path


def fidelity_sets(strategy, pairs, val) -> dict[str, Subset]:
    """Synthetic images whose sources the classifier has not seen, by min(r, 1 - r)."""
    rows = pairs.inside(val)[:2000]
    parts = {"": rows}
    if strategy == "interpolate":
        is_far = np.minimum(pairs.r, 1 - pairs.r)[rows] > 0.25
        parts = {", r up to 1/4 from the labelled end": rows[~is_far],
                 ", r beyond 1/4": rows[is_far]}
    return {f"fidelity: {strategy}{name}": Subset(pairs.pictures, part)
            for name, part in parts.items() if len(part)}


def train_fold(s, parts, seed, device, path) -> dict:
    """Train and score, once -> history and AUCs, or {"error": why nothing can be learned}."""
    if path.is_file():
        return data.read_json(path)
    try:
        net, found = fit(s, parts.pop("train"), parts.pop("val"), seed, device)
    except Untrainable as error:
        return {"error": str(error)}
    for name, part in parts.items():
        auc = macro_auc(net, part, s.size, device)
        if math.isfinite(auc):  # NaN is no JSON
            found[name] = auc
    data.write_json(path, found)
    return found


def train_all(s, m, jobs) -> list[dict]:
    """The results of some trainings; on a CPU in one process a core, each of one thread."""
    share = data.cores() // ranks()[1] if m.run.device.type == "cpu" else 1
    # TRAP: not by fork: a forked child would wait for the parent's threads.
    return data.run_jobs(train_fold, jobs, "training classifiers", s.workers or max(share, 1),
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


def summarise(rows) -> list[dict]:
    """Rows of folds, of one run or several -> a row a cell: mean, SD, stars, gain in % over real.

    The real-only baseline of an N is the first run's; of the ratios the best is bold.
    """
    fields = ("N", "run", "experiment", "strategy", "ratio")
    aucs = defaultdict(dict)
    for row in rows:
        named = row if row["ratio"] else row | {"run": ""}
        aucs[tuple(map(named.get, fields))].setdefault(row["fold"], row.get("test", math.nan))
    found = []
    for cell, folds in aucs.items():
        base = aucs[cell[0], "", "real", "only", 0]
        both = np.array([(auc, base[k]) for k, auc in folds.items()]).T
        both = both[:, np.isfinite(both).all(0)]
        if both.shape[1] < 2:
            continue
        mean, real = both.mean(1)
        sd = both[0].std(ddof=1)
        p, corrected = paired_tests(*both, 1 / (len(folds) - 1))
        low, gain, high = [100 * (auc / real - 1) for auc in (mean - sd, mean, mean + sd)]
        found.append(dict(zip(fields, cell)) | {
            "cell": cell[:4], "mean": mean, "text": f"{mean:.3f} ± {sd:.3f}",
            "mark": "*" * int(p < 0.05) + "†" * int(corrected < 0.05),
            "gain": gain, "gain_low": low, "gain_high": high})
    best = {row["cell"]: row for row in sorted(found, key=lambda row: row["mean"])}
    for row in best.values():
        if row["ratio"]:
            row["text"] = f"**{row['text']}**"
    return found


def classify_section(rows, out, k=0) -> list[str]:
    """Table 1, Figure 4 (a, b; i, ii) and label fidelity of rows of one run or several."""
    cells = summarise(rows)
    steps = dict.fromkeys(f"{row['run']} at step {row['step']:,}" for row in rows)
    lines = [f"## Classification (2.4, Table 1): {rows[0]['protocol']}", "",
             f"Macro AUC, mean ± SD over folds; {', '.join(steps)}.\n",
             *pivot(cells, "{experiment} {run} {strategy} 1:{ratio}", "N = {N}", "{text} {mark}"),
             "\\* p < 0.05 in the paired t-test against real only, as in the paper; † also with "
             "Nadeau and Bengio's correction; bold: the best ratio.\n"]
    bars = defaultdict(list)
    for cell in cells:
        if cell["ratio"]:
            bars[f"{cell['experiment']}-{cell['strategy']}"].append(cell)
    for name, found in bars.items():
        lines.append(chart(out / f"figure4-{name}-{k}.png", found, "{run} 1:{ratio}", "N", "gain",
                           f"Figure 4, {name}", ("N, real images", "change of AUC, %"), True))
    scores = defaultdict(list)
    for row in rows:
        if "error" in row:
            lines.append(f"Fold {row['fold']} of N = {row['N']} was left out: {row['error']}\n")
        for name, value in row.items():
            if not row["ratio"] and (name == "test" or name.startswith("fidelity")):
                scores[name, f"{row['run']}, N = {row['N']}"].append(value)
    found = [{"images": name, "column": column, "auc": np.mean(aucs), "sd": np.std(aucs, ddof=1)}
             for (name, column), aucs in scores.items() if len(aucs) > 1]
    return lines + ["Label fidelity: AUC of classifiers trained on real images alone, on the test "
                    "images and on synthetic images of sources that they have not seen.\n",
                    *pivot(found, "{images}", "{column}", "{auc:.3f} ± {sd:.3f}")]


# ---- Zero-shot lung segmentation (paper 2.4, Table 2, Figures 5 and 9-12) ----------------------

OWN_TAU = (0.3, 0.4, 0.5, 0.6)  # CHOICE: taus of an image without a mask, in median divergences


def otsu(values) -> int:
    """uint8 -> t, for which the classes <= t and > t have the largest variance [Otsu 1979]."""
    counts = np.bincount(values.ravel(), minlength=256)
    low = counts.cumsum(dtype=float)  # pixels of the lower class
    total = (counts * np.arange(256)).cumsum(dtype=float)  # the sum of their values
    high = low[-1] - low
    spread = (total * low[-1] - low * total[-1]) ** 2 / (low * high).clip(1)
    return int(spread.argmax())


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
    names, areas = np.unique(labels, return_counts=True)
    for k in names[100 * areas > labels.size]:
        parts, count = ndimage.label(labels == k)
        pool.append(labels == k)
        if with_parts and count > 1:
            areas = np.bincount(parts.ravel())[1:]
            pool += [parts == p + 1 for p in np.flatnonzero(100 * areas > labels.size)]
    return np.array(pool, np.float32).reshape(-1, labels.size)


def select(pool, target) -> tuple[np.ndarray, float]:
    """Non-maximum suppression: candidates (K, S²), lungs (2, S, S) -> union (S, S), its Dice.

    Greedy by Dice with one lung, the other or both: the best candidate is taken, what overlaps it
    is suppressed, the lungs that it serves are done: at most one candidate a lung. With true masks
    this is the paper's *oracle* selection, with `expected_lungs` a rule that never sees the truth.
    CHOICE: below a Dice of 0.2 nothing is taken.
    """
    both = target.max(0)
    target = np.stack([*target, both]).reshape(3, -1).astype(np.float32)
    dice = 2 * pool @ target.T / (pool.sum(1)[:, None] + target.sum(1))  # (K, 3)
    chosen = np.zeros(both.size, bool)
    while dice.max(initial=0) > 0.2:
        k, lung = np.unravel_index(dice.argmax(), dice.shape)
        chosen |= pool[k] > 0
        if lung == 2:
            break
        dice[pool @ pool[k] > 0] = 0
        dice[:, [lung, 2]] = 0
    return chosen.reshape(both.shape), dice_score(chosen, target[2])


def dice_score(a, b) -> float:
    """2|a∩b| / (|a| + |b|); 1 for two empty masks."""
    total = float(a.sum() + b.sum())
    return 2 * float((a * b).sum()) / total if total else 1.0


def open_lungs(s: Segment) -> Measurement:
    """The images with masks, at most --count of each set, in m.test; the set of each in m.names."""
    m = open_measurement(s, 2_000_003, 4 * (s.count or 256))
    sets = np.array([provider or m.ds.name for provider in m.ds.providers])
    kept = []
    for name in dict.fromkeys(sets.tolist()):
        rows = np.flatnonzero(sets == name)
        if m.ds.seed is not None:  # one visit of each imaginary patient
            rows = np.unique(m.ds.patients, return_index=True)[1]
        with_mask = rows[[m.ds.has_mask(i) for i in rows]]
        kept.append(subsample(with_mask, s.count or len(rows)))
        m.notes.append(f"{name}: {len(rows) - len(with_mask)} of {len(rows)} images have no lung "
                       f"mask and were left out; {len(kept[-1])} are scored.")
    m.test = np.concatenate(kept)
    m.names = sets[m.test]
    if not len(m.test):
        raise UserError(f"{m.ds.name} has no lung masks; expected a set prepared with them")
    seen = seen_in_training(m)
    if seen:
        m.notes.append(f"The generator was trained on {len(seen)} of these images and patients, "
                       "masks unused.")
    return m


OWN = "this run"  # networks to segment with: this one, UNTRAINED and --init
UNTRAINED = "untrained"
OTSU = "Otsu, no network"


def open_model(m, s, name, step):
    """-> a run with the named UNet, and tokens (S, N) in place of the images' own, or None."""
    c = None
    if name == OWN:
        return dinodiff.load_run(m.run.folder, step, s.device), c
    if name == UNTRAINED:
        with torch.random.fork_rng():
            torch.manual_seed(s.seed)
            unet = dinodiff.from_scratch(m.run.unet.config)
    else:
        unet = UNet.from_pretrained(f"{dinodiff.SD15}:unet" if name == "sd15" else name)
        width = unet.config.cross_attention_dim
        # CHOICE: without --context one zero token: cross-attention adds its bias, and no text.
        tensors = {"context": torch.zeros(1, width)}
        if s.context:
            tensors = data.load_tensors(s.context)
        c = tensors.get("context")
        if c is None or c.shape[1:] != (width,):
            raise UserError(f"{s.context}: found the tensors {', '.join(tensors)}, expected "
                            f"`context` of shape (S, {width}) for {name}")
    return dataclasses.replace(m.run, step=0, unet=dinodiff.freeze(unet, m.run.device)), c


def attention_maps(s, run, c, images, t) -> dict[str, Tensor]:
    """{"all maps": A (B, S², S²), and of the --last ones}, from one UNet pass."""
    own = encode_tokens(run, images)
    c = own if c is None else c.to(own).expand(len(images), -1, -1)
    maps = diffseg.attentions(run, images, c, t, sorted({0, s.last}))
    return dict(zip(("all maps", f"last {s.last} maps"), maps))


def score_image(s, A, M, image, truth) -> list[dict]:
    """A (S², S²) -> Dice and masks ("picks") of oracle and rule at each of --thresholds.

    At last, with tau None, at that of OWN_TAU where the rule's choice looks most like lungs to
    itself.
    """
    first = diffseg.divergence(A[diffseg.anchors(math.isqrt(len(A)), M).to(A.device)], A)
    expected = expected_lungs(image)
    median = first.median().item()
    found = []
    for tau in (*s.thresholds, *(max(share * median, 1e-6) for share in OWN_TAU)):
        masks = diffseg.merge(A, M, tau, first=first)
        masks = diffseg.refine(A, masks) if s.refine else masks
        pool = candidates(diffseg.label(masks, len(image)).cpu().numpy(), s.candidates == "parts")
        best, oracle = select(pool, truth)
        guess, belief = select(pool, expected)
        found.append({"tau": tau, "oracle": oracle, "rule": dice_score(guess, truth.any(0)),
                      "belief": belief, "picks": [best, guess]})
    count = len(s.thresholds)
    own = max(found[count:], key=lambda one: one["belief"])
    return [*found[:count], own | {"tau": None}]


def score_images(m, s, run, c, grids, t, ids) -> list[dict]:
    """Rows of some images at each setting: maps, M and tau."""
    images = m.ds.read(ids)
    maps = attention_maps(s, run, c, images, t)

    def score(k, name, M):
        own = {"key": int(ids[k]), "maps": name, "M": M}
        found = score_image(s, maps[name][k], M, images[k].numpy(), m.ds.mask(ids[k]))
        return [own | {key: row[key] for key in ("tau", "oracle", "rule")} for row in found]

    settings = itertools.product(range(len(ids)), maps, grids)
    with ThreadPoolExecutor(max(1, data.cores() // ranks()[1])) as threads:
        return list(itertools.chain(*threads.map(score, *zip(*settings))))


def measure(m, s, name, steps, timesteps, ids) -> list[dict]:
    """Rows of images: the Dice of each at each step, t and setting, by one network."""
    grids = s.init_grids if name == s.init else s.grids
    rows = []
    for step in steps:
        run, c = open_model(m, s, name, step)
        side = run.size // run.vae.config.factor
        batch = max(1, min(16, 2**24 // side**4))  # no more than the maps of one image of 512 px
        depends_on = [name_of(run), [] if c is None else c.tolist(), ids.tolist(), s.thresholds,
                      grids, s.last, s.candidates, s.refine]
        for t in timesteps:
            score = functools.partial(score_images, m, s, run, c, grids, t)
            found = cached(m, "segment", [depends_on, t], lambda: on_all_ranks(
                ids, batch, score, f"{name}, step {step}, t {t}").tolist())
            rows += [row | {"step": step, "t": t} for row in found]
    return rows


SETTING = ("step", "t", "maps", "M", "tau")


def summarise_dice(m, rows, model, stage) -> list[dict]:
    """Rows of images -> a row a set, selection and setting: mean, SD, median, quartiles in %."""
    sets = dict(zip(m.test.tolist(), m.names))
    groups = defaultdict(list)
    for row, by in itertools.product(rows, ("oracle", "rule")):
        for name in (sets[row["key"]], "combined"):
            group = (name, by, *map(row.get, SETTING))  # apart: Python 3.10 has no [*…]
            groups[group].append(100 * row[by])
    found = []
    for group, dice in sorted(groups.items(), key=lambda item: item[0][0] == "combined"):
        low, median, high = np.percentile(dice, (25, 50, 75)).tolist()
        found.append({
            "model": model, "stage": stage, "is_headline": False,
            **dict(zip(("set", "by", *SETTING), group)),
            "images": len(dice), "dice": float(np.mean(dice)), "sd": float(np.std(dice)),
            "median": median, "median_low": low, "median_high": high})
    return found


def best_of(rows, maps="all maps") -> dict:
    """The oracle's row with one tau for all images and the highest mean Dice over all sets."""
    found = matching(rows, {"by": "oracle", "set": "combined", "maps": maps})
    return max(found, key=lambda row: row["dice"] * (row["tau"] is not None))


def coarse_sweep(m, s, t):
    """-> rows of --coarse images of each set at every checkpoint, and the two best of these."""
    few = np.concatenate([subsample(m.test[m.names == name], s.coarse)
                          for name in dict.fromkeys(m.names)])
    steps = m.checkpoints if s.checkpoints == "all" else [m.run.step]
    rows = summarise_dice(m, measure(m, s, OWN, steps, [t], few), OWN, "coarse")
    ranked = sorted(steps, key=lambda step: -best_of(matching(rows, {"step": step}))["dice"])
    return rows, ranked[:2]


def segment(s: Segment) -> None:
    """Table 2, Figures 5 and 9-12: a coarse sweep over checkpoints, then a full one on the best.

    The headlines: the oracle's best setting, as in the paper, and the rule at a setting fixed
    beforehand: --step, t nearest 300, the first M, the image's own tau.
    """
    m = open_lungs(s)
    own_vae = m.run.config["vae"]
    if s.init == "sd15" and own_vae != f"{dinodiff.SD15}:vae":
        m.notes.append("sd15 was made for the latents of its own VAE; this run's VAE is "
                       f"{own_vae[:80] or 'trained here'}.")
    base = min(s.timesteps, key=lambda t: abs(t - 300))
    floor = []
    for i in m.test.tolist():
        dice = dice_score(otsu_lungs(m.ds[i]), m.ds.mask(i).any(0))
        floor.append({"key": i, "oracle": dice, "rule": dice})
    rows = matching(summarise_dice(m, floor, OTSU, "full"), {"by": "rule"})
    for row in rows:
        row["is_headline"] = True
    for name in filter(None, (s.init, UNTRAINED, OWN)):  # what may not open comes first
        fixed = 0
        steps = [0]
        if name == OWN:
            fixed = m.run.step
            coarse, steps = coarse_sweep(m, s, base)
            rows += coarse
        images = measure(m, s, name, dict.fromkeys([*steps, fixed]), s.timesteps, m.test)
        full = summarise_dice(m, images, name, "full")
        for maps in dict.fromkeys(row["maps"] for row in full):
            best = best_of(full, maps)
            oracle = {key: best[key] for key in ("by", *SETTING)}
            rule = {"by": "rule", "step": fixed, "t": base, "maps": maps, "M": full[0]["M"],
                    "tau": None}
            for row in [*matching(full, oracle), *matching(full, rule)]:
                row["is_headline"] = True
        rows += full
    gallery(m, s, best_of(full), images)
    how = f", {s.candidates} alone" * (s.candidates != "parts") + ", k-means" * s.refine
    finish(m, "segment", rows,
           protocol=f"{len(m.test)} images of {m.ds.name}, {m.run.size} px{how}")


@torch.no_grad()
def gallery(m, s, best, rows) -> None:
    """Figures 5 and 9: the best and worst images of each set at the oracle's best setting."""
    run, c = open_model(m, s, OWN, best["step"])
    setting = {key: best[key] for key in SETTING}
    dice = {row["key"]: row["oracle"] for row in matching(rows, setting)}
    cells = []
    titles = []
    for name in dict.fromkeys(m.names):
        order = sorted(m.test[m.names == name].tolist(), key=dice.get)
        for i in dict.fromkeys([*order[-2:], *order[:2]]):
            images = m.ds.read([i])
            image = images[0].numpy()
            truth = m.ds.mask(i)
            A = attention_maps(s, run, c, images, best["t"])[best["maps"]][0]
            [one] = matching(score_image(s, A, best["M"], image, truth), {"tau": best["tau"]})
            for mask in (image < 0, truth.any(0), *one["picks"]):
                green = mask * (image // 3)
                cells.append(np.stack([image - green, image, image - green], 2))
            titles.append(f"{name}: {100 * dice[i]:.0f} %")
    captions = ["X-ray", "true lungs", "oracle", "rule"] * len(titles)
    on_rank_0(lambda: data.save_png(m.out / "figure5-9.png",
                                    data.grid(cells, 4, captions, titles)))


def segment_section(rows, out, k=0) -> list[str]:
    """Table 2 and Figures 10-12 of rows of one run or several."""
    title = "{run}: {model}, {by}, {maps} (step {step:,}, t {t}, M {M}, tau {tau})"
    head = [row | {"tau": row["tau"] or "own"} for row in rows if row["is_headline"]]
    for row in head:
        row["title"] = OTSU if row["model"] == OTSU else title.format_map(row)
    lines = ["## Zero-shot lung segmentation (2.4, Table 2)", "",
             f"Mean Dice ± SD in %; {rows[0]['protocol']}. As the paper's Table 2:\n",
             *pivot(matching(head, {"by": "oracle", "maps": "all maps"}), "{set}",
                    "{run}: {model} (t {t}, M {M}, tau {tau})", "{dice:.1f} ± {sd:.1f}"),
             "All ways to choose segments, and what needs no network:\n",
             *pivot(head, "{title}", "{set} ({images})", "{dice:.1f} ± {sd:.1f}"),
             "Oracle: segments and settings chosen by their Dice with the true lungs, as in the "
             "paper. Rule: settings fixed beforehand, segments chosen by where lungs are expected "
             "and by darkness; it reads no mask.\n"]
    runs = dict.fromkeys(row["run"] for row in rows)
    for run, (number, x) in itertools.product(runs, ((10, "step"), (11, "tau"), (12, "t"))):
        own = matching(rows, {"run": run, "model": OWN,
                              "stage": "coarse" if x == "step" else "full"})
        best = best_of(own)
        others = {key: best[key] for key in ("by", *SETTING) if key != x}
        line = [row for row in matching(own, others) if row["tau"] is not None]
        fixed = ", ".join(f"{key} {value}" for key, value in others.items())
        lines.append(chart(out / f"figure{number}-{run}-{k}.png", line, "{set}", x, "median",
                           f"Figure {number}, {run}: {fixed}", (x, "median Dice, quartiles, %")))
    return lines


# ---- Audit: copies of training images, obedience to the condition, Figure 8 --------------------

COPY = 0.995  # correlation of thumbnails from which two images are called copies


def thumbnails(images) -> Tensor:
    """uint8 (B, S, S) -> (B, 32^2), mean 0, length 1: the product of two is their correlation."""
    x = F.interpolate(images[:, None].float(), (32, 32), mode="bilinear", antialias=True)
    x = x.flatten(1)
    return F.normalize(x - x.mean(1, keepdim=True), dim=1)


def chance_below(a, b) -> float:
    """The chance that a value of `a` is below one of `b` (broadcast); ties count half."""
    return float(((a < b).double() + (a <= b)).mean() / 2)


def obedience(made, sources) -> float:
    """The chance that made[i] is nearer to its own source than to another's; 0.5: it is ignored."""
    distance = torch.cdist(made, sources)
    is_other = ~torch.eye(len(made), dtype=torch.bool)
    own = distance.diagonal()[:, None].expand_as(distance)
    return chance_below(own[is_other], distance[is_other])


def likeness(distance, usual) -> dict:
    """Distances to the nearest training image, of synthetic and of unseen real images."""
    return {"distance": float(distance.median()), "usual": float(usual.median()),
            "nearer": 100 * float((distance < usual.quantile(0.05)).double().mean()),
            "chance": chance_below(distance[:, None], usual)}


def make(m, s, ds, ids, variant=0) -> Tensor:
    """A reconstruction of each of ds[ids], by all ranks."""
    work = functools.partial(reconstruct, ds, s, m.run, variant=variant)
    return torch.from_numpy(on_all_ranks(ids, s.micro_batch, work, "reconstructions"))


@torch.no_grad()
def audit(s: Audit) -> None:
    """Is a synthetic image nearer to a training image than unseen real ones are? Does it obey?"""
    m = open_labelled(s)
    if m.train is None:
        raise UserError(f"the generator's training images are needed (--train-data). {m.notes[-1]}")
    name, embed, _ = open_features(m, s)
    trained = subsample(np.arange(len(m.train)), s.train_images)
    unseen = subsample(m.test, 4 * s.count)
    shown = subsample(unseen, s.count)
    check_patients(m, shown, "to reconstruct (see --count)")
    if not any(s.finding in ("", *m.ds.labels[i]) for i in shown):
        raise UserError(f"no unseen image has the finding {s.finding!r} (--finding)")
    kinds = {"training images": (m.train, subsample(trained, s.count)),
             "unseen images": (m.ds, shown)}
    made = {kind: make(m, s, *source) for kind, source in kinds.items()}
    rows = []
    cells = []
    titles = []
    for space, vector in (("pixels", thumbnails), (name, embed)):
        bank = vectors(vector, m.train.read, trained)
        usual = torch.cdist(vectors(vector, m.ds.read, unseen), bank).amin(1)
        for kind, (ds, ids) in kinds.items():
            images = made[kind]
            found = vectors(vector, images.__getitem__, np.arange(len(images)))
            own = vectors(vector, ds.read, ids)
            distance, index = torch.cdist(found, bank).min(1)
            rows.append(likeness(distance, usual) | {
                "kind": kind, "space": space, "images": len(images),
                "obedience": obedience(found, own)})
            near = distance.argsort()[:8]
            cells += [*images[near], *m.train.read(trained[index[near]])]
            titles += [f"of {kind}", f"nearest by {space}"]
    far = (found - own).norm(dim=1).argsort(descending=True)  # of unseen images, by features
    worst = [i for i in shown[far] if s.finding in ("", *m.ds.labels[i])][:8]
    if s.finding:
        m.notes.append(f"Figure 8 is from images with {s.finding} alone (--finding).")
    failures = [*m.ds.read(worst)]
    for variant in range(4):
        failures += make(m, s, m.ds, worst, variant)
    if ranks()[0] == 0:
        save_sheet(m.out / "audit.png", cells, len(near), titles)
        save_sheet(m.out / "figure8.png", failures, len(worst),
                   ["real", *[f"variant {k}" for k in range(4)]])
    copied = copies(m, unseen, s.train_images)
    try:
        for row in copied:
            check_leak(s, m, f"test images are copies among {row['among']}", row["copies"])
    finally:  # what was computed stays
        finish(m, "audit", rows + copied, step=m.run.step)


def save_sheet(path, images, columns, titles) -> None:
    cells = [data.resize(image.numpy(), min(len(image), 256)) for image in images]
    data.save_png(path, data.grid(cells, columns, None, titles))


def copies(m, ids, count) -> list[dict]:
    """Test images whose thumbnails are those of training images, each with what it is a copy of."""
    rows = []
    for among, ds, pool in (
            ("the generator's training images", m.train, np.arange(len(m.train))),
            ("the classifier's training part", m.ds, m.pool)):
        others = subsample(pool, count)
        if ds.seed == m.ds.seed:  # of the phantoms of two seeds two in a million look alike
            correlation, index = (vectors(thumbnails, m.ds.read, ids)
                                  @ vectors(thumbnails, ds.read, others).T).max(1)
            named = [f"{m.ds.keys[ids[k]]} = {ds.keys[others[index[k]]]}"
                     for k in np.flatnonzero(correlation >= COPY)]
            rows.append({"copies": named, "among": f"{among} ({len(others):,} of {len(pool):,} "
                         f"compared with {len(ids):,} of {len(m.test):,} test images)"})
    return rows


def audit_section(rows, out, k=0) -> list[str]:
    """The tables of the audit."""
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
    for row in rows:
        if "copies" in row:
            named = ", ".join(row["copies"][:5]) or "none"
            lines.append(f"{row['run']}: {len(row['copies'])} test images are copies among "
                         f"{row['among']}: {named}.\n")
    return lines


# ---- Everything, and the report of one run or several ------------------------------------------

COMMANDS = {"fid": (Fid, fid, fid_section), "classify": (Classify, classify, classify_section),
            "segment": (Segment, segment, segment_section), "audit": (Audit, audit, audit_section)}
PICTURES = {  # of one run alone, with their titles
    "fid": {}, "classify": {},
    "segment": {"figure5-9.png": "Figures 5 and 9: best and worst images"},
    "audit": {"audit.png": "Synthetic images of training and of unseen images, those nearest to a "
                           "training image, above it", "figure8.png": "Figure 8: worst"}}


@dataclass(frozen=True)
class Everything(Featured):
    steps: int = 0  # DDIM steps of a synthetic image; 0: each command's own
    micro_batch: int = 0  # images of one rank in one pass; 0: each command's own
    lungs: str = ""  # images with lung masks; empty: --data


@dataclass(frozen=True)
class Report:
    run_dir: tuple[str, ...] = ()  # run folders; empty: the newest one
    out: str = ""  # folder of the report; empty: RUN/eval, or report/ beside the first of several


def evaluate_all(s: Everything) -> None:
    """Every command in turn, then the report; what one cannot do is said, and the others go on.

    On several ranks it ends the program: the other ranks may already wait for this one.
    """
    dinodiff.start_ranks(dinodiff.pick_device(s.device))
    folder = str(Path(s.run_dir or dinodiff.newest_run()).absolute())
    given = {key: value for key, value in vars(s).items() if value != getattr(Everything, key)}
    given["run_dir"] = folder
    failed = []
    for name, (kind, function, _) in COMMANDS.items():
        settings = defaults_for(kind, ["--run-dir", folder])
        changed = {key: given[key] for key in given if hasattr(settings, key)}
        if name == "segment" and s.lungs:
            changed |= {"data": s.lungs, "labels": ""}
        try:
            function(dataclasses.replace(settings, **changed))
        except UserError as error:
            if ranks()[1] > 1:
                raise UserError(f"{name}: {error}; the other commands go by their names") from None
            note(failed, f"{name} ended: {error}")
    if len(failed) == len(COMMANDS):
        raise UserError("nothing could be measured: " + "; ".join(failed))
    if ranks()[0] == 0:
        out = Path(s.out or Path(folder, "eval"))
        write_report({out: Path(folder)}, out, failed)


def report(s: Report) -> None:
    """The results of one run, or of several side by side as in the paper."""
    folders = [Path(name).absolute() for name in s.run_dir or (dinodiff.newest_run(),)]
    if len({folder.name for folder in folders}) < len(folders):
        raise UserError(f"found the run folders {', '.join(map(str, folders))}, expected a name "
                        "for each: tables and figures go by it")
    usual = folders[0] / "eval" if len(folders) == 1 else folders[0].parent / "report"
    write_report({folder / "eval": folder for folder in folders}, Path(s.out or usual))


def write_report(places: dict[Path, Path], out: Path, notes=()) -> None:
    """report.md in `out`: each section over all runs, then what belongs to one run alone.

    places: {folder of results: folder of the run}. UserError where one of them has no results.
    """
    joined = defaultdict(list)
    own = defaultdict(list)
    for place, folder in places.items():
        found = {name: read_rows(place / f"{name}.json") for name in COMMANDS}
        if not any(found.values()):
            raise UserError(f"{folder}: no results in {place}, expected those of python "
                            f"evaluate.py {' | '.join(COMMANDS)}")
        for name, rows in found.items():
            joined[name] += [row | {"run": folder.name} for row in rows]
            if rows:
                own[name] += own_parts(name, place, out, folder.name)
    lines = ["# Evaluation", "", "No medical device; nothing here is validated for clinical use.\n",
             *[f"> {note}\n" for note in notes]]
    for name, (_, _, section) in COMMANDS.items():
        for k, part in enumerate(by_protocol(joined[name])):
            lines += section(part, out, k)
        lines += own[name]
    lines += fid_against_dice(joined["fid"], joined["segment"], out)
    for page in sorted(Path(__file__).parent.glob("docs/paper_table*.md")):
        lines.append(page.read_text("utf-8"))
    for folder in places.values():
        for path in sorted(folder.glob("samples/*.png"))[-1:]:
            where = os.path.relpath(path, out)
            lines.append(f"![Samples of {folder.name}, {path.stem}]({where})\n")
    data.write_file(out / "report.md", "\n".join(lines) + "\n")
    print(f"-> {out / 'report.md'}")


def by_protocol(rows) -> list[list]:
    """Rows in parts that compare; what was measured differently never stands in one table."""
    parts = defaultdict(list)
    for row in rows:
        parts[row.get("protocol")].append(row)
    return list(parts.values())


def read_rows(path: Path) -> list[dict]:
    """The rows that a command wrote; none where it has not run."""
    rows = data.read_json(path, list) if path.is_file() else []
    if not all(isinstance(row, dict) and "run" in row for row in rows):
        raise UserError(f"{path}: found no rows that python evaluate.py {path.stem} writes; run it "
                        "again")
    return rows


def own_parts(name, place, out, run) -> list[str]:
    """The pictures of one run and the notes in its NAME.md."""
    lines = []
    for file, title in PICTURES[name].items():
        if (place / file).is_file():
            lines.append(f"{run}: {title}\n\n![{title}]({os.path.relpath(place / file, out)})\n")
    page = place / f"{name}.md"
    # It may hold a file's name that is no UTF-8.
    text = page.read_text("utf-8", "surrogateescape") if page.is_file() else ""
    return lines + [f"> {run}: {line[2:]}\n" for line in text.splitlines() if line[:2] == "> "]


def fid_against_dice(fids, segments, out) -> list[str]:
    """B.2: does a better FID segment better? A line a run over its checkpoints."""
    found = []
    for row in matching(fids, {"kind": "reconstruction"}):
        own = matching(segments, {"model": OWN, "stage": "coarse", "run": row["run"],
                                  "step": row["step"]})  # this sweep is alike at all checkpoints
        if own:
            fields = dict.fromkeys(("dice", "dice_low", "dice_high"), best_of(own)["dice"])
            found.append(row | fields | {"fid": round(row["fid"], 2)})
    return [chart(out / f"fid-dice-{k}.png", part, "{run}", "fid", "dice",
                  f"Dice against FID over checkpoints (B.2), {part[0]['protocol']}",
                  ("FID, ascending", "best Dice, %"))
            for k, part in enumerate(by_protocol(found)) if len(part) > 1]


def main(argv=None) -> None:
    commands = {name: (functools.partial(defaults_for, kind), function)
                for name, (kind, function, _) in COMMANDS.items()}
    data.command_line(__doc__, {"": (Everything(), evaluate_all), **commands,
                                "report": (Report(), report)}, argv)


if __name__ == "__main__":
    main()
