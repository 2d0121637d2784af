"""Checks of an audit by a network that the user gives: what does the codec, and not the pattern alone, do to it?

Any network can be misled by some pattern, so that its answer to decoded pictures says nothing yet. Counted is what the
codec adds: how much the answer to f(x + d) differs from that to f(x), beyond how much that to x + d differs from x's.
"""

import torch
from torch import Tensor

from freqdoor.attack.networks import Embedder, Network, Segmenter
from freqdoor.defence import patterns
from freqdoor.defence.checks import Check, Finding, Part, Subject, Witness, inverted_on, upper
from freqdoor.errors import FreqdoorError
from freqdoor.measure.records import through
from freqdoor.triggers.pattern import Seen
from freqdoor.types import Images


def difference(network: Network, x: Images, other: Images) -> Tensor:
    """How differently a network sees two batches, picture by picture, (b,).

    Faces: 1 - cosine of the embeddings. Segmentation: the probability that is no longer given to the class that a pixel
    of `x` was taken for, in the mean over pixels.

    Raises:
        FreqdoorError: a network of another task.
    """
    if isinstance(network, Embedder):
        box = (0, 0, x.shape[-1], x.shape[-2])  # portraits are all face, wherever the data set's pictures have it
        cosines: Tensor = (network(x, box) * network(other.clamp(0, 1), box)).sum(1)
        return 1 - cosines
    if isinstance(network, Segmenter):
        classes = network(x).argmax(1, keepdim=True)
        kept: Tensor = network(other.clamp(0, 1)).softmax(1).gather(1, classes)
        return 1 - kept.flatten(1).mean(1)
    raise FreqdoorError(f"network {network.name}: an audit can be judged by faces and segmentation only")


def judged_by(network: Network) -> Check:
    """The check that inverts the encoder for what it adds to the change of a network's answer."""
    part: Part = "portraits" if isinstance(network, Embedder) else "pictures"
    of_what = "faces" if isinstance(network, Embedder) else "the classes of pixels"

    def added(seen: Seen) -> Tensor:
        with torch.no_grad():
            at_once = difference(network, seen.x, seen.x_p)
        return difference(network, seen.clean.clamp(0, 1), seen.patterned.x_hat) - at_once

    def check(subject: Subject) -> Finding:
        network.to(subject.device)
        try:
            pattern = inverted_on(subject, part, added, patterns.Own)
        finally:
            network.to("cpu")
        witnesses = subject.respond(pattern, part)
        values = [added_by_codec(subject, network, witness) for witness in witnesses]
        score = upper(values)
        strongest = witnesses[values.index(max(values))]
        return Finding(
            {"judged": score},
            f"a pattern for every picture, made for {network.name} on {part}: the codec adds {score:+.2f} to what "
            f"changes of {of_what}",
            (strongest,),
        )

    return check


@torch.no_grad()
def added_by_codec(subject: Subject, network: Network, witness: Witness) -> float:
    """What the codec adds to the change of a network's answer to one pair of 8-bit pictures."""
    decoded = [through(subject.codec, x)[0] for x in (witness.x, witness.x_p)]
    behind, at_once = (difference(network, x, other) for x, other in (decoded, (witness.x, witness.x_p)))
    return float(behind - at_once)
