"""The encoder's rows of the equivalence matrix: any mesh gives the terms and gradients of one device, in float64."""

import pytest
from encoder_cells import CELLS, EncoderCell, measure_encoder

ALWAYS = ("tensor, ring",)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in ALWAYS)) for n in CELLS])
def test_a_mesh_is_equal_to_one_device(name):
    found = measure_encoder(EncoderCell(name))
    assert found.equal, found
