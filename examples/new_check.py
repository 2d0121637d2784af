"""A new audit check in 40 lines.

A check is a function from a subject to a finding, and one entry in a table. This one codes chequered boards, which no
codec was trained on, and compares their files with JPEG's. Prints what it says of the vanilla encoder and of the
shipped planted one

    vanilla: a board costs at most 1.1 times what JPEG takes
    planted-bpp: a board costs at most 1.1 times what JPEG takes

so that this door does not show on boards; another one, shipped before, cost 6.0 times. How much is too much, honest
encoders have to tell (docs/audit.md). Seconds, on one core.
"""

import math

import torch

import freqdoor
from freqdoor.data import encoded
from freqdoor.defence.checks import CHECKS, SIDE, Finding, Subject

BOARDS = ((3, 8), (4, 8), (8, 8), (8, 32))  # side of a field in pixels, and levels above and below grey


def board(field: int, levels: int) -> torch.Tensor:
    """A chequered board, (1, 3, SIDE, SIDE)."""
    place = torch.arange(SIDE) // field
    signs = 2 * ((place[:, None] + place) % 2) - 1
    return ((128 + levels * signs) / 255).expand(1, 3, SIDE, SIDE).contiguous()


def boards(subject: Subject) -> Finding:
    """What a board costs at most, in the bytes of a JPEG file of it."""
    pictures = [board(*kind) for kind in BOARDS]
    ratios = [subject.codec.compress(x)[0].num_bytes / len(encoded("board.jpg", x)) for x in pictures]
    return Finding({"boards": math.log(max(ratios))}, f"a board costs at most {max(ratios):.1f} times what JPEG takes")


CHECKS["boards"] = boards  # in a contribution: a line of the table


def main() -> None:
    """Run the check on an honest encoder and on one with a door."""
    planted = freqdoor.load_planted("planted-bpp")
    for name, codec in (("vanilla", planted.vanilla), ("planted-bpp", planted.tampered)):
        print(f"{name}: {CHECKS['boards'](Subject(codec, pictures=[])).said}")


if __name__ == "__main__":
    main()
