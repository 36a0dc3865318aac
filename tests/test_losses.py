"""
The losses against cases worked out by hand and slow second implementations.
"""
import contextlib
import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import distill_text
from distill_image import feature_loss, hidden_patches, masked_loss
from distill_multimodal import contrastive_kd_loss, contrastive_loss, kl_loss, loss_terms, ranking_loss
from distill_text import Sequences, neighbour_agreement
from model import Encoder, feature_target, load_checkpoint
from prepare_owt import Tokens

NO_AUTOCAST = contextlib.nullcontext()


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_contrastive_loss():
    # by hand, cosines: image 0 with the texts 1, 0; image 1 with the texts 0.6, 0.8. scale 10 -> logits
    # [[10, 0], [6, 8]]; image to text: log(1 + e^-10), log(1 + e^-2); text to image, down the columns:
    # log(1 + e^-4), log(1 + e^-8)
    image, text = torch.tensor([[1.0, 0.0], [0.6, 0.8]]), torch.eye(2)
    expected = sum(math.log1p(math.exp(-x)) for x in (10, 2, 4, 8)) / 4
    assert contrastive_loss(image, text, 10.0).item() == pytest.approx(expected, abs=1e-6)
    # smoothing 0.1 gives the other of two a twentieth: its logit is 10, 2, 4, 8 lower
    smoothed = contrastive_loss(image, text, torch.tensor(10.0), 0.1).item()
    assert smoothed == pytest.approx(expected + 0.05 * (10 + 2 + 4 + 8) / 4, abs=1e-6)


def test_ranking_loss_is_the_plain_sum_in_one_direction():
    # cosines [[1, 0.5], [0.9, 0.8]], margin 0.2: 0.2 - 1 + 0.5 < 0, 0.2 - 0.8 + 0.9 = 0.3; the other
    # direction would add 0.2 - 1 + 0.9 = 0.1 and 0. With margin 0.8: 0.3 and 0.9
    cosine = torch.tensor([[1.0, 0.5], [0.9, 0.8]])
    assert ranking_loss(cosine, torch.eye(2), 0.2).item() == pytest.approx(0.3, abs=1e-6)
    assert ranking_loss(cosine, torch.eye(2), 0.8).item() == pytest.approx(1.2, abs=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_kl_loss(temperature):
    """KL(teacher || student), a mean over samples, without a factor T^2."""
    # by hand: teacher (1/2, 1/2), student (p, 1 - p), p = 3^(1/T) / (1 + 3^(1/T)); the second pair is equal
    p = 3 ** (1 / temperature) / (1 + 3 ** (1 / temperature))
    student = torch.tensor([[math.log(3), 0.0], [1.0, 4.0]])
    teacher = torch.tensor([[5.0, 5.0], [3.0, 6.0]])
    expected = (math.log(0.5 / p) + math.log(0.5 / (1 - p))) / 2 / 2
    assert kl_loss(student, teacher, temperature).item() == pytest.approx(expected, abs=1e-6)
    assert kl_loss(1e4 * student, 1e4 * teacher, temperature).isfinite() # where a softmax would be 0 or 1


@pytest.mark.parametrize("is_queued", [False, True])
def test_contrastive_kd_loss_equals_a_loop(is_queued):
    """The same image is never a negative, neither in the batch nor in the queue."""
    out, target = 3 * unit(5, 8), 2 * unit(5, 8, seed=1) # any norm
    group, queue = torch.tensor([4, 7, 4, 9, 2]), None
    bank, bank_group = unit(5, 8, seed=1), group
    if is_queued:
        queue = (unit(6, 8, seed=2), torch.tensor([7, 1, 4, 3, 4, 0]))
        bank, bank_group = torch.cat([bank, queue[0]]), torch.cat([group, queue[1]])
    expected = 0.0
    for i in range(5):
        scores = [10 * F.cosine_similarity(out[i], x, dim=0).item() for x in bank]
        rivals = [s for j, s in enumerate(scores) if j == i or bank_group[j] != group[i]]
        expected += (math.log(sum(math.exp(s) for s in rivals)) - scores[i]) / 5
    assert contrastive_kd_loss(out, target, group, queue, 10.0).item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("loss", [
    lambda i, t: contrastive_loss(i, t, 14.3), lambda i, t: ranking_loss(i, t, 0.2),
    lambda i, t: kl_loss(i, t, 1.0),
    lambda i, t: contrastive_kd_loss(i, t, torch.arange(len(i)), None, 14.3)])
def test_losses_are_float32_and_defined_for_one_pair(loss):
    assert loss(unit(1, 8), unit(1, 8)).item() == pytest.approx(0, abs=1e-6)
    image, text = unit(5, 8).bfloat16(), unit(5, 8, seed=1).bfloat16()
    value = loss(image, text)
    assert value.dtype == torch.float32 and value.shape == ()
    assert value.item() == pytest.approx(loss(image.float(), text.float()).item(), abs=1e-6)


@pytest.mark.parametrize("kd_loss, align_loss, levels", [
    ("mse", "none", 1), ("l1", "ranking", 1), ("contrastive", "contrastive", 1), ("none", "contrastive", 2),
    ("kl", "ranking", 2)])
def test_loss_terms(kd_loss, align_loss, levels):
    """Two levels of alignment have a temperature each, and their mean is weighted."""
    pairs = [[3 * unit(4, width, seed=2 * i + k) for k in range(2)] for i, width in enumerate((6, 6, 24))]
    (image_cls, text_cls), (image_out, text_out), inner = pairs
    group, target = torch.tensor([0, 1, 1, 2]), 3 * unit(4, 6, seed=6)
    queue = (unit(3, 6, seed=7), torch.tensor([1, 5, 6]))
    kd = {"mse": lambda out: ((out - target) ** 2).sum() / 24,
          "l1": lambda out: (out - target).abs().sum() / 24,
          "kl": lambda out: kl_loss(out, target, 2.0),
          "contrastive": lambda out: contrastive_kd_loss(out, target, group, queue, 14.3)}.get(kd_loss)
    align = {"ranking": lambda i, t, scale: ranking_loss(i, t, 0.4), "contrastive":
             lambda i, t, scale: contrastive_loss(i, t, math.exp(scale), 0.1)}.get(align_loss)
    expected = {"kd_image": kd(image_out), "kd_text": kd(text_out)} if kd else {}
    if align:
        each = [align(*(F.normalize(x, dim=-1) for x in pair), scale)
                for pair, scale in ((pairs[0], 1.5), (inner, 2.5))][:levels]
        expected["align"] = sum(each) / levels
    args = SimpleNamespace(kd_loss=kd_loss, kd_weight=2.0, kd_scale=14.3, temperature=2.0, margin=0.4,
                           align_loss=align_loss, align_weight=3.0, label_smoothing=0.1)
    student = SimpleNamespace(log_scale=torch.tensor([1.5, 2.5] if levels == 2 else 1.5))
    outputs = [image_cls, text_cls, image_out, text_out, *inner][:2 + 2 * levels]
    total, terms = loss_terms(outputs, target, group, queue, student, args)
    assert {k: v.item() for k, v in terms.items()} == pytest.approx(
        {k: v.item() for k, v in expected.items()}, abs=1e-5)
    weighted = sum((3 if k == "align" else 2) * v.item() for k, v in expected.items())
    assert total.item() == pytest.approx(weighted, abs=1e-4) and total.dtype == torch.float32


def encoder(seed=0, depth=2):
    torch.manual_seed(seed)
    return Encoder("image", 24, depth, 2, img_size=32, patch_size=8)


IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("target, instance_norm, criterion", [
    ("all", True, "mse"), ("cls", True, "mse"), ("last", True, "mse"), ("last", False, "l1")])
def test_feature_loss(target, instance_norm, criterion):
    teacher, student = encoder(depth=3), encoder(1)
    args = SimpleNamespace(target=target, instance_norm=instance_norm, criterion=criterion, share_embed=False)
    assert feature_loss(copy.deepcopy(teacher), teacher, IMAGES, args, NO_AUTOCAST).item() == 0
    sides = []
    for net in (student, teacher):
        layers = net(IMAGES, return_layers=True)
        layers = layers[-1:] if target == "last" else layers
        if instance_norm: # over tokens, channel by channel
            layers = [F.instance_norm(x.transpose(1, 2)).transpose(1, 2) for x in layers]
        x = F.layer_norm(sum(layers) / len(layers), (24,))
        sides.append(x[:, 0] if target == "cls" else x)
    difference = sides[0] - sides[1]
    expected = difference.abs().mean() if criterion == "l1" else difference.square().mean()
    loss = feature_loss(student, teacher, IMAGES, args, NO_AUTOCAST)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("target_layers", [1, 2])
def test_masked_loss(target_layers):
    """Over the hidden patches, which the student does not see, and a tenth of the CLS token's."""
    student, teacher = encoder(), encoder(1)
    patch_mask = hidden_patches(torch.rand(3, 16, generator=torch.Generator().manual_seed(0)), 0.6)
    heads = torch.nn.ModuleDict({"predict": torch.nn.Linear(24, 24)})
    heads.register_parameter("mask_token", torch.nn.Parameter(torch.randn(1, 1, 24)))
    target = feature_target(teacher(IMAGES, return_layers=True)[-target_layers:]) # of the whole image
    seen = student(IMAGES, patch_mask=patch_mask, mask_token=heads.mask_token)
    out = heads.predict(seen)
    errors = ((out - target)[:, 1:] ** 2).mean(-1) # (3, N)
    hidden = [errors[i, k] for i, k in patch_mask.nonzero().tolist()]
    assert len(hidden) == 3 * 9 # int(16 * 0.6) of each
    whole = F.layer_norm(target[:, 1:].mean(1), (24,))
    expected = sum(hidden) / len(hidden) + 0.1 * ((out[:, 0] - whole) ** 2).mean()
    loss = masked_loss(student, heads, teacher, IMAGES, patch_mask, target_layers, NO_AUTOCAST)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    painted = IMAGES.clone()
    row, column = divmod(int(patch_mask[0].nonzero()[0]), 4)
    painted[0, :, 8 * row:8 * row + 8, 8 * column:8 * column + 8] = 0
    assert torch.equal(student(painted, patch_mask=patch_mask, mask_token=heads.mask_token), seen)
    assert not torch.equal(student(painted), student(IMAGES))


@pytest.fixture
def text_teacher(text_data):
    return load_checkpoint(f"{text_data}/teacher.pt")


@pytest.mark.parametrize("target, instance_norm, criterion", [
    ("all", True, "mse"), ("cls", True, "mse"), ("last", False, "mse"), ("all", True, "l1")])
def test_text_loss_is_a_sum_over_real_tokens(text_teacher, target, instance_norm, criterion):
    """Each sequence alone, without padding, gives the same sum; what stands at padding plays no part."""
    args = SimpleNamespace(target=target, instance_norm=instance_norm, criterion=criterion)
    student, lengths, total = Encoder(**{**text_teacher.config, "depth": 2}), (12, 5, 9), 0.0
    ids = torch.randint(5, 60, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(12) >= torch.tensor(lengths)[:, None]
    for row, length in zip(ids, lengths):
        layers = [m(row[None, :length], return_layers=True) for m in (text_teacher, student)]
        layers = [x[-1:] if target == "last" else x for x in layers]
        wanted, out = (feature_target(x, None, instance_norm) for x in layers)
        error = (out - wanted)[:, :1] if target == "cls" else out - wanted
        total += (error.abs() if criterion == "l1" else error.square()).mean(-1).sum()
    for filler in (0, 7):
        loss = distill_text.feature_loss(student, text_teacher, ids.masked_fill(mask, filler), mask, args,
                                         NO_AUTOCAST)
        assert loss.dtype == torch.float32 and loss.item() == pytest.approx(total.item(), rel=1e-5)
    assert distill_text.loss_tokens(mask, target).tolist() == [3 if target == "cls" else 26]


def test_sequences_hold_the_stream(text_data, text_teacher):
    """CLS, the stream without a gap, SEP; the last one padded."""
    tokens = Tokens(text_data, "toy_text", "train", text_teacher.tokenizer)
    sequences = Sequences(tokens, text_teacher.tokenizer, 16)
    assert len(sequences) == math.ceil(3005 / 14) == 215
    ids, mask = sequences.collate([sequences[0, 0, i] for i in range(215)])
    assert ids.shape == (215, 16) and ids.dtype == torch.int64
    assert mask.sum() == mask[-1].sum() == 215 * 14 - 3005
    cls, sep = (text_teacher.tokenizer.tokenizer.token_to_id(t) for t in ("[CLS]", "[SEP]"))
    assert (ids[:, 0] == cls).all() and (ids[torch.arange(215), (~mask).sum(1) - 1] == sep).all()
    stream = torch.cat([row[~m][1:-1] for row, m in zip(ids, mask)])
    assert stream.tolist() == tokens[:3005].tolist()


def test_neighbour_agreement():
    """Four texts on a circle, by the teacher at 0, 10, 30 and 180 degrees: neighbours 1, 0, 1, 2. By the
    student at 0, 50, 30 and 180: nearest 2, 2, 1, 1, second 1, 0, 0, 2. So @1 the third agrees, @2 all do."""
    def points(*degrees):
        return torch.tensor([[math.cos(math.radians(a)), math.sin(math.radians(a))] for a in degrees])
    teacher, student = points(0, 10, 30, 180), points(0, 50, 30, 180)
    assert [neighbour_agreement(student, teacher, k) for k in (1, 2, 3)] == [25, 100, 100]
    assert neighbour_agreement(F.pad(5 * student.half(), (0, 3)), teacher, 1) == 25 # any norm, dtype, width
    alike = [neighbour_agreement(torch.ones(4, 2), teacher, k) for k in (1, 2, 3)]
    assert alike == pytest.approx([100 / 3, 200 / 3, 100]) # chance
