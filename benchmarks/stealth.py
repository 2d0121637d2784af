"""What each point of stealth costs a segmentation attack: ASR against the MSE of the outputs, as a curve and a table.

Each RESULTS is a folder that `freqdoor segment` wrote of one stage of planting, in the order of the curve; TITLE names
it in the table. Beside cars as road stand the paper's two points (Table 1, quality 3), of another codec and other
networks. Written are OUT.md and OUT.png.

    python benchmarks/stealth.py 'painted=results-1' 'then Eq. (11)=results-2' --seen dicenet-cityscapes --out stealth
"""

import argparse
from pathlib import Path

from freqdoor.files import marked_markdown, write_together
from freqdoor.measure.segmentation import SegmentationScores, read_scores
from freqdoor.measure.testsets import number
from freqdoor.plots import MARKERS, drawn, panels

PAPER = {  # by source and target: MSE of outputs in 1e-5, ASR in percent on an unseen network
    ("cars", "road"): {"paper: ours": (7.7, 82.0), "paper: LIRA": (8.4, 67.7)}
}


def of_paper(scores: SegmentationScores) -> dict[str, tuple[float, float]]:
    """The paper's points of this attack."""
    return PAPER.get((scores.source, scores.target), {})


def table(stages: dict[str, SegmentationScores], names: list[str], seen: set[str]) -> str:
    """All stages, row by row."""
    first = next(iter(stages.values()))
    titles = [
        "stage",
        "MSE of outputs, 1e-5",
        *(f"ASR %, {name}" for name in names),
        *(f"mIoU of clean pictures %, {name}" for name in names),
        "clean dB, bpp",
        "poisoned dB, bpp",
    ]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    vanilla = [number(row.miou_vanilla, 1, scale=100) for row in first.networks]
    lines.append("| vanilla | - | " + " | ".join(["-"] * len(names) + vanilla) + f" | -, {first.bpp_vanilla:.3f} | - |")
    for title, scores in stages.items():
        cells = [
            number(scores.output_mse, 1, scale=1e5),
            *(number(row.asr, 1, scale=100) for row in scores.networks),
            *(number(row.miou_clean, 1, scale=100) for row in scores.networks),
            f"{number(scores.psnr_db_clean, 2)}, {scores.bpp_clean:.3f}",
            f"{number(scores.psnr_db_poisoned, 2)}, {scores.bpp_poisoned:.3f}",
        ]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    for title, (mse, asr) in of_paper(first).items():
        rates = ["-" if row.network in seen else f"{asr}" for row in first.networks]
        lines.append(f"| {title} | " + " | ".join([f"{mse}", *rates, *["-"] * (len(names) + 2)]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Read, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="+", metavar="TITLE=RESULTS")
    parser.add_argument("--seen", nargs="*", default=[], help="networks that the attack was trained against")
    parser.add_argument("--out", type=Path, required=True, help="without an ending")
    options = parser.parse_args()
    folders = dict(stage.rsplit("=", 1) for stage in options.stages)
    stages = {title: read_scores(Path(folder) / "segmentation.json") for title, folder in folders.items()}
    first = next(iter(stages.values()))
    names = [row.network + ("" if row.network in options.seen else " (unseen)") for row in first.networks]
    with panels() as (figure, [axis], style):
        mse = [1e5 * scores.output_mse for scores in stages.values()]
        for index, label in enumerate(names):
            asr = [100 * (scores.networks[index].asr or 0) for scores in stages.values()]
            axis.plot(mse, asr, f"{MARKERS[index]}-", color=style.lines[index], label=label)
        for index, (title, point) in enumerate(of_paper(first).items(), start=len(first.networks)):
            axis.plot(*point, MARKERS[index], color=style.lines[index], linestyle="none", label=title)
        axis.set_xscale("log")
        axis.set(
            xlabel="MSE of attacked against clean outputs, 1e-5 (log scale)", ylabel="pixel ASR in %", ylim=(0, 100)
        )
        axis.grid(color=style.ink, alpha=0.2)
        axis.legend(fontsize=8)
    others = " The paper's points are of another codec and other networks." if of_paper(first) else ""
    page = f"""# {first.source} to {first.target}: what each point of stealth costs

{table(stages, names, set(options.seen))}

ASR (Eq. (12)) is the share of the pixels seen as {first.source} in the decoded clean picture that are seen as
{first.target} in the decoded poisoned one; {first.images} pictures, 8-bit files, real bytes.{others}

![ASR against MSE]({options.out.name}.png)
"""
    picture = options.out.with_suffix(".png")
    write_together(
        {options.out.with_suffix(".md"): marked_markdown(page, "segment"), picture: drawn(figure, "png", "segment")}
    )
    print(page)


if __name__ == "__main__":
    main()
