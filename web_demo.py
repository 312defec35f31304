"""Chat in the browser: python web_demo.py [--prefix DIR]; all options with --help."""

import sys

from chatglm_ptuning.cli import fail, set_up_logging
from chatglm_ptuning.errors import UserError

if __name__ == "__main__":
    set_up_logging()
    from chatglm_ptuning.serving.web import main

    try:
        main()
    except UserError as error:
        sys.exit(fail(str(error)))
