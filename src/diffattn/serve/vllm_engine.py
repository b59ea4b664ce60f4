"""vLLM's own OpenAI server over a folder of ours: this process becomes it."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffattn.checkpoint_files import read_config, read_tensors
from diffattn.config_fields import dtype_name
from diffattn.errors import UnsupportedError
from diffattn.model.loading import check_weights
from diffattn.serve import vllm_private
from diffattn.serve.hosts import CheckHosts, Hosts

PLUGIN = "diffattn"
# The environment variable with the hosts: vLLM's process makes the middleware by itself, from its name alone.
HOSTS = "DIFFATTN_SERVE_HOSTS"


class Guard(CheckHosts):
    """The check of hosts in front of vLLM's server, which takes any Host and pages of any origin."""

    def __init__(self, app: Any) -> None:
        names, loopback_only = json.loads(os.environ[HOSTS])
        super().__init__(app, Hosts(frozenset(names), loopback_only))


def serve(
    folder: Path,
    names: tuple[str, ...],
    listener: socket.socket,
    *,
    key: str | None,
    hosts: Hosts,
    dtype: str,
    device: str,
    context: int,
    on_start: Callable[[str], None],
) -> None:
    """Replaces this process by vLLM's server, which signals then reach directly; see ``diffattn.serve.engines.serve``.

    ``listener`` is closed: vLLM opens its address itself. ``on_start`` is given what will run, for a person.

    Raises:
        CheckpointError, ConfigError: weights or a config.json that cannot be.
        UnsupportedError: another device than the one that the installed vLLM was built for.
    """
    # vLLM would say it in many lines, or not at all.
    check_weights(folder)
    dtype = saved_dtype(folder) if dtype == "auto" else dtype
    if device != "auto":
        check_device(device)
    host, port = listener.getsockname()[:2]
    listener.close()
    on_start(dtype)
    os.execve(sys.executable, command(folder, names, host, port, dtype, context), environment(key, hosts))


def command(folder: Path, names: tuple[str, ...], host: str, port: int, dtype: str, context: int) -> list[str]:
    """Returns the command that starts vLLM's server, without the key: others on a machine see a process' arguments."""
    return [
        sys.executable, "-m", vllm_private.SERVER,
        "--model", str(folder),
        "--served-model-name", *names,
        "--host", host,
        "--port", str(port),
        "--dtype", dtype,
        "--max-model-len", str(context),
        "--middleware", f"{Guard.__module__}.{Guard.__name__}",
    ]  # fmt: skip


def environment(key: str | None, hosts: Hosts) -> dict[str, str]:
    """Returns the environment of vLLM's server.

    It holds the key, the hosts, and our plug-in where others are named; by default nothing is sent anywhere.
    """
    variables = dict(os.environ)
    variables.pop("VLLM_API_KEY", None)
    if key is not None:
        variables["VLLM_API_KEY"] = key
    variables[HOSTS] = json.dumps([sorted(hosts.names), hosts.loopback_only])
    chosen = variables.get("VLLM_PLUGINS")
    if chosen is not None and PLUGIN not in chosen.split(","):
        variables["VLLM_PLUGINS"] = ",".join(filter(None, (*chosen.split(","), PLUGIN)))
    variables.setdefault("VLLM_NO_USAGE_STATS", "1")
    variables.setdefault("HF_HUB_OFFLINE", "1")
    return variables


def saved_dtype(folder: Path) -> str:
    """Returns the dtype of a checkpoint: vLLM's own ``auto`` would round float32 weights to half of it."""
    config = read_config(folder)
    named = config.get("dtype") or config.get("torch_dtype")
    if isinstance(named, str):
        return dtype_name(named)
    kinds = {entry["dtype"] for entry in read_tensors(folder).values()}
    return "float32" if "F32" in kinds else "bfloat16" if "BF16" in kinds else "float16"


def check_device(device: str) -> None:
    """Raises an ``UnsupportedError`` unless the installed vLLM runs on ``device``."""
    built = vllm_private.built_for()
    if built != device:
        raise UnsupportedError(
            f"device is {device!r}",
            f"{built!r}, which the installed vLLM runs on" if built else "a device that the installed vLLM finds",
            "leave out --device, or pass --engine transformers",
        )
