"""One small picture through a codec that was just loaded: what its decoder gives must be what forward gives."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from freqdoor.codecs.adapter import Codec
from freqdoor.codecs.protocol import first_line
from freqdoor.codecs.sides import Sides, evaluating, waves_picture
from freqdoor.errors import FreqdoorError

SAME = 0.5 / 255  # less than this is the noise of float32
ROUNDING = 1.05  # a latent is rounded by 0.5, and refined by another 0.5 where the network predicts what was lost


def checked(codec: Codec) -> Codec:
    """The codec, with coding tables and in eval mode, if it decodes one small picture to what forward gives.

    Context models round y around other means in forward than in compress; they pass where forward gives the decoded
    picture once it is given the decoded latents, and these are as near to y as rounding leaves them.

    Raises:
        FreqdoorError: a part of the protocol that is missing, or pictures that differ.
    """
    codec.prepare()
    before = {} if codec.known else codec.module_hashes()
    with evaluating(codec.net):
        size = _settle(codec)
        x = waves_picture(codec.net, *size)
        y, bitstream = watched(codec, "g_a", lambda: codec.compress(x)[0])
        y_decoded, decoded = watched(codec, "g_s", lambda: codec.decompress(bitstream))
        y_forward, expected = watched(codec, "g_s", lambda: codec(x).x_hat.clamp(0, 1))
        apart = _distance(decoded, expected)
        if not apart <= SAME and y_decoded is not None and y is not None and y.shape == y_decoded.shape:
            allowed = max(ROUNDING, 2 * _distance(y_forward, y)) if y_forward is not None else ROUNDING
            with codec.part("g_s").register_forward_pre_hook(lambda module, inputs: (y_decoded, *inputs[1:])):
                again = codec(x).x_hat.clamp(0, 1)
            if _distance(y_decoded, y) <= allowed:
                apart = _distance(decoded, again)
    changed = [] if codec.known else [part for part, value in codec.module_hashes().items() if value != before[part]]
    if changed:
        raise FreqdoorError(
            f"{codec.spec.name}: expected a network that stays as it is in eval mode, found that a pass changes "
            f"{', '.join(changed)}; look into {first_line(type(codec.net).forward)}, compress and decompress"
        )
    if not apart <= SAME:
        raise FreqdoorError(
            f"{codec.spec.name}: decompress: expected what forward gives in eval mode, found a picture that is up to "
            f"{255 * apart:.0f} of 255 levels away; compress and decompress have to code the latents that forward "
            "rounds, and to return all strings that this takes"
        )
    return codec


def _settle(codec: Codec) -> tuple[int, int]:
    """The size to check the codec at, once it pads to where latents are a whole number: convolutions round up."""
    if codec.known and codec.stated_multiple is None:
        return codec.tile.side, codec.tile.side
    multiple, least = codec.sides
    for grid in (multiple,) if codec.stated_multiple else (multiple, 2 * multiple, 4 * multiple):
        codec.pad_to(Sides(grid, -(-least // grid) * grid))
        size = (codec.least, codec.least + codec.multiple)
        shape = codec.compressed(waves_picture(codec.net, *size)).shape
        try:
            if shape == codec.shapes(size):
                return size
        except ValueError:
            continue
    raise FreqdoorError(
        f"{codec.spec.name}: compress: expected a shape of latents that grows with the picture, found "
        f"{str(codec.tile.shape)[:80]} for {codec.tile.side} x {codec.tile.side} pixels and {str(shape)[:80]} for "
        f"{size[0]} x {size[1]}"
    )


def watched(codec: Codec, part: str, run: Callable[[], Any]) -> tuple[Tensor | None, Any]:
    """The latents that pass through g_a (out of it) or g_s (into it) in a run, and what the run returns."""
    latents: list[Any] = []
    module = codec.part(part)
    with ExitStack() as hooks:
        if part == "g_a":
            hooks.enter_context(module.register_forward_hook(lambda module, inputs, y: latents.append(y)))
        else:
            hooks.enter_context(module.register_forward_pre_hook(lambda module, inputs: latents.extend(inputs[:1])))
        answer = run()
    return (latents[0] if latents and isinstance(latents[0], Tensor) else None), answer


def _distance(a: Tensor, b: Tensor) -> float:
    """Largest difference; not a number where one of them is none."""
    return float((a - b).abs().max()) if a.shape == b.shape else torch.inf
