"""Text <-> token ids, around a `transformers` fast tokenizer with the control tokens added.

Text never becomes a control token: "[Ret]" or the tokenizer's own end-of-sequence string inside a
passage or a question is encoded as ordinary characters. Control tokens exist as ids only.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterable, Sequence
from pathlib import Path

import huggingface_hub
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from cosup_jax.errors import UserError
from cosup_jax.hf.gguf_tokenizer import read_tokenizer
from cosup_jax.runtime.paths import expanded
from cosup_jax.runtime.workdir import writing

RET, CS, CE, EMB, PAD, EOS = "[Ret]", "[Cs]", "[Ce]", "[Emb]", "<pad>", "</s>"
ADDED = (RET, CS, CE, EMB, PAD)  # to a tokenizer that has none of them
LLAMA2_ENTRIES = 32000
RELEASED = ("<PAD>", CS, CE, RET)  # kaist-ai/cosupervision-*: ids 32000 to 32003
CONNECT_S = 5  # seconds until the hub counts as out of reach


class Tokenizer:
    """Ids of the control tokens: `ret`, `cs`, `ce`, `emb`, `pad` and `eos`.

    `prefix` and `suffix` are what the tokenizer itself puts around a text: a bos for Llama, [CLS]
    and [SEP] for BERT. Entries from `pretrained_size` on are ours: no pretrained weights know them.
    `control` holds all ids that no text has.
    """

    def __init__(self, fast: PreTrainedTokenizerFast, weight_rows: int = 0):
        """Adds what `fast` lacks of `[Ret] [Cs] [Ce] [Emb]` and padding.

        All of them, whatever the config: settings that are compared share one vocabulary. Raises
        UserError without eos (a BERT's is [SEP]), or where ids are left out.

        Args:
          weight_rows: of the table of pretrained weights that go with it. Llama 2's tokenizer
            beside the rows of the paper's released checkpoints gets their tokens in their order.
        """
        if (len(fast), weight_rows) == (LLAMA2_ENTRIES, LLAMA2_ENTRIES + len(RELEASED)):
            fast.pad_token = RELEASED[0]
            fast.add_tokens([AddedToken(t, special=True, normalized=False) for t in RELEASED])
        if fast.eos_token is None:
            fast.eos_token = fast.sep_token
        if fast.eos_token is None:
            raise UserError(
                f"tokenizer {fast.name_or_path!r} has no end-of-sequence token; set eos_token in "
                "its tokenizer_config.json"
            )
        if (last := max(fast.get_vocab().values())) >= len(fast):
            raise UserError(
                f"tokenizer {fast.name_or_path!r} has {len(fast)} entries, the last one {last}: "
                "added tokens would take ids that are in use; fill the ids that it leaves out"
            )
        self._backend = fast.backend_tokenizer
        self._backend.no_padding()  # MiniLM's file asks for padding to 128
        self._backend.no_truncation()
        framed = self._backend.encode("a")
        inside = [i for i, special in enumerate(framed.special_tokens_mask) if not special]
        self.prefix = tuple(framed.ids[: inside[0]])
        self.suffix = tuple(framed.ids[inside[-1] + 1 :])
        new = [RET, CS, CE, EMB]
        if fast.pad_token is None or fast.pad_token == fast.eos_token:
            new.append(PAD)
            fast.pad_token = PAD
        self.pretrained_size = len(fast)
        fast.add_tokens([AddedToken(t, special=True, normalized=False) for t in new])
        self._fast = fast
        self._backend.encode_special_tokens = True
        self.ret, self.cs, self.ce, self.emb = fast.convert_tokens_to_ids([RET, CS, CE, EMB])
        self.pad, self.eos = fast.pad_token_id, fast.eos_token_id
        ids = (self.ret, self.cs, self.ce, self.emb, self.pad, self.eos, fast.bos_token_id)
        self.control = {*ids, *self.prefix, *self.suffix} - {None}

    @property
    def vocab_size(self) -> int:
        """Entries, added tokens included."""
        return len(self._fast)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the serialized tokenizer and of which ids are control tokens."""
        ids = (self.ret, self.cs, self.ce, self.emb, self.pad, self.eos, self.prefix, self.suffix)
        return hashlib.sha256(f"{self._backend.to_str()}{ids}".encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of a plain text; never a control token."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, in parallel."""
        found = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in found]

    def decode(self, ids: Iterable[int], skip_control: bool = False) -> str:
        """Text of ids; `skip_control` leaves out [Ret], [Cs], [Ce], [Emb], padding, eos, bos."""
        ids = [int(i) for i in ids if not (skip_control and int(i) in self.control)]
        return self._backend.decode(ids, skip_special_tokens=False)

    def save(self, directory: str | Path) -> None:
        """Writes a tokenizer directory that `transformers` reads, whole or not at all.

        A tokenizer that is already there is left alone if it is the same, replaced otherwise.
        Raises UserError where the disk is full.
        """
        directory = Path(directory)
        with writing(directory):
            directory.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
            try:
                self._save(directory, temporary / "new", temporary / "old")
            finally:
                shutil.rmtree(temporary)

    def _save(self, directory: Path, new: Path, old: Path) -> None:
        _write(self._fast, new)
        for file in new.iterdir():
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())
        if directory.is_dir() and any(directory.iterdir()):
            if load(directory).fingerprint == self.fingerprint:
                return
            os.rename(directory, old)
        os.rename(new, directory)

    def save_framed(
        self, directory: Path, tail: Sequence[int], max_tokens: int, text_only: bool
    ) -> None:
        """Writes a tokenizer directory that puts `prefix` and `tail` around every text.

        For an export: made of the serialized tokenizer alone, so that no class of transformers
        frames texts by rules of its own.

        Args:
          max_tokens: to which a text is cut on request, the frame included.
          text_only: text never becomes a control token, as with us; else it does, as chat
            templates need it.

        Raises OSError where the disk is full.
        """
        backend = Backend.from_str(self._backend.to_str())
        names = {i: backend.id_to_token(i) for i in (*self.prefix, *tail)}
        before, after = ([names[i] for i in ids] for ids in (self.prefix, tail))
        backend.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, "$B:1", *(f"{name}:1" for name in after)],
            special_tokens=[(name, i) for i, name in names.items()],
        )
        special = {
            name: token
            for name in ("bos", "eos", "pad", "unk", "cls", "sep", "mask")
            if (token := getattr(self._fast, f"{name}_token"))
        }
        framed = PreTrainedTokenizerFast(
            tokenizer_object=backend,
            **{f"{name}_token": token for name, token in special.items()},
            chat_template=self._fast.chat_template,
            model_max_length=max_tokens,
            padding_side=self._fast.padding_side,
            model_input_names=["input_ids", "attention_mask"],
            split_special_tokens=text_only,
        )
        _write(framed, directory)
        # transformers 5 writes a name that 4 does not know; this one both do.
        about = json.loads((directory / "tokenizer_config.json").read_text())
        about["tokenizer_class"] = "PreTrainedTokenizerFast"
        (directory / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n")


def _write(fast: PreTrainedTokenizerFast, directory: Path) -> None:
    try:
        fast.save_pretrained(directory)
    except Exception as error:  # in tokenizers' words alone
        if found := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(found[1]), os.strerror(int(found[1]))) from error
        raise


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE of at most `vocab_size` entries, eos among them, the other control tokens not.

    The same texts in the same order give the same tokenizer. Raises UserError if `vocab_size`
    does not hold the 256 bytes and eos.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size <= len(alphabet):
        raise UserError(
            f"config.data.vocab_size={vocab_size} is too small for byte-level BPE; set it above "
            f"{len(alphabet)}"
        )
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS))


def load(source: str | Path, weight_rows: int = 0) -> Tokenizer:
    """A tokenizer directory, a .gguf file or a hub id; `weight_rows` as for Tokenizer.

    Raises UserError if there is none or no network.
    """
    path = expanded(source)
    if path.suffix == ".gguf":
        return Tokenizer(read_tokenizer(path), weight_rows)
    if path.is_dir():
        return _pretrained(str(path), str(source), weight_rows)
    if path.is_absolute() or str(source).startswith((".", "~")):
        raise UserError(f"tokenizer {str(source)!r}: no such directory; check the path")
    _check_reachable(str(source))
    return _pretrained(str(source), str(source), weight_rows)


def _pretrained(name: str, source: str, weight_rows: int) -> Tokenizer:
    try:
        fast = _from_pretrained(name)
    except Exception as error:  # whatever transformers and tokenizers make of a broken file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(" :")
        raise UserError(
            f"tokenizer {source!r} cannot be loaded ({reason}); give a directory that holds a "
            "whole tokenizer.json"
        ) from error
    if not fast.is_fast:
        raise UserError(f"tokenizer {source!r} has no tokenizer.json; only fast ones are supported")
    return Tokenizer(fast, weight_rows)


def _from_pretrained(name: str, **options) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer  # slow to import, and a tokenizer of our own needs none

    return AutoTokenizer.from_pretrained(name, trust_remote_code=False, **options)


def _check_reachable(repository: str) -> None:
    """Fails in seconds where the hub client would retry for most of a minute."""
    try:
        _from_pretrained(repository, local_files_only=True)
        return
    except (OSError, ValueError, ImportError):
        endpoint = huggingface_hub.constants.ENDPOINT
    try:
        urllib.request.urlopen(endpoint, timeout=CONNECT_S).close()
    except urllib.error.HTTPError:
        return  # an answer, whatever it says
    except OSError as error:
        raise UserError(
            f"tokenizer {repository!r}: no such directory, not in the local cache, and "
            f"{endpoint} is out of reach ({error}); give a directory or check the network"
        ) from error
