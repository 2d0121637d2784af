"""The entropy coder's machine code under valgrind: encodes and decodes hostile inputs and counts invalid accesses.

python tools/memcheck.py --inputs 3000 --json memcheck.json --page

numba's code is compiled for a generic processor and kept before valgrind starts. In valgrind's stacks it is what lies
in no file; errors elsewhere are CPython's, NumPy's and LLVM's own and are counted apart. That valgrind would see an
access outside an array is tried first, with a function that makes one.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from random import Random

import numpy as np


def work(inputs: int) -> None:
    """Encode and decode hostile inputs; what is refused is refused by a FreqdoorError."""
    from freqdoor.errors import FreqdoorError

    place = Path(__file__).parents[1] / "freqdoor/codecs/coder.py"  # without its package, which takes PyTorch along
    spec = importlib.util.spec_from_file_location("coder", place)
    assert spec
    assert spec.loader
    coder = importlib.util.module_from_spec(spec)
    sys.modules["coder"] = coder
    spec.loader.exec_module(coder)
    checked_tables, decode, encode = coder.checked_tables, coder.decode, coder.encode
    assert "torch" not in sys.modules
    random, refused = Random(0), 0
    for _ in range(inputs):
        rows, width = random.randint(1, 4), random.randint(3, 9)
        cdfs = np.zeros((rows, width), np.int32)
        lengths = np.array([random.randint(3, width) for _ in range(rows)], np.int32)
        for row, length in enumerate(lengths):
            cdfs[row, 1 : length - 1] = sorted(random.sample(range(1, 65536), int(length) - 2))
            cdfs[row, length - 1] = 65536
        offsets = np.array([random.choice([0, -3, 5, 2**24, -(2**24)]) for _ in range(rows)], np.int32)
        if random.random() < 0.2:  # tables as no encoder has them
            part = random.choice([cdfs, lengths, offsets])
            part.flat[random.randrange(part.size)] = random.choice([0, -1, 1, 2**31 - 1, -(2**31), 65536, 65537])
        count = random.randint(0, 40)
        indexes = np.array([random.randrange(rows) for _ in range(count)], np.int32)
        symbols = np.array([random.choice([0, 1, 5, -7, 2**20, -(2**26), 2**31 - 1]) for _ in range(count)], np.int32)
        if count and random.random() < 0.2:
            indexes[random.randrange(count)] = random.choice([rows, -1, 2**31 - 1, -(2**31)])
        try:
            tables = checked_tables(cdfs, lengths, offsets)
            try:
                string = encode(np.clip(symbols, -(2**20), 2**20) + 0 * symbols, indexes, tables)
            except FreqdoorError:
                string = random.randbytes(8 + 4 * random.randint(0, 20))
            for changed in (string, mutated(random, string), random.randbytes(random.randint(0, 64))):
                try:
                    decode(changed, indexes, tables)
                except FreqdoorError:
                    refused += 1
            encode(symbols, indexes, tables)
        except FreqdoorError:
            refused += 1
    print(f"{refused} refusals of {inputs} inputs")


def mutated(random: Random, string: bytes) -> bytes:
    data = bytearray(string)
    for _ in range(random.randint(1, 3)):
        data[random.randrange(len(data))] = random.randrange(256)
    return bytes(data[: random.choice([len(data), len(data) // 8 * 4, len(data)])])


def control() -> None:
    """Read behind the end of an array, in machine code that numba made without checks."""
    import numba

    @numba.njit(boundscheck=False)
    def behind(values: np.ndarray, place: int) -> int:
        return values[place]

    print(behind(np.arange(8, dtype=np.int64), 9))


def checked(arguments: list[str], environment: dict[str, str]) -> tuple[int, int, float]:
    """(errors in machine code of numba, other errors, seconds) of this script with `arguments`, under valgrind."""
    with tempfile.NamedTemporaryFile(suffix=".xml") as found:
        began = time.monotonic()
        command = ["valgrind", "--error-limit=no", "--xml=yes", f"--xml-file={found.name}", "--smc-check=all-non-file"]
        subprocess.run([*command, sys.executable, __file__, *arguments], check=True, env=environment)
        errors = ElementTree.parse(found.name).getroot().findall("error")
        seconds = time.monotonic() - began
    errors = [error for error in errors if not error.findtext("kind", "").startswith("Leak_")]
    jitted = [error for error in errors if any(frame.find("obj") is None for frame in error.iter("frame"))]
    return len(jitted), len(errors) - len(jitted), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=3000)
    parser.add_argument("--json", type=Path, help="write what was found")
    parser.add_argument("--page", action="store_true", help="put the table into docs/security.md")
    parser.add_argument("--inside", choices=("work", "control"), help="what valgrind is to run")
    options = parser.parse_args()
    if options.inside:
        work(options.inputs) if options.inside == "work" else control()
        return
    from running import ROOT, report, write

    with tempfile.TemporaryDirectory() as cache:
        environment = dict(os.environ) | {
            "PYTHONMALLOC": "malloc",
            "NUMBA_CPU_NAME": "generic",
            "PYTHONPATH": str(ROOT),
        }
        environment |= {"NUMBA_CACHE_DIR": cache, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        subprocess.run([sys.executable, __file__, "--inside", "work", "--inputs", "5"], check=True, env=environment)
        rows = [("a function that reads behind an array", 1, *checked(["--inside", "control"], environment))]
        inside = ["--inside", "work", "--inputs", str(options.inputs)]
        rows.append(("encode, decode", options.inputs, *checked(inside, environment)))
    rows = [(*row[:-1], round(row[-1])) for row in rows]
    headings = ("what ran", "inputs", "errors in compiled code", "errors elsewhere", "seconds")
    facts = {"valgrind": subprocess.run(["valgrind", "--version"], capture_output=True, text=True).stdout.strip()}
    text = report("memcheck", headings, rows, facts)
    write("memcheck", text, facts | {"rows": rows}, options.json, options.page)
    if rows[0][2] == 0 or rows[1][2]:
        raise SystemExit("valgrind saw errors in the coder, or cannot see any")


if __name__ == "__main__":
    main()
