"""Addresses of the Prefect and MLflow pages that show the runs of an artifacts folder."""

import json
import urllib.parse
from pathlib import Path

from flows.services.registry import running_services
from llm.config import RuntimeConfig
from tasks.direct_http import fetch_or_none
from tasks.tracking.client import tracking_uri, without_password
from tasks.tracking.view import CURVES_VIEW, VIEW_TAG


def addresses(runtime: RuntimeConfig, artifacts_dir: Path) -> dict[str, str]:
    """Return the address of each page, or the command that starts its server."""
    found = running_services(artifacts_dir)
    prefect = mlflow = "fromscratch up"
    if found is not None:
        prefect, mlflow = found.prefect_url, found.mlflow_url
    uri = tracking_uri(runtime.tracking_uri, artifacts_dir)
    if uri.startswith(("http://", "https://")):  # the user's own server
        mlflow = without_password(uri)
    if mlflow != "fromscratch up":
        mlflow = _models_page(mlflow, runtime.project)
    return {"MLflow": mlflow, "Prefect": prefect}


def _models_page(server_url: str, project: str) -> str:
    """Return the page that compares the curves of the project's models, or MLflow's home page if
    there is no model yet.
    """
    name = urllib.parse.quote(f"{project}/models")
    path = f"/api/2.0/mlflow/experiments/get-by-name?experiment_name={name}"
    found = fetch_or_none(server_url.rstrip("/") + path)
    if found is None:
        return server_url
    experiment = json.loads(found)["experiment"]
    page = f"#/experiments/{experiment['experiment_id']}/runs"
    # without this query MLflow shows its page for traces of conversations
    query = "workflowType=machine_learning&compareRunsMode=CHART"
    if any(tag["key"] == VIEW_TAG for tag in experiment.get("tags", [])):
        query += f"&viewStateShareKey={CURVES_VIEW}"
    return f"{server_url.rstrip('/')}/{page}?{query}"
