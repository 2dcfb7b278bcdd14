"""Control tokens, determinism and persistence of the tokenizer."""

import pytest
from files import full_disk
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from cosup_jax.data import tokenizer
from cosup_jax.errors import UserError

TEXTS = ["Paris is the capital of France.", "The river Thames flows through London."] * 3


@pytest.fixture(scope="module")
def trained():
    return tokenizer.train(TEXTS, 300)


def word_level(**special):
    """A small pretrained tokenizer: words, and the given special tokens."""
    words = ["<unk>", "<s>", "</s>", "<mine>", "a", "b"]
    backend = Backend(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


@pytest.mark.parametrize("literal", ["[Ret]", "[Cs]", "[Ce]", "[Emb]", "<pad>", "</s>"])
def test_text_never_becomes_a_control_token(trained, literal):
    """A passage that spells out "[Ret]" or "</s>" would plant a retrieval or end the sequence."""
    control = {trained.ret, trained.cs, trained.ce, trained.emb, trained.pad, trained.eos}
    text = f"x{literal} {literal}y"
    assert len(control) == 6
    assert not control & set(trained.encode(text))
    assert not control & set(trained.encode_batch([text])[0])
    assert trained.decode(trained.encode(text)) == text


def test_text_stays_plain_after_save_and_load(trained, tmp_path):
    """`encode_special_tokens` is not part of the saved file and would be lost on resume."""
    trained.save(tmp_path / "tokenizer")
    again = tokenizer.load(tmp_path / "tokenizer")
    assert again.encode("[Ret]</s>") == trained.encode("[Ret]</s>")
    for name in ("ret", "cs", "ce", "emb", "pad", "eos", "vocab_size"):
        assert getattr(again, name) == getattr(trained, name)
    assert again.pretrained_size == trained.vocab_size
    assert again.fingerprint == trained.fingerprint


def test_every_byte_survives(trained):
    """A tokenizer without the full byte alphabet silently drops characters it never saw."""
    text = "naïve “façade” 北京 \U0001f600\n\ttab"
    assert trained.decode(trained.encode(text)) == text


def test_training_is_deterministic():
    """A tokenizer that differs from run to run makes every cache and checkpoint useless."""
    first, second = (tokenizer.train(iter(TEXTS), 300) for _ in range(2))
    assert first._backend.to_str() == second._backend.to_str()
    assert first.fingerprint == second.fingerprint
    assert tokenizer.train(TEXTS, 290).fingerprint != first.fingerprint


def test_new_tokens_land_above_the_trained_vocabulary():
    """Control tokens counted inside vocab_size would steal entries from the BPE."""
    trained = tokenizer.train(["abab" * 50, "cdcd" * 50], 260)
    assert trained.pretrained_size == 260
    added = [trained.ret, trained.cs, trained.ce, trained.emb, trained.pad]
    assert added == [260, 261, 262, 263, 264] and trained.vocab_size == 265
    with pytest.raises(UserError, match="vocab_size=256 is too small"):
        tokenizer.train(TEXTS, 256)


def test_decode_can_leave_control_tokens_out(trained):
    """Answers shown to a reader would carry [Cs] and </s>, a passage the [Emb] behind it."""
    ids = [trained.ret, *trained.encode("Paris"), trained.ce, trained.emb, trained.eos, trained.pad]
    assert trained.decode(ids, skip_control=True) == "Paris"
    assert trained.decode(ids) == "[Ret]Paris[Ce][Emb]</s><pad>"


def test_padding_is_never_the_end_of_sequence():
    """Where pad = eos, masking the padding also unteaches the end of the answer."""
    same = tokenizer.Tokenizer(word_level(eos_token="</s>", pad_token="</s>"))
    assert same.pad != same.eos == 2
    kept = tokenizer.Tokenizer(word_level(eos_token="</s>", pad_token="<mine>"))
    assert kept.pad == 3
    with pytest.raises(UserError, match="no end-of-sequence token"):
        tokenizer.Tokenizer(word_level())


def test_bos_only_where_the_tokenizer_writes_one():
    """GPT-2 names a bos it never writes; Llama writes one that its weights rely on."""
    named = word_level(eos_token="</s>", bos_token="<s>")
    assert tokenizer.Tokenizer(named).prefix == ()
    written = word_level(eos_token="</s>", bos_token="<s>")
    written.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    found = tokenizer.Tokenizer(written)
    assert found.prefix == (1,) and found.suffix == ()
    assert found.encode("a b") == [4, 5]


def test_a_bert_frames_its_texts():
    """Bug: [SEP], which ends what an encoder reads, is lost, or its want of an eos is an error."""
    bert = word_level(cls_token="<s>", sep_token="</s>", pad_token="a")
    bert.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    found = tokenizer.Tokenizer(bert)
    assert (found.prefix, found.suffix, found.eos) == ((1,), (2,), 2)


def test_a_file_that_asks_for_padding_frames_no_text_with_it():
    """Bug: MiniLM's tokenizer.json pads to 128, so that 125 paddings end every passage."""
    bert = word_level(cls_token="<s>", sep_token="</s>", pad_token="<mine>")
    bert.backend_tokenizer.enable_padding(length=12, pad_id=3, pad_token="<mine>")
    bert.backend_tokenizer.enable_truncation(2)
    found = tokenizer.Tokenizer(bert)
    assert (found.prefix, found.suffix) == ((), ()) and found.encode("a b a") == [4, 5, 4]


def test_the_papers_checkpoints_are_read_by_their_layout():
    """Bug: beside a plain Llama 2 tokenizer the released rows for [Cs], [Ce] and [Ret] are taken
    for one another, or start anew."""
    words = ["<unk>", "<s>", "</s>", "a", *(f"w{i}" for i in range(31996))]
    backend = Backend(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    llama2 = lambda: PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    found = tokenizer.Tokenizer(llama2(), weight_rows=32004)
    assert (found.pad, found.cs, found.ce, found.ret) == (32000, 32001, 32002, 32003)
    assert found.pretrained_size == found.emb == 32004
    assert tokenizer.Tokenizer(llama2(), weight_rows=32000).pretrained_size == 32000


def test_ids_that_are_left_out_are_refused():
    """Bug: [Cs] gets the id of an entry beyond a hole in the vocabulary: one row for both."""
    words = {"<unk>": 0, "</s>": 1, "a": 2, "b": 4}
    backend = Backend(models.WordLevel(words, "<unk>"))
    with pytest.raises(UserError, match="has 4 entries, the last one 4"):
        tokenizer.Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"))


def test_a_broken_tokenizer_is_one_line(trained, tmp_path):
    """Bugs: a list for a config is a traceback; a message that ends in the middle."""
    trained.save(tmp_path)
    whole = "give a directory that holds a whole tokenizer.json$"
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(UserError, match=f"cannot be loaded .*{whole}"):
        tokenizer.load(tmp_path)
    for file in tmp_path.iterdir():
        file.unlink()
    with pytest.raises(UserError, match=whole) as caught:
        tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value) and ":)" not in str(caught.value)


def test_save_replaces_another_tokenizer(trained, tmp_path):
    """A workdir that kept an older tokenizer would decode with the wrong vocabulary."""
    tokenizer.train(TEXTS, 280).save(tmp_path / "t")
    trained.save(tmp_path / "t")
    trained.save(tmp_path / "t")
    assert tokenizer.load(tmp_path / "t").fingerprint == trained.fingerprint
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


def test_missing_tokenizers_are_one_line(tmp_path, monkeypatch):
    """A typo in a path must not become a traceback or a minute of retries."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    (tmp_path / "empty").mkdir()
    for source in (tmp_path / "none", tmp_path / "empty", "./none", "nobody/nothing"):
        with pytest.raises(UserError) as caught:
            tokenizer.load(source)
        assert "\n" not in str(caught.value) and str(source) in str(caught.value)


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, trained):
    """Bug: an exception of Rust's, or an OSError, as a traceback; half a tokenizer that stays."""
    for free in (10, 1024):
        with full_disk(free), pytest.raises(UserError, match=r"cannot write .*: File too large"):
            trained.save(tmp_path / "here")
        assert not list(tmp_path.iterdir())
    for free in (10, 1024):
        with full_disk(free), pytest.raises(OSError, match="File too large"):
            trained.save_framed(tmp_path / str(free), [], 8, text_only=True)
