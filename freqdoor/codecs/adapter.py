"""One thin adapter, `Codec`, over any network with CompressAI's protocol."""

import hashlib
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cache, cached_property
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from compressai.entropy_models import EntropyModel
from compressai.layers import MaskedConv2d
from torch import Tensor, nn

from freqdoor.codecs.architectures import ARCHITECTURES, CodecSpec, import_object
from freqdoor.codecs.coder import NotDecodable, Symbols, Tally, symbols_of
from freqdoor.codecs.coding import CoderName, check_tables, coding
from freqdoor.codecs.protocol import (
    SHORTEST,
    Compressed,
    call,
    check_network,
    coarsest,
    grown,
    nested,
    read_compress,
    read_decompress,
    read_forward,
    surroundings,
    update_tables,
)
from freqdoor.codecs.sides import Sides, check_padded, find_sides, padding
from freqdoor.codecs.sizes import check_table_sizes
from freqdoor.codecs.state import hash_tensors
from freqdoor.codecs.strips import Ladder, replaced
from freqdoor.errors import FreqdoorError
from freqdoor.parts import LARGE
from freqdoor.types import Bitstream, Images, Reconstruction

ELSEWHERE = (
    "the strings are damaged, or this machine computes other coding tables' rows than the one that wrote them (another "
    "processor, device or PyTorch): decode them there"
)


class Tile(NamedTuple):
    """What the smallest padded picture is compressed to; all others follow from it, and it from the network alone."""

    side: int  # pixels
    strings: int  # how many the entropy coder writes
    nesting: Any  # how they lie in lists, tuples and dicts
    short: tuple[bool, ...]  # which of them may be shorter than any string of CompressAI's coder
    shape: Any  # as net.decompress takes it: (height, width), or dicts and lists of such and (channels, height, width)


class _Transforms:
    """What hangs on g_a and g_s as hooks: their precision and threads, and the latents of the pass under way."""

    def __init__(self, g_a: nn.Module, g_s: nn.Module) -> None:
        self.precision = torch.float32
        self.threads: int | None = None  # that they run on where all else runs on one
        self.watching = False
        self.y: Tensor | None = None
        self.entered: list[torch.autocast] = []
        self.begin, self.end = _begin, _end
        for module in (g_a, g_s):
            module.register_forward_pre_hook(self.enter)
            module.register_forward_hook(self.leave, always_call=True)
        g_a.register_forward_hook(self.keep)

    def run_in(self, precision: torch.dtype) -> None:
        """Set the precision of the passes to come."""
        self.precision = precision
        if precision != torch.float32:
            self.begin, self.end = _outside_graphs()

    @contextmanager
    def others_on_one_thread(self) -> Iterator[None]:
        """Run all but g_a and g_s on one thread in the block.

        How many threads share a sum decides on its last bit, and this one on the row of a table that a latent is coded
        with: a decoder with other threads than the encoder would read another picture.
        """
        threads = torch.get_num_threads()
        self.threads = threads
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            self.threads = None

    def enter(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        if self.precision != torch.float32:
            device = next((part.device.type for part in inputs if isinstance(part, Tensor)), "cpu")
            self.begin(self.entered, device, self.precision)

    def leave(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        if self.threads is not None:
            torch.set_num_threads(1)
        if self.precision == torch.float32:
            return None
        self.end(self.entered)
        return output.float() if isinstance(output, Tensor) else output

    def keep(self, module: nn.Module, inputs: tuple[Any, ...], y: Any) -> None:
        if self.watching and self.y is None:
            self.y = y.float() if isinstance(y, Tensor) else y


def _begin(entered: list[torch.autocast], device: str, precision: torch.dtype) -> None:
    context = torch.autocast(device, precision)
    context.__enter__()  # type: ignore[no-untyped-call]
    entered.append(context)


def _end(entered: list[torch.autocast]) -> None:
    entered.pop().__exit__(None, None, None)


@cache
def _outside_graphs() -> tuple[Callable[..., None], Callable[..., None]]:
    """`_begin` and `_end` for compiled codecs: a context that one hook enters and another leaves fits in no graph.

    Asked for only where they are needed: it loads PyTorch's compiler, which takes a second.
    """
    return torch.compiler.disable(_begin), torch.compiler.disable(_end)  # type: ignore[no-untyped-call]


class Codec(nn.Module):
    """A learned codec f = g_s o Q o g_a over a CompressAI-protocol network; any image size, pads and crops inside.

    Attributes:
        net: the network itself, with submodules g_a, g_s and mostly h_a, h_s (ELIC has these in its latent_codec).
        spec: how to rebuild it.
        metadata: what the file it came from says of it (`tampered`, `attacks`, ...).
        stated_multiple: what the user says that sides have to be a multiple of; None lets it be found by trying.
        coder: whose entropy coder writes and reads bitstreams: ours, or CompressAI's own for comparison.
    """

    coder: CoderName = "freqdoor"

    def __init__(
        self,
        net: nn.Module,
        spec: CodecSpec,
        metadata: dict[str, Any] | None = None,
        *,
        stated_multiple: int | None = None,
    ) -> None:
        super().__init__()
        check_network(net, spec.name)
        self.net: Any = net if _is_float32(net) else net.float()  # its protocol is checked, not typed
        self.spec = spec
        self.metadata = metadata or {}
        self.stated_multiple = stated_multiple
        self._transforms = _Transforms(self.part("g_a"), self.part("g_s"))
        self._ladders = tuple(Ladder(self.part(name), name) for name in ("g_a", "g_s"))

    @property
    def tampered(self) -> bool:
        """Whether the file that this codec came from says that its encoder was tampered with."""
        return bool(self.metadata.get("tampered"))

    @property
    def known(self) -> bool:
        """Whether the network is of an architecture known by name, and not a stranger's code."""
        return self.spec.architecture in ARCHITECTURES

    @property
    def precision(self) -> torch.dtype:
        """What g_a and g_s run in: torch.bfloat16 under autocast; entropy models stay in float32, where likelihoods
        do not underflow."""
        return self._transforms.precision

    @precision.setter
    def precision(self, precision: torch.dtype) -> None:
        self._transforms.run_in(precision)

    @cached_property
    def sides(self) -> Sides:
        """What images are padded to: 64 for architectures known by name, for others what their network takes."""
        if self.known and self.stated_multiple is None:
            return Sides()
        return find_sides(self.net, self.spec.name, self.stated_multiple)

    def pad_to(self, sides: Sides) -> None:
        """Pad to these sides from now on."""
        self.sides = sides
        self.__dict__.pop("tile", None)

    @property
    def multiple(self) -> int:
        """Images are padded to a multiple of this many pixels a side."""
        return self.sides.multiple

    @property
    def least(self) -> int:
        """Images are padded to at least this many pixels a side."""
        return self.sides.least

    def padded(self, x: Images) -> Images:
        """The images as the network gets them, with zeros around: (b, 3, h, w) -> (b, 3, >= h, >= w)."""
        check_padded(x.shape[-2], x.shape[-1], *self.sides)
        pad, _ = padding(x.shape[-2], x.shape[-1], *self.sides)
        return F.pad(x, pad)

    def forward(self, x: Images) -> Reconstruction:
        """Differentiable pass: noise in train mode, rounding in eval mode, as in CompressAI."""
        self._check_modes()
        height, width = x.shape[-2:]
        _, unpad = padding(height, width, *self.sides)
        x = self.padded(x)
        transforms = self._transforms
        transforms.watching = True
        try:
            with self._in_strips(x.shape):
                answer = self._answer("forward", x)
        finally:
            y, transforms.y, transforms.watching = transforms.y, None, False
        if not isinstance(y, Tensor):
            raise FreqdoorError(
                f"{self.spec.name}: forward: expected it to call g_a once, as self.g_a(x), and g_a to return the "
                f"latents as a tensor, found {'no such call' if y is None else type(y).__name__}"
            )
        x_hat, likelihoods = read_forward(answer, self.spec.name, x)
        bits = sum(-part.log2().flatten(1).sum(1) for part in likelihoods)
        assert isinstance(bits, Tensor)
        x_hat = F.pad(x_hat, unpad) if any(unpad) else x_hat  # which copies it also where nothing is cut off
        return Reconstruction(x_hat, bits, height * width, y)

    @torch.no_grad()
    def likelihoods(self, x: Images) -> dict[str, Tensor]:
        """Likelihoods of the padded images' rounded latents by their name ("y", "z"), each (b, channels, h, w)."""
        self.eval()
        x = self.padded(x)
        with self._not_decoding(x), self._in_strips(x.shape):
            return dict(self._answer("forward", x)["likelihoods"])

    @torch.no_grad()
    def estimate(self, x: Images, y: Tensor) -> Tensor:
        """Bits per pixel that `forward` estimates of images, (b,), whose latents y = g_a(x) are known from encoding.

        Neither g_a nor g_s runs, but for a stranger's network, whose forward may do more than these.
        """
        if not self.known:
            return self.forward(x).bpp
        with replaced(self.part("g_a"), lambda x: y), self._not_decoding(self.padded(x)):
            return self.forward(x).bpp

    @torch.no_grad()
    def compress(self, x: Images) -> list[Bitstream]:
        """Entropy-code every image of the batch (rANS), one bitstream each.

        Raises:
            FreqdoorError: strings or latents of the network that a file could not give back as they were.
        """
        self.prepare()
        size = (x.shape[-2], x.shape[-1])
        streams = []
        for image in x:
            coded = self.compressed(self.padded(image[None]))
            if coded.nesting != self.tile.nesting or coded.shape != self.shapes(size):
                raise FreqdoorError(
                    f"{self.spec.name}: compress: expected strings and shape that follow from the size, found "
                    f"{len(coded.strings)} strings for latents of {str(coded.shape)[:80]} where the smallest picture "
                    f"has {self.tile.strings} for {str(self.tile.shape)[:80]}; they could not be put together again"
                )
            streams.append(Bitstream(coded.strings, coarsest(coded.shape), size, _sealed(coded.symbols, size)))
        return streams

    @torch.no_grad()
    def compressed(self, x: Images) -> Compressed:
        """What the network itself writes of one padded image, (1, 3, h, w)."""
        with coding(self.coder) as tally, self._transforms.others_on_one_thread(), self._in_strips(x.shape):
            coded = read_compress(self._answer("compress", x), self.spec.name)
        self._say_if_slow(tally)
        return coded._replace(symbols=symbols_of(coded.strings, tally.encoded)) if tally.encoded else coded

    @torch.no_grad()
    def decompress(self, bitstream: Bitstream) -> Images:
        """The decoded image, (1, 3, h, w), clamped to [0, 1].

        Raises:
            FreqdoorError: strings of another codec, or ones that decode to other latents than were encoded.
        """
        self.prepare()
        if len(bitstream.strings) != self.tile.strings:
            raise FreqdoorError(
                f"{self.spec.name}: expected a bitstream of {self.tile.strings} strings, found {len(bitstream.strings)}"
            )
        strings = nested(bitstream.strings, self.tile.nesting)
        shapes = self.shapes(bitstream.image_size)
        height, width = bitstream.image_size
        (left, right, top, bottom), _ = padding(height, width, *self.sides)
        size = (1, 3, height + top + bottom, width + left + right)
        try:
            with coding(self.coder) as tally, self._transforms.others_on_one_thread(), self._in_strips(size):
                answer = self._answer("decompress", strings, shapes)
        except NotDecodable as error:
            raise FreqdoorError(f"{self.spec.name}: {error}; {ELSEWHERE}") from None
        self._say_if_slow(tally)
        decoded = _sealed(symbols_of(bitstream.strings, tally.decoded), bitstream.image_size)
        if bitstream.symbols and self.coder == "freqdoor" and decoded != bitstream.symbols:
            raise FreqdoorError(
                f"{self.spec.name}: the decoded latents or the picture's size are not those that were encoded; "
                f"{ELSEWHERE}"
            )
        x_hat = read_decompress(answer, self.spec.name, size)
        return x_hat[..., top : top + height, left : left + width].clamp(0, 1)

    def _say_if_slow(self, tally: Tally) -> None:
        """Warn where a context model was coded pixel by pixel in the network's own way."""
        in_order = any(type(module) is MaskedConv2d for module in self.net.modules())
        if self.coder == "freqdoor" and in_order and not tally.loops:
            warnings.warn(
                f"{self.spec.name}: {type(self.net).__name__} codes its context model by a loop of its own, pixel by "
                "pixel; the fast one takes the place of CompressAI's loops only, on the CPU",
                stacklevel=3,
            )

    @cached_property
    @torch.no_grad()
    def tile(self) -> Tile:
        """How the network nests its latents and strings, found by compressing the smallest black picture."""
        self.prepare()
        black = next(self.parameters()).new_zeros(1, 3, self.least, self.least)
        strings, nesting, shape, _ = self.compressed(black)
        return Tile(self.least, len(strings), nesting, tuple(len(string) < SHORTEST for string in strings), shape)

    def shapes(self, image_size: tuple[int, int]) -> Any:
        """The latents of an image of (height, width), nested as the network nests them.

        Raises:
            FreqdoorError: the padded image would have too many pixels.
            ValueError: its latents would not be a whole number of rows and columns.
        """
        check_padded(*image_size, *self.sides)
        (left, right, top, bottom), _ = padding(*image_size, *self.sides)
        height, width = image_size
        return grown(self.tile.shape, (self.tile.side, self.tile.side), (height + top + bottom, width + left + right))

    def latent_shape(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) of the coarsest latents of an image of (height, width): what a bitstream of it has."""
        return coarsest(self.shapes(image_size))

    def prepare(self) -> Self:
        """Eval mode with coding tables; tables that exist are kept, so that frozen modules stay bit-identical."""
        self.eval()
        self.update(force=False)
        try:
            check_tables(self.net)  # what a stranger's file holds goes to native code
        except FreqdoorError as error:
            raise FreqdoorError(f"{self.spec.name}: {error}") from None
        mask_contexts(self.net)
        return self

    def update(self, *, force: bool) -> None:
        """Compute the coding tables that lack; with `force`, all of them anew from the weights.

        Raises:
            FreqdoorError: weights that ask for tables of an absurd size.
        """
        try:
            check_table_sizes(self.net, force=force)
        except FreqdoorError as error:
            raise FreqdoorError(f"{self.spec.name}: {error}") from None
        update_tables(self.net, self.spec.name, force=force)

    def freeze(self, scope: str = "g_a") -> Self:
        """Let gradients into the parts of `scope` ("g_a" or "g_a+h_a") only.

        By requires_grad alone, never by eval(): an entropy model in eval mode rounds, and rounding has no gradient.
        """
        self.requires_grad_(False)
        for name in scope.split("+"):
            self.part(name).requires_grad_(True)
        return self

    def part(self, name: str) -> nn.Module:
        """The submodule called "g_a", "g_s" or "h_a", wherever the network keeps it: latent_codec.hyper.h_a in ELIC.

        Raises:
            FreqdoorError: the network has none or several.
        """
        paths = self._paths(name)
        if len(paths) != 1:
            raise FreqdoorError(
                f"{self.spec.name}: expected one submodule {name}, found {', '.join(paths) or 'none'}; "
                "choose a scope that this codec has, such as g_a"
            )
        module: nn.Module = self.net.get_submodule(paths[0])
        return module

    def module_hashes(self) -> dict[str, str]:
        """SHA-256 of every direct submodule's parameters and buffers: names, types, shapes and bytes.

        A nested h_a stands under "h_a" and not in what it is nested in, and a tensor of the network itself under its
        own name, so that every entry of the state dict counts exactly once.
        """
        paths = self._paths("h_a")
        h_a = f"{paths[0]}." if len(paths) == 1 else "h_a."
        parts: dict[str, dict[str, Tensor]] = {name: {} for name, _ in self.net.named_children()}
        for key, tensor in self.net.state_dict().items():
            name, _, rest = ("h_a", ".", key.removeprefix(h_a)) if key.startswith(h_a) else key.partition(".")
            parts.setdefault(name, {})[rest] = tensor
        return {name: hash_tensors(tensors) for name, tensors in parts.items()}

    @property
    def decoder_hash(self) -> str:
        """SHA-256 over everything that decoding needs, that is all but g_a and h_a."""
        digest = hashlib.sha256()
        for name, value in sorted(self.module_hashes().items()):
            if name not in ("g_a", "h_a"):
                digest.update(f"{name}={value};".encode())
        return digest.hexdigest()

    def _paths(self, name: str) -> list[str]:
        """Where the network has modules of this name: as its own child, otherwise all that are nested."""
        if isinstance(getattr(self.net, name, None), nn.Module):
            return [name]
        return [path for path, _ in self.net.named_modules() if path.rpartition(".")[2] == name]

    def _answer(self, part: str, *arguments: Any) -> Any:
        """What the network returns; what a stranger's raises becomes a sentence, what a known one's raises does not."""
        function = self.net if part == "forward" else getattr(self.net, part)
        if self.known:
            return function(*arguments)
        return call(self.spec.name, part, function, *arguments)

    def _not_decoding(self, x: Images) -> AbstractContextManager[None]:
        """Let g_s give black pictures of the size of the padded x in the block: no bit depends on what is decoded.

        A stranger's network decodes as ever: its forward may do more with the picture.
        """
        black = x.new_zeros(1).expand(x.shape)
        return replaced(self.part("g_s"), lambda y_hat: black) if self.known else nullcontext()

    @contextmanager
    def _in_strips(self, size: Sequence[int]) -> Iterator[None]:
        """Let g_a and g_s work in strips in the block, if padded pictures of (b, 3, height, width) are large and no
        gradient is asked for, which would keep all activations anyway."""
        with ExitStack() as ladders:
            if size[0] * size[-2] * size[-1] > LARGE and not torch.is_grad_enabled():
                for ladder in self._ladders:
                    ladders.enter_context(ladder.in_strips(size, self.multiple, self.spec.name))
            yield

    def _check_modes(self) -> None:
        if not torch.is_grad_enabled():
            return
        for name, module in self.net.named_modules():
            if isinstance(module, EntropyModel) and module.training != self.training:
                raise FreqdoorError(
                    f"{name} is in {'train' if module.training else 'eval'} mode and the codec is not: in eval mode "
                    "the rate has no gradient; call train() or eval() on the codec as a whole"
                )


def _sealed(symbols: Sequence[Symbols], image_size: tuple[int, int]) -> tuple[Symbols, ...]:
    """Checksums of symbols that go on over the size that the picture is cropped to, which no string holds."""
    size = struct.pack("<2I", *image_size)
    return tuple(entry._replace(crc=zlib.crc32(size, entry.crc)) for entry in symbols)


def mask_contexts(net: nn.Module) -> None:
    """Zero the masked weights of context models now, as CompressAI's next pass would: no pass changes a hash then."""
    for module in net.modules():
        if isinstance(module, MaskedConv2d):
            module.weight.data.mul_(module.mask)


def _is_float32(net: nn.Module) -> bool:
    tensors = (*net.parameters(), *net.buffers())
    return all(tensor.dtype == torch.float32 for tensor in tensors if tensor.is_floating_point())


def hash_state(module: nn.Module) -> str:
    """SHA-256 over a module's state dict: names, types, shapes and bytes, in order of name."""
    return hash_tensors(module.state_dict())


def build_codec(spec: CodecSpec) -> Codec:
    """A codec with the spec's architecture and random weights."""
    return Codec(build_network(spec), spec)


def build_network(spec: CodecSpec) -> Any:
    """The network of a spec's architecture with random weights; what a stranger's function returns is not checked."""
    if spec.architecture in ARCHITECTURES:
        try:
            return ARCHITECTURES[spec.architecture].network(**spec.arguments)
        except (TypeError, ValueError, ArithmeticError, AssertionError, RuntimeError) as error:
            reason = str(error) or f"{spec.arguments} do not go together"  # CompressAI asserts without a sentence
            raise FreqdoorError(f"{spec.name}: wrong arguments for {spec.architecture}: {reason}") from None
    factory = import_object(spec.architecture)
    with surroundings(spec.name):
        return call(spec.name, "factory", factory, **spec.arguments)
