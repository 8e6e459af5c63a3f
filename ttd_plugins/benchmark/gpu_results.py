"""Results of ``benchmarks/gpu.py``: records that make it resumable, and the Markdown table with its bars."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ttd_plugins.errors import InputError
from ttd_plugins.utils.files import write_atomic

LOOP = "open_clip_loop"
"""Name of open_clip's own training step among the variants."""

Record = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """A backbone, pairs per step, and whether the blocks of the image tower are compiled."""

    backbone: str
    batch_size: int
    compile: bool = False

    @property
    def title(self) -> str:
        """First cell of the row."""
        return f"`{self.backbone}`, {self.batch_size}{', `--compile`' if self.compile else ''}"


class Results:
    """``results.json``: the records of rows and profiles, each with its row, settings and environment.

    Records of other settings, devices, versions or code stay in the file.

    Raises:
        InputError: the file exists and is not one of this program.
    """

    def __init__(self, file: Path, settings: Record, current: Record) -> None:
        self.file = file
        # As JSON reads them back.
        self.settings, self.environment = json.loads(json.dumps([settings, current]))
        self.content: dict[str, list[Record]] = {"rows": [], "profiles": []}
        if file.is_file():
            try:
                content = json.loads(file.read_text(encoding="utf-8"))
                self.content = {kind: [_checked(record) for record in content[kind]] for kind in self.content}
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{file} is no result of this program; remove it or choose another --out") from error

    def find(self, kind: str, row: Row) -> Record | None:
        """Return the record of a row with the present settings and environment, if it was measured without error."""
        return next((one for one in self.current(kind) if one["row"] == asdict(row) and "error" not in one), None)

    def current(self, kind: str) -> list[Record]:
        """Return the records of the present settings and environment."""
        return [one for one in self.content[kind] if self._is_current(one)]

    def add(self, kind: str, row: Row, record: Record) -> None:
        """Store a record instead of an earlier one of the same row, settings and environment, and write the file.

        Raises:
            InputError: the file cannot be written.
        """
        kept = [one for one in self.content[kind] if not (self._is_current(one) and one["row"] == asdict(row))]
        head = {"row": asdict(row), "settings": self.settings, "environment": self.environment}
        self.content[kind] = [*kept, head | record]
        write_atomic(self.file, json.dumps(self.content, indent=2) + "\n")

    def _is_current(self, record: Record) -> bool:
        return bool(record["settings"] == self.settings and record["environment"] == self.environment)


def _checked(record: Any) -> Record:
    Row(**record["row"])
    return {"settings": {}, "environment": {}} | dict(record)


COLUMNS = (
    "backbone, batch", "images/s, TTD", "images/s, contrastive", "images/s, open_clip's loop", "images/s, `ttd train`",
    "TTD / contrastive", "TTD / trimmed", "unshared / TTD", "dense / image encoding",
    "peak memory, TTD / contrastive", "utilisation, TTD and contrastive",
)  # fmt: skip
BARS = {
    "ttd_over_contrastive": "TTD / contrastive at most 1.00",
    "ttd_over_open_clip_loop": "images/s of TTD no lower than open_clip's loop",
}
"""Goals: each ratio of seconds is at most 1."""
MISSED, ABSENT = " ✗", "–"


def missed_bars(record: Record) -> dict[str, float]:
    """Return the ratios of a row that are above their bar."""
    ratios = record.get("ratios", {})
    return {name: ratios[name] for name in BARS if ratios.get(name) is not None and ratios[name] > 1}


def table_row(record: Record) -> str:
    """Return one line of the Markdown table; ✗ marks a missed bar."""
    missed, speed = missed_bars(record), record.get("images_per_second", {})
    ratios, limits = record.get("ratios", {}), record.get("limits", {})

    def ratio(name: str) -> str:
        if ratios.get(name) is None:
            return ABSENT
        limit = f" ({limits[name]:.2f})" if limits.get(name) is not None else ""
        return f"{ratios[name]:.3f}{limit}{MISSED if name in missed else ''}"

    def images(name: str) -> str:
        return f"{speed[name]:,.0f}" if name in speed else ABSENT

    train, shares = record.get("train"), record.get("model_flops_utilisation", {})
    cells = (
        Row(**record["row"]).title,
        images("ttd") + (MISSED if "ttd_over_open_clip_loop" in missed else ""),
        images("contrastive"),
        images(LOOP),
        f"{train['images_per_second']:,.0f}" if train else ABSENT,
        *map(ratio, ("ttd_over_contrastive", "ttd_over_trimmed_contrastive", "unshared_over_ttd",
                     "dense_over_encode_image", "memory_ttd_over_contrastive")),
        ", ".join(f"{shares[name]:.0%}" if name in shares else ABSENT for name in ("ttd", "contrastive")),
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def markdown(results: Results) -> str:
    """Return the table of each device, version and setting, those of the present call first, with bars and profiles."""
    groups: dict[str, tuple[list[Record], list[Record]]] = {}
    for place, kind in enumerate(("rows", "profiles")):
        for record in [*results.current(kind), *reversed(results.content[kind])]:
            name = json.dumps([record["environment"], record["settings"]], sort_keys=True)
            group = groups.setdefault(name, ([], []))[place]
            if record not in group:
                group.append(record)
    return "# A TTD step on a GPU\n\n" + "\n".join(_section(*group) for group in groups.values() if group[0])


def _section(rows: list[Record], profiles: list[Record]) -> str:
    names = {"cuda": "CUDA", "cudnn": "cuDNN", "code": "code"}
    facts = rows[0]["environment"]
    versions = ", ".join(
        f"{names.get(name, name)} {value}" for name, value in facts.items() if value and name != "device"
    )
    rows = sorted(rows, key=lambda one: one["row"]["compile"])
    measured = [record for record in rows if "error" not in record]
    lines = [
        f"## {facts['device']}",
        "",
        f"{versions}. {rows[0]['settings']['precision']} autocast, all weights trained, one AdamW. Rounds: "
        f"{rows[0]['settings']['repeats']}; medians; counted limits in brackets.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|{'---|' * len(COLUMNS)}",
        *map(table_row, measured),
        "",
        f"✗ marks a missed bar: {'; '.join(BARS.values())}.",
        "",
    ]
    for record in rows:
        title = Row(**record["row"]).title
        lines += [f"- {title}: missed by {value - 1:.1%}: {BARS[name]}." for name, value in missed_bars(record).items()]
        if record.get("out_of_memory"):
            lines.append(f"- {title}: out of memory: {', '.join(record['out_of_memory'])}.")
        if "error" in record:
            lines.append(f"- {title}: not measured: {record['error']}.")
    for record in profiles:
        lines += _profile_lines(record)
    return "\n".join([*lines, ""])


def _profile_lines(record: Record) -> list[str]:
    lines = ["", f"### Profile of {Row(**record['row']).title}"]
    for variant in ("ttd", "contrastive"):
        step = record.get(variant)
        if step is None:
            lines += ["", f"`{variant}`: {record.get('error', 'out of memory')}."]
            continue
        lines += [
            "",
            f"`{variant}`: {1e3 * step['seconds']:.1f} ms a step; its last kernel is queued after "
            f"{1e3 * step['host_seconds']:.1f} ms; {step['kernels']:,} kernels take "
            f"{1e3 * step['kernel_seconds']:.1f} ms.",
            "",
            "| on | kernel or operator | calls | ms |",
            "|---|---|---|---|",
        ]
        for place, kind in (("device", "longest_kernels"), ("host", "longest_operators")):
            for one in step[kind]:
                name = one["name"].replace("|", "\\|")[:90]
                lines.append(f"| {place} | `{name}` | {one['calls']:,} | {1e3 * one['seconds']:.2f} |")
    return lines
