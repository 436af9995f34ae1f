"""MT-CP in one file: multi-task dense prediction with coherence and prioritisation.

M. Fontana, M. Spratling, M. Shi, "Optimizing Dense Visual Predictions Through Multi-Task Coherence
and Prioritization", WACV 2025, arXiv 2412.03179. This is an independent implementation, to be read
from top to bottom beside the paper. It needs torch, timm and safetensors, and no file beside it.

One network predicts several dense maps of one image, for example segmentation, depth and surface
normals. The paper's Figure 2, with its symbols, is the table of contents. B images of H x W pixels,
T tasks, C = 256 channels, h x w = H/4 x W/4. ⊙ multiplies elementwise, σ is the sigmoid, [a; b]
concatenates channels.

    x (B,3,H,W)
     └─ Backbone ──────── c2, c3, c4, c5               strides 4, 8, 16, 32
          └─ PixelDecoder ─────── P (B,C,h,w)          per-pixel embedding, and three coarse maps
               └─ QueryDecoder ── M (B,N,h,w)          one mask (logits) per learned query, N = 100
                     R = P ⊙ Σ_n σ(M_n) (B,C,h,w)      shared representation
     for every task t:
       TaskDecoder          R → F_t = (f1, f2, f3)     (C,h,w), (2C,h/2,w/2), (4C,h/4,w/4)
       FeaturePyramid       F_t → X_t (B,C,h,w)        the task's own representation
       CoherenceFusion      X_t, all X_u, u ≠ t → X̂_t  coherence fusion (CFM); decoded: ŷ_initial
       TraceBack            X̂_t through f3, f2, f1     spatial refinement (SRM) 3, 2, 1; decoded:
                                                       ŷ_intermediate twice, then ŷ_final
     LPS                    T task losses → 1 number   loss prioritisation scheme
     published weights                                 a Mask2Former, or a backbone

Two ideas carry the method. *Coherence*: the tasks describe one scene. Where the other tasks find
two pixels alike, a task should too. *Prioritisation*: the losses are compressed to a common scale,
and tasks that fall behind get more weight.

Papers cited below:
  [Mask2Former] Cheng et al. 2022, arXiv 2112.01527  [DefDETR] Zhu et al. 2021, arXiv 2010.04159
  [Swin] Liu et al. 2021, arXiv 2103.14030           [SwinV2] Liu et al. 2022, arXiv 2111.09883
  [CBAM] Woo et al. 2018, arXiv 1807.06521           [FPN] Lin et al. 2017, arXiv 1612.03144
  [ViTDet] Li et al. 2022, arXiv 2203.16527          [PVT] Wang et al. 2021, arXiv 2102.12122
  [Kendall] Kendall et al. 2018, arXiv 1705.07115    [DWA] Liu et al. 2019, arXiv 1803.10704
  [DPT] Ranftl et al. 2021, arXiv 2103.13413

Where this file departs from the paper or from the authors' released code, a comment carries the
number of the departure: D1 to D12 here, D13 to D16 in train.py. README.md has them in one table.
[release: FILE#L12] is a line of https://github.com/Klodivio355/MT-CP/blob/08c068e/
"""

import math
import pickle
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.layers import LayerNorm2d
from timm.models.swin_transformer import SwinTransformerBlock, SwinTransformerStage
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# ==================================================================================================
# Tasks and configuration
# ==================================================================================================


@dataclass(frozen=True)
class Task:
    """One dense prediction task. Nothing below asks for a task by its name."""

    name: str  # key of the label in a sample and of the prediction in the model's output
    channels: int  # of the prediction
    output: str  # what turns a head's raw output into the prediction, a key of OUTPUTS
    loss: str  # a key of LOSSES
    metric: str  # the figure by which models are compared; train.py computes it
    better: int  # +1: a higher metric is better, as mIoU; -1: a lower one is better, as RMSE


# D10: tasks are data, in any number. The release writes out three tasks and the width 256, in one
# class for each dataset [release: models/models_nyud_CL.py#L114-L134].
NYUD_TASKS = (
    Task("semseg", 40, "logits", "cross_entropy", "mIoU", +1),
    Task("depth", 1, "positive", "l1_depth", "rmse", -1),
    Task("normals", 3, "unit", "l1_normals", "mean", -1),
)
PASCAL_TASKS = (
    Task("semseg", 21, "logits", "cross_entropy", "mIoU", +1),
    Task("human_parts", 7, "logits", "cross_entropy", "mIoU", +1),
    Task("sal", 1, "logits", "balanced_bce", "maxF", +1),
)

IGNORE_INDEX = 255  # in a class label: this pixel takes part in no loss and in no metric


@dataclass(frozen=True)
class MTCPConfig:
    """The sizes of the network. The defaults are those of the paper's Swin-S model."""

    backbone: str = "swin_small_patch4_window7_224"  # a timm name, see Backbone
    backbone_args: dict = field(default_factory=dict)  # further arguments for timm.create_model
    drop_path: float = 0.3  # stochastic depth in the backbone
    width: int = 256  # C, a multiple of 8
    pixel_layers: int = 6  # layers of deformable attention in the pixel decoder
    pixel_ffn: int = 1024  # inner width of their MLPs
    attention_heads: int = 8  # in the pixel decoder and the query decoder
    queries: int = 100  # N
    query_layers: int = 9  # a multiple of 3 reads each of the three strides equally often
    query_ffn: int = 2048  # inner width of their MLPs
    cfm: bool = True  # False: X̂_t = X_t, nothing passes between the tasks after R
    cfm_stride: int = 1  # s averages CFM's keys and values over s x s pixels; 1 is exact
    trace_back: bool = True  # False: ŷ_final is decoded from X̂_t
    checkpointing: bool = False  # True: less memory, more time, the same gradients; see MTCP.part


PRESETS = {
    "paper": MTCPConfig(),
    # The same decoders on a plain ViT with foundation-model weights (DINOv2, Oquab et al. 2024).
    "vit": MTCPConfig(backbone="vit_base_patch14_reg4_dinov2"),
    # For real data on a laptop: a small ViT with such weights, and narrow decoders.
    "small": MTCPConfig(
        backbone="vit_small_patch14_dinov2",
        drop_path=0.1,
        width=128,
        pixel_layers=2,
        pixel_ffn=512,
        attention_heads=4,
        queries=32,
        query_layers=3,
        query_ffn=512,
        cfm_stride=4,
    ),
    # The same topology at a size that two CPU cores train from scratch in minutes.
    "toy": MTCPConfig(
        backbone="swin_tiny_patch4_window7_224",
        backbone_args={"embed_dim": 32, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8)},
        drop_path=0.0,
        width=32,
        pixel_layers=2,
        pixel_ffn=128,
        attention_heads=4,
        queries=16,
        query_layers=3,
        query_ffn=128,
        cfm_stride=2,
    ),
}

# ==================================================================================================
# Blocks used in several places
# ==================================================================================================


def resize(x: Tensor, size: Iterable[int]) -> Tensor:
    """Bilinear resize of (B,C,h,w) to (B,C,*size), the edges of the images aligned."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def to_sequence(maps: list[Tensor]) -> Tensor:
    """[(B,C,h_l,w_l), …] → (B,S,C), S = Σ h_l·w_l: all pixels of one map, then of the next."""
    return torch.cat([m.flatten(2) for m in maps], dim=2).transpose(1, 2)


def conv_bn_relu(channels: int, out_channels: int) -> nn.Sequential:
    """1x1 convolution → BatchNorm → ReLU, (B,channels,h,w) → (B,out_channels,h,w)."""
    conv = nn.Conv2d(channels, out_channels, 1, bias=False)  # BatchNorm would subtract a bias again
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU())


def group_norm(channels: int) -> nn.GroupNorm:
    """Groups of 8 channels. At Mask2Former's 256 channels these are its 32 groups."""
    return nn.GroupNorm(channels // 8, channels)


def ffn(width: int, inner: int, bias: bool = True) -> nn.Sequential:
    """Two layers and a ReLU between them, (…,width) → (…,width)."""
    return nn.Sequential(nn.Linear(width, inner, bias), nn.ReLU(), nn.Linear(inner, width, bias))


def sine_embedding(x: Tensor) -> Tensor:
    """x (B,C,h,w) → (1,C,h,w): a code of the row in the first C/2 channels, then of the column.

    Positions run from 1/h to 1, times 2π: the code does not depend on the resolution (DETR, Carion
    et al., ECCV 2020).
    """
    _, C, h, w = x.shape
    exponent = torch.arange(0, C // 2, 2, device=x.device) / (C // 2)
    frequency = 10000.0**-exponent  # (C/4,)

    def code(n: int) -> Tensor:
        position = torch.arange(1, n + 1, device=x.device)[:, None] / (n + 1e-6)  # (n,1)
        angle = position * (2 * math.pi) * frequency  # (n,C/4)
        return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)  # (n,C/2)

    rows = code(h)[:, None].expand(h, w, -1)  # (h,w,C/2)
    columns = code(w)[None].expand(h, w, -1)  # (h,w,C/2)
    return torch.cat([rows, columns], dim=-1).permute(2, 0, 1)[None].to(x.dtype)


class CBAM(nn.Module):
    """Convolutional block attention [CBAM]: x (B,C,h,w) → (B,C,h,w).

    x ← x ⊙ σ(MLP(avgpool x) + MLP(maxpool x))     one gate for each channel
    x ← x ⊙ σ(BN(conv7×7 [mean_c x; max_c x]))     one gate for each pixel
    """

    def __init__(self, C: int, reduction: int = 16):
        super().__init__()
        self.mlp = ffn(C, max(C // reduction, 1), bias=False)
        self.place = nn.Sequential(nn.Conv2d(2, 1, 7, padding=3, bias=False), nn.BatchNorm2d(1))

    def forward(self, x: Tensor) -> Tensor:
        pooled = torch.stack([x.mean(dim=(2, 3)), x.amax(dim=(2, 3))])  # (2,B,C)
        x = x * torch.sigmoid(self.mlp(pooled).sum(dim=0))[:, :, None, None]
        pooled = torch.stack([x.mean(dim=1), x.amax(dim=1)], dim=1)  # (B,2,h,w)
        return x * torch.sigmoid(self.place(pooled))


class PadThenShiftBlock(SwinTransformerBlock):
    """timm's [Swin] block on x (B,h,w,C), but padded to whole windows before it is shifted.

    timm's `_attn` shifts the map by half a window, pads it, attends inside each window, cuts the
    padding off and shifts back. A map that arrives already padded gets no second padding.

    D12: this is the order of [Swin] and of the release, not of timm. If the window does not divide
    the map, as 7 does not divide 120 x 160, timm's shift brings rows from the opposite edge next to
    rows that are not their neighbours. Published weights then give other features than in training.
    """

    def _attn(self, x: Tensor) -> Tensor:
        _, h, w, _ = x.shape
        window_h, window_w = self.window_size
        x = F.pad(x, (0, 0, 0, -w % window_w, 0, -h % window_h))
        return super()._attn(x)[:, :h, :w]


def pad_then_shift(net: nn.Module) -> nn.Module:
    """Turns timm's Swin blocks inside `net` into PadThenShiftBlocks with the same tensors."""
    for m in net.modules():
        if type(m) is SwinTransformerBlock:
            m.__class__ = PadThenShiftBlock
    return net


# ==================================================================================================
# Backbone: x → c2, c3, c4, c5
# ==================================================================================================


def any_size_args(name: str) -> dict:
    """Arguments that tell timm's model `name` to expect images of any size, {} if it has none."""
    architecture, _ = timm.models.split_model_name_tag(name)
    family = timm.models.model_entrypoint(architecture).__module__.rsplit(".", 1)[-1]
    if family in ("swin_transformer", "swin_transformer_v2"):
        # always_partition: a stage smaller than its window at timm's nominal 224 x 224 would lose
        # its window shift for good, also for larger images.
        return {"strict_img_size": False, "always_partition": True}
    return {"dynamic_img_size": True} if family in ("vision_transformer", "deit", "eva") else {}


class ViTPyramid(nn.Module):
    """Four ViT maps (B,D,H/16,W/16), from shallow to deep → four (B,D,·,·) at strides 4, 8, 16, 32.

    Deep blocks know what is there, shallow ones know better where. Each map gets both: all blocks
    side by side, mixed by a convolution of its own. P is made of the two finest maps, and what they
    lack reaches it only through the pixel decoder's attention. D11: [ViTDet] makes all four maps
    from the last block, [DPT] each one from a block of its own.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.channels = [dim] * 4
        # Each block adds to what it gets, so the last map may be by far the largest. Without a norm
        # for each, it would drown the others.
        self.norms = nn.ModuleList(LayerNorm2d(dim) for _ in range(4))
        self.mix = nn.ModuleList(nn.Conv2d(4 * dim, dim, 1) for _ in range(4))

    def forward(self, c: list[Tensor]) -> list[Tensor]:
        x = torch.cat([norm(m) for norm, m in zip(self.norms, c, strict=True)], dim=1)
        h, w = x.shape[-2:]
        sizes = [(4 * h, 4 * w), (2 * h, 2 * w), (h, w), (h // 2, w // 2)]
        return [resize(mix(x), size) for mix, size in zip(self.mix, sizes, strict=True)]


class Backbone(nn.Module):
    """x (B,3,H,W), H and W multiples of 32 → [c2, c3, c4, c5], (B,·,H/s,W/s) at s = 4, 8, 16, 32.

    A thin wrapper over timm's `features_only` models; each map gets a LayerNorm over its channels.
    Swin, ConvNeXt, PVT v2, ResNet, HRNet, VGG and others have the four strides. Plain ViTs (ViT,
    DeiT, DINOv2, DINOv3) have one, 14 or 16; ViTPyramid makes the four maps of 4 blocks.
    Raises ValueError for other strides and for a backbone that takes images of one size only.

    D11: any of these. The release has one, Swin-S [release: models/models_nyud_CL.py#L173].
    """

    def __init__(self, name: str, drop_path: float = 0.0, **timm_args):
        super().__init__()
        any_size = any_size_args(name)
        if timm.get_pretrained_cfg(name).fixed_input_size and not any_size:
            raise ValueError(f"backbone {name} takes one image size only: choose a Swin or a ViT")
        self.name = name
        self.timm_args = {"drop_path_rate": drop_path, **any_size, **timm_args}
        self.net = pad_then_shift(self._create())
        strides = self.net.feature_info.reduction()
        self.channels = self.net.feature_info.channels()[-4:]
        self.patch = None  # of a plain ViT
        if set(strides) in ({14}, {16}):
            self.patch = strides[-1]
            depth = len(self.net.model.blocks)
            # After a quarter of the blocks, half of them, … all; timm's choice is the last three.
            self.net.out_indices = [math.ceil(depth * k / 4) - 1 for k in (1, 2, 3, 4)]
            self.pyramid = ViTPyramid(self.channels[-1])
            self.channels = self.pyramid.channels
        elif strides[-4:] != [4, 8, 16, 32]:
            raise ValueError(f"backbone {name} has strides {strides}, not 4, 8, 16, 32 or 14 or 16")
        self.norms = nn.ModuleList(LayerNorm2d(c, eps=1e-5) for c in self.channels)

    def _create(self) -> nn.Module:
        try:
            return timm.create_model(self.name, features_only=True, **self.timm_args)
        except TypeError:
            # HRNet, VGG and DenseNet have no stochastic depth: build them without it. An argument
            # that is wrong for another reason raises TypeError again.
            del self.timm_args["drop_path_rate"]
            return timm.create_model(self.name, features_only=True, **self.timm_args)

    def forward(self, x: Tensor) -> list[Tensor]:
        if self.patch == 14:
            # x is resized to 14/16 so that a 14-pixel patch covers 16 pixels of x.
            x = resize(x, [side // 16 * 14 for side in x.shape[-2:]])
        c = self.net(x)
        if getattr(self.net, "output_fmt", "NCHW") == "NHWC":  # Swin's layout
            c = [m.permute(0, 3, 1, 2) for m in c]
        c = self.pyramid(c) if self.patch else c[-4:]
        return [norm(m) for norm, m in zip(self.norms, c, strict=True)]


# ==================================================================================================
# Pixel decoder: c2 … c5 → P                                    [Mask2Former], section 3.2.2
# ==================================================================================================

POINTS = 4  # at which a pixel looks, for each head and level
LEVELS = 3  # strides 32, 16, 8: coarse to fine, as everywhere in Mask2Former


def deformable_sampling(value: Tensor, sizes: list, places: Tensor, weight: Tensor) -> Tensor:
    """Σ over levels l and points p of weight_lp · value_l(place_lp), bilinear, zero outside.

    value (B,S,heads,d), the maps of `sizes` [(h_l,w_l), …] as one sequence, S = Σ h_l·w_l; places
    (B,n,heads,levels,points,2), (x, y) in 0…1; weight (B,n,heads,levels,points) → (B,n,heads·d)
    """
    B, n, heads, _, _, _ = places.shape
    grids = 2 * places - 1  # grid_sample counts from -1, left edge of the first pixel, to 1
    sampled = []
    for level, v in enumerate(value.split([h * w for h, w in sizes], dim=1)):
        v = v.permute(0, 2, 3, 1).flatten(0, 1).unflatten(2, sizes[level])  # (B·heads,d,h_l,w_l)
        grid = grids[:, :, :, level].transpose(1, 2).flatten(0, 1)  # (B·heads,n,points,2)
        # In float32 also under autocast: bf16's 8 bits would move the places by 0.1 pixel.
        sampled.append(F.grid_sample(v.float(), grid.float(), align_corners=False))
    sampled = torch.cat(sampled, dim=-1)  # (B·heads,d,n,levels·points)
    weight = weight.transpose(1, 2).reshape(B * heads, 1, n, -1)  # (B·heads,1,n,levels·points)
    return (sampled * weight).sum(dim=-1).reshape(B, -1, n).transpose(1, 2)


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention [DefDETR, equation 3] in plain PyTorch.

    Each query looks at `points` places on each level instead of at every pixel. Where those lie,
    and how much each counts, are linear functions of the query. There are no keys.
    """

    def __init__(self, C: int, heads: int, levels: int, points: int):
        super().__init__()
        self.heads = heads
        self.levels = levels
        self.points = points
        self.offsets = nn.Linear(C, heads * levels * points * 2)
        self.weights = nn.Linear(C, heads * levels * points)
        self.value = nn.Linear(C, C)
        self.out = nn.Linear(C, C)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Head k looks in direction 2πk/heads, its points 1, 2, 3, … pixels away, equal weights."""
        angle = torch.arange(self.heads) * (2 * math.pi / self.heads)
        direction = torch.stack([angle.cos(), angle.sin()], dim=-1)  # (heads,2)
        direction = direction / direction.abs().amax(dim=-1, keepdim=True)  # longer component ±1
        distance = torch.arange(1, self.points + 1)
        bias = direction[:, None, None, :] * distance[None, None, :, None]  # (heads,1,points,2)
        self.offsets.bias.copy_(bias.expand(-1, self.levels, -1, -1).flatten())
        for zero in (self.offsets.weight, self.weights.weight, self.weights.bias):
            nn.init.zeros_(zero)
        for linear in (self.value, self.out):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, query: Tensor, reference: Tensor, x: Tensor, sizes: list) -> Tensor:
        """query (B,n,C), reference (n,2), x (B,S,C), sizes [(h_l,w_l), …] → (B,n,C).

        reference: where each query stands, (x, y) in 0…1. x: maps of these sizes, see to_sequence.
        """
        B, n, _ = query.shape
        value = self.value(x).unflatten(-1, (self.heads, -1))  # (B,S,heads,C/heads)
        offset = self.offsets(query).view(B, n, self.heads, self.levels, self.points, 2)
        weight = self.weights(query).view(B, n, self.heads, self.levels * self.points)
        weight = weight.softmax(dim=-1).unflatten(-1, (self.levels, self.points))
        # Offsets are in pixels of the level they point into, places are in 0…1 over its map.
        extent = offset.new_tensor([[w, h] for h, w in sizes])  # (levels,2)
        places = reference[None, :, None, None, None] + offset / extent[:, None]
        return self.out(deformable_sampling(value, sizes, places, weight))


class DeformableLayer(nn.Module):
    """One transformer layer on x (B,S,C), the pixels of all levels. Norms follow the additions."""

    def __init__(self, cfg: MTCPConfig):
        super().__init__()
        self.attention = DeformableAttention(cfg.width, cfg.attention_heads, LEVELS, POINTS)
        self.norm1 = nn.LayerNorm(cfg.width)
        self.ffn = ffn(cfg.width, cfg.pixel_ffn)
        self.norm2 = nn.LayerNorm(cfg.width)

    def forward(self, x: Tensor, position: Tensor, reference: Tensor, sizes: list) -> Tensor:
        x = self.norm1(x + self.attention(x + position, reference, x, sizes))
        return self.norm2(x + self.ffn(x))


def pixel_centres(sizes: list, device: torch.device) -> Tensor:
    """sizes [(h_l,w_l), …] → (S,2): the centres of all pixels of all levels, (x, y) in 0…1."""
    centres = []
    for h, w in sizes:
        y = (torch.arange(h, device=device) + 0.5) / h
        x = (torch.arange(w, device=device) + 0.5) / w
        grid = torch.stack([x.expand(h, w), y[:, None].expand(h, w)], dim=-1)  # (h,w,2)
        centres.append(grid.flatten(0, 1))
    return torch.cat(centres)


class PixelDecoder(nn.Module):
    """[c2, c3, c4, c5] → P (B,C,h,w), and three coarse maps (B,C,·,·) at strides 32, 16, 8.

    The pixels of c5, c4 and c3 become one sequence and exchange information by deformable
    attention. A single [FPN] step then brings the result to stride 4.
    """

    def __init__(self, channels: list[int], cfg: MTCPConfig):
        super().__init__()
        C = cfg.width
        c2, c3, c4, c5 = channels
        project = [nn.Sequential(nn.Conv2d(c, C, 1), group_norm(C)) for c in (c5, c4, c3)]
        self.project = nn.ModuleList(project)
        self.level_embed = nn.Parameter(torch.randn(LEVELS, C))
        self.layers = nn.ModuleList(DeformableLayer(cfg) for _ in range(cfg.pixel_layers))
        self.lateral = nn.Sequential(nn.Conv2d(c2, C, 1, bias=False), group_norm(C))
        smooth = nn.Conv2d(C, C, 3, padding=1, bias=False)
        self.smooth = nn.Sequential(smooth, group_norm(C), nn.ReLU())
        self.to_P = nn.Conv2d(C, C, 1)

    def forward(self, c: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        c2, c3, c4, c5 = c
        coarse = [project(m) for project, m in zip(self.project, (c5, c4, c3), strict=True)]
        sizes = [m.shape[-2:] for m in coarse]

        # Attention knows no order: a sine code says where a pixel is, a learned one on which level.
        where = [sine_embedding(m) for m in coarse]
        levels = self.level_embed[:, None, :, None, None]  # (3,1,C,1,1)
        position = to_sequence([a + b for a, b in zip(where, levels, strict=True)])  # (1,S,C)
        reference = pixel_centres(sizes, c2.device)  # (S,2)
        x = to_sequence(coarse)  # (B,S,C), S = pixels of all levels together
        for layer in self.layers:
            x = layer(x, position, reference, sizes)

        pixels = x.transpose(1, 2).split([h * w for h, w in sizes], dim=2)  # (B,C,h_l·w_l)
        coarse = [p.unflatten(2, size) for p, size in zip(pixels, sizes, strict=True)]
        fine = self.lateral(c2) + resize(coarse[-1], c2.shape[-2:])  # stride 8 → 4, (B,C,h,w)
        return self.to_P(self.smooth(fine)), coarse


# ==================================================================================================
# Query decoder: P and the coarse maps → M                      [Mask2Former], section 3.2.1
# ==================================================================================================


class QueryLayer(nn.Module):
    """Masked cross-attention → self-attention → FFN on queries q (B,N,C), norms after additions.

    Cross-attention comes first: before it, queries hold nothing of the image to tell each other.
    """

    def __init__(self, cfg: MTCPConfig):
        super().__init__()
        C = cfg.width
        self.cross = nn.MultiheadAttention(C, cfg.attention_heads, batch_first=True)
        self.norm1 = nn.LayerNorm(C)
        self.self_attention = nn.MultiheadAttention(C, cfg.attention_heads, batch_first=True)
        self.norm2 = nn.LayerNorm(C)
        self.ffn = ffn(C, cfg.query_ffn)
        self.norm3 = nn.LayerNorm(C)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.xavier_uniform_(p)  # as [Mask2Former] and DETR do

    def forward(self, q: Tensor, position: Tensor, key: Tensor, value: Tensor, forbidden: Tensor):
        """q (B,N,C), position (N,C), key and value (B,S,C), forbidden (B·heads,N,S) → q (B,N,C)."""
        # Positions decide where to look (queries, keys). They are not in what is read (values).
        a, _ = self.cross(q + position, key, value, attn_mask=forbidden, need_weights=False)
        q = self.norm1(q + a)
        a, _ = self.self_attention(q + position, q + position, q, need_weights=False)
        q = self.norm2(q + a)
        return self.norm3(q + self.ffn(q))


class QueryDecoder(nn.Module):
    """P (B,C,h,w) and coarse maps (B,C,·,·) at strides 32, 16, 8 → M (B,N,h,w), mask logits.

    N learned queries read the image layer by layer, each only inside the mask that it predicted
    before. A query that has found a region goes on looking there.
    """

    def __init__(self, cfg: MTCPConfig):
        super().__init__()
        C = cfg.width
        self.heads = cfg.attention_heads
        self.query_features = nn.Embedding(cfg.queries, C)  # what a query starts from
        self.query_position = nn.Embedding(cfg.queries, C)  # added wherever queries are compared
        self.level_embed = nn.Embedding(LEVELS, C)
        self.layers = nn.ModuleList(QueryLayer(cfg) for _ in range(cfg.query_layers))
        self.norm = nn.LayerNorm(C)
        self.mask_embed = nn.Sequential(*ffn(C, C), nn.ReLU(), nn.Linear(C, C))

    def forward(self, P: Tensor, coarse: list[Tensor]) -> Tensor:
        value = [to_sequence([m]) for m in coarse]  # (B,h_l·w_l,C)
        value = [v + code for v, code in zip(value, self.level_embed.weight, strict=True)]
        key = [v + to_sequence([sine_embedding(m)]) for v, m in zip(value, coarse, strict=True)]
        # Masks are linear in P: resizing P once for each level gives what resizing N masks would.
        # They only say where to look, by a comparison that passes no gradient. Hence detach().
        small_P = [resize(P.detach(), m.shape[-2:]) for m in coarse]

        q = self.query_features.weight.expand(len(P), -1, -1)  # (B,N,C)
        for i, layer in enumerate(self.layers):
            level = i % LEVELS  # strides 32, 16, 8, 32, …
            # The first mask comes from the learned queries alone, before they have read the image.
            forbidden = self.attention_mask(self.masks(q, small_P[level]))
            q = layer(q, self.query_position.weight, key[level], value[level], forbidden)
        return self.masks(q, P)

    def masks(self, q: Tensor, P: Tensor) -> Tensor:
        """q (B,N,C), P (B,C,h,w) → M (B,N,h,w): M_n = m_n · P with m_n = mask_embed(norm(q_n))."""
        m = self.mask_embed(self.norm(q))  # (B,N,C)
        return torch.einsum("bnc,bchw->bnhw", m, P)

    def attention_mask(self, M: Tensor) -> Tensor:
        """Mask logits (B,N,h,w) → bool (B·heads,N,h·w), True where a query must NOT look."""
        forbidden = (M < 0).flatten(2)  # σ(M) < ½ is M < 0
        # A query with an empty mask could look nowhere: a softmax over nothing, NaN in some
        # versions of torch. It may look everywhere instead.
        forbidden = forbidden & ~forbidden.all(dim=-1, keepdim=True)
        return forbidden.repeat_interleave(self.heads, dim=0)  # image 0 head 0, image 0 head 1, …


# ==================================================================================================
# Shared representation: R = P ⊙ Σ_n σ(M_n)                     the ⊗ of the paper's Figure 2
# ==================================================================================================


def shared_representation(P: Tensor, M: Tensor) -> Tensor:
    """P (B,C,h,w), M (B,N,h,w) → R (B,C,h,w): a pixel's embedding times the number of its masks.

    σ(M_n) in 0…1 is the soft mask of query n. Their sum counts the masks in which a pixel lies. The
    order of the queries has no effect on R, and no task loss asks them to differ: what they know of
    single things comes from `mask_loss`, or from a Mask2Former's weights.
    """
    # D3: soft masks. The release sums the logits M_n; the paper does not say. A sum of logits
    # crosses 0 between pixels, and there R vanishes. The LayerNorm in front of the task decoders'
    # attention divides by R's size: the few pixels beside the crossing would get nearly all of the
    # gradient. [release: models/models_nyud_CL.py#L182]
    R = P * M.sigmoid().sum(dim=1, keepdim=True)
    # D3: R is divided by its root mean square, one number per image. The sum lies between 0 and N,
    # and how large it is depends on where the weights come from. The scale of all that follows
    # should not. A LayerNorm would divide each pixel by its own sum: no mask would have an effect.
    rms = R.float().square().mean(dim=(1, 2, 3), keepdim=True).add(1e-12).sqrt()  # (B,1,1,1)
    return R / rms.to(R.dtype)


# ==================================================================================================
# Task decoder and feature pyramid: R → F_t → X_t               the paper's hierarchical features
# ==================================================================================================

TASK_DEPTHS = (1, 2, 1)  # Swin blocks in the stages of f1, f2, f3
TASK_HEADS = 2
WINDOW = 7


def swin_stage(width: int, out_width: int, depth: int) -> nn.Module:
    """A [Swin] stage on (B,h,w,width). If out_width is larger, it first merges 2 x 2 pixels."""
    stage = SwinTransformerStage(
        dim=width,
        out_dim=out_width,
        depth=depth,
        downsample=out_width > width,
        num_heads=TASK_HEADS,
        window_size=WINDOW,
        # A nominal size, not used: by the two flags after it, windows fit the size that arrives.
        input_resolution=(WINDOW, WINDOW),
        always_partition=True,
        dynamic_mask=True,
    )
    return pad_then_shift(stage)


class TaskDecoder(nn.Module):
    """R (B,C,h,w) → F_t = [f1 (B,C,h,w), f2 (B,2C,h/2,w/2), f3 (B,4C,h/4,w/4)].

    Three [Swin] stages, a LayerNorm on each output. From here on each task has its own modules.
    """

    def __init__(self, cfg: MTCPConfig):
        super().__init__()
        C = cfg.width
        widths = [(C, C), (C, 2 * C), (2 * C, 4 * C)]
        self.stages = nn.ModuleList(
            swin_stage(*width, depth) for width, depth in zip(widths, TASK_DEPTHS, strict=True)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(k * C) for k in (1, 2, 4))

    def forward(self, R: Tensor) -> list[Tensor]:
        x = R.permute(0, 2, 3, 1)  # (B,h,w,C), timm's layout for Swin
        F_t = []
        for stage, norm in zip(self.stages, self.norms, strict=True):
            x = stage(x)
            F_t.append(norm(x).permute(0, 3, 1, 2))
        return F_t


class FeaturePyramid(nn.Module):
    """F_t → X_t (B,C,h,w): the task's three scales, added up from coarse to fine [FPN]."""

    def __init__(self, C: int):
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(k * C, C, 1) for k in (1, 2, 4))
        self.smooth = nn.Conv2d(C, C, 3, padding=1)

    def forward(self, F_t: list[Tensor]) -> Tensor:
        f1, f2, f3 = (lateral(f) for lateral, f in zip(self.lateral, F_t, strict=True))
        f2 = f2 + F.interpolate(f3, size=f2.shape[-2:], mode="nearest")  # (B,C,h/2,w/2)
        f1 = f1 + F.interpolate(f2, size=f1.shape[-2:], mode="nearest")  # (B,C,h,w)
        return self.smooth(f1)


# ==================================================================================================
# Coherence fusion module (CFM): X_t and {X_u : u ≠ t} → X̂_t
# ==================================================================================================


class CoherenceFusion(nn.Module):
    """Main task X_t (B,C,h,w), its auxiliaries [X_u (B,C,h,w), …], u ≠ t → X̂_t (B,C,h,w).

        A_u = X_u ⊙ σ(conv1×1 X_u)            one gate for each pixel and channel
        A   = ReLU(conv1×1 [A_1; A_2; …])     all auxiliaries, fused
        Q   = ReLU(BN(CBAM A))                K likewise, with weights of its own
        V   = BN(CBAM X_t)
        X̂_t = BN(CBAM(softmax(τ cos(Q, K)) V))

    cos(Q, K) (h·w,h·w) holds the cosine of each pixel's query with each pixel's key. Where the
    *other* tasks see two pixels as alike, the two share the main task's features. There is no
    residual: X_t enters by V alone. The paper presents this as coherence, a small cosine distance
    between a task's features and the others'. No loss asks for it; `cosine_distance` measures it.
    With cfm_stride s > 1, keys and values are averaged over s x s pixels: about h·w/s² of them.
    [PVT] shortens them too, by a learned projection.
    """

    def __init__(self, auxiliaries: int, cfg: MTCPConfig):
        super().__init__()
        C = cfg.width
        self.gates = nn.ModuleList(nn.Conv2d(C, C, 1) for _ in range(auxiliaries))
        # D4: fused to C channels, where the release keeps (T-1)·C [release: models/utils.py#L850].
        # Q Kᵀ costs less, and GPU flash kernels want q, k and v of one width, at most 256.
        self.fuse = nn.Sequential(nn.Conv2d(auxiliaries * C, C, 1), nn.ReLU())
        self.query = nn.Sequential(CBAM(C), nn.BatchNorm2d(C), nn.ReLU())
        self.key = nn.Sequential(CBAM(C), nn.BatchNorm2d(C), nn.ReLU())
        self.value = nn.Sequential(CBAM(C), nn.BatchNorm2d(C))
        self.log_tau = nn.Parameter(torch.full((1, 1, 1), math.log(10.0)))  # as in [SwinV2]
        self.out = nn.Sequential(CBAM(C), nn.BatchNorm2d(C))
        # ceil_mode keeps the last row and column of sizes that the stride does not divide.
        self.pool = nn.AvgPool2d(cfg.cfm_stride, ceil_mode=True)

    def forward(self, X_t: Tensor, auxiliaries: list[Tensor]) -> Tensor:
        A = [X * torch.sigmoid(gate(X)) for gate, X in zip(self.gates, auxiliaries, strict=True)]
        A = self.fuse(torch.cat(A, dim=1))  # (B,C,h,w)
        Q = self.query(A)  # (B,C,h,w)
        K = self.pool(self.key(A))  # (B,C,h/s,w/s)
        V = self.pool(self.value(X_t))  # (B,C,h/s,w/s)
        # One head of C channels. Contiguous: with another memory layout SDPA may choose the kernel
        # that does hold the matrix.
        q, k, v = (to_sequence([m])[:, None].contiguous() for m in (Q, K, V))  # (B,1,h·w or S,C)
        # D5: cosines times a learned temperature τ [SwinV2], where the release has raw dot products
        # in a full matrix [release: models/utils.py#L873]. Those grow with C and have no bound, and
        # near 1000 bf16 numbers are 4 apart. These stay within ±100. With the usual 1/√C instead of
        # τ, the softmax over thousands of pixels would start nearly uniform.
        tau = self.log_tau.clamp(max=math.log(100.0)).exp()
        q = tau * F.normalize(q, dim=-1)
        k = F.normalize(k, dim=-1)
        # SDPA's fused kernels never hold the (h·w)² matrix. At 480 x 640 it would take 1.5 GB for
        # one task and image, and as much for its gradient.
        x = F.scaled_dot_product_attention(q, k, v, scale=1.0)  # (B,1,h·w,C)
        return self.out(x.transpose(2, 3).reshape_as(X_t))


def cosine_distance(X_t: Tensor, auxiliaries: list[Tensor]) -> Tensor:
    """X_t and one X_u or more, (B,C,h,w) each → 0-d in [0, 2]: the mean of 1 - cos(X_t, X_u).

    A pixel's C channels are one vector. 0: the tasks' features point the same way. 1: unrelated.
    """
    cosines = [F.cosine_similarity(X_t.float(), X_u.float(), dim=1) for X_u in auxiliaries]
    return 1 - torch.stack(cosines).mean()


# ==================================================================================================
# Trace-back: X̂_t back through f3, f2, f1 by spatial refinement modules (SRM)
# ==================================================================================================


class SpatialRefinement(nn.Module):
    """SRM_i: carry (B,c,·,·), f_i (B,f,h_i,w_i) → pred (B,C,h_i,w_i), carry' (B,f,h_i,w_i) or None.

        z      = [resize(CBAM carry); CBAM f_i]
        pred   = ReLU(BN(conv1×1 z))     what a head decodes
        carry' = ReLU(BN(conv1×1 z))     what the next module gets, with weights of its own

    last: no module follows, so there is no carry', and None stands for it.
    """

    def __init__(self, carry_channels: int, stage_channels: int, C: int, last: bool):
        super().__init__()
        self.cbam_carry = CBAM(carry_channels)
        self.cbam_stage = CBAM(stage_channels)
        both = carry_channels + stage_channels
        self.to_pred = conv_bn_relu(both, C)
        self.to_carry = None if last else conv_bn_relu(both, stage_channels)

    def forward(self, carry: Tensor, f_i: Tensor) -> tuple[Tensor, Tensor | None]:
        carry = resize(self.cbam_carry(carry), f_i.shape[-2:])  # (B,c,h_i,w_i)
        z = torch.cat([carry, self.cbam_stage(f_i)], dim=1)  # (B,c+f,h_i,w_i)
        next_carry = None if self.to_carry is None else self.to_carry(z)
        return self.to_pred(z), next_carry


class TraceBack(nn.Module):
    """X̂_t (B,C,h,w), F_t → features (B,C,·,·) of SRM_3, SRM_2, SRM_1: 1/16, 1/8, 1/4 of the image.

    X̂_t knows of the other tasks, but f1, f2 and f3 were made before the tasks met. The trace-back
    reads them again, deepest first, together with what X̂_t has learned.
    """

    def __init__(self, C: int):
        super().__init__()
        # D6: three modules for three stages, the last without a carry. The release lists four, and
        # computes a last carry that nothing reads [release: models/utils.py#L766-L776].
        self.srm3 = SpatialRefinement(C, 4 * C, C, last=False)
        self.srm2 = SpatialRefinement(4 * C, 2 * C, C, last=False)
        self.srm1 = SpatialRefinement(2 * C, C, C, last=True)

    def forward(self, X_hat: Tensor, F_t: list[Tensor]) -> list[Tensor]:
        f1, f2, f3 = F_t
        pred3, carry = self.srm3(X_hat, f3)  # the first carry is X̂_t, resized to f3
        pred2, carry = self.srm2(carry, f2)
        pred1, _ = self.srm1(carry, f1)
        return [pred3, pred2, pred1]


# ==================================================================================================
# Heads
# ==================================================================================================

OUTPUTS = {
    "logits": nn.Identity(),
    # Metres, > 0. D9: the release's depth is a convolution's output, which may be negative
    # [release: models/models_nyud_CL.py#L149].
    "positive": nn.Softplus(),
    # (B,3,H,W), of length 1 at each pixel. D8: the release's normals have any length, and their
    # loss is squared; here it is L1 [release: losses/loss_functions.py#L222].
    "unit": partial(F.normalize, dim=1, eps=1e-6),
}


class Head(nn.Module):
    """Feature (B,C,·,·) → prediction (B,channels,*size): conv1×1 → BN → ReLU → conv1×1 → resize."""

    def __init__(self, C: int, task: Task):
        super().__init__()
        self.layers = nn.Sequential(conv_bn_relu(C, C), nn.Conv2d(C, task.channels, 1))
        self.output = OUTPUTS[task.output]
        if task.output == "positive":
            # D9: start at softplus(2) = 2.1 m, an everyday depth. From 0.7 m, softplus(0), hundreds
            # of steps would go into this one number.
            nn.init.constant_(self.layers[-1].bias, 2.0)

    def forward(self, x: Tensor, size: Iterable[int]) -> Tensor:
        # In float32 from here on, also under autocast: near 8 m, bf16 numbers are 6 cm apart.
        y = resize(self.layers(x).float(), size)
        # After the upsampling: the average of two vectors of length 1 is shorter than 1.
        return self.output(y)


# ==================================================================================================
# MT-CP: the figure above, in code
# ==================================================================================================


class MTCP(nn.Module):
    """The whole network, for one task or more. With one there is nothing to fuse: X̂_t = X_t."""

    def __init__(self, tasks: tuple[Task, ...], cfg: MTCPConfig = PRESETS["paper"]):
        super().__init__()
        names = [t.name for t in tasks]
        if not tasks or len(set(names)) < len(names):
            raise ValueError(f"MTCP needs one or more tasks of different names, not {names}")
        self.tasks = tuple(tasks)
        self.names = names
        self.cfg = cfg
        C = cfg.width

        def for_each_task(make) -> nn.ModuleDict:
            return nn.ModuleDict({t.name: make(t) for t in tasks})

        self.backbone = Backbone(cfg.backbone, cfg.drop_path, **cfg.backbone_args)
        self.pixel_decoder = PixelDecoder(self.backbone.channels, cfg)
        self.query_decoder = QueryDecoder(cfg)
        self.decoder = for_each_task(lambda t: TaskDecoder(cfg))
        self.pyramid = for_each_task(lambda t: FeaturePyramid(C))
        self.cfm = None
        if cfg.cfm and len(tasks) > 1:
            self.cfm = for_each_task(lambda t: CoherenceFusion(len(tasks) - 1, cfg))
        self.trace_back = for_each_task(lambda t: TraceBack(C)) if cfg.trace_back else None
        # For X̂_t and, with trace-back, for SRM_3, SRM_2 and SRM_1, in this order.
        decoded = 4 if cfg.trace_back else 1
        self.heads = for_each_task(lambda t: nn.ModuleList(Head(C, t) for _ in range(decoded)))

    def forward(self, x: Tensor) -> dict[str, dict]:
        """ImageNet-normalised RGB x (B,3,H,W), any H and W → {task name: predictions} with

        final         (B,channels,H,W): class logits, depth in metres (> 0), normals of length 1 or,
                      for saliency, a logit
        initial       the same, from X̂_t; None without trace-back, where this is `final`
        intermediate  [the same from SRM_3, from SRM_2]; [] without trace-back
        """
        H, W = x.shape[-2:]
        # Zeros are ImageNet's mean. Attention sees them like any flat region of the image.
        padded = F.pad(x, (0, -W % 32, 0, -H % 32))
        P, M = self.shared(padded)  # (B,C,h,w), (B,N,h,w)
        R = shared_representation(P, M)  # (B,C,h,w)
        F_all = {t: self.part(self.decoder[t], R) for t in self.names}  # F_t = [f1, f2, f3] each
        X = {t: self.pyramid[t](F_all[t]) for t in self.names}  # X_t (B,C,h,w)
        X_hat = self.fuse(X)  # X̂_t (B,C,h,w)

        outputs = {}
        for t in self.names:
            features = [X_hat[t]]
            if self.trace_back is not None:
                features += self.trace_back[t](X_hat[t], F_all[t])  # (B,C,·,·) at 1/16, 1/8, 1/4
            y = [h(f, padded.shape[-2:]) for h, f in zip(self.heads[t], features, strict=True)]
            y = [p[..., :H, :W] for p in y]  # (B,channels,H,W)
            initial = y[0] if len(y) > 1 else None
            outputs[t] = {"initial": initial, "intermediate": y[1:-1], "final": y[-1]}
        return outputs

    def shared(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B,3,H,W), H and W multiples of 32 → P (B,C,h,w), M (B,N,h,w), as in Mask2Former."""
        P, coarse = self.part(self.pixel_decoder, self.part(self.backbone, x))
        return P, self.query_decoder(P, coarse)

    def part(self, module: nn.Module, x):
        """module(x); with checkpointing, what its layers computed is not kept for the gradient.

        It is computed again where the gradient needs it. Backbone, pixel decoder and task decoders
        keep two thirds of it all. Only for parts without BatchNorm, which would count the batch
        twice in its running statistics: so not for CFM, trace-back and heads.
        """
        norms = (nn.BatchNorm2d, nn.SyncBatchNorm)
        twice = any(isinstance(m, norms) for m in module.modules())
        if self.cfg.checkpointing and self.training and not twice:
            return checkpoint(module, x, use_reentrant=False)
        return module(x)

    def fuse(self, X: dict[str, Tensor]) -> dict[str, Tensor]:
        """{t: X_t} → {t: X̂_t}, (B,C,h,w) each. The order of the tasks plays no part."""
        if self.cfm is None:
            return X
        return {t: self.cfm[t](X[t], [X[u] for u in sorted(X) if u != t]) for t in X}


# ==================================================================================================
# Losses: each an average over valid pixels, and exactly 0 with a zero gradient if there is none
# ==================================================================================================


def cross_entropy(y: Tensor, target: Tensor) -> Tensor:
    """Logits y (B,K,H,W), target int64 (B,H,W) in 0…K-1 or IGNORE_INDEX → 0-d, in nats."""
    rows = y.float().permute(0, 2, 3, 1).flatten(0, 2)  # (B·H·W,K): 3 times as fast on a CPU
    # reduction="mean" would give 0/0 = NaN where all pixels are ignored.
    total = F.cross_entropy(rows, target.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    return total / (target != IGNORE_INDEX).sum().clamp(min=1)


def masked_l1(y: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Mean of |y - target| where valid is True, all three of one shape → 0-d."""
    return ((y.float() - target).abs() * valid).sum() / valid.sum().clamp(min=1)


def l1_depth(y: Tensor, target: Tensor) -> Tensor:
    """y, target (B,1,H,W) in metres, target 0 where invalid → 0-d, in metres."""
    return masked_l1(y, target, target > 0)


def l1_normals(y: Tensor, target: Tensor) -> Tensor:
    """y, target (B,3,H,W) of length 1, target all-zero where invalid → 0-d, mean over components.

    Labels that have been resized hold lengths between 0 and 1. Below ½ they count as invalid.
    """
    valid = target.square().sum(dim=1, keepdim=True) > 0.25  # (B,1,H,W)
    return masked_l1(y, target, valid.expand_as(target))


def balanced_bce(y: Tensor, target: Tensor) -> Tensor:
    """Logits y (B,1,H,W), target float of the same shape: 0, 1 or IGNORE_INDEX → 0-d.

    Class-balanced (Xie and Tu, ICCV 2015): each class is weighted by the other's share of pixels,
    so that both count the same in total. A batch with one class only therefore gives 0.
    """
    valid = target != IGNORE_INDEX
    count = valid.sum().clamp(min=1)
    target = target * valid
    positives = target.sum() / count
    weight = torch.where(target > 0.5, 1 - positives, positives) * valid
    total = F.binary_cross_entropy_with_logits(y.float(), target, weight, reduction="sum")
    return total / count


LOSSES = {f.__name__: f for f in (cross_entropy, l1_depth, l1_normals, balanced_bce)}


def mask_loss(M: Tensor, label: Tensor, classes: Tensor) -> Tensor:
    """Mask logits M (B,N,h,w), classes at most N class indices, label (B,4h,4w) → 0-d.

    A start for the shared part: query n learns where class classes[n] is. Cross-entropy and Dice
    are those of [Mask2Former], which trains a query on one object, found by matching. Here each
    query is told its class, so there is nothing to match. Queries that are left over learn nothing.
    """
    label = label[:, None, 2::4, 2::4]  # (B,1,h,w): about the middle of 4 x 4 pixels
    valid = label != IGNORE_INDEX
    target = (label == classes[:, None, None]).float()  # (B,len(classes),h,w)
    M = M[:, : len(classes)].float()
    entropy = F.binary_cross_entropy_with_logits(M, target, reduction="none") * valid
    entropy = entropy.sum() / (len(classes) * valid.sum()).clamp(min=1)
    # Dice compares areas, so small things count as much as walls. Only of classes that are there.
    p = M.sigmoid() * valid
    overlap = 2 * (p * target).sum(dim=(2, 3))
    dice = 1 - (overlap + 1) / ((p + target).sum(dim=(2, 3)) + 1)
    there = target.amax(dim=(2, 3))  # (B,len(classes)) of 0 and 1
    return 2 * entropy + (dice * there).sum() / there.sum().clamp(min=1)


def task_losses(tasks: tuple[Task, ...], outputs: dict, batch: dict) -> dict[str, Tensor]:
    """MTCP's outputs and {task name: label} → {task name: L_t}, 0-d each, with

        L_t = loss(ŷ_final) + ½ Σ loss(each ŷ_intermediate) + ½ loss(ŷ_initial)

    A batch without labels for a task holds an all-invalid label, never a missing key.
    """
    # D7: one rule for all tasks. The release never decodes ŷ_initial, trains the intermediate
    # normals with the depth loss, and counts one of two intermediate terms for human parts
    # [release: models/models_nyud_CL.py#L196-L214, traine/train_utils.py#L123, #L206].
    losses = {}
    for task in tasks:
        loss = LOSSES[task.loss]
        y = outputs[task.name]
        target = batch[task.name]
        early = [p for p in (*y["intermediate"], y["initial"]) if p is not None]
        losses[task.name] = loss(y["final"], target) + 0.5 * sum(loss(p, target) for p in early)
    return losses


# ==================================================================================================
# Balancers: {L_t} → one number. Equal weights, then the loss prioritisation scheme (LPS), then two
# from the literature. balancer(losses) is called on training batches only, balancer.end_epoch()
# after each epoch. In a distributed run each rank has a copy, and all hold the same weights.
# ==================================================================================================


class EpochMean(nn.Module):
    """Means of T losses over an epoch, over all ranks of a distributed run.

    A loss of exactly 0 is a batch without valid pixels for that task. It is not counted.
    """

    def __init__(self, n: int):
        super().__init__()
        self.register_buffer("sum", torch.zeros(n))
        self.register_buffer("count", torch.zeros(n))

    def add(self, values: Tensor) -> None:
        self.sum += values
        self.count += values > 0

    def pop(self) -> Tensor:
        """(T,) means, NaN for a task without a valid pixel in the whole epoch. Starts anew."""
        both = torch.stack([self.sum, self.count])  # (2,T)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(both)
        self.sum.zero_()
        self.count.zero_()
        return both[0] / both[1]


class EqualWeights(nn.Module):
    """Total = Σ_t w_t L_t, w_t = 1, as the release does in effect. The other balancers build on it.

    names: the T tasks. weights: (T,) w_t in the same order, for the log. All that a balancer
    remembers is in its state_dict: a run resumed at the end of an epoch goes on exactly.
    """

    def __init__(self, names: list[str]):
        super().__init__()
        self.names = list(names)
        self.mean = EpochMean(len(names))
        self.register_buffer("weights", torch.ones(len(names)))
        # (T,) the last known means, mostly those of the epoch before. NaN: none yet.
        self.register_buffer("previous", torch.full((len(names),), math.nan))

    def forward(self, losses: dict[str, Tensor]) -> Tensor:
        """{name: L_t} → total to minimise, 0-d."""
        scaled = self.scale(torch.stack([losses[t] for t in self.names]))  # (T,)
        self.mean.add(scaled.detach())
        return (self.weights * scaled).sum()

    def end_epoch(self) -> None:
        now = self.mean.pop()
        self.weights.copy_(self.next_weights(now))
        self.previous.copy_(torch.where(now.isnan(), self.previous, now))

    def scale(self, L: Tensor) -> Tensor:
        """(T,) losses → (T,) what is averaged and weighted."""
        return L

    def next_weights(self, now: Tensor) -> Tensor:
        """(T,) means of the epoch, NaN for a task without valid pixels → (T,) next weights."""
        return self.weights


def floor_and_rescale(w: Tensor, w_min: float) -> Tensor:
    """(n,) weights with a positive mean → (n,) weights with sum n, none below w_min < 1.

    Clamping first and rescaling afterwards would push the clamped ones below the floor again. So
    only what lies above the floor is rescaled.
    """
    w = w / w.mean()  # sum n
    above = (w - w_min).clamp(min=0)
    return w_min + above * (len(w) * (1 - w_min) / above.sum())


class LPS(EqualWeights):
    """The paper's loss prioritisation scheme: total = Σ_t w_t ℓ_t with ℓ_t = log(1 + L_t).

    *Common scale.* dℓ = dL / (1 + L): the logarithm divides the gradient of a large loss by about
    its size, so that it does not drown the others. A small one, L ≪ 1, stays nearly as it is.

    *Prioritisation.* With means ℓ_t(e) over epoch e and their sum ℓ(e) over the tasks:
        used in epoch 0      w_t = 1
        used in epoch 1      w_t = ℓ(0) / ℓ_t(0)
        used in epoch e + 1  r_t = [ℓ_t(e) / ℓ_t(e-1)] / [ℓ(e) / ℓ(e-1)], > 1 if t fell behind
          for e ≥ 1          w_t = r̄ + κ (r_t - r̄), r̄ the mean of r_t over the tasks
    Rescaling to sum T follows. There, factors that all tasks share cancel, such as ℓ(0).

    Once the losses stand still, all r_t and w_t are 1. Weights and losses act on each other: with κ
    too large for what an epoch changes, the weights oscillate from epoch to epoch without end, even
    without noise. Only the choice of κ guards against that, not the floor.

    kappa: κ, 7.5 on NYUD-v2 and 1.6 on PASCAL-Context in the release. w_min: floor of the weights.
    log, prioritise: each half can be switched off alone. Raises ValueError unless 0 < w_min < 1.
    """

    # D1: LPS is applied. The release computes w_t, then overwrites the weighted sum by the plain
    # one; its logarithm is commented out [release: losses/loss_schemes.py#L21-L24].
    # D2: guards. The release has none [release: main_CL_nyud.py#L187]: where r_t is more than 1/κ
    # below r̄, 13.3 % at κ = 7.5, w_t is negative and training raises that loss. Here weights have
    # a floor and sum to T, a task without a valid pixel is left out, and the state is saved.

    def __init__(self, names, kappa: float, w_min: float = 0.1, log=True, prioritise=True):
        super().__init__(names)
        if not 0 < w_min < 1:
            raise ValueError(f"w_min is {w_min}: weights above 0 with sum T need a floor in (0, 1)")
        self.kappa = kappa
        self.w_min = w_min
        self.log = log
        self.prioritise = prioritise

    def scale(self, L: Tensor) -> Tensor:
        return torch.log1p(L) if self.log else L

    def next_weights(self, now: Tensor) -> Tensor:
        if not self.prioritise:
            return self.weights
        first = bool(self.previous.isnan().all())
        known = ~now.isnan() if first else ~(now.isnan() | self.previous.isnan())
        weights = torch.ones_like(now)  # stays 1 for a task that cannot be compared
        if known.any():
            ell = now[known]
            before = self.previous[known]
            if first:
                raw = ell.sum() / ell
            else:
                r = (ell / before) / (ell.sum() / before.sum())
                raw = r.mean() + self.kappa * (r - r.mean())
            weights[known] = floor_and_rescale(raw, self.w_min)
        return weights


class UncertaintyWeights(EqualWeights):
    """[Kendall]: total = Σ_t exp(-s_t) L_t + s_t / 2, where s_t = log σ_t² is learned.

    s is a parameter: give it to the optimiser, without weight decay. σ_t absorbs the paper's factor
    ½ for regression. A task without a valid pixel in a batch is left out: + s_t / 2 alone would
    drive its σ_t to zero.
    """

    def __init__(self, names: list[str]):
        super().__init__(names)
        self.log_variance = nn.Parameter(torch.zeros(len(names)))  # s

    def forward(self, losses: dict[str, Tensor]) -> Tensor:
        L = torch.stack([losses[t] for t in self.names])
        precision = torch.exp(-self.log_variance)
        self.weights.copy_(precision.detach())
        return (precision * L + (L > 0) * self.log_variance / 2).sum()


class DynamicWeightAverage(EqualWeights):
    """[DWA]: total = Σ_t w_t L_t with w = T · softmax(r / temperature), r_t = L_t(e-1) / L_t(e-2).

    L_t(e) is the mean over epoch e; w is used in epoch e. Tasks that learn slowly gain weight. In
    the first two epochs there is no ratio, and w_t = 1.
    """

    temperature = 2.0

    def next_weights(self, now: Tensor) -> Tensor:
        if self.previous.isnan().all():
            return self.weights
        r = torch.nan_to_num(now / self.previous, nan=1.0)  # 1: a task that cannot be compared
        return len(r) * torch.softmax(r / self.temperature, dim=0)


# ==================================================================================================
# Published weights: a whole Mask2Former, or a backbone
#
# All or nothing: each tensor of that part of the network is filled, and each tensor of the file is
# used or known to be of no use. Otherwise a WeightsError names the tensors, and nothing is changed.
# A half-filled network would train all the same, without a warning, to low figures.
# ==================================================================================================

ENC = "model.pixel_level_module.encoder"
PIX = "model.pixel_level_module.decoder"
QRY = "model.transformer_module"
# What a tensor is called in MTCP (left) and in Hugging Face's Mask2FormerForUniversalSegmentation
# (right). * is a number, the same on both sides. What follows, such as .weight, is the same too.
# {q,k,v} means three tensors of the file, stacked into one in MTCP. The file merges Swin's patches
# at the end of a stage, timm at the start of the next one.
MASK2FORMER = """
backbone.net.patch_embed.proj                 ENC.embeddings.patch_embeddings.projection
backbone.net.patch_embed.norm                 ENC.embeddings.norm
backbone.net.layers_*.blocks.*.norm1          ENC.encoder.layers.*.blocks.*.layernorm_before
backbone.net.layers_*.blocks.*.attn.qkv
                                ENC.encoder.layers.*.blocks.*.attention.self.{query,key,value}
backbone.net.layers_*.blocks.*.attn.relative_position_bias_table
                      ENC.encoder.layers.*.blocks.*.attention.self.relative_position_bias_table
backbone.net.layers_*.blocks.*.attn.proj      ENC.encoder.layers.*.blocks.*.attention.output.dense
backbone.net.layers_*.blocks.*.norm2          ENC.encoder.layers.*.blocks.*.layernorm_after
backbone.net.layers_*.blocks.*.mlp.fc1        ENC.encoder.layers.*.blocks.*.intermediate.dense
backbone.net.layers_*.blocks.*.mlp.fc2        ENC.encoder.layers.*.blocks.*.output.dense
backbone.net.layers_1.downsample              ENC.encoder.layers.0.downsample
backbone.net.layers_2.downsample              ENC.encoder.layers.1.downsample
backbone.net.layers_3.downsample              ENC.encoder.layers.2.downsample
backbone.norms.0                              ENC.hidden_states_norms.stage1
backbone.norms.1                              ENC.hidden_states_norms.stage2
backbone.norms.2                              ENC.hidden_states_norms.stage3
backbone.norms.3                              ENC.hidden_states_norms.stage4
pixel_decoder.project.*                       PIX.input_projections.*
pixel_decoder.level_embed                     PIX.level_embed
pixel_decoder.layers.*.attention.offsets      PIX.encoder.layers.*.self_attn.sampling_offsets
pixel_decoder.layers.*.attention.weights      PIX.encoder.layers.*.self_attn.attention_weights
pixel_decoder.layers.*.attention.value        PIX.encoder.layers.*.self_attn.value_proj
pixel_decoder.layers.*.attention.out          PIX.encoder.layers.*.self_attn.output_proj
pixel_decoder.layers.*.norm1                  PIX.encoder.layers.*.self_attn_layer_norm
pixel_decoder.layers.*.ffn.0                  PIX.encoder.layers.*.fc1
pixel_decoder.layers.*.ffn.2                  PIX.encoder.layers.*.fc2
pixel_decoder.layers.*.norm2                  PIX.encoder.layers.*.final_layer_norm
pixel_decoder.lateral                         PIX.adapter_1
pixel_decoder.smooth                          PIX.layer_1
pixel_decoder.to_P                            PIX.mask_projection
query_decoder.query_features                  QRY.queries_features
query_decoder.query_position                  QRY.queries_embedder
query_decoder.level_embed                     QRY.level_embed
query_decoder.layers.*.cross                  QRY.decoder.layers.*.cross_attn
query_decoder.layers.*.norm1                  QRY.decoder.layers.*.cross_attn_layer_norm
query_decoder.layers.*.self_attention.in_proj_weight
                                              QRY.decoder.layers.*.self_attn.{q,k,v}_proj.weight
query_decoder.layers.*.self_attention.in_proj_bias
                                              QRY.decoder.layers.*.self_attn.{q,k,v}_proj.bias
query_decoder.layers.*.self_attention.out_proj    QRY.decoder.layers.*.self_attn.out_proj
query_decoder.layers.*.norm2                  QRY.decoder.layers.*.self_attn_layer_norm
query_decoder.layers.*.ffn.0                  QRY.decoder.layers.*.fc1
query_decoder.layers.*.ffn.2                  QRY.decoder.layers.*.fc2
query_decoder.layers.*.norm3                  QRY.decoder.layers.*.final_layer_norm
query_decoder.norm                            QRY.decoder.layernorm
query_decoder.mask_embed.0                    QRY.decoder.mask_predictor.mask_embedder.0.0
query_decoder.mask_embed.2                    QRY.decoder.mask_predictor.mask_embedder.1.0
query_decoder.mask_embed.4                    QRY.decoder.mask_predictor.mask_embedder.2.0
""".replace("ENC", ENC).replace("PIX", PIX).replace("QRY", QRY).split()  # fmt: skip
# What such a file holds and MT-CP does not need: the class head, the loss, a constant that timm's
# Swin computes, and a last norm that newer versions save although nothing reads its output.
MASK2FORMER_UNUSED = (
    r"class_predictor\.(weight|bias)|criterion\.empty_weight|.+\.relative_position_index"
    r"|model\.pixel_level_module\.encoder\.swin\.layernorm\.(weight|bias)"
)


class WeightsError(ValueError):
    """Weights that cannot be read or do not fit. The message names the tensors."""


def listed(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def read_checkpoint(path: Path):
    """What is in a .safetensors file or a file of torch.save. WeightsError if it cannot be read."""
    if path.suffix.lower() == ".pkl":
        raise WeightsError("a pickle, as of Detectron2, can run code: get it as .safetensors")
    try:
        if path.suffix.lower() == ".safetensors":
            return load_file(path)
        return torch.load(path, "cpu", weights_only=True)
    except FileNotFoundError as error:
        raise WeightsError(f"{path.name} not found") from error
    except pickle.UnpicklingError as error:
        # Not in torch's words: they advise weights_only=False, which would run the file's code.
        raise WeightsError("holds more than tensors, or none: get it as .safetensors") from error
    except Exception as error:  # torch.load fails in many ways on bytes that are not its own
        raise WeightsError("cannot be read; was it downloaded to the end?") from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """A checkpoint → its tensors by name, on the CPU. Raises WeightsError, also for a NaN.

    path: a .safetensors file; a file of torch.save, read with weights_only=True, so that it cannot
    run code; or a folder that holds model.safetensors or pytorch_model.bin. {"model": …} and
    {"state_dict": …} are unwrapped, the prefixes of DDP and of torch.compile taken off.
    """
    if path.is_dir():
        usual = [path / "model.safetensors", path / "pytorch_model.bin"]
        path = next((p for p in [*usual, *path.glob("*.index.json")] if p.is_file()), usual[0])
    if path.name.endswith(".index.json"):
        raise WeightsError("a checkpoint in several files is not read: save it as one file")
    tensors = read_checkpoint(path)
    for key in ("model", "state_dict"):
        tensors = tensors.get(key, tensors) if isinstance(tensors, dict) else tensors
    named = isinstance(tensors, dict) and all(isinstance(name, str) for name in tensors)
    if not named or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise WeightsError("holds something else than tensors by name")
    for prefix in ("module.", "_orig_mod.", "module."):  # one may stand inside the other
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): t for name, t in tensors.items()}
    broken = [n for n, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()]
    if broken:
        raise WeightsError(f"NaN or infinity in {listed(broken)}")
    return tensors


def mask2former_queries(tensors: dict[str, Tensor]) -> int | None:
    """The number of queries N of a Hugging Face Mask2Former; None if it is something else."""
    queries = tensors.get(f"{QRY}.queries_features.weight")
    return None if queries is None else len(queries)


@cache
def mask2former_names(name: str) -> list[str]:
    """A tensor of MTCP → the tensor of a Mask2Former, or the three, that fill it; [] if none do."""
    for mtcp_name, hf_name in zip(MASK2FORMER[::2], MASK2FORMER[1::2], strict=True):
        match = re.fullmatch(re.escape(mtcp_name).replace(r"\*", r"(\d+)") + r"(\..+)?", name)
        if match:
            *numbers, ending = match.groups(default="")
            for number in numbers:
                hf_name = hf_name.replace("*", number, 1)
            choice = re.search("{(.+)}", hf_name)  # {q,k,v}
            parts = choice[1].split(",") if choice else [""]
            return [re.sub("{.+}", part, hf_name) + ending for part in parts]
    return []


@torch.no_grad()
def fill(places: dict, tensors: dict, unused: set[str], into: str, problems: list[str]) -> dict:
    """Copies {name: tensor} into the places {name: tensor of the network}; see load_weights.

    Only names in `unused` may be left over. All problems, with those given, are raised together.
    """
    missing = [name for name in places if name not in tensors]
    left = [name for name in tensors if name not in places and name not in unused]
    misfits = [
        f"{name} {tuple(tensors[name].shape)} (network: {tuple(place.shape)})"
        for name, place in places.items()
        if name in tensors and tensors[name].shape != place.shape
    ]
    found = {"missing in the file": missing, "in the file, but not in the network": left}
    found["of another shape; are the sizes of the network those of the file?"] = misfits
    problems = problems + [f"{what}: {listed(names)}" for what, names in found.items() if names]
    if problems:
        raise WeightsError("\n  ".join([f"the file does not fill {into}.", *problems]))
    for name, place in places.items():
        place.copy_(tensors[name])
    return {"into": into, "tensors": len(places), "not used": sorted(set(tensors) - set(places))}


def load_mask2former(model: MTCP, tensors: dict[str, Tensor]) -> dict:
    """As load_weights, from a Hugging Face Mask2Former with a Swin backbone."""
    parts = ("backbone", "pixel_decoder", "query_decoder")
    places = {}
    for name, own in model.state_dict().items():
        if name.split(".")[0] in parts:
            hf_names = mask2former_names(name)
            if not hf_names:
                raise WeightsError(f"its backbone is a Swin, and {model.cfg.backbone} is none")
            places.update(zip(hf_names, own.chunk(len(hf_names)), strict=True))  # views of own
    unused = {name for name in tensors if re.fullmatch(MASK2FORMER_UNUSED, name)}
    return fill(places, tensors, unused, ", ".join(parts), [])


def comparable(name: str) -> str:
    """timm says layers.0.x in a classifier, but layers_0.x or model.layers.0.x in features_only."""
    return name.removeprefix("model.").replace("_", ".")


def load_backbone(backbone: Backbone, tensors: dict[str, Tensor]) -> dict:
    """As load_weights, from a checkpoint of timm's or an original one that timm can read.

    Fills the backbone, all but the LayerNorms and the pyramid, which are not timm's.
    """
    # The classifier that such a file was saved from; on "meta" it takes no memory. What it has and
    # backbone.net has not, a head and the norm before it, may be left over.
    with torch.device("meta"):
        classifier = timm.create_model(backbone.name, **backbone.timm_args)
    family = sys.modules[type(classifier).__module__]
    convert = getattr(family, "checkpoint_filter_fn", lambda given, model: given)
    try:
        renamed = convert(dict(tensors), classifier)  # original names → timm's
    except (KeyError, AttributeError, RuntimeError, ValueError, AssertionError) as error:
        raise WeightsError(f"timm cannot read it as {backbone.name} ({error})") from error
    names = {comparable(name): name for name in classifier.state_dict()}
    places = {names[comparable(name)]: own for name, own in backbone.net.state_dict().items()}
    # timm stretches these two to another window or image size without a word. Their rows are a
    # square grid, which isqrt measures, and in DINOv2's files one more, of the class token.
    stretched = [
        name
        for name in set(tensors) & set(renamed)
        if name.endswith(("relative_position_bias_table", "pos_embed"))
        and math.isqrt(tensors[name].shape[-2]) != math.isqrt(renamed[name].shape[-2])
    ]
    problems = [f"for another window or image size: {listed(stretched)}"] if stretched else []
    return fill(places, renamed, set(names.values()), "backbone", problems)


def load_weights(model: MTCP, tensors: dict[str, Tensor]) -> dict:
    """Fills what the names of the tensors say they are: a Mask2Former, or else a backbone.

    tensors: see read_weights. Returns {"into": parts of the network, "tensors": number of tensors
    used, "not used": names of the others}. Raises WeightsError, before any change, if they do not
    fit exactly.
    """
    if any(name.startswith((ENC, PIX, QRY)) for name in tensors):
        return load_mask2former(model, tensors)
    return load_backbone(model.backbone, tensors)
