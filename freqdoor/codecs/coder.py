"""The entropy coder of every codec: CompressAI's bitstream, from tables, indexes, symbols and bytes that are checked.

CompressAI's own coder is C++ and trusts all four; what strangers send reads and writes outside its memory. This one
writes and reads the same bytes and reads nothing that it has not checked. The format is range asymmetric numeral
systems (J. Duda, arXiv:1311.2540) as in F. Giesen's rans64: a state x in [2^31, 2^63), little-endian 32-bit words, and
frequencies f_s = c_{s+1} - c_s that sum to 2^16. Encoding runs backwards over the symbols,

    x -> (x // f_s) 2^16 + x mod f_s + c_s,    after moving 32 bits out where the result would not stay below 2^63,

and decoding undoes it forwards. A row's last symbol is an escape: a nibble with the number n of nibbles, then n nibbles
of 2 (v - last) for a value v >= last or -2 v - 1 for a v < 0, the lowest first. The string starts with the encoder's
last state and is exhausted when the decoder is back at the encoder's first one, 2^31. Every sequence of symbols has one
string, so that a string is either what the encoder would write or is refused.

numba compiles the two loops when something is coded for the first time, about 2 s, and keeps the machine code beside
this file or in the user's cache: later processes take about 0.5 s, most of it numba's import. Where neither can be
written, each process compiles.

Neither PyTorch nor CompressAI is known here: `coding` puts this coder in the place of CompressAI's.
"""

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache, reduce
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from freqdoor.errors import FreqdoorError

Integers = npt.NDArray[np.int32]
Words = npt.NDArray[np.uint32]

PRECISION = 16  # bits: frequencies sum to 2^16
FIRST_STATE = 1 << 31  # the lowest state, where encoding starts and decoding has to end
NIBBLE = 4  # bits
MAX_NIBBLES = 7  # of an escaped value: from 2^28 on, CompressAI's encoder never returns
MAX_OFFSET = 1 << 24  # float32 latents are exact integers up to here
MAX_ENTRIES = 1 << 24  # of all rows together: 64 MiB
WORDS_PER_SYMBOL = 2  # at most 16 + 4 (1 + MAX_NIBBLES) = 48 bits

GOOD, BAD_INDEX, BAD_SYMBOL, TOO_SHORT, BAD_ESCAPE, NO_ROOM = range(6)
FAULTS = {
    BAD_INDEX: "index {index} is none of the {rows} rows of the coding tables; the codec's weights are damaged",
    BAD_SYMBOL: f"latent {{symbol}} is not within 2^{NIBBLE * MAX_NIBBLES - 1} of its table; the codec's weights "
    "are damaged",
    TOO_SHORT: "a string ends before all latents are decoded",
    BAD_ESCAPE: "a string holds a latent that no encoder writes",
}  # and no sentence for NO_ROOM: nothing needs more than WORDS_PER_SYMBOL


class NotDecodable(FreqdoorError):
    """A string is not what the encoder writes for latents with these rows: it is damaged, or the rows are others."""


class Symbols(NamedTuple):
    """How many symbols a string holds, and which ones: the CRC-32 of their little-endian 32-bit integers."""

    number: int = 0
    crc: int = 0

    def and_these(self, symbols: Integers) -> "Symbols":
        """These symbols and more of them."""
        return Symbols(self.number + len(symbols), zlib.crc32(symbols.astype("<i4", copy=False).tobytes(), self.crc))


Coded = dict[bytes, set[Symbols]]  # by string: one may stand for other symbols with other rows


@dataclass(frozen=True)
class Tally:
    """What was coded while somebody kept it."""

    encoded: Coded = field(default_factory=dict)
    decoded: Coded = field(default_factory=dict)
    loops: list[str] = field(default_factory=list)  # whose loops over pixels ours took the place of


def symbols_of(strings: Sequence[bytes], coded: Coded) -> tuple[Symbols, ...]:
    """What was coded as each string, in whatever order; no symbols for a string that this coder has not seen."""
    every = (coded.get(string, set()) for string in strings)
    return tuple(Symbols(sum(s.number for s in each), sum(s.crc for s in each) % 2**32) for each in every)


_TALLY: ContextVar[Tally | None] = ContextVar("tally", default=None)


@contextmanager
def tallied() -> Iterator[Tally]:
    """Keep what is coded in the block."""
    tally = Tally()
    token = _TALLY.set(tally)
    try:
        yield tally
    finally:
        _TALLY.reset(token)


@dataclass(frozen=True, slots=True, eq=False)
class Tables:
    """What an entropy model codes with, checked and read-only; made by `checked_tables` alone.

    Row i codes the values offset_i, ..., offset_i + length_i - 3 and, with its last symbol, the escape.
    """

    cdfs: Integers  # (n, m): row i rises from 0 to 2^16 over its first length_i entries; the rest means nothing
    lengths: Integers  # (n,)
    offsets: Integers  # (n,)


def checked_tables(cdfs: object, lengths: object, offsets: object) -> Tables:
    """Tables of an entropy model, from arrays or nested lists of integers: (n, m), (n,) and (n,).

    Raises:
        FreqdoorError: sizes that do not belong together, and rows that are no distribution function.
    """
    tables = Tables(_integers(cdfs, "CDFs", 2), _integers(lengths, "lengths", 1), _integers(offsets, "offsets", 1))
    count, width = tables.cdfs.shape
    if not count == len(tables.lengths) == len(tables.offsets) > 0:
        raise FreqdoorError(
            f"coding tables: expected as many lengths and offsets as CDFs, found {count} CDFs, "
            f"{len(tables.lengths)} lengths and {len(tables.offsets)} offsets"
        )
    _check_rows(
        (tables.lengths >= 3) & (tables.lengths <= width),  # a value and the escape at least
        f"a length from 3 to the row's {width} entries",
        tables.lengths,
    )
    _check_rows(np.abs(tables.offsets.astype(np.int64)) <= MAX_OFFSET, f"an offset within {MAX_OFFSET}", tables.offsets)
    last = tables.cdfs[np.arange(count), tables.lengths - 1]
    _check_rows(tables.cdfs[:, 0] == 0, "a CDF that starts at 0", tables.cdfs[:, 0])
    _check_rows(last == 1 << PRECISION, f"a CDF that ends at {1 << PRECISION}", last)
    rises = tables.cdfs[:, 1:] > tables.cdfs[:, :-1]
    rises |= np.arange(1, width) >= tables.lengths[:, None]
    place = rises.argmin(axis=1) + 1
    _check_rows(rises.all(axis=1), "a CDF that rises at every entry", tables.cdfs[np.arange(count), place])
    return tables


def _integers(values: object, name: str, dimensions: int) -> Integers:
    """A read-only int32 copy that nobody else can write to."""
    try:
        array = np.asarray(values)
    except (ValueError, OverflowError):  # rows of different lengths
        array = np.empty(0, object)
    if array.dtype.kind not in "iu" or array.ndim != dimensions or array.size == 0:
        raise FreqdoorError(
            f"coding tables: expected {name} as a {dimensions}-dimensional array of integers, "
            f"found {array.dtype} of shape {array.shape}"
        )
    if array.size > MAX_ENTRIES:
        raise FreqdoorError(f"coding tables: expected at most {MAX_ENTRIES} {name}, found {array.size}")
    copy = array.astype(np.int32, order="C")
    if (copy != array).any():
        raise FreqdoorError(f"coding tables: expected {name} of 32 bits, found {array.min()} to {array.max()}")
    copy.setflags(write=False)
    return copy


def _check_rows(good: npt.NDArray[np.bool_], expectation: str, values: Integers) -> None:
    if not good.all():
        row = int(good.argmin())
        raise FreqdoorError(f"coding tables: expected {expectation}, found {values[row]} in row {row}")


def _encode_loop(
    symbols: Integers,
    indexes: Integers,
    cdfs: Integers,
    lengths: Integers,
    offsets: Integers,
    words: Words,
    position: int,
    state: int,
) -> tuple[int, int, int, int]:
    """Push symbols, the last first, into `words` below `position`: (fault, where, position, state).

    All numbers are int64: no state reaches 2^63.
    """
    for i in range(len(symbols) - 1, -1, -1):
        index = indexes[i]
        if index < 0 or index >= len(lengths):
            return BAD_INDEX, i, position, state
        last = lengths[index] - 2
        value = symbols[i] - offsets[index]
        if value < 0 or value >= last:
            raw = -2 * value - 1 if value < 0 else 2 * (value - last)
            if raw >> NIBBLE * MAX_NIBBLES:
                return BAD_SYMBOL, i, position, state
            count = 0
            while raw >> NIBBLE * count:
                count += 1
            for j in range(count, -1, -1):  # last of all the count, which the decoder meets first
                nibble = raw >> NIBBLE * (j - 1) & 15 if j else count
                if state >= 1 << 63 - NIBBLE:
                    if position == 0:
                        return NO_ROOM, i, position, state
                    position -= 1
                    words[position] = state & 0xFFFFFFFF
                    state >>= 32
                state = state << NIBBLE | nibble
            value = last
        start = cdfs[index, value]
        frequency = cdfs[index, value + 1] - start
        if state >= frequency << 63 - PRECISION:
            if position == 0:
                return NO_ROOM, i, position, state
            position -= 1
            words[position] = state & 0xFFFFFFFF
            state >>= 32
        quotient = state // frequency
        state = (quotient << PRECISION) + (state - quotient * frequency) + start
    return GOOD, 0, position, state


def _decode_loop(
    words: Words,
    position: int,
    state: int,
    indexes: Integers,
    cdfs: Integers,
    lengths: Integers,
    offsets: Integers,
    symbols: Integers,
) -> tuple[int, int, int, int]:
    """Pop a symbol for every index from `words` at `position`: (fault, where, position, state)."""
    for i in range(len(indexes)):
        index = indexes[i]
        if index < 0 or index >= len(lengths):
            return BAD_INDEX, i, position, state
        last = lengths[index] - 2
        level = state & (1 << PRECISION) - 1
        value, above = 0, last + 1  # cdf[value] <= level < cdf[above]
        while above - value > 1:
            middle = (value + above) >> 1
            if cdfs[index, middle] <= level:
                value = middle
            else:
                above = middle
        start = cdfs[index, value]
        state = (cdfs[index, value + 1] - start) * (state >> PRECISION) + level - start
        if state < FIRST_STATE:
            if position == len(words):
                return TOO_SHORT, i, position, state
            state = state << 32 | np.int64(words[position])  # type: ignore[assignment]
            position += 1
        if value == last:
            raw = 0
            count = 0
            nibble = 1
            j = 0
            while j <= count:
                nibble = state & 15
                state >>= NIBBLE
                if state < FIRST_STATE:
                    if position == len(words):
                        return TOO_SHORT, i, position, state
                    state = state << 32 | np.int64(words[position])  # type: ignore[assignment]
                    position += 1
                if j == 0:
                    count = nibble
                    if count > MAX_NIBBLES:
                        return BAD_ESCAPE, i, position, state
                else:
                    raw |= nibble << NIBBLE * (j - 1)
                j += 1
            if count and nibble == 0:  # the encoder writes no leading zeros
                return BAD_ESCAPE, i, position, state
            value = -(raw >> 1) - 1 if raw & 1 else last + (raw >> 1)
        symbols[i] = value + offsets[index]
    return GOOD, 0, position, state


@cache
def _compiled() -> tuple[Callable[..., tuple[int, int, int, int]], Callable[..., tuple[int, int, int, int]]]:
    """The two loops as machine code: (encode, decode)."""
    import numba  # not before something is coded: the import takes a third of a second
    from numba import types

    row = types.Array(types.int32, 1, "C", readonly=True)
    table = types.Array(types.int32, 2, "C", readonly=True)
    read_words = types.Array(types.uint32, 1, "C", readonly=True)
    result = types.UniTuple(types.int64, 4)
    tables = (table, row, row)
    signatures = {
        _encode_loop: result(row, row, *tables, types.uint32[::1], types.int64, types.int64),
        _decode_loop: result(read_words, types.int64, types.int64, row, *tables, types.int32[::1]),
    }

    def compiled(*, keep: bool) -> Any:
        return tuple(
            numba.njit(signature, cache=keep, boundscheck=True)(loop) for loop, signature in signatures.items()
        )

    try:
        encode_loop, decode_loop = compiled(keep=True)
    except (OSError, RuntimeError):  # no folder for the compiled code can be written
        encode_loop, decode_loop = compiled(keep=False)
    return encode_loop, decode_loop


class Encoder:
    """Collects symbols, at once or step by step, and writes them as one string.

    Has the methods of CompressAI's `BufferedRansEncoder` too.
    """

    def __init__(self) -> None:
        self._parts: list[tuple[Integers, Integers, Tables]] = []
        self._lists = _Lists()

    def encode(self, symbols: npt.ArrayLike, indexes: npt.ArrayLike, tables: Tables) -> None:
        """Append (n,) symbols, each coded with the row of `tables` that its index names."""
        symbols, indexes = _row(symbols), _row(indexes)
        if symbols.shape != indexes.shape:
            raise ValueError(f"expected an index for every symbol, found {symbols.shape} and {indexes.shape}")
        self._parts.append((symbols, indexes, tables))

    def flush(self) -> bytes:
        """The string of all symbols so far, 8 bytes or more; the encoder is empty again.

        Raises:
            FreqdoorError: an index or a symbol that the tables have no code for.
        """
        encode_loop, _ = _compiled()
        parts, self._parts = self._parts, []
        words = np.empty(2 + WORDS_PER_SYMBOL * sum(len(symbols) for symbols, _, _ in parts), np.uint32)
        position, state = len(words), FIRST_STATE
        for symbols, indexes, tables in reversed(parts):
            fault, where, position, state = encode_loop(
                symbols, indexes, tables.cdfs, tables.lengths, tables.offsets, words, position, state
            )
            _check(fault, symbols[where : where + 1], indexes[where : where + 1], tables)
        string = int(state).to_bytes(8, "little") + words[position:].astype("<u4").tobytes()
        if (tally := _TALLY.get()) is not None:
            coded = reduce(Symbols.and_these, (symbols for symbols, _, _ in parts), Symbols())
            tally.encoded.setdefault(string, set()).add(coded)
        return string

    def encode_with_indexes(
        self,
        symbols: Sequence[int],
        indexes: Sequence[int],
        cdfs: Sequence[Sequence[int]],
        cdfs_sizes: Sequence[int],
        offsets: Sequence[int],
    ) -> None:
        """`encode` with tables as nested lists, which are checked once as long as they are the same objects."""
        self.encode(symbols, indexes, self._lists.tables(cdfs, cdfs_sizes, offsets))


class Decoder:
    """Reads symbols from a string, at once or step by step, and never beyond its end.

    Has the methods of CompressAI's `RansDecoder` too.

    Attributes:
        begun: whether there is a string to read.
    """

    def __init__(self, string: bytes | None = None) -> None:
        self._lists = _Lists()
        self.begun = False
        if string is not None:
            self.set_stream(string)

    def set_stream(self, string: bytes) -> None:
        """Start at the beginning of a string.

        Raises:
            NotDecodable: no string of this format starts so.
        """
        whole = len(string) >= 8 and len(string) % 4 == 0
        state = int.from_bytes(string[:8], "little")
        if not whole or not FIRST_STATE <= state < 1 << 63:
            raise NotDecodable(f"a string of {len(string)} bytes does not start as an encoder's would")
        self._string, self._words = string, np.frombuffer(string, "<u4", offset=8).astype(np.uint32)
        self._position, self._state, self._symbols = 0, state, Symbols()
        self.begun = True

    def decode(self, indexes: npt.ArrayLike, tables: Tables) -> Integers:
        """The next symbols, (n,), one for every index.

        Raises:
            NotDecodable: the string ends before, or is none that an encoder writes.
            FreqdoorError: an index without a row.
        """
        _, decode_loop = _compiled()
        indexes = _row(indexes)
        symbols = np.empty(len(indexes), np.int32)
        fault, where, self._position, self._state = decode_loop(
            self._words, self._position, self._state, indexes, tables.cdfs, tables.lengths, tables.offsets, symbols
        )
        _check(fault, symbols[where : where + 1], indexes[where : where + 1], tables)
        self._symbols = self._symbols.and_these(symbols)
        return symbols

    def finish(self) -> None:
        """Check that the whole string has been read.

        Raises:
            NotDecodable: the string goes on, or its last state is not the one that an encoder starts from.
        """
        if self._position != len(self._words) or self._state != FIRST_STATE:
            raise NotDecodable("a string goes on after its last latent")
        if (tally := _TALLY.get()) is not None:
            tally.decoded.setdefault(self._string, set()).add(self._symbols)

    def decode_stream(
        self, indexes: Sequence[int], cdfs: Sequence[Sequence[int]], cdfs_sizes: Sequence[int], offsets: Sequence[int]
    ) -> list[int]:
        """`decode` with tables as nested lists, which are checked once as long as they are the same objects."""
        return cast(list[int], self.decode(indexes, self._lists.tables(cdfs, cdfs_sizes, offsets)).tolist())

    def decode_with_indexes(
        self,
        string: bytes,
        indexes: Sequence[int],
        cdfs: Sequence[Sequence[int]],
        cdfs_sizes: Sequence[int],
        offsets: Sequence[int],
    ) -> list[int]:
        """All symbols of a string, with tables as nested lists."""
        self.set_stream(string)
        symbols = self.decode_stream(indexes, cdfs, cdfs_sizes, offsets)
        self.finish()
        return symbols


def encode(symbols: npt.ArrayLike, indexes: npt.ArrayLike, tables: Tables) -> bytes:
    """The string of (n,) symbols, each coded with the row of `tables` that its index names.

    Raises:
        FreqdoorError: an index or a symbol that the tables have no code for.
    """
    encoder = Encoder()
    encoder.encode(symbols, indexes, tables)
    return encoder.flush()


def decode(string: bytes, indexes: npt.ArrayLike, tables: Tables) -> Integers:
    """The (n,) symbols of a whole string, one for every index.

    Raises:
        NotDecodable: `encode` writes this string for no symbols with these indexes.
        FreqdoorError: an index without a row.
    """
    decoder = Decoder(string)
    symbols = decoder.decode(indexes, tables)
    decoder.finish()
    return symbols


class WholeEncoder(Encoder):
    """With the method of CompressAI's `RansEncoder`, which writes at once."""

    def encode_with_indexes(self, *symbols_indexes_and_tables: Any) -> bytes:  # type: ignore[override]
        """The string of symbols, indexes and tables as nested lists."""
        super().encode_with_indexes(*symbols_indexes_and_tables)
        return self.flush()


class _Lists:
    """The checked tables of the nested lists last given: CompressAI's models pass the same ones for every pixel."""

    def __init__(self) -> None:
        self._last: tuple[tuple[object, object, object], Tables] | None = None

    def tables(self, cdfs: object, lengths: object, offsets: object) -> Tables:
        lists = (cdfs, lengths, offsets)
        if self._last is None or any(old is not new for old, new in zip(self._last[0], lists, strict=True)):
            self._last = (lists, checked_tables(*lists))
        return self._last[1]


def _row(values: npt.ArrayLike) -> Integers:
    """Values as a contiguous int32 row."""
    array = np.asarray(values).reshape(-1)
    row = np.ascontiguousarray(array, np.int32)
    if array.dtype != np.int32 and (row != array).any():
        raise FreqdoorError(f"expected latents and indexes as integers of 32 bits, found {array[row != array][0]}")
    return row


def _check(fault: int, symbol: Integers, index: Integers, tables: Tables) -> None:
    """Say what a loop stopped at: a symbol and its index."""
    if fault != GOOD:
        kind = NotDecodable if fault in (TOO_SHORT, BAD_ESCAPE) else FreqdoorError
        raise kind(FAULTS[fault].format(symbol=symbol[0], index=index[0], rows=len(tables.lengths)))
