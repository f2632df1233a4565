"""Text pieces to token ids, each piece once: in memory, and for whole data sets in a file under the cache folder."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import tempfile
import weakref
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

Ids = NDArray[np.int32]


def digest(parts: Iterable[str]) -> str:
    """sha256 of the strings, with their lengths: moving text from one to the next changes it."""
    state = hashlib.sha256()
    for part in parts:
        raw = part.encode("utf-8", "surrogatepass")
        state.update(f"{len(raw)}:".encode())
        state.update(raw)
    return state.hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of what decides a tokenizer's output: vocabulary, merges, pre-tokenisation, special tokens, template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        state.pop("truncation", None)  # settings of the last call, not of the tokenizer
        state.pop("padding", None)
    else:
        state = sorted(tokenizer.get_vocab().items())
    special = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
    parts = (json.dumps(state, sort_keys=True), json.dumps(special, sort_keys=True), str(tokenizer.chat_template))
    return digest(parts)


def leading_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The BOS token's id where the tokenizer begins every text with it, else nothing."""
    bos = tokenizer.bos_token_id
    return (int(bos),) if isinstance(bos, int) and tokenizer("a")["input_ids"][:1] == [bos] else ()


class TokenStore:
    """Ids of pieces under one tokenizer, int32, without special tokens; `preload` keeps those of a data set's texts."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, cache_dir: Path | None = None) -> None:
        self.tokenizer = tokenizer
        self.fingerprint = tokenizer_fingerprint(tokenizer)
        self.cache_dir = cache_dir
        self._known: dict[str, Ids] = {}

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of each text: the preloaded ones, or tokenised now in one batch and not kept."""
        missing = [text for text in texts if text not in self._known]
        fresh = dict(zip(missing, self._tokenise(missing), strict=True))
        return [self._known[text] if text in self._known else fresh[text] for text in texts]

    def get(self, text: str) -> Ids:
        """Ids of a preloaded text."""
        return self._known[text]

    def preload(self, texts: Iterable[str]) -> None:
        """Tokenise `texts` in one batch and keep them; with a cache folder, read or write them there."""
        new = list(dict.fromkeys(text for text in texts if text not in self._known))
        if not new:
            return
        file = self.cache_dir / "tokens" / f"{digest([self.fingerprint, *new])}.npz" if self.cache_dir else None
        ids = _read(file, len(new)) if file else None
        if ids is None:
            ids = self._tokenise(new)
            if file:
                _write(file, ids)
        self._known.update(zip(new, ids, strict=True))

    def _tokenise(self, texts: list[str]) -> list[Ids]:
        if not texts:
            return []
        # verbose=False: a piece longer than the model's context is no mistake here, the assembly checks the whole
        encoded = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [np.asarray(ids, dtype=np.int32) for ids in encoded["input_ids"]]


# The jobs of a multirun, each with a tokenizer of its own, tokenise their common texts once. Only the last few stores
# stay, for a data set's ids take some hundred megabytes.
_KEEP = 2
_STORES: dict[tuple[str, Path | None], TokenStore] = {}
_FINGERPRINTS: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, dict[tuple[object, ...], str]]
_FINGERPRINTS = weakref.WeakKeyDictionary()


def token_store(tokenizer: PreTrainedTokenizerBase, cache_dir: Path | None) -> TokenStore:
    """The store of all tokenizers that are equal to this one now; a new one after tokens or a template were changed."""
    known = _FINGERPRINTS.setdefault(tokenizer, {})
    state = (len(tokenizer), tokenizer.chat_template, tokenizer.eos_token)
    if state not in known:
        known[state] = tokenizer_fingerprint(tokenizer)
    key = (known[state], cache_dir)
    store = _STORES.pop(key, None) or TokenStore(copy.deepcopy(tokenizer), cache_dir)
    _STORES[key] = store  # the last one used comes last
    while len(_STORES) > _KEEP:
        del _STORES[next(iter(_STORES))]
    return store


def default_cache_dir() -> Path:
    """$LRSA_CACHE, or ~/.cache/lrsa."""
    return Path(os.environ.get("LRSA_CACHE") or Path.home() / ".cache" / "lrsa")


def _read(file: Path, count: int) -> list[Ids] | None:
    if not file.exists():
        return None
    try:
        with np.load(file, allow_pickle=False) as stored:
            flat, ends = stored["ids"], stored["ends"]
        if flat.dtype != np.int32 or len(ends) != count or (ends[-1] if count else 0) != len(flat):
            raise ValueError("its arrays do not fit together")
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        log.warning("token cache %s is unreadable (%s): tokenising again", file, error)
        return None
    return np.split(flat, ends[:-1])


def _write(file: Path, ids: list[Ids]) -> None:
    write_arrays(file, ids=np.concatenate(ids), ends=np.cumsum([len(piece) for piece in ids]))


def write_arrays(file: Path, **arrays: NDArray[Any]) -> None:
    """Write under a temporary name, then rename: a reader never meets half a file. A full disk only costs the cache."""
    temporary = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".part", delete=False) as handle:
            temporary = handle.name
            np.savez(handle, **arrays)  # type: ignore[arg-type]  # numpy's stub takes them for allow_pickle
        os.replace(temporary, file)
    except OSError as error:
        log.warning("cache file %s was not written: %s", file, error)
        if temporary:
            Path(temporary).unlink(missing_ok=True)
