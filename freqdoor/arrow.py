"""Pictures in Arrow files, as Hugging Face's library datasets saves a set to a folder; read from where they lie there.

A picture is a row of bytes in a file that holds them one after the other, so that it is `shards.Packed`, as one in a
tar file is. The library itself is not needed, only pyarrow, which it reads these files with.
"""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from freqdoor.errors import FreqdoorError
from freqdoor.limits import LONGEST_HEADER, file_size, parse_json, read_whole
from freqdoor.shards import Packed

ENDING = ".arrow"
STATE, SPLITS = "state.json", "dataset_dict.json"  # what a folder of the library has: of a set, of a set of sets
EXPECTED = "an Arrow file of pictures, as datasets' save_to_disk writes it"


def list_arrow(place: Path | str) -> list[Path]:
    """The Arrow files that a place names, in order: one, or a folder that datasets saved a set to; else none.

    Raises:
        FreqdoorError: a folder of several sets, one of which has to be named.
    """
    place = Path(place)
    if place.suffix == ENDING and place.is_file():
        return [place]
    if (place / SPLITS).is_file():
        content = parse_json(read_whole(place / SPLITS, "splits", LONGEST_HEADER), place / SPLITS)
        splits = content.get("splits", []) if isinstance(content, dict) else []
        raise FreqdoorError(
            f"{place}: expected one set of pictures, found the splits {', '.join(map(str, splits))}; name one"
        )
    return sorted(place.glob(f"*{ENDING}")) if (place / STATE).is_file() else []


def pictures_in(file: Path) -> list[Packed]:
    """The pictures in an Arrow file, in its order.

    Raises:
        FreqdoorError: no such file, a damaged one, compressed or without a column of pictures, one that names its
            pictures instead of holding them, or no package pyarrow.
    """
    try:
        import pyarrow as pa
    except ImportError as error:
        raise FreqdoorError(f"Arrow files need more: pip install 'freqdoor[datasets]' ({error})") from None
    size = file_size(file, EXPECTED)
    try:
        with pa.memory_map(str(file)) as mapped:
            whole = mapped.read_buffer(size)
            batches = pa.ipc.open_stream(pa.BufferReader(whole))
            column = _column(batches.schema, file)
            found: list[Packed] = []
            for batch in batches:
                batch.validate(full=True)
                found += _rows(batch.column(column), file, whole, len(found))
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        raise FreqdoorError(f"{file}: expected {EXPECTED}, uncompressed and whole ({reason})") from None
    return found


def _column(schema: Any, file: Path) -> int:
    """Which column holds pictures: bytes and a path each; of several the one that is called image."""
    import pyarrow as pa

    def holds(kind: Any) -> bool:
        fields = [kind.field(i) for i in range(kind.num_fields)] if pa.types.is_struct(kind) else []
        types = {field.name: field.type for field in fields}
        return "path" in types and types.get("bytes") in (pa.binary(), pa.large_binary())

    columns = [i for i, kind in enumerate(schema.types) if holds(kind)]
    named = [i for i in columns if schema.names[i] == "image"] if len(columns) > 1 else columns
    if len(named) != 1:
        names = ", ".join(schema.names[i] for i in columns) or "none"
        raise FreqdoorError(f"{file}: expected one column of pictures, or one called image, found {names}")
    return named[0]


def _rows(column: Any, file: Path, whole: Any, start: int) -> Iterator[Packed]:
    """The pictures of one batch, which has to lie uncompressed in the file."""
    import pyarrow as pa

    content, paths = column.field("bytes"), column.field("path")
    if not len(column):
        return
    if column.null_count or content.null_count:
        raise FreqdoorError(
            f"{file}: expected pictures, found rows without; a set that only names its files is saved with them by "
            "save_to_disk of datasets"
        )
    _, offsets, data = content.buffers()
    wide = content.type == pa.large_binary()
    ends = np.frombuffer(offsets, np.int64 if wide else np.int32)[content.offset : content.offset + len(content) + 1]
    beginning = data.address - whole.address
    if not 0 <= beginning <= beginning + int(ends[-1]) <= whole.size:
        raise ValueError("its parts are compressed")
    for row, (first, last) in enumerate(zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)):
        name = PurePosixPath(paths[row].as_py() or "").name
        yield Packed(file, f"{start + row}/{name}" if name else str(start + row), beginning + first, last - first)
