"""The tables: rows to Markdown, and Markdown into docs/benchmarks.md.

Sections that were not run stay as they are.
"""

import importlib.metadata
import importlib.util
import os
import platform
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"
RESULTS = PAGE.with_suffix(".json")  # the same tables as data
HEAD = """# Benchmarks

Written by `make bench` (`python -m tests.benchmarks`); not edited by hand. The contenders of a
table took turns in one run. A ratio is the median over the rounds, with their number, the smallest
and the largest; above 1 is better. CPU time is of all processes and threads together.
"""


@dataclass(frozen=True)
class Row:
    name: str
    cells: tuple[str, ...]
    target: str = ""  # what is asked of it, where something is
    met: bool | None = None


@dataclass(frozen=True)
class Table:
    title: str
    note: str  # what was measured and how, in Markdown
    columns: tuple[str, ...]
    rows: Sequence[Row]
    packages: tuple[str, ...] = ()  # whose versions matter here
    missing: Sequence[str] = ()  # peers that are not installed

    def markdown(self) -> str:
        head = ["", *self.columns, "target"]
        lines = [
            head,
            ["---"] * len(head),
            *([row.name, *row.cells, _target(row)] for row in self.rows),
        ]
        parts = [
            f"## {self.title}",
            self.note,
            markdown_table(lines),
        ]
        if self.missing:
            parts.append(f"Left out, since not installed: {', '.join(self.missing)}.")
        return "\n\n".join([*parts, environment(self.packages)]) + "\n"

    def as_json(self) -> dict[str, Any]:
        """Return the same as data, for who compares two runs."""
        rows = [{"name": row.name, "cells": row.cells, "target": _target(row)} for row in self.rows]
        return {"columns": self.columns, "rows": rows, "where": environment(self.packages)}


def markdown_table(lines: Iterable[Sequence[str]]) -> str:
    """Return lines of cells as Markdown; the second one is the rule below the head."""
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _target(row: Row) -> str:
    return f"{row.target}: {'met' if row.met else 'missed'}" if row.met is not None else row.target


def environment(packages: Sequence[str]) -> str:
    """Date, hardware, versions and threads, in one line."""
    versions = [
        f"{name} {importlib.metadata.version(name)}"
        for name in ("torch", "torchvision", *packages)
        if installed(name)
    ]
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    return (
        f"{time.strftime('%Y-%m-%d')}; {_processor()}, {os.cpu_count()} cores, "
        f"{torch.backends.cpu.get_cpu_capability()}; load {load}; "
        f"Python {platform.python_version()}, {', '.join(versions)}; "
        f"torch threads: {torch.get_num_threads()}."
    )


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    model = (
        re.search(r"model name\s*:\s*(.+)", information.read_text())
        if information.exists()
        else None
    )
    return model[1].strip() if model else platform.processor() or platform.machine()


def installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
        return True
    except importlib.metadata.PackageNotFoundError:
        return False


def merge(page: str, tables: Mapping[str, str], order: Sequence[str]) -> str:
    """Return `page` with the given sections (title to Markdown) in place of those of their titles.

    order: of all titles.
    """
    parts = re.split(r"^## (.+)\n", page, flags=re.MULTILINE)[1:]
    sections = {
        title: f"## {title}\n{body}" for title, body in zip(parts[::2], parts[1::2], strict=True)
    } | dict(tables)
    return "\n".join(
        [HEAD, *(sections[title].rstrip() + "\n" for title in order if title in sections)]
    )
