"""The training text, token by token."""

import dataclasses

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cosup_jax.data import markup, tokenizer
from cosup_jax.data.markup import EVIDENCE, PROMPT, TARGET
from cosup_jax.data.schema import Example, Passage
from cosup_jax.errors import UserError

PASSAGES = {
    "p": Passage("p", "Paris", "Paris lies on the Seine. It is big."),
    "q": Passage("q", "", "The Seine ends in Le Havre."),
}
QUESTION = Example("e", "open_qa", "Where is Paris?", ("France", "the Seine"), ("p",))
PROMPT_TEXT = "Answer the question.\n\n## Input:\n\nWhere is Paris?## Output:\n\n"


@pytest.fixture(scope="module")
def bpe():
    return tokenizer.train([p.text for p in PASSAGES.values()], 300)


def spelled(example, with_evidence=True):
    """The pieces as one string, control tokens by name."""
    found = markup.pieces(example, PASSAGES, with_evidence)
    return "".join(f"<{piece.control}>" if piece.control else piece.text for piece in found)


def test_answer_inside_the_one_passage_is_the_span():
    """An answer that is its own citation, written twice, teaches the model to repeat itself."""
    expected = "<ret>Paris :: Paris lies on the Seine. It is big.<cs>the Seine<ce><eos>"
    assert spelled(QUESTION) == PROMPT_TEXT + expected


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"answers": ("no",), "support": ((0, 24),)},
            "<ret>Paris :: Paris lies on the Seine. It is big.<cs>Paris lies on the Seine.<ce>no",
        ),
        (
            {"answers": ("no",)},
            "<ret>Paris :: Paris lies on the Seine. It is big.<cs>"
            "Paris lies on the Seine. It is big.<ce>no",
        ),
        (
            {"evidence": ("p", "q"), "support": ((25, 35), None)},
            "<ret>Paris :: Paris lies on the Seine. It is big.<cs>It is big.<ce>"
            "<ret>The Seine ends in Le Havre.<cs>The Seine ends in Le Havre.<ce>France",
        ),
        ({"long_answer": "On the Seine.", "evidence": ()}, "On the Seine."),
        ({"evidence": ()}, "France"),
        (
            {"output": "First [Ret:q]Le Havre[Ce], then [Ret:p][Cs]big[Ce]. [Ret]"},
            "First <ret>The Seine ends in Le Havre.<cs>Le Havre<ce>, then "
            "<ret>Paris :: Paris lies on the Seine. It is big.<cs>big<ce>. [Ret]",
        ),
        ({"output": "[Ret:q]all of it"}, "<ret>The Seine ends in Le Havre.<cs>all of it<ce>"),
    ],
)
def test_every_form_of_the_output(change, expected):
    """Each rule for the span, the repeated answer and `output` has its own way of going wrong."""
    assert spelled(dataclasses.replace(QUESTION, **change)) == f"{PROMPT_TEXT}{expected}<eos>"


def test_without_evidence_no_control_token_remains():
    """A share of examples is trained without retrieval; a stray [Ret] would undo that."""
    assert spelled(QUESTION, with_evidence=False) == f"{PROMPT_TEXT}France<eos>"
    cited = dataclasses.replace(QUESTION, output="A [Ret:q]b[Ce] c")
    assert spelled(cited, with_evidence=False) == f"{PROMPT_TEXT}A b c<eos>"
    glued = dataclasses.replace(QUESTION, output="[Ret:q]It is so.[Ce]Next[Ret:p]one[Ce], or two")
    assert spelled(glued, with_evidence=False) == f"{PROMPT_TEXT}It is so. Nextone, or two<eos>"


@pytest.mark.parametrize("output", ["[Ret:zzz]x[Ce]", "a [Ce] b", "[Ret:q]x[Ce] y[Ce]", "a [Cs]b"])
def test_malformed_output_is_refused(output):
    """A citation of nothing, or a [Ce] without its [Ret], would be trained as plain text."""
    with pytest.raises(UserError, match="example 'e'"):
        markup.pieces(dataclasses.replace(QUESTION, output=output), PASSAGES)


def test_roles_and_ret_positions(bpe):
    """A role off by one trains the prompt, or hides [Ret] from the loss."""
    (marked,) = markup.encode([markup.pieces(QUESTION, PASSAGES)], bpe, 100)
    prompt = bpe.encode(PROMPT_TEXT)
    passage = bpe.encode("Paris :: Paris lies on the Seine. It is big.")
    span = bpe.encode("the Seine")
    assert marked.tokens.tolist() == [
        *(*prompt, bpe.ret, *passage),
        *(bpe.cs, *span, bpe.ce, bpe.eos),
    ]
    assert marked.roles.tolist() == (
        [PROMPT] * len(prompt)
        + [TARGET]
        + [EVIDENCE] * (len(passage) + 1)
        + [TARGET] * (len(span) + 2)
    )
    assert marked.ret_positions.tolist() == [len(prompt)]
    assert marked.evidence == ["p"]


def test_generation_sees_what_training_saw(bpe):
    """A prompt or an inserted passage tokenised otherwise at inference is out of distribution."""
    (marked,) = markup.encode([markup.pieces(QUESTION, PASSAGES)], bpe, 5)
    prompt = markup.prompt(QUESTION, bpe)
    inserted = markup.insertion([PASSAGES["p"]], bpe, 5)
    assert len(inserted) == 6 and inserted[-1] == bpe.cs
    seen = [*prompt, bpe.ret, *inserted]
    assert marked.tokens[: len(seen)].tolist() == seen


@pytest.mark.parametrize(
    ("answer", "kind", "span"),
    [
        ("no", "", None),
        ("91", "", None),
        ("1914", "", "1914"),
        ("the north", "", "the north"),
        ("(so he says)", "", "(so he says)"),
        ("true", "label", None),
        ("true", "span", "true"),
        ("乌尔姆", "", "乌尔姆"),
        ("the North", "", "the north"),
        ("HE", "", None),
        ("c", "", None),
    ],
)
def test_an_answer_is_found_as_whole_words(answer, kind, span):
    """Bug: "no" is found in "north", "91" in "1914", a label anywhere, and the answer is then not
    written; or no answer is found in a script without blanks, or with a capital letter."""
    text = "He knows the north (so he says) since 1914, it is true: 他住在乌尔姆市. Tức."
    example = Example("e", "open_qa", "?", (answer,), ("n",), kind=kind)
    body = markup.pieces(example, {"n": Passage("n", "", text)})[4:]
    written = [piece.text or f"<{piece.control}>" for piece in body]
    whole = [text, "<ce>", answer, "<eos>"]
    assert written == ([span, "<ce>", "<eos>"] if span else whole)


def test_an_answer_as_it_is_goes_before_one_in_other_case():
    """Bug: the first answer, found in other letters of case, hides one that stands there."""
    find = lambda *answers: markup.find_answer(answers, "May we go to the Seine? We may.")
    assert find("the seine", "may") == "may" and find("the seine", "We") == "We"
    assert find("WE", "SEINE") == "" and find("river", "THE seine") == "the Seine"


def test_pooled_token_survives_the_cut(bpe):
    """Pooling reads the last token: cut away, a long passage would be pooled at a random word."""
    whole = bpe.encode("Paris :: Paris lies on the Seine. It is big.")
    for pooling, expected in (
        ("eos", [*whole[:7], bpe.eos]),
        ("token", [*whole[:7], bpe.emb]),
        ("pad", [*whole[:7], bpe.pad]),
        ("last", whole[:8]),
        ("mean", whole[:8]),
    ):
        ((cut, lost),) = markup.ctx_tokens([PASSAGES["p"]], bpe, pooling, 8)
        kept = 8 if pooling in ("last", "mean") else 7
        assert cut.tolist() == expected and lost == len(whole) - kept
    for pooling, token in (("eos", bpe.eos), ("token", bpe.emb)):
        ((uncut, none),) = markup.ctx_tokens([PASSAGES["p"]], bpe, pooling, 500)
        assert uncut.tolist() == [*whole, token] and none == 0
        with pytest.raises(UserError, match="max_ctx_tokens=1"):
            markup.ctx_tokens(PASSAGES.values(), bpe, pooling, 1)


@pytest.mark.parametrize("pooling", ["last", "eos", "token", "pad", "mean"])
def test_an_exported_tokenizer_reads_what_ctx_read(bpe, tmp_path, pooling):
    """Bugs: the token that is pooled is lost, or cut off; a text that spells out a control token
    becomes one, there and not here; the prompt is read apart from the text."""
    spelled = Passage("s", "A [Emb]", "one </s> two [Ret] <pad> and more, and more of it")
    ((tokens, cut),) = markup.ctx_tokens([spelled], bpe, pooling, 16, prompt="passage: ")
    bpe.save_framed(tmp_path, markup.ctx_tail(bpe, pooling), 16, text_only=True)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "passage: " + markup.passage_text(spelled)
    assert theirs(text, truncation=True)["input_ids"] == tokens.tolist() and cut
    whole = markup.ctx_tokens([spelled], bpe, pooling, 500, prompt="passage: ")[0][0]
    assert theirs(text)["input_ids"] == whole.tolist()


def test_a_text_ends_as_its_tokenizer_ends_one():
    """Bug: last reads the token before a BERT's [SEP], where sentence-transformers reads [SEP]."""
    words = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "ulm": 3}
    backend = Backend(models.WordLevel(words, "[UNK]"))
    frame = [("[CLS]", 1), ("[SEP]", 2)]
    backend.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, frame)
    names = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[UNK]"}
    bert = tokenizer.Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, **names))
    for pooling in ("last", "cls", "mean", "eos"):
        ((ids, _),) = markup.ctx_tokens([Passage("u", "", "ulm")], bert, pooling, 8)
        assert ids.tolist() == [1, 3, 2]
    ((ids, _),) = markup.ctx_tokens([Passage("u", "", "ulm")], bert, "token", 8)
    assert ids.tolist() == [1, 3, bert.emb]


def test_emb_in_a_passage_is_text(bpe):
    """A passage that spells out "[Emb]" would look like one that ends there."""
    spelled_out = Passage("s", "", "one [Emb] two[Emb]")
    ((tokens, _),) = markup.ctx_tokens([spelled_out], bpe, "token", 500)
    assert np.flatnonzero(tokens == bpe.emb).tolist() == [len(tokens) - 1]
    assert bpe.decode(tokens[:-1]) == "one [Emb] two[Emb]"
