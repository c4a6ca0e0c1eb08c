"""`python -m fused_resnet`: see cli.py."""

import sys

from .cli import main

sys.exit(main())
