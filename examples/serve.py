"""A server that labels pictures, in batches of what comes in together: `python examples/serve.py`, and then

    curl --data-binary @photo.jpg http://127.0.0.1:8000/

Each request is read and resized by a thread of its own. One thread takes what has arrived (the first request waits at
most `--wait` milliseconds for company), fills it up to a power of two, for each of which a planned network is ready
before the first request, and hands out the answers. GET / tells how many requests came, and in what batches.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import queue
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from label_folder import DTYPES, TUNE, classifier, picture
from PIL import Image
from torch import Tensor, nn

import fused_resnet
from fused_resnet.cli import positive

LARGEST = 32 << 20  # bytes of a picture
PATIENCE = 60  # seconds that a request waits for its answer, or for its own bytes


class Batcher(threading.Thread):
    """Runs what is submitted in batches, in the order of arrival."""

    def __init__(self, model: nn.Module, example: Tensor, largest: int, wait: float, **options):
        """example: one picture, [C, H, W], on the model's device. wait: seconds that the first of a batch waits.
        options: of optimize_for_inference."""
        super().__init__(daemon=True)
        self.waiting: queue.Queue[tuple[Tensor, Future] | None] = queue.Queue()
        self.largest, self.wait, self.device = largest, wait, example.device
        self.batches: Counter[int] = Counter()
        self.sizes = [1 << i for i in range((largest - 1).bit_length() + 1)]
        whole = example.expand(self.sizes[-1], -1, -1, -1).contiguous()
        self.fast = fused_resnet.optimize_for_inference(model, whole, **options)
        for size in self.sizes[:-1]:
            self.fast(whole[:size].contiguous())

    def submit(self, picture: Tensor) -> Future:
        """The scores of one picture, [classes], when they are there."""
        future: Future = Future()
        self.waiting.put((picture, future))
        return future

    def stop(self) -> None:
        """Answer what was submitted before, then end."""
        self.waiting.put(None)
        self.join()

    def run(self) -> None:
        more = True
        while more:
            first = self.waiting.get()
            if first is None:
                return
            batch, deadline = [first], time.monotonic() + self.wait
            while len(batch) < self.largest:
                try:
                    following = self.waiting.get(timeout=max(0.0, deadline - time.monotonic()))
                except queue.Empty:
                    break
                if following is None:
                    more = False
                    break
                batch.append(following)
            self._answer(batch)

    def _answer(self, batch: list[tuple[Tensor, Future]]) -> None:
        try:
            size = next(s for s in self.sizes if s >= len(batch))
            x = torch.stack([picture for picture, _ in batch] + [batch[0][0]] * (size - len(batch)))
            scores = self.fast(x.to(self.device)).float().cpu()
        except Exception as error:  # those who wait must hear of it
            for _, future in batch:
                future.set_exception(error)
            return
        self.batches[len(batch)] += 1
        for (_, future), row in zip(batch, scores, strict=False):
            future.set_result(row)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = PATIENCE

    def do_GET(self) -> None:
        counts = dict(sorted(self.server.batcher.batches.items()))
        self._send(200, {"pictures": sum(n * times for n, times in counts.items()), "batches": counts})

    def do_POST(self) -> None:
        with self.server.answering():
            self._label()

    def _label(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or not 0 < int(length) <= LARGEST:
            self.close_connection = True  # its body has not been read
            return self._send(413 if length.isdigit() and int(length) else 411, {"error": f"1 to {LARGEST} bytes"})
        body = self.rfile.read(int(length))
        found = picture(io.BytesIO(body), self.server.transform)
        if isinstance(found, str):
            return self._send(400, {"error": f"not a picture that can be read: {found.partition(':')[0]}"})
        try:
            scores = self.server.batcher.submit(found).result(PATIENCE).softmax(0)
        except Exception as error:
            return self._send(503, {"error": f"{type(error).__name__}: {error}"})
        values, classes = scores.topk(min(5, len(scores)))
        best = zip(classes.tolist(), values.tolist(), strict=True)
        self._send(200, {"labels": [{"label": self.server.labels[c], "probability": round(v, 6)} for c, v in best]})

    def _send(self, status: int, answer: dict) -> None:
        body = json.dumps(answer, ensure_ascii=False).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args) -> None: ...


class Server(ThreadingHTTPServer):
    """Answers with the batcher's scores; its threads end with it."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], batcher: Batcher, transform, labels: list[str]):
        super().__init__(address, Handler)
        self.batcher, self.transform, self.labels = batcher, transform, labels
        self.active, self.change = 0, threading.Condition()

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        with self.change:
            self.active += 1
        try:
            yield
        finally:
            with self.change:
                self.active -= 1
                self.change.notify_all()

    def finish(self) -> None:
        """Answer the requests that are there, and end; no more are taken since `serve_forever` returned."""
        with self.change:
            self.change.wait_for(lambda: self.active == 0, PATIENCE)
        self.server_close()
        self.batcher.stop()


def serving(options: argparse.Namespace) -> Server:
    """A server that is ready, its batcher running."""
    model, transform, labels = classifier(options)
    example = transform(Image.new("RGB", (320, 240))).to(options.device)
    how = dict(dtype=getattr(torch, options.dtype), tune=options.tune)
    batcher = Batcher(model, example, options.batch, options.wait / 1e3, **how)
    server = Server((options.host, options.port), batcher, transform, labels)
    batcher.start()
    return server


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="resnet50", choices=fused_resnet.models.TORCHVISION)
    p.add_argument("--weights", default="DEFAULT", help="torchvision's name of them, or none for random ones")
    p.add_argument("--batch", type=positive, default=32 if torch.cuda.is_available() else 8, help="at most")
    p.add_argument("--wait", type=float, default=2.0, help="milliseconds that a request waits for others")
    p.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--dtype", default="float16" if torch.cuda.is_available() else "float32", choices=DTYPES)
    p.add_argument("--tune", default="full", choices=("full", "cached", "off"), help=TUNE)
    p.add_argument("--host", default="127.0.0.1")
    p.add_argument("--port", type=int, default=8000)
    return p


def main(argv: list[str] | None = None) -> int:
    server = serving(parser().parse_args(argv))
    print(f"http://{server.server_address[0]}:{server.server_address[1]}/ is ready; Ctrl-C ends it")
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print("answering what has arrived")
    finally:
        server.finish()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
