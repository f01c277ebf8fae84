"""Pools made of deployments of Pipecat Cloud: what becomes what, what is said, and what is refused in which words."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from voicepool.main import main
from voicepool.model import VoiceAgentPoolSpec
from voicepool.pipecat_cloud import PROFILES, Conversion, ConversionError, as_yaml, convert

SMALL = 'agent_name = "desk"\nimage = "registry.example.com/desk:1"\n'

EVERYTHING = """
agent_name = "desk"
image = "registry.example.com/desk:1"
image_credentials = "registry-login"
secret_set = "desk-keys"
region = "us-west"
agent_profile = "agent-2x"
max_session_duration = 300
architecture = "arm64"
websocket_auth = "token"
enable_krisp = true
build_id = "b-1"

[scaling]
min_agents = 2
max_agents = 20

[krisp_viva]
audio_filter = "tel"

[docker]
auto_latest = false

[build]
context_dir = "."

[git]
repo = "somebody/desk"
"""


def pod_of(conversion: Conversion) -> dict[str, Any]:
    pod: dict[str, Any] = conversion.pool["spec"]["template"]["spec"]
    return pod


def container_of(conversion: Conversion) -> dict[str, Any]:
    container: dict[str, Any] = pod_of(conversion)["containers"][0]
    return container


def test_a_small_deployment_gets_what_pipecat_cloud_would_give_it() -> None:
    conversion = convert(SMALL)
    assert conversion.pool["metadata"] == {"name": "desk"}
    spec = conversion.pool["spec"]
    assert (spec["replicas"], spec["maxPods"], spec["onEmpty"]) == (0, 50, {"policy": "ColdStart"})
    assert "session" not in spec
    assert container_of(conversion) == {
        "name": "agent",
        "image": "registry.example.com/desk:1",
        "resources": {"requests": {"cpu": "500m", "memory": "1Gi"}, "limits": {"memory": "1Gi"}},
    }
    assert conversion.warnings == ()
    assert len(conversion.steps) == 1


def test_every_key_is_in_the_pool_or_is_said_to_have_no_counterpart() -> None:
    conversion = convert(EVERYTHING)
    spec = conversion.pool["spec"]
    assert (spec["replicas"], spec["maxPods"], spec["session"]) == (2, 20, {"maxDurationSeconds": 300})
    assert pod_of(conversion)["imagePullSecrets"] == [{"name": "registry-login"}]
    assert pod_of(conversion)["nodeSelector"] == {"kubernetes.io/arch": "arm64"}
    assert container_of(conversion)["envFrom"] == [{"secretRef": {"name": "desk-keys"}}]
    assert container_of(conversion)["resources"]["requests"] == {"cpu": "1", "memory": "2Gi"}
    said = [warning.partition(" = ")[0] for warning in conversion.warnings]
    assert said == ["build", "build_id", "docker", "enable_krisp", "git", "krisp_viva", "region", "websocket_auth"]
    assert [step.split(" --")[0] for step in conversion.steps[1:]] == [
        "kubectl create secret generic desk-keys",
        "kubectl create secret docker-registry registry-login",
    ]


@pytest.mark.parametrize("profile", sorted(PROFILES))
def test_a_profile_is_its_cpu_and_memory(profile: str) -> None:
    resources = container_of(convert(f'{SMALL}agent_profile = "{profile}"'))["resources"]
    assert (resources["requests"]["cpu"], resources["requests"]["memory"]) == PROFILES[profile]


def test_a_profile_of_one_s_own_is_said_to_be_unknown() -> None:
    conversion = convert(f'{SMALL}agent_profile = "large"')
    assert "resources" not in container_of(conversion)
    (warning,) = conversion.warnings
    assert warning.startswith('agent_profile = "large": ')


def test_resources_are_taken_as_they_are() -> None:
    resources = container_of(convert(f'{SMALL}resources = {{cpu = "3", memory = "4Gi"}}'))["resources"]
    assert resources == {"requests": {"cpu": "3", "memory": "4Gi"}, "limits": {"memory": "4Gi"}}


def test_keys_that_nobody_knows_are_said_wherever_they_are() -> None:
    conversion = convert(
        f'{SMALL}colour = "red"\n"two\\nlines" = 1\nscaling = {{target = 3}}\nresources = {{cpu = "1", memory = "1Gi", gpu = 1}}'
    )
    assert [warning.partition(":")[0] for warning in conversion.warnings] == [
        'colour = "red"',
        '"two\\nlines" = 1',
        "scaling.target = 3",
        "resources.gpu = 1",
    ]


def test_name_and_image_can_be_others() -> None:
    conversion = convert('agent_name = "A_Name"', name="desk", image="registry.example.com/desk:2")
    assert conversion.pool["metadata"]["name"] == "desk"
    assert container_of(conversion)["image"] == "registry.example.com/desk:2"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "agent_name",
            "it is not TOML: Expected '=' after a key in a key/value pair (at end of document); mend that line",
        ),
        ("", "agent_name is missing; is this a pcc-deploy.toml?"),
        ('agent_name = "desk"', "name it with --image"),
        ("agent_name = 3", "agent_name is 3; it must be text in quotes"),
        (SMALL + "scaling = 3", "scaling is 3; it must be a table: [scaling]"),
        (
            SMALL + 'scaling = {min_agents = "two"}',
            'scaling.min_agents is "two"; it must be a whole number from 0 to 100000',
        ),
        (
            SMALL + "scaling = {min_agents = true}",
            "scaling.min_agents is true; it must be a whole number from 0 to 100000",
        ),
        (
            SMALL + "scaling = {min_agents = 3, max_agents = 2}",
            "scaling.max_agents must be at least scaling.min_agents",
        ),
        (SMALL + 'secret_set = "My Keys"', 'secret_set is "My Keys"; it must be the name of a Secret'),
        (SMALL + 'resources = {cpu = "1"}', "resources.memory is missing"),
        (SMALL + 'resources = {cpu = "1", memory = "much"}', 'resources.memory is "much"; it must be a quantity'),
        (SMALL + 'agent_profile = "agent-1x"\nresources = {cpu = "1", memory = "1Gi"}', "exclude each other"),
        (
            SMALL + "max_session_duration = 5",
            "max_session_duration is 5; it must be a whole number of seconds from 60 to 86400",
        ),
        (SMALL + 'architecture = "mips"', 'architecture is "mips"; it must be "amd64" or "arm64"'),
        (
            'agent_name = "A_Name"\nimage = "i:1"',
            "agent_name is 'A_Name', but a pool's name has at most 40 small letters",
        ),
        (f'agent_name = "{"a" * 41}"\nimage = "i:1"', "choose one with --name"),
        ('agent_name = "-a"\nimage = "i:1"', "no hyphen at its ends"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(text: str, words: str) -> None:
    with pytest.raises(ConversionError) as raised:
        convert(text)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_wrong_name_of_the_command_line_is_told_from_the_file_s() -> None:
    with pytest.raises(ConversionError, match="--name is 'A B'"):
        convert(SMALL, name="A B")


@pytest.mark.parametrize("text", [SMALL, EVERYTHING])
def test_the_yaml_is_the_pool_and_says_the_rest_in_comments(text: str) -> None:
    conversion = convert(text)
    written = as_yaml(conversion, "pcc-deploy.toml")
    assert yaml.safe_load(written) == conversion.pool
    comments = [line for line in written.splitlines() if line.startswith("#")]
    for words in (*conversion.steps, *conversion.warnings):
        assert f"#   {words}" in comments
    VoiceAgentPoolSpec.model_validate(conversion.pool["spec"])


def test_the_command_prints_the_pool_and_warns_beside_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "pcc-deploy.toml"
    file.write_text(EVERYTHING)
    assert main(["convert", str(file), "--name", "front-desk", "--image", "registry.example.com/desk:2"]) == 0
    said = capsys.readouterr()
    assert yaml.safe_load(said.out)["metadata"]["name"] == "front-desk"
    assert f'voicepool: {file}: no counterpart: region = "us-west": ' in said.err
    assert len(said.err.splitlines()) == 8


def test_the_command_takes_the_usual_file_without_being_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pcc-deploy.toml").write_text(SMALL)
    assert main(["convert"]) == 0
    said = capsys.readouterr()
    assert (yaml.safe_load(said.out)["metadata"]["name"], said.err) == ("desk", "")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file or directory; name the file: voicepool convert FILE"),
        (b"\xff\xfe", "it is not text in UTF-8; is this a pcc-deploy.toml?"),
        (b"agent_name = 3", "agent_name is 3; it must be text in quotes"),
    ],
)
def test_the_command_says_in_one_line_what_is_wrong_with_a_file(
    content: bytes | None, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.toml"
    if content is not None:
        file.write_bytes(content)
    assert main(["convert", str(file)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == f"voicepool: {file}: {words}\n"


def test_what_is_missing_for_a_command_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "pcc-deploy.toml"
    file.write_text(SMALL)
    monkeypatch.setitem(sys.modules, "yaml", None)
    assert main(["convert", str(file)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "yaml" in said.err
    assert said.err.endswith("; install the extra: voicepool[operator]\n")


def test_the_guide_shows_what_the_command_prints() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "guides" / "from-pipecat-cloud.md").read_text()
    (before,) = re.findall(r"^```toml\n(.*?)^```$", guide, re.DOTALL | re.MULTILINE)
    (after,) = re.findall(r"^```yaml\n(.*?)^```$", guide, re.DOTALL | re.MULTILINE)
    conversion = convert(before)
    assert as_yaml(conversion, "pcc-deploy.toml").endswith("\n" + after)
    assert not conversion.warnings
