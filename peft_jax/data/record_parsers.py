"""Parses the text of a record of a file into a row."""

import csv
import io
import json
from collections.abc import Callable, Sequence

from peft_jax.data.bad_rows import BadRowError
from peft_jax.data.rows import Row, as_row


def parse_json(text: str) -> Row:
    """Parses a row from one line of JSON.

    Raises:
      BadRowError: The line is not JSON, or not an object.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise BadRowError("broken JSON", f"{error.msg} at column {error.colno}") from None
    except RecursionError:
        raise BadRowError("nested too deeply", "its brackets are nested too deeply") from None
    # Python limits the digits of a number.
    except ValueError as error:
        raise BadRowError("broken JSON", str(error)) from None
    return as_row(value)


def csv_parser(columns: Sequence[str], delimiter: str, *, quoting: bool) -> Callable[[str], Row]:
    """Returns a parser of csv or tsv records.

    Args:
      columns: Names of the columns, in order.
      delimiter: Character between fields.
      quoting: Whether double quotes enclose fields.

    Returns:
      A function from a record's text to its row. It raises `BadRowError` if the record has another
      number of fields, or a quote does not close.
    """

    def parse(text: str) -> Row:
        fields = split_record(text, delimiter, quoting=quoting)
        if len(fields) != len(columns):
            raise BadRowError(
                "wrong number of columns",
                f"has {len(fields)}, must have {len(columns)} ({', '.join(columns)})",
            )
        return dict(zip(columns, fields, strict=True))

    return parse


def split_record(text: str, delimiter: str, *, quoting: bool) -> list[str]:
    """Splits one csv or tsv record into fields.

    Raises:
      BadRowError: A quote does not close, or a carriage return is outside of quotes.

    Example:
      >>> split_record('a,"b, c"', ",", quoting=True)
      ['a', 'b, c']
      >>> split_record('"Well, he said', "|", quoting=False)
      ['"Well, he said']
    """
    if not quoting:
        return text.rstrip("\r").split(delimiter)
    try:
        # Lines must end as in `find_csv_records`; otherwise a carriage return would end the record.
        return next(csv.reader(io.StringIO(text, newline="\n"), delimiter=delimiter, strict=True))
    except csv.Error as error:
        detail, lines = str(error), text.count("\n") + 1
        if "new-line character" in detail:
            detail = (
                "a field without quotation marks has a carriage return; lines must end in a"
                " line feed"
            )
        elif lines > 1:
            detail += f"; the record has {lines:,} lines, so a quotation mark may not be closed"
        raise BadRowError("broken CSV", detail) from None
