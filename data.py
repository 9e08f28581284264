"""Everything that comes from or goes to a disk or a hub: X-rays, shards, labels, lung masks,
phantoms, pictures, weights files.

Implements section 2.1 of the DiNO-Diffusion paper (data), preprocessing and augmentation of 2.5,
and the subsets of 2.4. Every other file may import this one; it imports none of them.

There is one kind of data set: tar shards and an index. `prepare` alone meets the world's files; a
folder given as --data is prepared once into the cache, and phantoms and synthetic images are
written by the same function, `write_shard`.

    python data.py prepare FOLDER --out shards/ --size 512     any X-rays -> shards and an index
    python data.py check 'shards/*.tar'                        read every image, say what is wrong
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import fcntl
import fnmatch
import functools
import glob
import gzip
import hashlib
import inspect
import io
import itertools
import json
import lzma
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import typing
import unicodedata
import warnings
import zipfile
import zlib
from collections import Counter, OrderedDict, defaultdict
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context, parent_process
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from scipy import ndimage
from tqdm import tqdm


class UserError(ValueError):
    """Something the user can put right: what was found, what was expected, what to do."""


class Unreadable(UserError):
    """An image file that is damaged, or none."""


def note(text: str) -> None:
    """Tell the user something, and go on."""
    print(text, file=sys.stderr, flush=True)


# ---- Command lines and progress ----


def command_line(doc: str, commands: dict, argv: list[str] | None = None) -> None:
    """Run one of `commands`: {name: (settings, function)}; the one called "" needs no name.

    settings: a dataclass instance, or a callable argv -> instance. Each field is a flag with its
    default (`--micro-batch` is `micro_batch`); the comment behind the field is its help. Metadata
    {"positional": True}: without `--`; {"flag": False}: no flag; nor has a dataclass one. A field
    `offline` that is True sets HF_HUB_OFFLINE=1. UserError and OSError end the program with one
    message and exit code 1.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    name = argv.pop(0) if argv and argv[0] in commands else ""
    program = f"{Path(sys.argv[0]).name} {name}".strip()
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may not know all letters
    if name not in commands:
        usage = f"one of {' | '.join(commands)}; each has its own --help"
        if argv[:1] in (["-h"], ["--help"]):
            print(f"{doc.strip()}\n\ncommands: {usage}")
            sys.exit()
        sys.exit(f"{program}: found {' '.join(argv[:1]) or 'no command'}, expected {usage}")
    defaults, function = commands[name]
    try:
        if not dataclasses.is_dataclass(defaults):
            defaults = defaults(argv)
        settings = parse(defaults, argv, doc, program)
        if getattr(settings, "offline", False):
            os.environ["HF_HUB_OFFLINE"] = "1"
        function(settings)
    except KeyboardInterrupt:
        sys.exit(130)
    except (UserError, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError):
            if re.search("gloo|NCCL|TCPStore", str(error)):
                reason = first_line(error)
                error = f"another rank has ended; its own message says why (here: {reason})"
            elif "DataLoader worker" not in str(error):
                raise  # else torch says that a reading process was killed, wherever we were
        rank = os.environ.get("RANK")
        if rank is None:
            sys.exit(f"{program}: {error}")
        if rank != "0":  # rank 0 has mostly met the same error; its message comes first, and alone
            time.sleep(2)
        note(f"{program}, rank {rank}: {error}")
        os._exit(1)  # at once, whatever threads and collectives wait for: torchrun ends the others


def parse(defaults, argv: list[str], doc: str = "", program: str = ""):
    """Flags -> a copy of the dataclass instance `defaults` with what `argv` sets."""
    parser = argparse.ArgumentParser(program, description=doc, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = typing.get_type_hints(type(defaults))
    classes = filter(dataclasses.is_dataclass, type(defaults).__mro__)
    source = "".join(map(inspect.getsource, classes))
    for setting in dataclasses.fields(defaults):
        value = getattr(defaults, setting.name)
        if setting.metadata.get("flag") is False or dataclasses.is_dataclass(value):
            continue
        comment = re.search(rf"^    {setting.name}\b[^#\n]*#\s*(.*)$", source, re.M)
        text = comment[1].replace("%", "%%") if comment else ""
        text = text if value in (None, "", ()) else f"{text} [{value}]"
        options = {"default": value, "help": text}
        flag = "--" + setting.name.replace("_", "-")
        kind = kinds[setting.name]
        is_tuple = typing.get_origin(kind) is tuple
        plain = (*typing.get_args(kind), kind)[0]
        if setting.metadata.get("positional"):
            flag = setting.name
            options["nargs"] = "*" if is_tuple else None if value is None else "?"
        elif plain is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options |= {"type": plain, "metavar": plain.__name__.upper()}
            options["nargs"] = "+" if is_tuple else None
        parser.add_argument(flag, **options)
    values = vars(parser.parse_args(argv))
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    return dataclasses.replace(defaults, **values)


class _Lines(io.StringIO):
    """A text stream for tqdm where no terminal listens: a line a refresh, none overwritten."""

    def write(self, text: str) -> None:
        if text.strip():
            note(text.strip())


def progress(iterable=None, desc="", total=None, unit="it", initial=0) -> tqdm:
    """A tqdm bar on a terminal, a plain line every 20 s elsewhere; silent on every rank but 0."""
    options = {"dynamic_ncols": True}
    if not sys.stderr.isatty():
        line = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
        options = {"file": _Lines(), "mininterval": 20, "miniters": 1, "bar_format": line,
                   "position": 0}  # bars within bars move no cursor
    return tqdm(iterable, desc=desc, total=total, unit=unit, initial=initial,
                disable=os.environ.get("RANK", "0") != "0", **options)


# ---- Files that are whole or absent, caches, locks, processes ----


@contextlib.contextmanager
def whole(path):
    """A path to write a file or a folder to: flushed to the disk and renamed to `path`, unless an
    error occurs. What an earlier kill left is removed. One writer at a time (see `locked`)."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    partial = beside / path.name
    try:
        yield partial
        if partial.is_file():  # TRAP: safetensors leaves mode 0600; the folder's has the umask
            partial.chmod(beside.stat().st_mode & 0o666)
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def sync(path) -> None:
    """fsync of a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def write_file(path, content: bytes | str) -> None:
    """A file, whole or absent."""
    if isinstance(content, str):
        content = content.encode(errors="surrogateescape")  # perhaps a name that is no UTF-8
    with whole(path) as partial:
        partial.write_bytes(content)


def write_json(path, value) -> None:
    """A JSON file, whole or absent."""
    write_file(path, json.dumps(value, indent=1) + "\n")


def read_json(path, kind: type = dict):
    """The JSON value of a file. UserError where it is missing, damaged, or not a `kind`."""
    try:
        value = json.loads(read_bytes(path))
        if isinstance(value, kind):
            return value
        found = f"a JSON {type(value).__name__}"
    except (OSError, ValueError, RecursionError) as error:
        found = f"no JSON ({error})"
    raise UserError(f"{path}: found {found}, expected a JSON {kind.__name__}; restore this file, "
                    "or remove it and run again what wrote it")


def read_bytes(path, limit: int = 2**28) -> bytes:
    """A regular file of at most `limit` bytes: opening a pipe or a device may wait for ever."""
    if not os.path.isfile(path):
        raise OSError("no such file, or a folder, pipe or device")
    if os.path.getsize(path) > limit:
        raise OSError(f"more than {limit:,} bytes")
    return Path(path).read_bytes()


def save_tensors(path, tensors: dict[str, torch.Tensor]) -> None:
    """One safetensors file, whole or absent."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with whole(path) as partial:
        try:  # TRAP: transformers wants a "format"
            save_file(tensors, partial, {"format": "pt"})
        except SafetensorError as error:  # a full disk arrives as this, not as OSError
            raise OSError(f"could not write {path}: {error}") from None


def load_tensors(path) -> dict[str, torch.Tensor]:
    """What `save_tensors` wrote, memory-mapped."""
    try:
        if not os.path.isfile(path):
            raise OSError("no such file, or a folder, pipe or device")
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is missing, damaged or no safetensors file ({error}); restore it, "
                        "or remove it and run again what wrote it") from None


def cache_folder() -> Path:
    """For phantoms, prepared folders, remote shards, indices: $DINODIFF_CACHE, or
    ~/.cache/dinodiff."""
    place = os.environ.get("DINODIFF_CACHE", "~/.cache/dinodiff")
    try:
        folder = Path(place).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # there may be no home
        pass
    raise UserError(f"cannot write to {place}; set DINODIFF_CACHE to a folder for caches")


@contextlib.contextmanager
def locked(path):
    """One process at a time for what leads to `path`; the lock dies with its process."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # TRAP: forked processes hold an open file too


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def end_with(parent: int | None = None) -> None:
    """End this process within a second of its parent, which alone hears Ctrl-C; one thread.

    parent: its pid where multiprocessing did not start this process.
    """
    def watch():
        if parent is None:
            parent_process().join()  # TRAP: getppid is a server's where that forked this process
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent
    torch.set_num_threads(1)
    threading.Thread(target=watch, daemon=True).start()


def run_jobs(function, jobs: list[tuple], desc: str, workers: int | None = None,
             unit: str = " shards", start: str | None = None) -> list:
    """[function(*job) for job in jobs], in processes of one thread each, one a core. UserError
    where one is killed.

    start: multiprocessing's start method; "spawn" where the parent computed with several threads.
    """
    if len(jobs) < 2 or workers == 1:
        bar = progress(jobs, desc, unit=unit) if len(jobs) > 1 else jobs
        return [function(*job) for job in bar]
    workers = workers or cores()
    try:
        with ProcessPoolExecutor(workers, get_context(start), end_with) as pool:
            return list(progress(pool.map(function, *zip(*jobs)), desc, len(jobs), unit))
    except BrokenProcessPool:
        raise UserError(f"{desc}: a worker process was killed, perhaps for lack of memory; the "
                        "same command goes on from here (fewer --workers need less)") from None


# ---- Random numbers: pure functions of what they are for ----


def hash64(*values) -> np.ndarray:
    """Integers of 64 bits, broadcast together -> uint64: SplitMix64's finaliser over each."""
    h = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        for value in values:
            h = h ^ np.asarray(value).astype(np.int64).view(np.uint64)
            h = h + np.uint64(0x9E3779B97F4A7C15)
            h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            h = h ^ (h >> np.uint64(31))
    return h


def uniforms(count: int, *values) -> np.ndarray:
    """`count` numbers in [0, 1) for each entry of `values` (broadcast): (..., count) float64."""
    h = hash64(*[np.asarray(value)[..., None] for value in values], np.arange(count))
    return (h >> np.uint64(11)).astype(np.float64) * 2.0**-53


def generator(device, *values: int) -> torch.Generator:
    """A torch generator on `device`, seeded by a hash of `values`, for instance (seed, step)."""
    return torch.Generator(device).manual_seed(int(hash64(*values) >> np.uint64(1)))


def digest(*values) -> str:
    """A short name of values that JSON can hold: ten hexadecimal digits."""
    return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=5).hexdigest()


# ---- Weights files and the hub ----

WEIGHT_NAMES = (
    "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json",
    "model.safetensors", "model.safetensors.index.json", "diffusion_pytorch_model.fp16.safetensors",
    "model.fp16.safetensors", "diffusion_pytorch_model.bin", "pytorch_model.bin",
    "pytorch_model.bin.index.json")


def read_weights(source, subfolder: str | None = None, revision: str | None = None):
    """A public checkpoint -> (config.json, state dict on the CPU, preprocessor_config.json).

    source: a folder, one .safetensors/.bin/.pt/.pth file, or a hub id OWNER/NAME[:SUBFOLDER]. A
    JSON that is not there is {}. Safetensors are memory-mapped; an index opens sharded ones.
    Pickled files are read with weights_only=True: no code in them runs.
    """
    path = Path(source).expanduser()
    if not path.exists() and ":" in str(source):
        source, subfolder = str(source).split(":", 1)
        path = Path(source).expanduser()
    inside = f"{subfolder}/" if subfolder else ""
    if path.is_file():
        folder = path.parent
        names = [path.name]
    else:
        folder = path / inside if path.exists() else hub_weights(str(source), inside, revision)
        names = [name for name in WEIGHT_NAMES if (folder / name).is_file()][:1]
    if not names:
        raise UserError(f"no weights in {source} {inside}: expected one of "
                        f"{', '.join(WEIGHT_NAMES)}")
    if names[0].endswith(".index.json"):
        index = names[0]
        parts = read_json(folder / index).get("weight_map")
        names = sorted(set(map(str, parts.values()))) if isinstance(parts, dict) else []
        beside = {file.name for file in folder.iterdir() if file.is_file()}
        if not names or not beside.issuperset(names):  # among them may be paths that lead elsewhere
            raise UserError(f"{source}: {index} names {names[:9]}, and not all of them lie beside "
                            "it; download the checkpoint again")
    state = {}
    for name in names:
        file = folder / name
        try:
            if file.suffix == ".safetensors":
                state |= load_file(file)
            else:
                state |= torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # safetensors, zipfile and pickle have classes of their own
            raise UserError(f"{file} is damaged or holds more than tensors: {error}") from None
    asides = [folder / name for name in ("config.json", "preprocessor_config.json")]
    config, preprocessor = [read_json(file) if file.is_file() else {} for file in asides]
    return config, state, preprocessor


def build(net: type, fields: type, config: dict, state: dict[str, torch.Tensor], source, **fixed):
    """net(fields(…)) of a public config.json with the weights of `state`, in float32.

    fixed: settings of the file that change the network and have but one value here.
    """
    told = {name: value for name, value in config.items() if value is not None}
    try:
        for name, only in fixed.items():
            if told.get(name, only) != only:
                raise UserError(f"found {name} {told[name]!r}; only {only!r} is supported")
        known = fields.__annotations__
        with torch.device("meta"):
            model = net(fields(**{k: v for k, v in told.items() if k in known}))
    except (TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{source}: config.json: {error}; found {config!s:.999}") from None
    return load_weights(model, state, source)


def load_weights(model: torch.nn.Module, state: dict[str, torch.Tensor], source) -> torch.nn.Module:
    """`load_state_dict(strict=True)` with a refusal that a person can act on; all in float32 after.

    The tensors of `state` become the parameters (assign=True): no second copy of a model on meta.
    """
    try:
        model.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        found = "\n  ".join(line.strip()[:400] for line in str(error).splitlines()[1:6])
        raise UserError(f"{source} does not fit {type(model).__name__}:\n  {found}\n"
                        "Is this the right file, and is its config.json beside it?") from None
    return model.float()


def write_weights(folder, config: dict, state: dict[str, torch.Tensor],
                  name: str = "diffusion_pytorch_model.safetensors") -> None:
    """`folder`/`name` and, last, `folder`/config.json, as diffusers and transformers read them."""
    save_tensors(Path(folder, name), state)
    write_json(Path(folder, "config.json"), config)


def hub_weights(repository: str, inside: str, revision: str | None) -> Path:
    """The folder with the weights of a hub repository: safetensors, or else pickled files."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise UserError(f"weights {repository!r}: no such file or folder, and no hub id OWNER/NAME")
    for suffix in ("safetensors", "bin"):
        patterns = [inside + "*.json", f"{inside}*model.{suffix}", f"{inside}*model-*.{suffix}"]
        root, names = hub_files(repository, patterns, revision)
        if any(name.endswith(suffix) for name in names):
            break
    return root / inside


def hub_files(repository: str, patterns: list[str], revision: str | None = None,
              kind: str = "model", folder=None, is_cached: bool = False) -> tuple[Path, list[str]]:
    """A folder and the names in it of the files of a hub repository that match `patterns`, fetched
    where the hub's cache has them not (or into `folder`). kind: "model" or "dataset".

    Without a network, or with `is_cached`, what the cache has. UserError where that is nothing.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import filter_repo_objects
    reason = "no file of it matches"
    try:
        # TRAP: without a network hf_hub_download tries for 23 s; this call does not.
        root = Path(snapshot_download(repository, repo_type=kind, revision=revision,
                                      allow_patterns=patterns, local_dir=folder,
                                      local_files_only=is_cached))
        names = [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]
        names = sorted(filter_repo_objects(names, allow_patterns=patterns))
        if names:
            return root, names
    except Exception as error:  # network, disk, and the hub's own classes
        reason = first_line(error)
    raise UserError(
        f"{', '.join(patterns)} of {repository}: neither in the hub's cache nor within reach "
        f"({reason}).\nOn a machine with network:  hf download {repository} --repo-type {kind} "
        f"--revision {revision or 'main'} --local-dir {repository.split('/')[1]}\n"
        f"then give that folder's path instead of {repository!r}.")


def first_line(error: Exception) -> str:
    """What an error says, or its name."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def named(**modules: torch.nn.Module) -> torch.nn.Sequential:
    """One module after the other, under a checkpoint's names."""
    return torch.nn.Sequential(OrderedDict(modules))


def module_table(title: str, model: torch.nn.Module, *inputs) -> None:
    """Print each part of `model` that is of our own making, as it runs (also on meta): its name,
    the shape of what it gives, its parameters. The last row is the whole."""
    names = {part: name for name, part in model.named_modules() if name.count(".") < 4}

    def report(part, args, out):
        if part in names and not type(part).__module__.startswith("torch"):
            count = sum(p.numel() for p in part.parameters())
            name = names[part] or "total"
            print(f"  {name:<28}{str(tuple(out.shape)):>22}{count:>14,} parameters")

    print(title)
    handle = torch.nn.modules.module.register_module_forward_hook(report)
    model(*inputs)
    handle.remove()


# ---- Pictures: any X-ray file -> uint8, preprocessed (paper 2.5) ----

PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp", ".gif", ".bmp", ".pgm", ".jp2",
            ".dcm", ".dicom", ".img")
SUFFIX = re.compile(rf"({'|'.join(PICTURES)})$".replace(".", r"\."), re.I)
WORLD = re.compile(rf"{SUFFIX.pattern}|\.csv$", re.I)  # what makes a folder more than shards
FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "GIF", "BMP", "PPM", "JPEG2000")
MAX_BYTES = 2**28        # of one picture's file
MAX_PIXELS = 2**26       # of one picture: 8192 x 8192
JSRT_SIDE = 2048         # raw .IMG: a side in pixels, 12 bit in big-endian uint16 (Shiraishi 2000)
DEFLATED = b"1.2.840.10008.1.2.1.99"  # DICOM's transfer syntax that is deflated as a whole
BORDER_TOLERANCE = 10    # grey levels by which JPEG noise moves a constant border


def load_image(source, name: str | None = None) -> np.ndarray:
    """Read an X-ray -> uint8 (H, W), air dark and bone bright.

    source: a path, or the file's bytes. PNG, JPEG, TIFF, WebP, GIF, BMP, PGM, JPEG 2000, DICOM
    (with pydicom), JSRT's raw .IMG; grey, palette or colour (to luma); the first frame, upright.
    More than 8 bits are rescaled from the file's own finite range [DiNO-Diffusion 2.5].
    name: what messages call it. Raises Unreadable, which says what was found.
    CHOICE: an alpha channel is ignored: pixels that an export made transparent are seen.
    """
    is_content = isinstance(source, bytes)
    name = name or (f"{len(source):,} bytes" if is_content else str(source))
    suffix = os.path.splitext(name)[1].lower()
    try:
        content = source if is_content else read_bytes(source, MAX_BYTES)
        if content[128:132] == b"DICM" or suffix in (".dcm", ".dicom"):
            return _read_dicom(content)
        if suffix == ".img" or len(content) == 2 * JSRT_SIDE**2:
            # TRAP: JSRT stores optical density, in which air is bright.
            return 255 - _to_8_bit(np.frombuffer(content, ">u2").reshape(JSRT_SIDE, JSRT_SIDE))
        return _read_picture(content)
    except UserError:
        raise
    except Exception as error:  # readers raise OSError, SyntaxError, struct.error and more
        reason = first_line(error).split(" <_io")[0]
        raise Unreadable(f"{name}: not a whole image: {reason}") from None


def _read_picture(content: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        _check_pixels(*image.size)
        # TRAP: Pillow keeps the high byte of 16-bit colours, with a raw mode such as RGB;16B.
        is_deep_jp2 = image.format == "JPEG2000" and image.mode not in ("L", "I;16")
        if image.mode[0] not in "IF" and (re.search(";16|'ppm'", str(image.tile)) or is_deep_jp2):
            raise ValueError("more than 8 bits in colour or with alpha; convert it to grey")
        upright = ImageOps.exif_transpose(image)
        if image.mode[0] not in "IF":
            return np.array(upright.convert("L"))
        # TRAP: convert("L") would clip 16 bits at 255, unsigned 32 bits come as signed ones, and
        # Pillow ignores TIFF's WhiteIsZero (tag 262) beyond 8 bits.
        pixels = np.array(upright)
        tags = image.tag_v2 if image.format == "TIFF" else {}
        if pixels.dtype == np.int32 and tags.get(258) == (32,) and tags.get(339, (1,)) == (1,):
            pixels = pixels.view(np.uint32)
        return 255 - _to_8_bit(pixels) if tags.get(262) == 0 else _to_8_bit(pixels)


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels, more than {MAX_PIXELS:,}")


def _to_8_bit(pixels: np.ndarray) -> np.ndarray:
    """Any numbers -> uint8 between their finite minimum and maximum; uint8 stays as it is."""
    if pixels.dtype == np.uint8:
        return pixels
    pixels = pixels.astype(np.float32 if pixels.dtype.itemsize <= 2 else np.float64)
    finite = pixels[np.isfinite(pixels)]
    low, high = finite.min(initial=np.inf), finite.max(initial=-np.inf)
    if not 0 < high - low < np.inf:
        raise ValueError("every pixel has the same value")
    pixels = np.nan_to_num(pixels, nan=low, posinf=high, neginf=low)
    return ((pixels - low) / (high - low) * 255 + 0.5).astype(np.uint8)


def _read_dicom(content: bytes) -> np.ndarray:
    """First frame of a DICOM file -> uint8 (H, W).

    CHOICE: the whole range, not the VOI window, which differs by hospital.
    """
    try:
        import pydicom
        from pydicom.pixels import apply_color_lut, pixel_array
    except ImportError:
        raise UserError("this is a DICOM file, which needs a reader: "
                        "pip install 'pydicom>=3' pylibjpeg pylibjpeg-libjpeg") from None
    if DEFLATED in content:  # pydicom would inflate it to any size
        raise ValueError("a deflated DICOM file; write it in another transfer syntax")
    file = pydicom.dcmread(io.BytesIO(content), force=True)
    _check_pixels(file.Rows, file.Columns)
    if not file.file_meta.get("TransferSyntaxUID"):  # written without file meta: DICOM's default
        file.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
    pixels = pixel_array(file, index=0)
    if file.PhotometricInterpretation == "PALETTE COLOR":
        pixels = apply_color_lut(pixels, file)
    if pixels.ndim == 3:
        return np.array(Image.fromarray(_to_8_bit(pixels)).convert("L"))

    padding = file.get("PixelPaddingValue")  # TRAP: an element that is empty is None, not absent
    if padding not in (None, ""):  # TRAP: padding lies outside of the range of the film
        limit = file.get("PixelPaddingRangeLimit")
        ends = np.array([padding, padding if limit in (None, "") else limit])
        low, high = np.sort(ends.astype(pixels.dtype))  # their sign may be written wrongly
        film = pixels[(pixels < low) | (pixels > high)]
        pixels = pixels.clip(film.min(), film.max()) if film.size else pixels
    pixels = pixels * np.float32(file.get("RescaleSlope") or 1)
    pixels = pixels + np.float32(file.get("RescaleIntercept") or 0)
    if (file.get("BitsStored") or 16) <= 8 and 0 <= pixels.min() and pixels.max() <= 255:
        pixels = pixels.astype(np.uint8)
    pixels = _to_8_bit(pixels)
    return 255 - pixels if file.PhotometricInterpretation == "MONOCHROME1" else pixels


def square(image: np.ndarray) -> tuple[slice, slice]:
    """The part of an image uint8 (H, W) that is kept: without padded border, the central square."""
    top, bottom = _content(image)
    left, right = _content(image[top:bottom].T)
    side = min(bottom - top, right - left)
    top += (bottom - top - side) // 2
    left += (right - left - side) // 2
    return slice(top, top + side), slice(left, left + side)


def _content(lines: np.ndarray) -> tuple[int, int]:
    """First and last line + 1 that are no border. A line is border while 99 % of it is within
    BORDER_TOLERANCE of the outermost line's median; a nearly blank image is kept whole."""
    borders = []
    for outermost in (lines[0], lines[-1]):
        far = np.abs(lines.astype(np.int16) - int(np.median(outermost))) > BORDER_TOLERANCE
        borders.append(far.mean(1) < 0.01)
    first = int(np.argmin(borders[0]))
    last = len(lines) - int(np.argmin(borders[1][::-1]))
    return (first, last) if last - first >= len(lines) / 5 else (0, len(lines))


def preprocess(image: np.ndarray, size: int) -> np.ndarray:
    """uint8 (H, W) -> uint8 (size, size): border removed, centre-cropped 1:1, resized [2.5]."""
    return resize(image[square(image)], size)


def resize(image: np.ndarray, size: int, method=Image.BICUBIC) -> np.ndarray:
    """uint8 (H, W) -> (size, size). CHOICE: bicubic, antialiased; the paper names no filter."""
    if image.shape == (size, size):
        return image
    return np.array(Image.fromarray(image).resize((size, size), method))


# ---- Labels (paper 2.1): file -> (patient, findings) ----

NIH_COLUMNS = {"image index": "file", "patient id": "patient", "finding labels": "labels"}
NO_FINDING = "No Finding"  # a statement about all labels, not a label of its own
NO_DIAGNOSES = {NO_FINDING, "Lung Opacity", "Support Devices"}  # MIMIC's; not among the seven


def read_labels(path) -> dict[str, tuple[str, tuple[str, ...]]]:
    """{file: (patient, labels)} from a CSV `file,patient,labels` with `|` between labels (other
    columns are ignored, patient or labels may be missing), NIH ChestX-ray14's Data_Entry CSV, or a
    folder with MIMIC-CXR's CSVs. Files are named as by `plain_name`."""
    if Path(path).is_dir():
        return mimic_labels(path)
    table = {}
    for row in read_csv(path):
        row = {NIH_COLUMNS.get(name.lower(), name.lower()): row[name] for name in row}
        file = row.get("file")
        if not file:
            raise UserError(f"{path}: found the columns {', '.join(row)}, expected "
                            "file,patient,labels (or Image Index, …)")
        found = row.get("labels", "").split("|")
        patient, labels = table.get(plain_name(file), ("", ()))  # there may be a row a label
        labels = dict.fromkeys([*labels, *filter(None, map(str.strip, found))])
        patient = row.get("patient") or patient
        table[plain_name(file)] = (patient, tuple(labels))
    if not table:
        raise UserError(f"{path} holds no rows; expected file,patient,labels and a line an image")
    return table


def mimic_labels(folder) -> dict[str, tuple[str, tuple[str, ...]]]:
    """MIMIC-CXR-JPG's …metadata.csv[.gz] and …chexpert.csv[.gz] in `folder` -> {dicom_id: (subject,
    labels)} of the frontal views (AP, PA). Which findings count is chosen when they are used.

    CHOICE: an uncertain label (-1) counts as absent, as does an empty one.
    """
    tables = [sorted(Path(folder).rglob(f"*{kind}.csv*")) for kind in ("metadata", "chexpert")]
    if not all(tables):
        raise UserError(f"{folder}: found not both of mimic-cxr-2.0.0-metadata.csv.gz and "
                        "mimic-cxr-2.0.0-chexpert.csv.gz, which MIMIC-CXR needs")
    present = {}
    for row in read_csv(tables[1][0], "study_id"):
        study = row.pop("study_id")
        row.pop("subject_id", None)
        present[study] = tuple(sorted(name for name in row if row[name] in ("1", "1.0")))
    views = read_csv(tables[0][0], "dicom_id", "subject_id", "study_id", "ViewPosition")
    return {plain_name(row["dicom_id"]): (row["subject_id"], present[row["study_id"]])
            for row in views
            if row["ViewPosition"] in ("AP", "PA") and row["study_id"] in present}


def is_mimic_test(key: str) -> bool:
    """Is this MIMIC-CXR key (files/p19/p19000293/…) or subject (19000293) in p19, the test set?"""
    return re.search(r"(^|/)p?19\d{6}(/|$)", key) is not None


def read_csv(path, *needed: str):
    """Rows of a CSV (also .gz, UTF-8 or Latin-1) as {column: value}, blank ones left out, as are
    columns without a name. UserError where a `needed` column is missing."""
    try:
        content = read_bytes(path, 2**30)
        if str(path).endswith(".gz"):
            content = gzip.decompress(content)
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = content.decode("latin-1")
        rows = csv.DictReader(io.StringIO(text, newline=""), restval="")
        rows.fieldnames = [name.strip() for name in rows.fieldnames or ()]
        names = list(filter(None, rows.fieldnames))
        if len(set(names)) < len(names):
            raise csv.Error(f"two columns of one name among {', '.join(names)}")
        if not set(needed).issubset(names):
            raise csv.Error(f"found the columns {', '.join(names)}, expected {', '.join(needed)}")
        for row in rows:
            row = {name: row[name].strip() for name in names}
            if any(row.values()):
                yield row
    except (OSError, EOFError, zlib.error, csv.Error) as error:
        raise UserError(f"{path} is no CSV that can be used: {error}") from None


def plain_name(name: str) -> str:
    """A file's path as labels are matched by it: lower case, `/`, no `./`, no picture suffix,
    accents as one letter (macOS writes two)."""
    name = unicodedata.normalize("NFC", name.strip().lower().replace("\\", "/"))
    parts = SUFFIX.sub("", name).split("/")
    return "/".join(part for part in parts if part not in ("", "."))


def match_labels(table: dict, names: list[str], folder: str) -> list:
    """The row of each file, or None; `names` are paths in `folder`. A row belongs to a file if its
    path is an end of the file's, or if both end alike as far as the file's path in the folder."""
    ends = {}
    for name, row in table.items():
        while "/" in name:
            name = name.partition("/")[2]
            ends[name] = row if ends.get(name, row) == row else None  # of two rows: neither
    rows = []
    for name in names:
        end = plain_name(f"{folder}/{name}")
        shortest = len(plain_name(name))
        while end and end not in table and (len(end) < shortest or end not in ends):
            end = end.partition("/")[2]
        rows.append(table.get(end) or ends.get(end))
    return rows


def label_names(labels) -> list[str]:
    """The set L of the paper's 2.4: every label that occurs, sorted, without "No Finding"."""
    return sorted({name for row in labels for name in row} - {NO_FINDING})


# ---- Splits and subsets (paper 2.4), by patient and reproducible ----


def _groups(patients) -> tuple[np.ndarray, np.ndarray]:
    """-> names of the patients, patient of each image; an unknown one ("") is one of its own."""
    return np.unique([p or f"\0{i}" for i, p in enumerate(patients)], return_inverse=True)


def split_by_patient(patients, fraction: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Indices of two parts that share no patient; the second holds `fraction` of the images, to
    within one patient."""
    names, group = _groups(patients)
    order = np.argsort(hash64(seed, [int(digest(name), 16) for name in names.tolist()]))
    counts = np.bincount(group)[order]
    held_out = np.zeros(len(order), bool)
    held_out[order] = np.cumsum(counts) - counts + 0.5 < fraction * len(group)
    return np.flatnonzero(~held_out[group]), np.flatnonzero(held_out[group])


def folds_by_patient(patients, labels, k: int = 5, seed: int = 0) -> list[np.ndarray]:
    """k disjoint index arrays that cover all images, share no patient, and have each label in
    near-equal numbers: stratified by the rarest label of each image."""
    from sklearn.model_selection import StratifiedGroupKFold
    names, group = _groups(patients)
    counts = Counter(itertools.chain(*labels))
    rarest = [min(row, key=counts.get, default="") for row in labels]
    most = max(Counter(rarest).values(), default=0)
    if min(len(names), most) < k:
        raise UserError(f"{k} folds need at least {k} patients and {k} images of one label; found "
                        f"{len(names)} and {most}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a label rarer than k is spread as well as it can be
        folds = StratifiedGroupKFold(k, shuffle=True, random_state=seed)
        return [part for _, part in folds.split(rarest, rarest, group)]


def balanced_subsets(labels, sizes, seed: int = 0) -> dict[int, np.ndarray]:
    """{n: indices (n,)}: n / card(L) images drawn at random for each label, without replacement,
    nested: X_50 in X_100 in … [DiNO-Diffusion 2.4]

    Labels take turns, the rarest first, each drawing one of its images that none has drawn.
    CHOICE: where a label would run out before n, images that hold a rarer label are drawn last, and
    a note says so. A size that is still too large is left out, with a note; UserError if all are.
    """
    labels = list(labels)
    counts = Counter(itertools.chain(*labels))
    names = sorted(label_names(labels), key=lambda name: (counts[name], name))
    subsets = {}
    drawn = []
    problem = "no image carries a label"
    for n in sorted(sizes if names else ()):
        for is_sparing in (False, True):
            more = _draw_in_turns(labels, names, drawn, n, seed, is_sparing)
            if len(more) == n:
                break
        if len(more) < n:
            name = names[len(more) % len(names)]
            problem = f"no balanced subset of {n}: {name!r} ran out after {len(more)} draws"
            note(problem)
            continue
        if is_sparing:
            note(f"balanced subset of {n}: images that hold a rarer label are drawn last")
        drawn = more
        subsets[n] = np.array(drawn)
    if not subsets:
        raise UserError(f"{len(labels)} images: {problem}")
    return subsets


def _draw_in_turns(labels, names, drawn, n, seed, is_sparing) -> list[int]:
    """`drawn` and what labels add to it in turns, up to n or until one runs out."""
    queues = []
    for k, name in enumerate(names):
        holders = np.array([i for i, row in enumerate(labels) if name in row])
        rarer = [is_sparing and not set(names[:k]).isdisjoint(labels[i]) for i in holders]
        queues.append(iter(holders[np.lexsort((hash64(seed, k, holders), rarer))].tolist()))
    picks = dict.fromkeys(drawn)
    while len(picks) < n:
        i = next((i for i in queues[len(picks) % len(names)] if i not in picks), None)
        if i is None:
            break
        picks[i] = None
    return list(picks)


# ---- Phantoms: chest X-rays made from a seed ----

FINDINGS = ("Effusion", "Cardiomegaly", "Consolidation", "Pneumothorax", "Nodule")
PREVALENCE = (0.20, 0.20, 0.19, 0.17, 0.20)  # of patients, independently; 9 visits in 10 show it
VISITS = 4  # X-rays a patient

# What differs between patients, then between visits, as (low, high). Lengths and places are in
# halves of the picture's side, from its middle, y down; thickness is in mean free paths.
PATIENT = dict(
    thick=(2.1, 3.2), width=(0.60, 0.80), apex=(-0.80, -0.58), dome=(0.29, 0.50),  # body, lungs
    heart=(0.38, 0.47), gap=(0.13, 0.175), twist=(0, 6.3),  # its share of width; of ribs, vessels
    side=(-1, 1), extent=(0.85, 1.15))  # of the findings
VISIT = dict(
    angle=(-0.06, 0.06), right=(-0.05, 0.05), down=(-0.04, 0.04), breath=(-0.04, 0.03),
    exposure=(-0.12, 0.12), contrast=(0.55, 0.72))


def draw(table, *ids):
    """A random number for each row of a table, as a function of `ids`."""
    low, high = np.transpose(list(table.values()))
    values = low + (high - low) * uniforms(len(table), *ids)
    return dict(zip(table, values.tolist()))  # TRAP: NumPy's scalars would make the maps float64


def chord(distance):
    """Thickness of a ball or rod of radius 1 where a ray passes its centre at `distance`."""
    return np.sqrt(np.maximum(1 - distance * distance, 0))


def slab(depth, rim):
    """Thickness, 0 to 1, of a slab with a round rim; `depth` is the way to its outline."""
    return chord(1 - np.clip(depth / rim, 0, 1))


def bell(distance):
    return np.exp(-distance * distance)


def bars(y, gap):
    """Thickness of a pile of rods, `gap` apart."""
    turns = y / gap
    return chord((turns - np.rint(turns)) * 4.6)


def outlines(case, x, y):
    """Depth in the aerated lungs and within the chest wall, nearly, negative outside; and the
    distance from the heart's centre, 1 on its outline."""
    ax = np.abs(x)
    top = y - case.apex
    height = np.square(np.clip((0.7 - y) / (0.7 - case.apex), 0, 1))
    lateral = 0.28 + (case.width - 0.28) * chord(height) - ax
    wall = lateral + top - np.hypot(lateral, top)  # a minimum with a round corner
    medial = ax - 0.28 + 0.16 * chord(height * height)
    dx = x - case.heart / 3
    dy = y - case.dome - 0.2 + 0.9 * case.heart - 0.3 * dx  # sheared: its width stays 2 case.heart
    heart = np.hypot(dx, dy / 0.85) / case.heart
    out = ax / case.width
    domes = case.dome + 0.03 * np.sign(x) + np.square(out - 0.55)  # the left one is lower
    level = case.fluid * np.heaviside(x * case.side, 0) * (0.5 + 0.5 * out**3)  # climbs outwards
    base = np.minimum(domes, case.dome + 0.3 - level) - y
    lung = np.minimum(np.minimum(wall, medial), np.minimum((heart - 1) * case.heart / 2, base))
    return lung, wall, heart


def soft_tissue(case, ax, y):
    """Trunk with shoulders and neck, and the great vessels."""
    flank = 1.4 * case.width - 0.12 + 0.6 * bell((y + 0.75) / 0.35) - ax
    above = y - case.apex + 0.1 + 0.5 * bell(ax / 0.29)
    return case.thick * slab(flank, 0.5) * slab(above, 0.9) + 0.3 * slab(0.15 - ax, 0.06)


def bones(case, ax, y, lung, wall):
    """Spine, clavicles, and the ribs, which slope down outwards behind and inwards in front."""
    spine = chord(ax / 0.085) * (0.3 + 0.3 * bars(y, 0.15))
    y = y - case.apex
    collar = chord((y - 0.18 + 0.1 * ax - 0.05 * np.sin(6 * ax)) / 0.035) * slab(0.85 - ax, 0.03)
    out = ax / case.width
    behind = bars(y + 0.1 * out - 0.22 * out**3, case.gap)
    ribs = 0.35 * behind + 0.15 * bars(y + 0.5 * out, case.gap)
    ribs = ribs * slab(wall + 0.03, 0.04) * (0.5 + 0.7 * slab(lung + 0.03, 0.06))
    return spine + ribs + 0.4 * collar


def vessels(case, x, y):
    """Zeros of a wave in polar coordinates around the hila: lines that leave them and part."""
    dx = np.abs(x) - 0.15
    radius = np.hypot(dx, y) + 0.02
    angle = np.arctan2(y, dx) + case.twist * np.sign(x)
    far = 3 * np.log(radius)
    wave = np.cos(11 * angle + far) + np.cos(7 * angle - far) + np.cos(15 * angle + 2 * far)
    return bell(wave * radius * (4 + 7 * radius)) + 0.5 * bell(radius / 0.12)


def lungs(case, labels, x, y, lung, wall, tissue):
    """What vessels and findings add to the tissue, less the air."""
    air = 0.6 * slab(lung, 0.14)
    marks = 0.4 * vessels(case, x, y)
    depth = np.minimum(outlines(case, *case.spots.T)[0], 0.12)
    spots = case.spots[np.argsort(-depth, kind="stable")].tolist()  # those well inside first
    if "Consolidation" in labels:
        cx, cy = spots[0]
        far = np.hypot(x - cx, y - cy) / case.extent + 0.04 * np.cos(17 * x + 9 * y)
        air = air * (1 - 0.9 * bell(far / 0.21))
    if "Pneumothorax" in labels:  # bare air along the wall, a line, and a denser lung
        side = np.heaviside(-x * case.side, 0)
        rim = 0.13 * case.extent - wall
        free = side * slab(rim, 0.02)
        air = air * (1 - 0.15 * side + 0.31 * free)
        marks = marks * (1 - free) + 0.5 * side * bell(rim / 0.016)
    if "Nodule" in labels:
        for cx, cy in spots[1:3]:
            marks = marks + chord(np.hypot(x - cx, y - cy) / 0.085 / case.extent)
    return marks * slab(lung, 0.04) - tissue * air


def render_phantom(seed: int, patient: int, visit: int, size: int, findings=None):
    """A frontal chest X-ray of an imaginary patient -> image uint8 (size, size), masks bool
    (2, size, size), labels (a tuple of FINDINGS).

    A pure function of its arguments, for any size >= 32. (seed, patient) give anatomy and diseases;
    `visit` gives pose, breath, exposure, grain, and whether a disease shows that day. `findings`
    replaces the labels that were drawn and leaves all else alone: the same film with and without.
    masks[0] is the patient's left lung, on the picture's right; masks[1] the right lung. They hold
    the lung field above the diaphragm, with consolidated lung, nodules and the air of a
    pneumothorax, without heart, mediastinum and pleural fluid.
    """
    if findings is None:
        ill = uniforms(5, seed, patient, 0) < PREVALENCE
        findings = np.array(FINDINGS)[ill & (uniforms(5, seed, patient, visit, 1) < 0.9)]
    labels = tuple(name for name in FINDINGS if name in findings)
    case = SimpleNamespace(
        **draw(PATIENT, seed, patient, 2), **draw(VISIT, seed, patient, visit, 3))
    case.spots = 1.4 * uniforms(2, seed, patient, np.arange(48), 4) - 0.7  # where findings may be
    case.dome += case.breath
    case.heart = (case.heart + 0.15 * ("Cardiomegaly" in labels)) * case.width  # half its width
    case.fluid = 0.55 * case.extent * ("Effusion" in labels)

    over = 2 if size <= 128 else 1  # supersampling
    rays = size * over
    y, x = np.float32(np.mgrid[:rays, :rays] + 0.5) * (2 / rays) - 1
    x = x - case.right + case.angle * y  # the patient's coordinates; the angle is small
    y = y - case.down - case.angle * x
    ax = np.abs(x)

    # A film records exp(-total), where total sums the attenuation of all tissues on the ray
    # [Beer-Lambert]; air takes thickness away.
    lung, wall, heart = outlines(case, x, y)
    tissue = soft_tissue(case, ax, y)
    soft = tissue + lungs(case, labels, x, y, lung, wall, tissue) + 0.6 * chord(heart)
    total = soft + bones(case, ax, y, lung, wall)
    maps = np.stack([total, lung, x]).reshape(3, size, over, size, over)
    total, lung, x = maps.mean((2, 4))
    key = int(hash64(seed, patient, visit, 99))
    grain = np.random.default_rng(key).standard_normal(total.shape)
    total = total + 6e-5 * size * np.exp(total / 2) * grain  # few photons pass the thick parts
    image = 255 / (1 + np.exp((0.7 * case.thick + case.exposure - total) / case.contrast))
    return np.uint8(image), np.stack([x > 0, x <= 0]) & (lung > 0), labels


# ---- Shards: tar files and one index (paper 2.5: "storing and streaming data") ----

# A shard is a plain tar of key.json + key.png (+ key.mask.png), as the webdataset library reads and
# writes them. By an index any image is one seek and one read, in any order.
INDEX = "index.npz"
TRIES = 3   # of fetching a remote shard, with a pause between
WINDOW = 8  # CHOICE: shards within which images are permuted; also what a remote cache keeps
MEMBER = re.compile(rf"(.*?)\.(mask\.png|json|{'|'.join(PICTURES).replace('.', '')})", re.I | re.S)
# A row of an index: its shard and the bytes of that, what the image is of, then where in the shard
# its parts begin and how many bytes they have (0: there is none), and the image's side in pixels.
COLUMNS = ("shard", "shard_bytes", "key", "patient", "provider", "labels", "image", "image_bytes",
           "mask", "mask_bytes", "info", "info_bytes", "size")


@dataclass
class Sample:
    """One image of a shard; `extra` goes into its JSON."""

    key: str
    image: np.ndarray                # uint8 (S, S)
    patient: str = ""
    provider: str = ""
    labels: tuple[str, ...] = ()
    mask: np.ndarray | None = None   # uint8 (S, S): 1 left lung, 2 right lung
    extra: dict = field(default_factory=dict)


def write_shard(path, samples) -> None:
    """Samples (any iterable) -> one tar, whole or absent; equal samples give equal bytes."""
    with whole(path) as partial, tarfile.open(partial, "w", format=tarfile.GNU_FORMAT) as tar:
        for sample in samples:
            info = {"file": sample.key, "patient": sample.patient, "provider": sample.provider,
                    "labels": list(sample.labels), "size": len(sample.image), **sample.extra}
            parts = {"json": json.dumps(info).encode(), "png": encode(sample.image)}
            if sample.mask is not None:
                parts["mask.png"] = encode(sample.mask)
            for suffix, content in parts.items():
                member = tarfile.TarInfo(f"{sample.key}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def encode(image) -> bytes:
    """An array uint8 (H, W[, 3]) or a PIL image -> the bytes of a PNG."""
    if not isinstance(image, Image.Image):
        image = Image.fromarray(np.asarray(image))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=2)  # five times as fast as 6, for 15 % more bytes
    return buffer.getvalue()


class Member(tarfile.TarInfo):
    """TRAP: tarfile reads a header of long names whole, of whatever size a stranger made it."""

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        member = super().frombuf(buf, encoding, errors)
        if member.type in (b"x", b"g", b"X", b"L", b"K") and member.size > 2**20:
            raise tarfile.ReadError(f"a header of {member.size:,} bytes")
        return member


def tar_members(tar: tarfile.TarFile):
    """The members of a tar. TRAP: tarfile takes one that was cut between two members for a whole
    one; after the first empty block must come a second."""
    yield from tar
    if tar.fileobj.read(512) != bytes(512):
        raise tarfile.ReadError(f"cut short or damaged at byte {tar.offset:,}")


def scan_shard(path: Path) -> list[tuple]:
    """A tar -> rows of an index; UserError where it is damaged. A key ends at the last dot; of its
    pictures the first counts. Only our own JSON is believed, and a mask only beside it."""
    spans = defaultdict(dict)  # key: {part: (offset, length)}
    infos = {}
    try:
        with tarfile.open(path, "r:", tarinfo=Member) as tar:
            for member in tar_members(tar):
                name = MEMBER.fullmatch(member.name)
                if not name or not member.isreg():
                    continue
                key, suffix = name.groups()
                part = {"mask.png": "mask", "json": "info"}.get(suffix.lower(), "image")
                spans[key].setdefault(part, (member.offset_data, member.size))
                if part == "info" and key not in infos:
                    infos[key] = read_info(tar.extractfile(member).read(MAX_BYTES))
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise UserError(f"{path}: {first_line(error)}; make or fetch this shard again") from None
    rows = []
    nowhere = (0, 0)
    for key, parts in spans.items():
        if "image" not in parts:
            continue
        info = infos.get(key, {})
        if not info:
            parts = {"image": parts["image"]}
        texts = [path.name, key, info.get("patient", ""), info.get("provider", ""),
                 "|".join(info.get("labels", ()))]
        shard, *texts = map(os.fsencode, texts)
        rows.append((shard, path.stat().st_size, *texts, *parts["image"],
                     *parts.get("mask", nowhere), *parts.get("info", nowhere),
                     info.get("size", 0)))
    return rows


def read_info(content: bytes) -> dict:
    """The JSON of an image where it is of our schema, with the right types; else {}."""
    try:
        info = json.loads(content)
        texts = [info["file"], info["patient"], info["provider"], *info["labels"]]
        "".join(texts).encode("utf-8", "surrogateescape")
        is_ours = type(info["labels"]) is list and type(info["size"]) is int
        return info if is_ours and 0 <= info["size"] < 2**15 else {}
    except (ValueError, TypeError, KeyError, RecursionError):
        return {}


def write_index(path, paths: list[Path]) -> int:
    """Shards -> one .npz with their index, a structured array with the fields COLUMNS, and the
    number of its rows."""
    rows = list(itertools.chain(*run_jobs(scan_shard, [(path,) for path in paths], "indexing")))
    if not rows:
        raise UserError(f"found no image in {len(paths)} shards: {paths[0]} …")
    rows = np.rec.fromarrays(list(zip(*rows)), names=",".join(COLUMNS))
    with whole(path) as partial:
        np.savez(partial, rows=rows)
    return len(rows)


def index_folder(folder) -> int:
    """(Re)write the index of a folder of shards -> number of images."""
    return write_index(Path(folder) / INDEX, sorted(Path(folder).glob("*.tar")))


def read_index(path) -> np.ndarray:
    """What `index_folder` wrote. UserError where it is damaged."""
    try:
        rows = np.load(io.BytesIO(read_bytes(path, 2**36)), allow_pickle=False)["rows"]
        kinds = [rows.dtype[name].kind for name in COLUMNS]
        if "".join(kinds) == "SiSSSSiiiiiii" and rows.ndim == 1:
            return rows
        found = "other columns"
    except Exception as error:  # numpy parses the file's head as Python
        found = first_line(error)
    raise UserError(f"{path} is damaged or no index of shards ({found}); remove it and run "
                    "data.index_folder on its folder")


def decode_texts(column: np.ndarray) -> list[str]:
    """A text column of an index; names of files may be no UTF-8."""
    return [os.fsdecode(text) for text in column.tolist()]


def shard_counts(rows: np.ndarray) -> dict[str, int]:
    """{shard: number of its rows}, in their order."""
    return Counter(decode_texts(rows["shard"]))


def select_shards(rows: np.ndarray, wanted) -> np.ndarray:
    """The rows of the shards in `wanted`."""
    return rows[np.isin(rows["shard"], list(map(os.fsencode, wanted)))]


def missing_shards(folder: Path, rows: np.ndarray) -> list[str]:
    """Names in an index of this folder whose shards are not there."""
    return [name for name in shard_counts(rows) if not (folder / name).exists()]


def find_index(folder: Path, paths: list[Path]) -> np.ndarray:
    """The rows of these shards: of the folder's index or, where none fits, of one in the cache."""
    sizes = {path.name: path.stat().st_size for path in paths}
    if (folder / INDEX).exists():
        with contextlib.suppress(UserError):
            rows = read_index(folder / INDEX)
            gone = missing_shards(folder, rows)
            known = dict(zip(decode_texts(rows["shard"]), rows["shard_bytes"].tolist()))
            if gone:
                note(f"{folder / INDEX} names {len(gone)} shards that are not there, such as "
                     f"{gone[0]}; the others are used")
            others = [path for path in paths if known.get(path.name) != sizes[path.name]]
            if not any(path.name in known or scan_shard(path) for path in others):
                return select_shards(rows, sizes)  # the others, if any, hold no image
        note(f"{folder / INDEX} is not of these shards; data.index_folder(folder) makes it again")
    # TRAP: tars are padded to 10,240 bytes: other shards may well be of the same size.
    times = [path.stat().st_mtime_ns for path in paths]
    name = digest(str(folder.absolute()), sizes, times)
    cached = cache_folder() / "indices" / f"{name}.npz"
    with locked(cached):
        if not cached.exists():
            write_index(cached, paths)
    return read_index(cached)


def text_column(name: str):
    """A property of `XRays`: a text column of its index as list[str], decoded once."""
    return functools.cached_property(lambda ds: decode_texts(ds.rows[name]))


class XRays(torch.utils.data.Dataset):
    """X-rays in shards. len(ds); ds[i] -> uint8 (size, size).

    ds.keys[i], ds.patients[i], ds.providers[i]: str, "" is unknown; ds.labels[i]: tuple of str.
    seed: of phantoms, else None. An image that cannot be read is a UserError that names it.
    shards: {path, or name on the remote side: number of its rows}.
    """

    def __init__(self, name: str, size: int, shards: dict[str, int], rows: np.ndarray, count=None,
                 remote=None, seed=None):
        self.name = name
        self.size = size
        self.remote = remote
        self.seed = seed
        self.rows = rows[:count]
        self.shards = list(shards)
        self.starts = np.minimum(np.cumsum([0, *shards.values()]), len(self.rows))

    def __len__(self) -> int:
        return len(self.rows)

    keys = text_column("key")
    patients = text_column("patient")
    providers = text_column("provider")

    @functools.cached_property
    def labels(self) -> list[tuple[str, ...]]:
        return [tuple(filter(None, text.split("|"))) for text in decode_texts(self.rows["labels"])]

    @functools.cached_property
    def digest(self) -> str:
        """A name of these images, their masks and labels, whatever `size` they are opened at.
        Pictures count by their number of bytes: other ones of the same names differ in it."""
        columns = ("key", "patient", "provider", "labels", "image_bytes", "mask_bytes")
        found = hashlib.blake2b(digest_size=5)
        for name in columns:
            found.update(str(self.rows[name].tolist()).encode())
        return found.hexdigest()

    def __getitem__(self, i: int) -> np.ndarray:
        image = self._decode(i, "image")
        is_prepared = self.rows["size"][i] > 0  # its border is gone already
        return resize(image, self.size) if is_prepared else preprocess(image, self.size)

    def has_mask(self, i: int) -> bool:
        return bool(self.rows["mask_bytes"][i])

    def mask(self, i: int) -> np.ndarray | None:
        """bool (2, size, size): the patient's left and right lung; None without a mask."""
        if not self.has_mask(i):
            return None
        mask = resize(self._decode(i, "mask"), self.size, Image.NEAREST)
        return np.stack([mask == 1, mask == 2])

    def problem(self, i: int) -> str:
        """What is wrong with an image or its mask, or ""."""
        try:
            self.mask(i)
            if np.ptp(self[i]) == 0:
                return f"{self.shard_of(i)}: {self.keys[i]}: every pixel has the same value"
        except UserError as error:
            return str(error)
        return ""

    def info(self, i: int) -> dict:
        """The JSON beside the image, {} where there is none of ours."""
        return read_info(self._content(i, "info"))

    def named(self, keys) -> dict[str, torch.Tensor]:
        """Images by key -> {key, with _ for /: uint8 (size, size)}."""
        found = {}
        for key in keys:
            if key not in self.keys:
                raise UserError(f"{self.name}: no key {key!r}; the first is {self.keys[0]}")
            found[key.replace("/", "_")] = torch.from_numpy(self[self.keys.index(key)])
        return found

    def read(self, ids) -> torch.Tensor:
        """Images of `ids` -> uint8 (n, size, size), read by several threads."""
        threads = 1 if torch.utils.data.get_worker_info() else cores()
        with ThreadPoolExecutor(threads) as pool:
            return torch.from_numpy(np.stack(list(pool.map(self.__getitem__, ids))))

    def shard_of(self, i: int) -> str:
        return self.shards[np.searchsorted(self.starts, i, "right") - 1]

    def open(self, i: int):
        """The shard of an image, open for reading; a remote one is fetched first."""
        if self.remote:
            return self.remote.open(self.shard_of(i), self.rows["shard_bytes"][i])
        return open(self.shard_of(i), "rb")

    def _content(self, i: int, part: str) -> bytes:
        with self.open(i) as file:  # a damaged index may say anything
            file.seek(max(0, self.rows[part][i]))
            return file.read(np.clip(self.rows[f"{part}_bytes"][i], 0, MAX_BYTES))

    def _decode(self, i: int, part: str) -> np.ndarray:
        key = os.fsdecode(self.rows["key"][i])
        try:
            return load_image(self._content(i, part), key)
        except (Unreadable, OSError) as error:
            shard = self.shard_of(i)
            place = self.name if self.remote else f"{os.path.dirname(shard)}/*.tar"
            raise UserError(f"{shard}: {part} of {key}: {error}. Make or fetch this shard again; "
                            f"data.py check '{place}' names all damage") from None

    @functools.lru_cache(8)  # the epochs that readers are in, of a few sets
    def order(self, seed: int, epoch: int) -> np.ndarray:
        """int64 (len,): each image once; shards permuted, images permuted within WINDOW shards."""
        shards = np.argsort(hash64(seed, epoch, 1, np.arange(len(self.shards))))
        window = np.empty(len(shards), np.int64)
        window[shards] = np.arange(len(shards)) // WINDOW
        hashes = hash64(seed, epoch, 0, np.arange(len(self)))
        return np.lexsort((hashes, np.repeat(window, np.diff(self.starts))))

    def fetch(self, ids) -> None:
        """Fetch the remote shards of these images; what fails here fails again when it is read."""
        for i in {self.shard_of(i): i for i in ids}.values():
            with contextlib.suppress(UserError, OSError):
                self.open(i).close()


def open_shards(name: str, size: int, paths: list[Path], count=None, seed=None) -> XRays:
    """Local shards, in one folder or several."""
    folders = defaultdict(list)
    for path in paths:
        folders[path.parent].append(path)
    shards = {}
    parts = []
    for folder, found in folders.items():
        rows = find_index(folder, found)
        counts = shard_counts(rows)
        shards |= {str(folder / shard): counts[shard] for shard in counts}
        parts.append(rows)
    rows = np.concatenate(parts) if len(parts) > 1 else parts[0]
    return XRays(name, size, shards, rows, count, seed=seed)


def open_data(spec: str, size: int, seed: int = 0, count: int | None = None,
              labels: str | None = None, cache_gb: float = 20.0) -> XRays:
    """Open `spec` as a set of X-rays of `size` pixels; `count` keeps the first images.

    spec: `phantom` (`count` of them, 4096 by default) | a folder, zip or compressed tar of X-rays,
    prepared once into the cache, with `labels` or the CSVs in or beside it | a folder or a quoted
    glob of shards | hf://datasets/OWNER/NAME/GLOB | pipe:COMMAND {shard}, where COMMAND writes the
    shard to its standard output. Remote shards pass through a local cache of `cache_gb`.
    """
    path = Path(spec).expanduser()
    if spec == "phantom":
        return _open_phantoms(size, count or 4096, seed)
    if spec.startswith(("hf://", "pipe:")):
        return open_remote(spec, size, count, cache_gb)
    parent, pattern = (path, "*.tar") if path.is_dir() else (path.parent, path.name)
    # A folder that is there may have a name with [ or *.
    place = glob.escape(str(parent)) if parent.is_dir() else parent
    found = map(Path, glob.glob(f"{place}/{pattern}", recursive=True))
    paths = [path] if path.is_file() else sorted(filter(Path.is_file, found))
    is_world = path.is_file() and path.suffix != ".tar"
    if path.is_dir() and not (path / INDEX).exists():
        is_world = not paths or labels or any(map(WORLD.search, walk(path)))
    if is_world:
        paths = _prepared(path, size, labels)
    elif labels:
        raise UserError(f"--labels {labels} goes with a folder of X-rays; shards carry their own: "
                        "give it to data.py prepare")
    if not paths:
        raise UserError(f"--data {spec}: no such file or folder; expected phantom, a folder or zip "
                        "of X-rays, a quoted glob of shards with * ? [0-9] (no braces) like "
                        "'shards/*.tar', hf://datasets/OWNER/NAME/GLOB or 'pipe:COMMAND {shard}'")
    return open_shards(spec, size, paths, count)


def _prepared(path: Path, size: int, labels: str | None) -> list[Path]:
    """The shards of a folder or archive of X-rays, prepared once; other files, another folder."""
    path = path.absolute()
    files = [*walk(path).values(), *label_csvs(path), *(walk(labels) if labels else {}).values()]
    listing = [(str(file), os.path.getsize(file), os.path.getmtime(file)) for file in files]
    folder = cache_folder() / "prepared" / f"{path.name}-{size}px-{digest(listing, labels)}"
    with locked(folder):
        if not (folder / INDEX).exists():
            prepare(Prepare(str(path), str(folder), size, labels))
    return sorted(folder.glob("*.tar"))


def _open_phantoms(size: int, count: int, seed: int) -> XRays:
    """`count` films of imaginary patients, VISITS each, drawn once. Their folder's name holds a
    film with all findings: other lines above, another folder."""
    film = digest(render_phantom(seed, 0, 0, 64, FINDINGS)[0].tolist(), PREVALENCE)
    folder = cache_folder() / "phantoms" / f"{size}px-{count}-seed{seed}-{film}"
    with locked(folder):
        if not (folder / INDEX).exists():
            jobs = [(folder / f"shard-{k:06d}.tar", seed, range(k, min(k + 128, count)), size)
                    for k in range(0, count, 128)]
            run_jobs(_draw_phantoms, jobs, "drawing phantoms")
            index_folder(folder)
    return open_shards("phantom", size, sorted(folder.glob("*.tar")), seed=seed)


def _draw_phantoms(path: Path, seed: int, numbers: range, size: int) -> None:
    """A shard of phantoms."""
    samples = []
    for number in numbers:
        patient, visit = divmod(number, VISITS)
        image, (left, right), labels = render_phantom(seed, patient, visit, size)
        samples.append(Sample(f"phantom-{patient:05d}-{visit}", image, f"{patient:05d}", "phantom",
                              labels, np.uint8(left + 2 * right)))
    write_shard(path, samples)


# ---- Shards that lie elsewhere ----


def parse_hub(spec: str) -> tuple[str, str | None, str]:
    """hf://datasets/OWNER/NAME[@REVISION]/GLOB -> OWNER/NAME, revision or None, glob."""
    found = re.fullmatch(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@([^/]+))?/(.+)", spec)
    if found is None:
        raise UserError(f"{spec}: expected hf://datasets/OWNER/NAME/GLOB, for instance "
                        "hf://datasets/me/xrays/*.tar")
    return found.groups()


class Remote:
    """Shards that are fetched whole, once, into a local folder that all processes share.

    The 2 * WINDOW shards used last are kept in any case: those being read, those fetched ahead.
    Older ones are dropped once those of one place have more than `cache_gb`.
    """

    def __init__(self, spec: str, cache_gb: float):
        self.spec = spec
        self.hub = None if spec.startswith("pipe:") else parse_hub(spec)
        self.limit = cache_gb * 1e9
        place = os.path.dirname(spec) if self.hub else spec
        self.folder = cache_folder() / "shards" / digest(place)

    def open(self, name: str, size: int):
        """The local copy of a shard of `size` bytes, open for reading; fetched if it is not there,
        or not whole."""
        path = self.folder / name
        with locked(path):  # an open file can be read even if it is dropped
            is_new = not path.exists() or path.stat().st_size != size
            if is_new:
                self.fetch(name, size)
            os.utime(path)  # used now: the drop goes by this
            file = open(path, "rb")
        if is_new:
            self._drop()
        return file

    def fetch(self, name: str, size: int | None = None) -> None:
        """Bring one file, whole or not at all; UserError after TRIES failures."""
        for attempt in range(TRIES):
            time.sleep(attempt**2)
            try:
                with whole(self.folder / name) as partial:
                    self._bring(name, partial)
                    found = partial.stat().st_size
                    if size not in (None, found):
                        raise OSError(f"{found:,} bytes came, the index says {size:,}")
                return
            except (OSError, UserError) as error:
                reason = error
        raise UserError(f"{self.spec}: {name} could not be fetched in {TRIES} tries: {reason}")

    def _bring(self, name: str, partial: Path) -> None:
        """Copy a remote file to `partial`."""
        if self.hub:
            repository, revision, pattern = self.hub
            there = os.path.join(os.path.dirname(pattern), name)
            folder, _ = hub_files(repository, [there], revision, "dataset", partial.parent)
            (folder / there).rename(partial)
            return
        command = self.spec.removeprefix("pipe:").replace("{shard}", name)
        with open(partial, "wb") as file:
            ran = subprocess.run(command, shell=True, stdout=file, stderr=subprocess.PIPE)
        if ran.returncode:
            raise OSError(f"exit code {ran.returncode}: {ran.stderr.strip()[-200:]!r}")

    def _drop(self) -> None:
        held = 0
        with contextlib.suppress(FileNotFoundError):  # another process is dropping, too
            # Those of earlier indices count as well.
            newest = sorted(self.folder.parent.glob("*/*.tar"), key=os.path.getmtime, reverse=True)
            for k, path in enumerate(newest):
                held += path.stat().st_size
                if k >= 2 * WINDOW and held > self.limit:
                    with locked(path):
                        path.unlink()

    def index(self) -> np.ndarray:
        """Of all shards; where it cannot be fetched, that of an earlier run. TRAP: shards that were
        made anew mostly have the sizes of the old ones, so each index has a folder of its own."""
        path = self.folder / INDEX
        with locked(path):
            try:
                self.fetch(INDEX)
            except UserError as error:
                if not path.exists():
                    raise UserError(f"{error}\nWhere the shards are, data.index_folder(folder) "
                                    "makes an index") from None
                note(f"{error}; the index of an earlier run is used")
            rows = read_index(path)
        self.folder /= str(zlib.crc32(rows.tobytes()))
        return rows


def open_remote(spec: str, size: int, count: int | None, cache_gb: float) -> XRays:
    """hf:// or pipe: -> XRays. Shards that `hf download` has brought are opened where they are."""
    if spec.startswith("pipe:") and "{shard}" not in spec:
        raise UserError(f"--data {spec}: expected {{shard}} where the shard's name goes: "
                        "'pipe:aws s3 cp s3://BUCKET/{shard} -'")
    remote = Remote(spec, cache_gb)
    pattern = "*"
    cached = []
    if remote.hub:
        repository, revision, pattern = remote.hub
        with contextlib.suppress(UserError):
            folder, names = hub_files(repository, [pattern], revision, "dataset", is_cached=True)
            # TRAP: the hub's * crosses /, and a pattern may match more than shards.
            cached = [folder / name for name in names if name.endswith(".tar")
                      and os.path.dirname(name) == os.path.dirname(pattern)]
    try:
        rows = remote.index()
    except UserError:
        if not cached:
            raise
        note(f"{spec}: out of reach; the {len(cached)} files in the hub's cache are used")
        return open_shards(spec, size, cached, count)
    counts = shard_counts(rows)
    wanted = {name: counts[name] for name in fnmatch.filter(counts, os.path.basename(pattern))}
    strange = [name for name in wanted if not re.fullmatch(r"[\w+@=][\w.+@=-]*", name)]
    if strange or not wanted:  # names reach a shell
        raise UserError(f"{spec}: its index names the shards {[*strange, *counts][:3]}; expected "
                        f"{pattern}, of letters, digits and ._-+@=")
    if {path.name for path in cached}.issuperset(wanted):
        return open_shards(spec, size, cached, count)
    return XRays(spec, size, wanted, select_shards(rows, wanted), count, remote)


# ---- prepare and check: any pile of X-rays -> shards (paper 2.1) ----

ARCHIVES = re.compile(r"\.(zip|tar|tgz|tar\.(gz|bz2|xz))$", re.I)
SYSTEM = re.compile(r"[.@$]|__MACOSX$|lost\+found$|System Volume")  # files and folders left out
DAMAGED = (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, lzma.LZMAError)
UNPACKED = 100  # times its size that an archive may grow
MASK_FOLDER = re.compile(r"(left|right)?[ _]?(mask|lung)s?", re.I)
OTHER_ORGANS = re.compile(r"heart|(left|right) clavicle", re.I)  # of JSRT's SCR masks


@dataclass
class Prepare:
    source: str = field(default=None, metadata={"positional": True})  # folder, zip, tar, hf:// glob
    out: str = "shards"           # folder for the shards, their index, unreadable.json
    size: int = 512               # pixels a side after cropping and resizing
    labels: str | None = None     # CSV file,patient,labels (| between), NIH's CSV, MIMIC's folder
    provider: str | None = None   # name of the data provider; default: the source's name
    per_shard: int = 1000         # images a shard, at most
    workers: int | None = None    # processes; default: one a core
    offline: bool = False         # hf:// from the hub's cache alone


@dataclass
class Check:
    data: str = field(default=None, metadata={"positional": True})  # a quoted glob, or any --data
    offline: bool = False         # hf:// from the hub's cache alone


@dataclass
class Film:
    """An X-ray that becomes a `Sample`."""

    key: str
    files: dict[str, str]         # {name: path} of the picture, then of its masks
    patient: str
    labels: tuple[str, ...]


def walk(root, skip=None) -> dict[str, str]:
    """{name: path} of all regular files in a folder, sorted: each inode once, links or not,
    nothing hidden, no system folders, not the folder `skip`. Of a file: itself."""
    if os.path.isfile(root):
        return {os.path.basename(root): str(root)}
    paths = []
    seen = {os.path.realpath(skip)} if skip else set()
    for folder, folders, names in os.walk(root, followlinks=True, onerror=note):
        place = os.path.realpath(folder)
        if place in seen:
            folders.clear()
            continue
        seen.add(place)
        folders[:] = sorted(name for name in folders if not SYSTEM.match(name))
        paths += [os.path.join(folder, name) for name in sorted(names) if not SYSTEM.match(name)]
    found = {}  # by inode
    for path in sorted(filter(os.path.isfile, paths), key=os.path.islink):  # links come last
        status = os.stat(path)
        found.setdefault((status.st_dev, status.st_ino), path)
    return {os.path.relpath(path, root): path for path in sorted(found.values())}


def is_picture(path: str) -> bool:
    """By its suffix, or by DICOM's mark: such files are often called by their UID."""
    if SUFFIX.search(path):
        return not path.endswith(".mask.png")
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"
    return False


def read_pictures(paths, size: int) -> dict[str, torch.Tensor]:
    """Pictures and folders of them -> {name without folder and suffix, made unique: uint8 (size,
    size)}; one that cannot be read is noted."""
    found = {}
    for source in paths:
        for path in walk(source).values():
            name = re.sub(r"[^\w-]+", "_", SUFFIX.sub("", os.path.basename(path)))
            if name in found:
                name += f"-{digest(path)}"
            try:
                if is_picture(path):
                    found[name] = torch.from_numpy(preprocess(load_image(path), size))
            except Unreadable as error:
                note(str(error))
    return found


def label_csvs(source) -> list[Path]:
    """The CSVs beside a folder or archive (SOURCE.csv) and in the folder."""
    source = Path(source).expanduser().absolute()
    beside = source.with_name(f"{ARCHIVES.sub('', source.name)}.csv")
    return [path for path in (beside, *sorted(source.glob("[!.]*.csv"))) if path.is_file()]


def find_pictures(source: str, out: Path, problems: dict[str, str]) -> dict[str, str]:
    """{name: path} of the pictures in a folder, an archive or a glob on the hub, sorted. Archives
    count as folders and are unpacked into out/.unpacked; `problems` takes up what is not whole."""
    root = Path(source).expanduser().absolute()
    if source.startswith("hf://"):
        repository, revision, pattern = parse_hub(source)
        folder, names = hub_files(repository, [pattern], revision, "dataset")
        files = {name: str(folder / name) for name in names}
    elif root.exists():
        files = walk(root, out)
    else:
        raise UserError(f"{source}: no such folder or file; expected X-rays, a zip or a tar")
    for name in list(filter(ARCHIVES.search, files)):
        archive = files.pop(name)
        prefix = ARCHIVES.sub("", name) + "/"
        if any(other.startswith(prefix) for other in files):
            note(f"{name} lies beside a folder of its name and is left out")
            continue
        if archive == str(root):
            prefix = ""
        folder = out / ".unpacked" / digest(archive)
        unpack(archive, folder, problems)
        inside = walk(folder)
        files |= {prefix + other: inside[other] for other in inside}
    return {name: files[name] for name in sorted(files) if is_picture(files[name])}


def unpack(archive: str, folder: Path, problems: dict[str, str]) -> None:
    """Write the files of a zip or tar to `folder`. `problems` takes up {name: why} of those that
    cannot be read; of an archive that is cut short, what comes before is used."""
    left = max(UNPACKED * os.path.getsize(archive), 2**30)
    inside = os.path.basename(archive)
    folder.mkdir(parents=True)
    try:
        for name, size, open_member in archive_files(archive):
            try:
                if name.startswith("/") or ".." in name.split("/"):
                    raise ValueError("its path leads out of the archive")
                if size is None:
                    raise ValueError("a link or a device")
                if size > min(left, MAX_BYTES):
                    raise ValueError(f"{size:,} bytes are too many")
                if ARCHIVES.search(name):
                    raise ValueError("an archive within an archive: unpack it first")
                with open_member() as part:
                    content = part.read(size)
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(content)
                left -= size
            except Exception as error:  # zipfile, tarfile, zlib and lzma have many kinds
                if getattr(error, "errno", None):  # of the disk, not of the archive
                    raise
                problems[f"{inside}: {name}"] = first_line(error)
    except (*DAMAGED, OSError) as error:
        if getattr(error, "errno", None):
            raise
        problems[inside] = f"cut short or no archive: {first_line(error)}"
        note(f"{inside}: {problems[inside]}; what comes before is used")


def archive_files(archive: str):
    """(name, size, function that opens it) of a zip's or tar's files; None is a link's size."""
    if archive.lower().endswith(".zip"):
        with zipfile.ZipFile(archive) as file:
            for member in file.infolist():
                if not member.is_dir():
                    yield member.filename, member.file_size, functools.partial(file.open, member)
        return
    with tarfile.open(archive, tarinfo=Member) as file:
        for member in tar_members(file):
            if not member.isdir():
                size = member.size if member.isreg() else None
                yield member.name, size, functools.partial(file.extractfile, member)


def pair_masks(names) -> dict[str, list[str]]:
    """Names of pictures -> {image: [], [its mask], or [its left and right mask]}, sorted.

    images/ + masks/ · JSRT's *.IMG + SCR's left lung/, right lung/ · CXR_png/ + ManualMask/
    leftMask/, rightMask/ (Montgomery) · CXR_png/ + mask/*_mask.png (Shenzhen). A mask belongs to
    the image of its name that shares the longest path with it; an image without one is kept.
    """
    paired = {}
    images = defaultdict(list)
    masks = []
    orphans = []
    for name in sorted(names):
        folder = os.path.basename(os.path.dirname(name))
        if MASK_FOLDER.fullmatch(folder):
            masks.append(name)
        elif not OTHER_ORGANS.fullmatch(folder):
            paired[name] = []
            images[_stem(name)].append(name)
    for mask in masks:
        shared = {name: len(os.path.commonprefix([mask.split("/"), name.split("/")]))
                  for name in images[_stem(mask).removesuffix("_mask")]}
        best = [name for name in shared if shared[name] == max(shared.values())]
        if not best:
            orphans.append(mask)
            continue
        found = paired[best[0]]
        found.append(mask)
        if len(best) > 1 or len(found) > 2 or len(set(map(os.path.dirname, found))) < len(found):
            raise UserError(f"masks or images of one name: {[*best, *found]}; these are several "
                            "sets: prepare one at a time")
    if orphans:
        note(f"{len(orphans)} masks, such as {orphans[0]}, belong to no image and are left out")
    return paired


def _stem(name: str) -> str:
    return SUFFIX.sub("", os.path.basename(name)).lower()


def lung_mask(masks: list[np.ndarray]) -> np.ndarray:
    """One mask bool (S, S) of both lungs, or one of each -> uint8: 1 the patient's left lung, on
    the picture's right, 2 the right one. Each part goes to the side on which its centre is,
    whatever its folder is called; lungs in one piece are cut."""
    both = np.any(masks, axis=0)
    if not both.any():
        return np.uint8(both)
    parts, count = ndimage.label(both)
    if len(masks) == 2:
        parts = masks[0] + 2 * (masks[1] > masks[0])
        count = 2
    x = np.broadcast_to(np.arange(len(both)), both.shape)
    middle = np.flatnonzero(both.any(0))[[0, -1]].mean()
    if np.bincount(parts[both]).max() < 0.75 * both.sum():
        x = np.append(0, ndimage.mean(x, parts, range(1, count + 1)))[parts]
    return np.uint8(both * np.where(x < middle, 2, 1))


def prepare(s: Prepare) -> None:
    """Turn any pile of X-rays into tar shards and an index. The same command again goes on where it
    was stopped."""
    if s.per_shard < 1 or not 1 <= s.size < 2**15:
        raise UserError(f"found --per-shard {s.per_shard} --size {s.size}, expected at least 1")
    out = Path(s.out).expanduser().absolute()
    with locked(cache_folder() / "prepared" / digest(str(out))):
        for left in (out / ".unpacked", *out.glob(".shard-*.partial")):  # by a kill
            shutil.rmtree(left, ignore_errors=True)
        try:
            unreadable = {}  # {name: why}
            films = find_films(s, find_pictures(s.source, out, unreadable))
            recipe = {"source": os.path.abspath(s.source), "size": s.size, "provider": s.provider,
                      "per_shard": s.per_shard, "files": digest([vars(film) for film in films])}
            file = out / "prepare.json"
            known = read_json(file) if file.exists() else recipe
            if known != recipe:
                raise UserError(f"{out} holds shards made otherwise: found {known}, expected "
                                f"{recipe}. Give another --out, or remove that folder")
            write_json(file, recipe)
            for name in (INDEX, "unreadable.json"):  # of an earlier run
                (out / name).unlink(missing_ok=True)
            # CHOICE: small sets have shards of fewer images, for all cores to work.
            step = min(s.per_shard, max(64, -(-len(films) // 16)))
            jobs = [(out / f"shard-{k // step:06d}.tar", films[k:k + step], s)
                    for k in range(0, len(films), step)]
            missing = [job for job in jobs  # what could not be read may have been mended
                       if not job[0].exists() or job[0].with_suffix(".unreadable.json").exists()]
            run_jobs(_prepare_shard, missing, f"preparing {s.source}", s.workers)
            for file in out.glob("shard-*.unreadable.json"):
                unreadable |= read_json(file)
            if unreadable:
                write_json(out / "unreadable.json", unreadable)
                name = min(unreadable)
                note(f"{len(unreadable):,} files could not be read; {out}/unreadable.json names "
                     f"them. The first, {name}: {unreadable[name]}")
            images = index_folder(out)
            print(f"{images:,} images in {len(jobs)} shards with their index: {out}/")
        finally:
            shutil.rmtree(out / ".unpacked", ignore_errors=True)


def find_films(s: Prepare, files: dict[str, str]) -> list[Film]:
    """Of {name: path} of pictures: each X-ray with its masks, and patient and labels by --labels
    or the CSVs in or beside the source, in a fixed order."""
    masks = pair_masks(files)
    if not masks:
        raise UserError(f"{s.source} holds no X-rays; expected {' '.join(PICTURES)}, or zip or tar "
                        "files of them")
    table = {}
    for path in [s.labels] if s.labels else label_csvs(s.source):
        try:
            table |= read_labels(path)
        except UserError as error:
            if s.labels:
                raise
            note(f"skipped: {error}")
    rows = match_labels(table, list(masks), os.path.abspath(s.source))
    if table:
        matched = len(rows) - rows.count(None)
        if not matched:
            raise UserError(f"none of the {len(table):,} files that the labels name, such as "
                            f"{next(iter(table))}, is among the images, such as {min(masks)}")
        note(f"labels of {s.source}: matched {matched:,} of {len(rows):,} images")
    is_mimic = bool(s.labels) and os.path.isdir(s.labels)  # its tables name frontal views alone
    films = {}
    for name, row in zip(masks, rows):
        if row is None and is_mimic:
            continue
        patient, labels = row or ("", ())
        if masks[name]:  # such sets have an image a patient
            patient = patient or _stem(name)
        key = re.sub(r"[^\w/-]+", "_", SUFFIX.sub("", name)).strip("/")
        if key in films:
            key = f"{key}-{digest(name)}"
        pictures = {part: files[part] for part in [name, *masks[name]]}
        films[key] = Film(key, pictures, patient, labels)
    return list(films.values())


def _prepare_shard(path: Path, films: list[Film], s: Prepare) -> None:
    """A shard; a file beside it, which is there first, names what cannot be read."""
    unreadable = {}
    report = path.with_suffix(".unreadable.json")
    with whole(path) as partial:
        samples = (read_film(film, s, unreadable) for film in films)
        write_shard(partial, filter(None, samples))
        if unreadable:
            write_json(report, unreadable)
    if not unreadable:  # all that an earlier run could not read was mended
        report.unlink(missing_ok=True)


def read_film(film: Film, s: Prepare, unreadable: dict[str, str]) -> Sample | None:
    """An X-ray and its masks, cropped alike; `unreadable` takes up {name: why}."""
    name, *masks = film.files
    pictures = {}
    for part, path in film.files.items():
        try:
            pictures[part] = load_image(path, part)
        except Unreadable as error:
            unreadable[part] = str(error)
    image = pictures.pop(name, None)
    if image is None:
        return None
    if image.min() == image.max():
        unreadable[name] = f"{name}: every pixel has the same value"
        return None
    part = square(image)
    lungs = []
    for mask in pictures.values():
        least = mask.max() // 2 if mask.max() > 8 else 0  # else numbers of lungs, as in ours
        mask = Image.fromarray(mask > least)  # SCR's masks have half the size
        mask = np.array(mask.resize(image.shape[::-1], Image.NEAREST), np.uint8)
        lungs.append(resize(mask[part], s.size, Image.NEAREST) > 0)
    is_whole = 0 < len(lungs) == len(masks)
    provider = s.provider or ARCHIVES.sub("", Path(s.source).absolute().name)
    return Sample(film.key, resize(image[part], s.size), film.patient, provider, film.labels,
                  lung_mask(lungs) if is_whole else None, {"file": name})


def check(s: Check) -> None:
    """Read every image of a set, say what is wrong; UserError where anything is."""
    ds = open_data(s.data, 64)
    problems = []
    with ThreadPoolExecutor(cores()) as pool:
        for k in progress(range(len(ds.shards)), f"checking {s.data}", unit=" shards"):
            images = range(ds.starts[k], ds.starts[k + 1])
            problems += filter(None, pool.map(ds.problem, images))
    twice = len(ds) - len(set(ds.keys))
    if twice:
        problems.append(f"{twice} images have the key of another one")
    for folder in {Path(shard).parent for shard in ds.shards if not ds.remote}:
        with contextlib.suppress(UserError):
            gone = missing_shards(folder, read_index(folder / INDEX))
            problems += [f"{folder / name}: missing, but in {INDEX}" for name in gone]
    if problems:
        print("\n".join(problems[:50]))
        raise UserError(f"{s.data}: {len(ds):,} images, problems: {len(problems)}")
    print(f"{s.data}: {len(ds):,} images, all readable")


# ---- Batches: the endless stream of epochs, cut by step and rank (paper 2.5) ----


def batches(ds, batch: int, start_step: int = 0, seed: int = 0, rank: int = 0, world: int = 1,
            micro_batch: int | None = None, workers: int = 0, read=None):
    """Yield (step, ids int64 (b,), item) for ever, one micro-batch of this rank after another.

    item = read(ids, step), by default the images, uint8 (b, size, size). Step s is positions
    [s * batch, (s + 1) * batch) of the epochs ds.order(seed, 0), ds.order(seed, 1), … end to end;
    rank r has the r-th of `world` equal slices. So a step depends on (seed, step) alone.
    """
    micro_batch = micro_batch or batch // world
    passes = batch // (world * micro_batch)
    assert batch == passes * world * micro_batch, (batch, world, micro_batch)

    def read_part(k):
        """The k-th micro-batch. Errors travel as values: the user sees one line, no traceback."""
        step = start_step + k // passes
        first = step * batch + (rank * passes + k % passes) * micro_batch
        ids = images_at(ds, seed, first + np.arange(micro_batch))
        try:
            return step, torch.from_numpy(ids), read(ids, step) if read else ds.read(ids)
        except (UserError, OSError) as error:
            return UserError(str(error))

    options = {}
    if workers:
        workers = fit_shared_memory(workers, len(pickle.dumps(read_part(0))))
    if workers:
        options = {"multiprocessing_context": "fork", "worker_init_fn": _start_reader}
    # TRAP: without its own generator a DataLoader draws from the global one: resuming shifts it.
    loader = torch.utils.data.DataLoader(
        range(sys.maxsize), batch_size=None, collate_fn=read_part, generator=torch.Generator(),
        num_workers=workers, pin_memory=torch.cuda.is_available(), **options)
    ahead = WINDOW * len(ds) // len(ds.shards)  # images until the next window, whose shards come
    for item in loader:
        if isinstance(item, UserError):
            raise item
        if ds.remote:  # threads start after the workers were forked
            coming = images_at(ds, seed, item[0] * batch + ahead + np.arange(batch))
            threading.Thread(target=ds.fetch, args=(coming,), daemon=True).start()
        yield item


def images_at(ds, seed: int, places: np.ndarray) -> np.ndarray:
    """ids of the images at these places of the epochs of `seed`, end to end."""
    return np.array([ds.order(seed, place // len(ds))[place % len(ds)]
                     for place in places.tolist()])


def _start_reader(worker: int) -> None:
    """SIGTERM to a process group asks for a checkpoint: readers go on until their parent ends."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    end_with()


def fit_shared_memory(workers: int, item_bytes: int) -> int:
    """-> the workers whose batches fit into /dev/shm: two of each, and two with the caller. TRAP: a
    DataLoader whose batches do not fit waits for ever, or dies of a bus error."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    fitting = max(0, int(0.4 * free_shared_memory() / ranks / item_bytes) - 1)
    if fitting < workers:
        note(f"/dev/shm has room for {fitting} of {workers} workers with batches of "
             f"{item_bytes:,} bytes; in Docker, --shm-size gives more room")
    return min(fitting, workers)


def free_shared_memory() -> float:
    """Bytes that are free in /dev/shm, through which processes hand over their batches."""
    status = os.statvfs("/dev/shm" if os.path.isdir("/dev/shm") else "/")
    return status.f_bavail * status.f_frsize


# ---- On the device: augmentation and the two ranges of pixels (paper 2.5) ----

SHEAR = 0.05            # of the side, either way, both axes [2.5]
SHIFT = 0.05            # of the side [2.5]
SCALE = (0.90, 1.40)    # zoom [2.5]
SHARPEN = 1.0           # CHOICE: largest share of the unsharp mask; half of the images get none


def augment(images: torch.Tensor, ids, step, seed: int) -> torch.Tensor:
    """Random affine and sharpening: uint8 (B, S, S), ids int64 (B,) -> float32 (B, 1, S, S) in
    [-1, 1]. A row is a pure function of (seed, id, step), whatever else is in the batch.

    CHOICE: what comes into view repeats the edge: a black frame would be learned as X-ray.
    """
    u = uniforms(6, seed, torch.as_tensor(ids).cpu().numpy(), step)    # (B, 6)
    zoom, *signed = torch.from_numpy(u).float().to(images.device, non_blocking=True).T
    signed = 2 * torch.stack(signed) - 1                               # (5, B) in [-1, 1)
    theta = torch.eye(2, 3, device=images.device).repeat(len(images), 1, 1)
    theta[:, 0, 1] = signed[0] * SHEAR
    theta[:, 1, 0] = signed[1] * SHEAR
    theta[:, :, 2] = signed[2:4].T * (2 * SHIFT)                       # the grid's side is 2
    zoom = SCALE[0] + (SCALE[1] - SCALE[0]) * zoom
    theta = theta / zoom[:, None, None]                                # output -> input
    x = images[:, None].float() / 127.5 - 1                            # (B, 1, S, S)
    # TRAP: bfloat16 and TF32 would round the product inside to a pixel and more; not float64.
    where = F.affine_grid(theta.double(), x.shape, align_corners=False).float()  # (B, S, S, 2)
    x = F.grid_sample(x, where, mode="bilinear", padding_mode="border", align_corners=False)
    amount = signed[4].clamp(min=0).view(-1, 1, 1, 1) * SHARPEN
    # TRAP: zeros around the picture would draw a frame.
    blurred = F.pad(x, (1, 1, 1, 1), mode="replicate")
    blurred = F.avg_pool2d(F.avg_pool2d(blurred, 2, 1), 2, 1)          # 1-2-1 along both axes
    return (x + amount * (x - blurred)).clamp(-1, 1)


def to_model(images: torch.Tensor) -> torch.Tensor:
    """uint8 (B, S, S) -> float32 (B, 3, S, S) in [-1, 1]: three equal channels, for the VAE."""
    return (images[:, None].float() / 127.5 - 1).expand(-1, 3, -1, -1)


def to_uint8(x: torch.Tensor) -> torch.Tensor:
    """float (B, 3, H, W) in [-1, 1] -> uint8 (B, H, W): mean of the channels, rounded, clamped."""
    return ((x.float().mean(1) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


# ---- Pictures for people ----


def grid(images, columns: int, captions=None, row_titles=None, title=None) -> Image.Image:
    """Tile images uint8 (S, S) or (S, S, 3) by rows -> an RGB picture; small ones are enlarged.

    captions: a text under each; row_titles: one left of each row; too long texts end in ….
    """
    tiles = [Image.fromarray(np.asarray(image)).convert("RGB") for image in images]
    side = max(max(tile.size) for tile in tiles)
    zoom = -(-112 // side) if side < 112 else 1  # room for a caption
    side *= zoom
    font = ImageFont.load_default(max(12, side // 16))
    line = font.size + 6
    top = line if title else 4
    left = side if row_titles else 4
    pitch = side + (line if captions else 4)
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (left + columns * (side + 4), top + rows * pitch), "white")
    draw_text = functools.partial(write_text, ImageDraw.Draw(sheet), font)
    draw_text(4, 4, sheet.width, title or "")
    for k, tile in enumerate(tiles):
        y, x = divmod(k, columns)
        x = left + x * (side + 4)
        y = top + y * pitch
        sheet.paste(ImageOps.scale(tile, zoom, Image.NEAREST), (x, y))
        draw_text(x, y + side, side, captions[k] if captions else "")
    for k, text in enumerate(row_titles or ()):
        draw_text(4, top + k * pitch + side // 2, side - 8, text)
    return sheet


def write_text(drawing, font, x: int, y: int, room: int, text) -> None:
    """A text at x, y; what is longer than `room` pixels ends in …."""
    text = str(text)
    while font.getlength(text) > room:
        text = text.rstrip("…")[:-1] + "…"
    drawing.text((x, y), text, "black", font)


def save_png(path, image) -> None:
    """A PIL image or an array uint8 (H, W[, 3]) as PNG, whole or absent."""
    write_file(path, encode(image))


if __name__ == "__main__":
    command_line(__doc__, {"prepare": (Prepare(), prepare), "check": (Check(), check)})
