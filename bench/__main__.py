"""Entry point of `python -m gradfused.bench`."""

import sys

from .cli import main

sys.exit(main())
