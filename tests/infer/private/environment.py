"""Where the parties' environment is, for tests; without it they are skipped."""

import pytest

from kvjax.infer.private.environment import environment_folder

needs_parties = pytest.mark.skipif(
    not (environment_folder() / "ready").exists(),
    reason="no environment for parties: run `kvjax private setup` first",
)
