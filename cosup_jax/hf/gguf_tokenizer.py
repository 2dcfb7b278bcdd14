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
from cosup_jax.hf.gguf import ProblemError, open_gguf

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
    prefix = "tokenizer.ggml."
    stored = {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}
    try:
        return _build(stored, metadata.get("tokenizer.chat_template"))
    except ProblemError as problem:
        raise UserError(
            f"{path}: {problem}; give the directory of the original tokenizer"
        ) from problem
    except Exception as error:  # tokenizers raises no narrower type
        line = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UserError(f"{path}: its tokenizer cannot be built ({line}); get it anew") from error


def _build(stored: dict[str, Any], chat_template: str | None) -> PreTrainedTokenizerFast:
    builder = _BUILDERS.get(stored.get("model"))
    if builder is None:
        known = ", ".join(_BUILDERS)
        raise ProblemError(f"tokenizer {stored.get('model')!r} is not supported, only {known}")
    tokens = stored["tokens"]
    types = stored.setdefault("token_type", [_NORMAL] * len(tokens))
    if len(set(tokens)) != len(tokens):
        raise ProblemError("an entry of the vocabulary is there twice")
    roles = {role: tokens[stored[key]] for role, key in _ROLES.items() if key in stored}
    backend, adds_bos = builder(stored, roles)
    for kind in (_CONTROL, _USER_DEFINED):
        backend.add_tokens(
            [
                AddedToken(token, special=kind == _CONTROL, normalized=False)
                for token, found in zip(tokens, types, strict=True)
                if found == kind
            ]
        )
    ends = {}
    if adds_bos is not None:
        ends["add_bos_token"] = stored.get("add_bos_token", adds_bos)
        ends["add_eos_token"] = stored.get("add_eos_token", False)
    for end, wanted in ends.items():
        if wanted and end.removeprefix("add_") not in roles:
            raise ProblemError(f"{end} is set, but that token is not stored")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=chat_template,
        **roles,
        **ends,
    )


# Each gives the tokenizer and whether bos comes first by default; None: its own template says so.


def _byte_level(stored: Mapping[str, Any], roles: Mapping[str, str]) -> tuple[Tokenizer, bool]:
    name = stored.get("pre")
    if name not in _SPLITS:
        raise ProblemError(f"pre-tokenizer {name!r} is not known, only {', '.join(_SPLITS)}")
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
    spelling = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*words, spelling])
    backend.decoder = decoders.ByteLevel()
    return backend, split.add_bos


def _sentencepiece(stored: Mapping[str, Any], roles: Mapping[str, str]) -> tuple[Tokenizer, bool]:
    """BPE that builds the best-scored entry first, and falls back to bytes."""
    tokens = stored["tokens"]
    ids = {token: index for index, token in enumerate(tokens)}
    normal = [i for i, kind in enumerate(stored["token_type"]) if kind == _NORMAL]
    parts = {tokens[i] for i in normal}
    merges = [
        (tokens[i][:cut], tokens[i][cut:])
        for i in sorted(normal, key=lambda i: -stored["scores"][i])
        for cut in range(1, len(tokens[i]))
        if tokens[i][:cut] in parts and tokens[i][cut:] in parts
    ]
    unknown = roles.get("unk_token")
    backend = Tokenizer(
        models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    normalize = [normalizers.Replace(" ", _SPACE)]
    decode = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if stored.get("add_space_prefix", True):
        normalize.insert(0, normalizers.Prepend(_SPACE))
        decode.append(decoders.Strip(" ", 1, 0))
    backend.normalizer = normalizers.Sequence(normalize)
    backend.decoder = decoders.Sequence(decode)
    return backend, True


def _wordpiece(stored: Mapping[str, Any], roles: dict[str, str]) -> tuple[Tokenizer, None]:
    """llama.cpp marks the first piece of a word, BERT all others."""
    ids, cased = {}, False
    for index, (token, kind) in enumerate(zip(stored["tokens"], stored["token_type"], strict=True)):
        if kind == _NORMAL:
            cased |= token != token.lower()
            token = token[1:] if token.startswith(_SPACE) else f"##{token}"
        ids[token] = index
    roles.setdefault("cls_token", roles.get("bos_token", "[CLS]"))
    cls, sep = roles["cls_token"], roles.setdefault("sep_token", "[SEP]")
    backend = Tokenizer(models.WordPiece(ids, unk_token=roles.setdefault("unk_token", "[UNK]")))
    lowercase = stored.get("normalizer.lowercase", not cased)
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B:1 {sep}:1",
        special_tokens=[(cls, ids[cls]), (sep, ids[sep])],
    )
    return backend, None


_BUILDERS: dict[Any, Callable[..., tuple[Tokenizer, bool | None]]] = {
    "gpt2": _byte_level,
    "llama": _sentencepiece,
    "bert": _wordpiece,
}
