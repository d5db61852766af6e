"""The speed of every processor family side by side, as the site has it: python -m bench.overview

Writes the table between the two marks in docs/reference/speed.md, from the speed.json of each folder of bench/results,
and beside it a page for each family, which shows the folder's speed.md.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bench import results
from bench.machine import RESULTS

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "speed.md"
SEEN_FROM_PAGE = "../../bench/results"
MARKS = "<!-- python -m bench.overview writes this -->", "<!-- to here -->"


def reports() -> dict[str, Mapping[str, Any]]:
    """By family."""
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*/speed.json"))}


def table(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: each family's geometric means and worst shapes, on one thread, and the pictures below."""
    lines = [
        "| family | | best of all peers | worst | best library | worst | at its limit |",
        "|---|---|--:|---|--:|---|--:|",
    ]
    for family, report in reports.items():
        for column, title in results.COLUMNS.items():
            rows = results.of_column(report["rows"]["1"], column)
            cells = [f"[{family}](speed-{family}.md)", title.split(", against")[0]]
            for ratios in results.against(rows).values():
                worst = min(ratios, key=ratios.__getitem__)
                cells += [f"{results.geometric_mean(ratios.values()):.2f}", f"{ratios[worst]:.2f} at {worst}"]
            if not report["machine"]["versions"].get("numba"):
                cells[2] += " (without numba)"
            lines.append(f"| {' | '.join([*cells, at_limit(rows)])} |")
    for family in reports:
        lines += [
            "",
            f"![Ratios shape by shape, and times in copies, on {family}]({SEEN_FROM_PAGE}/{family}/speed.png)",
        ]
    return "\n".join(lines)


def at_limit(rows: Iterable[results.Row]) -> str:
    judged = [s for s in map(results.summary, rows) if s.limit is not None]
    return f"{sum(s.at_limit for s in judged)} of {len(judged)}" if judged else "not measured"


def updated(page: str, table: str) -> str:
    """The page with this table between its marks."""
    before, rest = page.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    return f"{before}{MARKS[0]}\n{table}\n{MARKS[1]}{after}"


def family_page(family: str) -> str:
    report = f"{SEEN_FROM_PAGE}/{family}/speed.md"
    return f"""# Speed on {family}

```{{include}} {report}
:start-after: "# Speed"
```
"""


def main() -> None:
    for family in reports():
        PAGE.with_name(f"speed-{family}.md").write_text(family_page(family))
    PAGE.write_text(updated(PAGE.read_text(), table(reports())))
    print(f"written: {PAGE}")


if __name__ == "__main__":
    main()
