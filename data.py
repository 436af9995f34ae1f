"""Datasets for MT-CP: NYUD-v2, PASCAL-Context, and a rendered stand-in for each.

Whatever the archive, one sample is a dict of

    image        float32 (3,H,W)   RGB, normalised by ImageNet's mean and std
    semseg       int64   (H,W)     class 0…39 (NYUD-v2) or 0…20 (PASCAL-Context), 255 = ignore
    depth        float32 (1,H,W)   metres along the optical axis, 0 = invalid
    normals      float32 (3,H,W)   unit vectors, all-zero = invalid; x right, y forward, z up
    human_parts  int64   (H,W)     0 background, 1…6 part, 255 = ignore
    sal          float32 (1,H,W)   0 or 1; 255 = ignore, outside the image after a rotation
    name         str               file stem
    size         int64   (2,)      original (H,W)

of which only the labels that were asked for are read. What is on disk is not trusted: nothing is
unpickled, no size is believed before it is compared, and every complaint (DataError) names the file
and what is wrong with it.

    python data.py rooms --out data/rooms             render a stand-in, rooms or figures
    python data.py nyud --mat FILE --out data/nyud    real NYUD-v2 from its official file
    python data.py check --dataset nyud --root DIR    is this archive complete and sane?

In this order: what a label is → readers, one a file format → datasets → transforms → loaders →
check → the rendered world → rendered sets on disk → NYUD-v2's official file → the command line.
"""

import argparse
import codecs
import colorsys
import hashlib
import io
import json
import math
import os
import re
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import islice, permutations, product
from pathlib import Path

import numpy as np
import scipy.io
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler
from tqdm import tqdm

from mtcp import IGNORE_INDEX

Array = np.ndarray
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)  # ImageNet, for RGB in 0…1
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)

NYUD_CLASSES = (
    "wall", "floor", "cabinet", "bed", "chair", "sofa", "table", "door", "window", "bookshelf",
    "picture", "counter", "blinds", "desk", "shelves", "curtain", "dresser", "pillow", "mirror",
    "floor mat", "clothes", "ceiling", "books", "refrigerator", "television", "paper", "towel",
    "shower curtain", "box", "whiteboard", "person", "night stand", "toilet", "sink", "lamp",
    "bathtub", "bag", "other structure", "other furniture", "other prop",
)  # fmt: skip
VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair",
    "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa",
    "train", "tvmonitor",
)  # fmt: skip
PERSON = VOC_CLASSES.index("person")
PART_CLASSES = (
    "background", "head", "torso", "upper arm", "lower arm", "upper leg", "lower leg",
)  # fmt: skip
PART_NAMES = (  # PASCAL-Part's 24 human parts, of which six are made
    "hair head lear lebrow leye mouth nose rear rebrow reye", "neck torso", "luarm ruarm",
    "llarm rlarm lhand rhand", "luleg ruleg", "llleg rlleg lfoot rfoot",
)  # fmt: skip
PART_LABELS = {part: i + 1 for i, names in enumerate(PART_NAMES) for part in names.split()}


class DataError(Exception):
    """The data are not what they should be. The message is one sentence: which file, what to do."""

    def __str__(self):
        # A loader's process hands its error on at the end of a traceback.
        return super().__str__().rpartition("DataError: ")[2].strip()


# ==================================================================================================
# What a label is: one row of LABELS for each task
# ==================================================================================================

DEPTH_RANGE = (0.5, 7.0)  # metres, ends of the colour map; fixed, so that pictures can be compared
DEPTH_COLOURS = np.array(  # near to far: yellow, orange, magenta, violet, blue-black
    [[252, 253, 191], [254, 159, 109], [222, 73, 104], [140, 41, 129], [59, 15, 112], [10, 5, 40]]
)


def palette() -> Array:
    """(256,3) uint8, PASCAL VOC's colours: the bits of the index dealt to red, green and blue."""
    index = np.arange(256)
    colours = np.zeros((256, 3), np.uint8)
    for bit in range(8):
        colours[:, bit % 3] |= ((index >> bit & 1) << (7 - bit // 3)).astype(np.uint8)
    colours[IGNORE_INDEX] = 255  # white: not to be mistaken for class 0, which is black
    return colours


def class_picture(label: Array) -> Array:
    return palette()[label]


def depth_picture(depth: Array) -> Array:
    near, far = DEPTH_RANGE
    t = np.clip((depth[0] - near) / (far - near), 0, 1) * (len(DEPTH_COLOURS) - 1)
    steps = range(len(DEPTH_COLOURS))
    colours = np.stack([np.interp(t, steps, DEPTH_COLOURS[:, c]) for c in range(3)], axis=-1)
    return np.where(depth[0][..., None] > 0, colours, 255).astype(np.uint8)


def normals_picture(normals: Array) -> Array:
    valid = np.linalg.norm(normals, axis=0)[..., None] > 0.5
    return np.where(valid, (normals.transpose(1, 2, 0) + 1) * 127.5, 255).astype(np.uint8)


def grey_picture(label: Array) -> Array:
    """0…1 from black to light grey: white says that nothing is known."""
    grey = np.where(label[0] == IGNORE_INDEX, 255, label[0] * 200)
    return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)


def divide_depth(depth: Tensor, scale: float) -> Tensor:
    """To see everything `scale` times as large, the camera comes `scale` times as close.

    The rule of the literature, and an approximation: a camera that really came closer would lose
    the same number of metres at every pixel. The division squashes the scene along the line of
    sight, and normals, which are left as they are, are a few degrees off. Notebook 01 shows it.
    """
    return depth / scale


def mirror_normals(normals: Tensor) -> Tensor:
    """A normal that pointed right now points left."""
    return normals * torch.tensor([-1.0, 1.0, 1.0]).view(3, 1, 1)


def turn_normals(normals: Tensor, degrees: float) -> Tensor:
    """A rolled camera calls other directions "right" and "up": normals turn with the picture."""
    cos = math.cos(math.radians(degrees))
    sin = math.sin(math.radians(degrees))
    x, y, z = normals  # right, forward, up: NYUD_MT's axes, confirmed on a real map
    return torch.stack([cos * x - sin * z, y, sin * x + cos * z])


def unchanged(label: Tensor, *_) -> Tensor:
    return label


@dataclass(frozen=True)
class Label:
    """All that transforms, check and pictures need to know of a task's label.

    A transform gets the label as its reader made it. It is never averaged: between class 3 and
    class 7 is no class 5, and next to a hole no half depth. So all are resized and rotated by
    taking the nearest pixel.
    """

    outside: float  # fills what a rotation brings in from outside the image: never a valid value
    valid: Callable[[Tensor], Tensor]  # label → bool (H,W): pixels that say something
    picture: Callable[[Array], Array]  # label → uint8 (H,W,3), invalid pixels white
    zoomed: Callable[[Tensor, float], Tensor] = unchanged  # (label, scale) → values after a zoom
    mirrored: Callable[[Tensor], Tensor] = unchanged  # label → values after a flip
    turned: Callable[[Tensor, float], Tensor] = unchanged  # (label, degrees) → after a rotation


LABELS = {
    "semseg": Label(IGNORE_INDEX, lambda x: x != IGNORE_INDEX, class_picture),
    "human_parts": Label(IGNORE_INDEX, lambda x: x != IGNORE_INDEX, class_picture),
    "sal": Label(IGNORE_INDEX, lambda x: x[0] != IGNORE_INDEX, grey_picture),
    "depth": Label(0, lambda x: x[0] > 0, depth_picture, zoomed=divide_depth),
    "normals": Label(0, lambda x: x.norm(dim=0) > 0.5, normals_picture, mirrored=mirror_normals,
                     turned=turn_normals),
}  # fmt: skip


def picture(key: str, x: Tensor) -> Array:
    """A normalised image, or a label or a prediction in the label's format → uint8 (H,W,3)."""
    x = x.detach().cpu()
    if key == "image":
        return ((x * STD + MEAN).clamp(0, 1).permute(1, 2, 0) * 255).byte().numpy()
    return LABELS[key].picture(x.numpy())


def contact_sheet(titles: list[str], rows: list[list[Array]], height=192) -> Image.Image:
    """Rows of uint8 pictures (H,W,3), each brought to `height`, under their column titles."""

    def fitted(pixels: Array) -> Image.Image:
        H, W = pixels.shape[:2]
        width = min(max(W * height // H, 1), 4 * height)  # a strip of a picture is squeezed
        return Image.fromarray(pixels).resize((width, height), Image.NEAREST)

    rows = [[fitted(pixels) for pixels in row] for row in rows]
    widths = [max(row[c].width for row in rows) + 4 for c in range(len(titles))]
    sheet = Image.new("RGB", (sum(widths), 24 + len(rows) * (height + 4)), "white")
    draw = ImageDraw.Draw(sheet)
    for c, title in enumerate(titles):
        left = sum(widths[:c])
        draw.text((left + 4, 4), title, fill="black", font=ImageFont.load_default(size=14))
        for r, row in enumerate(rows):
            sheet.paste(row[c], (left, 24 + r * (height + 4)))
    return sheet


def legend(title: str, entries: dict[int, str], width: int) -> Image.Image:
    """A title, then each class's colour and what is said of it, in as many rows as it takes."""
    font = ImageFont.load_default(size=14)
    texts = [title, *entries.values()]
    column = 36 + max(math.ceil(font.getlength(text)) for text in texts)
    width = max(width, column)
    columns = width // column
    sheet = Image.new("RGB", (width, 24 * math.ceil(len(texts) / columns)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (index, text) in enumerate(zip((None, *entries), texts, strict=True)):
        left = i % columns * column
        top = i // columns * 24
        if index is not None:
            colour = tuple(palette()[index].tolist())
            draw.rectangle((left + 4, top + 4, left + 20, top + 20), fill=colour, outline="black")
        draw.text((left + (4 if index is None else 26), top + 4), text, fill="black", font=font)
    return sheet


# ==================================================================================================
# Readers: one per file format, path → array
# ==================================================================================================


def read_pixels(path: Path, mode: str) -> Array:
    """An image file as uint8: (H,W,3) for mode "RGB", (H,W) for "L", one 8-bit channel."""
    try:
        with Image.open(path) as image:
            # Converting a palette PNG to grey would replace class indices by the brightness of
            # their colours.
            keep = mode == "L" and image.mode in ("L", "P")
            if mode == "L" and not keep:
                raise DataError(f"{path} is a {image.mode} image: a label has one 8-bit channel")
            return np.array(image if keep else image.convert(mode))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} is no readable image ({error}): unpack it again") from error


def read_photograph(path: Path) -> Array:
    """Any image file, upright, as uint8 RGB (H,W,3): what is transparent is white."""
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16 bits: Pillow would cut, not divide
                grey = np.clip(np.asarray(image) / 257, 0, 255).astype(np.uint8)
                return np.repeat(grey[..., None], 3, axis=2)
            if image.mode == "F":
                raise ValueError("floating point: save it with 8 bits")
            rgba = image.convert("RGBA")
            white = Image.new("RGBA", rgba.size, "white")
            return np.array(Image.alpha_composite(white, rgba).convert("RGB"))
    except Exception as error:  # a broken EXIF block fails in ways of its own
        raise DataError(f"{path} is no readable image ({error})") from error


def read_array(path: Path, ndim: int) -> Array:
    """A .npy file of floats with `ndim` dimensions, as float32."""
    try:
        # Memory-mapped: a header that promises more than the file holds is then an error, not an
        # allocation.
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy reads a header as Python's text, which fails in many ways
        raise DataError(f"{path} cannot be read as .npy ({error}): unpack it again") from error
    if not isinstance(array, Array):
        raise DataError(f"{path} is an .npz in truth: expected one array")
    if array.ndim != ndim or array.dtype.kind != "f" or not array.size:
        raise DataError(f"{path} holds {array.dtype} {array.shape}: expected {ndim}-d floats")
    return np.array(array, dtype=np.float32)


def read_nyud_semseg(path: Path) -> Array:
    """On disk 0 = unlabelled, 1…40 → int64 (H,W) with 0…39, 255 = ignore."""
    label = read_pixels(path, "L").astype(np.int64)
    if label.max() > len(NYUD_CLASSES):
        raise DataError(f"{path} holds class {label.max()}: NYUD-v2 has 1…40, and 0 for unlabelled")
    return np.where(label == 0, IGNORE_INDEX, label - 1)


def read_depth(path: Path) -> Array:
    """Metres → float32 (1,H,W); what is not a positive finite number becomes 0 = invalid."""
    depth = read_array(path, ndim=2)
    depth = np.where(np.isfinite(depth) & (depth > 0), depth, np.float32(0))[None]
    if depth.max() > 100:
        raise DataError(f"{path} holds {depth.max():.4g} metres: is it in millimetres?")
    return depth


def read_normals(path: Path) -> Array:
    """.npy (H,W,3) in -1…1, or 8-bit .png with n = 2v/255 - 1 → float32 (3,H,W), unit or zero.

    Eight bits have no exact zero, 127 and 128 are ±0.004, and resampled archives have short vectors
    along edges. So anything shorter than 0.5 is invalid, and the rest is brought to length 1.
    """
    if path.suffix == ".png":
        normals = read_pixels(path, "RGB").astype(np.float32) * (2 / 255) - 1
    else:
        normals = read_array(path, ndim=3)
        normals[~(np.abs(normals) < 2)] = 0  # also what is not a number
    if normals.shape[2] != 3:
        raise DataError(f"{path} has {normals.shape[2]} channels: a normal has 3")
    normals = np.ascontiguousarray(normals.transpose(2, 0, 1))  # sums over x, y, z are fast then
    length = np.sqrt(np.square(normals).sum(axis=0))
    stored = length > 0.05
    if path.suffix == ".npy" and np.sum(stored & (np.abs(length - 1) > 0.05)) > 0.2 * stored.sum():
        raise DataError(f"{path} holds vectors that are not unit vectors: no map of normals")
    return np.where(length < 0.5, np.float32(0), normals / np.maximum(length, 1e-6))


def read_voc_semseg(path: Path) -> Array:
    """VOC class 0…20, 255 = ignore → int64 (H,W)."""
    label = read_pixels(path, "L").astype(np.int64)
    odd = label[(label >= len(VOC_CLASSES)) & (label != IGNORE_INDEX)]
    if odd.size:
        raise DataError(f"{path} holds class {odd[0]}: VOC has 0…20, and 255 for ignore")
    return label


def read_saliency(path: Path) -> Array:
    """8-bit, distilled from a saliency model → float32 (1,H,W), 1 where above one half."""
    saliency = read_pixels(path, "L")
    if saliency.max() == 1:
        raise DataError(f"{path} holds 0 and 1 only: saliency is expected as 0…255")
    return (saliency > 127.5).astype(np.float32)[None]


def read_part_objects(path: Path) -> list[tuple]:
    """PASCAL-Part's .mat → [(class index, mask (H,W) bool, [(part name, mask), …]), …]."""
    try:
        objects = []
        # MATLAB's [] arrives as an empty float array: ravel() makes it an empty loop.
        for thing in scipy.io.loadmat(path)["anno"][0, 0]["objects"].ravel():
            parts = [(str(p["part_name"].item()), p["mask"] > 0) for p in thing["parts"].ravel()]
            objects.append((int(thing["class_ind"].item()), thing["mask"] > 0, parts))
        return objects
    except NotImplementedError as error:
        raise DataError(f"{path} is of MATLAB 7.3: save it anew as version 7 (-v7)") from error
    except Exception as error:  # scipy's parser fails in a dozen ways on bytes that are not its own
        raise DataError(
            f"{path} cannot be read as a PASCAL-Part annotation ({type(error).__name__}: {error}): "
            "unpack it again"
        ) from error


def read_human_parts(path: Path, size: tuple[int, int]) -> Array:
    """PASCAL-Part's .mat → int64 (H,W): 0, 1…6 part, 255 = ignore; of `size` if it has no masks.

    Dogs have a "head" and a "torso" too: only the class index tells whose part it is. Without a
    single annotated person the whole image is ignored, since nobody has said where there are no
    people. If only some people have parts, the others count as background.
    """
    objects = read_part_objects(path)
    masks = [m for _, whole, parts in objects for m in [whole] + [mask for _, mask in parts]]
    sizes = {m.shape for m in masks}
    if len(sizes) > 1:
        raise DataError(f"{path} has masks of different sizes, {sorted(sizes)}")
    human = [part for index, _, parts in objects if index == PERSON for part in parts]
    unknown = sorted({name for name, _ in human} - PART_LABELS.keys())
    if unknown:
        raise DataError(f"{path} has human parts {unknown}: expected {' '.join(PART_LABELS)}")
    size = sizes.pop() if sizes else size
    label = np.full(size, 0 if human else IGNORE_INDEX, dtype=np.int64)
    for name, mask in human:
        label[mask] = PART_LABELS[name]
    return label


# ==================================================================================================
# Datasets
# ==================================================================================================


class DenseDataset(Dataset):
    """One split of a dataset on disk. NYUD and PASCAL below fill in what a dataset must say.

    root       folder of the archive
    split      "train" or "val" (what papers call the test set)
    tasks      names of the labels to read (default: all there are)
    transform  (sample, rng) → sample, applied before normalisation
    stems      take only these of the split
    seed       of the transform's random numbers. They depend on (seed, epoch, index) alone, not on
               the number of workers. Set `epoch` before every epoch.
    complete   False: leave missing files to the caller

    With skip_bad, the next image takes the place of one that cannot be read, and a sample says how
    many were passed over: "skipped".
    Raises DataError if the folder is no such archive, or any file that will be needed is missing.
    """

    lists: dict[str, str]  # "train" and "val", the test split → list of file stems below the root
    layouts: dict[str, dict[str, str]]  # archive → key → path; "a | b": b where there is no a
    readers: dict[str, Callable[[Path], Array]]  # task → reader
    classes: dict[str, tuple[str, ...]]  # task → class names, for `check` and --predict
    one_size: bool  # do all images have the same size?
    help: str  # what is expected below {root}
    unsupported: dict[str, str] = {}  # path with {} for a stem → what to say if this file exists

    def __init__(
        self, root, split, tasks=None, transform=None, stems=None, seed=0, complete=True
    ) -> None:
        self.root = Path(root)
        self.transform = transform
        self.seed = seed
        self.epoch = 0
        self.tasks = tuple(self.readers if tasks is None else tasks)
        self.resized = Counter()  # task → labels that were not quite of their image's size
        self.skip_bad = False
        self.stems = self.list_stems(root, split) if stems is None else stems
        self.layout = self.detect()
        missing = self.missing()
        if missing and complete:
            parts = [f"{k}: {len(f)} of {len(self)} (first: {f[0]})" for k, f in missing.items()]
            raise DataError(
                f"files missing from {self.root} (layout {self.layout}): {'; '.join(parts)}. "
                "Get the whole archive, or drop the task"
            )

    @classmethod
    def list_stems(cls, root: str | Path, split: str) -> list[str]:
        """The file stems of a split, in the order of the archive's list."""
        path = Path(root) / cls.lists[split]
        if not path.is_file():
            raise DataError(f"{path} not found; {cls.help.format(root=root)}")
        raw = path.read_bytes()
        # Windows' editors put a byte order mark in front.
        wide = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        stems = raw.decode("utf-16" if wide else "utf-8-sig", errors="replace").split()
        # A stem becomes part of a path: one like ../../x would lead out of the archive.
        bad = [s for s in stems if not s.replace("_", "").replace("-", "").isalnum()]
        if bad or not stems:
            found = f"it has the line {bad[0]!r}" if bad else "it is empty"
            raise DataError(f"{path} is no list of file stems: {found}")
        twice = [stem for stem, n in Counter(stems).items() if n > 1]
        if twice:
            raise DataError(f"{path} lists {len(twice)} stems twice, the first is {twice[0]}")
        return stems

    def detect(self) -> str:
        """Name of the archive: the layout of which most files are there."""
        for pattern, said in self.unsupported.items():
            if (self.root / pattern.format(self.stems[0])).is_file():
                raise DataError(f"{self.root} {said}")
        present = {}
        for name, files in self.layouts.items():
            paths = [self.path(key, stem, name) for key in files for stem in self.stems]
            present[name] = sum(p.is_file() for p in paths)
        best = max(present, key=present.get)
        if not present[best]:
            raise DataError(f"no images in {self.root}; {self.help.format(root=self.root)}")
        return best

    def path(self, key: str, stem: str, layout: str | None = None) -> Path:
        """The file of "image" or a task."""
        *first, last = self.layouts[layout or self.layout][key].split(" | ")
        paths = [self.root / pattern.format(stem) for pattern in first]
        return next((p for p in paths if p.is_file()), self.root / last.format(stem))

    def missing(self) -> dict[str, list[Path]]:
        """{key: files that are not there}, of the image and all tasks; {} where all are there."""
        keys = ("image", *self.tasks)
        paths = {key: [self.path(key, stem) for stem in self.stems] for key in keys}
        absent = {key: [p for p in files if not p.is_file()] for key, files in paths.items()}
        return {key: files for key, files in absent.items() if files}

    def intrinsics(self) -> tuple[float, float, float, float] | None:
        """(fx, fy, cx, cy) in pixels, to compare normals with depth; None where unknown."""
        return None

    def read(self, stem: str) -> dict:
        """All of one stem as tensors, the image in 0…1. DataError if sizes differ.

        Except by one or two pixels where images have many sizes: real archives of PASCAL-Context
        are like that. Such a label is brought to its image's size; `resized` counts them.
        """
        pixels = torch.from_numpy(read_pixels(self.path("image", stem), "RGB"))
        image = pixels.permute(2, 0, 1).contiguous() / 255
        size = tuple(image.shape[1:])
        sample = {"image": image, "name": stem, "size": torch.tensor(size)}
        for task in self.tasks:
            label = torch.from_numpy(self.read_label(task, stem, size))
            apart = max(abs(a - b) for a, b in zip(label.shape[-2:], size, strict=True))
            if apart > (0 if self.one_size else 2):
                raise DataError(
                    f"{self.path(task, stem)} is {tuple(label.shape[-2:])} pixels but its image is "
                    f"{size}: archives were mixed; unpack one into an empty folder"
                )
            self.resized[task] += apart > 0
            sample[task] = resize_label(label, size) if apart else label
        return sample

    def read_label(self, task: str, stem: str, size: tuple[int, int]) -> Array:
        return self.readers[task](self.path(task, stem))

    def __len__(self) -> int:
        return len(self.stems)

    def __getitem__(self, index: int) -> dict:
        others = (*self.stems[index + 1 :], *self.stems[:index]) if self.skip_bad else ()
        for skipped, stem in enumerate((self.stems[index], *others)):
            try:
                sample = self.read(stem)
                break
            except DataError as error:
                if skipped == len(others):
                    raise
                print(f"skipped: {error}", file=sys.stderr)
        if self.transform is not None:
            rng = np.random.default_rng((self.seed, self.epoch, index))
            sample = self.transform(sample, rng)
        sample = normalise(sample)
        return {**sample, "skipped": skipped} if self.skip_bad else sample


class NYUD(DenseDataset):
    """NYUD-v2, or rendered rooms. The code recognises the two archives by their files."""

    lists = {"train": "gt_sets/train.txt", "val": "gt_sets/val.txt"}
    layouts = {
        "NYUD_MT": {  # ASTMT, MTI-Net, MTFormer, MT-CP; 480x640
            "image": "images/{}.jpg", "semseg": "segmentation/{}.png",
            "depth": "depth/{}.npy", "normals": "normals/{}.npy",
        },
        "NYUDv2": {  # ATRC, InvPT, TaskPrompter, MTMamba; 425x560, the borders are cut
            "image": "images/{}.png", "semseg": "segmentation/{}.png",
            "depth": "depth/{}.npy", "normals": "normals/{}.png",
        },
    }  # fmt: skip
    readers = {"semseg": read_nyud_semseg, "depth": read_depth, "normals": read_normals}
    classes = {"semseg": NYUD_CLASSES}
    one_size = True
    help = """expected below {root}:
    gt_sets/train.txt  gt_sets/val.txt      one file stem a line (795 and 654 of them)
    images/STEM.jpg | .png                  RGB
    segmentation/STEM.png                   0 = unlabelled, 1…40
    depth/STEM.npy                          metres
    normals/STEM.npy | .png                 (.jpg and .npy in NYUD_MT, .png and .png in NYUDv2)
or made of the official file by: python data.py nyud --mat nyu_depth_v2_labeled.mat --out {root}
README.md, section "Real data", says where the two archives are described."""
    unsupported = dict.fromkeys(
        ("segmentation/{}.mat", "normals/{}.jpg"),
        "is the older NYUD_MT of ASTMT (labels as .mat, normals as .jpg), which is not supported: "
        "get the NYUD_MT that MTI-Net links (.png and .npy), or NYUDv2 of ATRC and InvPT",
    )

    def intrinsics(self) -> tuple[float, float, float, float]:
        height, width = image_size(self.path("image", self.stems[0]))
        if self.layout == "NYUDv2":
            # A crop, not another resolution. Its size suggests that it starts at row 45, column 40;
            # not verified on a real file.
            fx, fy, cx, cy = nyu_intrinsics(480, 640)
            return fx, fy, cx - 40, cy - 45
        return nyu_intrinsics(height, width)


class PASCAL(DenseDataset):
    """PASCAL-Context with PASCAL-Part and distilled saliency, or rendered figures."""

    lists = {"train": "ImageSets/Context/train.txt", "val": "ImageSets/Context/val.txt"}
    layouts = {
        "PASCAL_MT": {
            "image": "JPEGImages/{}.jpg",
            # VOC's own labels where an image has them: they are finer.
            "semseg": "semseg/VOC12/{}.png | semseg/pascal-context/{}.png",
            "human_parts": "human_parts/{}.mat",
            "sal": "sal_distill/{}.png",
        }
    }
    readers = {"semseg": read_voc_semseg, "human_parts": read_human_parts, "sal": read_saliency}
    classes = {"semseg": VOC_CLASSES, "human_parts": PART_CLASSES}
    one_size = False
    help = """expected below {root}:
    ImageSets/Context/train.txt  val.txt    one file stem a line (4998 and 5105 of them)
    JPEGImages/STEM.jpg                     RGB
    semseg/VOC12/STEM.png                   0…20, 255 = ignore; where it does not exist:
    semseg/pascal-context/STEM.png          the same
    human_parts/STEM.mat                    PASCAL-Part
    sal_distill/STEM.png                    8-bit saliency
README.md, section "Real data", says where the archive is described."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.cache = part_cache(self.root.resolve()) if "human_parts" in self.tasks else None

    def read_label(self, task: str, stem: str, size: tuple[int, int]) -> Array:
        if task != "human_parts":
            return super().read_label(task, stem, size)
        source = self.path("human_parts", stem)
        if self.cache is None:
            return read_human_parts(source, size)
        # Decoding thousands of .mat files is slow: a PNG is kept of each. It says what it was made
        # from. "Newer than the .mat" would not do: an archive gives its files their old dates back.
        cached = self.cache / f"{stem}.png"
        made_from = f"{source.stat().st_size} {source.stat().st_mtime_ns} {size} {PART_NAMES}"
        try:
            with Image.open(cached) as image:
                if image.info.get("source") == made_from:
                    return np.array(image).astype(np.int64)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            if cached.is_file():
                print(f"{cached} is made again ({error})", file=sys.stderr)
        label = read_human_parts(source, size)
        note = PngInfo()
        note.add_text("source", made_from)
        parts = Image.fromarray(label.astype(np.uint8))
        save(cached, lambda f: parts.save(f, "PNG", pnginfo=note))
        return label


@cache
def part_cache(root: Path) -> Path | None:
    """Where an archive's decoded part maps are kept; None, and a line that says so, if nowhere."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    own = user / "mtcp" / hashlib.sha256(str(root).encode()).hexdigest()[:16]
    for folder in (root / "human_parts_png", own):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
            return folder
        except OSError as error:
            reason = error
    print(f"human parts are decoded anew in every epoch: no cache ({reason})", file=sys.stderr)
    return None


class Figures(PASCAL):
    """The rendered stand-in: as PASCAL-Context, but all images have one size."""

    one_size = True


DATASETS = {"rooms": NYUD, "figures": Figures, "nyud": NYUD, "pascal": PASCAL}


def require_sound_splits(training: list[DenseDataset], test: DenseDataset) -> None:
    """DataError if an image is in a training split and in the test split, or if splits do not fit.

    Only the headers of images are read, so that this is done before anything else.
    """
    tested = set(test.stems)
    shared = [stem for d in training for stem in d.stems if stem in tested]
    if shared:
        raise DataError(
            f"{test.root}: {len(shared)} images are in the training list and in the test list, the "
            f"first is {shared[0]}: the test would be one of memory; get the lists again"
        )
    if not test.one_size:
        return
    if {d.layout for d in training} != {test.layout}:
        raise DataError(f"{test.root}: archives were mixed; unpack one into an empty folder")
    first = training[0].path("image", training[0].stems[0])
    expected = image_size(first)
    for d in (*training, test):
        for path in (d.path("image", stem) for stem in d.stems):
            if image_size(path) != expected:
                raise DataError(
                    f"{path} is {image_size(path)} pixels, but {first} is {expected}: archives "
                    "were mixed; unpack one into an empty folder"
                )


def image_size(path: Path) -> tuple[int, int]:
    """(H,W), from the file's header alone."""
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} is no readable image ({error}): unpack it again") from error


def hold_out(stems: list[str], share: float) -> tuple[list[str], list[str]]:
    """(training stems, held-out stems): the last `share`, to choose the best epoch by.

    The last ones and not random ones: neighbouring stems of NYUD-v2 are often of one room.
    """
    n = max(1, round(len(stems) * share))
    if n == len(stems):
        raise DataError("a training split of one image is too small: one chooses the best epoch")
    return stems[:-n], stems[-n:]


def save(path: Path, write: Callable) -> None:
    """write(file) into another file, then rename: `path` is whole, or as before, or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # what is left of a write that failed


def save_text(path: Path, text: str) -> None:
    save(path, lambda file: file.write(text.encode()))


# ==================================================================================================
# Joint transforms: pure functions on a sample, image in 0…1, before `normalise`
# ==================================================================================================


def each(sample: dict, image: Callable, label: Callable) -> dict:
    """image(x) for the image, label(row of LABELS, x) for every label; name and size stay."""
    keys = sample.keys() - {"image", "name", "size"}
    changed = {k: label(LABELS[k], sample[k]) for k in keys}
    return {**sample, "image": image(sample["image"]), **changed}


def nearest(x: Tensor, resample: Callable[[Tensor], Tensor]) -> Tensor:
    """Applies `resample` to a label as a float (1,C,H,W), whatever its shape and type are."""
    y = resample(x.reshape(1, -1, *x.shape[-2:]).float())
    return y.reshape(*x.shape[:-2], *y.shape[-2:]).to(x.dtype)


def resize_image(sample: dict, size: tuple[int, int]) -> dict:
    """Only the image, for evaluation: predictions are compared at the labels' resolution."""
    image = F.interpolate(sample["image"][None], size, mode="bilinear", antialias=True)
    return {**sample, "image": image[0].clamp(0, 1)}


def resize(sample: dict, size: tuple[int, int]) -> dict:
    """The whole picture at another size. Depth stays: another resolution, not another place."""
    return each(resize_image(sample, size), unchanged, lambda row, x: resize_label(x, size))


def resize_label(label: Tensor, size: tuple[int, int]) -> Tensor:
    return nearest(label, lambda x: F.interpolate(x, size, mode="nearest-exact"))


def zoom(sample: dict, scale: float) -> dict:
    """Enlarge by `scale` ≥ 1 about the centre, at constant size. Depth: see `divide_depth`."""
    if scale == 1:
        return sample
    H, W = sample["image"].shape[-2:]
    h = round(H * scale)
    w = round(W * scale)
    top = (h - H) // 2
    left = (w - W) // 2

    def cut(x: Tensor) -> Tensor:
        return x[..., top : top + H, left : left + W]

    return each(resize(sample, (h, w)), cut, lambda row, x: row.zoomed(cut(x), scale))


def flip(sample: dict) -> dict:
    """Mirror left and right. Normals: see `mirror_normals`."""
    return each(sample, lambda x: x.flip(-1), lambda row, x: row.mirrored(x.flip(-1)))


def rotate(sample: dict, degrees: float, scale: float = 1.0) -> dict:
    """Turn anticlockwise and enlarge by `scale` about the centre, at constant size.

    Pixels from outside the image get the label `outside`. See `divide_depth` and `turn_normals`.
    """
    H, W = sample["image"].shape[-2:]
    cos = math.cos(math.radians(degrees))
    sin = math.sin(math.radians(degrees))
    # For each pixel of the result, where it was. grid_sample counts -1…1 along both sides, so H/W
    # undoes the aspect ratio.
    matrix = torch.tensor([[[cos, -sin * H / W, 0], [sin * W / H, cos, 0]]]) / scale
    grid = F.affine_grid(matrix, (1, 1, H, W), align_corners=False)
    outside = (grid.abs() > 1).any(dim=-1)[0]  # (H,W)

    def image(x: Tensor) -> Tensor:  # the mean outside: it becomes 0 after normalisation
        return F.grid_sample((x - MEAN)[None], grid, align_corners=False)[0] + MEAN

    def label(row: Label, x: Tensor) -> Tensor:
        y = nearest(x, lambda y: F.grid_sample(y, grid, mode="nearest", align_corners=False))
        return row.zoomed(row.turned(y, degrees), scale).masked_fill(outside, row.outside)

    return each(sample, image, label)


def colour_jitter(sample: dict, brightness: float, contrast: float, saturation: float) -> dict:
    """Brightness multiplies, contrast stretches about the mean, saturation about the grey."""
    image = sample["image"] * brightness
    image = image.mean() + contrast * (image - image.mean())
    grey = image.mean(dim=0, keepdim=True)
    return {**sample, "image": (grey + saturation * (image - grey)).clamp(0, 1)}


def normalise(sample: dict) -> dict:
    return {**sample, "image": (sample["image"] - MEAN) / STD}


def augment(sample: dict, rng, scales: tuple, degrees: float, jitter: float, size) -> dict:
    """The training transform.

    degrees = 0: zooms by one of `scales`. Otherwise rotates by up to ±degrees, and scales by
    anything from the first to the last of them. Then flips half of the time, jitters colours, and
    resizes to `size` (H,W) unless that is None.
    """
    if degrees > 0:
        sample = rotate(sample, rng.uniform(-degrees, degrees), rng.uniform(scales[0], scales[-1]))
    else:
        sample = zoom(sample, rng.choice(scales))
    if rng.random() < 0.5:
        sample = flip(sample)
    if jitter > 0:
        sample = colour_jitter(sample, *rng.uniform(1 - jitter, 1 + jitter, 3))
    return sample if size is None else resize(sample, size)


def make_loader(
    dataset: Dataset, batch_size: int, shuffle: bool, seed: int, workers: int,
    rank: int = 0, processes: int = 1, accumulate: int = 1,
) -> DataLoader:  # fmt: skip
    """Batches of samples; the order of a shuffled epoch depends on `seed` alone.

    Each of several processes gets every `processes`-th batch, from number `rank` on. A shuffled
    epoch has whole steps only, of processes · accumulate batches of one size. The few images that
    are left over are others in each epoch. DataError if there is not a single step.
    """
    generator = torch.Generator().manual_seed(seed)
    order = RandomSampler(dataset, generator=generator) if shuffle else range(len(dataset))
    batches = BatchSampler(order, batch_size, drop_last=shuffle and len(dataset) >= batch_size)
    step = processes * accumulate if shuffle else 1
    if len(batches) < step:
        raise DataError(
            f"{len(dataset)} images are too few for a step of {step} x {batch_size}: take a "
            "smaller --batch-size, or fewer processes"
        )
    whole_steps = range(len(batches) - len(batches) % step)
    return DataLoader(
        dataset,
        batch_sampler=Share(batches, whole_steps[rank::processes]),
        num_workers=workers,
        generator=generator,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=die_quietly,
    )


class Share:
    """Of all batches those with the given numbers, a range."""

    def __init__(self, batches: BatchSampler, numbers: range):
        self.batches = batches
        self.numbers = numbers

    def __iter__(self) -> Iterator[list[int]]:
        return islice(self.batches, self.numbers.start, self.numbers.stop, self.numbers.step)

    def __len__(self) -> int:
        return len(self.numbers)


def die_quietly(worker: int) -> None:
    """A worker does not inherit what its parent does on SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


# ==================================================================================================
# Geometry: normals and depth of one scene, compared
# ==================================================================================================


def normals_from_depth(depth: Tensor, intrinsics: tuple[float, float, float, float]) -> Tensor:
    """depth (B,1,H,W) in metres, (fx, fy, cx, cy) in pixels → unit normals (B,3,H,W).

    Each pixel is lifted to X = ((u - cx)/fx, 1, -(v - cy)/fy) · depth: right, forward, up. The
    normal is the cross product of the differences of X between left and right and between above and
    below, turned towards the camera.
    """
    fx, fy, cx, cy = intrinsics
    H, W = depth.shape[-2:]
    u = (torch.arange(W, device=depth.device) - cx) / fx
    v = -(torch.arange(H, device=depth.device) - cy) / fy
    one = torch.ones(H, W, device=depth.device)
    ray = torch.stack([u.expand(H, W), one, v[:, None].expand(H, W)])
    X = F.pad(ray * depth, (1, 1, 1, 1), mode="replicate")  # (B,3,H+2,W+2)
    across = X[..., 1:-1, 2:] - X[..., 1:-1, :-2]
    down = X[..., 2:, 1:-1] - X[..., :-2, 1:-1]
    n = cross(across, down)
    towards = -torch.sign((n * ray).sum(dim=1, keepdim=True))
    return n * towards / length(n).clamp(min=1e-12)


def length(x: Tensor) -> Tensor:
    """(B,C,H,W) → (B,1,H,W). torch's norm takes far longer over a dimension but the last."""
    return x.square().sum(dim=1, keepdim=True).sqrt()


def cross(a: Tensor, b: Tensor) -> Tensor:
    """(B,3,H,W) twice → a × b, (B,3,H,W). As for `length`, torch's own is slow here."""
    x, y, z = a.unbind(1)
    u, v, w = b.unbind(1)
    return torch.stack([y * w - z * v, z * u - x * w, x * v - y * u], dim=1)


def angle_between(a: Tensor, b: Tensor) -> Tensor:
    """Unit vectors (B,3,H,W) twice → degrees (B,H,W)."""
    # atan2 of |a×b| and a·b: the arc cosine of a dot product next to 1 has lost its digits.
    return torch.rad2deg(torch.atan2(length(cross(a, b))[:, 0], (a * b).sum(dim=1)))


def smooth_surface(depth: Tensor, normals: Tensor) -> Tensor:
    """(B,1,H,W), (B,3,H,W) → bool (B,H,W), False along the border.

    In 3x3 pixels all are valid, depth changes by less than 5 % and normals by less than about 10°.
    """
    largest = F.max_pool2d(depth, 3, 1)
    smallest = -F.max_pool2d(-depth, 3, 1)
    flat = (smallest > 0) & (largest < 1.05 * smallest)
    # Nine unit vectors within 5° of a common direction have a mean at least cos 5° long.
    mean = length(F.avg_pool2d(normals, 3, 1))
    return F.pad(flat & (mean > math.cos(math.radians(5))), (1, 1, 1, 1))[:, 0]


# ==================================================================================================
# Check: python data.py check
# ==================================================================================================


def check(kind: type[DenseDataset], root: Path, sheet: Path) -> int:
    """Reads every file of both splits, prints what is there; returns the number of problems."""
    problems = []
    rows = []  # of the contact sheet
    fit = torch.zeros(3, 3)  # see normals_and_depth
    splits = [kind(root, split, complete=False) for split in ("train", "val")]
    if all("image" not in d.missing() for d in splits):
        try:
            require_sound_splits(splits[:1], splits[1])
        except DataError as error:
            problems.append(str(error))
    for dataset, split in zip(splits, ("train", "val"), strict=True):
        problems += check_split(dataset, split, rows, fit)
    axes = axes_of_normals(fit)
    if axes != AXES:
        found = f"their axes seem to be {', '.join(axes)}; expected {', '.join(AXES)}"
        problems.append(f"normals do not fit the depth: {found}")
    print("\n".join(f"PROBLEM {p}" for p in problems) or "no problems")
    if rows:
        try:
            sheet.parent.mkdir(parents=True, exist_ok=True)
            contact_sheet(["image", *kind.readers], rows).save(sheet)
        except (OSError, ValueError) as error:
            raise DataError(f"--sheet {sheet} cannot be written ({error})") from error
        print(f"a few samples: {sheet}")
    return len(problems)


def check_split(dataset: DenseDataset, split: str, rows: list, fit: Tensor) -> list[str]:
    """The problems of one split. Adds to `rows` and to `fit`."""
    print(f"{split}: {len(dataset)} stems, layout {dataset.layout}")
    missing = dataset.missing()
    problems = [
        f"{split} {key}: {len(files)} of {len(dataset)} files missing, the first is {files[0]}"
        for key, files in missing.items()
    ]
    absent = {path.stem for files in missing.values() for path in files}
    stems = [s for s in dataset.stems if s not in absent]
    seen = {task: Seen() for task in dataset.tasks}
    unreadable = {}  # what is said, without what differs from file to file → the first, number
    for i, stem in enumerate(tqdm(stems, desc=f"reading {split}", disable=None)):
        try:
            sample = dataset.read(stem)
            if i % max(1, len(stems) // 50) == 0:
                fit += normals_and_depth(sample, dataset)
        except DataError as error:
            same = re.sub(r"\d[\d.]*", "", str(error).replace(stem, ""))
            first, n = unreadable.get(same, (str(error), 0))
            unreadable[same] = (first, n + 1)
            continue
        for task in dataset.tasks:
            seen[task].add(sample[task], LABELS[task].valid(sample[task]))
        if i % max(1, len(stems) // 2) == 0:
            sample = normalise(sample)
            rows.append([picture(k, sample[k]) for k in ("image", *dataset.tasks)])
    for first, n in unreadable.values():
        problems.append(first + (f" (and {n - 1} more files like it)" if n > 1 else ""))
    for task in dataset.tasks:
        print(f"  {task}: {seen[task].describe(dataset.classes.get(task))}")
        if dataset.resized[task]:
            print(f"    {dataset.resized[task]} labels a pixel or two off their image's size")
        if not seen[task].valid:
            problems.append(f"{split} {task}: not one valid pixel")
    return problems


AXES = ("right", "forward", "up")
OPPOSITE = {"right": "left", "forward": "towards the camera", "up": "down"}


def normals_and_depth(sample: dict, dataset: DenseDataset) -> Tensor:
    """(3,3): mean product of axis i of the depth's normals and channel j of the normals; or 0."""
    if not {"depth", "normals"} <= sample.keys():
        return torch.zeros(3, 3)
    try:
        intrinsics = dataset.intrinsics()
    except DataError:  # of the first image, which gives the size: named when it is read itself
        intrinsics = None
    if intrinsics is None:
        return torch.zeros(3, 3)
    # At about 128 pixels a row: between neighbours of a real sensor's pixels there is mostly noise.
    k = max(1, sample["depth"].shape[-1] // 128)
    fx, fy, cx, cy = intrinsics
    intrinsics = (fx / k, fy / k, (cx + 0.5) / k - 0.5, (cy + 0.5) / k - 0.5)
    depth = F.avg_pool2d(sample["depth"][None], k)
    normals = F.avg_pool2d(sample["normals"][None], k)
    smooth = smooth_surface(depth, normals)
    a, b = (n.movedim(1, -1)[smooth] for n in (normals_from_depth(depth, intrinsics), normals))
    return a.mT @ b / max(1, len(a))


def axes_of_normals(fit: Tensor) -> tuple[str, ...]:
    """What the channels of normals must be to fit the depth best; `fit`: see normals_and_depth."""

    def cosine(order: tuple, signs: tuple) -> float:  # the mean over pixels, up to a factor
        return (fit[range(3), order] * torch.tensor(signs)).sum().item()

    choices = list(product(permutations(range(3)), product((1, -1), repeat=3)))
    order, signs = max(choices, key=lambda choice: cosine(*choice))
    if cosine(order, signs) < 1.05 * cosine((0, 1, 2), (1, 1, 1)):  # no better than by chance
        return AXES
    named = {j: AXES[i] if signs[i] > 0 else OPPOSITE[AXES[i]] for i, j in enumerate(order)}
    return tuple(named[j] for j in range(3))


class Seen:
    """What `check` has seen of one task: numbers of pixels, the range, how often which class."""

    def __init__(self):
        self.pixels = 0
        self.valid = 0
        self.range = (math.inf, -math.inf)
        self.values = 0
        self.total = 0.0
        self.histogram = torch.zeros(256, dtype=torch.int64)

    def add(self, label: Tensor, valid: Tensor) -> None:
        values = label[..., valid]
        self.pixels += valid.numel()
        self.valid += valid.sum().item()
        if values.numel():
            low, high = (v.item() for v in values.aminmax())
            self.range = (min(self.range[0], low), max(self.range[1], high))
            self.values += values.numel()
            self.total += values.double().sum().item()
        if label.dtype == torch.int64:
            self.histogram += torch.bincount(values, minlength=256)

    def describe(self, classes: tuple[str, ...] | None) -> str:
        share = self.valid / max(self.pixels, 1)
        lines = [f"{share:.1%} of the pixels valid"]
        if self.valid:
            low, high = self.range
            lines[0] += f", values {low:.4g} to {high:.4g}"
            lines[0] += "" if classes else f", mean {self.total / self.values:.4g}"
        for c in self.histogram.nonzero().flatten().tolist() if classes else []:
            lines.append(f"    {c:3d} {classes[c]:16s} {self.histogram[c] / self.valid:7.2%}")
        return "\n".join(lines)


# ==================================================================================================
# The rendered world, a stand-in for both datasets: rooms with furniture and people
#
#   (seed, index) → furnish → Solids, lights, camera              the scene, whatever the image size
#   rays (N, 3) → first_hit → surface → illuminate → photograph   the picture, N = H·W, in chunks
#
# One scene has all labels: classes of both datasets, depth, normals, human parts, saliency. The set
# `rooms` writes it as NYUD_MT, `figures` as PASCAL_MT; they differ in what is wished for in a room.
#
# Lengths are in metres. The world has x right, y towards the far wall, z up, and its origin on
# the floor in the near left corner. The camera has x right, y forward, z up, as NYUD_MT's normals.
# Shape, place and layout tell the classes apart: paints come from one pool, colour says little.
# ==================================================================================================


@dataclass(frozen=True)
class Paint:
    """A procedural texture: pattern(u, v) in [0, 1] mixes two colours."""

    pattern: str  # a key of PATTERNS
    colours: Array  # (2, 3) linear RGB
    scale: float  # pattern periods a metre
    salt: int  # keeps the noise of two paints apart
    glow: float  # above 0: shines with this multiple of its colour, whatever light falls on it


@dataclass(frozen=True)
class Solid:
    """The unit box [-1, 1]³, ball or drum (upright cylinder): scaled, turned, moved."""

    shape: str  # a key of SPANS
    paint: Paint
    centre: Array  # (3,)
    half: Array  # (3,) half extents along its own axes
    axes: Array = field(default_factory=lambda: np.eye(3))  # (3, 3) its axes as columns
    part: str = ""  # PASCAL-Part's name for it, on people and dogs
    glass: bool = False  # a depth sensor looks through it: neither depth nor normal
    owner: int = 0  # which piece it belongs to, set by `furnish`

    def moved(self, turned: Array, shift: Array) -> "Solid":
        return replace(self, centre=turned @ self.centre + shift, axes=turned @ self.axes)


def bounds(solids: list[Solid]) -> tuple[Array, Array]:
    """Lowest and highest (x, y, z) of a box around all of them."""
    reach = [np.abs(s.axes) @ s.half for s in solids]
    centre = [s.centre for s in solids]
    return np.subtract(centre, reach).min(0), np.add(centre, reach).max(0)


# --- Textures -------------------------------------------------------------------------------------


def hashed(i: Array, j: Array, salt: int) -> Array:
    """Noise in [0, 1) at whole-numbered cells. The popular sine hash differs between machines."""
    i = np.asarray(i).astype(np.int64).astype(np.uint32)  # float → uint32 is undefined below 0
    j = np.asarray(j).astype(np.int64).astype(np.uint32)
    h = i * np.uint32(0x9E3779B1) ^ j * np.uint32(0x85EBCA77) + np.uint32(salt)
    h = (h ^ h >> 15) * np.uint32(0x2C1B3C6D)
    h = (h ^ h >> 12) * np.uint32(0x297A2D39)
    return (h ^ h >> 15) / 2.0**32


def blotches(u: Array, v: Array, salt: int) -> Array:
    """Cell noise, linearly interpolated."""
    i = np.floor(u)
    j = np.floor(v)
    a = u - i
    below = (1 - a) * hashed(i, j, salt) + a * hashed(i + 1, j, salt)
    above = (1 - a) * hashed(i, j + 1, salt) + a * hashed(i + 1, j + 1, salt)
    return below + (v - j) * (above - below)


PATTERNS = {  # (u, v) in periods, salt → [0, 1]
    "plain": lambda u, v, salt: 0.3 * blotches(u / 2, v / 2, salt),
    "carpet": lambda u, v, salt: blotches(3 * u, 3 * v, salt),
    "stripes": lambda u, v, salt: (u % 1 < 0.5) * 1.0,
    "checks": lambda u, v, salt: (np.floor(u) + np.floor(v)) % 2,
    "dots": lambda u, v, salt: (np.hypot(u % 1 - 0.5, v % 1 - 0.5) < 0.3) * 1.0,
    "grain": lambda u, v, salt: 0.5 + 0.5 * np.sin(2 * np.pi * (u + 2 * blotches(u, v / 4, salt))),
    "planks": lambda u, v, salt: hashed(np.floor(u), np.floor(v / 6 + u // 1 * 0.37), salt),
    "spines": lambda u, v, salt: hashed(np.floor(u), 0, salt),  # books side by side
    "mosaic": lambda u, v, salt: hashed(np.floor(u), np.floor(v), salt),
    "blotches": blotches,
}  # fmt: skip

ANY = ("plain", "plain", "carpet", "stripes", "checks", "dots", "grain", "grain")
PAINTS = {  # name → patterns, periods a metre, contrast: 0 one colour, 1 two unrelated colours
    "any": (ANY, (2, 7), 0.5),
    "other": (ANY, (2, 7), 0.5),
    "hair": (ANY, (2, 7), 0.5),
    "plain": (("plain",), (2, 7), 0.5),
    "canvas": (("blotches", "mosaic", "stripes"), (5, 10), 1.0),
    "books": (("spines",), (11, 16), 1.0),
    "sky": (("blotches", "plain"), (0.5, 2), 0.4),
    "shade": (("plain",), (2, 7), 0.2),
    "screen": (("plain", "blotches"), (2, 4), 0.5),
    "wall": (("plain", "plain", "stripes", "dots", "checks"), (1.5, 4), 0.25),
    "floor": (("planks", "checks", "carpet", "grain", "plain"), (2, 7), 0.35),
    "ceiling": (("plain",), (2, 7), 0.2),
}
GLOWS = {"sky": (0.15, 0.8, 1.1, 1.5), "shade": (0, 0.7, 1.0, 1.4), "screen": (0, 0, 0.7, 1.0)}


def draw_paint(rng, name: str, hue: float) -> Paint:
    """A random paint of this name. Its colours are near `hue` in four cases of five."""
    patterns, scale, contrast = PAINTS[name]
    hues = [rng.normal(hue, 0.05) if rng.random() < 0.8 else rng.random() for _ in range(2)]
    hsv = [(h % 1, rng.beta(1.5, 2.5), rng.uniform(0.15, 0.9)) for h in hues]
    colours = np.array([colorsys.hsv_to_rgb(*c) for c in hsv])
    colours[1] = colours[0] + contrast * (colours[1] - colours[0])
    glow = rng.choice(GLOWS.get(name, (0,)))
    if glow > 0:  # from a night sky to glare, so that brightness is a hint and no proof
        colours = 0.55 + 0.45 * colours
    return Paint(rng.choice(patterns), colours, rng.uniform(*scale), int(rng.integers(2**31)), glow)


def albedo(paint: Paint, u: Array, v: Array) -> Array:
    """(N,) surface coordinates in metres → (N, 3) linear RGB."""
    share = PATTERNS[paint.pattern](u * paint.scale, v * paint.scale, paint.salt)[:, None]
    return (1 - share) * paint.colours[0] + share * paint.colours[1]


# --- Furniture ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """What can stand in a room: a size that is drawn, and parts that share in it.

    A part is a shape, a paint, and from where to where it reaches along x, y and z, in hundredths
    of the size: x from -100 to 100, y from 0 at the back to 100 at the front, z from 0 at the
    bottom to 100 at the top. A paint named twice is one paint. "?": left out half of the time.
    """

    nyud: str  # its class in NYUD-v2
    voc: str  # its class in VOC, where most furniture is background
    at_wall: bool  # its back to a wall, or anywhere, turned freely
    low: tuple[float, ...]  # smallest half width, depth, height, and bottom above the floor
    high: tuple[float, ...]  # largest
    parts: str


PIECES = {
    "door": Piece("door", "background", True, (0.45, 0.1, 2.0, 0), (0.6, 0.1, 2.2, 0), """
        box any -100 100 0 30 0 100 | box other -84 84 0 50 0 96 | ball any 62 76 40 120 46 51 |
        ?box plain -60 60 0 55 56 88 | ?box plain -60 60 0 55 8 40"""),
    "window": Piece("window", "background", True, (0.45, 0.08, 0.9, 0.8), (0.8, 0.08, 1.3, 1.0), """
        box plain -100 100 0 80 0 100 | box sky -93 -4 0 90 5 52 | box sky 4 93 0 90 5 52 |
        box sky -93 -4 0 90 58 95 | box sky 4 93 0 90 58 95"""),
    "picture": Piece("picture", "background", True, (0.25, 0.05, 0.4, 1.2), (0.6, 0.05, 0.8, 1.5),
        """
        box plain -100 100 0 80 0 100 | box canvas -85 85 0 90 12 88"""),
    "cabinet": Piece("cabinet", "background", True, (0.4, 0.4, 0.75, 0), (0.75, 0.55, 1.9, 0), """
        box any -95 95 0 85 0 8 | box any -100 100 0 92 6 97 | box other -100 100 0 100 96 100 |
        box other -95 -3 0 94 55 92 | box other 3 95 0 94 55 92 | box other -95 -3 0 94 10 51 |
        box other 3 95 0 94 10 51"""),
    "bookshelf": Piece("bookshelf", "background", True, (0.4, 0.28, 1.4, 0), (0.7, 0.36, 2, 0), """
        box any -100 100 0 6 0 100 | box any -100 -94 0 100 0 100 | box any 94 100 0 100 0 100 |
        box any -100 100 0 100 2 5 | box any -100 100 0 100 26 29 | box any -100 100 0 100 50 53 |
        box any -100 100 0 100 74 77 | box any -100 100 0 100 97 100 |
        box books -90 50 0 80 5 21 | ?box books -60 90 0 85 29 45 | box books -90 90 0 75 53 68 |
        ?box books -90 20 0 80 77 92"""),
    "bed": Piece("bed", "background", True, (0.5, 1.9, 0.75, 0), (0.85, 2.1, 1.15, 0), """
        box any -100 100 0 4 0 100 | box any -100 100 0 100 10 28 | box plain -97 97 0 99 28 50 |
        box other -100 100 40 100 25 55 | ball plain -85 -10 6 27 45 65 |
        ?ball plain 10 85 6 27 45 65"""),
    "sofa": Piece("sofa", "sofa", True, (0.7, 0.8, 0.75, 0), (1.05, 0.95, 0.95, 0), """
        box any -100 100 0 95 7 33 | box any -100 100 0 25 7 100 | box any -100 -78 0 100 7 64 |
        box any 78 100 0 100 7 64 | box other -77 -1 20 98 33 50 | box other 1 77 20 98 33 50"""),
    "table": Piece("table", "diningtable", False, (0.5, 0.7, 0.55, 0), (0.85, 1.0, 0.78, 0), """
        box any -100 100 0 100 90 100 | box plain -95 -85 5 15 0 90 | box plain 85 95 5 15 0 90 |
        box plain -95 -85 85 95 0 90 | box plain 85 95 85 95 0 90"""),
    "round table": Piece("table", "diningtable", False, (0.4, 0.8, 0.5, 0), (0.6, 1.2, 0.8, 0), """
        drum any -100 100 0 100 92 100 | drum plain -12 12 44 56 5 92 |
        drum plain -50 50 25 75 0 5"""),
    "chair": Piece("chair", "chair", False, (0.22, 0.45, 0.85, 0), (0.28, 0.55, 1.1, 0), """
        box any -100 100 0 100 45 51 | box any -100 -85 0 10 0 100 | box any 85 100 0 10 0 100 |
        box any -100 -85 90 100 0 45 | box any 85 100 90 100 0 45 | box other -85 85 2 9 82 98 |
        ?box other -85 85 2 9 62 80"""),
    "lamp": Piece("lamp", "background", False, (0.17, 0.34, 1.4, 0), (0.26, 0.52, 2.0, 0), """
        drum plain -80 80 10 90 0 3 | drum plain -12 12 44 56 3 75 |
        ball shade -100 100 0 100 72 100"""),
    "television": Piece("television", "tvmonitor", True, (0.4, 0.4, 1, 0), (0.7, 0.5, 1.3, 0), """
        box other -90 90 0 100 0 40 | box plain -20 20 40 60 40 46 |
        box plain -100 100 45 55 45 100 | box screen -94 94 45 57 48 97"""),
    "plant": Piece("other prop", "pottedplant", False, (0.28, 0.56, 0.8, 0), (0.4, 0.8, 1.3, 0), """
        drum other -50 50 25 75 0 30 | drum plain -8 8 46 54 30 70 | ball any -90 10 10 60 35 75 |
        ball any -10 100 20 80 40 80 | ball any -60 30 40 100 45 85 |
        ball any -50 50 0 70 60 100"""),
    "dog": Piece("other prop", "dog", False, (0.13, 0.9, 0.5, 0), (0.17, 1.2, 0.75, 0), """
        ball any -90 90 12 78 40 82 torso | ball any -80 80 68 98 62 100 head |
        ball plain -40 40 88 110 64 82 muzzle | ball any -80 -30 15 27 0 60 rbleg |
        ball any 30 80 15 27 0 60 lbleg | ball any -80 -30 62 74 0 60 rfleg |
        ball any 30 80 62 74 0 60 lfleg | ball any -20 20 -12 20 60 85 tail"""),
    "person": Piece("person", "person", False, (0.45, 0.45, 1.5, 0), (0.55, 0.6, 1.95, 0), """
        ball any -40 40 23 77 48 86 torso | ball other -35 35 24 76 43 59 torso |
        ball plain -13 13 37 63 77 90 neck | ball plain -20 20 32 80 84 100 head |
        ball hair -23 23 25 68 86 102 hair | ball plain -4 4 75 84 90 94 nose"""),
}  # fmt: skip


HUES = {name: i / 18 for i, name in enumerate(("wall", "floor", "ceiling", *PIECES))}  # favourites


def build_piece(rng, name: str) -> list[Solid]:
    """A piece around the origin of the floor, its back at y = 0 and its front towards -y."""
    half_width, depth, height, bottom = rng.uniform(PIECES[name].low, PIECES[name].high)
    unit = np.array([half_width, -depth, height]) / 100
    paints = {}
    solids = []
    for part in PIECES[name].parts.split("|"):
        shape, paint, *span = part.split()
        if paint not in paints:
            paints[paint] = draw_paint(rng, paint, HUES[name])
        if shape[0] == "?" and rng.random() < 0.5:
            continue
        ends = np.array(span[:6], float).reshape(3, 2).T * unit + [0, 0, bottom]
        half = np.abs(ends[1] - ends[0]) / 2
        solid = Solid(shape.lstrip("?"), paints[paint], ends.mean(0), half, part="".join(span[6:]))
        solids.append(replace(solid, glass=paint == "sky" and solid.paint.salt % 3 == 0))
    return solids


# --- People: balls, stretched and turned ----------------------------------------------------------

# Bones: PASCAL-Part's name, length and radius as shares of the height.
ARM = (("uarm", 0.17, 0.037), ("larm", 0.15, 0.03), ("hand", 0.07, 0.03))
LEG = (("uleg", 0.25, 0.055), ("lleg", 0.24, 0.04), ("foot", 0.12, 0.032))


def build_limb(start, side: int, bones: tuple, paints: tuple, swings: tuple, spread: float) -> list:
    """A chain of balls from `start`; side: +1 is the person's left, at positive x.

    Swing turns a bone forwards from hanging straight down, spread turns it away from the body.
    """
    solids = []
    for (part, length, radius), paint, swing in zip(bones, paints, swings, strict=True):
        outward = side * np.cos(swing) * np.sin(spread)
        along = np.array([outward, -np.sin(swing), -np.cos(swing) * np.cos(spread)])
        across = np.cross(along, [1, 0.01, 0])
        across /= np.linalg.norm(across)
        axes = np.stack([np.cross(across, along), across, along], axis=1)
        half = np.array([radius, radius, length / 2 + 0.4 * radius])  # overlaps at the joints
        part = "rl"[side > 0] + part
        solids.append(Solid("ball", paint, start + along * length / 2, half, axes, part))
        start = start + length * along
    return solids


def build_person(rng) -> list[Solid]:
    """Someone who stands or walks, facing -y. Elbows bend forwards only, knees backwards only."""
    trunk = build_piece(rng, "person")
    height = bounds(trunk)[1][2]
    top, trousers, skin = (trunk[k].paint for k in (0, 1, 2))
    sleeve = skin if rng.random() < 0.5 else top
    shin = skin if rng.random() < 0.3 else trousers
    solids = []
    for side in (-1, 1):
        swing = rng.uniform(-0.7, 1.2)
        elbow = swing + rng.uniform(0, 1.6)
        spread = rng.uniform(0.1, 2.6 if rng.random() < 0.25 else 0.6)
        shoulder = np.array([0.115 * side, -0.15, 0.8])
        paints = (top, sleeve, skin)
        solids += build_limb(shoulder, side, ARM, paints, (swing, elbow, elbow), spread)
        swing = rng.uniform(-0.5, 0.7)
        knee = swing - rng.uniform(0, 0.8)
        spread = rng.uniform(0, 0.25)
        hip = np.array([0.055 * side, -0.15, 0.51])
        paints = (trousers, shin, trunk[4].paint)
        solids += build_limb(hip, side, LEG, paints, (swing, knee, knee + 1.3), spread)
    solids = [replace(s, centre=s.centre * height, half=s.half * height) for s in solids] + trunk
    floor = bounds(solids)[0][2]
    solids = [s.moved(np.eye(3), np.array([0, 0, -floor])) for s in solids]
    # PASCAL-Part leaves some people out.
    return solids if rng.random() > 0.1 else [replace(s, part="") for s in solids]


# --- The scene ------------------------------------------------------------------------------------

ROOMS = {  # the smallest and the largest room, (width, depth, height); what is put in, how often
    "rooms": ((3, 3, 2.5), (5, 7, 2.7), "door .7, bed .5, sofa .6, cabinet .7, bookshelf .7, "
              "window .8, table .5, round table .2, picture .7, chair .4, lamp .5, person .3, "
              "picture .4"),
    "figures": ((3, 3, 2.5), (4.5, 4.5, 2.7), "person .75, person .5, sofa .5, television .5, "
                "chair .6, dog .5, person .25, plant .5, table .5, chair .3, picture .5, door .3"),
}  # fmt: skip
# Rays at once: 100 solids x 3 x 2048 float32 fit the cache, whatever the image size.
RAY_CHUNK = 2048


def nyu_intrinsics(height: int, width: int) -> tuple[float, float, float, float]:
    """(fx, fy, cx, cy) of NYU's Kinect at 480x640, scaled to the image.

    Pixel centres lie at whole numbers, the border at -0.5: resizing scales cx + 0.5, not cx.
    """
    sx = width / 640
    sy = height / 480
    return 518.86 * sx, 519.47 * sy, (325.58 + 0.5) * sx - 0.5, (253.74 + 0.5) * sy - 0.5


def turn(yaw: float) -> Array:
    """(3, 3) rotation about z, anticlockwise seen from above."""
    c = np.cos(yaw)
    s = np.sin(yaw)
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])


def draw_camera(rng, room: Array) -> tuple[Array, Array]:
    """Position (3,) near the near wall, (3, 3) world from camera: looking across, slightly down."""
    position = rng.uniform([0.2, 0.25, 1.4], [0.8, 0.2 * room[1], 1.6]) * [room[0], 1, 1]
    ahead = rng.uniform([0.05, 0.5], [0.95, 1]) * room[:2] - position[:2]
    pitch = rng.uniform(-0.2, -0.08)
    c = np.cos(pitch)
    s = np.sin(pitch)
    return position, turn(np.arctan2(-ahead[0], ahead[1])) @ [[1, 0, 0], [0, c, -s], [0, s, c]]


def build_shell(rng, room: Array) -> list[list[Solid]]:
    """Walls, floor and ceiling as slabs around the room: solids like any other."""
    middle = room / 2
    slabs = {"wall": [], "floor": [], "ceiling": []}
    for name, axis, side in (
        ("wall", 0, -1), ("wall", 0, 1), ("wall", 1, -1), ("wall", 1, 1),
        ("floor", 2, -1), ("ceiling", 2, 1),
    ):  # fmt: skip
        paint = slabs[name][0].paint if slabs[name] else draw_paint(rng, name, HUES[name])
        outwards = side * np.eye(3)[axis]
        half = np.where(outwards != 0, 0.05, middle + 0.1)
        slabs[name].append(Solid("box", paint, middle + outwards * (middle + 0.05), half))
    return list(slabs.values())


def draw_spot(rng, room: Array, at_wall: bool) -> tuple[float, float, float]:
    """(x, y, yaw); at a wall: the back to the left, far or right one, the front into the room."""
    x, y = rng.random(2) * room[:2]
    if not at_wall:
        return x, y, rng.uniform(-np.pi, np.pi)
    return [(0, y, np.pi / 2), (x, room[1], 0), (room[0], y, -np.pi / 2)][rng.integers(3)]


def fits(middle, reach, room, camera, taken) -> bool:
    """Is the box middle ± reach in the room, clear of those taken, its middle in the picture?"""
    position, world_from_camera = camera
    x, y, z = (middle - position) @ world_from_camera
    seen = y > 1.4 and abs(x) < 0.55 * y and abs(z) < 0.44 * y  # a little within the field of view
    inside = (np.abs(middle - room / 2) < room / 2 - reach + 0.02).all()
    return seen and inside and not any((np.abs(middle - m) < reach + r).all() for m, r in taken)


def furnish(rng, wishes: str, room: Array, camera: tuple) -> tuple[list[Solid], list[Piece]]:
    """Solids of the scene, and the Piece of each owner.

    What finds no place in 40 tries is left out.
    """
    groups = build_shell(rng, room)
    pieces = [Piece(name, "background", False, (), (), "") for name in ("wall", "floor", "ceiling")]
    taken = [(camera[0], np.array([0.5, 0.5, 2]))]  # or the camera might stand in a wardrobe
    for wish in wishes.split(","):
        name, _, chance = wish.strip().rpartition(" ")
        if rng.random() > float(chance):
            continue
        solids = build_person(rng) if name == "person" else build_piece(rng, name)
        low, high = bounds(solids)
        for _ in range(40):
            x, y, yaw = draw_spot(rng, room, PIECES[name].at_wall)
            middle = turn(yaw) @ (low + high) / 2 + [x, y, 0]
            reach = np.abs(turn(yaw)) @ (high - low) / 2
            if fits(middle, reach, room, camera, taken):
                taken.append((middle, reach))
                groups.append([s.moved(turn(yaw), np.array([x, y, 0])) for s in solids])
                pieces.append(PIECES[name])
                break
    return [replace(s, owner=k) for k, group in enumerate(groups) for s in group], pieces


# --- Ray casting ----------------------------------------------------------------------------------
# In a solid's own frame, scaled to unit size, a ray is still a straight line with the same
# parameter t. So each shape needs one test, against the unit shape, for the span of t inside. Where
# the ray passes by, near > far or both are NaN. Origins (A,K,1), directions (A,K,N) → (K,N).


def box_span(o: Array, d: Array) -> tuple[Array, Array]:
    inverse = 1 / d
    middle = -o * inverse
    half = np.abs(inverse)
    return (middle - half).max(0), (middle + half).min(0)


def ball_span(o: Array, d: Array) -> tuple[Array, Array]:
    """Inside the unit circle (A = 2) or ball (A = 3), from the ray's point closest to the middle.

    The textbook's b² - ac subtracts large, nearly equal numbers, which float32 does not survive.
    """
    a = (d * d).sum(0)
    middle = -(o * d).sum(0) / a
    half = np.sqrt((1 - ((o + middle * d) ** 2).sum(0)) / a)
    return middle - half, middle + half


def drum_span(o: Array, d: Array) -> tuple[Array, Array]:
    side = ball_span(o[:2], d[:2])
    caps = box_span(o[2:], d[2:])
    return np.maximum(side[0], caps[0]), np.minimum(side[1], caps[1])


SPANS = {"box": box_span, "ball": ball_span, "drum": drum_span}


def times(vectors: Array, matrix: Array) -> Array:
    """Row vectors (N, 3) times matrix (3, 3). Not `@`: BLAS rounds differently on processors."""
    return np.einsum("ni,ij->nj", vectors, matrix)


def first_hit(solids: list[Solid], origin: Array, rays: Array) -> tuple:
    """Rays (N, 3) from one origin → t (N,) where each enters its first solid, and which it is."""
    t = np.full((len(solids), len(rays)), np.inf, np.float32)
    rays = rays.T.astype(np.float32, order="C")  # (3, N)
    for shape, span in SPANS.items():
        rows = [k for k, s in enumerate(solids) if s.shape == shape]
        if not rows:
            continue
        frames = np.stack([solids[k].axes.T / solids[k].half[:, None] for k in rows])  # (K, 3, 3)
        shift = np.stack([origin - solids[k].centre for k in rows])
        o = np.einsum("kaj,kj->ak", frames, shift).astype(np.float32)[..., None]
        d = np.einsum("kaj,jn->akn", frames.astype(np.float32), rays)
        with np.errstate(divide="ignore", invalid="ignore"):
            near, far = span(o, d)
        t[rows] = np.where((near < far) & (near > 0), near, np.inf)
    hit = t.argmin(0)
    return np.take_along_axis(t, hit[None], 0)[0], hit


def unit_normals(shape: str, q: Array, d: Array) -> Array:
    """Outward normals (N, 3) where rays of direction d (N, 3) enter the unit shape at q (N, 3).

    At an edge, rounding puts q on either face. Only faces turned to the ray are asked.
    """
    towards = -np.sign(d)
    if shape == "box":
        return np.where(q * towards == (q * towards).max(1, keepdims=True), towards, 0)
    if shape == "drum":
        cap = (q * towards)[:, 2:] > np.hypot(q[:, :1], q[:, 1:2]) - 1e-3
        return np.where(cap, towards * [0, 0, 1], q * [1, 1, 0])
    return q


def surface(solid: Solid, points: Array, rays: Array) -> tuple[Array, Array]:
    """World points (N, 3) on a solid, rays (N, 3) that end there → normals and RGB, both (N, 3)."""
    local = times(points - solid.centre, solid.axes)
    normal = unit_normals(solid.shape, local / solid.half, times(rays, solid.axes)) / solid.half
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    facing = np.abs(normal).argmax(1)  # a texture is projected along the axis faced most
    u = np.where(facing == 0, local[:, 1], local[:, 0])
    v = np.where(facing == 2, local[:, 1], local[:, 2])
    return times(normal, solid.axes.T), albedo(solid.paint, u, v)


# --- Light, sensor, labels ------------------------------------------------------------------------


def illuminate(solids: list[Solid], lamps: tuple, points: Array, normals: Array) -> Array:
    """Light (N, 3) arriving at points (N, 3): ambient, and Lambert's cosine for each of two lamps.

    The first lamp throws hard shadows: what it sees first is lit. The second, weaker one throws
    none and stands for light bounced off the walls.
    """
    light = 0.3 + 0.08 * normals[:, 2:]
    for number, (position, colour) in enumerate(zip(*lamps, strict=True)):
        beam = points - position
        distance = np.linalg.norm(beam, axis=1)
        cosine = np.maximum(-(beam * normals).sum(1) / distance, 0)
        if number == 0:
            cosine *= first_hit(solids, position, beam)[0] > 0.998  # t = 1 is the point itself
        light = light + (cosine / (1 + 0.1 * distance**2))[:, None] * colour
    return light


def trace(solids: list[Solid], lamps: tuple, camera: tuple, rays: Array) -> dict[str, Array]:
    """Camera-frame rays (N, 3) → hit, depth (N,), normals, colour (N, 3), free of noise."""
    position, world_from_camera = camera
    rays = times(rays, world_from_camera.T)
    depth, hit = first_hit(solids, position, rays)
    points = position + depth[:, None] * rays
    normals = np.empty_like(points)
    colour = np.empty_like(points)
    for k in np.unique(hit):
        at = hit == k
        normals[at], colour[at] = surface(solids[k], points[at], rays[at])
    glow = np.array([s.paint.glow for s in solids])[hit, None]
    glass = np.array([s.glass for s in solids])[hit, None]
    return {
        "hit": hit,
        "depth": np.where(glass[:, 0], 0, depth),
        "normals": np.where(glass, 0, times(normals, world_from_camera)).astype(np.float32),
        "colour": colour * np.where(glow > 0, glow, illuminate(solids, lamps, points, normals)),
    }


def draw_spots(rng, height: int, width: int, count: int) -> Array:
    """(H, W) mask of up to `count` round spots, the same ones at every image size."""
    v, u = (np.indices((height, width)) + 0.5) / [[[height]], [[width]]]
    mask = np.zeros((height, width), bool)
    for _ in range(rng.integers(count + 1)):
        x, y, r = rng.uniform([0, 0, 0.01], [1, 1, 0.06])
        mask |= np.hypot(u - x, 0.75 * (v - y)) < r
    return mask


def photograph(rng, colour: Array) -> Array:
    """Linear colour (H, W, 3) → 8-bit RGB: exposure, white balance, gamma, sensor noise."""
    balanced = colour * rng.uniform(0.7, 1.2) * rng.uniform(0.9, 1.1, 3)
    noise = rng.uniform(0.005, 0.02) * rng.standard_normal(colour.shape)
    image = np.clip(balanced, 0, 1) ** (1 / 2.2) + noise
    return (np.clip(image, 0, 1) * 255).round().astype(np.uint8)


def outline_objects(solids, pieces, hit: Array, owner: Array) -> list[dict]:
    """What is visible of everything that has a VOC class, as PASCAL-Part says it."""
    objects = []
    for k in np.unique(owner):
        name = pieces[k].voc
        if name == "background":
            continue
        masks = {}
        for number, s in enumerate(solids):
            if s.owner == k and s.part and (hit == number).any():
                masks[s.part] = masks.get(s.part, False) | (hit == number)
        thing = {"class_name": name, "class_index": VOC_CLASSES.index(name)}
        thing["mask"] = (owner == k).astype(np.uint8)
        thing["parts"] = [(part, mask.astype(np.uint8)) for part, mask in masks.items()]
        objects.append(thing)
    return objects


def soft_saliency(rng, objects: list[dict], size: tuple[int, int]) -> Array:
    """(H, W) uint8 that looks distilled: people or else the largest object, soft, above 127."""
    salient = np.zeros(size, np.uint8)
    people = [thing["mask"] for thing in objects if thing["class_index"] == PERSON]
    for mask in people or sorted((thing["mask"] for thing in objects), key=np.sum)[-1:]:
        salient |= mask
    blurred = Image.fromarray(255 * salient).filter(ImageFilter.GaussianBlur(0.008 * size[0]))
    low, high = rng.uniform([0, 230], [20, 255])
    return (low + (high - low) / 255 * np.asarray(blurred, float)).round().astype(np.uint8)


def render(name: str, seed: int, index: int, height: int, width: int) -> dict:
    """Scene number `index` of set `name` with `seed`: the same bytes, the same scene at any size.

    image uint8 (H,W,3) RGB · nyud uint8 (H,W), 0 = unlabelled, 1…40 · voc uint8 (H,W), 0…20, 255 =
    ignored, as VOC does along outlines · depth float32 (H,W), metres, 0 = hole · normals float32
    (H,W,3), unit vectors turned to the camera, zero in the holes too · saliency uint8 (H,W),
    salient > 127 · objects: a dict {class_name, class_index, mask, parts: [(name, mask), …]} for
    each visible thing of VOC's classes, masks uint8 (H,W) 0 or 1
    """
    rng = np.random.default_rng((seed, index))
    smallest, largest, wishes = ROOMS[name]
    room = rng.uniform(smallest, largest)
    camera = draw_camera(rng, room)
    solids, pieces = furnish(rng, wishes, room, camera)
    places = room * rng.uniform([0.2, 0.1, 0.88], [0.8, 0.8, 0.95], (2, 3))  # under the ceiling
    lamps = places, rng.uniform([[0.7], [0.2]], [[1.5], [0.5]], (2, 3))

    fx, fy, cx, cy = nyu_intrinsics(height, width)
    v, u = np.mgrid[:height, :width].reshape(2, -1)
    # The forward part of a ray is 1, which makes its parameter t the depth.
    rays = np.stack([(u - cx) / fx, np.ones(u.size), (cy - v) / fy], axis=1)
    chunks = np.array_split(rays, -(-len(rays) // RAY_CHUNK))
    chunks = [trace(solids, lamps, camera, chunk) for chunk in chunks]
    maps = {key: np.concatenate([c[key] for c in chunks]) for key in chunks[0]}
    maps = {key: value.reshape(height, width, *value.shape[1:]) for key, value in maps.items()}

    owner = np.array([s.owner for s in solids])[maps["hit"]]
    nyud = np.array([NYUD_CLASSES.index(p.nyud) + 1 for p in pieces], np.uint8)[owner]
    voc = np.array([VOC_CLASSES.index(p.voc) for p in pieces], np.uint8)[owner]
    group = np.where(voc > 0, owner, 0)
    voc[:, :-1][group[:, :-1] != group[:, 1:]] = IGNORE_INDEX
    voc[:-1][group[:-1] != group[1:]] = IGNORE_INDEX
    objects = outline_objects(solids, pieces, maps["hit"], owner)
    saliency = soft_saliency(rng, objects, (height, width))
    hole = draw_spots(rng, height, width, 3)
    nyud[draw_spots(rng, height, width, 1)] = 0
    return {
        "nyud": nyud,
        "voc": voc,
        "depth": np.where(hole, 0, maps["depth"]).astype(np.float32),
        "normals": np.where(hole[..., None], 0, maps["normals"]),
        "saliency": saliency,
        "objects": objects,
        # Last: its noise is the only draw whose count depends on the image size.
        "image": photograph(rng, maps["colour"]),
    }


# ==================================================================================================
# Rendered sets on disk
# ==================================================================================================

WORLD = 2  # raised when other pictures are drawn, so that an older set is not taken for a new one


def save_image(path: Path, pixels: Array) -> None:
    options = {"quality": 95} if path.suffix == ".jpg" else {}
    form = {".jpg": "JPEG", ".png": "PNG"}[path.suffix]
    save(path, lambda f: Image.fromarray(pixels).save(f, form, **options))


def write_rooms(out: Path, stem: str, scene: dict) -> None:
    """The files of NYUD_MT, the image last: where it is, all of them are."""
    save_image(out / f"segmentation/{stem}.png", scene["nyud"])
    save(out / f"depth/{stem}.npy", lambda f: np.save(f, scene["depth"]))
    save(out / f"normals/{stem}.npy", lambda f: np.save(f, scene["normals"]))
    save_image(out / f"images/{stem}.jpg", scene["image"])


def write_figures(out: Path, stem: str, scene: dict) -> None:
    """The files of PASCAL_MT, the image last."""
    save_image(out / f"semseg/VOC12/{stem}.png", scene["voc"])
    save(out / f"human_parts/{stem}.mat", lambda f: write_part_mat(f, stem, scene["objects"]))
    save_image(out / f"sal_distill/{stem}.png", scene["saliency"])
    save_image(out / f"JPEGImages/{stem}.jpg", scene["image"])


def struct_array(fields: str, rows: list[tuple]) -> Array:
    """A MATLAB 1xN struct array; none at all is MATLAB's [], as in the real files."""
    if not rows:
        return np.zeros((0, 0))
    array = np.empty((1, len(rows)), dtype=[(name, object) for name in fields.split()])
    for column, row in enumerate(rows):
        array[0, column] = row
    return array


def write_part_mat(file, stem: str, objects: list[dict]) -> None:
    """`objects` (see `render`) as PASCAL-Part has them: anno.objects(n).parts(m)."""
    rows = []
    for thing in objects:
        parts = struct_array("part_name mask", thing["parts"])
        rows.append((thing["class_name"], float(thing["class_index"]), thing["mask"], parts))
    anno = {"imname": stem, "objects": struct_array("class class_ind mask parts", rows)}
    buffer = io.BytesIO()
    scipy.io.savemat(buffer, {"anno": anno}, do_compression=True)
    # A MAT-file opens with 116 bytes of text, where scipy puts the time of day. Equal scenes are to
    # give equal bytes.
    file.write(b"MATLAB 5.0 MAT-file, rendered figures".ljust(116) + buffer.getvalue()[116:])


WRITERS = {"rooms": write_rooms, "figures": write_figures}


def write_scene(name: str, out: Path, seed: int, size: tuple[int, int], index: int) -> str:
    """Renders scene `index` into `out` unless it is there; returns its stem."""
    stem = f"{name}_{index:05d}"
    layout = next(iter(DATASETS[name].layouts.values()))
    if not (out / layout["image"].format(stem)).exists():
        WRITERS[name](out, stem, render(name, seed, index, *size))
    return stem


def render_set(name: str, out: Path, train=800, val=200, size=(96, 128), seed=0) -> None:
    """Renders train + val scenes of "rooms" or "figures" into `out`. Same arguments, same bytes.

    A set cut short is finished by the next call, a complete one is left as it is. Raises DataError
    if `out` holds a set with other arguments, or something else: nothing is overwritten.
    """
    wanted = {"scenes": name, "version": WORLD, "seed": seed, "size": list(size)}
    wanted |= {"train": train, "val": val}
    found = read_marker(out)
    if found == {**wanted, "complete": True}:
        return
    if found not in (None, {**wanted, "complete": False}):
        raise DataError(
            f"{out} holds {found}, wanted {wanted}: delete the folder or choose another"
        )
    save_text(out / "rendered.json", json.dumps({**wanted, "complete": False}))
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        jobs = pool.map(
            partial(write_scene, name, out, seed, size), range(train + val), chunksize=8
        )
        stems = list(tqdm(jobs, total=train + val, desc=f"rendering {out}", disable=None))
    for split, part in (("train", stems[:train]), ("val", stems[train:])):
        save_text(out / DATASETS[name].lists[split], "\n".join(part))
    save_text(out / "rendered.json", json.dumps({**wanted, "complete": True}))


def ensure_set(name: str, out: Path) -> None:
    """A whole set of scenes in `out`: the one there, finished if need be, or the default set."""
    found = read_marker(out)
    keys = ("train", "val", "size", "seed") if found else ()
    render_set(name, out, **{key: found[key] for key in keys})


def read_marker(out: Path) -> dict | None:
    """What rendered.json says of a set, None if `out` is empty. DataError: it is something else."""
    if not out.exists() or not any(out.iterdir()):
        return None
    try:
        found = json.loads((out / "rendered.json").read_text())
        counts = {key: int(found[key]) for key in ("version", "seed", "train", "val")}
        size = [int(side) for side in found["size"]]
        return {"scenes": found["scenes"], "size": size, "complete": found["complete"], **counts}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{out} is not empty and has no valid rendered.json ({error!r}): render elsewhere"
        ) from error


# ==================================================================================================
# NYUD-v2 from its official file: python data.py nyud
# ==================================================================================================

# The official split of the 1449 images: bit i - 1 is set where image i is one of the 795 to train
# on. It is `trainNdxs` of the authors' splits.mat (Silberman et al., ECCV 2012).
NYUD_TRAINING = int(
    "fe1f0fc03e01807ffe67f0e3f030fff9f018800f03fe001c3ff8c1f07000f07f031981c0007f38038fe1010070"
    "03fffce67f9c7f8ff1f0f83ffe018c3ff8ff871f8ff1ffffffff8fc0f1c000ff8fc1f07ff80000003fff3fc307"
    "ce01f8cc1e06073c79e7c0ffe0e783fc3f83f800038ff8e3c00207ffffffe00c1fff00f81fffc3ffe3c07ffff0"
    "033fff800fe31fc07fe03e3f7ffdffffffc7f03c000007023ff8fffec20f8ffffff80787ff827f980007ec1efc",
    16,
)
NYUD_IMAGES = 1449
# The class 1…40 of each of the 894 original ones (Gupta et al., CVPR 2013): character k - 1 stands
# for original class k, "1" for 1, and so on in ASCII up to "X" for 40.
NYUD_CLASS_OF = (
    "XX3F5X<VXX2WXXJXHX7X1XXRVMX8XXXXVXX>XVXXX?WXNXXWXWVXVXUXVV9XXVX;VXXXXXXXXXXXXXV=XX6XGXW:@XXX"
    "XVXXXXXXXXXVXWXXXXWVXXXXXXBXXCLQXXXXXXXXXVKTXXXXEXDSXXXXXXXXVXXX4PXXWXWXXXXXAXXIXWXXXXXXXXWX"
    "XXXXXXXXXXXXXXXXXXXWXXXXXXXXXWVVXXWXWXVWVXXXXXXXXXXWXVXXVVXXXXXXXXXXXXXVXXXXXWXXXXXXXXXXXXXX"
    "XWXXXXXXXXXXXXWXXXVXXWXXVXXXXXXXXXXXWXXXXXXXXXXXXXXXXXOXXXXXXXVXXVWWXXXXXXXXXVXWXXWXXXVXXXXX"
    "XXXVWXXXXXXVXXXXXXXXXXXVWXXXXXXXWXXXXXXVXXXVXWXXXWWXXXXXXXXXXWXXXXXXXXXXXXWWXXWWXXXXVXXVWWXW"
    "XWVXXXXXXXXXXXWXVXWXXXXXWWXXXXXXWWXXVWWXXXXXXXXXWWXXXXWXXXXXWXXWXXXXXXXXXXXXXXXWVXXXXXXXWVWX"
    "VWXWXWXXXXXXXXVXXXXXVXXWXXXWXVXXXXXXXXVXXXXXXXXXXXXXXXXWVXXVXXVXXXXXXXXXWXXXXXXXXXXXXXXXXVXX"
    "VXXXXXXXXXXXVVVXXXVXXXVVXXXXXXXXXXXXXXXXXVXXXXXXXXXXXXXVXVWXXXXXXXXXXXXXXXXXXXXXXXXXXXXXXWXX"
    "XXXXXXXXXXXXXXXXXXXXXXXXXXXXXXXXXWXWXXXXVVXXXVXXXXXXXXXXXXXXWXXWXXWWXXXXXXXXWWWXXXXWXXXXXXXX"
    "WXXXXXWXXXXXXXXXXXXXXVXXXXXXXWXXVXWXXXXVXXXXXVXXXXXXXWXXXXXXXXXWXX"
)
NYUD_FRAME = (slice(44, 471), slice(40, 601))  # rows, columns that the depth camera saw
# Of the plane fit: a disc of so many pixels, of which every second row and column is read.
RADIUS, STEP = 14, 2
SIGMA = 7.0  # pixels: how fast a neighbour's weight falls with its distance
GATE = 0.03  # and with the relative difference of its inverse depth


def fit_normals(depth: Array) -> Array:
    """Metres float32 (H,W) without holes → unit normals (H,W,3); x right, y forward, z up.

    On a plane, inverse depth q is linear in the pixel: q(u + du, v + dv) = q · (1 + a·du + b·dv).
    So each pixel gets a and b, and an offset c for the noise of its own depth, by a weighted
    least-squares fit to its neighbourhood. Neighbours in front of the surface or behind it count
    little.

    These are not measured normals: they are as smooth as the window, and round off edges.
    """
    fx, fy, cx, cy = nyu_intrinsics(*depth.shape)
    H, W = depth.shape
    q = 1 / torch.from_numpy(depth)
    padded = F.pad(q, (RADIUS,) * 4)  # 0 is infinitely far away: no weight
    sums = torch.zeros(9, H, W)
    offsets = range(-RADIUS, RADIUS + 1, STEP)
    for dv, du in product(offsets, offsets):
        square = du * du + dv * dv
        if square > RADIUS * RADIUS:
            continue
        top, left = RADIUS + dv, RADIUS + du
        e = padded[top : top + H, left : left + W] / q - 1
        w = torch.exp(-square / (2 * SIGMA**2) - e.square() / (2 * GATE**2))
        we = w * e
        for total, factor in zip(sums[:6], (1, du, dv, du * du, du * dv, dv * dv), strict=True):
            total.add_(w, alpha=factor)
        for total, factor in zip(sums[6:], (1, du, dv), strict=True):
            total.add_(we, alpha=factor)
    n, u, v, uu, uv, vv, e, eu, ev = sums.double()
    # Moments about the means: the offset c drops out, and two unknowns are left.
    uu, uv, vv = uu - u * u / n, uv - u * v / n, vv - v * v / n
    eu, ev = eu - e * u / n, ev - e * v / n
    det = (uu * vv - uv * uv).clamp(min=1e-6)  # 0 where nothing near lies at this depth: a = b = 0
    a, b = (vv * eu - uv * ev) / det, (uu * ev - uv * eu) / det
    c = (e - a * u - b * v) / n
    # In space, the plane is A·x + B·y + C·z = const, x right, y down, z forward.
    A, B = a * fx, b * fy
    C = 1 + c - A * ((torch.arange(W) - cx) / fx) - B * ((torch.arange(H) - cy) / fy)[:, None]
    return F.normalize(torch.stack([-A, -C, B], dim=-1), dim=-1).numpy()


def require_official_file(mat: Path) -> None:
    """DataError unless `mat` is nyu_depth_v2_labeled.mat, as far as its header tells."""
    if not mat.is_file():
        raise DataError(f"{mat} not found: download nyu_depth_v2_labeled.mat of NYU Depth v2 first")
    h5py = import_h5py()
    n = NYUD_IMAGES
    expected = {"images": (n, 3, 640, 480), "depths": (n, 640, 480), "labels": (n, 640, 480)}
    try:
        with h5py.File(mat) as file:
            found = {key: getattr(file.get(key), "shape", None) for key in expected}
    except OSError as error:  # also where the file is shorter than its header says
        raise DataError(
            f"{mat} cannot be read as HDF5 ({error}): download nyu_depth_v2_labeled.mat again"
        ) from error
    if found != expected:
        raise DataError(f"{mat} holds {found}: nyu_depth_v2_labeled.mat holds {expected}")


def import_h5py():
    try:
        import h5py
    except ImportError as error:
        raise DataError("this command, alone of all, needs h5py: pip install h5py") from error
    return h5py


def convert_image(mat: Path, out: Path, index: int) -> str:
    """Writes image `index` of the official file into `out` unless it is there; returns its stem."""
    stem = f"{index + 1:04d}"
    if (out / f"images/{stem}.jpg").exists():
        return stem
    try:
        with import_h5py().File(mat) as file:
            # MATLAB counts columns first: what it calls (H,W,3,n) arrives as (n,3,W,H).
            image, depth, label = (file[key][index].T for key in ("images", "depths", "labels"))
    except OSError as error:
        raise DataError(f"{mat}: image {stem} cannot be read ({error}): download again") from error
    classes = np.array([0, *(ord(c) - ord("0") for c in NYUD_CLASS_OF)], np.uint8)
    if label.max() >= len(classes):
        raise DataError(f"{mat}: image {stem} has class {label.max()}: the last one is 894")
    depth = np.ascontiguousarray(depth, dtype=np.float32)
    if not (np.isfinite(depth).all() and depth.min() > 0):
        raise DataError(f"{mat}: the depth of image {stem} has holes: `depths` should be filled in")
    normals = np.zeros((*depth.shape, 3), np.float16)
    normals[NYUD_FRAME] = fit_normals(depth)[NYUD_FRAME]
    pixels = np.ascontiguousarray(image)
    scene = {"nyud": classes[label], "depth": depth, "normals": normals, "image": pixels}
    write_rooms(out, stem, scene)
    return stem


def convert_nyud(mat: Path, out: Path) -> None:
    """The official file → the layout NYUD_MT in `out`, with the official split.

    Cut off, it goes on where it stopped. DataError if `mat` is no such file, or `out` something
    else: nothing is overwritten. Images become JPEG of quality 95, depth is the filled-in `depths`,
    normals are fitted to it, and are zero outside what the depth camera saw.
    """
    require_official_file(mat)
    marker = out / "converted.json"
    about = json.dumps({"from": mat.name, "bytes": mat.stat().st_size})
    if not marker.is_file() and out.exists() and any(p.name[0] != "." for p in out.iterdir()):
        raise DataError(f"{out} is not empty: choose another --out")
    if marker.is_file() and marker.read_text() != about:
        raise DataError(f"{out} was made from another file: choose another --out")
    save_text(marker, about)
    with ProcessPoolExecutor(os.cpu_count(), initializer=torch.set_num_threads, initargs=(1,)) as p:
        jobs = p.map(partial(convert_image, mat, out), range(NYUD_IMAGES), chunksize=8)
        stems = list(tqdm(jobs, total=NYUD_IMAGES, desc=f"converting into {out}", disable=None))
    # The lists come last: without them nobody takes this for a whole archive.
    for split, bit in (("train", 1), ("val", 0)):
        part = [stem for i, stem in enumerate(stems) if NYUD_TRAINING >> i & 1 == bit]
        save_text(out / NYUD.lists[split], "\n".join(part))


# ==================================================================================================
# Command line
# ==================================================================================================


def keep_printing() -> None:
    """A character that a console does not have comes out as "?", and does not end a run."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def main() -> int:
    keep_printing()
    parser = argparse.ArgumentParser(description="Render a stand-in dataset, convert or check one.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name in WRITERS:
        layout = next(iter(DATASETS[name].layouts))
        command = commands.add_parser(name, help=f"render {name} in the layout of {layout}")
        command.add_argument("--out", type=Path, default=Path("data") / name)
        command.add_argument("--train", type=int, default=800, help="images in the training split")
        command.add_argument("--val", type=int, default=200)
        command.add_argument("--size", type=int, nargs=2, default=(96, 128), metavar=("H", "W"))
        command.add_argument("--seed", type=int, default=0)
    command = commands.add_parser("nyud", help="convert NYUD-v2's official file to NYUD_MT")
    command.add_argument("--mat", type=Path, required=True, help="nyu_depth_v2_labeled.mat")
    command.add_argument("--out", type=Path, default=Path("data/nyud"))
    command = commands.add_parser("check", help="read every file; exit status 1 if any is wrong")
    command.add_argument("--dataset", choices=list(DATASETS), default="nyud")
    command.add_argument("--root", type=Path, help="default: data/DATASET")
    command.add_argument("--sheet", type=Path, help="contact sheet, default check_DATASET.png")
    args = parser.parse_args()
    try:
        if args.command == "check":
            root = args.root or Path("data") / args.dataset
            sheet = args.sheet or Path(f"check_{args.dataset}.png")
            return 1 if check(DATASETS[args.dataset], root, sheet) else 0
        if args.command == "nyud":
            convert_nyud(args.mat, args.out)
            print(f"NYUD-v2 in {args.out}; python data.py check --dataset nyud reads it all again")
            return 0
        if min(args.train, args.val, *args.size) < 1 or args.seed < 0:
            raise DataError("--train, --val, --size take positive numbers, --seed 0 or more")
        render_set(args.command, args.out, args.train, args.val, tuple(args.size), args.seed)
        print(f"{args.train} + {args.val} {args.command} in {args.out}")
        return 0
    except (DataError, OSError) as error:
        print(error, file=sys.stderr)
    except BrokenProcessPool:
        print(
            "a process that worked on it was killed; out of memory? Say it again", file=sys.stderr
        )
    return 1 if args.command == "check" else 2


if __name__ == "__main__":
    sys.exit(main())
