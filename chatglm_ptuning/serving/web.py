"""`python web_demo.py`: open a model with its adapters and serve the web page, on this machine alone unless told."""

import argparse
import logging
import os
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from chatglm_ptuning.config import OUTPUT_DIRS
from chatglm_ptuning.data.template import TEMPLATES
from chatglm_ptuning.errors import UserError
from chatglm_ptuning.loading import is_adapter
from chatglm_ptuning.serving.engine import Engine
from chatglm_ptuning.serving.opening import find_base, listen, named_directories, open_engine
from chatglm_ptuning.serving.web_text import LANGUAGES

# Whatever an answer contains, the browser fetches nothing from another machine.
CONTENT_POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:;"
    " style-src 'self' 'unsafe-inline'; frame-ancestors 'self'; form-action 'self'"
)


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="web_demo.py",
        description="Chat in the browser with a model and its adapters.",
        epilog="Without --model and adapters: the demo model, with the adapter in outputs/ptuning if there is one.",
    )
    add = parser.add_argument
    add(
        "--model",
        metavar="DIR",
        help="checkpoint directory (default: the base that the adapter names)",
    )
    add("--prefix", metavar="DIR", help="adapter directory, named after its last part")
    add(
        "--adapter",
        metavar="NAME=DIR",
        action="append",
        default=[],
        help="adapter directory with a name; repeatable",
    )
    add(
        "--template",
        choices=sorted(TEMPLATES),
        help="chat format, where the checkpoint does not tell it",
    )
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    add("--device", help="cpu, cuda, cuda:1 (default: the GPU if there is one)")
    add("--quantization-bit", type=int, choices=(4, 8), help="quantise the base with bitsandbytes")
    add("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    add("--port", type=int, default=7860)
    add("--auth", metavar="USER:PASSWORD", help="ask visitors for this")
    add("--share", action="store_true", help="make a public link through gradio's server")
    add(
        "--language",
        choices=sorted(LANGUAGES),
        help="of the page at first (default: the browser's)",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve the page until interrupted.

    Raises:
        UserError: An option, a directory or a file is wrong.
    """
    args = make_parser().parse_args(arguments)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    auth = parse_auth(args.auth)
    with listen(args.host, args.port) as probe:  # gradio would say so after the model is loaded
        host, port = probe.getsockname()[:2]
    model_path, adapters = choose_paths(args.model, args.prefix, args.adapter)
    names = ", ".join(f"{name} ({shown_path(path)})" for name, path in adapters.items())
    print(f"opening {shown_path(model_path)}{f' with {names}' if names else ''}")
    engine = open_engine(
        model_path, adapters, args.template, args.dtype, args.device, args.quantization_bit
    )
    try:
        page = make_page(engine, adapters, model_path, args.language)
        launch(page, host, port, auth, args.share)
        print(f"open {page.blocks.local_url}    (Ctrl-C ends)", flush=True)
        page.blocks.block_thread()
    finally:
        engine.close(drain=False)


def parse_auth(text: str | None) -> list[tuple[str, str]] | None:
    """`USER:PASSWORD` as gradio wants it.

    Raises:
        UserError: Another form.
    """
    if text is None:
        return None
    user, colon, password = text.partition(":")
    if not (user and colon and password):
        raise UserError("--auth must be USER:PASSWORD, neither of them empty")
    return [(user, password)]


def choose_paths(
    model: str | None, prefix: str | None, named: Sequence[str]
) -> tuple[Path, dict[str, Path]]:
    """The base and the adapters by name.

    Raises:
        UserError: See `named_directories` and `find_base`.
    """
    trained = OUTPUT_DIRS["ptuning_v2"]
    if model is None and prefix is None and not named and is_adapter(trained):
        prefix = trained
    return find_base(model, named_directories(named, prefix))


def make_page(
    engine: Engine, adapters: dict[str, Path], model_path: Path, language: str | None
) -> Any:
    """The page over an engine; gradio is imported here: it takes seconds, and reads the environment then."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    from chatglm_ptuning.serving.web_page import WebPage
    from chatglm_ptuning.serving.web_run import read_run

    model = engine.model
    dtype = str(model.dtype).removeprefix("torch.")
    subtitle = f"{shown_path(model_path)} · {engine.template.name} · {dtype} · {model.device}"
    runs = {name: read_run(directory) for name, directory in adapters.items()}
    return WebPage(engine, runs, subtitle, language)


def launch(
    page: Any, host: str, port: int, auth: list[tuple[str, str]] | None = None, share: bool = False
) -> None:
    """Start serving, in threads.

    Raises:
        UserError: The port is taken.
    """
    from chatglm_ptuning.serving.web_style import CSS, PLAIN_EDITING, THEME

    reach_directly(host)
    page.blocks.queue(max_size=64, api_open=False)
    try:
        page.blocks.launch(
            server_name=f"[{host}]" if ":" in host else host,
            server_port=port,
            share=share,
            auth=auth,
            theme=THEME,
            css=CSS,
            js=PLAIN_EDITING,
            i18n=page.i18n,
            footer_links=[],
            run_history=False,
            ssr_mode=False,
            quiet=True,
            prevent_thread_lock=True,
            state_session_capacity=1000,
            app_kwargs={"middleware": [(ContentPolicy, (), {})]},
        )
    except OSError as error:
        raise UserError(
            f"--port must be free on {host}, got {port} ({error}); choose another"
        ) from error


def reach_directly(host: str) -> None:
    """Except this machine from the proxy, if there is one: gradio asks itself whether it is up."""
    for name in ("no_proxy", "NO_PROXY"):
        hosts = [entry for entry in os.environ.get(name, "").split(",") if entry]
        os.environ[name] = ",".join([*hosts, "127.0.0.1", "localhost", host])


class ContentPolicy:
    """Sends `CONTENT_POLICY` with every response.

    Args:
        app: The ASGI application.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app

    async def __call__(
        self, scope: MutableMapping[str, Any], receive: Any, send: Callable[..., Awaitable[None]]
    ) -> None:
        """Serve one request."""

        async def send_with_policy(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", CONTENT_POLICY.encode("ascii"))
                message["headers"] = [*message.get("headers", ()), policy]
            await send(message)

        await self.app(scope, receive, send_with_policy)


def shown_path(path: Path) -> str:
    """A path as short as it can be said from here."""
    here = Path.cwd()
    resolved = path.resolve()
    return str(resolved.relative_to(here)) if resolved.is_relative_to(here) else str(resolved)
