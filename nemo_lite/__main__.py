"""``python -m nemo_lite`` is ``nemo-lite``."""

import sys

from nemo_lite.cli import main

sys.exit(main())
