"""The command line: `python -m chatglm_ptuning COMMAND`. Each command imports what it needs when it runs.

Exit codes: 0 done, 1 the user's input or data is wrong (one sentence on stderr), 2 wrong usage, 130 interrupted.
"""

import argparse
import errno
import logging
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from chatglm_ptuning.cli_data import add_data_commands
from chatglm_ptuning.errors import UserError
from chatglm_ptuning.version import __version__

PROJECT = Path(__file__).resolve().parents[1]
OVERRIDES = "[section.key=value ...]"
OVERRIDE = re.compile(r"(model|data|adapter|training|generation)(\.\w+)+=")


def train(args: argparse.Namespace) -> None:
    """Train and score one adapter."""
    from chatglm_ptuning.config import RunConfig
    from chatglm_ptuning.training.run import run

    run(RunConfig.load(args.config, args.overrides))


def evaluate(args: argparse.Namespace) -> None:
    """Score an adapter, a whole model or a file of predictions."""
    from chatglm_ptuning.evaluation.run import evaluate_directory, score_predictions_file

    if args.what.is_file():
        score_predictions_file(args.what)
    else:
        evaluate_directory(args.what, args.overrides, args.resume)


def export(args: argparse.Namespace) -> None:
    """Write a model or a prefix as other tools read it."""
    from chatglm_ptuning.export import export

    print(export(args.source, args.out, args.format, args.merge, args.flatten))


def demo_model(args: argparse.Namespace) -> None:
    """Make the demo's model and data anew."""
    from chatglm_ptuning.demo.build import build_demo

    build_demo(args.directory)


def make_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = argparse.ArgumentParser(
        prog="chatglm-ptuning",
        description="Fine-tune, evaluate and serve ChatGLM-6B, ChatGLM2-6B, ChatGLM3-6B and GLM-4-9B.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = commands.add_parser(
        "train",
        help="train an adapter (or every weight) and score it against the untouched base",
        usage=f"chatglm-ptuning train [--config FILE] {OVERRIDES}",
        epilog="Sections: model, data, adapter, training (transformers' Seq2SeqTrainingArguments), generation. "
        "Example: train model.path=/data/chatglm-6b data.train_file=my.json training.learning_rate=1e-2",
    )
    command.add_argument(
        "--config",
        type=Path,
        default=PROJECT / "configs" / "ptuning_v2.yaml",
        metavar="FILE",
        help="YAML file of the run (default: P-Tuning v2 on the demo model and data)",
    )
    command.set_defaults(run=train, takes_overrides=True)

    command = commands.add_parser(
        "evaluate",
        help="score an adapter or a model on its test rows: ROUGE-1/2/L, BLEU-4",
        usage=f"chatglm-ptuning evaluate [--resume] DIRECTORY|predictions.jsonl {OVERRIDES}",
        epilog="Answers, scores and report go to DIRECTORY/evaluation. A file of predictions is scored as it is, "
        "without a model. Example: evaluate outputs/ptuning data.test_file=other.json generation.num_beams=4",
    )
    command.add_argument(
        "what",
        type=Path,
        metavar="DIRECTORY",
        help="an adapter directory, a checkpoint directory, or a predictions.jsonl",
    )
    command.add_argument(
        "--resume",
        action="store_true",
        help="keep the answers that an interrupted evaluation wrote",
    )
    command.set_defaults(run=evaluate, takes_overrides=True)

    add_data_commands(commands)

    command = commands.add_parser(
        "export",
        help="write a model in the released or the native layout, or a prefix as the released code reads it",
        epilog="Example: export outputs/lora merged --format native --merge",
    )
    command.add_argument(
        "source", type=Path, metavar="SOURCE", help="a checkpoint or an adapter directory"
    )
    command.add_argument("out", type=Path, metavar="OUT", help="a new directory")
    command.add_argument(
        "--format",
        required=True,
        choices=("released", "native", "prefix"),
        help="released: ChatGLM's own files; native: what from_pretrained reads; prefix: pytorch_model.bin",
    )
    command.add_argument(
        "--merge", action="store_true", help="add the adapter to the weights of its base"
    )
    command.add_argument(
        "--flatten",
        action="store_true",
        help="write a prefix with projection as the embeddings that it amounts to",
    )
    command.set_defaults(run=export)

    command = commands.add_parser(
        "demo-model",
        help="make the demo's model and data anew (about 20 minutes on two cores)",
    )
    command.add_argument("directory", type=Path, metavar="DIR", help="gets model/ and data/")
    command.set_defaults(run=demo_model)
    return parser


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse; `section.key=value` may stand anywhere and is collected in `overrides`."""
    parser = make_parser()
    texts = sys.argv[1:] if arguments is None else arguments
    overrides = [text for text in texts if OVERRIDE.match(text)]
    args, rest = parser.parse_known_args([text for text in texts if text not in overrides])
    rest += overrides
    unknown = [
        text for text in rest if text.startswith("-") or not getattr(args, "takes_overrides", False)
    ]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    args.overrides = rest
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code.
    """
    args = parse(arguments)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("chatglm_ptuning").setLevel(logging.INFO)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it misses kernels nobody asked for
    try:
        args.run(args)
    except UserError as error:
        return fail(str(error))
    except BrokenPipeError:  # `| head` has seen enough; nothing may be written at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as of a program that SIGPIPE ends
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        place = f" {error.filename}" if error.filename else " a file"
        return fail(f"cannot write{place}: {error.strerror}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def fail(sentence: str) -> int:
    """Say what is wrong on stderr, and which of several processes says it; the exit code."""
    rank = int(os.environ.get("RANK", "0"))
    print(f"error{f' (process {rank})' if rank else ''}: {sentence}", file=sys.stderr)
    return 1
