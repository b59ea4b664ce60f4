"""Tables that fit the terminal: words wrap, numbers do not, and what is too wide becomes several tables."""

from __future__ import annotations

from collections.abc import Sequence

import rich.box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from diffattn.cli.terminal.screen import screen, wrapped

# Between two columns.
_GAP = 2
# A column of words is no narrower than this where it has as many: a word a line is no text.
_COMFORTABLE = 24
_NUMERIC = "0123456789–−-+∞<≥≤~"

Rows = Sequence[Sequence[str]]


def show(rows: Rows, console: Console | None = None) -> None:
    """Prints a table behind an empty line, or several with the same leading columns where one is too wide.

    Args:
        rows: cells as text; the first row is the header.
        console: where to print. Default: stderr.
    """
    console = screen() if console is None else console
    for part in parts(rows, console.width):
        console.print()
        widths = _widths(part, console.width)
        if widths is None:
            _records(part, console)
        else:
            console.print(_table(part, widths))


def parts(rows: Rows, width: int) -> list[list[list[str]]]:
    """Returns the table cut into tables that fit a width, each with the leading columns that distinguish its rows.

    >>> [part[0] for part in parts([["name", "a" * 9, "b" * 9], ["x", "1", "2"]], 16)]
    [['name', 'aaaaaaaaa'], ['name', 'bbbbbbbbb']]
    """
    least = [_least(column) for column in zip(*rows, strict=True)]
    keys = _keys(rows)
    fewest = len(_grouped(least, keys, width))
    # Of all ways with as few tables, the one whose widest table is the narrowest.
    chosen = next(found for limit in range(1, width + 1) if len(found := _grouped(least, keys, limit)) == fewest)
    return [[[row[column] for column in (*range(keys), *group)] for row in rows] for group in chosen]


def _grouped(least: Sequence[int], keys: int, width: int) -> list[list[int]]:
    """Returns the columns behind the keys in groups that fit a width beside them, each as large as it can be."""
    groups: list[list[int]] = []
    for place in range(keys, len(least)):
        if groups and _total([least[column] for column in (*range(keys), *groups[-1], place)]) <= width:
            groups[-1].append(place)
        else:
            groups.append([place])
    return groups or [[]]


def _keys(rows: Rows) -> int:
    """Returns how many leading columns it takes to distinguish all rows; one where none do."""
    for count in range(1, len(rows[0])):
        if len({tuple(row[:count]) for row in rows[1:]}) == len(rows) - 1:
            return count if len(rows) > 2 else 1
    return 1


def _is_number(cell: str) -> bool:
    return cell[:1] in _NUMERIC and not cell[1:2].isalpha() and cell_len(cell) <= _COMFORTABLE


def _least(column: Sequence[str]) -> int:
    """Returns the width below which a column of words is hard to read, or a number would be broken."""

    def of(cell: str) -> int:
        return max((cell_len(word) for word in cell.split()), default=0)

    cells = [
        max(map(cell_len, _halves(cell))) if _is_number(cell) or cell[:1] == " " else of(cell) for cell in column[1:]
    ]
    longest = max(map(cell_len, column))
    return max(of(column[0]), min(longest, _COMFORTABLE) if any(map(_is_words, column[1:])) else 0, *cells, 1)


def _halves(cell: str) -> list[str]:
    """Returns a number and the brackets behind it apart, since a line may end between them; any other cell whole.

    >>> _halves("5.70 (5.67, 5.72)"), _halves("27.3 ms")
    (['5.70', '(5.67, 5.72)'], ['27.3 ms'])
    """
    number, bracket, rest = cell.partition(" (")
    return [number, f"({rest}"] if bracket and _is_number(cell) else [cell]


def _fitted(cell: str, width: int) -> str:
    if cell_len(cell) <= width:
        return cell
    halves = _halves(cell)
    return "\n".join(halves) if len(halves) > 1 and max(map(cell_len, halves)) <= width else wrapped(cell, width)


def _is_words(cell: str) -> bool:
    return " " in cell.strip() and not _is_number(cell)


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + _GAP * (len(widths) - 1)


def _widths(rows: Rows, width: int) -> list[int] | None:
    """Returns the width of each column, narrower than its widest cell where words wrap; None where they do not fit."""
    columns = list(zip(*rows, strict=True))
    widths, wanted = [_least(column) for column in columns], [max(map(cell_len, column)) for column in columns]
    spare = width - _total(widths)
    if spare < 0:
        return None
    while spare and (short := [want - have for want, have in zip(wanted, widths, strict=True)]) and max(short) > 0:
        widths[short.index(max(short))] += 1
        spare -= 1
    return widths


def _table(rows: Rows, widths: Sequence[int]) -> Table:
    # Of the two characters between columns one is padding and one the box's.
    table = Table(box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for place, title in enumerate(rows[0]):
        numbers = place > 0 and all(_is_number(row[place]) or not row[place] for row in rows[1:])
        table.add_column(Text(title), justify="right" if numbers else "left", width=widths[place], overflow="fold")
    for row in rows[1:]:
        # As Text, for a str's brackets and colons would be read as markup.
        table.add_row(*(Text(_fitted(cell, width)) for cell, width in zip(row, widths, strict=True)))
    return table


def _records(rows: Rows, console: Console) -> None:
    """Prints each row as lines of its own, where not even two columns fit beside each other."""
    for row in rows[1:]:
        for title, cell in zip(rows[0], row, strict=True):
            line = f"{title}: {cell}" if title else cell
            console.print(wrapped(line, console.width, indent="  "), soft_wrap=True, markup=False, emoji=False)
