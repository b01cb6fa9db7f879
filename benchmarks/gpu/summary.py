"""The tables at the end of a check, failures first, in a few screens. This file has no third-party imports.

The reply of a GPU machine has the last 12,000 characters of the output, and the summary has to fit into them.
"""

from collections.abc import Iterable

from records import KEYS_OF_ALL, Record

REASON_CHARACTERS = 170


def summary_of(records: list[Record]) -> str:
    """The summary of a results file, complete or not."""
    sections = (_head, _failures, _environment, _correctness, _sanitizer, _timings, _training, _alternatives, _parts)
    texts = []
    for section in sections:
        try:
            texts.append(section(records))
        except (KeyError, ValueError) as error:  # a malformed line must not hide the other tables
            texts.append(f"{section.__name__}: {error!r}")
    return "\n\n".join(text for text in texts if text)


def _of(records: Iterable[Record], part: str) -> list[Record]:
    """The measurements of a part."""
    return [record for record in records if record["part"] == part and not record["status"]]


def _head(records: list[Record]) -> str:
    head = records[0]
    versions = ", ".join(f"{name} {version}" for name, version in head["versions"].items())
    hashes = " ".join(f"{name.rpartition('/')[2]} {digest}" for name, digest in head["sha256"].items())
    gpu = " ".join(head["gpu"].values())
    return f"stage {head['stage']}, {head['date']}, commit {head['commit']}\n{gpu}\n{versions}\n{hashes}"


def _failures(records: list[Record]) -> str:
    """Cases that failed, and cases that did not finish because their process died or ran out of time."""
    last = {(record["part"], record["case"]): record for record in records if record["case"] and record["status"]}
    lines = []
    for (part, case), record in last.items():
        if record["status"] == "failed":
            lines.append(f"FAILED {part}: {case}: {record['reason'][:REASON_CHARACTERS]}")
        elif record["status"] == "begun":
            lines.append(f"UNFINISHED {part}: {case}")
    lines += [
        f"FAILED warm: {error[:REASON_CHARACTERS]}" for r in _of(records, "warm") for error in r.get("errors", ())
    ]
    return "\n".join(lines)


def _environment(records: list[Record]) -> str:
    lines = []
    for record in _of(records, "environment"):
        if "served_by" in record:
            servers = record["served_by"]
            names = {
                server: [op for op in servers if servers[op] == server] for server in dict.fromkeys(servers.values())
            }
            lines += [f"{server}: {', '.join(ops)}" for server, ops in names.items()]
        else:
            lines.append(", ".join(f"{key} {value}" for key, value in record.items() if key not in KEYS_OF_ALL))
    for record in _of(records, "warm"):
        lines.append(
            ", ".join(f"{key} {value}" for key, value in record.items() if key.endswith(("found", "compiled")))
        )
    return "\n".join(lines)


def _correctness(records: list[Record]) -> str:
    """The error that is closest to its bound, by workload and dtype."""
    rows: dict[str, dict[str, str]] = {}
    for record in _of(records, "correctness"):
        shares = {
            name: float(error) / record["bounds"][name] if record["bounds"][name] else float(error)
            for name, error in record["errors"].items()
        }
        worst = max(shares, key=lambda name: shares[name])
        error = float(record["errors"][worst])
        mark = "WRONG " if record["wrong"] else ""
        name = record["workload"]
        rows.setdefault(name, {})[record["dtype"]] = f"{mark}{worst} {error:.1e} {shares[worst]:.2f}"
    if not rows:
        return ""
    dtypes = ("bfloat16", "float16", "float32")
    lines = [f"{'worst error, share of bound':<34}" + "".join(f"{dtype:<26}" for dtype in dtypes)]
    in_order = sorted(rows.items(), key=lambda row: not any("WRONG" in text for text in row[1].values()))
    lines += [f"{name:<34}" + "".join(f"{row.get(dtype, ''):<26}" for dtype in dtypes) for name, row in in_order]
    return "\n".join(line.rstrip() for line in lines)


def _sanitizer(records: list[Record]) -> str:
    return "\n".join(
        f"{record['tool']}: {record['summary']} ({record['runs']} runs, exit status {record['exit_status']})"
        for record in _of(records, "sanitizer")
    )


def _timings(records: list[Record]) -> str:
    """A line per workload. Each direction has our time, prediction, floor, its share, and best peer / ours."""
    timed = _of(records, "timings")
    lines = [
        f"card: {r['flops_per_second'] / 1e12:.0f} TFLOP/s, {r['bytes_per_second'] / 1e12:.2f} TB/s"
        for r in timed
        if "flops_per_second" in r
    ]
    by_workload: dict[str, dict[str, dict[str, Record]]] = {}
    for record in timed:
        if "workload" in record:
            of_workload = by_workload.setdefault(record["workload"], {})
            of_workload.setdefault(record["implementation"], {})[record["direction"]] = record
    if by_workload:
        columns = f"{'pred.':>7}{'floor':>8}{'share':>6}{'peer x':>7}"
        lines.append(f"{'':<29}{'fwd us':>9}{columns}  {'bwd us':>9}{columns}  best peer")
    for name, implementations in by_workload.items():
        ours = implementations.pop("ours", None)
        if ours is None:
            continue
        cells = [_timing(ours.get(direction), implementations, direction) for direction in ("forward", "backward")]
        lines.append(f"{name:<29}{cells[0]}  {cells[1]}  {_best(implementations, 'forward')[0]}".rstrip())
        both = ours.get("both", {})
        if both.get("predicted_us"):
            lines.append(f"{'  both':<29}{_timing(both, implementations, 'both')}")
    return "\n".join(lines)


def _timing(ours: Record | None, peers: dict[str, dict[str, Record]], direction: str) -> str:
    if ours is None:
        return " " * 37
    predicted = f"{ours['predicted_us']:.0f}" if ours["predicted_us"] else ""
    share = f"{ours['floor_us'] / ours['us']:.0%}" if ours["us"] > 0 else ""
    best = _best(peers, direction)[1]
    ratio = f"{best / ours['us']:.2f}" if best > 0 and ours["us"] > 0 else ""
    return f"{ours['us']:>9.1f}{predicted:>7}{ours['floor_us']:>8.1f}{share:>6}{ratio:>7}"


def _best(peers: dict[str, dict[str, Record]], direction: str) -> tuple[str, float]:
    """The fastest peer and its time. A copy does not count, since it computes something else."""
    times = {name: by_direction[direction]["us"] for name, by_direction in peers.items() if direction in by_direction}
    times.pop("copy", None)
    return min(times.items(), key=lambda item: item[1]) if times else ("", 0.0)


def _training(records: list[Record]) -> str:
    measured = _of(records, "training")
    if not measured:
        return ""
    columns = f"{'ms':>9}{'quartiles':>20}{'CPU':>9}{'kernels':>9}{'launches':>9}{'peak GiB':>9}"
    lines = [f"{'training step':<22}{columns}"]
    for r in measured:
        name, quartiles = f"{r['configuration']} {r['batch_size']}", f"{r['p25_ms']:.2f}-{r['p75_ms']:.2f}"
        lines.append(
            f"{name:<22}{r['step_ms']:>9.2f}{quartiles:>20}{r['host_ms']:>9.2f}{r['kernel_ms']:>9.2f}"
            f"{r['launches']:>9}{r['peak_bytes'] / 2**30:>9.2f}"
        )
    return "\n".join(lines)


def _alternatives(records: list[Record]) -> str:
    lines = []
    question = None
    for record in _of(records, "alternatives"):
        if record["question"] != question:
            question = record["question"]
            lines.append(f"{question} ({record['workload']})")
        lines.append(f"  {record['variant']:<32}{record['forward_us']:>12.1f}{record['both_us']:>12.1f}")
    return "\n".join([f"{'alternatives, us':<34}{'forward':>12}{'both':>12}", *lines]) if lines else ""


def _parts(records: list[Record]) -> str:
    lines = [f"{'part':<14}{'status':<8}{'seconds':>8}  cases"]
    for record in records:
        if record["status"] and not record["case"]:
            cases = ", ".join(f"{count} {status}" for status, count in record["cases"].items() if count)
            ended = "" if record["ended"] == "finished" else f"; {record['ended']}"
            lines.append(f"{record['part']:<14}{record['status']:<8}{record['seconds']:>8}  {cases}{ended}")
    return "\n".join(lines)
