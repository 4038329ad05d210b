"""`python -m nystromgan` is the command `nystromgan`."""

import sys

from nystromgan.cli import main

sys.exit(main())
