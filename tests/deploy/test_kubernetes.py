"""The files for Kubernetes: valid by its schemas, what they refer to is there, and all pods are of one mind.

The schemas of the two custom resources are no package's; their fields are listed here, of `leaderworkerset_types.go`
and `raycluster_types.go`. What is in them, templates of pods, Kubernetes' own schema knows.
"""

import re
import shlex
from typing import Any

import kubernetes_validate
import pytest
import yaml

from common.layout_args import RAY_PORT
from tests.deploy.commands import DEPLOY, agree, follower, load, server

FILES = ("leaderworkerset.yaml", "kuberay.yaml")
VERSION = "1.33"
LEADER = "vllm-0.vllm"
SET = {
    "spec": {"replicas", "leaderWorkerTemplate", "rolloutStrategy", "startupPolicy", "networkConfig"},
    "template": {"leaderTemplate", "workerTemplate", "size", "restartPolicy", "subGroupPolicy", "volumeClaimTemplates"},
}
RAY = {
    "spec": {"headGroupSpec", "workerGroupSpecs", "rayVersion", "enableInTreeAutoscaling", "suspend"},
    "head": {"serviceType", "headService", "enableIngress", "rayStartParams", "template"},
    "worker": {
        *("groupName", "replicas", "minReplicas", "maxReplicas", "numOfHosts", "rayStartParams", "template"),
        "scaleStrategy",
    },
}


def read(name: str) -> dict[str, dict[str, Any]]:
    """The file's objects by their kind."""
    objects = list(yaml.safe_load_all((DEPLOY / name).read_text(encoding="utf-8")))
    found = {each["kind"]: each for each in objects}
    assert len(found) == len(objects)
    return found


def templates(name: str) -> dict[str, dict[str, Any]]:
    """Of the head's pod and the others', and how many there are of these."""
    objects = read(name)
    if name == "leaderworkerset.yaml":
        inside = objects["LeaderWorkerSet"]["spec"]["leaderWorkerTemplate"]
        return {"head": inside["leaderTemplate"], "follower": inside["workerTemplate"]}
    spec = objects["RayCluster"]["spec"]
    return {"head": spec["headGroupSpec"]["template"], "follower": spec["workerGroupSpecs"][0]["template"]}


def container(template: dict[str, Any]) -> dict[str, Any]:
    (found,) = template["spec"]["containers"]
    assert isinstance(found, dict)
    return found


def validate(thing: dict[str, Any]) -> None:
    kubernetes_validate.validate(thing, VERSION, strict=True)


@pytest.mark.parametrize("name", FILES)
def test_objects_of_kubernetes_are_valid(name: str) -> None:
    own = [each for kind, each in read(name).items() if kind not in ("LeaderWorkerSet", "RayCluster")]
    assert own
    for each in own:
        validate(each)


@pytest.mark.parametrize("name", FILES)
def test_pods_are_valid(name: str) -> None:
    for template in templates(name).values():
        pod = {"apiVersion": "v1", "kind": "Pod", **template}
        validate(pod)
        pod["spec"] = pod["spec"] | {"container": []}
        with pytest.raises(kubernetes_validate.ValidationError, match="container"):
            validate(pod)


def test_the_leader_worker_set_has_the_fields_that_there_are() -> None:
    thing = read("leaderworkerset.yaml")["LeaderWorkerSet"]
    assert thing["apiVersion"] == "leaderworkerset.x-k8s.io/v1"
    assert thing["spec"].keys() <= SET["spec"]
    inside = thing["spec"]["leaderWorkerTemplate"]
    assert inside.keys() <= SET["template"]
    # YAML's own none would be another value.
    assert inside["restartPolicy"] == "None"


def test_the_ray_cluster_has_the_fields_that_there_are() -> None:
    thing = read("kuberay.yaml")["RayCluster"]
    assert thing["apiVersion"] == "ray.io/v1"
    assert thing["spec"].keys() <= RAY["spec"]
    assert thing["spec"]["headGroupSpec"].keys() <= RAY["head"]
    for group in thing["spec"]["workerGroupSpecs"]:
        assert group.keys() <= RAY["worker"]
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


@pytest.mark.parametrize("name", FILES)
def test_what_a_pod_refers_to_is_there(name: str) -> None:
    for role, template in templates(name).items():
        inside, spec = container(template), template["spec"]
        assert template["metadata"]["labels"] == {"app": "vllm-backend", "role": role}
        assert {each["name"] for each in inside["volumeMounts"]} == {each["name"] for each in spec["volumes"]}
        shm = next(each for each in spec["volumes"] if each["name"] == "shm")
        assert shm["emptyDir"]["medium"] == "Memory"
        assert {"name": "shm", "mountPath": "/dev/shm"} in inside["volumeMounts"]
        assert inside["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["IPC_LOCK"]}
        # The worker's farewell takes up to a minute.
        assert spec["terminationGracePeriodSeconds"] >= 60


@pytest.mark.parametrize("name", FILES)
def test_probes_ask_the_port_that_the_server_has(name: str) -> None:
    head = container(templates(name)["head"])
    settings = server(server_words(head))
    ports = {each["name"]: each["containerPort"] for each in head["ports"]}
    assert ports["grpc"] == int(settings.addr.rpartition(":")[2])
    assert settings.metrics_addr is not None
    assert ports["metrics"] == int(settings.metrics_addr.rpartition(":")[2])
    for probe in ("livenessProbe", "readinessProbe"):
        assert head[probe]["grpc"]["port"] == ports["grpc"]
        # Names of grpc.health.v1 that the server knows.
        assert head[probe]["grpc"]["service"] in ("backend.Backend", "backend.Backend/model")
    # A load must not end the pod.
    assert head["livenessProbe"]["grpc"]["service"] == "backend.Backend"


def server_words(inside: dict[str, Any]) -> list[str]:
    """The server's flags, where they are the image's arguments or the end of a shell's line."""
    if "command" not in inside:
        return list(inside["args"])
    assert inside["command"] == ["/bin/bash", "-c"]
    (script,) = inside["args"]
    words = shlex.split(script)
    return words[words.index("/opt/backend/run.sh") + 1 :]


@pytest.mark.parametrize("name", FILES)
def test_who_may_reach_the_pods(name: str) -> None:
    objects = read(name)
    policy = objects["NetworkPolicy"]["spec"]
    assert policy["podSelector"]["matchLabels"] == {"app": "vllm-backend"}
    own, callers = policy["ingress"]
    assert own == {"from": [{"podSelector": {"matchLabels": {"app": "vllm-backend"}}}]}
    assert callers["ports"] == [{"port": 50051}]
    (who,) = callers["from"]
    loader = objects["CronJob"]["spec"]["jobTemplate"]["spec"]["template"]
    assert loader["metadata"]["labels"] == who["podSelector"]["matchLabels"]


def test_callers_get_the_head_that_has_a_model() -> None:
    objects = read("leaderworkerset.yaml")
    service = objects["Service"]
    labels = templates("leaderworkerset.yaml")["head"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    # LeaderWorkerSet makes a service of its own name.
    assert service["metadata"]["name"] != objects["LeaderWorkerSet"]["metadata"]["name"]
    (port,) = service["spec"]["ports"]
    named = {
        each["name"]: each["containerPort"] for each in container(templates("leaderworkerset.yaml")["head"])["ports"]
    }
    assert named[port["targetPort"]] == port["port"] == 50051


def loaded(name: str) -> Any:
    inside = container(read(name)["CronJob"]["spec"]["jobTemplate"]["spec"]["template"])
    return load(inside["args"])


def test_followers_agree_with_what_is_loaded() -> None:
    name = "leaderworkerset.yaml"
    thing = read(name)["LeaderWorkerSet"]
    address, head = loaded(name)
    assert address == f"{LEADER}:50051"
    assert thing["metadata"]["name"] == LEADER.partition(".")[2]
    assert head.data_parallel_address == LEADER
    size = thing["spec"]["leaderWorkerTemplate"]["size"]
    words = container(templates(name)["follower"])["args"]
    # LeaderWorkerSet sets them in each container; Kubernetes puts them into its arguments.
    given = [{"LWS_WORKER_INDEX": str(index), "LWS_LEADER_ADDRESS": LEADER} for index in range(1, size)]
    agree(head, [follower([expanded(word, environ) for word in words]) for environ in given])
    for role in ("head", "follower"):
        gpus = int(container(templates(name)[role])["resources"]["limits"]["nvidia.com/gpu"])
        assert gpus == head.tensor_parallel_size * head.pipeline_parallel_size * (head.data_parallel_size_local or 1)


def expanded(word: str, environ: dict[str, str]) -> str:
    return re.sub(r"\$\(([A-Z_]+)\)", lambda match: environ[match[1]], word)


def test_ray_has_the_gpus_that_the_load_takes() -> None:
    name = "kuberay.yaml"
    address, head = loaded(name)
    cluster = read(name)["RayCluster"]
    assert address == f"{cluster['metadata']['name']}-head-svc:50051"
    assert head.distributed_executor_backend == "ray"
    assert (head.nnodes, head.data_parallel_size) == (1, 1)
    pods = 1 + sum(group["replicas"] for group in cluster["spec"]["workerGroupSpecs"])
    gpus = int(container(templates(name)["head"])["resources"]["limits"]["nvidia.com/gpu"])
    assert head.tensor_parallel_size * head.pipeline_parallel_size == pods * gpus


def test_ray_meets_at_one_port() -> None:
    pods = {role: container(each) for role, each in templates("kuberay.yaml").items()}
    started = {role: shlex.split(each["args"][0]) for role, each in pods.items()}
    assert f"--port={RAY_PORT}" in started["head"]
    assert {"name": "gcs", "containerPort": RAY_PORT} in pods["head"]["ports"]
    assert f"--address=vllm-head-svc:{RAY_PORT}" in started["follower"]
    assert started["follower"][:3] == ["exec", "ray", "start"]
    assert "--block" in started["follower"]
    assert "--block" not in started["head"]
    for template in templates("kuberay.yaml").values():
        assert template["metadata"]["annotations"]["ray.io/overwrite-container-cmd"] == "true"
        environ = {each["name"]: each for each in container(template)["env"]}
        assert environ["POD_IP"]["valueFrom"]["fieldRef"]["fieldPath"] == "status.podIP"
        assert environ["VLLM_HOST_IP"]["value"] == "$(POD_IP)"
