"""Readers of text formats: files in, Arrow tables with line numbers out, a few MB at a time."""

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa

from sma_fast.training.data.errors import DataError
from sma_fast.training.data.lines import Lines
from sma_fast.training.data.rows import FILE, LINE

ROWS = 8192  # of a chunk, unless these are more than
BYTES = 1 << 24  # of the file
_WIDEST = 1 << 27  # bytes of a CSV cell

Record = tuple[int, Sequence]  # line, cells


def read_csv(path: Path, columns: Sequence[str] | None, delimiter: str = ",") -> Iterator[pa.Table]:
    """Returns the rows of a CSV file, every cell a string as it stands there ("NA" too).

    Args:
        path: the file. Blank lines are skipped.
        columns: names where the file has no header. Default: its first line.
        delimiter: between cells.

    Returns:
        Tables with the line a row begins on.

    Raises:
        DataError: for a row with more or fewer cells than the header, and quotes left open.
    """
    lines = Lines(path)
    records = _csv_records(lines, delimiter)
    if columns is None:
        number, columns = next(records, (0, None))
        if columns is None:
            return
        check_names(columns, lines.place(number))
    yield from _chunks(lines, _same_width(lines, records, columns), lambda: columns)


def _csv_records(lines: Lines, delimiter: str) -> Iterator[Record]:
    reader = csv.reader(iter(lines), delimiter=delimiter, strict=True)
    while True:
        begins = reader.line_num + 1
        limit = csv.field_size_limit(_WIDEST)
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(
                f"{lines.place(begins)}: got a malformed row ({error}), allowed are cells with "
                f"{delimiter!r} between them and quotes in pairs; mend the row"
            ) from error
        finally:
            csv.field_size_limit(limit)
        if cells:
            yield begins, cells


def _same_width(lines: Lines, records: Iterable[Record], columns: Sequence[str]):
    width = len(columns)
    for number, cells in records:
        if len(cells) != width:
            raise DataError(
                f"{lines.place(number)}: got {len(cells)} cells, allowed is {width} "
                f"({', '.join(columns)}); mend the row, or quote cells that hold the delimiter"
            )
        yield number, cells


def read_tsv(path: Path, columns: Sequence[str] | None) -> Iterator[pa.Table]:
    """Returns the rows of a TSV file: as `read_csv`, with tabs."""
    return read_csv(path, columns, "\t")


def read_text(path: Path, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """Returns the lines of a text file as column "text"; blank ones are skipped.

    Args:
        path: the file.
        columns: another name of the column, as a list of one.

    Returns:
        Tables with line numbers.
    """
    lines = Lines(path)
    stripped = (line.rstrip("\r\n") for line in lines)
    records = ((lines.number, (line,)) for line in stripped if line.strip())
    yield from _chunks(lines, records, lambda: columns or ("text",))


def read_smi(path: Path, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """Returns columns "smiles" and "name" of a .smi file; a missing name is "".

    Args:
        path: lines with a SMILES and, behind white space, a name.
        columns: other names of the two.

    Returns:
        Tables with line numbers.
    """
    lines = Lines(path)
    parts = (line.strip().split(None, 1) for line in lines)
    records = ((lines.number, (p[0], p[1] if len(p) > 1 else "")) for p in parts if p)
    yield from _chunks(lines, records, lambda: columns or ("smiles", "name"))


def read_fasta(path: Path, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """Returns columns "sequence" and "header" of a FASTA file.

    Args:
        path: records of a line that begins with ">" and lines of a sequence.
        columns: other names of the two.

    Returns:
        Tables with the line of a record's header.

    Raises:
        DataError: for a sequence without a header before it, or a header without one behind it.
    """
    lines = Lines(path)
    yield from _chunks(lines, _fasta_records(lines), lambda: columns or ("sequence", "header"))


def _fasta_records(lines: Lines) -> Iterator[Record]:
    header, begins, parts = None, 0, []
    for line in lines:
        line = line.strip()
        if line.startswith(">"):
            if header is not None:
                yield _fasta_record(lines, begins, header, parts)
            header, begins, parts = line[1:].strip(), lines.number, []
        elif line and header is None:
            raise DataError(
                f"{lines.place()}: got {line[:20]!r} before any header, allowed is a line that "
                'begins with ">" first; add headers, or open it with format="text"'
            )
        elif line:
            parts.append("".join(line.split()))
    if header is not None:
        yield _fasta_record(lines, begins, header, parts)


def _fasta_record(lines: Lines, begins: int, header: str, parts: list[str]) -> Record:
    if not parts:
        raise DataError(
            f"{lines.place(begins)}: got header {header!r} without a sequence, allowed is at "
            "least one line of it; remove the header or add the sequence"
        )
    return begins, ("".join(parts), header)


def read_jsonl(path: Path, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """Returns the objects of a JSON lines file, numbers as they are written, as strings.

    Args:
        path: an object a line, of strings, numbers, booleans (1 and 0), null and flat lists, all
            with the keys of the first.
        columns: must be None, the keys are the names.

    Returns:
        Tables with line numbers.

    Raises:
        DataError: for a line that is no such object.
    """
    lines = Lines(path)
    if columns is not None:
        raise DataError(f"{path}: got columns={list(columns)!r}, allowed is None for JSON lines")
    names: list[str] = []
    lists: dict[str, bool] = {}  # whether a column holds lists, once that is known
    records = _json_records(lines, names, lists)
    yield from _chunks(lines, records, lambda: names, lambda name: lists.get(name, False))


def _json_records(lines: Lines, names: list[str], lists: dict[str, bool]) -> Iterator[Record]:
    for line in lines:
        if not line.strip():
            continue
        try:
            row = json.loads(line, parse_int=str, parse_float=str, parse_constant=str)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{lines.place()}: got no JSON ({error.msg} at position {error.pos + 1}), allowed "
                "is one object a line; mend the line"
            ) from error
        if not isinstance(row, dict):
            raise DataError(
                f"{lines.place()}: got {line.strip()[:20]!r}, allowed is one object a line, such "
                'as {"seq": "MK", "label": 1}'
            )
        if not names:
            check_names(list(row), lines.place())
            names += row
        if set(row) != set(names):
            raise DataError(
                f"{lines.place()}: got keys {', '.join(row)}, allowed is {', '.join(names)} as in "
                "the first line; write null where there is no value"
            )
        yield lines.number, [_json_cell(lines, lists, name, row[name]) for name in names]


def _json_cell(lines: Lines, lists: dict[str, bool], name: str, value):
    if value is None:
        return None
    flat = value if isinstance(value, list) else [value]
    ok = all(isinstance(v, str | bool) for v in flat)
    if not ok or lists.setdefault(name, isinstance(value, list)) != isinstance(value, list):
        kind = {True: "a flat list", False: "a string or number"}.get(lists.get(name), "a value")
        raise DataError(
            f"{lines.place()}, key {name!r}: got {str(value)[:30]}, allowed is {kind} or null, as "
            "in the lines before; make all lines alike"
        )
    flat = [str(int(v)) if isinstance(v, bool) else v for v in flat]
    return flat if isinstance(value, list) else flat[0]


def _chunks(
    lines: Lines,
    records: Iterable[Record],
    names: Callable[[], Sequence[str]],
    is_list: Callable[[str], bool] = lambda name: False,
) -> Iterator[pa.Table]:
    numbers, cells, begins = [], [], 0
    for number, row in records:
        numbers.append(number)
        cells.append(row)
        if len(cells) >= ROWS or lines.bytes - begins >= BYTES:
            yield _table(lines, names(), is_list, numbers, cells)
            numbers, cells, begins = [], [], lines.bytes
    if cells:
        yield _table(lines, names(), is_list, numbers, cells)


def _table(lines, names, is_list, numbers, cells) -> pa.Table:
    if len(names) != len(cells[0]):
        raise DataError(
            f"{lines.path}: got {len(names)} names of columns, allowed is {len(cells[0])}"
        )
    columns = {}
    for name, column in zip(names, zip(*cells, strict=True), strict=True):
        kind = pa.list_(pa.string()) if is_list(name) else pa.string()
        columns[name] = pa.array(column, kind)
    return pa.table(columns | {LINE: pa.array(numbers, pa.int64())})


def check_names(names: Sequence[str], place: str) -> None:
    """Raises DataError unless columns have names, each its own.

    Args:
        names: of the columns.
        place: of the header, for the message.

    Raises:
        DataError: for an empty, doubled or reserved name.
    """
    for name in names:
        if not name.strip() or name in (FILE, LINE) or list(names).count(name) > 1:
            raise DataError(
                f"{place}: got column name {name!r} in {', '.join(names)}, allowed are names that "
                f"are not empty, not doubled and not {FILE} or {LINE}; mend the header, or give "
                "columns=[...] where there is none"
            )
