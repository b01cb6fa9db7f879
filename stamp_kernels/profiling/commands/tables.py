"""The reports of the subcommands as tables."""

from typing import Any

from rich import box
from rich.table import Table

from stamp_kernels.profiling.commands.report import baseline_of, memory_share, speedup, three_digits


def render_table(report: dict[str, Any]) -> Table:
    """The report of `stamp-profile train`; speed-up and peak share are relative to its first padded configuration."""
    configurations = report["configurations"]
    baseline = baseline_of(configurations)
    metrics = next((list(c["metrics"]) for c in configurations if c["metrics"] is not None), [])
    settings = report["settings"]

    table = Table(
        title=f"Training step, {settings['batch_size']} sequences, {settings['dtype']}, {report['device']}",
        caption=f"{report['data']['source']}\ntime: median (p20-p80) of {settings['steps']} interleaved steps",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    table.add_column("configuration", no_wrap=True)
    headers = ["ms per\nstep", "speed-\nup", "seq.\nper s", "tokens in\nfirst/last", "peak\nMB", "peak\nshare", "loss"]
    for header in headers + [_metric_header(metric) for metric in metrics]:
        table.add_column(header, justify="right", no_wrap=True)

    for configuration in configurations:
        ms, tokens = configuration["step_ms"], configuration["tokens_per_block"]
        table.add_row(
            configuration["name"],
            f"{three_digits(ms['median'])} ({three_digits(ms['p20'])}-{three_digits(ms['p80'])})",
            "-" if baseline is None else f"{speedup(configuration, baseline):.2f}x",
            three_digits(configuration["sequences_per_s"]),
            f"{tokens[0]}/{tokens[-1]}",
            three_digits(configuration["peak_bytes"] / 1e6),
            "-" if baseline is None else f"{memory_share(configuration, baseline):.0%}",
            f"{configuration['loss']:.3f}",
            *(f"{configuration['metrics'][metric]:.4f}" for metric in metrics),
        )
    return table


def render_quality_table(report: dict[str, Any]) -> Table:
    """The report of `stamp-profile quality`: references, then each configuration's seeds, their mean and range."""
    settings, data = report["settings"], report["data"]
    model = settings["model"]
    metrics = list(report["references"][0]["metrics"])
    epochs = f"{settings['epochs']} epoch{'s' if settings['epochs'] > 1 else ''}"
    table = Table(
        title=f"Quality on the test split, {epochs} of {data['training_rows']:,} rows, {report['device']}",
        caption=(
            f"{data['source']}\n{model['num_layers']} + {model['num_layers']} blocks of width {model['d_model']}; "
            f"mean \u00b1 sample standard deviation, and range, over the seeds"
        ),
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    table.add_column("configuration", no_wrap=True)
    table.add_column("seed", no_wrap=True)
    for header in [*(_metric_header(metric) for metric in metrics), "loss", "training\ns", "evaluation\ns"]:
        table.add_column(header, justify="right", no_wrap=True)

    for reference in report["references"]:
        table.add_row(reference["name"], "", *(f"{reference['metrics'][metric]:.4f}" for metric in metrics))
    # How each column after the seed is formatted.
    formats = dict.fromkeys(metrics, "{:.4f}".format) | {
        "loss": "{:.3f}".format,
        "training_s": "{:.1f}".format,
        "evaluation_s": "{:.1f}".format,
    }
    for configuration in report["configurations"]:
        table.add_section()
        for i, seed in enumerate(configuration["seeds"]):
            values = {**seed["metrics"], **seed, "loss": seed["epoch_losses"][-1]}
            cells = (write(values[key]) for key, write in formats.items())
            table.add_row(configuration["name"] if i == 0 else "", str(seed["seed"]), *cells)
        if len(configuration["seeds"]) > 1:
            spreads = [(configuration["summary"][key], write) for key, write in formats.items()]
            table.add_row("", "mean", *(f"{write(of['mean'])} \u00b1 {write(of['std'])}" for of, write in spreads))
            table.add_row("", "range", *(f"{write(of['min'])}-{write(of['max'])}" for of, write in spreads))
    return table


def _metric_header(metric: str) -> str:
    """A metric's name over its cut-off: recall@10 as Recall and @10, ndcg@10 as NDCG and @10."""
    name, at, cutoff = metric.partition("@")
    return f"{'NDCG' if name == 'ndcg' else name.capitalize()}\n{at}{cutoff}"
