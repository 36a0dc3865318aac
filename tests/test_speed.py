"""
What makes a step fast and small, as far as a machine without a GPU can tell: the target takes no more memory
than two layers, torch.compile finds one graph and stays with it, CUDA's kernels will take the attention bias.

    pytest tests/test_speed.py
"""
import contextlib
import weakref

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import (DataDependentOutputException, DynamicOutputShapeException,
                                           FakeTensorMode)
from torch.utils._python_dispatch import TorchDispatchMode

import distill_image
import distill_multimodal
import distill_text
from conftest import slow
from model import Encoder, VisionLanguageModel, feature_target
from prepare_imagenet import augment, imagenet_statistics, visible_patches
from test_loops import knobs_of, records, run, teacher # three of them fixtures
from test_model import IMAGE, TEXT, assert_close, randn, shake

TEXT = {**TEXT, "depth": 2}


def ids_of(B, T):
    """ids (B, T) and their padding_mask, lengths from 2 on."""
    generator = torch.Generator().manual_seed(T)
    lengths = torch.randint(2, T + 1, (B, 1), generator=generator)
    return torch.randint(1, 50, (B, T), generator=generator), torch.arange(T) >= lengths


# -----------------------------------------------------------------------------
# the target, summed as the layers come


@pytest.mark.parametrize("instance_norm", [True, False])
def test_target_in_passing_equals_that_of_the_list(instance_norm):
    """Values and gradients, of all blocks and of the last, with and without padding, patches left out and
    embeddings made elsewhere."""
    image, text = (shake(Encoder(m, **{**c, "depth": 3})) for m, c in (("image", IMAGE), ("text", TEXT)))
    images, (ids, mask) = randn(4, 3, 32, 32), ids_of(4, 9)
    kept = visible_patches(torch.rand(4, 16), 0.5)
    for encoder, x, more in ((image, images, {}), (image, images, dict(kept=kept)), (text, ids, {}),
                             (text, ids, dict(padding_mask=mask)),
                             (image, image.embed(images).detach(), dict(embedded=True))):
        for n in (1, 2, 3):
            padding_mask, gradients = more.get("padding_mask"), []
            out = encoder(x, target_layers=n, instance_norm=instance_norm, **more)
            by_list = feature_target(encoder(x, return_layers=True, **more)[-n:], padding_mask, instance_norm)
            with torch.no_grad():
                alone = encoder(x, target_layers=n, instance_norm=instance_norm, **more)
            for other in (by_list, alone):
                assert_close(out, other, 1e-6)
            for y in (out, by_list):
                encoder.zero_grad()
                (y * randn(*y.shape)).sum().backward()
                gradients.append([p.grad for p in encoder.parameters() if p.grad is not None])
            for a, b in zip(*gradients, strict=True):
                assert_close(a, b, 1e-5 * b.abs().max().item())


def test_target_keeps_two_layers_at_most():
    encoder, layers, most = Encoder("image", **{**IMAGE, "depth": 6}), [], 0

    def note(module, args, out):
        nonlocal most
        layers.append(weakref.ref(out))
        most = max(most, sum(layer() is not None for layer in layers))
    for block in encoder.blocks:
        block.register_forward_hook(note)
    with torch.no_grad():
        encoder(randn(2, 3, 32, 32), target_layers=6)
        assert len(layers) == 6 and most == 2
        encoder(randn(2, 3, 32, 32), return_layers=True)
        assert most == 6


@pytest.mark.parametrize("share_embed, times", [(True, 1), (False, 2)])
def test_shared_embedding_runs_once(share_embed, times):
    teacher, student = (Encoder("image", **IMAGE) for _ in range(2))
    args, calls = distill_image.get_args(["--preset=shared_encoder", f"--share_embed={share_embed}"]), []
    for encoder in (teacher, student):
        encoder.patch_embed.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    plain = torch.autocast("cpu", enabled=False)
    distill_image.feature_loss(student, teacher, randn(2, 3, 32, 32), args, plain)
    assert len(calls) == times and not calls[0] # and without a graph


# -----------------------------------------------------------------------------
# attention bias


@pytest.mark.parametrize("modality, attn_bias", [("image", "alibi"), ("image", "relative"), ("text", "alibi")])
def test_bias_is_one_that_fused_kernels_take(modality, attn_bias):
    """On CUDA memory-efficient attention (flash takes no bias) wants the keys next to each other in memory;
    else torch writes out all logits. Nothing is repeated for each sample that is the same for all."""
    encoder = Encoder(modality, **{**(IMAGE if modality == "image" else TEXT), "attn_bias": attn_bias})
    T = 17 if modality == "image" else 9
    for dtype in (torch.float32, torch.bfloat16):
        bias = encoder.attention_bias(T).to(dtype)
        assert bias.shape == (1, 3, T, T) and bias.stride()[-2:] in ((T, 1), (12, 1))
    bias = encoder.attention_bias(T, torch.zeros(4, T, dtype=torch.bool))
    assert bias.shape == (4, 3, T, T) and bias.stride(-1) == 1
    if modality == "image":
        kept = visible_patches(torch.rand(4, 16), 0.5)
        assert encoder.attention_bias(T, None, F.pad(kept + 1, (1, 0))).stride(-1) == 1


# -----------------------------------------------------------------------------
# torch.compile: Dynamo alone, so no compiler is needed


@pytest.fixture
def graphs():
    """graphs(model, batches) -> how many graphs torch.compile makes of these calls, backward included; it
    raises where a graph would break, for instance where the host waits for a number."""
    def count(model, batches, grad=True, **more):
        counter = CompileCounter()
        torch._dynamo.reset()
        expected = [model(*batch, **more) for batch in batches]
        model.compile(fullgraph=True, backend=counter)
        for batch, right in zip(batches, expected):
            with torch.set_grad_enabled(grad):
                out = model(*batch, **more)
                for a, b in zip(*((x,) if torch.is_tensor(x) else x for x in (out, right)), strict=True):
                    assert_close(a, b, 1e-5)
                if grad:
                    sum(x.sum() for x in ((out,) if torch.is_tensor(out) else out)).backward()
        return counter.frame_count
    yield count
    torch._dynamo.reset()


CALLS = [dict(), dict(target_layers=2), dict(return_layers=True)]


@pytest.mark.parametrize("more", CALLS, ids=str)
@pytest.mark.parametrize("grad", [True, slow(False)])
def test_encoders_are_one_graph(graphs, more, grad):
    images, kept = [(randn(4, 3, 32, 32, seed=i),) for i in range(3)], torch.arange(7).expand(4, -1)
    text = [ids_of(4, 9)] * 3
    for model, batches, words in ((Encoder("image", **IMAGE), images, more),
                                  (Encoder("image", **IMAGE, attn_bias="relative"), images, more),
                                  (Encoder("image", **IMAGE), images, {**more, "kept": kept}),
                                  (Encoder("text", **TEXT), [(ids,) for ids, _ in text], more),
                                  (Encoder("text", **TEXT, attn_bias="alibi"), text, more)):
        assert graphs(model, batches, grad, **words) == 1


@pytest.mark.parametrize("kwargs", [dict(token_types=True, head_dim=7, align_levels=2),
                                    dict(shared_kind="mlp"), dict(shared_kind="projection")], ids=str)
def test_students_are_one_graph(graphs, kwargs):
    batches = [(randn(4, 3, 32, 32, seed=i), *ids_of(4, 9)) for i in range(3)]
    assert graphs(VisionLanguageModel(IMAGE, TEXT, **kwargs), batches) == 1


def test_text_of_any_length_is_two_graphs(graphs):
    """Captions are padded to the longest of their batch: the second length makes a graph for all lengths, so
    there is nothing to gain from padding further."""
    batches = [(randn(4, 3, 32, 32), *ids_of(4, T)) for T in (9, 12, 5, 7, 10, 9, 3)]
    assert graphs(VisionLanguageModel(IMAGE, TEXT), batches) == 2


class Waits(TorchDispatchMode):
    """Lists the operations for which the host waits for a GPU: copies between the two that do not say
    non_blocking, and those whose result the host must know."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, str(function)
        device = None # that something is copied to
        if name == "aten._to_copy.default":
            source, device, non_blocking = args[0], kwargs.get("device"), kwargs.get("non_blocking")
        elif name == "aten.copy_.default":
            source, device, non_blocking = args[1], args[0].device, args[2:] == (True,)
        if device and torch.device(device).type != source.device.type and not non_blocking:
            self.found.append(name)
        indexed = name.startswith("aten.index") and any(
            x is not None and (x.dtype == torch.bool or x.device.type == "cpu")
            for arg in args if isinstance(arg, (list, tuple)) for x in arg)
        if indexed or any(word in name for word in ("_local_scalar", "nonzero", "masked_select")):
            self.found.append(name)
        return function(*args, **kwargs)


def test_waits_are_found():
    """The instrument itself: each of these is one, and what the loops do instead is none."""
    with FakeTensorMode(), torch.device("cuda"):
        x, mask, here = torch.ones(4, 3), torch.ones(4, dtype=torch.bool), torch.ones(4, device="cpu")
        for wait in (lambda: x[mask], lambda: x.cpu(), lambda: here.to("cuda"), lambda: x.sum().item(),
                     lambda: x[torch.arange(4, device="cpu")], lambda: torch.tensor([1.0, 2.0])):
            with Waits() as waits, contextlib.suppress(DataDependentOutputException,
                                                       DynamicOutputShapeException):
                wait()
            assert waits.found
        with Waits() as waits:
            here.to("cuda", non_blocking=True), x * mask[:, None], x[torch.arange(4)], x.clamp(0, 1)
        assert not waits.found


@pytest.mark.parametrize("name, words", [
    ("image", []), ("image", ["--preset=tiny"]), ("image", ["--teacher=ema"]), ("text", []),
    ("text", ["--target=cls"]), ("multimodal", []), ("multimodal", ["--preset=tiny"]),
    ("multimodal", ["--preset=smke"]), ("multimodal", ["--preset=clip"]),
    ("multimodal", ["--kd_loss=none", "--align_loss=ranking"])])
def test_no_operation_of_the_loss_waits_for_the_gpu(name, words):
    """Augmentation, forward and loss on GPU tensors that have no data, which needs no GPU."""
    loops = {"image": distill_image, "text": distill_text, "multimodal": distill_multimodal}
    args, autocast = loops[name].get_args(words), contextlib.nullcontext()
    imagenet_statistics.cache_clear() # what it holds is of another test
    fake = FakeTensorMode()
    with fake, torch.device("cuda"):
        image, text, both = Encoder("image", **IMAGE), Encoder("text", **TEXT), None
        raw, ids = torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.zeros(4, 9, dtype=torch.int64)
        padding_mask, group = torch.zeros(4, 9, dtype=torch.bool), torch.zeros(4, dtype=torch.int64)
        imagenet_statistics(raw.device)
        if name == "multimodal":
            both = VisionLanguageModel(IMAGE, TEXT, words=bool(args.word_weight),
                                       head_dim=48 * args.head, align_levels=args.align_levels,
                                       shared_kind=args.shared)
        heads = torch.nn.ModuleDict({"project": torch.nn.Linear(48, 8), "predict": torch.nn.Linear(48, 48)})
        heads.register_parameter("mask_token", torch.nn.Parameter(torch.zeros(1, 1, 48)))
        noise = torch.zeros(4, 7 + 16)
        queue = torch.zeros(6, 48), torch.zeros(6, dtype=torch.int64)
    with fake, Waits() as waits: # no default device now
        if name != "text":
            images = augment(raw, noise[:, :7], args.flip, args.rotate, args.color)
            visible = visible_patches(noise[:, 7:], 0.5)
        if name == "text":
            loss = distill_text.feature_loss(text, text, ids, padding_mask, args, autocast)
        elif name == "multimodal":
            with autocast:
                outputs = both(images, ids, padding_mask, visible)
            found = distill_multimodal.word_targets(ids, padding_mask, TEXT["vocab_size"])
            loss, _ = distill_multimodal.loss_terms(outputs, image(images)[:, 0].detach(), group, queue,
                                                    found if args.word_weight else None, both, args)
        elif args.teacher != "ema":
            loss = distill_image.feature_loss(image, image, images, args, autocast)
        elif args.objective == "views":
            z = distill_image.project_views(image, heads, images, visible, autocast)
            loss = distill_image.views_loss(z, 0.1)
        else:
            hidden = distill_image.hidden_patches(noise[:, 7:], 0.5)
            loss = distill_image.masked_loss(image, heads, image, images, hidden, 2, autocast)
    imagenet_statistics.cache_clear()
    assert not waits.found and loss.device.type == "cuda"


@pytest.mark.slow
@pytest.mark.parametrize("name, knobs, most", [("features", {}, [2, 2]), ("views", {}, [2, 0]),
                                               ("queue", dict(micro_batch_size=8), [4, 2])])
def test_loops_compile_each_model_once(run, tmp_path, monkeypatch, name, knobs, most):
    """Student and teacher: one graph for training, one for validation; captions of any length and the pass
    without a graph that gradient caching makes double that. The losses are those without torch.compile."""
    counters, compile_module = [], torch.nn.Module.compile

    def counted(module):
        counters.append(CompileCounter())
        compile_module(module, fullgraph=True, backend=counters[-1])
    monkeypatch.setattr(torch.nn.Module, "compile", counted)
    torch._dynamo.reset()
    for compiled in ("false", "true"):
        run(name, compiled, max_steps=9, eval_interval=4, compile=compiled, **knobs)
    losses = [[r["loss"] for r in records(tmp_path / out) if "loss" in r] for out in ("false", "true")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert [c.frame_count for c in counters] == most
