"""What a codec does on pictures that it should not: rates, modes, threads and channels, one function and one line each.

The pictures are crops of bundled Kodak, and everything is measured with real entropy coding.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from freqdoor.codecs.adapter import Codec
from freqdoor.codecs.check import checked, watched
from freqdoor.codecs.protocol import call
from freqdoor.codecs.sides import evaluating
from freqdoor.defence.checks import crops
from freqdoor.defence.symptoms import Symptom, listed, symptom
from freqdoor.errors import FreqdoorError
from freqdoor.metrics import bpp_of_bytes, psnr_8bit
from freqdoor.samples import pictures
from freqdoor.types import Bitstream, Images, Reconstruction, Result, to_uint8

SIDE, PICTURES = 256, 3  # of the crops
RATE_SLACK = {"rate": 0.25, "rough-rate": 0.05}  # of the estimate; 1 % on the bundled codec, 8 after 800 steps only
STRING_BITS = 64  # and besides, what a string costs however short it is
NOISE_RATIO = 2.0  # of the rate with noise and with rounding, either way; 1.3 on the bundled codec
NOISE_BPP = 0.02  # and at least so many bits
NOISE_DB = 3.0  # likewise of the quality; 1 on the bundled codec
SAME_TRANSFORM = 1e-4  # of the largest latent
THREADS = (1, 2)
LEVELS = 1  # of 255, from which on decoded pictures are others: sums in another order differ in float32's last bits
LEAST_DB = 15.0  # PSNR below which a codec does not code pictures


class Behaviour(Result):
    """What was measured: means over the crops."""

    crops: int
    side: int  # pixels
    bpp_estimated: float
    bpp_real: float
    bpp_noise: float  # estimated in train mode, where noise stands for rounding
    psnr_db: float
    channels: int  # of the latents
    dead_channels: tuple[int, ...]


@dataclass(frozen=True)
class Trial:
    """A codec and pictures to try it on."""

    codec: Codec
    pictures: Sequence[Images]  # (1, 3, h, w), of one size

    @cached_property
    @torch.no_grad()
    def estimated(self) -> list[Reconstruction]:
        """What forward answers in eval mode."""
        self.codec.eval()
        return [self.codec(x) for x in self.pictures]

    @cached_property
    @torch.no_grad()
    def noisy(self) -> list[Reconstruction]:
        """What forward answers in train mode."""
        with training(self.codec):
            return [self.codec(x) for x in self.pictures]

    @cached_property
    def coded(self) -> list[Bitstream]:
        """What the entropy coder writes."""
        with threads(THREADS[0]):
            return [self.codec.compress(x)[0] for x in self.pictures]

    @cached_property
    def decoded(self) -> list[tuple[Tensor | None, Images]]:
        """The latents that come to g_s, and the decoded picture."""
        return self.decode(THREADS[0])

    def decode(self, number: int) -> list[tuple[Tensor | None, Images]]:
        """The same on a number of threads."""
        with threads(number):
            return [watched(self.codec, "g_s", partial(self.codec.decompress, coded)) for coded in self.coded]

    def bpp(self, answers: Sequence[Reconstruction]) -> float:
        """Estimated bits per pixel."""
        return sum(float(answer.bpp) for answer in answers) / len(answers)

    def quality(self, answers: Sequence[Images]) -> float:
        """Mean PSNR of 8-bit pictures in dB."""
        pairs = zip(answers, self.pictures, strict=True)
        return sum(float(psnr_8bit(x_hat.clamp(0, 1), x)) for x_hat, x in pairs) / len(answers)

    @property
    def dead(self) -> tuple[int, ...]:
        """Channels whose rounded latents are one number in all pictures."""
        y = torch.cat([answer.y.transpose(0, 1).flatten(1) for answer in self.estimated], dim=1).round()
        return tuple(torch.nonzero(y.amax(1) == y.amin(1)).flatten().tolist())

    @property
    def measured(self) -> Behaviour:
        """What was measured."""
        real = [bpp_of_bytes(coded.num_bytes, x) for coded, x in zip(self.coded, self.pictures, strict=True)]
        return Behaviour(
            crops=len(self.pictures),
            side=self.pictures[0].shape[-1],
            bpp_estimated=self.bpp(self.estimated),
            bpp_real=sum(real) / len(real),
            bpp_noise=self.bpp(self.noisy),
            psnr_db=self.quality([x_hat for _, x_hat in self.decoded]),
            channels=self.estimated[0].y.shape[1],
            dead_channels=self.dead,
        )


@contextmanager
def threads(number: int) -> Iterator[None]:
    """PyTorch on a number of threads in the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def training(codec: Codec) -> Iterator[None]:
    """Train mode without gradients in the block, with fixed random numbers; afterwards all tensors are as they were."""
    before = {key: value.clone() for key, value in codec.net.state_dict().items()}
    try:
        with evaluating(codec):
            torch.manual_seed(0)
            codec.train()
            yield
    finally:
        for key, value in codec.net.state_dict().items():  # of a network that counts or averages while it trains
            value.copy_(before[key])


def decoder(trial: Trial) -> Iterator[Symptom]:
    """Whether the decoder gives what forward gives."""
    try:
        checked(trial.codec)
    except FreqdoorError as error:
        yield symptom("decoder", "decompress", str(error))


def rate(trial: Trial) -> Iterator[Symptom]:
    """Whether the estimated rate is the real one."""
    estimate = sum(float(answer.bits) for answer in trial.estimated)
    real = sum(8 * coded.num_bytes for coded in trial.coded)
    strings = STRING_BITS * sum(len(coded.strings) for coded in trial.coded)
    for what, slack in RATE_SLACK.items():
        if not abs(real - estimate) <= slack * estimate + strings:
            yield symptom(
                what, "likelihoods", f"forward estimates {estimate / 8:.0f} bytes, and the real ones are {real / 8:.0f}"
            )
            return


def picture(trial: Trial) -> Iterator[Symptom]:
    """Whether decoded pictures look like the original ones."""
    quality = trial.quality([x_hat for _, x_hat in trial.decoded])
    if not quality >= LEAST_DB:
        yield symptom(
            "picture", "g_s", f"decoded pictures do not show what was encoded: their PSNR is {quality:.1f} dB"
        )


@torch.no_grad()
def modes(trial: Trial) -> Iterator[Symptom]:
    """Whether train and eval mode are one codec."""
    codec = trial.codec
    calls: dict[str, Any] = {}  # inputs, options and output

    def keep(part: str, module: nn.Module, *seen: Any) -> None:
        calls[part] = seen

    codec.eval()
    with ExitStack() as hooks:
        for part in ("g_a", "g_s"):
            module = codec.part(part)
            hooks.enter_context(module.register_forward_hook(partial(keep, part), with_kwargs=True))
        codec(trial.pictures[0])
    others = []
    with training(codec):
        for part, (inputs, options, expected) in calls.items():
            answer = call(codec.spec.name, "forward", codec.part(part), *inputs, **options)
            if not (answer - expected).abs().max() <= SAME_TRANSFORM * expected.abs().max():
                others.append(part)
    if others:
        yield symptom(
            "modes",
            others,
            f"{listed(others)} answers otherwise in train mode than in eval mode, so that another codec was trained",
            "replace what acts in train mode only, such as dropout",
        )
        return
    noise, rounding = trial.bpp(trial.noisy), trial.bpp(trial.estimated)
    lost = trial.quality([a.x_hat for a in trial.noisy]) - trial.quality([a.x_hat for a in trial.estimated])
    low, high = sorted((noise, rounding))
    if not (high <= max(NOISE_RATIO * low, low + NOISE_BPP) and lost <= NOISE_DB):
        yield symptom(
            "modes",
            "g_a",
            f"with noise in place of rounding, as in training, it is another codec: {noise:.3f} bpp and not "
            f"{rounding:.3f}, {lost:+.1f} dB",
        )


def thread_count(trial: Trial) -> Iterator[Symptom]:
    """Whether the decoder gives the same on every number of threads: latents bit by bit, pictures up to one level."""
    one, other = THREADS
    expected = trial.decoded
    try:
        answers = trial.decode(other)
    except FreqdoorError as error:
        yield symptom("threads", "decompress", f"written on {one} thread, read on {other}: {error}")
        return
    pairs = list(zip(expected, answers, strict=True))
    if any(a is not None and b is not None and not torch.equal(a, b) for (a, _), (b, _) in pairs):
        yield symptom("threads", "decompress", f"{one} and {other} threads decode other latents from the same strings")
    apart = max(int((to_uint8(a).int() - to_uint8(b).int()).abs().max()) for (_, a), (_, b) in pairs)
    if apart > LEVELS:
        yield symptom(
            "threads", "g_s", f"{one} and {other} threads decode pictures that are up to {apart} of 255 levels apart"
        )


def dead_channels(trial: Trial) -> Iterator[Symptom]:
    """Whether channels of the latents carry nothing."""
    if dead := trial.dead:
        channels = trial.estimated[0].y.shape[1]
        yield symptom(
            "dead-channels",
            (f"g_a: {channel}" for channel in dead),
            f"{len(dead)} of {channels} channels of the latents are the same number in all pictures",
        )


BEHAVIOURS: tuple[Callable[[Trial], Iterator[Symptom]], ...] = (
    decoder,
    rate,
    picture,
    modes,
    thread_count,
    dead_channels,
)


def try_out(codec: Codec) -> tuple[list[Symptom], Behaviour | None]:
    """All that is wrong with what a codec does on pictures, and what was measured; None where it does not run."""
    trial = Trial(codec, crops(pictures(), SIDE, PICTURES))
    found: list[Symptom] = []
    for behaviour in BEHAVIOURS:
        try:
            found += behaviour(trial)
        except FreqdoorError as error:  # a stranger's network raises, or its files cannot be read
            if str(error) not in {row.said for row in found}:
                found.append(symptom("decoder", behaviour.__name__, str(error)))
    try:
        return found, trial.measured
    except FreqdoorError:
        return found, None
