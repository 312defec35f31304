"""`python -m chatglm_ptuning serve`: the API as a process of its own."""

import ipaddress
import logging
import os
import signal
from pathlib import Path

import uvicorn

from chatglm_ptuning.errors import UserError
from chatglm_ptuning.serving.api import Keys, create_app
from chatglm_ptuning.serving.engine import Engine

logger = logging.getLogger(__name__)

API_KEY, ADMIN_KEY = "CHATGLM_PTUNING_API_KEY", "CHATGLM_PTUNING_ADMIN_KEY"
GRACE = 30  # seconds that answers under way have to finish once the server is told to stop


def read_key(file: Path | None, variable: str) -> str | None:
    """A key from a file, or else from the environment; None if neither has one.

    Raises:
        UserError: The file cannot be read, or a key is empty or has blanks in it.
    """
    if file is None:
        key = os.environ.get(variable)
        if key is None:
            return None
        source = variable
    else:
        source = str(file)
        try:
            key = file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"a key file must be readable text, got {source!r}: {error}") from None
    if not key.isascii() or not key.isprintable() or " " in key or not key:
        raise UserError(
            f"a key must be one word of ASCII characters, got another in {source}; write it anew"
        )
    return key


def is_local(host: str) -> bool:
    """Whether only this machine reaches a host address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def serve(engine: Engine, host: str, port: int, keys: Keys) -> None:
    """Answer until SIGTERM (exit code 0) or Ctrl-C; answers under way may finish.

    Args:
        engine: Answers; closed in the end.
        host: Address to listen at.
        port: TCP port; 0 takes a free one.
        keys: Who may do what.

    Raises:
        UserError: The address cannot be used.
    """
    base = Path(engine.model.config.name_or_path).resolve().name
    app = create_app(engine, base, keys)
    config = uvicorn.Config(
        app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=GRACE
    )
    try:
        socket = config.bind_socket()
    except SystemExit:  # uvicorn has logged the reason
        engine.close()
        raise UserError(
            f"the address must be free and this machine's, got {host}:{port}; choose another --port"
        ) from None
    if not is_local(host) and keys.api is None:
        logger.warning(
            "everybody who reaches %s may ask without a key; set %s or --api-key-file",
            host,
            API_KEY,
        )
    url = f"http://{f'[{host}]' if ':' in host else host}:{socket.getsockname()[1]}/v1"
    print(greeting(url, [base, *engine.adapters], keys), flush=True)
    # uvicorn raises the signal that stopped it once more; SIGTERM is a proper end.
    signal.signal(signal.SIGTERM, lambda *_: None)
    uvicorn.Server(config).run(sockets=[socket])


def greeting(url: str, models: list[str], keys: Keys) -> str:
    """Where the API is, what it serves, and how to try it."""
    model = models[-1]
    key = f' -H "Authorization: Bearer ${API_KEY}"' if keys.api is not None else ""
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "你好"}}]}}'
    return (
        f"serving {', '.join(models)} at {url} (Ctrl-C stops)\n"
        f"try:  curl {url}/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'"
    )
