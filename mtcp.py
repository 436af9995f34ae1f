"""MT-CP in one file: multi-task dense prediction with coherence and prioritisation.

Reference: M. Fontana, M. Spratling, M. Shi, "Optimizing Dense Visual Predictions Through Multi-Task Coherence and
Prioritization", WACV 2025, arXiv 2412.03179. This file is an independent implementation, made to be read from top to
bottom beside the paper; it needs torch and timm (which brings safetensors along), and no other file of this repository.

One network predicts several dense maps of one image, for example segmentation, depth and surface normals. The paper's
Figure 2, with its symbols, is the table of contents (B images of H x W pixels, T tasks, C = 256 channels,
h x w = H/4 x W/4; ⊙ multiplies elementwise, σ is the sigmoid, [a; b] concatenates channels):

    x (B,3,H,W)
     └─ Backbone ──────── c2, c3, c4, c5                     strides 4, 8, 16, 32
          └─ PixelDecoder ─────── P (B,C,h,w)                per-pixel embedding, and three coarse maps
               └─ QueryDecoder ── M (B,N,h,w)                one mask (logits) per learned query, N = 100
                     R = P ⊙ Σ_n M_n (B,C,h,w)               shared representation
     for every task t:
       TaskDecoder          R → F_t = (F1, F2, F3)           (C,h,w), (2C,h/2,w/2), (4C,h/4,w/4)
       FeaturePyramid       F_t → X_t (B,C,h,w)              the task's own representation
       CoherenceFusion      X_t with all X_u, u ≠ t → X̂_t    coherence fusion module, CFM; decoded into ŷ_initial
       TraceBack            X̂_t through F3, F2, F1           spatial refinement modules, SRM_3 → SRM_2 → SRM_1;
                                                             decoded into two ŷ_intermediate and ŷ_final
     LPS                    the T task losses → one number   loss prioritisation scheme

Two ideas carry the method. *Coherence*: the tasks describe one scene, so where the other tasks find two pixels alike,
a task should too; CFM and the trace-back send that information across tasks and back down every decoder.
*Prioritisation*: LPS compresses the losses to a common scale and gives weight to the tasks that lag behind.

The parts MT-CP is built from, cited where they are used:
  [Mask2Former]  Cheng et al., CVPR 2022, arXiv 2112.01527        [Swin]   Liu et al., ICCV 2021, arXiv 2103.14030
  [DefDETR]      Zhu et al., ICLR 2021, arXiv 2010.04159          [CBAM]   Woo et al., ECCV 2018, arXiv 1807.06521
  [ViTDet]       Li et al., ECCV 2022, arXiv 2203.16527           [PVT]    Wang et al., ICCV 2021, arXiv 2102.12122
  [SwinV2]       Liu et al., CVPR 2022, arXiv 2111.09883          [FPN]    Lin et al., CVPR 2017, arXiv 1612.03144
  [Kendall]      Kendall et al., CVPR 2018, arXiv 1705.07115      [DWA]    Liu et al., CVPR 2019, arXiv 1803.10704

Where this file departs from the paper or from the authors' released code, a comment marked DEPARTURE says so and why;
README.md has them all in one table.
"""

import hashlib
import json
import math
import pickle
import re
import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers import LayerNorm2d
from timm.models.swin_transformer import SwinTransformerBlock, SwinTransformerStage
from torch import Tensor

# ======================================================================================================================
# Tasks and configuration
# ======================================================================================================================


@dataclass(frozen=True)
class Task:
    """One dense prediction task, as data: nothing below asks for a task by its name.

    name      key of the label in a sample and of the prediction in the model's output
    channels  of the prediction
    output    what a head's raw output is turned into, a key of OUTPUTS
    loss      a key of LOSSES
    metric    the headline figure by which models are compared (train.py computes it)
    better    +1 where a higher metric is better, -1 where a lower one is
    """

    name: str
    channels: int
    output: str
    loss: str
    metric: str
    better: int


NYUD = (
    Task("semseg", 40, "logits", "cross_entropy", "mIoU", +1),
    Task("depth", 1, "positive", "l1_depth", "rmse", -1),
    Task("normals", 3, "unit", "l1_normals", "mean", -1),
)
PASCAL = (
    Task("semseg", 21, "logits", "cross_entropy", "mIoU", +1),
    Task("human_parts", 7, "logits", "cross_entropy", "mIoU", +1),
    Task("sal", 1, "logits", "balanced_bce", "maxF", +1),
)

IGNORE_INDEX = 255  # of every class label; pixels carrying it take part in no loss and no metric


@dataclass(frozen=True)
class MTCPConfig:
    """Every size of the network. The defaults are the sizes of the paper's Swin-S model; PRESETS holds the variants."""

    backbone: str = "swin_small_patch4_window7_224"  # any timm name with features; see Backbone
    backbone_args: dict = field(default_factory=dict)  # extra arguments for timm.create_model
    drop_path: float = 0.3  # of the backbone
    width: int = 256  # C
    pixel_layers: int = 6  # deformable attention layers of the pixel decoder
    pixel_ffn: int = 1024
    attention_heads: int = 8  # of the pixel decoder and the query decoder
    points: int = 4  # sampling points per head and level
    queries: int = 100  # N
    query_layers: int = 9  # best a multiple of 3, so that each of the three strides is read equally often
    query_ffn: int = 2048
    task_depths: tuple[int, int, int] = (1, 2, 1)  # Swin blocks in the stages F1, F2, F3
    task_heads: int = 2
    window: int = 7
    cfm: bool = True  # False: X̂_t = X_t, no exchange between tasks after R
    cfm_heads: int = 1
    cfm_stride: int = 1  # 1 = exact; s pools keys and values by s x s
    trace_back: bool = True  # False: ŷ_final is decoded from X̂_t


PRESETS = {
    "paper": MTCPConfig(),
    # The same decoders on a plain ViT with foundation-model weights (DINOv2, Oquab et al., TMLR 2024).
    "vit": MTCPConfig(backbone="vit_base_patch14_reg4_dinov2"),
    # The same topology at a size two CPU cores can train from scratch in minutes.
    "toy": MTCPConfig(
        backbone="swin_tiny_patch4_window7_224",
        backbone_args={"embed_dim": 32, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8)},
        drop_path=0.0,
        width=32,
        cfm_stride=2,
        pixel_layers=2,
        pixel_ffn=128,
        attention_heads=4,
        queries=16,
        query_layers=3,
        query_ffn=128,
    ),
}


# ======================================================================================================================
# Blocks used in several places
# ======================================================================================================================


def conv_bn_relu(in_channels: int, out_channels: int) -> nn.Sequential:
    """1x1 convolution → BatchNorm → ReLU, (B,in,h,w) → (B,out,h,w). No bias: BatchNorm subtracts it again."""
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU())


def resize(x: Tensor, size) -> Tensor:
    """Bilinear resize of (B,C,h,w) to (B,C,*size)."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


class CBAM(nn.Module):
    """Convolutional block attention [CBAM]: x (B,C,h,w) → (B,C,h,w), first which channels matter, then which places.

    x ← x ⊙ σ(MLP(avgpool x) + MLP(maxpool x));   x ← x ⊙ σ(BN(conv7×7 [mean_c x; max_c x]))

    The same function as timm's CbamModule, which calls itself experimental; a test compares the two.
    """

    def __init__(self, C: int, reduction: int = 16):
        super().__init__()
        hidden = max(C // reduction, 1)
        self.mlp = nn.Sequential(nn.Linear(C, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, C, bias=False))
        self.place = nn.Sequential(nn.Conv2d(2, 1, 7, padding=3, bias=False), nn.BatchNorm2d(1))

    def forward(self, x: Tensor) -> Tensor:
        pooled = torch.stack([x.mean(dim=(2, 3)), x.amax(dim=(2, 3))])  # (2,B,C)
        x = x * torch.sigmoid(self.mlp(pooled).sum(dim=0))[:, :, None, None]
        pooled = torch.stack([x.mean(dim=1), x.amax(dim=1)], dim=1)  # (B,2,h,w)
        return x * torch.sigmoid(self.place(pooled))


class PadThenShiftBlock(SwinTransformerBlock):
    """timm's [Swin] block, but the map (B,h,w,C) is padded to whole windows before it is shifted, as in the original.

    timm shifts first. Where the window does not divide the map, as 7 does not divide 120 x 160, rows that the shift has
    brought over from the opposite edge then share a window with rows they are no neighbours of, and published weights
    give other features than they were trained for.
    """

    def _attn(self, x: Tensor) -> Tensor:
        (H, W), (window_h, window_w) = x.shape[1:3], self.window_size
        x = F.pad(x, (0, 0, 0, -W % window_w, 0, -H % window_h))
        return super()._attn(x)[:, :H, :W]


def pad_then_shift(net: nn.Module) -> nn.Module:
    """Turns all of timm's Swin blocks inside `net` into PadThenShiftBlocks: the same tensors with another method."""
    for m in net.modules():
        if type(m) is SwinTransformerBlock:
            m.__class__ = PadThenShiftBlock
    return net


# ======================================================================================================================
# Backbone: x → c2, c3, c4, c5
# ======================================================================================================================


def _any_size_args(name: str) -> dict:
    """What tells timm that a backbone will see images of any size; each family spells it in its own way."""
    family = timm.models.model_entrypoint(timm.models.split_model_name_tag(name)[0]).__module__.rsplit(".", 1)[-1]
    # always_partition: without it a stage that is smaller than its window at timm's nominal 224x224 loses its window
    # shift for good, also for larger images.
    swin = {"strict_img_size": False, "always_partition": True}
    plain = {"dynamic_img_size": True}
    return {"swin_transformer": swin, "swin_transformer_v2": swin,
            "vision_transformer": plain, "deit": plain, "eva": plain}.get(family, {})  # fmt: skip


class Backbone(nn.Module):
    """x (B,3,H,W), H and W multiples of 32 → [c2, c3, c4, c5], LayerNorm'ed maps at strides 4, 8, 16, 32.

    A thin wrapper over timm's `features_only` models. Hierarchical ones (Swin, Swin V2, ConvNeXt, PVT v2, …) have these
    four strides. Plain ViTs (ViT, DeiT, DINOv2, DINOv3) have a single one, 14 or 16; the simple feature pyramid of
    [ViTDet] makes the four maps from their last block.

    Raises ValueError for a backbone whose strides fit neither case or that takes images of one size only, and whatever
    timm raises for an unknown name.
    """

    def __init__(self, name: str, drop_path: float = 0.0, **timm_args):
        super().__init__()
        if timm.get_pretrained_cfg(name).fixed_input_size and not _any_size_args(name):
            raise ValueError(
                f"backbone {name} takes images of one size only: choose a Swin, a ConvNeXt, a PVT v2 or a ViT"
            )
        self.name, self.timm_args = name, {"drop_path_rate": drop_path, **_any_size_args(name), **timm_args}
        self.net = pad_then_shift(timm.create_model(name, features_only=True, **self.timm_args))
        strides, widths = self.net.feature_info.reduction(), self.net.feature_info.channels()
        if strides[-4:] == [4, 8, 16, 32]:
            self.patch, self.pyramid = None, None
            self.channels = widths[-4:]
        elif set(strides) in ({14}, {16}):
            self.patch = strides[-1]
            self.pyramid = SimpleFeaturePyramid(widths[-1])
            self.channels = self.pyramid.channels
        else:
            raise ValueError(
                f"backbone {name} has strides {strides}: choose one with 4, 8, 16, 32 or a ViT with patches of 14 or 16"
            )
        self.norms = nn.ModuleList(LayerNorm2d(c, eps=1e-5) for c in self.channels)

    def forward(self, x: Tensor) -> list[Tensor]:
        if self.patch == 14:
            # One patch has to mean 16 pixels of x for the strides to come out, so the image is shrunk by 14/16.
            x = resize(x, [s // 16 * 14 for s in x.shape[-2:]])
        maps = self.net(x)
        if self.net.output_fmt == "NHWC":  # Swin's layout
            maps = [m.permute(0, 3, 1, 2) for m in maps]
        maps = self.pyramid(maps[-1]) if self.pyramid is not None else maps[-4:]
        return [norm(m) for norm, m in zip(self.norms, maps, strict=True)]


class SimpleFeaturePyramid(nn.Module):
    """One ViT map (B,D,H/16,W/16) → maps at strides 4, 8, 16, 32 by deconvolution and pooling [ViTDet, section 3].

    DEPARTURE: without [ViTDet]'s further convolutions on every map, since the pixel decoder projects each one anyway.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.channels = [dim // 4, dim // 2, dim, dim]
        self.to4 = nn.Sequential(
            nn.ConvTranspose2d(dim, dim // 2, 2, 2), LayerNorm2d(dim // 2), nn.GELU(),
            nn.ConvTranspose2d(dim // 2, dim // 4, 2, 2),
        )  # fmt: skip
        self.to8 = nn.ConvTranspose2d(dim, dim // 2, 2, 2)
        self.to32 = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.to4(x), self.to8(x), x, self.to32(x)]


# ======================================================================================================================
# Pixel decoder: c2 … c5 → P                                                          [Mask2Former], section 3.2.2
# ======================================================================================================================


class PixelDecoder(nn.Module):
    """[c2, c3, c4, c5] → P (B,C,h,w) and the three maps (B,C,·,·) at strides 32, 16, 8 that the queries will read.

    The three coarse maps become one long sequence of pixels that exchange information by deformable attention; a single
    [FPN] step then brings the result to stride 4. (Deformable attention and the small helpers are in the appendix.)
    """

    def __init__(self, channels: list[int], cfg: MTCPConfig):
        super().__init__()
        C, (c2_channels, *coarse_channels) = cfg.width, channels
        self.project = nn.ModuleList(  # for strides 32, 16, 8: coarse to fine, as everywhere in Mask2Former
            nn.Sequential(nn.Conv2d(c, C, 1), _group_norm(C)) for c in reversed(coarse_channels)
        )
        self.level_embed = nn.Parameter(torch.randn(len(coarse_channels), C))
        self.layers = nn.ModuleList(DeformableLayer(cfg, len(coarse_channels)) for _ in range(cfg.pixel_layers))
        self.lateral = nn.Sequential(nn.Conv2d(c2_channels, C, 1, bias=False), _group_norm(C))
        self.smooth = nn.Sequential(nn.Conv2d(C, C, 3, padding=1, bias=False), _group_norm(C), nn.ReLU())
        self.to_P = nn.Conv2d(C, C, 1)

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        c2, coarse = maps[0], maps[:0:-1]  # strides 4 | 32, 16, 8
        x = [project(c) for project, c in zip(self.project, coarse, strict=True)]
        sizes = [m.shape[-2:] for m in x]

        # Attention is blind to order: a sine code says where a pixel is, a learned vector on which level.
        position = [sine_embedding(m) + e[None, :, None, None] for m, e in zip(x, self.level_embed, strict=True)]
        x, position = to_sequence(x), to_sequence(position)  # (B,L,C), (1,L,C), L = pixels of all levels together
        reference = pixel_centres(sizes, x)  # (L,2)
        for layer in self.layers:
            x = layer(x, position, reference, sizes)

        levels = x.split([h * w for h, w in sizes], dim=1)
        levels = [m.transpose(1, 2).unflatten(2, size) for m, size in zip(levels, sizes, strict=True)]  # (B,C,h_l,w_l)
        fine = self.smooth(self.lateral(c2) + resize(levels[-1], c2.shape[-2:]))  # stride 8 → 4
        return self.to_P(fine), levels


class DeformableLayer(nn.Module):
    """One transformer layer (post-norm) on the sequence x (B,L,C) of all levels' pixels."""

    def __init__(self, cfg: MTCPConfig, levels: int):
        super().__init__()
        self.attention = DeformableAttention(cfg.width, cfg.attention_heads, levels, cfg.points)
        self.norm1 = nn.LayerNorm(cfg.width)
        self.ffn = _ffn(cfg.width, cfg.pixel_ffn)
        self.norm2 = nn.LayerNorm(cfg.width)

    def forward(self, x: Tensor, position: Tensor, reference: Tensor, sizes: list) -> Tensor:
        x = self.norm1(x + self.attention(x + position, reference, x, sizes))
        return self.norm2(x + self.ffn(x))


def _group_norm(channels: int) -> nn.GroupNorm:
    """Mask2Former's 32 groups at its 256 channels, and groups of the same 8 channels at other widths."""
    return nn.GroupNorm(channels // 8, channels)


def _ffn(width: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))


# ======================================================================================================================
# Query decoder: P and the coarse maps → M                                            [Mask2Former], section 3.2.1
# ======================================================================================================================


class QueryDecoder(nn.Module):
    """P (B,C,h,w) and maps (B,C,·,·) at strides 32, 16, 8 → M (B,N,h,w): mask logits, one map for each query.

    N learned queries read the image layer by layer, each only inside the mask it predicted before (masked attention):
    a query that has found a region goes on looking there instead of being drawn to the whole image.
    """

    def __init__(self, cfg: MTCPConfig):
        super().__init__()
        C = cfg.width
        self.heads = cfg.attention_heads
        self.query_features = nn.Embedding(cfg.queries, C)  # what a query starts from
        self.query_position = nn.Embedding(cfg.queries, C)  # added wherever queries are compared
        self.level_embed = nn.Embedding(3, C)
        self.layers = nn.ModuleList(QueryLayer(cfg) for _ in range(cfg.query_layers))
        self.norm = nn.LayerNorm(C)
        self.mask_embed = nn.Sequential(nn.Linear(C, C), nn.ReLU(), nn.Linear(C, C), nn.ReLU(), nn.Linear(C, C))

    def forward(self, P: Tensor, maps: list[Tensor]) -> Tensor:
        position = [to_sequence([sine_embedding(m)]) for m in maps]  # (1,h_l·w_l,C)
        memory = [to_sequence([m]) + e for m, e in zip(maps, self.level_embed.weight, strict=True)]  # (B,h_l·w_l,C)
        # A mask is a dot product with P, and resizing is linear too: resizing P once for each level gives the same
        # small masks as resizing N large masks after every layer.
        small_P = [resize(P.detach(), m.shape[-2:]) for m in maps]

        q = self.query_features.weight.expand(len(P), -1, -1)  # (B,N,C)
        for i, layer in enumerate(self.layers):
            level = i % len(maps)  # strides 32, 16, 8, 32, …
            hidden = self.attention_mask(self.masks(q, small_P[level]))
            q = layer(q, self.query_position.weight, memory[level], position[level], hidden)
        return self.masks(q, P)

    def masks(self, q: Tensor, P: Tensor) -> Tensor:
        """M = MLP(q) · P: (B,N,C) and (B,C,h,w) → (B,N,h,w). Logits: σ(M) is the soft mask."""
        return torch.einsum("bnc,bchw->bnhw", self.mask_embed(self.norm(q)), P)

    def attention_mask(self, masks: Tensor) -> Tensor:
        """Mask logits (B,N,h,w) → bool (B·heads,N,h·w), True where a query must NOT look."""
        hidden = (masks < 0).flatten(2)  # σ(m) < 0.5  ⇔  m < 0; a comparison, so no gradient passes
        # A query that predicts an empty mask would attend to nothing: a softmax over nothing, which is NaN or, in newer
        # versions of torch, zero. Open that row instead.
        hidden = hidden & ~hidden.all(dim=-1, keepdim=True)
        return hidden.repeat_interleave(self.heads, dim=0)  # image 0 head 0, image 0 head 1, …


class QueryLayer(nn.Module):
    """Masked cross-attention → self-attention → FFN, post-norm.

    In this order, since fresh queries hold nothing of the image yet that they could tell each other.
    """

    def __init__(self, cfg: MTCPConfig):
        super().__init__()
        C = cfg.width
        self.cross = nn.MultiheadAttention(C, cfg.attention_heads, batch_first=True)
        self.norm1 = nn.LayerNorm(C)
        self.self_attention = nn.MultiheadAttention(C, cfg.attention_heads, batch_first=True)
        self.norm2 = nn.LayerNorm(C)
        self.ffn = _ffn(C, cfg.query_ffn)
        self.norm3 = nn.LayerNorm(C)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.xavier_uniform_(p)  # as [Mask2Former] and DETR do

    def forward(self, q: Tensor, q_position: Tensor, memory: Tensor, m_position: Tensor, hidden: Tensor) -> Tensor:
        # Positions steer where to look (queries and keys), never what is read there (values).
        q = self.norm1(q + self._attend(self.cross, q + q_position, memory + m_position, memory, hidden))
        q = self.norm2(q + self._attend(self.self_attention, q + q_position, q + q_position, q))
        return self.norm3(q + self.ffn(q))

    @staticmethod
    def _attend(attention: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, hidden=None) -> Tensor:
        return attention(query, key, value, attn_mask=hidden, need_weights=False)[0]


# ======================================================================================================================
# Shared representation: R = P ⊙ Σ_n M_n                                              the ⊗ of the paper's Figure 2
# ======================================================================================================================


def shared_representation(P: Tensor, M: Tensor) -> Tensor:
    """P (B,C,h,w), M (B,N,h,w) → R (B,C,h,w): the embedding of each pixel, times all queries' summed logits for it.

    As every M_n is a dot product e_n · P, so is their sum: R = P ⊙ ((Σ_n e_n) · P). Single masks act inside the query
    decoder only, by steering its attention; and all e_n receive the same gradient, so that nothing in the task losses
    asks queries to differ. What they know of single objects has to come from a Mask2Former's weights.

    DEPARTURE: R is divided by its root mean square, one number per image. Σ_n M_n adds N logits: around 0 at
    initialisation, but far below 0 in a trained Mask2Former (which the paper starts from), where most masks say "not
    mine" of most pixels. Without the division the scale of everything downstream would depend on N and on where the
    weights came from. Not a LayerNorm over channels: that would divide out Σ_n M_n itself, pixel by pixel, and leave
    only its sign.
    """
    R = P * M.sum(dim=1, keepdim=True)
    rms = R.float().square().mean(dim=(1, 2, 3), keepdim=True).add(1e-12).sqrt()
    return R / rms.to(R.dtype)


# ======================================================================================================================
# Task decoder and feature pyramid: R → F_t → X_t             "hierarchical feature processing" and "pyramid fusion"
# ======================================================================================================================


class TaskDecoder(nn.Module):
    """R (B,C,h,w) → F_t = [F1 (B,C,h,w), F2 (B,2C,h/2,w/2), F3 (B,4C,h/4,w/4)], three [Swin] stages, LayerNorm'ed.

    From here on every task has its own copy of every module.
    """

    def __init__(self, cfg: MTCPConfig):
        super().__init__()
        widths = [cfg.width, 2 * cfg.width, 4 * cfg.width]
        self.stages = nn.ModuleList(
            pad_then_shift(SwinTransformerStage(
                dim=widths[max(i - 1, 0)], out_dim=widths[i], depth=depth, downsample=i > 0,
                num_heads=cfg.task_heads, window_size=cfg.window,
                # With these two flags the nominal resolution is not used: windows are padded and masked to the size
                # that arrives.
                input_resolution=(cfg.window, cfg.window), always_partition=True, dynamic_mask=True,
            ))
            for i, depth in enumerate(cfg.task_depths)
        )  # fmt: skip
        self.norms = nn.ModuleList(nn.LayerNorm(w) for w in widths)

    def forward(self, R: Tensor) -> list[Tensor]:
        x, maps = R.permute(0, 2, 3, 1), []  # timm's Swin works on (B,h,w,C)
        for stage, norm in zip(self.stages, self.norms, strict=True):
            x = stage(x)
            maps.append(norm(x).permute(0, 3, 1, 2))
        return maps


class FeaturePyramid(nn.Module):
    """F_t → X_t (B,C,h,w): what the task knows at all three scales, added up from coarse to fine [FPN]."""

    def __init__(self, C: int):
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(k * C, C, 1) for k in (1, 2, 4))
        self.smooth = nn.Conv2d(C, C, 3, padding=1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        F1, F2, F3 = (lateral(m) for lateral, m in zip(self.lateral, maps, strict=True))
        F2 = F2 + F.interpolate(F3, size=F2.shape[-2:], mode="nearest")
        F1 = F1 + F.interpolate(F2, size=F1.shape[-2:], mode="nearest")
        return self.smooth(F1)


# ======================================================================================================================
# Coherence fusion module (CFM): X_t and {X_u : u ≠ t} → X̂_t
# ======================================================================================================================


class CoherenceFusion(nn.Module):
    """Main task X_t (B,C,h,w) and its auxiliaries [X_u (B,C,h,w), …] → X̂_t (B,C,h,w).

        A   = ReLU(conv1×1 [X_u ⊙ σ(conv1×1 X_u)]_u)        what the other tasks say, each pixel gated
        Q,K = ReLU(BN(CBAM A)), each with its own weights   affinity between pixels, from the OTHER tasks
        V   = BN(CBAM X_t)                                  content, from the main task
        X̂_t = BN(CBAM(softmax(τ cos(Q, K)) V))              in the paper softmax(Q Kᵀ) V, see DEPARTURE

    Where the other tasks see two pixels as alike, the main task's features are shared between the two. The paper
    presents this as coherence: it pulls the representation of a task towards those of the others, so that the cosine
    distance between them becomes small. No loss asks for that; `cosine_distance` below measures whether it happens.

    The softmax runs over all h·w positions. At 480×640 the matrix Q Kᵀ would have 19,200² entries, 1.5 GB for one task
    and image in fp32, and again for its gradient; the fused kernels of scaled_dot_product_attention never form it. With
    `cfm_stride` s, keys and values are average-pooled by s × s, which divides the cost by s² (spatial reduction as in
    [PVT]).

    DEPARTURE: Q and K are normalised, with a learned temperature τ per head, clamped, as in [SwinV2]. The release uses
    raw dot products: nothing bounds those, in bf16 they lose their digits, and how sharp the attention is depends on C.
    SDPA's usual 1/√C alone is no cure: among thousands of positions it starts out nearly uniform, and all pixels of
    X̂_t hold about the same average.
    """

    def __init__(self, auxiliaries: int, cfg: MTCPConfig):
        super().__init__()
        C = cfg.width
        self.heads, self.stride = cfg.cfm_heads, cfg.cfm_stride
        self.gates = nn.ModuleList(nn.Conv2d(C, C, 1) for _ in range(auxiliaries))
        # DEPARTURE: fused to C channels, the release keeps (T-1)·C. Q Kᵀ costs less, and q, k, v of one size, at most
        # 256 a head, is what GPU flash-attention kernels ask for.
        self.fuse = nn.Sequential(nn.Conv2d(auxiliaries * C, C, 1), nn.ReLU())
        self.query = nn.Sequential(CBAM(C), nn.BatchNorm2d(C), nn.ReLU())
        self.key = nn.Sequential(CBAM(C), nn.BatchNorm2d(C), nn.ReLU())
        self.value = nn.Sequential(CBAM(C), nn.BatchNorm2d(C))
        self.log_tau = nn.Parameter(torch.full((self.heads, 1, 1), math.log(10.0)))  # [SwinV2]'s initial value
        self.out = nn.Sequential(CBAM(C), nn.BatchNorm2d(C))

    def forward(self, X_t: Tensor, auxiliaries: list[Tensor]) -> Tensor:
        A = [X_u * torch.sigmoid(gate(X_u)) for gate, X_u in zip(self.gates, auxiliaries, strict=True)]
        A = self.fuse(torch.cat(A, dim=1))  # (B,C,h,w)
        Q, K, V = self.query(A), self.pool(self.key(A)), self.pool(self.value(X_t))
        q, k, v = (self.split_heads(m) for m in (Q, K, V))  # (B,heads,positions,C/heads)
        tau = self.log_tau.clamp(max=math.log(100.0)).exp()
        x = F.scaled_dot_product_attention(tau * F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, scale=1.0)
        return self.out(x.transpose(2, 3).reshape_as(X_t))

    def pool(self, x: Tensor) -> Tensor:
        # ceil_mode keeps the last row and column of sizes that the stride does not divide.
        return F.avg_pool2d(x, self.stride, ceil_mode=True, count_include_pad=False) if self.stride > 1 else x

    def split_heads(self, x: Tensor) -> Tensor:
        """(B,C,h,w) → (B,heads,h·w,C/heads)"""
        # Contiguous: with another memory layout, SDPA may fall back to the kernel that does form the matrix.
        return x.flatten(2).unflatten(1, (self.heads, -1)).transpose(2, 3).contiguous()


def cosine_distance(X_t: Tensor, auxiliaries: list[Tensor]) -> Tensor:
    """Mean over pixels and auxiliaries of 1 - cos(X_t, X_u), channels as vectors; 0-d, in [0, 2]. A diagnostic of CFM.

    X_t and each auxiliary (one at least): (B,C,h,w). 0: the tasks' features point the same way at every pixel; 1: they
    are unrelated.
    """
    return torch.stack([1 - F.cosine_similarity(X_t.float(), X_u.float(), dim=1) for X_u in auxiliaries]).mean()


# ======================================================================================================================
# Trace-back: X̂_t back through F3, F2, F1 by spatial refinement modules (SRM)
# ======================================================================================================================


class SpatialRefinement(nn.Module):
    """SRM_i: carry (B,c,·,·) and F_i (B,f,h_i,w_i) → prediction feature (B,C,h_i,w_i) and the next carry (B,f,h_i,w_i).

    z = [resize(CBAM carry); CBAM F_i];  pred and carry' = ReLU(BN(conv1×1 z)), each with its own weights

    The last one, SRM_1, has nobody to carry to: it is built without that branch and returns None for it.
    """

    def __init__(self, carry_channels: int, stage_channels: int, C: int, last: bool):
        super().__init__()
        self.cbam_carry, self.cbam_stage = CBAM(carry_channels), CBAM(stage_channels)
        self.to_pred = conv_bn_relu(carry_channels + stage_channels, C)
        self.to_carry = None if last else conv_bn_relu(carry_channels + stage_channels, stage_channels)

    def forward(self, carry: Tensor, F_i: Tensor) -> tuple[Tensor, Tensor | None]:
        z = torch.cat([resize(self.cbam_carry(carry), F_i.shape[-2:]), self.cbam_stage(F_i)], dim=1)
        return self.to_pred(z), (self.to_carry(z) if self.to_carry is not None else None)


class TraceBack(nn.Module):
    """X̂_t (B,C,h,w) and F_t → features (B,C,·,·) of SRM_3, SRM_2, SRM_1, at 1/16, 1/8 and 1/4 of the image.

    X̂_t knows of the other tasks, but F1, F2, F3 were made before the tasks met. The trace-back returns to them in
    reverse, deepest first, so that each scale of the decoder is read again in the light of the fused feature.

    DEPARTURE: three modules for three stages; the release builds four and leaves one unused.
    """

    def __init__(self, C: int):
        super().__init__()
        self.srm3 = SpatialRefinement(C, 4 * C, C, last=False)
        self.srm2 = SpatialRefinement(4 * C, 2 * C, C, last=False)
        self.srm1 = SpatialRefinement(2 * C, C, C, last=True)

    def forward(self, X_hat: Tensor, maps: list[Tensor]) -> list[Tensor]:
        F1, F2, F3 = maps
        pred3, carry = self.srm3(X_hat, F3)
        pred2, carry = self.srm2(carry, F2)
        pred1, _ = self.srm1(carry, F1)
        return [pred3, pred2, pred1]


# ======================================================================================================================
# Heads
# ======================================================================================================================

OUTPUTS = {  # applied after upsampling: the average of two unit vectors is not one
    "logits": lambda y: y,
    "positive": F.softplus,  # depth in metres, > 0
    "unit": lambda y: F.normalize(y, dim=1, eps=1e-6),  # normals, length 1
}


class Head(nn.Module):
    """Feature (B,C,·,·) → prediction (B,channels,*size): conv1×1 → BN → ReLU → conv1×1, upsampled bilinearly."""

    def __init__(self, C: int, task: Task):
        super().__init__()
        self.layers = nn.Sequential(conv_bn_relu(C, C), nn.Conv2d(C, task.channels, 1))
        self.output = OUTPUTS[task.output]
        if task.output == "positive":
            # Start at softplus(2) = 2.1 m, an everyday depth: from 0.7 m, the first hundreds of steps would go into
            # little but this one number.
            nn.init.constant_(self.layers[-1].bias, 2.0)

    def forward(self, x: Tensor, size) -> Tensor:
        # In float32 from here on also under autocast: bf16 has steps of 6 cm at 8 m.
        return self.output(resize(self.layers(x).float(), size))


# ======================================================================================================================
# MT-CP
# ======================================================================================================================


class MTCP(nn.Module):
    """The whole network, for any number of tasks from one up. With one there is nothing to fuse: X̂_t = X_t."""

    def __init__(self, tasks: tuple[Task, ...], cfg: MTCPConfig = PRESETS["paper"]):
        super().__init__()
        if not tasks or len({t.name for t in tasks}) < len(tasks):
            raise ValueError(f"MTCP needs one or more tasks of different names, not {[t.name for t in tasks]}")
        self.tasks, self.cfg, C = tuple(tasks), cfg, cfg.width
        self.names = [t.name for t in tasks]

        def for_each_task(make):
            return nn.ModuleDict({t.name: make(t) for t in tasks})

        self.backbone = Backbone(cfg.backbone, cfg.drop_path, **cfg.backbone_args)
        self.pixel_decoder = PixelDecoder(self.backbone.channels, cfg)
        self.query_decoder = QueryDecoder(cfg)
        self.decoder = for_each_task(lambda t: TaskDecoder(cfg))
        self.pyramid = for_each_task(lambda t: FeaturePyramid(C))
        fuses = cfg.cfm and len(tasks) > 1
        self.cfm = for_each_task(lambda t: CoherenceFusion(len(tasks) - 1, cfg)) if fuses else None
        self.trace_back = for_each_task(lambda t: TraceBack(C)) if cfg.trace_back else None
        # In the order in which the features are made: X̂_t, and, with trace-back, SRM_3, SRM_2, SRM_1.
        n_outputs = 4 if cfg.trace_back else 1
        self.heads = for_each_task(lambda t: nn.ModuleList(Head(C, t) for _ in range(n_outputs)))

    def forward(self, x: Tensor) -> dict[str, dict]:
        """ImageNet-normalised RGB x (B,3,H,W), any H and W → for every task name t a dict of

        final         (B,channels,H,W), the prediction: class logits, depth in metres (> 0), unit normals or, for
                      saliency, a logit
        initial       the same from X̂_t, before the trace-back; None without trace-back, where it would be `final`
        intermediate  the same from SRM_3 and SRM_2, coarse to fine; [] without trace-back
        """
        padded = pad_to_multiple(x, 32)
        P, M = self.shared(padded)  # (B,C,h,w), (B,N,h,w)
        R = shared_representation(P, M)  # (B,C,h,w)
        maps = {t: self.decoder[t](R) for t in self.names}  # F_t = [F1, F2, F3]
        X = {t: self.pyramid[t](maps[t]) for t in self.names}  # (B,C,h,w)
        X_hat = self.fuse(X)  # (B,C,h,w)

        outputs = {}
        for t in self.names:
            features = [X_hat[t]]
            if self.trace_back is not None:
                features += self.trace_back[t](X_hat[t], maps[t])
            y = [head(f, padded.shape[-2:]) for head, f in zip(self.heads[t], features, strict=True)]
            y = [p[..., : x.shape[-2], : x.shape[-1]] for p in y]  # cut the padding off again
            outputs[t] = {"initial": y[0] if len(y) > 1 else None, "intermediate": y[1:-1], "final": y[-1]}
        return outputs

    def shared(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B,3,H,W), H and W multiples of 32 → P (B,C,h,w), M (B,N,h,w): the part that is a Mask2Former."""
        P, coarse = self.pixel_decoder(self.backbone(x))
        return P, self.query_decoder(P, coarse)

    def fuse(self, X: dict[str, Tensor]) -> dict[str, Tensor]:
        """{t: X_t} → {t: X̂_t}, both (B,C,h,w). Auxiliaries come sorted by name: the order of `tasks` plays no part."""
        if self.cfm is None:
            return X
        return {t: self.cfm[t](X[t], [X[u] for u in sorted(X) if u != t]) for t in X}


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Zeros (the ImageNet mean, after normalisation) to the right and below, until H and W are multiples.

    The padding is seen like any other flat region: nothing masks it in attention and pooling.
    """
    return F.pad(x, (0, -x.shape[-1] % multiple, 0, -x.shape[-2] % multiple))


# ======================================================================================================================
# Losses: every one is an average over valid pixels, and exactly 0 with a zero gradient where there is none
# ======================================================================================================================


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """logits (B,K,H,W), target int64 (B,H,W) in 0…K-1 or IGNORE_INDEX → 0-d, in nats."""
    rows = logits.float().permute(0, 2, 3, 1).flatten(0, 2)  # one pixel a row: three times as fast on a CPU
    # reduction="mean" would divide by zero when all pixels are ignored: NaN, and the run is lost.
    total = F.cross_entropy(rows, target.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    return total / (target != IGNORE_INDEX).sum().clamp(min=1)


def l1_depth(depth: Tensor, target: Tensor) -> Tensor:
    """depth, target (B,1,H,W) in metres, target 0 = invalid → 0-d, in metres."""
    return _masked_l1(depth, target, target > 0)


def l1_normals(normals: Tensor, target: Tensor) -> Tensor:
    """unit normals, target (B,3,H,W), target all-zero = invalid → 0-d, mean over pixels and components.

    Anything shorter than ½ counts as zero: a label that has been through interpolation has in-betweens.
    """
    return _masked_l1(normals, target, (target.square().sum(dim=1, keepdim=True) > 0.25).expand_as(target))


def _masked_l1(y: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    return ((y.float() - target).abs() * valid).sum() / valid.sum().clamp(min=1)


def balanced_bce(logits: Tensor, target: Tensor) -> Tensor:
    """logits, target float (B,1,H,W), target 0, 1 or IGNORE_INDEX → 0-d. Class-balanced, Xie and Tu, ICCV 2015.

    Positives weigh as much as negatives in total: each is weighted by the share of the other. A batch that has only one
    of the two therefore gives exactly 0.
    """
    valid = target != IGNORE_INDEX
    target = target * valid
    positive_share = target.sum() / valid.sum().clamp(min=1)
    weight = torch.where(target > 0.5, 1 - positive_share, positive_share) * valid
    return F.binary_cross_entropy_with_logits(logits.float(), target, weight, reduction="sum") / valid.sum().clamp(
        min=1
    )


LOSSES = {"cross_entropy": cross_entropy, "l1_depth": l1_depth, "l1_normals": l1_normals, "balanced_bce": balanced_bce}


def task_losses(tasks: tuple[Task, ...], outputs: dict[str, dict], batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """MTCP's outputs and a batch of labels → {task name: L_t}, 0-d each,

        L_t = loss(ŷ_final) + ½ Σ loss(each ŷ_intermediate) + ½ loss(ŷ_initial).

    A batch without labels for a task holds an all-invalid label, never a missing key.

    DEPARTURE: the release never decodes ŷ_initial, trains the intermediate normals with the depth loss and, for human
    parts, counts only the last of the two intermediate terms. Here one rule holds for all tasks.
    """
    losses = {}
    for task in tasks:
        loss, y, target = LOSSES[task.loss], outputs[task.name], batch[task.name]
        early = [*y["intermediate"], *([y["initial"]] if y["initial"] is not None else [])]
        losses[task.name] = loss(y["final"], target) + 0.5 * sum(loss(p, target) for p in early)
    return losses


# ======================================================================================================================
# Loss prioritisation scheme (LPS): {L_t} → one number, and the usual balancers beside it
#
# All have one shape: balancer(losses) → total to minimise, called on training batches only; balancer.end_epoch() after
# every epoch; balancer.weights, (T,) in the order of the tasks, for the log. What they remember is in their state_dict:
# a run resumed from the end of an epoch goes on exactly. In a distributed run every rank has its own copy, calls
# end_epoch, and finds the same weights.
# ======================================================================================================================


class EpochMean(nn.Module):
    """Running mean of T values over an epoch, over all ranks of a distributed run.

    A value of exactly 0 is a batch that says nothing about that task (see Losses) and is not counted.
    """

    def __init__(self, n: int):
        super().__init__()
        self.register_buffer("sum", torch.zeros(n))
        self.register_buffer("count", torch.zeros(n))

    def add(self, values: Tensor) -> None:
        self.sum += values
        self.count += values > 0

    def pop(self) -> Tensor:
        """(n,) means, NaN for a task that had no valid pixel in the whole epoch; starts anew."""
        both = torch.stack([self.sum, self.count])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(both)  # before any weight is computed: all ranks then hold the same weights
        self.sum.zero_(), self.count.zero_()
        return both[0] / both[1]


class LPS(nn.Module):
    """The paper's loss prioritisation scheme. Total = Σ_t w_t · ℓ_t with ℓ_t = log(1 + L_t).

    *One scale.* Metres and nats differ in size. The logarithm divides the gradient of a large loss by its size,
    dℓ = dL / (1 + L), so that it does not drown the others; of a small one, L ≪ 1, it changes little.

    *Prioritisation.* From the epoch means ℓ_t(e), and ℓ(e) = Σ_t ℓ_t(e):
        during epoch 0      w_t = 1
        after epoch 0       w_t = ℓ(0) / ℓ_t(0)
        after epoch e ≥ 1   r_t = [ℓ_t(e) / ℓ_t(e-1)] / [ℓ(e) / ℓ(e-1)]       > 1: fell behind the others
                            w_t = r̄ + κ (r_t - r̄)                             spread by κ about the mean r̄
    then the guards of `floor_and_rescale`. (They make the weights sum to T, so the factors that all tasks share cancel:
    the first rule is w_t ∝ 1 / ℓ_t(0), and r_t may as well be each task's own ratio.)

    Once losses settle, every r_t is 1 and so is every weight: priorities shape the way, the logarithm the end. And they
    are a feedback loop: with a κ too large for how much one epoch changes, they swing for ever, noise or none.

    DEPARTURE: the release computes such weights, then overwrites the weighted sum by the plain one, with the logarithm
    commented out. It has no guards either: at κ = 7.5 a task whose r_t is 13.4 % below the mean gets a negative
    weight, and training would maximise its loss.

    kappa: 7.5 on NYUD-v2, 1.6 on PASCAL-Context in the release. w_min: floor of the weights, 0 < w_min < 1.
    log, prioritise: the two halves, each of which can be switched off alone.
    """

    def __init__(self, names: list[str], kappa: float, w_min: float = 0.1, log: bool = True, prioritise: bool = True):
        super().__init__()
        if not 0 < w_min < 1:
            raise ValueError(
                f"w_min is {w_min}: a floor that keeps weights positive and lets them sum to T is in (0, 1)"
            )
        self.names, self.kappa, self.w_min, self.log, self.prioritise = names, kappa, w_min, log, prioritise
        self.mean = EpochMean(len(names))
        self.register_buffer("weights", torch.ones(len(names)))
        self.register_buffer(
            "previous", torch.full((len(names),), math.nan)
        )  # ℓ_t when last seen, mostly e-1; NaN: never

    def forward(self, losses: dict[str, Tensor]) -> Tensor:
        """{name: L_t} → Σ_t w_t ℓ_t, 0-d."""
        L = torch.stack([losses[t] for t in self.names])
        ell = torch.log1p(L) if self.log else L
        self.mean.add(ell.detach())
        return (self.weights * ell).sum()

    def end_epoch(self) -> None:
        ell = self.mean.pop()
        if self.prioritise:
            self.weights.copy_(self.next_weights(ell))
        self.previous.copy_(torch.where(ell.isnan(), self.previous, ell))

    def next_weights(self, ell: Tensor) -> Tensor:
        """Epoch means ℓ_t(e) (T,) → weights (T,) for the next epoch. A task that cannot be compared gets weight 1."""
        first = bool(self.previous.isnan().all())
        known = ~ell.isnan() if first else ~(ell.isnan() | self.previous.isnan())
        if not known.any():
            return torch.ones_like(ell)
        now, before = ell[known], self.previous[known]
        if first:
            raw = now.sum() / now
        else:
            r = (now / before) / (now.sum() / before.sum())
            raw = r.mean() + self.kappa * (r - r.mean())
        weights = torch.ones_like(ell)
        weights[known] = floor_and_rescale(raw, self.w_min)
        return weights


def floor_and_rescale(w: Tensor, w_min: float) -> Tensor:
    """(T,) with a positive mean → (T,) with sum T and no entry below w_min. A plain rescaling where none was below.

    Clamping first and rescaling afterwards would push the clamped ones below the floor again. So what lies above the
    floor is what gets rescaled.
    """
    w = w / w.mean()  # sum T
    above = (w - w_min).clamp(min=0)
    return w_min + above * (len(w) * (1 - w_min) / above.sum())


class EqualWeights(nn.Module):
    """Total = Σ_t L_t. What the release does in effect."""

    def __init__(self, names: list[str]):
        super().__init__()
        self.names = names
        self.register_buffer("weights", torch.ones(len(names)))

    def forward(self, losses: dict[str, Tensor]) -> Tensor:
        return sum(losses[t] for t in self.names)

    def end_epoch(self) -> None:
        """Equal weights stay equal."""


class UncertaintyWeights(nn.Module):
    """[Kendall]: total = Σ_t exp(-s_t) L_t + s_t / 2, where s_t = log σ_t² is learned with the network.

    s is a parameter: give it to the optimiser, without weight decay, and in a distributed run average its gradient. The
    paper's factor ½ for regression is absorbed by σ_t. A task without a valid pixel in a batch is left out of the sum:
    + s_t / 2 alone would drive its σ_t to zero.
    """

    def __init__(self, names: list[str]):
        super().__init__()
        self.names = names
        self.log_variance = nn.Parameter(torch.zeros(len(names)))

    @property
    def weights(self) -> Tensor:
        return torch.exp(-self.log_variance.detach())

    def forward(self, losses: dict[str, Tensor]) -> Tensor:
        L = torch.stack([losses[t] for t in self.names])
        return (torch.exp(-self.log_variance) * L + (L > 0) * self.log_variance / 2).sum()

    def end_epoch(self) -> None:
        """Nothing to do: the weights are learned at every step."""


class DynamicWeightAverage(nn.Module):
    """[DWA]: total = Σ_t w_t L_t with w = T · softmax(r / 2), r_t = L_t(e-1) / L_t(e-2): slow tasks gain.

    L_t(e) is the mean over epoch e. For the first two epochs there is no ratio, and w_t = 1.
    """

    def __init__(self, names: list[str], temperature: float = 2.0):
        super().__init__()
        self.names, self.temperature = names, temperature
        self.mean = EpochMean(len(names))
        self.register_buffer("weights", torch.ones(len(names)))
        self.register_buffer("previous", torch.full((len(names),), math.nan))

    def forward(self, losses: dict[str, Tensor]) -> Tensor:
        L = torch.stack([losses[t] for t in self.names])
        self.mean.add(L.detach())
        return (self.weights * L).sum()

    def end_epoch(self) -> None:
        L = self.mean.pop()
        r = torch.nan_to_num(L / self.previous, nan=1.0)  # a task that cannot be compared counts as standing still
        if not self.previous.isnan().all():
            self.weights.copy_(len(r) * torch.softmax(r / self.temperature, dim=0))
        self.previous.copy_(torch.where(L.isnan(), self.previous, L))


# ======================================================================================================================
# Appendix: helpers taken from the works cited
# ======================================================================================================================


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention [DefDETR, equation 3] in plain PyTorch.

    Each query looks at `points` places on each level instead of at every pixel. Where those lie, and how much each
    counts, are linear functions of the query: there are no keys.
    """

    def __init__(self, C: int, heads: int, levels: int, points: int):
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.offsets = nn.Linear(C, heads * levels * points * 2)
        self.weights = nn.Linear(C, heads * levels * points)
        self.value = nn.Linear(C, C)
        self.out = nn.Linear(C, C)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Head k starts by looking in direction 2πk/heads, its points 1, 2, 3, … pixels away, all equally weighted."""
        angle = torch.arange(self.heads) * (2 * math.pi / self.heads)
        direction = torch.stack([angle.cos(), angle.sin()], dim=-1)  # (heads,2)
        direction = direction / direction.abs().amax(dim=-1, keepdim=True)  # onto the square of half-width 1
        distance = torch.arange(1, self.points + 1)
        bias = direction[:, None, None, :] * distance[None, None, :, None]  # (heads,1,points,2)
        with torch.no_grad():
            self.offsets.bias.copy_(bias.expand(-1, self.levels, -1, -1).flatten())
        for zero in (self.offsets.weight, self.weights.weight, self.weights.bias, self.value.bias, self.out.bias):
            nn.init.zeros_(zero)
        nn.init.xavier_uniform_(self.value.weight)
        nn.init.xavier_uniform_(self.out.weight)

    def forward(self, query: Tensor, reference: Tensor, x: Tensor, sizes: list) -> Tensor:
        """query (B,L,C) at places reference (L,2) in 0…1 as (x, y); x (B,S,C), the levels of `sizes` flattened and
        joined → (B,L,C)."""
        B, L, _ = query.shape
        value = self.value(x).unflatten(-1, (self.heads, -1))  # (B,S,heads,C/heads)
        offset = self.offsets(query).view(B, L, self.heads, self.levels, self.points, 2)
        weight = self.weights(query).view(B, L, self.heads, self.levels * self.points).softmax(dim=-1)
        # Offsets are in pixels of the level they point into; 0…1 spans its width and its height.
        extent = torch.tensor([[w, h] for h, w in sizes], device=query.device, dtype=query.dtype)  # (levels,2)
        places = reference[None, :, None, None, None] + offset / extent[:, None]  # (B,L,heads,levels,points,2)
        return self.out(deformable_sampling(value, sizes, places, weight.unflatten(-1, (self.levels, self.points))))


def deformable_sampling(value: Tensor, sizes: list, places: Tensor, weight: Tensor) -> Tensor:
    """Σ over levels l and points p of weight_lp · value_l(place_lp), bilinear, zero outside.

    value (B,S,heads,d), S = Σ h·w over `sizes`; places (B,L,heads,levels,points,2) in 0…1 as (x, y);
    weight (B,L,heads,levels,points) → (B,L,heads·d)
    """
    B, L, heads, _, points, _ = places.shape
    grids = 2 * places - 1  # grid_sample counts from -1 (left edge of the first pixel) to 1
    sampled = []
    for level, v in enumerate(value.split([h * w for h, w in sizes], dim=1)):
        v = v.permute(0, 2, 3, 1).flatten(0, 1).unflatten(2, sizes[level])  # (B·heads,d,h,w)
        grid = grids[:, :, :, level].transpose(1, 2).flatten(0, 1)  # (B·heads,L,points,2)
        # In float32 also under autocast: eight bits would move the places by a tenth of a pixel.
        sampled.append(F.grid_sample(v.float(), grid.float(), align_corners=False))  # (B·heads,d,L,points)
    weight = weight.transpose(1, 2).reshape(B * heads, 1, L, -1)  # (B·heads,1,L,levels·points)
    out = (torch.cat(sampled, dim=-1) * weight).sum(dim=-1)  # (B·heads,d,L)
    return out.reshape(B, -1, L).transpose(1, 2)


def sine_embedding(x: Tensor) -> Tensor:
    """x (B,C,h,w) → (1,C,h,w): sines and cosines of y in the first C/2 channels, of x in the others.

    Positions run from 1/h to 1 and are scaled by 2π, so that the code does not depend on the resolution (DETR, Carion
    et al., ECCV 2020).
    """
    _, C, h, w = x.shape
    frequency = 10000.0 ** -(torch.arange(0, C // 2, 2, device=x.device) / (C // 2))  # (C/4,)

    def code(n: int) -> Tensor:  # (n,C/2)
        angle = torch.arange(1, n + 1, device=x.device)[:, None] / (n + 1e-6) * (2 * math.pi) * frequency
        return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)  # sin, cos, sin, cos, …

    y_code, x_code = code(h)[:, None].expand(-1, w, -1), code(w)[None].expand(h, -1, -1)
    return torch.cat([y_code, x_code], dim=-1).permute(2, 0, 1)[None].to(x.dtype)


def pixel_centres(sizes: list, like: Tensor) -> Tensor:
    """Centres of all pixels of all levels, (Σ h·w,2) in 0…1 as (x, y)."""
    centres = []
    for h, w in sizes:
        y, x = ((torch.arange(n, device=like.device) + 0.5) / n for n in (h, w))
        centres.append(torch.stack([x.expand(h, w), y[:, None].expand(h, w)], dim=-1).flatten(0, 1))
    return torch.cat(centres)


def to_sequence(maps: list[Tensor]) -> Tensor:
    """[(B,C,h_l,w_l), …] → (B,Σ h_l·w_l,C)"""
    return torch.cat([m.flatten(2) for m in maps], dim=2).transpose(1, 2)


# ======================================================================================================================
# Published weights: a whole Mask2Former, or a backbone
#
# Nothing is loaded "as far as it fits": every tensor of that part of the network is filled, every tensor of the file is
# used or known to be of no use, and anything else is a WeightsError that names it. A network of which a half was
# silently left out trains without a complaint, to figures that are far too low.
# ======================================================================================================================

# Our names (left) and those of Hugging Face's Mask2FormerForUniversalSegmentation (right). * stands for a number, the
# same on both sides; whatever follows the name, such as .weight or .0.bias, is the same too. {a,b,c}: three tensors,
# stacked into one. (Patches are merged at the end of a stage there, and at the start of the next one in timm: hence
# layers_1 and layers.0.) ENC, PIX and QRY are short for:
ENC, PIX, QRY = "model.pixel_level_module.encoder", "model.pixel_level_module.decoder", "model.transformer_module"
MASK2FORMER = """
backbone.net.patch_embed.proj                      ENC.embeddings.patch_embeddings.projection
backbone.net.patch_embed.norm                      ENC.embeddings.norm
backbone.net.layers_*.blocks.*.norm1               ENC.encoder.layers.*.blocks.*.layernorm_before
backbone.net.layers_*.blocks.*.attn.qkv            ENC.encoder.layers.*.blocks.*.attention.self.{query,key,value}
backbone.net.layers_*.blocks.*.attn.proj           ENC.encoder.layers.*.blocks.*.attention.output.dense
backbone.net.layers_*.blocks.*.norm2               ENC.encoder.layers.*.blocks.*.layernorm_after
backbone.net.layers_*.blocks.*.mlp.fc1             ENC.encoder.layers.*.blocks.*.intermediate.dense
backbone.net.layers_*.blocks.*.mlp.fc2             ENC.encoder.layers.*.blocks.*.output.dense
backbone.net.layers_*.blocks.*.attn.relative_position_bias_table \
                                        ENC.encoder.layers.*.blocks.*.attention.self.relative_position_bias_table
backbone.net.layers_1.downsample.norm              ENC.encoder.layers.0.downsample.norm
backbone.net.layers_1.downsample.reduction         ENC.encoder.layers.0.downsample.reduction
backbone.net.layers_2.downsample.norm              ENC.encoder.layers.1.downsample.norm
backbone.net.layers_2.downsample.reduction         ENC.encoder.layers.1.downsample.reduction
backbone.net.layers_3.downsample.norm              ENC.encoder.layers.2.downsample.norm
backbone.net.layers_3.downsample.reduction         ENC.encoder.layers.2.downsample.reduction
backbone.norms.0                                   ENC.hidden_states_norms.stage1
backbone.norms.1                                   ENC.hidden_states_norms.stage2
backbone.norms.2                                   ENC.hidden_states_norms.stage3
backbone.norms.3                                   ENC.hidden_states_norms.stage4
pixel_decoder.project.*                            PIX.input_projections.*
pixel_decoder.level_embed                          PIX.level_embed
pixel_decoder.layers.*.attention.offsets           PIX.encoder.layers.*.self_attn.sampling_offsets
pixel_decoder.layers.*.attention.weights           PIX.encoder.layers.*.self_attn.attention_weights
pixel_decoder.layers.*.attention.value             PIX.encoder.layers.*.self_attn.value_proj
pixel_decoder.layers.*.attention.out               PIX.encoder.layers.*.self_attn.output_proj
pixel_decoder.layers.*.norm1                       PIX.encoder.layers.*.self_attn_layer_norm
pixel_decoder.layers.*.ffn.0                       PIX.encoder.layers.*.fc1
pixel_decoder.layers.*.ffn.2                       PIX.encoder.layers.*.fc2
pixel_decoder.layers.*.norm2                       PIX.encoder.layers.*.final_layer_norm
pixel_decoder.lateral                              PIX.adapter_1
pixel_decoder.smooth                               PIX.layer_1
pixel_decoder.to_P                                 PIX.mask_projection
query_decoder.query_features                       QRY.queries_features
query_decoder.query_position                       QRY.queries_embedder
query_decoder.level_embed                          QRY.level_embed
query_decoder.layers.*.cross                       QRY.decoder.layers.*.cross_attn
query_decoder.layers.*.norm1                       QRY.decoder.layers.*.cross_attn_layer_norm
query_decoder.layers.*.self_attention.in_proj_weight    QRY.decoder.layers.*.self_attn.{q_proj,k_proj,v_proj}.weight
query_decoder.layers.*.self_attention.in_proj_bias      QRY.decoder.layers.*.self_attn.{q_proj,k_proj,v_proj}.bias
query_decoder.layers.*.self_attention.out_proj     QRY.decoder.layers.*.self_attn.out_proj
query_decoder.layers.*.norm2                       QRY.decoder.layers.*.self_attn_layer_norm
query_decoder.layers.*.ffn.0                       QRY.decoder.layers.*.fc1
query_decoder.layers.*.ffn.2                       QRY.decoder.layers.*.fc2
query_decoder.layers.*.norm3                       QRY.decoder.layers.*.final_layer_norm
query_decoder.norm                                 QRY.decoder.layernorm
query_decoder.mask_embed.0                         QRY.decoder.mask_predictor.mask_embedder.0.0
query_decoder.mask_embed.2                         QRY.decoder.mask_predictor.mask_embedder.1.0
query_decoder.mask_embed.4                         QRY.decoder.mask_predictor.mask_embedder.2.0
"""
# What such a file has and MT-CP has no use for: the class head, the loss, a constant that Swin computes for itself, and
# a last norm that newer versions save although nothing reads its output.
MASK2FORMER_LEFTOVERS = (
    r"class_predictor\.(weight|bias)|criterion\.empty_weight"
    r"|.+\.relative_position_index|model\.pixel_level_module\.encoder\.swin\.layernorm\.(weight|bias)"
)
# Swins as timm names them, by embedding width, depths and window.
SWINS = {
    (96, (2, 2, 6, 2), 7): "swin_tiny_patch4_window7_224",
    (96, (2, 2, 18, 2), 7): "swin_small_patch4_window7_224",
    (128, (2, 2, 18, 2), 7): "swin_base_patch4_window7_224",
    (128, (2, 2, 18, 2), 12): "swin_base_patch4_window12_384",
    (192, (2, 2, 18, 2), 7): "swin_large_patch4_window7_224",
    (192, (2, 2, 18, 2), 12): "swin_large_patch4_window12_384",
}


class WeightsError(ValueError):
    """A file of weights that cannot be read or does not fit; the message says which, why, and what to do."""


def load_mask2former(model: MTCP, path: str | Path) -> dict:
    """Fills backbone, pixel decoder and query decoder from a Hugging Face Mask2Former with a Swin backbone.

    path: as for `read_weights`. Returns a record of what was loaded. Raises WeightsError, before any tensor is changed,
    if the file does not fit this network exactly.
    """
    path, (given, files) = Path(path), read_weights(Path(path))
    if not any(name.startswith((ENC, PIX, QRY)) for name in given):
        raise WeightsError(f"{path} holds no Mask2Former of Hugging Face's transformers, but {_listed(list(given), 3)}")
    parts = ("backbone", "pixel_decoder", "query_decoder")
    own = {name: t for name, t in model.state_dict().items() if name.split(".")[0] in parts}
    sources = {name: mask2former_names(name) for name in own}
    if not all(sources.values()):
        raise WeightsError(f"a Mask2Former fills a network with a Swin backbone, and {model.cfg.backbone} is none")
    views = _views(own, sources)
    known = {name for name in given if re.fullmatch(MASK2FORMER_LEFTOVERS, name)}
    problems = _differences(views, given, known)
    if problems:
        holds, wants = mask2former_sizes(given), mask2former_sizes(views)
        differ = [f"{k} {holds[k]} (network: {wants[k]})" for k in holds if holds[k] != wants[k]]
        if differ:  # then most names and shapes differ too, and say nothing more
            problems = [f"sizes: {', '.join(differ)}; {_fitting_flags(holds)}", *_differences(views, given, known, 2)]
        raise WeightsError("\n  ".join([f"{path} does not fill this network.", *problems]))
    return _copy(views, given, {"from": str(path), "sha256": files, "into": ", ".join(parts)})


def load_backbone(backbone: Backbone, path: str | Path) -> dict:
    """Fills the backbone, all but our norms and pyramid, from a checkpoint of timm's or an original one timm can read.

    path: as for `read_weights`. Returns a record of what was loaded. Raises WeightsError, before any tensor is changed,
    if the file is not one of this very backbone.
    """
    path, (given, files) = Path(path), read_weights(Path(path))
    # The classifier such a file is saved from, built without memory for its tensors. Its names are the file's, and what
    # it has beyond our net, a head and the norm before it, is what may be left over.
    with torch.device("meta"):
        classifier = timm.create_model(backbone.name, **backbone.timm_args)
    rename = getattr(sys.modules[type(classifier).__module__], "checkpoint_filter_fn", lambda tensors, model: tensors)
    try:
        renamed = rename(dict(given), classifier)  # original names → timm's
    except (KeyError, AttributeError, RuntimeError, ValueError) as error:
        raise WeightsError(f"{path} is no checkpoint of {backbone.name} that timm can read ({error})") from error
    names = {_comparable(name): name for name in classifier.state_dict()}
    own = backbone.net.state_dict()
    views = _views(own, {name: (names[_comparable(name)],) for name in own})
    problems = _differences(views, renamed, set(names.values()))
    # timm stretches these to fit another window or image size, without a word: the file is another variant's.
    stretched = [k for k in given if k.endswith(("relative_position_bias_table", "pos_embed"))
                 and k in renamed and given[k].shape != renamed[k].shape]  # fmt: skip
    if stretched:
        problems.append(f"for another window or image size: {_listed(stretched)}")
    if problems:
        raise WeightsError("\n  ".join([f"{path} does not fill the backbone {backbone.name}.", *problems]))
    return _copy(views, renamed, {"from": str(path), "sha256": files, "into": "backbone"})


@cache
def mask2former_names(name: str) -> tuple[str, ...]:
    """One of our names → the tensor of a Mask2Former, or the three, that it is made of; () if there is none."""
    for row in MASK2FORMER.strip().splitlines():
        ours, theirs = row.split()
        match = re.fullmatch(re.escape(ours).replace(r"\*", r"(\d+)") + r"(|\..+)", name)
        if match:
            *numbers, rest = match.groups()
            for number in numbers:
                theirs = theirs.replace("*", number, 1)
            theirs = {"ENC": ENC, "PIX": PIX, "QRY": QRY}[theirs[:3]] + theirs[3:] + rest
            before, *choices = re.split("[{,}]", theirs)
            return tuple(before + choice + choices[-1] for choice in choices[:-1]) or (theirs,)
    return ()


def mask2former_sizes(tensors: dict[str, Tensor]) -> dict:
    """The sizes of a Mask2Former as its tensors show them; None or 0 where the one that would show it is absent."""

    def size(name: str, axis: int = 0) -> int | None:
        return tensors[name].shape[axis] if name in tensors else None

    def count(prefix: str) -> int:
        return len({m[1] for name in tensors if (m := re.match(re.escape(prefix) + r"\.(\d+)\.", name))})

    tables = [f"{ENC}.encoder.layers.{i}.blocks.0.attention.self.relative_position_bias_table" for i in range(4)]
    return {
        "embed_dim": size(f"{ENC}.embeddings.norm.weight"),
        "depths": tuple(count(f"{ENC}.encoder.layers.{i}.blocks") for i in range(4)),
        "num_heads": tuple(size(table, axis=1) for table in tables),
        "window_size": (math.isqrt(size(tables[0]) or 0) + 1) // 2,  # a table has (2·window - 1)² rows
        "width": size(f"{PIX}.mask_projection.weight"),
        "pixel_layers": count(f"{PIX}.encoder.layers"),
        "pixel_ffn": size(f"{PIX}.encoder.layers.0.fc1.weight"),
        "queries": size(f"{QRY}.queries_features.weight"),
        "query_layers": count(f"{QRY}.decoder.layers"),
        "query_ffn": size(f"{QRY}.decoder.layers.0.fc1.weight"),
    }


def _fitting_flags(sizes: dict) -> str:
    """What to type for a Mask2Former of these sizes."""
    swin = SWINS.get((sizes["embed_dim"], sizes["depths"], sizes["window_size"]))
    for preset, cfg in PRESETS.items():
        decoders = ("width", "pixel_layers", "pixel_ffn", "query_layers", "query_ffn")
        if swin and all(sizes[k] == getattr(cfg, k) for k in decoders):
            queries = "" if sizes["queries"] == cfg.queries else f" --queries {sizes['queries']}"
            return f"it fits --preset {preset} --backbone {swin}{queries}"
    return "no preset fits, but a network built with an MTCPConfig of these sizes would"


def _comparable(name: str) -> str:
    """timm names a tensor layers.0.x in a classifier, but layers_0.x or model.layers.0.x in a features_only net."""
    return name.removeprefix("model.").replace("_", ".")


def _views(own: dict[str, Tensor], sources: dict[str, tuple[str, ...]]) -> dict[str, Tensor]:
    """Our tensors and the names each is stacked from → {their name: its place in our tensor, as a view}."""
    parts = {name: zip(sources[name], t.chunk(len(sources[name])), strict=True) for name, t in own.items()}
    return {source: view for pairs in parts.values() for source, view in pairs}


def _differences(views: dict[str, Tensor], given: dict[str, Tensor], known: set[str], most: int = 8) -> list[str]:
    """Why `given` does not fill `views` exactly: a line for each kind of reason, with the first names it holds for.

    Only tensors in `known` may be left over.
    """
    misfits = [
        f"{name} {tuple(given[name].shape)} (network: {tuple(view.shape)})"
        for name, view in views.items()
        if name in given and given[name].shape != view.shape
    ]
    reasons = {
        "missing in the file": [name for name in views if name not in given],
        "in the file, but not in the network": [name for name in given if name not in views and name not in known],
        "of another shape": misfits,
    }
    return [f"{reason}: {_listed(names, most)}" for reason, names in reasons.items() if names]


def _listed(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


@torch.no_grad()
def _copy(views: dict[str, Tensor], given: dict[str, Tensor], record: dict) -> dict:
    """Fills the views. Returns the record, and with it how many tensors were used and which were not."""
    for name, view in views.items():
        view.copy_(given[name])
    return {**record, "tensors": len(views), "not used": sorted(set(given) - set(views))}


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A checkpoint → its tensors by name, on the CPU, and the sha256 of each of its files.

    path: a .safetensors file; a file of torch.save, read with weights_only=True, so that it cannot run code; the index
    (.index.json) of a checkpoint in several files; or a folder that holds one of these under its usual name. Raises
    WeightsError.
    """
    if path.is_dir():
        usual = [
            path / (name + end) for name in ("model.safetensors", "pytorch_model.bin") for end in ("", ".index.json")
        ]
        path = next((p for p in usual if p.is_file()), path / usual[0].name)
    try:
        files = _shards(path) if path.suffix == ".json" else [path]
        tensors = {name: t for file in files for name, t in _read_file(file).items()}
        return tensors, {file.name: _sha256(file) for file in files}
    except FileNotFoundError as error:
        raise WeightsError(f"weights {error.filename or error} not found") from error


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise WeightsError(f"{index} is no index of a checkpoint: {error!r}") from error
    if any(Path(name).name != name for name in names):
        raise WeightsError(f"{index} names files outside its own folder: {_listed(names)}")
    return [index.parent / name for name in names]


def _read_file(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        content = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise WeightsError(f"{file} cannot be read; was it downloaded to the end? ({error})") from error
    for key in ("model", "state_dict"):  # the wrappings in use
        content = content.get(key, content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not all(isinstance(t, Tensor) for t in content.values()):
        raise WeightsError(f"{file} holds something else than tensors by name")
    return content


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as f:
        while chunk := f.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest()
