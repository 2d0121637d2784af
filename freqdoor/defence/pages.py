"""What `freqdoor reproduce defence` writes: tables by family of attack, ROC curves."""

from collections.abc import Callable, Iterable, Sequence

from freqdoor.defence.matrix import (
    DefenceMatrix,
    Interval,
    Judged,
    MemberGuard,
    auc_interval,
    share_interval,
    suspicion,
)

HONEST_TUNED = ("fine-tuned", "encoder alone")  # what a false alarm would hurt most


def honest(matrix: DefenceMatrix, *, known: bool) -> list[Judged]:
    """Honest encoders that no threshold comes from, of the architecture that was calibrated or of others."""
    return [row for row in matrix.judged if not row.tampered and not row.calibrated and row.known == known]


def groups(matrix: DefenceMatrix) -> dict[str, list[Judged]]:
    """Attacks by what the issue asks of them: family by family, then together."""
    rows = [row for row in matrix.judged if row.tampered]
    families = dict.fromkeys(row.family for row in rows if row.known)
    found = {family: [r for r in rows if r.known and r.family == family] for family in families}
    plain = [r for r in rows if r.known and not r.family.startswith("adaptive")]
    together = {
        "rate and distortion": [r for r in plain if r.family != "semantic"],
        "all, downstream too": plain,
        "all adaptive": [r for r in rows if r.family.startswith("adaptive")],
        "other architectures": [r for r in rows if not r.known],
    }
    return found | {name: members for name, members in together.items() if members}


def audit_table(matrix: DefenceMatrix) -> str:
    """AUC, detections and witnesses by family, Neural Cleanse's AUC beside ours."""
    rows = []
    for name, attacks in groups(matrix).items():
        others = honest(matrix, known=attacks[0].known)
        if not others:
            continue
        found = share_interval(sum(r.verdict == "tampered" for r in attacks), len(attacks))
        ours = auc_interval(list(map(suspicion, attacks)), list(map(suspicion, others)))
        rows.append(
            [
                name,
                str(len(attacks)),
                str(ours),
                str(found),
                str(sum(bool(r.witness) for r in attacks)),
                str(_norm_auc(attacks, others) or "-"),
            ]
        )
    return _table(["attack", "encoders", "AUC", "called tampered", "witnesses", "AUC, Neural Cleanse"], rows)


def _norm_auc(attacks: Sequence[Judged], others: Sequence[Judged]) -> Interval | None:
    a, b = ([row.norm for row in side if row.norm is not None] for side in (attacks, others))
    return auc_interval(a, b) if a and b else None


def alarm_table(matrix: DefenceMatrix) -> str:
    """False alarms on honest encoders that no threshold comes from."""
    known, unknown = honest(matrix, known=True), honest(matrix, known=False)
    tuned = [row for row in known if row.family in HONEST_TUNED]
    rows = []
    for name, members in (
        ("honest, calibrated architecture", known),
        ("of these, fine-tuned", tuned),
        ("honest, other architectures", unknown),
    ):
        if members:
            alarms = share_interval(sum(r.verdict == "tampered" for r in members), len(members))
            undecided = sum(r.verdict == "undecided" for r in members)
            rows.append([name, str(len(members)), str(alarms), str(undecided)])
    return _table(["encoders", "number", "false alarms", "undecided"], rows)


def guard_table(matrix: DefenceMatrix) -> str:
    """Poisoned images that the guard stopped, by family and strength, of those that the trigger acted on."""
    strengths = sorted({strength for row in matrix.guards.values() for strength in row.acted})
    families = _by_family(matrix)
    rows = []
    for family, guards in families.items():
        cells = []
        for strength in strengths:
            acted = [g.acted[strength] for g in guards if strength in g.acted]
            images, stopped = sum(c.images for c in acted), sum(c.stopped for c in acted)
            cells.append(f"{stopped} of {images}")
        alarms = sum(g.clean.stopped for g in guards), sum(g.clean.images for g in guards)
        rows.append([family, str(len(guards)), *cells, f"{alarms[0]} of {alarms[1]}"])
    titles = [f"stopped, strength {strength}" for strength in strengths]
    return _table(["attack", "encoders", *titles, "clean images stopped"], rows)


def detector_table(matrix: DefenceMatrix) -> str:
    """Mean AUC over encoders of published detectors of poisoned images."""
    families = _by_family(matrix)
    names = list(next(iter(matrix.guards.values())).detectors) if matrix.guards else []
    rows = [
        [family, *(f"{sum(g.detectors[name] for g in guards) / len(guards):.2f}" for name in names)]
        for family, guards in families.items()
    ]
    return _table(["attack", *names], rows)


def _by_family(matrix: DefenceMatrix) -> dict[str, list[MemberGuard]]:
    family = {f"{row.fleet}/{row.name}": row.family for row in matrix.judged}
    found: dict[str, list[MemberGuard]] = {}
    for key, guard in matrix.guards.items():
        found.setdefault(family.get(key, "?"), []).append(guard)
    return found


def repair_table(matrix: DefenceMatrix) -> str:
    """Encoders before and after their repair: clean and poisoned."""
    rows = []
    for key, member in matrix.repairs.items():
        for title, row in (("before", member.before), ("after", member.after)):
            for trigger, answers in row.poisoned.items():
                cells = [f"{answer.bpp:.3f} bpp, {answer.psnr_db:.2f} dB" for answer in answers.values()]
                clean = f"{row.clean.bpp:.4f} bpp, {row.clean.psnr_db:.2f} dB"
                rows.append([key, trigger, title, clean, *cells, f"{row.seconds:.0f}", row.verdict or "-"])
    strengths = next((list(next(iter(m.before.poisoned.values()))) for m in matrix.repairs.values()), [])
    titles = [f"poisoned, strength {strength}" for strength in strengths]
    return _table(["encoder", "trigger", "", "clean", *titles, "seconds", "audit"], rows)


def roc_curves(matrix: DefenceMatrix) -> dict[str, tuple[list[float], list[float]]]:
    """The scores of the audit and of Neural Cleanse on tampered and on honest encoders, as `roc_plot` takes them."""
    curves: list[tuple[str, Sequence[Judged], Callable[[Judged], float]]] = []
    for name in ("all, downstream too", "all adaptive", "other architectures"):
        if attacks := groups(matrix).get(name):
            curves.append((f"audit: {name}", attacks, suspicion))
    if plain := [row for row in groups(matrix).get("all, downstream too", []) if row.norm is not None]:
        curves.append(("Neural Cleanse: all, downstream too", plain, lambda row: row.norm or 0.0))
    found = {}
    for label, shown, score in curves:
        if others := [score(row) for row in honest(matrix, known=shown[0].known)]:
            found[label] = [score(row) for row in shown], others
    return found


def _table(titles: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    titles = list(titles)
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])
