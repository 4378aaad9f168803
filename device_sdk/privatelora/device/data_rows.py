"""What a device owner has, as checked rows: `read_rows` turns lists, files and datasets into `Row`s.

From: the `local_data` of `DeviceSession.finetune` (Python objects or one local file). To: `data.load_examples`, which
turns each row into tokens. Everything here stays in this process, and no error quotes a row: it names the place
(`line 7 of notes.jsonl`), what is wrong there and what to do.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from privatelora.protocol.errors import DataError

_SHAPES = (
    'a row is a string, {"text": ...}, {"prompt": ..., "completion": ...} or '
    '{"messages": [{"role": ..., "content": ...}, ...]}'
)


@dataclass(frozen=True)
class TextRow:
    """Plain text, all of it to be learned."""

    where: str
    text: str


@dataclass(frozen=True)
class CompletionRow:
    """A prompt, and what should follow it, which alone is learned."""

    where: str
    prompt: str
    completion: str


@dataclass(frozen=True)
class ChatRow:
    """A conversation whose assistant answers are learned; each message has a string `role` and `content`."""

    where: str
    messages: tuple[dict[str, Any], ...]


Row = TextRow | CompletionRow | ChatRow

_COLUMNS: dict[type[TextRow] | type[CompletionRow] | type[ChatRow], tuple[str, ...]] = {
    TextRow: ("text",),
    CompletionRow: ("prompt", "completion"),
    ChatRow: ("messages",),
}
_NAMES = {TextRow: "plain text", CompletionRow: "a prompt with a completion", ChatRow: "a chat"}


def read_rows(local_data: object) -> Iterator[Row]:
    """Yield the rows of `local_data` in order, each checked; all must have the shape of the first.

    Raises
    ------
    DataError
        Unreadable or malformed files, unknown or mixed shapes, missing columns, values that are not text.
    """
    first: Row | None = None
    for where, value in _values(local_data):
        row = _row(where, value)
        first = first or row
        if type(row) is not type(first):
            raise DataError(
                f"{where} is {_NAMES[type(row)]}, but the rows before it are {_NAMES[type(first)]}; train on one shape "
                "at a time: convert the rows to one shape, or call finetune once for each"
            )
        yield row


def _values(local_data: object) -> Iterator[tuple[str, object]]:
    """Yield (where it stands, the row as found) from an object in memory or from the file that it names."""
    if isinstance(local_data, (str, os.PathLike)):
        yield from _file_values(local_data)
        return
    # These iterate over something other than rows (keys, column names, bytes, no fixed order) and would train on it.
    if isinstance(local_data, Mapping):
        raise DataError(
            "local_data is a mapping, not a list of rows: pass [row] for one row, or one split of a DatasetDict, "
            'such as data["train"]'
        )
    if isinstance(local_data, AbstractSet):
        raise DataError("local_data is a set, whose order changes from run to run: pass sorted(...) of it")
    if hasattr(local_data, "iterrows"):
        raise DataError('local_data is a data frame: pass frame.to_dict("records")')
    if isinstance(local_data, (bytes, bytearray)) or not isinstance(local_data, Iterable):
        raise DataError(
            f"local_data is of type {type(local_data).__name__}: pass a list of rows, a datasets.Dataset or the path "
            f"of a {_suffixes()} file; {_SHAPES}"
        )
    for number, value in enumerate(local_data, 1):
        yield f"row {number} of local_data (the first is 1)", value


def _row(where: str, value: object) -> Row:
    if isinstance(value, str):
        return TextRow(where, _filled(where, "text", value))
    if not isinstance(value, Mapping):
        raise DataError(f"{where} is of type {type(value).__name__}; {_SHAPES}")
    kinds = _kinds(value)
    if len(kinds) != 1:
        _refuse_columns(where, value, len(kinds))
    if kinds[0] is TextRow:
        return TextRow(where, _filled(where, "text", value["text"]))
    if kinds[0] is CompletionRow:
        completion = _filled(where, "completion", value["completion"])
        return CompletionRow(where, _string(where, "prompt", value["prompt"]), completion)
    return ChatRow(where, _messages(where, value["messages"]))


def _kinds(columns: Iterable[object]) -> list[type[TextRow] | type[CompletionRow] | type[ChatRow]]:
    """Return the kinds of row for which all columns are there."""
    found = set(columns)
    return [kind for kind, needed in _COLUMNS.items() if found.issuperset(needed)]


def _refuse_columns(where: str, columns: Iterable[object], kinds: int) -> NoReturn:
    # Only names that we know are quoted: of a file without a header, "column names" are somebody's text.
    known = [name for names in _COLUMNS.values() for name in names if name in set(columns)]
    if kinds:
        raise DataError(f"{where} has the columns of {kinds} shapes ({', '.join(known)}): keep those of one; {_SHAPES}")
    has = f"has {', '.join(known)} but" if known else "has none of the known columns and"
    raise DataError(f"{where} {has} lacks the columns of a complete shape: rename or add them; {_SHAPES}")


def checked_messages(where: str, value: object) -> tuple[dict[str, Any], ...]:
    """The messages of a chat, each with a string `role` and `content`; raises `DataError` naming the one without."""
    if not isinstance(value, (list, tuple)):
        raise DataError(
            f"messages in {where} is of type {type(value).__name__}, not a list of messages: a CSV file cannot hold "
            "one, use JSONL or Parquet"
        )
    messages = []
    for number, message in enumerate(value, 1):
        place = f"message {number} of {where}"
        if not isinstance(message, Mapping):
            raise DataError(f'{place} is of type {type(message).__name__}, not {{"role": ..., "content": ...}}')
        missing = [key for key in ("role", "content") if key not in message]
        if missing:
            raise DataError(f"{place} lacks {' and '.join(missing)}: add it, every message needs a role and a content")
        _filled(place, "role", message["role"])
        _string(place, "content", message["content"])
        messages.append(dict(message))
    return tuple(messages)


def _messages(where: str, value: object) -> tuple[dict[str, Any], ...]:
    messages = checked_messages(where, value)
    if not any(message["role"] == "assistant" and message["content"].strip() for message in messages):
        raise DataError(
            f"{where} has no assistant message with content, so there is nothing to train on: add the answer as "
            '{"role": "assistant", "content": ...} or leave the row out'
        )
    return messages


def _filled(where: str, column: str, value: object) -> str:
    text = _string(where, column, value)
    if not text.strip():
        raise DataError(f"{column} in {where} is empty, so it teaches nothing: fill it in or leave the row out")
    return text


def _string(where: str, column: str, value: object) -> str:
    if not isinstance(value, str):
        raise DataError(f"{column} in {where} is of type {type(value).__name__}, not a string: convert it to text")
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, as a careless JSON writer leaves it; no tokenizer takes it
        raise DataError(f"{column} in {where} holds a lone surrogate: write it again as UTF-8") from None
    return value


# Files. Each reader yields (where, value) and reports the line on which the file goes wrong.


def _file_values(name: str | os.PathLike[str]) -> Iterator[tuple[str, object]]:
    path = Path(os.fsdecode(name))
    if not os.path.exists(path):
        # A string might be somebody's text, so it is not quoted; an os.PathLike is a path for certain.
        if not isinstance(name, str):
            raise DataError(f"there is no file {path}: check the path (relative paths start at {Path.cwd()})")
        if path.suffix.lower() in _READERS:
            raise DataError(
                f"local_data is a string that ends in {path.suffix.lower()}, but there is no file of that name: check "
                f"the path (relative paths start at {Path.cwd()}), or pass [text] if it is text to train on"
            )
        raise DataError(
            "local_data is one string and no file has that name: pass [text] to train on one text, or the path of a "
            f"{_suffixes()} file"
        )
    if path.is_dir():
        raise DataError(f"{path} is a folder: pass one {_suffixes()} file, or datasets.load_from_disk(...) of it")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path} has a suffix that is not known: it must end in {_suffixes()}")
    try:
        yield from reader(path)
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror or type(error).__name__}; check that this user may read it"
        ) from error


def _read_jsonl(path: Path) -> Iterator[tuple[str, object]]:
    # Not str.splitlines: JSON strings may hold U+2028 and other characters that it takes for the end of a line.
    for number, line in enumerate(_text_of(path).split("\n"), 1):
        if line.strip():
            yield f"line {number} of {path.name}", _parse_json(line, path, number, "one JSON value a line")


def _read_json(path: Path) -> Iterator[tuple[str, object]]:
    values = _parse_json(_text_of(path), path, 1, "one list of rows; a file with one object a line is named .jsonl")
    if not isinstance(values, list):
        raise DataError(f"{path.name} holds one {type(values).__name__}: make it one list of rows, [row, row, ...]")
    for number, value in enumerate(values, 1):
        yield f"row {number} of {path.name} (the first is 1)", value


def _parse_json(text: str, path: Path, first_line: int, expected: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        line, reason = first_line, type(error).__name__
        if isinstance(error, json.JSONDecodeError):
            line, reason = first_line + error.lineno - 1, error.msg  # `msg` is json's own words, never the text
        # `from None`: the original error carries the whole text.
        raise DataError(f"line {line} of {path.name} is not JSON ({reason}): repair it; expected {expected}") from None


def _read_csv(path: Path) -> Iterator[tuple[str, object]]:
    text = _text_of(path)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    records: list[tuple[int, list[str]]] = []  # (line on which the record starts, fields)
    line = 1
    limit = csv.field_size_limit(len(text) + 1)  # 128 KiB by default, but long rows are split later
    try:
        for fields in reader:
            if len(fields) > 1 or any(field.strip() for field in fields):
                records.append((line, fields))
            line = reader.line_num + 1
    except csv.Error:
        raise DataError(
            f"line {line} of {path.name} is not CSV: separate fields by commas, put quotes around a field that holds "
            "commas, quotes or line ends, and double every quote inside it"
        ) from None
    finally:
        csv.field_size_limit(limit)
    if not records:
        return
    header_line, header = records[0]
    header = [name.strip() for name in header]
    if len(_kinds(header)) != 1:
        _refuse_columns(f"the header (line {header_line}) of {path.name}", header, len(_kinds(header)))
    if any(header.count(name) > 1 for names in _COLUMNS.values() for name in names):
        raise DataError(f"the header (line {header_line}) of {path.name} names a column twice: rename one of the two")
    for line, fields in records[1:]:
        if len(fields) != len(header):
            raise DataError(
                f"line {line} of {path.name} has {len(fields)} fields and the header {len(header)}: put quotes around "
                "a field that holds a comma"
            )
        yield f"line {line} of {path.name}", dict(zip(header, fields, strict=True))


def _read_parquet(path: Path) -> Iterator[tuple[str, object]]:
    import pyarrow as pa  # here: 0.3 s that other data need not pay
    import pyarrow.parquet as pq

    with path.open("rb") as file:
        try:
            values = pq.ParquetFile(file).read().to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{path.name} cannot be read as Parquet ({type(error).__name__}): write it again, or use JSONL"
            ) from None
    for number, value in enumerate(values, 1):
        yield f"row {number} of {path.name} (the first is 1)", value


def _read_paragraphs(path: Path) -> Iterator[tuple[str, object]]:
    text = _text_of(path).replace("\r\n", "\n")
    paragraphs = [part.strip("\n") for part in re.split(r"\n(?:[ \t]*\n)+", text) if part.strip()]
    for number, paragraph in enumerate(paragraphs, 1):
        yield f"paragraph {number} of {path.name}", paragraph


_READERS: dict[str, Callable[[Path], Iterator[tuple[str, object]]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_paragraphs,
}


def _suffixes() -> str:
    *most, last = _READERS
    return f"{', '.join(most)} or {last}"


def _text_of(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")  # spreadsheets put a byte-order mark first
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"line {line} of {path.name} is not UTF-8: save the file as UTF-8") from None
