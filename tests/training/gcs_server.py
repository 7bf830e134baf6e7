"""A stand-in for Cloud Storage: the part of its JSON API that gcsfs and TensorStore speak, with objects in memory.

It has what a bucket has and nothing else: objects that appear whole, generations and their preconditions. A rename
(``moveTo``), as anything else that is not here, is refused with 501.
"""

import dataclasses
import datetime
import http.server
import itertools
import json
import re
import threading
import urllib.parse


@dataclasses.dataclass
class Object:
    content: bytes
    generation: int


class Buckets(http.server.ThreadingHTTPServer):
    """Serves ``bucket``, while ``forbidden`` answers 403 and ``private`` 401; a context manager, in its own thread.

    Attributes:
      objects: by name, those of ``bucket``.
      refused: a regular expression of the names that may not be written.
      requests: "METHOD name media" of every request, in order; "media" where it is for the content.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, Object] = {}
        self.requests: list[str] = []
        self.lock = threading.Lock()
        self.generations = itertools.count(1)
        self.uploads: dict[str, tuple[str, bytearray]] = {}
        self.refused = ""

    def handle_error(self, *_):
        """Ignore clients that leave without a word, as killed ones do."""

    def download(self, prefix, folder):
        """Write the objects of a folder to a local one; return that."""
        with self.lock:
            stored = {name: object.content for name, object in self.objects.items()}
        for name, content in stored.items():
            if name.startswith(f"{prefix}/"):
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
        return folder / prefix

    @property
    def environment(self):
        """The variables by which gcsfs and TensorStore come here instead of to Google."""
        url = f"http://127.0.0.1:{self.server_port}"
        return {
            "STORAGE_EMULATOR_HOST": url,
            "TENSORSTORE_GCS_HTTP_URL": url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
            "NO_GCE_CHECK": "true",
            # It asks what kind of bucket this is by gRPC, which is not served here.
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class _Refused(Exception):
    def __init__(self, status, message):
        super().__init__(message)
        self.status = status


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 2**16  # a reply is one packet, or the client waits for the second
    server: Buckets

    def log_message(self, *_):
        pass

    def _answer(self):
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        headers: dict[str, str] = {}
        try:
            match = re.fullmatch(
                r"(?:/(upload|download))?/storage/v1/b/([^/]+)(?:/o(?:/([^/]*))?)?(/.*)?", url.path
            )
            if not match or match[4]:
                raise _Refused(501, f"{self.command} {url.path} is not served")
            kind, bucket = match[1], match[2]
            name = None if match[3] is None else urllib.parse.unquote(match[3])
            if bucket == "forbidden":
                raise _Refused(403, "user@example.com does not have storage.objects access")
            if bucket == "private":
                raise _Refused(401, "Anonymous caller does not have storage.objects access")
            if bucket != "bucket":
                raise _Refused(404, "The specified bucket does not exist.")
            with self.server.lock:
                words = (self.command, name or query.get("name", ""), query.get("alt", ""))
                self.server.requests.append(" ".join(words))
                if kind == "upload":
                    status, content, headers = self._upload(query, body)
                elif not url.path.endswith(bucket) and name is None:
                    status, content = 200, self._listing(query)
                elif name is None:
                    status, content = 200, {"name": bucket}
                else:
                    status, content, headers = self._object(name, query)
        except _Refused as refusal:
            status = refusal.status
            content = {"error": {"code": status, "message": str(refusal)}}
        except Exception as error:
            status = 400  # not retried
            content = {
                "error": {
                    "code": status,
                    "message": f"{error!r} in {self.path} {dict(self.headers)}",
                }
            }
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for header, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(header, value)
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = do_DELETE = _answer

    def _check(self, name, query):
        """Refuse unless the object has the generation that the request depends on; 0 means that there is none."""
        stored = self.server.objects.get(name)
        wanted = query.get("ifGenerationMatch")
        if wanted is not None and int(wanted) != (stored.generation if stored else 0):
            raise _Refused(412, "conditionNotMet")
        return stored

    def _put(self, name, content, query):
        if self.server.refused and re.search(self.server.refused, name):
            raise _Refused(403, "user@example.com does not have storage.objects.create access")
        self._check(name, query)
        stored = Object(bytes(content), next(self.server.generations))
        self.server.objects[name] = stored
        return 200, _metadata(name, stored), {}

    def _upload(self, query, body):
        if "upload_id" in query:  # a part of a resumable upload
            name, content = self.server.uploads[query["upload_id"]]
            content += body
            if self.headers["Content-Range"].endswith("/*"):
                return 308, b"", {"Range": f"bytes=0-{len(content) - 1}"}
            return self._put(name, content, query)
        if query.get("uploadType") == "media":
            return self._put(query["name"], body, query)
        if query.get("uploadType") == "resumable":
            number = str(next(self.server.generations))
            name = query.get("name") or json.loads(body)["name"]
            self.server.uploads[number] = name, bytearray()
            place = (
                f"{self.server.environment['STORAGE_EMULATOR_HOST']}/upload/storage/v1/b/bucket/o"
            )
            return 200, b"", {"Location": f"{place}?upload_id={number}"}
        boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
        _, metadata, content, _ = re.split(rb"\r?\n?--" + re.escape(boundary), body)
        name = json.loads(re.split(rb"\r?\n\r?\n", metadata, maxsplit=1)[1])["name"]
        return self._put(name, re.split(rb"\r?\n\r?\n", content, maxsplit=1)[1], query)

    def _object(self, name, query):
        stored = self._check(name, query)
        if stored is None:
            raise _Refused(404, f"No such object: bucket/{name}")
        if self.command == "DELETE":
            del self.server.objects[name]
            return 204, b"", {}
        if query.get("alt") != "media":
            return 200, _metadata(name, stored), {}
        if int(query.get("ifGenerationNotMatch", -1)) == stored.generation:
            return 304, b"", {}
        headers = {"x-goog-generation": str(stored.generation)}
        size = len(stored.content)
        span = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if not span:
            return 200, stored.content, headers
        start = int(span[1]) if span[1] else size - int(span[2])
        end = min(int(span[2]) + 1, size) if span[1] and span[2] else size
        if start >= size:
            raise _Refused(416, "Request range not satisfiable")
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        return 206, stored.content[start:end], headers

    def _listing(self, query):
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        items, prefixes = [], set()
        for name in sorted(name for name in self.server.objects if name.startswith(prefix)):
            folder, found, _ = name.removeprefix(prefix).partition(delimiter or "\0")
            if found:
                prefixes.add(prefix + folder + found)
            elif query.get("startOffset", "") <= name < query.get("endOffset", "\U0010ffff"):
                items.append(_metadata(name, self.server.objects[name]))
        return {"items": items, "prefixes": sorted(prefixes)}


def _metadata(name, stored):
    # Every write a second later than the one before.
    time = datetime.datetime(2026, 1, 1) + datetime.timedelta(seconds=stored.generation)
    written = f"{time.isoformat()}.000Z"
    return {
        "kind": "storage#object",
        "bucket": "bucket",
        "name": name,
        "size": str(len(stored.content)),
        "generation": str(stored.generation),
        "updated": written,
        "timeCreated": written,
    }
