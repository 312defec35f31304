"""The command line: `python -m chatglm_ptuning COMMAND`. Each command imports what it needs when it runs.

Exit codes: 0 done, 1 the user's input or data is wrong (one sentence on stderr), 2 wrong usage, 130 interrupted.
"""

import argparse
import errno
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from chatglm_ptuning.cli_data import add_data_commands
from chatglm_ptuning.errors import UserError
from chatglm_ptuning.version import __version__

if TYPE_CHECKING:
    from chatglm_ptuning.serving.engine import Engine
    from chatglm_ptuning.serving.limits import Limits

PROJECT = Path(__file__).resolve().parents[1]
OVERRIDES = "[section.key=value ...]"
# errors of a disk or of a path that the user chose, not of this program
UNWRITABLE = (
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EEXIST, errno.ENOTDIR, errno.EISDIR
)  # fmt: skip
OVERRIDE = re.compile(r"(model|data|adapter|training|generation)(\.\w+)+=")


def train(args: argparse.Namespace) -> None:
    """Train and score one adapter."""
    from chatglm_ptuning.config import RunConfig
    from chatglm_ptuning.training.run import run

    config = RunConfig.load(args.config, args.overrides)
    if args.estimate:
        from chatglm_ptuning.training.estimate import estimate

        print(estimate(config).text())
    else:
        run(config)


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


def serve(args: argparse.Namespace) -> None:
    """Serve a base and its adapters over the OpenAI API."""
    from chatglm_ptuning.serving.api import Keys
    from chatglm_ptuning.serving.limits import Limits
    from chatglm_ptuning.serving.opening import listen
    from chatglm_ptuning.serving.server import ADMIN_KEY, API_KEY, read_key, serve

    keys = Keys(read_key(args.api_key_file, API_KEY), read_key(args.admin_key_file, ADMIN_KEY))
    limits = Limits(args.max_batch, args.max_waiting, args.max_prompt_tokens, args.max_tokens)
    listening = listen(args.host, args.port)
    serve(open_engine(args, limits), listening, keys)


def chat(args: argparse.Namespace) -> None:
    """Chat in the terminal."""
    from chatglm_ptuning.serving import terminal
    from chatglm_ptuning.serving.sampling import Sampling

    sampling = Sampling(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
    )
    engine = open_engine(args)
    first = args.adapter[0].partition("=")[0] if args.adapter else next(iter(engine.adapters), None)
    terminal.chat(engine, sampling, first, args.system)


def open_engine(args: argparse.Namespace, limits: "Limits | None" = None) -> "Engine":
    """The engine that `add_model_arguments` describe."""
    from chatglm_ptuning.serving.opening import named_directories, open_engine

    return open_engine(
        args.model,
        named_directories(args.adapter),
        args.template,
        args.dtype,
        args.device,
        args.quantization_bit,
        limits,
    )


def add_model_arguments(command: argparse.ArgumentParser) -> None:
    """Add the options that say what answers."""
    command.add_argument(
        "--model",
        metavar="DIR",
        help="a checkpoint or an adapter directory (default: the adapters' base, or else the demo model)",
    )
    command.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="an adapter and what it is called; may be given several times",
    )
    command.add_argument(
        "--template", metavar="NAME", help="chat format, where the checkpoint does not tell"
    )
    command.add_argument(
        "--dtype", default="auto", help="auto, float32, bfloat16 or float16 (default: auto)"
    )
    command.add_argument("--device", help="cpu, cuda, cuda:1 (default: the GPU if there is one)")
    command.add_argument(
        "--quantization-bit", type=int, choices=(4, 8), help="quantise the base with bitsandbytes"
    )


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
        usage=f"chatglm-ptuning train [--config FILE] [--estimate] {OVERRIDES}",
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
    command.add_argument(
        "--estimate",
        action="store_true",
        help="say how much memory the run needs on one device, and load nothing",
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
        choices=("released", "native", "prefix", "peft"),
        help="released: ChatGLM's own files; native: what from_pretrained reads; prefix: pytorch_model.bin;"
        " peft: PREFIX_TUNING",
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

    add_data_commands(commands)

    command = commands.add_parser(
        "chat",
        help="chat in the terminal",
        epilog="Lines may also come from a pipe: echo 你好 | python -m chatglm_ptuning chat",
    )
    add_model_arguments(command)
    command.add_argument("--system", default="", metavar="TEXT", help="system message")
    command.add_argument(
        "--max-tokens", type=int, default=512, help="longest answer (default: 512)"
    )
    command.add_argument(
        "--temperature", type=float, default=0.0, help="0 takes the likeliest token (default: 0)"
    )
    command.add_argument(
        "--top-p", type=float, default=1.0, help="probability to draw from (default: 1)"
    )
    command.add_argument(
        "--top-k", type=int, default=0, help="likeliest tokens to draw from; 0 is all (default: 0)"
    )
    command.add_argument(
        "--repetition-penalty", type=float, default=1.0, help="1 is none (default: 1)"
    )
    command.add_argument("--seed", type=int, help="same seed, same answers")
    command.set_defaults(run=chat)

    command = commands.add_parser(
        "serve",
        help="serve a model and its adapters over the OpenAI API",
        epilog="Keys may also stand in CHATGLM_PTUNING_API_KEY and CHATGLM_PTUNING_ADMIN_KEY. Example: serve"
        " --adapter ads=outputs/ptuning --adapter qa=outputs/lora",
    )
    add_model_arguments(command)
    command.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1")
    command.add_argument(
        "--port", type=int, default=8000, help="0 takes a free one (default: 8000)"
    )
    command.add_argument(
        "--api-key-file", type=Path, metavar="FILE", help="whoever asks must send this key"
    )
    command.add_argument(
        "--admin-key-file",
        type=Path,
        metavar="FILE",
        help="whoever sends this key may load and unload adapters",
    )
    command.add_argument(
        "--max-batch", type=int, default=32, help="answers generated at a time (default: 32)"
    )
    command.add_argument(
        "--max-waiting", type=int, default=256, help="requests that may wait (default: 256)"
    )
    command.add_argument(
        "--max-prompt-tokens", type=int, default=8192, help="longest prompt (default: 8192)"
    )
    command.add_argument(
        "--max-tokens", type=int, default=2048, help="longest answer (default: 2048)"
    )
    command.set_defaults(run=serve)

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
    set_up_logging()
    return exit_code(lambda: args.run(args))


def exit_code(run: Callable[[], None]) -> int:
    """Run something; the user's error, a missing package, a full disk and Ctrl-C end it in one line.

    Returns:
        The exit code.
    """
    try:
        run()
    except UserError as error:
        return fail(str(error))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "chatglm_ptuning":
            raise
        return fail(
            f"Python must have the packages of requirements.txt, got {sys.executable} without {error.name}; make .venv"
            " with bash scripts/setup.sh and run source .venv/bin/activate"
        )
    except BrokenPipeError:  # `| head` has seen enough; nothing may be written at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as of a program that SIGPIPE ends
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        place = f" {error.filename}" if error.filename else " a file"
        return fail(f"cannot write{place}: {error.strerror}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def set_up_logging() -> None:
    """Our notes as plain lines on stderr; of the libraries only warnings. Called before they are imported."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("chatglm_ptuning").setLevel(logging.INFO)


def fail(sentence: str) -> int:
    """Say what is wrong on stderr, and which of several processes says it; the exit code."""
    rank = int(os.environ.get("RANK", "0"))
    print(f"error{f' (process {rank})' if rank else ''}: {sentence}", file=sys.stderr)
    return 1
