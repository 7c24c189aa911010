"""How many models' weights fit, whichever they are."""

from dataclasses import replace
from pathlib import Path

import pytest

from deployments.resident_models import ModelTooLarge, how_many_fit
from models.catalog import Model


def test_as_many_fit_as_the_largest_leave_room_for(model: Model, tmp_path: Path) -> None:
    models = []
    for index, size_bytes in enumerate((100, 300, 200)):
        folder = tmp_path / str(index) / "transformer"
        folder.mkdir(parents=True)
        (folder / "a.safetensors").write_bytes(bytes(size_bytes - 10))
        (folder / "b.safetensors").write_bytes(bytes(10))
        models.append(replace(model, id=str(index), folder=folder.parent))
    assert [how_many_fit(models, limit) for limit in (None, 300, 499, 500, 599, 600)] == [
        3,
        1,
        1,
        2,
        2,
        3,
    ]
    with pytest.raises(ModelTooLarge, match="1: its denoiser takes 300 bytes"):
        how_many_fit(models, 299)
    assert how_many_fit([], 1) == 0
