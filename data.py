"""Datasets for MT-CP: NYUD-v2 in the two archives that circulate, PASCAL-Context, and a rendered stand-in for each.

Whatever the archive, one sample is a dict of

    image        float32 (3,H,W)   RGB, normalised by ImageNet's mean and std
    semseg       int64   (H,W)     class 0…39 (NYUD-v2) or 0…20 (PASCAL-Context), 255 = ignore
    depth        float32 (1,H,W)   metres along the optical axis, 0 = invalid
    normals      float32 (3,H,W)   unit vectors (x right, y away from the camera, z up), all-zero = invalid
    human_parts  int64   (H,W)     0 background, 1…6 part, 255 = ignore
    sal          float32 (1,H,W)   0 or 1; 255 = ignore, where a rotation brought in what is outside
    name         str               file stem
    size         int64   (2,)      original (H,W)

of which only the labels that were asked for are read. What is on disk is treated as untrusted: nothing is unpickled, no
size is believed before it is compared, and every complaint (DataError) names the file and what to do about it.

    python data.py rooms --out data/rooms               render a stand-in, rooms or figures (train.py does it by itself)
    python data.py check --dataset nyud --root DIR      is this archive complete and sane? exit status 1 if not

In this order: readers, one per file format → archive layouts and the datasets → joint transforms → loaders → pictures →
the check → the two renderers → rendered sets on disk → the command line.
"""

import argparse
import colorsys
import hashlib
import io
import json
import math
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import scipy.io
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageFont
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

VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
PERSON = VOC_CLASSES.index("person")
PART_CLASSES = ("background", "head", "torso", "upper arm", "lower arm", "upper leg", "lower leg")
PART_LABELS = {  # PASCAL-Part's 24 human parts → six
    name: label
    for label, names in enumerate(
        (
            "hair head lear lebrow leye mouth nose rear rebrow reye",
            "neck torso",
            "luarm ruarm",
            "llarm rlarm lhand rhand",
            "luleg ruleg",
            "llleg rlleg lfoot rfoot",
        ),
        start=1,
    )
    for name in names.split()
}


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


def read_voc_semseg(path: Path) -> np.ndarray:
    """VOC class 0…20, 255 = ignore → int64 (H,W)."""
    label = read_pixels(path, "L").astype(np.int64)
    odd = label[(label >= len(VOC_CLASSES)) & (label != IGNORE_INDEX)]
    if odd.size:
        raise DataError(f"{path} holds class {odd[0]}: VOC has 0…{len(VOC_CLASSES) - 1}, and 255 for ignore")
    return label


def read_saliency(path: Path) -> np.ndarray:
    """8-bit, distilled from a saliency model → float32 (1,H,W), 1 where the value is above one half."""
    return (read_pixels(path, "L") > 127.5).astype(np.float32)[None]


def read_part_objects(path: Path) -> list[tuple]:
    """PASCAL-Part's .mat → [(class index, mask (H,W) bool, [(part name, mask (H,W) bool), …]), …]."""
    try:
        anno = scipy.io.loadmat(path, variable_names=["anno"])["anno"][0, 0]
        # MATLAB's [] arrives as an empty float array: ravel() makes "no objects" and "no parts" empty loops.
        return [
            (
                int(thing["class_ind"].item()),
                thing["mask"].astype(bool),
                [(str(part["part_name"].item()), part["mask"].astype(bool)) for part in thing["parts"].ravel()],
            )
            for thing in anno["objects"].ravel()
        ]
    except Exception as error:  # scipy's parser fails in a dozen ways on bytes that are not its own
        raise DataError(
            f"{path} cannot be read as a PASCAL-Part annotation ({type(error).__name__}: {error}): "
            "unpack or download the archive again"
        ) from error


def read_human_parts(path: Path, size: tuple[int, int]) -> np.ndarray:
    """PASCAL-Part's .mat of an image of `size` (H,W) → int64 (H,W): 0 background, 1…6 part, 255 = ignore.

    Dogs have a "head" and a "torso" too: only the class index tells whose part it is. Without a single annotated person
    the whole image is ignored, since then nobody has said where there are no people. Beside an annotated person,
    one without parts is background.
    """
    objects = read_part_objects(path)
    sizes = {mask.shape for _, whole, parts in objects for mask in (whole, *(mask for _, mask in parts))}
    if sizes - {size}:
        raise DataError(f"{path} has masks of {sorted(sizes)} pixels but its image is {size}: archives were mixed")
    human = [part for class_index, _, parts in objects if class_index == PERSON for part in parts]
    unknown = sorted({name for name, _ in human} - PART_LABELS.keys())
    if unknown:
        raise DataError(f"{path} has human parts {unknown}: PASCAL-Part has {' '.join(PART_LABELS)}")
    label = np.full(size, 0 if human else IGNORE_INDEX, dtype=np.int64)
    for name, mask in human:
        label[mask] = PART_LABELS[name]
    return label


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


PASCAL_HELP = """expected below {root}:
    ImageSets/Context/train.txt  val.txt    one file stem a line (4998 and 5105 of them)
    JPEGImages/STEM.jpg                     RGB
    semseg/VOC12/STEM.png                   0…20, 255 = ignore; where it does not exist:
    semseg/pascal-context/STEM.png          the same
    human_parts/STEM.mat                    PASCAL-Part
    sal_distill/STEM.png                    8-bit saliency
README.md, section "Real data", says where the archive is described."""


class DenseDataset(Dataset):
    """One split of a dataset on disk; NYUD and PASCAL below say where its files are and how to read them.

    root       folder of the archive
    split      "train" or "val" (what papers call the test set)
    tasks      names of the labels to read (default: all there are)
    transform  (sample, rng) → sample, applied before normalisation
    stems      take only these of the split
    seed       of the transform's random numbers, which depend on (seed, epoch, index) alone: not on the number of
               workers or the order of reading. Set `epoch` before every epoch.
    complete   False: leave missing files to the caller

    Raises DataError if the folder is not such an archive, or any file that will be needed is missing.
    """

    def __init__(self, root, split, tasks=None, transform=None, stems=None, seed=0, complete=True):
        self.root, self.transform, self.seed = Path(root), transform, seed
        self.tasks = tuple(self.readers if tasks is None else tasks)
        self.stems = self.list_stems(root, split) if stems is None else stems
        self.epoch = 0
        self.layout = self.detect()
        missing = self.missing()
        if missing and complete:
            raise DataError(describe_missing(self.root, self.layout, missing, len(self.stems)))

    @classmethod
    def list_stems(cls, root, split: str) -> list[str]:
        """The file stems of a split, in the order of the archive's list."""
        path = Path(root) / cls.lists.format(split)
        if not path.is_file():
            raise DataError(f"{path} not found; {cls.help.format(root=root)}")
        stems = path.read_text().split()
        # A stem becomes part of a path: one like ../../x would lead out of the archive.
        bad = [s for s in stems if not s.replace("_", "").replace("-", "").isalnum()]
        if bad or not stems:
            found = f"it has the line {bad[0]!r}" if bad else "it is empty"
            raise DataError(f"{path} is no list of file stems: {found}")
        return stems

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
            label = torch.from_numpy(self.read_label(task, stem, size))
            if tuple(label.shape[-2:]) != size:
                raise DataError(
                    f"{self.path(task, stem)} is {tuple(label.shape[-2:])} pixels but its image is {size}: "
                    "files of different archives were mixed; unpack one archive into an empty folder"
                )
            sample[task] = label
        return sample

    def read_label(self, task: str, stem: str, size: tuple[int, int]) -> np.ndarray:
        return self.readers[task](self.path(task, stem))

    def __len__(self) -> int:
        return len(self.stems)

    def __getitem__(self, index: int) -> dict:
        sample = self.read(self.stems[index])
        if self.transform is not None:
            sample = self.transform(sample, np.random.default_rng((self.seed, self.epoch, index)))
        return normalise(sample)


class NYUD(DenseDataset):
    """NYUD-v2, or rendered rooms; which of the two archives it is, is seen from the files."""

    lists, help = "gt_sets/{}.txt", NYUD_HELP
    classes = {"semseg": NYUD_CLASSES}
    readers = {"semseg": read_nyud_semseg, "depth": read_depth, "normals": read_normals}

    def path(self, key: str, stem: str) -> Path:
        return self.root / NYUD_LAYOUTS[self.layout][key].format(stem)

    def intrinsics(self) -> tuple[float, float, float, float]:
        """(fx, fy, cx, cy) of the images in pixels, for comparing normals with depth."""
        height, width, _ = read_pixels(self.path("image", self.stems[0]), "RGB").shape
        if self.layout == "NYUDv2":
            # Not another resolution but a cut-out, by its size the usual one that starts at row 45 and column 40; to be
            # verified on a real file.
            fx, fy, cx, cy = nyu_intrinsics(480, 640)
            return fx, fy, cx - 40, cy - 45
        return nyu_intrinsics(height, width)

    def detect(self) -> str:
        """Name of the archive: the layout of which most files are there."""
        first = self.stems[0]
        if (self.root / f"segmentation/{first}.mat").is_file() or (self.root / f"normals/{first}.jpg").is_file():
            raise DataError(
                f"{self.root} is the older NYUD_MT of ASTMT (labels as .mat, normals as .jpg), which is not supported: "
                "get the NYUD_MT that MTI-Net links (.png and .npy), or NYUDv2 of ATRC and InvPT"
            )
        present = {
            name: sum((self.root / pattern.format(stem)).is_file() for pattern in files.values() for stem in self.stems)
            for name, files in NYUD_LAYOUTS.items()
        }
        best = max(present, key=present.get)
        if present[best] == 0:
            raise DataError(f"no NYUD-v2 in {self.root}; {NYUD_HELP.format(root=self.root)}")
        return best


class PASCAL(DenseDataset):
    """PASCAL-Context with PASCAL-Part and distilled saliency, or rendered figures. Images differ in size."""

    lists, help = "ImageSets/Context/{}.txt", PASCAL_HELP
    classes = {"semseg": VOC_CLASSES, "human_parts": PART_CLASSES}
    readers = {"semseg": read_voc_semseg, "human_parts": read_human_parts, "sal": read_saliency}
    files = {"image": "JPEGImages/{}.jpg", "human_parts": "human_parts/{}.mat", "sal": "sal_distill/{}.png"}

    def path(self, key: str, stem: str) -> Path:
        if key != "semseg":
            return self.root / self.files[key].format(stem)
        # VOC's own labels where an image has them: they are finer than those made from PASCAL-Context.
        voc = self.root / f"semseg/VOC12/{stem}.png"
        return voc if voc.is_file() else self.root / f"semseg/pascal-context/{stem}.png"

    def detect(self) -> str:
        if not (self.root / "JPEGImages").is_dir():
            raise DataError(f"no PASCAL-Context in {self.root}; {PASCAL_HELP.format(root=self.root)}")
        return "PASCAL_MT"

    def read_label(self, task: str, stem: str, size: tuple[int, int]) -> np.ndarray:
        if task != "human_parts":
            return super().read_label(task, stem, size)
        return self.cached_parts(stem, size)

    def cached_parts(self, stem: str, size: tuple[int, int]) -> np.ndarray:
        """The part map, from a PNG made when its .mat was read for the first time: decoding thousands is slow.

        A PNG is written under another name and then renamed, so a crash leaves no half of one; one that is older than
        its .mat, or does not fit it, is made again.
        """
        source, cached = self.path("human_parts", stem), self.cache_folder() / f"{stem}.png"
        if cached.is_file() and cached.stat().st_mtime >= source.stat().st_mtime:
            label = read_pixels(cached, "L").astype(np.int64)
            if label.shape == size:
                return label
        label = read_human_parts(source, size)
        cached.parent.mkdir(parents=True, exist_ok=True)
        save(cached, lambda f: Image.fromarray(label.astype(np.uint8)).save(f, "PNG"))
        return label

    def cache_folder(self) -> Path:
        """human_parts_png in the archive, or a folder of this user's cache if the archive cannot be written to."""
        if os.access(self.root, os.W_OK):
            return self.root / "human_parts_png"
        user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return user / "mtcp" / hashlib.sha256(str(self.root.resolve()).encode()).hexdigest()[:16]


def describe_missing(root: Path, layout: str, missing: dict[str, list[Path]], total: int) -> str:
    parts = [f"{key}: {len(files)} of {total} (first: {files[0].relative_to(root)})" for key, files in missing.items()]
    return f"files missing from {root} (layout {layout}): {'; '.join(parts)}. Get the whole archive, or drop the task"


def require_one_archive(train: DenseDataset, test: DenseDataset) -> None:
    """DataError if the two splits seem to come from different archives of NYUD-v2."""
    sizes = [read_pixels(d.path("image", d.stems[0]), "RGB").shape[:2] for d in (train, test)]
    if train.layout != test.layout or sizes[0] != sizes[1]:
        raise DataError(
            f"{train.root}: training images are {sizes[0]} ({train.layout}), test images {sizes[1]} ({test.layout}): "
            "the splits come from different archives; unpack one archive into an empty folder"
        )


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
    network would be shown that apparent size says nothing about depth. That is the literature's rule, and an
    approximation: who comes closer loses the same metres everywhere, while a division squashes the scene along the line
    of sight. Normals stay as they are, a few degrees off the squashed depth; notebooks/01_tasks_and_data.ipynb has it.
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


OUTSIDE = {"semseg": IGNORE_INDEX, "human_parts": IGNORE_INDEX, "sal": IGNORE_INDEX, "depth": 0, "normals": 0}


def rotate(sample: dict, degrees: float, scale: float = 1.0) -> dict:
    """Turn anticlockwise and enlarge by `scale` about the centre, at constant size; what comes from outside is ignored.

    A rolled camera sees the same depths, so depth is divided by the scale alone (see `zoom`), but "right" and "up" are
    now other directions: normals turn with the picture.
    """
    H, W = sample["image"].shape[-2:]
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    # For each pixel of the result, where it was. grid_sample counts -1…1 along both sides: H/W undoes the aspect ratio.
    matrix = torch.tensor([[cos, -sin * H / W, 0], [sin * W / H, cos, 0]], dtype=torch.float32) / scale
    grid = F.affine_grid(matrix[None], (1, 1, H, W), align_corners=False)
    outside = (grid.abs() > 1).any(dim=-1)[0]  # (H,W)
    turned = {key: x if key in ("name", "size") else _rotate_map(key, x, grid, outside) for key, x in sample.items()}
    if "depth" in sample:
        turned["depth"] = turned["depth"] / scale
    if "normals" in sample:
        x, y, z = turned["normals"]  # right, forward, up
        turned["normals"] = torch.stack([cos * x - sin * z, y, sin * x + cos * z])
    return turned


def _rotate_map(key: str, x: Tensor, grid: Tensor, outside: Tensor) -> Tensor:
    if key == "image":
        mean = MEAN.to(x.dtype)  # what is outside becomes 0 after normalisation
        return F.grid_sample((x - mean)[None], grid, align_corners=False)[0] + mean
    planes = x.reshape(1, -1, *x.shape[-2:]).float()
    planes = F.grid_sample(planes, grid, mode="nearest", align_corners=False)
    return planes.reshape(x.shape).to(x.dtype).masked_fill(outside, OUTSIDE[key])


def normalise(sample: dict) -> dict:
    return {**sample, "image": (sample["image"] - MEAN) / STD}


def augment(
    sample: dict, rng: np.random.Generator, scales: tuple, degrees: float, jitter: float, size: tuple[int, int] | None
) -> dict:
    """The training transform: zoom by one of `scales` or, if `degrees` > 0, rotate by up to that many and scale by
    anything between the first and the last of them; flip half of the time, jitter colours, resize to `size`."""
    if degrees > 0:
        sample = rotate(sample, rng.uniform(-degrees, degrees), rng.uniform(scales[0], scales[-1]))
    else:
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
    if key == "sal":
        # min: IGNORE_INDEX · 255 does not fit in a byte and would come out black
        return np.repeat(np.minimum(a[0] * 255, 255).astype(np.uint8)[..., None], 3, axis=2)
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


def check(kind: type[DenseDataset], root: Path, sheet: Path) -> int:
    """Read every file of both splits, print what is there, save a contact sheet; returns the number of problems."""
    problems, sizes, samples = [], set(), []
    for split in ("train", "val"):
        dataset = kind(root, split, complete=False)
        print(f"{split}: {len(dataset)} stems, layout {dataset.layout}")
        missing = dataset.missing()
        problems += [f"{split} {k}: {len(f)} of {len(dataset)} files missing, first {f[0]}" for k, f in missing.items()]
        absent = {path.stem for files in missing.values() for path in files}
        statistics = {task: Statistics(task, kind.classes.get(task)) for task in dataset.tasks}
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
    if kind is NYUD and len(sizes) > 1:
        problems.append(f"images have {len(sizes)} sizes, {sorted(sizes)}: files of different archives were mixed")
    if samples:
        keys = ["image", *kind.readers]
        contact_sheet(keys, [[picture(k, s[k]) for k in keys] for s in samples]).save(sheet)
        print(f"a few samples: {sheet}")
    print("\n".join(f"PROBLEM {p}" for p in problems) or "no problems")
    return len(problems)


class Statistics:
    """What `check` says about one task of one split."""

    def __init__(self, task: str, classes: tuple[str, ...] | None):
        self.task, self.classes, self.pixels, self.valid = task, classes, 0, 0
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
        if self.classes:
            self.histogram += np.bincount(label[valid], minlength=IGNORE_INDEX)
        if self.task == "depth":
            stored = read_array(path, 2)
            if not np.isfinite(stored).all() or (stored < 0).any() or stored.max() > 100:
                self.odd.append(path)

    def report(self) -> list[str]:
        """Prints a summary; returns the problems."""
        share = self.valid / max(self.pixels, 1)
        span = f", {self.low:.4g} to {self.high:.4g}" if np.isfinite(self.low) else ""
        print(f"  {self.task}: {share:.1%} of the pixels valid{span}")
        total = max(self.histogram.sum(), 1)
        for c in self.histogram.nonzero()[0]:
            print(f"    {c:3d} {self.classes[c]:16s} {self.histogram[c] / total:7.2%}")
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


def write_room(out: Path, stem: str, room: dict) -> None:
    """The files of NYUD_MT; the normals last (see Renderer)."""
    save(out / f"images/{stem}.jpg", lambda f: Image.fromarray(room["image"]).save(f, "JPEG", quality=95))
    save(out / f"segmentation/{stem}.png", lambda f: Image.fromarray(room["semseg"]).save(f, "PNG"))
    save(out / f"depth/{stem}.npy", lambda f: np.save(f, room["depth"]))
    save(out / f"normals/{stem}.npy", lambda f: np.save(f, room["normals"]))


# ======================================================================================================================
# Figures: people and things on clutter in the layout of PASCAL_MT, the stand-in for PASCAL-Context
#
#   (seed, index) → compose: things (person, car, …), lists of Shapes, far to near     unit: image height, any size
#   → paint_shapes: canvas (2H,2W,3), top (2H,2W) = number of the nearest shape        painter's algorithm
#   → image (H,W,3) = canvas averaged 2x2; labels (H,W) = look-ups in top, sampled [::2, ::2]
#
# Every label comes from the one map `top`, so the picture and its labels cannot disagree. A shape's class shows in its
# outline alone: all palettes are random and the clutter behind the things wears the same prints.
# ======================================================================================================================


# --- paints and polygons (unit: image height, y down) ----------------------------------------------------------------
@dataclass(frozen=True)
class Print:
    """A two-colour pattern over the picture."""

    pattern: str  # a key of PRINTS
    colours: np.ndarray  # (2, 3) in 0..1
    frequency: float  # radians per image height
    angle: float


@dataclass(frozen=True)
class Shape:
    polygon: np.ndarray  # (N, 2) x, y
    paint: Print
    part: str | None = None


@dataclass(frozen=True)
class Thing:
    class_name: str
    shapes: list[Shape]  # far to near


PRINTS = {  # u, v: rotated picture coordinates in radians -> share of the second colour, 0..1
    "flat": lambda u, v: 0 * u,
    "smooth": lambda u, v: 0.5 + 0.5 * np.sin(u / 8),
    "stripes": lambda u, v: np.sin(u) > 0,
    "checks": lambda u, v: np.sin(u) * np.sin(v) > 0,
    "dots": lambda u, v: np.sin(u) * np.sin(v) > 0.6,
    "waves": lambda u, v: 0.5 + 0.5 * np.sin(u + 2 * np.sin(v / 3)),
}


def skin_tone(rng) -> np.ndarray:
    light, dark = np.array([0.97, 0.83, 0.73]), np.array([0.30, 0.19, 0.13])
    return np.clip(light + (dark - light) * rng.random() + rng.normal(0, 0.02, 3), 0, 1)


def random_print(rng) -> Print:
    # One colour in five is a skin tone, on whatever object: else colour would find the people by itself.
    first, second = (skin_tone(rng) if rng.random() < 0.2 else rng.random(3) for _ in range(2))
    second = first + rng.uniform(0.2, 0.7) * (second - first)  # a pattern louder than the outlines hides them
    pattern = rng.choice(list(PRINTS)) if rng.random() < 0.6 else "flat"
    return Print(pattern, np.stack([first, second]), rng.uniform(40, 160), rng.uniform(0, np.pi))


def plain(colour) -> Print:
    return Print("flat", np.stack([colour, colour]), 0.0, 0.0)


def shade(paint: Print, factor: float) -> Print:
    return replace(paint, colours=np.clip(paint.colours * factor, 0, 1))


def colours_at(paint: Print, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Coordinates (...) -> RGB (..., 3)."""
    cos, sin = np.cos(paint.angle), np.sin(paint.angle)
    share = PRINTS[paint.pattern](paint.frequency * (cos * x + sin * y), paint.frequency * (cos * y - sin * x))
    return paint.colours[0] + share[..., None] * (paint.colours[1] - paint.colours[0])


def ellipse(x, y, rx, ry) -> np.ndarray:
    turn = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    return np.stack([x + rx * np.cos(turn), y + ry * np.sin(turn)], axis=1)


def capsule(start, end, start_radius, end_radius) -> np.ndarray:
    """A limb: half circles round both joints, joined by straight sides."""
    (x0, y0), (x1, y1) = start, end
    turn = np.arctan2(y1 - y0, x1 - x0) + np.linspace(np.pi / 2, 3 * np.pi / 2, 9)
    arc = np.stack([np.cos(turn), np.sin(turn)], axis=1)
    return np.concatenate([[x0, y0] + start_radius * arc, [x1, y1] - end_radius * arc])


def mirrored(outline) -> np.ndarray:
    """The right half of a symmetric outline, top to bottom -> the whole polygon."""
    right = np.array(outline, float)
    return np.concatenate([right, right[::-1] * [-1, 1]])


def placed(thing: Thing, x: float, ground: float, size: float, flip: int = 1) -> Thing:
    """Scales (and for flip = -1 mirrors) a thing and stands its lowest point on `ground`."""
    lowest = max(shape.polygon[:, 1].max() for shape in thing.shapes)
    return Thing(
        thing.class_name,
        [
            replace(shape, polygon=(shape.polygon - [0, lowest]) * [size * flip, size] + [x, ground])
            for shape in thing.shapes
        ],
    )


# --- people (unit: a person's height, hips at the origin) ------------------------------------------------------------
# yaw turns the body: 0 faces the viewer, +90 degrees the picture's right, 180 away. The person's left is at the
# picture's right only while they face us; side = +1 is the person's left and -1 the right, as in PASCAL-Part's names.
FACE = (
    ("lear", 1.5, 0.1, 0.30),
    ("rear", -1.5, 0.1, 0.30),
    ("leye", 0.5, -0.1, 0.17),
    ("reye", -0.5, -0.1, 0.17),
    ("nose", 0.0, 0.2, 0.15),
    ("mouth", 0.0, 0.55, 0.25),
)  # part, azimuth, height and radius in head radii


def limb(start, segments, angles, yaw: float, side: int) -> list[Shape]:
    """Chains (part, length, radius, paint) segments; angles: one (swing forward, spread outward) for each."""
    shapes = []
    for (part, length, radius, paint), (swing, spread) in zip(segments, angles, strict=True):
        forward, outward, down = np.sin(swing), np.cos(swing) * np.sin(spread), np.cos(swing) * np.cos(spread)
        end = start + length * np.array([forward * np.sin(yaw) + side * outward * np.cos(yaw), down])
        shapes.append(Shape(capsule(start, end, radius, 0.8 * radius), paint, "lr"[side < 0] + part))
        start = end
    return shapes


def arm(rng, shoulder, yaw, side, sleeve: Print, forearm: Print, skin: Print) -> list[Shape]:
    swing, spread = rng.uniform(-0.7, 0.9), rng.uniform(0.1, 2.6 if rng.random() < 0.3 else 0.7)
    below = swing + rng.uniform(0, 1.6), spread + rng.uniform(-0.6, 0.6)  # elbows bend forward only
    segments = ("uarm", 0.17, 0.048, sleeve), ("larm", 0.15, 0.042, forearm), ("hand", 0.05, 0.040, skin)
    return limb(shoulder, segments, [(swing, spread), below, below], yaw, side)


def leg(rng, hip, yaw, side, sitting: bool, trouser: Print, shin: Print, shoe: Print) -> list[Shape]:
    swing, spread = rng.uniform(1.1, 1.6) if sitting else rng.uniform(-0.6, 0.7), rng.uniform(0.02, 0.3)
    below = swing - rng.uniform(*(1.0, 1.7) if sitting else (0.0, 0.8))  # knees bend backward only
    segments = ("uleg", 0.24, 0.064, trouser), ("lleg", 0.23, 0.048, shin), ("foot", 0.08, 0.034, shoe)
    return limb(hip, segments, [(swing, spread), (below, spread), (below + 1.3, spread)], yaw, side)


def head(rng, chin, yaw: float, skin: Print, hair: Print) -> list[Shape]:
    x, y, rx, ry = chin[0], chin[1] - 0.07, 0.068, 0.085
    length = rng.choice([0.0, 0.05])  # short or long hair
    crown = Shape(ellipse(x - 0.015 * np.sin(yaw), y - 0.012 + length, 1.15 * rx, 1.05 * ry + length), hair, "hair")
    face = Shape(ellipse(x + 0.02 * np.sin(yaw), y + 0.015, 0.92 * rx, 0.88 * ry), skin, "head")
    paints = {"leye": plain(rng.random(3) * 0.3), "mouth": plain([0.6, 0.15, 0.15])}
    paints["reye"] = paints["leye"]
    features = [
        Shape(
            ellipse(x + rx * np.sin(yaw + azimuth), y + ry * up, rx * radius, 0.8 * rx * radius),
            paints.get(part, shade(skin, 0.8)),
            part,
        )
        for part, azimuth, up, radius in FACE
        if np.cos(yaw + azimuth) > -0.2
    ]
    return [crown, face, *features] if np.cos(yaw) > -0.3 else [face, crown]


def person(rng) -> Thing:
    yaw = rng.choice([rng.normal(0, 0.6), rng.uniform(-np.pi, np.pi)])  # half of them roughly face the camera
    skin, top, trousers, shoe = plain(skin_tone(rng)), *(random_print(rng) for _ in range(3))
    forearm, shin = (skin if rng.random() < 0.5 else cloth for cloth in (top, trousers))
    lean, sitting, broad = rng.normal(0, 0.12), rng.random() < 0.15, abs(np.cos(yaw))
    across, up = np.array([np.cos(lean), np.sin(lean)]), np.array([np.sin(lean), -np.cos(lean)])

    outline = mirrored(
        [
            (0.03, 0.33),
            (0.05 + 0.06 * broad, 0.30),
            (0.065 + 0.07 * broad, 0.26),
            (0.055 + 0.045 * broad, 0.1),
            (0.06 + 0.055 * broad, -0.02),
        ]
    )  # across, up
    torso = Shape(outline[:, :1] * across + outline[:, 1:] * up, top, "torso")
    neck = Shape(capsule(0.28 * up, 0.38 * up, 0.036, 0.034), shade(skin, 0.85), "neck")
    arms, legs = {}, {}
    near = -1 if np.sin(yaw) > 0 else 1  # turned right shows us the right side
    for side in (-near, near):
        light = 1.0 if side == near else 0.8  # tells crossing limbs apart
        paints = [shade(paint, light) for paint in (top, forearm, skin, trousers, shin, shoe)]
        left = side * np.cos(yaw) * across
        arms[side] = arm(rng, 0.27 * up + (0.02 + 0.1 * broad) * left, yaw, side, *paints[:3])
        legs[side] = leg(rng, 0.065 * left, yaw, side, sitting, *paints[3:])
    return Thing(
        "person",
        [
            *arms[-near],
            neck,
            torso,
            *legs[-near],
            *legs[near],
            *head(rng, 0.37 * up, yaw, skin, random_print(rng)),
            *arms[near],
        ],
    )


# --- other classes (unit: about the thing's longer side) -------------------------------------------------------------
def car(rng) -> Thing:
    body, glass, tyre, hub = (random_print(rng) for _ in range(4))
    roof, rear, front = -rng.uniform(0.36, 0.48), -rng.uniform(0.12, 0.36), rng.uniform(0.02, 0.16)
    outline = [
        (-0.5, -0.08),
        (-0.5, -0.25),
        (rear - 0.1, -0.27),
        (rear, roof),
        (front, roof),
        (front + 0.15, -0.27),
        (0.46, -0.23),
        (0.5, -0.18),
        (0.5, -0.08),
    ]
    window = [(rear - 0.05, -0.27), (rear + 0.02, roof + 0.03), (front, roof + 0.03), (front + 0.1, -0.27)]
    pillar = (rear + front) / 2
    shapes = [
        Shape(np.array(outline), body),
        Shape(np.array(window), glass, "window_1"),
        Shape(capsule((pillar, roof + 0.03), (pillar, -0.27), 0.02, 0.02), body),
    ]
    for part, x in (("fwheel", 0.3), ("bwheel", -0.3)):
        shapes += [Shape(ellipse(x, -0.08, 0.095, 0.095), tyre, part), Shape(ellipse(x, -0.08, 0.05, 0.05), hub, part)]
    return Thing("car", shapes)


def bottle(rng) -> Thing:
    glass, label, cap = (random_print(rng) for _ in range(3))
    width, neck, shoulder = rng.uniform(0.11, 0.17), rng.uniform(0.035, 0.055), -rng.uniform(0.5, 0.62)
    outline = [(neck, -0.95), (neck, shoulder - 0.17), (0.8 * width, shoulder - 0.06), (width, shoulder), (width, 0)]
    tag = [(width, shoulder + 0.06), (width, shoulder + rng.uniform(0.2, 0.35))]
    lid = [(neck + 0.01, -1.0), (neck + 0.01, -0.92)]
    return Thing(
        "bottle",
        [
            Shape(mirrored(outline), glass, "body"),
            Shape(mirrored(tag), label, "body"),
            Shape(mirrored(lid), cap, "cap"),
        ],
    )


def chair(rng) -> Thing:
    """Seen from the front at an angle; one sees through the back, as with PASCAL's chairs. PASCAL-Part has no parts."""
    wood, cushion = random_print(rng), random_print(rng)
    width, depth, seat, bar = rng.uniform(0.4, 0.5), rng.uniform(0.12, 0.22), -rng.uniform(0.42, 0.5), 0.03
    back = np.array([depth, -0.6 * depth])  # from the front edge to the back edge
    corners = np.array([[0, seat], [width, seat], [width, seat] + back, [0, seat] + back]) - [width / 2, 0]
    tops = corners[[3, 2]] - [0, rng.uniform(0.42, 0.52)]
    feet = [(corner, corner * [1, 0] + [0, dy]) for corner, dy in zip(corners, (0, 0, back[1], back[1]), strict=True)]
    posts = list(zip(corners[[3, 2]], tops, strict=True))
    rails = [
        (corners[3] + (tops[0] - corners[3]) * t, corners[2] + (tops[1] - corners[2]) * t)
        for t in np.linspace(rng.uniform(0.3, 0.6), 1, rng.integers(2, 5))
    ]
    bars = [Shape(capsule(start, end, bar, bar), wood) for start, end in feet[2:] + rails + posts + feet[:2]]
    return Thing("chair", [*bars[:-2], Shape(corners, cushion), *bars[-2:]])


def dog(rng) -> Thing:
    fur, marking = random_print(rng), random_print(rng)
    far = shade(fur, 0.75)
    shoulder, rump = np.array([0.25, -0.38]), np.array([-0.28, -0.36])
    face = shoulder + [rng.uniform(0.1, 0.2), -rng.uniform(0.1, 0.24)]
    snout, ear = face + [0.15, rng.uniform(0, 0.06)], face + [-0.06, rng.choice([-0.13, 0.1])]  # pricked or hanging

    def paw(part, hip, paint):
        return Shape(capsule(hip, [hip[0] + rng.uniform(-0.12, 0.12), -0.03], 0.065, 0.04), paint, part)

    return Thing(
        "dog",
        [
            paw("lfleg", shoulder, far),
            paw("lbleg", rump, far),
            Shape(capsule(rump, rump + [-rng.uniform(0.1, 0.2), -rng.uniform(-0.1, 0.2)], 0.04, 0.02), fur, "tail"),
            Shape(capsule(rump, shoulder, 0.12, 0.14), fur, "torso"),
            Shape(capsule(shoulder, face, 0.1, 0.07), fur, "neck"),
            paw("rfleg", shoulder, fur),
            paw("rbleg", rump, fur),
            Shape(ellipse(*face, 0.1, 0.09), fur, "head"),
            Shape(capsule(face, snout, 0.06, 0.045), marking, "muzzle"),
            Shape(capsule(face - [0.03, 0.03], ear, 0.045, 0.025), marking, "rear"),
            Shape(ellipse(*(snout + [0.03, -0.02]), 0.025, 0.02), far, "nose"),
            Shape(ellipse(*(face + [0.03, -0.03]), 0.015, 0.015), shade(marking, 0.3), "reye"),
        ],
    )


def pottedplant(rng) -> Thing:
    pot, leaf = random_print(rng), random_print(rng)
    width, slim = rng.uniform(0.16, 0.22), rng.uniform(0.1, 0.2)
    blade = mirrored([(0, 1), (slim * 0.6, 0.7), (slim * 0.5, 0.4), (0.02, 0)])  # root to tip, length 1
    shapes = []
    for angle in rng.permutation(np.linspace(-1.3, 1.3, rng.integers(6, 11))):
        along, across = np.array([np.sin(angle), -np.cos(angle)]), np.array([np.cos(angle), np.sin(angle)])
        polygon = rng.uniform(0.45, 0.68) * (blade[:, :1] * across + blade[:, 1:] * along) + [0, -0.33]
        shapes.append(Shape(polygon, shade(leaf, rng.uniform(0.7, 1.2)), "plant"))
    rim = mirrored([(width + 0.03, -0.38), (width + 0.03, -0.3)])
    shapes += [Shape(mirrored([(width, -0.34), (0.7 * width, 0)]), pot, "pot"), Shape(rim, shade(pot, 1.2), "pot")]
    return Thing("pottedplant", shapes)


OTHERS = ((car, 0.75, 1.3), (bottle, 0.4, 0.9), (chair, 0.5, 0.9), (dog, 0.5, 0.95), (pottedplant, 0.5, 0.9))  # sizes


# --- a scene and its labels ------------------------------------------------------------------------------------------
def compose(rng, aspect: float) -> list[Thing]:
    """Up to three people and up to three other things side by side, far to near; no scene is empty."""
    people = rng.choice(4, p=[0.25, 0.42, 0.22, 0.11])
    others = rng.choice(3, p=[0.4, 0.4, 0.2]) if people else rng.integers(1, 4)
    slots = (rng.permutation(people + others) + rng.uniform(0.1, 0.9, people + others)) / (people + others) * aspect
    things = []  # (ground, thing)
    for x in slots[:people]:
        close = rng.random() < 0.2  # cut by the lower border
        size, ground = rng.uniform([0.9, 1.1], [1.2, 1.4]) if close else rng.uniform([0.6, 0.85], [1.0, 1.02])
        figure = placed(person(rng), x, ground, size)
        if rng.random() < 0.1:  # PASCAL-Part leaves some people out
            figure = replace(figure, shapes=[replace(shape, part=None) for shape in figure.shapes])
        things.append((ground, figure))
    for x in slots[people:]:
        make, smallest, largest = OTHERS[rng.integers(len(OTHERS))]
        ground = rng.uniform(0.7, 1.05)
        things.append((ground, placed(make(rng), x, ground, rng.uniform(smallest, largest), rng.choice([-1, 1]))))
    return [thing for _, thing in sorted(things, key=lambda pair: pair[0])]  # who stands lower is nearer


def faded(paint: Print) -> Print:
    return replace(paint, colours=0.55 + 0.35 * (paint.colours - 0.5))


def clutter(rng, aspect: float) -> list[Shape]:
    """Wall, floor, and blobs, bars and polygons that are no object; paler than the things, as if out of focus."""
    horizon = rng.uniform(0.3, 0.9)
    wall, floor = (np.array([(0, y), (aspect, y), (aspect, y + 1), (0, y + 1)]) for y in (0, horizon))
    shapes = [Shape(wall, faded(random_print(rng))), Shape(floor, faded(random_print(rng)))]
    for _ in range(rng.integers(2, 9)):
        (x, y), (rx, ry) = rng.uniform(0, [aspect, 1]), rng.uniform(0.02, 0.2, 2)
        outline = (
            ellipse(x, y, rx, ry),
            capsule([x, y], [x + 3 * rx - 0.3, y + 3 * ry - 0.3], 0.03, 0.03),
            [x, y] + rng.normal(0, 0.1, (rng.integers(3, 6), 2)),
        )[rng.integers(3)]
        shapes.append(Shape(outline, faded(random_print(rng))))
    return shapes


def paint_shapes(shapes: list[Shape], height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """-> canvas (height, width, 3) in 0..1, top (height, width): the visible shape, counted from 1 (0 = none)."""
    y, x = (np.indices((height, width)) + 0.5) / height
    canvas, top = np.zeros((height, width, 3)), np.zeros((height, width), np.int32)
    for number, shape in enumerate(shapes, 1):
        stencil = Image.new("L", (width, height))
        ImageDraw.Draw(stencil).polygon((shape.polygon * height - 0.5).ravel().tolist(), fill=1)
        covered = np.asarray(stencil) > 0
        canvas[covered] = colours_at(shape.paint, x[covered], y[covered])
        top[covered] = number
    return canvas, top


def photograph(rng, canvas: np.ndarray) -> np.ndarray:
    """(2H, 2W, 3) -> (H, W, 3) uint8: a light from one side, contrast, 2x2 averaging, sensor noise."""
    height, width = canvas.shape[0] // 2, canvas.shape[1] // 2
    y, x = np.mgrid[-1 : 1 : 2j * height, -1 : 1 : 2j * width][..., None]
    (slope_x, slope_y), gain, contrast = rng.normal(0, 0.15, 2), rng.uniform(0.7, 1.15), rng.uniform(0.6, 1.1)
    lit = ((canvas - 0.5) * contrast + 0.5) * gain * (1 + slope_x * x + slope_y * y)
    image = lit.reshape(height, 2, width, 2, 3).mean(axis=(1, 3))
    # The noise is the only draw whose count depends on the size; drawn last, it leaves the scene the same at any size.
    image += rng.normal(0, rng.uniform(0.01, 0.03), image.shape)
    return (255 * np.clip(image, 0, 1)).round().astype(np.uint8)


def soft_map(rng, salient: np.ndarray) -> np.ndarray:
    """(H, W) bool -> uint8 that looks distilled: never quite 0 or 255, soft at the outline; > 127 is still the mask."""
    blurred = Image.fromarray(255 * salient.astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.008 * len(salient)))
    low, high = rng.uniform(0, 20), rng.uniform(230, 255)
    return (low + (high - low) / 255 * np.asarray(blurred, float)).round().astype(np.uint8)


def semantic_map(things: list[Thing], owner: np.ndarray) -> np.ndarray:
    """(H, W) number of the visible thing -> (H, W) uint8 VOC class, with VOC's ignored band (1 pixel) on outlines."""
    semseg = np.array([0, *(VOC_CLASSES.index(thing.class_name) for thing in things)], np.uint8)[owner]
    semseg[:, :-1][owner[:, :-1] != owner[:, 1:]] = IGNORE_INDEX
    semseg[:-1][owner[:-1] != owner[1:]] = IGNORE_INDEX
    return semseg


def annotate(thing: Thing, first: int, top: np.ndarray) -> dict:
    """What is visible in top (H, W) of a thing whose shapes are numbered from `first`, as PASCAL-Part says it."""
    numbers = {}  # part -> its shapes
    for number, shape in enumerate(thing.shapes, first):
        numbers.setdefault(shape.part, []).append(number)
    parts = [(part, np.isin(top, numbers[part]).astype(np.uint8)) for part in numbers if part]
    whole = (top >= first) & (top < first + len(thing.shapes))
    return {
        "class_name": thing.class_name,
        "class_index": VOC_CLASSES.index(thing.class_name),
        "mask": whole.astype(np.uint8),
        "parts": [(part, mask) for part, mask in parts if mask.any()],
    }


def salient_mask(objects: list[dict]) -> np.ndarray:
    """All people or, where there are none, the thing that covers most -> (H, W) bool."""
    people = [thing["mask"] for thing in objects if thing["class_index"] == PERSON]
    return np.any(people or [max((thing["mask"] for thing in objects), key=np.sum)], axis=0)


def render_figures(seed: int, index: int, height: int, width: int) -> dict:
    """One picture and its labels, the same for the same (seed, index), and the same scene at any size.

    image (H, W, 3) uint8 RGB; semseg (H, W) uint8, VOC class, 255 = ignore; saliency (H, W) uint8, salient > 127;
    objects: a dict for every visible thing, far to near: {class_name, class_index, mask: (H, W) uint8 0/1 of its
    visible pixels, parts: [(name, mask (H, W) uint8 0/1), ...]}, parts empty for one person in ten and for chairs.
    """
    rng = np.random.default_rng((seed, index))
    things, background = compose(rng, width / height), clutter(rng, width / height)
    shapes = background + [shape for thing in things for shape in thing.shapes]
    canvas, top = paint_shapes(shapes, 2 * height, 2 * width)
    top = top[::2, ::2]  # labels cannot be averaged: sample

    starts = np.cumsum([len(background) + 1, *(len(thing.shapes) for thing in things)])  # first shape of each
    owner = np.searchsorted(starts[:-1], top, side="right")  # 0 = background, k = things[k - 1]
    objects = [annotate(thing, start, top) for thing, start in zip(things, starts[:-1], strict=True)]
    saliency = soft_map(rng, salient_mask(objects))
    return {
        "image": photograph(rng, canvas),
        "semseg": semantic_map(things, owner),
        "saliency": saliency,
        "objects": [thing for thing in objects if thing["mask"].any()],
    }


# --- PASCAL-Part's .mat -----------------------------------------------------------------------------------------------


def struct_array(fields: str, rows: list[tuple]) -> np.ndarray:
    """A MATLAB 1xN struct array; none at all is MATLAB's [], as in the real files."""
    if not rows:
        return np.zeros((0, 0))
    array = np.empty((1, len(rows)), dtype=[(field, object) for field in fields.split()])
    for column, row in enumerate(rows):
        array[0, column] = row
    return array


def write_part_mat(file, stem: str, objects: list[dict]) -> None:
    """Writes `objects` (see `render_figures`) into an open file as PASCAL-Part does: anno.objects(n).parts(m)."""
    rows = [
        (
            thing["class_name"],
            float(thing["class_index"]),
            thing["mask"],
            struct_array("part_name mask", thing["parts"]),
        )
        for thing in objects
    ]
    anno = {"imname": stem, "objects": struct_array("class class_ind mask parts", rows)}
    buffer = io.BytesIO()
    scipy.io.savemat(buffer, {"anno": anno}, do_compression=True)
    # A MAT-file opens with 116 bytes of free text, where scipy puts the time of day: that must go for equal bytes.
    file.write(b"MATLAB 5.0 MAT-file, rendered figures".ljust(116) + buffer.getvalue()[116:])


def write_figures(out: Path, stem: str, scene: dict) -> None:
    """The files of PASCAL_MT; the saliency last (see Renderer)."""
    save(out / f"JPEGImages/{stem}.jpg", lambda f: Image.fromarray(scene["image"]).save(f, "JPEG", quality=95))
    save(out / f"semseg/VOC12/{stem}.png", lambda f: Image.fromarray(scene["semseg"]).save(f, "PNG"))
    save(out / f"human_parts/{stem}.mat", lambda f: write_part_mat(f, stem, scene["objects"]))
    save(out / f"sal_distill/{stem}.png", lambda f: Image.fromarray(scene["saliency"]).save(f, "PNG"))


# ======================================================================================================================
# Rendered sets on disk
# ======================================================================================================================


@dataclass(frozen=True)
class Renderer:
    version: int  # raised when other pictures are drawn, so that an older set is not taken for a new one
    render: Callable  # (seed, index, height, width) → scene
    write: Callable  # (folder, stem, scene)
    kind: type[DenseDataset]
    folders: tuple[str, ...]
    last: str  # pattern of the file that `write` writes last: where it exists, the others do


RENDERERS = {
    "rooms": Renderer(
        1, render_room, write_room, NYUD,
        ("gt_sets", "images", "segmentation", "depth", "normals"), "normals/{}.npy",
    ),
    "figures": Renderer(
        1, render_figures, write_figures, PASCAL,
        ("ImageSets/Context", "JPEGImages", "semseg/VOC12", "human_parts", "sal_distill"), "sal_distill/{}.png",
    ),
}  # fmt: skip


def render_set(name: str, out: Path, train: int = 800, val: int = 200, size: tuple = (96, 128), seed: int = 0) -> None:
    """Render train + val scenes of RENDERERS[name] into `out`. Same arguments, same bytes.

    A set cut short is finished by the next call; a complete one is left as it is. Raises DataError if `out` holds a set
    with other arguments, or something else: nothing is overwritten.
    """
    renderer = RENDERERS[name]
    wanted = {"scenes": name, "version": renderer.version, "seed": seed, "size": list(size), "train": train, "val": val}
    found = read_marker(out)
    complete = found is not None and found.pop("complete")
    if found is not None and found != wanted:
        raise DataError(f"{out} holds {found}, wanted {wanted}: delete the folder or choose another one")
    if complete:
        return
    for folder in renderer.folders:
        (out / folder).mkdir(parents=True, exist_ok=True)
    save(out / "rendered.json", lambda f: f.write(json.dumps({**wanted, "complete": False}).encode()))
    stems = [f"{name}_{i:05d}" for i in range(train + val)]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        jobs = pool.map(partial(write_scene, name, out, seed, size), range(len(stems)), stems, chunksize=8)
        list(tqdm(jobs, total=len(stems), desc=f"rendering {out}"))
    for split, part in (("train", stems[:train]), ("val", stems[train:])):
        save(out / renderer.kind.lists.format(split), lambda f, part=part: f.write("\n".join(part).encode()))
    save(out / "rendered.json", lambda f: f.write(json.dumps({**wanted, "complete": True}).encode()))


def write_scene(name: str, out: Path, seed: int, size: tuple, index: int, stem: str) -> None:
    renderer = RENDERERS[name]
    if not (out / renderer.last.format(stem)).exists():
        renderer.write(out, stem, renderer.render(seed, index, *size))


def ensure_set(name: str, out: Path) -> None:
    """A whole set of scenes in `out`: the one there, finished if it was only begun, or else the default set."""
    found = read_marker(out)
    if found is None:
        render_set(name, out)
        return
    try:
        train, val, seed, size = int(found["train"]), int(found["val"]), int(found["seed"]), tuple(found["size"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{out}/rendered.json is damaged ({error}): delete {out}, it will be rendered anew") from error
    render_set(name, out, train, val, size, seed)


def read_marker(out: Path) -> dict | None:
    """What rendered.json says of a set, None if `out` is empty. DataError: `out` holds something else."""
    if not out.exists() or not any(out.iterdir()):
        return None
    try:
        found = json.loads((out / "rendered.json").read_text())
        return {**found, "complete": bool(found["complete"])}
    except (OSError, ValueError, TypeError, KeyError):
        raise DataError(f"{out} is not empty and has no valid rendered.json: render into another folder") from None


def save(path: Path, write) -> None:
    """write(file) into a temporary file, then rename: `path` is either whole or absent, also after a crash."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "wb") as file:
        write(file)
    os.replace(temporary, path)


# ======================================================================================================================
# Command line
# ======================================================================================================================


DATASETS = {"nyud": NYUD, "rooms": NYUD, "pascal": PASCAL, "figures": PASCAL}


def main() -> int:
    parser = argparse.ArgumentParser(description="Render a stand-in dataset, or check an archive.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, layout in (("rooms", "NYUD_MT"), ("figures", "PASCAL_MT")):
        render = commands.add_parser(name, help=f"render {name} in the layout of {layout}")
        render.add_argument("--out", type=Path, default=Path("data") / name)
        render.add_argument("--train", type=int, default=800, help="images in the training split")
        render.add_argument("--val", type=int, default=200)
        render.add_argument("--size", type=int, nargs=2, default=(96, 128), metavar=("H", "W"))
        render.add_argument("--seed", type=int, default=0)
    checker = commands.add_parser("check", help="read every file; exit status 1 if anything is wrong")
    checker.add_argument("--dataset", choices=list(DATASETS), default="nyud")
    checker.add_argument("--root", type=Path, required=True)
    checker.add_argument("--sheet", type=Path, default=None, help="contact sheet, default check_DATASET.png")
    args = parser.parse_args()
    try:
        if args.command == "check":
            sheet = args.sheet or Path(f"check_{args.dataset}.png")
            return 1 if check(DATASETS[args.dataset], args.root, sheet) else 0
        if min(args.train, args.val, *args.size) < 1 or args.seed < 0:
            raise DataError("--train, --val and --size take positive numbers, --seed one that is not negative")
        render_set(args.command, args.out, args.train, args.val, tuple(args.size), args.seed)
        print(f"{args.train} + {args.val} {args.command} in {args.out}")
        return 0
    except DataError as error:
        print(error, file=sys.stderr)
        return 1 if args.command == "check" else 2


if __name__ == "__main__":
    sys.exit(main())
