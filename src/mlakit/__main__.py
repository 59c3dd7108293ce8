"""`python -m mlakit` is `mlakit`."""

import sys

from mlakit.cli.main import main

sys.exit(main())
