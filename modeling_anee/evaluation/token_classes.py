"""What kind of token each one of a text is, told from its letters and from the token before it alone.

For English: which words are function words is a list, and a capital letter means a name only where no sentence may begin. Of a
word of several tokens the first counts as the word, the others are word pieces.
"""

from collections.abc import Sequence


FUNCTION, WORD, NAME, PIECE = "function word", "other word", "name", "word piece"
NUMBER, PUNCTUATION, SPACE = "number", "punctuation", "whitespace"
CLASSES = (FUNCTION, WORD, NAME, PIECE, NUMBER, PUNCTUATION, SPACE)

# Articles, pronouns, prepositions, conjunctions, auxiliaries, and what tokenizers leave of contractions.
FUNCTION_WORDS = frozenset(
    """
    a an the this that these those each every either neither some any no none all both half such what which whose whatever
    i me my mine myself we us our ours ourselves you your yours yourself yourselves he him his himself she her hers herself
    it its itself they them their theirs themselves who whom whoever one ones someone anyone everyone nobody somebody anybody
    everybody something anything everything nothing there here
    about above across after against along among around as at before behind below beneath beside besides between beyond but by
    despite down during except for from in inside into like near of off on onto out outside over past per since than through
    throughout till to toward towards under underneath until up upon via with within without
    and or nor so yet if because although though unless whereas whether while when where why how
    am is are was were be been being have has had having do does did doing done will would shall should can could may might must
    ought cannot not
    's 're 've 'll 'd 'm 't don didn doesn isn aren wasn weren hasn haven hadn won wouldn shouldn couldn mustn ain
    also just only even very too then again once more most less least much many few other another own same
    """.split()
)
CONTRACTED = frozenset({"s", "t", "re", "ve", "ll", "d", "m"})  # after an apostrophe that is a token of its own
APOSTROPHES = ("'", "’")
# After these a sentence, a heading or an entry may begin, with a capital whatever the word.
OPENERS = frozenset('.!?:;…"“”‘«»=*#•>|')


def token_class(text: str, previous: str) -> str:
    """One of `CLASSES` for what a token adds to a text; `previous` is the same of the token before it, empty at the start.

    A token with nothing that can be read, such as some bytes of a character, is a word piece.
    """
    core = text.strip().replace("\ufffd", "")
    if not core:
        return SPACE if text.isspace() else PIECE
    if any(character.isnumeric() for character in core):
        return NUMBER
    if not any(character.isalpha() for character in core):
        return PUNCTUATION
    if text[0].isalpha() and (previous[-1:].isalpha() or previous.endswith("\ufffd")):
        return PIECE
    return _word_class(core, previous.strip())


def token_classes(texts: Sequence[str]) -> list[str]:
    """The class of each token of a text, from what each adds to it (`token_texts`)."""
    return [token_class(text, previous) for text, previous in zip(texts, ["", *texts], strict=False)]


def _word_class(core: str, before: str) -> str:
    """The class of a word, by what stands before it."""
    spelled, letters = core.lower().replace("’", "'"), "".join(filter(str.isalpha, core))
    contracted = spelled in CONTRACTED and before.endswith(APOSTROPHES)
    if contracted or spelled in FUNCTION_WORDS or spelled.lstrip("'\"(") in FUNCTION_WORDS:
        return FUNCTION
    if not letters[0].isupper():
        return WORD
    may_begin = not before or before[-1] in OPENERS
    return NAME if not may_begin or (len(letters) > 1 and letters.isupper()) else WORD
