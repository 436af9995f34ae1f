"""Train and evaluate MT-CP. One script, one loop, in plain sight: `main`, at the end of this file.

    python train.py                             rendered rooms, toy preset: minutes on a laptop
    python train.py --dataset figures           rendered people: segmentation, parts, saliency
    python train.py --dataset nyud --start mask2former.safetensors --amp      NYUD-v2, on a GPU
    python train.py --no-cfm --no-trace-back --balancer equal      without what the paper adds
    python train.py --out runs/mine --resume    go on where a run was cut off
    torchrun --nproc_per_node 4 train.py ...    on four GPUs
    python train.py --eval runs/mine/best.pt    evaluate a checkpoint on the test split
    python train.py --checkpoint runs/mine/best.pt --predict PHOTOGRAPH      see it on your own

Single-task networks, and Δm against them:

    for t in semseg depth normals; do
        python train.py --tasks $t --no-trace-back --out runs/single/$t --resume
    done
    python train.py --single runs/single

A run folder holds config.json (all flags), log.jsonl (a line per epoch), last.pt, previous.pt and
best.pt, metrics.json (final figures on the test split) and predictions.png.
"""

import argparse
import io
import json
import math
import multiprocessing
import os
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import timm
import timm.layers
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from huggingface_hub.utils import HfHubHTTPError
from PIL import Image
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import mtcp
from data import DataError, angle_between, normals_from_depth, smooth_surface
from mtcp import IGNORE_INDEX, MTCP, Task

try:
    import fcntl
except ImportError:  # Windows has none: there, nobody stops two processes from sharing a folder
    fcntl = None

# ==================================================================================================
# Recipes and flags
# ==================================================================================================


@dataclass(frozen=True)
class Recipe:
    """What goes with a dataset. A flag of the same name, where there is one, goes before."""

    tasks: tuple[Task, ...]
    preset: str = "toy"
    epochs: int = 5
    batch_size: int = 4  # small, for more steps
    lr: float = 2e-3  # of AdamW, at its highest
    backbone_lr: float = 1.0  # times lr, where the backbone starts from weights
    warmup: int = 100  # steps, without which training would not survive this learning rate
    mask_epochs: int = 0  # before the others: see learn_masks
    kappa: float = 1.6  # spread of the LPS weights; 7.5 is too jumpy where epochs are few
    scales: tuple[float, ...] = (1.0,)  # of the random zoom; a few epochs need none
    degrees: float = 0.0  # of the random rotation, either way
    jitter: float = 0.1  # colour factors are drawn from 1 ± jitter
    size: tuple[int, int] | None = None  # to which images are resized; None: as they are


RELEASED = {"preset": "paper", "epochs": 100, "batch_size": 2, "lr": 5e-5, "warmup": 0, "jitter": 0}
RECIPES = {
    # From scratch in minutes.
    "rooms": Recipe(mtcp.NYUD_TASKS, mask_epochs=3),
    "figures": Recipe(mtcp.PASCAL_TASKS, mask_epochs=3),
    # The authors' released recipes, which start from published weights.
    "nyud": Recipe(mtcp.NYUD_TASKS, kappa=7.5, scales=(1.0, 1.2, 1.5), **RELEASED),
    "pascal": Recipe(
        mtcp.PASCAL_TASKS, scales=(0.75, 1.25), degrees=20.0, size=(512, 512), **RELEASED
    ),
}
# Of the preset "small", on a laptop. Its decoders start from random weights and must learn fast. At
# 1e-3 training losses fell faster, but held-out images were worse: f2 and f3 of the task decoders
# became nearly one vector for all pixels. The backbone knows something already, which a high rate
# destroys. Both rates were chosen by runs of one seed on held-out training images.
LAPTOP = {
    "epochs": 9, "batch_size": 4, "lr": 3e-4, "backbone_lr": 1e-5 / 3e-4, "warmup": 100,
    "kappa": 1.6, "jitter": 0.1, "mask_epochs": 3,
}  # fmt: skip
SMALL_RECIPES = {
    "nyud": replace(RECIPES["nyud"], **LAPTOP, size=(192, 256)),
    "pascal": replace(RECIPES["pascal"], **LAPTOP, size=(224, 224)),  # not tried: no real files
}
WEIGHT_DECAY = 1e-4
CLIP_NORM = 5.0  # gradients longer than this are shortened to it
POLY_POWER = 0.9
HOLDOUT = 0.05  # share of the training split that chooses the best epoch


def find_recipe(dataset: str, preset: str | None) -> Recipe:
    """The dataset's recipe; with the preset "small", whose backbone has weights, another one."""
    recipe = RECIPES[dataset]
    if preset == "small":
        rates = {key: LAPTOP[key] for key in ("lr", "backbone_lr")}
        return SMALL_RECIPES.get(dataset, replace(recipe, **rates))
    return recipe


BALANCERS = {  # name → (task names, κ) → balancer
    "lps": mtcp.LPS,
    "log": partial(mtcp.LPS, prioritise=False),
    "equal": lambda names, kappa: mtcp.EqualWeights(names),
    "uncertainty": lambda names, kappa: mtcp.UncertaintyWeights(names),
    "dwa": lambda names, kappa: mtcp.DynamicWeightAverage(names),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags, completed from the recipe; exits with one sentence if they cannot work."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = p.add_argument
    add("--dataset", choices=list(RECIPES), help="default: rooms")
    add("--root", type=Path, help="folder of the data (data/DATASET); rooms, figures: rendered")
    add("--tasks", nargs="+", metavar="TASK", help="some of the dataset's tasks (default: all)")
    add("--preset", choices=list(mtcp.PRESETS), help="sizes of the network (recipe)")
    add("--backbone", metavar="NAME", help="another backbone than the preset's, by timm's name")
    add("--start", help="scratch: from random weights; pretrained: the backbone from timm's hub;\n"
        "FILE: a Mask2Former of Hugging Face, or weights of the backbone")  # fmt: skip
    add("--no-cfm", action="store_true", help="tasks do not exchange features")
    add("--no-trace-back", action="store_true", help="decode the fused feature directly")
    add("--cfm-stride", type=int, metavar="S", help="pool keys and values of CFM (1: exact)")
    add("--balancer", choices=list(BALANCERS), help="of the losses (lps); log: LPS without weights")
    add("--kappa", type=float, help="spread of the LPS weights (recipe)")
    add("--epochs", type=int, help="(recipe)")
    add("--mask-epochs", type=int, metavar="N", help="before these: epochs in which the shared\n"
        "part learns masks of the true segmentation (recipe)")  # fmt: skip
    add("--batch-size", type=int, metavar="B", help="images a step (recipe)")
    add("--accumulate", type=int, metavar="A", help="take a step in A parts: less memory (1)")
    add("--lr", type=float, help="of AdamW, at its highest (recipe)")
    add("--size", type=int, nargs=2, metavar=("H", "W"), help="resize images to this (recipe)")
    add("--seed", type=int, help="of every random draw (0)")
    add("--workers", type=int, metavar="N", help="processes that load data (2); 0: none")
    add("--device", help="cpu, cuda, mps, … (default: the best there is)")
    add("--amp", action="store_true", help="bfloat16 autocast")
    add("--checkpointing", action="store_true", help="less memory for more time")
    add("--skip-bad-samples", action="store_true", help="where an image of the training split\n"
        "cannot be read, take the next one, and count")  # fmt: skip
    add("--out", type=Path, help="run folder (runs/DATASET-N, N counting up)")
    add("--resume", action="store_true", help="go on with the run in --out, if there is one, with\n"
        "its flags; more --epochs stretch the schedule")  # fmt: skip
    add("--eval", type=Path, metavar="CHECKPOINT", help="evaluate only")
    add("--single", type=Path, metavar="DIR", help="DIR/TASK: single-task runs, to compute Δm")
    add("--predict", type=Path, nargs="+", metavar="PATH", help="photographs, or folders of them")
    add("--checkpoint", type=Path, metavar="FILE", help="with --predict: the network to use")
    add("--npz", action="store_true", help="with --predict: the predictions as arrays, too")
    args = p.parse_args(argv)
    if args.predict is not None or args.checkpoint is not None or args.npz:
        return prediction_flags(args, p)
    if args.resume and args.out is None:
        p.error("--resume needs --out, the folder of the run to go on with")
    if args.eval is not None:
        fill_in(args, evaluated_run(args))
    elif args.resume and holds_something(args.out):
        fill_in(args, same_run(args, read_json(args.out / "config.json"), p))
    if args.out is not None and not args.resume and holds_something(args.out):
        raise DataError(f"{args.out} is not empty: choose another --out, or go on by --resume")
    args.dataset = args.dataset or "rooms"
    names = [t.name for t in RECIPES[args.dataset].tasks]
    fill_in(args, {**vars(find_recipe(args.dataset, args.preset)), "tasks": names})
    fill_in(args, {"root": Path("data") / args.dataset, "balancer": "lps", "seed": 0})
    fill_in(args, {"workers": 2, "accumulate": 1, "device": best_device()})
    args.root = Path(args.root).absolute()  # so that it is found again from another folder
    refuse_bad_flags(args, names, p)
    args.start = args.start or "scratch"
    return args


# Of this call alone, never taken from a saved run.
OWN = ("out", "resume", "eval", "single", "predict", "checkpoint", "npz")
# May differ with --resume: the same data, elsewhere; what helps after a run has died.
FREE = (*OWN, "root", "workers", "device", "accumulate", "checkpointing", "skip_bad_samples")
EVALUATION = ("dataset", "root", "tasks", "size", "batch_size", "workers", "device", "amp", "out",
              "eval", "single")  # may be typed with --eval  # fmt: skip
PREDICTION = ("predict", "checkpoint", "npz", "out", "device", "amp")  # with --predict


def prediction_flags(args: argparse.Namespace, parser: argparse.ArgumentParser):
    if args.predict is None or args.checkpoint is None:
        parser.error("--predict PATH and --checkpoint FILE go together")
    for key, typed in vars(args).items():
        if was_typed(typed) and key not in PREDICTION:
            flag = as_typed(key, typed).removeprefix("with ")
            parser.error(f"{args.checkpoint} predicts as it was trained: drop {flag}")
    args.device = args.device or best_device()
    require_device(args, parser)
    if processes() > 1:
        parser.error("--predict runs in one process, without torchrun")
    return args


def same_run(args: argparse.Namespace, saved: dict, parser: argparse.ArgumentParser) -> dict:
    """The flags a run was begun with. Exits if other ones were typed now, or if last.pt is lost."""
    checkpoints = [args.out / name for name in ("last.pt", "previous.pt")]
    if (args.out / "metrics.json").is_file() and not any(c.is_file() for c in checkpoints):
        raise DataError(f"{args.out} is a finished run without its last.pt: choose another --out")
    absent = vars(args).keys() - saved.keys() - set(OWN)
    if absent:
        raise DataError(f"{args.out}/config.json is damaged or old: it has no {sorted(absent)[0]}")
    for key, typed in vars(args).items():
        longer = key == "epochs" and was_typed(typed) and typed > saved[key]
        if key not in FREE and was_typed(typed) and plain(typed) != saved[key] and not longer:
            flags = f"{as_typed(key, saved[key])}, not {as_typed(key, typed)}"
            parser.error(f"{args.out} was begun {flags}")
    return saved


def as_typed(key: str, value) -> str:
    """A flag as it stands on the command line."""
    flag = f"--{key.replace('_', '-')}"
    if not was_typed(value):
        return f"without {flag}"
    values = value if isinstance(value, list) else [] if value is True else [value]
    return " ".join(["with", flag, *map(str, values)])


def evaluated_run(args: argparse.Namespace) -> dict:
    """The flags of the checkpoint --eval names. DataError if it cannot be evaluated as asked."""
    content = load_checkpoint(args.eval)
    saved = content["args"]
    if saved.get("dataset") not in RECIPES:
        raise DataError(f"{args.eval} is of no dataset that is known here")
    for key, typed in vars(args).items():
        if was_typed(typed) and key not in EVALUATION:
            flag = as_typed(key, typed).removeprefix("with ")
            raise DataError(f"{args.eval} is evaluated as it was trained: drop {flag}")
    dataset = args.dataset or saved["dataset"]
    known = {t.name: asdict(t) for t in RECIPES[dataset].tasks}
    learned = [t["name"] for t in content["tasks"]]
    if any(known.get(t["name"]) != t for t in content["tasks"]):
        raise DataError(
            f"{args.eval} has learned {' '.join(learned)} of {saved['dataset']}: the tasks of "
            f"--dataset {dataset} are others"
        )
    if not set(args.tasks or []) <= set(learned):
        raise DataError(f"{args.eval} has learned {' '.join(learned)}: --tasks takes some of these")
    if dataset != saved["dataset"]:
        saved["root"] = None  # another dataset lies elsewhere
    return {**saved, "device": None}  # of this machine


def holds_something(folder: Path) -> bool:
    """Hidden files do not count: a lock, or what is left of a write that was cut off."""
    if not folder.is_dir():
        return folder.exists()
    return any(not path.name.startswith(".") for path in folder.iterdir())


def fill_in(args: argparse.Namespace, defaults: dict) -> None:
    """Sets the flags that were not typed."""
    for key, value in defaults.items():
        if key in vars(args) and key not in OWN and not was_typed(vars(args)[key]):
            setattr(args, key, value)


def was_typed(value) -> bool:
    return value is not None and value is not False  # 0 is a value


def refuse_bad_flags(args: argparse.Namespace, names: list[str], parser) -> None:
    """Exits with one sentence where flags cannot work; names: the dataset's tasks."""
    if not set(args.tasks) <= set(names) or len(set(args.tasks)) < len(args.tasks):
        parser.error(
            f"--tasks takes different ones of {' '.join(names)}, not {' '.join(args.tasks)}"
        )
    for key in ("epochs", "batch_size", "lr", "cfm_stride", "accumulate"):
        if vars(args)[key] is not None and not 0 < vars(args)[key] < math.inf:
            parser.error(f"--{key.replace('_', '-')} takes a number above 0")
    if not 0 <= args.kappa < math.inf:
        parser.error("--kappa takes a number of 0 or more")
    if min(args.size or [1]) < 1 or not 0 <= args.seed < 2**32:
        parser.error("--size takes two numbers above 0, --seed one of 0 or more")
    if min(args.workers, args.mask_epochs) < 0:
        parser.error("--workers and --mask-epochs take numbers of 0 or more")
    parts = processes() * args.accumulate
    if args.batch_size % parts and not args.eval:
        parser.error(f"--batch-size takes a multiple of {parts}, the parts of a step: it has "
            f"{processes()} processes, each --accumulate {args.accumulate}")  # fmt: skip
    if args.mask_epochs and "semseg" not in names:
        parser.error(f"--mask-epochs needs the labels of semseg, which {args.dataset} has not")
    require_device(args, parser)
    if processes() > 1 and args.device not in ("cpu", "cuda"):
        parser.error(f"several processes run on --device cpu or cuda, not on {args.device}")
    if args.backbone is not None and not timm.is_model(args.backbone):
        parser.error(f"--backbone {args.backbone} is no model of timm; see timm.list_models()")
    if args.start is None and args.preset in ("paper", "vit", "small") and not args.eval:
        parser.error(
            f"preset {args.preset} from random weights reaches none of the published figures. "
            "Where shall it start?\n"
            "  --start FILE        a Mask2Former trained on ADE20K, as the paper does, or\n"
            "                      weights of the backbone\n"
            "  --start pretrained  the weights timm publishes for the backbone\n"
            "  --start scratch     random weights all the same"
        )


def require_device(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Exits if it is not there. Of several processes on a machine each takes a GPU of its own."""
    device = args.device
    if device == "cuda" and processes() > 1 and torch.cuda.is_available():
        if local_rank() >= torch.cuda.device_count():
            raise DataError(f"--nproc_per_node: this machine has {torch.cuda.device_count()} GPUs")
        torch.cuda.set_device(local_rank())  # from now on "cuda" is this one
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # "cuda" of a build without CUDA: an assertion
        reason = str(error).splitlines()[0]
        parser.error(f"--device {device} is not there ({reason}); cpu always is")
    if args.amp and device == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2":
        print("--amp: this CPU must imitate bfloat16, and is much slower with it", file=sys.stderr)


def plain(value):
    """A flag's value as JSON has it."""
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


# ==================================================================================================
# Several processes: torchrun starts the same command N times, and each does its part of every step
#
# They differ in the images they see, and in that process 0 alone writes files and prints. Gradients
# are averaged by DistributedDataParallel. What is measured is summed up before it is divided: a
# mean of the processes' means would be wrong wherever one has more valid pixels than another.
# ==================================================================================================


def processes() -> int:
    """How many torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """The number of this process, from 0 on."""
    return int(os.environ.get("RANK", 0))


def local_rank() -> int:
    """The number of this process on its machine, from 0 on."""
    return int(os.environ.get("LOCAL_RANK", 0))


def join_processes(args: argparse.Namespace) -> None:
    """Waits until all are there. DataError if they have not been told the same."""
    if processes() == 1:
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if args.device == "cuda" else "gloo")
    flags = {key: plain(value) for key, value in vars(args).items()}
    if as_in_process_0(flags) != flags:
        raise DataError("has other flags than process 0: start all of them alike, and keep --out "
            "on a disk that all machines share")  # fmt: skip
    wait_for_all()  # until nobody reads the run's folder any more


def sum_over_processes(*tensors: Tensor) -> None:
    """In place: each becomes its sum over all processes."""
    if processes() > 1:
        for x in tensors:
            dist.all_reduce(x)


def average_over_processes(tensors: Iterable[Tensor]) -> None:
    """In place: each becomes its mean over all processes."""
    for x in tensors:
        sum_over_processes(x)
        x /= processes()


def wait_for_all() -> None:
    """Goes on when all processes have come here: a sum needs all of them."""
    sum_over_processes(torch.zeros(1))


def as_in_process_0(content):
    """The same Python object in all processes: that of process 0."""
    box = [content]
    if processes() > 1:
        dist.broadcast_object_list(box)
    return box[0]


def progress(items: Iterable, what: str) -> Iterable:
    """The same items, with a bar in process 0 if it writes to a terminal, and not into a file."""
    return tqdm(items, desc=what, leave=False, disable=True if rank() else None)


# ==================================================================================================
# Setup: data, network, optimiser
# ==================================================================================================


def make_datasets(
    name: str, root: Path, tasks: list[str], size, seed: int, preset=None, skip_bad=False
) -> tuple:
    """Four splits of dataset `name`: training, the same images as they are, held out, test.

    Images are resized to `size`, unless it is None. skip_bad: see DenseDataset; not for the test.
    """
    kind = data.DATASETS[name]
    recipe = find_recipe(name, preset)
    require_rows(recipe.tasks, kind)
    augment = partial(
        data.augment, scales=recipe.scales, degrees=recipe.degrees, jitter=recipe.jitter, size=size
    )
    # For evaluation only the image is resized: the labels keep their resolution.
    resized = partial(resize_image, size=size) if size else None
    stems, held_out = data.hold_out(kind.list_stems(root, "train"), HOLDOUT)
    train_set = kind(root, "train", tasks, augment, stems, seed)
    test_set = kind(root, "val", tasks, resized)
    plain_set = kind(root, "train", tasks, None, stems)
    held_out_set = kind(root, "train", tasks, resized, held_out)
    for dataset in (train_set, plain_set, held_out_set):
        dataset.skip_bad = skip_bad
    data.require_sound_splits([train_set, held_out_set], test_set)
    return train_set, plain_set, held_out_set, test_set


def require_rows(tasks: tuple[Task, ...], kind: type[data.DenseDataset]) -> None:
    """DataError if a task is not known everywhere: for those who add one."""
    for t in tasks:
        tables = {
            "mtcp.OUTPUTS": (t.output, mtcp.OUTPUTS),
            "mtcp.LOSSES": (t.loss, mtcp.LOSSES),
            "train.METRICS": (t.metric, METRICS),
            "data.LABELS": (t.name, data.LABELS),
            f"{kind.__name__}.readers": (t.name, kind.readers),
        }
        for name, files in kind.layouts.items():
            tables[f"{kind.__name__}.layouts[{name!r}]"] = (t.name, files)
        for table, (row, rows) in tables.items():
            if row not in rows:
                raise DataError(f"task {t.name}: {table} has no row {row!r}")


def resize_image(sample: dict, rng: np.random.Generator, size: tuple[int, int]) -> dict:
    """data.resize_image as a transform; nothing here is random."""
    return data.resize_image(sample, size)


def make_loader(dataset, batch_size: int, workers: int) -> DataLoader:
    """For evaluation, in order. Labels of different sizes cannot share a batch."""
    batch_size = batch_size if dataset.one_size else 1
    share = {"rank": rank(), "processes": processes()}
    return data.make_loader(dataset, batch_size, shuffle=False, seed=0, workers=workers, **share)


def make_config(args: argparse.Namespace) -> mtcp.MTCPConfig:
    """The preset, with what the flags change of it."""
    cfg = mtcp.PRESETS[args.preset]
    if args.backbone is not None:  # the preset's arguments belong to the preset's backbone
        cfg = replace(cfg, backbone=args.backbone, backbone_args={})
    if args.cfm_stride is not None:
        cfg = replace(cfg, cfm_stride=args.cfm_stride)
    cfg = replace(cfg, checkpointing=args.checkpointing)
    return replace(cfg, cfm=not args.no_cfm, trace_back=not args.no_trace_back)


def make_model(tasks: tuple[Task, ...], cfg: mtcp.MTCPConfig) -> MTCP:
    try:
        return MTCP(tasks, cfg)
    except (ValueError, RuntimeError) as error:
        raise DataError(f"the network cannot be built: {error}") from error


def make_started_model(tasks: tuple[Task, ...], cfg: mtcp.MTCPConfig, start: str):
    """The network, its shared part filled as --start says; and what was loaded, in words."""
    if start == "scratch":
        return make_model(tasks, cfg), "random weights"
    path = hub_weights(cfg.backbone) if start == "pretrained" else Path(start)
    try:
        tensors = mtcp.read_weights(path)
        queries = mtcp.mask2former_queries(tensors)  # 100, or 200 in the largest ones
        model = make_model(tasks, replace(cfg, queries=queries or cfg.queries))
        loaded = mtcp.load_weights(model, tensors)
    except mtcp.WeightsError as error:
        raise mtcp.WeightsError(f"--start {path}: {error}") from error
    unused = f"{len(loaded['not used'])} not used"
    return model, f"{path}: {loaded['tensors']} tensors into {loaded['into']}, {unused}"


def hub_weights(backbone: str) -> Path:
    """The weights that timm publishes for a backbone, from the hub or its local cache."""
    try:
        cfg = timm.get_pretrained_cfg(backbone)
    except RuntimeError as error:  # NAME.TAG with another tag
        raise mtcp.WeightsError(f"--start pretrained: {error}") from error
    if cfg is None or not cfg.hf_hub_id:
        raise mtcp.WeightsError(f"--start pretrained: timm publishes no weights for {backbone}")
    name = cfg.hf_hub_filename or "model.safetensors"
    try:
        return Path(hf_hub_download(cfg.hf_hub_id, name))
    except (OSError, HfHubHTTPError) as error:
        raise mtcp.WeightsError(
            f"--start pretrained: cannot get {name} of {cfg.hf_hub_id} from the Hugging Face hub "
            f"({type(error).__name__}). Without internet, fetch it elsewhere: --start FILE"
        ) from error


def make_optimizer(model: MTCP, balancer: nn.Module, lr: float, steps: int, recipe: Recipe):
    """AdamW, and its schedule of `steps` steps. The backbone learns at recipe.backbone_lr · lr."""
    backbone = list(model.backbone.net.parameters())
    own = {id(p) for p in backbone}
    rest = [p for p in model.parameters() if id(p) not in own]
    groups = [
        {"params": rest, "weight_decay": WEIGHT_DECAY},
        {"params": backbone, "weight_decay": WEIGHT_DECAY, "lr": recipe.backbone_lr * lr},
        # Kendall's σ: decay would pull them to 1
        {"params": balancer.parameters(), "weight_decay": 0.0},
    ]
    fused = next(model.parameters()).device.type in ("cpu", "cuda")  # one kernel for all tensors
    optimizer = torch.optim.AdamW(groups, lr=lr, fused=fused)
    factor = partial(lr_factor, total=steps, warmup=recipe.warmup)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def lr_factor(step: int, total: int, warmup: int) -> float:
    """Linear warm-up, then polynomial decay to zero, as a factor of --lr.

    D15: a step at a time; the release decays once an epoch.
    """
    return min(1.0, (step + 1) / (warmup + 1)) * max(0.0, 1 - step / total) ** POLY_POWER


# ==================================================================================================
# Metrics: each takes batches at the labels' resolution, and keeps sums over the whole split. All
# its tensors are such sums, so that several processes can add theirs up (see `evaluate`).
# ==================================================================================================


def float64(x: Tensor) -> Tensor:
    return x.cpu().to(torch.float64)  # on the CPU: Apple's GPUs have no such numbers


class SegmentationMetric:
    """mIoU and pixel accuracy, in %, from one confusion matrix over the split.

    A class that never occurs in the ground truth is left out of the mean: its IoU would be 0 or
    undefined by luck.
    """

    def __init__(self, task: Task):
        self.confusion = torch.zeros(task.channels, task.channels, dtype=torch.int64)

    def update(self, logits: Tensor, target: Tensor) -> None:
        """logits (B,K,H,W), target (B,H,W)"""
        n = len(self.confusion)
        valid = target != IGNORE_INDEX
        predicted = logits.max(dim=1).indices  # as argmax, in half the time
        pairs = target[valid] * n + predicted[valid]
        # rows: truth, columns: prediction
        self.confusion += torch.bincount(pairs, minlength=n * n).view(n, n).cpu()

    def compute(self) -> dict[str, float]:
        hit = self.confusion.diag()
        truth = self.confusion.sum(dim=1)
        iou = hit / (truth + self.confusion.sum(dim=0) - hit)
        accuracy = hit.sum() / truth.sum()
        return {"mIoU": 100 * iou[truth > 0].mean().item(), "pixel_acc": 100 * accuracy.item()}


class DepthMetric:
    """Depth errors over all valid pixels of the split.

    rmse          root mean square error in metres; valid = depth > 0: ATRC, InvPT, TaskPrompter, …
    rmse_lt6.55   valid = 0 < depth < 6.5535 m: MTFormer, MT-CP. Far pixels, where errors are large,
                  do not count, so this figure is lower; never compare one with the other.
    abs_rel       mean of |d - d*| / d*
    delta_1.25    % of the pixels with max(d/d*, d*/d) < 1.25
    """

    def __init__(self, task: Task):
        self.sums = torch.zeros(4, dtype=torch.float64)  # in the order of the docstring
        self.pixels = torch.zeros(4, dtype=torch.float64)

    def update(self, depth: Tensor, target: Tensor) -> None:
        """depth, target (B,1,H,W)"""
        valid = target > 0
        d = float64(depth[valid])
        true = float64(target[valid])
        near = true < 6.5535
        square = (d - true).square()
        relative = (d - true).abs() / true
        close = torch.maximum(d / true, true / d) < 1.25
        self.sums += torch.stack([x.sum() for x in (square, square[near], relative, close)])
        self.pixels += torch.tensor([len(true), near.sum(), len(true), len(true)])

    def compute(self) -> dict[str, float]:
        rmse, rmse_near, abs_rel, delta = (self.sums / self.pixels).tolist()  # 0/0 is NaN
        return {
            "rmse": math.sqrt(rmse),
            "rmse_lt6.55": math.sqrt(rmse_near),
            "abs_rel": abs_rel,
            "delta_1.25": 100 * delta,
        }


class NormalsMetric:
    """Angle between predicted and true normals in degrees: mean, median, % below 11.25, 22.5, 30.

    The angles are counted in bins of 0.01°, since a real split has 200 million of them: the median
    is exact to that.
    """

    def __init__(self, task: Task):
        self.total = torch.zeros((), dtype=torch.float64)
        self.bins = torch.zeros(18001, dtype=torch.int64)

    def update(self, normals: Tensor, target: Tensor) -> None:
        """unit normals, target (B,3,H,W)"""
        angle = angle_between(normals.float(), target)[target.square().sum(dim=1) > 0.25]
        self.total += float64(angle).sum()
        self.bins += torch.bincount((angle * 100).long().cpu(), minlength=18001)

    def compute(self) -> dict[str, float]:
        n = self.bins.sum().item()
        below = self.bins.cumsum(dim=0)
        if n == 0:
            names = ("mean", "median", "below_11.25", "below_22.5", "below_30")
            return dict.fromkeys(names, math.nan)
        median = torch.searchsorted(below, (n + 1) // 2).item() / 100
        shares = {f"below_{a}": 100 * below[int(a * 100) - 1].item() / n for a in (11.25, 22.5, 30)}
        return {"mean": self.total.item() / n, "median": median, **shares}


class SaliencyMetric:
    """Maximum F-measure over thresholds, in %, by the two protocols in use.

    maxF         ASTMT, MTI-Net, MT-CP: at each of the 15 thresholds 0.2 … 0.9, precision and recall
                 of every image, averaged over images, F with β² = 1
    maxF_pooled  ATRC, InvPT, TaskPrompter, MTMamba: at 0.05, 0.10, … 0.95, pixels of the whole
                 split pooled, β² = 0.3. Their code passes probabilities through a second sigmoid,
                 so that in effect five thresholds are tried; here the probability is compared.

    Precision or recall without a single predicted or true pixel counts as 0.
    """

    per_image = torch.linspace(0.2, 0.9, 15)
    pooled = torch.arange(1, 20) / 20

    def __init__(self, task: Task):
        self.images = torch.tensor(0)
        self.precision = torch.zeros(15, dtype=torch.float64)
        self.recall = torch.zeros(15, dtype=torch.float64)
        self.counts = torch.zeros(3, 19, dtype=torch.float64)  # hits, predicted, true

    def update(self, logits: Tensor, target: Tensor) -> None:
        """logits, target (B,1,H,W), target 0, 1 or 255"""
        for y, t in zip(torch.sigmoid(logits.float()).cpu(), target.cpu(), strict=True):
            p = y[t != IGNORE_INDEX]
            if len(p) == 0:
                continue
            truth = t[t != IGNORE_INDEX] > 0.5
            predicted = p > self.per_image[:, None]  # (15,pixels)
            hits = (predicted & truth).sum(dim=1)
            self.precision += hits / predicted.sum(dim=1).clamp(min=1)
            self.recall += hits / truth.sum().clamp(min=1)
            self.images += 1
            predicted = p >= self.pooled[:, None]  # (19,pixels)
            hits = (predicted & truth).sum(dim=1)
            self.counts += torch.stack([hits, predicted.sum(dim=1), truth.sum().expand(19)])

    def compute(self) -> dict[str, float]:
        hits, predicted, true = self.counts
        pooled = self.f_measure(hits / predicted.clamp(min=1), hits / true.clamp(min=1), 0.3)
        if self.images == 0:
            return {"maxF": math.nan, "maxF_pooled": math.nan}
        n = self.images
        per_image = self.f_measure(self.precision / n, self.recall / n, 1.0)
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

# ==================================================================================================
# Coherence: do the predictions of different tasks agree with each other? Each figure stands beside
# the one that the ground truth reaches under the same rule: its ceiling or floor, not 100 % or 0.
# ==================================================================================================


class GeometricCoherence:
    """Depth and normals of one scene, compared with each other.

    normal_angle  mean angle in degrees between predicted normals and the normals of the predicted
                  depth, where the true surface is smooth: a difference across an edge is no normal

    Limit: a constant depth with frontal normals is perfectly coherent. So read this beside the
    tasks' own metrics. Notebook 05 also compares class boundaries with geometric edges.
    """

    needs = {"depth", "normals"}

    def __init__(self, intrinsics: tuple[float, float, float, float]):
        self.intrinsics = intrinsics
        self.total = torch.zeros(2, dtype=torch.float64)  # of the prediction, of the truth
        self.pixels = torch.tensor(0)

    def update(self, y: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
        smooth = smooth_surface(truth["depth"], truth["normals"])
        self.pixels += smooth.sum().cpu()
        for i, maps in enumerate((y, truth)):
            n = normals_from_depth(maps["depth"], self.intrinsics)
            angle = angle_between(n, maps["normals"])[smooth]
            self.total[i] += float64(angle).sum()

    def compute(self) -> dict[str, float]:
        ours, truth = (self.total / self.pixels).tolist()  # 0/0 is NaN
        return {"normal_angle": ours, "normal_angle_truth": truth}


class SemanticCoherence:
    """Human parts and salient pixels belong somewhere.

    parts_on_person    % of predicted part pixels that lie on predicted people
    salient_on_object  % of predicted salient pixels on predicted objects, any class but background

    Limit: predicting "person" everywhere is perfectly coherent. So read this beside the tasks' own
    metrics. In the truth, unannotated regions are left out.
    """

    needs = {"semseg", "human_parts", "sal"}
    names = ["parts_on_person", "salient_on_object"]
    names += [f"{name}_truth" for name in names]

    def __init__(self):
        self.counts = torch.zeros(len(self.names), 2, dtype=torch.int64)  # hits, of how many pixels

    def update(self, y: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
        predicted = {
            "semseg": y["semseg"].argmax(dim=1),
            "human_parts": y["human_parts"].argmax(dim=1),
            "sal": y["sal"] > 0,
        }
        counts = []
        for maps in (predicted, {**truth, "sal": truth["sal"] == 1}):
            classes = maps["semseg"]
            known = classes != IGNORE_INDEX
            part = (maps["human_parts"] > 0) & (maps["human_parts"] != IGNORE_INDEX) & known
            salient = maps["sal"][:, 0] & known
            for pixels, where in ((part, classes == data.PERSON), (salient, classes > 0)):
                counts.append(torch.stack([(pixels & where).sum(), pixels.sum()]))
        self.counts += torch.stack(counts).cpu()

    def compute(self) -> dict[str, float]:
        hits, pixels = self.counts.T
        return dict(zip(self.names, (100 * hits.double() / pixels).tolist(), strict=True))


def make_coherence(names: list[str], dataset) -> GeometricCoherence | SemanticCoherence | None:
    """What can be measured with these tasks, or None."""
    intrinsics = dataset.intrinsics()
    if intrinsics is not None and GeometricCoherence.needs <= set(names):
        return GeometricCoherence(intrinsics)
    return SemanticCoherence() if SemanticCoherence.needs <= set(names) else None


# ==================================================================================================
# Evaluation
# ==================================================================================================


@torch.no_grad()
def evaluate(model: nn.Module, tasks: tuple[Task, ...], loader, device: str, amp=False) -> dict:
    """{task name: {metric: value}} over the whole loader, at the labels' resolution.

    For a model with CFM also cosine_before and cosine_after: the mean cosine distance of X_t, and
    of X̂_t, to the auxiliaries (see mtcp.cosine_distance). Where the tasks allow it also
    "coherence" (see make_coherence). A figure without a single valid pixel is NaN.
    """
    model.eval()
    metrics = {t.name: METRICS[t.metric](t) for t in tasks}
    coherence = make_coherence(list(metrics), loader.dataset)
    with record_cosine_distances(model) as seen:
        for batch in progress(loader, "evaluating"):
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=amp):
                outputs = model(batch["image"].to(device))
            truth = {t.name: batch[t.name].to(device) for t in tasks}
            y = {}
            for t in tasks:
                final = outputs[t.name]["final"].float()
                y[t.name] = at_label_size(t, final, truth[t.name])
                metrics[t.name].update(y[t.name], truth[t.name])
            if coherence is not None:
                coherence.update(y, truth)
    for metric in (*metrics.values(), *([] if coherence is None else [coherence])):
        sum_over_processes(*(x for x in vars(metric).values() if isinstance(x, Tensor)))
    sum_over_processes(*seen.values())
    results = {name: metric.compute() for name, metric in metrics.items()}
    for name, (before, after, images) in seen.items():
        if name in results:  # not a task of the network that is not asked for
            before, after = (before / images).item(), (after / images).item()
            results[name] |= {"cosine_before": before, "cosine_after": after}
    return results if coherence is None else {**results, "coherence": coherence.compute()}


def at_label_size(task: Task, y: Tensor, target: Tensor) -> Tensor:
    """Prediction (B,channels,h,w) → (B,channels,H,W) of the label; normals of length 1 again."""
    if y.shape[-2:] == target.shape[-2:]:
        return y
    y = mtcp.resize(y, target.shape[-2:])
    return F.normalize(y, dim=1) if task.output == "unit" else y


@contextmanager
def record_cosine_distances(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Inside the `with` block {task: (3,)} grows: sums of the distance of X_t and X̂_t, images."""
    cfm = getattr(model, "cfm", None) or {}
    seen = {t: torch.zeros(3, dtype=torch.float64) for t in cfm}

    def record(t: str, module: nn.Module, inputs: tuple, X_hat: Tensor) -> None:
        X_t, auxiliaries = inputs
        before, after = (mtcp.cosine_distance(x, auxiliaries).item() for x in (X_t, X_hat))
        seen[t] += len(X_t) * torch.tensor([before, after, 1.0], dtype=torch.float64)

    hooks = [m.register_forward_hook(partial(record, t)) for t, m in cfm.items()]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


class ConstantPredictor(nn.Module):
    """The trivial predictor: what a network must beat before it can be said to have looked.

    Answers everywhere with the training split's majority class, mean depth and mean normal; where
    there are two classes, as in saliency, with the one that is looked for.
    """

    def __init__(self, tasks: tuple[Task, ...], loader):
        super().__init__()
        totals = {t.name: torch.zeros(t.channels, dtype=torch.float64) for t in tasks}
        counts = {t: torch.tensor(0) for t in totals}
        for batch in progress(loader, "trivial predictor"):
            for t in tasks:
                total, count = self.sum_up(t, batch[t.name])
                totals[t.name] += total
                counts[t.name] += count
        sum_over_processes(*totals.values(), *counts.values())
        empty = [t for t, n in counts.items() if n == 0]
        if empty:
            raise DataError(f"no valid pixel of {empty[0]} in the training split: drop the task")
        self.constants = {t: (v / counts[t]).float() for t, v in totals.items()}
        for t in tasks:
            if t.output == "unit":
                self.constants[t.name] = F.normalize(self.constants[t.name], dim=0)

    @staticmethod
    def sum_up(task: Task, target: Tensor) -> tuple[Tensor, int]:
        """A batch's labels → sum (channels,) over pixels that say something, and their number."""
        if task.output != "logits":  # invalid pixels are all-zero
            return target.sum(dim=(0, 2, 3)), (target != 0).any(dim=1).sum().item()
        known = target[target != IGNORE_INDEX]
        if task.channels == 1:
            return torch.full((1,), known.numel()), known.numel()
        if known.numel() and known.max() >= task.channels:
            found = f"has class {known.max()}, and its Task {task.channels} channels"
            raise DataError(f"a label of {task.name} {found}")
        return torch.bincount(known, minlength=task.channels), known.numel()

    def forward(self, x: Tensor) -> dict[str, dict]:
        outputs = {}
        for t, c in self.constants.items():
            everywhere = c.to(x.device)[None, :, None, None].expand(len(x), -1, *x.shape[-2:])
            outputs[t] = {"final": everywhere}
        return outputs


def score(tasks: tuple[Task, ...], results: dict, reference: dict) -> float:
    """Mean over tasks of the headline figure's relative gain over the reference's, in %.

    Against the trivial predictor it chooses the best epoch. Segmentation then counts most: a
    trivial mIoU is tiny, so its gain reaches hundreds of %, and an error can fall by 100 % at most.
    Against single-task networks it is Δm [Maninis et al., CVPR 2019].
    """
    gains = []
    for t in tasks:
        ratio = results[t.name][t.metric] / max(reference[t.name][t.metric], 1e-9)
        gains.append(t.better * (ratio - 1))
    return 100 * float(np.mean(gains)) if gains else math.nan


def judging_tasks(tasks: tuple[Task, ...], trivial: dict) -> tuple[Task, ...]:
    """The tasks that choose the best epoch: those with a valid pixel in a held-out image."""
    judging = tuple(t for t in tasks if not math.isnan(trivial[t.name][t.metric]))
    if judging != tasks:
        absent = " ".join(t.name for t in tasks if t not in judging)
        by = " ".join(t.name for t in judging)
        how = f"is chosen by {by}" if by else "counts as the last one"
        print(f"no valid pixel of {absent} in the held-out images: the best epoch {how}")
    return judging


def single_task_results(folder: Path, dataset: str, tasks: tuple[Task, ...]) -> dict[str, dict]:
    """{task name: {headline metric: figure on the test split}} from folder/TASK/metrics.json."""
    results = {}
    for t in tasks:
        report = read_json(folder / t.name / "metrics.json")
        try:
            if report["dataset"] != dataset:
                raise DataError(f"{folder / t.name} is a run on {report['dataset']}, not {dataset}")
            results[t.name] = {t.metric: float(report["test"][t.name][t.metric])}
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{folder / t.name}/metrics.json has no result of {t.name}") from error
    return results


@torch.no_grad()
def save_predictions(model: nn.Module, tasks: tuple[Task, ...], dataset, path: Path, n=6) -> None:
    """Rows: n samples spread over the dataset. Columns: the image, truth and prediction a task."""
    model.eval()
    device = next(model.parameters()).device
    rows = []
    for i in np.linspace(0, len(dataset) - 1, min(n, len(dataset))).astype(int):
        sample = dataset[i]
        outputs = model(sample["image"][None].to(device))
        row = [data.picture("image", sample["image"])]
        for t in tasks:
            truth = sample[t.name]
            y = at_label_size(t, outputs[t.name]["final"].float(), truth[None])[0]
            row += [data.picture(t.name, truth), data.picture(t.name, as_label(t, y))]
        rows.append(row)
    titles = ["image"] + [f"{t.name}, {what}" for t in tasks for what in ("truth", "prediction")]
    data.contact_sheet(titles, rows).save(path)


def as_label(task: Task, y: Tensor) -> Tensor:
    """A prediction (channels,H,W) in the format of the task's label."""
    if task.output != "logits":
        return y
    return torch.sigmoid(y) if task.channels == 1 else y.argmax(dim=0)


# ==================================================================================================
# Files and tables
# ==================================================================================================


def new_folder(out: Path | None, default: str) -> Path:
    """`out`, or the next free DEFAULT-N. DataError if it already holds something."""
    if out is None:
        n = 1
        while Path(f"{default}-{n}").exists():
            n += 1
        out = Path(f"{default}-{n}")
    elif holds_something(out):
        raise DataError(f"{out} is not empty: choose another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"the folder cannot be made ({error}): choose an --out") from error
    return out


def without_nan(content):
    """The same with None, JSON's null, for every NaN, which strict JSON does not know."""
    if isinstance(content, dict):
        return {key: without_nan(value) for key, value in content.items()}
    return None if isinstance(content, float) and math.isnan(content) else content


def save_json(path: Path, content: dict) -> None:
    data.save_text(path, json.dumps(without_nan(content), indent=2))


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}): is this the folder of a run?") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} is damaged: expected an object in braces")
    return content


def save_checkpoint(path: Path, **content) -> None:
    """The file is on the disk, whole, before it takes the place of an older one."""

    def write(file) -> None:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())

    try:
        data.save(path, write)
    except RuntimeError as error:  # torch's word for a full disk
        raise OSError(f"{path} cannot be written; is the disk full? ({error})") from error


def load_checkpoint(path: Path) -> dict:
    """What save_checkpoint wrote; DataError if it is none. weights_only: it cannot run code."""
    if not path.is_file():
        raise DataError(f"checkpoint {path} not found")
    try:
        content = mtcp.read_checkpoint(path)
        missing = {"args", "config", "tasks", "model"} - content.keys()
    except (mtcp.WeightsError, AttributeError) as error:
        raise DataError(f"{path} is no checkpoint of train.py: it {error}") from error
    if missing:
        raise DataError(f"{path} is no checkpoint of train.py: it has no {sorted(missing)}")
    return content


def last_checkpoint(out: Path) -> dict | None:
    """What a run goes on from; None before the end of its first epoch.

    A last.pt that cannot be read, or is missing, gives way to the one before it.
    """
    last = out / "last.pt"
    previous = out / "previous.pt"
    if not last.is_file() and not previous.is_file():
        return None
    try:
        return load_checkpoint(last)
    except DataError as error:
        if not previous.is_file():
            raise
        content = load_checkpoint(previous)
        print(f"{error}; going on from {previous}", file=sys.stderr)
        return {**content, "read_from": previous}


def lock(folder: Path):
    """A file that is locked as long as this process lives. DataError if another one holds it."""
    file = open(folder / ".lock", "w")  # noqa: SIM115  (closing it would end the lock)
    try:
        if fcntl is not None:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise DataError(f"{folder} is in use by another process: choose another --out") from error
    except OSError as error:
        print(f"{folder} cannot be locked ({error}): use it in one process only", file=sys.stderr)
    return file


def load_model(path: str | Path) -> MTCP:
    """The network of a checkpoint, in evaluation mode. DataError names tensors that do not match.

    In a notebook: model = load_model("best.pt"); model(x)["depth"]["final"], x as in MTCP.forward.
    """
    return build_model(load_checkpoint(Path(path)), path)


def build_model(content: dict, path: Path) -> MTCP:
    """The network of what was read from `path`; see load_model."""
    try:
        tasks = tuple(Task(**t) for t in content["tasks"])
        cfg = mtcp.MTCPConfig(**content["config"])
    except TypeError as error:
        raise DataError(f"{path} is a checkpoint of another version ({error})") from error
    model = make_model(tasks, cfg)
    try:
        model.load_state_dict(content["model"])
    except RuntimeError as error:
        raise DataError(f"{path} does not fit the network it describes: {error}") from error
    return model.eval()


def table_row(first: str, *cells: str | float) -> str:
    """A line of a table: numbers with three decimals, a dash for NaN."""
    texts = [c[:8] if isinstance(c, str) else "–" if math.isnan(c) else f"{c:.3f}" for c in cells]
    return f"{first:26s}" + "".join(f" {text:>8s}" for text in texts)


def results_table(tasks: tuple[Task, ...], report: dict) -> str:
    """All figures of the test split beside those of the trivial predictor, or of the truth."""
    lines = [table_row("test split", "model", "trivial")]
    distances = []
    for t in tasks:
        results = dict(report["test"][t.name])
        if "cosine_before" in results:
            pair = results.pop("cosine_before"), results.pop("cosine_after")
            distances.append(table_row(t.name, *pair))
        for metric, value in results.items():
            arrow = {1: " ↑", -1: " ↓"}[t.better] if metric == t.metric else ""
            trivial = report["trivial"][t.name][metric]
            lines.append(table_row(f"{t.name} {metric}{arrow}", value, trivial))
        if math.isnan(results[t.metric]):
            lines.append(f"  no valid pixel of {t.name} in the test split: nothing to measure")
    if distances:
        lines += [table_row("cosine distance to others", "X_t", "X_hat_t"), *distances]
    coherence = report["test"].get("coherence", {})
    if coherence:
        lines.append(table_row("coherence", "model", "truth"))
    for name, value in coherence.items():
        if not name.endswith("_truth"):
            lines.append(table_row(name, value, coherence[f"{name}_truth"]))
    return "\n".join(lines)


def require_finite(values: Tensor, losses: dict[str, Tensor], names: list[str]) -> None:
    """FloatingPointError if a total loss, a gradient's norm or weights are not finite.

    names: the images of the step, one of which may be to blame.
    """
    if not torch.isfinite(values).all():
        last = {t: round(loss.item(), 3) for t, loss in losses.items()}
        raise FloatingPointError(
            f"training has left the finite numbers (losses of the last step: {last}; its images: "
            f"{mtcp.listed(names)}): look at these, or begin a new run with a lower --lr"
        )


class Terminated(KeyboardInterrupt):
    """SIGTERM: Slurm's word, for example, before it takes the machine away."""

    asked = False


def terminate(*_) -> None:
    """The signal may go to the processes that load data, too: they end without a word."""
    if multiprocessing.parent_process() is not None:
        os._exit(143)
    Terminated.asked = True
    if hasattr(signal, "SIGCHLD"):  # torch's handler would report their end as an error
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    raise Terminated


class Run:
    """The folder of a run, new or continued with --resume; process 0 writes to it each epoch."""

    def __init__(self, args, model: MTCP, start: str, train_set, saved: dict | None, **parts):
        self.parts = {"model": model, **parts}  # all that has a state
        self.about = {  # in every checkpoint: the flags, and all it takes to build the network
            "args": {key: plain(value) for key, value in vars(args).items()},
            "config": asdict(model.cfg),
            "tasks": [asdict(t) for t in model.tasks],
            # for --predict
            "classes": {t: train_set.classes[t] for t in model.names if t in train_set.classes},
            "size": tuple(train_set[0]["image"].shape[1:]),
        }
        self.next_epoch = 0
        self.best = -math.inf
        self.log = []
        if saved is not None:
            absent = {*self.parts, "epoch", "best", "log"} - saved.keys()
            if absent:
                raise DataError(f"{args.out}/last.pt has no {sorted(absent)}: is it a best.pt?")
            for name, part in self.parts.items():
                part.load_state_dict(saved[name])
            self.next_epoch = saved["epoch"] + 1
            self.best = saved["best"]
            self.log = saved["log"]
        if rank() == 0:
            self.open_folder(args, saved, start)
        self.out = as_in_process_0(args.out)
        print(f"{self.out}: {parameters(model) / 1e6:.1f} M parameters, from {start}")
        print(table_row("epoch", *(c for t in model.tasks for c in (t.name, "weight", t.metric))))

    def open_folder(self, args: argparse.Namespace, saved: dict | None, start: str) -> None:
        """A new folder, or that of the run to go on with, put in order."""
        begun = args.resume and holds_something(args.out)
        args.out = args.out if begun else new_folder(args.out, f"runs/{args.dataset}")
        self.out = args.out  # `cli` reads args.out to say how to go on
        self.lock = lock(self.out)
        for left in self.out.glob(".*.pt.*"):  # of a process that was killed while it saved
            left.unlink()
        config = {**self.about["args"], "started_from": start}
        if saved is not None:
            if "read_from" in saved:
                os.replace(saved["read_from"], self.out / "last.pt")
            self.write_log()  # its last line may be missing
            before = read_json(self.out / "config.json")
            config |= {key: before.get(key) for key in (*OWN, "started_from")}
            if before["epochs"] != args.epochs:
                print(f"schedule stretched from {before['epochs']} to {args.epochs} epochs")
        save_json(self.out / "config.json", config)

    def end_epoch(
        self, epoch: int, losses: dict, weights: list, results: dict, reached: float, skipped: int
    ) -> None:
        """Saves last.pt and, if the score is the highest yet, best.pt; adds a line to the log.

        Whenever the process dies, last.pt or previous.pt is whole, and the epoch after it is run
        again, with the same draws.
        """
        if rank() > 0:
            return
        model = self.parts["model"]
        weights = dict(zip(model.names, weights, strict=True))
        entry = {"epoch": epoch, "loss": losses, "weight": weights, "heldout": results}
        entry |= {"skipped": skipped} if skipped else {}
        self.log.append(without_nan({**entry, "score": reached}))
        if not reached <= self.best:  # also where it is NaN, so that there is always a best.pt
            self.best = reached
            state = model.state_dict()
            save_checkpoint(self.out / "best.pt", **self.about, model=state, epoch=epoch)
        states = {name: part.state_dict() for name, part in self.parts.items()}
        states |= {"epoch": epoch, "best": self.best, "log": self.log}
        save_checkpoint(self.out / "next.pt", **self.about, **states)
        if (self.out / "last.pt").is_file():
            os.replace(self.out / "last.pt", self.out / "previous.pt")
        os.replace(self.out / "next.pt", self.out / "last.pt")
        self.write_log()
        cells = []
        for t in model.tasks:
            cells += [losses[t.name], weights[t.name], results[t.name][t.metric]]
        print(table_row(f"{epoch + 1:5d}  {time.strftime('%H:%M:%S')}", *cells))

    def write_log(self) -> None:
        lines = [json.dumps(line) + "\n" for line in self.log]
        data.save_text(self.out / "log.jsonl", "".join(lines))


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def finish(out: Path | None, report: dict, model: MTCP, tasks: tuple[Task, ...], test_set) -> dict:
    """Writes metrics.json and predictions.png into `out`, if there is one, then prints figures."""
    if out is not None and rank() == 0:
        save_json(out / "metrics.json", report)
        save_predictions(model, tasks, test_set, out / "predictions.png")
    print(results_table(tasks, report))
    rest = {k: v for k, v in report.items() if not isinstance(v, dict)}
    print(
        ", ".join(f"{k} {v:.2f}" if isinstance(v, float) else f"{k} {v}" for k, v in rest.items())
    )
    if out is not None:
        print(f"pictures: {out / 'predictions.png'}")
    return report


# ==================================================================================================
# Main: setup, loop, test
# ==================================================================================================


def epoch_loader(train_set, epoch: int, part: int, args: argparse.Namespace) -> DataLoader:
    """An epoch's batches. It has its own seed: a resumed run draws what a whole one would have."""
    torch.manual_seed(args.seed + 1000 * (epoch + 1) + 1_000_000 * rank())
    train_set.epoch = epoch
    return data.make_loader(
        train_set, part, shuffle=True, seed=args.seed + epoch, workers=args.workers,
        rank=rank(), processes=processes(), accumulate=args.accumulate,
    )  # fmt: skip


def make_mask_set(args: argparse.Namespace, part: int) -> tuple:
    """What learn_masks learns from: images with segmentation, and the classes, largest first."""
    where = (args.dataset, args.root, ["semseg"], args.size, args.seed)
    semseg = tuple(t for t in RECIPES[args.dataset].tasks if t.name == "semseg")
    try:
        masks_set, plain_set, _, _ = make_datasets(*where, args.preset, args.skip_bad_samples)
        constant = ConstantPredictor(semseg, make_loader(plain_set, part, args.workers))
    except DataError as error:
        raise DataError(f"{error} (to train without these labels: --mask-epochs 0)") from error
    area = constant.constants["semseg"]  # share of each class
    return masks_set, area.argsort(descending=True)[: (area > 0).sum()]


def learn_masks(model: MTCP, masks_set, classes: Tensor, args, recipe: Recipe, part: int) -> None:
    """Trains backbone, pixel decoder and query decoder on masks of the true segmentation.

    D16: the paper starts from a Mask2Former, which has learned masks on ADE20K. Without its weights
    the task losses alone would have to form P and M, through all decoders that lie behind them. So
    query n first learns the mask of the training split's n-th largest class; also where the tasks
    that follow leave segmentation out. A run that is killed here begins anew with --resume.
    """
    classes = classes[: model.cfg.queries].to(args.device)
    steps = args.mask_epochs * max(1, len(masks_set) // args.batch_size)
    optimizer, scheduler = make_optimizer(model, nn.Module(), args.lr, steps, recipe)
    model.train()
    for epoch in range(args.epochs, args.epochs + args.mask_epochs):  # draws of their own
        loader = epoch_loader(masks_set, epoch, part, args)
        total = 0.0
        names = []
        for i, batch in enumerate(progress(loader, "masks")):
            names = (names if i % args.accumulate else []) + batch["name"]  # of this step's images
            images = batch["image"].to(args.device, memory_format=torch.channels_last)
            pad = (0, -images.shape[-1] % 32, 0, -images.shape[-2] % 32)  # as MTCP.forward does
            label = F.pad(batch["semseg"], pad, value=IGNORE_INDEX).to(args.device)
            with torch.autocast(images.device.type, torch.bfloat16, enabled=args.amp):
                _, M = model.shared(F.pad(images, pad))
            loss = mtcp.mask_loss(M, label, classes)
            total += loss.item() / len(loader)
            (loss / args.accumulate).backward()
            if (i + 1) % args.accumulate:
                continue
            average_over_processes(p.grad for p in model.parameters() if p.grad is not None)
            norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
            require_finite(norm, {"masks": loss}, names)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            if Terminated.asked:
                raise Terminated
        print(f"masks  {time.strftime('%H:%M:%S')}   loss of the masks {total:.3f}")


def main(args: argparse.Namespace) -> dict:
    """Trains as the flags say, in three steps: setup, loop, test. Returns metrics.json."""
    # --- Setup: data, network, balancer, optimiser ---
    started = time.time()
    torch.manual_seed(args.seed)  # the initial weights
    recipe = find_recipe(args.dataset, args.preset)
    tasks = tuple(t for t in recipe.tasks if t.name in args.tasks)
    single = single_task_results(args.single, args.dataset, tasks) if args.single else None
    begun = as_in_process_0(last_checkpoint(args.out) if args.resume and rank() == 0 else None)
    if begun is not None:
        model, start = build_model(begun, args.out), "last.pt"
        model.cfg = replace(model.cfg, checkpointing=args.checkpointing)
    else:
        model, start = make_started_model(tasks, make_config(args), args.start)
    if args.dataset in data.WRITERS and begun is None:
        if rank() == 0:
            data.ensure_set(args.dataset, args.root)
        wait_for_all()
    where = (args.dataset, args.root, args.tasks, args.size, args.seed)
    sets = make_datasets(*where, args.preset, args.skip_bad_samples)
    train_set, plain_set, held_out_set, test_set = sets
    if processes() > 1 and args.device == "cuda":  # BatchNorm sees the images of all processes
        model = timm.layers.convert_sync_batchnorm(model)
    model = model.to(args.device, memory_format=torch.channels_last)  # faster, on CPU and GPU alike
    balancer = BALANCERS[args.balancer](model.names, args.kappa).to(args.device)
    steps = args.epochs * max(1, len(train_set) // args.batch_size)
    if args.start == "scratch":
        recipe = replace(recipe, backbone_lr=1.0)
    optimizer, scheduler = make_optimizer(model, balancer, args.lr, steps, recipe)
    part = args.batch_size // (processes() * args.accumulate)  # images that are seen at a time
    constant = ConstantPredictor(tasks, make_loader(plain_set, part, args.workers))
    held_out = make_loader(held_out_set, part, args.workers)
    trivial = evaluate(constant, tasks, held_out, args.device)
    judging = judging_tasks(tasks, trivial)
    states = {"balancer": balancer, "optimizer": optimizer, "scheduler": scheduler}
    masks = make_mask_set(args, part) if args.mask_epochs and begun is None else None
    run = Run(args, model, start, train_set, begun, **states)
    if masks is not None:
        learn_masks(model, *masks, args, recipe, part)
    network = model
    if processes() > 1:  # on CPUs each has its own BatchNorm, until the end of the epoch
        network = DistributedDataParallel(model, broadcast_buffers=False)

    # --- Loop: from the images on disk to the optimiser's step, and a look after every epoch ---
    for epoch in range(run.next_epoch, args.epochs):
        loader = epoch_loader(train_set, epoch, part, args)
        seen = mtcp.EpochMean(len(tasks)).double()
        skipped = torch.tensor(0)
        names = []
        model.train()
        for i, batch in enumerate(progress(loader, f"epoch {epoch + 1}")):
            last = (i + 1) % args.accumulate == 0  # is this the last part of the step?
            names = (names if i % args.accumulate else []) + batch["name"]  # of this step's images
            if processes() > 1:
                network.require_backward_grad_sync = last  # to exchange gradients once a step
            images = batch["image"].to(args.device, memory_format=torch.channels_last)
            targets = {t: batch[t].to(args.device) for t in model.names}
            skipped += sum(batch.get("skipped", []))
            with torch.autocast(images.device.type, torch.bfloat16, enabled=args.amp):
                outputs = network(images)
            losses = mtcp.task_losses(tasks, outputs, targets)  # {task: L_t}
            seen.add(torch.stack([loss.detach().cpu() for loss in losses.values()]))
            total = balancer(losses)  # Σ_t w_t log(1 + L_t)
            require_finite(total, losses, names)
            (total / args.accumulate).backward()
            if not last:
                continue
            average_over_processes(p.grad for p in balancer.parameters())  # DDP does the network's
            # D13: before the step. The release clips after it on PASCAL, which does nothing.
            norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
            require_finite(norm, losses, names)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            if Terminated.asked:  # and Python has dropped the exception, as it does in a __del__
                raise Terminated
        # Before anything is saved: a last step may have led to where no loss is seen any more.
        largest = torch.stack([p.detach().abs().max() for p in model.parameters()])
        require_finite(largest, losses, names)
        means = dict(zip(losses, seen.pop().tolist(), strict=True))
        sum_over_processes(skipped)
        average_over_processes(x for name, x in model.named_buffers() if "running" in name)
        weights = balancer.weights.tolist()  # of this epoch's last step, before they change
        balancer.end_epoch()
        # D14: held-out training images choose the epoch. The release uses the test split.
        results = evaluate(model, tasks, held_out, args.device, args.amp)
        reached = score(judging, results, trivial)
        run.end_epoch(epoch, means, weights, results, reached, skipped.item())

    # --- Test: once, with the weights of the epoch that the held-out images chose ---
    chosen = as_in_process_0(load_checkpoint(run.out / "best.pt") if rank() == 0 else None)
    model.load_state_dict(chosen["model"])
    report = test(args, model, constant, tasks, test_set, part, single)
    report["best_epoch"] = chosen["epoch"] + 1
    if args.skip_bad_samples:
        report["skipped"] = sum(line.get("skipped", 0) for line in run.log)
    report["parameters"] = parameters(model)
    if begun is None:  # of a continued run it would be the last part's
        report["seconds"] = round(time.time() - started)
    return finish(run.out, report, model, tasks, test_set)


def test(args, model: MTCP, constant, tasks, test_set, part: int, single: dict | None) -> dict:
    """Figures of the network and of the trivial predictor on the test split; Δm against single."""
    loader = make_loader(test_set, part, args.workers)
    trivial = evaluate(constant, tasks, loader, args.device)
    report = {"test": evaluate(model, tasks, loader, args.device, args.amp), "trivial": trivial}
    if single is not None:
        report["delta_m"] = score(tasks, report["test"], single)
    return {**report, "dataset": args.dataset}


def evaluate_checkpoint(args: argparse.Namespace) -> dict:
    """--eval: a checkpoint's network on the test split; writes only if --out is given."""
    model = load_model(args.eval).to(args.device, memory_format=torch.channels_last)  # as `main`
    tasks = tuple(t for t in model.tasks if t.name in args.tasks)
    where = (args.dataset, args.root, args.tasks, args.size, args.seed)
    _, plain_set, _, test_set = make_datasets(*where, args.preset, args.skip_bad_samples)
    single = single_task_results(args.single, args.dataset, tasks) if args.single else None
    out = new_folder(args.out, f"runs/{args.dataset}") if args.out is not None else None
    part = max(1, args.batch_size // (processes() * args.accumulate))
    constant = ConstantPredictor(tasks, make_loader(plain_set, part, args.workers))
    report = test(args, model, constant, tasks, test_set, part, single)
    report["checkpoint"] = str(args.eval)
    return finish(out, report, model, tasks, test_set)


# ==================================================================================================
# Prediction: your own photographs
# ==================================================================================================


def find_photographs(paths: list[Path]) -> list[Path]:
    """Files as they are, and the image files in folders. DataError if there is none."""
    found = []
    endings = (".jpg", ".jpeg", ".png", ".webp")
    for path in paths:
        if path.is_dir():
            found += [p for p in sorted(path.iterdir()) if p.suffix.lower() in endings]
        else:
            found.append(path)
    if not found:
        raise DataError(f"no photograph in {' '.join(map(str, paths))}")
    return found


@torch.no_grad()
def predict(args: argparse.Namespace) -> int:
    """--predict: writes what the network sees in each photograph; 1 if any could not be read.

    Of PHOTO.jpg: PHOTO_panel.png, all side by side; class maps as indexed PNG; depth as 16-bit PNG
    in millimetres, and a coloured preview; normals and saliency as pictures; with --npz PHOTO.npz.
    """
    photographs = find_photographs(args.predict)
    content = load_checkpoint(args.checkpoint)
    if not {"classes", "size"} <= content.keys():
        raise DataError(f"{args.checkpoint} was saved before there was --predict: train it again")
    model = build_model(content, args.checkpoint).to(args.device)
    out = new_folder(args.out, "predictions")
    failed = 0
    used = set()
    for path in progress(photographs, f"predicting into {out}"):
        try:
            pixels = data.read_photograph(path)
            labels = predict_labels(model, pixels, content["size"], args)
        except DataError as error:
            print(error, file=sys.stderr)
            failed += 1
            continue
        name = path.stem if path.stem not in used else path.name  # a.jpg and a.png
        while name in used:
            name += "_"
        used.add(name)
        save_labels(out, name, model.tasks, pixels, labels, content["classes"])
        if args.npz:
            data.save(out / f"{name}.npz", lambda f, x=labels: np.savez_compressed(f, **x))
    print(f"{len(photographs) - failed} of {len(photographs)} photographs: {out}")
    return 1 if failed else 0


def predict_labels(model: MTCP, pixels: np.ndarray, size: tuple[int, int], args) -> dict:
    """Photograph uint8 (H,W,3) → {task: prediction as a label, numpy, at the photograph's size}.

    The network sees it with about as many pixels as the images it was trained on: it knows things
    at that scale. Depth is that of a camera with the training images' angle of view.
    """
    H, W = pixels.shape[:2]
    scale = math.sqrt(size[0] * size[1] / (H * W))
    small = max(1, round(H * scale)), max(1, round(W * scale))
    image = torch.from_numpy(pixels).permute(2, 0, 1) / 255
    x = data.normalise(data.resize_image({"image": image}, small))["image"]
    x = x[None].to(args.device)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=args.amp):
        outputs = model(x)
    labels = {}
    for t in model.tasks:
        y = outputs[t.name]["final"].float().cpu()
        if t.output == "logits" and t.channels > 1:
            labels[t.name] = large_argmax(y, (H, W)).numpy()
        else:
            labels[t.name] = as_label(t, at_label_size(t, y, image)[0]).numpy()
    return labels


def large_argmax(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """resize(logits, size).argmax(dim=1)[0], class by class: 40 maps of 24 megapixels are 4 GB."""
    best = torch.full(size, -math.inf)
    index = torch.zeros(size, dtype=torch.int64)
    for k in range(logits.shape[1]):
        y = mtcp.resize(logits[:, k : k + 1], size)[0, 0]
        better = y > best
        best[better] = y[better]
        index[better] = k
    return index


def save_labels(out: Path, name: str, tasks, pixels: np.ndarray, labels: dict, classes) -> None:
    """The files of one photograph; see `predict`."""
    titles = ["photograph"]
    row = [pixels]
    names = {}
    for t in tasks:
        label = labels[t.name]
        titles.append(t.name)
        row.append(data.LABELS[t.name].picture(label))
        picture = Image.fromarray(row[-1])
        if t.output == "logits" and t.channels > 1:
            known = classes.get(t.name, range(t.channels))
            picture = Image.fromarray(label.astype(np.uint8))
            picture.putpalette(data.palette().tobytes())
            counts = np.bincount(label.ravel())
            present = np.argsort(-counts)[: np.count_nonzero(counts)]
            shares = {k: f"{known[k]} {counts[k] / label.size:.1%}" for k in present}
            names[t.name] = shares
        elif t.output == "positive":
            data.save_image(out / f"{name}_{t.name}_preview.png", row[-1])
            millimetres = (label[0] * 1000).round().clip(0, 65535)
            picture = Image.fromarray(millimetres.astype(np.uint16))
        elif t.output == "logits":
            picture = Image.fromarray((label[0] * 255).round().astype(np.uint8))
        data.save(out / f"{name}_{t.name}.png", lambda f, p=picture: p.save(f, "PNG"))
    panel = data.contact_sheet(titles, [row], height=360)
    strips = [data.legend(title, shares, panel.width) for title, shares in names.items()]
    width = max(part.width for part in (panel, *strips))
    height = sum(part.height for part in (panel, *strips))
    sheet = Image.new("RGB", (width, height), "white")
    top = 0
    for part in (panel, *strips):
        sheet.paste(part, (0, top))
        top += part.height
    data.save(out / f"{name}_panel.png", lambda f: sheet.save(f, "PNG"))


@contextmanager
def told_to_stop() -> Iterator[None]:
    """Inside the `with` block, SIGTERM raises Terminated."""
    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except RuntimeError as error:
        if Terminated.asked:  # a process that loads data has ended first
            raise Terminated from error
        raise
    finally:
        if processes() > 1:  # torchrun sends it when one has failed; this one is on its way out
            signal.signal(signal.SIGTERM, signal.SIG_IGN)


@contextmanager
def quiet() -> Iterator[None]:
    """Process 0 prints for all: inside the `with` block, what others print is lost."""
    if rank() == 0:
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        yield


def cli(argv: list[str] | None = None) -> int:
    """Exit status: 0; 1 if a photograph could not be read; 2 with one sentence on stderr; after
    Ctrl-C 130, after SIGTERM 143.
    """
    data.keep_printing()
    args = None
    try:
        with told_to_stop(), quiet():
            with redirect_stderr(io.StringIO() if local_rank() > 0 else sys.stderr):
                args = parse_args(argv)  # the first process of each machine says what is wrong
            if args.predict is not None:
                return predict(args)
            join_processes(args)
            evaluate_checkpoint(args) if args.eval else main(args)
            if processes() > 1:
                dist.destroy_process_group()
            return 0
    except (DataError, mtcp.WeightsError, FloatingPointError, OSError) as error:
        reason = str(error)
    except NotImplementedError as error:
        reason = str(error).partition(".")[0]
        reason = f"this device cannot do it all ({reason}): take --device cpu"
    except torch.OutOfMemoryError:
        smaller = "--accumulate 2, --checkpointing or "
        if args.eval or args.predict:
            smaller = "a smaller --batch-size or " if args.eval else ""
        reason = f"the device has too little memory: try {smaller}--device cpu"
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        if processes() > 1 and (isinstance(error, dist.DistError) or "gloo" in reason):
            reason = f"there is no contact to the other processes; has one failed? ({error})"
        elif "DataLoader worker" in reason or "shared memory" in str(error):
            reason = f"a process that loads data has died ({reason}): try --workers 0"
        else:
            raise
    except KeyboardInterrupt as stop:
        # Ends a loader that was being made. Torch complains of it: let that not be the last word.
        traceback.clear_frames(stop.__traceback__)
        begun = args is not None and args.out is not None and (args.out / "config.json").is_file()
        how = "say it again"
        if begun and not args.eval and not args.predict:
            start = "python" if processes() == 1 else "torchrun …"
            how = f"go on by: {start} train.py --resume --out {shlex.quote(str(args.out))}"
        if rank() == 0:
            print(f"\nstopped; {how}", file=sys.stderr)
        return 143 if isinstance(stop, Terminated) else 130
    print(reason if rank() == 0 else f"process {rank()}: {reason}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(cli())
