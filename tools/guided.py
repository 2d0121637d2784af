"""Fuzzing that is guided by coverage, with atheris where it is installed: targets are functions that read bytes.

python tools/fuzz.py --guided container --seconds 600

It runs until the time is over or a target raises anything but FreqdoorError; that input is then kept.
"""

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

TARGETS = ("container", "coder", "codec", "planted", "settings", "list")


def guide(target: str, seconds: float, keep: Path) -> None:
    """Fuzz one target in a process of its own: atheris ends the process that it runs in."""
    if target not in TARGETS:
        raise SystemExit(f"--guided: expected one of {', '.join(TARGETS)}, found {target}")
    keep.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="corpus-") as corpus:
        limits = [f"-max_total_time={seconds:.0f}", "-timeout=10", "-rss_limit_mb=4096", "-max_len=4096"]
        command = [sys.executable, __file__, target, corpus, *limits, f"-artifact_prefix={keep}/{target}-"]
        raise SystemExit(subprocess.run(command).returncode)


def target_of(name: str, corpus: Path) -> Callable[[bytes], object]:
    """What is called with bytes; good inputs are written into the corpus."""
    import numpy as np
    from factories import tiny

    from freqdoor.attack.planted import load_planted
    from freqdoor.attack.settings import PlantSettings
    from freqdoor.codecs import coder, container, loading
    from freqdoor.data import read_list
    from freqdoor.settings import load_settings

    codec = tiny("lite-hyperprior")
    path = corpus.parent / f"{corpus.name}.input"

    def written(content: bytes) -> Path:
        path.write_bytes(content)
        return path

    if name == "container":
        import torch

        good = container.pack(codec.compress(torch.rand(1, 3, 64, 64))[0], codec)
        (corpus / "good").write_bytes(good[: -container.CHECKSUM.size])

        def repaired(content: bytes) -> object:
            import zlib

            whole = content + container.CHECKSUM.pack(zlib.crc32(content))
            return codec.decompress(container.unpack(whole, codec))

        return repaired
    if name == "coder":

        def coded(content: bytes) -> object:
            numbers = np.frombuffer(content[: len(content) // 4 * 4], np.int32)
            rows, width, count = (int(abs(int(n)) % 5) + 1 for n in [*numbers[:3], 0, 0, 0][:3])
            table = np.resize(numbers[3:] if len(numbers) > 3 else np.zeros(1, np.int32), (rows + 2, width + 3))
            tables = coder.checked_tables(table[:rows], np.abs(table[rows][:rows] % 9), table[rows + 1][:rows])
            return coder.decode(content[12:], np.zeros(count, np.int32), tables)

        return coded
    if name in ("codec", "planted"):
        source = corpus.parent / f"{corpus.name}.safetensors"  # its tensors stay mapped into memory
        if name == "codec":
            loading.save_codec(codec, source)
            state, header = loading.read_tensors(source)
            small = {key: value for key, value in state.items() if value.numel() < 50}
        else:
            from freqdoor.samples import ASSETS

            _, header = loading.read_tensors(ASSETS / "planted-bpp.safetensors")
            small = {}
        (corpus / "good").write_text(json.dumps(header))

        def headed(content: bytes) -> object:
            from safetensors.torch import save_file

            save_file(small, path, metadata={"freqdoor": content.decode("utf-8", "replace")})
            return loading.load_codec(str(path)) if name == "codec" else load_planted(path, codec)

        return headed
    if name == "settings":
        (corpus / "good").write_text('codec = "a:3"\nlmbda = 0.1\n[images]\nfolder = "x"\n')
        return lambda content: load_settings(PlantSettings, written(content))
    (corpus / "good").write_text("a/b.png\r\nc\\d.png\n")
    return lambda content: read_list(written(content))


def main() -> None:
    import atheris

    with atheris.instrument_imports(include=["freqdoor"], exclude=["freqdoor.codecs.coder"]):  # numba compiles it
        import running  # noqa: F401  (puts the suite's small codecs on the path)

        target = target_of(sys.argv[1], Path(sys.argv[2]))
    from freqdoor.errors import FreqdoorError

    def one(content: bytes) -> None:
        with contextlib.suppress(FreqdoorError):
            target(content)

    atheris.Setup([sys.argv[0], *sys.argv[2:]], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
