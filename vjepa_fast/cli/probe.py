"""``vjepa-fast probe``: what a frozen encoder knows, beside the same network with random weights."""

from __future__ import annotations

import json
import os
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import TYPE_CHECKING

from vjepa_fast.cli import _arguments as arguments
from vjepa_fast.cli._console import new_table, plain, say, table_console
from vjepa_fast.files import write_text

if TYPE_CHECKING:
    from vjepa_fast.config.schema import Config
    from vjepa_fast.evaluation.fewshot.leakage import Leakage
    from vjepa_fast.evaluation.run.rows import Row

HELP = "frozen evaluation: linear, kNN and attentive probes, few-shot episodes, beside random init"

GROUPS = {"both": ["linear", "knn"], "all": ["linear", "knn", "attentive"]}


def probe_names(text: str) -> list[str]:
    """Names of probes with commas between; ``both`` and ``all`` stand for several."""
    found = [name for word in arguments.some_names(text) for name in GROUPS.get(word, [word])]
    return list(dict.fromkeys(found))


def add_arguments(parser: ArgumentParser) -> None:
    """Add the flags."""
    arguments.add_encoders(parser)
    manifest = arguments.manifest_file
    parser.add_argument("--train", metavar="CSV", type=manifest, help="manifest the probe is fitted on")
    parser.add_argument(
        "--val", metavar="CSV", type=manifest, help="manifest that chooses penalty and k (default: 20 %% of --train)"
    )
    parser.add_argument("--test", metavar="CSV", type=manifest, help="manifest the accuracy is measured on")
    parser.add_argument(
        "--fewshot", metavar="CSV", type=manifest, help="manifest of novel classes for few-shot episodes"
    )
    arguments.add_root(parser)
    parser.add_argument(
        "--probes",
        "--probe",
        metavar="A,B",
        type=probe_names,
        default=GROUPS["both"],
        help="linear, knn, attentive, or what a plugin adds; both: linear and knn (default); all: attentive as well",
    )
    parser.add_argument(
        "--task",
        metavar="NAME",
        help="frames, views and epochs of a task, and the classes there must be: diving48, ssv2, k400, imagenet100, "
        "ucf101, motion8, dive, order, objects, or what a plugin adds",
    )
    parser.add_argument(
        "--protocol",
        choices=("vjepa_fast", "published"),
        default="vjepa_fast",
        help="published: the probe behind the published accuracies, for comparison (default %(default)s)",
    )
    parser.add_argument(
        "--row",
        metavar="RUN",
        help="published: the published run to compare with, such as mixed_4gpu_fwm_ld, whose probes may have had other "
        "epochs",
    )
    parser.add_argument(
        "--every-clip", action="store_true", help="published, UCF-101: all clips, not 2,000 and 500 drawn with seed 42"
    )
    positive = arguments.positive
    parser.add_argument(
        "--clips", type=positive, help="clips per video of the attentive probe; default: the task's, or 1"
    )
    parser.add_argument(
        "--crops", type=positive, help="crops per clip of the attentive probe; default: the task's, or 1"
    )
    parser.add_argument(
        "--epochs", type=positive, help="of the attentive or published probe; default: the task's, or 20"
    )
    parser.add_argument(
        "--probe-batch", type=positive, help="samples per step of it (default 64; published: the task's)"
    )
    parser.add_argument(
        "--storage",
        choices=("bfloat16", "float16", "float32"),
        help="of tokens in the cache (default bfloat16; published: float16, synthetic motion float32)",
    )
    arguments.add_features(parser)
    arguments.add_readout(parser, "last/tdiff/standard")
    arguments.add_clips(parser)
    parser.add_argument("--way", type=positive, default=5, help="classes per episode (default %(default)s)")
    parser.add_argument("--shots", type=positive, nargs="+", default=[1, 5], help="default 1 5")
    parser.add_argument("--queries", type=positive, default=15, help="per class and episode (default %(default)s)")
    parser.add_argument("--episodes", type=positive, default=1000, help="default %(default)s")
    parser.add_argument(
        "--seed", type=arguments.at_least(0), default=0, help="of held-out parts and episodes (default %(default)s)"
    )
    arguments.add_device(parser)
    arguments.add_json(parser)


def run(args: Namespace) -> int:
    """Probe every encoder and print the table."""
    _check(args)
    from rich.console import Console

    from vjepa_fast.evaluation.run.probe import ProbeProtocol, probe_checkpoint

    given = {f.name: getattr(args, f.name) for f in fields(ProbeProtocol) if hasattr(args, f.name)}
    given |= {"probes": tuple(args.probes), "shots": tuple(args.shots), "name": args.protocol}
    protocol = ProbeProtocol(**given).settled()
    manifests = {k: getattr(args, k) for k in ("train", "val", "test", "fewshot")}
    subject = arguments.subject_of(args)
    with Console(stderr=True).status("reading") as status:
        rows = probe_checkpoint(**manifests, root=args.root, protocol=protocol, on_progress=status.update, **subject)
    leakage = _leakage(args, subject["config"]) if args.fewshot else None
    if args.json:
        content = {
            "checkpoint": os.path.abspath(args.checkpoint),
            "protocol": {k: v for k, v in asdict(protocol).items() if k != "spread"},  # by the protocol's name
            "manifests": {**manifests, "root": args.root},
            "rows": [r.to_dict() for r in rows],
            "leakage": leakage.to_dict() if leakage else None,
        }
        write_text(args.json, json.dumps(content, indent=1))
    print_table(rows)
    for r in rows:
        if "readout" in r.chosen:
            say(_reading_text(r))
    if leakage:
        say(*leakage.statement.split("\n"))
    return 0


def _reading_text(row: Row) -> str:
    table = row.chosen.get("candidates")
    how = "given" if table is None else f"chosen from {len(table)}, {100 * table[0]['accuracy']:.1f} on validation"
    return f"{row.label}, {row.probe}: readout {row.chosen['readout']} ({how})"


def _leakage(args: Namespace, config: Config | None) -> Leakage:
    """What pretraining has seen of the novel classes, by the data sets that the checkpoint's configuration names."""
    from vjepa_fast.data.manifests.manifest import load_manifest
    from vjepa_fast.data.manifests.root import Root
    from vjepa_fast.evaluation.fewshot.leakage import find_leakage
    from vjepa_fast.evaluation.run.encoders import checkpoint_config
    from vjepa_fast.evaluation.run.fewshot import pretraining_manifests

    pretrain, gaps = pretraining_manifests(config or checkpoint_config(args.checkpoint))
    return find_leakage(load_manifest(args.fewshot, Root.given(args.root)), pretrain, gaps=gaps)


def _check(args: Namespace) -> None:
    from vjepa_fast.errors import UserError

    arguments.check_readout(args)
    if args.readout and args.protocol == "published":
        raise UserError("--readout: --protocol published has its own; leave --readout out")
    if args.readout and (args.train is None or args.fewshot):
        raise UserError("--readout needs --train and --test; for few-shot episodes: `vjepa-fast fewshot --readout`")
    if args.protocol == "published" and args.train is None:
        raise UserError("--protocol published probes: give --train and --test manifests")
    if args.protocol != "published" and (args.row or args.every_clip):
        raise UserError("--row and --every-clip belong to --protocol published")
    if args.protocol == "published" and args.task == "motion8" and args.test is None:
        return  # one list, whose first 80 % train
    if (args.train is None) != (args.test is None):
        raise UserError("--train and --test go together: one fits the probe, the other measures it")


def print_table(rows: Sequence[Row], title: str = "Frozen evaluation, accuracy in %") -> None:
    """Rows as a table on stdout, with the difference from random init and its 95 % interval."""
    numbers = ("accuracy", "95 % interval", "n", "against random")
    table = new_table(title, ("encoder", "suite", "probe", *numbers, ""), right=numbers)
    marks = {"above": "[green]above", "below": "[red]below", "level": "level", "": ""}
    for i, r in enumerate(rows):
        d = r.difference
        gap = f"{100 * d['value']:+.1f} ({100 * d['low']:+.1f} to {100 * d['high']:+.1f})" if d else ""
        table.add_row(
            *map(plain, (r.label, r.suite, r.probe)),
            f"{100 * r.accuracy:.1f}",
            f"{100 * r.low:.1f} to {100 * r.high:.1f}",
            str(r.n),
            gap,
            marks[r.verdict],
            end_section=i + 1 < len(rows) and rows[i + 1].label != r.label,
        )
    console = table_console()
    console.print(table)
    for line in notes(rows):
        console.print(plain(line), highlight=False)


def notes(rows: Sequence[Row]) -> list[str]:
    """What stands beside the table: the published way of scoring an attentive probe, which chose nothing here."""
    lines = []
    for r in rows:
        if (most := r.chosen.get("max_over_heads_on_test")) is not None:
            lines.append(
                f"{r.label}, {r.suite}, {r.probe}: max over {r.chosen['heads']} heads on the test set {100 * most:.1f} "
                f"(the published way of scoring; chosen on validation: {100 * r.accuracy:.1f})"
            )
    if any(r.probe == "published" for r in rows):
        lines.append("published: nothing held out, nothing chosen; what is assumed of it is in docs/evaluation.md")
    return lines
