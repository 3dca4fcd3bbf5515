"""How many tokens of a text a Hugging Face model and its tokenizer take."""

from __future__ import annotations

from typing import Any

from torch import nn

from exitkit.common.checks import Count, check
from exitkit.common.errors import ArgumentError

_NO_LIMIT = 2**20
"""Tokenizers without a limit say 10³⁰."""
_USUAL = 512
"""Where neither says."""


def longest_text(
    tokenizer: Any, model: nn.Module | None, max_length: int | None = None, named: str = "max_length="
) -> int:
    """Tokens after which a text is cut.

    Args:
        tokenizer: a Hugging Face tokenizer.
        model: which shall read the tokens, or None.
        max_length: how many are asked for; by default as many as both take, and 512 where neither has a limit.
        named: what an error says before it.

    Raises:
        ArgumentError: no positive number, or more than the model has positions.
    """
    check("max_length", max_length, Count | None)
    positions = None if model is None else _positions(model)
    if max_length is not None:
        if positions is not None and max_length > positions:
            raise ArgumentError(
                f"{named}{max_length}: {type(model).__name__} has {positions} positions; give at most so many tokens"
            )
        return max_length
    limits = [limit for limit in (getattr(tokenizer, "model_max_length", None), positions) if limit]
    return min((limit for limit in limits if limit < _NO_LIMIT), default=_USUAL)


def _positions(model: nn.Module) -> int | None:
    """How many positions the model can tell apart; None for relative ones, of which there is no end."""
    for name, module in model.named_modules():
        # RoBERTa and its kin count positions from behind the padding token's
        if (
            name.endswith("position_embeddings")
            and isinstance(module, nn.Embedding)
            and module.padding_idx is not None
        ):
            return module.num_embeddings - module.padding_idx - 1
    config = getattr(model, "config", None)
    text = config.get_text_config() if config is not None and hasattr(config, "get_text_config") else config
    limit = getattr(text, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None  # XLNet says -1: no limit
