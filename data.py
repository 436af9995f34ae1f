"""Datasets for MT-CP: NYUD-v2 in the two archives that circulate, and a rendered stand-in in the same format.

Whatever the archive, one sample is a dict of

    image    float32 (3,H,W)   RGB, normalised by ImageNet's mean and std
    semseg   int64   (H,W)     class 0…39, 255 = ignore
    depth    float32 (1,H,W)   metres along the optical axis, 0 = invalid
    normals  float32 (3,H,W)   unit vectors (x right, y away from the camera, z up), all-zero = invalid
    name     str               file stem
    size     int64   (2,)      original (H,W)

of which only the labels that were asked for are read. What is on disk is treated as untrusted: nothing is unpickled, no
size is believed before it is compared, and every complaint (DataError) names the file and what to do about it.

    python data.py rooms --out data/rooms               render the stand-in (what train.py does by itself)
    python data.py check --dataset nyud --root DIR      is this archive complete and sane? exit status 1 if not

In this order: readers, one per file format → archive layouts and the datasets → joint transforms → loaders → pictures →
the check → the renderer → the command line.
"""

import argparse
import colorsys
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from mtcp import IGNORE_INDEX

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)  # ImageNet, for RGB in 0…1
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)

# Axes of a normal. Read off a published picture of NYUD_MT, not yet verified on the files themselves. Only what is said
# of them matters to training (a flip negates x); comparing normals with depth needs all three.
NORMAL_AXES = ("right", "forward", "up")

NYUD_CLASSES = (
    "wall", "floor", "cabinet", "bed", "chair", "sofa", "table", "door", "window", "bookshelf", "picture", "counter",
    "blinds", "desk", "shelves", "curtain", "dresser", "pillow", "mirror", "floor mat", "clothes", "ceiling", "books",
    "refrigerator", "television", "paper", "towel", "shower curtain", "box", "whiteboard", "person", "night stand",
    "toilet", "sink", "lamp", "bathtub", "bag", "other structure", "other furniture", "other prop",
)  # fmt: skip


class DataError(Exception):
    """The data are not what they should be. The message is one sentence for the user: which file, and what to do."""


# ======================================================================================================================
# Readers: one per file format, path → array
# ======================================================================================================================


def read_pixels(path: Path, mode: str) -> np.ndarray:
    """An image file as uint8, (H,W,3) for mode "RGB", (H,W) for "L" (grey values, or palette indices as stored)."""
    try:
        with Image.open(path) as image:
            # Converting a palette PNG to grey would replace class indices by the brightness of their colours.
            keep = mode == "L" and image.mode in ("L", "P")
            if mode == "L" and not keep:
                raise DataError(f"{path} is a {image.mode} image: a label map has one 8-bit channel")
            return np.asarray(image if keep else image.convert(mode))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read as an image ({error}): unpack or download the archive again") from error


def read_array(path: Path, ndim: int) -> np.ndarray:
    """A .npy file of floats with `ndim` dimensions, as float32."""
    try:
        # Memory-mapped, since then a header that promises more than the file holds is an error, not an allocation.
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} cannot be read as .npy ({error}): unpack or download the archive again") from error
    if array.ndim != ndim or array.dtype.kind != "f":
        raise DataError(f"{path} holds {array.dtype} {array.shape}: expected floats with {ndim} dimensions")
    return np.array(array, dtype=np.float32)


def read_nyud_semseg(path: Path) -> np.ndarray:
    """0 = unlabelled, 1…40 on disk → int64 (H,W), 255 = ignore, 0…39."""
    label = read_pixels(path, "L").astype(np.int64)
    if label.max() > len(NYUD_CLASSES):
        raise DataError(f"{path} holds class {label.max()}: NYUD-v2 has 1…{len(NYUD_CLASSES)}, and 0 for unlabelled")
    return np.where(label == 0, IGNORE_INDEX, label - 1)


def read_depth(path: Path) -> np.ndarray:
    """Metres, float → float32 (1,H,W); whatever is not a positive finite number becomes 0 = invalid."""
    depth = read_array(path, ndim=2)
    return np.where(np.isfinite(depth) & (depth > 0), depth, np.float32(0))[None]


def read_normals(path: Path) -> np.ndarray:
    """.npy (H,W,3) in -1…1, or 8-bit .png with n = 2v/255 - 1 → float32 (3,H,W), unit or all-zero = invalid.

    Eight bits have no exact zero (127 and 128 are ±0.004), and resampled archives have short vectors along edges:
    anything shorter than 0.5 is invalid, the rest is brought to length 1.
    """
    if path.suffix == ".png":
        normals = read_pixels(path, "RGB").astype(np.float32) * (2 / 255) - 1
    else:
        normals = np.nan_to_num(read_array(path, ndim=3))
    if normals.shape[2] != 3:
        raise DataError(f"{path} has {normals.shape[2]} channels: a normal has 3")
    length = np.linalg.norm(normals, axis=2, keepdims=True)
    return np.where(length < 0.5, 0, normals / np.maximum(length, 1e-6)).transpose(2, 0, 1).astype(np.float32)


# ======================================================================================================================
# Layouts and datasets
# ======================================================================================================================

NYUD_LAYOUTS = {  # key → path below the root
    "NYUD_MT": {  # ASTMT, MTI-Net, MTFormer, MT-CP; 480x640
        "image": "images/{}.jpg", "semseg": "segmentation/{}.png", "depth": "depth/{}.npy", "normals": "normals/{}.npy",
    },
    "NYUDv2": {  # ATRC, InvPT, TaskPrompter, MTMamba; 425x560, the borders are cut
        "image": "images/{}.png", "semseg": "segmentation/{}.png", "depth": "depth/{}.npy", "normals": "normals/{}.png",
    },
}  # fmt: skip

NYUD_HELP = """expected below {root}:
    gt_sets/train.txt  gt_sets/val.txt      one file stem a line (795 and 654 of them)
    images/STEM.jpg | .png                  RGB
    segmentation/STEM.png                   0 = unlabelled, 1…40
    depth/STEM.npy                          metres
    normals/STEM.npy | .png                 (.jpg and .png, .npy and .png: the archives NYUD_MT and NYUDv2)
README.md, section "Real data", says where the two archives are described."""


class NYUD(Dataset):
    """One split of NYUD-v2, or of rendered rooms; which of the two archives it is, is seen from the files.

    root       folder of the archive
    split      "train" or "val" (what papers call the test set)
    tasks      names of the labels to read, some of semseg, depth, normals
    transform  (sample, rng) → sample, applied before normalisation
    stems      take only these of the split
    seed       of the transform's random numbers, which depend on (seed, epoch, index) alone: not on the number of
               workers or the order of reading. Set `epoch` before every epoch.

    complete   False: leave missing files to the caller

    Raises DataError if the folder is not such an archive, or any file that will be needed is missing.
    """

    classes = {"semseg": NYUD_CLASSES}
    readers = {"semseg": read_nyud_semseg, "depth": read_depth, "normals": read_normals}

    def __init__(
        self, root, split, tasks=("semseg", "depth", "normals"), transform=None, stems=None, seed=0, complete=True
    ):
        self.root, self.split, self.tasks, self.transform, self.seed = Path(root), split, tuple(tasks), transform, seed
        self.stems = stems if stems is not None else read_split(self.root, split)
        self.epoch = 0
        self.layout = detect_nyud(self.root, self.stems)
        missing = self.missing()
        if missing and complete:
            raise DataError(describe_missing(self.root, self.layout, missing, len(self.stems)))

    def path(self, key: str, stem: str) -> Path:
        return self.root / NYUD_LAYOUTS[self.layout][key].format(stem)

    def missing(self) -> dict[str, list[Path]]:
        """{key: files that are not there}, of the image and all tasks; empty where nothing is missing."""
        paths = {key: [self.path(key, stem) for stem in self.stems] for key in ("image", *self.tasks)}
        absent = {key: [p for p in files if not p.is_file()] for key, files in paths.items()}
        return {key: files for key, files in absent.items() if files}

    def read(self, stem: str) -> dict:
        """Everything of one stem as tensors, the image in 0…1; DataError if a label has another size than the image."""
        image = torch.from_numpy(read_pixels(self.path("image", stem), "RGB").copy()).permute(2, 0, 1) / 255
        size = tuple(image.shape[1:])
        sample = {"image": image, "name": stem, "size": torch.tensor(size)}
        for task in self.tasks:
            label = torch.from_numpy(self.readers[task](self.path(task, stem)))
            if tuple(label.shape[-2:]) != size:
                raise DataError(
                    f"{self.path(task, stem)} is {tuple(label.shape[-2:])} pixels but its image is {size}: "
                    "files of different archives were mixed; unpack one archive into an empty folder"
                )
            sample[task] = label
        return sample

    def __len__(self) -> int:
        return len(self.stems)

    def __getitem__(self, index: int) -> dict:
        sample = self.read(self.stems[index])
        if self.transform is not None:
            sample = self.transform(sample, np.random.default_rng((self.seed, self.epoch, index)))
        return normalise(sample)


def read_split(root: Path, split: str) -> list[str]:
    """The stems of gt_sets/SPLIT.txt."""
    path = root / "gt_sets" / f"{split}.txt"
    if not path.is_file():
        raise DataError(f"{path} not found; {NYUD_HELP.format(root=root)}")
    stems = path.read_text().split()
    # A stem becomes part of a path: one like ../../x would lead out of the archive.
    bad = [s for s in stems if not s.replace("_", "").replace("-", "").isalnum()]
    if bad or not stems:
        raise DataError(
            f"{path} is no list of file stems: " + (f"it has the line {bad[0]!r}" if bad else "it is empty")
        )
    return stems


def detect_nyud(root: Path, stems: list[str]) -> str:
    """Name of the archive in `root`: the layout of which most files are there."""

    def present(files: dict[str, str]) -> int:
        return sum((root / pattern.format(stem)).is_file() for pattern in files.values() for stem in stems)

    if (root / f"segmentation/{stems[0]}.mat").is_file() or (root / f"normals/{stems[0]}.jpg").is_file():
        raise DataError(
            f"{root} is the older NYUD_MT of ASTMT (labels as .mat, normals as .jpg), which is not supported: "
            "get the NYUD_MT that MTI-Net links (.png and .npy), or NYUDv2 of ATRC and InvPT"
        )
    counts = {name: present(files) for name, files in NYUD_LAYOUTS.items()}
    best = max(counts, key=counts.get)
    if not (root / "images").is_dir() or counts[best] == 0:
        raise DataError(f"no NYUD-v2 in {root}; {NYUD_HELP.format(root=root)}")
    return best


def describe_missing(root: Path, layout: str, missing: dict[str, list[Path]], total: int) -> str:
    parts = [f"{key}: {len(files)} of {total} (first: {files[0].relative_to(root)})" for key, files in missing.items()]
    return f"files missing from {root} (layout {layout}): {'; '.join(parts)}. Get the whole archive, or drop the task"


def hold_out(stems: list[str], share: float) -> tuple[list[str], list[str]]:
    """(training stems, held-out stems): the last `share` of them, for choosing the best epoch without the test set.

    The last ones and not a random choice, because neighbouring stems of NYUD-v2 are often pictures of one room.
    """
    n = round(len(stems) * share)
    return stems[: len(stems) - n], stems[len(stems) - n :]


# ======================================================================================================================
# Joint transforms: pure functions on a sample, image in 0…1, before `normalise`
# ======================================================================================================================


def resize(sample: dict, size: tuple[int, int]) -> dict:
    """The whole picture at another size. Depth stays: this is another camera resolution, not another place."""
    return {key: _resize_map(key, value, size) for key, value in sample.items()}


def resize_image(sample: dict, size: tuple[int, int]) -> dict:
    """Only the image, for evaluation: predictions are compared at the labels' own resolution."""
    return {**sample, "image": _resize_map("image", sample["image"], size)}


def _resize_map(key: str, x, size: tuple[int, int]):
    if key in ("name", "size"):
        return x
    if key == "image":
        return F.interpolate(x[None], size=size, mode="bilinear", antialias=True, align_corners=False)[0].clamp(0, 1)
    # Labels are never averaged: between class 3 and class 7 is no class 5, and next to a hole no half depth.
    planes = x.reshape(1, -1, *x.shape[-2:]).float()
    return F.interpolate(planes, size=size, mode="nearest-exact").reshape(*x.shape[:-2], *size).to(x.dtype)


def zoom(sample: dict, scale: float) -> dict:
    """Enlarge by `scale` ≥ 1 about the centre, at constant size. Depth is divided by the scale.

    To see everything `scale` times as large, the camera has to come `scale` times as close. Without the division the
    network would be shown that apparent size says nothing about depth. Normals stay: coming closer turns no surface.
    """
    H, W = sample["image"].shape[-2:]
    h, w = round(H * scale), round(W * scale)
    sample = crop(resize(sample, (h, w)), (h - H) // 2, (w - W) // 2, H, W)
    return {**sample, "depth": sample["depth"] / scale} if "depth" in sample else sample


def crop(sample: dict, top: int, left: int, height: int, width: int) -> dict:
    def cut(x):
        return x[..., top : top + height, left : left + width]

    return {key: x if key in ("name", "size") else cut(x) for key, x in sample.items()}


def flip(sample: dict) -> dict:
    """Mirror left and right. A normal that pointed right now points left: its x component changes sign."""
    sample = {key: x if key in ("name", "size") else x.flip(-1) for key, x in sample.items()}
    if "normals" in sample:
        sign = torch.ones(3, 1, 1)
        sign[NORMAL_AXES.index("right")] = -1
        sample["normals"] = sample["normals"] * sign
    return sample


def colour_jitter(sample: dict, brightness: float, contrast: float, saturation: float) -> dict:
    """Factors about 1. Brightness multiplies, contrast stretches about the mean, saturation about the grey."""
    image = sample["image"] * brightness
    image = image.mean() + contrast * (image - image.mean())
    grey = image.mean(dim=0, keepdim=True)
    return {**sample, "image": (grey + saturation * (image - grey)).clamp(0, 1)}


def normalise(sample: dict) -> dict:
    return {**sample, "image": (sample["image"] - MEAN) / STD}


def augment(sample: dict, rng: np.random.Generator, scales: tuple, jitter: float, size: tuple[int, int] | None) -> dict:
    """The training transform: zoom by one of `scales`, flip half of the time, jitter colours, then resize to `size`."""
    sample = zoom(sample, rng.choice(scales))
    if rng.random() < 0.5:
        sample = flip(sample)
    sample = colour_jitter(sample, *rng.uniform(1 - jitter, 1 + jitter, 3))
    return sample if size is None else resize(sample, size)


# ======================================================================================================================
# Loaders
# ======================================================================================================================


def make_loader(dataset: Dataset, batch_size: int, shuffle: bool, seed: int, workers: int) -> DataLoader:
    """Batches of samples; the order of a shuffled epoch depends on `seed` and on how many epochs came before."""
    return DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=shuffle,
        num_workers=workers,
        generator=torch.Generator().manual_seed(seed),
        drop_last=shuffle and len(dataset) >= batch_size,  # a last batch of one has no statistics for BatchNorm
        pin_memory=torch.cuda.is_available(),
    )


# ======================================================================================================================
# Pictures of samples and predictions
# ======================================================================================================================


def palette() -> np.ndarray:
    """(256,3) uint8, PASCAL VOC's colours: the bits of the index dealt to red, green and blue, highest bits first."""
    index = np.arange(256)
    bits = [(index >> b) & 1 for b in range(8)]
    rgb = [sum(bits[3 * k + c] << (7 - k) for k in range(3) if 3 * k + c < 8) for c in range(3)]
    colours = np.stack(rgb, axis=1).astype(np.uint8)
    colours[IGNORE_INDEX] = 255  # white: not to be mistaken for class 0, which is black
    return colours


DEPTH_RANGE = (0.5, 7.0)  # metres, the ends of the colour map, the same in every picture so that pictures compare
DEPTH_COLOURS = np.array(  # near to far: yellow, orange, magenta, violet, blue-black
    [[252, 253, 191], [254, 159, 109], [222, 73, 104], [140, 41, 129], [59, 15, 112], [10, 5, 40]], dtype=np.float32
)


def picture(key: str, x: Tensor) -> np.ndarray:
    """A normalised image, a label or a prediction in the label's format → uint8 (H,W,3). Invalid pixels are white."""
    a = x.detach().cpu().numpy()
    if key == "image":
        return ((x.detach().cpu() * STD + MEAN).clamp(0, 1).permute(1, 2, 0) * 255).byte().numpy()
    if key == "depth":
        near, far = DEPTH_RANGE
        t = np.clip((a[0] - near) / (far - near), 0, 1) * (len(DEPTH_COLOURS) - 1)
        channels = [np.interp(t, range(len(DEPTH_COLOURS)), DEPTH_COLOURS[:, c]) for c in range(3)]
        return np.where(a[0][..., None] > 0, np.stack(channels, axis=-1), 255).astype(np.uint8)
    if key == "normals":
        valid = np.linalg.norm(a, axis=0)[..., None] > 0.5
        return np.where(valid, (a.transpose(1, 2, 0) + 1) * 127.5, 255).astype(np.uint8)
    return palette()[a]


def contact_sheet(titles: list[str], rows: list[list[np.ndarray]], height: int = 192) -> Image.Image:
    """Rows of uint8 pictures (H,W,3), each brought to `height`, under their column titles."""
    rows = [[Image.fromarray(p) for p in row] for row in rows]
    rows = [[p.resize((p.width * height // p.height, height), Image.NEAREST) for p in row] for row in rows]
    widths = [max(row[c].width for row in rows) for c in range(len(titles))]
    margin, header = 4, 24
    sheet = Image.new("RGB", (sum(widths) + margin * len(widths), header + len(rows) * (height + margin)), "white")
    draw, left = ImageDraw.Draw(sheet), 0
    for c, title in enumerate(titles):
        draw.text((left + 4, 4), title, fill="black", font=ImageFont.load_default(size=14))
        for r, row in enumerate(rows):
            sheet.paste(row[c], (left, header + r * (height + margin)))
        left += widths[c] + margin
    return sheet


# ======================================================================================================================
# Check: python data.py check
# ======================================================================================================================


def check(root: Path, sheet: Path) -> int:
    """Read every file of both splits, print what is there, save a contact sheet; returns the number of problems."""
    problems, sizes, samples = [], set(), []
    for split in ("train", "val"):
        dataset = NYUD(root, split, complete=False)
        print(f"{split}: {len(dataset)} stems, layout {dataset.layout}")
        missing = dataset.missing()
        problems += [f"{split} {k}: {len(f)} of {len(dataset)} files missing, first {f[0]}" for k, f in missing.items()]
        absent = {path.stem for files in missing.values() for path in files}
        statistics = {task: Statistics(task) for task in dataset.tasks}
        for i, stem in enumerate(tqdm([s for s in dataset.stems if s not in absent], desc=f"reading {split}")):
            try:
                sample = dataset.read(stem)
            except DataError as error:
                problems.append(str(error))
                continue
            sizes.add(tuple(sample["size"].tolist()))
            if len(samples) < 4 and i % 50 == 0:
                samples.append(normalise(sample))
            for task in dataset.tasks:
                statistics[task].add(sample[task], dataset.path(task, stem))
        for s in statistics.values():
            problems += s.report()
    if len(sizes) > 1:
        problems.append(f"images have {len(sizes)} sizes, {sorted(sizes)}: files of different archives were mixed")
    if samples:
        keys = ["image", *NYUD.readers]
        contact_sheet(keys, [[picture(k, s[k]) for k in keys] for s in samples]).save(sheet)
        print(f"a few samples: {sheet}")
    print("\n".join(f"PROBLEM {p}" for p in problems) or "no problems")
    return len(problems)


class Statistics:
    """What `check` says about one task of one split."""

    def __init__(self, task: str):
        self.task, self.pixels, self.valid = task, 0, 0
        self.low, self.high = np.inf, -np.inf
        self.histogram = np.zeros(IGNORE_INDEX, dtype=np.int64)
        self.odd: list[Path] = []  # files whose stored values are not what the format says

    def add(self, label: Tensor, path: Path) -> None:
        label = label.numpy()
        valid = {"depth": label > 0, "normals": np.linalg.norm(label, axis=0) > 0.5}.get(
            self.task, label != IGNORE_INDEX
        )
        self.pixels += valid.size
        self.valid += valid.sum()
        if self.task == "normals":
            length = np.linalg.norm(read_array(path, 3), axis=2) if path.suffix == ".npy" else np.ones(1)
            if (np.abs(length - 1) > 0.05)[length > 0.05].mean() > 0.05:  # a few short ones are resampled edges
                self.odd.append(path)
            return
        if valid.any():
            self.low, self.high = min(self.low, label[valid].min()), max(self.high, label[valid].max())
        if self.task == "depth":
            stored = read_array(path, 2)
            if not np.isfinite(stored).all() or (stored < 0).any() or stored.max() > 100:
                self.odd.append(path)
        else:
            self.histogram += np.bincount(label[valid], minlength=IGNORE_INDEX)

    def report(self) -> list[str]:
        """Prints a summary; returns the problems."""
        share = self.valid / max(self.pixels, 1)
        span = f", {self.low:.4g} to {self.high:.4g}" if np.isfinite(self.low) else ""
        print(f"  {self.task}: {share:.1%} of the pixels valid{span}")
        total = max(self.histogram.sum(), 1)
        for c in self.histogram.nonzero()[0]:
            print(f"    {c:3d} {NYUD_CLASSES[c]:16s} {self.histogram[c] / total:7.2%}")
        problems = [] if self.valid else [f"{self.task}: not one valid pixel"]
        if self.odd:
            what = {"depth": "negative, not finite or above 100 m", "normals": "not unit vectors"}[self.task]
            problems.append(f"{self.task}: values are {what} in {len(self.odd)} files, the first is {self.odd[0]}")
        return problems


# ======================================================================================================================
# Rooms: ray-cast indoor scenes in the layout of NYUD_MT, the stand-in for NYUD-v2
#
#   (seed, index) → furnish a room → solids + lights + camera          the scene, independent of the image size
#   rays (3, N)   → first_hit → label, depth, normal → shade → sensor  N = H·W, in chunks
#
# Lengths are in metres. The world has x right, y towards the far wall, z up, and its origin on the floor in the near
# left corner. The camera frame has x right, y forward, z up: the axes of NYUD_MT's normals. Shape, place and layout
# tell the classes apart; paints are drawn from one pool, so that colour alone says little.
# ======================================================================================================================

# Codes of the NYUD_MT label files: 0 = unlabelled, 1…40 = the 40 classes.
ROOM_LABELS = {
    "wall": 1, "floor": 2, "cabinet": 3, "bed": 4, "sofa": 6, "table": 7, "door": 8, "window": 9, "bookshelf": 10,
    "picture": 11, "ceiling": 22, "lamp": 35,
}  # fmt: skip
HUES = {label: i / len(ROOM_LABELS) for i, label in enumerate(ROOM_LABELS)}
RAY_CHUNK = 2048  # rays at once: about 70 solids x 3 x 2048 float32 fit the cache, whatever the image size


@dataclass(frozen=True)
class Paint:
    """A procedural texture: pattern(u, v) in [0, 1] picks a colour along the palette."""

    pattern: str
    palette: np.ndarray  # (C, 3) linear RGB
    scale: float  # pattern periods a metre
    salt: int  # keeps the noise of two paints apart
    glow: float = 0.0  # above 0: shines with this multiple of its colour, whatever light falls on it


@dataclass(frozen=True)
class Solid:
    """The unit box [-1, 1]³, ball or drum (upright cylinder), scaled by half, turned by yaw, moved to centre."""

    shape: str
    paint: Paint
    centre: np.ndarray  # (3,)
    half: np.ndarray  # (3,) half extents
    glass: bool = False  # a depth sensor looks through it: neither depth nor normal
    yaw: float = 0.0  # about z, anticlockwise seen from above
    label: str = ""  # set by place()


def turn(yaw: float) -> np.ndarray:
    """(3, 3) rotation about z, from the turned frame to the outer one."""
    c, s = np.cos(yaw), np.sin(yaw)
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])


def times(vectors: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Row vectors (N, 3) times matrix (3, 3). Not `@`: BLAS rounds differently on different processors."""
    return np.einsum("ni,ij->nj", vectors, matrix)


# --- Textures --------------------------------------------------------------------------------------------------------


def hashed(i: np.ndarray, j: np.ndarray, salt: int) -> np.ndarray:
    """Noise in [0, 1) at whole-numbered cells. In integers: the popular sine hash differs from machine to machine."""
    i, j = (np.asarray(k).astype(np.int64).astype(np.uint32) for k in (i, j))  # float → uint32 is undefined below 0
    h = i * np.uint32(0x9E3779B1) ^ j * np.uint32(0x85EBCA77) + np.uint32(salt)
    h = (h ^ h >> 15) * np.uint32(0x2C1B3C6D)
    h = (h ^ h >> 12) * np.uint32(0x297A2D39)
    return (h ^ h >> 15) / 2.0**32


def blotches(u: np.ndarray, v: np.ndarray, salt: int) -> np.ndarray:
    """Cell noise, linearly interpolated."""
    i, j = np.floor(u), np.floor(v)
    a, b = u - i, v - j
    below = (1 - a) * hashed(i, j, salt) + a * hashed(i + 1, j, salt)
    above = (1 - a) * hashed(i, j + 1, salt) + a * hashed(i + 1, j + 1, salt)
    return (1 - b) * below + b * above


PATTERNS = {  # (u, v) in periods, salt → [0, 1]
    "plain": lambda u, v, salt: 0.3 * blotches(u / 2, v / 2, salt),
    "carpet": lambda u, v, salt: blotches(3 * u, 3 * v, salt),
    "stripes": lambda u, v, salt: (u % 1 < 0.5) * 1.0,
    "checks": lambda u, v, salt: (np.floor(u) + np.floor(v)) % 2,
    "dots": lambda u, v, salt: (np.hypot(u % 1 - 0.5, v % 1 - 0.5) < 0.3) * 1.0,
    "grain": lambda u, v, salt: 0.5 + 0.5 * np.sin(2 * np.pi * (u + 2 * blotches(u, v / 4, salt))),
    "planks": lambda u, v, salt: hashed(np.floor(u), np.floor(v / 6 + hashed(np.floor(u), 0, salt)), salt),  # staggered
    "spines": lambda u, v, salt: hashed(np.floor(u), 0, salt),  # books side by side
    "mosaic": lambda u, v, salt: hashed(np.floor(u), np.floor(v), salt),
    "blotches": blotches,
}
FURNITURE = ("plain", "plain", "carpet", "stripes", "checks", "dots", "grain", "grain")


def draw_colour(rng, hue: float) -> tuple:
    """A random colour, near the class's favourite hue in four cases of five: a hint, and often a wrong one."""
    hue = rng.normal(hue, 0.05) if rng.random() < 0.8 else rng.random()
    return colorsys.hsv_to_rgb(hue % 1, rng.beta(1.5, 2.5), rng.uniform(0.15, 0.9))


def draw_paint(rng, hue: float, patterns=FURNITURE, scale=(2, 7), colours=2, contrast=0.5) -> Paint:
    """A random paint; contrast 0 gives a palette of one colour, 1 one of unrelated colours."""
    palette = np.array([draw_colour(rng, hue) for _ in range(colours)])
    palette[1:] = palette[0] + contrast * (palette[1:] - palette[0])
    return Paint(str(rng.choice(patterns)), palette, rng.uniform(*scale), int(rng.integers(2**31)))


def albedo(paint: Paint, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """(N,) surface coordinates in metres → (N, 3) linear RGB, interpolated along the palette."""
    at = PATTERNS[paint.pattern](u * paint.scale, v * paint.scale, paint.salt) * (len(paint.palette) - 1)
    low = np.minimum(at.astype(int), len(paint.palette) - 2)
    mix = (at - low)[:, None]
    return (1 - mix) * paint.palette[low] + mix * paint.palette[low + 1]


# --- Furniture -------------------------------------------------------------------------------------------------------
# Each builder returns solids around the origin of the floor, the front towards -y; what stands at a wall or hangs on
# one has its back at y = 0.


def part(shape: str, paint: Paint, x: tuple, y: tuple, z: tuple, glass: bool = False) -> Solid:
    """An upright solid that fills three (low, high) ranges."""
    low, high = np.array([x, y, z], float).T
    return Solid(shape, paint, (low + high) / 2, (high - low) / 2, glass)


def panels(paint: Paint, x: tuple, y: float, z: tuple, rows: int, columns: int, margin: float, glass=False) -> list:
    """A grid of thin boxes, each with a margin around it, in front of the plane y."""
    xs, zs = np.linspace(*x, columns + 1), np.linspace(*z, rows + 1)
    return [
        part("box", paint, (x0 + margin, x1 - margin), (y - 0.004, y), (z0 + margin, z1 - margin), glass)
        for x0, x1 in pairwise(xs)
        for z0, z1 in pairwise(zs)
    ]


def build_door(rng, hue: float) -> list:
    half, top, leaf = rng.uniform(0.4, 0.5), rng.uniform(1.95, 2.15), draw_paint(rng, hue, ("plain", "grain"))
    inset, frame = draw_paint(rng, hue, ("plain",)), draw_paint(rng, hue, ("plain",))
    knob = rng.choice([-1, 1]) * (half - 0.08)
    rows, columns = [(2, 1), (2, 2), (3, 2), (4, 1)][rng.integers(4)]
    return [
        part("box", frame, (-half - 0.09, half + 0.09), (-0.03, 0), (0, top + 0.09)),
        part("box", leaf, (-half, half), (-0.05, 0), (0, top)),
        part("ball", frame, (knob - 0.05, knob + 0.05), (-0.14, -0.04), (0.98, 1.08)),
        *panels(inset, (-half, half), -0.05, (0.08, top), rows, columns, 0.09),
    ]


def build_window(rng, hue: float) -> list:
    """A frame with panes; the sky ranges from night to glare, so that brightness is a hint and no proof."""
    half, low, high = rng.uniform(0.45, 0.8), rng.uniform(0.8, 1.0), rng.uniform(1.85, 2.2)
    sky = draw_paint(rng, hue, ("blotches", "plain"), (0.5, 2), contrast=0.4)
    sky = replace(sky, palette=0.5 + 0.5 * sky.palette, glow=rng.choice([0.15, 0.8, 1.1, 1.5]))
    rows, columns, glass = rng.integers(1, 3), rng.integers(2, 4), rng.random() < 0.4
    return [
        part("box", draw_paint(rng, hue, ("plain",)), (-half, half), (-0.06, 0), (low, high)),
        *panels(sky, (0.03 - half, half - 0.03), -0.06, (low + 0.03, high - 0.03), rows, columns, 0.04, glass),
    ]


def build_picture(rng, hue: float) -> list:
    half, middle, rise = rng.uniform(0.25, 0.6), rng.uniform(1.45, 1.75), rng.uniform(0.2, 0.42)
    x, z = (-half, half), (middle - rise, middle + rise)
    canvas = draw_paint(rng, hue, ("blotches", "mosaic", "stripes"), (5, 10), colours=5, contrast=1)
    return [
        part("box", draw_paint(rng, hue, ("plain",)), x, (-0.04, 0), z),
        *panels(canvas, x, -0.04, z, 1, 1, rng.uniform(0.05, 0.09)),
    ]


def build_cabinet(rng, hue: float) -> list:
    """A body on a plinth, a top that juts out, a grid of doors or drawers."""
    half, deep, top, body, front = (
        *rng.uniform([0.4, 0.4, 0.75], [0.75, 0.55, 1.9]),
        draw_paint(rng, hue),
        draw_paint(rng, hue),
    )
    rows, columns = rng.integers(1, 4), rng.integers(2, 4)
    return [
        part("box", body, (0.04 - half, half - 0.04), (0.05 - deep, 0), (0, 0.08)),
        part("box", body, (-half, half), (-deep, 0), (0.08, top)),
        part("box", front, (-half - 0.03, half + 0.03), (-deep - 0.04, 0), (top, top + 0.04)),
        *panels(front, (-half, half), -deep, (0.08, top), rows, columns, 0.025),
    ]


def build_bookshelf(rng, hue: float) -> list:
    """Back, sides and boards; on each board a row of books that does not fill it."""
    half, deep, count = rng.uniform(0.4, 0.7), rng.uniform(0.28, 0.36), rng.integers(4, 6)
    levels = np.linspace(0.03, rng.uniform(0.33, 0.4) * count, count + 1)
    wood, books = (
        draw_paint(rng, hue, ("plain", "grain")),
        draw_paint(rng, hue, ("spines",), (11, 16), colours=6, contrast=1),
    )
    parts = [part("box", wood, (-half, half), (-0.02, 0), (0, levels[-1]))]
    parts += [part("box", wood, (x - 0.02, x + 0.02), (-deep, 0), (0, levels[-1])) for x in (-half, half)]
    parts += [part("box", wood, (-half, half), (-deep, 0), (z - 0.025, z + 0.015)) for z in levels]
    for z in levels[:-1]:
        row = half * rng.uniform(-1, -0.5), half * rng.uniform(0.3, 1)
        books = replace(books, salt=int(rng.integers(2**31)))
        parts.append(part("box", books, row, (0.05 - deep, 0), (z, z + rng.uniform(0.2, 0.28))))
    return parts


def build_bed(rng, hue: float) -> list:
    """Headboard at the wall, frame, mattress, a blanket folded back, one or two pillows."""
    half, long, top, fold = rng.uniform([0.5, 1.9, 0.4, 0.6], [0.85, 2.1, 0.55, 1.0])
    wood, linen, cover = draw_paint(rng, hue), draw_paint(rng, hue), draw_paint(rng, hue)
    pillows = (0,) if half < 0.65 else (-half / 2, half / 2)
    return [
        part("box", wood, (-half, half), (-0.07, 0), (0, rng.uniform(0.75, 1.15))),
        part("box", wood, (-half, half), (-long, 0), (0.08, 0.25)),
        part("box", linen, (0.02 - half, half - 0.02), (0.02 - long, 0), (0.25, top)),
        part("box", cover, (-half - 0.03, half + 0.03), (-long - 0.02, -fold), (0.2, top + 0.04)),
        *[part("ball", linen, (x - 0.3, x + 0.3), (-0.53, -0.13), (top - 0.07, top + 0.15)) for x in pillows],
    ]


def build_sofa(rng, hue: float) -> list:
    half, deep, seat, back, arm = rng.uniform([0.7, 0.8, 0.25, 0.75, 0.14], [1.05, 0.95, 0.3, 0.95, 0.22])
    cloth, cushion, arm_top = draw_paint(rng, hue), draw_paint(rng, hue), rng.uniform(0.52, 0.6)
    seams = np.linspace(arm - half, half - arm, rng.integers(3, 5))
    return [
        part("box", cloth, (-half, half), (-deep, 0), (0.06, seat)),
        part("box", cloth, (-half, half), (-0.22, 0), (0.06, back)),
        part("box", cloth, (-half, arm - half), (-deep, 0), (0.06, arm_top)),
        part("box", cloth, (half - arm, half), (-deep, 0), (0.06, arm_top)),
        *[
            part("box", cushion, (x0 + 0.015, x1 - 0.015), (-deep - 0.03, -0.22), (seat, seat + 0.15))
            for x0, x1 in pairwise(seams)
        ],
    ]


def build_table(rng, hue: float) -> list:
    """A round top on a pillar, or a slab on four legs."""
    x, y, top = rng.uniform([0.5, 0.35, 0.55], [0.85, 0.5, 0.78])
    board, leg = draw_paint(rng, hue), draw_paint(rng, hue, ("plain",))
    if rng.random() < 0.35:
        return [
            part("drum", board, (-x, x), (-x, x), (top - 0.06, top)),
            part("drum", leg, (-0.06, 0.06), (-0.06, 0.06), (0.04, top - 0.06)),
            part("drum", leg, (-0.28, 0.28), (-0.28, 0.28), (0, 0.04)),
        ]
    return [
        part("box", board, (-x, x), (-y, y), (top - 0.07, top)),
        *[
            part("box", leg, (a - 0.04, a + 0.04), (b - 0.04, b + 0.04), (0, top - 0.07))
            for a in (0.05 - x, x - 0.05)
            for b in (0.05 - y, y - 0.05)
        ],
    ]


def build_lamp(rng, hue: float) -> list:
    """A floor lamp, switched off in one case of four."""
    high, r, pole = rng.uniform(1.1, 1.7), rng.uniform(0.17, 0.26), draw_paint(rng, hue, ("plain",))
    shade = draw_paint(rng, hue, ("plain",), contrast=0.2)
    if rng.random() < 0.75:
        shade = replace(shade, palette=0.6 + 0.4 * shade.palette, glow=rng.uniform(0.7, 1.4))
    return [
        part("drum", pole, (-0.17, 0.17), (-0.17, 0.17), (0, 0.04)),
        part("drum", pole, (-0.03, 0.03), (-0.03, 0.03), (0.04, high)),
        part("ball", shade, (-r, r), (-r, r), (high, high + 2 * r)),
    ]


# --- The scene -------------------------------------------------------------------------------------------------------


def nyu_intrinsics(height: int, width: int) -> tuple:
    """(fx, fy, cx, cy) of NYU's Kinect at 480x640, scaled to the image.

    Pixel centres lie at whole numbers, the image's border at -0.5: resizing scales cx + 0.5, not cx.
    """
    sx, sy = width / 640, height / 480
    return 518.86 * sx, 519.47 * sy, (325.58 + 0.5) * sx - 0.5, (253.74 + 0.5) * sy - 0.5


def camera_rays(height: int, width: int) -> np.ndarray:
    """(H·W, 3) rays in the camera frame. Their forward part is 1, which makes the ray parameter the planar depth."""
    fx, fy, cx, cy = nyu_intrinsics(height, width)
    v, u = np.mgrid[:height, :width].reshape(2, -1)
    return np.stack([(u - cx) / fx, np.ones(u.size), (cy - v) / fy], axis=1)


def draw_camera(rng, room: np.ndarray) -> tuple:
    """Position (3,) near the near wall and (3, 3) world-from-camera rotation, looking across and slightly down."""
    position = np.array([rng.uniform(0.2, 0.8) * room[0], rng.uniform(0.25, 0.2 * room[1]), rng.uniform(1.4, 1.6)])
    ahead = rng.uniform([0.05, 0.5], [0.95, 1]) * room[:2] - position[:2]
    pitch = rng.uniform(-0.2, -0.08)
    c, s = np.cos(pitch), np.sin(pitch)
    return position, turn(np.arctan2(-ahead[0], ahead[1])) @ np.array([[1, 0, 0], [0, c, -s], [0, s, c]])


def place(piece: list, label: str, x: float = 0, y: float = 0, yaw: float = 0) -> list:
    return [replace(s, label=label, centre=turn(yaw) @ s.centre + [x, y, 0], yaw=yaw) for s in piece]


def build_shell(rng, room: np.ndarray) -> list:
    """Walls, floor and ceiling as slabs around the room: seen from inside, they are solids like any other."""
    (w, d, h), t = room, 0.1
    wall = draw_paint(rng, HUES["wall"], ("plain", "plain", "stripes", "dots", "checks"), (1.5, 4), contrast=0.25)
    floor = draw_paint(rng, HUES["floor"], ("planks", "checks", "carpet", "grain", "plain"), contrast=0.35)
    ceiling = draw_paint(rng, HUES["ceiling"], ("plain",), contrast=0.2)
    walls = [part("box", wall, x, (-t, d + t), (0, h)) for x in ((-t, 0), (w, w + t))]
    walls += [part("box", wall, (0, w), y, (0, h)) for y in ((-t, 0), (d, d + t))]
    return [
        *place(walls, "wall"),
        *place([part("box", floor, (-t, w + t), (-t, d + t), (-t, 0))], "floor"),
        *place([part("box", ceiling, (-t, w + t), (-t, d + t), (h, h + t))], "ceiling"),
    ]


def wall_spot(rng, room: np.ndarray) -> tuple:
    """(x, y, yaw) that turns a piece's back to the left, far or right wall and its front into the room."""
    x, y = rng.random(2) * room[:2]
    return [(0, y, np.pi / 2), (x, room[1], 0), (room[0], y, -np.pi / 2)][rng.integers(3)]


def free_spot(rng, room: np.ndarray) -> tuple:
    return *(rng.random(2) * room[:2]), rng.uniform(-np.pi, np.pi)


# (label, builder, where it goes, how often one is wanted); large pieces first, while there is space
PIECES = (
    ("door", build_door, wall_spot, 0.7),
    ("bed", build_bed, wall_spot, 0.5),
    ("sofa", build_sofa, wall_spot, 0.6),
    ("cabinet", build_cabinet, wall_spot, 0.7),
    ("bookshelf", build_bookshelf, wall_spot, 0.7),
    ("window", build_window, wall_spot, 0.8),
    ("table", build_table, free_spot, 0.7),
    ("picture", build_picture, wall_spot, 0.7),
    ("lamp", build_lamp, free_spot, 0.6),
    ("picture", build_picture, wall_spot, 0.4),
)


def fits(middle, reach, room, camera, taken) -> bool:
    """Is the box middle ± reach inside the room, clear of the boxes taken, and its middle in the picture?"""
    position, world_from_camera = camera
    x, y, z = (middle - position) @ world_from_camera
    seen = y > 1.4 and abs(x) < 0.55 * y and abs(z) < 0.44 * y  # a little within half the field of view
    inside = (np.abs(middle - room / 2) < room / 2 - reach + 0.02).all()
    return seen and inside and not any((np.abs(middle - m) < reach + r).all() for m, r in taken)


def furnish(rng, room: np.ndarray, camera: tuple) -> list:
    """All solids of the scene. A piece for which 40 tries find no place is left out."""
    solids = build_shell(rng, room)
    taken = [(camera[0], np.array([0.5, 0.5, 2]))]  # or the camera might stand in a wardrobe
    for label, build, spot, chance in PIECES:
        piece = build(rng, HUES[label]) if rng.random() < chance else []
        low, high = (np.array([s.centre + side * s.half for s in piece]) for side in (-1, 1))
        for _ in range(40 if piece else 0):
            x, y, yaw = spot(rng, room)
            middle = turn(yaw) @ (low.min(0) + high.max(0)) / 2 + [x, y, 0]
            reach = np.abs(turn(yaw)) @ (high.max(0) - low.min(0)) / 2
            if fits(middle, reach, room, camera, taken):
                solids, taken = solids + place(piece, label, x, y, yaw), taken + [(middle, reach)]
                break
    return solids


# --- Ray casting -----------------------------------------------------------------------------------------------------
# In a solid's own frame, scaled to unit size, a ray is still a straight line with the same parameter t, so each shape
# needs one test, against the unit shape. It gives the span of t inside; NaN, or near > far, where the ray passes by.


def slab_span(o: np.ndarray, d: np.ndarray) -> tuple:
    """Inside [-1, 1] along all A axes: origins (A, K, 1), directions (A, K, N) → near, far (K, N)."""
    inverse = 1 / d
    middle, half = -o * inverse, np.abs(inverse)
    return (middle - half).max(0), (middle + half).min(0)


def round_span(o: np.ndarray, d: np.ndarray) -> tuple:
    """Inside the unit circle (A = 2) or ball (A = 3), measured from the ray's point closest to the middle.

    The textbook's b² - ac subtracts large, nearly equal numbers, which float32 does not survive.
    """
    a = (d * d).sum(0)
    middle = -(o * d).sum(0) / a
    half = np.sqrt((1 - ((o + middle * d) ** 2).sum(0)) / a)
    return middle - half, middle + half


def drum_span(o: np.ndarray, d: np.ndarray) -> tuple:
    side, caps = round_span(o[:2], d[:2]), slab_span(o[2:], d[2:])
    return np.maximum(side[0], caps[0]), np.minimum(side[1], caps[1])


def first_hit(solids: list, origin: np.ndarray, rays: np.ndarray) -> tuple:
    """Rays (N, 3) from one origin → t (N,) where each enters its first solid, and that solid's index (N,)."""
    t = np.full((len(solids), len(rays)), np.inf, np.float32)
    rays = rays.T.astype(np.float32, order="C")  # (3, N)
    for shape, span in (("box", slab_span), ("ball", round_span), ("drum", drum_span)):
        rows = [k for k, s in enumerate(solids) if s.shape == shape]
        frames = [turn(-solids[k].yaw) / solids[k].half[:, None] for k in rows]  # world → unit shape
        if rows:
            o = np.array(
                [frame @ (origin - solids[k].centre) for k, frame in zip(rows, frames, strict=True)], np.float32
            )
            d = np.einsum("akj,jn->akn", np.stack(frames, axis=1).astype(np.float32), rays)
            with np.errstate(divide="ignore", invalid="ignore"):
                near, far = span(o.T[..., None], d)
            t[rows] = np.where((near < far) & (near > 0), near, np.inf)
    hit = t.argmin(0)
    return np.take_along_axis(t, hit[None], 0)[0], hit


def unit_normals(shape: str, q: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Outward normals (N, 3) where rays of direction d (N, 3) enter the unit shape at points q (N, 3).

    At an edge, rounding puts q on either face: asking only faces turned to the ray keeps normals from facing away.
    """
    towards = -np.sign(d)
    if shape == "box":
        return np.where(q * towards == (q * towards).max(1, keepdims=True), towards, 0)
    if shape == "drum":
        cap = (q * towards)[:, 2:] > np.hypot(q[:, :1], q[:, 1:2]) - 1e-3
        return np.where(cap, towards * [0, 0, 1], q * [1, 1, 0])
    return q


def surface(solid: Solid, points: np.ndarray, rays: np.ndarray) -> tuple:
    """World points (N, 3) on a solid and the rays (N, 3) that end there → world normals (N, 3), linear RGB (N, 3)."""
    axes = turn(solid.yaw)
    local, along = times(points - solid.centre, axes), times(rays, axes)
    normal = unit_normals(solid.shape, local / solid.half, along) / solid.half
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    facing = np.abs(normal).argmax(1)  # textures are projected along the axis that the surface faces most
    u = np.where(facing == 0, local[:, 1], local[:, 0])
    v = np.where(facing == 2, local[:, 1], local[:, 2])
    return times(normal, axes.T), albedo(solid.paint, u, v)


# --- Light and sensor ------------------------------------------------------------------------------------------------


def illuminate(solids: list, lights: tuple, points: np.ndarray, normals: np.ndarray) -> np.ndarray:
    """Light (N, 3) arriving at points (N, 3): ambient, and Lambert's cosine for each of two lamps.

    The first lamp throws hard shadows: shadow rays start at the lamp, and what it sees first is lit. The second, weaker
    one throws none and stands for light bounced off the walls.
    """
    light = 0.3 + 0.08 * normals[:, 2:]
    for number, (position, colour) in enumerate(zip(*lights, strict=True)):
        beam = points - position
        distance = np.linalg.norm(beam, axis=1)
        cosine = np.maximum(-(beam * normals).sum(1) / distance, 0)
        if number == 0:
            cosine *= first_hit(solids, position, beam)[0] > 0.998  # t = 1 is the point itself, up to rounding
        light = light + (cosine / (1 + 0.1 * distance**2))[:, None] * colour
    return light


def trace(solids: list, lights: tuple, camera: tuple, rays: np.ndarray) -> dict:
    """Camera-frame rays (N, 3) → semseg (N,), depth (N,), normals (N, 3) and linear colour (N, 3), free of noise."""
    position, world_from_camera = camera
    rays = times(rays, world_from_camera.T)
    depth, hit = first_hit(solids, position, rays)
    points = position + depth[:, None] * rays
    normals, colour = np.empty_like(points), np.empty_like(points)
    for k in np.unique(hit):
        normals[hit == k], colour[hit == k] = surface(solids[k], points[hit == k], rays[hit == k])
    glow = np.array([s.paint.glow for s in solids])[hit, None]
    glass = np.array([s.glass for s in solids])[hit]
    return {
        "semseg": np.array([ROOM_LABELS[s.label] for s in solids], np.uint8)[hit],
        "depth": np.where(glass, 0, depth),
        "normals": np.where(glass[:, None], 0, times(normals, world_from_camera)).astype(np.float32),
        "colour": colour * np.where(glow > 0, glow, illuminate(solids, lights, points, normals)),
    }


def draw_blob(rng, height: int, width: int, radius: tuple) -> np.ndarray:
    """(H, W) mask of a random lobed spot; radius: range in image widths. The same spot at every image size."""
    (x, y), r, lobes, phase = rng.random(2) * [1, 0.75], rng.uniform(*radius), rng.integers(1, 4), rng.uniform(0, 6)
    v, u = np.mgrid[:height, :width]
    dx, dy = (u + 0.5) / width - x, 0.75 * (v + 0.5) / height - y  # 0.75: NYU's ratio of height to width
    return np.hypot(dx, dy) < r * (1 + 0.35 * np.sin(lobes * np.arctan2(dy, dx) + phase))


def expose(rng, colour: np.ndarray) -> np.ndarray:
    """Linear colour (H, W, 3) → 8-bit RGB: random exposure and white balance, gamma, sensor noise."""
    balanced = colour * rng.uniform(0.6, 1.2) * rng.uniform(0.88, 1.12, 3)
    noisy = np.clip(balanced, 0, 1) ** (1 / 2.2) + rng.uniform(0.01, 0.03) * rng.standard_normal(colour.shape)
    return (np.clip(noisy, 0, 1) * 255).round().astype(np.uint8)


def render_room(seed: int, index: int, height: int, width: int) -> dict:
    """Room number `index` of dataset `seed`: the same bytes every time, the same scene at every size.

    image uint8 (H, W, 3) RGB; semseg uint8 (H, W) in the file coding, 0 = unlabelled, 1…40; depth float32 (H, W),
    metres along the optical axis, 0 = hole; normals float32 (H, W, 3), unit vectors in the camera frame, turned
    to the camera, zero in the holes too, since NYU's normals are computed from its depth.
    """
    rng = np.random.default_rng((seed, index))
    room = rng.uniform([3, 3, 2.5], [5, 7, 2.7])  # width, depth, height
    camera = draw_camera(rng, room)
    solids = furnish(rng, room, camera)
    lights = (
        room * rng.uniform([0.2, 0.1, 0.88], [0.8, 0.8, 0.95], (2, 3)),  # positions, under the ceiling
        rng.uniform([[0.7], [0.2]], [[1.5], [0.5]], (2, 3)),
    )  # colours
    rays = camera_rays(height, width)
    chunks = [trace(solids, lights, camera, rays[i : i + RAY_CHUNK]) for i in range(0, len(rays), RAY_CHUNK)]
    out = {key: np.concatenate([c[key] for c in chunks]) for key in chunks[0]}
    out = {key: value.reshape(height, width, *value.shape[1:]) for key, value in out.items()}
    for _ in range(rng.integers(4)):
        hole = draw_blob(rng, height, width, (0.01, 0.05))
        out["depth"][hole], out["normals"][hole] = 0, 0
    if rng.random() < 0.3:
        out["semseg"][draw_blob(rng, height, width, (0.02, 0.06))] = 0
    out["image"] = expose(rng, out.pop("colour"))  # last: its noise is the only draw whose count depends on the size
    return out


# --- Writing the dataset ---------------------------------------------------------------------------------------------

ROOMS_VERSION = 1  # raised when the renderer draws other pictures, so that an older set is not taken for a new one


def write_rooms(out: Path, train: int = 800, val: int = 200, size: tuple = (96, 128), seed: int = 0) -> None:
    """Render train + val rooms into `out`, in the layout of NYUD_MT. Same arguments, same bytes.

    A set cut short is finished by the next call; a complete one is left as it is. Raises DataError if `out` holds a set
    with other arguments, or something else: nothing is overwritten.
    """
    wanted = {"renderer": ROOMS_VERSION, "seed": seed, "size": list(size), "train": train, "val": val}
    if set_is_complete(out, wanted):
        return
    for folder in ("gt_sets", "images", "segmentation", "depth", "normals"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    save(out / "rooms.json", lambda f: f.write(json.dumps({**wanted, "complete": False}).encode()))
    stems = [f"room_{i:05d}" for i in range(train + val)]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        jobs = pool.map(partial(write_room, out, seed, size), range(len(stems)), chunksize=8)
        list(tqdm(jobs, total=len(stems), desc=f"rendering {out}", unit="room"))
    for split, part in (("train", stems[:train]), ("val", stems[train:])):
        save(out / "gt_sets" / f"{split}.txt", lambda f, part=part: f.write("\n".join(part).encode()))
    save(out / "rooms.json", lambda f: f.write(json.dumps({**wanted, "complete": True}).encode()))


def set_is_complete(out: Path, wanted: dict) -> bool:
    """Does `out` hold exactly this set, whole? False: it is empty or was begun. DataError: it holds something else."""
    if not out.exists() or not any(out.iterdir()):
        return False
    marker = out / "rooms.json"
    try:
        found = json.loads(marker.read_text())
        complete = found.pop("complete")
    except (OSError, ValueError, AttributeError, KeyError):
        raise DataError(f"{out} is not empty and has no valid rooms.json: render into another folder") from None
    if found != wanted:
        raise DataError(f"{out} holds rooms with {found}, wanted {wanted}: delete the folder or choose another one")
    return complete


def save(path: Path, write) -> None:
    """write(file) into a temporary file, then rename: `path` is either whole or absent, also after a crash."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "wb") as file:
        write(file)
    os.replace(temporary, path)


def write_room(out: Path, seed: int, size: tuple, index: int) -> None:
    """One room's four files; the normals last, so that they tell whether the others are there."""
    stem = f"room_{index:05d}"
    last = out / f"normals/{stem}.npy"
    if last.exists():
        return
    room = render_room(seed, index, *size)
    save(out / f"images/{stem}.jpg", lambda f: Image.fromarray(room["image"]).save(f, "JPEG", quality=95))
    save(out / f"segmentation/{stem}.png", lambda f: Image.fromarray(room["semseg"]).save(f, "PNG"))
    save(out / f"depth/{stem}.npy", lambda f: np.save(f, room["depth"]))
    save(last, lambda f: np.save(f, room["normals"]))


# ======================================================================================================================
# Command line
# ======================================================================================================================


def main() -> int:
    parser = argparse.ArgumentParser(description="Render the stand-in dataset, or check an archive.")
    commands = parser.add_subparsers(dest="command", required=True)
    rooms = commands.add_parser("rooms", help="render indoor scenes in the layout of NYUD_MT")
    rooms.add_argument("--out", type=Path, default=Path("data/rooms"))
    rooms.add_argument("--train", type=int, default=800, help="images in the training split")
    rooms.add_argument("--val", type=int, default=200)
    rooms.add_argument("--size", type=int, nargs=2, default=(96, 128), metavar=("H", "W"))
    rooms.add_argument("--seed", type=int, default=0)
    checker = commands.add_parser("check", help="read every file; exit status 1 if anything is wrong")
    checker.add_argument("--dataset", choices=["nyud", "rooms"], default="nyud")
    checker.add_argument("--root", type=Path, required=True)
    checker.add_argument("--sheet", type=Path, default=None, help="contact sheet, default check_DATASET.png")
    args = parser.parse_args()
    try:
        if args.command == "rooms":
            if min(args.train, args.val, *args.size) < 1 or args.seed < 0:
                raise DataError("--train, --val and --size take positive numbers, --seed one that is not negative")
            write_rooms(args.out, args.train, args.val, tuple(args.size), args.seed)
            print(f"{args.train} + {args.val} rooms in {args.out}")
            return 0
        return 1 if check(args.root, args.sheet or Path(f"check_{args.dataset}.png")) else 0
    except DataError as error:
        print(error, file=sys.stderr)
        return 1 if args.command == "check" else 2


if __name__ == "__main__":
    sys.exit(main())
