"""DiffSeg in PyTorch: the self-attention of one UNet pass, merged into segments, nothing learned.

Zero-shot segmentation of the DiNO-Diffusion paper (2.4, Figure 1 b-iii), after "Diffuse, Attend,
and Segment" (Tian et al. 2023), at any latent size and any set of resolutions.

    python diffseg.py picture.png --run-dir runs/x --out out/   overlay, label map, one mask each
    python diffseg.py                                           self-check on known regions

    image -> z0 -> UNet at t -> every self-attention (B, heads, hw, hw)
          -> aggregate: A (B, S*S, S*S) -> merge: K masks (K, S, S) -> label: (size, size) int
"""

from __future__ import annotations

import colorsys
import glob
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import data
from data import UserError

# ---- Aggregation: maps of every resolution -> one distribution per pixel (Tian 2023, 3.2.1) ------


class Aggregator:
    """What `aggregate` does, without keeping the maps: the UNet's `maps=`, then `results()`.

    TRAP: eight heads at 64 x 64 are 537 MB a layer: each map is averaged over its heads as it
    arrives and added to its resolution's sum, 67 MB for 512 px.
    """

    def __init__(self, skips=(0,)):
        self.skips = skips  # a result for each number of first maps to leave out
        self.seen = 0
        self.sums = [{} for _ in skips]  # side -> (B, side², side²)

    def append(self, probabilities: Tensor) -> None:
        """probabilities (B, heads, hw, hw), each row a distribution over the hw = side² pixels."""
        side = math.isqrt(probabilities.shape[-1])
        if probabilities.shape[2:] != (side**2, side**2):
            raise UserError(f"found maps {tuple(probabilities.shape)}, expected (B, heads, side², "
                            "side²): give the network square images")
        dtype = torch.promote_types(probabilities.dtype, torch.float32)
        mean = probabilities.detach().mean(1, dtype=dtype)  # (B, hw, hw)
        for skip, sums in zip(self.skips, self.sums):
            if self.seen >= skip:
                sums[side] = mean + sums.get(side, 0)
        self.seen += 1

    def results(self) -> list[Tensor]:
        """A (B, S*S, S*S) each, S the largest side: A[b, i] is where pixel i of image b attends."""
        found = []
        for sums in self.sums:
            S = max(sums)
            A = 0
            for side, total in sorted(sums.items()):
                wide = F.interpolate(total.unflatten(2, (side, side)), (S, S), mode="bilinear")
                row = torch.arange(S, device=total.device) * side // S  # that each of S repeats
                wide = wide.flatten(2)[:, (row[:, None] * side + row).flatten()]  # (B, S², S²)
                A = A + wide * (side / sum(sums) / wide.sum(2, keepdim=True))  # weight: the side
            found.append(A)
        return found


def aggregate(maps: list[Tensor]) -> Tensor:
    """Self-attention maps (B, heads, hw, hw) of any resolutions -> A (B, S*S, S*S), rows sum to 1.

    S is the largest side. Mean over heads and over the maps of a resolution; bilinear to S x S over
    the last axes, renormalised, repeated over the first; resolutions weighted by their side.
    """
    total = Aggregator()
    for probabilities in maps:
        total.append(probabilities)
    return total.results()[0]


# ---- Iterative attention merging (Tian 2023, 3.2.2) ----------------------------------------------


def anchors(S: int, grid: int) -> Tensor:
    """Flat indices of grid x grid pixels of an S x S map, evenly spaced and centred; at most all.

    S = 64 and grid = 16 give 1, 5, …, 61 [Tian 2023]. Where that step, rounded down, leaves out a
    rim wider than itself (S = 28: 6, 7, …, 21), the positions are rounded instead.
    """
    if grid < 1:
        raise UserError(f"found a grid of {grid}, expected at least 1 anchor per side")
    grid = min(grid, S)
    step = (S - 1) // max(grid - 1, 1)
    rim = S - 1 - step * (grid - 1)
    line = rim // 2 + step * torch.arange(grid)
    if rim > step:
        line = ((2 * torch.arange(grid) + 1) * S - 1) // (2 * grid)
    return (line[:, None] * S + line).flatten()


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """Symmetric KL ½(KL(p‖q) + KL(q‖p)) of each row of p (M, N) with each of q (K, N) -> (M, K).

    ½ Σ (p - q)(log p - log q) = ½ (Σ p log p + Σ q log q - p·log q - log p·q): two matrix products
    instead of 17 GB for 256 anchors at 64 x 64. Logarithms are relative to the uniform
    distribution (rows sum to 1): float32 then keeps six decimals.
    """
    if p.is_cuda:  # TRAP: where TF32 is allowed, float32 products are off by more than 0.05
        p = p.double()
        q = q.double()
    tiny = torch.finfo(torch.float32).tiny
    log_p = (p.clamp_min(tiny) * p.shape[1]).log()
    log_q = (q.clamp_min(tiny) * q.shape[1]).log()
    return ((p * log_p).sum(1)[:, None] + (q * log_q).sum(1) - p @ log_q.T - log_p @ q.T) / 2


def mean_of(near: Tensor, maps: Tensor) -> Tensor:
    weight = near.to(maps)  # bool (K, N) and maps (N, S²) -> (K, S²)
    return weight @ maps / weight.sum(1, keepdim=True)


def merge(A: Tensor, grid: int = 16, threshold: float | list[float] = 0.05, iterations: int = 3,
          first: Tensor | None = None) -> Tensor:
    """A (S*S, S*S) -> K masks (K, S, S), each a distribution over pixels; deterministic.

    An anchor becomes the mean of all rows of A nearer than the threshold of the symmetric KL (one
    number or one an iteration). Each later iteration walks down the list: an entry that no earlier
    one has matched becomes the mean of all near it. first: divergence(A[anchors(S, grid)], A).
    """
    S = math.isqrt(A.shape[0])
    limits = list(threshold) if np.iterable(threshold) else [threshold] * iterations
    if len(limits) != iterations or not limits or not min(limits) > 0:
        raise UserError(f"found threshold {threshold} for {iterations} iterations, expected one "
                        "number above 0, or one for each")
    chosen = anchors(S, grid).to(A.device)
    near = (divergence(A[chosen], A) if first is None else first) < limits[0]
    near.scatter_(1, chosen[:, None], True)  # itself, which rounding may put beside zero
    masks = mean_of(near, A)  # (grid², S²)
    for limit in limits[1:]:
        near = (divergence(masks, masks) < limit).fill_diagonal_(True).cpu()
        matched = np.zeros(len(masks), bool)
        kept = []
        for k, row in enumerate(near.numpy()):
            if not matched[k]:
                kept.append(k)
                matched |= row
        # CHOICE: a mean takes in what an earlier one has matched too, as in the published code
        masks = mean_of(near[kept], masks)  # (K, S²)
    return masks.unflatten(1, (S, S))


def refine(A: Tensor, masks: Tensor) -> Tensor:
    """k-means over the rows of A (S*S, S*S), started at the masks (K, S, S) -> (K, S, S)."""
    from sklearn.cluster import KMeans  # here, for it takes a second to import
    start = masks.flatten(1).cpu().numpy()
    means = KMeans(len(start), init=start, n_init=1).fit(A.cpu().numpy()).cluster_centers_
    return torch.from_numpy(means).to(masks).view_as(masks)


def label(masks: Tensor, size: int) -> Tensor:
    """Masks (K, S, S) -> (size, size) int64: upsampled bilinearly, each pixel's strongest mask."""
    best = masks.new_full((size, size), -torch.inf)
    winner = torch.zeros_like(best, dtype=torch.int64)
    for k in range(0, len(masks), 32):  # in blocks: a thousand masks of 512 px would take 1 GB
        wide = F.interpolate(masks[None, k:k + 32], size=(size, size), mode="bilinear")[0]
        value, index = wide.max(0)
        winner = torch.where(value > best, index + k, winner)  # of equal masks the first
        best = torch.maximum(value, best)
    return winner


# ---- Image -> attention -> segments (paper 2.4) --------------------------------------------------


def attention(run, images: Tensor, c: Tensor, t: int = 300, last: int = 0) -> Tensor:
    """images uint8 (B, size, size), tokens c (B, S, N), timestep t -> A (B, S*S, S*S).

    last: only so many maps nearest the output count, cleaner in small networks; 0: all, as
    published.
    """
    return attentions(run, images, c, t, [last])[0]


@torch.no_grad()
def attentions(run, images: Tensor, c: Tensor, t: int, lasts: list[int]) -> list[Tensor]:
    """The same for each number of last maps, from one UNet pass on clean latents."""
    from dinodiff import autocast, encode_latents  # here: everything above runs without a run
    z0 = encode_latents(run, images)  # (B, 4, h, w), of unit variance
    count = sum(name.endswith("attn1") for name, _ in run.unet.named_modules())
    total = Aggregator([max(count - last, 0) if last else 0 for last in lasts])
    # TRAP: on CUDA a run of bf16 has weights in bfloat16, which float32 latents do not fit.
    with autocast(run.device, run.config["dtype"]):
        run.unet(z0, torch.full((len(z0),), t, device=z0.device), c.to(z0), maps=total)
    return total.results()


def segment(A: Tensor, size: int, grid=16, threshold=0.0, is_refined=False) -> Tensor:
    """A (S*S, S*S) of one image -> labels (size, size) int64, numbered from 0 by falling area."""
    # CHOICE: a threshold of 0 becomes 0.45 of the median divergence: divergences grow tenfold in
    # training and the best threshold with them; this share stayed near the best throughout.
    first = divergence(A[anchors(math.isqrt(len(A)), grid).to(A.device)], A)
    masks = merge(A, grid, threshold or max(0.45 * first.median().item(), 1e-6), first=first)
    labels = label(refine(A, masks) if is_refined else masks, size)
    _, labels, areas = labels.unique(return_inverse=True, return_counts=True)  # some win nowhere
    largest_first = areas.argsort(descending=True, stable=True)
    return largest_first.argsort()[labels]


# ---- Command -------------------------------------------------------------------------------------


@dataclass
class SegmentPicture:
    """Settings of `python diffseg.py`."""

    pictures: tuple[str, ...] = field(default=(), metadata={"positional": True})  # X-rays, folders
    run_dir: str = ""  # run folder, the newest one when empty
    step: str = ""  # checkpoint: a step, or best; empty: the newest
    out: str = "out"  # folder for the PNG files
    timestep: int = 300  # t of the UNet pass, 0…999 (paper: 300)
    threshold: float = 0.0  # symmetric KL below which maps merge (paper: 0.05); 0: by the picture
    grid: int = 16  # anchors along each side (paper: 16)
    last: int = 0  # aggregate only this many maps, those nearest the output; 0: all, as published
    refine: bool = False  # finish with k-means
    device: str = "auto"  # auto, cpu or cuda


def segment_pictures(settings: SegmentPicture) -> None:
    """Write overlay, label map (palette PNG, pixel = label) and a mask of each segment."""
    if not settings.pictures:
        return self_check()
    if not 0 <= settings.timestep < 1000 or settings.last < 0:
        raise UserError(f"found --timestep {settings.timestep} --last {settings.last}, expected "
                        "0…999 and at least 0")
    import dinodiff
    run = dinodiff.load_run(settings.run_dir or dinodiff.newest_run(), settings.step or None,
                            settings.device)
    images = data.read_pictures(settings.pictures, run.size)
    if not images:
        raise UserError(f"found no readable X-ray in {settings.pictures}; name files or folders")
    for name, image in images.items():
        c = dinodiff.encode_tokens(run, image[None])
        A = attention(run, image[None], c, settings.timestep, settings.last)[0]
        labels = segment(A, run.size, settings.grid, settings.threshold, settings.refine)
        write_segments(Path(settings.out, name), image.numpy(), labels.cpu().numpy())


def write_segments(stem: Path, image: np.ndarray, labels: np.ndarray) -> None:
    count = labels.max() + 1
    if count > 256:
        raise UserError(f"{stem.name}: found {count} segments, at most 256 fit: raise --threshold")
    colours = [colorsys.hsv_to_rgb(k * 0.618034 % 1, 0.75, 1 - 0.3 * (k % 2)) for k in range(256)]
    flat = Image.fromarray(labels.astype(np.uint8), "P")
    flat.putpalette(np.uint8(255 * np.array(colours)).tobytes())
    grey = Image.fromarray(image).convert("RGB")
    data.save_png(f"{stem}-overlay.png", Image.blend(grey, flat.convert("RGB"), 0.35))
    data.save_png(f"{stem}-labels.png", flat)
    for old in stem.parent.glob(f"{glob.escape(stem.name)}-segment-[0-9][0-9][0-9].png"):
        old.unlink()  # an earlier run may have found more segments
    for k in range(count):
        data.save_png(f"{stem}-segment-{k:03d}.png", np.uint8(255 * (labels == k)))
    print(f"{count} segments -> {stem}-overlay.png, -labels.png, -segment-*.png", flush=True)


def self_check() -> None:
    """Attention of three known regions comes back as these regions."""
    regions = torch.zeros(16, 16, dtype=torch.int64)
    regions[4:14, 2:6] = 1
    regions[5:13, 10:14] = 2
    same = (regions.view(-1, 1) == regions.flatten()) + 0.01  # (256, 256)
    A = same / same.sum(1, keepdim=True)
    assert torch.equal(segment(A, 16, threshold=0.5), regions), "regions and segments differ"
    print("self-check: attention of three known regions comes back as these regions")


if __name__ == "__main__":
    data.command_line(__doc__, {"": (SegmentPicture(), segment_pictures)})
