"""Rows of problem sets in the formats they come in, one at a time, each with the place to name when it is of no use.

A source is a file, a folder or a hub dataset; what exists here comes first:

    train.jsonl  train.json  train.csv  train.tsv  train.parquet  train.arrow
    DIR  DIR:SPLIT          written by `datasets.save_to_disk`; or a folder of such files, as a snapshot of the hub is
    ORG/NAME  ORG/NAME:SPLIT  ORG/NAME:CONFIG:SPLIT       from the hub, through the `datasets` library

In a folder `.json` files are metadata.
No format here can hold code: pickles are not read, and `datasets` runs no scripts.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tic_megatron.config import DATA_SUFFIXES, HUB_DATASET, SettingsError, find_local

if TYPE_CHECKING:  # half a second to import, and JSONL needs neither
    import datasets
    import pyarrow

BATCH_ROWS = 1024
ADVICE = f"give a file ({', '.join(DATA_SUFFIXES)}), a folder of them, or the name of a hub dataset (ORG/NAME)"


@dataclass(frozen=True)
class Row:
    """One row: its fields, the place to name (`train.jsonl:17`, `train.parquet: row 17`), and its file and number, from 1 (that
    of its line in formats of lines)."""

    fields: dict[str, Any]
    where: str
    file: str
    number: int


@dataclass(frozen=True)
class Source:
    """A source that was found: `read` yields its rows; `files` are what it consists of, for checksums (of a hub dataset: as the
    `datasets` library has stored it); `revision` is a hub dataset's, as that library names it."""

    name: str
    read: Callable[[], Iterator[Row]]
    files: tuple[Path, ...]
    revision: str | None = None

    def checksums(self) -> list[dict[str, Any]]:
        """Name, size in bytes and SHA-256 of every file."""
        return [
            {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)} for path in self.files if path.is_file()
        ]


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_rows(source: str | Path, setting: str = "data.train") -> Iterator[Row]:
    """The rows of a source (see the module). SettingsError, naming `setting` or the row, for what cannot be read."""
    return open_source(source, setting).read()


def open_source(source: str | Path, setting: str) -> Source:
    """Find a source; a hub dataset is downloaded. SettingsError where there is none, or where a split must be chosen."""
    source = str(source)
    path, split = find_local(source), None
    if path is None and ":" in source:
        path, split = find_local(source.rpartition(":")[0]), source.rpartition(":")[2]
    if path is not None:
        if path.is_dir():
            return _open_folder(path, split, setting)
        if split is not None:
            raise SettingsError(f"{setting}: {path} is a file, which has no split {split!r}; leave the split out")
        return _open_files((path,), source, setting)
    if HUB_DATASET.fullmatch(source) and not source.endswith(DATA_SUFFIXES):
        return _open_hub(source, setting)
    raise SettingsError(f"{setting}: {source} cannot be read (No such file or directory); {ADVICE}")


def _open_files(paths: tuple[Path, ...], name: str, setting: str) -> Source:
    for path in paths:
        if path.suffix not in DATA_SUFFIXES:
            raise SettingsError(f"{setting}: {path} is in no format that can be read; {ADVICE}")

    def read() -> Iterator[Row]:
        for path in paths:
            try:
                yield from _READERS[path.suffix](path, setting)
            except OSError as error:  # pyarrow's errors too
                raise SettingsError(f"{setting}: {path} cannot be read ({_reason(error)}); give a file that can") from error

    return Source(name, read, paths)


# Folders ---------------------------------------------------------------------------------------------------------------------

SHARDS = tuple(suffix for suffix in DATA_SUFFIXES if suffix != ".json")
SPLIT_NAME = re.compile(r"(?<![a-z])(train|test|validation|valid|dev|eval)(?![a-z])", re.IGNORECASE)


def _open_folder(path: Path, split: str | None, setting: str) -> Source:
    if (path / "dataset_dict.json").exists():
        splits = sorted(entry.parent.name for entry in path.glob("*/state.json"))
        if not splits:
            raise SettingsError(
                f"{setting}: {path} has a dataset_dict.json, but no data set beside it; save it again, or {ADVICE}"
            )
        return _open_saved(path / _choose(split, splits, path, setting), f"{path}", setting)
    if (path / "state.json").exists():
        if split is not None:
            raise SettingsError(f"{setting}: {path} is one data set, without a split {split!r}; leave the split out")
        return _open_saved(path, f"{path}", setting)
    shards = sorted(entry for entry in path.rglob("*") if entry.suffix in SHARDS and not _hidden(entry.relative_to(path)))
    if not shards:
        raise SettingsError(f"{setting}: {path} is a folder without any {', '.join(SHARDS)} file; {ADVICE}")
    by_split: dict[str, list[Path]] = {}
    for shard in shards:
        names = SPLIT_NAME.findall(str(shard.relative_to(path)))
        by_split.setdefault(names[-1].lower() if names else "", []).append(shard)
    if split is not None or len(by_split) > 1:
        shards = by_split[_choose(split, sorted(by_split), path, setting)]
    if len({shard.suffix for shard in shards}) > 1:
        raise SettingsError(
            f"{setting}: {path} holds files of several formats ({shards[0].name}, {shards[-1].name}); give one of them"
        )
    return _open_files(tuple(shards), f"{path}", setting)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _choose(split: str | None, splits: list[str], place: object, setting: str) -> str:
    names = ", ".join(name or "(files without one)" for name in splits)
    if split is None and len(splits) == 1:
        return splits[0]
    if split is None:
        raise SettingsError(f"{setting}: {place} has the splits {names}; give one of them, such as {place}:{splits[-1]}")
    if split not in splits:
        raise SettingsError(f"{setting}: {place} has no split {split!r}; give one that it has: {names}")
    return split


def _open_saved(path: Path, name: str, setting: str) -> Source:
    """What `datasets.save_to_disk` has written."""
    import datasets

    try:
        data = datasets.load_from_disk(str(path))
    except Exception as error:  # of all kinds, for damaged files
        raise SettingsError(
            f"{setting}: {path} cannot be read as a data set that was saved to disk ({_reason(error)}); save it again"
        ) from error
    return _of_dataset(data, name, str(path), hub=False)


# The hub ---------------------------------------------------------------------------------------------------------------------


def _open_hub(source: str, setting: str) -> Source:
    import datasets

    name, *rest = source.split(":")
    config, split = (rest[0], rest[1]) if len(rest) == 2 else (None, rest[0] if rest else None)
    try:
        data = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # network, absent, private, unknown split or configuration, damaged, several configurations
        raise SettingsError(
            f"{setting}: there is no file or folder {source} here, and the hub dataset {name} cannot be had "
            f"({_hub_reason(error)}); give a file, or ORG/NAME[:SPLIT] or ORG/NAME:CONFIG:SPLIT of a dataset that can"
        ) from error
    if isinstance(data, datasets.DatasetDict):
        split = _choose(None, sorted(data), name, setting)
        data = data[split]
    return _of_dataset(data, source, source, hub=True)


def _hub_reason(error: Exception) -> str:
    text = f"{type(error).__name__} {error}"
    unreachable = re.search("connect|offline|timeout|reach", text, re.IGNORECASE) and not isinstance(error, FileNotFoundError)
    return "the hub does not answer" if unreachable else _reason(error)


def _of_dataset(data: datasets.Dataset, name: str, place: str, *, hub: bool) -> Source:
    def read() -> Iterator[Row]:
        import pyarrow

        try:
            tables = map(_validated, data.with_format("arrow").iter(batch_size=BATCH_ROWS))
            yield from _arrow_rows(tables, place, re.sub(r"[^\w.-]+", "_", Path(place).name))
        except pyarrow.ArrowException as error:
            raise SettingsError(f"{place}: is damaged ({_reason(error)}); download or save it again") from error

    files = tuple(Path(entry["filename"]) for entry in data.cache_files)
    return Source(name, read, files, files[0].parent.name if hub and files else None)


# Formats ---------------------------------------------------------------------------------------------------------------------


def _read_jsonl(path: Path, setting: str) -> Iterator[Row]:
    """One object per line; blank lines are passed over. A byte order mark is no part of the first."""
    with open(path, "rb") as stream:
        for number, line in enumerate(stream, 1):
            content = (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).rstrip(b"\n")
            if content.strip():
                where = f"{path}:{number}"
                yield Row(_as_object(_parse(content, where), where), where, path.name, number)


def _read_json(path: Path, setting: str) -> Iterator[Row]:
    """A list of objects, or an object whose field `data` is one. The only format that is not read row by row."""
    content = _parse(path.read_bytes().removeprefix(b"\xef\xbb\xbf"), str(path))
    rows = content.get("data") if isinstance(content, dict) else content
    if not isinstance(rows, list):
        raise SettingsError(
            f'{path}: must hold a list of rows, or {{"data": [rows]}}; a file with a row in every line must end in .jsonl'
        )
    for number, row in enumerate(rows, 1):
        where = f"{path}: row {number}"
        yield Row(_as_object(row, where), where, path.name, number)


def _as_object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise SettingsError(f"{where}: must be a JSON object, with fields for the problem and its answer")
    return value


def _read_csv(path: Path, setting: str) -> Iterator[Row]:
    """A header line with the names of the fields, then rows; every value is text. Quotes as RFC 4180 has them."""
    csv.field_size_limit(2**31 - 1)  # 128 KiB otherwise; the tests of a program are longer
    with open(path, encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
        names: list[str] | None = None
        line = 1
        try:
            for values in reader:
                where = f"{path}:{line}"
                if names is None:
                    names = values
                    _check_header(names, where)
                elif values:  # otherwise a blank line
                    if len(values) != len(names):
                        raise SettingsError(
                            f"{where}: has {len(values)} values for the {len(names)} fields of the first line; correct the row, "
                            "and quote values that hold separators"
                        )
                    yield Row(dict(zip(names, values, strict=True)), where, path.name, line)
                line = reader.line_num + 1
        except csv.Error as error:
            raise SettingsError(f"{path}:{line}: malformed CSV ({error}); correct the row") from error
        except UnicodeDecodeError as error:
            raise SettingsError(f"{path}:{line}: this line, or one of the next, is not UTF-8 text; convert the file") from error


def _check_header(names: list[str], where: str) -> None:
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        raise SettingsError(f"{where}: names the field {double!r} twice; change one of the names")


def _read_parquet(path: Path, setting: str) -> Iterator[Row]:
    import pyarrow.parquet

    try:
        # Buffered and not fetched ahead: a row group may be the whole file.
        with pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            yield from _arrow_rows(file.iter_batches(BATCH_ROWS, use_threads=False), str(path), path.name)
    except pyarrow.ArrowException as error:
        raise SettingsError(f"{setting}: {path} is no intact Parquet file ({_reason(error)}); write it again") from error


def _read_arrow(path: Path, setting: str) -> Iterator[Row]:
    """Arrow's stream format, which `datasets` writes, or its file format."""
    import pyarrow

    try:
        with pyarrow.memory_map(str(path)) as stream:
            if stream.read(6) == b"ARROW1":
                file = pyarrow.ipc.open_file(stream)
                batches = (file.get_batch(index) for index in range(file.num_record_batches))
            else:
                stream.seek(0)
                batches = pyarrow.ipc.open_stream(stream)
            slices = (batch.slice(n, BATCH_ROWS) for batch in batches for n in range(0, batch.num_rows, BATCH_ROWS))
            yield from _arrow_rows(map(_validated, slices), str(path), path.name)
    except pyarrow.ArrowException as error:
        raise SettingsError(f"{setting}: {path} is no intact Arrow file ({_reason(error)}); write it again") from error


def _validated(batch: pyarrow.RecordBatch | pyarrow.Table) -> pyarrow.RecordBatch | pyarrow.Table:
    """Arrow files are mapped as they are: of damaged ones, reading values would go beyond the memory."""
    batch.validate(full=True)
    return batch


def _arrow_rows(batches: Iterable[pyarrow.RecordBatch | pyarrow.Table], place: str, file: str) -> Iterator[Row]:
    first = 1
    for batch in batches:
        double = next((name for name in batch.schema.names if batch.schema.names.count(name) > 1), None)
        if double is not None:
            raise SettingsError(f"{place}: has the field {double!r} twice; change one of the names")
        try:
            rows: Iterable[dict[str, Any]] = batch.to_pylist()
        except (ValueError, OverflowError):  # not UTF-8, or a date that Python does not have: find the row
            rows = (_arrow_row(batch.slice(index, 1), f"{place}: row {first + index}") for index in range(batch.num_rows))
        for number, row in enumerate(rows, first):
            yield Row(row, f"{place}: row {number}", file, number)
        first += batch.num_rows


def _arrow_row(batch: pyarrow.RecordBatch | pyarrow.Table, where: str) -> dict[str, Any]:
    for name in batch.schema.names:
        try:
            batch.select([name]).to_pylist()
        except (ValueError, OverflowError) as error:
            raise SettingsError(
                f"{where}: field {name!r} holds a value that is no text or number; correct or remove it"
            ) from error
    return batch.to_pylist()[0]


_READERS: dict[str, Callable[[Path, str], Iterator[Row]]] = {
    **{".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".tsv": _read_csv},
    **{".parquet": _read_parquet, ".arrow": _read_arrow},
}


def _parse(text: bytes, where: str) -> Any:
    try:
        return json.loads(text.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise SettingsError(f"{where}: is not UTF-8 text (byte {error.start}); convert the file") from error
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}" if b"\n" in text else f"column {error.colno}"
        raise SettingsError(f"{where}: malformed JSON: {error.msg} at {place}; correct or remove it") from error
    except _RefusedJSONError as error:
        raise SettingsError(f"{where}: {error}; correct or remove it") from error
    except RecursionError as error:
        raise SettingsError(f"{where}: malformed JSON: it is nested too deep; correct or remove it") from error
    except ValueError as error:  # the only one that is left
        raise SettingsError(f"{where}: malformed JSON: a number has too many digits; write it as text") from error


class _RefusedJSONError(ValueError):
    """What Python's parser would let through."""


def _refuse_constant(name: str) -> NoReturn:
    raise _RefusedJSONError(f"{name} is not a JSON value")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise _RefusedJSONError(f"field {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return fields


def _reason(error: BaseException) -> str:
    """The first line of a library's message, short, unless it is in Python's terms."""
    reason = getattr(error, "strerror", None) or str(error).strip().partition("\n")[0]
    if not reason or re.search(r"[A-Za-z](Error|Exception)\b|NoneType|object at|Errno|<class", reason):
        return "it is damaged, or of another kind"
    return reason if len(reason) <= 120 else reason[:117] + "..."
