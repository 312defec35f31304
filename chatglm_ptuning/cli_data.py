"""The commands `data check` and `data preview`; each imports what it needs when it runs."""

import argparse
import sys
from pathlib import Path
from typing import Any

from chatglm_ptuning.errors import UserError

PROJECT = Path(__file__).resolve().parents[1]


def add_data_commands(commands: Any) -> None:
    """`data check` and `data preview`."""
    parser = commands.add_parser("data", help="look at data before a run")
    subcommands = parser.add_subparsers(dest="subcommand", required=True, metavar="check|preview")

    command = subcommands.add_parser(
        "check",
        help="find every row that cannot be used, stands twice, is too long or looks damaged",
        usage="chatglm-ptuning data check FILE... [--held-out FILE...] [--model DIR] [--template NAME] [--fix OUT]"
        " [data.key=value ...]",
        description="Prints each finding as file:line: reason, then the counts. Exit code 1 if anything is wrong.",
        epilog="Example: data check train.json --held-out test.json --model /data/chatglm-6b --fix good.jsonl"
        " data.max_source_length=256 data.encoding=gb18030",
    )
    command.add_argument("files", nargs="+", metavar="FILE", help="files or folders to train on")
    command.add_argument(
        "--held-out",
        nargs="+",
        default=[],
        metavar="FILE",
        help="files to evaluate on: checked too, and no question of theirs may stand in the others",
    )
    command.add_argument(
        "--model",
        type=Path,
        metavar="DIR",
        help="checkpoint or adapter directory; with its tokenizer the limits in tokens are checked as well",
    )
    command.add_argument(
        "--fix", metavar="OUT", help="write the usable rows here, one JSON line each"
    )
    add_template(command)
    command.set_defaults(run=check_data, takes_overrides=True)

    command = subcommands.add_parser(
        "preview",
        help="show the tokens of the first rows, prompt against target, with ids, labels and positions",
        usage="chatglm-ptuning data preview FILE [--rows 3] [--model DIR] [--template NAME] [--colour]"
        " [data.key=value ...]",
        epilog="Example: data preview train.json --rows 1 --model /data/chatglm3-6b --template chatglm3",
    )
    command.add_argument("file", metavar="FILE", help="file or folder of rows")
    command.add_argument("--rows", type=int, default=3, help="show so many (default 3)")
    command.add_argument(
        "--model",
        type=Path,
        default=PROJECT / "demo" / "model",
        metavar="DIR",
        help="checkpoint or adapter directory (default: the demo's model)",
    )
    add_template(command)
    command.add_argument(
        "--colour", action="store_true", help="colour also where the output is no terminal"
    )
    command.set_defaults(run=preview_data, takes_overrides=True)


def add_template(command: argparse.ArgumentParser) -> None:
    """The option that names the chat format."""
    command.add_argument(
        "--template",
        metavar="NAME",
        help="chat format: chatglm, chatglm2, chatglm3, glm4; needed where the checkpoint does not tell it",
    )


def check_data(args: argparse.Namespace) -> None:
    """Look at every row of some files.

    Raises:
        UserError: Something was found.
    """
    from tqdm import tqdm

    from chatglm_ptuning.data.check import check_files
    from chatglm_ptuning.data.report import plural

    config, template, tokenizer = data_config(args), None, None
    if args.model is not None:
        template, tokenizer = chat_format(args.model, args.template)
    elif args.template is not None:
        raise UserError(
            f"--template must come with --model, got {args.template!r} alone; give the model's directory"
        )
    with tqdm(unit=" rows", delay=1, disable=not sys.stderr.isatty()) as bar:
        result = check_files(
            args.files, config, lambda finding: bar.write(str(finding)), args.held_out,
            template, tokenizer, args.fix, bar.update,
        )  # fmt: skip
    print(result.summary(config))
    if args.fix is not None:
        print(f"{plural(result.written, 'usable row')} written to {args.fix}")
    if not result.is_clean:
        advice = "" if args.fix is not None else "; --fix OUT writes the usable rows"
        raise UserError(
            f"data must be free of findings, got {result.findings.total():,} in {result.rows - result.good:,} of"
            f" {plural(result.rows, 'row')}{advice}"
        )


def preview_data(args: argparse.Namespace) -> None:
    """Show the first rows of a file as the model will get them.

    Raises:
        UserError: Fewer than one row is asked for, or one cannot be read.
    """
    from chatglm_ptuning.data.dataset import load_conversations
    from chatglm_ptuning.data.preview import preview

    if args.rows < 1:
        raise UserError(f"--rows must be at least 1, got {args.rows}")
    config = data_config(args)
    rows = load_conversations(args.file, config, args.rows)
    template, tokenizer = chat_format(args.model, args.template)
    colour = args.colour or sys.stdout.isatty()
    positions = position_ids_of(args.model)
    print(preview(rows, template, tokenizer, config, args.rows, colour, positions))


def data_config(args: argparse.Namespace) -> Any:
    """The section `data` of a command; the config, whose import takes seconds, only where something is set.

    Raises:
        UserError: A key of another section, or a wrong value.
    """
    from chatglm_ptuning.data.config import DataConfig

    others = [text for text in args.overrides if not text.startswith("data.")]
    if others:
        raise UserError(f"a data command must be given data.key=value only, got {others[0]!r}")
    if not args.overrides:
        return DataConfig()
    from chatglm_ptuning.config import RunConfig

    return RunConfig.load(None, args.overrides).data


def chat_format(model: Path, name: str | None) -> tuple[Any, Any]:
    """Template and tokenizer of a checkpoint or adapter directory."""
    from chatglm_ptuning.loading import is_adapter, load_tokenizer, template_of

    tokenizer = load_tokenizer(model)
    return template_of(tokenizer, name, [model] if is_adapter(model) else []), tokenizer


def position_ids_of(model: Path) -> Any:
    """How ChatGLM-6B numbers its tokens, without loading a weight; None for the others, which count them from 0."""
    import torch

    from chatglm_ptuning.loading import base_of
    from chatglm_ptuning.models.loading import build_released, model_family, read_json

    directory = base_of(model)
    if model_family(directory) != "chatglm":
        return None
    empty = build_released(directory, read_json(directory / "config.json"), torch.float32)
    return empty.get_decoder().get_position_ids
