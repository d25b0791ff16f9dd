"""Environment variables of the Prefect and MLflow servers and of Prefect's client."""

import os
from collections.abc import Mapping
from pathlib import Path

from flows.services.processes import HOST
from tasks.tracking.files import FOLDER, ROOT, database_uri

ARTIFACTS_VARIABLE = "FROMSCRATCH_SERVED_ARTIFACTS"


def served_artifacts() -> Path | None:
    """Return the artifacts folder whose Prefect server this process uses, or None if it uses a
    server of the user's own.
    """
    found = os.environ.get(ARTIFACTS_VARIABLE)
    return Path(found) if found and os.environ.get("PREFECT_API_URL") else None


def client_environment(artifacts_dir: Path, port: int) -> dict[str, str]:
    """Return the variables that point a Prefect client to the server at `port`."""
    return {
        "PREFECT_API_URL": f"http://{HOST}:{port}/api",
        "PREFECT_HOME": str(artifacts_dir / "prefect"),
        ARTIFACTS_VARIABLE: str(artifacts_dir),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        **{name: _with_loopback(os.environ.get(name, "")) for name in ("NO_PROXY", "no_proxy")},
    }


def without_prefect(variables: Mapping[str, str]) -> dict[str, str]:
    """Return this process's environment with its Prefect settings replaced by `variables`, so that
    the servers never use the database or cloud account of the user's own Prefect.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    source = str(Path(__file__).parents[2])
    paths = [source, *filter(None, [kept.get("PYTHONPATH")])]
    return {**kept, **variables, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def prefect_environment(artifacts_dir: Path, port: int) -> dict[str, str]:
    """Return the whole environment of a Prefect server with its data in the artifacts folder."""
    own_pages = f"http://{HOST}:{port},http://localhost:{port}"
    settings = {
        "PREFECT_SERVER_API_HOST": HOST,
        "PREFECT_SERVER_API_PORT": str(port),
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": own_pages,
        "PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "true",
        "PREFECT_SERVER_UI_STATIC_DIRECTORY": str(artifacts_dir / "prefect" / "pages"),
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
        "PREFECT_SERVER_DATABASE_TIMEOUT": "60",  # at the default of 10 s pages get error 503
    }
    return without_prefect({**client_environment(artifacts_dir, port), **settings})


def mlflow_environment(artifacts_dir: Path, port: int) -> dict[str, str]:
    """Return the whole environment of an MLflow server: the variables that `mlflow server` passes
    to its server process, and settings against telemetry and foreign origins. Source:
    mlflow/server/constants.py.
    """
    return without_prefect(
        {
            "_MLFLOW_SERVER_FILE_STORE": database_uri(artifacts_dir),
            "_MLFLOW_SERVER_REGISTRY_STORE": database_uri(artifacts_dir),
            "_MLFLOW_SERVER_ARTIFACT_ROOT": ROOT,
            "_MLFLOW_SERVER_ARTIFACT_DESTINATION": (artifacts_dir / FOLDER).as_uri(),
            "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
            "MLFLOW_SERVER_ALLOWED_HOSTS": f"{HOST}:*,localhost:*",
            "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": f"http://{HOST}:{port},http://localhost:{port}",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # seven processes, two gigabytes
            "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "DO_NOT_TRACK": "1",
        }
    )


def _with_loopback(hosts: str) -> str:
    """Return the value of NO_PROXY with this machine added."""
    return ",".join(dict.fromkeys([*filter(None, hosts.split(",")), HOST, "localhost"]))
