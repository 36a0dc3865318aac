"""
The losses against cases worked out by hand and slow second implementations.

    pytest tests/test_losses.py
"""
import contextlib
import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from distill_image import feature_loss, hidden_patches, masked_loss, project_views, views_loss
from distill_multimodal import (contrastive_kd_loss, contrastive_loss, kl_loss, loss_terms, ranking_loss,
                                word_targets)
from model import Encoder, feature_target
from prepare_imagenet import visible_patches


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def cross_entropy(scores, own):
    """-log of the softmax of a list of floats, at index own."""
    return math.log(sum(math.exp(s) for s in scores)) - scores[own]


# -----------------------------------------------------------------------------
# contrastive loss


def test_contrastive_loss_by_hand():
    # cosines: image 0 with the texts 1, 0; image 1 with the texts 0.6, 0.8. scale 10 -> logits
    # [[10, 0], [6, 8]]
    # image to text: log(1 + e^-10), log(1 + e^-2); text to image, down the columns:
    # log(1 + e^-4), log(1 + e^-8)
    image, text = torch.tensor([[1.0, 0.0], [0.6, 0.8]]), torch.eye(2)
    expected = (math.log1p(math.exp(-10)) + math.log1p(math.exp(-2))) / 2
    expected = (expected + (math.log1p(math.exp(-4)) + math.log1p(math.exp(-8))) / 2) / 2
    assert contrastive_loss(image, text, 10.0).item() == pytest.approx(expected, abs=1e-6)
    assert contrastive_loss(image, text, torch.tensor(10.0)).item() == pytest.approx(expected, abs=1e-6)


def test_contrastive_loss_equals_a_loop():
    image, text, scale, B = unit(5, 8), unit(5, 8, seed=1), 7.0, 5
    logits = [[scale * sum(image[i, k].item() * text[j, k].item() for k in range(8)) for j in range(B)]
              for i in range(B)]
    columns = [list(c) for c in zip(*logits)]
    expected = sum(cross_entropy(logits[i], i) + cross_entropy(columns[i], i) for i in range(B)) / (2 * B)
    assert contrastive_loss(image, text, scale).item() == pytest.approx(expected, abs=1e-5)


def test_contrastive_loss_label_smoothing():
    image, text, own = unit(5, 8), unit(5, 8, seed=1), torch.arange(5)
    logits = 7 * image @ text.T
    expected = sum(F.cross_entropy(x, own, label_smoothing=0.1) for x in (logits, logits.T)) / 2
    assert contrastive_loss(image, text, 7.0, 0.1).item() == pytest.approx(expected.item(), abs=1e-6)
    assert contrastive_loss(image, text, 7.0).item() != pytest.approx(expected.item(), abs=1e-3)


def test_contrastive_loss_teaches_the_temperature():
    log_scale = torch.tensor(1.0, requires_grad=True)
    contrastive_loss(unit(5, 8), unit(5, 8), log_scale.exp()).backward() # all pairs match: sharper is better
    assert log_scale.grad < 0


@pytest.mark.parametrize("loss", [lambda i, t: contrastive_loss(i, t, 14.3),
                                  lambda i, t: ranking_loss(i, t, 0.2),
                                  lambda i, t: contrastive_kd_loss(i, t, torch.arange(len(i)), None, 14.3)])
def test_one_pair_gives_zero_and_half_precision_float32(loss):
    assert loss(unit(1, 8), unit(1, 8, seed=1)).item() == 0
    image, text = unit(5, 8).bfloat16(), unit(5, 8, seed=1).bfloat16()
    value = loss(image, text)
    assert value.dtype == torch.float32 and value.shape == ()
    assert value.item() == pytest.approx(loss(image.float(), text.float()).item(), abs=1e-6)


# -----------------------------------------------------------------------------
# ranking loss


def test_ranking_loss_by_hand():
    # cosines [[1, 0.5], [0.9, 0.8]], margin 0.2: 0.2 - 1 + 0.5 < 0, 0.2 - 0.8 + 0.9 = 0.3; the other
    # direction would add 0.2 - 1 + 0.9 = 0.1 and 0
    cosine = torch.tensor([[1.0, 0.5], [0.9, 0.8]])
    assert ranking_loss(cosine, torch.eye(2), 0.2).item() == pytest.approx(0.3, abs=1e-6)


def test_ranking_loss_equals_a_loop():
    image, text, B = unit(6, 4), unit(6, 4, seed=1), 6
    cosine = (image @ text.T).tolist()
    expected = sum(max(0, 0.3 - cosine[i][i] + cosine[i][j]) for i in range(B) for j in range(B) if i != j)
    assert expected > 1
    assert ranking_loss(image, text, 0.3).item() == pytest.approx(expected, abs=1e-4) # the plain sum


# -----------------------------------------------------------------------------
# Kullback-Leibler divergence


def test_kl_loss_by_hand():
    # teacher (1/2, 1/2), student (3/4, 1/4): log(2/3) / 2 + log(2) / 2; the second pair is equal, and the
    # mean is over both. At temperature 2 the logits log 3, 0 are those of (sqrt 3, 1) / (1 + sqrt 3)
    student = torch.tensor([[math.log(3), 0.0], [1.0, 4.0]])
    teacher = torch.tensor([[5.0, 5.0], [3.0, 6.0]])
    assert kl_loss(student, teacher, 1.0).item() \
        == pytest.approx((math.log(2 / 3) + math.log(2)) / 2 / 2, abs=1e-6)
    p = math.sqrt(3) / (1 + math.sqrt(3))
    assert kl_loss(student, teacher, 2.0).item() \
        == pytest.approx((math.log(0.5 / p) + math.log(0.5 / (1 - p))) / 2 / 2, abs=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_kl_loss_equals_torch(temperature):
    student, teacher = 5 * unit(6, 10), 5 * unit(6, 10, seed=1)
    p, q = (torch.distributions.Categorical(logits=x / temperature) for x in (teacher, student))
    expected = torch.distributions.kl_divergence(p, q).mean().item()
    assert kl_loss(student, teacher, temperature).item() == pytest.approx(expected, abs=1e-6)
    assert kl_loss(teacher, student, temperature).item() != pytest.approx(expected, rel=1e-3)
    assert kl_loss(teacher, teacher, temperature).item() == pytest.approx(0, abs=1e-6)
    half = kl_loss(student.bfloat16(), teacher.bfloat16(), temperature)
    assert half.dtype == torch.float32 and half.shape == ()
    assert half.item() == pytest.approx(expected, rel=0.05)
    assert kl_loss(1e4 * student, 1e4 * teacher, temperature).isfinite() # where a softmax would be 0 or 1


# -----------------------------------------------------------------------------
# contrastive distillation


def kd_by_loop(out, target, group, queue, scale):
    bank = [(t, g) for t, g in zip(target.tolist(), group.tolist())]
    bank += [(t, g) for t, g in zip(queue[0].tolist(), queue[1].tolist())] if queue else []
    total = 0.0
    for i, x in enumerate(out.tolist()):
        scores, own = [], None
        for j, (t, g) in enumerate(bank):
            if j == i:
                own = len(scores)
            elif g == bank[i][1]:
                continue # the same image
            norms = math.sqrt(sum(a * a for a in x) * sum(a * a for a in t))
            scores.append(scale * sum(a * b for a, b in zip(x, t)) / norms)
        total += cross_entropy(scores, own)
    return total / len(out)


@pytest.mark.parametrize("queued", [False, True])
def test_contrastive_kd_loss_equals_a_loop(queued):
    out, target = 3 * unit(5, 8), 2 * unit(5, 8, seed=1) # any norm
    group = torch.tensor([4, 7, 4, 9, 2])
    queue = (unit(6, 8, seed=2), torch.tensor([7, 1, 4, 3, 4, 0])) if queued else None
    assert contrastive_kd_loss(out, target, group, queue, 10.0).item() == pytest.approx(
        kd_by_loop(out, target, group, queue, 10.0), abs=1e-5)


def test_same_group_is_never_a_negative():
    out, target, other = unit(2, 8), unit(2, 8, seed=1), unit(1, 8, seed=3)

    def loss(group, queue_group=None):
        queue = None if queue_group is None else (other, torch.tensor([queue_group]))
        return contrastive_kd_loss(out, target, torch.tensor(group), queue, 10.0).item()

    assert loss([5, 5]) == loss([5, 5], 5) == 0 # nothing but one's own target is left
    assert loss([5, 8]) > 0 and loss([5, 5], 8) > 0
    assert loss([5, 8]) < loss([5, 8], 8) < loss([5, 8], 9) # a queue entry of 8 is a negative for 5 only


# -----------------------------------------------------------------------------
# their sum


def settings(**kwargs):
    return SimpleNamespace(**{"kd_loss": "mse", "kd_weight": 1.0, "kd_scale": 14.3, "align_loss": "none",
                              "align_weight": 1.0, "label_smoothing": 0.0, "margin": 0.2, "temperature": 1.0,
                              **kwargs})


@pytest.mark.parametrize("kd_loss,align_loss",
                         [("mse", "none"), ("l1", "ranking"), ("contrastive", "contrastive"),
                          ("none", "contrastive"), ("kl", "ranking")])
def test_loss_terms(kd_loss, align_loss):
    image_cls, text_cls, image_out, text_out, target = (3 * unit(4, 6, seed=i) for i in range(5))
    group = torch.tensor([0, 1, 1, 2])
    queue = (unit(3, 6, seed=6), torch.tensor([1, 5, 6]))
    kd = {"mse": lambda out: ((out - target) ** 2).sum() / 24,
          "l1": lambda out: (out - target).abs().sum() / 24,
          "kl": lambda out: kl_loss(out, target, 2.0),
          "contrastive": lambda out: contrastive_kd_loss(out, target, group, queue, 14.3)}.get(kd_loss)
    image, text = F.normalize(image_cls, dim=-1), F.normalize(text_cls, dim=-1)
    align = {"ranking": lambda: ranking_loss(image, text, 0.4), "contrastive":
             lambda: contrastive_loss(image, text, math.exp(1.5), 0.1)}.get(align_loss)
    expected = {**({"kd_image": kd(image_out), "kd_text": kd(text_out)} if kd else {}),
                **({"align": align()} if align else {})}
    args = settings(kd_loss=kd_loss, align_loss=align_loss, kd_weight=2.0, align_weight=3.0, margin=0.4,
                    label_smoothing=0.1, temperature=2.0)
    student = SimpleNamespace(log_scale=torch.tensor(1.5), words=None)
    total, terms = loss_terms((image_cls, text_cls, image_out, text_out), target, group, queue, None, student,
                              args)
    assert list(terms) == list(expected)
    for name in terms:
        assert terms[name].item() == pytest.approx(expected[name].item(), abs=1e-5)
    assert total.item() == pytest.approx(sum((3 if k == "align" else 2) * v.item()
                                             for k, v in expected.items()), abs=1e-4)
    assert total.dtype == torch.float32


@pytest.mark.parametrize("align_loss", ["contrastive", "ranking"])
def test_two_levels_are_averaged(align_loss):
    """The embedding with the first temperature, the inner layer with the second; the mean is weighted."""
    image, text, image_inner, text_inner = (3 * unit(4, width, seed=i)
                                            for i, width in enumerate((6, 6, 24, 24)))
    student = SimpleNamespace(log_scale=torch.tensor([1.5, 2.5]), words=None)
    args = settings(kd_loss="none", align_loss=align_loss, align_weight=3.0)
    total, terms = loss_terms((image, text, image, text, image_inner, text_inner), None, None, None, None,
                              student, args)
    losses = []
    for a, b, scale in ((image, text, 1.5), (image_inner, text_inner, 2.5)):
        a, b = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
        losses.append(ranking_loss(a, b, 0.2) if align_loss == "ranking" else
                      contrastive_loss(a, b, math.exp(scale)))
    assert losses[0].item() != pytest.approx(losses[1].item(), rel=0.01)
    assert terms["align"].item() == pytest.approx(sum(losses).item() / 2, rel=1e-5)
    assert total.item() == pytest.approx(3 * terms["align"].item(), rel=1e-6)


def test_word_loss_by_hand():
    """Captions of tokens (4, 5, 5) and of none: a half each for 4 and 5, nothing for the other; from the
    image, and from the text, of a classifier that gives each of 6 words the same chance."""
    ids = torch.tensor([[2, 4, 5, 5, 3, 0], [2, 3, 0, 0, 0, 0]])
    words = word_targets(ids, torch.tensor([[False] * 5 + [True], [False] * 2 + [True] * 4]), 6)
    assert words.tolist() == [[0, 0, 0, 0, 0.5, 0.5], [0] * 6]
    args = settings(kd_loss="none", word_weight=3.0)
    outputs = [unit(2, 8, seed=i) for i in range(4)]
    student = SimpleNamespace(words=lambda x: torch.zeros(2, 6))
    total, terms = loss_terms(outputs, None, None, None, words, student, args)
    assert list(terms) == ["words"] and terms["words"].item() == pytest.approx(math.log(6) / 2)
    assert total.item() == pytest.approx(3 * math.log(6) / 2)
    student.words = lambda x: 10 * x[:, :6] # now image and text count half each
    _, terms = loss_terms(outputs, None, None, None, words, student, args)
    by_hand = [-(words * (10 * x[:, :6]).log_softmax(1)).sum() / 2 for x in outputs[:2]]
    assert terms["words"].item() == pytest.approx(sum(by_hand).item() / 2, abs=1e-5)


# -----------------------------------------------------------------------------
# distill_image.py


def encoder(seed=0, depth=2):
    torch.manual_seed(seed)
    return Encoder("image", 24, depth, 2, img_size=32, patch_size=8)


def images(seed=0):
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


NO_AUTOCAST = contextlib.nullcontext()


def test_feature_loss():
    teacher, student = encoder(depth=3), encoder(1)
    args = SimpleNamespace(target="all", instance_norm=True, criterion="mse", share_embed=False)
    assert feature_loss(copy.deepcopy(teacher), teacher, images(), args, NO_AUTOCAST).item() == 0
    loss = feature_loss(student, teacher, images(), args, NO_AUTOCAST)
    difference = (feature_target(student(images(), return_layers=True)) -
                  feature_target(teacher(images(), return_layers=True)))
    assert loss.item() == pytest.approx((difference ** 2).sum().item() / (3 * 17 * 24), rel=1e-5)
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters()) \
        and all(p.grad is not None for p in student.parameters())


@pytest.mark.parametrize("target, instance_norm, criterion", [
    ("cls", True, "mse"), ("last", True, "mse"), ("all", False, "mse"), ("all", True, "l1"),
    ("last", False, "l1")])
def test_what_the_feature_loss_can_be(target, instance_norm, criterion):
    teacher, student = encoder(depth=3), encoder(1)
    args = SimpleNamespace(target=target, instance_norm=instance_norm, criterion=criterion, share_embed=False)
    sides = []
    for net in (student, teacher):
        layers = net(images(), return_layers=True)
        layers = layers[-1:] if target == "last" else layers
        if instance_norm: # over tokens, channel by channel
            layers = [F.instance_norm(x.transpose(1, 2)).transpose(1, 2) for x in layers]
        x = F.layer_norm(sum(layers) / len(layers), (24,))
        sides.append(x[:, 0] if target == "cls" else x)
    expected = ((sides[0] - sides[1]).abs().mean() if criterion == "l1" else
                (sides[0] - sides[1]).square().mean())
    assert feature_loss(student, teacher, images(), args, NO_AUTOCAST).item() \
        == pytest.approx(expected.item(), rel=1e-4)


def image_heads(**modules):
    torch.manual_seed(2)
    return torch.nn.ModuleDict(modules)


def test_masked_loss_sees_hidden_patches_and_cls_only():
    student, teacher = encoder(), encoder(1)
    patch_mask = hidden_patches(torch.rand(3, 16, generator=torch.Generator().manual_seed(0)), 0.6)
    heads = image_heads(predict=torch.nn.Linear(24, 24))
    heads.register_parameter("mask_token", torch.nn.Parameter(torch.randn(1, 1, 24)))

    class Moved(torch.nn.Module):
        """The prediction plus a constant where `where` (B, T) is True."""

        def __init__(self, where):
            super().__init__()
            self.where = where

        def forward(self, x):
            return heads.predict(x) + 5.0 * self.where[..., None]

    def loss(where, target_layers=2):
        moved = torch.nn.ModuleDict({"predict": Moved(where)})
        moved.mask_token = heads.mask_token
        return masked_loss(student, moved, teacher, images(), patch_mask, target_layers, NO_AUTOCAST).item()

    nowhere, cls = torch.zeros(3, 17), F.one_hot(torch.tensor([0, 0, 0]), 17)
    seen, hidden = F.pad(~patch_mask, (1, 0)), F.pad(patch_mask, (1, 0))
    assert loss(seen) == loss(nowhere)
    assert loss(hidden) != loss(nowhere) and loss(cls) != loss(nowhere)
    assert loss(nowhere, 1) != loss(nowhere)
    # by hand: the target of the whole image, the last `target_layers` layers
    target = feature_target(teacher(images(), return_layers=True)[-1:])
    out = heads.predict(student(images(), patch_mask=patch_mask, mask_token=heads.mask_token))
    by_hand = torch.stack([((out - target)[i, 1 + n] ** 2).mean()
                           for i, n in patch_mask.nonzero().tolist()]).mean()
    whole = F.layer_norm(target[:, 1:].mean(1), (24,))
    assert loss(nowhere, 1) \
        == pytest.approx((by_hand + 0.1 * ((out[:, 0] - whole) ** 2).mean()).item(), rel=1e-5)


@torch.no_grad()
def test_masked_patches_are_hidden_from_the_student():
    student, patch_mask = encoder(), torch.zeros(3, 16, dtype=torch.bool)
    patch_mask[:, 5] = True # row 1, column 1
    a, b = images(), images()
    b[:, :, 8:16, 8:16] = 0
    token = torch.randn(1, 1, 24)
    assert torch.equal(*(student(x, patch_mask=patch_mask, mask_token=token) for x in (a, b)))
    assert not torch.equal(student(a), student(b))


def test_hidden_and_visible_patches():
    noise = torch.rand(50, 16, generator=torch.Generator().manual_seed(0))
    mask, visible = hidden_patches(noise, 0.6), visible_patches(noise, 0.6)
    assert (mask.sum(1) == 9).all() and visible.shape == (50, 7) # int(16 * 0.6) are hidden
    for i in (0, 7): # those with the least noise
        assert set(mask[i].nonzero()[:, 0].tolist()) == set(noise[i].argsort()[:9].tolist())
        assert visible[i].tolist() == sorted(noise[i].argsort()[9:].tolist())
    assert visible_patches(noise, 0.0) is None


def test_views_loss_equals_a_loop():
    student, heads, n = encoder(), image_heads(project=torch.nn.Linear(24, 8)), 3
    views = torch.stack([images(), images(1)], 1).flatten(0, 1) # two of an image side by side
    kept = torch.tensor([[0, 3], [1, 2], [4, 15], [5, 6], [7, 9], [8, 11]])
    z = project_views(student, heads, views, kept, NO_AUTOCAST) # (n, 2, 8)
    for i in range(2 * n):
        alone = heads.project(student(views[i:i + 1], kept=kept[i:i + 1])[:, 0])
        assert torch.allclose(z[i // 2, i % 2], alone[0], atol=1e-5)
    rows = F.normalize(torch.cat([z[:, 0], z[:, 1]]), dim=-1)
    expected = 0.0
    for i in range(2 * n):
        others = [j for j in range(2 * n) if j != i] # nobody finds itself
        expected += cross_entropy([(rows[i] @ rows[j]).item() / 0.2 for j in others],
                                  others.index((i + n) % (2 * n))) / (2 * n)
    loss = views_loss(z, 0.2)
    assert loss.item() == pytest.approx(expected, abs=1e-5)
    loss.backward()
    assert all(p.grad is not None for m in (student, heads) for p in m.parameters())
