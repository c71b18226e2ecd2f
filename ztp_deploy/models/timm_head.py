"""How timm's ViTs read out: pooling of the tokens that survive, the classifier, and what both multiply."""

from __future__ import annotations

from typing import Any

from timm.layers import AttentionPoolLatent
from torch import Tensor, nn

from ztp_deploy.models.parts import max_of_patches, mean_of_patches, typed
from ztp_deploy.pruning.tokens import MASKED, TokenState, key_bias

GIVE_CLASSIFIER = (
    "Give it one that you trained: your checkpoint as weights with overrides=ModelSize(num_classes=…), "
    "or your own module, timm.create_model(…, num_classes=…)."
)


def refusal(model: Any) -> tuple[str, str] | None:
    """Why this model's read-out cannot be carried, as a clause, and what to do; None where it can."""
    pool = model.attn_pool
    head = model.head
    if isinstance(head, nn.Identity) or not model.global_pool:
        return "it has no classifier", GIVE_CLASSIFIER
    if not isinstance(head, nn.Linear) or head.out_features < 2:
        return "its classifier is not a linear layer with at least 2 outputs", GIVE_CLASSIFIER
    if pool is not None and (type(pool) is not AttentionPoolLatent or pool.pos_embed is not None):
        reason = f"its pooling, {type(pool).__name__}, needs every token"
        return reason, "Choose a model that pools by token, avg, max or map (global_pool)."
    if pool is None and getattr(model, "pool_include_prefix", False):
        return "pool_include_prefix pools special tokens with the patches", "Build it with pool_include_prefix=False."
    return None


def read_out(model: Any, tokens: Tensor, state: TokenState) -> Tensor:
    """Normed tokens [B, S + n, C] → logits [B, classes], as the model's `forward_head` does it with all tokens.

    Masked slots are left out of every pooling. Attention pooling, like all attention, adds the state's bias.
    """
    logits: Tensor = model.head(model.head_drop(model.fc_norm(_pool(model, tokens, state))))
    return logits


def _pool(model: Any, tokens: Tensor, state: TokenState) -> Tensor:
    if model.attn_pool is not None:
        first = _first_pooled(model)
        pooled: Tensor = model.attn_pool(tokens[:, first:], attn_mask=typed(_pool_bias(state, first), tokens))
        return pooled
    if model.global_pool == "token":
        return tokens[:, 0]
    patches = tokens[:, model.num_prefix_tokens :]
    if model.global_pool == "avg":
        return mean_of_patches(patches, state)
    largest = max_of_patches(patches, state)
    if model.global_pool == "max":
        return largest
    return (largest + mean_of_patches(patches, state)) / 2


def _first_pooled(model: Any) -> int:
    """The first slot that attention pooling sees: timm's VisionTransformer leaves special tokens out, Eva does not."""
    return 0 if getattr(model, "pool_include_prefix", True) else model.num_prefix_tokens


def _pool_bias(state: TokenState, first: int) -> Tensor | None:
    """What attention pooling adds to its logits [B, 1, 1, N] for the slots from `first` on."""
    bias = state.bias
    if state.alive is not None:
        # A method may have put masked slots into its bias already; twice as far out is out too.
        masked = key_bias((state.alive - 1) * -MASKED)
        bias = masked if bias is None else bias + masked
    return None if bias is None else bias[..., first:]


def macs(model: Any) -> tuple[int, int]:
    """Multiply-accumulates of the read-out for one image: once, and for each patch token that reaches it."""
    heads = [getattr(model, name) for name in ("head", "head_dist") if hasattr(model, name)]
    once = sum(linear_macs(head) for head in heads)
    pool = model.attn_pool
    if pool is None:
        return once, 0
    # Keys and values of every token, and two products of each latent query with it.
    per_token = linear_macs(pool.kv) + pool.latent_len * pool.kv.out_features
    once += pool.latent_len * (linear_macs(pool) - linear_macs(pool.kv))
    return once + per_token * (model.num_prefix_tokens - _first_pooled(model)), per_token


def linear_macs(module: nn.Module) -> int:
    """Multiply-accumulates for one token of all linear layers in a module, each run once."""
    return sum(part.in_features * part.out_features for part in module.modules() if isinstance(part, nn.Linear))
