"""``python -m falqon_fx``: the command line (`falqon_fx_cli.main`)."""

import sys

from falqon_fx_cli.main import main

sys.exit(main())
