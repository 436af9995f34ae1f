"""Train and evaluate MT-CP. One script, one loop, in plain sight: `main` follows a batch from disk to optimiser step.

    python train.py                                          rendered rooms, toy preset: minutes on a laptop's CPU
    python train.py --dataset nyud --root DIR --mask2former DIR --amp               NYUD-v2, paper preset, on a GPU
    python train.py --dataset figures                        rendered people and things: segmentation, parts, saliency
    python train.py --model single                           one network per task; later runs print Δm against it
    python train.py --balancer equal --no-cfm --no-trace-back                       switch off what the paper adds
    python train.py --out runs/mine; python train.py --out runs/mine --resume       go on where a run was cut off
    python train.py --eval runs/mine/best.pt                                        evaluate a checkpoint

A run folder holds config.json (all arguments), log.jsonl (a line per epoch), last.pt and best.pt, metrics.json (final
figures on the test split) and predictions.png.
"""

import argparse
import json
import math
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from huggingface_hub.utils import HfHubHTTPError
from torch import Tensor
from tqdm import tqdm

import data
import mtcp
from mtcp import IGNORE_INDEX, MTCP, Task

# ======================================================================================================================
# Arguments
# ======================================================================================================================


@dataclass(frozen=True)
class Recipe:
    """What goes with a dataset; most of it are defaults of flags."""

    kind: type[data.DenseDataset]
    tasks: tuple[Task, ...]
    preset: str
    root: str | None
    epochs: int
    batch_size: int
    lr: float
    kappa: float  # spread of the LPS weights
    warmup: int  # steps
    scales: tuple[float, ...]  # of the random zoom
    degrees: float  # of the random rotation, either way
    jitter: float  # colour factors are drawn from 1 ± jitter
    size: tuple[int, int] | None = None  # to which images are resized; None: as they are


RECIPES = {
    # From scratch in a few minutes: a large learning rate, a warm-up to survive it, small batches for more steps, and
    # no zoom, since a few epochs are too few to tire of the images. κ = 7.5 is too jumpy where epochs are that few.
    "rooms": Recipe(data.NYUD, mtcp.NYUD, "toy", "data/rooms", 5, 4, 2e-3, 1.6, 100, (1.0,), 0, 0.1),
    "figures": Recipe(data.PASCAL, mtcp.PASCAL, "toy", "data/figures", 5, 4, 2e-3, 1.6, 100, (1.0,), 0, 0.1),
    # The authors' released recipes, which start from pretrained weights.
    "nyud": Recipe(data.NYUD, mtcp.NYUD, "paper", None, 100, 2, 5e-5, 7.5, 0, (1.0, 1.2, 1.5), 0, 0.0),
    "pascal": Recipe(data.PASCAL, mtcp.PASCAL, "paper", None, 100, 2, 5e-5, 1.6, 0, (0.75, 1.25), 20, 0.0, (512, 512)),
}
WEIGHT_DECAY = 1e-4
CLIP_NORM = 5.0  # gradients longer than this are shortened to it
POLY_POWER = 0.9


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--dataset", choices=list(RECIPES), help="default: rooms")
    p.add_argument("--root", help="folder of the dataset; rooms and figures are rendered there if absent")
    p.add_argument(
        "--preset", choices=list(mtcp.PRESETS), help="sizes of the network (rooms, figures: toy; nyud, pascal: paper)"
    )
    p.add_argument("--backbone", metavar="NAME", help="another backbone than the preset's, by timm's name for it")
    p.add_argument("--queries", type=int, metavar="N", help="another number of queries than the preset's")
    start = p.add_mutually_exclusive_group()
    start.add_argument("--mask2former", type=Path, metavar="PATH",
                       help="start from a Mask2Former-Swin of Hugging Face: a folder or file")  # fmt: skip
    start.add_argument(
        "--pretrained", action="store_true", help="start the backbone from the weights timm publishes for it (download)"
    )
    start.add_argument("--backbone-weights", type=Path, metavar="FILE",
                       help="start the backbone from a local file: timm's, or an original Swin checkpoint")  # fmt: skip
    start.add_argument("--from-scratch", action="store_true", help="start from random weights; the toy preset does")
    p.add_argument("--model", choices=["mtcp", "baseline", "single"], default="mtcp",
                   help="baseline: no CFM, no trace-back; single: a baseline for every task alone")  # fmt: skip
    p.add_argument("--single", type=Path, metavar="METRICS", help="metrics.json of a single run, to compute Δm against")
    p.add_argument("--tasks", nargs="+", metavar="TASK", help="some of the dataset's tasks (default: all)")
    p.add_argument("--no-cfm", dest="cfm", action="store_false", help="tasks do not exchange features")
    p.add_argument("--no-trace-back", dest="trace_back", action="store_false", help="decode X_hat directly")
    p.add_argument("--cfm-stride", type=int, default=None, help="pool the keys and values of CFM (1 = exact)")
    p.add_argument("--balancer", choices=["lps", "equal", "uncertainty", "dwa"], default="lps")
    p.add_argument("--no-log", dest="log", action="store_false", help="LPS without its logarithm")
    p.add_argument("--no-prioritise", dest="prioritise", action="store_false", help="LPS without its weights")
    p.add_argument("--kappa", type=float, help="spread of the LPS weights (nyud: 7.5, others: 1.6)")
    p.add_argument("--epochs", type=int)
    p.add_argument("--batch-size", type=int)
    p.add_argument("--lr", type=float, help="of AdamW, at its highest")
    p.add_argument(
        "--size",
        type=int,
        nargs=2,
        metavar=("H", "W"),
        help="resize images to this (pascal: 512 512, others: as they are)",
    )
    p.add_argument("--holdout", type=float, default=0.05, help="share of the training split that chooses best.pt")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--workers", type=int, default=2, help="processes that load data; 0: none beside this one")
    p.add_argument("--device", help="cpu, cuda, mps, … (default: the best there is)")
    p.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    p.add_argument("--out", type=Path, help="run folder (default: runs/DATASET-N, N counting up)")
    p.add_argument("--resume", action="store_true", help="go on from last.pt in --out")
    p.add_argument("--eval", type=Path, metavar="CHECKPOINT", help="evaluate only")
    args = p.parse_args(argv)
    return fill_in(args, p)


def fill_in(args: argparse.Namespace, parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Defaults from the checkpoint to evaluate or the dataset's recipe, and one clear sentence for what cannot work."""
    if args.eval is not None:
        saved = load_checkpoint(args.eval)["args"]
        for key in ("dataset", "root", "size", "preset", "tasks", "backbone", "queries"):
            if getattr(args, key) is None:
                setattr(args, key, saved[key])
    args.dataset = args.dataset or "rooms"
    recipe = RECIPES[args.dataset]
    for key in ("root", "preset", "epochs", "batch_size", "lr", "kappa", "size"):
        if getattr(args, key) is None:
            setattr(args, key, getattr(recipe, key))
    names = [t.name for t in recipe.tasks]
    args.tasks = args.tasks or names
    unknown = [t for t in args.tasks if t not in names]
    if unknown or len(set(args.tasks)) < len(args.tasks):
        parser.error(f"--tasks takes different ones of {' '.join(names)}, not {' '.join(args.tasks)}")
    if args.root is None:
        parser.error(
            f"--dataset {args.dataset} needs --root, the folder of the archive;\n{recipe.kind.help.format(root='it')}"
        )
    positive = (args.epochs, args.batch_size, *(args.size or []), *([] if args.queries is None else [args.queries]))
    if min(positive) < 1 or args.lr <= 0 or args.workers < 0 or args.seed < 0:
        parser.error(
            "--epochs, --batch-size, --size, --queries and --lr take positive numbers; --workers and --seed 0 or more"
        )
    if args.backbone is not None and not timm.is_model(args.backbone):
        parser.error(
            f"--backbone {args.backbone} is no model of timm {timm.__version__}; timm.list_models() has them all"
        )
    require_start(args, parser)
    if not 0 <= args.holdout < 1:
        parser.error("--holdout is a share of the training split, at least 0 and less than 1")
    if args.resume and args.out is None:
        parser.error("--resume needs --out, the folder of the run to go on with")
    if args.model != "mtcp":
        args.cfm = args.trace_back = False
    if args.model == "single" and (args.resume or args.eval):
        parser.error(
            "--model single trains several networks: --resume and --eval go with one of its folders, as baseline"
        )
    args.device = args.device or best_device()
    return args


def require_start(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Stops a run that would begin from random weights without anybody having said so. The toy preset may."""
    chosen = args.mask2former or args.pretrained or args.backbone_weights or args.from_scratch
    if args.preset != "toy" and not (chosen or args.resume or args.eval):
        parser.error(
            f"preset {args.preset} from random weights reaches none of the published figures. Where shall it start?\n"
            "  --mask2former PATH       a Mask2Former trained on ADE20K, as the paper does\n"
            "  --pretrained             the weights timm publishes for the backbone\n"
            "  --backbone-weights FILE  the same from a local file\n"
            "  --from-scratch           random weights all the same"
        )


def best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


# ======================================================================================================================
# Setup: data, network, balancer, schedule
# ======================================================================================================================


def make_datasets(args: argparse.Namespace) -> dict[str, data.DenseDataset | None]:
    """train: augmented; plain: the same images as they are; held_out: None with --holdout 0; test."""
    recipe, root = RECIPES[args.dataset], Path(args.root)
    if args.dataset in data.RENDERERS:
        data.ensure_set(args.dataset, root)
    keep, held_out = data.hold_out(recipe.kind.list_stems(root, "train"), args.holdout)
    size = tuple(args.size) if args.size else None
    augment = partial(data.augment, scales=recipe.scales, degrees=recipe.degrees, jitter=recipe.jitter, size=size)
    resized = None if size is None else partial(resize_image, size=size)
    sets = {
        "train": recipe.kind(root, "train", args.tasks, augment, keep, args.seed),
        "plain": recipe.kind(root, "train", args.tasks, None, keep),
        "held_out": recipe.kind(root, "train", args.tasks, resized, held_out) if held_out else None,
        "test": recipe.kind(root, "val", args.tasks, resized),
    }
    if recipe.kind is data.NYUD:
        data.require_one_archive(sets["train"], sets["test"])
    return sets


def resize_image(sample: dict, rng: np.random.Generator, size: tuple[int, int]) -> dict:
    """The evaluation transform: the labels keep their resolution."""
    return data.resize_image(sample, size)


def make_model(args: argparse.Namespace) -> MTCP:
    tasks = tuple(t for t in RECIPES[args.dataset].tasks if t.name in args.tasks)
    given = {"backbone": args.backbone, "queries": args.queries, "cfm_stride": args.cfm_stride}
    changes = {k: v for k, v in given.items() if v is not None} | {"cfm": args.cfm, "trace_back": args.trace_back}
    if args.backbone is not None:
        changes["backbone_args"] = {}  # the preset's belong to the preset's backbone
    try:
        return MTCP(tasks, replace(mtcp.PRESETS[args.preset], **changes))
    except (ValueError, RuntimeError) as error:
        raise data.DataError(f"the network cannot be built: {error}") from error


def load_start(args: argparse.Namespace, model: MTCP) -> dict:
    """Fills the network's shared part as the flags say. Returns what was loaded, for config.json."""
    if args.mask2former is not None:
        return mtcp.load_mask2former(model, args.mask2former)
    if args.backbone_weights is not None:
        return mtcp.load_backbone(model.backbone, args.backbone_weights)
    if args.pretrained:
        return mtcp.load_backbone(model.backbone, hub_weights(model.cfg.backbone))
    return {"from": "random weights"}


def hub_weights(backbone: str) -> Path:
    """The file of weights that timm publishes for a backbone, from the Hugging Face hub or its local cache."""
    cfg = timm.get_pretrained_cfg(backbone)
    if not cfg.hf_hub_id:
        raise mtcp.WeightsError(f"--pretrained: timm publishes no weights for {backbone} on the Hugging Face hub")
    name = cfg.hf_hub_filename or "model.safetensors"
    try:
        return Path(hf_hub_download(cfg.hf_hub_id, name))
    except (OSError, HfHubHTTPError) as error:
        raise mtcp.WeightsError(
            f"--pretrained: cannot get {name} of {cfg.hf_hub_id} from the Hugging Face hub ({type(error).__name__}). "
            "Without internet, fetch it on another machine and name it by --backbone-weights"
        ) from error


def describe_start(start: dict) -> str:
    if "sha256" not in start:
        return f"starts from {start['from']}"
    digests = ", ".join(f"{file} {digest[:12]}…" for file, digest in start["sha256"].items())
    return (
        f"starts from {start['from']} (sha256 {digests}): {start['tensors']} tensors into {start['into']}, "
        f"{len(start['not used'])} not used"
    )


def make_balancer(args: argparse.Namespace, names: list[str]) -> nn.Module:
    if args.balancer == "lps":
        return mtcp.LPS(names, args.kappa, log=args.log, prioritise=args.prioritise)
    others = {
        "equal": mtcp.EqualWeights, "uncertainty": mtcp.UncertaintyWeights, "dwa": mtcp.DynamicWeightAverage,
    }  # fmt: skip
    return others[args.balancer](names)


def make_optimizer(args: argparse.Namespace, model: nn.Module, balancer: nn.Module, steps: int):
    """AdamW and its schedule of `steps` steps."""
    groups = [
        {"params": model.parameters(), "weight_decay": WEIGHT_DECAY},
        {"params": balancer.parameters(), "weight_decay": 0.0},  # Kendall's σ: decay would pull them to 1
    ]
    fused = torch.device(args.device).type in ("cpu", "cuda")  # one kernel for all tensors
    optimizer = torch.optim.AdamW(groups, lr=args.lr, fused=fused)
    factor = partial(lr_factor, total=steps, warmup=RECIPES[args.dataset].warmup)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def lr_factor(step: int, total: int, warmup: int) -> float:
    """Linear warm-up, then polynomial decay to zero, as a factor of --lr."""
    return min(1.0, (step + 1) / (warmup + 1)) * (1 - step / total) ** POLY_POWER


# ======================================================================================================================
# Metrics. Each takes batches of predictions and labels at the labels' resolution, and keeps sums over the whole split.
# ======================================================================================================================


class SegmentationMetric:
    """mIoU and pixel accuracy, in %, from one confusion matrix over the split.

    A class that never occurs in the ground truth is left out of the mean: its IoU would be 0 or undefined by luck.
    """

    def __init__(self, task: Task):
        self.confusion = torch.zeros(task.channels, task.channels, dtype=torch.int64)  # [truth, prediction]

    def update(self, logits: Tensor, target: Tensor) -> None:
        """logits (B,K,H,W), target (B,H,W)"""
        n, valid = len(self.confusion), target != IGNORE_INDEX
        pairs = target[valid] * n + logits.argmax(dim=1)[valid]
        self.confusion += torch.bincount(pairs, minlength=n * n).view(n, n).cpu()

    def compute(self) -> dict[str, float]:
        hit, truth, predicted = self.confusion.diag(), self.confusion.sum(dim=1), self.confusion.sum(dim=0)
        iou = hit / (truth + predicted - hit)
        return {"mIoU": 100 * iou[truth > 0].mean().item(), "pixel_acc": 100 * (hit.sum() / truth.sum()).item()}


class DepthMetric:
    """Root mean square error in metres over all valid pixels of the split, not the mean of the images' RMSEs.

    rmse          valid = depth > 0: ATRC, InvPT, TaskPrompter, MTMamba, …
    rmse_lt6.55   valid = 0 < depth < 6.5535 m: MTFormer, MT-CP. Far pixels, where errors are large, do not count, so
                  this figure is lower; never compare one with the other.
    """

    limits = {"rmse": math.inf, "rmse_lt6.55": 6.5535}

    def __init__(self, task: Task):
        self.squares, self.count = dict.fromkeys(self.limits, 0.0), dict.fromkeys(self.limits, 0)

    def update(self, depth: Tensor, target: Tensor) -> None:
        """depth, target (B,1,H,W)"""
        for name, limit in self.limits.items():
            valid = (target > 0) & (target < limit)
            self.squares[name] += (depth - target)[valid].double().square().sum().item()
            self.count[name] += valid.sum().item()

    def compute(self) -> dict[str, float]:
        return {k: math.sqrt(self.squares[k] / self.count[k]) if self.count[k] else math.nan for k in self.limits}


class NormalsMetric:
    """Angle between predicted and true normals in degrees: mean, median, and % of pixels below 11.25, 22.5 and 30.

    The angles are counted in bins of 0.01°, since a real split has 200 million of them: the median is exact to that.
    """

    def __init__(self, task: Task):
        self.total, self.bins = 0.0, torch.zeros(18001, dtype=torch.int64)

    def update(self, normals: Tensor, target: Tensor) -> None:
        """unit normals, target (B,3,H,W)"""
        angle = angle_between(normals.float(), target)[target.square().sum(dim=1) > 0.25]
        self.total += angle.double().sum().item()
        self.bins += torch.bincount((angle * 100).long().cpu(), minlength=18001)

    def compute(self) -> dict[str, float]:
        n, below = self.bins.sum().item(), self.bins.cumsum(dim=0)
        if n == 0:
            return dict.fromkeys(("mean", "median", "below_11.25", "below_22.5", "below_30"), math.nan)
        median = torch.searchsorted(below, (n + 1) // 2).item() / 100
        shares = {f"below_{a}": 100 * below[int(a * 100) - 1].item() / n for a in (11.25, 22.5, 30)}
        return {"mean": self.total / n, "median": median, **shares}


class SaliencyMetric:
    """Maximum F-measure over thresholds, in %, by the two protocols in use; never compare one with the other.

    maxF         ASTMT, MTI-Net, MT-CP: at each of the 15 thresholds 0.2 … 0.9, precision and recall of every image,
                 averaged over images, F with β² = 1
    maxF_pooled  ATRC, InvPT, TaskPrompter, MTMamba: at 0.05, 0.10, … 0.95, pixels of the whole split pooled, β² = 0.3.
                 (Their code passes probabilities through a second sigmoid before thresholding, so that in effect only
                 five thresholds are tried; here the probability itself is compared.)

    Precision or recall without a single predicted or true pixel counts as 0.
    """

    per_image, pooled = torch.linspace(0.2, 0.9, 15), torch.arange(1, 20) / 20

    def __init__(self, task: Task):
        self.images = 0
        self.precision, self.recall = torch.zeros(15), torch.zeros(15)
        self.counts = torch.zeros(3, 19, dtype=torch.float64)  # hits, predicted, true

    def update(self, logits: Tensor, target: Tensor) -> None:
        """logits, target (B,1,H,W), target 0, 1 or 255"""
        for y, t in zip(torch.sigmoid(logits.float()).cpu(), target.cpu(), strict=True):
            p, truth = y[t != IGNORE_INDEX], t[t != IGNORE_INDEX] > 0.5
            predicted = p > self.per_image[:, None]  # (15,pixels)
            hits = (predicted & truth).sum(dim=1)
            self.precision += hits / predicted.sum(dim=1).clamp(min=1)
            self.recall += hits / truth.sum().clamp(min=1)
            self.images += 1
            predicted = p >= self.pooled[:, None]  # (19,pixels)
            true = truth.sum().expand(19)
            self.counts += torch.stack([(predicted & truth).sum(dim=1), predicted.sum(dim=1), true])

    def compute(self) -> dict[str, float]:
        hits, predicted, true = self.counts
        pooled = self.f_measure(hits / predicted.clamp(min=1), hits / true.clamp(min=1), 0.3)
        per_image = self.f_measure(self.precision / max(self.images, 1), self.recall / max(self.images, 1), 1.0)
        return {"maxF": 100 * per_image.max().item(), "maxF_pooled": 100 * pooled.max().item()}

    @staticmethod
    def f_measure(precision: Tensor, recall: Tensor, beta2: float) -> Tensor:
        return (1 + beta2) * precision * recall / (beta2 * precision + recall).clamp(min=1e-12)


METRICS = {  # by a task's headline figure
    "mIoU": SegmentationMetric,
    "rmse": DepthMetric,
    "mean": NormalsMetric,
    "maxF": SaliencyMetric,
}


def as_label(task: Task, y: Tensor) -> Tensor:
    """A prediction (channels,H,W) in the format of the task's label, for pictures."""
    if task.output != "logits":
        return y
    return (y > 0).float() if task.channels == 1 else y.argmax(dim=0)


# ======================================================================================================================
# Coherence: do the predictions of different tasks agree with each other? Each figure stands beside the one that the
# ground truth reaches under the same rule, which is its ceiling (or floor), not 100 % (or 0).
# ======================================================================================================================


class GeometricCoherence:
    """Depth, normals and segmentation of one scene, compared with each other.

    normal_angle  mean angle in degrees between predicted normals and the normals of the predicted depth, where the true
                  surface is smooth: a difference across an edge is no normal (`smooth_surface`)
    boundary_F    F-measure in % of class boundaries and geometric edges (depth ratio above 1.15 or normals more than
                  30° apart, within 2 pixels), both ways within 2 pixels

    Limits: a constant depth with frontal normals is perfectly coherent, so read this beside the tasks' own metrics; and
    a picture on a wall is a class boundary without a geometric edge, also in the truth. In small images a floor seen at
    a grazing angle changes its depth fast enough to count as an edge.
    """

    needs = {"semseg", "depth", "normals"}

    def __init__(self, intrinsics: tuple[float, float, float, float]):
        self.intrinsics = intrinsics
        self.angle = {who: [0.0, 0] for who in ("", "_truth")}  # sum, count
        self.edges = {who: [0.0] * 4 for who in ("", "_truth")}

    def update(self, y: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
        smooth = smooth_surface(truth["depth"], truth["normals"])
        for who, maps in (("", {**y, "semseg": y["semseg"].argmax(dim=1)}), ("_truth", truth)):
            n = normals_from_depth(maps["depth"], self.intrinsics)
            angle = angle_between(n, maps["normals"])[smooth]
            self.angle[who][0] += angle.double().sum().item()
            self.angle[who][1] += angle.numel()
            boundary, edge = class_boundaries(maps["semseg"]), geometric_edges(maps["depth"], maps["normals"])
            near = dilate(boundary, 2)
            counts = ((boundary & edge).sum(), boundary.sum(), (edge & near).sum(), edge.sum())
            self.edges[who] = [a + b.item() for a, b in zip(self.edges[who], counts, strict=True)]

    def compute(self) -> dict[str, float]:
        out = {f"normal_angle{who}": total / max(n, 1) for who, (total, n) in self.angle.items()}
        for who, (hit, boundary, found, edge) in self.edges.items():
            precision, recall = hit / max(boundary, 1), found / max(edge, 1)
            out[f"boundary_F{who}"] = 200 * precision * recall / max(precision + recall, 1e-12)
        return out


def normals_from_depth(depth: Tensor, intrinsics: tuple[float, float, float, float]) -> Tensor:
    """depth (B,1,H,W) in metres, (fx, fy, cx, cy) in pixels → unit normals (B,3,H,W), turned towards the camera.

    Each pixel is lifted to X = (x (u - cx)/fx, 1, -(v - cy)/fy) · depth (right, forward, up); the normal is the cross
    product of the differences of X between left and right and between above and below.
    """
    fx, fy, cx, cy = intrinsics
    H, W = depth.shape[-2:]
    u = (torch.arange(W, device=depth.device) - cx) / fx
    v = -(torch.arange(H, device=depth.device) - cy) / fy
    ray = torch.stack([u.expand(H, W), torch.ones(H, W, device=depth.device), v[:, None].expand(H, W)])
    X = F.pad(ray * depth, (1, 1, 1, 1), mode="replicate")  # (B,3,H+2,W+2)
    n = torch.linalg.cross(X[..., 1:-1, 2:] - X[..., 1:-1, :-2], X[..., 2:, 1:-1] - X[..., :-2, 1:-1], dim=1)
    n = F.normalize(n, dim=1)
    return -n * torch.sign((n * ray).sum(dim=1, keepdim=True))


def angle_between(a: Tensor, b: Tensor) -> Tensor:
    """Unit vectors (B,3,H,W) twice → degrees (B,H,W)."""
    # atan2 of |a×b| and a·b: the arc cosine of a dot product next to 1 has lost its digits in float32.
    cross = torch.linalg.cross(a, b, dim=1).norm(dim=1)
    return torch.rad2deg(torch.atan2(cross, (a * b).sum(dim=1)))


def smooth_surface(depth: Tensor, normals: Tensor) -> Tensor:
    """(B,1,H,W), (B,3,H,W) → bool (B,H,W): in 3x3 pixels all are valid, depth changes by less than 5 % and no normal is
    more than about 10° from the next; False along the border."""
    largest, smallest = F.max_pool2d(depth, 3, 1), -F.max_pool2d(-depth, 3, 1)
    flat = (smallest > 0) & (largest < 1.05 * smallest)
    # Nine unit vectors within an angle of 10° have a mean that is hardly shorter than 1; an invalid one is zero.
    straight = F.avg_pool2d(normals, 3, 1).norm(dim=1, keepdim=True) > math.cos(math.radians(5))
    return F.pad(flat & straight, (1, 1, 1, 1))[:, 0]


def class_boundaries(label: Tensor) -> Tensor:
    """(B,H,W) → bool (B,H,W): the pixel right or below is of another class, and neither is ignored."""
    boundary = torch.zeros_like(label, dtype=torch.bool)
    known = label != IGNORE_INDEX
    boundary[:, :, :-1] |= (label[:, :, :-1] != label[:, :, 1:]) & known[:, :, :-1] & known[:, :, 1:]
    boundary[:, :-1] |= (label[:, :-1] != label[:, 1:]) & known[:, :-1] & known[:, 1:]
    return boundary


def geometric_edges(depth: Tensor, normals: Tensor) -> Tensor:
    """(B,1,H,W), (B,3,H,W) → bool (B,H,W): within 2 pixels, depth jumps by 15 % or the surface bends by 30°."""
    valid = depth > 0
    far = F.max_pool2d(depth, 5, 1, 2)
    near = -F.max_pool2d(torch.where(valid, -depth, -math.inf), 5, 1, 2)
    jump = (far > 1.15 * near)[:, 0]
    # The angle to the mean normal of the window is half of the angle between its two sides.
    mean = F.avg_pool2d(normals, 5, 1, 2)
    bend = F.cosine_similarity(normals, mean, dim=1) < math.cos(math.radians(15))
    return (jump | dilate(bend, 1)) & valid[:, 0]


def dilate(mask: Tensor, radius: int) -> Tensor:
    return F.max_pool2d(mask[:, None].float(), 2 * radius + 1, 1, radius)[:, 0] > 0


class SemanticCoherence:
    """Human parts and salient pixels belong somewhere.

    parts_on_person    % of predicted part pixels that lie on predicted people
    salient_on_object  % of predicted salient pixels that lie on predicted objects (any class but background)

    Limits: predicting "person" everywhere is perfectly coherent; read this beside the tasks' own metrics. In the truth,
    unannotated regions are left out.
    """

    needs = {"semseg", "human_parts", "sal"}

    def __init__(self):
        self.counts = {f"{k}{who}": [0, 0] for k in ("parts_on_person", "salient_on_object") for who in ("", "_truth")}

    def update(self, y: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
        predicted = {"semseg": y["semseg"].argmax(1), "human_parts": y["human_parts"].argmax(1), "sal": y["sal"] > 0}
        for who, maps in (("", predicted), ("_truth", {**truth, "sal": truth["sal"] == 1})):
            known = maps["semseg"] != IGNORE_INDEX
            part = (maps["human_parts"] > 0) & (maps["human_parts"] != IGNORE_INDEX) & known
            salient = maps["sal"][:, 0] & known
            self.add(f"parts_on_person{who}", part, maps["semseg"] == data.PERSON)
            self.add(f"salient_on_object{who}", salient, maps["semseg"] > 0)

    def add(self, key: str, pixels: Tensor, where: Tensor) -> None:
        self.counts[key][0] += (pixels & where).sum().item()
        self.counts[key][1] += pixels.sum().item()

    def compute(self) -> dict[str, float]:
        return {key: 100 * hit / n if n else math.nan for key, (hit, n) in self.counts.items()}


def make_coherence(names: list[str], dataset) -> GeometricCoherence | SemanticCoherence | None:
    """What can be measured with these tasks, or None."""
    if GeometricCoherence.needs <= set(names):
        return GeometricCoherence(dataset.intrinsics())
    return SemanticCoherence() if SemanticCoherence.needs <= set(names) else None


# ======================================================================================================================
# Evaluation
# ======================================================================================================================


@torch.no_grad()
def evaluate(model: nn.Module, tasks: tuple[Task, ...], loader, device: str, amp: bool = False) -> dict[str, dict]:
    """{task name: {metric: value}} over the whole loader, at the labels' resolution.

    For a model with CFM also cosine_before and cosine_after: the mean cosine distance of X_t, and of X̂_t, to the
    auxiliaries (see mtcp.cosine_distance). With all three tasks also "coherence" (see the section above).
    """
    model.eval()
    metrics = {t.name: METRICS[t.metric](t) for t in tasks}
    coherence = make_coherence(list(metrics), loader.dataset)
    with CosineProbe(model) as cosine:
        for batch in tqdm(loader, desc="evaluating", leave=False):
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=amp):
                outputs = model(batch["image"].to(device))
            truth = {t.name: batch[t.name].to(device) for t in tasks}
            y = {t.name: at_label_size(t, outputs[t.name]["final"].float(), truth[t.name]) for t in tasks}
            for t in tasks:
                metrics[t.name].update(y[t.name], truth[t.name])
            if coherence is not None:
                coherence.update(y, truth)
    results = {t.name: {**metrics[t.name].compute(), **cosine.means(t.name)} for t in tasks}
    return results if coherence is None else {**results, "coherence": coherence.compute()}


def at_label_size(task: Task, y: Tensor, target: Tensor) -> Tensor:
    """Prediction (B,channels,h,w) → (B,channels,H,W) of the label; normals are brought back to length 1."""
    if y.shape[-2:] == target.shape[-2:]:
        return y
    y = mtcp.resize(y, target.shape[-2:])
    return F.normalize(y, dim=1) if task.output == "unit" else y


class CosineProbe:
    """Listens to every task's CFM while the `with` block runs, so that the forward pass need not report on itself."""

    def __init__(self, model: nn.Module):
        self.modules = getattr(model, "cfm", None) or {}
        self.seen = {t: [] for t in self.modules}

    def __enter__(self):
        self.hooks = [m.register_forward_hook(partial(self.record, t)) for t, m in self.modules.items()]
        return self

    def __exit__(self, *exception):
        for hook in self.hooks:
            hook.remove()

    def record(self, t: str, module: nn.Module, inputs: tuple, X_hat: Tensor) -> None:
        X_t, auxiliaries = inputs
        self.seen[t].append([mtcp.cosine_distance(x, auxiliaries).item() for x in (X_t, X_hat)])

    def means(self, t: str) -> dict[str, float]:
        return (
            dict(zip(("cosine_before", "cosine_after"), np.mean(self.seen[t], axis=0).tolist(), strict=True))
            if self.seen.get(t)
            else {}
        )


class ConstantPredictor(nn.Module):
    """The trivial predictor: the majority class, the mean depth, the mean normal of the training split, and "salient",
    everywhere.

    What a network must beat before it can be said to have looked at the image.
    """

    def __init__(self, tasks: tuple[Task, ...], loader):
        super().__init__()
        totals = {t.name: torch.zeros(t.channels, dtype=torch.float64) for t in tasks}
        count = dict.fromkeys(totals, 0)
        for batch in tqdm(loader, desc="trivial predictor", leave=False):
            for t in tasks:
                target = batch[t.name]
                if t.output == "logits" and t.channels == 1:
                    totals[t.name] += 1.0
                elif t.output == "logits":
                    totals[t.name] += torch.bincount(target[target != IGNORE_INDEX], minlength=t.channels)
                else:
                    totals[t.name] += target.sum(dim=(0, 2, 3))  # invalid pixels are all-zero
                    count[t.name] += (target != 0).any(dim=1).sum().item()
        self.constants = {n: (v / max(count[n], 1)).float() for n, v in totals.items()}
        self.constants |= {t.name: F.normalize(self.constants[t.name], dim=0) for t in tasks if t.output == "unit"}

    def forward(self, x: Tensor) -> dict[str, dict]:
        def everywhere(c):
            return c.to(x.device)[None, :, None, None].expand(len(x), -1, *x.shape[-2:])

        return {name: {"final": everywhere(c)} for name, c in self.constants.items()}


def score(tasks: tuple[Task, ...], results: dict, trivial: dict) -> float:
    """Mean over tasks of the relative gain over the trivial predictor, in %: one number to choose the best epoch by.

    Segmentation has most of the say: a trivial mIoU is tiny, so gains over it reach hundreds of %, where an error can
    only fall by 100.
    """
    gains = [t.better * (results[t.name][t.metric] / max(trivial[t.name][t.metric], 1e-9) - 1) for t in tasks]
    return 100 * float(np.mean(gains))


def delta_m(tasks: tuple[Task, ...], results: dict, single: dict) -> float:
    """Δm in % [Maninis et al., CVPR 2019]: mean over tasks of the relative change of the headline figure against the
    single-task networks', signed so that positive is better. The same formula as `score`, with another reference."""
    return score(tasks, results, single)


def single_results(args: argparse.Namespace, tasks: tuple[Task, ...]) -> tuple[Path, dict] | None:
    """Test figures of --single, or of the run that `--model single` leaves by default; None if there are none."""
    path = args.single or Path(f"runs/{args.dataset}-{args.preset}-single/metrics.json")
    if not path.is_file():
        if args.single:
            raise data.DataError(f"--single {path} not found: make it by --model single")
        return None
    try:
        test = json.loads(path.read_text())["test"]
        return path, {t.name: {t.metric: float(test[t.name][t.metric])} for t in tasks}
    except (ValueError, KeyError, TypeError) as error:
        raise data.DataError(f"{path} does not hold single-task results for {[t.name for t in tasks]}") from error


@torch.no_grad()
def save_predictions(model: nn.Module, tasks: tuple[Task, ...], dataset, device: str, path: Path, n: int = 6) -> None:
    """Rows: n samples spread over the dataset. Columns: the image, then truth and prediction for each task."""
    model.eval()
    rows = []
    for i in np.linspace(0, len(dataset) - 1, min(n, len(dataset))).astype(int):
        sample = dataset[i]
        outputs = model(sample["image"][None].to(device))
        row = [data.picture("image", sample["image"])]
        for t in tasks:
            truth = sample[t.name]
            y = at_label_size(t, outputs[t.name]["final"].float(), truth[None])[0]
            row += [data.picture(t.name, truth), data.picture(t.name, as_label(t, y.cpu()))]
        rows.append(row)
    titles = ["image"] + [f"{t.name}, {what}" for t in tasks for what in ("truth", "prediction")]
    data.contact_sheet(titles, rows).save(path)


# ======================================================================================================================
# Saving, loading, printing
# ======================================================================================================================


def new_run_folder(args: argparse.Namespace) -> Path:
    """--out, or the next free runs/DATASET-N. Raises DataError rather than write into a folder that holds something."""
    if args.out is None:
        n = 1
        while Path(f"runs/{args.dataset}-{n}").exists():
            n += 1
        out = Path(f"runs/{args.dataset}-{n}")
    else:
        out = args.out
        if out.exists() and any(out.iterdir()) and not args.resume:
            raise data.DataError(f"{out} is not empty: choose another --out, or go on with that run by --resume")
    out.mkdir(parents=True, exist_ok=True)
    return out


def save_checkpoint(path: Path, **content) -> None:
    data.save(path, lambda f: torch.save(content, f))


def load_checkpoint(path: Path) -> dict:
    """A file written by save_checkpoint; DataError if it is none. weights_only: a checkpoint cannot run code."""
    if not path.is_file():
        raise data.DataError(f"checkpoint {path} not found")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        return {"args": checkpoint["args"], "model": checkpoint["model"], **checkpoint}
    except Exception as error:
        raise data.DataError(f"{path} is not a checkpoint of train.py ({type(error).__name__}: {error})") from error


def model_from(checkpoint: dict, path: Path) -> MTCP:
    """The network a checkpoint was saved from, with its weights; an unmatched tensor is an error that names it."""
    model = make_model(argparse.Namespace(**checkpoint["args"]))
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        raise data.DataError(f"{path} does not fit the network that its own arguments describe: {error}") from error
    return model


def require_same_run(saved: dict, args: argparse.Namespace) -> None:
    """DataError if --resume would go on with another experiment than the one that was begun."""
    free = ("out", "resume", "workers", "device", "root", "single")  # may change without changing what is computed
    given = plain_args(args)
    changed = [f"--{k.replace('_', '-')} {v}" for k, v in saved.items() if k not in free and given.get(k) != v]
    if changed:
        raise data.DataError(f"{args.out} was begun with {', '.join(changed)}: resume it with the same flags")


def plain_args(args: argparse.Namespace) -> dict:
    """The arguments as JSON has them."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}


def header(tasks: tuple[Task, ...]) -> str:
    columns = "".join(f" │ {t.name + ':':{name_width(t)}s} loss  weight {t.metric:>6s}" for t in tasks)
    return f"epoch  time{columns}"


def table_row(epoch: int, seconds: float, tasks, losses: dict, weights: Tensor, results: dict | None) -> str:
    row = f"{epoch + 1:5d} {seconds:4.0f}s"
    for t, weight in zip(tasks, weights.tolist(), strict=True):
        figure = f"{results[t.name][t.metric]:6.2f}" if results else "     –"
        row += f" │ {losses[t.name]:{name_width(t) + 5}.3f} {weight:7.2f} {figure}"
    return row


def name_width(task: Task) -> int:
    return max(9, len(task.name) + 1)


def final_table(tasks: tuple[Task, ...], results: dict, trivial: dict) -> str:
    lines = [f"{'test split':28s} {'model':>9s} {'trivial':>9s}"]
    for t in tasks:
        for metric, value in results[t.name].items():
            arrow = {1: "↑", -1: "↓"}[t.better] if metric == t.metric else " "
            constant = f"{trivial[t.name][metric]:9.3f}" if metric in trivial[t.name] else f"{'':9s}"
            lines.append(f"{t.name + ' ' + metric:26s} {arrow} {value:9.3f} {constant}")
    coherence = results.get("coherence", {})
    if coherence:
        lines.append(f"{'coherence':28s} {'model':>9s} {'truth':>9s}")
        pairs = [(k, v, coherence[f"{k}_truth"]) for k, v in coherence.items() if not k.endswith("_truth")]
        lines += [f"{name:28s} {value:9.3f} {truth:9.3f}" for name, value, truth in pairs]
    return "\n".join(lines)


# ======================================================================================================================
# Main
# ======================================================================================================================


def main(args: argparse.Namespace) -> dict:
    """Trains as `args` say and returns what metrics.json holds."""
    started = time.time()
    torch.manual_seed(args.seed)  # the initial weights
    sets = make_datasets(args)
    train_set, held_out, test_set = sets["train"], sets["held_out"], sets["test"]
    device = args.device
    model = make_model(args)
    loaded = load_start(args, model) if not args.resume else None  # a resumed run has its own weights
    out = new_run_folder(args)
    model = model.to(device, memory_format=torch.channels_last)  # faster, on CPU and GPU alike
    tasks = model.tasks
    balancer = make_balancer(args, model.names).to(device)
    steps = args.epochs * len(loader_for(train_set, args, shuffle=True))
    optimizer, scheduler = make_optimizer(args, model, balancer, steps)
    state = {"model": model, "balancer": balancer, "optimizer": optimizer, "scheduler": scheduler}
    start, best = 0, -math.inf
    if args.resume:
        saved = load_checkpoint(out / "last.pt")
        require_same_run(saved["args"], args)
        for name, part in state.items():
            part.load_state_dict(saved[name])
        start, best = saved["epoch"] + 1, saved["best"]
    else:
        config = {**plain_args(args), "start": loaded}
        data.save(out / "config.json", lambda f: f.write(json.dumps(config, indent=2).encode()))
        print(f"{out}: {describe_start(loaded)}")
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{out}: {args.preset} preset, {parameters / 1e6:.1f} M parameters, {len(train_set)} images, on {device}")

    constant = ConstantPredictor(tasks, loader_for(sets["plain"], args, shuffle=False))
    if held_out is not None:
        trivial = evaluate(constant, tasks, loader_for(held_out, args, shuffle=False), device)
    print(header(tasks))
    for epoch in range(start, args.epochs):
        # Every epoch starts from its own seed, so that a resumed run draws what the uninterrupted one would have drawn.
        torch.manual_seed(args.seed + 1000 * (epoch + 1))
        epoch_started, train_set.epoch = time.time(), epoch
        model.train()
        sums = dict.fromkeys(model.names, 0.0)
        bar = tqdm(loader_for(train_set, args, shuffle=True, epoch=epoch), desc=f"epoch {epoch + 1}", leave=False)
        for batch in bar:
            images = batch["image"].to(device, memory_format=torch.channels_last)
            targets = {t: batch[t].to(device) for t in model.names}
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=args.amp):
                outputs = model(images)
            losses = mtcp.task_losses(tasks, outputs, targets)  # {task: L_t}
            total = balancer(losses)  # Σ_t w_t log(1 + L_t)
            if not torch.isfinite(total):
                values = {t: loss.item() for t, loss in losses.items()}
                raise FloatingPointError(f"loss is {total.item()} in epoch {epoch + 1} ({values}): try a lower --lr")
            optimizer.zero_grad()
            total.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)  # before the step: after it, it would do nothing
            optimizer.step()
            scheduler.step()
            for t, loss in losses.items():
                sums[t] += loss.item() / len(bar)
        weights = balancer.weights.clone()  # those this epoch was trained with
        balancer.end_epoch()

        results = None
        if held_out is not None:
            results = evaluate(model, tasks, loader_for(held_out, args, shuffle=False), device, args.amp)
        print(table_row(epoch, time.time() - epoch_started, tasks, sums, weights, results))
        # Without a held-out set there is nothing honest to choose by: the best is the last.
        reached = score(tasks, results, trivial) if results else epoch
        if not reached <= best:  # also where it is NaN, so that there is always a best.pt
            best = reached
            save_checkpoint(out / "best.pt", args=plain_args(args), model=model.state_dict(), epoch=epoch)
        whole = {name: part.state_dict() for name, part in state.items()}
        save_checkpoint(out / "last.pt", args=plain_args(args), epoch=epoch, best=best, **whole)
        entry = {
            "epoch": epoch,
            "loss": sums,
            "weight": dict(zip(model.names, weights.tolist(), strict=True)),
            "heldout": results,
        }
        with open(out / "log.jsonl", "a") as log:
            log.write(json.dumps({**entry, "score": reached, "lr": scheduler.get_last_lr()[0]}) + "\n")

    # The test split is looked at once, by the epoch that the held-out images chose.
    chosen = load_checkpoint(out / "best.pt")
    model.load_state_dict(chosen["model"])
    about = {"best_epoch": chosen["epoch"] + 1, "parameters": parameters, "seconds": round(time.time() - started)}
    return test(args, model, constant, test_set, about, out)


def test(args: argparse.Namespace, model: MTCP, constant: nn.Module, test_set, about: dict, out: Path | None) -> dict:
    """Evaluates network and trivial predictor on the test split, prints both and, given `out`, writes them there."""
    loader = loader_for(test_set, args, shuffle=False)
    report = {
        "test": evaluate(model, model.tasks, loader, args.device, args.amp),
        "trivial": evaluate(constant, model.tasks, loader, args.device),
        **about,
    }
    print(final_table(model.tasks, report["test"], report["trivial"]))
    reference = single_results(args, model.tasks) if args.model != "single" else None
    if reference is not None:
        report["delta_m"] = delta_m(model.tasks, report["test"], reference[1])
        print(f"Δm {report['delta_m']:+.2f} % against {reference[0]}")
    if out is not None:
        data.save(out / "metrics.json", lambda f: f.write(json.dumps(report, indent=2).encode()))
        save_predictions(model, model.tasks, test_set, args.device, out / "predictions.png")
        print(f"{', '.join(f'{k} {v}' for k, v in about.items())}; pictures: {out / 'predictions.png'}")
    return report


def loader_for(dataset, args: argparse.Namespace, shuffle: bool, epoch: int = 0):
    # PASCAL's pictures differ in size: unless they are resized for training, they cannot share a batch.
    batch_size = 1 if args.dataset == "pascal" and not shuffle else args.batch_size
    return data.make_loader(dataset, batch_size, shuffle, args.seed + epoch, args.workers)


def evaluate_checkpoint(args: argparse.Namespace) -> dict:
    """--eval: the checkpoint's network on the test split of --dataset and --root; writes only if --out is given."""
    checkpoint = load_checkpoint(args.eval)
    model = model_from(checkpoint, args.eval).to(args.device)
    args.tasks = model.names
    sets = make_datasets(args)
    constant = ConstantPredictor(model.tasks, loader_for(sets["plain"], args, shuffle=False))
    out = new_run_folder(args) if args.out is not None else None
    return test(args, model, constant, sets["test"], {"best_epoch": checkpoint["epoch"] + 1}, out)


def train_single(args: argparse.Namespace) -> dict:
    """--model single: a baseline network for every task, each in a folder of its own; their figures together in one."""
    args.out = args.out or Path(f"runs/{args.dataset}-{args.preset}-single")
    out = new_run_folder(args)
    reports = {}
    for t in args.tasks:
        reports[t] = main(argparse.Namespace(**{**vars(args), "tasks": [t], "out": out / t}))
    merged = {who: {t: r[who][t] for t, r in reports.items()} for who in ("test", "trivial")}
    merged |= {key: sum(r[key] for r in reports.values()) for key in ("parameters", "seconds")}
    data.save(out / "metrics.json", lambda f: f.write(json.dumps(merged, indent=2).encode()))
    print(f"single-task results of {', '.join(args.tasks)}: {out / 'metrics.json'}")
    return merged


def cli(argv: list[str] | None = None) -> int:
    """Exit status: 0, or 2 with one sentence on stderr."""
    try:
        args = parse_args(argv)
        run = evaluate_checkpoint if args.eval else train_single if args.model == "single" else main
        run(args)
    except (data.DataError, mtcp.WeightsError, FloatingPointError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(cli())
