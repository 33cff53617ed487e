"""``python -m falqon_fx``: the command line (`falqon_fx.cli`)."""

import sys

from falqon_fx.cli import main

sys.exit(main())
