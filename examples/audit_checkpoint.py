"""Audit a checkpoint.

Asks of a checkpoint whether its encoder has a door, and keeps the witness: `python examples/audit_checkpoint.py
[CHECKPOINT]`, by default the shipped planted encoder. Prints each check as it begins, and then

    tampered: a pattern that nobody sees changes what it writes: the witness shows it
    audit/witness-1.png costs 27.9 times the bytes of audit/witness-1-clean.png, and they differ by 46.0 dB

Ends with the command line's exit code: 0 clean, 1 tampered, 2 undecided. Half a minute, on one core.
"""

import sys
from pathlib import Path

import freqdoor


def main(checkpoint: str | None = None) -> int:
    """Audit it, say what was found, and give the exit code."""
    out = Path("audit")
    codec = freqdoor.load_codec(checkpoint) if checkpoint else freqdoor.load_planted("planted-bpp").tampered
    result = freqdoor.audit(codec, fast=True, out=out, note=print)
    print(f"{result.verdict}: {result.reason}")
    for witness in result.witnesses:
        seen = witness.response
        print(
            f"{out / witness.patterned} costs {seen.ratio:.1f} times the bytes of {out / witness.clean}, "
            f"and they differ by {seen.between_db:.1f} dB"
        )
    return result.exit_code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
