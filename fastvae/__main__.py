"""`python -m fastvae` is the command `fastvae`."""

import sys

from .cli import main

sys.exit(main())
