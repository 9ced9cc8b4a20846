"""Text of others, made safe to show on a terminal."""


def printable(text: str, *, keep: str = "\n\t") -> str:
    r"""Returns a text with unprintable characters replaced by Python escapes.

    Text from a data set, a model or an endpoint can contain sequences that move a terminal's
    cursor, hide text or reverse its direction.

    Args:
      text: Text to escape.
      keep: Characters that are not escaped.

    Example:
      >>> print(printable("a\x1b[2Jb\n\u202ec é", keep=""))
      a\x1b[2Jb\n\u202ec é
    """
    return "".join(
        character
        if character.isprintable() or character in keep
        else character.encode("unicode_escape").decode("ascii")
        for character in text
    )
