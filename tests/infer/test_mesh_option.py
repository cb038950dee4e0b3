"""`--mesh`: a line of axes."""

import jax
import pytest

from kvjax.errors import InputError
from kvjax.infer.commands.shared import parse_mesh
from kvjax.infer.replicas import replica_meshes


def test_axes_become_a_mesh():
    mesh = parse_mesh("data=1, model=1")
    assert dict(mesh.shape) == {"data": 1, "model": 1}
    (part,) = replica_meshes(mesh)
    assert dict(part.shape) == {"model": 1}


@pytest.mark.parametrize(
    "text, message",
    [
        ("data", "write axes"),
        ("rows=2", "write axes"),
        ("data=2,data=2", "write axes"),
        ("model=-1", "write axes"),
        ("model=0", "is of 0 devices"),
        (f"data={jax.device_count()},model=3", f"there are {jax.device_count()}"),
    ],
)
def test_what_is_no_mesh_is_said(text, message):
    with pytest.raises(InputError, match=message):
        parse_mesh(text)
