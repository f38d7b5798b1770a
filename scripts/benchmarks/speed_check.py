"""Whether what the documentation says of speed still holds: its figures beside those of reduced runs."""

from typing import NamedTuple

# Shorter windows vary more, and ratios differ between processors.
HOLDS_FROM = 0.8
CHECK_FLAGS = {"modes": "tokens,plain", "windows": 3, "plain_micro_batches": 2, "questions": 96}


class Claim(NamedTuple):
    """times: what docs/performance.md says of a part, ours over plain. row: which row of the part it is."""

    part: str
    row: str | None
    times: float


CLAIMS = {
    "fp32": (
        Claim("mapping", "ours, 2048 tokens", 2.26),
        Claim("augmentation", "ours, 4096 tokens", 2.99),
        Claim("hard", None, 1.73),
    ),
    "bf16": (
        Claim("mapping", "ours, 2048 tokens", 2.32),
        Claim("augmentation", "ours, 4096 tokens", 3.79),
        Claim("hard", None, 3.63),
    ),
}


def check(report: dict) -> int:
    """Prints the documented figures of the report's precision beside the measured ones; returns the exit code, 1 where
    one of them is missed by more than a fifth."""
    missed = 0
    print("\n| documented, times plain | said | now | |\n|---|---:|---:|---|")
    for claim in CLAIMS[report["precision"]]:
        if claim.part not in report:
            continue
        found = report[claim.part] if claim.row is None else report[claim.part][claim.row]
        holds = found["times_plain"] >= HOLDS_FROM * claim.times
        missed += not holds
        name = f"{claim.part}, {report['precision']}"
        print(f"| {name} | {claim.times:.2f} | {found['times_plain']:.2f} | {'holds' if holds else 'NO LONGER'} |")
    return int(missed > 0)
