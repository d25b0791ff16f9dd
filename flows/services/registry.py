"""The services recorded for an artifacts folder, `services/services.json`, and their logs."""

import contextlib
import fcntl
import json
import re
from collections.abc import Generator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, cast

from flows.services.environments import client_environment
from flows.services.processes import HOST, Service
from llm.artifact import write_json_atomically

ServiceName = Literal["prefect", "mlflow", "worker"]

DEFAULT_PORTS: Mapping[ServiceName, int] = {"prefect": 4200, "mlflow": 5000}
# errors of Prefect, MLflow and uvicorn; Prefect retries those that it calls transient
LOGGED_ERROR = re.compile(r"^(?!.*\btransient\b).*\b(?:ERROR|CRITICAL)\b.*$", re.M)


@dataclass(frozen=True, kw_only=True, slots=True)
class Services:
    """The three services that `up` starts."""

    prefect: Service
    mlflow: Service
    worker: Service

    @property
    def prefect_url(self) -> str:
        """Prefect's pages."""
        return f"http://{HOST}:{self.prefect.port}"

    @property
    def mlflow_url(self) -> str:
        """MLflow's pages."""
        return f"http://{HOST}:{self.mlflow.port}"


@contextlib.contextmanager
def services_lock(artifacts_dir: Path) -> Generator[None]:
    """Hold the lock that every change of the services takes."""
    with (_folder(artifacts_dir) / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def recorded_services(artifacts_dir: Path) -> dict[ServiceName, Service]:
    """Return the recorded services, alive or not.

    The paths of their logs reveal a copied or moved artifacts folder: a copy has no services of its
    own, and those of a moved folder count as ended.
    """
    folder = artifacts_dir / "services"
    try:
        data = json.loads((folder / "services.json").read_bytes())
        services = {name: Service(**service) for name, service in data.items()}
    except (FileNotFoundError, ValueError, TypeError, AttributeError):
        return {}
    found: dict[ServiceName, Service] = {}
    for name, service in services.items():
        log = Path(service.log)
        if log.parent == folder:
            found[cast(ServiceName, name)] = service
        elif not log.exists():
            found[cast(ServiceName, name)] = replace(service, pid=0)
    return found


def record_services(artifacts_dir: Path, services: Mapping[ServiceName, Service]) -> None:
    """Replace the record."""
    data = {name: asdict(service) for name, service in services.items()}
    write_json_atomically(_folder(artifacts_dir) / "services.json", data, is_durable=False)


def running_services(artifacts_dir: Path) -> Services | None:
    """Return the services if the processes of all three are alive."""
    known = recorded_services(artifacts_dir.absolute())
    if len(known) < 3 or not all(service.is_alive for service in known.values()):
        return None
    return Services(**known)


def running_prefect_environment(artifacts_dir: Path) -> dict[str, str]:
    """Return the variables that point a Prefect client to the running server; {} without one.

    Set them before the first import of prefect, which reads them then.
    """
    prefect = recorded_services(artifacts_dir.absolute()).get("prefect")
    if prefect is None or not prefect.is_alive:
        return {}
    return client_environment(artifacts_dir.absolute(), prefect.port)


def service_log(artifacts_dir: Path, name: str) -> Path:
    """Return the log file of a service."""
    return _folder(artifacts_dir) / f"{name}.log"


def errors_in_logs(artifacts_dir: Path) -> list[str]:
    """Return a line per running server whose log has errors: how many, and the last one. Errors of
    Prefect's internal services appear nowhere else.
    """
    found: list[str] = []
    known = recorded_services(artifacts_dir.absolute())
    for service in (known[name] for name in DEFAULT_PORTS if name in known):
        if service.is_alive:
            text = Path(service.log).read_text(encoding="utf-8", errors="replace")
            if errors := LOGGED_ERROR.findall(text):
                last = errors[-1].strip()
                found.append(f"{len(errors)} errors in {service.log}, the last: {last}")
    return found


def _folder(artifacts_dir: Path) -> Path:
    folder = artifacts_dir / "services"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
