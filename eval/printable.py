"""Texts of others, made safe to print."""


def printable(text: str) -> str:
    r"""Returns a text in which only what can be seen is left as it is.

    A model's or an endpoint's words can hold sequences that move a terminal's cursor, hide text or
    turn its direction around. Such characters, and line ends, are written as Python's escapes.

    Example:
      >>> print(printable("a\x1b[2Jb\n\u202ec é"))
      a\x1b[2Jb\n\u202ec é
    """
    return "".join(
        character if character.isprintable() else _escape(character) for character in text
    )


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
