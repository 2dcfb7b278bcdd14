"""The tokenizer inside a GGUF file, as a `transformers` fast tokenizer with the same ids.

`transformers` reads one only with torch, and then splits text by GPT-2's rule where it does not
know the file's own: another splitting gives other ids and no message.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast

from cosup_jax.errors import UserError
from cosup_jax.gguf_file import open_gguf

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # types of token
_SPACE = "\u2581"
_ROLES = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
    "sep_token": "seperator_token_id",  # their spelling
    "cls_token": "cls_token_id",
    "mask_token": "mask_token_id",
}


class _Split(NamedTuple):
    """How text falls into words before byte-level BPE merges within them."""

    patterns: tuple[str, ...]  # each splits what the ones before it left
    normalizer: normalizers.Normalizer | None = None  # llama.cpp has none, the originals do
    whole_words: bool = False  # a word that is an entry is not built by merges
    add_bos: bool = False


_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_MODERN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DIGITS = _Split((r"\p{N}", _GPT2_WORDS))
_LLAMA3 = _Split((_MODERN_WORDS.format(digits="{1,3}"),), whole_words=True, add_bos=True)
_SPLITS = {
    "default": _Split((r"[\p{P}\$\+<=>\^~\|]+", _GPT2_WORDS, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "gpt-2": _Split((_GPT2_WORDS,)),
    "olmo": _Split((_GPT2_WORDS,), normalizers.NFC()),  # GPT-NeoX and Pythia too
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _Split((_MODERN_WORDS.format(digits=""),), normalizers.NFC()),
    "tekken": _Split((_TEKKEN_WORDS,), whole_words=True, add_bos=True),
}


def read_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a model file; every entry keeps its id.

    Raises UserError for one whose way of splitting text is not known here, rather than guess it.
    """
    _, metadata = open_gguf(Path(path))
    stored = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    kind = stored.get("model")
    if kind not in _BUILD:
        raise UserError(
            f"{path}: tokenizer {kind!r} is not supported, only {', '.join(_BUILD)}; give the "
            "directory of the original tokenizer"
        )
    tokens = stored.get("tokens") or []
    if len(set(tokens)) != len(tokens) or not tokens:
        raise UserError(f"{path}: its vocabulary is empty or has an entry twice; get the file anew")
    types = stored.setdefault("token_type", [_NORMAL] * len(tokens))
    roles = {role: stored[key] for role, key in _ROLES.items() if key in stored}
    for role, index in roles.items():
        if not 0 <= index < len(tokens):
            raise UserError(
                f"{path}: {role} {index} is no entry of {len(tokens)}; get the file anew"
            )
    try:
        backend, adds_bos = _BUILD[kind](path, stored)
    except UserError:
        raise
    except Exception as error:  # tokenizers raises no narrower type
        raise UserError(f"{path}: its tokenizer cannot be built ({error})") from error
    for wanted in (_CONTROL, _USER_DEFINED):
        backend.add_tokens(
            [
                AddedToken(token, special=wanted == _CONTROL, normalized=False)
                for token, found in zip(tokens, types, strict=True)
                if found == wanted
            ]
        )
    ends = {
        "add_bos_token": stored.get("add_bos_token", adds_bos),
        "add_eos_token": stored.get("add_eos_token", False),
    }
    for role in ("bos_token", "eos_token"):
        if ends[f"add_{role}"] and role not in roles:
            raise UserError(f"{path}: {role} is to be added but is not stored; get the file anew")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **{role: tokens[index] for role, index in roles.items()},
        **({} if kind == "bert" else ends),
    )


def _byte_level(path: str | Path, stored: Mapping[str, Any]) -> tuple[Tokenizer, bool]:
    name = stored.get("pre")
    if name not in _SPLITS:
        raise UserError(
            f"{path}: pre-tokenizer {name!r} is not known, only {', '.join(_SPLITS)}; give the "
            "directory of the original tokenizer"
        )
    split = _SPLITS[name]
    backend = Tokenizer(
        models.BPE(
            {token: index for index, token in enumerate(stored["tokens"])},
            [tuple(merge.split(" ", 1)) for merge in stored["merges"]],
            ignore_merges=split.whole_words,
        )
    )
    if split.normalizer is not None:
        backend.normalizer = split.normalizer
    words = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in split.patterns]
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*words, bytes_only])
    backend.decoder = decoders.ByteLevel()
    return backend, split.add_bos


def _sentencepiece(path: str | Path, stored: Mapping[str, Any]) -> tuple[Tokenizer, bool]:
    """BPE that merges the best-scored entry first, and bytes where no entry fits."""
    tokens, types = stored["tokens"], stored["token_type"]
    ids = {token: index for index, token in enumerate(tokens)}
    normal = {t for t, kind in zip(tokens, types, strict=True) if kind == _NORMAL}
    merges = [
        (token[:cut], token[cut:])
        for token in sorted(normal, key=lambda token: (-stored["scores"][ids[token]], ids[token]))
        for cut in range(1, len(token))
        if token[:cut] in normal and token[cut:] in normal
    ]
    unknown = tokens[stored["unknown_token_id"]] if "unknown_token_id" in stored else None
    backend = Tokenizer(
        models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    prefix = stored.get("add_space_prefix", True)
    backend.normalizer = normalizers.Sequence(
        [*[normalizers.Prepend(_SPACE)][: bool(prefix)], normalizers.Replace(" ", _SPACE)]
    )
    plain = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*plain, *[decoders.Strip(" ", 1, 0)][: bool(prefix)]])
    return backend, True


def _wordpiece(path: str | Path, stored: Mapping[str, Any]) -> tuple[Tokenizer, bool]:
    """llama.cpp marks the first piece of a word, BERT all others."""
    ids, cased = {}, False
    for index, (token, kind) in enumerate(zip(stored["tokens"], stored["token_type"], strict=True)):
        if kind == _NORMAL:
            cased |= token != token.lower()
            token = token[1:] if token.startswith(_SPACE) else f"##{token}"
        ids[token] = index
    first, last = stored.get("cls_token_id", stored.get("bos_token_id")), "seperator_token_id"
    if first is None or last not in stored or "unknown_token_id" not in stored:
        raise UserError(
            f"{path}: cls, sep or unk of its tokenizer is not stored; get the file anew"
        )
    cls, sep, unk = (stored["tokens"][i] for i in (first, stored[last], stored["unknown_token_id"]))
    backend = Tokenizer(models.WordPiece(ids, unk_token=unk))
    lowercase = stored.get("normalizer.lowercase", not cased)
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B:1 {sep}:1",
        special_tokens=[(cls, first), (sep, stored[last])],
    )
    return backend, False


_BUILD: dict[str, Callable[..., tuple[Tokenizer, bool]]] = {
    "gpt2": _byte_level,
    "llama": _sentencepiece,
    "bert": _wordpiece,
}
