"""The compose files: valid by the official schema, and agreeing with the images and settings."""

import json
import re
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from aptserve_scheduler.config import SchedulerSettings
from aptserve_worker.config import WorkerSettings

DOCKER = Path(__file__).parents[3] / "docker"
FILES = ["docker-compose.yml", "docker-compose.cuda.yml"]
_VARIABLE = re.compile(r"\$\{(\w+)(?:(:[-?])([^}]*))?\}")


class MissingVariableError(Exception):
    pass


def load(name: str, **variables: str) -> Any:
    """A compose file with its variables replaced as Compose does."""

    def replace(match: re.Match[str]) -> str:
        value = variables.get(match[1], "")
        if not value and match[2] == ":?":
            raise MissingVariableError(f"{match[1]}: {match[3]}")
        return value or (match[3] if match[2] == ":-" else "")

    def interpolate(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: interpolate(item) for key, item in value.items()}
        if isinstance(value, list):
            return [interpolate(item) for item in value]
        return _VARIABLE.sub(replace, value) if isinstance(value, str) else value

    return interpolate(yaml.safe_load((DOCKER / name).read_text()))


@pytest.fixture
def compose() -> Any:
    return load(FILES[0], APTSERVE_JOIN_TOKEN="token")


@pytest.fixture(scope="module")
def schema() -> Any:
    """The schema of the Compose Specification, as the package check-jsonschema carries it."""
    path = "check_jsonschema/builtin_schemas/vendor/compose-spec.json"
    return json.loads(Path(str(distribution("check-jsonschema").locate_file(path))).read_text())


@pytest.mark.parametrize("name", FILES)
def test_valid_by_the_compose_specification(schema: Any, name: str) -> None:
    jsonschema.validate(load(name, APTSERVE_JOIN_TOKEN="token"), schema)


def test_the_schema_finds_mistakes(schema: Any, compose: Any) -> None:
    compose["services"]["worker"]["restarts"] = "always"
    with pytest.raises(jsonschema.ValidationError, match="restarts"):
        jsonschema.validate(compose, schema)


def test_no_start_without_a_join_token() -> None:
    with pytest.raises(MissingVariableError, match="APTSERVE_JOIN_TOKEN"):
        load(FILES[0])


def test_both_sides_have_the_same_token(compose: Any) -> None:
    services = compose["services"]
    scheduler = services["scheduler"]["environment"]["APTSERVE_SCHEDULER_JOIN_TOKEN"]
    assert scheduler == services["worker"]["environment"]["APTSERVE_WORKER_JOIN_TOKEN"] == "token"


def test_only_the_client_port_is_published_and_on_loopback(compose: Any) -> None:
    assert compose["services"]["scheduler"]["ports"] == ["127.0.0.1:50051:50051"]
    assert "ports" not in compose["services"]["worker"]


def test_workers_are_on_an_internal_network_alone(compose: Any) -> None:
    assert compose["services"]["worker"]["networks"] == ["workers"]
    assert compose["networks"]["workers"]["internal"] == "true"


def test_workers_can_be_scaled(compose: Any) -> None:
    """A fixed name or port would allow one container only."""
    assert {"container_name", "ports", "hostname"}.isdisjoint(compose["services"]["worker"])


def test_a_stop_leaves_time_for_the_drain(compose: Any) -> None:
    for name, settings in (("scheduler", SchedulerSettings), ("worker", WorkerSettings)):
        grace = float(compose["services"][name]["stop_grace_period"].removesuffix("s"))
        field = "drain_grace_seconds" if name == "scheduler" else "leave_timeout_seconds"
        assert grace > settings.model_fields[field].default


@pytest.mark.parametrize("name", FILES)
def test_every_variable_is_a_setting(name: str) -> None:
    for service in load(name, APTSERVE_JOIN_TOKEN="token")["services"].values():
        for variable in service.get("environment", {}):
            assert is_known(variable), variable


def is_known(variable: str) -> bool:
    if variable in ("APTSERVE_API_KEY", "APTSERVE_ADDRESS"):  # the command line's own
        return True
    for prefix, settings in (
        ("APTSERVE_SCHEDULER_", SchedulerSettings),
        ("APTSERVE_WORKER_", WorkerSettings),
    ):
        if variable.startswith(prefix):
            return variable.removeprefix(prefix).lower() in settings.model_fields
    return False


def test_the_settings_of_the_compose_file_load(
    compose: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for service in compose["services"].values():
        for name, value in service["environment"].items():
            if value is not None:  # Compose passes these on from the shell, and only if set
                monkeypatch.setenv(name, value)
    assert SchedulerSettings().policy == "apt-slo"
    assert WorkerSettings().model == "embedded"
    assert WorkerSettings().scheduler == "scheduler:50051"


def test_documented_variables_are_those_used() -> None:
    text = (DOCKER / FILES[0]).read_text()
    documented = set(re.findall(r"^#   (APTSERVE_\w+)  ", text, re.MULTILINE))
    passed_on = {"APTSERVE_SCHEDULER_API_KEY"}
    assert documented == {match[1] for match in _VARIABLE.finditer(text)} | passed_on


def test_the_cuda_file_changes_what_is_there(compose: Any) -> None:
    override = load(FILES[1])["services"]
    assert set(override) == {"worker"}
    assert override["worker"]["build"]["args"] == {"TORCH_INDEX_URL": ""}
    assert override["worker"]["image"] != compose["services"]["worker"]["image"]
