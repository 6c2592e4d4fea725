"""How many tokens a model takes at once."""

from __future__ import annotations

from typing import Any

# These number positions from behind the padding token's id on, and leave those before it unused.
_COUNT_FROM_PADDING = {
    *("camembert", "data2vec-text", "esm", "ibert", "layoutlmv3", "lilt", "longformer", "luke"),
    *("markuplm", "mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"),
}


def positions_of(config: Any) -> int | None:
    """The most tokens that a model takes, by its configuration, or None where that names no limit."""
    config = config.get_text_config()
    count = getattr(config, "max_position_embeddings", None)
    if not isinstance(count, int) or count <= 0:
        return None
    if config.model_type in _COUNT_FROM_PADDING and isinstance(config.pad_token_id, int):
        return count - config.pad_token_id - 1
    return count
