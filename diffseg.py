"""DiffSeg in PyTorch: the self-attention of one UNet pass, merged into segments; no mask is ever learned.

Implements the zero-shot segmentation of the DiNO-Diffusion paper (2.4, Figure 1 b-iii), after "Diffuse, Attend, and Segment"
(Tian et al. 2023), at any latent size and any set of resolutions. It needs a trained run and no weights of its own.

    python diffseg.py picture.png --run runs/x --out out/      overlay, label map and one mask per segment
    python diffseg.py                                          self-check on attention whose regions are known

    image -> VAE mean * scaling factor -> UNet at t -> every self-attention (B, heads, hw, hw)
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

import data
from data import UserError

# ---- Aggregation: maps of every resolution -> one distribution per pixel --------------------------------------------------


class Aggregator:
    """What `aggregate` does, without keeping the maps: pass it to the UNet as `maps=`, then ask for `result()`.

    TRAP: eight heads at 64x64 are 537 MB a layer in float32, and SD1.5 has five such layers. Here each map is averaged over
    its heads as it arrives and added to the sum of its resolution: 67 MB in all for an image of 512 px. The first `skip` maps
    are left out.
    """

    def __init__(self, skip: int = 0):
        self.sums, self.counts, self.skip = {}, {}, skip  # side -> (B, side², side²), number of maps in it

    def append(self, probabilities: torch.Tensor) -> None:
        """probabilities (B, heads, hw, hw), each row a distribution over the hw = side² pixels."""
        side = math.isqrt(probabilities.shape[-1])
        if side * side != probabilities.shape[-1] or probabilities.shape[-2] != side * side:
            raise UserError(f"found a self-attention of shape {tuple(probabilities.shape)}, expected (B, heads, side², side²): "
                            "give the network square images")
        self.skip -= 1
        if self.skip >= 0:
            return
        mean = probabilities.detach().mean(1, dtype=torch.promote_types(probabilities.dtype, torch.float32))  # (B, hw, hw)
        self.sums[side] = self.sums[side].add_(mean) if side in self.sums else mean
        self.counts[side] = self.counts.get(side, 0) + 1

    def result(self) -> torch.Tensor:
        """A (B, S*S, S*S), S the largest side seen; A[b, i] is where pixel i of image b attends, and sums to 1."""
        if not self.sums:
            raise UserError("found no self-attention map, expected at least one: does this UNet have attention blocks?")
        S, A = max(self.sums), 0
        for side in sorted(self.sums):
            mean = self.sums[side] / self.counts[side]
            if side < S:
                wide = F.interpolate(mean.unflatten(2, (side, side)), size=(S, S), mode="bilinear")  # (B, side², S, S)
                at = torch.arange(S, device=mean.device) * side // S  # the low-resolution row of each of the S rows
                mean = wide.flatten(2)[:, (at[:, None] * side + at).flatten()]  # (B, S², S²)
            A = A + mean * (side / sum(self.sums) / mean.sum(2, keepdim=True))  # a resolution counts in proportion to its side
        return A


def aggregate(maps: list[torch.Tensor]) -> torch.Tensor:
    """Self-attention maps (B, heads, hw, hw) of any resolutions -> A (B, S*S, S*S), rows sum to 1, S the largest side.

    Mean over heads, then over the maps of one resolution; bilinear to S x S over the last axes, renormalised, repeated over the
    first; resolutions weighted by their side [Tian 2023, 3.2.1]. float32 (float64 stays float64), on the device of the maps.
    """
    total = Aggregator()
    for probabilities in maps:
        total.append(probabilities)
    return total.result()


# ---- Iterative attention merging (Tian et al. 2023, 3.2.2) ----------------------------------------------------------------


def anchors(S: int, grid: int) -> torch.Tensor:
    """Flat indices of grid x grid pixels of an S x S map, evenly spaced and centred: S = 64, grid = 16 takes 1, 5, …, 61.

    A grid finer than the map, which has no 32 x 32 distinct pixels when S = 16, is the map's own S x S. Where the published
    step, rounded down, would leave out a rim wider than itself (S = 28, grid = 16: 6, 7, …, 21), positions are rounded instead.
    """
    if grid < 1:
        raise UserError(f"found a grid of {grid}, expected at least 1 anchor a side")
    grid = min(grid, S)
    step = (S - 1) // max(grid - 1, 1) if grid > 1 else 0
    rim, place = S - 1 - step * (grid - 1), torch.arange(grid)
    line = rim // 2 + step * place if rim <= step or grid == 1 else ((2 * place + 1) * S - 1) // (2 * grid)
    return (line[:, None] * S + line).flatten()


def divergence(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Symmetric KL ½(KL(p‖q) + KL(q‖p)) of each row of p (M, N) with each of q (K, N) -> (M, K), as two matrix products.

    ½ Σ (p − q)(log p − log q) = ½ (Σ p log p + Σ q log q − p·log q − log p·q): the (M, K, N) tensor of the definition,
    17 GB for 256 anchors at 64x64, is never made. Logarithms are relative to the uniform distribution: the constant
    cancels since rows sum to 1, and what is left is small, so that float32 keeps six decimals.
    """
    if p.is_cuda:  # TRAP: where TF32 is allowed, a float32 product is off by more than the usual threshold of 0.05
        p, q = p.double(), q.double()
    log = lambda x: (x.clamp_min(torch.finfo(torch.float32).tiny) * x.shape[1]).log()
    log_p, log_q = log(p), log(q)
    return ((p * log_p).sum(1)[:, None] + (q * log_q).sum(1) - p @ log_q.T - log_p @ q.T) / 2


def merge(A: torch.Tensor, grid: int = 16, threshold: float | list[float] = 0.05, iterations: int = 3,
          first: torch.Tensor | None = None) -> torch.Tensor:
    """A (S*S, S*S) -> K masks (K, S, S), each a distribution over pixels; deterministic.

    grid: anchors a side. threshold: on the symmetric KL, one number or one per iteration. The first iteration turns an anchor
    into the mean of all rows of A nearer than the threshold; each later one walks down the list, and an entry that no
    earlier one has matched becomes the mean of all entries nearer than the threshold.
    first: divergence(A[anchors(S, grid)], A), when it is at hand (a sweep over thresholds computes it once).
    """
    S = math.isqrt(A.shape[0])
    thresholds = list(threshold) if np.iterable(threshold) else [threshold] * iterations
    if len(thresholds) != iterations or iterations < 1 or min(thresholds) <= 0:
        raise UserError(f"found threshold {threshold} for {iterations} iterations, expected one number above 0 or one each")
    where = anchors(S, grid).to(A.device)
    D = divergence(A[where], A) if first is None else first.clone()
    D[torch.arange(len(where)), where] = 0  # its own distance, which rounding may put beside zero
    near = (D < thresholds[0]).to(A.dtype)
    masks = near @ A / near.sum(1, keepdim=True)  # (grid², S²)
    for limit in thresholds[1:]:
        near = (divergence(masks, masks).fill_diagonal_(0) < limit).cpu().numpy()
        left, heads = np.ones(len(masks), bool), []
        while left.any():
            heads.append(int(left.argmax()))
            left &= ~near[heads[-1]]
        # CHOICE: a mean takes in entries that an earlier one has matched too, as the published code does; its text does not.
        weight = torch.from_numpy(near[heads]).to(masks)
        masks = weight @ masks / weight.sum(1, keepdim=True)  # (K, S²)
    return masks.unflatten(1, (S, S))


def refine(A: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """k-means over the rows of A (S*S, S*S), started at the masks (K, S, S) -> (up to K, S, S); optional, as published."""
    from sklearn.cluster import KMeans
    rows = A.cpu().numpy()
    found = KMeans(len(masks), init=masks.flatten(1).cpu().numpy(), n_init=1).fit(rows).labels_
    means = [A[torch.from_numpy(found == k).to(A.device)].mean(0) for k in np.unique(found)]
    return torch.stack(means).unflatten(1, masks.shape[1:])


def label(masks: torch.Tensor, size: int) -> torch.Tensor:
    """Masks (K, S, S) -> (size, size) int64: bilinear upsampling, the strongest mask of each pixel, the first of equals."""
    best = torch.full((size, size), -torch.inf, dtype=masks.dtype, device=masks.device)
    winner = torch.zeros((size, size), dtype=torch.int64, device=masks.device)
    for start in range(0, len(masks), 32):  # in blocks: a thousand masks of 512 px would take 1 GB
        value, index = F.interpolate(masks[None, start:start + 32], size=(size, size), mode="bilinear")[0].max(0)
        winner = torch.where(value > best, index + start, winner)
        best = torch.maximum(value, best)
    return winner


# ---- Image -> attention -> segments (paper 2.4) ---------------------------------------------------------------------------


@torch.no_grad()
def attention(run, images: torch.Tensor, c: torch.Tensor, t: int = 300, seeds: list[int] | None = None,
              last: int = 0) -> torch.Tensor:
    """One UNet pass over images uint8 (B, size, size) with tokens c (B, S, N) at timestep t -> A (B, S*S, S*S) on run.device.

    The latent is the VAE's mean and clean, as published; with `seeds`, one an image, it carries the noise of t. All maps are
    aggregated, as published; with `last` that many, those nearest the output, whose regions are cleaner in small networks.
    """
    mean, _ = run.vae.encode(data.to_model(images.to(run.device)))
    z = mean * run.vae.config.scaling_factor  # (B, 4, h, w)
    ts = torch.full((len(z),), t, dtype=torch.int64, device=z.device)
    if seeds is not None:
        eps = torch.stack([torch.randn(z.shape[1:], generator=data.generator("cpu", seed)) for seed in seeds])
        z = run.schedule.add_noise(z, eps.to(z), ts)
    maps = sum(name.endswith("attn1") for name, _ in run.unet.named_modules())
    total = Aggregator(skip=max(maps - last, 0) if last else 0)
    run.unet(z, ts, c.to(z), maps=total)
    return total.result()


def segment(A: torch.Tensor, size: int, grid: int = 16, threshold: float = 0.0, is_refined: bool = False) -> torch.Tensor:
    """A (S*S, S*S) of one image -> labels (size, size) int64, numbered from 0 by falling area.

    CHOICE: a threshold of 0 becomes 0.45 of the median divergence. Divergences grow tenfold during training and the best
    threshold with them; this part of the median stayed near the best at every checkpoint and timestep that we tried.
    """
    first = divergence(A[anchors(math.isqrt(len(A)), grid).to(A.device)], A)
    masks = merge(A, grid, threshold or 0.45 * first.median().item(), first=first)
    labels = label(refine(A, masks) if is_refined else masks, size)
    _, labels, areas = labels.unique(return_inverse=True, return_counts=True)  # masks that win nowhere leave no number
    return areas.argsort(descending=True, stable=True).argsort()[labels]


# ---- Command --------------------------------------------------------------------------------------------------------------


@dataclass
class SegmentPicture:
    """Settings of `python diffseg.py`."""
    pictures: tuple[str, ...] = field(default=(), metadata={"positional": True})  # X-rays to segment; none: a self-check
    run: str = ""  # run folder, the newest one when empty
    step: int = 0  # checkpoint, the newest one when 0
    out: str = "out"  # folder for the PNG files
    timestep: int = 300  # t of the UNet pass, 0…999 (paper: 300)
    threshold: float = 0.0  # symmetric KL below which maps merge (paper: 0.05); 0: by the picture's own median
    grid: int = 16  # anchors a side (paper: 16)
    last: int = 0  # aggregate only this many attention maps, those nearest the output; 0: all, as published
    refine: bool = False  # finish with k-means
    noise: bool = False  # add the noise of the timestep to the latent
    seed: int = 0  # of that noise
    device: str = "auto"  # auto, cpu or cuda


def segment_pictures(settings: SegmentPicture) -> None:
    """Write overlay, label map (palette PNG, pixel = label) and one mask per segment of every picture."""
    if not settings.pictures:
        return self_check()
    if not 0 <= settings.timestep < 1000:
        raise UserError(f"found --timestep {settings.timestep}, expected 0…999")
    import dinodiff  # here alone: everything above runs without a run
    run = dinodiff.load_run(settings.run or dinodiff.newest_run(), settings.step or None, settings.device)
    palette = [round(255 * v) for k in range(256) for v in colorsys.hsv_to_rgb(k * 0.618034 % 1, 0.75, 1.0 - 0.3 * (k % 2))]
    for picture in settings.pictures:
        image = torch.from_numpy(data.preprocess(data.load_image(picture), run.size))
        seeds = [settings.seed] if settings.noise else None
        A = attention(run, image[None], dinodiff.encode_tokens(run, image[None]), settings.timestep, seeds, settings.last)[0]
        labels = segment(A, run.size, settings.grid, settings.threshold, settings.refine).cpu().numpy()
        count, stem = labels.max() + 1, Path(settings.out) / Path(picture).stem
        if count > 256:
            raise UserError(f"{picture}: found {count} segments, expected at most 256: raise --threshold")
        flat = Image.fromarray(labels.astype(np.uint8), "P")
        flat.putpalette(palette)
        grey = Image.fromarray(image.numpy()).convert("RGB")
        data.save_png(f"{stem}-overlay.png", Image.blend(grey, flat.convert("RGB"), 0.35))
        data.save_png(f"{stem}-labels.png", flat)
        for old in stem.parent.glob(f"{glob.escape(stem.name)}-segment-*.png"):
            old.unlink()
        for k in range(count):
            data.save_png(f"{stem}-segment-{k:02d}.png", Image.fromarray(np.uint8(255 * (labels == k))))
        print(f"{picture}: {count} segments -> {stem}-overlay.png, -labels.png, -segment-*.png", flush=True)


def regions_to_maps(regions: torch.Tensor, sides: list[int], leak: float = 0.05) -> list[torch.Tensor]:
    """Regions int (S, S) -> per side, attention (1, 1, side², side²) of pixels that see their own region, but for `leak`."""
    maps = []
    for side in sides:
        at = torch.arange(side) * len(regions) // side
        same = (regions[at][:, at].reshape(-1, 1) == regions[at][:, at].flatten()).double()  # (side², side²)
        maps.append(((1 - leak) * same / same.sum(1, keepdim=True) + leak / side**2)[None, None])
    return maps


def self_check() -> None:
    """Two lungs, a heart and the rest, as attention at two resolutions, come back as four segments."""
    regions = torch.zeros(16, 16, dtype=torch.int64)
    regions[4:14, 2:6], regions[4:14, 10:14], regions[8:12, 6:10] = 1, 2, 3
    A = aggregate(regions_to_maps(regions, [16, 16, 8]))
    found = segment(A[0], 16, threshold=0.5)
    for true, ours in zip(regions.tolist(), found.tolist()):
        print("  " + "".join(".LRH"[k] for k in true) + "   " + "".join(map(str, ours)))
    pairs = torch.stack([regions.flatten(), found.flatten()]).unique(dim=1)
    assert pairs.shape[1] == len(found.unique()) == 4, f"regions and segments differ: {pairs.T.tolist()}"
    print(f"self-check: A {tuple(A.shape)}, rows sum to {A.sum(2).mean():.6f}; one label per region, and back")


if __name__ == "__main__":
    data.command_line(__doc__, {"": (SegmentPicture(), segment_pictures)})
