"""TPU slices of a GKE cluster, as JobSets with xpk's conventions; several hosts and slices.

The code is in a container image (launch/Dockerfile). Kubernetes restarts a JobSet whose pods are preempted,
evicted, stopped or crash, and gives up where a second try would end the same way (exit code 2).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from launch import chips, yaml
from launch.job import Job, check_bucket, check_devices
from launch.shell import Shell
from seal_jax.errors import OK, USAGE, UsageError

_CONTAINER = "jax-tpu"
_COPY_IMAGE = "gcr.io/google.com/cloudsdktool/google-cloud-cli:slim"
_NODE_LABELS = {
    "spot": {"cloud.google.com/gke-spot": "true"},
    "flex-start": {"cloud.google.com/gke-flex-start": "true"},
    "on-demand": {},
}


def add_place(to: argparse.ArgumentParser) -> None:
    """Add the options that every action takes."""
    to.add_argument("--context", metavar="NAME", help="the cluster (default: kubectl's)")
    to.add_argument("--namespace", metavar="NAME", help="default: kubectl's")


def place(options: argparse.Namespace) -> list[str]:
    """Return the options that every action and every command of kubectl takes."""
    values = {"context": options.context, "namespace": options.namespace}
    return [f"--{name}={value}" for name, value in values.items() if value]


def add_arguments(to: argparse.ArgumentParser) -> None:
    """Add the options of `run`."""
    add_place(to)
    to.add_argument(
        "--image", required=True, help="REGION-docker.pkg.dev/PROJECT/REPOSITORY/seal_jax:TAG"
    )
    to.add_argument(
        "--topology",
        default="v5e:2x4",
        metavar="KIND:SHAPE",
        help="of a slice (default: %(default)s)",
    )
    to.add_argument(
        "--slices", type=int, default=1, metavar="N", help="slices of one training (default: 1)"
    )
    to.add_argument(
        "--tier", choices=[*_NODE_LABELS], default="spot", help="(default: %(default)s)"
    )
    help_text = "a prepared data set, copied to every pod: gs://BUCKET/tfds/tiny_imagenet"
    to.add_argument("--data", default="", metavar="gs://...", help=help_text)
    to.add_argument(
        "--service-account",
        metavar="NAME",
        help="of Kubernetes, that may use the bucket; off the host network (default: the rights of the nodes)",
    )
    help_text = 'the LocalQueue of Kueue, xpk\'s "multislice-queue" for example (default: none)'
    to.add_argument("--queue", metavar="NAME", help=help_text)
    help_text = "restarts after crashes and preemptions together (default: %(default)s)"
    to.add_argument("--max-restarts", type=int, default=50, metavar="N", help=help_text)


def run(shell: Shell, options: argparse.Namespace, jobs: Sequence[Job]) -> int:
    """Create a JobSet for each job."""
    check_bucket(jobs)
    manifests = [yaml.dump(manifest(options, job)) for job in jobs]
    names = [job.name for job in jobs]
    if not shell.dry:
        there = shell.run(
            "kubectl", *place(options), "get", "jobsets", *names, "--ignore-not-found", "--output=name",
            fix="see --context and --namespace, and whether JobSet is installed there",
        ).split()  # fmt: skip
        if there:
            raise UsageError(
                f"{' '.join(there)}: exists, for 12 hours after its end too; `stop` deletes it, or give "
                "another --name"
            )
    try:
        shell.run(
            "kubectl", *place(options), "create", "--output=name", *options.extra, "--filename=-",
            stdin="\n---\n".join(manifests) + "\n",
            fix="see --context, --namespace and the rights there",
        )  # fmt: skip
    except BaseException:
        # kubectl goes on after an object that it could not create: of a sweep all or nothing.
        shell.undo("kubectl", *place(options), "delete", "jobsets", *names, "--ignore-not-found")
        raise
    return OK


def status(shell: Shell, options: argparse.Namespace) -> int:
    """Show the JobSets."""
    return shell.show("kubectl", *place(options), "get", "jobsets", *options.names)


def logs(shell: Shell, options: argparse.Namespace) -> int:
    """Follow the log of the first pod (of the first job)."""
    label = f"jobset.sigs.k8s.io/jobset-name={options.names[0]}"
    first = "jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
    return shell.show(
        "kubectl", *place(options), "logs", "--follow", "--tail=100", f"--container={_CONTAINER}",
        f"--selector={label},{first}",
    )  # fmt: skip


def stop(shell: Shell, options: argparse.Namespace) -> int:
    """Let the training save, and delete the JobSets."""
    return shell.show("kubectl", *place(options), "delete", "jobsets", *options.names)


ACTIONS = {"status": status, "logs": logs, "stop": stop}


def manifest(options: argparse.Namespace, job: Job) -> dict[str, Any]:
    """Return the JobSet of a job.

    Raises:
      UsageError: an option does not fit.
    """
    tpu = chips.parse(options.topology)
    if options.slices < 1 or options.max_restarts < 0:
        raise UsageError("--slices must be at least 1, and --max-restarts at least 0")
    check_devices([job], tpu.chips * options.slices)
    if options.data and not options.data.startswith("gs://"):
        raise UsageError(f"--data={options.data} must be a folder in a bucket, gs://...")
    several = tpu.hosts * options.slices > 1
    bucket = job.workdir.rpartition("/")[0]
    env = {"JAX_COMPILATION_CACHE_DIR": f"{bucket}/.launch/xla"}  # a new pod need not compile again
    # The image's supervise.sh gives up after crashes in a row: no new slice for them either.
    env["GIVE_UP_CODE"] = str(USAGE)
    container: dict[str, Any] = {
        "name": _CONTAINER,
        "image": options.image,
        "args": [*job.words, *(["--coordinator=auto"] if several else [])],
        "resources": {"limits": {"google.com/tpu": tpu.chips // tpu.hosts}},
    }
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        # After SIGTERM the program ends its call (run.steps_per_call steps), then saves. Spot machines
        # give less than asked for here, some 15 to 25 seconds: keep a call well below.
        "terminationGracePeriodSeconds": 120,
        "nodeSelector": {
            "cloud.google.com/gke-tpu-accelerator": tpu.gke_accelerator,
            "cloud.google.com/gke-tpu-topology": tpu.shape,
            **_NODE_LABELS[options.tier],
        },
        "containers": [container],
    }
    if options.tier == "spot":
        key = "cloud.google.com/gke-spot"
        pod["tolerations"] = [
            {"key": key, "operator": "Equal", "value": "true", "effect": "NoSchedule"}
        ]
    if options.service_account:
        # On the nodes' network a pod would have the nodes' rights and not those of the account. The pods of a
        # slice find each other without, by the names that JobSet gives them.
        pod["serviceAccountName"] = options.service_account
    else:
        # Faster between slices than the pods' own network.
        pod |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    if options.data:
        env["TFDS_DATA_DIR"] = "/data"
        mount = {"name": "data", "mountPath": "/data"}
        container["volumeMounts"] = [mount]
        pod["volumes"] = [{"name": "data", "emptyDir": {}}]
        # Records are read from the local disk: array_record does not read from buckets.
        copy = ["gcloud", "storage", "cp", "--recursive", options.data.rstrip("/"), "/data"]
        pod["initContainers"] = [
            {"name": "copy-data", "image": _COPY_IMAGE, "command": copy, "volumeMounts": [mount]}
        ]
    container["env"] = [{"name": name, "value": value} for name, value in env.items()]
    labels = {"xpk.google.com/workload": job.name}
    queue = {"kueue.x-k8s.io/queue-name": options.queue} if options.queue else {}
    # Exit code 2, bad input or a loss that is not finite, would come again.
    fail = {"containerName": _CONTAINER, "operator": "In", "values": [USAGE]}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": job.name,
            "labels": {**queue, **labels},
            # Each slice, which is a node pool, for one job alone.
            "annotations": {
                "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
            },
        },
        "spec": {
            "ttlSecondsAfterFinished": 43200,  # the logs stay for half a day
            "failurePolicy": {
                "maxRestarts": options.max_restarts,
                "rules": [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
            },
            "replicatedJobs": [
                {
                    "name": "slice-job",
                    "replicas": options.slices,
                    "template": {
                        "spec": {
                            "parallelism": tpu.hosts,
                            "completions": tpu.hosts,
                            # The hosts of a slice train together: if one fails, all begin again.
                            "backoffLimit": 0,
                            "podFailurePolicy": {
                                "rules": [{"action": "FailJob", "onExitCodes": fail}]
                            },
                            "template": {"metadata": {"labels": labels}, "spec": pod},
                        }
                    },
                }
            ],
        },
    }
