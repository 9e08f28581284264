"""Everything that comes from or goes to a disk or a hub: X-rays, shards, labels, masks, phantoms, pictures, weights files.

Implements section 2.1 of the DiNO-Diffusion paper (data), the preprocessing and augmentation of 2.5, and the subsets of 2.4.
This is the ground floor: every other file may import it, and it imports none of them.

    python data.py prepare FOLDER --out shards/ --size 512     any folder, zip or tar of X-rays -> tar shards and an index
    python data.py check 'shards/*.tar'                        read every image of a set of shards once, report what is wrong
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import os
import re
import sys
import typing
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
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
        fetch = lambda name: _from_hub(str(source), "/".join(filter(None, [subfolder, name])), revision, offline)
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


def _from_hub(repository: str, name: str, revision: str | None, offline: bool) -> Path | None:
    """One file of a hub repository, through huggingface-hub's cache; None where the repository has no such file."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
    offline = offline or os.environ.get("HF_HUB_OFFLINE", "") in ("1", "true", "True")
    try:
        return Path(hf_hub_download(repository, name, revision=revision, local_files_only=offline))
    except LocalEntryNotFoundError as error:  # TRAP: a subclass of EntryNotFoundError that also means "no network"
        if offline and any(_cached(repository)):
            return None
        raise UserError(
            f"{repository} is neither in the hub cache nor within reach ({'offline' if offline else type(error.__cause__).__name__}).\n"
            f"On a machine with network:  hf download {repository}" + (f" --revision {revision}" if revision else "") +
            f" --local-dir {repository.split('/')[1]}\nthen give that folder's path instead of {repository!r}.") from None
    except EntryNotFoundError:
        return None
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise UserError(f"{repository} on the hub: {str(error).strip().splitlines()[0]}") from None


def _cached(repository: str):
    from huggingface_hub.constants import HF_HUB_CACHE
    return Path(HF_HUB_CACHE, "models--" + repository.replace("/", "--")).glob("snapshots/*/*")


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


def write_weights(folder, config: dict, state: dict[str, torch.Tensor], name: str = "diffusion_pytorch_model.safetensors") -> None:
    """Write `folder`/config.json and `folder`/`name`, each whole or not at all, as diffusers and transformers read them."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    partial = folder / f".{name}.{os.getpid()}.partial"
    try:
        # TRAP: without {"format": "pt"} transformers refuses the file.
        save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, partial, metadata={"format": "pt"})
        os.replace(partial, folder / name)
    except SafetensorError as error:  # a full disk arrives as this, not as OSError
        raise OSError(f"could not write {folder / name}: {error}") from None
    finally:
        partial.unlink(missing_ok=True)
