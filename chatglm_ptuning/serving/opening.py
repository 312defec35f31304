"""From the words of a command line to an engine: base, adapters, chat format."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from chatglm_ptuning.config import PROJECT
from chatglm_ptuning.errors import UserError
from chatglm_ptuning.loading import base_of, is_adapter, load_model, load_tokenizer, template_of
from chatglm_ptuning.serving.engine import Engine
from chatglm_ptuning.serving.limits import Limits

DEMO_MODEL = PROJECT / "demo" / "model"


def named_directories(texts: Sequence[str]) -> dict[str, Path]:
    """Adapter directories by name, from texts NAME=DIR.

    Raises:
        UserError: Another form, or a name twice.
    """
    directories: dict[str, Path] = {}
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


def find_base(model: str | Path | None, adapters: Mapping[str, Path]) -> Path:
    """The checkpoint directory to serve: the one given, or else the adapters', or else the demo's.

    Raises:
        UserError: The adapters name several, or one that is not there.
    """
    if model is not None:
        return base_of(model)
    bases = {base_of(path).resolve() for path in adapters.values() if is_adapter(path)}
    if len(bases) > 1:
        raise UserError(
            f"all adapters must have one base, got {', '.join(sorted(map(str, bases)))}; say which with --model, or"
            " serve them apart"
        )
    return bases.pop() if bases else DEMO_MODEL


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
        model: A checkpoint directory, or an adapter directory (its base, and the adapter by the directory's name); None
            takes the adapters' base, and without adapters the demo's.
        adapters: Directories by name.
        template: The chat format; None where the adapters or the checkpoint tell.
        dtype: See `load_model`.
        device: See `load_model`.
        quantization_bit: See `load_model`.
        limits: What the engine accepts.

    Raises:
        UserError: A directory or an argument is wrong.
    """
    adapters = dict(adapters) if adapters is not None else {}
    if model is not None and is_adapter(model):
        adapters = {name_of(Path(model)): Path(model)} | adapters
    base = find_base(model, adapters)
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
