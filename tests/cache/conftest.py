"""What the tests of the cache share."""

import jax
import pytest


@pytest.fixture(params=["eager", "donated"])
def run(request):
    """`run(f, donate)`: f as it is, or jitted with those arguments donated."""

    def wrap(f, donate=(0,)):
        return f if request.param == "eager" else jax.jit(f, donate_argnums=donate)

    return wrap
