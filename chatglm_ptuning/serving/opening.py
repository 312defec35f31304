"""From the words of a command line to an engine: address, base, adapters, chat format."""

import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

from chatglm_ptuning.config import PROJECT
from chatglm_ptuning.errors import UserError
from chatglm_ptuning.loading import base_of, is_adapter, load_model, load_tokenizer, template_of
from chatglm_ptuning.memory import give_freed_memory_back
from chatglm_ptuning.models.loading import resolve_device
from chatglm_ptuning.serving.engine import Engine
from chatglm_ptuning.serving.limits import Limits

DEMO_MODEL = PROJECT / "demo" / "model"
# oneDNN compiles half-precision code for every shape of batch and by itself keeps 1,024: hundreds of MB on a CPU
CACHED_KERNELS = 64


def listen(host: str, port: int) -> socket.socket:
    """Take an address, before the minutes that a large model needs; who connects meanwhile waits.

    Args:
        host: Address or name.
        port: TCP port; 0 takes a free one.

    Raises:
        UserError: The address cannot be used.
    """
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen()
    except (OSError, OverflowError) as error:
        listening.close()
        raise UserError(
            f"the address must be free and this machine's, got {host}:{port} ({error}); choose another --port or --host"
        ) from None
    return listening


def named_directories(texts: Sequence[str], unnamed: str | None = None) -> dict[str, Path]:
    """Adapter directories by name, from texts NAME=DIR and one without a name, which comes first.

    Raises:
        UserError: Another form, or a name twice.
    """
    directories = {} if unnamed is None else {name_of(Path(unnamed)): Path(unnamed)}
    for text in texts:
        name, equals, directory = text.partition("=")
        if not (name and equals and directory):
            raise UserError(
                f"an adapter must be given as NAME=DIR, got {text!r}; write e.g. ads={text}"
            )
        if name in directories:
            raise UserError(f"an adapter's name must be new, got {name!r} twice; rename one")
        directories[name] = Path(directory)
    return directories


def name_of(directory: Path) -> str:
    """The name of an adapter that was given none; a name has no full stop."""
    return directory.resolve().name.replace(".", "_")


def find_base(
    model: str | Path | None, adapters: Mapping[str, Path]
) -> tuple[Path, dict[str, Path]]:
    """The checkpoint directory to serve (the one given, or else the adapters', or else the demo's), and all adapters.

    Args:
        model: A checkpoint directory, or an adapter directory: its base, and the adapter by the directory's name.
        adapters: Directories by name.

    Raises:
        UserError: The adapters name no base, several, or one that is not there; or a name is there twice.
    """
    if model is not None:
        first = {name_of(Path(model)): Path(model)} if is_adapter(model) else {}
        if twice := first.keys() & adapters.keys():
            raise UserError(
                f"an adapter's name must be new, got {twice.pop()!r} twice, as --model too; rename one"
            )
        return base_of(model), first | dict(adapters)
    if not adapters:
        return DEMO_MODEL, {}
    bases = {base_of(path).resolve() for path in adapters.values() if is_adapter(path)}
    if not bases:
        raise UserError(
            f"an adapter must be a directory with adapter_config.json, got {str(next(iter(adapters.values())))!r};"
            " name the base with --model if it is a released prefix (pytorch_model.bin)"
        )
    if len(bases) > 1:
        raise UserError(
            f"all adapters must have one base, got {', '.join(sorted(map(str, bases)))}; say which with --model, or"
            " serve them apart"
        )
    return bases.pop(), dict(adapters)


def open_engine(
    model: str | Path | None = None,
    adapters: Mapping[str, Path] | None = None,
    template: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    quantization_bit: int | None = None,
    limits: Limits | None = None,
) -> Engine:
    """Load everything and start the engine.

    Args:
        model: See `find_base`.
        adapters: See `find_base`.
        template: The chat format; None where the adapters or the checkpoint tell.
        dtype: See `load_model`.
        device: See `load_model`.
        quantization_bit: See `load_model`.
        limits: What the engine accepts.

    Raises:
        UserError: A directory or an argument is wrong.
    """
    if resolve_device(device).type == "cpu":
        give_freed_memory_back()
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(CACHED_KERNELS))
    base, adapters = find_base(model, adapters if adapters is not None else {})
    tokenizer = load_tokenizer(base)
    chat_format = template_of(tokenizer, template, list(adapters.values()))
    engine = Engine(
        load_model(base, dtype, device, quantization_bit), tokenizer, chat_format, limits
    )
    try:
        for name, directory in adapters.items():
            engine.add_adapter(name, directory)
    except UserError:
        engine.close()
        raise
    return engine
