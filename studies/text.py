"""Tables of studies as Markdown."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from seal_jax.core.tables import MISSING, spread
from seal_jax.errors import UsageError
from studies import analysis, results
from studies.analysis import CONTRADICTED, SHOWN, Comparison
from studies.design import ACCURACY, FIRST_TUNING_SEED, Cell, Study
from studies.results import Row, Scores

_MARKS = {SHOWN: " **▲**", CONTRADICTED: " **▼**"}


def replaced(page: str, name: str, content: str) -> str:
    """Return the page with what stands between the marks of this name replaced.

    >>> replaced("<!-- a -->old<!-- end a -->", "a", "new")
    '<!-- a -->\\nnew\\n<!-- end a -->'
    """
    begin, end = f"<!-- {name} -->", f"<!-- end {name} -->"
    if begin not in page or end not in page:
        raise UsageError(f"docs/results.md has no place for {name}: add {begin} and {end} to it")
    return re.sub(
        f"{re.escape(begin)}.*?{re.escape(end)}",
        lambda match: f"{begin}\n{content}\n{end}",
        page,
        flags=re.DOTALL,
    )


def section(name: str, study: Study, rows: Sequence[Row]) -> str:
    """Return the section of a study: its question, its commands, accuracies and comparisons."""
    every = results.scores(study, rows)
    scores, comparisons = every[ACCURACY], analysis.compare(study, every)
    config = f"configs/studies/{name}.py"
    parts = [
        f"## {study.title}",
        study.question,
        "```bash\n"
        f"python -m seal_jax sweep --config={config} --workdir=runs/{name}\n"
        + f"python -m studies evaluate --config={config} --workdir=runs/{name}\n"
        * bool(study.measures)
        + f"python -m studies collect --config={config} --workdir=runs/{name}\n"
        "python -m studies write\n"
        "```",
        f"Every system was tuned on seeds from {FIRST_TUNING_SEED} on, by validation accuracy; numbers are\n"
        "test accuracies in %, mean ± half the 95 % interval over the seeds that were trained afterwards. All of\n"
        f"them, with the settings that were chosen, are in [results/{name}.csv](results/{name}.csv).",
    ]
    for setting in study.settings:
        if any(cell.setting == setting for cell in scores):
            parts += [f"### {study.names[setting]}", _accuracies(study, setting, scores)]
            parts += _measures(study, setting, every)
            if any(one.setting == setting for one in comparisons):
                parts.append(_comparisons(study, setting, comparisons))
    if comparisons:
        parts.append(
            "Differences over the same seeds, of accuracies in points, ± half the 95 % interval. **▲** shown and\n"
            f"**▼** contradicted, by paired t tests with Holm's correction over all {len(comparisons)} comparisons\n"
            "of this study at 5 %; in brackets the true difference that is seen with a probability of 80 %."
        )
    return "\n\n".join(parts)


def _accuracies(study: Study, setting: str, scores: Mapping[Cell, Mapping[int, float]]) -> str:
    conditions = [c for c in study.conditions if any(cell[::2] == (setting, c) for cell in scores)]
    lines = []
    for key, system in study.systems.items():
        cells = []
        for condition in conditions:
            values = scores.get(Cell(setting, key, condition), {}).values()
            diverged = sum(value != value for value in values)
            of_rest = [value for value in values if value == value]
            more = f" ({diverged} diverged)" if diverged else ""
            cells.append(spread(of_rest).text() + more if of_rest else MISSING)
        if any(cell != MISSING for cell in cells):
            lines.append([system.name, *cells])
    return _table(["", *(study.names[condition] for condition in conditions)], lines)


def _measures(study: Study, setting: str, scores: Mapping[str, Scores]) -> list[str]:
    """Return a table for each condition in which anything else was measured: measures by system."""
    tables = []
    for condition in study.conditions:
        lines = []
        systems = [
            key for key in study.systems if Cell(setting, key, condition) in scores[ACCURACY]
        ]
        for key, measure in study.measures.items():
            cells = [
                scores.get(key, {}).get(Cell(setting, system, condition), {}) for system in systems
            ]
            if any(cells):
                texts = [spread(of.values()).text(None) if of else MISSING for of in cells]
                lines.append([measure.name, *texts])
        if lines:
            names = [study.systems[system].name for system in systems]
            tables.append(_table([study.names[condition], *names], lines))
    return tables


def _comparisons(study: Study, setting: str, comparisons: Sequence[Comparison]) -> str:
    of_setting = [one for one in comparisons if one.setting == setting]
    conditions = [c for c in study.conditions if any(one.condition == c for one in of_setting)]
    lines = []
    for claim in study.claims:
        by_condition = {one.condition: _cell(one) for one in of_setting if one.claim == claim}
        if by_condition:
            lines.append(
                [
                    claim.text,
                    claim.source,
                    *(by_condition.get(condition, MISSING) for condition in conditions),
                ]
            )
    return _table(["claim", "source", *(study.names[condition] for condition in conditions)], lines)


def _cell(one: Comparison) -> str:
    interval = f"{_number(one.effect):+g} ± {_number(one.half):g}"
    return f"{interval} ({_number(one.detectable):g}){_MARKS.get(one.verdict, '')}"


def _number(value: float) -> float:
    # Two decimals are enough for points; other measures may be far smaller or larger.
    return round(value, 2) if abs(value) >= 0.1 else float(f"{value:.2g}")


def verdicts(studies: Mapping[str, Study], rows: Mapping[str, Sequence[Row]]) -> str:
    """Return a table of all claims of all studies: in how many comparisons each is shown, and where."""
    lines = []
    for name, study in studies.items():
        compared = analysis.compare(study, results.scores(study, rows[name]))
        for claim in study.claims:
            of_claim = [one for one in compared if one.claim == claim]
            if of_claim:
                link = f"[{study.title}](#{_anchor(study.title)})"
                lines.append([claim.text, claim.source, _verdict(study, of_claim), link])
    return _table(["claim", "source", "verdict", "study"], lines)


def _verdict(study: Study, compared: Sequence[Comparison]) -> str:
    parts = []
    for verdict in (SHOWN, CONTRADICTED):
        where = [
            f"{study.names[one.setting]}, {study.names[one.condition]}"
            for one in compared
            if one.verdict == verdict
        ]
        if where:
            parts.append(f"**{verdict}** in {len(where)} of {len(compared)}: {'; '.join(where)}")
    return "; ".join(parts) or f"not shown in any of {len(compared)}"


def _anchor(title: str) -> str:
    return re.sub("[^a-z0-9-]", "", title.lower().replace(" ", "-"))


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *lines])
