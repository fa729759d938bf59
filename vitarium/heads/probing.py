"""Probes: a frozen backbone's tokens, pooled and classified.

Paper: Attention, Please! Revisiting Attentive Probing Through the Lens of Efficiency (Psomas et
al., ICLR 2026, arXiv 2506.10178). Authors' code: billpsomas/efficient-probing, commit b8f4fb8,
Apache-2.0 licence. Parameters have the authors' names.

Every probe is a pooling of tokens, a BatchNorm without parameters and a linear classifier. The
names in `POOLINGS` are the authors': ``ep``, efficient probing; ``simpool``, ``abmilp``, ``aim``
and ``jepa``, earlier attentive poolings; ``gap`` and ``cls``, the mean of the tokens and the class
token, which make plain linear probes.

Shapes: B images, N tokens, C channels, Q queries.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import Attention, Format, Mlp, SelectAdaptivePool2d, trunc_normal_
from timm.layers.format import get_channel_dim, nchw_to, nhwc_to
from torch import Tensor, nn

# Poolings: [B, N, C] -> [B, out_features]


class AveragePool(nn.Module):
    """The mean of the tokens.

    Args:
        dim: channels of the tokens, and ``out_features``.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.out_features = dim

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, C]."""
        return x.mean(1)


class ClassToken(nn.Module):
    """The class token, which stands before all others.

    Args:
        dim: channels of the tokens, and ``out_features``.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.out_features = dim

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, C]."""
        return x[:, 0]


class EfficientProbing(nn.Module):
    """Q learned queries, each of which pools its own slice of the projected channels.

    ``out_j = softmax(cls_token_j x^T / sqrt(C)) (x v_j^T)`` with slice ``v_j`` of the projection:
    neither queries nor keys are projected. The sum over tokens is taken before the projection, with
    which it commutes: Q tokens are projected, not N.

    Args:
        dim: channels of the tokens.
        num_queries: Q, a divisor of ``out_features``.
        d_out: by what the channels are divided: ``out_features`` is ``dim / d_out``.

    Raises:
        ValueError: ``d_out`` is no divisor of ``dim``, or ``num_queries`` none of ``dim / d_out``.

    Source: poolings/ep.py.
    """

    def __init__(self, dim: int, num_queries: int = 32, d_out: int = 1) -> None:
        super().__init__()
        self.out_features = _divided("d_out", d_out, "dim", dim)
        _divided("num_queries", num_queries, "dim / d_out", self.out_features)
        self.num_queries = num_queries
        self.cls_token = nn.Parameter(torch.randn(1, num_queries, dim) * 0.02)
        self.v = nn.Linear(dim, self.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, out_features]."""
        query = self.cls_token.expand(len(x), -1, -1)
        pooled = F.scaled_dot_product_attention(query, x, x)
        slices = self.v.weight.unflatten(0, (self.num_queries, -1))
        return torch.einsum("bqc,qdc->bqd", pooled, slices).flatten(1)


class SimPool(nn.Module):
    """The mean token, projected, attends to the normalised tokens; the values are not projected.

    Args:
        dim: channels of the tokens, and ``out_features``.

    Source: poolings/simpool.py with one head and without gamma; Psomas et al., ICCV 2023, arXiv
    2309.06891.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.out_features = dim
        self.norm_patches = nn.LayerNorm(dim, eps=1e-6)
        self.wq = nn.Linear(dim, dim, bias=False)
        self.wk = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, C]."""
        query = self.wq(x.mean(1, keepdim=True))
        x = self.norm_patches(x)
        return F.scaled_dot_product_attention(query, self.wk(x), x).squeeze(1)


class ABMILP(nn.Module):
    """Self-attention of one head, then the tokens' sum by weights that an MLP gives each of them.

    Args:
        dim: channels of the tokens, and ``out_features``.

    Source: poolings/abmilp.py with self-attention before both weights and values, tanh, two layers.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.out_features = dim
        self.self_attn = Attention(dim, num_heads=1)
        self.attention_predictor = nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, 1))

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, C]."""
        x = self.self_attn(x)
        weights = self.attention_predictor(x).softmax(1)
        return (weights.mT @ x).squeeze(1)


class AIMPool(nn.Module):
    """One learned query, not projected, attends to the tokens, batch-normalised, in heads.

    Args:
        dim: channels of the tokens, and ``out_features``.
        num_heads: a divisor of ``dim``.

    Raises:
        ValueError: ``num_heads`` is no divisor of ``dim``.

    Source: poolings/aim.py; El-Nouby et al., ICML 2024, arXiv 2401.08541.
    """

    def __init__(self, dim: int, num_heads: int = 16) -> None:
        super().__init__()
        _divided("num_heads", num_heads, "dim", dim)
        self.out_features = dim
        self.num_heads = num_heads
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.k = nn.Linear(dim, dim, bias=False)
        self.v = nn.Linear(dim, dim, bias=False)
        self.bn = _batch_norm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, C]."""
        x = self.bn(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        query = self.cls_token.expand(len(x), -1, -1)
        return _attention(query, self.k(x), self.v(x), self.num_heads).squeeze(1)


class JEPAPool(nn.Module):
    """One learned query through a transformer block whose attention is to the tokens.

    Args:
        dim: channels of the tokens, and ``out_features``.
        num_heads: a divisor of ``dim``.

    Raises:
        ValueError: ``num_heads`` is no divisor of ``dim``.

    Source: poolings/jepa/attentive_pooler.py; Bardes et al., TMLR 2024, arXiv 2404.08471.
    """

    def __init__(self, dim: int, num_heads: int = 16) -> None:
        super().__init__()
        self.out_features = dim
        self.query_tokens = nn.Parameter(torch.zeros(1, 1, dim))
        self.cross_attention_block = _CrossAttentionBlock(dim, num_heads)
        trunc_normal_(self.query_tokens, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, C]."""
        return self.cross_attention_block(self.query_tokens.expand(len(x), -1, -1), x).squeeze(1)


class _CrossAttentionBlock(nn.Module):
    """``q + xattn(q, norm1(x))``, then ``q + mlp(norm2(q))``; the query enters un-normalised."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.xattn = _CrossAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        with torch.no_grad():  # as in the first block of a transformer, which has two branches
            for last in (self.xattn.proj, self.mlp.fc2):
                last.weight /= 2**0.5

    def forward(self, query: Tensor, x: Tensor) -> Tensor:
        """[B, Q, C] and [B, N, C] -> [B, Q, C]."""
        query = query + self.xattn(query, self.norm1(x))
        return query + self.mlp(self.norm2(query))


class _CrossAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        _divided("num_heads", num_heads, "dim", dim)
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, query: Tensor, x: Tensor) -> Tensor:
        """[B, Q, C] and [B, N, C] -> [B, Q, C]."""
        key, value = self.kv(x).chunk(2, -1)
        return self.proj(_attention(self.q(query), key, value, self.num_heads))


POOLINGS: dict[str, type[nn.Module]] = {
    "ep": EfficientProbing,
    "simpool": SimPool,
    "abmilp": ABMILP,
    "aim": AIMPool,
    "jepa": JEPAPool,
    "gap": AveragePool,
    "cls": ClassToken,
}


def _attention(query: Tensor, key: Tensor, value: Tensor, num_heads: int) -> Tensor:
    """Attention in heads, [B, Q, C] to [B, N, C]."""
    heads = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)


def _batch_norm(dim: int) -> nn.BatchNorm1d:
    return nn.BatchNorm1d(dim, affine=False, eps=1e-6)


def _divided(name: str, divisor: int, of: str, number: int) -> int:
    if divisor < 1 or number % divisor:
        divisors = [i for i in range(1, number + 1) if number % i == 0]
        near = min(divisors, key=lambda i: abs(i - divisor))
        raise ValueError(
            f"{name}: expected a divisor of {of} = {number} (the nearest is {near}), got {divisor}"
        )
    return number // divisor


# Probes


class FrozenBackbone(nn.Module):
    """What a model says of an image, as tokens: no gradients, and always in eval mode.

    The tokens are what ``forward_features`` gives: after the final norm where the model has that
    before its pooling, else before it.

    Args:
        backbone: a name of vitarium or timm, or a model with timm's protocol: ``forward_features``,
            ``num_features``, and a statement of what the former gives: ``output_fmt``,
            ``num_prefix_tokens`` (then it gives [B, N, C]) or timm's pooling of maps [B, C, H, W].
            A model that is given is frozen itself, not copied.
        tokens: ``patch``, or ``all`` for class tokens and registers before them.
        **model_kwargs: further arguments of ``timm.create_model``.

    Attributes:
        name: of the model: its architecture, or its class.
        num_features: channels of the tokens.
        has_class_token: whether a class token is the first of all tokens.
        pretrained_cfg: timm's description of the model's weights and of the images it expects.

    Raises:
        ValueError: an unknown name, an unknown choice of tokens, arguments for a model that is
            there already, a model without timm's protocol or that does not state its layout.
    """

    def __init__(
        self, backbone: str | nn.Module, tokens: str = "patch", **model_kwargs: Any
    ) -> None:
        super().__init__()
        if tokens not in ("patch", "all"):
            raise ValueError(f"tokens: expected 'patch' or 'all', got {tokens!r}")
        model: Any = backbone
        if isinstance(backbone, str):
            if not timm.is_model(backbone):
                raise ValueError(
                    f"backbone: expected a model of vitarium or timm, got {backbone!r}"
                )
            model = timm.create_model(backbone, num_classes=0, **model_kwargs)
        elif model_kwargs:
            raise ValueError(
                f"{', '.join(model_kwargs)}: expected no arguments for a model that is built"
            )
        self.pretrained_cfg: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
        self.name = self.pretrained_cfg.get("architecture") or type(model).__name__
        self._layout = _stated_layout(model, self.name, self.pretrained_cfg)
        prefix = getattr(model, "num_prefix_tokens", 0)
        self.has_class_token = prefix > 0 and getattr(model, "cls_token", None) is not None
        self._skipped = prefix if tokens == "patch" else 0
        self.num_features: int = model.num_features
        self.model = model.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> FrozenBackbone:
        """Stay in eval mode: no drop path, no new statistics of batch norms."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Image [B, in_chans, H, W] -> tokens [B, N, num_features]."""
        x = self.model.forward_features(x)
        channels = get_channel_dim(self._layout)
        if x.ndim != len(self._layout.value) or x.shape[channels] != self.num_features:
            raise ValueError(
                f"backbone: expected features of {self.name} as it states them, "
                f"{self._layout.value} with C = {self.num_features}, got shape {tuple(x.shape)}"
            )
        if self._layout is Format.NCHW:
            return nchw_to(x, Format.NLC)
        if self._layout is Format.NHWC:
            return nhwc_to(x, Format.NLC)
        return x[:, self._skipped :]


def _stated_layout(model: Any, name: str, cfg: Mapping[str, Any]) -> Format:
    """How ``forward_features`` orders its axes, by what the model says itself."""
    for attribute in ("forward_features", "num_features"):
        if not hasattr(model, attribute):
            raise ValueError(f"backbone: expected timm's protocol, {name} has no {attribute}")
    if getattr(model, "num_prefix_tokens", 0) > 0:  # which no map has; output_fmt is of maps there
        return Format.NLC
    stated = getattr(model, "output_fmt", None)
    if stated is not None:
        if stated not in (Format.NCHW, Format.NHWC, Format.NLC):
            raise ValueError(f"backbone: expected maps or tokens, {name} gives {stated}")
        return Format(stated)
    if hasattr(model, "num_prefix_tokens"):
        return Format.NLC
    # timm's other models of maps say how large the pooled one is, or pool with a layer for maps
    pools = [getattr(part, "global_pool", None) for part in (model, getattr(model, "head", None))]
    if cfg.get("pool_size") or any(isinstance(pool, SelectAdaptivePool2d) for pool in pools):
        return Format.NCHW
    raise ValueError(
        f"backbone: expected a model that states the layout of its features, {name} does not; an "
        "attribute output_fmt of a model, NCHW, NHWC or NLC, does"
    )


def probe_head(
    dim: int, num_classes: int, pooling: str = "ep", **pooling_kwargs: Any
) -> nn.Sequential:
    """Pooling, BatchNorm without parameters, linear classifier: [B, N, dim] -> [B, num_classes].

    Args:
        dim: channels of the tokens.
        num_classes: outputs of the classifier.
        pooling: a name in `POOLINGS`.
        **pooling_kwargs: further arguments of the pooling.

    Raises:
        ValueError: an unknown pooling, no class, or arguments that the pooling refuses.

    Source: probe_heads.py.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"pooling: expected one of {tuple(POOLINGS)}, got {pooling!r}")
    if num_classes < 1:
        raise ValueError(f"num_classes: expected at least 1, got {num_classes}")
    pool: Any = POOLINGS[pooling](dim, **pooling_kwargs)
    return nn.Sequential(
        pool, _batch_norm(pool.out_features), nn.Linear(pool.out_features, num_classes)
    )


class Probe(nn.Module):
    """A frozen backbone, and a head on its tokens, which alone is trained.

    Half-precision backbones get a float32 head.

    >>> probe = Probe("nat_atto", num_classes=10, pooling_kwargs={"num_queries": 16})
    >>> probe(torch.zeros(2, 3, 64, 64)).shape
    torch.Size([2, 10])
    >>> [name for name, parameter in probe.named_parameters() if parameter.requires_grad]
    ['head.0.cls_token', 'head.0.v.weight', 'head.2.weight', 'head.2.bias']
    >>> probe.head.load_state_dict(probe.head.state_dict())
    <All keys matched successfully>

    Args:
        backbone: a name of vitarium or timm, or a model; see `FrozenBackbone`.
        num_classes: outputs of the classifier.
        pooling: a name in `POOLINGS`.
        tokens: what is pooled, ``patch`` or ``all``; see `FrozenBackbone`. None for ``all`` where
            the pooling is ``cls``, and for ``patch`` otherwise.
        pooling_kwargs: further arguments of the pooling.
        **model_kwargs: further arguments of ``timm.create_model``.

    Attributes:
        backbone: the `FrozenBackbone`.
        head: what `probe_head` builds; its ``state_dict`` is all that training changes.
        num_classes: outputs of the classifier.
        pretrained_cfg: timm's description of the backbone's weights and of the images it expects.

    Raises:
        ValueError: as `FrozenBackbone` and `probe_head`; ``cls`` of patch tokens only, or of a
            model without a class token.
    """

    def __init__(
        self,
        backbone: str | nn.Module,
        num_classes: int,
        pooling: str = "ep",
        tokens: str | None = None,
        pooling_kwargs: Mapping[str, Any] | None = None,
        **model_kwargs: Any,
    ) -> None:
        super().__init__()
        if pooling == "cls" and tokens == "patch":
            raise ValueError("tokens: expected None or 'all' where pooling is 'cls', got 'patch'")
        if tokens is None:
            tokens = "all" if pooling == "cls" else "patch"
        self.backbone = FrozenBackbone(backbone, tokens, **model_kwargs)
        if pooling == "cls" and not self.backbone.has_class_token:
            raise ValueError(
                f"pooling: expected another one than 'cls', {self.backbone.name} has no class token"
            )
        dim = self.backbone.num_features
        self.head = probe_head(dim, num_classes, pooling, **(pooling_kwargs or {}))
        parameter = next(self.backbone.parameters())
        self.head.to(parameter.device, torch.promote_types(parameter.dtype, torch.float32))
        self.num_classes = num_classes
        self.pretrained_cfg = self.backbone.pretrained_cfg

    def tokens(self, x: Tensor) -> Tensor:
        """Image [B, in_chans, H, W] -> the tokens that are pooled, [B, N, C], without gradients."""
        tokens: Tensor = self.backbone(x)
        return tokens

    def forward(self, x: Tensor) -> Tensor:
        """Image [B, in_chans, H, W] -> logits [B, num_classes]."""
        logits: Tensor = self.head(self.tokens(x).to(next(self.head.parameters()).dtype))
        return logits
