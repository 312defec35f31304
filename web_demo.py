"""Chat in the browser: python web_demo.py [--prefix DIR]; all options with --help."""

import logging
import sys

from chatglm_ptuning.cli import fail
from chatglm_ptuning.errors import UserError
from chatglm_ptuning.serving.web import main

if __name__ == "__main__":
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it misses kernels nobody asked for
    try:
        main()
    except UserError as error:
        sys.exit(fail(str(error)))
