"""The table of a run, and its failures with what reproduces each."""

from collections import Counter

from fuzz.cases import BAD, GOOD, KINDS, Outcome, Settings, reproduce_command


class Report:
    """Collects outcomes. Failures of one kind, subject, label and end count as one fault, shown by its first case."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._counts: Counter[tuple[str, str]] = Counter()
        self._faults: dict[tuple[str, str, str, str], list[tuple[str, Outcome]]] = {}

    def add(self, name: str, outcome: Outcome) -> None:
        kind, subject, _ = name.split("/")
        self._counts[kind, outcome.how] += 1
        if outcome.how in BAD:
            fault = (kind, subject, outcome.how, outcome.label)
            self._faults.setdefault(fault, []).append((name, outcome))

    @property
    def failed(self) -> bool:
        return bool(self._faults)

    def faults(self) -> str:
        """One paragraph for each fault, the worst ends first."""
        paragraphs = []
        for fault, cases in sorted(self._faults.items(), key=lambda item: (-BAD.index(item[0][2]), item[0])):
            kind, subject, how, label = fault
            name, outcome = min(cases, key=lambda case: int(case[0].rpartition("/")[2]))
            paragraphs.append(
                f"{how}: {kind} {subject}, {label} ({len(cases)} cases)\n"
                f"    {outcome.details}\n"
                f"    {reproduce_command(name, self._settings)}"
            )
        return "\n".join(paragraphs)

    def table(self) -> str:
        ends = [*GOOD, *BAD]
        lines = [f"{'':10}" + "".join(f"{end:>10}" for end in ("cases", *ends))]
        for kind in KINDS:
            counts = [self._counts[kind, end] for end in ends]
            lines.append(f"{kind:10}" + "".join(f"{n:>10}" for n in (sum(counts), *counts)))
        return "\n".join(lines)
