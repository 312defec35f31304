"""`python -m chatglm_ptuning COMMAND`."""

import sys

from chatglm_ptuning.cli import main

sys.exit(main())
