"""The manifest is valid for Kubernetes, for KubeRay and for Serve, and its names agree."""

import copy
import os
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from jsonschema import Draft202012Validator
from ray.serve.schema import ServeDeploySchema

from deployments.config import AppConfig

pytestmark = pytest.mark.k8s

ROOT = Path(__file__).resolve().parents[2]
MANIFEST = ROOT / "k8s" / "mutoscope.yaml"
CORE_VERSION = "1.37"


def documents() -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(MANIFEST.read_text()) if document]


def ray_service() -> dict[str, Any]:
    return next(document for document in documents() if document["kind"] == "RayService")


def worker_groups() -> dict[str, dict[str, Any]]:
    specs = ray_service()["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    return {group["groupName"]: group for group in specs}


def serve_config() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(ray_service()["spec"]["serveConfigV2"])
    return content


@pytest.mark.parametrize("index", [0, 1, 2, 3])
def test_core_objects_are_valid(index: int) -> None:
    document = documents()[index]
    kubernetes_validate.validate(document, CORE_VERSION, strict=True)
    document["speck"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(document, CORE_VERSION, strict=True)


def pod_templates() -> list[dict[str, Any]]:
    cluster = ray_service()["spec"]["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"] for group in groups]


@pytest.mark.parametrize("index", [0, 1, 2, 3])
def test_pod_templates_are_valid_pods(index: int) -> None:
    template = pod_templates()[index]
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "x", **template["metadata"]},
        "spec": template["spec"],
    }
    kubernetes_validate.validate(pod, CORE_VERSION, strict=True)


def strict(schema: Any) -> Any:
    """A CRD's schema that refuses unknown fields, as an API server with strict validation does."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: strict(value) for key, value in schema.items()}
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        result.setdefault("additionalProperties", False)
    if schema.get("x-kubernetes-int-or-string"):
        result.pop("type", None)
    return result


def test_the_ray_service_fits_kuberays_crd() -> None:
    folder = os.environ.get("KUBERAY_CRDS")
    if folder is None:
        pytest.skip(
            "set KUBERAY_CRDS to a folder with ray.io_rayservices.yaml from kuberay's "
            "ray-operator/config/crd/bases"
        )
    crd = yaml.safe_load((Path(folder) / "ray.io_rayservices.yaml").read_text())
    version = next(v for v in crd["spec"]["versions"] if v["name"] == "v1")
    schema = strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    validator = Draft202012Validator(schema)
    assert list(validator.iter_errors(ray_service())) == []
    broken = copy.deepcopy(ray_service())
    broken["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["maxReplica"] = 1
    assert list(validator.iter_errors(broken)) != []


def gpus_of(deployment: dict[str, Any]) -> float:
    """Of one replica: a denoiser's are its ranks', whose bundles follow its own."""
    bundles = deployment.get("placement_group_bundles")
    if bundles is None:
        return float(deployment["ray_actor_options"]["num_gpus"])
    assert "GPU" not in bundles[0]
    assert all(bundle["GPU"] > 0 for bundle in bundles[1:])
    return sum(float(bundle["GPU"]) for bundle in bundles[1:])


def test_whatever_may_run_a_job_again_sees_its_checkpoint() -> None:
    directory = serve_config()["applications"][0]["args"]["storage"]["directory"]
    claims = set()
    for template in pod_templates():
        (container,) = template["spec"]["containers"]
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        claims.add(volumes[mounts[directory]]["persistentVolumeClaim"]["claimName"])
    (claim,) = claims
    (volume,) = [
        document
        for document in documents()
        if document["kind"] == "PersistentVolumeClaim" and document["metadata"]["name"] == claim
    ]
    assert volume["spec"]["accessModes"] == ["ReadWriteMany"]


def test_serve_takes_the_configuration() -> None:
    schema = ServeDeploySchema.model_validate(serve_config())
    assert schema.applications[0].import_path == "deployments.app:build"
    AppConfig.model_validate(serve_config()["applications"][0]["args"])


def test_every_deployment_and_tier_has_its_place() -> None:
    application = serve_config()["applications"][0]
    tiers = [tier["tier"] for tier in application["args"]["tiers"]]
    assert tiers == list(worker_groups()) == ["t4", "a10g", "a100"]
    expected = {"Ingress", "VideoPipeline", "TextEncoder", "MediaEncoder"}
    expected |= {f"{stage}-{tier}" for tier in tiers for stage in ("Denoiser", "VaeDecoder")}
    assert {deployment["name"] for deployment in application["deployments"]} == expected
    for deployment in application["deployments"]:
        _, _, tier = deployment["name"].partition("-")
        if tier:
            options = deployment["ray_actor_options"]
            assert options["label_selector"] == {"gpu-tier": tier}
            assert gpus_of(deployment) > 0
            bundles = deployment.get("placement_group_bundles", [])
            selectors = deployment.get("placement_group_bundle_label_selector", [])
            assert selectors == [{"gpu-tier": tier}] * len(bundles)
            labels = worker_groups()[tier]["rayStartParams"]["labels"]
            assert labels == f"gpu-tier={tier}"


@pytest.mark.parametrize(
    ("tier", "instance", "num_gpus"),
    [("t4", "g4dn.xlarge", 1), ("a10g", "g5.xlarge", 1), ("a100", "p4d.24xlarge", 8)],
)
def test_a_tier_starts_from_zero_on_its_instance(tier: str, instance: str, num_gpus: int) -> None:
    group = worker_groups()[tier]
    assert group["minReplicas"] == 0
    pod = group["template"]["spec"]
    assert pod["nodeSelector"]["node.kubernetes.io/instance-type"] == instance
    limits = pod["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == str(num_gpus)
    deployments = serve_config()["applications"][0]["deployments"]
    wanted = sum(
        gpus_of(deployment) * deployment["autoscaling_config"]["max_replicas"]
        for deployment in deployments
        if deployment["name"].endswith(f"-{tier}")
    )
    assert round(wanted, 6) <= num_gpus * group["maxReplicas"]


def test_ray_is_never_without_its_token() -> None:
    for template in pod_templates():
        environment = {entry["name"]: entry for entry in template["spec"]["containers"][0]["env"]}
        assert environment["RAY_AUTH_MODE"]["value"] == "token"
        assert "secretKeyRef" in environment["RAY_AUTH_TOKEN"]["valueFrom"]
