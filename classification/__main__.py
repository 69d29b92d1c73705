"""The word `mgd` without an installation: python -m classification"""

import sys

from classification.shell import main

sys.exit(main())
