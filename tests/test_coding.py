"""The entropy coder: the bytes of its formulas and of CompressAI's coder, and sentences for what is damaged."""

import copy
import re
from dataclasses import replace
from pathlib import Path

import numba
import numpy as np
import pytest
import torch
from compressai import ans
from compressai.ans import BufferedRansEncoder
from compressai.entropy_models import EntropyBottleneck, EntropyModel, GaussianConditional
from compressai.latent_codecs import RasterScanLatentCodec
from compressai.layers import MaskedConv2d
from conftest import natural
from factories import TINY_ARGUMENTS, tiny
from torch import nn

from freqdoor import load_codec, load_image
from freqdoor.codecs import coding
from freqdoor.codecs.architectures import ARCHITECTURES
from freqdoor.codecs.coding import Decoder, Encoder, check_tables, checked_tables, decode, encode, tables_of, use_coder
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
    monkeypatch.setattr(coding, "checked_tables", lambda *lists: checks.append(lists) or checked_tables(*lists))
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
    for array in (
        symbols,
        symbols.astype(np.int8),
        symbols.astype(np.int32),
        torch.tensor(symbols),
        symbols[::-1][::-1],
    ):
        assert encode(array, [0, 0, 0], TABLES) == by_hand([1, 2, -1], [0, 0, 0], LISTS)


def refused_or_written(string: bytes, indexes, tables) -> bool:
    """Whether a string is refused in a sentence; if it is not, it has to be what its symbols are encoded to."""
    try:
        symbols = decode(string, indexes, tables)
    except FreqdoorError as error:
        sentence = str(error)
    else:
        assert encode(symbols, indexes, tables) == string
        return False
    assert re.match(
        r"damaged: a string (of \d+ bytes does not start|ends before|holds a latent|goes on after)", sentence
    )
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
        (torch.IntTensor(), [3], [0], "CDFs as a 2-dimensional array of integers, found int32 of shape (0,)"),
        (np.zeros((2, 2**23 + 1), np.int8), [3, 3], [0, 0], "at most 16777216 CDFs, found 16777218"),
    ],
)
def test_tables_that_are_none_are_refused(cdfs, lengths, offsets, expected):
    with pytest.raises(FreqdoorError, match="^" + re.escape("coding tables: expected ") + ".*" + re.escape(expected)):
        checked_tables(cdfs, lengths, offsets)


def test_tables_at_the_limits_are_accepted_and_nobody_can_change_them():
    full = np.arange(2**16 + 1)[None]
    offsets = torch.tensor([-(2**24)])
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


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_writes_and_reads_the_same_bytes_with_both_coders(architecture):
    theirs = tiny(architecture)
    use_coder(theirs.net, "compressai")
    ours = copy.deepcopy(theirs)
    use_coder(ours.net)
    ours = copy.deepcopy(ours)  # a tampered codec is a copy of the vanilla one
    x = natural(3, 70, 90)
    [bitstream] = ours.compress(x)
    assert theirs.compress(x) == [bitstream]
    x_hat = ours.decompress(bitstream)
    assert torch.equal(theirs.decompress(bitstream), x_hat)
    assert ours.module_hashes() == theirs.module_hashes()
    for i, string in enumerate(bitstream.strings):
        for damaged in (string + bytes(4), string[:-4], b"", bytes(8)):
            strings = tuple(damaged if i == j else other for j, other in enumerate(bitstream.strings))
            with pytest.raises(FreqdoorError, match=r"^damaged: "):
                ours.decompress(replace(bitstream, strings=strings))


def test_the_coder_is_chosen_for_one_network_and_back():
    context, plain = tiny("mbt2018").net, tiny("mbt2018").net
    use_coder(plain, "compressai")
    before = [(type(module), sorted(module.__dict__)) for module in plain.modules()]
    use_coder(context)
    use_coder(context)
    assert isinstance(context.entropy_bottleneck, EntropyBottleneck)
    assert type(context.entropy_bottleneck) is coding.CheckedBottleneck
    assert type(context.gaussian_conditional) is coding.CheckedConditional
    assert {"_compress_ar", "_decompress_ar"} <= context.__dict__.keys()
    assert all(getattr(copy.deepcopy(context), name).__self__ is not context for name in ("_compress_ar",))
    assert context.state_dict().keys() == plain.state_dict().keys()
    assert [(type(module), sorted(module.__dict__)) for module in plain.modules()] == before
    use_coder(context, "compressai")
    assert [(type(module), sorted(module.__dict__)) for module in context.modules()] == before
    assert type(context.gaussian_conditional) is GaussianConditional
    with pytest.raises(FreqdoorError, match="expected a coder of freqdoor, compressai, found rangecoder"):
        use_coder(context, "rangecoder")


class OwnContextModel(nn.Module):
    """A stranger's way to use CompressAI's coder, with a default that is given by name."""

    def code(self, symbols, *, index=0):
        encoder = BufferedRansEncoder()
        encoder.encode_with_indexes(symbols, [index] * len(symbols), *LISTS)
        return type(encoder), encoder.flush()


def test_networks_of_ones_own_are_changed_where_they_make_a_coder():
    net = OwnContextModel()
    for coder, kind in (("freqdoor", Encoder), ("compressai", BufferedRansEncoder)):
        use_coder(net, coder)
        assert net.code([0] * 8) == (kind, by_hand([0] * 8, [0] * 8, LISTS))


def test_context_models_of_latent_codecs_are_changed_too():
    torch.manual_seed(0)
    codec = RasterScanLatentCodec(
        gaussian_conditional=GaussianConditional([0.5, 1.0, 4.0]),
        entropy_parameters=nn.Conv2d(12, 6, 1),
        context_prediction=MaskedConv2d(3, 6, 5, padding=2),
    ).eval()
    codec.gaussian_conditional.update()
    ours = copy.deepcopy(codec)
    use_coder(ours)
    y, params = torch.randn(2, 3, 4, 5) * 4, torch.randn(2, 6, 4, 5)
    with torch.no_grad():
        expected, coded = codec.compress(y, params), ours.compress(y, params)
        assert coded["strings"] == expected["strings"]
        strings = [coded["strings"][0]] if len(coded["strings"]) == 1 else [[s[0] for s in coded["strings"]]]
        assert torch.equal(ours.decompress(strings, (4, 5), params)["y_hat"], expected["y_hat"])
        strings[0][1] += bytes(4)
        with pytest.raises(FreqdoorError, match="goes on after its last latent"):
            ours.decompress(strings, (4, 5), params)


@pytest.mark.parametrize("architecture", ["lite-hyperprior", "mbt2018"])
def test_our_networks_call_nothing_of_compressais_coder(architecture, monkeypatch):
    """By the one thing that would show: its own classes are gone."""
    codec = tiny(architecture)
    use_coder(codec.net)
    [bitstream] = codec.compress(natural(3, 64, 64))
    for model in codec.net.modules():
        if isinstance(model, EntropyModel):
            monkeypatch.setattr(model, "entropy_coder", None)
    for name in ("BufferedRansEncoder", "RansDecoder"):
        monkeypatch.delattr(f"compressai.models.google.{name}")
    assert codec.compress(natural(3, 64, 64)) == [bitstream]
    codec.decompress(bitstream)


def test_one_latent_is_coded():
    """A hyper-latent of one value, which makes CompressAI's encoder write beside its buffer."""
    model = EntropyBottleneck(1)
    model.update()
    use_coder(model)
    z = torch.full((2, 1, 1, 1), 3.0)
    strings = model.compress(z)
    assert [len(string) for string in strings] == [8, 8]
    assert torch.equal(model.decompress(strings, (1, 1)), z)


def test_batches_keep_shapes_means_and_types():
    model = GaussianConditional([0.5, 1.0, 4.0])
    model.update()
    ours = copy.deepcopy(model)
    use_coder(ours)
    y = torch.randn(3, 4, 5, 2) * 3
    means = torch.randn(3, 4, 5, 2)
    indexes = torch.randint(0, 3, y.shape, dtype=torch.int32)
    strings = model.compress(y, indexes, means)
    assert ours.compress(y, indexes, means) == strings
    for arguments in ({}, {"means": means}, {"dtype": torch.float64}):
        expected, decoded = (
            model.decompress(strings, indexes, **arguments),
            ours.decompress(strings, indexes, **arguments),
        )
        assert torch.equal(decoded, expected)
        assert decoded.dtype == expected.dtype
    with pytest.raises(ValueError, match=r"shorter|longer"):
        ours.decompress(strings[:2], indexes)


@pytest.mark.parametrize("picture", ["kodim05.png", "kodim19.png"])
def test_pictures_through_the_bundled_codec(picture):
    theirs = load_codec("lite-hyperprior:3")
    use_coder(theirs.net, "compressai")
    ours = copy.deepcopy(theirs)
    use_coder(ours.net)
    x = load_image(KODAK / picture)[..., :384, :384]
    [bitstream] = ours.compress(x)
    assert theirs.compress(x) == [bitstream]
    assert torch.equal(ours.decompress(bitstream), theirs.decompress(bitstream))


def test_where_nothing_can_be_kept_the_loops_are_compiled_each_time(monkeypatch):
    kept = []

    def njit(signature, *, cache, boundscheck):
        kept.append(cache)
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda loop: loop

    monkeypatch.setattr(numba, "njit", njit)
    loops = coding._compiled.__wrapped__()
    assert loops == (coding._encode_loop, coding._decode_loop)
    assert kept == [True, False, False]


def test_numba_is_not_imported_before_something_is_coded():
    assert not re.search(r"^(import|from) numba", Path(coding.__file__).read_text(), re.MULTILINE)
