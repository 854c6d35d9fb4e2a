"""JobSet's API knows the manifest to the last field, and it starts what Slurm's script does.

The API is the package kubeflow-trainer-api: models that are made from the OpenAPI definitions of
JobSet v1alpha2 and of Kubernetes' own Job, Pod and volumes. A model leaves out fields that it does
not know, and fills in required ones that are missing: what comes back must be what was given. What
a cluster's webhooks check beside (names, immutable fields) is not checked here.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import yaml
from kubeflow_trainer_api.models import JobsetV1alpha2JobSet
from pydantic import ValidationError
from torch.distributed.run import parse_args

from tests.examples.support import EXAMPLES, settings_of, ziphius_part
from ziphius.config.recipe import load_recipe
from ziphius.parallel.layout import Layout

MANIFEST = EXAMPLES / "kubernetes" / "pretrain.yaml"
Change = Callable[[dict[str, Any]], None]


def manifest() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(MANIFEST.read_text("utf-8"))
    return found


def job(document: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = document["spec"]["replicatedJobs"][0]["template"]["spec"]
    return found


def container(document: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = job(document)["template"]["spec"]["containers"][0]
    return found


def accepted(document: dict[str, Any]) -> bool:
    """Say whether JobSet's API has every field, and every value is of its type."""
    try:
        model = JobsetV1alpha2JobSet.from_dict(copy.deepcopy(document))
    except (ValidationError, ValueError):
        return False
    return model is not None and model.to_dict() == document


def test_the_api_accepts_the_manifest() -> None:
    document = manifest()
    assert accepted(document)
    assert document["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    assert document["kind"] == "JobSet"


MISTAKES: dict[str, Change] = {
    "a field of the set": lambda d: d["spec"].update(maxRestart=3),
    "a type": lambda d: d["spec"]["failurePolicy"].update(maxRestarts="ten"),
    "a required field": lambda d: d["spec"]["replicatedJobs"][0].pop("name"),
    "a field of the job": lambda d: job(d).update(backofLimit=0),
    "a number of the job": lambda d: job(d).update(parallelism="2"),
    "a field of the pod": lambda d: job(d)["template"]["spec"].update(restart="Never"),
    "a field of the container": lambda d: container(d).update(volumeMount=[]),
    "a name of the container": lambda d: container(d).pop("name"),
    "a value of the environment": lambda d: container(d)["env"][0].update(value=540),
}


@pytest.mark.parametrize("change", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_seen(change: Change) -> None:
    document = manifest()
    change(document)
    assert not accepted(document)


def test_torchrun_takes_the_command_and_the_layout_is_one_of_its_processes() -> None:
    command, document = container(manifest())["command"], manifest()
    assert command[0] == "torchrun"
    launch = parse_args(command[1:])
    assert (launch.module, launch.training_script) == (True, "ziphius")
    nodes, per_node = int(launch.nnodes), int(launch.nproc_per_node)
    assert nodes == job(document)["parallelism"] == job(document)["completions"]
    assert per_node == container(document)["resources"]["limits"]["nvidia.com/gpu"]
    verb, recipe, *flags = launch.training_script_args
    chosen = load_recipe(recipe, settings_of(flags))
    assert verb == "pretrain"
    assert Layout.of(chosen.parallel, nodes * per_node, per_node).world == nodes * per_node
    assert chosen.run.device == "cuda"


def test_all_meet_at_a_pod_that_there_is() -> None:
    """JobSet names pods ``<set>-<job>-<index>-<pod>.<subdomain>``."""
    document = manifest()
    name, subdomain = document["metadata"]["name"], document["spec"]["network"]["subdomain"]
    endpoint = f"{name}-{document['spec']['replicatedJobs'][0]['name']}-0-0.{subdomain}"
    host, port = parse_args(container(document)["command"][1:]).rdzv_endpoint.split(":")
    assert host == endpoint
    assert int(port) == container(document)["ports"][0]["containerPort"]


def test_what_is_saved_has_time_to_be() -> None:
    document = manifest()
    (timeout,) = (e["value"] for e in container(document)["env"] if "TIMEOUT" in e["name"])
    assert int(timeout) < job(document)["template"]["spec"]["terminationGracePeriodSeconds"]


def test_the_flags_are_those_of_slurm() -> None:
    script = (EXAMPLES / "slurm" / "pretrain.sbatch").read_text("utf-8")
    here = settings_of(ziphius_part(container(manifest())["command"]))
    assert here == re.findall(r"^ +--set (\S+)$", script, re.M)
    assert "--resume" in container(manifest())["command"]
