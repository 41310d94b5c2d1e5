"""The download: whole and checked or not at all, whatever the server, the network and the disk do."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from pack.internvl_u import checkpoint as checkpoints
from pack.internvl_u import download as downloads
from pack.internvl_u import transfer
from pack.internvl_u.download import download, is_wanted

from .loopback_hub import COMMIT, HUB, MODELSCOPE, Hub, page, redirect, reset, sends, silence, status

ROOT = Path(__file__).parent.parent.parent
WEIGHTS = "vlm/model-00002-of-00003.safetensors"
BLOCKS = 3 * transfer._CHUNK  # older clients give whole blocks alone
EXTRA = {"README.md": b"# InternVL-U\n", "LICENSE": b"MIT\n"}
UNWANTED = {
    *(".gitattributes", "setup.py", "vlm/modeling_evil.py", "vlm/pytorch_model.bin", "assets/picture.png"),
    *("vlm/deeper/model.safetensors", "processor/chat_template.jinja", "vlm/.hidden.json", "onnx/model.safetensors"),
}
OUTSIDE = {
    *("../../x.json", "../x.safetensors", "/tmp/x.json", "vlm/../../x.safetensors", "vlm/../x.json", "vlm//x.json"),
    *("vlm\\..\\..\\x.json", "..\\x.json", "vlm/..\\x.safetensors", "C:/x.json", "vlm/C:x.json", "./vlm/x.json"),
    *("vlm/x\0.json", "vlm/x\n.json", "~/x.json", "vlm/..", "..", "", "/", "vlm/", "//host/x.json", "file:///x.json"),
}


@pytest.fixture
def model(checkpoint, tmp_path):
    """What the server has: a model, and what none of us wants."""
    folder = Path(shutil.copytree(checkpoint, tmp_path / "served"))
    for name, data in (EXTRA | {name: b"evil" for name in UNWANTED}).items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def hub(model):
    with Hub(model) as running:
        yield running


@pytest.fixture
def wanted(checkpoint):
    return EXTRA | contents(checkpoint)


@pytest.fixture
def online(monkeypatch, hub):
    """huggingface_hub in this process, whatever HF_HUB_OFFLINE says; short waits."""
    from huggingface_hub import constants, utils

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
    monkeypatch.setattr(transfer, "WAITS", (0.05, 0.05, 0.05))
    monkeypatch.setattr(downloads, "MODELSCOPE", hub.url)
    reset_sessions = getattr(utils, "reset_sessions", getattr(utils, "close_session", None))
    reset_sessions()
    yield
    reset_sessions()


@pytest.fixture(params=["huggingface", "modelscope"])
def source(request, hub, online):
    """Both kinds of source; the first one as a mirror."""
    return hub.url if request.param == "huggingface" else request.param


@pytest.fixture
def target(tmp_path):
    (tmp_path / "models").mkdir()
    return tmp_path / "models" / "InternVL-U"


def contents(folder):
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def there(target):
    """Everything beside the target, by name."""
    return sorted(place.name for place in target.parent.iterdir())


def test_the_folder_is_byte_for_byte_what_the_server_has_and_nothing_else(source, hub, wanted, target):
    told = []
    download(target, source, progress=lambda done, total: told.append((done, total)))
    assert contents(target) == wanted and there(target) == ["InternVL-U"]
    size = sum(map(len, wanted.values()))
    assert told[-1] == (size, size) and {total for _, total in told} <= {0, size} and hub.sent < size + 20_000
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_all_that_is_read_of_a_model_is_taken(checkpoint):
    read = {file.relative_to(checkpoint).as_posix() for file in checkpoints.Folder(checkpoint).files()}
    assert len(read) > 10 and all(map(is_wanted, read))


@pytest.mark.parametrize("name", sorted(UNWANTED | OUTSIDE))
def test_no_other_file_is_taken(name):
    assert not is_wanted(name)


def test_names_that_lead_out_of_the_folder_are_neither_asked_for_nor_written(source, hub, wanted, target, tmp_path):
    hub.listed |= {name: b"evil" for name in OUTSIDE}
    hub.files |= {name: b"evil" for name in OUTSIDE}
    before = {place for place in tmp_path.rglob("*") if target.parent not in place.parents}
    download(target, source)
    assert contents(target) == wanted and there(target) == ["InternVL-U"]
    assert {place for place in tmp_path.rglob("*") if target.parent not in place.parents} == before
    asked = [path.partition("/resolve/")[2].partition("/")[2] for path, _ in hub.asked if "/resolve/" in path]
    assert sorted(asked) == sorted(wanted)


PASSING = {
    "breaks off": sends(stop=BLOCKS),
    "breaks off at once": sends(stop=0),
    "closes": reset,
    "ignores Range": sends(ranges=False, stop=50_000),
    "is busy (429)": status(429, Retry_After="0"),
    "is busy (503)": status(503, Retry_After="0"),
    "is busy without saying for how long": status(429),
    "is busy until a date": status(503, Retry_After="Wed, 21 Oct 2015 07:28:00 GMT"),
    "fails": status(500),
    "has a bad gateway": status(502),
    "does not answer": silence,
}


@pytest.mark.parametrize("fault", PASSING)
def test_what_passes_is_waited_for(source, hub, wanted, target, fault):
    hub.fault(WEIGHTS, PASSING[fault], 2)
    hub.fault("/api/", PASSING[fault], 1)
    download(target, source)
    assert contents(target) == wanted


def test_a_file_that_breaks_off_is_gone_on_with_where_it_was(source, hub, wanted, target):
    hub.fault(WEIGHTS, sends(stop=BLOCKS), 4)
    download(target, source)
    assert contents(target) == wanted
    ranges = [headers.get("Range") for path, headers in hub.asked if WEIGHTS in path]
    assert ranges[0] is None and [int(text[6:-1]) for text in ranges[1:]] == [BLOCKS * n for n in range(1, 5)]


@pytest.mark.parametrize("where", ["another host", "a relative path"])
def test_redirects_are_followed(source, hub, wanted, target, model, where):
    with Hub(model, "localhost") as other:
        base = other.url if where == "another host" else ""
        hub.fault("/resolve/", redirect(base), len(wanted))
        download(target, source)
        assert contents(target) == wanted
        assert len([path for path, _ in (other if base else hub).asked if "/resolve/" in path]) >= len(wanted)


def changed(**values):
    """Changes a list of files of either kind."""

    def change(answer):
        files = answer["siblings"] if "siblings" in answer else answer["Data"]["Files"]
        for file in files:
            if WEIGHTS in (file.get("rfilename"), file.get("Path")):
                file |= values
                if "lfs" in file and "Sha256" in values:
                    file["lfs"]["sha256"] = values["Sha256"]
                if "lfs" in file and "Size" in values:
                    file["size"] = values["Size"]
        return answer

    return change


def without(ending):
    def change(answer):
        for holder, key in ((answer, "siblings"), (answer.get("Data", {}), "Files")):
            holder[key] = [
                file for file in holder.get(key, ()) if not file.get("rfilename", file.get("Path")).endswith(ending)
            ]
        return answer

    return change


LISTS = {
    "no files": (lambda answer: {"id": HUB}, "has no vlm/config.json"),
    "nothing": (lambda answer: {"id": HUB, "siblings": None, "Data": {"Files": None}}, "has no vlm/config.json"),
    "no weights": (without(".safetensors"), r"has no vlm/\*.safetensors"),
    "no configuration": (without("vae/config.json"), "has no vae/config.json"),
    "a list": (lambda answer: [answer], "no usable answer|a JSON object expected"),
    "a text": (lambda answer: "model", "no usable answer|a JSON object expected"),
    "null": (lambda answer: None, "no usable answer|a JSON object expected"),
    "files of texts": (lambda answer: {"siblings": ["a"], "Data": {"Files": ["a"]}}, "no usable answer|expected"),
    "no hash": (changed(Sha256=None), "the hash None: both expected|a valid string expected"),
    "an empty hash": (changed(Sha256=""), "is listed with the size .*: both expected"),
    "a hash that is a path": (changed(Sha256="../../x"), "is listed with the size .*: both expected"),
    "a size below zero": (changed(Size=-1), "is listed with the size .*: both expected"),
    "a size that is a text": (changed(Size="5"), "is listed with the size '5'|a valid integer expected"),
    "an endless size": (changed(Size=10**18), "GB free"),
    "too large a size": (changed(Size=600_000), "541896 bytes found, 600000 expected"),
    "too small a size": (changed(Size=5), "541896 bytes found, 5 expected"),
}


@pytest.mark.parametrize("name", LISTS)
def test_a_list_that_is_none_or_lies_is_refused_with_a_sentence(source, hub, wanted, target, name):
    hub.change_list, sentence = LISTS[name]
    refused(source, target, sentence)
    hub.change_list = lambda answer: answer
    download(target, source)
    assert contents(target) == wanted


SERVERS = {
    "404": (status(404), r"is not there \(404\)"),
    "401": (status(401), "hf auth login"),
    "403, gated": (status(403, X_Error_Code="GatedRepo"), "hf auth login"),
    "451": (status(451), "answers 451, 200 expected"),
    "busy for an hour": (status(429, Retry_After="3600"), "answers 429: it is busy. Look at the connection"),
    "always busy": (status(503, Retry_After="0"), "answers 503: it is busy. Look at the connection"),
    "a page": (page, "web page|no usable answer|not readable as JSON"),
    "a redirect to itself": (redirect(""), "cannot be reached|answers 302"),
    "silence": (silence, "cannot be reached"),
    "closed": (reset, "cannot be reached"),
}


@pytest.mark.parametrize("place", ["/api/", WEIGHTS])
@pytest.mark.parametrize("name", SERVERS)
def test_a_server_that_refuses_is_told_of_and_the_same_once_more_goes_on(source, hub, wanted, target, name, place):
    fault, sentence = SERVERS[name]
    hub.fault(place, fault)
    refused(source, target, sentence)
    hub.faults.clear()
    kept = hub.sent
    download(target, source)
    assert contents(target) == wanted and there(target) == ["InternVL-U"]
    if place == WEIGHTS:
        assert hub.sent - kept < sum(map(len, wanted.values())) - 1_000_000  # the transformer was there already


def refused(source, target, sentence):
    with pytest.raises((RuntimeError, OSError), match=sentence) as told:
        download(target, source)
    text = str(told.value)
    assert "\n" not in text.strip() and len(text) < 1200 and not target.exists(), text
    assert set(there(target)) <= {".InternVL-U.download"}


BODIES = {
    "another content": (sends(bytes(541_896)), "has the hash"),
    "more than it says": (sends(bytes(600_000), length=541_896), "has the hash|sends more"),
    "more without a length": (sends(bytes(600_000)), "600000 bytes found, 541896 expected"),
    "less, each time": (sends(bytes(10)), "10 bytes found, 541896 expected"),
    "nothing": (sends(b""), "0 bytes found, 541896 expected"),
    "a pointer": (sends(b"version https://git-lfs.github.com/spec/v1\n"), "bytes found, 541896 expected"),
}


@pytest.mark.parametrize("name", BODIES)
def test_a_file_that_is_not_the_listed_one_is_not_taken(source, hub, wanted, target, name):
    fault, sentence = BODIES[name]
    hub.fault(WEIGHTS, fault)
    refused(source, target, sentence)
    hub.faults.clear()
    download(target, source)
    assert contents(target) == wanted


@pytest.mark.parametrize("place", ["parts", "files"])
def test_what_was_damaged_on_the_disk_between_two_attempts_is_found(source, hub, wanted, target, place):
    hub.fault(WEIGHTS, sends(stop=BLOCKS), 1)
    hub.fault(WEIGHTS, status(404), 1)
    refused(source, target, "404")
    work = target.with_name(".InternVL-U.download")
    largest = max((file for file in (work / place).rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    with largest.open("r+b") as file:
        file.seek(1000)
        file.write(b"damaged")
    if place == "parts":
        refused(source, target, "has the hash .* damaged")
    download(target, source)
    assert contents(target) == wanted


def test_another_revision_leaves_nothing_of_the_one_that_was_begun(source, hub, wanted, target):
    new = hub.listed.pop(WEIGHTS)
    hub.files["vlm/old.safetensors"] = b"of the first revision"
    hub.listed = {"vlm/old.safetensors": hub.files["vlm/old.safetensors"], **hub.listed}
    hub.listed["vae/config.json"] = hub.files["vae/config.json"] = b"{}"
    hub.fault("model-00003", status(404))
    refused(source, target, "404")
    assert list(target.with_name(".InternVL-U.download").rglob("old.safetensors"))
    hub.faults.clear()
    del hub.listed["vlm/old.safetensors"]
    hub.listed[WEIGHTS], hub.listed["vae/config.json"] = new, wanted["vae/config.json"]
    hub.files["vae/config.json"] = wanted["vae/config.json"]
    download(target, source)
    assert contents(target) == wanted


def test_what_one_source_began_another_goes_on_with(hub, online, wanted, target):
    hub.fault(f"/{HUB}/resolve/{COMMIT}/{WEIGHTS}", sends(stop=BLOCKS), 1)
    hub.fault(f"/{HUB}/resolve/{COMMIT}/{WEIGHTS}", status(403))
    refused(hub.url, target, "take another source")
    download(target, "modelscope")
    assert contents(target) == wanted
    (asked,) = [headers for path, headers in hub.asked if f"{MODELSCOPE}/resolve" in path and WEIGHTS in path]
    assert asked["Range"] == f"bytes={BLOCKS}-"


def test_the_server_is_given_the_time_that_it_asks_for_and_waiting_can_be_cancelled(hub, online, wanted, target):
    hub.fault(WEIGHTS, status(429, Retry_After="2"), 1)
    begun = time.monotonic()
    download(target, hub.url)
    assert contents(target) == wanted and 2 <= time.monotonic() - begun < 60
    hub.fault(WEIGHTS, status(429, Retry_After="200"), 1)
    begun = time.monotonic()

    def cancel(done, total):
        if time.monotonic() > begun + 1:
            raise InterruptedError("cancelled")

    with pytest.raises(InterruptedError):
        download(target.with_name("another"), hub.url, progress=cancel)
    assert time.monotonic() - begun < 60


def test_too_little_space_is_told_before_anything_is_fetched(source, hub, target, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=1_000_000))
    refused(source, target, r"0\.0 GB free in .*models, 0\.0 GB needed: make room")
    assert not [path for path, _ in hub.asked if "/resolve/" in path] and there(target) == []


def test_what_is_there_already_counts_as_space(source, hub, wanted, target, monkeypatch):
    hub.fault("model-00003", status(404), 1)
    refused(source, target, "404")
    size = sum(map(len, wanted.values()))
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=size - 1_000_000))
    download(target, source)
    assert contents(target) == wanted


@pytest.mark.parametrize("kind", ["model", "empty folder", "file", "dead link"])
def test_what_is_there_already_is_left_alone_and_nobody_is_asked(hub, online, target, model, kind):
    if kind == "model":
        shutil.copytree(model, target)
    elif kind == "empty folder":
        target.mkdir()
    elif kind == "file":
        target.write_text("mine")
    else:
        target.symlink_to(target.parent / "nowhere")
    before = contents(target.parent)
    with pytest.raises(FileExistsError, match="is there already and is left as it is"):
        download(target, hub.url)
    assert contents(target.parent) == before and hub.asked == [] and there(target) == ["InternVL-U"]


def test_two_downloads_at_once_do_not_mix(source, hub, wanted, target):
    hub.delay = 0.01
    first = threading.Thread(target=download, args=(target, source))
    first.start()
    while hub.sent < 300_000:
        time.sleep(0.01)
    with pytest.raises(RuntimeError, match=r"another download is at work in .*\.InternVL-U\.download"):
        download(target, source)
    hub.delay = 0
    download(target.with_name("another"), source)
    first.join(60)
    assert contents(target) == contents(target.with_name("another")) == wanted
    assert there(target) == ["InternVL-U", "another"]


def test_a_target_that_appears_in_the_meantime_is_not_replaced(source, hub, target):
    def make(done, total):
        if done > 100_000 and not target.exists():
            target.mkdir()
            (target / "mine").write_text("mine")

    with pytest.raises(FileExistsError, match="is there already"):
        download(target, source, progress=make)
    assert contents(target) == {"mine": b"mine"}


def test_a_full_disk_is_told_of_and_what_is_there_is_kept(source, hub, wanted, target, monkeypatch):
    resource = pytest.importorskip("resource", reason="POSIX")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, limits[1]))
        refused(source, target, r"nothing can be written to .* \(File too large\)\. What was fetched is kept in")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    download(target, source)
    assert contents(target) == wanted


@pytest.mark.parametrize(
    "text",
    ["ftp://host", "http://", "file:///etc", "host", "", "http://user:password@host", "http://h/?a=b", "http://a b"],
)
def test_a_source_that_is_none_is_a_sentence(online, target, text):
    with pytest.raises(ValueError, match="found, huggingface, modelscope or the URL of a mirror expected"):
        download(target, text)


@pytest.mark.parametrize("text", ["", "a b", "../../x", "a?b", "a&Recursive=false", "-x", "a" * 200, "\0"])
def test_a_revision_that_is_none_is_a_sentence(source, hub, target, text):
    with pytest.raises(ValueError, match="a branch, a tag or a commit expected"):
        download(target, source, text)
    assert hub.asked == []


def test_the_revision_is_asked_for_and_the_files_are_of_its_commit(hub, online, target):
    download(target, hub.url, "a/branch")
    assert hub.asked[0][0].startswith(f"/api/models/{HUB}/revision/a/branch")
    assert all(f"/resolve/{COMMIT}/" in path for path, _ in hub.asked[1:])


# The command line


def command(*arguments, hub=None, before="", **env):
    code = f"import sys; from internvl_u import transfer, download; from internvl_u.__main__ import main; {before}\n"
    line = [sys.executable, "-c", code + "sys.exit(main(sys.argv[1:]))", "download", *map(str, arguments)]
    env = {"HF_HUB_OFFLINE": "0", "HF_HUB_DOWNLOAD_TIMEOUT": "2", "HF_HUB_DISABLE_TELEMETRY": "1"} | env
    return subprocess.Popen(
        line, cwd=ROOT, env=os.environ | env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def of_kind(kind, hub):
    if kind == "huggingface":
        return ["--source", hub.url], ""
    return ["--source", "modelscope"], f"download.MODELSCOPE = {hub.url!r}"


def ended(process, expected):
    out, err = process.communicate(timeout=60)
    assert process.returncode == expected and "Traceback" not in err, (process.returncode, out, err)
    return out, err


@pytest.mark.parametrize("kind", ["huggingface", "modelscope"])
def test_killed_twice_in_the_middle_and_run_again_the_folder_is_the_servers(hub, wanted, target, kind):
    arguments, before = of_kind(kind, hub)
    size, hub.delay = sum(map(len, wanted.values())), 0.01
    for share in (0.3, 0.7):
        process = command(*arguments, "--to", target, before=before)
        deadline = time.monotonic() + 60
        while hub.sent < share * size:
            assert time.monotonic() < deadline and process.poll() is None, process.communicate()
            time.sleep(0.005)
        process.kill()
        process.communicate()
        assert there(target) == [".InternVL-U.download"] and not checkpoints.is_checkpoint(target)
    out, _ = ended(command(*arguments, "--to", target, before=before), 0)
    assert contents(target) == wanted and there(target) == ["InternVL-U"] and out == f"{target}\n"
    ranges = [headers["Range"] for _, headers in hub.asked if "Range" in headers]
    assert len(ranges) == 2 and hub.sent < size * 1.2, (ranges, hub.sent / size)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_what_the_same_command_goes_on_with(hub, wanted, target, number):
    hub.delay = 0.01
    process = command("--source", hub.url, "--to", target)
    while hub.sent < 500_000:
        time.sleep(0.005)
    process.send_signal(number)
    _, err = ended(process, 1 if number == signal.SIGINT else 128 + number)
    if number == signal.SIGINT:
        assert "what was fetched is kept; the same command goes on from there\n" in err
        assert err.endswith("internvl_u: interrupted\n")
    assert there(target) == [".InternVL-U.download"]
    hub.delay = 0
    _, err = ended(command("--source", hub.url, "--to", target), 0)
    assert contents(target) == wanted and f"InternVL-U/InternVL-U from {hub.url} to {target}" in err
    assert "download: 100%" in err


def test_without_a_folder_it_goes_where_comfyui_would_look(hub, wanted, tmp_path):
    line = [sys.executable, "-m", "internvl_u", "download", "--source", hub.url]
    env = os.environ | {
        "HF_HUB_OFFLINE": "0",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    subprocess.run(line, cwd=tmp_path, env=env, check=True, capture_output=True, timeout=60)
    assert contents(tmp_path / "models" / "InternVL-U" / "InternVL-U") == wanted


def test_an_error_is_one_line(hub, target):
    _, err = ended(command("--source", hub.url, "--to", target, HF_HUB_OFFLINE="1"), 1)
    assert err.splitlines()[-1] == "internvl_u: HF_HUB_OFFLINE is set, which forbids every download: unset it"
    hub.fault("/api/", status(404))
    _, err = ended(command("--source", hub.url, "--to", target), 1)
    assert err.splitlines()[-1].startswith(f"internvl_u: {hub.url}/{HUB} is not there (404)")
    assert there(target) == []


def test_a_login_is_for_hugging_face_alone(hub, model, wanted, target):
    with Hub(model, "localhost") as cdn:
        hub.fault("/resolve/", redirect(cdn.url))
        process = command("--to", target, HF_ENDPOINT=hub.url, HF_TOKEN="hf_secret")
        ended(process, 0)
        assert contents(target) == wanted
        assert {headers.get("Authorization") for _, headers in hub.asked} == {"Bearer hf_secret"}
        assert {headers.get("Authorization") for _, headers in cdn.asked} == {None}
        hub.asked.clear()
        for kind in ("huggingface", "modelscope"):
            arguments, before = of_kind(kind, hub)
            ended(command(*arguments, "--to", target.with_name(kind), before=before, HF_TOKEN="hf_secret"), 0)
        assert len(hub.asked) > 20 and {headers.get("Authorization") for _, headers in hub.asked} == {None}
