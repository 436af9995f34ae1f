"""Tests, in the order of mtcp.py, then data.py, then train.py: `pytest`.

Every fact is checked against something that does not share the code: a naive loop, a case worked
out by hand, a closed form, or an invariance. Nothing is compared with numbers that the code itself
once printed.
"""

import ast
import io
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.layers.cbam import CbamModule

import data
import mtcp
import train
from mtcp import IGNORE_INDEX, LPS, MTCP, NYUD_TASKS, PASCAL_TASKS, PRESETS

HERE = Path(__file__).parent
TOY = PRESETS["toy"]


def close(a, b, tolerance=1e-5):
    a = torch.as_tensor(a, dtype=torch.float64)
    b = torch.as_tensor(b, dtype=torch.float64)
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def refused(match: str, call, *args, **kwargs) -> None:
    with pytest.raises((data.DataError, mtcp.WeightsError), match=match):
        call(*args, **kwargs)


def randomise_batchnorm(model: nn.Module) -> None:
    """Running statistics as after training: 0 and 1 would hide a wrong use of them in eval mode."""
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.3)
            m.running_var.uniform_(0.5, 1.5)


# ==================================================================================================
# mtcp.py: the parts
# ==================================================================================================


def test_mtcp_imports_no_file_of_ours():
    tree = ast.parse(Path(mtcp.__file__).read_text())
    imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    imported |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    allowed = {*sys.stdlib_module_names, "safetensors", "timm", "torch"}
    assert {name.split(".")[0] for name in imported} <= allowed


def test_every_departure_is_marked_in_the_code_and_listed_in_the_readme():
    code = "".join((HERE / name).read_text() for name in ("mtcp.py", "train.py"))
    readme = (HERE / "README.md").read_text()
    assert {int(n) for n in re.findall(r"\bD(\d+):", code)} == set(range(1, 17))
    assert [int(n) for n in re.findall(r"^\| D(\d+) \|", readme, re.M)] == list(range(1, 17))


def test_readme_links_lead_to_what_they_name():
    code = (HERE / "mtcp.py").read_text().splitlines()
    links = re.findall(r"\[`(\w+)`\]\(mtcp\.py#L(\d+)\)", (HERE / "README.md").read_text())
    assert len(links) > 15
    for name, line in links:
        assert re.match(rf"(class|def) {name}\b", code[int(line) - 1]), (name, line)


def test_cbam_is_timms():
    torch.manual_seed(0)
    ours = mtcp.CBAM(32).eval()
    theirs = CbamModule(32).eval()
    randomise_batchnorm(theirs)
    with torch.no_grad():
        ours.mlp[0].weight.copy_(theirs.channel.fc1.weight[..., 0, 0])
        ours.mlp[2].weight.copy_(theirs.channel.fc2.weight[..., 0, 0])
        ours.place[0].load_state_dict(theirs.spatial.conv.conv.state_dict())
        ours.place[1].load_state_dict(theirs.spatial.conv.bn.state_dict())
        x = torch.randn(2, 32, 5, 7)
        close(ours(x), theirs(x))


@pytest.mark.parametrize("name", [
    "swin_tiny_patch4_window7_224", "convnext_atto", "pvt_v2_b0", "vit_small_patch14_dinov2",
    "resnet50", "hrnet_w18_small", "vgg11",
])  # fmt: skip
def test_backbone_gives_four_strides(name):
    backbone = mtcp.Backbone(name, drop_path=0.1).eval()
    with torch.no_grad():
        maps = backbone(torch.randn(1, 3, 64, 96))
    strides = zip(backbone.channels, (4, 8, 16, 32), strict=True)
    assert [tuple(m.shape[1:]) for m in maps] == [(c, 64 // s, 96 // s) for c, s in strides]
    close(maps[2].mean(dim=1), torch.zeros(1, 4, 6), 1e-5)  # LayerNorm'ed at every pixel


def test_backbones_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="vit_base_patch32_224 has strides"):
        mtcp.Backbone("vit_base_patch32_224")
    with pytest.raises(ValueError, match="hiera_tiny_224 takes one image size only"):
        mtcp.Backbone("hiera_tiny_224")
    with pytest.raises(TypeError, match="no_such_argument"):
        mtcp.Backbone("vgg11", drop_path=0.1, no_such_argument=1)


def test_deformable_sampling_against_a_loop():
    torch.manual_seed(0)
    sizes = [(2, 3), (5, 4)]
    starts = [0, 6]
    value = torch.randn(1, 26, 2, 3)  # (B,pixels,heads,d)
    places = torch.rand(1, 4, 2, 2, 3, 2) * 1.4 - 0.2  # (B,L,heads,levels,points,2), some outside
    weight = torch.rand(1, 4, 2, 2, 3)
    expected = torch.zeros(4, 2, 3)
    for q, head, level, p in np.ndindex(*weight.shape[1:]):
        h, w = sizes[level]
        # pixel centres at whole numbers
        x, y = (places[0, q, head, level, p] * torch.tensor([w, h]) - 0.5).tolist()
        for yy, xx in np.ndindex(h, w):  # outside the map is zero
            bilinear = max(0, 1 - abs(y - yy)) * max(0, 1 - abs(x - xx))
            share = weight[0, q, head, level, p] * bilinear
            expected[q, head] += share * value[0, starts[level] + yy * w + xx, head]
    close(mtcp.deformable_sampling(value, sizes, places, weight)[0], expected.flatten(1))


def test_deformable_attention_starts_by_looking_around_itself():
    """With zero weights, head k samples at distances 1…points in direction 2πk/heads."""
    attention = mtcp.DeformableAttention(C=8, heads=4, levels=1, points=2)
    offsets = attention.offsets(torch.randn(1, 8)).view(4, 2, 2)
    right = torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    down = right.flip(1)
    close(offsets, torch.stack([right, down, -right, -down]), 1e-5)


def test_sine_embedding_against_a_loop():
    C, h, w = 8, 3, 5
    expected = torch.zeros(C, h, w)
    for c, y, x in np.ndindex(C, h, w):
        position, length, i = (y + 1, h, c) if c < C // 2 else (x + 1, w, c - C // 2)
        angle = 2 * math.pi * position / length / 10000 ** (2 * (i // 2) / (C // 2))
        expected[c, y, x] = math.sin(angle) if i % 2 == 0 else math.cos(angle)
    close(mtcp.sine_embedding(torch.zeros(2, C, h, w))[0], expected, 1e-4)


def test_masked_attention_hides_the_background_and_opens_empty_rows():
    decoder = mtcp.QueryDecoder(TOY).eval()
    # (1,2,1,2): query 0 sees pixel 0; query 1 sees nothing, so that its row is opened
    forbidden = decoder.attention_mask(torch.tensor([[[[1.0, -1.0]], [[-1.0, -2.0]]]]))
    assert forbidden.shape == (TOY.attention_heads, 2, 2)
    assert forbidden[0].tolist() == [[False, True], [False, False]]

    q, pixels = torch.randn(2, 1, 2, TOY.width)
    changed = pixels.clone()
    changed[:, 1] += 1  # a pixel that query 0 must not see, and query 1 may
    cross = partial(decoder.layers[0].cross, attn_mask=forbidden)
    difference = (cross(q, changed, changed)[0] - cross(q, pixels, pixels)[0])[0].abs()
    assert difference[0].max() <= 1e-5 and difference[1].max() > 1e-3


def test_shared_representation_is_P_times_the_number_of_masks_up_to_one_number_per_image():
    P = torch.randn(2, 4, 3, 5)
    M = 3 * torch.randn(2, 7, 3, 5)
    R = mtcp.shared_representation(P, M)
    for b in range(2):
        naive = torch.empty(4, 3, 5)
        for y in range(3):
            for x in range(5):
                masks = sum(1 / (1 + math.exp(-M[b, n, y, x])) for n in range(7))
                naive[:, y, x] = P[b, :, y, x] * masks
        close(R[b], naive / naive.square().mean().sqrt())
    close(mtcp.shared_representation(10 * P, M.repeat(1, 2, 1, 1)), R)


def test_a_pixel_where_the_logits_sum_to_zero_does_not_get_all_of_the_gradient():
    """As it would if R held the sum of the logits: a LayerNorm follows."""
    P = torch.randn(1, 8, 1, 99)
    M = torch.stack([torch.linspace(-1, 1, 99), torch.full((99,), 1e-3)])[None, :, None]
    R = mtcp.shared_representation(P, M).requires_grad_()
    y = F.layer_norm(R.transpose(1, 3), (8,))
    (y * torch.randn_like(y)).sum().backward()
    size = R.grad.norm(dim=1).flatten()  # (99,)
    assert size[49] < 10 * size.median()


def test_task_decoder_and_pyramid_shapes_at_sizes_no_window_divides():
    R = torch.randn(1, TOY.width, 9, 13)
    F_t = mtcp.TaskDecoder(TOY)(R)
    assert [tuple(f.shape[1:]) for f in F_t] == [(32, 9, 13), (64, 5, 7), (128, 3, 4)]
    assert mtcp.FeaturePyramid(TOY.width)(F_t).shape == R.shape


def test_swin_block_against_dense_attention():
    """A shifted block of window 7 on a 10 x 16 map, as attention among all places with a mask."""
    torch.manual_seed(0)
    block = mtcp.TaskDecoder(replace(TOY, width=4)).eval().stages[1].blocks[1]  # 2 heads of 4
    nn.init.normal_(block.attn.relative_position_bias_table)
    x = block.norm1(torch.randn(1, 10, 16, 8))
    # Padded to whole windows first, then cut by a grid shifted by 3; the padding is seen, as zeros.
    tokens = F.pad(x, (0, 0, 0, 5, 0, 4)).reshape(14 * 21, 8)
    place = torch.cartesian_prod(torch.arange(14), torch.arange(21))
    cell = torch.div(place - 3, 7, rounding_mode="floor")
    together = (cell[:, None] == cell[None]).all(dim=-1)
    apart = (place[:, None] - place[None] + 6).clamp(0, 12)
    bias = block.attn.relative_position_bias_table[apart[..., 0] * 13 + apart[..., 1]]
    q, k, v = block.attn.qkv(tokens).reshape(-1, 3, 2, 4).permute(1, 2, 0, 3)
    scores = q @ k.mT / math.sqrt(4) + bias.permute(2, 0, 1)  # (heads,places,places)
    y = scores.masked_fill(~together, -math.inf).softmax(dim=-1) @ v
    y = block.attn.proj(y.transpose(0, 1).reshape(1, 14, 21, 8))[:, :10, :16]
    close(block._attn(x), y)


def dense_cfm(cfm, stride, X_t, auxiliaries):
    """softmax(τ cos(Q, K)) V with the matrix written out."""
    gated = [X * torch.sigmoid(g(X)) for g, X in zip(cfm.gates, auxiliaries, strict=True)]
    A = cfm.fuse(torch.cat(gated, dim=1))

    def pool(x):  # a mean over each cell, also over those cut off by the edge: (B,C,positions)
        cells = [c for rows in x.split(stride, dim=2) for c in rows.split(stride, dim=3)]
        return torch.stack([c.mean(dim=(2, 3)) for c in cells], dim=2)

    q = F.normalize(cfm.query(A).flatten(2), dim=1)
    k = F.normalize(pool(cfm.key(A)), dim=1)
    affinity = torch.softmax(cfm.log_tau.exp() * q.mT @ k, dim=-1)  # (B,hw,positions)
    return cfm.out((pool(cfm.value(X_t)) @ affinity.mT).view_as(X_t))


@pytest.mark.parametrize("stride,auxiliaries", [(1, 1), (1, 2), (3, 2), (2, 3)])
def test_cfm_against_the_dense_softmax(stride, auxiliaries):
    torch.manual_seed(0)
    cfm = mtcp.CoherenceFusion(auxiliaries, replace(TOY, cfm_stride=stride)).eval()
    randomise_batchnorm(cfm)
    X = [torch.randn(2, TOY.width, 5, 7) for _ in range(auxiliaries + 1)]
    with torch.no_grad():
        cfm.log_tau += torch.rand_like(cfm.log_tau)
        close(cfm(X[0], X[1:]), dense_cfm(cfm, stride, X[0], X[1:]), 1e-4)
        cfm.log_tau.fill_(math.log(100.0))
        at_the_bound = cfm(X[0], X[1:])
        cfm.log_tau.fill_(9.0)
        close(cfm(X[0], X[1:]), at_the_bound)


def test_cosine_distance():
    x = torch.randn(2, 8, 3, 3)
    close(mtcp.cosine_distance(x, [5 * x]), 0.0, 1e-6)
    close(mtcp.cosine_distance(x, [-x, x]), 1.0, 1e-6)


def test_srm_follows_its_equations():
    srm = mtcp.SpatialRefinement(carry_channels=4, stage_channels=6, C=5, last=False).eval()
    randomise_batchnorm(srm)
    carry = torch.randn(1, 4, 4, 6)
    f_i = torch.randn(1, 6, 8, 12)
    up = F.interpolate(srm.cbam_carry(carry), scale_factor=2, mode="bilinear")
    z = torch.cat([up, srm.cbam_stage(f_i)], dim=1)
    pred, new_carry = srm(carry, f_i)
    for branch, out in ((srm.to_pred, pred), (srm.to_carry, new_carry)):
        conv, bn, _ = branch
        close(out, F.relu(bn(torch.einsum("oc,bchw->bohw", conv.weight[..., 0, 0], z))))


# ==================================================================================================
# mtcp.py: the whole network
# ==================================================================================================


@pytest.mark.parametrize("names", ["depth", "semseg normals", "semseg depth normals"])
@pytest.mark.parametrize("size,trace_back", [((64, 96), True), ((45, 71), True), ((64, 64), False)])
def test_output_contract_for_any_number_of_tasks_and_any_size(names, size, trace_back):
    tasks = tuple(t for t in NYUD_TASKS if t.name in names)
    model = MTCP(tasks, replace(TOY, trace_back=trace_back))
    assert (model.cfm is None) == (names == "depth")
    outputs = model(torch.randn(2, 3, *size))
    assert list(outputs) == names.split()
    for t in tasks:
        y = outputs[t.name]
        early = [y["initial"], *y["intermediate"]]
        assert len(early) == 3 if trace_back else early == [None]
        for p in [y["final"]] + early * trace_back:
            assert p.shape == (2, t.channels, *size)
            assert t.name != "depth" or (p > 0).all()
            if t.name == "normals":
                close(p.norm(dim=1), torch.ones(2, *size))


@pytest.mark.parametrize("cfm", [True, False])
@pytest.mark.parametrize("trace_back", [True, False])
def test_every_parameter_is_used(cfm, trace_back):
    torch.manual_seed(0)
    model = MTCP(NYUD_TASKS, replace(TOY, cfm=cfm, trace_back=trace_back))
    truth = {"semseg": torch.randint(0, 40, (2, 64, 96)), "depth": torch.rand(2, 1, 64, 96) * 5}
    truth["normals"] = F.normalize(torch.randn(2, 3, 64, 96), dim=1)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    # Two steps: deformable attention starts with offsets that do not depend on the query, so that
    # nothing flows back into position and level embeddings before the first.
    for _ in range(2):
        optimizer.step()
        optimizer.zero_grad()
        outputs = model(torch.randn(2, 3, 64, 96))
        sum(mtcp.task_losses(NYUD_TASKS, outputs, truth).values()).backward()
    resting = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    # CBAM's bottleneck has two units at this width: both may be below zero, and then rest.
    assert {n for n in resting if not re.search(r"(cbam\w*|\.0)\.mlp", n)} == set()
    assert all(p.grad is not None for p in model.parameters())


def test_one_image_alone_in_bfloat16_and_after_saving(tmp_path):
    torch.manual_seed(0)
    model = MTCP(NYUD_TASKS, TOY).eval()
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)  # written on the line before
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        both = model(x)
        first = model(x[:1])
        loaded = again(x)
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(x)
    for t in model.names:
        close(first[t]["final"], both[t]["final"][:1], 1e-4)
        close(loaded[t]["final"], both[t]["final"])
    close(rough["depth"]["final"].float(), both["depth"]["final"], 0.1)


@pytest.mark.parametrize("changes,share", [
    ({"drop_path": 0.5}, 0.7), ({"backbone": "resnet18", "backbone_args": {}}, 0.8),
])  # fmt: skip
def test_checkpointing_changes_no_gradient_and_no_running_statistics(changes, share):
    torch.manual_seed(0)
    model = MTCP(NYUD_TASKS, replace(TOY, **changes)).train()
    x = torch.randn(2, 3, 64, 96)
    seen = []
    for checkpointing in (False, True):
        model.cfg = replace(model.cfg, checkpointing=checkpointing)
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.reset_running_stats()
        model.zero_grad()
        torch.manual_seed(1)  # of stochastic depth
        kept = 0

        def keep(t):
            nonlocal kept
            kept += t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            outputs = model(x)
        sum(y["final"].square().mean() for y in outputs.values()).backward()
        state = [p.grad for p in model.parameters()], [b.clone() for b in model.buffers()]
        seen.append(([v for part in state for v in part if v is not None], kept))
    assert all(torch.equal(a, b) for a, b in zip(seen[0][0], seen[1][0], strict=True))
    assert seen[1][1] < share * seen[0][1]


def test_order_of_tasks_has_no_effect():
    torch.manual_seed(0)
    a = MTCP(NYUD_TASKS, TOY).eval()
    b = MTCP(NYUD_TASKS[::-1], TOY).eval()
    for cfm in a.cfm.values():
        # untrained attention is so flat that Q and K hardly matter
        nn.init.constant_(cfm.log_tau, math.log(100))
    b.load_state_dict(a.state_dict())
    x = torch.randn(1, 3, 64, 64)
    X = {t: 3 * torch.randn(1, TOY.width, 16, 16) for t in a.names}
    fused = a.fuse(X)
    for t in a.names:
        close(a(x)[t]["final"], b(x)[t]["final"])
        close(fused[t], b.fuse({t: X[t] for t in b.names})[t])
    swapped = a.cfm["depth"](X["depth"], [X["semseg"], X["normals"]])  # not the sorted order
    assert (swapped - fused["depth"]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="different names"):
        MTCP((NYUD_TASKS[0], NYUD_TASKS[0]), TOY)


def test_paper_preset_is_the_papers_model():
    with torch.device("meta"):  # shapes without memory
        model = MTCP(NYUD_TASKS, PRESETS["paper"])
    assert model.backbone.channels == [96, 192, 384, 768]
    assert len(model.pixel_decoder.layers) == 6 and len(model.query_decoder.layers) == 9
    assert model.query_decoder.query_features.weight.shape == (100, 256)
    assert [len(s.blocks) for s in model.decoder["depth"].stages] == [1, 2, 1]


# ==================================================================================================
# mtcp.py: losses
# ==================================================================================================


@pytest.mark.parametrize("loss,y,target,expected", [
    (mtcp.cross_entropy, [[2.0, 0], [0, 0]], [0, 1], (math.log1p(math.exp(-2)) + math.log(2)) / 2),
    (mtcp.cross_entropy, [[2.0, 0], [0, 0]], [IGNORE_INDEX, 1], math.log(2)),
    (mtcp.l1_depth, [[1.0], [5], [9]], [[2.0], [3], [0]], 3 / 2),
    # One right, one off by 1 in two of three components, one invalid.
    (mtcp.l1_normals, [[0.0, 0, 1], [1, 0, 0], [0, 1, 0]], [[0, 0, 1], [0, 1, 0], [0, 0, 0]],
     1 / 3),
    # ¾ for the one, ¼ for each of the three.
    (mtcp.balanced_bce, [[0.0], [0], [0], [0], [9]], [[1.0], [0], [0], [0], [255]],
     (0.75 + 3 * 0.25) * math.log(2) / 4),
])  # fmt: skip
def test_losses_by_hand(loss, y, target, expected):
    """With a row for each pixel."""
    y, target = (torch.tensor(x).movedim(0, -1)[None, ..., None] for x in (y, target))
    close(loss(y, target), expected)


@pytest.mark.parametrize("loss,channels,target", [
    (mtcp.cross_entropy, 4, torch.full((2, 3, 3), IGNORE_INDEX)),
    (mtcp.l1_depth, 1, torch.zeros(2, 1, 3, 3)),
    (mtcp.l1_normals, 3, torch.zeros(2, 3, 3, 3)),
    (mtcp.balanced_bce, 1, torch.full((2, 1, 3, 3), 255.0)),
])  # fmt: skip
def test_no_valid_pixel_is_a_loss_of_zero_with_zero_gradient(loss, channels, target):
    y = torch.randn(2, channels, 3, 3, requires_grad=True)
    value = loss(y, target)
    value.backward()
    assert value.item() == 0 and y.grad.abs().max() == 0


def test_mask_loss_is_cross_entropy_and_dice_of_the_classes_that_are_asked_for():
    M = torch.randn(2, 5, 2, 3)
    label = torch.randint(0, 6, (2, 8, 12))
    label[:, 2, 2] = IGNORE_INDEX
    label[label == 4] = 5
    label[0, 6, 10] = 2
    classes = torch.tensor([2, 0, 4, 1])  # of which 4 is nowhere; query 4 is left over
    entropy = 0
    dice = []
    for b in range(2):
        for n, c in enumerate(classes.tolist()):
            p = []
            for y in range(2):
                for x in range(3):
                    truth = label[b, 4 * y + 2, 4 * x + 2].item()
                    if truth != IGNORE_INDEX:
                        p.append((1 / (1 + math.exp(-M[b, n, y, x])), float(truth == c)))
            entropy -= sum(math.log(q if t else 1 - q) for q, t in p) / (2 * 5 * 4)  # 5 of 6 known
            if any(t for _, t in p):
                overlap = sum(q * t for q, t in p)
                dice.append(1 - (2 * overlap + 1) / (sum(q + t for q, t in p) + 1))
    loss = mtcp.mask_loss(M.requires_grad_(), label, classes)
    close(loss, 2 * entropy + sum(dice) / len(dice))
    loss.backward()
    assert (M.grad[:, 4] == 0).all() and (M.grad[:, :4, 0, 0] == 0).all()
    assert (M.grad[:, :4, 1, 2] != 0).all()
    unknown = torch.full_like(label, IGNORE_INDEX)
    assert mtcp.mask_loss(M, unknown, classes) == 0


def test_task_loss_weighs_early_predictions_by_half():
    a, b, c, d = (torch.full((1, 1, 2, 2), v) for v in (2.0, 3.0, 5.0, 9.0))
    target = {"depth": torch.ones(1, 1, 2, 2)}
    for initial, intermediate, loss in ((b, [c, d], 1 + 0.5 * (2 + 4 + 8)), (None, [], 1.0)):
        y = {"depth": {"final": a, "initial": initial, "intermediate": intermediate}}
        close(mtcp.task_losses(NYUD_TASKS[1:2], y, target)["depth"], loss)


# ==================================================================================================
# mtcp.py: balancers
# ==================================================================================================


def run_epoch(balancer, *ell):
    """An epoch of one step in which ℓ_t = log(1 + L_t) is as given; the total of that step."""
    losses = {n: torch.expm1(torch.tensor(e)) for n, e in zip(balancer.names, ell, strict=True)}
    total = balancer(losses)
    balancer.end_epoch()
    return total.item()


@pytest.mark.parametrize("make,total", [
    (mtcp.EqualWeights, 7.0),
    (partial(LPS, kappa=2.0, prioritise=False), math.log(4) + math.log(5)),
    (partial(LPS, kappa=2.0, prioritise=False, log=False), 7.0),
])  # fmt: skip
def test_balancers_that_weigh_all_tasks_alike(make, total):
    balancer = make(["a", "b"])
    close(run_epoch(balancer, math.log(4), math.log(5)), total)
    assert balancer.weights.tolist() == [1, 1]


def test_lps_by_hand_for_three_epochs():
    lps = LPS(["a", "b"], kappa=2.0, w_min=0.1)
    close(run_epoch(lps, 1.0, 3.0), 4.0)  # epoch 0: w = 1
    close(lps.weights, [1.5, 0.5])  # ℓ/ℓ_t = 4, 4/3, rescaled to sum 2
    close(run_epoch(lps, 0.5, 3.0), 1.5 * 0.5 + 0.5 * 3)
    # r = (½, 1) / (3.5/4) = (4/7, 8/7), r̄ = 6/7; r̄ ± 2·2/7 = (2/7, 10/7), rescaled
    close(lps.weights, [1 / 3, 5 / 3])
    run_epoch(lps, 0.5, 1.0)
    # r = (1, ⅓) / (1.5/3.5) = (7/3, 7/9), r̄ = 14/9; spread (28/9, 0), rescaled (2, 0), then floor
    close(lps.weights, [1.9, 0.1])


def test_lps_weights_stay_above_the_floor_and_sum_to_T():
    torch.manual_seed(0)
    lps = LPS(["a", "b", "c"], kappa=7.5, w_min=0.1)
    floored = 0
    for _ in range(200):
        run_epoch(lps, *(torch.rand(3) + 0.1).tolist())
        assert lps.weights.min() >= 0.1 - 1e-6
        close(lps.weights.sum(), 3.0)
        floored += (lps.weights < 0.11).any().item()
    assert floored > 100  # without the floor, these epochs would have had a negative weight
    with pytest.raises(ValueError, match="w_min"):
        LPS(["a"], kappa=1.0, w_min=0.0)


def test_lps_ignores_a_task_without_valid_pixels():
    lps = LPS(["a", "b", "c"], kappa=2.0)
    run_epoch(lps, 1.0, 3.0, 0.0)
    close(lps.weights, [1.5, 0.5, 1.0])  # as without c, which keeps weight 1
    run_epoch(lps, 0.5, 3.0, 2.0)
    close(lps.weights, [1 / 3, 5 / 3, 1.0])  # c has nothing to be compared with yet
    run_epoch(lps, 0.0, 0.0, 0.0)
    assert lps.weights.isfinite().all()


@pytest.mark.parametrize("make", [partial(LPS, kappa=7.5), mtcp.DynamicWeightAverage])
def test_balancer_state_round_trip(make):
    a = make(["a", "b"])
    run_epoch(a, 1.0, 3.0)
    a({"a": torch.tensor(1.0), "b": torch.tensor(0.3)})  # half-way through an epoch
    b = make(["a", "b"])
    b.load_state_dict(a.state_dict())
    for balancer in (a, b):
        run_epoch(balancer, 0.7, 2.0)
        run_epoch(balancer, 0.6, 1.9)
    assert torch.equal(a.weights, b.weights) and a.weights[0] != a.weights[1]


def test_uncertainty_by_hand():
    balancer = mtcp.UncertaintyWeights(["a", "b", "c"])
    balancer.log_variance.data = torch.tensor([math.log(2), 0.0, 5.0])
    total = balancer(
        dict(zip("abc", torch.tensor([4.0, 3.0, 0.0]), strict=True))
    )  # c: no valid pixel
    close(total, 4 / 2 + math.log(2) / 2 + 3)
    total.backward()
    assert balancer.log_variance.grad[2] == 0
    balancer.end_epoch()
    close(balancer.weights, [0.5, 1.0, math.exp(-5)])


def test_dwa_by_hand():
    dwa = mtcp.DynamicWeightAverage(["a", "b"])
    run_epoch(dwa, math.log(3), math.log(3))  # L = 2, 2
    close(dwa.weights, [1, 1])
    run_epoch(dwa, math.log(2), math.log(3))  # L = 1, 2
    close(dwa.weights, 2 * torch.softmax(torch.tensor([0.5, 1.0]) / 2, dim=0))


def _rank(rank: int, file: str, out: str) -> None:
    init = {"init_method": f"file://{file}", "rank": rank, "world_size": 2}
    torch.distributed.init_process_group("gloo", **init)
    lps = LPS(["a", "b"], kappa=2.0)
    for step in range(1 + rank):  # ranks with different numbers of steps
        ell = torch.tensor([1.0 + rank + step, 3.0])
        lps(dict(zip("ab", torch.expm1(ell), strict=True)))
    lps.end_epoch()
    torch.save(lps.weights, f"{out}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_lps_reduces_over_ranks(tmp_path):
    torch.multiprocessing.spawn(_rank, args=(str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    weights = [torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(2)]
    assert torch.equal(*weights)
    raw = torch.tensor([5 / 2, 5 / 3])  # ℓ_a = (1 + 2 + 3) / 3 = 2 over both ranks' steps, ℓ_b = 3
    close(weights[0], raw / raw.mean())


# ==================================================================================================
# mtcp.py: published weights
# ==================================================================================================

# As small as a Mask2Former of Hugging Face's gets: it has 32 groups in GroupNorm at every width.
SMALL = replace(TOY, width=256, attention_heads=8)
SWIN = {"embed_dim": 32, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8)}


@pytest.fixture(scope="module")
def mask2former(tmp_path_factory):
    """Hugging Face's own network with random weights, and the folder of its save_pretrained."""
    hf = pytest.importorskip("transformers")  # CI installs it
    swin = hf.SwinConfig(
        embed_dim=32, depths=[1, 1, 2, 1], num_heads=[1, 2, 4, 8], window_size=7,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = hf.Mask2FormerConfig(
        backbone_config=swin, encoder_layers=2, encoder_feedforward_dim=128, dim_feedforward=128,
        num_queries=16, num_labels=5,
        decoder_layers=4,  # one more than there are: it counts the prediction before the first
    )  # fmt: skip
    torch.manual_seed(0)
    network = hf.Mask2FormerForUniversalSegmentation(config).eval()
    for p in network.parameters():  # no tensor may be what its initialisation makes it anyway
        p.data += 0.05 * torch.randn_like(p)
    folder = tmp_path_factory.mktemp("mask2former")
    network.save_pretrained(folder)
    return network, folder


@pytest.mark.parametrize("layout", ["safetensors", "bin"])
def test_P_and_M_are_hugging_faces(mask2former, tmp_path, layout):
    network, folder = mask2former
    state = load_file(folder / "model.safetensors")
    if layout == "bin":  # older files are of this kind, and also hold this constant
        index = f"{mtcp.ENC}.encoder.layers.0.blocks.0.attention.self.relative_position_index"
        state[index] = torch.zeros(49, 49, dtype=torch.int64)
        torch.save(state, tmp_path / "pytorch_model.bin")
        folder = tmp_path
    tensors = mtcp.read_weights(folder)
    assert mtcp.mask2former_queries(tensors) == 16
    ours = MTCP(NYUD_TASKS, SMALL).eval()
    record = mtcp.load_weights(ours, tensors)
    assert record["into"] == "backbone, pixel_decoder, query_decoder"
    assert record["tensors"] + len(record["not used"]) == len(state)
    assert len(record["not used"]) == 5 + (layout == "bin")  # see MASK2FORMER_UNUSED
    for size in ((64, 96), (72, 100)):  # 72 x 100: not divided by 32 nor, on any level, the window
        x = torch.randn(2, 3, *size)
        with torch.no_grad():
            P, M = ours.shared(x)
            theirs = network(x)
        assert P.std() > 0.1 and M.std() > 0.1
        close(P, theirs.pixel_decoder_last_hidden_state, 1e-4)
        close(M, theirs.masks_queries_logits, 1e-4)


def complaint(load, *args) -> str:
    with pytest.raises(mtcp.WeightsError) as error:
        load(*args)
    return str(error.value)


def test_each_tensor_deleted_or_renamed_is_named(mask2former):
    given = mtcp.read_weights(mask2former[1])
    ours = MTCP(NYUD_TASKS[:1], SMALL)
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    needed = [k for k in given if not re.fullmatch(mtcp.MASK2FORMER_UNUSED, k)]
    assert len(needed) > 230 and set(given) - set(needed) == {
        "class_predictor.weight", "class_predictor.bias", "criterion.empty_weight",
        f"{mtcp.ENC}.swin.layernorm.weight", f"{mtcp.ENC}.swin.layernorm.bias",
    }  # fmt: skip
    for name in needed:
        without = {k: v for k, v in given.items() if k != name}
        said = complaint(mtcp.load_weights, ours, {**without, name + "_": given[name]})
        assert f"missing in the file: {name}\n" in said
        assert f"not in the network: {name}_" in said
    assert "extra" in complaint(mtcp.load_weights, ours, {**given, "extra": torch.zeros(1)})
    few = {k: v for k, v in given.items() if k not in needed[:11]}
    said = complaint(mtcp.load_weights, ours, few)
    assert said.endswith("and 3 more") and said.splitlines()[1].count(",") == 7
    assert all(torch.equal(v, before[k]) for k, v in ours.state_dict().items())  # not half loaded

    queries = f"{mtcp.QRY}.queries_features.weight (16, 256) (network: (20, 256))"
    vit = {"backbone": "vit_tiny_patch16_224", "backbone_args": {}}
    for change, said in (({"queries": 20}, queries), (vit, "vit_tiny_patch16_224 is none")):
        other = MTCP(NYUD_TASKS[:1], replace(SMALL, **change))
        assert said in complaint(mtcp.load_weights, other, given)


def test_weights_are_unwrapped_and_freed_of_prefixes(tmp_path):
    a = {"a.weight": torch.arange(3.0), "module.b": torch.ones(2, dtype=torch.int64)}
    for wrapped in (
        a, {"model": a}, {"state_dict": a, "epoch": 3}, {f"module.{k}": v for k, v in a.items()},
        {"model": {f"_orig_mod.{k}": v for k, v in a.items()}},
        {f"_orig_mod.module.{k}": v for k, v in a.items()},
        {f"module._orig_mod.{k}": v for k, v in a.items()},
    ):  # fmt: skip
        torch.save(wrapped, tmp_path / "a.pth")
        tensors = mtcp.read_weights(tmp_path / "a.pth")
        assert list(tensors) == list(a) and torch.equal(tensors["a.weight"], a["a.weight"])
    assert mtcp.mask2former_queries(tensors) is None


def save_code(path: Path, key: str) -> None:
    """A checkpoint that makes a file "boom" beside it when it is read without care."""

    class Bomb:
        def __reduce__(self):
            return (Path.touch, (path.parent / "boom",))

    torch.save({key: Bomb(), "model": {}}, path)


def test_weights_that_cannot_be_read_are_refused(tmp_path):
    save_code(tmp_path / "evil.pth", "state_dict")
    torch.save({"model": {"epoch": 3}}, tmp_path / "numbers.pth")
    broken = {"fine": torch.ones(2), "nan": torch.tensor([1, math.nan])}
    save_file({**broken, "inf": torch.tensor(math.inf)}, tmp_path / "broken.safetensors")
    (tmp_path / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    (tmp_path / "model_final.pkl").write_bytes(pickle.dumps({"model": {}}))
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts/model.safetensors.index.json").write_text("{}")
    for name, said in {
        "evil.pth": "holds more than tensors", "model_final.pkl": "as of Detectron2, can run",
        "numbers.pth": "something else than tensors",
        "pointer.safetensors": "cannot be read; was it downloaded to the end",
        "broken.safetensors": "NaN or infinity in (nan, inf|inf, nan)$",
        "parts": "several files is not read: save it as one file",
        "parts/model.safetensors.index.json": "several files is not read",
        "nowhere": "nowhere not found", ".": "model.safetensors not found",
    }.items():  # fmt: skip
        refused(said, mtcp.read_weights, tmp_path / name)
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize("name,args", [
    ("swin_tiny_patch4_window7_224", SWIN), ("convnext_atto", {}), ("hrnet_w18_small", {}),
    ("deit_tiny_distilled_patch16_224", {}), ("vit_small_patch14_reg4_dinov2", {"depth": 4}),
    ("vit_small_patch16_dinov3", {"depth": 4}),
])  # fmt: skip
def test_backbone_weights_of_timm_give_timms_features(name, args, tmp_path):
    """Before our LayerNorms: those of timm's own features_only network with the same file."""
    torch.manual_seed(0)
    classifier = timm.create_model(name, **args)
    randomise_batchnorm(classifier)
    file = {"file": str(tmp_path / "weights.pth")}
    torch.save(classifier.state_dict(), file["file"])
    args_of_file = {"pretrained": True, "pretrained_cfg_overlay": file, **args}
    theirs = timm.create_model(name, features_only=True, **args_of_file).eval()
    ours = mtcp.Backbone(name, **args).eval()
    record = mtcp.load_backbone(ours, mtcp.read_weights(tmp_path / "weights.pth"))
    assert record["into"] == "backbone" and record["tensors"] == len(ours.net.state_dict())
    ours.norms = nn.ModuleList(nn.Identity() for _ in range(4))
    side = timm.get_pretrained_cfg(name).input_size[-1]
    x = torch.randn(1, 3, *(2 * [side // ours.patch * 16 if ours.patch else side]))
    with torch.no_grad():
        if ours.patch:  # the four blocks themselves, not what the pyramid makes of them
            ours.pyramid = nn.Identity()
            theirs.out_indices = ours.net.out_indices
        maps = ours(x)
        expected = theirs(mtcp.resize(x, (side, side)))[-4:]
    for m, e in zip(maps, expected, strict=True):
        close(m, e.permute(0, 3, 1, 2) if "swin" in name else e, 1e-4)


@pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2", "vit_small_patch14_dinov2"])
def test_backbone_weights_of_the_original_dinov2(name):
    """The authors' files have the class token's position in pos_embed, and a mask token."""
    torch.manual_seed(0)
    reference = mtcp.Backbone(name, depth=3).net
    nn.init.normal_(reference.model.cls_token)
    original = {k.removeprefix("model."): v for k, v in reference.state_dict().items()}
    if "reg4" in name:
        position = torch.randn(1, 1, 384)  # what timm folds into the class token
        original["cls_token"] = original["cls_token"] - position
        original["pos_embed"] = torch.cat([position, original["pos_embed"]], dim=1)
        original["register_tokens"] = original.pop("reg_token")
    original |= {"mask_token": torch.zeros(1, 384), "norm.weight": torch.ones(384)}
    original["norm.bias"] = torch.zeros(384)
    ours = mtcp.Backbone(name, depth=3)
    mtcp.load_backbone(ours, original)
    for k, v in reference.state_dict().items():
        close(ours.net.state_dict()[k], v, 1e-6)
    original["pos_embed"] = original["pos_embed"][:, : 1 + 16 * 16]  # of 224 x 224 pixels
    refused("another window or image size: pos_embed", mtcp.load_backbone, ours, original)


def test_backbone_weights_of_the_original_swin():
    """The authors' files merge patches at the end of a stage, timm at the start of the next."""
    torch.manual_seed(0)
    make = partial(mtcp.Backbone, "swin_tiny_patch4_window7_224")
    reference = make(**SWIN).net.state_dict()
    original = {"layers.0.blocks.0.attn.relative_position_index": torch.zeros(49, 49)}
    for k, v in reference.items():
        k = k.replace("layers_", "layers.")
        back = re.sub(r"layers\.(\d)\.down", lambda m: f"layers.{int(m[1]) - 1}.down", k)
        original[back] = v
    for name, channels in (("norm", 256), ("head", 21841)):
        original |= {f"{name}.weight": torch.ones(channels), f"{name}.bias": torch.ones(channels)}
    ours = make(**SWIN)
    mtcp.load_backbone(ours, original)
    for k, v in reference.items():
        assert torch.equal(ours.net.state_dict()[k], v)

    gone = {k: v for k, v in original.items() if k != "layers.2.blocks.1.mlp.fc1.bias"}
    for tensors, changes, said in (
        (gone, {}, "missing in the file: layers.2.blocks.1.mlp.fc1.bias"),
        ({**original, "surprise": torch.ones(1)}, {}, "not in the network: surprise"),
        (original, {"window_size": 12}, "another window or image size: layers."),
        (original, {"embed_dim": 48}, "patch_embed.proj.weight (32, 3, 4, 4) (network"),
    ):
        assert said in complaint(mtcp.load_backbone, make(**{**SWIN, **changes}), tensors)


@pytest.mark.parametrize("name", [
    "deit_tiny_distilled_patch16_224", "vit_small_patch14_dinov2",
    "vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3",
])  # fmt: skip
def test_plain_vits_at_480_by_640(name):
    """Each stride has a block's patch tokens in their places, without others, positions resized."""
    torch.manual_seed(0)
    backbone = mtcp.Backbone(name, depth=8).eval()
    for parameter, p in backbone.named_parameters():
        if "gamma" in parameter:  # starts near 0: all blocks would hand on what they got
            nn.init.ones_(p)
    whole = timm.create_model(name, depth=8, dynamic_img_size=True, num_classes=0).eval()
    state = {k.removeprefix("model."): v for k, v in backbone.net.state_dict().items()}
    whole.load_state_dict(state, strict=False)
    whole.norm = nn.Identity()  # features_only leaves the last norm out
    x = torch.randn(1, 3, 480, 640)
    patch = 14 if "14" in name else 16
    with torch.no_grad():
        sizes = [tuple(m.shape[-2:]) for m in backbone(x)]
        backbone.norms = nn.ModuleList([nn.Identity()] * 4)
        backbone.pyramid = nn.Identity()
        maps = backbone(x)
        flat = backbone(torch.zeros_like(x))[2]
        expected = {}
        for blocks in (8, 6, 4, 2):
            whole.blocks = whole.blocks[:blocks]
            expected[blocks] = whole.forward_features(mtcp.resize(x, (30 * patch, 40 * patch)))
    assert sizes == [(120, 160), (60, 80), (30, 40), (15, 20)]
    prefix = whole.num_prefix_tokens
    for blocks, at in zip((2, 4, 6, 8), maps, strict=True):
        assert prefix >= 1 and expected[blocks].shape[1] == prefix + 1200
        close(at, expected[blocks][:, prefix:].mT.reshape(at.shape), 1e-4)
    # DINOv3's rotary positions are relative: all places of a uniform image are alike.
    assert "dinov3" in name or flat.std(dim=(2, 3)).mean() > 1e-3


def test_each_map_of_a_vit_holds_all_blocks_whatever_their_scale():
    torch.manual_seed(0)
    pyramid = mtcp.ViTPyramid(8)
    c = [scale * torch.randn(2, 8, 4, 6) for scale in (0.05, 0.1, 0.2, 2.5)]
    with torch.no_grad():
        maps = pyramid(c)
        tokens = torch.cat([F.layer_norm(m.permute(0, 2, 3, 1), (8,), eps=1e-6) for m in c], dim=-1)
        mixed = [tokens @ mix.weight.flatten(1).T + mix.bias for mix in pyramid.mix]  # (2,4,6,8)
        for m, n in zip(maps, (4, 2, 1, 1 / 2), strict=True):
            assert m.shape == (2, 8, 4 * n, 6 * n)
        close(maps[2].permute(0, 2, 3, 1), mixed[2], 1e-5)
        pooled = mixed[3].unfold(1, 2, 2).unfold(2, 2, 2).mean(dim=(-1, -2))  # (2,2,3,8)
        close(maps[3].permute(0, 2, 3, 1), pooled, 1e-5)
        # The four pixels around the corner between four tokens are the tokens' mean.
        for k, n in enumerate((4, 2)):
            corner = maps[k][:, :, n - 1 : n + 1, n - 1 : n + 1].mean(dim=(2, 3))
            close(corner, mixed[k][:, :2, :2].mean(dim=(1, 2)), 1e-5)


def test_a_window_that_divides_nothing_at_480_by_640():
    args = {"embed_dim": 24, "depths": (1, 1, 1, 2), "num_heads": (1, 2, 4, 8)}
    backbone = mtcp.Backbone("swin_large_patch4_window12_384", **args).eval()
    with torch.no_grad():
        maps = backbone(torch.randn(1, 3, 480, 640))
    sizes = [(24, 120, 160), (48, 60, 80), (96, 30, 40), (192, 15, 20)]
    assert [tuple(m.shape[1:]) for m in maps] == sizes
    # At the nominal 384 x 384 this stage is a single window: without always_partition, timm would
    # drop its shift.
    assert backbone.net.layers_3.blocks[1].shift_size == (6, 6)


# ==================================================================================================
# data.py: labels and readers
# ==================================================================================================


def put(path: Path, content: np.ndarray | list[str]) -> None:
    """An array as .npy or as an image, file stems as a list."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list):
        path.write_text("\n".join(content) + "\n")
    elif path.suffix == ".npy":
        np.save(path, content)
    else:
        Image.fromarray(content).save(path)


def write_nyud(root: Path, layout: str, size=(6, 8)) -> dict[str, dict]:
    """A tiny archive in exactly the format of `layout`; returns what the loader should read."""
    rng = np.random.default_rng(0)
    expected = {}
    put(root / "gt_sets/train.txt", ["0003", "0007"])
    put(root / "gt_sets/val.txt", ["0011"])
    for stem in ("0003", "0007", "0011"):
        image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        semseg = rng.integers(0, 41, size, dtype=np.uint8)
        semseg[0, :3] = (0, 1, 40)
        depth = rng.uniform(1, 9, size).astype(np.float32)
        depth[1, 1:3] = (0, np.nan)
        normals = rng.standard_normal((*size, 3)).astype(np.float32)
        normals /= np.linalg.norm(normals, axis=2, keepdims=True)
        normals[2, 2] = 0
        expected[stem] = {"image": image, "depth": depth, "normals": normals}
        put(root / f"segmentation/{stem}.png", semseg)
        put(root / f"depth/{stem}.npy", depth)
        put(root / f"images/{stem}.{'jpg' if layout == 'NYUD_MT' else 'png'}", image)
        if layout == "NYUD_MT":
            put(root / f"normals/{stem}.npy", normals)
        else:
            put(root / f"normals/{stem}.png", ((normals + 1) * 127.5).round().astype(np.uint8))
    return expected


@pytest.mark.parametrize("layout", ["NYUD_MT", "NYUDv2"])
def test_nyud_reads_both_archives(tmp_path, layout):
    expected = write_nyud(tmp_path, layout)
    dataset = data.NYUD(tmp_path, "train")
    assert dataset.layout == layout
    assert len(dataset) == 2 and len(data.NYUD(tmp_path, "val")) == 1
    for sample, (stem, truth) in zip((dataset[0], dataset[1]), expected.items(), strict=False):
        assert sample["name"] == stem and sample["size"].tolist() == [6, 8]
        if layout == "NYUDv2":  # lossless
            image = truth["image"] / 255 - np.array([0.485, 0.456, 0.406])
            close(sample["image"].permute(1, 2, 0), image / np.array([0.229, 0.224, 0.225]))
        assert sample["semseg"][0, :3].tolist() == [IGNORE_INDEX, 0, 39]
        assert sample["semseg"].dtype == torch.int64
        assert sample["depth"].shape == (1, 6, 8) and sample["depth"][0, 1, 1:3].tolist() == [0, 0]
        close(sample["depth"][0, 2:], truth["depth"][2:])
        assert sample["normals"][:, 2, 2].abs().max() == 0
        # Eight bits: steps of 1/127.5, so up to about half a degree.
        tolerance = 1e-6 if layout == "NYUD_MT" else 0.01
        close(sample["normals"].permute(1, 2, 0), truth["normals"], tolerance)
        close(sample["normals"].norm(dim=0)[3:], torch.ones(3, 8))


def test_what_no_label_can_hold_is_refused(tmp_path):
    for name, content, read, said in (
        ("a.png", np.full((2, 2), 41, np.uint8), data.read_nyud_semseg, "class 41"),
        ("a.png", np.full((2, 2), 41, np.uint8), data.read_voc_semseg, "class 41"),
        ("a.png", np.zeros((2, 2, 3), np.uint8), data.read_nyud_semseg, "one 8-bit channel"),
        ("a.npy", np.full((4, 4), 2000.0), data.read_depth, "a.npy holds 2000 metres"),
        ("a.npy", np.full((4, 4, 3), 0.9), data.read_normals, "a.npy holds .* not unit vectors"),
        ("a.npy", np.ones((4, 4, 2)), data.read_normals, "2 channels"),
        ("a.npy", np.ones((4, 4), np.int32), data.read_depth, "expected 2-d floats"),
        ("a.png", np.eye(4, dtype=np.uint8), data.read_saliency, "a.png holds 0 and 1 only"),
    ):
        put(tmp_path / name, content)
        refused(said, read, tmp_path / name)
    np.savez(tmp_path / "a.npz", np.ones((4, 4)))
    shutil.move(tmp_path / "a.npz", tmp_path / "a.npy")
    refused("an .npz in truth", data.read_depth, tmp_path / "a.npy")
    header = {"descr": "<f4", "fortran_order": False, "shape": (10**6, 10**6)}
    with open(tmp_path / "huge.npy", "wb") as f:
        np.lib.format.write_array_header_1_0(f, header)
    refused("cannot be read", data.read_depth, tmp_path / "huge.npy")  # and not 4 TB of memory


def test_palette_labels_are_read_as_indices(tmp_path):
    label = Image.fromarray(np.array([[1, 2], [40, 0]], np.uint8), mode="P")
    label.putpalette(data.palette().flatten().tolist())
    label.save(tmp_path / "a.png")
    assert data.read_nyud_semseg(tmp_path / "a.png").tolist() == [[0, 1], [39, IGNORE_INDEX]]


def mat(path: Path, *objects: tuple[str, int, np.ndarray, list]) -> None:
    """PASCAL-Part's struct, field by field: anno.imname, anno.objects(n).parts(m)."""

    def structs(fields, rows):
        array = np.array([[*rows]], dtype=[(f, object) for f in fields])
        return array if rows else np.zeros((0, 0))

    rows = [
        (name, float(index), mask.astype(np.uint8), structs(("part_name", "mask"), parts))
        for name, index, mask, parts in objects
    ]
    objects = structs(("class", "class_ind", "mask", "parts"), rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    scipy.io.savemat(path, {"anno": structs(("imname", "objects"), [("x", objects)])})


def box(top, left, bottom, right, size=(8, 10)) -> np.ndarray:
    mask = np.zeros(size, np.uint8)
    mask[top:bottom, left:right] = 1
    return mask


def test_human_parts_of_several_people_and_none(tmp_path):
    path = tmp_path / "a.mat"
    head = box(0, 0, 2, 2)
    arm = box(2, 0, 4, 2)
    leg = box(4, 6, 8, 8)
    paws = [("head", box(5, 0, 6, 2)), ("torso", box(6, 0, 8, 4))]
    dog = ("dog", 12, box(5, 0, 8, 4), paws)
    stranger = ("person", 15, box(0, 9, 8, 10), [])  # nobody has drawn this one's parts
    one = ("person", 15, box(0, 0, 4, 2), [("lear", head), ("lhand", arm)])
    mat(path, one, ("person", 15, box(0, 5, 8, 8), [("rfoot", leg)]), stranger, dog)
    close(data.read_human_parts(path, (8, 10)), 1 * head + 4 * arm + 6 * leg)
    for objects in ((dog, stranger), ()):  # no annotated person: nothing is known
        mat(path, *objects)
        assert (data.read_human_parts(path, (8, 10)) == IGNORE_INDEX).all()

    mat(path, ("person", 15, box(0, 0, 4, 2), [("tail", head)]))
    refused("a.mat has human parts .*tail", data.read_human_parts, path, (8, 10))
    mat(path, one, ("person", 15, box(0, 0, 8, 9, (8, 9)), []))
    refused("a.mat has masks of different sizes", data.read_human_parts, path, (8, 10))
    path.write_bytes(path.read_bytes()[:200])
    refused("a.mat cannot be read", data.read_human_parts, path, (8, 10))
    path.write_bytes(b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM".ljust(400))
    refused("a.mat is of MATLAB 7.3", data.read_human_parts, path, (8, 10))


def test_pictures_show_what_is_ignored_in_white():
    white = [255] * 3
    saliency = torch.tensor([[[0.0, 1.0, IGNORE_INDEX]]])
    assert data.picture("sal", saliency).tolist() == [[[0] * 3, [200] * 3, white]]
    semseg = torch.tensor([[IGNORE_INDEX]])
    invalid = {"semseg": semseg, "depth": torch.zeros(1, 1, 1), "normals": torch.zeros(3, 1, 1)}
    for key, label in invalid.items():
        assert data.picture(key, label).tolist() == [[white]]


# ==================================================================================================
# data.py: datasets
# ==================================================================================================


def read_nyud(root: Path, **kwargs) -> dict:
    return data.NYUD(root, "train", **kwargs)[0]


def test_nyud_says_what_is_wrong(tmp_path):
    refused("gt_sets/train.txt not found", read_nyud, tmp_path)
    write_nyud(tmp_path, "NYUD_MT")
    (tmp_path / "depth/0007.npy").unlink()
    refused(r"depth: 1 of 2 \(first: .*depth/0007.npy\)", read_nyud, tmp_path)
    assert len(data.NYUD(tmp_path, "train", ["semseg", "normals"])) == 2  # without that task

    depth = tmp_path / "depth/0003.npy"
    read = partial(read_nyud, tmp_path, stems=["0003"])
    np.save(depth, np.ones((5, 8), np.float32))
    refused("0003.npy is .* archives were mixed", read)
    np.save(depth, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    refused("0003.npy cannot be read", read)
    np.save(depth, np.ones((6, 8), np.float32))
    whole = depth.read_bytes()
    depth.write_bytes(whole[:-20])
    refused("0003.npy cannot be read", read)
    depth.write_bytes(whole)
    read()
    image = tmp_path / "images/0003.jpg"
    image.write_bytes(image.read_bytes()[:100])
    refused("0003.jpg is no readable image", read)
    (tmp_path / "normals/0003.jpg").write_bytes(b"")
    refused("older NYUD_MT", read)
    for text, said in (("../../etc/passwd", "no list of file stems"), ("", "it is empty")):
        put(tmp_path / "gt_sets/train.txt", [text])
        refused(said, read_nyud, tmp_path)


def test_splits_that_overlap_or_do_not_fit_are_refused(tmp_path):
    write_nyud(tmp_path / "a", "NYUD_MT")
    write_nyud(tmp_path / "b", "NYUD_MT", size=(5, 7))
    write_nyud(tmp_path / "c", "NYUDv2")
    a = data.NYUD(tmp_path / "a", "train")
    test = data.NYUD(tmp_path / "a", "val")
    data.require_sound_splits([a], test)
    for name, said in (("b", r"0011.jpg is \(5, 7\) pixels, but .*0003.jpg is \(6, 8\)"),
                       ("c", "archives were mixed")):  # fmt: skip
        refused(said, data.require_sound_splits, [a], data.NYUD(tmp_path / name, "val"))
    refused("2 images are in the training list and in .* 0003", data.require_sound_splits, [a], a)
    put(tmp_path / "a/images/0007.jpg", np.zeros((6, 9, 3), np.uint8))
    refused(r"0007.jpg is \(6, 9\) pixels", data.require_sound_splits, [a], test)


def test_lists_of_stems(tmp_path):
    path = tmp_path / "gt_sets/train.txt"
    path.parent.mkdir()
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path.write_text("0003\r\n0007\n", encoding=encoding)
        assert data.NYUD.list_stems(tmp_path, "train") == ["0003", "0007"]
    for raw, said in (
        (b"0003\n0007\n0003", "train.txt lists 1 stems twice, the first is 0003"),
        (b"\xff\x00\x81", "train.txt is no list of file stems"),
    ):
        path.write_bytes(raw)
        refused(said, data.NYUD.list_stems, tmp_path, "train")


def write_pascal(root: Path) -> None:
    """Images of different sizes; those of the test split have no labels of VOC's own."""
    sizes = {"2008_000002": (8, 10), "2008_000004": (9, 7), "2008_000005": (7, 9)}
    put(root / "ImageSets/Context/train.txt", [*sizes])
    put(root / "ImageSets/Context/val.txt", ["2008_000003"])
    for stem, size in {**sizes, "2008_000003": (12, 6)}.items():
        put(root / f"JPEGImages/{stem}.jpg", np.zeros((*size, 3), np.uint8))
        label = np.arange(size[0] * size[1], dtype=np.uint8).reshape(size) % 21
        label[0, 0] = 255
        put(root / f"semseg/pascal-context/{stem}.png", label)
        if stem in sizes:
            put(root / f"semseg/VOC12/{stem}.png", np.full(size, 15, np.uint8))
        put(root / f"sal_distill/{stem}.png", np.resize(np.uint8([0, 127, 128, 255]), size))
        parts = [("head", box(0, 0, 3, 3, size))]
        mat(root / f"human_parts/{stem}.mat", ("person", 15, box(0, 0, 4, 4, size), parts))


def test_pascal_layout(tmp_path):
    write_pascal(tmp_path)
    train_sample = data.PASCAL(tmp_path, "train")[0]
    assert (train_sample["semseg"] == 15).all()  # VOC12 comes first
    assert train_sample["sal"][0, 0, :4].tolist() == [0, 0, 1, 1]
    assert train_sample["human_parts"].unique().tolist() == [0, 1]
    val_sample = data.PASCAL(tmp_path, "val")[0]
    assert val_sample["semseg"][0, :3].tolist() == [255, 1, 2]
    assert val_sample["size"].tolist() == [12, 6]
    (tmp_path / "human_parts/2008_000003.mat").unlink()
    refused("human_parts: 1 of 1", data.PASCAL, tmp_path, "val")
    refused("val.txt not found", data.PASCAL, tmp_path / "nowhere", "val")


def test_part_maps_are_cached_and_the_cache_survives(tmp_path, monkeypatch, capsys):
    root = tmp_path / "pascal"
    write_pascal(root)
    cached = root / "human_parts_png/2008_000002.png"
    source = root / "human_parts/2008_000002.mat"

    def parts():
        return data.PASCAL(root, "train")[0]["human_parts"].unique().tolist()

    assert parts() == [0, 1] and cached.is_file()
    with monkeypatch.context() as patch:
        patch.setattr(data, "read_part_objects", lambda path: pytest.fail("decoded again"))
        assert parts() == [0, 1]
    whole = cached.read_bytes()
    for bad in (whole[: len(whole) // 2], b""):
        cached.write_bytes(bad)
        assert parts() == [0, 1] and cached.read_bytes() == whole
        assert "2008_000002.png is made again" in capsys.readouterr().err
    put(cached, np.zeros((8, 10), np.uint8))  # nobody knows what from
    assert parts() == [0, 1]
    # Another source, of an older date, as archives give their files.
    mat(source, ("person", 15, box(0, 0, 4, 4), [("lfoot", box(0, 0, 3, 3))]))
    os.utime(source, (cached.stat().st_mtime - 5000,) * 2)
    assert parts() == [0, 6]


def test_without_a_place_for_a_cache_parts_are_decoded_anew(tmp_path, monkeypatch, capsys):
    """The archive, then the user's folder, then none; as files where folders ought to be."""
    root = tmp_path / "pascal"
    write_pascal(root)
    (root / "human_parts_png").write_text("a colleague's")
    user = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(user))

    def parts():
        data.part_cache.cache_clear()
        samples = [data.PASCAL(root, "train")[0] for _ in range(2)]
        return samples[1]["human_parts"].unique().tolist()

    assert parts() == [0, 1] and capsys.readouterr().err == ""
    assert len(list(user.rglob("*.png"))) == 1
    shutil.rmtree(user)
    user.write_text("no folder")
    assert parts() == [0, 1]
    said = capsys.readouterr().err
    assert said.startswith("human parts are decoded anew in every epoch") and said.count("\n") == 1
    data.part_cache.cache_clear()


def test_labels_a_pixel_or_two_off_are_resized_and_counted(tmp_path, capsys):
    write_pascal(tmp_path)  # the first image has 8 x 10 pixels
    parts = tmp_path / "human_parts/2008_000002.mat"
    semseg = tmp_path / "semseg/VOC12/2008_000002.png"
    mat(parts, ("person", 15, box(0, 0, 9, 9, (9, 9)), [("head", box(0, 0, 9, 3, (9, 9)))]))
    put(semseg, np.tile(np.uint8([1, 2]), (8, 4)))
    sample = data.PASCAL(tmp_path, "train")[0]
    nearest = np.floor((np.arange(10) + 0.5) * 8 / 10).astype(int) % 2 + 1
    close(sample["semseg"], np.tile(nearest, (8, 1)), 0)
    assert sample["human_parts"].shape == (8, 10)
    assert data.check(data.PASCAL, tmp_path, tmp_path / "sheet.png") == 0
    assert capsys.readouterr().out.count("1 labels a pixel or two off their image's size") == 2
    put(semseg, np.zeros((8, 7), np.uint8))
    refused("2008_000002.png is .* archives were mixed", data.PASCAL(tmp_path, "train").read,
            "2008_000002")  # fmt: skip


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_file_is_named_in_one_sentence(tmp_path, workers):
    write_nyud(tmp_path, "NYUD_MT")
    (tmp_path / "depth/0007.npy").write_bytes(b"torn")
    loader = data.make_loader(data.NYUD(tmp_path, "train"), 1, False, 0, workers)
    with pytest.raises(data.DataError) as error:
        list(loader)
    said = str(error.value)
    assert said.startswith(f"{tmp_path}/depth/0007.npy cannot be read") and "\n" not in said


def test_hold_out_splits_without_overlap():
    stems = [str(i) for i in range(40)]
    keep, held_out = data.hold_out(stems, 0.05)
    assert keep + held_out == stems and len(held_out) == 2
    assert data.hold_out(stems, 0.0) == (stems[:-1], stems[-1:])  # one at least


# ==================================================================================================
# data.py: transforms
# ==================================================================================================


def a_sample(H=12, W=16) -> dict:
    torch.manual_seed(0)
    return {
        "image": torch.rand(3, H, W), "name": "x", "size": torch.tensor([H, W]),
        "semseg": torch.randint(0, 40, (H, W)), "depth": torch.rand(1, H, W) + 1,
        "normals": F.normalize(torch.randn(3, H, W), dim=0),
        "human_parts": torch.randint(0, 7, (H, W)), "sal": torch.randint(0, 2, (1, H, W)).float(),
    }  # fmt: skip


def geometry(index: int, H: int, W: int, world="rooms") -> dict:
    """Depth and normals of a rendered scene, as a sample."""
    scene = data.render(world, 0, index, H, W)
    normals = torch.from_numpy(scene["normals"]).permute(2, 0, 1)
    depth = torch.from_numpy(scene["depth"])[None]
    return {"image": torch.zeros(3, H, W), "depth": depth, "normals": normals}


def normals_error(sample: dict, intrinsics: tuple) -> np.ndarray:
    """Degrees between normals and those of depth by cross products, where the surface is smooth."""
    depth = sample["depth"][0].numpy()
    normals = sample["normals"].permute(1, 2, 0).numpy()
    fx, fy, cx, cy = intrinsics
    v, u = np.mgrid[: depth.shape[0], : depth.shape[1]]
    # right, forward, up
    points = np.stack([(u - cx) * depth / fx, depth, -(v - cy) * depth / fy], axis=-1)
    along_u = points[1:-1, 2:] - points[1:-1, :-2]
    along_v = points[2:, 1:-1] - points[:-2, 1:-1]
    n = np.cross(along_u, along_v)
    n /= np.maximum(np.linalg.norm(n, axis=2, keepdims=True), 1e-9)
    n *= -np.sign((n * points[1:-1, 1:-1]).sum(axis=2, keepdims=True))  # towards the camera
    smooth = depth > 0
    for axis in (0, 1):
        bend = np.roll(depth, 1, axis) + np.roll(depth, -1, axis) - 2 * depth
        smooth &= np.abs(bend) < 0.02
        for step in (1, -1):
            smooth &= np.abs(np.roll(normals, step, axis) - normals).max(axis=2) < 0.05
    smooth = smooth[1:-1, 1:-1]
    assert smooth.mean() > 0.3
    cosine = (n * normals[1:-1, 1:-1]).sum(axis=2)
    return np.degrees(np.arccos(np.clip(cosine, -1, 1)))[smooth]


def test_flip_agrees_with_geometry_and_twice_is_identity():
    """The normals computed from the flipped depth are the flipped normals."""
    fx, fy, cx, cy = data.nyu_intrinsics(48, 64)
    # The mirrored camera has its principal point mirrored too.
    angle = normals_error(data.flip(geometry(3, 48, 64)), (fx, fy, 63 - cx, cy))
    assert np.median(angle) < 1
    sample = a_sample()
    once = data.flip(sample)
    twice = data.flip(once)
    for key in ("image", *data.LABELS):
        assert torch.equal(sample[key], twice[key]) and not torch.equal(sample[key], once[key])


def test_zoom_divides_depth_and_keeps_the_centre():
    sample = a_sample(13, 17)
    sample["depth"][0, 6, 8] = 3.0
    sample["semseg"][6, 8] = 7
    zoomed = data.zoom(sample, 1.5)
    assert zoomed["depth"].shape == (1, 13, 17)
    assert zoomed["depth"][0, 6, 8].item() == 2.0 and zoomed["semseg"][6, 8] == 7
    assert torch.equal(data.zoom(sample, 1.0)["depth"], sample["depth"])


def test_rotation_turns_pixels_and_normals_the_same_way():
    """A quarter turn anticlockwise is torch.rot90; what pointed right points up."""
    sample = a_sample(12, 12)
    turned = data.rotate(sample, 90.0)
    for key in ("image", "semseg", "depth", "human_parts", "sal"):
        close(turned[key], torch.rot90(sample[key], 1, (-2, -1)), 1e-4)
    right, forward, up = torch.rot90(sample["normals"], 1, (-2, -1))
    close(turned["normals"], torch.stack([-up, forward, right]), 1e-5)
    close(data.rotate(turned, -90.0)["normals"], sample["normals"], 1e-5)


@pytest.mark.parametrize("degrees", [-20, 15])
def test_rotation_agrees_with_geometry(degrees):
    """Normals computed from the rotated depth are the rotated normals."""
    turned = data.rotate(geometry(3, 384, 512), degrees)
    # The principal point of NYU's camera is near the centre of the picture: it turns too.
    cos = math.cos(math.radians(degrees))
    sin = math.sin(math.radians(degrees))
    fx, fy, cx, cy = data.nyu_intrinsics(384, 512)
    dx = cx - 255.5
    dy = cy - 191.5
    cx = 255.5 + cos * dx + sin * dy
    cy = 191.5 - sin * dx + cos * dy
    # Labels take the nearest pixel, which makes small steps in depth: average 4x4 pixels.
    pooled = {key: F.avg_pool2d(turned[key], 4) for key in ("depth", "normals")}
    intrinsics = (fx / 4, fy / 4, (cx + 0.5) / 4 - 0.5, (cy + 0.5) / 4 - 0.5)
    assert np.median(normals_error(pooled, intrinsics)) < 2


def test_rotation_ignores_what_comes_from_outside():
    sample = a_sample()
    small = data.rotate(sample, 0.0, scale=0.5)
    for key, row in data.LABELS.items():
        assert (small[key][..., 0, 0] == row.outside).all(), key
        assert row.valid(small[key])[[0, 6], [0, 8]].tolist() == [False, True], key
    close(data.rotate(sample, 0.0, scale=2.0)["depth"][0, 6, 8], sample["depth"][0, 6, 8] / 2)


def test_resize_invents_no_label():
    sample = a_sample()
    sample["depth"][:, ::2] = 0
    small = data.resize(sample, (7, 9))
    assert small["image"].shape == (3, 7, 9) and small["semseg"].dtype == torch.int64
    for key in ("semseg", "depth", "human_parts", "sal"):
        assert set(small[key].flatten().tolist()) <= set(sample[key].flatten().tolist())
    close(small["normals"].norm(dim=0), torch.ones(7, 9))
    assert data.resize_image(sample, (7, 9))["depth"].shape == (1, 12, 16)


def test_augmentation_depends_on_seed_epoch_and_index_alone(tmp_path):
    write_nyud(tmp_path, "NYUDv2", size=(24, 32))
    augment = partial(data.augment, scales=(1.0, 1.2, 1.5), degrees=0, jitter=0.2, size=None)

    def images(seed, epoch, workers):
        dataset = data.NYUD(tmp_path, "train", transform=augment, seed=seed)
        dataset.epoch = epoch
        loader = data.make_loader(dataset, 1, shuffle=True, seed=5, workers=workers)
        return torch.cat([batch["image"] for batch in loader])

    assert torch.equal(images(0, 1, workers=0), images(0, 1, workers=2))
    assert not torch.equal(images(0, 1, 0), images(0, 2, 0))
    assert not torch.equal(images(0, 1, 0), images(1, 1, 0))


# ==================================================================================================
# data.py: the rendered world
# ==================================================================================================


@pytest.fixture(scope="module")
def scenes() -> dict[str, list[dict]]:
    return {w: [data.render(w, 0, i, 48, 64) for i in range(40)] for w in ("rooms", "figures")}


WORLDS = pytest.mark.parametrize("name", ["rooms", "figures"])


@WORLDS
@pytest.mark.parametrize("index", range(6))
def test_rendered_normals_are_those_of_the_rendered_depth(name, index):
    sample = geometry(index, 96, 128, name)
    fx, fy, cx, cy = data.nyu_intrinsics(96, 128)
    angle = normals_error(sample, (fx, fy, cx, cy))
    # Exact on planes; on balls of a dozen pixels' radius, a difference of neighbours is off by a
    # few degrees.
    assert np.median(angle) < 0.1 and np.percentile(angle, 95) < 5
    length = sample["normals"].norm(dim=0)
    close(length, sample["depth"][0] != 0)
    # What faces away from the camera cannot be seen.
    v, u = np.mgrid[:96, :128]
    rays = np.stack([(u - cx) / fx, np.ones(u.shape), (cy - v) / fy])
    assert (sample["normals"].numpy() * rays).sum(axis=0).max() < 1e-3


@WORLDS
def test_labels_of_a_scene_agree(scenes, name, tmp_path):
    same = {"chair": "chair", "sofa": "sofa", "diningtable": "table", "person": "person"}
    same["tvmonitor"] = "television"
    for scene in scenes[name][:6]:
        for voc, nyud in same.items():
            in_voc = scene["voc"] == data.VOC_CLASSES.index(voc)
            in_nyud = scene["nyud"] == data.NYUD_CLASSES.index(nyud) + 1
            # They differ only where one of the two says nothing.
            differ = (in_voc & (scene["nyud"] > 0)) != (in_nyud & (scene["voc"] < IGNORE_INDEX))
            assert not differ.any()
        covered = np.zeros((48, 64), int)
        people = np.zeros((48, 64), int)
        drawn = []
        for thing in scene["objects"]:
            covered += thing["mask"]
            voc = set(np.unique(scene["voc"][thing["mask"] == 1]))
            assert voc <= {thing["class_index"], IGNORE_INDEX}
            assert data.VOC_CLASSES[thing["class_index"]] == thing["class_name"]
            parts = sum((mask.astype(int) for _, mask in thing["parts"]), np.zeros((48, 64), int))
            assert (parts <= thing["mask"]).all()  # inside, and disjoint
            if thing["class_name"] == "person":
                people += thing["mask"]
                drawn += thing["parts"]
        assert covered.max() <= 1
        assert (covered[(scene["voc"] > 0) & (scene["voc"] < IGNORE_INDEX)] == 1).all()
        assert not people.any() or np.mean((scene["saliency"] > 127) != people) < 0.02
        with open(tmp_path / "x.mat", "wb") as f:
            data.write_part_mat(f, "x", scene["objects"])
        expected = np.full((48, 64), 0 if drawn else IGNORE_INDEX)
        for part, mask in drawn:
            expected[mask == 1] = data.PART_LABELS[part]
        close(data.read_human_parts(tmp_path / "x.mat", (48, 64)), expected, 0)


@WORLDS
def test_same_seed_same_scene_at_any_size(scenes, name):
    for index in (3, 5):
        scene = scenes[name][index]
        again = data.render(name, 0, index, 48, 64)
        assert all(np.array_equal(again[k], scene[k]) for k in scene if k != "objects")
        for a, b in zip(again["objects"], scene["objects"], strict=True):
            assert np.array_equal(a["mask"], b["mask"]) and str(a["parts"]) == str(b["parts"])
        assert not np.array_equal(data.render(name, 1, index, 48, 64)["image"], scene["image"])
        large = data.render(name, 0, index, 96, 128)
        for key in ("nyud", "voc"):
            assert np.mean(large[key][::2, ::2] == scene[key]) > 0.85


def test_the_world_has_variety(scenes):
    nyud = {c for s in scenes["rooms"] for c in np.unique(s["nyud"])} - {0}
    voc = {c for s in scenes["figures"] for c in np.unique(s["voc"])} - {0, IGNORE_INDEX}
    people = [t for s in scenes["figures"] for t in s["objects"] if t["class_name"] == "person"]
    parts = {data.PART_LABELS[name] for person in people for name, _ in person["parts"]}
    assert len(nyud) >= 10 and len(voc) >= 6 and parts == {1, 2, 3, 4, 5, 6}


@pytest.mark.parametrize("name,key,ignored", [("rooms", "nyud", 0), ("figures", "voc", 255)])
def test_colour_alone_does_not_give_the_class(scenes, name, key, ignored):
    """Each pixel gets the class of the nearest mean colour: mIoU stays below 25 %."""
    colours = np.stack([s["image"] for s in scenes[name]]).astype(float)
    truth = np.stack([s[key] for s in scenes[name]])
    classes = sorted(set(np.unique(truth[:30])) - {ignored})
    means = np.stack([colours[:30][truth[:30] == c].mean(axis=0) for c in classes])
    distance = np.stack([((colours[30:] - m) ** 2).sum(axis=-1) for m in means])
    known = truth[30:] != ignored
    guess = np.array(classes)[distance.argmin(axis=0)][known]
    truth = truth[30:][known]
    hits = [np.sum((guess == c) & (truth == c)) for c in np.unique(truth)]
    either = [np.sum((guess == c) | (truth == c)) for c in np.unique(truth)]
    assert 100 * np.mean(np.divide(hits, either)) < 25


# ==================================================================================================
# data.py: sets on disk, and check
# ==================================================================================================


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[str, Path]:
    """A small one of each world."""
    roots = {name: tmp_path_factory.mktemp("data") / name for name in data.WRITERS}
    for name, root in roots.items():
        data.render_set(name, root, train=12, val=4, size=(64, 96))
    return roots


@pytest.fixture(scope="module")
def rooms(sets) -> Path:
    return sets["rooms"]


def files(root: Path) -> dict[str, bytes]:
    paths = [p for p in sorted(root.rglob("*")) if p.is_file()]
    return {str(p.relative_to(root)): p.read_bytes() for p in paths}


@WORLDS
def test_a_set_cut_short_is_finished_and_nothing_is_overwritten(tmp_path, name):
    a = tmp_path / "a"
    make = partial(data.render_set, name, train=3, val=2, size=(24, 32), seed=7)
    make(a)
    whole = files(a)
    make(tmp_path / "b")
    assert files(tmp_path / "b") == whole and len(whole) == 5 * 4 + 3
    kind = data.DATASETS[name]
    lost = kind(a, "val")
    first, *_, other = lost.readers
    marker = json.loads((a / "rendered.json").read_text())
    # As if killed half way.
    (a / "rendered.json").write_text(json.dumps({**marker, "complete": False}))
    (a / kind.lists["val"]).unlink()
    lost.path("image", lost.stems[1]).unlink()  # it is written last
    lost.path(other, lost.stems[1]).write_bytes(b"torn")
    data.ensure_set(name, a)
    assert files(a) == whole
    refused("wanted", make, a, seed=8)
    refused("wanted", data.ensure_set, "figures" if name == "rooms" else "rooms", a)
    assert files(a) == whole
    lost.path(first, lost.stems[0]).unlink()
    data.ensure_set(name, a)  # any whole set will do; it is not even looked into
    assert len(files(a)) == len(whole) - 1

    (tmp_path / "thesis.txt").write_text("precious")
    refused("not empty", data.render_set, name, tmp_path)
    refused("not empty", data.ensure_set, name, tmp_path)
    (tmp_path / "rendered.json").write_text('{"complete": true, "train": "many"}')
    refused("no valid rendered.json", data.ensure_set, name, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b", "rendered.json", "thesis.txt"}


@pytest.mark.parametrize("file", [
    "images/{}.jpg", "segmentation/{}.png", "depth/{}.npy", "normals/{}.npy", "human_parts/{}.mat",
    "rendered.json", "weights.pt", "weights.safetensors",
])  # fmt: skip
def test_damaged_files_are_refused_or_read_but_never_a_traceback(sets, tmp_path, file):
    """Cut short, with bytes changed, or something else altogether."""
    name = "figures" if "parts" in file else "rooms"
    path = sets[name] / file.format(f"{name}_00000")
    read = {
        "images": partial(data.read_pixels, mode="RGB"), "segmentation": data.read_nyud_semseg,
        "depth": data.read_depth, "normals": data.read_normals,
        "human_parts": partial(data.read_human_parts, size=(64, 96)),
        "rendered.json": lambda path: data.read_marker(path.parent),
    }.get(file.split("/")[0], mtcp.read_weights)  # fmt: skip
    if "weights" in file:
        path = tmp_path / "whole" / file
        path.parent.mkdir()
        save = save_file if path.suffix == ".safetensors" else torch.save
        save({"a": torch.randn(50)}, path)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    refusals = 0
    for i in range(60):
        damaged = np.frombuffer(whole, np.uint8).copy()
        if i % 3 == 0:
            damaged = damaged[: rng.integers(len(whole))]
        elif i % 3 == 1:
            damaged[rng.integers(min(len(whole), 400), size=9)] = rng.integers(256, size=9)
        else:
            damaged = rng.integers(256, size=rng.integers(300)).astype(np.uint8)
        (tmp_path / path.name).write_bytes(damaged.tobytes())
        try:
            read(tmp_path / path.name)
        except (data.DataError, mtcp.WeightsError):
            refusals += 1
    assert refusals >= 30


def test_check_passes_what_is_whole(sets, tmp_path, capsys):
    assert data.check(data.NYUD, sets["rooms"], tmp_path / "rooms.png") == 0
    said = capsys.readouterr().out
    assert "train: 12 stems, layout NYUD_MT" in said and "wall" in said and "no problems" in said
    assert Image.open(tmp_path / "rooms.png").width > 4 * 100
    assert data.check(data.PASCAL, sets["figures"], tmp_path / "figures.png") == 0


def test_check_finds_what_is_broken(tmp_path, capsys, monkeypatch):
    root = tmp_path / "n"
    write_nyud(root, "NYUD_MT")
    (root / "segmentation/0011.png").unlink()
    np.save(root / "normals/0003.npy", np.full((6, 8, 3), 0.9, np.float32))
    (root / "depth/0007.npy").write_bytes(b"")
    assert data.check(data.NYUD, root, tmp_path / "sheet.png") >= 3
    said = capsys.readouterr().out
    assert "val semseg: 1 of 1 files missing" in said
    assert "0003.npy holds vectors that are not unit vectors" in said
    assert "0007.npy cannot be read" in said
    write_nyud(tmp_path / "m", "NYUD_MT")
    (tmp_path / "m/images/0003.jpg").write_bytes(b"")  # the first one tells the size of all
    assert data.check(data.NYUD, tmp_path / "m", tmp_path / "sheet.png") >= 1
    said = capsys.readouterr().out
    assert "0003.jpg is no readable image" in said and "not one valid" not in said
    for flags, status in (
        (f"check --root {root} --sheet {tmp_path / 'sheet.png'}", 1),
        (f"check --root {root} --sheet {tmp_path / 'sheets/sheet.png'}", 1),
        (f"check --root {tmp_path / 'nowhere'}", 1),
        (f"rooms --out {tmp_path / 'new'} --train 0", 2), (f"rooms --out {root}", 2),
    ):  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["data.py", *flags.split()])
        assert data.main() == status
    assert not (tmp_path / "new").exists()


def test_check_says_the_same_thing_once(tmp_path, capsys, monkeypatch):
    write_nyud(tmp_path, "NYUD_MT")
    for stem, depth in (("0003", 2000), ("0007", 3141), ("0011", 2718)):
        np.save(tmp_path / f"depth/{stem}.npy", np.full((6, 8), float(depth)))
    put(tmp_path / "gt_sets/val.txt", ["0011", "0003"])
    sheet = tmp_path / "file/sheet.png"
    (tmp_path / "file").write_text("")
    flags = ["check", "--root", str(tmp_path), "--sheet", str(sheet)]
    monkeypatch.setattr(sys, "argv", ["data.py", *flags])
    assert data.main() == 1
    said = capsys.readouterr().out
    assert said.count("millimetres") == 2 and said.count("(and 1 more files like it)") == 2
    assert "1 images are in the training list and in the test list, the first is 0003" in said


def test_check_knows_the_axes_of_normals(rooms, tmp_path, capsys):
    root = tmp_path / "rooms"
    shutil.copytree(rooms, root)
    assert data.check(data.NYUD, root, tmp_path / "sheet.png") == 0
    for axes in (
        "right, down, towards the camera",
        "right, forward, down",
        "left, forward, up",
        "up, left, towards the camera",
    ):
        for file in (root / "normals").iterdir():
            right, forward, up = np.moveaxis(np.load(rooms / "normals" / file.name), 2, 0)
            known = {"right": right, "left": -right, "down": -up, "up": up}
            known |= {"forward": forward, "towards the camera": -forward}
            np.save(file, np.stack([known[axis] for axis in axes.split(", ")], axis=2))
        capsys.readouterr()
        assert data.check(data.NYUD, root, tmp_path / "sheet.png") == 1
        said = capsys.readouterr().out
        assert f"normals do not fit the depth: their axes seem to be {axes}; expec" in said


# ==================================================================================================
# data.py: contract for change. A made-up task and a made-up dataset go all the way
# ==================================================================================================

OUTLINE = mtcp.Task("outline", 1, "logits", "balanced_bce", "maxF", +1)
STREET_TASKS = (*NYUD_TASKS, OUTLINE)


def read_outline(path: Path) -> np.ndarray:
    return (data.read_pixels(path, "L") > 127).astype(np.float32)[None]


class Street(data.DenseDataset):
    lists = {"train": "splits/train.lst", "val": "splits/test.lst"}
    layouts = {"STREET": {
        "image": "left/{}.png", "semseg": "classes/{}.png", "depth": "metres/{}.npy",
        "normals": "normals/{}.npy", "outline": "fine/{}.png | coarse/{}.png",
    }}  # fmt: skip
    readers = {**data.NYUD.readers, "outline": read_outline}
    classes = {"semseg": data.NYUD_CLASSES}
    one_size = True
    help = "expected below {root}: splits/train.lst, left/STEM.png"


@pytest.fixture
def street(tmp_path, monkeypatch) -> Path:
    """The dataset on disk, and the three rows that make it known."""
    valid = lambda x: x[0] != IGNORE_INDEX  # noqa: E731
    monkeypatch.setitem(data.LABELS, "outline", data.Label(IGNORE_INDEX, valid, data.grey_picture))
    monkeypatch.setitem(data.DATASETS, "street", Street)
    monkeypatch.setitem(train.RECIPES, "street", train.Recipe(STREET_TASKS, epochs=1))
    root = tmp_path / "street"
    put(root / "splits/train.lst", [*"abcde"])
    put(root / "splits/test.lst", [*"fg"])
    for index, stem in enumerate("abcdefg"):
        scene = data.render("rooms", 0, index, 64, 96)
        edge = np.zeros((64, 96), np.uint8)
        edge[:, 1:] = 255 * (scene["nyud"][:, 1:] != scene["nyud"][:, :-1])
        put(root / f"left/{stem}.png", scene["image"])
        put(root / f"classes/{stem}.png", scene["nyud"])
        put(root / f"metres/{stem}.npy", scene["depth"])
        put(root / f"normals/{stem}.npy", scene["normals"])
        put(root / f"{'fine' if stem < 'c' else 'coarse'}/{stem}.png", edge)
    return root


def test_a_new_task_and_dataset_are_read_augmented_checked_and_shown(street, tmp_path, capsys):
    dataset = Street(street, "train")
    sample = dataset[0]
    stored = np.array(Image.open(street / "fine/a.png"))
    close(sample["outline"], stored[None] / 255)
    assert stored.any()
    assert dataset.intrinsics() is None
    assert torch.equal(data.flip(sample)["outline"], sample["outline"].flip(-1))
    turned = data.rotate(sample, 15.0)["outline"]
    assert set(turned.unique().tolist()) == {0, 1, IGNORE_INDEX}
    assert torch.equal(data.zoom(sample, 1.0)["outline"], sample["outline"])
    assert set(data.zoom(sample, 1.5)["outline"].unique().tolist()) == {0, 1}
    augment = partial(data.augment, scales=(1.0, 1.5), degrees=10, jitter=0.1, size=(32, 48))
    assert Street(street, "train", transform=augment)[3]["outline"].shape == (1, 32, 48)
    assert data.picture("outline", sample["outline"]).shape == (64, 96, 3)

    assert data.check(Street, street, tmp_path / "sheet.png") == 0
    assert "outline: 100.0% of the pixels valid, values 0 to 1, mean 0.0" in capsys.readouterr().out
    (street / "coarse/d.png").unlink()
    refused(r"outline: 1 of 5 \(first: .*coarse/d.png\)", Street, street, "train")
    refused("train.lst not found; expected below .*left/STEM.png", Street, tmp_path, "train")


def test_a_new_task_and_dataset_are_trained_and_evaluated(street, tmp_path):
    report = run(street, tmp_path / "run", "--dataset", "street")
    tasks = {"semseg", "depth", "normals", "outline"}
    assert set(report["test"]) == tasks  # no coherence: the camera is not known
    assert report["dataset"] == "street" and 0 <= report["test"]["outline"]["maxF"] <= 100
    log = json.loads((tmp_path / "run/log.jsonl").read_text())
    assert set(log["weight"]) == tasks and log["loss"]["outline"] > 0
    # "Edge everywhere" finds them all, and is right in this share of the pixels.
    share = torch.stack([s["outline"] for s in Street(street, "val")]).mean().item()
    close(report["trivial"]["outline"]["maxF"], 100 * 2 * share / (share + 1), 1e-2)
    sheet = Image.open(tmp_path / "run/predictions.png")
    assert sheet.width >= (1 + 2 * 4) * 288  # 96 x 64 pixels, shown 192 high


# ==================================================================================================
# data.py: NYUD-v2 from its official file
# ==================================================================================================


def rays() -> tuple[np.ndarray, np.ndarray]:
    """(480,640,3) each: camera rays of forward component 1 (right, forward, up); the same, unit."""
    v, u = np.mgrid[:480, :640]
    x = (u - 325.58) / 518.86
    ray = np.stack([x, np.ones_like(x), -(v - 253.74) / 519.47], axis=-1)
    return ray, ray / np.linalg.norm(ray, axis=-1, keepdims=True)


def degrees_between(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.degrees(np.arccos(np.clip((a * b).sum(axis=-1), -1, 1)))


@pytest.mark.parametrize("normal", [(0, -1, 0), (0.6, -0.8, 0), (0, -0.28, 0.96)])
def test_fitted_normals_of_a_plane(normal):
    ray, _ = rays()
    facing = ray @ np.array(normal)  # depth · facing is the same at all points of the plane
    depth = np.where(facing < -0.1, -1.5 / np.minimum(facing, -0.1), 15).astype(np.float32)
    error = degrees_between(data.fit_normals(depth), np.array(normal))
    inside = F.max_pool2d(torch.from_numpy(facing >= -0.1)[None].float(), 31, 1, 15)[0] == 0
    assert inside.float().mean() > 0.3
    assert error[inside.numpy()].max() < 0.1  # also at the image's border


def test_fitted_normals_of_a_sphere_before_a_wall():
    ray, unit = rays()
    centre = np.array([0.1, 3.0, -0.1])
    along = unit @ centre
    gap = along**2 - (centre @ centre - 1)
    on_sphere = gap > 0
    point = unit * (along - np.sqrt(np.maximum(gap, 0)))[..., None]
    depth = np.where(on_sphere, point[..., 1], 5).astype(np.float32)
    normals = data.fit_normals(depth)
    true = point - centre
    steep = -(true * unit).sum(axis=-1)  # 1 where it faces the camera
    assert degrees_between(normals, true)[on_sphere & (steep > 0.5)].mean() < 1
    # The sphere's outline is an edge: the wall behind it stays flat up to a pixel away from it.
    wall = F.max_pool2d(torch.from_numpy(on_sphere)[None].float(), 3, 1, 1)[0].numpy() == 0
    assert degrees_between(normals, np.array([0, -1, 0]))[wall].max() < 0.1
    close(np.linalg.norm(normals, axis=-1), np.ones((480, 640)))


def write_official(path: Path, n: int = 3, **changes) -> dict[str, np.ndarray]:
    """A file of the official structure with n images; returns the arrays as MATLAB has them."""
    h5py = pytest.importorskip("h5py")  # CI installs it
    rng = np.random.default_rng(0)
    v, u = np.mgrid[:480, :640]
    image = np.stack([v % 256, u % 256, (v // 2 + u // 4) % 256], axis=2)
    arrays = {  # (H,W,…,n)
        "images": image[..., None].astype(np.uint8),
        "depths": (2 + v / 480 + u / 640)[..., None].astype(np.float32),
        "labels": rng.integers(0, 895, (480, 640, 1), dtype=np.uint16),
    }
    arrays = {key: np.repeat(a, n, axis=-1) for key, a in arrays.items()}
    arrays["depths"] = arrays["depths"] + np.arange(n, dtype=np.float32)
    with h5py.File(path, "w") as file:
        for key, a in {**arrays, **changes}.items():
            if a is not None:
                file[key] = a.T  # as h5py shows what MATLAB wrote
    return arrays


def test_official_file_becomes_an_archive(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "NYUD_IMAGES", 3)
    out = tmp_path / "nyud"
    truth = write_official(tmp_path / "a.mat")
    data.convert_nyud(tmp_path / "a.mat", out)
    assert data.NYUD.list_stems(out, "train") == ["0003"]
    assert data.NYUD.list_stems(out, "val") == ["0001", "0002"]
    sample = data.NYUD(out, "val").read("0002")
    assert sample["size"].tolist() == [480, 640]
    close(sample["depth"][0], truth["depths"][..., 1])
    image = sample["image"].permute(1, 2, 0).numpy() * 255
    smooth = np.s_[10:240, 10:240]  # without the jumps from 255 to 0, which JPEG rings around
    assert np.abs(image - truth["images"][..., 1])[smooth].max() < 8
    labels, semseg = truth["labels"][..., 1], sample["semseg"]
    assert (semseg[labels == 0] == IGNORE_INDEX).all()
    # wall, floor, cabinet, bed, chair, sofa, table, door, window in the file's own list of names
    for original, name in zip((21, 11, 3, 157, 5, 83, 19, 28, 59), data.NYUD_CLASSES, strict=False):
        assert (semseg[labels == original] == data.NYUD_CLASSES.index(name)).all()
    normals = sample["normals"]
    fitted = torch.from_numpy(data.fit_normals(truth["depths"][..., 1])).permute(2, 0, 1)
    close(normals[:, 44:471, 40:601], fitted[:, 44:471, 40:601], 1e-3)
    normals[:, 44:471, 40:601] = 0
    assert normals.abs().max() == 0

    # Cut off in the middle: what is there stays, what is missing is made.
    before = (out / "images/0001.jpg").stat().st_mtime_ns
    (out / "images/0002.jpg").unlink()
    data.convert_nyud(tmp_path / "a.mat", out)
    assert (out / "images/0002.jpg").is_file()
    assert (out / "images/0001.jpg").stat().st_mtime_ns == before


def test_official_split_and_classes():
    training = {i + 1 for i in range(1449) if data.NYUD_TRAINING >> i & 1}
    assert len(training) == 795 and data.NYUD_TRAINING < 1 << 1449
    assert {3, 4, 5, 6, 8, 11} <= training and not {1, 2, 9, 14, 1449} & training
    assert len(data.NYUD_CLASS_OF) == 894
    assert {ord(c) - ord("0") for c in data.NYUD_CLASS_OF} == set(range(1, 41))


def test_what_is_not_the_official_file_is_refused(tmp_path, monkeypatch):
    pytest.importorskip("h5py")
    path = tmp_path / "b.mat"
    refused("b.mat not found", data.convert_nyud, path, tmp_path / "out")
    path.write_bytes(b"MATLAB 5.0 MAT-file" * 100)
    refused("b.mat cannot be read as HDF5", data.convert_nyud, path, tmp_path / "out")
    write_official(path, 2)
    refused(r"b.mat holds .*\(2, 3, 640, 480\)", data.convert_nyud, path, tmp_path / "out")
    monkeypatch.setattr(data, "NYUD_IMAGES", 2)
    write_official(path, 2, labels=None)
    refused("'labels': None", data.convert_nyud, path, tmp_path / "out")
    whole = write_official(path, 2)
    path.write_bytes(path.read_bytes()[:-1000])
    refused("cannot be read as HDF5 .*truncated", data.convert_nyud, path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    write_official(path, 2, depths=whole["depths"] * 0)
    refused("depth of image 0001 has holes", data.convert_nyud, path, tmp_path / "out")
    path = tmp_path / "c.mat"
    write_official(path, 2, labels=whole["labels"] + 1000)
    refused("made from another file", data.convert_nyud, path, tmp_path / "out")
    refused("0001 has class 1[0-9]{3}", data.convert_nyud, path, tmp_path / "out2")
    put(tmp_path / "mine/gt_sets/train.txt", ["0001"])
    refused("mine is not empty", data.convert_nyud, path, tmp_path / "mine")
    assert not list((tmp_path / "out").rglob("*.txt"))  # half an archive is not taken for one


# ==================================================================================================
# train.py: metrics
# ==================================================================================================


def test_miou_against_brute_force():
    torch.manual_seed(0)
    metric = train.SegmentationMetric(replace(NYUD_TASKS[0], channels=5))
    logits = torch.randn(3, 2, 5, 4, 6)
    target = torch.randint(0, 4, (3, 2, 4, 6))  # class 4: predicted, never true
    target[:, :, 0] = IGNORE_INDEX
    for batch in zip(logits, target, strict=True):
        metric.update(*batch)
    pairs = zip(logits.argmax(2).flatten().tolist(), target.flatten().tolist(), strict=True)
    pairs = [(p, t) for p, t in pairs if t != IGNORE_INDEX]
    iou = []
    for c in range(4):
        both = sum(p == c and t == c for p, t in pairs)
        iou.append(both / sum(p == c or t == c for p, t in pairs))
    close(metric.compute()["mIoU"], 100 * sum(iou) / 4)
    close(metric.compute()["pixel_acc"], 100 * sum(p == t for p, t in pairs) / len(pairs))


def test_depth_metrics_by_hand():
    metric = train.DepthMetric(NYUD_TASKS[1])
    metric.update(torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2))
    assert math.isnan(metric.compute()["rmse"])  # of nothing
    metric.update(torch.tensor([[[[1.0, 5.0]]]]), torch.tensor([[[[2.0, 0.0]]]]))
    metric.update(torch.tensor([[[[4.0, 9.0]]]]), torch.tensor([[[[2.0, 6.6]]]]))
    close(metric.compute()["rmse"], math.sqrt((1 + 4 + 2.4**2) / 3))
    close(metric.compute()["rmse_lt6.55"], math.sqrt((1 + 4) / 2))
    close(metric.compute()["abs_rel"], (1 / 2 + 2 / 2 + 2.4 / 6.6) / 3)
    metric.update(torch.tensor([[[[4.0]]]]), torch.tensor([[[[4.9]]]]))
    close(metric.compute()["delta_1.25"], 100 / 4)


def test_normals_metric_against_brute_force():
    torch.manual_seed(0)
    metric = train.NormalsMetric(NYUD_TASKS[2])
    assert math.isnan(metric.compute()["mean"])  # of nothing
    a, b = F.normalize(torch.randn(2, 2, 2, 3, 5, 7), dim=3)
    a[..., 1, :] = F.normalize(b[..., 1, :] + 0.1, dim=2)  # some small angles
    b[..., 0, :] = 0
    for batch in zip(a, b, strict=True):
        metric.update(*batch)
    cosine = (a * b).sum(dim=2)[..., 1:, :].double().clamp(-1, 1)
    angles = np.degrees(np.arccos(cosine.numpy())).ravel()
    out = metric.compute()
    close(out["mean"], np.mean(angles), 1e-3)
    close(out["median"], np.sort(angles)[(len(angles) - 1) // 2], 0.011)  # bins of 0.01°
    for limit in (11.25, 22.5, 30):
        close(out[f"below_{limit}"], 100 * np.mean(angles < limit))


def test_saliency_against_brute_force():
    torch.manual_seed(0)
    metric = train.SaliencyMetric(PASCAL_TASKS[2])
    logits = torch.randn(2, 2, 1, 6, 7) * 2
    target = (torch.rand(2, 2, 1, 6, 7) > 0.6).float()
    target[..., 0, :] = IGNORE_INDEX
    for batch in zip(logits, target, strict=True):
        metric.update(*batch)
    p = torch.sigmoid(logits)[..., 1:, :].reshape(4, -1).numpy()  # of four images
    truth = target[..., 1:, :].reshape(4, -1).numpy() == 1

    def precision_recall(predicted, truth):
        hits = np.sum(predicted & truth)
        return [hits / np.sum(x) if np.sum(x) else 0 for x in (predicted, truth)]

    best = 0
    for threshold in np.linspace(0.2, 0.9, 15):
        each = [precision_recall(p[i] > threshold, truth[i]) for i in range(4)]
        P, R = np.mean(each, axis=0)
        best = max(best, 2 * P * R / (P + R))
    close(metric.compute()["maxF"], 100 * best, 1e-3)
    best = 0
    for threshold in np.arange(0.05, 0.96, 0.05):
        P, R = precision_recall(p >= threshold, truth)
        best = max(best, 1.3 * P * R / (0.3 * P + R) if P + R else 0)
    close(metric.compute()["maxF_pooled"], 100 * best, 1e-3)


def test_score_with_mixed_directions():
    reference = {"semseg": {"mIoU": 40.0}, "depth": {"rmse": 0.5}, "normals": {"mean": 20.0}}
    results = {"semseg": {"mIoU": 44.0}, "depth": {"rmse": 0.6}, "normals": {"mean": 19.0}}
    close(train.score(NYUD_TASKS, results, reference), (10 - 20 + 5) / 3)
    results["depth"]["rmse"] = math.nan  # a mean over fewer tasks would be another figure
    assert math.isnan(train.score(NYUD_TASKS, results, reference))


# ==================================================================================================
# train.py: coherence
# ==================================================================================================


def test_geometric_coherence_of_the_truth_is_near_zero_degrees():
    coherence = train.GeometricCoherence(data.nyu_intrinsics(96, 128))
    tilted = train.GeometricCoherence(data.nyu_intrinsics(96, 128))
    for index in range(3):
        sample = geometry(index, 96, 128)
        truth = {key: sample[key][None] for key in ("depth", "normals")}
        coherence.update(truth, truth)
        # forward and up exchanged
        tilted.update({**truth, "normals": truth["normals"][:, [0, 2, 1]]}, truth)
    out = coherence.compute()
    assert out["normal_angle"] < 3 and out["normal_angle"] == out["normal_angle_truth"]
    assert tilted.compute()["normal_angle"] > 45


def test_semantic_coherence_by_hand():
    coherence = train.SemanticCoherence()
    semseg = torch.tensor([[[0, 15, 15, 7]]])
    parts = torch.tensor([[[1, 2, 0, 0]]])
    y = {
        "semseg": F.one_hot(semseg, 21).permute(0, 3, 1, 2).float(),
        "human_parts": F.one_hot(parts, 7).permute(0, 3, 1, 2).float(),
        "sal": torch.tensor([[[[1.0, 1.0, 1.0, -1.0]]]]),
    }
    truth = {
        "semseg": semseg,
        "human_parts": torch.tensor([[[0, 1, 255, 0]]]),
        "sal": torch.tensor([[[[0.0, 1, 1, 255]]]]),
    }
    coherence.update(y, truth)
    out = coherence.compute()
    close(out["parts_on_person"], 50.0)
    close(out["salient_on_object"], 200 / 3)
    assert out["parts_on_person_truth"] == 100 and out["salient_on_object_truth"] == 100


# ==================================================================================================
# train.py: evaluation
# ==================================================================================================


def test_trivial_predictor(tmp_path):
    write_nyud(tmp_path, "NYUD_MT")
    dataset = data.NYUD(tmp_path, "train")
    constant = train.ConstantPredictor(NYUD_TASKS, data.make_loader(dataset, 2, False, 0, 0))
    out = constant(torch.zeros(1, 3, 6, 8))
    samples = [dataset[0], dataset[1]]
    depth = torch.cat([s["depth"][s["depth"] > 0] for s in samples])
    close(out["depth"]["final"], depth.mean().expand(1, 1, 6, 8))
    classes = torch.cat([s["semseg"].flatten() for s in samples])
    count = classes[classes != IGNORE_INDEX].bincount(minlength=40)
    assert count[out["semseg"]["final"].argmax(1)[0, 0, 0]] == count.max()
    mean = sum(s["normals"].sum(dim=(1, 2)) for s in samples)
    close(out["normals"]["final"][0, :, 0, 0], mean / mean.norm())


def test_evaluation_is_at_the_labels_resolution():
    normals = F.normalize(torch.randn(1, 3, 4, 4), dim=1)
    y = train.at_label_size(NYUD_TASKS[2], normals, torch.zeros(1, 3, 9, 7))
    close(y.norm(dim=1), torch.ones(1, 9, 7))


def test_the_backbone_has_a_learning_rate_of_its_own():
    model = MTCP(NYUD_TASKS, TOY)
    recipe = replace(train.RECIPES["rooms"], backbone_lr=0.1, warmup=4)
    optimizer, scheduler = train.make_optimizer(model, LPS(model.names, 1.6), 1e-3, 10, recipe)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    for _ in range(6):
        rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
        for name, p in model.named_parameters():
            slower = 0.1 if name.startswith("backbone.net.") else 1
            close(rates[id(p)], 1e-3 * slower * train.lr_factor(scheduler.last_epoch, 10, 4), 1e-9)
        optimizer.step()
        scheduler.step()


def test_small_has_recipes_of_its_own_on_real_data():
    args = train.parse_args(["--dataset", "nyud", "--preset", "small", "--start", "file"])
    assert (args.size, args.lr, args.batch_size) == ((192, 256), 3e-4, 4)
    assert train.parse_args(["--dataset", "nyud", "--start", "file"]).size is None
    rooms = train.parse_args(["--preset", "small", "--start", "file"])
    assert (rooms.size, rooms.lr, rooms.epochs) == (None, 3e-4, 5)
    assert (args.mask_epochs, rooms.mask_epochs) == (3, 3)
    assert train.parse_args(["--dataset", "pascal", "--start", "file"]).mask_epochs == 0
    for dataset in ("nyud", "rooms"):  # 1e-5 for the backbone
        recipe = train.find_recipe(dataset, "small")
        close(recipe.lr * recipe.backbone_lr, 1e-5, 1e-9)


def test_schedule():
    assert train.lr_factor(0, 100, 0) == 1 and train.lr_factor(100, 100, 0) == 0
    close(train.lr_factor(50, 100, 0), 0.5**0.9)
    close(train.lr_factor(0, 100, 9), 0.1)
    assert train.lr_factor(101, 100, 0) == 0


# ==================================================================================================
# train.py: runs
# ==================================================================================================

CPU = ("--batch-size", "4", "--workers", "0", "--device", "cpu", "--mask-epochs", "0")


def run(root: Path, out: Path, *flags) -> dict:
    command = ["--root", root, *CPU, "--out", out, *flags]
    return train.main(train.parse_args([str(c) for c in command]))


def test_the_shared_part_learns_masks_first(rooms, tmp_path, monkeypatch, capsys):
    changed = []
    learn_masks = train.learn_masks

    def watched(model, *rest):
        before = {n: x.clone() for n, x in model.state_dict().items()}
        learn_masks(model, *rest)
        after = model.state_dict()
        changed.append({n.split(".")[0] for n, x in before.items() if not torch.equal(x, after[n])})

    monkeypatch.setattr(train, "learn_masks", watched)
    flags = ("--tasks", "depth", "--epochs", "1", "--mask-epochs", "3")
    whole = run(rooms, tmp_path / "a", *flags)
    assert changed == [{"backbone", "pixel_decoder", "query_decoder"}]
    lines = capsys.readouterr().out.splitlines()
    losses = [float(line.split()[-1]) for line in lines if line.startswith("masks")]
    assert len(losses) == 3 and losses[0] > losses[1] > losses[2] > 0

    calls = []

    def killed(*inputs):
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return mask_loss(*inputs)

    mask_loss = mtcp.mask_loss
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(mtcp, "mask_loss", killed)
        run(rooms, tmp_path / "b", *flags)
    again = train.main(train.parse_args(["--out", str(tmp_path / "b"), "--resume"]))
    assert again["test"] == whole["test"]

    root = tmp_path / "rooms"
    shutil.copytree(rooms, root)
    shutil.rmtree(root / "segmentation")
    refused("segmentation.*--mask-epochs 0", run, root, tmp_path / "c", *flags)
    run(root, tmp_path / "c", *flags, "--mask-epochs", "0")


def test_a_dataset_without_segmentation_has_no_masks_to_learn(monkeypatch, capsys):
    monkeypatch.setitem(train.RECIPES, "rooms", train.Recipe(NYUD_TASKS[1:]))
    assert train.parse_args([]).mask_epochs == 0
    assert "labels of semseg, which rooms has not" in complaint_of("--mask-epochs 1", capsys)


def test_a_run_writes_its_folder_and_repeats_and_resumes_exactly(rooms, tmp_path, monkeypatch):
    # Something that draws at random in every step.
    monkeypatch.setitem(PRESETS, "toy", replace(TOY, drop_path=0.5))
    a = tmp_path / "a"
    b = tmp_path / "b"
    whole = run(rooms, a, "--epochs", "2", "--mask-epochs", "1")
    written = {"config.json", "log.jsonl", "metrics.json", "predictions.png", ".lock"}
    checkpoints = {"last.pt", "previous.pt", "best.pt"}
    assert {p.name for p in a.iterdir()} == written | checkpoints
    assert json.loads((a / "metrics.json").read_text()) == whole and whole["dataset"] == "rooms"
    log = [json.loads(line) for line in (a / "log.jsonl").read_text().splitlines()]
    assert [entry["epoch"] for entry in log] == [0, 1]
    assert log[0]["weight"] == {"semseg": 1, "depth": 1, "normals": 1}
    assert log[1]["weight"]["semseg"] != 1  # LPS has acted
    depth = {"rmse", "rmse_lt6.55", "abs_rel", "delta_1.25", "cosine_before", "cosine_after"}
    assert set(whole["test"]["depth"]) == depth
    assert set(whole["test"]["coherence"]) == {"normal_angle", "normal_angle_truth"}

    original = mtcp.LPS.end_epoch

    def pull_the_plug_in_the_second_epoch(self):
        if (b / "last.pt").exists():
            raise KeyboardInterrupt
        original(self)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(mtcp.LPS, "end_epoch", pull_the_plug_in_the_second_epoch)
        run(rooms, b, "--epochs", "2", "--mask-epochs", "1")
    resumed = train.main(train.parse_args(["--out", str(b), "--resume"]))  # the flags are known
    assert resumed["test"] == whole["test"]
    assert "seconds" in whole and "seconds" not in resumed  # they would be the last part's
    ends = [train.load_checkpoint(folder / "last.pt")["model"] for folder in (a, b)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    refused("not empty", run, rooms, b)


def train_elsewhere(root: Path, out: Path, *flags) -> subprocess.Popen:
    """train.py in a process of its own, three epochs of little work."""
    command = [sys.executable, str(HERE / "train.py"), "--root", str(root), "--out", str(out)]
    command += ["--resume", "--epochs", "3", "--tasks", "semseg", "depth", *CPU, "--workers", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("TQDM_DISABLE", None)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, *flags], env=environment, start_new_session=True, **pipes)


@pytest.mark.parametrize("balancer", ["lps --amp", "uncertainty"])
def test_killed_at_any_moment_a_run_goes_on_to_the_same_weights(rooms, tmp_path, balancer):
    flags = f"--balancer {balancer}"
    whole = train_elsewhere(rooms, tmp_path / "whole", *flags.split())
    began = time.time()
    assert whole.wait() == 0
    takes = time.time() - began
    assert "epoch 1:" not in whole.stderr.read()  # stderr is no terminal: no progress bars
    rng = np.random.default_rng(0)
    for _ in range(2):  # most of them while it trains or saves, some before
        process = train_elsewhere(rooms, tmp_path / "cut", *flags.split())
        try:
            process.wait(timeout=rng.uniform(0.4, 1.0) * takes)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    process = train_elsewhere(rooms, tmp_path / "cut", *flags.split())
    assert process.wait() == 0, process.stderr.read()
    ends = [train.load_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "cut")]
    for part in ("model", "balancer"):
        for name, x in ends[0][part].items():
            torch.testing.assert_close(x, ends[1][part][name], rtol=0, atol=0, equal_nan=True)
    logs = [(tmp_path / name / "log.jsonl").read_text() for name in ("whole", "cut")]
    assert logs[0] == logs[1] and logs[0].count("\n") == 3
    assert not list((tmp_path / "cut").glob(".*.pt.*"))


def test_cut_before_any_write_takes_effect_a_run_goes_on_to_the_same_end(
    rooms, tmp_path, monkeypatch
):
    flags = ("--tasks", "depth", "--epochs", "2", "--batch-size", "11")
    original = os.replace
    done = []

    def counted(*args):
        done.append(args)
        if len(done) == dies_at:
            raise KeyboardInterrupt
        original(*args)

    monkeypatch.setattr(os, "replace", counted)
    dies_at = None
    whole = run(rooms, tmp_path / "whole", *flags)
    assert len(done) >= 10
    log = (tmp_path / "whole/log.jsonl").read_text()
    end = train.load_checkpoint(tmp_path / "whole/last.pt")["model"]
    for dies_at in range(2, len(done) + 1):
        out = tmp_path / str(dies_at)
        done.clear()
        with pytest.raises(KeyboardInterrupt):
            run(rooms, out, *flags)
        again = train.main(train.parse_args(["--out", str(out), "--resume"]))
        assert again["test"] == whole["test"]
        assert (out / "log.jsonl").read_text() == log
        weights = train.load_checkpoint(out / "last.pt")["model"]
        assert all(torch.equal(end[name], weights[name]) for name in end)


# --- Several processes, and steps in parts ---


def patched_train(folder: Path, *lines: str) -> Path:
    """A script that is train.py, after some lines of Python that change it."""
    first = ("import sys", f"sys.path.insert(0, {str(HERE)!r})", "import train")
    path = folder / "script.py"
    path.write_text("\n".join([*first, *lines, "sys.exit(train.cli())"]))
    return path


def torchrun(*flags, script: Path = HERE / "train.py") -> subprocess.CompletedProcess:
    """train.py in two processes of one thread each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    quiet = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    command += ["--nproc_per_node", "2", str(script), *map(str, flags)]
    return subprocess.run(command, env=quiet, capture_output=True, text=True, timeout=120)


def test_two_processes_train_and_measure_as_one_that_takes_its_steps_in_two_parts(
    rooms, tmp_path, monkeypatch
):
    flags = ("--epochs", "1", "--balancer", "uncertainty", "--mask-epochs", "1")
    # With enough held-out images for both processes.
    monkeypatch.setattr(train, "HOLDOUT", 0.4)
    script = patched_train(tmp_path, "train.HOLDOUT = 0.4")
    done = torchrun("--root", rooms, *CPU, "--out", tmp_path / "two", *flags, script=script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("test split") == 1
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # rounds as they do
    try:
        run(rooms, tmp_path / "one", *flags, "--accumulate", "2")
        again = train.parse_args(["--eval", str(tmp_path / "two/best.pt"), "--workers", "0"])
        alone = train.evaluate_checkpoint(again)
    finally:
        torch.set_num_threads(threads)
    one, two = (train.load_checkpoint(tmp_path / name / "last.pt") for name in ("one", "two"))
    start = MTCP(NYUD_TASKS, TOY).state_dict()
    for name, x in one["model"].items():
        if "running" not in name and "num_batches" not in name:
            close(x, two["model"][name])
    moved = [(x - start[name]).abs().max() for name, x in one["model"].items()]
    assert max(moved) > 1e-4
    for name, x in one["balancer"].items():
        close(x.nan_to_num(), two["balancer"][name].nan_to_num())
    assert len(one["optimizer"]["state"]) == len(two["optimizer"]["state"]) > 500
    for k, state in one["optimizer"]["state"].items():  # the last one is the balancer's
        close(state["exp_avg"], two["optimizer"]["state"][k]["exp_avg"], 1e-5)
    for t, loss in one["log"][0]["loss"].items():
        close(loss, two["log"][0]["loss"][t])
    # What is saved is what both measured at the end of the epoch, running statistics included.
    where = (again.dataset, again.root, again.tasks, again.size, again.seed, again.preset)
    held_out = train.make_loader(train.make_datasets(*where, False)[2], 2, 0)
    model = train.load_model(tmp_path / "two/best.pt")
    alone["held out"] = train.evaluate(model, NYUD_TASKS, held_out, "cpu")
    report = json.loads((tmp_path / "two/metrics.json").read_text())
    report["held out"] = two["log"][0]["heldout"]
    for split in ("test", "trivial", "held out"):
        for t, figures in report[split].items():
            for name, value in figures.items():
                close(value, alone[split][t][name], 1e-6 * max(1, abs(value)))


def test_a_step_in_parts_takes_the_mean_of_their_gradients(rooms, tmp_path, monkeypatch):
    taken = []

    def keep(parameters, limit):
        taken.append([p.grad.clone() for p in parameters])
        return torch.nn.utils.get_total_norm(taken[-1])

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", keep)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)
    flags = ("--epochs", "1", "--tasks", "depth", "--no-trace-back")
    run(rooms, tmp_path / "run", *flags, "--accumulate", "2")

    torch.manual_seed(0)
    tasks = tuple(t for t in NYUD_TASKS if t.name == "depth")
    model = MTCP(tasks, replace(TOY, trace_back=False)).train()
    model = model.to(memory_format=torch.channels_last)  # other kernels, other roundings
    dataset = train.make_datasets("rooms", rooms, ["depth"], None, 0)[0]
    parts = iter(data.make_loader(dataset, 2, shuffle=True, seed=0, workers=0))
    for grads in taken:
        model.zero_grad()
        for batch in (next(parts), next(parts)):
            image = batch["image"].to(memory_format=torch.channels_last)
            loss = mtcp.task_losses(tasks, model(image), batch)["depth"]
            (torch.log1p(loss) / 2).backward()
        for p, grad in zip(model.parameters(), grads, strict=True):
            close(p.grad, grad)
    assert len(taken) == len(dataset) // 4


@pytest.mark.parametrize("n,processes,accumulate", [(23, 2, 1), (23, 1, 3), (24, 3, 2), (5, 4, 1)])
def test_processes_share_an_epoch(n, processes, accumulate):
    def load(rank, batch_size, shuffle, processes=processes):
        share = {"rank": rank, "processes": processes, "accumulate": accumulate}
        return data.make_loader(range(n), batch_size, shuffle, 7, 0, **share)

    each = [[b.tolist() for b in load(rank, 2, shuffle=False)] for rank in range(processes)]
    assert sorted(i for batches in each for batch in batches for i in batch) == list(range(n))
    step = processes * accumulate
    if n < 2 * step:
        refused("too few", load, 0, 2, True)
        return
    parts = [list(load(rank, 2, shuffle=True)) for rank in range(processes)]
    assert [len(p) for p in parts] == [len(load(0, 2, shuffle=True))] * processes
    # Step by step they see what one process would see at once.
    whole = data.make_loader(range(n), 2 * step, True, 7, 0)
    for k, batch in enumerate(whole):
        seen = [x for a in range(accumulate) for p in parts for x in p[k * accumulate + a].tolist()]
        assert seen == batch.tolist()
    assert len(parts[0]) == n // (2 * step) * accumulate


def test_a_process_that_fails_says_why_and_ends_all(rooms, tmp_path):
    root = tmp_path / "rooms"
    shutil.copytree(rooms, root)
    second = data.NYUD.list_stems(root, "val")[2]  # the second process's first
    (root / f"segmentation/{second}.png").write_bytes(b"no picture")
    flags = ("--root", root, *CPU, "--tasks", "semseg", "--epochs", "1", "--out", tmp_path / "run")
    done = torchrun(*flags)
    # torchrun adds a traceback of its own, which is not ours.
    assert done.returncode != 0 and 'train.py", line' not in done.stderr
    assert f"process 1: {root}/segmentation/{second}.png" in done.stderr
    assert "process 0: " not in done.stderr


def test_flags_of_several_processes(rooms, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    flags = f"--root {rooms} --batch-size 4 --device cpu"
    assert "--batch-size takes a multiple of 3" in complaint_of(flags, capsys)
    assert "one process" in complaint_of("--predict a --checkpoint b --device cpu", capsys)
    flags = f"--root {rooms} --batch-size 3 --device meta"
    assert "run on --device cpu or cuda, not on meta" in complaint_of(flags, capsys)
    monkeypatch.setenv("LOCAL_RANK", "1")  # the first one of the machine has said it
    assert complaint_of(flags, capsys) == ""


def test_how_to_go_on_is_the_last_word_also_if_a_loader_was_being_made(rooms, tmp_path):
    script = patched_train(
        tmp_path,
        "from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter as Loader",
        "def stopped(self, loader):",
        "    raise KeyboardInterrupt",
        "Loader.__init__ = stopped",
    )
    command = [sys.executable, str(script), "--root", str(rooms), "--out", str(tmp_path / "run")]
    done = subprocess.run([*command, *CPU, "--workers", "1"], capture_output=True, text=True)
    assert done.returncode == 130 and done.stderr.endswith("\nstopped; say it again\n")


@pytest.mark.parametrize("group", [False, True], ids=["train.py", "its workers too"])
def test_a_run_that_is_told_to_stop_says_how_to_go_on(rooms, tmp_path, group):
    out = tmp_path / "run"
    process = train_elsewhere(rooms, out, "--epochs", "500")
    try:
        while not (out / "last.pt").exists():
            time.sleep(0.05)
            assert process.poll() is None
        refused("run is in use by another process", train.lock, out)
        os.killpg(process.pid, signal.SIGTERM) if group else process.terminate()
        assert process.wait(timeout=60) == 143
    finally:
        process.kill()
    assert process.stderr.read().endswith(f"go on by: python train.py --resume --out {out}\n")
    train.lock(out).close()


def test_a_checkpoint_that_was_cut_is_replaced_by_the_one_before(rooms, tmp_path, capsys):
    flags = ("--tasks", "depth", "--epochs", "3")
    a = tmp_path / "a"
    run(rooms, a, *flags)
    end = train.load_checkpoint(a / "last.pt")["model"]
    (a / "last.pt").write_bytes((a / "last.pt").read_bytes()[:-5000])
    assert train.last_checkpoint(a)["epoch"] == 1
    assert "last.pt is no checkpoint" in capsys.readouterr().err
    train.main(train.parse_args(["--out", str(a), "--resume", "--checkpointing"]))
    assert train.read_json(a / "config.json")["checkpointing"]  # it stays so the next time
    # The damaged one was gone by then: the next save did not move it over the only good one.
    assert train.load_checkpoint(a / "previous.pt")["epoch"] == 1
    again = train.load_checkpoint(a / "last.pt")["model"]
    assert all(torch.equal(end[name], again[name]) for name in end)
    assert (a / "log.jsonl").read_text().count("\n") == 3


def test_bad_samples_are_skipped_and_counted(sets, tmp_path, capsys):
    root = tmp_path / "rooms"
    shutil.copytree(sets["rooms"], root)
    (root / "depth/rooms_00003.npy").write_bytes(b"bad")
    flags = ("--tasks", "depth", "--epochs", "2", "--batch-size", "11")
    refused("rooms_00003.npy cannot be read", run, root, tmp_path / "a", *flags)
    report = run(root, tmp_path / "b", "--skip-bad-samples", *flags)
    assert report["skipped"] == 2  # in each epoch one
    assert "skipped: " in capsys.readouterr().err
    again = train.parse_args(["--eval", str(tmp_path / "b/best.pt")])
    assert train.evaluate_checkpoint(again)["test"] == report["test"]
    dataset = data.NYUD(root, "train", ["depth"])
    dataset.skip_bad = True
    assert dataset[3]["name"] == "rooms_00004" and dataset[3]["skipped"] == 1
    assert dataset[4]["skipped"] == 0
    assert len([sample["name"] for sample in dataset]) == 12  # a loop over it ends


@pytest.mark.parametrize("when", ["masks", "gradient", "weight"])
def test_what_is_not_finite_replaces_no_checkpoint(rooms, tmp_path, monkeypatch, when):
    """Learning masks: an infinite gradient; in epoch 2: one, or a step to where no numbers are."""
    out = tmp_path / "run"
    clip = nn.utils.clip_grad_norm_

    def poisoned(parameters, limit):
        first = next(parameters)
        norm = clip([first], limit)
        if (out / "last.pt").exists() or when == "masks":
            if when != "weight":
                return norm * math.inf
            first.data.fill_(math.nan)
        return norm

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", poisoned)
    flags = ("--epochs", "2", "--tasks", "normals", "--batch-size", "10", "--accumulate", "2")
    flags += ("--mask-epochs", "1") if when == "masks" else ()
    # Eight by name and two more: those of the whole step, not of its second part alone.
    with pytest.raises(FloatingPointError, match="its images: rooms_.* and 2 more.*a lower --lr"):
        run(rooms, out, *flags)
    if when == "masks":
        assert not (out / "last.pt").exists()
        return
    assert train.load_checkpoint(out / "last.pt")["epoch"] == 0
    assert all(v.isfinite().all() for v in train.load_checkpoint(out / "best.pt")["model"].values())


def test_a_write_that_fails_leaves_nothing_behind(tmp_path):
    (tmp_path / "a.pt").write_text("the old one")

    def full(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError):
        data.save(tmp_path / "a.pt", full)
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]
    assert (tmp_path / "a.pt").read_text() == "the old one"


@pytest.mark.parametrize("flags", [
    "--balancer uncertainty --tasks depth --amp",
    "--balancer dwa --no-cfm --tasks semseg normals --size 40 56",
    "--balancer equal --no-trace-back --cfm-stride 2",
    "--balancer log --backbone convnext_atto --tasks depth",
])  # fmt: skip
def test_switches_and_that_a_checkpoint_remembers_them(rooms, tmp_path, flags):
    report = run(rooms, tmp_path / "run", "--epochs", "1", *flags.split())
    assert all(math.isfinite(v) for metrics in report["test"].values() for v in metrics.values())
    again = train.evaluate_checkpoint(train.parse_args(["--eval", str(tmp_path / "run/best.pt")]))
    assert again["test"] == report["test"]


def test_single_task_runs_and_delta_m(rooms, tmp_path, capsys):
    metrics = {"depth": "rmse", "normals": "mean"}
    single = {}
    for t in metrics:
        flags = ("--tasks", t, "--no-trace-back", "--epochs", "1")
        single[t] = run(rooms, tmp_path / "single" / t, *flags)["test"]
    flags = ("--epochs", "1", "--single", tmp_path / "single", "--tasks", *metrics)
    capsys.readouterr()
    report = run(rooms, tmp_path / "both", *flags)
    assert json.loads((tmp_path / "both/metrics.json").read_text()) == report
    gains = [1 - report["test"][t][metric] / single[t][t][metric] for t, metric in metrics.items()]
    close(report["delta_m"], 100 * np.mean(gains))
    assert "delta_m" in capsys.readouterr().out

    # Before training, not after: results that are missing, damaged, or of another dataset.
    file = tmp_path / "single/normals/metrics.json"
    given = json.loads(file.read_text())
    for content, said in (
        (json.dumps({**given, "dataset": "nyud"}), "/normals is a run on nyud, not rooms"),
        (json.dumps({**given, "test": {}}), "/normals/metrics.json has no result of normals"),
        ("", "/normals/metrics.json cannot be read"),
    ):
        file.write_text(content)
        refused("single" + said, run, rooms, tmp_path / "new", *flags)
    file.unlink()
    refused("single/normals/metrics.json cannot be read", run, rooms, tmp_path / "new", *flags)
    assert not (tmp_path / "new").exists()


def test_files_are_written_before_anything_is_printed(rooms, tmp_path, monkeypatch):
    out = tmp_path / "run"
    there = []  # at each line, the files that are already there

    def broken_pipe(line):
        there.append({p.name for p in out.iterdir()})
        if sum("last.pt" in names for names in there) == 2:  # the first line after the epochs
            raise BrokenPipeError

    monkeypatch.setattr(train, "print", broken_pipe, raising=False)
    with pytest.raises(BrokenPipeError):
        run(rooms, out, "--epochs", "1", "--tasks", "depth")
    assert "config.json" in there[0] and "log.jsonl" in there[-2]
    assert {"metrics.json", "predictions.png"} <= there[-1]
    assert json.loads((out / "metrics.json").read_text())["test"]["depth"]["rmse"] > 0


def test_a_run_on_figures(sets, tmp_path):
    flags = ("--dataset", "figures", "--epochs", "1", "--batch-size", "1", "--balancer", "equal")
    report = run(sets["figures"], tmp_path / "run", *flags)
    # An image without a person says nothing of parts: the log and the balancer leave it out alike.
    known = [
        (s["human_parts"] != IGNORE_INDEX).any() for s in data.Figures(sets["figures"], "train")
    ]
    assert not all(known)
    logged = json.loads((tmp_path / "run/log.jsonl").read_text())["loss"]
    means = train.load_checkpoint(tmp_path / "run/last.pt")["balancer"]["previous"]
    close(list(logged.values()), means, 1e-4)
    assert set(report["test"]) == {"semseg", "human_parts", "sal", "coherence"}
    assert set(report["test"]["sal"]) >= {"maxF", "maxF_pooled"}
    assert report["trivial"]["sal"]["maxF"] > 5  # "everything is salient" finds all that is


def test_pascal_pictures_of_different_sizes(tmp_path):
    write_pascal(tmp_path / "p")
    flags = ["--dataset", "pascal", "--preset", "toy", "--start", "scratch", "--size", "64", "64"]
    report = run(tmp_path / "p", tmp_path / "run", *flags, "--epochs", "1", "--batch-size", "2")
    assert 0 <= report["test"]["human_parts"]["mIoU"] <= 100


def test_a_tiny_run_overfits_two_images(rooms):
    torch.manual_seed(0)
    dataset = data.NYUD(rooms, "train", stems=data.NYUD.list_stems(rooms, "train")[:2])
    batch = next(iter(data.make_loader(dataset, 2, False, 0, 0)))
    model = MTCP(NYUD_TASKS, TOY).train()
    balancer = LPS(model.names, kappa=7.5, prioritise=False)
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3)
    for _ in range(60):
        outputs = model(batch["image"])
        optimizer.zero_grad()
        balancer(mtcp.task_losses(NYUD_TASKS, outputs, batch)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), train.CLIP_NORM)
        optimizer.step()
    metrics = {}
    for t in NYUD_TASKS:
        metric = train.METRICS[t.metric](t)
        metric.update(outputs[t.name]["final"].detach(), batch[t.name])
        metrics |= metric.compute()
    assert metrics["pixel_acc"] > 90 and metrics["rmse"] < 0.35 and metrics["mean"] < 15, metrics


def test_a_run_says_what_it_started_from(rooms, tmp_path, monkeypatch):
    torch.manual_seed(3)
    donor = MTCP(NYUD_TASKS, replace(TOY, queries=7)).state_dict()
    tensors = {}
    for name, tensor in donor.items():
        names = mtcp.mask2former_names(name)
        parts = tensor.chunk(len(names)) if names else ()
        tensors |= {n: part.clone() for n, part in zip(names, parts, strict=True)}
    file = tmp_path / "model.safetensors"
    save_file(tensors, file)
    model, said = train.make_started_model(NYUD_TASKS, TOY, str(file))
    shared = [k for k in donor if mtcp.mask2former_names(k)]
    assert all(torch.equal(model.state_dict()[k], donor[k]) for k in shared) and len(shared) > 150
    into = "backbone, pixel_decoder, query_decoder"
    assert said == f"{file}: {len(tensors)} tensors into {into}, 0 not used"

    report = run(rooms, tmp_path / "a", "--epochs", "1", "--start", file)
    assert json.loads((tmp_path / "a/config.json").read_text())["started_from"] == said
    assert train.load_model(tmp_path / "a/best.pt").cfg.queries == 7
    file.unlink()  # a resumed run has its own weights
    resumed = train.main(train.parse_args(["--resume", "--out", str(tmp_path / "a")]))
    assert resumed["test"] == report["test"]
    with pytest.raises(mtcp.WeightsError, match="--start .*model.safetensors.* not found"):
        run(rooms, tmp_path / "b", "--start", file)
    assert not (tmp_path / "b").exists()

    asked = []
    swin = tmp_path / "swin.pth"
    torch.save(timm.create_model(TOY.backbone, **TOY.backbone_args).state_dict(), swin)
    monkeypatch.setattr(train, "hf_hub_download", lambda *a: asked.append(a) or str(swin))
    for start in ("pretrained", str(swin)):
        _, said = train.make_started_model(NYUD_TASKS, TOY, start)
        assert said.startswith(f"{swin}: ") and " into backbone, " in said
    assert asked == [("timm/swin_tiny_patch4_window7_224.ms_in1k", "model.safetensors")]


# ==================================================================================================
# train.py: flags and bad input
# ==================================================================================================


@pytest.fixture(scope="module")
def finished(rooms, tmp_path_factory) -> Path:
    """The folder of a run that learned depth in one epoch."""
    out = tmp_path_factory.mktemp("run") / "depth"
    run(rooms, out, "--epochs", "1", "--tasks", "depth")
    return out


@pytest.fixture(scope="module")
def untrained(tmp_path_factory) -> dict[str, Path]:
    """Checkpoints of random weights, as train.py saves them, for both sets of tasks."""
    paths = {}
    for name, tasks, kind in (("n", NYUD_TASKS, data.NYUD), ("p", PASCAL_TASKS, data.PASCAL)):
        torch.manual_seed(0)
        model = MTCP(tasks, TOY)
        randomise_batchnorm(model)
        about = {"args": {}, "config": TOY.__dict__, "tasks": [t.__dict__ for t in tasks]}
        about |= {"classes": kind.classes, "size": (64, 96), "model": model.state_dict()}
        paths[name] = tmp_path_factory.mktemp("checkpoint") / f"{name}.pt"
        train.save_checkpoint(paths[name], **about)
    return paths


def see(checkpoint: Path, *flags) -> int:
    return train.cli(["--checkpoint", str(checkpoint), "--device", "cpu", *map(str, flags)])


def test_a_photograph_of_the_training_size_gives_what_the_network_gives(untrained, tmp_path):
    scene = data.render("rooms", 0, 3, 64, 96)
    put(tmp_path / "a.png", scene["image"])
    assert (
        see(untrained["n"], "--predict", tmp_path / "a.png", "--out", tmp_path / "o", "--npz") == 0
    )
    model = train.load_model(str(untrained["n"]))
    assert not model.training
    image = torch.from_numpy(scene["image"]).permute(2, 0, 1) / 255
    with torch.no_grad():
        y = model(data.normalise({"image": image})["image"][None])
    classes = Image.open(tmp_path / "o/a_semseg.png")
    assert classes.mode == "P" and classes.getpalette() == data.palette().ravel().tolist()
    assert (np.array(classes) == y["semseg"]["final"][0].argmax(0).numpy()).mean() > 0.999
    depth = y["depth"]["final"][0, 0].numpy()
    close(np.array(Image.open(tmp_path / "o/a_depth.png")).astype(float), depth * 1000, 1)
    arrays = np.load(tmp_path / "o/a.npz")
    assert {k: v.shape for k, v in arrays.items()} == {
        "semseg": (64, 96), "depth": (1, 64, 96), "normals": (3, 64, 96),
    }  # fmt: skip
    close(arrays["normals"], y["normals"]["final"][0], 1e-4)
    assert Image.open(tmp_path / "o/a_normals.png").size == (96, 64)
    assert (tmp_path / "o/a_panel.png").is_file() and (tmp_path / "o/a_depth_preview.png").is_file()


def test_photographs_of_any_size_and_kind(untrained, tmp_path, capsys):
    rng = np.random.default_rng(0)
    folder = tmp_path / "in"
    folder.mkdir()
    noise = lambda H, W, *c: rng.integers(0, 256, (H, W, *c), dtype=np.uint8)  # noqa: E731
    sizes = {}
    for H, W in ((1, 1), (1, 700), (700, 1), (333, 500)):
        put(folder / f"{H}x{W}.png", noise(H, W, 3))
        sizes[f"{H}x{W}"] = (W, H)
    rgb = Image.fromarray(noise(30, 40, 3))
    for mode in ("L", "LA", "P", "RGBA", "1"):
        rgb.convert(mode).save(folder / f"{mode}.png")
    rgb.save(folder / "webp.webp")
    rgb.save(folder / "upper.JPG", "JPEG")
    rgb.convert("CMYK").save(folder / "cmyk.jpeg")
    Image.fromarray(noise(30, 40).astype(np.uint16) * 257).save(folder / "sixteen.png")
    turned = rgb.getexif()
    turned[0x0112] = 6  # the camera was held upright
    rgb.save(folder / "exif.jpg", exif=turned)
    rgb.save(folder / "L.webp")  # beside L.png: neither may overwrite the other
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "cut.png").write_bytes((folder / "333x500.png").read_bytes()[:9000])
    (folder / "notes.txt").write_text("not asked for")
    out = tmp_path / "out"
    assert see(untrained["p"], "--predict", folder, tmp_path / "gone.jpg", "--out", out) == 1
    said = capsys.readouterr()
    bad = re.findall(r"(\w+)\.\w+ is no readable image", said.err)
    assert bad == ["broken", "cut", "gone"]
    assert "15 of 18 photographs" in said.out
    names = {p.name.removesuffix("_sal.png") for p in out.glob("*_sal.png")}
    assert len(names) == 15 and {"L", "L.webp"} <= names
    for name in names:
        size = sizes.get(name, (30, 40) if name == "exif" else (40, 30))
        for what in ("semseg", "human_parts", "sal"):
            assert Image.open(out / f"{name}_{what}.png").size == size, name
        assert Image.open(out / f"{name}_panel.png").height > 360


def test_photographs_are_read_upright_and_without_loss(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    put(tmp_path / "a.png", pixels)
    assert (data.read_photograph(tmp_path / "a.png") == pixels).all()
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = 6  # turn by 90° to the right to see it upright
    image.save(tmp_path / "b.png", exif=exif)
    assert (data.read_photograph(tmp_path / "b.png") == np.rot90(pixels, -1)).all()
    put(tmp_path / "c.png", pixels[..., 0].astype(np.uint16) * 257)
    assert (data.read_photograph(tmp_path / "c.png") == pixels[..., :1]).all()
    clear = np.dstack([pixels, np.zeros((5, 7), np.uint8)])
    put(tmp_path / "d.png", clear)
    assert (data.read_photograph(tmp_path / "d.png") == 255).all()


def test_argmax_class_by_class():
    logits = torch.randn(1, 5, 6, 8)
    expected = mtcp.resize(logits, (13, 9)).argmax(dim=1)[0]
    assert torch.equal(train.large_argmax(logits, (13, 9)), expected)


def test_flags_of_prediction(untrained, finished, tmp_path, capsys):
    photo = tmp_path / "a.png"
    put(photo, np.zeros((4, 4, 3), np.uint8))
    for flags, said in {
        f"--predict {photo}": "go together", f"--checkpoint {untrained['n']}": "go together",
        f"--predict {photo} --checkpoint {untrained['n']} --lr 1": "drop --lr 1",
        f"--predict {photo} --checkpoint {photo}": "is no checkpoint",
        f"--predict {photo} --checkpoint {untrained['n']} --out {finished}": "is not empty",
        f"--predict {tmp_path / 'none'} --checkpoint {tmp_path / 'x.pt'}": "x.pt not found",
    }.items():  # fmt: skip
        assert said in complaint_of(flags, capsys)
    (tmp_path / "none").mkdir()
    flags = f"--predict {tmp_path / 'none'} --checkpoint {untrained['n']}"
    assert "no photograph in" in complaint_of(flags, capsys)
    assert see(finished / "best.pt", "--predict", photo, "--out", tmp_path / "real") == 0


def complaint_of(flags: str, capsys) -> str:
    """What the script says on stderr with these flags; it has to end with status 2."""
    capsys.readouterr()
    try:
        status = train.cli(flags.split())
    except SystemExit as exit:  # argparse's way
        status = exit.code
    assert status == 2
    return capsys.readouterr().err


def test_amp_on_a_cpu_that_only_imitates_bfloat16_is_said_to_be_slow(monkeypatch, capsys):
    for capability, flags, said in (
        ("AVX2", "--amp", True), ("AVX2", "", False), ("AVX512", "--amp", False)
    ):  # fmt: skip
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda c=capability: c)
        train.parse_args(["--device", "cpu", *flags.split()])
        assert ("imitate bfloat16" in capsys.readouterr().err) == said


@pytest.mark.parametrize("flags,said", [
    ("--dataset nyud", "--start FILE"),
    ("--preset vit", "--start pretrained"), ("--preset small", "--start pretrained"),
    ("--dataset nyud --start scratch", "data/nyud/gt_sets/train.txt not found"),
    ("--dataset nyud --root no --start scratch", "no/gt_sets/train.txt not"),
    ("--backbone swim_tiny", "no model of timm"),
    ("--backbone vit_base_patch32_224", "has strides"),
    ("--backbone resnet18.no_such --start pretrained", "no_such"),
    ("--start nowhere.pth", "--start nowhere.pth: nowhere.pth not found"),
    ("--start .", "model.safetensors not found"),
    ("--tasks edges", "semseg depth normals"),
    ("--tasks depth depth", "different ones of semseg depth normals"),
    ("--epochs 0", "--epochs takes a number above 0"),
    ("--batch-size 0", "--batch-size takes a number above 0"),
    ("--cfm-stride -2", "--cfm-stride takes a number above 0"),
    ("--lr -1", "--lr takes a number above 0"), ("--lr nan", "--lr"), ("--lr inf", "--lr"),
    ("--kappa -1", "--kappa takes a number of 0 or more"), ("--kappa nan", "--kappa"),
    ("--size 0 64", "above 0"),
    ("--workers -1", "0 or more"), ("--mask-epochs -1", "0 or more"),
    ("--seed -1", "0 or more"), ("--seed 99999999999999999999", "--seed"),
    ("--device gpu", "--device gpu is not there"),
    ("--device cuda:77", "--device cuda:77 is not there"),
    ("--balancer none", "invalid choice"),
    ("--single nowhere", "nowhere/semseg/metrics.json cannot be read"),
    ("--eval nowhere.pt", "nowhere.pt not found"), ("--eval .", "not found"),
    ("--resume", "needs --out"),
])  # fmt: skip
def test_bad_flags_get_one_sentence_and_status_2(tmp_path, monkeypatch, capsys, flags, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "render_set", lambda *a, **k: pytest.fail("rendered before it said"))
    assert said in complaint_of(flags, capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("file,content,flags,said", [
    ("config.json", None, "--out RUN --resume", "config.json cannot be read"),
    ("config.json", b"{", "--out RUN --resume", "config.json cannot be read"),
    ("config.json", b"\xff\xfe", "--out RUN --resume", "config.json cannot be read"),
    ("config.json", b"[]", "--out RUN --resume", "config.json is damaged"),
    ("config.json", b"{}", "--out RUN --resume", "config.json is damaged or old: it has no "),
    ("last.pt", b"", "--out RUN --resume", "last.pt is no checkpoint of train.py: it cannot be"),
    ("last.pt", b"garbage", "--out RUN --resume", "last.pt is no checkpoint of train.py"),
    ("best.pt", None, "--out RUN --resume", "best.pt not found"),
    ("best.pt", None, "--eval RUN/best.pt", "best.pt not found"),
    ("best.pt", b"PK\x03\x04", "--eval RUN/best.pt", "best.pt is no checkpoint of train.py"),
    ("best.pt", {"model": {}}, "--eval RUN/best.pt", "it has no ['args', 'config', 'tasks']"),
    ("metrics.json", None, "--tasks depth --single DIR", "metrics.json cannot be read"),
    ("metrics.json", b"[1]", "--tasks depth --single DIR", "metrics.json is damaged"),
    ("metrics.json", b'{"dataset": "rooms", "test": {"depth": {"rmse": null}}}',
     "--tasks depth --single DIR", "metrics.json has no result of depth"),
    ("x", b"", "--out RUN", "is not empty: choose another --out, or go on by --resume"),
    ("x", b"", "--out RUN/x", "x is not empty"),
    ("x", b"", "--out RUN/x/y", "the folder cannot be made"),
    ("x", b"", "--root RUN/x", "Not a directory: "),
    ("x", b"", "--out RUN --resume --tasks semseg", "with --tasks depth, not with --tasks semseg"),
    ("x", b"", "--out RUN --resume --amp", "was begun without --amp, not with --amp"),
    ("x", b"", "--eval RUN/best.pt --dataset figures", "has learned depth of rooms"),
    ("x", b"", "--eval RUN/best.pt --tasks semseg", "has learned depth: --tasks takes some"),
    ("x", b"", "--eval RUN/best.pt --root RUN", "gt_sets/train.txt not found"),
    ("x", b"", "--eval RUN/best.pt --no-cfm", "as it was trained: drop --no-cfm"),
    ("last.pt", None, "--out RUN --resume", "is a finished run without its last.pt"),
    ("last.pt", "best.pt", "--out RUN --resume", "last.pt has no ['balancer', 'best', 'log', "),
])  # fmt: skip
def test_a_damaged_run_folder_gets_one_sentence(
    rooms, finished, tmp_path, monkeypatch, capsys, file, content, flags, said
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, tmp_path / "single/depth")
    path = tmp_path / "single/depth" / file
    if content is None:
        path.unlink()
    elif isinstance(content, dict):
        torch.save(content, path)
    elif content == "best.pt":
        shutil.copy(path.parent / content, path)
    else:
        path.write_bytes(content)
    before = files(tmp_path)
    flags = flags.replace("RUN", "single/depth").replace("DIR", "single")
    root = "" if "--root" in flags or "--eval" in flags else f"--root {rooms} "
    heard = complaint_of(f"{root}{flags} --workers 0 --device cpu", capsys)
    assert said in heard and "weights_only" not in heard
    assert files(tmp_path) == before


def test_a_resumed_run_takes_its_flags_and_refuses_others(tmp_path, capsys):
    begun = train.parse_args(["--seed", "3", "--kappa", "0", "--tasks", "depth", "normals"])
    config = {key: train.plain(value) for key, value in vars(begun).items()}
    train.save_json(tmp_path / "config.json", config)
    resume = ["--resume", "--out", str(tmp_path)]
    # A typed zero is a value, and not a missing flag.
    same = train.parse_args([*resume, *["--kappa", "0", "--workers", "0", "--root", "/elsewhere"]])
    assert (same.seed, same.kappa, same.tasks) == (3, 0, ["depth", "normals"])
    assert (same.workers, same.root) == (0, Path("/elsewhere"))
    assert train.parse_args([*resume, "--epochs", "9"]).epochs == 9
    for flags, said in (
        ("--kappa 3", "with --kappa 0.0, not with --kappa 3.0"),
        ("--seed 0", "with --seed 3, not with --seed 0"), ("--epochs 1", "with --epochs 5, not"),
        ("--no-cfm", "without --no-cfm, not with --no-cfm"),
        ("--dataset figures", "with --dataset rooms, not with --dataset figures"),
        ("--tasks depth", "with --tasks depth normals, not with --tasks depth"),
    ):  # fmt: skip
        assert f"was begun {said}" in complaint_of(" ".join([*resume, flags]), capsys)


def test_a_run_killed_in_its_first_epoch_starts_again_and_a_longer_one_goes_on(
    rooms, finished, tmp_path, capsys
):
    out = tmp_path / "run"
    out.mkdir()
    shutil.copy(finished / "config.json", out)
    expected = json.loads((finished / "metrics.json").read_text())["test"]
    resume = ["--resume", "--out", str(out)]
    assert train.main(train.parse_args(resume))["test"] == expected
    assert train.main(train.parse_args(resume))["test"] == expected  # it is finished
    capsys.readouterr()
    train.main(train.parse_args([*resume, "--epochs", "2"]))
    assert "schedule stretched from 1 to 2 epochs" in capsys.readouterr().out
    assert len((out / "log.jsonl").read_text().splitlines()) == 2
    config = json.loads((out / "config.json").read_text())
    assert config["epochs"] == 2 and config["started_from"] == "random weights"
    # Nothing to go on with: it begins.
    new = [*resume[:2], str(tmp_path / "new"), "--root", str(rooms), "--tasks", "depth"]
    assert train.main(train.parse_args([*new, *CPU, "--epochs", "1"]))["test"] == expected


def test_a_checkpoint_is_evaluated_from_another_folder_and_in_some_of_its_tasks(
    rooms, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(rooms.parent)
    flags = ("--epochs", "1", "--tasks", "depth", "normals")
    report = run(Path(rooms.name), tmp_path / "run", *flags)
    monkeypatch.chdir(tmp_path)
    again = train.parse_args(["--eval", "run/best.pt", "--tasks", "normals"])
    assert train.evaluate_checkpoint(again)["test"] == {"normals": report["test"]["normals"]}
    said = complaint_of(f"--eval run/best.pt --root {tmp_path}/none", capsys)
    assert "none/gt_sets/train.txt not found" in said and not (tmp_path / "none").exists()


def test_a_figure_of_no_pixel_is_null_and_said_in_words(rooms, tmp_path, capsys):
    root = tmp_path / "rooms"
    shutil.copytree(rooms, root)
    stems = [*data.NYUD.list_stems(root, "val"), data.NYUD.list_stems(root, "train")[-1]]
    for stem in stems:  # the test split and the held-out image
        np.save(root / f"depth/{stem}.npy", np.zeros((64, 96), np.float32))
    flags = ("--epochs", "1", "--tasks", "depth", "normals", "--workers", "2")
    run(root, tmp_path / "run", *flags)
    said = capsys.readouterr().out
    assert (
        "no valid pixel of depth in the held-out images: the best epoch is chosen by norm" in said
    )
    assert "no valid pixel of depth in the test split" in said and "nan" not in said
    strict = partial(json.loads, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    report = strict((tmp_path / "run/metrics.json").read_text())
    assert report["test"]["depth"]["rmse"] is None and report["test"]["normals"]["mean"] > 0
    assert report["test"]["coherence"] == {"normal_angle": None, "normal_angle_truth": None}
    assert strict((tmp_path / "run/log.jsonl").read_text())["score"] is not None

    for file in (root / "depth").iterdir():
        np.save(file, np.zeros((64, 96), np.float32))
    refused("no valid pixel of depth in the training split", run, root, tmp_path / "b", *flags)
    assert not (tmp_path / "b").exists()


def test_output_never_ends_a_run(finished, tmp_path, monkeypatch):
    """On consoles without Δ and ↑."""
    command = [sys.executable, train.__file__, "--help"]
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, env=ascii_only)
    assert done.returncode == 0 and "compute ?m" in done.stdout
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="cp1252"))
    assert train.cli(["--eval", str(finished / "best.pt")]) == 0
    sys.stdout.flush()
    assert b"depth rmse ?" in raw.getvalue()


def test_metrics_need_no_float64_of_the_device(finished, monkeypatch):
    """As on Apple's GPUs, which have none: `cpu` is called first."""
    on_cpu = []
    original = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "double", lambda x: pytest.fail("float64 on the device"))
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: on_cpu.append(x) or original(x))
    assert train.cli(["--eval", str(finished / "best.pt")]) == 0 and on_cpu


@pytest.mark.parametrize("error,said", [
    (NotImplementedError("aten::x is not implemented. Set"), "--device cpu"),
    (torch.OutOfMemoryError("CUDA out of memory"), "try --accumulate 2"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error."), "--workers 0"),
    (OSError(28, "No space left on device", "last.pt"), "No space left on device: 'last.pt'"),
])  # fmt: skip
def test_faults_of_the_machine_get_one_sentence(tmp_path, monkeypatch, capsys, error, said):
    def fail(args):
        raise error

    monkeypatch.setattr(train, "main", fail)
    heard = complaint_of(f"--root {tmp_path}", capsys)
    assert said in heard and heard.count("\n") == 1


def test_a_task_that_is_not_known_everywhere_is_named(street, monkeypatch):
    for change, said in (
        ({"loss": "bcee"}, "task outline: mtcp.LOSSES has no row 'bcee'"),
        ({"metric": "F"}, "train.METRICS has no row 'F'"),
        ({"name": "x"}, "data.LABELS has no row 'x'"),
    ):
        tasks = (NYUD_TASKS[0], replace(OUTLINE, **change))
        refused(said, train.require_rows, tasks, Street)
    monkeypatch.setitem(data.LABELS, "x", data.LABELS["sal"])
    refused(
        "Street.readers has no row 'x'", train.require_rows, (replace(OUTLINE, name="x"),), Street
    )
    few = replace(NYUD_TASKS[0], channels=3)
    loader = data.make_loader(Street(street, "train", ["semseg"]), 1, False, 0, 0)
    refused("semseg has class .* 3 channels", train.ConstantPredictor, (few,), loader)


def test_the_script_reports_status_2_without_a_traceback(tmp_path):
    flags = ["--dataset", "nyud", "--root", "nowhere", "--start", "scratch"]
    command = [sys.executable, train.__file__, *flags]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "nowhere/gt_sets/train.txt not found" in done.stderr
    assert "Traceback" not in done.stderr and "images/STEM.jpg" in done.stderr


def test_checkpoints_that_cannot_be_read_are_refused(tmp_path):
    save_code(tmp_path / "evil.pt", "args")
    refused("evil.pt is no checkpoint", train.load_checkpoint, tmp_path / "evil.pt")
    assert not (tmp_path / "boom").exists()
    path = tmp_path / "a.pt"
    torch.save({"args": {}, "model": {}}, path)
    refused("a.pt is no checkpoint .* it has no .*config", train.load_model, path)
    model = MTCP(NYUD_TASKS[1:2], TOY)
    state = model.state_dict()
    del state["pixel_decoder.to_P.bias"]
    content = {"args": {}, "config": train.asdict(TOY), "model": state}
    train.save_checkpoint(path, **content, tasks=[train.asdict(t) for t in model.tasks])
    refused(r"a.pt does not fit [\s\S]*pixel_decoder.to_P.bias", train.load_model, path)


# ==================================================================================================
# notebooks
# ==================================================================================================


def test_notebooks_are_committed_as_they_ran():
    """From top to bottom, without an error, and small. CI executes them."""
    files = sorted((HERE / "notebooks").glob("*.ipynb"))
    assert [f.name[:2] for f in files] == ["01", "02", "03", "04", "05", "06", "07", "08"]
    for file in files:
        cells = [c for c in json.loads(file.read_text())["cells"] if c["cell_type"] == "code"]
        counts = [c["execution_count"] for c in cells]
        outputs = [o for c in cells for o in c["outputs"]]
        assert counts == list(range(1, len(cells) + 1)), file.name
        assert all(o["output_type"] != "error" for o in outputs), file.name
        assert any("image/png" in o.get("data", {}) for o in outputs), file.name
    assert sum(f.stat().st_size for f in files) <= 8e6
