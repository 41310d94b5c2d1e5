"""A server on this machine that speaks as Hugging Face and as ModelScope do, and misbehaves where it is told to."""

import hashlib
import json
import threading
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

HUB, MODELSCOPE = "InternVL-U/InternVL-U", "OpenGVLab/InternVL-U"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
CHUNK = 1 << 14


class Hub:
    """Serves a folder's files until it is left; `asked` are (path, headers) of all that it was asked for."""

    def __init__(self, folder, host="127.0.0.1"):
        self.files = {
            file.relative_to(folder).as_posix(): file.read_bytes()
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        }
        self.listed = dict(self.files)
        self.asked, self.faults, self.sent, self.delay = [], [], 0, 0.0
        self.change_list = lambda answer: answer
        self.server = ThreadingHTTPServer((host, 0), type("Handler", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://{host}:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.delay = 0
        self.server.shutdown()
        self.server.server_close()

    def fault(self, part_of_path, act, times=10**9):
        """Lets `act(handler, data)` answer for paths that hold a text, so many times; it returns what is to be sent."""
        self.faults.append([part_of_path, act, times])

    def fault_of(self, path):
        for fault in self.faults:
            if fault[0] in path and fault[2]:
                fault[2] -= 1
                return fault[1]
        return None

    def hub_list(self):
        siblings = []
        for name, data in self.listed.items():
            entry = {"rfilename": name, "size": len(data), "blobId": git(data)}
            if name.endswith(".safetensors"):
                entry["lfs"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "pointerSize": 130}
            siblings.append(entry)
        return {"id": HUB, "sha": COMMIT, "siblings": siblings}

    def modelscope_list(self):
        files = [{"Path": "vlm", "Name": "vlm", "Type": "tree", "Size": 0, "Sha256": ""}]
        for name, data in self.listed.items():
            digest = hashlib.sha256(data).hexdigest()
            files.append({"Path": name, "Name": name, "Type": "blob", "Size": len(data), "Sha256": digest})
        return {"Code": 200, "Success": True, "Message": "", "Data": {"Files": files}}


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub, path = self.hub, urllib.parse.unquote(self.path)
        hub.asked.append((path, self.headers))
        try:
            data = self.answer(path.partition("?")[0])
            act = hub.fault_of(path)
            if act:
                data = act(self, data)
            if data is not None:
                self.send(data)
        except (ConnectionError, TimeoutError):
            pass  # the other side has been killed

    def answer(self, path):
        hub = self.hub
        if path.startswith(f"/api/models/{HUB}"):
            return json.dumps(hub.change_list(hub.hub_list())).encode()
        if path.startswith(f"/api/v1/models/{MODELSCOPE}/repo/files"):
            return json.dumps(hub.change_list(hub.modelscope_list())).encode()
        for beginning in (f"/{HUB}/resolve/{COMMIT}/", f"/models/{MODELSCOPE}/resolve/master/"):
            if path.startswith(beginning):
                return hub.files.get(path[len(beginning) :])
        return None

    def send(self, data, status=200, ranges=True, length=None, stop=None, kind="application/octet-stream"):
        """Sends an answer, of the data what was asked for; `stop` breaks off after so many bytes."""
        first = int(self.headers.get("Range", "bytes=0-")[6:].split("-")[0]) if ranges else 0
        if first and first >= len(data):
            return self.refuse(416)
        self.send_response(206 if first else status)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data) - first if length is None else length))
        self.end_headers()
        data = data[first : None if stop is None else first + stop]
        for start in range(0, len(data), CHUNK):
            self.wfile.write(data[start : start + CHUNK])
            self.hub.sent += len(data[start : start + CHUNK])
            time.sleep(self.hub.delay)
        if stop is not None:
            self.close_connection = True
        return None

    def refuse(self, status, **headers):
        self.send_response(status)
        for name, value in (headers | {"Content-Length": "0"}).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()


def git(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def status(number, **headers):
    """A fault: this status."""
    return lambda handler, data: handler.refuse(number, **headers)


def sends(other=None, **how):
    """A fault: other data, or the same in another way; see `Handler.send`."""
    return lambda handler, data: handler.send(data if other is None else other, **how)


def page(handler, data):
    """A fault: a network's login page."""
    return handler.send(b"<!DOCTYPE html><html>Log in</html>", ranges=False, kind="text/html; charset=utf-8")


def silence(handler, data):
    """A fault: no answer at all."""
    time.sleep(8)
    handler.close_connection = True


def reset(handler, data):
    """A fault: the connection is closed without an answer."""
    handler.close_connection = True


def redirect(base):
    """A fault: what is asked for is elsewhere."""
    return lambda handler, data: handler.refuse(302, Location=base + handler.path)
