"""`python -m chatglm_ptuning serve`: the API as a process of its own."""

import asyncio
import ipaddress
import logging
import os
import signal
import sys
from pathlib import Path
from socket import socket
from types import FrameType

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


class Server(uvicorn.Server):
    """uvicorn's; whoever waits for an answer is told once it is given up: after `GRACE`, or at a second signal.

    Args:
        config: Of uvicorn.
        engine: Answers.
    """

    def __init__(self, config: uvicorn.Config, engine: Engine) -> None:
        super().__init__(config)
        self.engine = engine

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop at the first signal, give up at the second, and drop everything at a third that is Ctrl-C."""
        if self.should_exit and self.engine.is_open:
            self.engine.give_up()
        else:
            super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        """Let answers under way finish, for so long."""
        end = asyncio.get_running_loop().call_later(GRACE, self.engine.give_up)
        await super().shutdown(sockets)
        end.cancel()


def serve(engine: Engine, listening: socket, keys: Keys) -> None:
    """Answer until SIGTERM (exit code 0) or Ctrl-C; answers under way may finish.

    Args:
        engine: Answers; closed in the end.
        listening: Where.
        keys: Who may do what.

    Raises:
        UserError: An adapter has the base's name.
    """
    base = Path(engine.model.config.name_or_path).resolve().name
    app = create_app(engine, base, keys)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2 * GRACE)
    host, port = listening.getsockname()[:2]
    if not ipaddress.ip_address(host).is_loopback and keys.api is None:
        logger.warning(
            "everybody who reaches %s may ask without a key; set %s or --api-key-file",
            host,
            API_KEY,
        )
    # uvicorn raises the signal that stopped it once more; SIGTERM is a proper end.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    print(greeting(url, [base, *engine.adapters], keys), flush=True)
    Server(config, engine).run(sockets=[listening])


def greeting(url: str, models: list[str], keys: Keys) -> str:
    """Where the API is, what it serves, and how to try it."""
    model = models[-1]
    key = f' -H "Authorization: Bearer ${API_KEY}"' if keys.api is not None else ""
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "你好"}}]}}'
    return (
        f"serving {', '.join(models)} at {url} (Ctrl-C stops)\n"
        f"try:  curl {url}/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'"
    )
