"""Which fields each platform's API takes, as the shapes that rules.check reads.

Lepton: read off the pydantic models of leptonai 0.27.3 (LeptonJob). run:AI: off those of runapy 1.224.0
(DistributedCreationRequest, TrainingCreationRequest, WorkspaceCreationRequest). tests/test_emulators.py compares
these tables with the models themselves, so that they cannot drift.
"""

from __future__ import annotations

from typing import Any

Shape = Any

# --- Lepton -------------------------------------------------------------------------------------------------------

LEPTON_METADATA: Shape = {
    **dict.fromkeys(("id", "name", "created_by", "last_modified_by", "semantic_version", "owner"), str),
    **dict.fromkeys(("created_at", "version", "last_modified_at"), int),
    "labels": {"*": str},
    "visibility": frozenset({"public", "private"}),
    "replica_version": str,
}

LEPTON_ENV: Shape = {"name": str, "value": str, "value_from": {"secret_name_ref": str}}

LEPTON_MOUNT: Shape = {
    "path": str,
    "from": str,
    "mount_path": str,
    "mount_options": {"local_cache_size_mib": int, "read_only": bool},
}

LEPTON_CONTAINER: Shape = {
    "image": str,
    "ports": [
        {
            "name": str,
            "container_port": int,
            "expose_strategies": [frozenset({"HostPortMapping", "IngressProxy"})],
            "protocol": str,
            "host_port": int,
            "enable_load_balancer": bool,
        }
    ],
    "command": [str],
}

LEPTON_JOB_SPEC: Shape = {
    "resource_shape": str,
    "affinity": {
        "allowed_providers": [str],
        "allowed_dedicated_node_groups": [str],
        "allowed_nodes_in_node_group": [str],
    },
    "container": LEPTON_CONTAINER,
    "shared_memory_size": int,
    "completions": int,
    "parallelism": int,
    "max_failure_retry": int,
    "max_job_failure_retry": int,
    "envs": [LEPTON_ENV],
    "mounts": [LEPTON_MOUNT],
    "image_pull_secrets": [str],
    "ttl_seconds_after_finished": int,
    "intra_job_communication": bool,
    "user_security_context": {"no_specific_user": bool, "privileged": bool},
    "metrics": {"disable_pulling_from_replica": bool},
    "log": {"save_termination_logs": bool, "enable_collection": bool},
    "queue_config": {"priority_class": str, "can_be_preempted": bool, "can_preempt": bool},
    "stopped": bool,
    "reservation_config": {"reservation_id": str, "allow_burst_to_other_reservations": bool},
    "time_schedule": {"start_at": int},
    "segment_config": {"count_per_segment": int},
}

_LEPTON_RAY_GROUP: Shape = {
    "resource_shape": str,
    "affinity": LEPTON_JOB_SPEC["affinity"],
    "shared_memory_size": int,
    "min_replicas": int,
    "envs": [LEPTON_ENV],
    "mounts": [LEPTON_MOUNT],
    **{key: LEPTON_JOB_SPEC[key] for key in ("queue_config", "reservation_config", "user_security_context",
                                             "segment_config", "container")},
    **dict.fromkeys(("host_network", "enable_rdma", "is_adaptive", "accelerator_pass_all"), bool),
    **dict.fromkeys(("ephemeral_storage_in_gb", "max_replicas", "memory", "accelerator_memory"), int),
    **dict.fromkeys(("cpu", "accelerator_fraction", "accelerator_num"), float),
    "accelerator_type": str,
}

LEPTON_RAYCLUSTER: Shape = {
    "metadata": LEPTON_METADATA,
    "spec": {
        "image": str,
        "image_pull_secrets": [str],
        "ray_version": str,
        "suspend": bool,
        "head_group_spec": _LEPTON_RAY_GROUP,
        "worker_group_specs": [{**_LEPTON_RAY_GROUP, "group_name": str}],
        "autoscaler": {"ray_worker_idle_timeout": int},
    },
}

LEPTON_JOB: Shape = {"metadata": LEPTON_METADATA, "spec": LEPTON_JOB_SPEC}

# --- run:AI -------------------------------------------------------------------------------------------------------


def _strings(*names: str) -> dict[str, Shape]:
    return dict.fromkeys(names, str)


_KEY_OF = {"name": str, "key": str}
_NAMED_VALUE = {"name": str, "value": str, "exclude": bool}
_CAPABILITIES = """AUDIT_CONTROL AUDIT_READ AUDIT_WRITE BLOCK_SUSPEND CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID
    IPC_LOCK IPC_OWNER KILL LEASE LINUX_IMMUTABLE MAC_ADMIN MAC_OVERRIDE MKNOD NET_ADMIN NET_BIND_SERVICE NET_BROADCAST
    NET_RAW SETFCAP SETGID SETPCAP SETUID SYSLOG SYS_ADMIN SYS_BOOT SYS_CHROOT SYS_MODULE SYS_NICE SYS_PACCT SYS_PTRACE
    SYS_RAWIO SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG WAKE_ALARM"""

RUNAI_ENV: Shape = {
    "name": str,
    "value": str,
    "secret": _KEY_OF,
    "configMap": _KEY_OF,
    "podFieldRef": {"path": str},
    "userCredential": _KEY_OF,
    "exclude": bool,
    "description": str,
}

RUNAI_PVC: Shape = {
    **_strings("name", "path", "claimName"),
    **dict.fromkeys(("existingPvc", "readOnly", "ephemeral", "dataSharing", "exclude"), bool),
    "claimInfo": {
        **_strings("size", "storageClass"),
        "accessModes": dict.fromkeys(("readWriteOnce", "readOnlyMany", "readWriteMany"), bool),
        "volumeMode": frozenset({"Block", "Filesystem"}),
        "addedAttrValues": [{"key": str, "value": str}],
    },
}

_GIT_SECRET = {
    **_strings("name", "secretKeyOfUser", "secretKeyOfPassword"),
    "authenticationMethod": frozenset({"password", "ssh-key"}),
}

RUNAI_STORAGE: Shape = {
    "pvc": [RUNAI_PVC],
    "configMapVolume": [{**_strings("name", "configMap", "mountPath", "subPath", "defaultMode"), "exclude": bool}],
    "dataVolume": [{**_strings("id", "mountPath"), "exclude": bool}],
    "emptyDirVolume": [{**_strings("name", "path", "medium", "sizeLimit"), "exclude": bool}],
    "git": [
        {
            **_strings("name", "repository", "branch", "revision", "path", "passwordSecret"),
            **_strings("secretKeyOfUser", "secretKeyOfPassword"),
            "exclude": bool,
            "secretRef": _GIT_SECRET,
        }
    ],
    "hostPath": [
        {
            **_strings("name", "path", "mountPath"),
            "readOnly": bool,
            "mountPropagation": frozenset({"HostToContainer", "None"}),
            "exclude": bool,
        }
    ],
    "nfs": [{**_strings("name", "path", "server", "mountPath"), "readOnly": bool, "exclude": bool}],
    "s3": [
        {
            **_strings("name", "bucket", "path", "url", "accessKeySecret"),
            **_strings("secretKeyOfAccessKeyId", "secretKeyOfSecretKey"),
            "exclude": bool,
        }
    ],
    "secretVolume": [{**_strings("name", "mountPath", "defaultMode", "secret"), "exclude": bool}],
}

RUNAI_COMPUTE: Shape = {
    **dict.fromkeys(("cpuCoreLimit", "cpuCoreRequest", "gpuPortionLimit", "gpuPortionRequest"), float),
    **_strings("cpuMemoryLimit", "cpuMemoryRequest", "gpuMemoryLimit", "gpuMemoryRequest"),
    "extendedResources": [{"resource": str, "quantity": str, "exclude": bool}],
    "gpuDevicesRequest": int,
    "gpuRequestType": frozenset({"memory", "portion"}),
    "largeShmRequest": bool,
}

RUNAI_SECURITY: Shape = {
    **dict.fromkeys(("allowPrivilegeEscalation", "hostIpc", "hostNetwork"), bool),
    **dict.fromkeys(("readOnlyRootFilesystem", "runAsNonRoot"), bool),
    **dict.fromkeys(("runAsGid", "runAsUid"), int),
    "capabilities": [frozenset(_CAPABILITIES.split())],
    "seccompProfileType": frozenset({"Localhost", "RuntimeDefault", "Unconfined"}),
    "supplementalGroups": str,
    "uidGidSource": frozenset({"custom", "fromIdpToken", "fromTheImage"}),
}

_HTTP_GET = {"path": str, "port": int, "host": str, "scheme": frozenset({"HTTP", "HTTPS"})}
_PROBE_TIMES = ("initialDelaySeconds", "periodSeconds", "timeoutSeconds", "successThreshold", "failureThreshold")
_NODE_OPERATORS = frozenset({"DoesNotExist", "Exists", "Gt", "In", "Lt", "NotIn"})
_AUTHORIZATION = frozenset({"authenticatedUsers", "authorizedGroups", "authorizedUsers"})

RUNAI_COMMON: Shape = {
    **_strings("args", "category", "command", "image", "nodeType", "priorityClass", "workingDir"),
    **dict.fromkeys(("createHomeDir", "stdin", "terminateAfterPreemption", "tty"), bool),
    **dict.fromkeys(("autoDeletionTimeAfterCompletionSeconds", "backoffLimit", "terminationGracePeriodSeconds"), int),
    "annotations": [_NAMED_VALUE],
    "labels": [_NAMED_VALUE],
    "compute": RUNAI_COMPUTE,
    "environmentVariables": [RUNAI_ENV],
    "exposedUrls": [
        {
            **_strings("url", "toolType", "toolName", "name"),
            "container": int,
            "authorizationType": _AUTHORIZATION,
            "authorizedUsers": [str],
            "authorizedGroups": [str],
            "exclude": bool,
        }
    ],
    "imagePullPolicy": frozenset({"Always", "IfNotPresent", "Never"}),
    "imagePullSecrets": [{"name": str, "userCredential": bool, "exclude": bool}],
    "nodeAffinityRequired": {
        "nodeSelectorTerms": [{"matchExpressions": [{"key": str, "operator": _NODE_OPERATORS, "values": [str]}]}]
    },
    "nodePools": [str],
    "podAffinity": {"type": frozenset({"Preferred", "Required"}), "key": str},
    "ports": [
        {
            **_strings("toolType", "toolName", "name"),
            **dict.fromkeys(("container", "external"), int),
            "serviceType": frozenset({"ClusterIP", "LoadBalancer", "NodePort"}),
            "exclude": bool,
        }
    ],
    "preemptibility": frozenset({"non-preemptible", "preemptible"}),
    "probes": {"readiness": {**dict.fromkeys(_PROBE_TIMES, int), "handler": {"httpGet": _HTTP_GET}}},
    "relatedUrls": [{**_strings("url", "type", "name"), "exclude": bool}],
    "restartPolicy": frozenset({"Always", "Never", "OnFailure"}),
    "security": RUNAI_SECURITY,
    "storage": RUNAI_STORAGE,
    "tolerations": [
        {
            **_strings("name", "key", "value"),
            "operator": frozenset({"Equal", "Exists"}),
            "effect": frozenset({"Any", "NoExecute", "NoSchedule", "PreferNoSchedule"}),
            "seconds": int,
            "exclude": bool,
        }
    ],
}

RUNAI_DISTRIBUTED_SPEC: Shape = {
    **RUNAI_COMMON,
    "cleanPodPolicy": frozenset({"All", "None", "Running"}),
    "distributedFramework": frozenset({"JAX", "MPI", "PyTorch", "TF", "XGBoost"}),
    **dict.fromkeys(("maxReplicas", "minReplicas", "numWorkers", "slotsPerWorker"), int),
    "mpiLauncherCreationPolicy": frozenset({"AtStartup", "WaitForWorkersReady"}),
    "sshAuthMountPath": str,
}

_RUNAI_REQUEST: Shape = {
    **_strings("name", "projectId", "clusterId", "templateId"),
    "useGivenNameAsPrefix": bool,
}

RUNAI_REQUESTS: dict[str, Shape] = {
    "workspaces": {**_RUNAI_REQUEST, "spec": RUNAI_COMMON},
    "trainings": {**_RUNAI_REQUEST, "spec": {**RUNAI_COMMON, "completions": int, "parallelism": int}},
    "distributed": {
        **_RUNAI_REQUEST,
        "spec": RUNAI_DISTRIBUTED_SPEC,
        "masterSpecSameAsWorker": bool,
        "masterSpec": RUNAI_COMMON,
    },
}
