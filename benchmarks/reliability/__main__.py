"""The command line of benchmarks.reliability, whose docstring says what is measured and what it needs."""

import argparse
import json
import platform
import sys
import tempfile
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.reliability import FLIPPED, SYSTEMS, __doc__, compiler
from benchmarks.reliability.harness import FAULTS, NotHere, build_shim, faults, flips


def cell(outcomes: list[dict[str, Any]]) -> str:
    verdicts = Counter(o["verdict"] for o in outcomes)
    return ", ".join(f"{verdicts[v]} {v}" for v in ("STUCK", "MIXED", "LOST", "OK") if verdicts[v])


def fault_table(rows: list[dict[str, Any]]) -> str:
    lines = ["| system | calls | kill | torn write, then kill | disk full |", "|---|---|---|---|---|"]
    for row in rows:
        cells = " | ".join(cell(row["faults"][fault]) for fault in FAULTS)
        lines.append(f"| {row['title']} | {len(row['calls'])} | {cells} |")
    return "\n".join(lines)


def flip_table(rows: list[dict[str, Any]]) -> str:
    kinds = ("silently wrong", "detected", "harmless")
    lines = ["| format | bytes | flips | " + " | ".join(kinds) + " |", "|---|---|---|---|---|---|"]
    for row in rows:
        cells = " | ".join(f"{row.get(kind, 0) / row['count']:.1%}" for kind in kinds)
        lines.append(f"| {row['format']} | {row['bytes']} | {row['count']} | {cells} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), metavar="SYSTEM")
    parser.add_argument("--flips", type=int, default=300, help="bits flipped in every format; 0: none")
    parser.add_argument("--json", type=Path, help="everything that was seen, call by call")
    asked = parser.parse_args()
    if compiler() is None:
        print("needs Linux and a C compiler (cc or gcc)", file=sys.stderr)
        return 2
    fault_rows, flip_rows = [], []
    with tempfile.TemporaryDirectory() as folder:
        shim = build_shim(Path(folder))
        for name in asked.systems:
            if missing := SYSTEMS[name].missing:
                print(f"{name} is left out: no package {', '.join(missing)} (pip install it)", file=sys.stderr)
                continue
            print(f"{name} ...", file=sys.stderr)
            try:
                fault_rows.append({"system": name, **faults(name, shim)})
            except NotHere as error:
                print(f"{name} is left out: {error}", file=sys.stderr)
                continue
            if asked.flips and name in FLIPPED:
                flip_rows.append({"format": FLIPPED[name], **flips(name, shim, asked.flips)})
    if not fault_rows:
        return 2
    print("A fault at every call of a save:\n\n" + fault_table(fault_rows))
    if flip_rows:
        print("\nOne random bit flipped in a saved checkpoint:\n\n" + flip_table(flip_rows))
    if asked.json:
        packages = sorted({p for listed in SYSTEMS.values() for p in listed.packages if not listed.missing})
        versions = {"python": platform.python_version(), **{p: metadata.version(p) for p in packages}}
        seen = {"versions": versions, "faults": fault_rows, "flips": flip_rows}
        asked.json.write_text(json.dumps(seen, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
