"""Everything that comes from or goes to a disk or a hub: X-rays, shards, labels, masks, phantoms, pictures, weights files.

Implements section 2.1 of the DiNO-Diffusion paper (data), the preprocessing and augmentation of 2.5, and the subsets of 2.4.
This is the ground floor: every other file may import it, and it imports none of them.

    python data.py prepare FOLDER --out shards/ --size 512     any folder, zip or tar of X-rays -> tar shards and an index
    python data.py check 'shards/*.tar'                        read every image of a set of shards once, report what is wrong
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import csv
import dataclasses
import fnmatch
import functools
import glob
import gzip
import hashlib
import inspect
import io
import itertools
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import typing
import zipfile
import zlib
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save, save_file
from scipy import ndimage
from tqdm import tqdm


class UserError(ValueError):
    """Something the user can put right. Its message says what was found, what was expected, and what to do."""


# ---- Command lines, progress, files that are whole or absent --------------------------------------------------------------


def command_line(doc: str, commands: dict, argv: list[str] | None = None) -> None:
    """Run one of `commands`: {name: (settings, function)}; `settings` is a dataclass instance or a callable argv -> instance.

    Every field is a flag with its default (`--micro-batch` is `micro_batch`), and the comment behind the field is its help.
    A field without `--` is one whose metadata says {"positional": True}. An unknown or abbreviated flag is an error.
    The entry named "" is the command when none is given. UserError and OSError end the program with their message alone.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    name = argv.pop(0) if argv and argv[0] in commands else ""
    if name not in commands:
        wanted = " | ".join(commands)
        if argv and argv[0] in ("-h", "--help"):
            sys.exit(print(f"{doc.strip()}\n\ncommands: {wanted}; each has its own --help"))
        sys.exit(f"{Path(sys.argv[0]).name}: found {argv[0] if argv else 'no command'!r}, expected one of: {wanted} (or --help)")
    settings, function = commands[name]
    try:
        function(parse(settings(argv) if inspect.isroutine(settings) else settings, argv, doc, name))
    except (UserError, OSError) as error:
        sys.exit(f"{Path(sys.argv[0]).name} {name}".strip() + f": {error}")


def parse(defaults, argv: list[str], doc: str = "", name: str = ""):
    """Flags -> a copy of the dataclass instance `defaults` with what `argv` sets."""
    parser = argparse.ArgumentParser(prog=f"{Path(sys.argv[0]).name} {name}".strip(), description=doc, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    source = "".join(inspect.getsource(c) for c in type(defaults).__mro__ if dataclasses.is_dataclass(c))
    hints = typing.get_type_hints(type(defaults))
    for field in dataclasses.fields(defaults):
        if field.metadata.get("flag") is False:  # networks and the like: set in a preset, not on the command line
            continue
        value = getattr(defaults, field.name)
        comment = re.search(rf"^    {field.name}\b[^#\n]*#\s*(.*)$", source, re.M)
        text = (comment.group(1) if comment else "").replace("%", "%%")
        text = f"{text} [{value}]" if value not in (None, "", ()) else text
        kinds = [k for k in (typing.get_args(hints[field.name]) or (hints[field.name],)) if k not in (type(None), Ellipsis)]
        many = typing.get_origin(hints[field.name]) is tuple
        if field.metadata.get("positional"):
            parser.add_argument(field.name, nargs="*" if many else "?" if value is not None else None, default=value, help=text)
        elif kinds[0] is bool:
            parser.add_argument("--" + field.name.replace("_", "-"), action=argparse.BooleanOptionalAction, default=value, help=text)
        else:
            parser.add_argument("--" + field.name.replace("_", "-"), type=kinds[0], nargs="+" if many else None, default=value,
                                metavar=kinds[0].__name__.upper(), help=text)
    values = vars(parser.parse_args(argv))
    return dataclasses.replace(defaults, **{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


class _Lines:
    """A text stream for tqdm where no terminal listens: a plain line per refresh instead of one overwritten line."""

    def write(self, text: str) -> None:
        text = text.replace("\r", "").rstrip()
        if text:
            sys.stderr.write(text + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def progress(iterable=None, desc: str = "", total: int | None = None, unit: str = "it", initial: int = 0) -> tqdm:
    """A tqdm bar on a terminal, a plain line every 20 s elsewhere; silent on every rank but 0."""
    quiet = os.environ.get("RANK", "0") != "0"
    if sys.stderr.isatty():
        return tqdm(iterable, desc=desc, total=total, unit=unit, initial=initial, disable=quiet, dynamic_ncols=True)
    return tqdm(iterable, desc=desc, total=total, unit=unit, initial=initial, disable=quiet, file=_Lines(), mininterval=20,
                miniters=1, bar_format="{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]")


def write_file(path, content: bytes | str) -> None:
    """Write a file whole or not at all: to a temporary neighbour, flushed to the disk, then renamed over `path`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path, value) -> None:
    """A JSON file, whole or not at all."""
    write_file(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def module_table(title: str, model: torch.nn.Module, *inputs) -> None:
    """Print the children of `model` with the shape each gives for `inputs` (tensors, on meta as well) and its parameters."""
    rows, handles = {}, []
    for name, module in model.named_children():
        is_list = type(module) is torch.nn.ModuleList
        for part, child in [(f"{name}.{n}", m) for n, m in module.named_children()] if is_list else [(name, module)]:
            note = lambda _, __, out, part=part, child=child: rows.update({part: (child, tuple(out.shape))})
            handles.append(child.register_forward_hook(note))
            if hasattr(child, "resnets"):  # a level of the UNet has no forward of its own: its last part speaks for it
                handles.append(list(child.modules())[-1].register_forward_hook(note))
    out = model(*inputs)
    for handle in handles:
        handle.remove()
    print(title)
    for part, (module, shape) in rows.items():
        print(f"  {part:<22}{str(shape):>24}{sum(p.numel() for p in module.parameters()):>16,} parameters")
    print(f"  {'total':<22}{str(tuple(out.shape)):>24}{sum(p.numel() for p in model.parameters()):>16,} parameters")


# ---- Random numbers that are pure functions of what they are for ----------------------------------------------------------


def hash64(*values) -> np.ndarray:
    """Integers (broadcast together, taken mod 2**64) -> uint64 hash; SplitMix64's finaliser over each in turn."""
    h = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        for value in values:
            h = (h ^ np.asarray(value).astype(np.int64).view(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            h = h ^ (h >> np.uint64(31))
    return h


def uniforms(count: int, *values) -> np.ndarray:
    """`count` numbers in [0, 1) for each entry of `values` (integers, broadcast together): shape (..., count) float64."""
    h = hash64(*[np.asarray(v)[..., None] for v in values], np.arange(count))
    return (h >> np.uint64(11)).astype(np.float64) * 2.0**-53


def generator(device, *values: int) -> torch.Generator:
    """A torch generator on `device`, seeded by a hash of `values`, for instance (seed, step)."""
    return torch.Generator(device).manual_seed(int(hash64(*values) >> np.uint64(1)))


# ---- Weights files: the two functions that read and write them ------------------------------------------------------------

WEIGHT_NAMES = ("diffusion_pytorch_model.safetensors", "model.safetensors", "diffusion_pytorch_model.fp16.safetensors",
                "model.fp16.safetensors", "diffusion_pytorch_model.bin", "pytorch_model.bin")


def read_weights(source, subfolder: str | None = None, revision: str | None = None,
                 offline: bool = False) -> tuple[dict, dict[str, torch.Tensor]]:
    """Read a public checkpoint -> (config.json as a dict, empty where there is none; state dict on the CPU).

    source: a folder, one `.safetensors`/`.bin`/`.pt`/`.pth` file, or a hub id `OWNER/NAME`. Safetensors are memory-mapped, not
    copied; `*.index.json` opens sharded ones. Pickled files are read with weights_only=True, so no code in them runs.
    Raises UserError where nothing readable is found, naming what was looked for.
    """
    path = Path(source).expanduser()
    if path.is_file():
        config, files = path.with_name("config.json"), [path]
    elif path.is_dir():
        folder = path / (subfolder or "")
        config = folder / "config.json"
        files = _weight_files(folder, lambda name: folder / name if (folder / name).is_file() else None)
        if not files:
            found = sorted(p.name for p in folder.glob("*"))[:8] if folder.is_dir() else "no such folder"
            raise UserError(f"no weights in {folder}: found {found}, expected one of {', '.join(WEIGHT_NAMES)}")
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        fetch = lambda name: hub_file(str(source), "/".join(filter(None, [subfolder, name])), revision, offline)
        config, files = fetch("config.json"), _weight_files(source, fetch)
        if not files:
            raise UserError(f"{source} on the hub holds none of {', '.join(WEIGHT_NAMES)} (revision {revision or 'main'})")
    else:
        raise UserError(f"weights {source!r}: no such file or folder, and not a hub id of the form OWNER/NAME")
    state = {}
    for file in files:
        try:
            state |= load_file(file) if file.suffix == ".safetensors" else torch.load(file, map_location="cpu", weights_only=True)
        except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, TypeError) as error:
            raise UserError(f"{file} ({file.stat().st_size:,} bytes) is damaged or not a weights file: {error}") from None
        except Exception as error:  # pickle.UnpicklingError of weights_only=True names the class that it refused
            raise UserError(f"{file} holds more than tensors, so it was not opened: {error}") from None
    return json.loads(config.read_text()) if config is not None and config.is_file() else {}, state


def _weight_files(place, fetch) -> list[Path]:
    """The files of one checkpoint: the first of WEIGHT_NAMES that is there, whole or in the parts its index names."""
    for name in WEIGHT_NAMES:
        for candidate in (name, name + ".index.json"):
            file = fetch(candidate)
            if file is not None and candidate == name:
                return [file]
            if file is not None:
                parts = {part: fetch(part) for part in sorted(set(json.loads(file.read_text())["weight_map"].values()))}
                if None in parts.values():
                    raise UserError(f"{place}: {candidate} names {[p for p, f in parts.items() if f is None]}, which are missing")
                return list(parts.values())
    return []


def hub_file(repository: str, name: str, revision: str | None, offline: bool, kind: str = "model", folder=None) -> Path | None:
    """One file of a hub repository (a "model" or a "dataset"), through huggingface-hub's cache, or into `folder` where that
    does not have it; None where the repository has no such file."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
    offline = offline or os.environ.get("HF_HUB_OFFLINE", "") in ("1", "true", "True")
    try:
        cached = try_to_load_from_cache(repository, name, revision=revision, repo_type=kind) if folder else None
        return Path(cached if isinstance(cached, str) else hf_hub_download(
            repository, name, revision=revision, repo_type=kind, local_files_only=offline, local_dir=folder))
    except LocalEntryNotFoundError as error:  # TRAP: a subclass of EntryNotFoundError that also means "no network"
        if offline and any(_cached(repository, kind)):
            return None
        raise UserError(
            f"{repository} is neither in the hub cache nor within reach ({'offline' if offline else type(error.__cause__).__name__}).\n"
            f"On a machine with network:  hf download {repository}" + " --repo-type dataset" * (kind == "dataset") +
            (f" --revision {revision}" if revision else "") +
            f" --local-dir {repository.split('/')[1]}\nthen give that folder's path instead of {repository!r}.") from None
    except EntryNotFoundError:
        return None
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise UserError(f"{repository} on the hub: {str(error).strip().splitlines()[0]}") from None


def _cached(repository: str, kind: str):
    from huggingface_hub.constants import HF_HUB_CACHE
    return Path(HF_HUB_CACHE, f"{kind}s--" + repository.replace("/", "--")).glob("snapshots/*/*")


def hub_files(repository: str, revision: str | None, offline: bool) -> list[str]:
    """The files of a dataset on the hub, sorted; offline those in the hub's cache."""
    from huggingface_hub import HfApi
    if offline or os.environ.get("HF_HUB_OFFLINE", "") in ("1", "true", "True"):
        files = {"/".join(f.parts[f.parts.index("snapshots") + 2:]) for top in _cached(repository, "dataset")
                 for f in (top, *top.rglob("*")) if f.is_file()}
    else:
        try:
            files = set(HfApi().list_repo_files(repository, revision=revision, repo_type="dataset"))
        except Exception as error:  # no network arrives as one of many classes (httpx, OSError, the hub's own)
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(f"{repository} on the hub could not be listed: {reason[0]}") from None
    if not files:
        raise UserError(f"{repository} is not in the hub's cache. On a machine with network:  "
                        f"hf download {repository} --repo-type dataset")
    return sorted(files)


def load_weights(model: torch.nn.Module, state: dict[str, torch.Tensor], source) -> torch.nn.Module:
    """`load_state_dict(strict=True)` whose refusal a person can act on; fp16/bf16 weights become float32.

    The tensors of `state` become the parameters (assign=True): a model built on the meta device costs no second copy.
    """
    own = model.state_dict()
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [f"{k}: file {tuple(state[k].shape)}, model {tuple(own[k].shape)}" for k in own.keys() & state.keys()
              if own[k].shape != state[k].shape]
    if missing or unexpected or shapes:
        few = lambda title, items: f"\n  {len(items)} {title}: " + "; ".join(items[:4]) + (" …" if len(items) > 4 else "") if items else ""
        raise UserError(f"{source} does not fit {type(model).__name__}:" + few("keys that the model wants are missing", missing) +
                        few("keys are unknown", unexpected) + few("shapes differ", sorted(shapes)) +
                        "\nIs this the right file, and is its config.json beside it?")
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()}, strict=True, assign=True)
    return model


def _save_tensors(path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, partial, metadata=metadata)
        os.replace(partial, path)
    except SafetensorError as error:  # a full disk arrives as this, not as OSError
        raise OSError(f"could not write {path}: {error}") from None
    finally:
        partial.unlink(missing_ok=True)


def write_weights(folder, config: dict, state: dict[str, torch.Tensor], name: str = "diffusion_pytorch_model.safetensors") -> None:
    """Write `folder`/config.json and `folder`/`name` as diffusers and transformers read them."""
    write_json(Path(folder, "config.json"), config)
    _save_tensors(Path(folder, name), state, {"format": "pt"})  # TRAP: without this metadata transformers refuses the file


def save_state(path, tensors: dict[str, torch.Tensor], info: dict) -> None:
    """The state of a training run in one safetensors file; `info` (JSON) goes into its metadata."""
    _save_tensors(path, tensors, {"info": json.dumps(info)})


def load_state(path) -> tuple[dict[str, torch.Tensor], dict]:
    """What `save_state` wrote -> tensors (memory-mapped), info."""
    try:
        with safe_open(path, framework="pt") as file:
            return {k: file.get_tensor(k) for k in file.keys()}, json.loads(file.metadata()["info"])
    except (SafetensorError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged or not a training state: {error}; remove it to start this stage anew") from None


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state as flat tensors, `optimizer.<parameter number>.<name>`."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {f"optimizer.{i}.{k}": v for i, p in enumerate(parameters) for k, v in optimizer.state.get(p, {}).items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """The inverse of `optimizer_tensors`. TRAP: Optimizer.load_state_dict would turn 8-bit states into float32."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, i, name = key.split(".", 2)
            device = "cpu" if name == "step" else parameters[int(i)].device
            optimizer.state[parameters[int(i)]][name] = value.to(device, copy=True)  # a copy, not a view of the file


# ---- Pictures: any X-ray file -> uint8, preprocessed (paper 2.5) ----------------------------------------------------------

PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp", ".gif", ".bmp", ".pgm", ".jp2", ".dcm", ".dicom", ".img")
FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "GIF", "BMP", "PPM", "JPEG2000")  # TRAP: some other formats of Pillow open noise
JSRT_SIDE = 2048          # raw .IMG files: side in pixels, 12 bit in big-endian uint16 (Shiraishi et al. 2000)
BORDER_TOLERANCE = 10     # grey levels by which JPEG noise moves a constant border


class Unreadable(UserError):
    """An image that is cut short, damaged, or not an image; `reason` is the message without the file's name."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name}: {reason}")
        self.reason = reason


def load_image(source) -> np.ndarray:
    """Read an X-ray -> uint8 (H, W), air dark and bone bright.

    source: a path, or the file's bytes. PNG, JPEG, TIFF, WebP, GIF, BMP, PGM, JPEG 2000, DICOM (with pydicom), JSRT's raw .IMG;
    grey, palette or colour (to luma); the first frame or page. More than 8 bits are rescaled from the file's own minimum and
    maximum [DiNO-Diff 2.5]; 8 bits stay as they are. Raises Unreadable, which says what was found.
    CHOICE: an alpha channel is ignored, so pixels that an export made transparent are seen.
    """
    name = f"{len(source):,} bytes" if isinstance(source, bytes) else str(source)
    try:
        content = source if isinstance(source, bytes) else Path(source).read_bytes()
    except OSError as error:
        raise Unreadable(name, error.strerror) from None
    suffix = "" if isinstance(source, bytes) else Path(source).suffix.lower()
    try:
        if content[128:132] == b"DICM" or suffix in (".dcm", ".dicom"):
            return _read_dicom(content)
        if suffix == ".img" or len(content) == 2 * JSRT_SIDE**2:
            if len(content) != 2 * JSRT_SIDE**2:
                raise Unreadable(name, f"{len(content):,} bytes; a raw JSRT image has {2 * JSRT_SIDE**2:,}")
            # TRAP: JSRT stores optical density, in which air is bright.
            return 255 - _to_8_bit(np.frombuffer(content, ">u2").reshape(JSRT_SIDE, JSRT_SIDE))
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if image.mode[0] not in "IF":
                return np.array(image.convert("L"))
            # TRAP: convert("L") would clip 16 bits at 255, and Pillow ignores TIFF's WhiteIsZero (tag 262) beyond 8 bits.
            pixels = _to_8_bit(np.array(image))
            return 255 - pixels if image.format == "TIFF" and image.tag_v2.get(262) == 0 else pixels
    except UserError:
        raise
    except Exception as error:  # what Pillow raises for damaged files ranges from OSError to SyntaxError and struct.error
        raise Unreadable(name, f"not a whole image: {str(error).split(' <_io')[0] or type(error).__name__}") from None


def _to_8_bit(pixels: np.ndarray) -> np.ndarray:
    """Any numbers -> uint8 between their minimum and maximum; uint8 stays as it is."""
    if pixels.dtype == np.uint8:
        return pixels
    pixels = np.nan_to_num(pixels.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = pixels.min(), pixels.max()
    return ((pixels - low) * (255 / max(high - low, 1e-12)) + 0.5).astype(np.uint8)


def _read_dicom(content: bytes) -> np.ndarray:
    """First frame of a DICOM file -> uint8 (H, W). CHOICE: the whole range, not the VOI window, which differs by hospital."""
    try:
        import pydicom
    except ImportError:
        raise UserError("this is a DICOM file, which needs a reader: pip install pydicom pylibjpeg pylibjpeg-libjpeg") from None
    file = pydicom.dcmread(io.BytesIO(content), force=True)
    pixels = file.pixel_array
    pixels = pixels[0] if int(file.get("NumberOfFrames", 1) or 1) > 1 else pixels
    if int(file.get("SamplesPerPixel", 1)) > 1:
        return np.array(Image.fromarray(_to_8_bit(pixels)).convert("L"))
    padding, real = file.get("PixelPaddingValue"), pixels
    if padding is not None and (pixels != padding).any():  # TRAP: padding lies outside of the range of the film
        real = pixels[pixels != padding]
    slope, intercept = np.float32(file.get("RescaleSlope", 1)), np.float32(file.get("RescaleIntercept", 0))
    pixels = pixels.clip(real.min(), real.max()) * slope + intercept
    inverted = file.get("PhotometricInterpretation") == "MONOCHROME1"
    eight_bit = int(file.get("BitsStored", 16)) <= 8 and 0 <= pixels.min() and pixels.max() <= 255
    pixels = _to_8_bit(pixels.astype(np.uint8) if eight_bit else pixels)
    return 255 - pixels if inverted else pixels


def square(image: np.ndarray) -> tuple[slice, slice]:
    """The part of an image uint8 (H, W) that is kept: without its padded border, then the central square.

    A line belongs to the border while 99 % of it is within BORDER_TOLERANCE of the outermost line's median. What would leave
    less than a fifth of a side is no border: a blank or nearly blank image is kept whole.
    """
    def content(lines):  # (lines, pixels): first and last line + 1 that are not border
        def border(line):
            far = np.abs(lines.astype(np.int16) - int(np.median(line))) > BORDER_TOLERANCE
            return far.mean(1) < 0.01
        first, last = int(np.argmin(border(lines[0]))), len(lines) - int(np.argmin(border(lines[-1])[::-1]))
        return (first, last) if last - first >= len(lines) / 5 else (0, len(lines))
    top, bottom = content(image)
    left, right = content(image[top:bottom].T)
    side = min(bottom - top, right - left)
    top, left = top + (bottom - top - side) // 2, left + (right - left - side) // 2
    return slice(top, top + side), slice(left, left + side)


def preprocess(image: np.ndarray, size: int) -> np.ndarray:
    """uint8 (H, W) -> uint8 (size, size): padded border removed, centre-cropped 1:1, resized [DiNO-Diff 2.5]."""
    return resize(image[square(image)], size)


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """uint8 (H, W) -> (size, size). CHOICE: bicubic with antialiasing; the paper names no filter."""
    return image if image.shape == (size, size) else np.array(Image.fromarray(image).resize((size, size), Image.BICUBIC))


# ---- Labels (paper 2.1): file -> (patient, findings) ----------------------------------------------------------------------

NO_FINDING = "No Finding"  # a statement about all labels, not a label of its own
MIMIC_LEFT_OUT = (NO_FINDING, "Lung Opacity", "Support Devices")  # common, but no diagnoses: not among the paper's seven


def read_labels(path) -> dict[str, tuple[str, tuple[str, ...]]]:
    """{file: (patient, labels)} from a CSV `file,patient,labels` with `|` between labels, from NIH ChestX-ray14's
    Data_Entry CSV (`Image Index`, `Patient ID`, `Finding Labels`), or from a folder that holds MIMIC-CXR's CSVs."""
    if Path(path).is_dir():
        return mimic_labels(path)
    table = {}
    for row in _rows(path):
        file = row.get("file") or row.get("Image Index")
        if not file:
            raise UserError(f"{path}: found the columns {', '.join(row)}, expected file,patient,labels (or Image Index, …)")
        labels = (row.get("labels") or row.get("Finding Labels") or "").split("|")
        table[file] = (row.get("patient") or row.get("Patient ID") or "", tuple(s.strip() for s in labels if s.strip()))
    if not table:
        raise UserError(f"{path} holds no rows; expected a first line file,patient,labels and a line for each image")
    return table


def csv_of(source) -> Path | None:
    """The CSV that `read_labels` can read beside a folder or archive (SOURCE.csv) or in the folder, where there is one."""
    source = Path(source).expanduser().absolute()
    for path in (source.parent / f"{source.name.split('.')[0]}.csv", *sorted(source.glob("*.csv"))):
        if path.is_file() and {"file", "Finding Labels"} & set(next(_rows(path), {})):
            return path
    return None


def mimic_labels(folder, prevalence: float = 0.04) -> dict[str, tuple[str, tuple[str, ...]]]:
    """MIMIC-CXR-JPG's `…metadata.csv[.gz]` and `…chexpert.csv[.gz]` in `folder` -> {dicom_id: (subject, findings)}.

    Frontal views only (AP, PA); findings present in at least `prevalence` of them, in the whole set the paper's seven.
    CHOICE: an uncertain label (-1) counts as absent, as does an empty one.
    """
    csvs = [next(iter(sorted(Path(folder).rglob(f"*{kind}.csv*"))), None) for kind in ("metadata", "chexpert")]
    if None in csvs:
        raise UserError(f"{folder}: MIMIC-CXR needs mimic-cxr-2.0.0-metadata.csv.gz and mimic-cxr-2.0.0-chexpert.csv.gz; "
                        f"found {[p.name for p in csvs if p] or 'neither'}")
    findings = {row["study_id"]: {k for k, v in row.items() if v in ("1", "1.0") and k not in MIMIC_LEFT_OUT}
                for row in _rows(csvs[1])}
    frontal = [r for r in _rows(csvs[0]) if r["ViewPosition"] in ("AP", "PA") and r["study_id"] in findings]
    counts = collections.Counter(name for r in frontal for name in findings[r["study_id"]] - {"subject_id", "study_id"})
    kept = {name for name, count in counts.items() if count >= prevalence * len(frontal)}
    return {r["dicom_id"]: (r["subject_id"], tuple(sorted(findings[r["study_id"]] & kept))) for r in frontal}


def is_mimic_test(key: str) -> bool:
    """Is this MIMIC-CXR key (files/p19/p19000293/…) or subject (19000293) in p19, the paper's held-out test set?"""
    return re.search(r"(^|/)p?19\d{6}(/|$)", key) is not None


def _rows(path):
    opener = gzip.open if str(path).endswith(".gz") else open
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
            yield from csv.DictReader(file)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not a readable CSV: {error}") from None


def _row(table: dict, path: str):
    """The row for a file: its path, then ever shorter ends of it, then its name without a suffix; None where there is none."""
    parts = path.split("/")
    names = ["/".join(parts[i:]) for i in range(len(parts))] + [parts[-1].rsplit(".", 1)[0]]
    return next((table[name] for name in names if name in table), None)


def label_names(labels) -> list[str]:
    """The set L of the paper's 2.4: every label that occurs, sorted, without "No Finding"."""
    return sorted({name for row in labels for name in row} - {NO_FINDING})


# ---- Splits and subsets (paper 2.4), by patient and reproducible ----------------------------------------------------------


def _patient_hashes(patients, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """-> group of each image (N,), hash of each group. An image whose patient is unknown ("") is a patient of its own."""
    groups, group = np.unique([p or f"\0{i}" for i, p in enumerate(patients)], return_inverse=True)
    digest = lambda name: int.from_bytes(hashlib.blake2b(str(name).encode(), digest_size=8).digest(), "big", signed=True)
    return group, hash64(seed, np.array([digest(name) for name in groups], dtype=np.int64))


def split_by_patient(patients, fraction: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Indices of two parts that share no patient; the second holds `fraction` of the images, to within one patient."""
    group, hashes = _patient_hashes(patients, seed)
    order = np.argsort(hashes)
    before = np.cumsum(np.bincount(group)[order]) - np.bincount(group)[order]  # images of the patients before, in hash order
    held_out = np.zeros(len(order), bool)
    held_out[order] = before + 0.5 < fraction * len(group)
    return np.flatnonzero(~held_out[group]), np.flatnonzero(held_out[group])


def folds_by_patient(patients, labels, k: int = 5, seed: int = 0) -> list[np.ndarray]:
    """k disjoint index arrays that cover all images, share no patient, and have each label in near-equal numbers.

    Greedy: patients with the rarest labels first, each to the fold that has least of that label, then fewest images.
    """
    group, hashes = _patient_hashes(patients, seed)
    if len(hashes) < k:
        raise UserError(f"{k} folds need at least {k} patients; found {len(hashes)}")
    names = label_names(labels)
    has = np.array([[name in row for name in names] for row in labels], dtype=np.int64).reshape(len(group), len(names))
    counts = np.zeros((len(hashes), len(names) + 1), np.int64)         # (patients, L + 1), the last column counts images
    np.add.at(counts, group, np.concatenate([has, np.ones((len(group), 1), np.int64)], 1))
    rarity = np.append(has.sum(0), len(group) + 1)                     # images without a label come last
    rarest = np.where(counts > 0, rarity, len(group) + 2).argmin(1)
    fold, totals = np.zeros(len(hashes), np.int64), np.zeros((k, len(names) + 1), np.int64)
    for p in np.lexsort((hashes, rarity[rarest])):
        fold[p] = np.lexsort((totals[:, -1], totals[:, rarest[p]]))[0]
        totals[fold[p]] += counts[p]
    return [np.flatnonzero(fold[group] == f) for f in range(k)]


def balanced_subsets(labels, sizes, seed: int = 0) -> dict[int, np.ndarray]:
    """{n: indices (n,)} with n / card(L) images for each label, without replacement, nested: X_50 in X_100 in … [DiNO-Diff 2.4]

    Labels take turns, the rarest first, each drawing the next of its images that none has drawn; X_n is the first n draws.
    CHOICE: a label draws its images that hold a rarer label last, for that one will need them.
    A size for which some label runs out is left out, with a message; UserError where that is every size.
    """
    names = label_names(labels)
    holders = {name: [i for i, row in enumerate(labels) if name in row] for name in names}
    names.sort(key=lambda name: (len(holders[name]), name))
    queues = {}
    for k, name in enumerate(names):
        rarer = [not set(names[:k]).isdisjoint(labels[i]) for i in holders[name]]
        queues[name] = iter(np.array(holders[name])[np.lexsort((hash64(seed, k, holders[name]), rarer))].tolist())
    drawn, short = {}, None
    while names and not short and len(drawn) < max(sizes):
        for name in names:
            i = next((i for i in queues[name] if i not in drawn), None)
            if i is None:
                short = f"{name!r} ran out after {len(drawn)} draws (it has {len(holders[name])} images, some drawn for others)"
                break
            drawn[i] = name
    picks = list(drawn)
    subsets = {n: np.array(picks[:n]) for n in sorted(sizes) if n <= len(picks)}
    if not subsets:
        raise UserError(f"no balanced subset of {min(sizes)} images: " + (short or f"{len(labels)} images carry no label"))
    if len(subsets) < len(sizes):
        print(f"balanced subsets {[n for n in sizes if n not in subsets]} left out: {short}", file=sys.stderr)
    return subsets


# ---- Phantoms: chest X-rays made from a seed ------------------------------------------------------------------------------

FINDINGS = ("Effusion", "Cardiomegaly", "Consolidation", "Pneumothorax", "Nodule")
PREVALENCE = (0.20, 0.18, 0.19, 0.17, 0.20)  # of patients, drawn independently: 35 % of patients have none
LETTERS = {"L": (8, 8, 8, 8, 15), "R": (14, 9, 14, 10, 9)}  # lead markers: five rows of four bits


def _chord(d):
    """Half the length of the ray that passes a ball or rod of radius 1 at distance d: the shadow of all that is round."""
    return np.sqrt(np.maximum(1 - d * d, 0))


def _soft(f, width):
    """0 where f <= 0, 1 where f >= width, smooth between."""
    s = np.clip(f / width, 0, 1)
    return s * s * (3 - 2 * s)


def render_phantom(seed: int, patient: int, visit: int, size: int,
                   findings: tuple[str, ...] | None = None) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """A frontal chest X-ray of an imaginary patient -> image uint8 (size, size), masks bool (2, size, size), labels.

    A pure function of its arguments, for any size >= 32. (seed, patient) give the anatomy and its diseases; `visit` gives pose,
    breath, exposure, grain, and whether a disease shows that day (9 in 10; a large heart always does). `findings` replaces the
    labels that were drawn and leaves all else alone: the same film with and without a disease.
    masks[0] is the patient's left lung, which is on the picture's right; masks[1] the right lung. They hold the lung field
    above the diaphragm's dome: consolidated lung, nodules and the air of a pneumothorax included; heart, mediastinum and
    pleural fluid excluded, so an effusion cuts its meniscus out of the mask.

    A film records the share of a beam that survives, I = I0 exp(-A), where A sums attenuation x thickness of the tissues on the
    ray [Beer-Lambert]. So each organ adds a map of thickness to A, air takes thickness away, and the film is developed last.
    """
    draw = iter(uniforms(96, seed, patient, 0).tolist()).__next__  # TRAP: NumPy's own scalars would make the maps float64
    today = iter(uniforms(32, seed, patient, visit, 1).tolist()).__next__
    between = lambda low, high, u=draw: low + (high - low) * u()
    sick, shows = [draw() < p for p in PREVALENCE], [today() < 0.9 for _ in FINDINGS]
    drawn = [n for n, a, b in zip(FINDINGS, sick, shows) if a and (b or n == "Cardiomegaly")]
    labels = tuple(n for n in FINDINGS if n in (drawn if findings is None else findings))

    # Coordinates: the picture is [-1, 1]^2, y down. X, Y on the film; x, y in the patient, whose left is x > 0.
    over = 2 if size <= 128 else 1                                 # supersampling
    N = size * over
    X = ((np.arange(N, dtype=np.float32) + 0.5) * (2 / N) - 1)[None]
    Y = X.T
    angle, zoom = between(-0.05, 0.05, today), between(0.95, 1.06, today)
    dx, dy = between(-0.05, 0.05, today), between(-0.04, 0.04, today)
    c, s = float(np.cos(angle)), float(np.sin(angle))
    bend, phase = between(-0.025, 0.025), between(0, 6.3)          # a slightly curved spine takes everything with it
    y = ((Y - dy) * c - (X - dx) * s) / zoom
    x = ((X - dx) * c + (Y - dy) * s) / zoom - bend * np.sin(2 * y + phase)
    ax, left = np.abs(x), np.float32(x > 0)

    # Habitus; lengths in halves of the picture's side
    w, apex, dome = between(0.61, 0.78), between(-0.75, -0.62), between(0.32, 0.48) + between(-0.04, 0.03, today)
    thick, middle, drop = between(2.2, 3.1), between(0.10, 0.14), between(0.02, 0.10)
    large = "Cardiomegaly" in labels
    ratio, tilt, slim = draw(), between(0.5, 0.7) - 0.2 * large, between(0.70, 0.78) - 0.1 * large
    ratio = 0.56 + 0.08 * ratio if large else 0.39 + 0.08 * ratio  # cardiothoracic: width of the heart / width of the chest
    ct, st = float(np.cos(tilt)), float(np.sin(tilt))
    a = ratio * w / (ct**2 + (slim * st) ** 2) ** 0.5              # the root is half the width of a tilted ellipse with a = 1
    hx, hy = between(0.30, 0.38) * ratio * w, dome + drop + between(0.05, 0.09) - a * (st**2 + (slim * ct) ** 2) ** 0.5
    side, both, height = draw() < 0.5, draw() < 0.3, between(0.60, 0.86) * between(0.93, 1.07, today)
    fluid_left, fluid_right = (height * (side or both), height * (both or not side)) if "Effusion" in labels else (0.0, 0.0)

    def wall(ax, y):
        """x of the chest wall at height y; distance to it, positive inside; 0 at the apex to 1 at the bottom of the lung."""
        u = np.clip((y - apex) / (0.70 - apex), 0, 1)
        v = (1 - u) * (1 - u)
        lateral = 0.28 + (w - 0.28) * np.sqrt(1 - v * v * (1.3 - 0.3 * v)) - 0.03 * u * u
        return lateral, np.minimum(lateral - ax, (y - apex) * 0.8), u

    def lung(x, y):
        """Distance (nearly) to the edge of the lung with air in it, positive inside; the same without fluid; wall; heart."""
        ax, left = np.abs(x), np.float32(x > 0)
        lateral, inside, u = wall(ax, y)
        heart = np.hypot((x - hx) * (ct / a) + (y - hy) * (st / a), ((y - hy) * ct - (x - hx) * st) / (a * slim))
        knob = 0.04 * left * np.exp(-np.square((y + 0.25) / 0.08))  # the arch of the aorta
        medial = ax - 0.28 + (0.28 - middle) * _chord(np.maximum(1 - u / 0.35, 0)) - knob
        border = (heart - 1) * (a * 0.5)                           # half a gradient: the beating heart's border is soft
        fillet = np.square(np.maximum(0.08 - np.abs(medial - border), 0)) / 0.32  # makes the minimum below a smooth one
        t = np.clip((ax - 0.32) / (w - 0.32), -1, 1.1)
        t2, top = t * t, dome + left * drop - y
        f = np.minimum(np.minimum(inside, np.minimum(medial, border) - fillet), top + 0.05 * t2 + 0.17 * t2 * t2 * (t > 0))
        level = (fluid_left * left + fluid_right * (1 - left)) * (0.5 + 0.5 * np.maximum(t, 0) * t2)
        return np.minimum(f, top + 0.32 - level), f, lateral, heart  # the level climbs at the chest wall: the meniscus

    f, dry, lateral, heart = lung(x, y)
    t = ax / lateral                                               # 0 at the spine, 1 at the chest wall

    def places(need, kind):
        """Random points of the chest, those first that lie `need` or more inside the lung -> [[x, y], ...]."""
        spots = (uniforms(2, seed, patient, 2, kind, np.arange(48)) * 2 - 1) * (w, 0.7) - (0, 0.05)
        return spots[np.argsort(-np.minimum(lung(*spots.T)[0], need), kind="stable")].tolist()

    # Soft tissue: trunk, shoulders and neck; arms; breasts
    trunk = ax / (w + between(0.12, 0.22) + 0.6 * np.exp(-np.square((y + 0.75) / 0.35)))
    shoulder = y - between(-0.86, -0.78) - 0.10 * ax + 0.5 * np.exp(-np.square(ax / between(0.26, 0.32)))
    body = thick * np.sqrt(_chord(trunk)) * (0.6 + 0.4 * _soft(y + 0.8, 0.6)) * _chord(1 - np.clip(shoulder / 0.3, 0, 1))
    arm = ax - between(1.02, 1.2) - 0.25 * y
    A = np.maximum(body, (1.5 * _chord(arm / 0.2) + 0.6 * _chord(arm / 0.06)) * _soft(y + 0.7, 0.4))
    breasts, bx, by, br, bt = draw() < 0.4, between(0.36, 0.42), between(0.14, 0.26), between(0.28, 0.36), between(0.3, 0.5)
    if breasts:
        A = A + bt * _chord(np.hypot((ax - bx) * 0.9, y - by) / br) * _soft(y - by + br, 2 * br)

    # Air, and what fills, frees or interrupts it
    air = between(0.56, 0.62) * _chord(1 - np.clip(f / 0.14, 0, 1))
    waves = sum(np.cos(between(-16, 16) * x + between(-16, 16) * y + between(0, 6.3)) for _ in range(5))  # a cloudy texture
    air = air * (1 + 0.02 * waves)
    radius, dense = between(0.17, 0.26) * between(0.9, 1.1, today), between(0.6, 0.9)
    if "Consolidation" in labels:
        cx, cy = places(0.12, 0)[0]
        air = air * (1 - dense * _soft(1.35 - np.hypot(x - cx, y - cy) / radius + 0.10 * waves, 0.7))
    markings = _soft(f, 0.04)
    collapsed, keeps = np.float32((draw() < 0.5) == left), between(0.66, 0.82)
    if "Pneumothorax" in labels:                                   # the lung shrinks towards its hilum, bare air replaces it
        rim = wall(0.16 + (ax - 0.16) / keeps, 0.08 + (y - 0.08) / keeps)[1]
        pleural = collapsed * _soft(-rim, 0.02)
        air = air * (1 + 0.16 * pleural - 0.15 * collapsed * (rim > 0))
        markings = markings * (1 - pleural)
        A = A + 0.5 * collapsed * _soft(f, 0.02) * np.exp(-np.square(rim / 0.016))  # its skin, seen from the side
    A = A - body * air + 0.35 * _soft(dry, 0.05) * _soft(dry - f, 0.15)  # water is denser than the tissue it pushes away
    radius, count = between(0.068, 0.11), 1 + int(3 * draw())
    if "Nodule" in labels:
        for nx, ny in places(1.1 * radius, 1)[:count]:
            A = A + 0.95 * _soft(1.1 - np.hypot(x - nx, y - ny) / radius, 0.6)

    # Mediastinum: heart, aortic knob, hila; belly with the stomach's bubble; windpipe and main bronchi
    A = A + 0.6 * _chord(heart) + 0.3 * _soft(middle + 0.03 - ax, 0.06) + 0.3 * _soft(y - dome, 0.5)
    A = A + 0.3 * _chord(np.hypot(x - middle - 0.02, y + 0.26) / 0.09)
    A = A + 0.25 * np.exp(-np.square((ax - 0.19) / 0.07) - np.square((y + 0.06 * left) / 0.13))
    bubble, gx, gy, gw, gh = draw(), between(0.25, 0.4), dome + drop + 0.20, between(0.10, 0.18), between(0.05, 0.12, today)
    if bubble < 0.6:                                               # round above, flat below: air over water
        A = A - between(0.7, 1.2, today) * _chord(np.hypot((x - gx) / gw, (y - gy) / gh)) * _soft(gy + 0.05 - y, 0.02)
    A = A - 0.55 * _chord(np.where(y < -0.2, x + 0.01, ax - 0.6 * (y + 0.2)) / 0.045) * _soft(-y, 0.15)

    # Bones. One periodic coordinate draws all ribs of a kind: behind, sloping down outwards; in front, fainter, down inwards
    hollow = lambda d: 1.5 * _chord(d) - 0.5 * _chord(1.35 * d)    # dense rind, light core
    A = A + 0.5 * _chord(x / 0.085) * (0.75 + 0.25 * np.cos(y * (6.28 / between(0.13, 0.16)))) + 0.15 * _chord(x / 0.03)
    gap, first, radius, slope = between(0.14, 0.165), apex + between(0.04, 0.09), between(0.030, 0.038), between(0.16, 0.26)
    cage = _soft(1.04 - t, 0.06) * (1 + 0.5 * t * t) * _soft(ax - 0.05, 0.06) * (0.45 + 0.55 * _soft(f + 0.05, 0.06))
    for arc, strength, last in ((slope * t * t * t - 0.07 * t, 0.32, 10),
                                (slope - 0.07 + (1 - t) * between(0.40, 0.55), 0.18 * _soft(t - 0.35, 0.2), 7)):
        k = (y - first - arc) / gap
        A = A + cage * strength * hollow((k - np.clip(np.rint(k), 0, last)) * (gap / radius))
    h = np.clip((ax - 0.07) / 0.75, 0, 1)
    collarbone = (y - between(-0.54, -0.47) + between(0.05, 0.13) * h - 0.05 * np.sin(5 * h)) / (0.045 - 0.06 * h * (1 - h))
    A = A + 0.4 * hollow(collarbone) * _soft(ax - 0.06, 0.02) * _soft(0.85 - ax, 0.03)
    A = A + 0.16 * _soft(ax - 0.60 - 0.28 * (y + 0.4), 0.02) * _soft(0.06 - y, 0.1) * _soft(y + 0.6, 0.1)  # shoulder blades

    # Vessels: trees that branch from the hila, dotted onto the grid and blurred to their calibre
    px, py, way = np.tile([0.17, -0.17], 7), np.tile([-0.03, 0.03], 7), np.repeat(np.linspace(-1.35, 1.45, 7), 2)
    out, length, calibre, vessels = np.sign(px), 0.20, 0.017, 0
    for generation in range(4):
        u = uniforms(3, seed, patient, 3, generation, np.arange(len(px)))
        dots = max(8, round(length * N / 2))
        step = np.linspace(0, 1, dots)[:, None] * (length * (0.7 + 0.6 * u[:, 0]))
        way = way + (u[:, 1] - 0.5) * (0.4 + 5 * step)             # (dots, branches)
        px, py = px + out * np.cos(way) * step, py + np.sin(way) * step
        qx, qy = px + bend * np.sin(2 * py + phase), py            # the coordinates' formulas, backwards: patient to film
        col, row = ((zoom * q + d + 1) * (N / 2) for q, d in ((qx * c - qy * s, dx), (qx * s + qy * c, dy)))
        cell = np.clip(row, 0, N - 1).astype(int) * N + np.clip(col, 0, N - 1).astype(int)
        counts = np.bincount(cell.ravel(), minlength=N * N).astype(np.float32).reshape(N, N)
        weight = calibre * N * 1.25 * (length * N / 2 / dots) * 0.8 ** (generation + 1)  # 1.25: sqrt(2 pi) / 2
        vessels = vessels + weight * ndimage.gaussian_filter(counts, max(calibre * N / 2, 0.6), truncate=3)
        px, py, out = np.repeat(px[-1], 2), np.repeat(py[-1], 2), np.repeat(out, 2)
        way = np.repeat(way[-1], 2) + np.tile([-0.4, 0.4], len(u)) * np.repeat(0.6 + 0.8 * u[:, 2], 2)
        length, calibre = length * 0.72, calibre * 0.72
    A = A + 0.6 * markings * np.tanh(vessels)

    # Metal: a lead marker on the film, now and then a pacemaker and its wire
    marker, mx, my = today(), between(0.72, 0.85, today), between(-0.92, -0.84, today)
    if marker < 0.4:
        letter, mx = ("L", mx) if marker < 0.2 else ("R", -mx)
        i, j = np.floor((Y - my) / 0.034 + 2.5).astype(int), np.floor((X - mx) / 0.034 + 2).astype(int)
        ink = np.array(LETTERS[letter])[i.clip(0, 4)] >> (3 - j.clip(0, 3)) & (np.abs(i - 2) < 3) & (np.abs(j - 1.5) < 2)
        A = A + 3 * ink.astype(np.float32)
    if draw() < 0.05:
        A = A + 2.5 * _soft(1 - np.square(np.square((x - 0.5) / 0.12)) - np.square(np.square((y + 0.42) / 0.09)), 0.3)
        wire = np.sqrt(np.hypot(np.square((x - 0.5) / 0.5), np.square((y - 0.25) / 0.7))) - 1
        A = A + _chord(wire / 0.024) * ((x < 0.5) & (y < 0.25))

    # Film: few photons arrive behind thick parts, so the grain is coarser there; the film answers with an S-curve.
    A, f, x = (np.einsum("iajb->ij", m.reshape(size, over, size, over)) / over**2 for m in (A, f, x))
    masks = np.stack([(f > 0) & (x > 0), (f > 0) & (x <= 0)])
    grain = np.random.Generator(np.random.Philox(key=int(hash64(seed, patient, visit, 4)))).standard_normal(A.shape, np.float32)
    A = A + between(0.008, 0.022, today) * (size / 256) * np.exp(np.minimum(A, 4) / 2) * grain  # larger pixels count more photons
    timer, contrast = 0.70 * thick + between(-0.12, 0.12, today), between(0.55, 0.72, today)  # thick bodies are exposed longer
    image = (255 / (1 + np.exp((timer - A) / contrast))).astype(np.uint8)
    return image, masks, labels


# ---- Sets of X-rays -------------------------------------------------------------------------------------------------------

LANES = 4   # remote shards fetched at a time
TRIES = 3   # of fetching one, with a pause between
WINDOW = 8  # CHOICE: shards within which images are permuted; also what a cache of remote shards keeps at hand


class Images:
    """A set of X-rays. len(ds); ds[i] -> uint8 (size, size); ds.keys[i], ds.patients[i], ds.providers[i] str ("" is unknown);
    ds.labels[i] tuple of str; ds.mask(i) -> bool (2, size, size), the patient's left and right lung, or None.

    A kind of set says how to `read(i)`. What raises Unreadable there is noted once in `ds.unreadable`, with a message, and
    replaced by another image of its shard, always the same one, so that an epoch keeps its length and its order.
    """

    def __init__(self, name: str, size: int, keys, patients, providers, labels, starts=None):
        self.name, self.size, self.keys = name, size, keys
        self.patients, self.providers, self.labels = patients, providers, labels
        self.starts = np.array([0, len(keys)]) if starts is None else starts  # first image of each shard, and the end
        self.unreadable: list[tuple[str, str]] = []

    @property
    def has_labels(self) -> bool:
        return any(self.labels)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, i: int) -> np.ndarray:
        i = range(len(self))[i]
        for attempt in range(64):
            shard = np.searchsorted(self.starts, i, "right") - 1
            low, high = (self.starts[shard], self.starts[shard + 1]) if attempt < 16 else (0, len(self))
            j = i if attempt == 0 else int(low + hash64(i, attempt) % np.uint64(high - low))
            try:
                return self.read(j)
            except Unreadable as error:
                self.note(self.keys[j], error.reason)
        raise UserError(f"{self.name}: 64 images in a row cannot be read, at last {self.keys[j]}: {self.unreadable[-1][1]}")

    def read(self, i: int) -> np.ndarray:
        raise NotImplementedError

    def mask(self, i: int) -> np.ndarray | None:
        return None

    def note(self, key: str, reason: str) -> None:
        """Remember an unreadable image; say so once."""
        if key not in (k for k, _ in self.unreadable):
            self.unreadable.append((key, reason))
            if torch.utils.data.get_worker_info() is None:
                print(f"{self.name}: {key} cannot be read ({reason}); another image takes its place", file=sys.stderr)

    def windows(self, seed: int, epoch: int) -> list[np.ndarray]:
        """The shards in the order of an epoch, WINDOW at a time."""
        order = np.argsort(hash64(seed, epoch, 1, np.arange(len(self.starts) - 1)))
        return [order[k:k + WINDOW] for k in range(0, len(order), WINDOW)]

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """int64 (len,): each image once, the shards permuted and the images permuted within WINDOW shards."""
        window = np.empty(len(self.starts) - 1, np.int64)
        for k, shards in enumerate(self.windows(seed, epoch)):
            window[shards] = k
        return np.lexsort((hash64(seed, epoch, 0, np.arange(len(self))), np.repeat(window, np.diff(self.starts))))

    def fetch_ahead(self, seed: int, position: list[int], stop: threading.Event, lane: int) -> None:
        """What `batches` runs in LANES threads; sets whose images are at hand have nothing to do."""


def open_data(spec: str, size: int, seed: int = 0, offline: bool = False, cache_gb: float = 20.0, count: int | None = None,
              labels: str | None = None) -> Images:
    """Open `spec` as a set of X-rays of `size` pixels.

    spec: `phantom` (`count` of them, 2048 by default) | a folder of images, with `labels` or a CSV in it or beside it
    (FOLDER.csv) where there is one, or with masks as in `lung_sets` | a quoted glob of tar shards, or a folder of them |
    hf://datasets/OWNER/NAME/GLOB | pipe:COMMAND {shard}, where COMMAND writes the shard to its standard output.
    Remote shards pass through a local cache of `cache_gb`; `offline` uses what is there. `count` keeps the first images.
    """
    if spec == "phantom":
        return Phantoms(size, count or 2048, seed)
    path = Path(spec).expanduser()
    is_shards = path.is_dir() and ((path / INDEX).exists() or any(path.glob("*.tar")) and not _pictures(path))
    if path.is_dir() and not is_shards:
        return Folder(path, size, labels, count)
    if labels:
        raise UserError(f"--labels {labels} goes with a folder of images; shards carry their own: give it to data.py prepare")
    if spec.startswith(("hf://", "pipe:")):
        return Shards(spec, size, Remote(spec, cache_gb, offline), count)
    if is_shards:
        return Shards(str(path / "*.tar"), size, None, count)
    if "*" in spec or "?" in spec or path.suffix == ".tar":
        return Shards(str(path), size, None, count)
    raise UserError(f"--data {spec}: no such folder; expected phantom, a folder of X-rays, a quoted glob like 'shards/*.tar', "
                    "hf://datasets/OWNER/NAME/GLOB or 'pipe:COMMAND {shard}'")


def _pictures(folder: Path) -> list[str]:
    """Paths (relative, sorted) of all image files under `folder`; files without a suffix count when they are DICOM."""
    found = []
    for root, folders, files in os.walk(folder, followlinks=True):
        folders.sort()
        for name in files:
            path = os.path.join(root, name)
            if not name.startswith(".") and (name.lower().endswith(PICTURES) or "." not in name and _is_dicom(path)):
                found.append(os.path.relpath(path, folder))
    return sorted(found)


def _is_dicom(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"


class Folder(Images):
    """A folder of images: each file whole, its labels from a CSV, its lung masks from files of the same name."""

    def __init__(self, folder, size: int, labels: str | None = None, count: int | None = None):
        folder = self.folder = Path(folder).absolute()
        files = _pictures(folder)
        self.masks, files = _pair_masks(files)
        files = files[:count]
        if not files:
            raise UserError(f"{folder} holds no X-rays: found {sum(1 for _ in folder.rglob('*'))} files and folders, expected "
                            f"{' '.join(PICTURES)} (and for zip or tar files, data.py prepare first)")
        csv_file = labels or csv_of(folder)
        table = read_labels(csv_file) if csv_file else {}
        row = lambda file: _row(table, f"{folder.as_posix()}/{file}")
        if csv_file and Path(csv_file).is_dir():  # MIMIC's tables name the frontal views alone
            files = [file for file in files if row(file)]
            if not files:
                raise UserError(f"{csv_file} names none of the images in {folder} as a frontal view")
        rows = [row(file) or ("", ()) for file in files]
        if csv_file and not any(r != ("", ()) for r in rows):
            print(f"{csv_file}: none of its {len(table)} files is among the {len(files)} of {folder}", file=sys.stderr)
        patients = [patient or (Path(file).stem if file in self.masks else "") for (patient, _), file in zip(rows, files)]
        super().__init__(folder.name, size, files, patients, [folder.name] * len(files), [found for _, found in rows])

    def content(self, i: int) -> Path:
        return self.folder / self.keys[i]

    def read(self, i: int) -> np.ndarray:
        return preprocess(load_image(self.content(i)), self.size)

    def mask(self, i: int) -> np.ndarray | None:
        """bool (2, size, size), cut as its image was; nearest neighbours. Without masks: None."""
        if self.keys[i] not in self.masks:
            return None
        image, lungs = load_image(self.content(i)), []
        for file in self.masks[self.keys[i]]:
            mask = load_image(self.folder / file)
            mask = Image.fromarray(mask > mask.max() // 2).resize(image.shape[::-1], Image.NEAREST)  # SCR's have half the size
            mask = Image.fromarray(np.array(mask)[square(image)])
            lungs.append(np.array(mask.resize((self.size, self.size), Image.NEAREST)))
        lungs = lungs if len(lungs) == 2 else _two_lungs(lungs[0])
        middles = [np.nonzero(lung)[1].mean() if lung.any() else 0.0 for lung in lungs]
        return np.stack(lungs if middles[0] >= middles[1] else lungs[::-1])  # the patient's left is the picture's right


MASK_FOLDERS = re.compile(r"masks?|(left|right)[ _]?(mask|lung)s?", re.I)
OTHER_ORGANS = re.compile(r"heart|(left|right) clavicle", re.I)  # of JSRT's SCR masks


def _pair_masks(files: list[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Of all files in a folder -> {image: its mask files}, images. Without any mask, all files are images, none is paired.

    images/ + masks/ · JSRT's *.IMG + SCR's left lung/, right lung/ · CXR_png/ + ManualMask/leftMask/, rightMask/ (Montgomery)
    · CXR_png/ + mask/*_mask.png (Shenzhen). Where there are masks, an image without one is left out.
    """
    organ = lambda file: Path(file).parent.name
    masks = collections.defaultdict(list)
    for file in files:
        if MASK_FOLDERS.fullmatch(organ(file)):
            others = masks[re.sub(r"_mask$", "", Path(file).stem)]
            if organ(file) in map(organ, others):
                raise UserError(f"found two masks of one name, {others[0]} and {file}: these are several sets; name one at a time")
            others.append(file)
    images = [f for f in files if not MASK_FOLDERS.fullmatch(organ(f)) and not OTHER_ORGANS.fullmatch(organ(f))]
    paired = {f: masks[Path(f).stem][:2] for f in images if Path(f).stem in masks}
    return paired, (list(paired) if paired else images)


def _two_lungs(mask: np.ndarray) -> list[np.ndarray]:
    """One mask of both lungs -> two: each connected part to the side its centre is on; lungs in one piece are cut."""
    columns = np.nonzero(mask.any(0))[0]
    if not len(columns):
        return [mask, mask]
    parts, count = ndimage.label(mask)
    x = np.broadcast_to(np.arange(mask.shape[1]), mask.shape)
    if np.bincount(parts[mask]).max() < 0.75 * mask.sum():
        x = np.concatenate([[0], ndimage.mean(x, parts, range(1, count + 1))])[parts]
    return [mask & (x >= columns[[0, -1]].mean()), mask & (x < columns[[0, -1]].mean())]


def lung_sets(folder, size: int) -> dict[str, Folder]:
    """{name: set with masks} of JSRT, Montgomery, Shenzhen or any images/ + masks/: `folder` is one or holds several."""
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected one with lung masks, or a folder of such folders")
    sets = {}
    for place in sorted(p for p in folder.iterdir() if p.is_dir()):
        if _pair_masks(_pictures(place))[0]:
            sets[place.name] = Folder(place, size)
    if not sets and _pair_masks(_pictures(folder))[0]:
        sets[folder.name] = Folder(folder, size)
    if not sets:
        raise UserError(f"{folder} holds no lung masks: expected images/ and masks/, CXR_png/ and ManualMask/ or mask/, "
                        "or JSRT's .IMG files with SCR's left lung/ and right lung/")
    return sets


class Phantoms(Images):
    """Imaginary patients, VISITS X-rays each, drawn by `render_phantom` once on a machine and then kept in its cache folder."""

    VISITS = 4

    def __init__(self, size: int, count: int = 2048, seed: int = 0):
        cases = [(seed, i // self.VISITS, i % self.VISITS, size) for i in range(count)]
        version = hashlib.blake2b(inspect.getsource(render_phantom).encode(), digest_size=6).hexdigest()  # drawn anew when it changes
        path = cache_folder() / "phantoms" / f"{size}px-{count}-seed{seed}-{version}.safetensors"
        with locked(path):
            if not path.exists():
                for old in path.parent.glob(f"{size}px-{count}-seed{seed}-*.safetensors"):
                    old.unlink(missing_ok=True)
                with process_pool() as pool:
                    drawn = list(progress(pool.map(_draw, cases, chunksize=32), "drawing phantoms", count, " images"))
                images, masks, labels = zip(*drawn)
                save_state(path, {"images": torch.from_numpy(np.stack(images)), "masks": torch.from_numpy(np.stack(masks))},
                           {"labels": labels})
        tensors, info = load_state(path)
        self.images, self.masks = tensors["images"].numpy(), tensors["masks"].numpy()  # (N, S, S), (N, 2 S S / 8)
        keys, patients = [f"phantom-{p:05d}-{v}" for _, p, v, _ in cases], [f"{p:05d}" for _, p, _, _ in cases]
        super().__init__("phantom", size, keys, patients, ["phantom"] * count, [tuple(found) for found in info["labels"]])

    def read(self, i: int) -> np.ndarray:
        return self.images[i]

    def mask(self, i: int) -> np.ndarray:
        return np.unpackbits(self.masks[i], count=2 * self.size**2).reshape(2, self.size, self.size).astype(bool)


def _draw(case):
    image, masks, labels = render_phantom(*case)
    return image, np.packbits(masks), labels


def cache_folder() -> Path:
    """For drawn phantoms, fetched shards and indices: $DINODIFF_CACHE or ~/.cache/dinodiff, else in the temporary folder."""
    home = Path(os.environ.get("DINODIFF_CACHE") or Path.home() / ".cache" / "dinodiff")
    try:
        home.mkdir(parents=True, exist_ok=True)
        return home if os.access(home, os.W_OK) else Path(tempfile.gettempdir()) / "dinodiff"
    except OSError:
        return Path(tempfile.gettempdir()) / "dinodiff"


@contextlib.contextmanager
def locked(path: Path):
    """One process at a time for what leads to `path`: ranks and workers of one machine do the work once."""
    import fcntl
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # TRAP: closing would not do: a process forked in the meantime holds the file too


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def process_pool(workers: int | None = None, start: str | None = None) -> ProcessPoolExecutor:
    """Worker processes of one torch thread each (one a core) that end with their parent, even where it is killed.

    start: multiprocessing's start method; "spawn" where the parent has computed with several threads.
    """
    return ProcessPoolExecutor(workers or cores(), get_context(start), _end_with, (os.getpid(),))


def _end_with(parent: int) -> None:
    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)
    torch.set_num_threads(1)
    threading.Thread(target=watch, daemon=True).start()


# ---- Shards: tar files and one index (paper 2.5: "storing and streaming data directly from the bucket") --------------------

# A shard is a plain tar of pairs `key.png` + `key.json`, as the webdataset library writes and reads them. The index beside the
# shards says where in which shard each image lies, so any image is one seek and one read, in any order.
INDEX = "index.safetensors"


class Column:
    """One field of an index's rows, each decoded when asked for, so a million open in no time. Field 3 is the labels."""

    def __init__(self, text: np.ndarray, end: np.ndarray, field: int):
        self.text, self.end, self.field = text, end, field

    def __len__(self) -> int:
        return len(self.end)

    def __getitem__(self, i: int):
        i = range(len(self.end))[i]
        fields = self.text[self.end[i - 1] if i else 0:self.end[i]].tobytes().decode().split("\t")
        return tuple(filter(None, fields[3].split("|"))) if self.field == 3 else fields[self.field]


def scan_shard(path) -> tuple[list[tuple[int, int, int, str]], str]:
    """A tar -> rows (offset, length, size, "key, patient, provider, labels" between tabs), and what is wrong with it, or "".

    TRAP: tarfile takes a tar that was cut between two members, or has a damaged header, for a whole one: it must end in two
    empty blocks.
    """
    texts, images, problem = {}, {}, ""
    try:
        with tarfile.open(path, "r:") as tar:
            for member in filter(tarfile.TarInfo.isfile, tar):
                folder, slash, name = member.name.rpartition("/")
                key, _, suffix = name.partition(".")                   # webdataset's rule: the key ends at the first dot
                if suffix == "json":
                    texts[folder + slash + key] = tar.extractfile(member).read()
                elif f".{suffix.lower()}".endswith(PICTURES):
                    images[folder + slash + key] = (member.offset_data, member.size)
        with open(path, "rb") as file:
            file.seek(tar.offset)
            if file.read(1024) != bytes(1024):
                problem = f"cut short or damaged at byte {tar.offset:,}: no end-of-archive mark there"
    except (tarfile.TarError, OSError, EOFError) as error:
        problem = f"cut short or no tar: {error}"
    rows, there = [], os.path.getsize(path)
    for key, (offset, length) in images.items():
        try:
            info = dict(json.loads(texts.get(key, b"{}")))
        except (ValueError, TypeError):
            info = {}                                                  # somebody else's JSON: no patient, no labels
        fields = (key, info.get("patient", ""), info.get("provider", ""), "|".join(map(str, info.get("labels") or ())))
        if offset + length <= there:
            rows.append((offset, length, int(info.get("size") or 0), "\t".join(str(f).replace("\t", " ") for f in fields)))
    return rows, problem


def write_index(path, shards: dict[str, tuple[int, list[tuple]]]) -> None:
    """{shard: (its bytes, its rows)} -> one safetensors file; the shards' names and sizes are in its metadata."""
    rows = [row for _, part in shards.values() for row in part]
    offset, length, size, text = list(zip(*rows)) or [()] * 4
    text = [t.encode() for t in text]
    arrays = {"count": [len(part) for _, part in shards.values()], "offset": offset, "length": length, "size": size,
              "end": np.cumsum([len(t) for t in text])}
    tensors = {name: torch.from_numpy(np.array(values, np.int64)) for name, values in arrays.items()}
    tensors["text"] = torch.from_numpy(np.frombuffer(b"".join(text), np.uint8).copy())
    write_file(path, save(tensors, metadata={"shards": json.dumps({name: bytes_ for name, (bytes_, _) in shards.items()})}))


def read_index(path) -> tuple[dict[str, int], dict[str, np.ndarray]]:
    """-> {shard: bytes}, arrays count (shards,) · offset, length, size, end (images,) · text, all memory-mapped."""
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads(file.metadata()["shards"]), {k: file.get_tensor(k).numpy() for k in file.keys()}
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged or not an index of shards: {error}; remove it, and it is made again") from None


def _index_folder(folder: Path, names: list[str]) -> tuple[dict[str, int], dict[str, np.ndarray]]:
    """The index of a folder; made, in the cache where it is read-only, unless it has these shards as they are."""
    digest = hashlib.blake2b(str(folder.absolute()).encode(), digest_size=8).hexdigest()
    places = folder / INDEX, cache_folder() / "indices" / f"{digest}.safetensors"
    with locked(places[1]):
        for place in places:
            known, arrays = read_index(place) if place.exists() else ({}, {})
            if all(known.get(name) == (folder / name).stat().st_size for name in names):
                return known, arrays
        shards = {}
        everything = sorted({*folder.glob("*.tar"), *(folder / name for name in names)})
        for path in progress(everything, f"indexing {folder}", unit=" shards"):
            rows, problem = scan_shard(path)
            if problem:
                print(f"{path}: {problem}; its first {len(rows)} images are used", file=sys.stderr)
            shards[path.name] = (path.stat().st_size, rows)
        try:
            write_index(places[0], shards)
            return read_index(places[0])
        except OSError:
            write_index(places[1], shards)
            return read_index(places[1])


class Shards(Images):
    """Tar shards, local or remote. The shards of a local glob may lie in several folders, each with its index."""

    def __init__(self, spec: str, size: int, remote: Remote | None = None, count: int | None = None):
        self.remote, self.shards, starts, pieces, base = remote, [], [0], collections.defaultdict(list), 0
        paths = [Path(p) for p in sorted(glob.glob(spec, recursive=True))] if remote is None else []
        if remote is None and not paths:
            raise UserError(f"--data {spec}: no file matches; expected tar shards, made for instance by: "
                            "data.py prepare FOLDER --out shards/")
        wanted = {folder: {p.name for p in group} for folder, group in itertools.groupby(paths, key=lambda p: p.parent)}
        parts = [(folder, names, *_index_folder(folder, sorted(names))) for folder, names in wanted.items()] or [remote.index()]
        for folder, names, known, arrays in parts:
            stops = np.cumsum(arrays["count"])
            for name, start, stop in zip(known, stops - arrays["count"], stops):
                if name in names and stop > start:
                    first, last = arrays["end"][start - 1] if start else 0, arrays["end"][stop - 1]
                    pieces["text"].append(arrays["text"][first:last])
                    pieces["end"].append(arrays["end"][start:stop] - first + base)
                    for column in ("offset", "length", "size"):
                        pieces[column].append(arrays[column][start:stop])
                    base += last - first
                    self.shards.append(os.path.join(folder, name))
                    starts.append(starts[-1] + stop - start)
        if not self.shards:
            raise UserError(f"--data {spec}: no image in {sum(len(known) for _, _, known, _ in parts)} shards")
        text = np.concatenate(pieces.pop("text"))
        end, self.offset, self.length, self.sizes = (np.concatenate(part)[:count] for part in pieces.values())
        starts = np.unique(np.minimum(starts, len(end)))
        super().__init__(spec, size, *(Column(text, end, field) for field in range(4)), starts)

    def content(self, i: int) -> bytes:
        """The bytes of image i's file."""
        name = self.shards[np.searchsorted(self.starts, i, "right") - 1]
        with open(name, "rb") if self.remote is None else self.remote.open(name) as file:
            file.seek(self.offset[i])
            return file.read(int(self.length[i]))

    def read(self, i: int) -> np.ndarray:
        image = load_image(self.content(i))
        return resize(image, self.size) if self.sizes[i] else preprocess(image, self.size)  # prepare has cropped the former

    def fetch_ahead(self, seed: int, position: list[int], stop: threading.Event, lane: int) -> None:
        """Fetch each window of shards while the one before it is being read. What fails here fails again, aloud, when read."""
        begin = position[0] // len(self) * len(self)
        before, counts = begin, np.diff(self.starts)
        for epoch in itertools.count(begin // len(self)) if self.remote else ():
            for shards in self.windows(seed, epoch):
                end = begin + int(counts[shards].sum())
                for k in shards[lane::LANES] if end > position[0] else ():
                    while position[0] < before and not stop.wait(0.1):
                        pass
                    if stop.is_set():
                        return
                    with contextlib.suppress(UserError, OSError):
                        self.remote.open(self.shards[k]).close()
                before, begin = begin, end


class Remote:
    """Shards that lie elsewhere, kept for a while in a local folder shared by the ranks and workers of a machine.

    The 2 * WINDOW shards used last are kept in any case (those being read, those fetched ahead); older ones are dropped once
    the folder holds more than `cache_gb`.
    """

    def __init__(self, spec: str, cache_gb: float, offline: bool):
        self.spec, self.limit, self.offline, self.sizes = spec, cache_gb * 1e9, offline, {}
        place, self.pattern = (spec, "*") if spec.startswith("pipe:") else spec.rsplit("/", 1)
        if spec.startswith("pipe:") and "{shard}" not in spec:
            raise UserError(f"--data {spec}: expected {{shard}} for the shard's name: 'pipe:aws s3 cp s3://BUCKET/{{shard}} -'")
        hub = re.fullmatch(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@([^/]+))?/?(.*)", place)
        if hub is None and not spec.startswith("pipe:"):
            raise UserError(f"--data {spec}: expected hf://datasets/OWNER/NAME/GLOB, for instance hf://datasets/me/xrays/*.tar")
        self.repository, self.revision, self.inside = hub.groups() if hub else (None, None, "")
        self.folder = cache_folder() / "shards" / hashlib.blake2b(place.encode(), digest_size=8).hexdigest()

    def index(self) -> tuple:
        """Fetch the index -> "", wanted shards, all shards with their bytes, arrays. A hub repository without one: make it."""
        place = self.folder / INDEX
        with locked(place):
            try:
                if not (self.offline and place.exists()):
                    self._fetch(INDEX, place)
            except FileNotFoundError as error:
                if not place.exists():
                    if not self.repository:
                        raise UserError(f"{self.spec}: no {INDEX} there ({error}); make one where the shards are: "
                                        "data.py check 'shards/*.tar'") from None
                    self._scan(place)
        self.sizes, arrays = read_index(place)
        strange = [name for name in self.sizes if not re.fullmatch(r"[\w.+@=-]+", name)]
        if strange:  # names reach a shell
            raise UserError(f"{self.spec}: its index names shards like {strange[0]!r}; expected letters, digits and ._-+@=")
        return "", set(fnmatch.filter(self.sizes, self.pattern)), self.sizes, arrays

    def _scan(self, place: Path) -> None:
        files = hub_files(self.repository, self.revision, self.offline)
        names = [Path(f).name for f in files if Path(f).match(self.pattern) and Path(f).parent == Path(self.inside)]
        if not names:
            raise UserError(f"{self.spec}: no file of the repository matches; it holds {files[:8]} …")
        shards = {}
        for name in progress(names, f"indexing {self.spec}", unit=" shards"):
            with self.open(name) as file:
                shards[name] = (os.fstat(file.fileno()).st_size, scan_shard(file.name)[0])
        write_index(place, shards)

    def open(self, name: str):
        """The local copy of a shard, open for reading; fetched first where it is missing or not as long as the index says."""
        path = self.folder / name
        while True:
            with contextlib.suppress(FileNotFoundError):  # dropped by another process in between: fetch again
                file = open(path, "rb")
                if os.fstat(file.fileno()).st_size == self.sizes.get(name, os.fstat(file.fileno()).st_size):
                    os.utime(path)                                     # used now: the drop goes by this
                    return file
                file.close()
                path.unlink(missing_ok=True)
            with locked(path):
                if not path.exists():
                    self._fetch(name, path)
                    self._drop()

    def _fetch(self, name: str, path: Path) -> None:
        """Bring one file, whole or not at all. FileNotFoundError where there is no index; UserError after TRIES failures."""
        partial, reason = path.with_name(f".{name}.{os.getpid()}.partial"), ""
        for attempt in range(TRIES):
            time.sleep(attempt**2)
            try:
                if self.repository:
                    there = f"{self.inside}/{name}".lstrip("/")
                    found = hub_file(self.repository, there, self.revision, self.offline, "dataset", self.folder / "hub")
                    if found is None:
                        raise FileNotFoundError(f"{self.repository} has no {there}")
                    os.replace(found, partial) if self.folder in found.parents else partial.symlink_to(found)
                elif self.offline:
                    raise UserError(f"{self.spec}: {name} is not in the local cache {self.folder}, and --offline was given")
                else:
                    command = self.spec.removeprefix("pipe:").replace("{shard}", name)
                    with open(partial, "wb") as file:
                        ran = subprocess.run(command, shell=True, stdout=file, stderr=subprocess.PIPE)
                    if ran.returncode:
                        raise OSError(f"exit code {ran.returncode}: {ran.stderr.decode(errors='replace').strip()[-200:]}")
                if partial.stat().st_size != self.sizes.get(name, partial.stat().st_size):
                    raise OSError(f"{partial.stat().st_size:,} bytes came, the index says {self.sizes[name]:,}")
                os.replace(partial, path)
                return
            except FileNotFoundError:
                raise
            except OSError as error:
                reason = str(error)
            finally:
                partial.unlink(missing_ok=True)
        if name == INDEX:
            raise FileNotFoundError(reason)
        raise UserError(f"{self.spec}: {name} could not be fetched in {TRIES} tries: {reason}")

    def _drop(self) -> None:
        files = []
        for path in self.folder.glob("*.tar"):
            with contextlib.suppress(FileNotFoundError):
                files.append((path.stat().st_mtime, path.lstat().st_size, path))
        kept = 0
        for k, (_, size, path) in enumerate(sorted(files, reverse=True)):
            kept += size
            if kept > self.limit and k >= 2 * WINDOW:
                path.unlink(missing_ok=True)


# ---- prepare and check: any pile of X-rays -> shards (paper 2.1) ----------------------------------------------------------


@dataclasses.dataclass
class Prepare:
    source: str = dataclasses.field(default=None, metadata={"positional": True})  # folder, zip, tar or hf://datasets/…/GLOB
    out: str = "shards"           # folder for the shards, their index, unreadable.json
    size: int = 512               # side in pixels after border removal, centre crop and resizing; 0 keeps images as they are
    labels: str | None = None     # CSV file,patient,labels (| between labels), NIH's Data_Entry CSV, or MIMIC's folder
    provider: str | None = None   # name of the data provider, kept with each image; default: the source's name
    format: str = "png"           # png (lossless) or jpg
    quality: int = 95             # of jpg
    per_shard: int = 1000         # images a shard
    workers: int | None = None    # processes; default: one a core
    offline: bool = False         # hf:// from the hub's cache alone


@dataclasses.dataclass
class Check:
    data: str = dataclasses.field(default=None, metadata={"positional": True})  # a quoted glob of shards, or any other --data
    offline: bool = False         # remote shards from the cache alone
    workers: int | None = None    # processes; default: one a core


def _extract(archive, item) -> bytes:
    """A member of a zip or tar; empty, so reported as unreadable, where the archive is damaged."""
    try:
        with archive.open(item) if isinstance(archive, zipfile.ZipFile) else archive.extractfile(item) as file:
            return file.read()
    except DAMAGED:
        return b""


DAMAGED = (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, OSError)
ARCHIVES = re.compile(r"\.(zip|tar|tgz|tar\.(gz|bz2|xz))$", re.I)


def prepare(s: Prepare) -> None:
    """Turn any pile of X-rays into tar shards and an index. The same command again goes on where it was stopped."""
    out, csv_file = Path(s.out), s.labels or csv_of(s.source)
    table = read_labels(csv_file) if csv_file else {}
    provider = s.provider or Path(s.source).name.split(".")[0]
    if s.format not in ("png", "jpg") or s.per_shard < 1:
        raise UserError(f"found --format {s.format} --per-shard {s.per_shard}, expected png or jpg, and at least 1")
    names = hashlib.blake2b(digest_size=8)
    count, sources = _sources(s.source, out, s.offline, names)
    recipe = {"source": str(s.source), "files": names.hexdigest(), "size": s.size, "format": s.format, "quality": s.quality,
              "per_shard": s.per_shard, "provider": provider, "labels": csv_file and str(csv_file)}
    known = json.loads((out / "prepare.json").read_text()) if (out / "prepare.json").exists() else recipe
    changed = [f"{k} was {known.get(k)!r}, is {v!r}" for k, v in recipe.items() if known.get(k) != v]
    if changed:
        raise UserError(f"{out} holds shards made otherwise: {'; '.join(changed)}. Give another --out, or remove that folder")
    write_json(out / "prepare.json", recipe)
    unreadable = json.loads((out / "unreadable.json").read_text()) if (out / "unreadable.json").exists() else {}
    shard = lambda number: out / f"shard-{number:06d}.tar"
    frontal_only = bool(csv_file) and Path(csv_file).is_dir()          # MIMIC's tables name the frontal views alone
    left = max(count - s.per_shard * len(list(out.glob("shard-*.tar"))), 0) if count else None
    finished, lateral, total = set(), 0, 0

    def wanted():  # what is still to be done: ((shard, name, folder), file, how)
        nonlocal lateral, total
        for name, folder, read in sources:
            if frontal_only and _row(table, name) is None:
                lateral += 1
                continue
            number = total // s.per_shard
            if total % s.per_shard == 0 and shard(number).exists():
                finished.add(number)
            if number not in finished:
                yield (number, name, folder), read(), s.size, s.format, s.quality
            total += 1

    with process_pool(s.workers) as pool:
        encoded = progress(_in_order(pool, _encode, wanted()), f"preparing {s.source}", left, " images")
        for number, group in itertools.groupby(encoded, key=lambda e: e[0][0]):
            bad = _write_shard(shard(number), group, table, provider, s)
            if bad:
                write_json(out / "unreadable.json", unreadable := unreadable | {str(number): bad})
            os.replace(shard(number).with_name(f".{shard(number).name}.partial"), shard(number))
    shards = {p.name: (p.stat().st_size, scan_shard(p)[0]) for p in sorted(out.glob("shard-*.tar"))}
    write_index(out / INDEX, shards)
    images, bad = sum(len(rows) for _, rows in shards.values()), [item for part in unreadable.values() for item in part.items()]
    print(f"{images:,} images in {len(shards)} shards with their index: {out}/" + f" ({lateral:,} not frontal)" * bool(lateral))
    if bad:
        print(f"{len(bad):,} files could not be read; {out / 'unreadable.json'} names them. The first, " + ": ".join(bad[0]))
    if not images:
        raise UserError(f"{s.source}: no readable X-ray among {total:,} files; expected {' '.join(PICTURES)}")


def _sources(source: str, out: Path, offline: bool, names):
    """-> number of files (0: unknown, there are archives among them), iterator over (name, folder, read) in a fixed order.

    source: a folder, an archive, or a glob on the hub; read() -> path or bytes. `names` is a hash that takes up the names, so
    that files that came or went since an earlier run are noticed.
    """
    if source.startswith("hf://"):
        remote, base = Remote(source, 0, offline), source
        pattern = f"{remote.inside}/{remote.pattern}".lstrip("/")
        files = fnmatch.filter(hub_files(remote.repository, remote.revision, offline), pattern)
        fetch = lambda f: hub_file(remote.repository, f, remote.revision, offline, "dataset")
    else:
        root = Path(source).expanduser().absolute()
        base = root.as_posix()
        if not root.exists():
            raise UserError(f"{source}: no such folder or file; expected a folder of X-rays, a zip or a tar")
        files, fetch = [""], lambda f: root / f                        # an archive is its own only file
        if root.is_dir():
            files = _pictures(root) + sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if ARCHIVES.search(p.name))
            files = [f for f in files if not f.startswith(os.path.relpath(out, root) + "/")]  # what an earlier run left inside
    if not files:
        raise UserError(f"{source}: found no X-ray; expected {' '.join(PICTURES)}, or zip or tar files of them")
    names.update("\n".join(files).encode())

    def walk():
        for file in files:
            if not ARCHIVES.search(file or source):
                yield file or Path(source).name, base, functools.partial(fetch, file)
                continue
            path = fetch(file)
            prefix = re.sub(ARCHIVES, "", file) + "/" if file else ""
            try:
                with zipfile.ZipFile(path) if zipfile.is_zipfile(path) else tarfile.open(path, "r:*") as archive:
                    is_zip = isinstance(archive, zipfile.ZipFile)
                    for item in archive.infolist() if is_zip else filter(tarfile.TarInfo.isfile, archive):
                        name = item.filename if is_zip else item.name
                        if name.lower().endswith(PICTURES) and not Path(name).name.startswith("."):
                            yield prefix + name, base, functools.partial(_extract, archive, item)
            except DAMAGED as error:
                print(f"{path} is cut short or no archive ({error}); what came before is used", file=sys.stderr)
    return 0 if any(ARCHIVES.search(f or source) for f in files) else len(files), walk()


def _in_order(pool, function, items):
    """(tag, *arguments) -> (tag, function(*arguments)), in parallel, in order, a bounded number at a time."""
    pending = collections.deque()
    for tag, *arguments in items:
        pending.append((tag, pool.submit(function, *arguments)))
        if len(pending) > 4 * cores():
            tag, future = pending.popleft()
            yield tag, future.result()
    for tag, future in pending:
        yield tag, future.result()


def _encode(source, size: int, format: str, quality: int) -> tuple[bytes | None, str]:
    """An image file -> the bytes of a preprocessed one, or None and the reason."""
    try:
        image = load_image(source)
    except Unreadable as error:
        return None, error.reason
    buffer = io.BytesIO()
    image = Image.fromarray(preprocess(image, size) if size else image)
    # Level 2 is five times as fast as Pillow's 6, for 15 % more bytes.
    image.save(buffer, "PNG", compress_level=2) if format == "png" else image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue(), ""


def _write_shard(path: Path, group, table: dict, provider: str, s: Prepare) -> dict[str, str]:
    """((name, …), (bytes, reason)) … -> a tar under a temporary name, flushed, renamed. Returns what was unreadable and why.

    The same images give the same bytes: no times, no owners.
    """
    partial, bad, keys = path.with_name(f".{path.name}.partial"), {}, set()
    with open(partial, "wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
            for (_, name, folder), (content, reason) in group:
                if content is None:
                    bad[name] = reason
                    continue
                patient, labels = _row(table, f"{folder}/{name}") or ("", ())
                key = re.sub(r"[^\w/-]+", "_", re.sub(r"\.[^./]*$", "", name)).strip("/")
                while key in keys:
                    key += "_"
                keys.add(key)
                info = {"file": name, "patient": patient, "provider": provider, "labels": labels, "size": s.size}
                for suffix, data in (("json", json.dumps(info).encode()), (s.format, content)):
                    member = tarfile.TarInfo(f"{key}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        file.flush()
        os.fsync(file.fileno())
    return bad


def check(s: Check) -> None:
    """Read every image of a set, report what is wrong, and end with exit code 1 if anything is."""
    if s.data == "phantom":
        raise UserError("phantoms are drawn, not read: there is nothing to check")
    problems = []
    for folder in sorted({Path(p).parent for p in glob.glob(s.data)} if s.data.endswith(".tar") else ()):
        known = read_index(folder / INDEX)[0] if (folder / INDEX).exists() else {}
        for name, size in known.items():
            found = (folder / name).stat().st_size if (folder / name).exists() else None
            if found != size and fnmatch.fnmatch(str(folder / name), s.data):
                problems.append(f"{folder / name}: {'missing' if found is None else found} where the index says {size} bytes")
    ds = open_data(s.data, 64, offline=s.offline)
    for k, name in enumerate(ds.shards if isinstance(ds, Shards) and ds.remote is None else ()):
        rows, problem = scan_shard(name)
        found = {(text.split("\t")[0], offset, length) for offset, length, _, text in rows}
        said = {(ds.keys[i], int(ds.offset[i]), int(ds.length[i])) for i in range(ds.starts[k], ds.starts[k + 1])}
        problems += [f"{name}: {problem}"] * bool(problem)
        if said != found:
            problems.append(f"{name}: the index names {len(said - found)} images that are not there, lacks {len(found - said)}")
    with process_pool(s.workers) as pool:
        items = ((ds.keys[i], ds.content(i)) for i in range(len(ds)))
        for key, reason in progress(_in_order(pool, _reason, items), f"checking {s.data}", len(ds), " images"):
            problems += [f"{key}: {reason}"] * bool(reason)
    print("\n".join(problems[:50]) + (f"\n… and {len(problems) - 50} more" if len(problems) > 50 else ""))
    if problems:
        raise UserError(f"{s.data}: {len(ds):,} images, problems: {len(problems)}")
    print(f"{s.data}: {len(ds):,} images, all readable")


def _reason(source) -> str:
    try:
        load_image(source)
        return ""
    except Unreadable as error:
        return error.reason


# ---- Batches: the endless stream of epochs, cut by step and rank (paper 2.5) ----------------------------------------------


def batches(ds, batch: int, start_step: int = 0, seed: int = 0, rank: int = 0, world: int = 1, micro_batch: int | None = None,
            workers: int = 0, with_images: bool = True):
    """Yield (step, indices int64 (b,), images uint8 (b, size, size)) for ever, one micro-batch of this rank after another.

    Step s is positions [s * batch, (s + 1) * batch) of the epochs `ds.order(seed, 0)`, `ds.order(seed, 1)`, … laid end to end;
    rank r has the r-th of `world` equal slices of it. So what a step holds depends on (seed, step) alone, from any start.
    `with_images=False` reads none (their place is empty), for a caller that has latents of them.
    """
    micro_batch = micro_batch or batch // world
    assert batch % (world * micro_batch) == 0, (batch, world, micro_batch)
    share, position, stop = batch // world, [start_step * batch], threading.Event()

    def stream():
        orders = {}
        for step in itertools.count(start_step):
            at = step * batch + rank * share + np.arange(share)        # positions in the endless stream
            epochs = at // len(ds)
            orders = {e: orders[e] if e in orders else ds.order(seed, e) for e in np.unique(epochs).tolist()}
            indices = np.array([orders[e][p] for e, p in zip(epochs.tolist(), at % len(ds))])
            yield from ((step, indices[k:k + micro_batch]) for k in range(0, share, micro_batch))

    # generator=…: TRAP: otherwise a DataLoader draws its workers' seed from the global generator, and resuming shifts it.
    loader = iter(torch.utils.data.DataLoader(_Reader(ds, with_images), sampler=stream(), batch_size=None, num_workers=workers,
                                              pin_memory=torch.cuda.is_available(), generator=torch.Generator()))
    for lane in range(LANES):                                          # threads start after the workers were forked
        threading.Thread(target=ds.fetch_ahead, args=(seed, position, stop, lane), daemon=True).start()
    try:
        for item in loader:
            if isinstance(item, UserError):
                raise item
            step, indices, images, broken = item
            for key, reason in broken:
                ds.note(key, reason)
            position[0] = step * batch
            yield step, indices, images
    finally:
        stop.set()


class _Reader(torch.utils.data.Dataset):
    """What a worker process does: read a micro-batch. Errors travel as values, so that the user sees one line, no traceback."""

    def __init__(self, ds, with_images: bool):
        self.ds, self.with_images = ds, with_images

    def __getitem__(self, item):
        step, indices = item
        known = len(self.ds.unreadable)
        try:
            images = np.stack([self.ds[i] for i in indices.tolist()]) if self.with_images else np.empty(0, np.uint8)
        except UserError as error:
            return error
        return step, indices, images, self.ds.unreadable[known:]


# ---- On the device: augmentation and the two ranges of pixels (paper 2.5) -------------------------------------------------

SHEAR, SHIFT, SCALE = 0.05, 0.05, (0.90, 1.40)  # of the side, either way, both axes; zoom [DiNO-Diff 2.5]
SHARPEN = 1.0  # CHOICE: largest share of the unsharp mask that is added; half of the images get none


def augment(images: torch.Tensor, ids, step, seed: int) -> torch.Tensor:
    """Random affine and sharpening: uint8 (B, S, S) on any device, image ids int64 (B,) -> float32 (B, 1, S, S) in [-1, 1].

    The parameters of each row are a pure function of (seed, image id, step), whatever else is in the batch; step: int or (B,).
    CHOICE: what comes into view from outside repeats the edge: a black frame would be learned as part of an X-ray.
    """
    u = torch.from_numpy(uniforms(6, seed, torch.as_tensor(ids).cpu().numpy(), step)).to(images.device, torch.float32)  # (B, 6)
    zoom = SCALE[0] + (SCALE[1] - SCALE[0]) * u[:, 0]
    shear, shift = (2 * u[:, 1:3] - 1) * SHEAR, (2 * u[:, 3:5] - 1) * (2 * SHIFT)  # the grid's side is 2
    theta = torch.eye(2, 3, device=images.device).repeat(len(images), 1, 1)
    theta[:, 0, 1], theta[:, 1, 0], theta[:, :, 2] = shear[:, 0], shear[:, 1], shift
    theta = theta / zoom[:, None, None]                                # output -> input: a larger zoom looks at less
    x = (images[:, None].float() / 127.5) - 1                          # (B, 1, S, S)
    grid = F.affine_grid(theta, x.shape, align_corners=False)          # (B, S, S, 2)
    x = F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)
    amount = (2 * u[:, 5] - 1).clamp(min=0)[:, None, None, None] * SHARPEN
    blurred = F.pad(x, (1, 1, 1, 1), mode="replicate")                 # (B, 1, S + 2, S + 2)
    for _ in range(2):                                                 # sums of neighbours, twice: 1-2-1 along both axes
        blurred = blurred[..., 1:, :] + blurred[..., :-1, :]
        blurred = blurred[..., 1:] + blurred[..., :-1]
    return (x + amount * (x - blurred / 16)).clamp(-1, 1)


def to_model(images: torch.Tensor) -> torch.Tensor:
    """uint8 (B, S, S) -> float32 (B, 3, S, S) in [-1, 1]: three equal channels, as the VAE and DINO were trained."""
    return (images[:, None].float() / 127.5 - 1).expand(-1, 3, -1, -1)


def to_uint8(x: torch.Tensor) -> torch.Tensor:
    """float (B, 3, H, W) in [-1, 1] -> uint8 (B, H, W), the mean of the channels, rounded and clamped."""
    return ((x.float().mean(1) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


# ---- Pictures for people --------------------------------------------------------------------------------------------------


def grid(images, columns: int, captions=None, row_titles=None, title: str | None = None) -> Image.Image:
    """Tile images uint8 (S, S) or (S, S, 3) by rows -> an RGB picture. Small images are enlarged without smoothing.

    captions: a text under each image; row_titles: one left of each row; both are shortened with … where they do not fit.
    """
    assert len(images) > 0 and columns > 0
    tiles = [Image.fromarray(np.asarray(image)).convert("RGB") for image in images]
    width, height = (max(t.size[k] for t in tiles) for k in (0, 1))
    zoom = max(1, -(-112 // max(width, height)))                       # at least 112 px: room for a caption
    width, height, gap = width * zoom, height * zoom, 4
    font = ImageFont.load_default(max(12, width // 16))
    large = ImageFont.load_default(max(15, width // 12))
    line, rows = font.size + 6, -(-len(tiles) // columns)

    def short(text, room, font):
        text = str(text)
        while font.getlength(text) > room and len(text) > 1:
            text = text.rstrip("…")[:-1] + "…"
        return text

    left = gap + min(int(max((font.getlength(str(t)) for t in row_titles or ()), default=-gap)) + gap, 2 * width)
    right = left + columns * (width + gap)
    words, lines = (title or "").split(), []
    for word in words:                                                 # wrap the title
        if lines and large.getlength(f"{lines[-1]} {word}") <= right - 2 * gap:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    top = gap + len(lines) * (large.size + 6)
    pitch = height + gap + (line if captions is not None else 0)
    sheet = Image.new("RGB", (right, top + rows * pitch), "white")
    draw = ImageDraw.Draw(sheet)
    for k, text in enumerate(lines):
        draw.text((gap, gap + k * (large.size + 6)), text, "black", large)
    for k, tile in enumerate(tiles):
        x, y = left + k % columns * (width + gap), top + k // columns * pitch
        sheet.paste(tile.resize((tile.width * zoom, tile.height * zoom), Image.NEAREST), (x, y))
        if captions is not None and k < len(captions):
            draw.text((x + width / 2, y + height + 2), short(captions[k], width, font), "black", font, anchor="ma")
    for k, text in enumerate(row_titles or ()):
        draw.text((gap, top + k * pitch + height / 2), short(text, left - 2 * gap, font), "black", font, anchor="lm")
    return sheet


def save_png(path, image) -> None:
    """Write a PIL image or an array uint8 (H, W[, 3]) as PNG, whole or not at all."""
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))).save(buffer, "PNG")
    write_file(path, buffer.getvalue())


if __name__ == "__main__":
    command_line(__doc__, {"prepare": (Prepare(), prepare), "check": (Check(), check)})
