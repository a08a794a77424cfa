"""What ships the server: `make serve`, the image, compose and the chart, held to the code that they start."""

import json
import re
import shlex
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from stiv_deploy.runtime.command.group import app

ROOT = Path(__file__).parents[3]
DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "chart"
PACKAGES = ("calibration", "export", "runtime", "serving", "stiv_deploy", "stiv_ref")
USER = "10001"


def parsed(words: list[str]) -> dict[str, Any]:
    """Parameters of ``stiv serve`` with these arguments; raises Typer's usage errors."""
    group: Any = typer.main.get_command(app)
    command = group.get_command(group.context_class(group), "serve")
    with command.make_context("serve", list(words)) as context:
        found: dict[str, Any] = context.params
    return found


@pytest.fixture(scope="module")
def image() -> str:
    return (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ")


def instructions(image: str, name: str) -> list[str]:
    return re.findall(rf"^{name} (.*)$", image, re.MULTILINE)


def entry(image: str) -> list[str]:
    """Arguments of ``stiv serve`` that the image starts with."""
    words = json.loads(instructions(image, "ENTRYPOINT")[0])
    assert words[:2] == ["stiv", "serve"]
    return list(words[2:])


def test_make_serve_exports_where_there_is_no_bundle_and_serves() -> None:
    done = subprocess.run(
        ["make", "-n", "serve", "SERVE=--port 9"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines = [line for line in done.stdout.splitlines() if "out/serve" in line]
    assert lines[0] == "test -f out/serve/manifest.json || .venv/bin/stiv export checkpoints/world --out out/serve"
    words = shlex.split(lines[1])
    assert words[:2] == [".venv/bin/stiv", "serve"]
    assert parsed(words[2:])["port"] == 9


def test_the_image_takes_all_packages_and_nothing_else(image: str) -> None:
    copied = {line.split()[0] for line in instructions(image, "COPY") if not line.startswith(("--", "pyproject"))}
    assert copied == {*PACKAGES, "constraints.txt"}
    allowed = {line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line[0] == "!"}
    assert allowed == {*PACKAGES, "constraints.txt", "pyproject.toml", "README.md", "LICENSE"}


def test_the_image_serves_as_nobody_in_particular(image: str) -> None:
    assert instructions(image, "USER")[-1] == f"{USER}:{USER}"
    options = parsed(entry(image))
    assert (options["host"], options["port"], str(options["tokens"])) == ("0.0.0.0", 8000, "/run/secrets/tokens")
    assert str(options["data"]).startswith(f"{instructions(image, 'VOLUME')[0]}/")
    health = instructions(image, "HEALTHCHECK")[0]
    assert f"http://127.0.0.1:{options['port']}/health" in health
    compile(json.loads(health[health.index("[") :])[2], "health", "exec")


def test_compose_starts_the_images() -> None:
    found = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    targets = set(re.findall(r"^FROM .* AS (\w+)$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE))
    for service in found["services"].values():
        build = service["build"]
        assert build["target"] in targets
        assert (DEPLOY / build["context"] / build["dockerfile"]).resolve() == DEPLOY / "Dockerfile"
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert {volume["target"] for volume in service["volumes"]} == {"/bundle", "/data"}
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert {*service["secrets"]} == {*found["secrets"]} == {"tokens"}


def rendered(template: str, values: dict[str, Any]) -> Any:
    """The YAML of a ``template``, of which only what these templates use is known."""
    text = re.sub(r"^ *\{\{- range \.Values\.options \}\}\n(.*?)^ *\{\{- end \}\}\n", lambda found: "".join(
        found[1].replace("{{ . | quote }}", json.dumps(each)) for each in values["options"]
    ), template, flags=re.DOTALL | re.MULTILINE)  # fmt: skip
    choice = r"^ *\{\{- if \.Values\.(\w+) \}\}\n((?:(?!\{\{- (?:if|end|else)).)*?)" + (
        r"(?:^ *\{\{- else \}\}\n((?:(?!\{\{- (?:if|end|else)).)*?))?^ *\{\{- end \}\}\n"
    )
    text = re.sub(
        choice, lambda found: found[2] if values[found[1]] else found[3] or "", text, flags=re.DOTALL | re.MULTILINE
    )
    text = re.sub(r"\{\{- toYaml \.Values\.(\w+) \| nindent \d+ \}\}", lambda found: json.dumps(values[found[1]]), text)
    text = text.replace("{{ max 1 .Values.gpus }}", str(max(1, values["gpus"])))
    text = text.replace("{{ add .Values.grace 20 }}", str(values["grace"] + 20)).replace("{{ .Release.Name }}", "name")
    text = re.sub(r"\{\{ \.Values\.(\w+)( \| quote)? \}\}", lambda found: str(values[found[1]]), text)
    assert "{{" not in text, text
    return yaml.safe_load(text)


def values(**changes: Any) -> dict[str, Any]:
    return yaml.safe_load((CHART / "values.yaml").read_text()) | changes


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gpus": 2, "options": ["--queue=50", "--keep-hours=2"]},
        {"gpus": 2, "devices": "0,1", "options": ["--parallel=cfg2"]},
        {"storageClass": "local", "resources": {"limits": {"cpu": 4}}},
    ],
)
def test_the_chart_starts_the_image(changes: dict[str, Any], image: str) -> None:
    chosen = values(**changes)
    found = rendered((CHART / "templates/statefulset.yaml").read_text(), chosen)
    pod = found["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    options = parsed([*entry(image), *container["args"]])
    if chosen["devices"]:
        assert (options["workers"], options["devices"]) == (None, chosen["devices"])
    else:
        assert (options["workers"], options["devices"]) == (max(1, chosen["gpus"]), None)
    assert options["grace"] + 13 < pod["terminationGracePeriodSeconds"]  # as the server itself takes at most
    assert container["resources"] == ({"limits": {"nvidia.com/gpu": 2}} if chosen["gpus"] else chosen["resources"])
    assert {str(pod["securityContext"][name]) for name in ("runAsUser", "runAsGroup", "fsGroup")} == {USER}
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts == {"/bundle", "/data", "/run/secrets", "/tmp"}
    claims = found["spec"]["volumeClaimTemplates"]
    volumes = {volume["name"] for volume in (*pod["volumes"], *(claim["metadata"] for claim in claims))}
    assert volumes == {mount["name"] for mount in container["volumeMounts"]}
    assert claims[0]["spec"].get("storageClassName") == (chosen["storageClass"] or None)
    service = rendered((CHART / "templates/service.yaml").read_text(), chosen)
    assert service["spec"]["selector"] == found["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["ports"][0]["targetPort"] in {port["name"] for port in container["ports"]}


def test_the_chart_has_a_schema_for_each_of_its_values() -> None:
    schema, kinds = json.loads((CHART / "values.schema.json").read_text()), {
        "string": str, "integer": int, "array": list, "object": dict
    }  # fmt: skip
    assert not schema["additionalProperties"]
    assert {*values()} == {*schema["required"]} == {*schema["properties"]} - {"global"}
    for name, value in values().items():
        rule = schema["properties"][name]
        assert isinstance(value, kinds[rule["type"]]), name
        assert re.search(rule.get("pattern", ""), str(value)), name
        assert value in rule.get("enum", [value])
    assert yaml.safe_load((CHART / "Chart.yaml").read_text())["apiVersion"] == "v2"
    used = re.findall(r"\.Values\.(\w+)", "".join(file.read_text() for file in (CHART / "templates").iterdir()))
    assert {*used} == {*values()}


def test_helm_has_nothing_to_say_against_the_chart() -> None:
    if shutil.which("helm") is None:
        pytest.skip("helm is not installed: the chart is held to its schema only")
    done = subprocess.run(["helm", "lint", "--strict", str(CHART)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_options_that_there_are_not_are_seen() -> None:
    with suppress(typer.Exit), pytest.raises(Exception, match="No such option"):
        parsed(["bundle", "--nope"])
