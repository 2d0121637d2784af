"""`freqdoor reproduce defence`: the matrix of attacks and defences as a page, a file of values and ROC curves."""

import os
from pathlib import Path

from freqdoor.defence import pages
from freqdoor.defence.matrix import DefenceMatrix, auc_interval, defence_matrix, suspicion
from freqdoor.files import check_outputs, marked_json, marked_markdown, write_together
from freqdoor.notes import Note
from freqdoor.paper.settings import DEFENCE
from freqdoor.paper.tables import Cell, Table
from freqdoor.plots import drawn, roc_plot
from freqdoor.training.run import environment
from freqdoor.workers import Runner


def reproduce_defence(
    fleets: Path | str,
    out: Path | str,
    *,
    jobs: int | None = None,
    runner: Runner = "local",
    budget: float | None = None,
    force: bool = False,
    note: Note | None = None,
) -> Table:
    """Measure what the fleets lack, and write defence.md, defence.json and defence.png into `out`.

    Args:
        jobs: members measured side by side, one thread each; by default as many as there are cores.
        runner: where (`workers`).

    Returns:
        AUC and encoders by attack.
    """
    out = Path(out)
    paths = [out / f"{DEFENCE}{ending}" for ending in (".md", ".json", ".png")]
    check_outputs(paths, "reproduce", force=force)
    matrix = defence_matrix(
        fleets, jobs=os.cpu_count() or 1 if jobs is None else jobs, runner=runner, budget=budget, note=note
    )
    page, values, curves = paths
    write_together(
        {
            page: marked_markdown(page_of(matrix), "reproduce"),
            values: marked_json(matrix.model_dump_json(indent=1), "reproduce"),
            curves: drawn(roc_plot(pages.roc_curves(matrix)), "png", "reproduce"),
        }
    )
    return table_of(matrix)


def table_of(matrix: DefenceMatrix) -> Table:
    """AUC of the audit and the number of encoders, by attack."""
    table: Table = {}
    for name, attacks in pages.groups(matrix).items():
        others = pages.honest(matrix, known=attacks[0].known)
        if others:
            area = auc_interval(list(map(suspicion, attacks)), list(map(suspicion, others)))
            table[name] = {"AUC": Cell((area.value,), None), "encoders": Cell((float(len(attacks)),), None)}
    return table


def page_of(matrix: DefenceMatrix) -> str:
    """All tables as Markdown."""
    where = environment()
    late = "\nThe time was up before all was measured; the same command goes on.\n" if matrix.late else ""
    return f"""# Attacks and defences

Made by `freqdoor reproduce {DEFENCE} --runs FLEETS` on the fleets of configs/fleet ({len(matrix.judged)} encoders).
Thresholds come from every second honest encoder of the largest architecture; no other one is in any threshold, and no
tampered one is. Intervals: 95 %, bootstrap over encoders for AUC, exact (Clopper-Pearson) for shares.
{late}
## Audit, without a reference

{pages.audit_table(matrix)}

{pages.alarm_table(matrix)}

An encoder is called tampered where there is a witness or p < 0.01. As `audit` does, measuring stops at the first
witness. Neural Cleanse (Wang et al., S&P 2019) is made anew for codecs, in freqdoor/defence/comparators.py.

![ROC curves]({DEFENCE}.png)

Plantings whose trigger does nothing (less than 1.5 times the bytes and 2 dB) are no backdoors, and in no row:
{", ".join(matrix.failed) or "none"}.

## Guard

On six held-out pictures, cut to 256 pixels, with each encoder's own triggers, as 8-bit files. Counted are images that
the trigger acted on: a quarter more bytes, or 1 dB.

{pages.guard_table(matrix)}

Published detectors of poisoned images, made anew for codecs: mean AUC of poisoned against clean images.

{pages.detector_table(matrix)}

## Repair

The first encoder of every family, repaired with the defaults: no training images, no reference, no trigger.

{pages.repair_table(matrix)}

Measured on {where.processor or where.machine}, torch {where.versions["torch"]}.
"""
