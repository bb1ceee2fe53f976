"""What a tokenizer is, as far as its token ids mean something."""

from __future__ import annotations

import hashlib
import json
from typing import Any

# What the hash is of, before it: a manifest may have another kind, which says nothing of this one.
_KIND = "vocabulary-sha256"


def vocabulary_hash(tokenizer: Any) -> str | None:
    """A hash of which id stands for which token, or None of what is no tokenizer."""
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor
    if not hasattr(tokenizer, "get_vocab"):
        return None
    text = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return f"{_KIND}:{hashlib.sha256(text.encode()).hexdigest()[:32]}"
