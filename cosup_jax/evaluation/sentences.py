"""Sentences as NLTK's English Punkt splits them, with nothing downloaded."""

import functools

import punkt  # NLTK's data as a package; its own splitter treats "?!" and ". . ." otherwise
from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer


def sentences(text: str) -> list[str]:
    """The text's sentences, without the white space between them; of a blank text none.

    What `nltk.sent_tokenize` gives: a citation after the full stop opens the next sentence.
    """
    return _tokenizer().tokenize(text)


@functools.cache
def _tokenizer() -> PunktSentenceTokenizer:
    model, parameters = punkt.load_model("english"), PunktParameters()
    parameters.abbrev_types = set(model.abbrev_types)
    parameters.collocations = set(model.collocations)
    parameters.sent_starters = set(model.sent_starters)
    parameters.ortho_context.update({word: int(seen) for word, seen in model.ortho_context.items()})
    return PunktSentenceTokenizer(parameters)
