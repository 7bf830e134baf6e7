"""Tables of studies as Markdown."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Mapping, Sequence

from papers import catalogue
from seal_jax.core.tables import MISSING, spread
from seal_jax.errors import UsageError
from studies import analysis, figure, results
from studies.analysis import CONTRADICTED, OPEN, SHOWN, Comparison
from studies.design import (
    ACCURACY,
    FINAL_SEEDS,
    FIRST_TUNING_SEED,
    ONLY_SEEDS,
    OURS,
    Cell,
    Study,
    full,
)
from studies.results import Row, Scores

BEYOND = "beyond these machines"
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
    config, count = f"configs/studies/{name}.py", len(list(study.cells()))
    parts = [
        f"## {study.title}",
        _paragraph(study.question),
        "```bash\n"
        f"python -m seal_jax sweep --config={config} --workdir=runs/{name}\n"
        + f"python -m studies evaluate --config={config} --workdir=runs/{name}\n"
        * bool(study.measures)
        + f"python -m studies collect --config={config} --workdir=runs/{name}\n"
        "python -m studies write\n"
        "```",
        _paragraph(
            _tuning(study),
            f"Test accuracies in %, mean ± half the 95 % interval over the {study.seeds} seeds that were trained",
            "afterwards, without those that diverged; all of them, with the settings that were chosen, are in",
            f"[results/{name}.csv](results/{name}.csv).",
            _at_ends(study, rows),
            f"So far {len(scores)} of {count} cells are trained." if len(scores) < count else "",
        ),
    ]
    if figure.drawable(study, comparisons):
        parts += [
            f"![Differences with intervals](results/{name}.png)",
            _paragraph(
                "What is measured in %; to the right is as claimed. Filled circles: shown or contradicted after Holm's",
                "correction. Where a few are far larger than the others, the axis is logarithmic far from 0.",
            ),
        ]
    for setting in study.settings:
        if any(cell.setting == setting for cell in scores):
            parts += [f"### {study.names[setting]}", _accuracies(study, setting, scores)]
            parts += _measures(study, setting, every)
            if any(one.setting == setting for one in comparisons):
                parts.append(_comparisons(study, setting, comparisons))
    if comparisons:
        parts.append(
            _paragraph(
                "Differences over the same seeds, of what is in % in points, ± half the 95 % interval, which is not",
                "corrected; **▲** shown and **▼** contradicted by paired t tests are, by Holm's method over all",
                f"{len(study.comparisons())} comparisons of this study at 5 %. In parentheses the true difference that",
                "would have been seen with a probability of 80 %.",
            )
        )
    return "\n\n".join(parts)


def _tuning(study: Study) -> str:
    first = FIRST_TUNING_SEED
    if not study.finalists:
        return (
            f"The settings of each system are those of {study.points} points with the best validation accuracy, a mean "
            f"over {ONLY_SEEDS} seeds from {first} on."
        )
    return (
        f"Of {study.points} points of each system's settings, the {study.finalists} with the best validation accuracy "
        f"with seed {first} were trained with the {FINAL_SEEDS} next seeds, and the best of these was chosen."
    )


def _at_ends(study: Study, rows: Sequence[Row]) -> str:
    """Return in how many cells the chosen point lies near an end of a range."""
    chosen = {row.cell: dict(pair.split("=") for pair in row.chosen.split()) for row in rows}
    near = 0
    for cell, values in chosen.items():
        shares = [
            math.log(float(values[full(field).rpartition(".")[2]]) / low) / math.log(high / low)
            for field, (low, high) in study.space(cell.setting, cell.system).items()
        ]
        near += any(min(share, 1 - share) < 0.1 for share in shares)
    return (
        f"In {near} of {len(chosen)} cells a chosen setting is in the outer tenth of its range, on a logarithmic "
        "scale, and one beyond may be better still."
    )


def _paragraph(*parts: str) -> str:
    return textwrap.fill(" ".join(parts), 120)


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
                [value for value in of_seeds.values() if value == value]
                for system in systems
                for of_seeds in [scores.get(key, {}).get(Cell(setting, system, condition), {})]
            ]
            if any(cells):
                texts = [spread(of).text(None) if of else MISSING for of in cells]
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
        by_condition = {
            one.condition: _cell(study, one) for one in of_setting if one.claim == claim
        }
        if by_condition:
            sources = dict.fromkeys(map(claim.source_of, by_condition))
            cells = (by_condition.get(condition, MISSING) for condition in conditions)
            lines.append([claim.text, "; ".join(sources), *cells])
    return _table(["claim", "source", *(study.names[condition] for condition in conditions)], lines)


def _cell(study: Study, one: Comparison, *, marks: bool = True) -> str:
    mark = _MARKS.get(one.verdict, "") if marks else ""
    if one.effect == one.half == 0:
        return "0 in every seed"
    if study.is_percentage(one.claim.measure):
        return f"{one.effect:+.2f} ± {one.half:.2f} ({one.detectable:.1f}){mark}"
    # Other measures may be far smaller or larger.
    return f"{one.effect:+.2g} ± {one.half:.2g} ({one.detectable:.2g}){mark}"


def verdicts(studies: Mapping[str, Study], rows: Mapping[str, Sequence[Row]]) -> str:
    """Return what the studies say of every table and figure of the papers, then of other sources but ourselves."""
    claims: dict[str, list[str]] = {}
    for name, study in studies.items():
        compared = analysis.compare(study, results.scores(study, rows.get(name, ())))
        link = f"[{study.title}](#{_anchor(study.title)})" if name in rows else study.title
        for claim in study.claims:
            planned = [place for of, *place in study.comparisons() if of == claim]
            sources = dict.fromkeys(claim.source_of(condition) for _, condition in planned)
            for source in [of for of in sources if of != OURS]:
                of_source = [
                    one
                    for one in compared
                    if one.claim == claim and claim.source_of(one.condition) == source
                ]
                line = _line([claim.text, _verdict(study, of_source), link])
                claims.setdefault(source, []).append(line)
    lines, left = [], dict(claims)
    for item in catalogue.ITEMS:
        # Drawings of an idea and lists of data sets claim nothing.
        if not {*item.commands} - {"datasets"}:
            continue
        source = f"{item.paper} {item.name}"
        here = [of for of in left if places(of) & places(source)]
        lines += [f"| {of} {line}" for of in here for line in claims[of]]
        if not any(places(of) & places(source) for of in claims):
            verdict = f"{BEYOND}: {item.paper_size or 'not compared'}"
            if item.paper_size == "the same":
                verdict = f"run at its size: [{item.name}](reproduce.md#{_anchor(item.name)})"
            lines.append(_line([source, item.shows, verdict, ""]))
        left = {of: line for of, line in left.items() if of not in here}
    lines += [f"| {of} {line}" for of, of_source in left.items() for line in of_source]
    header = _line(["source", "claim", "verdict", "study"])
    return "\n".join([header, "| --- | --- | --- | --- |", *lines])


def places(source: str) -> set[tuple[str, str, int]]:
    """Return the tables and figures that a text names, after the name of their paper.

    >>> sorted(places("LW Table 3, Figures 2, 4 to 5"))
    [('LW', 'Figure', 2), ('LW', 'Figure', 4), ('LW', 'Figure', 5), ('LW', 'Table', 3)]
    """
    paper, _, names = source.partition(" ")
    named, kind = set(), ""
    for word, first, last in re.findall(r"(?:(Table|Figure)s? )?(\d+)(?: to (\d+))?", names):
        kind = word or kind
        named |= {(paper, kind, n) for n in range(int(first), int(last or first) + 1)}
    # Years and sections are none.
    return {place for place in named if place[1]}


def _verdict(study: Study, compared: Sequence[Comparison]) -> str:
    if not compared:
        return "not trained yet"
    parts = []
    for verdict in (SHOWN, CONTRADICTED, OPEN):
        those = [one for one in compared if one.verdict == verdict]
        where = [
            f"{study.names[one.setting]}, {study.names[one.condition]} ({_cell(study, one, marks=False)})"
            for one in those
        ]
        if verdict == OPEN and len(those) > 1:
            ends = [order(those, key=lambda one: one.effect) for order in (min, max)]
            where = [" to ".join(_cell(study, one, marks=False) for one in ends)]
        if where:
            parts.append(f"**{verdict}** in {len(those)} of {len(compared)}: {'; '.join(where)}")
    return "; ".join(parts)


def _anchor(title: str) -> str:
    return re.sub("[^a-z0-9-]", "", title.lower().replace(" ", "-"))


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(map(_line, [header, rule, *lines]))


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
