"""Checkpoints from S3 and from a hub: whole or not at all, checked, and gone on with."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from botocore.stub import Stubber
from pydantic import ValidationError
from safetensors.numpy import save_file

from deployments.chain import at_hand
from deployments.config import AppConfig
from models.catalog import add_to_manifest, load_model
from models.fetch import fetch, fetch_parts
from models.lora import load_lora
from models.s3_source import _list
from models.source import (
    HubSource,
    Remote,
    S3Source,
    SourceUnavailable,
    check_names,
    in_cache,
    parse_source,
)
from models.spec import WeightsDamaged
from models.stages import load_decoder
from models.weight_files import sha256_of
from tests.sources.conftest import BUCKET, COMMIT, Hub
from training.random_families import RANDOM_FAMILIES

DEMO = Path("models/demo")


def upload(client: Any, folder: Path, key: str) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            client.upload_file(str(file), BUCKET, f"{key}/{file.relative_to(folder)}")


def at(text: str, cache: Path) -> Remote:
    source = parse_source(text)
    assert source is not None
    return in_cache(source, cache)


def start(*arguments: str, **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "client.command", "models", *arguments],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def command(*arguments: str, **environment: str) -> tuple[int, str, str]:
    """Its exit status, and what it said."""
    run = start(*arguments, **environment)
    out, err = run.communicate(timeout=120)
    return run.returncode, out, err


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): sha256_of(path) for path in files}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("models/demo", None),
        ("/absolute", None),
        ("s3://models/a/b/", S3Source("models", "a/b")),
        ("hf://owner/name", HubSource("owner/name", None, "")),
        ("hf://owner/name@v1.0", HubSource("owner/name", "v1.0", "")),
        (f"hf://owner/na.me@{COMMIT}/vae", HubSource("owner/na.me", COMMIT, "vae")),
    ],
)
def test_a_source_is_told_by_its_scheme(text: str, told: Any) -> None:
    assert parse_source(text) == told
    if told is not None:
        assert parse_source(str(told)) == told


@pytest.mark.parametrize(
    "text", ["s3://models", "s3://m/a", "hf://name", "gs://a/b", "s3://models/a/../b", "hf:///a/b"]
)
def test_what_is_no_source_is_told(text: str) -> None:
    with pytest.raises(ValueError, match=r"neither|a part of it"):
        parse_source(text)


def test_every_source_has_a_place_of_its_own(tmp_path: Path) -> None:
    texts = ["s3://models/a", "s3://models/a/b", "s3://models/a--b", "hf://a/b", "hf://a/b/c"]
    folders = [at(text, tmp_path).folder for text in texts]
    assert all(folder.parent == tmp_path for folder in folders)
    assert len({*folders}) == len(texts)


def test_a_configured_repository_names_its_commit() -> None:
    served = {"served_on": [{"tier": "local"}]}
    tiers = [{"tier": "local", "jobs_at_once": 1}]
    AppConfig.model_validate(
        {"models": [{"path": f"hf://owner/name@{COMMIT}", **served}], "tiers": tiers}
    )
    with pytest.raises(ValidationError, match="name the commit"):
        AppConfig.model_validate({"models": [{"path": "hf://a/b@main", **served}], "tiers": tiers})


def test_a_checkpoint_in_a_bucket_is_the_one_that_was_put_there(s3: Any, tmp_path: Path) -> None:
    upload(s3, DEMO, "demo/v1")
    remote = at(f"s3://{BUCKET}/demo/v1", tmp_path)
    fetch(remote)
    assert contents(remote.path) == contents(DEMO)
    model = replace(load_model(remote.path), remote=remote)
    shutil.rmtree(remote.folder)  # as on another machine
    load_decoder(model)
    assert contents(remote.path) == contents(DEMO)
    s3.put_object(Bucket=BUCKET, Key="demo/v1/manifest.json", Body=b"{}")
    fetch_parts(model)  # there is no need to ask
    shutil.rmtree(remote.folder)
    with pytest.raises(WeightsDamaged, match="manifest"):
        fetch_parts(model)


def test_a_model_that_was_put_anew_is_not_taken_for_the_one_that_is_deployed(
    s3: Any, tmp_path: Path
) -> None:
    upload(s3, DEMO, "demo/changed")
    remote = at(f"s3://{BUCKET}/demo/changed", tmp_path)
    fetch(remote)
    model = replace(load_model(remote.path), remote=remote)
    other = (DEMO / "manifest.json").read_text().replace("runs on a laptop", "is another one")
    s3.put_object(Bucket=BUCKET, Key="demo/changed/manifest.json", Body=other.encode())
    shutil.rmtree(remote.folder)
    with pytest.raises(WeightsDamaged, match="changed since it was deployed"):
        fetch_parts(model)


def test_what_is_there_of_a_file_is_gone_on_with_and_checked_with_the_rest(
    s3: Any, tmp_path: Path
) -> None:
    content = np.random.default_rng(0).bytes(1 << 20)
    for name, manifest in (("by-md5", None), ("by-manifest", sha256_of_bytes(content))):
        s3.put_object(Bucket=BUCKET, Key=f"{name}/x.txt", Body=content)
        if manifest is not None:
            listed = f'{{"sha256": {{"x.txt": "{manifest}"}}}}'.encode()
            s3.put_object(Bucket=BUCKET, Key=f"{name}/manifest.json", Body=listed)
        remote = at(f"s3://{BUCKET}/{name}", tmp_path)
        partial = remote.folder.with_name(f"{remote.folder.name}.partial")
        partial.mkdir(parents=True)
        # Only who goes on with it has the wrong first byte in the end.
        (partial / "x.txt").write_bytes(b"?" + content[1 : 1 << 19])
        with pytest.raises(WeightsDamaged, match="is not the"):
            fetch(remote)
        assert not remote.folder.exists()
        (partial / "x.txt").write_bytes(content[: 1 << 19])
        fetch(remote)
        assert (remote.path / "x.txt").read_bytes() == content


def sha256_of_bytes(content: bytes) -> str:
    import hashlib

    return hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(
    ("key", "error", "match"),
    [
        ("nothing", SourceUnavailable, "there is nothing"),
        ("pickled", WeightsDamaged, "pickled weights are refused"),
        ("in-parts", WeightsDamaged, "no check sum is known"),
    ],
)
def test_what_can_not_be_trusted_is_not_put_in_place(
    s3: Any, tmp_path: Path, key: str, error: type[Exception], match: str
) -> None:
    s3.put_object(Bucket=BUCKET, Key="pickled/vae/weights.bin", Body=b"x")
    upload_in_parts(s3, "in-parts/x.txt")
    remote = at(f"s3://{BUCKET}/{key}", tmp_path)
    with pytest.raises(error, match=match):
        fetch(remote)
    assert not remote.folder.exists()


@pytest.mark.parametrize("name", ["/outside.txt", "../outside.txt", "a//b.txt"])
def test_no_file_is_put_outside_of_its_folder(name: str) -> None:
    with pytest.raises(SourceUnavailable, match="outside of its folder"):
        check_names(S3Source("models", "x"), ["config.json", name])


def test_a_key_that_names_another_place_is_refused(s3: Any, tmp_path: Path) -> None:
    listed = {"Contents": [{"Key": f"outside/{tmp_path}/x.txt"}]}
    stub = Stubber(s3)
    stub.add_response("list_objects_v2", listed)
    with stub, pytest.raises(SourceUnavailable, match="outside of its folder"):
        _list(s3, S3Source(BUCKET, "outside"))


def test_a_manifest_whose_sums_are_none_is_told(s3: Any, tmp_path: Path) -> None:
    s3.put_object(Bucket=BUCKET, Key="bad-sums/manifest.json", Body=b'{"sha256": [1]}')
    with pytest.raises(WeightsDamaged, match="sha256"):
        fetch(at(f"s3://{BUCKET}/bad-sums", tmp_path))


def test_what_an_earlier_try_left_of_a_file_that_is_gone_is_not_taken_along(
    s3: Any, tmp_path: Path
) -> None:
    s3.put_object(Bucket=BUCKET, Key="less/config.json", Body=b"{}")
    remote = at(f"s3://{BUCKET}/less", tmp_path)
    partial = remote.folder.with_name(f"{remote.folder.name}.partial")
    (partial / "vae").mkdir(parents=True)
    (partial / "vae" / "old.json").write_text("{}")
    fetch(remote)
    assert {*contents(remote.path)} == {"config.json"}


def test_what_is_measured_of_a_model_where_it_is_deployed_makes_it_no_other(
    s3: Any, tmp_path: Path
) -> None:
    """`mutoscope models memory` writes into the cache of one machine; others have what was put."""
    upload(s3, DEMO, "demo/measured")
    remote = at(f"s3://{BUCKET}/demo/measured", tmp_path)
    fetch(remote)
    add_to_manifest(remote.path, memory=None)
    model = replace(load_model(remote.path), remote=remote)
    assert model.manifest != load_model(DEMO).manifest
    shutil.rmtree(remote.folder)
    fetch_parts(model)
    assert load_model(remote.path).manifest == load_model(DEMO).manifest


def upload_in_parts(client: Any, key: str) -> None:
    started = client.create_multipart_upload(Bucket=BUCKET, Key=key)
    parts = []
    for number, part in enumerate((b"x" * (5 << 20), b"y"), start=1):
        made = client.upload_part(
            Bucket=BUCKET, Key=key, PartNumber=number, UploadId=started["UploadId"], Body=part
        )
        parts.append({"PartNumber": number, "ETag": made["ETag"]})
    client.complete_multipart_upload(
        Bucket=BUCKET, Key=key, UploadId=started["UploadId"], MultipartUpload={"Parts": parts}
    )


def test_a_bucket_that_is_not_there_and_a_server_that_does_not_answer_are_told(
    s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SourceUnavailable, match="NoSuchBucket"):
        fetch(at("s3://no-such-bucket/x", tmp_path))
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(SourceUnavailable, match="Could not connect"):
        fetch(at(f"s3://{BUCKET}/demo", tmp_path))


def test_of_several_at_once_one_brings_it(s3: Any, tmp_path: Path) -> None:
    upload(s3, DEMO / "vae", "several")
    remote = at(f"s3://{BUCKET}/several", tmp_path)
    threads = [threading.Thread(target=fetch, args=(remote,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert contents(remote.path) == contents(DEMO / "vae")


def test_a_lora_in_a_bucket_is_one_file(s3: Any, tmp_path: Path) -> None:
    weights = {
        "unet.down_blocks.0.attentions.0.proj_in.lora_A.weight": np.zeros((2, 4), np.float32),
        "unet.down_blocks.0.attentions.0.proj_in.lora_B.weight": np.zeros((4, 2), np.float32),
    }
    save_file(weights, tmp_path / "style.safetensors")
    s3.upload_file(str(tmp_path / "style.safetensors"), BUCKET, "loras/style.safetensors")
    remote = at(f"s3://{BUCKET}/loras/style.safetensors", tmp_path / "cache")
    fetch(remote)
    lora = load_lora(remote.path, "style")
    assert lora.sha256 == sha256_of(tmp_path / "style.safetensors")


def test_a_killed_fetch_leaves_nothing_in_place_and_the_next_goes_on(
    hub: Hub, tmp_path: Path
) -> None:
    hub.folder.mkdir()
    file = hub.folder / "vae" / "diffusion_pytorch_model.safetensors"
    file.parent.mkdir()
    save_file({"x": np.random.default_rng(0).random(4 << 20, np.float32)}, file)
    (file.parent / "config.json").write_text("{}")
    hub.stall_after = 12 << 20
    cache = tmp_path / "cache"
    source = f"hf://owner/name@{COMMIT}/vae"
    first = start("fetch", source, str(cache), HF_ENDPOINT=hub.url)
    assert hub.stalled.wait(60)
    wait_for_bytes(cache, 8 << 20)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    hub.released.set()
    remote = at(source, cache)
    assert not remote.folder.exists()
    assert command("fetch", source, str(cache), HF_ENDPOINT=hub.url)[0] == 0
    assert contents(remote.path) == contents(hub.folder / "vae")
    ranges = [asked for verb, path, asked in hub.requests if verb == "GET" and asked is not None]
    assert [int(asked.removeprefix("bytes=").split("-")[0]) >= 8 << 20 for asked in ranges] == [
        True
    ]


def wait_for_bytes(folder: Path, count: int) -> None:
    deadline_s = time.monotonic() + 30
    while not any(path.stat().st_size >= count for path in folder.rglob("*.safetensors")):
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def test_a_published_pipeline_of_a_hub_may_be_deployed(hub: Hub, tmp_path: Path) -> None:
    RANDOM_FAMILIES["svd"](hub.folder)
    made = load_model(hub.folder)
    (hub.folder / "manifest.json").unlink()
    index = hub.folder / "model_index.json"
    index.write_text('{"_class_name": "StableVideoDiffusionPipeline"}')
    (hub.folder / "svd.safetensors").write_bytes(b"whole, for other programs")
    (hub.folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"pickled")
    variant = hub.folder / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    variant.write_bytes(b"of another type")
    code, out, err = command(
        "fetch", "hf://owner/name", str(tmp_path / "cache"), HF_ENDPOINT=hub.url
    )
    assert code == 0, err
    source, folder = out.split()
    assert source == f"hf://owner/name@{COMMIT}"
    assert Path(folder) == at(source, tmp_path / "cache").path
    model = load_model(Path(folder))
    assert model.manifest.family == made.manifest.family
    assert model.manifest.licence.startswith("Stable Video Diffusion")
    names = {*contents(Path(folder))}
    assert "unet/diffusion_pytorch_model.safetensors" in names
    assert not {n for n in names if n.endswith(".bin") or ".fp16." in n or n == "svd.safetensors"}
    assert not [name for name in names if name.startswith(".cache")]


def test_a_file_that_is_not_what_the_hub_says_is_not_put_in_place(hub: Hub, tmp_path: Path) -> None:
    file = hub.folder / "vae" / "x.safetensors"
    file.parent.mkdir(parents=True)
    save_file({"x": np.zeros(4, np.float32)}, file)
    hub.wrong = "vae/x.safetensors"
    source = f"hf://owner/name@{COMMIT}/vae/x.safetensors"
    code, _, err = command("fetch", source, str(tmp_path / "cache"), HF_ENDPOINT=hub.url)
    assert code == 1
    assert "its check sum is not the one that the hub keeps" in err
    hub.wrong = None
    assert command("fetch", source, str(tmp_path / "cache"), HF_ENDPOINT=hub.url)[0] == 0
    assert sha256_of(at(source, tmp_path / "cache").path) == sha256_of(file)


def test_the_command_tells_the_newest_commit_and_what_is_no_source(
    hub: Hub, tmp_path: Path
) -> None:
    hub.folder.mkdir()
    code, out, _ = command("pin", "hf://owner/name@main/vae", HF_ENDPOINT=hub.url)
    assert code == 0
    assert out.strip() == f"hf://owner/name@{COMMIT}/vae"
    for arguments, told in (
        (("pin", "s3://models/x"), "is not of a hub"),
        (("fetch", "models", "x"), "is a path of this machine"),
        (("fetch", "gs://models/y", "x"), "neither a path"),
    ):
        code, _, err = command(*arguments)
        assert code == 2
        assert told in err
    code, _, err = command("fetch", "hf://owner/other", str(tmp_path), HF_ENDPOINT=hub.url)
    assert code == 1
    assert "hf://owner/other" in err


def test_a_configured_source_is_at_hand_and_other_machines_know_it(s3: Any, tmp_path: Path) -> None:
    upload(s3, DEMO, "demo/configured")
    text = f"s3://{BUCKET}/demo/configured"
    folder, remote = at_hand(text, tmp_path)
    assert remote == at(text, tmp_path)
    assert load_model(folder).manifest == load_model(DEMO).manifest
    assert at_hand("models/demo", tmp_path) == (DEMO.absolute(), None)
