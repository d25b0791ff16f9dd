"""The pages of Prefect and MLflow in a real browser, as a user clicks through them.

They run with FROMSCRATCH_BROWSER=1, take minutes, and may fail on a loaded machine. With
PAGES_IMAGES=docs/images they also write two screenshots of the models' pages.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.services.addresses import addresses
from flows.services.registry import Services
from flows.services.servers import down, up
from llm.config import RuntimeConfig
from tasks.prefect_api import PrefectApi
from tests.flows.browser import Browser, started
from tests.flows.orchestrated import (
    RECIPE,
    artifacts_of,
    overrides,
    prefect,
    printed_by,
    start_run,
    tasks_of,
    until,
    until_final,
)

MUON = "pretrain.optimizer=muon"  # the default is adamw

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        "FROMSCRATCH_BROWSER" not in os.environ, reason="runs with FROMSCRATCH_BROWSER=1"
    ),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with started() as found:
        yield found
        assert found.outside == []
        assert found.errors == []


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pages") / "artifacts"


@pytest.fixture(scope="module")
def services(browser: Browser, artifacts: Path) -> Iterator[Services]:
    """The servers, started after the browser, without which all tests are skipped."""
    try:
        yield up(artifacts, notify=lambda _: None)
    finally:
        down(artifacts, notify=lambda _: None)


@pytest.fixture(scope="module")
def api(services: Services, artifacts: Path) -> PrefectApi:
    """Prefect's API, with two deployments: one that trains for seconds and one for ever."""
    api = PrefectApi(f"{services.prefect_url}/api")
    endless = "pretrain.num_steps=1000000"
    deployments = [
        {
            "name": name,
            "entrypoint": "flows.run.pipeline",
            "parameters": {"recipe": str(RECIPE), "overrides": overrides(artifacts, *more)},
            "work_pool": {"name": "local"},
        }
        for name, more in {"tiny": (), "endless": (endless,)}.items()
    ]
    file = artifacts.parent / "prefect.yaml"
    file.write_text(yaml.safe_dump({"deployments": deployments}))
    prefect(api, "deploy", "--all", "--prefect-file", str(file))
    return api


@pytest.fixture(scope="module")
def first(api: PrefectApi, artifacts: Path) -> str:
    """The output of a run by the command line on the running servers."""
    process = start_run(artifacts)
    printed = printed_by(process)
    assert process.returncode == 0, printed
    return printed


@pytest.fixture(scope="module")
def by_page(browser: Browser, services: Services, api: PrefectApi, first: str) -> str:
    """A deployment's run started on the page, with another optimizer entered in its form."""
    page = browser.open(services.prefect_url)
    page.get_by_role("link", name="Deployments").click()
    page.get_by_role("link", name="tiny").first.click()
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Custom run").click()
    page.get_by_role("button", name="Add item").click()

    def empty_boxes() -> list[Any]:
        return [box for box in page.locator("textarea").all() if not box.input_value()]

    # the new item, `only` and `start_from`: the form is drawn piece by piece
    new, _, _ = until(lambda: boxes if len(boxes := empty_boxes()) == 3 else [], "the new item")
    new.fill(MUON)
    return started_by(page, page.get_by_role("button", name="Submit"))


@pytest.fixture(scope="module")
def both(api: PrefectApi, by_page: str) -> None:
    """Two finished runs that differ in the optimizer."""
    assert until_final(api, by_page)["state"]["name"] == "Completed"


def started_by(page: Any, button: Any) -> str:
    """Press a button that starts a flow run, and return the run's id."""
    with page.expect_response(lambda response: response.url.endswith("create_flow_run")) as sent:
        button.click()
    return sent.value.json()["id"]


def models_page(services: Services, artifacts: Path) -> str:
    """Return the address that `up` prints."""
    found = addresses(RuntimeConfig(), artifacts)["MLflow"]
    assert found.startswith(services.mlflow_url)
    return found


def keep_image(page: Any, name: str) -> None:
    """Write a screenshot for the README if PAGES_IMAGES is set."""
    if folder := os.environ.get("PAGES_IMAGES"):
        page.screenshot(path=f"{folder}/{name}.png")


def test_prefects_page_starts_a_deployment_that_trains_and_shows_its_report(
    browser: Browser, services: Services, api: PrefectApi, artifacts: Path, by_page: str, both: None
) -> None:
    states = tasks_of(api, by_page)
    assert states["pack corpus"] == "Cached"
    assert {states[name] for name in ("pretrain", "finetune", "evaluate")} == {"Completed"}
    page = browser.open(f"{services.prefect_url}/v2/runs/flow-run/{by_page}")
    page.get_by_text("Completed", exact=True).first.wait_for()
    page.locator("canvas").first.wait_for()  # the graph of the run
    page.get_by_role("tab", name="Task Runs").click()
    page.get_by_text("Cached").first.wait_for()
    page.get_by_role("tab", name="Artifacts").click()
    page.get_by_role("link", name="report").first.click()
    page.get_by_role("link", name=re.compile("^[0-9a-f]{8}$")).first.click()
    heading = artifacts_of(api, by_page)["report"]["data"].splitlines()[0].lstrip("# ")
    page.get_by_role("heading", name=heading).first.wait_for()


def test_the_address_a_run_prints_shows_the_run(browser: Browser, first: str) -> None:
    found = re.search(r"^Prefect +(http\S+)$", first, re.M)
    assert found is not None
    page = browser.open(found[1])
    page.get_by_text("Completed", exact=True).first.wait_for()


def test_mlflow_opens_on_model_training_without_banners(
    browser: Browser, services: Services, artifacts: Path, both: None
) -> None:
    page = browser.open(services.mlflow_url)
    page.get_by_role("link", name="fromscratch/models").click()
    page.get_by_text("2 matching runs").or_(page.get_by_text("4 matching runs")).wait_for()
    assert page.get_by_role("link", name="Models", exact=True).count()
    assert not page.get_by_role("link", name="Sessions").count(), "a menu of conversations"
    assert not page.get_by_text("collects usage data").count()


def test_the_printed_address_shows_the_curves_of_all_models(
    browser: Browser, services: Services, artifacts: Path, both: None
) -> None:
    page = browser.open(models_page(services, artifacts))
    page.get_by_text("4 matching runs").wait_for()
    page.get_by_text("train/loss", exact=True).wait_for()
    curves = page.locator(".js-plotly-plot").first.locator(".scatterlayer .trace .js-line")
    until(
        lambda: curves.count() in (4, 8),  # alone, or over its smoothed form
        "a curve of each model",
    )
    page.mouse.move(0, 0)
    keep_image(page, "curves")


def test_compare_shows_the_settings_that_differ(
    browser: Browser, services: Services, artifacts: Path, both: None
) -> None:
    page = browser.open(models_page(services, artifacts).replace("CHART", "TABLE"))
    page.get_by_text("4 matching runs").wait_for()
    page.locator(".ag-row").first.wait_for()
    rows = page.locator(".ag-row").filter(has_text=re.compile(r"\sbase "))
    assert rows.count() == 2
    for row in rows.all():
        row.get_by_role("checkbox").first.check(force=True)
    page.get_by_role("button", name="Compare").click()
    switches = page.get_by_text("Show diff only")
    switches.first.click()
    table = page.locator("table").filter(has_text="pretrain.optimizer").first
    table.get_by_text("muon", exact=True).wait_for()
    page.get_by_text("pretrain.num_steps", exact=True).wait_for(state="detached")


def test_samples_of_all_models_stand_side_by_side(
    browser: Browser, services: Services, artifacts: Path, both: None
) -> None:
    page = browser.open(models_page(services, artifacts).replace("CHART", "ARTIFACT"))
    page.get_by_text("Table: samples.json").wait_for()
    page.get_by_text("Compare: completion").wait_for()
    page.get_by_text("Once upon a time").or_(page.get_by_text(re.compile("^Say "))).first.wait_for()
    keep_image(page, "samples")


def test_no_page_can_be_shown_inside_another(browser: Browser, services: Services) -> None:
    page = browser.open(f"{services.mlflow_url}/health")
    for url in (services.prefect_url, services.mlflow_url):
        page.set_content(f'<iframe src="{url}" onload="document.title = \'loaded\'"></iframe>')
        page.wait_for_function("document.title == 'loaded'")
        frame = page.frames[1]
        assert not frame.get_by_text("Dashboard").or_(frame.get_by_text("MLflow")).count()
        assert frame.url.startswith("chrome-error:")


def test_prefects_page_cancels_a_run(browser: Browser, services: Services, api: PrefectApi) -> None:
    """The last test: its model would be a fifth in the list of runs."""
    page = browser.open(services.prefect_url)
    page.get_by_role("link", name="Deployments").click()
    page.get_by_role("link", name="endless").first.click()
    page.get_by_role("button", name="Run", exact=True).click()
    run_id = started_by(page, page.get_by_role("menuitem", name="Quick run"))
    until(lambda: tasks_of(api, run_id).get("pretrain") == "Running", "a training")
    page = browser.open(f"{services.prefect_url}/v2/runs/flow-run/{run_id}")
    page.get_by_role("button", name="Open menu").first.click()
    page.get_by_role("menuitem", name="Cancel").click()
    page.get_by_role("button", name="Cancel Flow Run").click()
    assert until_final(api, run_id)["state"]["name"] == "Cancelled"
    page.get_by_text("Cancelled", exact=True).first.wait_for()
