"""`python -m lumen.cli`."""

from __future__ import annotations

import sys

from lumen.cli.main import main

sys.exit(main())
