"""``sdtune workbench`` as a user meets it."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console as RichConsole

from sdtune import __version__
from sdtune.backends.vertex import workbench
from sdtune.backends.vertex.workbench import VertexWorkbenches
from sdtune.cli import workbench_view
from tests.conftest import Command
from tests.servers.build import BuildServer
from tests.servers.notebooks import NotebooksServer

IMAGE = "us-central1-docker.pkg.dev/my-project/sdtune/sdtune-kohya-workbench"
CREATE = ("workbench", "create", "cat", "--image", "kohya", "--gpu", "t4")
NO_MACHINE = (
    "The zone 'projects/p/zones/us-central1-a' does not have enough resources available to fulfill the request."
)
OURS: dict[str, Any] = {"labels": {"sdtune": "0-1-0"}}


@pytest.fixture
def registry() -> Iterator[BuildServer]:
    with BuildServer() as server:
        server.registry.repository("my-project", "us-central1", "sdtune")
        server.registry.image(IMAGE, datetime.now(UTC), tags=[__version__])
        yield server


@pytest.fixture(autouse=True)
def server(registry: BuildServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[NotebooksServer]:
    with NotebooksServer(slow=3) as found:
        surroundings = {
            **registry.environment, **found.environment, "CLOUDSDK_CORE_PROJECT": "my-project",
            "CLOUDSDK_CONFIG": str(tmp_path / "gcloud"),
        }  # fmt: skip
        for name, value in surroundings.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(workbench, "SECONDS_BETWEEN_POLLS", 0.01)
        monkeypatch.setattr(workbench, "SETTLES_WITHIN", 0.1)
        monkeypatch.chdir(tmp_path)
        yield found


def url_of(server: NotebooksServer, name: str = "cat") -> str:
    (found,) = [one for full, one in server.instances.items() if full.endswith(f"/{name}")]
    return f"https://{found['proxyUri']}"


def begun(server: NotebooksServer) -> list[str]:
    """Verb and zone of what was begun, in order."""
    return [f"{operation.verb} {operation.instance.split('/')[3]}" for operation in server.operations.values()]


# --- create ----------------------------------------------------------------------------------------------------------


def test_an_instance_is_made_and_its_address_shown(sdtune: Command, server: NotebooksServer) -> None:
    code, out, err = sdtune(*CREATE)
    assert (code, err) == (0, "")
    shown = [re.sub(r"\d+ s ", "0 s ", line).strip() for line in out.splitlines()]
    assert shown == [
        "cat on Workbench, project my-project",
        "machine   n1-standard-8 with 1 x t4",
        f"image     {IMAGE}:{__version__}",
        "zone      us-central1-a, then us-central1-b, then us-central1-c",
        "disks     150 GB for the system, 100 GB for /home/jupyter",
        "idle      stopped when nothing has run in it for 3h",
        "Creating cat in us-central1-a; Ctrl-C leaves it running.",
        "0 s  initializing: the machine is made",
        "0 s  provisioning: the image, and with a GPU its driver, come onto it",
        "0 s  active",
        "cat in us-central1-a is ready.",
        f"open      {url_of(server)}",
        "idle      stopped when nothing has run in it for 3h",
        "stop      sdtune workbench stop cat",
        "delete    sdtune workbench delete cat",
    ]


def test_programs_get_a_line_for_each_event(sdtune: Command, server: NotebooksServer) -> None:
    code, out, _ = sdtune(*CREATE, "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [line["event"] for line in lines] == ["plan", "begun", "state", "state", "state", "outcome"]
    record = lines[-1]["record"]
    assert (record["name"], record["zone"], record["state"]) == ("cat", "us-central1-a", "active")
    assert record["url"] == url_of(server)


def test_detached_it_is_not_waited_for(sdtune: Command, server: NotebooksServer) -> None:
    code, out, _ = sdtune(*CREATE, "--detach")
    assert code == 0
    assert "cat in us-central1-a is being created." in out
    assert "sdtune workbench start cat" in out
    assert begun(server) == ["create us-central1-a"]
    # And start takes the waiting up again, without another order.
    code, out, _ = sdtune("workbench", "start", "cat")
    assert (code, url_of(server) in out) == (0, True)
    assert begun(server) == ["create us-central1-a"]


def test_a_zone_without_a_machine_leads_to_the_next(sdtune: Command, server: NotebooksServer) -> None:
    server.script("create", code=8, message=NO_MACHINE, zone="us-central1-a", leaves=True)
    code, out, _ = sdtune(*CREATE)
    assert code == 0
    assert "us-central1-a has no such machine free at present" in out
    assert "Now trying us-central1-b." in out
    # What was left in the first zone is gone, so that it is neither listed nor paid for.
    assert begun(server) == ["create us-central1-a", "delete us-central1-a", "create us-central1-b"]
    assert [name.split("/")[3] for name in server.instances] == ["us-central1-b"]


def test_a_region_without_quota_is_not_asked_zone_by_zone(sdtune: Command, server: NotebooksServer) -> None:
    said = "Quota 'NVIDIA_T4_GPUS' exceeded.  Limit: 0.0 in region us-central1."
    server.fail("POST", "us-central1-./instances$", 429, message=said)
    code, out, _ = sdtune(*CREATE, "--region", "us-central1,europe-west4")
    assert code == 0
    assert "Now trying europe-west4-a." in out
    asked = [request.path.split("/")[5] for request in server.requests if request.method == "POST"]
    assert asked == ["us-central1-a", "europe-west4-a"]


def test_where_no_zone_has_one_the_last_reason_is_told(sdtune: Command, server: NotebooksServer) -> None:
    server.script("create", code=8, message=NO_MACHINE, times=3)
    code, _, err = sdtune(*CREATE)
    assert code == 4
    assert "us-central1-c has no such machine free at present; try later, or in other zones" in err
    assert not server.instances


def test_an_instance_that_failed_and_is_there_is_said_to_be(sdtune: Command, server: NotebooksServer) -> None:
    server.script("create", code=13, message="An internal error has occurred.", leaves=True)
    code, _, err = sdtune(*CREATE)
    assert code == 4
    assert "An internal error has occurred." in err
    assert "cat is there all the same (stopped), and paid for." in err
    assert "sdtune workbench delete cat" in err


def test_a_missing_image_costs_nothing(sdtune: Command, server: NotebooksServer) -> None:
    code, _, err = sdtune("workbench", "create", "cat", "--image", "diffusers")
    assert code == 3
    assert "sdtune-diffusers-workbench" in err
    assert "build it: sdtune build diffusers --workbench" in err
    assert not begun(server)


def test_who_may_not_look_at_images_may_make_an_instance(
    sdtune: Command, server: NotebooksServer, registry: BuildServer
) -> None:
    text = "Permission 'artifactregistry.tags.get' denied on resource"
    registry.fail("GET", "/tags/", 403, message=text)
    code, out, _ = sdtune(*CREATE)
    assert code == 0
    assert "warning: whether the image" in out
    assert "artifactregistry.tags.get" in out


def test_an_api_that_is_off_is_told_with_the_command(sdtune: Command, server: NotebooksServer) -> None:
    said = "Notebooks API has not been used in project 1 before or it is disabled: notebooks.googleapis.com"
    server.fail("GET", "/instances$", 403, message=said)
    code, _, err = sdtune(*CREATE)
    assert code == 3
    assert "switch it on with: gcloud services enable notebooks.googleapis.com --project=my-project" in err


def test_a_name_is_given_once_in_all_zones(sdtune: Command, server: NotebooksServer) -> None:
    server.put("cat", "europe-west4-a", state="STOPPED", **OURS)
    code, _, err = sdtune(*CREATE)
    assert code == 4
    assert "there is an instance cat in europe-west4-a already (stopped); start it: sdtune workbench start cat" in err
    assert not begun(server)


def test_a_dry_run_makes_no_call(sdtune: Command, server: NotebooksServer, registry: BuildServer) -> None:
    code, out, _ = sdtune(*CREATE, "--dry-run")
    assert code == 0
    assert out.startswith("# POST http://127.0.0.1")
    assert "idle-timeout-seconds: '10800'" in out
    assert out.splitlines()[-1] == "# Then, where that has no such machine: us-central1-b, us-central1-c"
    assert "# Then" not in sdtune(*CREATE, "--dry-run", "--zone", "us-central1-b")[1]
    code, out, _ = sdtune(*CREATE, "--dry-run", "--json", "--idle-shutdown", "off")
    (line,) = map(json.loads, out.splitlines())
    assert line["event"] == "dry_run"
    assert line["instance"]["gceSetup"]["metadata"] == {"idle-timeout-seconds": "", "container-allow-fuse": "true"}
    assert not server.requests
    assert not registry.requests


def test_all_mistakes_come_together_and_first(sdtune: Command, server: NotebooksServer) -> None:
    code, _, err = sdtune(
        "workbench", "create", "Cat", "--gpu", "h200", "--zone", "us-central1-a",
        "--subnet", "projects/p/regions/us-east1/subnetworks/lan",
    )  # fmt: skip
    assert code == 2
    for words in ("name: found 'Cat'", "Workbench has no h200", "subnet: is in us-east1, and the instance may be in"):
        assert words in err
    assert not server.requests


def test_what_is_set_for_jobs_is_taken_where_it_means_the_same(
    sdtune: Command, server: NotebooksServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sdtune.yaml").write_text(
        "{project: my-project, region: us-central1, gpu: a100, labels: {team: art}, image: elsewhere/for-jobs:1, "
        "service_account: trainer@my-project.iam.gserviceaccount.com, network: projects/1234567/global/networks/vpc}"
    )
    monkeypatch.setenv("SDTUNE_LABELS", "team=music")
    _, out, _ = sdtune(*CREATE, "--dry-run", "--json")
    instance = json.loads(out)["instance"]
    setup = instance["gceSetup"]
    assert setup["serviceAccounts"] == [{"email": "trainer@my-project.iam.gserviceaccount.com"}]
    assert instance["labels"]["team"] == "music"
    # What is for the machines of jobs is not.
    assert setup["machineType"] == "n1-standard-8"
    assert setup["containerImage"]["repository"] == IMAGE
    assert "networkInterfaces" not in setup


@pytest.mark.parametrize("json_lines", [False, True])
def test_ctrl_c_leaves_it_running_and_says_how_to_come_back(
    json_lines: bool, sdtune: Command, server: NotebooksServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow = VertexWorkbenches.follow

    def leaving(self: VertexWorkbenches, *words: Any) -> Iterator[Any]:
        yield next(iter(follow(self, *words)))
        raise KeyboardInterrupt

    monkeypatch.setattr(VertexWorkbenches, "follow", leaving)
    code, out, _ = sdtune(*CREATE, *(["--json"] if json_lines else []))
    assert code == 130
    assert begun(server) == ["create us-central1-a"]
    last = '{"event": "left", "instance": "cat"}' if json_lines else "sdtune workbench start cat"
    assert last in out


def test_ctrl_c_before_anything_was_asked_for_leaves_nothing(
    sdtune: Command, server: NotebooksServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leaving(*words: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(VertexWorkbenches, "instances", leaving)
    code, out, _ = sdtune(*CREATE)
    assert code == 130
    assert "No instance was made." in out


# --- list ------------------------------------------------------------------------------------------------------------


def test_only_our_own_are_listed(sdtune: Command, server: NotebooksServer) -> None:
    assert sdtune("workbench", "list") == (
        0, "There are no instances of sdtune here; sdtune workbench create NAME makes one.\n", ""
    )  # fmt: skip
    sdtune(*CREATE)
    server.put("other", "europe-west4-a", healthState="UNHEALTHY")
    server.unreachable = ["projects/my-project/locations/us-east1-b"]
    _, out, _ = sdtune("workbench", "list")
    head, row, address, others, warning = out.splitlines()
    assert head.split() == ["name", "state", "age", "machine", "GPU", "idle", "zone", "image"]
    assert re.sub(r"\d+ s", "1 s", row).split() == [
        "cat", "active", "1", "s", "n1-standard-8", "1", "x", "t4", "3h", "us-central1-a",
        f"kohya:{__version__}",
    ]  # fmt: skip
    assert address.split() == ["cat", url_of(server)]
    assert others == "1 more instance was not made by sdtune; --all shows it."
    assert warning == "warning: no answer from us-east1-b; there may be more instances."

    _, out, _ = sdtune("workbench", "list", "--all")
    assert "active unhealthy" in out
    _, out, _ = sdtune("workbench", "list", "--all", "--json", "--zone", "europe-west4-a")
    (line,) = map(json.loads, out.splitlines())
    assert (line["event"], line["name"], line["zone"], line["unhealthy"]) == (
        "instance",
        "other",
        "europe-west4-a",
        True,
    )


# --- start, stop, delete ---------------------------------------------------------------------------------------------


def test_stopping_and_starting_are_done_once(sdtune: Command, server: NotebooksServer) -> None:
    server.put("cat", **OURS)
    code, out, _ = sdtune("workbench", "stop", "cat")
    assert (code, "cat in us-central1-a is stopped." in out) == (0, True)
    code, out, _ = sdtune("workbench", "stop", "cat")
    assert (code, "cat in us-central1-a is stopped already." in out) == (0, True)
    code, out, _ = sdtune("workbench", "start", "cat")
    assert (code, url_of(server) in out) == (0, True)
    code, out, _ = sdtune("workbench", "start", "cat")
    assert (code, "cat in us-central1-a is active already." in out) == (0, True)
    assert url_of(server) in out
    assert [verb.split()[0] for verb in begun(server)] == ["stop", "start"]


def test_a_detached_order_shows_nothing_that_holds_no_more(sdtune: Command, server: NotebooksServer) -> None:
    server.put("cat", **OURS)
    assert sdtune("workbench", "stop", "cat", "--detach") == (
        0, "Stopping cat in us-central1-a.\ncat in us-central1-a is being stopped.\n", ""
    )  # fmt: skip
    server.put("dog", **OURS)
    code, out, _ = sdtune("workbench", "delete", "dog", "--yes", "--detach")
    assert (code, out.splitlines()[1:]) == (0, ["dog in us-central1-a is being deleted."])
    server.put("fox", state="STOPPED", **OURS)
    code, out, _ = sdtune("workbench", "start", "fox", "--detach")
    assert (code, out.splitlines()[2].split()) == (0, ["wait", "sdtune", "workbench", "start", "fox"])


def test_one_that_is_stopping_is_started_once_it_has_stopped(sdtune: Command, server: NotebooksServer) -> None:
    server.put("cat", **OURS)
    assert sdtune("workbench", "stop", "cat", "--detach")[0] == 0
    code, out, _ = sdtune("workbench", "start", "cat")
    assert (code, url_of(server) in out) == (0, True)
    assert [verb.split()[0] for verb in begun(server)] == ["stop", "start"]


def test_one_that_somebody_suspends_is_taken_as_it_will_be(sdtune: Command, server: NotebooksServer) -> None:
    server.suspend(server.put("cat", **OURS))
    code, out, _ = sdtune("workbench", "stop", "cat")
    assert (code, out.splitlines()[-3:-2]) == (0, ["cat in us-central1-a is suspended."])
    code, out, _ = sdtune("workbench", "start", "cat")
    assert (code, url_of(server) in out) == (0, True)
    assert [verb.split()[0] for verb in begun(server)] == ["suspend", "start"]


def test_starting_without_a_free_machine(sdtune: Command, server: NotebooksServer) -> None:
    server.put("cat", state="STOPPED", **OURS)
    server.script("start", code=8, message=NO_MACHINE)
    code, _, err = sdtune("workbench", "start", "cat")
    assert code == 4
    assert "us-central1-a has no such machine free at present; try later, or in other zones" in err


@pytest.mark.parametrize("verb", ["start", "stop"])
def test_there_must_be_one(verb: str, sdtune: Command) -> None:
    code, _, err = sdtune("workbench", verb, "cat")
    assert code == 4
    assert "there is no instance cat of sdtune in any zone of project my-project; sdtune workbench list" in err


def test_several_of_one_name_want_a_zone(sdtune: Command, server: NotebooksServer) -> None:
    for zone in ("us-central1-a", "europe-west4-a"):
        server.put("cat", zone, **OURS)
    code, _, err = sdtune("workbench", "stop", "cat")
    assert code == 4
    assert "say which: --zone" in err
    assert sdtune("workbench", "stop", "cat", "--zone", "europe-west4-a")[0] == 0
    assert begun(server) == ["stop europe-west4-a"]


@pytest.mark.parametrize("verb", ["start", "stop", "delete"])
def test_what_others_have_made_is_left_alone(verb: str, sdtune: Command, server: NotebooksServer) -> None:
    server.put("cat")
    code, _, err = sdtune("workbench", verb, "cat", *(["--yes"] if verb == "delete" else []))
    assert code == 4
    assert "the instance cat in us-central1-a was not made by sdtune, which leaves it alone" in err
    assert not begun(server)


def test_deleting_asks_and_is_done_once(
    sdtune: Command, server: NotebooksServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.put("cat", **OURS)
    code, _, err = sdtune("workbench", "delete", "cat")
    assert code == 2
    assert "asks before it deletes cat, and nobody can answer here; add --yes" in err

    monkeypatch.setattr("sys.stdin", io.StringIO("n\n"))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    code, out, _ = sdtune("workbench", "delete", "cat")
    assert code == 1
    assert "Delete cat (project my-project), and all that is on its disks? [y/N]:" in out
    assert not begun(server)

    code, out, _ = sdtune("workbench", "delete", "cat", "--yes")
    assert (code, "cat in us-central1-a is deleted." in out) == (0, True)
    code, out, _ = sdtune("workbench", "delete", "cat", "--yes")
    assert (code, "There is no instance cat of sdtune in project my-project; nothing was deleted." in out) == (0, True)
    assert begun(server) == ["delete us-central1-a"]
    assert not server.instances


def test_on_a_terminal_a_clock_runs_and_leaves_nothing(
    sdtune: Command, server: NotebooksServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = io.StringIO()
    screen = RichConsole(file=written, force_terminal=True, width=120, highlight=False)
    monkeypatch.setattr(workbench_view, "_out", lambda: screen)
    monkeypatch.setattr(workbench, "SECONDS_BETWEEN_POLLS", 0.25)
    assert sdtune(*CREATE)[0] == 0
    drawn = written.getvalue()
    clocks = list(re.finditer(r"provisioning\S* \S*0:00:0", drawn))
    assert clocks
    assert "\x1b[2K" in drawn[clocks[-1].end() :]  # and its line is erased
