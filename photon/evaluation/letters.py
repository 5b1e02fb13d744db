"""Reads a choice from an answer, for benchmarks whose authors give no rule."""

import re

LETTER = re.compile(r"\s*\(?([A-Za-z])\s*(?:[.:)]|$)")


def choice_in(text, choices):
    """The choice that a text names, or `None`.

    The text is a choice, whatever its case and with or without a full stop; or it begins with a letter and one of
    ". : )", as in "B", "(b)" and "B. No", but not "A lesion".
    """
    words = {choice.casefold(): choice for choice in choices}  # choices may be words
    found = words.get(text.strip().removesuffix(".").casefold())
    if not found:
        match = LETTER.match(text)
        found = match[1].upper() if match else None
    return found if found in choices else None
