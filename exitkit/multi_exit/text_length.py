"""How many tokens of a text a Hugging Face model and its tokenizer take."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from exitkit.common.checks import Count, check
from exitkit.common.errors import ArgumentError

_NO_LIMIT = 2**20
"""Tokenizers without a limit say 10³⁰."""
_USUAL = 512
"""Where neither says."""
_LEARNED = re.compile(r"(position_embeddings|positions_embed|embed_positions|wpe)$")
"""Modules of transformers that look positions up in a table."""


def longest_text(tokenizer: Any, model: nn.Module | None, max_length: int | None = None) -> int:
    """Tokens after which a text is cut.

    Args:
        tokenizer: a Hugging Face tokenizer.
        model: which shall read the tokens, or None.
        max_length: how many are asked for; by default as many as both take, and 512 where neither has a limit.

    Raises:
        ArgumentError: no positive number, or more than the model has positions.
    """
    check("max_length", max_length, Count | None)
    if max_length is not None:
        if model is not None:
            check_positions(model, max_length, "max_length=")
        return max_length
    positions = None if model is None else _positions(model)
    limits = [limit for limit in (getattr(tokenizer, "model_max_length", None), positions) if limit]
    return min((limit for limit in limits if limit < _NO_LIMIT), default=_USUAL)


def check_positions(model: nn.Module, length: int, named: str) -> None:
    """Refuse more tokens than the model has positions; ``named`` is what an error says before their number.

    Raises:
        ArgumentError: there are more.
    """
    positions = _positions(model)
    if positions is not None and length > positions:
        raise ArgumentError(
            f"{named}{length}: {type(model).__name__} has {positions} positions; give at most so many tokens"
        )


def learned_positions(model: nn.Module, read: Iterable[Tensor]) -> int | None:
    """Tokens beyond which the model has no position to look up; None where positions are computed from the tokens' places.

    ``read`` are the weights that its graph reads: some models (ESM) have a table beside rotary positions.
    """
    weights = {id(weight) for weight in read}
    modules = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Embedding))
    tables = (name for name, module in modules if id(module.weight) in weights)
    return _positions(model) if any(map(_LEARNED.search, tables)) else None


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
