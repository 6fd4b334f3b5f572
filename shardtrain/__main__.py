"""`python -m shardtrain`: the command line, where its script is not on the path."""

import sys

from shardtrain.cli import main

sys.exit(main())
