"""The place of our entropy coder in any network: between its entropy models and their strings.

While a codec compresses or decompresses, `coding` puts `coder` where CompressAI's C++ coder would be called: in
`EntropyModel.compress` and `decompress`, in the coder that entropy models of other classes hold, and wherever a module,
a stranger's too, has one of the coder's classes under a name; and `raster` where its loops over pixels are. Afterwards
everything is as it was: CompressAI used without freqdoor is not changed.
"""

import operator
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from types import ModuleType
from typing import Any, Literal, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from compressai import ans
from compressai.entropy_models import EntropyBottleneck, EntropyModel, GaussianConditional
from compressai.entropy_models.entropy_models import _EntropyCoder
from compressai.latent_codecs import rasterscan
from compressai.models import JointAutoregressiveHierarchicalPriors
from torch import Tensor, nn

from freqdoor.codecs.coder import (
    PRECISION,
    Decoder,
    Encoder,
    Integers,
    Tables,
    Tally,
    WholeEncoder,
    checked_tables,
    decode,
    encode,
    tallied,
)
from freqdoor.codecs.raster import Context, decode_pixels, encode_pixels, rows_by_search
from freqdoor.errors import FreqdoorError
from freqdoor.types import check_choice

CoderName = Literal["freqdoor", "compressai"]
TABLES = ("_quantized_cdf", "_cdf_length", "_offset")
THEIRS = {id(getattr(ans, name)): name for name in ("RansEncoder", "BufferedRansEncoder", "RansDecoder")}


class _Memo(NamedTuple):
    buffers: tuple[Tensor, ...]
    versions: tuple[int, ...]  # of the buffers: they count writes
    tables: Tables


_MEMOS: WeakKeyDictionary[nn.Module, _Memo] = WeakKeyDictionary()


def tables_of(model: EntropyModel) -> Tables:
    """The checked tables of an entropy model, checked again only after they changed.

    Raises:
        FreqdoorError: what `checked_tables` refuses, or tables that do not belong to this model.
    """
    buffers = tuple(getattr(model, table) for table in TABLES)
    versions = tuple(-1 if buffer.is_inference() else buffer._version for buffer in buffers)
    memo = _MEMOS.get(model)
    if memo and -1 not in versions and memo.versions == versions and all(map(operator.is_, memo.buffers, buffers)):
        return memo.tables
    tables = checked_tables(*(buffer.detach().cpu().numpy() for buffer in buffers))
    rows = len(tables.lengths)
    if type(model) in (EntropyBottleneck, GaussianConditional):
        rows = model.channels if isinstance(model, EntropyBottleneck) else model.scale_table.numel()
    if (len(tables.lengths), model.entropy_coder_precision) != (rows, PRECISION):
        raise FreqdoorError(
            f"coding tables: expected {rows} rows of {PRECISION} bits, found {len(tables.lengths)} rows of "
            f"{model.entropy_coder_precision} bits"
        )
    _MEMOS[model] = _Memo(buffers, versions, tables)
    return tables


def check_tables(net: nn.Module) -> None:
    """Check the tables of all of a network's entropy models; those that have none yet get theirs from `update`.

    Raises:
        FreqdoorError: which entropy model's tables are no tables, and why.
    """
    for name, model in net.named_modules():
        if not isinstance(model, EntropyModel) or model._offset.numel() == 0:
            continue
        try:
            tables_of(model)
        except FreqdoorError as error:
            raise FreqdoorError(f"{name}: {error}") from None


def _compress(self: Any, inputs: Tensor, indexes: Tensor, means: Tensor | None = None) -> list[bytes]:
    """(b, ...) latents and their rows -> a string for each of the batch: `EntropyModel.compress`."""
    symbols, tables = self.quantize(inputs, "symbols", means), tables_of(self)
    return [encode(*pair, tables) for pair in zip(_rows(symbols), _rows(indexes), strict=True)]


def _decompress(
    self: Any, strings: Sequence[bytes], indexes: Tensor, dtype: torch.dtype = torch.float, means: Tensor | None = None
) -> Tensor:
    """A string for each of the batch and the rows of its latents -> (b, ...) latents: `EntropyModel.decompress`."""
    symbols, tables = torch.empty(indexes.shape, dtype=torch.int32), tables_of(self)
    for row, string, row_indexes in zip(symbols, strings, _rows(indexes), strict=True):
        row.copy_(torch.from_numpy(decode(string, row_indexes, tables)).reshape(row.shape))
    latents: Tensor = self.dequantize(symbols.to(self._quantized_cdf.device), means, dtype)
    return latents


def _rows(batch: Tensor) -> list[Integers]:
    return [cast(Integers, row) for row in batch.detach().flatten(1).to("cpu", torch.int32).contiguous().numpy()]


_SWAPPED = threading.RLock()  # the places are the process's own: one thread codes at a time


@contextmanager
def coding(coder: CoderName = "freqdoor") -> Iterator[Tally]:
    """Let networks code by our coder in the block, or by CompressAI's own; the bitstreams are the same.

    Every string that is decoded has to be read to its end. What is coded is tallied; by CompressAI's coder nothing is.

    Raises:
        FreqdoorError: no such coder; and in the block what `coder` raises.
    """
    check_choice("coder", coder, CoderName)
    with tallied() as tally:
        if coder == "compressai":
            yield tally
            return
        decoders: list[Decoder] = []
        with _SWAPPED, ExitStack() as places:
            for owner, name, ours in (*_places(decoders), *_loops(tally)):
                places.callback(setattr, owner, name, vars(owner)[name])
                setattr(owner, name, ours)
            yield tally
        for decoder in decoders:
            if decoder.begun:
                decoder.finish()


def _places(decoders: list[Decoder]) -> Iterator[tuple[Any, str, Any]]:
    """(owner, name, ours) of every place where CompressAI's coder stands.

    Args:
        decoders: takes every decoder that is made under CompressAI's name for it.
    """

    thread = threading.get_ident()

    def new_decoder() -> Decoder:
        decoder = Decoder()
        if threading.get_ident() == thread:  # others may build a network meanwhile
            decoders.append(decoder)
        return decoder

    def encode_at_once(_: Any, *symbols_indexes_and_tables: Any) -> bytes:
        return WholeEncoder().encode_with_indexes(*symbols_indexes_and_tables)

    def decode_at_once(_: Any, *string_indexes_and_tables: Any) -> list[int]:
        return Decoder().decode_with_indexes(*string_indexes_and_tables)

    yield EntropyModel, "compress", _compress
    yield EntropyModel, "decompress", _decompress
    yield _EntropyCoder, "encode_with_indexes", encode_at_once
    yield _EntropyCoder, "decode_with_indexes", decode_at_once
    ours = {"RansEncoder": WholeEncoder, "BufferedRansEncoder": Encoder, "RansDecoder": new_decoder}
    for module, name, theirs in _imported(len(sys.modules)):
        yield module, name, ours[theirs]


def _loops(tally: Tally) -> Iterator[tuple[Any, str, Any]]:
    """(owner, name, ours) of CompressAI's loops over rows of tables and over pixels, where ours are faster."""
    network = JointAutoregressiveHierarchicalPriors
    compress_ar, decompress_ar = network._compress_ar, network._decompress_ar
    scan, scan_back = rasterscan.raster_scan_compress_single_stream, rasterscan.raster_scan_decompress_single_stream

    def stands_in(owner: str, context: Context, latents: Tensor, kernel_size: int) -> bool:
        fits = context.fits(latents, kernel_size)
        if fits:
            tally.loops.append(owner)
        return fits

    def our_compress_ar(net: Any, y_hat: Tensor, params: Tensor, h: int, w: int, kernel_size: int, padding: int) -> Any:
        context = Context(net.context_prediction, net.entropy_parameters, net.gaussian_conditional)
        if not stands_in(type(net).__name__, context, y_hat, kernel_size):
            return compress_ar(net, y_hat, params, h, w, kernel_size, padding)
        encoder = Encoder()
        encode_pixels(encoder, y_hat, params, context, tables_of(context.conditional))
        return encoder.flush()

    def our_decompress_ar(
        net: Any, string: bytes, y_hat: Tensor, params: Tensor, h: int, w: int, kernel_size: int, padding: int
    ) -> None:
        context = Context(net.context_prediction, net.entropy_parameters, net.gaussian_conditional)
        if not stands_in(type(net).__name__, context, y_hat, kernel_size):
            decompress_ar(net, string, y_hat, params, h, w, kernel_size, padding)
            return
        decoder = Decoder(string)
        decode_pixels(decoder, y_hat, params, context, tables_of(context.conditional))
        decoder.finish()

    def parts_of(kwargs: dict[str, Any]) -> Context:
        parts = (kwargs[name] for name in ("context_prediction", "entropy_parameters", "gaussian_conditional"))
        return Context(*parts, *([kwargs["merge"]] if "merge" in kwargs else []))

    def our_scan(encoder: Any, y: Tensor, params: Tensor, **kwargs: Any) -> Any:
        context = parts_of(kwargs)
        if not isinstance(encoder, Encoder) or not stands_in(
            "RasterScanLatentCodec", context, y, kwargs["kernel_size"]
        ):
            return scan(encoder=encoder, y=y, params=params, **kwargs)
        y_hat = F.pad(y, 4 * (kwargs["padding"],))
        encode_pixels(encoder, y_hat, params, context, tables_of(context.conditional))
        return F.pad(y_hat, 4 * (-kwargs["padding"],))

    def our_scan_back(decoder: Any, params: Tensor, **kwargs: Any) -> Any:
        context = parts_of(kwargs)
        if not isinstance(decoder, Decoder) or not stands_in(
            "RasterScanLatentCodec", context, params, kwargs["kernel_size"]
        ):
            return scan_back(decoder=decoder, params=params, **kwargs)
        height, width = (kwargs[side] + 2 * kwargs["padding"] for side in ("height", "width"))
        y_hat = params.new_zeros(1, context.convolution.in_channels, height, width)
        decode_pixels(decoder, y_hat, params, context, tables_of(context.conditional))
        return F.pad(y_hat, 4 * (-kwargs["padding"],))

    yield GaussianConditional, "build_indexes", rows_by_search
    yield network, "_compress_ar", our_compress_ar
    yield network, "_decompress_ar", our_decompress_ar
    yield rasterscan, scan.__name__, our_scan
    yield rasterscan, scan_back.__name__, our_scan_back


@lru_cache(maxsize=1)
def _imported(modules: int) -> list[tuple[ModuleType, str, str]]:
    """(module, name there, name in `compressai.ans`) of every class of CompressAI's coder that a module has.

    Args:
        modules: how many there are, so that those that come later are looked through too.
    """
    found = [module for module in list(sys.modules.values()) if isinstance(module, ModuleType)]
    return [
        (module, name, THEIRS[id(value)])
        for module in found
        for name, value in list(vars(module).items())
        if id(value) in THEIRS  # some libraries warn when they are asked what a value is
    ]
