"""Chat in the browser: python web_demo.py [--prefix DIR]; all options with --help."""

import sys

from chatglm_ptuning.cli import exit_code, set_up_logging


def run() -> None:
    """Serve the page; torch is imported here, which takes seconds."""
    from chatglm_ptuning.serving.web import main

    main()


if __name__ == "__main__":
    set_up_logging()
    sys.exit(exit_code(run))
