"""Tests, in the order of mtcp.py, then data.py, then train.py: `pytest`.

Every fact is checked against something that does not share the code: a naive loop, a case worked out by hand, a closed
form, or an invariance. Nothing is compared with numbers that the code itself once printed.
"""

import ast
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
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
from mtcp import IGNORE_INDEX, LPS, MTCP, NYUD, PRESETS

HERE = Path(__file__).parent
TOY = PRESETS["toy"]


def close(a, b, tolerance=1e-5):
    a, b = torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64)
    assert a.shape == b.shape, f"shapes {tuple(a.shape)} and {tuple(b.shape)}"
    difference = (a - b).abs().max().item()
    assert difference <= tolerance, f"largest difference {difference:.3g}, allowed {tolerance:.3g}"


def labels(B: int, H: int, W: int) -> dict:
    """Random labels of all three tasks of NYUD-v2, with ignored pixels."""
    torch.manual_seed(1)
    semseg = torch.randint(0, 40, (B, H, W))
    semseg[:, :4] = IGNORE_INDEX
    normals = F.normalize(torch.randn(B, 3, H, W), dim=1)
    normals[..., :4] = 0
    return {"semseg": semseg, "depth": torch.rand(B, 1, H, W) * 5, "normals": normals}


def randomise_batchnorm(model: nn.Module) -> None:
    """Running statistics as after training: at 0 and 1, eval mode would hide a wrong use of them."""
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.3)
            m.running_var.uniform_(0.5, 1.5)


# ======================================================================================================================
# mtcp.py: the parts
# ======================================================================================================================


def test_mtcp_imports_no_file_of_ours():
    tree = ast.parse((HERE / "mtcp.py").read_text())
    imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    imported |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} <= {*sys.stdlib_module_names, "safetensors", "timm", "torch"}


def test_cbam_is_timms():
    torch.manual_seed(0)
    ours, theirs = mtcp.CBAM(32).eval(), CbamModule(32).eval()
    randomise_batchnorm(theirs)
    with torch.no_grad():
        for mine, fc in ((ours.mlp[0], theirs.channel.fc1), (ours.mlp[2], theirs.channel.fc2)):
            mine.weight.copy_(fc.weight[..., 0, 0])
        ours.place[0].load_state_dict(theirs.spatial.conv.conv.state_dict())
        ours.place[1].load_state_dict(theirs.spatial.conv.bn.state_dict())
        x = torch.randn(2, 32, 5, 7)
        close(ours(x), theirs(x))


def test_readme_links_lead_to_what_they_name():
    code = (HERE / "mtcp.py").read_text().splitlines()
    links = re.findall(r"\[`(\w+)`\]\(mtcp\.py#L(\d+)\)", (HERE / "README.md").read_text())
    assert len(links) > 15
    wrong = [(name, line) for name, line in links if not re.match(rf"(class|def) {name}\b", code[int(line) - 1])]
    assert wrong == []


@pytest.mark.parametrize(
    "name",
    ["swin_tiny_patch4_window7_224", "convnext_atto", "pvt_v2_b0", "vit_tiny_patch16_224", "vit_small_patch14_dinov2"],
)
def test_backbone_gives_four_strides(name):
    backbone = mtcp.Backbone(name).eval()
    with torch.no_grad():
        maps = backbone(torch.randn(1, 3, 64, 96))
    assert [tuple(m.shape[1:]) for m in maps] == [
        (c, 64 // s, 96 // s) for c, s in zip(backbone.channels, (4, 8, 16, 32), strict=True)
    ]
    close(maps[2].mean(dim=1), torch.zeros(1, 4, 6), 1e-5)  # LayerNorm'ed at every pixel


def test_backbone_with_other_strides_is_refused():
    with pytest.raises(ValueError, match="strides"):
        mtcp.Backbone("vit_base_patch32_224")


def test_deformable_sampling_against_a_loop():
    torch.manual_seed(0)
    sizes, heads, d, L, points = [(2, 3), (5, 4)], 2, 3, 4, 3
    value = torch.randn(1, sum(h * w for h, w in sizes), heads, d)
    places = torch.rand(1, L, heads, len(sizes), points, 2) * 1.4 - 0.2  # some outside the map
    weight = torch.rand(1, L, heads, len(sizes), points)

    def pixel(level, head, y, x):  # zero outside
        h, w = sizes[level]
        start = sum(a * b for a, b in sizes[:level])
        return value[0, start + y * w + x, head] if 0 <= y < h and 0 <= x < w else torch.zeros(d)

    expected = torch.zeros(L, heads, d)
    for q, head, level, p in np.ndindex(L, heads, len(sizes), points):
        h, w = sizes[level]
        x, y = (places[0, q, head, level, p] * torch.tensor([w, h]) - 0.5).tolist()  # pixel centres at whole numbers
        x0, y0 = math.floor(x), math.floor(y)
        for yy, xx in ((y0, x0), (y0, x0 + 1), (y0 + 1, x0), (y0 + 1, x0 + 1)):
            bilinear = (1 - abs(y - yy)) * (1 - abs(x - xx))
            expected[q, head] += weight[0, q, head, level, p] * bilinear * pixel(level, head, yy, xx)
    close(mtcp.deformable_sampling(value, sizes, places, weight)[0], expected.flatten(1))


def test_deformable_attention_starts_by_looking_around_itself():
    """With zero weights, head k samples at distances 1…points in direction 2πk/heads."""
    attention = mtcp.DeformableAttention(C=8, heads=4, levels=1, points=2)
    offsets = attention.offsets(torch.randn(1, 8)).view(4, 2, 2)
    close(offsets, [[[1, 0], [2, 0]], [[0, 1], [0, 2]], [[-1, 0], [-2, 0]], [[0, -1], [0, -2]]], 1e-5)


def test_sine_embedding_against_a_loop():
    C, h, w = 8, 3, 5
    expected = torch.zeros(C, h, w)
    for c, y, x in np.ndindex(C, h, w):
        position, length, i = (y + 1, h, c) if c < C // 2 else (x + 1, w, c - C // 2)
        angle = 2 * math.pi * position / length / 10000 ** (2 * (i // 2) / (C // 2))
        expected[c, y, x] = math.sin(angle) if i % 2 == 0 else math.cos(angle)
    close(mtcp.sine_embedding(torch.zeros(2, C, h, w))[0], expected, 1e-4)


def test_masked_attention_hides_the_background_and_opens_empty_rows():
    decoder = mtcp.QueryDecoder(TOY)
    masks = torch.tensor([[[[1.0, -1.0]], [[-1.0, -2.0]]]])  # (1,2,1,2): query 0 sees pixel 0; query 1 sees nothing
    hidden = decoder.attention_mask(masks)
    assert hidden.shape == (TOY.attention_heads, 2, 2)
    assert hidden[0].tolist() == [[False, True], [False, False]]  # True: must not look; the empty row is opened

    layer, q = decoder.layers[0].eval(), torch.randn(1, 2, TOY.width)
    memory = torch.randn(1, 2, TOY.width)
    changed = memory.clone()
    changed[:, 1] += 1  # a pixel that query 0 must not see, and query 1 may
    with torch.no_grad():
        attend = partial(layer._attend, layer.cross, q)
        difference = attend(changed, changed, hidden) - attend(memory, memory, hidden)
    close(difference[0, 0], torch.zeros(TOY.width))
    assert difference[0, 1].abs().max() > 1e-3


def test_shared_representation_is_P_times_the_summed_masks_up_to_one_number_per_image():
    P, M = torch.randn(2, 4, 3, 5), torch.randn(2, 7, 3, 5) - 50  # -50: logits as with pretrained weights
    R = mtcp.shared_representation(P, M)
    ratio = P * M.sum(dim=1, keepdim=True) / R
    close(ratio / ratio[:, :1, :1, :1], torch.ones_like(R), 1e-4)
    close(R.square().mean(dim=(1, 2, 3)), torch.ones(2))
    close(mtcp.shared_representation(10 * P, 100 * M), R)


def test_task_decoder_and_pyramid_shapes_at_sizes_no_window_divides():
    R = torch.randn(1, TOY.width, 9, 13)
    maps = mtcp.TaskDecoder(TOY)(R)
    assert [tuple(m.shape[1:]) for m in maps] == [(32, 9, 13), (64, 5, 7), (128, 3, 4)]
    assert mtcp.FeaturePyramid(TOY.width)(maps).shape == R.shape


def dense_cfm(cfm, X_t, auxiliaries):
    """softmax(τ cos(Q, K)) V with the matrix written out."""
    A = cfm.fuse(torch.cat([X * torch.sigmoid(g(X)) for g, X in zip(cfm.gates, auxiliaries, strict=True)], dim=1))
    Q, K, V = cfm.query(A), cfm.pool(cfm.key(A)), cfm.pool(cfm.value(X_t))
    d, out = Q.shape[1] // cfm.heads, []
    for head, tau in enumerate(cfm.log_tau.exp().flatten()):
        q, k, v = (m[:, head * d : (head + 1) * d].flatten(2) for m in (Q, K, V))  # (B,d,positions)
        q, k = (m / m.norm(dim=1, keepdim=True) for m in (q, k))
        affinity = torch.softmax(tau * q.transpose(1, 2) @ k, dim=-1)  # (B,hw,positions)
        out.append((affinity @ v.transpose(1, 2)).transpose(1, 2))
    return cfm.out(torch.cat(out, dim=1).view_as(X_t))


@pytest.mark.parametrize("heads,stride,auxiliaries", [(1, 1, 1), (4, 1, 2), (2, 3, 2), (1, 2, 3)])
def test_cfm_against_the_dense_softmax(heads, stride, auxiliaries):
    torch.manual_seed(0)
    cfm = mtcp.CoherenceFusion(auxiliaries, replace(TOY, cfm_heads=heads, cfm_stride=stride)).eval()
    randomise_batchnorm(cfm)
    X = [torch.randn(2, TOY.width, 5, 7) for _ in range(auxiliaries + 1)]
    with torch.no_grad():
        cfm.log_tau += torch.rand_like(cfm.log_tau)
        close(cfm(X[0], X[1:]), dense_cfm(cfm, X[0], X[1:]), 1e-4)


def test_cosine_distance():
    x = torch.randn(2, 8, 3, 3)
    close(mtcp.cosine_distance(x, [5 * x]), 0.0, 1e-6)
    close(mtcp.cosine_distance(x, [-x, x]), 1.0, 1e-6)


def test_srm_follows_its_equations():
    srm = mtcp.SpatialRefinement(carry_channels=4, stage_channels=6, C=5, last=False).eval()
    randomise_batchnorm(srm)
    carry, F_i = torch.randn(1, 4, 4, 6), torch.randn(1, 6, 8, 12)
    up = F.interpolate(srm.cbam_carry(carry), scale_factor=2, mode="bilinear")
    z = torch.cat([up, srm.cbam_stage(F_i)], dim=1)
    pred, new_carry = srm(carry, F_i)
    for branch, out in ((srm.to_pred, pred), (srm.to_carry, new_carry)):
        conv, bn, _ = branch
        close(out, F.relu(bn(torch.einsum("oc,bchw->bohw", conv.weight[..., 0, 0], z))))


# ======================================================================================================================
# mtcp.py: the whole network
# ======================================================================================================================


@pytest.mark.parametrize("names", [["depth"], ["semseg", "normals"], ["semseg", "depth", "normals"]])
@pytest.mark.parametrize("size", [(64, 96), (45, 71)])
def test_output_contract_for_any_number_of_tasks_and_any_size(names, size):
    tasks = tuple(t for t in NYUD if t.name in names)
    model = MTCP(tasks, TOY)
    assert (model.cfm is None) == (len(names) == 1)
    outputs = model(torch.randn(2, 3, *size))
    assert list(outputs) == names
    for t in tasks:
        y = outputs[t.name]
        assert len(y["intermediate"]) == 2
        for p in (y["initial"], *y["intermediate"], y["final"]):
            assert p.shape == (2, t.channels, *size)
            if t.name == "depth":
                assert (p > 0).all()
            if t.name == "normals":
                close(p.norm(dim=1), torch.ones(2, *size))


def test_without_trace_back_the_fused_feature_is_decoded():
    model = MTCP(NYUD, replace(TOY, trace_back=False))
    y = model(torch.randn(2, 3, 64, 64))["depth"]
    assert y["initial"] is None and y["intermediate"] == [] and y["final"].shape == (2, 1, 64, 64)


def test_task_names_must_differ():
    with pytest.raises(ValueError, match="different names"):
        MTCP((NYUD[0], NYUD[0]), TOY)


@pytest.mark.parametrize("changes", [{}, {"cfm": False}, {"trace_back": False}, {"cfm": False, "trace_back": False}])
def test_every_parameter_is_used(changes):
    torch.manual_seed(0)
    model = MTCP(NYUD, replace(TOY, **changes))
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    # Two steps: deformable attention starts with offsets that do not depend on the query, so that nothing flows back
    # into position and level embeddings before the first.
    for _ in range(2):
        optimizer.step()
        optimizer.zero_grad()
        losses = mtcp.task_losses(NYUD, model(torch.randn(2, 3, 64, 96)), labels(2, 64, 96))
        sum(losses.values()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    # CBAM's bottleneck has two units at this width: both may happen to be below zero, and then rest.
    bottlenecks = {id(p) for m in model.modules() if isinstance(m, mtcp.CBAM) for p in m.mlp.parameters()}
    resting = [n for n, p in model.named_parameters() if p.grad.abs().max() == 0 and id(p) not in bottlenecks]
    assert resting == []


def test_a_batch_of_two_equals_two_singles():
    torch.manual_seed(0)
    model = MTCP(NYUD, TOY).eval()
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        both, first = model(x), model(x[:1])
    for t in model.names:
        close(both[t]["final"][:1], first[t]["final"], 1e-4)


def test_order_of_tasks_has_no_effect():
    torch.manual_seed(0)
    a, b = MTCP(NYUD, TOY).eval(), MTCP(NYUD[::-1], TOY).eval()
    for cfm in a.cfm.values():
        nn.init.constant_(cfm.log_tau, math.log(100))  # untrained attention is so flat that Q and K hardly matter
    b.load_state_dict(a.state_dict())
    x, X = torch.randn(1, 3, 64, 64), {t: 3 * torch.randn(1, TOY.width, 16, 16) for t in a.names}
    with torch.no_grad():
        ya, yb = a(x), b(x)
        fused_a, fused_b = a.fuse(X), b.fuse({t: X[t] for t in b.names})
        swapped = a.cfm["depth"](X["depth"], [X["semseg"], X["normals"]])  # not the sorted order
    for t in a.names:
        close(ya[t]["final"], yb[t]["final"])
        close(fused_a[t], fused_b[t])
    assert (swapped - fused_a["depth"]).abs().max() > 1e-3


def test_bfloat16_autocast_stays_near_float32():
    torch.manual_seed(0)
    model = MTCP(NYUD, TOY).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        exact = model(x)["depth"]["final"]
        with torch.autocast("cpu", torch.bfloat16):
            close(model(x)["depth"]["final"].float(), exact, 0.1)


def test_paper_preset_is_the_papers_model():
    with torch.device("meta"):  # shapes without memory
        model = MTCP(NYUD, PRESETS["paper"])
    assert model.backbone.channels == [96, 192, 384, 768]
    assert len(model.pixel_decoder.layers) == 6 and len(model.query_decoder.layers) == 9
    assert model.query_decoder.query_features.weight.shape == (100, 256)
    assert [len(s.blocks) for s in model.decoder["depth"].stages] == [1, 2, 1]


# ======================================================================================================================
# mtcp.py: losses
# ======================================================================================================================


def test_cross_entropy_by_hand():
    logits = torch.tensor([[2.0, 0.0], [0.0, 0.0]]).T.reshape(1, 2, 1, 2)  # pixel 0: (2,0), pixel 1: (0,0)
    target = torch.tensor([[[0, 1]]])
    close(mtcp.cross_entropy(logits, target), (math.log(1 + math.exp(-2)) + math.log(2)) / 2)
    target[0, 0, 0] = IGNORE_INDEX
    close(mtcp.cross_entropy(logits, target), math.log(2))


def test_l1_depth_by_hand():
    y, target = torch.tensor([[[[1.0, 5.0, 9.0]]]]), torch.tensor([[[[2.0, 3.0, 0.0]]]])
    close(mtcp.l1_depth(y, target), 1.5)


def test_l1_normals_by_hand():
    y = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]).T.reshape(1, 3, 1, 3)
    target = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]).T.reshape(1, 3, 1, 3)
    close(mtcp.l1_normals(y, target), 2 / 6)  # one right, one off by 1 in two of three components, one invalid


def test_balanced_bce_by_hand():
    logits = torch.tensor([0.0, 0.0, 0.0, 0.0, 9.0]).view(1, 1, 1, 5)
    target = torch.tensor([1.0, 0.0, 0.0, 0.0, 255.0]).view(1, 1, 1, 5)
    close(mtcp.balanced_bce(logits, target), (0.75 + 3 * 0.25) * math.log(2) / 4)  # ¾ for the one, ¼ for each of three


@pytest.mark.parametrize(
    "loss,channels,target",
    [
        (mtcp.cross_entropy, 4, torch.full((2, 3, 3), IGNORE_INDEX)),
        (mtcp.l1_depth, 1, torch.zeros(2, 1, 3, 3)),
        (mtcp.l1_normals, 3, torch.zeros(2, 3, 3, 3)),
        (mtcp.balanced_bce, 1, torch.full((2, 1, 3, 3), 255.0)),
    ],
)
def test_no_valid_pixel_is_a_loss_of_zero_with_zero_gradient(loss, channels, target):
    y = torch.randn(2, channels, 3, 3, requires_grad=True)
    value = loss(y, target)
    value.backward()
    assert value.item() == 0 and y.grad.abs().max() == 0


def test_task_loss_weighs_early_predictions_by_half():
    depth = NYUD[1]
    predictions = {k: torch.full((1, 1, 2, 2), v) for k, v in (("a", 2.0), ("b", 3.0), ("c", 5.0), ("d", 9.0))}
    y = {"final": predictions["a"], "initial": predictions["b"], "intermediate": [predictions["c"], predictions["d"]]}
    target = {"depth": torch.ones(1, 1, 2, 2)}
    close(mtcp.task_losses((depth,), {"depth": y}, target)["depth"], 1 + 0.5 * (2 + 4 + 8))
    y["initial"], y["intermediate"] = None, []
    close(mtcp.task_losses((depth,), {"depth": y}, target)["depth"], 1.0)


# ======================================================================================================================
# mtcp.py: balancers
# ======================================================================================================================


def run_epoch(balancer, *ell):
    """One epoch of one step in which ℓ_t = log(1 + L_t) takes the given values; returns the total of that step."""
    total = balancer({n: torch.expm1(torch.tensor(e)) for n, e in zip(balancer.names, ell, strict=True)})
    balancer.end_epoch()
    return total.item()


def test_lps_by_hand_for_three_epochs():
    lps = LPS(["a", "b"], kappa=2.0, w_min=0.1)
    close(run_epoch(lps, 1.0, 3.0), 4.0)  # epoch 0: w = 1
    close(lps.weights, [1.5, 0.5])  # ℓ/ℓ_t = 4, 4/3, rescaled to sum 2
    close(run_epoch(lps, 0.5, 3.0), 1.5 * 0.5 + 0.5 * 3)
    # r = (½, 1) / (3.5/4) = (4/7, 8/7), r̄ = 6/7; r̄ ± 2·2/7 = (2/7, 10/7), rescaled
    close(lps.weights, [1 / 3, 5 / 3])
    run_epoch(lps, 0.5, 1.0)
    # r = (1, ⅓) / (1.5/3.5) = (7/3, 7/9), r̄ = 14/9; spread (28/9, 0), rescaled (2, 0), then the floor
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


def test_lps_switches():
    lps = LPS(["a", "b"], kappa=2.0, log=False, prioritise=False)
    close(lps({"a": torch.tensor(3.0), "b": torch.tensor(4.0)}), 7.0)
    lps.end_epoch()
    assert lps.weights.tolist() == [1, 1]
    lps = LPS(["a", "b"], kappa=2.0, prioritise=False)
    close(run_epoch(lps, 1.0, 3.0), 4.0)
    assert lps.weights.tolist() == [1, 1]


def test_lps_ignores_a_task_without_valid_pixels():
    lps = LPS(["a", "b", "c"], kappa=2.0)
    run_epoch(lps, 1.0, 3.0, 0.0)
    close(lps.weights, [1.5, 0.5, 1.0])  # as without c, which keeps weight 1
    run_epoch(lps, 0.5, 3.0, 2.0)
    close(lps.weights, [1 / 3, 5 / 3, 1.0])  # c has nothing to be compared with yet
    run_epoch(lps, 0.0, 0.0, 0.0)
    assert lps.weights.isfinite().all()


def test_lps_refuses_a_floor_that_is_none():
    with pytest.raises(ValueError, match="w_min"):
        LPS(["a"], kappa=1.0, w_min=0.0)


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
    with torch.no_grad():
        balancer.log_variance.copy_(torch.tensor([math.log(2), 0.0, 5.0]))
    total = balancer({"a": torch.tensor(4.0), "b": torch.tensor(3.0), "c": torch.tensor(0.0)})  # c: no valid pixel
    close(total, 4 / 2 + math.log(2) / 2 + 3)
    total.backward()
    assert balancer.log_variance.grad[2] == 0


def test_dwa_by_hand():
    dwa = mtcp.DynamicWeightAverage(["a", "b"])
    for L, weights in (((2.0, 2.0), [1, 1]), ((1.0, 2.0), None)):
        dwa({"a": torch.tensor(L[0]), "b": torch.tensor(L[1])})
        dwa.end_epoch()
        if weights:
            close(dwa.weights, weights)
    e = math.exp(0.5 / 2), math.exp(1 / 2)
    close(dwa.weights, [2 * e[0] / sum(e), 2 * e[1] / sum(e)])


def _rank(rank: int, file: str, out: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    lps = LPS(["a", "b"], kappa=2.0)
    for step in range(1 + rank):  # ranks with different numbers of steps
        lps({"a": torch.expm1(torch.tensor(1.0 + rank + step)), "b": torch.expm1(torch.tensor(3.0))})
    lps.end_epoch()
    torch.save(lps.weights, f"{out}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_lps_reduces_over_ranks(tmp_path):
    torch.multiprocessing.spawn(_rank, args=(str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    weights = [torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(2)]
    assert torch.equal(*weights)
    raw = torch.tensor([5 / 2, 5 / 3])  # ℓ_a = (1 + 2 + 3) / 3 = 2 over both ranks' steps, ℓ_b = 3
    close(weights[0], raw / raw.mean())


# ======================================================================================================================
# mtcp.py: published weights
# ======================================================================================================================

# As small as a Mask2Former of Hugging Face's gets: it has 32 groups in its GroupNorms at every width.
SMALL = replace(TOY, width=256, attention_heads=8)


def needs_transformers():
    """The library, or a skip where it is not installed. CI installs it."""
    return pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def mask2former(tmp_path_factory):
    """Hugging Face's own network with random weights, and the folder where its save_pretrained has put it."""
    hf = needs_transformers()
    swin = hf.SwinConfig(
        embed_dim=32, depths=[1, 1, 2, 1], num_heads=[1, 2, 4, 8], window_size=7,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = hf.Mask2FormerConfig(
        backbone_config=swin, encoder_layers=2, encoder_feedforward_dim=128, dim_feedforward=128, num_queries=16,
        decoder_layers=4,  # one more than there are: Hugging Face counts the prediction before the first layer
        num_labels=5,
    )  # fmt: skip
    torch.manual_seed(0)
    network = hf.Mask2FormerForUniversalSegmentation(config).eval()
    with torch.no_grad():
        for p in network.parameters():  # no tensor may be one that its initialisation would give it anyway
            p.add_(0.05 * torch.randn_like(p))
    folder = tmp_path_factory.mktemp("mask2former")
    network.save_pretrained(folder)
    return network, folder


def save_as(layout: str, network, folder: Path, out: Path) -> Path:
    """The same checkpoint in another of the layouts that are in circulation."""
    if layout == "safetensors":
        return folder / "model.safetensors"
    if layout == "sharded":
        network.save_pretrained(out, max_shard_size="2MB")
        assert len(list(out.glob("*.safetensors"))) > 3
    else:
        state = load_file(folder / "model.safetensors")
        index = torch.zeros(49, 49, dtype=torch.int64)  # older files also hold this constant
        state[f"{mtcp.ENC}.encoder.layers.0.blocks.0.attention.self.relative_position_index"] = index
        torch.save(state, out / "pytorch_model.bin")
    return out


@pytest.mark.parametrize("layout", ["safetensors", "sharded", "bin"])
def test_P_and_M_are_hugging_faces(mask2former, tmp_path, layout):
    network, folder = mask2former
    ours = MTCP(NYUD, SMALL).eval()
    record = mtcp.load_mask2former(ours, save_as(layout, network, folder, tmp_path))
    assert record["tensors"] == len(load_file(folder / "model.safetensors")) - 5  # see MASK2FORMER_LEFTOVERS
    # 72 x 100: divided neither by 32 nor, on any level, by the window
    for size in [(64, 96), (72, 100)] if layout == "safetensors" else [(72, 100)]:
        x = torch.randn(2, 3, *size)
        with torch.no_grad():
            P, M = ours.shared(x)
            theirs = network(x)
        assert P.std() > 0.1 and M.std() > 0.1
        close(P, theirs.pixel_decoder_last_hidden_state, 1e-4)
        close(M, theirs.masks_queries_logits, 1e-4)


def test_each_tensor_deleted_or_renamed_is_named(mask2former, monkeypatch):
    _, folder = mask2former
    given, _ = mtcp.read_weights(folder)
    ours = MTCP(NYUD[:1], SMALL)
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    needed = [k for k in given if not re.fullmatch(mtcp.MASK2FORMER_LEFTOVERS, k)]
    assert len(needed) > 230 and set(given) - set(needed) == {
        "class_predictor.weight", "class_predictor.bias", "criterion.empty_weight",
        f"{mtcp.ENC}.swin.layernorm.weight", f"{mtcp.ENC}.swin.layernorm.bias",
    }  # fmt: skip

    def complaint(tensors: dict) -> str:
        monkeypatch.setattr(mtcp, "read_weights", lambda path: (tensors, {}))
        with pytest.raises(mtcp.WeightsError) as error:
            mtcp.load_mask2former(ours, "file")
        return str(error.value)

    for name in needed:
        without = {k: v for k, v in given.items() if k != name}
        assert name in complaint(without)
        said = complaint({**without, name + "_": given[name]})
        assert f"missing in the file: {name}" in said and f"not in the network: {name}_" in said
    assert "extra" in complaint({**given, "extra": torch.zeros(1)})
    assert all(torch.equal(v, before[k]) for k, v in ours.state_dict().items())  # nothing was half loaded


def mask2former_tensors(cfg: mtcp.MTCPConfig) -> dict:
    """A Mask2Former of these sizes by Hugging Face's names, by our own table; meta tensors take no memory."""
    with torch.device("meta"):
        state = MTCP(NYUD[:1], cfg).state_dict()
    own = {k: v for k, v in state.items() if mtcp.mask2former_names(k)}
    return mtcp._views(own, {k: mtcp.mask2former_names(k) for k in own})


@pytest.mark.parametrize("name", list(mtcp.SWINS.values()))
def test_other_sizes_are_told_with_the_flags_that_fit(name, monkeypatch):
    tensors = mask2former_tensors(replace(PRESETS["paper"], backbone=name, queries=200))
    monkeypatch.setattr(mtcp, "read_weights", lambda path: (tensors, {}))
    with pytest.raises(mtcp.WeightsError) as error:
        mtcp.load_mask2former(MTCP(NYUD[:1], TOY), "file")
    assert f"fits --preset paper --backbone {name} --queries 200" in str(error.value)
    assert "width 256 (network: 32)" in str(error.value) and "queries 200 (network: 16)" in str(error.value)


def test_what_no_preset_fits_and_what_is_no_mask2former(monkeypatch):
    tensors = mask2former_tensors(SMALL)
    monkeypatch.setattr(mtcp, "read_weights", lambda path: (tensors, {}))
    with pytest.raises(mtcp.WeightsError, match="no preset fits"):
        mtcp.load_mask2former(MTCP(NYUD[:1], TOY), "file")
    vit = replace(TOY, backbone="vit_tiny_patch16_224", backbone_args={})
    with pytest.raises(mtcp.WeightsError, match="Swin backbone, and vit_tiny_patch16_224 is none"):
        mtcp.load_mask2former(MTCP(NYUD[:1], vit), "file")
    monkeypatch.setattr(mtcp, "read_weights", lambda path: ({"conv1.weight": torch.zeros(1)}, {}))
    with pytest.raises(mtcp.WeightsError, match="holds no Mask2Former .* conv1.weight"):
        mtcp.load_mask2former(MTCP(NYUD[:1], TOY), "file")


def test_files_of_weights_that_cannot_be_read_are_named(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "boom",))

    torch.save({"model": Bomb()}, tmp_path / "evil.pth")
    torch.save({"model": {"epoch": 3}}, tmp_path / "numbers.pth")
    (tmp_path / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    (tmp_path / "no.index.json").write_text("{}")
    for name, weight_map in (("climbs", {"a": "../a.safetensors"}), ("lacks", {"a": "shard.safetensors"})):
        (tmp_path / f"{name}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for name, said in {
        "evil.pth": "evil.pth cannot be read", "numbers.pth": "something else than tensors",
        "pointer.safetensors": "pointer.safetensors cannot be read; was it downloaded to the end",
        "no.index.json": "no index of a checkpoint", "climbs.index.json": "outside its own folder",
        "lacks.index.json": "shard.safetensors not found", "nowhere": "nowhere not found", ".": "model.safetensors not",
    }.items():  # fmt: skip
        with pytest.raises(mtcp.WeightsError, match=said):
            mtcp.read_weights(tmp_path / name)
    assert not (tmp_path / "boom").exists()


def test_sha256_is_that_of_the_file(tmp_path):
    torch.save({"state_dict": {"a": torch.arange(3)}}, tmp_path / "a.pth")
    tensors, files = mtcp.read_weights(tmp_path / "a.pth")
    assert files == {"a.pth": hashlib.sha256((tmp_path / "a.pth").read_bytes()).hexdigest()}
    assert tensors["a"].tolist() == [0, 1, 2]


SWIN = {"embed_dim": 32, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8)}


@pytest.mark.parametrize(
    "name,args",
    [
        ("swin_tiny_patch4_window7_224", SWIN),
        ("convnext_atto", {}),
        ("deit_tiny_distilled_patch16_224", {}),
        ("vit_small_patch14_reg4_dinov2", {"depth": 3}),
        ("vit_small_patch16_dinov3", {"depth": 3}),
    ],
)
def test_backbone_weights_of_timm_give_timms_features(name, args, tmp_path):
    """Features before our LayerNorm equal those of timm's own features_only network with the same file's weights."""
    torch.manual_seed(0)
    side = timm.get_pretrained_cfg(name).input_size[-1]
    classifier = timm.create_model(name, **args)
    torch.save(classifier.state_dict(), tmp_path / "weights.pth")
    theirs = timm.create_model(
        name,
        features_only=True,
        pretrained=True,
        pretrained_cfg_overlay={"file": str(tmp_path / "weights.pth")},
        **args,
    ).eval()
    ours = mtcp.Backbone(name, **args).eval()
    record = mtcp.load_backbone(ours, tmp_path / "weights.pth")
    assert record["tensors"] == len(ours.net.state_dict())
    assert all(k.startswith(("norm.", "head")) for k in record["not used"])
    ours.norms = nn.ModuleList(nn.Identity() for _ in range(4))
    stride = ours.patch or 32
    x = torch.randn(1, 3, side // stride * (16 if ours.patch else 32), side // stride * (16 if ours.patch else 32))
    with torch.no_grad():
        maps, expected = ours(x), theirs(mtcp.resize(x, (side, side)))
    if ours.patch is not None:  # of the four maps the pyramid makes, that at stride 16 is the ViT's own
        close(maps[2], expected[-1], 1e-4)
    else:
        for m, e in zip(maps, expected, strict=True):
            close(m, e.permute(0, 3, 1, 2) if "swin" in name else e, 1e-4)


def test_backbone_weights_of_the_original_swin(tmp_path):
    """The authors' files merge patches at the end of a stage, timm at the start of the next; and hold two constants."""
    torch.manual_seed(0)
    reference = mtcp.Backbone("swin_tiny_patch4_window7_224", **SWIN)
    original = {}
    for k, v in reference.net.state_dict().items():
        k = k.replace("layers_", "layers.")
        original[re.sub(r"layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", k)] = v
    original |= {"layers.0.blocks.0.attn.relative_position_index": torch.zeros(49, 49), "norm.weight": torch.ones(256)}
    original |= {"norm.bias": torch.ones(256), "head.weight": torch.ones(21841, 256), "head.bias": torch.ones(21841)}
    torch.save({"model": original}, tmp_path / "swin.pth")
    ours = mtcp.Backbone("swin_tiny_patch4_window7_224", **SWIN)
    mtcp.load_backbone(ours, tmp_path / "swin.pth")
    assert all(torch.equal(v, reference.net.state_dict()[k]) for k, v in ours.net.state_dict().items())

    def complaint(tensors: dict, **changes) -> str:
        torch.save(tensors, tmp_path / "other.pth")
        with pytest.raises(mtcp.WeightsError) as error:
            mtcp.load_backbone(
                mtcp.Backbone("swin_tiny_patch4_window7_224", **{**SWIN, **changes}), tmp_path / "other.pth"
            )
        return str(error.value)

    gone = {k: v for k, v in original.items() if k != "layers.2.blocks.1.mlp.fc1.bias"}
    assert "missing in the file: layers.2.blocks.1.mlp.fc1.bias" in complaint(gone)
    assert "not in the network: surprise" in complaint({**original, "surprise": torch.ones(1)})
    assert "another window or image size: layers.0.blocks.0.attn.rel" in complaint(original, window_size=12)
    assert "another shape: patch_embed.proj.weight (32, 3, 4, 4)" in complaint(original, embed_dim=48)


def test_swin_block_against_dense_attention():
    """A shifted block of window 7 on a 10 x 16 map, as attention among all places with a mask and position biases."""
    torch.manual_seed(0)
    C, heads, (H, W), (h, w) = 8, 2, (10, 16), (14, 21)
    stage = mtcp.TaskDecoder(replace(TOY, width=C, task_depths=(2, 1, 1))).eval().stages[0]
    block = stage.blocks[1]
    nn.init.normal_(block.attn.relative_position_bias_table)
    x = torch.randn(1, H, W, C)
    # Padded first, then cut by a grid shifted by 3; the padding is seen, as zeros.
    tokens = F.pad(block.norm1(x), (0, 0, 0, w - W, 0, h - H)).reshape(h * w, C)
    place = torch.cartesian_prod(torch.arange(h), torch.arange(w))
    cell = torch.div(place - 3, 7, rounding_mode="floor")
    together = (cell[:, None] == cell[None]).all(dim=-1)
    apart = (place[:, None] - place[None] + 6).clamp(0, 12)
    bias = block.attn.relative_position_bias_table[apart[..., 0] * 13 + apart[..., 1]]  # (places,places,heads)
    q, k, v = block.attn.qkv(tokens).reshape(-1, 3, heads, C // heads).permute(1, 2, 0, 3)
    logits = q @ k.mT / math.sqrt(C // heads) + bias.permute(2, 0, 1)
    y = logits.masked_fill(~together, -math.inf).softmax(dim=-1) @ v
    y = block.attn.proj(y.transpose(0, 1).reshape(1, h, w, C))[:, :H, :W]
    with torch.no_grad():
        close(block._attn(block.norm1(x)), y)


@pytest.mark.parametrize(
    "name",
    ["deit_tiny_distilled_patch16_224", "vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2",
     "vit_small_patch16_dinov3"],
)  # fmt: skip
def test_plain_vits_at_480_by_640(name):
    """The map at stride 16 is the patch tokens in their places: no class or register tokens, positions resized."""
    torch.manual_seed(0)
    backbone = mtcp.Backbone(name, depth=3).eval()
    whole = timm.create_model(name, depth=3, dynamic_img_size=True, num_classes=0).eval()
    whole.load_state_dict({k.removeprefix("model."): v for k, v in backbone.net.state_dict().items()}, strict=False)
    whole.norm = nn.Identity()  # features_only leaves the last norm out
    backbone.norms[2] = nn.Identity()
    x = torch.randn(1, 3, 480, 640)
    patch = 14 if "14" in name else 16
    with torch.no_grad():
        maps = backbone(x)
        tokens = whole.forward_features(mtcp.resize(x, (30 * patch, 40 * patch)))
    assert [tuple(m.shape[-2:]) for m in maps] == [(120, 160), (60, 80), (30, 40), (15, 20)]
    assert whole.num_prefix_tokens >= 1 and tokens.shape[1] == whole.num_prefix_tokens + 1200
    close(maps[2], tokens[:, whole.num_prefix_tokens :].mT.reshape(maps[2].shape), 1e-4)
    if name != "vit_small_patch16_dinov3":  # its rotary positions are relative: all places of a uniform image are alike
        with torch.no_grad():
            flat = backbone(torch.zeros(1, 3, 480, 640))[2]
        assert flat.std(dim=(2, 3)).mean() > 1e-3


def test_a_window_that_divides_nothing_at_480_by_640():
    args = {"embed_dim": 24, "depths": (1, 1, 1, 2), "num_heads": (1, 2, 4, 8)}
    backbone = mtcp.Backbone("swin_large_patch4_window12_384", **args).eval()
    with torch.no_grad():
        maps = backbone(torch.randn(1, 3, 480, 640))
    assert [tuple(m.shape[1:]) for m in maps] == [(24, 120, 160), (48, 60, 80), (96, 30, 40), (192, 15, 20)]
    # At the nominal 384 x 384 this stage is a single window, and timm without always_partition would drop its shift.
    assert backbone.net.layers_3.blocks[1].shift_size == (6, 6)


def test_backbones_of_one_image_size_are_refused():
    with pytest.raises(ValueError, match="hiera_tiny_224 takes images of one size only"):
        mtcp.Backbone("hiera_tiny_224")


# ======================================================================================================================
# data.py: readers and layouts
# ======================================================================================================================


def write_nyud(root: Path, layout: str, size=(6, 8)) -> dict[str, dict]:
    """A tiny archive in exactly the format of `layout`; returns what the loader should read."""
    rng, expected = np.random.default_rng(0), {}
    for folder in ("gt_sets", "images", "segmentation", "depth", "normals"):
        (root / folder).mkdir(parents=True)
    for split, stems in (("train", ["0003", "0007"]), ("val", ["0011"])):
        (root / f"gt_sets/{split}.txt").write_text("\n".join(stems) + "\n")
        for stem in stems:
            image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
            Image.fromarray(image).save(root / f"images/{stem}.{'jpg' if layout == 'NYUD_MT' else 'png'}")
            semseg = rng.integers(0, 41, size, dtype=np.uint8)
            semseg[0, 0], semseg[0, 1], semseg[0, 2] = 0, 1, 40
            Image.fromarray(semseg).save(root / f"segmentation/{stem}.png")
            depth = rng.uniform(1, 9, size).astype(np.float32)
            depth[1, 1], depth[1, 2] = 0, np.nan
            np.save(root / f"depth/{stem}.npy", depth)
            normals = rng.standard_normal((*size, 3)).astype(np.float32)
            normals /= np.linalg.norm(normals, axis=2, keepdims=True)
            normals[2, 2] = 0
            if layout == "NYUD_MT":
                np.save(root / f"normals/{stem}.npy", normals)
            else:
                Image.fromarray(((normals + 1) * 127.5).round().astype(np.uint8)).save(root / f"normals/{stem}.png")
            expected[stem] = {"image": image, "semseg": semseg, "depth": depth, "normals": normals}
    return expected


@pytest.mark.parametrize("layout", ["NYUD_MT", "NYUDv2"])
def test_nyud_reads_both_archives(tmp_path, layout):
    expected = write_nyud(tmp_path, layout)
    dataset = data.NYUD(tmp_path, "train")
    assert dataset.layout == layout and len(dataset) == 2 and len(data.NYUD(tmp_path, "val")) == 1
    for sample, (stem, truth) in zip((dataset[0], dataset[1]), expected.items(), strict=False):
        assert sample["name"] == stem and sample["size"].tolist() == [6, 8]
        if layout == "NYUDv2":  # lossless
            mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
            close(sample["image"].permute(1, 2, 0), (truth["image"] / 255 - mean) / std)
        assert sample["semseg"][0, :3].tolist() == [IGNORE_INDEX, 0, 39]
        assert sample["semseg"].dtype == torch.int64
        assert sample["depth"].shape == (1, 6, 8) and sample["depth"][0, 1, 1:3].tolist() == [0, 0]
        close(sample["depth"][0, 2:], truth["depth"][2:])
        assert sample["normals"][:, 2, 2].abs().max() == 0
        # Eight bits: steps of 1/127.5, so up to about half a degree.
        close(sample["normals"].permute(1, 2, 0), truth["normals"], 1e-6 if layout == "NYUD_MT" else 0.01)
        close(sample["normals"].norm(dim=0)[3:], torch.ones(3, 8))


def fails(match, *args, **kwargs):
    with pytest.raises(data.DataError, match=match):
        data.NYUD(*args, **kwargs)[0]


def test_nyud_says_what_is_wrong(tmp_path):
    root = tmp_path / "nyud"
    fails("gt_sets/train.txt not found", root, "train")
    write_nyud(root, "NYUD_MT")
    (root / "depth/0007.npy").unlink()
    fails(r"depth: 1 of 2 \(first: depth/0007.npy\)", root, "train")
    assert len(data.NYUD(root, "train", ["semseg", "normals"])) == 2  # without that task, nothing is missing

    depth = root / "depth/0003.npy"
    only = {"stems": ["0003"]}
    np.save(depth, np.ones((5, 8), np.float32))
    fails("different archives", root, "train", **only)
    np.save(depth, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    fails("0003.npy cannot be read", root, "train", **only)
    np.save(depth, np.ones((6, 8), np.float32))
    depth.write_bytes(depth.read_bytes()[:-20])
    fails("0003.npy cannot be read", root, "train", **only)
    np.save(depth, np.ones((6, 8), np.int32))
    fails("expected floats", root, "train", **only)
    np.save(depth, np.ones((6, 8), np.float32))
    image = root / "images/0003.jpg"
    image.write_bytes(image.read_bytes()[:100])
    fails("0003.jpg cannot be read", root, "train", **only)


def test_splits_of_different_archives_are_refused(tmp_path):
    write_nyud(tmp_path / "a", "NYUD_MT")
    write_nyud(tmp_path / "b", "NYUD_MT", size=(5, 7))
    a, b = data.NYUD(tmp_path / "a", "train"), data.NYUD(tmp_path / "b", "val")
    data.require_one_archive(a, data.NYUD(tmp_path / "a", "val"))
    with pytest.raises(data.DataError, match=r"training images are \(6, 8\)"):
        data.require_one_archive(a, b)


def test_npy_header_is_not_trusted_for_its_size(tmp_path):
    path = tmp_path / "huge.npy"
    with open(path, "wb") as f:
        np.lib.format.write_array_header_1_0(f, {"descr": "<f4", "fortran_order": False, "shape": (10**6, 10**6)})
    with pytest.raises(data.DataError, match="cannot be read"):
        data.read_depth(path)  # and not 4 TB of memory


def test_semseg_outside_the_classes_and_rgb_labels_are_refused(tmp_path):
    Image.fromarray(np.full((2, 2), 41, np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(data.DataError, match="class 41"):
        data.read_nyud_semseg(tmp_path / "a.png")
    Image.fromarray(np.zeros((2, 2, 3), np.uint8)).save(tmp_path / "b.png")
    with pytest.raises(data.DataError, match="one 8-bit channel"):
        data.read_nyud_semseg(tmp_path / "b.png")


def test_palette_labels_are_read_as_indices(tmp_path):
    label = Image.fromarray(np.array([[1, 2], [40, 0]], np.uint8), mode="P")
    label.putpalette(data.palette().flatten().tolist())
    label.save(tmp_path / "a.png")
    assert data.read_nyud_semseg(tmp_path / "a.png").tolist() == [[0, 1], [39, IGNORE_INDEX]]


def test_old_archive_and_wandering_stems_are_refused(tmp_path):
    write_nyud(tmp_path, "NYUD_MT")
    (tmp_path / "normals/0003.jpg").write_bytes(b"")
    fails("older NYUD_MT", tmp_path, "train")
    (tmp_path / "gt_sets/train.txt").write_text("../../etc/passwd\n")
    fails("no list of file stems", tmp_path, "train")


def mat(path: Path, *objects: tuple[str, int, np.ndarray, list]) -> None:
    """PASCAL-Part's struct, written field by field with scipy: anno.imname, anno.objects(n).parts(m)."""

    def structs(fields, rows):
        array = np.empty((1, len(rows)), dtype=[(f, object) for f in fields])
        for i, row in enumerate(rows):
            array[0, i] = row
        return array if rows else np.zeros((0, 0))

    rows = [(n, float(c), m.astype(np.uint8), structs(("part_name", "mask"), parts)) for n, c, m, parts in objects]
    anno = structs(("imname", "objects"), [("x", structs(("class", "class_ind", "mask", "parts"), rows))])
    scipy.io.savemat(path, {"anno": anno})


def box(top, left, bottom, right, size=(8, 10)) -> np.ndarray:
    mask = np.zeros(size, np.uint8)
    mask[top:bottom, left:right] = 1
    return mask


def test_human_parts_of_several_people_and_none(tmp_path):
    path, size = tmp_path / "a.mat", (8, 10)
    head, arm, leg = box(0, 0, 2, 2), box(2, 0, 4, 2), box(4, 6, 8, 8)
    mat(
        path,
        ("person", 15, box(0, 0, 4, 2), [("lear", head), ("lhand", arm)]),
        ("person", 15, box(0, 5, 8, 8), [("rfoot", leg)]),
        ("person", 15, box(0, 9, 8, 10), []),  # nobody has drawn this one's parts
        ("dog", 12, box(5, 0, 8, 4), [("head", box(5, 0, 6, 2)), ("torso", box(6, 0, 8, 4))]),
    )
    close(data.read_human_parts(path, size), 1 * head + 4 * arm + 6 * leg)
    mat(path, ("dog", 12, box(5, 0, 8, 4), [("head", head)]), ("person", 15, leg, []))
    assert (data.read_human_parts(path, size) == IGNORE_INDEX).all()  # no annotated person: nothing is known
    mat(path)
    assert (data.read_human_parts(path, size) == IGNORE_INDEX).all()


def test_all_24_part_names_are_grouped_as_in_the_literature():
    groups = {
        1: "hair head lear lebrow leye mouth nose rear rebrow reye", 2: "neck torso", 3: "luarm ruarm",
        4: "llarm rlarm lhand rhand", 5: "luleg ruleg", 6: "llleg rlleg lfoot rfoot",
    }  # fmt: skip
    assert len(data.PART_LABELS) == 24
    assert all(data.PART_LABELS[name] == label for label, names in groups.items() for name in names.split())


def test_bad_part_files_are_named(tmp_path):
    path = tmp_path / "a.mat"
    mat(path, ("person", 15, box(0, 0, 4, 2), [("tail", box(0, 0, 2, 2))]))
    with pytest.raises(data.DataError, match="tail"):
        data.read_human_parts(path, (8, 10))
    with pytest.raises(data.DataError, match="archives were mixed"):
        data.read_human_parts(path, (9, 10))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(data.DataError, match="a.mat cannot be read"):
        data.read_human_parts(path, (8, 10))


def write_pascal(root: Path) -> None:
    """Two images of different sizes; the second has no labels of VOC's own."""
    for folder in PASCAL_FOLDERS:
        (root / folder).mkdir(parents=True)
    for split, stem, size in (("train", "2008_000002", (8, 10)), ("val", "2008_000003", (12, 6))):
        (root / f"ImageSets/Context/{split}.txt").write_text(stem + "\n")
        Image.fromarray(np.zeros((*size, 3), np.uint8)).save(root / f"JPEGImages/{stem}.jpg")
        label = np.arange(size[0] * size[1], dtype=np.uint8).reshape(size) % 21
        label[0, 0] = 255
        Image.fromarray(label).save(root / f"semseg/pascal-context/{stem}.png")
        if split == "train":
            Image.fromarray(np.full(size, 15, np.uint8)).save(root / f"semseg/VOC12/{stem}.png")
        Image.fromarray(np.tile(np.array([[0, 127, 128, 255]], np.uint8), (size[0], 3))[:, : size[1]]).save(
            root / f"sal_distill/{stem}.png"
        )
        parts = [("head", box(0, 0, 3, 3, size))]
        mat(root / f"human_parts/{stem}.mat", ("person", 15, box(0, 0, 4, 4, size), parts))


PASCAL_FOLDERS = (
    "ImageSets/Context", "JPEGImages", "semseg/VOC12", "semseg/pascal-context", "human_parts", "sal_distill",
)  # fmt: skip


def test_pascal_layout(tmp_path):
    write_pascal(tmp_path)
    train_sample, val_sample = data.PASCAL(tmp_path, "train")[0], data.PASCAL(tmp_path, "val")[0]
    assert (train_sample["semseg"] == 15).all()  # VOC12 comes first
    assert val_sample["semseg"][0, :3].tolist() == [255, 1, 2] and val_sample["size"].tolist() == [12, 6]
    assert train_sample["sal"][0, 0, :4].tolist() == [0, 0, 1, 1]
    assert train_sample["human_parts"].unique().tolist() == [0, 1]
    (tmp_path / "human_parts/2008_000003.mat").unlink()
    with pytest.raises(data.DataError, match="human_parts: 1 of 1"):
        data.PASCAL(tmp_path, "val")
    with pytest.raises(data.DataError, match="no PASCAL-Context|not found"):
        data.PASCAL(tmp_path / "nowhere", "val")


def test_part_maps_are_cached_and_the_cache_survives(tmp_path, monkeypatch):
    root = tmp_path / "pascal"
    write_pascal(root)
    first = data.PASCAL(root, "train")[0]["human_parts"]
    cached = root / "human_parts_png/2008_000002.png"
    assert cached.is_file()
    with monkeypatch.context() as patch:
        patch.setattr(data, "read_part_objects", lambda path: pytest.fail("decoded again"))
        assert torch.equal(data.PASCAL(root, "train")[0]["human_parts"], first)
    source = root / "human_parts/2008_000002.mat"
    mat(source, ("person", 15, box(0, 0, 4, 4), [("lfoot", box(0, 0, 3, 3))]))  # a newer annotation
    os.utime(source, (cached.stat().st_mtime + 5,) * 2)
    assert data.PASCAL(root, "train")[0]["human_parts"].unique().tolist() == [0, 6]

    monkeypatch.setattr(os, "access", lambda path, mode: False)  # as on a read-only archive
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.rmtree(root / "human_parts_png")
    assert data.PASCAL(root, "train")[0]["human_parts"].unique().tolist() == [0, 6]
    assert not (root / "human_parts_png").exists() and len(list((tmp_path / "cache").rglob("*.png"))) == 1


def test_hold_out_splits_without_overlap():
    stems = [str(i) for i in range(40)]
    keep, held_out = data.hold_out(stems, 0.05)
    assert keep + held_out == stems and len(held_out) == 2
    assert data.hold_out(stems, 0.0) == (stems, [])


# ======================================================================================================================
# data.py: transforms
# ======================================================================================================================


def a_sample(H=12, W=16) -> dict:
    torch.manual_seed(0)
    return {
        "image": torch.rand(3, H, W), "name": "x", "size": torch.tensor([H, W]),
        "semseg": torch.randint(0, 40, (H, W)), "depth": torch.rand(1, H, W) + 1,
        "normals": F.normalize(torch.randn(3, H, W), dim=0),
    }  # fmt: skip


def test_flip_twice_is_identity_for_every_key():
    sample = a_sample()
    twice = data.flip(data.flip(sample))
    assert all(torch.equal(sample[k], twice[k]) for k in sample if k != "name")
    once = data.flip(sample)
    assert all(not torch.equal(sample[k], once[k]) for k in ("image", "semseg", "depth", "normals"))


def test_flip_agrees_with_geometry():
    """A slanted plane z = 2 + x: its normal computed from the flipped depth is the flipped normal."""
    room = data.render_room(seed=0, index=3, height=48, width=64)
    sample = {"image": torch.zeros(3, 48, 64), "depth": torch.from_numpy(room["depth"])[None]}
    sample["normals"] = torch.from_numpy(room["normals"]).permute(2, 0, 1)
    flipped = data.flip(sample)
    # The mirrored camera has its principal point mirrored too.
    fx, fy, cx, cy = data.nyu_intrinsics(48, 64)
    angle = normals_error(
        flipped["depth"][0].numpy(), flipped["normals"].permute(1, 2, 0).numpy(), (fx, fy, 63 - cx, cy)
    )
    assert np.median(angle) < 1


def test_zoom_divides_depth_and_keeps_the_centre():
    sample = a_sample(13, 17)
    sample["depth"][0, 6, 8], sample["semseg"][6, 8] = 3.0, 7
    zoomed = data.zoom(sample, 1.5)
    assert zoomed["depth"].shape == (1, 13, 17)
    assert zoomed["depth"][0, 6, 8].item() == 2.0 and zoomed["semseg"][6, 8] == 7
    assert torch.equal(data.zoom(sample, 1.0)["depth"], sample["depth"])


def test_rotation_turns_pixels_and_normals_the_same_way():
    """A quarter turn anticlockwise is torch.rot90; what pointed right points up."""
    sample = a_sample(12, 12)
    turned = data.rotate(sample, 90.0)
    for key in ("image", "semseg", "depth"):
        close(turned[key], torch.rot90(sample[key], 1, (-2, -1)), 1e-4)
    right, forward, up = torch.rot90(sample["normals"], 1, (-2, -1))
    close(turned["normals"], torch.stack([-up, forward, right]), 1e-5)
    close(data.rotate(turned, -90.0)["normals"], sample["normals"], 1e-5)


def test_rotation_agrees_with_geometry():
    """Normals computed from the rotated depth are the rotated normals."""
    H, W = 384, 512
    room = data.render_room(seed=0, index=3, height=H, width=W)
    sample = {"image": torch.zeros(3, H, W), "depth": torch.from_numpy(room["depth"])[None]}
    sample["normals"] = torch.from_numpy(room["normals"]).permute(2, 0, 1)
    for degrees in (-20, 15):
        turned = data.rotate(sample, degrees)
        # The principal point of NYU's camera is near the centre of the picture but not on it: it turns too.
        cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        fx, fy, cx, cy = data.nyu_intrinsics(H, W)
        dx, dy = cx - (W - 1) / 2, cy - (H - 1) / 2
        cx, cy = (W - 1) / 2 + cos * dx + sin * dy, (H - 1) / 2 - sin * dx + cos * dy
        # Labels are rotated by taking the nearest pixel, which makes small steps in depth: average 4x4 pixels.
        depth, normals = (F.avg_pool2d(turned[k], 4) for k in ("depth", "normals"))
        pooled = (fx / 4, fy / 4, (cx + 0.5) / 4 - 0.5, (cy + 0.5) / 4 - 0.5)
        error = normals_error(depth[0].numpy(), normals.permute(1, 2, 0).numpy(), pooled)
        assert np.median(error) < 2, np.median(error)


def test_rotation_ignores_what_comes_from_outside():
    sample = {**a_sample(), "sal": torch.ones(1, 12, 16), "human_parts": torch.ones(12, 16, dtype=torch.int64)}
    small = data.rotate(sample, 0.0, scale=0.5)
    for key, outside in data.OUTSIDE.items():
        corner = small[key][..., 0, 0]
        assert (corner == outside).all(), key
        assert (small[key][..., 6, 8] != outside).any(), key
    close(data.rotate(sample, 0.0, scale=2.0)["depth"][0, 6, 8], sample["depth"][0, 6, 8] / 2)


def test_pictures_show_what_is_ignored_in_white():
    assert data.picture("sal", torch.tensor([[[0.0, 1.0, IGNORE_INDEX]]])).tolist() == [[[0] * 3, [255] * 3, [255] * 3]]
    assert data.picture("semseg", torch.tensor([[IGNORE_INDEX]])).tolist() == [[[255] * 3]]
    assert data.picture("depth", torch.zeros(1, 1, 1)).tolist() == [[[255] * 3]]
    assert data.picture("normals", torch.zeros(3, 1, 1)).tolist() == [[[255] * 3]]


def test_resize_invents_no_label():
    sample = a_sample()
    sample["depth"][:, ::2] = 0
    small = data.resize(sample, (7, 9))
    assert small["image"].shape == (3, 7, 9) and small["semseg"].dtype == torch.int64
    for key in ("semseg", "depth"):
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


# ======================================================================================================================
# data.py: rooms
# ======================================================================================================================


def normals_error(depth: np.ndarray, normals: np.ndarray, intrinsics: tuple, coverage=0.3) -> np.ndarray:
    """Degrees between `normals` and those computed from depth by cross products, where the surface is smooth."""
    fx, fy, cx, cy = intrinsics
    v, u = np.mgrid[: depth.shape[0], : depth.shape[1]]
    points = np.stack([(u - cx) * depth / fx, depth, -(v - cy) * depth / fy], axis=-1)  # right, forward, up
    along_u, along_v = points[1:-1, 2:] - points[1:-1, :-2], points[2:, 1:-1] - points[:-2, 1:-1]
    n = np.cross(along_u, along_v)
    n /= np.maximum(np.linalg.norm(n, axis=2, keepdims=True), 1e-9)
    n *= -np.sign((n * points[1:-1, 1:-1]).sum(axis=2, keepdims=True))  # towards the camera
    same = [np.abs(np.roll(normals, s, a) - normals).max(axis=2) < 0.05 for a in (0, 1) for s in (1, -1)]
    second = [np.abs(np.roll(depth, 1, a) + np.roll(depth, -1, a) - 2 * depth) < 0.02 for a in (0, 1)]
    smooth = (np.all(same, axis=0) & np.all(second, axis=0) & (depth > 0))[1:-1, 1:-1]
    assert smooth.mean() > coverage
    return np.degrees(np.arccos(np.clip((n * normals[1:-1, 1:-1]).sum(axis=2), -1, 1)))[smooth]


@pytest.mark.parametrize("index", range(4))
def test_rendered_normals_are_those_of_the_rendered_depth(index):
    room = data.render_room(seed=0, index=index, height=96, width=128)
    angle = normals_error(room["depth"], room["normals"], data.nyu_intrinsics(96, 128))
    # Exact on planes; on balls of a dozen pixels' radius, a difference of neighbours is off by a few degrees.
    assert np.median(angle) < 0.1 and np.percentile(angle, 95) < 5, np.percentile(angle, (50, 95))
    length = np.linalg.norm(room["normals"], axis=2)
    assert np.all((length == 0) == (room["depth"] == 0)) and np.allclose(length[length > 0], 1, atol=1e-5)


def test_same_seed_same_bytes():
    a, b, c = (data.render_room(s, 5, 24, 32) for s in (0, 0, 1))
    assert all(np.array_equal(a[k], b[k]) for k in a)
    assert not np.array_equal(a["image"], c["image"])


def test_rendered_figures_agree_with_themselves(tmp_path):
    scenes = [data.render_figures(0, i, 48, 64) for i in range(12)]
    again = data.render_figures(0, 3, 48, 64)
    assert np.array_equal(again["image"], scenes[3]["image"]) and np.array_equal(again["semseg"], scenes[3]["semseg"])
    parts_seen = set()
    for scene in scenes:
        for thing in scene["objects"]:
            inside = thing["mask"].astype(bool)
            labelled = scene["semseg"][inside]
            assert set(np.unique(labelled)) <= {thing["class_index"], IGNORE_INDEX}
            assert all(not (part.astype(bool) & ~inside).any() for _, part in thing["parts"])
            if thing["class_index"] == data.PERSON:
                parts_seen |= {data.PART_LABELS[name] for name, _ in thing["parts"]}
        with open(tmp_path / "x.mat", "wb") as f:
            data.write_part_mat(f, "x", scene["objects"])
        label = data.read_human_parts(tmp_path / "x.mat", (48, 64))
        assert (label == IGNORE_INDEX).all() or set(np.unique(label)) <= set(range(7))
    assert parts_seen == {1, 2, 3, 4, 5, 6}


def files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_rooms_cut_short_are_finished_and_nothing_is_overwritten(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    make = partial(data.render_set, "rooms", train=3, val=2, size=(24, 32), seed=7)
    make(a)
    make(b)
    assert files(a) == files(b) and len(files(a)) == 5 * 4 + 3
    marker = json.loads((a / "rendered.json").read_text())
    (a / "rendered.json").write_text(json.dumps({**marker, "complete": False}))  # as if killed half way
    (a / "gt_sets/val.txt").unlink()
    (a / "normals/rooms_00004.npy").unlink()
    (a / "depth/rooms_00004.npy").write_bytes(b"torn")
    make(a)
    assert files(a) == files(b)
    (a / "depth/rooms_00003.npy").rename(tmp_path / "kept.npy")
    data.ensure_set("rooms", a)  # any whole set will do; it is not even looked into
    (tmp_path / "kept.npy").rename(a / "depth/rooms_00003.npy")
    with pytest.raises(data.DataError, match="wanted"):
        make(a, seed=8)
    with pytest.raises(data.DataError, match="wanted"):
        data.ensure_set("figures", a)
    assert files(a) == files(b)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("precious")
    with pytest.raises(data.DataError, match="not empty"):
        make(tmp_path / "mine")


@pytest.fixture(scope="module")
def rooms(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data") / "rooms"
    data.render_set("rooms", root, train=12, val=4, size=(64, 96))
    return root


def test_check_passes_rooms_and_finds_what_is_broken(rooms, tmp_path, capsys):
    assert data.check(data.NYUD, rooms, tmp_path / "sheet.png") == 0
    said = capsys.readouterr().out
    assert "train: 12 stems, layout NYUD_MT" in said and "wall" in said and "no problems" in said
    assert Image.open(tmp_path / "sheet.png").width > 4 * 100

    write_nyud(tmp_path / "n", "NYUD_MT")
    (tmp_path / "n/segmentation/0011.png").unlink()
    np.save(tmp_path / "n/normals/0003.npy", np.full((6, 8, 3), 0.9, np.float32))
    (tmp_path / "n/depth/0007.npy").write_bytes(b"")
    assert data.check(data.NYUD, tmp_path / "n", tmp_path / "sheet.png") >= 3
    said = capsys.readouterr().out
    assert "val semseg: 1 of 1 files missing" in said
    assert "not unit vectors in 1 files" in said and "0007.npy cannot be read" in said


# ======================================================================================================================
# train.py: metrics
# ======================================================================================================================


def test_miou_against_brute_force():
    torch.manual_seed(0)
    metric = train.SegmentationMetric(replace(NYUD[0], channels=5))
    preds, truths = [], []
    for _ in range(3):
        logits, target = torch.randn(2, 5, 4, 6), torch.randint(0, 4, (2, 4, 6))  # class 4: predicted, never true
        target[:, 0] = IGNORE_INDEX
        metric.update(logits, target)
        preds += logits.argmax(1).flatten().tolist()
        truths += target.flatten().tolist()
    pairs = [(p, t) for p, t in zip(preds, truths, strict=True) if t != IGNORE_INDEX]
    iou = []
    for c in range(4):
        both = sum(p == c and t == c for p, t in pairs)
        iou.append(both / sum(p == c or t == c for p, t in pairs))
    close(metric.compute()["mIoU"], 100 * sum(iou) / 4)
    close(metric.compute()["pixel_acc"], 100 * sum(p == t for p, t in pairs) / len(pairs))


def test_depth_rmse_in_both_protocols():
    metric = train.DepthMetric(NYUD[1])
    metric.update(torch.tensor([[[[1.0, 5.0]]]]), torch.tensor([[[[2.0, 0.0]]]]))
    metric.update(torch.tensor([[[[4.0, 9.0]]]]), torch.tensor([[[[2.0, 6.6]]]]))
    close(metric.compute()["rmse"], math.sqrt((1 + 4 + 2.4**2) / 3))
    close(metric.compute()["rmse_lt6.55"], math.sqrt((1 + 4) / 2))


def test_normals_metric_against_brute_force():
    torch.manual_seed(0)
    metric, angles = train.NormalsMetric(NYUD[2]), []
    for _ in range(2):
        a, b = (F.normalize(torch.randn(2, 3, 5, 7), dim=1) for _ in range(2))
        a[:, :, 1] = F.normalize(b[:, :, 1] + 0.1, dim=1)  # some small angles
        b[:, :, 0] = 0
        metric.update(a, b)
        angles += [
            math.degrees(math.acos(max(-1.0, min(1.0, (a[i, :, y, x] * b[i, :, y, x]).sum().item()))))
            for i, y, x in np.ndindex(2, 5, 7)
            if y > 0
        ]
    out = metric.compute()
    close(out["mean"], np.mean(angles), 1e-3)
    close(out["median"], np.sort(angles)[(len(angles) - 1) // 2], 0.011)  # bins of 0.01°
    for limit in (11.25, 22.5, 30):
        close(out[f"below_{limit}"], 100 * np.mean(np.array(angles) < limit))


def test_saliency_against_brute_force():
    torch.manual_seed(0)
    metric, images = train.SaliencyMetric(mtcp.PASCAL[2]), []
    for _ in range(2):
        logits, target = torch.randn(2, 1, 6, 7) * 2, (torch.rand(2, 1, 6, 7) > 0.6).float()
        target[:, :, 0] = IGNORE_INDEX
        metric.update(logits, target)
        images += [
            (torch.sigmoid(y[0, 1:]).flatten().tolist(), t[0, 1:].flatten().tolist())
            for y, t in zip(logits, target, strict=True)
        ]

    def precision_recall(pairs, hit):
        tp = sum(hit(p) and t == 1 for p, t in pairs)
        predicted, true = sum(hit(p) for p, _ in pairs), sum(t == 1 for _, t in pairs)
        return (tp / predicted if predicted else 0), (tp / true if true else 0)

    best = 0
    for threshold in np.linspace(0.2, 0.9, 15):
        pr = [precision_recall(list(zip(*image, strict=True)), lambda p, th=threshold: p > th) for image in images]
        P, R = np.mean(pr, axis=0)
        best = max(best, 2 * P * R / (P + R))
    close(metric.compute()["maxF"], 100 * best, 1e-3)
    best, everything = 0, [pair for image in images for pair in zip(*image, strict=True)]
    for threshold in np.arange(0.05, 0.96, 0.05):
        P, R = precision_recall(everything, lambda p, th=threshold: p >= th)
        best = max(best, 1.3 * P * R / (0.3 * P + R) if P + R else 0)
    close(metric.compute()["maxF_pooled"], 100 * best, 1e-3)


def test_delta_m_with_mixed_directions(tmp_path):
    single = {"semseg": {"mIoU": 40.0}, "depth": {"rmse": 0.5}, "normals": {"mean": 20.0}}
    results = {"semseg": {"mIoU": 44.0}, "depth": {"rmse": 0.6}, "normals": {"mean": 19.0}}
    close(train.delta_m(NYUD, results, single), (10 - 20 + 5) / 3)


def test_geometric_coherence_of_the_truth_is_near_zero_degrees():
    coherence = train.GeometricCoherence(data.nyu_intrinsics(96, 128))
    for i in range(3):
        room = data.render_room(0, i, 96, 128)
        truth = {"depth": torch.from_numpy(room["depth"])[None, None]}
        truth["normals"] = torch.from_numpy(room["normals"]).permute(2, 0, 1)[None]
        truth["semseg"] = torch.from_numpy(room["semseg"].astype(np.int64))[None]
        y = {**truth, "semseg": F.one_hot(truth["semseg"], 41).permute(0, 3, 1, 2).float()}
        coherence.update(y, truth)
        tilted = {**y, "normals": truth["normals"][:, [0, 2, 1]]}  # forward and up exchanged
    out = coherence.compute()
    assert out["normal_angle"] < 3 and out["normal_angle"] == out["normal_angle_truth"]
    assert out["boundary_F"] > 50
    coherence = train.GeometricCoherence(data.nyu_intrinsics(96, 128))
    coherence.update(tilted, truth)
    assert coherence.compute()["normal_angle"] > 45


def test_semantic_coherence_by_hand():
    coherence = train.SemanticCoherence()
    semseg = torch.tensor([[[0, 15, 15, 7]]])
    y = {
        "semseg": F.one_hot(semseg, 21).permute(0, 3, 1, 2).float(),
        "human_parts": F.one_hot(torch.tensor([[[1, 2, 0, 0]]]), 7).permute(0, 3, 1, 2).float(),
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


def test_metrics_of_nothing_are_nan():
    metric = train.DepthMetric(NYUD[1])
    metric.update(torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2))
    assert math.isnan(metric.compute()["rmse"])
    assert math.isnan(train.NormalsMetric(NYUD[2]).compute()["mean"])


def test_trivial_predictor_and_score(tmp_path):
    write_nyud(tmp_path, "NYUD_MT")
    dataset = data.NYUD(tmp_path, "train")
    constant = train.ConstantPredictor(NYUD, data.make_loader(dataset, 2, False, 0, 0))
    a, b = dataset[0], dataset[1]
    depth = torch.cat([s["depth"][s["depth"] > 0] for s in (a, b)])
    out = constant(torch.zeros(1, 3, 6, 8))
    close(out["depth"]["final"], depth.mean().expand(1, 1, 6, 8))
    classes = torch.cat([s["semseg"].flatten() for s in (a, b)])
    majority = classes[classes != IGNORE_INDEX].bincount(minlength=40)
    assert majority[out["semseg"]["final"].argmax(1)[0, 0, 0]] == majority.max()
    mean = sum(s["normals"].sum(dim=(1, 2)) for s in (a, b))
    close(out["normals"]["final"][0, :, 0, 0], mean / mean.norm())

    trivial = {"semseg": {"mIoU": 10.0}, "depth": {"rmse": 2.0}, "normals": {"mean": 40.0}}
    results = {"semseg": {"mIoU": 15.0}, "depth": {"rmse": 1.0}, "normals": {"mean": 44.0}}
    close(train.score(NYUD, results, trivial), (50 + 50 - 10) / 3)


def test_evaluation_is_at_the_labels_resolution():
    y = train.at_label_size(NYUD[2], F.normalize(torch.randn(1, 3, 4, 4), dim=1), torch.zeros(1, 3, 9, 7))
    assert y.shape == (1, 3, 9, 7)
    close(y.norm(dim=1), torch.ones(1, 9, 7))


def test_schedule():
    assert train.lr_factor(0, 100, 0) == 1 and train.lr_factor(100, 100, 0) == 0
    close(train.lr_factor(50, 100, 0), 0.5**0.9)
    assert train.lr_factor(0, 100, 9) == pytest.approx(0.1)


# ======================================================================================================================
# train.py: runs
# ======================================================================================================================


def run(rooms: Path, out: Path, *flags: str) -> dict:
    base = ["--root", str(rooms), "--out", str(out), "--batch-size", "4", "--workers", "0", "--device", "cpu"]
    return train.main(train.parse_args([*base, *flags]))


def test_a_run_writes_its_folder_and_repeats_and_resumes_exactly(rooms, tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "toy", replace(TOY, drop_path=0.5))  # something that draws at random in every step
    whole = run(rooms, tmp_path / "a", "--epochs", "2", "--holdout", "0.2")
    assert {p.name for p in (tmp_path / "a").iterdir()} == {
        "config.json", "log.jsonl", "last.pt", "best.pt", "metrics.json", "predictions.png",
    }  # fmt: skip
    log = [json.loads(line) for line in (tmp_path / "a/log.jsonl").read_text().splitlines()]
    assert [entry["epoch"] for entry in log] == [0, 1] and log[0]["weight"] == {"semseg": 1, "depth": 1, "normals": 1}
    assert log[1]["weight"]["semseg"] != 1  # LPS has acted
    assert set(whole["test"]["depth"]) == {"rmse", "rmse_lt6.55", "cosine_before", "cosine_after"}

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # pull the plug at the start of the second epoch
        original, calls = mtcp.LPS.end_epoch, []
        patch.setattr(mtcp.LPS, "end_epoch", lambda self: stop() if calls else (calls.append(1), original(self)))
        with pytest.raises(KeyboardInterrupt):
            run(rooms, tmp_path / "b", "--epochs", "2", "--holdout", "0.2")
    with pytest.raises(data.DataError, match="begun with --kappa 1.6"):
        run(rooms, tmp_path / "b", "--epochs", "2", "--holdout", "0.2", "--resume", "--kappa", "3")
    resumed = run(rooms, tmp_path / "b", "--epochs", "2", "--holdout", "0.2", "--resume")
    assert resumed["test"] == whole["test"]
    ends = [train.load_checkpoint(tmp_path / run_name / "last.pt")["model"] for run_name in ("a", "b")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    with pytest.raises(data.DataError, match="not empty"):
        run(rooms, tmp_path / "b")

    args = train.parse_args(
        ["--root", str(rooms), "--eval", str(tmp_path / "a/best.pt"), "--workers", "0", "--device", "cpu"]
    )
    assert train.evaluate_checkpoint(args)["test"]["depth"]["rmse"] == pytest.approx(whole["test"]["depth"]["rmse"])


@pytest.mark.parametrize(
    "flags",
    [
        ["--balancer", "uncertainty", "--tasks", "depth", "--amp"],
        ["--balancer", "dwa", "--no-cfm", "--tasks", "semseg", "normals", "--size", "40", "56", "--holdout", "0"],
        ["--balancer", "equal", "--no-trace-back", "--cfm-stride", "2"],
        ["--model", "baseline"],
    ],
)
def test_flags(rooms, tmp_path, flags):
    report = run(rooms, tmp_path / "run", "--epochs", "1", *flags)
    assert all(math.isfinite(v) for metrics in report["test"].values() for v in metrics.values())


def test_single_task_networks_and_delta_m(rooms, tmp_path, capsys):
    base = ["--root", str(rooms), "--batch-size", "4", "--workers", "0", "--device", "cpu", "--epochs", "1"]
    tasks = ["--tasks", "depth", "normals"]
    assert train.cli([*base, *tasks, "--model", "single", "--out", str(tmp_path / "single")]) == 0
    single = json.loads((tmp_path / "single/metrics.json").read_text())["test"]
    assert set(single) == {"depth", "normals"} and (tmp_path / "single/depth/best.pt").is_file()
    flags = ["--single", str(tmp_path / "single/metrics.json"), "--out", str(tmp_path / "b")]
    assert train.cli([*base, *tasks, "--model", "baseline", *flags]) == 0
    report = json.loads((tmp_path / "b/metrics.json").read_text())
    gains = [single[t][m] / report["test"][t][m] for t, m in (("depth", "rmse"), ("normals", "mean"))]
    expected = 100 * np.mean([1 - 1 / g for g in gains])
    assert report["delta_m"] == pytest.approx(expected) and "Δm" in capsys.readouterr().out


def test_a_run_on_figures(tmp_path):
    root = tmp_path / "figures"
    data.render_set("figures", root, train=12, val=4, size=(64, 96))
    assert data.check(data.PASCAL, root, tmp_path / "sheet.png") == 0
    report = run(root, tmp_path / "run", "--dataset", "figures", "--epochs", "1")
    assert set(report["test"]["sal"]) >= {"maxF", "maxF_pooled"} and set(report["test"]) == {
        "semseg", "human_parts", "sal", "coherence",
    }  # fmt: skip
    assert report["trivial"]["sal"]["maxF"] > 5  # "everything is salient" finds all that is


def test_pascal_pictures_of_different_sizes(tmp_path):
    write_pascal(tmp_path / "p")
    flags = ["--dataset", "pascal", "--preset", "toy", "--size", "64", "64", "--epochs", "1", "--holdout", "0"]
    report = run(tmp_path / "p", tmp_path / "run", *flags)
    assert 0 <= report["test"]["human_parts"]["mIoU"] <= 100


def test_a_tiny_run_overfits_four_images(rooms):
    torch.manual_seed(0)
    dataset = data.NYUD(rooms, "train", stems=data.NYUD.list_stems(rooms, "train")[:4])
    batch = next(iter(data.make_loader(dataset, 4, False, 0, 0)))
    model, balancer = MTCP(NYUD, TOY).train(), LPS([t.name for t in NYUD], kappa=7.5, prioritise=False)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(120):
        outputs = model(batch["image"])
        total = balancer(mtcp.task_losses(NYUD, outputs, batch))
        optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), train.CLIP_NORM)
        optimizer.step()
    metrics = {}
    for t in NYUD:
        metric = train.METRICS[t.metric](t)
        metric.update(outputs[t.name]["final"].detach(), batch[t.name])
        metrics |= metric.compute()
    assert metrics["pixel_acc"] > 90 and metrics["rmse"] < 0.35 and metrics["mean"] < 15, metrics


def test_a_run_says_what_it_started_from(rooms, tmp_path, capsys, monkeypatch):
    torch.manual_seed(3)
    cfg = PRESETS["toy"]
    donor = MTCP(NYUD, cfg)
    own = {k: v for k, v in donor.state_dict().items() if mtcp.mask2former_names(k)}
    file = tmp_path / "model.safetensors"
    views = mtcp._views(own, {k: mtcp.mask2former_names(k) for k in own})
    save_file({k: v.contiguous() for k, v in views.items()}, file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()

    model = train.make_model(train.parse_args(["--root", str(rooms), "--mask2former", str(file)]))
    train.load_start(train.parse_args(["--root", str(rooms), "--mask2former", str(file)]), model)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in own.items()) and len(own) > 150

    run(rooms, tmp_path / "a", "--epochs", "1", "--mask2former", str(file))
    first = capsys.readouterr().out.splitlines()[0]
    assert all(part in first for part in (str(file), digest[:12], f"{len(views)} tensors", "query_decoder"))
    start = json.loads((tmp_path / "a/config.json").read_text())["start"]
    assert start["sha256"] == {"model.safetensors": digest} and start["tensors"] == len(views)

    asked = []
    torch.save(timm.create_model(cfg.backbone, **cfg.backbone_args).state_dict(), tmp_path / "swin.pth")
    monkeypatch.setattr(train, "hf_hub_download", lambda *a: asked.append(a) or str(tmp_path / "swin.pth"))
    for flags in (["--pretrained"], ["--backbone-weights", str(tmp_path / "swin.pth")]):
        args = train.parse_args(["--root", str(rooms), *flags])
        record = train.load_start(args, train.make_model(args))
        assert record["from"] == str(tmp_path / "swin.pth") and record["into"] == "backbone"
    assert asked == [("timm/swin_tiny_patch4_window7_224.ms_in1k", "model.safetensors")]
    run(rooms, tmp_path / "b", "--epochs", "1")
    assert capsys.readouterr().out.splitlines()[0].endswith("b: starts from random weights")


def test_other_backbone_and_queries_survive_a_checkpoint(rooms, tmp_path):
    flags = ["--backbone", "convnext_atto", "--queries", "5", "--tasks", "depth"]
    run(rooms, tmp_path / "a", "--epochs", "1", *flags)
    args = ["--root", str(rooms), "--eval", str(tmp_path / "a/best.pt"), "--workers", "0", "--device", "cpu"]
    model = train.model_from(train.load_checkpoint(tmp_path / "a/best.pt"), tmp_path / "a/best.pt")
    assert model.cfg.backbone == "convnext_atto" and len(model.query_decoder.query_features.weight) == 5
    assert math.isfinite(train.evaluate_checkpoint(train.parse_args(args))["test"]["depth"]["rmse"])


@pytest.mark.parametrize(
    "flags,said",
    [
        (["--dataset", "nyud"], "needs --root"),
        (["--dataset", "nyud", "--root", "nowhere", "--from-scratch"], "gt_sets"),
        (["--dataset", "nyud", "--root", "nowhere"], "--from-scratch"),
        (["--preset", "vit"], "--backbone-weights FILE"),
        (["--backbone", "swim_tiny"], "no model of timm"),
        (["--queries", "0"], "positive"),
        (["--tasks", "edges"], "semseg depth normals"),
        (["--epochs", "0"], "positive"),
        (["--eval", "nowhere.pt"], "nowhere.pt not found"),
        (["--resume"], "needs --out"),
    ],
)
def test_bad_input_gets_one_sentence_and_status_2(tmp_path, monkeypatch, capsys, flags, said):
    monkeypatch.chdir(tmp_path)
    try:
        status = train.cli(flags)
    except SystemExit as exit:  # argparse's way
        status = exit.code
    assert status == 2 and said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_script_reports_status_2_without_a_traceback(tmp_path):
    command = [sys.executable, HERE / "train.py", "--dataset", "nyud", "--root", "nowhere", "--from-scratch"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "nowhere/gt_sets/train.txt not found" in done.stderr
    assert "Traceback" not in done.stderr and "images/STEM.jpg" in done.stderr


def test_checkpoints_cannot_run_code(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "boom",))

    torch.save({"args": Bomb(), "model": {}}, tmp_path / "evil.pt")
    with pytest.raises(data.DataError, match="not a checkpoint"):
        train.load_checkpoint(tmp_path / "evil.pt")
    assert not (tmp_path / "boom").exists()


def test_an_unmatched_tensor_is_an_error_that_names_it(rooms, tmp_path):
    args = train.parse_args(["--root", str(rooms), "--tasks", "depth", "--no-trace-back"])
    state = train.make_model(args).state_dict()
    del state["pixel_decoder.to_P.bias"]
    with pytest.raises(data.DataError, match="pixel_decoder.to_P.bias"):
        train.model_from({"args": train.plain_args(args), "model": state}, tmp_path / "x.pt")


# ======================================================================================================================
# notebooks
# ======================================================================================================================


def test_notebooks_are_committed_as_they_ran():
    """Run from top to bottom, without an error, and small. CI executes them; this is what can be said in no time."""
    files = sorted((HERE / "notebooks").glob("*.ipynb"))
    assert [f.name[:2] for f in files] == ["01", "02", "03", "04", "05", "06"]
    for file in files:
        cells = [c for c in json.loads(file.read_text())["cells"] if c["cell_type"] == "code"]
        assert [c["execution_count"] for c in cells] == list(range(1, len(cells) + 1)), file.name
        assert all(o["output_type"] != "error" for c in cells for o in c["outputs"]), file.name
        assert any("image/png" in o.get("data", {}) for c in cells for o in c["outputs"]), file.name
    assert sum(f.stat().st_size for f in files) <= 8e6
