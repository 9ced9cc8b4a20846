r"""Prints every setting of a run, with its type, its default and its meaning.

    peft-jax settings                  # all of them
    peft-jax settings train method     # some sections
    peft-jax settings train.epochs     # one setting
    peft-jax settings --json           # for programs
    peft-jax settings --markdown       # the documentation's page

The settings are those of the installed version, and include the methods of other packages.
"""

import dataclasses
import json
import shutil
import sys
import textwrap
from collections.abc import Sequence

from peft_jax.core import did_you_mean
from peft_jax.runtime import exits
from peft_jax.runtime.flags import Arguments
from peft_jax.training.settings_reference import (
    Section,
    settings_reference,
    to_json,
    to_markdown,
)


def select(sections: Sequence[Section], names: Sequence[str]) -> list[Section]:
    """Returns the named sections and settings, in the order of `sections`.

    Args:
      sections: All sections.
      names: Names of sections, which include those inside them, or of settings; empty for all.

    Raises:
      ValueError: A name is neither a section's nor a setting's.
    """
    known = [section.name for section in sections if section.name]
    known += [one.name for section in sections for one in section.settings]
    for name in names:
        if name not in known:
            raise ValueError(f"{name!r} is no section and no setting{did_you_mean(name, known)}")
    chosen = []
    for section in sections:
        settings = tuple(
            one
            for one in section.settings
            if not names
            or any(one.name == name or one.name.startswith(f"{name}.") for name in names)
        )
        if settings:
            chosen.append(dataclasses.replace(section, settings=settings))
    return chosen


def to_text(sections: Sequence[Section], width: int) -> str:
    """Formats the settings as text, wrapped between words.

    Args:
      sections: Sections to format.
      width: Number of columns.
    """
    blocks = []
    for section in sections:
        blocks.append(textwrap.fill(f"{section.name or 'all runs'}: {section.summary}", width))
        for one in section.settings:
            of = f"; methods: {', '.join(one.methods)}" if one.methods else ""
            head = f"--config.{one.name}: {one.type}; default: {one.default}{of}"
            blocks.append(
                textwrap.fill(head, width, initial_indent="  ", subsequent_indent="    ")
                + "\n"
                + textwrap.fill(
                    one.meaning, width, initial_indent="      ", subsequent_indent="      "
                )
            )
    return "\n\n".join(blocks)


@exits.command("peft_jax.settings")
def main(argv: Sequence[str] | None = None) -> None:
    """Prints the settings that the command line names.

    Args:
      argv: Command line without the program's name; None for that of this process.
    """
    parser = Arguments(
        "peft_jax.settings",
        description=__doc__,
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="sections or settings to print; all by default"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="print the documentation's page")
    form.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args(argv)
    sections = select(settings_reference(), given.names)
    if given.markdown:
        print(to_markdown(sections))
    elif given.json:
        print(json.dumps(to_json(sections), indent=2, ensure_ascii=False))
    else:
        print(to_text(sections, min(100, shutil.get_terminal_size().columns)))


if __name__ == "__main__":
    sys.exit(main())
