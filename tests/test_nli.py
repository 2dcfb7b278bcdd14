"""Judges of entailment: what they are asked, what they answer, and that none passes for another."""

import os
from types import SimpleNamespace

import pytest
import transformers
from safetensors import SafetensorError

from cosup_jax.errors import UserError
from cosup_jax.evaluation import alce, nli, official
from cosup_jax.evaluation.nli import Containment, TransformersNli

SOME = "premise: hypothesis: Title: yes no red blue green 0 1 a b c d"
WORDS = SOME.split(" ")


def test_containment():
    """Bugs: order, case or articles that decide; a claim of nothing contained in everything."""
    judge = Containment()
    assert judge("Title: Ulm\nUlm lies on the Danube.", "the danube lies on Ulm")
    assert not judge("Ulm lies on the Danube.", "Ulm lies on the Rhine.")
    assert not judge("Ulm", "the ...")


def test_containment_is_never_taken_for_nli():
    """Bug: a score without NLI under the name of one with it."""
    docs = [{"id": 1, "title": "T", "text": "red"}]
    raw = "[Ret] T :: red [Cs] red [Ce]"
    one = {"question": "q", "output": "red [1]", "raw_output": raw, "docs": docs, "claims": ["red"]}
    one |= {"answers": ["red"], "answer": "red"}
    found = alce.alce_scores([one], "eli5", Containment())
    found |= official.official_scores([one], "kilt_nq", Containment())
    judged = {"citation_rec", "citation_prec", "claims_nli", "grounding", "grounding_gated"}
    assert not judged & set(found)
    assert {found["containment_" + name] for name in judged} == {100.0}
    by_function = alce.citation_scores([one], lambda premise, claim: True)
    assert by_function["citation_rec"] == 100.0


def test_each_pair_is_judged_once():
    """Bug: verdicts of one pair given to another where pairs repeat."""
    asked = []

    class Many:
        def many(self, pairs):
            asked.extend(pairs)
            return [claim == "b" for _, claim in pairs]

    pairs = [("p", "a"), ("p", "b"), ("p", "a")]
    assert nli.entailed(Many(), pairs) == {("p", "a"): False, ("p", "b"): True}
    assert asked == pairs[:2]


def test_no_model_is_one_line(tmp_path):
    """Bug: a traceback where the user's path is wrong."""
    with pytest.raises(UserError, match=r"the NLI model .*none cannot be read: ") as caught:
        TransformersNli(tmp_path / "none")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "says"), [(OSError(), "read: OSError;"), (SafetensorError("a\nb"), "read: a;")]
)
def test_whatever_cannot_be_read_is_one_line(tmp_path, monkeypatch, error, says):
    """Bugs: an error without a message, or one that only a damaged file of weights brings, as a
    traceback."""

    def fails(*args, **kwargs):
        raise error

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", fails)
    with pytest.raises(UserError, match=says):
        TransformersNli(tmp_path)


def test_files_of_a_model_have_a_version(tmp_path):
    """Bug: a judge that was trained again in its place keeps the verdicts of the old one."""
    path = tmp_path / "model.safetensors"
    path.write_text("1")
    os.utime(path, (1, 1))
    found = [nli.version_of(str(tmp_path), None)]
    assert found[0] == nli.version_of(str(tmp_path), None)
    os.utime(path, (1, 2))
    found.append(nli.version_of(str(tmp_path), None))
    (tmp_path / "config.json").write_text("{}")
    found.append(nli.version_of(str(tmp_path), None))
    found.append(nli.version_of("google/t5", SimpleNamespace(_commit_hash="abc")))
    assert len(set(found)) == 4 and found[3] == "abc"


def test_no_torch_is_one_line(tmp_path, monkeypatch):
    """Bug: an ImportError of transformers' in place of how to install what is missing."""
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    monkeypatch.setattr(nli.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs torch: pip install 'cosup_jax\[parity\]'"):
        TransformersNli(tmp_path)


def write_tokenizer(directory, pairs: bool, length: int):
    """One entry a word; pairs are read as BERT reads them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "</s>", "<unk>", "<s>"]
    vocab = {word: i for i, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [("<s>", 3), ("</s>", 1)]
    template = ("<s> $A </s>", "<s> $A </s> $B </s>") if pairs else ("$A </s>", "$A $B </s>")
    tokenizer.post_processor = processors.TemplateProcessing(*template, special_tokens=ends)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=length,
    ).save_pretrained(directory)
    return vocab


def random_pairs(count: int, most: int) -> list[tuple[str, str]]:
    import random

    rng = random.Random(0)
    text = lambda most: " ".join(rng.choices(WORDS[2:], k=rng.randint(1, most)))
    return [(text(most), text(4)) for _ in range(count)]


@pytest.mark.parity
def test_a_model_that_writes(tmp_path):
    """Bugs: another prompt than the mixture's; padding that reaches the verdict; "0" or "1 1" taken
    for yes. A tiny T5 is taught to write 1 where the hypothesis' first word is in the premise."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    torch.set_num_threads(1)  # more of them wait for one another longer than they work
    vocab = write_tokenizer(tmp_path, pairs=False, length=1000)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(vocab),
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=1,
        num_heads=4,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
        dropout_rate=0.0,
    )
    model = T5ForConditionalGeneration(config)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    pairs = random_pairs(64, 5)
    encode = lambda text: [vocab[word] for word in text.split(" ")] + [1]
    rows = [encode(f"premise: {p} hypothesis: {c}") for p, c in pairs]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    wanted = ["1" if c.split(" ")[0] in p.split(" ") else "0" for p, c in pairs]
    labels = torch.tensor([encode(word) for word in wanted])
    for _ in range(150):
        loss = model(input_ids=ids, attention_mask=(ids > 0).long(), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path)

    def alone(row):
        written = [0]
        while len(written) < 11 and written[-1] != 1:
            logits = model(
                input_ids=torch.tensor([row]), decoder_input_ids=torch.tensor([written])
            ).logits
            written.append(int(logits[0, -1].argmax()))
        return written[1:] == [vocab["1"], 1]

    judge = TransformersNli(tmp_path, batch_size=7)
    verdicts = judge.many(pairs)
    assert verdicts == [alone(row) for row in rows] and set(verdicts) == {True, False}
    assert sum(v == (w == "1") for v, w in zip(verdicts, wanted, strict=True)) > 56
    judge._judge = None  # from here on everything is remembered
    assert judge(*pairs[3]) == verdicts[3] and judge.many(pairs[:2] * 2) == verdicts[:2] * 2


def classifier(directory, labels, family="Bert", positions=16, seed=1):
    import torch

    vocab = write_tokenizer(directory, pairs=True, length=10**30)
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=len(vocab),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=positions,
        initializer_range=1.0,
        id2label=labels,
        label2id={label: i for i, label in labels.items()},
        pad_token_id=0,
    )
    model = getattr(transformers, f"{family}ForSequenceClassification")(config).eval()
    model.save_pretrained(directory)
    return model, vocab


@pytest.mark.parity
@pytest.mark.parametrize(
    ("family", "positions", "place", "seed"),
    [("Bert", 16, 1, 1), ("Bert", 16, 0, 1), ("Bert", 16, 2, 2), ("Roberta", 17, 2, 1)],
)
def test_a_model_that_classifies(tmp_path, family, positions, place, seed):
    """Bugs: another label than entailment's, whose place differs from model to model; premise and
    claim swapped; padding that is read; the claim cut off where the premise is too long; positions
    that RoBERTa does not have, as its first follows that of padding."""
    import torch

    labels = ["contradiction", "neutral"]
    labels.insert(place, "ENTAILMENT")
    model, vocab = classifier(tmp_path, dict(enumerate(labels)), family, positions, seed)
    pairs = random_pairs(80, 18)

    def alone(premise, claim):
        premise, claim = ([vocab[word] for word in text.split(" ")] for text in (premise, claim))
        premise = premise[: 16 - 3 - len(claim)]
        ids = [3, *premise, 1, *claim, 1]
        kinds = torch.tensor([[0] * len(ids)])  # the tokenizer gives none, so BERT reads zeros
        logits = model(input_ids=torch.tensor([ids]), token_type_ids=kinds).logits
        return int(logits.argmax()) == place

    judge = TransformersNli(tmp_path, batch_size=7)
    verdicts = judge.many(pairs)
    assert verdicts == [alone(*pair) for pair in pairs] and set(verdicts) == {True, False}
    long = [len(f"{p} {c}".split(" ")) + 3 > 16 for p, c in pairs]
    assert judge.cut == sum(long) > 10


@pytest.mark.parity
def test_a_damaged_model_is_one_line(tmp_path):
    """Bug: a file that was cut off while it was copied, as a traceback."""
    classifier(tmp_path, {0: "entailment"})
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="cannot be read: Error while deserializing header"):
        TransformersNli(tmp_path)


@pytest.mark.parity
def test_a_model_without_entailment_is_refused(tmp_path):
    """Bug: a sentiment classifier that judges grounding."""
    classifier(tmp_path, {0: "good", 1: "bad"})
    with pytest.raises(UserError, match="no label called entailment, only good, bad"):
        TransformersNli(tmp_path)
