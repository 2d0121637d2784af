"""The entropy coder: the bytes of its formulas and of CompressAI's coder, and sentences for what is damaged."""

import copy
import re
import struct
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numba
import numpy as np
import pytest
import torch
from compressai import ans
from compressai.ans import BufferedRansEncoder
from compressai.entropy_models import EntropyBottleneck, EntropyBottleneckVbr, EntropyModel, GaussianConditional
from compressai.latent_codecs import RasterScanLatentCodec
from compressai.layers import MaskedConv2d
from compressai.models import google
from conftest import natural
from factories import TINY_ARGUMENTS, tiny
from torch import nn

from freqdoor import load_codec, load_image
from freqdoor.codecs import coder, coding
from freqdoor.codecs.architectures import ARCHITECTURES
from freqdoor.codecs.coder import Decoder, Encoder, NotDecodable, Symbols, checked_tables, decode, encode, symbols_of
from freqdoor.codecs.coding import check_tables, tables_of
from freqdoor.errors import FreqdoorError

pytestmark = pytest.mark.whole

KODAK = Path(coding.__file__).parent.parent / "assets/kodak"
LISTS = ([[0, 1, 40_000, 65_535, 65_536], [0, 65_535, 65_536, 7, 7]], [5, 3], [-1, 10])  # what lies beyond is not read
TABLES = checked_tables(*LISTS)


def random_lists(rng, rows: int = 5):
    """Distribution functions of 2 to 40 random steps, padded as CompressAI's are."""
    cdfs, lengths = np.zeros((rows, 42), np.int64), rng.integers(3, 43, rows)
    for cdf, length in zip(cdfs, lengths, strict=True):
        narrow = rng.random() < 0.3  # frequencies of 1 and a bit
        inner = rng.choice(60 if narrow else 65_535, length - 2, replace=False) + 1
        cdf[:length] = [0, *sorted(inner), 1 << 16]
    return cdfs.tolist(), lengths.tolist(), rng.integers(-50, 50, rows).tolist()


def random_symbols(rng, lists, count: int):
    """Symbols of all kinds, with rows: in the table, at its ends, beside it, far away."""
    _, lengths, offsets = map(np.array, lists)
    indexes = rng.integers(0, len(lengths), count)
    first, last = offsets[indexes], offsets[indexes] + lengths[indexes] - 3
    inside = rng.integers(first, last + 1)
    near = np.where(rng.random(count) < 0.5, first, last) + rng.integers(-3, 4, count)
    far = (rng.choice([-1, 1], count) * 2 ** rng.uniform(0, 26.9, count)).astype(int)
    kind = rng.choice(3, count, p=[0.7, 0.2, 0.1])
    return np.choose(kind, [inside, near, far]).tolist(), indexes.tolist()


def by_hand(symbols, indexes, lists) -> bytes:
    """The format again, in unbounded integers."""
    steps = []
    for symbol, index in zip(symbols, indexes, strict=True):
        cdf, escape, value = lists[0][index], lists[1][index] - 2, symbol - lists[2][index]
        position = value if 0 <= value < escape else escape
        steps.append((cdf[position], cdf[position + 1] - cdf[position], 2**16))
        if position == escape:
            digits = f"{2 * (value - escape) if value >= 0 else -2 * value - 1:x}".lstrip("0")
            steps += [(int(digit, 16), 1, 2**4) for digit in (f"{len(digits):x}", *reversed(digits))]
    return pushed(steps)


def pushed(steps) -> bytes:
    """The string of steps (start, frequency, total of all frequencies)."""
    state, words = 2**31, []
    for start, frequency, total in reversed(steps):
        if state // frequency * total + state % frequency + start >= 2**63:
            words.append(state % 2**32)
            state //= 2**32
        state = state // frequency * total + state % frequency + start
    return state.to_bytes(8, "little") + b"".join(word.to_bytes(4, "little") for word in reversed(words))


@pytest.mark.parametrize("count", [0, 1, 2, 3, 50, 2000])
@pytest.mark.parametrize("seed", range(4))
def test_the_bytes_are_those_of_the_formulas(count, seed):
    rng = np.random.default_rng([count, seed])
    lists = random_lists(rng)
    symbols, indexes = random_symbols(rng, lists, count)
    string = encode(symbols, indexes, checked_tables(*lists))
    assert string == by_hand(symbols, indexes, lists)
    assert decode(string, indexes, checked_tables(*lists)).tolist() == symbols


@pytest.mark.parametrize("seed", range(20))
def test_the_bytes_are_compressais_in_both_directions(seed):
    rng = np.random.default_rng(seed)
    lists = random_lists(rng)
    symbols, indexes = random_symbols(rng, lists, int(rng.integers(4, 3000)))  # below 4, it writes beside its buffer
    theirs = ans.RansEncoder().encode_with_indexes(symbols, indexes, *lists)
    assert encode(symbols, indexes, checked_tables(*lists)) == theirs
    assert decode(theirs, indexes, checked_tables(*lists)).tolist() == symbols
    assert ans.RansDecoder().decode_with_indexes(theirs, indexes, *lists) == symbols


@pytest.mark.parametrize("seed", range(3))
def test_steps_of_different_tables_stand_in_for_compressais_classes(seed):
    rng = np.random.default_rng(seed)
    parts = []
    for count in (40, 1, 0, 200):
        lists = random_lists(rng)
        parts.append((*random_symbols(rng, lists, count), lists))
    ours, theirs = Encoder(), ans.BufferedRansEncoder()
    for symbols, indexes, lists in parts:
        ours.encode_with_indexes(symbols, indexes, *lists)
        theirs.encode_with_indexes(symbols, indexes, *lists)
    string = ours.flush()
    assert string == theirs.flush()
    assert ours.flush() == encode([], [], TABLES)  # nothing is left
    ours, theirs = Decoder(), ans.RansDecoder()
    ours.set_stream(string)
    theirs.set_stream(string)
    for symbols, indexes, lists in parts:
        decoded = ours.decode_stream(indexes, *lists)
        assert decoded == theirs.decode_stream(indexes, *lists) == symbols
        assert all(type(symbol) is int for symbol in decoded)
    ours.finish()
    symbols, indexes, lists = parts[0]
    string = encode(symbols, indexes, checked_tables(*lists))
    assert Decoder().decode_with_indexes(string, indexes, *lists) == symbols
    with pytest.raises(FreqdoorError, match="goes on after its last latent"):
        Decoder().decode_with_indexes(string, indexes[:-5], *lists)


def test_lists_are_checked_once_and_others_again(monkeypatch):
    checks = []
    monkeypatch.setattr(coder, "checked_tables", lambda *lists: checks.append(lists) or checked_tables(*lists))
    encoder = Encoder()
    for _ in range(3):
        encoder.encode_with_indexes([0], [0], *LISTS)
    assert len(checks) == 1
    moved = (LISTS[0], LISTS[1], [0, 0])
    encoder.encode_with_indexes([0], [0], *moved)
    encoder.encode_with_indexes([0], [0], *LISTS)
    assert [lists[2] for lists in checks] == [LISTS[2], moved[2], LISTS[2]]
    string = encoder.flush()
    assert string == by_hand([0, 0, 0, -1, 0], [0] * 5, LISTS)  # the moved row's 0 is this row's -1


@pytest.mark.parametrize("power", [0, 2, 3, 8, 15])
def test_a_word_moves_out_at_the_very_state(power):
    """Frequencies 2^p that start at 0 take the state to 2^(47 + p), their limit, and before an escape to 2^59, its."""
    lists = ([[0, 1 << power, 1 << 16]], [3], [0])
    tables = checked_tables(*lists)
    for count in range(40):
        for symbols in ([0] * count, [5, *[0] * count]):
            string = encode(symbols, [0] * len(symbols), tables)
            assert string == by_hand(symbols, [0] * len(symbols), lists)
            assert decode(string, [0] * len(symbols), tables).tolist() == symbols


def test_the_costliest_symbols_fit():
    """Escapes of probability 2^-16 with 7 digits each take 48 bits."""
    tables = checked_tables([[0, 65_535, 65_536]], [3], [0])
    symbols = [-(2**27)] * 1001
    string = encode(symbols, [0] * 1001, tables)
    assert 6 * 1001 <= len(string) <= 6 * 1001 + 12
    assert decode(string, [0] * 1001, tables).tolist() == symbols


def test_the_largest_symbols_are_coded_and_larger_ones_refused():
    first, last = TABLES.offsets[0], TABLES.offsets[0] + 3  # the values in row 0, and the escape's
    extremes = [first - 2**27, last + 2**27 - 1]
    assert decode(encode(extremes, [0, 0], TABLES), [0, 0], TABLES).tolist() == extremes
    for symbol in (extremes[0] - 1, extremes[1] + 1, -(2**31), 2**31 - 1):
        with pytest.raises(FreqdoorError, match=f"^latent {symbol} is not within 2\\^27 of its table; the codec's"):
            encode([0, symbol, 0], [0, 0, 0], TABLES)


@pytest.mark.parametrize("index", [-1, 2, 2**31 - 1, -(2**31)])
def test_rows_that_do_not_exist_are_refused(index):
    message = f"^index {index} is none of the 2 rows of the coding tables"
    with pytest.raises(FreqdoorError, match=message):
        encode([0, 0, 0], [0, index, 0], TABLES)
    with pytest.raises(FreqdoorError, match=message):
        decode(encode([0, 0, 0], [0, 0, 0], TABLES), [0, index, 0], TABLES)


@pytest.mark.parametrize("wrong", [2**31, 2**32, -(2**31) - 1, 0.5])
def test_numbers_that_are_no_32_bit_integers_are_refused(wrong):
    message = f"expected latents and indexes as integers of 32 bits, found {re.escape(str(wrong))}"
    for symbols, indexes in (([0, wrong], [0, 0]), ([0, 0], [0, wrong])):
        with pytest.raises(FreqdoorError, match=message):
            encode(np.array(symbols), np.array(indexes), TABLES)
    with pytest.raises(FreqdoorError, match=message):
        decode(encode([0], [0], TABLES), [wrong], TABLES)
    with pytest.raises(ValueError, match="an index for every symbol"):
        encode([0, 0], [0], TABLES)


def test_arrays_of_any_layout_are_read():
    symbols = np.array([[1, 9], [2, 9], [-1, 9]])[:, 0]
    for array in (symbols, symbols.astype(np.int8), symbols.astype(np.int32), symbols[::-1][::-1]):
        assert encode(array, [0, 0, 0], TABLES) == by_hand([1, 2, -1], [0, 0, 0], LISTS)


def refused_or_written(string: bytes, indexes, tables) -> bool:
    """Whether a string is refused in a sentence; if it is not, it has to be what its symbols are encoded to."""
    try:
        symbols = decode(string, indexes, tables)
    except NotDecodable as error:
        sentence = str(error)
    else:
        assert encode(symbols, indexes, tables) == string
        return False
    assert re.match(r"a string (of \d+ bytes does not start|ends before|holds a latent|goes on after)", sentence)
    return True


@pytest.mark.parametrize("seed", range(3))
def test_damage_is_refused_or_is_another_string(seed):
    rng = np.random.default_rng(seed)
    lists = random_lists(rng)
    symbols, indexes = random_symbols(rng, lists, 40)
    tables = checked_tables(*lists)
    string = encode(symbols, indexes, tables)
    for length in range(len(string)):
        assert refused_or_written(string[:length], indexes, tables)
    for bit in range(8 * len(string)):
        flipped = (int.from_bytes(string, "little") ^ 1 << bit).to_bytes(len(string), "little")
        refused_or_written(flipped, indexes, tables)
    assert refused_or_written(string + bytes(4), indexes, tables)
    assert refused_or_written(string, indexes[:-1], tables)
    assert refused_or_written(string, [*indexes, 0], tables)
    for length in rng.integers(0, 200, 300):
        refused_or_written(rng.bytes(length), indexes, tables)


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (0, "a string of 8 bytes does not start"),
        (2**31 - 1, "a string of 8 bytes does not start"),
        (2**31, None),
        (2**31 + 1, "goes on after its last latent"),
        (2**63 - 1, "goes on after its last latent"),
        (2**63, "a string of 8 bytes does not start"),
        (2**64 - 1, "a string of 8 bytes does not start"),
    ],
)
def test_a_string_starts_and_ends_in_states_that_exist(state, expected):
    string = state.to_bytes(8, "little")
    if expected is None:
        assert decode(string, [], TABLES).tolist() == []
    else:
        with pytest.raises(FreqdoorError, match=expected):
            decode(string, [], TABLES)


def escape(nibbles: list[int]) -> bytes:
    """A string of one escaped symbol in row 1, with these nibbles."""
    return pushed([(65_535, 1, 2**16), *((nibble, 1, 2**4) for nibble in nibbles)])


def test_escapes_have_one_spelling():
    assert decode(escape([0]), [1], TABLES) == [11]  # row 1 codes 10, then escapes: 0 is the next value
    assert decode(escape([1, 1]), [1], TABLES) == [9]
    assert decode(escape([2, 0, 1]), [1], TABLES) == [11 + 8]
    assert decode(escape([7, *[15] * 7]), [1], TABLES) == [10 - 2**27]
    for nibbles in ([1, 0], [2, 1, 0], [7, *[15] * 6, 0], [8, *[1] * 8], [15, 15, *[1] * 30]):
        with pytest.raises(FreqdoorError, match="holds a latent that no encoder writes"):
            decode(escape(nibbles), [1], TABLES)


@pytest.mark.parametrize(
    ("cdfs", "lengths", "offsets", "expected"),
    [
        ([[0, 1, 65_536]], [2], [0], "a length from 3 to the row's 3 entries, found 2 in row 0"),
        ([[0, 1, 65_536]] * 2, [3, 4], [0, 0], "a length from 3 to the row's 3 entries, found 4 in row 1"),
        ([[0, 1, 65_536]] * 2, [3, -1], [0, 0], "a length from 3 to the row's 3 entries, found -1 in row 1"),
        ([[0, 1, 65_536]], [3, 3], [0], "found 1 CDFs, 2 lengths and 1 offsets"),
        ([[0, 1, 65_536]], [3], [0, 0], "found 1 CDFs, 1 lengths and 2 offsets"),
        ([[0, 1, 65_536]] * 2, [3], [0], "found 2 CDFs, 1 lengths and 1 offsets"),
        ([[0, 1, 65_536], [1, 2, 65_536]], [3, 3], [0, 0], "a CDF that starts at 0, found 1 in row 1"),
        ([[0, 1, 65_535, 65_536]], [3], [0], "a CDF that ends at 65536, found 65535 in row 0"),
        ([[0, 1, 65_537]], [3], [0], "a CDF that ends at 65536, found 65537 in row 0"),
        ([[0, 0, 65_536]], [3], [0], "a CDF that rises at every entry, found 0 in row 0"),
        ([[0, 65_536, 65_536]], [3], [0], "a CDF that rises at every entry, found 65536 in row 0"),
        ([[0, 5, 4, 65_536]], [4], [0], "a CDF that rises at every entry, found 4 in row 0"),
        ([[0, 5, -(2**31), 65_536]], [4], [0], "a CDF that rises at every entry, found -2147483648 in row 0"),
        ([[0, 1, 65_536]], [3], [2**24 + 1], "an offset within 16777216, found 16777217 in row 0"),
        ([[0, 1, 65_536]], [3], [-(2**31)], "an offset within 16777216, found -2147483648 in row 0"),
        ([[0, 1, 65_536]], [3], [2**32], "offsets of 32 bits, found 4294967296 to 4294967296"),
        ([[0.0, 1.0, 65_536.0]], [3], [0], "CDFs as a 2-dimensional array of integers, found float64 of shape (1, 3)"),
        ([[0, 1], [0, 1, 65_536]], [3], [0], "CDFs as a 2-dimensional array of integers, found object"),
        ([0, 1, 65_536], [3], [0], "CDFs as a 2-dimensional array of integers, found int64 of shape (3,)"),
        ([[0, 1, 65_536]], [[3]], [0], "lengths as a 1-dimensional array of integers, found int64 of shape (1, 1)"),
        (np.zeros(0, np.int32), [3], [0], "CDFs as a 2-dimensional array of integers, found int32 of shape (0,)"),
        (np.zeros((2, 2**23 + 1), np.int8), [3, 3], [0, 0], "at most 16777216 CDFs, found 16777218"),
    ],
)
def test_tables_that_are_none_are_refused(cdfs, lengths, offsets, expected):
    with pytest.raises(FreqdoorError, match="^" + re.escape("coding tables: expected ") + ".*" + re.escape(expected)):
        checked_tables(cdfs, lengths, offsets)


def test_tables_at_the_limits_are_accepted_and_nobody_can_change_them():
    full = np.arange(2**16 + 1)[None]
    offsets = np.array([-(2**24)])
    tables = checked_tables(full, [full.size], offsets)
    symbols = [-(2**24) + value for value in (0, 1, 65_534, 65_535, -1)]
    assert decode(encode(symbols, [0] * 5, tables), [0] * 5, tables).tolist() == symbols
    full[:] = 0
    offsets[:] = 7
    assert (tables.cdfs == np.arange(2**16 + 1)).all()
    assert tables.offsets == [-(2**24)]
    for array in (tables.cdfs, tables.lengths, tables.offsets):
        assert array.dtype == np.int32
        with pytest.raises(ValueError, match="read-only"):
            array[:] = 0


@pytest.mark.parametrize(
    ("name", "buffer", "place", "value", "expected"),
    [
        ("entropy_bottleneck", "_quantized_cdf", (3, 0), 1, "starts at 0, found 1 in row 3"),
        ("entropy_bottleneck", "_cdf_length", (2,), 2**30, "found 1073741824 in row 2"),
        ("gaussian_conditional", "_offset", (5,), -(2**31) + 1, "found -2147483647 in row 5"),
        ("gaussian_conditional", "_quantized_cdf", (63, 9), -1, "rises at every entry, found -1 in row 63"),
    ],
)
def test_a_networks_tables_are_checked_by_name_and_again_after_they_change(name, buffer, place, value, expected):
    net = tiny("lite-hyperprior").net
    check_tables(net)
    model = net.get_submodule(name)
    tables = tables_of(model)
    assert tables_of(model) is tables
    getattr(model, buffer)[place] = value
    with pytest.raises(FreqdoorError, match=f"^{name}: coding tables: .*{expected}"):
        check_tables(net)
    net.update(force=True)
    check_tables(net)
    assert tables_of(model) is not tables
    assert (tables_of(model).cdfs == tables.cdfs).all()


def test_tables_belong_to_their_entropy_model():
    net = tiny("lite-hyperprior").net
    for model, rows in ((net.entropy_bottleneck, 16), (net.gaussian_conditional, 64)):
        buffers = {key: getattr(model, key) for key in ("_quantized_cdf", "_cdf_length", "_offset")}
        for key, buffer in buffers.items():
            setattr(model, key, buffer[:-1])
        with pytest.raises(FreqdoorError, match=f"expected {rows} rows of 16 bits, found {rows - 1} rows of 16 bits"):
            check_tables(net)
        for key, buffer in buffers.items():
            setattr(model, key, buffer)
    check_tables(net)
    net.entropy_bottleneck.entropy_coder_precision = 12
    net.entropy_bottleneck._offset = net.entropy_bottleneck._offset.clone()
    with pytest.raises(FreqdoorError, match="expected 16 rows of 16 bits, found 16 rows of 12 bits"):
        check_tables(net)
    check_tables(
        ARCHITECTURES["lite-hyperprior"].network(**TINY_ARGUMENTS["lite-hyperprior"])
    )  # no tables before `update`


def test_tables_made_in_inference_mode_are_used_too():
    net = tiny("lite-hyperprior").net
    with torch.inference_mode():
        net.update(force=True)
    check_tables(net)
    tables_of(net.entropy_bottleneck)


def both(codec):
    """The codec with our coder, and a copy with CompressAI's."""
    theirs = copy.deepcopy(codec)
    theirs.coder = "compressai"
    return codec, theirs


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_writes_and_reads_the_same_bytes_with_both_coders(architecture):
    ours, theirs = both(tiny(architecture))
    x = natural(3, 70, 90)
    [bitstream], [plain] = ours.compress(x), theirs.compress(x)
    assert plain == replace(bitstream, symbols=())
    assert len(bitstream.symbols) == len(bitstream.strings)
    x_hat = ours.decompress(bitstream)
    for codec, stream in ((theirs, bitstream), (theirs, plain), (ours, plain)):
        assert torch.equal(codec.decompress(stream), x_hat)
    for i, string in enumerate(bitstream.strings):
        for damaged in (string + bytes(4), string[:-4], b"", bytes(8)):
            strings = tuple(damaged if i == j else other for j, other in enumerate(bitstream.strings))
            with pytest.raises(FreqdoorError, match=r": a string .*decode them there$"):
                ours.decompress(replace(bitstream, strings=strings))


@pytest.mark.parametrize("architecture", ["lite-hyperprior", "mbt2018", "elic2022-official"])
def test_other_symbols_than_were_encoded_are_no_picture(architecture):
    codec = tiny(architecture)
    [bitstream] = codec.compress(natural(3, 64, 64))
    y_and_z = sum(number for number, _ in bitstream.symbols)
    net = codec.net
    with torch.no_grad():
        y = net.g_a(codec.padded(natural(3, 64, 64)))
    z = (net.latent_codec["hyper"] if architecture.startswith("elic") else net).h_a(y)
    assert y_and_z == y.numel() + z.numel()
    for i, (number, crc) in enumerate(bitstream.symbols):
        for other in (Symbols(number + 1, crc), Symbols(number, crc ^ 1), Symbols()):
            symbols = tuple(other if i == j else same for j, same in enumerate(bitstream.symbols))
            with pytest.raises(FreqdoorError, match="the decoded latents or the picture's size are not those"):
                codec.decompress(replace(bitstream, symbols=symbols))


def test_a_decoder_that_takes_other_rows_says_so():
    """Drift: h_s gives other scales than where the file was written, by one part in a thousand."""
    codec = tiny("lite-hyperprior")
    [bitstream] = codec.compress(natural(3, 200, 200))
    drifted = copy.deepcopy(codec)
    drifted.net.h_s.register_forward_hook(lambda module, inputs, output: output * 1.001)
    with pytest.raises(FreqdoorError, match="computes other coding tables' rows than the one that wrote them"):
        drifted.decompress(bitstream)


def test_symbols_are_counted_by_string_whatever_the_order():
    with coder.tallied() as tally:
        strings = [encode(values, [0] * len(values), TABLES) for values in ([0, 1], [2], [0, 1])]
        other = encode([10], [1], TABLES)
        decoded = [decode(other, [1], TABLES), *(decode(strings[i], [0] * n, TABLES) for i, n in ((2, 2), (1, 1)))]
    assert [row.tolist() for row in decoded] == [[10], [0, 1], [2]]
    assert tally.encoded == tally.decoded
    assert symbols_of([*strings, b"unseen"], tally.encoded)[3] == Symbols()
    crc = zlib.crc32(struct.pack("<2i", 0, 1))
    assert symbols_of(strings[:1], tally.encoded) == (Symbols(2, crc),)
    coded = {b"s": {Symbols(1, 2**32 - 1), Symbols(2, 3)}}
    assert symbols_of([b"s"], coded) == (Symbols(3, 2),)
    encode([0], [0], TABLES)
    assert len(tally.encoded) == 3  # nothing is kept outside the block


def test_compressais_coder_is_as_it_was_afterwards():
    places = [(EntropyModel, "compress"), (EntropyModel, "decompress"), (google, "RansDecoder"), (ans, "RansEncoder")]
    before = [vars(owner)[name] for owner, name in places]
    codec = tiny("mbt2018")
    [bitstream] = codec.compress(natural(3, 64, 64))
    with pytest.raises(FreqdoorError):
        codec.decompress(replace(bitstream, strings=(bytes(8),) * 2))
    assert [vars(owner)[name] for owner, name in places] == before
    with coding.coding():
        assert all(vars(owner)[name] is not theirs for (owner, name), theirs in zip(places, before, strict=True))
    codec.coder = "rangecoder"
    with pytest.raises(FreqdoorError, match="coder: expected 'freqdoor' or 'compressai', found 'rangecoder'"):
        codec.compress(natural(3, 64, 64))


def test_networks_may_be_built_and_copied_while_something_is_coded():
    """Each entropy model makes itself a coder of CompressAI's, which has nothing to read."""
    codec = tiny("mbt2018")
    with coding.coding(), ThreadPoolExecutor(1) as other:
        copied = copy.deepcopy(codec.net)
        made = other.submit(ans.RansDecoder).result()
        made.set_stream(encode([0, 1], [0, 0], TABLES))
        made.decode_stream([0], *LISTS)  # another thread's affair, which may go on
    assert copied.entropy_bottleneck.compress(torch.zeros(1, 16, 4, 4))


class OwnCoder(EntropyBottleneck):
    """A stranger's entropy model that overrides a method and calls it by super()."""

    def compress(self, x):
        return super().compress(x)


class OwnContextModel(nn.Module):
    """A stranger's ways to use CompressAI's coder."""

    def by_a_name(self, symbols):
        encoder = BufferedRansEncoder()
        encoder.encode_with_indexes(symbols, [0] * len(symbols), *LISTS)
        return encoder.flush()

    def by_the_module(self, symbols):
        return ans.RansEncoder().encode_with_indexes(symbols, [0] * len(symbols), *LISTS)

    def by_a_late_import(self, symbols):
        from compressai.ans import RansEncoder

        return RansEncoder().encode_with_indexes(symbols, [0] * len(symbols), *LISTS)


@pytest.mark.parametrize("way", ["by_a_name", "by_the_module", "by_a_late_import"])
def test_networks_of_ones_own_code_by_our_coder_in_any_way(way):
    symbols = [0, 1, 2, 0]
    with coding.coding() as tally:
        string = getattr(OwnContextModel(), way)(symbols)
    assert tally.encoded.keys() == {string}
    assert string == by_hand(symbols, [0] * 4, LISTS)
    with coding.coding("compressai") as tally:
        assert getattr(OwnContextModel(), way)(symbols) == string
    assert not tally.encoded


@pytest.mark.parametrize("kind", [EntropyBottleneck, OwnCoder, EntropyBottleneckVbr])
def test_every_class_of_entropy_models_codes_by_our_coder(kind):
    """A hyper-latent of one value makes CompressAI's encoder write beside its buffer."""
    model = kind(1)
    model.update()
    z = torch.full((2, 1, 1, 1), 3.0)
    with coding.coding() as tally:
        strings = model.compress(z)
        assert torch.equal(model.decompress(strings, (1, 1)), z)
    assert [len(string) for string in strings] == [8, 8]
    assert tally.encoded.keys() == tally.decoded.keys() == set(strings)


def test_context_models_of_latent_codecs_are_changed_too():
    torch.manual_seed(0)
    codec = RasterScanLatentCodec(
        gaussian_conditional=GaussianConditional([0.5, 1.0, 4.0]),
        entropy_parameters=nn.Conv2d(12, 6, 1),
        context_prediction=MaskedConv2d(3, 6, 5, padding=2),
    ).eval()
    codec.gaussian_conditional.update()
    y, params = torch.randn(2, 3, 4, 5) * 4, torch.randn(2, 6, 4, 5)
    with torch.no_grad():
        expected = codec.compress(y, params)
        with coding.coding() as tally:
            coded = codec.compress(y, params)
        assert coded["strings"] == expected["strings"]
        assert tally.encoded
        strings = [coded["strings"][0]] if len(coded["strings"]) == 1 else [[s[0] for s in coded["strings"]]]
        with coding.coding():
            assert torch.equal(codec.decompress(strings, (4, 5), params)["y_hat"], expected["y_hat"])
        strings[0][1] += bytes(4)
        with pytest.raises(FreqdoorError, match="goes on after its last latent"), coding.coding():
            codec.decompress(strings, (4, 5), params)


@pytest.mark.parametrize("architecture", ["lite-hyperprior", "mbt2018", "elic2022-official"])
def test_our_networks_call_nothing_of_compressais_coder(architecture, monkeypatch):
    """By the one thing that would show: its own classes are gone."""
    codec = tiny(architecture)
    [bitstream] = codec.compress(natural(3, 64, 64))

    def gone(*_):
        raise AssertionError("CompressAI's coder was called")

    for name in ("_encoder", "_decoder"):
        for model in codec.net.modules():
            if isinstance(model, EntropyModel):
                monkeypatch.setattr(model.entropy_coder, name, None)
    for module, name, _ in coding._imported(len(sys.modules)):
        monkeypatch.setattr(module, name, gone)
    assert codec.compress(natural(3, 64, 64)) == [bitstream]
    codec.decompress(bitstream)


def test_batches_keep_shapes_means_and_types():
    model = GaussianConditional([0.5, 1.0, 4.0])
    model.update()
    y = torch.randn(3, 4, 5, 2) * 3
    means = torch.randn(3, 4, 5, 2)
    indexes = torch.randint(0, 3, y.shape, dtype=torch.int32)
    strings = model.compress(y, indexes, means)
    with coding.coding():
        assert model.compress(y, indexes, means) == strings
    for arguments in ({}, {"means": means}, {"dtype": torch.float64}):
        expected = model.decompress(strings, indexes, **arguments)
        with coding.coding():
            decoded = model.decompress(strings, indexes, **arguments)
        assert torch.equal(decoded, expected)
        assert decoded.dtype == expected.dtype
    with pytest.raises(ValueError, match=r"shorter|longer"), coding.coding():
        model.decompress(strings[:2], indexes)


@pytest.mark.parametrize("picture", ["kodim05.png", "kodim19.png"])
def test_pictures_through_the_bundled_codec(picture):
    ours, theirs = both(load_codec("lite-hyperprior:3"))
    x = load_image(KODAK / picture)[..., :384, :384]
    [bitstream] = ours.compress(x)
    assert theirs.compress(x) == [replace(bitstream, symbols=())]
    assert torch.equal(ours.decompress(bitstream), theirs.decompress(bitstream))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def threads_of(codec, run) -> dict[str, set[int]]:
    """On how many threads each part of the network runs."""
    seen: dict[str, set[int]] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda module, inputs, name=name: seen.setdefault(name, set()).add(torch.get_num_threads())
        )
        for part in ("g_a", "g_s", "h_a", "h_s")
        for name, module in ((part, getattr(codec.net, part)[1]),)
    ]
    run()
    for hook in hooks:
        hook.remove()
    return seen


def test_all_but_g_a_and_g_s_runs_on_one_thread_and_files_do_not_depend_on_threads(threads):
    codec = load_codec("lite-hyperprior:3")
    x = load_image(KODAK / "kodim01.png")
    streams, pictures = [], []
    for number in (1, 2, 3):
        threads(number)
        seen = threads_of(codec, lambda: streams.append(codec.compress(x)[0]))
        assert seen == {"g_a": {number}, "h_a": {1}, "h_s": {1}}
        seen = threads_of(codec, lambda: pictures.append(codec.decompress(streams[0])))
        assert seen == {"g_s": {number}, "h_s": {1}}
        assert torch.get_num_threads() == number
    assert all((picture - pictures[0]).abs().max() < 1e-5 for picture in pictures)
    with pytest.raises(FreqdoorError):
        codec.decompress(replace(streams[0], strings=(b"", b"")))
    assert torch.get_num_threads() == 3


def test_where_nothing_can_be_kept_the_loops_are_compiled_each_time(monkeypatch):
    kept = []

    def njit(signature, *, cache, boundscheck):
        kept.append(cache)
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda loop: loop

    monkeypatch.setattr(numba, "njit", njit)
    loops = coder._compiled.__wrapped__()
    assert loops == (coder._encode_loop, coder._decode_loop)
    assert kept == [True, False, False]


def test_numba_is_not_imported_before_something_is_coded():
    assert not re.search(r"^(import|from) numba", Path(coder.__file__).read_text(), re.MULTILINE)
