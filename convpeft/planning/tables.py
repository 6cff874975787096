"""Plain-text tables for everything convpeft prints."""

from __future__ import annotations

from collections.abc import Sequence


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return rows under titles in aligned columns; columns of numbers are aligned right.

    Example:
        >>> print(table(("layer", "parameters"), [("a", "1,024"), ("b.c", "8")]))
        layer  parameters
        -----  ----------
        a           1,024
        b.c             8
    """
    widths = [max(len(str(row[column])) for row in (titles, *rows)) for column in range(len(titles))]
    numeric = [all(_is_number(row[column]) for row in rows) for column in range(len(titles))]

    def line(cells: Sequence[str]) -> str:
        aligned = (c.rjust(w) if right else c.ljust(w) for c, w, right in zip(cells, widths, numeric, strict=True))
        return "  ".join(aligned).rstrip()

    return "\n".join([line(titles), line(["-" * width for width in widths]), *map(line, rows)])


def _is_number(cell: str) -> bool:
    return cell.replace(",", "").replace(".", "").replace("-", "").isdigit() or cell == "–"
