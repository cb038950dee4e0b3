"""`python -m kvjax` is `kvjax`."""

import importlib
import sys

# By name: the library points down only, and the commands stand above it.
sys.exit(importlib.import_module("kvjax.infer.cli").main())
