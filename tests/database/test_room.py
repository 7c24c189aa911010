"""What fits into no GPU's memory is refused over HTTP, before anything is reserved."""

from dataclasses import replace

import pytest
from sqlalchemy import Engine

from autoscaling.room import TierRoom
from autoscaling.tiers import GpuTier, ServedOn
from credits.accounts import Account
from deployments.ingress import IngressParts
from models.compute import Dtype
from models.fit import USABLE, Gpus, denoise_footprint
from models.memory_profile import profile_memory
from tests.conftest import read_account
from tests.database.conftest import Door

pytestmark = pytest.mark.database

SMALL, LARGE = {"prompt": "x", "num_frames": 13}, {"prompt": "x", "num_frames": 49}


@pytest.fixture
def parts(parts: IngressParts) -> IngressParts:
    """The tests' model on two tiers: what needs more than the first one's memory goes to `local`,
    which has two GPUs that 25 frames of the default size would just fill if one had to.
    """
    ((name, offer),) = parts.offers.items()
    model = offer.model
    memory = profile_memory(model.folder, model.manifest)
    nothing = memory.decoder.model_copy(
        update={
            "parameters": 1,
            "two_bytes": memory.decoder.two_bytes.model_copy(update={"base": 0, "per_unit": 0}),
            "four_bytes": memory.decoder.four_bytes.model_copy(update={"base": 0, "per_unit": 0}),
        }
    )
    memory = memory.model_copy(update={"decoder": nothing})
    model = replace(model, manifest=model.manifest.model_copy(update={"memory": memory}))

    def gpus(num_frames: int, count: int) -> TierRoom:
        request = model.resolve({"prompt": "x", "num_frames": num_frames})
        needed = denoise_footprint(model, request, 1, Dtype.FLOAT32).total
        return TierRoom(Gpus(int(needed / USABLE) + 1, count, Dtype.FLOAT32))

    tiers = (ServedOn(tier=GpuTier.A100), ServedOn(tier=GpuTier.LOCAL))
    room = {GpuTier.A100: gpus(9, 1), GpuTier.LOCAL: gpus(25, 2)}
    return replace(parts, offers={name: replace(offer, model=model, served_on=tiers, room=room)})


def test_what_fits_nowhere_is_refused_and_the_rest_goes_where_it_fits(
    door: Door, engine: Engine, alice: Account
) -> None:
    refused = door.as_account()("POST", "/v1/videos", json=LARGE | {"num_frames": 129})
    assert refused.status_code == 400, refused.text
    error = refused.json()["error"]
    assert error["param"] == "num_frames"
    assert "do not fit into the memory of a GPU" in error["message"]
    assert read_account(engine, alice.id).reserved == 0
    most = int(error["message"].rsplit("the most are ", 1)[1].split()[0])
    assert 25 < most < 129
    for num_frames, tier in ((most, "local"), (13, "local"), (9, "a100")):
        made = door.as_account()("POST", "/v1/videos", json={**SMALL, "num_frames": num_frames})
        assert made.status_code == 200, made.text
        with engine.connect() as connection:
            row = connection.exec_driver_sql("SELECT tier FROM jobs ORDER BY number DESC").first()
        assert row is not None
        assert row.tier == tier
