"""`python -m ptv2`, which `accelerate launch -m ptv2` needs."""

import sys

from ptv2.cli import main

sys.exit(main())
